"""Checkpoints: which one is complete, and where inside an iteration a PPO run stands in one.

A checkpoint is complete if every file of it is there, whole, and none is being written anew.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch

MANIFEST = "manifest.json"
STATE = "trainer_state.json"  # Trainer writes it last

# The settings that a trajectory depends on: how many answers, and to which prompts, one step and one iteration use.
SETTINGS = (
    *("generation_batch_size", "num_generations", "num_iterations", "seed", "data_seed", "shuffle_dataset"),
    *("minibatch_size", "per_device_train_batch_size"),
)


def begin_checkpoint(folder: Path) -> None:
    """Call before anything is written: what lies there from an earlier run is no longer complete."""
    for name in (STATE, MANIFEST):
        (folder / name).unlink(missing_ok=True)


def seal_checkpoint(folder: Path) -> None:
    """Note each file's size in bytes; call once every process has written all but `trainer_state.json`."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST]
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    (folder / MANIFEST).write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")


def is_complete(folder: Path) -> bool:
    """True if `trainer_state.json` can be read and every file of the manifest has its size.

    The checkpoints of other trainers have no manifest: there the state, written last, decides.
    """
    try:
        json.loads((folder / STATE).read_text(encoding="utf-8"))
        manifest = folder / MANIFEST
        sizes = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else {}
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def last_complete_checkpoint(folder: str | os.PathLike[str], newest: float = math.inf) -> str | None:
    """The complete `checkpoint-N` in `folder` with the highest N up to `newest`, or None."""
    steps = [name.removeprefix("checkpoint-") for name in (os.listdir(folder) if os.path.isdir(folder) else [])]
    for step in sorted((int(step) for step in steps if step.isdecimal()), reverse=True):
        checkpoint = Path(folder, f"checkpoint-{step}")
        if step <= newest and is_complete(checkpoint):
            return str(checkpoint)
    return None


def checkpoint_to_resume(folder: str) -> str:
    """The newest complete checkpoint, for `resume_from_checkpoint=True`."""
    checkpoint = last_complete_checkpoint(folder)
    if checkpoint is None:
        raise ValueError(
            f"resume_from_checkpoint=True, but {folder} holds no complete checkpoint. Leave it out to start afresh."
        )
    return checkpoint


# The place of a PPO run inside an iteration ---------------------------------------------------------------------------


def save_rollout(checkpoint: str, args: Any, step: int, buffered_inputs: Any, pretraining_position: int) -> None:
    """Write the rollout of this process, its micro-batch `step`, and how many pretraining texts were drawn."""
    position = {
        "step": step,
        "processes": args.world_size,
        "settings": {name: getattr(args, name) for name in SETTINGS},
        "micro_batches": args.steps_per_generation * args.num_iterations,  # of an iteration
        "buffered_inputs": buffered_inputs,
        "pretraining_position": pretraining_position,
    }
    torch.save(position, os.path.join(checkpoint, f"rollout_{args.process_index}.pt"))


def load_rollout(checkpoint: str, args: Any) -> tuple[int, Any, int]:
    """Read `step`, `buffered_inputs` and `pretraining_position` back.

    Raises:
        ValueError: the checkpoint is not one of PPO-ptx, or was written under settings that make another trajectory.
    """
    path = os.path.join(checkpoint, f"rollout_{args.process_index}.pt")
    remedy = "Resume with the number of processes that the run had, or start afresh."
    if not os.path.isfile(path):
        raise ValueError(
            f"{checkpoint} holds no {os.path.basename(path)}: it was not written by PPOPtxTrainer on this many "
            f"processes. {remedy}"
        )
    device = args.device  # on two CPU processes it is cpu:0, and torch does not restore to that
    position = torch.load(path, map_location="cpu" if device.type == "cpu" else device, weights_only=True)
    if position["processes"] != args.world_size:
        raise ValueError(
            f"{checkpoint} was written by {position['processes']} processes, these are {args.world_size}. {remedy}"
        )
    step, before = position["step"], position["settings"]
    iterations, inside = divmod(step, position["micro_batches"])
    changed = [name for name in SETTINGS if before[name] != getattr(args, name)]
    if not inside:  # no micro-batch of a rollout is left, so they may have another size now
        step = iterations * args.steps_per_generation * args.num_iterations
        changed = [name for name in changed if name != "per_device_train_batch_size"]
    if changed:
        was = ", ".join(f"{name}={before[name]}" for name in changed)
        asked = ", ".join(f"{name}={getattr(args, name)}" for name in changed)
        raise ValueError(
            f"{checkpoint} was written with {was}, and this run has {asked}: it would go on with other prompts, or "
            "with other minibatches of its rollout. Resume with the settings that the run had, or start a run of its "
            "own from the policy that the checkpoint holds."
        )
    return step, position["buffered_inputs"], position["pretraining_position"]
