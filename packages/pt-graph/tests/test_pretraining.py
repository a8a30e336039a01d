"""Pre-training: what each objective hides, pairs and contrasts, and that a run trains the backbone and can be resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.data import Batch, Data
from torch_geometric.nn import GCN

from pt_core import FitConfig, InputError
from pt_graph.backbones import PyGBackbone, load_backbone, save_backbone
from pt_graph.pretraining import (
    OBJECTIVES,
    AttributeMaskingConfig,
    ContextPredictionConfig,
    DescriptorsConfig,
    EdgePredictionConfig,
    GraphCLConfig,
    PretrainingConfig,
    pretrain,
)
from pt_graph.pretraining.base import distances, draw_unlinked, induced, links, rank_within, tell_apart
from pt_graph.pretraining.graph_prompt import edge_contrast
from pt_graph.pretraining.graphcl import info_nce

Make = Callable[..., Any]
LN2 = 0.6931472


def path(nodes: int, molecule: bool = True) -> Data:
    one_way = torch.stack([torch.arange(nodes - 1), torch.arange(1, nodes)])
    edges = torch.stack([one_way, one_way.flip(0)], -1).reshape(2, -1)
    if not molecule:
        return Data(x=torch.eye(nodes, 6), edge_index=edges)
    atoms = torch.stack([torch.arange(nodes) % 20, torch.zeros(nodes, dtype=torch.long)], 1)
    bonds = torch.stack([torch.arange(nodes - 1) % 4, torch.zeros(nodes - 1, dtype=torch.long)], 1)
    return Data(x=atoms, edge_index=edges, edge_attr=bonds.repeat_interleave(2, 0))


def batch(*graphs: Data) -> Any:
    return Batch.from_data_list(list(graphs))


class Given(nn.Module):
    """A backbone's module whose node embeddings are what the test says: its features."""

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return x


def given(width: int) -> PyGBackbone:
    backbone = PyGBackbone(Given(), feature_width=width, width=width, hops=1)
    backbone.register_parameter("unused", nn.Parameter(torch.zeros(())))
    return backbone


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def molecules(make_graph: Make) -> list[Data]:
    graphs = [make_graph(8 + i % 9, i, molecule=True) for i in range(24)]
    for graph in graphs:  # what can be learned: the share of each of five atom types
        graph.descriptors = torch.stack([(graph.x[:, 0] == t).float().mean() for t in range(5)])[None] * 10
    return graphs


def named(name: str) -> str | PretrainingConfig:
    if name == "descriptors":
        return DescriptorsConfig(num_targets=5)
    return ContextPredictionConfig(neighbourhood=2) if name == "context-prediction" else name


# --- the run ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_objective_falls_within_a_few_steps(name: str, make_backbone: Make, molecules: list[Data]) -> None:
    backbone = make_backbone("chem", width=16)
    before = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    config = FitConfig(max_steps=30, batch_size=24, lr=1e-2, optimiser="adam", log_every=5, progress=False)
    losses = [row["loss"] for row in pretrain(backbone, molecules, named(name), config).history]
    assert losses[-1] < losses[0] - 0.1 * abs(losses[0])
    assert not backbone.training
    still = {key for key, tensor in backbone.state_dict().items() if torch.equal(tensor, before[key])}
    assert not {key for key in still if "embedding" in key or "running" in key or "mlp" in key}


@pytest.mark.parametrize("name", ["edge-prediction", "infomax", "graphcl", "graph-prompt", "gppt"])
def test_the_objective_falls_on_one_set_of_feature_graphs(name: str, make_backbone: Make, make_graph: Make) -> None:
    backbone, graphs = make_backbone(width=16), [make_graph(20 + i, i) for i in range(8)]
    config = FitConfig(max_steps=60, batch_size=8, lr=1e-2, optimiser="adam", log_every=10, progress=False)
    losses = [row["loss"] for row in pretrain(backbone, graphs, name, config).history]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["attribute-masking", "graphcl"])
