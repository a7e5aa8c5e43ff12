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
        "settings": _settings(trainer),
        "micro_batches": _micro_batches(trainer),
        "buffered_inputs": trainer._buffered_inputs,
        "pretraining_position": 0 if trainer.pretraining is None else trainer.pretraining.stream.position,
    }
    torch.save(position, _rollout_file(trainer, checkpoint))


def load_state(trainer: Any, checkpoint: str) -> None:
    """Take up what `save_state` wrote.

    Raises:
        ValueError: the checkpoint is not one of PPO-ptx, or was written under settings that make another trajectory.
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
    if "settings" in position:
        _check_settings(trainer, position, checkpoint)
    trainer.critic.load(checkpoint)
    if trainer.ema is not None:
        trainer.ema.load_state_dict(torch.load(_ema_file(trainer, checkpoint), map_location="cpu", weights_only=True))
    trainer._step, trainer._buffered_inputs = position["step"], position["buffered_inputs"]
    if "settings" in position and trainer._step % position["micro_batches"] == 0:  # which may be of another size now
        trainer._step = trainer._step // position["micro_batches"] * _micro_batches(trainer)
    if trainer.pretraining is not None:
        trainer.pretraining.stream.position = position["pretraining_position"]


def _settings(trainer: Any) -> dict[str, Any]:
    """What a trajectory depends on: how many answers to which prompts a step and an iteration take."""
    names = ("generation_batch_size", "num_generations", "num_iterations", "seed", "data_seed", "shuffle_dataset")
    return {name: getattr(trainer.args, name) for name in (*names, "minibatch_size", "per_device_train_batch_size")}


def _micro_batches(trainer: Any) -> int:
    """Micro-batches of one iteration on one process."""
    return trainer.args.steps_per_generation * trainer.num_iterations


def _check_settings(trainer: Any, position: dict[str, Any], checkpoint: str) -> None:
    before, now = position["settings"], _settings(trainer)
    changed = [name for name in now if before[name] != now[name]]
    if position["step"] % position["micro_batches"] == 0 and "per_device_train_batch_size" in changed:
        changed.remove("per_device_train_batch_size")  # no micro-batch of a rollout is left
    if changed:
        was, asked = (", ".join(f"{name}={values[name]}" for name in changed) for values in (before, now))
        raise ValueError(
            f"{checkpoint} was written with {was}, and this run has {asked}: it would go on from there with other "
            "prompts, or with other minibatches of the rollout that it stands in. Resume with the settings that the "
            "run had, or start a run of its own from the policy that the checkpoint holds."
        )


def _rollout_file(trainer: Any, checkpoint: str) -> str:
    return os.path.join(checkpoint, f"rollout_{trainer.args.process_index}.pt")


def _ema_file(trainer: Any, checkpoint: str) -> str:
    name = f"ema_{trainer.args.process_index}.pt" if trainer.ema.is_sharded else "ema.pt"
    return os.path.join(checkpoint, name)
