"""Where the time of an iteration went."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Seconds by stage, exclusive: time spent in an inner stage is not counted again in the one around it."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._inner: list[float] = []
        self._start = time.perf_counter()

    def start_iteration(self) -> None:
        """Begin to count here; what an evaluation in between took is forgotten."""
        self._seconds.clear()
        self._start = time.perf_counter()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            elapsed = time.perf_counter() - begin
            self._seconds[stage] += elapsed - self._inner.pop()
            if self._inner:
                self._inner[-1] += elapsed

    def finish_iteration(self) -> dict[str, float]:
        """Seconds by stage since the last call, and `iteration`, their wall time."""
        now = time.perf_counter()
        report = {**self._seconds, "iteration": now - self._start}
        self._seconds.clear()
        self._start = now
        return report
