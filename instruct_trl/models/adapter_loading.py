"""An adapter's folder put on its base, with as many token rows as it was trained with.

Where tokens were added for a training, the base on disk lacks their rows. PEFT saves them beside the adapter, as whole
embeddings, as a module that was trained whole, or as single rows; the base must have room before they can be read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig

from instruct_trl.models.precision import is_quantised, keep_whole_modules_in_float32

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"


def token_rows(model: Any) -> int:
    """How many tokens the embedding of `model` knows."""
    return model.get_input_embeddings().weight.shape[0]


def resize_token_rows(model: Any, rows: int) -> None:
    """Give embedding and head of `model` this many rows.

    A new row is the mean of those that were there: the same in every process, and again when an adapter is read.

    Raises:
        ValueError: an adapter holds the embedding, which would be lost.
    """
    before = token_rows(model)
    if rows == before:
        return
    layers = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
    if any(type(layer) not in (nn.Embedding, nn.Linear) for layer in layers):
        raise ValueError(
            f"The model has {before} token rows and needs {rows}, but an adapter lies on its embedding or head. Resize "
            f"the base before the adapter is put on it: model.resize_token_embeddings({rows})."
        )
    model.resize_token_embeddings(rows, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if layer is not None and rows > before:
            for part in (layer.weight, getattr(layer, "bias", None)):
                if part is not None:
                    part.data[before:] = part.data[:before].float().mean(dim=0).to(part.dtype)


def put_adapter_on(base: Any, path: str | Path, *, config: Any = None, trainable: bool = False) -> Any:
    """`base` with the adapter of a folder on it, a PeftModel; the base gets the token rows that the adapter needs.

    Args:
        base: the model that it was trained on.
        path: the adapter's folder, or its name on the hub.
        config: its PeftConfig, where it differs from the one in the folder.
        trainable: the adapter goes on training.

    Raises:
        ValueError: its tensors do not fit the base.
    """
    path = str(path)
    config = config or PeftConfig.from_pretrained(path)
    weights = load_peft_weights(path, device="cpu")
    rows = rows_of_adapter(base, config, weights)
    if rows is not None:
        resize_token_rows(base, rows)
    try:
        model = PeftModel.from_pretrained(base, path, config=config, is_trainable=trainable)
        if not is_quantised(base) and keep_whole_modules_in_float32(model):
            set_peft_model_state_dict(model, weights)  # once more, not rounded
    except (RuntimeError, IndexError, KeyError) as error:
        raise ValueError(
            f"The adapter {path!r} does not fit its base {config.base_model_name_or_path!r}: {error} Give the adapter "
            "that was trained on this base; or name its base in adapter_config.json (`base_model_name_or_path`)."
        ) from error
    return model


def rows_of_adapter(base: Any, config: Any, weights: dict[str, torch.Tensor]) -> int | None:
    """The token rows that `base` must have for an adapter; None where those that it has will do.

    Args:
        base: the model, still without the adapter.
        config: the adapter's.
        weights: the tensors of its file.
    """
    saved = {len(value) for key, value in weights.items() if _embedding_of(base, key)}
    if saved:
        return max(saved)
    indices = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None) or []
    lists = indices.values() if isinstance(indices, dict) else [indices]
    needed = 1 + max((index for part in lists for index in part), default=-1)
    return needed if needed > token_rows(base) else None


def _embedding_of(base: Any, key: str) -> bool:
    """True for a tensor of an adapter's file that holds embedding or head whole, a row for each token."""
    layers = (base.get_input_embeddings(), base.get_output_embeddings())
    names = [name for name, module in base.named_modules() if any(module is layer for layer in layers)]
    ours = any(key.startswith(f"{PREFIX}{name}.") for name in names)
    return ours and key.endswith(".weight") and "lora_" not in key


def save_token_rows(model: Any, folder: str | Path) -> None:
    """Write beside the adapter in `folder` the embedding and head that its base on disk lacks rows for.

    PEFT does so itself only where it can read the base's config without a network, and leaves out the head where an
    adapter lies on the embedding.

    Args:
        model: the PeftModel that was saved there.
        folder: holds its `adapter_model.safetensors`.
    """
    file = Path(folder, WEIGHTS)
    base, name = model.get_base_model(), str(model.active_peft_config.base_model_name_or_path or "")
    rows = _rows_on_disk(name)
    if rows in (None, token_rows(base)) or not file.is_file():
        return
    weights = load_peft_weights(str(folder), device="cpu")
    missing = {
        f"{PREFIX}{part}.weight": layer.weight.detach().cpu().clone()
        for part, layer in base.named_modules()
        if layer in (base.get_input_embeddings(), base.get_output_embeddings())
        and _is_whole(layer)
        and not any(key.startswith(f"{PREFIX}{part}.") for key in weights)
    }
    if missing:
        save_file(weights | missing, file, metadata={"format": "pt"})


def _is_whole(layer: Any) -> bool:
    """True for a plain layer whose weights lie in this process, not in shards."""
    return type(layer) in (nn.Embedding, nn.Linear) and not any(
        hasattr(layer.weight, mark) for mark in ("ds_id", "full_tensor")
    )


def _rows_on_disk(name: str) -> int | None:
    """The vocabulary of a base by name or path; None where its config cannot be read."""
    try:
        return AutoConfig.from_pretrained(name).get_text_config().vocab_size if name else None
    except (OSError, ValueError):
        return None
