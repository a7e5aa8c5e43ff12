"""Where DDP, FSDP2 and DeepSpeed differ: preparing a second model, taking a step or leaving it out, saving.

A model lies whole on every process under DDP and ZeRO-2, and in shards under ZeRO-3 and FSDP2.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.checkpoint import state_dict as whole

from instruct_trl._upstream import (
    DeepSpeedSteps,
    apart_from_policy,
    prepare_deepspeed_model,
    reshard,
    writable_shards,
)
from instruct_trl.models.value import ValueModel


class ModelEngine:
    """A model with its own optimizer beside the trainer's, under accelerate: one process, DDP or FSDP2.

    Args:
        accelerator: the trainer's.
        model, optimizer: to be prepared; `optimizer` holds `model`'s trainable parameters.
        max_norm: its gradients are clipped to this norm; None or 0 for no clip.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: Any, max_norm: float | None):
        self.accelerator, self.max_norm = accelerator, max_norm or float("inf")
        if not is_sharding(accelerator):
            model = model.to(accelerator.device)
        with apart_from_policy(accelerator):
            self.model, self.optimizer = accelerator.prepare(model, optimizer)

    def accumulating(self) -> AbstractContextManager:
        """While active, gradients are not summed over processes yet."""
        return self.accelerator.no_sync(self.model)

    def backward(self, loss: torch.Tensor, sync: bool) -> None:
        """Accumulate the gradient of `loss`; `sync` is True on the last micro-batch."""
        self.accelerator.backward(loss)

    def clip_gradients(self) -> float:
        """Clip the accumulated gradients; returns their norm before."""
        return float(self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_norm))

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def skip_step(self) -> None:
        """Forget the gradients: weights and moments stay as they are."""
        self.optimizer.zero_grad()

    def save(self, stem: str, is_main: bool) -> None:
        """Write what the optimizer knows to `stem`.pt; called by every process."""
        if is_main:
            torch.save(self.optimizer.state_dict(), f"{stem}.pt")

    def load(self, stem: str, folder: str) -> None:
        """Take up the weights in `folder`, as the model's own `save_pretrained` wrote them, and what `save` wrote."""
        self.accelerator.unwrap_model(self.model).load_pretrained(folder)
        self.optimizer.load_state_dict(torch.load(f"{stem}.pt", map_location="cpu", weights_only=True))


class FSDPModelEngine(ModelEngine):
    """The same under FSDP2: what is written is whole."""

    def clip_gradients(self) -> float:
        self.accelerator.unscale_gradients(self.optimizer)
        norm: Any = nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        return float(norm.full_tensor())

    def save(self, stem: str, is_main: bool) -> None:
        options = whole.StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = whole.get_optimizer_state_dict(self.model, self.optimizer.optimizer, options=options)
        if is_main:
            torch.save(state, f"{stem}.pt")

    def load(self, stem: str, folder: str) -> None:
        options = whole.StateDictOptions(full_state_dict=True)
        whole.set_model_state_dict(self.model, ValueModel.from_pretrained(folder).state_dict(), options=options)
        state = torch.load(f"{stem}.pt", map_location="cpu", weights_only=True)
        whole.set_optimizer_state_dict(self.model, self.optimizer.optimizer, state, options=options)


class DeepSpeedModelEngine(ModelEngine):
    """The same as a DeepSpeed engine of its own, with the trainer's DeepSpeed configuration but for the clip."""

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: Any, max_norm: float | None, args: Any):
        self.model, self.optimizer = prepare_deepspeed_model(accelerator, model, optimizer, max_norm, args)
        self.steps = DeepSpeedSteps(self.model)

    def accumulating(self) -> AbstractContextManager:
        return nullcontext()

    def backward(self, loss: torch.Tensor, sync: bool) -> None:
        self.steps.backward(loss, sync_gradients=sync, scale_wrt_gas=False)

    def clip_gradients(self) -> float:
        return self.steps.get_global_grad_norm()  # the engine's own step clips

    def step(self) -> None:
        self.steps.step()
        self.optimizer.step()  # does nothing; schedules count its calls

    def skip_step(self) -> None:
        self.steps.skip_step()

    def save(self, stem: str, is_main: bool) -> None:
        """Weights and optimizer, each process its shards, to the folder `stem`."""
        self.model.save_checkpoint(stem)

    def load(self, stem: str, folder: str) -> None:
        path, _ = self.model.load_checkpoint(stem)
        if path is None:
            raise ValueError(f"DeepSpeed finds no checkpoint in {stem}. Resume from another checkpoint.")


