"""A model's folder: its config, weights, adapter and tokenizer, and whether they are whole. No model is loaded."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

from peft import PeftConfig
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from instruct_trl.redaction import redact

ADAPTER = "adapter_config.json"
# Of a reward adapter. Not `config.json`, beside which transformers would look for full weights.
REWARD_CONFIG = "reward_config.json"

# Each config, with the weights beside it in the order in which transformers and PEFT look for them.
_WEIGHTS = {
    "config.json": [
        f"{name}{end}" for name in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json")
    ],
    ADAPTER: ["adapter_model.safetensors", "adapter_model.bin"],
}
_JSON = ("config.json", "tokenizer.json", "vocab.json", "special_tokens_map.json", ".index.json")
_ANY_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
_OF_TRAINING = ("training_args", "optimizer", "scheduler", "rng_state")  # which a checkpoint has beside its weights
_VOCABULARY = ("tokenizer.json", "tokenizer_config.json", "vocab.*", "*.model", "*.tiktoken", "tekken.json")
# Of the arguments of `from_pretrained`, those that say where a model lies.
_WHERE = ("revision", "subfolder", "token", "cache_dir", "trust_remote_code")
_AGAIN = "Download or copy the folder again, or name another model."


def check_model_path(path: str | Path, *, weights: bool = True, **kwargs: Any) -> None:
    """Refuse a path that is not there, or whose files are missing or cut short, with one line in place of a traceback.

    Args:
        path: local folder or hub name.
        weights: look at a folder's weights, too.
        kwargs: of the `from_pretrained` that is to come; `subfolder`, `token` and their like say where the model lies.

    Raises:
        ValueError: neither a folder with a whole model nor a reachable repository of the hub with this name.
    """
    path = str(path)
    if kwargs.get("gguf_file"):  # one file, of a format of its own
        return
    if os.path.isdir(path):
        folder = Path(path, kwargs.get("subfolder") or "")
        _check_config(folder)
        if weights:
            _check_weights(folder)
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


def _holds_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _WEIGHTS)


def _check_config(folder: Path) -> None:
    """Refuse a folder that holds no model, or whose json files cannot be read."""
    if not _holds_model(folder):
        inside = sorted(path.name for path in folder.iterdir() if _holds_model(path))
        remedy = f"Its folders {', '.join(inside)} hold one: name one of these." if inside else _AGAIN
        raise ValueError(f"The folder {str(folder)!r} holds no model: neither {' nor '.join(_WEIGHTS)}. {remedy}")
    for path in sorted(path for path in folder.glob("*.json") if path.name.endswith(_JSON)):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is broken or cut short: {error}. {_AGAIN}") from error


def _check_weights(folder: Path) -> None:
    """Refuse a model folder without weights, with a part of them missing, or with a file of them cut short."""
    for config, candidates in _WEIGHTS.items():
        if not (folder / config).is_file():
            continue
        found = next((folder / name for name in candidates if (folder / name).is_file()), None)
        parts = [found] if found else []
        if found is not None and found.suffix == ".json":
            names = set(json.loads(found.read_bytes()).get("weight_map", {}).values())
            parts = [folder / name for name in sorted(names)]
        for path in parts:
            if fault := _fault(path):
                raise ValueError(f"The weights of {str(folder)!r} {fault}: {path.name!r}. {_AGAIN}")
        if found is None and not any(
            path.name.endswith(_ANY_WEIGHTS) and not path.name.startswith(_OF_TRAINING) for path in folder.iterdir()
        ):
            raise ValueError(f"The folder {str(folder)!r} is incomplete: its weights are missing. {_AGAIN}")


def _fault(path: Path) -> str | None:
    """The fault of a file of weights, as the end of "The weights ..."; None if it is whole."""
    if not path.is_file():
        return "lack a file that their index names"
    with open(path, "rb") as file:
        start = file.read(20)
    if start.startswith(b"version https://git"):
        return "are a pointer of git-lfs, to be fetched with `git lfs pull`"
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):  # compares the header with the file's size
                return None
        whole = start and (not start.startswith(b"PK") or zipfile.is_zipfile(path))  # torch.save writes a zip archive
        return None if whole else "are cut short"
    except SafetensorError as error:
        return f"are cut short or damaged ({error})"


# Adapters -----------------------------------------------------------------------------------------------------------


def is_adapter(path: str | Path) -> bool:
    """True for the local folder of a PEFT adapter."""
    return os.path.isfile(os.path.join(path, ADAPTER))


def names_adapter(name: str | Path) -> bool:
    """As `is_adapter`, for names on the hub, too; False for one that cannot be read."""
    if os.path.isdir(name):
        return is_adapter(name)
    try:
        return find_adapter_config_file(str(name)) is not None
    except (OSError, ValueError):
        return False


def adapter_config(path: str | Path) -> PeftConfig:
    """The config of an adapter, by folder or name on the hub. Raises ValueError if there is none."""
    try:
        return PeftConfig.from_pretrained(str(path))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"There is no adapter at {str(path)!r} (no readable {ADAPTER}). Give the folder that the trainer saved "
            "with a peft_config."
        ) from error


def base_of_adapter(path: str | Path) -> str:
    """The folder or name of the model that an adapter was trained on, "" if it does not say."""
    return str(adapter_config(path).base_model_name_or_path or "")


def is_sft_adapter(path: str | Path) -> bool:
    """True for an adapter, by folder or name, that is not a classifier's, on which a reward adapter may be trained."""
    return names_adapter(path) and adapter_config(path).task_type != "SEQ_CLS"


