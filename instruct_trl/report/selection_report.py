"""The table and the picture of an SFT selection: what each criterion sees, and which epoch it picks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from instruct_trl.evaluation.selection import CheckpointRow, Difference, SelectionResult, save_selection
from instruct_trl.report.pictures import LIGHT, Theme, new_figure, save_picture
from instruct_trl.report.plot_names import short
from instruct_trl.report.render import escape_markdown


def write_selection(result: SelectionResult, folder: Path) -> None:
    """Write selection.json (everything), selection.md (a table) and selection.png (the picture) into `folder`."""
    save_selection(result, folder, finding=finding(result))
    (folder / "selection.md").write_text(selection_markdown(result), encoding="utf-8", errors="replace")
    save_picture(lambda theme: draw_selection(result, theme), LIGHT, folder / "selection.png")


def selection_markdown(result: SelectionResult) -> str:
    """The finding, and a table with a row for each checkpoint."""
    lines = ["# Which SFT checkpoint to keep", "", escape_markdown(finding(result)), ""]
    lines += [
        "| checkpoint | epoch | RM score | validation loss | answers cut | picked by |",
        "|---|---|---|---|---|---|",
    ]
    for row in result.rows:
        name = escape_markdown(Path(row.checkpoint).name)
        lines.append(
            f"| {name} | {_number(row.epoch, '.3g')} | {_score(row)} "
            f"| {_number(row.validation_loss, '.4f')} | {row.truncated:.0%} | {_picked_by(result, row)} |"
        )
    lines += [
        "",
        "RM score: mean over the validation prompts, one answer each, with its 95 % interval. Every "
        "checkpoint answers the same prompts under the same noise, so two of them are compared prompt by prompt, and "
        "their difference is surer than the two intervals suggest. Validation loss: mean −log p of a demonstration's "
        "token, in nats.",
        "",
    ]
    return "\n".join(lines)


def _score(row: CheckpointRow) -> str:
    found = row.rm_score
    return f"{found.mean:.3f}" + ("" if found.low is None else f" ({found.low:.3f} to {found.high:.3f})")


def _picked_by(result: SelectionResult, row: CheckpointRow) -> str:
    marks = ["RM score"] * (row.checkpoint == result.best) + ["loss"] * (row.checkpoint == result.best_by_loss)
    return " and ".join(marks)


def finding(result: SelectionResult) -> str:
    """Which checkpoint is picked, and whether its lead over the runner-up and over the last one is more than noise."""
    over = [(gap, what) for gap, what in ((result.runner_up, "runner-up"), (result.last, "last checkpoint")) if gap]
    if len(over) == 2 and over[0][0] == over[1][0]:
        over = [(over[0][0], "runner-up and last checkpoint")]
    return " ".join([_headline(result), *(_lead(result, gap, what) for gap, what in over)])


def _lead(result: SelectionResult, gap: Difference, what: str) -> str:
    """One sentence on the lead over one other checkpoint."""
    name = _name(next(row for row in result.rows if row.checkpoint == gap.checkpoint))
    lead = f"lead of {gap.mean:.3f} over the {what}, {name},"
    if gap.low is None or gap.high is None:
        few = f"{gap.n} different prompts are too few for an interval"
        return f"Whether its {lead} is more than noise cannot be said: {few}."
    bounds = f"95 % interval over {gap.n} prompts {_signed(gap.low)} to {_signed(gap.high)}"
    return f"Its {lead} {'is more than noise' if gap.is_clear else 'cannot be told from noise'} ({bounds})."


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _headline(result: SelectionResult) -> str:
    by_path = {row.checkpoint: row for row in result.rows}
    chosen = f"The RM score picks {_name(by_path[result.best])}"
    if result.best_by_loss is None:
        return f"{chosen}."
    if result.best_by_loss == result.best:
        return f"{chosen}, and so does the validation loss."
    return f"{chosen}; the validation loss would pick {_name(by_path[result.best_by_loss])}."


def _name(row: CheckpointRow) -> str:
    return Path(row.checkpoint).name if row.epoch is None else f"epoch {row.epoch:.3g}"


def _number(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def draw_selection(result: SelectionResult, theme: Theme) -> Any:
    """RM score above, validation loss below, over epochs; a filled, named dot where each criterion picks."""
    has_loss = result.best_by_loss is not None
    figure = new_figure(4.6 if has_loss else 2.8, _title(result))
    panels = figure.subplots(2 if has_loss else 1, 1, sharex=True, squeeze=False)[:, 0]
    has_epoch = all(row.epoch is not None for row in result.rows)
    x = [row.epoch if has_epoch else (row.step or i) for i, row in enumerate(result.rows)]
    scores = [row.rm_score.mean for row in result.rows]
    bounds = [row.rm_score.bounds or (row.rm_score.mean, row.rm_score.mean) for row in result.rows]
    panels[0].errorbar(
        x, scores, [[abs(end - y) for end, y in zip(ends, scores, strict=True)] for ends in zip(*bounds, strict=True)],
        color=theme.subject, marker="o", markersize=4, linewidth=1.8, elinewidth=1, capsize=3,
    )  # fmt: skip
    panels[0].set_title("RM score of its answers (95 % interval; higher is better)", loc="left")
    _mark(panels[0], result, result.best, x, scores, theme.subject, theme, above=True)
    if has_loss:
        losses = [row.validation_loss for row in result.rows]
        panels[1].plot(x, losses, color=theme.baseline, marker="o", markersize=4, linewidth=1.8)
        panels[1].set_title("Validation loss (nats a token; lower is better)", loc="left")
        _mark(panels[1], result, result.best_by_loss, x, losses, theme.baseline, theme, above=False)
    panels[-1].set_xlabel("epoch" if has_epoch else "training step")
    for panel in panels:
        panel.grid(axis="y")
        panel.set_axisbelow(True)
        panel.margins(x=0.08, y=0.35)
        panel.locator_params(axis="x", integer=True)
    return figure


def _title(result: SelectionResult) -> str:
    by_path = {row.checkpoint: row for row in result.rows}
    return f"SFT selection by RM score: {short(_name(by_path[result.best]))}"


def _mark(
    axes: Any, result: SelectionResult, checkpoint: str | None, x: Any, y: Any, color: str, theme: Theme, *, above: bool
) -> None:
    """Name the picked point, above a maximum and below a minimum: there the curve is not in the way."""
    index = next(i for i, row in enumerate(result.rows) if row.checkpoint == checkpoint)
    axes.axvline(x[index], color=color, linewidth=1.2, linestyle=(0, (4, 3)), alpha=0.6)
    axes.plot(x[index], y[index], "o", markersize=11, color=color, markeredgecolor=theme.background, zorder=3)
    last = len(x) > 1 and index > (len(x) - 1) / 2
    name = short(_name(result.rows[index]))
    axes.annotate(
        f"picks {name}", (x[index], y[index]), xytext=(-8 if last else 8, 13 if above else -13),
        textcoords="offset points", ha="right" if last else "left", va="center", color=color, fontweight="bold",
    )  # fmt: skip
