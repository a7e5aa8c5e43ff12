"""The pictures of the reward model's report. Each says one thing; its title is the finding."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from instruct_trl.evaluation.reward_metrics import Record, centred, score_groups
from instruct_trl.report import findings_reward as captions
from instruct_trl.report.findings import number, percent
from instruct_trl.report.findings_reward import Metrics, Rows, rate_text
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
from instruct_trl.report.plot_names import short

MOST_ROWS = 12
"""Rows of a dot plot, so that it fits a phone's screen."""
MOST_POINTS = 1_500
REWARD = "reward (logits: 1 more means odds of 2.7 to 1)"


def draw_reward_pictures(
    metrics: Metrics, records: Sequence[Record], folder: str | Path
) -> dict[str, tuple[Path, Path]]:
    """Draw every picture that there are numbers for.

    Returns:
        name → (light PNG, dark PNG); the light one is `folder/name.png`, the dark one `folder/dark/name.png`.

    Raises:
        ImportError: matplotlib is missing.
    """
    require_matplotlib()
    folder = Path(folder)
    (folder / "dark").mkdir(parents=True, exist_ok=True)
    drawn = {}
    for name, draw in _pictures(metrics, records).items():
        paths = (folder / f"{name}.png", folder / "dark" / f"{name}.png")
        for path, theme in zip(paths, (LIGHT, DARK), strict=True):
            save_picture(draw, theme, path)
        drawn[name] = paths
    return drawn


def _pictures(metrics: Metrics, records: Sequence[Record]) -> dict[str, Callable[[Theme], Any]]:
    """The pictures that apply, by name."""
    pictures: dict[str, Callable[[Theme], Any]] = {"accuracy": partial(draw_accuracy, metrics)}
    for name, (what, label) in GROUPS.items():
        if metrics[name]:
            pictures[name] = partial(draw_groups, metrics, name, what, label)
    if metrics.get("labeler_folds"):
        pictures["labeler_folds"] = partial(draw_folds, metrics["labeler_folds"])
    pictures["calibration"] = partial(draw_calibration, metrics)
    if metrics["length"]:
        if metrics["length"]["within_prompt"]["pearson"] is not None:
            pictures["length"] = partial(draw_length, metrics, records)
        pictures["length_rules"] = partial(draw_rules, metrics)
    if "best_mean" in metrics["scores"]:
        pictures["scores"] = partial(draw_scores, metrics, records)
    return pictures


GROUPS: dict[str, tuple[str, Callable[[str], str]]] = {
    "by_k": ("the number of answers", lambda name: f"{name} answers"),
    "by_prompt_length": ("prompt length", lambda name: f"{name} tokens"),
    "by_labeler": ("labeler", lambda name: short(name, 22)),
}
"""Key of the metrics → (what the groups differ by, a group's label in the picture)."""


def _figure(height: float, title: str) -> Any:
    """A figure whose title breaks where a line is full."""
    lines = textwrap.wrap(title, 52, break_on_hyphens=False)
    return new_figure(height + 0.22 * (len(lines) - 1), "\n".join(lines))


