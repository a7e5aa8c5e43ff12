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
from typing import Any, Literal

from instruct_trl.evaluation.estimates import Estimate
from instruct_trl.report.findings import estimate, floors_of, share

STYLE = Path(__file__).with_name("templates") / "pictures.mplstyle"
WIDTH = 5.6  # inches; with 10.5 pt text this still reads at a phone's 360 CSS pixels
DPI = 200
LONGEST_NAME = 24  # characters; longer task names of lm-eval and paths lose their middle
MOST_ROWS = 12  # of a dot plot, so that it fits a phone's screen


@dataclass(frozen=True)
class Theme:
    """Colours of one version of the pictures."""

    background: str
    text: str
    muted: str
    grid: str
    subject: str
    baseline: str
    other: str
    faint: float


LIGHT = Theme("#ffffff", "#1b1f24", "#5b6570", "#e3e7eb", "#c1500a", "#0067a5", "#5b6570", 0.28)
DARK = Theme("#14181d", "#e8ebee", "#a3adb8", "#2c333b", "#f5a623", "#62b8ec", "#a3adb8", 0.32)

Draw = Callable[[Theme], Any]
Role = Literal["subject", "baseline", "other"]
"""A colour of the theme, by its name: that of the headline model, of the baseline, of anything else."""


@dataclass(frozen=True)
class Dot:
    """One row of a dot plot: a value with its interval and the text beside it."""

    label: str
    value: float
    low: float | None
    high: float | None
    role: Role
    text: str
    hollow: bool = False
    ticks: Sequence[float] = ()
    """Single values that the dot is the mean of."""


def rate_dot(label: str, row: Any, role: Role, **more: Any) -> Dot:
    """The dot of a rate, in per cent."""
    found = estimate(row)
    low, high = (None if bound is None else 100 * bound for bound in (found.low, found.high))
    return Dot(label, 100 * found.mean, low, high, role, **{"text": share(row), **more})


@dataclass(frozen=True)
class Curve:
    """A panel of `curves_picture`: estimates or numbers, and the place and name of the one that is picked."""

    label: str
    rows: Sequence[Any]
    role: Role
    picked: int | None = None
    text: str = ""
    below: bool = False  # on which side of the picked point its name stands


def require_matplotlib() -> None:
    """Fail before hours of training where the report could not be drawn.

    Raises:
        ImportError: matplotlib is missing; names the extra that brings it.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("The report's pictures need matplotlib: pip install instruct-trl[report]") from error


def draw_all(pictures: Mapping[str, Draw], folder: Path) -> dict[str, tuple[Path, Path]]:
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

    colors: Any = {
        **dict.fromkeys(("figure.facecolor", "axes.facecolor"), theme.background),
        **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), theme.muted),
        **dict.fromkeys(("axes.titlecolor", "text.color"), theme.text),
        "grid.color": theme.grid,
    }
    with rc_context(colors, fname=STYLE), warnings.catch_warnings():
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
    """A figure and its `n` axes, one below the other over one x axis; `kwargs` of `Figure.subplots`."""
    figure = new_figure(height, title)
    return figure, list(figure.subplots(**{"nrows": n, "sharex": True, "squeeze": False} | kwargs).ravel())


def say(axes: Any, text: str, place: tuple[float, float], offset: tuple[float, float], theme: Theme, **kw: Any) -> None:
    """Text `offset` points from a place of the data, with an edge that keeps it readable over lines and points."""
    axes.annotate(text, place, xytext=offset, textcoords="offset points", zorder=5, path_effects=halo(theme), **kw)


def in_corner(axes: Any, text: str, place: tuple[float, float], theme: Theme, **kw: Any) -> None:
    """Text at a place of the axes, both from 0 to 1."""
    say(axes, text, place, (0, 0), theme, xycoords="axes fraction", **kw)


def halo(theme: Theme) -> list[Any]:
    """An edge in the background's colour."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=3.5, foreground=theme.background)]


