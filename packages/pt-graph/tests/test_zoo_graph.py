"""The GIN that ships: small, described, better than an untrained one, and made without the demo's test scaffolds."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch_geometric.data import Batch

import pt_graph.backbones
from pt_core.assets import Unavailable
from pt_graph.backbones import ChemGNN, GraphBackbone, load_backbone

FOLDER = Path(pt_graph.backbones.__file__).parent / "zoo" / "chem-gin"
BUILDER = Path(__file__).parents[3] / "tooling" / "zoo" / "graph.py"


@pytest.fixture(scope="module")
def builder() -> Any:
    pytest.importorskip("rdkit")
    if not BUILDER.is_file():
        pytest.skip("the builder is in the repository, not in the package")
    spec = importlib.util.spec_from_file_location("zoo_graph", BUILDER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def table() -> list[dict[str, Any]]:
    pytest.importorskip("rdkit")
    from pt_graph.assets import b3db

    try:
        return b3db()
    except Unavailable as reason:
        pytest.skip(str(reason))


def test_the_gin_is_at_most_8_mb_and_has_its_card() -> None:
    backbone = load_backbone("zoo:chem-gin")
    assert isinstance(backbone, ChemGNN)
    assert sum(p.numel() for p in backbone.parameters()) == 1_857_900
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 8e6
    card = (FOLDER / "README.md").read_text("utf-8")
    assert all(word in card for word in ("tooling/zoo/graph.py", "B3DB", "CC0", "untrained", "test"))
    assert not backbone.training


@pytest.mark.network
def test_a_probe_on_it_beats_one_on_an_untrained_gin(table: list[dict[str, Any]]) -> None:
    from pt_graph.data import read_smiles, scaffold_split

    read = read_smiles(table[::6], ["permeable"], invalid="skip")
    train, validation, test = scaffold_split(read.smiles)
    labels = read.labels[:, 0].numpy()

    @torch.no_grad()
    def auc(backbone: GraphBackbone, rows: Sequence[int]) -> float:
        batch = Batch.from_data_list(read.graphs)
        features = backbone.readout(backbone(batch), batch).numpy()
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
        model.fit(features[train], labels[train])
        return float(roc_auc_score(labels[rows], model.predict_proba(features[rows])[:, 1]))

    held_out = [*validation, *test]
    torch.manual_seed(0)
    assert auc(load_backbone("zoo:chem-gin"), held_out) > auc(ChemGNN().eval(), held_out) + 0.05


def test_the_pool_leaves_out_held_out_scaffolds_small_molecules_and_what_cannot_be_read(builder: Any) -> None:
    smiles = ["CCc1ccccc1", "c1ccccc1CC", "OCC1CCCCC1", "CC(=O)NC", "CC", "C1CC", "*CCCCC", "C[C@H](N)C(=O)O"]
    assert builder.pool(smiles, {"C1CCCCC1"}) == ["CCc1ccccc1", "CNC(C)=O", "C[C@H](N)C(=O)O"]


@pytest.mark.network
def test_no_test_molecule_of_the_demo_gets_into_the_pool(builder: Any, table: list[dict[str, Any]]) -> None:
    from pt_graph.data import GraphTask
    from pt_graph.molecules import scaffold

    read = builder.read_smiles(table[::8], ["permeable"], invalid="skip")
    task = GraphTask.from_smiles(read, ["permeable"])  # what the demo's recipe makes
    assert task.test is not None and task.smiles is not None and task.test.ids is not None
    tested = [task.smiles[int(i)] for i in task.test.ids]
    train, validation, test = builder.scaffold_split(read.smiles)
    held_out = {scaffold(read.smiles[i]) for i in [*validation, *test]}
    assert {scaffold(text) for text in tested} <= held_out
    assert builder.pool(tested, held_out) == []
    kept = builder.pool([read.smiles[i] for i in train[:150]], held_out)
    assert len(kept) > 100
    assert not {scaffold(text) for text in kept} & {scaffold(text) for text in tested}


def test_the_probe_tells_separable_embeddings(builder: Any) -> None:
    labels = np.arange(200) % 2
    features = np.random.default_rng(0).normal(size=(200, 5)) + 3 * labels[:, None]
    scores = builder.probe(features, labels, list(range(150)), list(range(150, 200)))
    assert scores["full"] > 0.99
    assert 0.9 < scores["50 shots"] <= scores["full"]
