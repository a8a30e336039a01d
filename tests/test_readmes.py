"""The Python of the READMEs runs as it stands: on tiny models and files, for a few steps."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import pt_nlp
import pt_vl
from pt_core.testing import one_thread

ROOT = Path(__file__).parents[1]
WORDS = "it was a good bad film Stars : 1 5 Never again ."
SHORT = {r"epochs=\d+": "epochs=1", r"max_steps=\d+": "max_steps=4", r"evaluate_every=\d+": "evaluate_every=2"}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with one_thread():
        yield


def blocks(readme: str) -> list[str]:
    """Python of a README, with shorter runs."""
    found = re.findall(r"```python\n(.*?)```", (ROOT / readme).read_text("utf-8"), re.DOTALL)
    for long, short in SHORT.items():
        found = [re.sub(long, short, block) for block in found]
    return found


def text_model() -> tuple[Any, Any]:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS.split()])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    sizes = {"hidden_size": 576, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 9}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32, max_position_embeddings=512, pad_token_id=0, eos_token_id=1, **sizes)
    return LlamaForCausalLM(config).eval(), PreTrainedTokenizerFast(tokenizer_object=made, **names)


@pytest.mark.parametrize("readme", ["README.md", "packages/pt-nlp/README.md"])
def test_text(readme: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = text_model()
    monkeypatch.setattr(pt_nlp, "load_backbone", lambda name, kind: (model, tokenizer))
    reviews = [
        {"review": f"it was a {word} film", "stars": stars} for word, stars in (("good", "5"), ("bad", "1"))
    ] * 12
    Path("train.jsonl").write_text("\n".join(map(json.dumps, reviews)), "utf-8")
    inputs = {"input_ids": torch.tensor([[3, 4], [5, 6], [7, 8]]), "max_new_tokens": 2, "pad_token_id": 0}
    for block in blocks(readme):
        exec(block, {"model": model, "backbone": model, "inputs": inputs})
    assert "'label': " in capsys.readouterr().out
    assert (Path("stars-dept") / "prompt.safetensors").is_file()


def test_images_and_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    load = pt_vl.load_backbone
    monkeypatch.setattr(pt_vl, "load_backbone", lambda name: load("zoo:mini-clip"))
    published = pt_vl.CoOp.published
    once = {"epochs": 1, "device": "cpu", "progress": False}
    monkeypatch.setattr(pt_vl.CoOp, "published", lambda *of: published(*of).model_copy(update=once))
    draw = np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 2)):
        for name in ("cat", "dog"):
            folder = Path("pets") / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(draw.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    Image.new("RGB", (40, 30)).save("new.jpg")
    train, use = blocks("packages/pt-vl/README.md")
    made: dict[str, Any] = {}
    exec(train, made)
    assert made["other"].config.class_names == ("hamster", "rabbit")
    assert (Path("pets-coop") / "prompt.safetensors").is_file()
    exec(use, {})
    told = capsys.readouterr().out
    assert "[{'label': " in told and "'accuracy': " in told


def test_graphs() -> None:
    pytest.importorskip("rdkit", reason="rdkit is not installed: the extra `demo` of pt-graph")
    rings = ("c1ccccc1", "C1CCCCC1", "c1ccncc1", "C1CCOC1", "c1ccsc1")
    rows = [{"smiles": "C" * chain + ring, "p_np": chain % 2} for ring in rings for chain in range(1, 41)]
    with open("bbbp.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, ["smiles", "p_np"])
        table.writeheader()
        table.writerows(rows)
    made: dict[str, Any] = {}
    for block in blocks("packages/pt-graph/README.md"):
        exec(block, made)
    assert (Path("bbbp-relief") / "prompt.safetensors").is_file()
