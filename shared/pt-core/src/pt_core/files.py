"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write(path: str | Path, content: str | bytes) -> None:
    """Write a file beside its place, then rename it: a kill at any moment leaves the old one or the new one."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
