"""Tokenised rankings as batches, and batches cut into pieces of at most so many tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from instruct_trl.data.encoding import pad_rows, prompt_key
from instruct_trl.data.prefix_layout import GroupedRows, common_prefix_length
from instruct_trl.maths.rankings import preferred_pairs

MOST_PADDING = 0.1  # share of a batch of rows that are only scored
_BY_PROMPT = ("ranks", "mask", "pairs", "margins", "weights", "prefix_lengths")
_BY_ROW = ("input_ids", "attention_mask")


class RankingCollator:
    """Batch of prompts, each with its own K, as one forward over N = ΣK rows.

    It takes the columns that `prepare_ranking_dataset` makes (examples without `pairs` get those of their `ranks`), and
    returns

    - `ranks` (B, K) long, 0 where there is no completion, and throughout the row of a prompt without ranks;
    - `mask` (B, K) bool, True on real completions;
    - `pairs` (B, K, K) bool, [b, i, j] True where completion i of prompt b is preferred over j;
    - `margins` (B, K, K) float, 0 where there is no pair; only if an example has margins;
    - `weights` (B,) float;
    - `prefix_lengths` (B,) long, as `common_prefix_length` counts them;
    - `input_ids`, `attention_mask` (N, T) long, padded on the right, whose rows are the True places of `mask` in
      row-major order.

    >>> batch = RankingCollator(pad_token_id=0)([
    ...     {"input_ids": [[5, 6], [7]], "ranks": [1, 2]},
    ...     {"input_ids": [[8, 1], [8, 2], [8, 3]], "ranks": [], "pairs": [[2, 0]], "weight": 0.5},
    ... ])
    >>> batch["mask"], batch["input_ids"].shape
    (tensor([[ True,  True, False],
            [ True,  True,  True]]), torch.Size([5, 2]))
    >>> batch["pairs"].nonzero().tolist(), batch["weights"], batch["prefix_lengths"]
    ([[0, 0, 1], [1, 2, 0]], tensor([1.0000, 0.5000]), tensor([0, 1]))
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: Any = None):
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        rows = [row for example in examples for row in example["input_ids"]]
        return {
            **comparisons(examples),
            "prefix_lengths": torch.tensor([common_prefix_length(example["input_ids"]) for example in examples]),
            **pad_rows(rows, self.pad_token_id, self.pad_to_multiple_of),
        }


