"""What RankingRewardTrainer asks of model, adapter and tokenizer before anything is loaded or tokenised."""

from __future__ import annotations

import logging
from typing import Any

from transformers import AutoConfig, AutoTokenizer, set_seed

from instruct_trl._upstream import create_classifier, score_head
from instruct_trl.models.loading import (
    check_single_label,
    classifier_on_sft,
    ensure_distinct_pad_token,
    fit_model_to_tokenizer,
    load_reward_model,
    rows_for,
)
from instruct_trl.models.model_files import check_model_path, is_sft_adapter, names_adapter, tokenizer_source
from instruct_trl.trainers.ranking_reward_config import RankingRewardConfig
from instruct_trl.trainers.starting_model import (
    check_adapters,
    check_peft_config,
    check_something_trains,
    loading_kwargs,
)

logger = logging.getLogger(__name__)

HEAD_REMEDY = (
    "It would stay random in training and be another one after reload. Use LoraConfig(task_type='SEQ_CLS'), or "
    "modules_to_save=['score']."
)
LONG_ROWS = (
    "Set max_length={context}, by which longer completions are dropped and counted, shorten the texts, or take a model "
    "with a longer context."
)


def check_peft(model: Any, peft_config: Any) -> None:
    """Refuse adapters that do not train or leave the score head frozen, or that put virtual tokens before the text."""
    if peft_config is None:
        if hasattr(model, "peft_config"):
            check_something_trains(model, "The reward model", but=score_head(model).parameters())
        return
    check_peft_config(peft_config)
    if getattr(peft_config, "is_prompt_learning", False):
        raise ValueError(
            f"{type(peft_config).__name__} adds virtual tokens, which rankings do not support. Use LoraConfig."
        )
    trained = set(peft_config.modules_to_save or []) if hasattr(peft_config, "modules_to_save") else set()
    if peft_config.task_type != "SEQ_CLS" and not trained & {"score", "classifier"}:
        raise ValueError(f"`peft_config` freezes the score head. {HEAD_REMEDY}")


def load_adapter(model: Any, peft_config: Any, args: RankingRewardConfig, quantization_config: Any) -> Any:
    """The folder of an adapter becomes the model that training starts from; anything else is returned as it is.

    A reward adapter goes on training. A new adapter on an SFT adapter stands on its base, merged: upstream would
    replace the SFT adapter.

    Raises:
        ValueError: a new adapter on a reward adapter, none on an SFT adapter, or an SFT adapter on a quantised base.
    """
    if not isinstance(model, str) or not names_adapter(model):
        return model
    kwargs = loading_kwargs(args, quantization_config)
    if not is_sft_adapter(model):
        check_adapters(model, peft_config, "The reward model")
        return load_reward_model(model, trainable=True, **kwargs)[0]
    if peft_config is None:
        raise ValueError(
            f"{model!r} is the adapter of a language model. Pass peft_config=LoraConfig(task_type='SEQ_CLS', ...), and "
            "a new adapter is trained on it; or merge it (merge_and_unload), and give the merged model."
        )
    return classifier_on_sft(model, **kwargs)


def load_grown(
    model: Any, peft_config: Any, args: RankingRewardConfig, quantization_config: Any, tokenizer: Any
) -> Any:
    """For adapters on a base by name that lacks rows for the tokenizer: the base, grown before they lie on it.

    Anything else is returned as it is.
    """
    if not isinstance(model, str) or peft_config is None:
        return model
    if AutoConfig.from_pretrained(model, **_hub_options(args)).get_text_config().vocab_size >= rows_for(tokenizer):
        return model
    set_seed(args.seed)
    base = create_classifier(model, **loading_kwargs(args, quantization_config))
    fit_model_to_tokenizer(base, tokenizer)
    return base


def check_model(model: Any, args: RankingRewardConfig) -> None:
    """Refuse a path that is not there, and a reward model with more than one label."""
    if not isinstance(model, str):
        check_single_label(model.config, type(model).__name__)
        return
    check_model_path(model, **loading_kwargs(args))
    if names_adapter(model):
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
    return AutoTokenizer.from_pretrained(tokenizer_source(name), **_hub_options(args))


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


def say(args: RankingRewardConfig, line: str | None) -> None:
    """One line for the user, from one process. A warning, since Python's logging hides anything less by default."""
    if line and args.process_index == 0:
        logger.warning(line)
