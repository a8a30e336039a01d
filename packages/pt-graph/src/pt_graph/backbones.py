"""Frozen graph neural networks, and where prompts enter them.

A backbone turns a batch of graphs into node embeddings in two steps, and prompts stand between the two:

    X = backbone.embed(graphs)        [n, D]  the prompted features: summed atom embeddings, or raw node features
    H = backbone.encode(X, graphs)    [n, d]  message passing
    G = backbone.readout(H, graphs)   [B, d]  one row for each graph

`attach(backbone, FeaturePrompt)` puts a prompt there. A module of PyG that is called as `model(x, edge_index, ...)` can be
attached to as it is; methods want it inside `PyGBackbone`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.data import Batch
from torch_geometric.nn import GINConv, MessagePassing, global_add_pool, global_max_pool, global_mean_pool
from torch_geometric.utils import add_self_loops, degree, is_sparse, softmax, to_edge_index

from pt_core.artifacts import write_folder
from pt_core.attachment import Forward, Rows, register_family
from pt_core.errors import InputError
from pt_core.prompts import Prompt
from pt_core.settings import Settings
from pt_graph.walk import MessageLayer, Walk, edge_sums

POOLS = {"mean": global_mean_pool, "sum": global_add_pool, "max": global_max_pool}
ATOM_TYPES, CHIRALITIES, BOND_TYPES, BOND_DIRECTIONS = 120, 3, 6, 3  # rows of the tables, the mask tokens included
SELF_LOOP = 4  # bond type


class FeaturePrompt(Prompt):
    """Base of prompts on node features: a subclass says what becomes of X."""

    def features(self, x: Tensor, graphs: Any) -> Tensor:
        """Prompted features [n, D] of the features `x` [n, D] of a batch of graphs (`edge_index`, `batch`)."""
        raise TypeError(f"{type(self).__name__} does not say what becomes of the features")


class BackboneConfig(Settings):
    """What a backbone is, beside its weights; written beside them as config.json."""

    kind: str
    readout: Literal["mean", "sum", "max"] = "mean"

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


def has_doubles(device: torch.device) -> bool:
    """Whether a device has float64: a Mac's accelerator has not, nor has the one of `pt_core.elsewhere`."""
    return device.type not in ("mps", "meta")


class GraphBackbone(nn.Module):
    """Base of the backbones: graphs -> node embeddings [n, d].

    Args:
        config: kind and sizes.
        feature_width: D, width of what is prompted.
        width: d, width of a node embedding.
        hops: layers of message passing: a prompt on a node changes nodes at most this far away.
    """

    def __init__(self, config: BackboneConfig, feature_width: int, width: int, hops: int) -> None:
        super().__init__()
        self.config, self.feature_width, self.width, self.hops = config, feature_width, width, hops

    def embed(self, graphs: Any) -> Tensor:
        """Features [n, D] of a batch: what is prompted. By default the graph's own `x`, in the dtype of the weights."""
        x = graphs.x
        if x is None or x.ndim != 2 or x.shape[1] != self.feature_width or not x.is_floating_point():
            shape = "none" if x is None else f"{x.dtype} {list(x.shape)}"
            raise InputError(
                f"the backbone reads node features of width {self.feature_width}, the graphs have {shape}", field="x"
            )
        return cast(Tensor, x.to(next(self.parameters(), x).dtype))

    def encode(self, x: Tensor, graphs: Any) -> Tensor:
        """Node embeddings [n, d] of (prompted) features [n, D]."""
        raise TypeError(f"{type(self).__name__} does not encode")

    def walk(self, x: Tensor, graphs: Any) -> Walk | None:
        """Embeddings of features that will change at few nodes at a time; None: a whole pass is what there is."""
        return None

    def readout(self, h: Tensor, graphs: Any) -> Tensor:
        """Graph embeddings [B, d] of node embeddings [n, d]."""
        return cast(Tensor, POOLS[self.config.readout](h, graphs.batch, graphs.num_graphs))

    def forward(self, graphs: Any) -> Tensor:
        return self.encode(self.embed(graphs), graphs)


