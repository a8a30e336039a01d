"""Graphs and their labels: molecules from tables, graph data sets, nodes of one graph -> splits and batches.

A `GraphTask` holds what a prompt needs besides its tensors to be used (`GraphSpec`, saved with the prompt) and the splits.
Batches are dicts: `graphs` (a `torch_geometric.data.Batch`), `labels` ([B] classes, or [B, C] of 1, 0 and -1 for missing) and
`sample_ids`.

    task = GraphTask.from_smiles("bbbp.csv", labels=["p_np"], few_shot="relief", shots=50)
    task = GraphTask.from_nodes("cora.safetensors", hops=4, min_nodes=5, max_nodes=150, shots=10)
    task = GraphTask.from_graphs(TUDataset(root, "MUTAG"))

Nothing is unpickled: nodes are read from safetensors or from npz without objects.
"""

from __future__ import annotations

import random
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Self
from zipfile import BadZipFile

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from scipy.sparse import csr_array, eye_array
from torch import Tensor
from torch_geometric.data import Batch, Data

from pt_core.data import Split, class_names, encode_labels, read_table
from pt_core.errors import InputError
from pt_core.settings import Settings
from pt_graph import molecules

METRICS = {"multilabel": ("roc-auc",), "multiclass": ("accuracy", "macro-f1")}
Task = Literal["multilabel", "multiclass"]
FewShot = Literal["relief", "gpf"]
Coding = Literal["zero-one", "signed"]
Indices = tuple[list[int], list[int], list[int]]


class GraphSpec(Settings):
    """What turns inputs into graphs and logits into answers. Saved with every prompt."""

    kind: Literal["molecules", "graphs", "nodes"] = Field(description="what a row is")
    task: Task = Field(description="multilabel: binary tasks with missing labels; multiclass: one class")
    labels: tuple[str, ...] = Field(description="names of the tasks or classes, in the order of the logits")
    featuriser: Literal["chem", "minimol"] = Field("chem", description="of molecules: whose atom and bond codes")
    coding: Coding = Field("zero-one", description="of binary labels, see `binary_labels`")
    invalid: Literal["refuse", "skip"] = Field("refuse", description="SMILES that cannot be read")
    unlabelled: Literal["refuse", "drop"] = Field("refuse", description="molecules without any label")
    hops: int | None = Field(None, description="of node tasks: subgraph of all nodes at most this far away")
    min_nodes: int = 1
    max_nodes: int | None = None
    neighbours: tuple[int, ...] = ()
    seed: int = Field(0, description="of node tasks: by which neighbours are drawn")
    backbone: dict[str, Any] | None = Field(None, description="what the weights of a bare file are")


# --- labels -----------------------------------------------------------------------------------------------------------
def binary_labels(
    cells: Sequence[Any], names: Sequence[str], coding: str, file: Path | None = None, row: int | None = None
) -> list[int]:
    """Labels of one row as 1, 0 and -1 (missing).

    Args:
        cells: "zero-one": 0, 1, or empty (missing), as the files of MoleculeNet; "signed": -1, 1, or 0 (missing), as
            pretrain-gnns keeps them.

    Raises:
        InputError: a cell is none of these.
    """
    codes: dict[float, int] = {"zero-one": {0.0: 0, 1.0: 1}, "signed": {-1.0: 0, 0.0: -1, 1.0: 1}}[coding]
    found = []
    for name, cell in zip(names, cells, strict=True):
        empty = _empty(cell)
        try:
            value = None if empty else float(cell)
        except (TypeError, ValueError):
            value = np.nan
        if value is None and coding == "zero-one":
            found.append(-1)
        elif value is not None and value in codes:
            found.append(codes[value])
        else:
            allowed = "0, 1 or empty" if coding == "zero-one" else "-1, 0 (missing) or 1"
            raise InputError(
                f"the label is {cell!r}", file=file, row=row, field=name, remedy=f"Labels are {allowed} ({coding})"
            )
    return found


