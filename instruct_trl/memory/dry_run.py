"""`--dry_run` of a recipe: print the memory that it will need, from `config.json` of its models alone, and exit.

One function per kind of recipe. Models are given as candidates (a setting, then the folder of an earlier stage): the
first that is there is planned with.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from instruct_trl.memory.arithmetic import fused_head_bytes
from instruct_trl.memory.plan import (
    MemoryPlan,
    PPOModels,
    generation_phase,
    ppo_plan,
    scoring_phase,
    step_phase,
    update_phase,
)
from instruct_trl.memory.report import ACCUMULATION, ROWS, Settings, Stage, report, this_device
from instruct_trl.memory.roles import ModelShape, RoleModel, read_adapter, read_config
from instruct_trl.memory.trace import Precision

if TYPE_CHECKING:
    from transformers import TrainingArguments
    from trl import ModelConfig

    from instruct_trl.trainers.ppo_ptx_config import PPOPtxConfig

Candidates = Sequence[str | Path | None]
PROMPT_TOKENS = 1024  # the paper's limit, where nothing else bounds a prompt
COMPLETIONS = 4  # K, which the data decides
KL_ROWS = 16  # answers whose log-probs the evaluation computes at once
UPDATE = ["gradient_checkpointing", ROWS]
PPO_RELIEF = dict.fromkeys(
    ("generation", "log-probs", "reward", "values"), ["local_rollout_forward_batch_size"]
) | dict.fromkeys(("pretraining update", "policy update", "value update"), UPDATE)


def training(
    recipe: str,
    args: TrainingArguments,
    model: ModelConfig,
    *,
    start: Candidates,
    scores: bool = False,
    device_memory_gb: float | None = None,
) -> NoReturn:
    """Plan a recipe that trains one model, and exit as `--help` does.

    Args:
        recipe: its name, for the title.
        args: an InstructSFTConfig or a RankingRewardConfig.
        start: the model that the training starts from.
        scores: it is trained as a classifier with one scalar head, on K completions per prompt.
        device_memory_gb: plan for a GPU of this size; by default for the device here.

    Raises:
        ValueError: there is no such model.
    """
    lora, nf4 = _lora_of(model), _nf4_of(model)
    settings: Any = args
    length, budget = settings.max_length or PROMPT_TOKENS, getattr(args, "max_tokens_per_batch", None)
    adapters = torch.bfloat16 if nf4 is not None and args.bf16 else torch.float32
    role = RoleModel(
        "model",
        ModelShape(_config_of(start), score=scores),
        Precision(_dtype(_init_dtype(args)), adapters, bool(args.bf16)),
        lora,
        scalar_head=scores and lora is not None,
        nf4=nf4,
        trained=True,
    )
    assumed = [f"every row has {length} tokens."]
    assumed += [f"each prompt has {COMPLETIONS} completions."] if scores and not budget else []

    def make(given: Settings) -> MemoryPlan:
        rows = int(given[ROWS]) * (COMPLETIONS if scores else 1)
        rows = max(1, min(rows, budget // length)) if budget else rows
        head = fused_head_bytes(rows * length, role.shape.hidden, role.shape.vocabulary, lora is None)
        update = update_phase(
            "update", role, rows, length, 0 if scores else head,
            checkpointing=bool(given[UPDATE[0]]), accumulates=given[ACCUMULATION] > 1 or bool(budget),
        )  # fmt: skip
        return MemoryPlan(tuple(role.resident()), (update, step_phase([role])), tuple(assumed))

    stage = Stage(recipe, make, _settings(args, *UPDATE, ACCUMULATION), {"update": UPDATE})
    _show(replace(stage, last_resort=last_resort(model)), device_memory_gb)


def ppo(
    recipe: str,
    args: PPOPtxConfig,
    model: ModelConfig,
    *,
    policy: Candidates,
    reward_model: Candidates,
    one_base: bool,
    device_memory_gb: float | None = None,
) -> NoReturn:
    """Plan a PPO run, and exit. Arguments as `training`'s; `one_base` holds all roles as adapters on one base.

    Raises:
        ValueError: there is no policy, or `one_base` has no adapter.
    """
    device = this_device(device_memory_gb)
    models, assumed = _ppo_models(args, model, policy, _found(reward_model), one_base)
    prompt = args.max_prompt_length or PROMPT_TOKENS
    assumed.append(f"every prompt has {prompt} tokens and every answer {args.max_completion_length}.")
    assumed += ["vLLM's own memory is not counted."] if args.use_vllm else []

    def make(given: Settings) -> MemoryPlan:
        changed = copy(args)
        vars(changed).update(given)
        return ppo_plan(models, changed, prompt=prompt, fused_head=device.is_gpu, assumptions=tuple(assumed))

    settings = _settings(args, "local_rollout_forward_batch_size", *UPDATE, ACCUMULATION)
    stage = Stage(recipe, make, settings, PPO_RELIEF, last_resort(model, one_base))
    _show(stage, device_memory_gb)


def _ppo_models(
    args: PPOPtxConfig, model: ModelConfig, policy: Candidates, reward_model: str | None, one_base: bool
) -> tuple[PPOModels, list[str]]:
    """The models of a PPO run, and the assumptions made."""
    lora, nf4 = _lora_of(model), _nf4_of(model)
    sft = read_adapter(_found(policy)) if one_base else None
    if one_base and lora is None and sft is None:
        raise ValueError("--one_base needs --use_peft and its settings (lora_r, ...), or the folder of an SFT adapter.")
    config = _config_of(policy)
    assumed = [] if reward_model else ["the reward model has the policy's size."]
    if one_base and not reward_model:
        assumed.append("the reward model's adapter has the policy's rank and modules.")
    if model.load_in_8bit:
        assumed.append("8-bit weights are counted as if they were not quantised.")
    models = PPOModels(
        config,
        read_config(reward_model) if reward_model else config,
        "one_base" if one_base else "four_full" if lora is None else "policy_lora",
        dtype=_dtype(model.dtype if one_base else _init_dtype(args)),
        # TRL casts the policy's adapter on a quantised base to bf16; on one base it stays in float32.
        adapters=torch.bfloat16 if nf4 is not None and not one_base else torch.float32,
        nf4=nf4,
        peft_config=lora or sft,
        reward_peft_config=read_adapter(reward_model) if one_base else None,
        sft_adapter=sft is not None,
        autocast=bool(args.bf16),
        ema=args.ema_decay is not None,
    )
    return models, assumed


def sampling(
    recipe: str,
    samplers: Mapping[str, Candidates],
    *,
    reward_model: Candidates = (),
    batch_size: int,
    max_completion_length: int,
    bf16: bool,
    device_memory_gb: float | None = None,
) -> NoReturn:
    """Plan a recipe that samples and scores and trains nothing, and exit. Judges and tasks are not counted.

    Args:
        samplers: role → its model. The first one samples; a second one is its reference, for the KL.
        reward_model: scores the answers; empty for none.
        batch_size: answers sampled or scored at once.

    Raises:
        ValueError: there is no such model.
    """
    precision = Precision(autocast=bf16)
    roles = [RoleModel(name, ModelShape(_config_of(model)), precision) for name, model in samplers.items()]
    scorers = [RoleModel("reward", ModelShape(_config_of(reward_model), score=True), precision)] if reward_model else []
    sampler = roles[0]
    prompt = max(1, min(PROMPT_TOKENS, (sampler.shape.context or 2 * PROMPT_TOKENS) - max_completion_length))
    resident = tuple(item for role in (*roles, *scorers) for item in role.resident())
    assumed = (f"every prompt has {prompt} tokens and every answer {max_completion_length}.",)

    def make(given: Settings) -> MemoryPlan:
        rows, tokens = int(given["batch_size"]), prompt + max_completion_length
        phases = [generation_phase(sampler, rows, prompt, max_completion_length)]
        if len(roles) > 1:
            # The logits of every token in the head's dtype and in float32, and their log-softmax.
            logits = KL_ROWS * tokens * sampler.shape.vocabulary * (10 if bf16 else 8)
            phases.append(scoring_phase("log-probs", sampler, KL_ROWS, tokens, logits))
        phases += [scoring_phase("reward", scorer, rows, tokens, 0) for scorer in scorers]
        return MemoryPlan(resident, tuple(phases), assumed)

    relief = dict.fromkeys(("generation", "reward"), ["batch_size"])
    _show(Stage(recipe, make, {"batch_size": batch_size}, relief), device_memory_gb)


def last_resort(model: ModelConfig, one_base: bool | None = None) -> str:
    """What is left to do if no setting of the batches makes a run fit. `one_base` is None outside PPO."""
    ways = []
    if one_base is False:
        ways.append("hold the four roles on one frozen base (see recipes/ppo_ptx_qlora_16gb.yaml)")
    elif not (one_base or model.use_peft):
        ways.append("train an adapter (--use_peft)")
    elif not model.load_in_4bit:
        ways.append("load the base in 4 bits (--load_in_4bit)")
    if model.lora_modules_to_save:
        ways.append("leave --lora_modules_to_save out")
    return ", or ".join([*ways, Stage.last_resort])


def _show(stage: Stage, device_memory_gb: float | None) -> NoReturn:
    """Print the page on the first process only."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(report(replace(stage, title=f"recipes/{stage.title}.py"), this_device(device_memory_gb)))
    raise SystemExit(0)


