"""In what precision weights are loaded, and that what is trained is in float32."""

from __future__ import annotations

from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn

from instruct_trl._upstream import HEADS

HALF = (torch.bfloat16, torch.float16)


def one_dtype(kwargs: Any, name: str = "model_init_kwargs") -> Any:
    """`from_pretrained` kwargs with the old name `torch_dtype` replaced by `dtype`.

    Raises ValueError, with the `name` of what holds them, if both are given and differ, or no dtype has this name.
    """
    if not isinstance(kwargs, dict):
        return kwargs
    kwargs, given = dict(kwargs), {}
    for key in ("dtype", "torch_dtype"):
        if key not in kwargs:
            continue
        value = kwargs.pop(key)
        if value not in (None, "auto"):
            dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
            if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
                raise ValueError(f"{name}[{key!r}] is {value!r}. Give 'float32', 'bfloat16', 'float16' or 'auto'.")
            value = str(dtype).removeprefix("torch.") if isinstance(value, str) else dtype
        given[key] = value
    if len(set(given.values())) > 1:
        raise ValueError(
            f"{name} has dtype={given['dtype']!r} and torch_dtype={given['torch_dtype']!r}, which is its old name. "
            "Give dtype alone."
        )
    return kwargs | ({"dtype": next(iter(given.values()))} if given else {})


def in_half(module: nn.Module) -> torch.dtype | None:
    """The half precision of the weights that `module` trains, if any of them is in one."""
    return next((p.dtype for p in module.parameters() if p.requires_grad and p.dtype in HALF), None)


def is_quantised(model: Any) -> bool:
    """True for a model whose weights transformers loaded quantised."""
    return bool(getattr(model, "is_quantized", False))


def keep_whole_modules_in_float32(model: Any, adapter: str | None = None) -> bool:
    """Cast to float32 the modules that one adapter (or all) of a PeftModel trains whole, if they are in half precision.

    Returns whether there was any.
    """
    changed = False
    output_head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, module in model.named_modules():
        if not isinstance(module, ModulesToSaveWrapper):
            continue
        is_head = name.rpartition(".")[2] in HEADS or module is output_head
        for key, own in module.modules_to_save.items():
            dtype = next((p.dtype for p in own.parameters() if p.dtype in HALF), None)
            if dtype is not None and adapter in (None, key):
                # A step of the optimizer is smaller than what bf16 tells apart, and would be rounded away.
                own.float()
                own.register_forward_pre_hook(_cast_input)
                # Layers behind it expect the base's precision. Behind a head there are none.
                if not is_head:
                    own.register_forward_hook(lambda module, args, output, dtype=dtype: output.to(dtype))
                changed = True
    return changed


def _cast_input(module: nn.Module, args: tuple) -> tuple:
    """Floating inputs become float32; the token ids of an embedding stay as they are."""
    return tuple(
        value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value for value in args
    )
