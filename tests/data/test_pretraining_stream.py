"""The pretraining stream deals every text once before any comes twice, and shares them out among processes."""

import tracemalloc

import pytest
import torch
from datasets import Dataset, IterableDataset, load_dataset

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
    assert sorted(len(row) for row in s.draw(3)) == [5, 8, 8]


def test_collate_pads_on_the_right_and_ignores_padding_in_the_labels(tokenizer):
    batch = stream(tokenizer).collate([[1, 2, 3], [4]], torch.device("cpu"))
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 257, 257]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[1, 2, 3], [4, -100, -100]]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"txt": ["a b"]}, "has no column 'text' or 'input_ids'"),
        ({"text": ["abc", "a"]}, r"'text', row 1 .*'a'.* fewer than 2 tokens"),
        ({"text": ["abc", None]}, r"'text', row 1 .*None"),
        ({"text": ["abc", "de", "  "]}, r"'text', row 2 .*'  '"),
        ({"text": [12, 13]}, r"'text', row 0 .*12"),
        ({"input_ids": [[1, 2], [3]]}, r"'input_ids', row 1 .*\[3\].* fewer than 2 tokens"),
        ({"input_ids": [[1, 2], None]}, r"'input_ids', row 1 .*None"),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_bad_texts_are_refused(tokenizer, columns, message, streamed):
    texts = Dataset.from_dict(columns)
    texts = texts.to_iterable_dataset() if streamed else texts
    with pytest.raises(ValueError, match=message):
        PretrainingStream(texts, tokenizer, max_length=8).draw(3)


def test_the_order_is_that_of_seed_and_pass(tokenizer):
    s = stream(tokenizer, seed=5)
    for epoch in range(3):
        order = torch.randperm(10, generator=torch.Generator().manual_seed(5 + epoch))
        assert [row[0] for row in s.draw(10)] == order.tolist()


@pytest.mark.parametrize(("vocabulary", "width"), [(258, 2), (70_000, 4)])
def test_a_token_takes_at_most_four_bytes(tokenizer, monkeypatch, vocabulary, width):
    monkeypatch.setattr(type(tokenizer), "get_vocab", lambda self: {"the last": vocabulary - 1})
    texts = Dataset.from_dict({"text": [f"{i} " * 1000 for i in range(100)]})
    tracemalloc.start()
    s = PretrainingStream(texts, tokenizer, max_length=10_000)
    python = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    tokens = sum(len(row) for row in s.draw(100))
    assert tokens == sum(len(text) for text in texts["text"])  # a byte is a token
    held = s._rows.tokens.data.nbytes
    assert width <= held / tokens < width * 1.01  # beside the tokens, where each row begins
    assert python / tokens < 1


def test_what_was_tokenized_is_read_from_disk_by_the_next_process(tokenizer, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(f'{{"text": "text {i}"}}\n' for i in range(20)))
    first, second = (
        PretrainingStream(
            load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path)), tokenizer, max_length=4
        )._rows.tokens
        for _ in range(2)
    )
    assert first.cache_files == second.cache_files != []
    assert first._fingerprint == second._fingerprint


# -- streams ----------------------------------------------------------------------------------------------------------


def flowing(tokenizer, n=10, **kwargs):
    texts = Dataset.from_dict({"text": [f"{i:02d} text" for i in range(n)]})
    return PretrainingStream(texts.to_iterable_dataset(), tokenizer, max_length=5, **kwargs)


def first_words(rows, tokenizer):
    return [int(tokenizer.decode(row)[:2]) for row in rows]


def test_a_stream_repeats_no_text_before_its_end_and_has_a_new_order_then(tokenizer):
    s = flowing(tokenizer)
    one, two = (first_words(s.draw(10), tokenizer) for _ in range(2))
    assert sorted(one) == sorted(two) == list(range(10))
    assert one != two
    assert one != sorted(one)
    assert s.truncated == 20
    assert s.size is None
    assert first_words(flowing(tokenizer, seed=1).draw(10), tokenizer) != one


def test_a_stream_is_shared_and_resumed_as_stored_rows_are(tokenizer):
    whole = flowing(tokenizer).draw(24)
    parts = [flowing(tokenizer, rank=rank, world_size=2) for rank in range(2)]
    assert [row for _ in range(3) for part in parts for row in part.draw(4)] == whole
    later = flowing(tokenizer)
    later.position = 13
    assert later.draw(11) == whole[13:]
    later.position = 2
    assert later.draw(4) == whole[2:6]


def test_streamed_columns_without_text_are_refused(tokenizer):
    texts = Dataset.from_dict({"txt": ["a b"]}).to_iterable_dataset()
    with pytest.raises(ValueError, match="has no column 'text' or 'input_ids'"):
        PretrainingStream(texts, tokenizer, max_length=8)
    for empty in (Dataset.from_dict({"text": []}), texts.filter(lambda row: False)):
        with pytest.raises(ValueError, match="has no rows"):
            PretrainingStream(empty, tokenizer, max_length=8)


def test_a_stream_that_can_be_read_only_once_is_refused_where_it_ends(tokenizer):
    texts = iter(["a b c"] * 5)

    def rows():
        yield from ({"text": text} for text in texts)

    once = IterableDataset.from_generator(rows)
    stream = PretrainingStream(once, tokenizer, max_length=8)
    with pytest.raises(ValueError, match="no row when it was read for pass 1.*only once"):
        stream.draw(6)
