"""Bounds of a recipe's numbers, checked when its arguments are read: before anything is loaded or sampled."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

_SAMPLING: dict[str, float] = {
    "num_completions": 2,  # of one answer there is nothing to rank
    "max_completion_length": 1,
    "max_text_length": 2,  # a token and the one before it
    "batch_size": 1,
    "temperature": 0.0,
}


def check_sampling(settings: Any) -> None:
    """`require_at_least` for those settings of sampling that a recipe has.

    Raises:
        ValueError: one is out of range.
    """
    require_at_least(settings, **{name: least for name, least in _SAMPLING.items() if hasattr(settings, name)})


def require_at_least(settings: Any, **least: float) -> None:
    """Refuse settings below their least value; None, an option that is not set, is left alone.

    Args:
        settings: an argument dataclass.
        least: setting → its least value; an int asks for a whole number.

    Raises:
        ValueError: no number, not a whole one where one is asked for, NaN, infinite, or below the least.
    """
    for name, low in least.items():
        value = getattr(settings, name)
        if value is None:
            continue
        kind = Integral if isinstance(low, int) else Real
        if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value) or value < low:
            what = "a whole number" if isinstance(low, int) else "a number"
            raise ValueError(f"--{name} is {value!r}; it must be {what}, at least {low}.")
