"""Prompts for RL: checked, and the over-long ones dropped and counted."""

from __future__ import annotations

import logging
from typing import Any

from datasets import Dataset, IterableDataset

from instruct_trl.data.checks import require_columns
from instruct_trl.data.pairs import encode_prompt

logger = logging.getLogger(__name__)


def filter_prompts(dataset: Any, tokenizer: Any, max_prompt_length: int | None, name: str) -> Any:
    """Check the `prompt` column; drop prompts of more than `max_prompt_length` tokens, with one line that counts them.

    A streamed dataset is filtered as it flows, so its drops cannot be counted beforehand.

    Raises:
        ValueError: no `prompt` column, an empty prompt, or none short enough.
    """
    if isinstance(dataset, dict):
        return {k: filter_prompts(part, tokenizer, max_prompt_length, f"{name}[{k}]") for k, part in dataset.items()}
    if isinstance(dataset, IterableDataset):
        limit = max_prompt_length or float("inf")
        return dataset.filter(lambda row: len(encode_prompt(tokenizer, row["prompt"])) <= limit)
    if not isinstance(dataset, Dataset):
        return dataset
    return _filter_rows(dataset, tokenizer, max_prompt_length, name)


def _filter_rows(dataset: Dataset, tokenizer: Any, max_prompt_length: int | None, name: str) -> Dataset:
    require_columns(dataset, ["prompt"], name)
    prompts = list(dataset["prompt"])
    for row, prompt in enumerate(prompts):
        if not prompt or (isinstance(prompt, str) and not prompt.strip()):
            raise ValueError(f"{name}: column `prompt`, row {row} is empty ({prompt!r}). Filter empty prompts out.")
    if max_prompt_length is None or not prompts:
        return dataset
    lengths = [len(encode_prompt(tokenizer, prompt)) for prompt in prompts]
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