# --- molecules --------------------------------------------------------------------------------------------------------
@dataclass
class Molecules:
    """Molecules of a table: SMILES, graphs, labels [n, C] in {1, 0, -1}, or [n] of the `classes`, and their rows in the file
    (from 1); and how it was read, see `read_smiles`."""

    smiles: list[str]
    graphs: list[Data]
    labels: Tensor
    rows: list[int]
    skipped: dict[int, str]
    classes: tuple[str, ...] = ()
    coding: Coding = "zero-one"
    invalid: Literal["refuse", "skip"] = "refuse"
    unlabelled: Literal["refuse", "drop"] = "refuse"

    @cached_property
    def scaffolds(self) -> list[list[int]]:
        """`scaffold_groups` of the molecules: seconds for thousands, and the same for every seed."""
        return scaffold_groups(self.smiles)


def featurisers() -> dict[str, Callable[[str], Data]]:
    """By name, SMILES -> graph."""
    from pt_graph.minimol import minimol_graph

    return {"chem": molecules.molecule_graph, "minimol": minimol_graph}


def read_smiles(
    source: str | Path | Sequence[Mapping[str, Any]],
    labels: Sequence[str],
    *,
    smiles: str = "smiles",
    coding: Coding = "zero-one",
    invalid: Literal["refuse", "skip"] = "refuse",
    unlabelled: Literal["refuse", "drop"] = "refuse",
    featuriser: str = "chem",
    task: Task = "multilabel",
    classes: Sequence[str] = (),
) -> Molecules:
    """Molecules and their labels.

    Args:
        source: a CSV, TSV, JSON, JSONL or Parquet file, or rows.
        labels: columns with labels.
        smiles: column with SMILES.
        coding: of the labels, see `binary_labels`.
        invalid: what to do about SMILES that rdkit or the featuriser refuse; skipped ones are listed in `skipped`.
        unlabelled: what to do about molecules without any label.
        featuriser: "chem" (pretrain-gnns) or "minimol".
        task: "multilabel": every label column is a binary task; "multiclass": the one label column names a class.
        classes: names that a class may have; default: those that are there.

    Raises:
        InputError: a column is missing, a label is out of range, or what shall be refused is there, with its rows.
    """
    if not labels:
        raise InputError("no label column is named", field="labels", remedy="Name the columns with labels")
    if task == "multiclass" and len(labels) > 1:
        raise InputError(f"{len(labels)} label columns for one class", field="labels", remedy="Name one column")
    file, table = None, source
    if isinstance(source, str | Path):
        file = Path(source)
        table = read_table(file, {name: name for name in (smiles, *labels)}, text=[])
    assert not isinstance(table, str | Path)
    for number, row in enumerate(table, start=1):
        if missing := [name for name in (smiles, *labels) if name not in row]:
            raise InputError("no such column", file=file, row=number, field=missing[0])
    make = featurisers()[featuriser]
    found = Molecules([], [], torch.empty(0), [], {}, coding=coding, invalid=invalid, unlabelled=unlabelled)
    values: list[list[int]] = []
    bare: list[int] = []
    for number, row in enumerate(table, start=1):
        text = row[smiles]
        try:
            if not isinstance(text, str) or not text.strip():
                raise InputError("the SMILES is empty" if not text else f"the SMILES is {type(text).__name__}")
            graph = make(text.strip())
        except InputError as error:
            found.skipped[number] = str(error)
            continue
        if task == "multiclass":
            # Coded below, since the classes are those of the rows that are kept.
            label = [-1 if _empty(row[labels[0]]) else 0]
        else:
            label = binary_labels([row[name] for name in labels], labels, coding, file, number)
        if max(label) < 0:
            bare.append(number)
            continue
        found.smiles.append(text.strip())
        found.graphs.append(graph)
        found.rows.append(number)
        values.append(label)
    if found.skipped and invalid == "refuse":
        first = next(iter(found.skipped))
        raise InputError(
            f"{len(found.skipped)} of {len(table)} SMILES cannot be used, rows {_shown(found.skipped)}: "
            f"{found.skipped[first]}",
            file=file,
            field=smiles,
            remedy='Mend the rows, or pass invalid="skip"',
        )
    if bare and unlabelled == "refuse":
        raise InputError(
            f"{len(bare)} molecules have no label at all, rows {_shown(bare)}",
            file=file,
            field=labels[0],
            remedy='Remove them, or pass unlabelled="drop"',
        )
    if not values:
        raise InputError("no molecule is left", file=file, field=smiles)
    found.skipped |= {number: "no label" for number in bare}
    found.labels = torch.tensor(values)
    if task == "multiclass":
        cells = {number: table[number - 1][labels[0]] for number in found.rows}
        found.classes = tuple(classes or class_names(cells.values(), file, field=labels[0], rows=found.rows))
        codes = [_class_of(cell, found.classes, labels[0], file, number) for number, cell in cells.items()]
        found.labels = torch.tensor(codes)
    return found


