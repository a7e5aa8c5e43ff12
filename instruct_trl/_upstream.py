"""Everything that leans on private or version-bound behaviour of TRL and transformers, apart from method overrides."""

from __future__ import annotations

from typing import Any

import torch


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
    return model.base_model


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
