"""methods.toml says what is there: each row is counted again on its reference backbone, which holds no memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from pt_core import registry
from pt_nlp.models import reader_of

ENTRIES = list(registry.methods("nlp").values())

# name in `reference` -> (model, configuration as published, parameters)
T5_BASE = dict(vocab_size=32128, d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12)
BERT_LARGE = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
LLAMA_3B = dict(
    vocab_size=128256,
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=28,
    num_attention_heads=24,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
)
BACKBONES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "T5-base": (lambda: T5ForConditionalGeneration(T5Config(**T5_BASE)), 222_903_552),
    "BERT-large": (lambda: BertModel(BertConfig(**BERT_LARGE)), 335_141_888),
    "GPT-2": (lambda: GPT2LMHeadModel(GPT2Config()), 124_439_808),
    "Llama-3.2-3B": (lambda: LlamaForCausalLM(LlamaConfig(**LLAMA_3B)), 3_212_749_824),
    "LLaMA-7B": (lambda: LlamaForCausalLM(LlamaConfig()), 6_738_415_616),
}

# method -> the settings that `reference` names
SETTINGS: dict[str, dict[str, Any]] = {
    "prompt-tuning": dict(prompt_length=100),
    "spot": dict(prompt_length=100),
    "prefix-tuning": dict(prompt_length=200),
    "p-tuning": dict(prompt_length=20, encoder="mlp", hidden_dim=1024),
    "p-tuning-v2": dict(prompt_length=20, num_labels=2),
    "dept": dict(prompt_length=60, rank=30, max_source_length=256),
    "ptec": dict(prompt_length=53, num_labels=22, init_ids=(1, 2, 3)),
    "trie-search": dict(prompt_length=100, label_tokens=(((3, 4), (3, 1), (3, 4), (3, 1)),)),
    "lora": dict(r=8),
    "ia3": {},
    "linear-probe": dict(num_labels=5),
    "zero-shot": {},
    "in-context": {},
}


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_a_row_names_the_class_that_calls_itself_so(entry: registry.MethodEntry) -> None:
    method = registry.find_method("nlp", entry.name)
    assert method.name == entry.name
    assert method.__doc__ and "Parameters:" in method.__doc__ and "Fidelity:" in method.__doc__
    assert method.config_class.__module__ == method.__module__


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_the_count_of_a_row_is_that_of_the_method_on_its_reference_backbone(entry: registry.MethodEntry) -> None:
    if entry.name in ("lora", "ia3"):
        pytest.importorskip("peft", reason="peft is not installed: the extra `peft` of pt-nlp")
    cls = registry.find_method("nlp", entry.name)
    build, size = BACKBONES["GPT-2" if entry.reference == "any" else entry.reference.partition(",")[0]]
    with torch.device("meta"):
        backbone = build()
    assert sum(p.numel() for p in backbone.parameters()) == size
    words = reader_of(backbone).get_input_embeddings()  # prompts start from its rows: one row stands for all
    words.weight = nn.Parameter(torch.zeros(1, words.embedding_dim).expand(words.num_embeddings, -1))
    method = cls(backbone, cls.config_class(**SETTINGS[entry.name]))
    count = method.count()
    if "no head" in entry.reference:
        assert method.head is not None
        count -= sum(p.numel() for p in method.head.parameters())
    assert count == entry.parameters


def test_every_method_file_has_a_row() -> None:
    folder = registry.package_folder("nlp") / "methods"
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert {entry.target.partition(":")[0].rpartition(".")[2] for entry in ENTRIES} == files
