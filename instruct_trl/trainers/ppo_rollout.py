"""The first half of a PPO iteration: sample answers, score them, value every token, estimate advantages.

Legend: B rows of a (micro-)batch, P prompt tokens, T completion tokens.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from trl import GRPOTrainer

from instruct_trl._upstream import EpochSeededRepeatSampler, fused_head_is_compact, unchanged_model
from instruct_trl.data.encoding import encode_prompt, ending_ids, plain_answer
from instruct_trl.maths.masking import masked_mean, masked_whiten
from instruct_trl.maths.objectives import explained_variance
from instruct_trl.maths.returns import generalized_advantages, kl_estimate, token_rewards
from instruct_trl.models.generation import neutral_generation_config
from instruct_trl.models.logprobs import completion_logps, keeps_logits, positions, takes_positions
from instruct_trl.models.reward import RewardScorer
from instruct_trl.models.rollout_generation import RolloutGenerate, replaced_generate
from instruct_trl.trainers.critic import Critic
from instruct_trl.trainers.divergence import DivergenceMonitor
from instruct_trl.trainers.engines import is_sharding
from instruct_trl.trainers.minibatches import arrange_minibatches, compute_by_length
from instruct_trl.trainers.ppo_ptx_setup import begins_alike, same_tokens
from instruct_trl.trainers.stopwatch import Stopwatch


class PPORollout(GRPOTrainer):
    """GRPOTrainer with a critic's advantages in place of a group's: what [`PPOPtxTrainer`] builds on.

    Adds to the rollout, each row padded on the right: `loss_mask` (B, T), `scores` (B,), `kl` (B, T), `old_values`
    (B, T), `returns` (B, T), and makes `advantages` (B, T). Subclasses set `critic`, `divergence` and `stopwatch`.
    """

    args: Any  # a PPOPtxConfig
    chat_template_kwargs: Any
    model: Any
    ref_model: Any
    critic: Critic
    divergence: DivergenceMonitor
    stopwatch: Stopwatch
    _rewards: torch.Tensor
    _prompt_ids: list[list[int]] | None  # what the policy read of the answers that are scored next
    _minibatch: dict[str, Any]
    any_scored: bool | None = None  # whether an answer of this run had a score; None before the first rollout

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        args, data_source = self.args, self.train_dataset if dataset is None else dataset
        settings: Any = {
            "mini_repeat_count": args.num_generations,
            "batch_size": args.generation_batch_size // args.num_generations,
            "repeat_count": args.num_iterations * args.steps_per_generation,
            "shuffle": self.shuffle_dataset,
            "seed": args.seed,
        }
        return EpochSeededRepeatSampler(data_source, **settings)  # type: ignore[arg-type]

    def _settle_endings(self) -> None:
        """Let an answer end at any of `ending_ids`; upstream does not know the chat template's."""
        self.eos_token_ids = ending_ids(self._tokenizer, self.accelerator.unwrap_model(self.model))
        if self.use_vllm:
            stops = {"stop_token_ids": self.eos_token_ids}
            self.vllm_generation.generation_kwargs = {**(self.vllm_generation.generation_kwargs or {}), **stops}
        else:
            self.generation_config.eos_token_id = self.generation_kwargs["eos_token_id"] = self.eos_token_ids

    def _settle_scorers(self) -> None:
        """Find out which reward models can read the policy's own tokens, and say of those that cannot."""
        template = self.chat_template or self._tokenizer.chat_template
        self._hand_over_prompt_ids, self._prompt_ids = True, None
        for scorer in (func for func in self.reward_funcs if isinstance(func, RewardScorer)):
            tokenizer = scorer.processing_class
            if not same_tokens(tokenizer, self._tokenizer):
                scorer.say_text_is_read("its tokenizer is not the policy's")
            elif tokenizer.chat_template == template and begins_alike(tokenizer, self._tokenizer):
                continue
            self._hand_over_prompt_ids = False

    def _tokenize_prompts(self, prompts: list) -> Any:
        """As `encode_prompt` does it everywhere; upstream's way with images and environments."""
        if self._is_vlm or self.environment_factories is not None:
            prompt_ids, images, fields = super()._tokenize_prompts(prompts)
        else:
            given: Any = self.chat_template_kwargs | {"tools": self.tools or None, "chat_template": self.chat_template}  # type: ignore[operator]
            options = {name: value for name, value in given.items() if value is not None}
            prompt_ids, images, fields = [encode_prompt(self._tokenizer, p, **options) for p in prompts], None, {}
        return prompt_ids, images, fields

    def _generate(self, prompts: list) -> Any:
        generated = super()._generate(prompts)
        self._prompt_ids = generated[0]
        return generated

    def _generate_single_turn(
        self, prompt_ids: list, images: Any, multimodal_fields: dict, *args: Any, **kwargs: Any
    ) -> Any:
        with self.stopwatch("generate"), neutral_generation_config(self.accelerator.unwrap_model(self.model_wrapped)):
            size = self.args.local_rollout_forward_batch_size
            if self.use_transformers_continuous_batching:
                with unchanged_model(self.model):
                    return super()._generate_single_turn(prompt_ids, images, multimodal_fields, *args, **kwargs)
            if self.use_vllm or images or multimodal_fields:
                return super()._generate_single_turn(prompt_ids, images, multimodal_fields, *args, **kwargs)
            policy = self.accelerator.unwrap_model(self.model_wrapped)
            generate = RolloutGenerate(
                policy,
                self.eos_token_ids,
                drop_ended=not is_sharding(self.accelerator),  # processes must call `generate` equally often
                temperature=self.temperature if self.args.old_logps_from_sampler else None,
            )
            completions: dict[int, list[int]] = {}
            logps: dict[int, list[float]] = {}
            order = sorted(range(len(prompt_ids)), key=lambda row: len(prompt_ids[row]))
            for rows in (order[start : start + size] for start in range(0, len(order), size)):
                chunk = [prompt_ids[row] for row in rows]
                with replaced_generate(policy, generate):
                    answers = super()._generate_single_turn(chunk, images, {}, *args, **kwargs)[0]
                completions |= zip(rows, answers, strict=True)
                if self.args.old_logps_from_sampler:
                    drawn = zip(generate.logps.tolist(), answers, strict=True)
                    logps |= zip(rows, (row[: len(answer)] for row, answer in drawn), strict=True)
            in_order = range(len(prompt_ids))
            return [completions[row] for row in in_order], [logps[row] for row in in_order] if logps else None

    def _calculate_rewards(self, inputs: list, prompts: list, completions: list, completion_ids: list) -> torch.Tensor:
        # Whether an answer ended is known here, by the policy's own ending ids; another tokenizer's would not be found.
        ended = [len(ids) > 0 and int(ids[-1]) in self.eos_token_ids for ids in completion_ids]
        inputs = [{**row, "truncated": not end} for row, end in zip(inputs, ended, strict=True)]
        prompt_ids, self._prompt_ids = self._prompt_ids, None
        if self._hand_over_prompt_ids and prompt_ids is not None:
            inputs = [{**row, "prompt_ids": ids} for row, ids in zip(inputs, prompt_ids, strict=True)]
        drawn = [ids[:-1] if end else ids for ids, end in zip(completion_ids, ended, strict=True)]
        completions = [self._as_drawn(*answer) for answer in zip(completions, completion_ids, drawn, strict=True)]
        with self.stopwatch("score"), ExitStack() as precision:
            for scorer in self.reward_funcs:
                if isinstance(scorer, RewardScorer):  # functions of the user's run as they are
                    precision.enter_context(scorer.computing_under(self.accelerator.autocast))
            self._rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids)
        return self._rewards

    def _as_drawn(self, completion: Any, ids: list[int], drawn: list[int]) -> Any:
        """A completion with the special tokens in its text, which upstream leaves out."""
        text = plain_answer(completion)
        if text is None or text != self._tokenizer.decode(ids, skip_special_tokens=True):
            return completion  # a tool call or whatever else upstream parsed
        text = self._tokenizer.decode(drawn)
        return text if isinstance(completion, str) else [{**completion[0], "content": text}]

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Any,
        attention_mask: Any,
        logits_to_keep: int,
        batch_size: Any = None,
        **kwargs: Any,
    ) -> Any:
        compute_entropy, scored = kwargs.pop("compute_entropy", False), kwargs.pop("scored", None)
        if any(value is not None and value is not False for value in kwargs.values()):  # images, mixtures of experts
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **kwargs
            )
        if torch.is_grad_enabled() or compute_entropy:
            return *self._logps(model, input_ids, attention_mask, logits_to_keep, compute_entropy, scored), None

        if self.args.old_logps_from_sampler and model is self.model:
            return torch.zeros(attention_mask[:, -logits_to_keep:].shape, device=input_ids.device), None, None
        return self._rollout_logps(model, input_ids, attention_mask, logits_to_keep), None, None

    def _rollout_logps(
        self, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, width: int
    ) -> torch.Tensor:
        """log π (B, T) of a rollout, rows of similar length at a time."""

        def logps(rows: dict[str, Any]) -> torch.Tensor:
            ids = torch.cat([rows["prompt_ids"], rows["completion_ids"]], dim=1)
            mask = torch.cat([rows["prompt_mask"], rows["completion_mask"]], dim=1)
            return self._logps(model, ids, mask, rows["completion_ids"].size(1), scored=rows["loss_mask"])[0]

        sizes = [input_ids.size(1) - width, width]
        batch = dict(zip(("prompt_ids", "completion_ids"), input_ids.split(sizes, dim=1), strict=True))
        batch |= zip(("prompt_mask", "completion_mask"), attention_mask.split(sizes, dim=1), strict=True)
        batch["loss_mask"] = batch["completion_mask"]
        size = self.args.local_rollout_forward_batch_size
        return compute_by_length(batch, size, logps, by_count=is_sharding(self.accelerator))

    def _logps(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        width: int,
        compute_entropy: bool = False,
        scored: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """log π (B, T) of one forward, and entropies (B, T) or None: by TRL's fused head where that is compact."""
        if keeps_logits(self.model) and not fused_head_is_compact(self.accelerator.device):
            with self.accelerator.autocast():
                return completion_logps(
                    model, input_ids, attention_mask, width, self.temperature, compute_entropy, scored
                )
        if takes_positions(self.model):
            model = partial(model, position_ids=positions(attention_mask))
        return super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, width, compute_entropy=compute_entropy
        )[:2]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        # The KL from the reference is always reported, so the reference log-probs are always wanted: beta = 1 for now.
        beta, self.beta = self.beta, 1.0
        try:
            rollout = super()._generate_and_score_completions(inputs)
        finally:
            self.beta = beta
        rollout["loss_mask"] = rollout["completion_mask"] * rollout.pop("tool_mask", 1)
        if self.args.old_logps_from_sampler:
            rollout["old_per_token_logps"] = self._sampler_logps(rollout)
        elif "old_per_token_logps" not in rollout:
            rollout["old_per_token_logps"] = self._policy_logps(rollout)
        self._score_rollout(rollout)
        if self.model.training:
            self.divergence.judge_rollout(self)
            self._add_advantages(rollout)
        return rollout

    @torch.no_grad()
    def _policy_logps(self, rollout: dict[str, Any]) -> torch.Tensor:
        input_ids = torch.cat([rollout["prompt_ids"], rollout["completion_ids"]], dim=1)
        attention_mask = torch.cat([rollout["prompt_mask"], rollout["completion_mask"]], dim=1)
        width = rollout["completion_ids"].size(1)
        return self._rollout_logps(self.model, input_ids, attention_mask, width)

    def _sampler_logps(self, rollout: dict[str, Any]) -> torch.Tensor:
        """What the sampler drew with, (B, T); by a forward after all where it left a token without a number.

        Raises:
            ValueError: the sampler keeps no log-probs.
        """
        logps = rollout.get("sampling_per_token_logps")
        if logps is None:
            raise ValueError(
                "old_logps_from_sampler=True, but this sampler keeps no log-probs (continuous batching, images and a "
                "rollout_func without logprobs do not). Leave the option off."
            )
        mask = rollout["loss_mask"].bool()
        finite = logps[mask].isfinite().all().float()
        if self.accelerator.gather(finite).min() == 0:  # all processes or none: a sharded forward is a joint one
            return self._policy_logps(rollout)
        return logps.masked_fill(~mask, 0.0)

    def _score_answers(self, rollout: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """R of each answer, (B,), NaN where no reward function could score it; whether it ends with an EOS, (B,)."""
        rows, completions = len(rollout["completion_ids"]), rollout["completion_ids"]
        mine = slice(self.accelerator.process_index * rows, (self.accelerator.process_index + 1) * rows)
        rewards = self._rewards[mine]
        weights = self.reward_weights.to(rewards.device)
        scores = (rewards * weights).nansum(dim=1)
        # A function of weight 0 is logged only: where no other scored an answer, its score is no reward of 0.
        scored = scores.isfinite() & ~rewards[:, weights != 0].isnan().all(dim=1)
        ends = completions.gather(1, rollout["completion_mask"].sum(dim=1, keepdim=True) - 1)
        ended = torch.isin(ends.squeeze(1), torch.tensor(self.eos_token_ids, device=completions.device))
        if self.args.missing_eos_penalty is not None:
            scores = scores - self.args.missing_eos_penalty * ~ended
        return scores.masked_fill(~scored, float("nan")), ended

    def _score_rollout(self, rollout: dict[str, Any]) -> None:
        """Add `scores` (B,) and `kl` (B, T); mask out, and count, the rows that no reward function could score."""
        mask = rollout["loss_mask"]
        scores, ended = self._score_answers(rollout)
        scored = ~scores.isnan()
        rollout["scores"] = scores.masked_fill(~scored, 0.0)
        rollout["loss_mask"] = mask * scored.unsqueeze(1)
        logps, ref_logps = rollout["old_per_token_logps"], rollout["ref_per_token_logps"]
        rollout["kl"] = kl_estimate(logps, ref_logps, self.args.kl_estimator)
        sequence_kl = (kl_estimate(logps, ref_logps) * mask).sum(dim=1)
        self._log_means(
            {
                "score": rollout["scores"],
                "kl": sequence_kl,
                "objective": rollout["scores"] - self.beta * sequence_kl,
                "eos_rate": ended,
            },
            counted=scored,
        )
        self._log_means({"unscored_fraction": ~scored})
        if self.model.training:
            missing = self.accelerator.reduce((~scored).sum(), "sum").item()
            self._metrics["train"]["missing_rewards"].append(float(missing))
            self.any_scored = bool(self.any_scored) or missing < len(scored) * self.accelerator.num_processes

    def _add_advantages(self, rollout: dict[str, Any]) -> None:
        """Replace `advantages` by GAE's, (B, T), whitened over the whole rollout; add `old_values` and `returns`."""
        with self.stopwatch("value"):
            rows = {name: rollout[name] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")}
            size = self.args.local_rollout_forward_batch_size
            values = compute_by_length(rows, size, self.critic.rollout_values, by_count=is_sharding(self.accelerator))
        mask = rollout["completion_mask"]
        kl = rollout["kl"] * rollout["loss_mask"]  # a tool's words are not the policy's choice
        rewards = token_rewards(rollout["scores"], kl, mask, self.beta)
        advantages, returns = generalized_advantages(rewards, values, mask, self.args.discount, self.args.gae_lambda)
        scored = rollout["loss_mask"].any(dim=1)
        self._log_means(
            {
                "value": masked_mean(values, mask, dim=1)[scored],
                "return": masked_mean(returns, mask, dim=1)[scored],
            }
        )
        everyone = self._of_all_processes(values, returns, rollout["loss_mask"])
        self._metrics["train"]["explained_variance"].append(explained_variance(*everyone).item())
        if self.args.whiten_advantages:
            advantages = self._whiten(advantages, rollout["loss_mask"])
        self._log_advantages(masked_mean(advantages, rollout["loss_mask"], dim=1))
        rollout |= {"advantages": advantages, "old_values": values, "returns": returns}

    def _log_advantages(self, rows: torch.Tensor) -> None:
        """For `log_completions`: the mean advantage of each answer, (B,), in place of GRPO's, 0 without a group."""
        logged: Any = self._logs["advantages"]
        mine = self.accelerator.gather(rows).tolist()
        for _ in range(min(len(mine), len(logged))):
            logged.pop()
        logged.extend(mine)

    def _whiten(self, advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Whiten (B, T) over the real tokens of every process."""
        rows, width = advantages.shape
        advantages, mask = self._of_all_processes(advantages, mask)
        everyone = masked_whiten(advantages, mask)
        first = self.accelerator.process_index * rows
        return everyone[first : first + rows, :width]

    def _of_all_processes(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Tensors (B, T) of all processes as (processes × B, longest T), padded on the right with zeros."""
        return [self.accelerator.gather(self.accelerator.pad_across_processes(t, dim=1)) for t in tensors]

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is not before:
            self._buffered_inputs = arrange_minibatches(
                self._buffered_inputs, self.args.gradient_accumulation_steps, self.accelerator
            )
            inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]
        self._minibatch = inputs
        return inputs

    def _log_means(self, metrics: dict[str, torch.Tensor], counted: torch.Tensor | None = None) -> None:
        """Log the mean over all processes of each tensor (B,), of the rows `counted` (B,); show it to the guards."""
        for name, values in metrics.items():
            rows = values if counted is None else values[counted]
            totals = torch.stack([rows.detach().float().sum(), torch.tensor(float(rows.numel()), device=rows.device)])
            total, count = self.accelerator.reduce(totals, "sum").tolist()
            self._metrics["train"][name].append(total / count if count else float("nan"))
            self.divergence.observe(name, total, count)
