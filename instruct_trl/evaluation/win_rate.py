"""Paired comparison of two models on the same prompts, and the intervals around it.

Legend: N prompts. Scores come from one judge (a labeler, a program that stands in for one, a reward model); higher is
better. Everything here compares answers to the SAME prompt, so the difference between easy and hard prompts cancels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np

# Bounds the memory of one block of bootstrap draws: 8 bytes each, so 8 MB.
_DRAWS_PER_BLOCK = 1_000_000


@dataclass(frozen=True)
class WinRate:
    """How often a model's answer scores higher than the baseline's to the same prompt (the paper's Fig. 1).

    `rate` = (wins + ties/2) / n, between 0 and 1; `low` and `high` bound it (Wilson, 95 % unless asked otherwise).
    """

    wins: int
    ties: int
    losses: int
    n: int
    rate: float
    low: float
    high: float

    @property
    def verdict(self) -> Literal["above", "below", "unclear"]:
        """Where the interval lies relative to one half: above it, below it, or on both sides."""
        if self.low > 0.5:
            return "above"
        return "below" if self.high < 0.5 else "unclear"


@dataclass(frozen=True)
class MeanInterval:
    """A mean over n prompts with the interval `low` to `high` around it, in the unit of the values."""

    mean: float
    low: float
    high: float
    n: int


def wilson_interval(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a proportion (Wilson 1927); stays inside 0 to 1 and works at 0 and at n successes.

    Args:
        successes: between 0 and n; may be fractional when ties count half.
        n: number of trials.
        confidence: probability that the interval covers the true proportion.

    Raises:
        ValueError: n < 1, successes outside 0 to n, confidence outside 0 to 1.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"successes must lie between 0 and n with n ≥ 1, got {successes} of {n}.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}; for 95 % give 0.95.")
    z2 = NormalDist().inv_cdf(0.5 + confidence / 2) ** 2
    rate = successes / n
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (rate * (1 - rate) / n + z2 / (4 * n**2))) / (1 + z2 / n)
    # At the ends the bound is exactly 0 or 1; rounding could leave 1e-17 outside.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def win_rate(
    scores: Sequence[float],
    baseline_scores: Sequence[float],
    tie_margin: float = 0.0,
    confidence: float = 0.95,
) -> WinRate:
    """Win rate of a model against a baseline over N prompts, each judged once for both.

    A tie is a difference of at most `tie_margin` and counts half to each side. The interval is Wilson's with
    wins + ties/2 as the number of successes. A tie varies less than a coin, so with ties the interval is a little
    wider than it need be, never narrower.

    Args:
        scores: (N,) judge's score of the model's answer to each prompt.
        baseline_scores: (N,) the same for the baseline, in the same order of prompts.
        tie_margin: in the unit of the scores, ≥ 0.
        confidence: of the interval.

    Raises:
        ValueError: no prompts, unequal lengths, a score that is not finite, a negative margin.
    """
    difference = _paired_difference(scores, baseline_scores)
    if not tie_margin >= 0:
        raise ValueError(f"tie_margin must be 0 or more, got {tie_margin}.")
    n = len(difference)
    wins = int((difference > tie_margin).sum())
    losses = int((difference < -tie_margin).sum())
    ties = n - wins - losses
    successes = wins + ties / 2
    low, high = wilson_interval(successes, n, confidence)
    return WinRate(wins=wins, ties=ties, losses=losses, n=n, rate=successes / n, low=low, high=high)


def bootstrap_mean_ci(
    values: Sequence[float], seed: int = 0, n_boot: int = 10_000, confidence: float = 0.95
) -> MeanInterval:
    """Mean of `values` (N,) with the percentile bootstrap interval (Efron 1979), resampling the N prompts.

    Args:
        values: one number a prompt. Where a prompt gives several, average them first: prompts are what is resampled.
        seed: of the resampling; the same seed gives the same interval.
        n_boot: number of resamples; 10,000 settles the bounds to about 1 % of the interval's width.
        confidence: of the interval.

    Raises:
        ValueError: fewer than two values (one value shows no spread), a value that is not finite, n_boot < 1.
    """
    return bootstrap_ratio_ci(values, [1.0] * len(values), seed=seed, n_boot=n_boot, confidence=confidence)


def bootstrap_ratio_ci(
    numerators: Sequence[float],
    denominators: Sequence[float],
    seed: int = 0,
    n_boot: int = 10_000,
    confidence: float = 0.95,
) -> MeanInterval:
    """Σ numerators / Σ denominators, both (N,), with the percentile bootstrap interval, resampling the N prompts.

    For a rate over things that come in bundles, as the K(K−1)/2 pairs of a ranking do: give the pairs ordered right
    and the pairs of each prompt. Pairs of one prompt are not independent, so an interval over pairs is too narrow.

    Raises:
        ValueError: unequal lengths, fewer than two prompts, a number that is not finite, a denominator that is not
            positive (leave such prompts out), n_boot < 1.
    """
    top, bottom = _finite(numerators, "values"), _finite(denominators, "denominators")
    n = len(top)
    if n != len(bottom) or bool((bottom <= 0).any()):
        raise ValueError(f"Give each of the {n} prompts one denominator above 0; leave out prompts that have none.")
    if n < 2:
        raise ValueError(f"An interval needs at least 2 values, got {n}; evaluate on more prompts.")
    if n_boot < 1 or not 0 < confidence < 1:
        raise ValueError(f"n_boot must be ≥ 1 and confidence between 0 and 1, got {n_boot} and {confidence}.")
    rng = np.random.default_rng(seed)
    block = max(1, _DRAWS_PER_BLOCK // n)
    draws = (rng.integers(0, n, size=(min(block, n_boot - start), n)) for start in range(0, n_boot, block))
    ratios = np.concatenate([top[draw].sum(axis=1) / bottom[draw].sum(axis=1) for draw in draws])
    tail = (1 - confidence) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return MeanInterval(mean=float(top.sum() / bottom.sum()), low=float(low), high=float(high), n=n)


def bootstrap_mean_difference(
    scores: Sequence[float],
    baseline_scores: Sequence[float],
    seed: int = 0,
    n_boot: int = 10_000,
    confidence: float = 0.95,
) -> MeanInterval:
    """Mean of scores − baseline_scores, both (N,), with the interval of the paired bootstrap over prompts.

    Raises:
        ValueError: as `win_rate` and `bootstrap_mean_ci`.
    """
    difference = _paired_difference(scores, baseline_scores)
    return bootstrap_mean_ci(difference.tolist(), seed=seed, n_boot=n_boot, confidence=confidence)


def _paired_difference(scores: Sequence[float], baseline_scores: Sequence[float]) -> np.ndarray:
    if len(scores) != len(baseline_scores):
        raise ValueError(
            f"scores has {len(scores)} entries and baseline_scores {len(baseline_scores)}; "
            "both need one score for each prompt, in the same order."
        )
    return _finite(scores, "scores") - _finite(baseline_scores, "baseline_scores")


def _finite(values: Sequence[float], name: str) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} must be a list with one number a prompt and at least one prompt.")
    bad = np.flatnonzero(~np.isfinite(array))
    if bad.size:
        raise ValueError(
            f"{name}[{bad[0]}] is {array[bad[0]]}; every score must be finite. Look at that prompt's answer."
        )
    return array
