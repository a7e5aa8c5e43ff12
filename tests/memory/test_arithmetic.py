"""The formulas of memory give what bitsandbytes' buffers and real passes over a large vocabulary take."""

import pytest
import torch
from conftest import tiny_config
from transformers import LlamaForCausalLM

from instruct_trl.memory import arithmetic
from instruct_trl.memory.trace import LiveBytes
from instruct_trl.models.logprobs import completion_logps


@pytest.mark.parametrize("double_quant", [False, True])
def test_nf4_bytes_are_those_of_bitsandbytes(double_quant):
    functional = pytest.importorskip("bitsandbytes.functional")
    sizes = [(64, 48), (300, 7), (512, 256)]
    measured = 0
    for size in sizes:
        packed, state = functional.quantize_4bit(
            torch.randn(size), quant_type="nf4", compress_statistics=double_quant, blocksize=64
        )
        parts = [packed, state.absmax, state.code]
        if double_quant:
            parts += [state.offset, state.state2.absmax, state.state2.code]
        measured += sum(part.numel() * part.element_size() for part in parts)
    assert arithmetic.nf4_bytes([a * b for a, b in sizes], double_quant) == measured


def test_nf4_takes_about_half_a_byte_a_parameter():
    big = [4096 * 11008]
    assert arithmetic.nf4_bytes(big, True) / big[0] == pytest.approx(0.5 + 1 / 64 + 4 / (64 * 256), rel=1e-4)
    assert arithmetic.nf4_bytes(big, False) / big[0] == pytest.approx(0.5 + 4 / 64, rel=1e-4)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_the_log_probs(dtype, entropy):
    """The peak over the transformer's own, with a vocabulary so large that all else is small beside it."""
    rows, prompt, completion, vocabulary = 3, 5, 20, 8000
    model = LlamaForCausalLM(tiny_config(vocab_size=vocabulary)).to(dtype)
    ids = torch.ones(rows, prompt + completion, dtype=torch.long)
    with LiveBytes(model.parameters()) as live, torch.set_grad_enabled(entropy):
        logps, _ = completion_logps(model, ids, torch.ones_like(ids), completion, compute_entropy=entropy)
        forward = live.peak
        if entropy:
            logps.sum().backward()
    expected = arithmetic.logps_bytes(rows * completion, vocabulary, dtype.itemsize, entropy)
    assert forward == pytest.approx(expected, rel=0.06)
    gradients = model.lm_head.weight.grad.nbytes * 2 if entropy else 0  # the embedding's is as large
    assert live.peak <= 1.06 * expected + gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_the_cross_entropy(dtype):
    rows, tokens, vocabulary = 3, 40, 8000
    model = LlamaForCausalLM(tiny_config(vocab_size=vocabulary)).to(dtype).requires_grad_(False)
    model.model.norm.requires_grad_(True)
    ids = torch.ones(rows, tokens, dtype=torch.long)
    with LiveBytes(model.parameters()) as live:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert live.peak == pytest.approx(arithmetic.cross_entropy_bytes(rows, tokens, vocabulary, dtype.itemsize), rel=0.1)
