"""PPOPtxTrainer is safe to leave running: killed at any moment, it goes on as if nothing had happened.

PPO_KILLS sets the number of kills at random moments (20).
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launch_helpers import with_helpers
from ppo_killed import STEPS, step_metrics
from safetensors.torch import load_file

from instruct_trl.pipeline.stage import last_complete_checkpoint

KILLS = int(os.environ.get("PPO_KILLS", "20"))
STATES = (
    "optimizer.pt",
    "scheduler.pt",
    "value_optimizer.pt",
    "value_scheduler.pt",
    "ema.pt",
    "rollout_0.pt",
    "rng_state.pth",
)
WEIGHTS = ("model.safetensors", "value/model.safetensors")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked from a server: POSIX"),
]


class Server:
    """Talks to ppo_killed.py."""

    def __init__(self, folder):
        self.log = folder / "server.log"
        script = [sys.executable, str(Path(__file__).parents[1] / "ppo_killed.py")]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                script,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                bufsize=1,
                env=with_helpers(os.environ),
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.requests, self.replies = self.process.stdin, self.process.stdout
        assert self.replies.readline() == "ready\n", self.log.read_text()

    def run(self, folder, **kwargs):
        self.requests.write(json.dumps({"folder": str(folder), **kwargs}, default=str) + "\n")
        reply = json.loads(self.replies.readline())
        log = Path(f"{folder}.log")
        assert reply["exit"] in (0, -signal.SIGKILL), log.read_text() if log.exists() else reply
        return reply

    def close(self):
        self.requests.close()
        self.process.wait()
        self.replies.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """The uninterrupted run: its folder, and the seconds it took."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    reply = server.run(folder)
    assert reply["exit"] == 0
    return folder, reply["seconds"]


@pytest.fixture
def copied(whole, tmp_path):
    """A copy of the uninterrupted run's last two checkpoints, as if nothing had come after them."""
    for step in (STEPS - 1, STEPS):
        shutil.copytree(whole[0] / f"checkpoint-{step}", tmp_path / "run" / f"checkpoint-{step}")
    return tmp_path / "run"


def step_of(checkpoint):
    return int(str(checkpoint).rsplit("-", 1)[1])


def leaves(value):
    """What is in nested dicts, lists and tuples, in order."""
    if isinstance(value, dict):
        value = [item for pair in value.items() for item in pair]
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


def assert_same_run(one, two):
    """Metrics of each step, weights, and everything in the last checkpoint, to float tolerance."""
    logs = [json.loads((folder / "trainer_state.json").read_text()) for folder in (one, two)]
    assert [log["global_step"] for log in logs] == [STEPS, STEPS]
    rows, others = (step_metrics(log["log_history"]) for log in logs)
    assert len(rows) == len(others) == STEPS
    for row, other in zip(rows, others, strict=True):
        assert other == pytest.approx(row, abs=1e-5), row["step"]
    for role in ("policy", "value", "ema"):
        first, second = (load_file(folder / role / "model.safetensors") for folder in (one, two))
        torch.testing.assert_close(second, first, atol=1e-6, rtol=1e-5)
    for name in STATES:
        paths = [folder / f"checkpoint-{STEPS}" / name for folder in (one, two)]
        first, second = (leaves(torch.load(path, weights_only=False)) for path in paths)
        for mine, other in zip(first, second, strict=True):
            if isinstance(mine, (torch.Tensor, float)):
                torch.testing.assert_close(other, mine, atol=1e-5, rtol=1e-5)
            else:
                assert str(other) == str(mine), name  # numbers, names, numpy's RNG


def newest(folder):
    return max(folder.glob("checkpoint-*"), key=step_of, default=None)


def a_random_moment(draw, folder, seconds):
    return {"after": draw.uniform(0, seconds)}


