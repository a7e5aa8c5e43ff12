"""Two routes to the same log-probs: completion positions only, and TRL's fused head over the whole row."""

import copy

import torch
from trl.trainer.utils import add_fused_lm_head

from instruct_trl.evaluation.divergence import answer_logprobs, mean_answer_kl
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
