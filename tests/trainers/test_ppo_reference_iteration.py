"""A full PPO-ptx iteration of the trainer equals tests/ppo_reference.py: weights, average, and logged metrics."""

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from ppo_reference import Episode, roll_out, update

from instruct_trl import PPOPtxConfig, PPOPtxTrainer
from instruct_trl.models.value import ValueModel

PROMPTS = ["a", "bc", "def", "ghij", "klm no", "pq", "rstuv w", "x y z"]
TEXTS = [f"text number {i} " * (1 + i % 3) for i in range(40)]
SETTINGS: dict[str, Any] = {
    "beta": 0.3,
    "epsilon": 0.05,
    "value_clip": 0.03,
    "discount": 0.9,
    "gae_lambda": 0.7,
    "temperature": 0.8,
    "ptx_coef": 0.7,
    "ptx_ratio": 2,
    "missing_eos_penalty": 0.5,
    "learning_rate": 3e-3,
    "value_learning_rate": 5e-3,
    "max_grad_norm": 0.5,
    "value_max_grad_norm": 0.2,
    "adam_beta1": 0.8,
    "adam_beta2": 0.9,
    "adam_epsilon": 1e-3,  # large, so that the clip of the gradient shows in the step
    "ema_decay": 0.7,
}


def build(tmp_path, policy, reference, classifier, tokenizer, **more):
    """A trainer of one iteration, its reward function, and what the reward function will have seen."""
    seen: list = []

    def reward(prompts, completion_ids, **_):
        scores = [math.sin(sum(ids)) for ids in completion_ids]
        seen.extend(zip(prompts, completion_ids, scores, strict=True))
        return scores

    args = PPOPtxConfig(
        str(tmp_path), generation_batch_size=8, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        total_episodes=8, max_completion_length=6, ptx_max_length=20, lr_scheduler_type="linear", warmup_iterations=0,
        local_rollout_forward_batch_size=3, logging_steps=1, save_strategy="no", gradient_checkpointing=False,
        report_to="none", disable_tqdm=True, bf16=False, **SETTINGS, **more,
    )  # fmt: skip
    trainer = PPOPtxTrainer(
        policy, reward, args, Dataset.from_dict({"prompt": PROMPTS}), processing_class=tokenizer,
        value_model=ValueModel(classifier), ref_model=reference,
        pretraining_dataset=Dataset.from_dict({"text": TEXTS}),
    )  # fmt: skip
    return trainer, seen


def spy(trainer):
    """Lists that fill while it trains: the micro-batches as (prompt, answer) token ids, and the ptx texts' ids."""
    micro_batches, drawn = [], []
    prepare, draw = trainer._prepare_inputs, trainer.pretraining.stream.draw

    def real(ids, mask):
        return tuple(i for i, m in zip(ids.tolist(), mask.tolist(), strict=True) if m)

    def prepare_and_tell(batch):
        inputs = prepare(batch)
        columns = [inputs[f"{part}_{kind}"] for part in ("prompt", "completion") for kind in ("ids", "mask")]
        micro_batches.append([(real(a, b), real(c, d)) for a, b, c, d in zip(*columns, strict=True)])
        return inputs

    def draw_and_tell(count):
        drawn.append(draw(count))
        return drawn[-1]

    trainer._prepare_inputs, trainer.pretraining.stream.draw = prepare_and_tell, draw_and_tell
    return micro_batches, drawn


def assert_same_path(found, expected, start, what):
    """Weights to 1e-5 of their size; the way that they went to 1e-3 of its length, beside the rounding of float32."""
    for (name, a), b, origin in zip(found, expected, start, strict=True):
        a, b = a.detach().double(), b.detach().double()
        moved = (b - origin.double()).norm()
        assert moved > 0, (what, name)
        assert (a - b).norm() <= 1e-5 * b.norm(), (what, name)
        assert (a - b).norm() <= 1e-3 * moved + 2e-7 * b.norm(), (what, name)


@pytest.mark.parametrize(("estimator", "epochs"), [("k1", 1), ("k3", 2), ("k2", 1)])
def test_an_iteration_equals_the_plain_loops(tmp_path, policy, reward_model, tokenizer, estimator, epochs):
    with torch.no_grad():
        policy.lm_head.weight[tokenizer.eos_token_id] *= 30  # likely after some tokens: answers of several lengths
        reward_model.config.reward_bias = 0.4
    reference = copy.deepcopy(policy)
    with torch.no_grad():  # not the policy, so that the KL penalty is there from the start
        reference.lm_head.weight.add_(0.1 * torch.randn_like(reference.lm_head.weight))
    plain, plain_critic = copy.deepcopy(policy), copy.deepcopy(reward_model)
    start, critic_start = ([p.detach().clone() for p in m.parameters()] for m in (policy, reward_model))

    trainer, seen = build(
        tmp_path, policy, copy.deepcopy(reference), reward_model, tokenizer, kl_estimator=estimator,
        num_iterations=epochs,
    )  # fmt: skip
    micro_batches, drawn = spy(trainer)
    trainer.train()

    settings = SimpleNamespace(**SETTINGS, kl_estimator=estimator)
    assert len(seen) == len(PROMPTS)
    assert len({len(ids) for _, ids, _ in seen}) > 2
    assert 0 < sum(ids[-1] == tokenizer.eos_token_id for _, ids, _ in seen) < 8
    episodes = {
        (tuple(tokenizer(p)["input_ids"]), tuple(ids)): Episode(tokenizer(p)["input_ids"], list(ids), score)
        for p, ids, score in seen
    }
    batches = [[episodes[key] for key in batch] for batch in micro_batches]
    assert [len(batch) for batch in batches] == [2] * 4 * epochs
    token_rows = [tokenizer(text)["input_ids"][:20] for text in TEXTS]
    assert [len(rows) for rows in drawn] == [8] * 2 * epochs
    assert all(row in token_rows for rows in drawn for row in rows)

    rolled = roll_out(plain, reference, plain_critic, list(episodes.values()), tokenizer.eos_token_id, settings)
    steps, average = update(
        plain, plain_critic, [batches[i : i + 2] for i in range(0, len(batches), 2)], drawn, settings
    )
    # Every clip of the algorithm is at work here, or this would prove less than it says.
    assert steps[-1]["clip_fraction"] > 0
    assert steps[-1]["value_clip_fraction"] > 0
    assert min(step["grad_norm"] for step in steps) > settings.max_grad_norm
    assert steps[0]["value_grad_norm"] > settings.value_max_grad_norm

    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == len(steps) == 2 * epochs
    for row, step in zip(rows, [steps[0] | rolled, *steps[1:]], strict=True):
        for name, number in step.items():
            assert row[name] == pytest.approx(number, rel=1e-4, abs=2e-6), name
    assert_same_path(policy.named_parameters(), plain.parameters(), start, "policy")
    critic = trainer.critic.unwrapped.classifier
    assert_same_path(critic.named_parameters(), plain_critic.parameters(), critic_start, "value")
    names = [name for name, _ in policy.named_parameters()]
    assert_same_path(zip(names, trainer.ema.shadow, strict=True), average, start, "average")
