"""LoRA adapters: in and out of PEFT's folders, onto a base with room for their tokens, and switched on a shared base.

A reward adapter was trained on a sequence classifier. Its layers have the same names in the causal language model of
the same family, since both hold the same backbone; its head has none there, and is kept apart.

Legend: r rank, in and out sizes of a matrix, H hidden units, V vocabulary.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig
from transformers.utils import cached_file

from instruct_trl.models.model_files import ADAPTER_CONFIG, names_adapter
from instruct_trl.models.precision import is_quantised, keep_whole_modules_in_float32


def adapter_parameters(model: torch.nn.Module, adapter: str) -> dict[str, torch.nn.Parameter]:
    """The parameters that belong to the adapter of this name, by their names in `model`."""
    own = re.compile(rf"\.{re.escape(adapter)}(\.|$)")
    return {name: parameter for name, parameter in model.named_parameters() if own.search(name)}


@contextmanager
def switched(
    model: Any, adapters: Sequence[str], *, trainable: Sequence[torch.nn.Parameter] = (), training: bool = False
) -> Iterator[None]:
    """Within, `model` runs with exactly `adapters` (added up if several; none switches all off).

    PEFT's own switches change `requires_grad` as they go. Here it is True for `trainable` alone within. On leaving,
    also after an error, come back: the active adapters and whether they are on, `requires_grad` of every parameter,
    and train or eval mode (so dropout) of every module.

    A backward pass belongs inside, too: gradient checkpointing runs layers again under the adapters that are active
    then, and autograd drops the gradient of a parameter whose `requires_grad` is False by then.

    Args:
        model: a PeftModel.
        adapters: names; they may target different modules.
        trainable: parameters of these adapters that shall get gradients.
        training: train mode within, else eval mode.
    """
    was_active, was_on = list(model.base_model.active_adapters), adapters_are_on(model)
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        _activate(model, adapters)
        for parameter, _ in gradients:
            parameter.requires_grad_(False)
        for parameter in trainable:
            parameter.requires_grad_(True)
        model.train(training)
        yield
    finally:
        _activate(model, was_active)
        if not was_on:
            _activate(model, [])
        for parameter, required in gradients:
            parameter.requires_grad_(required)
        for module, mode in modes:
            module.training = mode


def adapters_are_on(model: torch.nn.Module) -> bool:
    """False where the adapters of `model` are switched off, so that the base alone runs. All layers are alike."""
    return not next(layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)).disable_adapters


def _activate(model: Any, adapters: Sequence[str]) -> None:
    if not adapters:
        model.base_model.disable_adapter_layers()
        return
    if not adapters_are_on(model):
        model.base_model.enable_adapter_layers()
    model.base_model.set_adapter(list(adapters))


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


HEADS = ("score", "classifier")


# What a config says of how a model is used, not of what it computes.
_USAGE = {
    "_name_or_path", "_commit_hash", "architectures", "bos_token_id", "classifier_dropout", "dtype", "eos_token_id",
    "id2label", "label2id", "num_labels", "pad_token_id", "problem_type", "quantization_config", "reward_bias",
    "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip


class AdapterFolder(NamedTuple):
    """What lies in a folder that PEFT wrote.

    Attributes:
        path: where it was read.
        config: its LoraConfig, the head struck from `modules_to_save`.
        weights: name in PEFT's file → tensor, without the head.
        head: the head's tensors (`weight` (1, H), perhaps `bias` (1,)), empty if there is none.
        head_name: what the classifier calls the head.
        saved: what our trainer wrote beside it (`reward_bias`, `dtype`, `quantization_config`).
    """

    path: str
    config: LoraConfig
    weights: dict[str, torch.Tensor]
    head: dict[str, torch.Tensor]
    head_name: str
    saved: dict[str, Any]


def read_adapter(path: str | Path) -> AdapterFolder:
    """Read an adapter from a folder or the hub, on the CPU.

    Raises:
        ValueError: no adapter there, or not a LoRA.
    """
    path = str(path)
    try:
        config = PeftConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"There is no adapter at {path!r} (no readable adapter_config.json). Give the folder that the trainer "
            "saved with a peft_config."
        ) from error
    check_lora(config, f"The adapter {path!r}")
    weights = load_peft_weights(path, device="cpu")
    head, head_name = {}, "score"
    for key in list(weights):
        parts = key.removeprefix(PREFIX).split(".")
        if parts[0] in HEADS:
            head_name, head[parts[-1]] = parts[0], weights.pop(key)
    assert isinstance(config, LoraConfig)
    config.modules_to_save = [name for name in config.modules_to_save or [] if name not in HEADS] or None
    file = cached_file(path, ADAPTER_CONFIG, _raise_exceptions_for_missing_entries=False)
    saved = json.loads(Path(file).read_text(encoding="utf-8")) if file else {}
    return AdapterFolder(path, config, weights, head, head_name, saved)


def check_lora(config: Any, name: str) -> None:
    """Refuse what cannot share a base.

    Raises:
        ValueError: not a LoRA, one that trains single token rows, or one that changes the base's weights when made.
    """
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{name} is a {type(config).__name__}; roles on one base are LoRA adapters (LoraConfig).")
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise ValueError(
            f"{name} has init_lora_weights={config.init_lora_weights!r}, which changes weights of the base, and other "
            "roles share it. Use True, or convert the adapter (`path_initial_model_for_weight_conversion` of PEFT)."
        )
    if config.trainable_token_indices:
        raise ValueError(
            f"{name} has trainable_token_indices, and PEFT keeps no others beside those on one embedding. Train with "
            "modules_to_save=['embed_tokens', 'lm_head'] instead; or merge it (merge_and_unload), save the merged "
            "model, and give that as base."
        )
    if config.bias != "none":
        raise ValueError(f"{name} has bias={config.bias!r}, which trains the base's biases. Use bias='none'.")


def add_adapter(model: Any, name: str, folder: AdapterFolder) -> None:
    """Put the adapter of `folder` on the PeftModel `model`, as `name`, in float32.

    Raises:
        ValueError: its tensors do not fit the base.
    """
    model.add_adapter(name, copy.deepcopy(folder.config))
    load_adapter_weights(model, name, folder)


def load_adapter_weights(model: Any, name: str, folder: AdapterFolder) -> None:
    """Copy the weights of `folder` into the adapter `name` of `model`.

    Raises:
        ValueError: a tensor is missing, left over, or of another shape.
    """
    expected = adapter_state(model, name)
    weights = {
        key: value
        for key, value in folder.weights.items()
        if key in expected or not _is_embedding(model, key, value, folder.path)
    }
    for key in sorted(expected.keys() | weights.keys()):
        shapes = [tuple(part[key].shape) if key in part else None for part in (weights, expected)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"The adapter {folder.path!r} does not fit this base: {key} is {shapes[0] or 'not in it'}, the base "
                f"needs {shapes[1] or 'no such tensor'}. It was trained on another model "
                f"({folder.config.base_model_name_or_path!r})."
            )
    set_peft_model_state_dict(model, weights, adapter_name=name)


def adapter_state(model: Any, name: str) -> dict[str, torch.Tensor]:
    """The adapter `name` of the PeftModel `model`, under the names of PEFT's files."""
    own: Any = {key: value.detach() for key, value in adapter_parameters(model, name).items()}
    return get_peft_model_state_dict(model, state_dict=own, adapter_name=name, save_embedding_layers=False)


