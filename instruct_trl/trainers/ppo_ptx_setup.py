"""Before `PPOPtxTrainer` trains: checks, models made from what was handed in, and lines that say what will run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel
from trl import GRPOTrainer

from instruct_trl._upstream import (
    keep_4bit_trainable,
    keep_head_out_of_autocast,
    match_adapters_to_precision,
    prepare_reference,
    without_init_kwargs,
)
from instruct_trl.data.encoding import require_eos, same_tokens
from instruct_trl.data.pretraining import PretrainingStream
from instruct_trl.models.adapters import adapter_parameters, has_adapters
from instruct_trl.models.context import context_length
from instruct_trl.models.dropout import switch_off_dropout
from instruct_trl.models.loading import check_token_rows, load_causal_model
from instruct_trl.models.model_files import check_model_path, has_tokenizer, load_tokenizer, tokenizer_source
from instruct_trl.models.reward import RewardScorer
from instruct_trl.models.reward_functions import checked
from instruct_trl.models.role_adapters import ReferenceRole, RewardRole, RoleAdapters, ValueRole
from instruct_trl.models.value import ValueModel, merged, value_model_from_reward_model
from instruct_trl.trainers import starting_model
from instruct_trl.trainers.engines import check_engine, is_sharding
from instruct_trl.trainers.ppo_ptx_config import PPOPtxConfig
from instruct_trl.trainers.pretraining_gradient import PretrainingGradient


@dataclass
class Models:
    """The models of a run: as the user hands them over, with the configs to make them; then complete."""

    model: Any  # the policy
    value_model: Any = None
    ref_model: Any = None  # when complete: None means the policy with its adapters off, or as they were at the start
    peft_config: Any = None
    quantization_config: Any = None
    roles: RoleAdapters | None = None
    reward_funcs: Any = None
    tokenizer: Any = None
    loaded: bool = False  # the policy was given as a path


def complete_models(models: Models, reward_tokenizers: Any, args: PPOPtxConfig) -> None:
    """Make policy, reference, reward functions and critic of what was handed over, and check them against each other.

    Raises:
        ValueError: naming the argument and the remedy.
    """
    check_whole(model=models.model, value_model=models.value_model, ref_model=models.ref_model)
    roles = models.roles
    if roles is not None:
        check_beside_roles(models, roles, args)
        models.model, models.value_model, models.ref_model = roles.policy, roles.value, roles.reference
        models.reward_funcs = roles.reward if models.reward_funcs is None else models.reward_funcs
    kwargs = starting_model.loading_kwargs(args)
    tokenizer = models.tokenizer = models.tokenizer or load_policy_tokenizer(models.model, roles, **kwargs)
    require_eos(tokenizer)
    models.reward_funcs = wrap_reward_funcs(models.reward_funcs, reward_tokenizers, args)
    for name in ("value_model", "ref_model"):
        reader = getattr(models, name)
        if reader is not None and not isinstance(reader, (ValueRole, ReferenceRole)):
            path = str(reader) if isinstance(reader, (str, Path)) else reader.config._name_or_path
            if has_tokenizer(tokenizer_source(path)):
                check_same_tokens(load_tokenizer(path), tokenizer, f"{name} ({path})", name)
    models.value_model = resolve_value_model(models.value_model, models.reward_funcs, tokenizer, args)
    for scorer in (func for func in models.reward_funcs if isinstance(func, RewardScorer)):
        is_role = isinstance(scorer.model, RewardRole)  # it masks the pad token away
        check_token_rows(scorer.model, scorer.processing_class, "The reward model", pad=not is_role)
    policy = load_policy(models.model, args, models.quantization_config, models.peft_config)
    models.loaded, models.model = policy is not models.model, policy
    with_peft = has_adapters(policy, models.peft_config)
    models.ref_model = resolve_reference(policy, models.ref_model, with_peft, args)


# Checks ---------------------------------------------------------------------------------------------------------------


def check_pretraining(args: PPOPtxConfig, pretraining_dataset: Any) -> None:
    """Refuse γ > 0 without text."""
    if args.ptx_coef > 0 and pretraining_dataset is None:
        raise ValueError(
            f"ptx_coef={args.ptx_coef} needs pretraining_dataset= (a `text` or an `input_ids` column). For plain PPO "
            "set ptx_coef=0."
        )


def check_whole(**models: Any) -> None:
    """Refuse models that lie in ZeRO-3 shards already."""
    for name, model in models.items():
        if isinstance(model, torch.nn.Module) and any(hasattr(p, "ds_id") for p in model.parameters()):
            raise ValueError(
                f"{name} lies in ZeRO-3 shards, of which no copy can be made. Pass its path, load it after the "
                "PPOPtxConfig was created, or set zero3_init_flag: false."
            )


def check_beside_roles(models: Models, roles: RoleAdapters, args: PPOPtxConfig) -> None:
    """Refuse models, and configs to make them, beside `roles`; and what would change the base under them."""
    if args.cast_lm_head_to_fp32:
        raise ValueError(
            "cast_lm_head_to_fp32=True rewrites the head of the base, on which all roles of role_adapters stand. Leave "
            "it off; for logits in float32 load the base with dtype=torch.float32, and set bf16=False."
        )
    if args.use_vllm and (getattr(roles.model, "is_quantized", False) or roles.model.dtype != torch.float32):
        raise ValueError(
            "use_vllm merges the policy's adapter into the base at each iteration and takes it out again. This rounds "
            "a base that is not in float32, and all roles stand on it. Load it in float32, or leave vLLM off."
        )
    given = ("model", "value_model", "ref_model", "peft_config", "quantization_config")
    names = [name for name in given if getattr(models, name) not in (None, roles.policy)]
    if names:
        raise ValueError(
            f"{', '.join(names)}= and role_adapters= are given: policy, reference and critic are those of "
            "role_adapters. Leave it out (model=None), and give configs to RoleAdapters."
        )


def check_same_tokens(tokenizer: Any, policy_tokenizer: Any, owner: str, argument: str) -> None:
    """Refuse a model whose tokenizer has other ids than the policy's."""
    if not same_tokens(tokenizer, policy_tokenizer):
        raise ValueError(
            f"{owner} has a tokenizer ({tokenizer.name_or_path}) that is not the policy's "
            f"({policy_tokenizer.name_or_path}): it would read the policy's token ids as other words. Pass as "
            f"{argument}= a model with the policy's tokenizer."
        )


