"""Metrics by name, per task, and what is said about several seeds: spread and paired differences.

Metrics are computed on a whole split at once, never as a mean over batches. torchmetrics computes all but the plainest;
it is imported by the first metric that needs it, since its import takes seconds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pt_core.errors import InputError

LOWER_IS_BETTER = frozenset(
    {"loss", "error", "calibration-error", "mae", "mse", "rmse", "perplexity", "nll", "wer", "cer", "error-rate"}
)


def higher_is_better(name: str) -> bool:
    """Whether more of a metric is better. A prefix such as "validation/" does not matter."""
    return name.rsplit("/", 1)[-1] not in LOWER_IS_BETTER


# Multi-class: logits [n, C], labels [n]


def _accuracy(logits: Tensor, labels: Tensor, k: int = 1) -> Tensor:
    """Share of rows whose label is among the k largest logits; of equal logits the first counts as the largest."""
    own = logits.gather(1, labels[:, None])
    earlier = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    return (((logits > own) | ((logits == own) & earlier)).sum(1) < k).cpu().double().mean()


def _balanced_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean recall over the classes that have rows."""
    recall: Tensor = _torchmetrics().multiclass_recall(
        logits, labels, logits.shape[1], average="none", validate_args=False
    )
    return recall[torch.bincount(labels, minlength=len(recall)) > 0].mean()


def _multiclass_f1(logits: Tensor, labels: Tensor, average: str) -> Tensor:
    f1: Tensor = _torchmetrics().multiclass_f1_score(
        logits, labels, logits.shape[1], average=average, validate_args=False
    )
    return f1


def _matthews(logits: Tensor, labels: Tensor) -> Tensor:
    matthews: Tensor = _torchmetrics().multiclass_matthews_corrcoef(logits, labels, logits.shape[1])
    return matthews


def _calibration_error(logits: Tensor, labels: Tensor) -> Tensor:
    """Expected calibration error: mean |accuracy - confidence| over 15 bins of equal width (Guo et al. 2017)."""
    error: Tensor = _torchmetrics().multiclass_calibration_error(logits.softmax(1), labels, logits.shape[1], n_bins=15)
    return error


# Multi-label: logits [n, C], labels [n, C] in {0, 1, -1}; -1 is masked. A class is predicted where sigmoid > 0.5.


def _multilabel(function: str, logits: Tensor, labels: Tensor, **options: str) -> Tensor:
    # Whole-number predictions, since torchmetrics would take logits that all lie in [0, 1] for probabilities.
    predicted = (logits.sigmoid() > 0.5).long()
    metric = getattr(_torchmetrics(), function)
    value: Tensor = metric(predicted, labels, labels.shape[1], ignore_index=-1, validate_args=False, **options)
    return value


