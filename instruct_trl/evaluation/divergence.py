"""How far a model has moved: the KL divergence of its answers from another model's.

Legend: N answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

Rows = Sequence[tuple[list[int], list[int]]]


@torch.no_grad()
def answer_logprobs(model: Any, rows: Rows, batch_size: int = 16) -> list[float]:
    """log π(answer | prompt) in nats, (N,), at temperature 1; `rows` are (prompt ids, answer ids)."""
    totals: list[float] = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        width = max(len(prompt) + len(answer) for prompt, answer in batch)
        ids = torch.zeros((len(batch), width), dtype=torch.long)
        attention = torch.zeros_like(ids)
        scored = torch.zeros_like(ids, dtype=torch.bool)
        for i, (prompt, answer) in enumerate(batch):
            end = len(prompt) + len(answer)
            ids[i, :end] = torch.tensor([*prompt, *answer])
            attention[i, :end] = 1
            scored[i, len(prompt) : end] = True
        logits = model(input_ids=ids.to(model.device), attention_mask=attention.to(model.device)).logits[:, :-1]
        logps = torch.log_softmax(logits.float(), dim=-1).cpu().gather(2, ids[:, 1:].unsqueeze(2)).squeeze(2)
        totals += (logps * scored[:, 1:]).sum(dim=1).tolist()
    return totals


def mean_answer_kl(model: Any, reference: Any, rows: Rows, batch_size: int = 16) -> float:
    """KL(π ‖ π_ref) in nats an answer, estimated on answers that `model` sampled (k1: unbiased)."""
    own, other = answer_logprobs(model, rows, batch_size), answer_logprobs(reference, rows, batch_size)
    return sum(a - b for a, b in zip(own, other, strict=True)) / len(rows)
