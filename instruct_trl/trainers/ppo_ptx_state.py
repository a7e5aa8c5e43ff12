"""What a PPO-ptx checkpoint holds beside the policy's: critic, average, and the positions in rollout and text."""

from __future__ import annotations

import os
from typing import Any

import torch


def save_state(trainer: Any, checkpoint: str) -> None:
    """Write critic and EMA, and the rollout position of this process; called by every process."""
    os.makedirs(checkpoint, exist_ok=True)
    trainer.critic.save(checkpoint)
    if trainer.ema is not None and (trainer.args.should_save or trainer.ema.is_sharded):
        torch.save(trainer.ema.state_dict(), _ema_file(trainer, checkpoint))
    position = {
        "step": trainer._step,
        "processes": trainer.args.world_size,
        "buffered_inputs": trainer._buffered_inputs,
        "pretraining_position": 0 if trainer.pretraining is None else trainer.pretraining.stream.position,
    }
    torch.save(position, _rollout_file(trainer, checkpoint))


def load_state(trainer: Any, checkpoint: str) -> None:
    """Take up what `save_state` wrote.

    Raises:
        ValueError: the checkpoint is not one of PPO-ptx.
    """
    path = _rollout_file(trainer, checkpoint)
    if not os.path.isfile(path):
        raise ValueError(
            f"{checkpoint} holds no {os.path.basename(path)}: it was not written by PPOPtxTrainer on this many "
            "processes. Resume with the number of processes that the run had, or start afresh."
        )
    device = trainer.args.device  # on two CPU processes it is cpu:0, to which torch does not restore
    position = torch.load(path, map_location="cpu" if device.type == "cpu" else device, weights_only=True)
    if position["processes"] != trainer.args.world_size:
        raise ValueError(
            f"{checkpoint} was written by {position['processes']} processes, these are {trainer.args.world_size}. "
            "Resume with the number of processes that the run had, or start afresh."
        )
    trainer.critic.load(checkpoint)
    if trainer.ema is not None:
        trainer.ema.load_state_dict(torch.load(_ema_file(trainer, checkpoint), map_location="cpu", weights_only=True))
    trainer._step, trainer._buffered_inputs = position["step"], position["buffered_inputs"]
    if trainer.pretraining is not None:
        trainer.pretraining.stream.position = position["pretraining_position"]


def _rollout_file(trainer: Any, checkpoint: str) -> str:
    return os.path.join(checkpoint, f"rollout_{trainer.args.process_index}.pt")


def _ema_file(trainer: Any, checkpoint: str) -> str:
    name = f"ema_{trainer.args.process_index}.pt" if trainer.ema.is_sharded else "ema.pt"
    return os.path.join(checkpoint, name)
