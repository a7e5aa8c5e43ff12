"""Private and version-bound behaviour of TRL, transformers, accelerate and DeepSpeed, apart from method overrides.

Each comment "May go" names the upstream change that makes its shim superfluous; tests/upstream watches the seams.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForSequenceClassification, DynamicCache, Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.reward_trainer import suppress_seqcls_warning as suppress_seqcls_warning
from trl.trainer.utils import RepeatSampler, add_fused_lm_head, create_model_from_path
from trl.trainer.utils import get_callable_name as get_callable_name
from trl.trainer.utils import is_async_callable as is_async_callable

HEADS = ("score", "classifier")  # the names of a sequence classifier's head in transformers


# May go when TRL's configs leave bf16 off without an accelerator, where it raises.
def apply_cpu_defaults(config: Any) -> None:
    """Without an accelerator, run on the CPU in float32 unless the user asked otherwise; for `__post_init__`."""
    if not torch.accelerator.is_available():
        if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
            config.ddp_backend = config.ddp_backend or "gloo"  # accelerate leaves DeepSpeed out if use_cpu is set
        else:
            config.use_cpu = True  # without it, two launched processes would each run alone
        if config.bf16 is None:
            config.bf16 = False


# May go when trl exports create_model_from_path and its suppression of the head's warning.
def create_classifier(name: str, **kwargs: Any) -> Any:
    """A sequence classifier with one label, by name or path, as upstream's RewardTrainer loads it, not yet placed."""
    kwargs |= {"num_labels": 1, "device_map": None}
    with suppress_seqcls_warning():
        return create_model_from_path(name, cast(Any, AutoModelForSequenceClassification), **kwargs)


# May go when trl's trainers accept model_init_kwargs beside a model in memory.
@contextmanager
def without_init_kwargs(args: Any, loaded: bool) -> Iterator[None]:
    """Context manager: hide `args.model_init_kwargs` if a model is `loaded`; upstream refuses both together."""
    given = args.model_init_kwargs
    args.model_init_kwargs = None if loaded else given
    try:
        yield
    finally:
        args.model_init_kwargs = given


# May go when transformers has one public name for the model below the head of every architecture.
def backbone(model: nn.Module) -> nn.Module:
    """The transformer without its head (e.g. LlamaModel)."""
    return cast(nn.Module, model.base_model)


# May go when transformers has a public accessor for the head of a sequence classifier.
def score_head(model: nn.Module) -> nn.Module:
    """The scalar head of a sequence classifier; raises ValueError for a model without a head of a known name."""
    for name in HEADS:
        if hasattr(model, name):
            return getattr(model, name)
    raise ValueError(
        f"{type(model).__name__} has no `score` or `classifier` head. Load the reward model with "
        "AutoModelForSequenceClassification and num_labels=1."
    )


# May go when Trainer makes an optimizer for a model other than its own.
def critic_optimizer(args: Any, value_model: Any, learning_rate: float) -> torch.optim.Optimizer:
    """The optimizer that `args` ask for, over the value model's trainable parameters, grouped as Trainer groups them.

    Raises:
        ValueError: one that makes groups of its own from a whole model (GaLore, Apollo, LOMO, Muon), or that has a
            train mode of its own (schedule-free), which belongs to Trainer's loop.
    """
    kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, value_model.classifier)
    own_groups = not isinstance(kind, type) or {"params", "model", "optimizer_dict"} & kwargs.keys()
    if own_groups or hasattr(kind, "train"):
        reason = "makes parameter groups of its own" if own_groups else "has a train mode of its own"
        raise ValueError(
            f"optim={args.optim.value!r} {reason}, so it cannot train policy and critic side by side. Choose one that "
            "takes any parameters, e.g. optim='adamw_torch', 'adafactor' or 'adamw_8bit'."
        )
    # Weights decay, biases and norms do not. The method does not read `self`.
    decaying = set(Trainer.get_decay_parameter_names(cast(Any, None), value_model))
    groups: dict[bool, list[Any]] = {True: [], False: []}
    for name, parameter in value_model.named_parameters():
        if parameter.requires_grad:
            groups[name in decaying].append(parameter)
    decays = {True: args.weight_decay, False: 0.0}
    params = [{"params": group, "weight_decay": decays[key]} for key, group in groups.items() if group]
    return kind(params, **{**kwargs, "lr": learning_rate})


# May go when trl's RepeatSampler has a set_epoch of its own.
class EpochSeededRepeatSampler(RepeatSampler):
    """TRL's sampler, its order a function of (seed, epoch), so that a run resumed in epoch 3 sees epoch 3's order."""

    @classmethod
    def like(cls, sampler: RepeatSampler) -> EpochSeededRepeatSampler:
        """The same as `sampler`, which GRPOTrainer made."""
        names = ("data_source", "mini_repeat_count", "batch_size", "repeat_count", "shuffle", "seed")
        return cls(*(getattr(sampler, name) for name in names))

    def set_epoch(self, epoch: int) -> None:
        if self.shuffle:
            self.generator.manual_seed((self.seed or 0) + epoch)


