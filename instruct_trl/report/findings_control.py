"""The sentences on a run's control: how much of the win is left without feedback."""

from __future__ import annotations

from instruct_trl.report import findings
from instruct_trl.report.data import ModelResult, ReportData
from instruct_trl.report.findings import NBSP, Verdict, estimate, figure, pairs_ordered, share


def model(data: ReportData) -> ModelResult | None:
    """The control among the models, if it was compared with the baseline."""
    found = data.model(data.control.get("name", ""))
    return found if found and found.win else None


def headline(data: ReportData) -> tuple[Verdict, str]:
    """The run's headline, with the control's win rate beside it: no Yes where the control wins as much."""
    verdict, text = findings.headline(data)
    control = model(data)
    if control is None or verdict == "missing":
        return verdict, text
    lead, name = data.control["lead"], data.headline_model.name
    points = figure(lead, ".1f", 100, f"{NBSP}points", " ")
    beside = (
        f"he control, with {control.name}, wins {share(control.win)}; {name}'s lead over it on the same prompts is "
    )
    side = estimate(lead).side_of(0)
    if verdict != "better" or side == "above":
        return verdict, f"{text} T{beside}{points}."
    why = "does not" if side == "below" else "need not"
    return "doubtful", f"{text} But t{beside}{points}, so this win {why} come from the feedback."


def meaning(data: ReportData) -> str:
    """What the control is, and how its reward model orders held-out pairs."""
    text = (
        f"“{data.control['name']}” is a control: the same policy trained in the same way, but the ranks that its "
        "reward model learned from were shuffled within each prompt. What is left of a win there does not come from "
        "the feedback."
    )
    if "pair_accuracy" in data.control:
        text += f" Its reward model orders {pairs_ordered(data.control)} as the labeler does."
    return f"{text} Intervals are over prompts; another seed of the trainings would move both win rates, too."
