"""Win rates and ratings, with intervals, from a judge's replies. Ties count half; invalid replies are left out.

Legend: N rows, each with one prompt (a prompt may have several rows).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from instruct_trl.data.encoding import prompt_keys
from instruct_trl.evaluation.estimates import Estimate, Prompts, mean_interval, rate_interval
from instruct_trl.evaluation.win_rate import WinRate, win_rate
from instruct_trl.judges.base import NOT_APPLICABLE, Answer, Judge, Pair, Prompt, Question, Reply

Truncated = Mapping[str, Sequence[bool]] | None


@dataclass(frozen=True)
class JudgedWinRate:
    """One model against the baseline by one judge.

    Attributes:
        win: over the pairs with a valid reply; None if there are none.
        invalid: the number of pairs without a valid reply.
        flipped: the number of pairs whose two orders named opposite winners; they are among the ties.
        outcomes: (N,) 1, 0.5 or 0 per row, None if invalid.
        prompts: (N,) keys of the prompts; if it is empty, every row counts as a prompt of its own.
    """

    judge: str
    model: str
    baseline: str
    win: WinRate | None
    invalid: int = 0
    flipped: int = 0
    outcomes: list[float | None] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Rating:
    """One question about one model's answers, by one judge.

    Attributes:
        mean: the mean of a Likert question (`mean_interval`), or the share of yes (`rate_interval`); None without a
            valid reply.
        n: the number of answers with a valid reply.
        not_applicable, invalid: the numbers of answers left out.
    """

    judge: str
    model: str
    question: str
    mean: float | None
    low: float | None
    high: float | None
    n: int
    not_applicable: int = 0
    invalid: int = 0


def compare_models(
    judge: Judge,
    prompts: Sequence[Prompt],
    completions: Mapping[str, Sequence[str]],
    baseline: str,
    truncated: Truncated = None,
) -> dict[str, JudgedWinRate]:
    """The win rate of each model against `baseline`. The judge is asked once, about all pairs together.

    Args:
        judge: see `Judge`.
        prompts: (N,).
        completions: model → (N,) answers, including the baseline's.
        baseline: its name in `completions`.
        truncated: model → (N,) whether the answer was cut at the length limit; for judges that score tokens.

    Raises:
        ValueError: no such baseline, or not one answer per prompt.
    """
    if baseline not in completions:
        raise ValueError(f"The baseline {baseline!r} is none of the models {list(completions)}.")
    answers = _answers(prompts, completions, truncated)
    against = answers.pop(baseline)
    replies = judge.compare([Pair(*sides) for rows in answers.values() for sides in zip(rows, against, strict=True)])
    n, keys = len(prompts), prompt_keys(prompts)
    return {
        name: tally_pairs(replies[i * n : (i + 1) * n], judge.name, name, baseline, keys)
        for i, name in enumerate(answers)
    }


def rate_models(
    judge: Judge,
    prompts: Sequence[Prompt],
    completions: Mapping[str, Sequence[str]],
    questions: Sequence[Question],
    truncated: Truncated = None,
) -> list[Rating]:
    """Ask `judge` all questions about every answer; the ratings of model by model, in the order of the questions.

    Raises:
        ValueError: the judge cannot answer one of them, or not one answer per prompt.
    """
    answers = _answers(prompts, completions, truncated)
    replies = judge.rate([answer for rows in answers.values() for answer in rows], questions)
    n, keys = len(prompts), prompt_keys(prompts)
    return [
        tally_question([row[question.name] for row in replies[i * n : (i + 1) * n]], judge.name, name, question, keys)
        for i, name in enumerate(answers)
        for question in questions
    ]


def _answers(
    prompts: Sequence[Prompt], completions: Mapping[str, Sequence[str]], truncated: Truncated
) -> dict[str, list[Answer]]:
    answers = {}
    for name, texts in completions.items():
        if len(texts) != len(prompts):
            raise ValueError(f"{name} has {len(texts)} answers to {len(prompts)} prompts; it needs one for each.")
        cut = (truncated or {}).get(name) or [False] * len(prompts)
        answers[name] = [Answer(*parts) for parts in zip(prompts, texts, cut, strict=True)]
    return answers


def tally_pairs(
    replies: Sequence[Reply], judge: str, model: str, baseline: str, prompts: Sequence[str] = ()
) -> JudgedWinRate:
    """Count (N,) replies; a value above one half is a win. `prompts` (N,) are the keys of the prompts."""
    values = [reply.value for reply in replies]
    outcomes = [None if value is None else (1 + (value > 0.5) - (value < 0.5)) / 2 for value in values]
    valid, keys = _valid(outcomes, prompts)
    win = win_rate(valid, [0.5] * len(valid), prompts=keys) if valid else None
    flipped = sum(reply.flipped for reply in replies)
    return JudgedWinRate(judge, model, baseline, win, len(outcomes) - len(valid), flipped, outcomes, list(prompts))


def tally_question(
    replies: Sequence[Reply], judge: str, model: str, question: Question, prompts: Sequence[str] = ()
) -> Rating:
    """Mean and interval of (N,) replies to one question; `prompts` (N,) are the keys of the prompts."""
    valid, keys = _valid([reply.value for reply in replies], prompts)
    unasked = sum(reply.value is None and reply.said == NOT_APPLICABLE for reply in replies)
    left_out = (unasked, len(replies) - len(valid) - unasked)
    if not valid:
        return Rating(judge, model, question.name, None, None, None, 0, *left_out)
    found = rate_interval(valid, keys) if question.kind == "flag" else mean_interval(valid, keys, scale=(1.0, 7.0))
    return Rating(judge, model, question.name, found.mean, found.low, found.high, len(valid), *left_out)


def _valid(values: Sequence[float | None], prompts: Sequence[str]) -> tuple[list[float], Prompts]:
    """The values that are not None, and the keys of their prompts if they are known."""
    kept = [(value, row) for row, value in enumerate(values) if value is not None]
    return [value for value, _ in kept], [prompts[row] for _, row in kept] if prompts else None


def win_rate_difference(first: JudgedWinRate, second: JudgedWinRate) -> Estimate:
    """One model's win rate minus another's, against the same baseline, paired over prompts (`mean_interval`).

    Both models met the same answers of the baseline, so comparing their separate intervals overstates the doubt: read
    this interval instead. Prompts without a valid reply for both are left out.

    Raises:
        ValueError: another judge or baseline, another number of prompts, fewer than two prompts left.
    """
    if (first.judge, first.baseline) != (second.judge, second.baseline):
        raise ValueError(
            f"{first.model} and {second.model} were judged by {first.judge!r} and {second.judge!r} against "
            f"{first.baseline!r} and {second.baseline!r}; compare win rates of one judge against one baseline."
        )
    if len(first.outcomes) != len(second.outcomes):
        raise ValueError(f"{len(first.outcomes)} prompts and {len(second.outcomes)}; both need the same prompts.")
    pairs = zip(first.outcomes, second.outcomes, strict=True)
    gaps, keys = _valid([None if a is None or b is None else a - b for a, b in pairs], first.prompts)
    if len(gaps) < 2:
        raise ValueError(f"A difference needs at least 2 values, got {len(gaps)}; evaluate on more prompts.")
    return mean_interval(gaps, keys, scale=(-1.0, 1.0))


def judged_row(result: JudgedWinRate) -> dict[str, Any]:
    """A win rate as a row of the report; the rate and its interval are None without a valid pair."""
    row: dict[str, Any] = {"judge": result.judge, "model": result.model, "baseline": result.baseline}
    for name in ("mean", "low", "high", "wins", "ties", "losses", "n"):
        row[name] = getattr(result.win, name, None)
    return row | {"invalid": result.invalid, "flipped": result.flipped}
