"""Training a reward model for a recipe: on all rankings, or once for each group of labelers left out."""

from __future__ import annotations

import copy
import gc
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instruct_trl.pipeline.arguments import RunArguments, setting
from instruct_trl.pipeline.rows import overlap, rows_digest
from instruct_trl.pipeline.stage import write_json
from instruct_trl.pipeline.training import quiet_progress

if TYPE_CHECKING:
    from trl import ModelConfig

    from instruct_trl import RankingRewardConfig, RankingRewardTrainer


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
    shuffle_ranks: bool = setting(
        False,
        "Shuffle the ranks within each prompt before training: a control, which learns nothing of the feedback. "
        "Held-out rankings stay as they are.",
    )

    @property
    def labeler_in_words(self) -> str | None:
        """Who ranked, for the page, which also says if a control was trained."""
        if not self.shuffle_ranks:
            return self.labeler_description
        return f"{self.labeler_description or 'not described'}; for training, the ranks were shuffled, as a control"


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
    model: str, args: RankingRewardConfig, model_args: ModelConfig, train: Any, n_folds: int
) -> dict[str, Any]:
    """Accuracy on labelers seen in training and on labelers left out, over `n_folds` (section 4.1 of the paper).

    Each fold trains a reward model of its own under `<output_dir>/folds`, which is removed afterwards.
    """
    from instruct_trl.evaluation.labeler_folds import cross_validate_labelers

    folder = Path(str(args.output_dir), "folds")

    def train_and_evaluate(rankings: Any, held: dict[str, Any]) -> dict[str, Sequence[Mapping[str, Any]]]:
        settings = copy.deepcopy(args)
        settings.output_dir, settings.save_strategy, settings.push_to_hub = str(folder), "no", False
        trainer = reward_trainer(model, settings, model_args, rankings, held)
        trainer.train()
        records: dict[str, Sequence[Mapping[str, Any]]] = {}
        tokenized: Any = trainer.eval_dataset
        for name in held:
            trainer.evaluate(tokenized[name], metric_key_prefix=f"eval_{name}")
            records[name] = trainer.evaluation_records
        trainer.accelerator.free_memory()
        del trainer
        gc.collect()
        return records

    result = cross_validate_labelers(train, train_and_evaluate, n_folds, seed=args.seed)
    shutil.rmtree(folder, ignore_errors=True)
    return result


def write_page(
    trainer: RankingRewardTrainer, folder: str, labeler: str | None, folds: dict[str, Any] | None, train: Any, test: Any
) -> None:
    """`<folder>/evaluation/report.html` from the trainer's last evaluation, and a line that says where it is.

    The page says how many rows of `test` have a prompt that is trained on.
    """
    from instruct_trl.report.pages import METRICS_JSON, write_reward_report

    if not trainer.accelerator.is_main_process:
        return
    pages, repeated = Path(folder, "evaluation"), overlap(train, test)
    try:
        metrics = write_reward_report(
            trainer.evaluation_records,
            pages,
            title=f"Reward model on {'the test split' if repeated else 'held-out rankings'}",
            notes=[f"The labeler: {labeler}."] if labeler else [],
            labeler_folds=folds,
            trained_on=(repeated, len(test)) if repeated else None,
        )
    except ImportError as error:  # without matplotlib the model itself is as good
        print(f"No page on the evaluation was written. {error}")
    else:
        # The run's evaluation takes the figures from here if it has the same rankings: one model, one accuracy.
        write_json(pages / METRICS_JSON, {**metrics, "rankings": rows_digest(test)})
        print(f"   The evaluation in pictures: {pages / 'report.html'}")
