"""Pre-training of graph backbones on unlabeled graphs.

One entry, `pretrain`, and one file for each objective:

    backbone = ChemGNN()
    pretrain(backbone, graphs, "attribute-masking", FitConfig(epochs=100, batch_size=256, optimiser="adam"), "runs/mask")
    save_backbone(backbone, "my-gin")
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch_geometric.data import Batch, Data

from pt_core.data import Split
from pt_core.errors import InputError
from pt_core.plan import FitConfig
from pt_core.training import FitResult, fit
from pt_graph.backbones import GraphBackbone
from pt_graph.pretraining.attribute_masking import AttributeMasking, AttributeMaskingConfig
from pt_graph.pretraining.base import Pretraining, PretrainingConfig
from pt_graph.pretraining.context_prediction import ContextPrediction, ContextPredictionConfig
from pt_graph.pretraining.descriptors import Descriptors, DescriptorsConfig, descriptor_targets
from pt_graph.pretraining.edge_prediction import EdgePrediction, EdgePredictionConfig, GPPTEdges, GPPTEdgesConfig
from pt_graph.pretraining.graph_prompt import EdgeContrast, EdgeContrastConfig
from pt_graph.pretraining.graphcl import GraphCL, GraphCLConfig
from pt_graph.pretraining.infomax import Infomax, InfomaxConfig

__all__ = [
    "OBJECTIVES",
    "AttributeMaskingConfig",
    "ContextPredictionConfig",
    "DescriptorsConfig",
    "EdgeContrastConfig",
    "EdgePredictionConfig",
    "GPPTEdgesConfig",
    "GraphCLConfig",
    "InfomaxConfig",
    "Pretraining",
    "PretrainingConfig",
    "descriptor_targets",
    "pretrain",
]

OBJECTIVES: dict[str, type[Pretraining]] = {
    objective.name: objective
    for objective in (
        EdgePrediction,
        AttributeMasking,
        ContextPrediction,
        Infomax,
        GraphCL,
        EdgeContrast,
        GPPTEdges,
        Descriptors,
    )
}


def pretrain(
    backbone: GraphBackbone,
    graphs: Sequence[Data],
    objective: str | PretrainingConfig = "attribute-masking",
    config: FitConfig | None = None,
    output_dir: str | Path | None = None,
    validation: Sequence[Data] | None = None,
) -> FitResult:
    """Train a backbone on unlabeled graphs, in place; it ends in eval mode.

    Args:
        backbone: fresh, or pre-trained before: objectives may follow one another.
        graphs: molecules, or graphs with features; a list of one for the nodes of one large graph.
        objective: a name of `OBJECTIVES`, or the configuration of one.
        config: the run; default: that of pretrain-gnns, 100 epochs of Adam at 1e-3, batch 256.
        output_dir: folder for metrics and checkpoints; a killed run of the same configuration goes on from there.
        validation: other graphs on which the objective is computed; with them, the best step is kept unless `config` says
            otherwise.

    Raises:
        InputError: there is no such objective, or it cannot be computed on these graphs or with this backbone.
    """
    config = config or FitConfig(epochs=100, batch_size=256, optimiser="adam", lr=1e-3, max_grad_norm=None)
    method = _method(backbone, objective)
    rows = list(graphs)
    if method.contrasts and min(len(rows), config.batch_size) < 2:
        raise InputError(
            f"{method.name} tells the graphs of a batch apart: it wants two or more",
            remedy="Set batch_size to 2 or more, or choose an objective on nodes: edge-prediction, graph-prompt or gppt",
            field="batch_size",
        )
    with torch.no_grad():
        backbone.eval()(Batch.from_data_list(rows[:2]))  # refuses features of another width or coding
    method.check(rows)

    def split(rows: Sequence[Data]) -> Split:
        return Split(rows, lambda chosen: {"graphs": Batch.from_data_list(chosen)}, task="none")

    return fit(method, split(rows), None if validation is None else split(list(validation)), config, output_dir)


def _method(backbone: GraphBackbone, objective: str | PretrainingConfig) -> Pretraining:
    if isinstance(objective, str):
        if objective not in OBJECTIVES:
            raise InputError(
                f"there is no objective {objective!r}",
                remedy=f"Choose one of: {', '.join(OBJECTIVES)}",
                field="objective",
            )
        chosen: Any = OBJECTIVES[objective]
        if any(field.is_required() for field in chosen.config_class.model_fields.values()):
            raise InputError(
                f"{objective} has settings without a default",
                remedy=f"Pass a {chosen.config_class.__name__}",
                field="objective",
            )
        return chosen(backbone)
    found = [method for method in OBJECTIVES.values() if type(objective) is method.config_class]
    if not found:
        raise InputError(f"a {type(objective).__name__} is no configuration of an objective", field="objective")
    return found[0](backbone, objective)
