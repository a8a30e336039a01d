"""methods.toml says what is there: each row is counted again on its reference backbone, which holds no memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel

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


@pytest.fixture
def vit_b16(make_tokeniser: Callable[..., Any]) -> DualEncoder:
    text = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
    image = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=image | {"patch_size": 16}, projection_dim=512))
    assert sum(p.numel() for p in model.parameters()) == 149_620_737
    words = model.text_model.embeddings.token_embedding  # contexts start from its rows: one row stands for all
    words.weight = nn.Parameter(torch.zeros(1, 512).expand(words.num_embeddings, -1))
    tokeniser = make_tokeniser()
    model.text_model.eos_token_id = tokeniser.eos_token_id
    return DualEncoder(model, tokeniser)


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


def test_every_method_file_has_a_row() -> None:
    folder = registry.package_folder("vl") / "methods"
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert {entry.target.partition(":")[0].rpartition(".")[2] for entry in ENTRIES} == files
