"""Infomax: which nodes belong to this graph?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn import global_mean_pool

from pt_graph.pretraining.base import Pretraining, PretrainingConfig, next_one, tell_apart


class InfomaxConfig(PretrainingConfig):
    """Settings of Infomax."""


class Infomax(Pretraining):
    """A bilinear score h_v W s tells whether node v belongs to the graph whose summary is s = sigmoid(mean of its nodes).

    Negatives: the summary of the next graph of the batch. Extra parameters: W [d, d], U(-1/sqrt(d), 1/sqrt(d)).

    Fidelity: as pretrain-gnns (chem/pretrain_deepgraphinfomax.py).

    Reference: Velickovic et al., Deep Graph Infomax, ICLR 2019; Hu et al., ICLR 2020.
    """

    name = "infomax"
    config_class = InfomaxConfig
    contrasts = True

    def build(self) -> None:
        d = self.backbone.width
        self.weight = nn.Parameter((torch.rand(d, d) * 2 - 1) * d**-0.5)

    def value(self, graphs: Any) -> Tensor:
        h = self.backbone(graphs)
        summary = global_mean_pool(h, graphs.batch, graphs.num_graphs).sigmoid() @ self.weight
        return tell_apart(
            (h * summary[graphs.batch]).sum(1),
            (h * next_one(summary)[graphs.batch]).sum(1),
        )
