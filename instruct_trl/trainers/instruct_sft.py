"""Step 1: fine-tuning on demonstrations, the checkpoint chosen by the reward model, and the start of RL."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

from accelerate.utils import gather_object
from datasets import Dataset
from transformers.trainer_utils import IntervalStrategy
from trl import SFTConfig, SFTTrainer

from instruct_trl._upstream import apply_cpu_defaults, without_init_kwargs
from instruct_trl.data.encoding import drop_own_bos, prompt_keys, require_eos
from instruct_trl.data.pretraining import check_pretraining_mix, mix_pretraining, tokenize_pretraining
from instruct_trl.data.rows import check_sft_dataset, checked_formatting, refusals_named
from instruct_trl.evaluation.estimates import standard_error
from instruct_trl.evaluation.selection import as_prompts, as_scorer, score_answers
from instruct_trl.models import model_files
from instruct_trl.models.adapters import has_adapters, save_token_rows
from instruct_trl.models.context import check_answer_room
from instruct_trl.models.dropout import decoder_layers, residual_dropout
from instruct_trl.models.generation import generate_completions
from instruct_trl.models.loading import check_causal, check_token_rows
from instruct_trl.models.precision import one_dtype
from instruct_trl.models.reward import check_scorer_room
from instruct_trl.trainers import setting, starting_model
from instruct_trl.trainers.run_checks import (
    NamedEvalSets,
    check_not_empty,
    check_steps,
    check_training_numbers,
    require,
)

logger = logging.getLogger(__name__)

RM_SCORE = "eval_rm_score"


@dataclass
class InstructSFTConfig(SFTConfig):
    """`trl.SFTConfig` with the paper's SFT schedule (appendix C.1) and selection by RM score.

    All fields of `trl.SFTConfig` are there. The batch of 32 rows is 8 rows per device × 4 accumulation steps on
    one device. On several devices, divide the accumulation by their number.

    Raises:
        ValueError: a rate, fraction or length of ours out of its range.
    """

    num_train_epochs: float = setting(
        16, "Passes over the demonstrations. Paper: 16, and 2 for the model that RL starts from."
    )
    learning_rate: float = setting(9.65e-6, "Peak learning rate. Paper: 9.65e-6 for 1.3B and 6B, 5.03e-6 for 175B.")
    per_device_train_batch_size: int = setting(
        8, "Rows per device and forward pass. Paper: 32 rows per optimizer step, here 8 x 4."
    )
    gradient_accumulation_steps: int = setting(
        4, "Forward passes per optimizer step. Paper: 32 rows per step, here 8 x 4."
    )
    lr_scheduler_type: str = setting("cosine_with_min_lr", "Paper: cosine down to a tenth of the peak.")
    lr_scheduler_kwargs: dict[str, Any] | str | None = setting(
        None, 'Settings of the scheduler. The default for cosine_with_min_lr is {"min_lr_rate": 0.1}. Paper: 0.1.'
    )
    warmup_steps: float = setting(0, "Paper: no warm-up.")
    adam_beta1: float = setting(0.9, "Paper: 0.9.")
    adam_beta2: float = setting(0.95, "Paper: 0.95.")
    max_length: int | None = setting(2048, "Longest row, in tokens. Longer rows are cut and counted. Paper: 2k tokens.")
    save_strategy: str = setting("epoch", "When to save. Each checkpoint is a candidate for the selection.")
    eval_strategy: str = setting(
        "epoch", "When to evaluate. It must match save_strategy, so that each checkpoint has a score."
    )
    save_total_limit: int | None = setting(
        None, "Checkpoints to keep. None keeps all, so that select_checkpoint can compare them afterwards."
    )
    residual_dropout: float | None = setting(
        0.2,
        "Dropout on what attention and MLP add to the residual stream, on any decoder. Paper: 0.2. 0 switches it off; "
        "null keeps what the model's own config says.",
    )
    pretraining_fraction: float = setting(
        0.0, "Share of pretraining text among the examples. Paper: 0 for SFT, 0.1 before RL."
    )
    selection_max_new_tokens: int = setting(256, "Longest answer to a selection prompt, in tokens. Paper: 1024.")
    selection_temperature: float = setting(
        1.0, "Sampling temperature of the answers to the selection prompts; 0 is greedy. Paper: 1."
    )
    selection_batch_size: int = setting(8, "Answers to generate at once.")
    selection_seed: int = setting(
        0, "Seed of the sampled answers. It is the same at every evaluation, so that epochs can be compared."
    )

    def __post_init__(self) -> None:
        apply_cpu_defaults(self)
        check_training_numbers(self)
        require(self, ["residual_dropout"], "in [0, 1), as the paper's 0.2", lambda number: 0 <= number < 1)
        must = partial(require, self, optional=False)
        must(["pretraining_fraction"], "in [0, 1), as the paper's 0.1 before RL", lambda number: 0 <= number < 1)
        must(["selection_max_new_tokens", "selection_batch_size"], "at least 1", lambda number: number >= 1)
        must(["selection_temperature"], "0 (greedy) or more", lambda number: number >= 0)
        if self.lr_scheduler_kwargs is None and self.lr_scheduler_type == "cosine_with_min_lr":
            self.lr_scheduler_kwargs = {"min_lr_rate": 0.1}
        # Upstream fills in "loss" below; the trainer puts the RM score there only if the user named nothing.
        self._metric_was_chosen = self.metric_for_best_model is not None
        super().__post_init__()
        self.model_init_kwargs = one_dtype(self.model_init_kwargs)


class InstructSFTTrainer(NamedEvalSets, SFTTrainer):
    """`trl.SFTTrainer` with residual dropout on any decoder, a pretraining mix, and selection by RM score.

    The arguments are those of `trl.SFTTrainer`, in its order, and three keywords of ours.

    Args:
        model: name or path of a causal language model, or one in memory. The folder of an adapter, or a PeftModel
            loaded with is_trainable=True, goes on training.
        reward_model: a path, a sequence classifier with one label, a `RewardScorer`, or any TRL reward function. With
            it, each evaluation answers `selection_prompts`, logs `eval_rm_score` and its standard error
            `eval_rm_score_se`, and the checkpoint with the highest score is loaded at the end, unless the config names
            another `metric_for_best_model` (appendix C.1: selection on the validation prompts).
        selection_prompts: a list of prompts, or a dataset with a `prompt` column; at least 2.
        pretraining_dataset: with a `text` or an `input_ids` column, for `pretraining_fraction` (appendix C.3).

    Raises:
        ValueError: before any training: see `check_model_path`, `check_pretraining_mix`, `as_prompts`,
            `decoder_layers`, `check_adapters`, `check_token_rows`; a tokenizer without EOS; one of `reward_model` and
            `selection_prompts` without the other, or without evaluation.
    """

    args: InstructSFTConfig
    model: Any

    _tag_names = ["trl", "sft", "instruct-trl"]
    _name = "InstructGPT SFT"

    def __init__(
        self,
        model: Any,
        args: InstructSFTConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_loss_func: Callable[..., Any] | None = None,
        compute_metrics: Callable[..., dict[str, float]] | None = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        formatting_func: Callable[[dict[str, Any]], str] | None = None,
        *,
        reward_model: Any = None,
        selection_prompts: Any = None,
        pretraining_dataset: Any = None,
    ):
        args = starting_model.as_config(args, InstructSFTConfig, model, "SFT")
        # Upstream fails in the middle of its own work, or hours later; so all that can be asked now is asked now.
        if isinstance(model, str) and (os.path.isdir(model) or not args.trust_remote_code):
            model_files.check_model_path(model, **starting_model.loading_kwargs(args))
            if not model_files.names_adapter(model):
                check_causal(model, **starting_model.loading_kwargs(args))
            if processing_class is None:
                model_files.check_tokenizer(model_files.tokenizer_source(model))
        check_not_empty(train_dataset=train_dataset, eval_dataset=eval_dataset)
        starting_model.settle_model_kwargs(args, has_adapters(model, peft_config))
        starting_model.check_adapters(model, peft_config, "The model")
        check_pretraining_mix(args.pretraining_fraction, pretraining_dataset, train_dataset, args.packing)
        given: Any = args.dataset_kwargs or {}
        if args.pretraining_fraction > 0 and given.get("skip_prepare_dataset"):
            raise ValueError("pretraining_fraction needs the dataset's preparation: remove skip_prepare_dataset.")
        if processing_class is not None and args.eos_token is None:
            require_eos(getattr(processing_class, "tokenizer", processing_class))
        self._selection_prompts = _selection_prompts(reward_model, selection_prompts, eval_dataset, args)
        self._scorer = None if reward_model is None else as_scorer(reward_model, batch_size=args.selection_batch_size)
        if eval_dataset is None and args.eval_strategy != IntervalStrategy.NO:
            logger.info("There is no eval_dataset: evaluation is off, whatever eval_strategy says.")
            args.eval_strategy, args.do_eval = IntervalStrategy.NO, False
        self._pretraining_dataset = pretraining_dataset
        start = starting_model.load_adapter_to_train(model, args, quantization_config)
        if start is not model:
            if processing_class is None:
                processing_class = model_files.load_tokenizer(model, trust_remote_code=args.trust_remote_code)
            quantization_config = None  # the base is quantised by now
        start = starting_model.train_in_float32(start, "The model", args, peft_config)
        with without_init_kwargs(args, start is not model):
            super().__init__(
                start, args, data_collator, train_dataset, eval_dataset, processing_class, compute_loss_func,
                compute_metrics, callbacks, optimizers, optimizer_cls_and_kwargs, preprocess_logits_for_metrics,
                quantization_config, peft_config, formatting_func,
            )  # fmt: skip
        self._settle_model()

    def _settle_model(self) -> None:
        """Ask and cast once upstream has loaded the model, added adapters and tokenised the rows."""
        check_token_rows(self.model, self._tokenizer, "The model")
        starting_model.settle_precision(self.model, self.args.bf16)
        starting_model.place_reward_models([self._scorer], self.accelerator.device)
        check_steps(self, metrics_without_set=(RM_SCORE.removeprefix("eval_"),))
        rows = self.train_dataset
        labels = rows["labels"] if isinstance(rows, Dataset) and "labels" in rows.column_names else None
        if labels is not None and all(label == -100 for row in labels for label in row):
            raise ValueError(
                f"The train dataset has {len(labels)} rows left, and no token of them counts in the loss: cut at "
                "max_length, they hold prompts alone. Raise max_length, or shorten the prompts."
            )
        room = (self._selection_prompts, self.args.selection_max_new_tokens, "selection_max_new_tokens")
        check_answer_room(self.model, self._tokenizer, "The model", *room)
        check_scorer_room(self._scorer, *room)
        if self.args.residual_dropout is not None:
            decoder_layers(self.model)  # an architecture that we cannot serve is refused here, not at the first step

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict=state_dict)
        if self.args.should_save and has_adapters(self.model):
            save_token_rows(self.model, str(output_dir or self.args.output_dir))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As upstream's, with residual dropout while it lasts."""
        # Hooks rather than a changed config: what is saved and sampled in between is the plain model.
        with residual_dropout(self.model, self.args.residual_dropout):
            return super().train(*args, **kwargs)

    # -- data ---------------------------------------------------------------------------------------------------------

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        """Upstream's preparation of checked rows, with what it cuts and drops counted; pretraining rows mixed in."""
        where = f"the {dataset_name} dataset"
        require_eos(self._tokenizer)
        if formatting_func is None:
            dataset = check_sft_dataset(dataset, self._tokenizer, self.chat_template, args.dataset_text_field, where)
        else:
            formatting_func = checked_formatting(formatting_func)
        dataset, formatting_func = _with_one_bos(dataset, formatting_func, self._tokenizer, args.dataset_text_field)
        prepare = super()._prepare_dataset
        with refusals_named(dataset, self._tokenizer, self.chat_template, where):
            whole = None
            if isinstance(dataset, Dataset) and not packing and args.max_length is not None:
                # Upstream cuts and drops without a word. To count, whole rows are tokenised first, in their own order;
                # on tokenised rows the second call does nothing but cut, drop and shuffle.
                whole_args = copy.copy(args)
                whole_args.max_length, whole_args.shuffle_dataset = None, False
                whole = prepare(dataset, processing_class, whole_args, packing, formatting_func, dataset_name)
                dataset, formatting_func = whole, None
            prepared = prepare(dataset, processing_class, args, packing, formatting_func, dataset_name)
            if whole is not None:
                _log_cut(dataset_name, whole, len(prepared), args.max_length)
        if dataset_name == "train" and getattr(args, "pretraining_fraction", 0) > 0:
            prepared = self._mix(prepared, processing_class, args)
        return prepared

    def _mix(self, demonstrations: Dataset, processing_class: Any, args: Any) -> Dataset:
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        whole = tokenize_pretraining(self._pretraining_dataset, tokenizer)
        # Upstream's method, not ours: these rows have no prompt to check and no BOS to drop.
        cut = super()._prepare_dataset(whole, processing_class, args, False, None, "pretraining")
        if args.max_length is not None:
            _log_cut("pretraining", whole, len(cut), args.max_length)
        mixed = mix_pretraining(demonstrations, cut, args.pretraining_fraction, args.seed)
        added = len(mixed) - len(demonstrations)
        logger.info(
            "Pretraining mix: %d of %d training examples (%.1f %%), from %d texts, beside %d demonstrations.",
            added, len(mixed), 100 * added / len(mixed), len(cut), len(demonstrations),
        )  # fmt: skip
        return mixed

    # -- selection ----------------------------------------------------------------------------------------------------

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Upstream's loop, then the mean RM score of one answer per selection prompt, and its standard error."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        # The score does not depend on the evaluation set: of several sets the first carries it.
        sets = self.eval_dataset
        scored = f"eval_{next(iter(sets))}" if isinstance(sets, dict) else "eval"
        if self._scorer is None or output.metrics is None or metric_key_prefix != scored:
            return output
        mine = self._selection_prompts[self.args.process_index :: self.args.world_size]
        scores: list[float] = []
        if mine:
            # One seed for every evaluation: epochs are compared under the same noise.
            answers = generate_completions(
                self.accelerator.unwrap_model(self.model), self._tokenizer, mine,
                max_new_tokens=self.args.selection_max_new_tokens, temperature=self.args.selection_temperature,
                batch_size=self.args.selection_batch_size, seed=self.args.selection_seed,
            )  # fmt: skip
            scores = score_answers(self._scorer, mine, answers)
        scores, asked = gather_object(scores), gather_object(prompt_keys(mine))
        # Put into the loop's output, it is logged, and compared for the best checkpoint, as any other metric.
        output.metrics.update({RM_SCORE: fmean(scores), f"{RM_SCORE}_se": standard_error(scores, asked)})
        return output