def check_token_room(folder: AdapterFolder, base: Any, *, resized: bool) -> None:
    """Refuse an adapter that was trained with more tokens than a shared base has rows for.

    Args:
        folder: the adapter.
        base: the model.
        resized: embeddings that were only saved, not trained, count, too. A reward model's may hold one row more, for a
            pad token that nobody reads.

    Raises:
        ValueError: it was.
    """
    weights = {key: value for key, value in folder.weights.items() if resized or "modules_to_save" in key}
    rows = rows_of_adapter(base, folder.config, weights)
    if rows is not None and rows > token_rows(base):
        raise ValueError(
            f"The adapter {folder.path!r} was trained with {rows} token rows, and the base has {token_rows(base)}: "
            "tokens were added, and all roles share the base. Make the grown model the base "
            f"(model.resize_token_embeddings({rows}), model.save_pretrained(folder), its tokenizer beside it), train "
            "all adapters on that folder, and give it as base; or run PPOPtxTrainer with models of their own."
        )


def _is_embedding(model: Any, key: str, value: torch.Tensor, path: str) -> bool:
    """True for the base's own embedding or head, which PEFT saves after a resize or below an adapter; not changed."""
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    weights: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if any(module is embedding for embedding in embeddings):
            weight = getattr(module, "base_layer", module).weight
            weights |= {f"{name}.weight": weight, f"{name}.base_layer.weight": weight}
    if key not in weights:
        return False
    ours = weights[key].detach().cpu()
    rows = min(len(ours), len(value))
    # File or base may be coarser than the other: they are compared as the coarser one rounds them.
    fits = value.shape[1:] == ours.shape[1:] and any(
        torch.allclose(value[:rows].to(dtype), ours[:rows].to(dtype)) for dtype in (value.dtype, ours.dtype)
    )
    if not fits:
        raise ValueError(f"The adapter {path!r} carries embeddings that are not those of this base.")
    return True


