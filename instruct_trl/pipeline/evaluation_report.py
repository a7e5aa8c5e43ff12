"""The report of a whole run, from the files that its stages left behind."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from instruct_trl.data.encoding import prompt_keys
from instruct_trl.data.rows import read_json
from instruct_trl.evaluation import answers
from instruct_trl.evaluation.estimates import Estimate, mean_interval
from instruct_trl.evaluation.reward_metrics import correlations
from instruct_trl.evaluation.win_rate import paired_difference, win_rate
from instruct_trl.judges.base import as_text
from instruct_trl.pipeline.benchmarking import TaskArguments, measure_tasks
from instruct_trl.pipeline.control import control_figures, control_stages, read_answers
from instruct_trl.pipeline.evaluating import SFT, EvaluateArguments, other_logs, training_log
from instruct_trl.pipeline.judging import JudgeArguments, judge_answers
from instruct_trl.pipeline.stage import disk_errors, finished_summary, locked
from instruct_trl.redaction import redact_command, redact_settings
from instruct_trl.report import findings
from instruct_trl.report.data import ModelResult, ReportData, Sample

STAGES = ("data", "sft", "rankings", "reward_model", "selected_sft", "rl_init", "ppo_ptx", "evaluation")
SAMPLES = 8  # prompts whose answers are shown


def judged_report(run: EvaluateArguments, folder: Path, tasks: TaskArguments, judges: JudgeArguments) -> str:
    """The tasks on every process, then, on the main one alone, the judges and the report; returns the report's path.

    The other processes are done by then. None waits at a barrier, which could time out before a judge has replied.
    """
    measured, report = measure_tasks(run, tasks), report_folder(run, folder) / "report.html"
    if PartialState().is_main_process:
        with disk_errors(folder, "Judges and report"), locked(folder):
            report = make_report(run, folder, measured, judge_answers(run, judges, folder))
        print(f"Report: {report} and {report.with_suffix('.md')}")
    return str(report)


def report_folder(run: EvaluateArguments, folder: Path) -> Path:
    """Where the report goes: into the run, or beside the answers of an evaluation with an `output_dir` of its own."""
    return run.run if folder.resolve() == (run.run / "evaluation").resolve() else folder


def make_report(
    run: EvaluateArguments, folder: Path, tasks: dict[str, Any] | None = None, judged: dict[str, Any] | None = None
) -> Path:
    """Draw report.md and report.html of the run; see `report_folder`.

    Args:
        run: the recipe's arguments.
        folder: of the evaluation's answers.
        tasks: of `benchmarking.measure_tasks`.
        judged: of `judging.judge_answers`.
    """
    from instruct_trl.report.pages import write_report

    data = read_answers(run, folder)
    # Stage → the folder with its settings, time and log: the run's, or that of the model given in its place.
    stages = {stage: run.run / stage for stage in STAGES} | {"evaluation": folder, "ppo_ptx": run.ppo_folder}
    stages["reward_model"] = Path(run.reward_path)
    if run.sft_model:
        stages["selected_sft"] = Path(run.sft_model).parent
    stages |= control_stages(run, folder)
    finished = {stage: finished_summary(place) for stage, place in stages.items()}
    selection = stages["selected_sft"] / "selection.json"
    picture = selection.with_suffix(".png")
    report = ReportData(
        run_name=run.run.name,
        models=[_result(data, name, (tasks or {}).get(name, {})) for name in data["models"]],
        labeler=run.labeler_description or str(run.labeler),
        training=training_log(stages["ppo_ptx"]),
        runs=other_logs(run.other_runs),
        checkpoints=data.get("checkpoints", []),
        **(judged or {}),
        reward_model=data.get("reward_model", {}),
        control=control_figures(data),
        trained_on=data.get("trained_on") or {},
        selection_picture=picture if picture.exists() else None,
        selection_note=read_json(selection).get("finding", "") if selection.exists() else "",
        samples=_samples(data),
        settings={stage: redact_settings((made or {}).get("settings", {})) for stage, made in finished.items()},
        deviations=run.deviations,
        timings={stage: made["seconds"] for stage, made in finished.items() if made is not None},
        command=command_line(),
        environment=_environment(),
        pretraining_text=run.pretraining_description or run.pretraining_dataset_name or "",
    )
    if report.reward_model:
        print(findings.floor_text(report.reward_model))
    return write_report(report, report_folder(run, folder))


def _result(data: dict[str, Any], name: str, tasks: dict[str, Any]) -> ModelResult:
    prompts = prompt_keys(data["prompts"])
    row, base = data["models"][name], data["models"][SFT]
    texts, loss = row["completions"], row.get("pretraining_loss")
    result = ModelResult(
        name,
        labeler=mean_interval(row["labeler"], prompts),
        reward=mean_interval(row["reward"], prompts),
        kl=row.get("kl"),
        pretraining_loss=None if loss is None else Estimate(loss, None, None, 0),
        mean_length=sum(row["lengths"]) / len(row["lengths"]),
        eos_rate=sum(row["ended"]) / len(row["ended"]),
        distinct_1=answers.distinct_n(texts, 1),
        distinct_2=answers.distinct_n(texts, 2),
        repetition=answers.repetition_rate(texts),
        duplicates=answers.duplicate_rate(texts),
        opening=answers.common_opening(texts),
        length_correlation=correlations(row["labeler"], row["lengths"])["spearman"],
        tasks=tasks,
    )
    if name != SFT:
        scores = (row["labeler"], base["labeler"])
        result.win = win_rate(*scores, prompts=prompts)
        result.like_length = answers.like_length_win_rate(*scores, row["lengths"], base["lengths"], prompts=prompts)
        result.favourite = answers.favourite_word(texts, base["completions"])
        result.labeler_difference = mean_interval(paired_difference(*scores), prompts)
    return result


def _samples(data: dict[str, Any]) -> list[Sample]:
    """The first prompts: chosen by position, not by how the answers turned out."""
    models = data["models"].items()
    return [
        Sample(
            as_text(prompt),
            {n: row["completions"][i] for n, row in models},
            {n: row["labeler"][i] for n, row in models},
        )
        for i, prompt in enumerate(data["prompts"][:SAMPLES])
    ]


def command_line() -> str:
    """The command of this process, without this machine's paths, and without keys and tokens."""
    return " ".join(["accelerate launch", f"recipes/{Path(sys.argv[0]).name}", *redact_command(sys.argv[1:])])


def _environment() -> dict[str, str]:
    packages = ("instruct-trl", "trl", "transformers", "torch", "accelerate", "peft", "datasets")
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    machine = {"device": device, "system": platform.platform(terse=True), "python": platform.python_version()}
    return machine | {name: version(name) for name in packages}
