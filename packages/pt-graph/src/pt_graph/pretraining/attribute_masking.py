"""Attribute masking: which atom was hidden here?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.data import Data

from pt_core.errors import InputError
from pt_graph.backbones import ATOM_TYPES, BOND_TYPES, ChemGNN
from pt_graph.pretraining.base import Pretraining, PretrainingConfig, links, rank_within

MASKED_ATOM, MASKED_BOND = ATOM_TYPES - 1, BOND_TYPES - 1  # the last rows of the tables
PREDICTED_BONDS = 4  # single, double, triple, aromatic


class AttributeMaskingConfig(PretrainingConfig):
    """Settings of attribute masking."""

    rate: float = Field(0.15, gt=0, lt=1, description="pretrain-gnns: int(rate n + 1) atoms are masked")
    bonds: bool = Field(False, description="also mask, and predict, the bonds of masked atoms; off in pretrain-gnns")


class AttributeMasking(Pretraining):
    """The type of masked atoms is predicted from their embeddings: cross-entropy of Linear(d, 119).

    In each molecule of n atoms int(0.15 n + 1) are masked: type 119, chirality 0. With `bonds`, the bonds of masked atoms
    are masked too (type 5, direction 0), and Linear(d, 4) predicts a bond's type from the sum of its atoms' embeddings.

    Extra parameters: 119 d + 119 (and 4 d + 4).

    Fidelity: as pretrain-gnns (chem/pretrain_masking.py), masks drawn anew in every step.

    Reference: Hu et al., Strategies for Pre-training GNNs, ICLR 2020.
    """

    name = "attribute-masking"
    config_class = AttributeMaskingConfig

    def build(self) -> None:
        if not isinstance(self.backbone, ChemGNN):
            raise InputError(
                f"attribute masking predicts atom types: it wants a ChemGNN, not a {type(self.backbone).__name__}",
                remedy="Choose an objective that works on any features: edge-prediction, context-prediction, infomax, "
                "graphcl, graph-prompt or gppt",
                field="objective",
            )
        self.atoms = nn.Linear(self.backbone.width, ATOM_TYPES - 1)
        self.bonds = nn.Linear(self.backbone.width, PREDICTED_BONDS) if self.config.bonds else None

    def check(self, graphs: Sequence[Data]) -> None:
        for row, graph in enumerate(graphs, start=1):
            if bool((graph.x[:, 0] >= MASKED_ATOM).any()):
                raise InputError(f"atom type {MASKED_ATOM} is the mask's", row=row, field="x")

    def mask(self, graphs: Any) -> tuple[Any, Tensor]:
        """A copy of the batch with masked atoms (and bonds), and which atoms are masked, [n]."""
        rank = rank_within(torch.rand(graphs.num_nodes, device=graphs.x.device), graphs.batch, graphs.num_graphs)
        masked = rank < (graphs.ptr.diff() * self.config.rate + 1).long()[graphs.batch]
        made = graphs.clone()
        made.x[masked] = made.x.new_tensor([MASKED_ATOM, 0])
        if self.config.bonds:
            made.edge_attr[masked[graphs.edge_index].any(0)] = made.edge_attr.new_tensor([MASKED_BOND, 0])
        return made, masked

    def value(self, graphs: Any) -> Tensor:
        made, masked = self.mask(graphs)
        h = self.backbone(made)
        loss = F.cross_entropy(self.atoms(h[masked]), graphs.x[masked, 0])
        if self.bonds is None:
            return loss
        _, of_edge = links(graphs)
        once = (graphs.edge_index[0] < graphs.edge_index[1]) & (of_edge >= 0)  # each bond in one of its two directions
        chosen = once & (made.edge_attr[:, 0] == MASKED_BOND) & (graphs.edge_attr[:, 0] < PREDICTED_BONDS)
        if not bool(chosen.any()):
            return loss
        ends = graphs.edge_index[:, chosen]
        return loss + F.cross_entropy(self.bonds(h[ends[0]] + h[ends[1]]), graphs.edge_attr[chosen, 0])
