"""A labeler tried on stand-ins for answers, before hours of sampling whose result it could not judge."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from instruct_trl.evaluation.selection import Prompt, score_answers
from instruct_trl.judges import Answer, Pair, ScoreJudge
from instruct_trl.models.generation import Completion

STAND_INS = ("Yes, it is so.", "No.")  # two, so that one number for all is told from one number each


def try_labeler(labeler: Callable[..., Any], prompts: Sequence[Prompt], tokenizer: Any, name: str) -> None:
    """Call a labeler once, as it is called later, on the first prompt and two answers that stand in for sampled ones.

    Args:
        labeler: the function.
        prompts: those that are going to be answered, at least one.
        tokenizer: whose ids the labeler is given.
        name: what the user gave, 'module:function'.

    Raises:
        ValueError: it raises, or does not give one finite number for each answer.
    """
    answers = [
        Completion(text, tokenizer(text=text, add_special_tokens=False)["input_ids"], truncated=False)
        for text in STAND_INS
    ]
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
    """Says of whatever is raised inside that it came from a trial, and of whom."""
    try:
        yield
    except Exception as error:  # a user's function may raise anything
        raised = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}."
        raise ValueError(
            f"{raised} So ended a trial of {who} on the first prompt and two stand-ins for answers. Nothing was "
            "sampled yet: mend the function and run this again."
        ) from error