def _empty(cell: Any) -> bool:
    """Whether there is no label in a cell."""
    return cell is None or (isinstance(cell, float) and np.isnan(cell)) or str(cell).strip().lower() in ("", "nan")


def _class_of(cell: Any, classes: Sequence[str], field: str, file: Path | None, row: int) -> int:
    try:
        return encode_labels([cell], classes)[0]
    except InputError as error:
        shown = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
        raise InputError(
            f"the label is {cell!r}", file=file, row=row, field=field, remedy=f"Classes: {shown}"
        ) from error


def _shown(rows: Iterable[int]) -> str:
    listed = list(rows)
    return ", ".join(map(str, listed[:10])) + (", ..." if len(listed) > 10 else "")


# --- splits of molecules ----------------------------------------------------------------------------------------------
def scaffold_groups(smiles: Sequence[str]) -> list[list[int]]:
    """Molecules of one scaffold together, largest group first; of groups of one size the one that starts later first."""
    groups: dict[str, list[int]] = defaultdict(list)
    for index, text in enumerate(smiles):
        groups[molecules.scaffold(text)].append(index)
    return sorted(groups.values(), key=lambda group: (len(group), group[0]), reverse=True)


def scaffold_split(smiles: Sequence[str], train: float = 0.8, validation: float = 0.1) -> Indices:
    """The deterministic scaffold split of pretrain-gnns (chem/splitters.py): scaffolds of many molecules train.

    Returns:
        Indices of training, validation and test molecules. No seed: always the same.
    """
    return split_groups(scaffold_groups(smiles), train, validation)


def split_groups(groups: Sequence[Sequence[int]], train: float = 0.8, validation: float = 0.1) -> Indices:
    """Groups, in their order, to the first of training, validation and test that has room for all of a group."""
    total = sum(map(len, groups))
    parts: Indices = ([], [], [])
    for group in groups:
        if len(parts[0]) + len(group) <= train * total:
            parts[0].extend(group)
        elif len(parts[0]) + len(parts[1]) + len(group) <= (train + validation) * total:
            parts[1].extend(group)
        else:
            parts[2].extend(group)
    return parts


def random_split(rows: int, seed: int, train: float = 0.8, validation: float = 0.1) -> Indices:
    """A random split, by seed."""
    order = np.random.default_rng((seed, rows)).permutation(rows).tolist()
    first, second = int(train * rows), int((train + validation) * rows)
    return order[:first], order[first:second], order[second:]


def _whole(shots: float) -> int:
    """A number of shots; refuses one that is not whole, or less than 1."""
    if shots < 1 or shots % 1:
        raise InputError(f"{shots} shots", field="shots", remedy="Use a whole number, 1 or more")
    return int(shots)


def few_shot_relief(train: Sequence[int], shots: float, seed: int, rows: int | None = None) -> list[int]:
    """RELIEF's training graphs: the training part is shuffled by the split seed and its first `shots` are used.

    Args:
        train: indices of the training part, in the order of the split.
        shots: a number of graphs, or a share in (0, 1] of the 80 % training part (data-efficiency curves).
        seed: the split seed, one for each data set.
        rows: of the whole data set, which a share is of; default: as many as make `train` 80 %.

    Source: RELIEF, graph_level/splitters.py (Python's own generator).
    """
    shuffled = list(train)
    random.Random(seed).shuffle(shuffled)
    share = 0 < shots <= 1
    count = int(shots * 0.8 * (rows if rows is not None else len(train) / 0.8)) if share else _whole(shots)
    if count < 1 or (count > len(shuffled) and not share):
        raise InputError(f"{shots} shots of {len(shuffled)} training graphs", field="shots", remedy="Use fewer")
    return shuffled[:count]


