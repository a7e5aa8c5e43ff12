"""Tokenised rankings of several prompts as one batch.

Legend: B prompts, K completions of the longest list in a batch, N completions in all, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from instruct_trl.data.pairs import pad_rows
from instruct_trl.data.prefix_layout import common_prefix_length
from instruct_trl.maths.rankings import preferred_pairs


class RankingCollator:
    """Batch of prompts, each with its own K, as one forward over N = ΣK rows.

    It takes the columns that `prepare_ranking_dataset` makes, and returns

    - `ranks` (B, K) long, 0 where there is no completion, and throughout the row of a prompt without ranks;
    - `mask` (B, K) bool, True on real completions;
    - `pairs` (B, K, K) bool, [b, i, j] True where completion i of prompt b is preferred over j;
    - `margins` (B, K, K) float, 0 where there is no pair; only if an example has margins;
    - `weights` (B,) float;
    - `prefix_lengths` (B,) long, how many tokens all rows of a prompt begin with, at most all but the last token
      of the shortest row;
    - `input_ids`, `attention_mask` (N, T) long, padded on the right, whose rows are the True places of `mask` in
      row-major order.

    Examples without `pairs` get those of their `ranks`.

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
    """What is said about the completions of `examples`: `ranks`, `mask`, `pairs`, `margins`, `weights` of the batch."""
    sizes = torch.tensor([len(example["input_ids"]) for example in examples])
    mask = torch.arange(int(sizes.max())) < sizes.unsqueeze(1)
    ranks = torch.zeros(mask.shape, dtype=torch.long)
    for prompt, example in enumerate(examples):
        given = example.get("ranks") or []
        ranks[prompt, : len(given)] = torch.tensor(given, dtype=torch.long)
    pairs = preferred_pairs(ranks, mask)  # those of the examples that bring none of their own
    margins = torch.zeros(pairs.shape)
    for prompt, example in enumerate(examples):
        if example.get("pairs") is None:
            continue
        winners, losers = torch.tensor(example["pairs"], dtype=torch.long).reshape(-1, 2).unbind(1)
        pairs[prompt] = False
        pairs[prompt, winners, losers] = True
        if example.get("margins") is not None:
            margins[prompt, winners, losers] = torch.tensor(example["margins"], dtype=torch.float)
    weights = [1.0 if example.get("weight") is None else example["weight"] for example in examples]
    with_margins = any(example.get("margins") is not None for example in examples)
    return {
        "ranks": ranks,  # first: transformers counts the examples of a batch by its first tensor
        "mask": mask,
        "pairs": pairs,
        **({"margins": margins} if with_margins else {}),
        "weights": torch.tensor(weights, dtype=torch.float),
    }
