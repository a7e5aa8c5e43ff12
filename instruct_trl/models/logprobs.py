"""Log-probabilities of completion tokens, projected through the head at completion positions only.

Legend: B rows, P prompt tokens, T completion tokens, N scored tokens of all rows, H hidden, V vocabulary.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from instruct_trl.models.adapters import without_adapters

BLOCK = 32  # rows of logits worked on at once where no gradient is kept: they stay near the processor


def forward_takes(model: Any, argument: str) -> bool:
    """True if the forward of the causal LM inside `model` has this argument: `logits_to_keep`, `position_ids`."""
    return argument in inspect.signature(type(_unwrapped(model)).forward).parameters


def _unwrapped(model: Any) -> Any:
    """The causal LM inside a wrapper for distributed training or adapters."""
    return without_adapters(getattr(model, "module", model))


def completion_logps(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    width: int,
    temperature: float = 1.0,
    compute_entropy: bool = False,
    scored: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log π of the last `width` tokens of each row, and the entropy of each choice.

    TRL's fused head is compact under Triton only: without it every position is projected, prompt and padding included,
    in tiles. On a CPU one projection of the N scored positions alone is faster (benchmarks/logprobs.py).

    Args:
        input_ids, attention_mask: (B, P + T), completions last; positions count a row's real tokens.
        width: T.
        temperature: logits are divided by it.
        compute_entropy: also return the entropies, without gradient.
        scored: (B, T) True for the tokens that are asked for; default: those with attention mask 1.

    Returns:
        log-probs (B, T) with gradient if it is enabled, entropies (B, T) in nats or None; float32, 0 if not scored.
    """
    scored = (attention_mask[:, -width:] if scored is None else scored).bool()
    # Token t is chosen from the logits at t - 1: the mask moves one place to the left, (B, T + 1).
    kept = torch.nn.functional.pad(scored, (0, 1))
    base = _unwrapped(model)
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if forward_takes(base, "position_ids"):
        inputs["position_ids"] = positions(attention_mask)
    # The head gets the N scored positions as one row (1, N, H): no logits of prompts or padding are ever made.
    head = base.get_output_embeddings()
    with head.register_forward_pre_hook(lambda module, args: (args[0][kept].unsqueeze(0), *args[1:])):
        logits = model(**inputs, logits_to_keep=width + 1).logits
    # A forward that does not call the head as a module passes the hook by, and gives (B, T + 1, V).
    logits = logits[0] if logits.shape[:2] != kept.shape else logits[kept]  # (N, V)
    logits = logits.float() if temperature == 1.0 else logits.float() / temperature
    chosen, entropy = _of_choices(logits, input_ids[:, -width:][scored], compute_entropy)
    empty = chosen.new_zeros(scored.shape)
    return empty.masked_scatter(scored, chosen), None if entropy is None else empty.masked_scatter(scored, entropy)


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """The place of each real token in its row, (B, L), from 0; padding on the left does not count."""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def _of_choices(
    logits: torch.Tensor, targets: torch.Tensor, compute_entropy: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log-probs (N,) of `targets` (N,) under `logits` (N, V), and the entropies (N,) without gradient or None."""
    places = targets.unsqueeze(1)
    if not torch.is_grad_enabled() and not compute_entropy:
        # In blocks, so that no second (N, V) is ever held.
        blocks = zip(logits.split(BLOCK), places.split(BLOCK), strict=True)
        return torch.cat([block.log_softmax(dim=-1).gather(1, place).squeeze(1) for block, place in blocks]), None
    logps = logits.log_softmax(dim=-1)
    entropy = None
    if compute_entropy:
        with torch.no_grad():
            entropy = torch.cat([-(block.exp() * block).sum(dim=-1) for block in logps.split(BLOCK)])
    return logps.gather(1, places).squeeze(1), entropy
