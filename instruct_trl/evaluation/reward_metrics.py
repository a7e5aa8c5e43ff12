"""How far a reward model can be trusted, from its scores of held-out rankings: accuracy, calibration, length.

The input is `RankingRewardTrainer.evaluation_records`, one dict per row of the data: `rewards` (K floats), `pairs`
([winner, loser] indices), `ranks` (K ints, lower is better, or empty), `lengths` (K token counts), `prompt_length`,
`labeler`, `prompt_key` (equal for records of one prompt; a record without it has a prompt of its own), `bag_of_words`
(K floats, the scores of `floors.BagOfWords`; may be missing).

Legend: N records, K completions of a record, P compared pairs of all records. Lengths are in tokens, rates from 0 to 1.
The pairs of one prompt are not independent, so every interval resamples prompts, never pairs or records.
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
    mean_interval,
    resample,
    resampled_rate,
    standard_error,
    sums_by_prompt,
    widened,
)
from instruct_trl.evaluation.floors import why_missing
from instruct_trl.maths.rankings import kendall_tau, ranks_apart, tied_pairs

Record = Mapping[str, Any]

N_BOOT = 2_000


@dataclass(frozen=True)
class PairAccuracy(Estimate):
    """Share of the pairs that are ordered as the labeler does; no interval with fewer than `MIN_PROMPTS` prompts."""

    n_pairs: int


@dataclass(frozen=True)
class PairTable:
    """The compared pairs of all prompts, one column each.

    Attributes:
        prompt: (P,) the pair's prompt: the index of the first record that is of it.
        difference: (P,) r_w − r_l, reward of the preferred completion minus the other's.
        extra_length: (P,) length of the preferred completion minus the other's; 0 without lengths.
        distance: (P,) how many ranks apart (`ranks_apart`, ≥ 1); 0 without ranks.
        words: (P,) the bag of words' score of the preferred completion minus the other's; None without a bag of words.
    """

    prompt: np.ndarray
    difference: np.ndarray
    extra_length: np.ndarray
    distance: np.ndarray
    words: np.ndarray | None = None

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
    columns = []
    for index, (record, prompt) in enumerate(zip(records, first_of_prompt(records), strict=True)):
        rewards, lengths, ranks, words = _checked(record, f"records[{index}]")
        winner, loser = np.array(record["pairs"], dtype=int).reshape(-1, 2).T
        distance = ranks_apart(torch.as_tensor(ranks)).numpy()[winner, loser] if len(ranks) else 0 * winner
        extra, in_words = (x[winner] - x[loser] if len(x) else 0 * winner for x in (lengths, words))
        columns.append(np.stack([0 * winner + prompt, rewards[winner] - rewards[loser], extra, distance, in_words]))
    prompt, difference, extra, distance, in_words = np.concatenate(columns, axis=1)
    if not len(prompt):
        raise ValueError("No record has a pair: all completions are tied. Evaluate on prompts with a preference.")
    has_words = _all_have(records, "bag_of_words")
    return PairTable(prompt.astype(int), difference, extra, distance.astype(int), in_words if has_words else None)


def _all_have(records: Sequence[Record], name: str) -> bool:
    return all(len(record.get(name) or []) for record in records)


def first_of_prompt(records: Sequence[Record]) -> list[int]:
    """For each record: the index of the first record of the same prompt, (N,)."""
    first: dict[str, int] = {}
    keys = [record.get("prompt_key") for record in records]
    return [index if key is None else first.setdefault(key, index) for index, key in enumerate(keys)]


def _checked(record: Record, name: str) -> tuple[np.ndarray, ...]:
    """Rewards, lengths, ranks and scores of the bag of words of a record as arrays; all but the first may be empty."""
    columns = ("rewards", "lengths", "ranks", "bag_of_words")
    rewards, *others = (np.asarray([] if record.get(key) is None else record[key], dtype=np.float64) for key in columns)
    k = len(rewards)
    if (bad := np.flatnonzero(~np.isfinite(rewards))).size:
        raise ValueError(
            f"{name}['rewards'][{bad[0]}] is {rewards[bad[0]]}: the reward model is broken there. Lower the learning "
            "rate, or look at that completion."
        )
    for key, values in zip(columns[1:], others, strict=True):
        if len(values) not in (0, k):
            raise ValueError(f"{name} has {k} rewards but {len(values)} {key}; each completion needs one.")
    for pair in record["pairs"]:
        if len(pair) != 2 or not all(0 <= i < k for i in pair) or pair[0] == pair[1]:
            raise ValueError(
                f"{name}['pairs'] holds {list(pair)}; a pair is [winner, loser], two different numbers from 0 to "
                f"{k - 1}."
            )
    return rewards, *others


def credit(difference: np.ndarray) -> np.ndarray:
    """1 for each pair (P,) that a score orders right, 0 for each that it orders wrong, ½ for a tie, which is a guess.

    Floors count like this, and so do both sides of a lead. A rule that does not know must not do worse than a coin.
    """
    return (np.sign(difference) + 1) / 2


def pair_rate(values: np.ndarray, prompt: Sequence[Any] | np.ndarray, n_boot: int = N_BOOT) -> PairAccuracy:
    """Mean over pairs of `values` (P,), 0 to 1, with its interval over the prompts (P,) that they are of."""
    top, bottom = sums_by_prompt(values, prompt)
    if len(top) < MIN_PROMPTS:
        return PairAccuracy(float(top.sum() / bottom.sum()), None, None, len(top), len(values))
    return PairAccuracy(**asdict(resampled_rate(top, bottom, n_boot)), n_pairs=len(values))


def pair_accuracy(records: Sequence[Record]) -> PairAccuracy:
    """Share of all compared pairs that the rewards order as the labeler does (the paper's number, section 4.1).

    Raises:
        ValueError: bad records, or no pair in any of them (`pair_table`).
    """
    table = pair_table(records)
    return pair_rate(table.correct, table.prompt)


def accuracy_by(table: PairTable, group: Sequence[Any], n_boot: int = N_BOOT) -> dict[Any, PairAccuracy]:
    """The accuracy of the pairs of each group, in the order of groups; empty with fewer than two groups.

    Args:
        group: (P,) the group of each pair; pairs with None belong to none.
    """
    rows = {name: np.array([label == name for label in group]) for name in sorted(set(group) - {None})}
    if len(rows) < 2:
        return {}
    return {name: pair_rate(table.correct[own], table.prompt[own], n_boot) for name, own in rows.items()}


def calibration(table: PairTable, n_bins: int | None = None, n_boot: int = N_BOOT) -> dict[str, Any]:
    """Is σ(r_w − r_l) the probability that it claims to be? Reliability curve and expected calibration error.

    Guo et al. 2017, section 2: ECE = Σ_b n_b / P · |mean outcome − mean confidence| over `n_bins` bins of equal width,
    by default 10, and 5 for fewer than 500 pairs, since more bins would show noise.

    Returns:
        `ece`; `ece_by_chance`, about what a perfectly calibrated model gives on so many pairs and prompts;
        `overconfidence`, mean confidence − mean outcome; `temperature`, see `fit_temperature`; `bins`, those with
        pairs: `low`, `high` (edges), `confidence`, `accuracy` (a `PairAccuracy`).
    """
    n_bins = n_bins or (10 if len(table.prompt) >= 500 else 5)
    # Each pair once, with the completion first that the model prefers. The one with the lower index would not do: in
    # `chosen`/`rejected` data it always wins. This equals taking each pair in both orientations, with bins over 0 to 1.
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
    """Standard error of the mean outcome of a bin's pairs (n,) under a perfectly calibrated model."""
    p, n, prompts = confidence.mean(), len(prompt), len(np.unique(prompt))
    coins = float(np.sqrt(p * (1 - p) / (n if prompts > 1 else 1)))
    # Independent coins, unless a prompt has several of the pairs: then no less than what the prompts show.
    return coins if prompts in (1, n) else max(coins, standard_error(outcome - confidence, prompt) or 0.0)


def fit_temperature(differences: np.ndarray) -> float | None:
    """The T that minimises the mean of −log σ((r_w − r_l) / T) over (P,) pairs (Guo et al. 2017, section 4.2).

    Above 1, the model is surer than it is right. None if no finite T > 0 is best: all pairs are ordered right, or the
    mean difference is not above 0.
    """
    if differences.min() >= 0 or differences.mean() <= 0:
        return None
    unit = float(np.abs(differences).mean())  # makes T of the order of 1, whatever the scale of the scores
    scaled = differences / unit

    def slope(log_inverse: float) -> float:
        return float(-np.mean(scaled / (1 + np.exp(np.clip(scaled * np.exp(log_inverse), -500, 500)))))

    # The loss is convex in 1/T: its slope changes its sign once.
    return unit * float(np.exp(-optimize.brentq(slope, -30.0, 30.0)))


def correlations(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> dict[str, float | None]:
    """Pearson's r and Spearman's ρ of two lists (n,); None if one is constant."""
    if len(x) < 2 or min(np.ptp(x), np.ptp(y)) < 1e-12:
        return {"pearson": None, "spearman": None}
    found = {"pearson": stats.pearsonr(x, y), "spearman": stats.spearmanr(x, y)}
    return {name: float(result.statistic) for name, result in found.items()}


def centred(records: Sequence[Record], name: str) -> list[np.ndarray]:
    """For each record: its list `name` (K,) minus the list's mean, so that differences between prompts drop out."""
    return [np.asarray(record[name], dtype=float) - np.mean(record[name]) for record in records]


def length_bias(records: Sequence[Record], table: PairTable, n_boot: int = N_BOOT) -> dict[str, Any]:
    """Does the score go with the length of the answer, and does it know more than length does?

    Returns:
        `pearson`, `spearman` over all completions; `within_prompt`: the same of rewards and lengths centred by prompt,
        Pearson's r as an `Estimate`; as `PairAccuracy`: `longer_is_better` and `shorter_is_better` (accuracy of that
        rule; of equal lengths one half), `model_picks_longer` and `labeler_picks_longer` (of the pairs of unequal
        length), `if_longer_wins` and `if_shorter_wins` (the model's accuracy on the pairs whose preferred answer is the
        longer or the shorter one). A number over no pairs is None.
    """
    longer, shorter = table.extra_length > 0, table.extra_length < 0
    everything, unequal = np.ones_like(longer), longer | shorter
    rates = {  # name → (what is counted, among which pairs)
        "longer_is_better": (credit(table.extra_length), everything),
        "shorter_is_better": (credit(-table.extra_length), everything),
        "model_picks_longer": (table.difference * table.extra_length > 0, unequal),
        "labeler_picks_longer": (longer, unequal),
        "if_longer_wins": (table.correct, longer),
        "if_shorter_wins": (table.correct, shorter),
    }
    pooled = [
        np.concatenate([np.asarray(record[name], float) for record in records]) for name in ("rewards", "lengths")
    ]
    return {
        **correlations(*pooled),
        "within_prompt": _within_prompt(records, n_boot),
        **{
            name: pair_rate(values[rows], table.prompt[rows], n_boot) if rows.any() else None
            for name, (values, rows) in rates.items()
        },
    }


def _within_prompt(records: Sequence[Record], n_boot: int) -> dict[str, Any]:
    """Correlations at equal prompt."""
    rewards, lengths = centred(records, "rewards"), centred(records, "lengths")
    x, y = np.concatenate(rewards), np.concatenate(lengths)
    found: dict[str, Any] = correlations(x, y)
    if found["pearson"] is None:
        return found
    owner = np.repeat(first_of_prompt(records), [len(row) for row in rewards])
    # Pearson's r is Σxy / √(Σx² Σy²), so its bootstrap resamples three sums over prompts.
    sums = [sums_by_prompt(term, owner)[0] for term in (x * y, x * x, y * y)]
    n = len(sums[0])
    bounds: tuple[float | None, float | None] = (None, None)
    if n >= MIN_PROMPTS:
        bounds = resample(sums, lambda xy, xx, yy: xy / np.sqrt(xx * yy).clip(min=1e-12), 0, n_boot, widened(n))
    return {**found, "pearson": Estimate(found["pearson"], *bounds, n)}


def floors(table: PairTable, has_lengths: bool, n_boot: int = N_BOOT) -> dict[str, Any]:
    """What knows less than a reward model should, on the same pairs, and the model's lead over it.

    A lead is the model's `credit` minus the floor's, pair by pair, so its interval is paired: it resamples prompts with
    both. Without ties it is the difference of the two accuracies.

    Returns:
        `length` and `bag_of_words`, each {"rule": in words, "accuracy": `PairAccuracy`, "lead": `Estimate`}, or None
        where the records do not have it. The rule of `length` is the better one of these pairs, "the longer answer" or
        "the shorter answer".
    """

    def floor(rule: str, difference: np.ndarray) -> dict[str, Any]:
        lead = mean_interval(credit(table.difference) - credit(difference), table.prompt, scale=(-1.0, 1.0))
        return {"rule": rule, "accuracy": pair_rate(credit(difference), table.prompt, n_boot), "lead": lead}

    longer = credit(table.extra_length).mean() >= 0.5
    rule, extra = ("the longer answer", 1) if longer else ("the shorter answer", -1)
    return {
        "length": floor(rule, extra * table.extra_length) if has_lengths else None,
        "bag_of_words": None if table.words is None else floor("a bag of words", table.words),
    }


def floor_rates(records: Sequence[Record]) -> dict[str, float]:
    """The accuracies of `floors` alone, for a log: `length` and `bag_of_words`, as far as the records have them."""
    rates = {}
    for name, column in (("length", "lengths"), ("bag_of_words", "bag_of_words")):
        if _all_have(records, column):
            gaps = [
                record[column][winner] - record[column][loser]
                for record in records
                for winner, loser in record["pairs"]
            ]
            rate = float(credit(np.array(gaps)).mean()) if gaps else 0.5
            rates[name] = max(rate, 1 - rate) if name == "length" else rate
    return rates


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


def _length_quartiles(lengths: Mapping[int, int]) -> dict[int, tuple[int, int]]:
    """For each prompt: the shortest and the longest length of the quartile that its own length is in."""
    values = np.array(list(lengths.values()))
    group = np.searchsorted(np.quantile(values, [0.25, 0.5, 0.75]), values, side="left")
    bounds = {g: (int(values[group == g].min()), int(values[group == g].max())) for g in set(group)}
    return {prompt: bounds[g] for prompt, g in zip(lengths, group, strict=True)}


def reward_metrics(records: Sequence[Record], n_boot: int = N_BOOT) -> dict[str, Any]:
    """Everything above, as one dict that JSON can hold: each number with an interval in the shape of `Estimate`.

    Returns:
        `pair_accuracy` (over the different prompts with a pair), `kendall_tau`, `n_completions`; `by_k`,
        `by_rank_distance`, `by_prompt_length`, `by_labeler` (`accuracy_by`, empty if the data lack it); `calibration`;
        `length` (None without lengths); `floors` (`floors`, and `missing`: why there is no bag of words, or None);
        `scores`: `mean` and `std` of all, `best_mean` and `worst_mean` if there are any.

    Raises:
        ValueError: bad records, or no pair in any of them (`pair_table`).
    """
    table, scores = pair_table(records), score_groups(records)

    def by(value: Callable[[Record], Any]) -> list[Any]:
        return [value(record) for record in records for _ in record["pairs"]]

    groups = {
        "by_k": by(lambda record: len(record["rewards"])),
        "by_rank_distance": [int(d) or None for d in table.distance],
        "by_prompt_length": [],
        "by_labeler": by(lambda record: record.get("labeler")),
    }
    if all(record.get("prompt_length") is not None for record in records):
        # Quartiles of the prompts that have a pair.
        bounds = _length_quartiles({prompt: records[prompt]["prompt_length"] for prompt in np.unique(table.prompt)})
        groups["by_prompt_length"] = [bounds[prompt] for prompt in table.prompt]
    has_lengths = _all_have(records, "lengths")
    under = floors(table, has_lengths, n_boot)
    return _plain(
        {
            "pair_accuracy": pair_rate(table.correct, table.prompt, n_boot),
            "kendall_tau": _mean_tau(records),
            "n_completions": len(scores["all"]),
            **{name: accuracy_by(table, group, n_boot) for name, group in groups.items()},
            "calibration": calibration(table, n_boot=n_boot),
            "length": length_bias(records, table, n_boot) if has_lengths else None,
            "floors": {**under, "missing": None if under["bag_of_words"] else why_missing()},
            "scores": {"mean": float(scores["all"].mean()), "std": float(scores["all"].std())}
            | {f"{name}_mean": float(scores[name].mean()) for name in ("best", "worst") if len(scores[name])},
        }
    )


def _plain(value: Any) -> Any:
    """The same as JSON has it: every estimate a dict, every key a text."""
    if isinstance(value, Estimate):
        return asdict(value)
    if isinstance(value, dict):
        return {_name(key): _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list) else value


def _name(group: Any) -> str:
    """A group as text. Bounds are "6 to 10", or "6" where they are equal."""
    return " to ".join(map(str, dict.fromkeys(group))) if isinstance(group, tuple) else str(group)
