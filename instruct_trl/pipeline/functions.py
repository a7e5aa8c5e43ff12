"""Functions of the user's, named as 'module:function': labelers, judges, and the step that prepares a run's data."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from instruct_trl.evaluation.selection import Prompt, score_answers
from instruct_trl.judges import Answer, Pair, ScoreJudge
from instruct_trl.models.generation import Completion
from instruct_trl.pipeline.arguments import RunArguments, read_yaml
from instruct_trl.pipeline.stage import run_stage

STAND_INS = ("Yes, it is so.", "No.")  # two, so that one number for all is told from one number each


def names_a_function(name: str) -> bool:
    """Whether `name` has the form module:function."""
    module, _, function = name.partition(":")
    return function.isidentifier() and all(part.isidentifier() for part in module.split("."))


def load_function(name: str, option: str) -> Callable[..., Any]:
    """Import the function 'module:function', from a module in the working folder or an installed one.

    Args:
        name: as the user gave it.
        option: the setting that it was given for.

    Raises:
        ValueError: another form; the module is missing or fails while it is imported; it has nothing of that name, or
            something that cannot be called, or an async function.
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
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{module}.".startswith(f"{missing}."):
            raise ValueError(
                f"{given}: no such function; there is no module {module!r} ({error}). Start the recipe in the folder "
                "that holds it, or install it."
            ) from error
        raise ValueError(
            f"{given}: the module {module!r} cannot be imported ({type(error).__name__}: {error}). Try "
            f"`python -c 'import {module}'`, and mend the error that it shows."
        ) from error


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(function).parameters)
    except (ValueError, TypeError):  # some builtins have none
        return {}


def load_labeler(name: str | None, run: RunArguments) -> Callable[..., Any]:
    """The labeler of a run. One that takes `run_dir` gets the run's folder.

    Raises:
        ValueError: none is named, or whatever `load_function` finds.
    """
    if name is None:
        raise ValueError("There is no labeler. Name yours: --labeler module:function.")
    function = load_function(name, "labeler")
    return partial(function, run_dir=run.run_dir) if "run_dir" in _parameters(function) else function


def prepare_data(run: RunArguments) -> None:
    """Call the run's preparing step, once: `function(<run_dir>/data, **settings of data.yaml)`.

    It writes its data into that folder and may return a summary, a dict.

    Raises:
        ValueError: no such function, or data.yaml beside the config has a setting that it does not take.
    """
    if not run.prepare:
        return
    function = load_function(run.prepare, "prepare")
    parameters = _parameters(function)
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    settings = read_yaml(run.config_folder / "data.yaml", None if takes_all else [*parameters][1:])
    folder, shown = run.run / "data", {"prepare": run.prepare, **settings}
    run_stage(folder, "Data", shown, lambda _: function(folder, **settings) or {}, resume=False, announce_skip=False)


def try_labeler(labeler: Callable[..., Any], prompts: Sequence[Prompt], tokenizer: Any, name: str) -> None:
    """Call a labeler on stand-ins for answers, before hours of sampling whose result it could not judge.

    Args:
        labeler: the function.
        prompts: those that are going to be answered, at least one.
        tokenizer: whose ids the labeler is given.
        name: as the user gave it, 'module:function'.

    Raises:
        ValueError: it raises, or does not give one finite number for each answer.
    """
    ids = [tokenizer(text=text, add_special_tokens=False)["input_ids"] for text in STAND_INS]
    answers = [Completion(text, row, truncated=False) for text, row in zip(STAND_INS, ids, strict=True)]
    with _trial(f"the labeler {name!r}"):
        score_answers(labeler, [prompts[0]] * len(answers), answers, "The labeler")


def try_judges(judges: Sequence[ScoreJudge], prompts: Sequence[Prompt]) -> None:
    """The same for judges that are functions; they may have no opinion.

    Raises:
        ValueError: one raises, or does not give a number or None for each answer.
    """
    first, second = (Answer(prompts[0], text) for text in STAND_INS)
    for judge in judges:
        with _trial(f"the judge {judge.name!r}"):
            judge.compare([Pair(first, second)])


@contextmanager
def _trial(who: str) -> Iterator[None]:
    """Add to an error that it came from a trial, and of whom."""
    try:
        yield
    except Exception as error:  # a user's function may raise anything
        raised = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}."
        raise ValueError(
            f"{raised} So ended a trial of {who} on the first prompt and two stand-ins for answers. Nothing was "
            "sampled yet: mend the function and run this again."
        ) from error
