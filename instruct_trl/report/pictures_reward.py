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
    accuracy_dots,
    accuracy_picture,
    dot_picture,
    in_corner,
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
    overall = rate_dot("all pairs", metrics["pair_accuracy"], "subject")
    pictures: dict[str, Draw] = {
        "accuracy": partial(accuracy_picture, findings.accuracy(metrics), accuracy_dots(metrics)),
        "calibration": partial(draw_calibration, metrics),
    }
    for name, (what, label) in GROUPS.items():
        if rows := metrics[name]:
            dots = [overall, *(rate_dot(label(group), row, "baseline") for group, row in shown_groups(rows).items())]
            pictures[name] = partial(accuracy_picture, findings.groups(rows, what), dots)
    trained_again = {"labeler_folds": draw_folds, "learning_curve": draw_learning_curve}
    pictures |= {name: partial(draw, metrics[name]) for name, draw in trained_again.items() if metrics.get(name)}
    if length := metrics["length"]:
        # The model beside two rules that know nothing but length, and where it stands when length misleads.
        dots = [rate_dot("reward model", metrics["pair_accuracy"], "subject")]
        for name in ("longer", "shorter"):
            if row := length[f"if_{name}_wins"]:
                dots.append(rate_dot(f"… where the {name} wins", row, "subject", hollow=True))
        for name in ("longer", "shorter"):
            dots.append(rate_dot(f"rule: {name} is better", length[f"{name}_is_better"], "baseline"))
        pictures["length_rules"] = partial(accuracy_picture, findings.rules(metrics), dots)
        if length["within_prompt"]["pearson"]:
            pictures["length"] = partial(draw_length, metrics, records)
    if "best_mean" in metrics["scores"]:
        pictures["scores"] = partial(draw_scores, metrics, records)
    return pictures


def shown_groups(rows: Rows) -> Rows:
    """At most `MOST_ROWS` groups: the largest, in their own order."""
    largest = sorted(rows, key=lambda name: -rows[name]["n_pairs"])[:MOST_ROWS]
    return {name: row for name, row in rows.items() if name in largest}


def draw_folds(folds: Metrics, theme: Theme) -> Any:
    """Accuracy on labelers in training and on new ones: means with their intervals, and a tick per fold."""
    seen, new = ([100 * fold[name]["mean"] for fold in folds["folds"]] for name in ("held_in", "held_out"))
    rows = [
        rate_dot("seen labelers", folds["held_in"], "baseline", text=share(folds["held_in"], 1), ticks=seen),
        rate_dot("new labelers", folds["held_out"], "subject", text=share(folds["held_out"], 1), ticks=new),
    ]
    shown = [value for row in rows for value in (row.low, row.value, row.high, *row.ticks) if value is not None]
    margin = max(4.0, 0.5 * (max(shown) - min(shown)))
    limits, mark = (min(shown) - margin, max(shown) + margin), (rows[0].value, "seen labelers")
    label = "held-out pairs ordered as the labeler does (%)\nticks are folds"
    return dot_picture(findings.new_labelers(folds), rows, limits, mark, label, theme)


def draw_learning_curve(curve: Metrics, theme: Theme) -> Any:
    """Accuracy of reward model and bag of words against training prompts, and what twice as many may bring."""
    points, gain = curve["points"], curve["per_doubling"]
    figure, (axes,) = panels(3.9, findings.twice(curve).rstrip("."))
    prompts = [point["prompts"] for point in points]
    names = {"pair_accuracy": ("reward model", theme.subject), "bag_of_words": ("bag of words", theme.baseline)}
    for shift, (key, (name, color)) in zip((0, 5), names.items(), strict=True):
        rows = [(x, estimate(point[key])) for x, point in zip(prompts, points, strict=True) if point[key]]
        x, y = [at for at, _ in rows], [100 * row.mean for _, row in rows]
        axes.plot(x, y, "-o", color=color, label=name, markerfacecolor=theme.background if shift else color)
        for at, row in rows:
            ends = [100 * bound for bound in row.bounds or ()]
            axes.plot([at * 1.01**shift] * len(ends), ends, color=color, linewidth=3, alpha=0.45)
    if gain:
        last = 100 * points[-1]["pair_accuracy"]["mean"]
        reached = [last + 100 * value for value in (gain["mean"], gain["low"], gain["high"]) if value is not None]
        style = {"color": theme.subject, "linestyle": (0, (2, 2))}
        axes.plot([prompts[-1], 2 * prompts[-1]], [last, reached[0]], linewidth=1.6, **style)
        axes.plot([2 * prompts[-1]] * len(reached[1:]), reached[1:], linewidth=2, **style)
    axes.axhline(50, color=theme.text, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    axes.set_xscale("log", base=2)
    ticks = [*prompts, *([2 * prompts[-1]] if gain else [])]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.legend(loc="best")
    axes.set_xlabel("training prompts with labels")
    axes.set_ylabel("held-out pairs ordered as\nthe labeler does (%)")
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
    in_corner(axes, ece, (0.03, 0.96), theme, va="top", color=theme.subject, fontsize=12, fontweight="bold")
    in_corner(axes, "dashed: right as often as it says", (0.04, 0.83), theme, fontsize=9.5)
    in_corner(axes, "below the line:\ntoo sure", (0.97, 0.05), theme, ha="right", color=theme.muted, fontsize=9.5)
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
    text, style = "mean of an eighth of the answers", {"color": theme.subject, "fontweight": "bold"}
    in_corner(axes, text, (0.03, 0.97), theme, va="top", **style)
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
    above.set_title(f"all {len(groups['all']):,} answers", loc="left", color=theme.other, fontweight="bold")
    lower, higher = sorted(("best", "worst"), key=lambda name: groups[name].mean())
    colors = {"all": theme.other, "best": theme.subject, "worst": theme.baseline}
    for axes, name in ((above, "all"), (below, lower), (below, higher)):
        inside = np.clip(groups[name], edges[0], edges[-1])  # what lies outside counts in the outermost bars
        shares = 100 * np.histogram(inside, edges)[0] / max(1, len(inside))
        axes.stairs(shares, edges, fill=True, color=colors[name], alpha=0.3)
        axes.stairs(shares, edges, color=colors[name], linewidth=1.6)
    for name, align, shift in ((lower, "right", -6), (higher, "left", 6)):
        color, mean = colors[name], groups[name].mean()
        below.axvline(mean, color=color, linewidth=1.6, linestyle=(0, (4, 3)))
        style = {"ha": align, "va": "top", "color": color, "fontweight": "bold", "xycoords": ("data", "axes fraction")}
        say(below, f"{name}-ranked\nmean {number(mean)}", (mean, 1), (shift, -2), theme, **style)
    below.margins(y=0.35)
    for axes in (above, below):
        axes.set_ylabel("answers (%)")
        axes.grid(visible=False)
    below.set_xlabel("reward (logits: 1 more means odds of 2.7 to 1)")
    return figure
