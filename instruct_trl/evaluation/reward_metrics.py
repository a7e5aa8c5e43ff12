"""How far a reward model can be trusted, from its scores of held-out rankings: accuracy, calibration, length.

The input is `RankingRewardTrainer.evaluation_records`, one dict per row of the data: `rewards` (K floats), `pairs`
([winner, loser] indices), `ranks` (K ints, lower is better, or empty), `lengths` (K token counts), `prompt_length`,
`labeler`, `prompt_key` (records with the same one are of one prompt; a record without one has a prompt of its own).

Legend: N records, K completions of a record, P compared pairs of all records. Lengths are in tokens, rates from 0 to 1.
The pairs of one prompt are not independent, be they of one record or of several (other labelers, pairs of a ranking
given one by one), so every interval resamples prompts, never pairs or records.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy import optimize, stats

from instruct_trl.evaluation.estimates import (
    MIN_PROMPTS,
    Estimate,
    bootstrap_interval,
    mean_interval,
    resample,
    resampled_rate,
    standard_error,
    sums_by_prompt,
    widened,
)
from instruct_trl.maths.rankings import kendall_tau, ranks_apart, tied_pairs

Record = Mapping[str, Any]

N_BOOT = 2_000


@dataclass(frozen=True)
class PairAccuracy(Estimate):
    """Share of the pairs that are ordered as the labeler does; no interval with fewer than `MIN_PROMPTS` prompts."""

    n_pairs: int


@dataclass(frozen=True)
class PairTable:
    """The compared pairs of all prompts, flat.

    Attributes:
        prompt: (P,) the pair's prompt: the index of the first record that is of it.
        difference: (P,) r_w − r_l, reward of the preferred completion minus the other's.
        extra_length: (P,) length of the preferred completion minus the other's, in tokens; 0 without lengths.
        distance: (P,) how many ranks apart (`ranks_apart`, ≥ 1); 0 where the record has no ranks.
    """

    prompt: np.ndarray
    difference: np.ndarray
    extra_length: np.ndarray
    distance: np.ndarray

    @property
    def correct(self) -> np.ndarray:
        """(P,) bool: ordered as the labeler does. Two equal rewards order no pair, as in TRL's `accuracy`."""
        return self.difference > 0


def pair_table(records: Sequence[Record]) -> PairTable:
    """Check the records and lay out their pairs.

    Raises:
        ValueError: no records, a reward that is not finite, lists of unequal length, a pair that points outside, no
            pair in any record.
    """
    if not records:
        raise ValueError("There are no evaluation records; call trainer.evaluate() first.")
    rows = []
    for index, (record, prompt) in enumerate(zip(records, first_of_prompt(records), strict=True)):
        rewards, lengths, ranks = _checked(record, index)
        apart = ranks_apart(torch.as_tensor(ranks)) if len(ranks) else None
        for winner, loser in record["pairs"]:
            extra = lengths[winner] - lengths[loser] if len(lengths) else 0
            distance = int(apart[winner, loser]) if apart is not None else 0
            rows.append((prompt, rewards[winner] - rewards[loser], extra, distance))
    if not rows:
        raise ValueError("No record has a pair: all completions are tied. Evaluate on prompts with a preference.")
    columns = np.array(rows, dtype=np.float64).T
    return PairTable(columns[0].astype(int), columns[1], columns[2], columns[3].astype(int))


def first_of_prompt(records: Sequence[Record]) -> list[int]:
    """Of each of (N,) records, the index of the first one that is of the same prompt."""
    first: dict[str, int] = {}
    keys = [record.get("prompt_key") for record in records]
    return [index if key is None else first.setdefault(key, index) for index, key in enumerate(keys)]


