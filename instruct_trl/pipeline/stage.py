"""A stage of the pipeline. It runs once, is skipped when it is finished, and is redone or resumed when it broke off."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from instruct_trl.data.rows import read_json
from instruct_trl.redaction import redact_settings
from instruct_trl.trainers.checkpoints import last_complete_checkpoint

STARTED, FINISHED, LOCK = "stage.started.json", "stage.finished.json", "stage.lock"
ELSEWHERE = "Name another --run_dir or --output_dir"
# A stage's record of settings and inputs; its record if it is finished; the checkpoint to resume from.
_Start = tuple[dict[str, Any], dict | None, str | None]


def write_json(path: Path, content: Any) -> None:
    """Write whole or not at all: a reader never sees half a file."""
    partial = path.with_name(path.name + f".{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def finished_summary(folder: Path) -> dict | None:
    """The record of the finished stage in `folder`, or None."""
    path = folder / FINISHED
    return read_json(path) if path.exists() else None


def finished_with(folder: Path, settings: dict[str, Any]) -> dict | None:
    """The record of the finished stage in `folder` if it was made with these settings, from the same data; or None."""
    settings = _as_recorded(settings)
    try:
        _refuse_other_run(folder, {"settings": settings, "inputs": fingerprints(settings, but=folder)})
    except ValueError:
        return None
    return finished_summary(folder)


def _as_recorded(settings: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(redact_settings(settings), default=str))


def run_stage(
    folder: Path,
    title: str,
    settings: dict[str, Any],
    body: Callable[[str | None], dict[str, Any]],
    *,
    resume: bool = True,
    announce_skip: bool = True,
) -> dict[str, Any]:
    """Run `body` unless `folder` holds its finished output. One line before and one after say so.

    Args:
        folder: the stage's own output folder; locked while the stage runs.
        title: the stage's name in those lines.
        settings: all that the output depends on. A folder that was made with others, or from local data or models that
            changed since, is refused and never overwritten.
        body: does the work. It gets the checkpoint to resume from, or None, and returns a summary for the record.
        resume: continue a stage that broke off at its last complete checkpoint. Otherwise it is redone from scratch.
        announce_skip: print a line also if there is nothing to do.
    """
    state = PartialState()
    settings = _as_recorded(settings)
    with ExitStack() as held, disk_errors(folder, title):
        record, finished, checkpoint = _agreed(state, lambda: _begin(folder, settings, resume, held))
        if finished is not None:
            if announce_skip:
                state.print(f"== {title}: finished earlier, kept ({folder})")
            return finished["summary"]
        how = f"resuming at {checkpoint}" if checkpoint else f"starting ({folder})"
        state.print(f"== {title}: {how}", flush=True)
        begin = time.perf_counter()
        try:
            result = body(checkpoint)
        except BaseException:
            if state.is_main_process and _contents(folder) == [STARTED]:
                (folder / STARTED).unlink()  # nothing was done: other settings may be tried here
            raise
        seconds = time.perf_counter() - begin
        if state.is_main_process:
            write_json(folder / FINISHED, record | {"summary": result, "seconds": round(seconds, 1)})
        state.wait_for_everyone()
    shown = {key: value for key, value in result.items() if isinstance(value, int | float | str)}
    said = ", ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()
    )
    state.print(f"== {title}: done in {seconds:.0f} s. {said}", flush=True)
    return result


def _agreed(state: PartialState, decide: Callable[[], _Start]) -> _Start:
    """The main process decides for all. If it raises, every process raises, and none waits for it."""
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
    """Keep what is finished. Otherwise lock the folder, empty it unless it has a checkpoint, and note the start."""
    check_output_folder(folder)
    record = {"settings": settings, "inputs": fingerprints(settings, but=folder)}
    for lock in (
        False,
        True,
    ):  # a finished stage needs no lock; under it, look again: its last holder may have finished
        if lock:
            held.enter_context(locked(folder))
        _refuse_other_run(folder, record)
        if (finished := finished_summary(folder)) is not None:
            return record, finished, None
    checkpoint = last_complete_checkpoint(folder) if resume else None
    write_json(folder / STARTED, record)
    for name in set() if checkpoint else {*_contents(folder)} - {STARTED}:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return record, None, checkpoint


def _contents(folder: Path) -> list[str]:
    """The names of the files in a folder, without its lock."""
    return sorted(path.name for path in folder.iterdir() if path.name != LOCK) if folder.exists() else []


def _refuse_other_run(folder: Path, record: dict[str, Any]) -> None:
    """Compare a folder's own record with this run's; a folder without one must be empty."""
    before = finished_summary(folder)
    if before is None and (folder / STARTED).exists():
        before = read_json(folder / STARTED)
    if before is None:
        if _contents(folder):
            raise ValueError(f"The output folder {folder} is not empty and was not made by this stage. {ELSEWHERE}.")
        return
    # Older records are the settings alone, or have no inputs.
    then, now = redact_settings(before.get("settings", before)), record["settings"]
    different = sorted(k for k in {*then, *now} if then.get(k) != now.get(k))
    if different:
        shown = "; ".join(f"{k}: {then.get(k)!r} there, {now.get(k)!r} now" for k in different[:5])
        was = f"The output folder {folder} holds another run ({shown}). Nothing was touched."
        raise ValueError(f"{was} {ELSEWHERE}, or move {folder} away to redo it.")
    made_from, inputs = before.get("inputs", {}), record["inputs"]
    # An input that is gone since says nothing: the stage's output may well outlive it.
    changed = sorted(name for name, digest in made_from.items() if inputs.get(name, digest) != digest)
    if changed:
        raise ValueError(
            f"The output folder {folder} was made from other data: the files of {' and '.join(changed)} have "
            f"changed since. Nothing was touched. {ELSEWHERE}, move {folder} away to redo it, or restore the data."
        )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder`, making it if need be. The lock is the operating system's: it ends when the process dies."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            holder = f" (pid {held['pid']} on {held['host']})"
        except (OSError, ValueError, KeyError, TypeError):  # the holder is about to write it
            holder = ""
        said = f"Another run{holder} is working in {folder}. Nothing was touched. Wait until it ends, or end it."
        raise ValueError(f"{said} {ELSEWHERE}, to run beside it.") from None
    try:
        path.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}), encoding="utf-8")
        yield
    finally:
        # While it is held: whoever opened it meanwhile sees that the file has no name any more, and tries again.
        path.unlink(missing_ok=True)
        lock.release()


# -- errors of the disk ------------------------------------------------------------------------------------------------

_DENIED = "writing is not permitted"
# How Python, Rust and C++ libraries say that the disk failed → the problem. torch.save does not say why.
_PROBLEMS = {
    r"no space left on device|not enough disk space": "the disk is full",
    r"disk quota exceeded": "the disk quota is used up",
    r"file too large": "a file would be larger than the limit of the process or the file system (`ulimit -f`)",
    r"pytorchstreamwriter failed|inline_container.*unexpected pos": "a file could not be written whole",
    r"\(os error (?:1|13|30)\)": _DENIED,
}


def _nearest(path: Path) -> Path:
    """The path itself, or the nearest folder above it that is there."""
    return next(place for place in (path, *path.absolute().parents) if place.exists() or place.is_symlink())


def check_output_folder(folder: Path) -> None:
    """Refuse an output folder that is a file, or would lie in one."""
    place = _nearest(folder)
    if not place.is_dir():
        kind = "a file" if place.exists() else "a link to nothing"
        raise ValueError(f"The output folder {folder} cannot be made: {place} is {kind}. {ELSEWHERE}, or move it away.")


@contextmanager
def disk_errors(folder: Path, title: str) -> Iterator[None]:
    """Turn an error of a full, limited or write-protected disk into one that names path and remedy.

    Args:
        folder: where the block writes.
        title: the block's name in the error.
    """
    try:
        yield
    except Exception as error:
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
            chain.append(cause)
        for cause in chain:
            path, text = Path(str(getattr(cause, "filename", None) or folder)).absolute(), str(cause).lower()
            problem = next((p for words, p in _PROBLEMS.items() if re.search(words, text, re.DOTALL)), None)
            if isinstance(cause, OSError) and cause.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                problem = _DENIED  # by the number alone: an error that quotes another is not the disk's
            # A user's data elsewhere may be unreadable, which their own error says.
            ours = path.is_relative_to(folder.absolute()) or folder.absolute().is_relative_to(path)
            if problem is not None and (ours or problem != _DENIED):
                free = shutil.disk_usage(_nearest(folder)).free / 1e9
                remedy = "Allow it" if problem == _DENIED else f"Make room ({free:.2f} GB are free)"
                raise RuntimeError(
                    f"{title}: {path} could not be written: {problem}. {remedy}, or name another --output_dir or "
                    "--run_dir. The same command continues from the last complete checkpoint, if there is one. The "
                    f"error was: {error}"
                ) from error
        raise


# -- digests of inputs -------------------------------------------------------------------------------------------------

# The settings that name data or models. Names on the hub are left alone.
INPUTS = (
    *("dataset_name", "demonstrations_name", "pretraining_dataset_name", "checkpoint_prompts"),
    *("model_name_or_path", "reward_model_path", "sft_path", "base_model", "sft_model", "ppo_model", "other_models"),
    *("prefixes", "models", "chat_template_path"),
)
_MODEL_FILES = (".safetensors", ".bin", ".gguf", ".json", ".jinja", ".model", ".txt")
_DATA_FILES = (".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zip", ".xz", ".zst", ".bz2", ".md")
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
SAMPLED = 2**28  # bytes from which weights are read in samples
_BLOCK = 2**16
# What a run or a library writes beside its input, later and at will.
_NOT_INPUT = re.compile(r"\..*|cache-.*\.arrow|tmp[a-z0-9_]{8}|trainer_state\.json|training_args\.bin|stage\.\w+\.json")


def fingerprints(settings: Mapping[str, Any], but: Path) -> dict[str, str]:
    """Setting → digest, of every setting that names local files. `but` is the folder that the stage writes to."""
    named: dict[str, str] = {}  # settings that hold several paths count one by one
    for name in INPUTS:
        value = settings.get(name)
        if isinstance(value, str):
            named[name] = value
        elif isinstance(value, Mapping):
            named |= {f"{name} {inner}": str(path) for inner, path in value.items()}
        elif isinstance(value, list | tuple):
            pairs = [str(entry).partition("=") for entry in value]
            named |= {f"{name} {inner}": path for inner, _, path in pairs}
    digests = {name: fingerprint(Path(path).expanduser(), but) for name, path in named.items()}
    return {name: digest for name, digest in digests.items() if digest is not None}


def fingerprint(path: Path, but: Path) -> str | None:
    """A digest of the content of a file, or of all files of a folder and their names; None if nothing is there.

    Of a model's folder the model's own files count, not checkpoints and logs in it. Data are read whole, however large:
    one row may have been changed.
    """
    if path.is_file():
        return _digest(path)
    if not path.is_dir():
        return None
    total = hashlib.blake2b(digest_size=16)
    for file in sorted(_files(path, but.absolute())):
        total.update(f"{file.relative_to(path).as_posix()} {_digest(file)}\n".encode())
    return total.hexdigest()


def _files(folder: Path, but: Path) -> Iterator[Path]:
    is_model = any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
    suffixes = _MODEL_FILES if is_model else _DATA_FILES + _MODEL_FILES

    def is_output(place: Path) -> bool:  # a hidden folder, or one that a stage writes to
        written = any((place / name).exists() for name in (STARTED, FINISHED))
        return place.name.startswith(".") or written or place.absolute() == but

    for root, folders, names in os.walk(folder):
        place = Path(root)
        folders[:] = [] if is_model else [name for name in folders if not is_output(place / name)]
        for name in names:
            if name.endswith(suffixes) and not _NOT_INPUT.fullmatch(name) and (place / name).is_file():
                yield place / name


def _digest(path: Path) -> str:
    size = path.stat().st_size
    with open(path, "rb") as file:
        if path.suffix not in _WEIGHTS or size < SAMPLED:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        # Samples tell: training, merging or casting changes weights everywhere. Reading all takes as long as loading.
        sampled = hashlib.blake2b(str(size).encode(), digest_size=16)
        for part in range(65):
            file.seek((size - _BLOCK) * part // 64)
            sampled.update(file.read(_BLOCK))
    return sampled.hexdigest()
