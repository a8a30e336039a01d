"""GraphPrompt's pre-training: a node is more similar to its neighbour than to a node that is none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F
from torch_geometric.data import Data

from pt_graph.pretraining.base import Pretraining, PretrainingConfig, check_pairs, draw_unlinked


class EdgeContrastConfig(PretrainingConfig):
    """Settings of the edge contrast."""

    temperature: float = Field(0.2, gt=0, description="RELIEF and ProG")
    edges_per_step: int | None = Field(
        None, ge=1, description="edges of a step, drawn of the batch's; None: all. RELIEF, one large graph: 128"
    )


def edge_contrast(node: Tensor, neighbour: Tensor, other: Tensor, temperature: float) -> Tensor:
    """-log(x / (x + y)) of each row, x = exp(cos(node, neighbour) / t), y = exp(cos(node, other) / t); [m, d] -> [m]."""
    near = F.cosine_similarity(node, neighbour, dim=-1)
    far = F.cosine_similarity(node, other, dim=-1)
    return F.softplus((far - near) / temperature)


class EdgeContrast(Pretraining):
    """For each edge (v, a) and a node b that v has no edge to: -log(x / (x + y)), x and y the exponentials of the cosine
    of v with a, and with b, over the temperature.

    Embeddings are those of the backbone summed over a node and its neighbours. Trains the backbone only.

    Fidelity: the loss of RELIEF's release (GraphPrompt's own lacks the positive term in its denominator). RELIEF counts
    self-loops among the positives; they are left out here, since their cosine is 1 whatever the weights.

    Reference: Liu et al., GraphPrompt, WWW 2023; RELIEF, node_level/pretrain_gprompt.py.
    """

    name = "graph-prompt"
    config_class = EdgeContrastConfig

    def check(self, graphs: Sequence[Data]) -> None:
        check_pairs(graphs)

    def value(self, graphs: Any) -> Tensor:
        h = self.backbone(graphs)
        source, target = graphs.edge_index
        h = h.index_add(0, source, h[target])
        edges = graphs.edge_index[:, source != target]
        if self.config.edges_per_step is not None:
            edges = edges[:, torch.randperm(edges.shape[1])[: self.config.edges_per_step].to(edges.device)]
        pairs, found = draw_unlinked(graphs, graphs.batch[edges[0]], first=edges[0])
        if not bool(found.any()):
            return self.nothing()
        v, a, b = edges[0][found], edges[1][found], pairs[1][found]
        return edge_contrast(h[v], h[a], h[b], self.config.temperature).mean()
