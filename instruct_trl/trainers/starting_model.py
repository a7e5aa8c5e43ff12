"""Checks of the model that is to be trained, the same in all three trainers, before any training.

An adapter that was saved goes on training. What is trained has float32 weights. A model in which nothing would train,
or which lacks rows for its tokenizer's tokens, is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch

from instruct_trl.models.loading import load_causal_model
from instruct_trl.models.model_files import names_adapter
from instruct_trl.models.precision import HALF, in_half, is_quantised, keep_whole_modules_in_float32, one_dtype
from instruct_trl.models.reward import RewardScorer
from instruct_trl.models.role_adapters import RewardRole

logger = logging.getLogger(__name__)


def settle_model_kwargs(args: Any, peft: bool) -> None:
    """Make one name of the dtype that the user asked for in `args.model_init_kwargs`, and say where it is too coarse.

    Args:
        args: of a trainer.
        peft: adapters are trained, whose base may be in any precision.

    Raises:
        ValueError: two names, two dtypes; or no dtype has this name.
    """
    args.model_init_kwargs = kwargs = one_dtype(args.model_init_kwargs)
    if peft or not kwargs or kwargs.get("quantization_config") is not None:
        return
    dtype = kwargs.get("dtype")
    if dtype == "auto":  # a checkpoint's own precision, which nobody asked for by name
        kwargs["dtype"] = "float32"
    elif dtype in (*HALF, "bfloat16", "float16"):
        _say(
            args,
            f"model_init_kwargs asks for weights in {str(dtype).removeprefix('torch.')}: at small learning rates most "
            "steps round to none. For weights in float32 and forwards in bfloat16 leave dtype out and set bf16=True.",
        )


def check_peft_config(peft_config: Any) -> None:
    """Refuse the config of a new adapter that would be made for inference.

    Raises:
        ValueError: so it is.
    """
    if getattr(peft_config, "inference_mode", False):
        raise ValueError(
            "peft_config has inference_mode=True, as a config that was read from a folder has, and its adapter would "
            "not train. Set peft_config.inference_mode = False."
        )


def check_adapters(model: Any, peft_config: Any, name: str) -> None:
    """Refuse adapters that would not train, before upstream builds anything.

    Args:
        model: a path or a model.
        peft_config: of a new adapter, or None.
        name: of the model, in the error.

    Raises:
        ValueError: a PeftModel or a config made for inference, or a new adapter on the folder of another.
    """
    check_peft_config(peft_config)
    if isinstance(model, str):
        if peft_config is not None and names_adapter(model):
            raise ValueError(
                f"{model!r} is an adapter, and peft_config= asks for another. Leave peft_config out, and the adapter "
                "goes on training; or merge it (AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload()), and "
                "give the merged model."
            )
        return
    if peft_config is None:
        check_something_trains(model, name)


def check_something_trains(model: Any, name: str, but: Any = ()) -> None:
    """Refuse a model without trainable parameters.

    Args:
        model: the model.
        name: of it, in the error.
        but: parameters that do not count, e.g. of a reward model's head.

    Raises:
        ValueError: all are frozen.
    """
    head = {id(parameter) for parameter in but}
    if any(parameter.requires_grad and id(parameter) not in head for parameter in model.parameters()):
        return
    if hasattr(model, "peft_config"):
        remedy = "Load it with PeftModel.from_pretrained(..., is_trainable=True), or give the adapter's folder."
    else:
        remedy = "Call model.requires_grad_(True), or give a peft_config."
    raise ValueError(
        f"{name} ({type(model).__name__}) has no trainable parameters: training would change nothing. {remedy}"
    )


def train_in_float32(model: Any, name: str, args: Any, peft_config: Any = None) -> Any:
    """Give a model in memory that is to be trained whole float32 weights; what adapters train, too. Says so.

    transformers loads a checkpoint in the precision that it was saved in. bf16 tells numbers of 0.02 apart by 6e-5,
    and Adam's step is about the learning rate: most steps would round to none.

    Args:
        model: a path, which is returned as it is, or a model, which is changed in place.
        name: of it, in the line.
        args: of the trainer.
        peft_config: of a new adapter, whose base may stay as it is.
    """
    if isinstance(model, str) or peft_config is not None or is_quantised(model):
        return model
    parameters = list(model.parameters())
    dtype = in_half(model)
    if dtype is None or any(hasattr(parameter, "ds_id") for parameter in parameters):  # shards have masters in float32
        return model
    if hasattr(model, "peft_config"):
        keep_adapters_in_float32(model)
    else:
        model.float()
    _say(
        args,
        f"{name} was given in {str(dtype).removeprefix('torch.')}, in which most steps of the optimizer round to none. "
        "What is trained of it has float32 weights from here on; bf16=True computes in bfloat16.",
    )
    return model


def keep_adapters_in_float32(model: Any) -> None:
    """Float32 for every weight that adapters train on a base in half precision, and for the copies of a reference."""
    if not hasattr(model, "peft_config") or is_quantised(model):
        return
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return
    keep_whole_modules_in_float32(model)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in HALF:
            parameter.data = parameter.data.float()


def load_adapter_to_train(model: Any, args: Any, quantization_config: Any = None) -> Any:
    """The folder, or the name, of a language model's adapter becomes a PeftModel that goes on training.

    Anything else is returned as it is.

    Raises:
        ValueError: it is a reward model's, or does not fit its base.
    """
    if not isinstance(model, str) or not names_adapter(model):
        return model
    return load_causal_model(model, trainable=True, **loading_kwargs(args, quantization_config))


def loading_kwargs(args: Any, quantization_config: Any = None) -> dict[str, Any]:
    """The arguments of `from_pretrained` for a model that upstream does not load, as the user gave them in `args`."""
    given: Any = args.model_init_kwargs or {}
    kwargs = {"trust_remote_code": args.trust_remote_code, "quantization_config": quantization_config, **given}
    return {name: value for name, value in kwargs.items() if value is not None}


def trained_beside_a_base(model: Any, peft_config: Any) -> bool:
    """Whether adapters are what is trained of `model`, a path or a model."""
    if peft_config is not None:
        return True
    return names_adapter(model) if isinstance(model, str) else hasattr(model, "peft_config")


def place_reward_models(reward_funcs: Iterable[Any], device: torch.device) -> None:
    """Move reward models to the device of training: one given in memory would stay on the CPU beside a GPU.

    Not one that was spread over devices, or quantised, where it lies; nor a role, whose base is the policy's.
    """
    models = [func.model for func in reward_funcs if isinstance(func, RewardScorer)]
    for model in models:
        if not (isinstance(model, RewardRole) or is_quantised(model) or hasattr(model, "hf_device_map")):
            model.to(device)


def _say(args: Any, line: str) -> None:
    """One line for the user, from one process. A warning, since Python's logging hides anything less by default."""
    if args.process_index == 0:
        logger.warning(line)
