"""Reading a user's own data: a hub name, a local folder, or one json, jsonl, csv or parquet file; and its splits."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from accelerate import PartialState

from instruct_trl.pipeline.file_faults import FILE_TYPES, fault_in
from instruct_trl.redaction import redact

HELD_OUT = ("test", "validation", "valid", "val", "dev", "eval", "evaluation", "heldout", "held_out")
"""Usual names of a split that is not trained on, in the order in which one is taken."""

_NAMED_HELD_OUT = re.compile(r"(test|valid|validation|val|dev|eval|evaluation)(?![a-z])", re.IGNORECASE)
_OPTIONS: dict[str, dict[str, Any]] = {
    "csv": {"keep_default_na": False, "na_values": [""]}  # "NA" and "None" are words; an empty cell alone is missing
}


def load_splits(name: str | Path, config: str | None = None) -> dict[str, Any]:
    """Every split of a dataset, name → `datasets.Dataset`: the one place that decides which splits there are.

    Args:
        name: a file of a known type, or a folder with one dataset saved by `save_to_disk` (both are one split, called
            `train`), a folder with a saved `DatasetDict` or with data files, or a name on the hub; `~` is the home.
        config: the hub dataset's configuration.

    Raises:
        ValueError: a path that does not exist, an unknown file type, no such dataset on the hub, or what cannot be
            read; says which file and line, as far as that is known, and what to do.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return {"train": _read_files([path])}
    if path.is_dir():
        return _read_folder(path, config)
    if path.suffix.lower() in FILE_TYPES or str(name).startswith((".", "/", "~")) or str(name).count("/") > 1:
        raise ValueError(f"The dataset {redact(str(name))} does not exist.{_beside(path)} Check the path.")
    return _read_hub(str(name), config)


def pick_split(splits: Mapping[str, Any], split: str, name: str | Path) -> Any:
    """The split of that name, with at least one row.

    Raises:
        ValueError: there is none, or it is empty; names the splits that there are.
    """
    if split not in splits:
        raise ValueError(
            f"{name} has no split {split!r}, only {', '.join(splits)}.{_did_you_mean(split, splits)} Choose one of "
            "these with --dataset_train_split and --dataset_test_split; a file is one split, called 'train'."
        )
    if not len(splits[split]):
        raise ValueError(f"The split {split!r} of {name} is empty. Give it rows, or leave it out.")
    return splits[split]


def load_split(name: str | Path, split: str = "train", config: str | None = None) -> Any:
    """One split of a dataset as a `datasets.Dataset`; see `load_splits` and `pick_split`."""
    return pick_split(load_splits(name, config), split, name)


def held_out_split(splits: Mapping[str, Any], asked: str | None, train: str, name: str | Path) -> str | None:
    """The split to evaluate on: the one asked for, else the first of a usual name, else None. Never `train`.

    Beside a train split such as `train_prefs`, `test_prefs` goes before `test`.

    Raises:
        ValueError: the split asked for is not there.
    """
    if asked is not None:
        pick_split(splits, asked, name)
        return asked
    usual = [train.replace("train", held_out) for held_out in HELD_OUT] + list(HELD_OUT)
    return next((split for split in usual if split in splits and split != train), None)


def _did_you_mean(wanted: str, there: Iterable[str], cutoff: float = 0.6) -> str:
    close = get_close_matches(wanted, list(there), n=1, cutoff=cutoff)
    return f" Did you mean {close[0]!r}?" if close else ""


def _beside(path: Path) -> str:
    """The file or folder that a path that is not there probably means."""
    there = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    return _did_you_mean(path.name, there, 0.8)


def _reason(error: BaseException) -> str:
    """The first two lines of what datasets, or what it met, said."""
    text = " ".join(str(error.__cause__ or error).split("\n")[:2]).strip() or type(error).__name__
    return (text if len(text) <= 300 else text[:300] + "…").rstrip(".") + "."


def _read_files(files: list[Path]) -> Any:
    """Files of one type as one dataset; an error says which of them is at fault, and where."""
    kind = FILE_TYPES.get(files[0].suffix.lower())
    if kind is None:
        raise ValueError(f"{files[0]} is not a {', '.join(FILE_TYPES)} file. Convert it to one of these.")
    options = _OPTIONS.get(kind, {})
    try:
        try:
            return _load(kind, files, **options)
        except Exception:
            if kind != "json":
                raise
            # The types of a json file are those of its first megabytes: fractions or columns may begin later.
            return _load(kind, files, chunksize=max(file.stat().st_size for file in files) + 1)
    except Exception as error:
        fault = next((fault for file in files if (fault := fault_in(file))), None)
        names = ", ".join(map(str, files))
        raise ValueError(
            fault or f"{names} could not be read: {_reason(error)} Mend what this names, or write the file anew."
        ) from error


