"""What a reward model's training logs between two lines: sums over batches, then one metric each.

Legend: B prompts, K completions of the longest list.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from instruct_trl.maths.rankings import pair_counts


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
            self._sums[name] = self._sums.get(name, 0) + value.double()

    def metrics(self, accelerator: Any, counts: Mapping[str, int]) -> dict[str, float]:
        """Metrics of what was added, over all processes; `tokens` and `computed` are counts of tokens.

        Args:
            counts: tokens `computed` by this process, and how many of them were `padding`.
        """
        device = self._sums["rows"].device
        self._sums |= {name: torch.tensor(float(count), device=device).double() for name, count in counts.items()}
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
