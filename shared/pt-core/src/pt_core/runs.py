"""One run, and runs side by side: what `pt train`, `pt compare` and the demos do, callable from Python.

    outcome = train(job, config, "runs/sst2", seed=0)
    outcomes = compare({"dept": make_dept, "lora": make_lora}, config, [0, 1, 2], "runs/compare")

A comparison is a grid of cells (method, seed). Every finished cell is kept, so that a killed comparison goes on where it was.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pt_core.data import Split
from pt_core.errors import InputError
from pt_core.method import Method
from pt_core.report import Result
from pt_core.training import FitConfig, FitResult, evaluate


@dataclass
class Job:
    """Everything that one run needs, ready to train.

    Args:
        method: on its backbone.
        train, validation, test: splits; the test split is read once, after training.
        task: what is saved with the prompt so that it can be used (see `Method.save_pretrained`).
        backbone_name, revision: where the backbone comes from.
    """

    method: Method
    train: Split
    validation: Split | None = None
    test: Split | None = None
    task: Mapping[str, Any] = field(default_factory=dict)
    backbone_name: str | None = None
    revision: str | None = None


@dataclass
class Outcome:
    """A finished run: its result, its training history, and the folder of its artifact (None: nothing to keep)."""

    result: Result
    history: list[dict[str, Any]]
    artifact: Path | None


def train(job: Job, config: FitConfig, folder: str | Path, label: str | None = None) -> Outcome:
    """Train, test, and keep the prompt in `folder`/prompt.

    Args:
        job: what is trained on what.
        config: the run; its seed is the result's.
        folder: for checkpoints, metrics and the artifact.
        label: name in tables; default: the method's.
    """
    folder = Path(folder)
    method = job.method
    started = time.perf_counter()
    fitted: FitResult = method.fit(job.train, job.validation, config, folder / "training")
    seconds = time.perf_counter() - started
    device = next((p.device for p in method.backbone.parameters()), None)
    metrics = evaluate(method, job.test, config.eval_batch_size, device) if job.test is not None else fitted.metrics
    artifact, size = None, 0
    if method.trained_state():
        artifact = method.save_pretrained(
            folder / "prompt", backbone_name=job.backbone_name, revision=job.revision, task=job.task, metrics=metrics
        )
        size = (artifact / "prompt.safetensors").stat().st_size
    result = Result(
        method=label or method.name,
        seed=config.seed,
        metrics=metrics,
        trainable_parameters=method.count(),
        seconds_per_step=fitted.seconds_per_step,
        artifact_bytes=size,
        extra={"steps": fitted.steps, "best_step": fitted.best_step, "seconds": round(seconds, 1)},
    )
    return Outcome(result, fitted.history, artifact)


def compare(
    make: Mapping[str, Callable[[int], tuple[Job, FitConfig]]],
    seeds: Sequence[int],
    folder: str | Path,
    identity: Mapping[str, Any] | None = None,
    announce: Callable[[str], None] = lambda line: None,
) -> list[Outcome]:
    """Run every method with every seed.

    Args:
        make: label -> function from a seed to the job and its configuration; called only for cells that are not done.
        seeds: one run for each.
        folder: results of finished cells lie in `cells/`; a killed comparison goes on.
        identity: anything JSON that must be the same for a kept cell to count (the recipe).
        announce: called with a line before and after each cell.

    Raises:
        InputError: the folder holds a comparison of another identity.
    """
    folder = Path(folder)
    cells = folder / "cells"
    cells.mkdir(parents=True, exist_ok=True)
    stamp = cells / "identity.json"
    wanted = json.dumps(identity or {}, sort_keys=True, default=str)
    if stamp.exists() and stamp.read_text("utf-8") != wanted:
        raise InputError(
            f"{folder} holds another comparison", remedy="Choose another output folder, or delete this one"
        )
    _write(stamp, wanted)
    outcomes = []
    for number, (label, seed) in enumerate((label, seed) for seed in seeds for label in make):
        kept = cells / f"{label}-{seed}.json"
        if kept.exists():
            content = json.loads(kept.read_text("utf-8"))
            artifact = Path(content["artifact"]) if content["artifact"] else None
            outcomes.append(Outcome(Result(**content["result"]), content["history"], artifact))
            announce(f"{label}, seed {seed}: kept from before")
            continue
        announce(f"{label}, seed {seed} ({number + 1} of {len(make) * len(seeds)}) ...")
        job, config = make[label](seed)
        try:
            outcome = train(job, config, cells / f"{label}-{seed}", label)
        finally:
            job.method.remove()
        outcomes.append(outcome)
        content = {
            "result": asdict(outcome.result),
            "history": outcome.history,
            "artifact": str(outcome.artifact) if outcome.artifact else None,
        }
        _write(kept, json.dumps(content))
        shown = ", ".join(f"{name} {value:.3f}" for name, value in outcome.result.metrics.items())
        announce(f"{label}, seed {seed}: {shown} ({outcome.result.extra['seconds']} s)")
    return outcomes


def histories(outcomes: Sequence[Outcome]) -> dict[str, list[list[dict[str, Any]]]]:
    """Training histories by method, for `report.write_comparison`; methods that are not trained by steps are left out."""
    found: dict[str, list[list[dict[str, Any]]]] = {}
    for outcome in outcomes:
        if outcome.history:
            found.setdefault(outcome.result.method, []).append(outcome.history)
    return found


def _write(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, "utf-8")
    os.replace(beside, path)
