"""What the report is drawn from: plain records that survive a round trip through report.json."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from instruct_trl.evaluation.win_rate import WinRate

REPORT_JSON = "report.json"


@dataclass
class ModelResult:
    """One model on the held-out prompts. What was not measured stays None and is left out of the report.

    Units: scores in the judge's own unit; `kl` in `ReportData.kl_unit`; `pretraining_loss` in nats a token;
    `mean_length` in tokens; `eos_rate`, `distinct_1`, `distinct_2`, `repetition`, `duplicates` and `opening_share` from
    0 to 1. Each `_ci` is (low, high), 95 %. `like_length` is the win rate over prompts whose two answers are about
    equally long, `length_correlation` Spearman's of labeler score and length, `opening` the most common first words,
    `favourite` the word that more answers hold than the baseline's, with the share of these and of the baseline's.
    `tasks` is task → the row of `benchmarks.task_table`.
    """

    name: str
    win: WinRate | None = None
    labeler_mean: float | None = None
    labeler_ci: tuple[float, float] | None = None
    labeler_difference: float | None = None
    labeler_difference_ci: tuple[float, float] | None = None
    rm_mean: float | None = None
    rm_ci: tuple[float, float] | None = None
    kl: float | None = None
    pretraining_loss: float | None = None
    pretraining_loss_ci: tuple[float, float] | None = None
    mean_length: float | None = None
    eos_rate: float | None = None
    distinct_2: float | None = None
    repetition: float | None = None
    distinct_1: float | None = None
    duplicates: float | None = None
    opening: str = ""
    opening_share: float | None = None
    favourite: tuple[str, float, float] | None = None
    length_correlation: float | None = None
    like_length: WinRate | None = None
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class Sample:
    """One prompt with each model's answer and the labeler's score of it; keys are model names."""

    prompt: str
    completions: dict[str, str]
    scores: dict[str, float] = field(default_factory=dict)


@dataclass
class ReportData:
    """Everything a report says. Only `run_name` and `models` are needed; a part that is missing is named as missing.

    Attributes:
        run_name: title of the run.
        models: in the order in which they were made (base, SFT, PPO-ptx).
        baseline: name of the model that win rates are against (the paper's choice: SFT).
        subject: name of the model that the headline is about; None takes the last of `models`.
        labeler: what judged, for a reader: "a sentiment classifier trained on ...". A program, not people.
        training: the PPO trainer's log history; rows with `step`, `episodes`, `score`, `kl`, and where known
            `labeler_score`, `ptx_loss`, `value_loss`, `explained_variance`. Other rows and keys are passed over.
        runs: other runs' logs by name, drawn beside `training`; the same kind of rows.
        checkpoints: `gold.score_checkpoints` on validation prompts.
        judged: what further judges said: rows of `judges.tally.judged_row`.
        ratings: replies to questions about single answers: rows of `judges.tally.rating_row`.
        judge_notes: what a reader must know of these judges (cost, agreement, who is still waited for).
        reward_model: `pair_accuracy`, `low`, `high`, `n_pairs`, `n_prompts`, `kendall_tau` and `by_rank_distance`, a
            dict from the distance to an accuracy or to {"accuracy", "low", "high", "n_pairs"}. Rates from 0 to 1.
        selection_picture: PNG of `select_checkpoint`.
        selection_note: its finding in one sentence.
        samples: shown side by side.
        settings: flat, or one dict a stage.
        deviations: from the paper, one sentence each; numbered in the report.
        timings: stage → seconds, in the order they ran.
        notes: anything a reader must know.
        trained_on: `rows` prompts `of` all that were trained on, and a sentence on them, `note`; {} if none are known.
        command: the command line that made the run.
        environment: machine and versions.
        kl_reference: the model that `kl` of `models` is measured from.
        training_reference: the same for `training`: the reference of PPO, the policy as RL began.
        kl_unit: unit of `kl`, in `training` and in `models`.
        pretraining_text: what `pretraining_loss` was measured on.
    """

    run_name: str
    models: list[ModelResult]
    baseline: str = "SFT"
    subject: str | None = None
    labeler: str = "a scoring program"
    training: list[dict[str, Any]] = field(default_factory=list)
    runs: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    judged: list[dict[str, Any]] = field(default_factory=list)
    ratings: list[dict[str, Any]] = field(default_factory=list)
    judge_notes: list[str] = field(default_factory=list)
    reward_model: dict[str, Any] = field(default_factory=dict)
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
        return next((model for model in self.models if model.name == self.subject), self.models[-1])

    def model(self, name: str) -> ModelResult | None:
        """The result of that name, or None."""
        return next((model for model in self.models if model.name == name), None)

    def series(self, key: str, against: str | None = None) -> tuple[list[float], list[float]]:
        """(x, y) of one logged metric in order of training, over the rows that hold both, finite.

        x is `against`, or the progress axis (`progress_key`).
        """
        return self.series_of(self.training, key, against or self.progress_key)

    @staticmethod
    def series_of(log: list[dict[str, Any]], key: str, x_key: str) -> tuple[list[float], list[float]]:
        """The same of any log."""
        rows = [row for row in log if _is_finite(row.get(x_key)) and _is_finite(row.get(key))]
        kept = [(float(row[x_key]), float(row[key])) for row in rows]
        return [x for x, _ in kept], [y for _, y in kept]

    @property
    def progress_key(self) -> str:
        """`episodes` where the log has it, else `step`."""
        return "episodes" if any(_is_finite(row.get("episodes")) for row in self.training) else "step"


def save_report_data(data: ReportData, path: str | Path, selection_picture: str | Path | None = None) -> Path:
    """Write `data` as JSON; NaN and infinities become null, and what JSON does not know becomes its text.

    A `selection_picture` given here, relative to the file's folder, is written in place of the one in `data`.
    """
    path = Path(path)
    raw = _plain(asdict(data))
    if selection_picture is not None:
        raw["selection_picture"] = Path(selection_picture).as_posix()
    path.write_text(json.dumps(raw, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8")
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
    _check_keys(ReportData, raw, path)
    raw["models"] = [_load_model(entry, path) for entry in raw["models"]]
    raw["samples"] = [Sample(**_check_keys(Sample, entry, path)) for entry in raw.get("samples", [])]
    picture = raw.get("selection_picture")
    if picture and not Path(picture).is_absolute():
        raw["selection_picture"] = str(path.parent / picture)
    return ReportData(**raw)


def _load_model(entry: dict[str, Any], path: Path) -> ModelResult:
    _check_keys(ModelResult, entry, path)
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in entry.items()  # JSON has no tuples
    }
    for name in ("win", "like_length"):
        if values.get(name):
            values[name] = WinRate(**_check_keys(WinRate, values[name], path))
    return ModelResult(**values)


def _check_keys(kind: type, entry: dict[str, Any], path: Path) -> dict[str, Any]:
    unknown = sorted(set(entry) - {f.name for f in fields(kind)})
    if unknown:
        raise ValueError(f"{path}: {kind.__name__} has no field {unknown[0]!r}; remove it or fix its spelling.")
    return entry


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()  # NumPy and torch scalars
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int | bool) else str(value)
