"""Checks of every trainer before it trains: its numbers, its rows, what fits into a model, and the chosen metric."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

from datasets import Dataset, IterableDataset
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from instruct_trl.data.encoding import encode_prompt, same_tokens
from instruct_trl.models.context import check_rows_fit, context_length, refuse_no_room
from instruct_trl.models.reward import RewardScorer

LONG_ROWS = (
    "Set max_length={context}, by which longer rows are cut or dropped, and counted; or shorten the texts, or take a "
    "model with a longer context."
)
CHUNK = 1000  # prompts tokenised at once


# Numbers --------------------------------------------------------------------------------------------------------------


def check_training_numbers(args: Any) -> None:
    """Refuse TrainingArguments with which no step would be taken, or whose numbers make no sense."""
    sizes = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
    require(args, sizes, "a whole number, at least 1", lambda number: number >= 1 and number % 1 == 0)
    require(args, ["max_grad_norm"], "a number, at least 0", lambda number: number >= 0)  # infinity clips nothing
    rates = ("learning_rate", "weight_decay")
    require(args, rates, "a number, at least 0", lambda number: 0 <= number < math.inf)


def require(
    args: Any, names: Iterable[str], must_be: str, holds: Callable[[float], bool], optional: bool = True
) -> None:
    """Refuse settings of `args` that are not numbers or for which `holds` is false. None passes if `optional`."""
    for name in names:
        value = getattr(args, name)
        try:
            number = float(value)  # a YAML may say 1e-4, which is a text to YAML
        except (TypeError, ValueError):
            number = math.nan
        if (value is not None or not optional) and (isinstance(value, bool) or not holds(number)):
            raise ValueError(f"{name} is {value!r}; it must be {must_be}.")


# Rows and steps -------------------------------------------------------------------------------------------------------


def check_not_empty(**datasets: Any) -> None:
    """Refuse datasets without a row, before upstream looks at the first; those of a mapping, too."""
    for name, dataset in datasets.items():
        if isinstance(dataset, Mapping):
            check_not_empty(**{f"{name}[{key}]": part for key, part in dataset.items()})
        elif isinstance(dataset, Dataset) and len(dataset) == 0:
            raise ValueError(f"{name} has no rows. Give some, or look for the filter that dropped all of them.")


def check_steps(trainer: Any, metrics_without_set: Collection[str] = ()) -> None:
    """`check_run` for a trainer whose step takes tokenised rows; refuses rows that exceed the model's context, too."""
    args = trainer.args
    needed = rows_of_a_step(args)
    takes = (
        f"one step takes {needed} (per_device_train_batch_size={args.per_device_train_batch_size}, "
        f"processes: {args.world_size}, dataloader_drop_last={args.dataloader_drop_last})"
    )
    check_run(trainer, needed, takes, metrics_without_set)
    for name in ("train_dataset", "eval_dataset"):
        setattr(trainer, name, check_rows_fit(getattr(trainer, name), name, trainer.model, "the model", LONG_ROWS))


def check_run(trainer: Any, rows_needed: int, takes: str, metrics_without_set: Collection[str] = ()) -> None:
    """Refuse a schedule of 0 steps, too few rows, and a `metric_for_best_model` of no evaluation set.

    Args:
        rows_needed: rows of the train dataset below which no step is taken.
        takes: says so, e.g. "one rollout takes 8 prompts (generation_batch_size=8)".
        metrics_without_set: names that are logged without the name of an evaluation set.
    """
    args, dataset = trainer.args, trainer.train_dataset
    if dataset is not None and args.max_steps <= 0 and not args.num_train_epochs > 0:  # nan is not above 0
        raise ValueError(
            f"num_train_epochs={args.num_train_epochs} with max_steps={args.max_steps} is a schedule of 0 steps: "
            "nothing would be trained. Set num_train_epochs above 0, or max_steps to at least 1."
        )
    if isinstance(dataset, Dataset) and len(dataset) < rows_needed:
        raise ValueError(
            f"The train dataset has {len(dataset)} rows left after every filter, but {takes}: nothing would be "
            "trained. Give more rows, raise the limits by which rows were dropped, or lower the batch."
        )
    check_best_metric(args, trainer.eval_dataset, metrics_without_set)
    trainer.add_callback(RefuseIdleRun(takes))  # a stream shows how many rows it has only at its end


def rows_of_a_step(args: Any) -> int:
    """Rows below which a Trainer's data loader has no batch for some process; a smaller last batch is trained on."""
    batch, processes, accelerate = args.train_batch_size, args.world_size, args.accelerator_config
    if args.dataloader_drop_last:
        return batch if accelerate.split_batches else batch * processes
    return 1 if accelerate.even_batches else batch * (processes - 1) + 1


class RefuseIdleRun(TrainerCallback):
    """Raises if training ends without a step, and says what a step `takes`. Upstream only logs a line."""

    def __init__(self, takes: str):
        self.takes = takes
        self._stepped = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stepped = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stepped = True  # a guard may still skip the step, or stop the run: that is not an idle run

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._stepped and state.global_step == 0:
            raise ValueError(
                f"Training ended at step 0 of {state.max_steps}: the train dataset gave no whole batch, but "
                f"{self.takes}. Nothing was trained. Give more rows, or lower the batch."
            )


