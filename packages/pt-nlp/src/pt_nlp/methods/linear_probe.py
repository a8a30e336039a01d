"""Linear probe: logistic regression on frozen features (Alain and Bengio 2017; protocol of Radford et al. 2021)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import nn

from pt_core.errors import InputError
from pt_core.plan import FitConfig
from pt_core.probe import Array, fit_probe, probe_metrics
from pt_core.training import FitResult
from pt_nlp.method import TextConfig, TextMethod, on_run_device

if TYPE_CHECKING:
    from pt_core.data import Split


class LinearProbeConfig(TextConfig):
    """Settings of the linear probe."""

    pooling: Literal["auto", "first", "last", "mean"] = Field(
        "mean", description="what is read of the last hidden states of the real tokens (design choice)"
    )
    head_bias: Literal[True] = Field(True, description="the intercept also holds the centring of the features")
    C: tuple[float, ...] = Field(
        (0.01, 0.1, 1.0, 10.0, 100.0),
        min_length=1,
        description="inverse strengths of the L2 penalty to choose from by validation accuracy (Radford et al. 2021 search "
        "1e-6 to 1e6); without validation 1.0, scikit-learn's default",
    )
    max_iter: int = Field(1000, ge=1, description="of L-BFGS; Radford et al. 2021")


class LinearProbe(TextMethod):
    """Linear probe: z = W (h - mean) / std + b on pooled features h of the frozen backbone, fitted by logistic regression.

    Input ids [b, n] -> features [b, d] -> logits [b, C]. `fit` reads every text once and makes no gradient steps; the
    standardisation is folded into W and b, which are kept as a head that no optimiser sees.

    One multinomial regression; of two classes the first one's row is zero. Multi-label: one binary regression for each
    label.

    Parameters: C * (d + 1), fitted by L-BFGS and not by gradient steps. GPT-2 (d = 768), C = 5: 3,845.

    Fidelity: standardised features, the grid of C and mean pooling are choices of this library. Radford et al. 2021 probe
    image features without standardisation and refit on training and validation rows; here validation rows only choose C.

    Reference: Alain, Bengio. Understanding intermediate layers using linear classifier probes. ICLR 2017 workshop.
    """

    name = "linear-probe"
    config_class = LinearProbeConfig
    reads_head: ClassVar[bool] = True
    trains: ClassVar[bool] = False

    def build_prompt(self) -> None:
        if self.config.num_labels is None:
            raise InputError(
                "a linear probe has to know the classes", field="num_labels", remedy="Set it to the number of labels"
            )

    def build_head(self) -> nn.Linear:
        head = super().build_head().requires_grad_(False)
        nn.init.zeros_(head.weight)
        return head

    def parameter_groups(self) -> list[dict[str, Any]]:
        return []

    def count(self) -> int:
        """Number of fitted values."""
        return sum(p.numel() for p in self.parameters())

    def fit(
        self,
        train: Split,
        validation: Split | None = None,
        config: FitConfig | None = None,
        output_dir: str | Path | None = None,
    ) -> FitResult:
        """Fit the probe on the features of `train`.

        Args:
            train: labelled rows.
            validation: rows that choose C.
            config: device and eval_batch_size are used.
            output_dir: not used: there are no steps to log or to resume.

        Raises:
            InputError: a class has no row in `train` (multi-label: all rows or none).
        """
        config = config or FitConfig(epochs=1)
        features, labels = self._read(train, config)
        self._check(labels)
        mean, std = features.mean(0), features.std(0)
        std[std == 0] = 1.0
        held = None
        if validation is not None:
            held = self._read(validation, config)
            held = (held[0] - mean) / std, held[1]
        weight, bias = fit_probe((features - mean) / std, labels, self.config.C, self.config.max_iter, held)
        metrics = probe_metrics(validation, (weight, bias), held) if validation is not None and held is not None else {}
        weight, bias = weight / std, bias - (weight / std) @ mean
        self.load_trained_state(
            {"head.weight": torch.from_numpy(weight).float(), "head.bias": torch.from_numpy(bias).float()}
        )
        return FitResult(metrics=metrics)

    @torch.no_grad()
    def _read(self, split: Split, config: FitConfig) -> tuple[Array, Array]:
        """Features [n, d] in float64 and labels [n] or [n, C] of a split."""
        batches = on_run_device(self, config, split.batches(config.eval_batch_size))
        read = [(self.features(batch).cpu().double(), torch.as_tensor(batch["labels"]).cpu()) for batch in batches]
        return torch.cat([f for f, _ in read]).numpy(), torch.cat([y for _, y in read]).numpy()

    def _check(self, labels: Array) -> None:
        """Refuse training labels that leave a row of the probe undetermined."""
        classes = self.config.num_labels
        if labels.shape[1:] != ((classes,) if self.config.multilabel else ()):
            raise InputError(
                f"labels of shape {list(labels.shape)} are not those of {classes} classes with multilabel "
                f"{'on' if self.config.multilabel else 'off'}",
                field="multilabel",
            )
        counts = labels.sum(0) if self.config.multilabel else np.bincount(labels, minlength=classes)
        alike = np.flatnonzero((counts == 0) | (counts == len(labels)))
        if len(alike):
            raise InputError(
                f"all training rows, or none, are of class {', '.join(map(str, alike))} (counted from 0)",
                field="labels",
                remedy="Add rows, or leave the class out",
            )
