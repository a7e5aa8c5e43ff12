"""`--dry_run` of every recipe: from its settings to a plan of its memory, with `config.json` of the models alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from instruct_trl.memory import arithmetic as arithmetic
from instruct_trl.memory.plan import (
    MemoryPlan,
    Phase,
    RoleModel,
    generation_phase,
    scoring_phase,
    step_phase,
    update_phase,
)
from instruct_trl.memory.ppo import PPOModels, ppo_plan, sizes_of
from instruct_trl.memory.report import (
    ACCUMULATION,
    ROWS,
    SMALLER,
    Device,
    Settings,
    Stage,
    report,
    this_device,
)
from instruct_trl.memory.shapes import ModelShape, read_config, without_head
from instruct_trl.memory.trace import Precision
from instruct_trl.pipeline.training import check_one_base

PROMPT_TOKENS = 1024  # where nothing bounds a prompt: the paper's limit
COMPLETIONS = 4  # K where the data decides it
KL_ROWS = 16  # answers whose log-probs the evaluation computes at once
ONE_FORWARD = {"generation": ["batch_size"], "reward": ["batch_size"]}
UPDATE = ["gradient_checkpointing", "per_device_train_batch_size"]
ROLLOUT = ["local_rollout_forward_batch_size"]
PPO_RELIEF = {name: ROLLOUT for name in ("generation", "log-probs", "reward", "values")} | {
    name: UPDATE for name in ("pretraining update", "policy update", "value update")
}


def dry_run(recipe: str, parsed: tuple) -> None:
    """Print the plan of a recipe, on the first process only.

    Args:
        recipe: its name.
        parsed: its arguments, as `parse_recipe` gives them.

    Raises:
        ValueError: a model that does not exist, or has no config.
    """
    if int(os.environ.get("RANK", "0")) == 0:
        print(page(recipe, parsed))


def page(recipe: str, parsed: tuple) -> str:
    """The report of `dry_run`."""
    device = this_device(parsed[0].device_memory_gb)
    stage = STAGES[recipe](device, *parsed)
    return report(replace(stage, last_resort=last_resort(*parsed)), device)


def last_resort(run: Any, *others: Any) -> str:
    """What is left to do where no setting of the batches makes a run fit."""
    from trl import ModelConfig

    model = next((given for given in others if isinstance(given, ModelConfig)), None)
    if model is None:
        return SMALLER
    one_base, ways = getattr(run, "one_base", None), []  # None: a recipe without four roles
    if one_base is False:
        ways.append("hold the four roles on one frozen base (see recipes/ppo_ptx_qlora_16gb.yaml)")
    elif not (one_base or model.use_peft):
        ways.append("train an adapter (--use_peft)")
    elif not model.load_in_4bit:
        ways.append("load the base in 4 bits (--load_in_4bit)")
    if model.lora_modules_to_save:
        ways.append("leave --lora_modules_to_save out")
    return ", or ".join([*ways, SMALLER])


def demo_config() -> Any:
    """The config of the demo's SmolLM2-135M: of its cached copy, or from here, for it is downloaded as one file."""
    from transformers import LlamaConfig

    from instruct_trl.pipeline.packages import cache_folder

    folder = cache_folder() / "smollm2-135m-instruct"
    if (folder / "config.json").exists():
        return read_config(folder)
    return LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip


def config_of(name: str | None, default: Path | None = None) -> Any:
    """The config of a model given by name, else of a stage's output, else of the demo's model, which it starts from."""
    name = name or (None if default is None else _existing(default))
    return demo_config() if name is None else read_config(name)


def lora_of(model: Any) -> Any:
    """The LoraConfig that the model arguments ask for, or None."""
    from trl import get_peft_config

    return get_peft_config(model)


def as_dtype(given: Any) -> torch.dtype:
    """A dtype from its name; 'auto' is what models are published in, bf16."""
    if isinstance(given, torch.dtype):
        return given
    return getattr(torch, str(given or "float32").removeprefix("torch."), torch.bfloat16)


def _dtype(args: Any) -> torch.dtype:
    return as_dtype((args.model_init_kwargs or {}).get("dtype"))


def _nf4(model: Any) -> bool | None:
    return bool(model.use_bnb_nested_quant) if model.load_in_4bit else None


