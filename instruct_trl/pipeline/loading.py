"""Reading a user's own data: a hub name, a local folder, or one json, jsonl, csv or parquet file; and its splits."""

from __future__ import annotations

import codecs
import csv
import glob
import io
import json
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import datasets
from accelerate import PartialState

from instruct_trl.data.rows import shown
from instruct_trl.redaction import redact

FILE_TYPES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
HELD_OUT = ("test", "validation", "valid", "val", "dev", "eval", "evaluation", "heldout", "held_out")
"""Usual names of a split that is not trained on. The first one that is there is taken."""

_NAMED_HELD_OUT = re.compile(r"(test|valid|validation|val|dev|eval|evaluation)(?![a-z])", re.IGNORECASE)


def load_splits(name: str | Path, config: str | None = None) -> dict[str, Any]:
    """Every split of a dataset, name → `datasets.Dataset`.

    Args:
        name: a file of a known type, or a folder with one dataset saved by `save_to_disk` (both are one split, called
            `train`), a folder with a saved `DatasetDict` or with data files, or a name on the hub; `~` is the home.
        config: the hub dataset's configuration.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return {"train": _read_files([path])}
    if path.is_dir():
        return _read_folder(path, config)
    there = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    meant = _did_you_mean(path.name, there, 0.8)
    if path.suffix.lower() in FILE_TYPES or str(name).startswith((".", "/", "~")) or str(name).count("/") > 1:
        raise ValueError(f"The dataset {redact(str(name))} does not exist.{meant} Check the path.")
    try:
        return dict(datasets.load_dataset(str(name), config))
    except Exception as error:
        offline = " HF_HUB_OFFLINE is set." if datasets.config.HF_HUB_OFFLINE else ""
        raise ValueError(
            f"{redact(str(name))!r} is not a file or folder here, and could not be loaded from the Hugging Face hub: "
            f"{_reason(error)}{offline}{meant} Check the path or the name, --dataset_config, the network and, for "
            "private data, `hf auth login`."
        ) from error


def pick_split(splits: Mapping[str, Any], split: str, name: str | Path) -> Any:
    """The split of that name, with at least one row; refused with the names of the splits that there are."""
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
    """
    if asked is not None:
        pick_split(splits, asked, name)
        return asked
    usual = [train.replace("train", held_out) for held_out in HELD_OUT] + list(HELD_OUT)
    return next((split for split in usual if split in splits and split != train), None)


def _did_you_mean(wanted: str, there: Iterable[str], cutoff: float = 0.6) -> str:
    close = get_close_matches(wanted, list(there), n=1, cutoff=cutoff)
    return f" Did you mean {close[0]!r}?" if close else ""


def _reason(error: BaseException) -> str:
    """The first two lines of the error of datasets, or of its cause."""
    text = " ".join(str(error.__cause__ or error).split("\n")[:2]).strip() or type(error).__name__
    return (text if len(text) <= 300 else text[:300] + "…").rstrip(".") + "."


def _read_files(files: list[Path]) -> Any:
    """Files of one type as one dataset."""
    kind = FILE_TYPES.get(files[0].suffix.lower())
    if kind is None:
        raise ValueError(f"{files[0]} is not a {', '.join(FILE_TYPES)} file. Convert it to one of these.")
    # "NA" and "None" are words; an empty cell alone is missing.
    options: list[dict[str, Any]] = [{"keep_default_na": False, "na_values": [""]} if kind == "csv" else {}]
    if kind == "json":  # its types are those of its first megabytes: fractions or columns may begin later
        options.append({"chunksize": max(file.stat().st_size for file in files) + 1})
    escaped = [glob.escape(str(file)) for file in files]  # datasets takes [ and ] for a pattern
    for option in options:
        try:
            loaded = datasets.load_dataset(kind, data_files=escaped, split="train", **option)
            loaded.data.validate(full=True)  # Arrow reads text that is not UTF-8 without an error, and fails later
            return loaded
        except Exception as error:
            failed = error
    for file in files:
        _refuse_broken(file, kind)
    names = ", ".join(map(str, files))
    raise ValueError(f"{names} could not be read: {_reason(failed)} Fix this, or write the file again.") from failed


def _read_folder(path: Path, config: str | None) -> dict[str, Any]:
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        try:
            saved = datasets.load_from_disk(str(path))
        except Exception as error:
            fault = f"The saved dataset {path} could not be read: {_reason(error)} Save it again, or copy it whole."
            raise ValueError(fault) from error
        return {"train": saved} if isinstance(saved, datasets.Dataset) else dict(saved)
    config = config if (path / "README.md").is_file() else None  # a folder's README names its configurations
    full = str(path.resolve())
    try:
        kind = next((k for file in sorted(path.rglob("*")) if (k := FILE_TYPES.get(file.suffix.lower()))), None)
        if kind is not None and glob.escape(full) != full:  # brackets, which datasets takes for a pattern
            builder = datasets.load_dataset_builder(kind, data_dir=glob.escape(full))
        else:
            builder = datasets.load_dataset_builder(full, config)
        files = {str(split): [*map(Path, found)] for split, found in (builder.config.data_files or {}).items()}
        kinds = {FILE_TYPES.get(file.suffix.lower()) for found in files.values() for file in found}
        if len(kinds) != 1 or None in kinds:
            return dict(datasets.load_dataset(full, config))
    except Exception as error:
        found = ", ".join(sorted(file.name for file in path.iterdir())[:5]) or "it is empty"
        raise ValueError(
            f"The folder {path} has no data files that can be read as one dataset ({found}): {_reason(error)} Give it "
            f"train and test files of one type of {', '.join(FILE_TYPES)}, or name one file."
        ) from error
    _check_names(path, files)
    return {split: _read_files(found) for split, found in files.items()}  # a test split may have columns of its own


