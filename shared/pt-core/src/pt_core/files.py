"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from pt_core.errors import InputError


def write(path: str | Path, content: str | bytes) -> None:
    """Write a file beside its place, then rename it: a kill at any moment leaves the old one or the new one."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def check_folder(folder: str | Path) -> None:
    """Refuse an output folder that could not be made, before anything is loaded for it.

    Raises:
        InputError: it is a file, or lies below one.
    """
    for place in (Path(folder), *Path(folder).parents):
        if place.exists() and not place.is_dir():
            raise InputError("is a file", file=place, remedy="Choose another output folder")
