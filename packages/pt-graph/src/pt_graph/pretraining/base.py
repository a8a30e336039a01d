"""What all objectives share: the backbone is what is trained, and how a batch of graphs is drawn from and cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.data import Batch, Data
from torch_geometric.utils import subgraph

from pt_core.errors import InputError
from pt_core.method import Loss, Method, MethodConfig
from pt_graph.backbones import GraphBackbone, has_doubles


class PretrainingConfig(MethodConfig):
    """Settings that every objective has. The learning rate is the run's."""

    backbone_dropout: bool = Field(
        False, description="dropout of the backbone while it is trained; 0 in pretrain-gnns. BatchNorm is in train mode"
    )
    seed: int = Field(0, description="of the start values of the objective's own modules")


class Pretraining(Method):
    """Base of the objectives: a backbone, trained on unlabeled graphs, and the modules that only its training needs.

    Batches are dicts with `graphs`, a `torch_geometric.data.Batch`. What is drawn in a step comes from torch's global
    generator, which the training loop seeds by run and step. A subclass implements `build` and `value`.
    """

    frozen_backbone = False
    config_class: ClassVar[type[MethodConfig]] = PretrainingConfig
    contrasts: ClassVar[bool] = False  # whether a graph's negatives are other graphs of its batch
    config: Any
    backbone: GraphBackbone

    def __init__(self, backbone: GraphBackbone, config: MethodConfig | None = None) -> None:
        if not isinstance(backbone, GraphBackbone):
            raise InputError(
                f"pre-training wants a GraphBackbone, not a {type(backbone).__name__}",
                remedy="Wrap it: pt_graph.PyGBackbone(module, feature_width, width, hops)",
            )
        super().__init__(backbone, config)
        self.backbone = backbone.requires_grad_()  # a submodule here: checkpoints hold it
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            self.build()

    def build(self) -> None:
        """Make the objective's own modules, at the width of the backbone."""

    def check(self, graphs: Sequence[Data]) -> None:
        """Raise InputError, before the first step, where the objective cannot be computed on these graphs."""

    def train(self, mode: bool = True) -> Pretraining:
        super().train(mode)
        for module in self.backbone.modules():
            if isinstance(module, nn.Dropout):
                module.training = mode and self.config.backbone_dropout
        return self

    def value(self, graphs: Any) -> Tensor:
        """The objective on a batch of graphs, a scalar."""
        raise TypeError(f"{type(self).__name__} has no objective")

    def loss(self, batch: Any) -> Loss:
        """Of the batch as a whole: BatchNorm in train mode, if nothing else, couples its graphs."""
        graphs = batch["graphs"]  # the last batch of an epoch may be one graph, or one node, which BatchNorm refuses
        alone = (self.contrasts and graphs.num_graphs < 2) or (self.training and graphs.num_nodes < 2)
        return Loss.mean(self.nothing() if alone else self.value(graphs))

    def nothing(self) -> Tensor:
        """The value of a batch that has nothing to tell apart: zero, with zero gradients."""
        return torch.stack([p.sum() for p in self.parameters()]).sum() * 0


# --- pairs ------------------------------------------------------------------------------------------------------------
def tell_apart(positive: Tensor, negative: Tensor) -> Tensor:
    """Binary cross-entropy of scores that should be high and of scores that should be low, the sum of both means."""
    return F.softplus(-positive).mean() + F.softplus(negative).mean()


def check_pairs(graphs: Sequence[Data]) -> None:
    """Refuse graphs of which none has both linked and unlinked nodes.

    Raises:
        InputError: there are no pairs to tell apart.
    """
    for graph in graphs:
        n, pairs = int(graph.num_nodes or 0), links(graph)[0].shape[1]
        if 0 < pairs < n * (n - 1) // 2:
            return
    raise InputError(
        "no graph has both linked and unlinked nodes: there are no pairs to tell apart",
        field="edge_index",
        remedy="Add graphs of three or more nodes, or choose another objective",
    )


def next_one(rows: Tensor) -> Tensor:
    """Row i + 1 in place of row i, cyclically: the negatives of pretrain-gnns."""
    return rows.roll(-1, 0)


