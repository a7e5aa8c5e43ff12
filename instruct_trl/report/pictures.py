"""How the report's pictures look: two themes, one figure frame, one dot plot.

matplotlib (the `report` extra) is imported where a figure is made, through the object interface: no global backend,
no window, nothing left open. Colours are close to Okabe and Ito's blue and vermilion, told apart by colour-blind
readers; no finding rests on colour alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WIDTH = 5.6  # inches; with 10.5 pt text this still reads at a phone's 360 CSS pixels
DPI = 200


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


def require_matplotlib() -> None:
    """Fail early, before hours of training, when the report could not be drawn.

    Raises:
        ImportError: matplotlib is missing; names the extra that brings it.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("The report's pictures need matplotlib: pip install instruct-trl[report]") from error


def save_picture(draw: Callable[[Theme], Any], theme: Theme, path: Path) -> None:
    """Draw a figure in `theme` and write it to `path` as PNG."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    style: Any = {
        "font.family": "DejaVu Sans",
        "font.size": 10.5,
        "figure.facecolor": theme.background,
        "axes.facecolor": theme.background,
        "axes.edgecolor": theme.muted,
        "axes.labelcolor": theme.muted,
        "axes.labelsize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlecolor": theme.text,
        "axes.titlesize": 10.5,
        "axes.unicode_minus": True,
        "grid.color": theme.grid,
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
    """A figure `height` inches tall with its title at the top left."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(WIDTH, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
    figure.suptitle(title, x=0.02, ha="left", fontsize=12, fontweight="bold")
    return figure


def draw_dots(axes: Any, rows: Sequence[Dot], theme: Theme) -> None:
    """Rows from top to bottom: name at the left, dot on its interval, the numbers above the dot."""
    for y, row in enumerate(rows):
        if row.low is not None and row.high is not None:
            axes.plot([row.low, row.high], [y, y], color=row.color, linewidth=3, solid_capstyle="butt", alpha=0.75)
        face = theme.background if row.hollow else row.color
        axes.plot(
            row.value,
            y,
            "o",
            markersize=9,
            color=row.color,
            markerfacecolor=face,
            markeredgewidth=2,
            zorder=3,
            clip_on=False,
        )
        left, right = axes.get_xlim()
        place = (row.value - left) / (right - left)
        align = "left" if place < 0.2 else "right" if place > 0.8 else "center"
        axes.annotate(
            row.text, (row.value, y), xytext=(0, 8), textcoords="offset points", ha=align, color=row.color, zorder=4,
            path_effects=halo(theme),
        )  # fmt: skip
    axes.set_ylim(len(rows) - 0.6, -0.75)
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set(color=row.color, fontsize=10.5, fontweight="bold")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.set_axisbelow(True)


def halo(theme: Theme) -> list[Any]:
    """An edge in the background's colour, so that text stays readable over lines and points."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=3.5, foreground=theme.background)]


def reference_line(axes: Any, x: float, text: str, theme: Theme) -> None:
    """A dashed vertical line at `x`, named above the axes."""
    axes.axvline(x, color=theme.text, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    axes.annotate(
        text, (x, 1), xycoords=("data", "axes fraction"), xytext=(0, 3), textcoords="offset points",
        ha="center", va="bottom", color=theme.text, fontsize=9.5,
    )  # fmt: skip
