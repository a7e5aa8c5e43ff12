"""A plan of a run's memory: what is always there, what each phase adds, and where the peak is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from instruct_trl.memory.arithmetic import cross_entropy_bytes, fused_head_bytes, logps_bytes, sampling_bytes
from instruct_trl.memory.roles import Item, ModelShape, RoleModel, total
from instruct_trl.memory.trace import Precision

if TYPE_CHECKING:
    from instruct_trl.trainers.ppo_ptx_config import PPOPtxConfig

# Layout → the roles with an adapter of their own.
LAYOUTS: dict[str, tuple[str, ...]] = {
    "four_full": (),
    "policy_lora": ("policy",),
    "four_lora": ("policy", "reference", "reward", "value"),
    "one_base": ("policy", "reference", "reward", "value"),
}


@dataclass(frozen=True)
class Phase:
    """A part of a run, and what it holds beyond what is always there."""

    name: str
    items: tuple[Item, ...]

    @property
    def size(self) -> int:
        return total(self.items)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a run on one device; see `report`.

    Attributes:
        resident: there from the first optimizer step on: weights, adapters, moments, averages.
        phases: in the order of the run.
        assumptions: one sentence for each thing that was not known.
    """

    resident: tuple[Item, ...]
    phases: tuple[Phase, ...]
    assumptions: tuple[str, ...] = ()

    @property
    def peak_phase(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.size)

    @property
    def peak(self) -> int:
        """Bytes of that phase and of what is always there."""
        return total(self.resident) + self.peak_phase.size

    @property
    def weights(self) -> int:
        """Bytes of the weights and adapters of all roles."""
        return total(self.resident, kinds=("weights", "adapters"))


def _phase(name: str, role: RoleModel, *moments: dict[str, int], others: Iterable[Item] = ()) -> Phase:
    """A phase is as large as the largest of its moments (kind → bytes of `role`)."""
    largest = max(moments, key=lambda sizes: sum(sizes.values()))
    items = [*others, *(Item(role.name, kind, size) for kind, size in largest.items())]
    return Phase(name, tuple(item for item in items if item.size))


def generation_phase(role: RoleModel, rows: int, prompt: int, completion: int) -> Phase:
    """Sampling is largest after the prompts, with their activations, or at the last token, with the full cache."""
    if role.peft_config is not None:
        # accelerate's autocast lies on the forward of the PeftModel, and PEFT's `generate` calls the model inside.
        role = replace(role, precision=replace(role.precision, autocast=False))
    prefill = role.run(rows, prompt)
    copies = {"bf16 copies": prefill.copies + role.head_copy}
    after_prompts = {
        "activations": prefill.forward - prefill.copies + role.unpacked,
        "KV cache": role.kv_cache(rows, prompt),
    }
    at_the_end = {
        "activations": role.unpacked,
        "logits": sampling_bytes(rows, role.shape.vocabulary),
        "KV cache": role.kv_cache(rows, prompt + completion),
    }
    return _phase("generation", role, copies | after_prompts, copies | at_the_end)


def scoring_phase(name: str, role: RoleModel, rows: int, tokens: int, logits: int) -> Phase:
    """One forward without gradient. `logits` is what the head adds to the hidden states."""
    run = role.run(rows, tokens)
    copies = {"bf16 copies": run.copies + (role.head_copy if logits else 0)}
    at_the_head = {"activations": run.kept - run.copies, "logits": logits}
    within = {"activations": run.forward - run.copies + role.unpacked}
    return _phase(name, role, copies | at_the_head, copies | within)


def update_phase(
    name: str,
    role: RoleModel,
    rows: int,
    tokens: int,
    logits: int,
    *,
    checkpointing: bool,
    accumulates: bool,
    others: Iterable[RoleModel] = (),
) -> Phase:
    """Forward and backward: largest at the end of the forward (logits), or during the backward (gradients).

    Args:
        logits: what the head takes at the end of the forward.
        accumulates: the gradients of earlier micro-batches are there already.
        others: roles whose gradients wait for their step meanwhile.
    """
    run = role.run(rows, tokens, train=True, checkpointing=checkpointing, accumulates=accumulates)
    end_of_forward = {
        "gradients": role.gradients * accumulates,
        "bf16 copies": run.copies + role.head_copy,
        "activations": max(run.forward - logits, run.kept) - run.copies + role.unpacked,
        "logits": logits,
    }
    backward = {"gradients": role.gradients, "activations": run.backward - run.gradients + role.unpacked}
    waiting = [Item(other.name, "gradients", other.gradients) for other in others]
    return _phase(name, role, end_of_forward, backward, others=waiting)


def step_phase(roles: Iterable[RoleModel]) -> Phase:
    """The optimizer step holds all gradients; the fused AdamW needs no room of its own."""
    return Phase("optimizer step", tuple(Item(role.name, "gradients", role.gradients) for role in roles))


