"""The K-way ranking loss of the reward model (Ouyang et al. 2022, Eq. 1), and how well rewards reproduce a ranking.

Legend: ... any leading batch axes (prompts), K completions of one prompt: the last axis is always the list.
Ranks: lower is better, equal numbers tie, gaps are allowed, since only their order counts.
Pairs: (..., K, K) bool, [i, j] is True where completion i is preferred over j. `preferred_pairs` makes them from ranks;
a labeler who compared only some completions gives them directly. They are used as given: a > b and b > c do not imply
a > c, and cycles are allowed.
Masks are positive: True marks a real completion, so that lists of different lengths share a tensor. A completion that
is in no pair, padding or not, reaches neither the loss nor its gradient.
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
    return _real_pairs(ranks.unsqueeze(-1) < ranks.unsqueeze(-2), ranks, mask)


def tied_pairs(ranks: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """(..., K, K) bool, symmetric: [i, j] is True where i ≠ j are real and ranked equal. Arguments as above."""
    # Without the diagonal: a completion is no tie with itself.
    equal = ranks.unsqueeze(-1) == ranks.unsqueeze(-2)
    other = ~torch.eye(ranks.shape[-1], dtype=torch.bool, device=ranks.device)
    return _real_pairs(equal & other, ranks, mask)


def _real_pairs(pairs: torch.Tensor, ranks: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if mask is None:
        return pairs
    if mask.shape != ranks.shape:
        raise ValueError(f"mask {tuple(mask.shape)} does not fit ranks {tuple(ranks.shape)}.")
    mask = mask.bool()
    return pairs & mask.unsqueeze(-1) & mask.unsqueeze(-2)


def _clean(rewards: torch.Tensor, pairs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards (..., K), at least float32, with 0 where a completion is in no pair; and the pairs as bool.

    Whatever stands in a place without a pair, NaN included, must reach neither loss nor gradient.
    """
    if pairs.shape != (*rewards.shape, rewards.shape[-1]):
        raise ValueError(
            f"pairs {tuple(pairs.shape)} do not fit rewards {tuple(rewards.shape)}: they must be (..., K, K). "
            "preferred_pairs(ranks, mask) makes them from ranks."
        )
    pairs = pairs.bool()
    # Half precision loses the difference of close rewards.
    if rewards.dtype in (torch.float16, torch.bfloat16):
        rewards = rewards.float()
    return torch.where(pairs.any(-1) | pairs.any(-2), rewards, torch.zeros_like(rewards)), pairs


def _differences(rewards: torch.Tensor) -> torch.Tensor:
    """r_i − r_j, (..., K, K)."""
    return rewards.unsqueeze(-1) - rewards.unsqueeze(-2)


