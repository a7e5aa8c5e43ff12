"""What a forward and a backward pass keep in memory, found by running them on shapes alone: no weight, no data.

The model is made of fake tensors, which have a shape, a dtype and a device but no content. Autograd, autocast, PEFT and
gradient checkpointing run as ever, so that what they keep is read off and not derived for each architecture.

Legend: B rows, T tokens, H hidden units.
"""

from __future__ import annotations

import copy
import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from instruct_trl.models.adapters import without_adapters


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made while it is on, as long as they live; views share their storage's.

    Args:
        weights: dtype copies of these (autocast's) are counted apart as well.

    Attributes:
        now, peak: bytes alive now, and at most since the last `restart`.
        copies: bytes alive now that are copies of `weights` in another dtype.
    """

    def __init__(self, weights: Any = ()):
        super().__init__()
        self.now = self.peak = self.copies = 0
        self._alive: dict[int, tuple[int, bool]] = {}
        self._weights = {weight.untyped_storage()._cdata for weight in weights}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        is_copy = func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self._weights
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage(), is_copy)
        return out

    def _add(self, storage: torch.UntypedStorage, is_copy: bool) -> None:
        key = storage._cdata
        if key in self._alive or key in self._weights:
            return
        size = storage.nbytes()
        self._alive[key] = (size, is_copy)
        self.now += size
        self.copies += size * is_copy
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        size, is_copy = self._alive.pop(key, (0, False))
        self.now -= size
        self.copies -= size * is_copy

    def restart(self) -> None:
        """Count the peak from here on."""
        self.peak = self.now


@dataclass(frozen=True)
class Pass:
    """Bytes beyond the weights that a forward (and a backward) of the transformer without its head takes.

    Attributes:
        copies: of weights in autocast's dtype, alive at the end of the forward.
        forward: peak during the forward, copies included.
        kept: alive at the end of the forward, for the backward; copies included.
        backward: peak during the backward, the gradients of the weights included.
        gradients: of the weights, alive afterwards.
    """

    copies: int
    forward: int
    kept: int
    backward: int = 0
    gradients: int = 0


@dataclass(frozen=True)
class Precision:
    """dtype of the frozen weights, dtype of the trained ones, and whether bf16 autocast is on."""

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
        config: of a decoder, as `AutoConfig` reads it.
        precision: float32 without autocast by default.
        peft_config: a LoraConfig: then its adapter alone is trained.
        train: with gradient and a backward; otherwise one forward without gradient.
        checkpointing: gradient checkpointing, not reentrant.
        accumulates: gradients of a pass before are there already and are added to.
    """
    precision = precision or Precision()
    shapes = meta_model(config, precision.weights, peft_config, precision.adapters)
    with FakeTensorMode():
        model = _trained_model(shapes, checkpointing and train, adapters=peft_config is not None)
        ids = torch.zeros(rows, tokens, dtype=torch.long)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        with LiveBytes(model.parameters()) as live:
            result = _one_pass(model, inputs, live, train, precision.autocast)
            if accumulates and train:
                live.restart()
                result = _one_pass(model, inputs, live, train, precision.autocast)
        return result


def meta_model(
    config: Any, weights: torch.dtype, peft_config: Any = None, adapters: torch.dtype = torch.float32
) -> Any:
    """The causal language model of `config` on the meta device: shapes and dtypes, no memory; with its adapter, if any.

    With `peft_config` the adapter alone requires a gradient.
    """
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
    """`model` with fake tensors in place of meta tensors, tied weights tied as before. Call it in a FakeTensorMode."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                empty = torch.empty(old.shape, dtype=old.dtype)
                module._parameters[name] = made.setdefault(
                    id(old), nn.Parameter(empty, requires_grad=old.requires_grad)
                )
        for name, old in module._buffers.items():
            if old is not None:
                module._buffers[name] = torch.empty(old.shape, dtype=old.dtype)
    return model


def _trained_model(shapes: Any, checkpointing: bool, adapters: bool) -> Any:
    model = _fake(shapes)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if checkpointing:
        # The random state has no content here either.
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        if adapters:
            model.enable_input_require_grads()
    return model


def _one_pass(model: Any, inputs: dict[str, Any], live: LiveBytes, train: bool, autocast: bool) -> Pass:
    transformer = without_adapters(model).base_model
    before = live.now
    context = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    with torch.set_grad_enabled(train):
        with context:
            hidden = transformer(**inputs).last_hidden_state
            # Inside the context: the head, which comes next, runs in it, and autocast's copies live until it ends.
            copies, forward, kept = live.copies, live.peak, live.now
        if not train:
            return Pass(copies, forward, kept)
        live.restart()
        hidden.float().sum().backward()
    del hidden
    return Pass(copies, forward - before, kept - before, live.peak, live.now)
