"""Pretraining text among the demonstrations: the paper's model that RL starts from has 10 % of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from datasets import Dataset, concatenate_datasets

from instruct_trl.data.checks import check_pretraining_row, check_rows
from instruct_trl.data.pairs import encode_text


def check_pretraining_mix(fraction: float, pretraining_dataset: Any, train_dataset: Any, packing: bool) -> None:
    """Refuse settings under which `fraction` could not be what is trained on.

    Raises:
        ValueError: fraction outside [0, 1), without data, with data but 0, with packing, or with streamed data.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"pretraining_fraction must be in [0, 1), got {fraction}; the paper's RL initialisation: 0.1.")
    if fraction == 0:
        if pretraining_dataset is not None:
            raise ValueError(
                "pretraining_dataset was given, but pretraining_fraction is 0, so none of it would be used. Set "
                "pretraining_fraction (0.1 in the paper's RL initialisation) or leave the dataset out."
            )
        return
    if pretraining_dataset is None:
        raise ValueError(
            f"pretraining_fraction is {fraction}, but there is no pretraining_dataset. Pass one with a `text` or an "
            "`input_ids` column, or set pretraining_fraction to 0."
        )
    for name, dataset in (("pretraining_dataset", pretraining_dataset), ("train_dataset", train_dataset)):
        if not isinstance(dataset, Dataset):
            raise ValueError(
                f"pretraining_fraction needs to count rows: {name} must be a `datasets.Dataset`, got "
                f"{type(dataset).__name__}."
            )
    if packing:
        raise ValueError("pretraining_fraction counts examples, and packing merges them: set packing to false.")


def tokenize_pretraining(dataset: Dataset, tokenizer: Any) -> Dataset:
    """The rows as `input_ids` and `labels`, every token scored.

    A text is taken as it is, without EOS: a passage cut from a longer document does not end there.

    Raises:
        ValueError: no rows; neither column; a text or a list of ids that is missing, or too short to hold a next token.
    """
    columns = dataset.column_names
    if len(dataset) == 0:
        raise ValueError("pretraining_dataset has no rows.")
    if "input_ids" not in columns and "text" not in columns:
        raise ValueError(
            f"pretraining_dataset needs a `text` or an `input_ids` column; it has {columns}. Rename one of them."
        )
    check_rows(dataset, check_pretraining_row)
    encode: Callable[[dict[str, Any]], list[int]] = (
        (lambda row: list(row["input_ids"]))
        if "input_ids" in columns
        else (lambda row: encode_text(tokenizer, row["text"]))
    )

    def to_example(row: dict[str, Any], index: int) -> dict[str, list[int]]:
        ids = encode(row)
        if len(ids) < 2:
            raise ValueError(
                f"pretraining_dataset: row {index} has {len(ids)} tokens, so there is no next token to predict. "
                "Filter empty texts out."
            )
        return {"input_ids": ids, "labels": ids}

    rows = [to_example(row, index) for index, row in enumerate(dataset)]
    return Dataset.from_list(rows)


def pretraining_count(demonstrations: int, fraction: float) -> int:
    """How many pretraining examples make up `fraction` of the whole: M with M / (N + M) nearest to it."""
    return round(fraction * demonstrations / (1 - fraction))


def mix_pretraining(demonstrations: Dataset, pretraining: Dataset, fraction: float, seed: int) -> Dataset:
    """Tokenised demonstrations and as many pretraining rows as make up `fraction` of the result, in random order.

    Pretraining rows are drawn without repetition until all have been used, then again.

    Args:
        demonstrations: with `input_ids` and `labels`.
        pretraining: the same, from `tokenize_pretraining`.
        fraction: of all rows, in (0, 1).
        seed: of the choice and the order.

    Raises:
        ValueError: so few demonstrations that the fraction comes to no row at all.
    """
    needed = pretraining_count(len(demonstrations), fraction)
    if needed == 0:
        raise ValueError(
            f"pretraining_fraction {fraction} of {len(demonstrations)} demonstrations is less than one example. Raise "
            "it, or set it to 0."
        )
    rng = random.Random(seed)
    picked: list[int] = []
    while len(picked) < needed:
        order = list(range(len(pretraining)))
        rng.shuffle(order)
        picked += order[: needed - len(picked)]
    columns = ["input_ids", "labels"]
    drawn = pretraining.select(picked).select_columns(columns).cast(demonstrations.select_columns(columns).features)
    return concatenate_datasets([demonstrations.select_columns(columns), drawn]).shuffle(seed=seed)
