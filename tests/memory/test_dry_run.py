"""`--dry_run` of every recipe: it fits or says what to do, from configs alone, and makes nothing."""

import importlib
import re
from pathlib import Path

import pytest
from conftest import tiny_config
from memory_helpers import llama_7b
from trl import ModelConfig

from instruct_trl.memory.dry_run import last_resort
from instruct_trl.memory.report import ACCUMULATION, ROWS
from instruct_trl.pipeline.arguments import RunArguments, settings_of

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with the configs of a tiny model and of a 7B one, and no weights anywhere."""
    tiny_config(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "tiny")
    tiny_config(num_labels=1).save_pretrained(tmp_path / "rm")
    llama_7b().save_pretrained(tmp_path / "7b")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, recipe, *arguments):
    """What the recipe prints before it stops."""
    main = importlib.import_module(f"instruct_trl.recipes.{recipe}").main
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in (*arguments, "--dry_run", "--cpu_threads", 1)])
    assert stop.value.code == 0
    return capsys.readouterr().out


OWN = {
    "sft": ("--model_name_or_path", "tiny"),
    "sample": ("--model_name_or_path", "tiny", "--max_completion_length", 16),
    "reward_model": ("--model_name_or_path", "tiny", "--max_length", 64),
    "select_sft": ("--sft_path", "tiny", "--reward_model_path", "rm", "--max_completion_length", 16),
    "ppo_ptx": ("--model_name_or_path", "tiny", "--reward_model_path", "rm"),
    "evaluate": ("--sft_model", "tiny", "--reward_model_path", "rm", "--max_completion_length", 16),
}


@pytest.mark.parametrize("recipe", OWN)
def test_every_recipe_prints_its_plan_and_makes_nothing(recipe, home, capsys):
    before = sorted(home.rglob("*"))
    out = run(capsys, recipe, *OWN[recipe], "--dataset_name", "not_there.jsonl", "--run_dir", "run")
    assert out.startswith(f"Dry run of recipes/{recipe}.py")
    assert re.search(r"^fits: ", out.splitlines()[-1])
    assert not re.search(r" -\d", out)  # no negative size
    assert sorted(home.rglob("*")) == before


def test_a_control_needs_no_more_memory_and_the_plan_says_so(home, capsys):
    own = ("--model_name_or_path", "tiny", "--run_dir", "run")
    alone, both = (run(capsys, "ppo_ptx", *own, *more).splitlines() for more in ((), ("--control", "shuffled_ranks")))
    (added,) = [line for line in both if line not in alone]
    assert added.startswith("Assumed: the control is trained after the run")
    assert [line for line in both if line != added] == alone


@pytest.mark.slow
def test_the_demo_is_planned_without_its_model(home, capsys, monkeypatch):
    """Its model is not there and would be downloaded: the plan knows its shape."""
    monkeypatch.setenv("INSTRUCT_TRL_CACHE", str(home / "empty"))
    out = run(capsys, "ppo_ptx", "--run_dir", home / "run", "--device_memory_gb", 80)
    assert "538" in out or "0.54 GB" in out  # 134.5 M float32 weights
    assert not (home / "empty").exists()


def test_a_missing_model_is_an_error(home, capsys):
    from instruct_trl.recipes.sft import main

    with pytest.raises(ValueError, match=r"no model folder './gone'"):
        main(["--dry_run", "--model_name_or_path", "./gone", "--cpu_threads", "1"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo_ptx_qlora_16gb", "ppo_ptx_qlora_24gb", "ppo_ptx_lora_small"])
def test_the_yamls_of_one_base_fit_their_cards(name, home, capsys):
    model = "tiny" if "small" in name else "7b"
    models = ("--model_name_or_path", model, "--dataset_name", "prompts.jsonl")
    out = run(capsys, "ppo_ptx", "--config", RECIPES / f"{name}.yaml", *models)
    card = {"ppo_ptx_qlora_16gb": 16, "ppo_ptx_qlora_24gb": 24, "ppo_ptx_lora_small": 8}[name]
    assert f"a GPU with {card} GB" in out
    assert out.splitlines()[-1].startswith("fits: ")
    assert re.search(r"^base ", out, flags=re.MULTILINE)


@pytest.mark.slow
def test_what_does_not_fit_is_told_what_to_do(home, capsys):
    """The advice is taken, and then it fits."""
    models = ("--model_name_or_path", "tiny", "--reward_model_path", "rm", "--dataset_name", "x")
    settings = (*models, "--config", "p.yaml", "--device_memory_gb", 2)
    (home / "p.yaml").write_text(
        "generation_batch_size: 512\nper_device_train_batch_size: 64\ngradient_accumulation_steps: 8\n"
        "local_rollout_forward_batch_size: 512\nmax_prompt_length: 4000\nmax_completion_length: 4000\n"
        "gradient_checkpointing: false\nptx_max_length: 64\n"
    )
    out = run(capsys, "ppo_ptx", *settings)
    last = out.splitlines()[-1]
    advice = re.match(r"does not fit: .* Do this: (.*); the peak is then", last).group(1)
    assert "--gradient_checkpointing true" in advice
    taken = dict(change.split(" ") for change in advice.split(", "))
    rows, accumulation = (int(taken[f"--{name}"]) for name in (ROWS, ACCUMULATION))
    assert rows * accumulation == 64 * 8  # the minibatch, and with it the steps an iteration, are the user's
    changes = [part for change in advice.split(", ") for part in change.split(" ")]
    out = run(capsys, "ppo_ptx", *settings, *changes)
    assert out.splitlines()[-1].startswith("fits: ")


@pytest.mark.slow
def test_models_that_are_too_large_by_themselves_are_sent_to_one_base(home, capsys):
    # 7B in 5 layers, since a plan's seconds go with the layers.
    wide = llama_7b(hidden_size=8192, intermediate_size=45056, num_hidden_layers=5, num_attention_heads=64)
    wide.save_pretrained(home / "wide")
    out = run(capsys, "ppo_ptx", "--model_name_or_path", "wide", "--dataset_name", "x", "--device_memory_gb", 24)
    assert "the models alone are too large. Do this: hold the four roles on one frozen base" in out.splitlines()[-1]


@pytest.mark.parametrize(
    ("one_base", "model", "advice"),
    [
        (False, {}, "hold the four roles on one frozen base (see recipes/ppo_ptx_qlora_16gb.yaml)"),
        (True, {}, "load the base in 4 bits (--load_in_4bit)"),
        (True, {"load_in_4bit": True, "lora_modules_to_save": ["lm_head"]}, "leave --lora_modules_to_save out"),
        (None, {}, "train an adapter (--use_peft)"),
        (None, {"use_peft": True}, "load the base in 4 bits (--load_in_4bit)"),
        (None, {"use_peft": True, "load_in_4bit": True}, None),
    ],
)
def test_the_last_resort_is_one_that_the_run_has_not_taken(one_base, model, advice):
    expected = "take a smaller model" if advice is None else f"{advice}, or take a smaller model"
    assert last_resort(ModelConfig(**model), one_base) == expected


def test_the_memory_that_is_planned_for_does_not_make_another_run():
    assert settings_of(RunArguments(dry_run=True, device_memory_gb=3.0, cpu_threads=1)) == {}
