"""Reward functions and labelers of users: each gives one number per answer, or an error names the function."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Set
from decimal import Decimal
from numbers import Real
from typing import Any

from instruct_trl._upstream import get_callable_name, is_async_callable


def one_number_each(scores: Any, count: int, name: str) -> list[float | None]:
    """The scores of `count` answers as floats, in their order; None stays None, NaN and infinity stay as they are.

    `scores` is a list, tuple, NumPy array, tensor or anything else that holds numbers, (count,); a bool is 1 or 0.
    Raises ValueError, which begins with the `name` of who gave them ("The labeler"), for anything else.
    """
    remedy = "it must give a list (or an array of one dimension) with one number for each answer."
    values = scores.tolist() if hasattr(scores, "tolist") else scores
    if isinstance(values, (str, bytes, Mapping, Set)) or not isinstance(values, Iterable):
        shown = "None" if values is None else f"{values!r:.80} ({type(scores).__name__})"
        raise ValueError(f"{name} gave {shown} for {count} answers; {remedy}")
    values = list(values)
    if len(values) != count:
        raise ValueError(f"{name} gave {len(values)} scores for {count} answers; {remedy}")
    for row, value in enumerate(values):
        if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
            values[row] = value = value.item()
        if value is not None and not isinstance(value, (Real, Decimal)):
            what = f"{value!r:.80} ({type(value).__name__}) for answer {row}"
            raise ValueError(f"{name} gave {what}, among {count} scores for {count} answers; {remedy}")
    return [None if value is None else float(value) for value in values]


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` (prompts, completions, ...), its result through `one_number_each`; its name kept, async if it was."""
    name = get_callable_name(function)
    title = f"The reward function {name!r}"

    if is_async_callable(function):

        async def score(prompts: Any, completions: Any, **kwargs: Any) -> list[float | None]:
            scores = await function(prompts=prompts, completions=completions, **kwargs)
            return one_number_each(scores, len(prompts), title)

    else:

        def score(prompts: Any, completions: Any, **kwargs: Any) -> list[float | None]:  # type: ignore[misc]
            return one_number_each(function(prompts=prompts, completions=completions, **kwargs), len(prompts), title)

    functools.update_wrapper(score, function)
    score.__name__ = name
    return score
