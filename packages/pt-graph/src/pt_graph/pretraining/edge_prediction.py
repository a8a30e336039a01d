"""Edge prediction: linked nodes have a larger dot product than unlinked ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F
from torch_geometric.data import Data

from pt_graph.pretraining.base import Pretraining, PretrainingConfig, check_pairs, draw_unlinked, links, tell_apart


class EdgePredictionConfig(PretrainingConfig):
    """Settings of edge prediction."""

    links_per_step: int | None = Field(
        None, ge=1, description="linked pairs of a step, drawn of the batch's; None: all (pretrain-gnns)"
    )


class EdgePrediction(Pretraining):
    """Binary cross-entropy on h_u . h_v: 1 for linked nodes, 0 for as many unlinked pairs of the same graphs.

    Trains the backbone only.

    Fidelity: as pretrain-gnns (chem/pretrain_edgepred.py): each bond once, one unlinked pair for each bond, the sum of both
    means. There a negative is not drawn twice in a graph; here it may be.

    Reference: Hamilton et al., NeurIPS 2017; Hu et al., Strategies for Pre-training GNNs, ICLR 2020.
    """

    name = "edge-prediction"
    config_class = EdgePredictionConfig

    def check(self, graphs: Sequence[Data]) -> None:
        check_pairs(graphs)

    def scores(self, graphs: Any) -> tuple[Tensor, Tensor]:
        """Dot products of linked and of unlinked pairs, [m] each (fewer unlinked ones where a graph is complete)."""
        h = self.backbone(graphs)
        pairs, _ = links(graphs)
        if self.config.links_per_step is not None:
            pairs = pairs[:, torch.randperm(pairs.shape[1])[: self.config.links_per_step].to(pairs.device)]
        unlinked, found = draw_unlinked(graphs, graphs.batch[pairs[0]])
        unlinked = unlinked[:, found]
        return (h[pairs[0]] * h[pairs[1]]).sum(1), (h[unlinked[0]] * h[unlinked[1]]).sum(1)

    def value(self, graphs: Any) -> Tensor:
        linked, unlinked = self.scores(graphs)
        return tell_apart(linked, unlinked) if len(linked) and len(unlinked) else self.nothing()


class GPPTEdgesConfig(EdgePredictionConfig):
    """Settings of edge prediction on one large graph."""

    links_per_step: int | None = Field(
        256, ge=1, description="RELIEF, node_level/pretrain_gppt.py: 512 pairs of both kinds"
    )
    backbone_dropout: bool = Field(True, description="RELIEF, node level: on (0.2 there; here the backbone's own rate)")


class GPPTEdges(EdgePrediction):
    """Edge prediction as GPPT's backbones are made: the mean over linked and unlinked pairs together, one graph of nodes.

    A step runs the whole graph and scores `links_per_step` of its links, and as many unlinked pairs.

    Fidelity: RELIEF draws the unlinked pairs once and goes through all pairs in an epoch, stored in their direction; here
    both kinds are drawn anew in every step, so `epochs` of a single graph are steps. Its weight decay is 5e-5, its rate
    1e-2 to 1e-4 by data set.

    Reference: Sun et al., GPPT, KDD 2022; RELIEF, node_level/pretrain_gppt.py.
    """

    name = "gppt"
    config_class = GPPTEdgesConfig

    def value(self, graphs: Any) -> Tensor:
        linked, unlinked = self.scores(graphs)
        return F.softplus(torch.cat([-linked, unlinked])).mean() if len(linked) else self.nothing()
