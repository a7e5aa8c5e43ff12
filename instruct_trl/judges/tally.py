"""From a judge's replies to win rates, ratings and their intervals.

Ties count half (`win_rate`); pairs without a valid reply are left out and counted.

Legend: N rows, of a prompt each (a prompt may have several), M models beside the baseline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from instruct_trl.data.prompt_keys import prompt_keys
from instruct_trl.evaluation.estimates import Estimate, Prompts, mean_interval, rate_interval
from instruct_trl.evaluation.win_rate import WinRate, win_rate
from instruct_trl.judges.base import NOT_APPLICABLE, Answer, Judge, Pair, Prompt, Question, Reply

LIKERT = (1.0, 7.0)


@dataclass(frozen=True)
class JudgedWinRate:
    """One model against the baseline by one judge.

    Attributes:
        win: over the pairs with a valid reply; None where there is none.
        invalid: pairs without one.
        flipped: pairs whose two orders named opposite winners; they are among the ties.
        outcomes: (N,) 1, 0.5 or 0 for each row, None where invalid.
        prompts: (N,) the key of each row's prompt; empty where they are not known and count as different.
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
    """One question over one model's answers, by one judge.

    Attributes:
        mean: of a Likert question its mean (`mean_interval`), of a flag the share of yes (`rate_interval`); None
            where there is no valid reply.
        n: answers it is over.
        not_applicable, invalid: answers left out of it.
        values: (N,) each answer's value, None where left out.
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
    values: list[float | None] = field(default_factory=list)


def compare_models(
    judge: Judge,
    prompts: Sequence[Prompt],
    completions: Mapping[str, Sequence[str]],
    baseline: str,
    truncated: Mapping[str, Sequence[bool]] | None = None,
) -> dict[str, JudgedWinRate]:
    """The win rate of each of the M models against `baseline` by `judge`, which is asked once, for all pairs together.

    Args:
        judge: see `Judge`.
        prompts: (N,).
        completions: model → (N,) answers, the baseline's among them.
        baseline: its name in `completions`.
        truncated: model → (N,) whether the answer was cut at the length limit; for judges that score tokens.

    Raises:
        ValueError: no such baseline, or not one answer for each prompt.
    """
    answers = model_answers(prompts, completions, truncated)
    if baseline not in answers:
        raise ValueError(f"The baseline {baseline!r} is none of the models {list(completions)}.")
    models = [name for name in answers if name != baseline]
    pairs = [
        Pair(answer, base) for name in models for answer, base in zip(answers[name], answers[baseline], strict=True)
    ]
    replies = judge.compare(pairs)
    n, keys = len(prompts), prompt_keys(prompts)
    return {
        name: tally_pairs(replies[i * n : (i + 1) * n], judge.name, name, baseline, keys)
        for i, name in enumerate(models)
    }


def model_answers(
    prompts: Sequence[Prompt],
    completions: Mapping[str, Sequence[str]],
    truncated: Mapping[str, Sequence[bool]] | None = None,
) -> dict[str, list[Answer]]:
    """Model → its N answers as judges take them.

    Raises:
        ValueError: a model without one answer for each prompt.
    """
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
    """Count (N,) replies; the value of a pair is above, at or below one half. `prompts` are the keys of theirs."""
    outcomes = [None if reply.value is None else _sign(reply.value) for reply in replies]
    valid, keys = _valid(outcomes, prompts)
    return JudgedWinRate(
        judge,
        model,
        baseline,
        win_rate(valid, [0.5] * len(valid), prompts=keys) if valid else None,
        invalid=len(outcomes) - len(valid),
        flipped=sum(reply.flipped for reply in replies),
        outcomes=outcomes,
        prompts=list(prompts),
    )


def _valid(values: Sequence[float | None], prompts: Sequence[str]) -> tuple[list[float], Prompts]:
    """The values that are there, and the keys of their prompts if they are known."""
    kept = [row for row, value in enumerate(values) if value is not None]
    valid = [value for value in values if value is not None]
    return valid, [prompts[row] for row in kept] if prompts else None


def _sign(value: float) -> float:
    return 1.0 if value > 0.5 else 0.0 if value < 0.5 else 0.5


def win_rate_difference(first: JudgedWinRate, second: JudgedWinRate, seed: int = 0) -> Estimate:
    """Win rate of one model less that of another, against one baseline, paired over prompts, as `mean_interval`.

    Both met the baseline's same answers, so their separate intervals overlap more than they should: this is the
    interval to read. Prompts where either has no valid reply are left out.

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
    return mean_interval(gaps, keys, scale=(-1.0, 1.0), seed=seed)


def rate_models(
    judge: Judge,
    prompts: Sequence[Prompt],
    completions: Mapping[str, Sequence[str]],
    questions: Sequence[Question],
    truncated: Mapping[str, Sequence[bool]] | None = None,
) -> list[Rating]:
    """Put `questions` about every answer of every model to `judge`; model by model, in the order of the questions.

    Raises:
        ValueError: the judge cannot answer one of them, or not one answer for each prompt.
    """
    answers = model_answers(prompts, completions, truncated)
    replies = judge.rate([answer for rows in answers.values() for answer in rows], questions)
    n, keys = len(prompts), prompt_keys(prompts)
    return [
        tally_question([row[question.name] for row in replies[i * n : (i + 1) * n]], judge.name, name, question, keys)
        for i, name in enumerate(answers)
        for question in questions
    ]


def tally_question(
    replies: Sequence[Reply], judge: str, model: str, question: Question, prompts: Sequence[str] = ()
) -> Rating:
    """Mean and interval of (N,) replies to one question; `prompts` are the keys of theirs."""
    values = [reply.value for reply in replies]
    valid, keys = _valid(values, prompts)
    unasked = sum(reply.value is None and reply.said == NOT_APPLICABLE for reply in replies)
    found = _interval(valid, keys, question) if valid else Estimate(0.0, None, None, 0)
    return Rating(
        judge,
        model,
        question.name,
        found.mean if valid else None,
        found.low,
        found.high,
        len(valid),
        unasked,
        len(values) - len(valid) - unasked,
        values,
    )


def _interval(values: list[float], prompts: Prompts, question: Question) -> Estimate:
    if question.kind == "flag":
        return rate_interval(values, prompts)
    return mean_interval(values, prompts, scale=LIKERT)


def judged_row(result: JudgedWinRate) -> dict[str, Any]:
    """What a report keeps of a win rate: judge, model, rate and interval (None without a valid pair), counts."""
    win = result.win
    counts = {"invalid": result.invalid, "flipped": result.flipped}
    names = ("mean", "low", "high", "wins", "ties", "losses", "n")
    kept: dict[str, Any] = {name: getattr(win, name, None) for name in names}
    return {"judge": result.judge, "model": result.model, "baseline": result.baseline, **kept, **counts}


def rating_row(rating: Rating) -> dict[str, Any]:
    """What a report keeps of a rating: all but the single values."""
    return {item.name: getattr(rating, item.name) for item in fields(rating) if item.name != "values"}
