"""TRL 1.12.0's PPOTrainer as an oracle: its recorded numbers against ours, where both mean the same.

`record_trl112_ppo.py` recorded them, with versions. Where the two differ on purpose (docs/guides/migration.md):
- whitening: TRL divides by the sample's variance (n − 1), ours by the population's;
- an ended answer: TRL puts the score on the position after the EOS, if there is one, ours on the EOS; so rewards,
  advantages and returns of such rows differ, and TRL's value loss counts that position;
- several micro-batches a step: TRL averages their means, ours is one mean over the minibatch's tokens. One micro-batch
  a step was recorded, where that is the same;
- one optimizer, schedule and loss for policy and value (`vf_coef`), no clipping of gradients: not compared.
"""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from ppo_helpers import make
from record_trl112_ppo import LENGTH, PAD, PROMPTS, models, tokenizer

from instruct_trl.maths.masking import masked_mean, masked_whiten
from instruct_trl.maths.objectives import clipped_policy_loss, clipped_value_loss
from instruct_trl.maths.returns import generalized_advantages, kl_estimate, token_rewards
from instruct_trl.models.logprobs import completion_logps
from instruct_trl.models.value import ValueModel

RECORD = json.loads(Path(__file__).with_name("trl_1_12_ppo.json").read_text(encoding="utf-8"))
SETTINGS = RECORD["settings"]
CLOSE = {"atol": 2e-6, "rtol": 2e-5}


def run(kind):
    """The recorded tensors of one iteration, and `mask` (B, T): True on answer tokens."""
    kept = {name: torch.tensor(RECORD[kind][name]) for name in RECORD[kind] if name not in ("updates", "metrics")}
    return kept | {"mask": ~kept["padding_mask"]}


def roles():
    """(policy, reference, reward model, value model) with the recorded weights."""
    loaded = models()
    for model, weights in zip(loaded, RECORD["weights"].values(), strict=True):
        model.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
        model.eval()
    return loaded


def test_the_record_says_what_it_is():
    assert RECORD["versions"]["trl"] == "1.12.0"
    assert {"torch", "transformers"} <= RECORD["versions"].keys()
    full, ended = run("full"), run("ended")
    assert full["mask"].all()
    lengths = ended["mask"].sum(dim=1)
    assert 0 < (lengths < LENGTH).sum() < PROMPTS  # some answers end, some are cut


@pytest.mark.parametrize("kind", ["full", "ended"])
@torch.no_grad()
def test_log_probs_and_values_of_every_answer_token(kind):
    kept = run(kind)
    policy, reference, _, value = roles()
    rows, mask = kept["query_responses"], kept["mask"]
    attention_mask = torch.cat([rows[:, :-LENGTH] != PAD, mask], dim=1).long()
    for model, name in ((policy, "logprobs"), (reference, "ref_logprobs")):
        logps, _ = completion_logps(model, rows, attention_mask, LENGTH)
        torch.testing.assert_close(logps[mask], kept[name][mask], **CLOSE)
    values = ValueModel(value)(rows, attention_mask)[:, -LENGTH - 1 : -1]
    torch.testing.assert_close(values[mask], kept["values"][mask], **CLOSE)


@pytest.mark.parametrize("kind", ["full", "ended"])
def test_kl_of_every_answer_token(kind):
    kept = run(kind)
    found = kl_estimate(kept["logprobs"], kept["ref_logprobs"], "k1")
    torch.testing.assert_close(found[kept["mask"]], kept["kl"][kept["mask"]], **CLOSE)
    assert kept["kl"].abs().max() > 0.01


def test_rewards_advantages_and_returns_of_answers_of_one_length():
    kept = run("full")
    rewards = token_rewards(kept["scores"], kept["kl"], kept["mask"], SETTINGS["kl_coef"])
    torch.testing.assert_close(rewards, kept["rewards"], **CLOSE)
    advantages, returns = generalized_advantages(
        rewards, kept["values"], kept["mask"], SETTINGS["gamma"], SETTINGS["lam"]
    )
    torch.testing.assert_close(advantages, kept["advantages"], **CLOSE)
    torch.testing.assert_close(returns, kept["returns"], **CLOSE)
    count = kept["mask"].sum()
    sample = ((count - 1) / count).sqrt()  # theirs is the variance of a sample
    torch.testing.assert_close(masked_whiten(advantages, kept["mask"]) * sample, kept["whitened"], **CLOSE)


