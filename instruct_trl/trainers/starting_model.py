"""The model that training starts from: refused if nothing of it would train, loaded if it is an adapter, in float32."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from transformers import AutoConfig, set_seed

from instruct_trl._upstream import create_classifier, keep_4bit_trainable, match_adapters_to_precision, score_head
from instruct_trl.models import loading
from instruct_trl.models.adapters import has_adapters
from instruct_trl.models.model_files import check_model_path, is_sft_adapter, names_adapter
from instruct_trl.models.precision import HALF, in_half, is_quantised, keep_whole_modules_in_float32, one_dtype
from instruct_trl.models.reward import RewardScorer
from instruct_trl.models.role_adapters import RewardRole

logger = logging.getLogger(__name__)

HEAD_REMEDY = (
    "The head would stay random in training, and reloading would draw another one. Use "
    "LoraConfig(task_type='SEQ_CLS'), or modules_to_save=['score']."
)


def say(args: Any, line: str | None) -> None:
    """One line for the user, from one process. A warning, since Python's logging hides anything less by default."""
    if line and args.process_index == 0:
        logger.warning(line)


def as_config(args: Any, kind: Any, model: Any, suffix: str) -> Any:
    """`args`, or by default those of `kind` for a folder named after `model`, a path or a model."""
    if args is None:
        name = model if isinstance(model, str) else model.config._name_or_path
        return kind(f"{name.rstrip('/').split('/')[-1] or 'model'}-{suffix}")
    if not isinstance(args, kind):
        raise ValueError(
            f"args is of type {type(args).__name__}, which lacks settings of this trainer. Give it as {kind.__name__}."
        )
    return args


def loading_kwargs(args: Any, quantization_config: Any = None) -> dict[str, Any]:
    """The arguments of `from_pretrained` for a model that upstream does not load, as the user gave them in `args`."""
    given: Any = args.model_init_kwargs or {}
    kwargs = {"trust_remote_code": args.trust_remote_code, "quantization_config": quantization_config, **given}
    return {name: value for name, value in kwargs.items() if value is not None}


# Something must train -------------------------------------------------------------------------------------------------


def check_adapters(model: Any, peft_config: Any, name: str) -> None:
    """Refuse a PeftModel or a config that was made for inference, and a new adapter on the folder of another.

    `model` is a path or a model, `peft_config` that of a new adapter or None, `name` the model's in the ValueError.
    """
    _check_peft_config(peft_config)
    if isinstance(model, str):
        if peft_config is not None and names_adapter(model):
            raise ValueError(
                f"{model!r} is an adapter, and peft_config= asks for another. Leave peft_config out, and the adapter "
                "goes on training; or merge it (AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload()), and "
                "give the merged model."
            )
    elif peft_config is None:
        check_something_trains(model, name)


def _check_peft_config(peft_config: Any) -> None:
    if getattr(peft_config, "inference_mode", False):
        raise ValueError(
            "peft_config has inference_mode=True, as a config that was read from a folder has, and its adapter would "
            "not train. Set peft_config.inference_mode = False."
        )


def check_something_trains(model: Any, name: str, but: Iterable[Any] = ()) -> None:
    """Raises ValueError if all parameters of `model` are frozen, `but` (e.g. a reward model's head) not counted."""
    head = {id(parameter) for parameter in but}
    if not any(parameter.requires_grad and id(parameter) not in head for parameter in model.parameters()):
        remedy = "Call model.requires_grad_(True), or give a peft_config."
        if has_adapters(model):
            remedy = "Load it with PeftModel.from_pretrained(..., is_trainable=True), or give the adapter's folder."
        raise ValueError(
            f"{name} ({type(model).__name__}) has no trainable parameters: training would change nothing. {remedy}"
        )


def load_adapter_to_train(model: Any, args: Any, quantization_config: Any = None) -> Any:
    """A language model's adapter, by folder or name, as a PeftModel that goes on training; anything else as it is."""
    if not isinstance(model, str) or not names_adapter(model):
        return model
    return loading.load_causal_model(model, trainable=True, **loading_kwargs(args, quantization_config))


# Precision ------------------------------------------------------------------------------------------------------------


def settle_model_kwargs(args: Any, peft: bool) -> None:
    """Make one name of the dtype that the user asked for in `args.model_init_kwargs`, and warn if it is too coarse.

    With `peft`, adapters are trained, and their base may be in any precision.
    """
    args.model_init_kwargs = kwargs = one_dtype(args.model_init_kwargs)
    if peft or not kwargs or kwargs.get("quantization_config") is not None:
        return
    dtype = kwargs.get("dtype")
    if dtype == "auto":  # a checkpoint's own precision, which nobody asked for by name
        kwargs["dtype"] = "float32"
    elif dtype in (*HALF, "bfloat16", "float16"):
        say(
            args,
            f"model_init_kwargs asks for weights in {str(dtype).removeprefix('torch.')}: at small learning rates most "
            "steps round to none. For weights in float32 and forwards in bfloat16 leave dtype out and set bf16=True.",
        )


def train_in_float32(model: Any, name: str, args: Any, peft_config: Any = None) -> Any:
    """Give float32 weights to what is trained of a model in memory, in place, and warn; a path is returned as it is."""
    if isinstance(model, str) or peft_config is not None or is_quantised(model):
        return model  # the base of a new adapter may stay as it is
    # transformers loads a checkpoint in the precision that it was saved in. bf16 tells numbers of 0.02 apart by 6e-5,
    # and Adam's step is about the learning rate: most steps would round to none.
    dtype = in_half(model)
    if dtype is None or _is_sharded(model):
        return model
    if has_adapters(model):
        keep_adapters_in_float32(model)
    else:
        model.float()
    say(
        args,
        f"{name} was given in {str(dtype).removeprefix('torch.')}, in which most steps of the optimizer round to none. "
        "What is trained of it has float32 weights from here on; bf16=True computes in bfloat16.",
    )
    return model


