"""Over-optimisation: where the labeler's score turns down while the reward model's goes on (Gao et al. 2022).

The labeler's score is called gold: it is what was wanted; the reward model's is what was trained on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np

Direction = Literal["rose", "fell", "did not clearly move", ""]


@dataclass(frozen=True)
class TurningPoint:
    """Where the gold score was highest, if it fell clearly afterwards.

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
    """Where gold turned down for good, given both scores of every logged row in order of training; None if it did not.

    The peak is that of means over consecutive rows. It is looked for on every other row and the fall is judged on the
    rows between, by `direction`: the peak of noise always has a fall behind it, and must not be its own witness.

    Raises:
        ValueError: unequal lengths.
    """
    if len(gold) != len(proxy):
        raise ValueError(f"Both scores need every logged row, got {len(gold)} and {len(proxy)}.")
    searched, judged = list(gold[::2]), list(gold[1::2])
    if len(searched) < 16:
        return None
    path = path_means(searched)
    edges = [len(searched) * i // len(path) for i in range(len(path) + 1)]
    peak = int(np.argmax(path))
    start = (edges[peak] + edges[peak + 1]) // 2
    if direction(judged[start:]) != "fell":
        return None
    last = path_means(judged)[-1]
    return TurningPoint(2 * start, path[peak], last, direction(list(proxy[2 * start :])) != "fell")


def direction(values: Sequence[float]) -> Direction:
    """Whether a noisy series moved between its start and its end.

    Its levels are the medians of the first and the last fifth: one wild step at the start must not speak for them. It
    moved when they differ by more than two standard errors of that difference, which noise alone does in about one
    series of twenty. A median of k values has the standard error 1.253 σ/√k for normal noise that is independent from
    row to row. σ is 1.483/√2 times the median absolute difference of neighbours, over the whole series: a trend hardly
    enters it. With fewer than 15 points the noise cannot be judged and the direction is "".
    """
    k = len(values) // 5
    if k < 3:
        return ""
    first, last = median(values[:k]), median(values[-k:])
    sigma = 1.483 / math.sqrt(2) * median(abs(after - before) for before, after in pairwise(values))
    if abs(last - first) <= 2 * 1.253 * sigma * math.sqrt(2 / k):
        return "did not clearly move"
    return "rose" if last > first else "fell"


def path_means(values: Sequence[float], points: int = 16) -> list[float]:
    """At most `points` means of consecutive values: the path through a noisy cloud, in order of training."""
    points = min(points, len(values))
    edges = [len(values) * i // points for i in range(points + 1)]
    return [sum(values[low:high]) / (high - low) for low, high in zip(edges, edges[1:], strict=False)]


def best_checkpoint(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The row with the highest `labeler_score`, the earlier of two equals.

    Raises:
        ValueError: no row with a score.
    """
    scored = [row for row in rows if row.get("labeler_score") is not None]
    if not scored:
        raise ValueError("No checkpoint has a labeler's score; evaluate them on validation prompts first.")
    return max(scored, key=lambda row: row["labeler_score"]["mean"])


def score_checkpoints(
    folder: str | Path, labeler: Callable[..., list[float]], reward_model: Any, prompts: Any, **kwargs: Any
) -> list[dict[str, Any]]:
    """Gold and RM score of every checkpoint of a run on the same validation prompts.

    Args:
        folder: the run's, with its checkpoint-* folders.
        labeler: a TRL reward function, the gold score.
        reward_model: a `RewardScorer` or another reward function.
        prompts: of a validation set: neither trained on nor used in the final comparison.
        kwargs: of `select_checkpoint` (`max_new_tokens`, `temperature`, `batch_size`, `seed`, ...).

    Returns:
        One row per checkpoint, by step: `step`, `checkpoint`, `labeler_score` (an `Estimate` as a dict) and `score`;
        the last also `behind_best`, the best labeler score less its own, paired over prompts, where another is best.
    """
    from instruct_trl.evaluation.selection import select_checkpoint
    from instruct_trl.models.reward_functions import one_number_each

    proxies: list[float] = []

    def both(**columns: Any) -> list[float]:
        scores = one_number_each(reward_model(**columns), len(columns["prompts"]), "The reward model")
        proxies.append(float(np.mean(np.array(scores, dtype=float))))  # None: NaN
        return labeler(**columns)

    result = select_checkpoint(folder, both, prompts, **kwargs)
    rows: list[dict[str, Any]] = [
        {
            "step": row.step,
            "checkpoint": Path(row.checkpoint).name,
            "labeler_score": asdict(row.rm_score),
            "score": proxy,
        }
        for row, proxy in zip(result.rows, proxies, strict=True)
    ]
    if result.last is not None:
        rows[-1]["behind_best"] = {name: getattr(result.last, name) for name in ("mean", "low", "high", "n")}
    return rows
