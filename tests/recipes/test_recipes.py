"""Every YAML parses strictly; every recipe runs as a program, two steps long, on a user's own data."""

import importlib
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_config
from launch_helpers import python
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, pipeline
from trl import ModelConfig

from instruct_trl import RankingRewardConfig
from instruct_trl._upstream import reset_accelerator
from instruct_trl.pipeline.arguments import RunArguments, parse_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
YAMLS = [p for p in sorted(RECIPES.glob("*/*.yaml")) if p.stem != "data" and p.parent.name != "accelerate"]


class Parsed(Exception):
    """Carries what a recipe parsed out of its `main`, before it does anything."""


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_yaml_is_known_to_its_recipe_key_by_key(path, tmp_path, monkeypatch):
    recipe = importlib.import_module(f"instruct_trl.recipes.{'sft' if path.stem == 'rl_init' else path.stem}")

    def stop(*arguments):
        raise Parsed(parse_recipe(*arguments))

    monkeypatch.setattr(recipe, "parse_recipe", stop)
    with pytest.raises(Parsed) as caught:
        recipe.main(["--config", str(path), "--run_dir", str(tmp_path)])
    parsed = caught.value.args[0]
    for key, value in yaml.safe_load(path.read_text()).items():
        (holder,) = [part for part in parsed if hasattr(part, key)][:1]
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            assert getattr(holder, key) == value, key


def test_how_a_model_is_loaded_reaches_the_trainer(tmp_path):
    types = (RunArguments, RankingRewardConfig, ModelConfig)
    argv = ["--run_dir", str(tmp_path), "--output_dir", str(tmp_path / "rm"), "--bf16", "false"]
    (tmp_path / "plain.yaml").write_text("seed: 1\n")
    argv = ["--config", str(tmp_path / "plain.yaml"), *argv]
    assert not parse_recipe(types, "reward_model", "", argv)[1].model_init_kwargs
    asked = ["--dtype", "bfloat16", "--model_revision", "v2", "--attn_implementation", "eager"]
    given = ["--model_init_kwargs", '{"dtype": "float16"}']  # wins
    assert parse_recipe(types, "reward_model", "", [*argv, *asked, *given])[1].model_init_kwargs == {
        "dtype": "float16",
        "revision": "v2",
        "attn_implementation": "eager",
    }


