"""Sampling whole answers from a causal language model: for evaluation, and for the rollouts of PPO.

Legend: N completions, B rows in a batch, R rows still open, P prompt tokens, T completion tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig

from instruct_trl._upstream import can_drop_rows, may_resume_generation
from instruct_trl.data.encoding import encode_prompt as encode_prompt
from instruct_trl.data.encoding import ending_ids, in_row, pad_rows
from instruct_trl.data.rows import check_text
from instruct_trl.models.adapters import without_adapters
from instruct_trl.models.context import refuse_no_room


class Completion(NamedTuple):
    """One sampled answer."""

    text: str  # as it was drawn, special tokens in it included, without the token that ended it
    token_ids: list[int]  # with the token that ended it, if one did
    truncated: bool  # cut at the length limit: no token of `ending_ids` ended it


def contiguous_head_input(model: Any) -> AbstractContextManager[Any]:
    """While active, the LM head of `model` reads a contiguous copy of its hidden states; the values are the same.

    `generate` projects the slice (B, 1, H) of the prompts' last position. For a slice and a head that is not trained
    torch takes B products in place of one: on a CPU 5 times slower in float32, and with a copy of a bf16 head for each.
    """
    head = model.get_output_embeddings()
    if head is None:
        return nullcontext()
    return head.register_forward_pre_hook(lambda module, args: tuple(states.contiguous() for states in args))


@contextmanager
def neutral_generation_config(model: Any) -> Iterator[None]:
    """While active, `model.generate` knows no generation config of the model's own.

    transformers fills whatever a call leaves unset from the config that came with the checkpoint. A `min_p` or a
    `suppress_tokens` in it would shape the sample, while our log-probs are those of the plain distribution.
    """
    base = without_adapters(model)
    own, base.generation_config = base.generation_config, GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own


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
        temperature: divides the logits; 0 takes the most likely token (the paper samples at 1).
        batch_size: completions generated at once.
        num_return_sequences: answers per prompt.

    Returns:
        N = len(prompts) · num_return_sequences completions, those of the first prompt first.

    Raises:
        ValueError: bad prompts, or one that leaves no room in the context; a number out of range; no EOS.
    """
    counts = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "num_return_sequences": num_return_sequences}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if temperature < 0:
        raise ValueError(f"temperature must be 0 (most likely token) or more, got {temperature}.")
    ends = ending_ids(tokenizer, model)
    rows = [ids for ids in _encode_all(model, tokenizer, prompts, max_new_tokens) for _ in range(num_return_sequences)]
    # Longest first: little padding in a batch, and a batch that does not fit in memory fails at the start.
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    results: dict[int, Completion] = {}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    # top_k must be named: 50 is the default of `generate`, and the sample would lose the tail of the distribution.
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {}
    config = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=pad, **sampling)
    device = next(model.parameters()).device
    progress = tqdm(total=len(rows), desc=desc, disable=desc is None, unit="answer")
    with _ready_to_sample(model, device), progress as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            # A seed of its own for each batch: one that ends early does not shift the noise of those after it.
            torch.manual_seed(seed + start)
            # Rows end side by side, so that all go on at one place: padded on the left, (B, P).
            padded = pad_rows([rows[i][::-1] for i in chosen], pad)
            batch: dict[str, torch.Tensor] = {name: tensor.flip(1).to(device) for name, tensor in padded.items()}
            answers = model.generate(**batch, generation_config=config)[:, batch["input_ids"].size(1) :].tolist()
            for i, ids in zip(chosen, answers, strict=True):
                results[i] = _cut(tokenizer, ids, next((token for token in ids if token in ends), ends[0]))
            bar.update(len(chosen))
    return [results[i] for i in range(len(rows))]


@contextmanager
def _ready_to_sample(model: Any, device: torch.device) -> Iterator[None]:
    was_training = model.training
    model.eval()
    generators = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    try:
        with torch.no_grad(), generators, neutral_generation_config(model), contiguous_head_input(model):
            yield
    finally:
        model.train(was_training)


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


# Rollouts -----------------------------------------------------------------------------------------------------------


