"""A plan of PPO holds the roles of its layout, and its phases hold what is there at the time."""

import pytest
import torch
from conftest import tiny_config
from memory_helpers import llama_7b
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from instruct_trl import PPOPtxConfig
from instruct_trl.memory import arithmetic
from instruct_trl.memory.plan import LAYOUTS, PPOModels, ppo_plan, ppo_roles
from instruct_trl.memory.roles import ModelShape, total

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LORA = LoraConfig(r=2, target_modules=ATTENTION)


def settings(tmp_path, **changes):
    """A run of one iteration: 4 episodes in minibatches of 2 rows, 8 + 8 tokens, without gradient checkpointing."""
    small = {"generation_batch_size": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    small |= {"local_rollout_forward_batch_size": 4, "max_completion_length": 8, "ptx_coef": 0.0}
    return PPOPtxConfig(str(tmp_path), gradient_checkpointing=False, **{**small, **changes})


def test_ppo_of_a_tiny_model_in_numbers(tmp_path):
    """Against counts of a real model."""
    config = tiny_config()
    real = LlamaForCausalLM(config)
    policy = sum(p.numel() for p in real.parameters())
    value = sum(p.numel() for p in real.model.parameters()) + 16
    plan = ppo_plan(PPOModels(config, config), settings(tmp_path), prompt=8, fused_head=False)
    assert total(plan.resident, kinds=["weights"]) == 4 * (2 * policy + 2 * value)
    assert total(plan.resident, "policy", ["optimizer"]) == 8 * policy
    assert total(plan.resident, "policy", ["average"]) == 4 * policy
    assert total(plan.resident, "value", ["optimizer"]) == 8 * value
    assert total(plan.resident, "reward", ["optimizer"]) == 0
    (step,) = [phase for phase in plan.phases if phase.name == "optimizer step"]
    assert step.size == 4 * (policy + value)


def test_layouts_hold_what_their_names_say():
    config = tiny_config()
    adapter = sum(p.numel() for p in get_peft_model(LlamaForCausalLM(config), LORA).parameters() if p.requires_grad)
    base = ModelShape(config).parameters
    classifier = ModelShape(config, score=True).parameters
    weights = {}
    for layout in LAYOUTS:
        roles = ppo_roles(PPOModels(config, config, layout, peft_config=LORA))
        weights[layout] = sum(total(role.resident(), kinds=["weights", "adapters"]) for role in roles.values())
    assert weights["four_full"] == 4 * (2 * base + 2 * classifier)
    assert weights["policy_lora"] == 4 * (base + adapter + 2 * classifier)
    assert weights["four_lora"] == 4 * (2 * base + 2 * classifier + 4 * adapter)
    assert weights["one_base"] == 4 * (base + 4 * adapter + 2 * 16)  # two scalar heads
    trained = ppo_roles(PPOModels(config, config, "one_base", peft_config=LORA))
    numbers = {name: role.trainable for name, role in trained.items()}
    assert numbers == {"base": 0, "policy": adapter, "reference": 0, "reward": 0, "value": adapter + 16}


def test_adapters_are_refused_where_they_are_missing():
    config = tiny_config()
    with pytest.raises(ValueError, match="needs a peft_config"):
        ppo_roles(PPOModels(config, config, "one_base"))
    with pytest.raises(ValueError, match="layout must be one of"):
        ppo_roles(PPOModels(config, config, "two_bases"))


def test_a_7b_in_4_bit_takes_half_a_byte_per_parameter():
    """On one base, where four full float32 models with AdamW take over 100 GB; the cache of 8 rows of 768 tokens."""
    config = llama_7b()
    lora = LoraConfig(r=16, target_modules=ATTENTION)
    models = PPOModels(config, config, "one_base", dtype=torch.bfloat16, nf4=True, peft_config=lora, autocast=True)
    roles = ppo_roles(models)
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    plain = 2 * 32000 * 4096 + 65 * 4096
    expected = (0.5 + 1 / 64 + 4 / (64 * 256)) * linear + 2 * plain
    assert total(roles["base"].resident()) == pytest.approx(expected, rel=1e-3)
    assert roles["policy"].kv_cache(8, 768) == 2 * 32 * 8 * 768 * 4096 * 2
    four = [role.resident() for role in ppo_roles(PPOModels(config, config)).values()]
    assert sum(total(items) for items in four) > 100e9


@pytest.mark.parametrize("fused", [False, True])
def test_the_head_decides_between_full_logits_and_tiles(tmp_path, fused):
    config = tiny_config(vocab_size=8000)
    plan = ppo_plan(PPOModels(config, config), settings(tmp_path), prompt=8, fused_head=fused)
    (scores,) = [phase for phase in plan.phases if phase.name == "log-probs"]
    expected = arithmetic.fused_head_bytes(32, 16, 8000) if fused else arithmetic.logps_bytes(32, 8000)
    assert total(scores.items, kinds=["logits"]) == expected


def test_gradients_wait_for_each_other_when_they_accumulate(tmp_path):
    config = tiny_config()

    def gradients(accumulation, role):
        run = settings(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=accumulation)
        plan = ppo_plan(PPOModels(config, config), run, prompt=8, fused_head=False)
        (update,) = [phase for phase in plan.phases if phase.name == "policy update"]
        return total(update.items, role, ["gradients"])

    assert gradients(1, "value") == 0
    assert gradients(2, "value") == 4 * ModelShape(config, score=True).parameters
