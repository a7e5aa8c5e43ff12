"""The last stage: base, SFT and PPO-ptx on prompts that nothing else saw."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from instruct_trl.data.encoding import prompt_key
from instruct_trl.data.ranking import prepare_ranking_dataset
from instruct_trl.data.ranking_batch import answer_lengths
from instruct_trl.data.rows import read_json
from instruct_trl.evaluation.floors import add_bag_of_words, bag_of_words, text_rankings, training_texts
from instruct_trl.evaluation.language_modeling import mean_answer_kl, mean_token_loss
from instruct_trl.evaluation.reward_metrics import reward_metrics
from instruct_trl.evaluation.selection import as_prompts, score_answers, score_checkpoints
from instruct_trl.evaluation.win_rate import win_rate
from instruct_trl.judges import ScoreJudge
from instruct_trl.models.generation import Completion, encode_prompt
from instruct_trl.models.model_files import check_model_path
from instruct_trl.models.reward import check_scorer_room
from instruct_trl.pipeline.arguments import SamplingArguments, require_at_least, setting
from instruct_trl.pipeline.functions import load_labeler, try_judges, try_labeler
from instruct_trl.pipeline.loading import load_split
from instruct_trl.pipeline.rows import dataset_of, held_out_texts, prompts_to_judge, rows_digest, trained_on
from instruct_trl.pipeline.sampling import load_causal_lm, sample_answers
from instruct_trl.pipeline.stage import fingerprint, finished_summary, write_json

BASE, SFT, PPO = "base", "SFT", "PPO-ptx"
_OPTIONS = {BASE: "base_model", SFT: "sft_model", PPO: "ppo_model"}


@dataclass
class EvaluateArguments(SamplingArguments):
    """The models to compare, and the judge."""

    base_model: str | None = setting(None, "The pretrained model. Default: not compared.")
    sft_model: str | None = setting(None, "The baseline. Default: <run_dir>/selected_sft/model.")
    ppo_model: str | None = setting(None, "The policy after PPO. Default: <run_dir>/ppo_ptx/policy.")
    other_models: list[str] = setting(
        [], "More models to compare: NAME=PATH, such as PPO=... 'shuffled ranks' is the name of a control."
    )
    prefixes: list[str] = setting([], "A text to put before the prompts of one of other_models: NAME=FILE.")
    other_runs: list[str] = setting([], "Folders of PPO runs to draw: NAME=PATH.")
    reward_model_path: str | None = setting(None, "The reward model. Default: <run_dir>/reward_model.")
    pretraining_dataset_name: str | None = setting(None, "Held-out texts, for a loss on them.")
    pretraining_description: str | None = setting(
        None, "These texts in words, for the report. Default: the dataset's name."
    )
    labeler: str | None = setting(None, "The judge, required: 'module:function' of your own.")
    labeler_description: str | None = setting(None, "The labeler in words, for the report. Default: its name.")
    deviations: list[str] = setting([], "How the run differs from the paper, one sentence each, for the report.")
    checkpoint_prompts: str | None = setting(None, "Score every PPO checkpoint on the prompts of this dataset.")
    max_text_length: int = setting(256, "Cut each held-out pretraining text to this many tokens.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, max_text_length=2)  # a token and the one before it

    @property
    def ppo_folder(self) -> Path:
        """The log and checkpoints of the policy's PPO run: the run's stage, or the folder of `ppo_model`."""
        return Path(self.ppo_model).parent if self.ppo_model else self.run / "ppo_ptx"


def evaluate_models(run: EvaluateArguments, folder: Path, judges: Sequence[ScoreJudge] = ()) -> dict[str, Any]:
    """Sample, judge and measure each model; write `answers.json` and return the headline numbers.

    Args:
        run: the recipe's arguments.
        folder: where the answers go.
        judges: functions that will judge later. They are tried before anything is sampled.
    """
    from instruct_trl import RewardScorer
    from instruct_trl.report.pictures import require_matplotlib

    require_matplotlib()
    paths = model_paths(run)
    checkpoint_prompts = _checkpoint_prompts(run)
    other_logs(run.other_runs)
    check_model_folders(run, paths)
    labeler = load_labeler(run.labeler, run)
    scorer = RewardScorer(run.reward_path, batch_size=run.batch_size)
    prompts = as_prompts(prompts_to_judge(run, dataset_of(run)), "The prompts of the evaluation")
    seen = trained_on(run, prompts, [run.sft_model, run.reward_model_path, run.ppo_folder])
    check_scorer_room(scorer, prompts, run.max_completion_length, "max_completion_length")
    prefixes = read_prefixes(run, prompts)
    if PartialState().num_processes > 1:
        PartialState().print("== Evaluation: every process samples all answers. Launch one alone: --num_processes 1.")
    try_judges(judges, prompts)
    answers = answers_of(run, paths, paths[SFT], prompts, labeler, scorer, prefixes)
    result: dict[str, Any] = {"prompts": prompts, "models": answers, "trained_on": seen}
    if (held_out := _rankings(run.run / "rankings" / "test.jsonl")) is not None:
        training = _training_rankings(run)
        result["reward_model"] = reward_model_figures(scorer, Path(run.reward_path), held_out, training)
    if checkpoint_prompts is not None:
        result["checkpoints"] = score_checkpoints(run.ppo_folder, labeler, scorer, checkpoint_prompts, **run.drawn)
    write_json(folder / "answers.json", result)
    scores = {name: row["labeler"] for name, row in answers.items()}
    return {f"{n} wins against SFT": win_rate(scores[n], scores[SFT]).mean for n in answers if n != SFT}


def answers_of(
    run: EvaluateArguments,
    paths: Mapping[str, str],
    sft: str,
    prompts: list,
    labeler: Callable[..., Any],
    scorer: Callable[..., Any],
    prefixes: Mapping[str, str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Each model's answers with their scores and measures, as `answers.json` has them: name → row.

    Args:
        run: the recipe's arguments.
        paths: name → path of the models that answer.
        sft: path of the model that the KL is measured from.
        labeler, scorer: score all answers; the labeler is tried before anything is sampled.
        prefixes: of `read_prefixes`.
    """
    texts = held_out_texts(run, run.pretraining_dataset_name)
    reference, tokenizer = load_causal_lm(sft)
    try_labeler(labeler, prompts, tokenizer, str(run.labeler))
    answers: dict[str, dict[str, Any]] = {}
    for name, path in paths.items():
        sampled, measured = _measure(run, name, path, prompts, texts, reference, (prefixes or {}).get(name))
        answers[name] = measured | {"path": path, "labeler": score_answers(labeler, prompts, sampled, "The labeler")}
        with torch.autocast(reference.device.type, torch.bfloat16, enabled=run.bf16):
            answers[name]["reward"] = score_answers(scorer, prompts, sampled)
    return answers