def comparisons(examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """The labels of `examples` as a batch: `ranks`, `mask`, `pairs`, `weights` and, if there are any, `margins`."""
    sizes = torch.tensor([len(example["input_ids"]) for example in examples])
    mask = torch.arange(int(sizes.max())) < sizes.unsqueeze(1)
    ranks = torch.zeros(mask.shape, dtype=torch.long)
    for prompt, example in enumerate(examples):
        given = example.get("ranks") or []
        ranks[prompt, : len(given)] = torch.tensor(given, dtype=torch.long)
    pairs = preferred_pairs(ranks, mask)
    margins = torch.zeros(pairs.shape)
    for prompt, example in enumerate(examples):
        if example.get("pairs") is None:
            continue
        # Pairs of its own stand in for those of the ranks: a labeler may have compared only some.
        winners, losers = torch.tensor(example["pairs"], dtype=torch.long).reshape(-1, 2).unbind(1)
        pairs[prompt] = False
        pairs[prompt, winners, losers] = True
        if example.get("margins") is not None:
            margins[prompt, winners, losers] = torch.tensor(example["margins"], dtype=torch.float)
    weights = [1.0 if example.get("weight") is None else example["weight"] for example in examples]
    # Ranks come first: transformers counts the examples of a batch by its first tensor, and N rows are no examples.
    batch = {"ranks": ranks, "mask": mask, "pairs": pairs}
    batch["weights"] = torch.tensor(weights, dtype=torch.float)
    return batch | ({"margins": margins} if any(example.get("margins") is not None for example in examples) else {})


def answer_lengths(example: Mapping[str, Any]) -> list[int]:
    """(K,) tokens of each completion beyond those that all share."""
    shared = common_prefix_length(example["input_ids"])
    return [len(tokens) - shared for tokens in example["input_ids"]]


def prompt_key_of(example: Mapping[str, Any]) -> str | None:
    """The key of an example's prompt, the same for examples of one prompt; None if it is not known."""
    if "prompt_key" in example:
        return example["prompt_key"]
    # Rows that were prepared elsewhere have no key; their shared tokens come closest to a prompt.
    return prompt_key(example["input_ids"][0][: common_prefix_length(example["input_ids"])])


def fill(items: Iterable[int], cost: Callable[[list[int]], int], budget: int) -> list[list[int]]:
    """`items` in order, in groups whose `cost` is at most `budget`; an item that costs more is a group by itself.

    >>> fill([0, 1, 2], lambda group: 40 * len(group), budget=100)
    [[0, 1], [2]]
    """
    groups: list[list[int]] = []
    for item in items:
        if groups and cost([*groups[-1], item]) <= budget:
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def rows_cost(lengths: list[int], budget: int) -> int:
    """A cost for `fill`: the number of rows, or more than `budget` where over a tenth of them would be padding."""
    padding = 1 - sum(lengths) / (len(lengths) * max(lengths))
    return len(lengths) if padding <= MOST_PADDING else budget + 1


def owners(batch: Mapping[str, Any]) -> torch.Tensor:
    """(N,) the prompt of each row."""
    return batch["mask"].nonzero()[:, 0]


def take_prompts(batch: Mapping[str, Any], prompts: list[int]) -> dict[str, Any]:
    """The batch of these prompts, in this order, its rows cut to their longest."""
    index = torch.tensor(prompts, device=batch["mask"].device)
    owner = owners(batch)
    rows = torch.cat([(owner == prompt).nonzero().squeeze(1) for prompt in prompts])
    return {name: batch[name][index] for name in _BY_PROMPT if name in batch} | _take_rows(batch, rows)


def _take_rows(batch: Mapping[str, Any], rows: torch.Tensor) -> dict[str, Any]:
    width = int(batch["attention_mask"][rows].sum(1).max())
    return {name: batch[name][rows, :width] for name in _BY_ROW}


def _token_cost(batch: Mapping[str, Any], shared: bool) -> Callable[[list[int]], int]:
    """A cost for `fill`, of rows: the tokens that are computed for them.

    They are prefixes, once per prompt, and completions where they are `shared`, else rows padded to the longest.
    """
    lengths, owner = batch["attention_mask"].sum(1).tolist(), owners(batch).tolist()
    prefixes = batch["prefix_lengths"].tolist()

    def cost(rows: list[int]) -> int:
        if not shared:
            return len(rows) * max(lengths[row] for row in rows)
        once = sum(prefixes[prompt] for prompt in {owner[row] for row in rows})
        return once + sum(lengths[row] - prefixes[owner[row]] for row in rows)

    return cost


def prompt_pieces(batch: Mapping[str, Any], budget: int | None, shared: bool) -> list[list[int]]:
    """The prompts of a batch, longest first, in groups of at most `budget` tokens (`_token_cost`); None: one group."""
    rows: list[list[int]] = [[] for _ in batch["mask"]]
    for row, prompt in enumerate(owners(batch).tolist()):
        rows[prompt].append(row)
    if budget is None:
        return [list(range(len(rows)))]
    lengths, cost = batch["attention_mask"].sum(1).tolist(), _token_cost(batch, shared)
    # Longest first: neighbours pad each other little, and too little memory shows in the first piece.
    order = sorted(range(len(rows)), key=lambda prompt: -max(lengths[row] for row in rows[prompt]))
    return fill(order, lambda prompts: cost([row for prompt in prompts for row in rows[prompt]]), budget)


def row_pieces(batch: Mapping[str, Any], budget: int | None, shared: bool) -> list[list[int]]:
    """The rows of a batch in groups of at most `budget` tokens, counted in the same way; None: row by row."""
    return fill(range(len(owners(batch))), _token_cost(batch, shared), budget or 0)


def grouped_rows(batch: Mapping[str, Any], rows: torch.Tensor | None = None) -> GroupedRows:
    """The rows of a batch, or those with the indices `rows` (in ascending order), as they are scored."""
    owner = owners(batch)
    rows = torch.arange(len(owner), device=owner.device) if rows is None else rows
    prompts, sizes = owner[rows].unique_consecutive(return_counts=True)
    return GroupedRows(**_take_rows(batch, rows), group_sizes=sizes, prefix_lengths=batch["prefix_lengths"][prompts])