# Policy and reference -------------------------------------------------------------------------------------------------


def load_policy_tokenizer(model: Any, roles: RoleAdapters | None, **kwargs: Any) -> Any:
    """The tokenizer saved with the policy (`kwargs`: of its loading), or with the adapters of `roles`."""
    if roles is not None:
        path = roles.tokenizer_path
    else:
        path = model if isinstance(model, str) else model.config._name_or_path
        check_model_path(path, weights=isinstance(model, str), **kwargs)
    if not path:
        raise ValueError("The base of role_adapters was built in memory: pass its tokenizer as processing_class.")
    return load_tokenizer(path, padding_side="left", truncation_side="left")


def load_policy(model: Any, args: PPOPtxConfig, quantization_config: Any, peft_config: Any) -> Any:
    """A path becomes a float32 model here, so that the reference can be its copy; upstream puts new adapters on it."""
    starting_model.settle_model_kwargs(args, has_adapters(model, peft_config))
    starting_model.check_adapters(model, peft_config, "The policy")
    policy = starting_model.load_adapter_to_train(model, args, quantization_config)
    if args.cast_lm_head_to_fp32 and has_adapters(policy, peft_config):
        config = AutoConfig.from_pretrained(policy) if isinstance(policy, str) else policy.config
        if config.tie_word_embeddings:
            raise ValueError(
                "cast_lm_head_to_fp32=True does not work with adapters on a model whose head is its embedding "
                "(tie_word_embeddings): upstream does not find the embedding below them. Leave it off."
            )
    if isinstance(policy, str) and peft_config is None:
        if quantization_config is not None:
            raise ValueError(
                "quantization_config needs peft_config: quantised weights do not train, adapters on them do."
            )
        return load_causal_model(policy, **starting_model.loading_kwargs(args))
    return starting_model.train_in_float32(policy, "The policy", args, peft_config)


def resolve_reference(policy: Any, ref_model: Any, with_peft: bool, args: PPOPtxConfig) -> Any:
    """The reference of the KL: the one passed in, or a frozen copy of the policy, made before TRL patches its forward.

    None with PEFT: the reference is then the base, with the adapters off or as they were.
    """
    if ref_model is policy:
        raise ValueError("ref_model is the policy itself. Leave it out: a frozen copy of the policy is made.")
    if isinstance(ref_model, (str, Path)):
        return merged(load_causal_model(ref_model, **starting_model.loading_kwargs(args)))
    if ref_model is None and not with_peft:
        reference = copy.deepcopy(policy).requires_grad_(False)
        # A trainer before may have set a forward of its own on the policy; copied, it would go on calling the policy.
        vars(reference).pop("forward", None)
        return reference
    return ref_model


