"""Training: `Loop`, the engine, and `fit`, plain supervised training made of it.

The engine stands on accelerate for devices, processes and trackers, and does itself what a prompt of kilobytes needs done
differently: nothing is wrapped (gradients are a few tensors and are summed over processes directly), a step divides by
the global count of terms (so accumulation equals the large batch and two processes equal one), and a checkpoint holds what
is trained and nothing else (safetensors and JSON, written beside and renamed), from which a killed run goes on to the
same result.

Loops of another shape are written out of the same parts:

    loop = Loop(method, config, output_dir, total_steps=n)
    for step in loop.steps():            # goes on where a killed run stopped; progress, checkpoints, early stopping
        loop.backward(method.loss(batch), batch)
        loop.update()                    # reduce, divide, clip, schedule, step
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from pydantic import BaseModel, ConfigDict, Field, model_validator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor

from pt_core.data import Split
from pt_core.errors import InputError
from pt_core.method import Batch, Loss, Method


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient is NaN or infinite. Says the step, the sample ids and the last good checkpoint."""


class NotLearning(UserWarning):
    """Nothing is being learned: no gradient reaches the prompt, or the loss stays where it began."""


class FitConfig(BaseModel):
    """How a run is trained. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_steps: int | None = Field(None, ge=1, description="optimiser steps; give this or `epochs`")
    epochs: int | None = Field(None, ge=1, description="passes over the training rows; give this or `max_steps`")
    batch_size: int = Field(8, ge=1, description="rows of an optimiser step, over all processes and micro-batches")
    micro_batch_size: int | None = Field(None, ge=1, description="rows of one forward pass; default: all at once")
    optimiser: Literal["adamw", "adam", "adafactor", "sgd"] = "adamw"
    lr: float | None = Field(
        None, gt=0, description="learning rate of groups that name none; default: the method's own"
    )
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["constant", "linear", "cosine", "exponential"] = "constant"
    warmup_steps: int = Field(0, ge=0, description="linear warm-up before the schedule")
    final_factor: float = Field(0.01, gt=0, le=1, description="share of the rate that `exponential` ends at (PTEC)")
    max_grad_norm: float | None = Field(1.0, gt=0, description="global norm of an optimiser's gradients is cut to this")
    evaluate_every: int | None = Field(None, ge=1, description="steps between evaluations; default: once an epoch")
    eval_batch_size: int = Field(32, ge=1)
    monitor: str = Field("loss", description="validation metric that picks the best step and stops early")
    patience: int | None = Field(None, ge=1, description="evaluations without gain before the run stops")
    min_delta: float = Field(0.0, ge=0, description="what counts as a gain")
    keep_best: bool = Field(True, description="end with the best step's prompt rather than the last one's")
    checkpoint_every: int | None = Field(None, ge=1, description="steps between checkpoints; default: evaluate_every")
    log_every: int = Field(10, ge=1)
    precision: Literal["float32", "bf16"] = Field("float32", description="autocast of the passes; prompts stay float32")
    device: str = Field("auto", description="`auto` (what accelerate finds) or `cpu`")
    bucket_by_length: bool = Field(False, description="batches of rows of like length; less padding, another order")
    seed: int = 0
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    progress: bool = True

    @model_validator(mode="after")
    def _one_length(self) -> FitConfig:
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of max_steps and epochs")
        return self


_MAY_CHANGE_ON_RESUME = {"progress", "trackers", "checkpoint_every", "device"}


def lr_factor(config: FitConfig, step: int, total: int) -> float:
    """Factor on the learning rate of step `step` (0-based) of `total`.

    A function of the step alone, so that a resumed run needs no scheduler state. `exponential` multiplies by
    gamma = final_factor^(1 / (total - 1)) each step and ends at `final_factor`.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    left = max(total - config.warmup_steps, 1)
    at = step - config.warmup_steps
    if config.schedule == "linear":
        return max(0.0, 1 - at / left)
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * at / left))
    if config.schedule == "exponential":
        return float(config.final_factor ** (at / max(left - 1, 1)))
    return 1.0


