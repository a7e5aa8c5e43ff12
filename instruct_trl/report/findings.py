"""The sentences of a run's report, made from its numbers. Each says what was found, whichever way it went."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from instruct_trl.evaluation.estimates import Estimate
from instruct_trl.evaluation.gold import best_checkpoint, direction, path_means, turning_point
from instruct_trl.evaluation.win_rate import WinRate
from instruct_trl.report.data import ModelResult, ReportData

Verdict = Literal["better", "worse", "unclear", "doubtful", "missing"]

NBSP = "\u00a0"
COIN = "a coin"
RULES = {"length": "a rule of length", "words": "a bag of words"}
"""What a floor knows (`floors_of`) → the floor, in a sentence."""
OVERLAP_LIMIT = 0.05
"""Share of prompts that were trained on above which a page gives no verdict."""
TRAINING_NAMES = {
    "score": "RM score",
    "labeler_score": "labeler score",
    "kl": "KL",
    "ptx_loss": "pretraining loss",
    "value_loss": "value loss",
    "explained_variance": "explained variance",
}


def estimate(row: Any) -> Estimate:
    """The estimate in a row of a report, which has its four keys and others beside them."""
    return row if isinstance(row, Estimate) else Estimate(*(row[name] for name in ("mean", "low", "high", "n")))


def minus(value: float, spec: str) -> str:
    """`format` with a real minus sign."""
    return format(value, spec).replace("-", "−")


def signed(value: float) -> str:
    """0.312 → "+0.31"."""
    return minus(value, "+.2f")


def percent(value: float, digits: int = 0) -> str:
    """0.634 → "63 %", with a space that does not break."""
    return f"{100 * value:.{digits}f}{NBSP}%"


def figure(row: Any, spec: str = ".3f", scale: float = 1.0, unit: str = "", gap: str = "\n") -> str:
    """A mean and its interval: "0.612", `gap`, "(0.570 to 0.654)"; a dash where there is none."""
    found = estimate(row)
    if found.mean is None:
        return "–"
    bounds = f"{NBSP}to{NBSP}".join(minus(scale * bound, spec) for bound in found.bounds or ())
    return minus(scale * found.mean, spec) + unit + (f"{gap}({bounds})" if bounds else "")


def share(row: Any, digits: int = 0, gap: str = " ") -> str:
    """A rate with its interval, both in per cent: "63 % (57 to 69)"."""
    return figure(row, f".{digits}f", 100, f"{NBSP}%", gap)


def in_words(row: Any, of: str) -> str:
    """A rate with its interval inside a sentence: "63 % of 100 prompts (95 % interval 53 to 72)"."""
    rate, _, bounds = share(row).partition(" (")
    return f"{rate} of {of}" + (f" (95{NBSP}% interval {bounds}" if bounds else "")


def number(value: float) -> str:
    """Three significant digits or so, without exponents in the usual range."""
    size = abs(value)
    if size and (size < 5e-4 or size >= 1e7):
        return minus(value, ".1e")
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 0.01 or size == 0 else 4
    return minus(value, f",.{digits}f")


def duration(seconds: float) -> str:
    """75 → "1 min 15 s"."""
    if seconds < 60:
        return f"{seconds:.{int(seconds < 10)}f}{NBSP}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{NBSP}min {rest}{NBSP}s"
    return f"{minutes // 60}{NBSP}h {minutes % 60}{NBSP}min"


def seen_too_often(trained_on: Mapping[str, Any] | None) -> bool:
    """Whether too many of the prompts were trained on for a verdict."""
    return bool(trained_on) and trained_on["rows"] > OVERLAP_LIMIT * trained_on["of"]  # type: ignore[index]


def headline(data: ReportData) -> tuple[Verdict, str]:
    """The run's verdict and its sentence: does the headline model beat the baseline, by the labeler?"""
    model, base, seen = data.headline_model, data.baseline, data.trained_on
    if seen_too_often(seen):
        trained = f"{seen['rows']:,} of the {seen['of']:,} prompts were trained on"
        return "missing", f"{trained}, so this report gives no verdict."
    if model.win is None or model.name == base:
        return "missing", f"No win rate against {base} was measured, so this report cannot say which is better."
    verdicts: dict[str, tuple[Verdict, str, str]] = {
        "above": ("better", f"{model.name} beats {base}", "The whole interval lies above one half."),
        "below": ("worse", f"{model.name} does worse than {base}", "The whole interval lies below one half."),
        "unclear": ("unclear", f"Whether {model.name} beats {base} is open", "The interval holds one half."),
    }
    verdict, says, half = verdicts[model.win.verdict]
    if verdict == "better" and data.reward_model and (doubt := _doubt(data.reward_model)):
        verdict, half = "doubtful", f"But {doubt}"
    return verdict, f"{says}: it wins {_prompts_won(model.win)}. {half}"


