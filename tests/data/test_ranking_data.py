"""Ranking rows: what is accepted, what is refused and how, and the batch they become."""

import doctest

import pytest
import torch
from datasets import Dataset, IterableDataset

from instruct_trl.data import encoding, ranking_batch
from instruct_trl.data.ranking import _key, parse_ranking, prepare_ranking_dataset, tokenize_ranking
from instruct_trl.data.ranking_batch import RankingCollator
from instruct_trl.data.rows import require_columns

GOOD = {"prompt": "ab", "completions": ["cd", "e", "fgh"], "ranks": [2, 7, 2]}


def rows(**changes):
    return Dataset.from_list([GOOD, {**GOOD, **changes}])


def prepare(dataset, tokenizer, **kwargs):
    return prepare_ranking_dataset(dataset, tokenizer, where="the train dataset", **kwargs)


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


def test_text_is_tokenised_jointly_with_eos(tokenizer):
    dataset, report = prepare(Dataset.from_list([GOOD]), tokenizer)
    texts = [tokenizer.decode(row) for row in dataset[0]["input_ids"]]
    assert texts == ["abcd<|eos|>", "abe<|eos|>", "abfgh<|eos|>"]
    assert dataset[0]["ranks"] == [1, 2, 1]
    assert sorted(dataset[0]["pairs"]) == [[0, 1], [2, 1]]
    assert dataset[0]["weight"] == 1.0
    assert "margins" not in dataset.column_names
    assert (report.prompts, report.dropped_prompts, report.overlong_rows, report.tied_prompts) == (1, 0, 0, 0)


def test_conversations_go_through_the_chat_template(tokenizer):
    row = {"prompt": user("ab"), "completions": [assistant("cd"), assistant("e")], "scores": [0.1, 0.9]}
    dataset, _ = prepare(Dataset.from_list([row]), tokenizer)
    texts = [tokenizer.decode(ids) for ids in dataset[0]["input_ids"]]
    assert texts == ["<|user|>ab<|eos|><|assistant|>cd<|eos|>", "<|user|>ab<|eos|><|assistant|>e<|eos|>"]
    assert dataset[0]["ranks"] == [2, 1]


def test_an_answer_cut_at_the_limit_gets_no_eos(tokenizer):
    text = {**GOOD, "truncated": [False, True, False]}
    dataset, _ = prepare(Dataset.from_list([text]), tokenizer)
    assert [tokenizer.decode(ids) for ids in dataset[0]["input_ids"]] == ["abcd<|eos|>", "abe", "abfgh<|eos|>"]
    chat = {"prompt": user("ab"), "completions": [assistant("cd"), assistant("e")], "ranks": [1, 2]}
    dataset, _ = prepare(Dataset.from_list([{**chat, "truncated": [True, False]}]), tokenizer)
    assert tokenizer.decode(dataset[0]["input_ids"][0]) == "<|user|>ab<|eos|><|assistant|>cd"


def test_eos_in_the_text_is_not_doubled(tokenizer):
    dataset, _ = prepare(Dataset.from_list([{**GOOD, "completions": ["c<|eos|>", "d", "e"]}]), tokenizer)
    assert tokenizer.decode(dataset[0]["input_ids"][0]) == "abc<|eos|>"


def test_rows_of_one_prompt_have_one_key(tokenizer):
    """By another labeler, with other completions, or in chosen and rejected, which both begin with the prompt."""
    rankings = [{**GOOD, "completions": ["xy", "z"], "ranks": [2, 1]}, GOOD, {**GOOD, "prompt": "another"}]
    implicit = [{"chosen": f"ab {won}", "rejected": f"ab {lost}"} for won, lost in (("c", "d"), ("e", "f"))]
    messages = [{"prompt": user("ab"), "chosen": assistant("c"), "rejected": assistant("d")}]
    messages += [{"chosen": user("ab") + assistant(won), "rejected": user("ab") + assistant("f")} for won in "cd"]
    alone = [{"chosen": "x", "rejected": "y"}] * 2
    keys = [tokenize_ranking(row, 0, tokenizer, None, None, "rows")["prompt_key"] for row in rankings + implicit]
    assert (keys[0] == keys[1], keys[1] == keys[2], keys[3] == keys[4]) == (True, False, True)
    parsed = [_key(parse_ranking(row).prompt, row) for row in messages + alone]
    assert len(set(parsed[:3])) == 1
    assert parsed[3:] == [None, None]


