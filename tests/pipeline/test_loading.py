"""A user's own data, in every form that the recipes take; and what is said when it is not there, or broken."""

import json
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict

from instruct_trl.pipeline.loading import held_out_split, load_split, load_splits

ROWS = {"prompt": ["a", "b"], "completion": [" c", " d"]}
LINES = "".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in zip(*ROWS.values(), strict=True))


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_one_file(tmp_path, suffix):
    path = tmp_path / f"rows.{suffix}"
    {"csv": Dataset.to_csv, "parquet": Dataset.to_parquet}.get(suffix, Dataset.to_json)(Dataset.from_dict(ROWS), path)
    assert load_split(path).to_dict() == ROWS


def test_a_saved_folder_and_its_splits(tmp_path):
    DatasetDict({"train": Dataset.from_dict(ROWS), "valid": Dataset.from_dict(ROWS)}).save_to_disk(tmp_path / "d")
    assert load_split(tmp_path / "d", "valid").to_dict() == ROWS
    with pytest.raises(ValueError, match="no split 'test', only train, valid"):
        load_split(tmp_path / "d", "test")


def test_a_folder_of_files(tmp_path):
    Dataset.from_dict(ROWS).to_json(tmp_path / "train.jsonl")
    assert load_split(tmp_path).to_dict() == ROWS


@pytest.mark.parametrize("form", ["file", "saved", "saved with splits", "files"])
def test_the_splits_there_are_under_a_home_and_under_a_name_with_brackets(tmp_path, monkeypatch, form):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "mine [v1]"
    if form == "file":
        path = path.with_suffix(".jsonl")
        path.write_text(LINES)
    elif form == "files":
        path.mkdir()
        for split in ("train", "test"):
            (path / f"{split}.jsonl").write_text(LINES)
    else:
        one = Dataset.from_dict(ROWS)
        (one if form == "saved" else DatasetDict({"train": one, "test": one})).save_to_disk(path)
    splits = load_splits(f"~/{path.name}")
    assert set(splits) == ({"train"} if form in ("file", "saved") else {"train", "test"})
    assert all(rows.to_dict() == ROWS for rows in splits.values())


@pytest.mark.parametrize(
    ("there", "train", "found"),
    [
        (["train", "test", "validation"], "train", "test"),
        (["train", "validation"], "train", "validation"),
        (["train", "dev", "extra"], "train", "dev"),
        (["train", "extra"], "train", None),
        (["test"], "test", None),
        (["train_sft", "train_prefs", "test_sft", "test_prefs"], "train_prefs", "test_prefs"),
    ],
)
def test_the_held_out_split_is_found_by_its_usual_names_and_is_never_the_train_split(there, train, found):
    assert held_out_split(dict.fromkeys(there, [1]), None, train, "d") == found


def test_a_split_that_is_asked_for_is_there_or_refused():
    splits = {"train": [1], "test": [1], "dev": []}
    assert held_out_split(splits, "test", "train", "d") == "test"
    with pytest.raises(ValueError, match="d has no split 'tset', only train, test, dev. Did you mean 'test'?"):
        held_out_split(splits, "tset", "train", "d")
    with pytest.raises(ValueError, match="'dev' of d is empty"):
        held_out_split(splits, "dev", "train", "d")


@pytest.mark.parametrize(
    ("name", "message"),
    [("gone.jsonl", "does not exist"), ("notes.txt", "Convert it"), ("nots.csv", "Did you mean 'note.csv'")],
)
def test_what_is_not_there(tmp_path, name, message):
    for there in ("notes.txt", "note.csv"):
        (tmp_path / there).write_text("hello")
    with pytest.raises(ValueError, match=message):
        load_split(tmp_path / name)


