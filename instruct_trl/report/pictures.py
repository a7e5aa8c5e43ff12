"""The look of all pictures: two themes, one frame, one dot plot, and names that leave room for the plot.

matplotlib (the extra `report`) is imported where a figure is made, through the object interface: no global backend,
no window, nothing left open. Colours are close to Okabe and Ito's blue and vermilion, which colour-blind readers tell
apart; no finding rests on colour alone.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instruct_trl.report.findings import estimate, share

WIDTH = 5.6  # inches; with 10.5 pt text this still reads at a phone's 360 CSS pixels
DPI = 200
LONGEST_NAME = 24  # characters; longer task names of lm-eval and paths lose their middle
MOST_ROWS = 12  # of a dot plot, so that it fits a phone's screen
WON = (-4.0, 104.0)  # axis of win rates in per cent, with room for a dot at either end


@dataclass(frozen=True)
class Theme:
    """Colours of one version of the pictures."""

    name: str
    background: str
    text: str
    muted: str
    grid: str
    subject: str
    baseline: str
    other: str
    faint: float


LIGHT = Theme("light", "#ffffff", "#1b1f24", "#5b6570", "#e3e7eb", "#c1500a", "#0067a5", "#5b6570", 0.28)
DARK = Theme("dark", "#14181d", "#e8ebee", "#a3adb8", "#2c333b", "#f5a623", "#62b8ec", "#a3adb8", 0.32)

Draw = Callable[[Theme], Any]
Drawn = dict[str, tuple[Path, Path]]


@dataclass(frozen=True)
class Dot:
    """One row of a dot plot: a value with its interval and the text beside it."""

    label: str
    value: float
    low: float | None
    high: float | None
    color: str
    text: str
    hollow: bool = False


def rate_dot(label: str, row: Any, color: str, hollow: bool = False) -> Dot:
    """The dot of a rate, in per cent."""
    found = estimate(row)
    low, high = (None if bound is None else 100 * bound for bound in (found.low, found.high))
    return Dot(label, 100 * found.mean, low, high, color, share(row), hollow)


def require_matplotlib() -> None:
    """Fail before hours of training where the report could not be drawn.

    Raises:
        ImportError: matplotlib is missing; names the extra that brings it.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("The report's pictures need matplotlib: pip install instruct-trl[report]") from error


def draw_all(pictures: Mapping[str, Draw], folder: Path) -> Drawn:
    """Draw each picture twice: `folder/name.png` is the light one, `folder/dark/name.png` the dark one."""
    drawn = {name: (folder / f"{name}.png", folder / "dark" / f"{name}.png") for name in pictures}
    (folder / "dark").mkdir(parents=True, exist_ok=True)
    for name, paths in drawn.items():
        for path, theme in zip(paths, (LIGHT, DARK), strict=True):
            save_picture(pictures[name], theme, path)
    return drawn


def save_picture(draw: Draw, theme: Theme, path: Path) -> None:
    """Draw a figure in `theme` and write it to `path` as PNG."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    style: Any = {
        "font.family": "DejaVu Sans",
        "font.size": 10.5,
        "figure.facecolor": theme.background,
        "figure.titlesize": 12,
        "figure.titleweight": "bold",
        "axes.facecolor": theme.background,
        "axes.edgecolor": theme.muted,
        "axes.labelcolor": theme.muted,
        "axes.labelsize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlecolor": theme.text,
        "axes.titlesize": 10.5,
        "axes.axisbelow": True,
        "grid.color": theme.grid,
        "legend.frameon": False,
        "legend.fontsize": 9.5,
        "lines.solid_capstyle": "butt",
        "text.color": theme.text,
        "text.parse_math": False,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.labelsize": 9.5,
        "ytick.labelsize": 9.5,
    }
    with rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a name in letters that the font has not
        figure = draw(theme)
        FigureCanvasAgg(figure).print_figure(path, dpi=DPI, facecolor=theme.background)


def new_figure(height: float, title: str) -> Any:
    """A figure with its title at the top left; `height` in inches, plus the title's further lines."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    lines = textwrap.wrap(title, 52, break_on_hyphens=False)
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)
    figure = Figure(figsize=(WIDTH, height + 0.22 * (len(lines) - 1)), layout=layout)
    figure.suptitle("\n".join(lines), x=0.02, ha="left")
    return figure


def panels(height: float, title: str, n: int = 1, **kwargs: Any) -> tuple[Any, list[Any]]:
    """A figure and its `n` axes with a grid, one below the other over one x axis; `kwargs` of `Figure.subplots`."""
    figure = new_figure(height, title)
    axes = list(figure.subplots(**{"nrows": n, "sharex": True, "squeeze": False} | kwargs).ravel())
    for each in axes:
        each.grid(visible=True)
    return figure, axes


