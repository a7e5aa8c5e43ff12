"""`generate` for rollouts: answers that have ended leave the batch, and the sampler's own log-probs can be kept.

Legend: B rows, R rows still open, P prompt tokens, T completion tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from instruct_trl._upstream import can_drop_rows, may_resume_generation
from instruct_trl.models.adapters import without_adapters
from instruct_trl.models.generation import contiguous_head_input


class RolloutGenerate:
    """Stands in for a model's `generate` while a rollout is sampled: same arguments, same answers in distribution.

    transformers computes a row on after its EOS until the last row ends. Here generation stops whenever more than a
    quarter of the rows have ended, and goes on from the same cache without them.

    Args:
        model: the causal LM, unwrapped; its own `generate` does the work.
        eos_token_ids: an answer ends with any of them.
        drop_ended: False leaves ended rows in the batch, as processes that must step together need it.
        temperature: with it, `logps` holds the log-probs of what was drawn; None keeps none.

    Attributes:
        logps: (B, T) of the last call, in float32, from the logits that the sampler saw; one column of logits (B, V) is
            held at a time. Undefined after a row's end.
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
        pad = self.eos_token_ids[0] if pad is None else pad
        answers = torch.full((len(prompt), limit), pad, device=prompt.device)
        self.logps = torch.zeros(answers.shape, device=prompt.device)
        rows, done, cache = torch.arange(len(prompt), device=prompt.device), 0, None
        drop = self.drop_ended and may_resume_generation(without_adapters(self.model), generation_config)
        while len(rows) and done < limit:
            config = copy.copy(generation_config)
            config.max_new_tokens, config.return_dict_in_generate = limit - done, True
            given = kwargs | ({} if cache is None else {"past_key_values": cache})
            stop = EnoughEnded(self.eos_token_ids, len(rows)) if drop else None
            with self._recorded() as recorder, contiguous_head_input(self.model):
                output = self.generate(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    generation_config=config,
                    stopping_criteria=[] if stop is None else [stop],
                    **given,
                )
            new = output.sequences[:, input_ids.size(1) :]
            answers[rows, done : done + new.size(1)] = new
            if recorder is not None:
                self.logps[rows, done : done + new.size(1)] = recorder.finish(new)
            done += new.size(1)
            if stop is None:
                break
            cache = output.past_key_values
            drop = can_drop_rows(cache)
            ended = torch.isin(new, torch.tensor(self.eos_token_ids, device=new.device)).any(dim=1)
            kept = (~ended).nonzero().squeeze(1) if drop else torch.arange(len(rows), device=rows.device)
            if drop:
                cache.batch_select_indices(kept)
            attention_mask = torch.cat([attention_mask, torch.ones_like(new)], dim=1)[kept]
            rows, input_ids = rows[kept], output.sequences[kept]
        return torch.cat([prompt, answers[:, :done]], dim=1)

    @contextmanager
    def _recorded(self) -> Iterator[Any]:
        if self.temperature is None:
            yield None
            return
        recorder = ChosenLogps(self.temperature)
        handle = without_adapters(self.model).register_forward_hook(recorder, with_kwargs=True)
        try:
            yield recorder
        finally:
            handle.remove()


class EnoughEnded:
    """A stopping criterion: all rows stop once more than a quarter of them have drawn an EOS."""

    def __init__(self, eos_token_ids: list[int], rows: int):
        self.eos_token_ids, self.rows = eos_token_ids, rows
        self.ended = torch.zeros(rows, dtype=torch.bool)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """(R,) all True to stop, all False to go on; called after each token with the rows so far, (R, L)."""
        eos = torch.tensor(self.eos_token_ids, device=input_ids.device)
        self.ended = self.ended.to(input_ids.device) | torch.isin(input_ids[:, -1], eos)
        enough = self.ended.sum() > self.rows // 4
        return enough.expand(self.rows)


class ChosenLogps:
    """A forward hook: log-probs of the tokens that are drawn, each read when the next forward brings the token."""

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
        """(R, T) of a call that drew the tokens `drawn` (R, T).

        Forwards beyond them are left out: a process that is through goes on with those of the slower ones, where all
        must call the model equally often, and transformers may run one step more before it looks at the ends.
        """
        if len(self.columns) < drawn.size(1):
            self._read(drawn[:, -1])
        self.logits = None
        return torch.cat(self.columns[: drawn.size(1)], dim=1)


@contextmanager
def replaced_generate(model: Any, generate: RolloutGenerate) -> Iterator[None]:
    """Inside, `model.generate` is `generate`."""
    kept = vars(model).get("generate")
    model.generate = generate
    try:
        yield
    finally:
        del model.generate
        if kept is not None:
            model.generate = kept
