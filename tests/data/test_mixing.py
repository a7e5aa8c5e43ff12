"""Pretraining rows among demonstrations: how many, which, and what is refused."""

from collections import Counter

import pytest
from datasets import Dataset, IterableDataset

from instruct_trl.data.pretraining import check_pretraining_mix, mix_pretraining, tokenize_pretraining


def rows(count, start):
    return Dataset.from_list([{"input_ids": [start + i, 0], "labels": [-100, 0]} for i in range(count)])


@pytest.mark.parametrize(
    ("demonstrations", "fraction", "expected"), [(90, 0.1, 10), (9, 0.1, 1), (30, 0.5, 30), (5, 0.75, 15)]
)
def test_the_fraction_is_of_all_examples(demonstrations, fraction, expected):
    mixed = mix_pretraining(rows(demonstrations, 0), rows(40, 1000), fraction, seed=0)
    assert sum(ids[0] >= 1000 for ids in mixed["input_ids"]) == expected
    assert expected / len(mixed) == fraction


def test_every_demonstration_stays_once_and_texts_repeat_only_when_all_were_used():
    mixed = mix_pretraining(rows(20, 0), rows(8, 1000), 0.5, seed=0)
    counts = Counter(ids[0] for ids in mixed["input_ids"])
    assert [counts[i] for i in range(20)] == [1] * 20
    assert sorted(counts[i] for i in range(1000, 1008)) == [2, 2, 2, 2, 3, 3, 3, 3]  # 20 draws from 8


def test_the_order_is_random_and_follows_the_seed():
    first, same, other = (mix_pretraining(rows(30, 0), rows(30, 1000), 0.5, seed=s)["input_ids"] for s in (0, 0, 1))
    assert list(first) == list(same)
    assert list(first) != list(other)
    assert any(ids[0] >= 1000 for ids in first[:30])


def test_texts_are_scored_in_full_and_get_no_eos(tokenizer):
    got = tokenize_pretraining(Dataset.from_dict({"text": ["abc"], "source": ["x"]}), tokenizer)
    assert got.column_names == ["input_ids", "labels"]
    assert tokenizer.decode(got[0]["input_ids"]) == "abc"
    assert got[0]["labels"] == got[0]["input_ids"]


def test_token_ids_are_taken_as_they_are(tokenizer):
    got = tokenize_pretraining(Dataset.from_dict({"input_ids": [[5, 6, 7]]}), tokenizer)
    assert got[0] == {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}


TEXTS = Dataset.from_dict({"text": ["abc"]})


@pytest.mark.parametrize(
    ("fraction", "data", "train", "packing", "message"),
    [
        (0.1, None, TEXTS, False, "fraction is 0.1, but no pretraining_dataset is given"),
        (0.0, TEXTS, TEXTS, False, "fraction is 0.0, but a pretraining_dataset is given"),
        (0.1, TEXTS, TEXTS, True, "set packing to false"),
        (
            0.1,
            IterableDataset.from_generator(lambda: iter([])),
            TEXTS,
            False,
            "pretraining_dataset must be a `datasets",
        ),
    ],
)
def test_settings_that_cannot_hold_are_refused(fraction, data, train, packing, message):
    with pytest.raises(ValueError, match=message):
        check_pretraining_mix(fraction, data, train, packing)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"texts": ["abc"]}, r"no column 'text' or 'input_ids'; it has 'texts'"),
        ({"text": ["abc", ""]}, r"column 'text', row 1 is empty \(''\)"),
        ({"text": []}, "has no rows"),
    ],
)
def test_bad_pretraining_data_is_refused(tokenizer, columns, message):
    with pytest.raises(ValueError, match=message):
        tokenize_pretraining(Dataset.from_dict(columns), tokenizer)


def test_a_fraction_below_one_example_is_refused():
    with pytest.raises(ValueError, match="less than one example"):
        mix_pretraining(rows(3, 0), rows(3, 1000), 0.1, seed=0)
