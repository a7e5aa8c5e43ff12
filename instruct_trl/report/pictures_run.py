"""The pictures of a run's report. Each says one thing and is at home on a phone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from instruct_trl.evaluation.gold import best_checkpoint, path_means
from instruct_trl.report.data import LogRows, ReportData, series
from instruct_trl.report.findings import NBSP, estimate, judges_of_subject, minus, number
from instruct_trl.report.pictures import (
    Curve,
    Dot,
    Draw,
    Role,
    Theme,
    accuracy_dots,
    accuracy_picture,
    curves_picture,
    dot_picture,
    in_corner,
    name_rows,
    panels,
    rate_dot,
    reference_line,
    say,
    short_names,
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
# Limits of an axis that keep one wild step from flattening the rest; matplotlib's own do for the other curves.
LIMITS: dict[str, Callable[[Sequence[float]], tuple[float, float]]] = {
    "explained_variance": lambda y: (max(min(y) - 0.05, -1.0), 1.05),
    "value_loss": lambda y: (0.0, max(1e-6, 1.05 * min(max(y), 4 * float(np.quantile(y, 0.75))))),
}
MARKERS = ("o", "s", "^", "D", "v", "P")
WON = (-4.0, 104.0)  # axis of win rates in per cent, with room for a dot at either end
BOLD: dict[str, Any] = {"fontweight": "bold"}


def run_pictures(data: ReportData) -> dict[str, Draw]:
    """The pictures that `data` has numbers for, by name."""
    data = with_short_names(data)
    pictures = {
        "win_rate": (any(model.win for model in data.models), draw_win_rate),
        "judges": (judges_of_subject(data), draw_judges),
        "frontier": (any(data.series(key, against="kl")[1] for key in SCORES), draw_frontier),
        "runs": (data.runs and len(run_logs(data)) > 1, draw_runs),
        "checkpoints": (data.checkpoints, draw_checkpoints),
        "reward_model": (data.reward_model, draw_reward_model),
        "pretraining": (any(model.pretraining_loss for model in data.models), draw_pretraining),
        "tasks": (any("change" in row for model in data.models for row in model.tasks.values()), draw_tasks),
        "training": (any(data.series(key)[1] for key in TRAINING), draw_training),
    }
    return {name: partial(draw, data) for name, (applies, draw) in pictures.items() if applies}


def with_short_names(data: ReportData) -> ReportData:
    """The same report with every name of the user's as pictures show it."""
    judges = [row[key] for row in data.judged for key in ("judge", "model")]
    models = [data.baseline, data.kl_unit, data.training_reference, *(model.name for model in data.models)]
    names = short_names(sorted({*models, *judges, *data.runs, *data.tasks}))

    def renamed(value: Any) -> Any:
        if isinstance(value, dict):
            return {names.get(key, key): renamed(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [renamed(entry) for entry in value]
        return names.get(value, value) if isinstance(value, str) else value

    changed = ("baseline", "subject", "judged", "runs", "training_reference", "kl_unit")
    return replace(
        data,
        models=[replace(model, name=names[model.name], tasks=renamed(model.tasks)) for model in data.models],
        **{name: renamed(getattr(data, name)) for name in changed},
    )


def _role(data: ReportData, name: str) -> Role:
    if name == data.headline_model.name:
        return "subject"
    return "baseline" if name == data.baseline else "other"


def draw_win_rate(data: ReportData, theme: Theme) -> Any:
    """The paper's Fig. 1 in small: win rate of each model against the baseline, which is the 50 % line."""
    rows = []
    for model in data.models:
        if model.name == data.baseline:
            rows.append(Dot(model.name, 50, None, None, "baseline", "the baseline", hollow=True))
        elif model.win is not None:
            rows.append(rate_dot(model.name, model.win, _role(data, model.name)))
    label = f"prompts won, ties count half (%)\n← {data.baseline} better   |   {data.baseline} worse →"
    title = f"How often does the labeler prefer each model to {data.baseline}?"
    return dot_picture(title, rows, WON, (50, f"as good as {data.baseline}"), label, theme)


def draw_judges(data: ReportData, theme: Theme) -> Any:
    """The headline model's win rate by every judge, the labeler first."""
    subject = data.headline_model
    rows = [rate_dot("labeler", subject.win, "subject")] if subject.win else []
    rows += [rate_dot(row["judge"], row, "baseline") for row in judges_of_subject(data)]
    title, label = f"Who prefers {subject.name} to {data.baseline}?", "prompts won, ties count half (%)"
    return dot_picture(title, rows, WON, (50, f"as good as {data.baseline}"), label, theme)


def draw_reward_model(data: ReportData, theme: Theme) -> Any:
    """Held-out pairs that the RM orders as the labeler does: all of them, then by distance in rank."""
    title = "How often does the reward model agree with the labeler?"
    return accuracy_picture(title, accuracy_dots(data.reward_model), theme)


def draw_pretraining(data: ReportData, theme: Theme) -> Any:
    """Loss on pretraining text before and after: the cost of alignment."""
    losses = {model.name: model.pretraining_loss for model in data.models if model.pretraining_loss}
    first, start = next((name, loss.mean) for name, loss in losses.items())
    rows = []
    for name, loss in losses.items():
        text = f"{loss.mean:.3f}" + ("" if name == first else f"  ({minus(loss.mean - start, '+.3f')})")
        rows.append(Dot(name, loss.mean, loss.low, loss.high, _role(data, name), text))
    shown = [value for row in rows for value in (row.value, row.low, row.high) if value is not None]
    # A change below 0.05 nats is small: a tight axis must not make it look large.
    margin = max(0.25 * (max(shown) - min(shown)), 0.05)
    limits, mark = (min(shown) - margin, max(shown) + margin), (start, f"as {first}")
    title, label = "What does training cost on pretraining text?", "loss (nats per token)\n← better   |   worse →"
    return dot_picture(title, rows, limits, mark, label, theme)


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
        axes.set_title(SCORES[key], loc="left", color=color, **BOLD)
        kl, scores = data.series(key, against="kl")
        x, y = path_means(kl), path_means(scores)
        if len(x) < len(kl):
            axes.plot(kl, scores, "o", markersize=3, color=color, alpha=theme.faint, markeredgewidth=0)
        axes.plot(x, y, "-o", color=color, linewidth=1.6, markersize=4)
        # Each label goes to the side that the path does not take.
        start_below, end_below = np.median(y) >= y[0], np.median(y) > y[-1]
        for i, text, align, below in ((0, "start", "left", start_below), (-1, "end", "right", end_below)):
            face = theme.background if text == "start" else color
            axes.plot(x[i], y[i], "o", markersize=10, color=color, markerfacecolor=face, markeredgewidth=2)
            say(axes, f"{text} {number(y[i])}", (x[i], y[i]), (0, -19 if below else 10), theme, ha=align, **BOLD)
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
    for key, axes in grid.items():
        axes.set_ylabel("labeler score" if key == "labeler_score" else "RM score")
        for place, (name, log) in enumerate(logs.items()):
            x, y = series(log, key, "kl")
            color = theme.subject if name == own else theme.baseline if place == 1 else theme.other
            marker, line = MARKERS[place % len(MARKERS)], ("-", "--", ":", "-.")[place % 4]
            style = {"color": color, "marker": marker, "linestyle": line, "linewidth": 1.6, "markersize": 4}
            if y:
                axes.plot(path_means(x), path_means(y), label=name, **style)
    _legend(next(iter(grid.values())))
    return figure


def _legend(axes: Any) -> None:
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, handletextpad=0.3, columnspacing=1.2)


def draw_checkpoints(data: ReportData, theme: Theme) -> Any:
    """Labeler and RM score of the run's checkpoints on validation prompts; the labeler's best is marked."""
    rows = [row for row in data.checkpoints if row.get("labeler_score") is not None]
    best: Any = best_checkpoint(rows)
    text = f"best {number(best['labeler_score']['mean'])}"
    curves = [
        Curve("Labeler score", [row["labeler_score"] for row in rows], "subject", rows.index(best), text),
        Curve("Reward model score", [row["score"] for row in rows], "baseline"),
    ]
    title = "Which checkpoint does the labeler like best?"
    return curves_picture(title, [row["step"] for row in rows], "optimizer step", curves, theme)


def draw_tasks(data: ReportData, theme: Theme) -> Any:
    """Change of each model from the first one on every task, in points: the alignment tax (the paper's Fig. 29)."""
    models = [model for model in data.models if any("change" in row for row in model.tasks.values())]
    height = 1.2 + (0.3 + 0.27 * len(models)) * len(data.tasks)
    figure, (axes,) = panels(height, f"What do the tasks lose or gain against {data.models[0].name}?")
    step = 0.7 / len(models)
    for place, model in enumerate(models):
        color, marker = getattr(theme, _role(data, model.name)), MARKERS[place % len(MARKERS)]
        axes.plot([], [], marker, linestyle="", markersize=7, color=color, label=model.name)
        for y, name in enumerate(data.tasks):
            if change := model.tasks.get(name, {}).get("change"):
                at, found = y - 0.35 + step * (place + 0.5), estimate(change)
                bounds = [100 * bound for bound in found.bounds or ()]
                axes.plot(bounds, [at] * len(bounds), color=color, linewidth=2.5, alpha=0.75)
                axes.plot([100 * found.mean], [at], marker, markersize=7, color=color, zorder=3)
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
        low, high = LIMITS[key](y) if key in LIMITS else (-np.inf, np.inf)
        # The running mean of about a tenth of the steps, over what there is of them at the ends.
        window = np.ones(2 * (len(y) // 20) + 1)
        smooth = np.convolve(np.clip(y, low, high), window, "same") / np.convolve(np.ones(len(y)), window, "same")
        axes.plot(x, y, color=color, alpha=theme.faint, linewidth=1)
        axes.plot(x, smooth, color=color, linewidth=2)
        axes.plot(x[-1], smooth[-1], "o", color=color, markersize=5, clip_on=False, zorder=4)
        axes.set_title(TRAINING[key].format(unit=data.kl_unit), loc="left", fontsize=9.5)
        style = {"va": "center", "color": color, "fontsize": 9.5, "annotation_clip": False} | BOLD
        say(axes, number(smooth[-1]), (x[-1], smooth[-1]), (6, 0), theme, **style)
        if key in LIMITS:
            axes.set_ylim(low, high)
        for outside, text, place in ((np.less(y, low), "↓", 0.05), (np.greater(y, high), "↑", 0.95)):
            if outside.any():
                align = {"ha": "right", "va": "bottom" if place < 0.5 else "top"}
                in_corner(
                    axes, f"{outside.sum()}{NBSP}off the axis {text}", (0.97, place), theme, fontsize=8.5, **align
                )
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
