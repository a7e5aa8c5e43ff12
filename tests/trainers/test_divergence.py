"""Divergence is caught: each guard on made-up metrics, and in the trainer; answers without a reward add nothing."""

import copy
import json
import logging
import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from ppo_helpers import make
from transformers import AutoModelForCausalLM, TrainerCallback

from instruct_trl import PPOPtxConfig, value_model_from_reward_model
from instruct_trl.trainers.checkpoints import last_complete_checkpoint
from instruct_trl.trainers.divergence import SKIP_LIMIT, DivergenceGuard

EOS = 256
HEALTHY = {"policy_loss": 0.1, "ratio": 1.0, "value_loss": 0.5, "ptx_loss": 3.0, "grad_norm": 1.0, "entropy": 2.0}


def rows(trainer, key):
    return [row[key] for row in trainer.state.log_history if key in row]


def guard_of(**settings):
    limits = dict.fromkeys(("kl_stop", "value_loss_stop", "entropy_stop", "eos_rate_stop"))
    return DivergenceGuard(SimpleNamespace(**{**limits, "divergence_action": "stop", **settings}))


# The guards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["policy_loss", "ratio", "value_loss", "ptx_loss", "grad_norm", "value_grad_norm"])
def test_what_is_not_finite_stops_or_skips_as_the_user_sets_it(name, value):
    for action, expected in (("stop", "stop"), ("skip", "skip"), ("ignore", "warn")):
        verdict = guard_of(divergence_action=action).judge_step({**HEALTHY, name: value})
        assert verdict.action == expected
        assert verdict.reason.startswith(f"{name} is {value}, it must be finite. Lower")


def test_by_default_nothing_finite_is_touched():
    guard = guard_of()
    for size in (1e-9, 1.0, 1e9):
        for _ in range(20):
            assert guard.judge_rollout({"kl": size, "eos_rate": 0.0}).action == "go_on"
            assert guard.judge_step(dict.fromkeys(HEALTHY, size)).action == "go_on"


@pytest.mark.parametrize("action", ["stop", "skip"])  # a policy that is bad is no better after a skipped step
def test_kl_above_kl_stop_stops(action):
    guard = guard_of(kl_stop=20, divergence_action=action)
    assert guard.judge_rollout({"kl": 20.0}).action == "go_on"
    assert guard.judge_rollout({"kl": -3.0}).action == "go_on"  # the estimate k1 can be negative
    assert guard.judge_rollout({}).action == "go_on"  # no answer had a score
    assert guard.judge_rollout({"kl": math.nan}).action == "stop"
    verdict = guard.judge_rollout({"kl": 20.5})
    assert verdict.action == "stop"
    assert verdict.reason.startswith("kl is 20.5 nats per answer, above kl_stop=20. Raise beta or lower learning_rate")


@pytest.mark.parametrize("action", ["stop", "skip"])
def test_a_value_loss_out_of_proportion_to_its_running_median(action):
    guard = guard_of(value_loss_stop=10, divergence_action=action)
    for loss in (1, 1e6, 3, 4, 5, 6, 7, 8):  # too few for a median: not even 1e6 is judged
        assert guard.judge_step({"value_loss": loss}).action == "go_on"
    assert guard.judge_step({"value_loss": 55.0}).action == "go_on"  # the median of the 8 is 5.5
    verdict = guard.judge_step({"value_loss": 60.1})  # of the 9 it is 6
    assert verdict.action == action
    assert "above value_loss_stop=10 times its running median 6" in verdict.reason


def test_the_median_is_a_running_one():
    guard = guard_of(value_loss_stop=10)
    for loss in [1000.0] * 64 + [1.0] * 33:  # of the last 64 losses 33 are 1
        assert guard.judge_step({"value_loss": loss}).action == "go_on"
    assert guard.judge_step({"value_loss": 11.0}).action == "stop"


