"""The reward model of Ouyang et al. 2022 (section 3.5, Eq. 1): all K completions of a prompt are one batch element.

Legend: B prompts, K completions of the longest list in a batch, N completions in all, T tokens.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch import nn
from trl import RewardConfig, RewardTrainer
from trl.data_utils import is_conversational

from instruct_trl._upstream import apply_cpu_defaults, score_head, without_init_kwargs
from instruct_trl.data.encoding import in_row, pad_rows, template_kwargs, tokenize_pair, what_template_rewrites
from instruct_trl.data.prefix_layout import GroupedRows
from instruct_trl.data.ranking import RankingReport, prepare_ranking_dataset
from instruct_trl.data.ranking_batch import RankingCollator, grouped_rows, prompt_pieces, row_pieces, take_prompts
from instruct_trl.data.rows import check_demonstration, require_columns
from instruct_trl.evaluation.floors import BagOfWords, add_bag_of_words, bag_of_words, text_rankings, training_texts
from instruct_trl.evaluation.reward_metrics import floor_rates
from instruct_trl.maths.rankings import ranking_losses
from instruct_trl.models.adapters import has_adapters, save_token_rows
from instruct_trl.models.context import refuse_long_row
from instruct_trl.models.dropout import switch_off_dropout
from instruct_trl.models.loading import fit_model_to_tokenizer
from instruct_trl.models.model_files import load_tokenizer, write_reward_config
from instruct_trl.models.precision import one_dtype
from instruct_trl.models.prefix_sharing import ScoringRoute
from instruct_trl.models.scores import score_rows
from instruct_trl.trainers import PAPER, setting, starting_model
from instruct_trl.trainers.ranking_metrics import GatheredRewards, RankingTally
from instruct_trl.trainers.run_checks import LONG_ROWS, check_not_empty, check_steps, check_training_numbers, require
from instruct_trl.trainers.starting_model import say


@dataclass
class RankingRewardConfig(RewardConfig):
    """`trl.RewardConfig` with the paper's reward-model settings as defaults.

    By default an optimizer step takes 64 prompts: 8 per device × 8 accumulation steps on one device. Without an
    accelerator training runs on the CPU.
    """

    learning_rate: float = setting(9e-6, "Peak learning rate. Paper, C.2: 9e-6.")
    num_train_epochs: float = setting(
        1.0, "Passes over the rankings. Paper, C.2: 1; with more, the reward model overfits quickly."
    )
    lr_scheduler_type: str = setting("cosine_with_min_lr", "Paper, C.2: cosine, down to a tenth of the peak.")
    lr_scheduler_kwargs: dict | str | None = setting(
        None, "Settings of the schedule. The default for cosine_with_min_lr is {'min_lr_rate': 0.1} (paper, C.2)."
    )
    adam_beta2: float = setting(0.95, "Paper, appendix C: Adam with β1 0.9, β2 0.95.")
    per_device_train_batch_size: int = setting(8, "Prompts per device and forward pass, each with all its completions.")
    gradient_accumulation_steps: int = setting(
        8, "Forward passes per optimizer step. Paper, C.2: 64 prompts per step, here 8 × 8 on one device."
    )
    max_length: int | None = setting(
        2048, "Longest prompt and completion together, in tokens. Longer rows are dropped and counted. Paper: 2k."
    )
    max_prompt_length: int | None = setting(
        None, "Longest prompt, in tokens. Longer ones are dropped and counted. Paper: 1k; None sets no limit."
    )

    prefix_sharing: str = setting(
        "auto",
        "Compute each prompt once for all its completions. If the model cannot do this, 'auto' computes one row per "
        "completion and says why, and 'on' raises an error. 'off' never shares.",
    )
    max_tokens_per_batch: int | None = setting(
        None,
        "Limits memory: each batch is computed in pieces of at most this many tokens. The loss and the gradient stay "
        "the same. None computes the whole batch at once.",
    )
    two_pass: bool = setting(
        False,
        "Limits memory to one completion (or to max_tokens_per_batch). A first pass computes rewards without gradient, "
        "a second one the gradient by pieces. It takes about a third more compute.",
    )
    use_margins: bool = setting(
        False,
        "Subtract a margin in the loss: −log σ(r_w − r_l − margin). It is the difference of the pair's `scores`, or "
        "the `margin` column beside chosen/rejected, as in TRL. The paper has none.",
    )

    def __post_init__(self) -> None:
        apply_cpu_defaults(self)
        check_training_numbers(self)
        lengths = ("max_length", "max_prompt_length", "max_tokens_per_batch")
        require(self, lengths, "at least 1 token, or None", lambda number: number >= 1)
        if self.prefix_sharing not in ("auto", "on", "off"):
            raise ValueError(f"prefix_sharing must be 'auto', 'on' or 'off', got {self.prefix_sharing!r}.")
        if self.two_pass and not self.disable_dropout:
            raise ValueError("two_pass needs disable_dropout=True: the second pass must give the rewards of the first.")
        if self.lr_scheduler_kwargs is None and self.lr_scheduler_type == "cosine_with_min_lr":
            self.lr_scheduler_kwargs = {"min_lr_rate": 0.1}
        super().__post_init__()
        self.model_init_kwargs = one_dtype(self.model_init_kwargs)


class RankingRewardTrainer(RewardTrainer):
    """`trl.RewardTrainer` for rankings of any length, ties allowed, with the paper's loss, defaults and bias.

    Each completion is forwarded once. The loss is the mean over prompts (of the whole accumulation window, on all
    processes) of the mean over a prompt's untied pairs of −log σ(r_w − r_l); a prompt without an untied pair does not
    count. Evaluation reports pair accuracy, Kendall's tau, the mean score of each rank, and what was tied or dropped.

    ```python
    trainer = RankingRewardTrainer("Qwen/Qwen2.5-0.5B", RankingRewardConfig("rm"), train_dataset=rankings)
    trainer.train()
    trainer.normalize(demonstrations)  # their scores now average 0
    trainer.save_model()
    ```

    Args:
        model: name or path of a pretrained model, or a sequence classifier with num_labels=1, or a PeftModel of one
            loaded with is_trainable=True; or the folder of a reward adapter, which goes on training; with peft_config
            also the folder of an SFT adapter, which is merged into its base.
        args: a `RankingRewardConfig`.
        data_collator: replaces `RankingCollator`.
        train_dataset, eval_dataset: columns `prompt`, `completions`, and `ranks` (lower is better) or `scores` (higher
            is better), optionally `truncated`; or `chosen`/`rejected`. See `instruct_trl.data.ranking`.
        processing_class: the tokenizer; a pad token that is missing or equals EOS is replaced, and the model grows.
        compute_metrics: gets the raw scores (prompts, K) as predictions, −100 where a list is shorter; no labels.
        peft_config: must train the score head (task_type="SEQ_CLS" does).

    The rest is TRL's. Attribute `data_reports`: what was dropped from each dataset, by name.

    Raises:
        ValueError: bad data or a model that cannot be a reward model; before any training.
    """

    # Upstream's types are wider, or optional; here these are always set.
    model: Any
    args: RankingRewardConfig
    processing_class: Any
    _signature_columns: Any

    # `compute_loss` divides by the prompts of the whole accumulation window, so that Trainer must not divide again: its
    # `training_step` reads this flag.
    loss_is_scaled_for_ga = True

    _tag_names = ["trl", "reward-trainer", "instruct-trl", "ranking-reward"]
    _name = "RankingReward"
    _paper = PAPER
    _template_file = "rm_model_card.md"

    def __init__(
        self,
        model: Any,
        args: RankingRewardConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: Any = None,
        optimizers: Any = (None, None),
        optimizer_cls_and_kwargs: Any = None,
        preprocess_logits_for_metrics: Any = None,
        quantization_config: Any = None,
        peft_config: Any = None,
    ):
        args = starting_model.as_config(args, RankingRewardConfig, model, "RankingReward")
        check_not_empty(train_dataset=train_dataset, eval_dataset=eval_dataset)
        starting_model.settle_model_kwargs(args, has_adapters(model, peft_config))
        starting_model.check_reward_start(model, peft_config, args)
        start = starting_model.load_reward_adapter(model, peft_config, args, quantization_config)
        start = starting_model.train_in_float32(start, "The reward model", args, peft_config)
        if processing_class is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            if not name:
                raise ValueError("The model was built in memory: pass its tokenizer as processing_class.")
            processing_class = load_tokenizer(name, **starting_model.hub_options(args))
        starting_model.prepare_tokenizer(processing_class, args, start)
        start = starting_model.load_grown(start, peft_config, args, quantization_config, processing_class)

        self.data_reports: dict[str, RankingReport] = {}
        self.evaluation_records: list[dict[str, Any]] = []  # set by evaluate(); see `GatheredRewards.evaluate`
        self._tally = RankingTally()
        data_collator = data_collator or RankingCollator(processing_class.pad_token_id, args.pad_to_multiple_of)
        # A model loaded above is quantised by now; beside a model in memory, upstream only warns that it ignores this.
        quantization_config = quantization_config if start is model else None
        with without_init_kwargs(args, start is not model):
            super().__init__(
                start, args, data_collator, train_dataset, eval_dataset, processing_class, compute_metrics, callbacks,
                optimizers, optimizer_cls_and_kwargs, preprocess_logits_for_metrics, quantization_config, peft_config,
            )  # fmt: skip
        if train_dataset is not None and is_conversational(next(iter(train_dataset), {})):
            say(args, what_template_rewrites(processing_class))
        self._settle_model(args, processing_class)
        check_steps(self)
        self._route = ScoringRoute(self.model, args.prefix_sharing, lambda line: say(args, line))

    def _settle_model(self, args: RankingRewardConfig, processing_class: Any) -> None:
        """Check and cast the model after upstream has loaded it, quantised it and added adapters."""
        if processing_class.pad_token_id == processing_class.eos_token_id:
            raise ValueError(
                f"`chat_template_path={args.chat_template_path!r}` made {processing_class.eos_token!r} both EOS and "
                "pad token. Prepare the tokenizer with a pad token of its own and pass it as processing_class."
            )
        fit_model_to_tokenizer(self.model, processing_class)
        starting_model.settle_precision(self.model, args.bf16)
        if args.disable_dropout:
            switch_off_dropout(self.model)  # upstream's misses rates that a forward reads from the config (OPT)
        if not any(parameter.requires_grad for parameter in score_head(self.model).parameters()):
            raise ValueError(f"The score head of {type(self.model).__name__} is frozen. {starting_model.HEAD_REMEDY}")
        if not hasattr(self.model.config, "reward_bias"):
            self.model.config.reward_bias = 0.0
        if (args.two_pass or args.max_tokens_per_batch) and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise ValueError(
                f"{'two_pass' if args.two_pass else 'max_tokens_per_batch'} is for one process or DDP: under DeepSpeed "
                "and FSDP all processes must run equally many forwards. Lower per_device_train_batch_size instead."
            )

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        where = f"the {dataset_name} dataset"
        limits = {"max_length": args.max_length, "max_prompt_length": args.max_prompt_length}
        options = {**limits, "use_margins": args.use_margins, "num_proc": args.dataset_num_proc}
        with args.main_process_first(local=False, desc=f"tokenizing {where}"):
            dataset, report = prepare_ranking_dataset(dataset, processing_class, **options, where=where)
        if report is not None:
            self.data_reports[dataset_name] = report
            say(args, report.line(where, **limits))
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = ["input_ids", "ranks", "pairs", "margins", "weight", "labeler", "prompt_key"]

    # -- loss ---------------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The micro-batches of one optimizer step, and the weight of their prompts, on all processes together."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        # Counted before the first forward: each micro-batch must divide by the prompts of the whole window, so that
        # 1 × 8 and 8 × 1 prompts give one gradient.
        total = torch.as_tensor(sum(_weight(batch) for batch in batches), device=device)
        return batches, self.accelerator.gather(total.reshape(1)).sum()

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """One forward and backward, or several on pieces of the batch that add up to the same gradient."""
        with self._route.active():  # over the backward, too: checkpointing runs the shared forward again
            if self.args.max_tokens_per_batch is None and not self.args.two_pass:
                return super().training_step(model, inputs, num_items_in_batch)
            inputs = self._prepare_inputs(inputs)
            if num_items_in_batch is None:
                num_items_in_batch = _weight(inputs) * self.accelerator.num_processes
            if self.args.two_pass:
                pieces, loss = self._first_pass(model, inputs, num_items_in_batch)
            else:
                pieces, loss = [take_prompts(inputs, piece) for piece in self._prompts(inputs)], None
            parts = []
            for index, piece in enumerate(pieces):
                # DDP averages gradients in each backward outside no_sync: once for the batch is enough.
                with nullcontext() if index == len(pieces) - 1 else self.accelerator.no_sync(model):
                    parts.append(super().training_step(model, piece, num_items_in_batch))
            return torch.stack(parts).sum() if loss is None else loss

    def _prompts(self, inputs: Any) -> list[list[int]]:
        return prompt_pieces(inputs, self.args.max_tokens_per_batch, self._route.shares)

    def _first_pass(self, model: nn.Module, inputs: Any, num_items_in_batch: Any) -> tuple[list[dict], torch.Tensor]:
        """(pieces for the second pass, each with ∂loss/∂reward of its rows; the loss)."""
        with torch.no_grad(), self.compute_loss_context_manager():
            rewards = self._rewards(model, inputs)
        # The loss couples a prompt's completions, but only through their rewards. Given ∂L/∂r, each completion can be
        # forwarded again alone, and no more than one graph is in memory at a time.
        rewards.requires_grad_(True)
        loss = self._loss(rewards, inputs, num_items_in_batch)
        gradients = torch.autograd.grad(loss, rewards)[0][inputs["mask"]]
        self._tally.add(rewards.detach(), inputs)
        pieces = []
        for rows in row_pieces(inputs, self.args.max_tokens_per_batch, self._route.shares):
            index = torch.tensor(rows, device=gradients.device)
            pieces.append(grouped_rows(inputs, index)._asdict() | {"reward_gradients": gradients[index]})
        return pieces, loss.detach()

    def _rewards(self, model: nn.Module, inputs: Any) -> torch.Tensor:
        """Rewards (B, K) without bias, 0 where there is no completion."""
        mask = inputs["mask"]
        if torch.is_grad_enabled():  # one graph for the loss; if it must be cut, `training_step` has done so
            scores = self._route(model, grouped_rows(inputs))
            return scores.new_zeros(mask.shape).masked_scatter(mask, scores)
        # No graph is kept here, so the batch may be scored in pieces although the loss couples a prompt's rewards.
        rewards = torch.zeros(mask.shape, device=mask.device)
        for prompts in self._prompts(inputs):
            piece = take_prompts(inputs, prompts)
            scores = self._route(model, grouped_rows(piece))
            rewards[prompts] = rewards[prompts].masked_scatter(piece["mask"], scores)
        return rewards

    def _loss(self, rewards: torch.Tensor, inputs: Any, num_items_in_batch: Any) -> torch.Tensor:
        """Eq. 1 over B prompts. Without `num_items_in_batch`, the mean is over this batch's prompts."""
        center = self.args.center_rewards_coefficient or 0.0
        losses, counted = ranking_losses(rewards, inputs["pairs"], inputs.get("margins"), center)
        # A prompt whose completions are all tied says nothing: it is in neither the sum nor the number of prompts.
        total = (losses * inputs["weights"] * counted).sum()
        if num_items_in_batch is None:
            weight = _weight(inputs)
        else:
            weight = torch.as_tensor(num_items_in_batch, device=total.device)
            # DDP averages gradients over processes, while `weight` is their sum: multiply back.
            total = total * self.accelerator.num_processes
        return total / torch.where(weight > 0, weight, 1.0)  # a batch of ties alone has loss 0, not nan

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Eq. 1 over B prompts; in the second pass of `two_pass`, Σ r ∂L/∂r, which has the same gradient."""
        if "reward_gradients" in inputs:
            rows = GroupedRows(**{name: inputs[name] for name in GroupedRows._fields})
            return (self._route(model, rows) * inputs["reward_gradients"]).sum()
        rewards = self._rewards(model, inputs)
        loss = self._loss(rewards, inputs, num_items_in_batch)
        if self.model.training:
            self._tally.add(rewards.detach(), inputs)
        else:
            self._evaluated.add(rewards)
        return (loss, {"logits": rewards.masked_fill(~inputs["mask"], -100.0)}) if return_outputs else loss

    # -- metrics ------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """In training, also log since the last line: pair accuracy, margin, score, ties, padding; and tokens so far."""
        if self.model.training and self._tally:
            metrics = self._tally.metrics(self.accelerator, self._route.take_counts())
            metrics["mean_score"] += self.model.config.reward_bias
            # Ranks of tensor parallelism see the same rows, which are counted once.
            self._total_train_tokens += int(metrics.pop("tokens")) // self._tp_size
            computed = int(metrics.pop("computed")) // self._tp_size
            # Continued from the log, which a checkpoint holds: so the count survives a resume.
            earlier = (entry.get("tokens_computed") for entry in reversed(self.state.log_history))
            computed += next((tokens for tokens in earlier if tokens is not None), 0)
            logs.update(metrics | {"num_tokens": self._total_train_tokens, "tokens_computed": computed})
        super().log(logs, start_time)

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        """Adds metrics that are exact over the whole set, and leaves a record per prompt in `evaluation_records`."""
        prefix = kwargs.get("metric_key_prefix", "eval")
        self._evaluated = GatheredRewards(self.accelerator)
        counts = self._route.take_counts()
        output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        self._route.put_counts(counts)  # the log counts the tokens of training alone
        center = self.args.center_rewards_coefficient or 0.0
        bias = self.model.config.reward_bias
        metrics, self.evaluation_records = self._evaluated.evaluate(dataloader.dataset, bias, center)
        if self._bag_of_words is not None:
            rankings = text_rankings(dataloader.dataset, self.processing_class)
            add_bag_of_words(self.evaluation_records, self._bag_of_words, rankings)
        floors = [floor_rates(self.evaluation_records)]
        broadcast_object_list(floors)  # the main process alone has a bag, and every process may choose a checkpoint
        metrics |= {f"pair_accuracy_{name}": rate for name, rate in floors[0].items()}
        report = self.data_reports.get(prefix.removeprefix("eval_"), self.data_reports.get("eval"))
        if report is not None:
            metrics |= {"dropped_prompts": report.dropped_prompts, "overlong_rows": report.overlong_rows}
        assert output.metrics is not None  # upstream always makes the dictionary
        output.metrics.update({f"{prefix}_{name}": value for name, value in metrics.items()})
        return output

    @cached_property
    def _bag_of_words(self) -> BagOfWords | None:
        """Trained at the first evaluation, on the main process alone: nobody else writes what it says."""
        if not isinstance(self.train_dataset, Dataset) or not self.accelerator.is_main_process:
            return None
        return bag_of_words(training_texts(self.train_dataset, self.processing_class))

    # -- bias ---------------------------------------------------------------------------------------------------------

    def normalize(self, demonstrations: Any) -> float:
        """Set `reward_bias` in the model's config so that the demonstrations' scores average 0 (section 3.5).

        Save the model afterwards. Rows longer than `max_length` are left out and counted.

        Args:
            demonstrations: a dataset with the columns `prompt` and `completion`, as text or messages.

        Returns:
            The bias: minus the mean score.

        Raises:
            ValueError: missing columns, a row without text, no row that fits, or a score that is NaN or infinite.
        """
        where = "the demonstrations"
        require_columns(demonstrations, ["prompt", "completion"], where)
        rows, too_long = [], 0
        for index, row in enumerate(demonstrations):
            check_demonstration(row, index, where)
            with in_row(f"{where}, row {index}"):
                ids = tokenize_pair(self.processing_class, row["prompt"], row["completion"], **template_kwargs(row))
            if self.args.max_length is not None and len(ids) > self.args.max_length:
                too_long += 1  # cut, it would lose its end, at which the score is read
                continue
            refuse_long_row(len(ids), f"Row {index} of {where}", self.model, "the reward model", LONG_ROWS)
            rows.append(ids)
        if not rows:
            raise ValueError(f"{where}: none of {too_long} rows fits max_length={self.args.max_length} tokens.")
        if too_long:
            say(self.args, f"{where}: left out {too_long} of {too_long + len(rows)} rows longer than max_length.")
        mean = sum(self._scores(rows)) / len(rows)
        if not math.isfinite(mean):
            raise ValueError(
                f"{where}: their scores average {mean}, so the reward model is broken. Lower the learning rate."
            )
        self.model.config.reward_bias = -mean
        return -mean

    @torch.no_grad()
    def _scores(self, rows: list[list[int]]) -> list[float]:
        """Scores of token rows without bias. Every process scores every row: sharded models need all to forward."""
        was_training = self.model.training
        self.model.eval()
        scores: list[float] = []
        head, size = score_head(self.model), max(1, self.args.per_device_eval_batch_size)
        for start in range(0, len(rows), size):
            batch = pad_rows(rows[start : start + size], self.processing_class.pad_token_id)
            batch = {name: tensor.to(self.args.device) for name, tensor in batch.items()}
            scores += score_rows(self.model, batch["input_ids"], batch["attention_mask"], head).tolist()
        self.model.train(was_training)
        return scores

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict=state_dict)
        if self.args.should_save and has_adapters(self.model):
            # PEFT saves neither the base's config, which holds the bias, nor the rows that were added to the base.
            save_token_rows(self.model, str(output_dir or self.args.output_dir))
            write_reward_config(str(output_dir or self.args.output_dir), self.model, self.model.config.reward_bias)


def _weight(inputs: Any) -> torch.Tensor:
    """The summed weight of a batch's prompts that have a pair."""
    return (inputs["weights"] * inputs["pairs"].any(-1).any(-1)).sum()
