"""Molecules: the coding of pretrain-gnns atom by atom, reasons of what is refused, scaffolds, pictures."""

from __future__ import annotations

import re

import pytest
import torch

from pt_core.errors import InputError
from pt_graph.backbones import ATOM_TYPES, BOND_DIRECTIONS, BOND_TYPES, CHIRALITIES
from pt_graph.molecules import draw_molecules, molecule_graph, parse, scaffold

RED = (1.0, 0.0, 0.0)


def fills(svg: bytes) -> list[str]:
    """Colours of the discs behind atoms, in order."""
    return re.findall(r"<ellipse[^>]*fill:(#[0-9A-F]{6})", svg.decode())


def test_atoms_are_atomic_number_less_one_and_bonds_lie_side_by_side() -> None:
    graph = molecule_graph("CC=O")
    assert graph.x.tolist() == [[5, 0], [5, 0], [7, 0]]
    assert graph.edge_index.tolist() == [[0, 1, 1, 2], [1, 0, 2, 1]]
    assert graph.edge_attr.tolist() == [[0, 0], [0, 0], [1, 0], [1, 0]]


@pytest.mark.parametrize(("smiles", "kind"), [("CC", 0), ("C=C", 1), ("C#C", 2), ("c1ccccc1", 3)])
def test_the_four_bond_types_have_their_codes(smiles: str, kind: int) -> None:
    assert set(molecule_graph(smiles).edge_attr[:, 0].tolist()) == {kind}


def test_mirror_images_differ_in_the_chirality_of_one_atom_only() -> None:
    one, other = molecule_graph("C[C@H](N)O"), molecule_graph("C[C@@H](N)O")
    assert one.x[1].tolist() == [5, 2]
    assert other.x[1].tolist() == [5, 1]
    assert int((one.x != other.x).sum()) == 1
    assert torch.equal(one.edge_attr, other.edge_attr)


def test_the_direction_of_a_bond_is_the_same_both_ways() -> None:
    assert molecule_graph("F/C=C/F").edge_attr.tolist() == [[0, 1], [0, 1], [1, 0], [1, 0], [0, 1], [0, 1]]
    assert molecule_graph("F/C=C\\F").edge_attr[4:].tolist() == [[0, 2], [0, 2]]


@pytest.mark.parametrize("smiles", ["F[Pt@SP1](Cl)(Br)I", "F[S@OH1](Cl)(Br)(I)(C)O", "[Og]", "[H][H]"])
def test_every_code_has_a_row_in_the_tables_of_the_models(smiles: str) -> None:
    """A chirality that is not tetrahedral would be code 3, of a table with 3 rows."""
    graph = molecule_graph(smiles)
    assert bool((graph.x < torch.tensor([ATOM_TYPES, CHIRALITIES])).all())
    assert bool((graph.edge_attr < torch.tensor([BOND_TYPES, BOND_DIRECTIONS])).all())


def test_a_molecule_without_bonds_has_empty_edges_of_the_right_type() -> None:
    graph = molecule_graph("[Na+]")
    assert graph.x.tolist() == [[10, 0]]
    assert (graph.edge_index.shape, graph.edge_index.dtype) == ((2, 0), torch.long)
    assert (graph.edge_attr.shape, graph.edge_attr.dtype) == ((0, 2), torch.long)


def test_parts_of_a_salt_stay_apart_in_one_graph() -> None:
    graph = molecule_graph("[Na+].[Cl-]")
    assert (graph.num_nodes, graph.num_edges) == (2, 0)


@pytest.mark.parametrize(
    ("smiles", "reason"),
    [
        ("", "it has no atoms"),
        ("C(", "cannot be parsed"),
        ("C(C)(C)(C)(C)C", "Explicit valence for atom # 0 C, 5"),
        ("*C", "no element"),
        ("[NH3]->[Cu]", "dative"),
        ("C$C", "quadruple"),
    ],
)
def test_what_cannot_be_a_graph_is_refused_with_the_reason(smiles: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        molecule_graph(smiles)


def test_a_refused_smiles_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError):
        parse("C(")
    assert capfd.readouterr() == ("", "")


def test_a_scaffold_is_the_rings_and_what_links_them() -> None:
    assert scaffold("Cc1cc(Oc2nccc(CCC)c2)ccc1") == "c1ccc(Oc2ccccn2)cc1"
    assert scaffold("CCO") == ""


def test_scaffolds_tell_mirror_images_apart() -> None:
    one, other = scaffold("O=C1CC[C@H](c2ccccc2)N1"), scaffold("O=C1CC[C@@H](c2ccccc2)N1")
    assert one != other
    assert one.replace("@@", "@") == other.replace("@@", "@")


def test_prompted_atoms_and_no_others_have_a_disc() -> None:
    picture = draw_molecules(["CCO"], [[0, 0.5, 1]], colour=RED, format="svg")
    assert len(fills(picture)) == 2
    assert fills(draw_molecules(["CCO"], [[0, 0, 0]], format="svg")) == []


def test_a_stronger_prompt_has_a_stronger_colour() -> None:
    half, full = fills(draw_molecules(["CCO"], [[0, 0.5, 1]], colour=RED, format="svg"))
    assert full == "#FF0000"
    assert half[1:3] == "FF"
    assert 0 < int(half[3:5], 16) < 0xF0


def test_colours_can_be_compared_across_the_molecules_of_a_picture() -> None:
    picture = draw_molecules(["CC", "CC"], [[1, 0], [0.5, 0]], colour=RED, format="svg")
    first, second = fills(picture)
    assert (first, first != second) == ("#FF0000", True)
    alone = fills(draw_molecules(["CC"], [[0.5, 0]], colour=RED, largest=1.0, format="svg"))
    assert alone == [second]


def test_a_picture_has_the_size_of_its_grid() -> None:
    png = draw_molecules(["CC"] * 4, [[1, 0]] * 4, list("abcd"), columns=3, size=(200, 100))
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert (int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")) == (600, 200)


@pytest.mark.parametrize("weights", [[[1.0]], [[1.0, -1.0, 0.0]], [[1.0, float("nan"), 0.0]], [], [[0.0] * 3] * 2])
def test_weights_are_one_finite_number_for_each_atom(weights: list[list[float]]) -> None:
    with pytest.raises(InputError, match="weight"):
        draw_molecules(["CCO"], weights)