@pytest.mark.parametrize("has", [True, False])
def test_bf16_goes_off_on_a_cpu_that_has_no_instructions_for_it(has, tmp_path, monkeypatch, capsys):
    """There `make demo` would take hours. A dry run keeps bf16: it plans for another device."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": has})
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    (tmp_path / "c.yaml").write_text("bf16: true\n")
    argv = ["--config", str(tmp_path / "c.yaml"), "--output_dir", str(tmp_path / "rm"), "--use_cpu", "true"]
    types = (RunArguments, RankingRewardConfig, ModelConfig)
    assert parse_recipe(types, "reward_model", "", argv)[1].bf16 is has
    assert ("bf16 is off" in capsys.readouterr().out) is not has
    assert parse_recipe(types, "reward_model", "", [*argv, "--dry_run"])[1].bf16


@pytest.mark.parametrize("recipe", ["sft", "sample", "reward_model", "select_sft", "ppo_ptx", "evaluate"])
def test_recipes_are_short(recipe):
    assert len((RECIPES / f"{recipe}.py").read_text().splitlines()) <= 60


def test_an_unknown_yaml_key_is_named_with_the_likely_one(tmp_path):
    (tmp_path / "c.yaml").write_text("num_completion: 3\n")
    from instruct_trl.recipes.sample import main

    with pytest.raises(ValueError, match="unknown key 'num_completion'. Did you mean 'num_completions'"):
        main(["--config", str(tmp_path / "c.yaml")])


def test_a_config_that_does_not_exist(tmp_path):
    from instruct_trl.recipes.sample import main

    with pytest.raises(ValueError, match="does not exist"):
        main(["--config", str(tmp_path / "gone.yaml")])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- seed: 1\n", "c.yaml holds a list where settings should be"),
        (b"hello\n", "c.yaml holds the value 'hello'"),
        (b"seed: 1\nnum_completions: [1\nrun_dir: x\n", "c.yaml, line 3, column 8: broken YAML"),
        (b"seed: 1\n\trun_dir: x\n", "c.yaml, line 2, column 1: broken YAML"),
        ("labeler: schön:score\n".encode("latin-1"), "c.yaml is not UTF-8 .* Save it as UTF-8"),
        (b"1: 2\n", "c.yaml: unknown key 1"),
    ],
)
def test_a_yaml_that_holds_no_settings(tmp_path, content, message):
    from instruct_trl.recipes.sample import main

    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        main(["--config", str(tmp_path / "c.yaml")])


def test_an_empty_yaml_leaves_the_defaults_and_a_config_needs_a_name(tmp_path):
    (tmp_path / "c.yaml").write_text("# nothing\n")
    (run,) = parse_recipe((RunArguments,), "sample", "", ["--config", str(tmp_path / "c.yaml"), "--cpu_threads", "1"])
    assert run.run_dir == RunArguments.run_dir
    with pytest.raises(ValueError, match="--config names no file"):
        parse_recipe((RunArguments,), "sample", "", ["--config"])


def test_a_home_is_the_home_wherever_a_path_is_named(tmp_path, monkeypatch):
    from instruct_trl.recipes.evaluate import EvaluateArguments

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("dataset_name: ~/d.jsonl\nother_models: [A=~/a, B=b~/c]\nsft_model: ~/sft\n")
    argv = ["--config=~/c.yaml", "--cpu_threads", "1", "--checkpoint_prompts", "~/p.jsonl"]
    (run,) = parse_recipe((EvaluateArguments,), "evaluate", "", argv)
    home = str(tmp_path)
    assert (run.dataset_name, run.sft_model, run.checkpoint_prompts) == (
        f"{home}/d.jsonl", f"{home}/sft", f"{home}/p.jsonl",
    )  # fmt: skip
    assert run.other_models == [f"A={home}/a", "B=b~/c"]


def test_other_data_than_the_yamls_leave_its_models_labeler_and_folder_out(tmp_path):
    """A YAML with a preparing step is one example: its labeler must not judge other data."""
    from instruct_trl.pipeline.evaluating import EvaluateArguments

    config = tmp_path / "c.yaml"
    config.write_text(
        "prepare: a:b\nrun_dir: example\ndataset_name: '{run_dir}/data/p'\nlabeler: a:score\nbase_model: m\nseed: 3\n"
        "deviations: [so and so]\n"
    )
    parse = lambda *argv: parse_recipe((EvaluateArguments,), "evaluate", "", ["--config", str(config), *argv])[0]  # noqa: E731
    its = parse("--run_dir", "elsewhere")
    assert (its.dataset_name, its.labeler, its.base_model, its.own_data) == ("elsewhere/data/p", "a:score", "m", False)
    own = parse("--dataset_name", "mine.jsonl")
    assert (own.run_dir, own.labeler, own.base_model, own.prepare) == ("outputs/run", None, None, None)
    assert (own.dataset_name, own.deviations, own.seed, own.own_data) == ("mine.jsonl", [], 3, True)
    config.write_text(config.read_text().removeprefix("prepare: a:b\n"))
    assert parse("--dataset_name", "mine.jsonl").labeler == "a:score"


def test_own_prompts_need_own_models(tmp_path):
    from instruct_trl.recipes.ppo_ptx import main

    with pytest.raises(ValueError, match="give --model_name_or_path and --reward_model_path"):
        main(["--dataset_name", "x.jsonl", "--run_dir", str(tmp_path)])


@pytest.fixture
def home(tmp_path, tokenizer):
    """A folder with tiny models, data of every kind, and a labeler of the user's own."""
    torch.manual_seed(0)
    policy = LlamaForCausalLM(tiny_config())
    for name, model in (("policy", policy), ("rm", LlamaForSequenceClassification(tiny_config(num_labels=1)))):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    rows = {
        "sft": [{"prompt": f"q{i}", "completion": f" answer {i}"} for i in range(16)],
        "prompts": [{"prompt": f"q{i}"} for i in range(16)],
        "texts": [{"text": f"plain text number {i}"} for i in range(32)],
        "rankings": [{"prompt": f"q{i}", "completions": ["a", "bb", "ccc"], "ranks": [1, 2, 2]} for i in range(16)],
    }
    for name, lines in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    (tmp_path / "mine.py").write_text(
        "def score(prompts, completions, **_):\n    return [len(c) for c in completions]\n"
    )
    return tmp_path


