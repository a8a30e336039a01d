"""MiniMol: fingerprints are the published ones, graphs are what it was trained on, prompts enter after its input encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch_geometric.data import Batch

from pt_core import InputError, attach
from pt_core.assets import Unavailable
from pt_graph.methods.gpf import GPFPrompt

pytest.importorskip("rdkit")
from pt_graph.minimol import MiniMol, load_minimol, minimol_graph

GOLDEN = Path(__file__).parent / "golden" / "minimol.safetensors"


def batch(*smiles: str) -> Any:
    return Batch.from_data_list([minimol_graph(text) for text in smiles])


@pytest.fixture
def small() -> MiniMol:
    torch.manual_seed(0)
    return MiniMol(width=16, layers=3, out=24).eval()


@pytest.mark.network
def test_fingerprints_are_those_of_the_published_onnx_export() -> None:
    with safe_open(GOLDEN, "pt") as file:
        smiles, wanted = json.loads(file.metadata()["smiles"]), file.get_tensor("fingerprints")
    try:
        backbone = load_minimol()
    except Unavailable as reason:
        pytest.skip(str(reason))
    graphs = batch(*smiles)
    assert sum(p.numel() for p in backbone.parameters()) == 7_919_928
    with torch.no_grad():
        found = backbone.readout(backbone(graphs), graphs)
    assert found.shape == (len(smiles), 512)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_an_atom_has_85_features_and_a_bond_13() -> None:
    ethanol = minimol_graph("CCO")
    assert ethanol.x.shape == (3, 85)
    assert ethanol.edge_attr.shape == (4, 13)
    oxygen = ethanol.x[(ethanol.x[:, 5 + 2] == 1).nonzero()[0, 0]]
    set_ones = oxygen.nonzero()[:, 0].tolist()
    assert set_ones == [
        5 + 2,
        49 + 15,
        69 + 1,
        77 + 2,
    ]  # third element, group 16, period 2, valence 2; total degree 2 is 0
    assert ethanol.edge_attr[0].nonzero()[:, 0].tolist() == [0, 5]  # single, no stereo, not in a ring


@pytest.mark.parametrize(
    ("smiles", "group", "period"), [("[La]", 3, 6), ("[Yb]", 19, 6), ("[Hg]", 12, 6), ("[He]", 18, 1), ("[Ag]", 11, 5)]
)
def test_groups_and_periods_are_those_of_the_periodic_table(smiles: str, group: int, period: int) -> None:
    atom = minimol_graph(smiles).x[0]
    assert atom[49:69].nonzero()[0, 0] + 1 == group
    assert atom[69:77].nonzero()[0, 0] + 1 == period


def test_eigenpairs_are_those_of_each_fragments_laplacian() -> None:
    values = torch.tensor([0.0, 1.0, 3.0])  # of a path of three
    pairs = minimol_graph("CCO.[Na+]").eigenpairs
    path = pairs[pairs[:, 1, 0] > 0.5]
    torch.testing.assert_close(path[0, :3, 0], values, atol=1e-3, rtol=0)
    assert bool((pairs[:, 3:] == 0).all())
    torch.testing.assert_close(path[:, :3, 1].square().sum(0), torch.ones(3), atol=1e-3, rtol=0)
    assert minimol_graph("[Na+]").eigenpairs[0, 0].tolist() == [0.0, 1.0]


def test_returns_are_those_of_a_random_walk() -> None:
    returns = minimol_graph("CC").returns  # two atoms: back after every second step
    assert returns[:, ::2].eq(0).all()
    assert returns[:, 1::2].eq(1).all()
    assert bool(minimol_graph("C").returns.eq(1).all())


def test_smiles_of_one_molecule_give_one_graph() -> None:
    one, two = minimol_graph("OCC"), minimol_graph("C(O)C")
    for key in ("x", "eigenpairs", "returns"):
        assert torch.equal(one[key], two[key])
    assert sorted(one.edge_index.T.tolist()) == sorted(two.edge_index.T.tolist())


def test_molecules_of_a_batch_do_not_touch(small: MiniMol) -> None:
    smiles = ("CCO", "c1ccccc1C", "C", "[Na+].[Cl-]")
    graphs = batch(*smiles)
    together = small.readout(small(graphs), graphs)
    alone = [small.readout(small(batch(text)), batch(text)) for text in smiles]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)


def test_a_prompt_shifts_the_encoded_atoms(small: MiniMol) -> None:
    graphs = batch("CCO", "C")
    assert small.embed(graphs).shape == (4, small.feature_width)
    before = small(graphs)
    prompt = GPFPrompt(small.feature_width, torch.Generator().manual_seed(0))
    handle = attach(small, prompt)
    assert torch.equal(small(graphs), small.encode(small.embed(graphs) + prompt.weight, graphs))
    handle.remove()
    assert torch.equal(small(graphs), before)


def test_other_graphs_and_broken_smiles_are_refused(small: MiniMol, make_graph: Any) -> None:
    with pytest.raises(InputError, match="minimol_graph"):
        small(Batch.from_data_list([make_graph(4, 0, molecule=True)]))
    with pytest.raises(InputError, match="no valid SMILES"):
        minimol_graph("C1CC")
