"""How far a reward model can be trusted, from its scores of held-out rankings: accuracy, calibration, length.

The input is `RankingRewardTrainer.evaluation_records`; `reward_pairs` says what they hold. Legend as there: N records,
K completions of a record, P compared pairs of all records. Lengths are in tokens, rates from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from instruct_trl.evaluation.estimates import (
    MIN_PROMPTS,
    bootstrap_ratio_ci,
    standard_error,
    sums_by_prompt,
    widened,
)
from instruct_trl.evaluation.reward_pairs import (
    N_BOOT,
    PairTable,
    Record,
    accuracy_by,
    first_of_prompt,
    length_quartiles,
    of_pairs,
    pair_accuracy,
    pair_table,
    rate_interval,
    require_pairs,
)

__all__ = [
    "calibration",
    "centred",
    "correlations",
    "fit_temperature",
    "length_bias",
    "pair_accuracy",
    "reward_metrics",
    "score_groups",
]


def calibration(table: PairTable, n_bins: int | None = None, n_boot: int = N_BOOT) -> dict[str, Any]:
    """Is σ(r_w − r_l) the probability that it claims to be? Reliability curve and expected calibration error.

    Each pair is taken once, with the completion that the model scores higher first: the confidence σ(|r_i − r_j|)
    lies in [0.5, 1], and the outcome is whether the labeler prefers that one too (1/2 where the rewards are equal).
    This is Guo et al. 2017, section 2, and equals taking each pair in both orientations with bins over [0, 1]. Taking
    the completion with the lower index first would not do: in `chosen`/`rejected` data the first one always wins.

    ECE = Σ_b n_b / P · |mean outcome − mean confidence| over `n_bins` bins of equal width. By default 10, and 5 for
    fewer than 500 pairs, where more bins would show noise.

    Returns:
        `ece`; `ece_by_chance`, about what a perfectly calibrated model gives on so many pairs and prompts;
        `overconfidence`, mean confidence − mean outcome; `temperature`, see `fit_temperature`; `bins`, those with
        pairs: `low`, `high` (edges), `confidence`, `accuracy`, `accuracy_low`, `accuracy_high` (or None), `n_pairs`.
    """
    require_pairs(table)
    n_bins = n_bins or (10 if len(table.prompt) >= 500 else 5)
    confidence = 1 / (1 + np.exp(-np.abs(table.difference)))
    outcome = np.where(table.difference == 0, 0.5, table.correct)
    place = np.minimum(((confidence - 0.5) * 2 * n_bins).astype(int), n_bins - 1)
    bins, used = [], sorted(set(place.tolist()))
    for b in used:
        rows = place == b
        found = rate_interval(outcome[rows], table.prompt[rows], n_boot)
        bins.append(
            {
                "low": 0.5 + b / (2 * n_bins),
                "high": 0.5 + (b + 1) / (2 * n_bins),
                "confidence": float(confidence[rows].mean()),
                "accuracy": found["accuracy"],
                "accuracy_low": found["low"],
                "accuracy_high": found["high"],
                "n_pairs": found["n_pairs"],
            }
        )
    total = len(confidence)
    errors = [_bin_error(confidence[place == b], outcome[place == b], table.prompt[place == b]) for b in used]
    # E|x| = σ √(2/π) of a normal x, which the mean of a bin's outcomes nearly is.
    chance = sum(np.sqrt(2 / np.pi) * e * b["n_pairs"] for e, b in zip(errors, bins, strict=True)) / total
    return {
        "ece": sum(b["n_pairs"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / total,
        "ece_by_chance": float(chance),
        "overconfidence": float(confidence.mean() - outcome.mean()),
        "temperature": fit_temperature(table.difference),
        "bins": bins,
    }


def _bin_error(confidence: np.ndarray, outcome: np.ndarray, prompt: np.ndarray) -> float:
    """Standard error of the mean outcome of a bin's pairs (n,) under a perfectly calibrated model.

    √(p (1 − p) / n) of independent coins; where a prompt has several of the pairs, no less than what prompts show.
    """
    p, n, prompts = confidence.mean(), len(prompt), len(np.unique(prompt))
    if prompts == 1:
        return float(np.sqrt(p * (1 - p)))
    coins = float(np.sqrt(p * (1 - p) / n))
    return coins if prompts == n else max(coins, standard_error(outcome - confidence, prompt) or 0.0)


def fit_temperature(differences: np.ndarray) -> float | None:
    """The T that minimises the mean of −log σ((r_w − r_l) / T) over (P,) pairs (Guo et al. 2017, section 4.2).

    Above 1, the model is surer than it is right; T = 1 is calibrated. None where no finite T > 0 is best: all pairs
    ordered right, or the mean difference not above 0.
    """
    if differences.min() >= 0 or differences.mean() <= 0:
        return None
    # The loss is convex in 1/T, with slope −mean(Δ σ(−Δ/T)): halve the interval in which the slope changes its sign.
    low, high = -12.0, 12.0  # of log 1/T
    for _ in range(60):
        middle = (low + high) / 2
        slope = -np.mean(differences / (1 + np.exp(np.clip(differences * np.exp(middle), -500, 500))))
        low, high = (middle, high) if slope < 0 else (low, middle)
    return float(np.exp(-low))


def correlations(x: np.ndarray, y: np.ndarray) -> dict[str, float | None]:
    """Pearson's r and Spearman's ρ (r of the ranks, ties sharing their mean rank); None where one is constant."""
    return {"pearson": _pearson(x, y), "spearman": _pearson(_mean_ranks(x), _mean_ranks(y))}


def _pearson(x: np.ndarray, y: np.ndarray) -> float | None:
    x, y = x - x.mean(), y - y.mean()
    size = np.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / size) if size > 1e-12 else None


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def centred(records: Sequence[Record], name: str) -> list[np.ndarray]:
    """Of each record, its list `name` (K,) minus the list's mean: prompts differ, and that is taken out."""
    return [np.asarray(record[name], dtype=float) - np.mean(record[name]) for record in records]


