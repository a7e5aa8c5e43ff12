"""What a model's config says about its size: read from `config.json` alone, counted on the meta device."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from instruct_trl.memory.trace import meta_model


class ModelShape:
    """Counts of one architecture, as causal language model or, with `score`, as a classifier with one scalar head.

    Args:
        config: of a decoder.
        score: without the LM head, with a head of H numbers.

    Attributes:
        parameters: all, tied weights once.
        matrices: number of parameters of each linear layer that bitsandbytes quantises: all but the head.
        head: parameters of the LM head's matrix (V · H), tied or not; 0 with `score`.
        rotates: positions enter by rotating queries and keys (RoPE).
    """

    def __init__(self, config: Any, score: bool = False):
        self.config, self.score = config, score
        text = config.get_text_config()
        self.hidden: int = text.hidden_size
        self.vocabulary: int = text.vocab_size
        self.layers: int = text.num_hidden_layers
        heads = text.num_attention_heads
        self.kv_heads: int = getattr(text, "num_key_value_heads", None) or heads
        self.head_dim: int = getattr(text, "head_dim", None) or self.hidden // heads
        self.rotates = bool(getattr(text, "rope_parameters", None))
        self.context: int | None = getattr(text, "max_position_embeddings", None)

    @cached_property
    def text(self) -> str:
        """The config as text: equal for equal architectures."""
        return self.config.to_json_string()

    @cached_property
    def _model(self) -> Any:
        import torch

        return meta_model(self.config, torch.float32)

    @cached_property
    def parameters(self) -> int:
        model = self._model
        if not self.score:
            return sum(p.numel() for p in model.parameters())
        return sum(p.numel() for p in model.base_model.parameters()) + self.hidden

    @cached_property
    def head(self) -> int:
        return 0 if self.score else self.vocabulary * self.hidden

    @cached_property
    def matrices(self) -> list[int]:
        from transformers.quantizers.base import get_keys_to_not_convert

        kept = set(get_keys_to_not_convert(self._model))
        linear = (m for name, m in self._model.named_modules() if isinstance(m, nn.Linear) and name not in kept)
        return [module.weight.numel() for module in linear]

    @property
    def windows(self) -> list[int | None] | None:
        """The sliding window of each layer, None where it sees everything; None where no layer slides."""
        text = self.config.get_text_config()
        window, kinds = getattr(text, "sliding_window", None), getattr(text, "layer_types", None)
        if window is None:
            return None
        if kinds is None:
            return [window] * self.layers
        return [window if kind == "sliding_attention" else None for kind in kinds]

    def adapter_parameters(self, peft_config: Any) -> int:
        """Trainable parameters that PEFT adds for `peft_config`, LoRA's matrices or any other method's."""
        import torch

        model = meta_model(self.config, torch.float32, without_head(peft_config))
        return sum(p.numel() for p in model.parameters() if p.requires_grad)


def without_head(peft_config: Any) -> Any:
    """The same adapter, trained, for the causal language model on which it is counted; its head is counted apart."""
    import copy

    config = copy.deepcopy(peft_config)
    config.task_type, config.inference_mode = "CAUSAL_LM", False
    config.modules_to_save = [n for n in config.modules_to_save or [] if n not in ("score", "classifier")] or None
    return config


def read_config(name: str | Path, revision: str | None = None) -> Any:
    """The config of a local folder, of a folder with a PEFT adapter (then of its base), or of a name on the hub.

    Nothing but `config.json` (and `adapter_config.json`) is read.

    Raises:
        ValueError: there is no such model.
    """
    from transformers import AutoConfig

    from instruct_trl.models.model_files import check_model_path

    adapter = Path(name, "adapter_config.json")
    if adapter.is_file():
        return read_config(json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"])
    check_model_path(name, weights=False)
    return AutoConfig.from_pretrained(name, revision=revision)
