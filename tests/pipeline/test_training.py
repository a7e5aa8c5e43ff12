"""What PPO is given: the labeler beside the reward, and models that can share one base."""

import json
from types import SimpleNamespace

import pytest
from trl.trainer.utils import get_callable_name

from instruct_trl.pipeline import training
from instruct_trl.pipeline.evaluating import training_log
from instruct_trl.pipeline.training import PPOPtxArguments, rewards_with_labeler


def test_a_labeler_of_any_name_is_logged_where_the_report_looks(tmp_path, monkeypatch):
    (tmp_path / "labelers_of_mine.py").write_text(
        "def score(prompts, completions, **_):\n    return [float(len(c)) for c in completions]\n"
        "class Late:\n    async def __call__(self, **_):\n        return []\n"
        "late = Late()\n"
    )
    monkeypatch.chdir(tmp_path)
    run = PPOPtxArguments(run_dir="run", labeler="labelers_of_mine:score")
    args = SimpleNamespace(local_rollout_forward_batch_size=1)
    _, labeler = rewards_with_labeler(run, args, object())
    state = {"log_history": [{"score": 1.0, "kl": 0.5, f"rewards/{get_callable_name(labeler)}/mean": 3.0}]}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    assert [row["labeler_score"] for row in training_log(tmp_path)] == [3.0]
    assert labeler(prompts=["p", "q"], completions=["a", "bcd"], completion_ids=None) == [1.0, 3.0]
    assert args.reward_weights == [1.0, 0.0]
    run.labeler = "labelers_of_mine:late"
    with pytest.raises(ValueError, match="is async; a labeler is an ordinary function"):
        rewards_with_labeler(run, args, object())


@pytest.mark.parametrize("dry", [(), ("--dry_run",)])
@pytest.mark.parametrize(
    ("yamls", "arguments", "says"),
    [
        ({}, (), "reward model that is a LoRA adapter; the model that .*reward_model.yaml trains is not one"),
        ({}, ("--reward_model_path", "whole"), "reward model that is a LoRA adapter; the model whole is not one"),
        ({"reward_model": "use_peft: true"}, (), "the model that .*sft.yaml trains is whole. Add --use_peft"),
    ],
)
def test_one_base_is_refused_before_anything_is_trained(tmp_path, monkeypatch, yamls, arguments, says, dry):
    from instruct_trl.recipes import ppo_ptx

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "prepare_output", lambda *_: pytest.fail("the run began"))
    for name, text in {"ppo_ptx": "one_base: true", **yamls}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    with pytest.raises(ValueError, match=says):
        ppo_ptx.main(["--config", "ppo_ptx.yaml", "--cpu_threads", "1", *arguments, *dry])


def test_one_base_goes_on_where_the_runs_own_recipes_train_adapters(tmp_path, monkeypatch):
    from instruct_trl.recipes import ppo_ptx

    class BeganError(Exception):
        pass

    def begin(*_):
        raise BeganError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "prepare_output", begin)
    for name in ("ppo_ptx", "sft", "reward_model"):
        (tmp_path / f"{name}.yaml").write_text("one_base: true" if name == "ppo_ptx" else "use_peft: true")
    with pytest.raises(BeganError):
        ppo_ptx.main(["--config", "ppo_ptx.yaml", "--cpu_threads", "1"])
