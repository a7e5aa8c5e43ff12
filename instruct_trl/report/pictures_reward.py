"""The pictures of the reward model's page. Each says one thing; its title is the finding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from instruct_trl.evaluation.reward_metrics import Record, centred, score_groups
from instruct_trl.report import findings_reward as findings
from instruct_trl.report.findings import estimate, number, share
from instruct_trl.report.findings_reward import Metrics, Rows
from instruct_trl.report.pictures import (
    MOST_ROWS,
    Draw,
    Theme,
    accuracy_by_distance,
    accuracy_picture,
    name_rows,
    panels,
    rate_dot,
    say,
    short,
)

MOST_POINTS = 1_500

GROUPS: dict[str, tuple[str, Callable[[str], str]]] = {
    "by_k": ("the number of answers", lambda name: f"{name} answers"),
    "by_prompt_length": ("prompt length", lambda name: f"{name} tokens"),
    "by_labeler": ("labeler", lambda name: short(name, 22)),
}
"""Key of the metrics → (what the groups differ by, a group's label in the picture)."""


def reward_pictures(metrics: Metrics, records: Sequence[Record]) -> dict[str, Draw]:
    """The pictures that there are numbers for, by name."""
    length, folds = metrics["length"], metrics.get("labeler_folds") or {}
    pictures: dict[str, tuple[Any, Draw]] = {
        "accuracy": (True, partial(draw_accuracy, metrics)),
        **{name: (metrics[name], partial(draw_groups, metrics, name)) for name in GROUPS},
        "labeler_folds": (folds, partial(draw_folds, folds)),
        "calibration": (True, partial(draw_calibration, metrics)),
        "length": (
            length and length["within_prompt"]["pearson"],
            partial(draw_length, metrics, records),
        ),
        "length_rules": (length, partial(draw_rules, metrics)),
        "scores": ("best_mean" in metrics["scores"], partial(draw_scores, metrics, records)),
    }
    return {name: draw for name, (applies, draw) in pictures.items() if applies}


def draw_accuracy(metrics: Metrics, theme: Theme) -> Any:
    """Pair accuracy: of all pairs, then by distance in rank."""
    return accuracy_by_distance(findings.accuracy(metrics), metrics, theme)


def shown_groups(rows: Rows) -> Rows:
    """At most `MOST_ROWS` groups: the largest, in their own order."""
    largest = sorted(rows, key=lambda name: -rows[name]["n_pairs"])[:MOST_ROWS]
    return {name: row for name, row in rows.items() if name in largest}


def draw_groups(metrics: Metrics, name: str, theme: Theme) -> Any:
    """Pair accuracy of each group, under that of all pairs."""
    what, label = GROUPS[name]
    rows = [rate_dot("all pairs", metrics["pair_accuracy"], theme.subject)]
    rows += [rate_dot(label(group), row, theme.baseline) for group, row in shown_groups(metrics[name]).items()]
    return accuracy_picture(findings.groups(metrics[name], what), rows, theme)


def draw_rules(metrics: Metrics, theme: Theme) -> Any:
    """The model beside two rules that know nothing but length, and where it stands when length misleads."""
    rows, length = [rate_dot("reward model", metrics["pair_accuracy"], theme.subject)], metrics["length"]
    for name in ("longer", "shorter"):
        if length[f"if_{name}_wins"]:
            rows.append(rate_dot(f"… where the {name} wins", length[f"if_{name}_wins"], theme.subject, hollow=True))
    rows += [rate_dot(f"rule: {n} is better", length[f"{n}_is_better"], theme.baseline) for n in ("longer", "shorter")]
    return accuracy_picture(findings.rules(metrics), rows, theme)


def draw_folds(folds: Metrics, theme: Theme) -> Any:
    """Each fold's accuracy on its training labelers and on its held-out ones, joined; below them the means."""
    n = len(folds["folds"])
    figure, (axes,) = panels(2.2 + 0.42 * n, findings.new_labelers(folds))
    colors = {"held_in": theme.baseline, "held_out": theme.subject}
    values = np.array([[100 * fold[name]["mean"] for name in colors] for fold in folds["folds"]])
    axes.plot(values.T, np.tile(np.arange(n), (2, 1)), color=theme.muted, linewidth=1.5, zorder=1)
    for i, (name, color) in enumerate(colors.items()):
        axes.plot(values[:, i], range(n), "o", color=color, markersize=7, zorder=3)
        found, place = estimate(folds[name]), n + 0.3 + i
        bounds = [100 * bound for bound in found.bounds or ()]
        axes.plot(bounds, [place] * len(bounds), color=color, linewidth=3, zorder=3)
        axes.plot([100 * found.mean], [place], "o", color=color, markersize=9, zorder=3)
        style = {"ha": "center", "color": color, "fontweight": "bold", "annotation_clip": False}
        say(axes, share(found, 1), (100 * found.mean, place), (0, 8), theme, **style)
    margin = max(4.0, 0.5 * np.ptp(values))
    axes.set_xlim(values.min() - margin, values.max() + margin)
    names = [*(f"fold {i + 1}" for i in range(n)), "seen labelers", "new labelers"]
    name_rows(axes, names, n + 1.8, [*range(n), n + 0.3, n + 1.3])
    for label, color in zip(axes.get_yticklabels()[n:], colors.values(), strict=True):
        label.set(color=color, fontweight="bold")
    axes.set_xlabel("held-out pairs ordered as the labeler does (%)")
    return figure


def draw_calibration(metrics: Metrics, theme: Theme) -> Any:
    """Reliability curve against the diagonal, and below it where the pairs are."""
    bins = metrics["calibration"]["bins"]
    figure, (axes, counts) = panels(5.3, findings.calibration(metrics), 2, height_ratios=[4, 1])
    axes.plot([50, 100], [50, 100], color=theme.text, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    rates = [estimate(row["accuracy"]) for row in bins]
    left, right, sure = (100 * np.array([row[name] for row in bins]) for name in ("low", "high", "confidence"))
    axes.plot(sure, [100 * rate.mean for rate in rates], "-", color=theme.subject, linewidth=1.6, zorder=2)
    lowest = 45.0
    for x, rate in zip(sure, rates, strict=True):
        y, ends = 100 * rate.mean, [100 * bound for bound in rate.bounds or ()]
        axes.plot([x] * len(ends), ends, color=theme.subject, linewidth=3, alpha=0.45)
        face = theme.subject if ends else theme.background  # open: too few prompts to say
        axes.plot([x], [y], "o", color=theme.subject, markerfacecolor=face, markersize=6, zorder=3)
        lowest = min([lowest, y, *ends])
    axes.set_ylim(max(-2, lowest - 2), 101)
    axes.set_xlim(49.5, 100.5)
    ece = f"ECE {number(metrics['calibration']['ece'])}"
    corner: Any
    for place, text, corner in (
        ((0.03, 0.96), ece, {"va": "top", "color": theme.subject, "fontsize": 12, "fontweight": "bold"}),
        ((0.04, 0.83), "dashed: right as often as it says", {"fontsize": 9.5}),
        ((0.97, 0.05), "below the line:\ntoo sure", {"ha": "right", "color": theme.muted, "fontsize": 9.5}),
    ):
        say(axes, text, place, (0, 0), theme, xycoords="axes fraction", **corner)
    axes.set_ylabel("pairs it ordered right (%)")
    pairs = np.array([row["accuracy"]["n_pairs"] for row in bins])
    style = {"align": "edge", "color": theme.baseline, "edgecolor": theme.background}
    counts.bar(left, 100 * pairs / pairs.sum(), width=right - left, **style)
    counts.grid(visible=False)
    counts.set_ylabel("pairs (%)")
    counts.set_xlabel("how sure the reward model is, σ(|difference of rewards|) (%)")
    figure.align_ylabels()
    return figure


def draw_length(metrics: Metrics, records: Sequence[Record], theme: Theme) -> Any:
    """Reward against length, both minus their prompt's mean, with the mean over eighths of the answers."""
    x, y = (np.concatenate(centred(records, name)) for name in ("lengths", "rewards"))
    figure, (axes,) = panels(3.9, findings.length(metrics))
    axes.axhline(0, color=theme.muted, linewidth=0.8)
    shown = np.random.default_rng(0).permutation(len(x))[:MOST_POINTS]  # more points would be one blot
    axes.plot(x[shown], y[shown], "o", markersize=3, color=theme.baseline, alpha=theme.faint, markeredgewidth=0)
    parts = [part for part in np.array_split(np.argsort(x, kind="stable"), 8) if len(part)]
    means = np.array([(x[part].mean(), y[part].mean()) for part in parts]).T
    axes.plot(*means, "-o", color=theme.subject, linewidth=2.2, markersize=6)
    axes.set_xlim(*(1.1 * np.quantile(x, [0.005, 0.995])))
    axes.set_ylim(*(np.quantile(y, [0.005, 0.995]) * [1.1, 1.35]))
    style = {"va": "top", "color": theme.subject, "fontweight": "bold", "xycoords": "axes fraction"}
    say(axes, "mean of an eighth of the answers", (0.03, 0.97), (0, 0), theme, **style)
    axes.set_xlabel("length minus the prompt's mean (tokens)   longer →")
    axes.set_ylabel("reward minus the prompt's mean\n(logits)")
    return figure


def draw_scores(metrics: Metrics, records: Sequence[Record], theme: Theme) -> Any:
    """Histograms: of all scores above; of the best and the worst of each prompt below, over the same axis."""
    groups = score_groups(records)
    low, high = np.quantile(groups["all"], [0.002, 0.998])  # one wild score must not squeeze the rest
    spread = max(high - low, 1e-6)
    edges = np.linspace(low - 0.02 * spread, high + 0.02 * spread, 31)
    figure, (above, below) = panels(4.4, findings.scores(metrics), 2, height_ratios=[1, 1.5])
    _histogram(above, groups["all"], edges, theme.other)
    above.set_title(f"all {len(groups['all']):,} answers", loc="left", color=theme.other, fontweight="bold")
    names = sorted(("best", "worst"), key=lambda name: groups[name].mean())
    for name, align, shift in zip(names, ("right", "left"), (-6, 6), strict=True):
        color, mean = theme.subject if name == "best" else theme.baseline, groups[name].mean()
        _histogram(below, groups[name], edges, color)
        below.axvline(mean, color=color, linewidth=1.6, linestyle=(0, (4, 3)))
        style = {"ha": align, "va": "top", "color": color, "fontweight": "bold", "xycoords": ("data", "axes fraction")}
        say(below, f"{name}-ranked\nmean {number(mean)}", (mean, 1), (shift, -2), theme, **style)
    below.margins(y=0.35)
    for axes in (above, below):
        axes.set_ylabel("answers (%)")
        axes.grid(visible=False)
    below.set_xlabel("reward (logits: 1 more means odds of 2.7 to 1)")
    return figure


def _histogram(axes: Any, values: np.ndarray, edges: np.ndarray, color: str) -> None:
    """Shares in per cent; what lies outside the edges counts in the outermost bars."""
    shares = 100 * np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] / max(1, len(values))
    axes.stairs(shares, edges, fill=True, color=color, alpha=0.3)
    axes.stairs(shares, edges, color=color, linewidth=1.6)