def test_a_killed_run_goes_on_to_the_same_backbone(
    name: str, make_backbone: Make, molecules: list[Data], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = FitConfig(max_steps=6, batch_size=8, lr=1e-2, checkpoint_every=2, progress=False)
    whole, cut, other = (make_backbone("chem", seed) for seed in (0, 0, 1))
    pretrain(whole, molecules, name, config, tmp_path / "whole")
    value = OBJECTIVES[name].value
    calls = iter(range(100))

    def fails(self: Any, graphs: Any) -> Tensor:
        if next(calls) == 4:
            raise KeyboardInterrupt
        return value(self, graphs)

    monkeypatch.setattr(OBJECTIVES[name], "value", fails)
    with pytest.raises(KeyboardInterrupt):
        pretrain(cut, molecules, name, config, tmp_path / "cut")
    monkeypatch.setattr(OBJECTIVES[name], "value", value)
    pretrain(other, molecules, name, config, tmp_path / "cut")  # its start values do not matter: the checkpoint has all
    for key, tensor in whole.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key])


def test_batch_norm_learns_and_dropout_is_off_unless_asked_for(make_backbone: Make, molecules: list[Data]) -> None:
    backbone = make_backbone("chem", dropout=0.5)
    method = OBJECTIVES["attribute-masking"](backbone).train()
    assert all(norm.training for norm in backbone.batch_norms)
    assert not backbone.dropout.training
    assert (
        OBJECTIVES["attribute-masking"](backbone, AttributeMaskingConfig(backbone_dropout=True))
        .train()
        .backbone.dropout.training
    )
    assert {name.split(".")[0] for name, _ in method.trainable()} == {"backbone", "atoms"}


def test_a_pre_trained_backbone_is_saved_and_loaded_like_any(
    make_backbone: Make, molecules: list[Data], tmp_path: Path
) -> None:
    backbone = make_backbone("chem")
    pretrain(backbone, molecules, "infomax", FitConfig(max_steps=2, progress=False))
    graphs = batch(*molecules[:3])
    assert torch.equal(load_backbone(save_backbone(backbone, tmp_path / "gin"))(graphs), backbone(graphs))


def test_a_last_batch_of_one_graph_has_nothing_to_tell_apart(make_backbone: Make, molecules: list[Data]) -> None:
    result = pretrain(
        make_backbone("chem"), molecules[:9], "infomax", FitConfig(epochs=1, batch_size=4, log_every=1, progress=False)
    )
    assert [row["loss"] > 0 for row in result.history] == [True, True, False]


@pytest.mark.parametrize("name", [name for name, objective in OBJECTIVES.items() if not objective.contrasts])
def test_a_batch_of_one_atom_teaches_nothing(name: str, make_backbone: Make, molecules: list[Data]) -> None:
    atom = path(1)
    atom.descriptors = torch.zeros(1, 5)
    config = FitConfig(epochs=2, batch_size=1, progress=False)
    assert pretrain(make_backbone("chem"), [*molecules[:2], atom], named(name), config).steps == 6


@pytest.mark.parametrize("name", ["edge-prediction", "graph-prompt", "gppt"])
def test_a_batch_without_linked_or_unlinked_pairs_teaches_nothing(name: str, make_backbone: Make) -> None:
    backbone, config = make_backbone("chem"), FitConfig(max_steps=6, batch_size=2, progress=False)
    graphs = [path(5), path(2), path(2), path(1), path(1)]  # a bond has no unlinked pair, an atom no pair at all
    assert pretrain(backbone, graphs, name, config).steps == 6
    assert all(bool(tensor.isfinite().all()) for tensor in backbone.state_dict().values())
    with pytest.raises(InputError, match="no graph has both linked and unlinked nodes"):
        pretrain(backbone, graphs[1:], name, config)


