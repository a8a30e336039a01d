"""Embeddings of features that change at few nodes: those of a whole pass, computed where the change reaches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch_geometric.data import Batch

from pt_graph.walk import Walk

SIZES = [9, 1, 14, 6]


def walk_of(kind: str, make_backbone: Any, make_graph: Any, **changes: Any) -> tuple[Any, Any, torch.Tensor, Walk]:
    eps = changes.pop("eps", [])
    backbone = make_backbone(kind, **changes).double()
    for i, value in enumerate(eps):  # a buffer, which checkpoints set
        backbone.conv_layers[i].eps.fill_(value)
    graphs = Batch.from_data_list([make_graph(n, i, kind == "chem") for i, n in enumerate(SIZES)])
    if kind != "chem":
        graphs.x = graphs.x.double()
    x = backbone.embed(graphs).detach()
    walk = backbone.walk(x, graphs)
    assert walk is not None
    return backbone, graphs, x, walk


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("node-gin", {}),
        ("node-gin", {"eps": [0.5, 0.0]}),
        ("chem", {"conv": "gin"}),
        ("chem", {"conv": "gcn"}),
        ("chem", {"conv": "graphsage", "layers": 3}),
    ],
)
@torch.no_grad()
def test_a_walk_gives_the_embeddings_of_whole_passes(
    kind: str, changes: dict[str, Any], make_backbone: Any, make_graph: Any
) -> None:
    backbone, graphs, x, walk = walk_of(kind, make_backbone, make_graph, **changes)
    torch.testing.assert_close(walk.h, backbone.encode(x, graphs), rtol=1e-12, atol=1e-12)
    draw = torch.Generator().manual_seed(0)
    for step in range(6):
        nodes = graphs.ptr[:-1] + torch.tensor([int(torch.randint(n, (1,), generator=draw)) for n in SIZES])
        among = int(graphs.ptr[3 if step > 3 else 4])  # in the last steps the last graph is over
        nodes = nodes[nodes < among]
        x = x.index_add(0, nodes, torch.randn(len(nodes), x.shape[1], generator=draw, dtype=x.dtype))
        before = walk.h.clone()
        changed = walk.change(nodes, x[nodes], among)
        torch.testing.assert_close(walk.h[:among], backbone.encode(x, graphs)[:among], rtol=1e-12, atol=1e-12)
        others = torch.ones(len(x), dtype=torch.bool).index_fill(0, changed, False)
        assert torch.equal(walk.h[others], before[others])


@torch.no_grad()
def test_a_change_reaches_as_far_as_there_are_layers(make_backbone: Any, make_graph: Any) -> None:
    _, graphs, x, walk = walk_of("chem", make_backbone, make_graph, layers=2)
    near = {10}
    for _ in range(2):
        near |= {int(v) for u, v in graphs.edge_index.T.tolist() if u in near}
    assert set(walk.change(torch.tensor([10]), x[[10]] + 1, len(x)).tolist()) == near
    assert len(near) < SIZES[2]


def test_a_backbone_without_fixed_messages_has_no_walk(make_backbone: Any, make_graph: Any) -> None:
    """Attention depends on the features; dropout and BatchNorm in train mode do not repeat."""
    graphs = Batch.from_data_list([make_graph(5, 0, True)])
    attention = make_backbone("chem", conv="gat")
    assert attention.walk(attention.embed(graphs), graphs) is None
    training = make_backbone("chem")
    training.dropout.train()
    assert training.walk(training.embed(graphs), graphs) is None
