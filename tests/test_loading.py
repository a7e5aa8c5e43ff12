"""A user's own data, in every form that the recipes take; and what is said when it is not there."""

import pytest
from datasets import Dataset, DatasetDict

from instruct_trl.pipeline.loading import load_split

ROWS = {"prompt": ["a", "b"], "completion": [" c", " d"]}


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


@pytest.mark.parametrize(("name", "message"), [("gone.jsonl", "does not exist"), ("notes.txt", "Convert it")])
def test_what_is_not_there(tmp_path, name, message):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=message):
        load_split(tmp_path / name)