def _doubt(metrics: Mapping[str, Any]) -> str:
    """What the reward model is not known to know, and so what a win on it cannot be put down to; "" without doubt."""
    rate, seen, open_ = estimate(metrics["pair_accuracy"]), metrics.get("trained_on"), "so it is open whether the win"
    if seen_too_often(seen):
        rows = f"{seen['rows']:,} of the {seen['of']:,} rows"  # type: ignore[index]
        return (
            f"{rows} that its reward model was tested on have prompts it was trained on, {open_} comes from feedback."
        )
    if rate.bounds is None:
        few = f"only {rate.n} prompt{'s' * (rate.n != 1)}, too few for an interval"
        return f"its reward model was tested on {few}, {open_} comes from the rankings."
    floors = not_told_from(metrics)
    if floors == [COIN]:
        says = "does worse than" if rate.side_of(0.5) == "below" else "cannot be told from"
        return f"its reward model {says} {COIN}, so the win cannot be put down to the rankings."
    if known := " or ".join(no_more_than(metrics)):
        return f"its reward model shows no more than {known}, so the win cannot be put down to more in the rankings."
    rules, known = " or ".join(RULES[floor] for floor in floors), " and ".join(floors)
    return f"its reward model cannot be told from {rules}, {open_} comes from more than {known}." if floors else ""


def _prompts_won(win: WinRate) -> str:
    return in_words(win, (f"{win.rows:,} answers to " if win.rows > win.n else "") + f"{win.n:,} prompts")


def win(data: ReportData) -> str:
    """The win rates, the headline model's first."""
    models = sorted(data.models, key=lambda model: model is not data.headline_model)
    rates = [f"{model.name} wins {_prompts_won(model.win)}" for model in models if model.win]
    return f"Against {data.baseline}, {'; '.join(rates)}."


def judges_of_subject(data: ReportData) -> list[dict[str, Any]]:
    """The rows of the judges that compared the headline model with the baseline."""
    return [row for row in data.judged if row["model"] == data.headline_model.name and row["mean"] is not None]


def judges(data: ReportData) -> str:
    """Whether the other judges agree with the labeler on the headline model."""
    subject, labeler = data.headline_model, data.headline_model.win
    rows = judges_of_subject(data)
    text = f"{subject.name} wins against {data.baseline}: " + ", ".join(f"{row['judge']} {share(row)}" for row in rows)
    if labeler is None:
        return f"{text}."
    against = [row["judge"] for row in rows if labeler.verdict not in ("unclear", estimate(row).side_of(0.5))]
    text += f", the labeler {share(labeler)}."
    return f"{text} Not as the labeler says: {', '.join(against)}." if against else text


def _moved(name: str, values: Sequence[float]) -> str:
    path = path_means(values)
    return f"{name} {direction(values) or 'went'} from {number(path[0])} to {number(path[-1])}"


def frontier(data: ReportData) -> str:
    """The way of the two scores while the policy moved away; warns where only the RM score rose."""
    scores = {"labeler_score": "the labeler score", "score": "the RM score"}
    moves = {key: values for key in scores if (values := data.series(key, against="kl")[1])}
    parts = " and ".join(_moved(scores[key], values) for key, values in moves.items())
    text = f"While {_moved(f'KL from {data.training_reference}', data.series('kl')[1])} {data.kl_unit}, {parts}."
    way = {key: direction(values) for key, values in moves.items()}
    if way.get("score") == "rose" and way.get("labeler_score") in ("fell", "did not clearly move"):
        text += " Only the score that was trained on rose: a sign of over-optimisation."
    return text


