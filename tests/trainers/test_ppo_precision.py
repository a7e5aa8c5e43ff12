"""The rollout's forwards: no graph, the precision that was asked for, float32 results, and a KL that starts at 0."""

import copy

import pytest
import torch
from conftest import tiny_config
from ppo_helpers import PROMPTS, make
from transformers import LlamaForSequenceClassification

from instruct_trl import RewardScorer, value_model_from_reward_model

FLOAT, HALF = torch.float32, torch.bfloat16


def roll(trainer):
    trainer.model.train()
    return trainer._generate_and_score_completions([{"prompt": prompt} for prompt in PROMPTS["prompt"]])


def adapted(policy):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(policy, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], r=2))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_()  # a trained adapter: the reference is the policy with it, not the base
    return model


@pytest.mark.parametrize("kind", ["full", "old adapter", "new adapter"])
@pytest.mark.parametrize(("bf16", "dtype"), [(False, FLOAT), (True, FLOAT), (False, HALF), (True, HALF)])
def test_the_kl_of_the_first_rollout_is_0_bit_for_bit(tmp_path, policy, scorer, tokenizer, bf16, dtype, kind):
    policy = policy.to(dtype)
    if kind == "old adapter":
        policy = adapted(policy)
    if kind == "new adapter":
        from peft import LoraConfig, get_peft_model

        policy = get_peft_model(policy, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2))
    trainer = make(
        tmp_path, policy, scorer, tokenizer, bf16=bf16, temperature=0.7, local_rollout_forward_batch_size=5,
        ptx_coef=0.0,
    )  # fmt: skip
    rollout = roll(trainer)
    assert rollout["old_per_token_logps"].abs().max() > 1
    assert torch.equal(rollout["ref_per_token_logps"], rollout["old_per_token_logps"])
    assert rollout["kl"].abs().max() == 0
    assert trainer._metrics["train"]["kl"] == [0]


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_in_float32_is_the_references_too(tmp_path, scorer, tokenizer, tied):
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    policy = LlamaForCausalLM(tiny_config(tie_word_embeddings=tied)).to(HALF)
    policy.generation_config.eos_token_id = 256
    trainer = make(tmp_path, policy, scorer, tokenizer, cast_lm_head_to_fp32=True, ptx_coef=0.0)
    rollout = roll(trainer)
    assert trainer.ref_model.lm_head.weight.dtype == policy.lm_head.weight.dtype == FLOAT
    assert trainer.ref_model.lm_head.weight is not policy.lm_head.weight
    assert torch.equal(rollout["ref_per_token_logps"], rollout["old_per_token_logps"])
    with torch.no_grad():
        policy.lm_head.weight.mul_(1.5)  # the reference does not follow
    assert roll(trainer)["kl"].abs().max() > 1e-3


def test_a_head_in_float32_is_so_under_autocast(tmp_path, policy, scorer, tokenizer):
    """Against the float32 product of what goes in; policy and reference, rollout and loss."""
    trainer = make(
        tmp_path, policy, scorer, tokenizer, cast_lm_head_to_fp32=True, bf16=True, ptx_coef=0.0, total_episodes=16,
        max_steps=1,
    )  # fmt: skip
    found = {"policy": [], "reference": []}
    for model, calls in zip((policy, trainer.ref_model), found.values(), strict=True):

        def check(module, args, output, calls=calls):
            exact = torch.nn.functional.linear(args[0].detach().double(), module.weight.detach().double())
            calls.append((output.dtype, (output.detach() - exact).abs().max().item()))

        model.lm_head.register_forward_hook(check)
    trainer.train()
    for calls in found.values():
        assert calls
        assert {dtype for dtype, _ in calls} == {FLOAT}
        assert max(gap for _, gap in calls) < 1e-6