def _multilabel_exact_match(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of rows with all known labels right; rows without a known label do not count."""
    known = (labels != -1).any(1)
    if not known.any():
        return torch.tensor(math.nan)
    return _multilabel("multilabel_exact_match", logits[known], labels[known])


# Ranking, per class


def _class_mean(function: str, scores: Tensor, targets: Tensor) -> Tensor:
    """Mean of a binary ranking metric over the classes that have both a positive and a negative row; NaN if none has.

    Args:
        scores: [n, C].
        targets: [n, C] in {0, 1, -1}; -1 is masked.
    """
    metric = getattr(_torchmetrics(), function)
    values = []
    for score, target in zip(scores.T, targets.T, strict=True):
        known = target >= 0
        if target[known].unique().numel() == 2:
            # Ranks in [0, 1] in place of scores: torchmetrics would put logits through a sigmoid, which ties large ones.
            levels, rank = score[known].unique(return_inverse=True)
            values.append(metric(rank.double() / max(len(levels) - 1, 1), target[known], validate_args=False))
    return torch.stack(values).mean() if values else torch.tensor(math.nan)


def _one_vs_rest(function: str, logits: Tensor, labels: Tensor) -> Tensor:
    targets = torch.nn.functional.one_hot(labels, logits.shape[1])
    return _class_mean(function, logits.double().log_softmax(1), targets)


# Regression: predictions [n], targets [n]


def _regression(function: str, predictions: Tensor, targets: Tensor, **options: bool) -> Tensor:
    import torchmetrics.functional.regression as regression

    value: Tensor = getattr(regression, function)(predictions.double(), targets.double(), **options)
    return value


# Text: predictions and references are lists of n texts


def _exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of predictions equal to their reference, but for white space at the ends."""
    pairs = zip(predictions, references, strict=True)
    return sum(p.strip() == r.strip() for p, r in pairs) / len(references)


def _token_f1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean token F1 of SQuAD: lower case, no punctuation, no articles (Rajpurkar et al. 2016)."""
    from torchmetrics.functional.text import squad

    answers = [{"id": str(i), "prediction_text": p} for i, p in enumerate(predictions)]
    truths = [{"id": str(i), "answers": {"text": [r], "answer_start": [0]}} for i, r in enumerate(references)]
    return float(squad(answers, truths)["f1"]) / 100  # type: ignore[arg-type]


def _json_keys(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of predictions that are one JSON object with the keys of their reference, no more and no fewer."""
    pairs = zip(predictions, references, strict=True)
    return sum(_keys(p) == _keys(r) is not None for p, r in pairs) / len(references)


def _keys(text: str) -> set[str] | None:
    """Keys of a JSON object; None of anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return set(value) if isinstance(value, dict) else None


def _rouge(key: str, predictions: Sequence[str], references: Sequence[str]) -> Tensor:
    """Mean ROUGE F-measure over rows, without stemming (Lin 2004)."""
    from torchmetrics.functional.text.rouge import rouge_score

    return rouge_score(list(predictions), list(references), rouge_keys=key)[f"{key}_fmeasure"]


def _bleu(predictions: Sequence[str], references: Sequence[str]) -> Tensor:
    """Corpus BLEU-4 of sacreBLEU's 13a tokens, in [0, 1], without smoothing (Post 2018)."""
    from torchmetrics.functional.text import sacre_bleu_score

    return sacre_bleu_score(list(predictions), [[r] for r in references], tokenize="13a")


METRICS: dict[str, dict[str, Callable[[Any, Any], Tensor | float]]] = {
    "multiclass": {
        "accuracy": _accuracy,
        "top-5-accuracy": partial(_accuracy, k=5),
        "balanced-accuracy": _balanced_accuracy,
        "macro-f1": partial(_multiclass_f1, average="macro"),
        "micro-f1": partial(_multiclass_f1, average="micro"),
        "matthews": _matthews,
        "roc-auc": partial(_one_vs_rest, "binary_auroc"),
        "average-precision": partial(_one_vs_rest, "binary_average_precision"),
        "calibration-error": _calibration_error,
    },
    "multilabel": {
        "accuracy": partial(_multilabel, "multilabel_accuracy", average="micro"),
        "exact-match": _multilabel_exact_match,
        "macro-f1": partial(_multilabel, "multilabel_f1_score", average="macro"),
        "micro-f1": partial(_multilabel, "multilabel_f1_score", average="micro"),
        "roc-auc": partial(_class_mean, "binary_auroc"),
        "average-precision": partial(_class_mean, "binary_average_precision"),
    },
    "text": {
        "exact-match": _exact_match,
        "token-f1": _token_f1,
        "json-keys": _json_keys,
        "rouge-1": partial(_rouge, "rouge1"),
        "rouge-2": partial(_rouge, "rouge2"),
        "rouge-l": partial(_rouge, "rougeL"),
        "bleu": _bleu,
    },
    "regression": {
        "pearson": partial(_regression, "pearson_corrcoef"),
        "spearman": partial(_regression, "spearman_corrcoef"),
        "mae": partial(_regression, "mean_absolute_error"),
        "rmse": partial(_regression, "mean_squared_error", squared=False),
        "r2": partial(_regression, "r2_score"),
    },
    "none": {},
}


def check_names(names: Iterable[str], task: str, num_classes: int | None = None) -> None:
    """Refuse unknown metrics, and those that say nothing of so many classes, before anything starts.

    Raises:
        InputError: an unknown task or metric (the message lists those there are), or top-k of k classes or fewer.
    """
    if task not in METRICS:
        raise InputError(f"unknown task {task!r}", remedy=f"Use one of: {', '.join(METRICS)}", field="task")
    for name in names:
        if name not in METRICS[task]:
            known = "; ".join(f"{t}: {', '.join(m)}" for t, m in METRICS.items() if m)
            raise InputError(f"no metric {name!r} for the task {task!r}", remedy=f"Known, {known}", field="metrics")
        if name == "top-5-accuracy" and num_classes is not None and num_classes <= 5:
            raise InputError(
                f"top-5 accuracy of {num_classes} classes is always 1", remedy="Use accuracy", field="metrics"
            )


def evaluate_logits(
    names: Iterable[str], task: str, logits: Tensor, labels: Tensor, missing: int | None = None
) -> dict[str, float]:
    """Metrics of a whole split.

    - Multi-class: logits [n, C], labels [n] in 0 to C - 1; the prediction is the largest logit. A class that is absent
      from both predictions and labels does not count in macro-f1; one absent from either alone counts as 0.
    - Multi-label: logits [n, C], labels [n, C] of 0 and 1; a class is predicted where sigmoid(logit) > 0.5. Cells equal
      to `missing` count nowhere. "accuracy" is over cells, "exact-match" over rows. In macro-f1 every class counts; one
      absent from predictions and labels counts as 0. Both definitions of macro-f1 are scikit-learn's defaults.
    - "roc-auc" and "average-precision" are means over the classes that have positive and negative rows (NaN if none
      has); for multi-class, class against rest by probability.
    - Regression: logits [n] or [n, 1], labels [n].

    Raises:
        InputError: an unknown name, shapes that do not fit, a label out of range, a NaN among the logits.
    """
    names = list(names)
    check_names(names, task)
    if task in ("text", "none"):
        raise InputError(f"the task {task!r} has no logits", remedy="Text is scored by evaluate_text", field="task")
    logits = logits.detach().float() if logits.dtype in (torch.float16, torch.bfloat16) else logits.detach()
    labels = labels.detach().to(logits.device)
    if task == "regression" and logits.ndim == 2 and logits.shape[1] == 1:
        logits = logits[:, 0]
    wanted = logits.shape[:1] if task == "multiclass" else logits.shape
    if logits.ndim != (1 if task == "regression" else 2) or labels.shape != wanted or not len(labels):
        raise InputError(f"{task} logits {list(logits.shape)} do not go with labels {list(labels.shape)}")
    _refuse(logits.isnan(), "the logits are NaN")
    if task == "multiclass":
        check_names(names, task, logits.shape[1])
        labels = labels.long()
        _refuse((labels < 0) | (labels >= logits.shape[1]), f"the label is not one of 0 to {logits.shape[1] - 1}")
    if task == "multilabel":
        known = torch.ones_like(labels, dtype=torch.bool) if missing is None else labels != missing
        _refuse(known & (labels != 0) & (labels != 1), "a label is neither 0 nor 1, nor declared as missing")
        labels = torch.where(known, labels, -1).long()
    return {name: float(METRICS[task][name](logits, labels)) for name in names}


def evaluate_text(names: Iterable[str], predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Metrics of generated texts against one reference each; all in [0, 1].

    Raises:
        InputError: an unknown name, no texts, or not as many predictions as references.
    """
    names = list(names)
    check_names(names, "text")
    if len(predictions) != len(references) or not references:
        raise InputError(f"{len(predictions)} predictions for {len(references)} references")
    return {name: float(METRICS["text"][name](predictions, references)) for name in names}


def _refuse(bad: Tensor, problem: str) -> None:
    if bad.any():
        row = int(bad.reshape(len(bad), -1).any(1).nonzero()[0]) + 1
        raise InputError(problem, row=row)


def _torchmetrics() -> Any:
    import torchmetrics.functional.classification as classification

    return classification


def harmonic_mean(base: float, new: float) -> float:
    """H = 2 b n / (b + n) of the accuracies on base and new classes (Xian et al. 2017); 0 if either is 0."""
    return 2 * base * new / (base + new) if base and new else 0.0


# Several seeds


def mean_spread(values: Iterable[float]) -> tuple[float, float]:
    """(mean, sample standard deviation, with n - 1). The deviation of one value is NaN, and so is the mean of none."""
    values = [float(v) for v in values]
    mean = math.fsum(values) / len(values) if values else math.nan
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


class Difference(NamedTuple):
    """Mean of paired differences, their sample standard deviation, and the confidence interval of the mean."""

    mean: float
    std: float
    low: float
    high: float


def paired_difference(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Difference:
    """a - b, pair by pair (the same seed, split or task on both sides).

    The interval is Student's: mean -+ t * std / sqrt(n), with n - 1 degrees of freedom. It is NaN for one pair.

    Raises:
        InputError: no pairs, or lists of unequal length.
    """
    if len(a) != len(b) or not a:
        raise InputError(f"{len(a)} and {len(b)} values are not pairs")
    mean, std = mean_spread(x - y for x, y in zip(a, b, strict=True))
    half = t_quantile(confidence, len(a) - 1) * std / math.sqrt(len(a)) if len(a) > 1 else math.nan
    return Difference(mean, std, mean - half, mean + half)


def t_quantile(confidence: float, degrees: int) -> float:
    """t such that Student's distribution of whole `degrees` has `confidence` of its mass in [-t, t].

    With theta = atan(t / sqrt(degrees)) that mass is a finite sum (Abramowitz and Stegun, 26.7.3 and 26.7.4), which
    grows with theta and is inverted by bisection.
    """
    odd = degrees % 2 == 1

    def mass(theta: float) -> float:
        cos = math.cos(theta)
        term, total = (cos, 0.0) if odd else (1.0, 0.0)
        for j in range(3 if odd else 2, degrees + 1, 2):
            total += term
            term *= cos * cos * (j - 1) / j
        return 2 / math.pi * (theta + math.sin(theta) * total) if odd else math.sin(theta) * total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mass(middle) < confidence else (low, middle)
    return math.sqrt(degrees) * math.tan((low + high) / 2)
