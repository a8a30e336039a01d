"""The transferability study on three tiny tasks: gains, what is kept, where cells run, what is refused."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pt_core import InputError, transfer
from pt_core.errors import NonFiniteLoss
from pt_core.evaluation import evaluate
from pt_core.plan import FitConfig
from pt_core.runs import Job
from pt_core.testing import Killed, TinyBench, TinyPrompt, one_thread, stopped_after
from pt_core.transfer import Cell, Study, grid

TASKS = TinyBench.task_names


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    with one_thread():
        yield


def studied(folder: Path, bench: Any = TinyBench, **options: Any) -> Study:
    return transfer.run(bench, "tiny", folder, **({"seeds": (0, 1), "announce": lambda _: None} | options))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Path]:
    """A study that nothing interrupts, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    with one_thread():
        return studied(folder), folder


def kept(folder: Path) -> dict[str, Any]:
    """Numbers of all finished cells but the clock's."""
    files = folder.glob("cells/seed-*/to-*/*.json")  # no deeper: checkpoints of running cells come and go
    cells = {path.relative_to(folder).as_posix(): json.loads(path.read_text()) for path in files}
    return {name: {k: v for k, v in cell.items() if k != "seconds"} for name, cell in cells.items()}


class Bf16(TinyBench):
    def transfer_job(self, label: str, seed: int, task: str, source: Path | None = None) -> tuple[Job, FitConfig]:
        job, config = super().transfer_job(label, seed, task, source)
        return job, config.model_copy(update={"precision": "bf16"})


class Counting(TinyBench):
    """Knows which cells were made, and fails at one of them."""

    made: list[tuple[str, int, str | None]]
    fails_at: tuple[str, int, str | None] | None = None

    def __init__(self) -> None:
        super().__init__()
        self.made = []

    def transfer_job(self, label: str, seed: int, task: str, source: Path | None = None) -> tuple[Job, FitConfig]:
        origin = None if source is None else source.parent.parent.name.removeprefix("to-")
        if (task, seed, origin) == self.fails_at:
            raise Killed
        self.made.append((task, seed, origin))
        return super().transfer_job(label, seed, task, source)


# --- one cell ---------------------------------------------------------------------------------------------------------
def test_test_rows_are_computed_in_the_precision_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    forward = TinyPrompt.forward

    def spied(self: TinyPrompt, batch: Any) -> Any:
        seen.append(torch.is_autocast_enabled("cpu"))
        return forward(self, batch)

    monkeypatch.setattr(TinyPrompt, "forward", spied)
    transfer.run_cell(Bf16(), "tiny", tmp_path, Cell(TASKS[0], 0))
    assert len(seen) > 1 and all(seen)


# --- arithmetic -------------------------------------------------------------------------------------------------------
def by_hand(metric: str = "accuracy") -> Study:
    scratch = {("a", 0): 0.5, ("a", 1): 0.7, ("b", 0): 0.4, ("b", 1): 0.4, ("c", 0): 0.9, ("c", 1): 0.9}
    trained = {Cell(t, seed): value for (t, seed), value in scratch.items()}
    moved = {("a", "b"): (0.6, 0.4), ("a", "c"): (0.8, 0.9), ("b", "a"): (0.6, 0.6), ("b", "c"): (0.9, 0.9)}
    moved |= {("c", "a"): (0.7, 0.9), ("c", "b"): (0.5, 0.5)}
    trained |= {Cell(t, seed, s): values[seed] for (s, t), values in moved.items() for seed in (0, 1)}
    untrained = {cell: 0.1 if cell.source is None else 0.2 for cell in trained}
    return Study("coop", metric, ("a", "b", "c"), (0, 1), trained, untrained)


