"""All-in-One: a small graph of trained tokens is joined to every graph."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch_geometric.data import Batch as Graphs

from pt_core.data import Split
from pt_core.method import MethodConfig
from pt_core.plan import FitConfig, build_optimiser
from pt_core.training import FitResult, Loop, backward, fit
from pt_graph.backbones import GraphBackbone, dropping
from pt_graph.method import GraphConfig, GraphMethod


class TokenGraph(nn.Module):
    """T tokens of width D, their edges to each other and to the nodes of a graph. Parameters: T * D.

    Edges are there, unweighted, where a sigmoid of the dot product reaches a threshold: between tokens i and j (both
    directions, i = j included) sigmoid(t_i . t_j) >= inner, from token i to node v sigmoid(t_i . x_v) >= cross. Gradients
    flow through the tokens' features, not through the choice of edges.
    """

    def __init__(self, tokens: int, width: int, inner: float, cross: float, generator: torch.Generator) -> None:
        super().__init__()
        bound = (2 / (1 + 0.01**2)) ** 0.5 * (3 / width) ** 0.5  # Kaiming uniform, slope 0.01
        self.weight = nn.Parameter((torch.rand(tokens, width, generator=generator) * 2 - 1) * bound)
        self.inner, self.cross = inner, cross

    def edges(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs (token, token) and (token, node), [2, *] each, for node features `x` [n, D]."""
        with torch.no_grad():
            inner = ((self.weight @ self.weight.T).sigmoid() >= self.inner).nonzero().T
            cross = ((self.weight @ x.T.to(self.weight.dtype)).sigmoid() >= self.cross).nonzero().T
        return inner, cross

    def join(self, x: Tensor, graphs: Any) -> tuple[Tensor, Graphs, Tensor]:
        """Features [n + B * T, D] and structure of the joined graphs, and where their own nodes are in them, [n].

        In each graph the tokens come first. Edge attributes of new edges are zeros.
        """
        count, tokens = graphs.num_graphs, len(self.weight)
        sizes = torch.bincount(graphs.batch, minlength=count)
        starts = (sizes + tokens).cumsum(0) - (sizes + tokens)
        nodes = torch.arange(len(x), device=x.device) + (graphs.batch + 1) * tokens
        places = starts[:, None] + torch.arange(tokens, device=x.device)  # of tokens, [B, T]
        joined = x.new_empty(len(x) + count * tokens, x.shape[1])
        joined = joined.index_copy(0, nodes, x)
        joined = joined.index_copy(0, places.reshape(-1), self.weight.to(x.dtype).repeat(count, 1))

        inner, cross = self.edges(x)
        within = places[:, inner].transpose(0, 1).reshape(2, -1)
        onto = torch.stack([places[graphs.batch[cross[1]], cross[0]], nodes[cross[1]]])
        edge_index = torch.cat([nodes[graphs.edge_index], within, onto], 1)
        edge_attr = getattr(graphs, "edge_attr", None)
        if edge_attr is not None:
            new = edge_attr.new_zeros(edge_index.shape[1] - len(edge_attr), *edge_attr.shape[1:])
            edge_attr = torch.cat([edge_attr, new])
        batch = torch.arange(count, device=x.device).repeat_interleave(sizes + tokens)
        ends = torch.cat([starts, starts.new_tensor([len(joined)])])
        return joined, Graphs(edge_index=edge_index, edge_attr=edge_attr, batch=batch, ptr=ends), nodes


