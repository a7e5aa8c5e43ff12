"""Training a reward model for a recipe: on all rankings, or once for each group of labelers left out."""

from __future__ import annotations

import copy
import gc
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from instruct_trl.pipeline.held_out import overlap, rows_digest
from instruct_trl.pipeline.run import quiet_progress
from instruct_trl.pipeline.stage import write_json

STAND_IN = (
    "The labeler is a program that stands in for people: a sentiment classifier, which the reward model never sees."
)


def reward_trainer(model: Any, args: Any, model_args: Any, train: Any, test: Any) -> Any:
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


def labelers_left_out(model: Any, args: Any, model_args: Any, train: Any, n_folds: int) -> dict[str, Any]:
    """Accuracy on labelers seen in training and on labelers left out, over `n_folds` (section 4.1 of the paper).

    Each fold trains a reward model of its own under `<output_dir>/folds`, which is removed afterwards.
    """
    from instruct_trl.evaluation.labeler_folds import cross_validate_labelers

    folder = Path(args.output_dir, "folds")

    def train_and_evaluate(rankings: Any, held: dict[str, Any]) -> dict[str, Sequence[Mapping[str, Any]]]:
        settings = copy.deepcopy(args)
        settings.output_dir, settings.save_strategy, settings.push_to_hub = str(folder), "no", False
        trainer = reward_trainer(model, settings, model_args, rankings, held)
        trainer.train()
        records: dict[str, Sequence[Mapping[str, Any]]] = {}
        for name in held:
            trainer.evaluate(trainer.eval_dataset[name], metric_key_prefix=f"eval_{name}")
            records[name] = trainer.evaluation_records
        trainer.accelerator.free_memory()
        del trainer
        gc.collect()
        return records

    result = cross_validate_labelers(train, train_and_evaluate, n_folds, seed=args.seed)
    shutil.rmtree(folder, ignore_errors=True)
    return result


def write_page(
    trainer: Any, folder: str, demo: bool, folds: dict[str, Any] | None, train: Any = None, test: Any = None
) -> None:
    """`<folder>/evaluation/report.html` from the trainer's last evaluation, and a line that says where it is.

    With `train` and `test` the page says how many rows of `test` have a prompt that is trained on.
    """
    from instruct_trl.report.pages import METRICS_JSON, write_reward_report

    if not trainer.accelerator.is_main_process:
        return
    pages = Path(folder, "evaluation")
    repeated = overlap(train, test)
    try:
        metrics = write_reward_report(
            trainer.evaluation_records,
            pages,
            title=f"Reward model on {'the test split' if repeated else 'held-out rankings'}",
            notes=[STAND_IN] if demo else [],
            labeler_folds=folds,
            trained_on=(repeated, len(test)) if repeated else None,
        )
    except ImportError as error:
        print(f"No page on the evaluation was written. {error}")
    else:
        if test is not None:  # the evaluation of the run takes the figures from here, where its rankings are these
            write_json(pages / METRICS_JSON, {**metrics, "rankings": rows_digest(test)})
        print(f"   The evaluation in pictures: {pages / 'report.html'}")
