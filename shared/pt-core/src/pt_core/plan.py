"""How a run is trained: its settings, learning rates, and the rows of each step; all a function of seed and step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from accelerate import Accelerator
from pydantic import Field, model_validator

from pt_core.errors import InputError
from pt_core.settings import Settings

if TYPE_CHECKING:
    from pt_core.method import Method

Schedule = Literal["constant", "linear", "cosine", "exponential", "epoch-cosine", "epoch-cosine-plain"]
BY_EPOCHS = ("epoch-cosine", "epoch-cosine-plain")  # schedules that count epochs


class FitConfig(Settings):
    """How a run is trained. Unknown keys are refused."""

    max_steps: int | None = Field(default=None, ge=1, description="optimiser steps; give this or `epochs`")
    epochs: int | None = Field(default=None, ge=1, description="passes over the rows; give this or `max_steps`")
    batch_size: int = Field(default=8, ge=1, description="rows of a step, over all processes and micro-batches")
    micro_batch_size: int | None = Field(default=None, ge=1, description="rows of one pass; default: all at once")
    optimiser: Literal["adamw", "adam", "adafactor", "sgd"] = Field(
        default="adamw",
        description="adafactor: torch's; steps scale with a parameter's RMS, rates are at most 1/sqrt(step)",
    )
    lr: float | None = Field(default=None, gt=0, description="rate of groups that name none; default: 1e-3")
    weight_decay: float = Field(default=0.0, ge=0)
    momentum: float = Field(default=0.0, ge=0, lt=1, description="of sgd")
    schedule: Schedule = Field(default="constant", description="of groups that name none")
    warmup_steps: int = Field(default=0, ge=0, description="linear warm-up before the schedule")
    final_factor: float = Field(default=0.01, gt=0, le=1, description="share that `exponential` ends at (PTEC)")
    max_grad_norm: float | None = Field(default=1.0, gt=0, description="an update's global norm is cut to this")
    evaluate_every: int | None = Field(default=None, ge=1, description="in steps; default: once an epoch")
    eval_batch_size: int = Field(default=32, ge=1)
    monitor: str | None = Field(
        default=None,
        description="validation metric that picks the best step and stops early; default: the loss, or (of a method "
        "without one) the first metric",
    )
    larger_is_better: bool | None = Field(
        default=None, description="of the monitored metric; default: by its name (`pt_core.metrics.higher_is_better`)"
    )
    patience: int | None = Field(default=None, ge=1, description="evaluations without gain before the run stops")
    min_delta: float = Field(
        default=0.0, ge=0, description="gain of the monitored metric that counts as one: more than this"
    )
    interrupt_below: float | None = Field(
        default=None, description="the run stops at once if the monitored metric is worse than this (PTEC)"
    )
    keep_best: bool = Field(default=True, description="end with the best step's prompt rather than the last one's")
    checkpoint_every: int | None = Field(default=None, ge=1, description="in steps; default: evaluate_every or 100")
    log_every: int = Field(default=10, ge=1)
    precision: Literal["float32", "bf16"] = Field(default="float32", description="autocast; prompts stay float32")
    device: Literal["auto", "cpu"] = Field(default="auto", description="`auto`: what accelerate finds")
    packed_gib: float = Field(
        default=0.0,
        ge=0,
        description="on a CPU, memory for copies of frozen weights in the order of its matrix kernels; 0: none (`packing`)",
    )
    bucket_by_length: bool = Field(default=False, description="batches of rows of like length: less padding")
    seed: int = Field(default=0, ge=0, description="of the batches and of all random numbers of the run")
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    progress: bool = True

    @model_validator(mode="after")
    def _one_length(self) -> FitConfig:
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of max_steps and epochs")
        if self.momentum and self.optimiser != "sgd":
            raise ValueError("momentum is a setting of sgd")
        if self.schedule in BY_EPOCHS and self.epochs is None:
            raise ValueError(f"the schedule {self.schedule} needs epochs, not max_steps")
        return self


MAY_CHANGE_ON_RESUME = {"progress", "trackers", "checkpoint_every", "device"}


def lr_factor(config: FitConfig, step: int, total: int, schedule: Schedule | None = None, lr: float = 1.0) -> float:
    """Factor on the learning rate `lr` of step `step` (0-based) of `total`, under `schedule` (default: the run's).

    A function of the step alone, so that a resumed run needs no scheduler state. `exponential` multiplies by
    gamma = final_factor^(1 / (total - 1)) each step and ends at `final_factor`. The run's warm-up precedes all schedules.

    `epoch-cosine` is constant within an epoch: a rate of 1e-5 in the first one, whatever `lr` is, then
    (1 + cos(pi (e - 1) / E)) / 2 of `lr` in epoch e = 1 .. E - 1 (CoOp, released code: the cosine counts from the end of
    its warm-up epoch and keeps its period E, so it does not reach zero). `epoch-cosine-plain` has no such first epoch:
    (1 + cos(pi e / E)) / 2 in epoch e = 0 .. E - 1 (R-AMT, released code).
    """
    schedule = schedule or config.schedule
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    left = max(total - config.warmup_steps, 1)
    at = step - config.warmup_steps
    if schedule == "linear":
        return max(0.0, 1 - at / left)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * at / left))
    if schedule in BY_EPOCHS:
        epochs = config.epochs or 1
        epoch = step * epochs // total
        if schedule == "epoch-cosine":
            if epoch == 0:
                return 1e-5 / lr if lr else 0.0
            epoch -= 1
        return 0.5 * (1 + math.cos(math.pi * epoch / epochs))
    if schedule == "exponential":
        return float(config.final_factor ** (at / max(left - 1, 1)))
    return 1.0


def build_optimiser(groups: list[dict[str, Any]], config: FitConfig) -> torch.optim.Optimizer:
    """Optimiser over named groups. A group's own `lr`, `weight_decay` or `schedule` wins over the run's.

    Raises:
        InputError: a parameter is in two groups, or twice in one.
    """
    owner: dict[int, str] = {}
    for group in groups:
        for parameter in group["params"]:
            if id(parameter) in owner:
                names = f"{owner[id(parameter)]!r} and {group['name']!r}"
                raise InputError(f"a parameter is twice in the groups of one optimiser: {names}")
            owner[id(parameter)] = group["name"]
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "adamw": torch.optim.AdamW,
        "adam": torch.optim.Adam,
        "adafactor": torch.optim.Adafactor,
        "sgd": partial(torch.optim.SGD, momentum=config.momentum),
    }
    lr = config.lr if config.lr is not None else 1e-3
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


def check_groups(
    method: Method, config: FitConfig, optimisers: Mapping[str, torch.optim.Optimizer] | None = None
) -> None:
    """Refuse a rate that no group of the optimisers follows, and schedules that cannot be followed.

    Args:
        optimisers: default: what the method makes for this run.
    """
    optimisers = method.optimisers(config) if optimisers is None else optimisers
    groups = [group for optimiser in optimisers.values() for group in optimiser.param_groups]
    named = {group["schedule"] for group in groups if group.get("schedule")}
    if unknown := sorted(named - set(get_args(Schedule))):
        raise InputError(
            f"{method.name} names the schedule {unknown[0]!r} for a group",
            remedy=f"Choose one of: {', '.join(get_args(Schedule))}",
            field="schedule",
        )
    if (counting := sorted(named & {*BY_EPOCHS})) and config.epochs is None:
        raise InputError(
            f"{method.name} names the schedule {counting[0]!r}, which counts epochs",
            remedy="Give epochs, not max_steps",
            field="epochs",
        )
    if config.lr is not None and all(group["lr"] != config.lr for group in groups):
        raise InputError(
            f"{method.name} names the rates of all its groups, so the run's rate has no effect",
            remedy="Set the rates in the method's configuration",
            field="lr",
        )


def device_of(config: FitConfig) -> torch.device:
    """Where a run of this configuration computes."""
    return torch.device("cpu") if config.device == "cpu" else torch.device(Accelerator().device)
