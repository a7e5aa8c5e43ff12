"""The sentences of the reward model's page, made from `reward_metrics`: what was found, and what to do about it."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import stats

from instruct_trl.report.findings import NBSP, Verdict, estimate, minus, number, pairs_ordered, percent, seen_too_often

Metrics = dict[str, Any]
Rows = dict[str, dict[str, Any]]

LENGTH_LIMIT = 0.5
"""|Pearson's r| of reward and length within prompts above which the page warns."""
ECE_LIMIT = 0.1
"""Expected calibration error above which the page warns."""
ECE_FINE = 0.05
FOLD_LOSS_LIMIT = 0.05
"""Loss of accuracy on new labelers above which the page warns, if it is clear; the paper's is 0.028."""
FEW_PROMPTS = 100


def headline(metrics: Metrics) -> tuple[Verdict, str]:
    """Whether the reward model agrees with the labeler more often than a coin, and how often."""
    seen, found = metrics.get("trained_on"), estimate(metrics["pair_accuracy"])
    if seen and seen_too_often(seen):
        return "missing", (
            f"{seen['rows']:,} of the {seen['of']:,} rows of the test split have prompts that are also in the training "
            "rows, so this page gives no verdict."
        )
    orders = f"it orders {pairs_ordered(metrics)} as the labeler does."
    if found.bounds is None:
        few = "1 prompt is too few" if found.n == 1 else f"{found.n} prompts are too few"
        return "missing", f"{few} for an interval, so this says little: {orders}"
    but = " But read the warnings below." if metrics.get("warnings") else ""
    verdicts: dict[str, tuple[Verdict, str]] = {
        "above": ("better", f"The reward model knows more than a coin: {orders}{but}"),
        "below": ("worse", f"The reward model does worse than a coin: {orders}"),
        "unclear": ("unclear", f"Whether the reward model knows more than a coin is open: {orders}"),
    }
    return verdicts[found.side_of(0.5)]


def accuracy(metrics: Metrics) -> str:
    """The agreement over all pairs."""
    return f"Reward model and labeler agree on {percent(metrics['pair_accuracy']['mean'])} of pairs"


def differs(rows: Rows) -> bool:
    """Do the groups differ by more than chance (Cochran's Q against χ² at 5 %)?"""
    known = [row for row in rows.values() if row["low"] is not None and row["high"] > row["low"]]
    if len(known) < 2:
        return False
    rates, widths = (
        np.array(column) for column in zip(*((r["mean"], r["high"] - r["low"]) for r in known), strict=True)
    )
    weights = (3.92 / widths) ** 2  # a 95 % interval is 2 × 1.96 errors wide
    q = (weights * (rates - np.average(rates, weights=weights)) ** 2).sum()
    return bool(stats.chi2.sf(q, len(known) - 1) < 0.05)


def groups(rows: Rows, what: str) -> str:
    """Whether agreement depends on `what`, and the bounds that it lies between."""
    rates = [100 * row["mean"] for row in rows.values()]
    bounds = f"{min(rates):.0f} to {max(rates):.0f} %".replace(" ", NBSP)  # kept on one line of the title
    if differs(rows):
        return f"Agreement differs by {what}: {bounds}"
    return f"Agreement does not clearly differ by {what} ({bounds})"


def calibration(metrics: Metrics) -> str:
    """Too sure, not sure enough, or about right."""
    found = metrics["calibration"]
    if found["ece"] <= max(ECE_FINE, 1.5 * found["ece_by_chance"]):
        return "The reward model is about as sure as it should be"
    if found["overconfidence"] > 0:
        return "The reward model is too sure of itself"
    return "The reward model is not sure enough of itself"


def length(metrics: Metrics) -> str:
    """How the score goes with the length of the answer, at equal prompt."""
    found = estimate(metrics["length"]["within_prompt"]["pearson"])
    r, way = found.mean, "higher" if found.mean > 0 else "lower"
    shown = f"(r = {minus(r, '+.2f')})".replace(" ", NBSP)
    if abs(r) <= 0.1:
        return f"The score hardly depends on length {shown}"
    if found.bounds and found.side_of(0) == "unclear":
        return f"Whether the score depends on length is open {shown}"
    return f"Longer answers score {'much' if abs(r) > LENGTH_LIMIT else 'somewhat'} {way} {shown}"


def best_rule(metrics: Metrics) -> str:
    """The better of the two rules: "longer is better" or "shorter is better"."""
    better = max(("longer", "shorter"), key=lambda name: metrics["length"][f"{name}_is_better"]["mean"])
    return f"{better} is better"


def rules(metrics: Metrics) -> str:
    """Whether the model knows more than the length; first of all where length misleads it."""
    for name in ("shorter", "longer"):
        row = metrics["length"][f"if_{name}_wins"]
        if fails(row):
            return f"Where the {name} answer is better, the reward model is wrong ({percent(row['mean'])} right)"
    gain, rule = estimate(metrics["length"]["gain_over_rule"]), f"rule “{best_rule(metrics)}”"
    points = f"{100 * abs(gain.mean):.0f} points"
    return {
        "above": f"The reward model beats the {rule} by {points}",
        "below": f"The {rule} beats the reward model by {points}",
        "unclear": f"The reward model does not clearly beat the {rule}",
    }[gain.side_of(0)]