def _found(candidates: Candidates) -> str | None:
    """The first candidate that is a name, or a folder that holds a model or an adapter."""
    for candidate in candidates:
        if isinstance(candidate, str):
            return candidate
        if candidate and any((candidate / file).is_file() for file in ("config.json", "adapter_config.json")):
            return str(candidate)
    return None


def _config_of(candidates: Candidates) -> Any:
    found = _found(candidates)
    if found is None:
        missing = ", ".join(str(candidate) for candidate in candidates if candidate)
        raise ValueError(f"There is no model to plan with in {missing}. Name one, or run the stage that makes it.")
    return read_config(found)


def _lora_of(model: ModelConfig) -> Any:
    """The LoraConfig that the model arguments ask for, or None."""
    from trl import get_peft_config

    return get_peft_config(model)


def _nf4_of(model: ModelConfig) -> bool | None:
    return bool(model.use_bnb_nested_quant) if model.load_in_4bit else None


def _init_dtype(args: Any) -> Any:
    return (args.model_init_kwargs or {}).get("dtype")


def _dtype(given: Any) -> torch.dtype:
    """A dtype from its name; 'auto' is bf16, in which most models are published."""
    if isinstance(given, torch.dtype):
        return given
    return getattr(torch, str(given or "float32").removeprefix("torch."), torch.bfloat16)


def _settings(args: Any, *names: str) -> Settings:
    return {name: getattr(args, name) for name in names}