def plan_ppo_ptx(device: Device, run: Any, args: Any, model: Any) -> Stage:
    """recipes/ppo_ptx.py."""
    models, assumed = _ppo_models(run, args, model)
    prompt = args.max_prompt_length or PROMPT_TOKENS
    assumed.append(f"every prompt has {prompt} tokens and every answer {args.max_completion_length}.")
    if args.use_vllm:
        assumed.append("vLLM's own memory is not counted.")
    sizes = sizes_of(args, prompt=prompt, fused_head=device.is_gpu, assumptions=tuple(assumed))
    names = ("local_rollout_forward_batch_size", ROWS, ACCUMULATION, "gradient_checkpointing")

    def make(given: Settings) -> MemoryPlan:
        rows, chunk = int(given[ROWS]), int(given["local_rollout_forward_batch_size"])
        checkpointing = bool(given["gradient_checkpointing"])
        changed = replace(sizes, micro_batch=rows, accumulation=int(given[ACCUMULATION]), checkpointing=checkpointing)
        return ppo_plan(models, replace(changed, chunk=chunk, reward_chunk=chunk))

    return Stage("recipes/ppo_ptx.py", make, _settings(args, *names), PPO_RELIEF)


def _ppo_models(run: Any, args: Any, model: Any) -> tuple[PPOModels, list[str]]:
    """The models of a PPO run, and what was taken to be so."""
    one_base = getattr(run, "one_base", False)
    if one_base:
        check_one_base(run, model)
    name, default = model.model_name_or_path, run.run / "selected_sft" / "model"
    policy = config_of(name, default)
    reward_path = run.reward_model_path or _existing(run.run / "reward_model")
    reward = read_config(reward_path) if reward_path else policy
    assumed = [] if reward_path else ["the reward model has the policy's size."]
    lora, nf4 = lora_of(model), _nf4(model)
    sft = adapter_of(name or _existing(default)) if one_base else None
    if one_base and lora is None and sft is None:
        raise ValueError("--one_base needs --use_peft and its settings (lora_r, ...), or the folder of an SFT adapter.")
    if one_base:
        assumed += [] if reward_path else ["the reward model's adapter has the policy's rank and modules."]
    # TRL casts the policy's adapter on a quantised base to bf16; on one base it stays in float32, as the critic's.
    adapters = torch.bfloat16 if nf4 is not None and not one_base else torch.float32
    assumed += ["8-bit weights are counted as if they were not quantised."] if model.load_in_8bit else []
    models = PPOModels(
        policy,
        reward,
        "one_base" if one_base else "four_full" if lora is None else "policy_lora",
        dtype=as_dtype(model.dtype) if one_base else _dtype(args),
        adapters=adapters,
        nf4=nf4,
        peft_config=lora or sft,
        reward_peft_config=adapter_of(reward_path) if one_base else None,
        sft_adapter=sft is not None,
        autocast=bool(args.bf16),
        ema=args.ema_decay is not None,
    )
    return models, assumed


def _existing(folder: Path) -> str | None:
    """`folder` if it holds a model or an adapter."""
    files = ("config.json", "adapter_config.json")
    return str(folder) if any((folder / file).exists() for file in files) else None


def adapter_of(name: str | None) -> Any:
    """The LoraConfig of an adapter's local folder, as one that is trained, or None; its head is counted apart."""
    from peft import PeftConfig

    if name is None or not Path(name, "adapter_config.json").is_file():
        return None
    return without_head(PeftConfig.from_pretrained(name))


def plan_sft(device: Device, run: Any, args: Any, model: Any) -> Stage:
    """recipes/sft.py: one model, trained."""
    return _training_stage("recipes/sft.py", device, args, model, config_of(model.model_name_or_path), 1, ())


def plan_reward_model(device: Device, run: Any, args: Any, model: Any) -> Stage:
    """recipes/reward_model.py: one classifier, trained on K completions a prompt."""
    config = config_of(model.model_name_or_path, run.run / "sft")
    assumed = (
        () if args.max_tokens_per_batch else (f"a prompt has {COMPLETIONS} completions (a row of the data says).",)
    )
    return _training_stage("recipes/reward_model.py", device, args, model, config, COMPLETIONS, assumed, score=True)