def test_gains_are_paired_by_seed_and_summed_up() -> None:
    study = by_hand()
    assert study.gains("a", "b") == pytest.approx([0.2, 0.0])
    assert study.gains("b", "a") == pytest.approx([0.1, -0.1])
    assert study.gains("a", "a") == [0.0, 0.0]
    assert study.zero_shot("a", "b") == [0.2, 0.2] and study.zero_shot(None, "b") == [0.1, 0.1]
    assert study.zero_shot("a", "a") == [0.5, 0.7]
    summary = study.summary()
    assert summary["by_source"] == pytest.approx({"a": (0.1 - 0.05) / 2, "b": 0.0, "c": (0.2 + 0.1) / 2})
    assert summary["by_target"] == pytest.approx({"a": (0.0 + 0.2) / 2, "b": 0.1, "c": -0.05 / 2})
    assert summary["mean_gain"] == pytest.approx((0.1 - 0.05 + 0.2 + 0.1) / 6)
    assert summary["positive"] == pytest.approx(3 / 6)  # a -> b, c -> a, c -> b
    assert summary["best_source"] == {"a": "c", "b": "a", "c": "b"}


def test_a_gain_that_is_no_number_is_never_the_best(tmp_path: Path) -> None:
    study = by_hand()
    for seed in (0, 1):
        study.trained[Cell("b", seed, "a")] = math.nan
    assert study.summary()["best_source"] == {"a": "c", "b": "c", "c": "b"}
    transfer.write_report(study, tmp_path)
    assert json.loads((tmp_path / "transfer.json").read_text(), parse_constant=pytest.fail)["gain_mean"][0][1] is None


def test_a_gain_is_good_where_less_is_better() -> None:
    assert by_hand("loss").gains("a", "b") == pytest.approx([-0.2, 0.0])


def test_tables_show_gains_and_on_the_diagonal_the_baseline() -> None:
    gains = transfer.gains_grid(by_hand())
    assert list(gains.header) == ["source \\ target", "a", "b", "c", "mean gain"]
    assert gains.rows[0] == ["a", "0.600 ± 0.141", "+0.100 ± 0.141", "-0.050 ± 0.071", "+0.025"]
    assert gains.rows[3] == ["mean gain", "+0.100", "+0.100", "-0.025", "+0.058"]
    assert gains.marked == {(2, 1), (0, 2), (1, 3)}
    zero_shot = transfer.zero_shot_grid(by_hand())
    assert zero_shot.rows[1][:3] == ["b", "0.200 ± 0.000", "0.400 ± 0.000"]
    assert zero_shot.rows[3][0] == "start values"


def test_the_report_has_numbers_tables_and_pictures(tmp_path: Path) -> None:
    page = transfer.write_report(by_hand(), tmp_path, title="Icons", notes="Of three tasks.")
    content = json.loads((tmp_path / "transfer.json").read_text())
    assert content["gain_mean"][0] == pytest.approx([0.0, 0.1, -0.05])
    assert content["gain_std"][0][1] == pytest.approx(0.2 / 2**0.5)
    assert content["gains"]["c"]["a"] == pytest.approx([0.2, 0.2]) and content["scratch"]["a"] == [0.5, 0.7]
    assert content["summary"]["best_source"]["a"] == "c"
    text = (tmp_path / "transfer.md").read_text()
    assert "# Icons" in text and "50% of 6 pairs gain" in text and "| **+0.200 ± 0.000** |" in text
    for name in ("gains.png", "zero-shot.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert page.read_text().count("data:image/png") == 2
    one = Study("m", "accuracy", ("a", "b"), (0,), *[{cell: 0.5 for cell in grid("ab", (0,))}] * 2)
    transfer.write_report(one, tmp_path / "one")
    assert json.loads((tmp_path / "one" / "transfer.json").read_text())["gain_std"] == [[None, None], [None, None]]


def test_without_matplotlib_the_report_has_all_but_the_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    page = transfer.write_report(by_hand(), tmp_path).read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "transfer.json", "transfer.md"]
    assert "+0.200 ± 0.000" in page and "<img" not in page
    assert capsys.readouterr().err == "no pictures: pictures need matplotlib. Install pt-core[report]\n"


