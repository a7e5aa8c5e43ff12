"""The sentences of the reward model's page, made from `reward_metrics`: what was found."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import stats

from instruct_trl.evaluation.learning_curve import MIN_POINTS
from instruct_trl.report.findings import (
    COIN,
    NBSP,
    RULES,
    Verdict,
    estimate,
    figure,
    floors_of,
    no_more_than,
    not_told_from,
    number,
    pairs_ordered,
    percent,
    seen_too_often,
    signed,
)

Metrics = dict[str, Any]
Rows = dict[str, dict[str, Any]]

LENGTH_LIMIT = 0.5
"""|Pearson's r| of reward and length within prompts above which the page warns."""
ECE_LIMIT, ECE_FINE = 0.1, 0.05
"""Expected calibration error above which the page warns, and below which it is about right."""
FOLD_LOSS_LIMIT = 0.05
"""Loss of accuracy on new labelers above which the page warns, if it is clear; the paper's is 0.028."""
FEW_PROMPTS = 100


def headline(metrics: Metrics) -> tuple[Verdict, str]:
    """Whether the reward model knows more than a coin, than length and than words, and how often it is right."""
    seen, found = metrics.get("trained_on"), estimate(metrics["pair_accuracy"])
    if seen and seen_too_often(seen):
        rows = f"{seen['rows']:,} of the {seen['of']:,} rows of the test split"
        return "missing", f"{rows} have prompts that are also in the training rows, so this page gives no verdict."
    floors = floors_of(metrics)
    rates = [f", {floor['rule']} {percent(floor['accuracy']['mean'])}" for floor in floors.values()]
    orders = f"it orders {pairs_ordered(metrics)} as the labeler does{''.join(rates)}."
    if found.bounds is None:
        few = "1 prompt is too few" if found.n == 1 else f"{found.n} prompts are too few"
        return "missing", f"{few} for an interval, so this says little: {orders}"
    if found.side_of(0.5) == "below":
        return "worse", f"The reward model does worse than {COIN}: {orders}"
    same = not_told_from(metrics)
    if same == [COIN]:
        return "unclear", f"The reward model cannot be told from {COIN}: {orders}"
    if less := no_more_than(metrics):
        beaten = any(estimate(floors[known]["lead"]).side_of(0) == "below" for known in less)
        return "worse" if beaten else "unclear", f"The reward model shows no more than {' or '.join(less)}: {orders}"
    if same:
        rules = " or ".join(RULES[known] for known in same)
        return "unclear", f"The reward model cannot be told from {rules}: {orders}"
    but = " But read the warnings below." if metrics.get("warnings") else ""
    return "better", f"The reward model knows more than {' and '.join(floors) or COIN}: {orders}{but}"


def accuracy(metrics: Metrics) -> str:
    """The agreement over all pairs."""
    return f"Reward model and labeler agree on {percent(metrics['pair_accuracy']['mean'])} of pairs"


def differs(rows: Rows) -> bool:
    """Do the groups differ by more than chance (Cochran's Q against χ² at 5 %)?"""
    known = [(row["mean"], row["high"] - row["low"]) for row in rows.values() if row["low"] is not None]
    rates, widths = np.array([row for row in known if row[1] > 0]).reshape(-1, 2).T
    if len(rates) < 2:
        return False
    weights = (3.92 / widths) ** 2  # a 95 % interval is 2 × 1.96 errors wide
    q = (weights * (rates - np.average(rates, weights=weights)) ** 2).sum()
    return bool(stats.chi2.sf(q, len(rates) - 1) < 0.05)


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
    return f"The reward model is {'too sure' if found['overconfidence'] > 0 else 'not sure enough'} of itself"


def length(metrics: Metrics) -> str:
    """How the score goes with the length of the answer, at equal prompt."""
    found = estimate(metrics["length"]["within_prompt"]["pearson"])
    r, way = found.mean, "higher" if found.mean > 0 else "lower"
    shown = f"(r = {signed(r)})".replace(" ", NBSP)
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
    gain, rule = estimate(metrics["floors"]["length"]["lead"]), f"rule “{best_rule(metrics)}”"
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


def twice(curve: Metrics) -> str:
    """What twice the labels would bring, by the line through the learning curve."""
    points, gain = curve["points"], curve["per_doubling"]
    if gain is None:
        return (
            f"What twice the labels would bring takes a line through {MIN_POINTS} shares of the prompts or more; here "
            f"{'is' if len(points) == 1 else 'are'} {len(points)}."
        )
    found, last = estimate(gain), points[-1]
    bounds = figure(gain, "+.1f", 100, f"{NBSP}points", " ").replace("(", f"(95{NBSP}% interval ")
    if found.side_of(0) == "above":
        then = percent(min(1.0, last["pair_accuracy"]["mean"] + found.mean))
        return (
            f"Twice the labels ({2 * last['prompts']:,} prompts) would bring {bounds}: from about "
            f"{percent(last['pair_accuracy']['mean'])} of pairs to about {then}."
        )
    if found.side_of(0) == "below":
        return f"More labels made it worse, {bounds} for twice as many: look at the training before you pay for more."
    return f"Whether twice the labels would bring more is open: {bounds}."


def new_labelers(folds: Metrics) -> str:
    """Whether the model does worse on labelers it never saw."""
    change = estimate(folds["difference"])
    verb = {"below": "loses", "above": "gains"}.get(change.side_of(0))
    if verb is None:
        return "No clear loss on labelers that the reward model never saw"
    return f"On labelers it never saw, the reward model {verb} {number(100 * abs(change.mean))} points"
