"""Training: `Loop`, the engine, and `fit`, plain supervised training made of it.

The engine stands on accelerate for devices, processes and trackers, and does itself what a prompt of kilobytes needs done
differently: nothing is wrapped (gradients are a few tensors and are summed over processes directly), a step divides by
the global count of terms (so accumulation equals the large batch and two processes equal one), and a checkpoint holds what
is trained and nothing else (safetensors and JSON, written beside and renamed), from which a killed run goes on to the
same result.

What can be a function of seed and step is one: the rows of a batch, the learning rate, and the random numbers drawn in the
step. None of these has to be restored, and evaluating more or less often does not change what is trained.

Loops of another shape are written out of the same parts:

    loop = Loop(method, config, output_dir, total_steps=n)
    for step in loop.steps():            # goes on where a killed run stopped; progress, checkpoints, early stopping
        loop.backward(method.loss(batch), batch)
        loop.update()                    # reduce, divide, clip, schedule, step
        loop.record(loop.evaluate(split))
    result = loop.finish()
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from pt_core.data import Split
from pt_core.errors import InputError, NonFiniteLoss
from pt_core.evaluation import autocast, evaluate, part_of
from pt_core.files import sync, write
from pt_core.frozen import fingerprint
from pt_core.method import Batch, Loss, Method
from pt_core.metrics import higher_is_better
from pt_core.packing import packed
from pt_core.plan import MAY_CHANGE_ON_RESUME, BatchPlan, FitConfig, check_groups, device_of, lr_factor


class NotLearning(UserWarning):
    """Nothing is being learned: no gradient reaches the prompt, or the loss stays where it began."""


@dataclass
class FitResult:
    """What came out of a run.

    Args:
        steps: optimiser steps made, over all resumed parts.
        best_step: step whose prompt the method ends with.
        metrics: validation metrics of that prompt (empty without validation).
        history: the rows of metrics.jsonl.
        seconds_per_step: mean wall time of forward, backward and update in this process, evaluation not counted.
        stopped_early: the monitored metric did not gain for `patience` evaluations.
        seconds: wall time of the loop, with that of a resumed run up to its checkpoint.
    """

    steps: int = 0
    best_step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds_per_step: float = 0.0
    stopped_early: bool = False
    seconds: float = 0.0


@dataclass
class _State:
    """What a checkpoint keeps besides tensors."""

    step: int = 0
    log_offset: int = 0
    sums: dict[str, float] = field(default_factory=dict)  # since the last log: of the loss and of its parts
    counts: dict[str, float] = field(default_factory=dict)  # their terms: not every loss of a step has every part
    first_loss: float | None = None
    last_loss: float | None = None
    monitor: str | None = None
    last_metrics: dict[str, float] = field(default_factory=dict)
    best_metrics: dict[str, float] = field(default_factory=dict)
    best_value: float | None = None
    best_step: int = 0
    gains: int = 0
    bad: int = 0
    stopped: bool = False
    training_seconds: float = 0.0  # of `timed_steps`; a checkpoint of an earlier version has no times
    timed_steps: int = 0
    seconds: float = 0.0


class Loop:
    """The engine of every training run.

    Args:
        method: what is trained; it is placed on the device.
        config: the run.
        output_dir: folder for `metrics.jsonl`, trackers, one checkpoint, and beside it (`best-STEP.safetensors`, if the
            run keeps the best) one more copy of what is trained; None keeps everything in memory. If a killed run of the
            same configuration left a checkpoint there, the loop goes on from it. One folder for each loop.
        total_steps: length of the run in the loop's own steps.
        identity: anything JSON that must be the same for a run to be resumed (data size, recipe).

    With several processes, buffers and extra state are kept of the main one: they should hold what all agree on.

    Raises:
        InputError: the folder holds a run of another configuration, or a setting has no effect here.
    """

    def __init__(
        self,
        method: Method,
        config: FitConfig,
        output_dir: str | Path | None = None,
        *,
        total_steps: int,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        self.method, self.config, self.total_steps = method, config, total_steps
        self.folder = Path(output_dir) if output_dir is not None else None
        self.accelerator, self.device = _accelerator(config, self.folder)
        method.place(self.device)
        self._packed = packed(method.backbone, config.packed_gib)
        self._seed(0)
        self.optimisers = method.optimisers(config)
        self._base_lr = {name: [g["lr"] for g in optimiser.param_groups] for name, optimiser in self.optimisers.items()}
        check_groups(method, config, self.optimisers)
        for optimiser in self.optimisers.values():  # of a run that broke off, or of the caller
            optimiser.zero_grad(set_to_none=True)
        self.state = _State()
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Tensor] | None = None
        self._steps_here, self._since = 0, time.perf_counter()
        self._in_step, self._started = False, 0.0
        self._begun = False  # whether `steps` is under way, or over
        self._sums: list[Tensor] = []  # total and count of each backward since the last update
        self._ids: list[Any] = []
        self._coupled = False  # whether a loss of the run couples rows
        self._whole = False  # whether one since the last update does
        self._window: list[tuple[Tensor, dict[str, Tensor]]] = []
        # Reading a flag makes an accelerator wait, so there the flag of a step is read one step late.
        self._reads_late = self.device.type != "cpu"
        self._suspect: tuple[Tensor, int, list[Any]] | None = None
        if self.folder is not None:
            self._identity = json.loads(json.dumps(self._describe_run() | dict(identity or {})))
            if self.folder.exists() and not self.folder.is_dir():
                raise InputError("the output folder is a file", remedy="Choose another one", file=self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            self._resume()
        self._first_update = self.state.step == 0
        if config.trackers:
            again = {"purge_step": self.state.step + 1} if self.state.step else {}
            values = {"method": method.name, "seed": config.seed}
            self.accelerator.init_trackers("run", config=values, init_kwargs={"tensorboard": again})

    # --- the run ------------------------------------------------------------------------------------------------
    @property
    def main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    @property
    def step(self) -> int:
        """1-based number of the step in progress, or of the last one made."""
        return self.state.step + self._in_step

    def steps(self) -> Iterator[int]:
        """1-based numbers of the steps still to make. What is due after a step (log, checkpoint) happens between them."""
        self._begun = True
        every = self.config.checkpoint_every or self.config.evaluate_every or 100
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        shown = self.config.progress and self.main
        with Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown) as bar:
            task = bar.add_task(self._progress(), total=self.total_steps, completed=self.state.step)
            while self.state.step < self.total_steps and not self.state.stopped:
                self._seed(self.state.step + 1)
                self._in_step, self._started = True, time.perf_counter()
                yield self.step
                self._close_step()
                bar.update(task, completed=self.state.step, description=self._progress())
                if self.folder is not None and self.state.step % every == 0:
                    self.checkpoint()
        self._check_finite()
        if self.folder is not None:
            self.checkpoint()
        self._warn_if_flat()

    @contextmanager
    def passes(self) -> Iterator[None]:
        """Context of the passes: bf16 autocast if the run asks for it, and packed frozen weights."""
        with autocast(self.config.precision, self.device), self._packed:
            yield

    def to_device(self, batch: Any) -> Any:
        """The batch with its tensors on this process's device."""
        return send_to_device(batch, self.device)

    def share(self, rows: list[int]) -> list[list[int]]:
        """This process's part of a global batch, cut into micro-batches. No row is repeated or dropped."""
        mine = part_of(rows, self.accelerator)
        size = self.config.micro_batch_size or max(len(mine), 1)
        return [mine[i : i + size] for i in range(0, len(mine), size)]

    def backward(self, loss: Loss, batch: Batch | None = None) -> None:
        """Add the gradient of a micro-batch's total. The division by the global count is `update`'s.

        Args:
            loss: of the micro-batch.
            batch: the micro-batch, whose `sample_ids` are named if the loss is not finite.

        Raises:
            InputError: the loss does not depend on anything trained, or couples rows and would be accumulated or split.
        """
        if not loss.total.requires_grad:
            if not torch.is_grad_enabled():
                raise InputError("gradients are switched off here", remedy="Train outside of torch.no_grad()")
            raise InputError(
                f"the loss of {self.method.name} does not depend on anything that is trained",
                remedy="Check that the prompt is attached, used, and not empty",
            )
        self._coupled |= not loss.decomposes
        self._whole |= not loss.decomposes
        if self._whole and (self._sums or self.accelerator.num_processes > 1):
            raise InputError(
                f"the loss of {self.method.name} couples the rows of a batch: it cannot be accumulated or split",
                remedy="Set micro_batch_size to batch_size and use one process",
            )
        self._ids.extend(batch.get("sample_ids", []) if batch is not None else [])
        torch.autograd.backward(loss.total)
        count = torch.as_tensor(loss.count, dtype=torch.float32, device=loss.total.device)
        sums = torch.stack([loss.total.detach().float(), count]).to(self.device)
        self._sums.append(sums)
        self._window.append((sums, {name: value.detach().float() for name, value in loss.parts.items()}))

    def update(self, *names: str, max_grad_norm: float | Literal["of the run"] | None = "of the run") -> Tensor:
        """Step optimisers with the gradients since the last update: reduce over processes, divide, clip, schedule.

        A step of the loop may have several updates (an epoch of reinforcement learning); all have the step's rates.

        Args:
            names: of the optimisers that step together; default: all. Gradients of parameters that are in none of them
                are dropped.
            max_grad_norm: what the norm is cut to in this update, None for no clipping; default: as the run says.

        Returns:
            The global gradient norm before clipping (a tensor: reading it waits for the device).

        Raises:
            NonFiniteLoss: the loss or a gradient is NaN or infinite (on an accelerator one update late, and before
                anything is written).
        """
        several = self.accelerator.num_processes > 1
        if not self._sums and not several:
            raise RuntimeError("update() without backward(): there is no gradient to step with")
        chosen = {name: self.optimisers[name] for name in names or self.optimisers}
        groups = [group for optimiser in chosen.values() for group in optimiser.param_groups]
        parameters = list({id(p): p for group in groups for p in group["params"]}.values())
        sums = torch.stack(self._sums).sum(0) if self._sums else torch.zeros(2, device=self.device)
        if several:
            without = [p.grad is None for p in parameters]
            told = torch.tensor([not nothing for nothing in without], dtype=sums.dtype, device=sums.device)
            sums, givers = self.accelerator.reduce(torch.cat([sums, told]), reduction="sum").tensor_split([2])
            for p in parameters:
                p.grad = self.accelerator.reduce(p.grad if p.grad is not None else torch.zeros_like(p), reduction="sum")
            if any(without):  # a gradient that no process has is none, not zero, for the optimiser
                for p, givers_of in zip(parameters, givers.tolist(), strict=True):
                    p.grad = p.grad if givers_of else None
        total, count = sums
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self._reads_late or float(count) != 1:  # a pass over a large critic that need not be made
            for gradient in gradients:  # which are zero where no term is counted (no row has a label)
                gradient.div_(torch.where(count == 0, 1, count).to(gradient.device))
        norm = torch.nn.utils.get_total_norm(gradients).to(self.device)
        finite = torch.isfinite(total) & torch.isfinite(norm)
        self._check_finite()
        self._suspect = (finite, self.step, self._ids)
        if self._reads_late:  # no value of this step may reach the prompt
            norm = torch.where(finite, norm, 0)
            for gradient in gradients:
                gradient.copy_(torch.where(finite.to(gradient.device), gradient, 0))
        else:
            self._check_finite()
        if self._first_update and not bool(norm > 0):
            warnings.warn(
                f"no gradient reaches what {self.method.name} trains: check that the prompt is attached and used",
                NotLearning,
                stacklevel=2,
            )
        self._first_update = False
        limit = self.config.max_grad_norm if max_grad_norm == "of the run" else max_grad_norm
        if limit is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        for name, optimiser in chosen.items():
            for group, lr in zip(optimiser.param_groups, self._base_lr[name], strict=True):
                schedule = group.get("schedule")
                group["lr"] = lr * lr_factor(self.config, self.state.step, self.total_steps, schedule, lr)
            optimiser.step()
        for optimiser in self.optimisers.values():
            optimiser.zero_grad(set_to_none=True)
        self._sums, self._ids, self._whole = [], [], False
        return norm

    # --- evaluation and early stopping --------------------------------------------------------------------------
    def evaluate(self, split: Split) -> dict[str, float]:
        """Metrics on a split in the run's precision; each process computes its share of the rows (see `evaluate`).

        Raises:
            NonFiniteLoss: the logits are NaN.
        """
        try:
            with self.passes():
                return evaluate(self.method, split, self.config.eval_batch_size, self.device, self.accelerator)
        except NonFiniteLoss as error:
            raise NonFiniteLoss(f"{error} at step {self.step}. Lower the learning rate") from error

    def record(self, metrics: Mapping[str, float]) -> None:
        """Log validation metrics of the step in progress, keep the best prompt, and stop when `patience` is used up.

        Args:
            metrics: by name; the configuration's `monitor` must be among them. One that is NaN is never the best.
        """
        if self._told_before():
            return
        self._check_finite()
        state, config = self.state, self.config
        monitor = config.monitor or ("loss" if "loss" in metrics else next(iter(metrics), "loss"))
        if monitor not in metrics:
            raise InputError(
                f"the run monitors {monitor!r}, which is not among the validation metrics",
                remedy=f"Choose one of: {', '.join(sorted(metrics)) or 'there are none'}",
                field="monitor",
            )
        larger = higher_is_better(monitor) if config.larger_is_better is None else config.larger_is_better
        value, sign = metrics[monitor], 1 if larger else -1
        gain = math.inf if state.best_value is None else (value - state.best_value) * sign
        state.monitor, state.last_metrics = monitor, dict(metrics)
        if gain > config.min_delta and not math.isnan(value):
            state.best_value, state.best_metrics, state.best_step = value, dict(metrics), self.step
            state.gains, state.bad = state.gains + 1, 0
            if config.keep_best:
                self.best = {name: tensor.clone() for name, tensor in self.method.trained_state().items()}
                if self.folder is not None and self.main:
                    _write_tensors(self._best_file(), self.best)
        else:
            state.bad += 1
        hopeless = config.interrupt_below is not None and not value * sign >= config.interrupt_below * sign  # or NaN
        state.stopped = hopeless or (config.patience is not None and state.bad >= config.patience)
        self.log({f"validation/{name}": value for name, value in metrics.items()})

    def log(self, values: Mapping[str, float]) -> None:
        """Append a row of the step in progress to metrics.jsonl and the trackers; values that are not finite are left out."""
        if self._told_before():
            return
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        row = {"step": self.step, **finite}
        self.history.append(row)
        if self.folder is not None and self.main:
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        if self.config.trackers:
            self.accelerator.log(finite, step=self.step)

    def _told_before(self) -> bool:
        """Whether this is before the first step, of a run that goes on: it was logged when the run began."""
        return self.state.step > 0 and not self._begun

    def finish(self) -> FitResult:
        """Put the best prompt into the method (if the run keeps the best), in eval mode, and say what came out."""
        state = self.state
        self._count_time()
        if self.best is not None:
            self.method.load_trained_state(self.best)
        self.method.eval()
        for tracker in self.accelerator.trackers:
            tracker.finish()
        return FitResult(
            steps=state.step,
            best_step=state.best_step if self.best is not None else state.step,
            metrics=state.best_metrics if self.best is not None else state.last_metrics,
            history=self.history,
            seconds_per_step=state.training_seconds / max(state.timed_steps, 1),
            stopped_early=state.stopped,
            seconds=state.seconds,
        )

    # --- between steps ------------------------------------------------------------------------------------------
    def training_done(self) -> None:
        """The training part of the step is over: what follows (evaluation) does not count as step time."""
        if self._started:
            self.state.training_seconds += time.perf_counter() - self._started
            self._started = 0.0

    def _count_time(self) -> None:
        """Add the time since the last call to that of the run."""
        now = time.perf_counter()
        self.state.seconds, self._since = self.state.seconds + now - self._since, now

    def _seed(self, step: int) -> None:
        """Seed what is drawn in a step by run, step and process (before the first step: the same in all processes)."""
        seed_all(self.config.seed, step, self.accelerator.process_index if step else 0)

    def _close_step(self) -> None:
        self.training_done()
        self._steps_here += 1
        state = self.state
        state.timed_steps += 1
        if self.step % self.config.log_every == 0 or self.step == self.total_steps or state.stopped:
            self._read_window()
            if state.counts.get("loss"):
                row = {name: total / state.counts[name] for name, total in state.sums.items() if state.counts[name]}
                state.last_loss = row["loss"]
                state.first_loss = row["loss"] if state.first_loss is None else state.first_loss
                state.sums, state.counts = {}, {}
                self.log(row | self._rates())
        state.step, self._in_step = self.step, False

    def _rates(self) -> dict[str, float]:
        """Learning rates by group, and by optimiser where there are several."""
        rates: dict[str, float] = {}
        for name, optimiser in self.optimisers.items():
            where = f"lr/{name}/" if len(self.optimisers) > 1 else "lr/"
            rates |= {f"{where}{group.get('name', i)}": group["lr"] for i, group in enumerate(optimiser.param_groups)}
        return rates

    def _read_window(self) -> None:
        """Move the losses since the last log from the device into the state; every process adds up those of all."""
        entries = []
        for sums, parts in self._window:
            total, count, *values = torch.cat([sums, *(v.reshape(1).to(sums) for v in parts.values())]).tolist()
            entries.append((count, {"loss": total} | dict(zip(parts, values, strict=True))))
        if self.accelerator.num_processes > 1:
            entries = gather_object(entries)
        for count, sums_by_name in entries:
            for name, value in sums_by_name.items():
                self.state.sums[name] = self.state.sums.get(name, 0.0) + value
                self.state.counts[name] = self.state.counts.get(name, 0.0) + count
        self._window.clear()

    def _progress(self) -> str:
        state, parts = self.state, [self.method.name]
        if state.last_loss is not None:
            parts.append(f"loss {state.last_loss:.4f}")
        if state.monitor is not None:
            best = f" (best {state.best_value:.4f})" if state.best_value is not None else ""
            parts.append(f"{state.monitor} {state.last_metrics[state.monitor]:.4f}{best}")
        return "  ".join(parts)

    def _check_finite(self) -> None:
        """Raise if the last update that was made, or is being made, is not finite."""
        if self._suspect is None:
            return
        (finite, step, ids), self._suspect = self._suspect, None
        if not bool(finite):
            kept = self._checkpoints()
            raise NonFiniteLoss(
                f"the loss or its gradient is not finite at step {step}; samples {ids}; last good checkpoint: "
                f"{kept[-1] if kept else 'none'}. Lower the learning rate, or look at these samples"
            )

    def _warn_if_flat(self) -> None:
        """Warn if neither the loss nor the monitored metric moved. A loss that couples rows need not fall (PPO)."""
        state = self.state
        if self._coupled or state.first_loss is None or state.last_loss is None:
            return
        fallen = state.first_loss - state.last_loss >= 0.01 * abs(state.first_loss)
        if fallen or state.gains > 1 or state.step < 5 * self.config.log_every or self._steps_here == 0:
            return
        rates = ", ".join(f"{lr:g}" for rates in self._base_lr.values() for lr in rates)
        warnings.warn(
            f"{self.method.name} is not learning: the loss went from {state.first_loss:.4f} to {state.last_loss:.4f} in "
            f"{state.step} steps. Soft prompts need far larger learning rates than weights (now {rates}; try 3 to 30 "
            "times that), and starting from embeddings of words helps",
            NotLearning,
            stacklevel=3,
        )

    # --- checkpoints --------------------------------------------------------------------------------------------
    def _describe_run(self) -> dict[str, Any]:
        """What must be the same for a run to be resumed; `Method.run_identity` adds what its configuration lacks."""
        method, config = self.method, self.config
        weights = None
        if method.frozen_backbone and not any(p.is_meta for p in method.backbone.parameters()):
            weights = fingerprint(method.backbone, full=False, config=True)  # asked at the start of every run
        # A backbone that is trained itself is in the checkpoint.
        start = method.trained_state() if method.frozen_backbone else {}
        return {
            "method": method.name,
            "method_config": method.config.model_dump(mode="json"),
            "method_identity": method.run_identity(),  # nothing, where older checkpoints have none
            "config": {k: v for k, v in config.model_dump(mode="json").items() if k not in MAY_CHANGE_ON_RESUME},
            "total_steps": self.total_steps,
            "optimisers": list(self.optimisers),
            "backbone": weights,
            "tensors": {name: list(tensor.shape) for name, tensor in method.trained_state().items()},
            "start": {name: _sums(tensor) for name, tensor in start.items()},
        }

    def _checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        found = self.folder.iterdir() if self.folder is not None else ()
        numbered = {int(m[1]): path for path in found if (m := re.fullmatch(r"checkpoint-(\d+)", path.name))}
        return [numbered[step] for step in sorted(numbered)]

    def _best_file(self) -> Path:
        assert self.folder is not None
        return self.folder / f"best-{self.state.best_step:07d}.safetensors"

    def checkpoint(self) -> None:
        """Write everything that the rest of the run depends on; a kill at any moment leaves the previous one whole.

        Called between steps, by `steps()`.
        """
        assert self.folder is not None
        self._check_finite()
        self._read_window()
        target = self.folder / f"checkpoint-{self.state.step:07d}"
        if self.main and not target.exists():
            log = self.folder / "metrics.jsonl"
            self._count_time()
            self.state.log_offset = log.stat().st_size if log.exists() else 0
            tensors = {f"method.{name}": tensor for name, tensor in self.method.trained_state().items()}
            scalars: dict[str, Any] = {}
            for number, optimiser in enumerate(self.optimisers.values()):
                for index, values in optimiser.state_dict()["state"].items():
                    for key, value in values.items():
                        where = tensors if isinstance(value, Tensor) else scalars
                        where[f"optimiser.{number}.{index}.{key}"] = value
            content = {
                "identity": self._identity,
                "state": asdict(self.state),
                "scalars": scalars,
                "method_state": self.method.extra_state(),
            }
            beside = self.folder / f".{target.name}.{os.getpid()}"
            beside.mkdir()
            _write_tensors(beside / "state.safetensors", tensors)
            write(beside / "state.json", json.dumps(content))
            if log.exists():
                with log.open("ab") as file:
                    os.fsync(file.fileno())  # what the checkpoint counts must be there after a power cut, too
            sync(beside)
            try:
                os.rename(beside, target)
            except OSError as error:
                if not target.exists():
                    raise
                remedy = "Wait for its end, or choose another output folder"
                raise InputError("another run writes here", file=self.folder, remedy=remedy) from error
            sync(self.folder)
            for old in self._checkpoints()[:-1]:
                shutil.rmtree(old)
            for old in self.folder.glob("best-*.safetensors"):
                if old != self._best_file():
                    old.unlink()
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        """Go on from the newest checkpoint, or start again where a run was killed before its first one."""
        assert self.folder is not None
        log = self.folder / "metrics.jsonl"
        kept = self._checkpoints()
        if kept:
            with _whole(kept[-1]):
                content = json.loads((kept[-1] / "state.json").read_text("utf-8"))
                tensors = load_file(kept[-1] / "state.safetensors")
                identity = content["identity"]
            self._refuse_another_run(identity)
            with _whole(kept[-1]):
                self._load(tensors, content)
        if self.main:
            for leftover in [*self.folder.glob(".checkpoint-*"), *self.folder.glob(".best-*")]:
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            if log.exists():
                # What was logged after the checkpoint will be logged again.
                os.truncate(log, min(self.state.log_offset, log.stat().st_size))
        self.accelerator.wait_for_everyone()
        with _whole(log):
            self.history = [json.loads(line) for line in log.read_text("utf-8").splitlines()] if log.exists() else []

    def _refuse_another_run(self, identity: Mapping[str, Any]) -> None:
        theirs, ours = flat(identity), flat(self._identity)
        changed = [
            f"{key}: {theirs.get(key)!r} there, {ours.get(key)!r} here"
            for key in sorted(theirs.keys() | ours.keys())
            if theirs.get(key) != ours.get(key)
            and not (key.startswith("start.") and _alike(theirs.get(key), ours.get(key)))
        ]
        if changed:
            remedy = "Choose another output folder, or delete this one to start again"
            if all(line.startswith("start.") for line in changed):  # of a method that was trained in this process, say
                remedy = f"To go on with that run, make the method anew, as it was before. {remedy}"
            raise InputError(
                f"{self.folder} holds a run of another configuration ({'; '.join(changed)})", remedy=remedy
            )

    def _load(self, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> None:
        """Put a checkpoint into method, optimisers and state."""
        start = "method."
        self.method.load_trained_state({k.removeprefix(start): t for k, t in tensors.items() if k.startswith(start)})
        self.method.load_extra_state(content["method_state"])
        values = {**tensors, **content["scalars"]}
        for number, optimiser in enumerate(self.optimisers.values()):
            start = f"optimiser.{number}."
            state: dict[int, dict[str, Any]] = {}
            for key in (key.removeprefix(start) for key in values if key.startswith(start)):
                index, _, entry = key.partition(".")
                state.setdefault(int(index), {})[entry] = values[start + key]
            optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
        self.state = _State(**content["state"])
        if self.config.keep_best and self.state.best_value is not None:
            self.best = load_file(self._best_file())


def seed_all(*words: int) -> None:
    """Seed the generators of Python, NumPy and torch by whole numbers, each of which counts."""
    number = int(np.random.SeedSequence(words).generate_state(1)[0])
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Reads a part of a run's folder: what cannot be read is damaged, not the reader."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"this part of a run cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:200]})",
            remedy="Delete the run's folder to start again",
            file=path,
        ) from error


