"""Prompts for RL: checked, and the over-long ones dropped and counted."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from datasets import Dataset, IterableDataset

from instruct_trl.data.chat import in_row, without_padding
from instruct_trl.data.checks import check_text, column_names, kind_of, require_columns
from instruct_trl.data.pairs import encode_prompt

logger = logging.getLogger(__name__)

# What a trainer itself hands to reward functions beside a row's own columns.
_HANDED_OVER = (
    *("prompts", "completions", "completion_ids", "prompt_ids", "truncated"),
    *("trainer_state", "log_extra", "log_metric"),
)


def filter_prompts(dataset: Any, tokenizer: Any, max_prompt_length: int | None, name: str) -> Any:
    """Check the `prompt` column; drop prompts of more than `max_prompt_length` tokens, with one line that counts them.

    Columns with a name under which reward functions get something of the trainer's (`completions`, `truncated`, ...)
    are left out, and a line says so. A streamed dataset is checked and filtered as it flows, so its drops cannot be
    counted beforehand. Messages come back without the nulls that Arrow added.

    Raises:
        ValueError: no `prompt` column, a prompt that is empty or no text, one that the chat template refuses, text
            among messages, or none short enough.
    """
    if isinstance(dataset, dict):
        return {k: filter_prompts(part, tokenizer, max_prompt_length, f"{name}[{k}]") for k, part in dataset.items()}
    if not isinstance(dataset, Dataset | IterableDataset):
        return dataset
    require_columns(dataset, ["prompt"], name)
    dataset = without_padding(_without_handed_over(dataset, name))
    if isinstance(dataset, IterableDataset):
        kwargs = {"tokenizer": tokenizer, "limit": max_prompt_length, "name": name}
        return dataset.filter(_fits, with_indices=True, fn_kwargs=kwargs)
    return _filter_rows(dataset, tokenizer, max_prompt_length, name)


def _without_handed_over(dataset: Any, name: str) -> Any:
    taken = [column for column in column_names(dataset) if column in _HANDED_OVER]
    if not taken:
        return dataset
    logger.warning(
        "%s: left out its %s: reward functions get the trainer's own under these names. Rename a column that they are "
        "to read.", name, ", ".join(map(repr, taken)),
    )  # fmt: skip
    return dataset.remove_columns(taken)


def _fits(row: Mapping[str, Any], index: int, tokenizer: Any, limit: int | None, name: str) -> bool:
    length = _checked_length(row.get("prompt"), tokenizer, f"{name}: column 'prompt', row {index}")
    return limit is None or length <= limit


def _checked_length(prompt: Any, tokenizer: Any, place: str) -> int:
    """Tokens of a prompt, which is refused if it is no text, or if the chat template refuses it."""
    check_text(prompt, place)
    with in_row(place):
        return len(encode_prompt(tokenizer, prompt))


def _filter_rows(dataset: Dataset, tokenizer: Any, max_prompt_length: int | None, name: str) -> Dataset:
    prompts = list(dataset["prompt"])
    lengths = []
    for row, prompt in enumerate(prompts):
        place = f"{name}: column 'prompt', row {row}"
        lengths.append(_checked_length(prompt, tokenizer, place))
        if type(prompt) is not type(prompts[0]):
            raise ValueError(
                f"{place} is {kind_of(prompt)}, and row 0 is {kind_of(prompts[0])}. Make all of them plain text, or "
                "all of them lists of messages."
            )
    if max_prompt_length is None or not prompts:
        return dataset
    kept = [row for row, length in enumerate(lengths) if length <= max_prompt_length]
    if not kept:
        raise ValueError(
            f"{name}: all {len(prompts)} prompts are longer than max_prompt_length={max_prompt_length} tokens "
            f"(the shortest has {min(lengths)}). Raise max_prompt_length."
        )
    if len(kept) < len(prompts):
        logger.warning(
            "%s: dropped %d of %d prompts longer than max_prompt_length=%d tokens.",
            name, len(prompts) - len(kept), len(prompts), max_prompt_length,
        )  # fmt: skip
    return dataset.select(kept) if len(kept) < len(prompts) else dataset