@pytest.mark.parametrize("kind", ["full", "ended"])
def test_policy_loss_of_both_steps(kind):
    kept = run(kind)
    for update in RECORD[kind]["updates"]:
        rows = update["micro_batch_inds"]
        new, advantages = torch.tensor(update["new_logprobs"]), torch.tensor(update["mb_advantage"])
        clip = SETTINGS["cliprange"]
        losses, ratio = clipped_policy_loss(new, kept["logprobs"][rows], advantages, clip, clip)
        assert masked_mean(losses, kept["mask"][rows]).item() == pytest.approx(update["pg_loss"], abs=1e-6)
        torch.testing.assert_close(ratio, torch.tensor(update["ratio"]), **CLOSE)
    assert (ratio - 1).abs().max() > clip  # the second step is clipped somewhere


def test_value_loss_of_both_steps_where_answers_have_one_length():
    kept = run("full")
    for update in RECORD["full"]["updates"]:
        rows, values = update["micro_batch_inds"], torch.tensor(update["vpred"])
        losses = clipped_value_loss(values, kept["values"][rows], kept["returns"][rows], SETTINGS["cliprange_value"])
        assert masked_mean(losses, kept["mask"][rows]).item() == pytest.approx(update["vf_loss"], abs=1e-6)
        total = update["pg_loss"] + RECORD["full"]["vf_coef"] * update["vf_loss"]
        assert update["loss"] == pytest.approx(total, abs=1e-6)
    assert (values - kept["values"][rows]).abs().max() > SETTINGS["cliprange_value"]


def test_their_score_lands_behind_the_eos_and_ours_on_it():
    kept = run("ended")
    mask, kl = kept["mask"], kept["kl"]
    ours = token_rewards(kept["scores"], kl * mask, mask, SETTINGS["kl_coef"]) + SETTINGS["kl_coef"] * kl * mask
    for row, length in enumerate(mask.sum(dim=1).tolist()):
        score = kept["scores"][row].item()
        assert ours[row, length - 1].item() == pytest.approx(score, abs=1e-6)
        behind = min(length, LENGTH - 1)  # a cut answer has no position behind it
        theirs = kept["rewards"][row, behind] + SETTINGS["kl_coef"] * kl[row, behind]
        assert theirs.item() == pytest.approx(score, abs=1e-6)


def our_trainer(tmp_path, kept):
    """Ours with the recorded models and settings; the recorded scores stand in for a reward model's."""
    policy, reference, _, value = roles()
    scores = kept["scores"].tolist()
    words = tokenizer()
    prompts = [words.decode(row[row != PAD]) for row in kept["query_responses"][:, :-LENGTH]]
    settings = {"beta": SETTINGS["kl_coef"], "discount": SETTINGS["gamma"], "gae_lambda": SETTINGS["lam"]}
    settings |= {"epsilon": SETTINGS["cliprange"], "value_clip": SETTINGS["cliprange_value"]}
    trainer = make(
        tmp_path, policy, lambda prompts, **kwargs: scores, words, value_model=value, ptx_coef=0.0, ema_decay=None,
        prompts=Dataset.from_dict({"prompt": prompts}), generation_batch_size=PROMPTS, total_episodes=PROMPTS,
        per_device_train_batch_size=PROMPTS // 2, gradient_accumulation_steps=1, max_completion_length=LENGTH,
        **settings,
    )  # fmt: skip
    trainer.ref_model.load_state_dict(reference.state_dict())
    trainer._generate_single_turn = lambda *args, **kwargs: (kept["responses"].tolist(), None)
    trainer.model.train()
    return trainer, [{"prompt": prompt} for prompt in prompts]


def test_our_trainer_makes_the_recorded_rollout_and_the_recorded_first_loss(tmp_path):
    kept = run("full")
    trainer, prompts = our_trainer(tmp_path, kept)
    rollout = trainer._generate_and_score_completions(prompts)
    pairs = {"old_per_token_logps": "logprobs", "ref_per_token_logps": "ref_logprobs", "old_values": "values"}
    for ours, theirs in {**pairs, "kl": "kl", "returns": "returns", "scores": "scores"}.items():
        torch.testing.assert_close(rollout[ours], kept[theirs], atol=1e-5, rtol=1e-4, msg=lambda m, n=ours: f"{n}: {m}")
    count = kept["mask"].sum()
    torch.testing.assert_close(
        rollout["advantages"] * ((count - 1) / count).sqrt(), kept["whitened"], atol=2e-5, rtol=1e-4
    )
    update = RECORD["full"]["updates"][0]
    rows = torch.tensor(update["micro_batch_inds"])
    batch = {name: value[rows] for name, value in rollout.items() if value.ndim}
    tokens = torch.tensor(float(len(rows) * LENGTH))
    batch |= {"advantages": kept["whitened"][rows], "minibatch_tokens": tokens}
    assert trainer._compute_loss(trainer.model, batch).item() == pytest.approx(update["pg_loss"], abs=1e-5)
    value_loss = trainer.critic.backward(batch, tokens, sync=True)["value_loss"]
    assert value_loss.mean().item() == pytest.approx(update["vf_loss"], abs=1e-6)
