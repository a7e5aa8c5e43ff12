"""The value function of PPO, initialised from the reward model (Ouyang et al. 2022, section 3.5 and appendix C).

Legend: B episodes, T tokens.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from instruct_trl._upstream import score_head
from instruct_trl.models.adapters import has_adapters, without_adapters
from instruct_trl.models.dropout import switch_off_dropout
from instruct_trl.models.loading import load_reward_model
from instruct_trl.models.model_files import check_model_path, names_adapter
from instruct_trl.models.precision import is_quantised, one_dtype
from instruct_trl.models.scores import token_values


class ValueModel(nn.Module):
    """A sequence classifier read at every token: `forward` gives V of the state after each token, the bias included.

    Raises ValueError for more than one label, or adapters that are not merged.
    """

    def __init__(self, classifier: PreTrainedModel):
        super().__init__()
        if without_adapters(classifier) is not classifier:
            raise ValueError(
                "The value model carries PEFT adapters. Merge them first (`model.merge_and_unload()`), or give the "
                "folder of the reward adapter as value_model=, which is merged as it is read."
            )
        if classifier.config.num_labels != 1:
            raise ValueError(
                f"The value model needs a scalar head, but {classifier.config._name_or_path or 'this classifier'} "
                f"has num_labels={classifier.config.num_labels}. Load it with num_labels=1."
            )
        self.classifier = classifier

    @property
    def config(self) -> Any:
        return self.classifier.config

    @property
    def _no_split_modules(self) -> Any:
        """The layers that accelerate shards one by one."""
        return self.classifier._no_split_modules

    def active(self) -> AbstractContextManager[None]:
        """Held over forward and backward; nothing to do for a model of its own (see `ValueRole`)."""
        return nullcontext()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, values_to_keep: int = 0) -> torch.Tensor:
        """Values (B, T) in float32; `values[:, t]` is read from the hidden state of token t, so it has seen tokens ≤ t.

        `input_ids` and `attention_mask` are (B, T), padded on either side. With `values_to_keep` only the last are
        projected and returned, like logits by `logits_to_keep`.
        """
        head = score_head(self.classifier)
        return token_values(self.classifier, head, self.config, input_ids, attention_mask, values_to_keep)

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        self.classifier.gradient_checkpointing_enable(**kwargs)

    def save_pretrained(self, path: str | Path, **kwargs: Any) -> None:
        """Write a plain sequence-classification checkpoint: `AutoModelForSequenceClassification` reads it."""
        self.classifier.save_pretrained(path, **kwargs)

    def load_pretrained(self, path: str | Path) -> None:
        """Take up the weights that `save_pretrained` wrote."""
        self.load_state_dict(ValueModel.from_pretrained(path).state_dict())

    @classmethod
    def from_pretrained(cls, path: str | Path, **kwargs: Any) -> ValueModel:
        """Read what `save_pretrained` wrote, or any reward model, by folder or hub name; the adapter of one is merged.

        `kwargs` are for `from_pretrained`; dtype is float32 unless given.
        """
        kwargs = {"dtype": "float32", **(one_dtype(kwargs, "kwargs") or {})}
        check_model_path(path, **kwargs)
        if names_adapter(path):
            return cls(merged(load_reward_model(path, **kwargs)[0]).requires_grad_(True))
        return cls(AutoModelForSequenceClassification.from_pretrained(path, **kwargs))


def merged(model: Any) -> Any:
    """`model` with its adapters, if it has any, merged into its weights. Raises ValueError if these are quantised."""
    if not has_adapters(model):
        return model
    if is_quantised(model):
        raise ValueError(
            f"{model.config._name_or_path!r} carries adapters on a quantised base, into which nothing merges exactly. "
            "Read its base unquantised and merge there, or use role_adapters, which keep adapters apart."
        )
    return model.merge_and_unload()


def value_model_from_reward_model(reward_model: PreTrainedModel) -> ValueModel:
    """A value model that starts as an independent copy of `reward_model`, its bias included, adapters merged.

    At the last token of an answer, before training, the value equals the reward model's score. Dropout is switched
    off, and every parameter is trainable, in float32.

    Raises:
        ValueError: the reward model has more than one label, or adapters on a quantised base.
    """
    classifier = merged(copy.deepcopy(reward_model))
    # In half precision most steps of the critic's learning rate would round to none.
    value_model = ValueModel(classifier if is_quantised(classifier) else classifier.float())
    switch_off_dropout(value_model)
    return value_model.requires_grad_(True)
