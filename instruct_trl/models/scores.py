"""From token rows to scores: the head's output at the last token of each row.

Legend: N rows (one a completion), T tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from instruct_trl._upstream import score_head


def head_outputs(model: nn.Module, head: nn.Module, input_ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """What the scalar `head` gives for every token of `input_ids` (N, T): (N, T), in the model's dtype.

    The whole model is called, so that wrappers (DDP, FSDP, DeepSpeed, PEFT, autocast) see a forward; the head's output
    is picked up where it leaves the head, before transformers' pooling, which compares tokens with the pad id.

    Raises:
        ValueError: the head does not score every token (an encoder that pools first), or is not the model's any more.
    """
    outputs: list[torch.Tensor] = []
    hook = head.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        model(input_ids=input_ids, use_cache=False, **inputs)
    finally:
        hook.remove()
    if not outputs:
        raise ValueError(
            f"The head of {type(model).__name__} was not called: it was replaced since (merging an adapter does that). "
            "Make the RewardScorer or the trainer from the model as it is now."
        )
    if outputs[-1].shape != (*input_ids.shape, 1):
        raise ValueError(
            f"The head of {type(model).__name__} gave {tuple(outputs[-1].shape)} for input {tuple(input_ids.shape)}: a "
            "reward model needs a decoder whose head scores every token with num_labels=1."
        )
    return outputs[-1].squeeze(-1)


def score_rows(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, head: nn.Module | None = None
) -> torch.Tensor:
    """Scores (N,) in float32, without bias, read at the last token of each row, which its length gives.

    Args:
        model: a sequence classifier with one label, possibly wrapped.
        input_ids, attention_mask: (N, T), padded on the right.
        head: its scalar head; found by name if None, which needs an unwrapped model.

    Raises:
        ValueError: the head does not score every token.
    """
    scores = head_outputs(model, head or score_head(model), input_ids, attention_mask=attention_mask)
    last = attention_mask.sum(dim=1, keepdim=True) - 1
    return scores.gather(1, last).squeeze(1).float()
