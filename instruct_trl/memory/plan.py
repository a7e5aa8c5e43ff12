"""A plan of a run's memory: what lies there all the time, what each phase adds, and where the peak is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from instruct_trl.memory import arithmetic as arithmetic
from instruct_trl.memory.shapes import ModelShape
from instruct_trl.memory.trace import Pass, Precision, trace_pass

KINDS = (
    "weights", "adapters", "optimizer", "average", "gradients", "bf16 copies", "activations", "logits", "KV cache",
)  # fmt: skip


_TRACED: dict[tuple, Pass] = {}  # the roles of a run ask for the same pass again


class Item(NamedTuple):
    """So many bytes of one kind for one role."""

    role: str
    kind: str
    size: int


@dataclass(frozen=True)
class Phase:
    """What a phase holds beyond what is always there."""

    name: str
    items: tuple[Item, ...]

    @property
    def size(self) -> int:
        return sum(item.size for item in self.items)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a run on one device; see `report`.

    Attributes:
        resident: there from the first optimizer step on: weights, adapters, moments, averages.
        phases: in the order of the run.
        assumptions: what was not known and taken to be so, one sentence each.
    """

    resident: tuple[Item, ...]
    phases: tuple[Phase, ...]
    assumptions: tuple[str, ...] = ()

    @property
    def resident_size(self) -> int:
        return sum(item.size for item in self.resident)

    @property
    def peak_phase(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.size)

    @property
    def peak(self) -> int:
        """max over phases of resident + phase."""
        return self.resident_size + self.peak_phase.size

    @property
    def weights(self) -> int:
        """Weights and adapters of all roles."""
        return total(self.resident, kinds=("weights", "adapters"))


def total(items: Iterable[Item], role: str | None = None, kinds: Iterable[str] = KINDS) -> int:
    """Bytes of these kinds, of one role or of all."""
    kinds = tuple(kinds)
    return sum(item.size for item in items if item.kind in kinds and role in (None, item.role))


@dataclass(frozen=True)
class RoleModel:
    """One role's model and how it is held.

    Attributes:
        name: policy, reference, reward, value; or base.
        shape: its architecture.
        precision: dtypes and autocast.
        peft_config: its adapter's, or None.
        scalar_head: the adapter brings a head of H numbers (reward and value on a shared base).
        nf4: None: not quantised; else whether the scales are quantised, too.
        own_base: False where it runs on another role's base.
        trained: it has gradients and moments.
        averaged: a moving average of what is trained is kept.
    """

    name: str
    shape: ModelShape
    precision: Precision = field(default_factory=Precision)
    peft_config: Any = None
    scalar_head: bool = False
    nf4: bool | None = None
    own_base: bool = True
    trained: bool = False
    averaged: bool = False

    @property
    def adapter(self) -> int:
        """Parameters of the adapter and of the head that comes with it."""
        if self.peft_config is None:
            return 0
        return self.shape.adapter_parameters(self.peft_config) + self.shape.hidden * self.scalar_head

    @property
    def trainable(self) -> int:
        if not self.trained:
            return 0
        return self.adapter if self.peft_config is not None else self.shape.parameters

    @property
    def width(self) -> int:
        """Bytes of a trained number."""
        return (self.precision.weights if self.peft_config is None else self.precision.adapters).itemsize

    @property
    def gradients(self) -> int:
        return arithmetic.gradient_bytes(self.trainable, self.width)

    @property
    def head_width(self) -> int:
        """Bytes of a logit as the head computes it."""
        return 2 if self.precision.autocast else self.precision.weights.itemsize

    def base_bytes(self) -> int:
        """The base's weights; with nf4 the linear layers but the LM head are in 4 bits."""
        width, shape = self.precision.weights.itemsize, self.shape
        if self.nf4 is None:
            return arithmetic.weight_bytes(shape.parameters, width)
        plain = arithmetic.weight_bytes(shape.parameters - sum(shape.matrices), width)
        return plain + arithmetic.nf4_bytes(shape.matrices, self.nf4)

    def resident(self) -> list[Item]:
        """Weights, adapter, moments and average."""
        items = [Item(self.name, "weights", self.base_bytes())] if self.own_base else []
        items.append(Item(self.name, "adapters", arithmetic.weight_bytes(self.adapter, self._adapter_width)))
        items.append(Item(self.name, "optimizer", arithmetic.adam_bytes(self.trainable, self.width)))
        if self.averaged:
            items.append(Item(self.name, "average", arithmetic.average_bytes(self.trainable, self.width)))
        return [item for item in items if item.size]

    @property
    def _adapter_width(self) -> int:
        return self.precision.adapters.itemsize

    @property
    def unpacked(self) -> int:
        """One 4-bit matrix unpacked to be multiplied: the largest."""
        return 0 if self.nf4 is None else max(self.shape.matrices) * self.precision.weights.itemsize

    def run(self, rows: int, tokens: int, **how: Any) -> Pass:
        """One traced pass of this model; see `trace_pass`."""
        shape, peft_config = self.shape, self.peft_config
        key = (shape.text, str(peft_config), self.precision, rows, tokens, *sorted(how.items()))
        if key not in _TRACED:
            _TRACED[key] = trace_pass(
                shape.config, rows, tokens, precision=self.precision, peft_config=peft_config, **how
            )
        return _TRACED[key]

    def kv_cache(self, rows: int, tokens: int) -> int:
        """Keys and values of `rows` × `tokens` tokens.

        Under autocast they are bf16 without RoPE alone: rotated keys stay in float32, and transformers keeps the values
        in the dtype of the keys. Adapters sample without autocast; see `generation_phase`.
        """
        shape, precision = self.shape, self.precision
        bf16 = precision.autocast and self.peft_config is None and not shape.rotates
        width = 2 if bf16 else precision.weights.itemsize
        return arithmetic.kv_cache_bytes(
            rows, tokens, shape.layers, shape.kv_heads, shape.head_dim, width, shape.windows
        )


