"""Prompt tuning for every modality: the thin core. Names are loaded when they are first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pt_core.artifacts import load, load_artifact, push
    from pt_core.attachment import Handle, attach, off, route
    from pt_core.data import Split, base_to_new, few_shot
    from pt_core.errors import InputError
    from pt_core.evaluation import evaluate
    from pt_core.frozen import FeatureCache, fingerprint, freeze
    from pt_core.method import Loss, Method, MethodConfig, Output
    from pt_core.packing import packed
    from pt_core.plan import FitConfig
    from pt_core.prompts import DeepPrompt, KeyValuePrompt, LowRankOffset, Prompt, SoftPrompt
    from pt_core.training import FitResult, Loop, fit

__all__ = [
    "DeepPrompt",
    "FeatureCache",
    "FitConfig",
    "FitResult",
    "Handle",
    "InputError",
    "KeyValuePrompt",
    "Loop",
    "Loss",
    "LowRankOffset",
    "Method",
    "MethodConfig",
    "Output",
    "Prompt",
    "SoftPrompt",
    "Split",
    "attach",
    "base_to_new",
    "evaluate",
    "few_shot",
    "fingerprint",
    "fit",
    "freeze",
    "load",
    "load_artifact",
    "off",
    "packed",
    "push",
    "route",
]

_ROOMS = {
    "artifacts": ("load", "load_artifact", "push"),
    "attachment": ("Handle", "attach", "off", "route"),
    "data": ("Split", "base_to_new", "few_shot"),
    "errors": ("InputError",),
    "evaluation": ("evaluate",),
    "frozen": ("FeatureCache", "fingerprint", "freeze"),
    "method": ("Loss", "Method", "MethodConfig", "Output"),
    "packing": ("packed",),
    "prompts": ("DeepPrompt", "KeyValuePrompt", "LowRankOffset", "Prompt", "SoftPrompt"),
    "plan": ("FitConfig",),
    "training": ("FitResult", "Loop", "fit"),
}
_WHERE = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"pt_core.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'pt_core' has no attribute {name!r}")
