"""One frozen base that is policy, reference, reward model and critic in turn: PPO without four models in memory.

Each role is the base plus adapters (LoRA adds them up), and for reward and value a scalar head:

    role        adapters on the base             trained
    policy      default                          yes; starts as a copy of the SFT adapter
    reference   sft, or none                     no
    reward      [sft +] reward, and its head     no
    value       [sft +] critic, and its head     yes; starts as a copy of the reward adapter and its head

At rest the shared model is the policy. Another role runs inside `RoleAdapters.active`, which puts everything back.
A role is a module whose parameters are its own adapter and head, not the base: whatever moves, saves, clips, averages
or wraps it leaves the base and the other roles alone.

Legend: B rows, T tokens, H hidden units.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModelForCausalLM, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

from instruct_trl._upstream import keep_4bit_trainable
from instruct_trl.models import adapters
from instruct_trl.models.adapters import AdapterFolder, adapter_parameters, adapter_state, load_adapter_weights
from instruct_trl.models.model_files import (
    check_model_path,
    has_tokenizer,
    load_tokenizer,
    names_adapter,
    write_reward_config,
)
from instruct_trl.models.precision import is_quantised, keep_whole_modules_in_float32, one_dtype
from instruct_trl.models.scores import token_values

POLICY, SFT, REWARD, CRITIC = "default", "sft", "reward", "critic"


class ReferenceRole(nn.Module):
    """The causal language model that the policy started from, without gradient."""

    def __init__(self, roles: RoleAdapters):
        super().__init__()
        self._roles = roles  # no nn.Module: as one, it would make the base this role's own, to be moved and saved

    @property
    def config(self) -> Any:
        return self._roles.model.config

    def get_base_model(self) -> Any:
        """The causal language model without adapters, as PEFT's models name it."""
        return self._roles.model.get_base_model()

    def active(self) -> AbstractContextManager[None]:
        """While active, the shared model is the reference."""
        return self._roles.active("reference")

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the causal language model, TRL's fused log-prob head included."""
        with self.active():
            return self._roles.model(*args, **kwargs)

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self.active():
            return self._roles.model.generate(*args, **kwargs)


class ScalarRole(nn.Module):
    """The adapter named `adapter` and a scalar head (B, T, H) → (B, T, 1), which both start from `folder`."""

    def __init__(self, roles: RoleAdapters, role: str, adapter: str, folder: AdapterFolder):
        super().__init__()
        self._roles, self._role, self._adapter, self._folder = roles, role, adapter, folder
        self.score = folder.scalar_head()
        self.adapter = nn.ParameterList(adapter_parameters(roles.model, adapter).values())
        # A copy: the policy's config is saved with it, and knows neither labels nor a bias.
        self.config = copy.deepcopy(roles.model.config)
        self.config.num_labels = 1
        self.config.reward_bias = float(folder.saved.get("reward_bias", 0.0))
        self.config._name_or_path = folder.path

    def get_input_embeddings(self) -> nn.Module:
        """The base's, which all roles read."""
        return self._roles.model.get_input_embeddings()

    def active(self) -> AbstractContextManager[None]:
        """While active, the shared model has this role's adapters; run the backward pass in it."""
        return self._roles.active(self._role)

    def token_scores(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, keep: int = 0) -> torch.Tensor:
        """As `scores.token_values`, (B, T)."""
        # The pad token of another tokenizer may lie beyond the vocabulary. No token attends to it, so any id will do.
        ids = input_ids.masked_fill(attention_mask == 0, 0)
        with self.active():
            model = adapters.without_adapters(self._roles.model)
            return token_values(model, self.score, self.config, ids, attention_mask, keep)

    def save_pretrained(self, path: str | Path, **kwargs: Any) -> None:
        """Write adapter and head as PEFT writes a reward model: `load_reward_model`, or PEFT alone, reads it."""
        model: Any = self._roles.model
        head_name = self._folder.head_name
        Path(path).mkdir(parents=True, exist_ok=True)
        state = {key: value.detach().cpu().contiguous() for key, value in adapter_state(model, self._adapter).items()}
        head = {key: value.detach().cpu() for key, value in self.score.state_dict().items()}
        state |= {f"{adapters.PREFIX}{head_name}.{key}": value for key, value in head.items()}
        save_file(state, Path(path, adapters.WEIGHTS), metadata={"format": "pt"})
        config = copy.deepcopy(model.peft_config[self._adapter])
        config.task_type, config.inference_mode = "SEQ_CLS", True
        config.modules_to_save = [*(config.modules_to_save or []), head_name]
        config.save_pretrained(str(path))
        write_reward_config(path, adapters.without_adapters(model), self.config.reward_bias, self._folder.saved)
        model.create_or_update_model_card(str(path))

    def load_pretrained(self, path: str | Path) -> None:
        """Take up the weights that `save_pretrained` wrote. Raises ValueError if they do not fit."""
        folder = adapters.read_adapter(path)
        load_adapter_weights(self._roles.model, self._adapter, folder)
        self.score.load_state_dict(folder.scalar_head().state_dict())


