"""A function of the user's, named as 'module:function'."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any


def names_a_function(name: str) -> bool:
    """Whether `name` has the form module:function."""
    module, _, function = name.partition(":")
    return function.isidentifier() and all(part.isidentifier() for part in module.split("."))


def load_function(name: str, option: str) -> Callable[..., Any]:
    """The function that `name` ('module:function') names, of a module beside the user's data or an installed one.

    Args:
        name: what the user gave.
        option: the setting that it was given for.

    Raises:
        ValueError: another form; a module that is missing or fails while it is imported, with its own error; nothing
            of that name in it; something that cannot be called, or an async function.
    """
    from trl.trainer.utils import is_async_callable

    given = f"--{option} {name}"
    if not names_a_function(name):
        raise ValueError(f"{given}: no such function. Name one as 'module:function', without .py.")
    module, _, function = name.partition(":")
    found = getattr(_imported(module, given), function, None)
    if found is None:
        close = get_close_matches(function, dir(sys.modules[module]), n=1)
        hint = f" Did you mean {module}:{close[0]}?" if close else ""
        raise ValueError(f"{given}: no such function; the module {module!r} has no {function!r}.{hint}")
    if not callable(found):
        raise ValueError(f"{given}: {function!r} is {found!r:.80} ({type(found).__name__}), not a function.")
    if is_async_callable(found):
        raise ValueError(f"{given} is async; a labeler is an ordinary function. Wrap it with asyncio.run.")
    return found


def _imported(module: str, given: str) -> Any:
    if str(Path.cwd()) not in sys.path:  # a module beside the user's data, as TRL's scripts allow for reward functions
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            raise ValueError(
                f"{given}: no such function; there is no module {module!r} ({error}). Start the recipe in the folder "
                "that holds it, or install it."
            ) from error
        raise ValueError(_broken(module, given, error)) from error
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        raise ValueError(_broken(module, given, error)) from error


def _broken(module: str, given: str, error: BaseException) -> str:
    return (
        f"{given}: the module {module!r} cannot be imported ({type(error).__name__}: {error}). Try "
        f"`python -c 'import {module}'`, and mend what it says."
    )
