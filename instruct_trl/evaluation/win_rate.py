"""Paired comparison of two models on the same prompts.

Legend: N rows, of a prompt each; a prompt may have several. Scores come from one judge (a labeler, a program that
stands in for one, a reward model); higher is better. Everything here compares answers to the SAME prompt, so the
difference between easy and hard prompts cancels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from instruct_trl.evaluation.estimates import Estimate, Prompts, Side, finite, rate_interval


@dataclass(frozen=True)
class WinRate(Estimate):
    """How often a model's answer scores higher than the baseline's to the same prompt (the paper's Fig. 1).

    `mean` = (wins + ties/2) / rows, between 0 and 1; `low` and `high` bound it (95 % unless asked otherwise). `n` is
    how many different prompts the rows are of.
    """

    wins: int
    ties: int
    losses: int

    @property
    def rows(self) -> int:
        """The answers that were compared; more than `n` where a prompt has several."""
        return self.wins + self.ties + self.losses

    @property
    def verdict(self) -> Side:
        """Where the interval lies relative to one half: above it, below it, or on both sides."""
        return self.side_of(0.5)


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
    won, lost = difference > tie_margin, difference < -tie_margin
    wins, losses = int(won.sum()), int(lost.sum())
    found = rate_interval((1 + won - lost.astype(float)) / 2, prompts, confidence)
    return WinRate(found.mean, found.low, found.high, found.n, wins, len(difference) - wins - losses, losses)


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
