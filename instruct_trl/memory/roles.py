"""The models of a run and how they are held: sizes from `config.json` alone, counted on the meta device."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from instruct_trl.memory.arithmetic import nf4_bytes
from instruct_trl.memory.trace import Pass, Precision, meta_model, trace_pass

KINDS = (
    "weights", "adapters", "optimizer", "average", "gradients", "bf16 copies", "activations", "logits", "KV cache",
)  # fmt: skip
_TRACED: dict[tuple, Pass] = {}  # the roles of a run ask for the same pass more than once


class Item(NamedTuple):
    """Bytes of one kind that belong to one role."""

    role: str
    kind: str
    size: int


def total(items: Iterable[Item], role: str | None = None, kinds: Iterable[str] = KINDS) -> int:
    """Bytes of these kinds, of one role or of all."""
    kinds = tuple(kinds)
    return sum(item.size for item in items if item.kind in kinds and role in (None, item.role))


class ModelShape:
    """Counts of one architecture, as a causal language model or, with `score`, as a classifier with one scalar head."""

    def __init__(self, config: Any, score: bool = False):
        self.config, self.score = config, score
        self._adapters: dict[str, int] = {}
        self._text = config.get_text_config()
        self.hidden: int = self._text.hidden_size
        self.vocabulary: int = self._text.vocab_size
        # Parameters of the LM head's matrix, tied or not.
        self.head = 0 if score else self.vocabulary * self.hidden

    @cached_property
    def _model(self) -> Any:
        return meta_model(self.config, torch.float32)

    @cached_property
    def parameters(self) -> int:
        """All parameters; tied weights count once."""
        model = self._model.base_model if self.score else self._model
        return sum(p.numel() for p in model.parameters()) + self.hidden * self.score

    @cached_property
    def matrices(self) -> list[int]:
        """Parameters of each linear layer that bitsandbytes quantises: all but the head."""
        from transformers.quantizers.base import get_keys_to_not_convert

        kept = set(get_keys_to_not_convert(self._model))
        linear = (m for name, m in self._model.named_modules() if isinstance(m, nn.Linear) and name not in kept)
        return [module.weight.numel() for module in linear]

    def cached_numbers(self, tokens: int) -> int:
        """2 · Σ_layer T · heads · dim: keys and values of every token, or of a sliding layer's window."""
        heads = self._text.num_attention_heads
        width = getattr(self._text, "head_dim", None) or self.hidden // heads
        window, layers = getattr(self._text, "sliding_window", None), self._text.num_hidden_layers
        kinds = getattr(self._text, "layer_types", None) or ["sliding_attention"] * layers
        # A sliding layer keeps one token fewer than its window: the next token is the last of it.
        in_window = min(tokens, window - 1) if window else tokens
        kept = sum(in_window if kind == "sliding_attention" else tokens for kind in kinds)
        return 2 * kept * (getattr(self._text, "num_key_value_heads", None) or heads) * width

    def adapter_parameters(self, peft_config: Any) -> int:
        """Trainable parameters that PEFT adds, with LoRA or any other method."""
        key = str(peft_config)
        if key not in self._adapters:  # a large model takes a second to build, and every role asks
            model = meta_model(self.config, torch.float32, without_head(peft_config))
            self._adapters[key] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return self._adapters[key]