def say(axes: Any, text: str, place: tuple[float, float], offset: tuple[float, float], theme: Theme, **kw: Any) -> None:
    """Text `offset` points from a place of the data, with an edge that keeps it readable over lines and points."""
    axes.annotate(text, place, xytext=offset, textcoords="offset points", zorder=5, path_effects=halo(theme), **kw)


def halo(theme: Theme) -> list[Any]:
    """An edge in the background's colour."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=3.5, foreground=theme.background)]


def dot_picture(
    title: str, rows: Sequence[Dot], theme: Theme, limits: tuple[float, float], mark: tuple[float, str], label: str
) -> Any:
    """A dot plot of its own: `mark` is the place and the name of the dashed line, `label` that of the x axis."""
    figure, (axes,) = panels(1.45 + 0.56 * len(rows), title)
    axes.set_xlim(*limits)
    draw_dots(axes, rows, theme)
    reference_line(axes, *mark, theme)
    axes.set_xlabel(label)
    return figure


def draw_dots(axes: Any, rows: Sequence[Dot], theme: Theme) -> None:
    """Rows from top to bottom: name at the left, dot on its interval, the numbers above the dot."""
    for y, row in enumerate(rows):
        if row.low is not None and row.high is not None:
            axes.plot([row.low, row.high], [y, y], color=row.color, linewidth=3, solid_capstyle="butt", alpha=0.75)
        face = theme.background if row.hollow else row.color
        style = {"markersize": 9, "markerfacecolor": face, "markeredgewidth": 2, "zorder": 3, "clip_on": False}
        axes.plot(row.value, y, "o", color=row.color, **style)
        left, right = axes.get_xlim()
        place = (row.value - left) / (right - left)
        align = "left" if place < 0.2 else "right" if place > 0.8 else "center"
        say(axes, row.text, (row.value, y), (0, 8), theme, ha=align, color=row.color)
    name_rows(axes, [row.label for row in rows], len(rows) - 0.6)
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set(color=row.color, fontsize=10.5, fontweight="bold")


def name_rows(axes: Any, names: Sequence[str], bottom: float, places: Sequence[float] | None = None) -> None:
    """Names in place of a y axis, from top to bottom, with vertical grid lines alone."""
    axes.set_ylim(bottom, -0.75)
    axes.set_yticks(range(len(names)) if places is None else places, names)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")


def reference_line(axes: Any, x: float, text: str, theme: Theme) -> None:
    """A dashed vertical line at `x`, named above the axes."""
    axes.axvline(x, color=theme.text, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    axes.annotate(
        text, (x, 1), xycoords=("data", "axes fraction"), xytext=(0, 3), textcoords="offset points",
        ha="center", va="bottom", color=theme.text, fontsize=9.5,
    )  # fmt: skip


def accuracy_picture(title: str, rows: Sequence[Dot], theme: Theme) -> Any:
    """Shares of held-out pairs, on an axis in per cent that starts at 40, or lower where the data do."""
    shown = [value for row in rows for value in (row.value, row.low) if value is not None]
    limits = max(-2.0, min(40.0, 5 * (min(shown) // 5))), 100.0
    return dot_picture(title, rows, theme, limits, (50, "coin flip"), "held-out pairs ordered as the labeler does (%)")


def accuracy_by_distance(title: str, metrics: Mapping[str, Any], theme: Theme) -> Any:
    """Pair accuracy of `reward_metrics`: of all pairs, then by distance in rank."""
    rows = [rate_dot("all pairs", metrics["pair_accuracy"], theme.subject)]
    for distance, row in list(metrics["by_rank_distance"].items())[:MOST_ROWS]:
        rows.append(rate_dot(f"{distance} rank{'s' * (distance != '1')} apart", row, theme.baseline))
    return accuracy_picture(title, rows, theme)


def with_intervals(axes: Any, x: Sequence[Any], rows: Sequence[Any], color: str) -> None:
    """A line through estimates with their intervals."""
    found = [estimate(row) for row in rows]
    ends = [[abs(bound - each.mean) for bound in each.bounds or (each.mean, each.mean)] for each in found]
    style = {"color": color, "marker": "o", "markersize": 4, "linewidth": 1.6, "elinewidth": 1.4, "capsize": 3}
    axes.errorbar(x, [each.mean for each in found], yerr=list(zip(*ends, strict=True)), **style)


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
        text, number = short(name), 1
        while text in shown.values():
            number += 1
            text = f"{short(name)} ({number})"
        shown[name] = text
    return shown
