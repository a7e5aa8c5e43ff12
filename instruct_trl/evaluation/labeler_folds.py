"""Does a reward model hold for labelers it was not trained on? Cross validation over groups of labelers.

Ouyang et al. 2022, section 4.1: reward models trained on four of five groups of labelers reach 69.6 ± 0.9 % on the
held-out group, against 72.4 ± 0.4 % on labelers of the training set.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from instruct_trl.data.encoding import prompt_keys
from instruct_trl.evaluation.estimates import mean_interval
from instruct_trl.evaluation.reward_metrics import Record, pair_accuracy

EVALUATION_SETS = ("held_in", "held_out")


def labeler_folds(labelers: Sequence[str], n_folds: int = 5, seed: int = 0) -> list[set[str]]:
    """Part the labelers into `n_folds` groups with about equal numbers of rows.

    Args:
        labelers: the dataset's `labeler` column, one name per row.
        seed: decides between labelers with equal numbers of rows.

    Raises:
        ValueError: fewer than two folds, a row without a labeler, fewer labelers than folds.
    """
    if n_folds < 2:
        raise ValueError(f"n_folds is {n_folds}; holding one group out needs at least 2.")
    for row, name in enumerate(labelers):
        if not isinstance(name, str) or not name:
            raise ValueError(f"Row {row} has labeler {name!r}; give each row a name, or drop the rows that lack one.")
    rows = Counter(labelers)
    if len(rows) < n_folds:
        raise ValueError(f"There are {len(rows)} labelers for {n_folds} folds; ask for n_folds={len(rows)} or fewer.")
    names = sorted(rows)
    random.Random(seed).shuffle(names)
    folds: list[set[str]] = [set() for _ in range(n_folds)]
    # From the busiest labeler to the least busy, each joins the group that has the fewest rows so far.
    for name in sorted(names, key=lambda name: -rows[name]):
        min(folds, key=lambda fold: sum(rows[other] for other in fold)).add(name)
    return folds


def cross_validate_labelers(
    dataset: Any,
    train_and_evaluate: Callable[[Any, dict[str, Any]], dict[str, Sequence[Record]]],
    n_folds: int = 5,
    seed: int = 0,
    held_in: float = 0.1,
) -> dict[str, Any]:
    """Train once per fold without its labelers, then compare labelers seen in training with those held out.

    The folds share training data, so the intervals are a little too narrow (Bengio and Grandvalet 2004); the paper's
    errors are of this kind too.

    ```python
    def train_and_evaluate(train_dataset, evaluation_sets):
        trainer = RankingRewardTrainer("my/model", config, train_dataset=train_dataset)
        trainer.train()
        ...  # trainer.evaluate() on the rows of each set
        return {"held_in": records, "held_out": records}  # trainer.evaluation_records of each
    ```

    Args:
        dataset: a `datasets.Dataset` of rankings with a `labeler` column; rows of equal `prompt` belong together.
            Without that column each row is a prompt of its own.
        train_and_evaluate: gets the training rows and {"held_in": rows, "held_out": rows}; gives `evaluation_records`
            by the same names. It must start from a fresh model each time.
        held_in: share of the training labelers' prompts kept from training.

    Returns:
        `folds`, a list with `held_out_labelers`, `n_train`, `n_overlap` (rows of held-out labelers left out since
        their prompt was trained on), `held_in` and `held_out` (pair accuracies as dicts); `held_in`, `held_out` and
        `difference` (held out minus held in, of the same fold), each an estimate over folds as a dict.

    Raises:
        ValueError: no labeler column; whatever `labeler_folds` raises; `held_in` outside 0 to 1; a fold with an empty
            set; records missing from the answer.
    """
    if not 0 < held_in < 1:
        raise ValueError(f"held_in is {held_in}; it is the share of prompts kept from training, between 0 and 1.")
    labelers, prompts = _labelers_and_prompts(dataset)
    folds = []
    for number, out in enumerate(labeler_folds(labelers, n_folds, seed), 1):
        parts = _split(labelers, prompts, out, held_in, random.Random(f"{seed}/{number}"))
        if empty := [name for name in ("train", *EVALUATION_SETS) if not parts[name]]:
            raise ValueError(
                f"Fold {number} (without {', '.join(sorted(out))}) has no rows for {empty[0]!r}; use fewer folds, "
                "another held_in, or more prompts."
            )
        sets = {name: dataset.select(parts[name]) for name in EVALUATION_SETS}
        records = train_and_evaluate(dataset.select(parts["train"]), sets)
        if missing := [name for name in EVALUATION_SETS if name not in records]:
            raise ValueError(f"train_and_evaluate gave no records for {missing[0]!r}; return both sets' by name.")
        fold: dict[str, Any] = {
            "held_out_labelers": sorted(out),
            "n_train": len(parts["train"]),
            "n_overlap": len(parts["overlap"]),
        }
        folds.append(fold | {name: asdict(pair_accuracy(records[name])) for name in EVALUATION_SETS})
    rates = {name: [fold[name]["mean"] for fold in folds] for name in EVALUATION_SETS}
    rates["difference"] = [new - seen for seen, new in zip(rates["held_in"], rates["held_out"], strict=True)]
    return {"folds": folds, **{name: asdict(mean_interval(values)) for name, values in rates.items()}}


def _labelers_and_prompts(dataset: Any) -> tuple[list[str], list[str]]:
    if "labeler" not in dataset.column_names:
        raise ValueError(
            f"The dataset has no `labeler` column, only {', '.join(dataset.column_names)}; name who ranked each row."
        )
    own = [str(row) for row in range(len(dataset))]
    return list(dataset["labeler"]), prompt_keys(dataset["prompt"]) if "prompt" in dataset.column_names else own


def _split(
    labelers: Sequence[str], prompts: Sequence[str], out: set[str], held_in: float, rng: random.Random
) -> dict[str, list[int]]:
    """Row numbers of `train`, `held_in`, `held_out`, and `overlap`: held-out labelers on prompts trained on.

    No prompt of an evaluation set is in the fold's training set, whoever labeled it.
    """
    seen = sorted({prompt for prompt, name in zip(prompts, labelers, strict=True) if name not in out})
    kept = rng.sample(seen, min(len(seen) - 1, max(1, round(held_in * len(seen))))) if len(seen) > 1 else []
    trained = set(seen) - set(kept)
    parts: dict[str, list[int]] = {"train": [], "held_in": [], "held_out": [], "overlap": []}
    for row, (prompt, name) in enumerate(zip(prompts, labelers, strict=True)):
        own, other = ("overlap", "held_out") if name in out else ("train", "held_in")
        parts[own if prompt in trained else other].append(row)
    return parts
