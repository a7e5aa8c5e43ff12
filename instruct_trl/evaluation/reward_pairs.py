"""The compared pairs of an evaluation, and the share of them that the reward model orders right, with its interval.

The input is `RankingRewardTrainer.evaluation_records`, one dict per row of the data: `rewards` (K floats), `pairs`
([winner, loser] indices), `ranks` (K ints, lower is better, or empty), `lengths` (K token counts), `prompt_length`,
`labeler`, `prompt_key` (records with the same one are of one prompt; a record without one has a prompt of its own).

Legend: K completions of a record, P compared pairs of all records. Lengths are in tokens, rates from 0 to 1.
The pairs of one prompt are not independent, be they of one record or of several (other labelers, pairs of a ranking
given one by one), so every interval resamples prompts, never pairs or records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from instruct_trl.evaluation.estimates import MIN_PROMPTS, Prompts, resampled_rate, sums_by_prompt

Record = Mapping[str, Any]

N_BOOT = 2_000


@dataclass(frozen=True)
class PairTable:
    """The compared pairs of all prompts, flat.

    Attributes:
        prompt: (P,) the pair's prompt: the index of the first record that is of it.
        difference: (P,) r_w − r_l, reward of the preferred completion minus the other's.
        extra_length: (P,) length of the preferred completion minus the other's, in tokens; 0 without lengths.
        distance: (P,) how many ranks apart (dense ranks, ≥ 1); 0 where the record has no ranks.
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
        ValueError: no records, a reward that is not finite, lists of unequal length, a pair that points outside.
    """
    if not records:
        raise ValueError("There are no evaluation records; call trainer.evaluate() first.")
    rows = []
    for index, (record, prompt) in enumerate(zip(records, first_of_prompt(records), strict=True)):
        rewards, lengths, ranks = _checked(record, index)
        dense = np.unique(ranks, return_inverse=True)[1] if len(ranks) else None
        for winner, loser in record["pairs"]:
            rows.append(
                (
                    prompt,
                    rewards[winner] - rewards[loser],
                    lengths[winner] - lengths[loser] if len(lengths) else 0,
                    dense[loser] - dense[winner] if dense is not None else 0,
                )
            )
    columns = np.array(rows, dtype=np.float64).reshape(-1, 4).T
    return PairTable(columns[0].astype(int), columns[1], columns[2], columns[3].astype(int))


def first_of_prompt(records: Sequence[Record]) -> list[int]:
    """Of each of (N,) records, the index of the first one that is of the same prompt."""
    first: dict[str, int] = {}
    keys = [record.get("prompt_key") for record in records]
    return [index if key is None else first.setdefault(key, index) for index, key in enumerate(keys)]


def of_pairs(records: Sequence[Record], values: Sequence[Any]) -> list[Any]:
    """The value of each pair's record, (P,), from (N,) values of the records."""
    return [value for record, value in zip(records, values, strict=True) for _ in record["pairs"]]


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


def rate_interval(values: np.ndarray, prompt: Prompts, n_boot: int = N_BOOT, seed: int = 0) -> dict[str, Any]:
    """Mean over pairs of `values` (P,), 0 to 1, with its 95 % interval by resampling the prompts (P,) that they are of.

    Where all prompts agree, resampling shows no spread: then Wilson's interval, a prompt counting as one trial.

    Returns:
        `accuracy`, `low`, `high` (None with fewer than `MIN_PROMPTS` prompts), `n_pairs`, `n_prompts`.
    """
    top, bottom = sums_by_prompt(values, prompt)
    n, rate = len(top), float(top.sum() / bottom.sum())
    found = resampled_rate(top, bottom, seed, n_boot) if n >= MIN_PROMPTS else None
    bounds = {"low": found and found.low, "high": found and found.high}
    return {"accuracy": rate, **bounds, "n_pairs": len(values), "n_prompts": n}


def pair_accuracy(records: Sequence[Record], n_boot: int = N_BOOT, seed: int = 0) -> dict[str, Any]:
    """Share of all compared pairs that the rewards order as the labeler does (the paper's number, section 4.1).

    Returns:
        as `rate_interval`.

    Raises:
        ValueError: bad records (`pair_table`), or no pair in any of them.
    """
    table = pair_table(records)
    require_pairs(table)
    return rate_interval(table.correct, table.prompt, n_boot, seed)


def require_pairs(table: PairTable) -> None:
    """Raises a ValueError where there is no pair at all."""
    if not len(table.prompt):
        raise ValueError("No record has a pair: all completions are tied. Evaluate on prompts with a preference.")


def accuracy_by(table: PairTable, group: Sequence[Any] | np.ndarray, n_boot: int = N_BOOT) -> dict[str, dict[str, Any]]:
    """`rate_interval` of the pairs of each group.

    Args:
        group: (P,) the group of each pair; pairs with None belong to none.

    Returns:
        str(group) → interval, sorted by group; empty where there are fewer than two groups.
    """
    labels = np.array(group, dtype=object)
    names = sorted({label for label in labels.tolist() if label is not None})
    if len(names) < 2:
        return {}
    chosen = {name: np.array([label == name for label in labels]) for name in names}
    return {str(n): rate_interval(table.correct[rows], table.prompt[rows], n_boot) for n, rows in chosen.items()}


def length_quartiles(lengths: Sequence[float]) -> list[str]:
    """The quartile of each of (N,) lengths, named by its own shortest and longest: "012 to 031" sorts as it counts."""
    values = np.asarray(lengths, dtype=int)
    group = np.searchsorted(np.quantile(values, [0.25, 0.5, 0.75]), values, side="left")
    width = len(str(values.max()))
    bounds = {g: (values[group == g].min(), values[group == g].max()) for g in set(group.tolist())}
    return [f"{bounds[g][0]:0{width}d} to {bounds[g][1]:0{width}d}" for g in group.tolist()]
