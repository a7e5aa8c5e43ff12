"""Rows that are called held out are held out: which split is judged on, and what is said where that is not so."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_config
from datasets import Dataset, DatasetDict
from transformers import LlamaForCausalLM

from instruct_trl.evaluation.win_rate import win_rate
from instruct_trl.pipeline import rows
from instruct_trl.pipeline.arguments import RunArguments
from instruct_trl.pipeline.rows import overlap, prompts_to_judge, rl_prompts, train_and_test, trained_on
from instruct_trl.pipeline.selecting import SelectArguments, select_and_copy
from instruct_trl.pipeline.stage import FINISHED
from instruct_trl.report import findings as captions
from instruct_trl.report import findings_reward as reward_captions
from instruct_trl.report.data import ModelResult, ReportData


def prompts(*texts):
    return Dataset.from_list([{"prompt": text} for text in texts])


def save(folder, **splits):
    DatasetDict(splits).save_to_disk(folder)
    return str(folder)


@pytest.fixture
def run(tmp_path):
    return RunArguments(run_dir=str(tmp_path / "run"), cpu_threads=1)


@pytest.mark.parametrize("form", ["file", "one dataset", "two splits, none held out"])
def test_where_nothing_is_held_out_a_line_says_so_and_no_rows_come_back(tmp_path, run, capsys, form):
    name = tmp_path / "d"
    if form == "file":
        name = tmp_path / "d.jsonl"
        prompts("a").to_json(name)
    elif form == "one dataset":
        prompts("a").save_to_disk(name)
    else:
        save(name, train=prompts("a"), extra=prompts("b"))
    train, test = train_and_test(replace(run, dataset_name=str(name)))
    assert (list(train["prompt"]), test) == (["a"], None)
    assert "There is no test split in" in capsys.readouterr().out


def test_a_validation_split_takes_the_place_of_a_test_split_and_a_line_says_so(tmp_path, run, capsys):
    own = replace(run, dataset_name=save(tmp_path / "d", train=prompts("a"), validation=prompts("b")))
    assert list(train_and_test(own)[1]["prompt"]) == ["b"]
    assert "no split 'test'; its split 'validation' is held out" in capsys.readouterr().out
    assert list(prompts_to_judge(own, own.dataset_name)["prompt"]) == ["b"]
    assert list(rl_prompts(own)["prompt"]) == ["a"]
    asked = replace(own, dataset_test_split="validation")
    capsys.readouterr()
    train_and_test(asked)
    assert capsys.readouterr().out == ""


def test_the_train_split_cannot_be_asked_for_as_held_out_nor_a_split_that_is_missing(tmp_path, run):
    own = replace(run, dataset_name=save(tmp_path / "d", train=prompts("a"), test=prompts("b")))
    with pytest.raises(ValueError, match="train is the split that is trained on"):
        train_and_test(replace(own, dataset_test_split="train"))
    with pytest.raises(ValueError, match="no split 'tests'.* Did you mean 'test'?"):
        train_and_test(replace(own, dataset_test_split="tests"))


def test_prompts_to_judge_are_not_taken_from_one_of_several_splits_by_chance(tmp_path, run, capsys):
    name = save(tmp_path / "d", train=prompts("a"), extra=prompts("b"))
    with pytest.raises(ValueError, match="no test split in .*, only train, extra. Name the one .*--dataset_test_split"):
        prompts_to_judge(replace(run, dataset_name=name), name)
    prompts("c").save_to_disk(tmp_path / "one")
    assert list(prompts_to_judge(run, str(tmp_path / "one"))["prompt"]) == ["c"]
    assert "its only split, 'train', is used" in capsys.readouterr().out


def test_a_further_dataset_need_not_have_the_main_ones_splits(tmp_path, run):
    own = replace(run, dataset_name="mine", dataset_train_split="train_prefs", dataset_test_split="test_prefs")
    prompts("a").to_json(tmp_path / "d.jsonl")
    train, test = rows.further_rows(own, str(tmp_path / "d.jsonl"))
    assert (list(train["prompt"]), test) == (["a"], None)
    name = save(tmp_path / "d", train=prompts("a"), test=prompts("b"))
    assert [list(part["prompt"]) for part in rows.further_rows(own, name)] == [["a"], ["b"]]


def test_overlap_counts_rows_by_prompt_whatever_its_blanks_and_form():
    """Of the seven rows the first, second, third, fifth and last are of prompts that are trained on."""
    says = lambda text: [{"role": "user", "content": text}]  # noqa: E731
    train = Dataset.from_list([{"prompt": text} for text in ("a ", "b", "c")])
    test = Dataset.from_list([{"prompt": text} for text in ("a", " b", "b", "d", "c", "e", "a")])
    assert overlap(train, test) == 5
    assert overlap(Dataset.from_list([{"prompt": says("a")}]), train) == 1
    chats = [{"messages": [*says(q), {"role": "assistant", "content": r}]} for q, r in (("b", "x"), ("z", "y"))]
    assert overlap(train, Dataset.from_list(chats)) == 1
    turns = [*says("a"), {"role": "assistant", "content": "x"}, *says("b")]
    nulls = [{**turn, "tool_calls": None} for turn in turns]
    assert overlap(train, None) == 0
    assert overlap(Dataset.from_list([{"prompt": turns}]), Dataset.from_list([{"prompt": nulls}])) == 1
    assert overlap(train, Dataset.from_list([{"other": "a"}])) == 0


def test_shared_prompts_are_said(tmp_path, run, capsys):
    own = replace(run, dataset_name=save(tmp_path / "d", train=prompts("a", "b"), test=prompts("a", "c", "d")))
    train_and_test(own)
    assert "1 of 3 rows of the test split have prompts that are also in the training rows" in capsys.readouterr().out


def test_prompts_that_a_stage_was_trained_on_are_counted_where_its_data_can_be_read(tmp_path, run, capsys):
    prompts("a", "b").to_json(tmp_path / "sft.jsonl")
    save(tmp_path / "rl", train=prompts("c"), test=prompts("d"))
    names = {"sft": "sft.jsonl", "ppo_ptx": "rl", "reward_model": "moved.jsonl"}
    for stage, name in names.items():
        folder = tmp_path / "run" / stage
        folder.mkdir(parents=True)
        (folder / FINISHED).write_text(json.dumps({"settings": {"dataset_name": str(tmp_path / name)}}))
    own = replace(run, dataset_name="mine.jsonl")
    seen = trained_on(own, ["a", "c ", "d", "e", "a"])
    assert (seen["rows"], seen["of"]) == (3, 5)
    assert "3 of 5 prompts are also in the training rows of sft, ppo_ptx" in capsys.readouterr().out
    assert trained_on(own, ["d", "e"]) is None
    elsewhere = replace(own, run_dir=str(tmp_path / "other"))
    assert trained_on(elsewhere, ["a", "c"], [None, tmp_path / "run" / "ppo_ptx"])["rows"] == 1
    assert "rows of sft, so" in trained_on(own, ["a"], [str(tmp_path / "run" / "sft")])["note"]  # named once


@pytest.mark.parametrize(("rows", "verdict"), [(0, "better"), (5, "better"), (6, "missing")])
def test_pages_give_no_verdict_where_more_than_a_twentieth_was_trained_on(rows, verdict):
    seen = {"rows": rows, "of": 100, "note": "..."} if rows else None
    metrics = {"pair_accuracy": {"mean": 0.7, "low": 0.6, "high": 0.8, "n": 100, "n_pairs": 300}, "trained_on": seen}
    assert reward_captions.headline(metrics)[0] == verdict
    models = [ModelResult("SFT"), ModelResult("PPO", win=win_rate([1.0] * 50, [0.0] * 50))]
    data = ReportData("r", models, trained_on=seen or {})
    assert captions.headline(data)[0] == verdict


def test_a_best_checkpoint_needs_held_out_rows():
    args = SimpleNamespace(
        load_best_model_at_end=False, save_strategy="steps", eval_strategy="steps", eval_on_start=True
    )
    rows.evaluate_held_out(args, [1])
    assert (args.eval_strategy, args.eval_on_start) == ("steps", True)
    rows.evaluate_held_out(args, None)
    assert (args.eval_strategy, args.eval_on_start) == ("no", False)
    args.load_best_model_at_end = True
    with pytest.raises(ValueError, match="no test split.* best checkpoint"):
        rows.evaluate_held_out(args, None)


def test_sft_does_not_evaluate_on_its_training_rows(tmp_path, tokenizer, monkeypatch, capsys):
    from instruct_trl.recipes import sft

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config()).save_pretrained("policy")
    tokenizer.save_pretrained("policy")
    Dataset.from_list([{"prompt": f"q{i}", "completion": " a"} for i in range(4)]).save_to_disk("rows")
    (tmp_path / "c.yaml").write_text("max_steps: 1\nper_device_train_batch_size: 2\nreport_to: none\nbf16: false\n")
    sft.main(
        [
            *("--config", "c.yaml", "--cpu_threads", "1", "--model_name_or_path", "policy", "--dataset_name", "rows"),
            *("--output_dir", "out", "--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "no"),
        ]
    )
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert [row for row in log if "eval_loss" in row] == []
    assert "There is no test split in rows" in capsys.readouterr().out


def test_the_page_says_how_many_rows_were_trained_on_and_calls_them_not_held_out(tmp_path):
    from instruct_trl.report.pages import write_reward_report

    records = [{"rewards": [1.0, 0.0], "pairs": [[0, 1]], "lengths": [3, 4], "prompt_length": 5} for _ in range(8)]
    metrics = write_reward_report(records, tmp_path, title="t", trained_on=(2, 8))
    assert metrics["trained_on"] == {"rows": 2, "of": 8}
    page = (tmp_path / "report.md").read_text()
    assert "2 of the 8 rows of the test split have prompts that are also in the training rows" in page
    assert "of held-out pairs" not in page


def test_a_selection_on_prompts_that_were_trained_on_says_so(tmp_path, run, policy, reward_model, tokenizer):
    prompts("a", "b", "c").to_json(tmp_path / "d.jsonl")
    for model, name in ((policy, "run/sft/checkpoint-1"), (reward_model, "rm")):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "out").mkdir()
    settings = {"settings": {"dataset_name": str(tmp_path / "d.jsonl")}}
    (tmp_path / "run" / "sft" / FINISHED).write_text(json.dumps(settings))
    own = SelectArguments(
        run_dir=run.run_dir, dataset_name=str(tmp_path / "d.jsonl"), reward_model_path=str(tmp_path / "rm"),
        batch_size=1, max_completion_length=1,
    )  # fmt: skip
    select_and_copy(own, tmp_path / "out")
    assert (
        "Not held out: 3 of 3 prompts are also in the training rows of sft"
        in (tmp_path / "out/selection.md").read_text()
    )


def test_own_prompts_that_judge_are_of_the_test_split(tmp_path, capsys):
    splits = {name: Dataset.from_list([{"prompt": name}]) for name in ("train", "test", "dev")}
    DatasetDict(splits).save_to_disk(tmp_path / "data")
    run = RunArguments(run_dir=str(tmp_path / "run"), dataset_name=str(tmp_path / "data"), cpu_threads=1)
    assert rl_prompts(run)["prompt"][0] == "train"
    judged = lambda run: prompts_to_judge(run, run.dataset_name)["prompt"][0]  # noqa: E731
    assert judged(run) == "test"
    assert judged(replace(run, dataset_test_split="dev")) == "dev"
    assert "Prompts" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="no split 'tst', only train, test, dev. Did you mean 'test'?"):
        judged(replace(run, dataset_test_split="tst"))


@pytest.mark.parametrize("setting", ["ptx_coef", "pretraining_fraction"])
def test_ones_own_data_needs_texts_of_ones_own(setting):
    with pytest.raises(ValueError, match=f"{setting} > 0 needs --pretraining_dataset_name .* or set --{setting} 0"):
        rows.pretraining_texts(RunArguments(), None, setting, 0.1)


def test_a_pretraining_loss_on_texts_that_were_trained_on_says_so(tmp_path, capsys, monkeypatch):
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"t{i}"}) + "\n" for i in range(3)))
    run = RunArguments(run_dir=str(tmp_path / "run"), dataset_name="mine.jsonl", cpu_threads=1)
    name = str(tmp_path / "texts.jsonl")
    assert rows.held_out_texts(run, None) is None
    assert rows.held_out_texts(run, name) == ["t0", "t1", "t2"]
    assert capsys.readouterr().out == ""
    folder = tmp_path / "run" / "ppo_ptx"
    folder.mkdir(parents=True)
    (folder / FINISHED).write_text(json.dumps({"settings": {"pretraining_dataset_name": name}}))
    monkeypatch.setattr(rows, "HELD_OUT_TEXTS", 2)
    assert rows.held_out_texts(run, name) == ["t0", "t1"]
    said = capsys.readouterr().out
    assert "texts.jsonl holds the texts that ppo_ptx was trained on" in said
    assert "the first 2 of 3 texts" in said
    (tmp_path / "other.jsonl").write_text(json.dumps({"body": "t"}) + "\n")
    with pytest.raises(ValueError, match="other.jsonl has no column 'text' or 'input_ids'; it has 'body'"):
        rows.held_out_texts(run, str(tmp_path / "other.jsonl"))


def test_rankings_are_the_runs_own_where_none_are_named(tmp_path):
    run = RunArguments(run_dir=str(tmp_path))
    with pytest.raises(ValueError, match="rankings holds no rankings yet. Run recipes/sample.py first"):
        rows.rankings_of(run)
    (tmp_path / "rankings").mkdir()
    (tmp_path / "rankings" / "train.jsonl").write_text("{}")
    assert rows.rankings_of(run) == str(tmp_path / "rankings")
    assert rows.rankings_of(replace(run, dataset_name="mine")) == "mine"
