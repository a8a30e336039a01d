"""SUPT-soft and SUPT-hard: GPF-plus whose mixture is scored by a graph convolution, over all nodes or the best ones."""

from __future__ import annotations

from typing import cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch_geometric.nn import GCNConv

from pt_graph.backbones import FeaturePrompt, has_doubles
from pt_graph.method import GraphMethod
from pt_graph.methods.gpf import GPFConfig, glorot


class SUPTPrompt(FeaturePrompt):
    """Basis B [k, D] and node scores S = GCN(X + sum_b B_b) [n, k]. Parameters: 2kD + k."""

    def __init__(self, width: int, size: int, generator: torch.Generator) -> None:
        super().__init__()
        self.width = width
        self.basis = nn.Parameter(glorot(size, width, generator))
        self.scorer = GCNConv(width, size)
        with torch.no_grad():
            self.scorer.lin.weight.copy_(glorot(size, width, generator))  # as PyG does; its bias starts at zero

    def scores(self, x: Tensor, graphs: object) -> Tensor:
        return cast(Tensor, self.scorer(x.to(self.basis.dtype) + self.basis.sum(0), graphs.edge_index))  # type: ignore[attr-defined]


class SoftPrompt(SUPTPrompt):
    """X'_v = X_v + sum_b softmax(S_v)_b B_b."""

    def features(self, x: Tensor, graphs: object) -> Tensor:
        return x + (self.scores(x, graphs).softmax(-1) @ self.basis).to(x.dtype)


class HardPrompt(SUPTPrompt):
    """X'_v = X_v + sum_{b that chose v} tanh(S_vb) B_b / (1 + |{b that chose v}|); b chooses its best nodes of each graph."""

    def __init__(self, width: int, size: int, ratio: float, generator: torch.Generator) -> None:
        super().__init__(width, size, generator)
        self.ratio = ratio

    def features(self, x: Tensor, graphs: object) -> Tensor:
        scores = self.scores(x, graphs).tanh()
        chosen = best(scores, graphs.batch, self.ratio)  # type: ignore[attr-defined]
        mixed = (scores * chosen) @ self.basis / (1 + chosen.sum(1, keepdim=True))
        return x + mixed.to(x.dtype)


def best(scores: Tensor, batch: Tensor, ratio: float) -> Tensor:
    """Whether a node is among the ceil(ratio * n) best of its graph, for each column: bool [n, k].

    Of nodes with equal scores the first ones are best, so that a graph's choice does not depend on its batch.

    Args:
        scores: [n, k].
        batch: graph of each node, [n], ascending.
        ratio: in (0, 1].
    """
    sizes = torch.bincount(batch)
    order = scores.argsort(dim=0, descending=True, stable=True)
    order = order.gather(0, batch[order].argsort(dim=0, stable=True))  # graph by graph, best first
    rank = torch.arange(len(batch), device=batch.device) - (sizes.cumsum(0) - sizes)[batch]
    wide = sizes if has_doubles(sizes.device) else sizes.cpu()
    wanted = (ratio * wide.double() - 1e-9).ceil().to(sizes)
    among = rank < wanted[batch]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(0, order, among[:, None].expand_as(order))


class SUPTConfig(GPFConfig):
    """Settings of SUPT-soft."""

    basis_size: int = Field(10, ge=1, description="k; ProG, DiffPoolPrompt")


class SUPTSoft(GraphMethod):
    """SUPT-soft: every node gets a mixture of k basis vectors that its neighbourhood decides on.

    X'_v = X_v + sum_b softmax(S_v)_b B_b with S = GCN(X + sum_b B_b) [n, k]: one graph convolution (self-loops, symmetric
    normalisation, bias) over the graph's edges; what bonds are does not enter. Graphs -> logits [B, C].

    Parameters: 2kD + k (plus the head). Chem GIN, D = 300, k = 10: 6,010.

    Fidelity: formula, starts and k follow the port in ProG; the authors' own code was not at hand. The port's
    orthogonality loss, off by default there, is left out. BatchNorm stays in eval; dropout is `backbone_dropout`.

    Reference: Lee, Yang, Kang. Subgraph-level Universal Prompt Tuning. 2024 (arXiv 2402.10380).
    """

    name = "supt-soft"
    config_class = SUPTConfig

    def build_prompt(self) -> FeaturePrompt:
        return SoftPrompt(self.backbone.feature_width, self.config.basis_size, self.generator)


class SUPTHardConfig(SUPTConfig):
    """Settings of SUPT-hard."""

    basis_size: int = Field(5, ge=1, description="k; ProG, tasker/task.py")
    ratio: float = Field(0.5, gt=0, le=1, description="share of a graph's nodes that each basis chooses; ProG")


class SUPTHard(GraphMethod):
    """SUPT-hard: each of k basis vectors is added to the nodes of a graph that it scores best.

    Basis b chooses ceil(ratio * n) nodes by S_vb, S = GCN(X + sum_b B_b); node v gets tanh(S_vb) B_b of those that chose
    it, summed and divided by one more than their number. Graphs -> logits [B, C].

    Parameters: 2kD + k (plus the head). Chem GIN, D = 300, k = 5: 3,005.

    Fidelity: as `SUPTSoft`. Of nodes with equal scores the first is chosen; the port leaves that to the sort.

    Reference: Lee, Yang, Kang. Subgraph-level Universal Prompt Tuning. 2024 (arXiv 2402.10380).
    """

    name = "supt-hard"
    config_class = SUPTHardConfig

    def build_prompt(self) -> FeaturePrompt:
        width, config = self.backbone.feature_width, self.config
        return HardPrompt(width, config.basis_size, config.ratio, self.generator)
