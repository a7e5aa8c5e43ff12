"""Training a reward model for a recipe: on all rankings, without a group of labelers, or on a share of the prompts."""

from __future__ import annotations

import copy
import gc
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState

from instruct_trl.data.ranking import ranking_keys, shuffle_ranks
from instruct_trl.data.rows import read_json
from instruct_trl.evaluation.learning_curve import check_fractions, learning_curve, nested_subsets
from instruct_trl.evaluation.reward_metrics import pair_accuracy, reward_metrics
from instruct_trl.pipeline.arguments import RunArguments, setting, settings_of
from instruct_trl.pipeline.rows import overlap, rankings_of, rows_digest, train_and_test
from instruct_trl.pipeline.stage import finished_with, run_stage, write_json
from instruct_trl.pipeline.training import quiet_progress

if TYPE_CHECKING:
    from trl import ModelConfig

    from instruct_trl import RankingRewardConfig, RankingRewardTrainer

CURVE = "learning_curve"  # a folder of the reward model's, with one for each share of the prompts
RECORDS = "records.json"  # an evaluation's records, from which a page can be drawn again


@dataclass
class RewardArguments(RunArguments):
    """Data of `recipes/reward_model.py`; without a dataset_name the rankings in <run_dir>/rankings."""

    demonstrations_name: str | None = setting(
        None, "`prompt`, `completion` rows whose average score is set to 0 (the reward bias)."
    )
    labeler_folds: int | None = setting(
        None, "Also train on all but one group of labelers, for this many groups (paper: 5)."
    )
    labeler_description: str | None = setting(None, "Who ranked, for the report.")
    learning_curve: list[float] = setting(
        [],
        "Also train on these shares of the training prompts, such as 0.25 0.5 1.0, to see what more labels would "
        "bring. The whole is always among them: it is the reward model itself, which may be finished already. Not with "
        "shuffle_ranks.",
    )
    shuffle_ranks: bool = setting(
        False,
        "Shuffle the ranks within each prompt before training: a control, which learns nothing of the feedback. "
        "Held-out rankings stay as they are.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fractions(self.learning_curve)

    @property
    def title(self) -> str:
        """The stage's name."""
        return f"Reward model{' on shuffled ranks' * self.shuffle_ranks}"

    @property
    def notes(self) -> list[str]:
        """For the page: who ranked, and whether a control was trained."""
        labeler = [f"The labeler: {self.labeler_description}."] if self.labeler_description else []
        return labeler + ["For training, the ranks were shuffled: this model is a control."] * self.shuffle_ranks


def rankings_to_learn(run: RewardArguments, seed: int) -> tuple[Any, Any]:
    """(train, test) of the run's rankings; test is None if nothing is held out. A control trains on shuffled ranks."""
    train, test = train_and_test(run, rankings_of(run))
    return (shuffle_ranks(train, seed, "the train dataset") if run.shuffle_ranks else train), test


def reward_trainer(
    model: str, args: RankingRewardConfig, model_args: ModelConfig, train: Any, test: Any
) -> RankingRewardTrainer:
    """The trainer of `recipes/reward_model.py`, with its progress bar."""
    from trl import get_peft_config, get_quantization_config

    from instruct_trl import RankingRewardTrainer

    trainer = RankingRewardTrainer(
        model,
        args,
        train_dataset=train,
        eval_dataset=test,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    quiet_progress(trainer, ["loss", "pair_accuracy", "eval_pair_accuracy"])
    return trainer


def labelers_left_out(
    model: str, args: RankingRewardConfig, model_args: ModelConfig, train: Any, n_folds: int | None
) -> dict[str, Any] | None:
    """Accuracy on labelers seen in training and on labelers left out, over `n_folds` (section 4.1 of the paper).

    Each fold trains a reward model of its own under `<output_dir>/folds`, which is removed afterwards.
    """
    from instruct_trl.evaluation.labeler_folds import cross_validate_labelers

    if not n_folds:
        return None
    folder = Path(str(args.output_dir), "folds")

    def train_and_evaluate(rankings: Any, held: dict[str, Any]) -> dict[str, Sequence[Mapping[str, Any]]]:
        return records_of(model, args, model_args, rankings, held, folder)

    return cross_validate_labelers(train, train_and_evaluate, n_folds, seed=args.seed)


def records_of(
    model: str, args: RankingRewardConfig, model_args: ModelConfig, train: Any, held: dict[str, Any], folder: Path
) -> dict[str, Sequence[Mapping[str, Any]]]:
    """Train a reward model that is not kept, and return its `evaluation_records` of each of the `held` sets.

    `folder` is removed afterwards.
    """
    settings = copy.deepcopy(args)
    settings.output_dir, settings.push_to_hub, settings.resume_from_checkpoint = str(folder), False, None
    if not settings.load_best_model_at_end:
        settings.save_strategy = settings.eval_strategy = "no"
    only = next(iter(held)) if len(held) == 1 else None  # bare: the best checkpoint is chosen by "eval_loss"
    trainer = reward_trainer(model, settings, model_args, train, held[only] if only else held)
    trainer.train()
    records: dict[str, Sequence[Mapping[str, Any]]] = {}
    tokenized: Any = {only: trainer.eval_dataset} if only else trainer.eval_dataset
    for name in held:
        trainer.evaluate(tokenized[name], metric_key_prefix=f"eval_{name}")
        records[name] = trainer.evaluation_records
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()
    del trainer
    gc.collect()
    shutil.rmtree(folder, ignore_errors=True)
    return records


def subsets_of(run: RewardArguments, args: RankingRewardConfig, train: Any, test: Any) -> dict[float, list[int]]:
    """The rows of each share of `--learning_curve` but the whole; {} without the option.

    Raises:
        ValueError: nothing is held out, or whatever `nested_subsets` raises.
    """
    if not run.learning_curve or run.shuffle_ranks:
        return {}
    if test is None:
        raise ValueError("--learning_curve needs held-out rankings to measure accuracy on: a test split.")
    subsets = nested_subsets(ranking_keys(train), sorted({*run.learning_curve, 1.0}), args.seed)
    return {fraction: rows for fraction, rows in subsets.items() if fraction < 1}


def train_on_shares(
    model: str, run: RewardArguments, args: RankingRewardConfig, model_args: ModelConfig, train: Any, test: Any
) -> None:
    """Train on shares of the prompts and draw the learning curve of the finished reward model in `args.output_dir`.

    Each share is a stage of its own in `<output_dir>/learning_curve`, which keeps its records: what is finished is not
    trained again, and shares of earlier calls with the same settings are in the curve, too.

    Args:
        args: as they were before the reward model was trained, which changes them.
    """
    keys, home = ranking_keys(train), Path(str(args.output_dir), CURVE)
    page = Path(str(args.output_dir), "evaluation", RECORDS)
    if not page.exists():
        raise ValueError(
            f"--learning_curve: {page} is missing, with which the reward model in {args.output_dir} was evaluated. "
            "Train it anew: name another --output_dir."
        )
    common = settings_of(run, args, model_args)
    for fraction, rows in subsets_of(run, args, train, test).items():
        folder = home / f"{fraction:g}"

        def body(_: Any, rows: list[int] = rows, folder: Path = folder) -> dict:
            held = {"test": test}
            records = records_of(model, args, model_args, train.select(rows), held, folder / "model")["test"]
            if PartialState().is_main_process:
                write_json(folder / RECORDS, records)
            count = len({keys[row] for row in rows})
            return {"prompts": count, "pair_accuracy": pair_accuracy(records).mean}

        settings = common | {"fraction": fraction}
        run_stage(folder, f"Reward model on {fraction:g} of the prompts", settings, body, resume=False)
    if PartialState().is_main_process:
        prompts, records = {1.0: len(set(keys))}, {1.0: read_json(page)["records"]}
        for folder in (path.parent for path in home.glob(f"*/{RECORDS}")):
            fraction = float(folder.name)
            if (made := finished_with(folder, common | {"fraction": fraction})) is not None:
                prompts[fraction], records[fraction] = made["summary"]["prompts"], read_json(folder / RECORDS)
        curve = learning_curve(prompts, records)
        write_json(home / "curve.json", curve)
        draw_page(page.parent, curve)


def write_page(
    trainer: RankingRewardTrainer, folder: str, notes: list[str], folds: dict[str, Any] | None, train: Any, test: Any
) -> None:
    """`<folder>/evaluation/report.html` from the trainer's last evaluation, and lines that say what it found.

    The page says how many rows of `test` have a prompt that is trained on.
    """
    if not trainer.accelerator.is_main_process:
        return
    pages, repeated = Path(folder, "evaluation"), overlap(train, test)
    pages.mkdir(parents=True, exist_ok=True)
    page = {
        "title": f"Reward model on {'the test split' if repeated else 'held-out rankings'}",
        "notes": notes,
        "labeler_folds": folds,
        "trained_on": (repeated, len(test)) if repeated else None,
    }
    # One model, one accuracy: the run's evaluation takes the figures from here if it has the same rankings.
    write_json(pages / RECORDS, {"records": trainer.evaluation_records, "page": page, "rankings": rows_digest(test)})
    draw_page(pages)


def draw_page(pages: Path, curve: dict[str, Any] | None = None) -> None:
    """Draw the page from the records in the folder `pages`, with the learning curve if there is one, and say it."""
    from instruct_trl.report import findings, findings_reward
    from instruct_trl.report.pages import METRICS_JSON, write_reward_report

    kept = read_json(pages / RECORDS)
    records, page = kept["records"], kept["page"]
    try:
        metrics = write_reward_report(records, pages, **page, learning_curve=curve)
    except ImportError as error:  # without matplotlib the model itself is as good
        print(f"No page on the evaluation was written. {error}")
        seen = page["trained_on"]
        metrics = {**reward_metrics(records), "trained_on": seen and {"rows": seen[0], "of": seen[1]}}
    else:
        write_json(pages / METRICS_JSON, {**metrics, "rankings": kept["rankings"]})
        print(f"   The evaluation in pictures: {pages / 'report.html'}")
    if curve is None:
        print(findings.floor_text(metrics))
    said = findings_reward.headline(metrics)[1] if curve is None else findings_reward.twice(curve)
    print(f"   {said}".replace(findings.NBSP, " "), flush=True)
