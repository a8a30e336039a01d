"""Prompt tuning for text and code. Names are loaded when they are first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pt_nlp.backbones import load_backbone
    from pt_nlp.data import TaskSpec, TextTask
    from pt_nlp.interop import export_peft, import_peft
    from pt_nlp.methods.dept import DePT, DePTConfig
    from pt_nlp.methods.in_context import InContext, InContextConfig
    from pt_nlp.methods.linear_probe import LinearProbe, LinearProbeConfig
    from pt_nlp.methods.p_tuning import PTuning, PTuningConfig
    from pt_nlp.methods.p_tuning_v2 import PTuningV2, PTuningV2Config
    from pt_nlp.methods.peft_peers import IA3, IA3Config, LoRA, LoRAConfig
    from pt_nlp.methods.prefix_tuning import PrefixTuning, PrefixTuningConfig
    from pt_nlp.methods.prompt_tuning import PromptTuning, PromptTuningConfig
    from pt_nlp.methods.ptec import PTEC, PTECConfig
    from pt_nlp.methods.spot import SPoT, SPoTConfig, similarities
    from pt_nlp.methods.trie_search import TrieSearch, TrieSearchConfig
    from pt_nlp.methods.zero_shot import ZeroShot, ZeroShotConfig

__all__ = [
    "IA3",
    "PTEC",
    "DePT",
    "DePTConfig",
    "IA3Config",
    "InContext",
    "InContextConfig",
    "LinearProbe",
    "LinearProbeConfig",
    "LoRA",
    "LoRAConfig",
    "PTECConfig",
    "PTuning",
    "PTuningConfig",
    "PTuningV2",
    "PTuningV2Config",
    "PrefixTuning",
    "PrefixTuningConfig",
    "PromptTuning",
    "PromptTuningConfig",
    "SPoT",
    "SPoTConfig",
    "TaskSpec",
    "TextTask",
    "TrieSearch",
    "TrieSearchConfig",
    "ZeroShot",
    "ZeroShotConfig",
    "export_peft",
    "import_peft",
    "load_backbone",
    "similarities",
]

_ROOMS = {
    "backbones": ("load_backbone",),
    "data": ("TaskSpec", "TextTask"),
    "interop": ("export_peft", "import_peft"),
    "methods.dept": ("DePT", "DePTConfig"),
    "methods.in_context": ("InContext", "InContextConfig"),
    "methods.linear_probe": ("LinearProbe", "LinearProbeConfig"),
    "methods.p_tuning": ("PTuning", "PTuningConfig"),
    "methods.p_tuning_v2": ("PTuningV2", "PTuningV2Config"),
    "methods.peft_peers": ("IA3", "IA3Config", "LoRA", "LoRAConfig"),
    "methods.prefix_tuning": ("PrefixTuning", "PrefixTuningConfig"),
    "methods.prompt_tuning": ("PromptTuning", "PromptTuningConfig"),
    "methods.ptec": ("PTEC", "PTECConfig"),
    "methods.spot": ("SPoT", "SPoTConfig", "similarities"),
    "methods.trie_search": ("TrieSearch", "TrieSearchConfig"),
    "methods.zero_shot": ("ZeroShot", "ZeroShotConfig"),
}
_WHERE = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"pt_nlp.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'pt_nlp' has no attribute {name!r}")
