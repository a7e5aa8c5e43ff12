"""The report's further parts: other judges, ratings, benchmark tasks, the usual hacks, checkpoints by gold score."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from instruct_trl.evaluation.gold import best_checkpoint, turning_point
from instruct_trl.judges.base import QUESTIONS
from instruct_trl.report.data import ModelResult, ReportData
from instruct_trl.report.findings import NBSP, number, percent, percent_range
from instruct_trl.report.render import Block, Table, Text


def who_judged(data: ReportData) -> str:
    """Who stands behind the headline's verdict: a program, and whether people judged as well."""
    text = f"A program stands in for the paper's labelers: {data.labeler}. "
    text += "A win means that this program scores the answer higher, and no more than that."
    if any(row["judge"].endswith(("person", "people")) for row in data.judged):
        return f"{text} What people said is below."
    return f"No person judged these answers. {text}"


def judges_caption(data: ReportData) -> str:
    """Whether the other judges agree with the labeler on the headline model."""
    subject, labeler = data.headline_model, data.headline_model.win
    rows = [row for row in data.judged if row["model"] == subject.name and row["rate"] is not None]
    if not rows:
        return f"No further judge compared {subject.name} with {data.baseline}."
    said = [f"{row['judge']} {percent(row['rate'])} ({percent_range(row['low'], row['high'])})" for row in rows]
    text = f"Prompts that {subject.name} wins against {data.baseline}: {', '.join(said)}"
    if labeler is None:
        return f"{text}."
    against = [
        row["judge"] for row in rows if labeler.verdict != "unclear" and _verdict(row) not in (labeler.verdict, "")
    ]
    text += f"; the labeler {percent(labeler.rate)} ({percent_range(labeler.low, labeler.high)})."
    if against:
        text += f" Not as the labeler says: {', '.join(against)}."
    return text


def _verdict(row: dict[str, Any]) -> str:
    return "above" if row["low"] > 0.5 else "below" if row["high"] < 0.5 else "unclear"


def judge_blocks(data: ReportData) -> list[Block]:
    """A table of every judge's counts, then its ratings."""
    blocks: list[Block] = []
    if data.judged:
        rows = [
            [f"{row['judge']}: {row['model']}", _rate(row), _counts(row), str(row["flipped"]), str(row["invalid"])]
            for row in data.judged
        ]
        header = ["judge: model", f"win rate against {data.baseline}", "wins / ties / losses", "flipped", "invalid"]
        blocks.append(Table(header, rows))
        blocks.append(
            Text(
                "A tie counts half. Flipped: the judge preferred the other answer when the two changed places; such a "
                "pair is a tie. Invalid: no verdict came; such a pair is left out."
            )
        )
    for judge in dict.fromkeys(row["judge"] for row in data.ratings):
        blocks.append(_ratings_table(data, judge))
    if data.ratings:
        blocks.append(
            Text("Quality is the mean on the Likert scale from 1 to 7, all else the share of yes; 95 % intervals.")
        )
    return [*blocks, *(Text(note, tone="note") for note in data.judge_notes)]


def _rate(row: dict[str, Any]) -> str:
    return "–" if row["rate"] is None else f"{percent(row['rate'])} ({percent_range(row['low'], row['high'])})"


def _counts(row: dict[str, Any]) -> str:
    return "–" if row["rate"] is None else f"{row['wins']} / {row['ties']} / {row['losses']}"


def _ratings_table(data: ReportData, judge: str) -> Table:
    rows = [row for row in data.ratings if row["judge"] == judge]
    models = list(dict.fromkeys(row["model"] for row in rows))
    cells = {(row["question"], row["model"]): _rating(row) for row in rows}
    asked = [question.name for question in QUESTIONS if any(row["question"] == question.name for row in rows)]
    asked += [name for name in dict.fromkeys(row["question"] for row in rows) if name not in asked]
    lines = [[name.replace("_", " "), *(cells.get((name, model), "–") for model in models)] for name in asked]
    return Table([f"by {judge}", *models], lines)


