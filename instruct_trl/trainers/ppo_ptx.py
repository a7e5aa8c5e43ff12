"""PPO with a critic and pretraining gradients, PPO-ptx (Ouyang et al. 2022), on TRL's GRPOTrainer.

    objective(φ) = E_{x, y~π_φ}[ r(x, y) − β·log(π_φ(y|x) / π_SFT(y|x)) ] + γ·E_{x~pretrain}[ log π_φ(x) ]      (Eq. 2)

The bracket becomes one reward per token in `_add_advantages`; PPO's clipped loss in `_compute_loss` raises its mean.
`_prepare_inputs` adds the γ term (`PretrainingGradient`). Both losses go through `maths.objectives:ppo_ptx_loss`, which
is Eq. 2: to try another mixture, change that function.

Legend: B rows of a (micro-)batch, P prompt tokens, T completion tokens.
"""

from __future__ import annotations

import math
import os
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from trl import GRPOTrainer

from instruct_trl._upstream import EpochSeededRepeatSampler, mark_step_skipped, unchanged_model
from instruct_trl.data.rows import filter_prompts
from instruct_trl.maths.masking import masked_mean
from instruct_trl.maths.objectives import clipped_policy_loss, explained_variance, ppo_ptx_loss
from instruct_trl.maths.returns import generalized_advantages, kl_estimate, token_rewards
from instruct_trl.models.adapters import has_adapters, save_token_rows
from instruct_trl.models.generation import RolloutGenerate, neutral_generation_config
from instruct_trl.models.reward import RewardScorer
from instruct_trl.models.role_adapters import RoleAdapters
from instruct_trl.trainers import PAPER, checkpoints, ppo_evaluation, ppo_ptx_setup, ppo_rollout
from instruct_trl.trainers.critic import Critic
from instruct_trl.trainers.divergence import DivergenceMonitor
from instruct_trl.trainers.ema import EMACallback
from instruct_trl.trainers.engines import before_last_backward, finish_policy_step, is_sharding, take_over_steps
from instruct_trl.trainers.minibatches import Batch, arrange_minibatches, split_rows, trim_padding
from instruct_trl.trainers.ppo_ptx_config import PPOPtxConfig
from instruct_trl.trainers.run_checks import check_rollouts
from instruct_trl.trainers.stopwatch import Stopwatch


