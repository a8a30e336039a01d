"""Every graph method under the core's contract suite, on molecules with missing labels and on graphs with features."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from pt_core.method import Method
from pt_core.registry import find_method, methods
from pt_core.testing import Case, contract_checks

SIZES = [5, 3, 6, 4, 2, 7]
# of methods that need other settings than their defaults here
SETTINGS: dict[str, dict[str, Any]] = {
    "all-in-one": {"tokens": 3, "lr": 0.05, "answer_epochs": 1, "prompt_epochs": 1},
    "gppt": {"structure_tokens": 3},
    "relief": {"members": 2, "minibatch": 4, "first_best_epoch": 1},
}
CASES: dict[str, dict[str, Any]] = {}  # what a method declares to the suite beyond its class
METHODS = list(methods("graph"))


@pytest.mark.parametrize("check", contract_checks())
@pytest.mark.parametrize("kind", ["node-gin", "chem"])
@pytest.mark.parametrize("name", METHODS)
def test_contract(
    name: str, kind: str, check: Any, make_backbone: Callable[..., Any], make_split: Callable[..., Any], tmp_path: Path
) -> None:
    molecule = kind == "chem"
    task = {"task": "multilabel" if molecule else "multiclass", "outputs": 2}

    def make(seed: int) -> tuple[nn.Module, Method]:
        backbone, chosen = make_backbone(kind), find_method("graph", name)
        config = {"num_outputs": 2, "task": task["task"], "seed": seed} | SETTINGS.get(name, {})
        return backbone, chosen(backbone, chosen.config_class.model_validate(config))

    train, validation = make_split(SIZES, molecule=molecule, **task), make_split(SIZES[:4], 1, molecule, **task)
    graphs = validation.batch([0, 1, 2])["graphs"]
    check(Case(name, make, train, validation, probe=lambda b: b(graphs), **CASES.get(name, {})), tmp_path)
