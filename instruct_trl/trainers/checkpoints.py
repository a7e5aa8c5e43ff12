"""Which checkpoint is complete: every file of it is there, whole, and nothing of it is being written anew."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

MANIFEST = "manifest.json"
STATE = "trainer_state.json"  # what the Trainer writes last


def begin_checkpoint(folder: Path) -> None:
    """Before anything is written: what lies there from an earlier run is no longer complete."""
    for name in (STATE, MANIFEST):
        (folder / name).unlink(missing_ok=True)


def seal_checkpoint(folder: Path) -> None:
    """After everything but `trainer_state.json` is written, by every process: note each file's size in bytes."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST]
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    (folder / MANIFEST).write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")


def is_complete(folder: Path) -> bool:
    """True where `trainer_state.json` can be read and every file of the manifest has its size.

    The checkpoints of other trainers have no manifest: there the state, written last, decides.
    """
    try:
        json.loads((folder / STATE).read_text(encoding="utf-8"))
        manifest = folder / MANIFEST
        sizes = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else {}
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def complete_steps(folder: str | os.PathLike[str]) -> list[int]:
    """The N of every complete `checkpoint-N` in `folder`, newest first."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    steps = [int(match[1]) for match in map(re.compile(r"checkpoint-(\d+)").fullmatch, names) if match]
    return sorted((step for step in steps if is_complete(Path(folder) / f"checkpoint-{step}")), reverse=True)


def last_complete_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The newest complete `checkpoint-N` in `folder`, or None."""
    return next((os.path.join(folder, f"checkpoint-{step}") for step in complete_steps(folder)), None)