def turning(data: ReportData) -> str:
    """The place where the labeler's score turned down; "" if it did not, or if that cannot be told."""
    keys = ("labeler_score", "score", "kl")
    rows = [row for row in data.training if all(isinstance(row.get(key), float | int) for key in keys)]
    gold, proxy, kl = ([float(row[key]) for row in rows] for key in keys)
    turn = turning_point(gold, proxy)
    if turn is None:
        return ""
    text = f"The labeler's score was highest, {number(turn.gold)}, around a KL of {number(kl[turn.index])}"
    text += f", and fell to {number(turn.last)}"
    return text + (" while the reward model's did not fall: over-optimisation." if turn.proxy_rose else ".")


def checkpoints(data: ReportData) -> str:
    """The checkpoint that the labeler likes best, and whether the last one is as good."""
    best, last = best_checkpoint(data.checkpoints), data.checkpoints[-1]
    text = f"The labeler scores step {best['step']:,} highest ({number(best['labeler_score']['mean'])})"
    if best is last:
        return f"{text}: the last one."
    surely = "behind_best" in last and estimate(last["behind_best"]).side_of(0) == "above"
    text += f"; the last, step {last['step']:,}, has {number(last['labeler_score']['mean'])}, "
    return text + ("clearly less." if surely else "which cannot be told from it.")


def pairs_ordered(metrics: Mapping[str, Any]) -> str:
    """ "71 % of 1,204 held-out pairs (95 % interval 68 to 74)" of `reward_metrics`."""
    rate = metrics["pair_accuracy"]
    return in_words(rate, f"{rate['n_pairs']:,} held-out pairs")


