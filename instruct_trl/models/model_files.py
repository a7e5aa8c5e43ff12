"""What lies in a model's folder: config, weights, adapter, tokenizer, and whether they are whole. Nothing is loaded."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer
from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from instruct_trl.redaction import redact

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


# Not `config.json`, beside which transformers would look for full weights and overlook the adapter.
ADAPTER_CONFIG = "reward_config.json"


# Of the arguments of `from_pretrained`, those that say where a model lies.
_WHERE = ("revision", "subfolder", "token", "cache_dir", "trust_remote_code")


def check_model_path(path: str | Path, *, weights: bool = True, **kwargs: Any) -> None:
    """Refuse a path that is not there, or whose files are missing or cut short, with one line in place of a traceback.

    Args:
        path: local folder or hub name.
        weights: look at a folder's weights too, not at its config and tokenizer alone.
        kwargs: those that the model is going to be loaded with; `subfolder`, `token` and their like say where it lies.

    Raises:
        ValueError: neither a folder with a whole model nor a reachable repository of the hub with this name.
    """
    path, subfolder = str(path), kwargs.get("subfolder") or ""
    if kwargs.get("gguf_file"):  # one file, of a format of its own
        return
    if os.path.isdir(path):
        check_config(Path(path, subfolder))
        if weights:
            check_weights(Path(path, subfolder))
        return
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ValueError(f"There is no model folder {redact(path)!r}. Check the path, or train the model first.")
    try:
        AutoConfig.from_pretrained(path, **{name: kwargs[name] for name in _WHERE if kwargs.get(name)})
    except OSError as error:
        if names_adapter(path):
            return
        offline = " HF_HUB_OFFLINE is set and it is not in the cache." if os.environ.get("HF_HUB_OFFLINE") else ""
        raise ValueError(
            f"There is no model {path!r}: neither a local folder nor a repository that could be read.{offline} Check "
            "the name, or log in with `hf auth login` if it is private."
        ) from error


def is_adapter(path: str | Path) -> bool:
    """True for the folder of a PEFT adapter."""
    return os.path.isfile(os.path.join(path, "adapter_config.json"))


def names_adapter(name: str | Path) -> bool:
    """As `is_adapter`, for names on the hub, too; False for one that cannot be read."""
    if os.path.isdir(name):
        return is_adapter(name)
    try:
        return find_adapter_config_file(str(name)) is not None
    except (OSError, ValueError):
        return False


def has_tokenizer(name: str) -> bool:
    """True for a folder, or a name on the hub, beside which a tokenizer was saved."""
    files = ("tokenizer_config.json", "tokenizer.json")
    flags = {f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")}
    try:
        return bool(name) and any(cached_file(name, file, **flags) is not None for file in files)
    except (OSError, ValueError):
        return False


def tokenizer_beside(path: str) -> Any:
    """The tokenizer saved beside a model, by folder or name, or for an adapter beside its base; None without one."""
    from peft import PeftConfig

    if path and names_adapter(path) and not has_tokenizer(path):
        path = str(PeftConfig.from_pretrained(path).base_model_name_or_path)
    return AutoTokenizer.from_pretrained(path) if has_tokenizer(path) else None


def is_sft_adapter(path: str | Path) -> bool:
    """True for an adapter, by folder or name, that is not a classifier's, on which a reward adapter may be trained."""
    from peft import PeftConfig

    return names_adapter(path) and PeftConfig.from_pretrained(str(path)).task_type != "SEQ_CLS"


def tokenizer_source(path: str) -> str:
    """Where the tokenizer of a model lies: beside it, or for an adapter without one beside its base.

    Raises:
        ValueError: a local folder without one.
    """
    from peft import PeftConfig

    if names_adapter(path) and not has_tokenizer(path):
        path = str(PeftConfig.from_pretrained(path).base_model_name_or_path)
    check_tokenizer(path)
    return path