class AllInOneConfig(GraphConfig):
    """Settings of All-in-One."""

    tokens: int = Field(10, ge=1, description="T; ProG, tasker/task.py")
    cross_threshold: float = Field(0.1, ge=0, description="token to node; above 1: no such edges. ProG, tasker/task.py")
    inner_threshold: float = Field(
        0.3, ge=0, description="token to token; above 1: no such edges. ProG, tasker/task.py"
    )
    pool_tokens: bool = Field(True, description="the read-out covers the tokens too, as in ProG")
    lr: float = Field(
        1e-6, gt=0, description="of the tokens; ProG, tasker/task.py. Far too small for other scales of features"
    )
    head_lr: float = Field(1e-3, gt=0, description="ProG, tasker/task.py")
    answer_epochs: int = Field(
        50, ge=0, description="epochs of the head alone, first in each round; ProG, graph_task.py"
    )
    prompt_epochs: int = Field(50, ge=0, description="epochs of the tokens alone, then; ProG, graph_task.py")

    @model_validator(mode="after")
    def _some_epochs(self) -> AllInOneConfig:
        if self.answer_epochs + self.prompt_epochs == 0:
            raise ValueError("a round has no epochs: answer_epochs and prompt_epochs are both 0")
        return self


class AllInOne(GraphMethod):
    """All-in-One: T trained tokens [T, D], with edges among them and onto the nodes, are part of every graph.

    Graphs -> joined graphs (`TokenGraph`) -> frozen backbone -> read-out over nodes and tokens [B, d] -> logits [B, C].

    `fit` alternates: `answer_epochs` of the head with the tokens fixed, then `prompt_epochs` of the tokens with the head
    fixed, and so on until the run's epochs are over. While the tokens are fixed every graph is embedded once.

    Parameters: T * D (plus the head). Chem GIN, D = 300, T = 10: 3,000.

    Fidelity: thresholds, start, alternation and rates follow ProG. ProG's head ends in a softmax in front of a loss that
    has its own; here it gives logits. Edge attributes are zeros on new edges, which for molecules is a single bond; ProG
    has no edge attributes. As in ProG a token has an edge to itself, beside the self-loops of the backbone.

    Reference: Sun et al. All in One: Multi-Task Prompting for Graph Neural Networks. KDD 2023.
    """

    name = "all-in-one"
    config_class = AllInOneConfig

    def __init__(self, backbone: GraphBackbone, config: MethodConfig | None = None) -> None:
        super().__init__(backbone, config)
        c = self.config
        self.tokens = TokenGraph(c.tokens, backbone.feature_width, c.inner_threshold, c.cross_threshold, self.generator)

    def parameter_groups(self) -> list[dict[str, Any]]:
        prompt = {"name": "prompt", "params": list(self.tokens.parameters()), "lr": self.config.lr}
        return [prompt, *super().parameter_groups()]

    def optimisers(self, config: FitConfig) -> dict[str, torch.optim.Optimizer]:
        """`prompt` and `head`, which step in turns."""
        return {group["name"]: build_optimiser([group], config) for group in self.parameter_groups()}

    def embed(self, graphs: Any) -> Tensor:
        """Read-outs of joined graphs [B, d]."""
        x, joined, nodes = self.tokens.join(self.backbone.embed(graphs), graphs)
        with dropping(self.backbone, self.training and self.config.backbone_dropout):
            h = self.backbone.encode(x, joined)
        return self.backbone.readout(h, joined) if self.config.pool_tokens else self.backbone.readout(h[nodes], graphs)

    def phase(self, epoch: int) -> str:
        """Which optimiser steps in an epoch (from 0): `head` or `prompt`."""
        answer, prompt = self.config.answer_epochs, self.config.prompt_epochs
        return "head" if epoch % (answer + prompt) < answer else "prompt"

    def fit(
        self,
        train: Split,
        validation: Split | None = None,
        config: FitConfig | None = None,
        output_dir: str | Path | None = None,
    ) -> FitResult:
        """Alternate between head and tokens; the run's epochs count both. By default one round of both."""
        config = config or FitConfig(epochs=self.config.answer_epochs + self.config.prompt_epochs)
        seen: Split | None = None  # the embedded rows, while the tokens are fixed
        per_epoch = math.ceil(len(train) / config.batch_size)

        def step(loop: Loop, number: int, rows: list[int]) -> None:
            nonlocal seen
            phase = self.phase((number - 1) // per_epoch)
            if phase == "prompt" or self.config.backbone_dropout:
                seen = None
            elif seen is None:
                seen = self.read(train, config)
            backward(loop, seen or train, rows)
            loop.update(phase)

        return fit(self, train, validation, config, output_dir, make_step=step)
