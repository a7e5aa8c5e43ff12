"""Paired comparison of two models on the same prompts.

Legend: N rows, each of one prompt; a prompt may have several. Scores come from one judge (a labeler, a program that
stands in for one, a reward model); higher is better. Both answers of a row are to the SAME prompt, so the difference
between easy and hard prompts cancels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from instruct_trl.evaluation.estimates import Estimate, Prompts, Side, finite, mean_interval, rate_interval


@dataclass(frozen=True)
class WinRate(Estimate):
    """How often a model's answer scores higher than the baseline's to the same prompt (the paper's Fig. 1).

    `mean` = (wins + ties/2) / rows, between 0 and 1; `low` and `high` bound it. `n` counts different prompts.
    """

    wins: int
    ties: int
    losses: int

    @property
    def rows(self) -> int:
        """The answers that were compared; more than `n` if a prompt has several."""
        return self.wins + self.ties + self.losses

    @property
    def verdict(self) -> Side:
        """The side of one half that the interval lies on."""
        return self.side_of(0.5)


def win_rate(scores: Sequence[float], baseline_scores: Sequence[float], *, prompts: Prompts = None) -> WinRate:
    """Win rate of a model against a baseline over N rows, each judged once for both.

    Args:
        scores, baseline_scores: (N,) the judge's score of each one's answer, in the same order.
        prompts: (N,) the prompt of each row (`prompt_keys`); without them all are different.

    Raises:
        ValueError: no prompts, unequal lengths, a score that is not finite.
    """
    difference = paired_difference(scores, baseline_scores)
    won, lost = difference > 0, difference < 0
    wins, losses = int(won.sum()), int(lost.sum())
    # A tie is half a success. It varies less than a coin, so with ties the interval is a little too wide, never too
    # narrow.
    found = rate_interval((1 + won - lost.astype(float)) / 2, prompts)
    return WinRate(found.mean, found.low, found.high, found.n, wins, len(difference) - wins - losses, losses)


def win_rate_lead(
    scores: Sequence[float], other_scores: Sequence[float], baseline_scores: Sequence[float], *, prompts: Prompts = None
) -> Estimate:
    """One model's win rate minus another's against the same baseline, paired over prompts; between −1 and 1.

    Both meet the same answers of the baseline, so this interval is narrower than the two win rates suggest. Arguments
    and errors are those of `win_rate`.
    """
    outcomes = (np.sign(paired_difference(of, baseline_scores)) for of in (scores, other_scores))
    return mean_interval(paired_difference(*outcomes) / 2, prompts, scale=(-1.0, 1.0))


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