# --- cells ------------------------------------------------------------------------------------------------------------
def test_the_grid_has_every_pair_and_the_baselines_first() -> None:
    cells = grid(TASKS, (0, 1))
    assert len(cells) == len(set(cells)) == 2 * 3**2
    assert [cell.source for cell in cells[:6]] == [None] * 6
    assert all(cell.source not in (None, cell.target) for cell in cells[6:])


def test_odd_task_names_have_files_of_their_own() -> None:
    names = ["a/b", "..", "scratch", "from-a", "a b", "x.y"]
    files = [cell.file(Path("study")) for cell in grid(names, (0,))]
    assert len(set(files)) == len(names) ** 2
    assert all(len(file.parts) == 5 and ".." not in file.parts for file in files)


def test_a_cell_starts_from_the_prompt_of_its_source(whole: tuple[Study, Path]) -> None:
    study, folder = whole
    bench = TinyBench()
    source = Cell("one", 1).folder(folder) / transfer.STATE
    job, config = bench.transfer_job("tiny", 1, "two", source)
    assert job.test is not None
    assert evaluate(job.method, job.test)["accuracy"] == study.untrained[Cell("two", 1, "one")]
    job.method.fit(job.train, job.validation, config)
    assert evaluate(job.method, job.test)["accuracy"] == study.trained[Cell("two", 1, "one")]
    fresh, config = bench.transfer_job("tiny", 1, "one")
    fresh.method.fit(fresh.train, fresh.validation, config)
    for name, tensor in fresh.method.trained_state().items():
        assert torch.equal(load_file(source)[name], tensor)


def test_what_is_kept_are_numbers_and_the_prompts_from_scratch(whole: tuple[Study, Path]) -> None:
    _, folder = whole
    left = {path.name for path in (folder / "cells" / "seed-0" / "to-one").iterdir()}
    assert left == {"scratch", "scratch.json", "from-two.json", "from-three.json"}
    scratch = folder / "cells" / "seed-0" / "to-one" / "scratch"
    assert {path.name for path in scratch.iterdir()} == {"prompt", transfer.STATE}
    prompt = load_file(scratch / "prompt" / "prompt.safetensors")
    assert prompt.keys() == load_file(scratch / transfer.STATE).keys()


# --- killed and resumed -----------------------------------------------------------------------------------------------
def test_a_killed_study_goes_on_to_the_same_numbers(whole: tuple[Study, Path], tmp_path: Path) -> None:
    bench = Counting()
    bench.fails_at = ("three", 0, "two")
    with pytest.raises(Killed):
        studied(tmp_path, lambda: bench)
    done = len(kept(tmp_path))
    assert 6 < done < 18
    with stopped_after(2), pytest.raises(Killed):  # within the cell
        studied(tmp_path)
    assert len(kept(tmp_path)) == done
    again = Counting()
    assert studied(tmp_path, lambda: again) == whole[0]
    assert len(again.made) == 3 + 18 - done  # each task once beforehand, then what was left
    assert kept(tmp_path) == kept(whole[1])


def test_a_finished_study_is_read_and_may_grow(whole: tuple[Study, Path], tmp_path: Path) -> None:
    studied(tmp_path, tasks=("one", "two"), seeds=(0,))
    bench = Counting()
    assert studied(tmp_path, lambda: bench) == whole[0]
    assert len(bench.made) == 3 + 18 - 4
    bench.made.clear()
    assert studied(tmp_path, lambda: bench, metric="loss").metric == "loss"
    assert bench.made == []


