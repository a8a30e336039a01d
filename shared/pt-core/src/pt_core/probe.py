"""Logistic regression on frozen features: the linear probe that every prompt is compared with (Radford et al. 2021).

Needs scikit-learn, which the packages that probe bring along.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pt_core.metrics import evaluate_logits

if TYPE_CHECKING:
    from pt_core.data import Split

Array = np.ndarray[Any, Any]


def fit_probe(
    features: Array,
    labels: Array,
    strengths: Sequence[float],
    max_iter: int,
    validation: tuple[Array, Array] | None = None,
) -> tuple[Array, Array]:
    """Weight [C, d] and bias [C] of the regression whose strength validation rows choose; the weakest of equals.

    Args:
        features, labels: rows to fit; see `regression`.
        strengths: inverse strengths of the L2 penalty to try. Without validation rows it is 1, scikit-learn's default.
        max_iter: of L-BFGS.
        validation: features and labels that choose.
    """
    if validation is None:
        return regression(features, labels, 1.0, max_iter)
    held, wanted = validation
    fits = [regression(features, labels, strength, max_iter) for strength in sorted(strengths)]
    return max(fits, key=lambda fit: agreement(held @ fit[0].T + fit[1], wanted))


def probe_metrics(split: Split, fit: tuple[Array, Array], rows: tuple[Array, Array]) -> dict[str, float]:
    """Metrics of a split, of what `fit_probe` gave on the split's features and labels."""
    weight, bias = fit
    features, labels = rows
    logits = torch.from_numpy(features @ weight.T + bias).float()
    return evaluate_logits(split.metrics, split.task, logits, torch.from_numpy(labels), split.missing)


def regression(features: Array, labels: Array, strength: float, max_iter: int) -> tuple[Array, Array]:
    """L2-penalised logistic regression: weight [C, d] and bias [C].

    Args:
        features: [n, d].
        labels: [n] classes 0..C-1, each of them present, or [n, C] of 0 and 1, both present in each column.
        strength: inverse strength of the penalty.
        max_iter: of L-BFGS.
    """
    from sklearn.linear_model import LogisticRegression

    columns = labels.T if labels.ndim == 2 else [labels]
    fits = [LogisticRegression(C=strength, max_iter=max_iter).fit(features, column) for column in columns]
    weight = np.concatenate([fit.coef_ for fit in fits])
    bias = np.concatenate([fit.intercept_ for fit in fits])
    if labels.ndim == 1 and len(bias) == 1:  # two classes: the log-odds of the second
        return np.concatenate([0 * weight, weight]), np.concatenate([0 * bias, bias])
    return weight, bias


def agreement(logits: Array, labels: Array) -> float:
    """Accuracy of the largest logit, or for [n, C] labels micro-F1 of the positive ones: what the strength is chosen by."""
    if labels.ndim == 1:
        return float((logits.argmax(1) == labels).mean())
    positive, wanted = logits > 0, labels > 0
    return float(2 * (positive & wanted).sum() / max(positive.sum() + wanted.sum(), 1))
