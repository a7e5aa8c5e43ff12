"""PPO on one base: the trajectory of four separate models that hold the same weights; nothing leaks between roles."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel
from ppo_helpers import PROMPTS, make
from role_helpers import BIAS, SIZES, randomise, save_pieces, separate_models, sft_lora
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from instruct_trl import RewardScorer, RoleAdapters
from instruct_trl.models.adapters import adapters_are_on
from instruct_trl.models.value import ValueModel


def make_roles(root, folder="run", roles=None, **kwargs):
    """A trainer on one base, and its settings those of `make`."""
    roles = roles or RoleAdapters(root / "base", root / "sft", root / "rm")
    return make(root / folder, None, None, None, role_adapters=roles, **{"value_learning_rate": 1e-3, **kwargs})


def make_separate(root, tokenizer, folder="separate", on_sft=False, **kwargs):
    """The same with four models, put together by PEFT."""
    policy, reference, reward, value = separate_models(root, on_sft)
    reward.config.pad_token_id = 257
    value_model = ValueModel(value.base_model.model)
    return make(
        root / folder, policy, RewardScorer(reward, tokenizer), tokenizer, value_model=value_model,
        ref_model=reference.merge_and_unload(), **{"value_learning_rate": 1e-3, **kwargs},
    )  # fmt: skip


def weights(trainer):
    """What each role trained, in order, flat."""
    flat = {"policy": [p for n, p in trainer.model.named_parameters() if ".default." in n]}
    value = trainer.critic.unwrapped
    own = [(n, p) for n, p in value.named_parameters() if n.startswith("score") or p.requires_grad]
    if trainer.role_adapters is not None:
        own = list(value.named_parameters())
    own.sort(key=lambda item: item[1].numel() == 16)  # the head last
    flat["value"] = [p for _, p in own]
    flat["ema"] = trainer.ema.shadow
    return {name: torch.cat([p.detach().flatten() for p in parameters]) for name, parameters in flat.items()}


def metrics(trainer):
    return [
        {k: v for k, v in row.items() if "time" not in k and "second" not in k}
        for row in trainer.state.log_history[:-1]
    ]


def assert_same_run(one, two, steps=8):
    assert one.state.global_step == two.state.global_step == steps
    for row, other in zip(metrics(one), metrics(two), strict=True):
        assert row == pytest.approx(other, abs=2e-4, rel=2e-3), row["step"]
    for role, expected in weights(two).items():
        torch.testing.assert_close(weights(one)[role], expected, atol=2e-5, rtol=1e-3, msg=role)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("on_sft", "whole"), [(False, None), (True, None), (False, ["lm_head"])])
def test_the_trajectory_is_that_of_four_separate_models(tmp_path, tokenizer, checkpointing, on_sft, whole):
    root = save_pieces(tmp_path, tokenizer, on_sft=on_sft, sft=sft_lora(modules_to_save=whole))
    roles = RoleAdapters(root / "base", root / "sft", root / "rm", reward_on_sft=on_sft)
    settings = {"gradient_checkpointing": checkpointing, "ptx_coef": 1.0}
    one = make_roles(root, roles=roles, **settings)
    start = weights(one)
    one.train()
    two = make_separate(root, tokenizer, on_sft=on_sft, **settings)
    torch.testing.assert_close(weights(two), start)
    two.train()
    assert_same_run(one, two)
    for role, before in start.items():
        assert (weights(one)[role] - before).abs().max() > 1e-4, role  # it moved


def test_with_peft_config_the_trajectory_is_that_of_separate_models(tmp_path, tokenizer, policy, reward_model):
    """A LoRA policy whose reference is its base with the adapter off, against one with a reference of its own."""
    runs = []
    for own_reference in (False, True):
        model, lora = copy.deepcopy(policy), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
        scorer = RewardScorer(copy.deepcopy(reward_model), tokenizer)
        trainer = make(
            tmp_path / str(own_reference), model, scorer, tokenizer, peft_config=lora, ptx_coef=1.0,
            ref_model=copy.deepcopy(policy) if own_reference else None,
        )  # fmt: skip
        randomise(trainer.model, 3)
        trainer.train()
        runs.append(trainer)
    assert metrics(runs[0]) == [pytest.approx(row, abs=1e-5, rel=1e-4) for row in metrics(runs[1])]
    assert metrics(runs[0])[0]["kl"] != pytest.approx(0, abs=1e-4)
    for one, two in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)


def test_a_run_changes_policy_and_critic_alone_and_leaves_the_policy_at_rest(pieces):
    trainer = make_roles(pieces, ptx_coef=1.0)
    model = trainer.model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    head = trainer.role_adapters.reward.score.weight.clone()
    trainer.train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if ".default." in name or ".critic." in name}
    assert torch.equal(trainer.role_adapters.reward.score.weight, head)
    assert list(model.base_model.active_adapters) == ["default"]
    assert adapters_are_on(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {n for n in before if ".default." in n}
    assert sum(p.numel() for p in trainer.ema.shadow) == sum(before[n].numel() for n in before if ".default." in n)
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in trainer.role_adapters.policy_adapter}


def test_an_error_in_the_middle_of_a_rollout_leaves_the_policy_at_rest(pieces):
    def fails(prompts, completions, **kwargs):
        raise RuntimeError("no scores today")

    roles = RoleAdapters(pieces / "base", pieces / "sft", pieces / "rm")
    trainer = make(pieces / "run", None, fails, None, role_adapters=roles)
    with pytest.raises(RuntimeError, match="no scores today"):
        trainer.train()
    assert list(roles.model.base_model.active_adapters) == ["default"]
    assert {n for n, p in roles.model.named_parameters() if p.requires_grad} == {
        n for n, _ in roles.model.named_parameters() if ".default." in n
    }


def test_kl_is_from_the_sft_adapter_or_the_base(pieces):
    def first_kl(*args, **kwargs):
        roles = RoleAdapters(*args, **kwargs)
        if "policy_config" in kwargs:
            randomise(roles.model, 1)  # what the SFT adapter holds
        trainer = make_roles(pieces, roles=roles, total_episodes=16, ptx_coef=0.0)
        trainer.train()
        return next(row["kl"] for row in trainer.state.log_history if "kl" in row)

    assert first_kl(pieces / "base", pieces / "sft", pieces / "rm") == pytest.approx(0, abs=1e-6)
    assert abs(first_kl(pieces / "base", None, pieces / "rm", policy_config=sft_lora())) > 0.01


def test_the_win_rate_is_against_the_reference_role(pieces, tokenizer):
    found = []
    for build in (make_roles, lambda root, **kwargs: make_separate(root, tokenizer, **kwargs)):
        trainer = build(pieces, eval_prompts=PROMPTS, max_steps=4, ptx_coef=0.0)
        randomise(trainer.model, 9)  # far from the reference
        metrics = trainer.evaluate()
        keys = ("eval_win_rate", "eval_score", "eval_kl", "eval_win_rate_prompts")
        found.append([*(metrics[key] for key in keys), *trainer.evaluation.reference._scores.values()])
    assert found[0] == pytest.approx(found[1], abs=1e-4)


@pytest.mark.parametrize("step", [2, 4])
@pytest.mark.parametrize("trained_whole", [None, ["lm_head"]])
def test_a_resumed_run_equals_an_uninterrupted_one(pieces, step, trained_whole):
    def roles():
        config = sft_lora(modules_to_save=trained_whole)
        return RoleAdapters(pieces / "base", pieces / "sft", pieces / "rm", policy_config=config)

    settings = {"save_strategy": "steps", "save_steps": 1, "ptx_coef": 1.0}
    whole = make_roles(pieces, roles=roles(), **settings)
    whole.train()
    again = make_roles(pieces, "again", roles=roles(), **settings)
    again.train(resume_from_checkpoint=str(pieces / "run" / f"checkpoint-{step}"))
    assert again.model.peft_config.keys() == {"default", "sft", "reward", "critic"}
    for row, other in zip(metrics(again), metrics(whole), strict=True):
        assert row == pytest.approx(other, abs=1e-6), row["step"]
    for role, expected in weights(whole).items():
        assert torch.equal(weights(again)[role], expected), role


@pytest.mark.parametrize("trained_whole", [None, ["lm_head"]])
def test_what_a_run_leaves_behind_is_read_by_plain_peft(pieces, tmp_path, trained_whole):
    config = sft_lora(modules_to_save=trained_whole)
    roles = RoleAdapters(pieces / "base", pieces / "sft", pieces / "rm", policy_config=config)
    trainer = make_roles(pieces, roles=roles, ptx_coef=0.0)
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    ids = torch.tensor([[5, 6, 7, 8]])
    trainer.model.eval()
    ours = {"policy": trainer.model(input_ids=ids).logits}
    with trainer.ema.applied():
        ours["ema"] = trainer.model(input_ids=ids).logits
    for name, logits in ours.items():
        base = AutoModelForCausalLM.from_pretrained(pieces / "base")
        loaded = PeftModel.from_pretrained(base, tmp_path / "out" / name).eval()
        torch.testing.assert_close(loaded(input_ids=ids).logits, logits, atol=1e-6, rtol=1e-5)
        assert not [path for path in (tmp_path / "out" / name).iterdir() if path.is_dir()]
        card = (tmp_path / "out" / name / "README.md").read_text()
        assert f"base_model: {pieces / 'base'}" in card
    classifier = AutoModelForSequenceClassification.from_pretrained(pieces / "base", num_labels=1)
    classifier.config.pad_token_id = 257
    value = PeftModel.from_pretrained(classifier, tmp_path / "out" / "value").eval()
    expected = trainer.critic.unwrapped.eval()(ids, torch.ones_like(ids))[0, -1] - BIAS
    assert value(input_ids=ids).logits.item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("one_base", [True, False])
def test_qlora_on_a_cpu(tmp_path, tokenizer, one_base):
    pytest.importorskip("bitsandbytes")
    root = save_pieces(tmp_path, tokenizer, **SIZES)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    settings = {"total_episodes": 16, "ptx_coef": 1.0}
    if one_base:
        roles = RoleAdapters(root / "base", root / "sft", root / "rm", quantization)
        trainer = make_roles(root, roles=roles, **settings)
    else:
        trainer = make(
            root / "run", str(root / "base"), RewardScorer(root / "rm"), tokenizer, quantization_config=quantization,
            peft_config=sft_lora(), **settings,
            value_model=AutoModelForSequenceClassification.from_pretrained(root / "base", num_labels=1),
        )  # fmt: skip
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    start = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
    trainer.train()
    logs = {key: value for row in reversed(trainer.state.log_history) for key, value in row.items()}
    assert logs["kl"] == pytest.approx(0, abs=1e-5)  # policy and reference are the same before the first step
    assert all(torch.isfinite(torch.tensor(logs[key])) for key in ("loss", "value_loss", "ptx_loss", "grad_norm"))
    moved = [
        (p - s).abs().max()
        for p, s in zip((p for p in trainer.model.parameters() if p.requires_grad), start, strict=True)
    ]
    assert min(moved) > 0


def test_what_cannot_go_with_roles_is_refused(pieces, policy, reward_model):
    roles = RoleAdapters(pieces / "base", pieces / "sft", pieces / "rm")
    with pytest.raises(ValueError, match=r"model= and role_adapters= are given"):
        make(pieces / "run", policy, None, None, role_adapters=roles)
    with pytest.raises(ValueError, match=r"value_model, peft_config= and role_adapters= are given"):
        make(pieces / "run", None, None, None, role_adapters=roles, value_model=reward_model, peft_config=sft_lora())
    assert make(pieces / "run", roles.policy, None, None, role_adapters=roles).model is roles.policy


def test_another_reward_function_may_stand_beside_the_reward_role(pieces):
    def length(prompts, completions, **kwargs):
        return [float(len(text)) for text in completions]

    roles = RoleAdapters(pieces / "base", pieces / "sft", pieces / "rm")
    trainer = make(pieces / "run", None, [roles.reward, length], None, role_adapters=roles, total_episodes=16)
    trainer.train()
    logged = {key for row in trainer.state.log_history for key in row}
    assert {"rewards/reward_model/mean", "rewards/length/mean"} <= logged
