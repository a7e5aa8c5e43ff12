"""Running a model for a while with other adapters than its own, and finding it afterwards as it was."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer


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