class RewardRole(ScalarRole):
    """The reward model: one score per row. [`RewardScorer`] takes it as its model."""

    @torch.no_grad()
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Scores (B,) in float32, bias included, read at the last token that `attention_mask` (B, T) counts."""
        scores = self.token_scores(input_ids, attention_mask)
        # By place and not by count, since rows may be padded on the left.
        places = torch.arange(scores.size(1), device=scores.device)
        last = (attention_mask * places).argmax(dim=1, keepdim=True)
        return scores.gather(1, last).squeeze(1)


class ValueRole(ScalarRole):
    """The critic, in the form of [`ValueModel`]: `values[:, t]` is read from the hidden state of token t."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, values_to_keep: int = 0) -> torch.Tensor:
        """Values (B, T) in float32; gradients reach this role's adapter and head alone. Hold `active()` over both."""
        return self.token_scores(input_ids, attention_mask, values_to_keep)

    @property
    def classifier(self) -> Any:
        """The shared model."""
        return self._roles.model

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """Of the shared model, so for the policy, too."""
        self._roles.model.gradient_checkpointing_enable(**kwargs)


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
        reference, reward, value: the other roles, `ReferenceRole`, `RewardRole` and `ValueRole`.

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
        sft = None if sft_adapter is None else adapters.read_adapter(sft_adapter)
        reward = adapters.read_adapter(reward_adapter)
        model = self._load_base(base, quantization_config)
        self.base_name: str = model.config._name_or_path or ""
        self.tokenizer_path = sft.path if sft is not None else self.base_name
        on_sft = self._check_pieces(model.config, sft, reward, reward_on_sft, allow_other_base_name)
        below = [SFT] if on_sft else []
        self._stacks = {"policy": [POLICY], "reference": [SFT] if sft is not None else []}
        self._stacks |= {"reward": [*below, REWARD], "value": [*below, CRITIC]}
        self._current: tuple[str, bool] | None = None
        self.model = self.policy = self._add_adapters(model, sft, reward, policy_config, value_config)
        device = next(self.model.parameters()).device
        self.policy_adapter = nn.ParameterList(adapter_parameters(self.model, POLICY).values())
        self.reference = ReferenceRole(self)
        self.reward = RewardRole(self, "reward", REWARD, reward).to(device).eval().requires_grad_(False)
        self.value = ValueRole(self, "value", CRITIC, reward).to(device)
        # At rest the policy trains alone; `active` lets gradients into the critic.
        self.value.adapter.requires_grad_(False)

    def _load_base(self, base: Any, quantization_config: Any) -> Any:
        if not self._by_path and quantization_config is not None:
            raise ValueError("quantization_config is for a base given by name; this one is in memory.")
        model = base
        if self._by_path:
            check_model_path(base)
            kwargs = {"quantization_config": quantization_config, **self._model_kwargs}
            model = AutoModelForCausalLM.from_pretrained(base, **{k: v for k, v in kwargs.items() if v is not None})
        if adapters.has_adapters(model):
            place = f" {str(base)!r}" if self._by_path else ""
            raise ValueError(
                f"The base{place} carries adapters already, and roles are made of adapters of their own. Give the base "
                "without them, and such an adapter as sft_adapter; or merge it into the base."
            )
        keep_4bit_trainable(model)
        return model

    def _check_pieces(
        self, base: Any, sft: AdapterFolder | None, reward: AdapterFolder, on_sft: bool | None, other_name: bool
    ) -> bool:
        """Whether the reward adapter stands on the SFT adapter; errors if the pieces do not belong together."""
        known: dict[str, Any] = {"base": base, "base_name": self.base_name, "revision": self._revision}
        if sft is not None:
            adapters.check_base(sft, other_name=other_name, **known)
        names_sft = sft is not None and adapters.same_place(reward.base, sft.path)
        if on_sft is None and not names_sft and reward.base and names_adapter(reward.base):
            raise ValueError(
                f"The reward adapter {reward.path!r} was trained on the SFT adapter {reward.base!r}, and means nothing "
                f"without it. Give {reward.base!r} as sft_adapter; if the sft_adapter is that one moved, pass "
                "reward_on_sft=True; if the base is a model into which it is merged, pass reward_on_sft=False and "
                "allow_other_base_name=True."
            )
        on_sft = names_sft if on_sft is None else on_sft
        if on_sft and sft is None:
            raise ValueError("reward_on_sft=True needs the SFT adapter that the reward adapter was trained on.")
        for folder in (sft, reward) if on_sft else ():
            if folder is not None and folder.config.use_dora:
                raise ValueError(
                    f"The adapter {folder.path!r} uses DoRA, and the reward adapter was trained on the SFT adapter: "
                    "DoRA's adapters do not add up. Merge the SFT adapter, and give the merged model as base."
                )
        if not (on_sft and names_sft):
            adapters.check_base(reward, other_name=other_name or on_sft, **known)
        return on_sft

    def _add_adapters(
        self, base: Any, sft: AdapterFolder | None, reward: AdapterFolder, policy_config: Any, value_config: Any
    ) -> PolicyModel:
        for name, config in (("policy_config", policy_config), ("value_config", value_config)):
            if config is not None:
                adapters.check_lora(config, name)
        policy_config = policy_config or (sft.config if sft is not None else None)
        if policy_config is None:
            raise ValueError(
                "There is no SFT adapter whose shape the policy takes: pass policy_config=LoraConfig(...)."
            )
        pieces = {name: folder for name, folder in ((SFT, sft), (REWARD, reward)) if folder is not None}
        for name, folder in pieces.items():
            # Embeddings that a reward model only saved may hold one row more, for a pad token that nobody reads.
            read = {key: value for key, value in folder.weights.items() if name == SFT or "modules_to_save" in key}
            rows = adapters.rows_of_adapter(base, folder.config, read) or 0
            if rows > (has := adapters.token_rows(base)):
                raise ValueError(
                    f"The adapter {folder.path!r} was trained with {rows} token rows, and the base has {has}: tokens "
                    "were added, and all roles share the base. Make the grown model the base "
                    f"(model.resize_token_embeddings({rows}), save_pretrained, its tokenizer beside it) and train all "
                    "adapters on it; or run PPOPtxTrainer with models of their own."
                )
        model = PolicyModel(base, self._own(policy_config), adapter_name=POLICY)
        for name, folder in pieces.items():
            model.add_adapter(name, copy.deepcopy(folder.config))  # PEFT keeps the config, and changes it
            load_adapter_weights(model, name, folder)
        if sft is not None:
            adapters.copy_adapter(model, SFT, POLICY)
        # A saved critic names what its reward adapter stood on, so that a later run can take it up as one.
        critic = copy.deepcopy(value_config or reward.config)
        critic.base_model_name_or_path, critic.revision = reward.config.base_model_name_or_path, reward.config.revision
        model.add_adapter(CRITIC, critic)
        adapters.copy_adapter(model, REWARD, CRITIC)
        # At rest the policy alone is active and trains, whatever PEFT switched on while it added the others.
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

    @contextmanager
    def active(self, role: str) -> Iterator[None]:
        """While active, the shared model is `role` ("policy", "reference", "reward" or "value"), and trains it alone.

        Policy and critic are in the mode of their module, the others in eval mode. On leaving, also after an error, all
        is as it was: adapters, `requires_grad`, train and eval mode. Run a backward pass inside.
        """
        module, trained = {"policy": (self.model, POLICY), "value": (self.value, CRITIC)}.get(role, (None, None))
        training = module is not None and module.training
        if self._current == (role, training):  # a forward inside a block that is held for its backward
            yield
            return
        own = list(adapter_parameters(self.model, trained).values()) if trained else []
        before, self._current = self._current, (role, training)
        try:
            with adapters.switched(self.model, self._stacks[role], trainable=own, training=training):
                yield
        finally:
            self._current = before

    def frozen(self) -> AbstractContextManager[None]:
        """While active, no weight of the shared model requires a gradient: none is cast or counted as trained."""
        return adapters.frozen(self.model)

    def to(self, device: torch.device) -> RoleAdapters:
        """Move the heads after the shared model, which its trainer moves."""
        for role in (self.reward, self.value):
            role.score.to(device)
        return self

    def load_policy(self, path: str | Path) -> None:
        """Take up the policy's adapter from a folder in PEFT's format. Raises ValueError if it does not fit."""
        load_adapter_weights(self.model, POLICY, adapters.read_adapter(path))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `policy/` and `value/` under `folder`, each an adapter in PEFT's format."""
        self.policy.save_pretrained(str(Path(folder, "policy")))
        self.value.save_pretrained(Path(folder, "value"))

    def merge(self, folder: str | Path) -> Any:
        """Write the policy as a standalone model in float32 into `folder`; the shared base keeps its weights.

        The base is read again, unquantised, if it came by name, and else copied, for as long as this takes. The
        tokenizer of the SFT adapter, or of the base, is written beside it if there is one.

        Returns:
            the merged model, on the CPU.

        Raises:
            ValueError: the base is quantised, and in memory only or as it is stored.
        """
        if self._by_path:
            # In bf16 the small part that an adapter adds would be rounded away.
            kwargs = {key: value for key, value in self._model_kwargs.items() if key != "device_map"}
            base: Any = AutoModelForCausalLM.from_pretrained(self.base_name, **{**kwargs, "dtype": torch.float32})
            if is_quantised(base):
                raise ValueError(
                    f"{self.base_name!r} is stored quantised, and no adapter merges into that exactly. Use the adapter "
                    "as it was saved, or merge it into the unquantised original."
                )
            merged: Any = PeftModelForCausalLM(base, self._own(self.model.peft_config[POLICY]))
            set_peft_model_state_dict(merged, adapter_state(self.model, POLICY))
        elif is_quantised(self.model):
            raise ValueError("A quantised base in memory cannot be merged exactly. Make RoleAdapters from its name.")
        else:
            merged = copy.deepcopy(self.model).cpu().float()
            vars(adapters.without_adapters(merged)).pop("forward", None)  # a trainer's own, bound to this model
        standalone = merged.merge_and_unload(adapter_names=[POLICY]).cpu()
        standalone.save_pretrained(str(folder))
        if has_tokenizer(self.tokenizer_path):
            load_tokenizer(self.tokenizer_path).save_pretrained(str(folder))
        return standalone