def test_a_collapse_of_the_entropy_stops():
    guard = guard_of(entropy_stop=0.1, divergence_action="skip")
    assert guard.judge_step({**HEALTHY, "entropy": 0.1}).action == "go_on"
    verdict = guard.judge_step({**HEALTHY, "entropy": 0.05})
    assert verdict.action == "stop"
    assert verdict.reason.startswith("entropy is 0.05 nats per token, below entropy_stop=0.1")


def test_answers_that_never_end_stop_after_that_many_rollouts_in_a_row():
    guard = guard_of(eos_rate_stop=0.0, eos_rate_patience=3)
    actions = [guard.judge_rollout({"eos_rate": rate}).action for rate in (0.0, 0.0, 0.01, 0.0, 0.0, 0.0)]
    assert actions == ["go_on"] * 5 + ["stop"]


def test_ignore_warns_once_a_metric():
    guard = guard_of(kl_stop=1, divergence_action="ignore")
    assert [guard.judge_rollout({"kl": 2.0}).action for _ in range(3)] == ["warn", "go_on", "go_on"]
    assert [guard.judge_step({"grad_norm": math.nan}).action for _ in range(2)] == ["warn", "go_on"]


def test_skipping_for_ever_stops():
    guard = guard_of(divergence_action="skip")
    bad = {"grad_norm": math.inf}
    assert [guard.judge_step(bad).action for _ in range(SKIP_LIMIT - 1)] == ["skip"] * (SKIP_LIMIT - 1)
    assert guard.judge_step(HEALTHY).action == "go_on"  # begins the count anew
    assert [guard.judge_step(bad).action for _ in range(SKIP_LIMIT)] == ["skip"] * (SKIP_LIMIT - 1) + ["stop"]


def test_what_a_guard_remembers_survives_json():
    settings = {"value_loss_stop": 10, "eos_rate_stop": 0.0, "eos_rate_patience": 2}
    guard, other = guard_of(**settings), guard_of(**settings)
    guard.judge_rollout({"eos_rate": 0.0})
    for _ in range(8):
        guard.judge_step({"value_loss": 1.0})
    other.memory = json.loads(json.dumps(guard.memory))
    assert other.judge_rollout({"eos_rate": 0.0}).action == "stop"
    assert other.judge_step({"value_loss": 10.1}).action == "stop"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"kl_stop": 0}, "kl_stop must be above 0, got 0"),
        ({"kl_stop": math.nan}, "kl_stop must be above 0, got nan"),
        ({"value_loss_stop": 1.0}, "value_loss_stop must be above 1"),
        ({"entropy_stop": -1.0}, "entropy_stop must not be negative"),
        ({"eos_rate_stop": 1.0}, r"eos_rate_stop must be in \[0, 1\)"),
        ({"eos_rate_patience": 0}, "eos_rate_patience must be at least 1"),
        ({"divergence_action": "halt"}, "divergence_action must be .* got 'halt'"),
    ],
)
def test_settings_out_of_range_are_refused_by_the_config(tmp_path, setting, message):
    with pytest.raises(ValueError, match=message):
        PPOPtxConfig(str(tmp_path), report_to="none", **setting)