def few_shot_gpf(groups: Sequence[Sequence[int]], shots: int, train: float = 0.8) -> list[int]:
    """GPF's training graphs: whole scaffold groups of the training part, from the largest, while the total stays within
    `shots`. No seed; may be fewer than `shots`.

    Source: GPF, chem/splitters.py.
    """
    total, taken = sum(map(len, groups)), 0
    chosen: list[int] = []
    for group in groups:
        if taken + len(group) > train * total:
            continue
        taken += len(group)
        if len(chosen) + len(group) <= shots:
            chosen.extend(group)
    if not chosen:
        raise InputError(f"no scaffold group has at most {shots} molecules", field="shots", remedy="Use more shots")
    return chosen


# --- nodes of one graph -----------------------------------------------------------------------------------------------
def read_nodes(source: str | Path) -> Data:
    """A graph with labelled nodes: x [n, D] float, edge_index [2, e], y [n] (-1: no label).

    Edges are used as they are stored: a graph whose edges go one way stays directed.

    Args:
        source: a safetensors or npz file with these three.

    Raises:
        InputError: the file is a pickle (as Planetoid's raw files are), or its arrays do not fit together.
    """
    file = Path(source)
    if not file.is_file():
        raise InputError("no such file", file=file)
    names = ("x", "edge_index", "y")
    if file.suffix == ".safetensors":
        try:
            tensors = load_file(file)
        except SafetensorError as error:
            raise InputError(f"is not a safetensors file ({error})", file=file) from error
    elif file.suffix == ".npz":
        try:
            with np.load(file, allow_pickle=False) as archive:
                tensors = {name: torch.from_numpy(archive[name]) for name in names if name in archive}
        except (ValueError, OSError) as error:
            raise InputError(f"cannot be read without unpickling ({error})", file=file) from error
        except (BadZipFile, zlib.error, EOFError, TypeError) as error:
            raise InputError(f"is not an npz file of numbers ({error})", file=file) from error
    else:
        raise InputError(
            "is of a form that may hold pickled objects, which are never loaded",
            file=file,
            remedy="Save x, edge_index and y as .safetensors or .npz: PyG's data set gives them (dataset[0])",
        )
    if missing := [name for name in names if name not in tensors]:
        raise InputError("is missing", file=file, field=missing[0], remedy=f"The file has {', '.join(sorted(tensors))}")
    x, edges, y = (tensors[name] for name in names)
    if x.ndim != 2 or not len(x) or not x.is_floating_point():
        raise InputError(f"is {x.dtype} {list(x.shape)}", file=file, field="x", remedy="Give floats [n, D]")
    for field, whole in (("edge_index", edges), ("y", y)):
        if whole.is_floating_point() or whole.is_complex():
            raise InputError(f"is {whole.dtype}", file=file, field=field, remedy="Give integers")
    x, edges, y = x.float(), edges.long(), y.long()  # and see what these are: a double may be too large
    if not bool((fine := x.isfinite().all(1)).all()):
        node = int(fine.int().argmin())
        raise InputError(f"x[{node}] is NaN or infinite", file=file, row=node + 1, field="x")
    if edges.ndim != 2 or len(edges) != 2 or (edges.numel() and not 0 <= int(edges.min()) <= int(edges.max()) < len(x)):
        raise InputError(f"is not [2, e] of nodes 0..{len(x) - 1}", file=file, field="edge_index")
    if y.shape != x.shape[:1] or int(y.min()) < -1:
        raise InputError(f"is {list(y.shape)}", file=file, field="y", remedy="Give one class per node, -1: none")
    return Data(x=x, edge_index=edges, y=y)


def neighbourhoods(edge_index: Tensor, nodes: int, hops: int) -> csr_array:
    """Row i: the nodes from which node i is reached within `hops` edges, itself included, in ascending order; bool [n, n]."""
    source, target = edge_index.numpy()
    step = csr_array((np.ones(len(source), dtype=bool), (target, source)), shape=(nodes, nodes))
    step = (step + eye_array(nodes, dtype=bool, format="csr")).astype(bool)
    reach = eye_array(nodes, dtype=bool, format="csr")
    for _ in range(hops):
        reach = (reach @ step).astype(bool)
    reach = csr_array(reach)
    reach.sort_indices()
    return reach