def build_optimiser(groups: list[dict[str, Any]], config: FitConfig, default_lr: float = 1e-3) -> torch.optim.Optimizer:
    """Optimiser over named groups. A group's own `lr` or `weight_decay` wins over the run's."""
    seen: set[int] = set()
    for group in groups:
        if any(id(p) in seen or seen.add(id(p)) for p in group["params"]):  # type: ignore[func-returns-value]
            raise InputError(f"a parameter of group {group['name']!r} is in two groups of one optimiser")
    kinds = {
        "adamw": torch.optim.AdamW,
        "adam": torch.optim.Adam,
        "adafactor": torch.optim.Adafactor,
        "sgd": torch.optim.SGD,
    }
    lr = config.lr if config.lr is not None else default_lr
    return kinds[config.optimiser](groups, lr=lr, weight_decay=config.weight_decay)


class BatchPlan:
    """Which rows make up the global batch of each step: a function of seed and step, so nothing has to be restored.

    Every epoch is a fresh permutation; its last batch may be short; no row is repeated within an epoch. With `lengths`,
    each stretch of 50 batches is sorted by length and its batches are shuffled again.
    """

    def __init__(self, rows: int, batch_size: int, seed: int, lengths: list[int] | None = None) -> None:
        if rows == 0:
            raise InputError("there are no training rows", remedy="Check the training split")
        self.rows, self.batch_size, self.seed, self.lengths = rows, min(batch_size, rows), seed, lengths
        self.per_epoch = math.ceil(rows / self.batch_size)
        self._epoch, self._batches = -1, list[list[int]]()

    def batch(self, step: int) -> list[int]:
        """Rows of 0-based step `step`."""
        epoch, at = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            generator = np.random.default_rng((self.seed, epoch))
            order = generator.permutation(self.rows)
            if self.lengths is not None:
                stretch = 50 * self.batch_size
                lengths = np.asarray(self.lengths)
                parts = [order[i : i + stretch] for i in range(0, self.rows, stretch)]
                order = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in parts])
            batches = [order[i : i + self.batch_size].tolist() for i in range(0, self.rows, self.batch_size)]
            if self.lengths is not None:
                batches = [batches[i] for i in generator.permutation(len(batches))]
            self._epoch, self._batches = epoch, batches
        return self._batches[at]


@dataclass
class FitResult:
    """What came out of a run.

    Args:
        steps: optimiser steps made, over all resumed parts.
        best_step: step whose prompt the method ends with.
        metrics: validation metrics at that step (empty without validation).
        history: the rows of metrics.jsonl.
        seconds_per_step: mean wall time of forward, backward and update in this process, evaluation not counted.
        stopped_early: the monitored metric did not gain for `patience` evaluations.
    """

    steps: int
    best_step: int
    metrics: dict[str, float]
    history: list[dict[str, Any]]
    seconds_per_step: float
    stopped_early: bool


@dataclass
class _State:
    """What a checkpoint keeps besides tensors."""

    step: int = 0
    log_offset: int = 0
    window_total: float = 0.0
    window_count: float = 0.0
    window_parts: dict[str, float] = field(default_factory=dict)
    first_loss: float | None = None
    last_loss: float | None = None
    best_value: float | None = None
    best_step: int = 0
    best_metrics: dict[str, float] = field(default_factory=dict)
    bad: int = 0
    stopped: bool = False