def test_the_last_good_checkpoint_is_complete_and_not_too_new(tmp_path):
    for step in (8, 16, 24, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step != 16:  # torn
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert last_complete_checkpoint(str(tmp_path), 99) == str(tmp_path / "checkpoint-24")
    assert last_complete_checkpoint(str(tmp_path), 23) == str(tmp_path / "checkpoint-8")
    assert last_complete_checkpoint(str(tmp_path), 7) is None
    assert last_complete_checkpoint(str(tmp_path / "nowhere"), 7) is None


# In the trainer ------------------------------------------------------------------------------------------------------


class AtStepEnd(TrainerCallback):
    def __init__(self, function):
        self.function = function

    def on_step_end(self, args, state, control, **kwargs):
        self.function(state.global_step)


def everything(trainer):
    """A copy of all that a step changes."""
    states = [trainer.model.state_dict(), trainer.critic.unwrapped.state_dict(), trainer.ema.shadow]
    states += [part.state_dict() for part in (trainer.optimizer, trainer.critic.optimizer)]
    states += [trainer.lr_scheduler.state_dict(), trainer.critic.scheduler.state_dict()]
    return copy.deepcopy(states)


def equal(one, two):
    torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_kl_above_kl_stop_ends_training_before_any_step_on_that_rollout(tmp_path, policy, scorer, tokenizer, caplog):
    trainer = make(
        tmp_path, policy, scorer, tokenizer, kl_stop=5.0, total_episodes=64, save_strategy="steps", save_steps=2,
        ptx_coef=0.0,
    )  # fmt: skip

    def move_the_reference(step):
        if step == 4:  # the end of the first iteration, whose KL was 0
            with torch.no_grad():
                trainer.ref_model.lm_head.weight.mul_(100)

    trainer.add_callback(AtStepEnd(move_the_reference))
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step == 4
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    equal(dict(saved.named_parameters()), dict(trainer.model.named_parameters()))
    lines = [record.getMessage() for record in caplog.records if "PPO-ptx stops" in record.getMessage()]
    assert len(lines) == 1
    assert lines[0].startswith("PPO-ptx stops in iteration 2, step 5: kl is ")
    assert "above kl_stop=5. Raise beta" in lines[0]
    # The weights of checkpoint-4 are those that the KL condemned.
    assert lines[0].endswith(f"Last good checkpoint: {tmp_path / 'checkpoint-2'}.")
    assert not (tmp_path / "checkpoint-5").exists()


@pytest.mark.parametrize("action", ["skip", "stop"])
@pytest.mark.parametrize("part", ["policy", "value"])
def test_a_step_that_is_not_finite_changes_nothing(tmp_path, policy, scorer, tokenizer, action, part):
    trainer = make(
        tmp_path, policy, scorer, tokenizer, divergence_action=action, total_episodes=16, warmup_iterations=1
    )
    model = trainer.model if part == "policy" else trainer.critic.unwrapped
    clip = trainer._clip_grad_norm

    def spoil(clipped):
        if trainer.state.global_step == 1:
            next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = math.nan
        return clip(clipped)

    trainer._clip_grad_norm = spoil
    seen = []
    trainer.add_callback(AtStepEnd(lambda step: seen.append(everything(trainer))))
    trainer.train()
    equal(seen[1], seen[0])
    if action == "stop":
        assert trainer.state.global_step == 2
        assert rows(trainer, "skipped_steps") == [0, 1]
        trainer.save_model()
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
        assert all(p.isfinite().all() for p in saved.parameters())
        return
    assert trainer.state.global_step == 4
    assert rows(trainer, "skipped_steps") == [0, 1, 0, 0]
    for before, after in zip(seen[1], seen[2], strict=True):
        with pytest.raises(AssertionError):
            equal(before, after)


@pytest.mark.parametrize("missing", [math.nan, None, math.inf])
def test_an_answer_without_a_reward_gives_the_gradient_of_the_rollout_without_it(
    tmp_path, policy, reward_model, tokenizer, missing
):
    prompts = ["ab", "a longer prompt", "cde", "f"]
    made = {}
    for name, kept in (("with", prompts), ("without", prompts[:1] + prompts[2:])):

        def one(prompts, completion_ids, **_):
            return [
                missing if p == "a longer prompt" else math.sin(len(ids))
                for p, ids in zip(prompts, completion_ids, strict=True)
            ]

        def two(prompts, **_):
            return [None] * len(prompts)

        trainer = make(
            tmp_path, copy.deepcopy(policy), [one, two], tokenizer, ptx_coef=0.0, beta=0.5, max_grad_norm=1e9,
            value_model=value_model_from_reward_model(copy.deepcopy(reward_model)), value_max_grad_norm=0.0,
            prompts=Dataset.from_dict({"prompt": kept}), generation_batch_size=len(kept), total_episodes=len(kept),
            per_device_train_batch_size=len(kept), gradient_accumulation_steps=1,
        )  # fmt: skip
        with torch.no_grad():
            trainer.ref_model.lm_head.weight.mul_(3)  # so that there is a KL
        trainer._generate_single_turn = lambda ids, *_, **__: (  # the same answer to a prompt in both runs
            [[*((7 * sum(row) + 31 * i) % 250 for i in range(2 + sum(row) % 4)), 256] for row in ids],
            None,
        )
        gradients, judge = {}, trainer.divergence.may_step

        def catch(*args, trainer=trainer, gradients=gradients, judge=judge):
            for part in (trainer.model, trainer.critic.unwrapped):
                gradients.update({f"{type(part).__name__}.{n}": p.grad.clone() for n, p in part.named_parameters()})
            return judge(*args)

        trainer.divergence.may_step = catch
        trainer.train()
        made[name] = (gradients, trainer.state.log_history[0])
    (gradients, logs), (expected, expected_logs) = made["with"], made["without"]
    assert any(gradient.abs().max() > 1e-4 for name, gradient in gradients.items() if "Value" not in name)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4, msg=name)
    assert (logs["missing_rewards"], expected_logs["missing_rewards"]) == (1, 0)
    assert logs["unscored_fraction"] == 0.25
    for name in (
        "score", "kl", "objective", "eos_rate", "value", "return", "explained_variance", "policy_loss", "ratio",
        "clip_fraction", "entropy", "value_loss", "value_clip_fraction", "grad_norm", "value_grad_norm", "loss",
    ):  # fmt: skip
        assert logs[name] == pytest.approx(expected_logs[name], abs=1e-5, rel=1e-4), name