def copy_adapter(model: Any, source: str, target: str) -> None:
    """Make the adapter `target` compute what `source` computes; it may have a higher rank and more target modules.

    A's first r rows and B's first r columns are the source's, rescaled; B's other columns are 0. What `target` alone
    trains whole (`modules_to_save`) stays the base's, as PEFT made it.

    Raises:
        ValueError: `target` has no room: a lower rank, fewer target modules, or another kind of LoRA.
    """
    theirs, ours = adapter_state(model, source), adapter_state(model, target)
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    alike = all(layer.scaling.get(source) == layer.scaling.get(target) for layer in layers)
    if alike and {k: v.shape for k, v in theirs.items()} == {k: v.shape for k, v in ours.items()}:
        set_peft_model_state_dict(model, theirs, adapter_name=target)
        return
    whole = [key for key in ours.keys() - theirs.keys() if "lora_" not in key]
    tensors = [*theirs.items(), *((key, value) for key, value in ours.items() if key not in whole)]
    if any(not key.endswith(("lora_A.weight", "lora_B.weight")) or value.dim() != 2 for key, value in tensors):
        raise ValueError(
            f"The {target} adapter has another shape than {source}, from which it starts. That works for LoRA on "
            f"linear layers alone, without DoRA, and where {source} has no modules_to_save. Leave its config out to "
            "take the same shape."
        )
    for layer in layers:
        if source in layer.lora_A:
            _copy_layer(layer, source, target)


@torch.no_grad()
def _copy_layer(layer: Any, source: str, target: str) -> None:
    rank = layer.r[source]
    if target not in layer.lora_A or layer.r[target] < rank:
        has = f"rank {layer.r[target]}" if target in layer.lora_A else "nothing"
        raise ValueError(
            f"The {target} adapter cannot start as a copy of {source}, which has rank {rank} on a layer of shape "
            f"{(layer.in_features, layer.out_features)} where it has {has}. Raise its r, or add the target module."
        )
    layer.lora_A[target].weight[:rank] = layer.lora_A[source].weight
    layer.lora_B[target].weight.zero_()
    scale = layer.scaling[source] / layer.scaling[target]
    layer.lora_B[target].weight[:, :rank] = layer.lora_B[source].weight * scale


def make_head(folder: AdapterFolder) -> nn.Linear:
    """The scalar head of a reward adapter, (H) → (1), in float32.

    Raises:
        ValueError: the folder holds none, or not a single matrix with one row.
    """
    weight = folder.head.get("weight")
    if weight is None or weight.dim() != 2 or len(weight) != 1 or not folder.head.keys() <= {"weight", "bias"}:
        found = {name: tuple(tensor.shape) for name, tensor in folder.head.items()}
        raise ValueError(
            f"The adapter {folder.path!r} does not hold a scalar score head (found: {found or 'none'}). Train it with "
            "RankingRewardTrainer and LoraConfig(task_type='SEQ_CLS')."
        )
    head = nn.Linear(weight.shape[1], 1, bias="bias" in folder.head)
    head.load_state_dict({name: tensor.float() for name, tensor in folder.head.items()})
    return head


