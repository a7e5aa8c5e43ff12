"""The critic of PPO: the value model with its own optimizer, schedule and gradient clip (section 3.5, appendix C).

Legend: B episodes, P prompt tokens, T completion tokens.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from transformers import get_scheduler

from instruct_trl._upstream import critic_optimizer, reshard
from instruct_trl.maths.masking import masked_mean
from instruct_trl.maths.objectives import clipped_value_loss
from instruct_trl.models.role_adapters import ValueRole
from instruct_trl.models.value import ValueModel
from instruct_trl.trainers.engines import prepare_beside_policy
from instruct_trl.trainers.minibatches import Batch, join_rows
from instruct_trl.trainers.ppo_ptx_config import PPOPtxConfig

SCHEDULE_FILE = "value_scheduler.pt"
OPTIMIZER_STEM = "value_optimizer"  # a file, or under DeepSpeed a folder


class Critic:
    """Drives the value model beside the policy: values of a rollout, one clipped update per minibatch.

    Args:
        value_model: gives values (B, P + T) for token rows (B, P + T).
        args: the PPO settings; `value_learning_rate`, `value_clip` and `value_max_grad_norm` are the critic's own.
        accelerator: the trainer's.
        autocast: the trainer's autocast context, so that the value runs at the policy's precision.
    """

    def __init__(
        self,
        value_model: ValueModel | ValueRole,
        args: PPOPtxConfig,
        accelerator: Accelerator,
        autocast: Callable[[], AbstractContextManager],
    ):
        self.args, self.accelerator, self.autocast = args, accelerator, autocast
        if args.gradient_checkpointing:
            value_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        optimizer = critic_optimizer(args, value_model, args.value_learning_rate)
        self.engine = prepare_beside_policy(accelerator, value_model, optimizer, args.value_max_grad_norm, args)
        self.model, self.optimizer = self.engine.model, self.engine.optimizer
        self.scheduler: Any = None

    @property
    def unwrapped(self) -> ValueModel | ValueRole:
        return self.accelerator.unwrap_model(self.model)

    def create_scheduler(self, steps: int) -> None:
        """The policy's schedule over `steps` optimizer steps, around the value model's own peak."""
        kwargs: Any = self.args.lr_scheduler_kwargs
        warmup = self.args.get_warmup_steps(steps)
        self.scheduler = get_scheduler(
            self.args.lr_scheduler_type, self.optimizer, warmup, steps, scheduler_specific_kwargs=kwargs
        )

    def completion_values(self, batch: Batch) -> torch.Tensor:
        """V (B, T) of the state before each completion token."""
        with self.autocast():
            values = self.model(*join_rows(batch), values_to_keep=batch["completion_ids"].size(1) + 1)
        # One token to the left: V must not have seen the token that it is to judge.
        return values[:, :-1]

    @torch.no_grad()
    def rollout_values(self, rows: Batch) -> torch.Tensor:
        """V (B, T) of rows of a rollout, without gradient."""
        self.model.eval()
        return self.completion_values(rows)

    def backward(self, batch: Batch, token_count: torch.Tensor, sync: bool) -> dict[str, torch.Tensor]:
        """Accumulate the gradient of this micro-batch's share of the clipped value loss.

        Args:
            batch: with `old_values`, `returns` and `loss_mask`, each (B, T).
            token_count: completion tokens of the minibatch, divided by the number of processes.
            sync: True on the last micro-batch of the minibatch.

        Returns:
            metrics, each the mean over an answer's tokens, for the answers that count, (N,).
        """
        self.model.train()
        # On a shared base, forward and backward run under the critic's adapters. The backward, too: checkpointing runs
        # the forward again there, under whatever adapter is active then.
        with self.unwrapped.active(), nullcontext() if sync else self.engine.accumulating():
            values = self.completion_values(batch)
            mask = batch["loss_mask"]
            # Clipped around the rollout's values, as PPO clips the ratio; the paper does not publish the value loss.
            losses = clipped_value_loss(values, batch["old_values"], batch["returns"], self.args.value_clip)
            # Divided by the whole minibatch's tokens, as the policy's loss is: 8 micro-batches of 1 row equal 1 of 8.
            self.engine.backward((losses * mask).sum() / token_count, sync)
        clipped = (values.detach() - batch["old_values"]).abs() > self.args.value_clip
        metrics = {"value_loss": losses.detach(), "value_clip_fraction": clipped.float()}
        return {name: masked_mean(value, mask, dim=1)[mask.any(dim=1)] for name, value in metrics.items()}

    def step(self, taken: bool) -> None:
        """Step and advance the schedule, if the step is taken; forget the gradients either way."""
        if taken:
            self.engine.step()
            self.scheduler.step()
        else:
            self.engine.skip_step()

    def save_model(self, folder: str, tokenizer: Any = None) -> None:
        """Write the weights as a plain checkpoint, the tokenizer beside them; called by every process."""
        reshard(self.model)
        weights = self.accelerator.get_state_dict(self.model)
        if self.args.should_save:
            state = {name.removeprefix("classifier."): tensor for name, tensor in weights.items()}
            self.unwrapped.save_pretrained(folder, state_dict=state)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)

    def save(self, checkpoint: str, *_: Any) -> None:
        """Write the weights under `value/`, optimizer and schedule beside them; called by every process."""
        self.save_model(os.path.join(checkpoint, "value"))
        self.engine.save(os.path.join(checkpoint, OPTIMIZER_STEM), self.args.should_save)
        if self.args.should_save:
            torch.save(self.scheduler.state_dict(), os.path.join(checkpoint, SCHEDULE_FILE))

    def load(self, checkpoint: str, *_: Any) -> None:
        """Take up weights, optimizer and schedule from `checkpoint`."""
        self.engine.load(os.path.join(checkpoint, OPTIMIZER_STEM), os.path.join(checkpoint, "value"))
        path = os.path.join(checkpoint, SCHEDULE_FILE)
        self.scheduler.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
