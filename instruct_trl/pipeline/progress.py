"""A progress bar with one short line a log, in place of a dump of every metric."""

from __future__ import annotations

from typing import Any

from transformers.trainer_callback import ProgressCallback


class CompactProgress(ProgressCallback):
    """The Trainer's progress bar; logs show the named metrics only (trackers and trainer_state.json keep all).

    Args:
        metrics: names as logged, in the order to show them.
    """

    def __init__(self, metrics: list[str]):
        super().__init__()
        self.metrics = metrics

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        shown = {name: logs[name] for name in self.metrics if logs.get(name) is not None}
        if state.is_world_process_zero and self.training_bar is not None and shown:
            text = " · ".join(f"{name} {float(value):.4g}" for name, value in shown.items())
            self.training_bar.write(f"  step {state.global_step}/{state.max_steps} · {text}")
