"""A PPO run first does the stages that are missing, and ends with the evaluation that its YAMLs describe."""

import json

import pytest
from instruct_trl.recipes import ppo_ptx, stages

from instruct_trl.pipeline.training import PPOPtxArguments


@pytest.mark.parametrize(("yamls", "expected"), [((), "selected_sft/model"), (("rl_init.yaml",), "rl_init")])
def test_the_stages_run_in_the_papers_order_and_ppo_starts_from_the_rl_init(tmp_path, monkeypatch, yamls, expected):
    for name in yamls:
        (tmp_path / name).write_text("")
    calls = []

    def run_recipe(name, run, extra=None, config=None, **kwargs):
        calls.append((name, config, extra))
        return str(run.run / kwargs.get("stage", name))

    monkeypatch.setattr(stages, "run_recipe", run_recipe)
    run = PPOPtxArguments(run_dir=str(tmp_path / "run"))
    run.config_folder = tmp_path
    policy = stages.make_what_is_missing(run, "my-base")
    assert policy == str(tmp_path / "run" / expected)
    assert [name for name, _, _ in calls[:4]] == ["sft", "sample", "reward_model", "select_sft"]
    assert calls[0][2] == ["--model_name_or_path", "my-base"]
    assert [config for _, config, _ in calls[4:]] == [name.removesuffix(".yaml") for name in yamls]


@pytest.mark.parametrize(("seed", "expected"), [(None, []), (3, ["--seed", "3"])])
def test_the_command_lines_seed_is_that_of_every_stage(tmp_path, monkeypatch, seed, expected):
    given = []
    monkeypatch.setattr("instruct_trl.recipes.sft.main", lambda argv, **_: given.append(argv))
    run = PPOPtxArguments(run_dir="r")
    run.config_folder, run.given_seed = tmp_path, seed
    stages.run_recipe("sft", run, ["--a", "b"])
    assert given == [["--config", str(tmp_path / "sft.yaml"), "--run_dir", "r", *expected, "--a", "b"]]


def test_own_models_replace_every_stage_before_ppo(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "run_recipe", lambda *_, **__: pytest.fail("no stage is missing"))
    run = PPOPtxArguments(run_dir=str(tmp_path), dataset_name="mine.jsonl", reward_model_path="my-rm")
    assert stages.make_what_is_missing(run, "my-policy") == "my-policy"


@pytest.mark.parametrize(
    ("text", "own_data", "calls"),
    [
        (None, False, []),
        ("seed: 1", False, []),
        ("dataset_name: d", False, ["evaluate"]),
        ("dataset_name: d", True, []),
    ],
)
def test_a_run_is_evaluated_where_its_yamls_describe_that(tmp_path, monkeypatch, text, own_data, calls):
    called = []
    monkeypatch.setattr(stages, "run_recipe", lambda name, run: called.append(name))
    run = PPOPtxArguments()
    run.config_folder, run.own_data = tmp_path, own_data
    if text:
        (tmp_path / "evaluate.yaml").write_text(text)
    stages.evaluate_if_described(run)
    assert called == calls


PREPARE = """
import json, shutil

def score(prompts, completions, **_):
    return [float(sum(map(ord, c))) for c in completions]

def write(folder, rows=4):
    shutil.copytree("tiny", folder / "model")
    data = {
        "demonstrations": lambda i: {"prompt": f"q{i}", "completion": f" answer {i}"},
        "prompts": lambda i: {"prompt": f"q{i}"},
        "texts": lambda i: {"text": f"plain text number {i}"},
    }
    for name, row in data.items():
        (folder / name).mkdir()
        for split, start in (("train", 0), ("test", rows)):
            lines = (json.dumps(row(i)) + "\\n" for i in range(start, start + rows))
            (folder / name / f"{split}.jsonl").write_text("".join(lines))
"""
SHARED = "run_dir: out\nprepare: preparing:write\ncpu_threads: 1\nbf16: false\n"
TRAIN = "per_device_train_batch_size: 2\nmax_steps: 1\nreport_to: none\ngradient_checkpointing: false\n"
SAMPLE = "max_completion_length: 3\n"
WHOLE_RUN = {
    "sft": f"{TRAIN}model_name_or_path: '{{run_dir}}/data/model'\ndataset_name: '{{run_dir}}/data/demonstrations'\n"
    "pretraining_dataset_name: '{run_dir}/data/texts'\npretraining_fraction: 0.25\n",
    "sample": f"{SAMPLE}dataset_name: '{{run_dir}}/data/prompts'\nlabeler: preparing:score\nnum_completions: 3\n",
    "reward_model": f"{TRAIN}dataset_name: '{{run_dir}}/rankings'\nlabeler_description: the sum of letters\n"
    "demonstrations_name: '{run_dir}/data/demonstrations'\n",
    "select_sft": f"{SAMPLE}dataset_name: '{{run_dir}}/data/prompts'\n"
    "demonstrations_name: '{run_dir}/data/demonstrations'\n",
    "ppo_ptx": f"{TRAIN}{SAMPLE}dataset_name: '{{run_dir}}/data/prompts'\ngeneration_batch_size: 2\n"
    "pretraining_dataset_name: '{run_dir}/data/texts'\nlabeler: preparing:score\ngradient_accumulation_steps: 1\n",
    "evaluate": f"{SAMPLE}base_model: '{{run_dir}}/data/model'\ndataset_name: '{{run_dir}}/data/prompts'\n"
    "pretraining_dataset_name: '{run_dir}/data/texts'\nlabeler: preparing:score\n"
    "labeler_description: the sum of letters\n",
}