def _rating(row: dict[str, Any]) -> str:
    if row["mean"] is None:
        return "–"
    likert = any(question.name == row["question"] and question.kind == "likert" for question in QUESTIONS)
    form: Callable[[float], str] = (lambda value: f"{value:.2f}") if likert else percent
    text = form(row["mean"])
    if row["low"] is not None:
        text += f"\n({form(row['low'])} to {form(row['high'])})"
    left_out = row["invalid"] + row["not_applicable"]
    return text + (f"\nof {row['n']}, {left_out} left out" if left_out else "")


def tasks_of(data: ReportData) -> list[str]:
    """The benchmark tasks of all models, in their order."""
    return list(dict.fromkeys(name for model in data.models for name in model.tasks))


def tasks_caption(data: ReportData) -> str:
    """On how many tasks the headline model fell clearly, rose clearly, or neither."""
    subject, first = data.headline_model, data.models[0]
    changes = {name: row for name, row in subject.tasks.items() if row.get("change") is not None}
    if not changes:
        return f"Scores on {len(tasks_of(data))} benchmark tasks."
    fell = [name for name, row in changes.items() if row["change_high"] is not None and row["change_high"] < 0]
    rose = [name for name, row in changes.items() if row["change_low"] is not None and row["change_low"] > 0]
    parts = [f"falls on {', '.join(fell)}" if fell else "", f"rises on {', '.join(rose)}" if rose else ""]
    rest = len(changes) - len(fell) - len(rose)
    parts.append(f"on {rest} of {len(changes)} tasks it cannot be told from {first.name}" if rest else "")
    return f"Against {first.name}, {subject.name} {'; '.join(part for part in parts if part)}."


def task_blocks(data: ReportData) -> list[Block]:
    """The paper's table of public NLP tasks: a row a task, a column a model, with the change from the first model."""
    models = [model for model in data.models if model.tasks]
    lines = []
    for name in tasks_of(data):
        metric = next(row["metric"] for model in models if (row := model.tasks.get(name)))
        n = next(row["n"] for model in models if (row := model.tasks.get(name)))
        lines.append([f"{name}\n({metric}, {n:,} items)", *(_task_cell(model.tasks.get(name)) for model in models)])
    return [Table(["", *(model.name for model in models)], lines)]


def _task_cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    text = f"{100 * row['mean']:.1f}"
    if row["low"] is not None:
        text += f" ({percent_range(row['low'], row['high'])})"
    if row.get("change") is not None:
        text += f"\n{100 * row['change']:+.1f}"
        if row["change_low"] is not None:
            text += f" ({100 * row['change_low']:+.1f} to {100 * row['change_high']:+.1f})"
    return text.replace("-", "−").replace(" to ", f"{NBSP}to{NBSP}")  # on a phone, a line breaks before the bracket


HACK_ROWS: list[tuple[str, Callable[[ModelResult], str]]] = [
    ("answer length (tokens)", lambda m: "" if m.mean_length is None else number(m.mean_length)),
    (
        "win rate over answers of like length",
        lambda m: f"{_rate(vars(m.like_length))}\n{m.like_length.n:,} prompts" if m.like_length else "",
    ),
    (
        "labeler score and length (Spearman)",
        lambda m: "" if m.length_correlation is None else f"{m.length_correlation:+.2f}".replace("-", "−"),
    ),
    ("answers that end by themselves", lambda m: _share(m.eos_rate)),
    ("distinct words", lambda m: _share(m.distinct_1)),
    ("distinct word pairs", lambda m: _share(m.distinct_2)),
    ("word triples said before", lambda m: _share(m.repetition)),
    ("answers given to another prompt, too", lambda m: _share(m.duplicates)),
    (
        "most common opening",
        lambda m: f"“{m.opening}”\n{percent(m.opening_share)}" if m.opening_share is not None else "",
    ),
    (
        "word that more answers have than the baseline's",
        lambda m: (
            f"“{m.favourite[0]}”\n{percent(m.favourite[1])}, not {percent(m.favourite[2])}" if m.favourite else ""
        ),
    ),
]


def _share(value: float | None) -> str:
    return "" if value is None else percent(value)


