"""Every image-text method under the core's contract suite: on a CLIP, a SigLIP (plain paths) and, in part, on open_clip."""

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
TASKS = {"one": ("tree", "dog"), "two": CLASSES}
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
    "mvlpt": {"tasks": TASKS, "prompt_length": 2, "hidden": 8, "lr": 0.05},
}
# What a setting makes another prompt of: name -> method, setting.
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "coop-class-specific": ("coop", {"class_specific": True}),
    "mvlpt-text": ("mvlpt", {"prompt": "text", "restrict": True}),
    "mvlpt-visual": ("mvlpt", {"prompt": "visual"}),
}
CASES: dict[str, dict[str, Any]] = {  # what a method declares to the suite beyond its class
    "zero-shot": {"draws": False},
    "linear-probe": {"draws": False},
    "tip-adapter": {"draws": False},
}
METHODS = list(methods("vl"))
NAMES = {"clip": [*METHODS, *FORMS], "siglip": METHODS, "open-clip": [*METHODS, *FORMS]}
# What can go wrong in how a family's towers are called; the others are of the method alone.
OPEN_CLIP = (
    "backbone_stays_bit_identical",
    "gradients_reach_what_is_trained_and_nothing_else",
    "saving_and_loading_is_bit_exact",
    "batch_mates_do_not_change_a_row",
)


def cases() -> list[Any]:
    return [
        pytest.param(name, family, *check.values, id=f"{name}-{family}-{check.id}")
        for family, names in NAMES.items()
        for name in names
        for check in contract_checks()
        if family != "open-clip" or check.id in OPEN_CLIP
    ]


@pytest.mark.parametrize(("name", "family", "check"), cases())
def test_contract(
    name: str,
    family: str,
    check: Any,
    make_encoder: Callable[..., Any],
    make_images: Callable[..., Any],
    pixels: Tensor,
    tmp_path: Any,
) -> None:
    method, form = FORMS.get(name, (name, {}))

    def make(seed: int) -> tuple[nn.Module, Method]:
        backbone, chosen = make_encoder(family), find_method("vl", method)
        settings = {"class_names": CLASSES, "seed": seed} | SETTINGS.get(method, {}) | form
        return backbone, chosen(backbone, chosen.config_class.model_validate(settings))

    train, validation = make_images(7), make_images(5, seed=1)
    if method == "mvlpt":  # of each task there are rows among the first three
        train = union({"one": make_images(4, seed=2, classes=2), "two": train})
        validation = union({"one": make_images(2, seed=3, classes=2), "two": validation})
    check(Case(name, make, train, validation, probe=lambda b: b.image(pixels), **CASES.get(name, {})), tmp_path)
