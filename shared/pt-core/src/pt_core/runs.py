"""One run, and runs side by side: what `pt train`, `pt compare` and the demos do, callable from Python.

    outcome = train(job, config, "runs/sst2")
    outcomes = compare(make, ["dept", "lora"], [0, 1, 2], "runs/compare")      # make(label, seed) -> (job, config)

A comparison is a grid of cells (method, seed). Every finished cell is kept, so that a killed comparison goes on where it was.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch

from pt_core.artifacts import TENSORS, check_replaceable
from pt_core.data import Split
from pt_core.errors import InputError
from pt_core.evaluation import evaluate
from pt_core.files import check_folder, write
from pt_core.method import Method
from pt_core.plan import MAY_CHANGE_ON_RESUME, FitConfig, check_groups
from pt_core.report import Result
from pt_core.training import FitResult, flat, seed_all


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


def train(
    job: Job,
    config: FitConfig,
    folder: str | Path,
    label: str | None = None,
    identity: Mapping[str, Any] | None = None,
) -> Outcome:
    """Train, test, and keep the prompt in `folder`/prompt. A killed run goes on when it is called again.

    Args:
        job: what is trained on what.
        config: the run; its seed is the result's.
        folder: for checkpoints, metrics and the artifact.
        label: name in tables; default: the method's.
        identity: anything JSON, beyond method, configuration and backbone, that must be the same for a killed run to go
            on (the data). With it, the folder takes no other run until it is deleted; None: it is that of a comparison.

    Raises:
        InputError: the folder holds another run, or other files in the place of the prompt.
    """
    folder, method = Path(folder), job.method
    check_output(folder)
    if identity is not None:
        run = {key: value for key, value in config.model_dump().items() if key not in MAY_CHANGE_ON_RESUME}
        chosen = {"method": method.name, "method_config": method.config.model_dump(mode="json"), "config": run}
        claim(folder, chosen | dict(identity))
    started = time.perf_counter()
    fitted: FitResult = method.fit(job.train, job.validation, config, folder / "training")
    seconds = max(fitted.seconds, time.perf_counter() - started)
    metrics = fitted.metrics
    if job.test is not None:
        seed_all(config.seed)  # a scorer may sample, and a run that went on has drawn less
        metrics = evaluate(method, job.test, config.eval_batch_size, precision=config.precision)
    artifact, size = None, None
    if method.kept_state():
        # An artifact refuses what is not finite; a metric that these rows do not define must not cost the prompt.
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        artifact, several = folder / "prompt", torch.distributed.is_available() and torch.distributed.is_initialized()
        if not several or torch.distributed.get_rank() == 0:
            named = {"backbone_name": job.backbone_name, "revision": job.revision}
            method.save_pretrained(artifact, task=job.task, metrics=finite, **named)
        if several:
            torch.distributed.barrier()
        size = (artifact / TENSORS).stat().st_size
    result = Result(
        method=label or method.name,
        seed=config.seed,
        metrics=metrics,
        trainable_parameters=method.count(),
        seconds_per_step=fitted.seconds_per_step or None,
        artifact_bytes=size,
        extra={
            "steps": fitted.steps,
            "best_step": fitted.best_step,
            "seconds": round(seconds, 1),
            "rows": "test" if job.test is not None else "validation" if job.validation is not None else "none",
        },
    )
    return Outcome(result, fitted.history, artifact)


def compare(
    make: Callable[[str, int], tuple[Job, FitConfig]],
    labels: Sequence[str],
    seeds: Sequence[int],
    folder: str | Path,
    identity: Mapping[str, Any] | None = None,
    announce: Callable[[str], None] = print,
) -> list[Outcome]:
    """Run every method with every seed.

    Args:
        make: (label, seed) -> the job and its configuration; called only for cells that are not done. The first job of
            each label is made, and its method removed, before the first cell runs.
        labels: of the methods.
        seeds: one run for each.
        folder: finished cells lie in `cells/`; a killed comparison goes on, and may go on with more labels and seeds.
        identity: anything JSON that must be the same for a kept cell to count (the recipe, the data).
        announce: called with a line before and after each cell.

    Raises:
        InputError: the folder holds a comparison of another identity, or the job of a label cannot be made.
    """
    folder = Path(folder)
    check_cases(labels, "methods")
    claim(folder, identity or {})
    outcomes = []
    cells = {(label, seed): folder / "cells" / f"{quote(label, safe='')}-{seed}" for seed in seeds for label in labels}
    left = [key for key, cell in cells.items() if not cell.with_name(f"{cell.name}.json").exists()]
    first: dict[str, int] = {}
    for label, seed in left:
        first.setdefault(label, seed)
    for label, seed in list(first.items())[1:]:  # refused now, not after others have trained; the first is made at once
        try:
            job, config = make(label, seed)
            job.method.remove()
            if job.method.trains:
                check_groups(job.method, config)
        except InputError as error:
            raise InputError(f"compare.{label}: {error}") from error
    for number, ((label, seed), cell) in enumerate(cells.items(), start=1):
        kept = cell.with_name(f"{cell.name}.json")
        if kept.exists():
            outcomes.append(_read(kept))
            announce(f"{label}, seed {seed}: kept from before")
            continue
        announce(f"{label}, seed {seed} ({number} of {len(cells)}) ...")
        job, config = make(label, seed)
        try:
            outcome = train(job, config, cell, label)
        finally:
            job.method.remove()
        artifact = outcome.artifact.relative_to(kept.parent).as_posix() if outcome.artifact else None
        content = {"result": asdict(outcome.result), "history": outcome.history, "artifact": artifact}
        kept.parent.mkdir(parents=True, exist_ok=True)
        write(kept, json.dumps(content))
        outcomes.append(outcome)
        shown = ", ".join(f"{name} {value:.3f}" for name, value in outcome.result.metrics.items())
        announce(f"{label}, seed {seed}: {shown} ({outcome.result.extra['seconds']} s)")
    return outcomes


def compare_recipe(
    bench: Any, labels: Sequence[str], seeds: Sequence[int], folder: str | Path, announce: Callable[[str], None] = print
) -> list[Outcome]:
    """`compare` for methods of a recipe, by its package's `Bench`: kept cells count for the same recipe and data only."""
    bench.folder = Path(folder)
    settings = bench.recipe.model_dump(mode="json", include={"method", "training", "compare"})
    return compare(bench.job, labels, seeds, folder, bench.identity | settings, announce)


