"""The table and the picture of an SFT selection: the view of each criterion, and the epoch that it picks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from instruct_trl.evaluation.selection import SelectionResult, save_selection
from instruct_trl.report.findings import figure, minus
from instruct_trl.report.pages import environment
from instruct_trl.report.pictures import Curve, Theme, curves_picture, draw_all, short


def write_selection(result: SelectionResult, folder: Path) -> None:
    """Write selection.json (everything), selection.md (a table) and selection.png (the picture, and a dark one)."""
    save_selection(result, folder, finding=finding(result))
    (folder / "selection.md").write_text(selection_markdown(result), encoding="utf-8", errors="replace")
    draw_all({"selection": lambda theme: draw_selection(result, theme)}, folder)


def selection_markdown(result: SelectionResult) -> str:
    """The finding, and a table with a row for each checkpoint."""
    picks = {"RM score": result.best, "loss": result.best_by_loss}
    rows = [
        [
            Path(row.checkpoint).name,
            "" if row.epoch is None else f"{row.epoch:.3g}",
            figure(row.rm_score, gap=" "),
            "" if row.validation_loss is None else f"{row.validation_loss:.4f}",
            f"{row.truncated:.0%}",
            " and ".join(name for name, best in picks.items() if best == row.checkpoint),
        ]
        for row in result.rows
    ]
    return environment("md").get_template("selection.md").render(finding=finding(result), rows=rows)


def finding(result: SelectionResult) -> str:
    """Which checkpoint is picked, and whether its lead over the runner-up and over the last one is more than noise."""
    text = f"The RM score picks {_name(result, result.best)}"
    if result.best_by_loss == result.best:
        text += ", and so does the validation loss"
    elif result.best_by_loss is not None:
        text += f"; the validation loss would pick {_name(result, result.best_by_loss)}"
    over = {"runner-up": result.runner_up, "last checkpoint": result.last}
    if result.runner_up and result.runner_up == result.last:
        over = {"runner-up and last checkpoint": result.last}
    sentences = [f"{text}."]
    for what, gap in over.items():
        if gap is None:
            continue
        lead = f"lead of {gap.mean:.3f} over the {what}, {_name(result, gap.checkpoint)},"
        if gap.bounds:
            bounds = " to ".join(minus(bound, "+.3f") for bound in gap.bounds)
            says = "is more than noise" if gap.is_clear else "cannot be told from noise"
            sentences.append(f"Its {lead} {says} (95 % interval over {gap.n} prompts {bounds}).")
        else:
            few = f"{gap.n} different prompts are too few for an interval"
            sentences.append(f"Whether its {lead} is more than noise cannot be said: {few}.")
    return " ".join(sentences)


def _name(result: SelectionResult, checkpoint: str) -> str:
    epoch = next(row.epoch for row in result.rows if row.checkpoint == checkpoint)
    return Path(checkpoint).name if epoch is None else f"epoch {epoch:.3g}"


def draw_selection(result: SelectionResult, theme: Theme) -> Any:
    """RM score above, validation loss below, over epochs; a filled, named dot where each criterion picks."""
    rows, has_epoch = result.rows, all(row.epoch is not None for row in result.rows)
    places = {row.checkpoint: i for i, row in enumerate(rows)}
    picks = f"picks {short(_name(result, result.best))}"
    label = "RM score of its answers (95 % interval; higher is better)"
    curves = [Curve(label, [row.rm_score for row in rows], "subject", places[result.best], picks)]
    if result.best_by_loss is not None:
        losses, picks = [row.validation_loss for row in rows], f"picks {short(_name(result, result.best_by_loss))}"
        label = "Validation loss (nats per token; lower is better)"
        # Below a minimum, as above a maximum, the curve is not in the way of the name.
        curves.append(Curve(label, losses, "baseline", places[result.best_by_loss], picks, below=True))
    x = [row.epoch if has_epoch else (row.step or i) for i, row in enumerate(rows)]
    title = f"SFT selection by RM score: {short(_name(result, result.best))}"
    return curves_picture(title, x, "epoch" if has_epoch else "training step", curves, theme)
