"""The report's pictures. Each says one thing, in a light and a dark version, and is at home on a phone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from instruct_trl.report import more_plots
from instruct_trl.report.data import ReportData
from instruct_trl.report.findings import NBSP, compared, number, path_means, percent, percent_range, rank_distances
from instruct_trl.report.pictures import (
    DARK,
    LIGHT,
    Dot,
    Theme,
    draw_dots,
    halo,
    new_figure,
    reference_line,
    require_matplotlib,
    save_picture,
)
from instruct_trl.report.plot_names import for_pictures


def draw_pictures(data: ReportData, folder: str | Path) -> dict[str, tuple[Path, Path]]:
    """Draw every picture that `data` has numbers for.

    Returns:
        name → (light PNG, dark PNG); the light one is `folder/name.png`, the dark one `folder/dark/name.png`.

    Raises:
        ImportError: matplotlib is missing.
    """
    require_matplotlib()
    folder = Path(folder)
    (folder / "dark").mkdir(parents=True, exist_ok=True)
    drawn, data = {}, for_pictures(data)
    for name, (applies, draw) in PICTURES.items():
        if not applies(data):
            continue
        paths = (folder / f"{name}.png", folder / "dark" / f"{name}.png")
        for path, theme in zip(paths, (LIGHT, DARK), strict=True):
            save_picture(partial(draw, data), theme, path)
        drawn[name] = paths
    return drawn


def _color(data: ReportData, name: str, theme: Theme) -> str:
    if name == data.headline_model.name:
        return theme.subject
    return theme.baseline if name == data.baseline else theme.other


def draw_win_rate(data: ReportData, theme: Theme) -> Any:
    """The paper's Fig. 1 in small: win rate of each model against the baseline, which is the 50 % line."""
    rows = []
    for model in data.models:
        color = _color(data, model.name, theme)
        if model.name == data.baseline:
            rows.append(Dot(model.name, 50, None, None, color, "the baseline", hollow=True))
        elif model.win is not None:
            win = model.win
            text = f"{percent(win.rate)}  ({percent_range(win.low, win.high)})"
            rows.append(Dot(model.name, 100 * win.rate, 100 * win.low, 100 * win.high, color, text))
    figure = new_figure(1.45 + 0.62 * len(rows), f"How often does the labeler prefer each model to {data.baseline}?")
    axes = figure.subplots()
    axes.set_xlim(-4, 104)  # room for a dot at either end
    axes.set_xticks(range(0, 101, 20))
    draw_dots(axes, rows, theme)
    reference_line(axes, 50, f"as good as {data.baseline}", theme)
    axes.set_xlabel(f"prompts won, ties count half (%)\n← {data.baseline} better   |   {data.baseline} worse →")
    return figure


