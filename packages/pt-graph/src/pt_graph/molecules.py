"""Molecules: SMILES to graphs with the codes that the models of pretrain-gnns read, scaffolds, pictures.

Needs rdkit (`pt-graph[molecules]`), which is imported when a molecule is first read.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch_geometric.data import Data

from pt_core.errors import InputError

ELEMENTS = 118
CHIRALITY = ("CHI_UNSPECIFIED", "CHI_TETRAHEDRAL_CW", "CHI_TETRAHEDRAL_CCW")
BONDS = ("SINGLE", "DOUBLE", "TRIPLE", "AROMATIC")
DIRECTIONS = ("NONE", "ENDUPRIGHT", "ENDDOWNRIGHT")


def parse(smiles: str) -> Any:
    """An rdkit molecule of a SMILES.

    Raises:
        InputError: rdkit is not installed, there is no atom, or rdkit refuses the SMILES; the message has its reason.
    """
    chem = _rdkit("Chem")
    with _rdkit("rdBase").BlockLogs():
        molecule = chem.MolFromSmiles(smiles)
        if molecule is not None and molecule.GetNumAtoms():
            return molecule
        raw = chem.MolFromSmiles(smiles, sanitize=False)
        if raw is None or not raw.GetNumAtoms():
            reason = "it has no atoms" if raw is not None else "it cannot be parsed"
        else:
            problems = chem.DetectChemistryProblems(raw)
            reason = problems[0].Message() if problems else "it cannot be sanitised"
    raise InputError(f"{smiles!r} is no valid SMILES: {reason}")


def molecule_graph(smiles: str) -> Data:
    """Graph of a molecule, hydrogens left out, in the coding of pretrain-gnns (chem, the simple features).

    - `x` [n, 2]: atomic number - 1; chirality (0 unspecified, 1 clockwise, 2 counter-clockwise)
    - `edge_index` [2, e]: both directions of a bond side by side, bonds in rdkit's order
    - `edge_attr` [e, 2]: bond type (single, double, triple, aromatic); direction (none, up, down), the same both ways

    A molecule without bonds has `edge_index` [2, 0] and `edge_attr` [0, 2].

    Fidelity: the published code has a fourth chirality (other), for which the models' tables have no row. Every chirality
    that is not tetrahedral counts as unspecified here.

    Raises:
        InputError: as `parse`; or an atom (`*`) or bond (dative, quadruple) that the coding does not know.
    """
    molecule = parse(smiles)
    atoms = []
    for atom in molecule.GetAtoms():
        if not 1 <= atom.GetAtomicNum() <= ELEMENTS:
            raise InputError(f"{smiles!r} has an atom that is no element ({atom.GetSymbol()})")
        tag = atom.GetChiralTag().name
        atoms.append((atom.GetAtomicNum() - 1, CHIRALITY.index(tag) if tag in CHIRALITY else 0))
    ends, kinds = [], []
    for bond in molecule.GetBonds():
        kind, way = bond.GetBondType().name, bond.GetBondDir().name
        if kind not in BONDS or way not in DIRECTIONS:
            raise InputError(f"{smiles!r} has a bond that the models do not know ({kind.lower()}, {way.lower()})")
        a, b = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        ends += [(a, b), (b, a)]
        kinds += [(BONDS.index(kind), DIRECTIONS.index(way))] * 2
    return Data(
        x=torch.tensor(atoms),
        edge_index=torch.tensor(ends, dtype=torch.long).reshape(-1, 2).T.contiguous(),
        edge_attr=torch.tensor(kinds, dtype=torch.long).reshape(-1, 2),
    )


def scaffold(smiles: str) -> str:
    """Bemis-Murcko scaffold with chirality, as SMILES; empty where the molecule has no ring.

    Source: Bemis and Murcko, J. Med. Chem. 1996; with chirality as in pretrain-gnns (chem/splitters.py).
    """
    parse(smiles)
    murcko = _rdkit("Chem.Scaffolds.MurckoScaffold")
    with _rdkit("rdBase").BlockLogs():
        return str(murcko.MurckoScaffoldSmiles(smiles=smiles, includeChirality=True))


def draw_molecules(
    smiles: Sequence[str],
    weights: Sequence[Sequence[float]],
    legends: Sequence[str] | None = None,
    *,
    columns: int = 3,
    size: tuple[int, int] = (300, 240),
    colour: tuple[float, float, float] = (0.85, 0.33, 0.1),
    largest: float | None = None,
    format: Literal["png", "svg"] = "png",
) -> bytes:
    """A picture of molecules in a grid, prompted atoms on discs: the stronger the prompt, the stronger the colour.

    Args:
        smiles: what is drawn.
        weights: for each molecule one number >= 0 per atom, such as the length of its prompt; atoms with 0 have no disc.
        legends: a line below each molecule.
        columns, size: molecules in a row; width and height of each in pixels.
        colour: of the largest weight, as red, green, blue in 0 to 1; smaller ones fade to white in proportion.
        largest: the weight that has the full colour; default: the largest of all that are drawn.

    Returns:
        PNG bytes, or an SVG document as UTF-8.

    Raises:
        InputError: nothing to draw, a SMILES is invalid, or weights are not one finite number >= 0 for each atom.
    """
    molecules = [parse(s) for s in smiles]
    if not molecules or len(weights) != len(molecules):
        raise InputError(f"{len(weights)} rows of weights for {len(molecules)} molecules", field="weights")
    strengths = [torch.as_tensor(w, dtype=torch.float).reshape(-1) for w in weights]
    for row, (molecule, w) in enumerate(zip(molecules, strengths, strict=True), start=1):
        if len(w) != molecule.GetNumAtoms() or not bool((w.isfinite() & (w >= 0)).all()):
            raise InputError(
                f"the {molecule.GetNumAtoms()} atoms need a finite weight >= 0 each", row=row, field="weights"
            )
    full = largest or max(float(w.max()) for w in strengths) or 1.0
    shades = [{i: _fade(colour, v / full) for i, v in enumerate(w.tolist()) if v > 0} for w in strengths]

    draw = _rdkit("Chem.Draw.rdMolDraw2D")
    columns = min(columns, len(molecules))
    width, height = size
    canvas = {"png": draw.MolDraw2DCairo, "svg": draw.MolDraw2DSVG}[format](
        width * columns, height * -(-len(molecules) // columns), width, height
    )
    canvas.drawOptions().continuousHighlight = False
    canvas.DrawMolecules(
        [draw.PrepareMolForDrawing(m) for m in molecules],
        legends=list(legends or [""] * len(molecules)),
        highlightAtoms=[list(s) for s in shades],
        highlightBonds=[[] for _ in shades],
        highlightAtomColors=shades,
    )
    canvas.FinishDrawing()
    made = canvas.GetDrawingText()
    return made.encode() if isinstance(made, str) else bytes(made)


def _fade(colour: tuple[float, float, float], strength: float) -> tuple[float, ...]:
    """From near white, so that a weak prompt is still seen, to the full colour."""
    strength = 0.1 + 0.9 * min(strength, 1.0)
    return tuple(1 - strength * (1 - c) for c in colour)


def _rdkit(module: str) -> Any:
    try:
        return importlib.import_module(f"rdkit.{module}")
    except ImportError as error:
        raise InputError(
            "molecules need rdkit, which is not installed", remedy="Install pt-graph[molecules], or rdkit"
        ) from error
