"""The K-way ranking loss of the reward model (Ouyang et al. 2022, Eq. 1), and how well rewards reproduce a ranking.

Legend: ... any leading batch axes (prompts), K completions of one prompt: the last axis is always the list.
Ranks: lower is better, equal numbers tie, gaps are allowed, since only their order counts.
Masks are positive: True marks a real completion, so that lists of different lengths share a tensor.
"""

from __future__ import annotations

import torch
from torch.nn import functional


def preferred_pairs(ranks: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """(..., K, K) bool: [i, j] is True where completion i is ranked better than j, both being real; ties never are.

    Args:
        ranks: (..., K) lower is better.
        mask: (..., K) True on real completions; None means all are.

    Raises:
        ValueError: `ranks` and `mask` differ in shape.
    """
    pairs = ranks.unsqueeze(-1) < ranks.unsqueeze(-2)
    if mask is None:
        return pairs
    if mask.shape != ranks.shape:
        raise ValueError(f"mask {tuple(mask.shape)} does not fit ranks {tuple(ranks.shape)}.")
    mask = mask.bool()
    return pairs & mask.unsqueeze(-1) & mask.unsqueeze(-2)


def _pair_differences(
    rewards: torch.Tensor, ranks: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rewards with 0 at masked places (..., K), r_i − r_j (..., K, K) and the preferred pairs (..., K, K)."""
    if rewards.shape != ranks.shape:
        raise ValueError(f"rewards {tuple(rewards.shape)} do not fit ranks {tuple(ranks.shape)}.")
    pairs = preferred_pairs(ranks, mask)
    if rewards.dtype in (torch.float16, torch.bfloat16):
        rewards = rewards.float()
    if mask is not None:  # whatever stands at a masked place, NaN included, must not reach the gradient
        rewards = torch.where(mask.bool(), rewards, torch.zeros_like(rewards))
    return rewards, rewards.unsqueeze(-1) - rewards.unsqueeze(-2), pairs


def ranking_losses(
    rewards: torch.Tensor, ranks: torch.Tensor, mask: torch.Tensor | None = None, center_coefficient: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 1 for each prompt by itself: the mean over its untied pairs (w, l) of −log σ(r_w − r_l).

    Without ties the mean is over all C(K, 2) pairs, as in the paper, which drops tied pairs.

    Args:
        rewards: (..., K) r_θ(x, y), with gradient.
        ranks: (..., K) lower is better.
        mask: (..., K) True on real completions; None means all are.
        center_coefficient: adds this many times the mean over the same pairs of (r_w + r_l)² (TRL's
            `center_rewards_coefficient`; Eisenstein et al. 2023, Eq. 2). 0 in the paper.

    Returns:
        losses (...), 0 for a prompt without an untied pair, and (...) bool, True where there is such a pair.

    Raises:
        ValueError: shapes differ.
    """
    rewards, differences, pairs = _pair_differences(rewards, ranks, mask)
    terms = -functional.logsigmoid(differences)
    if center_coefficient:
        terms = terms + center_coefficient * (rewards.unsqueeze(-1) + rewards.unsqueeze(-2)).square()
    count = pairs.sum((-2, -1))
    losses = torch.where(pairs, terms, torch.zeros_like(terms)).sum((-2, -1)) / count.clamp(min=1)
    return losses, count > 0


def ranking_loss(rewards: torch.Tensor, ranks: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Eq. 1: the mean of `ranking_losses` over the prompts that have an untied pair; 0 (a scalar) where none has.

    Arguments as in `ranking_losses`.

    >>> ranking_loss(torch.zeros(1, 3), torch.tensor([[1, 2, 3]]))  # log 2: all rewards equal
    tensor(0.6931)
    """
    losses, counted = ranking_losses(rewards, ranks, mask)
    return losses.sum() / counted.sum().clamp(min=1)


def pair_counts(
    rewards: torch.Tensor, ranks: torch.Tensor, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each prompt, how many untied pairs the rewards order correctly, and how many there are: both (...) long.

    Two equal rewards order no pair correctly, as in TRL's `accuracy`. Arguments as in `ranking_losses`.
    """
    _, differences, pairs = _pair_differences(rewards, ranks, mask)
    return (pairs & (differences > 0)).sum((-2, -1)), pairs.sum((-2, -1))


def pair_accuracy(rewards: torch.Tensor, ranks: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Share (a scalar in [0, 1]) of all untied pairs that the rewards order correctly; 0 where there are none.

    Arguments as in `ranking_losses`. This is the number that the paper reports for its reward models (section 4).
    """
    correct, total = pair_counts(rewards, ranks, mask)
    return correct.sum() / total.sum().clamp(min=1)


def kendall_tau(rewards: torch.Tensor, ranks: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Kendall's τ-b of each prompt (...), in [−1, 1]: 1 where the rewards give back the ranking, −1 its reverse.

    τ_b = (concordant − discordant) / sqrt(pairs untied in ranks · pairs untied in rewards). 0 where either is
    empty, which leaves τ undefined. Arguments as in `ranking_losses`.
    """
    rewards, differences, pairs = _pair_differences(rewards, ranks, mask)
    signs = torch.where(pairs, differences.sign(), torch.zeros_like(differences)).sum((-2, -1))
    untied_ranks = pairs.sum((-2, -1)).to(rewards.dtype)
    untied_rewards = preferred_pairs(rewards, mask).sum((-2, -1)).to(rewards.dtype)
    # A product of counts that is not 0 is at least 1, so that the clamp touches undefined values only.
    return signs / (untied_ranks * untied_rewards).clamp(min=1).sqrt()


def dense_ranks(ranks: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Ranks (..., K) long renumbered to 1, 2, 3, ... without gaps, ties sharing a number; 0 where the mask is False.

    >>> dense_ranks(torch.tensor([7, 3, 7, 9]))
    tensor([2, 1, 2, 3])
    """
    worse = preferred_pairs(ranks, mask).transpose(-2, -1)  # [i, j]: j is better than i
    # Of the completions better than i, count each distinct rank once: the first one that carries it.
    equal = ranks.unsqueeze(-1) == ranks.unsqueeze(-2)
    real = torch.ones_like(ranks, dtype=torch.bool) if mask is None else mask.bool()
    earlier = torch.ones_like(equal).tril(diagonal=-1)
    repeated = (equal & earlier & real.unsqueeze(-2)).any(-1)
    return ((worse & ~repeated.unsqueeze(-2)).sum(-1) + 1) * real


def ranking_metrics(
    rewards: torch.Tensor, ranks: torch.Tensor, mask: torch.Tensor, center_coefficient: float = 0.0
) -> dict[str, float]:
    """Everything that an evaluation reports, exact over all prompts given: (B, K) rewards, ranks and mask.

    Returns:
        `loss` (mean over prompts with an untied pair), `pair_accuracy` (over pairs), `kendall_tau` (mean over the
        same prompts as the loss), `mean_score_rank_1..K` (by dense rank, 1 is best), `tied_pairs` and
        `tied_prompts` (those without an untied pair) as counts.
    """
    losses, counted = ranking_losses(rewards, ranks, mask, center_coefficient)
    prompts = counted.sum().clamp(min=1)
    mask = mask.bool()
    sizes = mask.sum(-1)
    metrics = {
        "loss": (losses.sum() / prompts).item(),
        "pair_accuracy": pair_accuracy(rewards, ranks, mask).item(),
        "kendall_tau": ((kendall_tau(rewards, ranks, mask) * counted).sum() / prompts).item(),
        "tied_pairs": ((sizes * (sizes - 1) // 2).sum() - preferred_pairs(ranks, mask).sum()).item(),
        "tied_prompts": (~counted).sum().item(),
    }
    dense = dense_ranks(ranks, mask)
    for rank in range(1, int(dense.max().item()) + 1 if dense.numel() else 1):
        metrics[f"mean_score_rank_{rank}"] = rewards[dense == rank].mean().item()
    return metrics
