"""The pictures of a run's report. Each says one thing and is at home on a phone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from instruct_trl.evaluation.gold import best_checkpoint, path_means
from instruct_trl.report.data import LogRows, ReportData, series
from instruct_trl.report.findings import NBSP, estimate, judges_of_subject, minus, number
from instruct_trl.report.pictures import (
    WON,
    Dot,
    Drawn,
    Theme,
    accuracy_by_distance,
    dot_picture,
    draw_all,
    name_rows,
    panels,
    rate_dot,
    reference_line,
    say,
    short,
    short_names,
    with_intervals,
)

SCORES = {"labeler_score": "Labeler score (what we want)", "score": "Reward model score (what PPO maximises)"}
TRAINING = {
    "score": "Reward model score",
    "labeler_score": "Labeler score",
    "kl": "KL ({unit})",
    "ptx_loss": "Pretraining loss (nats per token)",
    "value_loss": "Value loss (score²)",
    "explained_variance": "Explained variance (1 is perfect)",
}
MARKERS = ("o", "s", "^", "D", "v", "P")


def draw_pictures(data: ReportData, folder: Path) -> Drawn:
    """Draw every picture that `data` has numbers for, as `draw_all` does."""
    data = for_pictures(data)
    return draw_all({name: partial(draw, data) for name, (has, draw) in PICTURES.items() if has(data)}, folder)


def for_pictures(data: ReportData) -> ReportData:
    """The same report with every name of the user's as pictures show it."""
    models = {model.name for model in data.models} | {data.baseline, data.kl_reference, data.training_reference}
    names = short_names(sorted(models | set(data.runs)))
    tasks, judges = short_names(data.tasks), short_names(row["judge"] for row in data.judged)
    return replace(
        data,
        models=[
            replace(model, name=names[model.name], tasks={tasks[task]: row for task, row in model.tasks.items()})
            for model in data.models
        ],
        baseline=names[data.baseline],
        subject=names.get(data.subject or ""),
        judged=[
            row | {"judge": judges[row["judge"]], "model": names.get(row["model"], short(row["model"]))}
            for row in data.judged
        ],
        runs={names[name]: log for name, log in data.runs.items()},
        kl_reference=names[data.kl_reference],
        training_reference=names[data.training_reference],
        kl_unit=short(data.kl_unit),
    )


def _color(data: ReportData, name: str, theme: Theme) -> str:
    if name == data.headline_model.name:
        return theme.subject
    return theme.baseline if name == data.baseline else theme.other


def draw_win_rate(data: ReportData, theme: Theme) -> Any:
    """The paper's Fig. 1 in small: win rate of each model against the baseline, which is the 50 % line."""
    rows = [
        Dot(model.name, 50, None, None, theme.baseline, "the baseline", hollow=True)
        if model.name == data.baseline
        else rate_dot(model.name, model.win, _color(data, model.name, theme))
        for model in data.models
        if model.win is not None or model.name == data.baseline
    ]
    label = f"prompts won, ties count half (%)\n← {data.baseline} better   |   {data.baseline} worse →"
    title = f"How often does the labeler prefer each model to {data.baseline}?"
    return dot_picture(title, rows, theme, WON, (50, f"as good as {data.baseline}"), label)


def draw_judges(data: ReportData, theme: Theme) -> Any:
    """The headline model's win rate by every judge, the labeler first."""
    subject = data.headline_model
    rows = [rate_dot("labeler", subject.win, theme.subject)] if subject.win else []
    rows += [rate_dot(row["judge"], row, theme.baseline) for row in judges_of_subject(data)]
    title = f"Who prefers {subject.name} to {data.baseline}?"
    mark = (50, f"as good as {data.baseline}")
    return dot_picture(title, rows, theme, WON, mark, "prompts won, ties count half (%)")


def draw_reward_model(data: ReportData, theme: Theme) -> Any:
    """Held-out pairs that the RM orders as the labeler does: all of them, then by distance in rank."""
    return accuracy_by_distance("How often does the reward model agree with the labeler?", data.reward_model, theme)


def draw_pretraining(data: ReportData, theme: Theme) -> Any:
    """Loss on pretraining text before and after: the cost of alignment."""
    losses = {model.name: model.pretraining_loss for model in data.models if model.pretraining_loss}
    first, start = next((name, loss.mean) for name, loss in losses.items())
    rows = []
    for name, loss in losses.items():
        text = f"{loss.mean:.3f}" + ("" if name == first else f"  ({minus(loss.mean - start, '+.3f')})")
        rows.append(Dot(name, loss.mean, loss.low, loss.high, _color(data, name, theme), text))
    shown = [value for row in rows for value in (row.value, row.low, row.high) if value is not None]
    # A change below 0.05 nats is small: a tight axis must not make it look large.
    margin = max(0.25 * (max(shown) - min(shown)), 0.05)
    limits, label = (min(shown) - margin, max(shown) + margin), "loss (nats per token)\n← better   |   worse →"
    return dot_picture(
        "What does training cost on pretraining text?", rows, theme, limits, (start, f"as {first}"), label
    )