def test_the_look_at_the_graphs_before_the_first_step_leaves_the_statistics(
    make_backbone: Make, molecules: list[Data]
) -> None:
    backbone = make_backbone("chem").train()
    pretrain(backbone, molecules, "edge-prediction", FitConfig(max_steps=2, batch_size=4, progress=False))
    assert [int(norm.num_batches_tracked) for norm in backbone.batch_norms] == [2, 2]


def test_a_validation_part_picks_the_best_step(make_backbone: Make, molecules: list[Data]) -> None:
    config = FitConfig(max_steps=6, batch_size=8, evaluate_every=2, progress=False)
    result = pretrain(make_backbone("chem"), molecules[:16], "edge-prediction", config, validation=molecules[16:])
    found = [row["validation/loss"] for row in result.history if "validation/loss" in row]
    assert len(found) == 3
    assert result.metrics["loss"] == min(found)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("masking", "there is no objective 'masking'"),
        ("descriptors", "settings without a default"),
        (DescriptorsConfig(num_targets=7), r"row 1.*descriptors \[1, 5\], \[1, 7\] were expected"),
        (ContextPredictionConfig(neighbourhood=2, inner=2), "they share no node"),
        (ContextPredictionConfig(neighbourhood=30), "0 of 24 graphs have nodes 30 hops apart"),
        (PretrainingConfig(), "is no configuration of an objective"),
    ],
)
def test_what_cannot_be_computed_is_refused_before_training(
    objective: Any, message: str, make_backbone: Make, molecules: list[Data]
) -> None:
    config = FitConfig(max_steps=1, progress=False)
    with pytest.raises(InputError, match=message):
        pretrain(make_backbone("chem"), molecules, objective, config)


def test_wrong_backbones_and_batches_are_refused(make_backbone: Make, make_graph: Make, molecules: list[Data]) -> None:
    once = FitConfig(max_steps=1, batch_size=1, progress=False)
    with pytest.raises(InputError, match="tells the graphs of a batch apart"):
        pretrain(make_backbone("chem"), molecules, "graphcl", once)
    with pytest.raises(InputError, match="wants a ChemGNN, not a NodeGIN"):
        pretrain(make_backbone(), [make_graph(5, 0)], "attribute-masking", once)
    with pytest.raises(InputError, match="the graphs have"):
        pretrain(make_backbone(), molecules, "edge-prediction", once)
    with pytest.raises(InputError, match="cannot be made again with fewer layers"):
        pretrain(PyGBackbone(GCN(6, 8, 2), 6, 8, 2), [make_graph(5, 0)], "context-prediction", once)
    with pytest.raises(InputError, match="wants a GraphBackbone"):
        pretrain(GCN(6, 8, 2), [make_graph(5, 0)], "edge-prediction", once)  # type: ignore[arg-type]


# --- pairs and parts --------------------------------------------------------------------------------------------------
def test_links_are_counted_once_whatever_their_directions() -> None:
    graphs = batch(Data(x=torch.zeros(4, 1), edge_index=torch.tensor([[0, 1, 2, 3, 3], [1, 0, 3, 2, 3]])))
    pairs, of_edge = links(graphs)
    assert pairs.T.tolist() == [[0, 1], [2, 3]]
    assert of_edge.tolist() == [0, 0, 1, 1, -1]


