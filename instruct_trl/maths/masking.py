"""Reductions over real tokens only.

Legend: B rows, T tokens. Masks are positive: True (or 1) marks a real token.
"""

from __future__ import annotations

import torch


def masked_mean(values: torch.Tensor, mask: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """Mean of `values` (B, T) over the True positions of `mask` (B, T); 0 if there are none."""
    mask = mask.to(values.dtype)
    # At least 1: a row without a token gives 0, where 0/0 would put NaN into every gradient.
    if dim is None:
        return (values * mask).sum() / mask.sum().clamp(min=1)
    return (values * mask).sum(dim) / mask.sum(dim).clamp(min=1)


def masked_var(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Variance (biased, as a population) of `values` (B, T) where `mask` (B, T) is True."""
    return masked_mean((values - masked_mean(values, mask)) ** 2, mask)


def masked_whiten(values: torch.Tensor, mask: torch.Tensor, eps: float = 1e-8) -> torch.Tensor:
    """Shift and scale to mean 0, variance 1 over the True positions (B, T); the others become 0."""
    # eps keeps the scale finite where all values are equal, as they are with a single token.
    whitened = (values - masked_mean(values, mask)) * torch.rsqrt(masked_var(values, mask) + eps)
    # Padding was shifted by the mean as well; a later sum over the row must find 0 there.
    return torch.where(mask.bool(), whitened, torch.zeros_like(whitened))