def settle_precision(model: Any, bf16: bool | None) -> None:
    """To be called once upstream has loaded `model` and added adapters: what trains has gradients, and in float32."""
    keep_4bit_trainable(model)
    keep_adapters_in_float32(model)
    match_adapters_to_precision(model, bf16)


def keep_adapters_in_float32(model: Any) -> None:
    """Float32 for every weight that adapters train on a base in half precision, and for the copies of a reference."""
    if not has_adapters(model) or is_quantised(model) or _is_sharded(model):
        return
    keep_whole_modules_in_float32(model)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in HALF:
            parameter.data = parameter.data.float()


def _is_sharded(model: Any) -> bool:
    """True under ZeRO-3, whose optimizer keeps float32 masters of its own."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


# Reward models --------------------------------------------------------------------------------------------------------


def check_reward_start(model: Any, peft_config: Any, args: Any) -> None:
    """Refuse what cannot become a reward model, before anything is loaded.

    That is a path that is not there, more than one label, and adapters that do not train, that leave the score head
    frozen, or that put virtual tokens before the text.
    """
    if not isinstance(model, str):
        loading.check_single_label(model.config, type(model).__name__)
    else:
        check_model_path(model, **loading_kwargs(args))
        if not names_adapter(model):
            # A causal LM's config has transformers' default of 2 labels; TRL gives it a new head with one.
            config = AutoConfig.from_pretrained(model, **hub_options(args))
            if any(name.endswith("ForSequenceClassification") for name in config.architectures or []):
                loading.check_single_label(config, f"The model {model!r}")
    _check_peft_config(peft_config)
    if peft_config is None:
        if not isinstance(model, str) and has_adapters(model):
            check_something_trains(model, "The reward model", but=score_head(model).parameters())
        return
    if getattr(peft_config, "is_prompt_learning", False):
        raise ValueError(
            f"{type(peft_config).__name__} adds virtual tokens, which rankings do not support. Use LoraConfig."
        )
    trained = set(getattr(peft_config, "modules_to_save", None) or [])
    if peft_config.task_type != "SEQ_CLS" and not trained & {"score", "classifier"}:
        raise ValueError(f"`peft_config` freezes the score head. {HEAD_REMEDY}")


def load_reward_adapter(model: Any, peft_config: Any, args: Any, quantization_config: Any) -> Any:
    """The model that training starts from, if `model` names an adapter; anything else is returned as it is."""
    if not isinstance(model, str) or not names_adapter(model):
        return model
    kwargs = loading_kwargs(args, quantization_config)
    if not is_sft_adapter(model):
        check_adapters(model, peft_config, "The reward model")
        return loading.load_reward_model(model, trainable=True, **kwargs)[0]
    if peft_config is None:
        raise ValueError(
            f"{model!r} is the adapter of a language model. Pass peft_config=LoraConfig(task_type='SEQ_CLS', ...), and "
            "a new adapter is trained on it; or merge it (merge_and_unload), and give the merged model."
        )
    # Merged, for upstream would put the new adapter in the place of this one.
    return loading.classifier_on_sft(model, **kwargs)


def load_grown(model: Any, peft_config: Any, args: Any, quantization_config: Any, tokenizer: Any) -> Any:
    """The base of new adapters, by name, loaded and grown if it lacks rows for the tokenizer; else `model` as it is."""
    # Once adapters lie on it, its embedding cannot grow.
    if not isinstance(model, str) or peft_config is None:
        return model
    if AutoConfig.from_pretrained(model, **hub_options(args)).get_text_config().vocab_size >= loading.rows_for(
        tokenizer
    ):
        return model
    set_seed(args.seed)  # as upstream does before it draws the head
    base = create_classifier(model, **loading_kwargs(args, quantization_config))
    loading.fit_model_to_tokenizer(base, tokenizer)
    return base


def hub_options(args: Any) -> dict[str, Any]:
    """The arguments of `from_pretrained` for a config or a tokenizer."""
    init = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    return {"revision": init.get("revision"), "trust_remote_code": args.trust_remote_code}


def prepare_tokenizer(tokenizer: Any, args: Any, model: Any) -> None:
    """Settle EOS and pad token before upstream does, which would pad with EOS; `model` grows unless it is a path."""
    vocabulary = tokenizer.get_vocab()
    if args.eos_token is not None and args.eos_token in vocabulary:  # one that is not there is upstream's error
        tokenizer.eos_token = args.eos_token
    if tokenizer.eos_token is None:
        raise ValueError(
            "The tokenizer has no EOS token, at which the reward is read. Name one of its tokens: "
            "RankingRewardConfig(eos_token=...) or processing_class.eos_token = ..."
        )
    if args.pad_token is not None and args.pad_token == tokenizer.eos_token:
        raise ValueError(
            f"pad_token={args.pad_token!r} is the EOS token. Leave pad_token unset: a distinct one is chosen."
        )
    if args.pad_token is not None and args.pad_token in vocabulary:
        tokenizer.pad_token = args.pad_token
    say(args, loading.ensure_distinct_pad_token(tokenizer, None if isinstance(model, str) else model))


def place_reward_models(reward_funcs: Iterable[Any], device: torch.device) -> None:
    """Move reward models to the device of training: one given in memory would stay on the CPU beside a GPU."""
    for model in (func.model for func in reward_funcs if isinstance(func, RewardScorer)):
        # A role's base is the policy's; one that is quantised or was spread over devices lies where it must.
        if not (isinstance(model, RewardRole) or is_quantised(model) or hasattr(model, "hf_device_map")):
            model.to(device)
