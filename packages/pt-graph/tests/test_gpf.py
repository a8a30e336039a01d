"""GPF and GPF-plus: counts, identities with the frozen model and with each other, and shifts that can be worked out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.data import Batch, Data

from pt_graph import GPF, ChemGNN, GPFConfig, GPFPlus, GPFPlusConfig, PyGBackbone
from pt_graph.methods.gpf import GPFPlusPrompt, GPFPrompt


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def method(backbone: Any, cls: Any = GPF, config: Any = GPFConfig, **settings: Any) -> Any:
    return cls(backbone, config(num_outputs=2, task="multiclass", **settings)).eval()


def test_gpf_trains_300_values_on_the_chem_gin_and_gpf_plus_6010() -> None:
    backbone = ChemGNN()
    assert method(backbone).prompt.count() == 300
    assert method(backbone, GPFPlus, GPFPlusConfig, basis_size=10).prompt.count() == 6_010


@pytest.mark.parametrize("kind", ["node-gin", "chem"])
def test_a_prompt_of_zeros_is_the_frozen_model(kind: str, make_backbone: Callable[..., Any], make_split: Any) -> None:
    backbone, graphs = make_backbone(kind), make_split([5, 3], molecule=kind == "chem").batch([0, 1])["graphs"]
    frozen = backbone(graphs)
    for made in (method(backbone), method(backbone, GPFPlus, GPFPlusConfig)):
        assert not torch.allclose(made.nodes(graphs), frozen)
        for name, parameter in made.prompt.named_parameters():
            if name in ("weight", "basis"):
                nn.init.zeros_(parameter)
        assert torch.equal(made.nodes(graphs), frozen)


def test_gpf_plus_of_one_vector_is_gpf() -> None:
    x = torch.randn(4, 6)
    plus, plain = GPFPlusPrompt(6, 1, generator()), GPFPrompt(6, generator())
    plain.weight.data = plus.basis.data
    assert torch.equal(plus.features(x, None), plain.features(x, None))


def test_gpf_plus_of_equal_vectors_is_gpf() -> None:
    x = torch.randn(4, 6)
    plus, plain = GPFPlusPrompt(6, 5, generator()), GPFPrompt(6, generator())
    plus.basis.data = plain.weight.data.repeat(5, 1)
    torch.testing.assert_close(plus.features(x, None), plain.features(x, None))


def test_gpf_plus_gives_each_node_its_own_mixture() -> None:
    x, plus = torch.randn(3, 6), GPFPlusPrompt(6, 4, generator())
    for before, after in zip(x, plus.features(x, None), strict=True):
        scores = (plus.scorer.weight @ before + plus.scorer.bias).exp()
        mixed = sum(score / scores.sum() * row for score, row in zip(scores, plus.basis, strict=True))
        torch.testing.assert_close(after, before + mixed)


class SumOfNeighbours(nn.Module):
    """One layer: h_v = (x_v + sum of neighbours' x) W."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8, generator=generator()))

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return x.index_add(0, edge_index[1], x[edge_index[0]]) @ self.weight


def test_on_a_path_of_three_nodes_gpf_shifts_sums_by_2pW_3pW_and_2pW() -> None:
    backbone = PyGBackbone(SumOfNeighbours(), feature_width=6, width=8, hops=1)
    edges = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    graphs = Batch.from_data_list([Data(x=torch.randn(3, 6), edge_index=edges)])
    made = method(backbone)
    shift = made.prompt.weight @ backbone.module.weight
    torch.testing.assert_close(made.nodes(graphs) - backbone(graphs), torch.tensor([[2.0], [3.0], [2.0]]) * shift)


def test_on_molecules_gpf_is_a_shift_of_the_atom_table(make_backbone: Callable[..., Any], make_split: Any) -> None:
    backbone, graphs = make_backbone("chem"), make_split([5, 3], molecule=True).batch([0, 1])["graphs"]
    made = method(backbone)
    prompted = made.nodes(graphs)
    backbone.x_embedding1.weight.data += made.prompt.weight.detach()
    torch.testing.assert_close(backbone(graphs), prompted)


def test_starts_are_those_of_the_released_code() -> None:
    plain, plus = GPFPrompt(500, generator()), GPFPlusPrompt(400, 100, generator())
    for values, bound in (
        (plain.weight, (6 / 501) ** 0.5),
        (plus.basis, (6 / 500) ** 0.5),
        (plus.scorer.weight, 400**-0.5),
        (plus.scorer.bias, 400**-0.5),
    ):
        assert 0.95 * bound < values.abs().max() <= bound
        assert values.mean().abs() < 0.2 * bound


def test_dropout_of_the_backbone_is_on_in_training_if_asked_for(make_backbone: Any, make_split: Any) -> None:
    graphs = make_split([5, 3], molecule=True).batch([0, 1])["graphs"]
    made = method(make_backbone("chem"), backbone_dropout=True)
    assert torch.equal(made.nodes(graphs), made.nodes(graphs))
    made.train()
    assert not torch.equal(made.nodes(graphs), made.nodes(graphs))