def _rate_dots(axes: Any, rows: Sequence[Dot], theme: Theme) -> None:
    """Dots on an axis in per cent that starts at 40, or lower where the data do."""
    shown = [value for row in rows for value in (row.value, row.low, row.high) if value is not None]
    axes.set_xlim(max(-2, min(40, 5 * (min(shown) // 5))), 100)
    draw_dots(axes, rows, theme)
    reference_line(axes, 50, "coin flip", theme)
    axes.set_xlabel("held-out pairs ordered as the labeler does (%)")


def _dot(label: str, row: dict[str, Any], color: str, hollow: bool = False) -> Dot:
    low, high = (None if row.get(end) is None else 100 * row[end] for end in ("low", "high"))
    return Dot(label, 100 * row["accuracy"], low, high, color, rate_text(row), hollow)


def _overall(metrics: Metrics) -> dict[str, Any]:
    return {"accuracy": metrics["pair_accuracy"], "low": metrics["low"], "high": metrics["high"]}


def draw_accuracy(metrics: Metrics, theme: Theme) -> Any:
    """Pair accuracy: of all pairs, then by distance in rank."""
    rows = [_dot("all pairs", _overall(metrics), theme.subject)]
    for distance, row in list(metrics["by_rank_distance"].items())[:MOST_ROWS]:
        rows.append(_dot(f"{distance} rank{'s' * (distance != '1')} apart", row, theme.baseline))
    figure = _figure(1.45 + 0.5 * len(rows), captions.accuracy_title(metrics))
    _rate_dots(figure.subplots(), rows, theme)
    return figure


def shown_groups(rows: Rows) -> Rows:
    """At most `MOST_ROWS` groups: the largest, in their own order."""
    largest = sorted(rows, key=lambda name: -rows[name]["n_pairs"])[:MOST_ROWS]
    return {name: row for name, row in rows.items() if name in largest}


def draw_groups(metrics: Metrics, name: str, what: str, label: Callable[[str], str], theme: Theme) -> Any:
    """Pair accuracy of each group, under that of all pairs."""
    groups = shown_groups(metrics[name])
    rows = [_dot("all pairs", _overall(metrics), theme.subject)]
    rows += [_dot(label(group), row, theme.baseline) for group, row in groups.items()]
    figure = _figure(1.45 + 0.5 * len(rows), captions.group_title(metrics[name], what))
    _rate_dots(figure.subplots(), rows, theme)
    return figure


def draw_folds(folds: Metrics, theme: Theme) -> Any:
    """Each fold's accuracy on its training labelers and on its held-out ones, joined; the means with their errors."""
    figure = _figure(2.2 + 0.42 * len(folds["folds"]), captions.folds_title(folds))
    axes = figure.subplots()
    names = {"held_in": ("labelers seen in training", theme.baseline), "held_out": ("new labelers", theme.subject)}
    values = [[100 * fold[name]["accuracy"] for name in names] for fold in folds["folds"]]
    for y, pair in enumerate(values):
        axes.plot(pair, [y, y], color=theme.muted, linewidth=1.5, zorder=1)
    for i, (name, (label, color)) in enumerate(names.items()):
        axes.plot([pair[i] for pair in values], range(len(values)), "o", color=color, markersize=7, zorder=3)
        mean, error = 100 * folds[name]["mean"], 100 * folds[name]["standard_error"]
        place = len(values) + 0.25 + 0.95 * i
        axes.errorbar(mean, place, xerr=error, fmt="o", color=color, markersize=9, elinewidth=3, zorder=3)
        text = f"{label}: {mean:.1f} ± {error:.1f}".replace("-", "−")
        axes.annotate(
            text, (mean, place), xytext=(0, 8), textcoords="offset points", ha="center", color=color, fontweight="bold",
            path_effects=halo(theme), annotation_clip=False,
        )  # fmt: skip
    ends = [value for pair in values for value in pair]
    margin = max(4.0, 0.5 * (max(ends) - min(ends)))
    axes.set_xlim(min(ends) - margin, max(ends) + margin)
    ticks = [*range(len(values)), len(values) + 0.7]
    axes.set_yticks(ticks, [*(f"fold {i + 1}" for i in range(len(values))), "mean ± SE"])
    axes.set_ylim(len(values) + 1.6, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    axes.set_xlabel("held-out pairs ordered as the labeler does (%)")
    return figure


def draw_calibration(metrics: Metrics, theme: Theme) -> Any:
    """Reliability curve against the diagonal, and below it where the pairs are."""
    bins = metrics["calibration"]["bins"]
    figure = _figure(5.3, captions.calibration_title(metrics))
    axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    axes.plot([50, 100], [50, 100], color=theme.text, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    axes.text(0.04, 0.83, "dashed: right as often as it says", transform=axes.transAxes, fontsize=9.5)
    x, y = ([100 * row[name] for row in bins] for name in ("confidence", "accuracy"))
    for row, place in zip(bins, x, strict=True):
        if row["accuracy_low"] is not None:
            ends = [100 * row["accuracy_low"], 100 * row["accuracy_high"]]
            axes.plot([place, place], ends, color=theme.subject, linewidth=3, alpha=0.45, solid_capstyle="butt")
    axes.plot(x, y, "-", color=theme.subject, linewidth=1.6, zorder=2)
    for row, place, height in zip(bins, x, y, strict=True):
        face = theme.background if row["accuracy_low"] is None else theme.subject  # open: too few prompts to say
        axes.plot(place, height, "o", color=theme.subject, markerfacecolor=face, markersize=6, zorder=3)
    lows = [100 * row["accuracy_low"] for row in bins if row["accuracy_low"] is not None]
    axes.set_ylim(max(-2, min(45, *y, *lows) - 2), 101)
    axes.set_xlim(49.5, 100.5)
    axes.annotate(
        f"ECE {number(metrics['calibration']['ece'])}", (0.03, 0.96), xycoords="axes fraction", va="top",
        color=theme.subject, fontweight="bold", fontsize=12,
    )  # fmt: skip
    axes.annotate(
        "below the line:\ntoo sure", (0.97, 0.05), xycoords="axes fraction", ha="right", va="bottom",
        fontsize=9.5, color=theme.muted, path_effects=halo(theme),
    )  # fmt: skip
    axes.set_ylabel("pairs it ordered right (%)")
    axes.grid()
    total = sum(row["n_pairs"] for row in bins)
    for row in bins:
        counts.bar(
            100 * row["low"], 100 * row["n_pairs"] / total, width=100 * (row["high"] - row["low"]), align="edge",
            color=theme.baseline, edgecolor=theme.background,
        )  # fmt: skip
    counts.set_ylabel("pairs (%)")
    counts.set_xlabel("how sure the reward model is, σ(|difference of rewards|) (%)")
    figure.align_ylabels()
    return figure


def draw_length(metrics: Metrics, records: Sequence[Record], theme: Theme) -> Any:
    """Reward against length, both minus their prompt's mean, with the mean over eighths of the answers."""
    x, y = (np.concatenate(centred(records, name)) for name in ("lengths", "rewards"))
    figure = _figure(3.9, captions.length_title(metrics))
    axes = figure.subplots()
    axes.axhline(0, color=theme.muted, linewidth=0.8)
    shown = np.random.default_rng(0).permutation(len(x))[:MOST_POINTS]  # more points would be one blot
    axes.plot(x[shown], y[shown], "o", markersize=3, color=theme.baseline, alpha=theme.faint, markeredgewidth=0)
    parts = [part for part in np.array_split(np.argsort(x, kind="stable"), 8) if len(part)]
    means = [(x[part].mean(), y[part].mean()) for part in parts]
    axes.plot(
        *zip(*means, strict=True), "-o", color=theme.subject, linewidth=2.2, markersize=6, path_effects=halo(theme)
    )
    left, right = np.quantile(x, [0.005, 0.995])
    low, high = np.quantile(y, [0.005, 0.995])
    axes.set_xlim(1.1 * left, 1.1 * right)
    axes.set_ylim(1.1 * low, 1.35 * high)
    axes.annotate(
        "mean of an eighth of the answers", (0.03, 0.97), xycoords="axes fraction", va="top", color=theme.subject,
        fontweight="bold", path_effects=halo(theme),
    )  # fmt: skip
    axes.grid()
    axes.set_axisbelow(True)
    axes.set_xlabel("length minus the prompt's mean (tokens)   longer →")
    axes.set_ylabel("reward minus the prompt's mean\n(logits)")
    return figure


def draw_rules(metrics: Metrics, theme: Theme) -> Any:
    """The model beside two rules that know nothing but length, and where it stands when length misleads."""
    length = metrics["length"]
    rows = [_dot("reward model", _overall(metrics), theme.subject)]
    for name in ("if_longer_wins", "if_shorter_wins"):
        if length[name]:
            label = f"… where the {'longer' if 'longer' in name else 'shorter'} wins"
            rows.append(_dot(label, length[name], theme.subject, hollow=True))
    rows += [_dot(f"rule: {n} is better", length[f"{n}_is_better"], theme.baseline) for n in ("longer", "shorter")]
    figure = _figure(1.45 + 0.55 * len(rows), captions.rules_title(metrics))
    _rate_dots(figure.subplots(), rows, theme)
    return figure


def draw_scores(metrics: Metrics, records: Sequence[Record], theme: Theme) -> Any:
    """Histograms: of all scores above; of the best and the worst of each prompt below, over the same axis."""
    groups = score_groups(records)
    low, high = np.quantile(groups["all"], [0.002, 0.998])  # one wild score must not squeeze the rest
    spread = max(high - low, 1e-6)
    edges = np.linspace(low - 0.02 * spread, high + 0.02 * spread, 31)
    figure = _figure(4.4, captions.scores_title(metrics))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[1, 1.5])
    _histogram(above, groups["all"], edges, theme.other)
    above.set_title(f"all {len(groups['all']):,} answers", loc="left", color=theme.other, fontweight="bold")
    names = sorted(("best", "worst"), key=lambda name: groups[name].mean())
    for name, align in zip(names, ("right", "left"), strict=True):
        color = theme.subject if name == "best" else theme.baseline
        _histogram(below, groups[name], edges, color)
        mean = groups[name].mean()
        below.axvline(mean, color=color, linewidth=1.6, linestyle=(0, (4, 3)))
        below.annotate(
            f"{name}-ranked\nmean {number(mean)}", (mean, 1), xycoords=("data", "axes fraction"), ha=align, va="top",
            xytext=(-6 if align == "right" else 6, -2), textcoords="offset points", color=color, fontweight="bold",
            path_effects=halo(theme),
        )  # fmt: skip
    below.margins(y=0.35)
    for axes in (above, below):
        axes.set_ylabel("answers (%)")
    below.set_xlabel(REWARD)
    return figure


def _histogram(axes: Any, values: np.ndarray, edges: np.ndarray, color: str) -> None:
    """Shares in per cent; what lies outside the edges counts in the outermost bars."""
    inside = np.clip(values, edges[0], edges[-1])
    shares = 100 * np.histogram(inside, edges)[0] / max(1, len(values))
    axes.stairs(shares, edges, fill=True, color=color, alpha=0.3)
    axes.stairs(shares, edges, color=color, linewidth=1.6)


def fold_rows(folds: Metrics) -> list[list[str]]:
    """The folds as table rows: number, held-out labelers, accuracy on both."""
    return [
        [
            str(i),
            ", ".join(fold["held_out_labelers"]),
            percent(fold["held_in"]["accuracy"], 1),
            percent(fold["held_out"]["accuracy"], 1),
        ]
        for i, fold in enumerate(folds["folds"], 1)
    ]
