"""What RankingRewardTrainer asks of model, adapter and tokenizer before anything is loaded or tokenised."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from instruct_trl.models.reward_loading import (
    check_model_path,
    check_single_label,
    classifier_on_sft,
    ensure_distinct_pad_token,
    is_sft_adapter,
)
from instruct_trl.trainers.ranking_reward_config import RankingRewardConfig

logger = logging.getLogger(__name__)

HEAD_REMEDY = (
    "It would stay random in training and be another one after reload. Use LoraConfig(task_type='SEQ_CLS'), or "
    "modules_to_save=['score']."
)


def check_peft(model: Any, peft_config: Any) -> None:
    """Refuse adapters that leave the score head frozen, or that put virtual tokens before the text."""
    if peft_config is None:
        return
    if getattr(peft_config, "is_prompt_learning", False):
        raise ValueError(
            f"{type(peft_config).__name__} adds virtual tokens, which rankings do not support. Use LoraConfig."
        )
    trained = set(peft_config.modules_to_save or []) if hasattr(peft_config, "modules_to_save") else set()
    if peft_config.task_type != "SEQ_CLS" and not trained & {"score", "classifier"}:
        raise ValueError(f"`peft_config` freezes the score head. {HEAD_REMEDY}")


def load_on_sft(model: Any, peft_config: Any, args: RankingRewardConfig, quantization_config: Any) -> Any:
    """For a new adapter on the folder of an SFT adapter: its base, merged. Upstream would replace the SFT adapter.

    Raises:
        ValueError: on a quantised base.
    """
    if peft_config is None or not isinstance(model, str) or not is_sft_adapter(model):
        return model
    given: Any = args.model_init_kwargs or {}
    kwargs = {"trust_remote_code": args.trust_remote_code, "quantization_config": quantization_config, **given}
    return classifier_on_sft(model, **{name: value for name, value in kwargs.items() if value is not None})


def check_model(model: Any, args: RankingRewardConfig) -> None:
    """Refuse a path that is not there, and a reward model with more than one label."""
    if not isinstance(model, str):
        check_single_label(model.config, type(model).__name__)
        return
    check_model_path(model)
    if os.path.isfile(os.path.join(model, "adapter_config.json")):
        return
    # A causal LM's config has transformers' default of 2 labels; TRL gives it a new head with one.
    config = AutoConfig.from_pretrained(model, **_hub_options(args))
    if any(name.endswith("ForSequenceClassification") for name in config.architectures or []):
        check_single_label(config, f"The model {model!r}")


def _hub_options(args: RankingRewardConfig) -> dict[str, Any]:
    init = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    return {"revision": init.get("revision"), "trust_remote_code": args.trust_remote_code}


def load_tokenizer(name: str, args: RankingRewardConfig) -> Any:
    """The tokenizer beside the model `name`. Raises ValueError for a model that has no name."""
    if not name:
        raise ValueError("The model was built in memory: pass its tokenizer as processing_class.")
    return AutoTokenizer.from_pretrained(name, **_hub_options(args))


def prepare_tokenizer(tokenizer: Any, args: RankingRewardConfig, model: Any) -> str | None:
    """Settle EOS and pad before upstream does, which would pad with EOS. Returns the line to log."""
    vocabulary = tokenizer.get_vocab()
    if args.eos_token is not None and args.eos_token in vocabulary:  # one that is not there is upstream's error
        tokenizer.eos_token = args.eos_token
    if tokenizer.eos_token is None:
        raise ValueError(
            "The tokenizer has no EOS token, at which the reward is read. Name one of its tokens: "
            "RankingRewardConfig(eos_token=...) or processing_class.eos_token = ..."
        )
    if args.pad_token is not None and args.pad_token == tokenizer.eos_token:
        raise ValueError(
            f"pad_token={args.pad_token!r} is the EOS token. Leave pad_token unset: a distinct one is chosen."
        )
    if args.pad_token is not None and args.pad_token in vocabulary:
        tokenizer.pad_token = args.pad_token
    return ensure_distinct_pad_token(tokenizer, model)


def check_passes(trainer: Any) -> None:
    """Refuse what would make pieces of a batch, or two passes over it, give another gradient than the whole batch."""
    args = trainer.args
    if not (args.two_pass or args.max_tokens_per_batch):
        return
    name = "two_pass" if args.two_pass else "max_tokens_per_batch"
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ValueError(
            f"{name} is for one process or DDP: under DeepSpeed and FSDP all processes must run equally many forwards. "
            "Lower per_device_train_batch_size instead."
        )
    if args.two_pass and (rate := _largest_dropout(trainer.model)):
        raise ValueError(
            f"two_pass needs a model without dropout, since its second pass must give the rewards of the first; this "
            f"one has p={rate}, which disable_dropout does not reach. Set it to 0 in the model's config."
        )


def _largest_dropout(model: torch.nn.Module) -> float:
    """The largest dropout rate of any layer, also where the architecture calls it as a function (OPT)."""
    rates = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    for module in model.modules():
        rates += [value for name, value in vars(module).items() if "dropout" in name and isinstance(value, float)]
    return max(rates, default=0.0)


def say(args: RankingRewardConfig, line: str | None) -> None:
    """One line for the user, from one process. A warning, since Python's logging hides anything less by default."""
    if line and args.process_index == 0:
        logger.warning(line)
