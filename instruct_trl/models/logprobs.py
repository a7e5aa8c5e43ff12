"""Log-probabilities of completion tokens, projected through the head at completion positions only.

Legend: B rows, P prompt tokens, T completion tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch


def keeps_logits(model: Any) -> bool:
    """True where the model's forward can leave the prompt's logits out (`logits_to_keep`)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(type(getattr(base, "module", base)).forward).parameters


def completion_logps(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    width: int,
    temperature: float = 1.0,
    compute_entropy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log π of the last `width` tokens of each row, and the entropy of each choice.

    TRL's fused head is compact under Triton only: elsewhere it projects every position, prompt and padding included,
    in tiles. On a CPU one projection of the T completion positions is faster (benchmarks/logprobs.py).

    Args:
        input_ids, attention_mask: (B, P + T), completions last.
        width: T.
        temperature: logits are divided by it.
        compute_entropy: also return the entropies, without gradient.

    Returns:
        log-probs (B, T) with gradient if it is enabled, entropies (B, T) in nats or None; float32.
    """
    outputs = model(input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=width + 1, use_cache=False)
    logits = outputs.logits[:, :-1].float() / temperature
    logps = torch.log_softmax(logits, dim=-1)
    chosen = logps.gather(2, input_ids[:, -width:].unsqueeze(2)).squeeze(2)
    if not compute_entropy:
        return chosen, None
    with torch.no_grad():
        return chosen, -(logps.exp() * logps).sum(dim=-1)
