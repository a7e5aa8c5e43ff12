"""The control beside an evaluation: its answers come on top, nothing is sampled again, and the report compares."""

import json
from dataclasses import replace

import pytest
from pipeline_helpers import leave_control

from instruct_trl.pipeline import evaluating
from instruct_trl.pipeline.control import check_control, evaluate_control
from instruct_trl.pipeline.evaluating import evaluate_models
from instruct_trl.pipeline.evaluation_report import make_report
from instruct_trl.pipeline.training import PPOPtxArguments
from instruct_trl.report.data import load_report_data


@pytest.fixture
def evaluated(own, policy, tokenizer):
    """An evaluation of the run's own policy, and the folder of its answers."""
    policy.save_pretrained("run/ppo_ptx/policy")
    tokenizer.save_pretrained("run/ppo_ptx/policy")
    run = replace(own, ppo_model=None)
    folder = run.folder("evaluation")
    evaluate_models(run, folder)
    return run, folder


@pytest.fixture
def sampled(monkeypatch):
    """The models that are asked for answers from here on."""
    asked, sample = [], evaluating.sample_answers
    monkeypatch.setattr(
        evaluating,
        "sample_answers",
        lambda *args, desc, **kwargs: (asked.append(desc), sample(*args, desc=desc, **kwargs))[1],
    )
    return asked


def files_of(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_without_a_control_nothing_is_done(evaluated, sampled):
    run, folder = evaluated
    before = files_of(run.run)
    evaluate_control(run, folder)
    assert files_of(run.run) == before
    data = load_report_data(make_report(run, folder).parent)
    assert data.control == {}
    assert "shuffled ranks" not in (run.run / "report.md").read_text()
    leave_control(run.run, finished=False)  # one that still trains
    evaluate_control(run, folder)
    assert sampled == []


def test_a_control_adds_its_own_answers_and_the_report_compares(evaluated, sampled, capsys):
    run, folder = evaluated
    alone = (folder / "answers.json").read_bytes()
    leave_control(run.run, accuracy=0.5)
    evaluate_control(run, folder)
    assert sampled == ["answers of shuffled ranks"]
    assert (folder / "answers.json").read_bytes() == alone
    evaluate_control(run, folder)
    assert "Evaluation of the control: finished earlier" in capsys.readouterr().out
    assert sampled == ["answers of shuffled ranks"]
    rows = json.loads((folder / "control" / "answers.json").read_text())
    own_rows = json.loads(alone)["models"]
    assert rows["shuffled ranks"].keys() == own_rows["PPO-ptx"].keys()
    data = load_report_data(make_report(run, folder).parent)
    assert [model.name for model in data.models] == ["SFT", "shuffled ranks", "PPO-ptx"]
    assert data.headline_model.name == "PPO-ptx"
    win = {model.name: model.win.mean for model in data.models if model.win}
    assert data.control["lead"]["mean"] == pytest.approx(win["PPO-ptx"] - win["shuffled ranks"])
    assert data.control["pair_accuracy"]["mean"] == 0.5
    assert data.timings["control: ppo_ptx"] == 3.0
    page = (run.run / "report.md").read_text()
    assert "The control, with shuffled ranks, wins" in page
    assert "orders 50\u00a0% of 30 held-out pairs" in page


@pytest.mark.parametrize(
    ("stage", "made", "control", "says"),
    [
        ("ppo_ptx", {"learning_rate": 1e-5}, {}, "learning_rate is the default there and 1e-05 in run/ppo_ptx"),
        ("reward_model", {"seed": 1}, {"seed": 2, "shuffle_ranks": True}, "seed is 2 there and 1 in run/reward_model"),
        ("reward_model", {"labeler_folds": 5}, {"shuffle_ranks": True, "labeler_folds": 0}, None),
        ("ppo_ptx", {}, {"reward_model_path": "run/control/reward_model"}, None),
    ],
)
def test_a_control_that_was_trained_otherwise_than_the_run_is_left_out(
    evaluated, sampled, capsys, stage, made, control, says
):
    run, folder = evaluated
    leave_control(run.run, accuracy=0.5)
    evaluate_control(run, folder)  # while nothing is known to differ
    for place, settings in ((run.run, made), (run.run / "control", control)):
        (place / stage).mkdir(exist_ok=True)
        record = {"settings": settings, "seconds": 1.0, "inputs": {"dataset_name": "a"}}
        (place / stage / "stage.finished.json").write_text(json.dumps(record))
    capsys.readouterr()
    evaluate_control(run, folder)
    said = capsys.readouterr().out
    assert ("left out" in said) == (says is not None)
    assert (says or "") in said
    assert ("Move run/control away" in said) == (says is not None)
    data = load_report_data(make_report(run, folder).parent)
    assert ([model.name for model in data.models] == ["SFT", "PPO-ptx"]) == (says is not None)
    assert (data.control == {}) == (says is not None)


def test_a_control_of_other_data_is_left_out(evaluated, sampled, capsys):
    run, folder = evaluated
    leave_control(run.run)
    for place, digest in ((run.run, "a"), (run.run / "control", "b")):
        record = {"settings": {}, "inputs": {"dataset_name": digest, "reward_model_path": digest}}
        (place / "ppo_ptx" / "stage.finished.json").write_text(json.dumps(record))
    evaluate_control(run, folder)
    assert "the files of dataset_name are others than for run/ppo_ptx" in capsys.readouterr().out
    assert sampled == []


def test_another_policy_has_no_control(evaluated, sampled):
    run, folder = evaluated
    leave_control(run.run)
    evaluate_control(replace(run, ppo_model="policy"), folder)
    evaluate_control(replace(run, other_models=["shuffled ranks=policy"]), folder)
    assert sampled == []


def test_a_control_of_ones_own_is_one_of_the_other_models(own):
    """Who has a reward model of their own trains the control by hand; its name among other_models says what it is."""
    run = replace(own, other_models=["shuffled ranks=policy"])
    folder = run.folder("evaluation")
    evaluate_models(run, folder)
    data = load_report_data(make_report(run, folder).parent)
    assert data.control["name"] == "shuffled ranks"
    assert data.control["lead"]["mean"] == 0  # both are the same model
    assert "pair_accuracy" not in data.control


@pytest.mark.parametrize(
    ("changes", "output_dir", "message"),
    [
        ({"control": "shuffle"}, None, "--control is 'shuffle'. Give 'shuffled_ranks', or 'none'"),
        ({"reward_model_path": "rm"}, None, "rm comes without any. .* recipes/reward_model.py --shuffle_ranks true"),
        ({}, "elsewhere", "--output_dir is elsewhere. Leave --output_dir out"),
    ],
)
def test_a_control_that_cannot_be_had_is_refused(changes, output_dir, message):
    run = replace(PPOPtxArguments(run_dir="run", control="shuffled_ranks"), **changes)
    with pytest.raises(ValueError, match=message):
        check_control(run, output_dir)
    if "control" not in changes:
        assert not check_control(replace(run, control="none"), output_dir)


@pytest.mark.parametrize("output_dir", [None, "trainer_output", "run/ppo_ptx"])
def test_a_control_of_the_runs_own_policy_is_taken(output_dir):
    assert check_control(PPOPtxArguments(run_dir="run", control="shuffled_ranks"), output_dir)