@pytest.fixture
def mine(tmp_path, policy, tokenizer, monkeypatch):
    """A user's own YAMLs in mine/, with what they name, in the working folder."""
    monkeypatch.chdir(tmp_path)
    policy.save_pretrained("tiny")
    tokenizer.save_pretrained("tiny")
    (tmp_path / "preparing.py").write_text(PREPARE)
    (tmp_path / "mine").mkdir()
    for name, text in WHOLE_RUN.items():
        (tmp_path / "mine" / f"{name}.yaml").write_text(SHARED + text)
    return tmp_path


def test_a_users_own_folder_of_yamls_runs_every_stage_as_the_demos_does(mine, capsys):
    """Prepared data, SFT, rankings, reward model, selection, PPO-ptx and the report; a second call finds them done."""
    for _ in range(2):
        ppo_ptx.main(["--config", "mine/ppo_ptx.yaml"])
    report = (mine / "out" / "report.md").read_text()
    assert "the sum of letters" in report
    assert "| base |" in report
    assert "the sum of letters" in (mine / "out" / "reward_model" / "evaluation" / "report.md").read_text()
    assert (mine / "out" / "rankings" / "test.jsonl").exists()
    with pytest.raises(ValueError, match="give --model_name_or_path and --reward_model_path"):
        ppo_ptx.main(["--config", "mine/ppo_ptx.yaml", "--dataset_name", "other.jsonl", "--output_dir", "o"])
    add_a_control(mine / "out", capsys)


def add_a_control(run, capsys):
    """To a finished run, later: it alone is trained and evaluated, on the same prompts from the same policy."""
    drawn = ("report.", "pictures")
    files = [path for path in run.rglob("*") if path.is_file() and not path.relative_to(run).parts[0].startswith(drawn)]
    before = {path: path.read_bytes() for path in files}
    with_control = ["--config", "mine/ppo_ptx.yaml", "--control", "shuffled_ranks"]
    capsys.readouterr()
    ppo_ptx.main(with_control)
    assert {path: path.read_bytes() for path in files} == before
    said = capsys.readouterr().out
    for line in ("== Rankings: finished earlier", "== PPO-ptx: finished earlier", "== Evaluation: finished earlier"):
        assert line in said
    for title in ("Reward model on shuffled ranks", "PPO-ptx on shuffled ranks", "Evaluation of the control"):
        assert f"== {title}: done" in said
    report = (run / "report.md").read_text()
    assert "base | SFT | shuffled ranks | PPO-ptx" in report
    assert "does not come from the feedback. Its reward model orders" in report

    def read(stage, name="stage.finished.json"):
        return json.loads((run / stage / name).read_text())

    real, control = (read(f"{folder}reward_model")["settings"] for folder in ("", "control/"))
    assert control == real | {"shuffle_ranks": True, "labeler_folds": 0}
    real, control = (read(f"{folder}ppo_ptx")["settings"] for folder in ("", "control/"))
    assert control == real | {"reward_model_path": "out/control/reward_model"}
    pages = [read(f"{folder}reward_model/evaluation", "metrics.json") for folder in ("", "control/")]
    assert pages[0]["rankings"] == pages[1]["rankings"]  # the held-out ones, as the labeler gave them
    assert "the ranks were shuffled" in (run / "control" / "reward_model" / "evaluation" / "report.md").read_text()
    # One that broke off goes on where it was.
    (run / "control" / "ppo_ptx" / "stage.finished.json").unlink()
    ppo_ptx.main(with_control)
    said = capsys.readouterr().out
    assert "== Reward model on shuffled ranks: finished earlier" in said
    assert "== PPO-ptx on shuffled ranks: done" in said
    assert "== Evaluation of the control: finished earlier" in said  # the same policy came out


def test_a_control_without_rankings_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="my-rm comes without any. Leave it out"):
        ppo_ptx.main(["--run_dir", "out", "--control", "shuffled_ranks", "--reward_model_path", "my-rm"])
    assert list(tmp_path.iterdir()) == []