def _check_names(path: Path, files: Mapping[str, list[Path]]) -> None:
    """Refuse files that are named as held out and would be trained on; say which files are not read."""
    for file in files.get("train", []):
        meant = _NAMED_HELD_OUT.match(file.stem) if file.parent == path.resolve() else None  # train/test_1 is one's own
        if meant:
            raise ValueError(
                f"{file} would be read as training rows, since no split is recognised in its name. Rename it "
                f"{meant[0].lower()}{file.suffix}, and the training rows train{file.suffix}."
            )
    read = {file.resolve() for found in files.values() for file in found}
    there = [file for file in sorted(path.iterdir()) if file.suffix.lower() in FILE_TYPES]
    left = [f.name for f in there if f.resolve() not in read and not f.name.startswith((".", "dataset_info", "stage."))]
    if left:
        PartialState().print(
            f"== Data: {path} also holds {', '.join(left[:5])}, which is not read: its splits are {', '.join(files)}. "
            "Name files train, validation and test."
        )


# -- the fault of a broken file, looked for only when datasets could not read it ---------------------------------------


def _refuse_broken(path: Path, kind: str) -> None:
    """Raise an error that names the first fault, its line (from 1) and the remedy; pass if none is found."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be opened: {error.strerror}. Check the file and its permissions.") from error
    if not data:
        raise ValueError(f"{path} is empty: it has no rows. Write it again.")
    if kind == "parquet":
        if data[:4] != b"PAR1":
            begin = shown(data[:12])
            raise ValueError(f"{path} is not a parquet file: it begins with {begin}. Give it the ending of its type.")
        if data[-4:] != b"PAR1":
            raise ValueError(f"{path} is cut off. Copy, download or write it again.")
        return
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        meant = "UTF-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "WINDOWS-1252"
        raise ValueError(
            f"{path}, line {before.count(10) + 1}: byte {data[error.start]:#04x} after "
            f"{before[-20:].decode(errors='replace')!r} is not UTF-8, but probably {meant}. Convert the file: "
            f"iconv -f {meant} -t UTF-8 {path.name} > utf8{path.suffix}"
        ) from error
    (_refuse_json if kind == "json" else _refuse_csv)(path, text)


def _refuse_json(path: Path, text: str) -> None:
    """Of json lines, or of one array or object over several lines."""
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    first = lines[0][1] if lines else ""
    whole = first == "{" or (first.startswith("[") and not (len(lines) > 1 and first.endswith("]")))
    rows: list[Any] = []
    for number, piece in [(0, text)] if whole else lines:
        try:
            value = json.loads(piece, object_pairs_hook=_once)
            json.dumps(value, ensure_ascii=False).encode("utf-8")
            found = value if whole and isinstance(value, list) else [value]
            odd = [row for row in found if not isinstance(row, dict)]
            if odd:
                raise ValueError(f"{shown(odd[0])} is not an object. A json lines file has one {{...}} per line.")
        except ValueError as error:
            line, fault = number, str(error)
            if isinstance(error, json.JSONDecodeError):
                line = number or error.lineno
                around = shown(error.doc[max(0, error.pos - 30) : error.pos + 30])
                fault = f"broken JSON ({error.msg}, column {error.colno}), near {around}. Fix it; was the file cut off?"
            elif isinstance(error, UnicodeEncodeError):
                fault = f"it holds half a character ({error.object[error.start]!r}). Write the whole one."
            raise ValueError(f"{path}{f', line {line}' if line else ''}: {fault}") from error
        rows += found
    if not any(rows):
        raise ValueError(f"{path} has no {'columns' if rows else 'rows'}. Write it again.")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"an object names {twice!r} twice. Keep one of them.")
    return dict(pairs)


def _refuse_csv(path: Path, text: str) -> None:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    line = rows = 0  # the line before the row that is read, and the rows below the header
    try:
        for row in reader:
            if header is not None and len(row) > len(header):
                raise ValueError(
                    f"{path}, line {line + 1}: {len(row)} cells, but the header has {len(header)}. Put cells that hold "
                    'commas into "quotes".'
                )
            rows += header is not None
            header, line = header or row, reader.line_num
    except csv.Error as error:
        fault = f'{path}, line {line + 1}: {error}. Close every quote, and write one inside a cell as "".'
        raise ValueError(fault) from error
    if not rows:
        raise ValueError(f"{path} has no rows below its header. Write it again.")
