"""Over-optimisation: the labeler's score turns down while the reward model's goes on (Gao et al. 2022).

The labeler's score is called gold, since it is what was wanted; the reward model's, the proxy, is what was trained on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import Any, Literal

Direction = Literal["rose", "fell", "did not clearly move", ""]


@dataclass(frozen=True)
class TurningPoint:
    """The peak of a gold score that fell clearly afterwards.

    Attributes:
        index: the logged row at the peak.
        gold, last: mean gold score around the peak and over the last rows.
        proxy_rose: the reward model's score did not fall after the peak.
    """

    index: int
    gold: float
    last: float
    proxy_rose: bool


def turning_point(gold: Sequence[float], proxy: Sequence[float]) -> TurningPoint | None:
    """Find where gold turned down for good; both scores are of every logged row, in order of training.

    Raises:
        ValueError: unequal lengths.
    """
    if len(gold) != len(proxy):
        raise ValueError(f"Both scores need every logged row, got {len(gold)} and {len(proxy)}.")
    # Noise always has a peak with a fall behind it. So the peak is looked for on every other row, and the rows between
    # judge the fall: the peak must not be its own witness.
    searched, judged = gold[::2], gold[1::2]
    if len(searched) < 16:
        return None
    path, edges = path_means(searched), _edges(len(searched), 16)
    peak = max(range(16), key=path.__getitem__)
    start = (edges[peak] + edges[peak + 1]) // 2
    if direction(judged[start:]) != "fell":
        return None
    return TurningPoint(2 * start, path[peak], path_means(judged)[-1], direction(proxy[2 * start :]) != "fell")


def direction(values: Sequence[float]) -> Direction:
    """Whether a noisy series moved between its start and its end; "" with fewer than 15 values.

    It moved if its two levels differ by more than two standard errors of that difference. Noise alone does so in about
    one series of twenty.
    """
    k = len(values) // 5
    if k < 3:  # too few to judge the noise by
        return ""
    # Medians of the first and the last fifth: one wild step at the start must not speak for the level.
    first, last = median(values[:k]), median(values[-k:])
    # σ of normal noise, from neighbours: a trend hardly enters their differences.
    sigma = 1.483 / math.sqrt(2) * median(abs(after - before) for before, after in pairwise(values))
    # The standard error of a median of k normal values is 1.253 σ/√k; there are two medians.
    if abs(last - first) <= 2 * 1.253 * sigma * math.sqrt(2 / k):
        return "did not clearly move"
    return "rose" if last > first else "fell"


def _edges(n: int, points: int) -> list[int]:
    return [n * i // points for i in range(points + 1)]


def path_means(values: Sequence[float], points: int = 16) -> list[float]:
    """At most `points` means of consecutive values: the path through a noisy cloud, in order of training."""
    edges = _edges(len(values), min(points, len(values)))
    return [fmean(values[low:high]) for low, high in pairwise(edges)]


def best_checkpoint(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The row of `selection.score_checkpoints` with the highest `labeler_score`, the earlier of two equals.

    Raises:
        ValueError: no row with a score.
    """
    scored = [row for row in rows if row.get("labeler_score") is not None]
    if not scored:
        raise ValueError("No checkpoint has a labeler's score; evaluate them on validation prompts first.")
    return max(scored, key=lambda row: row["labeler_score"]["mean"])