class Loop:
    """The engine of every training run.

    Args:
        method: what is trained; it is placed on the device.
        config: the run.
        output_dir: folder for `metrics.jsonl`, checkpoints and trackers; None keeps everything in memory. If a killed run
            of the same configuration left a checkpoint there, the loop goes on from it.
        total_steps: length of the run in the loop's own steps.
        identity: anything JSON that must be the same for a run to be resumed (data size, recipe).

    Raises:
        InputError: the folder holds a run of another configuration.
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
        self.accelerator = Accelerator(
            cpu=config.device == "cpu",
            log_with=list(config.trackers) or None,
            project_dir=str(self.folder) if self.folder else None,
        )
        self.device = self.accelerator.device
        method.place(self.device)
        random.seed(config.seed)
        np.random.seed(config.seed)
        torch.manual_seed(config.seed)
        self.optimisers = method.optimisers(config)
        self._base_lr = {
            name: [group["lr"] for group in optimiser.param_groups] for name, optimiser in self.optimisers.items()
        }
        self.state = _State()
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Tensor] | None = None
        self.training_seconds, self._steps_here = 0.0, 0
        self._count: Tensor | float = 0.0
        self._backwards, self._decomposes = 0, True
        self._ids: list[Any] = []
        self._window: list[tuple[Tensor, Tensor | float, dict[str, Tensor]]] = []
        self._suspect: tuple[Tensor, int, list[Any]] | None = None
        self._started = 0.0
        self._identity = {
            "method": method.name,
            "method_config": method.config.model_dump(mode="json"),
            "config": {k: v for k, v in config.model_dump(mode="json").items() if k not in _MAY_CHANGE_ON_RESUME},
            "total_steps": total_steps,
            **(identity or {}),
        }
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._resume()
        if config.trackers:
            self.accelerator.init_trackers("run", config={"method": method.name, "seed": config.seed})

    # --- the run ------------------------------------------------------------------------------------------------
    @property
    def main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    def steps(self) -> Iterator[int]:
        """1-based numbers of the steps still to make. What is due after a step (log, checkpoint) happens between them."""
        every = self.config.checkpoint_every or self.config.evaluate_every or 100
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        bar = Progress(*columns, transient=True, disable=not (self.config.progress and self.main))
        with bar:
            task = bar.add_task(self.method.name, total=self.total_steps, completed=self.state.step)
            while self.state.step < self.total_steps and not self.state.stopped:
                self._started = time.perf_counter()
                yield self.state.step + 1
                self._close_step()
                bar.update(task, completed=self.state.step, description=self._describe())
                if self.folder is not None and self.state.step % every == 0:
                    self.checkpoint()
        self._check_suspect()
        if self.folder is not None:
            self.checkpoint()
        self._warn_if_flat()
        if self.config.trackers:
            self.accelerator.end_training()

    def autocast(self) -> AbstractContextManager[Any]:
        """Context of the passes: bf16 autocast if the run asks for it."""
        if self.config.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def to_device(self, batch: Any) -> Any:
        """The batch with its tensors on this process's device."""
        return send_to_device(batch, self.device)

    def share(self, rows: list[int]) -> list[list[int]]:
        """This process's part of a global batch, cut into micro-batches. No row is repeated or dropped."""
        processes = self.accelerator.num_processes
        mine = [int(i) for i in np.array_split(np.asarray(rows), processes)[self.accelerator.process_index]]
        size = self.config.micro_batch_size or max(len(mine), 1)
        return [mine[i : i + size] for i in range(0, len(mine), size)]

    def backward(self, loss: Loss, batch: Batch | None = None) -> None:
        """Add the gradient of a micro-batch's total. The division by the global count is `update`'s."""
        self._backwards += 1
        self._decomposes &= loss.decomposes
        if not self._decomposes and (self._backwards > 1 or self.accelerator.num_processes > 1):
            raise InputError(
                f"the loss of {self.method.name} couples the rows of a batch: it cannot be accumulated or split",
                remedy="Set micro_batch_size to batch_size and use one process",
            )
        self._ids.extend(batch.get("sample_ids", []) if batch is not None else [])
        if self.device.type == "cpu" and not bool(torch.isfinite(loss.total)):
            raise self._non_finite(self.state.step + 1, self._ids)
        loss.total.backward()
        self._count = self._count + loss.count
        self._window.append(
            (loss.total.detach(), loss.count, {name: value.detach() for name, value in loss.parts.items()})
        )

    def update(self, name: str = "main") -> Tensor:
        """Step one optimiser with the gradients since its last step: reduce over processes, divide, clip, schedule.

        Returns:
            The global gradient norm before clipping (a tensor: reading it waits for the device).
        """
        optimiser = self.optimisers[name]
        parameters = [p for group in optimiser.param_groups for p in group["params"]]
        count = torch.as_tensor(self._count, dtype=torch.float32, device=self.device)
        if self.accelerator.num_processes > 1:
            count = self.accelerator.reduce(count, reduction="sum")
            for p in parameters:
                p.grad = self.accelerator.reduce(p.grad if p.grad is not None else torch.zeros_like(p), reduction="sum")
        gradients = [p.grad for p in parameters if p.grad is not None]
        for gradient in gradients:
            gradient.div_(count.to(gradient.device))
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
        finite = torch.isfinite(norm)
        if self.device.type == "cpu":
            if not bool(finite):
                raise self._non_finite(self.state.step + 1, self._ids)
        else:  # reading the flag now would make the device wait: the update is masked, the flag read one step late
            for gradient in gradients:
                gradient.copy_(torch.where(finite.to(gradient.device), gradient, 0))
            self._check_suspect()
            self._suspect = (finite, self.state.step + 1, list(self._ids))
        if self.state.step == 0 and not bool(norm > 0):
            warnings.warn(
                f"no gradient reaches what {self.method.name} trains: check that the prompt is attached and used",
                NotLearning,
                stacklevel=2,
            )
        if self.config.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.max_grad_norm, norm)
        factor = lr_factor(self.config, self.state.step, self.total_steps)
        for group, lr in zip(optimiser.param_groups, self._base_lr[name], strict=True):
            group["lr"] = lr * factor
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        self._count, self._backwards, self._decomposes, self._ids = 0.0, 0, True, []
        return norm

    # --- evaluation and early stopping --------------------------------------------------------------------------
    def record(self, metrics: Mapping[str, float], larger_is_better: bool | None = None) -> None:
        """Log validation metrics of the step in progress, keep the best prompt, and stop when `patience` is used up.

        Args:
            metrics: by name; the configuration's `monitor` must be among them.
            larger_is_better: default: everything but a loss.
        """
        monitor = self.config.monitor
        if monitor not in metrics:
            raise InputError(
                f"the run monitors {monitor!r}, which is not among the validation metrics",
                remedy=f"Choose one of {', '.join(sorted(metrics))}",
            )
        step = self.state.step + 1
        value = metrics[monitor]
        larger = larger_is_better if larger_is_better is not None else "loss" not in monitor
        gain = math.inf if self.state.best_value is None else (value - self.state.best_value) * (1 if larger else -1)
        if gain > self.config.min_delta:
            self.state.best_value, self.state.best_step = value, step
            self.state.best_metrics, self.state.bad = dict(metrics), 0
            self.best = {name: tensor.clone() for name, tensor in self.method.trained_state().items()}
            if self.folder is not None and self.main:
                _write_tensors(self.folder / f"best-{step:07d}.safetensors", self.best)
        else:
            self.state.bad += 1
            self.state.stopped = self.config.patience is not None and self.state.bad >= self.config.patience
        self.log({f"validation/{name}": value for name, value in metrics.items()}, step)

    def log(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Append a row to metrics.jsonl and the trackers."""
        row = {"step": step if step is not None else self.state.step, **values}
        self.history.append(row)
        if self.folder is not None and self.main:
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        if self.config.trackers:
            self.accelerator.log(dict(values), step=row["step"])

    def finish(self) -> FitResult:
        """Put the best prompt into the method (if the run keeps the best) and say what came out."""
        if self.config.keep_best and self.best is not None:
            self.method.load_trained_state({k: v.to(self.device) for k, v in self.best.items()})
        return FitResult(
            steps=self.state.step,
            best_step=self.state.best_step if self.config.keep_best and self.best is not None else self.state.step,
            metrics=self.state.best_metrics,
            history=self.history,
            seconds_per_step=self.training_seconds / max(self._steps_here, 1),
            stopped_early=self.state.stopped,
        )

    # --- between steps ------------------------------------------------------------------------------------------
    def training_done(self) -> None:
        """The training part of the step is over: what follows (evaluation) does not count as step time."""
        if self._started:
            self.training_seconds += time.perf_counter() - self._started
            self._started = 0.0

    def _close_step(self) -> None:
        self.training_done()
        self._steps_here += 1
        self.state.step += 1
        if self.state.step % self.config.log_every == 0 or self.state.step == self.total_steps:
            self._read_window()
            state = self.state
            if state.window_count:
                row = {"loss": state.window_total / state.window_count}
                row |= {name: total / state.window_count for name, total in state.window_parts.items()}
                first = next(iter(self.optimisers.values()), None)
                if first is not None:
                    row |= {f"lr/{group.get('name', i)}": group["lr"] for i, group in enumerate(first.param_groups)}
                state.last_loss = row["loss"]
                state.first_loss = state.first_loss if state.first_loss is not None else row["loss"]
                self.log(row)
                state.window_total, state.window_count, state.window_parts = 0.0, 0.0, {}

    def _read_window(self) -> None:
        """Move the losses since the last log from the device into the state, summed over processes."""
        for total, count, parts in self._window:
            values = torch.stack([total, torch.as_tensor(count, device=total.device).to(total), *parts.values()])
            if self.accelerator.num_processes > 1:
                values = self.accelerator.reduce(values, reduction="sum")
            numbers = values.double().tolist()
            self.state.window_total += numbers[0]
            self.state.window_count += numbers[1]
            for name, number in zip(parts, numbers[2:], strict=True):
                self.state.window_parts[name] = self.state.window_parts.get(name, 0.0) + number
        self._window.clear()

    def _describe(self) -> str:
        parts = [self.method.name]
        if self.state.last_loss is not None:
            parts.append(f"loss {self.state.last_loss:.4f}")
        if self.state.best_value is not None:
            parts.append(f"best {self.config.monitor} {self.state.best_value:.4f}")
        return "  ".join(parts)

    def _non_finite(self, step: int, ids: list[Any]) -> NonFiniteLoss:
        last = self._checkpoints()[-1] if self._checkpoints() else None
        return NonFiniteLoss(
            f"the loss or its gradient is not finite at step {step}; samples {ids}; last good checkpoint: "
            f"{last if last is not None else 'none'}. Lower the learning rate, or look at these samples"
        )

    def _check_suspect(self) -> None:
        if self._suspect is not None and not bool(self._suspect[0]):
            raise self._non_finite(self._suspect[1], self._suspect[2])
        self._suspect = None

    def _warn_if_flat(self) -> None:
        first, last = self.state.first_loss, self.state.last_loss
        if first is None or last is None or self.state.step < 5 * self.config.log_every or self._steps_here == 0:
            return
        if last > 0.99 * first:
            rates = ", ".join(f"{lr:g}" for rates in self._base_lr.values() for lr in rates)
            warnings.warn(
                f"{self.method.name} is not learning: the loss went from {first:.4f} to {last:.4f} in {self.state.step} "
                f"steps. Soft prompts need far larger learning rates than weights (now {rates}; try 3 to 30 times that), "
                "and starting from embeddings of words helps",
                NotLearning,
                stacklevel=3,
            )

    # --- checkpoints --------------------------------------------------------------------------------------------
    def _checkpoints(self) -> list[Path]:
        return sorted(self.folder.glob("checkpoint-*[0-9]")) if self.folder is not None else []

    def checkpoint(self) -> None:
        """Write everything that the rest of the run depends on; a kill at any moment leaves the previous one whole."""
        assert self.folder is not None
        self._read_window()
        if not self.main:
            return
        log = self.folder / "metrics.jsonl"
        self.state.log_offset = log.stat().st_size if log.exists() else 0
        tensors = {f"method.{name}": tensor for name, tensor in self.method.trained_state().items()}
        scalars: dict[str, Any] = {}
        for name, optimiser in self.optimisers.items():
            for index, values in optimiser.state_dict()["state"].items():
                for key, value in values.items():
                    if isinstance(value, Tensor):
                        tensors[f"optimiser.{name}.{index}.{key}"] = value
                    elif value is not None:
                        scalars[f"{name}.{index}.{key}"] = value
        tensors["rng.torch"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        version, keys, gauss = random.getstate()
        numpy_state: Any = np.random.get_state(legacy=False)
        tensors["rng.numpy"] = torch.from_numpy(numpy_state["state"]["key"].astype(np.int64))
        tensors["rng.python"] = torch.tensor(keys, dtype=torch.int64)
        content = {
            "identity": self._identity,
            "state": self.state.__dict__,
            "optimiser_scalars": scalars,
            "method_state": self.method.extra_state(),
            "python": [version, gauss],
            "numpy": [int(numpy_state["state"]["pos"]), numpy_state["has_gauss"], numpy_state["gauss"]],
        }
        target = self.folder / f"checkpoint-{self.state.step:07d}"
        if target.exists():
            return
        beside = self.folder / f".{target.name}.{os.getpid()}"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        _write_tensors(beside / "state.safetensors", tensors)
        (beside / "state.json").write_text(json.dumps(content), "utf-8")
        os.rename(beside, target)
        for old in self._checkpoints()[:-1]:
            shutil.rmtree(old)
        for old in self.folder.glob("best-*.safetensors"):
            if old.name != f"best-{self.state.best_step:07d}.safetensors":
                old.unlink()

    def _resume(self) -> None:
        assert self.folder is not None
        log = self.folder / "metrics.jsonl"
        if self.main:
            for leftover in self.folder.glob(".checkpoint-*"):
                shutil.rmtree(leftover)
        if not self._checkpoints():
            if log.exists() and self.main:  # a run that was killed before its first checkpoint: it starts again
                log.unlink()
            self.accelerator.wait_for_everyone()
            return
        folder = self._checkpoints()[-1]
        content = json.loads((folder / "state.json").read_text("utf-8"))
        mine = json.loads(json.dumps(self._identity))
        if content["identity"] != mine:
            changed = sorted(
                k for k in mine.keys() | content["identity"].keys() if mine.get(k) != content["identity"].get(k)
            )
            raise InputError(
                f"{self.folder} holds a run of another configuration (different: {', '.join(changed)})",
                remedy="Choose another output folder, or delete this one to start again",
            )
        tensors = load_file(folder / "state.safetensors")
        trained = {n.removeprefix("method."): t for n, t in tensors.items() if n.startswith("method.")}
        self.method.load_trained_state({n: t.to(self.device) for n, t in trained.items()})
        self.method.load_extra_state(content["method_state"])
        for name, optimiser in self.optimisers.items():
            saved = optimiser.state_dict()
            state: dict[int, dict[str, Any]] = {}
            for key, tensor in tensors.items():
                kind, _, rest = key.partition(".")
                if kind == "optimiser" and rest.startswith(f"{name}."):
                    _, index, field_name = rest.split(".", 2)
                    state.setdefault(int(index), {})[field_name] = tensor
            for key, value in content["optimiser_scalars"].items():
                if key.startswith(f"{name}."):
                    _, index, field_name = key.split(".", 2)
                    state.setdefault(int(index), {})[field_name] = value
            optimiser.load_state_dict({"state": state, "param_groups": saved["param_groups"]})
        torch.set_rng_state(tensors["rng.torch"])
        if "rng.cuda" in tensors and self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)
        random.setstate((content["python"][0], tuple(tensors["rng.python"].tolist()), content["python"][1]))
        position, has_gauss, gauss = content["numpy"]
        key = tensors["rng.numpy"].numpy().astype(np.uint32)
        np.random.set_state(("MT19937", key, position, has_gauss, gauss))
        self.state = _State(**content["state"])
        best = self.folder / f"best-{self.state.best_step:07d}.safetensors"
        self.best = load_file(best) if self.state.best_value is not None else None
        if self.main and log.exists():
            with log.open("r+b") as file:
                file.truncate(self.state.log_offset)
        self.accelerator.wait_for_everyone()
        self.history = [json.loads(line) for line in log.read_text("utf-8").splitlines()] if log.exists() else []


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, beside)
    os.replace(beside, path)


@torch.no_grad()
def evaluate(
    method: Method, split: Split, batch_size: int = 32, device: torch.device | None = None
) -> dict[str, float]:
    """Metrics of a method on a split: the split's own scorer if it has one, else its metrics on the logits, and the loss.

    Returns:
        Metric name -> value; `loss` is the mean over the loss's own terms.
    """
    from pt_core.metrics import evaluate_logits

    was_training = method.training
    method.eval()
    results: dict[str, float] = {}
    logits: list[Tensor] = []
    labels: list[Tensor] = []
    total, count = 0.0, 0.0
    for batch in split.batches(batch_size):
        batch = send_to_device(batch, device) if device is not None else batch
        if method.trains:
            loss = method.loss(batch)
            total, count = total + float(loss.total), count + float(loss.count)
        if split.metrics and split.scorer is None:
            output = method(batch)
            if output.logits is None:
                raise InputError(f"{method.name} gives no logits for the metrics {', '.join(split.metrics)}")
            logits.append(output.logits.float().cpu())
            labels.append(torch.as_tensor(batch["labels"]).cpu())
    if count:
        results["loss"] = total / count
    if logits:
        results |= evaluate_logits(split.metrics, split.task, torch.cat(logits), torch.cat(labels))
    if split.scorer is not None:
        results |= split.scorer(method, split)
    method.train(was_training)
    return results


def fit(
    method: Method,
    train: Split,
    validation: Split | None = None,
    config: FitConfig | None = None,
    output_dir: str | Path | None = None,
    *,
    after_step: Callable[[int], None] | None = None,
) -> FitResult:
    """Plain supervised training.

    Args:
        method: what is trained.
        train: rows that are trained on.
        validation: rows that pick the best step and stop early; None trains to the end.
        config: the run; by default 10 epochs at the method's own rates.
        output_dir: folder for metrics and checkpoints; a killed run of the same configuration goes on from there.
        after_step: called with the step's number after each step.

    Raises:
        InputError: the configuration or data cannot be trained on.
        NonFiniteLoss: the loss became NaN or infinite.
    """
    config = config or FitConfig(epochs=10)
    lengths = list(train.lengths) if config.bucket_by_length and train.lengths is not None else None
    plan = BatchPlan(len(train), config.batch_size, config.seed, lengths)
    total = config.max_steps or plan.per_epoch * (config.epochs or 1)
    every = config.evaluate_every or plan.per_epoch
    identity = {"train": len(train), "validation": len(validation) if validation is not None else None}
    loop = Loop(method, config, output_dir, total_steps=total, identity=identity)
    method.train()
    for step in loop.steps():
        for rows in loop.share(plan.batch(step - 1)):
            batch = loop.to_device(train.batch(rows))
            with loop.autocast():
                loss = method.loss(batch)
            loop.backward(loss, batch)
        loop.update()
        loop.training_done()
        if validation is not None and (step % every == 0 or step == total):
            with loop.autocast():
                loop.record(evaluate(method, validation, config.eval_batch_size, loop.device))
        if after_step is not None:
            after_step(step)
    return loop.finish()
