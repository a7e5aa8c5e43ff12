"""LoRA adapters: read from PEFT's folders, put on a base with room for their tokens, copied, switched and saved.

A reward adapter was trained on a sequence classifier. Its layers have the same names in the causal language model of
the same family, since both hold the same backbone; its head has none there, and is kept apart.

If tokens were added for a training, the base on disk lacks their rows. PEFT saves them beside the adapter, as whole
embeddings, as a module that was trained whole, or as single rows; the base must have room before they can be read.

Legend: r rank, H hidden units.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig

from instruct_trl._upstream import HEADS
from instruct_trl.models.model_files import adapter_config, names_adapter, read_reward_config
from instruct_trl.models.precision import is_quantised, keep_whole_modules_in_float32

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
_PLAIN = (nn.Embedding, nn.Linear)  # an embedding or head without an adapter on it
# Entries of a config that say how a model is used, not what it computes.
_USAGE = {
    "_name_or_path", "_commit_hash", "architectures", "bos_token_id", "classifier_dropout", "dtype", "eos_token_id",
    "id2label", "label2id", "num_labels", "pad_token_id", "problem_type", "quantization_config", "reward_bias",
    "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip


def has_adapters(model: Any, peft_config: Any = None) -> bool:
    """True if adapters are trained on `model`, a path or a model, or will be by `peft_config`."""
    if peft_config is not None:
        return True
    return names_adapter(model) if isinstance(model, str) else hasattr(model, "peft_config")


def without_adapters(model: Any) -> Any:
    """The transformers model inside PEFT's wrapper, with the adapters' layers in place; `model` itself if unwrapped."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


# Switching ----------------------------------------------------------------------------------------------------------


def adapter_parameters(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """The parameters that belong to the adapter of this name, by their names in `model`."""
    own = re.compile(rf"\.{re.escape(adapter)}(\.|$)")
    return {name: parameter for name, parameter in model.named_parameters() if own.search(name)}


def adapters_are_on(model: nn.Module) -> bool:
    """False if the adapters of `model` are switched off, so that the base alone runs. All layers are alike."""
    return not next(layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)).disable_adapters


def _activate(model: Any, adapters: Sequence[str]) -> None:
    if not adapters:
        model.base_model.disable_adapter_layers()
        return
    if not adapters_are_on(model):
        model.base_model.enable_adapter_layers()
    model.base_model.set_adapter(list(adapters))


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """While active, no parameter of `model` requires a gradient. On exit, each is as it was."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, required in flags:
            parameter.requires_grad_(required)


@contextmanager
def switched(
    model: Any, adapters: Sequence[str], *, trainable: Sequence[nn.Parameter] = (), training: bool = False
) -> Iterator[None]:
    """While active, the PeftModel runs with exactly `adapters` (added up if several; none switches all off).

    Gradients reach `trainable` alone. `training` is train mode, so dropout; else all is in eval mode. On leaving, also
    after an error, adapters, `requires_grad` and modes are as they were.

    A backward pass belongs inside, too: gradient checkpointing runs layers again under the adapters that are active
    then, and autograd drops the gradient of a parameter whose `requires_grad` is False by then.
    """
    was_active, was_on = list(model.base_model.active_adapters), adapters_are_on(model)
    modes = [(module, module.training) for module in model.modules()]
    with frozen(model):
        try:
            _activate(model, adapters)
            # PEFT's switches change `requires_grad` as they go, so it is set after them.
            model.requires_grad_(False)
            for parameter in trainable:
                parameter.requires_grad_(True)
            model.train(training)
            yield
        finally:
            _activate(model, was_active)
            if not was_on:
                _activate(model, [])
            for module, mode in modes:
                module.training = mode


# Token rows ---------------------------------------------------------------------------------------------------------


def token_rows(model: Any) -> int:
    """How many tokens the embedding of `model` knows."""
    return model.get_input_embeddings().weight.shape[0]


def _embeddings(model: Any) -> dict[str, Any]:
    """Embedding and head of `model` by name."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    return {name: module for name, module in model.named_modules() if any(module is layer for layer in layers)}


