"""Reading a user's own data: a hub name, a local folder, or one json, jsonl, csv or parquet file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FILE_TYPES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_split(name: str | Path, split: str = "train", config: str | None = None) -> Any:
    """One split of a dataset as a `datasets.Dataset`.

    Args:
        name: a file of a known type (it is the split `train`, whatever `split` says), a folder saved by
            `save_to_disk` or holding data files, or a name on the hub.
        split: which split of a folder or hub dataset.
        config: the hub dataset's configuration.

    Raises:
        ValueError: a path that does not exist, an unknown file type, or no such split.
    """
    import datasets

    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix not in FILE_TYPES:
            raise ValueError(f"{path} is not a {', '.join(FILE_TYPES)} file. Convert it to one of these.")
        return datasets.load_dataset(FILE_TYPES[path.suffix], data_files=str(path), split="train")
    if path.is_dir() and ((path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()):
        loaded = datasets.load_from_disk(str(path))
        if isinstance(loaded, datasets.Dataset):
            return loaded
        return _pick(loaded, split, name)
    if not path.exists() and (path.suffix in FILE_TYPES or str(name).startswith((".", "/", "~"))):
        raise ValueError(f"The dataset {name} does not exist. Check the path given as --dataset_name.")
    return _pick(datasets.load_dataset(str(path) if path.is_dir() else str(name), config), split, name)


def _pick(loaded: Any, split: str, name: str | Path) -> Any:
    if split not in loaded:
        raise ValueError(f"{name} has no split {split!r}, only {', '.join(loaded)}. Choose one of these.")
    return loaded[split]