@dataclass(frozen=True)
class RoleModel:
    """One role's model and how it is held.

    Attributes:
        name: policy, reference, reward or value; or base.
        peft_config: its adapter's, or None.
        scalar_head: the adapter brings a head of H numbers (reward and value on a shared base).
        nf4: None if it is not quantised; else whether the scales are quantised too.
        own_base: False for a role that runs on another role's base.
        trained: it has gradients and moments.
        averaged: a moving average of the trained weights is kept.
    """

    name: str
    shape: ModelShape
    precision: Precision = field(default_factory=Precision)
    peft_config: Any = None
    scalar_head: bool = False
    nf4: bool | None = None
    own_base: bool = True
    trained: bool = False
    averaged: bool = False

    @property
    def adapter(self) -> int:
        """Parameters of the adapter and of the head that comes with it."""
        if self.peft_config is None:
            return 0
        return self.shape.adapter_parameters(self.peft_config) + self.shape.hidden * self.scalar_head

    @property
    def trainable(self) -> int:
        if not self.trained:
            return 0
        return self.adapter if self.peft_config is not None else self.shape.parameters

    @property
    def gradients(self) -> int:
        """Bytes of the gradients, in the dtype of the trained parameters. A moving average takes the same."""
        dtype = self.precision.weights if self.peft_config is None else self.precision.adapters
        return self.trainable * dtype.itemsize

    @property
    def head_width(self) -> int:
        """Bytes of a logit as the head computes it."""
        return 2 if self.precision.autocast else self.precision.weights.itemsize

    @property
    def head_copy(self) -> int:
        """The LM head's bf16 copy: under autocast, if the head is trained in float32."""
        full = self.trained and self.peft_config is None and self.precision.weights == torch.float32
        return 2 * self.shape.head if full and self.precision.autocast else 0

    @property
    def unpacked(self) -> int:
        """The largest 4-bit matrix, unpacked to be multiplied."""
        return 0 if self.nf4 is None else max(self.shape.matrices) * self.precision.weights.itemsize

    def base_bytes(self) -> int:
        """The base's weights. With nf4, linear layers are in 4 bits; embeddings, norms and LM head are not."""
        packed = [] if self.nf4 is None else self.shape.matrices
        plain = (self.shape.parameters - sum(packed)) * self.precision.weights.itemsize
        return plain + nf4_bytes(packed, bool(self.nf4))

    def resident(self) -> list[Item]:
        """Weights, adapter, AdamW's two moments, and the moving average."""
        sizes = {
            "weights": self.base_bytes() if self.own_base else 0,
            "adapters": self.adapter * self.precision.adapters.itemsize,
            "optimizer": 2 * self.gradients,
            "average": self.gradients if self.averaged else 0,
        }
        return [Item(self.name, kind, size) for kind, size in sizes.items() if size]

    def run(self, rows: int, tokens: int, **how: Any) -> Pass:
        """One traced pass of this model; see `trace_pass`."""
        config, adapter = self.shape.config, self.peft_config
        key = (config.to_json_string(), str(adapter), self.precision, rows, tokens, *sorted(how.items()))
        if key not in _TRACED:
            _TRACED[key] = trace_pass(config, rows, tokens, precision=self.precision, peft_config=adapter, **how)
        return _TRACED[key]

    def kv_cache(self, rows: int, tokens: int) -> int:
        """Bytes of the keys and values of a generation.

        Under autocast they are bf16 only without RoPE: rotated keys stay in float32, and transformers keeps the values
        in the dtype of the keys. Adapters sample without autocast; see `generation_phase`.
        """
        rotates = bool(getattr(self.shape.config.get_text_config(), "rope_parameters", None))
        bf16 = self.precision.autocast and self.peft_config is None and not rotates
        return rows * self.shape.cached_numbers(tokens) * (2 if bf16 else self.precision.weights.itemsize)


def without_head(peft_config: Any) -> Any:
    """The same adapter as one that trains, on a causal language model. A classifier's head is counted apart."""
    config = copy.deepcopy(peft_config)
    config.task_type, config.inference_mode = "CAUSAL_LM", False
    config.modules_to_save = [n for n in config.modules_to_save or [] if n not in ("score", "classifier")] or None
    return config


def read_config(name: str | Path) -> Any:
    """The config of a local folder, of the base of a PEFT adapter's folder, or of a name on the hub.

    Nothing but `config.json` (and `adapter_config.json`) is read.

    Raises:
        ValueError: there is no such model.
    """
    from transformers import AutoConfig

    from instruct_trl.models.model_files import check_model_path

    adapter = Path(name, "adapter_config.json")
    if adapter.is_file():
        return read_config(json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"])
    check_model_path(name, weights=False)
    return AutoConfig.from_pretrained(name)


def read_adapter(name: str | Path | None) -> Any:
    """The LoraConfig of an adapter's local folder as one that trains, or None; its head is counted apart."""
    from peft import PeftConfig

    if name is None or not Path(name, "adapter_config.json").is_file():
        return None
    return without_head(PeftConfig.from_pretrained(str(name)))
