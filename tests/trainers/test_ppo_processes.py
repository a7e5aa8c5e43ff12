"""PPOPtxTrainer on two processes (DDP, gloo, CPU): the same run as on one; it saves and resumes."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from launch_helpers import leave_process_group, processes
from peft import LoraConfig
from ppo_two import assert_same, build, fixed_answers, result_of, save_result

pytestmark = pytest.mark.slow
# name: (full fine-tuning, rows a process, accumulation, answers drawn, checkpoint resumed from) of two processes
JOBS = {
    "full": (True, 4, 1, False, None),
    "accumulated": (True, 2, 2, False, None),
    "lora": (False, 4, 1, False, None),
    "sampled": (True, 2, 1, True, None),  # two steps an iteration
    "sampled_resumed": (True, 2, 1, True, "sampled/checkpoint-3"),  # inside the second iteration
    "lora_resumed": (False, 4, 1, False, "lora/checkpoint-2"),
}


def train(root, name, full, rows, accumulation, sampled, resume):
    """The run of `ppo_two.build`; LoRA's steps are larger, since its B starts at 0."""
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=4)
    trainer = build(
        root / name, per_device_train_batch_size=rows, gradient_accumulation_steps=accumulation,
        num_iterations=1 if sampled else 2, learning_rate=1e-2 if full else 1.0,
        peft_config=None if full else lora, rollout_func=None if sampled else fixed_answers,
    )  # fmt: skip
    if name == "sampled" and trainer.args.process_index == 1:
        come_late(trainer, root)
    trainer.train(resume_from_checkpoint=None if resume is None else str(root / resume))
    trainer.save_model()
    return trainer


def come_late(trainer, root):
    """Make this process write its last file of checkpoint 1 late, and note whether the checkpoint looked complete."""
    write = trainer._save_rng_state

    def late(output_dir):
        complete = Path(output_dir) / "trainer_state.json"
        if trainer.state.global_step == 1:
            for _ in range(200):
                if complete.exists():
                    break
                time.sleep(0.01)
            (root / "early.json").write_text(json.dumps(complete.exists()))
        write(output_dir)

    trainer._save_rng_state = late


def parameters(trainer):
    return {
        "policy": [p for p in trainer.model.parameters() if p.requires_grad],
        "value": trainer.critic.unwrapped.parameters(),
        "ema": trainer.ema.shadow,
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Where the results of all jobs on two processes lie, in `<job>.pt`."""
    root = tmp_path_factory.mktemp("two")
    processes(2, __file__, root)
    return root


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same as one process with all 8 rows at once: full fine-tuning and LoRA."""
    root = tmp_path_factory.mktemp("one")
    trainers = {full: train(root, "run", full, 8, 1, False, None) for full in (True, False)}
    return {full: result_of(trainer, parameters(trainer)) for full, trainer in trainers.items()}


def load(root, name):
    found = torch.load(root / f"{name}.pt")
    assert (found["processes"], found["distributed_type"]) == (2, "MULTI_CPU")
    assert found["spread"] == 0
    return found


@pytest.mark.parametrize(("name", "full"), [("full", True), ("lora", False)])
def test_two_processes_equal_one(root, alone, name, full):
    """8 episodes a step as 1 × 8 and as 2 × 4; one step an iteration, since each process deals out its own rows."""
    assert_same(load(root, name), alone[full])


def test_two_processes_that_accumulate_equal_one(root, alone):
    """2 processes × 2 rows × 2: gradients are held back until the last micro-batch."""
    assert_same(load(root, "accumulated"), alone[True], skip=("value_loss", "value_clip_fraction"))


def test_the_logged_value_loss_does_not_depend_on_accumulation(root, alone):
    expected = [row["value_loss"] for row in alone[True]["metrics"]]
    assert [row["value_loss"] for row in load(root, "accumulated")["metrics"]] == pytest.approx(expected, rel=1e-4)


def test_the_runs_move(alone):
    """What is compared above is not the starting point."""
    for full, result in alone.items():
        kl = [row["kl"] for row in result["metrics"] if "kl" in row]  # of each rollout
        assert abs(kl[0]) < 1e-6 < abs(kl[-1]), full
        first, last = result["metrics"][0], result["metrics"][-1]
        assert abs(last["loss"]) > 1e-5, full
        assert first["policy_loss"] != last["policy_loss"], full
        assert first["value_loss"] != last["value_loss"], full


@pytest.mark.parametrize(("name", "step"), [("sampled", 3), ("lora", 2)])
def test_two_processes_resume_where_they_were(root, name, step):
    """`sampled` draws its answers and is resumed inside an iteration: RNG and rollout of each process come back."""
    whole, again = load(root, name), load(root, f"{name}_resumed")
    assert [row["step"] for row in again["metrics"]] == [row["step"] for row in whole["metrics"]]
    assert len(whole["metrics"]) > step
    assert_same(again, whole)


def test_two_processes_save_what_plain_transformers_reads(root):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    expected = torch.load(root / "sampled.pt")["weights"]
    for role in ("policy", "ema"):
        model = AutoModelForCausalLM.from_pretrained(root / "sampled" / role)
        torch.testing.assert_close(torch.cat([p.detach().flatten() for p in model.parameters()]), expected[role])
    AutoModelForSequenceClassification.from_pretrained(root / "sampled" / "value")
    assert (root / "lora" / "policy" / "adapter_config.json").exists()


def test_one_process_does_not_resume_what_two_wrote(root, tmp_path):
    with pytest.raises(ValueError, match="was written by 2 processes, these are 1"):
        train(tmp_path, "alone", True, 8, 1, False, root / "full" / "checkpoint-2")


def test_a_checkpoint_is_complete_once_every_process_has_written(root):
    assert json.loads((root / "early.json").read_text()) is False


def main(root):
    torch.set_num_threads(1)
    for name, job in JOBS.items():
        trainer = train(root, name, *job)
        save_result(trainer, parameters(trainer), root / f"{name}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave_process_group()
