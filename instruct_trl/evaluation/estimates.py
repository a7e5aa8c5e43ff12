"""95 % intervals of means and rates, over prompts and never over rows.

Rows of one prompt go together: the pairs of its answers, the verdicts of several labelers, its repetitions in a test
set. An interval that counts them as independent is too narrow: with 36 pairs per prompt it can be a third of its true
width. So each function takes the `prompts` that the rows belong to (`data.encoding.prompt_keys`), sums up the rows of
a prompt, and asks how another draw of prompts would come out. Without `prompts` each row has its own.

Legend: P rows, G different prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

# With fewer prompts, resampling them says little about how another draw of prompts would come out.
MIN_PROMPTS = 10
# Two prompts show one difference; an interval of a mean from it would say next to nothing.
MIN_PROMPTS_OF_T = 3

# Bounds the memory of one batch of bootstrap draws: 8 bytes each, so 8 MB.
_DRAWS_PER_BATCH = 1_000_000

Numbers = Sequence[float] | np.ndarray
Prompts = Sequence[Hashable] | np.ndarray | None
Side = Literal["above", "below", "unclear"]


@dataclass(frozen=True)
class Estimate:
    """A mean, a rate or a correlation with its 95 % interval. This is the one shape of such a number, in every file.

    `dataclasses.asdict` gives the JSON: {"mean": 0.61, "low": 0.55, "high": 0.67, "n": 96}. `n` counts different
    prompts (items of a task, folds of a cross validation); `low` and `high` are null if n is too small for them.
    Subclasses add keys beside these four: `WinRate`, `PairAccuracy`, `TaskScore`, `Difference` of two checkpoints.
    """

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def bounds(self) -> tuple[float, float] | None:
        """(low, high), or None."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    def side_of(self, value: float) -> Side:
        """Whether the whole interval lies above `value` or below it; "unclear" on both sides, or without one."""
        if self.low is not None and self.low > value:
            return "above"
        return "below" if self.high is not None and self.high < value else "unclear"