def node_subgraphs(
    graph: Data,
    hops: int,
    min_nodes: int = 1,
    max_nodes: int | None = None,
    neighbours: Sequence[int] = (),
    seed: int = 0,
) -> dict[int, Data]:
    """The induced k-hop subgraph around every node whose size is in range, as RELIEF makes them.

    Args:
        graph: of `read_nodes`.
        hops: k; messages flow along edges, so these are the nodes that can reach the centre in k steps.
        min_nodes, max_nodes: range of sizes.
        neighbours: at most so many in-neighbours of each node at each hop are drawn, and only the edges that were drawn are
            kept (Photo and Computers in RELIEF); the range then is that of the full subgraph. Empty: all of them.
        seed: of that draw.

    Returns:
        Node -> its subgraph: x, edge_index, `centre_index` [1], the centre's place in it; nodes in ascending order.
    """
    reach, nodes = _in_range(graph, hops, min_nodes, max_nodes)
    return _around(graph, reach, nodes, neighbours, seed)


def _in_range(graph: Data, hops: int, min_nodes: int, max_nodes: int | None) -> tuple[csr_array, list[int]]:
    """`neighbourhoods` of a graph, and the nodes whose own size is in range, in ascending order."""
    reach = neighbourhoods(graph.edge_index, len(graph.x), hops)
    sizes = np.diff(reach.indptr)
    return reach, np.flatnonzero((sizes >= min_nodes) & (sizes <= (max_nodes or len(graph.x)))).tolist()


def _around(
    graph: Data, reach: csr_array, nodes: Iterable[int], neighbours: Sequence[int], seed: int
) -> dict[int, Data]:
    """The subgraphs of `node_subgraphs` around these nodes."""
    source, target = graph.edge_index.numpy()
    place = np.full(len(graph.x), -1)
    found: dict[int, Data] = {}
    for node in nodes:
        if neighbours:
            members, edges = _sampled(source, target, node, neighbours, np.random.default_rng((seed, node)))
        else:
            members = reach.indices[reach.indptr[node] : reach.indptr[node + 1]]
            place[members] = 0
            edges = np.flatnonzero((place[source] >= 0) & (place[target] >= 0))
        place[members] = np.arange(len(members))
        pairs = np.stack([place[source[edges]], place[target[edges]]])
        centre = torch.tensor([int(place[node])])
        place[members] = -1
        x = graph.x[torch.from_numpy(np.asarray(members)).long()]
        found[node] = Data(x=x, edge_index=torch.from_numpy(pairs).long(), centre_index=centre)
    return found