@pytest.mark.parametrize("with_prompt", [True, False])
def test_chosen_and_rejected_are_two_completions(tokenizer, with_prompt):
    start = "" if with_prompt else "ab"
    row = {"chosen": start + "cd", "rejected": start + "e", **({"prompt": "ab"} if with_prompt else {})}
    dataset, _ = prepare(Dataset.from_list([row]), tokenizer)
    assert [tokenizer.decode(ids) for ids in dataset[0]["input_ids"]] == ["abcd<|eos|>", "abe<|eos|>"]
    assert dataset[0]["ranks"] == [1, 2]


def test_overlong_rows_are_dropped_and_counted(tokenizer):
    # tokens with EOS: 5, 4, 6 for GOOD; the second row keeps one completion and goes
    dataset, report = prepare(rows(completions=["cd", "longer", "longer"]), tokenizer, max_length=5)
    assert len(dataset) == 1
    assert [len(ids) for ids in dataset[0]["input_ids"]] == [5, 4]
    assert (report.overlong_rows, report.dropped_prompts, report.long_prompts) == (3, 1, 0)
    assert report.dropped_pairs == 3  # 1 of the first row's 2, both of the second's
    line = report.line("the train dataset", 5, None)
    assert "3 completions longer than max_length=5" in line
    assert "1 prompts left with fewer than two completions" in line


def test_ranks_are_renumbered_after_dropping(tokenizer):
    row = {**GOOD, "completions": ["longer", "c", "d"], "ranks": [1, 2, 3]}
    dataset, _ = prepare(Dataset.from_list([row]), tokenizer, max_length=5)
    assert dataset[0]["ranks"] == [1, 2]
    assert dataset[0]["pairs"] == [[0, 1]]


@pytest.mark.parametrize("prompt", ["much too long", user("much too long")])
def test_long_prompts_are_dropped_and_counted(tokenizer, prompt):
    answers = ["c", "d"] if isinstance(prompt, str) else [assistant("c"), assistant("d")]
    short = prompt[:2] if isinstance(prompt, str) else user("m")
    data = Dataset.from_list([{"prompt": p, "completions": answers, "ranks": [1, 2]} for p in (prompt, short)])
    limit = 3 if isinstance(prompt, str) else 25
    dataset, report = prepare(data, tokenizer, max_prompt_length=limit)
    assert (len(dataset), report.long_prompts, report.dropped_prompts) == (1, 1, 1)
    with pytest.raises(ValueError, match="none of its 1 prompts fits .* max_prompt_length=1 .* Raise the limits"):
        prepare(data.select([0]), tokenizer, max_prompt_length=1)


def test_prompts_without_an_untied_pair_are_kept_and_counted(tokenizer):
    dataset, report = prepare(rows(ranks=[4, 4, 4]), tokenizer)
    assert (len(dataset), report.tied_prompts) == (2, 1)
    assert "1 prompts without an untied pair" in report.line("the train dataset", None, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": [1, 2]}, r"the train dataset, row 1: 3 completions but 2 ranks"),
        ({"completions": ["c"], "ranks": [1]}, r"row 1: 1 completion\(s\). A ranking needs at least 2"),
        ({"completions": [], "ranks": []}, r"row 1: 0 completion\(s\)"),
        ({"prompt": " "}, r"row 1: the prompt is empty"),
        ({"completions": ["c", "", "d"]}, r"row 1: completion 1 is empty"),
        ({"completions": ["c", None, "d"]}, r"row 1: completion 1 is empty"),
    ],
)
def test_bad_rows_are_named(tokenizer, changes, message):
    with pytest.raises(ValueError, match=message):
        prepare(rows(**changes), tokenizer)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_scores_that_cannot_be_ranked_are_refused(tokenizer, value):
    row = {"prompt": "a", "completions": ["b", "c"], "scores": [0.5, value]}
    with pytest.raises(ValueError, match=rf"row 0: scores\[1\] is {value}"):
        prepare(Dataset.from_list([row]), tokenizer)