@pytest.mark.parametrize(
    ("bf16", "policy_dtype", "reward_dtype", "computed"),
    [
        (False, FLOAT, FLOAT, {"policy": FLOAT, "reference": FLOAT, "reward": FLOAT, "value": FLOAT}),
        (True, FLOAT, FLOAT, {"policy": HALF, "reference": HALF, "reward": HALF, "value": HALF}),
        (False, FLOAT, HALF, {"policy": FLOAT, "reference": HALF, "reward": HALF, "value": FLOAT}),
        (True, FLOAT, HALF, {"policy": HALF, "reference": HALF, "reward": HALF, "value": HALF}),
    ],
)
def test_forwards_of_the_rollout_have_their_precision_no_graph_and_float32_results(
    tmp_path, policy, reward_model, tokenizer, bf16, policy_dtype, reward_dtype, computed
):
    """Autocast where bf16 is set, else the weights' own dtype; reference and reward model may be loaded in bf16."""
    trainer = make(
        tmp_path, policy.to(policy_dtype), RewardScorer(reward_model.to(reward_dtype), tokenizer), tokenizer,
        bf16=bf16, ptx_coef=0.0,
    )  # fmt: skip
    trainer.ref_model.to(reward_dtype)
    models = {
        "policy": policy, "reference": trainer.ref_model, "reward": reward_model,
        "value": trainer.critic.unwrapped.classifier,
    }  # fmt: skip
    assert {name: next(model.parameters()).dtype for name, model in models.items()} == {
        "policy": policy_dtype, "reference": reward_dtype, "reward": reward_dtype, "value": FLOAT,
    }  # fmt: skip
    seen = {name: [] for name in models}
    for name, model in models.items():
        model.model.layers[1].mlp.down_proj.register_forward_hook(
            lambda module, args, output, seen=seen[name]: seen.append((output.dtype, output.requires_grad))
        )
    generate = trainer._generate_single_turn

    def generate_unseen(*args, **kwargs):
        answers = generate(*args, **kwargs)
        seen["policy"].clear()  # sampling is TRL's, and outside of autocast
        return answers

    trainer._generate_single_turn = generate_unseen
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        rollout = roll(trainer)
    assert kept == []
    assert {name: set(found) for name, found in seen.items()} == {name: {(d, False)} for name, d in computed.items()}
    for name in ("old_per_token_logps", "ref_per_token_logps", "kl", "scores", "old_values", "returns", "advantages"):
        assert rollout[name].dtype == FLOAT, name
        assert not rollout[name].requires_grad, name


def test_bf16_changes_the_rollout_by_its_rounding_only(tmp_path, policy, reward_model, tokenizer):
    found = {}
    for bf16 in (False, True):
        scorer = RewardScorer(copy.deepcopy(reward_model), tokenizer)
        trainer = make(tmp_path, copy.deepcopy(policy), scorer, tokenizer, bf16=bf16, ptx_coef=0.0)
        trainer._generate_single_turn = lambda ids, *_, **__: ([[7 + sum(row) % 200, 8, 256] for row in ids], None)
        found[bf16] = roll(trainer)
    for name in ("old_per_token_logps", "ref_per_token_logps", "scores", "old_values"):
        torch.testing.assert_close(found[True][name], found[False][name], atol=0.05, rtol=2**-7)
        assert not torch.equal(found[True][name], found[False][name]), name


def test_the_critic_is_trained_in_float32_also_from_a_reward_model_in_bf16(tmp_path, policy, tokenizer):
    torch.manual_seed(1)
    reward_model = LlamaForSequenceClassification(tiny_config(num_labels=1)).to(HALF)
    critic = value_model_from_reward_model(reward_model)
    assert {parameter.dtype for parameter in critic.parameters()} == {FLOAT}
    trainer = make(
        tmp_path, policy, RewardScorer(reward_model, tokenizer), tokenizer, value_learning_rate=9e-6, ptx_coef=0.0,
        total_episodes=16,
    )  # fmt: skip
    trainer.train()
    start, end = reward_model.model.layers[0].mlp.down_proj.weight, trainer.critic.unwrapped.classifier
    moved = (end.model.layers[0].mlp.down_proj.weight - start.float()).abs()
    # Adam moves a weight by about its learning rate; a weight of 0.02 in bf16 moves by 6e-5 or not at all.
    assert 9e-6 < moved.median() < 4 * 9e-6
    assert {parameter.dtype for parameter in reward_model.parameters()} == {HALF}
