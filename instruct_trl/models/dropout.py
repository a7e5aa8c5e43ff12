"""Residual dropout (the paper's SFT: 0.2) on any decoder, without touching its weights, its config or its file on disk.

Modern decoders have no residual dropout at all, older ones have it under many names. Here it always works the same
way: a forward hook drops out what a branch (attention, MLP) is about to add to the residual stream, and whatever
residual dropout the architecture has of its own is set to 0 meanwhile. And no dropout at all: `switch_off_dropout`.

Legend: B rows, T tokens, H hidden.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from instruct_trl.models.adapters import without_adapters

# Names of a layer's attention-like branch (a recurrent mixer stands in its place) and of its MLP-like one. `fc2` is
# for OPT and its kin, whose layer holds the two projections of the MLP itself.
_ATTENTION = re.compile(r"attn|attention|mamba|mixer|linear_attn|short_conv")
_MLP = re.compile(r"mlp|feed_forward|ffn|moe|^fc2$")
_NOT_A_BRANCH = re.compile(r"norm|dropout|layer_?scale|^ln_|gate$")
# Gemma 2, OLMo 2 and GLM 4 normalise a branch's output before adding it: there the branch ends in that norm. Where the
# MLP has no such norm, `post_attention_layernorm` is its input norm instead (Llama's name for it).
_POST_MLP_NORM = ("post_feedforward_layernorm", "post_mlp_layernorm")
_POST_ATTENTION_NORM = ("post_self_attn_layernorm", "post_attention_layernorm")

# Where architectures keep a residual dropout of their own: as modules (paths inside a layer) ...
_OWN_MODULE = re.compile(
    r"(^|\.)(resid_dropout|resid_attn_dropout|resid_mlp_dropout|post_attention_dropout|post_mlp_dropout"
    r"|hidden_dropout|residual_dropout)$|^dropout$|^mlp\.dropout$"
)
# ... or as numbers given to F.dropout. A bare `dropout` counts on the layer only: in attention it is about the weights.
_OWN_NUMBER = ("hidden_dropout", "residual_dropout", "resid_pdrop")
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def switch_off_dropout(model: nn.Module) -> None:
    """Set every dropout of `model` to 0: in train mode it then computes what it computes in eval mode.

    Architectures keep their rates as `nn.Dropout` modules (TRL switches off no others), as numbers of a module that
    calls `F.dropout` or drops attention weights (OPT, Starcoder2, Llama), or in the config, which they read at each
    call (Falcon, GPT-J). The model's own config stays as it is, so that a saved model says what was loaded.
    """
    for module in model.modules():
        own = vars(module)
        if isinstance(module, _DROPOUTS):
            module.p = 0.0
        for name, value in list(own.items()):
            if _is_rate(name, value):
                setattr(module, name, 0.0)
            elif "drop" in name and isinstance(value, dict):  # PEFT's LoHa and LoKr: a rate for each adapter
                value.update({key: 0.0 for key, rate in value.items() if _is_rate(name, rate)})
        # Whole models read no rate at each call, and they save their config.
        config = own.get("config")
        if config is not None and not any(isinstance(part, PreTrainedModel) for part in module.modules()):
            rates = tuple(name for name, value in vars(config).items() if _is_rate(name, value))
            own["config"] = _ConfigWithout(config, rates) if rates else config


def _is_rate(name: str, value: Any) -> bool:
    return "drop" in name and isinstance(value, (int, float)) and not isinstance(value, bool) and value != 0


class _ConfigWithout:
    """A config that says 0 for some rates; everything else, also what is set later, is the config's behind it."""

    def __init__(self, config: Any, rates: tuple[str, ...]):
        vars(self).update(_config=config, _rates=rates)

    def __getattr__(self, name: str) -> Any:
        if name in ("_config", "_rates"):  # not there yet, while a copy of it is made
            raise AttributeError(name)
        return 0.0 if name in self._rates else getattr(self._config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._config, name, value)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of the decoder, outermost list first, found by what they hold and not by family.

    Raises:
        ValueError: no list of layers holds an attention-like and an MLP-like branch.
    """
    base = without_adapters(model)
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else base
    for root in (decoder, base):
        for module in root.modules():
            if isinstance(module, nn.ModuleList) and len(module) and all(all(_branches(part)) for part in module):
                return list(module)
    raise ValueError(
        f"residual_dropout: no decoder layers with an attention and an MLP branch found in {type(base).__name__}. "
        "Set residual_dropout to null to train it with the dropout of its own config."
    )


def residual_branches(model: nn.Module) -> list[nn.Module]:
    """The modules whose output (B, T, H) is what a branch adds to the residual stream: two or more per layer.

    Raises:
        ValueError: see `decoder_layers`.
    """
    return [end for layer in decoder_layers(model) for end in _branch_ends(layer)]


@contextmanager
def residual_dropout(model: nn.Module, p: float | None) -> Iterator[None]:
    """While active, in train mode, each branch's output is dropped out with probability `p` before it is added.

    Embedding and attention-weight dropout stay as they are. On leaving, the model is as before: plain.

    Args:
        model: a decoder, wrapped by PEFT or not.
        p: probability, 0.2 in the paper; 0 means none, not even the architecture's own; None leaves the model alone.

    Raises:
        ValueError: p outside [0, 1), or no decoder layers found.
    """
    if p is None:
        yield
        return
    if not 0 <= p < 1:
        raise ValueError(f"residual_dropout must be in [0, 1), got {p}.")
    own = [knob for layer in decoder_layers(model) for knob in _own_residual_dropout(layer)]
    # Gradient checkpointing recomputes the same masks: torch restores the random state for it.
    ends = residual_branches(model) if p > 0 else []
    handles = [end.register_forward_hook(partial(_drop, p)) for end in ends]
    try:
        for holder, name, value in own:
            # Falcon's layer reads the rate from the config that it shares with the model: it gets one that says 0.
            off = 0.0 if isinstance(value, (int, float)) else _ConfigWithout(value, ("hidden_dropout",))
            setattr(holder, name, off)
        yield
    finally:
        for holder, name, value in own:
            setattr(holder, name, value)
        for handle in handles:
            handle.remove()


def _drop(p: float, module: nn.Module, args: Any, output: Any) -> Any:
    if not module.training:
        return output
    if isinstance(output, torch.Tensor):
        return F.dropout(output, p)
    return (F.dropout(output[0], p), *output[1:])  # attention also returns its weights


def _branches(layer: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    children = [(n, m) for n, m in layer.named_children() if not _NOT_A_BRANCH.search(n)]
    attention = [m for n, m in children if _ATTENTION.search(n)]
    return attention, [m for n, m in children if _MLP.search(n) and not _ATTENTION.search(n)]


def _branch_ends(layer: nn.Module) -> list[nn.Module]:
    """The module of each branch from which its output reaches the residual stream."""
    attention, mlp = _branches(layer)
    post_mlp = [getattr(layer, n) for n in _POST_MLP_NORM if hasattr(layer, n)]
    if post_mlp:
        post_attention = [getattr(layer, n) for n in _POST_ATTENTION_NORM if hasattr(layer, n)]
        return [*(post_attention[:1] or attention), *post_mlp]
    ends = []
    for branch in (*attention, *mlp):
        # Bloom and MPT hand the residual to the branch, which returns the sum: dropout there would drop the stream.
        # Their branch ends in its last matrix, in the order in which it declares them.
        if "residual" in inspect.signature(branch.forward).parameters:
            branch = [part for part in branch.children() if getattr(getattr(part, "weight", None), "ndim", 0) == 2][-1]
        ends.append(branch)
    return ends


def _own_residual_dropout(layer: nn.Module) -> list[tuple[Any, str, Any]]:
    """(holder, attribute, value) of each residual dropout the architecture has of its own in this layer."""
    found: list[tuple[Any, str, Any]] = []
    for path, module in layer.named_modules():
        if isinstance(module, nn.Dropout):
            if _OWN_MODULE.search(path):
                found.append((module, "p", module.p))
            continue
        names = (*_OWN_NUMBER, "dropout") if path == "" else _OWN_NUMBER
        found += [(module, n, getattr(module, n)) for n in names if isinstance(getattr(module, n, None), (int, float))]
    if isinstance(getattr(getattr(layer, "config", None), "hidden_dropout", None), (int, float)):
        found.append((layer, "config", layer.config))
    return found