# --- molecules: the models of pretrain-gnns -------------------------------------------------------------------------
class ChemConfig(BackboneConfig):
    """Sizes of a `ChemGNN`."""

    kind: Literal["chem"] = "chem"
    conv: Literal["gin", "gcn", "graphsage", "gat"] = "gin"
    layers: int = Field(5, ge=2, description="pretrain-gnns, chem")
    width: int = Field(300, ge=1, description="pretrain-gnns, chem")
    dropout: float = Field(
        0.5, ge=0, lt=1, description="of fine-tuning; 0 in pre-training. Active only where asked for"
    )


class _BondConv(MessagePassing):
    """Message passing over bonds with self-loops: message x_j + e_ij, e_ij a bond type's and a direction's row."""

    def __init__(self, width: int, aggr: str, edge_width: int | None = None) -> None:
        super().__init__(aggr=aggr)
        self.edge_embedding1 = nn.Embedding(BOND_TYPES, edge_width or width)
        self.edge_embedding2 = nn.Embedding(BOND_DIRECTIONS, edge_width or width)
        nn.init.xavier_uniform_(self.edge_embedding1.weight)
        nn.init.xavier_uniform_(self.edge_embedding2.weight)

    def bonds(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor) -> tuple[Tensor, Tensor]:
        """Edges and their embeddings, with a self-loop of bond type 4 on each of the n nodes."""
        loops = edge_attr.new_tensor([[SELF_LOOP, 0]]).expand(len(x), 2)
        kinds = torch.cat([edge_attr, loops])
        edge_index, _ = add_self_loops(edge_index, num_nodes=len(x))
        return edge_index, self.edge_embedding1(kinds[:, 0]) + self.edge_embedding2(kinds[:, 1])

    def layer(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor) -> tuple[Tensor, MessageLayer] | None:
        """Edges with self-loops, and this convolution as a layer of a `Walk`; None: it is none."""
        return None


class _ChemGIN(_BondConv):
    def __init__(self, width: int) -> None:
        super().__init__(width, "add")
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor) -> Tensor:
        edge_index, e = self.bonds(x, edge_index, edge_attr)
        return cast(Tensor, self.mlp(self.propagate(edge_index, x=x, e=e)))

    def layer(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor) -> tuple[Tensor, MessageLayer]:
        edge_index, e = self.bonds(x, edge_index, edge_attr)
        return edge_index, MessageLayer(None, None, edge_sums(e, edge_index[1], len(x)), self.mlp)

    def message(self, x_j: Tensor, e: Tensor) -> Tensor:
        return x_j + e


class _ChemGCN(_BondConv):
    def __init__(self, width: int) -> None:
        super().__init__(width, "add")
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor) -> Tensor:
        edge_index, e = self.bonds(x, edge_index, edge_attr)
        return self.propagate(edge_index, x=self.linear(x), e=e, weight=self.weight(x, edge_index))

    @staticmethod
    def weight(x: Tensor, edge_index: Tensor) -> Tensor:
        """1 / sqrt(degree of source * degree of target) of each edge."""
        scale = degree(edge_index[0], len(x), x.dtype).pow(-0.5)
        return scale[edge_index[0]] * scale[edge_index[1]]

    def layer(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor) -> tuple[Tensor, MessageLayer]:
        edge_index, e = self.bonds(x, edge_index, edge_attr)
        weight = self.weight(x, edge_index)
        constant = edge_sums(weight[:, None] * e, edge_index[1], len(x))
        return edge_index, MessageLayer(self.linear, weight, constant, nn.Identity())

    def message(self, x_j: Tensor, e: Tensor, weight: Tensor) -> Tensor:
        return weight[:, None] * (x_j + e)


class _ChemSAGE(_BondConv):
    def __init__(self, width: int) -> None:
        super().__init__(width, "mean")
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor) -> Tensor:
        edge_index, e = self.bonds(x, edge_index, edge_attr)
        return F.normalize(self.propagate(edge_index, x=self.linear(x), e=e), dim=-1)

    def layer(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor) -> tuple[Tensor, MessageLayer]:
        edge_index, e = self.bonds(x, edge_index, edge_attr)
        weight = degree(edge_index[1], len(x), x.dtype).reciprocal()[edge_index[1]]
        constant = edge_sums(weight[:, None] * e, edge_index[1], len(x))
        return edge_index, MessageLayer(self.linear, weight, constant, partial(F.normalize, dim=-1))

    def message(self, x_j: Tensor, e: Tensor) -> Tensor:
        return x_j + e


