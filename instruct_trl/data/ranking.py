"""Ranking datasets: checked, tokenised and counted before training.

A row is `prompt`, `completions` (a list of K) and one of `ranks` (lower is better, equal numbers tie, only order
counts), `scores` (higher is better) and `pairs` (a list of [winner, loser], positions in `completions`, for labelers
who compare only some). It may also be TRL's `chosen`/`rejected`, which is K = 2, optionally with `margin`. Optional
beside any of them: `weight`, `truncated` (a list of K bool), `labeler`. All is text, or all is messages.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value
from trl.data_utils import extract_prompt

from instruct_trl.data.encoding import Text, encode_prompt, in_row, prompt_key, template_kwargs, tokenize_pair
from instruct_trl.data.rows import check_text, column_names, require_columns, shown

_SIDES = ("chosen", "rejected")
Pair = tuple[int, int]  # (winner, loser), positions in the completions
_COUNTERS = {"long_prompts": "bool", "overlong_rows": "int32", "dropped_pairs": "int32", "tied_prompts": "bool"}


@dataclass
class Ranking:
    """One prompt with its K ≥ 2 completions and what a labeler said of them.

    Attributes:
        ranks: K, dense (1 is best); empty where the labeler gave only pairs.
        pairs: everything that counts in the loss, so all untied pairs where there are ranks.
        margins: parallel to `pairs`, in units of reward; None where margins are off.
        weight: of this prompt in the loss.
        truncated: K; True where the completion ends without EOS.
    """

    prompt: Text
    completions: list[Text]
    ranks: list[int]
    pairs: list[Pair]
    margins: list[float] | None
    weight: float
    truncated: list[bool]


def parse_ranking(example: Mapping[str, Any], margins: bool = False) -> Ranking:
    """Check one row and bring it into the form of `Ranking`.

    `margins`: take those of the pairs, from `margin` beside `chosen`, else from the differences of `scores`.
    """
    values = None
    if "chosen" in example:
        completions, ranks, pairs = [example["chosen"], example.get("rejected")], [1, 2], [(0, 1)]
        names = ["'chosen'", "'rejected'"]
        if ("margin" in example) != margins:
            raise ValueError(
                f"{'no' if margins else 'a'} 'margin' here, unlike the rows before. Give all rows one, or none; 0 is "
                "none."
            )
        if margins:
            values = [_finite(example["margin"], "'margin'", "0 is none")]
    else:
        completions = _list_of(example, "completions")
        if len(completions) < 2:
            raise ValueError(f"{len(completions)} completion(s). A ranking needs at least 2; drop the row.")
        names = [f"completion {index}" for index in range(len(completions))]
        if "pairs" in example:  # no closure is taken: what a labeler did not compare stays open
            ranks, pairs = (
                [],
                _pairs_of(
                    _list_of(example, "pairs", "of [winner, loser], empty where nothing was compared"), len(completions)
                ),
            )
        else:
            name, sign = ("ranks", 1) if "ranks" in example else ("scores", -1)  # of scores the highest is best
            given = enumerate(_list_of(example, name, count=len(completions)))
            numbers = [_finite(number, f"{name}[{index}]", "drop the row if it has none") for index, number in given]
            ranks = _dense([sign * number for number in numbers])
            pairs = [(i, j) for i, best in enumerate(ranks) for j, rank in enumerate(ranks) if best < rank]
        if margins:
            values = [float(example["scores"][i] - example["scores"][j]) for i, j in pairs]
    prompt: Any = example.get("prompt")
    if "chosen" in example and "prompt" not in example:
        # TRL's implicit prompt is part of both texts. Where it ends cannot be told, so it counts with the completions.
        prompt = "" if isinstance(example["chosen"], str) else []
    else:
        check_text(prompt, "the prompt")
    for name, completion in zip(names, completions, strict=True):
        check_text(completion, name)
    weight = _finite(example.get("weight", 1.0), "'weight'", "1 is the default", above=0)
    return Ranking(prompt, completions, ranks, pairs, values, weight, _truncated_of(example, len(completions)))


def _truncated_of(example: Mapping[str, Any], count: int) -> list[bool]:
    if example.get("truncated") is None:  # a row without them has finished completions
        return [False] * count
    flags = _list_of(example, "truncated", count=count)
    for index, flag in enumerate(flags):
        if not isinstance(flag, bool):
            raise ValueError(
                f"truncated[{index}] is {shown(flag)}. Write true where the completion was cut at a limit, and false "
                "where it ended."
            )
    return flags


def _list_of(
    example: Mapping[str, Any], name: str, of: str = "with one entry per completion", count: int | None = None
) -> list[Any]:
    """A column that holds a list in each row, of `count` entries. A csv file has cells of text in its place."""
    value = example.get(name)
    if not isinstance(value, list):
        csv = "That is text: a csv file cannot hold lists; json lines and parquet can. " if type(value) is str else ""
        raise ValueError(f"{name!r} must be a list {of}, got {shown(value)}. {csv}Fix or drop the row.")
    if count is not None and len(value) != count:
        raise ValueError(f"{count} completions but {len(value)} {name}. Give one entry per completion.")
    return value


def _finite(number: Any, name: str, remedy: str, above: float = -math.inf) -> float:
    # A truth value is an int for Python, and nobody who wrote one meant a number.
    is_number = isinstance(number, int | float) and not isinstance(number, bool)
    if not is_number or not math.isfinite(number) or number <= above:
        limit, quotes = f" above {above}" if above == 0 else "", " without quotes" if isinstance(number, str) else ""
        raise ValueError(f"{name} is {shown(number)}. Give a finite number{limit}{quotes}; {remedy}.")
    return float(number)


def _dense(numbers: Sequence[float]) -> list[int]:
    """1, 2, 3, ... in the order of the numbers; equal numbers share one."""
    places = {number: place for place, number in enumerate(sorted(set(numbers)), start=1)}
    return [places[number] for number in numbers]


def _pairs_of(entries: list[Any], count: int) -> list[Pair]:
    """The pairs of a row in their order, each once."""
    pairs: dict[Pair, None] = {}
    for index, entry in enumerate(entries):
        what = f"pairs[{index}] is {entry!r}"
        if not isinstance(entry, list | tuple) or len(entry) != 2:
            raise ValueError(f"{what}. Give two positions in 'completions': [winner, loser].")
        winner, loser = entry
        if not all(type(place) is int and 0 <= place < count for place in entry):
            raise ValueError(f"{what}, but the row has {count} completions. Use whole numbers from 0 to {count - 1}.")
        if winner == loser:
            raise ValueError(f"{what}, which compares a completion with itself. Drop the pair.")
        if (loser, winner) in pairs:
            raise ValueError(
                f"'pairs' holds both {[loser, winner]} and {[winner, loser]}, which contradict each other. Keep one of "
                "them, or neither: a tie is no pair."
            )
        pairs[winner, loser] = None
    return list(pairs)


@dataclass
class RankingReport:
    """Counts of what happened to a dataset on its way to tokens.

    Attributes:
        long_prompts: dropped, since they exceed `max_prompt_length`.
        overlong_rows: completions dropped, since with their prompt they exceed `max_length`.
        dropped_prompts: `long_prompts`, and those that kept fewer than two completions.
        tied_prompts: prompts kept that hold no untied pair.
        dropped_pairs: comparisons that went with the completions in `overlong_rows`, since they touch one.
    """

    prompts: int
    long_prompts: int
    overlong_rows: int
    dropped_prompts: int
    tied_prompts: int
    dropped_pairs: int

    def line(self, where: str, max_length: int | None, max_prompt_length: int | None) -> str | None:
        """One sentence for the log; None where there is nothing to say."""
        short = self.dropped_prompts - self.long_prompts
        dropped = {
            f"{self.overlong_rows} completions longer than max_length={max_length} tokens (prompt included) and the "
            f"{self.dropped_pairs} pairs that touch them": self.overlong_rows,
            f"{self.long_prompts} prompts longer than max_prompt_length={max_prompt_length} tokens": self.long_prompts,
            f"{short} prompts left with fewer than two completions": short,
        }
        parts = [said for said, count in dropped.items() if count]
        said = [f"dropped {', '.join(parts)}"] if parts else []
        if self.tied_prompts:
            said.append(f"{self.tied_prompts} prompts without an untied pair add nothing to the loss")
        return f"{where}, of {self.prompts} prompts: {'; '.join(said)}." if said else None

    def refuse_useless(self, where: str, max_length: int | None, max_prompt_length: int | None) -> None:
        """Raise a ValueError if there is nothing to learn."""
        kept = self.prompts - self.dropped_prompts
        if self.prompts == 0:
            raise ValueError(f"{where} has no rows.")
        if kept == 0:
            raise ValueError(
                f"{where}: none of its {self.prompts} prompts fits max_length={max_length} and max_prompt_length="
                f"{max_prompt_length} tokens with at least two completions. Raise the limits or shorten the texts."
            )
        if self.tied_prompts == kept:
            raise ValueError(
                f"{where}: none of its {kept} prompts has an untied pair, so there is nothing to learn. Check that "
                "'ranks' or 'scores' differ within a row, or that 'pairs' are filled in "
                f"({self.dropped_pairs} pairs went with completions longer than max_length={max_length})."
            )


def tokenize_ranking(
    example: Mapping[str, Any],
    index: int,
    tokenizer: Any,
    max_length: int | None,
    max_prompt_length: int | None,
    where: str,
    margins: bool = False,
) -> dict[str, Any]:
    """Tokens of one row's completions, those longer than the limits left out and counted.

    Returns:
        `input_ids` (K token lists; none if the row is to be dropped), `ranks` (K, dense; none where there are only
        pairs), `pairs` ([winner, loser] each), `margins` (one per pair; only if margins are on), `weight`, `labeler`
        (only if it was there), `prompt_key` (None where a row has no prompt), and the counters of `RankingReport`.
    """
    with in_row(f"{where}, row {index}"):
        ranking, kwargs = parse_ranking(example, margins), template_kwargs(example)
        result: dict[str, Any] = {"input_ids": [], "ranks": [], "pairs": [], "weight": ranking.weight}
        result |= {"prompt_key": _key(ranking.prompt, example), **dict.fromkeys(_COUNTERS, 0)}
        if margins:
            result["margins"] = []
        if "labeler" in example:
            result["labeler"] = None if example["labeler"] is None else str(example["labeler"])
        # An implicit prompt has no length of its own: it cannot be told from its completion.
        prompt = ranking.prompt
        if max_prompt_length and prompt and len(encode_prompt(tokenizer, prompt, **kwargs)) > max_prompt_length:
            return {**result, "long_prompts": 1}
        rows = [
            tokenize_pair(tokenizer, ranking.prompt, completion, truncated=truncated, **kwargs)
            for completion, truncated in zip(ranking.completions, ranking.truncated, strict=True)
        ]
    kept = [place for place, row in enumerate(rows) if max_length is None or len(row) <= max_length]
    labels = _labels_of(ranking, kept)
    result |= {"overlong_rows": len(rows) - len(kept), "dropped_pairs": len(ranking.pairs) - len(labels["pairs"])}
    if len(kept) < 2:
        return result
    return {**result, **labels, "input_ids": [rows[place] for place in kept], "tied_prompts": not labels["pairs"]}


def _labels_of(ranking: Ranking, kept: Sequence[int]) -> dict[str, Any]:
    """`ranks`, `pairs` and, if they are on, `margins`, of the completions at the places `kept` alone."""
    position = {place: index for index, place in enumerate(kept)}
    chosen = [index for index, (i, j) in enumerate(ranking.pairs) if i in position and j in position]
    labels: dict[str, Any] = {
        "ranks": _dense([ranking.ranks[place] for place in kept] if ranking.ranks else []),
        "pairs": [[position[place] for place in ranking.pairs[index]] for index in chosen],
    }
    if ranking.margins is not None:
        labels["margins"] = [ranking.margins[index] for index in chosen]
    return labels


def _key(prompt: Text | None, example: Mapping[str, Any]) -> str | None:
    """The prompt's key. An implicit prompt is, as in TRL, all that both texts begin with."""
    if not prompt:
        prompt = extract_prompt({side: example[side] for side in ("chosen", "rejected")})["prompt"]  # type: ignore[assignment]
    return prompt_key(prompt) if prompt else None


