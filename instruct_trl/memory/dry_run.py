"""`--dry_run` of a recipe: print the memory that it will need, from `config.json` of its models alone, and exit.

One function per kind of recipe. Models are given as candidates (a setting, then the folder of an earlier stage): the
first that is there is planned with. Each function raises a ValueError if none is, and exits as `--help` does.
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
CHECKPOINTING, ROLLOUT = "gradient_checkpointing", "local_rollout_forward_batch_size"
PPO_RELIEF = {
    **dict.fromkeys(("generation", "log-probs", "reward", "values"), [ROLLOUT]),
    **dict.fromkeys(("pretraining update", "policy update", "value update"), [CHECKPOINTING, ROWS]),
}


def training(
    recipe: str,
    args: TrainingArguments,
    model: ModelConfig,
    *,
    start: Candidates,
    scores: bool = False,
    device_memory_gb: float | None = None,
) -> NoReturn:
    """Plan a recipe that trains one model.

    Args:
        recipe: its name, for the title.
        args: an InstructSFTConfig or a RankingRewardConfig.
        start: the model that the training starts from.
        scores: it is trained as a classifier with one scalar head, on K completions per prompt.
        device_memory_gb: plan for a GPU of this size; by default for the device here.
    """
    from trl import get_peft_config

    lora, settings = get_peft_config(model), vars(args)
    length, budget = settings["max_length"] or PROMPT_TOKENS, settings.get("max_tokens_per_batch")
    adapters = torch.bfloat16 if model.load_in_4bit and args.bf16 else torch.float32
    role = RoleModel(
        "model",
        ModelShape(_config_of(start), score=scores),
        Precision(_dtype((settings["model_init_kwargs"] or {}).get("dtype")), adapters, bool(args.bf16)),
        lora,
        scalar_head=scores and lora is not None,
        nf4=bool(model.use_bnb_nested_quant) if model.load_in_4bit else None,
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
            checkpointing=bool(given[CHECKPOINTING]), accumulates=given[ACCUMULATION] > 1 or bool(budget),
        )  # fmt: skip
        return MemoryPlan(tuple(role.resident()), (update, step_phase([role])), tuple(assumed))

    changeable = {name: settings[name] for name in (CHECKPOINTING, ROWS, ACCUMULATION)}
    _show(Stage(recipe, make, changeable, {"update": [CHECKPOINTING, ROWS]}, last_resort(model)), device_memory_gb)


def ppo(
    recipe: str,
    args: PPOPtxConfig,
    model: ModelConfig,
    *,
    policy: Candidates,
    reward_model: Candidates,
    one_base: bool,
    control: bool = False,
    device_memory_gb: float | None = None,
) -> NoReturn:
    """Plan a PPO run. Arguments as `training`'s; `one_base` holds all roles as adapters on one base.

    With `control` the run is trained a second time, after the first.

    Raises:
        ValueError: there is no policy, or `one_base` has no adapter.
    """
    from trl import get_peft_config

    lora, reward, settings = get_peft_config(model), _found(reward_model), vars(args)
    sft = read_adapter(_found(policy)) if one_base else None
    if one_base and lora is None and sft is None:
        raise ValueError("--one_base needs --use_peft and its settings (lora_r, ...), or the folder of an SFT adapter.")
    config, prompt = _config_of(policy), args.max_prompt_length or PROMPT_TOKENS
    models = PPOModels(
        config,
        read_config(reward) if reward else config,
        "one_base" if one_base else "four_full" if lora is None else "policy_lora",
        dtype=_dtype(model.dtype if one_base else (settings["model_init_kwargs"] or {}).get("dtype")),
        # TRL casts the policy's adapter on a quantised base to bf16; on one base it stays in float32.
        adapters=torch.bfloat16 if model.load_in_4bit and not one_base else torch.float32,
        nf4=bool(model.use_bnb_nested_quant) if model.load_in_4bit else None,
        peft_config=lora or sft,
        reward_peft_config=read_adapter(reward) if one_base else None,
        sft_adapter=sft is not None,
        autocast=bool(args.bf16),
        ema=args.ema_decay is not None,
    )
    assumed = {
        "the reward model has the policy's size.": not reward,
        "the reward model's adapter has the policy's rank and modules.": one_base and not reward,
        "8-bit weights are counted as if they were not quantised.": model.load_in_8bit,
        f"every prompt has {prompt} tokens and every answer {args.max_completion_length}.": True,
        "vLLM's own memory is not counted.": args.use_vllm,
        "the control is trained after the run, with models of the same sizes, so it needs no more.": control,
    }
    assumptions = tuple(sentence for sentence, applies in assumed.items() if applies)
    on_gpu = this_device(device_memory_gb).is_gpu

    def make(given: Settings) -> MemoryPlan:
        changed = copy(args)
        vars(changed).update(given)
        return ppo_plan(models, changed, prompt=prompt, fused_head=on_gpu, assumptions=assumptions)

    changeable = {name: settings[name] for name in (ROLLOUT, CHECKPOINTING, ROWS, ACCUMULATION)}
    _show(Stage(recipe, make, changeable, PPO_RELIEF, last_resort(model, one_base)), device_memory_gb)


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
    """Plan a recipe that samples and scores and trains nothing. Judges and tasks are not counted.

    Args:
        samplers: role → its model. The first one samples; a second one is its reference, for the KL.
        reward_model: scores the answers; empty for none.
        batch_size: answers sampled or scored at once.
    """
    precision = Precision(autocast=bf16)
    roles = [RoleModel(name, ModelShape(_config_of(model)), precision) for name, model in samplers.items()]
    scorers = [RoleModel("reward", ModelShape(_config_of(reward_model), score=True), precision)] if reward_model else []
    sampler = roles[0]
    context = getattr(sampler.shape.config.get_text_config(), "max_position_embeddings", None) or 2 * PROMPT_TOKENS
    prompt = max(1, min(PROMPT_TOKENS, context - max_completion_length))
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
    """The advice if no setting of the batches makes a run fit. `one_base` is None outside PPO."""
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


def _dtype(given: Any) -> torch.dtype:
    """A dtype from its name; 'auto' is bf16, in which most models are published."""
    if isinstance(given, torch.dtype):
        return given
    return getattr(torch, str(given or "float32").removeprefix("torch."), torch.bfloat16)
