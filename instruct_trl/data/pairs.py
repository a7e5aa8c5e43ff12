"""A (prompt, completion) pair as tokens: one way, shared by training, scoring and RL.

Legend: N rows (one a completion), T tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

Text = str | list[dict[str, Any]]  # plain text, or TRL's conversational messages


def end_of_text(text: str, eos_token: str, truncated: bool = False) -> str:
    """`text` with `eos_token` at its end, once; a text that was cut at a limit (`truncated`) gets none."""
    return text if truncated or text.endswith(eos_token) else text + eos_token


def template_kwargs(example: Mapping[str, Any]) -> dict[str, Any]:
    """What a row's `tools` and `chat_template_kwargs` columns hand to the chat template, as in TRL's RewardTrainer."""
    tools = example.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return {**({"tools": tools} if tools else {}), **(example.get("chat_template_kwargs") or {})}


def tokenize_pair(
    tokenizer: Any, prompt: Text, completion: Text, *, truncated: bool = False, **kwargs: Any
) -> list[int]:
    """Token ids of prompt and completion, tokenised jointly as TRL's RewardTrainer does.

    Plain text ends in the EOS token, conversations in whatever the chat template puts there; a completion that was
    cut at a length limit (`truncated`) ends in its last own token. `kwargs` go to the chat template.

    Raises:
        ValueError: plain text and a tokenizer without EOS, or text mixed with messages.
    """
    if isinstance(prompt, str) and isinstance(completion, str):
        if tokenizer.eos_token is None:
            raise ValueError(
                "The tokenizer has no EOS token, which must end each completion. Set it first, e.g. "
                "processing_class.eos_token = '</s>' (a token of its vocabulary)."
            )
        return tokenizer(text=prompt + end_of_text(completion, tokenizer.eos_token, truncated))["input_ids"]
    if isinstance(prompt, str) or isinstance(completion, str):
        raise ValueError(
            f"Prompt and completion must both be text or both be lists of messages, got {type(prompt).__name__} and "
            f"{type(completion).__name__}."
        )
    if truncated:
        kwargs["continue_final_message"] = True
    messages = [*prompt, *completion]
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **kwargs)["input_ids"]


def pad_rows(rows: Sequence[Sequence[int]], pad_token_id: int, multiple: int | None = None) -> dict[str, torch.Tensor]:
    """Rows of token ids as `input_ids` and `attention_mask`, (N, T) long each, padded on the right.

    >>> pad_rows([[5, 6, 7], [8]], pad_token_id=0)["input_ids"]
    tensor([[5, 6, 7],
            [8, 0, 0]])
    """
    width = max(len(row) for row in rows)
    if multiple:
        width = -(-width // multiple) * multiple
    input_ids = torch.full((len(rows), width), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for index, row in enumerate(rows):
        input_ids[index, : len(row)] = torch.tensor(row)
        attention_mask[index, : len(row)] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}
