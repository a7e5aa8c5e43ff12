"""The losses of PPO-ptx: the clipped policy loss, the clipped value loss, and Eq. 2's mix with pretraining.

Legend: B episodes, T completion tokens. Losses are per token; the caller decides how to average them.
"""

from __future__ import annotations

import torch

from instruct_trl.maths.masking import masked_var


def clipped_policy_loss(
    logps: torch.Tensor, old_logps: torch.Tensor, advantages: torch.Tensor, clip_low: float, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's clipped surrogate (Schulman et al. 2017, Eq. 7), negated: −min(ρA, clip(ρ, 1−ε, 1+ε)A).

    Args:
        logps: (B, T) log π of the sampled tokens, with gradient.
        old_logps: (B, T) the same under the policy that sampled them.
        advantages: (B, T) without gradient.
        clip_low, clip_high: ε below and above 1; both 0.2 in the paper.

    Returns:
        loss (B, T) and the ratio ρ = π/π_old (B, T).
    """
    ratio = torch.exp(logps - old_logps)  # from logs: the probabilities of rare tokens would underflow
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    # The minimum limits the gain of a step too far; a step in the wrong direction is still punished in full.
    return -torch.min(ratio * advantages, clipped * advantages), ratio


def clipped_value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, value_clip: float
) -> torch.Tensor:
    """½·max((V − R)², (clip(V, V_old ± ε) − R)²), the value loss of the reference PPO implementation.

    All arguments (B, T); returns (B, T). The paper does not publish the value loss; ε = `value_clip` = 0.2.
    """
    clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)
    # The maximum has no gradient once V has moved by more than ε towards the return.
    return torch.max((values - returns).square(), (clipped - returns).square()) / 2


def ppo_ptx_loss(ppo_loss: torch.Tensor, ptx_loss: torch.Tensor, ptx_coef: float) -> torch.Tensor:
    """Eq. 2 of Ouyang et al. 2022, negated: −E_π[r − β·KL] − γ·E_pretrain[log π(x)].

    `ppo_loss` stands for the first expectation (the clipped surrogate over the KL-penalised reward), `ptx_loss` is
    the mean per-token cross-entropy on pretraining text, `ptx_coef` is γ: 27.8 in the paper, 0 for plain PPO.
    Gradients add up, so the trainer calls this once per term (the other term 0) and accumulates, as the paper does.
    """
    return ppo_loss + ptx_coef * ptx_loss


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """1 − Var(R − V)/Var(R) over the True positions of mask (B, T): 1 is a perfect critic, 0 a constant one."""
    # 1e-8: returns that are all equal, or a single token, have variance 0.
    return 1 - masked_var(returns - values, mask) / masked_var(returns, mask).clamp(min=1e-8)