class _ChemGAT(_BondConv):
    """Two heads, averaged. Attention is normalised over the edges that leave a node, as in the published models."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__(width, "add", heads * width)
        self.node_dim = 0  # nodes lie along the first of three axes
        self.heads, self.width = heads, width
        self.weight_linear = nn.Linear(width, heads * width)
        self.att = nn.Parameter(torch.empty(1, heads, 2 * width))
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.xavier_uniform_(self.att)

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor) -> Tensor:
        edge_index, e = self.bonds(x, edge_index, edge_attr)
        x = self.weight_linear(x).view(-1, self.heads, self.width)
        found = self.propagate(edge_index, x=x, e=e.view(-1, self.heads, self.width), leaves=edge_index[0])
        return cast(Tensor, found.mean(1) + self.bias)

    def message(self, x_i: Tensor, x_j: Tensor, e: Tensor, leaves: Tensor) -> Tensor:
        x_j = x_j + e
        score = F.leaky_relu((torch.cat([x_i, x_j], -1) * self.att).sum(-1), 0.2)
        return x_j * softmax(score, leaves)[..., None]


_CHEM_CONVS: dict[str, Callable[[int], _BondConv]] = {
    "gin": _ChemGIN,
    "gcn": _ChemGCN,
    "graphsage": _ChemSAGE,
    "gat": _ChemGAT,
}


class ChemGNN(GraphBackbone):
    """Molecule GNN of pretrain-gnns: atoms [n, 2] (type, chirality), bonds [e, 2] (type, direction) -> [n, d].

    Each layer: message passing over bonds, BatchNorm, ReLU (not after the last), dropout; the last layer's output is read
    (JK = last), mean pooling. State dicts of snap-stanford/pretrain-gnns (chem) load strictly.

    Parameters: 1,857,900 (gin, 5 layers, d 300). Source: Hu et al., Strategies for Pre-training GNNs, ICLR 2020.
    """

    config: ChemConfig

    def __init__(self, config: ChemConfig | None = None) -> None:
        config = config or ChemConfig()
        super().__init__(config, config.width, config.width, config.layers)
        self.x_embedding1 = nn.Embedding(ATOM_TYPES, config.width)
        self.x_embedding2 = nn.Embedding(CHIRALITIES, config.width)
        nn.init.xavier_uniform_(self.x_embedding1.weight)
        nn.init.xavier_uniform_(self.x_embedding2.weight)
        self.gnns = nn.ModuleList(_CHEM_CONVS[config.conv](config.width) for _ in range(config.layers))
        self.batch_norms = nn.ModuleList(nn.BatchNorm1d(config.width) for _ in range(config.layers))
        self.dropout = nn.Dropout(config.dropout)

    def embed(self, graphs: Any) -> Tensor:
        """Sum of the two atom embeddings, [n, d].

        Raises:
            InputError: atoms or bonds are not of the published coding.
        """
        _check_codes(graphs.x, (ATOM_TYPES, CHIRALITIES), "x", "atoms")
        _check_codes(graphs.edge_attr, (BOND_TYPES, BOND_DIRECTIONS), "edge_attr", "bonds")
        return cast(Tensor, self.x_embedding1(graphs.x[:, 0]) + self.x_embedding2(graphs.x[:, 1]))

    def encode(self, x: Tensor, graphs: Any) -> Tensor:
        for i, (conv, norm) in enumerate(zip(self.gnns, self.batch_norms, strict=True)):
            x = norm(conv(x, graphs.edge_index, graphs.edge_attr))
            x = self.dropout(x if i == len(self.gnns) - 1 else x.relu())
        return x

    def walk(self, x: Tensor, graphs: Any) -> Walk | None:
        if any(module.training for module in self.modules()):  # dropout is drawn, or rows see each other
            return None
        found = [cast(_BondConv, conv).layer(x, graphs.edge_index, graphs.edge_attr) for conv in self.gnns]
        layers: list[MessageLayer] = []
        for i, (each, norm) in enumerate(zip(found, self.batch_norms, strict=True)):
            if each is None:
                return None
            edges, layer = each
            after: list[Callable[[Tensor], Tensor]] = [layer.after, norm]
            after += [nn.ReLU()] if i < len(found) - 1 else []
            layers.append(replace(layer, after=partial(_in_turn, after)))
        return Walk(x, edges, layers)


def _in_turn(functions: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
    for function in functions:
        x = function(x)
    return x


def _check_codes(codes: Tensor | None, sizes: tuple[int, int], field: str, what: str) -> None:
    if codes is None or codes.ndim != 2 or codes.shape[1] != 2 or codes.is_floating_point():
        shape = "none" if codes is None else f"{codes.dtype} {list(codes.shape)}"
        raise InputError(
            f"{what} are two whole numbers each, [*, 2]; the graphs have {shape}",
            field=field,
            remedy="Featurise SMILES with pt_graph.molecules",
        )
    if codes.device.type == "cpu" and len(codes) and bool((codes < 0).any() | (codes >= codes.new_tensor(sizes)).any()):
        raise InputError(f"a code of {what} is outside of 0..{sizes[0] - 1}, 0..{sizes[1] - 1}", field=field)


# --- nodes of one large graph: the models of RELIEF's authors -------------------------------------------------------
class NodeGINConfig(BackboneConfig):
    """Sizes of a `NodeGIN`."""

    kind: Literal["node-gin"] = "node-gin"
    feature_width: int = Field(100, ge=1, description="SVD features of RELIEF")
    width: int = Field(128, ge=1, description="RELIEF, node level")
    layers: int = Field(2, ge=1, description="RELIEF, node level")
    dropout: float = Field(0.5, ge=0, lt=1, description="RELIEF, node level. Active only where asked for")


class NodeGIN(GraphBackbone):
    """GIN on node features [n, D] -> [n, d]: per layer an MLP D-d-d with ReLU; LeakyReLU and dropout between layers.

    State dicts of RELIEF's node-level models load strictly. Source: Zhu et al., RELIEF, KDD 2025 (released code).
    """

    config: NodeGINConfig

    def __init__(self, config: NodeGINConfig | None = None) -> None:
        config = config or NodeGINConfig()
        super().__init__(config, config.feature_width, config.width, config.layers)
        widths = [config.feature_width, *[config.width] * config.layers]
        self.conv_layers = nn.ModuleList(
            GINConv(nn.Sequential(nn.Linear(i, o), nn.ReLU(), nn.Linear(o, o)), train_eps=False)
            for i, o in pairwise(widths)
        )
        self.dropout = nn.Dropout(config.dropout)

    def encode(self, x: Tensor, graphs: Any) -> Tensor:
        for i, conv in enumerate(self.conv_layers):
            x = conv(x, graphs.edge_index)
            if i < len(self.conv_layers) - 1:
                x = self.dropout(F.leaky_relu(x))
        return x

    def walk(self, x: Tensor, graphs: Any) -> Walk | None:
        if any(module.training for module in self.modules()):
            return None
        layers = []
        edges, _ = add_self_loops(graphs.edge_index, num_nodes=len(x))
        for i, conv in enumerate(self.conv_layers):
            weight, eps = None, cast(Tensor, conv.eps)
            if bool(eps):  # checkpoints may set it: a node reads itself, by the loops that come last, 1 + eps times
                weight = x.new_ones(edges.shape[1])
                weight[-len(x) :] += eps
            after: list[Callable[[Tensor], Tensor]] = [cast(nn.Module, conv.nn)]
            after += [F.leaky_relu] if i < len(self.conv_layers) - 1 else []
            layers.append(MessageLayer(None, weight, None, partial(_in_turn, after)))
        return Walk(x, edges, layers)


# --- any module of PyG ----------------------------------------------------------------------------------------------
class PyGBackbone(GraphBackbone):
    """Any PyG module that is called as `module(x, edge_index)`, with `edge_attr` and `batch` where its forward names them.

    Args:
        module: features [n, D] -> node embeddings [n, d].
        feature_width, width: D and d.
        hops: layers of message passing.
        readout: "mean", "sum" or "max".
        embed: graphs -> features [n, D], where features are not the graph's `x` (embedding tables); part of the backbone.
    """

    def __init__(
        self,
        module: nn.Module,
        feature_width: int,
        width: int,
        hops: int,
        readout: Literal["mean", "sum", "max"] = "mean",
        embed: nn.Module | None = None,
    ) -> None:
        super().__init__(BackboneConfig(kind=type(module).__name__, readout=readout), feature_width, width, hops)
        self.module, self.input = module, embed
        named = inspect.signature(module.forward).parameters
        self._passes = [name for name in ("edge_attr", "batch") if name in named]

    def embed(self, graphs: Any) -> Tensor:
        return super().embed(graphs) if self.input is None else cast(Tensor, self.input(graphs))

    def encode(self, x: Tensor, graphs: Any) -> Tensor:
        given = {name: getattr(graphs, name, None) for name in self._passes}
        h = self.module(x, graphs.edge_index, **given)
        if h.shape != (len(x), self.width):
            raise InputError(
                f"{type(self.module).__name__} gives {list(h.shape)}, node embeddings [{len(x)}, {self.width}] were expected",
                remedy="Pass a module that does not pool, and its width",
            )
        return cast(Tensor, h)


# --- loading and keeping --------------------------------------------------------------------------------------------
_KINDS: dict[str, tuple[type[BackboneConfig], Callable[[Any], GraphBackbone]]] = {
    "chem": (ChemConfig, ChemGNN),
    "node-gin": (NodeGINConfig, NodeGIN),
}


def backbone_config(content: Mapping[str, Any]) -> BackboneConfig:
    """The configuration of a backbone from its values: `{"kind": "chem", "conv": "gcn"}`.

    Raises:
        ValueError: the kind is not known, or a value does not fit.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"a {type(content).__name__} in place of names with values")
    if content.get("kind") not in tuple(_KINDS):  # of a list, say, there is no hash
        raise ValueError(f"unknown kind {content.get('kind')!r}; known: {', '.join(_KINDS)}")
    return _KINDS[content["kind"]][0].model_validate(content)


