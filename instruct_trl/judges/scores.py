"""Judges that give every answer a number: a reward model, or a labeler that is a program."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from instruct_trl.judges.base import Answer, Pair, Question, Reply, as_completion
from instruct_trl.models.reward_functions import one_number_each

ScoreFunction = Callable[..., Sequence[float | None]]


class ScoreJudge:
    """A TRL reward function as a judge: the answer with the higher score is better. It needs no two orders.

    For a reward model give `RewardScorer(path)`, for a labeler program the function itself.

    Args:
        score: called with `prompts=`, `completions=` and `truncated=` (one bool an answer); returns one number each,
            higher is better; None or NaN where it has no opinion.
        name: how the report calls it.
        tie_margin: scores that differ by no more than this are a tie; in the unit of the scores, ≥ 0.
        answers_to: for the questions that a program can answer, name → a function of the same form; it returns 1 to 7
            for a Likert question, 0 or 1 for a flag, None where the question does not apply.

    Raises:
        ValueError: a negative margin.
    """

    def __init__(
        self,
        score: ScoreFunction,
        name: str = "",
        *,
        tie_margin: float = 0.0,
        answers_to: Mapping[str, ScoreFunction] | None = None,
    ):
        if not tie_margin >= 0:
            raise ValueError(f"tie_margin must be 0 or more, got {tie_margin}.")
        self.score, self.tie_margin = score, tie_margin
        self.answers_to = dict(answers_to or {})
        self._name = name or str(getattr(score, "__name__", type(score).__name__)).replace("_", " ")

    @property
    def name(self) -> str:
        return self._name

    def compare(self, pairs: Sequence[Pair]) -> list[Reply]:
        """Each answer is scored once, however many pairs it is in."""
        sides = {_key(side): side for pair in pairs for side in (pair.answer, pair.baseline)}
        scores = dict(zip(sides, _call(self.score, list(sides.values()), self.name), strict=True))
        return [self._reply(scores[_key(pair.answer)], scores[_key(pair.baseline)]) for pair in pairs]

    def _reply(self, answer: float | None, baseline: float | None) -> Reply:
        if answer is None or baseline is None:
            return Reply(None, "no score")
        difference = answer - baseline
        if abs(difference) <= self.tie_margin:
            return Reply(0.5)
        return Reply(1.0 if difference > 0 else 0.0)

    def rate(self, answers: Sequence[Answer], questions: Sequence[Question]) -> list[dict[str, Reply]]:
        missing = [question.name for question in questions if question.name not in self.answers_to]
        if missing:
            raise ValueError(
                f"The judge {self.name!r} gives scores; it has no function for the question {missing[0]!r}. Pass one "
                "in answers_to, or put the question to an endpoint or to people."
            )
        replies: list[dict[str, Reply]] = [{} for _ in answers]
        for question in questions:
            values = _call(self.answers_to[question.name], answers, f"{self.name}: {question.name}")
            for reply, value in zip(replies, values, strict=True):
                reply[question.name] = _rating(question, value)
        return replies


def _key(answer: Answer) -> str:
    """What makes two answers the same to a scorer; messages are not hashable."""
    return repr((answer.prompt, answer.text, answer.truncated))


def _call(function: ScoreFunction, answers: Sequence[Answer], name: str) -> list[float | None]:
    columns: dict[str, list[Any]] = {
        "prompts": [answer.prompt for answer in answers],
        "completions": [as_completion(answer) for answer in answers],
        "truncated": [answer.truncated for answer in answers],
    }
    values = one_number_each(function(**columns), len(answers), f"The judge {name!r}")
    return [value if value is not None and math.isfinite(value) else None for value in values]


def _rating(question: Question, value: float | None) -> Reply:
    low, high = (1, 7) if question.kind == "likert" else (0, 1)
    if value is None:
        return Reply(None, "n/a")
    if not low <= value <= high:
        return Reply(None, f"{value} is not between {low} and {high}")
    return Reply(value)
