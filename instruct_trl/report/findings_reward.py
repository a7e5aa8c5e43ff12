"""The sentences of the reward model's report, made from `reward_metrics`: what was found, and what to do about it."""

from __future__ import annotations

import math
from typing import Any

from instruct_trl.evaluation.estimates import student_t
from instruct_trl.report.findings import NBSP, OVERLAP_LIMIT, Verdict, number, percent, percent_range

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


def rate_text(row: dict[str, Any]) -> str:
    """ "71 %  (68 to 74)"; without the interval where there is none."""
    text = percent(row["accuracy"])
    return text if row.get("low") is None else f"{text}  ({percent_range(row['low'], row['high'])})"


def headline(metrics: Metrics) -> tuple[Verdict, str]:
    """Whether the reward model agrees with the labeler more often than a coin, and how often.

    There is no verdict where too many of the rows were trained on.
    """
    seen = metrics.get("trained_on")
    if seen and seen["rows"] > OVERLAP_LIMIT * seen["of"]:
        return "missing", (
            f"{seen['rows']:,} of the {seen['of']:,} rows of the test split have prompts that are also in the training "
            "rows, so this page gives no verdict."
        )
    low, high = metrics["low"], metrics["high"]
    interval = f" (95{NBSP}% interval {percent_range(low, high)})" if low is not None else ""
    pairs = f"{percent(metrics['pair_accuracy'])} of {metrics['n_pairs']:,} held-out pairs{interval}"
    if low is None:
        few = f"{metrics['n_prompts']} prompt{'s are' if metrics['n_prompts'] != 1 else ' is'} too few for an interval"
        return "missing", f"{few}, so this says little: the reward model orders {pairs} as the labeler does."
    if low > 0.5:
        but = " But read the warnings below." if metrics.get("warnings") else ""
        return "better", f"The reward model knows more than a coin: it orders {pairs} as the labeler does.{but}"
    if high < 0.5:
        return "worse", f"The reward model does worse than a coin: it orders only {pairs} as the labeler does."
    return "unclear", f"Whether the reward model knows more than a coin is open: it orders {pairs} as the labeler does."


def accuracy_title(metrics: Metrics) -> str:
    """The finding of the first picture."""
    return f"Reward model and labeler agree on {percent(metrics['pair_accuracy'])} of pairs"


def accuracy_caption(metrics: Metrics) -> str:
    """The overall accuracy, and how it goes with the distance in rank."""
    text = accuracy_title(metrics)
    rows = metrics["by_rank_distance"]
    if rows:
        (near, first), (far, last) = list(rows.items())[0], list(rows.items())[-1]
        text += (
            f": on {percent(first['accuracy'])} where the two answers are {near} rank{'s' * (near != '1')} apart, on "
            f"{percent(last['accuracy'])} where they are {far} apart"
        )
    return text + "."


def differs(rows: Rows) -> bool:
    """Do the groups differ by more than chance (Cochran's Q against χ² at 5 %, by Wilson and Hilferty's formula)?"""
    known = [row for row in rows.values() if row["low"] is not None and row["high"] > row["low"]]
    if len(known) < 2:
        return False
    weights = [(3.92 / (row["high"] - row["low"])) ** 2 for row in known]  # a 95 % interval is 2 × 1.96 errors wide
    mean = sum(w * row["accuracy"] for w, row in zip(weights, known, strict=True)) / sum(weights)
    q = sum(w * (row["accuracy"] - mean) ** 2 for w, row in zip(weights, known, strict=True))
    k = len(known) - 1
    return q > k * (1 - 2 / (9 * k) + 1.6449 * math.sqrt(2 / (9 * k))) ** 3


def group_title(rows: Rows, what: str) -> str:
    """Whether agreement depends on `what`, and between which bounds it lies."""
    ends = sorted(row["accuracy"] for row in rows.values())
    bounds = f"{percent_range(ends[0], ends[-1])} %".replace(" ", NBSP)  # kept on one line of the title
    if differs(rows):
        return f"Agreement differs by {what}: {bounds}"
    return f"Agreement does not clearly differ by {what} ({bounds})"


def calibration_title(metrics: Metrics) -> str:
    """Too sure, not sure enough, or about right."""
    found = metrics["calibration"]
    if found["ece"] <= max(ECE_FINE, 1.5 * found["ece_by_chance"]):
        return "The reward model is about as sure as it should be"
    if found["overconfidence"] > 0:
        return "The reward model is too sure of itself"
    return "The reward model is not sure enough of itself"


def calibration_caption(metrics: Metrics) -> str:
    """The top bin in words, then the ECE."""
    found = metrics["calibration"]
    top = found["bins"][-1]
    return (
        f"{calibration_title(metrics)}: where it is {percent(top['confidence'])} sure, it is right in "
        f"{percent(top['accuracy'])} of {top['n_pairs']:,} pairs. The expected calibration error (ECE) is "
        f"{number(found['ece'])}; a perfectly calibrated model would show about {number(found['ece_by_chance'])} on so "
        "many pairs and prompts."
    )


