"""The evaluation of a user's own run, on tiny models: prompts as messages, and whose facts the report shows."""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_config
from datasets import load_dataset
from instruct_trl.recipes.evaluate import EvaluateArguments
from instruct_trl.recipes.sample import SampleArguments
from report_example import example_models, example_report, win_of
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from instruct_trl import RewardScorer
from instruct_trl.data.ranking import prepare_ranking_dataset
from instruct_trl.evaluation.language_modeling import mean_token_loss
from instruct_trl.models.generation import Completion
from instruct_trl.pipeline import evaluating
from instruct_trl.pipeline.arguments import default_config
from instruct_trl.pipeline.evaluating import evaluate_models
from instruct_trl.pipeline.evaluation_report import make_report
from instruct_trl.pipeline.sampling import load_causal_lm, sample_answers, sample_rankings
from instruct_trl.pipeline.stage import FINISHED
from instruct_trl.report.data import ModelResult, load_report_data
from instruct_trl.report.pages import write_report

LABELER = """
def score(prompts, completions, **_):
    return plain([p[-1]["content"] for p in prompts], [c[0]["content"] for c in completions])


def plain(prompts, completions, **_):
    return [sum(map(ord, c)) + len(p) / 100 for p, c in zip(prompts, completions, strict=True)]
"""


