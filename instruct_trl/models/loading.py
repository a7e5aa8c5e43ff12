"""Language models and reward models from a folder or the hub, whole or an adapter on its base, and their tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from instruct_trl._upstream import keep_4bit_trainable, score_head, suppress_seqcls_warning
from instruct_trl.models.adapters import put_adapter_on, resize_token_rows, token_rows
from instruct_trl.models.model_files import (
    adapter_config,
    base_of_adapter,
    check_model_path,
    is_sft_adapter,
    load_tokenizer,
    names_adapter,
    read_reward_config,
)
from instruct_trl.models.precision import is_quantised, one_dtype

# Special tokens that tokenizers carry for padding or leave unused, in order of preference.
_PAD_CANDIDATES = ("<|endoftext|>", "<pad>", "<|pad|>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>")
# Tokens that stand for what is no text: Gemma 3's tokenizer has one for pictures, and its model of 1B no row for it.
_PLACEHOLDERS = ("image_token", "video_token", "audio_token")


# Language models ----------------------------------------------------------------------------------------------------


def load_causal_model(path: str | Path, *, trainable: bool = False, **kwargs: Any) -> Any:
    """A causal language model, or an adapter on its base, with the token rows that the adapter was trained with.

    `kwargs` are for `from_pretrained`; `dtype` is float32 unless given. With `trainable` an adapter goes on training.

    Raises:
        ValueError: no such path; an adapter of a reward model, or one that does not fit its base.
    """
    path = str(path)
    # transformers loads a bf16 checkpoint in bf16, in which small steps of an optimizer are lost.
    kwargs = {"dtype": "float32", **(one_dtype(kwargs, "kwargs") or {})}
    check_model_path(path, **kwargs)
    if not names_adapter(path):
        check_causal(path, **kwargs)
        return AutoModelForCausalLM.from_pretrained(path, **kwargs)
    if not is_sft_adapter(path):
        raise ValueError(
            f"{path!r} is the adapter of a reward model (task_type 'SEQ_CLS'), not of a language model. Give the "
            "folder that SFT saved."
        )
    base = base_of_adapter(path)
    check_model_path(base)
    model = AutoModelForCausalLM.from_pretrained(base, **{**kwargs, "revision": adapter_config(path).revision})
    return put_adapter_on(model, path, trainable=trainable)


def check_causal(path: str | Path, **kwargs: Any) -> None:
    """Raise ValueError for a classifier, such as a reward model, in a language model's place (no adapter).

    Of `kwargs`, which are those of `from_pretrained`, those count that say where the model lies.
    """
    where = {name: kwargs[name] for name in ("revision", "subfolder", "token", "trust_remote_code") if kwargs.get(name)}
    kinds = [] if kwargs.get("gguf_file") else AutoConfig.from_pretrained(path, **where).architectures or []
    if any("Classification" in kind for kind in kinds):
        raise ValueError(
            f"{str(path)!r} is a classifier ({', '.join(kinds)}), such as a reward model: as a language model it would "
            "draw random words. Give the folder of the policy or of the SFT model."
        )


def load_policy_and_tokenizer(path: str | Path, processing_class: Any = None) -> tuple[Any, Any]:
    """As `load_causal_model`, in eval mode, and its tokenizer, whose tokens it has rows for."""
    model = load_causal_model(path)
    tokenizer = processing_class or load_tokenizer(path)
    check_token_rows(model, tokenizer, f"The model {str(path)!r}")
    return model.eval(), tokenizer


# Reward models ------------------------------------------------------------------------------------------------------


def load_reward_model(path: str | Path, *, trainable: bool = False, **kwargs: Any) -> tuple[Any, Any]:
    """Read a trained reward model, or the folder of its PEFT adapter, with its tokenizer and its `reward_bias`.

    `kwargs` are for `from_pretrained` (dtype, device_map, revision, ...). The model comes in eval mode; with
    `trainable` its adapter goes on training.

    Raises:
        ValueError: no such path, more than one label, an adapter without the trained head, or a tokenizer that does not
            fit.
    """
    path, kwargs = str(path), one_dtype(kwargs, "kwargs") or {}
    check_model_path(path, **kwargs)
    shared = {key: kwargs[key] for key in ("revision", "trust_remote_code", "token") if key in kwargs}
    tokenizer = load_tokenizer(path, **shared)
    if names_adapter(path):
        model = _load_reward_adapter(path, tokenizer, trainable, kwargs)
    else:
        check_single_label(AutoConfig.from_pretrained(path, **shared), f"The reward model {path!r}")
        model = AutoModelForSequenceClassification.from_pretrained(path, **kwargs)
    check_token_rows(model, tokenizer, f"The reward model {path!r}")
    return model.eval(), tokenizer


def _load_reward_adapter(path: str, tokenizer: Any, trainable: bool, kwargs: dict[str, Any]) -> Any:
    base_path, saved = base_of_adapter(path), read_reward_config(path)
    check_model_path(base_path)
    # The head was trained on the hidden states of this base in this precision, so it is loaded so again.
    as_trained: dict[str, Any] = {name: saved[name] for name in ("dtype", "quantization_config") if name in saved}
    options: dict[str, Any] = {"dtype": "float32", **as_trained, **kwargs, "num_labels": 1}
    on_sft = is_sft_adapter(base_path)
    with suppress_seqcls_warning():
        load = classifier_on_sft if on_sft else AutoModelForSequenceClassification.from_pretrained
        base = load(base_path, **options)
    keep_4bit_trainable(base)
    base.config.reward_bias = saved.get("reward_bias", getattr(base.config, "reward_bias", 0.0))
    # Before the adapter lies on it: it may hold rows of tokens that training added.
    fit_model_to_tokenizer(base, tokenizer)
    model = put_adapter_on(base, path, trainable=trainable)
    kinds = [] if on_sft else AutoConfig.from_pretrained(base_path).architectures or []
    has_trained_head = any("SequenceClassification" in kind for kind in kinds)
    if not has_trained_head and not hasattr(score_head(model), "modules_to_save"):
        raise ValueError(
            f"The adapter {path!r} does not hold the score head, which would be random. Train it with "
            "LoraConfig(task_type='SEQ_CLS')."
        )
    return model


def classifier_on_sft(path: str | Path, **kwargs: Any) -> Any:
    """A sequence classifier with one label on the base of an SFT adapter, the adapter and its added tokens merged in.

    Raises ValueError for no such base, or a quantised one, into which nothing merges exactly.
    """
    path, base_path = str(path), base_of_adapter(path)
    check_model_path(base_path)
    options: dict[str, Any] = {"dtype": "float32", **kwargs, "num_labels": 1}
    base = AutoModelForSequenceClassification.from_pretrained(base_path, **options)
    if is_quantised(base):  # asked for, or stored so
        raise ValueError(
            f"The SFT adapter {path!r} cannot be merged into a quantised base ({base_path!r}). Merge it first, and "
            "give the merged model, for PPO too; or train the reward adapter on the base without it."
        )
    config = adapter_config(path)
    config.task_type = None  # a classifier takes the adapter of a causal model; its layers are the same
    merged: Any = put_adapter_on(base, path, config=config).merge_and_unload()
    # PEFT writes this name beside a reward adapter that is trained on it, which so says what it stands on.
    merged.config._name_or_path = merged.name_or_path = path
    return merged


def check_single_label(config: Any, name: str) -> None:
    """Raises ValueError unless `config` has one label, the reward."""
    if config.num_labels != 1:
        raise ValueError(
            f"{name} has num_labels={config.num_labels}; a reward model has one label, the reward. Train it with "
            "RankingRewardTrainer, or load it with num_labels=1."
        )


# Tokens -------------------------------------------------------------------------------------------------------------


def ensure_distinct_pad_token(tokenizer: Any, model: nn.Module | None = None) -> str | None:
    """Give `tokenizer` a pad token that is not its EOS: an unused special token if it has one, else a new `<|pad|>`.

    With `model`, its embeddings grow if the new token needs it, and its config learns the pad id.

    Returns one line for the log that says what changed; None if the pad token was fine already.
    """
    line = None
    # With pad == EOS, transformers' pooling reads the token before the EOS, and scores otherwise than we do.
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        was = "missing" if tokenizer.pad_token is None else f"its EOS token {tokenizer.eos_token!r}"
        free = tokenizer.get_vocab().keys() - {tokenizer.eos_token, tokenizer.bos_token}
        token = next((t for t in _PAD_CANDIDATES if t in free), None)
        tokenizer.add_special_tokens({"pad_token": token or "<|pad|>"})
        line = (
            f"The tokenizer's pad token was {was}; it is now {tokenizer.pad_token!r} (id {tokenizer.pad_token_id}, "
            f"{'already in its vocabulary' if token else 'added to it'}), saved with model and tokenizer."
        )
    if model is not None:
        fit_model_to_tokenizer(model, tokenizer)
    return line


def fit_model_to_tokenizer(model: Any, tokenizer: Any) -> None:
    """Grow the embeddings of `model` to hold every token of `tokenizer`, and copy the pad id into its config."""
    resize_token_rows(model, max(rows_for(tokenizer), token_rows(model)))
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id


def rows_for(tokenizer: Any) -> int:
    """The token rows that a model needs to read every id of `tokenizer`."""
    return 1 + max(tokenizer.get_vocab().values())


def check_token_rows(model: Any, tokenizer: Any, name: str, *, pad: bool = True) -> None:
    """Raise ValueError for a tokenizer with ids for which the model `name` has no row, and say which tokens they are.

    With `pad=False` the pad token does not count: the model masks it away before the embedding.
    """
    rows = token_rows(model)
    unread = {str(getattr(tokenizer, name, None)) for name in _PLACEHOLDERS} - {"None"}
    unread |= set() if pad else {tokenizer.pad_token}
    vocabulary = tokenizer.get_vocab().items()
    beyond = sorted((index, token) for token, index in vocabulary if index >= rows and token not in unread)
    if beyond:
        tokens = ", ".join(repr(token) for _, token in beyond[:3]) + (", ..." if len(beyond) > 3 else "")
        raise ValueError(
            f"{name} has {rows} token rows, but its tokenizer has ids up to {beyond[-1][0]}: these tokens have "
            f"no embedding: {tokens}. Load the model, call model.resize_token_embeddings({beyond[-1][0] + 1}), pass it "
            "in memory, and train the new rows: all weights, or beside a LoRA modules_to_save=['embed_tokens', "
            "'lm_head'] or trainable_token_indices=[...]."
        )