def links(graphs: Any) -> tuple[Tensor, Tensor]:
    """Linked pairs of nodes, each once whatever its directions, [2, m], and the number of each edge's pair, [e].

    The number of a self-loop is -1.
    """
    low, high = graphs.edge_index.min(0).values, graphs.edge_index.max(0).values
    n, between = graphs.num_nodes, low < high
    codes, number = (low * n + high)[between].unique(return_inverse=True)
    of_edge = torch.full_like(low, -1)
    of_edge[between] = number
    return torch.stack([codes // n, codes % n]), of_edge


def draw_nodes(graphs: Any, of: Tensor) -> Tensor:
    """A uniformly drawn node of each graph whose number is in `of`, [m]."""
    start, size = graphs.ptr[of], graphs.ptr[of + 1] - graphs.ptr[of]
    wide = torch.float64 if has_doubles(of.device) else torch.float32
    drawn = (torch.rand(len(of), device=of.device, dtype=wide) * size).long()
    return cast(Tensor, start + torch.minimum(drawn, size - 1))


def draw_unlinked(graphs: Any, of: Tensor, first: Tensor | None = None, tries: int = 50) -> tuple[Tensor, Tensor]:
    """Pairs of different nodes without a link, uniformly from the graphs `of` [m]; `first` [m] fixes their first nodes.

    Returns:
        Pairs [2, m], and [m], which of them were found within `tries` draws (a complete graph has none).
    """
    n = graphs.num_nodes
    linked = torch.cat(
        [graphs.edge_index[0] * n + graphs.edge_index[1], graphs.edge_index[1] * n + graphs.edge_index[0]]
    )
    linked = linked.unique()
    pairs = of.new_zeros(2, len(of))
    wanted = torch.ones_like(of, dtype=torch.bool)
    for _ in range(tries):
        a = draw_nodes(graphs, of[wanted]) if first is None else first[wanted]
        b = draw_nodes(graphs, of[wanted])
        pairs[:, wanted] = torch.stack([a, b])
        wanted[wanted.clone()] = (a == b) | torch.isin(a * n + b, linked)
        if not bool(wanted.any()):
            break
    return pairs, ~wanted


# --- parts of graphs --------------------------------------------------------------------------------------------------
def rank_within(keys: Tensor, of: Tensor, graphs: int) -> Tensor:
    """Rank of each row (0: smallest key) among the rows of its graph; `of` [n] numbers the graphs of the rows."""
    order = keys.argsort()
    order = order[of[order].argsort(stable=True)]
    count = torch.bincount(of, minlength=graphs)
    rank = torch.empty_like(of)
    rank[order] = torch.arange(len(of), device=of.device) - (count.cumsum(0) - count)[of[order]]
    return rank


def distances(graphs: Any, roots: Tensor, limit: int | None = None) -> Tensor:
    """Hops of each node from the root of its graph, [n]; n where it is not reached, within `limit` hops if given."""
    n = graphs.num_nodes
    source, target = graphs.edge_index
    hops = torch.full((n,), n, dtype=torch.long, device=roots.device)
    hops[roots] = 0
    for step in range(1, (n if limit is None else limit) + 1):
        reached = target[hops[source] == step - 1]
        reached = reached[hops[reached] == n]
        if not len(reached):
            break
        hops[reached] = step
    return hops


def induced(graphs: Any, keep: Tensor) -> tuple[Batch, Tensor]:
    """The batch of graphs that nodes `keep` [n] span, and the new number of every node, [n] (of a kept one)."""
    edge_index, edge_attr = subgraph(
        keep, graphs.edge_index, graphs.edge_attr, relabel_nodes=True, num_nodes=graphs.num_nodes
    )
    of = graphs.batch[keep]
    ends = torch.bincount(of, minlength=graphs.num_graphs).cumsum(0)
    made = Batch(x=graphs.x[keep], edge_index=edge_index, edge_attr=edge_attr, batch=of, ptr=F.pad(ends, (1, 0)))
    return made, keep.cumsum(0) - 1