def length_bias(records: Sequence[Record], table: PairTable, n_boot: int = N_BOOT, seed: int = 0) -> dict[str, Any]:
    """Does the score go with the length of the answer, and does it know more than length does?

    Returns:
        `pearson`, `spearman` over all completions; `within_prompt`: the same of rewards and lengths centred by prompt,
        with `low` and `high` of Pearson's r (bootstrap over prompts); as `rate_interval`: `longer_is_better` and
        `shorter_is_better` (accuracy of that rule; equal lengths order no pair), `model_picks_longer` and
        `labeler_picks_longer` (of the pairs of unequal length), `if_longer_wins` and `if_shorter_wins` (the model's
        accuracy where the labeler's choice is the longer or the shorter one); `gain_over_rule`, the model's accuracy
        minus the better rule's, with `low` and `high`. What has no pairs is None.
    """
    rewards, lengths = centred(records, "rewards"), centred(records, "lengths")
    pooled = [
        np.concatenate([np.asarray(record[name], float) for record in records]) for name in ("rewards", "lengths")
    ]
    terms = [
        np.concatenate([a * b for a, b in zip(first, second, strict=True)])
        for first, second in ((rewards, lengths), (rewards, rewards), (lengths, lengths))
    ]
    owner = [prompt for prompt, row in zip(first_of_prompt(records), rewards, strict=True) for _ in row]
    sums = np.stack([sums_by_prompt(term, owner)[0] for term in terms], axis=1)
    within: dict[str, Any] = correlations(np.concatenate(rewards), np.concatenate(lengths))
    within["low"], within["high"] = _correlation_interval(sums, n_boot, seed)
    longer, shorter = table.extra_length > 0, table.extra_length < 0
    unequal = longer | shorter
    picks_longer = table.difference * table.extra_length > 0

    def rate(values: np.ndarray, rows: np.ndarray) -> dict[str, Any] | None:
        return rate_interval(values[rows], table.prompt[rows], n_boot) if rows.any() else None

    everything = np.ones_like(longer)
    rule = longer if longer.sum() >= shorter.sum() else shorter
    top, bottom = sums_by_prompt(table.correct.astype(float) - rule, table.prompt)
    gain = bootstrap_ratio_ci(top, bottom, seed, n_boot, widened(len(top))) if len(top) >= MIN_PROMPTS else None
    return {
        **correlations(*pooled),
        "within_prompt": within,
        "longer_is_better": rate(longer, everything),
        "shorter_is_better": rate(shorter, everything),
        "model_picks_longer": rate(picks_longer, unequal),
        "labeler_picks_longer": rate(longer, unequal),
        "if_longer_wins": rate(table.correct, longer),
        "if_shorter_wins": rate(table.correct, shorter),
        "gain_over_rule": {
            "gain": float(top.sum() / bottom.sum()),
            "low": gain and gain.low,
            "high": gain and gain.high,
        },
    }


