"""GraphPrompt: a learned weighting of embedding dimensions inside the read-out, and nearest class prototypes."""

from __future__ import annotations

from typing import Any, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pt_core.data import Split
from pt_core.method import Batch, MethodConfig, Output
from pt_graph.backbones import POOLS, GraphBackbone
from pt_graph.method import GraphConfig, ReadOnceMethod
from pt_graph.methods.gpf import glorot


class GraphPromptConfig(GraphConfig):
    """Settings of GraphPrompt. It has no head: those of `head_layers` and `head_lr` have no effect."""

    lr: float = Field(0.01, gt=0, description="GraphPrompt, graphdownstream; 1e-3 for nodes (nodedownstream)")
    temperature: float = Field(0.1, gt=0, description="tau; ProG, utils/loss.py")


class GraphPrompt(ReadOnceMethod):
    """GraphPrompt: s = sum_v w * h_v with a trained w [d]; the class is that of the nearest prototype.

    Graphs -> prompted read-outs s [B, d] -> logits [B, C] = cos(s, p_c) / tau. The prototype p_c is the mean of s over the
    training graphs of class c, with the current w; the loss is the cross-entropy of these logits,
    -log(e^{cos(s, p_y)/tau} / sum_c e^{cos(s, p_c)/tau}).

    Multi-label: a task has a prototype of its positive and one of its negative training graphs, and its logit is
    (cos(s, p+) - cos(s, p-)) / tau, whose sigmoid is the same softmax over two. Graphs without a label do not enter. A
    side without training graphs has no prototype, and counts as cosine 0.

    Since s = w * sum_v h_v, only the sums of frozen embeddings are kept, for rows and prototypes alike (`centres`, read
    off the training rows when `fit` starts). Without a fit there are no prototypes and all logits are 0.

    Parameters: d. Chem GIN, d = 300: 300. Persistent, not trained: centres [2, C, d] (multi-class: [1, C, d]).

    Fidelity: the cosine form of the paper; the released scripts use 1 / squared distance, and some make no backward pass.
    Prototypes are of all training rows at every step; ProG takes those of the batch, which couples its rows. The positive
    term is in the denominator. The read-out is the sum, whatever the backbone's own is. The scripts' weight decay of 1e-5 is
    the run's to set (`weight_decay`; default 0).

    Reference: Liu et al. GraphPrompt: Unifying Pre-Training and Downstream Tasks for Graph Neural Networks. WWW 2023.
    """

    name = "graph-prompt"
    config_class = GraphPromptConfig
    centres: Tensor

    def __init__(self, backbone: GraphBackbone, config: MethodConfig | None = None) -> None:
        super().__init__(backbone, config)
        self.weight = nn.Parameter(glorot(1, backbone.width, self.generator)[0])
        sides = 1 if self.config.task == "multiclass" else 2
        self.register_buffer("centres", torch.zeros(sides, self.config.num_outputs, backbone.width))

    def build_head(self) -> None:
        return None

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"name": "prompt", "params": [self.weight], "lr": self.config.lr}]

    def embed(self, graphs: Any) -> Tensor:
        """Sums of frozen node embeddings [B, d]."""
        return cast(Tensor, POOLS["sum"](self.nodes(graphs), graphs.batch, graphs.num_graphs))

    def start(self, train: Split) -> None:
        """Prototypes of the training rows, before they are prompted.

        Raises:
            InputError: a class has no training row (multi-class).
        """
        rows = train.batch(range(len(train)))
        sides = (1,) if self.config.task == "multiclass" else (1, 0)
        self.centres.copy_(torch.stack([self.class_means(rows["features"], rows["labels"], of) for of in sides]))

    def forward(self, batch: Batch) -> Output:
        """Logits [B, C] and prompted read-outs s [B, d]."""
        s = self.weight * self.features(batch)
        prototypes = F.normalize(self.weight * self.centres, dim=-1)
        cosines = F.normalize(s, dim=-1) @ prototypes.mT  # [sides, B, C]
        logits = cosines[0] if len(cosines) == 1 else cosines[0] - cosines[1]
        return Output(logits / self.config.temperature, s)
