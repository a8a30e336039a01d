"""Episodes on a batch of graphs: a prompt is built step by step, one node a step, as many steps as a graph has nodes.

A batch of graphs with n nodes in all has n transitions; the one of graph i at step t is row first_i + t, where first_i is
also the number of the graph's first node. Everything that is drawn, kept or returned is in that order. The graphs may belong
to different members: a step is one pass over all of them, in which each graph is acted on by its own member.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pt_core.errors import InputError
from pt_graph.methods.relief.policy import Member, Policies, normal_log_prob, padded_policy, sample
from pt_graph.walk import Walk

Encode = Callable[[Tensor, Any], Tensor]
Losses = Callable[[Tensor, int], Tensor]


class Episodes:
    """A batch of graphs, ordered so that those that still have a step are always its first ones.

    Graphs whose steps are over are no longer computed; what a frozen GNN in eval mode gives for the others is the same.

    Args:
        encode: (features [n, D], graphs) -> node embeddings [n, d].
        features: X [n, D] of the graphs.
        graphs: a PyG batch.
        walk: (features, graphs) -> a `Walk`, if the backbone has one, so that a step computes what its prompt reaches.

    Raises:
        InputError: a graph has no nodes.
    """

    def __init__(
        self, encode: Encode, features: Tensor, graphs: Any, walk: Callable[[Tensor, Any], Walk | None] | None = None
    ) -> None:
        self.encode, self._walk = encode, walk
        sizes = torch.bincount(graphs.batch, minlength=graphs.num_graphs)
        if not bool((sizes > 0).all()):
            raise InputError(f"graph {int(sizes.argmin())} of a batch has no nodes", field="graphs")
        order = sizes.argsort(descending=True, stable=True)
        rank = order.argsort()
        self.sizes, self.order = sizes, order
        first = sizes.cumsum(0) - sizes
        self.nodes = rank[graphs.batch].argsort(stable=True)  # the given number of each node, largest graph first
        number = self.nodes.argsort()
        edges = rank[graphs.batch[graphs.edge_index[0]]].argsort(stable=True)
        self.features = features[self.nodes]
        self._first, self._sizes = first[order], sizes[order]
        self.graph = torch.arange(len(order), device=sizes.device).repeat_interleave(self._sizes)
        self.row = self.nodes - first[order][self.graph]  # position of a node in its graph
        per_graph = torch.bincount(rank[graphs.batch[graphs.edge_index[0]]], minlength=len(order))
        self._node_stop, self._edge_stop = self._sizes.cumsum(0).tolist(), per_graph.cumsum(0).tolist()
        lengths = self._sizes.tolist()
        self.steps: int = lengths[0]
        self._active = [sum(length > t for length in lengths) for t in range(self.steps)]
        self._parts: dict[str, tuple[Tensor, list[int]]] = {}
        for key, value in graphs.to_dict().items():
            if key == "edge_index":
                self._parts[key] = number[value[:, edges]], self._edge_stop
            elif key in ("batch", "ptr"):
                continue
            elif graphs.is_node_attr(key):
                self._parts[key] = value[self.nodes], self._node_stop
            elif graphs.is_edge_attr(key):
                self._parts[key] = value[edges], self._edge_stop
        self._views: dict[int, Any] = {}

    def view(self, graphs: int) -> Any:
        """The first so many graphs, as a backbone reads them."""
        if graphs not in self._views:
            stops = torch.tensor([0, *self._node_stop[:graphs]], device=self.nodes.device)
            view = SimpleNamespace(num_graphs=graphs, batch=self.graph[: self._node_stop[graphs - 1]], ptr=stops)
            for key, (value, stop) in self._parts.items():
                setattr(view, key, value[:, : stop[graphs - 1]] if key == "edge_index" else value[: stop[graphs - 1]])
            self._views = {graphs: view}  # once a graph is over it does not come back
        return self._views[graphs]

    def walk(self, x: Tensor) -> Walk | WholePasses:
        """Embeddings of features x [n, D] that will change at a node of each graph in every step."""
        found = None if self._walk is None else self._walk(x, self.view(len(self.sizes)))
        return WholePasses(self, x) if found is None else found

    def steps_of(self) -> Iterator[tuple[int, int, int, Tensor]]:
        """For each step t: t, the graphs k that have it, their nodes, and the rows [k] of their transitions."""
        for t, k in enumerate(self._active):
            yield t, k, self._node_stop[k - 1], self._first[:k] + t

    def mask(self, graphs: int) -> Tensor:
        """Where the nodes of the first so many graphs stand in [k, N]."""
        return torch.arange(self.steps, device=self._sizes.device) < self._sizes[:graphs, None]

    def numbers(self, choice: Tensor) -> Tensor:
        """Numbers, largest graph first, of the chosen node [k] of each graph."""
        return self._sizes.cumsum(0)[: len(choice)] - self._sizes[: len(choice)] + choice

    def as_given(self, values: Tensor) -> Tensor:
        """Values of nodes in the order of the batch."""
        return torch.empty_like(values).index_copy_(0, self.nodes, values)


class WholePasses:
    """A `Walk` of a backbone that has none: every change costs a pass over all graphs that go on."""

    def __init__(self, episodes: Episodes, x: Tensor) -> None:
        self.episodes, self.x = episodes, x.clone()
        self.h = episodes.encode(x, episodes.view(len(episodes.sizes)))

    def change(self, nodes: Tensor, x: Tensor, among: int) -> slice:
        """See `Walk.change`; a node of each graph that goes on."""
        self.x[nodes] = x
        self.h = self.episodes.encode(self.x[:among], self.episodes.view(len(nodes)))
        return slice(0, among)


@dataclass
class Rollout:
    """The n transitions of the episodes of a batch.

    Args:
        sizes: nodes, and so steps, of each graph, [B].
        states: node embeddings before each step, [sum n_i^2, d]: those of graph i at step 0, at step 1, ...
        node: chosen node, as its position in the graph, [n].
        content: what was added there, [n, D].
        log_d, log_c: log-probability of the node and log-density of the content, [n].
        reward: by how much the loss fell, [n].
    """

    sizes: Tensor
    states: Tensor
    node: Tensor
    content: Tensor
    log_d: Tensor
    log_c: Tensor
    reward: Tensor

    def __len__(self) -> int:
        return len(self.node)

    @cached_property
    def size(self) -> Tensor:
        """Nodes of the graph of each transition, [n]."""
        return self.sizes.repeat_interleave(self.sizes)

    @cached_property
    def start(self) -> Tensor:
        """First row of each transition's state, [n]."""
        return self.size.cumsum(0) - self.size

    @cached_property
    def pooled(self) -> Tensor:
        """Mean and maximum over the nodes of each state, [n, 2d]."""
        return torch.cat([torch.cat([b.mean(1), b.amax(1)], 1) for b in self.blocks()])

    def split(self, graphs: Sequence[int]) -> list[Rollout]:
        """Those of the first so many graphs, of the next ones, ...; they share memory."""
        sizes = self.sizes.split(list(graphs))
        states = self.states.split([int((n * n).sum()) for n in sizes])
        values = (self.node, self.content, self.log_d, self.log_c, self.reward)
        others = [value.split([int(n.sum()) for n in sizes]) for value in values]
        return [Rollout(*own) for own in zip(sizes, states, *others, strict=True)]

    def blocks(self) -> list[Tensor]:
        """States by graph, [n_i, n_i, d] each."""
        sizes = self.sizes.tolist()
        return [b.view(n, n, -1) for n, b in zip(sizes, self.states.split([n * n for n in sizes]), strict=True)]

    def rows(self, transitions: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the states of some transitions [r], packed, and the mask [r, k] of where they stand."""
        size = self.size[transitions]
        at = torch.arange(int(size.max()), device=size.device)
        mask = at < size[:, None]
        return (self.start[transitions][:, None] + at)[mask], mask


@torch.no_grad()
def roll_out(
    episodes: Episodes,
    policies: Policies,
    members: Sequence[int],
    std: float,
    losses: Losses,
    uniform: Tensor,
    noise: Tensor,
    clamp: bool,
) -> Rollout:
    """Members act on the graphs of a batch, each on its own ones.

    The embedding that gives the reward of a step is the state of the next one, only the chosen nodes' contents are
    computed, and embeddings and logits only where the last prompt reaches.

    Args:
        members: number of the one that acts on each graph, [B].
        std: deviation of the contents.
        losses: (node embeddings, k) -> loss of each of the first k graphs of the episodes.
        uniform: [n], which node is taken.
        noise: [n, D], standard normal, of the contents.
        clamp: contents are cut to z_max; their density is that of the cut content, without correction, as released.
    """
    e, x = episodes, episodes.features.clone()
    sizes, owner = e.sizes, torch.tensor(members, device=x.device)[e.order][e.graph]
    n, squares = len(x), (sizes * sizes).cumsum(0) - sizes * sizes
    base, stride = squares[e.order][e.graph] + e.row, sizes[e.order][e.graph]
    walk = e.walk(x)
    alone = list(policies)[members[0]] if len(set(members)) == 1 else None

    def act(function: Callable[[Member, Tensor], Tensor], nodes: slice | Tensor) -> Tensor:
        return function(alone, h[nodes]) if alone else policies.apart(function, h[nodes], owner[nodes])

    h = walk.h
    acting = act(Member.logits, slice(None))
    states = h.new_empty(int((sizes * sizes).sum()), h.shape[1])
    node, content = torch.empty_like(e.nodes), torch.empty_like(noise)
    log_d, log_c, reward = (h.new_empty(n) for _ in range(3))
    before = losses(h, len(sizes))
    for t, k, stop, rows in e.steps_of():
        states[base[:stop] + t * stride[:stop]] = h[:stop]
        log_pi = padded_policy(acting[:stop], e.mask(k), log=True)
        choice = sample(log_pi.exp(), uniform[rows])
        at = e.numbers(choice)
        mean = act(Member.mean, at)
        z = mean + std * noise[rows]
        z = z.clamp(-policies.z_max, policies.z_max) if clamp else z
        x[at] += z
        node[rows], content[rows] = choice, z
        log_d[rows], log_c[rows] = log_pi.gather(1, choice[:, None])[:, 0], normal_log_prob(z, mean, std)
        changed = walk.change(at, x[at], stop)
        h = walk.h
        acting[changed] = act(Member.logits, changed)
        after = losses(h[:stop], k)
        reward[rows] = before[:k] - after
        before = after
    return Rollout(sizes, states, node, content, log_d, log_c, reward)


@torch.no_grad()
def build_prompts(episodes: Episodes, policies: Policies, uniform: Tensor) -> Tensor:
    """Prompts P [n, D] of the joint policy: its node is drawn (by `uniform` [n]), its content is the mean one."""
    e, x = episodes, episodes.features.clone()
    prompts = torch.zeros_like(x)
    walk = e.walk(x)
    acting = policies.logits(walk.h)
    for t, k, stop, rows in e.steps_of():
        at = e.numbers(sample(policies.joint(acting[:, :stop], e.mask(k)), uniform[rows]))
        prompts[at] += policies.mean(walk.h[at]).to(x.dtype)
        if t + 1 < e.steps:
            changed = walk.change(at, e.features[at] + prompts[at], stop)
            acting[:, changed] = policies.logits(walk.h[changed])
    return e.as_given(prompts)
