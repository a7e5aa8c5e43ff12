"""One row of ranking data: what it may look like, and how it is checked.

A row is `prompt`, `completions` (a list of K) and one of `ranks` (lower is better, equal numbers tie, only order
counts), `scores` (higher is better) and `pairs` (a list of [winner, loser], positions in `completions`, for labelers
who compare only some); or TRL's `chosen`/`rejected`, which is K = 2, optionally with `margin`. Optional beside any of
them: `weight`, `truncated` (a list of K bool). Text or messages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from instruct_trl.data.encoding import Text
from instruct_trl.data.rows import check_text, kind_of, shown

Pair = tuple[int, int]  # (winner, loser), positions in the completions


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


def parse_ranking(example: Mapping[str, Any], where: str, use_margins: bool = False) -> Ranking:
    """Check one row and bring it into the form of `Ranking`.

    Args:
        example: the row, with any of the accepted columns.
        where: names the row in errors, e.g. "train dataset, row 3".
        use_margins: take the differences of `scores` as margins. A `margin` is always taken.

    Raises:
        ValueError: unequal lengths, fewer than two completions, NaN or infinite or missing numbers, text in place of
            numbers or lists, something empty or no text, or pairs that name no completion or contradict each other.
    """
    margins = None
    if "chosen" in example:
        completions, ranks, pairs = [example["chosen"], example.get("rejected")], [1, 2], [(0, 1)]
        names = ["'chosen'", "'rejected'"]
        if "margin" in example:
            margins = [_margin_of(example["margin"], where)]
    else:
        completions = _completions_of(example, where)
        names = [f"completion {index}" for index in range(len(completions))]
        if "pairs" in example:
            ranks, pairs = [], _pairs_of(example["pairs"], len(completions), where)
        else:
            ranks = _ranks_of(example, len(completions), where)
            pairs = [(i, j) for i, best in enumerate(ranks) for j, rank in enumerate(ranks) if best < rank]
        if use_margins:
            margins = [float(example["scores"][i] - example["scores"][j]) for i, j in pairs]
    prompt = _prompt_of(example, where)
    _check_completions(prompt, completions, names, where)
    truncated = _truncated_of(example.get("truncated"), len(completions), where)
    weight = _weight_of(example.get("weight", 1.0), where)
    return Ranking(prompt, completions, ranks, pairs, margins, weight, truncated)


def _prompt_of(example: Mapping[str, Any], where: str) -> Text:
    prompt = example.get("prompt")
    if "prompt" not in example and "chosen" in example:  # TRL's implicit prompt: it is part of both texts
        return "" if isinstance(example["chosen"], str) else []
    check_text(prompt, f"{where}: the prompt")
    assert prompt is not None
    return prompt


def _completions_of(example: Mapping[str, Any], where: str) -> list[Text]:
    completions = _list_of(example, "completions", "one entry per completion", where)
    if len(completions) < 2:
        raise ValueError(f"{where}: {len(completions)} completion(s). A ranking needs at least 2; drop the row.")
    return list(completions)


def _list_of(example: Mapping[str, Any], name: str, entries: str, where: str) -> list[Any]:
    """A column that holds a list in each row. A csv file has cells of text in its place."""
    value = example.get(name)
    if isinstance(value, list):
        return value
    raise ValueError(
        f"{where}: {name!r} must be a list with {entries}, got {shown(value)}. {_list_remedy(value)}Mend or "
        "drop the row."
    )


def _list_remedy(value: Any) -> str:
    return "That is text: a csv file cannot hold lists; json lines and parquet can. " if isinstance(value, str) else ""


def _check_completions(prompt: Text, completions: list[Text], names: list[str], where: str) -> None:
    for name, completion in zip(names, completions, strict=True):
        check_text(completion, f"{where}: {name}")
        if isinstance(completion, str) != isinstance(prompt, str):
            raise ValueError(
                f"{where}: the prompt is {kind_of(prompt)} and {name} is {kind_of(completion)}. Make both plain text, "
                "or both lists of messages."
            )


def _ranks_of(example: Mapping[str, Any], count: int, where: str) -> list[int]:
    name = "ranks" if "ranks" in example else "scores"
    numbers = _list_of(example, name, "one number per completion", where)
    if len(numbers) != count:
        raise ValueError(
            f"{where}: {count} completions but {len(numbers)} {name}. Give one number for each completion."
        )
    for index, number in enumerate(numbers):
        if not _is_finite(number):
            raise ValueError(
                f"{where}: {name}[{index}] is {shown(number)}. Only finite numbers can be ranked{_unquoted(number)}; "
                "drop the row."
            )
    order = sorted(set(numbers), reverse=name == "scores")
    position = {number: place for place, number in enumerate(order, start=1)}
    return [position[number] for number in numbers]


def _unquoted(number: Any) -> str:
    """A remedy for numbers that are written as text, and for truth values."""
    if isinstance(number, str):
        return ", and this is text: write it without quotes, or convert the column"
    return ", and this is a truth value" if isinstance(number, bool) else ""


def _pairs_of(entries: Any, count: int, where: str) -> list[Pair]:
    """The pairs of a row in their order, each once."""
    if not isinstance(entries, list):
        raise ValueError(
            f"{where}: 'pairs' must be a list of [winner, loser], got {shown(entries)}. {_list_remedy(entries)}Give [] "
            "where nothing was compared."
        )
    pairs: dict[Pair, None] = {}
    for index, entry in enumerate(entries):
        pair = _pair_of(entry, count, f"{where}: pairs[{index}] is {entry!r}")
        if pair[::-1] in pairs:
            raise ValueError(
                f"{where}: 'pairs' holds both {list(pair[::-1])} and {list(pair)}, which contradict each other. Keep "
                "one of them, or neither: a tie is no pair."
            )
        pairs[pair] = None
    return list(pairs)


def _pair_of(entry: Any, count: int, what: str) -> Pair:
    """One [winner, loser]; `what` opens the error."""
    if not isinstance(entry, list | tuple) or len(entry) != 2:
        raise ValueError(f"{what}. Give two positions in 'completions': [winner, loser].")
    for place in entry:
        if not isinstance(place, int) or isinstance(place, bool) or not 0 <= place < count:
            raise ValueError(f"{what}, but the row has {count} completions. Use whole numbers from 0 to {count - 1}.")
    winner, loser = entry
    if winner == loser:
        raise ValueError(f"{what}, which compares a completion with itself. Drop the pair.")
    return winner, loser


def _margin_of(margin: Any, where: str) -> float:
    if not _is_finite(margin):
        raise ValueError(f"{where}: 'margin' is {shown(margin)}. Give a finite number{_unquoted(margin)}; 0 is none.")
    return float(margin)


def _weight_of(weight: Any, where: str) -> float:
    if not _is_finite(weight) or weight <= 0:
        raise ValueError(
            f"{where}: 'weight' is {shown(weight)}. Give a finite number above 0{_unquoted(weight)}; 1 is the default. "
            "To leave the row out, drop it."
        )
    return float(weight)


def _truncated_of(truncated: Any, count: int, where: str) -> list[bool]:
    """K bool; a row without them has finished completions."""
    if truncated is None:
        return [False] * count
    wanted = f"a list of {count} bool belongs there, one per completion"
    if not isinstance(truncated, list):
        raise ValueError(f"{where}: 'truncated' is {shown(truncated)}; {wanted}. Use json lines or parquet.")
    if len(truncated) != count:
        raise ValueError(f"{where}: {count} completions but {len(truncated)} entries in 'truncated'; {wanted}.")
    for index, flag in enumerate(truncated):
        if not isinstance(flag, bool):
            raise ValueError(
                f"{where}: truncated[{index}] is {shown(flag)}, and {wanted}. Write true where the completion was cut "
                "at a limit, and false where it ended."
            )
    return truncated


def _is_finite(number: Any) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