def floors_of(metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The floors that `reward_metrics` has, by what they know: "length", "words"."""
    found = metrics.get("floors") or {}
    named = {"length": found.get("length"), "words": found.get("bag_of_words")}
    return {known: floor for known, floor in named.items() if floor}


def not_told_from(metrics: Mapping[str, Any]) -> list[str]:
    """What the reward model does not clearly beat: `COIN`, or else those of `floors_of`; [] if it beats them all."""
    if estimate(metrics["pair_accuracy"]).side_of(0.5) != "above":
        return [COIN]
    floors = floors_of(metrics)
    return [known for known, floor in floors.items() if estimate(floor["lead"]).side_of(0) != "above"]


def no_more_than(metrics: Mapping[str, Any]) -> list[str]:
    """Those of `not_told_from` over which no lead is left in the whole interval: no open question."""
    leads = {known: estimate(floor["lead"]) for known, floor in floors_of(metrics).items()}
    return [known for known, lead in leads.items() if lead.high is not None and lead.high <= 0]


def floor_rows(metrics: Mapping[str, Any]) -> list[list[str]]:
    """Lines of a table: the reward model and its floors, each with its accuracy, and the reward model's lead over it.

    A lead is in percentage points.
    """
    rows = [["reward model", share(metrics["pair_accuracy"], 1), ""]]
    for floor in floors_of(metrics).values():
        lead = figure(floor["lead"], "+.1f", 100, f"{NBSP}points", " ")
        rows.append([floor["rule"], share(floor["accuracy"], 1), lead])
    return rows


def floor_text(metrics: Mapping[str, Any]) -> str:
    """`floor_rows` as lines for a terminal, with the reason why a floor is missing."""
    lines = ["Held-out pairs ordered as the labeler does (95 % intervals over prompts):"]
    for name, rate, lead in floor_rows(metrics):
        lines.append(f"{name}: {rate}" + (f"; the reward model's lead: {lead}" if lead else ""))
    if missing := (metrics.get("floors") or {}).get("missing"):
        lines.append(missing)
    return "\n".join(f"   {line}" for line in lines).replace(NBSP, " ")


def reward_model(data: ReportData) -> str:
    """How often the RM orders two answers as the labeler does, against a coin's one half."""
    rate = estimate(data.reward_model["pair_accuracy"])
    text = f"The reward model orders {pairs_ordered(data.reward_model)} as the labeler does"
    side = rate.side_of(0.5).replace("unclear", "which cannot be told from")
    return f"{text}, {side} a coin's 50{NBSP}%." if rate.bounds else f"{text}."


def pretraining(data: ReportData) -> str:
    """Loss of each model, and the price that the headline model pays against the first one and the baseline."""
    losses = {model.name: model.pretraining_loss.mean for model in data.models if model.pretraining_loss}
    text = f"Loss on {data.pretraining_text}: {', '.join(f'{name} {loss:.3f}' for name, loss in losses.items())}"
    subject, changes = data.headline_model.name, []
    for name in dict.fromkeys([next(iter(losses)), data.baseline]):
        if subject in losses and name in losses and name != subject:
            change = losses[subject] - losses[name]
            worse = f"{abs(change):.3f} {'worse' if change > 0 else 'better'} than {name}"
            changes.append(f"level with {name}" if abs(change) < 5e-4 else worse)
    return f"{text}; {subject} is {' and '.join(changes)}." if changes else f"{text}."


def training(data: ReportData) -> str:
    """Which curves rose, which fell, and which did neither by more than their noise."""
    moved: dict[str, list[str]] = {"rose": [], "fell": [], "did not clearly move": [], "": []}
    for key, name in TRAINING_NAMES.items():
        if values := data.series(key)[1]:
            way = direction(values)
            moved[way].append(name if way else _moved(name, values))
    text = "; ".join(
        f"{' and '.join(', '.join(names).rsplit(', ', 1))} {way}".strip() for way, names in moved.items() if names
    )
    return f"{text[:1].upper()}{text[1:]}."


def tasks(data: ReportData) -> str:
    """On which tasks the headline model clearly fell, on which it clearly rose, and on how many neither."""
    subject, first = data.headline_model, data.models[0].name
    changes = {name: estimate(row["change"]) for name, row in subject.tasks.items() if "change" in row}
    if not changes:
        return f"Scores on {len(data.tasks)} benchmark tasks."
    fell, rose = ([n for n, change in changes.items() if change.side_of(0) == way] for way in ("below", "above"))
    parts = [f"{verb} {', '.join(names)}" for verb, names in (("falls on", fell), ("rises on", rose)) if names]
    if rest := len(changes) - len(fell) - len(rose):
        parts.append(f"on {rest} of {len(changes)} tasks it cannot be told from {first}")
    return f"Against {first}, {subject.name} {'; '.join(parts)}."


def hacks(data: ReportData) -> str:
    """The signs of a hacked score in the headline model's answers, against the baseline's."""
    model, base = data.headline_model, data.model(data.baseline)
    signs = [] if base is None or base is model else _signs(model, base)
    if not signs:
        return f"None of the usual signs of a hacked score stands out in {model.name}'s answers."
    return f"Signs of a hacked score to look into: {'; '.join(signs)}."


def _signs(model: ModelResult, base: ModelResult) -> list[str]:
    """The signs beyond a threshold. Each states its numbers, so that a reader can set another."""
    signs = []
    if model.mean_length and base.mean_length and not 0.67 <= model.mean_length / base.mean_length <= 1.5:
        signs.append(f"answers are {number(model.mean_length / base.mean_length)} times as long as {base.name}'s")
    if model.win and model.like_length and model.win.verdict == "above" and model.like_length.verdict != "above":
        rates = f"{percent(model.like_length.mean)}, not {percent(model.win.mean)}"
        signs.append(f"among answers of like length it wins {rates}")

    def add(what: str, now: float | None, old: float | None, is_sign: Callable[[float, float], bool]) -> None:
        if now is not None and old is not None and is_sign(now, old):
            signs.append(f"{what}: {percent(now)}, {base.name} {percent(old)}")

    def rose(now: float, old: float) -> bool:
        return now - old > 0.1

    add("distinct word pairs", model.distinct_2, base.distinct_2, lambda now, old: now < 0.75 * old)
    add("word triples said before", model.repetition, base.repetition, rose)
    add("answers given to another prompt", model.duplicates, base.duplicates, rose)
    add("answers that end by themselves", model.eos_rate, base.eos_rate, lambda now, old: abs(now - old) > 0.25)
    if model.opening and base.opening:
        add(f"answers that begin “{model.opening[0]}”", model.opening[1], base.opening[1], rose)
    if model.favourite:
        add(f"answers with “{model.favourite[0]}”", *model.favourite[1:], lambda now, old: now - old > 0.3)
    return signs
