"""The γ term of Eq. 2: the pretraining gradient that joins each minibatch's PPO gradient."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from instruct_trl._upstream import fused_head_is_compact
from instruct_trl.data.pretraining import PretrainingStream
from instruct_trl.maths.objectives import ppo_ptx_loss
from instruct_trl.trainers.ppo_ptx_config import PPOPtxConfig


class PretrainingGradient:
    """Accumulates γ·∇ of the mean per-token cross-entropy over `ptx_ratio` × minibatch examples (Eq. 2).

    The mean is over the tokens of the whole minibatch's examples on all processes, so micro-batching does not show.
    """

    def __init__(
        self,
        stream: PretrainingStream,
        args: PPOPtxConfig,
        accelerator: Accelerator,
        autocast: Callable[[], AbstractContextManager],
    ):
        self.stream, self.args, self.accelerator, self.autocast = stream, args, accelerator, autocast
        self._window: list[list[list[int]]] = []
        self._tokens = torch.tensor(0.0)

    def start_minibatch(self) -> None:
        """Draw the minibatch's examples, 8 for each episode (appendix C), and count their tokens."""
        chunk = self.args.per_device_train_batch_size
        count = self.args.gradient_accumulation_steps * self.args.ptx_ratio
        # Sorted, so that a batch has little padding. The longest are popped first: too little memory shows at once.
        rows = sorted(self.stream.draw(chunk * count), key=len)
        self._window = [rows[i * chunk : (i + 1) * chunk] for i in range(count)]
        tokens = torch.tensor(float(sum(len(row) - 1 for row in rows)), device=self.accelerator.device)
        # Divided by the processes, because DDP averages the gradients that it sums up.
        self._tokens = self.accelerator.reduce(tokens, "sum") / self.accelerator.num_processes

    def backward(self, model: Any) -> float:
        """Accumulate one micro-batch's share; returns its part of the minibatch's loss, before γ."""
        total = 0.0
        # TRL's fused head spares the logits, but divides them by the sampling temperature, which text must not see.
        fused = self.args.temperature == 1 and fused_head_is_compact(self.accelerator.device)
        head: dict[str, Any] = {"fused_lm_head": True} if fused else {}
        # The loss is divided by the minibatch's tokens already; DeepSpeed would divide it by the accumulation again.
        unscaled = {"scale_wrt_gas": False} if self.accelerator.distributed_type == DistributedType.DEEPSPEED else {}
        for _ in range(self.args.ptx_ratio):
            batch = self.stream.collate(self._window.pop(), self.accelerator.device)
            with self.autocast():
                loss = model(**batch, num_items_in_batch=self._tokens, use_cache=False, **head).loss
            ptx_loss = ppo_ptx_loss(torch.zeros_like(loss), loss, self.args.ptx_coef)  # Eq. 2, second term
            self.accelerator.backward(ptx_loss, **unscaled)
            total += self.accelerator.reduce(loss.detach(), "mean").item()
        return total