def draw_reward_model(data: ReportData, theme: Theme) -> Any:
    """Held-out pairs that the RM orders as the labeler does: all of them, then by distance in rank."""
    rows = []
    entries = {"all pairs": {**data.reward_model, "accuracy": data.reward_model["pair_accuracy"]}}
    for distance, row in rank_distances(data.reward_model).items():
        entries[f"{distance} rank{'s' * (distance != '1')} apart"] = row
    for label, row in entries.items():
        text, low, high = percent(row["accuracy"]), None, None
        if row.get("low") is not None and row.get("high") is not None:
            low, high = 100 * row["low"], 100 * row["high"]
            text += f"  ({percent_range(row['low'], row['high'])})"
        color = theme.subject if label == "all pairs" else theme.baseline
        rows.append(Dot(label, 100 * row["accuracy"], low, high, color, text))
    figure = new_figure(1.45 + 0.56 * len(rows), "How often does the reward model agree with the labeler?")
    axes = figure.subplots()
    shown = [v for row in rows for v in (row.value, row.low, row.high) if v is not None]
    axes.set_xlim(min(40, 5 * (min(shown) // 5)), 100)
    draw_dots(axes, rows, theme)
    reference_line(axes, 50, "coin flip", theme)
    axes.set_xlabel("held-out pairs ordered as the labeler does (%)")
    return figure


def draw_pretraining(data: ReportData, theme: Theme) -> Any:
    """Loss on pretraining text before and after: what alignment costs (the paper's alignment tax, in small)."""
    models = [model for model in data.models if model.pretraining_loss is not None]
    start = float(models[0].pretraining_loss or 0)
    rows = []
    for model in models:
        loss = float(model.pretraining_loss or 0)
        change = "" if model is models[0] else f"  ({loss - start:+.3f})".replace("-", "−")
        low, high = model.pretraining_loss_ci or (None, None)
        rows.append(Dot(model.name, loss, low, high, _color(data, model.name, theme), f"{loss:.3f}{change}"))
    figure = new_figure(1.45 + 0.62 * len(rows), "What does training cost on pretraining text?")
    axes = figure.subplots()
    shown = [v for row in rows for v in (row.value, row.low, row.high) if v is not None]
    # A change below 0.05 nats is small: do not let a tight axis make it look large.
    margin = max(0.25 * (max(shown) - min(shown)), 0.05)
    axes.set_xlim(min(shown) - margin, max(shown) + margin)
    draw_dots(axes, rows, theme)
    reference_line(axes, start, f"as {models[0].name}", theme)
    axes.set_xlabel("loss (nats a token)\n← better   |   worse →")
    return figure


def draw_frontier(data: ReportData, theme: Theme) -> Any:
    """Labeler and RM score against KL over training: the RM's is what was optimised, the labeler's what was wanted."""
    panels = [
        (name, *data.series(key, against="kl"), color)
        for key, name, color in (
            ("labeler_score", "Labeler score (what we want)", theme.subject),
            ("score", "Reward model score (what PPO maximises)", theme.baseline),
        )
        if data.series(key, against="kl")[1]
    ]
    title = f"What does moving away from {data.training_reference} buy?"
    figure = new_figure(0.8 + 2.1 * len(panels), title)
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, kl, scores, color) in zip(grid, panels, strict=True):
        axes.set_title(name, loc="left", color=color, fontweight="bold")
        x, y = path_means(kl), path_means(scores)
        if len(x) < len(kl):
            axes.plot(kl, scores, "o", markersize=3, color=color, alpha=theme.faint, markeredgewidth=0)
        axes.plot(x, y, "-o", color=color, linewidth=1.6, markersize=4)
        axes.plot(x[0], y[0], "o", markersize=10, color=color, markerfacecolor=theme.background, markeredgewidth=2)
        axes.plot(x[-1], y[-1], "o", markersize=10, color=color)
        # Each label goes to the side that the path does not take.
        below = (bool(np.median(y) >= y[0]), bool(np.median(y) > y[-1]))
        for i, label, under in ((0, "start", below[0]), (-1, "end", below[1])):
            axes.annotate(
                f"{label} {number(y[i])}", (x[i], y[i]), xytext=(0, -19 if under else 10), zorder=5,
                textcoords="offset points", ha="left" if i == 0 else "right", fontweight="bold",
                path_effects=halo(theme),
            )  # fmt: skip
        axes.grid()
        axes.margins(x=0.06, y=0.2)
        axes.set_ylabel("score")
    grid[-1].set_xlabel(f"KL from {data.training_reference} ({data.kl_unit})")
    return figure


def _smooth(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Centred moving mean over about a tenth of the values; shorter windows at the ends."""
    array, half = np.asarray(values), len(values) // 20
    return np.array([array[max(0, i - half) : i + half + 1].mean() for i in range(len(array))])


def draw_training(data: ReportData, theme: Theme) -> Any:
    """The PPO run's own curves as small multiples over one axis of progress."""
    titles = {
        "score": "Reward model score",
        "labeler_score": "Labeler score",
        "kl": f"KL ({data.kl_unit})",
        "ptx_loss": "Pretraining loss (nats a token)",
        "value_loss": "Value loss (score²)",
        "explained_variance": "Explained variance (1 is perfect)",
    }
    panels = [(key, title, *data.series(key)) for key, title in titles.items() if data.series(key)[1]]
    rows = (len(panels) + 1) // 2
    figure = new_figure(0.75 + 1.75 * rows, "How did PPO training go?")
    grid = figure.subplots(rows, 2, sharex=True, squeeze=False).ravel()
    for axes, (key, title, x, y) in zip(grid, panels, strict=False):
        color = theme.subject if key == "labeler_score" else theme.baseline
        limits = _limits(key, y)
        smooth = _smooth(np.clip(y, *limits) if limits else y)
        axes.plot(x, y, color=color, alpha=theme.faint, linewidth=1)
        axes.plot(x, smooth, color=color, linewidth=2)
        axes.plot(x[-1], smooth[-1], "o", color=color, markersize=5, clip_on=False, zorder=4)
        axes.set_title(title, loc="left", fontsize=9.5)
        axes.annotate(
            number(smooth[-1]), (x[-1], smooth[-1]), xytext=(6, 0), textcoords="offset points", va="center",
            color=color, fontweight="bold", fontsize=9.5, annotation_clip=False,
        )  # fmt: skip
        if limits:
            _limit(axes, limits, y)
        if key == "explained_variance":
            axes.axhline(0, color=theme.muted, linewidth=0.8)
        axes.grid()
        axes.locator_params(axis="x", nbins=4)
        if max(x) >= 10_000:
            axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k")
        axes.locator_params(axis="y", nbins=5)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    # Where the last row holds one panel only, the one above the gap shows its own numbers.
    for axes in grid[max(0, len(panels) - 2) : len(panels)]:
        axes.tick_params(labelbottom=True)
        axes.set_xlabel(data.progress_key + (" (answers sampled)" if data.progress_key == "episodes" else ""))
    return figure


def _limits(key: str, values: Sequence[float]) -> tuple[float, float] | None:
    """Axis limits that keep one wild step from flattening the rest; None where matplotlib's own will do."""
    if key == "explained_variance":
        return max(min(values) - 0.05, -1.0), 1.05
    if key == "value_loss":
        return 0.0, max(1e-6, 1.05 * min(max(values), 4 * float(np.quantile(values, 0.75))))
    return None


def _limit(axes: Any, limits: tuple[float, float], values: Sequence[float]) -> None:
    axes.set_ylim(*limits)
    for outside, arrow, y, align in (
        (sum(value < limits[0] for value in values), "↓", 0.05, "bottom"),
        (sum(value > limits[1] for value in values), "↑", 0.95, "top"),
    ):
        if outside:
            text = f"{outside}{NBSP}off the axis {arrow}"
            axes.text(0.97, y, text, transform=axes.transAxes, fontsize=8.5, ha="right", va=align)


PICTURES: dict[str, tuple[Callable[[ReportData], bool], Callable[[ReportData, Theme], Any]]] = {
    "win_rate": (lambda data: bool(compared(data)), draw_win_rate),
    "frontier": (
        lambda data: any(data.series(key, against="kl")[1] for key in ("score", "labeler_score")),
        draw_frontier,
    ),
    "reward_model": (lambda data: data.reward_model.get("pair_accuracy") is not None, draw_reward_model),
    "pretraining": (
        lambda data: any(model.pretraining_loss is not None for model in data.models),
        draw_pretraining,
    ),
    "training": (
        lambda data: any(data.series(key)[1] for key in ("score", "kl", "ptx_loss", "value_loss")),
        draw_training,
    ),
    "judges": (more_plots.has_judges, more_plots.draw_judges),
    "tasks": (more_plots.has_tasks, more_plots.draw_tasks),
    "runs": (more_plots.has_runs, more_plots.draw_runs),
    "checkpoints": (lambda data: bool(data.checkpoints), more_plots.draw_checkpoints),
}
