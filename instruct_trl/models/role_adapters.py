"""One frozen base that is policy, reference, reward model and critic in turn: PPO without four models in memory.

Each role is the base plus adapters (LoRA adds them up), and for reward and value a scalar head:

    role        adapters on the base             trained
    policy      default                          yes; starts as a copy of the SFT adapter
    reference   sft, or none                     no
    reward      [sft +] reward, and its head     no
    value       [sft +] critic, and its head     yes; starts as a copy of the reward adapter and its head

At rest the shared model is the policy. Another role runs inside `RoleAdapters.active`, which puts everything back.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModelForCausalLM, set_peft_model_state_dict
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from instruct_trl._upstream import backbone, keep_4bit_trainable
from instruct_trl.models.adapters import (
    AdapterFolder,
    adapter_parameters,
    adapter_state,
    add_adapter,
    check_base,
    check_below,
    check_lora,
    check_token_room,
    copy_adapter,
    load_adapter_weights,
    make_head,
    read_adapter,
    same_place,
    save_sequence_adapter,
    switched,
)
from instruct_trl.models.model_files import check_model_path, has_tokenizer
from instruct_trl.models.precision import keep_whole_modules_in_float32, one_dtype
from instruct_trl.models.scores import head_in_float32


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


POLICY, SFT, REWARD, CRITIC = "default", "sft", "reward", "critic"


class PolicyModel(PeftModelForCausalLM):
    """The policy as a PeftModel, which trainers save by its own adapter: those of other roles are not its."""

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:  # type: ignore[override]
        """As PEFT's, for the policy's adapter alone unless `selected_adapters` says otherwise."""
        super().save_pretrained(
            save_directory, **{"selected_adapters": [POLICY], "save_embedding_layers": False, **kwargs}
        )


class RoleAdapters:
    """Policy, reference, reward model and critic on one frozen base, which is never copied.

    Args:
        base: name or path of a causal language model, or one in memory (the roles' from then on), plain or 4-bit.
        sft_adapter: folder of the LoRA that SFT saved. None: the base itself is the SFT model.
        reward_adapter: folder of the LoRA and head that RankingRewardTrainer saved.
        quantization_config: for a base given by name, e.g. `BitsAndBytesConfig(load_in_4bit=True)`.
        policy_config: LoraConfig of the policy. Default: the SFT adapter's. With an SFT adapter it must have room for a
            copy of it: at least its rank and its target modules.
        value_config: LoraConfig of the critic; likewise, by the reward adapter.
        reward_on_sft: the reward adapter was trained on base + SFT adapter (merged, or both active), not on the bare
            base. Default: read from the base's name in its adapter_config.json. False: the base itself holds it.
        revision: of the base on the hub.
        allow_other_base_name: accept adapters whose base has another name and the same config.
        model_kwargs: for `from_pretrained` of the base; `dtype` is float32 unless given.

    Attributes:
        model, policy: the shared model, a PeftModel whose active adapter at rest is the policy's.
        policy_adapter: the parameters that the policy trains.
        reference, reward, value: the other roles; see the classes above.

    Raises:
        ValueError: the pieces do not belong to one base, or an adapter has no room for what it starts from.
    """

    def __init__(
        self,
        base: Any,
        sft_adapter: str | Path | None = None,
        reward_adapter: str | Path | None = None,
        quantization_config: Any = None,
        policy_config: LoraConfig | None = None,
        value_config: LoraConfig | None = None,
        *,
        reward_on_sft: bool | None = None,
        revision: str | None = None,
        allow_other_base_name: bool = False,
        **model_kwargs: Any,
    ):
        if reward_adapter is None:
            raise ValueError(
                "reward_adapter is not given, and the critic starts from it. Train one with RankingRewardTrainer and "
                "LoraConfig(task_type='SEQ_CLS')."
            )
        self._by_path, self._revision = isinstance(base, (str, Path)), revision
        given = one_dtype(model_kwargs, "model_kwargs") or {}
        self._model_kwargs = {"dtype": torch.float32, "revision": revision, **given}
        sft = None if sft_adapter is None else read_adapter(sft_adapter)
        reward = read_adapter(reward_adapter)
        model = self._load_base(base, quantization_config)
        self.base_name: str = model.config._name_or_path or ""
        known: dict[str, Any] = {"base": model.config, "base_name": self.base_name, "revision": revision}
        if sft is not None:
            check_base(sft, other_name=allow_other_base_name, **known)
        on_sft = _is_on_sft(reward, sft) if reward_on_sft is None else reward_on_sft
        if on_sft:
            _check_sum(sft, reward)
        elif reward_on_sft is None:
            check_below(reward)
        if not (on_sft and sft is not None and same_place(str(reward.config.base_model_name_or_path), sft.path)):
            check_base(reward, other_name=allow_other_base_name or on_sft, **known)

        below = [SFT] if on_sft else []
        self._stacks = {"policy": [POLICY], "reference": [SFT] if sft is not None else []}
        self._stacks |= {"reward": [*below, REWARD], "value": [*below, CRITIC]}
        self._current: tuple[str, bool] | None = None
        self.model = self._add_adapters(model, sft, reward, policy_config, value_config)
        self._make_roles(reward)
        self.tokenizer_path = sft.path if sft is not None else self.base_name

    def _load_base(self, base: Any, quantization_config: Any) -> Any:
        if not self._by_path:
            if quantization_config is not None:
                raise ValueError("quantization_config is for a base given by name; this one is in memory.")
            model = base
        else:
            check_model_path(base)
            kwargs = {"quantization_config": quantization_config, **self._model_kwargs}
            model = AutoModelForCausalLM.from_pretrained(base, **{k: v for k, v in kwargs.items() if v is not None})
        if hasattr(model, "peft_config"):
            place = f" {str(base)!r}" if self._by_path else ""
            raise ValueError(
                f"The base{place} carries adapters already, and roles are made of adapters of their own. Give the base "
                "without them, and such an adapter as sft_adapter; or merge it into the base."
            )
        keep_4bit_trainable(model)
        return model

    def _add_adapters(
        self,
        base: Any,
        sft: AdapterFolder | None,
        reward: AdapterFolder,
        policy_config: LoraConfig | None,
        value_config: LoraConfig | None,
    ) -> PolicyModel:
        if policy_config is None and sft is None:
            raise ValueError(
                "There is no SFT adapter whose shape the policy takes: pass policy_config=LoraConfig(...)."
            )
        for name, config in (("policy_config", policy_config), ("value_config", value_config)):
            if config is not None:
                check_lora(config, name)
        if sft is not None:
            check_token_room(sft, base, resized=True)
        check_token_room(reward, base, resized=False)
        config = self._own(policy_config or sft.config)  # type: ignore[union-attr]
        model = PolicyModel(base, config, adapter_name=POLICY)
        if sft is not None:
            add_adapter(model, SFT, sft)
            copy_adapter(model, SFT, POLICY)
        add_adapter(model, REWARD, reward)
        critic = copy.deepcopy(value_config or reward.config)
        critic.base_model_name_or_path, critic.revision = reward.config.base_model_name_or_path, reward.config.revision
        model.add_adapter(CRITIC, critic)
        copy_adapter(model, REWARD, CRITIC)
        tuner: Any = model.base_model
        tuner.set_adapter([POLICY])
        model.requires_grad_(False)
        keep_whole_modules_in_float32(model, POLICY)
        for parameter in adapter_parameters(model, POLICY).values():
            parameter.requires_grad_(True)
        return model

    def _own(self, config: Any) -> LoraConfig:
        config = copy.deepcopy(config)
        config.task_type, config.inference_mode = "CAUSAL_LM", False
        config.base_model_name_or_path, config.revision = self.base_name or None, self._revision
        return config

    def _make_roles(self, reward: AdapterFolder) -> None:
        head = make_head(reward)
        hidden = self.model.get_input_embeddings().weight.shape[1]
        if head.in_features != hidden:
            raise ValueError(
                f"The head of {reward.path!r} reads {head.in_features} hidden units, but this base has {hidden}: it "
                "belongs to another base."
            )
        device = next(self.model.parameters()).device
        saved = {**reward.saved, "path": reward.path}
        self.policy_adapter = nn.ParameterList(adapter_parameters(self.model, POLICY).values())
        self.reference = ReferenceRole(self)
        self.reward = RewardRole(self, "reward", REWARD, copy.deepcopy(head), reward.head_name, saved).to(device).eval()
        self.reward.requires_grad_(False)
        self.value = ValueRole(self, "value", CRITIC, head, reward.head_name, saved).to(device)
        self.value.adapter.requires_grad_(False)

    @property
    def policy(self) -> PolicyModel:
        return self.model

    @contextmanager
    def active(self, role: str) -> Iterator[None]:
        """Within, the shared model is `role` ("policy", "reference", "reward" or "value"), and trains it alone.

        Policy and critic are in the mode of their module, the others in eval mode. On leaving, also after an error, all
        is as it was: adapters, `requires_grad`, train and eval mode. Run a backward pass inside.
        """
        training = {"policy": self.model, "value": self.value}[role].training if role in ("policy", "value") else False
        if self._current == (role, training):
            yield
            return
        trained = {"policy": POLICY, "value": CRITIC}.get(role)
        own = [] if trained is None else list(adapter_parameters(self.model, trained).values())
        before, self._current = self._current, (role, training)
        try:
            with switched(self.model, self._stacks[role], trainable=own, training=training):
                yield
        finally:
            self._current = before

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Within, nothing of the shared model requires a gradient: what casts or counts trained weights finds none."""
        flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        self.model.requires_grad_(False)
        try:
            yield
        finally:
            for parameter, required in flags:
                parameter.requires_grad_(required)

    def to(self, device: torch.device) -> RoleAdapters:
        """Move the heads after the shared model, which its trainer moves."""
        for role in (self.reward, self.value):
            role.score.to(device)
        return self

    def load_policy(self, path: str | Path) -> None:
        """Take up the policy's adapter from a folder in PEFT's format.

        Raises:
            ValueError: it does not fit.
        """
        load_adapter_weights(self.model, POLICY, read_adapter(path))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `policy/` and `value/` under `folder`, each an adapter in PEFT's format."""
        self.policy.save_pretrained(str(Path(folder, "policy")))
        self.value.save_pretrained(Path(folder, "value"))

    def merge(self, folder: str | Path) -> Any:
        """Write the policy as a standalone model in float32 into `folder`; the shared base keeps its weights.

        The base is read again, unquantised, where it came by name, and else copied, for as long as this takes. In bf16
        the small part of what an adapter adds would be rounded away. The tokenizer of the SFT adapter, or of the base,
        is written beside it where there is one.

        Returns:
            the merged model, on the CPU.

        Raises:
            ValueError: the base is quantised, and in memory only or as it is stored.
        """
        if self._by_path:
            kwargs = {key: value for key, value in self._model_kwargs.items() if key != "device_map"}
            kwargs["dtype"] = torch.float32
            base: nn.Module = AutoModelForCausalLM.from_pretrained(self.base_name, **kwargs)
            if getattr(base, "is_quantized", False):
                raise ValueError(
                    f"{self.base_name!r} is stored quantised, and no adapter merges into that exactly. Use the adapter "
                    "as it was saved, or merge it into the unquantised original."
                )
            merged = PeftModelForCausalLM(base, self._own(self.model.peft_config[POLICY]))
            set_peft_model_state_dict(merged, adapter_state(self.model, POLICY))
        elif getattr(self.model, "is_quantized", False):
            raise ValueError("A quantised base in memory cannot be merged exactly. Make RoleAdapters from its name.")
        else:
            merged = copy.deepcopy(self.model).cpu().float()
            vars(merged.get_base_model()).pop("forward", None)  # a trainer's own, bound to this model
        standalone = merged.merge_and_unload(adapter_names=[POLICY]).cpu()
        standalone.save_pretrained(str(folder))
        if has_tokenizer(self.tokenizer_path):
            AutoTokenizer.from_pretrained(self.tokenizer_path).save_pretrained(str(folder))
        return standalone


def _check_sum(sft: AdapterFolder | None, reward: AdapterFolder) -> None:
    if sft is None:
        raise ValueError("reward_on_sft=True needs the SFT adapter that the reward adapter was trained on.")
    for folder in (sft, reward):
        if folder.config.use_dora:
            raise ValueError(
                f"The adapter {folder.path!r} uses DoRA, and the reward adapter was trained on the SFT adapter: DoRA's "
                "adapters do not add up. Merge the SFT adapter, and give the merged model as base."
            )


def _is_on_sft(reward: AdapterFolder, sft: AdapterFolder | None) -> bool:
    return sft is not None and same_place(str(reward.config.base_model_name_or_path), sft.path)
