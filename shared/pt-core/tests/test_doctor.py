"""What `pt doctor` finds out: versions out of range, and the precision that a machine computes fastest in."""

from __future__ import annotations

import io
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from rich.console import Console

from pt_core import doctor


def test_versions_that_a_package_does_not_allow_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = ["torch>=2.6,<2.12", "numpy>=1.26", "gone>=1", 'old<2; python_version < "3"', 'extra>=9; extra == "demo"']
    have = {"torch": "2.13.0+cpu", "numpy": "1.26.4"}
    monkeypatch.setattr(doctor, "requires", lambda name: needs)
    monkeypatch.setattr(doctor, "installed", have.get)
    problems = doctor.out_of_range("pt-x")
    assert len(problems) == 2
    assert problems[0].startswith("pt-x needs torch") and problems[0].endswith("installed: 2.13.0+cpu")
    assert problems[1] == "pt-x needs gone>=1, installed: nothing"
    have |= {"torch": "2.11.0+cpu", "gone": "1.0rc1"}
    assert doctor.out_of_range("pt-x") == ["pt-x needs gone>=1, installed: 1.0rc1"]


def test_a_package_whose_distribution_has_another_name_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "packages", lambda: {"foreign": "no_such_distribution"})
    out = io.StringIO()
    doctor.report(Console(file=out, width=120))
    assert "no-such-distribution -" in out.getvalue()


def test_installed_says_the_version_or_none() -> None:
    assert doctor.installed("torch") == version("torch")
    assert doctor.installed("no-such-distribution") is None


def test_this_environment_is_in_range() -> None:
    assert doctor.out_of_range("pt-core") == []


@pytest.mark.parametrize(
    ("flags", "fast"),
    [
        ("fpu sse avx512f avx512_bf16", True),
        ("fpu amx_bf16 amx_tile", True),
        ("fp asimd bf16 i8mm", True),
        ("fpu sse avx2 avx512f", False),
        ("fpu xbf16x", False),
    ],
)
def test_bf16_is_fast_on_a_cpu_that_says_so(
    flags: str, fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(f"model name\t: A CPU\nflags\t\t: {flags}\n")
    monkeypatch.setattr(doctor, "Path", lambda name: tmp_path / "cpuinfo")
    assert doctor.cpu_has_fast_bf16() is fast
    assert doctor.fast_dtype(torch.device("cpu")) == (torch.bfloat16 if fast else torch.float32)
    monkeypatch.setattr(doctor, "Path", lambda name: tmp_path / "nowhere")  # not Linux
    assert doctor.cpu_has_fast_bf16() is False


@pytest.mark.parametrize(("supported", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_gpu_is_asked(supported: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: supported)
    assert doctor.fast_dtype(torch.device("cuda")) == dtype
    assert doctor.fast_dtype(torch.device("meta")) == torch.float32


def test_the_report_names_versions_problems_machine_and_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "out_of_range", lambda name: [f"{name} needs x[y]>=2, installed: 1"])
    out = io.StringIO()
    doctor.report(Console(file=out, width=120))
    lines = out.getvalue()
    assert f"{version('torch')}" in lines and doctor.TESTED["torch"] in lines
    assert f"pt-core {version('pt-core')}" in lines
    assert "pt-core needs x[y]>=2, installed: 1" in lines
    assert "cores" in lines and "GPU: " in lines
    assert "precision to use for a frozen backbone: " in lines
