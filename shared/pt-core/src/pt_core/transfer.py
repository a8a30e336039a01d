"""Which task is a good start for which: the task-transferability study of `pt transfer` (Shen et al., WACV 2024).

For every task t and seed the method is trained on t from its start values: t's baseline, and t's source prompt. For every
pair s != t and seed it is trained on t from the source prompt of s, with a new optimiser and schedule. Then

    gain[s, t] = metric(t | from s) - metric(t | from scratch)          (turned where less is better: a gain is good)

by seed, and its mean and sample standard deviation over seeds. Each prompt is also tested on t before it is trained there:
zero-shot transfer. Shen et al. do so with 20 tasks: 400 runs for a prompt and a seed.

    study = run(partial(Bench, recipe), "coop", "runs/transfer", seeds=range(3), jobs=2)
    write_report(study, "runs/transfer")

The study is a grid of cells (target, seed, source). Each finished cell is kept, so that a killed study goes on where it was;
cells are run here, in processes (`jobs`), or by Ray, all by the same function.
"""

from __future__ import annotations

import importlib
import json
import math
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from safetensors.torch import save

from pt_core import report, runs
from pt_core.errors import InputError, NonFiniteLoss
from pt_core.evaluation import evaluate
from pt_core.files import check_folder, write
from pt_core.metrics import higher_is_better, mean_spread
from pt_core.plan import FitConfig, device_of
from pt_core.report import Grid
from pt_core.training import seed_all

STATE = "state.safetensors"
"""What is transferred, in the folder of a cell from scratch: the method's `trained_state`."""


class TransferBench(Protocol):
    """What a package's bench offers to be studied."""

    folder: Path | None
    """Is set to the study's, in which the bench may keep what other processes then need not compute."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What backbone and data are, as JSON."""

    @property
    def task_names(self) -> Sequence[str]:
        """Names of the tasks."""

    def transfer_job(self, label: str, seed: int, task: str, source: Path | None = None) -> tuple[runs.Job, FitConfig]:
        """The run of a method on a task, from its start values, or from the `trained_state` in the file `source`.

        Raises:
            InputError: what the method trains cannot start on another task.
        """


@dataclass(frozen=True)
class Cell:
    """One run: `target` from the source prompt of `source`, or (None) from scratch."""

    target: str
    seed: int
    source: str | None = None

    def folder(self, study: Path) -> Path:
        """Where it works and what it leaves; the finished cell is the JSON file of that name."""
        name = "scratch" if self.source is None else f"from-{quote(self.source, safe='')}"
        return study / "cells" / f"seed-{self.seed}" / f"to-{quote(self.target, safe='')}" / name

    def file(self, study: Path) -> Path:
        folder = self.folder(study)
        return folder.with_name(f"{folder.name}.json")

    def __str__(self) -> str:
        return f"{self.source or 'from scratch'} -> {self.target}, seed {self.seed}"


