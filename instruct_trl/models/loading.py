"""Language models and reward models from a folder or the hub, whole or an adapter on its base, and their tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import cached_file

from instruct_trl._upstream import keep_4bit_trainable, score_head
from instruct_trl.models.adapters import put_adapter_on, resize_token_rows, token_rows
from instruct_trl.models.model_files import (
    ADAPTER_CONFIG,
    check_model_path,
    is_sft_adapter,
    names_adapter,
    tokenizer_source,
)
from instruct_trl.models.precision import is_quantised, one_dtype


def load_causal_model(path: str | Path, *, trainable: bool = False, **kwargs: Any) -> Any:
    """A causal language model, or an adapter on its base, with the token rows that the adapter was trained with.

    Args:
        path: a folder, or a name on the hub.
        trainable: an adapter goes on training.
        kwargs: for `AutoModelForCausalLM.from_pretrained`; `dtype` is float32 unless given.

    Raises:
        ValueError: no such path; an adapter of a reward model, or one that does not fit its base.
    """
    path = str(path)
    kwargs = {"dtype": "float32", **(one_dtype(kwargs, "kwargs") or {})}
    check_model_path(path, **kwargs)
    if not names_adapter(path):
        check_causal(path, **kwargs)
        return AutoModelForCausalLM.from_pretrained(path, **kwargs)
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(path)
    if config.task_type == "SEQ_CLS":
        raise ValueError(
            f"{path!r} is the adapter of a reward model (task_type 'SEQ_CLS'), not of a language model. Give the "
            "folder that SFT saved."
        )
    base = str(config.base_model_name_or_path)
    check_model_path(base)
    model = AutoModelForCausalLM.from_pretrained(base, **{**kwargs, "revision": config.revision})
    return put_adapter_on(model, path, trainable=trainable)


def check_causal(path: str | Path, **kwargs: Any) -> None:
    """Refuse a classifier, such as a reward model, in a language model's place: its head for words would be random.

    Args:
        path: of a full model, not of an adapter.
        kwargs: of `from_pretrained`; those that say where the model lies count.

    Raises:
        ValueError: it is one.
    """
    where = {name: kwargs[name] for name in ("revision", "subfolder", "token", "trust_remote_code") if kwargs.get(name)}
    kinds = [] if kwargs.get("gguf_file") else AutoConfig.from_pretrained(path, **where).architectures or []
    if any("Classification" in kind for kind in kinds):
        raise ValueError(
            f"{str(path)!r} is a classifier ({', '.join(kinds)}), such as a reward model, and no language model: what "
            "draws its words would be random. Give the folder of the policy or of the SFT model."
        )


def load_tokenizer(path: str, **kwargs: Any) -> Any:
    """The tokenizer beside a model, or for an adapter without one that of its base."""
    return AutoTokenizer.from_pretrained(tokenizer_source(path), **kwargs)


def load_policy_and_tokenizer(path: str | Path, processing_class: Any = None) -> tuple[Any, Any]:
    """As `load_causal_model`, in eval mode, and its tokenizer, whose tokens it has rows for.

    Raises:
        ValueError: as there, or the tokenizer has tokens that the model lacks.
    """
    model = load_causal_model(path)
    tokenizer = processing_class or load_tokenizer(str(path))
    check_token_rows(model, tokenizer, f"The model {str(path)!r}")
    return model.eval(), tokenizer


# Special tokens that tokenizers carry for padding or leave unused, in order of preference.
_PAD_CANDIDATES = ("<|endoftext|>", "<pad>", "<|pad|>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>")


# Tokens that stand for what is no text: Gemma 3's tokenizer has one for pictures, and its model of 1B no row for it.
_PLACEHOLDERS = ("image_token", "video_token", "audio_token")


def ensure_distinct_pad_token(tokenizer: Any, model: nn.Module | None = None) -> str | None:
    """Give `tokenizer` a pad token that is not its EOS: an unused special token if it has one, else a new `<|pad|>`.

    With pad == EOS, transformers' pooling takes the last token before the EOS, and no checkpoint that ends so can be
    read elsewhere. With `model`, its embeddings grow where the new token needs it, and its config learns the pad id.

    Returns:
        One line that says what changed, to be logged; None where the pad token was fine already.
    """
    line = None
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        was = "missing" if tokenizer.pad_token is None else f"its EOS token {tokenizer.eos_token!r}"
        taken = {tokenizer.eos_token, tokenizer.bos_token}
        vocabulary = tokenizer.get_vocab()
        token = next((t for t in _PAD_CANDIDATES if t in vocabulary and t not in taken), None)
        source = "already in its vocabulary" if token else "added to it"
        tokenizer.add_special_tokens({"pad_token": token or "<|pad|>"})
        line = (
            f"The tokenizer's pad token was {was}; it is now {tokenizer.pad_token!r} (id {tokenizer.pad_token_id}, "
            f"{source}), saved with model and tokenizer."
        )
    if model is not None:
        fit_model_to_tokenizer(model, tokenizer)
    return line


def fit_model_to_tokenizer(model: Any, tokenizer: Any) -> None:
    """Grow the embeddings of `model` to hold every token of `tokenizer`, and copy the pad id into its config.

    Raises:
        ValueError: they have no room, and an adapter holds them.
    """
    resize_token_rows(model, max(rows_for(tokenizer), token_rows(model)))
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id


def rows_for(tokenizer: Any) -> int:
    """The token rows that a model needs to read every id of `tokenizer`."""
    return 1 + max(tokenizer.get_vocab().values())


def check_token_rows(model: Any, tokenizer: Any, name: str, *, pad: bool = True) -> None:
    """Refuse a tokenizer with ids for which the model has no row.

    Args:
        model: anything with an embedding.
        tokenizer: what its token ids come from.
        name: of the model, in the error.
        pad: the pad token counts, too; not so where the model masks it away before the embedding.

    Raises:
        ValueError: there are such ids; says which tokens they are.
    """
    rows = token_rows(model)
    unread = {str(getattr(tokenizer, name, None)) for name in _PLACEHOLDERS} - {"None"}
    if not pad:
        unread.add(tokenizer.pad_token)
    read = {token: index for token, index in tokenizer.get_vocab().items() if token not in unread}
    beyond = sorted((index, token) for token, index in read.items() if index >= rows)
    if beyond:
        tokens = ", ".join(repr(token) for _, token in beyond[:3]) + (", ..." if len(beyond) > 3 else "")
        raise ValueError(
            f"{name} has {rows} token rows, but its tokenizer has ids up to {beyond[-1][0]}: nothing is there for "
            f"{tokens}. Load the model, call model.resize_token_embeddings({beyond[-1][0] + 1}), pass it in memory, "
            "and train the new rows: all weights, or beside a LoRA modules_to_save=['embed_tokens', 'lm_head'] or "
            "trainable_token_indices=[...]."
        )


def classifier_on_sft(path: str | Path, **kwargs: Any) -> Any:
    """A sequence classifier with one label on the base of an SFT adapter, the adapter merged into it.

    Its name is the adapter's path, so that a reward adapter trained on it says what it was trained on. Tokens that SFT
    added are the classifier's, too.

    Args:
        path: the adapter's folder.
        kwargs: for `AutoModelForSequenceClassification.from_pretrained`; dtype is float32 unless given.

    Raises:
        ValueError: no such base, or a quantised one, into which nothing merges exactly.
    """
    from peft import PeftConfig

    path = str(path)
    config = PeftConfig.from_pretrained(path)
    base_path = str(config.base_model_name_or_path)
    check_model_path(base_path)
    base = AutoModelForSequenceClassification.from_pretrained(
        base_path, **{"dtype": "float32", **kwargs, "num_labels": 1}
    )
    if is_quantised(base):  # asked for, or stored so
        raise ValueError(
            f"The SFT adapter {path!r} cannot be merged into a quantised base ({base_path!r}). Merge it first, and "
            "give the merged model, for PPO too; or train the reward adapter on the base without it."
        )
    config.task_type = None  # a classifier takes the adapter of a causal model; its layers are the same
    merged: Any = put_adapter_on(base, path, config=config).merge_and_unload()
    merged.config._name_or_path = merged.name_or_path = path
    return merged


def check_single_label(config: Any, name: str) -> None:
    """Raises ValueError unless `config` has one label, the reward."""
    if config.num_labels != 1:
        raise ValueError(
            f"{name} has num_labels={config.num_labels}; a reward model has one label, the reward. Train it with "
            "RankingRewardTrainer, or load it with num_labels=1."
        )


def load_reward_model(path: str | Path, *, trainable: bool = False, **kwargs: Any) -> tuple[Any, Any]:
    """Read a trained reward model, or the folder of its PEFT adapter, with its tokenizer and its `reward_bias`.

    Args:
        path: local folder or hub name.
        trainable: its adapter goes on training.
        kwargs: for `AutoModelForSequenceClassification.from_pretrained` (dtype, device_map, revision, ...).

    Returns:
        (model, tokenizer), the model in eval mode.

    Raises:
        ValueError: no such path, more than one label, an adapter without the trained head, or a tokenizer that does not
            fit.
    """
    path, kwargs = str(path), one_dtype(kwargs, "kwargs") or {}
    check_model_path(path, **kwargs)
    shared = {key: kwargs[key] for key in ("revision", "trust_remote_code", "token") if key in kwargs}
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_source(path), **shared)
    if names_adapter(path):
        model = _load_adapter(path, tokenizer, trainable, kwargs)
    else:
        check_single_label(AutoConfig.from_pretrained(path, **shared), f"The reward model {path!r}")
        model = AutoModelForSequenceClassification.from_pretrained(path, **kwargs)
    check_token_rows(model, tokenizer, f"The reward model {path!r}")
    return model.eval(), tokenizer


def _load_adapter(path: str, tokenizer: Any, trainable: bool, kwargs: dict[str, Any]) -> Any:
    from peft import PeftConfig
    from trl.trainer.reward_trainer import suppress_seqcls_warning

    base_path = str(PeftConfig.from_pretrained(path).base_model_name_or_path)
    check_model_path(base_path)
    # RankingRewardTrainer writes this file; adapters of other makers lack it.
    file = cached_file(path, ADAPTER_CONFIG, _raise_exceptions_for_missing_entries=False)
    saved = json.loads(Path(file).read_text(encoding="utf-8")) if file else {}
    defaults = {name: saved[name] for name in ("dtype", "quantization_config") if name in saved}
    with suppress_seqcls_warning():
        options = {"dtype": "float32", **defaults, **kwargs}
        if on_sft := is_sft_adapter(base_path):
            base = classifier_on_sft(base_path, **options)
        else:
            base = AutoModelForSequenceClassification.from_pretrained(base_path, **{**options, "num_labels": 1})
    keep_4bit_trainable(base)
    base.config.reward_bias = saved.get("reward_bias", getattr(base.config, "reward_bias", 0.0))
    fit_model_to_tokenizer(base, tokenizer)
    model = put_adapter_on(base, path, trainable=trainable)
    trained_base = not on_sft and any(
        "SequenceClassification" in name for name in AutoConfig.from_pretrained(base_path).architectures or []
    )
    if not trained_base and not hasattr(score_head(model), "modules_to_save"):
        raise ValueError(
            f"The adapter {path!r} does not hold the score head, which would be random. Train it with "
            "LoraConfig(task_type='SEQ_CLS')."
        )
    return model


def save_adapter_config(model: Any, folder: str | Path) -> None:
    """Write beside a PEFT adapter what PEFT does not: the reward bias, the base's dtype, and how it was quantised."""
    saved: dict[str, Any] = {"reward_bias": model.config.reward_bias, "dtype": str(model.dtype).removeprefix("torch.")}
    quantization = getattr(model.config, "quantization_config", None)
    if quantization is not None:
        saved["quantization_config"] = quantization if isinstance(quantization, dict) else quantization.to_dict()
    Path(folder, ADAPTER_CONFIG).write_text(json.dumps(saved, indent=2, default=str) + "\n", encoding="utf-8")
