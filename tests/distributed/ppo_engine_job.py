"""The runs of test_ppo_engines.py: started by `accelerate launch` on two processes, or by the test alone.

usage: ppo_engine_job.py FOLDER NAME [NAME ...]
"""

import importlib
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import conftest
import torch
from launch_helpers import leave_process_group
from peft import LoraConfig
from ppo_helpers import PROMPTS
from ppo_killed import fresh
from ppo_two import build, metrics_of
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForSequenceClassification

from instruct_trl.models.value import ValueModel
from instruct_trl.trainers.divergence import Verdict

# A fifth of the critic's gradients are below 1e-7. With Adam's usual epsilon their rounding moves those weights: 1 × 8
# and 2 × 4 rows on one process then differ by 6e-6 in one place.
ADAM = {
    "optim": "adamw_torch", "learning_rate": 1e-3, "max_grad_norm": 0.5, "value_max_grad_norm": 0.3,
    "adam_epsilon": 1e-5,
}  # fmt: skip
LORA = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=4)
# Runs that one process repeats with all rows at once. name: (settings, rows a process, accumulation); of two processes
SHORT = {"total_episodes": 16, "save_strategy": "no"}  # 4 steps
JOBS = {
    "full": ({**SHORT, "gradient_checkpointing": True}, 2, 2),  # plain SGD
    "clipped": ({**ADAM, "save_steps": 2}, 4, 1),
    "skipping": ({**ADAM, **SHORT, "warmup_iterations": 2}, 4, 1),  # leaves out its second step
    "lora": ({**SHORT, "peft_config": LORA, "learning_rate": 1.0}, 4, 1),
}


def policy_that_ends():
    """EOS is likely after some tokens: the processes' longest answers differ, and one waits for the other."""
    policy = fresh(conftest.policy)
    with torch.no_grad():
        policy.lm_head.weight[256] *= 30
    return policy


# Answers are drawn: two steps an iteration, and an evaluation with a win rate after the second.
SAMPLED = {
    **ADAM, "rollout_func": None, "make_policy": policy_that_ends, "old_logps_from_sampler": True, "num_iterations": 1,
    "save_steps": 3, "eval_prompts": PROMPTS.select(range(8, 12)),
    "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2,
}  # fmt: skip

LATER = {
    "sampled": (SAMPLED, 2, 1),
    "clipped_resumed": (*JOBS["clipped"], "clipped/checkpoint-2"),
    "sampled_resumed": (SAMPLED, 2, 1, "sampled/checkpoint-3"),  # inside the second iteration
}


def let_accelerate_shard_on_cpu():
    """Accelerate takes FSDP for accelerators only and makes DDP of it on the CPU, where torch's `fully_shard` runs."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU and fsdp_plugin is not None:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init


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
    if Path(folder).name == "skipping":
        skip_second_step(trainer)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    return trainer


def skip_second_step(trainer):
    """Make the guard object to the second minibatch."""
    guard = SimpleNamespace(steps=0, judge=trainer.divergence.guard.judge_step)

    def judge_step(metrics):
        guard.steps += 1
        return Verdict("skip", "asked for") if guard.steps == 2 else guard.judge(metrics)

    trainer.divergence.guard.judge_step = judge_step


def saved_weights(folder):
    """The weights under `policy/`, `value/` and `ema/`, as plain transformers reads them; of LoRA, the adapter."""
    weights = {}
    for role in ("policy", "value", "ema"):
        if (folder / role / "adapter_config.json").exists():
            tensors = [tensor for _, tensor in sorted(load_file(folder / role / "adapter_model.safetensors").items())]
        else:
            classes = {"value": AutoModelForSequenceClassification}
            tensors = classes.get(role, AutoModelForCausalLM).from_pretrained(folder / role).parameters()
        weights[role] = torch.cat([tensor.detach().flatten() for tensor in tensors])
    return weights


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
        "win_rates": [row["eval_win_rate"] for row in trainer.state.log_history if "eval_win_rate" in row],
        "processes": accelerator.num_processes,
        "distributed_type": accelerator.distributed_type.value,
        "policy": (*sharding_of(trainer.model), optimizer_elements(trainer.optimizer)),
        "value": (*sharding_of(trainer.critic.unwrapped), optimizer_elements(trainer.critic.optimizer)),
        "policy_class": type(next(trainer.model.parameters())).__name__,
        "value_class": type(next(trainer.critic.unwrapped.parameters())).__name__,
    }


def leave_out_deepspeeds_kernel():
    """DeepSpeed compiles a collective for inference before anything else: a minute on a machine that has none.

    A run that is killed meanwhile leaves a lock for which every later one waits.
    """
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # as attribute, it is torch itself


def main(root, names):
    """Run these of `JOBS` and `LATER` in their order, and the recipe."""
    torch.set_num_threads(1)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        let_accelerate_shard_on_cpu()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        leave_out_deepspeeds_kernel()
    for name in names:
        settings, rows, accumulation, *resume = JOBS.get(name) or LATER[name]
        trainer = train(root / name, settings, rows, accumulation, *(str(root / folder) for folder in resume))
        result = result_of(trainer)
        if trainer.args.process_index == 0:
            torch.save(result, root / f"{name}.pt")
    run_recipe(root)


def run_recipe(root):
    """`recipes/ppo_ptx.py` on the tiny models and data under `root`."""
    importlib.import_module("recipes.ppo_ptx").main([
        "--bf16", "false", "--cpu_threads", "1", "--max_steps", "2", "--report_to", "none",
        "--model_name_or_path", str(root / "tiny_policy"), "--reward_model_path", str(root / "tiny_rm"),
        "--dataset_name", str(root / "prompts.jsonl"), "--pretraining_dataset_name", str(root / "texts.jsonl"),
        "--output_dir", str(root / "recipe"), "--generation_batch_size", "4", "--per_device_train_batch_size", "2",
        "--gradient_accumulation_steps", "1", "--max_completion_length", "4", "--labeler", "none",
    ])  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    leave_process_group()
