"""Minibatches of a rollout: who is in one is random; inside one, micro-batches are sorted by length and cut to it.

Legend: B rows of a (micro-)batch, P prompt tokens, T completion tokens, L columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator

from instruct_trl.data.ranking_batch import fill, rows_cost

Batch = dict[str, Any]
ROW = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")


def join_rows(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, (B, P + T) each, of prompts and completions."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    return ids, torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)


def split_rows(input_ids: torch.Tensor, attention_mask: torch.Tensor, width: int) -> Batch:
    """Undo `join_rows`: the last `width` tokens are the completions."""
    ids, mask = ((rows[:, :-width], rows[:, -width:]) for rows in (input_ids, attention_mask))
    return {"prompt_ids": ids[0], "prompt_mask": mask[0], "completion_ids": ids[1], "completion_mask": mask[1]}


def arrange_minibatches(micro_batches: list[Batch], accumulation: int, accelerator: Accelerator) -> list[Batch]:
    """Sort each minibatch by the length of prompt and answer together; add `minibatch_tokens` to its micro-batches.

    `accumulation` neighbours of `micro_batches`, a rollout shuffled and split, are one minibatch. `minibatch_tokens` is
    its number of loss tokens over all processes, divided by the number of processes.
    """
    arranged: list[Batch] = []
    for start in range(0, len(micro_batches), accumulation):
        window = _sorted_by_length(micro_batches[start : start + accumulation])
        tokens = torch.stack([batch["loss_mask"].sum() for batch in window]).sum().float()
        # Divided by the processes, because DDP averages the gradients that it sums up.
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
    order = (whole["prompt_mask"].sum(dim=1) + whole["completion_mask"].sum(dim=1)).argsort(stable=True)
    sizes = [len(batch["completion_mask"]) for batch in window]
    return [
        {name: value[rows] if value.ndim else value for name, value in whole.items()} for rows in order.split(sizes)
    ]


def trim_padding(batch: Batch) -> Batch:
    """Move each row to the right, so that all answers end in the last column, and cut the columns that nobody uses.

    A row [pad pad p p | c c pad pad] with room becomes [p p c c]: the batch is as wide as its longest prompt and answer
    together. Where an answer is shorter than the longest, T', the T' completion columns begin with the end of its
    prompt: there `completion_mask`, which is what attention sees, is True and every other per-token tensor is 0.

    Args:
        batch: `prompt_ids` and `prompt_mask` (B, P) padded on the left, `completion_ids` and `completion_mask` (B, T)
            on the right, any other tensors; those of shape (B, T) follow the answers.

    Returns:
        the same names, (B, P') and (B, T').
    """
    # Causal models do not notice: rows stay in order, and positions count real tokens.
    width, lengths = batch["completion_ids"].size(1), batch["completion_mask"].sum(dim=1)
    longest = int(lengths.max())
    shift = longest - lengths

    def is_per_token(name: str, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.ndim == 2 and value.size(1) == width and "prompt" not in name

    cut = {n: _move_right(v[:, :longest], shift) if is_per_token(n, v) else v for n, v in batch.items()}
    rows = {
        kind: _move_right(torch.cat([batch[f"prompt_{kind}"], batch[f"completion_{kind}"][:, :longest]], dim=1), shift)
        for kind in ("ids", "mask")
    }
    used = int(rows["mask"].bool().any(dim=0).int().argmax())
    for kind, row in rows.items():
        cut |= {f"prompt_{kind}": row[:, used:-longest], f"completion_{kind}": row[:, -longest:]}
    return cut


def compute_by_length(
    batch: Batch, size: int, compute: Callable[[Batch], torch.Tensor], *, by_count: bool = False
) -> torch.Tensor:
    """`compute`, (B', T') of trimmed rows, on the rows of a rollout, at most `size` of similar length at a time.

    Args:
        by_count: call `compute` ⌈B / size⌉ times, however long the rows, as processes that must step together need it.

    Returns:
        (B, T) in the order of `batch`, 0 where the completion mask is False.
    """
    mask = batch["completion_mask"].bool()
    lengths = mask.sum(dim=1)
    result: torch.Tensor | None = None
    for rows in similar_lengths(lengths + batch["prompt_mask"].sum(dim=1), size, by_count):
        part = compute(trim_padding({name: value[rows] for name, value in batch.items()}))
        result = part.new_zeros(mask.shape) if result is None else result
        # Answers end in the last column here, and begin in the first one of the rollout.
        kept = torch.arange(part.size(1), device=part.device) >= part.size(1) - lengths[rows].unsqueeze(1)
        result[rows] = result[rows].masked_scatter(mask[rows], part[kept])
    assert result is not None
    return result


def similar_lengths(lengths: torch.Tensor, size: int, by_count: bool = False) -> list[torch.Tensor]:
    """Indices of `lengths` (B,), sorted, in batches of at most `size` with little padding; `by_count`: of `size`."""
    order, known = lengths.argsort(stable=True), lengths.tolist()
    if by_count:
        return list(order.split(size))
    batches = fill(order.tolist(), lambda chosen: rows_cost([known[i] for i in chosen], size), size)
    return [torch.tensor(rows, device=lengths.device) for rows in batches]


def _move_right(values: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Each row of `values` (B, L) moved `shift` (B,) columns to the right; what comes in is 0."""
    source = torch.arange(values.size(1), device=values.device) - shift.unsqueeze(1)
    return values.gather(1, source.clamp(min=0)).masked_fill(source < 0, 0)