def test_text_and_messages_do_not_mix(tokenizer):
    row = {"prompt": user("a"), "completions": ["b", "c"], "ranks": [1, 2]}
    with pytest.raises(ValueError, match="row 0: the prompt is a list of messages and the completion is plain text"):
        prepare(Dataset.from_list([row]), tokenizer)


def test_nothing_that_fits_is_refused(tokenizer):
    with pytest.raises(ValueError, match="none of its 2 prompts fits max_length=3"):
        prepare(rows(), tokenizer, max_length=3)


@pytest.mark.parametrize(
    ("wrong", "right"), [("completion", "completions"), ("rank", "ranks"), ("Prompt", "prompt"), ("score", "scores")]
)
def test_misspelt_columns_are_suggested(tokenizer, wrong, right):
    data = Dataset.from_list([{"prompt": "a", "completions": ["b", "c"], "ranks": [1, 2]}])
    data = data.rename_column("ranks" if right == "scores" else right, wrong)
    with pytest.raises(ValueError, match=rf"the train dataset has no column .*Did you mean '{wrong}'.*'{right}'\)"):
        prepare(data, tokenizer)


def test_missing_and_double_columns():
    data = Dataset.from_list([{"prompt": "a", "ranks": [1], "scores": [2.0]}])
    with pytest.raises(ValueError, match="no column 'completions'; it has 'prompt', 'ranks', 'scores'. Add"):
        require_columns(data, ["prompt", "completions", ("ranks", "scores")], "data")
    with pytest.raises(ValueError, match="'ranks', 'scores', which mean the same"):
        require_columns(data, ["prompt", ("ranks", "scores")], "data")
    require_columns(data, ["prompt", "scores"], "data")


def test_a_prepared_dataset_is_left_alone(tokenizer):
    dataset, _ = prepare(Dataset.from_list([GOOD]), tokenizer)
    assert prepare(dataset, tokenizer) == (dataset, None)


def test_streams_are_prepared_and_checked_as_they_are_read(tokenizer):
    stream = IterableDataset.from_generator(lambda: iter([GOOD, {**GOOD, "ranks": [1]}]))
    prepared, report = prepare(stream, tokenizer)
    assert report is None
    reader = iter(prepared)
    assert set(next(reader)) == {"input_ids", "ranks", "pairs", "weight", "prompt_key"}
    with pytest.raises(ValueError, match="row 1: 3 completions but 1 ranks"):
        next(reader)


def test_several_processes_give_the_same(tokenizer):
    one, first = prepare(rows(), tokenizer, max_length=5)
    two, second = prepare(rows(), tokenizer, max_length=5, num_proc=2)
    assert one.to_list() == two.to_list()
    assert first == second


def test_collator_flattens_and_pads_on_the_right():
    examples = [
        {"input_ids": [[5, 6, 7], [8]], "ranks": [2, 1]},
        {"input_ids": [[1], [2, 3], [4]], "ranks": [1, 1, 2]},
    ]
    batch = RankingCollator(pad_token_id=9)(examples)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9], [1, 9, 9], [2, 3, 9], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 0, 0], [1, 1, 0], [1, 0, 0]]
    assert batch["ranks"].tolist() == [[2, 1, 0], [1, 1, 2]]
    assert batch["mask"].tolist() == [[True, True, False], [True, True, True]]
    assert next(iter(batch)) == "ranks"  # transformers counts examples by the first tensor: 2 prompts, not 5 rows
    assert batch["pairs"].nonzero().tolist() == [[0, 1, 0], [1, 0, 2], [1, 1, 2]]  # from the ranks
    assert RankingCollator(9, pad_to_multiple_of=4)(examples)["input_ids"].shape == (5, 4)


def test_doctests_hold():
    for module in (ranking_batch, encoding):
        assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0
