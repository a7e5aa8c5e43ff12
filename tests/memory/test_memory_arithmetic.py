"""Each kind of memory against what really instantiated models, caches, optimizers and autograd take."""

import copy

import pytest
import torch
from conftest import tiny_config
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config, LlamaForCausalLM, MistralConfig

from instruct_trl.memory import arithmetic as arithmetic
from instruct_trl.memory.shapes import ModelShape, read_config
from instruct_trl.memory.trace import LiveBytes, Precision, trace_pass
from instruct_trl.models.logprobs import completion_logps

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def storage_bytes(tensors):
    """Bytes of the storages behind these tensors, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_those_of_the_real_model(tied, reward_model):
    config = tiny_config(tie_word_embeddings=tied, num_key_value_heads=1)
    model = LlamaForCausalLM(config)
    shape = ModelShape(config)
    assert arithmetic.weight_bytes(shape.parameters) == storage_bytes(model.parameters())
    assert ModelShape(reward_model.config, score=True).parameters == sum(p.numel() for p in reward_model.parameters())
    linear = [m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    assert sorted(shape.matrices) == sorted(linear)
    assert shape.head == model.lm_head.weight.numel()


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


@pytest.mark.parametrize("targets", [ATTENTION, ["q_proj", "v_proj"], "all-linear"])
def test_lora_parameters_are_those_that_peft_adds(targets):
    config = tiny_config(num_key_value_heads=1)
    lora = LoraConfig(r=3, target_modules=targets, task_type="SEQ_CLS", modules_to_save=["score"])
    real = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=3, target_modules=targets))
    count = sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert ModelShape(config).adapter_parameters(lora) == count
    shapes = {"q_proj": (16, 16), "k_proj": (16, 8), "v_proj": (16, 8), "o_proj": (16, 16)}
    shapes |= {"gate_proj": (16, 32), "up_proj": (16, 32), "down_proj": (32, 16)}
    names = shapes if targets == "all-linear" else targets
    assert arithmetic.lora_parameters([shapes[n] for n in names] * 2, 3) == count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_and_gradients_are_those_of_a_real_step(dtype):
    model = nn.Linear(7, 5, dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(2, 7, dtype=dtype)).sum().backward()
    assert arithmetic.gradient_bytes(40, dtype.itemsize) == storage_bytes(p.grad for p in model.parameters())
    optimizer.step()
    moments = [t for state in optimizer.state.values() for name, t in state.items() if name.startswith("exp_avg")]
    assert arithmetic.adam_bytes(40, dtype.itemsize) == storage_bytes(moments)


def cache_bytes(config, rows, tokens):
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    cache = DynamicCache(config=config)
    with torch.no_grad():
        for _ in range(tokens):  # token by token, as in generation
            model(torch.ones(rows, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
    return sum(part.numel() * part.element_size() for layer in cache.layers for part in (layer.keys, layer.values))


def test_kv_cache_is_that_of_a_real_generation():
    config = tiny_config(num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3)
    expected = arithmetic.kv_cache_bytes(5, 12, layers=3, kv_heads=2, head_dim=4, width=4)
    assert cache_bytes(config, 5, 12) == expected == 2 * 5 * 12 * 3 * 2 * 4 * 4


def test_kv_cache_of_sliding_layers_stops_at_the_window():
    config = MistralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, sliding_window=6, max_position_embeddings=64,
    )  # fmt: skip
    shape = ModelShape(config)
    assert shape.windows == [6, 6]
    got = arithmetic.kv_cache_bytes(2, 20, 2, shape.kv_heads, shape.head_dim, 4, shape.windows)
    assert got == cache_bytes(config, 2, 20)


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


def test_live_bytes_counts_storages_once_and_forgets_the_dead():
    with LiveBytes() as live:
        first = torch.zeros(1000)
        view = first[10:20].view(2, 5)
        assert (live.now, live.peak) == (4000, 4000)
        second = first + 1
        del first
        assert (live.now, live.peak) == (8000, 8000)  # the view keeps it
        del view, second
        assert (live.now, live.peak) == (0, 8000)
        live.restart()
        assert live.peak == 0


def real_pass(config, rows, tokens, *, autocast=False, peft_config=None, checkpointing=False, accumulates=False):
    """(kept after the forward, peak of the backward, gradients) of a real model on real tensors."""
    model = LlamaForCausalLM(config)
    if peft_config is not None:
        model = get_peft_model(model, copy.deepcopy(peft_config))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if peft_config is not None:
            model.enable_input_require_grads()
    model.train()
    transformer = (model.get_base_model() if peft_config is not None else model).base_model
    ids = torch.ones(rows, tokens, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # padding, or transformers leaves the mask out
    with LiveBytes(model.parameters()) as live:
        for _ in range(1 + accumulates):
            before = live.now
            live.restart()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                hidden = transformer(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
                kept = live.now - before
            live.restart()
            hidden.float().sum().backward()
            del hidden
    return kept, live.peak, live.now


@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "peft_config",
    [
        None,
        LoraConfig(r=2, target_modules=ATTENTION),
        LoraConfig(r=2, target_modules=ATTENTION, modules_to_save=["lm_head"]),
    ],
    ids=["full", "lora", "lora and head"],
)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_pass_over_shapes_is_a_pass_over_numbers(autocast, peft_config, checkpointing, accumulates):
    config = tiny_config(hidden_size=32, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
    how = {"peft_config": peft_config, "checkpointing": checkpointing, "accumulates": accumulates}
    traced = trace_pass(config, 4, 24, train=True, precision=Precision(autocast=autocast), **how)
    kept, backward, gradients = real_pass(config, 4, 24, autocast=autocast, **how)
    assert traced.kept == pytest.approx(kept, rel=0.02)
    assert traced.backward == pytest.approx(backward, rel=0.02)
    assert traced.gradients == pytest.approx(gradients, rel=0.02)


def test_checkpointing_keeps_one_hidden_state_a_layer():
    """L · B · T · H · 4, beside what does not grow with L."""
    kept = [
        trace_pass(tiny_config(num_hidden_layers=layers), 4, 24, train=True, checkpointing=True).kept
        for layers in (2, 7)
    ]
    assert kept[1] - kept[0] == 5 * 4 * 24 * 16 * 4


@pytest.mark.parametrize("train", [False, True])
def test_autocast_keeps_a_bf16_copy_of_each_trained_matrix(train):
    config = tiny_config()
    run = trace_pass(config, 2, 8, train=train, precision=Precision(autocast=True))
    assert run.copies == arithmetic.autocast_copy_bytes(sum(ModelShape(config).matrices))
    assert run.copies < run.kept <= run.forward


def test_other_architectures_are_counted_as_well():
    config = GPT2Config(vocab_size=100, n_positions=64, n_embd=16, n_layer=2, n_head=2)
    model = AutoModelForCausalLM.from_config(config)
    assert ModelShape(config).parameters == sum(p.numel() for p in model.parameters())
    assert trace_pass(config, 2, 16, train=True).kept > 0


def test_a_config_is_read_from_a_folder_and_from_behind_an_adapter(tmp_path):
    model = LlamaForCausalLM(tiny_config(num_hidden_layers=3))
    model.save_pretrained(tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")
    get_peft_model(model, LoraConfig(target_modules=ATTENTION)).save_pretrained(tmp_path / "adapter")
    assert read_config(tmp_path / "base").num_hidden_layers == 3
    assert read_config(tmp_path / "adapter").num_hidden_layers == 3
    with pytest.raises(ValueError, match="no model folder"):
        read_config(tmp_path / "gone")