def _accelerator(config: FitConfig, folder: Path | None) -> tuple[Accelerator, torch.device]:
    """Processes and trackers, and the device of this process.

    accelerate decides on the device once for the life of the process, so a run on the CPU does not ask it for one, unless
    there are several processes, which then talk to each other as CPU processes do.
    """
    if "tensorboard" in config.trackers and folder is None:
        raise InputError("tensorboard needs a folder to write to", remedy="Give an output folder", field="trackers")
    on_cpu = config.device == "cpu"
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    accelerator = Accelerator(
        cpu=on_cpu and several, log_with=list(config.trackers) or None, project_dir=str(folder) if folder else None
    )
    found = {str(getattr(kind, "value", kind)) for kind in accelerator.log_with}
    if missing := [name for name in config.trackers if name not in found]:
        raise InputError(f"{missing[0]} is not installed", remedy=f"Install {missing[0]}", field="trackers")
    return accelerator, torch.device("cpu") if on_cpu else accelerator.device


def _sums(tensor: Tensor) -> list[float]:
    """Two numbers that tell a tensor from others, as far as rounding goes; two more where it has NaN or infinities."""
    values = tensor.detach().cpu().double().flatten()
    places, finite = torch.linspace(-1, 1, len(values)).to(values), values.isfinite()
    kept = values.where(finite, 0)
    told = [kept.norm(), (kept * places).sum()]
    if not finite.all():
        told += [(~finite).sum(), (places * ~finite).sum()]
    return [float(value) for value in told]