FAULTS = {
    "cut.jsonl": (LINES.encode()[:-8], "line 2: broken JSON .* near '"),
    "middle.jsonl": (b'{"a": 1}\n\n{"a": 2\n{"a": 3}\n', "line 3: broken JSON"),
    "array.json": (b'[\n {"a": 1},\n {"a": }\n]\n', "line 3: broken JSON"),
    "lists.jsonl": (b"[1, 2]\n[3, 4]\n", r"line 1: \[1, 2\] is not an object"),
    "words.jsonl": (b'{"a": 1}\n"b"\n', "line 2: 'b' is not an object"),
    "twice.jsonl": (b'{"a": "x", "a": "y"}\n', "line 1: an object names 'a' twice"),
    "half.jsonl": (b'{"a": "x\\ud83d"}\n', "line 1: .*half a character"),
    "latin.jsonl": ('{"a": "x"}\n{"a": "schön"}\n'.encode("latin-1"), "line 2: byte 0xf6 after .*sch' .*UTF-8.*iconv"),
    "wide.jsonl": (LINES.encode("utf-16"), "UTF-16.*iconv"),
    "empty.jsonl": (b"", "is empty: it has no rows"),
    "blank.jsonl": (b"\n\n", "has no rows"),
    "no_rows.json": (b"[]", "has no rows"),
    "no_columns.jsonl": (b"{}\n{}\n", "has no columns"),
    "long_row.csv": (b"a,b\n1,2\n1,2,3\n", "line 3: 3 cells, but the header has 2"),
    "quote.csv": (b'a,b\n"x\ny",2\n"z,3\n', "line 4: .*Close every quote"),
    "latin.csv": ("a,b\nschön,x\n".encode("latin-1"), "line 2: byte 0xf6"),
    "header.csv": (b"a,b\n", "no rows below its header"),
    "text.parquet": (LINES.encode(), "is not a parquet file"),
    "cut.parquet": (b"PAR1....", "is cut off"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_broken_file_is_named_with_its_line(tmp_path, name):
    content, message = FAULTS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"(?s){name}.*{message}"):
        load_splits(tmp_path / name)


def test_a_broken_file_of_a_folder_is_named(tmp_path):
    (tmp_path / "train.jsonl").write_text(LINES)
    (tmp_path / "test.jsonl").write_text(LINES[:-8])
    with pytest.raises(ValueError, match="test.jsonl, line 2: broken JSON"):
        load_splits(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "has no data files .*it is empty"),
        (("notes.md",), r"has no data files .*notes.md"),
        (("train.jsonl", "test.csv"), "has no data files that can be read as one dataset .*one type"),
        (("train(1).jsonl", "test(1).jsonl"), r"test\(1\).jsonl would be read as training rows.* Rename it test.jsonl"),
    ],
)
def test_a_folder_without_splits_is_refused(tmp_path, files, message):
    folder = tmp_path / "d"
    folder.mkdir()
    for name in files:
        (folder / name).write_text("prompt,completion\na,b\n" if name.endswith("csv") else LINES)
    with pytest.raises(ValueError, match=message):
        load_splits(folder)


def test_a_file_below_a_folder_called_train_may_have_any_name(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "test_questions.jsonl").write_text(LINES)
    assert list(load_splits(tmp_path)) == ["train"]


def test_a_file_of_a_folder_that_is_not_read_is_said(tmp_path, capsys):
    for name in ("train", "tset"):
        (tmp_path / f"{name}.jsonl").write_text(LINES)
    assert list(load_splits(tmp_path)) == ["train"]
    assert "also holds tset.jsonl, which is not read" in capsys.readouterr().out


def test_a_saved_dataset_that_was_cut_off(tmp_path):
    Dataset.from_dict(ROWS).save_to_disk(tmp_path / "d")
    (arrow,) = (tmp_path / "d").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:100])
    with pytest.raises(ValueError, match="saved dataset .*d could not be read.* Save it again"):
        load_splits(tmp_path / "d")


def test_a_hub_dataset_that_cannot_be_reached(monkeypatch, tmp_path):
    def fail(*_):
        raise ConnectionError("Couldn't reach 'me/rankings' on the Hub")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        ValueError, match="'me/rankings' is not a file or folder here, and .*hub: Couldn't reach .* network"
    ):
        load_splits("me/rankings")


def test_words_of_a_csv_stay_words_and_only_an_empty_cell_is_missing(tmp_path):
    (tmp_path / "d.csv").write_text('prompt,completion\nIs it NA?,None\n"say ""hi"",\nnow",null\nx,\n')
    assert load_split(tmp_path / "d.csv").to_dict() == {
        "prompt": ["Is it NA?", 'say "hi",\nnow', "x"],
        "completion": ["None", "null", None],
    }


def test_a_test_split_may_have_columns_and_number_types_of_its_own(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "ranks": [1, 2]}\n')
    (tmp_path / "test.jsonl").write_text('{"prompt": "b", "ranks": [1.5, 2], "labeler": "ann"}\n')
    assert load_split(tmp_path, "test").to_list() == [{"prompt": "b", "ranks": [1.5, 2.0], "labeler": "ann"}]


def test_fractions_and_columns_may_begin_far_down_a_large_file(tmp_path):
    """datasets tells the types of a json file by its first 10 MB."""
    rows = [{"prompt": "x" * 100_000, "ranks": [1, 2]}] * 110 + [{"prompt": "y", "ranks": [1.5, 2], "labeler": "ann"}]
    path = Path(tmp_path, "d.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = load_split(path)
    assert len(loaded) == 111
    assert loaded[110] == rows[110]
    assert loaded[0] == rows[0] | {"labeler": None}
