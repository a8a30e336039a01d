"""GPPT: structure tokens sort nodes into clusters, and each cluster has a task head of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch_geometric.utils import scatter

from pt_core.data import Split
from pt_core.errors import InputError
from pt_core.method import Batch, Loss, MethodConfig, Output
from pt_core.plan import FitConfig
from pt_core.training import FitResult, Loop, backward, fit
from pt_graph.backbones import GraphBackbone
from pt_graph.method import GraphConfig, ReadOnceMethod
from pt_graph.methods.gpf import glorot


class GPPTConfig(GraphConfig):
    """Settings of GPPT. Its heads are its own: `head_layers` and `head_lr` have no effect."""

    structure_tokens: int = Field(7, ge=1, description="K; GPPT, get_args.py. ProG: the number of classes")
    lr: float = Field(2e-3, gt=0, description="GPPT, get_args.py")
    orthogonality: float = Field(0.01, ge=0, description="c; GPPT, get_args.py. ProG: 0.001")


class GPPT(ReadOnceMethod):
    """GPPT: z = [h; h_neigh] goes to the head of the structure token that it agrees with most.

    Node tasks: z [2d] is the embedding of the subgraph's centre (`centre_index`) beside the mean of its neighbours'
    embeddings. Graphs without a centre: z is the read-out of both over all nodes, one row for each graph. The token is
    c = argmax_k S_k . z, and the logits are W_c z, [B, C], without a bias.

    Loss: that of the task + c * mean_k ||W_k W_k^T - I||_F, which is 0 where the rows of every W_k are orthonormal (this
    needs C <= 2d).

    `fit` starts the tokens S [K, 2d] from k-means centres of the training rows and every W_k [C, 2d] from their class
    means (multi-label: means of the positive rows). After each step k-means of the step's rows moves the tokens.

    Parameters: K * C * 2d by gradient and K * 2d by k-means. Chem GIN, d = 300, K = 7, C = 12: 50,400 + 4,200 = 54,600.

    Fidelity: the backbone is frozen, as the paper says; the released script trains all its weights. There the second half
    of z is a mean of neighbours when heads start and the centre's layer before the last in training, and both go through
    a ReLU; here it is the mean of the neighbours' embeddings throughout, as in the paper. k-means of a step starts from
    the tokens there are, so that tokens keep their heads (there it starts anew each time), and is left out for a step of
    fewer than K different rows. ProG classifies every node of a graph and lets them vote; here a graph is one row. In a
    subgraph cut k hops around its centre, neighbours are embedded from what is left of their surroundings. The script's weight
    decay of 5e-4 is the run's to set (`weight_decay`; default 0).

    Reference: Sun et al. GPPT: Graph Pre-training and Prompt Tuning to Generalize Graph Neural Networks. KDD 2022.
    """

    name = "gppt"
    config_class = GPPTConfig
    structure: Tensor

    def __init__(self, backbone: GraphBackbone, config: MethodConfig | None = None) -> None:
        super().__init__(backbone, config)
        tokens, outputs, width = self.config.structure_tokens, self.config.num_outputs, 2 * backbone.width
        self.heads = nn.Parameter(glorot(tokens * outputs, width, self.generator).view(tokens, outputs, width))
        self.register_buffer("structure", glorot(tokens, width, self.generator))

    def build_head(self) -> None:
        return None

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"name": "heads", "params": [self.heads], "lr": self.config.lr}]

    def count(self) -> int:
        """Values of the heads and, though no gradient trains them, of the structure tokens."""
        return self.heads.numel() + self.structure.numel()

    def embed(self, graphs: Any) -> Tensor:
        """z [B, 2d]."""
        h = self.nodes(graphs)
        source, target = graphs.edge_index
        near = scatter(h[source], target, dim=0, dim_size=len(h), reduce="mean")  # 0 where a node has no neighbour
        centres = getattr(graphs, "centre_index", None)
        if centres is None:
            return torch.cat([self.backbone.readout(h, graphs), self.backbone.readout(near, graphs)], 1)
        return torch.cat([h[centres], near[centres]], 1)

    def forward(self, batch: Batch) -> Output:
        """Logits [B, C] and z [B, 2d]."""
        z = self.features(batch)
        chosen = (z @ self.structure.T).argmax(1)
        return Output(torch.einsum("bcd,bd->bc", self.heads[chosen], z), z)

    def penalty(self) -> Tensor:
        """mean_k ||W_k W_k^T - I||_F."""
        identity = torch.eye(self.config.num_outputs, device=self.heads.device)
        return torch.linalg.matrix_norm(self.heads @ self.heads.mT - identity).mean()

    def loss_of(self, output: Output, batch: Batch) -> Loss:
        loss = super().loss_of(output, batch)
        loss.total = loss.total + loss.count * self.config.orthogonality * self.penalty()
        return loss

    def start(self, train: Split) -> None:
        """Structure tokens and heads from the training rows.

        Raises:
            InputError: fewer than K different rows, or a class without rows (multi-class).
        """
        rows = train.batch(range(len(train)))
        z, labels = rows["features"], rows["labels"]
        means = self.class_means(z, labels)
        centres = cluster(z, self.config.structure_tokens, self.config.seed)
        if centres is None:
            raise InputError(
                f"{self.config.structure_tokens} structure tokens need as many different training rows",
                field="structure_tokens",
                remedy="Ask for fewer, or add rows",
            )
        self.structure.copy_(centres)
        with torch.no_grad():
            self.heads.copy_(means.expand_as(self.heads))

    def fit(
        self,
        train: Split,
        validation: Split | None = None,
        config: FitConfig | None = None,
        output_dir: str | Path | None = None,
    ) -> FitResult:
        config = config or FitConfig(epochs=30)
        train, validation, seen = self.embedded(train, validation, config)

        def step(loop: Loop, number: int, rows: list[int]) -> None:
            backward(loop, train, rows)
            loop.update()
            centres = cluster(seen.batch(rows)["features"], self.config.structure_tokens, self.structure)
            if centres is not None:
                self.structure.copy_(centres)

        return fit(self, train, validation, config, output_dir, make_step=step)


def cluster(z: Tensor, count: int, start: Tensor | int) -> Tensor | None:
    """k-means centres [count, F] of rows `z` [n, F]; None where fewer than `count` rows differ.

    Args:
        start: centres to start from, or the seed of a k-means++ start.
    """
    rows = z.cpu().double().numpy()
    if len(np.unique(rows, axis=0)) < count:
        return None
    if isinstance(start, int):
        means = KMeans(count, random_state=start, n_init=10)
    else:
        means = KMeans(count, init=start.cpu().double().numpy(), n_init=1)
    with threadpool_limits(1):  # threads add up in any order, and a resumed run must get the same bits
        return torch.from_numpy(means.fit(rows).cluster_centers_).float()
