"""Sampling whole answers from a causal language model, the same way wherever this package does it.

Legend: N completions, B rows in a batch, P prompt tokens, T completion tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig

from instruct_trl.data.encoding import encode_prompt as encode_prompt
from instruct_trl.data.encoding import ending_ids, in_row, pad_rows
from instruct_trl.data.rows import check_text
from instruct_trl.models.adapters import without_adapters
from instruct_trl.models.context import refuse_no_room


class Completion(NamedTuple):
    """One sampled answer.

    Attributes:
        text: the answer as it was drawn, special tokens in it included, without the token that ended it.
        token_ids: its ids, with the token that ended it if one did.
        truncated: True when the answer was cut at the length limit: no token of `ending_ids` ended it.
    """

    text: str
    token_ids: list[int]
    truncated: bool


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Run a block with torch's generators at `seed`, and put their state back afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def contiguous_head_input(model: Any) -> Iterator[None]:
    """Inside, the LM head of `model` reads a contiguous copy of its hidden states; the values are the same.

    `generate` projects the slice (B, 1, H) of the prompts' last position. For a slice and a head that is not trained
    torch takes B products in place of one: on a CPU 5 times slower in float32, and with a copy of a bf16 head for each.
    """
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(lambda module, args: tuple(states.contiguous() for states in args))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def neutral_generation_config(model: Any) -> Iterator[None]:
    """Inside, `model.generate` knows no generation config of the model's own.

    transformers fills whatever a call leaves unset from the config that came with the checkpoint. A `min_p` or a
    `suppress_tokens` in it would shape the sample, while our log-probs are those of the plain distribution.
    """
    base = without_adapters(model)
    own, base.generation_config = base.generation_config, GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own


def _check_numbers(temperature: float, **counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if temperature < 0:
        raise ValueError(f"temperature must be 0 (most likely token) or more, got {temperature}.")


def generate_completions(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | list[dict[str, Any]]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    batch_size: int = 8,
    seed: int = 0,
    num_return_sequences: int = 1,
    desc: str | None = None,
) -> list[Completion]:
    """Sample from the model's own distribution, whatever its generation config says, until one of `ending_ids`.

    The noise depends on `seed`, the prompts and `batch_size` only, so that two checkpoints answer with the same noise.
    Afterwards torch's random state and the model's mode are as before.

    Args:
        model: a causal LM, wrapped by PEFT or not.
        tokenizer: its tokenizer; neither its padding side nor its pad token matters.
        prompts: texts, or conversations as lists of messages.
        max_new_tokens: limit of an answer, in tokens.
        temperature: divides the logits; 0 takes the most likely token (the paper samples at 1).
        batch_size: completions generated at once.
        seed: of the sampling noise.
        num_return_sequences: answers per prompt.
        desc: label of a progress bar; None shows none.

    Returns:
        N = len(prompts) · num_return_sequences completions, those of the first prompt first.

    Raises:
        ValueError: no prompts; an empty one, or one that leaves no room in the model's context; a number out of range;
            a tokenizer without EOS.
    """
    _check_numbers(
        temperature, max_new_tokens=max_new_tokens, batch_size=batch_size, num_return_sequences=num_return_sequences
    )
    ends = ending_ids(tokenizer, model)
    encoded = _encode_all(model, tokenizer, prompts, max_new_tokens)
    rows = [ids for ids in encoded for _ in range(num_return_sequences)]
    # Longest first: little padding in a batch, and a batch that does not fit in memory fails at the start.
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    results: dict[int, Completion] = {}
    # These are the whole of a call's settings: nothing but the temperature shapes the distribution.
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {}
    config = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=pad, **sampling)
    device = next(model.parameters()).device
    progress = tqdm(total=len(rows), desc=desc, disable=desc is None, unit="answer")
    with _ready_to_sample(model), progress as bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            # A seed of its own for each batch: one that ends early does not shift the noise of those after it.
            with seeded(seed + start, device):
                answers = _generate_batch(model, config, [rows[i] for i in batch], device)
            for i, ids in zip(batch, answers, strict=True):
                results[i] = _cut(tokenizer, ids, next((token for token in ids if token in ends), ends[0]))
            bar.update(len(batch))
    return [results[i] for i in range(len(rows))]


@contextmanager
def _ready_to_sample(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), neutral_generation_config(model), contiguous_head_input(model):
            yield
    finally:
        model.train(was_training)


def _generate_batch(
    model: Any, config: GenerationConfig, rows: list[list[int]], device: torch.device
) -> list[list[int]]:
    """Answers to B rows, each (T,) with whatever follows its end still there."""
    # Padded on the right back to front, that is on the left: (B, P).
    batch = pad_rows([ids[::-1] for ids in rows], config.pad_token_id)
    batch = {name: tensor.flip(1).to(device) for name, tensor in batch.items()}
    output = model.generate(**batch, generation_config=config)
    return output[:, batch["input_ids"].size(1) :].tolist()


def _cut(tokenizer: Any, ids: list[int], end: int) -> Completion:
    """The answer up to and with its first token `end`, which its text does not show."""
    if end not in ids:
        return Completion(tokenizer.decode(ids), ids, truncated=True)
    length = ids.index(end)
    return Completion(tokenizer.decode(ids[:length]), ids[: length + 1], truncated=False)


def _encode_all(model: Any, tokenizer: Any, prompts: Sequence[Any], max_new_tokens: int) -> list[list[int]]:
    if len(prompts) == 0:
        raise ValueError("There are no prompts to answer: pass at least one.")
    encoded = []
    for row, prompt in enumerate(prompts):
        check_text(prompt, f"Prompt {row}")
        with in_row(f"Prompt {row}"):
            encoded.append(encode_prompt(tokenizer, prompt))
        refuse_no_room(model, "The model", f"prompt {row}", len(encoded[-1]), max_new_tokens, "max_new_tokens")
    return encoded
