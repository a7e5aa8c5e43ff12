"""Errors of the disk that a stage writes to, said with the folder and the remedy."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
_LIMIT = {errno.EFBIG: "a file would be larger than the limit of the process or the file system (`ulimit -f`)"}
_DENIED = {errno.EACCES: "writing is not permitted", errno.EPERM: "writing is not permitted"} | {
    errno.EROFS: "the file system is read-only"
}
# Libraries that write in C++ or Rust raise errors of their own; those of torch.save do not say why.
_IN_WORDS = {
    "no space left on device": _FULL[errno.ENOSPC],
    "not enough disk space": _FULL[errno.ENOSPC],
    "disk quota exceeded": _FULL[errno.EDQUOT],
    "file too large": _LIMIT[errno.EFBIG],
    "pytorchstreamwriter failed": "a file could not be written whole (is the disk full?)",
    r"inline_container.*unexpected pos": "a file could not be written whole (is the disk full?)",
}


def check_output_folder(folder: Path) -> None:
    """Refuse an output folder that is a file, or would lie in one.

    Raises:
        ValueError: names the file and the remedy.
    """
    place = next(place for place in (folder, *folder.absolute().parents) if place.exists() or place.is_symlink())
    if not place.is_dir():
        what = "a link to nothing" if place.is_symlink() and not place.exists() else "a file"
        raise ValueError(
            f"The output folder {folder} cannot be made: {place} is {what}. Name another --output_dir or --run_dir, or "
            "move it away."
        )


@contextmanager
def disk_errors(folder: Path, title: str) -> Iterator[None]:
    """Turn the errors of a full, limited or write-protected disk into one that names path and remedy.

    Args:
        folder: what the block writes to.
        title: what the error calls the block.

    Raises:
        RuntimeError: in place of such an error, which stays its cause. All others pass.
    """
    try:
        yield
    except Exception as error:
        problem, path = _disk_problem(error, folder)
        if problem is None:
            raise
        raise RuntimeError(
            f"{title}: {path} could not be written: {problem}. {_remedy(problem, folder)} The same command goes on "
            f"from the last complete checkpoint, if there is one. The error was: {error}"
        ) from error


def _disk_problem(error: BaseException | None, folder: Path) -> tuple[str | None, str]:
    """The problem of the disk and the path that was written, told from an error or from one that led to it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if problem := _by_number(error, folder) or _by_words(error):
            return problem, str(getattr(error, "filename", None) or folder)
        error = error.__cause__ or error.__context__
    return None, ""


def _by_number(error: BaseException, folder: Path) -> str | None:
    found = re.search(r"\(os error (\d+)\)", str(error))
    number = int(found[1]) if found else getattr(error, "errno", None) or 0
    if number in _DENIED:  # of a file elsewhere it says what it always does: a user's data may be unreadable
        inside = Path(str(getattr(error, "filename", None) or folder)).absolute()
        return (
            _DENIED[number] if inside.is_relative_to(folder.absolute()) or inside in folder.absolute().parents else None
        )
    return (_FULL | _LIMIT).get(number)


def _by_words(error: BaseException) -> str | None:
    text = str(error).lower()
    return next((said for words, said in _IN_WORDS.items() if re.search(words, text, re.S)), None)


def _remedy(problem: str, folder: Path) -> str:
    if problem in _FULL.values():
        existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        free = shutil.disk_usage(existing).free / 1e9
        return f"Make room ({free:.2f} GB are free at {existing}), or name another --output_dir or --run_dir."
    if problem in _LIMIT.values():
        return "Raise the limit, or name another --output_dir or --run_dir."
    return "Mend that, or name another --output_dir or --run_dir."