def _score_panels(data: ReportData, title: str, logs: Sequence[LogRows]) -> tuple[Any, dict[str, Any]]:
    """A panel per score that one of the logs holds, over KL."""
    keys = [key for key in SCORES if any(series(log, key, "kl")[1] for log in logs)]
    figure, grid = panels(0.8 + 2.1 * len(keys), title, len(keys))
    for axes in grid:
        axes.margins(x=0.06, y=0.2)
        axes.set_ylabel("score")
    grid[-1].set_xlabel(f"KL from {data.training_reference} ({data.kl_unit})")
    return figure, dict(zip(keys, grid, strict=True))


def draw_frontier(data: ReportData, theme: Theme) -> Any:
    """Labeler and RM score against KL over training: the RM's is what was optimised, the labeler's what was wanted."""
    figure, grid = _score_panels(data, f"What does moving away from {data.training_reference} buy?", [data.training])
    for key, axes in grid.items():
        color = theme.subject if key == "labeler_score" else theme.baseline
        axes.set_title(SCORES[key], loc="left", color=color, fontweight="bold")
        kl, scores = data.series(key, against="kl")
        x, y = path_means(kl), path_means(scores)
        if len(x) < len(kl):
            axes.plot(kl, scores, "o", markersize=3, color=color, alpha=theme.faint, markeredgewidth=0)
        axes.plot(x, y, "-o", color=color, linewidth=1.6, markersize=4)
        axes.plot(x[0], y[0], "o", markersize=10, color=color, markerfacecolor=theme.background, markeredgewidth=2)
        axes.plot(x[-1], y[-1], "o", markersize=10, color=color)
        # Each label goes to the side that the path does not take.
        below = (bool(np.median(y) >= y[0]), bool(np.median(y) > y[-1]))
        for i, label, align, under in ((0, "start", "left", below[0]), (-1, "end", "right", below[1])):
            place = (0, -19 if under else 10)
            say(axes, f"{label} {number(y[i])}", (x[i], y[i]), place, theme, ha=align, fontweight="bold")
    return figure


def run_logs(data: ReportData) -> dict[str, LogRows]:
    """The logs to compare: this run's under the headline model's name, then the others."""
    logs = {data.headline_model.name: data.training} | data.runs
    return {name: log for name, log in logs.items() if series(log, "score", "kl")[1]}


def draw_runs(data: ReportData, theme: Theme) -> Any:
    """Labeler and RM score of several runs against their KL: which of them buys more for the same distance."""
    logs, own = run_logs(data), data.headline_model.name
    title = f"What does distance from {data.training_reference} buy, run by run?"
    figure, grid = _score_panels(data, title, list(logs.values()))
    for row, (key, axes) in enumerate(grid.items()):
        axes.set_ylabel("labeler score" if key == "labeler_score" else "RM score")
        for place, (name, log) in enumerate(logs.items()):
            x, y = series(log, key, "kl")
            if not y:
                continue
            color = theme.subject if name == own else theme.baseline if place == 1 else theme.other
            marker, line = MARKERS[place % len(MARKERS)], ("-", "--", ":", "-.")[place % 4]
            style = {"color": color, "marker": marker, "linestyle": line, "linewidth": 1.6, "markersize": 4}
            axes.plot(path_means(x), path_means(y), label=name, **style)
        if row == 0:
            _legend(axes)
    return figure


def _legend(axes: Any) -> None:
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, handletextpad=0.3, columnspacing=1.2)


def draw_checkpoints(data: ReportData, theme: Theme) -> Any:
    """Labeler and RM score of the run's checkpoints on validation prompts; the labeler's best is marked."""
    rows = [row for row in data.checkpoints if row.get("labeler_score") is not None]
    steps, best = [row["step"] for row in rows], best_checkpoint(rows)
    figure, (upper, lower) = panels(4.6, "Which checkpoint does the labeler like best?", 2)
    with_intervals(upper, steps, [row["labeler_score"] for row in rows], theme.subject)
    place = (best["step"], best["labeler_score"]["mean"])
    upper.plot(*place, "o", markersize=11, color=theme.subject)
    say(upper, f"best {number(place[1])}", place, (0, 10), theme, ha="center", fontweight="bold")
    upper.set_ylabel("labeler score")
    lower.plot(steps, [row["score"] for row in rows], "-s", color=theme.baseline, linewidth=1.6, markersize=5)
    lower.set_ylabel("RM score")
    lower.set_xlabel("optimizer step")
    for axes in (upper, lower):
        axes.margins(x=0.08, y=0.25)
    return figure