@pytest.fixture
def own(tmp_path, tokenizer, monkeypatch):
    """Settings of an evaluation of tiny models on one's own prompts, as text; `chat.jsonl` has them as messages."""
    torch.manual_seed(0)
    for name, model in (
        ("policy", LlamaForCausalLM(tiny_config())),
        ("rm", LlamaForSequenceClassification(tiny_config(num_labels=1))),
    ):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    questions = [f"q{i}" for i in range(4)]
    chats = [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": q}] for q in questions]
    for name, prompts in (("text", questions), ("chat", chats)):
        lines = (json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    (tmp_path / "own_labelers.py").write_text(LABELER)
    monkeypatch.chdir(tmp_path)
    run = EvaluateArguments(
        run_dir="run", dataset_name="text.jsonl", labeler="own_labelers:plain", sft_model="policy", ppo_model="policy",
        reward_model_path="rm", max_completion_length=4, batch_size=4, cpu_threads=1,
    )  # fmt: skip
    run.folder("evaluation").mkdir(parents=True)
    return run


def test_prompts_as_messages_are_answered_judged_and_shown(own):
    run = replace(own, dataset_name="chat.jsonl", labeler="own_labelers:score")
    folder = run.folder("evaluation")
    evaluate_models(run, folder)
    data = json.loads((folder / "answers.json").read_text())
    row = data["models"]["PPO-ptx"]
    assert row["labeler"] == [sum(map(ord, text)) + 0.02 for text in row["completions"]]
    messages = [[{"role": "assistant", "content": text}] for text in row["completions"]]
    cut = [not ended for ended in row["ended"]]
    model, tokenizer = load_causal_lm(row["path"])
    answers = sample_answers(model, tokenizer, data["prompts"], run, seed=run.seed, desc="the same answers again")
    expected = RewardScorer("rm")(data["prompts"], messages, [answer.token_ids for answer in answers], truncated=cut)
    assert row["reward"] == pytest.approx(expected, abs=1e-5)
    page = make_report(run, folder).read_text()
    assert "system: Be brief." in page
    assert "user: q0" in page


def leave_behind(folder, text, seconds=7.0, score=None):
    """What a finished stage leaves, with `text` among its settings, and a PPO log of one row."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FINISHED).write_text(json.dumps({"settings": {"note": text}, "seconds": seconds}))
    if score is not None:
        state = {"log_history": [{"step": 1, "score": score, "kl": 1.0}]}
        (folder / "trainer_state.json").write_text(json.dumps(state))


def test_the_report_tells_of_the_evaluation_and_the_models_it_was_given(own, tmp_path):
    for stage in ("selected_sft", "reward_model", "evaluation"):
        leave_behind(own.run / stage, f"the run's {stage}")
    leave_behind(own.run / "ppo_ptx", "the run's ppo_ptx", score=1.0)
    elsewhere = tmp_path / "elsewhere"
    for stage in ("sft", "rm", "ppo"):
        leave_behind(elsewhere / stage, f"another {stage}", score=2.0)
    run = replace(own, output_dir=str(elsewhere / "evaluation"), ppo_model=str(elsewhere / "ppo" / "policy"))
    run = replace(run, sft_model=str(elsewhere / "sft" / "model"), reward_model_path=str(elsewhere / "rm"))
    folder = run.folder("evaluation")
    leave_behind(folder, "another evaluation", seconds=9.0)
    row = {"kl": 0.0, "labeler": [1.0, 2.0], "reward": [1.0, 2.0], "lengths": [3, 4], "ended": [True, False]}
    models = {name: row | {"completions": ["so it is", "it was not"]} for name in ("SFT", "PPO-ptx")}
    answers = json.dumps({"prompts": ["p", "q"], "models": models})
    (folder / "answers.json").write_text(answers)
    assert make_report(run, folder) == folder / "report.html"
    data = load_report_data(folder)
    assert [row["score"] for row in data.training] == [2.0]
    assert data.timings == {"reward_model": 7.0, "selected_sft": 7.0, "ppo_ptx": 7.0, "evaluation": 9.0}
    notes = {stage: settings["note"] for stage, settings in data.settings.items() if settings}
    assert notes == {
        "reward_model": "another rm",
        "selected_sft": "another sft",
        "ppo_ptx": "another ppo",
        "evaluation": "another evaluation",
    }
    assert not (own.run / "report.html").exists()
    # A policy without a log beside it has no PPO run to tell of; the default folder's report goes into the run.
    (own.run / "evaluation" / "answers.json").write_text(answers)
    assert make_report(own, own.run / "evaluation") == own.run / "report.html"
    assert load_report_data(own.run).training == []
    assert [r["score"] for r in load_of(replace(own, ppo_model=None)).training] == [1.0]


def load_of(run):
    return load_report_data(make_report(run, run.folder("evaluation")).parent)


def test_a_prefixed_model_is_asked_behind_its_prefix_and_cut_at_a_blank_line(own, tmp_path, monkeypatch, tokenizer):
    (tmp_path / "shots.txt").write_text("Q: a\nA: b\n\n")
    run = replace(own, other_models=["prompted=policy"], prefixes=["prompted=shots.txt"])
    texts = ["\n\nyes \n \nQ: more", "no end", "two\nlines\n\n", ""]
    asked = {}

    def sample(model, tokenizer, prompts, run, *, seed, desc):
        asked[desc] = prompts
        return [Completion(text, tokenizer(text)["input_ids"], truncated=True) for text in texts]

    monkeypatch.setattr(evaluating, "sample_answers", sample)
    folder = run.folder("evaluation")
    evaluate_models(run, folder)
    assert asked["answers of SFT"] == ["q0", "q1", "q2", "q3"]
    assert asked["answers of prompted"] == [f"Q: a\nA: b\n\nq{i}" for i in range(4)]
    rows = json.loads((folder / "answers.json").read_text())["models"]
    assert rows["SFT"]["completions"] == texts
    row = rows["prompted"]
    assert row["completions"] == ["\n\nyes", "no end", "two\nlines", ""]
    assert row["ended"] == [True, False, True, False]
    assert row["lengths"] == [6, 6, 10, 0]  # bytes, and one for the end where it was cut
    assert row["labeler"] == [sum(map(ord, text)) + 0.02 for text in row["completions"]]  # of the prompt alone
    model = load_of(run).model("prompted")
    assert (model.kl, model.pretraining_loss) == (None, None)
    assert model.win is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefixes": ["promted=shots.txt"]}, "no model of --other_models is called 'promted', only prompted"),
        ({"prefixes": ["SFT=shots.txt"]}, "no model of --other_models is called 'SFT'"),
        ({"prefixes": ["prompted=gone.txt"]}, "'gone.txt' of 'prompted' is not a file"),
        ({"prefixes": ["prompted=rm"]}, "'rm' of 'prompted' is not a file"),
        ({"dataset_name": "chat.jsonl"}, "prefixes need prompts of plain text; these are messages"),
    ],
)
def test_prefixes_that_could_not_be_used_are_refused_before_sampling(own, tmp_path, monkeypatch, changes, message):
    (tmp_path / "shots.txt").write_text("Q")
    monkeypatch.setattr(evaluating, "sample_answers", lambda *_, **__: pytest.fail("sampled"))
    run = replace(own, **{"other_models": ["prompted=policy"], "prefixes": ["prompted=shots.txt"]} | changes)
    with pytest.raises(ValueError, match=message):
        evaluate_models(run, run.folder("evaluation"))


@pytest.mark.parametrize("processes", [1, 2])
def test_several_processes_are_told_that_one_would_do(own, monkeypatch, capsys, processes):
    monkeypatch.setattr(evaluating, "PartialState", lambda: SimpleNamespace(num_processes=processes, print=print))
    monkeypatch.setattr(evaluating, "sample_answers", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate_models(own, own.folder("evaluation"))
    assert ("--num_processes 1" in capsys.readouterr().out) == (processes > 1)


def test_a_report_copes_with_a_model_without_kl_loss_and_tasks(tmp_path):
    base, *rest = example_models(None)
    prompted = ModelResult("prompted base", win_of(60, 40), length_correlation=0.1, mean_length=9.0)
    for models in ([base, prompted, *rest], [prompted, *rest], [base, *rest, prompted]):
        page = write_report(example_report(models=models), tmp_path).with_name("report.md").read_text()
        assert "| prompted base |" in page
        assert "None" not in page


def test_texts_of_ones_own_give_the_pretraining_loss(own, tmp_path, tokenizer):
    texts = ["so it was", "and so it is"]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    run = replace(own, pretraining_dataset_name="texts.jsonl")
    folder = run.folder("evaluation")
    evaluate_models(run, folder)
    rows = json.loads((folder / "answers.json").read_text())["models"]
    model = LlamaForCausalLM.from_pretrained("policy")
    assert rows["SFT"]["pretraining_loss"] == pytest.approx(mean_token_loss(model, tokenizer, texts)[0], rel=1e-5)
    page = make_report(run, folder).with_suffix(".md").read_text()
    assert "texts.jsonl" in page
    evaluate_models(own, folder)
    assert "pretraining_loss" not in json.loads((folder / "answers.json").read_text())["models"]["SFT"]


def test_the_demos_deviations_are_not_told_of_ones_own_data(own, tmp_path):
    evaluate_models(own, own.folder("evaluation"))
    folder = default_config("evaluate").parent
    assert (folder / "deviations.yaml").exists()
    for its in (folder, Path(os.path.relpath(folder)), folder.parent / "demo_long"):
        own._config_folder = its
        assert load_of(own).deviations == []
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "deviations.yaml").write_text("- The policy is tiny.\n")
    own._config_folder = mine
    assert load_of(own).deviations == ["The policy is tiny."]


def sampling_of(prompts, labeler):
    """Settings of three answers a prompt, and the stage's empty folder."""
    run = SampleArguments(
        run_dir="run", dataset_name=prompts, labeler=labeler, model_name_or_path="policy", num_completions=3,
        max_completion_length=4, batch_size=4, cpu_threads=1,
    )  # fmt: skip
    folder = run.folder("rankings")
    folder.mkdir(parents=True)
    return run, folder


def test_answers_outlive_a_labeler_that_fails(own, tmp_path):
    (tmp_path / "failing_labeler.py").write_text(
        "def score(prompts, completions, **_):\n    return [None if p == 'q2' else 1.0 for p in prompts]\n"
    )
    run, folder = sampling_of("text.jsonl", "failing_labeler:score")
    with pytest.raises(ValueError, match="'q2'.*kept without ranks in .*rankings_unranked_train.jsonl"):
        sample_rankings(run, folder)
    kept = [json.loads(line) for line in (folder.parent / "rankings_unranked_train.jsonl").read_text().splitlines()]
    sample_rankings(replace(run, labeler="none"), folder)
    unranked = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert kept == unranked


def test_rankings_of_messages_are_messages(own, tokenizer):
    run, folder = sampling_of("chat.jsonl", "own_labelers:score")
    sample_rankings(run, folder)
    rows = load_dataset("json", data_files=str(folder / "train.jsonl"), split="train")
    for row in rows:
        scores = [sum(map(ord, answer[0]["content"])) for answer in row["completions"]]
        assert row["ranks"] == [1 + sum(other > mine for other in scores) for mine in scores]
    prepare_ranking_dataset(rows, tokenizer)  # refuses strings beside messages
