"""tooling/bench/vl_quality.py: what it says it will take, and one of its protocols on the shipped model and icons."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import vl_quality as bench

from pt_core import recipe
from pt_core.testing import one_thread


def test_every_protocol_takes_time_and_those_with_methods_of_their_own_ignore_the_choice() -> None:
    assert set(bench.PROTOCOLS) == {*bench.PER_METHOD, *bench.PER_SEED}
    for name in bench.PROTOCOLS:
        few, many = (bench.estimate([name], methods, 3) for methods in (["zero-shot", "coop"], bench.METHODS))
        assert few > 0 and bench.estimate([name], ["coop"], 9) == pytest.approx(3 * few)
        assert many == pytest.approx(few if name in bench.PER_SEED else 10 * few)
    assert bench.estimate(["transfer"], [], 3) == 864  # 3 x 3 x 36 runs of 2.7 s
    assert bench.estimate(bench.PROTOCOLS, bench.METHODS, 1) == pytest.approx(1176)


def test_its_methods_and_tasks_are_those_of_the_recipe() -> None:
    _, checked = recipe.load("vl/mini-clip")
    assert set(bench.METHODS) == set(checked.labels())
    assert {*bench.SOURCES, *bench.PAIRED} <= set(checked.data.tasks) == set(bench.groups())  # type: ignore[attr-defined]


def test_a_protocol_runs_and_leaves_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ["--protocols", "base-to-new", "--methods", "zero-shot", "linear-probe", "--seeds", "1"]
    monkeypatch.setattr(sys, "argv", ["vl_quality.py", *chosen, "--output", str(tmp_path)])
    with one_thread():
        bench.main()
    results = json.loads((tmp_path / "base-to-new" / "results.json").read_text())
    assert [row["method"] for row in results] == ["zero-shot"], "a probe has no answer for new classes"
    assert {"base", "new", "harmonic-mean"} <= set(results[0]["metrics"])