def _selection_prompts(reward_model: Any, prompts: Any, eval_dataset: Any, args: InstructSFTConfig) -> list[Any]:
    """The checked prompts; with a reward model, `args` are set so that the best checkpoint by its score is kept."""
    if reward_model is None:
        if prompts is not None:
            raise ValueError("selection_prompts were given without a reward_model to score the answers. Pass both.")
        return []
    if prompts is None:
        raise ValueError("reward_model was given without selection_prompts to answer. Pass both.")
    checked = as_prompts(prompts, "selection_prompts")
    if eval_dataset is None or args.eval_strategy == IntervalStrategy.NO:
        raise ValueError(
            "Selection by RM score happens at evaluation: pass an eval_dataset, and set eval_strategy to 'epoch' or "
            "'steps'. To select after training, use select_checkpoint."
        )
    if not args._metric_was_chosen:
        args.metric_for_best_model, args.greater_is_better = "rm_score", True
        # The best checkpoint can be loaded only if each one was evaluated when it was saved.
        matches = args.save_strategy == args.eval_strategy
        if matches and args.save_strategy == IntervalStrategy.STEPS:
            matches = (args.save_steps / (args.eval_steps or args.save_steps)).is_integer()
        args.load_best_model_at_end = args.load_best_model_at_end or matches
    return checked


