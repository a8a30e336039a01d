"""Backbones: published weights load strictly, embeddings are those of a plain computation, prompts enter and leave."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch_geometric.data import Batch
from torch_geometric.nn import GAT, GCN, GIN
from torch_geometric.utils import coalesce, to_torch_coo_tensor, to_torch_csc_tensor, to_torch_csr_tensor

from pt_core import InputError, attach, off, route
from pt_graph.backbones import ChemConfig, ChemGNN, NodeGINConfig, PyGBackbone, dropping, load_backbone, save_backbone
from pt_graph.methods.gpf import GPFPlusPrompt, GPFPrompt
from pt_graph.methods.supt import HardPrompt, SoftPrompt


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def test_the_chem_gin_has_the_published_parameter_count() -> None:
    counts = [p.numel() for p in ChemGNN().gnns[0].parameters()]
    assert sum(p.numel() for p in ChemGNN().parameters()) == 1_857_900
    assert sum(counts) + 600 == 364_200


@pytest.mark.parametrize("name", ["gcn_contextpred", "gcn_supervised_contextpred", "graphsage_contextpred"])
def test_published_chem_weights_load_strictly(name: str, study_data: Path, make_split: Callable[..., Any]) -> None:
    config = ChemConfig(conv=name.split("_")[0])  # type: ignore[arg-type]
    backbone = load_backbone(study_data / "pretrain-gnns" / f"{name}.safetensors", config)
    graphs = make_split([5, 3], molecule=True).batch([0, 1])["graphs"]
    assert backbone(graphs).shape == (8, 300)
    assert not backbone.training


@pytest.mark.parametrize("name", ["gin_gppt_cora", "gin_gprompt_cora", "gin_gppt_citeseer", "gin_gprompt_citeseer"])
def test_published_node_weights_load_strictly(name: str, study_data: Path) -> None:
    backbone = load_backbone(study_data / "relief" / f"{name}.safetensors", NodeGINConfig())
    assert sum(p.numel() for p in backbone.parameters()) == 62_464


@pytest.mark.parametrize("conv", ["gin", "gcn", "graphsage", "gat"])
def test_a_chem_layer_is_a_loop_over_its_bonds(conv: str, make_backbone: Callable[..., Any], make_graph: Any) -> None:
    layer = make_backbone("chem", conv=conv).gnns[0]
    data = make_graph(5, 3, molecule=True)
    x = torch.randn(5, 12, generator=generator())
    bonds = [(int(a), int(b), *kind) for (a, b), kind in zip(data.edge_index.T, data.edge_attr.tolist(), strict=True)]
    bonds += [(v, v, 4, 0) for v in range(5)]
    edge = lambda kind, way: layer.edge_embedding1.weight[kind] + layer.edge_embedding2.weight[way]  # noqa: E731
    rows = []
    for v in range(5):
        into = [(a, edge(kind, way)) for a, b, kind, way in bonds if b == v]
        if conv == "gin":
            rows.append(layer.mlp(sum(x[a] + e for a, e in into)))
        elif conv == "gcn":
            leaving = lambda u: sum(a == u for a, *_ in bonds)  # noqa: E731
            rows.append(sum((layer.linear(x[a]) + e) / (leaving(a) * leaving(v)) ** 0.5 for a, e in into))
        elif conv == "graphsage":
            mean = sum(layer.linear(x[a]) + e for a, e in into) / len(into)
            rows.append(mean / mean.norm())
        else:
            heads = layer.weight_linear(x).view(5, 2, 12)

            def score(a: int, b: int, e: torch.Tensor, heads: torch.Tensor = heads) -> torch.Tensor:
                pair = torch.cat([heads[b], heads[a] + e.view(2, 12)], -1)
                return nn.functional.leaky_relu((pair * layer.att[0]).sum(-1), 0.2).exp()

            total = {u: sum(score(a, b, edge(k, w)) for a, b, k, w in bonds if a == u) for u in range(5)}
            weighted = [(heads[a] + e.view(2, 12)) * (score(a, v, e) / total[a])[:, None] for a, e in into]
            rows.append(sum(weighted).mean(0) + layer.bias)
    torch.testing.assert_close(layer(x, data.edge_index, data.edge_attr), torch.stack(rows), rtol=1e-5, atol=1e-6)


def test_graphs_of_a_batch_do_not_touch(make_backbone: Callable[..., Any], make_split: Callable[..., Any]) -> None:
    backbone, rows = make_backbone("chem"), make_split([5, 1, 4], molecule=True)
    together = backbone(rows.batch([0, 1, 2])["graphs"])
    alone = torch.cat([backbone(rows.batch([i])["graphs"]) for i in range(3)])
    torch.testing.assert_close(together, alone)


def test_a_saved_backbone_loads_bit_exactly(make_backbone: Callable[..., Any], tmp_path: Path) -> None:
    backbone = make_backbone("chem")
    loaded = load_backbone(save_backbone(backbone, tmp_path / "gin", card="# A card\n"))
    assert loaded.config == backbone.config
    assert all(
        torch.equal(a, b) for a, b in zip(backbone.state_dict().values(), loaded.state_dict().values(), strict=True)
    )


def test_wrong_sources_and_weights_are_refused(make_backbone: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such backbone"):
        load_backbone(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no config.json"):
        load_backbone(tmp_path / "empty")
    saved = save_backbone(make_backbone("chem"), tmp_path / "gin")
    with pytest.raises(InputError, match="the weights are not those of"):
        load_backbone(saved / "model.safetensors", ChemConfig(width=24, layers=2))


def test_broken_files_of_a_backbone_are_named(make_backbone: Callable[..., Any], tmp_path: Path) -> None:
    saved = save_backbone(make_backbone("chem"), tmp_path / "gin")
    weights, config = saved / "model.safetensors", saved / "config.json"
    whole = weights.read_bytes()
    for content in (b"garbage" * 20, whole[:-100]):
        weights.write_bytes(content)
        with pytest.raises(InputError, match=r"model\.safetensors: is not a whole safetensors file"):
            load_backbone(saved)
    weights.unlink()
    with pytest.raises(InputError, match=r"model\.safetensors: is not a whole safetensors file"):
        load_backbone(saved)
    torch.save({}, tmp_path / "gin.pth")
    with pytest.raises(InputError, match=r"gin\.pth: .*pickled objects, which are never loaded"):
        load_backbone(tmp_path / "gin.pth", ChemConfig())
    for text in ("{nope", "[1]", '{"kind": []}'):
        config.write_text(text)
        with pytest.raises(InputError, match=r"config\.json: is no configuration of a backbone"):
            load_backbone(saved)


def test_features_of_another_width_or_coding_are_refused(make_backbone: Callable[..., Any], make_split: Any) -> None:
    graphs = make_split([3]).batch([0])["graphs"]
    with pytest.raises(InputError, match="width 7, the graphs have"):
        make_backbone("node-gin", feature_width=7)(graphs)
    with pytest.raises(InputError, match="two whole numbers"):
        make_backbone("chem")(graphs)
    molecule = make_split([3], molecule=True).batch([0])["graphs"]
    molecule.x[0, 1] = 3
    with pytest.raises(InputError, match="outside of"):
        make_backbone("chem")(molecule)


@pytest.mark.parametrize("kind", ["node-gin", "chem"])
def test_a_prompt_shifts_the_features_and_leaves_no_trace(kind: str, make_backbone: Any, make_split: Any) -> None:
    backbone = make_backbone(kind)
    graphs = make_split([5, 3], molecule=kind == "chem").batch([0, 1])["graphs"]
    before = backbone(graphs)
    prompt = GPFPrompt(backbone.feature_width, generator())
    handle = attach(backbone, prompt)
    expected = backbone.encode(backbone.embed(graphs) + prompt.weight, graphs)
    assert torch.equal(backbone(graphs), expected)
    assert not torch.allclose(expected, before)
    with off(backbone):
        assert torch.equal(backbone(graphs), before)
    handle.remove()
    assert torch.equal(backbone(graphs), before)


def test_each_graph_of_a_batch_carries_its_own_prompt(make_backbone: Callable[..., Any], make_split: Any) -> None:
    backbone, rows = make_backbone(), make_split([5, 3, 4])
    graphs = rows.batch([0, 1, 2])["graphs"]
    width = backbone.feature_width
    a = attach(backbone, GPFPrompt(width, generator()), always=False)
    b = attach(backbone, GPFPlusPrompt(width, 3, generator()), always=False)
    alone = []
    for i, handle in enumerate([a, None, b]):
        with route(backbone, [handle]):
            alone.append(backbone(rows.batch([i])["graphs"]))
    with route(backbone, [a, None, b]):
        torch.testing.assert_close(backbone(graphs), torch.cat(alone))
    with route(backbone, [a, b]), pytest.raises(InputError, match="2 prompts for 3 graphs"):
        backbone(graphs)


def test_a_prompt_attaches_to_a_plain_pyg_model(make_split: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    model = GCN(6, 8, 2).eval()
    graphs = make_split([5, 3]).batch([0, 1])["graphs"]
    before = model(graphs.x, graphs.edge_index)
    prompt = GPFPrompt(6, generator())
    handle = attach(model, prompt)
    assert torch.equal(
        model(graphs.x, graphs.edge_index), GCN.forward(model, graphs.x + prompt.weight, graphs.edge_index)
    )
    handle.remove()
    assert torch.equal(model(graphs.x, graphs.edge_index), before)


@pytest.mark.parametrize("layout", ["coo", "csr", "csc"])
@pytest.mark.parametrize("make", [SoftPrompt, HardPrompt])
def test_the_edges_of_a_plain_model_may_be_a_sparse_matrix(
    make: Any, layout: str, make_split: Callable[..., Any]
) -> None:
    torch.manual_seed(0)
    model, graphs = GIN(6, 8, 2).eval(), make_split([5, 3]).batch([0, 1])["graphs"]
    edges = coalesce(graphs.edge_index[:, graphs.edge_index[0] < graphs.edge_index[1]])  # one way only
    source = {"coo": to_torch_coo_tensor, "csr": to_torch_csc_tensor, "csc": to_torch_csr_tensor}[layout]
    matrix = source(edges, size=(8, 8)).t()
    matrix = matrix.coalesce() if layout == "coo" else matrix  # PyG reads one that is not as if it were
    assert str(matrix.layout) == f"torch.sparse_{layout}"
    values, plain = matrix.values().clone() if layout != "coo" else matrix._values().clone(), model(graphs.x, matrix)
    torch.testing.assert_close(plain, model(graphs.x, edges))
    handle = attach(model, make(6, 2, 0.5, generator()) if make is HardPrompt else make(6, 2, generator()))
    expected = model(graphs.x, edges)
    assert (expected - plain).abs().max() > 1e-3
    torch.testing.assert_close(model(graphs.x, matrix), expected)
    handle.remove()
    assert torch.equal(matrix._values() if layout == "coo" else matrix.values(), values)


@pytest.mark.parametrize("given", ["by place", "by name", "among others"])
def test_the_batch_of_a_plain_model_is_found_however_it_is_given(given: str, make_split: Callable[..., Any]) -> None:
    class Placed(GCN):
        def forward(self, x: Any, edge_index: Any, batch: Any = None) -> Any:
            return super().forward(x, edge_index)

    class Among(GCN):
        def forward(self, x: Any, edge_index: Any, **others: Any) -> Any:
            return super().forward(x, edge_index)

    torch.manual_seed(0)
    model = (Among if given == "among others" else Placed)(6, 8, 2).eval()
    rows = make_split([5, 3, 4])
    graphs = rows.batch([0, 1, 2])["graphs"]
    attach(model, HardPrompt(6, 2, 0.5, generator()))  # chooses nodes of each graph
    alone = torch.cat([model(g.x, g.edge_index) for g in graphs.to_data_list()])
    if given == "by place":
        together = model(graphs.x, graphs.edge_index, graphs.batch)
    else:
        together = model(graphs.x, graphs.edge_index, batch=graphs.batch)
    torch.testing.assert_close(together, alone)


def test_the_adapter_runs_a_users_module_and_refuses_one_that_pools(make_split: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    model = GAT(6, 8, 2, heads=2).eval()
    graphs = make_split([5, 3]).batch([0, 1])["graphs"]
    backbone = PyGBackbone(model, feature_width=6, width=8, hops=2).eval()
    assert torch.equal(backbone(graphs), model(graphs.x, graphs.edge_index))
    assert backbone.readout(backbone(graphs), graphs).shape == (2, 8)
    with pytest.raises(InputError, match="were expected"):
        PyGBackbone(model, feature_width=6, width=9, hops=2)(graphs)


def test_dropout_is_active_only_where_asked_for(make_backbone: Callable[..., Any], make_split: Any) -> None:
    backbone = make_backbone("chem")
    graphs = make_split([5, 3], molecule=True).batch([0, 1])["graphs"]
    statistics = backbone.batch_norms[0].running_mean.clone()
    quiet = backbone(graphs)
    with dropping(backbone):
        assert not torch.equal(backbone(graphs), backbone(graphs))
    assert torch.equal(backbone(graphs), quiet)
    assert torch.equal(backbone.batch_norms[0].running_mean, statistics)


def test_a_graph_without_edges_passes(make_backbone: Callable[..., Any], make_graph: Any) -> None:
    for kind in ("node-gin", "chem"):
        backbone = make_backbone(kind)
        graphs = Batch.from_data_list([make_graph(1, 0, kind == "chem"), make_graph(1, 1, kind == "chem")])
        assert bool(backbone(graphs).isfinite().all())
