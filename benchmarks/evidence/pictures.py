"""The pictures of `evidence.py`, in the style of the evaluation's report: each is drawn from results.json alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

Details = dict[str, Any]


def draw_all(details: dict[int, Details], folder: Path) -> list[Path]:
    """Draw what there are results for, as `folder/evidence_<name>.png`; returns the paths."""
    from instruct_trl.report.pictures import LIGHT, save_picture

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, (name, draw) in PICTURES.items():
        if number in details:
            paths.append(folder / f"evidence_{name}.png")
            save_picture(partial(draw, details[number]), LIGHT, paths[-1])
    return paths


def win_rates(details: Details, theme: Any) -> Any:
    """Claim 1: won against SFT, of each policy."""
    from instruct_trl.report.pictures import Dot, draw_dots, new_figure, reference_line

    roles = {"PPO-ptx": "subject", "SFT": "baseline"}
    rows = []
    for name, (mean, low, high) in details["rates"].items():
        text = f"{100 * mean:.0f} %  ({100 * low:.0f} to {100 * high:.0f})"
        seeds = [100 * rate for rate in details["by_seed"][name]]
        rows.append(Dot(name, 100 * mean, 100 * low, 100 * high, roles.get(name, "other"), text, ticks=seeds))
    figure = new_figure(1.45 + 0.62 * len(rows), "How often does the labeler prefer each policy to SFT?")
    axes = figure.subplots()
    axes.set_xlim(-4, 104)
    draw_dots(axes, rows, theme)
    reference_line(axes, 50, "as good as SFT", theme)
    axes.set_xlabel("prompts won, ties count half (%); ticks are seeds")
    return figure


def selection(details: Details, theme: Any) -> Any:
    """Claim 2: validation loss and RM score by epoch, a line a seed, and what each would keep."""
    from instruct_trl.report.pictures import new_figure

    figure = new_figure(4.6, "Which SFT epoch is kept, by loss and by reward?")
    for axes, key, best, label, color in zip(
        figure.subplots(2, 1, sharex=True), ("loss", "rm_score"), (min, max),
        ("validation loss (nats)", "RM score"), (theme.baseline, theme.subject), strict=True,
    ):  # fmt: skip
        for rows in details["curves"]:
            axes.plot([row["epoch"] for row in rows], [row[key] for row in rows], color=color, linewidth=1.4, alpha=0.6)
            kept = best(rows, key=lambda row: row[key])
            axes.plot(kept["epoch"], kept[key], "o", color=color, markersize=7)
        axes.set_ylabel(label)
        axes.grid(True)
    axes.set_xlabel("epochs of SFT; dots: what is kept")
    return figure


def tax(details: Details, theme: Any) -> Any:
    """Claim 3: gain of the labeler's score against the rise of the pretraining loss, a point a seed."""
    from instruct_trl.report.pictures import new_figure

    figure = new_figure(3.8, "What does the labeler gain, and what does it cost?")
    axes = figure.subplots()
    styles = {"PPO": (theme.baseline, "s"), "PPO-ptx": (theme.subject, "o"), "27.8 at 8:1": (theme.other, "^")}
    for name, (color, marker) in styles.items():
        points = [point[name] for point in details["points"] if name in point]
        if not points:
            continue
        label = "γ = 27.8 at 8:1" if name[0].isdigit() else name
        x, y = [p["rise"] for p in points], [p["gain"] for p in points]
        axes.plot(x, y, marker, color=color, markersize=8, label=label, linestyle="none")
    axes.axvline(0, color=theme.muted, linewidth=1, linestyle=":")
    axes.axhline(0, color=theme.muted, linewidth=1, linestyle=":")
    axes.set_xlabel("rise of the held-out pretraining loss (nats a token)\na point a seed; dotted: where PPO started")
    axes.set_ylabel("gain of the labeler's score")
    axes.grid(True)
    axes.legend(frameon=False)
    return figure