def _training_stage(
    title: str,
    device: Device,
    args: Any,
    model: Any,
    config: Any,
    rows_a_row: int,
    assumed: tuple,
    *,
    score: bool = False,
) -> Stage:
    lora, nf4 = lora_of(model), _nf4(model)
    adapters = torch.bfloat16 if nf4 is not None and args.bf16 else torch.float32
    length = args.max_length or PROMPT_TOKENS
    role = RoleModel(
        "model",
        ModelShape(config, score=score),
        Precision(_dtype(args), adapters, bool(args.bf16)),
        lora,
        scalar_head=score and lora is not None,
        nf4=nf4,
        trained=True,
    )
    assumed = (f"every row has {length} tokens.", *assumed)

    def make(given: Settings) -> MemoryPlan:
        rows = int(given[ROWS]) * rows_a_row
        budget = getattr(args, "max_tokens_per_batch", None)
        if budget:
            rows = max(1, min(rows, budget // length))
        head = 0 if score else arithmetic.fused_head_bytes(
            rows * length, role.shape.hidden, role.shape.vocabulary, lora is None
        )  # fmt: skip
        update = update_phase(
            "update", role, rows, length, head, checkpointing=bool(given["gradient_checkpointing"]),
            accumulates=given[ACCUMULATION] > 1 or bool(budget),
        )  # fmt: skip
        return MemoryPlan(tuple(role.resident()), (update, step_phase([role])), assumed)

    settings = _settings(args, ROWS, ACCUMULATION, "gradient_checkpointing")
    return Stage(title, make, settings, {"update": UPDATE})


def plan_sample(device: Device, run: Any) -> Stage:
    """recipes/sample.py: one model that answers."""
    sampler = _sampler("sampler", config_of(run.model_name_or_path, run.run / "sft"), run)
    return _sampling_stage("recipes/sample.py", device, run, [sampler], None)


def plan_select_sft(device: Device, run: Any) -> Stage:
    """recipes/select_sft.py: a checkpoint that answers, the reward model that scores."""
    folder = Path(run.sft_path) if run.sft_path else run.run / "sft"
    checkpoints = sorted(folder.glob("checkpoint-*/config.json")) + sorted(
        folder.glob("checkpoint-*/adapter_config.json")
    )
    config = read_config(checkpoints[0].parent) if checkpoints else config_of(run.sft_path, folder)
    reward = config_of(run.reward_model_path, run.run / "reward_model")
    return _sampling_stage("recipes/select_sft.py", device, run, [_sampler("checkpoint", config, run)], reward)


def plan_evaluate(device: Device, run: Any, *beside: Any) -> Stage:
    """recipes/evaluate.py: a model that answers, the SFT model beside it, the reward model. Not judges, not tasks."""
    reference = config_of(run.sft_model, run.run / "selected_sft" / "model")
    policy = config_of(run.ppo_model, run.run / "ppo_ptx" / "policy") if run.ppo_model else reference
    roles = [_sampler("model", policy, run), _sampler("reference", reference, run)]
    return _sampling_stage(
        "recipes/evaluate.py", device, run, roles, config_of(run.reward_model_path, run.run / "reward_model")
    )


def _sampler(name: str, config: Any, run: Any) -> RoleModel:
    return RoleModel(name, ModelShape(config), Precision(autocast=run.bf16))


def _sampling_stage(title: str, device: Device, run: Any, samplers: list[RoleModel], reward: Any) -> Stage:
    """Models that answer and are scored, none trained."""
    scorer = (
        None if reward is None else RoleModel("reward", ModelShape(reward, score=True), Precision(autocast=run.bf16))
    )
    roles = samplers + ([] if scorer is None else [scorer])
    context = samplers[0].shape.context or 2 * PROMPT_TOKENS
    prompt = max(1, min(PROMPT_TOKENS, context - run.max_completion_length))
    resident = tuple(item for role in roles for item in role.resident())
    assumed = (f"every prompt has {prompt} tokens and every answer {run.max_completion_length}.",)

    def make(given: Settings) -> MemoryPlan:
        rows, tokens = int(given["batch_size"]), prompt + run.max_completion_length
        phases: list[Phase] = [generation_phase(samplers[0], rows, prompt, run.max_completion_length)]
        if len(samplers) > 1:
            # Logits of every token in the head's dtype and in float32, and their log-softmax.
            logits = arithmetic.weight_bytes(KL_ROWS * tokens * samplers[0].shape.vocabulary, 10 if run.bf16 else 8)
            phases.append(scoring_phase("log-probs", samplers[0], KL_ROWS, tokens, logits))
        if scorer is not None:
            phases.append(scoring_phase("reward", scorer, rows, tokens, 0))
        return MemoryPlan(resident, tuple(phases), assumed)

    return Stage(title, make, {"batch_size": run.batch_size}, ONE_FORWARD)


def _settings(args: Any, *names: str) -> Settings:
    return {name: getattr(args, name) for name in names}


STAGES: dict[str, Callable[..., Stage]] = {
    "sft": plan_sft,
    "sample": plan_sample,
    "reward_model": plan_reward_model,
    "select_sft": plan_select_sft,
    "ppo_ptx": plan_ppo_ptx,
    "evaluate": plan_evaluate,
}
