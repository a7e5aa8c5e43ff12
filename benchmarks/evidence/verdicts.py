"""When a claim holds: the rules, and the intervals they look at.

Legend: S seeds, N prompts.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Verdict = Literal["holds", "does not", "cannot tell"]


@dataclass(frozen=True)
class Finding:
    """What came out for one claim.

    Attributes:
        claim: its number; `text.CLAIM_TEXTS` has what it says, what the paper has, and the rule.
        measured: ours in words, with 95 % intervals.
        verdict: by the rule.
        seeds: how many.
        details: the numbers behind it, for the pictures.
    """

    claim: int
    measured: str
    verdict: Verdict
    seeds: int
    details: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float

    def apart(self, other: Interval) -> bool:
        return self.low > other.high or self.high < other.low

    def percent(self) -> str:
        if self.low == float("-inf"):
            return f"{100 * self.mean:.0f} %"
        return f"{100 * self.mean:.0f} % ({100 * self.low:.0f} to {100 * self.high:.0f})".replace("-", "−")

    def number(self, digits: int = 2) -> str:
        mean, low, high = (f"{value:.{digits}f}".replace("-", "−") for value in (self.mean, self.low, self.high))
        return f"{mean} ({low} to {high})" if self.low > float("-inf") else mean


def over_seeds(values: Sequence[float]) -> Interval:
    """Mean of S values, one a seed, with Student's t interval; with one seed it has no width to tell."""
    from scipy import stats

    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, float("-inf"), float("inf"))
    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return Interval(mean, mean - half, mean + half)


def pooled_win_rate(scores: Sequence[Sequence[float]], baseline: Sequence[Sequence[float]]) -> Interval:
    """Win rate of S models against S baselines on the same N prompts, ties half; bootstrap over prompts.

    A prompt's S wins are averaged first: they are not independent. The interval is for these S seeds: how far another
    seed may be, the values by seed tell.
    """
    per_prompt = [
        statistics.fmean(won(s[n], b[n]) for s, b in zip(scores, baseline, strict=True)) for n in range(len(scores[0]))
    ]
    return over_prompts(per_prompt)


def pooled_difference(scores: Sequence[Sequence[float]], baseline: Sequence[Sequence[float]]) -> Interval:
    """Mean of scores − baseline over S seeds and N prompts, paired; bootstrap over prompts, as `pooled_win_rate`."""
    return over_prompts(
        [statistics.fmean(s[n] - b[n] for s, b in zip(scores, baseline, strict=True)) for n in range(len(scores[0]))]
    )


def excess_gain(
    mixed: Sequence[Sequence[float]], plain: Sequence[Sequence[float]], start: Sequence[Sequence[float]], share: float
) -> Interval:
    """Gain of `mixed` over `start`, minus this share of `plain`'s gain: S seeds, N prompts, paired."""
    bar = [[s + share * (p - s) for p, s in zip(*rows, strict=True)] for rows in zip(plain, start, strict=True)]
    return pooled_difference(mixed, bar)


def over_prompts(values: Sequence[float]) -> Interval:
    """Mean of N values, one a prompt, with the bootstrap's interval."""
    from instruct_trl.evaluation.estimates import bootstrap_interval

    ci = bootstrap_interval(values)
    return Interval(ci.mean, ci.low, ci.high)


def won(score: float, baseline: float) -> float:
    """1 for a win, 1/2 for a tie, 0 for a loss."""
    return 0.5 if score == baseline else float(score > baseline)


def in_every_seed(passed: Sequence[bool]) -> Verdict:
    """Holds where all seeds pass, does not where none does, and cannot be told where they differ."""
    if all(passed):
        return "holds"
    return "cannot tell" if any(passed) else "does not"


def of_seeds(verdicts: Sequence[Verdict]) -> Verdict:
    """Holds where it does in every seed, does not where it does in none and at least one can tell."""
    if "holds" not in verdicts and "does not" in verdicts:
        return "does not"
    return "holds" if set(verdicts) == {"holds"} else "cannot tell"


def both(first: Verdict, second: Verdict) -> Verdict:
    """Of two conditions: does not where one does not hold, holds where both do."""
    if "does not" in (first, second):
        return "does not"
    return "holds" if first == second == "holds" else "cannot tell"


def by_interval(interval: Interval, level: float) -> Verdict:
    """Holds where the interval lies above the level, does not where it lies below."""
    if interval.low > level:
        return "holds"
    return "does not" if interval.high < level else "cannot tell"


def in_order(rates: Sequence[Interval]) -> Verdict:
    """Rates that should fall from first to last, the first two with intervals apart.

    Holds where each mean is above the next and the first interval is apart from the second. Does not where some rate is
    below one that should be under it, with intervals apart. Cannot be told otherwise.
    """
    for i, upper in enumerate(rates):
        if any(lower.low > upper.high for lower in rates[i + 1 :]):
            return "does not"
    falling = all(a.mean > b.mean for a, b in zip(rates, rates[1:], strict=False))
    return "holds" if falling and rates[0].low > rates[1].high else "cannot tell"


def takes_back(start: float, plain: float, mixed: float) -> float:
    """Share of the rise of the loss from `start` to `plain` that `mixed` takes back: 1 is all of it.

    Raises:
        ValueError: the loss did not rise, so that there is nothing to take back.
    """
    if plain <= start:
        raise ValueError(f"The loss did not rise: {start} before, {plain} after.")
    return (plain - mixed) / (plain - start)