@contextmanager
def as_upstream_must_see(args: PPOPtxConfig, models: Models) -> Iterator[None]:
    """While active, GRPOTrainer's constructor leaves the models as they are.

    With beta > 0 it reloads the reference from the policy's path, which is the wrong model for a policy held in memory;
    but it keeps the adapters of a PEFT policy only with beta > 0. On a 4-bit base it also rounds what is trained to
    bf16, and the policy would differ from the reference that it is a copy of.
    """
    with_peft = has_adapters(models.model, models.peft_config)
    beta, args.beta = args.beta, 1.0 if with_peft and models.roles is None else 0.0
    try:
        with without_init_kwargs(args, models.loaded), nullcontext() if models.roles is None else models.roles.frozen():
            yield
    finally:
        args.beta = beta


def settle_models(trainer: GRPOTrainer, models: Models) -> Any:
    """Place, cast and check the models once upstream has put adapters on the policy; returns the reference."""
    args: Any = trainer.args
    policy: Any = trainer.model
    roles, reference = models.roles, models.ref_model
    check_engine(trainer.accelerator)
    keep_4bit_trainable(policy)
    check_token_rows(policy, trainer._tokenizer, "The policy")
    if roles is None:  # roles keep their own weights
        starting_model.keep_adapters_in_float32(policy)
        if "ref" in getattr(policy, "peft_config", {}):
            # Upstream copies weights whose names hold the adapter's between dots, so not those of single tokens.
            own, copies = adapter_parameters(policy, "default"), adapter_parameters(policy, "ref")
            for (_, source), (_, target) in zip(own.items(), copies.items(), strict=True):
                target.data.copy_(source.data)
    starting_model.place_reward_models(trainer.reward_funcs, trainer.accelerator.device)
    if args.cast_lm_head_to_fp32:
        keep_head_out_of_autocast(trainer, policy)
    match_adapters_to_precision(policy, args.bf16)
    if roles is not None:
        if is_sharding(trainer.accelerator):
            raise ValueError(
                "role_adapters run on one process or several under DDP: DeepSpeed and FSDP would each take the shared "
                "base for two models. Launch with DDP, or give four models."
            )
        roles.to(trainer.accelerator.device)
    elif reference is not None:
        reference = prepare_reference(trainer, reference)
    if args.old_logps_from_sampler and reference is None:
        raise ValueError(
            "old_logps_from_sampler needs a reference model of its own; with PEFT it is the policy without its "
            "adapter. Pass ref_model= or leave the option off."
        )
    if args.disable_dropout:
        switch_off_dropout(policy)
        switch_off_dropout(models.value_model)
    return reference


# Reward functions, critic, pretraining texts --------------------------------------------------------------------------


def wrap_reward_funcs(reward_funcs: Any, processing_classes: Any, args: PPOPtxConfig) -> list[Any]:
    """Reward models, by path or in memory, become `RewardScorer`s; other functions have their rewards checked."""
    funcs = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
    funcs = [func for func in funcs if func is not None]
    if not funcs:
        raise ValueError("reward_funcs is empty. Pass a reward model, its path, or a function (prompts, completions).")
    tokenizers = processing_classes if isinstance(processing_classes, list) else [processing_classes] * len(funcs)
    if len(tokenizers) != len(funcs):
        raise ValueError(f"reward_processing_classes has {len(tokenizers)} entries for {len(funcs)} reward functions.")
    size, wrapped = args.local_rollout_forward_batch_size, []
    for func, tokenizer in zip(funcs, tokenizers, strict=True):
        if isinstance(func, (str, Path, PreTrainedModel, RewardRole)) or has_adapters(func):
            sharing = "off" if isinstance(func, RewardRole) else "auto"  # a role attends as its base does
            func = RewardScorer(func, tokenizer, batch_size=size, prefix_sharing=sharing)
        elif not isinstance(func, (RewardScorer, torch.nn.Module)):
            func = checked(func)
        wrapped.append(func)
    scorers = [func for func in wrapped if isinstance(func, RewardScorer)]
    for number, scorer in enumerate(scorers, start=1):
        check_whole(reward_funcs=scorer.model)
        if len(scorers) > 1:  # metrics are logged by name
            scorer.__name__ = f"reward_model_{number}"
    return wrapped