def _alike(theirs: Any, ours: Any) -> bool:
    """Equality, for lists of floats up to rounding: start values may come from another device."""
    if isinstance(theirs, list) and isinstance(ours, list) and all(isinstance(x, float) for x in [*theirs, *ours]):
        scale = 1e-4 * max((abs(x) for x in theirs), default=0.0) + 1e-6
        return len(theirs) == len(ours) and all(abs(a - b) <= scale for a, b in zip(theirs, ours, strict=True))
    return bool(theirs == ours)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"config": {"lr": 1}} -> {"config.lr": 1}."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    write(path, save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}))


def fit(
    method: Method,
    train: Split,
    validation: Split | None = None,
    config: FitConfig | None = None,
    output_dir: str | Path | None = None,
    *,
    make_step: Callable[[Loop, int, list[int]], None] | None = None,
    after_step: Callable[[int], None] | None = None,
) -> FitResult:
    """Supervised training over batches of rows. A method that trains nothing is only evaluated.

    Args:
        method: what is trained.
        train: rows that are trained on.
        validation: rows that pick the best step and stop early; None trains to the end.
        config: the run; by default 10 epochs at the method's own rates.
        output_dir: folder for metrics and checkpoints; a killed run of the same configuration goes on from there.
        make_step: makes the updates of a step in place of the plain one, from the loop, the step's number (from 1) and its
            rows: for methods that alternate, or need more than one gradient.
        after_step: called with the step's number after each step, and before its evaluation.

    Raises:
        InputError: the configuration or data cannot be trained on.
        NonFiniteLoss: the loss became NaN or infinite.
    """
    config = config or FitConfig(epochs=10)
    check_fit(method, train, validation, config)
    if not method.trains:
        accelerator, device = _accelerator(config, Path(output_dir) if output_dir is not None else None)
        method.place(device).eval()
        options = {"device": device, "accelerator": accelerator, "precision": config.precision}
        metrics = evaluate(method, validation, config.eval_batch_size, **options) if validation is not None else {}
        return FitResult(metrics=metrics)
    lengths = list(train.lengths) if config.bucket_by_length and train.lengths is not None else None
    plan = BatchPlan(len(train), config.batch_size, config.seed, lengths)
    total = config.max_steps or plan.per_epoch * (config.epochs or 1)
    every = config.evaluate_every or plan.per_epoch
    identity = {"train": described(train), "validation": None if validation is None else described(validation)}
    loop = Loop(method, config, output_dir, total_steps=total, identity=identity)
    method.train()
    try:
        for step in loop.steps():
            rows = plan.batch(step - 1)
            if make_step is None:
                backward(loop, train, rows)
                loop.update()
            else:
                make_step(loop, step, rows)
            loop.training_done()
            if after_step is not None:
                after_step(step)
            if validation is not None and (step % every == 0 or step == total):
                loop.record(loop.evaluate(validation))
    except BaseException:
        method.eval()  # others may go on with the backbone
        raise
    return loop.finish()


