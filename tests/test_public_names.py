"""Importing a package loads nothing heavy, and every public name is there."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

PACKAGES = ["pt_core", "pt_graph", "pt_nlp", "pt_vl"]
HEAVY = ["torch", "accelerate", "torchmetrics", "matplotlib", "transformers", "torchvision", "PIL", "torch_geometric"]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_there(package: str) -> None:
    module = pytest.importorskip(package)
    assert all(getattr(module, name) is not None for name in module.__all__)
    assert set(module._WHERE) == set(module.__all__)


@pytest.mark.parametrize("module", [*PACKAGES, "pt_core.cli"])
def test_importing_a_package_or_the_command_line_loads_nothing_heavy(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    probe = f"import sys, {module}; print(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr
