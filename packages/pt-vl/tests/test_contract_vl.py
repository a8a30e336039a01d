"""Every image-text method under the core's contract suite, on a CLIP and (plain paths) a SigLIP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

from pt_core.method import Method
from pt_core.registry import find_method, methods
from pt_core.testing import Case, contract_checks
from pt_vl.methods.mvlpt import union

CLASSES = ("cat", "big_house", "red car")
SETTINGS: dict[str, dict[str, Any]] = {  # of methods that need other settings than their defaults here
    "coop": {"prompt_length": 3, "lr": 0.05},
    "cocoop": {"init": "a photo", "reduction": 4, "lr": 0.05},
    "vpt": {"prompt_length": 2, "lr": 0.05},
    "ivlp": {"lr": 0.05},
    "maple": {"depth": 3, "lr": 0.05},
    "upt": {"prompt_length": 2, "hidden": 8, "lr": 0.05},
    "tip-adapter": {"cache_size": 7, "search_steps": (5, 3)},
    "tip-adapter-f": {"cache_size": 7, "search_steps": (5, 3), "lr": 0.02},
    "restore": {"depth": 3, "lr": 0.05},
    "r-amt": {"lr": 2e-3},
    "mvlpt": {"tasks": {"one": CLASSES}, "prompt_length": 2, "hidden": 8, "lr": 0.05},
}
CASES: dict[str, dict[str, Any]] = {  # what a method declares to the suite beyond its class
    "zero-shot": {"draws": False},
    "linear-probe": {"draws": False},
    "tip-adapter": {"draws": False},
}
METHODS = list(methods("vl"))


@pytest.mark.parametrize("check", contract_checks())
@pytest.mark.parametrize("family", ["clip", "siglip"])
@pytest.mark.parametrize("name", METHODS)
def test_contract(
    name: str,
    family: str,
    check: Any,
    make_encoder: Callable[..., Any],
    make_images: Callable[..., Any],
    pixels: Tensor,
    tmp_path: Any,
) -> None:
    def make(seed: int) -> tuple[nn.Module, Method]:
        backbone, chosen = make_encoder(family), find_method("vl", name)
        settings = {"class_names": CLASSES, "seed": seed} | SETTINGS.get(name, {})
        return backbone, chosen(backbone, chosen.config_class.model_validate(settings))

    train, validation = make_images(7), make_images(5, seed=1)
    if name == "mvlpt":
        train, validation = union({"one": train}), union({"one": validation})
    check(Case(name, make, train, validation, probe=lambda b: b.image(pixels), **CASES.get(name, {})), tmp_path)
