"""What all graph methods share: a head on the pooled embeddings of prompted graphs, and a loss that masks missing labels.

Batches are dicts: `graphs` (a `torch_geometric.data.Batch`), `labels` ([B] classes, or [B, C] of 1, 0 and -1 for missing)
and `sample_ids`. `pt_graph.data` makes them.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pt_core.attachment import attach
from pt_core.errors import InputError
from pt_core.method import Batch, Loss, Method, MethodConfig, Output
from pt_graph.backbones import FeaturePrompt, GraphBackbone, dropping


class GraphConfig(MethodConfig):
    """Settings that every graph method has."""

    num_outputs: int = Field(ge=1, description="C: classes, or tasks of a multi-task data set")
    task: Literal["multilabel", "multiclass"] = Field(
        "multilabel", description="multilabel: binary tasks, masked where a label is missing; multiclass: one class"
    )
    head_layers: int = Field(1, ge=1, le=3, description="linear layers of the head, width d, ReLU; 1 to 3 in GPF")
    head_lr: float = Field(1e-3, gt=0, description="GPF, chem/prompt_tuning_few_shot.py")
    backbone_dropout: bool = Field(
        False,
        description="dropout of the frozen backbone while training (published runs: on, 0.5); BatchNorm stays in eval",
    )
    seed: int = Field(0, description="of start values and of what a method draws when it predicts")


class Head(nn.Sequential):
    """MLP d -> d -> ... -> C with ReLU between its `layers` linear layers; started as torch does.

    Parameters: (layers - 1) * (d^2 + d) + d * C + C.
    """

    def __init__(self, width: int, outputs: int, layers: int, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            hidden = [m for _ in range(layers - 1) for m in (nn.Linear(width, width), nn.ReLU())]
            super().__init__(*hidden, nn.Linear(width, outputs))


def label_loss(logits: Tensor, labels: Tensor, task: str) -> tuple[Tensor, Tensor]:
    """Loss of each graph, summed over its terms, and the number of its terms, [B] each.

    Binary cross-entropy over the labels that are there (a missing one, -1, is no term), or cross-entropy.
    """
    if task == "multiclass":
        return F.cross_entropy(logits, labels, reduction="none"), torch.ones_like(labels)
    known = labels >= 0
    terms = F.binary_cross_entropy_with_logits(logits, labels.clamp(min=0).to(logits.dtype), reduction="none")
    return terms.masked_fill(~known, 0).sum(1), known.sum(1)


class GraphMethod(Method):
    """A frozen graph backbone with a feature prompt (or none) and a trained head on its graph embeddings."""

    config: Any
    backbone: GraphBackbone
    config_class = GraphConfig

    def __init__(self, backbone: GraphBackbone, config: MethodConfig | None = None) -> None:
        if not isinstance(backbone, GraphBackbone):
            raise InputError(
                f"graph methods want a GraphBackbone, not a {type(backbone).__name__}",
                remedy="Wrap it: pt_graph.PyGBackbone(module, feature_width, width, hops)",
            )
        super().__init__(backbone, config)
        self.generator = torch.Generator().manual_seed(self.config.seed)
        self.prompt = self.build_prompt()
        self.head = self.build_head()
        self.handle = None if self.prompt is None else attach(backbone, self.prompt, always=False)

    def build_prompt(self) -> FeaturePrompt | None:
        """What is attached; None: nothing. Start values come from `self.generator`."""
        return None

    def build_head(self) -> nn.Module | None:
        return Head(self.backbone.width, self.config.num_outputs, self.config.head_layers, self.config.seed)

    def remove(self) -> None:
        if self.handle is not None:
            self.handle.remove()

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups = []
        if self.prompt is not None:
            groups.append({"name": "prompt", "params": list(self.prompt.parameters()), "lr": self.config.lr})
        if self.head is not None:
            groups.append({"name": "head", "params": list(self.head.parameters()), "lr": self.config.head_lr})
        return groups

    def nodes(self, graphs: Any) -> Tensor:
        """Node embeddings [n, d] of prompted graphs."""
        with dropping(self.backbone, self.training and self.config.backbone_dropout):
            if self.handle is None:
                return cast(Tensor, self.backbone(graphs))
            with self.handle.active():
                return cast(Tensor, self.backbone(graphs))

    def forward(self, batch: Batch) -> Output:
        """Logits [B, C] and graph embeddings [B, d]."""
        graphs = batch["graphs"]
        features = self.backbone.readout(self.nodes(graphs), graphs)
        return Output(cast(nn.Module, self.head)(features), features)

    def loss(self, batch: Batch) -> Loss:
        logits = self(batch).logits
        total, count = label_loss(logits, batch["labels"], self.config.task)
        return Loss(total.sum(), count.sum())
