"""Peak memory of a call: what the benchmarks' columns of MB and MiB are."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def peak(run: Callable[[], Any], device: torch.device) -> int:
    """By how many bytes memory grows at most while a function runs; of a device that is not a GPU, the process's."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free goes back first, so that it is not used again unseen
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's peak is that of now, not that of loading
    except OSError:
        return _watched(run)
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _watched(run: Callable[[], Any]) -> int:
    """The peak as a thread sees it that looks every millisecond."""
    before, done = _status("VmRSS"), threading.Event()
    seen = [before]

    def watch() -> None:
        while not done.is_set():
            seen[0] = max(seen[0], _status("VmRSS"))
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return seen[0] - before


def _status(key: str) -> int:
    """VmRSS or VmHWM of this process in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
