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
from instruct_trl.pipeline.stage import finished_summary, run_stage

STAND_INS = ("Yes, it is so.", "No.")  # two: one number for all answers then differs from one number each


def names_a_function(name: str) -> bool:
    """Whether `name` has the form module:function."""
    module, _, function = name.partition(":")
    return function.isidentifier() and all(part.isidentifier() for part in module.split("."))


def load_function(name: str, option: str) -> Callable[..., Any]:
    """Import the function `name`, 'module:function', from the working folder or an installed module.

    `option` is the setting that names it.
    """
    from trl.trainer.utils import is_async_callable

    given = f"--{option} {name}"
    if not names_a_function(name):
        raise ValueError(f"{given}: not of the form 'module:function', without .py.")
    module, _, function = name.partition(":")
    if str(Path.cwd()) not in sys.path:  # a module beside the user's data, as TRL's scripts allow for reward functions
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), function, None)
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        fault = f"the module {module!r} cannot be imported ({type(error).__name__}: {error}). Fix this error."
        if missing is not None and f"{module}.".startswith(f"{missing}."):
            fault = (
                f"no such function; there is no module {module!r}. Install it, or start in the folder that holds it."
            )
        raise ValueError(f"{given}: {fault}") from error
    if found is None:
        close = get_close_matches(function, dir(sys.modules[module]), n=1)
        hint = f" Did you mean {module}:{close[0]}?" if close else ""
        raise ValueError(f"{given}: no such function; the module {module!r} has no {function!r}.{hint}")
    if not callable(found):
        raise ValueError(f"{given}: {function!r} is {found!r:.80} ({type(found).__name__}), not a function.")
    if is_async_callable(found):
        raise ValueError(f"{given} is async; a labeler is an ordinary function. Wrap it with asyncio.run.")
    return found


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(function).parameters)
    except (ValueError, TypeError):  # some builtins have none
        return {}


def load_labeler(name: str | None, run: RunArguments) -> Callable[..., Any]:
    """The labeler of a run. One that takes `run_dir` gets the run's folder."""
    if name is None:
        raise ValueError("No labeler is given. Set --labeler module:function.")
    function = load_function(name, "labeler")
    return partial(function, run_dir=run.run_dir) if "run_dir" in _parameters(function) else function


def prepare_data(run: RunArguments) -> None:
    """Call the run's preparing step, once: `function(<run_dir>/data, **settings of data.yaml)`.

    It writes its data into that folder and may return a summary, a dict. One that takes `seed` gets that of the run.
    """
    if not run.prepare:
        return
    folder, function = run.run / "data", load_function(run.prepare, "prepare")
    parameters = _parameters(function)
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    settings = read_yaml(run.config_folder / "data.yaml", None if takes_all else [*parameters][1:])
    if "seed" in parameters:
        made = finished_summary(folder)  # data that are there stay as they are, whatever seed a later stage gets
        seed = made["settings"].get("seed") if made else run.given_seed
        settings |= {} if seed is None else {"seed": seed}
    shown = {"prepare": run.prepare, **settings}
    run_stage(folder, "Data", shown, lambda _: function(folder, **settings) or {}, resume=False, announce_skip=False)


def try_labeler(labeler: Callable[..., Any], prompts: Sequence[Prompt], tokenizer: Any, name: str) -> None:
    """Call a labeler on stand-ins for answers to the first prompt, before hours of sampling that it could not judge."""
    ids = [tokenizer(text=text, add_special_tokens=False)["input_ids"] for text in STAND_INS]
    answers = [Completion(text, row, truncated=False) for text, row in zip(STAND_INS, ids, strict=True)]
    with _trial(f"the labeler {name!r}"):
        score_answers(labeler, [prompts[0]] * len(answers), answers, "The labeler")


def try_judges(judges: Sequence[ScoreJudge], prompts: Sequence[Prompt]) -> None:
    """The same for judges that are functions; they may have no opinion."""
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
            f"{raised} This came from a trial of {who} on the first prompt and two stand-in answers. Nothing was "
            "sampled yet: fix the function and run this again."
        ) from error