def test_unlinked_pairs_are_of_one_graph_and_neither_linked_nor_one_node(make_graph: Make) -> None:
    graphs = batch(
        *(make_graph(6, i) for i in range(5)), Data(x=torch.zeros(2, 6), edge_index=torch.tensor([[0], [1]]))
    )
    of = torch.arange(6).repeat(50)
    (a, b), found = draw_unlinked(graphs, of)
    assert found.tolist() == [g < 5 for g in of.tolist()]  # two linked nodes have no unlinked pair
    a, b, of = a[found], b[found], of[found]
    assert torch.equal(graphs.batch[a], of)
    assert torch.equal(graphs.batch[b], of)
    linked = set(map(tuple, graphs.edge_index.T.tolist()))
    assert not {
        (u, v) for u, v in zip(a.tolist(), b.tolist(), strict=True) if u == v or (u, v) in linked or (v, u) in linked
    }
    missing = {
        (u, v) for g in range(5) for u in range(6 * g, 6 * g + 6) for v in range(6 * g, 6 * g + 6) if u != v
    } - linked
    assert set(zip(a.tolist(), b.tolist(), strict=True)) > set(list(missing)[:1])
    assert len(set(zip(a.tolist(), b.tolist(), strict=True))) > 0.8 * len(missing)


def test_distances_ranks_and_induced_graphs_are_those_of_each_graph() -> None:
    graphs = batch(path(4), path(3))
    assert distances(graphs, torch.tensor([1, 6])).tolist() == [1, 0, 1, 2, 2, 1, 0]
    assert distances(graphs, torch.tensor([0]), limit=2).tolist() == [0, 1, 2, 7, 7, 7, 7]
    keys = torch.tensor([0.3, 0.1, 0.2, 0.0, 5.0, 4.0, 6.0])
    assert rank_within(keys, graphs.batch, 2).tolist() == [3, 1, 2, 0, 1, 0, 2]
    kept, number = induced(graphs, torch.tensor([True, True, False, True, False, True, True]))
    assert kept.edge_index.tolist() == [[0, 1, 3, 4], [1, 0, 4, 3]]
    assert kept.ptr.tolist() == [0, 3, 5]
    assert kept.num_graphs == 2
    assert number[[0, 1, 3, 5, 6]].tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(kept.edge_attr, graphs.edge_attr[[0, 1, 8, 9]])


# --- the objectives ---------------------------------------------------------------------------------------------------
def test_edge_prediction_is_the_cross_entropy_of_dot_products() -> None:
    graph = Data(x=torch.tensor([[1.0, 0], [2, 0], [0, 3.0]]), edge_index=torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]))
    method = OBJECTIVES["edge-prediction"](given(2))  # links 0-1 (2) and 1-2 (0); the only unlinked pair is 0-2 (0)
    linked, unlinked = method.scores(batch(graph))
    assert sorted(linked.tolist()) == [0, 2]
    assert unlinked.tolist() == [0, 0]  # one for each link
    wanted = F.softplus(torch.tensor([-2.0, 0])).mean() + LN2
    torch.testing.assert_close(method.value(batch(graph)), wanted)
    both = F.softplus(torch.tensor([-2.0, 0, 0, 0])).mean()
    torch.testing.assert_close(OBJECTIVES["gppt"](given(2)).value(batch(graph)), both)


def test_a_step_on_one_large_graph_scores_as_many_links_as_it_is_told(make_graph: Make) -> None:
    method = OBJECTIVES["edge-prediction"](given(6), EdgePredictionConfig(links_per_step=7))
    linked, unlinked = method.scores(batch(make_graph(40, 0)))
    assert len(linked) == len(unlinked) == 7


def test_the_edge_contrast_of_cosines_one_and_zero_is_the_published_number() -> None:
    v, b = torch.tensor([[2.0, 0]]), torch.tensor([[0, 5.0]])
    assert edge_contrast(v, 3 * v, b, 0.2).item() == pytest.approx(0.00671535, abs=1e-7)


