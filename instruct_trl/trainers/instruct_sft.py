"""Step 1: fine-tuning on demonstrations, the checkpoint chosen by the reward model, and the start of RL."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable
from statistics import fmean
from typing import Any

from accelerate.utils import gather_object
from datasets import Dataset
from transformers.trainer_utils import IntervalStrategy
from trl import SFTConfig, SFTTrainer

from instruct_trl._upstream import match_adapters_to_precision, without_init_kwargs
from instruct_trl.data.demonstrations import check_sft_dataset, checked_formatting, refusals_named
from instruct_trl.data.endings import require_eos
from instruct_trl.data.mixing import check_pretraining_mix, mix_pretraining, tokenize_pretraining
from instruct_trl.data.pairs import drop_own_bos
from instruct_trl.data.prompt_keys import prompt_keys
from instruct_trl.evaluation.answer_room import check_answer_room, check_scorer_room
from instruct_trl.evaluation.estimates import standard_error
from instruct_trl.evaluation.selection import as_prompts, as_scorer, score_answers
from instruct_trl.models.adapters import save_token_rows
from instruct_trl.models.context import check_rows_fit
from instruct_trl.models.dropout import decoder_layers, residual_dropout
from instruct_trl.models.generation import generate_completions
from instruct_trl.models.loading import check_causal, check_token_rows, load_tokenizer
from instruct_trl.models.model_files import check_model_path, names_adapter, tokenizer_source
from instruct_trl.trainers.instruct_sft_config import InstructSFTConfig as InstructSFTConfig
from instruct_trl.trainers.run_checks import (
    NamedEvalSets,
    check_not_empty,
    check_run,
    check_something_to_learn,
    rows_of_a_step,
    say_rows_of_a_step,
)
from instruct_trl.trainers.starting_model import (
    check_adapters,
    keep_adapters_in_float32,
    load_adapter_to_train,
    loading_kwargs,
    place_reward_models,
    settle_model_kwargs,
    train_in_float32,
    trained_beside_a_base,
)

logger = logging.getLogger(__name__)

RM_SCORE = "eval_rm_score"
LONG_ROWS = (
    "Set max_length={context}, by which longer rows are cut and counted, shorten the texts, or take a model with a "
    "longer context."
)


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
        args: SFTConfig | None = None,
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
        args = _as_config(args, model)
        if isinstance(model, str) and (os.path.isdir(model) or not args.trust_remote_code):
            check_model_path(model, **loading_kwargs(args))
            if not names_adapter(model):
                check_causal(model, **loading_kwargs(args))
            if processing_class is None:
                tokenizer_source(model)  # refuses a folder without one
        check_not_empty(train_dataset=train_dataset, eval_dataset=eval_dataset)
        settle_model_kwargs(args, trained_beside_a_base(model, peft_config))
        check_adapters(model, peft_config, "The model")
        check_pretraining_mix(args.pretraining_fraction, pretraining_dataset, train_dataset, args.packing)
        skipped = isinstance(args.dataset_kwargs, dict) and args.dataset_kwargs.get("skip_prepare_dataset")
        if args.pretraining_fraction > 0 and skipped:
            raise ValueError("pretraining_fraction needs the dataset's preparation: remove skip_prepare_dataset.")
        if processing_class is not None and args.eos_token is None:
            require_eos(getattr(processing_class, "tokenizer", processing_class))
        self._selection_prompts = _selection_prompts(reward_model, selection_prompts, eval_dataset, args)
        self._scorer = None if reward_model is None else as_scorer(reward_model, batch_size=args.selection_batch_size)
        if eval_dataset is None and args.eval_strategy != IntervalStrategy.NO:
            logger.info("There is no eval_dataset: evaluation is off, whatever eval_strategy says.")
            args.eval_strategy, args.do_eval = IntervalStrategy.NO, False
        self._pretraining_dataset = pretraining_dataset
        start = load_adapter_to_train(model, args, quantization_config)
        if start is not model:
            processing_class = processing_class or load_tokenizer(model, trust_remote_code=args.trust_remote_code)
            quantization_config = None  # it is loaded so
        start = train_in_float32(start, "The model", args, peft_config)
        with without_init_kwargs(args, start is not model):
            super().__init__(
                start, args, data_collator, train_dataset, eval_dataset, processing_class, compute_loss_func,
                compute_metrics, callbacks, optimizers, optimizer_cls_and_kwargs, preprocess_logits_for_metrics,
                quantization_config, peft_config, formatting_func,
            )  # fmt: skip
        require_eos(self._tokenizer)
        self._settle_models()
        self._check_fit()
        if self.args.residual_dropout is not None:
            decoder_layers(self.model)  # an architecture we cannot serve is refused here, not at the first step

    def _settle_models(self) -> None:
        """Checks and casts of the models once upstream has loaded them and added adapters."""
        check_token_rows(self.model, self._tokenizer, "The model")
        keep_adapters_in_float32(self.model)
        match_adapters_to_precision(self.model, self.args.bf16)
        place_reward_models([self._scorer], self.accelerator.device)

    def _check_fit(self) -> None:
        """Refuse what takes no step, or exceeds the context of a model; upstream would find out in the middle."""
        check_run(self, rows_of_a_step(self.args), say_rows_of_a_step(self.args), (RM_SCORE.removeprefix("eval_"),))
        check_something_to_learn(self.train_dataset)
        for name in ("train_dataset", "eval_dataset"):
            rows = check_rows_fit(getattr(self, name), name, self.model, "the model", LONG_ROWS)
            setattr(self, name, rows)
        room = (self._selection_prompts, self.args.selection_max_new_tokens, "selection_max_new_tokens")
        check_answer_room(self.model, self._tokenizer, "The model", *room)
        check_scorer_room(self._scorer, *room)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict=state_dict)
        if self.args.should_save and hasattr(self.model, "peft_config"):
            save_token_rows(self.model, str(output_dir or self.args.output_dir))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As upstream's, with residual dropout while it lasts: the model is plain again afterwards."""
        with residual_dropout(self.model, self.args.residual_dropout):
            return super().train(*args, **kwargs)

    # -- data ---------------------------------------------------------------------------------------------------------

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Callable[[dict[str, Any]], str] | None,
        dataset_name: str,
    ) -> Any:
        """Upstream's preparation of checked rows, with what it cuts and drops counted; pretraining rows mixed in."""
        where = f"the {dataset_name} dataset"
        require_eos(self._tokenizer)
        if formatting_func is None:
            dataset = check_sft_dataset(dataset, self._tokenizer, self.chat_template, args.dataset_text_field, where)
        else:
            formatting_func = checked_formatting(formatting_func)
        dataset, formatting_func = _with_one_bos(dataset, formatting_func, self._tokenizer, args.dataset_text_field)
        with refusals_named(dataset, self._tokenizer, self.chat_template, where):
            prepared = self._tokenized(dataset, processing_class, args, packing, formatting_func, dataset_name)
        if dataset_name == "train" and getattr(args, "pretraining_fraction", 0) > 0:
            prepared = self._mix(prepared, processing_class, args)
        return prepared

    def _tokenized(
        self,
        dataset: Any,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Callable[[dict[str, Any]], str] | None,
        dataset_name: str,
    ) -> Any:
        """Upstream's preparation; what it cuts and drops is logged."""
        prepare = super()._prepare_dataset
        if not isinstance(dataset, Dataset) or packing or args.max_length is None:
            return prepare(dataset, processing_class, args, packing, formatting_func, dataset_name)
        whole_args = copy.copy(args)
        whole_args.max_length, whole_args.shuffle_dataset = None, False
        whole = prepare(dataset, processing_class, whole_args, packing, formatting_func, dataset_name)
        # Tokenised by now, so that this call does nothing but cut, drop and shuffle.
        prepared = prepare(whole, processing_class, args, packing, None, dataset_name)
        _log_cut(dataset_name, whole, len(prepared), args.max_length)
        return prepared

    def _mix(self, demonstrations: Dataset, processing_class: Any, args: Any) -> Dataset:
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        whole = tokenize_pretraining(self._pretraining_dataset, tokenizer)
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
        """Upstream's loop, then the RM score of the answers, so that it is logged and compared with the others."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._scorer is not None and output.metrics is not None and metric_key_prefix == self._scored_prefix():
            scores, asked = self._score_selection_prompts()
            output.metrics.update({RM_SCORE: fmean(scores), f"{RM_SCORE}_se": standard_error(scores, asked)})
        return output

    def _scored_prefix(self) -> str:
        """Of several evaluation sets only the first carries the score, which does not depend on the set."""
        if isinstance(self.eval_dataset, dict):
            return f"eval_{next(iter(self.eval_dataset))}"
        return "eval"

    def _score_selection_prompts(self) -> tuple[list[float], list[str]]:
        """Scores of one answer per prompt, of all processes, under the same noise at each evaluation; the keys too."""
        assert self._scorer is not None
        mine = self._selection_prompts[self.args.process_index :: self.args.world_size]
        scores: list[float] = []
        if mine:
            answers = generate_completions(
                self.accelerator.unwrap_model(self.model), self._tokenizer, mine,
                max_new_tokens=self.args.selection_max_new_tokens, temperature=self.args.selection_temperature,
                batch_size=self.args.selection_batch_size, seed=self.args.selection_seed,
            )  # fmt: skip
            scores = score_answers(self._scorer, mine, answers)
        return gather_object(scores), gather_object(prompt_keys(mine))


def _as_config(args: Any, model: Any) -> InstructSFTConfig:
    if args is None:
        name = model if isinstance(model, str) else model.config._name_or_path
        return InstructSFTConfig(f"{name.rstrip('/').split('/')[-1] or 'model'}-SFT")
    if not isinstance(args, InstructSFTConfig):
        raise ValueError(
            f"args must be an InstructSFTConfig, got {type(args).__name__}: other configs lack residual_dropout "
            "and the paper's schedule."
        )
    return args


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
        matches = args.save_strategy == args.eval_strategy
        if matches and args.save_strategy == IntervalStrategy.STEPS:
            matches = (args.save_steps / (args.eval_steps or args.save_steps)).is_integer()
        args.load_best_model_at_end = args.load_best_model_at_end or matches
    return checked


def _with_one_bos(dataset: Any, formatting_func: Any, tokenizer: Any, text_field: str) -> tuple[Any, Any]:
    """Texts, or what makes them, without a BOS token of their own where the tokenizer adds one (`drop_own_bos`)."""
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
    """One line on the rows that upstream shortens or drops without a word; none where it does neither."""
    too_long = sum(len(ids) > max_length for ids in whole["input_ids"])
    dropped = len(whole) - kept
    if too_long or dropped:
        logger.warning(
            "%s data: %d of %d rows are longer than max_length=%d tokens and were cut; %d were dropped since nothing "
            "to learn from was left.", name, too_long, len(whole), max_length, dropped,
        )  # fmt: skip
