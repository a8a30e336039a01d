"""Graph data: files and data sets to batches.

    examples = read_smiles("bace.csv", "Class")                        # or read_graphs, read_tu
    task = GraphTask.from_examples(examples, split="scaffold", few_shot="relief", shots=50, seed=1)
    task = GraphTask.from_nodes(read_node_graph("cora.safetensors"), NodeRule(hops=4, min_size=5, max_size=150))

A `GraphTask` holds what a prompt needs besides its tensors to be used (`TaskSpec`, saved with the prompt) and the splits.
Batches are dicts: `graphs` (a `torch_geometric.data.Batch`), `labels` (long; [B] classes, or [B, C] of 1, 0 and -1 for
missing) and `sample_ids`.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch_geometric.data import Batch, Data

from pt_core.data import Split, class_names, encode_labels, read_table, stratified
from pt_core.data import few_shot as shots_per_class
from pt_core.errors import InputError
from pt_graph.molecules import molecule_graph, scaffold

Task = Literal["multilabel", "multiclass"]
Featuriser = Literal["pretrain-gnns", "minimol"]
METRICS = {"multilabel": ("roc-auc",), "multiclass": ("accuracy", "macro-f1")}
MISSING = -1
CODINGS = {
    "zero-one": {0.0: 0, 1.0: 1},
    "signed": {-1.0: 0, 0.0: MISSING, 1.0: 1},
}


class TaskSpec(BaseModel):
    """What turns an input into a graph and a prediction into an answer. Saved with every prompt."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: Task
    labels: tuple[str, ...] = Field(
        min_length=1, description="names of the binary tasks, or of the classes, in the order of the logits"
    )
    featuriser: Featuriser | None = Field(None, description="of SMILES; None: graphs come with their features")
    feature_width: int | None = Field(None, description="columns of `x`, where graphs come with their features")
    smiles_column: str = "smiles"
    label_column: str | None = Field(None, description="of the class; binary tasks are columns of their own names")
    coding: Literal["zero-one", "signed"] = "zero-one"