def save_backbone(backbone: GraphBackbone, folder: str | Path, card: str = "") -> Path:
    """Write a backbone to a folder (config.json, model.safetensors, README.md), whole or not at all."""
    if backbone.config.kind not in _KINDS:
        raise InputError(
            f"a {backbone.config.kind} cannot be rebuilt from a configuration", remedy="Save its state dict"
        )
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()}
    files = {
        "config.json": (json.dumps(backbone.config.to_dict(), indent=2) + "\n").encode(),
        "model.safetensors": save(tensors),
    }
    write_folder(Path(folder), files | ({"README.md": card.encode()} if card else {}))
    return Path(folder)


def load_backbone(source: str | Path, config: BackboneConfig | None = None) -> GraphBackbone:
    """A backbone in eval mode.

    Args:
        source: a folder of `save_backbone`, the name of one that ships with this package (`zoo:NAME`), or a safetensors
            file, which needs `config`.
        config: what the weights of a bare file are (`ChemConfig(conv="gcn")`, `NodeGINConfig()`).

    Raises:
        InputError: there is no such backbone, or the weights are not of this configuration.
    """
    path = _ZOO / str(source).removeprefix("zoo:") if str(source).startswith("zoo:") else Path(source)
    if path.is_dir():
        file = path / "config.json"
        if not file.is_file():
            raise InputError("holds no config.json", file=path, remedy="Give a folder of save_backbone")
        try:
            config, path = backbone_config(json.loads(file.read_text("utf-8"))), path / "model.safetensors"
        except ValueError as error:
            raise InputError(f"is no configuration of a backbone ({error})", file=file) from error
    elif config is None or not path.is_file():
        shipped = ", ".join(f"zoo:{f.name}" for f in sorted(_ZOO.glob("*/"))) or "none"
        problem = "needs a config" if path.is_file() else "no such backbone"
        raise InputError(problem, file=source, remedy=f"Give a folder, or one of those that ship: {shipped}")
    backbone = _KINDS[config.kind][1](config)
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"is not a whole safetensors file ({error})",
            file=path,
            remedy="Save a state dict as safetensors: others may hold pickled objects, which are never loaded",
        ) from error
    try:
        backbone.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise InputError(f"the weights are not those of {config!r} ({error})", file=path) from error
    return backbone.eval()