def save_sequence_adapter(
    model: Any, name: str, head: nn.Linear, head_name: str, saved: dict[str, Any], path: str | Path
) -> None:
    """Write an adapter and its head as PEFT writes a reward model, so that PEFT, or `load_reward_model`, reads it."""
    os.makedirs(path, exist_ok=True)
    state = {key: value.detach().cpu().contiguous() for key, value in adapter_state(model, name).items()}
    state |= {f"{PREFIX}{head_name}.{key}": value.detach().cpu() for key, value in head.state_dict().items()}
    save_file(state, Path(path, "adapter_model.safetensors"), metadata={"format": "pt"})
    config = copy.deepcopy(model.peft_config[name])
    config.task_type, config.inference_mode = "SEQ_CLS", True
    config.modules_to_save = [*(config.modules_to_save or []), head_name]
    config.save_pretrained(str(path))
    Path(path, ADAPTER_CONFIG).write_text(json.dumps(saved, indent=2, default=str) + "\n", encoding="utf-8")


# Which base a piece belongs to -------------------------------------------------------------------------------------


def same_place(first: str, second: str) -> bool:
    """True where two names are one folder, or one name on the hub."""
    return first == second or (os.path.isdir(first) and os.path.realpath(first) == os.path.realpath(second))


def config_hash(config: Any) -> str:
    """Twelve digits that are equal for configs of the same architecture and sizes."""
    return hashlib.sha256(json.dumps(_architecture(config), sort_keys=True, default=str).encode()).hexdigest()[:12]


def _architecture(config: Any) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key not in _USAGE}


def check_base(folder: AdapterFolder, *, base: Any, base_name: str, revision: str | None, other_name: bool) -> None:
    """Refuse an adapter of another base: another revision, config or name.

    Args:
        folder: the adapter.
        base: the config of our base.
        base_name: where our base was read, "" if it was built in memory.
        revision: of our base, if one was asked for; else it is "main".
        other_name: its base may have another name, where its config is the same.

    Raises:
        ValueError: it belongs to another base, as far as can be seen.
    """
    theirs, name = folder.config, str(folder.config.base_model_name_or_path or "")
    if theirs.revision and theirs.revision != (revision or "main"):
        raise ValueError(
            f"The adapter {folder.path!r} was trained on revision {theirs.revision!r} of {name!r}, but the base is "
            f"revision {revision or 'main'!r}. Give revision={theirs.revision!r}, by which a base given by name is "
            "loaded, and load one in memory at it."
        )
    if not name or same_place(name, base_name):
        return
    try:
        config = AutoConfig.from_pretrained(name, revision=theirs.revision)
    except (OSError, ValueError):
        config = None
    if config is not None and config_hash(config) != config_hash(base):
        one, two = _architecture(config), _architecture(base)
        keys = [key for key in sorted(one.keys() | two.keys()) if one.get(key) != two.get(key)]
        differences = ", ".join(f"{key} {one.get(key)!r} and {two.get(key)!r}" for key in keys)
        raise ValueError(
            f"The adapter {folder.path!r} belongs to another base: the configs of {name!r} ({config_hash(config)}) and "
            f"{base_name or 'the base in memory'!r} ({config_hash(base)}) differ in {differences}."
        )
    if base_name and not other_name:
        raise ValueError(
            f"The adapter {folder.path!r} was trained on {name!r}, but the base is {base_name!r}. Give that base; or, "
            "if they are the same weights under two names, pass allow_other_base_name=True."
        )


def check_below(reward: AdapterFolder) -> None:
    """Refuse a reward adapter that stands on an SFT adapter which is not there.

    Raises:
        ValueError: its base's name is that of an adapter.
    """
    name = str(reward.config.base_model_name_or_path or "")
    if name and names_adapter(name):
        raise ValueError(
            f"The reward adapter {reward.path!r} was trained on the SFT adapter {name!r}, and means nothing without "
            f"it. Give {name!r} as sft_adapter; if the sft_adapter is that one moved, pass reward_on_sft=True; if the "
            "base is a model into which it is merged, pass reward_on_sft=False and allow_other_base_name=True."
        )
