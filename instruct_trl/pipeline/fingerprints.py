"""Digests of the local data and models that a stage read: it is noticed where they changed, not where they moved."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# The settings that name data or models. Names on the hub are left alone.
INPUTS = (
    "dataset_name",
    "demonstrations_name",
    "pretraining_dataset_name",
    "checkpoint_prompts",
    "model_name_or_path",
    "reward_model_path",
    "sft_path",
    "base_model",
    "sft_model",
    "ppo_model",
    "other_models",
    "prefixes",
    "models",
    "chat_template_path",
)
MODEL_FILES = (".safetensors", ".bin", ".gguf", ".json", ".jinja", ".model", ".txt")
DATA_FILES = (
    ".json",
    ".jsonl",
    ".csv",
    ".tsv",
    ".parquet",
    ".arrow",
    ".txt",
    ".gz",
    ".zip",
    ".xz",
    ".zst",
    ".bz2",
    ".md",
)
WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
SAMPLED = 2**28  # bytes from which weights are read in samples
_BLOCK = 2**16
# What a run or a library writes beside its input, later and at will.
_NOT_INPUT = re.compile(r"\..*|cache-.*\.arrow|tmp[a-z0-9_]{8}|trainer_state\.json|training_args\.bin|stage\.\w+\.json")


def fingerprints(settings: Mapping[str, Any], but: Path) -> dict[str, str]:
    """Setting → digest, of every setting that names local files; `but` is the folder that the stage writes to."""
    found = {}
    for name, path in _named(settings):
        digest = fingerprint(Path(path).expanduser(), but)
        if digest is not None:
            found[name] = digest
    return found


def _named(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(setting, path) for each path, those in lists of NAME=PATH and in mappings included."""
    for name in INPUTS:
        value = settings.get(name)
        if isinstance(value, str):
            yield name, value
        elif isinstance(value, Mapping):
            yield from ((f"{name} {inner}", str(path)) for inner, path in value.items())
        elif isinstance(value, (list, tuple)):
            yield from ((f"{name} {entry.partition('=')[0]}", entry.partition("=")[2]) for entry in map(str, value))


def fingerprint(path: Path, but: Path) -> str | None:
    """A digest of the content of a file, or of all files of a folder and their names; None where there is nothing.

    Of a model's folder the model's own files count, not checkpoints and logs in it. Large files of weights are read at
    65 places: training, merging or casting changes weights everywhere, and reading them whole would take as long as
    loading them. Data are read whole, however large: one row may have been mended.
    """
    if path.is_file():
        return _digest(path)
    if not path.is_dir():
        return None
    total = hashlib.blake2b(digest_size=16)
    for file in sorted(_files(path, but.absolute())):
        total.update(f"{file.relative_to(path).as_posix()} {_digest(file)}\n".encode())
    return total.hexdigest()


def _files(folder: Path, but: Path) -> Iterator[Path]:
    is_model = any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
    suffixes = MODEL_FILES if is_model else DATA_FILES + MODEL_FILES
    for root, folders, names in os.walk(folder):
        place = Path(root)
        folders[:] = [] if is_model else [name for name in folders if not _left_out(place / name, but)]
        for name in names:
            if name.endswith(suffixes) and not _NOT_INPUT.fullmatch(name) and (place / name).is_file():
                yield place / name


def _left_out(folder: Path, but: Path) -> bool:
    """Hidden folders, and those that a stage writes to."""
    written = any((folder / name).exists() for name in ("stage.started.json", "stage.finished.json"))
    return folder.name.startswith(".") or written or folder.absolute() == but


def _digest(path: Path) -> str:
    size = path.stat().st_size
    with open(path, "rb") as file:
        if path.suffix not in WEIGHTS or size < SAMPLED:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        sampled = hashlib.blake2b(str(size).encode(), digest_size=16)
        for part in range(65):
            file.seek((size - _BLOCK) * part // 64)
            sampled.update(file.read(_BLOCK))
    return sampled.hexdigest()
