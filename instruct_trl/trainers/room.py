"""Before PPO samples anything: do prompt and answer fit into every model that reads them?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from datasets import Dataset, IterableDataset

from instruct_trl._upstream import rollout_prompt_ids
from instruct_trl.data.encoding import encode_prompt
from instruct_trl.models.context import context_length, refuse_no_room
from instruct_trl.models.reward import RewardScorer
from instruct_trl.trainers.ppo_ptx_setup import same_tokens
from instruct_trl.trainers.run_checks import check_run

CHUNK = 1000  # prompts tokenised at once


class Reader(NamedTuple):
    """A model of the run with a limited context, and the tokenizer by which it reads a prompt; None: the policy's."""

    model: Any
    role: str
    tokenizer: Any = None


def check_rollouts(trainer: Any, value_model: Any, ref_model: Any) -> None:
    """Refuse a run without a whole rollout of prompts, and prompts whose answers do not fit (see `check_room`).

    Raises:
        ValueError: with the numbers and what to set.
    """
    args = trainer.args
    needed = args.generation_batch_size // args.num_generations
    sizes = f"generation_batch_size={args.generation_batch_size}, num_generations={args.num_generations}"
    check_run(trainer, needed, f"one rollout takes {needed} different prompts ({sizes})")
    check_room(trainer, value_model, ref_model)


def check_room(trainer: Any, value_model: Any, ref_model: Any) -> None:
    """Refuse prompts that, with an answer of `max_completion_length`, exceed the context of a model of the run.

    A stream is checked prompt by prompt as it flows.

    Raises:
        ValueError: naming the model, its context, the prompt, both lengths and what to set.
    """
    readers = _readers(trainer, value_model, ref_model)
    if not readers or trainer._is_vlm or trainer.environment_factories is not None:  # images, tools of each prompt
        return
    trainer.train_dataset = _check_prompts(trainer, trainer.train_dataset, "train_dataset", readers)
    trainer.eval_dataset = _check_prompts(trainer, trainer.eval_dataset, "eval_dataset", readers)


def _readers(trainer: Any, value_model: Any, ref_model: Any) -> list[Reader]:
    """The models with a limit, the tightest first; of those that read the policy's tokens only that one."""
    same = [Reader(trainer.model, "The policy"), Reader(value_model, "The value model")]
    if ref_model is not None:
        same.append(Reader(ref_model, "The reference model"))
    others: list[Reader] = []
    for scorer in trainer.reward_funcs:
        if isinstance(scorer, RewardScorer):
            reads_alike = same_tokens(scorer.processing_class, trainer._tokenizer)
            reader = Reader(scorer.model, "The reward model", None if reads_alike else scorer.processing_class)
            (same if reads_alike else others).append(reader)
    limited = sorted((r for r in same if context_length(r.model)), key=lambda r: context_length(r.model) or 0)
    return limited[:1] + [reader for reader in others if context_length(reader.model)]


def _check_prompts(trainer: Any, dataset: Any, name: str, readers: list[Reader]) -> Any:
    if isinstance(dataset, Mapping):
        return {key: _check_prompts(trainer, part, f"{name}[{key}]", readers) for key, part in dataset.items()}
    if isinstance(dataset, IterableDataset):

        def fits(row: Mapping[str, Any], index: int) -> bool:
            for reader in readers:
                _refuse(trainer, reader, len(_token_ids(trainer, reader, [row["prompt"]])[0]), f"{name}, row {index}")
            return True

        return dataset.filter(fits, with_indices=True)
    if isinstance(dataset, Dataset):
        for reader in readers:
            if not _fits_by_limits(trainer, reader):
                tokens, row = max(_lengths(trainer, reader, dataset), key=lambda pair: pair[0], default=(0, 0))
                _refuse(trainer, reader, tokens, f"{name}, row {row}, the longest of {len(dataset)}")
    return dataset


def _fits_by_limits(trainer: Any, reader: Reader) -> bool:
    """True where no prompt needs to be counted: `max_prompt_length` has dropped what would not fit.

    Prompts were counted without tools and template settings, which may lengthen them.
    """
    args, settings = trainer.args, (trainer.tools, trainer.chat_template, trainer.chat_template_kwargs)
    counted = args.max_prompt_length is not None and reader.tokenizer is None and not any(settings)
    return counted and args.max_prompt_length + args.max_completion_length <= context_length(reader.model)


def _lengths(trainer: Any, reader: Reader, dataset: Dataset) -> Iterator[tuple[int, int]]:
    """(tokens, row) of each prompt."""
    for start in range(0, len(dataset), CHUNK):
        prompts = dataset[start : start + CHUNK]["prompt"]
        for row, ids in enumerate(_token_ids(trainer, reader, prompts), start=start):
            yield len(ids), row


def _token_ids(trainer: Any, reader: Reader, prompts: list[Any]) -> list[list[int]]:
    if reader.tokenizer is None:
        return rollout_prompt_ids(trainer, prompts)
    return [encode_prompt(reader.tokenizer, prompt) for prompt in prompts]


def _refuse(trainer: Any, reader: Reader, tokens: int, where: str) -> None:
    args, context = trainer.args, context_length(reader.model) or 0
    limit, remedy = context - args.max_completion_length, "choose a model with a longer context"
    if limit > 0:
        remedy = f"set max_prompt_length={limit}, by which longer prompts are dropped and counted, or {remedy}"
    where = f"{where}; max_prompt_length={args.max_prompt_length}"
    answer = args.max_completion_length, "max_completion_length"
    refuse_no_room(reader.model, reader.role, "a prompt", tokens, *answer, where=where, remedy=remedy)