def test_the_edge_contrast_compares_sums_over_neighbourhoods() -> None:
    graph = path(4, molecule=False)  # 0-1-2-3; other nodes: 0 has 2, 3; 1 has 3; 2 has 0; 3 has 0, 1
    sums = torch.stack(
        [graph.x[[0, 1]].sum(0), graph.x[[0, 1, 2]].sum(0), graph.x[[1, 2, 3]].sum(0), graph.x[[2, 3]].sum(0)]
    )
    cos = F.cosine_similarity(sums[:, None], sums[None], dim=-1)
    terms = {
        (v, a, b): F.softplus((cos[v, b] - cos[v, a]) / 0.2)
        for v, a, b in [(0, 1, 2), (0, 1, 3), (1, 0, 3), (1, 2, 3), (2, 1, 0), (2, 3, 0), (3, 2, 0), (3, 2, 1)]
    }
    method = OBJECTIVES["graph-prompt"](given(6))
    fixed = sum(terms[key] for key in [(1, 0, 3), (1, 2, 3), (2, 1, 0), (2, 3, 0)])
    possible = [(fixed + terms[0, 1, b] + terms[3, 2, c]) / 6 for b in (2, 3) for c in (0, 1)]
    found = [method.value(batch(graph)) for _ in range(12)]
    assert all(min(abs(float(value - p)) for p in possible) < 1e-6 for value in found)
    assert len({round(float(value), 5) for value in found}) > 1


@pytest.mark.parametrize(("atoms", "masked"), [(1, 1), (6, 1), (7, 2), (13, 2), (14, 3), (20, 4)])
def test_of_n_atoms_int_of_15_percent_plus_one_are_masked(atoms: int, masked: int, make_backbone: Make) -> None:
    assert masked == int(0.15 * atoms + 1)
    method = OBJECTIVES["attribute-masking"](make_backbone("chem"))
    graphs = batch(path(atoms), path(9)) if atoms > 1 else batch(path(2), path(9))
    made, chosen = method.mask(graphs)
    assert chosen[graphs.batch == 0].sum() == (masked if atoms > 1 else int(0.15 * 2 + 1))
    assert made.x[chosen].tolist() == [[119, 0]] * int(chosen.sum())
    assert torch.equal(made.x[~chosen], graphs.x[~chosen])
    assert not torch.equal(chosen, method.mask(graphs)[1]) or not torch.equal(chosen, method.mask(graphs)[1])


def test_masked_atoms_are_predicted_and_others_are_not(make_backbone: Make) -> None:
    method = OBJECTIVES["attribute-masking"](make_backbone("chem"))
    assert method.atoms.out_features == 119
    with torch.no_grad():
        method.atoms.weight.zero_()
        method.atoms.bias.zero_()
    assert method.value(batch(path(8), path(5))).item() == pytest.approx(torch.tensor(119.0).log().item(), rel=1e-6)


def test_bonds_of_masked_atoms_are_masked_and_predicted(make_backbone: Make) -> None:
    method = OBJECTIVES["attribute-masking"](make_backbone("chem"), AttributeMaskingConfig(bonds=True))
    graphs = batch(path(9), path(7))
    made, chosen = method.mask(graphs)
    touched = chosen[graphs.edge_index].any(0)
    assert made.edge_attr[touched].tolist() == [[5, 0]] * int(touched.sum())
    assert torch.equal(made.edge_attr[~touched], graphs.edge_attr[~touched])
    with torch.no_grad():
        for head in (method.atoms, method.bonds):
            head.weight.zero_()
            head.bias.zero_()
    assert method.value(graphs).item() == pytest.approx(torch.tensor(119.0 * 4).log().item(), rel=1e-6)


def test_the_mask_token_is_refused_as_an_atom(make_backbone: Make) -> None:
    graph = path(3)
    graph.x[1, 0] = 119
    with pytest.raises(InputError, match="atom type 119 is the mask's"):
        pretrain(make_backbone("chem"), [graph], "attribute-masking", FitConfig(max_steps=1, progress=False))


def test_the_context_is_the_ring_from_4_to_7_hops_and_the_overlap_is_at_hop_5(make_backbone: Make) -> None:
    method = OBJECTIVES["context-prediction"](make_backbone("chem", layers=5))
    assert (method.k, method.l1, method.l2) == (5, 4, 7)
    assert method.context.config.layers == 3
    near, ring, both = method.rings(batch(path(12), path(5)), torch.tensor([0, 12]))
    assert near.nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 5]  # the path of 5 has no ring and is left out
    assert ring.nonzero()[:, 0].tolist() == [5, 6, 7]
    assert both.nonzero()[:, 0].tolist() == [5]


