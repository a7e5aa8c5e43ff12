"""Weights, adapters, moments and caches of a role take the bytes of real models, optimizers and generations."""

import pytest
import torch
from conftest import tiny_config
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
)

from instruct_trl.memory.arithmetic import nf4_bytes
from instruct_trl.memory.plan import generation_phase
from instruct_trl.memory.roles import ModelShape, RoleModel, read_adapter, read_config, total
from instruct_trl.memory.trace import Precision, trace_pass

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LORA = LoraConfig(r=2, target_modules=ATTENTION)


def storage_bytes(tensors):
    """Bytes of the storages behind these tensors, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_those_of_the_real_model(tied, reward_model):
    config = tiny_config(tie_word_embeddings=tied, num_key_value_heads=1)
    model = LlamaForCausalLM(config)
    shape = ModelShape(config)
    assert RoleModel("model", shape).base_bytes() == storage_bytes(model.parameters())
    assert ModelShape(reward_model.config, score=True).parameters == sum(p.numel() for p in reward_model.parameters())
    linear = [m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    assert sorted(shape.matrices) == sorted(linear)
    assert shape.head == model.lm_head.weight.numel()


@pytest.mark.parametrize("targets", [ATTENTION, ["q_proj", "v_proj"], "all-linear"])
def test_adapter_parameters_are_those_that_peft_adds(targets):
    config = tiny_config(num_key_value_heads=1)
    lora = LoraConfig(r=3, target_modules=targets, task_type="SEQ_CLS", modules_to_save=["score"])
    real = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=3, target_modules=targets))
    count = sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert ModelShape(config).adapter_parameters(lora) == count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_and_gradients_are_those_of_a_real_step(dtype):
    model = LlamaForCausalLM(tiny_config()).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(2, 7, dtype=torch.long)).logits.sum().backward()
    role = RoleModel("policy", ModelShape(tiny_config()), Precision(dtype), trained=True)
    assert role.gradients == storage_bytes(p.grad for p in model.parameters())
    optimizer.step()
    moments = [t for state in optimizer.state.values() for name, t in state.items() if name.startswith("exp_avg")]
    assert total(role.resident(), kinds=["optimizer"]) == storage_bytes(moments)


def cache_bytes(config, rows, tokens):
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    cache = DynamicCache(config=config)
    with torch.no_grad():
        for _ in range(tokens):  # token by token, as in generation
            model(torch.ones(rows, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
    return sum(part.numel() * part.element_size() for layer in cache.layers for part in (layer.keys, layer.values))


def test_kv_cache_is_that_of_a_real_generation():
    config = tiny_config(num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3)
    found = RoleModel("policy", ModelShape(config)).kv_cache(5, 12)
    assert cache_bytes(config, 5, 12) == found == 2 * 5 * 12 * 3 * 2 * 4 * 4


def test_kv_cache_of_sliding_layers_stops_at_the_window():
    config = MistralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, sliding_window=6, max_position_embeddings=64,
    )  # fmt: skip
    shape = ModelShape(config)
    assert shape.cached_numbers(20) == 2 * 2 * 5 * 2 * 8  # two layers that keep five tokens of two heads of 8
    assert RoleModel("policy", shape).kv_cache(2, 20) == cache_bytes(config, 2, 20)


@pytest.mark.parametrize("kind", ["rotated", "absolute", "adapter"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_of_a_generation_under_bf16_is_that_of_a_real_one(kind, dtype):
    """With autocast where accelerate puts it: on the forward of what was prepared."""
    if kind == "absolute":
        config = GPT2Config(vocab_size=258, n_embd=16, n_layer=2, n_head=2, n_positions=64, eos_token_id=256)
        model = GPT2LMHeadModel(config).to(dtype)
    else:
        config = tiny_config()
        model = LlamaForCausalLM(config).to(dtype)
    lora = LoraConfig(r=2, target_modules=ATTENTION, task_type="CAUSAL_LM") if kind == "adapter" else None
    if lora is not None:
        model = get_peft_model(model, lora)
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    ids = torch.ones(3, 5, dtype=torch.long)
    cache = model.eval().generate(
        input_ids=ids, attention_mask=ids, max_new_tokens=4, min_new_tokens=4, return_dict_in_generate=True,
        pad_token_id=257,
    ).past_key_values  # fmt: skip
    found = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    role = RoleModel("policy", ModelShape(config), Precision(dtype, autocast=True), lora)
    assert role.kv_cache(3, 5 + 4 - 1) == found  # nothing follows the last token
    if lora is not None:
        without = RoleModel("policy", role.shape, Precision(dtype), lora)
        assert generation_phase(role, 3, 5, 4) == generation_phase(without, 3, 5, 4)


def test_4_bit_leaves_embeddings_norms_and_head_as_they_are():
    config = tiny_config(hidden_size=64, intermediate_size=128)
    shape = ModelShape(config)
    role = RoleModel("base", shape, Precision(torch.bfloat16), nf4=True)
    real = LlamaForCausalLM(config)
    packed = [m.weight.numel() for n, m in real.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    plain = sum(p.numel() for p in real.parameters()) - sum(packed)
    assert role.base_bytes() == 2 * plain + nf4_bytes(packed)


def test_an_adapter_folder_gives_base_and_rank(tmp_path):
    config = tiny_config(num_hidden_layers=3)
    model = LlamaForCausalLM(config)
    model.name_or_path = str(tmp_path / "base")
    get_peft_model(model, LORA).save_pretrained(tmp_path / "sft")
    config.save_pretrained(tmp_path / "base")  # the config alone
    assert read_config(tmp_path / "base").num_hidden_layers == read_config(tmp_path / "sft").num_hidden_layers == 3
    assert read_adapter(tmp_path / "sft").r == 2
    assert read_adapter(tmp_path / "base") is None
    with pytest.raises(ValueError, match="no model folder"):
        read_config(tmp_path / "gone")


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", "SEQ_CLS"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_saved_adapter_is_planned_as_one_that_trains(tmp_path, task_type, checkpointing):
    """PEFT saves `inference_mode: true`, which would freeze it."""
    kind = LlamaForCausalLM if task_type == "CAUSAL_LM" else LlamaForSequenceClassification
    lora = LoraConfig(r=2, target_modules=ATTENTION, task_type=task_type)
    model = get_peft_model(kind(tiny_config(num_labels=1)), lora)
    model.save_pretrained(tmp_path / "saved")
    adapter = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    peft_config = read_adapter(str(tmp_path / "saved"))
    found = trace_pass(tiny_config(), 2, 8, peft_config=peft_config, train=True, checkpointing=checkpointing)
    assert found.gradients == 4 * adapter
