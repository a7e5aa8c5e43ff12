"""Questions of every trainer before it trains: is there a step to take, are there rows, is the chosen metric logged?"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

IGNORED = -100


def check_run(trainer: Any, rows_needed: int, takes: str, metrics_without_set: Collection[str] = ()) -> None:
    """Refuse a run that would train nothing, or that would look for a metric that is not logged.

    Where the number of rows is known only by reading them, training that took no step ends in an error.

    Args:
        rows_needed: rows of the train dataset below which no step is taken.
        takes: says so, e.g. "one rollout takes 8 prompts (generation_batch_size=8)".
        metrics_without_set: names that are logged without the name of an evaluation set.

    Raises:
        ValueError: a schedule of 0 steps, too few rows, a `metric_for_best_model` of no evaluation set.
    """
    if trainer.train_dataset is not None:
        _check_schedule(trainer.args)
        _check_rows(trainer.train_dataset, rows_needed, takes)
    check_best_metric(trainer.args, trainer.eval_dataset, metrics_without_set)
    trainer.add_callback(RefuseIdleRun(takes))


def check_training_numbers(args: Any) -> None:
    """Refuse numbers of a TrainingArguments under which no step is taken, or one that says nothing.

    Raises:
        ValueError: naming the setting, its value, and what it must be.
    """
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        _require(
            name, getattr(args, name), "a whole number, at least 1", lambda number: number >= 1 and number % 1 == 0
        )
    _require("max_grad_norm", args.max_grad_norm, "a number, at least 0", lambda n: n >= 0)  # infinity clips nothing
    for name in ("learning_rate", "weight_decay"):
        _require(name, getattr(args, name), "a number, at least 0", lambda number: 0 <= number < math.inf)


def _require(name: str, value: Any, what: str, holds: Callable[[float], bool]) -> None:
    if value is None:
        return
    try:
        number = float(value)  # a YAML may say 1e-4, which is a text to YAML
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not holds(number):
        raise ValueError(f"{name} is {value!r}; it must be {what}.")


def check_not_empty(**datasets: Any) -> None:
    """Refuse datasets without a row, before upstream looks at the first; those of a mapping, too.

    Raises:
        ValueError: naming the dataset.
    """
    for name, dataset in datasets.items():
        if isinstance(dataset, Mapping):
            check_not_empty(**{f"{name}[{key}]": part for key, part in dataset.items()})
        elif isinstance(dataset, Dataset) and len(dataset) == 0:
            raise ValueError(f"{name} has no rows. Give some, or look for the filter that dropped all of them.")


def check_something_to_learn(dataset: Any) -> None:
    """Refuse tokenised demonstrations of which no token counts in the loss.

    Raises:
        ValueError: every label is ignored.
    """
    if not isinstance(dataset, Dataset) or "labels" not in dataset.column_names:
        return
    if not any(label != IGNORED for row in dataset.select_columns("labels") for label in row["labels"]):
        raise ValueError(
            f"The train dataset has {len(dataset)} rows left, and no token of them counts in the loss: cut at "
            "max_length, they hold prompts alone. Raise max_length, or shorten the prompts."
        )


def rows_of_a_step(args: Any) -> int:
    """Rows below which a Trainer's data loader has no batch for some process; a smaller last batch is trained on."""
    batch, processes, accelerate = args.train_batch_size, args.world_size, args.accelerator_config
    if args.dataloader_drop_last:
        return batch if accelerate.split_batches else batch * processes
    return 1 if accelerate.even_batches else batch * (processes - 1) + 1


def say_rows_of_a_step(args: Any) -> str:
    """The reason for `rows_of_a_step`, for an error."""
    return (
        f"one step takes {rows_of_a_step(args)} (per_device_train_batch_size={args.per_device_train_batch_size}, "
        f"processes: {args.world_size}, dataloader_drop_last={args.dataloader_drop_last})"
    )


def _check_schedule(args: Any) -> None:
    if args.max_steps <= 0 and not args.num_train_epochs > 0:
        raise ValueError(
            f"num_train_epochs={args.num_train_epochs} with max_steps={args.max_steps} is a schedule of 0 steps: "
            "nothing would be trained. Set num_train_epochs above 0, or max_steps to at least 1."
        )


def _check_rows(dataset: Any, needed: int, takes: str) -> None:
    if isinstance(dataset, Dataset) and len(dataset) < needed:
        raise ValueError(
            f"The train dataset has {len(dataset)} rows left after every filter, but {takes}: nothing would be "
            "trained. Give more rows, raise the limits by which rows were dropped, or lower the batch."
        )


class RefuseIdleRun(TrainerCallback):
    """Raises where training ends without a step, as upstream's does with a line in the log for a stream without rows.

    Args:
        takes: what one step takes, for the error.
    """

    def __init__(self, takes: str):
        self.takes = takes
        self._stepped = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stepped = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stepped = True  # whatever becomes of it: a guard may skip it, or stop the run

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._stepped and state.global_step == 0:
            raise ValueError(
                f"Training ended at step 0 of {state.max_steps}: the train dataset gave no whole batch, but "
                f"{self.takes}. Nothing was trained. Give more rows, or lower the batch."
            )


# The metric by which checkpoints are chosen ---------------------------------------------------------------------------


def metric_and_set(metric: str, eval_dataset: Any) -> tuple[str, str | None]:
    """`eval_far_loss` as ("loss", "far"); the set is None where `metric` begins with the name of none."""
    name = metric.removeprefix("eval_")
    sets = sorted(eval_dataset, key=len, reverse=True) if isinstance(eval_dataset, Mapping) else []
    found = next((each for each in sets if name.startswith(f"{each}_")), None)
    return (name, None) if found is None else (name.removeprefix(f"{found}_"), found)


def check_best_metric(args: Any, eval_dataset: Any, without_set: Collection[str] = ()) -> None:
    """Refuse a `metric_for_best_model` without the name of one of several evaluation sets.

    Raises:
        ValueError: naming the metrics that are logged.
    """
    chosen = args.metric_for_best_model
    if chosen is None or args.eval_strategy == IntervalStrategy.NO or not isinstance(eval_dataset, Mapping):
        return
    metric, found = metric_and_set(chosen, eval_dataset)
    if found is None and metric not in without_set:
        names = ", ".join(repr(f"{name}_{metric}") for name in eval_dataset)
        raise ValueError(
            f"metric_for_best_model={chosen!r} names none of the sets of eval_dataset ({', '.join(eval_dataset)}), and "
            f"each logs its own. Set it to one of {names}."
        )


class NamedEvalSets:
    """Mixin before a TRL trainer: what it logs of one of several evaluation sets bears the set's name.

    TRL's own metrics (not the loss) would overwrite each other as `eval_<metric>`; here they are `eval_<set>_<metric>`.
    """

    _metrics: Any  # of the TRL trainer: mode → name → values

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)  # type: ignore[misc]
        if metric_key_prefix.startswith("eval_"):
            metrics, name = self._metrics["eval"], metric_key_prefix.removeprefix("eval_")
            named = {f"{name}_{metric}": values for metric, values in metrics.items()}
            metrics.clear()
            metrics.update(named)
        return output
