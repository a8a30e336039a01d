"""Linear probe: logistic regression on frozen image features (Radford et al. 2021)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import nn

from pt_core.errors import InputError
from pt_core.method import Batch, MethodConfig, Output
from pt_core.plan import FitConfig, device_of
from pt_core.probe import Array, fit_probe, probe_metrics
from pt_core.training import FitResult
from pt_vl.backbones import DualEncoder
from pt_vl.method import VLConfig, VLMethod, cache_features, fixed_views

if TYPE_CHECKING:
    from pt_core.data import Split


class LinearProbeConfig(VLConfig):
    """Settings of the linear probe."""

    C: tuple[float, ...] = Field(
        (1e-4, 1e-2, 1.0, 1e2, 1e4),
        min_length=1,
        description="inverse strengths of the L2 penalty to choose from by validation accuracy (Radford et al. 2021 search "
        "1e-6 to 1e6); without validation 1.0, scikit-learn's default",
    )
    max_iter: int = Field(1000, ge=1, description="of L-BFGS; Radford et al. 2021")


class LinearProbe(VLMethod):
    """Linear probe: z = W f + b on image features f, fitted by multinomial logistic regression.

    Pixels [B, 3, H, W] -> features [B, d] -> logits [B, C]. `fit` reads every image once, in its fixed view even where the run
    augments, and makes no gradient steps.

    Parameters: C (d + 1), fitted by L-BFGS and not by gradient steps. ViT-B/16, 100 classes: 51,300.

    Fidelity: features behind the projection, not normalised, of fixed views, as CoOp's probe reads them. Radford et al. refine
    C by a binary search and refit on training and validation rows; here validation rows choose from a grid.

    Reference: Radford et al. Learning Transferable Visual Models From Natural Language Supervision. ICML 2021.
    """

    name = "linear-probe"
    config_class = LinearProbeConfig
    trains: ClassVar[bool] = False

    def __init__(self, backbone: DualEncoder, config: MethodConfig | None = None) -> None:
        super().__init__(backbone, config)
        self.head = nn.Linear(backbone.width, len(self.config.class_names)).requires_grad_(False)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @classmethod
    def reads_templates(cls, config: Any) -> bool:
        return False

    @property
    def class_bound(self) -> bool:
        return True

    def parameter_groups(self) -> list[dict[str, Any]]:
        return []

    def count(self) -> int:
        """Number of fitted values."""
        return sum(p.numel() for p in self.parameters())

    def forward(self, batch: Batch) -> Output:
        features = self.image_features(batch).float()
        return Output(self.head(features), features)

    def published(self, train: Split) -> FitConfig:
        return FitConfig(epochs=1)  # no steps are made

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
            InputError: a class has no row in `train`, or its rows are augmented and have no fixed view.
        """
        config = self.run_of(train, config, validation)
        self.place(device_of(config))
        features, labels = self._read(fixed_views(train), config)
        counts = np.bincount(labels, minlength=len(self.config.class_names))
        if len(absent := np.flatnonzero(counts == 0)):
            names = ", ".join(self.config.class_names[i] for i in absent)
            raise InputError(f"no training row is of class {names}", field="labels", remedy="Add rows, or leave it out")

        held = None if validation is None else self._read(validation, config)
        weight, bias = fit_probe(features, labels, self.config.C, self.config.max_iter, held)
        metrics = probe_metrics(validation, (weight, bias), held) if validation is not None and held is not None else {}
        self.load_trained_state(
            {"head.weight": torch.from_numpy(weight).float(), "head.bias": torch.from_numpy(bias).float()}
        )
        self.eval()
        return FitResult(metrics=metrics)

    def _read(self, split: Split, config: FitConfig) -> tuple[Array, Array]:
        """Features [n, d] in float64 and labels [n] of a split."""
        features, labels = self.read(cache_features(split, self.backbone, config.eval_batch_size), config)
        return features.cpu().double().numpy(), labels.cpu().numpy()