_ZOO = Path(__file__).parent / "zoo"


@contextmanager
def dropping(backbone: nn.Module, on: bool = True) -> Iterator[None]:
    """In this context the dropout of a frozen backbone is active; BatchNorm never is."""
    switched = [m for m in backbone.modules() if isinstance(m, nn.Dropout) and not m.training] if on else []
    for module in switched:
        module.training = True
    try:
        yield
    finally:
        for module in switched:
            module.training = False


# --- where prompts enter --------------------------------------------------------------------------------------------
class GraphFamily:
    """`GraphBackbone`s, and modules that are called as `model(x, edge_index, ...)`. See `pt_core.attachment.Family`.

    Rows of `route` are graphs.
    """

    name = "graph"

    def matches(self, backbone: nn.Module) -> bool:
        return isinstance(backbone, GraphBackbone) or self._takes_features(backbone)

    @staticmethod
    def _takes_features(backbone: nn.Module) -> bool:
        return list(inspect.signature(backbone.forward).parameters)[:2] == ["x", "edge_index"]

    def check(self, backbone: nn.Module, prompt: Prompt) -> None:
        if not isinstance(prompt, FeaturePrompt):
            raise InputError(
                f"a {type(prompt).__name__} does not say what becomes of node features",
                remedy="Attach a FeaturePrompt, such as that of GPF",
            )
        width, own = getattr(prompt, "width", None), getattr(backbone, "feature_width", None)
        if own is not None and width is not None and own != width:
            raise InputError(f"the prompt is of width {width}, the backbone's features are of width {own}")

    def patches(
        self, backbone: nn.Module, selected: Callable[[], Rows | None]
    ) -> list[tuple[nn.Module, Callable[[Forward], Forward]]]:
        def around(original: Forward) -> Forward:
            if isinstance(backbone, GraphBackbone):

                def forward(graphs: Any) -> Any:
                    rows = selected()
                    if rows is None:
                        return original(graphs)
                    return backbone.encode(_prompted(backbone.embed(graphs), graphs, rows), graphs)

                return forward

            signature = inspect.signature(original)

            def on_features(x: Tensor, edge_index: Tensor, *rest: Any, **options: Any) -> Any:
                rows = selected()
                if rows is not None:
                    given = options | signature.bind(x, edge_index, *rest, **options).arguments
                    edges = edge_index
                    if is_sparse(edges):  # the transposed adjacency matrix, whose rows are the targets
                        edges = to_edge_index(edges)[0].flip(0)
                    graphs = Batch(x=x, edge_index=edges, batch=given.get("batch"))
                    if graphs.batch is None:
                        graphs.batch = edges.new_zeros(len(x))
                    x = _prompted(x, graphs, rows)
                return original(x, edge_index, *rest, **options)

            return on_features

        return [(backbone, around)]


def _prompted(x: Tensor, graphs: Any, rows: Rows) -> Tensor:
    """Features with the prompt of each graph. Graphs do not touch, so each prompt sees the whole batch and keeps its own."""
    chosen = list({id(handle): handle for handle in rows if handle is not None}.values())
    prompted = x
    for handle in chosen:
        features = cast(FeaturePrompt, handle.prompt).features(x, graphs)
        if len(rows) > 1:
            mine = torch.tensor([row is handle for row in rows], device=x.device)
            if len(mine) != graphs.num_graphs:
                raise InputError(
                    f"{len(rows)} prompts for {graphs.num_graphs} graphs", remedy="Name one for each graph"
                )
            features = torch.where(mine[graphs.batch][:, None], features, prompted)
        prompted = features
    return prompted


register_family(GraphFamily())
