"""Exponential moving average of the policy's weights (Ouyang et al. 2022, appendix C: decay 0.992)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainingArguments

from instruct_trl.trainers.engines import local_shards, local_shards_to_write


class EMACallback(TrainerCallback):
    """Keeps θ_ema ← decay·θ_ema + (1 − decay)·θ after every optimizer step taken, over the trainable parameters.

    θ_ema starts at the initial weights, in float32 and without bias correction. Frozen parameters (a LoRA base) are
    neither copied nor averaged. Under ZeRO-3 and FSDP2 each process averages its own shards.

    Raises:
        ValueError: `decay` is not in [0, 1).
    """

    def __init__(self, model: torch.nn.Module, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {decay}. Set ema_decay to null to keep no average.")
        self.model, self.is_sharded = model, False
        self.shadow = [shard.float().clone() for shard in local_shards(model)]
        self._average = get_ema_multi_avg_fn(decay)

    def follow_layout(self) -> None:
        """Start again from the weights as they lie now, if an engine has sharded them since."""
        shards = local_shards(self.model)
        if any(shard.shape != mine.shape for shard, mine in zip(shards, self.shadow, strict=True)):
            self.is_sharded = True
            self.shadow = [shard.float().clone() for shard in shards]
        self.shadow = [mine.to(shard.device) for shard, mine in zip(shards, self.shadow, strict=True)]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not getattr(kwargs.get("optimizer"), "step_was_skipped", False):
            self.update()

    @torch.no_grad()
    def update(self) -> None:
        """One averaging step."""
        self._average(self.shadow, [shard.float() for shard in local_shards(self.model)], None)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """While active, the model has the averaged weights; on exit, its own come back, also after an error."""
        own = [shard.clone() for shard in local_shards(self.model)]
        self._copy(self.shadow)
        try:
            yield
        finally:
            self._copy(own)

    @torch.no_grad()
    def _copy(self, source: list[torch.Tensor]) -> None:
        with local_shards_to_write(self.model) as shards:
            for shard, value in zip(shards, source, strict=True):
                shard.copy_(value)

    def save(self, checkpoint: str, args: TrainingArguments) -> None:
        """Write the average, or this process's shards of it; called by every process."""
        if args.should_save or self.is_sharded:
            torch.save({"shadow": self.shadow}, self._file(checkpoint, args))

    def load(self, checkpoint: str, args: TrainingArguments) -> None:
        saved = torch.load(self._file(checkpoint, args), map_location="cpu", weights_only=True)["shadow"]
        for mine, theirs in zip(self.shadow, saved, strict=True):
            mine.copy_(theirs)

    def _file(self, checkpoint: str, args: TrainingArguments) -> str:
        return os.path.join(checkpoint, f"ema_{args.process_index}.pt" if self.is_sharded else "ema.pt")