def ranking_keys(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The key of each row's prompt, as the records of an evaluation have it; a row without a prompt has one alone."""
    keys = (_key(row.get("prompt"), row) if row.get("prompt") or "chosen" in row else None for row in rows)
    return [key or f"row {index}" for index, key in enumerate(keys)]


def prepare_ranking_dataset(
    dataset: Dataset | IterableDataset,
    tokenizer: Any,
    *,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    use_margins: bool = False,
    where: str = "the dataset",
    num_proc: int | None = None,
) -> tuple[Dataset | IterableDataset, RankingReport | None]:
    """Check and tokenise a ranking dataset. One that is prepared already comes back as it is, with report None.

    A stream (IterableDataset) is checked row by row as it is read, and has no report.

    Args:
        max_length: of prompt and completion together, in tokens. Longer completions are dropped with their pairs.
        max_prompt_length: in tokens. Longer prompts are dropped.
        use_margins: take the differences of `scores` as margins. A `margin` column is always taken, as TRL does.

    Returns:
        The dataset with the columns that `tokenize_ranking` makes, without the counters; and what was dropped.

    Raises:
        ValueError: bad columns or rows (see `parse_ranking`), margins without a source, every prompt dropped, or no
            pair anywhere.
    """
    columns = column_names(dataset)
    if "input_ids" in columns and "completions" not in columns and "chosen" not in columns:
        require_columns(dataset, ["input_ids", "ranks"], where)
        if use_margins and "margins" not in columns:
            raise ValueError(
                f"{where} was prepared without margins. Prepare it with use_margins=True, or turn that off."
            )
        return dataset, None
    _check_columns(dataset, columns, where, use_margins)
    margins = use_margins or "margin" in columns
    limits = {"max_length": max_length, "max_prompt_length": max_prompt_length}
    options: dict[str, Any] = {
        "with_indices": True,
        "fn_kwargs": {"tokenizer": tokenizer, **limits, "where": where, "margins": margins},
        "remove_columns": columns,
        "features": _features(margins, "labeler" in columns),
    }
    if isinstance(dataset, Dataset):
        options |= {"num_proc": num_proc, "desc": f"Tokenizing {where}"}
    tokenized = dataset.map(tokenize_ranking, **options)
    kept = tokenized.filter(bool, input_columns="input_ids").remove_columns(list(_COUNTERS))
    if not isinstance(tokenized, Dataset):
        return kept, None
    counts = {name: sum(tokenized[name]) for name in _COUNTERS}
    report = RankingReport(len(tokenized), dropped_prompts=len(tokenized) - len(kept), **counts)
    report.refuse_useless(where, **limits)
    return kept, report


def _features(margins: bool, labeler: bool) -> Features:
    whole, real, text = Value("int32"), Value("float32"), Value("string")
    features = {"input_ids": List(List(whole)), "ranks": List(whole), "pairs": List(List(whole)), "weight": real}
    features |= {"prompt_key": text, **{name: Value(kind) for name, kind in _COUNTERS.items()}}
    return Features(features | ({"margins": List(real)} if margins else {}) | ({"labeler": text} if labeler else {}))


def _check_columns(dataset: Any, columns: Sequence[str], where: str, use_margins: bool) -> None:
    if "chosen" in columns or "rejected" in columns:
        require_columns(dataset, ["chosen", "rejected"], where)
        if "completions" in columns:
            raise ValueError(
                f"{where} has 'completions' beside 'chosen' and 'rejected', and each says which answer is better. "
                "Remove 'completions' (with 'ranks', 'scores' or 'pairs'), or remove 'chosen' and 'rejected'."
            )
        source = "margin"
    else:
        require_columns(dataset, ["prompt", "completions", ("ranks", "scores", "pairs")], where)
        if "margin" in columns:
            raise ValueError(
                f"{where} has a 'margin' column, which belongs to 'chosen' and 'rejected'. For margins between "
                "'completions' give 'scores' and set use_margins=True; otherwise remove the column."
            )
        source = "scores"
    if use_margins and source not in columns:
        raise ValueError(
            f"use_margins=True, but {where} has no column {source!r} to take margins from. Add it (in place of "
            "'ranks' or 'pairs' if those are there), or set use_margins=False."
        )


# -- a control ---------------------------------------------------------------------------------------------------------


def shuffle_ranks(dataset: Dataset, seed: int, where: str = "the dataset") -> Dataset:
    """The same prompts and answers, with the ranks of each row dealt out anew at random: feedback that says nothing.

    All orders of a row's answers are equally likely, the given one too, so that of any two answers each is the better
    one half of the time. Ties, gaps and the number of pairs stay as they are; so do `margin`, `weight` and `labeler`.

    Args:
        dataset: rows as `parse_ranking` takes them.
        seed: the same seed gives the same ranks.
        where: the dataset's name in errors.

    Raises:
        ValueError: bad columns or rows (see `parse_ranking`).
    """
    _check_columns(dataset, column_names(dataset), where, use_margins=False)
    kwargs = {"seed": seed, "where": where}
    return dataset.map(_shuffle_row, with_indices=True, fn_kwargs=kwargs, features=dataset.features)


def _shuffle_row(example: Mapping[str, Any], index: int, seed: int, where: str) -> dict[str, Any]:
    with in_row(f"{where}, row {index}"):
        count = len(parse_ranking(example, "margin" in example).completions)
    # The answer at a place gets what was said of the answer at order[place].
    order = np.random.default_rng([seed, index]).permutation(count).tolist()
    if "pairs" in example:
        return {"pairs": [[order.index(winner), order.index(loser)] for winner, loser in example["pairs"]]}
    if "chosen" not in example:
        name = "ranks" if "ranks" in example else "scores"
        return {name: [example[name][place] for place in order]}
    answers = {side: example[of] for side, of in zip(_SIDES, [_SIDES[place] for place in order], strict=True)}
    cut = example.get("truncated")  # of the answers that changed places
    return answers | ({} if cut is None else {"truncated": [cut[place] for place in order]})
