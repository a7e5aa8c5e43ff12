"""PPOPtxTrainer on two processes under DDP, FSDP2 and DeepSpeed, started from recipes/accelerate/*.yaml on the CPU.

Each engine: the loss curve of one process with all rows; the value model, larger than the policy, in shards where the
policy is; checkpoints that continue, and saved models that plain transformers reads.
"""

import os
from pathlib import Path

import conftest
import pytest
import torch
from launch_helpers import python
from ppo_engine_job import ADAM, JOBS, LATER, saved_weights, train
from ppo_helpers import PROMPTS, TEXTS
from ppo_killed import fresh
from ppo_two import metrics_of

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
JOB = Path(__file__).with_name("ppo_engine_job.py")
# engine: (distributed_type, options of the launcher, are weights in shards, are optimizer states)
ENGINES = {
    "ddp": ("MULTI_CPU", [], False, False),
    "fsdp2": ("FSDP", [], True, True),
    "deepspeed_zero2": ("DEEPSPEED", [], False, True),
    "deepspeed_zero3": ("DEEPSPEED", ["--zero3_init_flag", "true"], True, True),  # as TRL's own zero3.yaml has it
}
# DDP runs the others in trainers/test_ppo_processes.py.
RUNS = {engine: [*JOBS, *LATER] for engine in ENGINES} | {"ddp": ["clipped", "skipping", "clipped_resumed"]}
SHARDED = [engine for engine in ENGINES if engine != "ddp"]


def launch(engine, root):
    """Run the engine's jobs on two processes in one launch; results lie in `root`."""
    if "deepspeed" in engine:
        pytest.importorskip("deepspeed", reason="pip install instruct-trl[deepspeed]")
    config = ROOT / "recipes" / "accelerate" / f"{engine}.yaml"
    # Port 0 is a free one: with the default, 29500, two runs on one machine get into each other's way.
    options = ["--config_file", config, "--num_processes", "2", "--main_process_port", "0", *ENGINES[engine][1]]
    paths = [str(ROOT), str(ROOT / "tests"), str(JOB.parent), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    python("-m", "accelerate.commands.launch", *options, JOB, root, *RUNS[engine], env=env, cwd=ROOT)
    return root


def write_tiny_assets(root):
    """What the recipe reads: policy, reward model, prompts, texts."""
    models = {"tiny_policy": fresh(conftest.policy), "tiny_rm": fresh(conftest.reward_model)}
    for name, model in models.items():
        model.save_pretrained(root / name)
        fresh(conftest.tokenizer).save_pretrained(root / name)
    PROMPTS.to_json(root / "prompts.jsonl")
    TEXTS.to_json(root / "texts.jsonl")


@pytest.fixture(scope="module")
def run(request, tmp_path_factory):
    """(engine, folder of its results)."""
    root = tmp_path_factory.mktemp(request.param)
    write_tiny_assets(root)
    return request.param, launch(request.param, root)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Each job as one process with all 8 rows at once: metrics, and the weights that it saves."""
    root = tmp_path_factory.mktemp("one")
    results = {}
    for name, (settings, _, _) in JOBS.items():
        trainer = train(root / name, settings, 8, 1)
        results[name] = {"metrics": metrics_of(trainer), "weights": saved_weights(root / name)}
    return results


def load(run, name):
    engine, root = run
    found = torch.load(root / f"{name}.pt")
    assert (found["processes"], found["distributed_type"]) == (2, ENGINES[engine][0])
    return found


def assert_same_metrics(found, expected, skip=(), rel=1e-3):
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for row, other in zip(expected, found, strict=True):
        row, other = ({k: v for k, v in r.items() if k not in skip} for r in (row, other))
        assert other == pytest.approx(row, abs=1e-5, rel=rel), row["step"]


def engines(names=ENGINES):
    return pytest.mark.parametrize("run", names, indirect=True, scope="module")


@pytest.mark.parametrize(
    ("run", "name"),
    [(engine, name) for engine, names in RUNS.items() for name in names if name in JOBS],
    indirect=["run"],
    scope="module",
)
def test_two_processes_equal_one(run, alone, name):
    """8 episodes a step as 1 × 8 and as 2 × 4 (`full`: 2 × 2 × 2): metrics of every step and the final weights."""
    assert_same_metrics(load(run, name)["metrics"], alone[name]["metrics"])
    found = saved_weights(run[1] / name)
    for role, expected in alone[name]["weights"].items():
        torch.testing.assert_close(found[role], expected, atol=2e-6, rtol=1e-4, msg=lambda m, r=role: f"{r}: {m}")


def test_the_runs_move_and_the_clip_bites(alone):
    """What is compared above is not the starting point, and not what an unclipped run gives."""
    for name, result in alone.items():
        first, last = result["metrics"][0], result["metrics"][-1]
        assert first["policy_loss"] != last["policy_loss"], name
        assert first["value_loss"] != last["value_loss"], name
    clipped = alone["clipped"]["metrics"]
    assert min(row["grad_norm"] for row in clipped) > ADAM["max_grad_norm"]
    assert max(row["value_grad_norm"] for row in clipped) > ADAM["value_max_grad_norm"]


@engines()
def test_policy_and_value_model_are_sharded(run):
    """Each of two processes holds half, up to padding, of weights and Adam's moments, where the engine shards them."""
    _, _, weights_in_shards, states_in_shards = ENGINES[run[0]]
    found = load(run, "clipped")
    for role in ("policy", "value"):
        held, whole, moments = found[role]
        assert held == pytest.approx(whole / 2 if weights_in_shards else whole, rel=0.02), role
        assert moments == pytest.approx(whole / 2 if states_in_shards else whole, rel=0.02), role
    assert found["value"][1] > found["policy"][1]
    if run[0] == "fsdp2":
        assert (found["policy_class"], found["value_class"]) == ("DTensor", "DTensor")


@engines()
def test_a_checkpoint_continues(run):
    """`sampled` draws its answers and is resumed inside an iteration; both with Adam's moments and a schedule."""
    for name in [each.removesuffix("_resumed") for each in RUNS[run[0]] if each.endswith("_resumed")]:
        whole, again = load(run, name), load(run, f"{name}_resumed")
        assert_same_metrics(again["metrics"], whole["metrics"], rel=1e-4)
        expected, found = saved_weights(run[1] / name), saved_weights(run[1] / f"{name}_resumed")
        for role in expected:
            torch.testing.assert_close(found[role], expected[role], atol=1e-6, rtol=1e-5)


@engines(SHARDED)
def test_an_evaluation_has_a_win_rate(run):
    """Sampling from policy and reference between two steps: the steps after it are those that a resumed run repeats."""
    rates = load(run, "sampled")["win_rates"]
    assert len(rates) == 3
    assert all(0 <= rate <= 1 for rate in rates)


@engines()
def test_the_recipe_runs(run):
    """recipes/ppo_ptx.py, with the value model a copy of the reward model: as many tensors as in the policy."""
    assert saved_weights(run[1] / "recipe").keys() == {"policy", "value", "ema"}
