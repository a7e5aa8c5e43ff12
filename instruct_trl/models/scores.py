"""From token rows to scores: the head's output at the last token of each row, and the bias.

Legend: N rows (one per completion), T tokens, H hidden units.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from instruct_trl._upstream import backbone, score_head
from instruct_trl.models.logprobs import positions

Scores = TypeVar("Scores", float, torch.Tensor)


def add_reward_bias(scores: Scores, config: Any) -> Scores:
    """Scores or values plus the bias in a reward model's config, by which demonstrations score 0 on average.

    This is the one place where a score gets its bias (Ouyang et al. 2022, section 3.5). `RewardScorer`, `ValueModel`
    and the roles on one base call it, each once; `RankingRewardTrainer.normalize` sets the bias.
    """
    return scores + float(getattr(config, "reward_bias", 0.0))


def token_values(
    model: nn.Module, head: nn.Module, config: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, keep: int
) -> torch.Tensor:
    """The head's output plus the bias after each of N rows' T tokens, or the last `keep`: (N, T) in float32.

    `input_ids` and `attention_mask` are (N, T), padded on either side.
    """
    # Positions count a row's real tokens, so that a value does not depend on the padding's side.
    inputs = {} if config.is_encoder_decoder else {"position_ids": positions(attention_mask), "use_cache": False}
    hidden = backbone(model)(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state
    with head_in_float32(head):
        values = head(hidden[:, -keep:]).squeeze(-1)
    return add_reward_bias(values.float(), config)


@contextmanager
def head_in_float32(head: nn.Module) -> Iterator[None]:
    """While active, the scalar `head` computes in float32, also under autocast and with weights in half precision.

    bf16 would round it: between 4 and 8 its numbers lie 0.03 apart.
    """
    replaced, forward = vars(head).get("forward"), head.forward

    def forward_in_float32(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        weight: Any = getattr(head, "weight", None)
        weight = next(head.parameters()) if weight is None else weight
        linear = type(head) is nn.Linear or hasattr(head, "modules_to_save")  # PEFT's wrapper of a trained head
        with torch.autocast(hidden.device.type, enabled=False):
            if weight.dtype == torch.float32:
                return forward(hidden.float(), *args, **kwargs)
            # ZeRO-3 gathers a weight for its own forward alone, so a shard cannot be cast here.
            if linear and weight.is_floating_point() and not hasattr(weight, "ds_id"):
                bias: Any = head.bias
                return nn.functional.linear(hidden.float(), weight.float(), None if bias is None else bias.float())
            return forward(hidden.to(weight.dtype) if weight.is_floating_point() else hidden, *args, **kwargs)

    # The head is still called as a module, so that what gathers its weights (FSDP, DeepSpeed) sees the call.
    head.forward = forward_in_float32
    try:
        yield
    finally:
        del head.forward
        if replaced is not None:
            head.forward = replaced


def head_outputs(model: nn.Module, head: nn.Module, input_ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """The output of the scalar `head` for every token of `input_ids` (N, T): (N, T), in float32.

    Raises:
        ValueError: the head does not score every token (an encoder that pools first), or is not the model's any more.
    """
    outputs: list[torch.Tensor] = []
    # The whole model is called, so that wrappers (DDP, FSDP, DeepSpeed, PEFT, autocast) see a forward. The output is
    # picked up as it leaves the head, before transformers' pooling, which compares tokens with the pad id.
    with head.register_forward_hook(lambda module, args, output: outputs.append(output)), head_in_float32(head):
        model(input_ids=input_ids, use_cache=False, **inputs)
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
    """Scores (N,) in float32, without bias, of rows (N, T) padded on the right, read at the last token of each.

    A wrapped `model` needs its scalar `head` named; else it is found.
    """
    scores = head_outputs(model, head or score_head(model), input_ids, attention_mask=attention_mask)
    # The length gives the last token. A comparison with the pad id would miss an EOS where the two are one token.
    last = attention_mask.sum(dim=1, keepdim=True) - 1
    return scores.gather(1, last).squeeze(1).float()