def sweeps(details: Details, theme: Any) -> Any:
    """Claim 4: the same, means over seeds, along γ and along β; points that lie together share a name."""
    from instruct_trl.report.pictures import halo, new_figure

    figure = new_figure(4.6, "γ and β: gain against cost")
    axes = figure.subplots()
    axes.margins(x=0.12, y=0.08)
    points = {
        name: tuple(statistics.fmean(swept[name][key] for swept in details["points"]) for key in ("rise", "gain"))
        for name in details["points"][0]
        if name[0] in "γβ" and ":" not in name  # the ptx ratios are runs of another length
    }
    width, height = (max(values) - min(values) for values in zip(*points.values(), strict=True))
    for kind, color, marker, below in (("γ", theme.subject, "o", 4), ("β", theme.baseline, "s", -11)):
        line = [name for name in points if name[0] == kind or name == "γ 0"]
        line.sort(key=lambda name: 0.02 if name[0] != kind else float(name[2:]))  # γ 0 is β 0.02
        axes.plot(*zip(*(points[name] for name in line), strict=True), color=color, linewidth=1, alpha=0.5)
        own = {name: point for name, point in points.items() if name[0] == kind}
        axes.plot(*zip(*own.values(), strict=True), marker, color=color)
        for names in _together(own, apart=(0.05 * width, 0.05 * height)):
            text = names[0] + "".join(f"; {name[2:]}" for name in names[1:])
            text += " = β 0.02" if names[0] == "γ 0" else ""
            x, y = own[names[-1]]
            others = (point for name, point in own.items() if name not in names)
            crowded = any(0 < a - x < 0.12 * width and abs(b - y) < 0.12 * height for a, b in others)
            axes.annotate(text, (x, y), xytext=(-7 if crowded else 7, below), ha="right" if crowded else "left",
                          textcoords="offset points", fontsize=8.5, color=color, path_effects=halo(theme))  # fmt: skip
    axes.set_xlabel("rise of the held-out pretraining loss (nats a token)")
    axes.set_ylabel("gain of the labeler's score")
    axes.grid(True)
    return figure


def _together(points: dict[str, tuple[float, ...]], apart: tuple[float, float]) -> list[list[str]]:
    """Names of points in groups: each within `apart` of its group's first."""
    found: list[list[str]] = []
    for name, point in points.items():
        near = (
            group
            for group in found
            if all(abs(a - b) < d for a, b, d in zip(point, points[group[0]], apart, strict=True))
        )
        group = next(near, None)
        if group is None:
            found.append([name])
        else:
            group.append(name)
    return found


def groups(details: Details, theme: Any) -> Any:
    """Claim 5: held-out accuracy and loss by epoch, thin lines are seeds."""
    from instruct_trl.report.pictures import new_figure

    figure = new_figure(4.6, "Whole groups against the same pairs, shuffled")
    for axes, key in zip(figure.subplots(2, 1, sharex=True), ("accuracy", "loss"), strict=True):
        for method, color, style, label in (
            ("groups", theme.subject, "-", "groups"), ("pile", theme.baseline, "--", "shuffled pairs"),
        ):  # fmt: skip
            curves = [curve[method] for curve in details["curves"]]
            steps = sorted(set.intersection(*(set(map(int, curve)) for curve in curves)))
            x = [step / details["steps"][0] for step in steps]
            for curve in curves:
                axes.plot(x, [curve[str(step)][key] for step in steps], style, color=color, linewidth=0.9, alpha=0.4)
            means = [statistics.fmean(curve[str(step)][key] for curve in curves) for step in steps]
            axes.plot(x, means, style, color=color, linewidth=2.2, label=label)
        axes.set_ylabel(f"held-out {key}")
        axes.axvline(1, color=theme.muted, linewidth=1, linestyle=":")
        axes.grid(True)
    axes.set_xlabel("epochs")
    axes.legend(frameon=False)
    return figure


def over_optimisation(details: Details, theme: Any) -> Any:
    """Claim 7: the labeler's and the reward model's score over the run, for β = 0 and 0.02; thin lines are seeds."""
    from instruct_trl.report.pictures import new_figure

    figure = new_figure(4.6, "Does the labeler's score turn down?")
    for axes, beta in zip(figure.subplots(2, 1, sharex=True), details["histories"][0], strict=True):
        for key, color in (("labeler", theme.subject), ("reward_model", theme.baseline)):
            seeds = [[row[key] for row in history[beta]] for history in details["histories"]]
            for scores in seeds:
                axes.plot(scores, color=color, linewidth=0.8, alpha=0.35)
            means = [statistics.fmean(scores) for scores in zip(*seeds, strict=True)]
            axes.plot(means, color=color, linewidth=2, label=key.replace("_", " "))
        axes.set_ylabel(f"score, β = {beta}")
        axes.grid(True)
    axes.set_xlabel("iterations")
    axes.legend(frameon=False)
    return figure


Draw = Callable[[Details, Any], Any]
PICTURES: dict[int, tuple[str, Draw]] = {
    1: ("win_rate", win_rates),
    2: ("selection", selection),
    3: ("tax", tax),
    4: ("sweeps", sweeps),
    5: ("groups", groups),
    7: ("over_optimisation", over_optimisation),
}
