"""PPO runs that several processes repeat: the same answers for the same prompt, and what is compared afterwards."""

import random

import conftest
import pytest
import torch
from ppo_helpers import PROMPTS, TEXTS
from ppo_killed import fresh, step_metrics

from instruct_trl import PPOPtxConfig, PPOPtxTrainer, RewardScorer


def fixed_answers(prompts, trainer):
    """1 to 8 tokens that depend on the prompt alone; those below 8 end with EOS."""
    answers = []
    for prompt in prompts:
        draw = random.Random(prompt)
        length = draw.randint(1, 8)
        ids = [draw.randrange(256) for _ in range(length)]
        answers.append(ids if length == 8 else [*ids[:-1], 256])
    return {"prompt_ids": trainer._tokenizer(prompts)["input_ids"], "completion_ids": answers, "logprobs": None}


def build(
    folder, *, peft_config=None, make_policy=None, make_value_model=None, rollout_func=fixed_answers,
    eval_prompts=None, **kwargs,
):  # fmt: skip
    """3 iterations of 8 episodes; steps of plain SGD, so that a gradient k times too large shows in the weights.

    Fixed answers are gone over twice, since the loss of the first pass is 0: ratio 1 and white advantages.
    """
    settings = {
        "generation_batch_size": 8, "total_episodes": 24, "max_completion_length": 8, "ptx_coef": 1.0,
        "num_iterations": 2, "ptx_ratio": 2, "ptx_max_length": 32, "optim": "sgd", "learning_rate": 1e-2,
        "value_learning_rate": 1e-2, "max_grad_norm": 1e9, "value_max_grad_norm": 1e9, "warmup_iterations": 0,
        "logging_steps": 1, "save_strategy": "steps", "save_steps": 1, "gradient_checkpointing": False,
        "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    args = PPOPtxConfig(str(folder), **{**settings, **kwargs})  # before any model: see load_models_whole
    tokenizer = fresh(conftest.tokenizer)
    policy = make_policy() if make_policy else fresh(conftest.policy)
    return PPOPtxTrainer(
        policy, RewardScorer(fresh(conftest.reward_model), tokenizer), args, PROMPTS.select(range(8)),
        eval_prompts, processing_class=tokenizer, peft_config=peft_config, rollout_func=rollout_func,
        value_model=None if make_value_model is None else make_value_model(), pretraining_dataset=TEXTS,
    )  # fmt: skip


def assert_same(found, expected, skip=()):
    """Equal metrics of each step and equal weights, to float32."""
    assert len(found["metrics"]) == len(expected["metrics"])
    for row, other in zip(expected["metrics"], found["metrics"], strict=True):
        row, other = ({k: v for k, v in r.items() if k not in skip} for r in (row, other))
        assert other == pytest.approx(row, abs=1e-5, rel=1e-4), row["step"]
    torch.testing.assert_close(found["weights"], expected["weights"], atol=1e-6, rtol=1e-5)


def metrics_of(trainer):
    return step_metrics(trainer.state.log_history)


def result_of(trainer, parameters):
    """Metrics of each step, weights, and by how much the weights of the processes differ at most.

    Args:
        parameters: by role, the parameters that train.
    """
    weights = {role: torch.cat([p.detach().flatten() for p in part]) for role, part in parameters.items()}
    everyone = {role: trainer.accelerator.gather(w.unsqueeze(0)) for role, w in weights.items()}
    return {
        "metrics": metrics_of(trainer),
        "weights": weights,
        "spread": max((w - w[:1]).abs().max().item() for w in everyone.values()),
        "processes": trainer.accelerator.num_processes,
        "distributed_type": str(trainer.accelerator.distributed_type.value),
    }


def save_result(trainer, parameters, path):
    """`result_of` in one file, by every process together."""
    result = result_of(trainer, parameters)
    if trainer.args.process_index == 0:
        torch.save(result, path)
    trainer.accelerator.wait_for_everyone()
