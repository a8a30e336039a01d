"""`import pt_vl` loads nothing heavy, and every public name is there."""

from __future__ import annotations

import subprocess
import sys

import pt_vl


def test_every_public_name_is_there() -> None:
    assert all(getattr(pt_vl, name) is not None for name in pt_vl.__all__)
    assert set(pt_vl._WHERE) == set(pt_vl.__all__)


def test_importing_the_package_imports_no_model_library() -> None:
    code = "import sys, pt_vl; print(*{'torch', 'transformers', 'torchvision', 'PIL'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
