"""The report's sentences, made from its numbers: each says what was found, whichever way it went."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Any, Literal

from instruct_trl.report.data import ModelResult, ReportData

Verdict = Literal["better", "worse", "unclear", "missing"]
Direction = Literal["rose", "fell", "did not clearly move", ""]

NBSP = "\u00a0"


def percent(value: float, digits: int = 0) -> str:
    """0.634 → "63 %", with a space that does not break."""
    return f"{100 * value:.{digits}f}{NBSP}%"


def percent_range(low: float, high: float) -> str:
    """(0.57, 0.69) → "57 to 69"."""
    return f"{100 * low:.0f} to {100 * high:.0f}"


def number(value: float, signed: bool = False) -> str:
    """Three significant digits or so, without exponents in the usual range, with a real minus sign."""
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 0.01 or size == 0 else 4
    if size and (size < 5e-4 or size >= 1e7):
        text = f"{value:+.1e}" if signed else f"{value:.1e}"
    else:
        text = f"{value:{'+' if signed else ''},.{digits}f}"
    return text.replace("-", "−")


def duration(seconds: float) -> str:
    """75 → "1 min 15 s"."""
    if seconds < 60:
        return f"{seconds:.1f}{NBSP}s" if seconds < 10 else f"{seconds:.0f}{NBSP}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{NBSP}min {rest}{NBSP}s"
    return f"{minutes // 60}{NBSP}h {minutes % 60}{NBSP}min"


OVERLAP_LIMIT = 0.05
"""Share of prompts that were trained on above which a page gives no verdict."""


def headline(data: ReportData) -> tuple[Verdict, str]:
    """The run's verdict and its sentence: did the headline model beat the baseline, by the labeler?

    There is no verdict where more than `OVERLAP_LIMIT` of the prompts were trained on.
    """
    model, seen = data.headline_model, data.trained_on
    if seen and seen["rows"] > OVERLAP_LIMIT * seen["of"]:
        return (
            "missing",
            f"{seen['rows']:,} of the {seen['of']:,} prompts were trained on, so this report gives no verdict.",
        )
    if model.win is None or model.name == data.baseline:
        return (
            "missing",
            f"No win rate against {data.baseline} was measured, so this report cannot say which is better.",
        )
    win = model.win
    kind: dict[str, Verdict] = {"above": "better", "below": "worse", "unclear": "unclear"}
    verdict = kind[win.verdict]
    says = {
        "better": f"{model.name} beats {data.baseline}",
        "worse": f"{model.name} does worse than {data.baseline}",
        "unclear": f"Whether {model.name} beats {data.baseline} is open",
    }[verdict]
    return verdict, f"{says}: it wins {_win_numbers(model)}, {_HALF[win.verdict]}."


_HALF = {
    "above": "all of the interval above one half",
    "below": "all of the interval below one half",
    "unclear": "and the interval holds one half",
}
_HALF_SHORT = {"above": "above one half", "below": "below one half", "unclear": "cannot tell from one half"}


def _win_numbers(model: ModelResult) -> str:
    win = model.win
    assert win is not None
    several = win.n_prompts is not None and win.n_prompts < win.n
    rows = f"{win.n:,} answers to {win.n_prompts:,} prompts" if several else f"{win.n:,} prompts"
    return f"{percent(win.rate)} of {rows} (95{NBSP}% interval {percent_range(win.low, win.high)})"


def compared(data: ReportData) -> list[ModelResult]:
    """The models with a win rate against the baseline."""
    return [model for model in data.models if model.win is not None and model.name != data.baseline]


def win_caption(data: ReportData) -> str:
    """One sentence over all compared models, the headline model first."""
    models = sorted(compared(data), key=lambda model: model.name != data.headline_model.name)
    parts = []
    for model in models:
        assert model.win is not None
        parts.append(f"{model.name} wins {_win_numbers(model)}: {_HALF_SHORT[model.win.verdict]}")
    return f"Against {data.baseline}, {'; '.join(parts)}."


def direction(values: Sequence[float]) -> Direction:
    """Whether a noisy series moved between its start and its end.

    Its levels are the medians of the first and the last fifth: one wild step at the start must not speak for them. It
    moved when they differ by more than two standard errors of that difference, which noise alone does in about one
    series of twenty. A median of k values has the standard error 1.253 σ/√k for normal noise that is independent from
    row to row. σ is 1.483/√2 times the median absolute difference of neighbours, over the whole series: a trend hardly
    enters it. With fewer than 15 points the noise cannot be judged and the direction is "".
    """
    k = len(values) // 5
    if k < 3:
        return ""
    first, last = median(values[:k]), median(values[-k:])
    sigma = 1.483 / math.sqrt(2) * median(abs(after - before) for before, after in pairwise(values))
    if abs(last - first) <= 2 * 1.253 * sigma * math.sqrt(2 / k):
        return "did not clearly move"
    return "rose" if last > first else "fell"


def path_means(values: Sequence[float], points: int = 16) -> list[float]:
    """At most `points` means of consecutive values: the path through a noisy cloud, in order of training."""
    points = min(points, len(values))
    edges = [len(values) * i // points for i in range(points + 1)]
    return [sum(values[low:high]) / (high - low) for low, high in zip(edges, edges[1:], strict=False)]


def _moved(name: str, values: Sequence[float]) -> str:
    path = path_means(values)
    return f"{name} {direction(values) or 'went'} from {number(path[0])} to {number(path[-1])}"


def frontier_caption(data: ReportData) -> str:
    """What the two scores did while the policy moved away; warns when only the RM score rose."""
    _, kl = data.series("kl")
    parts = []
    moves: dict[str, Direction] = {}
    for key, name in (("labeler_score", "labeler score"), ("score", "RM score")):
        _, values = data.series(key, against="kl")
        if values:
            parts.append(_moved(f"the {name}", values))
            moves[key] = direction(values)
    text = f"While {_moved(f'KL from {data.training_reference}', kl)} {data.kl_unit}, {' and '.join(parts)}."
    if moves.get("score") == "rose" and moves.get("labeler_score") in ("fell", "did not clearly move"):
        text += " Only the score that was trained on rose: a sign of over-optimisation."
    return text


def rank_distances(reward_model: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """`by_rank_distance` in its long form, by distance."""
    table = reward_model.get("by_rank_distance") or {}
    rows = {str(key): value if isinstance(value, dict) else {"accuracy": value} for key, value in table.items()}
    rows = {key: row for key, row in rows.items() if row.get("accuracy") is not None}
    return dict(sorted(rows.items(), key=lambda item: float(item[0])))


def reward_model_caption(data: ReportData) -> str:
    """How often the RM orders two answers as the labeler does, against a coin's one half."""
    rm = data.reward_model
    pairs = f" of {rm['n_pairs']:,} held-out pairs" if rm.get("n_pairs") else " of the held-out pairs"
    text = f"The reward model orders {percent(rm['pair_accuracy'])}{pairs} as the labeler does"
    if rm.get("low") is not None and rm.get("high") is not None:
        where = "above" if rm["low"] > 0.5 else "below" if rm["high"] < 0.5 else "which cannot be told from"
        text += f" (95{NBSP}% interval {percent_range(rm['low'], rm['high'])}), {where} a coin's 50{NBSP}%"
    rows = rank_distances(rm)
    if len(rows) > 1:
        (near, first), (far, last) = list(rows.items())[0], list(rows.items())[-1]
        text += (
            f"; from {percent(first['accuracy'])} when they are {near} rank{'s' * (near != '1')} apart "
            f"to {percent(last['accuracy'])} when they are {far} apart"
        )
    return text + "."


def pretraining_caption(data: ReportData) -> str:
    """Loss of each model, and what the headline model pays against the first one and the baseline."""
    models = [model for model in data.models if model.pretraining_loss is not None]
    values = {model.name: float(model.pretraining_loss or 0) for model in models}
    text = "Loss on " + data.pretraining_text + ": "
    text += ", ".join(f"{name} {value:.3f}" for name, value in values.items()) + " nats a token"
    subject = data.headline_model.name
    others = [name for name in dict.fromkeys([models[0].name, data.baseline]) if name in values and name != subject]
    if subject in values and others:
        changes = [f"{_change(values[subject] - values[name])} {name}" for name in others]
        text += f"; {subject} is {' and '.join(changes)}"
    return text + ". Lower is better."


def _change(difference: float) -> str:
    if abs(difference) < 5e-4:
        return "level with"
    return f"{abs(difference):.3f} {'worse than' if difference > 0 else 'better than'}"


TRAINING_NAMES = {
    "score": "RM score",
    "labeler_score": "labeler score",
    "kl": "KL",
    "ptx_loss": "pretraining loss",
    "value_loss": "value loss",
    "explained_variance": "explained variance",
}


def training_caption(data: ReportData) -> str:
    """Which curves rose, which fell, which did neither by more than their noise."""
    moved: dict[Direction, list[str]] = {"rose": [], "fell": [], "did not clearly move": [], "": []}
    for key, name in TRAINING_NAMES.items():
        _, values = data.series(key)
        if values:
            moved[direction(values)].append(name if direction(values) else _moved(name, values))
    parts = [f"{_listed(names)} {verb}".strip() for verb, names in moved.items() if names]
    text = "; ".join(parts)
    return text[:1].upper() + text[1:] + "."


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
