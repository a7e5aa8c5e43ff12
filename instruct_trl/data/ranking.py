"""Rankings as data: what a row may look like, how it becomes tokens, and how rows become a batch.

Legend: B prompts, K completions of the longest list in a batch, N completions in all, T tokens.

A row is `prompt`, `completions` (a list) and `ranks` (lower is better, equal numbers tie, only order counts) or
`scores` (higher is better), optionally `truncated` (a list of bool); or TRL's `chosen`/`rejected`, which is K = 2.
Text or messages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, Features, IterableDataset, Value
from datasets import Sequence as ListOf

from instruct_trl.data.checks import column_names, require_columns
from instruct_trl.data.pairs import Text, pad_rows, template_kwargs, tokenize_pair
from instruct_trl.maths.rankings import dense_ranks

_PREPARED = ("input_ids", "ranks")
_COUNTERS = ("long_prompt", "overlong_rows", "tied")


@dataclass
class Ranking:
    """One prompt with its K ≥ 2 completions; `ranks` are dense (1 is best), `truncated` ones end without EOS."""

    prompt: Text
    completions: list[Text]
    ranks: list[int]
    truncated: list[bool]


@dataclass
class RankingReport:
    """What happened to a dataset on its way to tokens.

    `overlong_rows`: completions dropped, since with their prompt they exceed `max_length`. `dropped_prompts`: prompts
    dropped, since they exceed `max_prompt_length` (`long_prompts` of them) or kept fewer than two completions.
    `tied_prompts`: prompts kept that hold no untied pair.
    """

    prompts: int
    long_prompts: int
    overlong_rows: int
    dropped_prompts: int
    tied_prompts: int

    def line(self, where: str, max_length: int | None, max_prompt_length: int | None) -> str | None:
        """One sentence for the log; None where there is nothing to say."""
        parts = []
        if self.overlong_rows:
            parts.append(
                f"{self.overlong_rows} completions longer than max_length={max_length} tokens (prompt included)"
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


def parse_ranking(example: Mapping[str, Any], where: str) -> Ranking:
    """Check one row and bring it into the form of `Ranking`.

    Args:
        example: the row, with any of the accepted columns.
        where: names the row in errors, e.g. "train dataset, row 3".

    Raises:
        ValueError: unequal lengths, fewer than two completions, NaN or infinite or missing numbers, something empty.
    """
    if "chosen" in example:
        completions, ranks = [example["chosen"], example["rejected"]], [1, 2]
        prompt = example.get("prompt")
        if prompt is None:  # TRL's implicit prompt: it is part of both texts
            prompt = "" if isinstance(example["chosen"], str) else []
        elif _is_empty(prompt):
            raise ValueError(f"{where}: the prompt is empty. Drop the row.")
    else:
        prompt, completions = example["prompt"], example["completions"]
        if _is_empty(prompt):
            raise ValueError(f"{where}: the prompt is empty. Drop the row.")
        ranks = _ranks_of(example, completions, where)
    for index, completion in enumerate(completions):
        if _is_empty(completion):
            raise ValueError(f"{where}: completion {index} is empty. Drop it, together with its rank.")
        if isinstance(completion, str) != isinstance(prompt, str) or not isinstance(completion, str | list):
            raise ValueError(
                f"{where}: the prompt is {_kind(prompt)} and completion {index} is {_kind(completion)}. Make both "
                "plain text, or both lists of messages."
            )
    truncated = example.get("truncated") or [False] * len(completions)
    if len(truncated) != len(completions):
        raise ValueError(f"{where}: {len(completions)} completions but {len(truncated)} entries in 'truncated'.")
    return Ranking(prompt, list(completions), ranks, [bool(flag) for flag in truncated])


def _ranks_of(example: Mapping[str, Any], completions: Any, where: str) -> list[int]:
    name = "ranks" if "ranks" in example else "scores"
    numbers = example[name]
    for column, value in (("completions", completions), (name, numbers)):
        if not isinstance(value, list):
            raise ValueError(f"{where}: {column!r} must be a list with one entry a completion, got {value!r}.")
    if len(numbers) != len(completions):
        raise ValueError(
            f"{where}: {len(completions)} completions but {len(numbers)} {name}. Give one number for each completion."
        )
    if len(completions) < 2:
        raise ValueError(f"{where}: {len(completions)} completion(s). A ranking needs at least 2; drop the row.")
    for index, number in enumerate(numbers):
        if not isinstance(number, int | float) or not math.isfinite(number):
            raise ValueError(f"{where}: {name}[{index}] is {number}. Only finite numbers can be ranked; drop the row.")
    order = sorted(set(numbers), reverse=name == "scores")
    position = {number: place for place, number in enumerate(order, start=1)}
    return [position[number] for number in numbers]


def _is_empty(text: Text | None) -> bool:
    if isinstance(text, list):
        return not text or not (text[-1].get("content") or text[-1].get("tool_calls"))
    return not text or (isinstance(text, str) and not text.strip())


def _kind(text: Text) -> str:
    return {str: "plain text", list: "a list of messages"}.get(type(text), f"a {type(text).__name__}")


def tokenize_ranking(
    example: Mapping[str, Any],
    index: int,
    tokenizer: Any,
    max_length: int | None,
    max_prompt_length: int | None,
    where: str,
) -> dict[str, Any]:
    """Tokens of one row's completions, those longer than the limits left out and counted.

    Returns:
        `input_ids` (a list of K token lists), `ranks` (K, dense), both empty if the row is to be dropped, and the
        counters `long_prompt`, `overlong_rows`, `tied` (no untied pair among what was kept).
    """
    ranking = parse_ranking(example, f"{where}, row {index}")
    kwargs = template_kwargs(example)
    result: dict[str, Any] = {"input_ids": [], "ranks": [], "long_prompt": False, "overlong_rows": 0, "tied": False}
    if max_prompt_length is not None and _prompt_length(tokenizer, ranking.prompt, kwargs) > max_prompt_length:
        return {**result, "long_prompt": True}
    rows = [
        tokenize_pair(tokenizer, ranking.prompt, completion, truncated=truncated, **kwargs)
        for completion, truncated in zip(ranking.completions, ranking.truncated, strict=True)
    ]
    kept = [place for place, row in enumerate(rows) if max_length is None or len(row) <= max_length]
    result["overlong_rows"] = len(rows) - len(kept)
    if len(kept) < 2:
        return result
    ranks = dense_ranks(torch.tensor([ranking.ranks[place] for place in kept])).tolist()
    return {**result, "input_ids": [rows[place] for place in kept], "ranks": ranks, "tied": max(ranks) == 1}


def _prompt_length(tokenizer: Any, prompt: Text, kwargs: dict[str, Any]) -> int:
    if not prompt:  # an implicit prompt cannot be told from its completion
        return 0
    if isinstance(prompt, str):
        return len(tokenizer(text=prompt)["input_ids"])
    kwargs = {**kwargs, "add_generation_prompt": True}
    return len(tokenizer.apply_chat_template(prompt, tokenize=True, return_dict=True, **kwargs)["input_ids"])


def prepare_ranking_dataset(
    dataset: Dataset | IterableDataset,
    tokenizer: Any,
    *,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    where: str = "the dataset",
    num_proc: int | None = None,
) -> tuple[Dataset | IterableDataset, RankingReport | None]:
    """Check and tokenise a ranking dataset. One that is prepared already comes back as it is, with report None.

    A stream (IterableDataset) is checked row by row as it is read, and has no report.

    Raises:
        ValueError: bad columns or rows (see `parse_ranking`), every prompt dropped, or every pair tied.
    """
    columns = column_names(dataset)
    if "input_ids" in columns and "completions" not in columns and "chosen" not in columns:
        require_columns(dataset, _PREPARED, where)
        return dataset, None
    _check_columns(dataset, columns, where)
    features = Features(
        input_ids=ListOf(ListOf(Value("int32"))),
        ranks=ListOf(Value("int32")),
        long_prompt=Value("bool"),
        overlong_rows=Value("int32"),
        tied=Value("bool"),
    )
    arguments = {
        "tokenizer": tokenizer,
        "max_length": max_length,
        "max_prompt_length": max_prompt_length,
        "where": where,
    }
    options: dict[str, Any] = {
        "with_indices": True,
        "fn_kwargs": arguments,
        "remove_columns": columns,
        "features": features,
    }
    if isinstance(dataset, Dataset):
        options |= {"num_proc": num_proc, "desc": f"Tokenizing {where}"}
    tokenized = dataset.map(tokenize_ranking, **options)
    if not isinstance(tokenized, Dataset):
        return tokenized.filter(_has_rows).remove_columns(list(_COUNTERS)), None
    report = _report(tokenized)
    kept = tokenized.filter(_has_rows, desc=f"Filtering {where}").remove_columns(list(_COUNTERS))
    _refuse_useless(report, len(kept), where, max_length, max_prompt_length)
    return kept, report


def _has_rows(example: Mapping[str, Any]) -> bool:
    return len(example["ranks"]) > 0


def _check_columns(dataset: Any, columns: Sequence[str], where: str) -> None:
    if "chosen" in columns or "rejected" in columns:
        require_columns(dataset, ["chosen", "rejected"], where)
        if "margin" in columns:
            raise ValueError(
                f"{where} has a 'margin' column, which Eq. 1 does not know. Remove it, or use trl.RewardTrainer."
            )
    else:
        require_columns(dataset, ["prompt", "completions", ("ranks", "scores")], where)


def _report(tokenized: Dataset) -> RankingReport:
    lengths = [len(ranks) for ranks in tokenized["ranks"]]
    return RankingReport(
        prompts=len(lengths),
        long_prompts=sum(tokenized["long_prompt"]),
        overlong_rows=sum(tokenized["overlong_rows"]),
        dropped_prompts=lengths.count(0),
        tied_prompts=sum(tokenized["tied"]),
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
            f"{where}: in each of its {kept} prompts all completions tie, so there is nothing to learn. Check that "
            "'ranks' or 'scores' differ within a row."
        )


class RankingCollator:
    """Batch of prompts, each with its own K, as one forward over N = ΣK rows.

    Returns `ranks` (B, K) long, `mask` (B, K) True on real completions, and `input_ids`, `attention_mask` (N, T),
    padded on the right, whose rows are the True places of `mask` in row-major order.

    >>> batch = RankingCollator(pad_token_id=0)(
    ...     [{"input_ids": [[5, 6], [7]], "ranks": [1, 2]}, {"input_ids": [[8], [9], [4]], "ranks": [2, 1, 2]}]
    ... )
    >>> batch["mask"], batch["input_ids"].shape
    (tensor([[ True,  True, False],
            [ True,  True,  True]]), torch.Size([5, 2]))
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: Any = None):
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        sizes = torch.tensor([len(example["ranks"]) for example in examples])
        mask = torch.arange(int(sizes.max())) < sizes.unsqueeze(1)
        ranks = torch.zeros(mask.shape, dtype=torch.long)
        ranks[mask] = torch.tensor([rank for example in examples for rank in example["ranks"]])
        rows = [row for example in examples for row in example["input_ids"]]
        # `ranks` comes first: transformers counts the examples of a batch by its first tensor.
        return {"ranks": ranks, "mask": mask, **pad_rows(rows, self.pad_token_id, self.pad_to_multiple_of)}
