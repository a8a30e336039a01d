"""GraphCL: two changed views of a graph are more alike than views of two graphs."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.nn import global_mean_pool

from pt_graph.pretraining.attribute_masking import MASKED_ATOM
from pt_graph.pretraining.base import (
    Pretraining,
    PretrainingConfig,
    distances,
    draw_nodes,
    draw_unlinked,
    induced,
    links,
    rank_within,
)

Augmentation = Literal["node-drop", "edge-perturbation", "attribute-masking", "subgraph"]


class GraphCLConfig(PretrainingConfig):
    """Settings of GraphCL."""

    augmentations: tuple[Augmentation, ...] = Field(
        ("node-drop", "edge-perturbation", "attribute-masking", "subgraph"),
        min_length=1,
        description="each view of each graph draws one of these; GraphCL, chem: node-drop or subgraph",
    )
    ratio: float = Field(0.2, gt=0, lt=1, description="GraphCL: share of nodes or edges that are changed")
    temperature: float = Field(0.1, gt=0, description="GraphCL, chem/pretrain_graphcl.py")


def info_nce(one: Tensor, two: Tensor, temperature: float) -> Tensor:
    """Mean over i of -log(exp(s_ii / t) / sum over j != i of exp(s_ij / t)), s the cosines of views [B, d] and [B, d]."""
    scores = F.normalize(one, dim=1) @ F.normalize(two, dim=1).T / temperature
    own = torch.eye(len(one), dtype=torch.bool, device=one.device)
    return (scores.masked_fill(own, -torch.inf).logsumexp(1) - scores.diagonal()).mean()


class GraphCL(Pretraining):
    """Contrast of two augmented views of each graph: pooled, projected by an MLP d-d-d (ReLU), InfoNCE with temperature 0.1.

    Of a graph of n nodes, int(0.2 n) are changed: dropped at random; masked; or dropped so that a connected ball around a
    random node is left (subgraph). Edge perturbation takes away int(0.2 m) of m links and adds as many between unlinked nodes.

    Extra parameters: 2 (d^2 + d).

    Fidelity: loss, head, ratio and temperature are those of GraphCL's release (chem); as there, the positive pair is not in
    the denominator, and the loss may be negative. Ours: a subgraph keeps 0.8 n nodes (there 0.2 n, among the root's
    neighbours only) and grows breadth first; a link goes with both its directions and passes its bond on to the added one
    (there bonds stay at their old places in the list); masked atoms get the mask token (there the mean of the codes), other
    features the mean of their graph.

    Reference: You et al., Graph Contrastive Learning with Augmentations, NeurIPS 2020.
    """

    name = "graphcl"
    config_class = GraphCLConfig
    contrasts = True

    def build(self) -> None:
        d = self.backbone.width
        self.project = nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, d))

    def augment(self, graphs: Any) -> Any:
        """A changed copy of the batch; every graph draws its own augmentation."""
        ratio, device = self.config.ratio, graphs.batch.device
        drawn = torch.randint(len(self.config.augmentations), (graphs.num_graphs,)).tolist()
        kinds = [self.config.augmentations[i] for i in drawn]
        which = {kind: torch.tensor([k == kind for k in kinds], device=device) for kind in self.config.augmentations}
        none = torch.zeros(graphs.num_graphs, dtype=torch.bool, device=device)
        masks, drops, cuts, perturbs = (
            which.get(kind, none) for kind in ("attribute-masking", "node-drop", "subgraph", "edge-perturbation")
        )
        of = graphs.batch
        key = torch.rand(graphs.num_nodes, device=device)
        if bool(cuts.any()):  # the farthest from a random root go first
            hops = distances(graphs, draw_nodes(graphs, torch.arange(graphs.num_graphs, device=device)))
            key = torch.where(cuts[of], -(hops + key), key)
        chosen = rank_within(key, of, graphs.num_graphs) < (graphs.ptr.diff() * ratio).long()[of]
        made = graphs.clone()
        masked = chosen & masks[of]
        if graphs.x.is_floating_point():
            made.x[masked] = global_mean_pool(graphs.x, of, graphs.num_graphs)[of[masked]]
        else:
            made.x[masked] = made.x.new_tensor([MASKED_ATOM, 0])
        if bool(perturbs.any()):
            self._perturb(made, perturbs)
        return induced(made, ~(chosen & (drops | cuts)[of]))[0]

    def _perturb(self, graphs: Any, these: Tensor) -> None:
        """Move links of the graphs `these` [B] between nodes that are not linked."""
        pairs, of_edge = links(graphs)
        of = graphs.batch[pairs[0]]
        count = (torch.bincount(of, minlength=graphs.num_graphs) * self.config.ratio).long() * these
        gone = rank_within(torch.rand(len(of), device=of.device), of, graphs.num_graphs) < count[of]
        added, found = draw_unlinked(graphs, of[gone])
        added = added[:, found]
        stays = (of_edge < 0) | ~gone[of_edge]
        graphs.edge_index = torch.cat([graphs.edge_index[:, stays], added, added.flip(0)], 1)
        if graphs.edge_attr is not None:
            any_edge = torch.empty(len(of), dtype=torch.long, device=of.device)
            any_edge[of_edge[of_edge >= 0]] = (of_edge >= 0).nonzero()[:, 0]
            passed_on = graphs.edge_attr[any_edge[gone][found]]
            graphs.edge_attr = torch.cat([graphs.edge_attr[stays], passed_on, passed_on])

    def value(self, graphs: Any) -> Tensor:
        one, two = (
            self.project(self.backbone.readout(self.backbone(view), view))
            for view in (self.augment(graphs), self.augment(graphs))
        )
        return info_nce(one, two, self.config.temperature)
