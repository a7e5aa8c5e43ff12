"""The memory of a PPO-ptx run: four models, or one base with four roles, through one iteration."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
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
from instruct_trl.memory.shapes import ModelShape
from instruct_trl.memory.trace import Precision

LAYOUTS = ("four_full", "policy_lora", "four_lora", "one_base")


@dataclass(frozen=True)
class PPOModels:
    """Which models a run holds.

    Attributes:
        policy, reward: configs of the policy (and reference) and of the reward model (and critic).
        layout: 'four_full': policy, reference, reward model and critic, each a model of its own; 'policy_lora': an
            adapter on the policy, whose base with the adapter off is the reference, full reward model and critic;
            'four_lora': four bases, each with an adapter, two of them trained; 'one_base': one base, four adapters.
        dtype: of the policy's weights (and of the one base); reward model and critic are float32 where they are models
            of their own.
        adapters: dtype of a trained adapter of the policy; `critic_adapters`: of the others.
        nf4: None: not quantised; else whether the scales are quantised, too.
        sft_adapter: one base: the reference is an adapter, not the bare base.
    """

    policy: Any
    reward: Any
    layout: str = "four_full"
    dtype: torch.dtype = torch.float32
    adapters: torch.dtype = torch.float32
    critic_adapters: torch.dtype = torch.float32
    nf4: bool | None = None
    peft_config: Any = None
    reward_peft_config: Any = None
    sft_adapter: bool = True
    autocast: bool = False
    ema: bool = True


@dataclass(frozen=True)
class PPOSizes:
    """How much of a run is done at once on one device.

    Attributes:
        rollout: episodes an iteration; `chunk` of them are generated, or scored, at once.
        micro_batch, accumulation: rows of a forward and backward; how many make an optimizer step.
        prompt, completion, ptx_length: tokens. `ptx_ratio`: pretraining micro-batches for each of PPO's; 0 for none.
        reward_chunk: rows the reward model scores at once.
        fused_head: TRL's fused log-prob head (where Triton runs).
        own_generator: vLLM samples elsewhere, so no KV cache here.
    """

    rollout: int = 512
    chunk: int = 64
    reward_chunk: int = 64
    micro_batch: int = 8
    accumulation: int = 8
    prompt: int = 1024
    completion: int = 1024
    ptx_length: int = 2048
    ptx_ratio: int = 8
    checkpointing: bool = True
    fused_head: bool = False
    own_generator: bool = False
    assumptions: tuple[str, ...] = field(default=())


def sizes_of(args: Any, *, prompt: int, fused_head: bool, assumptions: tuple[str, ...] = ()) -> PPOSizes:
    """The sizes that a PPOPtxConfig sets, with prompts of `prompt` tokens."""
    return PPOSizes(
        rollout=args.generation_batch_size // args.world_size,
        chunk=args.local_rollout_forward_batch_size,
        reward_chunk=args.local_rollout_forward_batch_size,
        micro_batch=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        prompt=prompt,
        completion=args.max_completion_length,
        ptx_length=args.ptx_max_length,
        ptx_ratio=args.ptx_ratio if args.ptx_coef else 0,
        checkpointing=args.gradient_checkpointing,
        fused_head=fused_head,
        own_generator=bool(args.use_vllm),
        assumptions=assumptions,
    )


def ppo_roles(models: PPOModels) -> dict[str, RoleModel]:
    """Role → its model, for one of `LAYOUTS`.

    Raises:
        ValueError: no such layout, or an adapter's is missing.
    """
    if models.layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {models.layout!r}.")
    if models.layout != "four_full" and models.peft_config is None:
        raise ValueError(f"layout {models.layout!r} needs a peft_config, e.g. LoraConfig(r=16).")
    policy, reward = ModelShape(models.policy), ModelShape(models.reward, score=True)
    shared = Precision(models.dtype, models.adapters, models.autocast)
    plain = Precision(autocast=models.autocast)
    lora, reward_lora = models.peft_config, models.reward_peft_config or models.peft_config
    base = RoleModel("policy", policy, shared, nf4=models.nf4, trained=True, averaged=models.ema)
    value = RoleModel("value", reward, plain, trained=True)
    score = RoleModel("reward", reward, plain)
    if models.layout == "four_full":
        return {"policy": base, "reference": RoleModel("reference", policy, shared), "reward": score, "value": value}
    adapted = replace(base, peft_config=lora)
    if models.layout == "policy_lora":
        return {"policy": adapted, "reward": score, "value": value}
    critic = Precision(models.dtype, models.critic_adapters, models.autocast)
    if models.layout == "four_lora":
        other = {"precision": critic, "nf4": models.nf4, "peft_config": reward_lora}
        return {
            "policy": adapted,
            "reference": replace(adapted, name="reference", precision=critic, trained=False, averaged=False),
            "reward": replace(score, **other),
            "value": replace(value, **other),
        }
    scalar = {"shape": policy, "precision": critic, "peft_config": reward_lora, "nf4": models.nf4, "own_base": False}
    roles = {
        "base": RoleModel("base", policy, shared, nf4=models.nf4),
        "policy": replace(adapted, own_base=False),
        "reward": replace(score, scalar_head=True, **scalar),
        "value": replace(value, scalar_head=True, **scalar),
    }
    if models.sft_adapter:
        roles["reference"] = RoleModel("reference", policy, critic, peft_config=lora, nf4=models.nf4, own_base=False)
    return roles


def ppo_plan(models: PPOModels, sizes: PPOSizes) -> MemoryPlan:
    """The plan of one iteration: generation, scoring, update."""
    roles = ppo_roles(models)
    resident = [item for role in roles.values() for item in role.resident()]
    policy, value = roles["policy"], roles["value"]
    tokens, rows = sizes.prompt + sizes.completion, min(sizes.chunk, sizes.rollout)
    phases = [] if sizes.own_generator else [generation_phase(policy, rows, sizes.prompt, sizes.completion)]
    phases += [
        scoring_phase("log-probs", policy, rows, tokens, _logps(policy, rows, sizes, grad=False)),
        scoring_phase("reward", roles["reward"], min(sizes.reward_chunk, sizes.rollout), tokens, 0),
        scoring_phase("values", value, rows, tokens, 0),
        *_updates(policy, value, sizes),
        step_phase([policy, value]),
    ]
    return MemoryPlan(tuple(resident), tuple(phases), sizes.assumptions)


def _updates(policy: RoleModel, value: RoleModel, sizes: PPOSizes) -> list[Phase]:
    """Pretraining, policy and value: in this order for each micro-batch, gradients kept until the step."""
    rows, tokens = sizes.micro_batch, sizes.prompt + sizes.completion
    again = sizes.accumulation > 1
    # From the second micro-batch on, the critic's gradients are there as well.
    waiting = [value] if again else []
    phases = []
    if sizes.ptx_ratio:
        phases.append(
            update_phase(
                "pretraining update",
                policy,
                rows,
                sizes.ptx_length,
                _text_loss(policy, rows, sizes),
                checkpointing=sizes.checkpointing,
                accumulates=again or sizes.ptx_ratio > 1,
                others=waiting,
            )
        )
    phases.append(
        update_phase(
            "policy update",
            policy,
            rows,
            tokens,
            _logps(policy, rows, sizes, grad=True),
            checkpointing=sizes.checkpointing,
            accumulates=again or sizes.ptx_ratio > 0,
            others=waiting,
        )
    )
    checkpointing = sizes.checkpointing
    phases.append(
        update_phase(
            "value update", value, rows, tokens, 0, checkpointing=checkpointing, accumulates=again, others=[policy]
        )
    )
    return phases


def _logps(policy: RoleModel, rows: int, sizes: PPOSizes, *, grad: bool) -> int:
    """Log-probs of the answers, with the entropy where there is a gradient."""
    shape = policy.shape
    if sizes.fused_head:
        trained = grad and policy.peft_config is None
        return arithmetic.fused_head_bytes(rows * sizes.completion, shape.hidden, shape.vocabulary, trained)
    return arithmetic.logps_bytes(rows * sizes.completion, shape.vocabulary, policy.head_width, update=grad)


def _text_loss(policy: RoleModel, rows: int, sizes: PPOSizes) -> int:
    shape = policy.shape
    if sizes.fused_head:
        trained = policy.peft_config is None
        return arithmetic.fused_head_bytes(rows * sizes.ptx_length, shape.hidden, shape.vocabulary, trained)
    return arithmetic.cross_entropy_bytes(rows, sizes.ptx_length, shape.vocabulary, policy.head_width)