# May go when trl's fused head projects scored positions alone on a CPU, too.
def fused_head_is_compact(device: torch.device) -> bool:
    """True if TRL's fused head projects scored positions only, as its Triton kernels do."""
    return device.type in ("cuda", "xpu")


# May go when GRPOTrainer takes a reference model in its constructor.
def prepare_reference(trainer: Any, ref_model: Any) -> Any:
    """Freeze `ref_model`, give it TRL's fused log-prob head at the trainer's temperature, and place it."""
    ref_model.requires_grad_(False)
    ref_model.eval()  # so without dropout
    in_float32 = trainer.args.cast_lm_head_to_fp32
    if in_float32:  # as GRPOTrainer's constructor does to the policy
        dtype, head = ref_model.lm_head.weight.dtype, ref_model.lm_head.float()
        head.register_forward_pre_hook(lambda module, args: (args[0].float(), *args[1:]))
        if ref_model.config.tie_word_embeddings:  # the embedding is float32 now, too
            embedding = ref_model.get_input_embeddings()
            embedding.register_forward_hook(lambda module, args, output: output.to(dtype))
        keep_head_out_of_autocast(trainer, ref_model)
    add_fused_lm_head(ref_model, temperature=trainer.temperature, cast_lm_head_to_fp32=in_float32)
    if trainer.is_deepspeed_enabled:
        return prepare_deepspeed(ref_model, trainer.accelerator)
    if trainer.is_fsdp_enabled:
        return prepare_fsdp(ref_model, trainer.accelerator)
    return trainer.accelerator.prepare_model(ref_model, evaluation_mode=True)


# May go when trl keeps a head under cast_lm_head_to_fp32 out of autocast, which casts back what TRL cast to float32.
def keep_head_out_of_autocast(trainer: Any, model: Any) -> None:
    """Under `cast_lm_head_to_fp32`, let the head compute in float32 without Triton, too, which calls it."""
    head = model.get_output_embeddings()
    head.forward = torch.autocast(trainer.accelerator.device.type, enabled=False)(head.forward)


# May go when trl's continuous batching neither casts the policy to bf16 nor leaves it in train mode (1.16 does both).
@contextmanager
def unchanged_model(model: nn.Module) -> Iterator[None]:
    """Context manager: restore the model's weights, gradients, buffers and modes on exit, without copies."""
    parameters = list(model.parameters())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    tensors = [(tensor, tensor.data) for tensor in (*parameters, *gradients)]
    modules = [(module, module.training, dict(module._buffers)) for module in model.modules()]
    try:
        yield
    finally:
        for tensor, data in tensors:
            tensor.data = data
        for module, training, buffers in modules:
            module.training = training
            module._buffers.update(buffers)


# May go when accelerate forgets the settings of a trainer that is gone.
def reset_accelerator() -> None:
    """Forget the precision and accumulation of the trainer before, so that the next may have its own."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    load_models_whole()


# May go when from_pretrained has an argument to load whole weights under ZeRO-3; no copy can be made of shards.
def load_models_whole() -> None:
    """From here until the next trainer, transformers loads whole models, even if it has been told of ZeRO-3."""
    unset_hf_deepspeed_config()


# May go when the kernel of bitsandbytes for CPUs with AVX512-BF16 has a backward (0.50 loses gradients in silence).
def keep_4bit_trainable(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights on such CPUs, at the first forward in eval mode."""
    for module in cast(Any, model.modules()):
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


# May go when trl casts adapters on a quantised base by bf16= and not always.
def match_adapters_to_precision(model: Any, bf16: bool | None) -> None:
    """Without bf16, give what is trained on a quantised base the float32 of its hidden states: TRL casts it to bf16."""
    if not bf16 and getattr(model, "is_quantized", False) and model.dtype == torch.float32:
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dtype == torch.bfloat16:
                parameter.data = parameter.data.float()


# May go when accelerate's optimizer has a setter for step_was_skipped.
def mark_step_skipped(optimizer: Any, skipped: bool) -> None:
    """Set accelerate's `optimizer.step_was_skipped`, by which the Trainer holds its schedule."""
    optimizer._is_overflow = skipped


# Engines: FSDP2 and DeepSpeed ----------------------------------------------------------------------------------------


