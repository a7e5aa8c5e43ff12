"""Ranking datasets: checked, tokenised and counted before training.

What a row may look like is in `ranking_rows`, and how rows become a batch in `ranking_collator`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Features, IterableDataset, Value
from datasets import Sequence as ListOf
from trl.data_utils import extract_prompt

from instruct_trl.data.encoding import Text, encode_prompt, in_row, prompt_key, template_kwargs, tokenize_pair
from instruct_trl.data.ranking_batch import RankingCollator as RankingCollator
from instruct_trl.data.ranking_rows import Ranking as Ranking
from instruct_trl.data.ranking_rows import parse_ranking as parse_ranking
from instruct_trl.data.rows import column_names, require_columns

_PREPARED = ("input_ids", "ranks")
_COUNTERS = ("long_prompt", "overlong_rows", "dropped_pairs", "tied")


@dataclass
class RankingReport:
    """What happened to a dataset on its way to tokens.

    `overlong_rows`: completions dropped, since with their prompt they exceed `max_length`. `dropped_prompts`: prompts
    dropped, since they exceed `max_prompt_length` (`long_prompts` of them) or kept fewer than two completions.
    `tied_prompts`: prompts kept that hold no untied pair. `dropped_pairs`: comparisons that went with the completions
    in `overlong_rows`, since they touch one.
    """

    prompts: int
    long_prompts: int
    overlong_rows: int
    dropped_prompts: int
    tied_prompts: int
    dropped_pairs: int = 0

    def line(self, where: str, max_length: int | None, max_prompt_length: int | None) -> str | None:
        """One sentence for the log; None where there is nothing to say."""
        parts = []
        if self.overlong_rows:
            parts.append(
                f"{self.overlong_rows} completions longer than max_length={max_length} tokens (prompt included) and "
                f"the {self.dropped_pairs} pairs that touch them"
            )
        if self.long_prompts:
            parts.append(f"{self.long_prompts} prompts longer than max_prompt_length={max_prompt_length} tokens")
        short = self.dropped_prompts - self.long_prompts
        if short:
            parts.append(f"{short} prompts left with fewer than two completions")
        dropped = f"dropped {', '.join(parts)}" if parts else ""
        tied = (
            f"{self.tied_prompts} prompts without an untied pair add nothing to the loss" if self.tied_prompts else ""
        )
        said = "; ".join(part for part in (dropped, tied) if part)
        return f"{where}, of {self.prompts} prompts: {said}." if said else None


def tokenize_ranking(
    example: Mapping[str, Any],
    index: int,
    tokenizer: Any,
    max_length: int | None,
    max_prompt_length: int | None,
    where: str,
    use_margins: bool = False,
    margins: bool = False,
) -> dict[str, Any]:
    """Tokens of one row's completions, those longer than the limits left out and counted.

    `margins`: whether the dataset has margins, so that each row must. The other arguments: `prepare_ranking_dataset`.

    Returns:
        `input_ids` (a list of K token lists, empty if the row is to be dropped), `ranks` (K, dense; empty where the
        row has only pairs), `pairs` (a list of [winner, loser]), `margins` (parallel to `pairs`; only if margins are
        on), `weight`, `labeler` (only if it was there), `prompt_key` (the same for rows of one prompt; None where a row
        has none), and the counters `long_prompt`, `overlong_rows`,
        `dropped_pairs`, `tied` (no untied pair among what was kept).
    """
    place = f"{where}, row {index}"
    ranking = parse_ranking(example, place, use_margins)
    if (ranking.margins is not None) != margins:
        raise ValueError(
            f"{place} has {'no' if margins else 'a'} 'margin', unlike the rows before it. Give all rows one, or none; "
            "0 is none."
        )
    with in_row(place):
        return _tokens_of(ranking, example, tokenizer, max_length, max_prompt_length)


def _tokens_of(
    ranking: Ranking, example: Mapping[str, Any], tokenizer: Any, max_length: int | None, max_prompt_length: int | None
) -> dict[str, Any]:
    """The result of `tokenize_ranking` for a row that is checked."""
    kwargs = template_kwargs(example)
    result: dict[str, Any] = {"input_ids": [], "ranks": [], "pairs": [], "weight": ranking.weight}
    result["prompt_key"] = _key(ranking.prompt, example)
    result |= {"long_prompt": False, "overlong_rows": 0, "dropped_pairs": 0, "tied": False}
    if ranking.margins is not None:
        result["margins"] = []
    if "labeler" in example:
        result["labeler"] = None if example["labeler"] is None else str(example["labeler"])
    if max_prompt_length is not None and _prompt_length(tokenizer, ranking.prompt, kwargs) > max_prompt_length:
        return {**result, "long_prompt": True}
    rows = [
        tokenize_pair(tokenizer, ranking.prompt, completion, truncated=truncated, **kwargs)
        for completion, truncated in zip(ranking.completions, ranking.truncated, strict=True)
    ]
    kept = [place for place, row in enumerate(rows) if max_length is None or len(row) <= max_length]
    labels = _labels_of(ranking, kept)
    result["overlong_rows"] = len(rows) - len(kept)
    result["dropped_pairs"] = len(ranking.pairs) - len(labels["pairs"])
    if len(kept) < 2:
        return result
    return {**result, **labels, "input_ids": [rows[place] for place in kept], "tied": not labels["pairs"]}


def _labels_of(ranking: Ranking, kept: Sequence[int]) -> dict[str, Any]:
    """`ranks`, `pairs` and, if they are on, `margins`, of the completions at the places `kept` alone."""
    position = {place: index for index, place in enumerate(kept)}
    ranks = [ranking.ranks[place] for place in kept] if ranking.ranks else []
    dense = {rank: number for number, rank in enumerate(sorted(set(ranks)), start=1)}
    chosen = [index for index, (i, j) in enumerate(ranking.pairs) if i in position and j in position]
    labels: dict[str, Any] = {
        "ranks": [dense[rank] for rank in ranks],
        "pairs": [[position[place] for place in ranking.pairs[index]] for index in chosen],
    }
    if ranking.margins is not None:
        labels["margins"] = [ranking.margins[index] for index in chosen]
    return labels


def _key(prompt: Text, example: Mapping[str, Any]) -> str | None:
    """The prompt's key. An implicit prompt is, as in TRL, all that both texts begin with."""
    if prompt:
        return prompt_key(prompt)
    implicit = extract_prompt({side: example[side] for side in ("chosen", "rejected")})["prompt"]
    return prompt_key(implicit) if implicit else None


