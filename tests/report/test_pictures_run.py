"""The report's pictures show the numbers at their places."""

from functools import partial

import numpy as np
import pytest
from report_example import example_report, win_of

from instruct_trl.evaluation.win_rate import WinRate
from instruct_trl.report import pictures_run as plots
from instruct_trl.report.data import ModelResult
from instruct_trl.report.pictures import DARK, LIGHT, draw_all, save_picture, short_names
from instruct_trl.report.pictures_run import run_pictures, with_short_names


def _dots(axes):
    """(x, row) of each dot drawn with a single point."""
    return [(float(line.get_xdata()[0]), int(line.get_ydata()[0])) for line in axes.lines if line.get_marker() == "o"]


def test_win_picture_shows_the_rates_beside_the_fifty_per_cent_line():
    axes = plots.draw_win_rate(example_report(win_of(63, 37)), LIGHT).axes[0]
    # base: (60 + 6/2) / 256; SFT on the line; PPO-ptx 63 of 100.
    assert _dots(axes) == [(pytest.approx(100 * 63 / 256), 0), (50.0, 1), (63.0, 2)]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["base", "SFT", "PPO-ptx"]
    assert [float(line.get_xdata()[0]) for line in axes.lines if line.get_linestyle() == "--"] == [50.0]
    assert "63 % (53 to 72)" in [text.get_text().replace("\u00a0", " ") for text in axes.texts]


def test_reward_model_picture_shows_all_pairs_then_distances():
    axes = plots.draw_reward_model(example_report(), LIGHT).axes[0]
    assert _dots(axes) == [(pytest.approx(71.3), 0), (62.0, 1), (86.0, 2)]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["all pairs", "1 rank apart", "2 ranks apart"]


def test_frontier_picture_marks_start_and_end():
    data = example_report()
    figure = plots.draw_frontier(data, LIGHT)
    assert [axes.get_title(loc="left").split(" score")[0] for axes in figure.axes] == ["Labeler", "Reward model"]
    for axes in figure.axes:
        assert [text.get_text().split()[0] for text in axes.texts] == ["start", "end"]
    assert figure.axes[1].get_xlabel() == "KL from the start of RL (nats per answer)"
    assert figure.axes[0].get_shared_x_axes().joined(*figure.axes)


def test_training_picture_names_what_is_off_the_axis():
    figure = plots.draw_training(example_report(), LIGHT)
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_visible()}
    assert len(panels) == 6
    variance = panels["Explained variance (1 is perfect)"]
    assert variance.get_ylim()[0] == -1.0
    assert any("1\u00a0off the axis" in text.get_text() for text in variance.texts)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rows", [1, 3])
def test_pictures_draw_without_warnings_from_any_number_of_rows(tmp_path, rows):
    models = [
        *example_report().models,
        ModelResult("always", WinRate(1.0, 0.7, 1.0, 9, 9, 0, 0)),
        ModelResult("$x_1$ [not math"),
    ]
    data = example_report(models=models, subject="PPO-ptx")
    data.training = data.training[:rows]
    assert len(draw_all(run_pictures(data), tmp_path)) == 9


LONG = "<b>$x_{$ \U0001f600 \u4e2d\u202e\n" + "n" * 200


@pytest.mark.filterwarnings("error")
def test_pictures_draw_without_warnings_whatever_things_are_called(tmp_path):
    """Long names, mathtext, letters that the font has not, and names that matplotlib's legend would leave out."""
    data = example_report()
    for place, model in enumerate(data.models):
        model.name = f"_{LONG}{place}"
        model.tasks = {LONG + task: row for task, row in model.tasks.items()}
    old = ("base", "SFT", "PPO-ptx")
    names = dict(zip(old, (model.name for model in data.models), strict=True))
    data.baseline, data.training_reference = names["SFT"], LONG
    data.judged = [row | {"judge": LONG + row["judge"], "model": names[row["model"]]} for row in data.judged]
    data.runs = {f"_{LONG}run": data.runs["PPO"]}
    shown = with_short_names(data)
    for draw in (plots.draw_judges, plots.draw_tasks):
        save_picture(partial(draw, shown), LIGHT, tmp_path / "picture.png")
    legend = plots.draw_runs(shown, LIGHT).axes[0].get_legend()
    assert len(legend.get_texts()) == 2


def test_short_names_are_told_apart_and_short_ones_stay():
    assert short_names(["SFT", "PPO-ptx", "a  b\n"]) == {"SFT": "SFT", "PPO-ptx": "PPO-ptx", "a  b\n": "a b"}
    shown = short_names(["x" * 300, "x" * 301, "x" * 299 + "y"])
    assert list(shown.values()) == [
        "x" * 15 + "…" + "x" * 8,
        "x" * 15 + "…" + "x" * 8 + " (2)",
        "x" * 15 + "…" + "x" * 7 + "y",
    ]


def _luminance(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [LIGHT, DARK])
@pytest.mark.parametrize("role", ["text", "muted", "subject", "baseline", "other"])
def test_text_colours_meet_wcag_contrast(theme, role):
    """WCAG 2.2, success criterion 1.4.3: at least 4.5 to 1."""
    high, low = sorted((_luminance(getattr(theme, role)), _luminance(theme.background)), reverse=True)
    assert (high + 0.05) / (low + 0.05) >= 4.5


def test_pictures_of_tasks_and_judges_show_the_numbers():
    axes = plots.draw_tasks(example_report(), LIGHT).axes[0]
    marks = [line for line in axes.lines if line.get_marker() in ("o", "s") and len(line.get_xdata())]
    values = sorted(
        float(line.get_xdata()) if np.ndim(line.get_xdata()) == 0 else float(line.get_xdata()[0]) for line in marks
    )
    assert values == pytest.approx([-5.0, -2.0, -0.1, 4.0])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["boolq", "hellaswag", "squad"]
    axes = plots.draw_judges(example_report(), LIGHT).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["labeler", "judge-1"]