# May go when accelerate's DeepSpeed wrapper runs a backward without a step.
class DeepSpeedSteps:
    """Drives a DeepSpeed engine with a ZeRO optimizer as accelerate's wrapper does, but its backward takes no step.

    So gradients can be looked at, and a step be left out, as without DeepSpeed.
    """

    def __init__(self, engine: Any):
        self.engine = engine

    def backward(self, loss: torch.Tensor, sync_gradients: bool = True, **kwargs: Any) -> None:
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss, **kwargs)

    def get_global_grad_norm(self) -> float:
        """The norm of the accumulated gradients, before any clip; inf if one is not finite."""
        optimizer = self.engine.optimizer
        if self.engine.zero_optimization_stage() == 3:
            from deepspeed.runtime.utils import combine_grad_norm_groups

            norm = combine_grad_norm_groups(optimizer._get_norm_groups())
        else:
            norm = optimizer.scaled_global_norm()
        return float(norm) / float(optimizer.loss_scale)

    def step(self) -> None:
        """Clip, step, forget the gradients. DeepSpeed itself leaves out a step whose gradients are not finite."""
        self.engine.step()

    def skip_step(self) -> None:
        """Forget the gradients as DeepSpeed does when they are not finite: by telling it so.

        Raises:
            RuntimeError: DeepSpeed took the step all the same, as versions before 0.19.8 do.
        """
        optimizer, infinite = self.engine.optimizer, torch.tensor(float("inf"))
        is_zero3 = self.engine.zero_optimization_stage() == 3
        name, norm = ("_get_norm_groups", [infinite]) if is_zero3 else ("scaled_global_norm", infinite)
        setattr(optimizer, name, lambda: norm)
        try:
            self.engine.step()
        finally:
            delattr(optimizer, name)
        if not optimizer.overflow:
            raise RuntimeError("DeepSpeed took a step that was to be left out. Install deepspeed>=0.19.8.")


# May go when accelerate prepares two trained models under one DeepSpeed plugin.
def prepare_deepspeed_model(
    accelerator: Any, model: nn.Module, optimizer: Any, max_norm: float | None, args: Any
) -> tuple[Any, Any]:
    """A DeepSpeed engine for a second model, and its optimizer for a scheduler."""
    import deepspeed
    from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper, map_pytorch_optim_to_deepspeed

    settings = copy.deepcopy(accelerator.deepspeed_plugin.hf_ds_config)
    settings.trainer_config_finalize(args, model, 1)  # "auto" sizes follow from this model
    config = settings.config
    config |= {"gradient_clipping": max_norm or 0.0, "zero_allow_untested_optimizer": True}
    for name in ("optimizer", "scheduler"):
        config.pop(name, None)
    if settings.is_offload() and config.get("zero_force_ds_cpu_optimizer", True):
        optimizer = map_pytorch_optim_to_deepspeed(optimizer)
    engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine, DeepSpeedOptimizerWrapper(optimizer)


# May go when accelerate keeps FSDP's settings per model: it wraps by the policy's layers and clips all models as one.
@contextmanager
def apart_from_policy(accelerator: Accelerator) -> Iterator[None]:
    """Context manager: let accelerate prepare a second model under FSDP, and forget it on exit."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        yield
        return
    models, layers = list(accelerator._models), (plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap)
    try:
        yield
    finally:
        accelerator._models = models
        plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = layers


# May go when FSDP2 reshards after a forward without backward.
def reshard(model: nn.Module) -> None:
    """Free what FSDP2 keeps whole after a forward without backward, so that parameters are shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


# May go when DeepSpeed gathers small ZeRO-3 parameters, which it keeps whole, anew after their shards were written.
@contextmanager
def writable_shards(parameters: Sequence[Any]) -> Iterator[None]:
    """While active, the shards of ZeRO-3 may be written; on exit, parameters that were whole are gathered again."""
    whole = [p for p in parameters if hasattr(p, "ds_tensor") and p.ds_status.name == "AVAILABLE"]
    if whole:
        whole[0].partition(whole)
    try:
        yield
    finally:
        if whole:
            whole[0].all_gather(whole)


# Settings of `generate` that look at one token at a time, so that it may stop and go on in a second call.
RESUMABLE = {
    *("max_new_tokens", "max_length", "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "disable_compile", "use_cache", "transformers_version"),
    *("return_dict_in_generate", "_from_model_config"),
}


# May go, with RESUMABLE and can_drop_rows, when `generate` of transformers drops ended rows by itself.
def may_resume_generation(base: Any, generation_config: Any) -> bool:
    """True if `generate`, for one ordinary sample per prompt, can stop and go on from its cache with fewer rows."""
    kind = base._supports_default_dynamic_cache() and not base._is_stateful and not base.config.is_encoder_decoder
    settings = {**base.generation_config.to_diff_dict(), **generation_config.to_diff_dict()}
    switched_on = {name for name, value in settings.items() if value not in (None, False)}
    return kind and switched_on <= RESUMABLE and settings.get("use_cache") is not False


def can_drop_rows(cache: Any) -> bool:
    """True if every layer of a generation's cache can be cut to some rows."""
    return isinstance(cache, DynamicCache) and all(hasattr(layer, "batch_select_indices") for layer in cache.layers)
