"""A stage of the pipeline: done once, skipped where its finished output is, redone or resumed when half-written."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from instruct_trl.data.rows import read_json
from instruct_trl.pipeline.disk import check_output_folder, disk_errors
from instruct_trl.pipeline.fingerprints import fingerprints
from instruct_trl.pipeline.stage_lock import LOCK, locked
from instruct_trl.redaction import redact_settings
from instruct_trl.trainers.checkpoints import last_complete_checkpoint

STARTED, FINISHED = "stage.started.json", "stage.finished.json"


def write_json(path: Path, content: Any) -> None:
    """Write whole or not at all: a reader never sees half a file."""
    partial = path.with_name(path.name + f".{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def finished_summary(folder: Path) -> dict | None:
    """What the finished stage in `folder` reported, or None."""
    path = folder / FINISHED
    return read_json(path) if path.exists() else None


@dataclass(frozen=True)
class _Start:
    """How a stage begins: with the `finished` record of an earlier run, or at a checkpoint, or from scratch."""

    record: dict[str, Any]  # settings and inputs
    finished: dict | None = None
    checkpoint: str | None = None


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
        folder: the stage's own output folder; locked while the stage runs.
        title: what the lines call it.
        settings: what the output depends on. A folder made with others, or from local data or models that were changed
            since, is refused, never overwritten.
        body: does the work; called with the checkpoint to resume from, or None; returns a summary for the record.
        resume: take up a half-written stage at its last complete checkpoint; otherwise it is redone from scratch.
        announce_skip: print a line also where there is nothing to do.

    Raises:
        ValueError: the folder holds another run, or files of something else; another process is working in it; or it
            is no folder.
        RuntimeError: it cannot be written to.
    """
    state = PartialState()
    settings = json.loads(json.dumps(redact_settings(settings), default=str))
    with ExitStack() as held, disk_errors(folder, title):
        start = _agreed(state, lambda: _begin(folder, settings, resume, held))
        if start.finished is not None:
            if announce_skip:
                state.print(f"== {title}: finished earlier, kept ({folder})")
            return start.finished["summary"]
        how = f"resuming at {start.checkpoint}" if start.checkpoint else f"starting ({folder})"
        state.print(f"== {title}: {how}", flush=True)
        begin = time.perf_counter()
        try:
            result = body(start.checkpoint)
        except BaseException:
            if state.is_main_process and _contents(folder) == [STARTED]:
                (folder / STARTED).unlink()  # nothing was done: other settings may be tried here
            raise
        seconds = time.perf_counter() - begin
        if state.is_main_process:
            write_json(folder / FINISHED, start.record | {"summary": result, "seconds": round(seconds, 1)})
        state.wait_for_everyone()
    state.print(f"== {title}: done in {seconds:.0f} s. {_one_line(result)}", flush=True)
    return result


def _agreed(state: PartialState, decide: Callable[[], _Start]) -> _Start:
    """The main process decides, and every process gets the result. Where it raises, all do, and none waits for it."""
    outcome: list[Any] = [None]
    if state.is_main_process:
        try:
            outcome = [decide()]
        except Exception as error:
            if state.num_processes == 1:
                raise
            outcome = [error]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def _begin(folder: Path, settings: dict[str, Any], resume: bool, held: ExitStack) -> _Start:
    """Keep what is finished; else lock the folder, empty it unless there is a checkpoint, and note what is begun."""
    check_output_folder(folder)
    record = {"settings": settings, "inputs": fingerprints(settings, but=folder)}
    _refuse_other_run(folder, record)
    if (summary := finished_summary(folder)) is not None:
        return _Start(record, finished=summary)
    held.enter_context(locked(folder))
    _refuse_other_run(folder, record)
    if (summary := finished_summary(folder)) is not None:  # by the process that held the lock until now
        return _Start(record, finished=summary)
    checkpoint = last_complete_checkpoint(folder) if resume else None
    write_json(folder / STARTED, record)
    for name in [] if checkpoint else _contents(folder):
        if name != STARTED:
            _remove(folder / name)
    return _Start(record, checkpoint=checkpoint)


def _contents(folder: Path) -> list[str]:
    """The names of what lies in a folder, without its lock."""
    return sorted(path.name for path in folder.iterdir() if path.name != LOCK) if folder.exists() else []


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _one_line(summary: dict[str, Any]) -> str:
    shown = {
        k: f"{v:.3g}" if isinstance(v, float) else v for k, v in summary.items() if isinstance(v, (int, float, str))
    }
    return ", ".join(f"{key} {value}" for key, value in shown.items())


def _refuse_other_run(folder: Path, record: dict[str, Any]) -> None:
    if not _contents(folder):
        return
    before = _earlier_record(folder)
    then, settings = redact_settings(before["settings"]), record["settings"]
    different = sorted(k for k in {*then, *settings} if then.get(k) != settings.get(k))
    if different:
        shown = "; ".join(f"{k}: {then.get(k)!r} there, {settings.get(k)!r} now" for k in different[:5])
        raise ValueError(
            f"The output folder {folder} holds another run ({shown}). Nothing was touched. Name another "
            f"--run_dir or --output_dir, or move {folder} away to redo it."
        )
    # Older records have no inputs, and an input that is gone since says nothing.
    was, now = before.get("inputs", {}), record["inputs"]
    changed = sorted(name for name in was if name in now and was[name] != now[name])
    if changed:
        raise ValueError(
            f"The output folder {folder} was made from other data: what {' and '.join(changed)} names was changed "
            f"since. Nothing was touched. Name another --run_dir or --output_dir, or move {folder} away to redo it; or "
            "restore the data."
        )


def _earlier_record(folder: Path) -> dict[str, Any]:
    """Settings and inputs of the run in a folder.

    Raises:
        ValueError: there is none.
    """
    if (summary := finished_summary(folder)) is not None:
        return summary
    if not (folder / STARTED).exists():
        raise ValueError(
            f"The output folder {folder} is not empty and was not made by this stage. Name another --output_dir or "
            "--run_dir, or empty it yourself."
        )
    record = read_json(folder / STARTED)
    return record if isinstance(record.get("settings"), dict) else {"settings": record}  # as older versions wrote it