def _measure(
    run: EvaluateArguments, name: str, path: str, prompts: list, texts: list | None, reference: Any, prefix: str | None
) -> tuple[list[Completion], dict[str, Any]]:
    """A model's answers and the measures that need no judge. A model with a prefix has neither KL nor loss."""
    model, tokenizer = load_causal_lm(path)
    asked = prompts if prefix is None else [prefix + prompt for prompt in prompts]
    answers = sample_answers(model, tokenizer, asked, run, seed=run.seed, desc=f"answers of {name}")
    measured: dict[str, Any] = {}
    if prefix is not None:
        answers = [cut_at_blank_line(answer, tokenizer) for answer in answers]
    else:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=run.bf16):
            rows = [(encode_prompt(tokenizer, p), a.token_ids) for p, a in zip(prompts, answers, strict=True)]
            measured["kl"] = 0.0 if name == SFT else mean_answer_kl(model, reference, rows)
            if texts is not None:
                loss, _ = mean_token_loss(model, tokenizer, texts, batch_size=16, max_length=run.max_text_length)
                measured["pretraining_loss"] = loss
    return answers, measured | {
        "completions": [a.text for a in answers],
        "lengths": [len(a.token_ids) for a in answers],
        "ended": [not a.truncated for a in answers],
    }


def cut_at_blank_line(answer: Completion, tokenizer: Any) -> Completion:
    """A prompted model's answer up to its first blank line, as if it ended there: the next example would follow.

    Blank lines before the first word are no end. An answer without one comes back as it is.
    """
    blank = re.search(r"(?<=\S)\s*?\n\s*\n", answer.text)
    if blank is None:
        return answer
    text = answer.text[: blank.start()]
    ids = tokenizer(text=text, add_special_tokens=False)["input_ids"]
    return Completion(text, [*ids, tokenizer.eos_token_id], truncated=False)


