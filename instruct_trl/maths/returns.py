"""Rewards, advantages and returns of one rollout: Eq. 2's reward, and generalised advantage estimation.

Legend: B episodes, T completion tokens. Masks are positive, contiguous from the first token of each row.
An episode is one answer (the paper's bandit): the score arrives once, at its last token.
"""

from __future__ import annotations

import torch


def kl_estimate(logps: torch.Tensor, ref_logps: torch.Tensor, estimator: str = "k1") -> torch.Tensor:
    """Per-token estimate (B, T), in nats, of KL(π ‖ π_ref) from the sampled tokens alone.

    With d = log π − log π_ref: k1 = d (unbiased, the paper's), k2 = d²/2, k3 = exp(−d) − 1 + d
    (Schulman 2020, "Approximating KL divergence").

    Raises:
        ValueError: unknown `estimator`.
    """
    log_ratio = logps - ref_logps
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    if estimator == "k3":
        return torch.exp(-log_ratio) - 1 + log_ratio
    raise ValueError(f"kl_estimator must be 'k1', 'k2' or 'k3', got {estimator!r}.")


def token_rewards(scores: torch.Tensor, kl: torch.Tensor, mask: torch.Tensor, beta: float) -> torch.Tensor:
    """The reward of Eq. 2 spread over tokens: r_t = −β·KL_t, plus the score at the last real token.

    Args:
        scores: (B,) reward model scores of the whole answers, bias included.
        kl: (B, T) per-token KL estimates.
        mask: (B, T) True on completion tokens, at least one in each row.
        beta: KL coefficient, 0.02 in the paper.

    Returns:
        (B, T), 0 where the mask is False.
    """
    if scores.shape != mask.shape[:1] or kl.shape != mask.shape:
        raise ValueError(f"scores {tuple(scores.shape)}, kl {tuple(kl.shape)} and mask {tuple(mask.shape)} do not fit.")
    rewards = -beta * kl * mask  # a penalty at every token, so that each pays for its own drift
    # Index of the last real token, EOS or not. One place later is padding, and the score would be lost.
    last = mask.long().sum(dim=1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores.to(rewards.dtype).unsqueeze(1))


def generalized_advantages(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, discount: float = 1.0, gae_lambda: float = 0.95
) -> tuple[torch.Tensor, torch.Tensor]:
    """GAE (Schulman et al. 2016, Eq. 16): A_t = Σ_l (γλ)^l δ_{t+l}, δ_t = r_t + γ V_{t+1} − V_t, V after the end = 0.

    Args:
        rewards: (B, T) per-token rewards.
        values: (B, T) `values[:, t]` is V of the state before token t is chosen.
        mask: (B, T) True on completion tokens.
        discount: γ, 1.0 in the paper (no discount).
        gae_lambda: λ, not published in the paper; 0.95.

    Returns:
        advantages (B, T) and returns (B, T) = advantages + values, both 0 where the mask is False.
    """
    mask = mask.to(values.dtype)
    values = values * mask  # so that the value after the last token is 0: the episode is over, cut or not
    advantages = torch.zeros_like(values)
    running = torch.zeros_like(values[:, 0])
    # Backwards, because A_t = δ_t + γλ A_{t+1}: each step needs the one after it.
    for t in reversed(range(values.size(1))):
        next_value = values[:, t + 1] if t + 1 < values.size(1) else torch.zeros_like(running)
        delta = rewards[:, t] + discount * next_value - values[:, t]
        running = (delta + discount * gae_lambda * running) * mask[:, t]  # nothing flows back out of padding
        advantages[:, t] = running
    return advantages, advantages + values  # before any whitening, which would change what the critic learns
