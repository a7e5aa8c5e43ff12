"""Users' reward functions inside PPO: what they give back is checked before anything is made of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from instruct_trl._upstream import get_callable_name, is_async_callable
from instruct_trl.evaluation.score_values import one_number_each


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
