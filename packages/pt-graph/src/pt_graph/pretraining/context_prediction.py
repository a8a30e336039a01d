"""Context prediction: which surroundings belong to this neighbourhood?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch_geometric.data import Batch, Data
from torch_geometric.nn import global_mean_pool

from pt_core.errors import InputError
from pt_graph.backbones import GraphBackbone
from pt_graph.pretraining.base import (
    Pretraining,
    PretrainingConfig,
    distances,
    draw_nodes,
    induced,
    next_one,
    tell_apart,
)


class ContextPredictionConfig(PretrainingConfig):
    """Settings of context prediction. pretrain-gnns, 5 layers: neighbourhood 5, ring from 4 to 7."""

    neighbourhood: int | None = Field(None, ge=1, description="k, hops of the neighbourhood; default: the backbone's")
    inner: int | None = Field(None, ge=0, description="l1, the ring begins beyond it; default: k - 1")
    width: int = Field(3, ge=1, description="l2 - l1, hops across the ring and layers of the context GNN")


class ContextPrediction(Pretraining):
    """A root's embedding in its k-hop neighbourhood has a large dot product with its own context, a small one with another
    molecule's.

    The context is the ring of nodes more than l1 and at most l2 hops from the root. A second GNN of l2 - l1 layers, otherwise
    like the backbone, embeds the ring's subgraph; the mean over the nodes in both ring and neighbourhood is the context
    (the continuous bag of words of pretrain-gnns). One negative: the next graph's context. Graphs that do not reach beyond
    l1 hops are left out of the batch.

    Extra parameters: those of the context GNN.

    Fidelity: as pretrain-gnns (chem/pretrain_contextpred.py), mode cbow, mean pooling. Roots are drawn anew in every step.

    Reference: Hu et al., Strategies for Pre-training GNNs, ICLR 2020.
    """

    name = "context-prediction"
    config_class = ContextPredictionConfig
    contrasts = True

    def build(self) -> None:
        backbone, config = self.backbone, self.config
        if "layers" not in type(backbone.config).model_fields:
            raise InputError(
                f"a {backbone.config.kind} cannot be made again with fewer layers for the context",
                remedy="Use a ChemGNN or a NodeGIN",
                field="objective",
            )
        self.k = config.neighbourhood or backbone.hops
        self.l1 = self.k - 1 if config.inner is None else config.inner
        self.l2 = self.l1 + config.width
        if self.l1 >= self.k:
            raise InputError(
                f"the ring begins beyond {self.l1} hops, the neighbourhood ends at {self.k}: they share no node",
                remedy="Choose an inner below the neighbourhood",
                field="inner",
            )
        smaller = type(backbone.config).model_validate(backbone.config.to_dict() | {"layers": config.width})
        self.context: GraphBackbone = type(backbone)(smaller)  # type: ignore[call-arg,arg-type]

    def check(self, graphs: Sequence[Data]) -> None:
        far = list(islice((graph for graph in graphs if _reaches(graph, self.l1 + 1)), 2))
        if len(far) < 2:
            raise InputError(
                f"{len(far)} of {len(graphs)} graphs have nodes {self.l1 + 1} hops apart: there are no contexts to tell apart",
                remedy="Choose a smaller inner, or another objective",
                field="inner",
            )

    def rings(self, graphs: Any, roots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which nodes are in the neighbourhood, in the ring, and in both, [n] each, of graphs whose ring is not empty."""
        hops = distances(graphs, roots, self.l2)
        ring = (hops > self.l1) & (hops <= self.l2)
        has = global_mean_pool(ring[:, None].double(), graphs.batch, graphs.num_graphs)[:, 0] > 0
        near = (hops <= self.k) & has[graphs.batch]
        return near, ring, near & ring

    def value(self, graphs: Any) -> Tensor:
        roots = draw_nodes(graphs, torch.arange(graphs.num_graphs, device=graphs.batch.device))
        near, ring, both = self.rings(graphs, roots)
        here, number = induced(graphs, near)
        kept = roots[near[roots]]
        around, place = induced(graphs, ring)
        if len(kept) < 2:  # by chance no two graphs of a small batch reach far enough: nothing to tell apart
            return self.nothing()
        embedded = self.backbone(here)[number[kept]]
        context = self.context(around)[place[both]]
        means = global_mean_pool(context, graphs.batch[both], graphs.num_graphs)[graphs.batch[kept]]
        return tell_apart((embedded * means).sum(1), (embedded * next_one(means)).sum(1))


def _reaches(graph: Data, hops: int) -> bool:
    """Whether the graph has two nodes `hops` apart."""
    batch = Batch.from_data_list([graph])
    return any(bool((distances(batch, torch.tensor([v]), hops) == hops).any()) for v in range(batch.num_nodes))
