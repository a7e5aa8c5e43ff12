"""How does the accuracy grow with the number of labeled prompts, and what would twice as many bring?

The same training runs on nested subsets of the training prompts, and each reward model is asked about the same held-out
pairs. The accuracy is then fitted by a line over log2 of the prompts: its slope is what twice the labels bring.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from instruct_trl.evaluation.estimates import MIN_PROMPTS, Estimate, mean_interval
from instruct_trl.evaluation.reward_metrics import Record, credit, pair_accuracy, pair_rate, pair_table

MIN_POINTS = 3
"""Two points lie on a line, however noisy they are."""


def nested_subsets(prompts: Sequence[str], fractions: Sequence[float], seed: int = 0) -> dict[float, list[int]]:
    """For each fraction, the row numbers of so many of the different prompts, in order; with all rows of a prompt.

    A smaller subset is inside every larger one.

    Args:
        prompts: the prompt of each row, by name.
        fractions: shares of the different prompts, above 0 and at most 1, no two alike.
        seed: of the order in which prompts join.

    Raises:
        ValueError: a fraction out of range or given twice, fewer than `MIN_PROMPTS` prompts in a subset, or two subsets
            of equally many.
    """
    check_fractions(fractions)
    names = sorted(set(prompts))
    random.Random(seed).shuffle(names)
    place = {name: number for number, name in enumerate(names)}
    sizes = {fraction: round(fraction * len(names)) for fraction in sorted(fractions)}
    for fraction, size in sizes.items():
        if size < MIN_PROMPTS:
            raise ValueError(
                f"--learning_curve {fraction:g} of {len(names)} training prompts is {size} of them. A reward model "
                f"needs {MIN_PROMPTS} or more: leave that fraction out, or take a larger one."
            )
        if same := [other for other in sizes if other < fraction and sizes[other] == size]:
            raise ValueError(
                f"--learning_curve {same[0]:g} and {fraction:g} are both {size} of {len(names)} training prompts. "
                "Leave one of them out."
            )
    return {
        fraction: [row for row, prompt in enumerate(prompts) if place[prompt] < size]
        for fraction, size in sizes.items()
    }


def check_fractions(fractions: Sequence[float]) -> None:
    """Refuse fractions out of range or given twice."""
    for fraction in fractions:
        if not 0 < fraction <= 1:
            raise ValueError(
                f"--learning_curve {fraction:g}: give shares of the training prompts, above 0 and at most 1, such as "
                "0.25 0.5 1.0."
            )
    if twice := [fraction for fraction in fractions if fractions.count(fraction) > 1]:
        raise ValueError(f"--learning_curve {twice[0]:g} is given twice. Give each fraction once.")


def learning_curve(prompts: Mapping[float, int], records: Mapping[float, Sequence[Record]]) -> dict[str, Any]:
    """The curve, as JSON has it.

    Args:
        prompts: fraction → the number of training prompts.
        records: fraction → `RankingRewardTrainer.evaluation_records` of the reward model trained on them, all of the
            same held-out pairs.

    Returns:
        `points`, a list in the order of fractions: `fraction`, `prompts`, `pair_accuracy`, and `bag_of_words`, the
        accuracy of the bag trained on the same prompts (or None); `per_doubling`, the gain in accuracy for twice the
        prompts as an estimate, or None for fewer than `MIN_POINTS` points. Its interval is over held-out prompts. It
        knows nothing of how a training run would come out with another seed or with other prompts.

    Raises:
        ValueError: the records are not of the same pairs.
    """
    fractions = sorted(prompts)
    tables = {fraction: pair_table(records[fraction]) for fraction in fractions}
    points = []
    for fraction, table in tables.items():
        words = None if table.words is None else asdict(pair_rate(credit(table.words), table.prompt))
        accuracy = asdict(pair_accuracy(records[fraction]))
        points.append(
            {"fraction": fraction, "prompts": prompts[fraction], "pair_accuracy": accuracy, "bag_of_words": words}
        )
    first = tables[fractions[0]]
    if any(not np.array_equal(table.prompt, first.prompt) for table in tables.values()):
        raise ValueError("The reward models of the learning curve were not asked about the same held-out pairs.")
    slope = None
    if len(points) >= MIN_POINTS:
        slope = asdict(_slope(np.array([prompts[f] for f in fractions]), list(tables.values())))
    return {"points": points, "per_doubling": slope}


def _slope(prompts: np.ndarray, tables: Sequence[Any]) -> Estimate:
    """The slope of the accuracies over log2 of the prompts, by least squares.

    It is a weighted sum of the accuracies, so its bootstrap resamples held-out prompts with all models at once.
    """
    x = np.log2(prompts) - np.log2(prompts).mean()
    weights = x / (x @ x)
    return mean_interval(weights @ np.array([table.correct for table in tables], dtype=float), tables[0].prompt)