# Each kind, brought about in a running trainer ------------------------------------------------------------------------


def weights(trainer):
    both = (trainer.model, trainer.critic.unwrapped)
    return [parameter.detach().clone() for model in both for parameter in model.parameters()]


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def train(trainer, caplog):
    """The lines about divergence, and the weights after each step, the first ones at 0."""
    seen = {0: weights(trainer)}
    trainer.add_callback(AtStepEnd(lambda step: seen.update({step: weights(trainer)})))
    with caplog.at_level(logging.WARNING):
        trainer.train()
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("PPO-ptx s")]
    return lines, seen


def test_a_collapse_of_the_entropy_stops_before_the_step(tmp_path, policy, scorer, tokenizer, caplog):
    trainer = make(tmp_path, policy, scorer, tokenizer, entropy_stop=0.1, total_episodes=64, divergence_action="skip")

    def collapse(step):
        if step == 4:
            with torch.no_grad():
                policy.lm_head.weight.mul_(1e5)

    trainer.add_callback(AtStepEnd(collapse))
    lines, seen = train(trainer, caplog)
    assert len(lines) == 1
    assert lines[0].startswith("PPO-ptx stops in iteration 2, step 5: entropy is ")
    assert "below entropy_stop=0.1" in lines[0]
    assert list(seen)[-1] == 5
    assert same(seen[5], seen[4])


def test_an_eos_rate_of_0_in_a_row_stops_before_any_step_on_that_rollout(tmp_path, policy, scorer, tokenizer, caplog):
    trainer = make(tmp_path, policy, scorer, tokenizer, eos_rate_stop=0.0, eos_rate_patience=2, total_episodes=64)
    ends = iter([False, True, False, False])
    trainer._generate_single_turn = lambda ids, *_, **__: (
        ([[65, EOS]] if next(ends) else [[65] * 8]) + [[65] * 8] * (len(ids) - 1),
        None,
    )
    lines, seen = train(trainer, caplog)
    assert len(lines) == 1
    assert lines[0].startswith("PPO-ptx stops in iteration 4, step 13: eos_rate is 0, not above eos_rate_stop=0 in 2")
    assert rows(trainer, "eos_rate") == [0, 1 / 16, 0, 0]
    assert not same(seen[12], seen[11])
    assert same(weights(trainer), seen[12])


