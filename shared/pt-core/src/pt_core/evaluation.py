"""Metrics of a method on a split, by one process or several."""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import Tensor

from pt_core.data import Split
from pt_core.errors import InputError, NonFiniteLoss
from pt_core.method import Method
from pt_core.metrics import evaluate_logits


@torch.no_grad()
def evaluate(
    method: Method,
    split: Split,
    batch_size: int = 32,
    device: torch.device | None = None,
    accelerator: Accelerator | None = None,
    precision: Literal["float32", "bf16"] = "float32",
) -> dict[str, float]:
    """Metrics of a method on a split: the split's own scorer if it has one, else its metrics on the logits, and the loss.

    Args:
        method: in whatever mode; it is evaluated in eval mode and put back.
        split: labelled rows.
        batch_size: rows of a forward pass, and what a scorer is given.
        device: where the batches go; default: where the method is.
        accelerator: of several processes. Each computes its share of the rows, all get the same numbers. A scorer is
            not split: all processes run it, and the main one's numbers count.
        precision: of the passes; bf16 by autocast, as in a run.

    Returns:
        Metric name -> value; `loss` is the mean over the loss's own terms (over batches, if the loss couples rows).

    Raises:
        NonFiniteLoss: the logits of a row are NaN.
    """
    if device is None:
        tensors = itertools.chain(method.parameters(), method.backbone.parameters())
        device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    was_training = method.training
    on_logits = bool(split.metrics) and split.scorer is None
    source = method.loss_comes_from()
    logits: list[Tensor] = []
    labels: list[Tensor] = []
    total, count = 0.0, 0.0
    with ExitStack() as context:
        context.callback(method.train, was_training)
        context.enter_context(autocast(precision, device))
        method.eval()
        rows = list(range(len(split)))
        for batch in split.batches(batch_size, rows if accelerator is None else part_of(rows, accelerator)):
            batch = send_to_device(batch, device)
            output = method(batch) if on_logits else None
            if source is not None:
                loss = method.loss_of(output, batch) if source == "output" and output is not None else None
                loss = method.loss(batch) if loss is None else loss
                total, count = total + float(loss.total), count + float(loss.count)
            if output is not None:
                if output.logits is None:
                    raise InputError(f"{method.name} gives no logits for the metrics {', '.join(split.metrics)}")
                logits.append(output.logits.float().cpu())
                labels.append(torch.as_tensor(batch["labels"]).cpu())
        scores = split.scorer(method, split, batch_size) if split.scorer is not None else {}
    if accelerator is not None and accelerator.num_processes > 1:
        gathered = gather_object([(total, count, logits, labels, scores)])
        totals, counts, all_logits, all_labels, all_scores = zip(*gathered, strict=True)
        total, count, scores = sum(totals), sum(counts), all_scores[0]
        logits, labels = list(itertools.chain(*all_logits)), list(itertools.chain(*all_labels))
    results = {"loss": total / count} if count else {}
    if on_logits:
        found = torch.cat(logits)
        if len(bad := found.isnan().nonzero()):
            raise NonFiniteLoss(f"evaluation, row {int(bad[0, 0]) + 1}: the logits are NaN")
        results |= evaluate_logits(split.metrics, split.task, found, torch.cat(labels), split.missing)
    return results | {name: float(value) for name, value in scores.items()}


def part_of(rows: list[int], accelerator: Accelerator) -> list[int]:
    """This process's contiguous part of `rows`."""
    return [int(i) for i in np.array_split(np.asarray(rows), accelerator.num_processes)[accelerator.process_index]]


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()
