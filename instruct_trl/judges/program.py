"""Judges that give every answer a number: a reward model, or a function of yours."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from instruct_trl.judges.base import NOT_APPLICABLE, Answer, Pair, Question, Reply, as_completion
from instruct_trl.models.reward_functions import one_number_each

ScoreFunction = Callable[..., Sequence[float | None]]


class ScoreJudge:
    """Makes a judge of a TRL reward function: the answer with the higher score is better. One order is enough.

    For a reward model, pass `RewardScorer(path)`.

    Args:
        score: called with `prompts=`, `completions=` and `truncated=`, each (N,); returns N numbers, higher is better,
            and None or NaN if it has no opinion.
        name: the judge's name in the report.
        tie_margin: scores that differ by no more than this are a tie; in the unit of the scores, at least 0.
        answers_to: a question's name → a function like `score` that answers it: 1 to 7 for a Likert question, 0 or 1
            for a flag, None if the question does not apply.

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
        self.score, self.tie_margin, self.answers_to = score, tie_margin, dict(answers_to or {})
        self.name = name or str(getattr(score, "__name__", type(score).__name__)).replace("_", " ")

    def compare(self, pairs: Sequence[Pair]) -> list[Reply]:
        """Score each answer once, however many pairs it is in."""
        sides = {repr(side): side for pair in pairs for side in (pair.answer, pair.baseline)}
        scores = dict(zip(sides, _call(self.score, list(sides.values()), self.name), strict=True))
        replies = []
        for pair in pairs:
            answer, baseline = scores[repr(pair.answer)], scores[repr(pair.baseline)]
            if answer is None or baseline is None:
                replies.append(Reply(None, "no score"))
            else:
                tie = abs(answer - baseline) <= self.tie_margin
                replies.append(Reply(0.5 if tie else float(answer > baseline)))
        return replies

    def rate(self, answers: Sequence[Answer], questions: Sequence[Question]) -> list[dict[str, Reply]]:
        """The replies of the functions in `answers_to`."""
        if missing := [question.name for question in questions if question.name not in self.answers_to]:
            raise ValueError(
                f"The judge {self.name!r} gives scores; it has no function for the question {missing[0]!r}. Pass one "
                "in answers_to, or put the question to an endpoint or to people."
            )
        replies: list[dict[str, Reply]] = [{} for _ in answers]
        for question in questions:
            low, high = (1, 7) if question.kind == "likert" else (0, 1)
            values = _call(self.answers_to[question.name], answers, f"{self.name}: {question.name}")
            for reply, value in zip(replies, values, strict=True):
                if value is None:
                    reply[question.name] = Reply(None, NOT_APPLICABLE)
                else:
                    fits = low <= value <= high
                    reply[question.name] = Reply(value) if fits else Reply(None, f"{value} is not {low} to {high}")
        return replies


def _call(function: ScoreFunction, answers: Sequence[Answer], name: str) -> list[float | None]:
    scores = function(
        prompts=[answer.prompt for answer in answers],
        completions=[as_completion(answer) for answer in answers],
        truncated=[answer.truncated for answer in answers],
    )
    values = one_number_each(scores, len(answers), f"The judge {name!r}")
    return [value if value is not None and math.isfinite(value) else None for value in values]