def name_and_path(entries: list[str], option: str) -> dict[str, str]:
    """["NAME=PATH", ...] as a dict, in order."""
    pairs = [entry.partition("=")[::2] for entry in entries]
    for entry, (name, path) in zip(entries, pairs, strict=True):
        if not name or not path or sum(name == other for other, _ in pairs) > 1:
            raise ValueError(f"{option}: {entry!r} is not NAME=PATH with a name of its own, such as PPO=outputs/plain.")
    return dict(pairs)


def model_paths(run: EvaluateArguments) -> dict[str, str]:
    """Name → path, in the order of the pipeline; the base only if it is named."""
    sft = run.sft_model or str(run.run / "selected_sft" / "model")
    others = name_and_path(run.other_models, "other_models")
    for name in others.keys() & _OPTIONS:
        raise ValueError(f"other_models: the name {name!r} is taken; give --{_OPTIONS[name]}, or another name.")
    base = {BASE: run.base_model} if run.base_model else {}
    return base | {SFT: sft} | others | {PPO: run.ppo_model or str(run.run / "ppo_ptx" / "policy")}


def check_model_folders(run: EvaluateArguments, paths: dict[str, str]) -> None:
    """Refuse a model of `model_paths` that is neither a folder nor on the hub; the error names its option."""
    named = {f"--{_OPTIONS.get(name, f'other_models {name}')}": path for name, path in paths.items()}
    for option, path in (named | {"--reward_model_path": run.reward_path}).items():
        try:
            check_model_path(path)
        except ValueError as error:
            raise ValueError(f"{option}: {error}") from None


def _checkpoint_prompts(run: EvaluateArguments) -> Any:
    """The prompts to score checkpoints on, or None; refused before anything is sampled if there is no checkpoint."""
    if run.checkpoint_prompts is None:
        return None
    if not any(run.ppo_folder.glob("checkpoint-*")):
        raise ValueError(
            f"checkpoint_prompts: {run.ppo_folder} holds no checkpoint-* folders. Train with save_strategy 'steps', "
            "save_steps and save_total_limit, or leave the option off."
        )
    return prompts_to_judge(run, run.checkpoint_prompts).select_columns("prompt")


def read_prefixes(run: EvaluateArguments, prompts: list) -> dict[str, str]:
    """Name → the text to put before a model's prompts (the paper's prompted GPT-3)."""
    files = name_and_path(run.prefixes, "prefixes")
    known = name_and_path(run.other_models, "other_models")
    for name, file in files.items():
        if name not in known:
            others = ", ".join(known) or "-"
            raise ValueError(f"prefixes: no model of --other_models is called {name!r}, only {others}.")
        if not Path(file).is_file():
            raise ValueError(f"prefixes: {file!r} of {name!r} is not a file. Give a text file to put before prompts.")
    if files and not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("prefixes need prompts of plain text; these are messages. Put the text into the messages.")
    return {name: Path(file).read_text(encoding="utf-8") for name, file in files.items()}


