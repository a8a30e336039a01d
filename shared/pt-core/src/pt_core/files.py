"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from pt_core.errors import InputError

FILE_BROWSERS = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})
"""Files that desktops leave in folders."""


def write(path: str | Path, content: str | bytes) -> None:
    """Write a file beside its place, then rename it: a kill at any moment leaves the old one or the new one.

    It is on the disk before it has its name, so that a power cut leaves no half of it there.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_at(file: Path, offset: int, data: bytes) -> None:
    """Write `data` at `offset`, cut off what follows, and return when it is on the disk."""
    with os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as handle:
        handle.seek(offset)
        handle.truncate()
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())


def sync(folder: Path) -> None:
    """Make the names in a folder durable (Windows cannot open folders, and does so itself)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError:  # some network disks have no such thing for folders
            pass
        finally:
            os.close(handle)


def check_folder(folder: str | Path) -> None:
    """Refuse an output folder that could not be made or written to, before anything is loaded for it.

    Raises:
        InputError: it is a file or a link to nothing, or lies below one; it, or the nearest folder above it, cannot be written.
    """
    place = next((p for p in (Path(folder), *Path(folder).parents) if os.path.lexists(p)), Path())
    problem = "cannot be written" if place.is_dir() else "is a file" if place.exists() else "is a link to nothing"
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise InputError(problem, file=place, remedy="Choose another output folder")
