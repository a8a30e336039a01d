"""methods.toml says what is there: each row is counted again on its reference backbone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pt_core import registry
from pt_graph import ChemGNN, GraphBackbone

ENTRIES = list(registry.methods("graph").values())

# name in `reference` -> (backbone, parameters)
BACKBONES: dict[str, tuple[Callable[[], GraphBackbone], int]] = {"chem GIN": (ChemGNN, 1_857_900)}

# method -> the settings that `reference` names
SETTINGS: dict[str, dict[str, Any]] = {
    "gpf": {},
    "gpf-plus": {"basis_size": 10},
    "supt-soft": {"basis_size": 10},
    "supt-hard": {"basis_size": 5},
    "all-in-one": {"tokens": 10},
    "gppt": {"structure_tokens": 7, "num_outputs": 12},
    "graph-prompt": {},
    "linear-probe": {"num_outputs": 12},
    "fine-tuning": {},
}


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_a_row_names_the_class_that_calls_itself_so(entry: registry.MethodEntry) -> None:
    method = registry.find_method("graph", entry.name)
    assert method.name == entry.name
    assert method.__doc__ and "Parameters:" in method.__doc__ and "Fidelity:" in method.__doc__
    room = entry.target.partition(":")[0]  # a file, or a folder of a method of several parts
    assert method.__module__.startswith(room)
    assert method.config_class.__module__.startswith(room)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_the_count_of_a_row_is_that_of_the_method_on_its_reference_backbone(entry: registry.MethodEntry) -> None:
    cls = registry.find_method("graph", entry.name)
    build, size = BACKBONES[entry.reference.partition(",")[0]]
    backbone = build()
    assert sum(p.numel() for p in backbone.parameters()) == size
    method: Any = cls(backbone, cls.config_class(**{"num_outputs": 1} | SETTINGS.get(entry.name, {})))
    count = method.count()
    if "no head" in entry.reference:
        count -= sum(p.numel() for p in method.head.parameters())
    assert count == entry.parameters


def test_every_method_file_has_a_row() -> None:
    folder = registry.package_folder("graph") / "methods"
    files = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    named = {entry.target.partition(":")[0].removeprefix("pt_graph.methods.").partition(".")[0] for entry in ENTRIES}
    assert named == files - {"__init__"}
