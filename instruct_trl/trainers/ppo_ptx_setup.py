"""What `PPOPtxTrainer` checks and builds before any training: policy, reference, reward functions, value model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from instruct_trl._upstream import without_init_kwargs
from instruct_trl.data.pairs import encode_prompt
from instruct_trl.models.loading import check_token_rows, load_tokenizer
from instruct_trl.models.model_files import check_model_path, tokenizer_beside
from instruct_trl.models.reward import RewardScorer
from instruct_trl.models.reward_functions import checked
from instruct_trl.models.role_adapters import ReferenceRole, RewardRole, RoleAdapters, ValueRole
from instruct_trl.models.value import ValueModel, value_model_from_reward_model
from instruct_trl.trainers.engines import is_sharding
from instruct_trl.trainers.ppo_ptx_config import PPOPtxConfig
from instruct_trl.trainers.starting_model import (
    check_something_trains,
    train_in_float32,
)

logger = logging.getLogger(__name__)


def check_pretraining(args: PPOPtxConfig, pretraining_dataset: Any) -> None:
    """Refuse γ > 0 without text.

    Raises:
        ValueError: `ptx_coef` is above 0 and there is no pretraining dataset.
    """
    if args.ptx_coef > 0 and pretraining_dataset is None:
        raise ValueError(
            f"ptx_coef={args.ptx_coef} needs pretraining_dataset= (a `text` or an `input_ids` column). For plain PPO "
            "set ptx_coef=0."
        )


def check_whole(**models: Any) -> None:
    """Refuse models that lie in ZeRO-3 shards already.

    Raises:
        ValueError: one of `models` does.
    """
    for name, model in models.items():
        if isinstance(model, torch.nn.Module) and any(hasattr(p, "ds_id") for p in model.parameters()):
            raise ValueError(
                f"{name} lies in ZeRO-3 shards, of which no copy can be made. Pass its path, load it after the "
                "PPOPtxConfig was created, or set zero3_init_flag: false."
            )


def load_policy_tokenizer(model: Any, roles: RoleAdapters | None, **kwargs: Any) -> Any:
    """The tokenizer that was saved with the policy, or with the adapters of `roles`, padding on the left.

    `kwargs` are those that a policy by path is going to be loaded with.

    Raises:
        ValueError: the policy is a path that does not exist, or a base of `roles` that has no name.
    """
    if roles is not None:
        path = roles.tokenizer_path
    else:
        path = model if isinstance(model, str) else model.config._name_or_path
        check_model_path(path, weights=isinstance(model, str), **kwargs)
    if not path:
        raise ValueError("The base of role_adapters was built in memory: pass its tokenizer as processing_class.")
    return load_tokenizer(path, padding_side="left", truncation_side="left")


def check_beside_roles(roles: RoleAdapters | None, args: PPOPtxConfig, **given: Any) -> None:
    """Refuse models, and configs to make them, beside `role_adapters`; and what would change the base under them.

    Raises:
        ValueError: one of `given` is not None (nor, as the policy, that of `roles`), vLLM on a base that is not in
            float32, or `cast_lm_head_to_fp32`.
    """
    if roles is None:
        return
    if args.cast_lm_head_to_fp32:
        raise ValueError(
            "cast_lm_head_to_fp32=True rewrites the head of the base, on which all roles of role_adapters stand. Leave "
            "it off; for logits in float32 load the base with dtype=torch.float32, and set bf16=False."
        )
    if args.use_vllm and (getattr(roles.model, "is_quantized", False) or roles.model.dtype != torch.float32):
        raise ValueError(
            "use_vllm merges the policy's adapter into the base and takes it out again at each iteration, which rounds "
            "a base that is not in float32, and all roles stand on it. Load it in float32, or leave vLLM off."
        )
    beside = [name for name, value in given.items() if value is not None and value is not roles.policy]
    if beside:
        raise ValueError(
            f"{', '.join(beside)}= and role_adapters= are given: policy, reference and critic are those of "
            "role_adapters. Leave it out (model=None), and give configs to RoleAdapters."
        )


@contextmanager
def as_upstream_must_see(
    args: PPOPtxConfig, with_peft: bool, roles: RoleAdapters | None, loaded: bool
) -> Iterator[None]:
    """The state in which GRPOTrainer's constructor leaves the models as they are.

    Where beta is not 0, it reloads the reference from the policy's path, which is the wrong model for a policy held in
    memory; and it keeps the adapters of a PEFT policy only where beta is not 0. On a 4-bit base it also rounds what is
    trained to bf16, by which a policy would differ from the reference that it is a copy of. `loaded` says that the
    policy was a path and is a model now.
    """
    beta, args.beta = args.beta, 1.0 if with_peft and roles is None else 0.0
    try:
        with without_init_kwargs(args, loaded), nullcontext() if roles is None else roles.frozen():
            yield
    finally:
        args.beta = beta


def check_engine_of_roles(accelerator: Accelerator) -> None:
    """Refuse roles where the shared base would be cut into shards.

    Raises:
        ValueError: DeepSpeed or FSDP.
    """
    if is_sharding(accelerator):
        raise ValueError(
            "role_adapters run on one process or several under DDP: DeepSpeed and FSDP would each take the shared base "
            "for two models. Launch with DDP, or give four models."
        )


def wrap_reward_funcs(reward_funcs: Any, processing_classes: Any, args: PPOPtxConfig) -> list[Any]:
    """Reward models, by path or in memory, become `RewardScorer`s; what other functions give is checked.

    Raises:
        ValueError: there is no reward function, or the tokenizers do not match them one to one.
    """
    funcs = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
    funcs = [func for func in funcs if func is not None]
    if not funcs:
        raise ValueError("reward_funcs is empty. Pass a reward model, its path, or a function (prompts, completions).")
    tokenizers = processing_classes if isinstance(processing_classes, list) else [processing_classes] * len(funcs)
    if len(tokenizers) != len(funcs):
        raise ValueError(f"reward_processing_classes has {len(tokenizers)} entries for {len(funcs)} reward functions.")
    kinds = (str, Path, PreTrainedModel, RewardRole)
    wrapped = [
        RewardScorer(
            func,
            tokenizer,
            batch_size=args.local_rollout_forward_batch_size,
            prefix_sharing="off" if isinstance(func, RewardRole) else "auto",  # what it attends by is not its own
        )
        if isinstance(func, kinds) or hasattr(func, "peft_config")
        else func
        if isinstance(func, (RewardScorer, torch.nn.Module))
        else checked(func)
        for func, tokenizer in zip(funcs, tokenizers, strict=True)
    ]
    scorers = [func for func in wrapped if isinstance(func, RewardScorer)]
    for scorer in scorers:
        check_whole(reward_funcs=scorer.model)
    if len(scorers) > 1:  # metrics are logged by name
        for number, scorer in enumerate(scorers, start=1):
            scorer.__name__ = f"reward_model_{number}"
    return wrapped


def resolve_value_model(
    value_model: Any, reward_funcs: list[Any], policy_tokenizer: Any, args: PPOPtxConfig
) -> ValueModel | ValueRole:
    """The critic: the one passed in, by path or in memory, or a copy of the one reward model among `reward_funcs`.

    Raises:
        ValueError: no reward model to copy, more than one, or one whose tokenizer is not the policy's; a value model
            that is frozen, carries adapters, or lacks rows for the policy's tokens.
    """
    scorers = [func for func in reward_funcs if isinstance(func, RewardScorer)]
    if isinstance(value_model, ValueRole):
        scorers = [scorer for scorer in scorers if isinstance(scorer.model, RewardRole)]
        for scorer in scorers:
            _check_tokens(scorer, policy_tokenizer)
        return value_model
    if value_model is not None:
        value_model = _as_value_model(value_model, args)
        check_token_rows(value_model.classifier, policy_tokenizer, "The value model")
        return value_model
    if len(scorers) != 1:
        raise ValueError(
            f"value_model is not given and reward_funcs holds {len(scorers)} reward models, so it is not clear "
            "what the critic starts from. Pass value_model=, e.g. value_model_from_reward_model(reward_model)."
        )
    _check_tokens(scorers[0], policy_tokenizer)
    value_model = value_model_from_reward_model(scorers[0].model)
    check_token_rows(value_model.classifier, policy_tokenizer, "The reward model, of which the critic is a copy,")
    return value_model


def check_reward_rows(reward_funcs: list[Any]) -> None:
    """Refuse reward models that lack rows for their tokenizer's tokens.

    Raises:
        ValueError: one does.
    """
    for func in reward_funcs:
        if isinstance(func, RewardScorer):
            is_role = isinstance(func.model, RewardRole)  # which masks the pad token away
            check_token_rows(func.model, func.processing_class, "The reward model", pad=not is_role)


def _as_value_model(given: Any, args: PPOPtxConfig) -> ValueModel:
    """A path, a classifier or a [`ValueModel`], all of it to be trained, in float32."""
    if isinstance(given, (str, Path)):
        return ValueModel.from_pretrained(given, trust_remote_code=args.trust_remote_code)
    value_model = given if isinstance(given, ValueModel) else ValueModel(given)
    check_something_trains(value_model, "value_model")
    return train_in_float32(value_model, "value_model", args)


def _check_tokens(scorer: RewardScorer, policy_tokenizer: Any) -> None:
    if not same_tokens(scorer.processing_class, policy_tokenizer):
        raise ValueError(
            f"The reward model's tokenizer ({scorer.processing_class.name_or_path}) differs from the policy's "
            f"({policy_tokenizer.name_or_path}), so its copy cannot read the policy's tokens. Pass value_model= "
            "with the policy's tokenizer."
        )


def same_tokens(first: Any, second: Any) -> bool:
    """True where every token that both tokenizers know has the same id, and they share all but added special ones."""
    one, two = first.get_vocab(), second.get_vocab()
    if first.pad_token_id == second.pad_token_id is not None:  # by whatever name, it is never read
        for vocabulary, tokenizer in ((one, first), (two, second)):
            vocabulary.pop(tokenizer.pad_token, None)
    small, large = sorted((one, two), key=len)
    return all(large.get(token) == index for token, index in small.items()) and len(large) - len(small) <= 16


def begins_alike(first: Any, second: Any) -> bool:
    """True where both tokenizers put the same special tokens, a BOS or none, before a text."""
    return encode_prompt(first, "x") == encode_prompt(second, "x")


def check_read_alike(policy_tokenizer: Any, **models: Any) -> None:
    """Refuse models that read the policy's tokens, and were saved beside a tokenizer of other ids.

    Args:
        policy_tokenizer: the policy's.
        models: by the name of their argument: a path, a model, or None.

    Raises:
        ValueError: naming the model, and a token whose id differs.
    """
    for name, model in models.items():
        if model is None or isinstance(model, (ValueRole, ReferenceRole)):
            continue
        path = str(model) if isinstance(model, (str, Path)) else model.config._name_or_path
        tokenizer = tokenizer_beside(path)
        if tokenizer is not None and not same_tokens(tokenizer, policy_tokenizer):
            raise ValueError(
                f"{name} ({path}) was saved beside a tokenizer that is not the policy's "
                f"({policy_tokenizer.name_or_path}): it would read the policy's token ids as other words. Pass a model "
                "with the policy's tokenizer."
            )


def say_plan(trainer: Any) -> None:
    """One line with the sizes that follow from the settings, before training starts."""
    args = trainer.args
    steps = args.steps_per_iteration
    iterations = args.max_steps // steps if args.max_steps > 0 else None
    plan = (
        f"PPO-ptx: rollout batch {args.generation_batch_size}, minibatch {args.minibatch_size}, "
        f"{steps} optimizer steps an iteration"
    )
    if iterations is not None:
        episodes = iterations * args.generation_batch_size
        plan += f", {iterations} iterations = {args.max_steps} steps = {episodes} episodes"
    plan += f"; γ = {args.ptx_coef}"
    if trainer.pretraining is not None:
        stream = trainer.pretraining.stream
        plan += f" on {stream.size or 'streamed'} pretraining texts, {args.ptx_ratio} an episode"
        if stream.truncated:
            limit = f"ptx_max_length={args.ptx_max_length}"
            if stream.max_length < args.ptx_max_length:
                limit = f"the policy's context of {stream.max_length}, below {limit}"
            plan += f" ({stream.truncated} cut at {limit} tokens)"
    trainer.accelerator.print(plan + ".")


def say_warmup(trainer: Any, steps: int) -> None:
    """One line where a run of `steps` ends before its warm-up does, so that no learning rate reaches its peak."""
    warmup = trainer.args.get_warmup_steps(steps)
    if warmup > steps:
        trainer.accelerator.print(
            f"PPO-ptx: the warm-up of {warmup} steps is longer than the run of {steps}: the learning rates end at "
            f"{steps / warmup:.0%} of their way up. Lower warmup_iterations (or warmup_steps), or train longer."
        )


def say_estimate(trainer: Any, seconds: float) -> None:
    """One line after the run's first iteration: how long the rest will take at its pace."""
    left = (trainer.args.max_steps - trainer.state.global_step - 1) // trainer.args.steps_per_iteration
    if left > 0:
        trainer.accelerator.print(
            f"PPO-ptx: the first iteration took {seconds:.0f} s; {left} to go, about {seconds * left / 60:.0f} min."
        )
