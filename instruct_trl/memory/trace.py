"""The bytes that a forward and a backward pass keep, counted on fake tensors: no weights, no data.

A fake tensor has a shape and a dtype but no content. Autograd, autocast, PEFT and gradient checkpointing run as in
training, so the count follows the architecture and the installed versions. torch's own MemTracker counts the same bytes
for a full model, but it refuses frozen parameters, and so every adapter (torch 2.13).
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from instruct_trl.models.adapters import without_adapters


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made while it is on, as long as they live.

    Args:
        weights: these are not counted. Their copies in another dtype (autocast's) are also counted apart.

    Attributes:
        now, peak: bytes alive now, and the most since `restart`.
        copies: bytes alive now that are copies of `weights`.
    """

    def __init__(self, weights: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.now = self.peak = self.copies = 0
        self._alive: set[int] = set()
        self._weights = {weight.untyped_storage()._cdata for weight in weights}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        is_copy = func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self._weights
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                # A view shares its storage with what it views, so counting storages counts it once.
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._alive and key not in self._weights:
                    self._alive.add(key)
                    self._change(size, is_copy)
                    weakref.finalize(storage, self._remove, key, size, is_copy)
        return out

    def _change(self, size: int, is_copy: bool) -> None:
        self.now += size
        self.copies += size * is_copy
        self.peak = max(self.peak, self.now)

    def _remove(self, key: int, size: int, is_copy: bool) -> None:
        self._alive.discard(key)
        self._change(-size, is_copy)

    def restart(self) -> None:
        """Measure the peak from here on."""
        self.peak = self.now


class Pass(NamedTuple):
    """Bytes beyond the weights that one pass of the transformer takes, without its head.

    Attributes:
        copies: copies of weights in autocast's dtype, alive at the end of the forward.
        forward: peak during the forward, copies included.
        kept: alive at the end of the forward, for the backward; copies included.
        backward: peak during the backward, gradients included.
        gradients: gradients of the weights, alive afterwards.
    """

    copies: int
    forward: int
    kept: int
    backward: int = 0
    gradients: int = 0


@dataclass(frozen=True)
class Precision:
    """The dtype of the weights, the dtype of a trained adapter, and whether bf16 autocast is on."""

    weights: torch.dtype = torch.float32
    adapters: torch.dtype = torch.float32
    autocast: bool = False


def trace_pass(
    config: Any,
    rows: int,
    tokens: int,
    *,
    precision: Precision | None = None,
    peft_config: Any = None,
    train: bool = False,
    checkpointing: bool = False,
    accumulates: bool = False,
) -> Pass:
    """Run one pass over (B, T) = (`rows`, `tokens`) on fake tensors and count.

    Args:
        config: a decoder's, as `AutoConfig` reads it.
        precision: float32 without autocast by default.
        peft_config: train this adapter alone.
        train: run a backward as well; without it one forward runs without gradient.
        checkpointing: use gradient checkpointing, not reentrant.
        accumulates: add to the gradients of an earlier pass.
    """
    precision = precision or Precision()
    shapes = meta_model(config, precision.weights, peft_config, precision.adapters)
    with FakeTensorMode():
        model = _fake(shapes).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing and train:
            # There is no random state to preserve: it has no content here either.
            model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
            if peft_config is not None:
                model.enable_input_require_grads()
        ids = torch.zeros(rows, tokens, dtype=torch.long)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        with LiveBytes(model.parameters()) as live:
            for _ in range(2 if accumulates and train else 1):
                live.restart()
                found = _one_pass(model, inputs, live, train, precision.autocast)
        return found


def meta_model(
    config: Any, weights: torch.dtype, peft_config: Any = None, adapters: torch.dtype = torch.float32
) -> Any:
    """The causal language model of `config` on the meta device; with `peft_config` its adapter alone is trained."""
    from accelerate import init_empty_weights
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=True):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=weights)
        model.tie_weights()
        if peft_config is not None:
            model = get_peft_model(model, copy.deepcopy(peft_config))
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(adapters)
    return model


def _fake(model: Any) -> Any:
    """`model` with fake tensors in place of meta tensors; tied weights stay tied. Call it in a FakeTensorMode."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                new = nn.Parameter(torch.empty(old.shape, dtype=old.dtype), requires_grad=old.requires_grad)
                module._parameters[name] = made.setdefault(id(old), new)
        for name, old in module._buffers.items():
            if old is not None:
                module._buffers[name] = torch.empty(old.shape, dtype=old.dtype)
    return model


def _one_pass(model: Any, inputs: dict[str, Any], live: LiveBytes, train: bool, autocast: bool) -> Pass:
    before = live.now
    with torch.set_grad_enabled(train):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            hidden = without_adapters(model).base_model(**inputs).last_hidden_state
            # The head comes next, in the same context. So autocast's copies are still alive then.
            copies, forward, kept = live.copies, live.peak - before, live.now - before
        if not train:
            return Pass(copies, forward, kept)
        live.restart()
        hidden.float().sum().backward()
    del hidden  # it is the head's, and no gradient
    return Pass(copies, forward, kept, live.peak, live.now)