def _load(kind: str, files: list[Path], **options: Any) -> Any:
    import datasets

    names = [glob.escape(str(file)) for file in files]  # datasets takes [ and ] for a pattern
    loaded = datasets.load_dataset(kind, data_files=names, split="train", **options)
    loaded.data.validate(full=True)  # Arrow reads text that is no UTF-8 without a word, and fails where it is used
    return loaded


def _read_folder(path: Path, config: str | None) -> dict[str, Any]:
    import datasets

    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        try:
            saved = datasets.load_from_disk(str(path))
        except Exception as error:
            raise ValueError(
                f"The saved dataset {path} could not be read: {_reason(error)} Save it again with save_to_disk, or "
                "copy it whole."
            ) from error
        return {"train": saved} if isinstance(saved, datasets.Dataset) else dict(saved)
    config = config if (path / "README.md").is_file() else None  # which is where a folder names its configurations
    files = _files_of_splits(path, config)
    kinds = {FILE_TYPES.get(file.suffix.lower()) for found in files.values() for file in found}
    if len(kinds) == 1 and None not in kinds:  # each by itself: a test split may have columns of its own
        return {split: _read_files(found) for split, found in files.items()}
    try:
        return dict(datasets.load_dataset(str(path.resolve()), config))
    except Exception as error:
        raise _no_data(path, error) from error


def _files_of_splits(path: Path, config: str | None) -> dict[str, list[Path]]:
    """Which data files of a folder are which split, as datasets tells by their names.

    Raises:
        ValueError: no data files, or several types; or files named as held out would be trained on.
    """
    import datasets

    full = str(path.resolve())
    kind = next((k for file in sorted(path.rglob("*")) if (k := FILE_TYPES.get(file.suffix.lower()))), None)
    try:
        if kind is not None and glob.escape(full) != full:  # brackets, which datasets takes for a pattern
            builder = datasets.load_dataset_builder(kind, data_dir=glob.escape(full))
        else:
            builder = datasets.load_dataset_builder(full, config)
    except Exception as error:
        raise _no_data(path, error) from error
    files = {str(split): [Path(file) for file in found] for split, found in (builder.config.data_files or {}).items()}
    _refuse_held_out_names(path, files)
    _say_unread(path, files)
    return files


def _say_unread(path: Path, files: Mapping[str, list[Path]]) -> None:
    read = {file.resolve() for found in files.values() for file in found}
    there = [file for file in sorted(path.iterdir()) if file.suffix.lower() in FILE_TYPES]
    left = [f.name for f in there if f.resolve() not in read and not f.name.startswith((".", "dataset_info"))]
    if left:
        PartialState().print(
            f"== Data: {path} also holds {', '.join(left[:5])}, which is not read: its splits are {', '.join(files)}. "
            "Name files train, validation and test."
        )


def _no_data(path: Path, error: Exception) -> ValueError:
    found = ", ".join(sorted(file.name for file in path.iterdir())[:5]) or "it is empty"
    return ValueError(
        f"The folder {path} has no data files that can be read as one dataset ({found}): {_reason(error)} Give it "
        f"train and test files of one type of {', '.join(FILE_TYPES)}, or name one file."
    )


def _refuse_held_out_names(path: Path, files: Mapping[str, list[Path]]) -> None:
    for file in files.get("train", []):
        meant = _NAMED_HELD_OUT.match(file.stem) if file.parent == path.resolve() else None  # train/test_1 is one's own
        if meant:
            raise ValueError(
                f"{file} would be read as training rows, since no split is recognised in its name. Rename it "
                f"{meant[0].lower()}{file.suffix}, and the training rows train{file.suffix}."
            )


def _read_hub(name: str, config: str | None) -> dict[str, Any]:
    import datasets

    try:
        return dict(datasets.load_dataset(name, config))
    except Exception as error:
        offline = " HF_HUB_OFFLINE is set." if datasets.config.HF_HUB_OFFLINE else ""
        raise ValueError(
            f"{redact(str(name))!r} is no file or folder here, and it could not be loaded from the Hugging Face hub: "
            f"{_reason(error)}{offline}{_beside(Path(name))} Check the path or the name, --dataset_config, the network "
            "and, for private data, `hf auth login`."
        ) from error