class RolloutGenerate:
    """Stands in for a model's `generate` while a rollout is sampled: same arguments, same answers in distribution.

    transformers keeps computing a row after its EOS until the last row ends. Here generation stops whenever more than a
    quarter of the rows have ended, and goes on from the same cache without them.

    Args:
        model: the causal LM, unwrapped; its own `generate` does the work.
        drop_ended: False leaves ended rows in the batch, as processes that must step together need it.
        temperature: with it, `logps` are the log-probs (B, T) of what the last call drew, from the logits that the
            sampler saw, in float32, undefined after a row's end.
    """

    def __init__(
        self, model: Any, eos_token_ids: list[int], *, drop_ended: bool = True, temperature: float | None = None
    ):
        self.model, self.generate = model, model.generate
        self.eos_token_ids, self.drop_ended, self.temperature = eos_token_ids, drop_ended, temperature
        self.logps = torch.empty(0, 0)

    def __call__(
        self, *, input_ids: torch.Tensor, attention_mask: torch.Tensor, generation_config: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Prompts and answers, (B, P + T), as `generate` returns them."""
        prompt, limit = input_ids, generation_config.max_new_tokens
        pad = generation_config.pad_token_id
        ends = torch.tensor(self.eos_token_ids, device=prompt.device)
        answers = torch.full((len(prompt), limit), self.eos_token_ids[0] if pad is None else pad, device=prompt.device)
        self.logps = torch.zeros(answers.shape, device=prompt.device)
        rows, done = torch.arange(len(prompt), device=prompt.device), 0
        base = without_adapters(self.model)
        drop = self.drop_ended and may_resume_generation(base, generation_config)
        while len(rows) and done < limit:
            width, stops = input_ids.size(1), drop

            def enough_ended(ids: torch.Tensor, scores: Any, width: int = width, **_: Any) -> torch.Tensor:
                # A restart costs a little. A quarter pays for it, and one ended row would not.
                ended = torch.isin(ids[:, width:], ends).any(dim=1)
                return (ended.sum() > len(ended) // 4).expand(len(ended))

            config = copy.copy(generation_config)
            config.max_new_tokens, config.return_dict_in_generate = limit - done, True
            recorder = None if self.temperature is None else ChosenLogps(self.temperature)
            recorded = nullcontext() if recorder is None else base.register_forward_hook(recorder, with_kwargs=True)
            with recorded, contiguous_head_input(self.model):
                output = self.generate(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    generation_config=config,
                    stopping_criteria=[enough_ended] if stops else [],
                    **kwargs,
                )
            new = output.sequences[:, width:]
            answers[rows, done : done + new.size(1)] = new
            if recorder is not None:
                self.logps[rows, done : done + new.size(1)] = recorder.finish(new)
            done += new.size(1)
            if not stops:
                break
            kwargs["past_key_values"] = cache = output.past_key_values
            kept = torch.arange(len(rows), device=rows.device)
            # Which cache an architecture fills shows after the first call. One that cannot be cut keeps all rows.
            drop = can_drop_rows(cache)
            if drop:
                kept = kept[~torch.isin(new, ends).any(dim=1)]
                cache.batch_select_indices(kept)
            attention_mask = torch.cat([attention_mask, torch.ones_like(new)], dim=1)[kept]
            rows, input_ids = rows[kept], output.sequences[kept]
        return torch.cat([prompt, answers[:, :done]], dim=1)


class ChosenLogps:
    """A forward hook: log-probs of the tokens that are drawn, each read when the next forward brings the token.

    So one column of logits (R, V) is held at a time.
    """

    def __init__(self, temperature: float):
        self.temperature = temperature
        self.columns: list[torch.Tensor] = []
        self.logits: torch.Tensor | None = None

    def __call__(self, module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        self._read(kwargs["input_ids"][:, -1])
        self.logits = output.logits[:, -1]

    def _read(self, tokens: torch.Tensor) -> None:
        if self.logits is not None:
            logps = (self.logits.float() / self.temperature).log_softmax(dim=-1)
            self.columns.append(logps.gather(1, tokens.unsqueeze(1)))

    def finish(self, drawn: torch.Tensor) -> torch.Tensor:
        """(R, T) of a call that drew the tokens `drawn` (R, T)."""
        if len(self.columns) < drawn.size(1):
            self._read(drawn[:, -1])
        self.logits = None
        # There may be forwards beyond the end: processes that must call the model equally often wait for the slowest,
        # and transformers may run one step more before it looks at the ends.
        return torch.cat(self.columns[: drawn.size(1)], dim=1)


@contextmanager
def replaced_generate(model: Any, generate: RolloutGenerate) -> Iterator[None]:
    """While active, `model.generate` is `generate`."""
    kept = vars(model).get("generate")
    model.generate = generate
    try:
        yield
    finally:
        del model.generate
        if kept is not None:
            model.generate = kept