@dataclass(frozen=True)
class PPOModels:
    """The models that a PPO run holds.

    Attributes:
        policy, reward: configs of the policy (and reference) and of the reward model (and critic).
        layout: 'four_full' is four models. 'policy_lora' has an adapter on the policy, whose base is the reference, and
            a full reward model and critic. 'four_lora' is four bases with an adapter each. 'one_base' is one base with
            four adapters.
        dtype: of the policy's weights, and of the one base. A reward model or critic of its own is float32.
        adapters: dtype of the policy's adapter. The others' are float32.
        nf4: None if it is not quantised; else whether the scales are quantised too.
        sft_adapter: on one base, the reference is an adapter and not the bare base.
        ema: a moving average of the policy is kept.
    """

    policy: Any
    reward: Any
    layout: str = "four_full"
    dtype: torch.dtype = torch.float32
    adapters: torch.dtype = torch.float32
    nf4: bool | None = None
    peft_config: Any = None
    reward_peft_config: Any = None
    sft_adapter: bool = True
    autocast: bool = False
    ema: bool = True


def ppo_roles(models: PPOModels) -> dict[str, RoleModel]:
    """Role → its model, for one of `LAYOUTS`.

    Raises:
        ValueError: the layout is not one of them, or its adapter is missing.
    """
    if models.layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {models.layout!r}.")
    if LAYOUTS[models.layout] and models.peft_config is None:
        raise ValueError(f"layout {models.layout!r} needs a peft_config, e.g. LoraConfig(r=16).")
    one_base = models.layout == "one_base"
    policy, reward = ModelShape(models.policy), ModelShape(models.reward, score=True)
    roles = {}
    if one_base:
        precision = Precision(models.dtype, models.adapters, models.autocast)
        roles["base"] = RoleModel("base", policy, precision, nf4=models.nf4)
    for name in ("policy", "reference", "reward", "value"):
        scores, has_adapter = name in ("reward", "value"), name in LAYOUTS[models.layout]
        if name == "reference" and (models.layout == "policy_lora" or (one_base and not models.sft_adapter)):
            continue  # it is the base with the adapters off
        full_scorer = scores and not has_adapter
        weights = torch.float32 if full_scorer else models.dtype
        adapters = models.adapters if name == "policy" else torch.float32
        lora = (models.reward_peft_config if scores else None) or models.peft_config
        roles[name] = RoleModel(
            name,
            reward if scores and not one_base else policy,
            Precision(weights, adapters, models.autocast),
            peft_config=lora if has_adapter else None,
            scalar_head=one_base and scores,
            nf4=None if full_scorer else models.nf4,
            own_base=not one_base,
            trained=name in ("policy", "value"),
            averaged=name == "policy" and models.ema,
        )
    return roles


def ppo_plan(
    models: PPOModels, args: PPOPtxConfig, *, prompt: int, fused_head: bool, assumptions: tuple[str, ...] = ()
) -> MemoryPlan:
    """The plan of one iteration: generation, scoring, updates.

    Args:
        args: the run's settings.
        prompt: tokens of a prompt; every answer has `args.max_completion_length`.
        fused_head: TRL's fused log-prob head is used, which needs Triton.
    """
    roles = ppo_roles(models)
    policy, value = roles["policy"], roles["value"]
    shape, completion = policy.shape, args.max_completion_length or 0  # upstream's field may be None, ours may not
    tokens, length, batch = prompt + completion, args.ptx_max_length, args.per_device_train_batch_size

    def head(scored: int, grad: bool) -> int:
        if fused_head:
            return fused_head_bytes(scored, shape.hidden, shape.vocabulary, grad and policy.peft_config is None)
        return logps_bytes(scored, shape.vocabulary, policy.head_width, update=grad)

    rows = min(args.local_rollout_forward_batch_size, args.generation_batch_size // args.world_size)
    phases = [] if args.use_vllm else [generation_phase(policy, rows, prompt, completion)]
    phases += [
        scoring_phase("log-probs", policy, rows, tokens, head(rows * completion, grad=False)),
        scoring_phase("reward", roles["reward"], rows, tokens, 0),
        scoring_phase("values", value, rows, tokens, 0),
    ]
    # Pretraining, policy and value follow each other in each micro-batch, and gradients are kept until the step. From
    # the second micro-batch on all gradients are there already, the critic's too.
    again, ptx_ratio = args.gradient_accumulation_steps > 1, args.ptx_ratio if args.ptx_coef else 0
    waiting = [value] if again else []
    texts = cross_entropy_bytes(batch, length, shape.vocabulary, policy.head_width)
    texts, answers = head(batch * length, grad=True) if fused_head else texts, head(batch * completion, grad=True)
    # name, role, tokens, bytes of the head, gradients that are there already, roles that wait
    updates = [
        ("pretraining update", policy, length, texts, again or ptx_ratio > 1, waiting),
        ("policy update", policy, tokens, answers, again or ptx_ratio > 0, waiting),
        ("value update", value, tokens, 0, again, [policy]),
    ]
    for name, role, size, logits, there, others in updates if ptx_ratio else updates[1:]:
        how = {"checkpointing": args.gradient_checkpointing, "accumulates": there}
        phases.append(update_phase(name, role, batch, size, logits, others=others, **how))
    resident = tuple(item for role in roles.values() for item in role.resident())
    return MemoryPlan(resident, (*phases, step_phase([policy, value])), assumptions)
