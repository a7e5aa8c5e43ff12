"""The reward model's report: one Markdown file, one self-contained HTML page, pictures, and the numbers as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from instruct_trl.evaluation.reward_metrics import Record, reward_metrics
from instruct_trl.report import findings_reward as captions
from instruct_trl.report.findings import number, percent
from instruct_trl.report.findings_reward import Metrics
from instruct_trl.report.pictures import require_matplotlib
from instruct_trl.report.pictures_reward import GROUPS, MOST_ROWS, draw_reward_pictures, fold_rows
from instruct_trl.report.render import (
    Block,
    Document,
    Headline,
    Items,
    Picture,
    Section,
    Table,
    Text,
    to_html,
    to_markdown,
)

METRICS_JSON = "metrics.json"

Pictures = dict[str, tuple[Path, Path]]

_95 = "95\u00a0%"
_WARNING = "headline worse"  # the style sheet's box with the red edge
_INTERVAL = f"The bar is the {_95} interval. It resamples prompts: pairs of one prompt, by whomever, go together."


def write_reward_report(
    records: Sequence[Record],
    folder: str | Path,
    *,
    title: str,
    notes: Sequence[str] = (),
    labeler_folds: Metrics | None = None,
    trained_on: tuple[int, int] | None = None,
) -> Metrics:
    """Write report.md, report.html, metrics.json and pictures/*.png into `folder`, which is made if missing.

    Sections that the data have nothing for are left out (no `labeler`, one K only, no lengths). The HTML page needs no
    other file and no network, and follows the reader's light or dark mode.

    Args:
        records: `RankingRewardTrainer.evaluation_records`, of prompts that were not trained on.
        title: of the page.
        notes: anything a reader must know, one sentence each.
        labeler_folds: what `cross_validate_labelers` gave.
        trained_on: (how many of the rows have a prompt that was trained on, all rows), if it is any. The page then
            warns, and gives no verdict where it is more than one row in twenty.

    Returns:
        `reward_metrics(records)` with `labeler_folds` and `trained_on` (or None), and `warnings`, the page's warnings.

    Raises:
        ValueError: bad records (`reward_metrics.pair_table`), or no pair in any of them.
        ImportError: matplotlib is missing.
    """
    require_matplotlib()
    folder = Path(folder)
    metrics = {**reward_metrics(records), "labeler_folds": labeler_folds}
    metrics["trained_on"] = {"rows": trained_on[0], "of": trained_on[1]} if trained_on and trained_on[0] else None
    metrics["warnings"] = captions.warnings(metrics)
    pictures = draw_reward_pictures(metrics, records, folder / "pictures")
    document = _document(metrics, pictures, title, notes)
    (folder / "report.md").write_text(to_markdown(document, folder), encoding="utf-8", errors="replace")
    (folder / "report.html").write_text(to_html(document), encoding="utf-8", errors="replace")
    text = json.dumps(metrics, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / METRICS_JSON).write_text(text + "\n", encoding="utf-8")
    return metrics


def _document(metrics: Metrics, pictures: Pictures, title: str, notes: Sequence[str]) -> Document:
    opening: list[Block] = [Headline(*captions.headline(metrics), _key_figures(metrics))]
    opening += [Text(f"Warning. {warning}", tone=_WARNING) for warning in metrics["warnings"]]
    sections = [
        Section("How often is it right?", _accuracy_blocks(metrics, pictures)),
        Section("Is it right everywhere?", _group_blocks(metrics, pictures)),
        Section("Does it hold for new labelers?", _fold_blocks(metrics, pictures)),
        Section("Is it as sure as it should be?", _calibration_blocks(metrics, pictures)),
        Section("Does it just like long answers?", _length_blocks(metrics, pictures)),
        Section("What scores does it give?", _score_blocks(metrics, pictures)),
        Section("All numbers", _number_blocks(metrics)),
        Section("Notes", [Items(notes)] if notes else []),
    ]
    return Document(title, opening, [section for section in sections if section.blocks])


def _key_figures(metrics: Metrics) -> list[tuple[str, str]]:
    figures = [
        (
            percent(metrics["pair_accuracy"]),
            f"of {'the test split’s' if metrics['trained_on'] else 'held-out'} pairs ordered right",
        ),
        (number(metrics["calibration"]["ece"]), "expected calibration error (0 is perfect)"),
    ]
    length = metrics["length"]
    if length and length["within_prompt"]["pearson"] is not None:
        r = length["within_prompt"]["pearson"]
        figures.append((captions.signed(r), "correlation of score and length at equal prompt"))
    figures.append((f"{metrics['n_prompts']:,}", f"prompts, {metrics['n_completions']:,} answers"))
    return figures


def _picture(pictures: Pictures, name: str, caption: str, reading: str) -> Picture:
    light, dark = pictures[name]
    return Picture(light, caption, reading, dark)


def _accuracy_blocks(metrics: Metrics, pictures: Pictures) -> list[Block]:
    reading = f"Each pair is two answers to one prompt that the labeler ranks differently. {_INTERVAL}"
    if metrics["by_rank_distance"]:
        reading += " Answers far apart in rank are easier to tell apart, so the rows should rise."
    return [_picture(pictures, "accuracy", captions.accuracy_caption(metrics), reading)]


def _group_blocks(metrics: Metrics, pictures: Pictures) -> list[Block]:
    blocks: list[Block] = []
    for name, (what, _) in GROUPS.items():
        if name in pictures:
            reading = f"{_INTERVAL} “Differs” is said where chance alone would give such spread in 1 case of 20."
            if blocks:  # said once
                reading = ""
            if len(metrics[name]) > MOST_ROWS:
                reading += f" The {MOST_ROWS} largest groups of {len(metrics[name])}; all are in the table below."
            caption = captions.group_title(metrics[name], what) + "."
            blocks.append(_picture(pictures, name, caption, reading.strip()))
    return blocks


def _fold_blocks(metrics: Metrics, pictures: Pictures) -> list[Block]:
    folds = metrics["labeler_folds"]
    if not folds:
        return []
    reading = (
        "Each fold trains a reward model without one group of labelers, then compares its accuracy on new prompts of "
        "the labelers in training and of the group left out. The paper (section 4.1) finds 72.4 ± 0.4\u00a0% and "
        "69.6 ± 0.9\u00a0%. The folds share training data, so the errors are a little too small."
    )
    table = Table(["fold", "held-out labelers", "seen labelers", "new labelers"], fold_rows(folds))
    return [_picture(pictures, "labeler_folds", captions.folds_caption(folds), reading), table]


def _calibration_blocks(metrics: Metrics, pictures: Pictures) -> list[Block]:
    reading = (
        "σ(difference of rewards) is the probability, by the training loss, that the labeler prefers the first answer. "
        "Each pair counts once, with the model's favourite first. On the dashed line the model is right as often as "
        f"it says. ECE is the mean gap, weighted by pairs. {_INTERVAL} An open dot has too few prompts for one."
    )
    return [_picture(pictures, "calibration", captions.calibration_caption(metrics), reading)]


def _length_blocks(metrics: Metrics, pictures: Pictures) -> list[Block]:
    blocks: list[Block] = []
    if "length" in pictures:
        reading = (
            "Pale dots are answers. Both axes are differences from the mean of the same prompt's answers, so that "
            "prompts that ask for long answers do not count as length bias. A flat line is a score blind to length."
        )
        blocks.append(_picture(pictures, "length", captions.length_caption(metrics), reading))
    if "length_rules" in pictures:
        reading = (
            "The rules look at nothing but length; answers of equal length count as wrong for both. A model that is "
            f"good only where the longer answer wins has learned length. {captions.rules_gain(metrics)}"
        )
        blocks.append(_picture(pictures, "length_rules", captions.rules_caption(metrics), reading.strip()))
    return blocks


def _score_blocks(metrics: Metrics, pictures: Pictures) -> list[Block]:
    if "scores" not in pictures:
        return []
    reading = (
        "Best-ranked answers are those that win and never lose within their prompt, worst-ranked the reverse. Prompts "
        "differ in level, so the histograms overlap more than the pairs do. The outermost bars hold what lies beyond."
    )
    return [_picture(pictures, "scores", captions.scores_caption(metrics), reading)]


def _number_blocks(metrics: Metrics) -> list[Block]:
    names = {
        "by_rank_distance": "ranks apart",
        "by_k": "answers a prompt",
        "by_prompt_length": "prompt tokens",
        "by_labeler": "labeler",
    }
    overall = {"accuracy": metrics["pair_accuracy"], **{key: metrics[key] for key in ("low", "high", "n_pairs")}}
    rows = [_number_row("all pairs", {**overall, "n_prompts": metrics["n_prompts"]})]
    for key, label in names.items():
        rows += [_number_row(f"{label}: {group}", row) for group, row in metrics[key].items()]
    blocks: list[Block] = [Table(["pairs", "accuracy", _95, "pairs", "prompts"], rows)]
    length, temperature = metrics["length"], metrics["calibration"]["temperature"]
    other = [["expected calibration error", f"{metrics['calibration']['ece']:.3f}"]]
    if temperature is not None:
        other.append(["temperature that would calibrate it", number(temperature)])
    if length:
        for place, found in (("all answers", length), ("within prompts", length["within_prompt"])):
            for key, name in (("pearson", "Pearson's r"), ("spearman", "Spearman's ρ")):
                if found[key] is not None:
                    other.append([f"{name} of score and length, {place}", captions.signed(found[key])])
    other += [["mean score", number(metrics["scores"]["mean"])], ["spread of scores", number(metrics["scores"]["std"])]]
    return [*blocks, Table(["", ""], other)]


def _number_row(label: str, row: dict[str, Any]) -> list[str]:
    interval = "–" if row["low"] is None else f"{100 * row['low']:.1f} to {100 * row['high']:.1f}"
    return [label, percent(row["accuracy"], 1), interval, f"{row['n_pairs']:,}", f"{row['n_prompts']:,}"]
