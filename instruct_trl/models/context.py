"""How many tokens a model reads at once, and the errors about rows and prompts that do not fit.

Beyond its context a model with learned positions (GPT-2, OPT) has no position to look up and fails deep inside torch;
one with rotary positions leaves the range that it was trained on. The rule is the same for both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset

from instruct_trl.data.encoding import encode_prompt

NAMES = ("max_position_embeddings", "n_positions", "max_seq_len")  # the last is MPT's and DBRX's


def context_length(model: Any) -> int | None:
    """Tokens that `model` (or the model of this config) reads at once; None if its config names no limit."""
    config = getattr(model, "config", model).get_text_config()
    length = next((value for value in (getattr(config, name, None) for name in NAMES) if value), None)
    if length is None or length < 1:  # XLNet's is -1: no limit
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "yarn":  # some configs name the length before stretching
        length = max(length, rope["original_max_position_embeddings"] * rope.get("factor", 1))
    return int(length)


def _reads_at_most(model: Any, role: str) -> str:
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    return f"{role} ({name}) reads at most {context_length(model)} tokens at once (its context)"


def refuse_long_row(tokens: int, what: str, model: Any, role: str, remedy: str) -> None:
    """Raise ValueError if a row of so many `tokens` is longer than the context of `model`.

    `what` and `role` name row and model in the error: "Row 3 of the train dataset", "the reward model". `remedy` says
    what to do, and may hold `{context}`.
    """
    context = context_length(model)
    if context is not None and tokens > context:
        remedy = remedy.format(context=context)
        raise ValueError(f"{what} has {tokens} tokens, but {_reads_at_most(model, role)}. {remedy}")


def refuse_no_room(
    model: Any, role: str, prompt: str, tokens: int, answer: int, setting: str, *, where: str = "", remedy: str = ""
) -> None:
    """Raise ValueError if a prompt of so many `tokens` leaves too little of the model's context for its answer.

    Args:
        role, prompt: name model and prompt, e.g. "The reward model", "prompt 3"; `where` says more about the prompt.
        answer: tokens of the longest answer, which the user sets by the name `setting`.
        remedy: an alternative to a lower `setting`.
    """
    context = context_length(model)
    if context is None or tokens + answer <= context:
        return
    remedy = remedy or "drop or shorten the prompt"
    remedy = f"set {setting} to at most {context - tokens}, or {remedy}" if context > tokens else remedy
    raise ValueError(
        f"{_reads_at_most(model, role)}: too few for {prompt} of {tokens} tokens{where and f' ({where})'} and an "
        f"answer of {setting}={answer}, {tokens + answer} together. {remedy[0].upper()}{remedy[1:]}."
    )


def check_answer_room(
    model: Any, tokenizer: Any, role: str, prompts: Sequence[Any], max_new_tokens: int, setting: str
) -> None:
    """`refuse_no_room` for each of `prompts` (texts or messages), whose answers have up to `max_new_tokens` tokens."""
    if context_length(model) is not None:
        for row, prompt in enumerate(prompts):
            tokens = len(encode_prompt(tokenizer, prompt))
            refuse_no_room(model, role, f"prompt {row}", tokens, max_new_tokens, setting)


def check_rows_fit(dataset: Any, name: str, model: Any, role: str, remedy: str) -> Any:
    """Refuse a tokenised dataset (`input_ids`: a row's tokens, or a list for each completion) that does not fit.

    It may be a Dataset, a stream, which then checks each row as it flows, or a mapping of them by name. The error
    names the row, its tokens, and how many are too long; `role` and `remedy` are as in `refuse_long_row`.
    """
    if isinstance(dataset, Mapping):
        return {key: check_rows_fit(part, f"{name}[{key}]", model, role, remedy) for key, part in dataset.items()}
    context = context_length(model)
    if context is None:
        return dataset
    if isinstance(dataset, IterableDataset):

        def fits(row: Mapping[str, Any], index: int) -> bool:
            if "input_ids" in row:
                refuse_long_row(_longest(row), f"Row {index} of {name}", model, role, remedy)
            return True

        return dataset.filter(fits, with_indices=True)
    if isinstance(dataset, Dataset) and "input_ids" in dataset.column_names:
        names = [column for column in ("input_ids", "seq_lengths") if column in dataset.column_names]
        longest = [_longest(row) for row in dataset.select_columns(names).with_format("numpy")]
        over = [index for index, tokens in enumerate(longest) if tokens > context]
        if over:
            what = f"Row {over[0]} of {name} (one of {len(over)} that do not fit, of {len(longest)})"
            refuse_long_row(longest[over[0]], what, model, role, remedy)
    return dataset


def _longest(row: Mapping[str, Any]) -> int:
    """Tokens of a row, of its longest list, or of the longest part of a packed row; each part starts at position 0."""
    if row.get("seq_lengths") is not None:
        return max(row["seq_lengths"], default=0)
    ids = row["input_ids"]
    return max(map(len, ids)) if len(ids) and np.ndim(ids[0]) else len(ids)
