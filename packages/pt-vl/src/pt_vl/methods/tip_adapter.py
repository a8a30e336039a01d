"""Tip-Adapter and Tip-Adapter-F: a cache of few-shot features beside the zero-shot classifier (Zhang et al., ECCV 2022)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from pt_core.errors import InputError
from pt_core.method import Batch, MethodConfig, Output
from pt_core.metrics import evaluate_logits
from pt_core.plan import FitConfig, build_optimiser, device_of
from pt_core.training import FitResult
from pt_vl.backbones import DualEncoder
from pt_vl.method import VLConfig, VLMethod, cache_features

if TYPE_CHECKING:
    from pt_core.data import Split


class TipAdapterConfig(VLConfig):
    """Settings of Tip-Adapter."""

    cache_size: int = Field(ge=1, description="N, training rows: classes x shots")
    alpha: float = Field(
        1.17, ge=0, description="weight of the cache before the search; Tip-Adapter, configs/imagenet.yaml"
    )
    beta: float = Field(1.0, ge=0, description="sharpness before the search; Tip-Adapter, configs/imagenet.yaml")
    views: int = Field(
        10, ge=1, description="augmented views that a key averages; fixed views: 1. Tip-Adapter, yaml files"
    )
    search_scale: tuple[float, float] = Field(
        (7.0, 3.0), description="largest beta and alpha tried; configs/imagenet.yaml"
    )
    search_steps: tuple[PositiveInt, PositiveInt] = Field(
        (200, 20), description="values of beta and alpha tried; Tip-Adapter, yaml files"
    )


class TipAdapter(VLMethod):
    """Tip-Adapter: logits = exp(s) f w^T + alpha exp(-beta (1 - f K^T)) V; keys K [N, d] are features, V [N, C] their labels.

    Pixels [B, 3, H, W] -> logits [B, C]; f, w and the keys have length 1. `fit` builds the cache and, where there are
    validation rows, chooses alpha and beta on them; nothing is trained by gradient.

    Parameters: none trained; N d numbers are kept.

    Fidelity: the zero-shot part has the backbone's own scale (the released code writes 100, CLIP's). alpha and beta are
    searched on validation rows over the released grid; without validation the start values stay.

    Reference: Zhang et al. Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification. ECCV 2022.
    """

    name = "tip-adapter"
    config_class = TipAdapterConfig
    trains: ClassVar[bool] = False
    labels: Tensor
    strength: Tensor

    def __init__(self, backbone: DualEncoder, config: MethodConfig | None = None) -> None:
        super().__init__(backbone, config)
        c = self.config
        self.keys = nn.Parameter(torch.zeros(c.cache_size, backbone.width), requires_grad=self.trains)
        self.register_buffer("labels", torch.zeros(c.cache_size, dtype=torch.long))
        self.register_buffer("strength", torch.tensor([c.alpha, c.beta]))

    @property
    def class_bound(self) -> bool:
        return True

    def parameter_groups(self) -> list[dict[str, Any]]:
        return []

    def affinity(self, features: Tensor) -> Tensor:
        """f K^T, [B, N], of image features [B, d]."""
        return F.normalize(features.float(), dim=-1) @ self.keys.T

    def recall(self, affinity: Tensor, beta: Tensor | float) -> Tensor:
        """exp(-beta (1 - f K^T)) V, [B, C]."""
        values = F.one_hot(self.labels, len(self.config.class_names)).to(affinity)
        return (-beta * (1 - affinity)).exp() @ values

    def forward(self, batch: Batch) -> Output:
        features = self.image_features(batch)
        alpha, beta = self.strength
        known = self.backbone.similarity(features, self.text_features())
        return Output(known + alpha * self.recall(self.affinity(features), beta), features)

    def fit(
        self,
        train: Split,
        validation: Split | None = None,
        config: FitConfig | None = None,
        output_dir: str | Path | None = None,
    ) -> FitResult:
        """Build the cache from `train` and choose alpha and beta on `validation`.

        Raises:
            InputError: `train` has another number of rows than the configuration says.
        """
        config = self.run_of(train, config, validation)
        self.place(device_of(config))
        self.build_cache(train, config)
        return FitResult(metrics={} if validation is None else self.search(validation, config))

    @torch.no_grad()
    def build_cache(self, train: Split, config: FitConfig) -> None:
        """Keys: normalised mean of the raw features of a row's views. alpha and beta are the configuration's again."""
        if len(train) != len(self.keys):
            raise InputError(
                f"the cache has room for {len(self.keys)} rows, there are {len(train)}",
                field="cache_size",
                remedy=f"Set it to {len(train)}",
            )
        self.strength.copy_(self.strength.new_tensor([self.config.alpha, self.config.beta]))
        views = self.config.views if not getattr(train.collate, "fixed", True) else 1
        total = torch.zeros_like(self.keys)
        with torch.random.fork_rng(devices=[]):  # views are drawn by the run's seed
            torch.manual_seed(config.seed)
            for _ in range(views):
                features, labels = self.read(train, config)
                total += features.float()
        self.keys.data.copy_(F.normalize(total / views, dim=-1))
        self.labels.copy_(labels)

    @torch.no_grad()
    def search(self, validation: Split, config: FitConfig) -> dict[str, float]:
        """Choose alpha and beta by accuracy on validation rows, and give its metrics."""
        features, labels = self.read(cache_features(validation, self.backbone, config.eval_batch_size), config)
        known, affinity = self.backbone.similarity(features, self.text_features()).float(), self.affinity(features)
        (top_beta, top_alpha), (betas, alphas) = self.config.search_scale, self.config.search_steps
        best, logits = -1.0, known
        for i in range(betas):
            beta = i * (top_beta - 0.1) / betas + 0.1
            cached = self.recall(affinity, beta)
            for j in range(alphas):
                alpha = j * (top_alpha - 0.1) / alphas + 0.1
                scores = known + alpha * cached
                accuracy = int((scores.argmax(1) == labels).sum()) / len(labels)
                if accuracy > best:
                    best, logits = accuracy, scores
                    self.strength.copy_(torch.tensor([alpha, beta]))
        return evaluate_logits(validation.metrics, validation.task, logits.cpu(), labels.cpu(), validation.missing)


class TipAdapterFConfig(TipAdapterConfig):
    """Settings of Tip-Adapter-F."""

    lr: float = Field(
        1e-3, gt=0, description="Tip-Adapter, yaml files; AdamW, cosine, batch 256, 20 epochs (EuroSAT 100)"
    )
    eps: float = Field(1e-4, gt=0, description="of AdamW and Adam; Tip-Adapter, main.py")


class TipAdapterF(TipAdapter):
    """Tip-Adapter-F: Tip-Adapter whose keys are trained by cross-entropy, from the features on; values and text stay.

    Pixels [B, 3, H, W] -> logits [B, C]. Keys are trained with the start values of alpha and beta; these are searched again
    afterwards, on validation rows.

    Parameters: N d. RN50 (d = 1024), ImageNet, 16 shots: 16,384,000.

    Fidelity: the released code keeps the epoch with the best TEST accuracy and prints the maximum of two; here the run ends
    with its last step or the best on validation rows (`keep_best`).

    Reference: Zhang et al. Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification. ECCV 2022.
    """

    name = "tip-adapter-f"
    config_class = TipAdapterFConfig
    trains: ClassVar[bool] = True
    run: ClassVar[dict[str, Any]] = {
        "epochs": 20,
        "batch_size": 256,
        "optimiser": "adamw",
        "momentum": 0,
        "weight_decay": 0.01,
        "schedule": "cosine",
    }

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"name": "keys", "params": [self.keys], "lr": self.config.lr}]

    def optimisers(self, config: FitConfig) -> dict[str, torch.optim.Optimizer]:
        eps = {"eps": self.config.eps} if config.optimiser in ("adam", "adamw") else {}
        return {"main": build_optimiser([group | eps for group in self.parameter_groups()], config)}

    def fit(
        self,
        train: Split,
        validation: Split | None = None,
        config: FitConfig | None = None,
        output_dir: str | Path | None = None,
    ) -> FitResult:
        config = self.run_of(train, config, validation)
        self.place(device_of(config))
        self.build_cache(train, config)
        result = VLMethod.fit(self, train, validation, config, output_dir)
        if validation is not None:
            result.metrics = self.search(validation, config)
        return result
