"""GPF and GPF-plus: a learned vector, or a learned mixture of vectors, on the features of every node."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from pt_graph.backbones import FeaturePrompt
from pt_graph.method import GraphConfig, GraphMethod


def glorot(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """U(-a, a) with a = sqrt(6 / (rows + columns)), [rows, columns]."""
    return (torch.rand(rows, columns, generator=generator) * 2 - 1) * (6 / (rows + columns)) ** 0.5


def linear_start(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """U(-1/sqrt(columns), 1/sqrt(columns)), torch's start of a Linear's weight and bias, [rows, columns]."""
    return (torch.rand(rows, columns, generator=generator) * 2 - 1) * columns**-0.5


class GPFPrompt(FeaturePrompt):
    """X' = X + p, p [1, D]. Parameters: D."""

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(glorot(1, width, generator))

    def features(self, x: Tensor, graphs: Any) -> Tensor:
        return x + self.weight.to(x.dtype)


class GPFPlusPrompt(FeaturePrompt):
    """X'_v = X_v + sum_b softmax(A X_v + a)_b B_b with basis B [k, D] and scorer A [k, D], a [k]. Parameters: 2kD + k."""

    def __init__(self, width: int, size: int, generator: torch.Generator) -> None:
        super().__init__()
        self.width = width
        self.basis = nn.Parameter(glorot(size, width, generator))
        self.scorer = nn.Linear(width, size)
        with torch.no_grad():
            self.scorer.weight.copy_(linear_start(size, width, generator))
            self.scorer.bias.copy_((torch.rand(size, generator=generator) * 2 - 1) * width**-0.5)

    def features(self, x: Tensor, graphs: Any) -> Tensor:
        return x + (self.scorer(x.to(self.basis.dtype)).softmax(-1) @ self.basis).to(x.dtype)


class GPFConfig(GraphConfig):
    """Settings of GPF."""

    lr: float = Field(1e-3, gt=0, description="GPF, chem/prompt_tuning_few_shot.py")


class GPF(GraphMethod):
    """GPF: one vector p [D] is added to the features of every node, X' = X + p; p and the head are trained.

    Graphs -> logits [B, C]. For molecules X is the sum of the atom embeddings.

    Parameters: D (plus the head). Chem GIN, D = 300: 300.

    Fidelity: the released code calls model.train() while tuning, so the BatchNorm statistics of its frozen GIN move and
    dropout is on. Here BatchNorm stays in eval, and dropout is `backbone_dropout`, off by default. There the score is the last
    epoch's; here, where there are validation rows, the best one's by them, unless the run's `keep_best` is off.

    Reference: Fang et al. Universal Prompt Tuning for Graph Neural Networks. NeurIPS 2023.
    """

    name = "gpf"
    config_class = GPFConfig

    def build_prompt(self) -> FeaturePrompt:
        return GPFPrompt(self.backbone.feature_width, self.generator)


class GPFPlusConfig(GPFConfig):
    """Settings of GPF-plus."""

    basis_size: int = Field(10, ge=1, description="k; 5, 10 or 20 by task in GPF, run_few_shot.sh")


class GPFPlus(GraphMethod):
    """GPF-plus: every node gets its own mixture of k basis vectors, X'_v = X_v + sum_b softmax(A X_v + a)_b B_b.

    Graphs -> logits [B, C].

    Parameters: 2kD + k (plus the head). Chem GIN, D = 300, k = 10: 6,010.

    Fidelity: as `GPF`.

    Reference: Fang et al. Universal Prompt Tuning for Graph Neural Networks. NeurIPS 2023.
    """

    name = "gpf-plus"
    config_class = GPFPlusConfig

    def build_prompt(self) -> FeaturePrompt:
        return GPFPlusPrompt(self.backbone.feature_width, self.config.basis_size, self.generator)
