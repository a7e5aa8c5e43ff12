"""The examples, run as they stand, on tiny random models saved to a temporary folder."""

import importlib.util
import json
from pathlib import Path

import pytest
from ranking_helpers import DEMONSTRATIONS, RANKINGS
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

FOLDER = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(FOLDER.glob("*.py"))


def example(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def saved(tmp_path, policy, reward_model, tokenizer):
    """(policy, reward model) as folders."""
    folders = []
    for name, model in (("policy", policy), ("reward_model", reward_model)):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        folders.append(str(tmp_path / name))
    return folders


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_compiles_and_its_docstring_says_how_to_run_it(script):
    source = script.read_text()
    compile(source, str(script), "exec")
    assert f"python examples/{script.name}" in source


def test_own_reward_function(saved, tmp_path):
    module = example("own_reward_function")
    # 2 of 4 words have more than 6 letters, 0 of 2, and no words at all.
    assert module.few_long_words(["a"] * 3, ["one extremely terrible day", "a b", ""]) == [-0.5, 0.0, 0.0]
    policy = module.main(saved[0], str(tmp_path / "out"))
    AutoModelForCausalLM.from_pretrained(policy)
    assert (tmp_path / "out" / "value").is_dir()
    assert (tmp_path / "out" / "ema").is_dir()


def test_ppo_in_a_trl_project(saved, tmp_path):
    prompts = jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"Say {n}. "} for n in range(8)])
    texts = jsonl(tmp_path / "texts.jsonl", [{"text": f"{n} is a number."} for n in range(8)])
    sizes = {"generation_batch_size": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    policy = example("ppo_in_a_trl_project").main(
        *saved, prompts, texts, str(tmp_path / "out"), total_episodes=4, max_completion_length=8, **sizes
    )
    AutoModelForCausalLM.from_pretrained(policy)


def test_one_base_on_a_consumer_gpu(pieces, tmp_path):
    prompts = jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"Say {n}. "} for n in range(8)])
    texts = jsonl(tmp_path / "texts.jsonl", [{"text": f"{n} is a number."} for n in range(8)])
    folders = [str(pieces / name) for name in ("base", "sft", "rm")]
    policy = example("one_base_on_a_consumer_gpu").main(
        *folders, prompts, texts, str(tmp_path / "out"), total_episodes=8, generation_batch_size=8,
        per_device_train_batch_size=2, gradient_accumulation_steps=1, max_completion_length=8, learning_rate=0.1,
    )  # fmt: skip
    trained, sft = (AutoModelForCausalLM.from_pretrained(path) for path in (policy, pieces / "merged"))
    names = {name for name, weight in trained.state_dict().items() if not weight.equal(sft.state_dict()[name])}
    assert names  # the merged policy is not the one that it started from
    assert all("q_proj" in name or "v_proj" in name for name in names)  # where the SFT adapter lies
    assert (tmp_path / "out" / "value" / "adapter_config.json").exists()


def test_reward_in_a_trl_project(saved, tmp_path):
    rankings = jsonl(tmp_path / "rankings.jsonl", RANKINGS)
    demonstrations = jsonl(tmp_path / "demonstrations.jsonl", DEMONSTRATIONS)
    module = example("reward_in_a_trl_project")
    folder = module.main(saved[0], rankings, demonstrations, str(tmp_path / "rm"), max_steps=1)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    scorer = module.RewardScorer(model, AutoTokenizer.from_pretrained(folder))
    scores = scorer([row["prompt"] for row in DEMONSTRATIONS], [row["completion"] for row in DEMONSTRATIONS])
    assert sum(scores) == pytest.approx(0, abs=1e-5)  # what the bias is for


def test_sft_selection(saved, tmp_path):
    rows = [{"prompt": f"Say {n}. ", "completion": f"{n}!"} for n in range(20)]
    best = example("sft_selection").main(
        *saved, jsonl(tmp_path / "demos.jsonl", rows), str(tmp_path / "out"), num_train_epochs=2,
        selection_max_new_tokens=8,
    )  # fmt: skip
    table = json.loads((tmp_path / "out" / "selection" / "selection.json").read_text())
    assert best == max(table["rows"], key=lambda row: row["rm_score"]["mean"])["checkpoint"]
    assert len(table["rows"]) == 2
