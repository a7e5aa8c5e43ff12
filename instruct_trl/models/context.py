"""How many tokens a model reads at once, and what does not fit.

Beyond its context a model with learned positions (GPT-2, OPT) has no position to look up and fails deep inside torch;
one with rotary positions leaves the range that it was trained on. The rule is the same for both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset

NAMES = ("max_position_embeddings", "n_positions", "max_seq_len")  # the last is MPT's and DBRX's


def context_length(model: Any) -> int | None:
    """Tokens that `model` (or the model of this config) reads at once; None where its config names no limit."""
    config = getattr(model, "config", model)
    config = config.get_text_config()
    length = next((value for value in (getattr(config, name, None) for name in NAMES) if value), None)
    if length is None or length < 1:  # XLNet's is -1: no limit
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "yarn":  # some configs name the length before stretching
        length = max(length, int(rope["original_max_position_embeddings"] * rope.get("factor", 1)))
    return int(length)


def describe(model: Any, role: str) -> str:
    """How errors name a model: `role`, class, or path."""
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    return f"{role} ({name})"


def refuse_long_row(tokens: int, what: str, model: Any, role: str, remedy: str) -> None:
    """Refuse a row of `tokens` tokens that is longer than the context of `model`.

    Args:
        what: names the row, e.g. "Row 3 of the train dataset".
        role: names the model, e.g. "the reward model".
        remedy: what to do, a sentence that may hold `{context}`.

    Raises:
        ValueError: it is longer.
    """
    context = context_length(model)
    if context is not None and tokens > context:
        raise ValueError(
            f"{what} has {tokens} tokens, but {describe(model, role)} reads at most {context} at once (its context). "
            f"{remedy.format(context=context)}"
        )


def check_rows_fit(dataset: Any, name: str, model: Any, role: str, remedy: str) -> Any:
    """Refuse a tokenised dataset (`input_ids`: a row's tokens, or a list for each completion) that does not fit.

    Args:
        dataset: a Dataset, a stream, a mapping of them by name, or None. Others come back as they are.
        name: of the dataset, e.g. "the train dataset".
        model, role, remedy: as in `refuse_long_row`.

    Returns:
        The dataset; a stream checks each row as it flows.

    Raises:
        ValueError: a row is longer than the context of `model`: its number, its tokens, and how many are.
    """
    if isinstance(dataset, Mapping):
        return {key: check_rows_fit(part, f"{name}[{key}]", model, role, remedy) for key, part in dataset.items()}
    context = context_length(model)
    if context is None:
        return dataset
    if isinstance(dataset, IterableDataset):

        def fits(row: Mapping[str, Any], index: int) -> bool:
            if "input_ids" in row:
                refuse_long_row(max(_lengths(row), default=0), f"Row {index} of {name}", model, role, remedy)
            return True

        return dataset.filter(fits, with_indices=True)
    if not isinstance(dataset, Dataset) or "input_ids" not in dataset.column_names:
        return dataset
    longest = [max(_lengths(row), default=0) for row in _rows(dataset)]
    over = [index for index, tokens in enumerate(longest) if tokens > context]
    if over:
        what = f"Row {over[0]} of {name} (one of {len(over)} that do not fit, of {len(longest)})"
        refuse_long_row(longest[over[0]], what, model, role, remedy)
    return dataset


def _rows(dataset: Dataset) -> Iterator[Mapping[str, Any]]:
    names = [name for name in ("input_ids", "seq_lengths") if name in dataset.column_names]
    return iter(dataset.select_columns(names).with_format("numpy"))


def _lengths(row: Mapping[str, Any]) -> Iterable[int]:
    """Of a packed row the lengths of its parts, each of which starts at position 0; else of its lists, or its own."""
    if row.get("seq_lengths") is not None:
        return row["seq_lengths"]
    ids = row["input_ids"]
    return [len(part) for part in ids] if len(ids) and np.ndim(ids[0]) else [len(ids)]