def read_reward_config(path: str) -> dict[str, Any]:
    """The settings that RankingRewardTrainer wrote beside an adapter; {} for adapters of other makers."""
    file = cached_file(path, REWARD_CONFIG, _raise_exceptions_for_missing_entries=False)
    return json.loads(Path(file).read_text(encoding="utf-8")) if file else {}


def write_reward_config(folder: str | Path, model: Any, reward_bias: float, more: dict | None = None) -> None:
    """Write beside a reward adapter what PEFT does not: its bias, and how its base `model` was loaded."""
    saved = {key: value for key, value in (more or {}).items() if key != "quantization_config"}
    saved |= {"reward_bias": reward_bias, "dtype": str(model.dtype).removeprefix("torch.")}
    quantization = getattr(model.config, "quantization_config", None)
    if quantization is not None:
        saved["quantization_config"] = quantization if isinstance(quantization, dict) else quantization.to_dict()
    Path(folder, REWARD_CONFIG).write_text(json.dumps(saved, indent=2, default=str) + "\n", encoding="utf-8")


# Tokenizers ---------------------------------------------------------------------------------------------------------


def check_tokenizer(folder: str | Path) -> None:
    """Raise ValueError for a model's local folder without a tokenizer. Names on the hub pass."""
    if Path(folder).is_dir() and not any(any(Path(folder).glob(name)) for name in _VOCABULARY):
        raise ValueError(
            f"The model folder {str(folder)!r} has no tokenizer. Save the model's own into it "
            "(tokenizer.save_pretrained), or pass it as processing_class."
        )


def has_tokenizer(name: str) -> bool:
    """True for a folder, or a name on the hub, beside which a tokenizer was saved."""
    flags = {f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")}
    try:
        return bool(name) and any(
            cached_file(name, file, **flags) for file in ("tokenizer_config.json", "tokenizer.json")
        )
    except (OSError, ValueError):
        return False


def tokenizer_source(path: str) -> str:
    """Where the tokenizer of a model lies: beside it, or for an adapter without one beside its base."""
    return base_of_adapter(path) if path and names_adapter(path) and not has_tokenizer(path) else path


def load_tokenizer(path: str | Path, **kwargs: Any) -> Any:
    """The tokenizer of a model by its folder or name, read from `tokenizer_source`."""
    source = tokenizer_source(str(path))
    check_tokenizer(source)
    return AutoTokenizer.from_pretrained(source, **kwargs)
