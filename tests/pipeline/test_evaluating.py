"""The evaluation of a user's own run, on tiny models: prompts as messages, and whose facts the report shows."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from datasets import Dataset
from report_example import example_models, example_report, win_of
from transformers import LlamaForCausalLM

from instruct_trl import RewardScorer
from instruct_trl.evaluation.language_modeling import mean_token_loss
from instruct_trl.models.generation import Completion
from instruct_trl.pipeline import evaluating
from instruct_trl.pipeline.evaluating import (
    EvaluateArguments,
    evaluate_models,
    model_paths,
    name_and_path,
    reward_model_figures,
    score_rankings,
)
from instruct_trl.pipeline.evaluation_report import make_report
from instruct_trl.pipeline.rewarding import write_page
from instruct_trl.pipeline.sampling import load_causal_lm, sample_answers
from instruct_trl.pipeline.stage import FINISHED
from instruct_trl.report import findings, pages
from instruct_trl.report.data import ModelResult, ReportData, load_report_data
from instruct_trl.report.pages import write_report


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


def test_deviations_and_descriptions_are_told_as_they_are_given(own):
    evaluate_models(own, own.folder("evaluation"))
    told = replace(own, deviations=["The policy is tiny."], labeler_description="the sum of all letters")
    assert load_of(own).deviations == []
    assert load_of(own).labeler == "own_labelers:plain"
    data = load_of(told)
    assert (data.deviations, data.labeler) == (["The policy is tiny."], "the sum of all letters")


RANKINGS = [
    {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [1, 2, 3]},  # right, right, right
    {"prompt": "p", "completions": ["a", "c", "b"], "ranks": [1, 4, 5]},  # the first right with both, 4-5 wrong
    {"prompt": "q", "completions": ["b", "a", "c"], "ranks": [2, 2, 2]},  # ties say nothing
]


def by_letter(prompts, completions):
    return [{"a": 3.0, "b": 2.0, "c": 1.0}[text] for text in completions]


def test_accuracy_on_rankings_by_places_apart(tmp_path):
    result = reward_model_figures(by_letter, tmp_path, Dataset.from_list(RANKINGS))
    assert (result["pair_accuracy"]["mean"], result["pair_accuracy"]["n_pairs"]) == (pytest.approx(5 / 6), 6)
    assert result["pair_accuracy"]["n"] == 1  # prompt
    assert result["by_rank_distance"]["1"]["mean"] == pytest.approx(3 / 4)  # a gap in the ranks is no distance
    assert result["by_rank_distance"]["2"]["mean"] == 1
    assert result["kendall_tau"]["mean"] == pytest.approx(2 / 3)


def test_both_pages_of_a_run_give_one_accuracy(tmp_path, capsys):
    """The run's report takes what the reward model's page says, not a second pass; of other rankings it asks anew."""
    rows, ours = Dataset.from_list(RANKINGS), score_rankings(by_letter, RANKINGS[:1])
    trainer = SimpleNamespace(evaluation_records=ours, accelerator=SimpleNamespace(is_main_process=True))
    write_page(trainer, str(tmp_path), [], None, None, rows)
    page = (tmp_path / "evaluation" / "report.md").read_text()
    figures = reward_model_figures(by_letter, tmp_path, rows)  # of three records by the scorer, of one on the page
    assert (
        figures["pair_accuracy"] == json.loads((tmp_path / "evaluation" / "metrics.json").read_text())["pair_accuracy"]
    )
    assert (figures["pair_accuracy"]["mean"], figures["pair_accuracy"]["n_pairs"]) == (1.0, 3)
    run = findings.reward_model(ReportData("run", [ModelResult("SFT")], reward_model=figures))
    for text in (page, run):
        assert "100\u00a0% of 3 held-out pairs" in text
    out = capsys.readouterr().out
    assert "reward model: 100.0 %" in out
    assert "The bag of words is missing" in out
    assert reward_model_figures(by_letter, tmp_path, rows.select([0, 1]))["pair_accuracy"]["n_pairs"] == 6


def test_without_matplotlib_the_figures_are_printed_all_the_same(tmp_path, capsys, monkeypatch):
    def missing():
        raise ImportError("no matplotlib here")

    monkeypatch.setattr(pages, "require_matplotlib", missing)
    rows = Dataset.from_list(RANKINGS)
    trainer = SimpleNamespace(
        evaluation_records=score_rankings(by_letter, RANKINGS), accelerator=SimpleNamespace(is_main_process=True)
    )
    write_page(trainer, str(tmp_path), [], None, rows, rows)
    out = capsys.readouterr().out
    assert "No page on the evaluation was written. no matplotlib here" in out
    assert "reward model: 83.3 %" in out
    assert "3 of the 3 rows of the test split have prompts that are also in the training rows" in out


def test_a_reward_model_without_a_page_gets_its_floors_from_the_runs_rankings(tmp_path, tokenizer):
    """The longer answer wins, and it is the one with "yes" in it; the scorer thinks the reverse."""

    def shortest(prompts, completions):
        return [-float(len(text)) for text in completions]

    shortest.processing_class = tokenizer
    rows = Dataset.from_list(
        [{"prompt": f"q{i} ", "completions": ["no", "yes it is"], "ranks": [2, 1]} for i in range(12)]
    )
    found = reward_model_figures(shortest, tmp_path, rows, rows)
    assert found["pair_accuracy"]["mean"] == 0
    for name in ("length", "bag_of_words"):
        assert found["floors"][name]["accuracy"]["mean"] == 1
        assert found["floors"][name]["lead"]["mean"] == -1
    assert reward_model_figures(shortest, tmp_path, rows)["floors"]["bag_of_words"] is None


@pytest.mark.parametrize(
    ("settings", "inputs", "known"),
    [
        ({}, {}, True),
        ({"dataset_name": "run/rankings"}, {}, True),
        ({"dataset_name": "run/rankings"}, {"dataset_name": "another digest"}, False),
        ({"dataset_name": "other.jsonl"}, {}, False),
        ({"shuffle_ranks": True}, {}, False),
    ],
)
def test_the_bag_learns_the_rankings_of_the_reward_model_or_none(own, settings, inputs, known):
    for stage in ("rankings", "reward_model"):
        (own.run / stage).mkdir()
    (own.run / "rankings" / "train.jsonl").write_text(json.dumps(RANKINGS[0]) + "\n")
    record = {"settings": settings, "inputs": inputs}
    (own.run / "reward_model" / "stage.finished.json").write_text(json.dumps(record))
    found = evaluating._training_rankings(replace(own, reward_model_path=None))
    assert (found is not None) == known


def test_rankings_without_untied_pairs_are_refused(tmp_path):
    rows = Dataset.from_list([{"prompt": "p", "completions": ["a", "b"], "ranks": [1, 1]}])
    with pytest.raises(ValueError, match="No record has a pair"):
        reward_model_figures(lambda prompts, completions: [0.0] * len(prompts), tmp_path, rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint_prompts": "mine.jsonl"}, "ppo_ptx holds no checkpoint-.* save_steps"),
        ({"other_runs": ["PPO=nowhere"]}, "'nowhere' holds no PPO log"),
        ({"other_runs": ["PPO-ptx=x"]}, "the name 'PPO-ptx' is this run's"),
    ],
)
def test_what_could_not_be_reported_is_refused_before_anything_is_sampled(own, changes, message):
    with pytest.raises(ValueError, match=message):
        evaluate_models(replace(own, ppo_model=None, **changes), own.folder("evaluation"))


def test_other_models_stand_between_sft_and_ppo_ptx():
    models = {"base_model": "b", "sft_model": "s", "ppo_model": "p"}
    run = EvaluateArguments(**models, other_models=["PPO=plain/policy", "prompted=x=y"])
    assert list(model_paths(run).items()) == [
        ("base", "b"),
        ("SFT", "s"),
        ("PPO", "plain/policy"),
        ("prompted", "x=y"),
        ("PPO-ptx", "p"),
    ]
    assert "base" not in model_paths(replace(run, base_model=None))
    with pytest.raises(ValueError, match="'SFT' is taken; give --sft_model"):
        model_paths(replace(run, other_models=["SFT=x"]))
    for entries in (["no path"], ["=x"], ["a="], ["a=1", "a=2"]):
        with pytest.raises(ValueError, match="other_runs: .* is not NAME=PATH"):
            name_and_path(entries, "other_runs")