def signed(value: float) -> str:
    """+0.31, with a real minus sign and two digits."""
    return f"{value:+.2f}".replace("-", "−")


def length_title(metrics: Metrics) -> str:
    """How the score goes with the length of the answer, at equal prompt."""
    r = metrics["length"]["within_prompt"]["pearson"]
    if r is None:
        return "Length and score cannot be compared: one of them never varies"
    if abs(r) > 0.1 and _holds_zero(metrics["length"]["within_prompt"]):
        return f"Whether the score depends on length is open (r = {signed(r)})"
    way, shown = "higher" if r > 0 else "lower", f"(r = {signed(r)})".replace(" ", NBSP)
    if abs(r) > LENGTH_LIMIT:
        return f"Longer answers score much {way} {shown}"
    if abs(r) > 0.1:
        return f"Longer answers score somewhat {way} {shown}"
    return f"The score hardly depends on length {shown}"


def _holds_zero(row: dict[str, Any]) -> bool:
    """Is there an interval, and does it lie on both sides of 0?"""
    return row["low"] is not None and row["low"] <= 0 <= row["high"]


def length_caption(metrics: Metrics) -> str:
    """The correlation with its interval, and how often model and labeler pick the longer answer."""
    length = metrics["length"]
    within = length["within_prompt"]
    text = length_title(metrics)
    if within["low"] is not None:
        text += f", 95{NBSP}% interval {signed(within['low'])} to {signed(within['high'])}"
    if length["model_picks_longer"]:
        model, labeler = (percent(length[f"{who}_picks_longer"]["accuracy"]) for who in ("model", "labeler"))
        text += (
            f". Of two answers the reward model picks the longer one in {model} of the pairs, the labeler in {labeler}"
        )
    return text + "."


def best_rule(metrics: Metrics) -> str:
    """The better of the two rules: "longer is better" or "shorter is better"."""
    length = metrics["length"]
    longer = length["longer_is_better"]["accuracy"] >= length["shorter_is_better"]["accuracy"]
    return "longer is better" if longer else "shorter is better"


def rules_title(metrics: Metrics) -> str:
    """Whether the model knows more than the length; first of all where length misleads it."""
    for name in ("shorter", "longer"):
        row = metrics["length"][f"if_{name}_wins"]
        if fails(row):
            return f"Where the {name} answer is better, the reward model is wrong ({percent(row['accuracy'])} right)"
    gain, rule = metrics["length"]["gain_over_rule"], f"“{best_rule(metrics)}”"
    points = f"{100 * abs(gain['gain']):.0f} points"
    if gain["low"] is not None and gain["low"] > 0:
        return f"The reward model beats the rule {rule} by {points}"
    if gain["high"] is not None and gain["high"] < 0:
        return f"The rule {rule} beats the reward model by {points}"
    return f"The reward model does not clearly beat the rule {rule}"


def fails(row: dict[str, Any] | None) -> bool:
    """Is the whole interval below one half?"""
    return bool(row) and row["high"] is not None and row["high"] < 0.5  # type: ignore[index]


def rules_caption(metrics: Metrics) -> str:
    """The title, and the model's accuracy where the labeler chose the longer or the shorter answer."""
    text = rules_title(metrics)
    longer, shorter = (metrics["length"][name] for name in ("if_longer_wins", "if_shorter_wins"))
    if longer and shorter:
        text += (
            f". It is right in {percent(longer['accuracy'])} of the pairs whose better answer is the longer one, and "
            f"in {percent(shorter['accuracy'])} of those whose better answer is the shorter one"
        )
    return text + "."


def rules_gain(metrics: Metrics) -> str:
    """The model's accuracy minus the better rule's, with its interval; empty without one."""
    gain = metrics["length"]["gain_over_rule"]
    if gain["low"] is None:
        return ""
    mean, low, high = (f"{100 * gain[name]:+.0f}".replace("-", "−") for name in ("gain", "low", "high"))
    rule = best_rule(metrics)
    return f"Accuracy minus that of “{rule}”: {mean} points (95{NBSP}% interval {low} to {high})."


def scores_title(metrics: Metrics) -> str:
    """How far best-ranked and worst-ranked answers are apart."""
    scores = metrics["scores"]
    gap = scores["best_mean"] - scores["worst_mean"]
    if gap > 0.2 * scores["std"]:
        return f"Best-ranked answers score {number(gap)} above the worst-ranked ones on average"
    if gap > 0:
        return "Best-ranked answers score hardly above the worst-ranked ones"
    return "Best-ranked answers do not score above the worst-ranked ones"