def ranking_losses(
    rewards: torch.Tensor, pairs: torch.Tensor, margins: torch.Tensor | None = None, center_coefficient: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 1 for each prompt by itself: the mean over its pairs (w, l) of −log σ(r_w − r_l − m_wl).

    For a ranking without ties the mean is over all C(K, 2) pairs, as in the paper, which drops tied pairs and has no
    margins (m = 0).

    Args:
        rewards: (..., K) r_θ(x, y), with gradient.
        pairs: (..., K, K) bool, [w, l] True where w is preferred over l.
        margins: (..., K, K) m_wl in units of reward, read where `pairs` is True (as TRL's `margin`); None means 0.
        center_coefficient: adds this many times the mean over the same pairs of (r_w + r_l)² (TRL's
            `center_rewards_coefficient`; Eisenstein et al. 2023, Eq. 2). 0 in the paper.

    Returns:
        losses (...), 0 for a prompt without a pair; and a bool (...), True for prompts that have one.

    Raises:
        ValueError: shapes differ.
    """
    rewards, pairs = _clean(rewards, pairs)
    logits = _differences(rewards)
    if margins is not None:
        if margins.shape != pairs.shape:
            raise ValueError(f"margins {tuple(margins.shape)} do not fit pairs {tuple(pairs.shape)}.")
        # Taken out before the sigmoid too: a NaN margin of no pair would spoil the gradient.
        logits = logits - torch.where(pairs, margins.to(logits.dtype), torch.zeros_like(logits))
    # logsigmoid, not log of sigmoid: the latter is −inf for a pair that is ordered very wrongly.
    terms = -functional.logsigmoid(logits)
    if center_coefficient:
        terms = terms + center_coefficient * (rewards.unsqueeze(-1) + rewards.unsqueeze(-2)).square()
    # Each prompt's sum is divided by its own number of pairs: 9 completions (36 pairs) weigh no more than 4.
    count = pairs.sum((-2, -1))
    losses = torch.where(pairs, terms, torch.zeros_like(terms)).sum((-2, -1)) / count.clamp(min=1)
    return losses, count > 0


def ranking_loss(
    rewards: torch.Tensor,
    pairs: torch.Tensor,
    weights: torch.Tensor | None = None,
    margins: torch.Tensor | None = None,
    center_coefficient: float = 0.0,
) -> torch.Tensor:
    """Eq. 1 for a batch: Σ w_b loss_b / Σ w_b (a scalar) over the prompts b that have a pair; 0 where none has.

    Args:
        weights: (...) w_b > 0, one per prompt; None means that all are equal, as in the paper.

    The other arguments and errors are those of `ranking_losses`.

    >>> ranking_loss(torch.zeros(1, 3), preferred_pairs(torch.tensor([[1, 2, 3]])))  # log 2: all rewards equal
    tensor(0.6931)
    """
    losses, counted = ranking_losses(rewards, pairs, margins, center_coefficient)
    if weights is None:
        weights = torch.ones_like(losses)
    if weights.shape != losses.shape:
        raise ValueError(f"weights {tuple(weights.shape)} do not fit {tuple(losses.shape)}: give one per prompt.")
    # A prompt without a pair has loss 0, which would pull the mean down if its weight stayed in the divisor.
    weights = torch.where(counted, weights.to(losses.dtype), torch.zeros_like(losses))
    total = weights.sum()
    return (weights * losses).sum() / torch.where(total > 0, total, torch.ones_like(total))


def pair_counts(rewards: torch.Tensor, pairs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each prompt, how many pairs the rewards order correctly, and how many there are: integers (...) both.

    Two equal rewards order no pair correctly, as in TRL's `accuracy`; margins play no part. Arguments as in
    `ranking_losses`.
    """
    rewards, pairs = _clean(rewards, pairs)
    return (pairs & (_differences(rewards) > 0)).sum((-2, -1)), pairs.sum((-2, -1))


def pair_accuracy(rewards: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """Share (a scalar in [0, 1]) of all pairs that the rewards order correctly; 0 where there are none.

    Arguments as in `ranking_losses`. This is the number that the paper reports for its reward models (section 4).
    """
    correct, total = pair_counts(rewards, pairs)
    return correct.sum() / total.sum().clamp(min=1)


def kendall_tau(rewards: torch.Tensor, pairs: torch.Tensor, ties: torch.Tensor | None = None) -> torch.Tensor:
    """Kendall's τ-b of each prompt (...), in [−1, 1]: 1 where the rewards give back the pairs, −1 their reverse.

    τ_b = (concordant − discordant) / sqrt(pairs · compared pairs untied in rewards). Only `pairs` and `ties` count
    as compared. For a full ranking this is the usual τ-b; for a partial one, what was not compared is no tie. 0 if a
    factor is 0, which leaves τ undefined.

    Args:
        rewards, pairs: as in `ranking_losses`.
        ties: (..., K, K) bool, what the labeler called equal (`tied_pairs(ranks, mask)`); None means nothing.

    Raises:
        ValueError: shapes differ.
    """
    if ties is None:
        ties = torch.zeros_like(pairs)
    if ties.shape != pairs.shape:
        raise ValueError(f"ties {tuple(ties.shape)} do not fit pairs {tuple(pairs.shape)}.")
    pairs = pairs.bool()
    rewards, either = _clean(rewards, pairs | ties.bool())
    differences = _differences(rewards)
    # `pairs` is True in the winner's row only, so each pair counts once: +1 if concordant, −1 if discordant. A tie is
    # neither, so `ties` enter only what was compared.
    signs = torch.where(pairs, differences.sign(), torch.zeros_like(differences)).sum((-2, -1))
    compared = (either | either.transpose(-2, -1)).triu(diagonal=1)  # each two completions once
    untied_rewards = (compared & (differences != 0)).sum((-2, -1)).to(rewards.dtype)
    # The product of counts is 0 or at least 1: the clamp changes only the undefined case.
    return signs / (pairs.sum((-2, -1)).to(rewards.dtype) * untied_rewards).clamp(min=1).sqrt()


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


def ranks_apart(ranks: torch.Tensor) -> torch.Tensor:
    """(..., K, K) long: [i, j] is how many places j stands below i in the `dense_ranks` of (..., K) ranks.

    This is the one definition of a distance in rank: gaps in the numbers and sizes of ties do not count.
    """
    dense = dense_ranks(ranks)
    return dense.unsqueeze(-2) - dense.unsqueeze(-1)


def ranking_metrics(
    rewards: torch.Tensor,
    pairs: torch.Tensor,
    ranks: torch.Tensor,
    mask: torch.Tensor,
    weights: torch.Tensor | None = None,
    margins: torch.Tensor | None = None,
    center_coefficient: float = 0.0,
) -> dict[str, float]:
    """All numbers that an evaluation reports, exact over all B prompts given.

    Args:
        rewards, mask: (B, K).
        pairs, margins: (B, K, K), as in `ranking_losses`.
        ranks: (B, K) from 1; all 0 in the row of a prompt that has only pairs.
        weights: (B,), as in `ranking_loss`.

    Returns:
        `loss` (weighted mean over prompts with a pair), `pair_accuracy` (over pairs), `kendall_tau` (mean over the
        same prompts as the loss), `mean_score_rank_1..K` (by dense rank, 1 is best, over prompts with ranks),
        `tied_pairs` (in prompts with ranks) and `tied_prompts` (those without a pair) as counts.
    """
    counted = pairs.bool().any(-1).any(-1)
    # A prompt with pairs but no ranks has no ties: what was not compared is unknown.
    ranked = mask.bool() & (mask.bool() & (ranks != 0)).any(-1, keepdim=True)
    ties = tied_pairs(ranks, ranked)
    taus = kendall_tau(rewards, pairs, ties)
    metrics = {
        "loss": ranking_loss(rewards, pairs, weights, margins, center_coefficient).item(),
        "pair_accuracy": pair_accuracy(rewards, pairs).item(),
        "kendall_tau": ((taus * counted).sum() / counted.sum().clamp(min=1)).item(),
        "tied_pairs": ties.sum().item() // 2,
        "tied_prompts": (~counted).sum().item(),
    }
    dense = dense_ranks(ranks, ranked)
    for rank in range(1, int(dense.max().item()) + 1 if dense.numel() else 1):
        metrics[f"mean_score_rank_{rank}"] = rewards[dense == rank].mean().item()
    return metrics