ACCELERATE = ("-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1")


def launch(home, launcher, recipe, *arguments):
    """Run a recipe under its launcher, in `home`. Two of them: to import everything takes longer than two steps."""
    return python(*launcher, RECIPES / f"{recipe}.py", *arguments, cwd=home)


@pytest.fixture
def call(home, monkeypatch, capsys):
    """Run a recipe as a program, but in this process, in `home`; returns what it printed."""

    def run(recipe, *arguments):
        reset_accelerator()
        monkeypatch.setattr(sys, "argv", [f"{recipe}.py", *arguments])
        runpy.run_path(str(RECIPES / f"{recipe}.py"), run_name="__main__")
        return capsys.readouterr().out

    monkeypatch.chdir(home)
    sys.modules.pop("mine", None)  # of another test's folder
    yield run
    sys.modules.pop("mine", None)


TINY = ("--bf16", "false", "--cpu_threads", "1")
TRAIN = (*TINY, "--max_steps", "2", "--per_device_train_batch_size", "2", "--report_to", "none")


@pytest.mark.slow
def test_sft_under_torchrun(home, call):
    out = launch(
        home, TORCHRUN, "sft", *TRAIN, "--model_name_or_path", "policy", "--dataset_name", "sft.jsonl",
        "--output_dir", "sft", "--pretraining_fraction", "0.25", "--pretraining_dataset_name", "texts.jsonl",
        "--eval_strategy", "no", "--save_strategy", "steps", "--save_steps", "1",
    )  # fmt: skip
    assert "== SFT: done" in out
    assert (home / "sft" / "model.safetensors").exists()
    again = call(
        "select_sft", *TINY, "--sft_path", "sft", "--reward_model_path", "rm", "--dataset_name",
        "prompts.jsonl", "--output_dir", "selected", "--max_completion_length", "4",
    )  # fmt: skip
    assert "checkpoint checkpoint-" in again
    assert (home / "selected" / "selection.png").exists()
    assert (home / "selected" / "model" / "model.safetensors").exists()