@dataclass
class Examples:
    """Graphs with labels, and where they come from.

    Args:
        spec: what they are.
        graphs: one `Data` each.
        labels: long; [n] classes, or [n, C] of 1, 0 and -1 (missing).
        ids: row number in the file (from 1), position in the data set (from 0), or number of the node.
        smiles: of molecules.
        left_out: (row, reason) of rows that were skipped.
    """

    spec: TaskSpec
    graphs: list[Data]
    labels: Tensor
    ids: list[int]
    smiles: list[str] | None = None
    left_out: list[tuple[int, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.graphs)

    def subset(self, indices: Sequence[int]) -> Examples:
        """The examples at `indices`, in that order."""
        return replace(
            self,
            graphs=[self.graphs[i] for i in indices],
            labels=self.labels[list(indices)],
            ids=[self.ids[i] for i in indices],
            smiles=None if self.smiles is None else [self.smiles[i] for i in indices],
        )


@dataclass
class GraphTask:
    """A task on graphs: its specification and its splits; each may be absent (for prediction none is needed)."""

    spec: TaskSpec
    train: Split | None = None
    validation: Split | None = None
    test: Split | None = None

    @classmethod
    def from_parts(cls, parts: Mapping[str, Examples]) -> GraphTask:
        """Splits that are given: `train`, `validation`, `test` -> examples of one specification.

        Raises:
            InputError: parts of different tasks, or graphs with different attributes.
        """
        first = next(iter(parts.values()))
        for name, part in parts.items():
            if part.spec != first.spec:
                raise InputError(
                    "is not of the same task as the other splits",
                    field=name,
                    remedy="Read it with the label names of the training part",
                )
        return cls(first.spec, **{name: as_split(part) for name, part in parts.items()})

    @classmethod
    def from_examples(
        cls,
        examples: Examples,
        *,
        split: Literal["scaffold", "random", "stratified"] | Mapping[str, Sequence[int]] = "scaffold",
        fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
        few_shot: Literal["relief", "gpf", "per-class"] | None = None,
        shots: float = 50,
        seed: int = 0,
    ) -> GraphTask:
        """Draw the splits.

        Args:
            split: "scaffold" (`scaffold_split`, no seed), "random" (`random_split`), "stratified" (`stratified_split`), or
                positions of the examples of each split.
            fractions: of training, validation and test.
            few_shot: which training examples are kept: "relief" (`relief_shots`), "gpf" (`gpf_shots`; scaffold split only)
                or "per-class" (`shots` of each class, `pt_core.data.few_shot`).
            shots: how many; for "relief" a number in (0, 1] is a share.
            seed: of random and stratified splits and of "relief" and "per-class".

        Raises:
            InputError: a split does not suit the examples, or leaves no training examples.
        """
        if isinstance(split, Mapping):
            parts = {name: list(indices) for name, indices in split.items()}
        elif split == "random":
            parts = random_split(len(examples), seed, fractions)
        elif split == "stratified":
            parts = stratified_split(_one_label(examples), seed, fractions)
        else:
            parts = scaffold_split(_scaffolds(examples), fractions)
        if few_shot == "relief":
            parts["train"] = relief_shots(parts["train"], shots, seed, len(examples), fractions[0])
        elif few_shot == "per-class":
            classes = range(2 if examples.spec.task == "multilabel" else len(examples.spec.labels))
            chosen = shots_per_class(_one_label(examples)[parts["train"]], int(shots), seed, classes)
            parts["train"] = [parts["train"][i] for i in chosen]
        elif few_shot == "gpf":
            if split != "scaffold":
                raise InputError(
                    "the few-shot rule of GPF goes by scaffolds", field="split", remedy="Split by scaffold"
                )
            parts["train"] = gpf_shots(_scaffolds(examples), int(shots), fractions)
        if not parts.get("train"):
            raise InputError("no examples are left to train on", field="split", remedy="Ask for more shots")
        return cls.from_parts({name: examples.subset(indices) for name, indices in parts.items() if indices})

    @torch.no_grad()
    def predict(self, method: Any, inputs: Sequence[Any], batch_size: int = 64) -> list[dict[str, Any]]:
        """Answers of a trained method: `label` and `scores` (multiclass), or `labels` and `scores` (multilabel).

        Args:
            method: with its prompt on the backbone.
            inputs: SMILES, or graphs with the features that the task has.

        Raises:
            InputError: an input is no valid SMILES, or not a graph of this task; with its row.
        """
        graphs = [self._graph(value, row) for row, value in enumerate(inputs, start=1)]
        device = next(method.backbone.parameters()).device
        method.eval()
        answers = list[dict[str, Any]]()
        for start in range(0, len(graphs), batch_size):
            part = graphs[start : start + batch_size]
            batch = {
                "graphs": Batch.from_data_list(part).to(device),
                "sample_ids": list(range(start, start + len(part))),
            }
            logits = method(batch).logits.float().cpu()
            multilabel = self.spec.task == "multilabel"
            for scores in logits.sigmoid() if multilabel else logits.softmax(-1):
                named = dict(zip(self.spec.labels, scores.tolist(), strict=True))
                if multilabel:
                    answers.append({"labels": [n for n, s in named.items() if s > 0.5], "scores": named})
                else:
                    answers.append({"label": max(named, key=named.__getitem__), "scores": named})
        return answers

    def _graph(self, value: Any, row: int) -> Data:
        if self.spec.featuriser is not None and isinstance(value, str):
            try:
                return _featuriser(self.spec.featuriser)(value)
            except InputError as error:
                raise InputError(str(error), row=row, field=self.spec.smiles_column) from error
        return check_graph(value, self.spec.feature_width, row)


# --- reading --------------------------------------------------------------------------------------------------------
def read_smiles(
    path: str | Path,
    labels: str | Sequence[str],
    *,
    smiles: str = "smiles",
    task: Task = "multilabel",
    names: Sequence[str] | None = None,
    coding: Literal["zero-one", "signed"] = "zero-one",
    featuriser: Featuriser = "pretrain-gnns",
    invalid: Literal["refuse", "skip"] = "refuse",
    unlabelled: Literal["refuse", "skip"] = "refuse",
) -> Examples:
    """Molecules of a table (CSV, TSV, JSONL, JSON, Parquet).

    Args:
        labels: the column of the class; or the columns of the binary tasks, one or more.
        smiles: the column of the SMILES.
        names: class names in the order of the logits; default: those in the file, sorted.
        coding: of binary labels: "zero-one" (an empty cell is missing), or "signed" (1, -1, and 0 or an empty cell is
            missing), as in the processed files of pretrain-gnns.
        featuriser: what the backbone reads.
        invalid, unlabelled: rows whose SMILES is no molecule of the featuriser, and rows without any label: named in an
            error, or left out, named in a warning and in `left_out`.

    Raises:
        InputError: the table is malformed; a label is not of the coding; rows are invalid or unlabelled and not skipped; no
            rows are left.
    """
    columns = [labels] if isinstance(labels, str) else list(labels)
    if not columns or (task == "multiclass" and len(columns) != 1) or len(set(columns)) < len(columns):
        raise InputError(f"{columns} cannot be label columns of a {task} task", field="labels")
    roles = {f"label {i}": column for i, column in enumerate(columns)}
    rows = read_table(path, {"smiles": smiles} | roles, text=())
    cells = [[row[role] for role in roles] for row in rows]
    if task == "multilabel":
        coded = [_coded(row, columns, coding, path, number) for number, row in enumerate(cells, start=1)]
        empty = [all(value == MISSING for value in row) for row in coded]
    else:
        empty = [_is_missing(row[0]) for row in cells]
    left_out = [(number, "no label") for number, none in enumerate(empty, start=1) if none]
    _leave_out(left_out, unlabelled, path, ", ".join(columns), "unlabelled")

    make, graphs, kept, bad = _featuriser(featuriser), list[Data](), list[int](), list[tuple[int, str]]()
    for i, row in enumerate(rows):
        if empty[i]:
            continue
        try:
            graphs.append(make("" if row["smiles"] is None else str(row["smiles"]).strip()))
            kept.append(i)
        except InputError as error:
            bad.append((i + 1, str(error)))
    _leave_out(bad, invalid, path, smiles, "invalid")
    if not graphs:
        raise InputError("no rows are left", file=path)
    if task == "multiclass":
        given = [row[0] for row in cells]
        names = names or class_names([given[i] for i in kept], path)
        encoded = dict(zip(kept, encode_labels([given[i] for i in kept], names, path), strict=True))
        values = torch.tensor([encoded[i] for i in kept])
    else:
        names, values = columns, torch.tensor([coded[i] for i in kept])
    spec = TaskSpec(
        task=task,
        labels=tuple(names),
        featuriser=featuriser,
        smiles_column=smiles,
        label_column=columns[0] if task == "multiclass" else None,
        coding=coding,
    )
    texts = [str(rows[i]["smiles"]).strip() for i in kept]
    return Examples(spec, graphs, values, [i + 1 for i in kept], texts, sorted(left_out + bad))


def _featuriser(name: Featuriser) -> Callable[[str], Data]:
    if name == "minimol":
        from pt_graph.minimol import minimol_graph

        return minimol_graph
    return molecule_graph


def _is_missing(cell: Any) -> bool:
    return (
        cell is None or (isinstance(cell, str) and not cell.strip()) or (isinstance(cell, float) and math.isnan(cell))
    )


def _coded(row: Sequence[Any], columns: Sequence[str], coding: str, path: str | Path, number: int) -> list[int]:
    """Binary labels of a row as 1, 0, -1 (missing)."""
    values = []
    for cell, column in zip(row, columns, strict=True):
        if _is_missing(cell):
            values.append(MISSING)
            continue
        try:
            values.append(CODINGS[coding][float(cell)])
        except (ValueError, TypeError, KeyError) as error:
            known = "0, 1 or empty (missing)" if coding == "zero-one" else "-1, 1, or 0 (missing)"
            other = "signed" if coding == "zero-one" else "zero-one"
            raise InputError(
                f"label {cell!r} is not {known}",
                remedy=f"Mend the label, or read with coding={other!r} if the file is coded so",
                file=path,
                row=number,
                field=column,
            ) from error
    return values


def _leave_out(rows: Sequence[tuple[int, str]], rule: str, path: str | Path, column: str, option: str) -> None:
    """Refuse rows, or warn of them; all are named, up to twenty."""
    if not rows:
        return
    listed = "; ".join(f"row {row}: {reason}" for row, reason in rows[:20])
    listed += f"; and {len(rows) - 20} more" if len(rows) > 20 else ""
    if rule == "refuse":
        raise InputError(
            f"{len(rows)} {option} row{'s' * (len(rows) > 1)} ({listed})",
            remedy=f'Mend them, or leave them out with {option}="skip"',
            file=path,
            row=rows[0][0],
            field=column,
        )
    warnings.warn(f"{path}: {len(rows)} {option} rows are left out ({listed})", stacklevel=3)


def read_graphs(
    graphs: Iterable[Data],
    *,
    labels: Sequence[str] | None = None,
    task: Task | None = None,
    unlabelled: Literal["refuse", "skip"] = "refuse",
) -> Examples:
    """Graphs in memory: an `InMemoryDataset` of PyG, or any sequence of `Data` with `x`, `edge_index` and `y`.

    `y` is one whole number, the class (-1: missing); or [C] or [1, C] of 1, 0 and -1 or NaN for missing.

    Args:
        labels: names of classes or tasks; default: their numbers.
        task: default: multiclass where every `y` is one number, unless one is NaN or a fraction.
        unlabelled: graphs without any label: named in an error, or left out.

    Raises:
        InputError: as `check_graph`; a label that is no class or not 0, 1 or missing; labels of different widths.
    """
    found = list(graphs)
    if not found:
        raise InputError("there are no graphs", field="graphs")
    width = getattr(found[0].x, "shape", (0, None))[-1]
    checked = [check_graph(graph, width, row) for row, graph in enumerate(found, start=1)]
    ys = [_label_row(graph, row) for row, graph in enumerate(found, start=1)]
    if len({len(y) for y in ys}) > 1:
        row = next(i for i, y in enumerate(ys) if len(y) != len(ys[0]))
        raise InputError(f"{len(ys[row])} labels, the first graph has {len(ys[0])}", row=row + 1, field="y")
    values = torch.stack(ys)
    task = task or ("multiclass" if values.shape[1] == 1 else "multilabel")
    values = torch.where(values.isnan(), MISSING, values)
    if task == "multiclass" and values.shape[1] != 1:
        raise InputError(f"{values.shape[1]} labels a graph cannot be one class", field="y", remedy="Use multilabel")
    count = len(labels) if labels is not None else int(values.max()) + 1 if task == "multiclass" else values.shape[1]
    wrong = (values != values.round()) | (values < MISSING) | (values > (count - 1 if task == "multiclass" else 1))
    if bool(wrong.any()):
        row = int(wrong.any(1).nonzero()[0])
        known = f"a class from 0 to {count - 1}" if task == "multiclass" else "0, 1 or -1 (missing)"
        raise InputError(f"label {float(values[row][wrong[row]][0]):g} is not {known}", row=row + 1, field="y")
    if (task == "multilabel" and count != values.shape[1]) or (task == "multiclass" and count < 2):
        raise InputError(f"{count} names for {values.shape[1]} labels, or less than two classes", field="labels")
    none = [(i + 1, "no label") for i in (values == MISSING).all(1).nonzero().flatten().tolist()]
    _leave_out(none, unlabelled, "graphs", "y", "unlabelled")
    names = tuple(labels) if labels is not None else tuple(str(c) for c in range(count))
    values = values.long()
    examples = Examples(
        TaskSpec(task=task, labels=names, feature_width=width),
        checked,
        values[:, 0] if task == "multiclass" else values,
        list(range(len(checked))),
        left_out=none,
    )
    gone = {row - 1 for row, _ in none}
    return examples.subset([i for i in range(len(checked)) if i not in gone]) if gone else examples


def _label_row(graph: Data, row: int) -> Tensor:
    y = graph.y
    if y is None:
        raise InputError("the graph has no label", row=row, field="y")
    return torch.as_tensor(y, dtype=torch.double).reshape(-1)


def check_graph(graph: Any, width: int | None = None, row: int | None = None) -> Data:
    """A copy without its label, checked; a graph without edges has `edge_index` [2, 0].

    Args:
        width: of `x`; None accepts any.
        row: for messages.

    Raises:
        InputError: no nodes, no features, features of another width or not finite, or edges that do not fit.
    """
    if not isinstance(graph, Data):
        raise InputError(f"a graph was expected, not {type(graph).__name__}", row=row)
    x, edges = graph.x, graph.edge_index
    if x is None or x.ndim != 2 or not len(x):
        shape = "none" if x is None else list(x.shape)
        raise InputError(
            f"node features [n, D] are needed, the graph has {shape}",
            row=row,
            field="x",
            remedy="Without features of your own use a transform of PyG, such as OneHotDegree or Constant",
        )
    if width is not None and x.shape[1] != width:
        raise InputError(f"{x.shape[1]} features a node, {width} were expected", row=row, field="x")
    if x.is_floating_point() and not bool(x.isfinite().all()):
        raise InputError("a feature is NaN or infinite", row=row, field="x")
    if edges is None:
        edges = torch.empty(2, 0, dtype=torch.long)
    if edges.ndim != 2 or edges.shape[0] != 2 or edges.is_floating_point():
        raise InputError(f"edges are [2, e] whole numbers, not {list(edges.shape)}", row=row, field="edge_index")
    if edges.numel() and not 0 <= int(edges.min()) <= int(edges.max()) < len(x):
        raise InputError(f"an edge names a node outside of 0 to {len(x) - 1}", row=row, field="edge_index")
    if graph.edge_attr is not None and len(graph.edge_attr) != edges.shape[1]:
        raise InputError(f"{len(graph.edge_attr)} rows for {edges.shape[1]} edges", row=row, field="edge_attr")
    made = graph.clone()
    made.edge_index = edges.long()
    if "y" in made:
        del made["y"]
    return made


def as_split(examples: Examples) -> Split:
    """Examples as a split; lengths are numbers of nodes."""
    keys = {frozenset(graph.keys()) for graph in examples.graphs}
    if len(keys) > 1:
        differing = sorted(frozenset.union(*keys) - frozenset.intersection(*keys))
        raise InputError(f"only some graphs have {', '.join(differing)}", remedy="Give it to all graphs or to none")
    return Split(
        rows=list(zip(examples.graphs, examples.labels, strict=True)),
        collate=collate,
        metrics=METRICS[examples.spec.task],
        task=examples.spec.task,
        num_classes=len(examples.spec.labels),
        lengths=[int(graph.num_nodes or 0) for graph in examples.graphs],
        ids=examples.ids,
        missing=MISSING if examples.spec.task == "multilabel" else None,
    )


def collate(rows: Sequence[tuple[Data, Tensor]]) -> dict[str, Any]:
    """(graph, label) rows as a batch."""
    return {
        "graphs": Batch.from_data_list([graph for graph, _ in rows]),
        "labels": torch.stack([label for _, label in rows]),
    }


# --- splits ---------------------------------------------------------------------------------------------------------
Fractions = tuple[float, float, float]


def scaffold_groups(scaffolds: Sequence[str]) -> list[list[int]]:
    """Positions of each scaffold, the largest group first; among equals, the one whose first molecule comes last."""
    groups: dict[str, list[int]] = {}
    for i, name in enumerate(scaffolds):
        groups.setdefault(name, []).append(i)
    return sorted(groups.values(), key=lambda group: (len(group), group[0]), reverse=True)


def scaffold_split(scaffolds: Sequence[str], fractions: Fractions = (0.8, 0.1, 0.1)) -> dict[str, list[int]]:
    """Positions of training, validation and test: whole scaffold groups, the largest to training. There is no seed.

    A group goes to training while training keeps within its fraction, else to validation while both keep within theirs,
    else to test; a later, smaller group may still fit in an earlier part.

    Source: pretrain-gnns, chem/splitters.py (after MoleculeNet).
    """
    parts: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for group in scaffold_groups(scaffolds):
        parts[_part(group, parts, len(scaffolds), fractions)] += group
    return parts


def _part(group: list[int], parts: Mapping[str, list[int]], total: int, fractions: Fractions) -> str:
    if len(parts["train"]) + len(group) <= fractions[0] * total:
        return "train"
    if len(parts["train"]) + len(parts["validation"]) + len(group) <= (fractions[0] + fractions[1]) * total:
        return "validation"
    return "test"


def random_split(total: int, seed: int, fractions: Fractions = (0.8, 0.1, 0.1)) -> dict[str, list[int]]:
    """Positions of training, validation and test (the rest), in the shuffled order of pretrain-gnns' `random_split`."""
    order = list(range(total))
    random.Random(seed).shuffle(order)
    train, validation = int(fractions[0] * total), int(fractions[1] * total)
    return {
        "train": order[:train],
        "validation": order[train : train + validation],
        "test": order[train + validation :],
    }


def stratified_split(labels: Tensor, seed: int, fractions: Fractions = (0.8, 0.1, 0.1)) -> dict[str, list[int]]:
    """Positions of training (the rest), validation and test in class proportion, sorted (`pt_core.data.stratified`)."""
    total = len(labels)
    test = stratified(labels, round(fractions[2] * total), seed)
    validation = stratified(labels, round(fractions[1] * total), seed, exclude=test)
    held = {*test, *validation}
    return {"train": [i for i in range(total) if i not in held], "validation": validation, "test": test}


def relief_shots(train: Sequence[int], shots: float, seed: int, total: int, fraction: float = 0.8) -> list[int]:
    """RELIEF's few-shot rule: shuffle the training part with Python's generator, take the first `shots`.

    Args:
        shots: how many; a number in (0, 1] is a share of `fraction * total`, rounded down.
        total, fraction: number of all molecules, and the share of them that training was given.

    Source: JasonZhujp/RELIEF, graph_level/splitters.py.
    """
    if shots <= 0:
        raise InputError(f"{shots} shots", field="shots", remedy="Give a number, or a share in (0, 1]")
    order = list(train)
    random.Random(seed).shuffle(order)
    return order[: int(shots * fraction * total if shots <= 1 else shots)]


def gpf_shots(scaffolds: Sequence[str], shots: int, fractions: Fractions = (0.8, 0.1, 0.1)) -> list[int]:
    """GPF's few-shot rule: walk the scaffold groups of training from the largest, add a whole group only while the total
    stays within `shots`. There is no seed.

    Source: zjunet/GPF, chem/splitters.py.
    """
    parts: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    chosen: list[int] = []
    for group in scaffold_groups(scaffolds):
        part = _part(group, parts, len(scaffolds), fractions)
        parts[part] += group
        if part == "train" and len(chosen) + len(group) <= shots:
            chosen += group
    return chosen


def _scaffolds(examples: Examples) -> list[str]:
    if examples.smiles is None:
        raise InputError("a scaffold split needs molecules", field="split", remedy='Use "random" or "stratified"')
    return [scaffold(smiles) for smiles in examples.smiles]


def _one_label(examples: Examples) -> Tensor:
    labels = examples.labels if examples.labels.ndim == 1 else examples.labels[:, 0]
    if examples.labels.ndim == 2 and examples.labels.shape[1] > 1:
        raise InputError("this draw goes by one label, there are several", field="split", remedy='Use "random"')
    return labels