def dot_picture(
    title: str, rows: Sequence[Dot], limits: tuple[float, float], mark: tuple[float, str], label: str, theme: Theme
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
    colors = [getattr(theme, row.role) for row in rows]
    for y, (row, color) in enumerate(zip(rows, colors, strict=True)):
        if row.low is not None and row.high is not None:
            axes.plot([row.low, row.high], [y, y], color=color, linewidth=3, alpha=0.75)
        face = theme.background if row.hollow else color
        style = {"markersize": 9, "markerfacecolor": face, "markeredgewidth": 2, "zorder": 3, "clip_on": False}
        axes.plot(row.value, y, "o", color=color, **style)
        left, right = axes.get_xlim()
        place = (row.value - left) / (right - left)
        align = "left" if place < 0.2 else "right" if place > 0.8 else "center"
        say(axes, row.text, (row.value, y), (0, 8), theme, ha=align, color=color)
        axes.plot(row.ticks, [y + 0.22] * len(row.ticks), "|", color=theme.muted, markersize=7)
    name_rows(axes, [row.label for row in rows], len(rows) - 0.6)
    for label, color in zip(axes.get_yticklabels(), colors, strict=True):
        label.set(color=color, fontsize=10.5, fontweight="bold")


def name_rows(axes: Any, names: Sequence[str], bottom: float) -> None:
    """Names in place of a y axis, from top to bottom, with vertical grid lines alone."""
    axes.set_ylim(bottom, -0.75)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False, axis="y")


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
    return dot_picture(title, rows, limits, (50, "coin flip"), "held-out pairs ordered as the labeler does (%)", theme)


def accuracy_dots(metrics: Mapping[str, Any]) -> list[Dot]:
    """Pair accuracy of `reward_metrics`: of all pairs, of the floors on the same pairs, then by distance in rank."""
    distances = list(metrics["by_rank_distance"].items())[:MOST_ROWS]
    return [
        rate_dot("all pairs", metrics["pair_accuracy"], "subject"),
        *(rate_dot(floor["rule"], floor["accuracy"], "other", hollow=True) for floor in floors_of(metrics).values()),
        *(rate_dot(f"{distance} rank{'s' * (distance != '1')} apart", row, "baseline") for distance, row in distances),
    ]


def curves_picture(title: str, x: Sequence[Any], x_label: str, curves: Sequence[Curve], theme: Theme) -> Any:
    """A panel per curve over one axis; a dashed line and a dot mark what is picked."""
    figure, grid = panels(1 + 1.8 * len(curves), title, len(curves))
    for axes, curve in zip(grid, curves, strict=True):
        color = getattr(theme, curve.role)
        rows = [Estimate(row, None, None, 0) if isinstance(row, int | float) else estimate(row) for row in curve.rows]
        axes.plot(x, [row.mean for row in rows], "-o", color=color, markersize=4, linewidth=1.6)
        for at, row in zip(x, rows, strict=True):
            axes.plot([at] * len(row.bounds or ()), row.bounds or (), color=color, linewidth=3, alpha=0.45)
        axes.set_title(curve.label, loc="left")
        axes.margins(x=0.08, y=0.35)
        axes.locator_params(axis="x", integer=True)
        if curve.picked is not None:
            place = (x[curve.picked], rows[curve.picked].mean)
            axes.axvline(place[0], color=color, linewidth=1.2, linestyle=(0, (4, 3)), alpha=0.6)
            axes.plot(*place, "o", markersize=11, color=color, markeredgecolor=theme.background, zorder=3)
            side, shift = ("right", -8) if curve.picked > (len(rows) - 1) / 2 else ("left", 8)
            style = {"va": "center", "ha": side, "color": color, "fontweight": "bold"}
            say(axes, curve.text, place, (shift, -13 if curve.below else 13), theme, **style)
    grid[-1].set_xlabel(x_label)
    return figure


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
