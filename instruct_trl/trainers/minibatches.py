"""Minibatches of a rollout: who is in one is random; inside one, micro-batches are sorted by length and cut to it.

Legend: B rows of a micro-batch, T completion tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator

Batch = dict[str, Any]


def arrange_minibatches(micro_batches: list[Batch], accumulation: int, accelerator: Accelerator) -> list[Batch]:
    """Sort the rows of each minibatch by answer length, and add `minibatch_tokens` to its micro-batches.

    Args:
        micro_batches: the rollout, shuffled and split; `accumulation` neighbours are one minibatch.
        accumulation: micro-batches an optimizer step.
        accelerator: sums the token count over processes.

    Returns:
        As many micro-batches, of the same sizes. `minibatch_tokens` is the minibatch's number of loss tokens over
        all processes, divided by their number, since DDP averages gradients.
    """
    arranged: list[Batch] = []
    for start in range(0, len(micro_batches), accumulation):
        window = _sorted_by_length(micro_batches[start : start + accumulation])
        tokens = torch.stack([batch["loss_mask"].sum() for batch in window]).sum().float()
        tokens = (accelerator.reduce(tokens, "sum") / accelerator.num_processes).clamp(min=1)
        arranged += [{**batch, "minibatch_tokens": tokens} for batch in window]
    return arranged


def _sorted_by_length(window: list[Batch]) -> list[Batch]:
    if any(isinstance(value, list) for value in window[0].values()):  # images: rows and pixels do not line up
        return window
    whole = {
        name: torch.cat([batch[name] for batch in window]) if value.ndim else value
        for name, value in window[0].items()
        if value is not None
    }
    order = whole["completion_mask"].sum(dim=1).argsort(stable=True)
    sizes = [len(batch["completion_mask"]) for batch in window]
    return [
        {name: value[rows] if value.ndim else value for name, value in whole.items()} for rows in order.split(sizes)
    ]


def trim_padding(batch: Batch) -> Batch:
    """Cut every (B, T) completion tensor to the longest answer of this micro-batch. Causal models do not notice."""
    width = batch["completion_ids"].size(1)
    longest = int(batch["completion_mask"].sum(dim=1).max())

    def is_per_token(name: str, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.ndim == 2 and value.size(1) == width and "prompt" not in name

    return {name: value[:, :longest] if is_per_token(name, value) else value for name, value in batch.items()}
