"""A PPO run first does the stages that are missing, and ends with the evaluation that its YAMLs describe."""

import pytest
from instruct_trl.recipes import stages

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