def grid(tasks: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """All n^2 cells of each seed: those from scratch first, since the others start from them."""
    scratch = [Cell(task, seed) for seed in seeds for task in tasks]
    return scratch + [Cell(t, seed, s) for seed in seeds for s in tasks for t in tasks if s != t]


# --- what came out ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Study:
    """A finished study of one metric.

    Args:
        method: its label.
        metric: on the test rows.
        tasks, seeds: of the grid.
        trained: cell -> the metric after training.
        untrained: cell -> the metric before it: of the source's prompt, or of the start values.
    """

    method: str
    metric: str
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    trained: Mapping[Cell, float]
    untrained: Mapping[Cell, float]

    def scratch(self, task: str) -> list[float]:
        """The baseline of a task, by seed."""
        return [self.trained[Cell(task, seed)] for seed in self.seeds]

    def gains(self, source: str, target: str) -> list[float]:
        """What the source prompt gains on a target over training from scratch, by seed; 0 of a task on itself."""
        if source == target:
            return [0.0] * len(self.seeds)
        better = 1 if higher_is_better(self.metric) else -1
        pairs = zip(self.seeds, self.scratch(target), strict=True)
        return [better * (self.trained[Cell(target, seed, source)] - base) for seed, base in pairs]

    def zero_shot(self, source: str | None, target: str) -> list[float]:
        """A target tested with the source's prompt as it is, by seed; with start values where the source is None."""
        if source == target:
            return self.scratch(target)
        return [self.untrained[Cell(target, seed, source)] for seed in self.seeds]

    def mean_gain(self, source: str, target: str) -> float:
        return mean_spread(self.gains(source, target))[0]

    def summary(self) -> dict[str, Any]:
        """`mean_gain` over pairs, `positive`: the share of pairs that gain in the mean over seeds, `by_source` and
        `by_target`: mean gains over the other tasks, `best_source` of each target (the first of equals)."""
        others = {task: [other for other in self.tasks if other != task] for task in self.tasks}
        pairs = [self.mean_gain(s, t) for s in self.tasks for t in others[s]]
        return {
            "mean_gain": mean_spread(pairs)[0],
            "positive": sum(gain > 0 for gain in pairs) / len(pairs),
            "by_source": {s: mean_spread(self.mean_gain(s, t) for t in others[s])[0] for s in self.tasks},
            "by_target": {t: mean_spread(self.mean_gain(s, t) for s in others[t])[0] for t in self.tasks},
            "best_source": {t: _best({s: self.mean_gain(s, t) for s in others[t]}) for t in self.tasks},
        }


def _best(values: Mapping[str, float]) -> str:
    """The name of the largest value, the first of equals; NaN is below all."""
    return max(values, key=lambda name: (not math.isnan(values[name]), values[name]))


# --- running it -------------------------------------------------------------------------------------------------------
def run(
    make: Callable[[], TransferBench],
    label: str,
    folder: str | Path,
    tasks: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    *,
    identity: Mapping[str, Any] | None = None,
    metric: str | None = None,
    jobs: int = 1,
    ray: bool = False,
    announce: Callable[[str], None] = print,
) -> Study:
    """Run a study, or what is left of it.

    Args:
        make: builds the bench; called here, and once in every worker, so it must pickle.
        label: of the method.
        folder: finished cells lie in `cells/`; a killed study goes on, and may go on with more tasks and seeds. The prompts
            from scratch are kept there as artifacts. One study at a time; with Ray on several machines, on a disk they share.
        tasks: names; default: all of the bench.
        identity: anything JSON beyond the bench's that must be the same for a kept cell to count (the recipe).
        metric: of the test rows that is compared; default: their first.
        jobs: processes, each with its share of the cores. 1: in this process, with its threads. Cells are bit-equal where
            threads are as many.
        ray: run the jobs by Ray: on the cluster of RAY_ADDRESS, else on this machine.
        announce: called with a line for the estimate, and for each cell.

    Raises:
        InputError: fewer than two tasks, or unknown ones; what the method trains belongs to its task; a task has no test
            rows; the metric is not there; the folder holds another study; Ray is not installed; a worker died.
    """
    folder, seeds = Path(folder).absolute(), tuple(seeds)
    check_folder(folder)
    if ray:
        _import_ray()
    bench = make()
    bench.folder = folder
    tasks = _chosen(tasks, bench.task_names)
    cells = grid(tasks, seeds)
    left = [cell for cell in cells if not cell.file(folder).exists()]
    if left:  # refused before the first step, not after the baselines
        _check(bench, label, tasks, seeds[0], metric)
    runs.claim(folder, {**bench.identity, **(identity or {}), "method_label": label})
    if left:
        estimate = _Estimate(folder, len(cells), jobs, announce)
        if ray:
            crew: AbstractContextManager[Crew] = _by_ray(make, label, folder, min(jobs, len(left)))
        elif jobs > 1:
            crew = _in_processes(make, label, folder, jobs)
        else:
            crew = _here(bench, label, folder)
        estimate.begin(cells, left)
        with crew as work, estimate:
            for stage in ([cell for cell in left if (cell.source is None) is scratch] for scratch in (True, False)):
                for cell in work(stage):
                    estimate.done(cell)
    return read(folder, label, tasks, seeds, metric)


def read(
    folder: str | Path, label: str, tasks: Sequence[str], seeds: Sequence[int], metric: str | None = None
) -> Study:
    """The study of finished cells.

    Raises:
        InputError: a cell is not there, is damaged, or does not have the metric.
    """
    found = {cell: _read(cell, Path(folder)) for cell in grid(tasks, seeds)}
    names = [name for name in next(iter(found.values()))["metrics"] if name != "loss"]
    metric = metric or (names[0] if names else "loss")
    for cell, content in found.items():
        for when in ("metrics", "before"):
            if metric not in content[when]:
                known = ", ".join(content[when])
                raise InputError(f"{cell}: no metric {metric!r}", field="metric", remedy=f"There are: {known}")
    trained = {cell: float(content["metrics"][metric]) for cell, content in found.items()}
    untrained = {cell: float(content["before"][metric]) for cell, content in found.items()}
    return Study(label, metric, tuple(tasks), tuple(seeds), trained, untrained)


def run_cell(bench: TransferBench, label: str, folder: Path, cell: Cell) -> None:
    """Test, train, test; keep the numbers, and of a run from scratch its prompt. A killed run goes on within the cell.

    Raises:
        InputError, NonFiniteLoss: of the run, with method and cell named.
    """
    source, place = None, cell.folder(folder)
    if cell.source is not None:
        source = Cell(cell.source, cell.seed).folder(folder) / STATE
        if not source.is_file():
            raise InputError(
                f"the source prompt of {cell} is not there",
                file=source,
                remedy="Several machines need an output folder on a disk that they share",
            )
    started = time.perf_counter()
    try:
        job, config = bench.transfer_job(label, cell.seed, cell.target, source)
    except InputError as error:
        raise InputError(f"{label}, {cell}: {error}") from error
    config = config.model_copy(update={"progress": False})  # of the study is shown instead
    try:
        job.method.place(device_of(config))
        assert job.test is not None
        seed_all(config.seed)
        before = evaluate(job.method, job.test, config.eval_batch_size, precision=config.precision)
        outcome = runs.train(job, config, place, label)
        if source is None:
            state = job.method.trained_state()
            write(place / STATE, save({name: tensor.cpu().contiguous() for name, tensor in state.items()}))
    except (InputError, NonFiniteLoss) as error:
        raise type(error)(f"{label}, {cell}: {error}") from error
    finally:
        job.method.remove()
    content = {"metrics": outcome.result.metrics, "before": before, "seconds": time.perf_counter() - started}
    write(cell.file(folder), json.dumps(content))
    shutil.rmtree(place / "training" if source is None else place, ignore_errors=True)


def _chosen(tasks: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    chosen, there = list(known if tasks is None else tasks), f"There are: {', '.join(known) or 'none'}"
    for task in chosen:
        if task not in known or chosen.count(task) > 1:
            problem = f"task {task!r} is {'there twice' if task in known else 'unknown'}"
            raise InputError(problem, field="tasks", remedy=there)
    if len(chosen) < 2:
        raise InputError("a transfer study needs two tasks or more", field="tasks", remedy=there)
    runs.check_cases(chosen, "tasks")
    return chosen


def _check(bench: TransferBench, label: str, tasks: Sequence[str], seed: int, metric: str | None) -> None:
    """Refuse what could not be run to the end: every task is made once, and what is trained has one form on all."""
    shapes = {}
    for task in tasks:
        job, _ = bench.transfer_job(label, seed, task)
        job.method.remove()
        shapes[task] = {name: tuple(tensor.shape) for name, tensor in job.method.trained_state().items()}
        if not shapes[task]:
            raise InputError(f"{label} trains nothing that could be transferred", field="method")
        if job.test is None:
            raise InputError(f"task {task!r} has no test rows", field="tasks")
        known = ("loss", *job.test.metrics)
        if metric is not None and job.test.scorer is None and metric not in known:
            raise InputError(
                f"no metric {metric!r} on {task!r}", field="metric", remedy=f"There are: {', '.join(known)}"
            )
        if shapes[task] != shapes[tasks[0]]:
            raise InputError(
                f"what {label} trains has one form on {tasks[0]!r} and another on {task!r}: it cannot be transferred",
                field="method",
            )


def _read(cell: Cell, folder: Path) -> dict[str, Any]:
    file = cell.file(folder)
    try:
        content = json.loads(file.read_text("utf-8"))
        return {key: content[key] for key in ("metrics", "before", "seconds")}
    except FileNotFoundError as error:
        raise InputError(f"{cell} is not done", file=file) from error
    except (ValueError, TypeError, KeyError) as error:
        raise InputError("is damaged", file=file, remedy="Delete it: the cell is computed again") from error


class _Estimate(AbstractContextManager["_Estimate"]):
    """Says how long the rest takes, by the mean of the cells that are done, and shows a bar in a terminal."""

    def __init__(self, folder: Path, total: int, jobs: int, announce: Callable[[str], None]) -> None:
        self.folder, self.total, self.jobs, self.announce = folder, total, jobs, announce
        self.seconds: list[float] = []
        self.left = total
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self.bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.task = self.bar.add_task("", total=total)

    def begin(self, cells: Sequence[Cell], left: Sequence[Cell]) -> None:
        waiting = set(left)
        self.seconds = [_read(cell, self.folder)["seconds"] for cell in cells if cell not in waiting]
        self.left, scratch = len(left), sum(cell.source is None for cell in left)
        kept = f" ({len(self.seconds)} runs kept from before)" if self.seconds else ""
        time_left = self.time_left() if self.seconds else "the first will tell how long"
        self.announce(f"to run: {scratch} from scratch, {self.left - scratch} transfers{kept}; {time_left}")
        self.show()

    def done(self, cell: Cell) -> None:
        content = _read(cell, self.folder)
        self.seconds.append(content["seconds"])
        self.left -= 1
        values = {name: value for name, value in content["metrics"].items() if name != "loss"} or content["metrics"]
        name, value = next(iter(values.items()))
        self.announce(f"{cell}: {name} {value:.3f} ({content['seconds']:.1f} s); {self.left} left, {self.time_left()}")
        self.show()

    def time_left(self) -> str:
        seconds = self.left * mean_spread(self.seconds)[0] / self.jobs
        minutes = f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
        return f"about {seconds:.0f} s" if seconds < 100 else f"about {minutes}"

    def show(self) -> None:
        about = f"{self.time_left()} left" if self.seconds else ""
        self.bar.update(self.task, completed=self.total - self.left, description=about)

    def __enter__(self) -> _Estimate:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()


# --- where cells run --------------------------------------------------------------------------------------------------
Crew = Callable[[Iterable[Cell]], Iterator[Cell]]
"""Runs cells, and gives each when it is done."""


@contextmanager
def _here(bench: TransferBench, label: str, folder: Path) -> Iterator[Crew]:
    def work(cells: Iterable[Cell]) -> Iterator[Cell]:
        for cell in cells:
            run_cell(bench, label, folder, cell)
            yield cell

    yield work


class Worker:
    """Runs cells in a process of its own. The bench is built with the first, so that what is wrong with it is told."""

    def __init__(
        self, make: Callable[[], TransferBench], label: str, folder: Path, threads: int, working: str | None = None
    ) -> None:
        if working is not None and Path(working).is_dir():
            os.chdir(working)  # which a recipe's paths are relative to
        torch.set_num_threads(threads)
        self.make, self.label, self.study = make, label, folder
        self.bench: TransferBench | None = None

    def run(self, cell: Cell) -> Cell:
        if self.bench is None:
            self.bench = self.make()
            self.bench.folder = self.study
        run_cell(self.bench, self.label, self.study, cell)
        return cell


_worker: Worker | None = None  # of this process, where a pool has started it


def _start(*settings: Any) -> None:
    """Make the worker of a new process, which ends when its parent does: nobody else may go on with the cells then."""
    global _worker
    _worker = Worker(*settings)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow(sentinel: int) -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=follow, args=(parent.sentinel,), daemon=True).start()


def _run(cell: Cell) -> Cell:
    assert _worker is not None
    return _worker.run(cell)


@contextmanager
def _in_processes(make: Callable[[], TransferBench], label: str, folder: Path, jobs: int) -> Iterator[Crew]:
    settings = (make, label, folder, max(1, _cores() // jobs))
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _start, settings) as pool:

        def work(cells: Iterable[Cell]) -> Iterator[Cell]:
            try:
                for done in as_completed([pool.submit(_run, cell) for cell in cells]):
                    yield done.result()
            except BrokenProcessPool as error:
                raise InputError(
                    "a process that ran cells has died", remedy="Perhaps memory ran out: use fewer jobs"
                ) from error

        try:
            yield work
        finally:
            pool.shutdown(cancel_futures=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _import_ray() -> Any:
    # Workers run by this very interpreter, also where `uv run` has started it.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise InputError("Ray is not installed", remedy="Install pt-core[ray]", field="ray") from error


@contextmanager
def _by_ray(make: Callable[[], TransferBench], label: str, folder: Path, jobs: int) -> Iterator[Crew]:
    ray = _import_ray()
    pools, errors = importlib.import_module("ray.util"), importlib.import_module("ray.exceptions")
    ours = not ray.is_initialized()
    if ours:
        ray.init(include_dashboard=False, logging_level="error", log_to_driver=False)
    try:
        machines = [machine["Resources"] for machine in ray.nodes() if machine["Alive"]]
        cores = [int(machine.get("CPU", 0)) for machine in machines]
        threads = _share(cores, jobs)
        gpus = sum(machine.get("GPU", 0) for machine in machines)
        needs = {"num_cpus": threads, "num_gpus": 1 / math.ceil(jobs / gpus) if gpus else 0}
        hire = ray.remote(Worker).options(**needs)
        workers = [hire.remote(make, label, folder, threads, os.getcwd()) for _ in range(jobs)]
        pool = pools.ActorPool(workers)

        def work(cells: Iterable[Cell]) -> Iterator[Cell]:
            try:
                yield from pool.map_unordered(lambda worker, cell: worker.run.remote(cell), list(cells))
            except errors.RayTaskError as error:
                raise error.cause from error
            except errors.RayActorError as error:
                raise InputError(
                    f"a worker of Ray has died ({' '.join(str(error).split())})",
                    remedy="Perhaps memory ran out: use fewer jobs",
                ) from error

        try:
            yield work
        finally:
            for worker in workers:
                ray.kill(worker)
    finally:
        if ours:
            ray.shutdown()


def _share(cores: Sequence[int], jobs: int) -> int:
    """The most cores that each of several jobs can have on machines with so many cores.

    Raises:
        InputError: there are more jobs than cores.
    """
    for threads in range(max(cores, default=0), 0, -1):
        if sum(own // threads for own in cores) >= jobs:
            return threads
    raise InputError(f"Ray has {sum(cores)} cores for {jobs} jobs", field="jobs", remedy="Use fewer jobs")


# --- reporting it -----------------------------------------------------------------------------------------------------
def gains_grid(study: Study) -> Grid:
    """Sources in rows, targets in columns: gains; the baselines on the diagonal; the best source of a target marked."""
    summary, tasks = study.summary(), study.tasks
    rows = []
    for s in tasks:
        cells = [_shown(study.scratch(t)) if s == t else _shown(study.gains(s, t), "+") for t in tasks]
        rows.append([s, *cells, f"{summary['by_source'][s]:+.3f}"])
    rows.append(["mean gain", *(f"{summary['by_target'][t]:+.3f}" for t in tasks), f"{summary['mean_gain']:+.3f}"])
    best = summary["best_source"]
    marked = frozenset((tasks.index(best[t]), column) for column, t in enumerate(tasks, start=1))
    caption = (
        f"Gain in {study.metric} over training from scratch{_over(study)}; on the diagonal, {study.metric} from scratch"
    )
    caption += "; marked: the best source of a target."
    return Grid(["source \\ target", *tasks, "mean gain"], rows, marked, caption)


def zero_shot_grid(study: Study) -> Grid:
    """Sources in rows, targets in columns: the metric with the source's prompt as it is; below, with start values."""
    rows = [[s or "start values", *(_shown(study.zero_shot(s, t)) for t in study.tasks)] for s in (*study.tasks, None)]
    caption = f"{study.metric} of each source's prompt on each target without training there{_over(study)}."
    return Grid(["source \\ target", *study.tasks], rows, caption=caption)


def in_words(study: Study) -> str:
    """The summary as lines."""
    summary = study.summary()
    pairs = len(study.tasks) * (len(study.tasks) - 1)
    best = ", ".join(f"{t} from {s}" for t, s in summary["best_source"].items())
    giver = _best(summary["by_source"])
    taker = _best(summary["by_target"])
    return (
        f"Mean gain {summary['mean_gain']:+.3f} {study.metric}; {summary['positive']:.0%} of {pairs} pairs gain.\n"
        f"Best source on average: {giver} ({summary['by_source'][giver]:+.3f}); "
        f"target that gains most: {taker} ({summary['by_target'][taker]:+.3f}).\n"
        f"Best source of each target: {best}."
    )


def write_report(study: Study, folder: str | Path, title: str = "Transfer", notes: str = "") -> Path:
    """Write transfer.json, transfer.md, gains.png, zero-shot.png and report.html; numbers come first, and without
    matplotlib there are no pictures.

    Returns:
        The path of report.html.
    """
    folder, tasks = Path(folder), study.tasks
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [[(s, t) for t in tasks] for s in tasks]
    content: dict[str, Any] = {
        "method": study.method,
        "metric": study.metric,
        "tasks": tasks,
        "seeds": study.seeds,
        "scratch": {t: study.scratch(t) for t in tasks},
        "start_values": {t: study.zero_shot(None, t) for t in tasks},
        "gains": {s: {t: study.gains(s, t) for t in tasks if t != s} for s in tasks},
        "zero_shot": {s: {t: study.zero_shot(s, t) for t in tasks if t != s} for s in tasks},
        "gain_mean": [[study.mean_gain(s, t) for s, t in row] for row in pairs],
        "gain_std": [[_std(study.gains(s, t)) for s, t in row] for row in pairs],
        "zero_shot_mean": [[mean_spread(study.zero_shot(s, t))[0] for s, t in row] for row in pairs],
        "zero_shot_std": [[_std(study.zero_shot(s, t)) for s, t in row] for row in pairs],
        "summary": study.summary(),
    }
    content = json.loads(json.dumps(content), parse_constant=lambda _: None)  # what is not finite becomes null
    write(folder / "transfer.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    gains, zero_shot, words = gains_grid(study), zero_shot_grid(study), in_words(study)
    parts = [f"# {title}", notes, words.replace("\n", "  \n"), report.to_markdown(gains, title="Gains")]
    parts.append(report.to_markdown(zero_shot, title="Zero-shot transfer"))
    write(folder / "transfer.md", "\n\n".join(part.strip() for part in parts if part) + "\n")
    axes = ("source", "target")
    matrix = [[math.nan if s == t else study.mean_gain(s, t) for s, t in row] for row in pairs]
    bases = {t: f"{mean_spread(study.scratch(t))[0]:.3f}" for t in tasks}
    texts = [[bases[t] if s == t else f"{study.mean_gain(s, t):+.3f}" for s, t in row] for row in pairs]
    label = f"gain in {study.metric}; grey: from scratch"
    pictures = [folder / "gains.png", folder / "zero-shot.png"] if report.can_draw() else []
    if pictures:
        report.heatmap(matrix, tasks, tasks, pictures[0], label, title, axes, texts=texts, centre=0.0)
        report.heatmap(content["zero_shot_mean"], tasks, tasks, pictures[1], study.metric, title, axes)
    sections: list[tuple[str, Sequence[report.Item]]] = [
        ("Summary", [*([notes] if notes else []), words]),
        ("Gains", [*pictures[:1], gains]),
        ("Zero-shot transfer", [*pictures[1:], zero_shot]),
    ]
    report.html(folder / "report.html", title, sections)
    return folder / "report.html"


def _shown(values: Sequence[float], sign: str = "") -> str:
    mean, std = mean_spread(values)
    return f"{mean:{sign}.3f}" if math.isnan(std) else f"{mean:{sign}.3f} ± {std:.3f}"


def _over(study: Study) -> str:
    return ", mean ± sample standard deviation over seeds" if len(study.seeds) > 1 else ", one seed"


def _std(values: Sequence[float]) -> float | None:
    return mean_spread(values)[1] if len(values) > 1 else None