def resize_token_rows(model: Any, rows: int) -> None:
    """Give embedding and head of `model` this many rows. Raises ValueError if an adapter lies on them."""
    before = token_rows(model)
    if rows == before:
        return
    if any(type(layer) not in _PLAIN for layer in _embeddings(model).values()):
        raise ValueError(
            f"The model has {before} token rows and needs {rows}, but an adapter lies on its embedding or head. Resize "
            f"the base before the adapter is put on it: model.resize_token_embeddings({rows})."
        )
    model.resize_token_embeddings(rows, mean_resizing=False)
    # A new row is the mean of the old ones, without noise: the same in every process, and when an adapter is read.
    for layer in _embeddings(model).values():
        for part in layer.parameters(recurse=False) if rows > before else ():
            part.data[before:] = part.data[:before].float().mean(dim=0).to(part.dtype)


def rows_of_adapter(base: Any, config: Any, weights: dict[str, torch.Tensor]) -> int | None:
    """The token rows that `base` (still bare) must have for the tensors of an adapter; None if it has them."""
    places = tuple(f"{PREFIX}{name}." for name in _embeddings(base))
    whole = {key for key in weights if key.startswith(places) and key.endswith(".weight") and "lora_" not in key}
    if whole:
        return max(len(weights[key]) for key in whole)
    indices = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None) or []
    lists = indices.values() if isinstance(indices, dict) else [indices]
    needed = 1 + max((index for part in lists for index in part), default=-1)
    return needed if needed > token_rows(base) else None


def put_adapter_on(base: Any, path: str | Path, *, config: Any = None, trainable: bool = False) -> Any:
    """`base` with the adapter of a folder on it, a PeftModel; the base gets the token rows that the adapter needs.

    Args:
        path: the adapter's folder, or its name on the hub.
        config: its PeftConfig, if not the one in the folder.
        trainable: the adapter goes on training.

    Raises:
        ValueError: its tensors do not fit the base.
    """
    path, config = str(path), config or adapter_config(path)
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


def save_token_rows(model: Any, folder: str | Path) -> None:
    """Write the embedding and head that the base on disk lacks rows for beside the adapter of `model` in `folder`.

    PEFT does so itself only if it can read the base's config without a network, and leaves out the head if an adapter
    lies on the embedding.
    """
    file = Path(folder, WEIGHTS)
    base, name = without_adapters(model), str(model.active_peft_config.base_model_name_or_path or "")
    try:
        rows = AutoConfig.from_pretrained(name).get_text_config().vocab_size if name else None
    except (OSError, ValueError):
        return
    if rows in (None, token_rows(base)) or not file.is_file():
        return
    weights = load_peft_weights(str(folder), device="cpu")
    missing = {}
    for part, layer in _embeddings(base).items():
        # This process holds only a part of a sharded weight (ZeRO-3, FSDP2).
        sharded = hasattr(layer.weight, "ds_id") or hasattr(layer.weight, "full_tensor")
        saved = any(key.startswith(f"{PREFIX}{part}.") for key in weights)
        if type(layer) in _PLAIN and not sharded and not saved:
            missing[f"{PREFIX}{part}.weight"] = layer.weight.detach().cpu().clone()
    if missing:
        save_file(weights | missing, file, metadata={"format": "pt"})


# Folders ------------------------------------------------------------------------------------------------------------


class AdapterFolder(NamedTuple):
    """An adapter as PEFT wrote it."""

    path: str
    config: LoraConfig  # the head struck from `modules_to_save`
    weights: dict[str, torch.Tensor]  # by their names in PEFT's file, without the head
    head: dict[str, torch.Tensor]  # `weight` (1, H), perhaps `bias` (1,); empty if there is none
    head_name: str
    saved: dict[str, Any]  # see `read_reward_config`

    @property
    def base(self) -> str:
        """Folder or name of the model that it was trained on, "" if it does not say."""
        return str(self.config.base_model_name_or_path or "")

    def scalar_head(self) -> nn.Linear:
        """The head of a reward adapter, (H) → (1), in float32. Raises ValueError if the folder holds no such head."""
        weight = self.head.get("weight")
        if weight is None or weight.dim() != 2 or len(weight) != 1 or not self.head.keys() <= {"weight", "bias"}:
            found = {name: tuple(tensor.shape) for name, tensor in self.head.items()}
            raise ValueError(
                f"The adapter {self.path!r} does not hold a scalar score head (found: {found or 'none'}). Train it "
                "with RankingRewardTrainer and LoraConfig(task_type='SEQ_CLS')."
            )
        head = nn.Linear(weight.shape[1], 1, bias="bias" in self.head)
        head.load_state_dict({name: tensor.float() for name, tensor in self.head.items()})
        return head