@pytest.mark.parametrize("action", ["skip", "stop", "ignore"])
def test_a_value_loss_that_explodes(tmp_path, policy, reward_model, tokenizer, caplog, action):
    def exploding(completion_ids, trainer_state, **_):
        scale = 1.0 if trainer_state.global_step < 8 else 1e4
        return [scale * (len(ids) + ids[0] % 3) for ids in completion_ids]

    trainer = make(
        tmp_path, policy, exploding, tokenizer, value_model=value_model_from_reward_model(reward_model),
        value_loss_stop=10, divergence_action=action, total_episodes=64, ptx_coef=0.0,
    )  # fmt: skip
    lines, seen = train(trainer, caplog)
    assert not same(seen[8], seen[7])
    if action == "ignore":
        assert lines == []
        assert not same(seen[9], seen[8])
        assert "goes on in iteration 3, step 9: value_loss is " in caplog.text
        return
    verb = {"skip": "skips this step", "stop": "stops"}[action]
    assert lines[0].startswith(f"PPO-ptx {verb} in iteration 3, step 9: value_loss is ")
    assert "above value_loss_stop=10 times its running median" in lines[0]
    assert len(lines) == sum(rows(trainer, "skipped_steps")) == (8 if action == "skip" else 1)
    assert list(seen)[-1] == (16 if action == "skip" else 9)
    assert all(same(seen[step], seen[8]) for step in seen if step > 8)


@pytest.mark.parametrize("action", ["skip", "stop"])
@pytest.mark.parametrize("shift", [math.nan, 1e4])  # a ratio of NaN, and of infinity
def test_a_ratio_that_is_not_finite(tmp_path, policy, scorer, tokenizer, caplog, action, shift):
    trainer = make(tmp_path, policy, scorer, tokenizer, divergence_action=action, total_episodes=16)
    forward = trainer._logps

    def spoilt(*args, **kwargs):
        logps, *rest = forward(*args, **kwargs)
        if torch.is_grad_enabled() and trainer.state.global_step == 1:
            logps = logps + shift
        return logps, *rest

    trainer._logps = spoilt
    lines, seen = train(trainer, caplog)
    assert len(lines) == 1
    verb = {"skip": "skips this step", "stop": "stops"}[action]
    assert lines[0].startswith(f"PPO-ptx {verb} in iteration 1, step 2: ")
    assert "it must be finite" in lines[0]
    assert list(seen)[-1] == (4 if action == "skip" else 2)
    assert same(seen[2], seen[1])
    assert all(parameter.isfinite().all() for parameter in weights(trainer))
    if action == "skip":
        assert not same(seen[3], seen[2])


def test_a_rollout_without_any_score_trains_nothing_and_the_next_one_does(
    tmp_path, policy, reward_model, tokenizer, caplog
):
    def late(completion_ids, trainer_state, **_):
        return [None if trainer_state.global_step < 4 else float(ids[0] % 7) for ids in completion_ids]

    trainer = make(
        tmp_path, policy, late, tokenizer, value_model=value_model_from_reward_model(reward_model), ptx_coef=0.0,
        kl_stop=50.0, eos_rate_stop=0.0, entropy_stop=0.01, value_loss_stop=100.0,
    )  # fmt: skip
    before = copy.deepcopy(trainer.ema.shadow)
    lines, seen = train(trainer, caplog)
    assert lines == []
    assert all(same(seen[step], seen[0]) for step in (1, 2, 3, 4))
    assert not same(seen[5], seen[4])
    assert same(before, seen[4][: len(before)])  # the average started at the weights
    assert rows(trainer, "missing_rewards") == [16, 0]
    assert rows(trainer, "unscored_fraction") == [1, 0]
    assert rows(trainer, "score")[0] is None
    assert all(parameter.isfinite().all() for parameter in weights(trainer))