def resolve_value_model(
    value_model: Any, reward_funcs: list[Any], policy_tokenizer: Any, args: PPOPtxConfig
) -> ValueModel | ValueRole:
    """The critic: the one passed in, by path or in memory, or a copy of the one reward model among `reward_funcs`.

    Raises:
        ValueError: it is not clear which reward model to copy; or the critic could not read the policy's tokens.
    """
    scorers = [func for func in reward_funcs if isinstance(func, RewardScorer)]
    is_role = isinstance(value_model, ValueRole)
    name = "The reward model, of which the critic is a copy," if value_model is None or is_role else "The value model"
    if value_model is None and len(scorers) != 1:
        raise ValueError(
            f"value_model is not given and reward_funcs holds {len(scorers)} reward models, so it is not clear "
            "what the critic starts from. Pass value_model=, e.g. value_model_from_reward_model(reward_model)."
        )
    for scorer in scorers:
        if value_model is None or (is_role and isinstance(scorer.model, RewardRole)):
            check_same_tokens(scorer.processing_class, policy_tokenizer, name, "value_model")
    if is_role:
        return value_model
    if value_model is None:
        critic = value_model_from_reward_model(scorers[0].model)
    elif isinstance(value_model, (str, Path)):
        critic = ValueModel.from_pretrained(value_model, trust_remote_code=args.trust_remote_code)
    else:
        critic = value_model if isinstance(value_model, ValueModel) else ValueModel(value_model)
        starting_model.check_something_trains(critic, "value_model")
        critic = starting_model.train_in_float32(critic, "value_model", args)
    check_token_rows(critic.classifier, policy_tokenizer, name)
    return critic


def pretraining_gradient(trainer: GRPOTrainer, dataset: Any) -> PretrainingGradient | None:
    """The γ term of Eq. 2 over the texts of `dataset`; None for γ = 0."""
    args: Any = trainer.args
    if args.ptx_coef == 0:
        return None
    length, seed = args.ptx_max_length, args.seed if args.data_seed is None else args.data_seed
    length = min(length, context_length(trainer.model) or length)
    ranks = {"rank": args.process_index, "world_size": args.world_size}
    with args.main_process_first(desc="tokenizing the pretraining texts"):  # the others then read its cache
        texts = PretrainingStream(dataset, trainer._tokenizer, max_length=length, seed=seed, **ranks)
    return PretrainingGradient(texts, args, trainer.accelerator, trainer.compute_loss_context_manager)


# What is printed ------------------------------------------------------------------------------------------------------


def say_plan(args: PPOPtxConfig, pretraining: PretrainingGradient | None, say: Callable[[str], None]) -> None:
    """Print the sizes that follow from the settings, before training starts."""
    steps = args.steps_per_iteration
    plan = (
        f"PPO-ptx: rollout batch {args.generation_batch_size}, minibatch {args.minibatch_size}, "
        f"{steps} optimizer step{'' if steps == 1 else 's'} per iteration"
    )
    if args.max_steps > 0:
        iterations = args.max_steps // steps
        episodes = iterations * args.generation_batch_size
        plan += ", " + " = ".join(
            f"{number} {unit}{'' if number == 1 else 's'}"
            for number, unit in ((iterations, "iteration"), (args.max_steps, "step"), (episodes, "episode"))
        )
    plan += f"; γ = {args.ptx_coef}"
    if pretraining is not None:
        texts = pretraining.stream
        plan += f" on {texts.size or 'streamed'} pretraining texts, {args.ptx_ratio} per episode"
        if texts.truncated:
            limit = f"ptx_max_length={args.ptx_max_length}"
            if texts.max_length < args.ptx_max_length:
                limit = f"the policy's context of {texts.max_length}, below {limit}"
            plan += f" ({texts.truncated} cut at {limit} tokens)"
    say(plan + ".")


def say_warmup(args: PPOPtxConfig, steps: int, say: Callable[[str], None]) -> None:
    """Print a warning if a run of `steps` ends before its warm-up does."""
    warmup = args.get_warmup_steps(steps)
    if warmup > steps:
        say(
            f"PPO-ptx: the warm-up of {warmup} steps is longer than the run of {steps}: the learning rates end at "
            f"{steps / warmup:.0%} of their way up. Lower warmup_iterations (or warmup_steps), or train longer."
        )
