"""Two routes to the same log-probs: completion positions only, and TRL's fused head over the whole row."""

import copy

import pytest
import torch
from datasets import Dataset
from ppo_helpers import make
from transformers import GPT2Config, GPT2LMHeadModel
from trl.trainer.utils import add_fused_lm_head

from instruct_trl.evaluation.language_modeling import answer_logprobs, mean_answer_kl
from instruct_trl.models.logprobs import completion_logps


def test_completion_only_equals_trls_fused_head_in_value_and_gradient(policy):
    fused = copy.deepcopy(policy)
    add_fused_lm_head(fused, temperature=0.7, outputs=("log_probs", "entropy"))
    torch.manual_seed(3)
    ids = torch.randint(0, 256, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    labels = ids.clone()
    labels[:, :4] = -100
    theirs = fused(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    logps, entropies = completion_logps(policy, ids, mask, 5, temperature=0.7, compute_entropy=True)
    torch.testing.assert_close(logps, theirs.log_probs[:, -5:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropies, theirs.entropy[:, -5:], atol=1e-5, rtol=1e-5)
    weights = torch.randn(3, 5)
    (logps * weights).sum().backward()
    (theirs.log_probs[:, -5:] * weights).sum().backward()
    for mine, other in zip(policy.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-5, rtol=1e-4)


def test_answers_are_scored_as_the_models_own_loss_scores_them(policy):
    rows = [([1, 2, 3], [4, 5]), ([6], [7, 8, 9])]
    found = answer_logprobs(policy, rows)
    for (prompt, answer), total in zip(rows, found, strict=True):
        ids = torch.tensor([prompt + answer])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        loss = policy(input_ids=ids, labels=labels).loss.item()
        torch.testing.assert_close(total, -loss * len(answer), atol=1e-4, rtol=1e-4)
    assert mean_answer_kl(policy, policy, rows) == 0


def test_padding_on_the_left_changes_nothing_where_positions_are_absolute():
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 258}
    model = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    with torch.no_grad():
        model.transformer.wpe.weight *= 20
    ids = torch.randint(0, 256, (1, 9))
    plain = model(ids).logits[0, 4:-1].log_softmax(dim=-1).gather(1, ids[0, 5:].unsqueeze(1)).squeeze(1)
    padded, mask = torch.nn.functional.pad(ids, (3, 0)), torch.nn.functional.pad(torch.ones_like(ids), (3, 0))
    torch.testing.assert_close(completion_logps(model, padded, mask, 4)[0][0], plain, atol=1e-5, rtol=1e-5)


def test_the_head_projects_the_scored_tokens_and_no_others(policy):
    ids = torch.randint(0, 256, (3, 9))
    mask = torch.ones_like(ids)
    scored = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0]])
    whole, whole_entropies = completion_logps(policy, ids, mask, 4, compute_entropy=True)
    seen = []
    handle = policy.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[:2].numel()))
    logps, entropies = completion_logps(policy, ids, mask, 4, compute_entropy=True, scored=scored)
    handle.remove()
    assert seen == [5]
    torch.testing.assert_close(logps, whole * scored)
    torch.testing.assert_close(entropies, whole_entropies * scored)
    logps.sum().backward()
    assert policy.lm_head.weight.grad.abs().sum() > 0
    with torch.no_grad():
        torch.testing.assert_close(completion_logps(policy, ids, mask, 4, scored=scored)[0], logps)


@pytest.mark.parametrize("fused", [False, True], ids=["completions only", "TRL's fused head"])
def test_the_ratio_starts_at_1_where_positions_are_absolute(
    tmp_path, reward_model, scorer, tokenizer, monkeypatch, fused
):
    """Rollout and update pad a row differently; only counted positions make them agree."""
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 258}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=256, pad_token_id=257))
    with torch.no_grad():
        model.transformer.wpe.weight *= 20
    monkeypatch.setattr("instruct_trl.trainers.ppo_rollout.fused_head_is_compact", lambda device: fused)
    prompts = Dataset.from_dict({"prompt": ["a" * (1 + i) for i in range(16)]})
    trainer = make(tmp_path, model, scorer, tokenizer, prompts=prompts, ptx_coef=0.0, old_logps_from_sampler=True)
    trainer.train()
    ratios = [row["ratio"] for row in trainer.state.log_history if "ratio" in row]
    gaps = [row["sampler_gap"] for row in trainer.state.log_history if "sampler_gap" in row]
    assert ratios[0] == pytest.approx(1, abs=1e-5)
    assert max(gaps) < 1e-5  # and the sampler read the same positions