def _prompt_length(tokenizer: Any, prompt: Text, kwargs: dict[str, Any]) -> int:
    if not prompt:  # an implicit prompt cannot be told from its completion
        return 0
    return len(encode_prompt(tokenizer, prompt, **kwargs))


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
        require_columns(dataset, _PREPARED, where)
        if use_margins and "margins" not in columns:
            raise ValueError(
                f"{where} was prepared without margins. Prepare it with use_margins=True, or turn that off."
            )
        return dataset, None
    _check_columns(dataset, columns, where, use_margins)
    options: dict[str, Any] = {
        "with_indices": True,
        "fn_kwargs": {
            "tokenizer": tokenizer,
            "max_length": max_length,
            "max_prompt_length": max_prompt_length,
            "where": where,
            "use_margins": use_margins,
            "margins": use_margins or "margin" in columns,
        },
        "remove_columns": columns,
        "features": _features(columns, use_margins),
    }
    if isinstance(dataset, Dataset):
        options |= {"num_proc": num_proc, "desc": f"Tokenizing {where}"}
    tokenized = dataset.map(tokenize_ranking, **options)
    if not isinstance(tokenized, Dataset):
        return tokenized.filter(_has_rows).remove_columns(list(_COUNTERS)), None
    kept = tokenized.filter(_has_rows, desc=f"Filtering {where}").remove_columns(list(_COUNTERS))
    report = _report(tokenized, len(kept))
    _refuse_useless(report, len(kept), where, max_length, max_prompt_length)
    return kept, report


def _features(columns: Sequence[str], use_margins: bool) -> Features:
    features = Features(
        input_ids=ListOf(ListOf(Value("int32"))),
        ranks=ListOf(Value("int32")),
        pairs=ListOf(ListOf(Value("int32"))),
        weight=Value("float32"),
        long_prompt=Value("bool"),
        overlong_rows=Value("int32"),
        dropped_pairs=Value("int32"),
        tied=Value("bool"),
        prompt_key=Value("string"),
    )
    if use_margins or "margin" in columns:
        features["margins"] = ListOf(Value("float32"))
    if "labeler" in columns:
        features["labeler"] = Value("string")
    return features


def _has_rows(example: Mapping[str, Any]) -> bool:
    return len(example["input_ids"]) > 0


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


def _report(tokenized: Dataset, kept: int) -> RankingReport:
    return RankingReport(
        prompts=len(tokenized),
        long_prompts=sum(tokenized["long_prompt"]),
        overlong_rows=sum(tokenized["overlong_rows"]),
        dropped_prompts=len(tokenized) - kept,
        tied_prompts=sum(tokenized["tied"]),
        dropped_pairs=sum(tokenized["dropped_pairs"]),
    )


def _refuse_useless(
    report: RankingReport, kept: int, where: str, max_length: int | None, max_prompt_length: int | None
) -> None:
    if report.prompts == 0:
        raise ValueError(f"{where} has no rows.")
    if kept == 0:
        raise ValueError(
            f"{where}: none of its {report.prompts} prompts fits max_length={max_length} and max_prompt_length="
            f"{max_prompt_length} tokens with at least two completions. Raise the limits or shorten the texts."
        )
    if report.tied_prompts == kept:
        raise ValueError(
            f"{where}: none of its {kept} prompts has an untied pair, so there is nothing to learn. Check that 'ranks' "
            f"or 'scores' differ within a row, or that 'pairs' are filled in ({report.dropped_pairs} pairs went with "
            f"completions longer than max_length={max_length})."
        )
