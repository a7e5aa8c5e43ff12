"""Checks that any dataset of ours goes through before training starts."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any


def column_names(dataset: Any) -> list[str]:
    """The columns of a Dataset or IterableDataset; of a stream that does not know them, those of its first row."""
    return list(dataset.column_names or next(iter(dataset), {}))


def require_columns(dataset: Any, names: Sequence[str | tuple[str, ...]], where: str) -> None:
    """Refuse a dataset that lacks a column, and point at the one that was probably meant.

    Args:
        dataset: a Dataset or IterableDataset.
        names: required columns; a tuple stands for alternatives, of which exactly one must be there.
        where: how to call the dataset in the message, e.g. "the train dataset".

    Raises:
        ValueError: a column is missing, or two alternatives are both there.
    """
    present = column_names(dataset)
    for name in names:
        alternatives = (name,) if isinstance(name, str) else name
        found = [column for column in alternatives if column in present]
        if len(found) > 1:
            raise ValueError(f"{where} has the columns {_quoted(found)}, which mean the same. Remove all but one.")
        if not found:
            raise ValueError(
                f"{where} has no column {_quoted(alternatives, ' or ')}; it has {_quoted(present)}."
                f"{_suggestion(alternatives, present, names)}"
            )


def _suggestion(wanted: Sequence[str], present: list[str], names: Sequence[str | tuple[str, ...]]) -> str:
    """A sentence that names the column to rename, among those not needed under their own name; or what to add."""
    needed = {column for name in names for column in ((name,) if isinstance(name, str) else name)}
    spare = {column.lower(): column for column in present if column not in needed}
    for column in wanted:
        close = get_close_matches(column.lower(), list(spare), n=1)
        if close:
            meant = spare[close[0]]
            return f" Did you mean {meant!r}? Rename it: dataset.rename_column({meant!r}, {column!r})."
    return f" Add {_quoted(wanted, ' or ')} or rename the column that holds it."


def _quoted(names: Sequence[str], joint: str = ", ") -> str:
    return joint.join(repr(name) for name in names)