class PPOPtxTrainer(GRPOTrainer):
    """Trainer for PPO with a critic and, for `ptx_coef > 0`, pretraining gradients: PPO-ptx.

    GRPOTrainer does the rest: generation, reward functions, PEFT, logging, checkpoints. Arguments up to
    `environment_factory` are [`~trl.GRPOTrainer`]'s. Reward models, given as a path or a module, are wrapped as
    [`RewardScorer`], so that their `reward_bias` counts and they read what they were trained on.

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
    _paper = PAPER

    args: Any  # a PPOPtxConfig
    model: Any

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
        ppo_ptx_setup.check_pretraining(args, pretraining_dataset)
        with_win_rate = ppo_evaluation.check_win_rate(args, eval_dataset, rollout_func)
        given = model, value_model, ref_model, peft_config, quantization_config, role_adapters
        models = ppo_ptx_setup.Models(*given, reward_funcs, processing_class)
        ppo_ptx_setup.complete_models(models, reward_processing_classes, args)
        tokenizer, limit = models.tokenizer, args.max_prompt_length
        with ppo_ptx_setup.as_upstream_must_see(args, models):
            super().__init__(
                models.model, models.reward_funcs, args,
                filter_prompts(train_dataset, tokenizer, limit, "train_dataset"),
                filter_prompts(eval_dataset, tokenizer, limit, "eval_dataset"),
                tokenizer, callbacks=callbacks, optimizers=optimizers,
                quantization_config=None if models.loaded else quantization_config, peft_config=peft_config,
                tools=tools, rollout_func=rollout_func, environment_factory=environment_factory,
            )  # fmt: skip
        self.beta, self.role_adapters = args.beta, role_adapters  # upstream's constructor was shown another beta
        self._add_ppo_parts(models, pretraining_dataset)
        self.evaluation = ppo_evaluation.Evaluation(self.accelerator, self.reward_func_names, with_win_rate)
        ppo_ptx_setup.say_plan(args, self.pretraining, self.accelerator.print)

    def _add_ppo_parts(self, models: ppo_ptx_setup.Models, pretraining_dataset: Any) -> None:
        """Add to GRPO: a reference of its own, the critic, the pretraining gradient, the guards and the average."""
        args, roles = self.args, self.role_adapters
        self.eos_token_ids = ppo_rollout.settle_endings(self)
        self._hands_over_prompt_ids = ppo_rollout.reads_prompt_ids(self)
        check_rollouts(self, models.value_model, models.ref_model)
        self.ref_model: Any = ppo_ptx_setup.settle_models(self, models)
        # On a shared base only the parameters of the active role train, and the optimizer must hold the critic's.
        with nullcontext() if roles is None else roles.active("value"):
            self.critic = Critic(models.value_model, args, self.accelerator, self.compute_loss_context_manager)
        self.pretraining = ppo_ptx_setup.pretraining_gradient(self, pretraining_dataset)
        self.divergence = DivergenceMonitor(args)
        self.ema = None if args.ema_decay is None else EMACallback(self.model, args.ema_decay)
        self._kept_parts: list[Any] = [part for part in (self.critic, self.ema, self.divergence) if part is not None]
        for callback in self._kept_parts[1:]:  # the first, the critic, is not a callback
            self.add_callback(callback)
        self.stopwatch = Stopwatch(self.accelerator.device)
        self._prompt_ids: list[list[int]] | None = None  # for the rollout that `_calculate_rewards` scores next

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        ppo_ptx_setup.say_warmup(self.args, num_training_steps, self.accelerator.print)
        # Here, because the policy is prepared by now, and no checkpoint is loaded yet.
        take_over_steps(self.accelerator)
        if self.ema is not None:
            self.ema.follow_layout()
        self.critic.create_scheduler(num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    # 1. Sample: x from the prompts, y from the policy ----------------------------------------------------------------
    def _get_train_sampler(self, dataset: Any = None) -> Any:
        # Ordered by seed and epoch alone, so that a resumed run sees the prompts that were left.
        sampler: Any = super()._get_train_sampler(dataset)
        return EpochSeededRepeatSampler.like(sampler)

    def _tokenize_prompts(self, prompts: list) -> Any:
        if self._is_vlm or self.environment_factories is not None:
            return super()._tokenize_prompts(prompts)
        return ppo_rollout.encode_prompts(self, prompts), None, {}

    def _generate(self, prompts: list) -> Any:
        generated = super()._generate(prompts)
        self._prompt_ids = generated[0]
        return generated

    def _generate_single_turn(
        self, prompt_ids: list, images: Any, multimodal_fields: dict, *args: Any, **kwargs: Any
    ) -> Any:
        policy, sample = self.accelerator.unwrap_model(self.model_wrapped), super()._generate_single_turn
        # The sampler must draw from π_old itself; transformers would add the checkpoint's own top_k, min_p and so on.
        with self.stopwatch("generate"), neutral_generation_config(policy):
            continuous = self.use_transformers_continuous_batching
            if continuous or self.use_vllm or images or multimodal_fields:
                with unchanged_model(self.model) if continuous else nullcontext():
                    return sample(prompt_ids, images, multimodal_fields, *args, **kwargs)
            # Finished rows leave the batch, but not under sharding: there all processes must run equally many forwards.
            drop = not is_sharding(self.accelerator)
            heat = self.temperature if self.args.old_logps_from_sampler else None
            generate = RolloutGenerate(policy, self.eos_token_ids, drop_ended=drop, temperature=heat)
            size = self.args.local_rollout_forward_batch_size
            return ppo_rollout.sample_by_length(
                prompt_ids, size, lambda chunk: sample(chunk, images, {}, *args, **kwargs)[0], generate
            )

    # 2. Score: r(x, y) ------------------------------------------------------------------------------------------------
    def _calculate_rewards(self, inputs: list, prompts: list, completions: list, completion_ids: list) -> torch.Tensor:
        prompt_ids, self._prompt_ids = self._prompt_ids if self._hands_over_prompt_ids else None, None
        # Reward models read what was drawn, the special tokens too, not the text that upstream decoded.
        inputs, completions = ppo_rollout.as_drawn(
            inputs, completions, completion_ids, prompt_ids, self._tokenizer, self.eos_token_ids
        )
        with self.stopwatch("score"), ExitStack() as precision:
            for scorer in self.reward_funcs:
                if isinstance(scorer, RewardScorer):  # the user's own functions choose their precision
                    precision.enter_context(scorer.computing_under(self.accelerator.autocast))
            self._rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids)
        return self._rewards

    def _score_answers(self, rollout: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """r(x, y) of each answer, (B,), NaN if no reward function scored it; and whether it ends with an EOS, (B,)."""
        scores = ppo_rollout.answer_scores(self._rewards, self.reward_weights)
        mine = scores.view(self.accelerator.num_processes, -1)[self.accelerator.process_index]
        # By the last real token: the pad token may be the EOS, and would end every row.
        ended = ppo_rollout.ends_in(self.eos_token_ids, rollout["completion_ids"], rollout["completion_mask"])
        return mine - (self.args.missing_eos_penalty or 0.0) * ~ended, ended

    # 3. log π_old and log π_ref, by the same forward as the loss: so the first minibatch's ratio is 1 -----------------
    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Any, attention_mask: Any, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> Any:
        # Upstream calls this for whole rollouts, without gradient. `_compute_loss` calls `_logps` directly.
        more = (value for name, value in kwargs.items() if name != "batch_size")
        if any(value is not None and value is not False for value in more):  # images, mixtures of experts
            ask = super()._get_per_token_logps_and_entropies
            return ask(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        if self.args.old_logps_from_sampler and model is self.model:  # the sampler's log-probs replace these zeros
            return torch.zeros(attention_mask[:, -logits_to_keep:].shape, device=input_ids.device), None, None
        return self._rollout_logps(model, split_rows(input_ids, attention_mask, logits_to_keep)), None, None

    @torch.no_grad()
    def _rollout_logps(self, model: Any, rollout: Batch) -> torch.Tensor:
        return ppo_rollout.by_length(self, rollout, lambda rows: self._logps(model, rows)[0])

    def _logps(self, model: Any, rows: Batch, entropy: bool = False) -> tuple[torch.Tensor, Any]:
        """log π (B, T) of one forward, and entropies (B, T) or None."""
        return ppo_rollout.forward_logps(self, model, rows, entropy, super()._get_per_token_logps_and_entropies)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """The rollout: answers, scores, log-probs, values and advantages, each row padded on the right.

        Adds to GRPO's: `loss_mask` (B, T), `scores` (B,), `kl`, `old_values`, `returns` and `advantages` (B, T).
        """
        # GRPO computes log π_ref for beta > 0 only. We always log the KL, so GRPO is shown beta = 1 here.
        beta, self.beta = self.beta, 1.0
        try:
            rollout = super()._generate_and_score_completions(inputs)
        finally:
            self.beta = beta
        # A tool's words stand in the answer, but the policy did not choose them: no loss on those.
        rollout["loss_mask"] = rollout["completion_mask"] * rollout.pop("tool_mask", 1)
        if self.args.old_logps_from_sampler:
            again = partial(self._rollout_logps, self.model)
            rollout["old_per_token_logps"] = ppo_rollout.sampler_logps(rollout, self.accelerator, again)
        elif "old_per_token_logps" not in rollout:  # GRPO leaves them out if a rollout is one optimizer step
            rollout["old_per_token_logps"] = self._rollout_logps(self.model, rollout)
        self._score_rollout(rollout)
        if self.model.training:
            # Judged here, before the first step on answers that show a collapsed policy.
            self.divergence.judge_rollout(self.state, self.control)
            self._add_advantages(rollout)
        return rollout

    def _score_rollout(self, rollout: dict[str, Any]) -> None:
        """Add `scores` (B,) and `kl` (B, T). Rows that no reward function scored leave `loss_mask` and are counted."""
        mask = rollout["loss_mask"]
        scores, ended = self._score_answers(rollout)
        scored = ~scores.isnan()
        # An answer that no function scored must move nothing: not whitening, not a loss, not a token count.
        rollout["scores"] = scores.masked_fill(~scored, 0.0)
        rollout["loss_mask"] = mask * scored.unsqueeze(1)
        logps, ref_logps = rollout["old_per_token_logps"], rollout["ref_per_token_logps"]
        # The penalty of Eq. 2, per token: log(π/π_SFT) of the token that was drawn (k1), or another estimate of the KL.
        rollout["kl"] = kl_estimate(logps, ref_logps, self.args.kl_estimator)
        sequence_kl = (kl_estimate(logps, ref_logps) * mask).sum(dim=1)
        objective = rollout["scores"] - self.beta * sequence_kl  # the first bracket of Eq. 2
        metrics = {"score": rollout["scores"], "kl": sequence_kl, "objective": objective, "eos_rate": ended}
        self._log_means(metrics, counted=scored)
        self._log_means({"unscored_fraction": ~scored})
        if self.model.training:  # and as a number; in evaluation, `Evaluation` adds it up from the same rows
            self._metrics["train"]["missing_rewards"].append(float(self.accelerator.reduce((~scored).sum(), "sum")))

    # 4. Value and advantages ------------------------------------------------------------------------------------------
    def _add_advantages(self, rollout: dict[str, Any]) -> None:
        """Replace GRPO's `advantages` by GAE's, (B, T); add `old_values` and `returns`, (B, T)."""
        args, mask, loss_mask = self.args, rollout["completion_mask"], rollout["loss_mask"]
        with self.stopwatch("value"):
            values = ppo_rollout.by_length(self, rollout, self.critic.rollout_values)
        # Eq. 2's reward, token by token: −β·KL_t at each, r(x, y) at the last. No KL term is left for the loss.
        rewards = token_rewards(rollout["scores"], rollout["kl"] * loss_mask, mask, self.beta)
        # An answer is one episode (section 3.5: a bandit). No discount; λ is not published.
        advantages, returns = generalized_advantages(rewards, values, mask, args.discount, args.gae_lambda)
        scored = loss_mask.any(dim=1)
        means = {"value": values, "return": returns}
        self._log_means({name: masked_mean(value, mask, dim=1)[scored] for name, value in means.items()})
        variance = explained_variance(*ppo_rollout.of_all_processes(self.accelerator, values, returns, loss_mask))
        self._metrics["train"]["explained_variance"].append(variance.item())
        if args.whiten_advantages:
            # Over the whole rollout on all processes, so that an advantage does not depend on which rows share its
            # minibatch. The returns stay in reward units: the critic learns those.
            advantages = ppo_rollout.whiten(self.accelerator, advantages, loss_mask)
        ppo_rollout.log_advantages(self._logs, self.accelerator.gather(masked_mean(advantages, loss_mask, dim=1)))
        rollout |= {"advantages": advantages, "old_values": values, "returns": returns}

    # 5. Minibatches: 512 episodes make 8 of 64 (appendix C) -----------------------------------------------------------
    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        if not self.model.training:
            return self._prepare_evaluation(generation_batch)
        before, accumulation = self._buffered_inputs, self.args.gradient_accumulation_steps
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is not before:  # a rollout, shuffled and split by GRPO
            self._buffered_inputs = arrange_minibatches(self._buffered_inputs, accumulation, self.accelerator)
            inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]
        self._minibatch: Batch = inputs

        # 6. Pretraining gradient: γ·E[log π(x)], the second term of Eq. 2. It runs here, after sampling and before
        # PPO's loss. Earlier, gradients would take memory that sampling needs; checkpointing works in train mode only.
        if self.pretraining is not None:
            # "Computed one after the other and both accumulated" (appendix C). PPO's backward follows and is the
            # minibatch's last: there the processes exchange both gradients at once.
            with self.stopwatch("pretraining"), before_last_backward(self.accelerator, self.model_wrapped):
                if self._step % accumulation == 0:
                    self.pretraining.start_minibatch()
                    self._metrics["train"]["ptx_loss"].append(0.0)
                self._metrics["train"]["ptx_loss"][-1] += self.pretraining.backward(self.model_wrapped)
        return inputs

    # 7. Update: PPO's clipped loss, the first term of Eq. 2 -----------------------------------------------------------
    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        # `super` runs the backward passes of pretraining (in `_prepare_inputs`) and of PPO; the critic's follows.
        if self._micro_batch() == 0:
            self.stopwatch.start_iteration()
        sync = self.accelerator.sync_gradients
        with self.stopwatch("update"):
            loss = super().training_step(model, inputs, num_items_in_batch)
        with self.stopwatch("value_update"):
            batch = trim_padding(self._minibatch)
            self._log_means(self.critic.backward(batch, batch["minibatch_tokens"], sync))
        return loss

    def _micro_batch(self) -> int:
        return self._step % (self.args.steps_per_generation * self.num_iterations)  # of the iteration

    def _compute_loss(self, model: Any, inputs: Batch) -> torch.Tensor:
        if not self.model.training:
            return self.evaluation.loss(inputs, self.beta)
        inputs = trim_padding(inputs)
        mask, low, high = inputs["loss_mask"], self.epsilon_low, self.epsilon_high
        logps, entropies = self._logps(model, inputs, entropy=True)
        old_logps = inputs["old_per_token_logps"].masked_fill(mask == 0, 0.0)  # as in `logps`, where nothing is scored
        losses, ratio = clipped_policy_loss(logps, old_logps, inputs["advantages"], low, high)
        if "importance_sampling_ratio" in inputs:  # vLLM draws from slightly other weights; TRL corrects for it
            losses = losses * inputs["importance_sampling_ratio"]
        outside = (ratio < 1 - low) | (ratio > 1 + high)
        metrics = {"policy_loss": losses, "ratio": ratio, "clip_fraction": outside.float(), "entropy": entropies}
        metrics = {name: masked_mean(value, mask, dim=1)[mask.any(dim=1)] for name, value in metrics.items()}
        # Only on the first minibatch: there the weights are those that drew, and any gap is rounding.
        if self.args.old_logps_from_sampler and self._micro_batch() < self.args.gradient_accumulation_steps:
            metrics["sampler_gap"] = (logps - old_logps).detach()[mask.bool()].abs()
        self._log_means(metrics)
        # Divided by the tokens of the whole minibatch on all processes, so that 8 micro-batches of 1 row equal 1 of 8.
        policy_loss = (losses * mask).sum() / inputs["minibatch_tokens"]
        return ppo_ptx_loss(policy_loss, torch.zeros_like(policy_loss), self.args.ptx_coef)  # Eq. 2, first term

    # 8. Critic and step -----------------------------------------------------------------------------------------------
    def _trained(self, model: Any) -> Any:
        """The module whose gradients are the policy's; on a shared base `model.parameters()` has the critic's, too."""
        return model if self.role_adapters is None else self.role_adapters.policy_adapter

    def _clip_grad_norm(self, model: Any) -> Any:
        return super()._clip_grad_norm(self._trained(model))  # PPO and γ term together: one clip, one step

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        # Trainer calls this just before it steps the policy: the last moment to decide if both models step, or neither.
        grad_norm = super()._get_grad_norm(self._trained(model), grad_norm)
        metrics = self._metrics["train"]
        with self.stopwatch("value_update"):
            norms = {"value_grad_norm": self.critic.engine.clip_gradients()}
            metrics["value_grad_norm"].append(norms["value_grad_norm"])
            if grad_norm is not None:  # DeepSpeed may not know it
                norms["grad_norm"] = float(grad_norm)
            if self.pretraining is not None:
                norms["ptx_loss"] = metrics["ptx_loss"][-1]
            taken = self.divergence.may_step(self.state, self.control, norms)
            mark_step_skipped(self.optimizer, not taken)  # the policy's schedule then waits, too
            metrics["skipped_steps"] = [sum(metrics["skipped_steps"]) + (not taken)]  # since the last log
            self.critic.step(taken)
            finish_policy_step(self.accelerator, model, taken)
        if (self.state.global_step + 1) % self.args.steps_per_iteration == 0:
            self._log_iteration()
        return grad_norm

    # 9. Log -----------------------------------------------------------------------------------------------------------
    def _log_means(self, metrics: dict[str, torch.Tensor], counted: torch.Tensor | None = None) -> None:
        """Log the mean of each tensor (B,) over all processes, of the rows `counted` (B,); show it to the guards."""
        if not self.model.training:
            self.evaluation.note(metrics, counted)
            return
        for name, values in metrics.items():
            rows = (values if counted is None else values[counted]).detach().float()
            # Sum and count, not a mean of means: processes may hold unequally many rows that count.
            mine = torch.stack([rows.sum(), torch.tensor(float(rows.numel()), device=rows.device)])
            total, count = self.accelerator.reduce(mine, "sum").tolist()
            self._metrics["train"][name].append(total / count if count else float("nan"))
            self.divergence.observe(name, total, count)

    def _log_iteration(self) -> None:
        metrics, args, step = self._metrics["train"], self.args, self.state.global_step + 1
        metrics["episodes"] = [float(step * args.minibatch_size // self.num_iterations)]  # each is used so many times
        for name, value in self.stopwatch.finish_iteration(args.generation_batch_size).items():
            metrics[name].append(value)
        seconds, left = metrics["time/iteration"][-1], (args.max_steps - step) // args.steps_per_iteration
        if self.stopwatch.iterations == 1 and left > 0:
            self.accelerator.print(
                f"PPO-ptx: the first iteration took {seconds:.0f} s; {left} to go, about {seconds * left / 60:.0f} min."
            )

    # Evaluation: on held-out prompts, against the reference; it changes nothing that training samples -----------------
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        # GRPO's draws from training's generators. Here each step has a seed of its own: a resumed run evaluates alike.
        purpose = "evaluation", self.state.global_step, self.args.process_index
        with ppo_evaluation.own_randomness(self.accelerator.device, self.args.seed, *purpose):
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """GRPO's, with means over rows in place of means over batches, under the names of the set evaluated."""
        self.evaluation.start()
        rows = ppo_evaluation.count_rows(dataloader, self.num_generations_eval or 1)
        output: Any = super().evaluation_loop(dataloader, *args, **kwargs)
        metrics, prefix = self.evaluation.metrics(rows(), self.reward_weights), kwargs.get("metric_key_prefix", "eval")
        output.metrics.update({f"{prefix}_{name}": value for name, value in metrics.items()})
        return output

    def _prepare_evaluation(self, rows: list[dict[str, Any]]) -> Batch:
        sample = super()._generate_and_score_completions
        places = ppo_evaluation.score_reference(self, rows, lambda: self._score_answers(sample(rows))[0])
        inputs = super()._prepare_inputs(rows)  # type: ignore[arg-type]
        endings = [*self.eos_token_ids, self._tokenizer.pad_token_id]  # as TRL's `completions/...` count
        self.evaluation.note_answers(places, inputs, self._rewards, endings, self._metrics["eval"])
        return inputs

    def _determine_best_metric(self, metrics: dict[str, Any], trial: Any) -> bool:
        # A metric is None if no answer was scored: it then counts as worse than any number.
        known = {name: math.nan if value is None else value for name, value in metrics.items()}
        return super()._determine_best_metric(known, trial)

    # Save and resume --------------------------------------------------------------------------------------------------
    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:  # upstream takes the highest number, also of a torn checkpoint
            resume_from_checkpoint = checkpoints.checkpoint_to_resume(self.args.output_dir)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _init_training_state(self, max_steps: int, steps_an_epoch: int, epochs: int, *args: Any) -> tuple[int, int]:
        # A finished run has no epoch left. Upstream would take one step more if it ended inside an epoch.
        position = super()._init_training_state(max_steps, steps_an_epoch, epochs, *args)
        return (epochs, 0) if self.state.global_step >= max_steps else position

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write `policy/`, `value/` and `ema/` under `output_dir`, each readable by plain transformers.

        A push has all three, and the policy at the root too: the hub and the model card look for it there.
        """
        root = output_dir or self.args.output_dir
        save = partial(super().save_model, _internal_call=True)
        if self.args.push_to_hub and not _internal_call and root == self.args.output_dir:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)  # which comes back here
            return
        if _internal_call:
            save(root)
        if not _internal_call or output_dir is None:  # else `_save_optimizer_and_scheduler` saves critic and average
            save(os.path.join(root, "policy"))
            self.critic.save_model(os.path.join(root, "value"), self._tokenizer)
            if self.ema is not None:
                with self.ema.applied():
                    save(os.path.join(root, "ema"))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict=state_dict)
        if self.args.should_save and self.role_adapters is None and has_adapters(self.model):
            save_token_rows(self.model, str(output_dir or self.args.output_dir))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.args.should_save:
            checkpoints.begin_checkpoint(Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}"))
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        os.makedirs(output_dir, exist_ok=True)  # on each machine
        for part in self._kept_parts:
            part.save(output_dir, self.args)
        text = 0 if self.pretraining is None else self.pretraining.stream.position
        checkpoints.save_rollout(output_dir, self.args, self._step, self._buffered_inputs, text)

    def _save_rng_state(self, output_dir: str) -> None:
        # The last that each process writes before the main one writes `trainer_state.json`.
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoints.seal_checkpoint(Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.role_adapters is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:  # upstream would take `value/` for another adapter of the policy
            self.role_adapters.load_policy(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._step, self._buffered_inputs, text = checkpoints.load_rollout(checkpoint, self.args)
            for part in self._kept_parts:
                part.load(checkpoint, self.args)
            if self.pretraining is not None:
                self.pretraining.stream.position = text
