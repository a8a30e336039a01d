"""What `pt doctor` says: versions installed against those tested, the machine, and the precision to use on it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

from pt_core.registry import packages

# The set that is tested together (the workspace's constraint-dependencies; a test keeps the two equal).
TESTED = {
    "torch": "2.11.0",
    "torchvision": "0.26.0",
    "torchaudio": "2.11.0",
    "transformers": "5.23.0",
    "accelerate": "1.15.0",
    "peft": "0.21.2",
    "trl": "1.16.0",
    "datasets": "5.2.0",
    "torchmetrics": "1.9.0",
    "gguf": "0.19.0",
    "ray": "2.60.0",
    "numpy": "2.4.6",
    "safetensors": "0.8.0",
    "huggingface-hub": "2.4.0",
    "pydantic": "2.14.4",
    "PyYAML": "6.0.4",
    "typer": "0.29.2",
    "rich": "15.0.0",
    "filelock": "4.3.1",
    "packaging": "26.4",
    "matplotlib": "3.11.2",
    "tensorboard": "2.21.0",
    "scikit-learn": "1.9.1",
    "scipy": "1.17.1",
    "threadpoolctl": "3.8.0",
    "pillow": "13.0.0",
    "torch-geometric": "2.8.1",
    "rdkit": "2026.9.1",
    "open-clip-torch": "3.3.0",
    "pytest": "9.2.0",
    "pytest-timeout": "2.4.0",
    "pytest-xdist": "3.8.0",
    "hypothesis": "6.170.17",
    "ruff": "0.17.6",
    "mypy": "2.4.1",
    "types-PyYAML": "6.0.12.20261122",
}


def installed(name: str) -> str | None:
    """Version of an installed distribution."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def out_of_range(distribution: str) -> list[str]:
    """Requirements of one of our packages that the installed versions do not meet."""
    problems = []
    try:
        lines = requires(distribution) or []
    except PackageNotFoundError:  # a package whose distribution has another name
        return []
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        have = installed(requirement.name)
        if have is None or not requirement.specifier.contains(have, prereleases=True):
            problems.append(f"{distribution} needs {requirement}, installed: {have or 'nothing'}")
    return problems


def cpu_has_fast_bf16() -> bool:
    """Whether bf16 is worth while on this CPU (avx512_bf16 or amx); elsewhere float32 is faster."""
    flags = Path("/proc/cpuinfo")
    words = set(flags.read_text("utf-8", errors="replace").split()) if flags.is_file() else set()
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def fast_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fast_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which a frozen backbone computes fastest on a device, of those that training works in."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    if device.type == "cpu" and cpu_has_fast_bf16():
        return torch.bfloat16
    return torch.float32


def _memory() -> str:
    if not hasattr(os, "sysconf"):  # Windows
        return ""
    return f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB memory"


def report(console: Console) -> None:
    """Print the report."""
    table = Table("library", "installed", "tested")
    for name, tested in TESTED.items():
        have = installed(name)
        table.add_row(name, have or "-", tested, style=None if have in (None, tested) else "yellow")
    console.print(table)
    ours = ["pt-core", *(module.replace("_", "-") for module in packages().values())]
    console.print("packages: " + ", ".join(f"{name} {installed(name) or '-'}" for name in ours))
    for problem in [p for name in ours for p in out_of_range(name)]:
        console.print(problem, style="red", markup=False)
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    console.print(f"Python {platform.python_version()}, {os.cpu_count()} cores{_memory()}, GPU: {cuda}")
    device = fast_device()
    why = "" if device.type == "cuda" or cpu_has_fast_bf16() else " (this CPU has neither avx512_bf16 nor amx)"
    console.print(f"precision to use for a frozen backbone: {str(fast_dtype(device)).removeprefix('torch.')}{why}")
