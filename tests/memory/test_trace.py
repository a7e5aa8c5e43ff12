"""A pass over fake tensors keeps the bytes that a pass of a real model keeps."""

import copy

import pytest
import torch
from conftest import tiny_config
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, LlamaForCausalLM

from instruct_trl.memory.roles import ModelShape
from instruct_trl.memory.trace import LiveBytes, Precision, trace_pass

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


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
    assert run.copies == 2 * sum(ModelShape(config).matrices)
    assert run.copies < run.kept <= run.forward


def test_other_architectures_are_counted_as_well():
    config = GPT2Config(vocab_size=100, n_positions=64, n_embd=16, n_layer=2, n_head=2)
    model = AutoModelForCausalLM.from_config(config)
    assert ModelShape(config).parameters == sum(p.numel() for p in model.parameters())
    assert trace_pass(config, 2, 16, train=True).kept > 0