def fails(row: dict[str, Any] | None) -> bool:
    """Is the whole interval below one half?"""
    return row is not None and estimate(row).side_of(0.5) == "below"


def scores(metrics: Metrics) -> str:
    """How far best-ranked and worst-ranked answers are apart."""
    found = metrics["scores"]
    gap = found["best_mean"] - found["worst_mean"]
    if gap > 0.2 * found["std"]:
        return f"Best-ranked answers score {number(gap)} above the worst-ranked ones on average"
    return f"Best-ranked answers {'score hardly' if gap > 0 else 'do not score'} above the worst-ranked ones"


def new_labelers(folds: Metrics) -> str:
    """Whether the model does worse on labelers it never saw."""
    change = estimate(folds["difference"])
    verb = {"below": "loses", "above": "gains"}.get(change.side_of(0))
    if verb is None:
        return "No clear loss on labelers that the reward model never saw"
    return f"On labelers it never saw, the reward model {verb} {number(100 * abs(change.mean))} points"


def warnings(metrics: Metrics) -> list[str]:
    """Faults of this reward model or of its measurement, and what to do, one sentence or two each."""
    found = [*_accuracy_warnings(metrics), *_length_warnings(metrics), *_calibration_warnings(metrics)]
    if seen := metrics.get("trained_on"):
        found.insert(
            0,
            f"{seen['rows']:,} of the {seen['of']:,} rows of the test split have prompts that are also in the training "
            "rows, so they are not held out. Put other prompts into the test split.",
        )
    found += [
        f"The reward model contradicts {name}: it is right on {percent(row['mean'])} of the pairs. Look at that "
        "labeler's rows: the scale may be the wrong way round there, or the instructions were read differently."
        for name, row in metrics["by_labeler"].items()
        if fails(row)
    ]
    folds = metrics.get("labeler_folds")
    if folds and folds["difference"]["mean"] < -FOLD_LOSS_LIMIT and estimate(folds["difference"]).side_of(0) == "below":
        found.append(
            f"{new_labelers(folds)}: it has learned these labelers rather than the task. Collect comparisons from more "
            "labelers, and report the accuracy on new ones."
        )
    return found


def _accuracy_warnings(metrics: Metrics) -> list[str]:
    rate = estimate(metrics["pair_accuracy"])
    found = []
    if rate.side_of(0.5) == "below":
        found.append(
            "The reward model orders answers the wrong way round. Check the data: `ranks` are lower for the better "
            "answer, `scores` are higher, a pair names the winner first."
        )
    elif rate.bounds and rate.side_of(0.5) == "unclear":
        found.append(
            "The accuracy cannot be told from a coin's. Do not train a policy on this reward model. Train it on more "
            "comparisons or with another learning rate, or evaluate on more prompts if there are few."
        )
    if rate.n < FEW_PROMPTS:
        found.append(
            f"Only {rate.n} prompts have a compared pair, so the intervals are wide. Evaluate on {FEW_PROMPTS} or "
            "more, better several hundred."
        )
    return found


def _length_warnings(metrics: Metrics) -> list[str]:
    found: list[str] = []
    if not (measured := metrics["length"]):
        return found
    r = (measured["within_prompt"]["pearson"] or {"mean": 0.0})["mean"]
    if abs(r) > LENGTH_LIMIT:
        longer, shorter = ("longer", "shorter") if r > 0 else ("shorter", "longer")
        found.append(
            f"The score follows length: r = {minus(r, '+.2f')} within prompts. A policy trained on it will learn to "
            f"write {longer} answers. Add comparisons that the {shorter} answer wins, balance lengths in the training "
            "data, or take the length's share out of the score; watch answer length during PPO."
        )
    for name, other in (("shorter", "longer"), ("longer", "shorter")):
        if fails(row := measured[f"if_{name}_wins"]):
            found.append(
                f"Where the {name} answer is the better one, the reward model still picks the {other} one: "
                f"{percent(row['mean'])} right, less than a coin. The average hides this."
            )
    gain = estimate(measured["gain_over_rule"])
    if gain.bounds and gain.side_of(0) != "above":
        found.append(
            f"The reward model does not clearly beat the rule “{best_rule(metrics)}”. What it knows may be length "
            "alone. Look at its accuracy where that rule is wrong before you train a policy on it."
        )
    return found


def _calibration_warnings(metrics: Metrics) -> list[str]:
    found = metrics["calibration"]
    if found["ece"] <= max(ECE_LIMIT, 1.5 * found["ece_by_chance"]):
        return []
    text = f"The calibration is poor: ECE {number(found['ece'])}. "
    if found["overconfidence"] > 0:
        text += "The reward model is too sure: train for fewer epochs (the paper: one) or with a lower learning rate"
    else:
        text += "The reward model is not sure enough: train longer or with a higher learning rate"
    if found["temperature"] is not None:
        text += f", or divide its scores by {number(found['temperature'])}, which changes no order"
    return [f"{text}. In PPO the scale of the score and the KL coefficient act together."]
