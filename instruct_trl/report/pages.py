"""The pages: templates filled with data, findings and pictures, once as HTML and once as Markdown.

All text of others is escaped, since answers of a language model may hold anything: by jinja's autoescape in HTML, by
the filters `md` and `md_start` in Markdown. The HTML page holds its pictures and loads nothing.

`python -m instruct_trl.report.pages outputs/<run>` draws a run's report again from its report.json.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from instruct_trl.evaluation.reward_metrics import Record, reward_metrics
from instruct_trl.report import findings, findings_control, findings_reward
from instruct_trl.report.data import REPORT_JSON, ModelResult, ReportData, load_report_data, save_report_data
from instruct_trl.report.pictures import MOST_ROWS, draw_all, require_matplotlib
from instruct_trl.report.pictures_reward import GROUPS, reward_pictures
from instruct_trl.report.pictures_run import run_pictures

METRICS_JSON = "metrics.json"
VERDICTS = {"better": "Yes", "worse": "No", "unclear": "Cannot tell", "doubtful": "In doubt", "missing": "Not measured"}


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
    target, selection = folder / "pictures" / "selection.png", data.selection_picture
    if selection and not Path(selection).is_file():
        raise FileNotFoundError(
            f"selection_picture {selection} is not there; give the PNG of select_checkpoint, or None."
        )
    pictures: dict[str, tuple[Path, Path | None]] = {**draw_all(run_pictures(data), folder / "pictures")}
    if selection:
        given, dark = Path(selection), target.parent / "dark" / target.name
        if given.resolve() != target.resolve():  # into the report's own folder, so that the folder can be moved
            shutil.copyfile(given, target)
            if (twin := given.parent / "dark" / given.name).is_file():
                shutil.copyfile(twin, dark)
        pictures["selection"] = (target, dark if dark.is_file() else None)
    _fill("run", folder, pictures, title=f"Report: {data.run_name}", data=data)
    save_report_data(data, folder / REPORT_JSON, target.relative_to(folder) if selection else None)
    return folder / "report.html"


def write_reward_report(
    records: Sequence[Record],
    folder: str | Path,
    *,
    title: str,
    notes: Sequence[str] = (),
    labeler_folds: dict[str, Any] | None = None,
    trained_on: tuple[int, int] | None = None,
    learning_curve: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the reward model's report.md, report.html, metrics.json and pictures/*.png into `folder`.

    Args:
        records: `RankingRewardTrainer.evaluation_records`, of prompts that were not trained on. Sections that they have
            nothing for are left out (no `labeler`, one K only, no lengths).
        notes: anything a reader must know, one sentence each.
        labeler_folds: result of `cross_validate_labelers`.
        trained_on: how many of the rows have a prompt that was trained on, and the number of all rows.
        learning_curve: result of `evaluation.learning_curve`.

    Returns:
        `reward_metrics(records)` with `labeler_folds`, `learning_curve` and `trained_on` (or None), and `warnings`, the
        page's warnings.

    Raises:
        ValueError: bad records (`reward_metrics.pair_table`), or no pair in any of them.
        ImportError: matplotlib is missing.
    """
    require_matplotlib()
    folder = Path(folder)
    metrics = {**reward_metrics(records), "labeler_folds": labeler_folds, "learning_curve": learning_curve}
    metrics["trained_on"] = {"rows": trained_on[0], "of": trained_on[1]} if trained_on and trained_on[0] else None
    metrics["warnings"] = reward_warnings(metrics)
    pictures = draw_all(reward_pictures(metrics, records), folder / "pictures")
    _fill("reward_model", folder, pictures, title=title, metrics=metrics, notes=notes)
    text = json.dumps(metrics, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / METRICS_JSON).write_text(text + "\n", encoding="utf-8")
    return metrics


def reward_warnings(metrics: Mapping[str, Any]) -> list[str]:
    """Faults of a reward model or of its measurement, and what to do: the texts of warnings.jinja that apply."""
    found: list[str] = []

    def warn(caller: Callable[[], str]) -> str:
        found.append(_one_line(caller()))
        return ""

    environment("md").get_template("warnings.jinja").render(metrics=metrics, warn=warn)
    return found


def _fill(template: str, folder: Path, pictures: Mapping[str, tuple[Path, Path | None]], **values: Any) -> None:
    """Write report.html and report.md of one template into `folder`."""
    for kind in ("html", "md"):
        page = environment(kind).get_template(f"{template}.jinja")
        text = page.render(kind=kind, pictures=pictures, **values)
        if kind == "md":
            text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
        (folder / f"report.{kind}").write_text(text, encoding="utf-8", errors="replace")


def environment(kind: str) -> Any:
    """jinja's environment of a format, "html" or "md"; only HTML is escaped by itself."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=kind == "html",
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    made.filters |= {
        "data_uri": lambda path: "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii"),
        "fenced": _fenced,
        "md": escape_markdown,
        "md_start": _escape_line,
        "one_line": _one_line,
        "by_model": _by_model,
    }
    made.globals |= {"find": findings, "about": findings_reward, "without": findings_control}
    made.globals |= {"verdicts": VERDICTS}
    made.globals |= {"groups": GROUPS, "most_rows": MOST_ROWS}
    return made


def escape_markdown(text: str) -> str:
    """One line of Markdown that shows `text` as it is, also inside a table; line breaks become <br>."""
    text = text.strip().replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", text)
    return re.sub(r"\r\n|\r|\n", "<br>", text)


def _escape_line(text: str) -> str:
    """`escape_markdown` for the start of a line, where "- ", "1. " or "===" would begin something else."""
    text = re.sub(r"^([-+=])", r"\\\1", escape_markdown(text))
    return re.sub(r"^(\d+)([.)])", r"\1\\\2", text)


def _one_line(text: str) -> str:
    return re.sub(r"[ \n]+", " ", text).strip(" ")  # but for spaces that do not break


def _fenced(text: str) -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def _by_model(rows: Iterable[tuple[str, str, Callable[[Any], str]]], models: Sequence[ModelResult]) -> list[list[str]]:
    """A line per (label, field of `ModelResult`, format of its value) that any model has a value for."""
    table = []
    for label, name, form in rows:
        values = [getattr(model, name) for model in models]
        if any(value is not None for value in values):
            table.append([label, *("–" if value is None else form(value) for value in values)])
    return table


def main(arguments: list[str] | None = None) -> None:
    """Draw the report of a run folder (or of a report.json) again."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise SystemExit("usage: python -m instruct_trl.report.pages outputs/<run>")
    path = Path(arguments[0])
    print(write_report(load_report_data(path), path if path.is_dir() else path.parent))


if __name__ == "__main__":
    main()
