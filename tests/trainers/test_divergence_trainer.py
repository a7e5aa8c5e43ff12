"""Each kind of divergence, brought about in a running trainer: it stops or skips, says so, and spoils no weight."""

import copy
import logging
import math

import pytest
import torch
from ppo_helpers import make
from transformers import TrainerCallback

from instruct_trl import value_model_from_reward_model

EOS = 256


class AtStepEnd(TrainerCallback):
    def __init__(self, function):
        self.function = function

    def on_step_end(self, args, state, control, **kwargs):
        self.function(state.global_step)


def rows(trainer, key):
    return [row[key] for row in trainer.state.log_history if key in row]


def weights(trainer):
    both = (trainer.model, trainer.critic.unwrapped)
    return [parameter.detach().clone() for model in both for parameter in model.parameters()]


def equal(one, two):
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
    assert equal(seen[5], seen[4])


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
    assert not equal(seen[12], seen[11])
    assert equal(weights(trainer), seen[12])


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
    assert not equal(seen[8], seen[7])
    if action == "ignore":
        assert lines == []
        assert not equal(seen[9], seen[8])
        assert "goes on in iteration 3, step 9: value_loss is " in caplog.text
        return
    verb = {"skip": "skips this step", "stop": "stops"}[action]
    assert lines[0].startswith(f"PPO-ptx {verb} in iteration 3, step 9: value_loss is ")
    assert "above value_loss_stop=10 times its running median" in lines[0]
    assert len(lines) == sum(rows(trainer, "skipped_steps")) == (8 if action == "skip" else 1)
    assert list(seen)[-1] == (16 if action == "skip" else 9)
    assert all(equal(seen[step], seen[8]) for step in seen if step > 8)


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
    assert equal(seen[2], seen[1])
    assert all(parameter.isfinite().all() for parameter in weights(trainer))
    if action == "skip":
        assert not equal(seen[3], seen[2])


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
    assert all(equal(seen[step], seen[0]) for step in (1, 2, 3, 4))
    assert not equal(seen[5], seen[4])
    assert equal(before, seen[4][: len(before)])  # the average started at the weights
    assert rows(trainer, "missing_rewards") == [16, 0]
    assert rows(trainer, "unscored_fraction") == [1, 0]
    assert rows(trainer, "score")[0] is None
    assert all(parameter.isfinite().all() for parameter in weights(trainer))
