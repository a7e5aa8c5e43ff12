"""The report's further pictures: other judges, benchmark tasks, several runs against KL, checkpoints by gold score."""

from __future__ import annotations

from typing import Any

from instruct_trl.evaluation.estimates import student_t
from instruct_trl.evaluation.gold import best_checkpoint
from instruct_trl.report.data import ReportData
from instruct_trl.report.findings import number, path_means, percent, percent_range
from instruct_trl.report.parts import tasks_of
from instruct_trl.report.pictures import Dot, Theme, draw_dots, halo, new_figure, reference_line


def has_judges(data: ReportData) -> bool:
    """Whether a further judge compared the headline model."""
    return any(row["model"] == data.headline_model.name and row["rate"] is not None for row in data.judged)


def draw_judges(data: ReportData, theme: Theme) -> Any:
    """The headline model's win rate by every judge, the labeler first."""
    subject = data.headline_model
    rows = []
    if subject.win is not None:
        win = subject.win
        text = f"{percent(win.rate)}  ({percent_range(win.low, win.high)})"
        rows.append(Dot("labeler", 100 * win.rate, 100 * win.low, 100 * win.high, theme.subject, text))
    for row in data.judged:
        if row["model"] == subject.name and row["rate"] is not None:
            text = f"{percent(row['rate'])}  ({percent_range(row['low'], row['high'])})"
            rows.append(Dot(row["judge"], 100 * row["rate"], 100 * row["low"], 100 * row["high"], theme.baseline, text))
    figure = new_figure(1.45 + 0.56 * len(rows), f"Who prefers {subject.name} to {data.baseline}?")
    axes = figure.subplots()
    axes.set_xlim(-4, 104)
    axes.set_xticks(range(0, 101, 20))
    draw_dots(axes, rows, theme)
    reference_line(axes, 50, f"as good as {data.baseline}", theme)
    axes.set_xlabel("prompts won, ties count half (%)")
    return figure


def has_tasks(data: ReportData) -> bool:
    """Whether a model has a change on a benchmark task."""
    return any(row.get("change") is not None for model in data.models for row in model.tasks.values())


def draw_tasks(data: ReportData, theme: Theme) -> Any:
    """Change of each model from the first one on every task, in points: the alignment tax (the paper's Fig. 29)."""
    names, first = tasks_of(data), data.models[0].name
    models = [model for model in data.models if any(row.get("change") is not None for row in model.tasks.values())]
    figure = new_figure(
        1.2 + (0.3 + 0.27 * len(models)) * len(names), f"What do the tasks lose or gain against {first}?"
    )
    axes = figure.subplots()
    step = 0.7 / max(1, len(models))
    for place, model in enumerate(models):
        color = _color(data, model.name, theme)
        for y, name in enumerate(names):
            row = model.tasks.get(name, {})
            if row.get("change") is None:
                continue
            at = y - 0.35 + step * (place + 0.5)
            if row["change_low"] is not None:
                bounds = [100 * row["change_low"], 100 * row["change_high"]]
                axes.plot(bounds, [at, at], color=color, linewidth=2.5, alpha=0.75, solid_capstyle="butt")
            label = model.name if y == 0 else None
            marker = MARKERS[place % len(MARKERS)]
            axes.plot(100 * row["change"], at, marker, linestyle="", markersize=7, color=color, label=label, zorder=3)
    axes.axvline(0, color=theme.text, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    axes.set_xlabel("change in points\n← worse   |   better →")
    _legend(axes, theme)
    return figure


MARKERS = ("o", "s", "^", "D", "v", "P")


def _legend(axes: Any, theme: Theme) -> None:
    axes.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False, fontsize=9.5, labelcolor=theme.text,
        handletextpad=0.3, columnspacing=1.2,
    )  # fmt: skip


def _color(data: ReportData, name: str, theme: Theme) -> str:
    if name == data.headline_model.name:
        return theme.subject
    return theme.baseline if name == data.baseline else theme.other


def run_logs(data: ReportData) -> dict[str, list[dict[str, Any]]]:
    """The logs to compare: this run's under the headline model's name, then the others."""
    own = {data.headline_model.name: data.training} if data.training else {}
    return {name: log for name, log in (own | data.runs).items() if ReportData.series_of(log, "score", "kl")[1]}


def has_runs(data: ReportData) -> bool:
    """Whether there is a second run to compare with."""
    return bool(data.runs) and len(run_logs(data)) > 1


def draw_runs(data: ReportData, theme: Theme) -> Any:
    """Labeler and RM score of several runs against their KL: which of them buys more for the same distance."""
    logs = run_logs(data)
    keys = [
        (key, title)
        for key, title in (("labeler_score", "Labeler score (what we want)"), ("score", "Reward model score"))
        if any(ReportData.series_of(log, key, "kl")[1] for log in logs.values())
    ]
    figure = new_figure(0.9 + 2.3 * len(keys), f"What does distance from {data.training_reference} buy, run by run?")
    grid = figure.subplots(len(keys), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (key, title) in zip(grid, keys, strict=True):
        for place, (name, log) in enumerate(logs.items()):
            x, y = ReportData.series_of(log, key, "kl")
            if not y:
                continue
            own = name == data.headline_model.name
            color = theme.subject if own else theme.baseline if place == 1 else theme.other
            axes.plot(
                path_means(x), path_means(y), marker=MARKERS[place % len(MARKERS)], color=color, linewidth=1.6,
                markersize=4.5, label=name, linestyle=("-", "--", ":", "-.")[place % 4],
            )  # fmt: skip
        axes.set_title(title, loc="left", fontsize=9.5)
        axes.grid()
        axes.margins(x=0.06, y=0.15)
        axes.set_ylabel("score")
    _legend(grid[0], theme)
    grid[0].set_title("", loc="left")
    grid[0].set_ylabel("labeler score" if keys[0][0] == "labeler_score" else "RM score")
    grid[-1].set_xlabel(f"KL from {data.training_reference} ({data.kl_unit})")
    return figure


def draw_checkpoints(data: ReportData, theme: Theme) -> Any:
    """Labeler and RM score of the run's checkpoints on validation prompts; the labeler's best is marked."""
    rows = [row for row in data.checkpoints if row.get("labeler_score") is not None]
    steps = [row["step"] for row in rows]
    best = best_checkpoint(rows)
    figure = new_figure(4.6, "Which checkpoint does the labeler like best?")
    upper, lower = figure.subplots(2, 1, sharex=True)
    # Rows that were not made here may lack the number of prompts: 1,000 have the normal's 1.96.
    errors = [student_t(row.get("n_prompts", 1_000) - 1) * row["labeler_se"] for row in rows]
    gold = [row["labeler_score"] for row in rows]
    upper.errorbar(steps, gold, yerr=errors, color=theme.subject, marker="o", linewidth=1.6, elinewidth=2)
    upper.plot(best["step"], best["labeler_score"], "o", markersize=11, color=theme.subject)
    upper.annotate(
        f"best {number(best['labeler_score'])}", (best["step"], best["labeler_score"]), xytext=(0, 10), ha="center",
        textcoords="offset points", fontweight="bold", path_effects=halo(theme), zorder=5,
    )  # fmt: skip
    upper.set_ylabel("labeler score")
    lower.plot(steps, [row["score"] for row in rows], "-s", color=theme.baseline, linewidth=1.6, markersize=5)
    lower.set_ylabel("RM score")
    lower.set_xlabel("optimizer step")
    for axes in (upper, lower):
        axes.grid()
        axes.margins(x=0.08, y=0.25)
    return figure
