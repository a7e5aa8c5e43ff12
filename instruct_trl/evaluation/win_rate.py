"""Paired comparison of two models on the same prompts.

Legend: N rows, of a prompt each; a prompt may have several. Scores come from one judge (a labeler, a program that
stands in for one, a reward model); higher is better. Everything here compares answers to the SAME prompt, so the
difference between easy and hard prompts cancels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from instruct_trl.evaluation.estimates import (
    Estimate,
    Prompts,
    bootstrap_mean_ci,
    bootstrap_ratio_ci,
    finite,
    rate_interval,
    wilson_interval,
)

__all__ = [
    "Estimate",
    "WinRate",
    "bootstrap_mean_ci",
    "bootstrap_mean_difference",
    "bootstrap_ratio_ci",
    "paired_difference",
    "wilson_interval",
    "win_rate",
]


@dataclass(frozen=True)
class WinRate:
    """How often a model's answer scores higher than the baseline's to the same prompt (the paper's Fig. 1).

    `rate` = (wins + ties/2) / n, between 0 and 1; `low` and `high` bound it (95 % unless asked otherwise). `n_prompts`
    is how many different prompts the n rows are of; None where they were not given.
    """

    wins: int
    ties: int
    losses: int
    n: int
    rate: float
    low: float
    high: float
    n_prompts: int | None = None

    @property
    def verdict(self) -> Literal["above", "below", "unclear"]:
        """Where the interval lies relative to one half: above it, below it, or on both sides."""
        if self.low > 0.5:
            return "above"
        return "below" if self.high < 0.5 else "unclear"


def win_rate(
    scores: Sequence[float],
    baseline_scores: Sequence[float],
    tie_margin: float = 0.0,
    confidence: float = 0.95,
    prompts: Prompts = None,
) -> WinRate:
    """Win rate of a model against a baseline over N rows, each judged once for both.

    A tie is a difference of at most `tie_margin` and counts half to each side. The interval is Wilson's with
    wins + ties/2 as the number of successes. A tie varies less than a coin, so with ties the interval is a little
    wider than it need be, never narrower. Where a prompt stands more than once it is over prompts: `rate_interval`.

    Args:
        scores: (N,) judge's score of the model's answer to each prompt.
        baseline_scores: (N,) the same for the baseline, in the same order of prompts.
        tie_margin: in the unit of the scores, ≥ 0.
        confidence: of the interval.
        prompts: (N,) which prompt each row is of (`prompt_keys`); without them all are different.

    Raises:
        ValueError: no prompts, unequal lengths, a score that is not finite, a negative margin.
    """
    difference = paired_difference(scores, baseline_scores)
    if not tie_margin >= 0:
        raise ValueError(f"tie_margin must be 0 or more, got {tie_margin}.")
    n = len(difference)
    won, lost = difference > tie_margin, difference < -tie_margin
    wins, losses = int(won.sum()), int(lost.sum())
    found = rate_interval((1 + won - lost.astype(float)) / 2, prompts, confidence)
    low, high = found.bounds or (0.0, 1.0)
    return WinRate(
        wins=wins,
        ties=n - wins - losses,
        losses=losses,
        n=n,
        rate=found.mean,
        low=low,
        high=high,
        n_prompts=None if prompts is None else found.n,
    )


def bootstrap_mean_difference(
    scores: Sequence[float],
    baseline_scores: Sequence[float],
    seed: int = 0,
    n_boot: int = 10_000,
    confidence: float = 0.95,
) -> Estimate:
    """Mean of scores − baseline_scores, both (N,), with the interval of the paired bootstrap over prompts.

    Raises:
        ValueError: as `win_rate` and `bootstrap_mean_ci`.
    """
    difference = paired_difference(scores, baseline_scores)
    return bootstrap_mean_ci(difference.tolist(), seed=seed, n_boot=n_boot, confidence=confidence)


def paired_difference(scores: Sequence[float], baseline_scores: Sequence[float]) -> np.ndarray:
    """scores − baseline_scores, both (N,).

    Raises:
        ValueError: unequal lengths, or a number that is not finite.
    """
    if len(scores) != len(baseline_scores):
        raise ValueError(
            f"scores has {len(scores)} entries and baseline_scores {len(baseline_scores)}; "
            "both need one score for each prompt, in the same order."
        )
    return finite(scores, "scores") - finite(baseline_scores, "baseline_scores")