def read_adapter(path: str | Path) -> AdapterFolder:
    """Read an adapter from a folder or the hub, on the CPU. Raises ValueError if there is none, or it is no LoRA."""
    path = str(path)
    config = check_lora(adapter_config(path), f"The adapter {path!r}")
    weights = load_peft_weights(path, device="cpu")
    head, head_name = {}, "score"
    for key in list(weights):
        parts = key.removeprefix(PREFIX).split(".")
        if parts[0] in HEADS:
            head_name, head[parts[-1]] = parts[0], weights.pop(key)
    config.modules_to_save = [name for name in config.modules_to_save or [] if name not in HEADS] or None
    return AdapterFolder(path, config, weights, head, head_name, read_reward_config(path))


def check_lora(config: Any, name: str) -> LoraConfig:
    """`config`, if adapters of it can share a base. Raises ValueError if not, with the remedy."""
    if not isinstance(config, LoraConfig):
        fault = f"is a {type(config).__name__}; roles on one base are LoRA adapters (LoraConfig)."
    elif config.init_lora_weights not in (True, False, "gaussian"):
        fault = (
            f"has init_lora_weights={config.init_lora_weights!r}, which changes weights of the base, and other roles "
            "share it. Use True, or convert the adapter (`path_initial_model_for_weight_conversion` of PEFT)."
        )
    elif config.trainable_token_indices:
        fault = (
            "has trainable_token_indices, and PEFT keeps no others beside those on one embedding. Train with "
            "modules_to_save=['embed_tokens', 'lm_head'] instead; or merge it, and give the merged model as base."
        )
    elif config.bias != "none":
        fault = f"has bias={config.bias!r}, which trains the base's biases. Use bias='none'."
    else:
        return config
    raise ValueError(f"{name} {fault}")


def adapter_state(model: Any, name: str) -> dict[str, torch.Tensor]:
    """The adapter `name` of the PeftModel `model`, under the names of PEFT's files."""
    own: Any = {key: value.detach() for key, value in adapter_parameters(model, name).items()}
    return get_peft_model_state_dict(model, state_dict=own, adapter_name=name, save_embedding_layers=False)


def load_adapter_weights(model: Any, name: str, folder: AdapterFolder) -> None:
    """Copy the weights of `folder` into the adapter `name` of `model`. Raises ValueError if they do not fit."""
    expected = adapter_state(model, name)
    weights = {
        key: value
        for key, value in folder.weights.items()
        if key in expected or not _of_base(model, key, value, folder)
    }
    for key in sorted(expected.keys() | weights.keys()):
        theirs, ours = (tuple(part[key].shape) if key in part else None for part in (weights, expected))
        if theirs != ours:
            raise ValueError(
                f"The adapter {folder.path!r} does not fit this base: {key} is {theirs or 'not in it'}, the base needs "
                f"{ours or 'no such tensor'}. It was trained on another model ({folder.base!r})."
            )
    set_peft_model_state_dict(model, weights, adapter_name=name)


def _of_base(model: Any, key: str, value: torch.Tensor, folder: AdapterFolder) -> bool:
    """True for the base's own embedding or head, which PEFT saves after a resize or below an adapter; not changed."""
    layer = _embeddings(model).get(key.removesuffix(".weight").removesuffix(".base_layer"))
    if layer is None or not key.endswith(".weight"):
        return False
    ours = getattr(layer, "base_layer", layer).weight.detach().cpu()
    rows = min(len(ours), len(value))
    # File or base may be coarser than the other: they are compared as the coarser one rounds them.
    if value.shape[1:] == ours.shape[1:] and any(
        torch.allclose(value[:rows].to(dtype), ours[:rows].to(dtype)) for dtype in (value.dtype, ours.dtype)
    ):
        return True
    raise ValueError(f"The adapter {folder.path!r} carries embeddings that are not those of this base.")


