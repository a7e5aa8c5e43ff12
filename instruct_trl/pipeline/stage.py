"""A stage of the pipeline: done once, skipped where its finished output is, redone or resumed when half-written."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState

from instruct_trl.trainers.checkpoints import last_complete_checkpoint

STARTED, FINISHED = "stage.started.json", "stage.finished.json"


def write_json(path: Path, content: Any) -> None:
    """Write whole or not at all: a reader never sees half a file."""
    partial = path.with_name(path.name + f".{os.getpid()}.partial")
    partial.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    partial.replace(path)


def finished_summary(folder: Path) -> dict | None:
    """What the finished stage in `folder` reported, or None."""
    path = folder / FINISHED
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def run_stage(
    folder: Path,
    title: str,
    settings: dict[str, Any],
    body: Callable[[str | None], dict[str, Any]],
    *,
    resume: bool = True,
    announce_skip: bool = True,
) -> dict[str, Any]:
    """Run `body` unless `folder` holds its finished output; one clear line before and after.

    Args:
        folder: the stage's own output folder.
        title: what the lines call it.
        settings: what the output depends on. A folder made with others is refused, never overwritten.
        body: does the work; called with the checkpoint to resume from, or None; returns a summary for the record.
        resume: take up a half-written stage at its last complete checkpoint; otherwise it is redone from scratch.
        announce_skip: print a line also where there is nothing to do.

    Raises:
        ValueError: the folder holds another run, or files of something else.
    """
    state = PartialState()
    settings = json.loads(json.dumps(settings, default=str))
    summary = finished_summary(folder)
    _refuse_other_run(folder, settings, summary)
    if summary is not None:
        if announce_skip:
            state.print(f"== {title}: finished earlier, kept ({folder})")
        return summary["summary"]
    checkpoint = last_complete_checkpoint(folder) if resume else None
    if state.is_main_process:
        if checkpoint is None and (folder / STARTED).exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / STARTED, settings)
    state.wait_for_everyone()
    state.print(f"== {title}: " + (f"resuming at {checkpoint}" if checkpoint else f"starting ({folder})"), flush=True)
    begin = time.perf_counter()
    try:
        result = body(checkpoint)
    except BaseException:
        if state.is_main_process and [path.name for path in folder.glob("*")] == [STARTED]:
            (folder / STARTED).unlink(missing_ok=True)  # nothing was done: other settings may be tried here
        raise
    seconds = time.perf_counter() - begin
    if state.is_main_process:
        write_json(folder / FINISHED, {"settings": settings, "summary": result, "seconds": round(seconds, 1)})
    state.wait_for_everyone()
    state.print(f"== {title}: done in {seconds:.0f} s. {_one_line(result)}", flush=True)
    return result


def _one_line(summary: dict[str, Any]) -> str:
    shown = {
        k: f"{v:.3g}" if isinstance(v, float) else v for k, v in summary.items() if isinstance(v, (int, float, str))
    }
    return ", ".join(f"{key} {value}" for key, value in shown.items())


def _refuse_other_run(folder: Path, settings: dict[str, Any], summary: dict | None) -> None:
    if not folder.exists() or not any(folder.iterdir()):
        return
    if summary is not None:
        before = summary["settings"]
    elif (folder / STARTED).exists():
        before = json.loads((folder / STARTED).read_text(encoding="utf-8"))
    else:
        raise ValueError(
            f"The output folder {folder} is not empty and was not made by this stage. Name another --output_dir or "
            "--run_dir, or empty it yourself."
        )
    different = sorted(k for k in {*before, *settings} if before.get(k) != settings.get(k))
    if different:
        shown = "; ".join(f"{k}: {before.get(k)!r} there, {settings.get(k)!r} now" for k in different[:5])
        raise ValueError(
            f"The output folder {folder} holds another run ({shown}). Nothing was touched. Name another --run_dir or "
            f"--output_dir, or move {folder} away to redo it."
        )
