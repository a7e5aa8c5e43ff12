"""Exponential moving average of the policy's weights (Ouyang et al. 2022, appendix C: decay 0.992)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback


class EMACallback(TrainerCallback):
    """Keeps θ_ema ← decay·θ_ema + (1 − decay)·θ after every optimizer step taken, over the trainable parameters.

    θ_ema starts at the initial weights. Frozen parameters (a LoRA base) are neither copied nor averaged.

    Raises:
        ValueError: `decay` is not in [0, 1).
    """

    def __init__(self, model: torch.nn.Module, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {decay}. Set ema_decay to null to keep no average.")
        self.decay = decay
        self.model = model
        self.shadow = [parameter.detach().clone() for parameter in self._trainable()]
        self._average = get_ema_multi_avg_fn(decay)

    def _trainable(self) -> list[torch.Tensor]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not getattr(kwargs.get("optimizer"), "step_was_skipped", False):
            self.update()

    @torch.no_grad()
    def update(self) -> None:
        """One averaging step."""
        self._average(self.shadow, [parameter.detach() for parameter in self._trainable()], None)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model carries the averaged weights; on leaving, its own come back, also after an error."""
        own = [parameter.detach().clone() for parameter in self._trainable()]
        self._copy(self.shadow)
        try:
            yield
        finally:
            self._copy(own)

    @torch.no_grad()
    def _copy(self, source: list[torch.Tensor]) -> None:
        for parameter, value in zip(self._trainable(), source, strict=True):
            parameter.copy_(value)

    def state_dict(self) -> dict[str, list[torch.Tensor]]:
        return {"shadow": self.shadow}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, list[torch.Tensor]]) -> None:
        for mine, saved in zip(self.shadow, state["shadow"], strict=True):
            mine.copy_(saved)