@torch.no_grad()
def copy_adapter(model: Any, source: str, target: str) -> None:
    """Make the adapter `target` compute what `source` computes; it may have a higher rank and more target modules.

    Modules that `target` alone trains whole (`modules_to_save`) stay the base's, as PEFT made them. Raises ValueError
    if `target` has no room: a lower rank, fewer target modules, or another kind of LoRA.
    """
    theirs, ours = adapter_state(model, source), adapter_state(model, target)
    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    alike = all(layer.scaling.get(source) == layer.scaling.get(target) for layer in layers)
    if alike and {k: v.shape for k, v in theirs.items()} == {k: v.shape for k, v in ours.items()}:
        set_peft_model_state_dict(model, theirs, adapter_name=target)
        return
    added = {key: value for key, value in ours.items() if key in theirs or "lora_" in key}
    for key, value in (*theirs.items(), *added.items()):
        if not key.endswith(("lora_A.weight", "lora_B.weight")) or value.dim() != 2:
            raise ValueError(
                f"The {target} adapter has another shape than {source}, from which it starts. That works for LoRA on "
                f"linear layers alone, without DoRA, if {source} has no modules_to_save. Leave its config out to take "
                "the same shape."
            )
    for layer in layers:
        if source not in layer.lora_A:
            continue
        rank, a, b = layer.r[source], layer.lora_A, layer.lora_B
        if target not in a or layer.r[target] < rank:
            has = f"rank {layer.r[target]}" if target in a else "nothing"
            raise ValueError(
                f"The {target} adapter cannot start as a copy of {source}, which has rank {rank} on a layer of shape "
                f"{(layer.in_features, layer.out_features)} where it has {has}. Raise its r, or add the target module."
            )
        # s'B'A' = sBA: the first r rows of A' are A, the first r columns of B' are B·s/s', and its others are 0.
        a[target].weight[:rank] = a[source].weight
        b[target].weight.zero_()
        b[target].weight[:, :rank] = b[source].weight * (layer.scaling[source] / layer.scaling[target])


# Does an adapter belong to a base? ----------------------------------------------------------------------------------


def same_place(first: str, second: str) -> bool:
    """True if two names are one folder, or one name on the hub."""
    return first == second or (os.path.isdir(first) and os.path.realpath(first) == os.path.realpath(second))


def check_base(folder: AdapterFolder, *, base: Any, base_name: str, revision: str | None, other_name: bool) -> None:
    """Refuse an adapter of another base, as far as can be seen: another revision, config or name.

    Args:
        base: the config of our base.
        base_name: its folder or name, "" if it was built in memory.
        revision: of our base, if one was asked for; else it is "main".
        other_name: the adapter's base may have another name, if its config is the same.

    Raises:
        ValueError: it belongs to another base.
    """
    theirs, name = folder.config.revision, folder.base
    if theirs and theirs != (revision or "main"):
        raise ValueError(
            f"The adapter {folder.path!r} was trained on revision {theirs!r} of {name!r}, but the base is revision "
            f"{revision or 'main'!r}. Give revision={theirs!r}, and load a base in memory at it."
        )
    if not name or same_place(name, base_name):
        return
    ours = base.to_dict()
    try:
        config = AutoConfig.from_pretrained(name, revision=theirs).to_dict()
    except (OSError, ValueError):
        config = ours  # cannot be read, so nothing to compare
    keys = [key for key in sorted((config.keys() | ours.keys()) - _USAGE) if config.get(key) != ours.get(key)]
    if keys:
        raise ValueError(
            f"The adapter {folder.path!r} belongs to another base: the configs of {name!r} and "
            f"{base_name or 'the base in memory'!r} differ in "
            f"{', '.join(f'{key} {config.get(key)!r} and {ours.get(key)!r}' for key in keys)}."
        )
    if base_name and not other_name:
        raise ValueError(
            f"The adapter {folder.path!r} was trained on {name!r}, but the base is {base_name!r}. Give that base; or, "
            "if they are the same weights under two names, pass allow_other_base_name=True."
        )