def _correlation_interval(sums: np.ndarray, n_boot: int, seed: int) -> tuple[float | None, float | None]:
    """Percentile bootstrap of Σxy / √(Σx² Σy²) from each prompt's (G, 3) sums; (None, None) for too few prompts."""
    n = len(sums)
    if n < MIN_PROMPTS or not (sums.sum(0)[1:] > 1e-12).all():
        return None, None
    rng = np.random.default_rng(seed)
    drawn = np.array([sums[rng.integers(0, n, n)].sum(0) for _ in range(n_boot)])
    tail = (1 - widened(n)) / 2
    low, high = np.quantile(drawn[:, 0] / np.sqrt(drawn[:, 1] * drawn[:, 2]).clip(min=1e-12), [tail, 1 - tail])
    return float(low), float(high)


def score_groups(records: Sequence[Record]) -> dict[str, np.ndarray]:
    """Scores of all completions, of each prompt's `best` (win and never lose) and of its `worst` (lose and never win).

    Of a ranking these are its first and its last, with their ties; prompts without a pair add to `all` alone.
    """
    groups: dict[str, list[float]] = {"all": [], "best": [], "worst": []}
    for record in records:
        rewards = list(record["rewards"])
        winners, losers = ({pair[side] for pair in record["pairs"]} for side in (0, 1))
        groups["all"] += rewards
        groups["best"] += [rewards[i] for i in sorted(winners - losers)]
        groups["worst"] += [rewards[i] for i in sorted(losers - winners)]
    return {name: np.array(values, dtype=float) for name, values in groups.items()}


def reward_metrics(records: Sequence[Record], n_bins: int | None = None, n_boot: int = N_BOOT) -> dict[str, Any]:
    """Everything above, as one dict that JSON can hold; it also fits `ReportData.reward_model`.

    Returns:
        `pair_accuracy`, `low`, `high`, `n_pairs`, `n_prompts` (different ones with a pair), `n_completions`; `by_k`,
        `by_rank_distance`, `by_prompt_length`, `by_labeler` (`accuracy_by`, empty where the data lack it);
        `calibration`; `length` (None without lengths); `scores`: `mean` and `std` of all, `best_mean`, `worst_mean`.

    Raises:
        ValueError: bad records (`pair_table`), or no pair in any of them.
    """
    table = pair_table(records)
    require_pairs(table)
    overall = rate_interval(table.correct, table.prompt, n_boot)

    def by(value: Callable[[Record], Any]) -> dict[str, dict[str, Any]]:
        return accuracy_by(table, of_pairs(records, [value(record) for record in records]), n_boot)

    scores = score_groups(records)
    result = {
        "pair_accuracy": overall.pop("accuracy"),
        **overall,
        "n_completions": len(scores["all"]),
        "by_k": by(lambda record: len(record["rewards"])),
        "by_rank_distance": accuracy_by(table, [int(d) or None for d in table.distance], n_boot),
        "by_prompt_length": {},
        "by_labeler": by(lambda record: record.get("labeler")),
        "calibration": calibration(table, n_bins, n_boot),
        "length": None,
        "scores": {"mean": float(scores["all"].mean()), "std": float(scores["all"].std())},
    }
    result["scores"] |= {f"{name}_mean": float(scores[name].mean()) for name in ("best", "worst") if len(scores[name])}
    if all(record.get("prompt_length") is not None for record in records):
        compared = np.unique(table.prompt)  # quartiles of the prompts that have a pair
        names = dict(zip(compared, length_quartiles([records[i]["prompt_length"] for i in compared]), strict=True))
        found = accuracy_by(table, [names[i] for i in table.prompt], n_boot)
        result["by_prompt_length"] = {
            " to ".join(str(int(bound)) for bound in name.split(" to ")): row for name, row in found.items()
        }
    if all(len(record.get("lengths") or []) for record in records):
        result["length"] = length_bias(records, table, n_boot)
    return result
