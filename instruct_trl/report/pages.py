"""The run's report: pictures, one Markdown file, one self-contained HTML page, and the numbers to redraw them.

`python -m instruct_trl.report.pages outputs/<run>` draws a report again from its report.json.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from instruct_trl.report import findings as captions
from instruct_trl.report import parts as report_parts
from instruct_trl.report.data import (
    REPORT_JSON,
    ModelResult,
    ReportData,
    Sample,
    load_report_data,
    save_report_data,
)
from instruct_trl.report.findings import duration, number, percent
from instruct_trl.report.pictures import require_matplotlib
from instruct_trl.report.pictures_run import draw_pictures
from instruct_trl.report.render import (
    Block,
    Code,
    Document,
    Headline,
    Items,
    Picture,
    Samples,
    Section,
    Table,
    Text,
    to_html,
    to_markdown,
)

__all__ = [
    "ModelResult",
    "ReportData",
    "Sample",
    "load_report_data",
    "require_matplotlib",
    "save_report_data",
    "write_report",
]

Pictures = dict[str, tuple[Path, Path]]

_95 = "95\u00a0%"
_INTERVAL = (
    f"The bar is the {_95} interval: were the prompts drawn anew, 95 of 100 such bars would hold the true value."
)


def write_report(data: ReportData, output_dir: str | Path) -> Path:
    """Write report.md, report.html, report.json and pictures/*.png into `output_dir`, which is made if missing.

    Parts without numbers are left out and named in a note. The HTML page needs no other file and no network.

    Returns:
        The path of report.html.

    Raises:
        ImportError: matplotlib is missing (`require_matplotlib` asks for it before a long job).
        FileNotFoundError: `selection_picture` is given and not there.
    """
    require_matplotlib()
    folder = Path(output_dir)
    pictures_dir = folder / "pictures"
    pictures_dir.mkdir(parents=True, exist_ok=True)
    selection = _adopt_selection(data, pictures_dir)
    pictures = draw_pictures(data, pictures_dir)
    document = _document(data, pictures, selection)
    (folder / "report.md").write_text(to_markdown(document, folder), encoding="utf-8", errors="replace")
    page = folder / "report.html"
    page.write_text(to_html(document), encoding="utf-8", errors="replace")
    save_report_data(data, folder / REPORT_JSON, selection.relative_to(folder) if selection else None)
    return page


def _adopt_selection(data: ReportData, pictures_dir: Path) -> Path | None:
    """Bring the selection picture into the report's own folder, so that the folder can be moved."""
    if data.selection_picture is None:
        return None
    source, target = Path(data.selection_picture), pictures_dir / "selection.png"
    if not source.is_file():
        raise FileNotFoundError(f"selection_picture {source} is not there; give the PNG of select_checkpoint, or None.")
    if source.resolve() != target.resolve():
        shutil.copyfile(source, target)
    return target


def _document(data: ReportData, pictures: Pictures, selection: Path | None) -> Document:
    verdict, sentence = captions.headline(data)
    subject = data.headline_model.name
    opening: list[Block] = [
        Headline(verdict, sentence, _key_figures(data)),
        *([Text(f"Warning. {data.trained_on['note']}", tone="headline worse")] if data.trained_on else []),
        Text(report_parts.who_judged(data), tone="note"),
    ]
    sections = [
        Section(f"Does {subject} beat {data.baseline}?", _win_blocks(data, pictures)),
        Section("Do other judges agree?", _judge_blocks(data, pictures)),
        Section("Score against distance", _frontier_blocks(data, pictures)),
        Section("Can the reward model be trusted?", _reward_model_blocks(data, pictures)),
        Section("Which SFT checkpoint?", _selection_blocks(data, selection)),
        Section("What became of the language model?", _pretraining_blocks(data, pictures)),
        Section("What became of other tasks?", _task_blocks(data, pictures)),
        Section("The PPO run", _training_blocks(data, pictures)),
        Section("The usual hacks", report_parts.hack_blocks(data) or _missing("the answers were not measured")),
        Section("Answers side by side", _sample_blocks(data)),
        Section("All numbers", _numbers_blocks(data)),
        *_settings_sections(data),
    ]
    return Document(f"Report: {data.run_name}", opening, sections)


def _key_figures(data: ReportData) -> list[tuple[str, str]]:
    model, rm = data.headline_model, data.reward_model
    figures = []
    if model.win is not None:
        figures.append((percent(model.win.rate), f"of prompts won against {data.baseline}"))
    if rm.get("pair_accuracy") is not None:
        figures.append((percent(rm["pair_accuracy"]), "of held-out pairs ordered right by the reward model"))
    if model.kl is not None:
        figures.append((number(model.kl), f"KL from {data.kl_reference}, {data.kl_unit}"))
    base = data.models[0]
    if model.pretraining_loss is not None and base.pretraining_loss is not None and base is not model:
        change = f"{model.pretraining_loss - base.pretraining_loss:+.3f}".replace("-", "−")
        figures.append((change, f"nats a token on pretraining text, against {base.name}"))
    return figures


def _picture(pictures: Pictures, name: str, caption: str, reading: str) -> Picture:
    light, dark = pictures[name]
    return Picture(light, caption, reading, dark)


def _missing(what: str) -> list[Block]:
    return [Text(f"Not in this report: {what}.", tone="note")]


def _win_blocks(data: ReportData, pictures: Pictures) -> list[Block]:
    if "win_rate" not in pictures:
        return _missing(f"win rates against {data.baseline} were not measured")
    reading = (
        "Both models answer the same prompts and the labeler scores both answers; a tie counts half. "
        + _INTERVAL.replace("interval", "Wilson interval", 1)
    )
    return [_picture(pictures, "win_rate", captions.win_caption(data), reading)]


def _frontier_blocks(data: ReportData, pictures: Pictures) -> list[Block]:
    if "frontier" not in pictures:
        return _missing("no log of scores and KL from PPO training was given")
    reading = (
        "In order of training from the open dot to the full one. Pale dots are single logged steps, the line joins "
        f"means of consecutive ones. KL says how far the policy has moved from {data.training_reference}."
    )
    blocks: list[Block] = [_picture(pictures, "frontier", captions.frontier_caption(data), reading)]
    if not data.series("labeler_score", against="kl")[1]:
        blocks += _missing("the labeler's score over training was not logged")
    if turned := report_parts.turning_text(data):
        blocks.append(Text(turned))
    if "runs" in pictures:
        reading = "Means of consecutive logged steps of each run. Higher at the same KL is better."
        blocks.append(_picture(pictures, "runs", "Several runs against the distance that each has moved.", reading))
    if "checkpoints" in pictures:
        reading = (
            f"All checkpoints answer the same validation prompts, which are not those of the comparison. {_INTERVAL}"
        )
        blocks.append(_picture(pictures, "checkpoints", report_parts.checkpoints_caption(data), reading))
    return blocks


def _judge_blocks(data: ReportData, pictures: Pictures) -> list[Block]:
    blocks: list[Block] = []
    if "judges" in pictures:
        reading = f"Each judge compares the same answers. {_INTERVAL}"
        blocks.append(_picture(pictures, "judges", report_parts.judges_caption(data), reading))
    return blocks + report_parts.judge_blocks(data) or _missing("no judge but the labeler was asked")


def _task_blocks(data: ReportData, pictures: Pictures) -> list[Block]:
    if not report_parts.tasks_of(data):
        return _missing("no benchmark tasks were run")
    reading = (
        f"In per cent, with {_95} intervals over items; the second line is the change from {data.models[0].name} on "
        "the same items. What alignment costs there is the paper's alignment tax."
    )
    blocks: list[Block] = []
    if "tasks" in pictures:
        blocks.append(_picture(pictures, "tasks", report_parts.tasks_caption(data), reading))
    return [*blocks, *report_parts.task_blocks(data)]


def _reward_model_blocks(data: ReportData, pictures: Pictures) -> list[Block]:
    if "reward_model" not in pictures:
        return _missing("the reward model was not evaluated on held-out rankings")
    rm = data.reward_model
    reading = "Each pair is two answers to one prompt that the labeler ranks differently. "
    if rm.get("low") is not None and rm.get("high") is not None:
        reading += _INTERVAL
    if rm.get("kendall_tau") is not None:
        reading += f" Kendall's tau is {number(rm['kendall_tau'])}: 1 is the labeler's order, 0 is no relation."
    return [_picture(pictures, "reward_model", captions.reward_model_caption(data), reading.strip())]


def _selection_blocks(data: ReportData, selection: Path | None) -> list[Block]:
    if selection is None:
        return _missing("SFT checkpoints were not compared by reward model score")
    caption = data.selection_note or "Validation loss and reward model score of each SFT checkpoint."
    return [Picture(selection, caption, "The paper keeps the checkpoint with the highest reward model score.")]


def _pretraining_blocks(data: ReportData, pictures: Pictures) -> list[Block]:
    if "pretraining" not in pictures:
        return _missing("loss on pretraining text was not measured")
    reading = f"In brackets the change from {data.models[0].name}."
    if any(model.pretraining_loss_ci for model in data.models):
        reading += (
            f" The bar is the {_95} interval over texts. All models read the same texts, so the change between two "
            "models is surer than the bars' overlap suggests."
        )
    return [_picture(pictures, "pretraining", captions.pretraining_caption(data), reading)]


def _training_blocks(data: ReportData, pictures: Pictures) -> list[Block]:
    if "training" not in pictures:
        return _missing("no log of PPO training was given")
    reading = (
        "Pale: each logged step. Strong: running mean, with its last value. A curve rose or fell when its last fifth "
        "differs from its first by more than two standard errors."
    )
    return [_picture(pictures, "training", captions.training_caption(data), reading)]


def _sample_blocks(data: ReportData) -> list[Block]:
    if not data.samples:
        return _missing("no sample answers were given")
    return [
        Text("The number is the labeler's score of the answer; higher is better."),
        Samples(data.samples, [model.name for model in data.models]),
    ]


def _with_interval(mean: str, interval: str) -> Callable[[ModelResult], str]:
    def cell(model: ModelResult) -> str:
        value, bounds = getattr(model, mean), getattr(model, interval)
        if value is None:
            return ""
        text = f"{value:.3f}" + (f"\n({bounds[0]:.3f} to {bounds[1]:.3f})" if bounds else "")
        return text.replace("-", "−")

    return cell


def _plain(name: str, form: Callable[[float], str]) -> Callable[[ModelResult], str]:
    return lambda model: "" if getattr(model, name) is None else form(getattr(model, name))


def _numbers_blocks(data: ReportData) -> list[Block]:
    rows: list[tuple[str, Callable[[ModelResult], str]]] = [
        (f"win rate against {data.baseline}", lambda m: percent(m.win.rate, 1) if m.win else ""),
        (f"{_95} interval", lambda m: f"{100 * m.win.low:.1f} to {100 * m.win.high:.1f}" if m.win else ""),
        ("wins / ties / losses", lambda m: f"{m.win.wins} / {m.win.ties} / {m.win.losses}" if m.win else ""),
        (f"labeler score ({_95})", _with_interval("labeler_mean", "labeler_ci")),
        (f"labeler score − {data.baseline}'s ({_95})", _with_interval("labeler_difference", "labeler_difference_ci")),
        (f"reward model score ({_95})", _with_interval("rm_mean", "rm_ci")),
        (f"KL from {data.kl_reference} ({data.kl_unit})", _plain("kl", number)),
        ("pretraining loss (nats a token)", _with_interval("pretraining_loss", "pretraining_loss_ci")),
    ]
    lines = [[name, *(cell(model) or "–" for model in data.models)] for name, cell in rows]
    kept = [line for line in lines if any(cell != "–" for cell in line[1:])]
    if not kept:
        return _missing("no model was evaluated")
    return [Table(["", *(model.name for model in data.models)], kept)]


def _settings_sections(data: ReportData) -> list[Section]:
    sections = []
    if data.deviations:
        sections.append(Section("Where this run departs from the paper", [Items(data.deviations, numbered=True)]))
    if data.notes:
        sections.append(Section("Notes", [Items(data.notes)]))
    if any(values != {} for values in data.settings.values()):
        sections.append(Section("Settings", [_settings_table(data.settings)]))
    if data.timings:
        total = sum(data.timings.values())
        rows = [[stage, duration(s), percent(s / total if total else 0)] for stage, s in data.timings.items()]
        rows.append(["total", duration(total), ""])
        sections.append(Section("Where the time went", [Table(["stage", "time", "share"], rows)]))
    made: list[Block] = [Code(data.command)] if data.command else []
    if data.environment:
        made.append(Table(["", ""], [[str(key), str(value)] for key, value in data.environment.items()]))
    if made:
        sections.append(Section("How this was made", made))
    return sections


def _settings_table(settings: dict[str, Any]) -> Table:
    grouped = any(isinstance(value, dict) for value in settings.values())
    if not grouped:
        return Table(["setting", "value"], [[key, str(value)] for key, value in settings.items()])
    rows = []
    for stage, values in settings.items():
        for key, value in (values if isinstance(values, dict) else {"": values}).items():
            rows.append([stage, key, str(value)])
    return Table(["stage", "setting", "value"], rows)


def main(arguments: list[str] | None = None) -> None:
    """Draw the report of a run folder (or of a report.json) again."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise SystemExit("usage: python -m instruct_trl.report.pages outputs/<run>")
    path = Path(arguments[0])
    print(write_report(load_report_data(path), path if path.is_dir() else path.parent))


if __name__ == "__main__":
    main()
