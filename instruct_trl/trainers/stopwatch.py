"""Where the time of an iteration went."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Seconds by stage, exclusive: time spent in an inner stage is not counted again in the one around it.

    An accelerator works on after its kernels were launched. The stopwatch waits for `device` when a stage begins or
    ends, so that time counts in the stage that caused it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self.iterations = device, 0
        self._seconds: dict[str, float] = defaultdict(float)
        self._inner: list[float] = []
        self._start = self._now()

    def _now(self) -> float:
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
        """`time/<stage>`, seconds since the last call, their wall time as `time/iteration`; `episodes_per_second`."""
        now = self._now()
        wall = now - self._start
        report = {f"time/{stage}": spent for stage, spent in {**self._seconds, "iteration": wall}.items()}
        report["episodes_per_second"] = episodes / wall
        self._seconds.clear()
        self._start, self.iterations = now, self.iterations + 1
        return report
