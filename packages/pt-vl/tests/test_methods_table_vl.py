"""methods.toml says what is there: each row is counted again on its reference backbone, which holds
no memory, and of what it trains there, the start values are looked at."""

from __future__ import annotations

from typing import Any

import pytest

from pt_core import registry
from pt_vl.backbones import DualEncoder
from pt_vl.methods.mvlpt import MVLPTConfig

ENTRIES = list(registry.methods("vl").values())
# method -> the settings that `reference` names
SETTINGS: dict[str, dict[str, Any]] = {
    "linear-probe": {"class_names": tuple(f"class {i}" for i in range(100))},
    "coop": {"prompt_length": 16},
    "cocoop": {"init": "a photo of a"},
    "mvlpt": {"tasks": {"pets": ("cat", "dog")}},
    "tip-adapter": {"cache_size": 16},
    "tip-adapter-f": {"cache_size": 1600},
}


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_a_row_names_the_class_that_calls_itself_so(entry: registry.MethodEntry) -> None:
    method = registry.find_method("vl", entry.name)
    assert method.name == entry.name
    assert method.__doc__
    assert "Parameters:" in method.__doc__
    assert "Fidelity:" in method.__doc__
    assert method.config_class.__module__ == method.__module__


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_the_count_of_a_row_is_that_of_the_method_on_its_reference_backbone(
    entry: registry.MethodEntry, vit_b16: DualEncoder
) -> None:
    cls = registry.find_method("vl", entry.name)
    settings = {"class_names": ("cat", "dog")} | SETTINGS.get(entry.name, {})
    assert cls(vit_b16, cls.config_class.model_validate(settings)).count() == entry.parameters


@pytest.mark.parametrize(
    ("prompt", "length", "count"), [("text", 16, 8_192), ("visual", 16, 147_456), ("unified", 16, 683_136)]
)
def test_the_counts_of_mvlpts_three_prompts(prompt: str, length: int, count: int, vit_b16: DualEncoder) -> None:
    settings = {"tasks": {"pets": ("cat", "dog")}, "prompt": prompt, "prompt_length": length}
    assert registry.find_method("vl", "mvlpt")(vit_b16, MVLPTConfig.model_validate(settings)).count() == count


@pytest.mark.parametrize(
    ("name", "settings", "tensor", "shape", "uniform"),
    [
        ("coop", {}, "context", (16, 512), False),
        ("vpt", {}, "visual", (12, 8, 768), False),
        ("vpt", {"init": "uniform"}, "visual", (12, 8, 768), True),
        ("ivlp", {}, "deep", (11, 2, 512), False),
        ("ivlp", {}, "visual", (12, 2, 768), False),
        ("maple", {}, "deep", (8, 2, 512), False),
        ("restore", {}, "deep", (8, 2, 512), False),
        ("upt", {}, "context", (4, 512), False),
        ("upt", {}, "visual", (12, 4, 768), True),
        ("mvlpt", {"prompt": "text"}, "prompted.context", (16, 512), False),
        ("mvlpt", {"prompt": "visual"}, "prompted.visual", (12, 16, 768), True),
        ("mvlpt", {"prompt": "unified"}, "prompted.context", (4, 512), False),
        ("mvlpt", {"prompt": "unified"}, "prompted.visual", (12, 4, 768), True),
    ],
)
def test_start_values_are_normal_or_uniform_as_published(
    name: str, settings: dict[str, Any], tensor: str, shape: tuple[int, ...], uniform: bool, vit_b16: DualEncoder
) -> None:
    cls = registry.find_method("vl", name)
    known = {"tasks": {"pets": ("cat", "dog")}} if name == "mvlpt" else {"class_names": ("cat", "dog")}
    values = cls(vit_b16, cls.config_class.model_validate(known | settings)).get_parameter(tensor).detach()
    n, most, bound = values.numel(), float(values.abs().max()), 0.0625  # sqrt(6 / (3 * 16^2 + 768))
    deviation = bound / 3**0.5 if uniform else 0.02
    assert values.shape == shape
    assert float(values.std()) == pytest.approx(deviation, rel=5 / (2 * n) ** 0.5)  # five standard errors
    assert abs(float(values.mean())) < deviation * 5 / n**0.5
    assert 0.99 * bound < most <= bound if uniform else 3 * deviation < most < 6 * deviation
    assert len(values.unique()) > 0.99 * n  # of each block and row by itself


def test_every_method_file_has_a_row() -> None:
    folder = registry.package_folder("vl") / "methods"
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert {entry.target.partition(":")[0].rpartition(".")[2] for entry in ENTRIES} == files
