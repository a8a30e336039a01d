"""Node embeddings of features that change at few nodes at a time: only what the change reaches is computed again.

A backbone that passes messages over the same edges in every layer says what its layers are (`MessageLayer`); a `Walk` keeps
what each of them read. When the features of a node change, layer l is computed anew at the nodes at most l edges away: of a
molecule with 25 atoms and five layers about a third of the work. In exact arithmetic the result is that of a whole pass;
in floats it may differ in the last digits, since products of fewer rows may be added in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class MessageLayer:
    """y_v = after(sum_{u -> v} w_uv before(x_u) + constant_v), in eval mode.

    Args:
        before: on the rows of the input; None: as they are.
        weight: w of each edge, [e]; None: 1.
        constant: what edges add whatever the features are, [n, d']; None: nothing.
        after: on the rows of the sums.
    """

    before: Callable[[Tensor], Tensor] | None
    weight: Tensor | None
    constant: Tensor | None
    after: Callable[[Tensor], Tensor]


def edge_sums(values: Tensor, target: Tensor, nodes: int) -> Tensor:
    """Sum of the values [e, d] of the edges that lead to each node, [n, d]."""
    return values.new_zeros(nodes, values.shape[1]).index_add_(0, target, values)


class Walk:
    """Embeddings `h` [n, d] of graphs whose features change step by step.

    Args:
        x: features [n, D] at the start.
        edge_index: [2, e], with a self-loop at every node: each layer must read the node itself, if with weight 0.
        layers: of the backbone, first to last.
    """

    def __init__(self, x: Tensor, edge_index: Tensor, layers: Sequence[MessageLayer]) -> None:
        order = edge_index[1].argsort(stable=True)
        self.source, self.target = edge_index[:, order]
        self.weights = [None if layer.weight is None else layer.weight[order] for layer in layers]
        self.layers = layers
        self.degree = torch.bincount(self.target, minlength=len(x))
        ends = self.degree.cumsum(0)
        self.ends: list[int] = ends.tolist()  # edges to the nodes up to each one
        self.read: list[Tensor] = []  # what each layer sums up
        starts = ends - self.degree
        for layer, weight in zip(layers, self.weights, strict=True):
            self.read.append(x.clone() if layer.before is None else layer.before(x))
            sums = _sums(self.read[-1], self.source, starts, weight)
            x = layer.after(sums if layer.constant is None else sums + layer.constant)
        self.h = x

    def change(self, nodes: Tensor, x: Tensor, among: int) -> Tensor:
        """The features of some nodes are now `x` [k, D]: `h` is made good.

        Args:
            nodes: [k], each once.
            among: they and all that they reach are among the first so many nodes.

        Returns:
            The nodes whose embeddings may have changed.
        """
        edges = self.ends[among - 1]
        source, target = self.source[:edges], self.target[:edges]
        reached = torch.zeros(among, dtype=torch.bool, device=x.device)
        reached[nodes] = True
        for layer, weight, read in zip(self.layers, self.weights, self.read, strict=True):
            read[nodes] = x if layer.before is None else layer.before(x)
            reached[target[reached[source]]] = True
            nodes, into = reached.nonzero()[:, 0], reached[target]
            degree = self.degree[nodes]
            given = None if weight is None else weight[:edges][into]
            sums = _sums(read, source[into], degree.cumsum(0) - degree, given)
            x = layer.after(sums if layer.constant is None else sums + layer.constant[nodes])
        self.h[nodes] = x
        return nodes


def _sums(values: Tensor, source: Tensor, starts: Tensor, weight: Tensor | None) -> Tensor:
    """Sums of w_e values[source_e] over runs of edges that start at `starts`."""
    return F.embedding_bag(source, values, starts, mode="sum", per_sample_weights=weight)
