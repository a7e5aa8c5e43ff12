"""PPO on one base on two processes (DDP, gloo, CPU): the same run as on one; it saves and resumes."""

import sys
from pathlib import Path

import conftest
import pytest
import torch
from launch_helpers import leave_process_group, processes
from ppo_helpers import PROMPTS, TEXTS
from ppo_killed import fresh
from ppo_two import assert_same, fixed_answers, result_of, save_result
from role_helpers import save_pieces
from test_ppo_processes import load

from instruct_trl import PPOPtxConfig, PPOPtxTrainer, RoleAdapters

pytestmark = pytest.mark.slow
# name: (rows a process, accumulation, gradient checkpointing, checkpoint resumed from) of two processes
JOBS = {
    "plain": (4, 1, False, None),
    "accumulated": (2, 2, True, None),
    "resumed": (4, 1, False, "plain/checkpoint-3"),
}


def train(root, name, rows, accumulation, checkpointing, resume):
    """3 iterations of 8 episodes, gone over twice, in steps of plain SGD, as in test_ppo_processes.py."""
    args = PPOPtxConfig(
        str(root / name), generation_batch_size=8, per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation, total_episodes=24, max_completion_length=8, ptx_coef=1.0,
        num_iterations=2, ptx_ratio=2, ptx_max_length=32, optim="sgd", learning_rate=1e-1, value_learning_rate=1e-3,
        max_grad_norm=1e9, value_max_grad_norm=1e9, warmup_iterations=0, logging_steps=1, save_strategy="steps",
        save_steps=1, gradient_checkpointing=checkpointing, use_cpu=True, bf16=False, report_to="none",
        disable_tqdm=True,
    )  # fmt: skip
    trainer = PPOPtxTrainer(
        None, None, args, PROMPTS.select(range(8)), rollout_func=fixed_answers, pretraining_dataset=TEXTS,
        role_adapters=RoleAdapters(root / "base", root / "sft", root / "rm"),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=None if resume is None else str(root / resume))
    trainer.save_model()
    return trainer


def parameters(trainer):
    roles = trainer.role_adapters
    return {"policy": roles.policy_adapter, "value": trainer.critic.unwrapped.parameters(), "ema": trainer.ema.shadow}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = save_pieces(tmp_path_factory.mktemp("two"), fresh(conftest.tokenizer))
    processes(2, __file__, root)
    return root


@pytest.fixture(scope="module")
def alone(root):
    """The same as one process with all 8 rows at once."""
    trainer = train(root, "alone", 8, 1, False, None)
    return result_of(trainer, parameters(trainer))


def test_two_processes_equal_one(root, alone):
    assert_same(load(root, "plain"), alone)


def test_two_processes_that_accumulate_under_checkpointing_equal_one(root, alone):
    assert_same(load(root, "accumulated"), alone, skip=("value_loss", "value_clip_fraction"))


def test_the_run_moves(alone):
    kl = [row["kl"] for row in alone["metrics"] if "kl" in row]
    assert abs(kl[0]) < 1e-6 < abs(kl[-1])
    assert alone["metrics"][0]["value_loss"] != alone["metrics"][-1]["value_loss"]


def test_two_processes_resume_where_they_were(root):
    whole, again = load(root, "plain"), load(root, "resumed")
    assert [row["step"] for row in again["metrics"]] == [row["step"] for row in whole["metrics"]]
    assert len(whole["metrics"]) > 3
    assert_same(again, whole)


def test_two_processes_save_each_role_in_its_folder(root):
    again = RoleAdapters(root / "base", root / "plain" / "policy", root / "plain" / "value")
    saved = torch.cat([p.detach().flatten() for p in again.policy_adapter])
    torch.testing.assert_close(saved, load(root, "plain")["weights"]["policy"])
    saved = torch.cat([p.detach().flatten() for p in again.value.parameters()])
    torch.testing.assert_close(saved, load(root, "plain")["weights"]["value"])
    assert (root / "plain" / "ema" / "adapter_config.json").exists()


def main(root):
    torch.set_num_threads(1)
    for name, job in JOBS.items():
        trainer = train(root, name, *job)
        save_result(trainer, parameters(trainer), root / f"{name}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave_process_group()