def described(split: Split) -> str:
    """What tells a split from others without reading its rows."""
    named = json.dumps([None if x is None else list(x) for x in (split.ids, split.lengths)], default=str)
    return f"{len(split)} rows ({hashlib.sha256(named.encode()).hexdigest()[:12]})"


def backward(loop: Loop, train: Split, rows: list[int]) -> None:
    """Add the gradient of the method's loss on `rows` of the global batch: this process's share, in micro-batches."""
    for part in loop.share(rows):
        batch = loop.to_device(train.batch(part))
        with loop.passes():
            loss = loop.method.loss(batch)
        loop.backward(loss, batch)


def check_fit(method: Method, train: Split, validation: Split | None, config: FitConfig) -> None:
    """Refuse, before the first step, settings that could not be followed."""
    if config.bucket_by_length and train.lengths is None:
        raise InputError("the training rows have no lengths", remedy="Leave bucket_by_length off", field="lengths")
    for name in ("patience", "interrupt_below"):
        if validation is None and getattr(config, name) is not None:
            raise InputError("there are no validation rows to stop by", remedy="Give some, or leave it out", field=name)
    if config.monitor is None or validation is None:
        return
    known = {*validation.metrics} | ({"loss"} if method.loss_comes_from() else set())
    if config.monitor not in known and validation.scorer is not None:  # a scorer's names are known by trying
        device = device_of(config)
        method.place(device)
        known |= evaluate(method, validation.subset([0]), 1, device, precision=config.precision).keys()
    if config.monitor not in known:
        raise InputError(
            f"the run monitors {config.monitor!r}, which is not among the validation metrics",
            remedy=f"Choose one of: {', '.join(sorted(known))}",
            field="monitor",
        )
