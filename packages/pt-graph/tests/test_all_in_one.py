"""All-in-One: which edges there are, the joined graph put together by hand, and epochs of head and tokens in turns."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch_geometric.data import Batch, Data

from pt_core.plan import FitConfig
from pt_graph import AllInOne, AllInOneConfig, ChemGNN
from pt_graph.methods.all_in_one import TokenGraph

RUN = FitConfig(epochs=6, batch_size=4, device="cpu", progress=False, keep_best=False)


def method(backbone: Any, task: str = "multiclass", **settings: Any) -> AllInOne:
    return AllInOne(backbone, AllInOneConfig(num_outputs=2, task=task, **({"tokens": 3} | settings)))


def token_graph(tokens: int, width: int, inner: float = 0.3, cross: float = 0.1) -> TokenGraph:
    return TokenGraph(tokens, width, inner, cross, torch.Generator().manual_seed(0))


def test_on_the_chem_gin_ten_tokens_are_3000_values() -> None:
    made = method(ChemGNN(), tokens=10)
    assert made.tokens.weight.numel() == 3_000
    assert made.count() == 3_000 + 2 * 300 + 2


def test_edges_begin_at_dot_products_of_minus_2_197225_and_minus_0_847298() -> None:
    made = token_graph(2, 1)
    made.weight.data = torch.tensor([[1.0], [-0.847297]])  # of the two tokens: -0.847297
    inner, cross = made.edges(torch.tensor([[-2.197224], [-2.197226]]))
    assert inner.T.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert cross.T.tolist() == [[0, 0], [1, 0], [1, 1]]
    made.weight.data[1] = -0.847299
    assert made.edges(torch.zeros(1, 1))[0].T.tolist() == [[0, 0], [1, 1]]


def test_tokens_near_zero_have_all_edges(make_graph: Callable[..., Any]) -> None:
    made = token_graph(4, 6)
    made.weight.data *= 1e-6
    inner, cross = made.edges(make_graph(5, 0).x)
    assert inner.shape == (2, 16)
    assert cross.shape == (2, 20)


def test_tokens_start_kaiming_uniform() -> None:
    bound = (6 / (1 + 0.01**2) / 400) ** 0.5
    start = torch.empty(100, 400)
    nn.init.kaiming_uniform_(start, a=0.01, nonlinearity="leaky_relu", mode="fan_in")
    ours = token_graph(100, 400).weight
    assert 0.99 * bound < ours.abs().max() <= bound
    assert start.abs().max() <= bound
    assert float(ours.std().detach()) == pytest.approx(float(start.std()), rel=0.02)


def joined(tokens: torch.Tensor, graph: Data, inner: float, cross: float) -> Data:
    """One graph with its tokens in front, edge by edge."""
    count = len(tokens)
    edges = [(a + count, b + count) for a, b in graph.edge_index.T.tolist()]
    bonds = [] if graph.edge_attr is None else graph.edge_attr.tolist()
    edges += [(i, j) for i in range(count) for j in range(count) if (tokens[i] @ tokens[j]).sigmoid() >= inner]
    edges += [
        (i, v + count) for i in range(count) for v in range(len(graph.x)) if (tokens[i] @ graph.x[v]).sigmoid() >= cross
    ]
    attributes = None if graph.edge_attr is None else torch.tensor(bonds + [[0, 0]] * (len(edges) - len(bonds)))
    return Data(x=torch.cat([tokens, graph.x]), edge_index=torch.tensor(edges).T, edge_attr=attributes)


@pytest.mark.parametrize("pool", [True, False])
def test_embeddings_are_those_of_graphs_joined_by_hand(pool: bool, make_backbone: Any, make_graph: Any) -> None:
    backbone, graphs = make_backbone(), [make_graph(n, n) for n in (5, 1, 4)]
    made = method(backbone, inner_threshold=0.45, cross_threshold=0.5, pool_tokens=pool).eval()
    tokens = made.tokens.weight.detach()
    by_hand = [joined(tokens, graph, 0.45, 0.5) for graph in graphs]
    assert len({data.edge_index.shape[1] for data in by_hand}) == 3
    rows = [backbone(Batch.from_data_list([data]))[0 if pool else 3 :].mean(0) for data in by_hand]
    torch.testing.assert_close(made.embed(Batch.from_data_list(graphs)), torch.stack(rows))


def test_on_molecules_tokens_are_bound_by_single_bonds(make_backbone: Callable[..., Any], make_graph: Any) -> None:
    backbone, graphs = make_backbone("chem"), [make_graph(n, n, molecule=True) for n in (5, 1, 4)]
    made = method(backbone, inner_threshold=0.45, cross_threshold=0.5).eval()
    rows = []
    for graph in graphs:
        own = Data(x=backbone.embed(graph), edge_index=graph.edge_index, edge_attr=graph.edge_attr)
        data = joined(made.tokens.weight.detach(), own, 0.45, 0.5)
        rows.append(backbone.encode(data.x, data).mean(0))
    torch.testing.assert_close(made.embed(Batch.from_data_list(graphs)), torch.stack(rows), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["node-gin", "chem"])
def test_without_edges_and_outside_of_the_read_out_tokens_change_nothing(
    kind: str, make_backbone: Any, make_split: Any
) -> None:
    backbone, graphs = make_backbone(kind), make_split([5, 3], molecule=kind == "chem").batch([0, 1])["graphs"]
    made = method(backbone, inner_threshold=1.1, cross_threshold=1.1, pool_tokens=False).eval()
    torch.testing.assert_close(made.embed(graphs), backbone.readout(backbone(graphs), graphs))
    with_edges = method(backbone, pool_tokens=False).eval()
    assert not torch.allclose(with_edges.embed(graphs), made.embed(graphs))


def test_epochs_of_head_and_of_tokens_take_turns(make_backbone: Callable[..., Any], make_split: Any) -> None:
    rows, made = make_split([5, 3, 6, 4, 7, 2]), method(make_backbone(), answer_epochs=2, prompt_epochs=1, lr=0.01)
    assert [made.phase(epoch) for epoch in range(6)] == ["head", "head", "prompt"] * 2
    states = [{name: t.clone() for name, t in made.trained_state().items()}]
    take = type(made).loss

    def spy(self: Any, batch: Any) -> Any:
        states.append({name: t.clone() for name, t in self.trained_state().items()})
        return take(self, batch)

    with mock.patch.object(type(made), "loss", spy):
        made.fit(rows, None, RUN)
    states.append(made.trained_state())
    steps = [
        {name.split(".")[0] for name, tensor in after.items() if not torch.equal(tensor, before[name])}
        for before, after in pairwise(states[1:])
    ]
    head, tokens = [{"head"}] * 4, [{"tokens"}] * 2  # two steps are an epoch
    assert steps == [*head, *tokens, *head, *tokens]


def test_while_tokens_are_fixed_keeping_embeddings_gives_what_embedding_again_gives(
    make_backbone: Any, make_split: Any
) -> None:
    rows = make_split([5, 3, 6, 4, 7, 2], molecule=True, task="multilabel")
    settings = {"task": "multilabel", "answer_epochs": 2, "prompt_epochs": 1, "lr": 0.01, "head_lr": 0.05}
    fast, plain = method(make_backbone("chem"), **settings), method(make_backbone("chem"), **settings)
    fast.fit(rows, None, RUN)
    with mock.patch.object(type(plain), "read", lambda self, split, config: split):
        plain.fit(rows, None, RUN)
    for name, tensor in plain.trained_state().items():
        torch.testing.assert_close(fast.trained_state()[name], tensor, rtol=1e-3, atol=1e-4)


def test_dropout_of_the_backbone_is_on_in_training_where_asked_for(make_backbone: Any, make_split: Any) -> None:
    rows = make_split([5, 3, 6, 4], molecule=True)
    graphs = rows.batch([0, 1])["graphs"]
    for asked in (False, True):
        made = method(make_backbone("chem", dropout=0.5), backbone_dropout=asked).train()
        assert torch.equal(made.embed(graphs), made.embed(graphs)) is not asked
        made.eval()
        assert torch.equal(made.embed(graphs), made.embed(graphs))
    with mock.patch.object(AllInOne, "read", side_effect=AssertionError("kept embeddings have one mask for all steps")):
        made.fit(rows, None, RUN)


def test_a_round_without_epochs_is_refused() -> None:
    with pytest.raises(ValueError, match="a round has no epochs"):
        AllInOneConfig(num_outputs=2, answer_epochs=0, prompt_epochs=0)
