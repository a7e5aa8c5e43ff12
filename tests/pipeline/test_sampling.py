"""Rankings: sampled from train and held-out prompts, and ranked by a labeler that may fail."""

import json
from dataclasses import replace

import pytest
from datasets import load_dataset

from instruct_trl import RewardScorer
from instruct_trl.data.ranking import prepare_ranking_dataset
from instruct_trl.pipeline.sampling import SampleArguments, ranks_of, sample_rankings


def test_ranks_start_at_1_ties_share_and_the_next_is_skipped():
    assert ranks_of([0.1, 0.9, 0.5, 0.9]) == [4, 1, 3, 1]


def test_a_cut_answer_is_scored_the_same_by_flag_and_by_ids(reward_model, tokenizer):
    scorer = RewardScorer(reward_model, tokenizer)
    ids = tokenizer(" cut")["input_ids"]
    by_ids = scorer(["hello"], [" cut"], completion_ids=[ids])
    assert scorer(["hello"], [" cut"], truncated=[True]) == by_ids
    assert scorer(["hello"], [" cut"], truncated=[False]) == scorer(["hello"], [" cut"]) != by_ids


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


def test_prompts_of_a_held_out_split_become_held_out_rankings(own, tmp_path):
    (tmp_path / "both").mkdir()
    for split, name in (("train", "q"), ("test", "held out ")):
        lines = (json.dumps({"prompt": f"{name}{i}"}) + "\n" for i in range(2))
        (tmp_path / "both" / f"{split}.jsonl").write_text("".join(lines))
    run, folder = sampling_of("both", "own_labelers:plain")
    summary = sample_rankings(run, folder)
    assert (summary["train prompts"], summary["test prompts"]) == (2, 2)
    for split, name in (("train", "q"), ("test", "held out ")):
        rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        assert [row["prompt"] for row in rows] == [f"{name}{i}" for i in range(2)]
        assert all(sorted(row["ranks"])[0] == 1 for row in rows)
