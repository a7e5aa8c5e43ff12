"""The records that a report is drawn from. They survive a round trip through report.json."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from instruct_trl.evaluation.estimates import Estimate
from instruct_trl.evaluation.win_rate import WinRate

REPORT_JSON = "report.json"
LogRows = list[dict[str, Any]]


@dataclass
class ModelResult:
    """One model on the held-out prompts. A value that was not measured stays None and is left out of the report.

    Scores are means in the judge's own unit (`labeler_difference`: less the baseline's, paired), `kl` is in
    `ReportData.kl_unit`, `pretraining_loss` in nats per token, `mean_length` in tokens, and all rates go from 0 to 1.
    `like_length` is the win rate over prompts whose two answers are about equally long, `length_correlation` Spearman's
    of labeler score and length. `opening` holds the most common first words and their share; `favourite` the word that
    more answers hold than the baseline's, its share here and its share there. `tasks` has rows of `tasks.task_table`.
    """

    name: str
    win: WinRate | None = None
    labeler: Estimate | None = None
    labeler_difference: Estimate | None = None
    reward: Estimate | None = None
    kl: float | None = None
    pretraining_loss: Estimate | None = None
    mean_length: float | None = None
    eos_rate: float | None = None
    distinct_1: float | None = None
    distinct_2: float | None = None
    repetition: float | None = None
    duplicates: float | None = None
    opening: tuple[str, float] | None = None
    favourite: tuple[str, float, float] | None = None
    length_correlation: float | None = None
    like_length: WinRate | None = None
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)


_NESTED: dict[str, type] = {
    **dict.fromkeys(("win", "like_length"), WinRate),
    **dict.fromkeys(("labeler", "labeler_difference", "reward", "pretraining_loss"), Estimate),
}


@dataclass
class Sample:
    """One prompt with each model's answer and the labeler's score of it; keys are model names."""

    prompt: str
    completions: dict[str, str]
    scores: dict[str, float] = field(default_factory=dict)


@dataclass
class ReportData:
    """Everything a report says. Only `run_name` and `models` are needed; a missing part is named as missing.

    Attributes:
        models: in the order in which they were made (base, SFT, PPO-ptx).
        baseline: the model that win rates are against (the paper's choice: SFT).
        subject: the model that the headline is about; None takes the last of `models`.
        labeler: who judged, for a reader: "a sentiment classifier trained on ...". A program, not people.
        training, runs: log of the PPO trainer, and logs of other runs by name. Rows have `step`, `episodes`, `score`,
            `kl`, and where known other keys of `findings.TRAINING_NAMES`; what else they have is passed over.
        checkpoints: rows of `selection.score_checkpoints` on validation prompts.
        judged, ratings, judge_notes: replies of further judges, as rows of `judges.tally`, and notes about them.
        reward_model: `reward_metrics`, or the part of it that `pair_accuracy` gives, with `kendall_tau`.
        control: of the same run with shuffled ranks, its `name` in `models`, the `lead` of the headline model's win
            rate over its own, paired, and, if known, the `pair_accuracy` of its reward model; {} if there is none.
        selection_picture, selection_note: PNG of the SFT selection, and its finding in one sentence.
        settings: flat, or one dict per stage.
        timings: stage → seconds.
        trained_on: `rows` prompts `of` all that were trained on, and a sentence on them, `note`; {} if none.
        kl_reference, training_reference: the model that `kl` is measured from, in `models` and in `training`.
    """

    run_name: str
    models: list[ModelResult]
    baseline: str = "SFT"
    subject: str | None = None
    labeler: str = "a scoring program"
    training: LogRows = field(default_factory=list)
    runs: dict[str, LogRows] = field(default_factory=dict)
    checkpoints: LogRows = field(default_factory=list)
    judged: LogRows = field(default_factory=list)
    ratings: LogRows = field(default_factory=list)
    judge_notes: list[str] = field(default_factory=list)
    reward_model: dict[str, Any] = field(default_factory=dict)
    control: dict[str, Any] = field(default_factory=dict)
    selection_picture: str | Path | None = None
    selection_note: str = ""
    samples: list[Sample] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    deviations: list[str] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    trained_on: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    kl_reference: str = "SFT"
    training_reference: str = "the start of RL"
    kl_unit: str = "nats per answer"
    pretraining_text: str = "held-out pretraining text"

    def __post_init__(self) -> None:
        names = [model.name for model in self.models]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"models needs at least one result and no name twice, got {names}.")
        if self.subject is not None and self.subject not in names:
            raise ValueError(f"subject is {self.subject!r}, which is none of the models {names}.")

    @property
    def headline_model(self) -> ModelResult:
        """The model that the headline is about."""
        return self.model(self.subject or "") or self.models[-1]

    @property
    def tasks(self) -> list[str]:
        """The benchmark tasks of all models, in their order."""
        return list(dict.fromkeys(name for model in self.models for name in model.tasks))

    def model(self, name: str) -> ModelResult | None:
        """The result of that name, or None."""
        return next((model for model in self.models if model.name == name), None)

    def series(self, key: str, against: str | None = None) -> tuple[list[float], list[float]]:
        """(x, y) of one logged metric in order of training; x is `against`, or the progress axis."""
        return series(self.training, key, against or self.progress_key)

    @property
    def progress_key(self) -> str:
        """`episodes` where the log has it, else `step`."""
        return "episodes" if series(self.training, "episodes", "episodes")[0] else "step"


def series(log: LogRows, key: str, x_key: str) -> tuple[list[float], list[float]]:
    """(x, y) of the rows of a log in which both are finite numbers."""
    kept = [row for row in log if _is_finite(row.get(x_key)) and _is_finite(row.get(key))]
    return [float(row[x_key]) for row in kept], [float(row[key]) for row in kept]


def save_report_data(data: ReportData, path: str | Path, selection_picture: str | Path | None = None) -> Path:
    """Write `data` as JSON. NaN and infinities become null, and what JSON does not know becomes its text.

    A `selection_picture` given here, relative to the file's folder, is written in place of the one in `data`.
    """
    values = asdict(data)
    if selection_picture is not None:
        values["selection_picture"] = Path(selection_picture).as_posix()
    # JSON has no NaN and no infinity: Python writes them all the same, and reads them as what it is told to.
    strict = json.loads(json.dumps(values, default=_plain), parse_constant=lambda _: None)
    path = Path(path)
    path.write_text(json.dumps(strict, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8")
    return path


def load_report_data(path: str | Path) -> ReportData:
    """Read report.json, or the one in the folder `path`, so that the report can be drawn again.

    Raises:
        ValueError: a key this version does not know.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    path = path / REPORT_JSON if path.is_dir() else path
    raw = json.loads(path.read_text(encoding="utf-8"))
    raw["models"] = [_load(ModelResult, entry, path) for entry in raw["models"]]
    raw["samples"] = [_load(Sample, entry, path) for entry in raw.get("samples", [])]
    if picture := raw.get("selection_picture"):
        raw["selection_picture"] = str(path.parent / picture)  # an absolute path stays what it is
    return _load(ReportData, raw, path)


def _load(kind: type, entry: dict[str, Any], path: Path) -> Any:
    unknown = sorted(set(entry) - {f.name for f in fields(kind)})
    if unknown:
        raise ValueError(f"{path}: {kind.__name__} has no field {unknown[0]!r}; remove it or fix its spelling.")
    values = dict(entry)
    for name, value in entry.items():
        if name in _NESTED and isinstance(value, dict):
            values[name] = _load(_NESTED[name], value, path)
        elif name in ("opening", "favourite") and value:
            values[name] = tuple(value)
    return kind(**values)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _plain(value: Any) -> Any:
    """The number of a NumPy or torch scalar; the text of anything else that JSON does not know."""
    return value.item() if getattr(value, "ndim", None) == 0 else str(value)
