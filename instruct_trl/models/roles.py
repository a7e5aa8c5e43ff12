"""The roles beside the policy, each a module with a forward of its own over a base that it does not own.

A role registers as its parameters what is its own alone (its adapter's, its head's): what moves, saves, clips, averages
or wraps it leaves base and other roles alone.

Legend: B rows, T tokens, H hidden units.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from instruct_trl._upstream import backbone
from instruct_trl.models.adapter_folders import load_adapter_weights, make_head, read_adapter, save_sequence_adapter
from instruct_trl.models.adapter_switching import adapter_parameters
from instruct_trl.models.scores import head_in_float32

if TYPE_CHECKING:
    from instruct_trl.models.role_adapters import RoleAdapters


class ReferenceRole(nn.Module):
    """The causal language model that the policy started from, without gradient."""

    def __init__(self, roles: RoleAdapters):
        super().__init__()
        self._roles = roles

    @property
    def config(self) -> Any:
        return self._roles.model.config

    def get_base_model(self) -> Any:
        """The causal language model without adapters, as PEFT's models name it."""
        return self._roles.model.get_base_model()

    def active(self) -> AbstractContextManager[None]:
        """Within, the shared model is the reference."""
        return self._roles.active("reference")

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the causal language model returns, TRL's fused log-prob head included."""
        with self.active():
            return self._roles.model(*args, **kwargs)

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`generate` of the causal language model."""
        with self.active():
            return self._roles.model.generate(*args, **kwargs)


class ScalarRole(nn.Module):
    """An adapter and a scalar head.

    Args:
        roles: whose base it runs on.
        role: its name there.
        adapter: the adapter that is its own.
        head: (B, T, H) → (B, T, 1).
        head_name: what a sequence classifier calls it.
        saved: `reward_bias`, and what else a reward adapter's folder records.
    """

    def __init__(
        self, roles: RoleAdapters, role: str, adapter: str, head: nn.Linear, head_name: str, saved: dict[str, Any]
    ):
        super().__init__()
        self._roles, self._role, self._adapter = roles, role, adapter
        self._head_name, self._saved = head_name, saved
        self.score = head
        self.adapter = nn.ParameterList(adapter_parameters(roles.model, adapter).values())
        self.config = copy.deepcopy(roles.model.config)
        self.config.num_labels = 1
        self.config.reward_bias = float(saved.get("reward_bias", 0.0))
        self.config._name_or_path = saved.get("path", "")

    def get_input_embeddings(self) -> nn.Module:
        """The base's, which all roles read."""
        return self._roles.model.get_input_embeddings()

    def active(self) -> AbstractContextManager[None]:
        """Within, the shared model has this role's adapters; a backward pass belongs inside."""
        return self._roles.active(self._role)

    def token_scores(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, keep: int = 0) -> torch.Tensor:
        """The head's output for every token, (B, T) in float32, the bias added; padding on either side.

        With `keep`, for the last tokens alone.
        """
        positions = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
        # The pad token of another tokenizer may lie beyond the vocabulary. Nobody sees what stands there.
        ids = input_ids.masked_fill(attention_mask == 0, 0)
        with self.active():
            transformer = backbone(self._roles.model.get_base_model())
            output = transformer(input_ids=ids, attention_mask=attention_mask, position_ids=positions, use_cache=False)
            with head_in_float32(self.score):
                scores = self.score(output.last_hidden_state[:, -keep:]).squeeze(-1)
        return scores + self.config.reward_bias

    def save_pretrained(self, path: str | Path, **kwargs: Any) -> None:
        """Write adapter and head in PEFT's format: `load_reward_model`, or PEFT alone on the base, reads it."""
        base: Any = self._roles.model.get_base_model()
        saved = {key: value for key, value in self._saved.items() if key not in ("path", "quantization_config")}
        saved |= {"dtype": str(base.dtype).removeprefix("torch."), "reward_bias": self.config.reward_bias}
        quantization = getattr(base.config, "quantization_config", None)
        if quantization is not None:
            saved["quantization_config"] = quantization if isinstance(quantization, dict) else quantization.to_dict()
        save_sequence_adapter(self._roles.model, self._adapter, self.score, self._head_name, saved, path)
        self._roles.model.create_or_update_model_card(str(path))

    def load_pretrained(self, path: str | Path) -> None:
        """Take up the weights that `save_pretrained` wrote.

        Raises:
            ValueError: they do not fit.
        """
        folder = read_adapter(path)
        load_adapter_weights(self._roles.model, self._adapter, folder)
        self.score.load_state_dict(make_head(folder).state_dict())


class RewardRole(ScalarRole):
    """The reward model: one score a row. [`RewardScorer`] takes it as its model."""

    @torch.no_grad()
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Scores (B,) in float32, bias included, read at the last token that `attention_mask` (B, T) counts."""
        scores = self.token_scores(input_ids, attention_mask)
        places = torch.arange(scores.size(1), device=scores.device)
        last = (attention_mask * places).argmax(dim=1, keepdim=True)
        return scores.gather(1, last).squeeze(1)


class ValueRole(ScalarRole):
    """The critic, in the form of [`ValueModel`]: `values[:, t]` is read from the hidden state of token t."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, values_to_keep: int = 0) -> torch.Tensor:
        """Values (B, T) in float32; gradients, if wanted, reach this role's adapter and head alone.

        Hold `active()` over forward and backward.
        """
        return self.token_scores(input_ids, attention_mask, values_to_keep)

    @property
    def classifier(self) -> Any:
        """The shared model."""
        return self._roles.model

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """Of the shared model, so for the policy, too."""
        self._roles.model.gradient_checkpointing_enable(**kwargs)
