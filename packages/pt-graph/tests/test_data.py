"""Data of graphs: labels, splits, few-shot rules, subgraphs of nodes, and what is wrong named before training starts."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch_geometric.data import Data
from torch_geometric.utils import k_hop_subgraph, subgraph

from pt_core import InputError, fit
from pt_core.testing import SHORT
from pt_graph import data
from pt_graph.data import (
    GraphTask,
    answers,
    binary_labels,
    draw_nodes,
    few_shot_gpf,
    few_shot_relief,
    make_split,
    neighbourhoods,
    node_subgraphs,
    random_split,
    read_nodes,
    read_smiles,
    scaffold_groups,
    scaffold_split,
    split_groups,
)
from pt_graph.methods.gpf import GPF, GPFConfig

rdkit = pytest.importorskip("rdkit", reason="rdkit is not installed: the extra `molecules` of pt-graph")

ROWS = [
    {"smiles": "CCO", "a": "1", "b": "0"},
    {"smiles": "c1ccccc1O", "a": "", "b": "1"},
    {"smiles": "c1ccccc1N", "a": "0", "b": ""},
    {"smiles": "C1CCCCC1", "a": "1", "b": "1"},
]


# --- labels -----------------------------------------------------------------------------------------------------------
def test_both_codings_of_missing_labels() -> None:
    assert binary_labels(["1", "0", "", None, float("nan"), 1.0], "abcdef", "zero-one") == [1, 0, -1, -1, -1, 1]
    assert binary_labels([1, -1, 0], "abc", "signed") == [1, 0, -1]


@pytest.mark.parametrize(("coding", "cell"), [("zero-one", "-1"), ("zero-one", "2"), ("signed", ""), ("signed", "yes")])
def test_a_label_outside_of_its_coding_is_named(coding: str, cell: str) -> None:
    with pytest.raises(InputError, match=r"t\.csv, row 7, field 'tox': the label is .*Labels are"):
        binary_labels([cell], ["tox"], coding, Path("t.csv"), 7)


# --- molecules --------------------------------------------------------------------------------------------------------
def test_molecules_of_a_table_keep_their_rows_and_missing_labels(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("smiles,a,b\n" + "".join(f"{r['smiles']},{r['a']},{r['b']}\n" for r in ROWS))
    read = read_smiles(tmp_path / "m.csv", ["a", "b"])
    assert read.labels.tolist() == [[1, 0], [-1, 1], [0, -1], [1, 1]]
    assert read.rows == [1, 2, 3, 4] and read.skipped == {}
    assert [g.num_nodes for g in read.graphs] == [3, 7, 7, 6]


def test_invalid_smiles_are_listed_with_their_rows_and_refused_or_skipped() -> None:
    rows = [*ROWS, {"smiles": "C(", "a": "1", "b": "1"}, {"smiles": " ", "a": "1", "b": "1"}]
    with pytest.raises(InputError, match=r"2 of 6 SMILES cannot be used, rows 5, 6: 'C\('"):
        read_smiles(rows, ["a", "b"])
    read = read_smiles(rows, ["a", "b"], invalid="skip")
    assert read.rows == [1, 2, 3, 4] and list(read.skipped) == [5, 6]


def test_molecules_without_any_label_are_named_and_refused_or_dropped() -> None:
    rows = [*ROWS, {"smiles": "CC", "a": "", "b": ""}]
    with pytest.raises(InputError, match="1 molecules have no label at all, rows 5"):
        read_smiles(rows, ["a", "b"])
    read = read_smiles(rows, ["a", "b"], unlabelled="drop")
    assert len(read.graphs) == 4 and read.skipped == {5: "no label"}


def test_a_table_may_name_one_of_several_classes() -> None:
    pairs = [("CCO", "alcohol"), ("CC=O", "b"), ("CCN", "a"), ("CC(=O)O", "b")] * 5
    rows = [{"smiles": smiles, "kind": kind} for smiles, kind in pairs]
    read = read_smiles(rows, ["kind"], task="multiclass")
    assert read.classes == ("a", "alcohol", "b") and read.labels[:4].tolist() == [1, 2, 0, 2]
    task = GraphTask.from_smiles(read, ["kind"], split="random")
    assert task.spec.task == "multiclass" and task.spec.labels == read.classes
    assert task.train.batch([0, 1])["labels"].shape == (2,) and task.train.metrics == ("accuracy", "macro-f1")
    bare = [*rows, {"smiles": "C", "kind": ""}]
    with pytest.raises(InputError, match="1 molecules have no label at all, rows 21"):
        read_smiles(bare, ["kind"], task="multiclass")
    assert len(read_smiles(bare, ["kind"], task="multiclass", unlabelled="drop").labels) == 20
    with pytest.raises(InputError, match=r"row 1, field 'kind': the label is 'alcohol'.*Classes: a, b"):
        read_smiles(rows, ["kind"], task="multiclass", classes=["a", "b"])
    with pytest.raises(InputError, match="2 label columns for one class"):
        read_smiles(rows, ["kind", "smiles"], task="multiclass")


def test_classes_are_those_of_kept_rows_and_odd_ones_are_named_by_row_and_column(tmp_path: Path) -> None:
    cells = [("CCO", ""), ("CCN", ""), ("CCC", "a"), ("CC", "b"), ("C(", "c"), ("CCCC", "a")]
    known: dict[str, Any] = {"task": "multiclass", "invalid": "skip", "unlabelled": "drop"}
    rows = [{"smiles": smiles, "kind": kind} for smiles, kind in cells]
    read = read_smiles(rows, ["kind"], **known)
    assert read.classes == ("a", "b") and read.labels.tolist() == [0, 1, 0] and read.rows == [3, 4, 6]
    for odd, problem in (
        (" a", "differ in white space only"),
        (1, "is an integer"),
        (1.5, "neither text nor an integer"),
    ):
        with pytest.raises(InputError, match=f"^row 6, field 'kind': .*{problem}"):
            read_smiles([*rows[:5], {"smiles": "CCCC", "kind": odd}], ["kind"], **known)
    (tmp_path / "m.csv").write_text("smiles,kind\nCCO,\nCC,b\n")
    with pytest.raises(InputError, match=r"m\.csv, field 'kind': 1 class\(es\) found"):
        read_smiles(tmp_path / "m.csv", ["kind"], **known)


def test_a_missing_column_or_no_label_column_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("smiles,a\nCC,1\n")
    with pytest.raises(InputError, match="field 'b': no such column"):
        read_smiles(tmp_path / "m.csv", ["b"])
    with pytest.raises(InputError, match="row 2, field 'b': no such column"):
        read_smiles([ROWS[0], {"smiles": "CC", "a": "1"}], ["a", "b"])
    with pytest.raises(InputError, match="no label column"):
        read_smiles(tmp_path / "m.csv", [])


def test_a_molecule_without_bonds_goes_through_a_task_and_a_backbone(make_backbone: Callable[..., Any]) -> None:
    rows = [{"smiles": s, "a": str(i % 2)} for i, s in enumerate(["C", "CC", "[Na+].[Cl-]", "CCO"] * 5)]
    task = GraphTask.from_smiles(rows, ["a"], split="random")
    method = GPF(make_backbone("chem"), GPFConfig(num_outputs=1))
    result = fit(method, task.train, task.validation, SHORT)
    assert result.steps == 6


# --- splits -----------------------------------------------------------------------------------------------------------
def test_the_scaffold_split_fills_parts_with_whole_groups_in_order() -> None:
    groups = [[0, 1, 2, 3, 4], [5, 6, 7], [8], [9]]
    assert split_groups(groups) == ([0, 1, 2, 3, 4, 5, 6, 7], [8], [9])
    smiles = ["c1ccccc1C", "C1CCCCC1", "c1ccccc1CC", "CCC", "CC", "c1ccccc1"]
    assert scaffold_groups(smiles) == [[0, 2, 5], [3, 4], [1]]


def test_the_scaffold_split_is_the_same_for_every_seed(study_data: Path) -> None:
    read = read_smiles(study_data / "moleculenet" / "bace.csv", ["Class"])
    tasks = [GraphTask.from_smiles(read, ["Class"], seed=seed) for seed in (0, 1)]
    first, second = ([list(part.ids) for part in (t.train, t.validation, t.test)] for t in tasks)  # type: ignore[union-attr,arg-type]
    assert first == second
    assert [len(part) for part in first] == [1210, 151, 152]
    train, validation, test = scaffold_split(read.smiles)
    assert not {*train} & {*test} and not {*train} & {*validation} and len({*train, *validation, *test}) == 1513


def test_the_few_shot_rules_of_relief_and_gpf_differ() -> None:
    groups = [
        list(range(0, 60)),
        list(range(60, 90)),
        list(range(90, 115)),
        list(range(115, 135)),
        list(range(135, 140)),
    ]
    assert len(few_shot_gpf(groups, 50, train=1.0)) == 50
    assert few_shot_gpf(groups, 50, train=1.0) == [*range(60, 90), *range(115, 135)]
    train = list(range(100))
    expected = list(train)
    random.seed(2)
    random.shuffle(expected)
    assert few_shot_relief(train, 50, 2) == expected[:50]
    assert few_shot_relief(train, 50, 2) != few_shot_relief(train, 50, 3)
    assert few_shot_relief(train, 20, 2) == expected[:20]
    assert len(few_shot_relief(train, 0.5, 2)) == 50 and len(few_shot_relief(train, 1.0, 2)) == 100
    with pytest.raises(InputError, match="101 shots of 100"):
        few_shot_relief(train, 101, 0)
    with pytest.raises(InputError, match="no scaffold group has at most 3"):
        few_shot_gpf(groups, 3)


def test_random_splits_follow_their_seed() -> None:
    train, validation, test = random_split(20, 0)
    assert (len(train), len(validation), len(test)) == (16, 2, 2)
    assert sorted(train + validation + test) == list(range(20))
    assert random_split(20, 1) != random_split(20, 0) == random_split(20, 0)


# --- nodes ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "hops", "low", "eligible"), [("cora", 4, 5, 1119), ("citeseer", 3, 20, 1105)])
def test_subgraph_sizes_are_the_published_ones(name: str, hops: int, low: int, eligible: int, study_data: Path) -> None:
    graph = read_nodes(study_data / "relief" / f"{name}_svd100.safetensors")
    sizes = np.diff(neighbourhoods(graph.edge_index, len(graph.x), hops).indptr).tolist()
    assert sizes == json.loads((study_data / "relief" / f"{name}_{hops}hop_sizes.json").read_text())
    found = node_subgraphs(graph, hops, low, 150)
    assert len(found) == eligible
    train, validation, test = draw_nodes(graph.y, list(found), 10, 500, 500, 0)
    classes = int(graph.y.max()) + 1
    assert torch.bincount(graph.y[train]).tolist() == [10] * classes
    assert (len(validation), len(test)) == (500, 500) and len({*train, *validation, *test}) == 10 * classes + 1000


def test_a_subgraph_is_that_of_pyg(make_graph: Callable[..., Data]) -> None:
    graph = make_graph(30, 4)
    graph.y = torch.zeros(30, dtype=torch.long)
    graph.edge_index = graph.edge_index[:, ::3]  # directed
    for node, found in node_subgraphs(graph, 2).items():
        members, _, _, _ = k_hop_subgraph(node, 2, graph.edge_index, num_nodes=30)
        edges, _ = subgraph(members, graph.edge_index, relabel_nodes=True, num_nodes=30)
        assert torch.equal(found.x, graph.x[members]) and torch.equal(found.edge_index, edges)
        assert members[int(found.centre_index)] == node


def test_sampled_neighbourhoods_are_small_and_drawn_by_seed(make_graph: Callable[..., Data]) -> None:
    graph = make_graph(40, 1)
    plain, drawn = node_subgraphs(graph, 2), node_subgraphs(graph, 2, neighbours=[2, 1], seed=3)
    again, other = (
        node_subgraphs(graph, 2, neighbours=[2, 1], seed=3),
        node_subgraphs(graph, 2, neighbours=[2, 1], seed=4),
    )
    assert all(found.num_nodes <= 1 + 2 + 2 and found.edge_index.shape[1] <= 4 for found in drawn.values())
    assert any(found.num_nodes < plain[node].num_nodes for node, found in drawn.items())
    assert all(
        torch.equal(again[n].x, f.x) and torch.equal(again[n].edge_index, f.edge_index) for n, f in drawn.items()
    )
    assert any(not torch.equal(other[n].x, f.x) for n, f in drawn.items() if other[n].x.shape == f.x.shape)
    assert all(torch.equal(found.x[int(found.centre_index)], graph.x[node]) for node, found in drawn.items())


def test_a_node_task_has_the_class_of_each_centre(make_graph: Callable[..., Data]) -> None:
    graph = make_graph(60, 2)
    graph.y = torch.arange(60) % 3
    graph.y[5] = -1
    task = GraphTask.from_nodes(graph, hops=1, shots=4, validation_nodes=10, test_nodes=12)
    assert task.validation is not None and task.test is not None
    for split, count in ((task.train, 12), (task.validation, 10), (task.test, 12)):
        batch = split.batch(range(len(split)))
        assert len(split) == count and 5 not in batch["sample_ids"]
        assert torch.equal(batch["labels"], graph.y[batch["sample_ids"]])
        centres = batch["graphs"].x[batch["graphs"].centre_index]
        assert torch.equal(centres, graph.x[batch["sample_ids"]])  # places of centres are moved along in a batch


def test_only_the_subgraphs_of_drawn_nodes_are_made(make_graph: Callable[..., Data]) -> None:
    graph = make_graph(60, 2)
    graph.y = torch.arange(60) % 3
    with mock.patch("pt_graph.data._sampled", wraps=data._sampled) as made:
        task = GraphTask.from_nodes(
            graph, hops=2, neighbours=[2, 1], shots=4, validation_nodes=10, test_nodes=12, seed=3
        )
    assert made.call_count == 12 + 10 + 12
    all_of_them = node_subgraphs(graph, 2, neighbours=[2, 1], seed=3)
    assert task.train.ids is not None
    for (found, _), node in zip(task.train.rows, task.train.ids, strict=True):
        assert torch.equal(found.x, all_of_them[node].x)
        assert torch.equal(found.edge_index, all_of_them[node].edge_index)


def test_node_draws_that_cannot_be_made_are_refused(make_graph: Callable[..., Data]) -> None:
    graph = make_graph(20, 2)
    graph.y = torch.arange(20) % 2
    with pytest.raises(InputError, match="class 0 has 10 nodes whose subgraph is in range, 11"):
        GraphTask.from_nodes(graph, hops=1, shots=11)
    with pytest.raises(InputError, match="16 nodes are left for 10 validation and 7 test"):
        GraphTask.from_nodes(graph, hops=1, shots=2, validation_nodes=10, test_nodes=7)
    with pytest.raises(InputError, match="no node has a subgraph of this size"):
        GraphTask.from_nodes(graph, hops=1, min_nodes=50)


def test_node_files_are_read_without_unpickling(tmp_path: Path, make_graph: Callable[..., Data]) -> None:
    graph = make_graph(5, 0)
    parts = {"x": graph.x, "edge_index": graph.edge_index, "y": torch.tensor([0, 1, 0, -1, 1])}
    save_file({name: tensor.contiguous() for name, tensor in parts.items()}, tmp_path / "g.safetensors")
    np.savez(tmp_path / "g.npz", **{name: tensor.numpy() for name, tensor in parts.items()})
    for name in ("g.safetensors", "g.npz"):
        read = read_nodes(tmp_path / name)
        assert all(torch.equal(read[key], tensor) for key, tensor in parts.items())
    np.savez(tmp_path / "objects.npz", x=np.array([{}], dtype=object))
    with pytest.raises(InputError, match="cannot be read without unpickling"):
        read_nodes(tmp_path / "objects.npz")
    (tmp_path / "ind.cora.x").write_bytes(b"\x80\x03")
    with pytest.raises(InputError, match=r"pickled objects, which are never loaded.*\.safetensors"):
        read_nodes(tmp_path / "ind.cora.x")
    save_file({"x": parts["x"].contiguous(), "y": parts["y"]}, tmp_path / "no-edges.safetensors")
    with pytest.raises(InputError, match="field 'edge_index': is missing"):
        read_nodes(tmp_path / "no-edges.safetensors")
    wild = parts | {"edge_index": graph.edge_index + 3}
    save_file({name: tensor.contiguous() for name, tensor in wild.items()}, tmp_path / "wild.safetensors")
    with pytest.raises(InputError, match=r"field 'edge_index': is not \[2, e\] of nodes 0\.\.4"):
        read_nodes(tmp_path / "wild.safetensors")
    odd = parts | {"x": graph.x.index_fill(0, torch.tensor([3]), float("inf"))}
    save_file({name: tensor.contiguous() for name, tensor in odd.items()}, tmp_path / "odd.safetensors")
    with pytest.raises(InputError, match=r"odd\.safetensors, row 4, field 'x': x\[3\] is NaN or infinite"):
        read_nodes(tmp_path / "odd.safetensors")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"edge_index": np.array([[0.7, 1.0], [1.0, 2.0]])}, "field 'edge_index': is torch.float64. Give integers"),
        ({"y": np.zeros(4, np.complex64)}, "field 'y': is torch.complex64. Give integers"),
        ({"y": np.array(list("abcd"))}, "is not an npz file of numbers"),
        ({"x": np.full((4, 3), 1e300)}, "row 1, field 'x': x.0. is NaN or infinite"),
        (
            {"x": np.ones((0, 3)), "y": np.zeros(0, int), "edge_index": np.zeros((2, 0), int)},
            "field 'x': is .*Give floats",
        ),
    ],
)
def test_odd_arrays_of_a_node_file_are_named(change: dict[str, Any], problem: str, tmp_path: Path) -> None:
    plain = {"x": np.ones((4, 3)), "edge_index": np.array([[0, 1], [1, 2]], np.uint32), "y": np.arange(4, dtype="u2")}
    np.savez(tmp_path / "plain.npz", **plain)  # integers without a sign are integers
    assert read_nodes(tmp_path / "plain.npz").edge_index.tolist() == [[0, 1], [1, 2]]
    np.savez(tmp_path / "odd.npz", **{**plain, **change})
    with pytest.raises(InputError, match=rf"odd\.npz.*{problem}"):
        read_nodes(tmp_path / "odd.npz")


def test_a_broken_npz_file_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "whole.npz", x=np.ones((4, 3)))
    whole = (tmp_path / "whole.npz").read_bytes()
    np.save(tmp_path / "array.npy", np.ones(3))
    broken = {"cut": whole[: len(whole) // 2], "flipped": whole[:200] + b"?" + whole[201:], "empty": b""}
    for name, content in (broken | {"array": (tmp_path / "array.npy").read_bytes()}).items():
        (tmp_path / f"{name}.npz").write_bytes(content)
        with pytest.raises(InputError, match=rf"{name}\.npz: is not an npz file of numbers"):
            read_nodes(tmp_path / f"{name}.npz")


# --- any graphs -------------------------------------------------------------------------------------------------------
def test_any_graphs_become_a_task(make_graph: Callable[..., Data]) -> None:
    graphs = [make_graph(3 + i % 5, i) for i in range(40)]
    for i, graph in enumerate(graphs):
        graph.y = torch.tensor([i % 2])
    task = GraphTask.from_graphs(graphs, labels=["no", "yes"], shots=5)
    assert task.spec.task == "multiclass" and task.spec.labels == ("no", "yes")
    assert torch.bincount(task.train.batch(range(10))["labels"]).tolist() == [5, 5]
    for i, graph in enumerate(graphs):
        graph.y = torch.tensor([[float(i % 2), float("nan"), 1.0]])
    many = GraphTask.from_graphs(graphs)
    assert many.spec.task == "multilabel" and many.train.missing == -1
    assert many.train.batch([0])["labels"][0, 1:].tolist() == [-1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": None}, "row 3, field 'y': the graph has no label"),
        ({"x": torch.randn(4, 9)}, "row 3, field 'x': features of width 9, 6 in the first"),
        ({"x": torch.empty(0, 6)}, "row 3, field 'x': the graph has no node features"),
        ({"x": torch.full((4, 6), float("nan"))}, "row 3, field 'x': x.0. is NaN or infinite"),
        ({"y": torch.tensor([float("inf")])}, "row 3, field 'task 0': the label is inf"),
        ({"edge_index": torch.tensor([[0], [4]])}, "row 3, field 'edge_index': an edge leads out of nodes 0..3"),
        ({"edge_index": torch.tensor([0, 1])}, "row 3, field 'edge_index': edges are not"),
        ({"y": torch.tensor([-1])}, "row 3, field 'y': a class is negative"),
        ({"y": torch.tensor([0, 1])}, "row 3, field 'y': 2 labels, 1 in the first graph"),
        ({"edge_attr": torch.zeros(8, 2)}, "row 3, field 'edge_attr': edge attributes are .e, 2., none in the first"),
    ],
)
def test_bad_graphs_are_named(change: dict[str, Any], message: str, make_graph: Callable[..., Data]) -> None:
    graphs = [make_graph(4, i) for i in range(12)]
    for i, graph in enumerate(graphs):
        graph.y = torch.tensor([i % 2])
    for name, value in change.items():
        graphs[2][name] = value
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        GraphTask.from_graphs(graphs)


def test_edge_attributes_are_those_of_the_first_graph(make_graph: Callable[..., Data]) -> None:
    graphs = [make_graph(4, i, molecule=True) for i in range(12)]
    for i, graph in enumerate(graphs):
        graph.y = torch.tensor([i % 2])
    assert GraphTask.from_graphs(graphs).train.batch([0])["graphs"].edge_attr is not None
    graphs[4].edge_attr = graphs[4].edge_attr[:, :1]
    with pytest.raises(
        InputError, match=r"row 5, field 'edge_attr': edge attributes are \[e, 1\], \[e, 2\] in the first"
    ):
        GraphTask.from_graphs(graphs)
    del graphs[0].edge_attr
    with pytest.raises(InputError, match=r"row 2, field 'edge_attr': edge attributes are \[e, 2\], none in the first"):
        GraphTask.from_graphs(graphs)


@pytest.mark.parametrize("shots", [0, 0.5, 2.5])
def test_shots_are_whole_numbers(shots: Any, make_graph: Callable[..., Data]) -> None:
    graphs, nodes = [make_graph(4, i) for i in range(20)], make_graph(20, 2)
    for i, graph in enumerate(graphs):
        graph.y = torch.tensor([i % 2])
    nodes.y = torch.arange(20) % 2
    with pytest.raises(InputError, match=rf"field 'shots': {shots} shots"):
        GraphTask.from_graphs(graphs, shots=shots)
    with pytest.raises(InputError, match=rf"field 'shots': {shots} shots"):
        GraphTask.from_nodes(nodes, hops=1, shots=shots)
    with pytest.raises(InputError, match=rf"field 'shots': {shots} shots"):
        GraphTask.from_smiles(ROWS * 5, ["a", "b"], few_shot="gpf", shots=shots)


def test_a_task_without_anything_to_train_on_is_refused(make_graph: Callable[..., Data]) -> None:
    graph, nodes = make_graph(4, 0), make_graph(20, 2)
    graph.y, nodes.y = torch.tensor([0.0]), torch.full((20,), -1)
    with pytest.raises(InputError, match="1 graphs are too few to split"):
        GraphTask.from_graphs([graph])
    with pytest.raises(InputError, match="field 'y': no node has a label"):
        GraphTask.from_nodes(nodes, hops=1)


def test_the_tu_format_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "TINY"
    folder.mkdir()
    edges = [(1, 2), (2, 1), (3, 4), (4, 3)]
    (folder / "TINY_A.txt").write_text("".join(f"{a}, {b}\n" for a, b in edges))
    (folder / "TINY_graph_indicator.txt").write_text("1\n1\n2\n2\n2\n")
    (folder / "TINY_graph_labels.txt").write_text("1\n-1\n")
    (folder / "TINY_node_labels.txt").write_text("0\n1\n2\n0\n1\n")
    from pt_graph.data import read_tu

    first, second = read_tu(folder)
    assert (first.num_nodes, second.num_nodes) == (2, 3)
    assert second.edge_index.tolist() == [[0, 1], [1, 0]]
    assert first.x.argmax(1).tolist() == [0, 1]
    assert {int(first.y), int(second.y)} == {0, 1}
    (folder / "TINY_graph_labels.txt").write_text("1\n-1\n1\n")
    with pytest.raises(InputError, match=r"TINY_graph_labels.txt: 3 labels for 2 graphs that have nodes"):
        read_tu(folder)
    (folder / "TINY_graph_labels.txt").write_text("0.5\n1\n")
    with pytest.raises(InputError, match=r"TINY: cannot be read .*labels are whole numbers"):
        read_tu(folder)
    (folder / "TINY_A.txt").write_text("1, 2\n2, 1\n")
    (folder / "TINY_graph_labels.txt").write_text("1\n-1\n")
    assert [graph.edge_index.shape[1] for graph in read_tu(folder)] == [2, 0]  # the last graph has no edges
    (folder / "TINY_graph_indicator.txt").write_text("1\n1\n3\n3\n3\n")
    (folder / "TINY_graph_labels.txt").write_text("1\n-1\n1\n")
    with pytest.raises(InputError, match="row 2, field 'x': the graph has no node features"):
        GraphTask.from_tu(folder)
    (folder / "TINY_node_labels.txt").unlink()
    with pytest.raises(InputError, match="neither node labels nor node attributes"):
        read_tu(folder)
    with pytest.raises(InputError, match="no such file"):
        read_tu(tmp_path)


def test_answers_name_classes_and_tasks(make_graph: Callable[..., Data]) -> None:
    task = GraphTask.from_smiles(ROWS * 5, ["a", "b"], split="random")
    told = answers(task.spec, torch.tensor([[0.0, 10.0]]))
    assert told == [{"scores": {"a": 0.5, "b": 1.0}}]
    spec = task.spec.model_copy(update={"task": "multiclass"})
    assert answers(spec, torch.tensor([[0.0, 10.0]]))[0]["label"] == "b"
    split = make_split([make_graph(3, 0)], torch.tensor([[1, -1]]), [7], task.spec)
    assert split.batch([0])["sample_ids"] == [7]


# --- real data --------------------------------------------------------------------------------------------------------
def test_frozen_features_of_bace_have_the_known_auc(study_data: Path) -> None:
    """ASSETS: .769 with gcn_supervised_contextpred, .598 untrained (logistic regression, C = .003, on standardised rows)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from pt_graph.backbones import ChemConfig, load_backbone

    read = read_smiles(study_data / "moleculenet" / "bace.csv", ["Class"])
    train, validation, test = scaffold_split(read.smiles)
    config = ChemConfig(conv="gcn")
    backbone = load_backbone(study_data / "pretrain-gnns" / "gcn_supervised_contextpred.safetensors", config)
    task = GraphTask.from_smiles(read, ["Class"])
    rows = make_split(read.graphs, read.labels, read.rows, task.spec)
    with torch.no_grad():
        parts = [backbone.readout(backbone(b["graphs"]), b["graphs"]) for b in rows.batches(256)]
    features, labels = torch.cat(parts).numpy(), read.labels[:, 0].numpy()
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.003, max_iter=400)).fit(
        features[train], labels[train]
    )
    held = [*validation, *test]  # the study splits 80/20
    auc = roc_auc_score(labels[held], probe.predict_proba(features[held])[:, 1])
    assert auc == pytest.approx(0.769, abs=0.02)


@pytest.mark.parametrize(("name", "labels", "molecules", "skipped"), [("BBBP", 1, 2039, 11), ("sider", 27, 1427, 0)])
def test_moleculenet_is_read_whole(name: str, labels: int, molecules: int, skipped: int, study_data: Path) -> None:
    file = study_data / "moleculenet" / f"{name}.csv"
    header = file.read_text().splitlines()[0]
    import csv

    columns = [c for c in next(csv.reader([header])) if c not in ("num", "name", "smiles")]
    read = read_smiles(file, columns, invalid="skip")
    assert read.labels.shape == (molecules, labels) and len(read.skipped) == skipped
