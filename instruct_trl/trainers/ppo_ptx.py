"""PPO with a critic and pretraining gradients, PPO-ptx (Ouyang et al. 2022, Eq. 2), on TRL's GRPOTrainer.

Legend: B rows of a (micro-)batch, P prompt tokens, T completion tokens.

What GRPOTrainer does, stays GRPOTrainer's: sampling (transformers, vLLM), reward functions, log-probs, logging, PEFT,
checkpoints. Replaced are the advantages (`_generate_and_score_completions`) and the loss (`_compute_loss`); added are
the critic's step and the pretraining gradient (`training_step`).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from instruct_trl._upstream import (
    keep_4bit_trainable,
    keep_head_out_of_autocast,
    match_adapters_to_precision,
    prepare_reference,
)
from instruct_trl.data.encoding import require_eos
from instruct_trl.data.pretraining import PretrainingStream
from instruct_trl.data.rows import filter_prompts
from instruct_trl.maths.masking import masked_mean
from instruct_trl.maths.objectives import clipped_policy_loss
from instruct_trl.models.adapters import has_adapters
from instruct_trl.models.dropout import switch_off_dropout
from instruct_trl.models.role_adapters import RoleAdapters
from instruct_trl.models.value import ValueModel
from instruct_trl.trainers.critic import Critic
from instruct_trl.trainers.divergence import DivergenceMonitor
from instruct_trl.trainers.ema import EMACallback
from instruct_trl.trainers.engines import before_last_backward, check_engine, skip_step, take_over_steps, take_step
from instruct_trl.trainers.evaluation_rows import EvaluationRows
from instruct_trl.trainers.minibatches import trim_padding
from instruct_trl.trainers.ppo_evaluation import ReferenceScores, check_win_rate
from instruct_trl.trainers.ppo_policy import load_policy, resolve_reference, settle_policy
from instruct_trl.trainers.ppo_ptx_config import PPOPtxConfig
from instruct_trl.trainers.ppo_ptx_setup import (
    as_upstream_must_see,
    check_beside_roles,
    check_engine_of_roles,
    check_pretraining,
    check_read_alike,
    check_reward_rows,
    check_whole,
    load_policy_tokenizer,
    resolve_value_model,
    say_estimate,
    say_plan,
    say_warmup,
    wrap_reward_funcs,
)
from instruct_trl.trainers.ppo_saving import PPOSaving
from instruct_trl.trainers.pretraining_gradient import PretrainingGradient
from instruct_trl.trainers.room import check_rollouts, pretraining_length
from instruct_trl.trainers.starting_model import loading_kwargs, place_reward_models
from instruct_trl.trainers.stopwatch import Stopwatch


class PPOPtxTrainer(PPOSaving):
    """Trainer for PPO with a critic and, for `ptx_coef > 0`, pretraining gradients: PPO-ptx.

    Arguments up to `environment_factory` are [`~trl.GRPOTrainer`]'s. Reward models, given as a path or a module, are
    wrapped as [`RewardScorer`], so that their `reward_bias` counts and what is scored here is what was trained.

    Args:
        model: name or path of a causal language model, or one in memory. The folder of an adapter, or a PeftModel
            loaded with is_trainable=True, goes on training.
        value_model: the critic, a [`ValueModel`] or a scalar sequence classifier of any size, or the path of one or of
            a reward adapter, which is merged. Default: a copy of the one reward model among `reward_funcs`.
        ref_model: the reference of the KL penalty, in memory or by path. Default: a copy of the policy as passed in,
            or, with PEFT, the policy with its adapters off (a new adapter) or as they were (a trained one).
        pretraining_dataset: texts of the γ term, with a `text` or an `input_ids` column. Needed for `ptx_coef > 0`.
        role_adapters: [`RoleAdapters`], policy, reference, reward model and critic on one base. `model` is then None or
            its policy, and its reward model is the default of `reward_funcs`.

    Raises:
        ValueError: before any training, naming the argument and the remedy.
    """

    _tag_names = ["trl", "instruct-trl", "ppo-ptx"]
    _name = "PPO-ptx"
    _paper = {
        "title": "Training language models to follow instructions with human feedback",
        "id": "2203.02155",
        "citation": "@inproceedings{ouyang2022training, title={Training language models to follow instructions with "
        "human feedback}, author={Ouyang, Long and others}, booktitle={NeurIPS}, year={2022}}",
    }

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: PPOPtxConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: Any = None,
        optimizers: tuple = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: Any = None,
        rollout_func: Any = None,
        environment_factory: Any = None,
        *,
        value_model: Any = None,
        ref_model: Any = None,
        pretraining_dataset: Any = None,
        role_adapters: RoleAdapters | None = None,
    ):
        args = args or PPOPtxConfig("PPO-ptx")
        check_pretraining(args, pretraining_dataset)
        check_whole(model=model, value_model=value_model, ref_model=ref_model)
        with_win_rate = check_win_rate(args, eval_dataset, rollout_func)
        configs = {"peft_config": peft_config, "quantization_config": quantization_config}
        check_beside_roles(role_adapters, args, model=model, value_model=value_model, ref_model=ref_model, **configs)
        if role_adapters is not None:
            model, value_model, ref_model = role_adapters.policy, role_adapters.value, role_adapters.reference
            reward_funcs = role_adapters.reward if reward_funcs is None else reward_funcs
        processing_class = processing_class or load_policy_tokenizer(model, role_adapters, **loading_kwargs(args))
        require_eos(processing_class)
        reward_funcs = wrap_reward_funcs(reward_funcs, reward_processing_classes, args)
        check_read_alike(processing_class, value_model=value_model, ref_model=ref_model)
        value_model = resolve_value_model(value_model, reward_funcs, processing_class, args)
        check_reward_rows(reward_funcs)
        policy = load_policy(model, args, quantization_config, peft_config)
        with_peft = has_adapters(policy, peft_config)
        ref_model = resolve_reference(policy, ref_model, with_peft, args)
        train_dataset = filter_prompts(train_dataset, processing_class, args.max_prompt_length, "train_dataset")
        eval_dataset = filter_prompts(eval_dataset, processing_class, args.max_prompt_length, "eval_dataset")
        with as_upstream_must_see(args, with_peft, role_adapters, loaded=policy is not model):
            super().__init__(
                policy,
                reward_funcs,
                args,
                train_dataset,
                eval_dataset,
                processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config if policy is model else None,
                peft_config=peft_config,
                tools=tools,
                rollout_func=rollout_func,
                environment_factory=environment_factory,
            )
        self.beta, self.role_adapters = args.beta, role_adapters
        self._add_ppo_parts(value_model, ref_model, pretraining_dataset)
        self.reference_scores = ReferenceScores() if with_win_rate else None
        say_plan(self)

    def _add_ppo_parts(self, value_model: ValueModel, ref_model: Any, pretraining_dataset: Any) -> None:
        """What PPO-ptx has and GRPO has not: an own reference, the critic, the pretraining gradient, the average."""
        args, roles = self.args, self.role_adapters
        self._settle_endings()
        self._settle_scorers()
        check_rollouts(self, value_model, ref_model)
        check_engine(self.accelerator)
        keep_4bit_trainable(self.model)
        settle_policy(self.model, self._tokenizer, roles)
        place_reward_models(self.reward_funcs, self.accelerator.device)
        if args.cast_lm_head_to_fp32:
            keep_head_out_of_autocast(self, self.model)
        match_adapters_to_precision(self.model, args.bf16)
        if roles is not None:
            check_engine_of_roles(self.accelerator)
            roles.to(self.accelerator.device)
            self.ref_model = ref_model
        else:
            self.ref_model = None if ref_model is None else prepare_reference(self, ref_model)
        if args.old_logps_from_sampler and self.ref_model is None:
            raise ValueError(
                "old_logps_from_sampler needs a reference model of its own; with PEFT it is the policy without its "
                "adapter. Pass ref_model= or leave the option off."
            )
        if args.disable_dropout:
            switch_off_dropout(self.model)
            switch_off_dropout(value_model)
        with nullcontext() if roles is None else roles.active("value"):  # its parameters then are those that train
            self.critic = Critic(value_model, args, self.accelerator, self.compute_loss_context_manager)
        self.pretraining = self._pretraining_gradient(pretraining_dataset) if args.ptx_coef > 0 else None
        self.divergence = DivergenceMonitor(args)
        self.add_callback(self.divergence)
        self.ema = None
        if args.ema_decay is not None:
            self.ema = EMACallback(self.model, args.ema_decay)
            self.add_callback(self.ema)
        self.evaluation_rows = EvaluationRows()
        self.stopwatch = Stopwatch(self.accelerator.device)
        self._minibatch = {}
        self._paced = False

    def _pretraining_gradient(self, dataset: Any) -> PretrainingGradient:
        args = self.args
        with args.main_process_first(desc="tokenizing the pretraining texts"):  # the others then read its cache
            stream = PretrainingStream(
                dataset,
                self._tokenizer,
                max_length=pretraining_length(args, self.model),
                seed=args.seed if args.data_seed is None else args.data_seed,
                rank=args.process_index,
                world_size=args.world_size,
            )
        return PretrainingGradient(stream, args, self.accelerator, self.compute_loss_context_manager)

    # Update: the clipped objective, the pretraining gradient, the critic ---------------------------------------------

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """This micro-batch's share of the clipped policy loss, averaged over the minibatch's completion tokens."""
        if not self.model.training:
            objective = inputs["scores"] - self.beta * (inputs["kl"] * inputs["loss_mask"]).sum(dim=1)
            scored = inputs["loss_mask"].any(dim=1)
            self._log_means({"loss": -objective}, counted=scored)
            return -masked_mean(objective, scored)
        inputs = trim_padding(inputs)
        input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        width, mask = inputs["completion_ids"].size(1), inputs["loss_mask"]
        logps, entropies, _ = self._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, width, compute_entropy=True, scored=mask
        )
        old_logps = inputs["old_per_token_logps"].masked_fill(mask == 0, 0.0)  # as the log-probs that are not scored
        losses, ratio = clipped_policy_loss(logps, old_logps, inputs["advantages"], self.epsilon_low, self.epsilon_high)
        if "importance_sampling_ratio" in inputs:
            losses = losses * inputs["importance_sampling_ratio"]
        outside = (ratio < 1 - self.epsilon_low) | (ratio > 1 + self.epsilon_high)
        metrics = {"policy_loss": losses, "ratio": ratio, "clip_fraction": outside.float(), "entropy": entropies}
        if self.args.old_logps_from_sampler and self._in_first_minibatch():
            self._log_means({"sampler_gap": (logps - old_logps).detach()[mask.bool()].abs()})
        scored = mask.any(dim=1)
        self._log_means({name: masked_mean(value, mask, dim=1)[scored] for name, value in metrics.items()})
        return (losses * mask).sum() / inputs["minibatch_tokens"]

    def _in_first_minibatch(self) -> bool:
        """True while the policy is still the one that sampled the rollout."""
        rollout = self.args.steps_per_generation * self.num_iterations
        return self._step % rollout < self.args.gradient_accumulation_steps

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """One micro-batch: pretraining gradient, then PPO's, then the critic's; the critic steps with the policy."""
        if self._step % (self.args.steps_per_generation * self.num_iterations) == 0:
            self.stopwatch.start_iteration()
        sync = self.accelerator.sync_gradients
        with self.stopwatch("update"):
            loss = super().training_step(model, inputs, num_items_in_batch)
        with self.stopwatch("value_update"):
            batch = trim_padding(self._minibatch)
            self._log_means(self.critic.backward(batch, batch["minibatch_tokens"], sync))
        return loss

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        # Here, between sampling and the policy's loss: sampling needs the room that gradients take, and the model is in
        # train mode, in which alone it checkpoints.
        inputs = super()._prepare_inputs(generation_batch)
        if self.model.training and self.pretraining is not None:
            self._pretraining_backward(self.pretraining)
        return inputs

    def _pretraining_backward(self, pretraining: PretrainingGradient) -> None:
        with self.stopwatch("pretraining"), before_last_backward(self.accelerator, self.model_wrapped):
            if self._step % self.args.gradient_accumulation_steps == 0:
                pretraining.start_minibatch()
                self._metrics["train"]["ptx_loss"].append(0.0)
            self._metrics["train"]["ptx_loss"][-1] += pretraining.backward(self.model_wrapped)

    def _clip_grad_norm(self, model: Any) -> Any:
        return super()._clip_grad_norm(self._trained(model))

    def _trained(self, model: Any) -> Any:
        """What the policy's norm and clip are about: on a shared base the critic's gradients lie there, too."""
        return model if self.role_adapters is None else self.role_adapters.policy_adapter

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Called just before the optimizer steps: the critic steps here, or neither does (see `DivergenceMonitor`)."""
        grad_norm = super()._get_grad_norm(self._trained(model), grad_norm)
        metrics = self._metrics["train"]
        with self.stopwatch("value_update"):
            norms = {"value_grad_norm": self.critic.clip_gradients()}
            metrics["value_grad_norm"].append(norms["value_grad_norm"])
            if grad_norm is not None:  # DeepSpeed may not know it
                norms["grad_norm"] = float(grad_norm)
            if self.pretraining is not None:
                norms["ptx_loss"] = metrics["ptx_loss"][-1]
            if self.divergence.may_step(self, norms):
                self.critic.step()
                take_step(self.accelerator)
            else:
                self.critic.skip_step()
                skip_step(self.accelerator, model)
        if (self.state.global_step + 1) % self.args.steps_per_iteration == 0:
            self._log_iteration()
        return grad_norm

    # Logging ---------------------------------------------------------------------------------------------------------

    def _log_iteration(self) -> None:
        metrics = self._metrics["train"]
        metrics["episodes"] = [float((self.state.global_step + 1) * self.args.minibatch_size // self.num_iterations)]
        seconds = self.stopwatch.finish_iteration()
        for name, value in seconds.items():
            metrics[f"time/{name}"].append(value)
        if not self._paced:
            self._paced = True
            say_estimate(self, seconds["iteration"])
        metrics["episodes_per_second"].append(self.args.generation_batch_size / metrics["time/iteration"][-1])

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        say_warmup(self, num_training_steps)
        take_over_steps(self.accelerator)  # the policy is prepared by now, and no checkpoint is loaded yet
        if self.ema is not None:
            self.ema.follow_layout()
        self.critic.create_scheduler(num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)
