"""Sampling whole answers from a causal language model, the same way wherever this package does it.

Legend: N completions, B rows in a batch, P prompt tokens, T completion tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm


class Completion(NamedTuple):
    """One sampled answer.

    Attributes:
        text: the answer with special tokens stripped.
        token_ids: its ids, the EOS included when the model ended the answer itself.
        truncated: True when the answer was cut at the length limit, that is, did not end in EOS.
    """

    text: str
    token_ids: list[int]
    truncated: bool


def require_eos(tokenizer: Any) -> int:
    """The id of the EOS token.

    Raises:
        ValueError: the tokenizer has none, so that an answer could neither end nor be seen to be cut.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no EOS token, so an answer could never end. Set `tokenizer.eos_token` to a token of "
            "its vocabulary before passing it (or `eos_token` in the config)."
        )
    return tokenizer.eos_token_id


def encode_prompt(tokenizer: Any, prompt: str | list[dict[str, Any]]) -> list[int]:
    """Token ids of a text prompt, or of messages with the chat template's opening of the answer, as TRL does it."""
    if isinstance(prompt, str):
        return list(tokenizer(text=prompt)["input_ids"])
    return list(
        tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
    )


@contextmanager
def seeded(seed: int, device: torch.device):
    """Run a block with torch's generators at `seed`, and put their state back afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
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
    """Sample from the model's own distribution: no top-k, top-p or repetition penalty, whatever its config says.

    The noise depends on `seed`, the prompts and `batch_size` only, so that two checkpoints answer with the same noise.
    The random state of torch and the train or eval mode of the model are as before afterwards.

    Args:
        model: a causal LM, wrapped by PEFT or not.
        tokenizer: its tokenizer; neither its padding side nor its pad token matters.
        prompts: texts, or conversations as lists of messages.
        max_new_tokens: limit of an answer, in tokens.
        temperature: divides the logits; 0 takes the most likely token (the paper samples at 1).
        batch_size: completions generated at once.
        seed: of the sampling noise.
        num_return_sequences: answers a prompt.
        desc: label of a progress bar; None shows none.

    Returns:
        N = len(prompts) · num_return_sequences completions, those of the first prompt first.

    Raises:
        ValueError: no prompts; an empty one, or one that leaves no room in the model's context; a number out of range;
            a tokenizer without EOS.
    """
    _check_numbers(max_new_tokens, temperature, batch_size, num_return_sequences)
    eos = require_eos(tokenizer)
    encoded = _encode_all(model, tokenizer, prompts, max_new_tokens)
    rows = [ids for ids in encoded for _ in range(num_return_sequences)]
    # Longest first: little padding in a batch, and a batch that does not fit in memory fails at the start.
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    results: dict[int, Completion] = {}
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), tqdm(total=len(rows), desc=desc, disable=desc is None, unit="answer") as bar:
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                # A seed of its own for each batch: one that ends early does not shift the noise of those after it.
                with seeded(seed + start, device):
                    answers = _generate_batch(model, tokenizer, [rows[i] for i in batch], max_new_tokens, temperature)
                for i, ids in zip(batch, answers, strict=True):
                    results[i] = _cut(tokenizer, ids, eos)
                bar.update(len(batch))
    finally:
        model.train(was_training)
    return [results[i] for i in range(len(rows))]


def _generate_batch(
    model: Any, tokenizer: Any, rows: list[list[int]], max_new_tokens: int, temperature: float
) -> list[list[int]]:
    """Answers to B rows, each (T,) with whatever follows the EOS still there."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    width = max(len(ids) for ids in rows)
    device = next(model.parameters()).device
    input_ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in rows], device=device)  # (B, P)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in rows], device=device)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    with contiguous_head_input(model):
        output = model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=pad,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            use_cache=True,
            **sampling,
        )
    return output[:, width:].tolist()


def _cut(tokenizer: Any, ids: list[int], eos: int) -> Completion:
    truncated = eos not in ids
    if not truncated:
        ids = ids[: ids.index(eos) + 1]
    return Completion(tokenizer.decode(ids, skip_special_tokens=True), ids, truncated)


def _check_numbers(max_new_tokens: int, temperature: float, batch_size: int, num_return_sequences: int) -> None:
    for name, value in (
        ("max_new_tokens", max_new_tokens),
        ("batch_size", batch_size),
        ("num_return_sequences", num_return_sequences),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if temperature < 0:
        raise ValueError(f"temperature must be 0 (most likely token) or more, got {temperature}.")


def _encode_all(model: Any, tokenizer: Any, prompts: Sequence[Any], max_new_tokens: int) -> list[list[int]]:
    if len(prompts) == 0:
        raise ValueError("There are no prompts to answer: pass at least one.")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    encoded = []
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, (str, list)) or len(prompt) == 0 or (isinstance(prompt, str) and not prompt.strip()):
            raise ValueError(
                f"Prompt {row} is {prompt!r}; expected a text or a list of messages that is not empty. Drop the row."
            )
        ids = encode_prompt(tokenizer, prompt)
        if context is not None and len(ids) + max_new_tokens > context:
            raise ValueError(
                f"Prompt {row} has {len(ids)} tokens; with {max_new_tokens} new ones it leaves the model's context of "
                f"{context}. Drop or shorten the prompt, or ask for fewer new tokens."
            )
        encoded.append(ids)
    return encoded
