"""The parts of the pipeline that are not trainers: ranks, accuracy on rankings, labelers, the demo's split."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from datasets import Dataset, DatasetDict
from trl.trainer.utils import get_callable_name

from instruct_trl import RewardScorer
from instruct_trl.pipeline import demo_data
from instruct_trl.pipeline import run as pipeline
from instruct_trl.pipeline.arguments import RunArguments
from instruct_trl.pipeline.evaluating import reward_model_figures, score_rankings, training_log
from instruct_trl.pipeline.rewarding import write_page
from instruct_trl.pipeline.run import load_labeler, make_what_is_missing, prompts_for, rewards_with_labeler
from instruct_trl.pipeline.sampling import ranks_of
from instruct_trl.pipeline.stage import FINISHED
from instruct_trl.report.data import ModelResult, ReportData
from instruct_trl.report.findings import reward_model_caption


def test_ranks_start_at_1_ties_share_and_the_next_is_skipped():
    assert ranks_of([0.1, 0.9, 0.5, 0.9]) == [4, 1, 3, 1]


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
    write_page(trainer, str(tmp_path), False, None, None, rows)
    page = (tmp_path / "evaluation" / "report.md").read_text()
    figures = reward_model_figures(by_letter, tmp_path, rows)  # of three records by the scorer, of one on the page
    assert (
        figures["pair_accuracy"] == json.loads((tmp_path / "evaluation" / "metrics.json").read_text())["pair_accuracy"]
    )
    assert (figures["pair_accuracy"]["mean"], figures["pair_accuracy"]["n_pairs"]) == (1.0, 3)
    run = reward_model_caption(ReportData("run", [ModelResult("SFT")], reward_model=figures))
    for text in (page, run):
        assert "100\u00a0% of 3 held-out pairs" in text
    assert reward_model_figures(by_letter, tmp_path, rows.select([0, 1]))["pair_accuracy"]["n_pairs"] == 6


def test_rankings_without_untied_pairs_are_refused(tmp_path):
    rows = Dataset.from_list([{"prompt": "p", "completions": ["a", "b"], "ranks": [1, 1]}])
    with pytest.raises(ValueError, match="No record has a pair"):
        reward_model_figures(lambda prompts, completions: [0.0] * len(prompts), tmp_path, rows)


def test_a_cut_answer_is_scored_the_same_by_flag_and_by_ids(reward_model, tokenizer):
    scorer = RewardScorer(reward_model, tokenizer)
    ids = tokenizer(" cut")["input_ids"]
    by_ids = scorer(["hello"], [" cut"], completion_ids=[ids])
    assert scorer(["hello"], [" cut"], truncated=[True]) == by_ids
    assert scorer(["hello"], [" cut"], truncated=[False]) == scorer(["hello"], [" cut"]) != by_ids


def test_the_demos_labeler_does_not_judge_other_data(tmp_path):
    run = RunArguments(run_dir=str(tmp_path), dataset_name="mine.jsonl", cpu_threads=1)
    with pytest.raises(ValueError, match="For your own data name yours"):
        load_labeler(run, "demo")
    with pytest.raises(ValueError, match="no such function"):
        load_labeler(run, "no_module:score")


def test_a_labeler_of_any_name_is_logged_where_the_report_looks(tmp_path, monkeypatch):
    (tmp_path / "labelers_of_mine.py").write_text(
        "def score(prompts, completions, **_):\n    return [float(len(c)) for c in completions]\n"
        "class Late:\n    async def __call__(self, **_):\n        return []\n"
        "late = Late()\n"
    )
    monkeypatch.chdir(tmp_path)
    run = SimpleNamespace(labeler="labelers_of_mine:score", dataset_name="mine.jsonl")
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


def test_own_prompts_that_judge_are_of_the_test_split(tmp_path, capsys):
    splits = {name: Dataset.from_list([{"prompt": name}]) for name in ("train", "test", "dev")}
    DatasetDict(splits).save_to_disk(tmp_path / "data")
    run = RunArguments(run_dir=str(tmp_path / "run"), dataset_name=str(tmp_path / "data"), cpu_threads=1)
    uses = ("rl", "selection", "test")
    assert [prompts_for(run, use)["prompt"][0] for use in uses] == ["train", "test", "test"]
    assert prompts_for(replace(run, dataset_test_split="dev"), "test")["prompt"][0] == "dev"
    assert "Prompts" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="no split 'tst', only train, test, dev. Did you mean 'test'?"):
        prompts_for(replace(run, dataset_test_split="tst"), "test")


@pytest.mark.parametrize("setting", ["ptx_coef", "pretraining_fraction"])
def test_ones_own_data_needs_texts_of_ones_own(setting):
    run = SimpleNamespace(dataset_name="mine.jsonl", pretraining_dataset_name=None)
    with pytest.raises(ValueError, match=f"{setting} > 0 needs --pretraining_dataset_name .* or set --{setting} 0"):
        pipeline.pretraining_texts(run, setting)


def test_a_pretraining_loss_on_texts_that_were_trained_on_says_so(tmp_path, capsys, monkeypatch):
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"t{i}"}) + "\n" for i in range(3)))
    run = RunArguments(run_dir=str(tmp_path / "run"), dataset_name="mine.jsonl", cpu_threads=1)
    run.pretraining_dataset_name = None
    assert pipeline.held_out_texts(run) is None
    run.pretraining_dataset_name = str(tmp_path / "texts.jsonl")
    assert pipeline.held_out_texts(run) == ["t0", "t1", "t2"]
    assert capsys.readouterr().out == ""
    folder = tmp_path / "run" / "ppo_ptx"
    folder.mkdir(parents=True)
    (folder / FINISHED).write_text(json.dumps({"settings": {"pretraining_dataset_name": run.pretraining_dataset_name}}))
    monkeypatch.setattr(pipeline, "HELD_OUT_TEXTS", 2)
    assert pipeline.held_out_texts(run) == ["t0", "t1"]
    said = capsys.readouterr().out
    assert "texts.jsonl holds the texts that ppo_ptx was trained on" in said
    assert "of 3 texts the first 2" in said
    (tmp_path / "other.jsonl").write_text(json.dumps({"body": "t"}) + "\n")
    run.pretraining_dataset_name = str(tmp_path / "other.jsonl")
    with pytest.raises(ValueError, match="other.jsonl has no column 'text' or 'input_ids'; it has 'body'"):
        pipeline.held_out_texts(run)


def test_rankings_of_ones_own_prompts_are_to_be_named(tmp_path):
    """They have no held-out part, and the demo's demonstrations must not set their bias."""
    folder = tmp_path / "rankings"
    folder.mkdir()
    (folder / "train.jsonl").write_text(json.dumps({"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2]}) + "\n")
    with pytest.raises(ValueError, match="--dataset_name .*train.jsonl, and --demonstrations_name"):
        pipeline.rankings(RunArguments(run_dir=str(tmp_path), cpu_threads=1))


def test_every_review_of_the_demo_has_one_use_and_labels_nothing_else(tmp_path, monkeypatch):
    reviews = [
        {
            "text": f"film {source}-{i} has a plot that is {'great' if i % 2 else 'awful'} {i}",
            "label": i % 2,
            "source": source,
        }
        for source, count in (("rotten_tomatoes", 120), ("imdb", 60))
        for i in range(count)
    ]
    trained = {}

    def train(texts, labels):
        trained["texts"] = texts
        return type("L", (), {"save": lambda *_: None, "accuracy": lambda _, texts, labels: texts})()

    monkeypatch.setattr(demo_data, "movie_reviews", lambda: reviews)
    monkeypatch.setattr(demo_data, "book_passages", lambda: [f"passage {i}" for i in range(20)])
    monkeypatch.setattr(demo_data.SentimentLabeler, "train", staticmethod(train))
    sizes = {"n_demonstrations": 8, "n_validation": 4, "n_reward_prompts": 8, "n_reward_test_prompts": 4}
    rest = {"n_rl_prompts": 8, "n_test_prompts": 4, "n_selection_prompts": 4, "n_pretraining_test": 5}
    args = demo_data.DemoDataArguments(**sizes, **rest)
    counts = demo_data.build_demo_data(tmp_path, args)
    assert counts["pretraining_train"] == 15
    asked = [json.loads(line)["prompt"] for line in (tmp_path / "test_prompts.jsonl").read_text().splitlines()]
    assert [" ".join(text.split()[:4]) for text in counts["labeler_accuracy_prompts"]] == asked
    assert len(trained["texts"]) == 126  # 180 reviews less 40 used above, less a tenth of the rest held out
    prompts = "".join(path.read_text() for path in tmp_path.glob("*prompts*.jsonl"))
    for text in trained["texts"]:
        assert " ".join(text.split()[:4]) + '"' not in prompts


def test_more_reviews_than_there_are_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_data, "movie_reviews", lambda: [])
    with pytest.raises(ValueError, match="only 0 left. Lower the sizes"):
        demo_data.build_demo_data(tmp_path, demo_data.DemoDataArguments())


@pytest.mark.parametrize(("yamls", "expected"), [((), "selected_sft/model"), (("rl_init.yaml",), "rl_init")])
def test_the_stages_run_in_the_papers_order_and_ppo_starts_from_the_rl_init(tmp_path, monkeypatch, yamls, expected):
    for name in yamls:
        (tmp_path / name).write_text("")
    calls = []

    def run_recipe(name, run, extra=None, config=None, **kwargs):
        calls.append((name, config, extra))
        return str(run.run / kwargs.get("stage", name))

    monkeypatch.setattr(pipeline, "run_recipe", run_recipe)
    run = RunArguments(run_dir=str(tmp_path / "run"), cpu_threads=1)
    run._config_folder = tmp_path
    run.reward_model_path = None
    policy = make_what_is_missing(run, "my-base")
    assert policy == str(tmp_path / "run" / expected)
    assert [name for name, _, _ in calls[:4]] == ["sft", "sample", "reward_model", "select_sft"]
    assert calls[0][2] == ["--model_name_or_path", "my-base"]
    assert [config for _, config, _ in calls[4:]] == [name.removesuffix(".yaml") for name in yamls]


def test_own_models_replace_every_stage_before_ppo(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "run_recipe", lambda *_, **__: pytest.fail("no stage is missing"))
    run = RunArguments(run_dir=str(tmp_path), dataset_name="mine.jsonl", cpu_threads=1)
    run.reward_model_path = "my-rm"
    assert make_what_is_missing(run, "my-policy") == "my-policy"


@pytest.mark.parametrize("dry", [(), ("--dry_run",)])
@pytest.mark.parametrize(
    ("yamls", "arguments", "says"),
    [
        ({}, (), "reward model that is a LoRA adapter; what .*reward_model.yaml trains is none"),
        ({}, ("--reward_model_path", "whole"), "reward model that is a LoRA adapter; whole is none"),
        ({"reward_model": "use_peft: true"}, (), "whole model that .*sft.yaml trains needs --use_peft"),
    ],
)
def test_one_base_is_refused_before_anything_is_trained(tmp_path, monkeypatch, yamls, arguments, says, dry):
    from instruct_trl.recipes import ppo_ptx

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, "prepare_output", lambda *_: pytest.fail("the run began"))
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
    monkeypatch.setattr(pipeline, "prepare_output", begin)
    for name in ("ppo_ptx", "sft", "reward_model"):
        (tmp_path / f"{name}.yaml").write_text("one_base: true" if name == "ppo_ptx" else "use_peft: true")
    with pytest.raises(BeganError):
        ppo_ptx.main(["--config", "ppo_ptx.yaml", "--cpu_threads", "1"])