def check_engine(accelerator: Accelerator) -> None:
    """Refuse launcher settings under which PPO-ptx would not be what it says."""
    fsdp, deepspeed = getattr(accelerator.state, "fsdp_plugin", None), accelerator.state.deepspeed_plugin
    if fsdp is not None and fsdp.fsdp_version != 2:
        raise ValueError(f"fsdp_version {fsdp.fsdp_version} is not supported. Set fsdp_version: 2.")
    if fsdp is not None and fsdp.cpu_ram_efficient_loading:
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading leaves the weights of all but the first process empty, and so the copies "
            "made of them for the reference and the value model. Set it to false."
        )
    if fsdp is not None and "FULL_STATE_DICT" not in str(fsdp.state_dict_type):
        raise ValueError(
            f"Under fsdp_state_dict_type {fsdp.state_dict_type} upstream writes no policy that transformers could "
            "read, and says nothing. Set it to FULL_STATE_DICT."
        )
    if deepspeed is not None and deepspeed.zero_stage < 1:
        raise ValueError("DeepSpeed with zero_stage 0 is not supported. Set zero_stage to 2 or 3, or launch DDP.")
    if deepspeed is not None and deepspeed.zero_stage == 3 and not deepspeed.zero3_save_16bit_model:
        raise ValueError(
            "ZeRO-3 without zero3_save_16bit_model cannot put the weights together at the first checkpoint. Set it to "
            "true (in a DeepSpeed JSON: stage3_gather_16bit_weights_on_model_save)."
        )


def prepare_beside_policy(
    accelerator: Accelerator, model: nn.Module, optimizer: Any, max_norm: float | None, args: Any
) -> ModelEngine:
    """`model` and `optimizer` under whatever the trainer was launched with; `args` are the training arguments."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return DeepSpeedModelEngine(accelerator, model, optimizer, max_norm, args)
    engine = FSDPModelEngine if accelerator.is_fsdp2 else ModelEngine
    return engine(accelerator, model, optimizer, max_norm)


def is_sharding(accelerator: Accelerator) -> bool:
    """True where a model is placed, and perhaps sharded, by its engine: FSDP and DeepSpeed."""
    return accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)


def take_over_steps(accelerator: Accelerator) -> None:
    """Under DeepSpeed, make `accelerator.backward` leave the policy's step to `finish_policy_step`.

    Accelerate's backward steps the engine, too early for whatever looks at the gradients first.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.deepspeed_engine_wrapped = DeepSpeedSteps(accelerator.deepspeed_engine_wrapped.engine)


def finish_policy_step(accelerator: Accelerator, model: nn.Module, taken: bool) -> None:
    """Under DeepSpeed, step the policy if the step is taken (elsewhere Trainer does, a moment later).

    Else forget the gradients. Optimizers pass over a parameter without one: no moment, no decay.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        engine = accelerator.deepspeed_engine_wrapped
        (engine.step if taken else engine.skip_step)()
    elif not taken:
        model.zero_grad()


@contextmanager
def before_last_backward(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """While active, no backward is the minibatch's last: one of PPO's follows."""
    if not is_sharding(accelerator):
        with accelerator.no_sync(model):
            yield
        return
    # DeepSpeed and FSDP2 communicate in each backward all the same: an unsharded gradient is what they are there to
    # avoid. Under DeepSpeed this sets no gradient accumulation boundary.
    state, sync = accelerator.gradient_state, accelerator.sync_gradients
    state._set_sync_gradients(False)
    try:
        yield
    finally:
        state._set_sync_gradients(sync)


def local_shards(model: nn.Module) -> list[torch.Tensor]:
    """This process's part of every trainable parameter: all of it, or its shard. Not to be written to."""
    reshard(model)
    return [_shard(parameter) for parameter in model.parameters() if parameter.requires_grad]


@contextmanager
def local_shards_to_write(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """The same, to be written to; on leaving, whole copies that the engine keeps are made anew."""
    with writable_shards([parameter for parameter in model.parameters() if parameter.requires_grad]):
        yield local_shards(model)


def _shard(parameter: Any) -> torch.Tensor:
    if hasattr(parameter, "ds_tensor"):  # ZeRO-3
        return parameter.ds_tensor.data
    if hasattr(parameter, "to_local"):  # DTensor, FSDP2
        return parameter.detach().to_local()
    return parameter.detach()
