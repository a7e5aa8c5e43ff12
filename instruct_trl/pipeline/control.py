"""A run's control: the same training with a reward model that learned shuffled ranks. What does its policy still win?

It lies in <run_dir>/control: reward_model/ and ppo_ptx/, as in the run itself. The run's own stages and evaluation stay
as they are; the control's answers are kept beside the evaluation's, in control/answers.json.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState

from instruct_trl.data.encoding import prompt_keys
from instruct_trl.data.rows import read_json
from instruct_trl.evaluation.win_rate import win_rate, win_rate_lead
from instruct_trl.pipeline.arguments import settings_of
from instruct_trl.pipeline.evaluating import PPO, SFT, EvaluateArguments, answers_of, model_paths, name_and_path
from instruct_trl.pipeline.functions import load_labeler
from instruct_trl.pipeline.stage import finished_summary, run_stage, write_json
from instruct_trl.pipeline.training import DEFAULT_OUTPUT, PPOPtxArguments

SHUFFLED = "shuffled_ranks"
CONTROL = "shuffled ranks"
"""The control's name among the models of a report."""
FOLDER = "control"
# Stage → what may differ between the run and its control: what makes it a control, or changes no model.
_MAY_DIFFER = {
    "reward_model": {"shuffle_ranks", "labeler_folds", "learning_curve"},
    "ppo_ptx": {"reward_model_path"},
}


def check_control(run: PPOPtxArguments, output_dir: str | None) -> bool:
    """Whether a control is asked for. One that could not be trained or evaluated with the run is refused.

    Args:
        run: the arguments of `recipes/ppo_ptx.py`.
        output_dir: of the PPO stage, as it was given.
    """
    if run.control == "none":
        return False
    if run.control != SHUFFLED:
        raise ValueError(f"--control is {run.control!r}. Give {SHUFFLED!r}, or 'none'.")
    if run.reward_model_path is not None:
        raise ValueError(
            f"--control {SHUFFLED} shuffles the ranks that the run's own reward model learns from, and "
            f"--reward_model_path {run.reward_model_path} comes without any. Leave it out, with a reward_model.yaml "
            "beside the config that names your rankings. Or train the control by hand, each step with an --output_dir "
            "of its own: recipes/reward_model.py --shuffle_ranks true on your rankings, recipes/ppo_ptx.py with that "
            f"reward model, then recipes/evaluate.py --other_models '{CONTROL}=PATH' with the policy of that run."
        )
    own = run.run / "ppo_ptx"
    if output_dir not in (None, DEFAULT_OUTPUT) and Path(str(output_dir)).resolve() != own.resolve():
        raise ValueError(
            f"--control belongs to the run's own policy in {own}, and --output_dir is {output_dir}. Leave --output_dir "
            "out; for a variant of the run, name another --run_dir."
        )
    return True


def evaluate_control(run: EvaluateArguments, folder: Path) -> None:
    """Let the run's finished control answer the prompts of a finished evaluation, as a stage in `<folder>/control`.

    There is nothing to do without one, if another policy than the run's own is evaluated, or if `other_models` holds
    a control. One that was trained with other settings or data than the run is left out, and a line says so.

    Args:
        run: the arguments of `recipes/evaluate.py`.
        folder: of the evaluation.
    """
    stage = run.run / FOLDER / "ppo_ptx"
    named = CONTROL in name_and_path(run.other_models, "other_models")
    if run.ppo_model is not None or named or finished_summary(stage) is None:
        return
    if why := unlike_the_run(run.run):
        PartialState().print(f"== Evaluation of the control: left out. {why}")
        return
    settings = settings_of(run) | {"ppo_model": str(stage / "policy")}
    place = folder / FOLDER
    run_stage(place, "Evaluation of the control", settings, lambda _: _evaluate(run, folder, stage), resume=False)


def unlike_the_run(run: Path) -> str:
    """What was changed between the trainings of the run in a folder and of its control, and the remedy; "" if nothing.

    Stages without a record are not compared.
    """
    for stage, may_differ in _MAY_DIFFER.items():
        own, control = (finished_summary(folder / stage) for folder in (run, run / FOLDER))
        if own is None or control is None:
            continue
        then, now = (record.get("settings", {}) for record in (control, own))
        changed = [f"{k} is {then.get(k, 'the default')} there and {now.get(k, 'the default')} in {run / stage}"
                   for k in sorted({*then, *now} - may_differ) if then.get(k) != now.get(k)]  # fmt: skip
        then, now = (record.get("inputs", {}) for record in (control, own))
        changed += [f"the files of {k} are others than for {run / stage}"
                    for k in sorted({*then} & {*now} - may_differ) if then[k] != now[k]]  # fmt: skip
        if changed:
            return (
                f"{run / FOLDER / stage} was not trained as the run itself was: {changed[0]}. Move {run / FOLDER} "
                f"away, and train the control anew with recipes/ppo_ptx.py --control {SHUFFLED}."
            )
    return ""


def _evaluated(run: EvaluateArguments, folder: Path) -> bool:
    """Whether the control was evaluated with `folder` and is still one of this run."""
    return finished_summary(folder / FOLDER) is not None and not unlike_the_run(run.run)


def _evaluate(run: EvaluateArguments, folder: Path, stage: Path) -> dict[str, Any]:
    from instruct_trl import RewardScorer

    data = read_json(folder / "answers.json")
    scorer = RewardScorer(run.reward_path, batch_size=run.batch_size)  # the run's own, for all models
    paths = {CONTROL: str(stage / "policy")}
    found = answers_of(run, paths, model_paths(run)[SFT], data["prompts"], load_labeler(run.labeler, run), scorer)
    write_json(folder / FOLDER / "answers.json", found)
    scores = found[CONTROL]["labeler"], data["models"][SFT]["labeler"]
    return {f"{CONTROL} wins against {SFT}": win_rate(*scores).mean}


def control_stages(run: EvaluateArguments, folder: Path) -> dict[str, Path]:
    """Stage → folder of the control that was evaluated with `folder`; {} if none was."""
    if not _evaluated(run, folder):
        return {}
    own = run.run / FOLDER
    return {
        "control: reward_model": own / "reward_model",
        "control: ppo_ptx": own / "ppo_ptx",
        "control: evaluation": folder / FOLDER,
    }


def read_answers(run: EvaluateArguments, folder: Path) -> dict[str, Any]:
    """The evaluation's answers.json, with the control's answers before those of the last model."""
    data = read_json(folder / "answers.json")
    if _evaluated(run, folder) and CONTROL not in data["models"]:
        *others, last = data["models"].items()
        data["models"] = dict([*others, *read_json(folder / FOLDER / "answers.json").items(), last])
    return data


def control_figures(data: dict[str, Any]) -> dict[str, Any]:
    """What the report says of the control, from `read_answers`: `ReportData.control`; {} if there is none."""
    models = data["models"]
    if CONTROL not in models:
        return {}
    scores = (models[name]["labeler"] for name in (PPO, CONTROL, SFT))
    lead = win_rate_lead(*scores, prompts=prompt_keys(data["prompts"]))
    made = finished_summary(Path(models[CONTROL]["path"]).parent) or {}
    page = Path(made.get("settings", {}).get("reward_model_path", ""), "evaluation", "metrics.json")
    accuracy = {"pair_accuracy": read_json(page)["pair_accuracy"]} if page.is_file() else {}
    return {"name": CONTROL, "lead": asdict(lead), **accuracy}