def finite(values: Numbers, name: str) -> np.ndarray:
    """`values` as float64; errors call them `name`.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} must be a list with one number per prompt and at least one prompt.")
    if (bad := np.flatnonzero(~np.isfinite(array))).size:
        raise ValueError(
            f"{name}[{bad[0]}] is {array[bad[0]]}; every score must be finite. Look at that prompt's answer."
        )
    return array


def sums_by_prompt(values: Numbers, prompts: Prompts = None) -> tuple[np.ndarray, np.ndarray]:
    """Sum of `values` (P,) and number of rows of each prompt, both (G,).

    Raises:
        ValueError: no rows, a value that is not finite, or not one prompt for each row.
    """
    array = finite(values, "values")
    if prompts is None:
        return array, np.ones(len(array))
    if len(prompts) != len(array):
        raise ValueError(f"Each of the {len(array)} values needs its prompt, got {len(prompts)} prompts.")
    number: dict[Hashable, int] = {}
    place = [number.setdefault(prompt, len(number)) for prompt in prompts]
    return np.bincount(place, weights=array), np.bincount(place).astype(float)


def standard_error(values: Numbers, prompts: Prompts = None) -> float | None:
    """Standard error of the mean of `values` (P,) over all rows, G prompts drawn anew; None for a single prompt."""
    return _ratio_error(*sums_by_prompt(values, prompts))


def _ratio_error(top: np.ndarray, bottom: np.ndarray) -> float | None:
    """Standard error of Σ top / Σ bottom (Cochran 1977, section 6.4); s/√P if each row has its own prompt."""
    n = len(top)
    if n < 2:
        return None
    left = top - top.sum() / bottom.sum() * bottom
    return float(np.sqrt(n / (n - 1) * (left * left).sum()) / bottom.sum())


def mean_interval(
    values: Numbers, prompts: Prompts = None, scale: tuple[float, float] = (-math.inf, math.inf)
) -> Estimate:
    """Mean of `values` (P,) over all rows with its 95 % interval over prompts: the one to report.

    From `MIN_PROMPTS` prompts on it is the bootstrap (`widened`), for fewer Student's t. There is none for fewer than
    `MIN_PROMPTS_OF_T` prompts, or if fewer than `MIN_PROMPTS` all say the same.

    Args:
        scale: the least and the greatest possible value; the interval ends there.
    """
    top, bottom = sums_by_prompt(values, prompts)
    n, mean = len(top), float(top.sum() / bottom.sum())
    if n >= MIN_PROMPTS:
        return bootstrap_interval(top, bottom, confidence=widened(n))
    error = _ratio_error(top, bottom)
    if n < MIN_PROMPTS_OF_T or not error or error < 1e-12 * abs(mean):
        return Estimate(mean, None, None, n)
    half = float(stats.t.ppf(0.975, n - 1)) * error
    return Estimate(mean, max(scale[0], mean - half), min(scale[1], mean + half), n)


def rate_interval(values: Numbers, prompts: Prompts = None, n_boot: int = 10_000) -> Estimate:
    """Mean of `values` (P,), each from 0 to 1, with its interval over prompts, defined for any number of prompts.

    It is Wilson's if each row has its own prompt. If prompts repeat, it is the bootstrap; with fewer than
    `MIN_PROMPTS`, Wilson's with a prompt as one trial, which is rather too wide, since a mean of trials varies less.
    """
    top, bottom = sums_by_prompt(values, prompts)
    n = len(top)
    if n >= MIN_PROMPTS and n < len(values):
        return resampled_rate(top, bottom, n_boot)
    rate = float(top.sum() / bottom.sum())
    return Estimate(rate, *wilson_interval(rate * n, n), n)


def resampled_rate(top: np.ndarray, bottom: np.ndarray, n_boot: int) -> Estimate:
    """The bootstrap over prompts of a rate, Σ top / Σ bottom, both (G,)."""
    n, rate = len(top), min(1.0, float(top.sum() / bottom.sum()))
    if (_ratio_error(top, bottom) or 0.0) < 1e-12:
        # Resampling prompts that all say the same shows no spread, which is no proof that there is none.
        return Estimate(rate, *wilson_interval(rate * n, n), n)
    return bootstrap_interval(top, bottom, n_boot=n_boot, confidence=widened(n))


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval for a proportion (Wilson 1927); stays inside 0 to 1 and works at 0 and at n successes.

    `successes` of n independent trials may be fractional, as ties count half; SciPy's `binomtest` refuses that.

    Raises:
        ValueError: n < 1, successes outside 0 to n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"successes must lie between 0 and n with n ≥ 1, got {successes} of {n}.")
    z2 = float(stats.norm.ppf(0.975)) ** 2
    rate = successes / n
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (rate * (1 - rate) / n + z2 / (4 * n**2))) / (1 + z2 / n)
    # At the ends the bound is exactly 0 or 1; rounding could leave 1e-17 outside.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def bootstrap_interval(
    numerators: Numbers,
    denominators: Numbers | None = None,
    seed: int = 0,
    n_boot: int = 10_000,
    confidence: float = 0.95,
) -> Estimate:
    """Σ numerators / Σ denominators, both (G,), with the percentile bootstrap interval (Efron 1979) over G prompts.

    For a rate over things that come in bundles, as the K(K−1)/2 pairs of a ranking do: give the pairs ordered right
    and the pairs of each prompt. Without denominators it is the mean. The same seed gives the same interval.

    Raises:
        ValueError: unequal lengths, fewer than two prompts, a number that is not finite, a denominator that is not
            positive, n_boot < 1.
    """
    top = finite(numerators, "values")
    n = len(top)
    bottom = np.ones(n) if denominators is None else finite(denominators, "denominators")
    if n != len(bottom) or bool((bottom <= 0).any()):
        raise ValueError(f"Give each of the {n} prompts one denominator above 0; leave out prompts that have none.")
    if n < 2:
        raise ValueError(f"An interval needs at least 2 values, got {n}; evaluate on more prompts.")
    if n_boot < 1 or not 0 < confidence < 1:
        raise ValueError(f"n_boot must be ≥ 1 and confidence between 0 and 1, got {n_boot} and {confidence}.")
    low, high = resample((top, bottom), lambda a, b: a / b, seed, n_boot, confidence)
    return Estimate(float(top.sum() / bottom.sum()), low, high, n)


def resample(
    columns: Sequence[np.ndarray], of_sums: Callable[..., np.ndarray], seed: int, n_boot: int, confidence: float
) -> tuple[float, float]:
    """Percentile bootstrap of a function of sums over prompts: `of_sums(Σ column, ...)` of `columns`, each (G,)."""
    found = stats.bootstrap(
        columns,
        lambda *drawn, axis: of_sums(*(column.sum(axis=axis) for column in drawn)),
        paired=True,
        n_resamples=n_boot,
        batch=max(1, _DRAWS_PER_BATCH // len(columns[0])),
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def widened(n: int) -> float:
    """Confidence level at which the percentile bootstrap over n ≥ 2 prompts covers 95 %.

    Resampled means spread by √((n−1)/n) too little, and normally instead of as Student's t; percentiles further out
    make up for both (Hesterberg 2015, section 3.3). At 40 prompts it is 0.9595, at 500 0.9508.
    """
    t = stats.t.ppf(0.975, n - 1)
    return float(1 - 2 * stats.norm.cdf(-math.sqrt(n / (n - 1)) * t))