def scores_caption(metrics: Metrics) -> str:
    """The title with the gap in units of the spread."""
    scores = metrics["scores"]
    text = scores_title(metrics)
    gap = scores["best_mean"] - scores["worst_mean"]
    if gap > 0 and scores["std"] > 0:
        text += f": {number(gap / scores['std'])} times the spread (standard deviation) of all scores"
    return text + "."


def fold_loss_is_clear(folds: Metrics) -> bool:
    """Does the 95 % interval of the folds' mean difference (Student's t) leave out 0?"""
    error, n = folds["difference"]["standard_error"], len(folds["folds"])
    return abs(folds["difference"]["mean"]) > student_t(n - 1) * error


def folds_title(folds: Metrics) -> str:
    """Whether the model does worse on labelers it never saw."""
    loss = -folds["difference"]["mean"]
    if not fold_loss_is_clear(folds):
        return "No clear loss on labelers that the reward model never saw"
    verb = "loses" if loss > 0 else "gains"
    return f"On labelers it never saw, the reward model {verb} {number(100 * abs(loss))} points"


def folds_caption(folds: Metrics) -> str:
    """Mean ± standard error of both, with the paper's numbers beside them."""
    text = ", ".join(
        f"{100 * folds[name]['mean']:.1f} ± {100 * folds[name]['standard_error']:.1f}{NBSP}% {what}"
        for name, what in (("held_in", "on the training labelers' held-in prompts"), ("held_out", "on new labelers"))
    )
    return f"{folds_title(folds)}: {text} (mean ± standard error over {len(folds['folds'])} folds)."


def warnings(metrics: Metrics) -> list[str]:
    """What is wrong with this reward model or with its measurement, and what to do, one sentence or two each."""
    found = [
        *_overlap_warnings(metrics),
        *_accuracy_warnings(metrics),
        *_length_warnings(metrics),
        *_calibration_warnings(metrics),
    ]
    for name, row in metrics["by_labeler"].items():
        if row["high"] is not None and row["high"] < 0.5:
            rate = percent(row["accuracy"])
            found.append(
                f"The reward model contradicts {name}: it is right on {rate} of the pairs. Look at that labeler's "
                "rows: the scale may be the wrong way round there, or the instructions were read differently."
            )
    folds = metrics.get("labeler_folds")
    if folds and folds["difference"]["mean"] < -FOLD_LOSS_LIMIT and fold_loss_is_clear(folds):
        found.append(
            f"{folds_title(folds)}: it has learned these labelers rather than the task. Collect comparisons from more "
            "labelers, and report the accuracy on new ones."
        )
    return found


def _overlap_warnings(metrics: Metrics) -> list[str]:
    seen = metrics.get("trained_on")
    if not seen:
        return []
    return [
        f"{seen['rows']:,} of the {seen['of']:,} rows of the test split have prompts that are also in the training "
        "rows. What this page says of them is not said of held-out prompts. Put other prompts into the test split."
    ]


def _accuracy_warnings(metrics: Metrics) -> list[str]:
    low, high, n = metrics["low"], metrics["high"], metrics["n_prompts"]
    found = []
    if high is not None and high < 0.5:
        found.append(
            "The reward model orders answers the wrong way round. Check the data: `ranks` are lower for the better "
            "answer, `scores` are higher, a pair names the winner first."
        )
    elif low is not None and low <= 0.5:
        found.append(
            "The accuracy cannot be told from a coin's. Do not train a policy on this reward model: train it on more "
            "comparisons or with another learning rate, or evaluate on more prompts if there are few."
        )
    if n < FEW_PROMPTS:
        found.append(
            f"Only {n} prompts have a compared pair, so the intervals are wide. Evaluate on {FEW_PROMPTS} or more, "
            "better several hundred."
        )
    return found


def _length_warnings(metrics: Metrics) -> list[str]:
    length = metrics["length"]
    if not length:
        return []
    found = []
    r = length["within_prompt"]["pearson"]
    if r is not None and abs(r) > LENGTH_LIMIT:
        longer = "longer" if r > 0 else "shorter"
        other = "shorter" if r > 0 else "longer"
        found.append(
            f"The score follows length: r = {signed(r)} within prompts. A policy trained on it will learn to write "
            f"{longer} answers. Add comparisons that the {other} answer wins, balance lengths in the training data, "
            "or take the length's share out of the score; watch answer length during PPO."
        )
    for name, other in (("shorter", "longer"), ("longer", "shorter")):
        row = length[f"if_{name}_wins"]
        if fails(row):
            found.append(
                f"Where the {name} answer is the better one, the reward model still picks the {other} one: "
                f"{percent(row['accuracy'])} right, less than a coin. The average hides this."
            )
    gain = length["gain_over_rule"]
    if gain["low"] is not None and gain["low"] <= 0:
        found.append(
            f"The reward model does not clearly beat the rule “{best_rule(metrics)}”. What it knows may be length "
            "alone: look at its accuracy where that rule is wrong before you train a policy on it."
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
    return [text + ". In PPO the scale of the score and the KL coefficient act together."]
