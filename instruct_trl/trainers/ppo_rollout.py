"""The plain functions of a PPO rollout: sample, hand over to reward functions, score, compute log-probs, whiten.

Legend: B rows of a batch, P prompt tokens, T completion tokens, F reward functions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from trl import GRPOTrainer

from instruct_trl._upstream import fused_head_is_compact
from instruct_trl.data.encoding import encode_prompt, ending_ids, plain_answer, same_tokens
from instruct_trl.maths.masking import masked_whiten
from instruct_trl.models.generation import RolloutGenerate, replaced_generate
from instruct_trl.models.logprobs import completion_logps, forward_takes, positions
from instruct_trl.models.reward import RewardScorer
from instruct_trl.trainers.engines import is_sharding
from instruct_trl.trainers.minibatches import ROW, Batch, compute_by_length, join_rows

# Sample ---------------------------------------------------------------------------------------------------------------


def settle_endings(trainer: GRPOTrainer) -> list[int]:
    """Let an answer end at any of `ending_ids`, and return them; upstream does not know the chat template's."""
    endings = ending_ids(trainer._tokenizer, trainer.accelerator.unwrap_model(trainer.model))
    if trainer.use_vllm:
        vllm: Any = trainer.vllm_generation
        vllm.generation_kwargs = {**(vllm.generation_kwargs or {}), "stop_token_ids": endings}
    else:
        trainer.generation_config.eos_token_id = trainer.generation_kwargs["eos_token_id"] = endings
    return endings


def encode_prompts(trainer: GRPOTrainer, prompts: list) -> list[list[int]]:
    """Token ids of prompts by the one encoder of this package: reward model and critic read the same tokens."""
    given: Any = trainer.chat_template_kwargs
    settings = {**given, "tools": trainer.tools or None, "chat_template": trainer.chat_template}
    options = {name: value for name, value in settings.items() if value is not None}
    return [encode_prompt(trainer._tokenizer, prompt, **options) for prompt in prompts]


def sample_by_length(
    prompt_ids: list[list[int]], size: int, sample: Callable[[list], list[list[int]]], generate: RolloutGenerate
) -> tuple[list[list[int]], list[list[float]] | None]:
    """Answers to prompts, `size` of similar length at a time, and the sampler's log-probs if `generate` keeps them.

    `sample` calls the `generate` method of the policy, for which `generate` stands in.
    """
    order = sorted(range(len(prompt_ids)), key=lambda row: len(prompt_ids[row]))
    answers, logps = list(prompt_ids), list[list[float]]([[]] * len(prompt_ids))
    for rows in (order[start : start + size] for start in range(0, len(order), size)):
        with replaced_generate(generate.model, generate):
            drawn = sample([prompt_ids[row] for row in rows])
        for row, ids, chances in zip(rows, drawn, generate.logps.tolist(), strict=True):
            answers[row], logps[row] = ids, chances[: len(ids)]
    return answers, None if generate.temperature is None else logps


# Score ----------------------------------------------------------------------------------------------------------------


def reads_prompt_ids(trainer: GRPOTrainer) -> bool:
    """True if every reward model can read the policy's own tokens of a prompt; one line names those that cannot."""
    tokenizer: Any = trainer._tokenizer
    template, hand_over = trainer.chat_template or tokenizer.chat_template, True
    for scorer in (func for func in trainer.reward_funcs if isinstance(func, RewardScorer)):
        own = scorer.processing_class
        same = same_tokens(own, tokenizer)
        if not same:
            scorer.say_text_is_read("its tokenizer is not the policy's")
        # The same special tokens, a BOS or none, must stand before a text.
        begins_alike = same and encode_prompt(own, "x") == encode_prompt(tokenizer, "x")
        hand_over = hand_over and begins_alike and own.chat_template == template
    return hand_over