def test_a_damaged_cell_is_named_and_computed_again_once_it_is_deleted(
    whole: tuple[Study, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(whole[1], tmp_path / "copy")
    file = Cell(TASKS[1], 0, TASKS[0]).file(folder)
    for content in (file.read_bytes()[:30], b"{}", b"[]"):
        file.write_bytes(content)
        with pytest.raises(InputError, match=r"\.json: is damaged\. Delete it: the cell is computed again") as refusal:
            studied(folder)
        assert str(file) in str(refusal.value)
    file.unlink()
    assert studied(folder) == whole[0]


def test_it_says_first_how_much_is_left_and_then_how_long_it_takes(tmp_path: Path) -> None:
    lines: list[str] = []
    studied(tmp_path, tasks=("one", "two"), seeds=(0,), announce=lines.append)
    assert lines[0] == "to run: 2 from scratch, 2 transfers; the first will tell how long"
    assert lines[1].startswith("from scratch -> one, seed 0: accuracy 0.") and "; 3 left, about" in lines[1]
    assert lines[3].startswith("one -> two, seed 0: ")
    lines.clear()
    studied(tmp_path, seeds=(0,), announce=lines.append)
    assert lines[0].startswith("to run: 1 from scratch, 4 transfers (4 runs kept from before); about ")


# --- where cells run --------------------------------------------------------------------------------------------------
def test_processes_give_the_same_bits(
    whole: tuple[Study, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "_cores", lambda: 2)  # one thread for each
    assert studied(tmp_path, jobs=2) == whole[0]
    assert kept(tmp_path) == kept(whole[1])


class Waiting(TinyBench):
    """Lets workers wait once three cells are done; each says which process it is."""

    def transfer_job(self, label: str, seed: int, task: str, source: Path | None = None) -> tuple[Job, FitConfig]:
        if self.folder is not None and len(kept(self.folder)) >= 3:
            (self.folder / f"{os.getpid()}.waits").touch()
            time.sleep(120)
        return super().transfer_job(label, seed, task, source)


def test_when_the_study_is_killed_its_processes_end_and_it_goes_on(whole: tuple[Study, Path], tmp_path: Path) -> None:
    study = tmp_path / "study"
    program = "\n".join(
        [
            f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})",
            "from pt_core import transfer; from test_transfer import Waiting",
            "if __name__ == '__main__':",
            "    transfer._cores = lambda: 2",
            f"    transfer.run(Waiting, 'tiny', {str(study)!r}, None, (0, 1), jobs=2)",
        ]
    )
    (tmp_path / "study.py").write_text(program)
    with subprocess.Popen([sys.executable, tmp_path / "study.py"], stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while len(list(study.glob("*.waits"))) < 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    workers = [int(file.stem) for file in study.glob("*.waits")]
    assert len(workers) == 2
    while any(alive(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(alive(worker) for worker in workers)
    assert 3 <= len(kept(study)) <= 4
    assert studied(study) == whole[0]
    assert kept(study) == kept(whole[1])


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Failing(TinyBench):
    """Refuses the first task; of the second its process dies, as where memory runs out."""

    def transfer_job(self, label: str, seed: int, task: str, source: Path | None = None) -> tuple[Job, FitConfig]:
        if task == "one":
            raise InputError("is broken", file="tiny.csv", row=3)
        os._exit(1)


def test_what_goes_wrong_in_a_process_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)  # for the processes too
    bench = importlib.import_module("test_transfer").Failing
    with transfer._in_processes(bench, "tiny", tmp_path, jobs=1) as run:
        with pytest.raises(InputError, match="tiny.csv, row 3: is"):
            list(run([Cell("one", 0)]))
        with pytest.raises(InputError, match="has died. Perhaps memory"):
            list(run([Cell("two", 0)]))


def test_ray_gives_the_same_bits(whole: tuple[Study, Path], tmp_path: Path) -> None:
    if importlib.util.find_spec("ray") is None:  # not imported here: it reads its environment when it is
        pytest.skip("Ray is not installed: the extra `ray` of pt-core")
    lines: list[str] = []
    study = studied(tmp_path, partial(TinyBench, steps=4), ray=True, jobs=1, announce=lines.append)
    assert len(lines) == 19
    for cell, value in study.trained.items():  # the worker has all cores
        assert value == pytest.approx(whole[0].trained[cell], abs=1e-6)


def test_without_ray_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"Ray is not installed. Install pt-core\[ray\]"):
        studied(tmp_path, ray=True)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("cores", "jobs", "threads"), [([2], 1, 2), ([2], 2, 1), ([8, 8, 8, 8], 5, 4), ([8, 8], 3, 4), ([3, 8], 2, 4)]
)
def test_cores_are_shared_so_that_every_job_fits_a_machine(cores: list[int], jobs: int, threads: int) -> None:
    assert transfer._share(cores, jobs) == threads
    with pytest.raises(InputError, match="Ray has 2 cores for 3 jobs"):
        transfer._share([1, 1], 3)


# --- refusals ---------------------------------------------------------------------------------------------------------
class Bound(TinyBench):
    """Its prompt has another form on every task."""

    def transfer_job(self, label: str, seed: int, task: str, source: Path | None = None) -> tuple[Job, FitConfig]:
        job, config = super().transfer_job(label, seed, task, source)
        size = len(task)
        job.method.trained_state = lambda: {"head": torch.zeros(size)}  # type: ignore[method-assign]
        return job, config


class Untested(TinyBench):
    """Its tasks have no test rows."""

    def transfer_job(self, label: str, seed: int, task: str, source: Path | None = None) -> tuple[Job, FitConfig]:
        job, config = super().transfer_job(label, seed, task, source)
        job.test = None
        return job, config


class Nothing(TinyBench):
    """Its method trains nothing."""

    def transfer_job(self, label: str, seed: int, task: str, source: Path | None = None) -> tuple[Job, FitConfig]:
        job, config = super().transfer_job(label, seed, task, source)
        job.method.trained_state = dict  # type: ignore[method-assign]
        return job, config


class Taskless(TinyBench):
    task_names = ()


@pytest.mark.parametrize(
    ("bench", "options", "problem"),
    [
        (
            TinyBench,
            {"tasks": ("one",)},
            "field 'tasks': a transfer study needs two tasks or more. There are: one, two",
        ),
        (TinyBench, {"tasks": ("one", "four")}, "task 'four' is unknown. There are: one, two, three"),
        (TinyBench, {"tasks": ("one", "one")}, "task 'one' is there twice"),
        (TinyBench, {"metric": "f1"}, "no metric 'f1' on 'one'. There are: loss, accuracy"),
        (Taskless, {}, "There are: none"),
        (Bound, {}, "one form on 'one' and another on 'three': it cannot be transferred"),
        (Untested, {}, "task 'one' has no test rows"),
        (Nothing, {}, "tiny trains nothing that could be transferred"),
    ],
)
def test_what_cannot_be_studied_is_refused_before_anything_is_trained(
    bench: Any, options: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    with stopped_after(0), pytest.raises(InputError, match=problem):
        studied(tmp_path / "study", bench, **options)
    assert not (tmp_path / "study").exists()


def test_a_file_in_the_place_of_the_folder_is_refused_before_the_bench_is_built(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file: is a file"):
        studied(tmp_path / "file", bench=lambda: pytest.fail("the bench was built"))


def test_the_folder_of_another_study_is_refused(tmp_path: Path) -> None:
    studied(tmp_path, tasks=("one", "two"), seeds=(0,), identity={"method": {"name": "tiny"}})
    with pytest.raises(InputError, match=r"results of something else \(method.* differ\)"):
        studied(tmp_path, tasks=("one", "two"), seeds=(0,), identity={"method": {"name": "other"}})


def test_a_source_prompt_that_is_not_there_is_named(whole: tuple[Study, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the source prompt of one -> two, seed 0 is not there. Several machines"):
        transfer.run_cell(TinyBench(), "tiny", tmp_path, Cell("two", 0, "one"))


def test_a_run_that_diverges_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*_: object, **__: object) -> None:
        raise NonFiniteLoss("the logits are NaN at step 2")

    monkeypatch.setattr("pt_core.runs.train", train)
    with pytest.raises(NonFiniteLoss, match=f"^tiny, from scratch -> {TASKS[0]}, seed 0: the logits are NaN at step 2"):
        studied(tmp_path)
