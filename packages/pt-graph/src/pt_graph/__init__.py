"""Prompt tuning for graphs. Names are loaded when they are first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pt_graph.backbones import (
        ChemConfig,
        ChemGNN,
        GraphBackbone,
        NodeGIN,
        NodeGINConfig,
        PyGBackbone,
        load_backbone,
        save_backbone,
    )
    from pt_graph.data import GraphSpec, GraphTask, read_nodes, read_smiles
    from pt_graph.methods.all_in_one import AllInOne, AllInOneConfig
    from pt_graph.methods.fine_tuning import FineTuning, FineTuningConfig
    from pt_graph.methods.gpf import GPF, GPFConfig, GPFPlus, GPFPlusConfig
    from pt_graph.methods.gppt import GPPT, GPPTConfig
    from pt_graph.methods.graph_prompt import GraphPrompt, GraphPromptConfig
    from pt_graph.methods.linear_probe import LinearProbe, LinearProbeConfig
    from pt_graph.methods.relief import RELIEF, RELIEFConfig
    from pt_graph.methods.supt import SUPTConfig, SUPTHard, SUPTHardConfig, SUPTSoft
    from pt_graph.minimol import MiniMol, load_minimol, minimol_graph
    from pt_graph.pretraining import pretrain

__all__ = [
    "GPF",
    "GPPT",
    "RELIEF",
    "AllInOne",
    "AllInOneConfig",
    "ChemConfig",
    "ChemGNN",
    "FineTuning",
    "FineTuningConfig",
    "GPFConfig",
    "GPFPlus",
    "GPFPlusConfig",
    "GPPTConfig",
    "GraphBackbone",
    "GraphPrompt",
    "GraphPromptConfig",
    "GraphSpec",
    "GraphTask",
    "LinearProbe",
    "LinearProbeConfig",
    "MiniMol",
    "NodeGIN",
    "NodeGINConfig",
    "PyGBackbone",
    "RELIEFConfig",
    "SUPTConfig",
    "SUPTHard",
    "SUPTHardConfig",
    "SUPTSoft",
    "load_backbone",
    "load_minimol",
    "minimol_graph",
    "pretrain",
    "read_nodes",
    "read_smiles",
    "save_backbone",
]

_ROOMS = {
    "backbones": (
        "ChemConfig",
        "ChemGNN",
        "GraphBackbone",
        "NodeGIN",
        "NodeGINConfig",
        "PyGBackbone",
        "load_backbone",
        "save_backbone",
    ),
    "data": ("GraphSpec", "GraphTask", "read_nodes", "read_smiles"),
    "methods.all_in_one": ("AllInOne", "AllInOneConfig"),
    "methods.fine_tuning": ("FineTuning", "FineTuningConfig"),
    "methods.gpf": ("GPF", "GPFConfig", "GPFPlus", "GPFPlusConfig"),
    "methods.gppt": ("GPPT", "GPPTConfig"),
    "methods.graph_prompt": ("GraphPrompt", "GraphPromptConfig"),
    "methods.linear_probe": ("LinearProbe", "LinearProbeConfig"),
    "methods.relief": ("RELIEF", "RELIEFConfig"),
    "methods.supt": ("SUPTConfig", "SUPTHard", "SUPTHardConfig", "SUPTSoft"),
    "minimol": ("MiniMol", "load_minimol", "minimol_graph"),
    "pretraining": ("pretrain",),
}
_WHERE = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"pt_graph.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'pt_graph' has no attribute {name!r}")
