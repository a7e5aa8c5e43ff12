"""Everything that leans on private or version-bound behaviour of TRL and transformers, apart from method overrides."""

from __future__ import annotations

from typing import Any, cast

import torch
from accelerate.state import AcceleratorState, GradientState
from transformers import DynamicCache
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import RepeatSampler, add_fused_lm_head, disable_dropout_in_model


def apply_cpu_defaults(config: Any) -> None:
    """Without an accelerator, run on the CPU in float32 unless the user asked otherwise.

    TRL's configs default to bf16, which raises on a machine without an accelerator unless `use_cpu` is set; and two
    launched processes without `use_cpu` would each run alone. Call at the top of a config's `__post_init__`.
    """
    if not torch.accelerator.is_available():
        config.use_cpu = True
        if config.bf16 is None:
            config.bf16 = False


def backbone(model: torch.nn.Module) -> torch.nn.Module:
    """The transformer without its head: `model.base_model` in transformers' terms (e.g. LlamaModel)."""
    return cast(torch.nn.Module, model.base_model)


def score_head(model: torch.nn.Module) -> torch.nn.Module:
    """The scalar head of a sequence classifier, under any of the names that transformers uses.

    Raises:
        ValueError: the model has no head of a known name.
    """
    for name in ("score", "classifier"):
        if hasattr(model, name):
            return getattr(model, name)
    raise ValueError(
        f"{type(model).__name__} has no `score` or `classifier` head. Load the reward model with "
        "AutoModelForSequenceClassification and num_labels=1."
    )


class EpochSeededRepeatSampler(RepeatSampler):
    """TRL's sampler, its order a function of (seed, epoch), so that a run resumed in epoch 3 sees epoch 3's order."""

    def set_epoch(self, epoch: int) -> None:
        if self.shuffle:
            self.generator.manual_seed((self.seed or 0) + epoch)


def fused_head_is_compact(device: torch.device) -> bool:
    """True where TRL's fused head projects scored positions only: where its Triton kernels run."""
    return device.type in ("cuda", "xpu")


def prepare_reference(trainer: Any, ref_model: Any) -> Any:
    """Freeze `ref_model`, give it TRL's fused log-prob head at the trainer's temperature, and place it."""
    disable_dropout_in_model(ref_model)
    ref_model.requires_grad_(False)
    ref_model.eval()
    add_fused_lm_head(ref_model, temperature=trainer.temperature)
    if trainer.is_deepspeed_enabled:
        return prepare_deepspeed(ref_model, trainer.accelerator)
    if trainer.is_fsdp_enabled:
        return prepare_fsdp(ref_model, trainer.accelerator)
    return trainer.accelerator.prepare_model(ref_model, evaluation_mode=True)


def reset_accelerator() -> None:
    """Forget the precision and accumulation of the trainer before, so that the next may have its own."""
    AcceleratorState._reset_state()
    GradientState._reset_state()


def keep_4bit_trainable(model: torch.nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights on CPUs with AVX512-BF16: its packed kernel has no backward.

    It packs at the first forward in eval mode, and gradients below a packed layer are then lost without an error
    (bitsandbytes 0.50). Elsewhere this changes nothing.
    """
    modules: Any = model.modules()
    for module in modules:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def match_adapters_to_precision(model: Any, bf16: bool | None) -> None:
    """Without bf16, give what is trained on a quantised base the float32 of its hidden states: TRL casts it to bf16."""
    if not bf16 and getattr(model, "is_quantized", False) and model.dtype == torch.float32:
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dtype == torch.bfloat16:
                parameter.data = parameter.data.float()


def mark_step_skipped(optimizer: Any, skipped: bool) -> None:
    """Set accelerate's `optimizer.step_was_skipped`, by which the Trainer holds its schedule; it has no setter."""
    optimizer._is_overflow = skipped


# Settings of `generate` that look at one token at a time, so that it may stop and go on in a second call.
RESUMABLE = {
    *("max_new_tokens", "max_length", "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "disable_compile", "use_cache", "transformers_version"),
    *("return_dict_in_generate", "_from_model_config"),
}


def may_resume_generation(model: Any, generation_config: Any) -> bool:
    """True where `generate` can stop and go on from its cache with fewer rows: one ordinary sample a prompt."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    kind = base._supports_default_dynamic_cache() and not base._is_stateful and not base.config.is_encoder_decoder
    settings = {**base.generation_config.to_diff_dict(), **generation_config.to_diff_dict()}
    switched_on = {name for name, value in settings.items() if value not in (None, False)}
    return kind and switched_on <= RESUMABLE and settings.get("use_cache") is not False


def can_drop_rows(cache: Any) -> bool:
    """True where every layer of a generation's cache can be cut to some rows."""
    return isinstance(cache, DynamicCache) and all(hasattr(layer, "batch_select_indices") for layer in cache.layers)