def draw_tasks(data: ReportData, theme: Theme) -> Any:
    """Change of each model from the first one on every task, in points: the alignment tax (the paper's Fig. 29)."""
    models = [model for model in data.models if any("change" in row for row in model.tasks.values())]
    height = 1.2 + (0.3 + 0.27 * len(models)) * len(data.tasks)
    figure, (axes,) = panels(height, f"What do the tasks lose or gain against {data.models[0].name}?")
    step = 0.7 / len(models)
    for place, model in enumerate(models):
        color, marker = _color(data, model.name, theme), MARKERS[place % len(MARKERS)]
        axes.plot([], [], marker, linestyle="", markersize=7, color=color, label=model.name)
        for y, row in enumerate(model.tasks.get(name, {}) for name in data.tasks):
            if "change" not in row:
                continue
            at, change = y - 0.35 + step * (place + 0.5), estimate(row["change"])
            bounds = [100 * bound for bound in change.bounds or ()]
            axes.plot(bounds, [at] * len(bounds), color=color, linewidth=2.5, alpha=0.75)
            axes.plot([100 * change.mean], [at], marker, markersize=7, color=color, zorder=3)
    reference_line(axes, 0, "", theme)
    name_rows(axes, data.tasks, len(data.tasks) - 0.4)
    axes.set_xlabel("change in points\n← worse   |   better →")
    _legend(axes)
    return figure


def draw_training(data: ReportData, theme: Theme) -> Any:
    """The PPO run's own curves as small multiples over one axis of progress."""
    curves = {key: data.series(key) for key in TRAINING if data.series(key)[1]}
    rows = (len(curves) + 1) // 2
    figure, grid = panels(0.75 + 1.75 * rows, "How did PPO training go?", rows, ncols=2)
    for axes, (key, (x, y)) in zip(grid, curves.items(), strict=False):
        color = theme.subject if key == "labeler_score" else theme.baseline
        limits = _limits(key, y)
        smooth = _smooth(np.clip(y, *limits) if limits else np.asarray(y))
        axes.plot(x, y, color=color, alpha=theme.faint, linewidth=1)
        axes.plot(x, smooth, color=color, linewidth=2)
        axes.plot(x[-1], smooth[-1], "o", color=color, markersize=5, clip_on=False, zorder=4)
        axes.set_title(TRAINING[key].format(unit=data.kl_unit), loc="left", fontsize=9.5)
        style = {"va": "center", "color": color, "fontweight": "bold", "fontsize": 9.5, "annotation_clip": False}
        say(axes, number(smooth[-1]), (x[-1], smooth[-1]), (6, 0), theme, **style)
        if limits:
            _limit(axes, limits, y)
        axes.locator_params(axis="x", nbins=4)
        axes.locator_params(axis="y", nbins=5)
        if max(x) >= 10_000:
            axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k")
    for axes in grid[len(curves) :]:
        axes.set_visible(False)
    # Where the last row holds one panel only, the one above the gap shows its own numbers.
    for axes in grid[max(0, len(curves) - 2) : len(curves)]:
        axes.tick_params(labelbottom=True)
        axes.set_xlabel(data.progress_key + (" (answers sampled)" if data.progress_key == "episodes" else ""))
    return figure


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving mean over about a tenth of the values; shorter windows at the ends."""
    half = len(values) // 20
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def _limits(key: str, values: Sequence[float]) -> tuple[float, float] | None:
    """Axis limits that keep one wild step from flattening the rest; None where matplotlib's own will do."""
    if key == "explained_variance":
        return max(min(values) - 0.05, -1.0), 1.05
    if key == "value_loss":
        return 0.0, max(1e-6, 1.05 * min(max(values), 4 * float(np.quantile(values, 0.75))))
    return None


def _limit(axes: Any, limits: tuple[float, float], values: Sequence[float]) -> None:
    axes.set_ylim(*limits)
    below, above = sum(value < limits[0] for value in values), sum(value > limits[1] for value in values)
    for outside, arrow, y, align in ((below, "↓", 0.05, "bottom"), (above, "↑", 0.95, "top")):
        if outside:
            text = f"{outside}{NBSP}off the axis {arrow}"
            axes.text(0.97, y, text, transform=axes.transAxes, fontsize=8.5, ha="right", va=align)


PICTURES: dict[str, tuple[Callable[[ReportData], bool], Callable[[ReportData, Theme], Any]]] = {
    "win_rate": (lambda data: any(model.win for model in data.models), draw_win_rate),
    "frontier": (lambda data: any(data.series(key, against="kl")[1] for key in SCORES), draw_frontier),
    "reward_model": (lambda data: bool(data.reward_model), draw_reward_model),
    "pretraining": (lambda data: any(model.pretraining_loss for model in data.models), draw_pretraining),
    "training": (lambda data: any(data.series(key)[1] for key in TRAINING), draw_training),
    "judges": (lambda data: bool(judges_of_subject(data)), draw_judges),
    "tasks": (
        lambda data: any("change" in row for model in data.models for row in model.tasks.values()),
        draw_tasks,
    ),
    "runs": (lambda data: bool(data.runs) and len(run_logs(data)) > 1, draw_runs),
    "checkpoints": (lambda data: bool(data.checkpoints), draw_checkpoints),
}
