"""Where the time of an iteration went."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Seconds by stage, exclusive: time spent in an inner stage is not counted again in the one around it."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.iterations = device, 0
        self._seconds: dict[str, float] = defaultdict(float)
        self._inner: list[float] = []  # seconds of inner stages, for each stage that is open
        self._start = self._now()

    def _now(self) -> float:
        # An accelerator works on after its kernels were launched; time counts in the stage that caused it.
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return time.perf_counter()

    def start_iteration(self) -> None:
        """Begin to count here, and forget what an evaluation in between took."""
        self._seconds.clear()
        self._start = self._now()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begin = self._now()
        self._inner.append(0.0)
        try:
            yield
        finally:
            elapsed = self._now() - begin
            self._seconds[stage] += elapsed - self._inner.pop()
            if self._inner:
                self._inner[-1] += elapsed

    def finish_iteration(self, episodes: int) -> dict[str, float]:
        """`time/<stage>` and, as `time/iteration`, the wall time since the start, in seconds; `episodes_per_second`."""
        wall = self._now() - self._start
        report = {f"time/{stage}": spent for stage, spent in {**self._seconds, "iteration": wall}.items()}
        self.iterations += 1
        self.start_iteration()
        return report | {"episodes_per_second": episodes / wall}
