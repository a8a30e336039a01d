"""Trie search as a method: what is written and learned, against labels as text, and from a recipe to a fresh prediction."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pt_core import artifacts, runs
from pt_core.errors import InputError
from pt_core.evaluation import evaluate
from pt_core.plan import FitConfig
from pt_nlp.constrained import constrained_labels, label_ids, labels_as_text
from pt_nlp.data import TextTask
from pt_nlp.methods.prompt_tuning import PromptTuning, PromptTuningConfig
from pt_nlp.methods.trie_search import SURE, TrieSearch, TrieSearchConfig
from pt_nlp.workbench import Bench, Recipe, open_artifact

Build = Callable[..., nn.Module]
LABELS = ("red sun", "red", "blue rain")
ROWS = [
    {"text": "film", "label": ["red"]},
    {"text": "news", "label": ["red", "blue rain"]},
    {"text": "sport", "label": ["red sun"]},
    {"text": "great film", "label": ["blue rain"]},
    {"text": "awful news", "label": ["blue rain", "red", "red sun"]},
]
RUN = {"batch_size": 5, "device": "cpu", "progress": False}


@pytest.fixture
def words(words: Any) -> Any:
    words.add_tokens([";"])
    return words


def task_of(words: Any, backbone: str = "causal-lm", rows: list = ROWS) -> TextTask:
    return TextTask.from_rows({"train": rows}, words, kind="multilabel", labels=LABELS, backbone=backbone)


def made(model: nn.Module, task: TextTask, **settings: Any) -> TrieSearch:
    known = {"label_tokens": label_ids(task, LABELS), "end_id": task.tokenizer.eos_token_id, "pad_id": task.encoder.pad}
    return TrieSearch(model, TrieSearchConfig(**{"prompt_length": 4, "lr": 0.1} | known | settings)).eval()


@pytest.mark.parametrize("backbone", ["causal-lm", "seq2seq"])
def test_the_loss_is_that_of_prompt_tuning_on_labels_as_text(tiny: Build, words: Any, backbone: str) -> None:
    model = tiny("Llama" if backbone == "causal-lm" else "T5")
    task = task_of(words, backbone)
    method = made(model, task)
    method.fit(task.train, None, FitConfig(max_steps=1, **RUN))
    assert method.order.tolist() == [1, 2, 0]  # red and blue rain three times, in the order of classes; red sun twice
    text = TextTask.from_rows(
        labels_as_text({"train": [row | {"label": row["label"]} for row in ROWS]}),
        words,
        kind="text-to-text",
        backbone=backbone,
    )
    plain = PromptTuning(model, PromptTuningConfig(prompt_length=4)).eval()
    plain.load_trained_state({"prompt.weight": method.prompt.weight.detach()})
    written = [text.train.rows[i]["target"] for i in range(5)]
    order = ["red", "blue rain", "red sun"]  # labels_as_text breaks ties by name, here they are broken by class
    for i, row in enumerate(ROWS):
        mine = method.write([label in row["label"] for label in LABELS], method.order.tolist())
        assert sorted(mine) == sorted(written[i])
        assert mine == text.encoder.target("; ".join(label for label in order if label in row["label"]))
    same = [i for i in range(5) if len(ROWS[i]["label"]) == 1]
    ours, theirs = method.loss(task.train.batch(same)), plain.loss(text.train.batch(same))
    torch.testing.assert_close(ours.total, theirs.total, atol=1e-5, rtol=1e-5)
    assert ours.count == theirs.count


@pytest.mark.parametrize("backbone", ["causal-lm", "seq2seq"])
def test_it_predicts_by_constrained_decoding(tiny: Build, words: Any, backbone: str) -> None:
    task = task_of(words, backbone)
    method = made(tiny("Llama" if backbone == "causal-lm" else "T5"), task)
    texts = [row["text"] for row in ROWS]
    logits = method(task.train.batch(range(5))).logits
    assert set(logits.unique().tolist()) <= {SURE, -SURE} and (logits > 0).any(1).all()
    found = [answer["labels"] for answer in task.predict(method, texts)]
    text = TextTask.from_rows(labels_as_text({"train": ROWS}), words, kind="text-to-text", backbone=backbone)
    expected = constrained_labels(method, text, texts, LABELS)
    assert [set(labels) for labels in found] == [set(labels) for labels in expected]


def test_its_defaults_are_those_of_the_released_command_line_and_start_from_the_labels(tiny: Build, words: Any) -> None:
    config, model = TrieSearchConfig(), tiny("Llama")
    assert (config.prompt_length, config.init, config.lr) == (100, "labels", 3e-3)
    table = model.get_input_embeddings().weight
    for given, texts in ((), LABELS), ((tuple(words("sun")["input_ids"]),), ("sun",)):
        rows = made(model, task_of(words), label_ids=given).prompt.weight
        expected = torch.stack([table[words(text)["input_ids"]].mean(0) for text in texts])
        torch.testing.assert_close(rows[: len(texts)], expected)


def test_it_learns_the_labels(tiny: Build, words: Any) -> None:
    task = task_of(words)
    method = made(tiny("Llama", hidden_size=32, head_dim=8, initializer_range=0.5), task)
    before = evaluate(method, task.train)
    method.fit(task.train, None, FitConfig(max_steps=120, **RUN))
    after = evaluate(method, task.train)
    assert after["loss"] < 0.4 * before["loss"]
    assert after["macro-f1"] > max(0.7, before["macro-f1"] + 0.2)


def test_what_cannot_be_written_is_refused(tiny: Build, words: Any) -> None:
    task = task_of(words)
    with pytest.raises(InputError, match=r"'label_tokens': the tokens of 0 labels are known, all are needed"):
        TrieSearch(tiny("Llama"))
    with pytest.raises(InputError, match="the tokens of 3 labels are known, 5 are needed"):
        made(tiny("Llama"), task, num_labels=5)
    with pytest.raises(InputError, match="a BertModel writes no text"):
        made(tiny("Bert"), task)
    empty = task.split([*ROWS, {"text": "film", "label": []}])
    with pytest.raises(InputError, match="a row has no label"):
        made(tiny("Llama"), task).fit(empty, None, FitConfig(max_steps=3, **RUN | {"batch_size": 6}))
    classes = TextTask.from_rows(
        {"train": [row | {"label": row["label"][0]} for row in ROWS]}, words, kind="classification", labels=LABELS
    )
    with pytest.raises(InputError, match="trie search writes sets of labels.*multilabel task"):
        made(tiny("Llama"), task).fit(classes.train, None, FitConfig(max_steps=1, **RUN))


def test_a_recipe_compares_it_with_ptec_and_its_prompt_opens_again(tiny: Build, words: Any, tmp_path: Path) -> None:
    tiny("Llama").save_pretrained(tmp_path / "backbone")
    words.save_pretrained(tmp_path / "backbone")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS * 4))
    checked = Recipe.model_validate(
        {
            "method": {"name": "ptec", "prompt_length": 2, "fill": "labels"},
            "backbone": {"name": str(tmp_path / "backbone"), "dtype": "float32"},
            "data": {"train": str(tmp_path / "rows.jsonl"), "kind": "multilabel", "shots": 14, "validation_shots": 3},
            "training": {"max_steps": 2, "batch_size": 4, "progress": False, "monitor": "macro-f1", "device": "cpu"},
            "compare": {"trie-search": {"prompt_length": 3}},
        }
    )
    outcomes = runs.compare_recipe(Bench(checked), ["ptec", "trie-search"], [0], tmp_path / "out", lambda line: None)
    assert [outcome.result.method for outcome in outcomes] == ["ptec", "trie-search"]
    for outcome in outcomes:
        assert {"macro-f1", "micro-f1"} <= outcome.result.metrics.keys()
    assert outcomes[1].result.trainable_parameters == 3 * 16
    session = open_artifact(artifacts.load_artifact(outcomes[1].artifact), str(tmp_path / "backbone"))
    answer = session.predict(["great film"])[0]
    assert answer["labels"] and set(answer["labels"]) <= set(LABELS)
    assert {round(score, 6) for score in answer["scores"].values()} <= {0.0, 1.0}
