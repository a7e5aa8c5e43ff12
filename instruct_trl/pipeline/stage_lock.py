"""One process at a time in a stage's folder: a lock of the operating system, gone when the process dies."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = "stage.lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for the block, making it if need be; the lock's file is removed afterwards.

    The file says who holds it. One that a killed process left behind locks nothing.

    Raises:
        ValueError: another process holds it; names its pid.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"Another run{_holder(path)} is working in {folder}. Nothing was touched. Wait until it has ended, or end "
            "it; or name another --run_dir or --output_dir."
        ) from None
    try:
        path.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}), encoding="utf-8")
        yield
    finally:
        path.unlink(
            missing_ok=True
        )  # while it is held: whoever opened it meanwhile sees that it has no name and retries
        lock.release()


def _holder(path: Path) -> str:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        return f" (pid {held['pid']} on {held['host']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
