"""Descriptors: computed properties of a molecule, predicted from its graph."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.data import Data

from pt_core.errors import InputError
from pt_graph.molecules import parse
from pt_graph.pretraining.base import Pretraining, PretrainingConfig


class DescriptorsConfig(PretrainingConfig):
    """Settings of descriptor prediction."""

    num_targets: int = Field(ge=1, description="T, the columns of `descriptor_targets`")


class Descriptors(Pretraining):
    """Computed descriptors of a molecule are predicted from its graph embedding: smooth L1 of Linear(d, T) after the read-out.

    Each graph has `descriptors`, [1, T], standardised; NaN is a missing value and no term. `descriptor_targets` makes them
    from SMILES, so no label of any data set is used.

    Extra parameters: d T + T.

    Fidelity: our choice, not a published objective. It stands where pretrain-gnns has its supervised, graph-level stage
    (assays of ChEMBL): computed targets need no data beside the molecules.
    """

    name = "descriptors"
    config_class = DescriptorsConfig

    def build(self) -> None:
        self.head = nn.Linear(self.backbone.width, self.config.num_targets)

    def check(self, graphs: Sequence[Data]) -> None:
        for row, graph in enumerate(graphs, start=1):
            targets = getattr(graph, "descriptors", None)
            if targets is None or targets.shape != (1, self.config.num_targets):
                shape = "no descriptors" if targets is None else f"descriptors {list(targets.shape)}"
                raise InputError(
                    f"a graph has {shape}, [1, {self.config.num_targets}] were expected",
                    row=row,
                    field="descriptors",
                    remedy="Set graph.descriptors to its row of descriptor_targets(smiles)",
                )

    def value(self, graphs: Any) -> Tensor:
        predicted = self.head(self.backbone.readout(self.backbone(graphs), graphs))
        known = graphs.descriptors.isfinite()
        return F.smooth_l1_loss(predicted[known], graphs.descriptors[known])


def descriptor_targets(smiles: Iterable[str], limit: float = 5.0) -> Tensor:
    """Standardised descriptors of molecules, [N, T]: RDKit's 2D descriptors and counts of its fragments.

    Columns have mean 0 and standard deviation 1 over these molecules and are cut to +-`limit`; constant columns are left
    out, so T depends on the molecules. What cannot be computed is NaN.

    Raises:
        InputError: a SMILES cannot be read.
    """
    table = np.array([_described(text, row) for row, text in enumerate(smiles, start=1)], dtype=np.float64)
    table[~np.isfinite(table) | (np.abs(table) > 1e6)] = np.nan
    with np.errstate(all="ignore"):
        mean, spread = np.nanmean(table, 0), np.nanstd(table, 0)
    varies = np.isfinite(spread) & (spread > 1e-9)
    scaled = (table[:, varies] - mean[varies]) / spread[varies]
    return torch.from_numpy(np.clip(scaled, -limit, limit)).float()


@functools.cache
def _functions() -> list[Any]:
    from rdkit.Chem import Descriptors as rdkit_descriptors

    return [function for _, function in rdkit_descriptors._descList]


def _described(smiles: str, row: int) -> list[float]:
    try:
        molecule = parse(smiles)
    except InputError as error:
        raise InputError(str(error), row=row, field="smiles") from error
    values = []
    for function in _functions():
        try:
            values.append(float(function(molecule)))
        except (ValueError, ZeroDivisionError, RuntimeError):
            values.append(np.nan)
    return values