def _with_one_bos(dataset: Any, formatting_func: Any, tokenizer: Any, text_field: str) -> tuple[Any, Any]:
    """Texts, or the function that makes them, without a BOS token of their own if the tokenizer adds one."""
    if tokenizer.bos_token is None:
        return dataset, formatting_func
    if formatting_func is not None:
        return dataset, lambda row: drop_own_bos(tokenizer, formatting_func(row))
    first: dict[str, Any] = next(iter(dataset), {})
    if "input_ids" in first or not any(isinstance(first.get(name), str) for name in (text_field, "prompt")):
        return dataset, None  # messages, or tokens

    def drop(row: dict[str, Any]) -> dict[str, Any]:
        texts = {name: row[name] for name in (text_field, "prompt") if isinstance(row.get(name), str)}
        return {name: drop_own_bos(tokenizer, text) for name, text in texts.items()}

    return dataset.map(drop), None


def _log_cut(name: str, whole: Dataset, kept: int, max_length: int) -> None:
    """One line on the rows that upstream cuts or drops without a word; none if it does neither."""
    too_long = sum(len(ids) > max_length for ids in whole["input_ids"])
    dropped = len(whole) - kept
    if too_long or dropped:
        logger.warning(
            "%s data: %d of %d rows are longer than max_length=%d tokens and were cut; %d were dropped since nothing "
            "to learn from was left.", name, too_long, len(whole), max_length, dropped,
        )  # fmt: skip