def predict_afresh(artifact: Path, text: str) -> str:
    """What `pt predict` prints for one input, in a process that has seen nothing of the training."""
    command = [sys.executable, "-c", "from pt_core.cli import main; main()", "predict", str(artifact), "--", text]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def histories(outcomes: Sequence[Outcome]) -> dict[str, list[list[dict[str, Any]]]]:
    """Training histories by method, for `report.write_comparison`; methods that are not trained by steps are left out."""
    found: dict[str, list[list[dict[str, Any]]]] = {}
    for outcome in outcomes:
        if outcome.history:
            found.setdefault(outcome.result.method, []).append(outcome.history)
    return found


def _read(kept: Path) -> Outcome:
    """A finished cell.

    Raises:
        InputError: the file is damaged.
    """
    try:
        content = json.loads(kept.read_text("utf-8"))
        artifact = kept.parent / content["artifact"] if content["artifact"] else None
        return Outcome(Result(**content["result"]), content["history"], artifact)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError("is damaged", file=kept, remedy="Delete it: the cell is computed again") from error


def check_cases(names: Iterable[str], field: str) -> None:
    """Refuse names of which two differ in case only: some disks keep them in one file.

    Raises:
        InputError: naming the field.
    """
    seen: dict[str, str] = {}
    for name in names:
        if (other := seen.setdefault(name.casefold(), name)) != name:
            raise InputError(f"{other!r} and {name!r} differ in case only", field=field, remedy="Rename one of them")


def check_output(folder: Path) -> None:
    """Refuse a folder in which what a run ends with could not be written, before it is trained.

    Raises:
        InputError: it is a file or cannot be written; there are other files where the prompt goes, or folders where files go.
    """
    check_folder(folder)
    check_replaceable(folder / "prompt")
    for name in ("results.json", "curves.png"):
        if (folder / name).is_dir():
            raise InputError(
                "is a folder, a file goes there", file=folder / name, remedy="Choose another output folder"
            )


def claim(folder: Path, identity: Mapping[str, Any]) -> None:
    """Mark a folder with what it holds results of, or refuse one that holds others. A mark beside which there is neither
    a checkpoint nor a result is that of a run that came to nothing, and is replaced.

    Raises:
        InputError: the folder holds results of another identity, or is a file.
    """
    check_folder(folder)
    stamp, ours = folder / "identity.json", json.loads(json.dumps(identity))
    kept = ("results.json", "prompt", "cells/**/*.json", "**/checkpoint-*")
    if stamp.exists() and any(any(folder.glob(pattern)) for pattern in kept):
        try:
            theirs, ours_flat = flat(dict(json.loads(stamp.read_text("utf-8")))), flat(ours)
        except (TypeError, ValueError) as error:
            raise InputError("is damaged", file=stamp, remedy="Choose another output folder") from error
        changed = [key for key in sorted(theirs.keys() | ours_flat.keys()) if theirs.get(key) != ours_flat.get(key)]
        if changed:
            raise InputError(
                f"holds results of something else ({', '.join(changed)} differ)",
                file=folder,
                remedy="Choose another output folder, or delete this one",
            )
    folder.mkdir(parents=True, exist_ok=True)
    write(stamp, json.dumps(ours))
