"""A causal language model from a folder, full or an adapter's, with its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from instruct_trl.models.adapter_loading import put_adapter_on
from instruct_trl.models.precision import one_dtype
from instruct_trl.models.reward_loading import check_model_path, check_token_rows, names_adapter, tokenizer_source


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