def a_checkpoint_being_written(draw, folder, seconds):
    """The moment a coming checkpoint's folder appears, or one of its files; a random one if none is to come."""
    begun = newest(folder)
    first = 1 if begun is None else step_of(begun) + 1
    if first > STEPS:
        return a_random_moment(draw, folder, seconds)
    checkpoint = folder / f"checkpoint-{draw.randint(first, min(first + 2, STEPS))}"
    names = ["", *WEIGHTS, *STATES, "trainer_state.json"]
    return {"appears": checkpoint / ("" if begun is None else draw.choice(names))}


def run_with_kills(server, folder, choose, kills):
    """Start, kill and start again until the run has finished; returns (kills, those that tore a checkpoint)."""
    hits = torn = 0
    while True:
        moment = choose(folder) if hits < kills else {}
        if server.run(folder, resume=last_complete_checkpoint(folder), **moment)["exit"] == 0:
            return hits, torn
        hits += 1
        begun = newest(folder)
        torn += begun is not None and str(begun) != last_complete_checkpoint(folder)


PARTS = [(a_random_moment, part, -(-KILLS // 4)) for part in range(4)]
PARTS += [(a_checkpoint_being_written, part, -(-KILLS // 7)) for part in range(2)]


@pytest.mark.parametrize(("choose", "seed", "kills"), PARTS)
def test_a_killed_run_walks_the_path_of_an_uninterrupted_one(server, whole, tmp_path, choose, seed, kills):
    draw, (expected, seconds) = random.Random(seed), whole
    hits = torn = runs = 0
    while hits < kills:
        folder = tmp_path / f"run-{runs}"
        counts = run_with_kills(server, folder, lambda f: choose(draw, f, seconds), kills - hits)
        hits, torn, runs = hits + counts[0], torn + counts[1], runs + 1
        assert_same_run(expected, folder)
        shutil.rmtree(folder)
    print(f"{hits} kills in {runs} runs of {seconds:.1f} s, {torn} of them tore a checkpoint")
    assert torn or choose is a_random_moment


def cut(path):
    """Keep the first half."""
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("tear", "names"),
    [
        (Path.unlink, ["trainer_state.json"]),
        (Path.unlink, ["trainer_state.json", "rng_state.pth", "rollout_0.pt"]),
        (cut, ["trainer_state.json"]),
        *[(tear, [name]) for tear in (cut, Path.unlink) for name in (*WEIGHTS, *STATES)],
    ],
)
def test_a_torn_checkpoint_is_never_picked_up(copied, tear, names):
    assert last_complete_checkpoint(copied) == str(copied / f"checkpoint-{STEPS}")
    for name in names:
        tear(copied / f"checkpoint-{STEPS}" / name)
    assert last_complete_checkpoint(copied) == str(copied / f"checkpoint-{STEPS - 1}")


def test_the_trainer_itself_passes_over_a_torn_checkpoint(server, whole, copied):
    (copied / f"checkpoint-{STEPS}" / "trainer_state.json").unlink()
    server.run(copied, resume=True)
    assert_same_run(whole[0], copied)


def test_a_checkpoint_written_anew_is_not_complete_before_it_is_finished(server, copied):
    """A user goes back to an older checkpoint in the same folder."""
    again = copied / f"checkpoint-{STEPS}"
    reply = server.run(copied, resume=copied / f"checkpoint-{STEPS - 1}", changes=again / "model.safetensors")
    assert reply["exit"] == -signal.SIGKILL
    assert last_complete_checkpoint(copied) == str(copied / f"checkpoint-{STEPS - 1}")


def test_a_run_killed_after_its_last_checkpoint_takes_no_further_step(server, tmp_path):
    """16 prompts are an epoch of 4 steps: the run of 6 ends inside its second."""
    folder = tmp_path / "run"
    assert server.run(folder, prompts=16, appears=folder / "policy")["exit"] == -signal.SIGKILL
    checkpoint = last_complete_checkpoint(folder)
    assert step_of(checkpoint) == STEPS
    assert server.run(folder, prompts=16, resume=checkpoint)["exit"] == 0
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == STEPS
