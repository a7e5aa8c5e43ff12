"""Evaluation of a reward model over a whole set of rankings: exact metrics, and a record of every prompt.

Legend: B prompts, K completions of the longest list.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from instruct_trl.data.encoding import prompt_key
from instruct_trl.data.prefix_layout import common_prefix_length
from instruct_trl.data.ranking_batch import comparisons
from instruct_trl.maths.rankings import ranking_metrics


class GatheredRewards:
    """Collects the rewards of evaluation batches from all processes, in the order of the dataset."""

    def __init__(self, accelerator: Any):
        self._accelerator = accelerator
        self._batches: list[torch.Tensor] = []

    def add(self, rewards: torch.Tensor) -> None:
        """Keep (B, K) rewards of a batch, without the duplicates that fill the last batch of some processes."""
        rewards = self._accelerator.pad_across_processes(rewards.detach(), dim=1)
        self._batches.append(self._accelerator.gather_for_metrics(rewards).cpu())

    def lists(self, width: int) -> torch.Tensor:
        """All of them, (prompts, `width`); places beyond a prompt's completions hold zeros."""
        return torch.cat([nn.functional.pad(batch, (0, width - batch.shape[1]))[:, :width] for batch in self._batches])


def evaluate_rewards(
    rewards: GatheredRewards, rows: Iterable[Mapping[str, Any]], reward_bias: float, center_coefficient: float
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Metrics over all prompts, computed from all scores rather than averaged over batches, and the records.

    Args:
        rewards: of all prompts, without bias.
        rows: the tokenised dataset, in the same order.

    Returns:
        `ranking_metrics` with the bias in its mean scores, and one dictionary a prompt: `rewards` (K, bias included),
        `pairs` ([winner, loser] indices), `ranks` (K, or empty), `lengths` (K, tokens of each completion),
        `prompt_length` (tokens that the completions share), `labeler` (None where the dataset does not say) and
        `prompt_key` (the same for rows of one prompt; None where it is not known).
    """
    rows = list(rows)
    batch = comparisons(rows)
    lists = rewards.lists(batch["mask"].shape[1])
    metrics = ranking_metrics(lists, **batch, center_coefficient=center_coefficient)
    metrics |= {name: value + reward_bias for name, value in metrics.items() if name.startswith("mean_score")}
    records = []
    for scores, pairs, row in zip(lists + reward_bias, batch["pairs"], rows, strict=True):
        prefix = common_prefix_length(row["input_ids"])
        records.append(
            {
                "rewards": scores[: len(row["input_ids"])].tolist(),
                "pairs": pairs.nonzero().tolist(),
                "ranks": list(row.get("ranks") or []),
                "lengths": [len(tokens) - prefix for tokens in row["input_ids"]],
                "prompt_length": prefix,
                "labeler": row.get("labeler"),
                # Rows that were prepared elsewhere have no key; what their completions share is next to it.
                "prompt_key": row["prompt_key"] if "prompt_key" in row else prompt_key(row["input_ids"][0][:prefix]),
            }
        )
    return metrics, records
