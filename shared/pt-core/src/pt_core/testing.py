"""What every package's tests share: fixtures (loaded by pytest with `-p pt_core.testing`) and the contract suite of methods."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # tiny models: more threads only wait for each other


@pytest.fixture(scope="session")
def study_data() -> Path:
    """Folder of the study data (`PT_STUDY_DATA`, default `../shared/data` beside the repository); skips where it is absent."""
    root = Path(__file__).resolve().parents[4]
    folder = Path(os.environ.get("PT_STUDY_DATA", root.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"study data not found at {folder}: set PT_STUDY_DATA to its folder")
    return folder
