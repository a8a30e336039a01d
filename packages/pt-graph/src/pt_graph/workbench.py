"""What the command line does for graphs: recipes to jobs, artifacts to predictions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, ValidationError, field_validator, model_validator

from pt_core import artifacts, recipe, registry
from pt_core.data import Split, read_table
from pt_core.errors import InputError
from pt_core.evaluation import evaluate
from pt_core.frozen import fingerprint
from pt_core.method import Method
from pt_core.plan import FitConfig
from pt_core.runs import Job
from pt_core.settings import Settings
from pt_graph import assets
from pt_graph.backbones import GraphBackbone, backbone_config, load_backbone
from pt_graph.data import (
    GraphSpec,
    GraphTask,
    Molecules,
    answers,
    featurisers,
    make_split,
    node_subgraphs,
    read_nodes,
    read_smiles,
    read_tu,
)
from pt_graph.methods.relief import RELIEF, setting, with_prompt_metrics
from pt_graph.minimol import load_minimol

DATA_ASSETS = {"asset:b3db": assets.b3db}


class GraphModel(Settings):
    """Which frozen model."""

    name: str = Field(
        description="zoo:chem-gin (ships with pt-graph), asset:minimol (inside a published package), a folder of "
        "save_backbone, or a safetensors file, which needs `config`"
    )
    config: dict[str, Any] | None = Field(
        None, description="what the weights of a bare file are: {kind: chem, conv: gcn}, {kind: node-gin, width: 128}"
    )

    @field_validator("config")
    @classmethod
    def _known(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None:
            backbone_config(value)
        return value

    def load(self) -> GraphBackbone:
        if self.name == "asset:minimol":
            return load_minimol()
        return load_backbone(self.name, None if self.config is None else backbone_config(self.config))


class GraphData(Settings):
    """Which graphs, what their labels are, and which of them train."""

    kind: Literal["molecules", "nodes", "graphs"] = Field(
        "molecules", description="a table with SMILES; nodes of one graph; a folder in TU format"
    )
    train: str = Field(description=f"file or folder; or {', '.join(DATA_ASSETS)} (inside a published package)")
    labels: tuple[str, ...] = Field((), description="columns with labels (molecules), or names of the classes")
    smiles: str = Field("smiles", description="column with SMILES")
    multiclass: bool = Field(False, description="of molecules: the one label column names a class, not a binary task")
    coding: Literal["zero-one", "signed"] = Field("zero-one", description="0, 1, empty; or -1, 0 (missing), 1")
    invalid: Literal["refuse", "skip"] = Field("refuse", description="SMILES that cannot be read")
    unlabelled: Literal["refuse", "drop"] = Field("refuse", description="molecules without any label")
    split: Literal["scaffold", "random"] = Field(
        "scaffold", description="of molecules; scaffold: pretrain-gnns, no seed"
    )
    few_shot: Literal["relief", "gpf"] | None = Field(None, description="rule by which training molecules are drawn")
    shots: float | None = Field(
        None,
        gt=0,
        description="molecules in all (relief: up to 1, a share; 1: all of the training part); nodes, or graphs, of each class",
    )
    split_seed: int | None = Field(None, ge=0, description="of splits and draws; default: the run's own seed")
    hops: int | None = Field(None, ge=1, description="of node tasks: subgraph of all nodes at most this far away")
    min_nodes: int = Field(1, ge=1, description="nodes with smaller subgraphs are left out")
    max_nodes: int | None = Field(None, ge=1, description="nodes with larger subgraphs are left out")
    neighbours: tuple[int, ...] = Field((), description="in-neighbours drawn at each hop; empty: all")
    validation_nodes: int = Field(500, ge=0, description="RELIEF, node_level")
    test_nodes: int = Field(500, ge=1, description="RELIEF, node_level")
    max_validation: int | None = Field(
        None, ge=1, description="of the validation part, so many drawn by the split's seed"
    )
    max_test: int | None = Field(None, ge=1, description="of the test part, so many drawn by the split's seed")

    @field_validator("train")
    @classmethod
    def _exists(cls, value: str) -> str:
        if value.startswith("asset:") and value not in DATA_ASSETS:
            raise ValueError(f"no such asset; there are {', '.join(DATA_ASSETS)}")
        if not value.startswith("asset:") and not Path(value).exists():
            raise ValueError("no such file or folder")
        return value

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if self.kind == "molecules" and not self.labels:
            raise ValueError("name the columns with labels: data.labels")
        if self.kind == "nodes" and self.hops is None:
            raise ValueError("node tasks need data.hops")
        if self.few_shot and (self.kind != "molecules" or self.shots is None):
            raise ValueError("few_shot is a rule for molecules, and needs shots")
        if self.kind == "molecules" and self.shots is not None and self.few_shot is None:
            raise ValueError("shots of molecules need a rule by which they are drawn: data.few_shot")
        if self.shots is not None and self.shots % 1 and (self.few_shot != "relief" or self.shots > 1):
            raise ValueError("shots are whole: a share of the training part is for few_shot: relief, up to 1")
        return self

    def read(self, featuriser: str) -> Any:
        """What all seeds share: molecules, the large graph, or the graphs."""
        if self.kind == "molecules":
            source = DATA_ASSETS[self.train]() if self.train in DATA_ASSETS else self.train
            options = self.model_dump(include={"smiles", "coding", "invalid", "unlabelled"})
            options["task"] = "multiclass" if self.multiclass else "multilabel"
            return read_smiles(source, self.labels, featuriser=featuriser, **options)
        return read_nodes(self.train) if self.kind == "nodes" else read_tu(self.train)

    def task(self, read: Any, seed: int, featuriser: str) -> GraphTask:
        """The task of one seed."""
        seed = self.split_seed if self.split_seed is not None else seed
        task = self._task(read, seed, featuriser)
        task.validation = _at_most(task.validation, self.max_validation, seed)
        task.test = _at_most(task.test, self.max_test, seed)
        return task

    def _task(self, read: Any, seed: int, featuriser: str) -> GraphTask:
        if isinstance(read, Molecules):
            options = self.model_dump(include={"split", "few_shot"}) | {"shots": self.shots or 50, "seed": seed}
            return GraphTask.from_smiles(read, self.labels, featuriser=featuriser, **options)  # type: ignore[arg-type]
        labels = self.labels or None
        if self.kind == "nodes":
            options = self.model_dump(include={"hops", "min_nodes", "max_nodes", "neighbours", "validation_nodes"})
            options |= {"test_nodes": self.test_nodes, "shots": int(self.shots or 10), "seed": seed, "labels": labels}
            return GraphTask.from_nodes(read, **options)
        shots = None if self.shots is None else int(self.shots)
        return GraphTask.from_graphs(read, labels=labels, coding=self.coding, shots=shots, seed=seed)


class Recipe(recipe.Recipe):
    """A recipe for graphs."""

    package = "graph"
    told_elsewhere: ClassVar[Mapping[str, str]] = {
        "num_outputs": "the data say it: as many as data.labels",
        "task": "the data say it: data.kind and data.multiclass",
    }

    backbone: GraphModel
    data: GraphData
    setting: str | None = Field(
        None,
        description="a published run of RELIEF (bbbp-infomax, cora-edge-prediction ...), whose values fill what is open",
    )

    @model_validator(mode="before")
    @classmethod
    def _published(cls, content: Any) -> Any:
        """Put the values of a published run where the recipe leaves them open."""
        if not isinstance(content, dict) or not isinstance(content.get("setting"), str):
            return content
        known = setting(content["setting"])
        rule = {k: v for k, v in known["data"].items() if k not in ("data", "pretraining") and v is not None}
        method = {k: v for k, v in known["method"].items() if k not in ("num_outputs", "task")}
        node = method["level"] == "node"
        rule |= {"kind": "nodes"} if node else {"kind": "molecules", "few_shot": "relief", "unlabelled": "drop"}
        plain = {
            "data": rule,
            "training": known["training"],
            "backbone": {"config": {"kind": "node-gin" if node else "chem"}},
        }
        filled = {key: {**values, **(content.get(key) or {})} for key, values in plain.items()}
        chosen = content.get("method")
        if isinstance(chosen, dict) and chosen.get("name") == "relief":
            filled["method"] = {**method, **chosen}
        return {**content, **filled}

    def config(self, section: str = "method", **known: Any) -> Any:
        # What only the data can tell is not known yet when a recipe is checked.
        return super().config(section, **({"num_outputs": max(len(self.data.labels), 1)} | known))


class Bench:
    """Backbone and graphs of a recipe, loaded once and used by all its runs."""

    def __init__(self, checked: Recipe) -> None:
        self.recipe, self.backbone = checked, checked.backbone.load()
        self.featuriser = _featuriser(self.backbone)
        self.read = checked.data.read(self.featuriser)
        self._tasks: dict[int, GraphTask] = {}
        self._weights = fingerprint(self.backbone, full=False, config=True)  # before a method is on it

    @property
    def identity(self) -> dict[str, Any]:
        """What backbone and data are, as JSON; weights by their hash, rows by that of their contents and of what trains."""
        task = self.task(self.recipe.seed)
        parts = {"train": task.train, "validation": task.validation, "test": task.test}
        ids = json.dumps({name: list(part.ids or ()) if part else [] for name, part in parts.items()})
        rows = hashlib.sha256(ids.encode())
        for part in _contents(self.read):
            rows.update(part)
        known = {"rows": rows.hexdigest(), "weights": self._weights}
        return self.recipe.model_dump(mode="json", include={"backbone", "data"}) | known

    def task(self, seed: int) -> GraphTask:
        if seed not in self._tasks:
            self._tasks[seed] = self.recipe.data.task(self.read, seed, self.featuriser)
        return self._tasks[seed]

    def job(self, label: str, seed: int) -> tuple[Job, FitConfig]:
        """The run of one method with one seed."""
        chosen, task = self.recipe.with_method(label), self.task(seed)
        known: dict[str, Any] = {"num_outputs": len(task.spec.labels), "task": task.spec.task, "seed": seed}
        known |= {"level": "node" if task.spec.kind == "nodes" else "graph"}
        cls = registry.find_method("graph", chosen.method.name)
        backbone = self.backbone if cls.frozen_backbone else self.recipe.backbone.load()
        method = cls(backbone, chosen.config(**known))
        test = task.test
        if isinstance(method, RELIEF) and test is not None:
            test = with_prompt_metrics(test)
        source = self.recipe.backbone
        spec = task.spec.model_copy(update={"backbone": source.config})
        job = Job(
            method,
            task.train,
            task.validation,
            test,
            task=spec.model_dump(mode="json"),
            backbone_name=None if Path(source.name).exists() else source.name,  # a path stays on this machine
        )
        return job, chosen.training.model_copy(update={"seed": seed})


class Session:
    """A trained prompt on its backbone."""

    def __init__(self, method: Method, spec: GraphSpec) -> None:
        self.method, self.spec = method, spec

    def inputs(self, file: Path, text: str = "text") -> list[Any]:
        """Molecules: SMILES in the column `text`. Nodes: the graph's file; every node whose subgraph is in range."""
        if self.spec.kind == "nodes":
            return list(self._subgraphs(file).items())
        self._only_molecules()
        return [row["text"] for row in read_table(file, {"text": text})]

    @torch.no_grad()
    def predict(self, inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """The probability of every task or class, for each SMILES, or for each (node, subgraph) of `inputs`."""
        if self.spec.kind == "nodes":
            if not all(isinstance(item, tuple) for item in inputs):
                raise InputError(
                    "nodes are predicted with their graph", remedy="Give its file: --data graph.safetensors"
                )
            names, graphs = [node for node, _ in inputs], [graph for _, graph in inputs]
        else:
            self._only_molecules()
            make, names = featurisers()[self.spec.featuriser], list(inputs)
            graphs = [make(text) for text in names]
        width = len(self.spec.labels)
        blank = torch.zeros(len(graphs), *(() if self.spec.task == "multiclass" else (width,)), dtype=torch.long)
        rows = make_split(graphs, blank, list(range(len(graphs))), self.spec)
        # What a method draws follows from the input, not from its place among others.
        rows = replace(rows, ids=[str(name) for name in names])
        logits = torch.cat([self.method.eval()(batch).logits for batch in rows.batches(64)])
        shown = "node" if self.spec.kind == "nodes" else "smiles"
        return [{shown: name} | told for name, told in zip(names, answers(self.spec, logits.float()), strict=True)]

    def evaluate(self, file: Path, text: str = "text", label: str = "label") -> dict[str, float]:
        """Metrics on a table with SMILES in the column `text` and the prompt's own label columns (with one task: `label`), or
        on the labelled nodes of a graph's file."""
        if self.spec.kind == "nodes":
            graph, found = read_nodes(file), self._subgraphs(file)
            nodes = [node for node in found if int(graph.y[node]) >= 0]
            return evaluate(self.method, make_split([found[n] for n in nodes], graph.y[nodes], nodes, self.spec))
        self._only_molecules()
        spec = self.spec
        known: dict[str, Any] = spec.model_dump(include={"featuriser", "coding", "invalid", "unlabelled"})
        columns = [label] if len(spec.labels) == 1 else list(spec.labels)
        if spec.task == "multiclass":
            columns, known = [label], known | {"task": "multiclass", "classes": spec.labels}
        read = read_smiles(file, columns, smiles=text, **known)
        return evaluate(self.method, make_split(read.graphs, read.labels, read.rows, self.spec))

    def _subgraphs(self, file: Path) -> Mapping[int, Any]:
        s = self.spec
        return node_subgraphs(read_nodes(file), s.hops or 1, s.min_nodes, s.max_nodes, s.neighbours, s.seed)

    def _only_molecules(self) -> None:
        if self.spec.kind != "molecules":
            raise InputError(
                f"the prompt was trained on {self.spec.kind}", remedy="Call the method on batches of them, from Python"
            )


def open_artifact(artifact: artifacts.Artifact, backbone: str | None = None) -> Session:
    """Load the backbone of an artifact (its own, unless another is named) and put the prompt on it.

    Raises:
        InputError: the artifact was saved without its task, or its backbone cannot be loaded.
    """
    spec, name = recipe.opened(artifact, GraphSpec, backbone)
    recipe.check_head(artifact, len(spec.labels), artifact.config.method_config.get("num_outputs"))
    try:
        source = GraphModel(name=name, config=spec.backbone)
    except ValidationError as error:
        raise recipe.explain(error, GraphModel, "task", artifact.folder) from error
    return Session(artifacts.load(artifact.folder, source.load()), spec)


def demo(folder: Path, seeds: int | None, shots: int | None, data: Path | None) -> None:
    """`pt demo graph`."""
    from pt_graph.demo import run

    run(folder, seeds=seeds or 3, shots=shots or 50, data=data)


def _at_most(split: Split | None, count: int | None, seed: int) -> Split | None:
    """At most `count` rows of a split, drawn by `seed`, in their order."""
    if split is None or count is None or len(split) <= count:
        return split
    return split.subset(sorted(np.random.default_rng((seed, len(split))).permutation(len(split))[:count].tolist()))


def _contents(read: Any) -> Iterator[bytes]:
    """Bytes of what `GraphData.read` gave: SMILES and labels of molecules, all tensors of graphs."""
    if isinstance(read, Molecules):
        yield json.dumps([read.smiles, read.labels.tolist(), read.classes]).encode()
        return
    for graph in read if isinstance(read, list) else [read]:
        for name, value in sorted(graph.to_dict().items()):
            if isinstance(value, torch.Tensor):
                yield f"{name} {value.dtype} {list(value.shape)}".encode()
                yield value.contiguous().numpy().tobytes()


def _featuriser(backbone: GraphBackbone) -> Literal["chem", "minimol"]:
    return "minimol" if backbone.config.kind == "minimol" else "chem"
