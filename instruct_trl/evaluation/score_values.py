"""The scores of a user's function: one number for each answer, or an error that names the function."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from decimal import Decimal
from numbers import Real
from typing import Any

_REMEDY = "it must give a list (or an array of one dimension) with one number for each answer"


def one_number_each(scores: Any, count: int, name: str) -> list[float | None]:
    """The scores of `count` answers as floats, in their order; None stays None, NaN and infinity stay as they are.

    Args:
        scores: a list, tuple, NumPy array, tensor or anything else that holds `count` numbers, (count,). A bool is 1
            or 0.
        count: of the answers.
        name: who gave them, as an error begins: "The labeler".

    Raises:
        ValueError: no list, one of another length, or an entry that is no number (a text, a list).
    """
    values = scores.tolist() if hasattr(scores, "tolist") else scores
    if isinstance(values, (str, bytes, Mapping, Set)) or not isinstance(values, Iterable):
        shown = "None" if values is None else f"{values!r:.80} ({type(scores).__name__})"
        raise ValueError(f"{name} gave {shown} for {count} answers; {_REMEDY}.")
    values = list(values)
    if len(values) != count:
        raise ValueError(f"{name} gave {len(values)} scores for {count} answers; {_REMEDY}.")
    return [_number(value, row, count, name) for row, value in enumerate(values)]


def _number(value: Any, row: int, count: int, name: str) -> float | None:
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    if value is None:
        return None
    if not isinstance(value, (Real, Decimal)):
        what = f"{value!r:.80} ({type(value).__name__}) for answer {row}"
        raise ValueError(f"{name} gave {what}, among {count} scores for {count} answers; {_REMEDY}.")
    return float(value)