# Rollouts -------------------------------------------------------------------------------------------------------------


class _Reader(NamedTuple):
    """A model of the run, and the tokenizer by which it reads a prompt; None: it reads the policy's tokens."""

    role: str
    model: Any
    tokenizer: Any = None


def check_rollouts(trainer: Any, value_model: Any, ref_model: Any) -> None:
    """Refuse fewer prompts than a rollout takes, and prompts whose answers exceed the context of a model of the run."""
    args = trainer.args
    needed = args.generation_batch_size // args.num_generations
    sizes = f"generation_batch_size={args.generation_batch_size}, num_generations={args.num_generations}"
    check_run(trainer, needed, f"one rollout takes {needed} different prompts ({sizes})")
    if trainer._is_vlm or trainer.environment_factories is not None:  # images, and tools that differ by prompt
        return
    for reader in _readers(trainer, value_model, ref_model):
        for name in ("train_dataset", "eval_dataset"):
            setattr(trainer, name, _check_prompts(trainer, getattr(trainer, name), name, reader))


def _readers(trainer: Any, value_model: Any, ref_model: Any) -> list[_Reader]:
    """The models with a limit. Of those that read the policy's tokens, the tightest stands for all."""
    models = {"The policy": trainer.model, "The value model": value_model, "The reference model": ref_model}
    readers = [_Reader(role, model) for role, model in models.items() if model is not None]
    for scorer in trainer.reward_funcs:
        if isinstance(scorer, RewardScorer):
            own = scorer.processing_class
            alike = same_tokens(own, trainer._tokenizer)
            readers.append(_Reader("The reward model", scorer.model, None if alike else own))
    limited = sorted((r for r in readers if context_length(r.model)), key=lambda r: context_length(r.model) or 0)
    return [r for r in limited if r.tokenizer is None][:1] + [r for r in limited if r.tokenizer is not None]


def _lengths(trainer: Any, reader: _Reader, prompts: list[Any]) -> list[int]:
    if reader.tokenizer is None:
        # With the trainer's template, tools and template settings, as the policy is going to read them.
        return [len(ids) for ids in trainer._tokenize_prompts(prompts)[0]]
    return [len(encode_prompt(reader.tokenizer, prompt)) for prompt in prompts]


def _check_prompts(trainer: Any, dataset: Any, name: str, reader: _Reader) -> Any:
    """Check that the dataset fits `reader`, and return it; a stream is returned with a check added for each prompt."""
    if isinstance(dataset, Mapping):
        return {key: _check_prompts(trainer, part, f"{name}[{key}]", reader) for key, part in dataset.items()}
    args, context = trainer.args, context_length(reader.model) or 0

    def refuse(tokens: int, where: str) -> None:
        limit, remedy = context - args.max_completion_length, "choose a model with a longer context"
        if limit > 0:
            remedy = f"set max_prompt_length={limit}, by which longer prompts are dropped and counted, or {remedy}"
        where = f"{where}; max_prompt_length={args.max_prompt_length}"
        answer = args.max_completion_length, "max_completion_length"
        refuse_no_room(reader.model, reader.role, "a prompt", tokens, *answer, where=where, remedy=remedy)

    if isinstance(dataset, IterableDataset):

        def fits(row: Mapping[str, Any], index: int) -> bool:
            refuse(_lengths(trainer, reader, [row["prompt"]])[0], f"{name}, row {index}")
            return True

        return dataset.filter(fits, with_indices=True)
    # `max_prompt_length` counted prompts without tools and template settings, which may lengthen them.
    lengthened = any((trainer.tools, trainer.chat_template, trainer.chat_template_kwargs))
    counted = args.max_prompt_length is not None and reader.tokenizer is None and not lengthened
    if counted and args.max_prompt_length + args.max_completion_length <= context:
        return dataset
    if isinstance(dataset, Dataset) and len(dataset):
        chunks = (dataset[start : start + CHUNK]["prompt"] for start in range(0, len(dataset), CHUNK))
        tokens = [length for chunk in chunks for length in _lengths(trainer, reader, chunk)]
        refuse(max(tokens), f"{name}, row {tokens.index(max(tokens))}, the longest of {len(dataset)}")
    return dataset


# The metric by which checkpoints are chosen ---------------------------------------------------------------------------


def metric_and_set(metric: str, eval_dataset: Any) -> tuple[str, str | None]:
    """`eval_far_loss` as ("loss", "far"); the set is None if `metric` begins with the name of none."""
    name = metric.removeprefix("eval_")
    # The longest name first: sets may be called "a" and "a_b".
    sets = sorted(eval_dataset, key=len, reverse=True) if isinstance(eval_dataset, Mapping) else []
    found = next((each for each in sets if name.startswith(f"{each}_")), None)
    return (name, None) if found is None else (name.removeprefix(f"{found}_"), found)


def check_best_metric(args: Any, eval_dataset: Any, without_set: Collection[str] = ()) -> None:
    """Refuse a `metric_for_best_model` without the name of one of several evaluation sets."""
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
    """Mixin before a TRL trainer: metrics of one of several evaluation sets bear the set's name.

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