def _checked(record: Record, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rewards, lengths and ranks of a record as arrays; the latter two may be empty."""
    rewards, lengths, ranks = (
        np.asarray(record.get(name) if record.get(name) is not None else [], dtype=np.float64)
        for name in ("rewards", "lengths", "ranks")
    )
    k = len(rewards)
    if not np.isfinite(rewards).all():
        bad = int(np.flatnonzero(~np.isfinite(rewards))[0])
        raise ValueError(
            f"records[{index}]['rewards'][{bad}] is {rewards[bad]}: the reward model is broken there. "
            "Lower the learning rate, or look at that completion."
        )
    for name, values in (("lengths", lengths), ("ranks", ranks)):
        if len(values) not in (0, k):
            raise ValueError(f"records[{index}] has {k} rewards but {len(values)} {name}; each completion needs one.")
    for pair in record["pairs"]:
        if len(pair) != 2 or not all(0 <= i < k for i in pair) or pair[0] == pair[1]:
            raise ValueError(
                f"records[{index}]['pairs'] holds {list(pair)}; a pair is [winner, loser], two different numbers from "
                f"0 to {k - 1}."
            )
    return rewards, lengths, ranks


def pair_rate(values: np.ndarray, prompt: Sequence[Any] | np.ndarray, n_boot: int = N_BOOT) -> PairAccuracy:
    """Mean over pairs of `values` (P,), 0 to 1, with its interval by resampling the prompts (P,) that they are of.

    Where all prompts agree, resampling shows no spread: then it is Wilson's, a prompt counting as one trial.
    """
    top, bottom = sums_by_prompt(values, prompt)
    if len(top) < MIN_PROMPTS:
        return PairAccuracy(float(top.sum() / bottom.sum()), None, None, len(top), len(values))
    return PairAccuracy(**asdict(resampled_rate(top, bottom, n_boot=n_boot)), n_pairs=len(values))


def pair_accuracy(records: Sequence[Record], n_boot: int = N_BOOT) -> PairAccuracy:
    """Share of all compared pairs that the rewards order as the labeler does (the paper's number, section 4.1).

    Raises:
        ValueError: bad records, or no pair in any of them (`pair_table`).
    """
    table = pair_table(records)
    return pair_rate(table.correct, table.prompt, n_boot)


def accuracy_by(table: PairTable, group: Sequence[Any], n_boot: int = N_BOOT) -> dict[str, PairAccuracy]:
    """The accuracy of each group's pairs, sorted by group; empty where there are fewer than two groups.

    Args:
        group: (P,) the group of each pair; pairs with None belong to none.
    """
    rows = {name: np.array([label == name for label in group]) for name in sorted(set(group) - {None})}
    if len(rows) < 2:
        return {}
    return {str(name): pair_rate(table.correct[own], table.prompt[own], n_boot) for name, own in rows.items()}


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
        pairs: `low`, `high` (edges), `confidence`, `accuracy` (a `PairAccuracy`).
    """
    n_bins = n_bins or (10 if len(table.prompt) >= 500 else 5)
    confidence = 1 / (1 + np.exp(-np.abs(table.difference)))
    outcome = np.where(table.difference == 0, 0.5, table.correct)
    place = np.minimum(((confidence - 0.5) * 2 * n_bins).astype(int), n_bins - 1)
    bins, ece, chance = [], 0.0, 0.0
    for b in np.unique(place):
        rows = place == b
        said, found = float(confidence[rows].mean()), pair_rate(outcome[rows], table.prompt[rows], n_boot)
        edges = {"low": 0.5 + b / (2 * n_bins), "high": 0.5 + (b + 1) / (2 * n_bins)}
        bins.append({**edges, "confidence": said, "accuracy": found})
        ece += rows.mean() * abs(found.mean - said)
        # E|x| = σ √(2/π) of a normal x, which the mean of a bin's outcomes nearly is.
        chance += rows.mean() * _bin_error(confidence[rows], outcome[rows], table.prompt[rows]) * np.sqrt(2 / np.pi)
    return {
        "ece": float(ece),
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

    def slope(log_inverse: float) -> float:
        return float(-np.mean(differences / (1 + np.exp(np.clip(differences * np.exp(log_inverse), -500, 500)))))

    # The loss is convex in 1/T: its slope changes its sign once.
    return float(np.exp(-optimize.brentq(slope, -50.0, 50.0)))


def correlations(x: np.ndarray, y: np.ndarray) -> dict[str, float | None]:
    """Pearson's r and Spearman's ρ of two lists (n,); None where one is constant."""
    if len(x) < 2 or min(np.ptp(x), np.ptp(y)) < 1e-12:
        return {"pearson": None, "spearman": None}
    found = {"pearson": stats.pearsonr(x, y), "spearman": stats.spearmanr(x, y)}
    return {name: float(result.statistic) for name, result in found.items()}


def centred(records: Sequence[Record], name: str) -> list[np.ndarray]:
    """Of each record, its list `name` (K,) minus the list's mean: prompts differ, and that is taken out."""
    return [np.asarray(record[name], dtype=float) - np.mean(record[name]) for record in records]


def length_bias(records: Sequence[Record], table: PairTable, n_boot: int = N_BOOT, seed: int = 0) -> dict[str, Any]:
    """Does the score go with the length of the answer, and does it know more than length does?

    Returns:
        `pearson`, `spearman` over all completions; `within_prompt`: the same of rewards and lengths centred by prompt,
        Pearson's r as an `Estimate`; as `PairAccuracy`: `longer_is_better` and `shorter_is_better` (accuracy of that
        rule; equal lengths order no pair), `model_picks_longer` and `labeler_picks_longer` (of the pairs of unequal
        length), `if_longer_wins` and `if_shorter_wins` (the model's accuracy where the labeler's choice is the longer
        or the shorter one); `gain_over_rule`, an `Estimate` of the model's accuracy minus the better rule's. What has
        no pairs is None.
    """
    pooled = [np.concatenate([np.asarray(r[name], float) for r in records]) for name in ("rewards", "lengths")]
    longer, shorter = table.extra_length > 0, table.extra_length < 0
    picks_longer = table.difference * table.extra_length > 0

    def rate(values: np.ndarray, rows: np.ndarray) -> PairAccuracy | None:
        return pair_rate(values[rows], table.prompt[rows], n_boot) if rows.any() else None

    everything, unequal = np.ones_like(longer), longer | shorter
    rule = longer if longer.sum() >= shorter.sum() else shorter
    top, bottom = sums_by_prompt(table.correct.astype(float) - rule, table.prompt)
    gain = Estimate(float(top.sum() / bottom.sum()), None, None, len(top))
    if len(top) >= MIN_PROMPTS:
        gain = bootstrap_interval(top, bottom, seed, n_boot, widened(len(top)))
    return {
        **correlations(*pooled),
        "within_prompt": _within_prompt(records, n_boot, seed),
        "longer_is_better": rate(longer, everything),
        "shorter_is_better": rate(shorter, everything),
        "model_picks_longer": rate(picks_longer, unequal),
        "labeler_picks_longer": rate(longer, unequal),
        "if_longer_wins": rate(table.correct, longer),
        "if_shorter_wins": rate(table.correct, shorter),
        "gain_over_rule": gain,
    }


def _within_prompt(records: Sequence[Record], n_boot: int, seed: int) -> dict[str, Any]:
    """Correlations at equal prompt. Pearson's r is Σxy / √(Σx² Σy²), so its bootstrap resamples sums over prompts."""
    rewards, lengths = centred(records, "rewards"), centred(records, "lengths")
    x, y = np.concatenate(rewards), np.concatenate(lengths)
    owner = [prompt for prompt, row in zip(first_of_prompt(records), rewards, strict=True) for _ in row]
    sums = [sums_by_prompt(term, owner)[0] for term in (x * y, x * x, y * y)]
    found: dict[str, Any] = correlations(x, y)
    n = len(sums[0])
    bounds: tuple[float | None, float | None] = (None, None)
    if found["pearson"] is None:
        return found
    if n >= MIN_PROMPTS:
        bounds = resample(sums, lambda xy, xx, yy: xy / np.sqrt(xx * yy).clip(min=1e-12), seed, n_boot, widened(n))
    return {**found, "pearson": Estimate(found["pearson"], *bounds, n)}


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


def _mean_tau(records: Sequence[Record]) -> Estimate:
    """Kendall's τ-b of rewards and labels, averaged over the records that have a pair."""
    taus, prompts = [], []
    for record, prompt in zip(records, first_of_prompt(records), strict=True):
        if len(record["pairs"]):
            k, ranks = len(record["rewards"]), record.get("ranks")
            pairs = torch.zeros(k, k, dtype=torch.bool)
            pairs[tuple(torch.tensor(record["pairs"]).T)] = True
            ties = tied_pairs(torch.as_tensor(ranks)) if ranks is not None and len(ranks) else None
            taus.append(float(kendall_tau(torch.as_tensor(record["rewards"], dtype=torch.float64), pairs, ties)))
            prompts.append(prompt)
    return mean_interval(taus, prompts, scale=(-1.0, 1.0))


def _length_quartiles(lengths: Mapping[int, int]) -> dict[int, str]:
    """The quartile of each prompt's length, named by its own shortest and longest: "012 to 031" sorts as it counts."""
    values = np.array(list(lengths.values()))
    group = np.searchsorted(np.quantile(values, [0.25, 0.5, 0.75]), values, side="left")
    width = len(str(values.max()))
    names = {g: f"{values[group == g].min():0{width}d} to {values[group == g].max():0{width}d}" for g in set(group)}
    return {prompt: names[g] for prompt, g in zip(lengths, group, strict=True)}


def reward_metrics(records: Sequence[Record], n_bins: int | None = None, n_boot: int = N_BOOT) -> dict[str, Any]:
    """Everything above, as one dict that JSON can hold: each number with an interval in the shape of `Estimate`.

    Returns:
        `pair_accuracy` (over the different prompts with a pair), `kendall_tau`, `n_completions`; `by_k`,
        `by_rank_distance`, `by_prompt_length`, `by_labeler` (`accuracy_by`, empty where the data lack it);
        `calibration`; `length` (None without lengths); `scores`: `mean` and `std` of all, `best_mean` and
        `worst_mean` where there are any.

    Raises:
        ValueError: bad records, or no pair in any of them (`pair_table`).
    """
    table = pair_table(records)
    scores = score_groups(records)

    def by(value: Callable[[Record], Any]) -> dict[str, PairAccuracy]:
        return accuracy_by(table, [value(record) for record in records for _ in record["pairs"]], n_boot)

    by_prompt_length: dict[str, PairAccuracy] = {}
    if all(record.get("prompt_length") is not None for record in records):
        # Quartiles of the prompts that have a pair.
        names = _length_quartiles({prompt: records[prompt]["prompt_length"] for prompt in np.unique(table.prompt)})
        by_prompt_length = {
            " to ".join(str(int(bound)) for bound in name.split(" to ")): found
            for name, found in accuracy_by(table, [names[prompt] for prompt in table.prompt], n_boot).items()
        }
    has_lengths = all(len(record.get("lengths") or []) for record in records)
    return _plain(
        {
            "pair_accuracy": pair_rate(table.correct, table.prompt, n_boot),
            "kendall_tau": _mean_tau(records),
            "n_completions": len(scores["all"]),
            "by_k": by(lambda record: len(record["rewards"])),
            "by_rank_distance": accuracy_by(table, [int(d) or None for d in table.distance], n_boot),
            "by_prompt_length": by_prompt_length,
            "by_labeler": by(lambda record: record.get("labeler")),
            "calibration": calibration(table, n_bins, n_boot),
            "length": length_bias(records, table, n_boot) if has_lengths else None,
            "scores": {"mean": float(scores["all"].mean()), "std": float(scores["all"].std())}
            | {f"{name}_mean": float(scores[name].mean()) for name in ("best", "worst") if len(scores[name])},
        }
    )


def _plain(value: Any) -> Any:
    """The same with every estimate as a dict."""
    if isinstance(value, Estimate):
        return asdict(value)
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list) else value