def as_drawn(
    inputs: list[dict[str, Any]],
    completions: list,
    completion_ids: list[list[int]],
    prompt_ids: list[list[int]] | None,
    tokenizer: Any,
    endings: list[int],
) -> tuple[list[dict[str, Any]], list]:
    """Inputs and texts for the reward functions: adds `truncated` and `prompt_ids`; texts keep their special tokens.

    Whether an answer ended is known here, by the policy's own ending ids; another tokenizer would not find them.
    """
    ended = [len(ids) > 0 and int(ids[-1]) in endings for ids in completion_ids]
    inputs = [{**row, "truncated": not end} for row, end in zip(inputs, ended, strict=True)]
    if prompt_ids is not None:
        inputs = [{**row, "prompt_ids": ids} for row, ids in zip(inputs, prompt_ids, strict=True)]
    texts = []
    for completion, ids, end in zip(completions, completion_ids, ended, strict=True):
        text = plain_answer(completion)
        if text is not None and text == tokenizer.decode(ids, skip_special_tokens=True):  # else upstream parsed a tool
            text = tokenizer.decode(ids[:-1] if end else ids)
            completion = text if isinstance(completion, str) else [{**completion[0], "content": text}]
        texts.append(completion)
    return inputs, texts


def answer_scores(rewards: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Σ_f w_f·r_f of each answer, (B,), from rewards (B, F); NaN if no function that counts scored it."""
    weights = weights.to(rewards.device)
    scores = (rewards * weights).nansum(dim=1)
    # A function of weight 0 is only logged: its reward does not make the score of an unscored answer 0.
    scored = scores.isfinite() & ~rewards[:, weights != 0].isnan().all(dim=1)
    return scores.masked_fill(~scored, float("nan"))


def ends_in(endings: list[int], ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """True where the last real token of a row, (B, T) with mask (B, T), is one of `endings`; (B,)."""
    last = (mask.sum(dim=1, keepdim=True) - 1).clamp(min=0)  # a rollout_func may give no token
    return torch.isin(ids.gather(1, last).squeeze(1), torch.tensor(endings, device=ids.device))


# Log-probs ------------------------------------------------------------------------------------------------------------


def forward_logps(
    trainer: GRPOTrainer, model: Any, rows: Batch, entropy: bool, fused: Callable[..., Any]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log π (B, T) of one forward, and entropies (B, T) or None; by TRL's head, `fused`, if that one is compact."""
    input_ids, attention_mask = join_rows(rows)
    width = rows["completion_ids"].size(1)
    if forward_takes(trainer.model, "logits_to_keep") and not fused_head_is_compact(trainer.accelerator.device):
        with trainer.accelerator.autocast():
            scored = rows["loss_mask"]
            return completion_logps(model, input_ids, attention_mask, width, trainer.temperature, entropy, scored)
    if forward_takes(trainer.model, "position_ids"):
        model = partial(model, position_ids=positions(attention_mask))
    return fused(model, input_ids, attention_mask, width, compute_entropy=entropy)[:2]


def sampler_logps(rollout: Batch, accelerator: Accelerator, again: Callable[[Batch], torch.Tensor]) -> torch.Tensor:
    """The sampler's log-probs (B, T); recomputed by `again`, a forward, if any is missing.

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
    if accelerator.gather(finite).min() == 0:  # all processes or none: a sharded forward is a joint one
        return again(rollout)
    return logps.masked_fill(~mask, 0.0)


# Over all processes --------------------------------------------------------------------------------------------------


def of_all_processes(accelerator: Accelerator, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Tensors (B, T) of all processes as (processes × B, longest T), padded on the right with zeros."""
    return [accelerator.gather(accelerator.pad_across_processes(tensor, dim=1)) for tensor in tensors]


def whiten(accelerator: Accelerator, advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Whiten (B, T) over the real tokens of every process."""
    rows, width = advantages.shape
    values, masks = of_all_processes(accelerator, advantages, mask)
    everyone = masked_whiten(values, masks)
    first = accelerator.process_index * rows
    return everyone[first : first + rows, :width]


def log_advantages(logs: dict[str, Any], means: torch.Tensor) -> None:
    """Show mean advantages (B,) in the table of completions: GRPO's own are 0 for a group of one."""
    log = logs["advantages"]
    for _ in range(min(len(means), len(log))):
        log.pop()
    log.extend(means.tolist())


def by_length(trainer: GRPOTrainer, rollout: Batch, compute: Callable[[Batch], torch.Tensor]) -> torch.Tensor:
    """`compute`, (B, T), on the rows of a rollout, a few of similar length at a time."""
    args: Any = trainer.args
    rows = {name: rollout[name] for name in ROW} | {"loss_mask": rollout["completion_mask"]}
    by_count = is_sharding(trainer.accelerator)
    return compute_by_length(rows, args.local_rollout_forward_batch_size, compute, by_count=by_count)
