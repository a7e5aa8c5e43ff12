"""Public NLP tasks before and after alignment, run by lm-eval: the paper's alignment tax (section 4.2, Table 14).

lm-eval (the `eval` extra) brings prompts, metrics and the model's side. Here are its call, the intervals over items,
and the change from one model to another on the same items.

Legend: D items of a task.
"""

from __future__ import annotations

import logging
import re
import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

from instruct_trl.evaluation.estimates import Estimate, mean_interval
from instruct_trl.evaluation.win_rate import paired_difference

METRICS = ("acc_norm", "f1", "acc", "exact_match", "em")  # the first of these that a task has a number of, by item


@dataclass(frozen=True)
class TaskScore(Estimate):
    """One model on one task: the mean over its items, which count as independent.

    Attributes:
        task, metric: lm-eval's names.
        values: (D,) the metric of each item, in lm-eval's order of items.
    """

    task: str
    metric: str
    values: list[float] = field(repr=False)


def require_lm_eval() -> None:
    """Fail early, before hours of training, if the tasks could not be run.

    Raises:
        ImportError: lm-eval is missing; names the extra that brings it.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "Benchmark tasks need lm-eval: pip install instruct-trl[eval]. Or leave `tasks` empty."
        ) from error


def check_hub_tasks(names: Sequence[str]) -> None:
    """Refuse a task that lm-eval does not know.

    Raises:
        ValueError: names the task.
    """
    with _quiet():
        known = _task_manager().all_tasks if names else []
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"lm-eval knows no task {unknown[0]!r}; `lm-eval ls tasks` lists them.")


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str | dict[str, Any]],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
) -> dict[str, TaskScore]:
    """Scores of a causal LM on lm-eval tasks, by the task's name.

    Args:
        model: on its device, in eval mode.
        tasks: names that lm-eval knows, or task configs as dicts: a dict whose `task` is a known name changes that
            task's config, such as where its data are.
        limit: the first so many items of each task; None takes all.
        num_fewshot: worked examples before each item; None takes the task's own number.
        batch_size: rows per forward pass.

    Raises:
        ImportError: lm-eval is missing.
        ValueError: lm-eval knows no such task, or a task has none of `METRICS`.
    """
    require_lm_eval()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    check_hub_tasks([task for task in tasks if isinstance(task, str)])
    with _quiet():
        manager = _task_manager()
        # lm-eval merges a dict with the known task of its name only inside a group.
        changed = [task for task in tasks if isinstance(task, dict) and task["task"] in manager.all_tasks]
        others = [task for task in tasks if not any(task is other for other in changed)]
        samples = simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=[*others, *([{"group": "changed_tasks", "task": changed}] if changed else [])],
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            bootstrap_iters=0,
        )["samples"]
    names = [task if isinstance(task, str) else task["task"] for task in tasks]
    # A group's name gives its tasks'.
    found = [name for name in names if name in samples] + [name for name in samples if name not in names]
    return {name: _score(name, samples[name]) for name in found}


@cache
def _task_manager() -> Any:
    """lm-eval's index of its tasks, which takes seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


@contextmanager
def _quiet() -> Iterator[None]:
    """While active, lm-eval reports errors, and not its whole configuration."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _score(task: str, rows: Sequence[Mapping[str, Any]]) -> TaskScore:
    # Several filters give an item several rows; the first is taken.
    items = {row["doc_id"]: row for row in reversed(rows)}
    # lm-eval's corpus metrics keep pairs of prediction and reference instead of a number.
    metric = next((name for name in METRICS if isinstance(rows[0].get(name), (int, float))), None)
    if metric is None:
        raise ValueError(f"The task {task!r} has none of {', '.join(METRICS)} for each item; choose another task.")
    values = [float(items[key][metric]) for key in sorted(items)]
    return TaskScore(**asdict(mean_interval(values)), task=task, metric=metric, values=values)


def task_table(scores: Mapping[str, Mapping[str, TaskScore]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Model → task → a report's row: `metric`, the estimate's keys, and `change` from the first model.

    `change` is the estimate of the mean difference on the same items, paired, for every model but the first.

    Raises:
        ValueError: a task whose items differ in number between models.
    """
    first = next(iter(scores.values()), {})
    table: dict[str, dict[str, dict[str, Any]]] = {model: {} for model in scores}
    for model, tasks in scores.items():
        for name, score in tasks.items():
            row = {key: value for key, value in asdict(score).items() if key not in ("values", "task")}
            if tasks is not first and name in first:
                row["change"] = asdict(mean_interval(paired_difference(score.values, first[name].values)))
            table[model][name] = row
    return table


def squad_f1(answer: str, references: Sequence[str]) -> tuple[float, float]:
    """(F1, exact match) of an answer against the best of its references (Rajpurkar et al. 2016), 0 to 1.

    F1 is that of the bags of words, after lower-casing and dropping punctuation and the articles a, an, the. If a
    reference has no words, an answer scores 1 if it has none either.
    """

    def words(text: str) -> list[str]:
        bare = text.lower().translate(str.maketrans("", "", string.punctuation))
        return re.sub(r"\b(a|an|the)\b", " ", bare).split()

    given = words(answer)
    scores = []
    for wanted in map(words, references):
        shared = sum((Counter(given) & Counter(wanted)).values())
        f1 = 2 * shared / (len(given) + len(wanted)) if given and wanted else float(given == wanted)
        scores.append((f1, float(given == wanted)))
    return max(f1 for f1, _ in scores), max(exact for _, exact in scores)


def squad_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """lm-eval's `process_results` of the SQuAD-like task in `pipeline.benchmarking`."""
    f1, exact = squad_f1(results[0].strip(), doc["doc"]["answers_text"])
    return {"f1": f1, "exact_match": exact}