def _rankings(path: Path) -> Any:
    """The ranked rows of a file; None if it is not there or waits for people."""
    rows = load_split(path) if path.exists() else None
    return rows if rows is not None and "ranks" in rows.features else None


def _training_rankings(run: EvaluateArguments) -> Any:
    """The run's training rankings if its reward model learned them, as they are; None if it did not, or not surely."""
    rankings, folder = run.run / "rankings", Path(run.reward_path)
    made = finished_summary(folder) or {}
    settings, digest = made.get("settings", {}), made.get("inputs", {}).get("dataset_name")
    named = Path(settings.get("dataset_name") or rankings)
    others = (
        folder.resolve() != (run.run / "reward_model").resolve()
        or named.resolve() != rankings.resolve()
        or settings.get("shuffle_ranks", False)
        or settings.get("dataset_train_split", "train") != "train"
        or (digest is not None and digest != fingerprint(named, folder))
    )
    return None if others else _rankings(rankings / "train.jsonl")


def reward_model_figures(scorer: Any, folder: Path, rankings: Any, training: Any = None) -> dict[str, Any]:
    """How often the reward model orders held-out answers as the labeler does, and more: `reward_metrics`.

    A reward model has one accuracy: the figures are those of its own page in `folder`, if that is of these rankings.
    Otherwise the rankings are scored here. `training`: the rankings that it was trained on, for the bag of words.
    """
    page = folder / "evaluation" / "metrics.json"
    known = read_json(page) if page.is_file() else {}
    if known.get("rankings") == rows_digest(rankings):
        return known
    records = score_rankings(scorer, rankings)
    if (tokenizer := getattr(scorer, "processing_class", None)) is not None:
        held_out, _ = prepare_ranking_dataset(rankings, tokenizer)
        for record, row in zip(records, held_out, strict=True):
            record["lengths"] = answer_lengths(row)
        rows = [] if training is None else prepare_ranking_dataset(training, tokenizer)[0]
        if (bag := bag_of_words(training_texts(rows, tokenizer))) is not None:
            add_bag_of_words(records, bag, text_rankings(held_out, tokenizer))
    return reward_metrics(records)


def score_rankings(scorer: Any, rankings: Any) -> list[dict[str, Any]]:
    """The records of `RankingRewardTrainer.evaluation_records`, as far as a scorer and `ranks` give them."""
    records = []
    for row in rankings:
        ranks = row["ranks"]
        kwargs = {"truncated": row["truncated"]} if "truncated" in row else {}
        scores = scorer([row["prompt"]] * len(ranks), row["completions"], **kwargs)
        pairs = [[i, j] for i, first in enumerate(ranks) for j, second in enumerate(ranks) if first < second]
        records.append({"rewards": scores, "pairs": pairs, "ranks": ranks, "prompt_key": prompt_key(row["prompt"])})
    return records


def other_logs(entries: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Name → PPO log of each of `other_runs`."""
    logs = {name: training_log(Path(path)) for name, path in name_and_path(entries, "other_runs").items()}
    if PPO in logs:
        raise ValueError(f"other_runs: the name {PPO!r} is this run's; give the other one another name.")
    for entry, log in zip(entries, logs.values(), strict=True):
        if not log:
            path = entry.partition("=")[2]
            raise ValueError(f"other_runs: {path!r} holds no PPO log (trainer_state.json). Give a ppo_ptx folder.")
    return logs


def training_log(stage: Path) -> list[dict[str, Any]]:
    """The PPO log, one row per iteration, with the labeler's score under `labeler_score`."""
    state = stage / "trainer_state.json"
    history = read_json(state)["log_history"] if state.exists() else []
    return [
        {**row, "labeler_score": row.get("rewards/labeler/mean")} for row in history if "score" in row and "kl" in row
    ]
