"""Metrics of a reward model: sums over the batches of its training, and exact ones over a whole evaluation set.

Legend: B prompts, K completions of the longest list.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from instruct_trl.data.prefix_layout import common_prefix_length
from instruct_trl.data.ranking_batch import answer_lengths, comparisons, prompt_key_of
from instruct_trl.maths.rankings import pair_counts, ranking_metrics


class RankingTally:
    """Adds up training batches; `metrics` reads the sums over all processes and starts again."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self._sums)

    def add(self, rewards: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> None:
        """Count a batch with its `rewards` (B, K), without bias and gradient."""
        pairs = inputs["pairs"]
        correct, total = pair_counts(rewards, pairs)
        batch = {
            "correct": correct.sum(),
            "pairs": total.sum(),
            "margin": ((rewards.unsqueeze(-1) - rewards.unsqueeze(-2)) * pairs).sum(),
            "tied_prompts": (total == 0).sum(),
            "score": rewards.sum(),
            "rows": inputs["mask"].sum(),
            "tokens": inputs["attention_mask"].sum(),
        }
        for name, value in batch.items():
            self._sums[name] = self._sums.get(name, 0) + value.double()  # float32 loses tokens beyond 16.8 million

    def metrics(self, accelerator: Any, counts: Mapping[str, int]) -> dict[str, float]:
        """Metrics since the last call, over all processes; `tokens` and `computed` are counts of tokens.

        Args:
            counts: tokens `computed` by this process, and how many of them were `padding`.
        """
        device = self._sums["rows"].device
        self._sums |= {name: torch.tensor(float(count), device=device).double() for name, count in counts.items()}
        # Sums are reduced, not means: processes hold different numbers of pairs.
        sums = accelerator.reduce(torch.stack(list(self._sums.values())), reduction="sum").tolist()
        total = dict(zip(self._sums, sums, strict=True))
        self._sums = {}
        return {
            "pair_accuracy": total["correct"] / max(total["pairs"], 1),
            "margin": total["margin"] / max(total["pairs"], 1),
            "mean_score": total["score"] / max(total["rows"], 1),
            "tied_prompts": total["tied_prompts"],
            "padding_share": total["padding"] / max(total["computed"], 1),
            "tokens": total["tokens"],
            "computed": total["computed"],
        }


class GatheredRewards:
    """Collects the rewards of evaluation batches from all processes, in the order of the dataset."""

    def __init__(self, accelerator: Any):
        self._accelerator = accelerator
        self._batches: list[torch.Tensor] = []

    def add(self, rewards: torch.Tensor) -> None:
        """Keep (B, K) rewards of a batch, without the duplicates that fill the last batch of some processes."""
        # K is the longest list of this process's batch; the processes must gather equal shapes.
        rewards = self._accelerator.pad_across_processes(rewards.detach(), dim=1)
        self._batches.append(self._accelerator.gather_for_metrics(rewards).cpu())

    def evaluate(
        self, rows: Iterable[Mapping[str, Any]], reward_bias: float, center_coefficient: float
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Metrics over all prompts, computed from all scores rather than averaged over batches, and the records.

        Args:
            rows: the tokenised dataset, in the order in which it was evaluated.

        Returns:
            `ranking_metrics` with the bias in its mean scores, and one dictionary per prompt: `rewards` (K, bias
            included), `pairs` ([winner, loser] indices), `ranks` (K, or empty), `lengths` (K, tokens of each
            completion), `prompt_length` (tokens that the completions share), `labeler` (None if the dataset does not
            say) and `prompt_key` (the same for rows of one prompt; None if it is not known).
        """
        rows = list(rows)
        batch = comparisons(rows)
        width = batch["mask"].shape[1]
        lists = torch.cat([nn.functional.pad(part, (0, width - part.shape[1]))[:, :width] for part in self._batches])
        metrics = ranking_metrics(lists, **batch, center_coefficient=center_coefficient)
        # Only differences of rewards enter the other metrics, so that the bias does not show in them.
        metrics |= {name: value + reward_bias for name, value in metrics.items() if name.startswith("mean_score")}
        records = []
        for scores, pairs, row in zip(lists + reward_bias, batch["pairs"], rows, strict=True):
            records.append(
                {
                    "rewards": scores[: len(row["input_ids"])].tolist(),
                    "pairs": pairs.nonzero().tolist(),
                    "ranks": list(row.get("ranks") or []),
                    "lengths": answer_lengths(row),
                    "prompt_length": common_prefix_length(row["input_ids"]),
                    "labeler": row.get("labeler"),
                    "prompt_key": prompt_key_of(row),
                }
            )
        return metrics, records