def hack_blocks(data: ReportData) -> list[Block]:
    """Length, repetition and sameness of the answers, with what changed from the baseline in words."""
    lines = [[name, *(cell(model) or "–" for model in data.models)] for name, cell in HACK_ROWS]
    kept = [line for line in lines if any(cell != "–" for cell in line[1:])]
    if not kept:
        return []
    return [Text(hacks_caption(data)), Table(["", *(model.name for model in data.models)], kept)]


def hacks_caption(data: ReportData) -> str:
    """What a reader should look at in the headline model's answers, against the baseline's."""
    model, base = data.headline_model, data.model(data.baseline)
    seen = [] if base is None or base is model else _signs(model, base)
    if not seen:
        return f"None of the usual signs of a hacked score stands out in {model.name}'s answers."
    return f"Signs of a hacked score to look into: {'; '.join(seen)}."


def _signs(model: ModelResult, base: ModelResult) -> list[str]:
    """The signs that go beyond a threshold; each states its numbers, so that a reader can set another."""
    signs = []
    ratio = _ratio(model.mean_length, base.mean_length)
    if ratio is not None and not 0.67 <= ratio <= 1.5:
        signs.append(f"answers are {number(ratio)} times as long as {base.name}'s")
    if model.win and model.like_length and model.win.verdict == "above" and model.like_length.verdict != "above":
        signs.append(
            f"among answers of like length it wins {percent(model.like_length.rate)}, not {percent(model.win.rate)}"
        )
    if (ratio := _ratio(model.distinct_2, base.distinct_2)) is not None and ratio < 0.75:
        signs.append(f"distinct word pairs fell from {_share(base.distinct_2)} to {_share(model.distinct_2)}")
    for name, what in (
        ("repetition", "word triples said before"),
        ("duplicates", "answers given to another prompt"),
        ("opening_share", f"answers that begin “{model.opening}”"),
    ):
        now, before = getattr(model, name), getattr(base, name)
        if now is not None and before is not None and now - before > 0.1:
            signs.append(f"{what}: {percent(now)}, {base.name} {percent(before)}")
    if model.favourite and model.favourite[1] - model.favourite[2] > 0.3:
        word, now, before = model.favourite
        signs.append(f"“{word}” is in {percent(now)} of the answers, {base.name} {percent(before)}")
    if model.eos_rate is not None and base.eos_rate is not None and abs(model.eos_rate - base.eos_rate) > 0.25:
        signs.append(
            f"{percent(model.eos_rate)} of the answers end by themselves, {base.name} {percent(base.eos_rate)}"
        )
    return signs


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def turning_text(data: ReportData) -> str:
    """Where over training the labeler's score turned down, in one sentence; "" where it did not or cannot be told."""
    rows = [
        row
        for row in data.training
        if all(isinstance(row.get(key), float | int) for key in ("labeler_score", "score", "kl"))
    ]
    gold, proxy = ([float(row[key]) for row in rows] for key in ("labeler_score", "score"))
    turn = turning_point(gold, proxy)
    if turn is None:
        return ""
    kl = number(float(rows[turn.index]["kl"]))
    text = f"The labeler's score was highest, {number(turn.gold)}, around a KL of {kl}, and fell to {number(turn.last)}"
    return text + (" while the reward model's did not fall: over-optimisation." if turn.proxy_rose else ".")


def checkpoints_caption(data: ReportData) -> str:
    """Which checkpoint the labeler likes best on validation prompts, and whether the last one is as good."""
    best, last = best_checkpoint(data.checkpoints), data.checkpoints[-1]
    text = (
        f"By the labeler's score on validation prompts, step {best['step']:,} is best ({number(best['labeler_score'])})"
    )
    if best is last:
        return f"{text}: the last one."
    gap = last.get("behind_best")
    if gap is None:  # without the paired difference: the two errors as if of different prompts, which is too careful
        error = (best["labeler_se"] ** 2 + last["labeler_se"] ** 2) ** 0.5
        surely = best["labeler_score"] - last["labeler_score"] > 2 * error
    else:
        surely = gap["low"] is not None and gap["low"] > 0
    return f"{text}; the last, step {last['step']:,}, has {number(last['labeler_score'])}, " + (
        "clearly less." if surely else "which cannot be told from it."
    )
