"""Whether the files of a local model folder are there and whole: told from names, sizes and headers, nothing loaded."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

_JSON = ("config.json", "tokenizer.json", "vocab.json", "special_tokens_map.json", ".index.json")
CONFIGS = ("config.json", "adapter_config.json")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
_OF_TRAINING = ("training_args", "optimizer", "scheduler", "rng_state")  # which a checkpoint has beside its weights
# In the order in which transformers and PEFT look for them; the first that is there is the one that is read.
_NAMES = {
    "config.json": (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ),
    "adapter_config.json": ("adapter_model.safetensors", "adapter_model.bin"),
}
_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
)
_AGAIN = "Download or copy the folder again, or name another model."


def check_config(folder: Path) -> None:
    """Refuse a folder that holds no model, or whose json files cannot be read.

    Raises:
        ValueError: names the folder, or the file, and the remedy.
    """
    if not any((folder / name).is_file() for name in CONFIGS):
        inside = sorted(path.name for path in folder.iterdir() if any((path / name).is_file() for name in CONFIGS))
        remedy = f"Its folders {', '.join(inside)} hold one: name one of these." if inside else _AGAIN
        raise ValueError(f"The folder {str(folder)!r} holds no model: neither {' nor '.join(CONFIGS)}. {remedy}")
    for path in sorted(path for path in folder.glob("*.json") if path.name.endswith(_JSON)):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is broken or cut short: {error}. {_AGAIN}") from error


def check_tokenizer(folder: str | Path) -> None:
    """Refuse a model's local folder without a tokenizer. Names on the hub pass.

    Raises:
        ValueError: names the folder and the remedy.
    """
    if Path(folder).is_dir() and not any(any(Path(folder).glob(name)) for name in _TOKENIZERS):
        raise ValueError(
            f"The model folder {str(folder)!r} has no tokenizer. Save the model's own into it "
            "(tokenizer.save_pretrained), or pass it as processing_class."
        )


def check_weights(folder: Path) -> None:
    """Refuse a model folder without weights, with a part of them missing, or with a file of them cut short.

    Raises:
        ValueError: names the folder and the file, and the remedy.
    """
    for config, candidates in _NAMES.items():
        if (folder / config).is_file():
            found = next((folder / name for name in candidates if (folder / name).is_file()), None)
            for path in [] if found is None else _files_of(found):
                if problem := _problem(path):
                    raise ValueError(f"The weights of the model {str(folder)!r} {problem}: {path.name!r}. {_AGAIN}")
    weights = (path for path in folder.iterdir() if path.suffix in WEIGHTS and not path.name.startswith(_OF_TRAINING))
    if not any(path.is_file() for path in weights):
        raise ValueError(f"The model folder {str(folder)!r} is incomplete: its weights are missing. {_AGAIN}")


def _files_of(weights: Path) -> list[Path]:
    """The files with weights: those that an index names, or the one file."""
    if not weights.name.endswith(".index.json"):
        return [weights]
    return [
        weights.with_name(name) for name in sorted(set(json.loads(weights.read_bytes()).get("weight_map", {}).values()))
    ]


def _problem(path: Path) -> str | None:
    """The fault of a file of weights, as the end of "The weights ..."; None where it is whole."""
    if not path.is_file():
        return "lack a file that their index names"
    with open(path, "rb") as file:
        start = file.read(20)
    if start.startswith(b"version https://git"):
        return "are a pointer of git-lfs, to be fetched with `git lfs pull`"
    if path.suffix == ".safetensors":
        return _safetensors_problem(path)
    if not start or (start.startswith(b"PK") and not zipfile.is_zipfile(path)):  # torch.save writes a zip archive
        return "are cut short"
    return None


def _safetensors_problem(path: Path) -> str | None:
    """By the format: 8 bytes with the header's length, the header, and the tensors up to the last one's end."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if header_size + 8 > size:
            return "are cut short"
        try:
            header = json.loads(file.read(header_size))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return "have a header that cannot be read"
    whole = 8 + header_size + max(ends, default=0)
    return None if size == whole else f"are cut short or damaged ({size:,} bytes in place of {whole:,})"