def _sampled(
    source: np.ndarray[Any, Any],
    target: np.ndarray[Any, Any],
    node: int,
    neighbours: Sequence[int],
    draw: np.random.Generator,
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Members and edges of a sampled neighbourhood."""
    members, frontier, kept = {node: None}, [node], list[int]()
    for most in neighbours:
        reached: dict[int, None] = {}
        for at in frontier:
            into = np.flatnonzero(target == at)
            chosen = into if len(into) <= most else np.sort(draw.choice(into, most, replace=False))
            kept += chosen.tolist()
            reached |= {int(v): None for v in source[chosen] if int(v) not in members}
        members |= reached
        frontier = list(reached)
    return np.array(list(members)), np.array(sorted(set(kept)), dtype=int)


def draw_nodes(labels: Tensor, eligible: Sequence[int], shots: int, validation: int, test: int, seed: int) -> Indices:
    """RELIEF's rule: `shots` eligible nodes of each class train, then `validation` and `test` of the others.

    Not the authors' very nodes: their script draws random numbers while it loads the data, before it draws nodes.

    Raises:
        InputError: no node has a label, or a class, or what is left, has too few.
    """
    shots, classes = _whole(shots), int(labels.max()) + 1
    if not classes:
        raise InputError("no node has a label", field="y")
    draw = torch.Generator().manual_seed(seed)
    known = torch.tensor([node for node in eligible if labels[node] >= 0], dtype=torch.long)
    train: list[int] = []
    for name in range(classes):
        own = known[labels[known] == name]
        if len(own) < shots:
            raise InputError(
                f"class {name} has {len(own)} nodes whose subgraph is in range, {shots} are asked for",
                field="shots",
                remedy="Use fewer, or widen min_nodes and max_nodes",
            )
        train += own[torch.randperm(len(own), generator=draw)[:shots]].tolist()
    used = set(train)
    rest = torch.tensor([node for node in known.tolist() if node not in used], dtype=torch.long)
    if len(rest) < validation + test:
        raise InputError(
            f"{len(rest)} nodes are left for {validation} validation and {test} test nodes",
            field="test_nodes",
            remedy="Ask for fewer",
        )
    rest = rest[torch.randperm(len(rest), generator=draw)]
    return train, rest[:validation].tolist(), rest[validation : validation + test].tolist()


# --- tasks ------------------------------------------------------------------------------------------------------------
def collate(rows: list[tuple[Data, Tensor]]) -> dict[str, Any]:
    """Rows (graph, label) as a batch."""
    batch = {"graphs": Batch.from_data_list([graph for graph, _ in rows])}
    return batch | {"labels": torch.stack([label for _, label in rows])}


def make_split(graphs: Sequence[Data], labels: Tensor, ids: Sequence[int], spec: GraphSpec) -> Split:
    """A split of graphs with their labels, [n] or [n, C]."""
    return Split(
        list(zip(graphs, labels, strict=True)),
        collate,
        METRICS[spec.task],
        spec.task,
        num_classes=len(spec.labels),
        lengths=[int(graph.num_nodes or 0) for graph in graphs],
        ids=list(ids),
        missing=-1 if spec.task == "multilabel" else None,
    )


@dataclass
class GraphTask:
    """A task on graphs: its specification and its splits.

    Args:
        spec: see `GraphSpec`.
        train, validation, test: splits.
        smiles: of molecules, SMILES by row id.
    """

    spec: GraphSpec
    train: Split
    validation: Split | None
    test: Split | None
    smiles: Mapping[int, str] | None = None

    @classmethod
    def from_smiles(
        cls,
        source: str | Path | Sequence[Mapping[str, Any]] | Molecules,
        labels: Sequence[str],
        *,
        split: Literal["scaffold", "random"] = "scaffold",
        few_shot: FewShot | None = None,
        shots: float = 50,
        seed: int = 0,
        featuriser: Literal["chem", "minimol"] = "chem",
        **options: Any,
    ) -> Self:
        """Molecules of a table.

        Args:
            source, labels, options: see `read_smiles`; or what it gave.
            split: by scaffold (pretrain-gnns, no seed), or at random, 80/10/10.
            few_shot: which training molecules are used, by the rule of RELIEF (`shots` shuffled ones) or of GPF (whole scaffold
                groups); the two differ. None: all.
            shots: of `few_shot`.
            seed: of the random split and of RELIEF's draw.
        """
        read = source
        if not isinstance(read, Molecules):
            read = read_smiles(read, labels, featuriser=featuriser, **options)
        if split == "scaffold":
            groups = read.scaffolds
            train, validation, test = split_groups(groups)
        else:
            groups, (train, validation, test) = [], random_split(len(read.smiles), seed)
        if few_shot == "relief":
            train = few_shot_relief(train, shots, seed, len(read.smiles))
        elif few_shot == "gpf":
            if not groups:
                raise InputError("GPF draws scaffold groups", field="few_shot", remedy="Use split: scaffold")
            train = few_shot_gpf(groups, _whole(shots))
        task: Task = "multiclass" if read.classes else "multilabel"
        spec = GraphSpec(
            kind="molecules",
            task=task,
            labels=read.classes or tuple(labels),
            featuriser=featuriser,
            coding=read.coding,
            invalid=read.invalid,
            unlabelled=read.unlabelled,
        )
        parts = [
            make_split([read.graphs[i] for i in rows], read.labels[rows], [read.rows[i] for i in rows], spec)
            if rows
            else None
            for rows in (train, validation, test)
        ]
        if parts[0] is None:
            raise InputError("no molecule is left to train on", field="shots")
        return cls(spec, parts[0], parts[1], parts[2], dict(zip(read.rows, read.smiles, strict=True)))

    @classmethod
    def from_graphs(
        cls,
        graphs: Sequence[Data],
        *,
        labels: Sequence[str] | None = None,
        coding: Coding = "zero-one",
        shots: int | None = None,
        seed: int = 0,
    ) -> Self:
        """Any data set of PyG, or a list of `Data`: `y` is one class, or one row of binary labels.

        A random split, 80/10/10, by `seed`.

        Args:
            graphs: each with `x` (or what the backbone embeds), `edge_index`, `y`.
            labels: names of the tasks or classes; default: numbers.
            coding: of binary labels, see `binary_labels`; missing ones may be NaN.
            shots: training graphs of each class (one class), or in all (binary labels); None: all.
            seed: of split and draw.

        Raises:
            InputError: a graph has no label, no nodes, edges to nodes that it does not have, or features of another width.
        """
        rows = [graphs[i] for i in range(len(graphs))]
        check_graphs(rows)
        many = rows[0].y.numel() > 1 or any(row.y.is_floating_point() for row in rows)
        if many:
            names = tuple(labels or (f"task {i}" for i in range(rows[0].y.numel())))
            cells = [row.y.reshape(-1).tolist() for row in rows]
            y = torch.tensor([binary_labels(c, names, coding, None, i) for i, c in enumerate(cells, start=1)])
            if bare := [i for i, row in enumerate(y.tolist(), start=1) if max(row) < 0]:
                raise InputError(f"graphs without any label: {_shown(bare)}", field="y", remedy="Remove them")
        else:
            y = torch.tensor([int(row.y) for row in rows])
            if int(y.min()) < 0:
                raise InputError(
                    "a class is negative", row=int(y.argmin()) + 1, field="y", remedy="Classes start from 0"
                )
            names = tuple(labels or class_names(list(range(int(y.max()) + 1))))
        spec = GraphSpec(kind="graphs", task="multilabel" if many else "multiclass", labels=names, coding=coding)
        train, validation, test = random_split(len(rows), seed)
        if shots is not None:
            train = _some(y, train, shots)
        plain = [row.clone() for row in rows]
        for row in plain:
            del row.y
        parts = [make_split([plain[i] for i in p], y[p], p, spec) if p else None for p in (train, validation, test)]
        if parts[0] is None:
            raise InputError(f"{len(rows)} graphs are too few to split", remedy="Give 2 or more")
        return cls(spec, parts[0], parts[1], parts[2])

    @classmethod
    def from_tu(cls, folder: str | Path, **options: Any) -> Self:
        """A data set in the raw TU format: a folder NAME with NAME_A.txt, NAME_graph_indicator.txt, NAME_graph_labels.txt and
        node labels or attributes. See `from_graphs` for the options."""
        return cls.from_graphs(read_tu(folder), **options)

    @classmethod
    def from_nodes(
        cls,
        source: str | Path | Data,
        *,
        hops: int,
        min_nodes: int = 1,
        max_nodes: int | None = None,
        neighbours: Sequence[int] = (),
        shots: int = 10,
        validation_nodes: int = 500,
        test_nodes: int = 500,
        seed: int = 0,
        labels: Sequence[str] | None = None,
    ) -> Self:
        """Nodes of one graph, each as the subgraph around it, with the class of its centre (RELIEF's node level).

        Args:
            source: see `read_nodes`.
            hops, min_nodes, max_nodes, neighbours: see `node_subgraphs`.
            shots, validation_nodes, test_nodes, seed: see `draw_nodes`; shots are per class.
            labels: class names; default: numbers.
        """
        graph = source if isinstance(source, Data) else read_nodes(source)
        reach, eligible = _in_range(graph, hops, min_nodes, max_nodes)
        if not eligible:
            raise InputError("no node has a subgraph of this size", field="min_nodes", remedy="Widen the range")
        names = tuple(labels or map(str, range(int(graph.y.max()) + 1)))
        spec = GraphSpec(
            kind="nodes",
            task="multiclass",
            labels=names,
            hops=hops,
            min_nodes=min_nodes,
            max_nodes=max_nodes,
            neighbours=tuple(neighbours),
            seed=seed,
        )
        drawn = draw_nodes(graph.y, eligible, shots, validation_nodes, test_nodes, seed)
        found = _around(graph, reach, chain(*drawn), neighbours, seed)
        parts = [make_split([found[n] for n in p], graph.y[p], p, spec) if p else None for p in drawn]
        assert parts[0] is not None
        return cls(spec, parts[0], parts[1], parts[2])


def answers(spec: GraphSpec, logits: Tensor) -> list[dict[str, Any]]:
    """What logits [B, C] say: the probability of every binary task, or the class and the probability of every class."""
    probabilities = logits.sigmoid() if spec.task == "multilabel" else logits.softmax(-1)
    found: list[dict[str, Any]] = []
    for row in probabilities.tolist():
        scores = {name: round(value, 4) for name, value in zip(spec.labels, row, strict=True)}
        best = {} if spec.task == "multilabel" else {"label": max(scores, key=lambda name: scores[name])}
        found.append(best | {"scores": scores})
    return found


def check_graphs(graphs: Sequence[Data]) -> None:
    """Refuse graphs that cannot be used.

    Raises:
        InputError: naming the first one (from 1), and what is wrong with it.
    """
    if not len(graphs):
        raise InputError("there are no graphs")
    width = None
    bonds, labels = _shape(graphs[0].edge_attr), None
    for number, graph in enumerate(graphs, start=1):
        x, edges, y = graph.x, graph.edge_index, graph.y
        if x is None or x.ndim != 2 or len(x) == 0:
            raise InputError("the graph has no node features [n, D]", row=number, field="x")
        if width is not None and x.shape[1] != width:
            raise InputError(f"features of width {x.shape[1]}, {width} in the first graph", row=number, field="x")
        width = x.shape[1]
        if x.is_floating_point() and not bool(x.isfinite().all()):
            node = int(x.isfinite().all(1).int().argmin())
            raise InputError(f"x[{node}] is NaN or infinite", row=number, field="x")
        if edges is None or edges.ndim != 2 or len(edges) != 2:
            raise InputError("edges are not [2, e]", row=number, field="edge_index", remedy="Use [2, 0] for none")
        if edges.numel() and not 0 <= int(edges.min()) <= int(edges.max()) < len(x):
            raise InputError(f"an edge leads out of nodes 0..{len(x) - 1}", row=number, field="edge_index")
        if (own := _shape(graph.edge_attr)) != bonds:
            raise InputError(
                f"edge attributes are {own}, {bonds} in the first graph",
                row=number,
                field="edge_attr",
                remedy="Mend or remove",
            )
        if y is None or y.numel() == 0:
            raise InputError("the graph has no label", row=number, field="y")
        if labels is not None and y.numel() != labels:
            raise InputError(f"{y.numel()} labels, {labels} in the first graph", row=number, field="y")
        labels = y.numel()


def _shape(attributes: Tensor | None) -> str:
    """What the attributes of each edge are."""
    return "none" if attributes is None else str(["e", *attributes.shape[1:]]).replace("'", "")


def read_tu(folder: str | Path) -> list[Data]:
    """Graphs of a folder in the raw TU format; see `GraphTask.from_tu`."""
    from torch_geometric.data.separate import separate
    from torch_geometric.io import read_tu_data

    folder = Path(folder)
    needed = [folder / f"{folder.name}_{part}.txt" for part in ("A", "graph_indicator", "graph_labels")]
    if missing := [path for path in needed if not path.is_file()]:
        raise InputError("no such file", file=missing[0], remedy="Give the folder NAME that holds NAME_A.txt")
    try:
        data, slices, _ = read_tu_data(str(folder), folder.name)
    except (IndexError, ValueError) as error:
        raise InputError(
            f"cannot be read ({error})", file=folder, remedy="There must be edges, and labels are whole numbers"
        ) from error
    count = len(slices["y"]) - 1
    if len(data.y) != count:
        raise InputError(f"{len(data.y)} labels for {count} graphs that have nodes", file=needed[2])
    if data.x is None or data.x.shape[1] == 0:
        raise InputError(
            "has neither node labels nor node attributes", file=folder, remedy="Add features, and use from_graphs"
        )
    for name in {"edge_index", "edge_attr"} & set(slices):  # they end with the last graph that has edges
        ends = slices[name]
        slices[name] = torch.cat([ends, ends[-1:].expand(count + 1 - len(ends))])
    return [separate(Data, data, i, slices, decrement=False) for i in range(count)]


def _some(labels: Tensor, train: Sequence[int], shots: int) -> list[int]:
    """The first `shots` of each class, or in all where labels are binary."""
    shots = _whole(shots)
    if labels.ndim == 2:
        return list(train[:shots])
    taken: dict[int, list[int]] = defaultdict(list)
    for row in train:
        own = taken[int(labels[row])]
        if len(own) < shots:
            own.append(row)
    if few := [name for name in range(int(labels.max()) + 1) if len(taken[name]) < shots]:
        raise InputError(
            f"class {few[0]} has {len(taken[few[0]])} training graphs, {shots} are asked for", field="shots"
        )
    return [row for name in sorted(taken) for row in taken[name]]