def test_context_prediction_is_a_plain_computation_on_subgraphs(
    make_backbone: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = OBJECTIVES["context-prediction"](make_backbone("chem"), ContextPredictionConfig(neighbourhood=2, width=2))
    method.eval()
    graphs, roots = [path(7), path(5), path(2)], [3, 0, 0]
    drawn = torch.tensor([3, 7, 12])
    monkeypatch.setattr("pt_graph.pretraining.context_prediction.draw_nodes", lambda *_: drawn)
    centres, contexts = [], []
    for graph, root in list(zip(graphs, roots, strict=True))[:2]:  # the path of 2 reaches no ring beyond 1 hop
        hops = (torch.arange(graph.num_nodes) - root).abs()
        near, ring = hops <= 2, (hops > 1) & (hops <= 3)
        part, number = induced(batch(graph), near)
        centres.append(method.backbone(part)[number[root]])
        around, place = induced(batch(graph), ring)
        contexts.append(method.context(around)[place[near & ring]].mean(0))
    h, c = torch.stack(centres), torch.stack(contexts)
    wanted = tell_apart((h * c).sum(1), (h * c[[1, 0]]).sum(1))
    torch.testing.assert_close(method.value(batch(*graphs)), wanted)


def test_infomax_scores_nodes_with_their_own_and_the_next_summary(make_graph: Make) -> None:
    method = OBJECTIVES["infomax"](given(6))
    assert method.weight.abs().max() <= 6**-0.5
    graphs = [make_graph(n, n) for n in (3, 5, 4)]
    summary = torch.stack([g.x.mean(0).sigmoid() for g in graphs])
    score = lambda g, s: graphs[g].x @ method.weight.T @ summary[s]  # noqa: E731
    own = torch.cat([score(g, g) for g in range(3)])
    other = torch.cat([score(g, (g + 1) % 3) for g in range(3)])
    wanted = F.binary_cross_entropy_with_logits(own, torch.ones(12)) + F.binary_cross_entropy_with_logits(
        other, torch.zeros(12)
    )
    torch.testing.assert_close(method.value(batch(*graphs)), wanted)


def test_info_nce_leaves_the_positive_pair_out_of_the_denominator() -> None:
    same = torch.eye(3)  # cosines: 1 with itself, 0 with two others
    assert info_nce(2 * same, 5 * same, 0.1).item() == pytest.approx(-10 + torch.tensor(2.0).log().item(), rel=1e-6)


@pytest.mark.parametrize("kind", ["node-drop", "subgraph"])
def test_views_lose_a_fifth_of_their_nodes(kind: Any, make_backbone: Make, make_graph: Make) -> None:
    method = OBJECTIVES["graphcl"](make_backbone("chem"), GraphCLConfig(augmentations=(kind,)))
    graphs = batch(*(make_graph(n, n, molecule=True) for n in (4, 10, 13)))
    view = method.augment(graphs)
    assert (view.ptr[1:] - view.ptr[:-1]).tolist() == [4, 8, 11]
    assert view.num_graphs == 3
    if kind == "subgraph":
        for part in view.ptr[:-1].tolist():
            reached = distances(view, torch.tensor([part])) < view.num_nodes
            assert torch.equal(reached, view.batch == view.batch[part])  # connected


def test_views_have_a_fifth_of_their_links_moved(make_backbone: Make, make_graph: Make) -> None:
    method = OBJECTIVES["graphcl"](make_backbone("chem"), GraphCLConfig(augmentations=("edge-perturbation",)))
    graphs = batch(*(make_graph(n, n, molecule=True) for n in (10, 13)))
    view = method.augment(graphs)
    old, new = (set(map(tuple, links(g)[0].T.tolist())) for g in (graphs, view))
    moved = sum(int(0.2 * m) for m in torch.bincount(graphs.batch[links(graphs)[0][0]]).tolist())
    assert moved > 0
    assert len(old - new) == len(new - old) == moved
    assert sorted(view.edge_attr.tolist()) == sorted(graphs.edge_attr.tolist())
    kept = {(*e, *k) for e, k in zip(graphs.edge_index.T.tolist(), graphs.edge_attr.tolist(), strict=True)}
    still = [(*e, *k) for e, k in zip(view.edge_index.T.tolist(), view.edge_attr.tolist(), strict=True)]
    assert sum(row in kept for row in still) == len(still) - 2 * moved  # the others keep their bonds


def test_views_have_a_fifth_of_their_nodes_masked(make_backbone: Make, make_graph: Make) -> None:
    settings = GraphCLConfig(augmentations=("attribute-masking",))
    graphs = batch(*(make_graph(n, n, molecule=True) for n in (10, 13)))
    view = OBJECTIVES["graphcl"](make_backbone("chem"), settings).augment(graphs)
    assert [int((view.x[view.batch == g, 0] == 119).sum()) for g in (0, 1)] == [2, 2]
    features = batch(*(make_graph(n, n) for n in (10, 13)))
    view = OBJECTIVES["graphcl"](make_backbone(), settings).augment(features)
    for g in (0, 1):
        mine = features.batch == g
        changed = (view.x[mine] != features.x[mine]).any(1)
        assert changed.sum() == 2
        torch.testing.assert_close(view.x[mine][changed], features.x[mine].mean(0).expand(2, -1))


def test_each_graph_draws_its_own_augmentation(make_backbone: Make) -> None:
    method = OBJECTIVES["graphcl"](make_backbone("chem"))
    view = method.augment(batch(*(path(10) for _ in range(40))))
    sizes = view.ptr[1:] - view.ptr[:-1]
    masked = torch.tensor([bool((view.x[view.batch == g, 0] == 119).any()) for g in range(40)])
    moved = torch.tensor([bool((sizes[g] == 10) & ~masked[g]) for g in range(40)])
    assert min(int((sizes == 8).sum()), int(masked.sum()), int(moved.sum())) > 2
    assert not bool((masked & (sizes == 8)).any())


def test_missing_descriptors_are_no_terms(make_backbone: Make) -> None:
    method = OBJECTIVES["descriptors"](make_backbone("chem"), DescriptorsConfig(num_targets=2))
    graphs = batch(path(5), path(6))
    with torch.no_grad():
        method.head.weight.zero_()
        method.head.bias.zero_()
    graphs.descriptors = torch.tensor([[0.5, float("nan")], [float("nan"), 3.0]])
    assert method.value(graphs).item() == pytest.approx((0.5 * 0.25 + 2.5) / 2)


def test_descriptor_targets_are_standardised_columns_that_vary() -> None:
    pytest.importorskip("rdkit")
    from pt_graph.pretraining import descriptor_targets

    targets = descriptor_targets(["CCO", "c1ccccc1O", "CC(=O)Nc1ccc(O)cc1", "CCCCCCCC", "C[N+](C)(C)C"])
    assert targets.shape[0] == 5
    assert 50 < targets.shape[1] < 217
    assert targets.nan_to_num().abs().max() <= 5
    full = targets[:, targets.isfinite().all(0)]
    torch.testing.assert_close(full.mean(0), torch.zeros(full.shape[1]), atol=1e-5, rtol=0)
    torch.testing.assert_close(full.std(0, correction=0), torch.ones(full.shape[1]), atol=1e-4, rtol=0)
    with pytest.raises(InputError, match=r"row 2.*'C1CC' is no valid SMILES"):
        descriptor_targets(["CC", "C1CC"])