def generation_phase(role: RoleModel, rows: int, prompt: int, completion: int) -> Phase:
    """Sampling: after the prompts (their activations) or at the last token (the full cache), whichever is more.

    Adapters sample without autocast: accelerate's sits on the PeftModel's forward, and PEFT's `generate` calls the
    model inside.
    """
    if role.peft_config is not None:
        role = replace(role, precision=replace(role.precision, autocast=False))
    prefill = role.run(rows, prompt)
    sampling = arithmetic.sampling_bytes(rows, role.shape.vocabulary)
    head = _head_copy(role)
    at_prefill = prefill.forward - prefill.copies + role.kv_cache(rows, prompt)
    at_the_end = sampling + role.kv_cache(rows, prompt + completion)
    items = [Item(role.name, "bf16 copies", prefill.copies + head), Item(role.name, "activations", role.unpacked)]
    if at_prefill > at_the_end:
        items += [
            Item(role.name, "activations", prefill.forward - prefill.copies),
            Item(role.name, "KV cache", role.kv_cache(rows, prompt)),
        ]
    else:
        items += [
            Item(role.name, "logits", sampling),
            Item(role.name, "KV cache", role.kv_cache(rows, prompt + completion)),
        ]
    return _phase("generation", items)


def scoring_phase(name: str, role: RoleModel, rows: int, tokens: int, logits: int) -> Phase:
    """One forward without gradient; `logits`: what the head takes on top of the hidden states."""
    run = role.run(rows, tokens)
    at_the_head = run.kept - run.copies + logits
    within = run.forward - run.copies
    items = [Item(role.name, "bf16 copies", run.copies + (_head_copy(role) if logits else 0))]
    if at_the_head > within:
        items += [Item(role.name, "activations", run.kept - run.copies), Item(role.name, "logits", logits)]
    else:
        items += [Item(role.name, "activations", within + role.unpacked)]
    return _phase(name, items)


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
    """Forward and backward: at the end of the forward (activations, logits) or during the backward (gradients).

    Args:
        logits: what the head takes at the end of the forward.
        accumulates: gradients of micro-batches before are there already.
        others: roles whose gradients wait for their step meanwhile.
    """
    run = role.run(rows, tokens, train=True, checkpointing=checkpointing, accumulates=accumulates)
    own = role.gradients
    forward = arithmetic.activation_bytes(run.forward, run.kept, logits, run.copies)
    backward = run.backward - run.gradients
    items = [Item(other.name, "gradients", other.gradients) for other in others]
    if forward + own * accumulates >= backward + own:
        items += [
            Item(role.name, "gradients", own * accumulates),
            Item(role.name, "bf16 copies", run.copies + _head_copy(role)),
            Item(role.name, "activations", forward - logits),
            Item(role.name, "logits", logits),
        ]
    else:
        items += [Item(role.name, "gradients", own), Item(role.name, "activations", backward)]
    return _phase(name, [*items, Item(role.name, "activations", role.unpacked)])


def step_phase(roles: Iterable[RoleModel]) -> Phase:
    """The optimizer step: all gradients; the fused AdamW needs no room of its own."""
    return _phase("optimizer step", [Item(role.name, "gradients", role.gradients) for role in roles])


def _head_copy(role: RoleModel) -> int:
    """The LM head's bf16 copy, under autocast and where it is trained."""
    copied = role.precision.autocast and role.precision.weights == torch.float32 and role.peft_config is None
    return arithmetic.autocast_copy_bytes(role.shape.head) if copied and role.trained else 0


def _phase(name: str, items: list[Item]) -> Phase:
    return Phase(name, tuple(item for item in items if item.size))
