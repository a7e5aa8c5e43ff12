"""Policy and reference of `PPOPtxTrainer`: from what was handed in, a path or a model, to what trains.

An adapter goes on training, and the reference is then the policy as it was.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from transformers import AutoConfig

from instruct_trl.models.adapters import adapter_parameters
from instruct_trl.models.loading import check_token_rows, load_causal_model
from instruct_trl.models.role_adapters import RoleAdapters
from instruct_trl.models.value import merged
from instruct_trl.trainers.ppo_ptx_config import PPOPtxConfig
from instruct_trl.trainers.starting_model import (
    check_adapters,
    keep_adapters_in_float32,
    load_adapter_to_train,
    loading_kwargs,
    settle_model_kwargs,
    train_in_float32,
    trained_beside_a_base,
)


def has_adapters(model: Any, peft_config: Any) -> bool:
    """Whether the policy, a path or a model, is or will be a PEFT model."""
    return peft_config is not None or (not isinstance(model, str) and is_peft_model(model))


def _check_head_of_adapters(args: PPOPtxConfig, policy: Any) -> None:
    """Refuse `cast_lm_head_to_fp32` where upstream fails at it: adapters on a model whose head is its embedding.

    Raises:
        ValueError: such a policy.
    """
    if args.cast_lm_head_to_fp32:
        config = AutoConfig.from_pretrained(policy) if isinstance(policy, str) else policy.config
        if config.tie_word_embeddings:
            raise ValueError(
                "cast_lm_head_to_fp32=True does not work with adapters on a model whose head is its embedding "
                "(tie_word_embeddings): upstream does not find the embedding below them. Leave it off."
            )


def load_policy(model: Any, args: PPOPtxConfig, quantization_config: Any, peft_config: Any) -> Any:
    """A path becomes a float32 model here, so that the reference can be its copy; new adapters are put on by upstream.

    Raises:
        ValueError: the path does not exist; it is to be quantised, and no adapter is there to train; adapters beside
            `cast_lm_head_to_fp32` on a tied head; or adapters that are frozen.
    """
    settle_model_kwargs(args, trained_beside_a_base(model, peft_config))
    check_adapters(model, peft_config, "The policy")
    policy = load_adapter_to_train(model, args, quantization_config)
    if has_adapters(policy, peft_config):
        _check_head_of_adapters(args, policy)
    if isinstance(policy, str) and peft_config is None:
        if quantization_config is not None:
            raise ValueError(
                "quantization_config needs peft_config: quantised weights do not train, adapters on them do."
            )
        return load_causal_model(policy, **loading_kwargs(args))  # in float32, or in the precision that was asked for
    return train_in_float32(policy, "The policy", args, peft_config)


def settle_policy(model: Any, tokenizer: Any, roles: RoleAdapters | None) -> None:
    """Checks and casts of the policy once upstream has put adapters on it, and has made a reference of old ones.

    Upstream copies of an adapter's weights those whose names hold it between dots, so not those of single tokens.

    Raises:
        ValueError: the tokenizer has tokens that the policy has no rows for.
    """
    check_token_rows(model, tokenizer, "The policy")
    if roles is not None:  # which keep their own weights
        return
    keep_adapters_in_float32(model)
    if "ref" in getattr(model, "peft_config", {}):
        own, copies = adapter_parameters(model, "default"), adapter_parameters(model, "ref")
        for (_, source), (_, target) in zip(own.items(), copies.items(), strict=True):
            target.data.copy_(source.data)


def resolve_reference(policy: Any, ref_model: Any, with_peft: bool, args: PPOPtxConfig) -> Any:
    """The reference of the KL: the one passed in, or a frozen copy of the policy, made before TRL patches its forward.

    None with PEFT: the reference is then the base, with the adapters off or as they were.

    Raises:
        ValueError: it is the policy itself, which would be frozen; or a path that does not exist.
    """
    if ref_model is policy:
        raise ValueError("ref_model is the policy itself. Leave it out: a frozen copy of the policy is made.")
    if isinstance(ref_model, (str, Path)):
        return merged(load_causal_model(ref_model, **loading_kwargs(args)))
    if ref_model is None and not with_peft:
        reference = copy.deepcopy(policy).requires_grad_(False)
        # A trainer before may have set a forward of its own on the policy; copied, it would go on calling the policy.
        vars(reference).pop("forward", None)
        return reference
    return ref_model
