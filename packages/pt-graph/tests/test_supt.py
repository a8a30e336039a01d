"""SUPT: counts, identities with GPF and the frozen model, the choice of nodes, and the formula node by node."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.data import Batch

from pt_graph import GPF, ChemGNN, GPFConfig, SUPTConfig, SUPTHard, SUPTHardConfig, SUPTSoft
from pt_graph.methods.supt import HardPrompt, SoftPrompt, best


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def graphs(make_graph: Callable[..., Any], sizes: tuple[int, ...] = (5, 1, 4)) -> Any:
    return Batch.from_data_list([make_graph(n, i) for i, n in enumerate(sizes)])


def test_soft_trains_6010_values_on_the_chem_gin_and_hard_3005() -> None:
    backbone = ChemGNN()
    assert SUPTSoft(backbone, SUPTConfig(num_outputs=2)).prompt.count() == 6_010 == 2 * 10 * 300 + 10
    assert SUPTHard(backbone, SUPTHardConfig(num_outputs=2)).prompt.count() == 3_005 == 2 * 5 * 300 + 5


@pytest.mark.parametrize(("cls", "config"), [(SUPTSoft, SUPTConfig), (SUPTHard, SUPTHardConfig)])
def test_a_basis_of_zeros_is_the_frozen_model(cls: Any, config: Any, make_backbone: Any, make_split: Any) -> None:
    backbone, batch = make_backbone("chem"), make_split([5, 3], molecule=True).batch([0, 1])["graphs"]
    made = cls(backbone, config(num_outputs=2)).eval()
    assert not torch.allclose(made.nodes(batch), backbone(batch))
    nn.init.zeros_(made.prompt.basis)
    assert torch.equal(made.nodes(batch), backbone(batch))


def test_soft_of_one_vector_or_of_equal_ones_is_gpf(make_backbone: Callable[..., Any], make_graph: Any) -> None:
    backbone, batch = make_backbone(), graphs(make_graph)
    plain = GPF(backbone, GPFConfig(num_outputs=2)).eval()
    for size in (1, 4):
        soft = SUPTSoft(backbone, SUPTConfig(num_outputs=2, basis_size=size)).eval()
        soft.prompt.basis.data = plain.prompt.weight.data.repeat(size, 1)
        torch.testing.assert_close(soft.nodes(batch), plain.nodes(batch))


def scores(prompt: Any, batch: Any) -> Tensor:
    """Graph convolution of X + sum of the basis, node by node: neighbours and the node, by 1 / sqrt of degrees."""
    x = (batch.x + prompt.basis.sum(0)) @ prompt.scorer.lin.weight.T
    pairs = [*batch.edge_index.T.tolist(), *([v, v] for v in range(len(x)))]
    degree = [sum(b == v for _, b in pairs) for v in range(len(x))]
    into = [[x[a] / (degree[a] * degree[v]) ** 0.5 for a, b in pairs if b == v] for v in range(len(x))]
    return torch.stack([sum(rows) for rows in into]) + prompt.scorer.bias


def test_soft_mixes_by_a_softmax_over_the_basis(make_graph: Callable[..., Any]) -> None:
    prompt, batch = SoftPrompt(6, 3, generator()), graphs(make_graph)
    prompt.scorer.bias.data = torch.tensor([0.3, -0.2, 0.1])
    expected = batch.x + scores(prompt, batch).softmax(1) @ prompt.basis
    torch.testing.assert_close(prompt.features(batch.x, batch), expected)


@pytest.mark.parametrize("ratio", [0.3, 0.5, 1.0])
def test_hard_adds_what_chose_a_node_over_one_more_than_their_number(ratio: float, make_graph: Any) -> None:
    prompt, batch = HardPrompt(6, 3, ratio, generator()), graphs(make_graph)
    level = scores(prompt, batch).tanh()
    chosen: list[list[int]] = [[] for _ in batch.x]
    for number in range(3):
        nodes = (batch.batch == number).nonzero()[:, 0].tolist()
        for b in range(3):
            for v in sorted(nodes, key=lambda v: -float(level[v, b].detach()))[: ceil(ratio * len(nodes))]:
                chosen[v].append(b)
    shifts = [
        sum((level[v, b] * prompt.basis[b] for b in of), torch.zeros(6)) / (1 + len(of)) for v, of in enumerate(chosen)
    ]
    torch.testing.assert_close(prompt.features(batch.x, batch), batch.x + torch.stack(shifts))


@pytest.mark.parametrize(
    ("nodes", "ratio", "count"), [(1, 0.1, 1), (5, 0.2, 1), (5, 0.21, 2), (10, 0.7, 7), (3, 1.0, 3)]
)
def test_a_basis_chooses_ceil_of_ratio_times_n_nodes(nodes: int, ratio: float, count: int) -> None:
    assert best(torch.randn(nodes, 2), torch.zeros(nodes).long(), ratio).sum(0).tolist() == [count, count]


def test_of_equal_scores_the_first_nodes_are_chosen_whatever_else_is_in_the_batch() -> None:
    batch = torch.tensor([0, 0, 1, 1, 1, 1])
    chosen = best(torch.tensor([[9.0], [8.0], [1.0], [2.0], [2.0], [2.0]]), batch, 0.5)
    assert chosen[:, 0].tolist() == [True, False, False, True, True, False]


def test_a_ratio_above_one_is_refused() -> None:
    with pytest.raises(ValueError, match="less than or equal to 1"):
        SUPTHardConfig(num_outputs=2, ratio=1.5)


def test_gradients_reach_basis_and_scorer(make_graph: Callable[..., Any]) -> None:
    for prompt in (SoftPrompt(6, 3, generator()), HardPrompt(6, 3, 0.5, generator())):
        batch = graphs(make_graph)
        prompt.features(batch.x, batch).square().sum().backward()
        assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in prompt.parameters())
