"""Small random graphs and backbones, made in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch_geometric.data import Batch, Data

from pt_core.data import Split
from pt_core.testing import one_thread
from pt_graph.backbones import ChemConfig, ChemGNN, GraphBackbone, NodeGIN, NodeGINConfig


def graph(nodes: int, seed: int, molecule: bool = False, width: int = 6) -> Data:
    """A random connected graph: a tree and a few more edges, both directions of each."""
    draw = torch.Generator().manual_seed(seed)
    parents = [int(torch.randint(0, i, (1,), generator=draw)) for i in range(1, nodes)]
    pairs = {(p, i) for i, p in enumerate(parents, start=1)}
    for _ in range(nodes // 3):
        a, b = torch.randint(0, nodes, (2,), generator=draw).tolist()
        if a != b:
            pairs.add((min(a, b), max(a, b)))
    one_way = torch.tensor(sorted(pairs), dtype=torch.long).reshape(-1, 2).T
    edges = torch.stack([one_way, one_way.flip(0)], -1).reshape(2, -1)  # each bond's two directions side by side
    if not molecule:
        return Data(x=torch.randn(nodes, width, generator=draw), edge_index=edges)
    atoms = torch.stack([torch.randint(0, n, (nodes,), generator=draw) for n in (20, 3)], 1)
    bonds = torch.stack([torch.randint(0, n, (len(pairs),), generator=draw) for n in (4, 3)], 1)
    return Data(x=atoms, edge_index=edges, edge_attr=bonds.repeat_interleave(2, 0))


def split(sizes: list[int], seed: int = 0, molecule: bool = False, task: str = "multiclass", outputs: int = 2) -> Split:
    """Random graphs of these sizes with random labels; multi-label rows have missing labels (-1)."""
    draw = torch.Generator().manual_seed(1000 + seed)
    graphs = [graph(n, seed * 100 + i, molecule) for i, n in enumerate(sizes)]
    if task == "multiclass":
        labels = torch.randint(0, outputs, (len(sizes),), generator=draw)
        labels[:outputs] = torch.arange(outputs)[: len(sizes)]
    else:
        labels = torch.randint(0, 2, (len(sizes), outputs), generator=draw)
        labels[1:2, 0] = -1

    def collate(rows: list[tuple[Data, Tensor]]) -> dict[str, Any]:
        return {"graphs": Batch.from_data_list([g for g, _ in rows]), "labels": torch.stack([y for _, y in rows])}

    metrics = ("accuracy",) if task == "multiclass" else ("roc-auc",)
    rows = list(zip(graphs, labels, strict=True))
    return Split(rows, collate, metrics=metrics, task=task, num_classes=outputs, missing=-1)


def node_gin(seed: int = 0, **changes: Any) -> GraphBackbone:
    torch.manual_seed(seed)
    return NodeGIN(NodeGINConfig(**{"feature_width": 6, "width": 8} | changes)).eval()


def chem(seed: int = 0, **changes: Any) -> GraphBackbone:
    torch.manual_seed(seed)
    made = ChemGNN(ChemConfig(**{"width": 12, "layers": 2} | changes))
    for norm in made.batch_norms:  # as after pre-training: statistics that differ from the start
        torch.nn.init.normal_(norm.running_mean, std=0.1)
        torch.nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return made.eval()


@pytest.fixture
def make_graph() -> Callable[..., Data]:
    return graph


@pytest.fixture
def make_split() -> Callable[..., Split]:
    return split


@pytest.fixture
def make_backbone() -> Callable[..., GraphBackbone]:
    """kind ("node-gin" or "chem"), seed, changes of the configuration -> a random backbone."""

    def make(kind: str = "node-gin", seed: int = 0, **changes: Any) -> GraphBackbone:
        return {"node-gin": node_gin, "chem": chem}[kind](seed, **changes)

    return make


@pytest.fixture(autouse=True)
def on_one_thread() -> Iterator[None]:
    with one_thread():
        yield
