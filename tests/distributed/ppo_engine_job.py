"""The runs of test_ppo_engines.py: started by `accelerate launch` on two processes, or by the test alone.

usage: ppo_engine_job.py FOLDER fresh|resumed
"""

import sys
from pathlib import Path

import conftest
import torch
from ppo_two import build, metrics_of
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForSequenceClassification

from instruct_trl.models.value import ValueModel

# name: (settings, rows a process, accumulation); of two processes
SGD = {}
ADAM = {"optim": "adamw_torch", "learning_rate": 1e-3, "max_grad_norm": 0.5, "value_max_grad_norm": 0.3}
JOBS = {"full": (SGD, 2, 2), "clipped": (ADAM, 4, 1)}
SAMPLED = {**ADAM, "rollout_func": None, "num_iterations": 1}  # two steps an iteration


def larger_value_model():
    """Wider and deeper than the policy."""
    torch.manual_seed(2)
    config = conftest.tiny_config(num_labels=1, hidden_size=32, intermediate_size=48, num_hidden_layers=3)
    return ValueModel(LlamaForSequenceClassification(config))


def train(folder, settings, rows, accumulation, resume=None):
    trainer = build(
        folder, make_value_model=larger_value_model, per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation, **settings,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    return trainer


def saved_weights(folder):
    """The weights of `policy/`, `value/` and `ema/`, as plain transformers reads them."""
    classes = {
        "policy": AutoModelForCausalLM,
        "value": AutoModelForSequenceClassification,
        "ema": AutoModelForCausalLM,
    }
    return {
        role: torch.cat([p.detach().flatten() for p in cls.from_pretrained(folder / role).parameters()])
        for role, cls in classes.items()
    }


def sharding_of(model):
    """Elements of the trainable parameters that this process holds, and their number in all."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    whole = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
    held = sum(
        (p.ds_tensor if hasattr(p, "ds_tensor") else p.to_local() if hasattr(p, "to_local") else p).numel()
        for p in parameters
    )
    return held, whole


def optimizer_elements(optimizer):
    """Elements of Adam's first moments that this process holds."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    moments = [state["exp_avg"] for state in optimizer.state.values() if "exp_avg" in state]
    return sum((m.to_local() if hasattr(m, "to_local") else m).numel() for m in moments)


def result_of(trainer):
    accelerator = trainer.accelerator
    return {
        "metrics": metrics_of(trainer),
        "processes": accelerator.num_processes,
        "distributed_type": accelerator.distributed_type.value,
        "policy": (*sharding_of(trainer.model), optimizer_elements(trainer.optimizer)),
        "value": (*sharding_of(trainer.critic.unwrapped), optimizer_elements(trainer.critic.optimizer)),
        "policy_class": type(next(trainer.model.parameters())).__name__,
        "value_class": type(next(trainer.critic.unwrapped.parameters())).__name__,
    }


def main(root, which):
    torch.set_num_threads(1)
    if which == "fresh":
        runs = {name: (*job, None) for name, job in JOBS.items()} | {"sampled": (SAMPLED, 2, 1, None)}
    else:
        runs = {
            "clipped_resumed": (*JOBS["clipped"], "clipped/checkpoint-2"),
            "sampled_resumed": (SAMPLED, 2, 1, "sampled/checkpoint-3"),  # inside the second iteration
        }
    for name, (settings, rows, accumulation, resume) in runs.items():
        trainer = train(root / name, settings, rows, accumulation, None if resume is None else str(root / resume))
        result = result_of(trainer)
        if trainer.args.process_index == 0:
            torch.save(result, root / f"{name}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