@pytest.mark.slow
def test_reward_model_with_held_out_rankings_and_labelers(home, call):
    """A page on the held-out rankings, with the paper's cross validation over groups of labelers in it."""
    (home / "ranked").mkdir()
    for split, count in (("train", 12), ("test", 6)):
        rows = [
            {"prompt": f"q{i} ", "completions": ["a", "bb", "ccc"], "ranks": [1, 2, 2], "labeler": f"labeler {i % 3}"}
            for i in range(count)
        ]
        (home / "ranked" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = call(
        "reward_model", *TRAIN, "--model_name_or_path", "policy", "--dataset_name", "ranked",
        "--labeler_folds", "3", "--output_dir", "rm2",
    )  # fmt: skip
    assert "rm2/evaluation/report.html" in out
    metrics = json.loads((home / "rm2" / "evaluation" / "metrics.json").read_text())
    assert len(metrics["labeler_folds"]["folds"]) == 3
    assert "labeler 0" in (home / "rm2" / "evaluation" / "report.md").read_text()
    assert not (home / "rm2" / "folds").exists()


def write_rankings_for_a_curve(home):
    (home / "ranked").mkdir()
    for split, start, count in (("train", 0, 40), ("test", 40, 12)):
        rows = [
            {
                "prompt": f"q{i} ",
                "completions": ["a good one", "bad"][:: 1 - 2 * (i % 2)],
                "ranks": [1 + i % 2, 2 - i % 2],
            }
            for i in range(start, start + count)
        ]
        (home / "ranked" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
def test_a_finished_reward_model_gets_a_learning_curve_and_no_share_is_trained_twice(home, call):
    write_rankings_for_a_curve(home)
    train = (*TRAIN, "--model_name_or_path", "policy", "--dataset_name", "ranked", "--output_dir", "rm2")
    out = call("reward_model", *train)
    assert "a bag of words: 100.0 %" in out
    assert "the longer answer: 100.0 %" in out
    weights = (home / "rm2" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="--learning_curve 0.1 of 40 training prompts is 4 of them"):
        call("reward_model", *train, "--learning_curve", "0.1")
    out = call("reward_model", *train, "--learning_curve", "0.25", "0.5", "1.0")
    assert "Reward model: finished earlier, kept" in out
    assert "Reward model on 0.25 of the prompts: done" in out
    assert "Reward model on 1 of" not in out
    assert (home / "rm2" / "model.safetensors").read_bytes() == weights
    metrics = json.loads((home / "rm2" / "evaluation" / "metrics.json").read_text())
    points = metrics["learning_curve"]["points"]
    assert [point["prompts"] for point in points] == [10, 20, 40]
    assert points[-1]["pair_accuracy"] == metrics["pair_accuracy"]
    assert [point["bag_of_words"]["mean"] for point in points] == [1, 1, 1]
    assert metrics["learning_curve"] == json.loads((home / "rm2" / "learning_curve" / "curve.json").read_text())
    assert "How many labels do I need?" in (home / "rm2" / "evaluation" / "report.md").read_text()
    assert not (home / "rm2" / "learning_curve" / "0.25" / "model").exists()
    out = call("reward_model", *train, "--learning_curve", "0.25", "0.75")
    assert "Reward model on 0.25 of the prompts: finished earlier, kept" in out
    assert "Reward model on 0.75 of the prompts: done" in out
    curve = json.loads((home / "rm2" / "learning_curve" / "curve.json").read_text())
    assert [point["fraction"] for point in curve["points"]] == [0.25, 0.5, 0.75, 1.0]  # earlier ones stay


@pytest.mark.slow
def test_a_new_reward_model_with_a_learning_curve_and_the_best_checkpoint_is_found_finished_again(home, call):
    write_rankings_for_a_curve(home)
    best = (
        "--load_best_model_at_end",
        "true",
        "--save_strategy",
        "steps",
        "--save_steps",
        "1",
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "1",
    )
    train = (*TRAIN, *best, "--model_name_or_path", "policy", "--dataset_name", "ranked", "--output_dir", "rm2")
    out = call("reward_model", *train, "--learning_curve", "0.5", "1.0")
    assert "Reward model on 0.5 of the prompts: done" in out
    out = call("reward_model", *train, "--learning_curve", "0.5", "1.0")
    assert "Reward model: finished earlier, kept" in out
    assert "Reward model on 0.5 of the prompts: finished earlier, kept" in out


@pytest.mark.slow
def test_sample_then_reward_model(home, call):
    call(
        "sample", *TINY, "--model_name_or_path", "policy", "--dataset_name", "prompts.jsonl", "--output_dir",
        "ranked", "--num_completions", "3", "--max_completion_length", "4", "--labeler", "mine:score",
    )  # fmt: skip
    row = json.loads((home / "ranked" / "train.jsonl").read_text().splitlines()[0])
    lengths = [len(c) for c in row["completions"]]
    assert row["ranks"] == [1 + sum(other > mine for other in lengths) for mine in lengths]
    call(
        "reward_model", *TRAIN, "--model_name_or_path", "policy", "--dataset_name", "rankings.jsonl",
        "--demonstrations_name", "sft.jsonl", "--output_dir", "rm2",
    )  # fmt: skip
    from instruct_trl import RewardScorer

    demos = [json.loads(line) for line in (home / "sft.jsonl").read_text().splitlines()]
    scores = RewardScorer(str(home / "rm2"))([d["prompt"] for d in demos], [d["completion"] for d in demos])
    assert sum(scores) / len(scores) == pytest.approx(0, abs=1e-5)


@pytest.mark.slow
def test_ppo_ptx_then_evaluate(home, call):
    ppo = (
        *TRAIN, "--model_name_or_path", "policy", "--reward_model_path", "rm", "--dataset_name", "prompts.jsonl",
        "--pretraining_dataset_name", "texts.jsonl", "--output_dir", "ppo", "--generation_batch_size", "4",
        "--gradient_accumulation_steps", "1", "--max_completion_length", "4", "--labeler", "mine:score",
        "--save_strategy", "steps", "--save_steps", "1",
    )  # fmt: skip
    out = launch(home, ACCELERATE, "ppo_ptx", *ppo)
    assert "rollout batch 4, minibatch 2, 2 optimizer steps per iteration" in out
    assert "finished earlier" in call("ppo_ptx", *ppo)
    answer = pipeline("text-generation", model=str(home / "ppo" / "policy"))("q1", max_new_tokens=2)
    assert answer[0]["generated_text"].startswith("q1")
    (home / "run").mkdir()
    (home / "ppo").rename(home / "run" / "ppo_ptx")
    evaluate = (
        *TINY, "--base_model", "policy", "--sft_model", "policy", "--other_models", "PPO=policy", "--reward_model_path",
        "rm", "--dataset_name", "prompts.jsonl", "--labeler", "mine:score", "--run_dir", "run",
        "--max_completion_length", "4", "--checkpoint_prompts", "prompts.jsonl",
    )  # fmt: skip
    call("evaluate", *evaluate)
    report = (home / "run" / "report.md").read_text()
    assert "no judge but the labeler was asked" in report
    assert "The labeler scores step" in report
    assert "the labeler's score over training was not logged" not in report
    assert (home / "run" / "report.html").exists()
    # Judges are added without sampling again.
    out = call("evaluate", *evaluate, "--judges", "reward_model", "people", "--questions", "likert")
    assert "Evaluation: finished earlier" in out
    report = (home / "run" / "report.md").read_text()
    assert "| reward model: PPO |" in report
    assert "rate.csv" in report  # the answers are all equal here, so that no pair waits
    assert (home / "run" / "evaluation" / "people" / "rate.csv").exists()


@pytest.mark.slow
def test_one_base_through_all_its_recipes(home, call):
    """SFT as an adapter, a reward adapter on it, PPO on their base: nobody writes a whole model."""
    lora = ("--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj")
    call(
        "sft", *TRAIN, *lora, "--model_name_or_path", "policy", "--dataset_name", "sft.jsonl", "--output_dir",
        "sft", "--pretraining_fraction", "0", "--eval_strategy", "no", "--learning_rate", "1e-2",
    )  # fmt: skip
    call(
        "reward_model", *TRAIN, *lora, "--lora_task_type", "SEQ_CLS", "--model_name_or_path", "sft",
        "--dataset_name", "rankings.jsonl", "--demonstrations_name", "sft.jsonl", "--output_dir", "rm2",
    )  # fmt: skip
    call(
        "ppo_ptx", *TRAIN, *lora, "--one_base", "true", "--model_name_or_path", "sft", "--reward_model_path",
        "rm2", "--dataset_name", "prompts.jsonl", "--pretraining_dataset_name", "texts.jsonl", "--output_dir", "ppo",
        "--generation_batch_size", "4", "--gradient_accumulation_steps", "1", "--max_completion_length", "4",
        "--labeler", "mine:score",
    )  # fmt: skip
    for role in ("policy", "value", "ema"):
        assert (home / "ppo" / role / "adapter_config.json").exists()
        assert not (home / "ppo" / role / "model.safetensors").exists()
    # The adapter names its base as it was given: by a path relative to `home`, where `call` has gone.
    answer = pipeline("text-generation", model="ppo/policy")("q1", max_new_tokens=2)
    assert answer[0]["generated_text"].startswith("q1")
