"""Prompt tuning for vision-language models. Names are loaded when they are first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pt_vl.backbones import DualEncoder, TowerPrompt, Words, load_backbone
    from pt_vl.data import TEMPLATES, ImageSpec, ImageTask
    from pt_vl.method import Sentences, VLConfig, VLMethod, cache_features
    from pt_vl.methods.cocoop import CoCoOp, CoCoOpConfig
    from pt_vl.methods.coop import CoOp, CoOpConfig
    from pt_vl.methods.ivlp import IVLP, IVLPConfig
    from pt_vl.methods.linear_probe import LinearProbe, LinearProbeConfig
    from pt_vl.methods.maple import MaPLe, MaPLeConfig
    from pt_vl.methods.mvlpt import MVLPT, MVLPTConfig, average, union
    from pt_vl.methods.r_amt import RAMT, RAMTConfig
    from pt_vl.methods.restore import RESTORE, RESTOREConfig
    from pt_vl.methods.tip_adapter import TipAdapter, TipAdapterConfig, TipAdapterF, TipAdapterFConfig
    from pt_vl.methods.upt import UPT, UPTConfig
    from pt_vl.methods.vpt import VPT, VPTConfig
    from pt_vl.methods.zero_shot import ZeroShot, ZeroShotConfig
    from pt_vl.preprocessing import Preprocessing

__all__ = [
    "IVLP",
    "MVLPT",
    "RAMT",
    "RESTORE",
    "TEMPLATES",
    "UPT",
    "VPT",
    "CoCoOp",
    "CoCoOpConfig",
    "CoOp",
    "CoOpConfig",
    "DualEncoder",
    "IVLPConfig",
    "ImageSpec",
    "ImageTask",
    "LinearProbe",
    "LinearProbeConfig",
    "MVLPTConfig",
    "MaPLe",
    "MaPLeConfig",
    "Preprocessing",
    "RAMTConfig",
    "RESTOREConfig",
    "Sentences",
    "TipAdapter",
    "TipAdapterConfig",
    "TipAdapterF",
    "TipAdapterFConfig",
    "TowerPrompt",
    "UPTConfig",
    "VLConfig",
    "VLMethod",
    "VPTConfig",
    "Words",
    "ZeroShot",
    "ZeroShotConfig",
    "average",
    "cache_features",
    "load_backbone",
    "union",
]

_ROOMS = {
    "backbones": ("DualEncoder", "TowerPrompt", "Words", "load_backbone"),
    "preprocessing": ("Preprocessing",),
    "data": ("TEMPLATES", "ImageSpec", "ImageTask"),
    "method": ("Sentences", "VLConfig", "VLMethod", "cache_features"),
    "methods.cocoop": ("CoCoOp", "CoCoOpConfig"),
    "methods.coop": ("CoOp", "CoOpConfig"),
    "methods.linear_probe": ("LinearProbe", "LinearProbeConfig"),
    "methods.ivlp": ("IVLP", "IVLPConfig"),
    "methods.maple": ("MaPLe", "MaPLeConfig"),
    "methods.mvlpt": ("MVLPT", "MVLPTConfig", "average", "union"),
    "methods.r_amt": ("RAMT", "RAMTConfig"),
    "methods.restore": ("RESTORE", "RESTOREConfig"),
    "methods.tip_adapter": ("TipAdapter", "TipAdapterConfig", "TipAdapterF", "TipAdapterFConfig"),
    "methods.upt": ("UPT", "UPTConfig"),
    "methods.vpt": ("VPT", "VPTConfig"),
    "methods.zero_shot": ("ZeroShot", "ZeroShotConfig"),
}
_WHERE = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"pt_vl.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'pt_vl' has no attribute {name!r}")
