"""The pretraining stream deals every text once before any comes twice, and shares them out among processes."""

import pytest
import torch
from datasets import Dataset

from instruct_trl.data.pretraining import PretrainingStream


def stream(tokenizer, n=10, **kwargs):
    texts = Dataset.from_dict({"input_ids": [[i, i + 100] for i in range(n)]})
    return PretrainingStream(texts, tokenizer, max_length=8, **kwargs)


def test_no_text_repeats_before_the_end_and_the_next_pass_has_another_order(tokenizer):
    s = stream(tokenizer)
    dealt = [row[0] for row in s.draw(10)]
    assert sorted(dealt) == list(range(10))
    again = [row[0] for row in s.draw(10)]
    assert sorted(again) == list(range(10))
    assert again != dealt


def test_a_draw_may_cross_the_end(tokenizer):
    s = stream(tokenizer)
    first, second = s.draw(7), s.draw(7)
    assert sorted(row[0] for row in first + second[:3]) == list(range(10))


def test_processes_share_a_draw_without_overlap(tokenizer):
    parts = [stream(tokenizer, rank=rank, world_size=2) for rank in range(2)]
    whole = [row[0] for row in stream(tokenizer).draw(8)]
    assert [row[0] for part in parts for row in part.draw(4)] == whole


def test_a_position_is_all_that_resuming_needs(tokenizer):
    s = stream(tokenizer)
    s.draw(13)
    later = stream(tokenizer)
    later.position = s.position
    assert later.draw(4) == s.draw(4)


def test_texts_are_cut_and_counted(tokenizer):
    texts = Dataset.from_dict({"text": ["a" * 5, "b" * 12, "c" * 9]})
    s = PretrainingStream(texts, tokenizer, max_length=8)
    assert s.truncated == 2
    assert sorted(len(row) for row in s.rows) == [5, 8, 8]


def test_collate_pads_on_the_right_and_ignores_padding_in_the_labels(tokenizer):
    batch = stream(tokenizer).collate([[1, 2, 3], [4]], torch.device("cpu"))
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 257, 257]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[1, 2, 3], [4, -100, -100]]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"txt": ["a b"]}, "has no column 'text' or 'input_ids'"),
        ({"text": ["abc", "a"]}, "row 1 .* fewer than 2 tokens"),
    ],
)
def test_bad_texts_are_refused(tokenizer, columns, message):
    with pytest.raises(ValueError, match=message):
        PretrainingStream(Dataset.from_dict(columns), tokenizer, max_length=8)
