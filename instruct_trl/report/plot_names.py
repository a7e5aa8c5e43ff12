"""Names as pictures show them: short, so that a long one leaves room for the plot, and each on one printable line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from instruct_trl.report.data import ReportData

LONGEST_NAME = 24  # characters; longer task names of lm-eval and paths lose their middle


def short(name: str, longest: int = LONGEST_NAME) -> str:
    """A name's beginning and end, with an ellipsis between them where it is longer than `longest` characters."""
    line = " ".join("".join(char if char.isprintable() else " " for char in name).split())
    if len(line) > longest:
        tail = longest // 3
        line = f"{line[: longest - tail - 1]}…{line[-tail:]}"
    return f" {line}" if line.startswith("_") else line  # matplotlib's legend leaves out what begins with "_"


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Name → `short`, with a number behind where two would be one."""
    shown: dict[str, str] = {}
    for name in dict.fromkeys(names):
        first, number = short(name), 1
        text = first
        while text in shown.values():
            number += 1
            text = f"{first} ({number})"
        shown[name] = text
    return shown


def for_pictures(data: ReportData) -> ReportData:
    """The same report with every name of the user's as pictures show it."""
    models = {model.name for model in data.models} | {data.baseline, data.kl_reference, data.training_reference}
    of_models = short_names(sorted(models | set(data.runs)))
    tasks = short_names(task for model in data.models for task in model.tasks)
    judges = short_names(row["judge"] for row in data.judged)
    renamed = [
        replace(model, name=of_models[model.name], tasks={tasks[task]: row for task, row in model.tasks.items()})
        for model in data.models
    ]
    judged = [
        row | {"judge": judges[row["judge"]], "model": of_models.get(row["model"], short(row["model"]))}
        for row in data.judged
    ]
    return replace(
        data,
        models=renamed,
        baseline=of_models[data.baseline],
        subject=None if data.subject is None else of_models.get(data.subject, data.subject),
        judged=judged,
        runs={of_models[name]: log for name, log in data.runs.items()},
        kl_reference=of_models[data.kl_reference],
        training_reference=of_models[data.training_reference],
        kl_unit=short(data.kl_unit),
    )
