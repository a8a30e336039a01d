"""What the command line does for text, without the command line: recipe to job, artifact to prediction."""

from __future__ import annotations

import copy
import json
import re
import warnings
import zlib
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from tokenizers.processors import TemplateProcessing

from pt_core import artifacts, doctor, recipe, runs
from pt_core.errors import InputError
from pt_nlp import demo, workbench
from pt_nlp.backbones import load_backbone
from pt_nlp.data import TaskSpec, TextTask
from pt_nlp.workbench import Bench, Recipe, Session, TextData, exports, open_artifact

GOLDEN = Path(__file__).parent / "golden" / "v1"
ROWS = [
    {"text": f"{first} {second} film", "label": label, "topic": topic}
    for label, words in (("positive", ["good", "great", "sun"]), ("negative", ["bad", "awful", "rain"]))
    for first in words
    for second in ("red", "blue", "green", "news")
    for topic in ("sport", "film")
]
# A model, what it is loaded as, and what it is trained to do.
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Llama": ("causal-lm", {"name": "prompt-tuning", "prompt_length": 4}, {}),
    "Bert": (
        "encoder",
        {"name": "ptec", "prompt_length": 4, "fill": "labels", "pooling": "first"},
        {"kind": "multilabel", "shots": 12},
    ),
    "T5": ("seq2seq", {"name": "prompt-tuning", "prompt_length": 4, "lr": 0.3}, {}),
}


@pytest.fixture
def folder(tmp_path: Path, tiny: Callable[..., Any], words: Any) -> Path:
    """A backbone in `backbone/`, 48 rows in `rows.jsonl`."""
    tiny("Llama").save_pretrained(tmp_path / "backbone")
    words.save_pretrained(tmp_path / "backbone")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def made(folder: Path, method: dict[str, Any] | None = None, data: dict[str, Any] | None = None, **top: Any) -> Recipe:
    content: dict[str, Any] = {
        "method": method or {"name": "prompt-tuning", "prompt_length": 4},
        "backbone": {"name": str(folder / "backbone"), "dtype": "float32"},
        "data": {"train": str(folder / "rows.jsonl"), "shots": 4, "validation_shots": 2} | (data or {}),
        "training": {"max_steps": 3, "batch_size": 4, "progress": False},
    }
    return Recipe.model_validate(content | top)


def sets_of_labels(folder: Path) -> list[dict[str, Any]]:
    """Every row of `rows.jsonl` gets its topic as a second label."""
    rows = [row | {"label": [row["label"], row["topic"]]} for row in ROWS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def of_family(folder: Path, tiny: Callable[..., Any], family: str, **data: Any) -> Bench:
    """The bench of a family, whose model takes the place of the one in `backbone/`."""
    kind, method, own = FAMILIES[family]
    tiny(family).save_pretrained(folder / "backbone")
    if own.get("kind") == "multilabel":
        sets_of_labels(folder)
    backbone = {"name": str(folder / "backbone"), "kind": kind, "dtype": "float32"}
    return Bench(made(folder, method, own | data, backbone=backbone))


def trained(folder: Path, **changes: Any) -> tuple[Bench, Path]:
    bench = Bench(made(folder, **changes))
    outcome = runs.train(*bench.job(bench.recipe.method.name, 0), folder / "run")
    assert outcome.artifact is not None
    return bench, outcome.artifact


# --- data ------------------------------------------------------------------------------------------------------------
def split_texts(folder: Path, seed: int = 0, **data: Any) -> dict[str, list[str]]:
    checked = made(folder, data=data)
    rows = checked.data.rows()
    seen: dict[str, list[str]] = {}

    class Tokenizer:  # keeps the texts of each split apart, in the order in which they are tokenised
        pad_token_id, eos_token_id, all_special_ids = 0, 1, (0, 1)

        def get_vocab(self) -> dict[str, int]:
            return {"a": 2}

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [2 + ord(c) for c in text]}

    task = checked.data.task(rows, Tokenizer(), "causal-lm", seed)
    for name in ("train", "validation", "test"):
        split = getattr(task, name)
        if split is not None:
            seen[name] = ["".join(chr(i - 2) for i in split.rows[j]["source"]) for j in range(len(split))]
    return seen


def test_the_rows_that_the_shots_leave_are_the_test(folder: Path) -> None:
    parts = split_texts(folder, template="{text} {topic}")
    assert [len(parts[name]) for name in ("train", "validation", "test")] == [8, 4, 36]
    together = [text for part in parts.values() for text in part]
    assert sorted(together) == sorted(f"{row['text']} {row['topic']}" for row in ROWS)


def test_the_seed_draws_the_rows(folder: Path) -> None:
    a, b, again = (split_texts(folder, seed, template="{text} {topic}", max_test_rows=10) for seed in (0, 1, 0))
    assert a == again
    assert a["train"] != b["train"]
    assert [len(part["test"]) for part in (a, b)] == [10, 10]
    assert not {*a["test"]} & {*a["train"], *a["validation"]}


def test_without_shots_all_other_rows_are_trained_on(folder: Path) -> None:
    parts = split_texts(folder, shots=None, validation_shots=3, template="{text} {topic}")
    assert {name: len(part) for name, part in parts.items()} == {"train": 42, "validation": 6}
    assert not {*parts["train"]} & {*parts["validation"]}


def test_shots_that_leave_nothing_to_test_on_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"rows\.jsonl: no rows are left to test on\. Draw fewer shots"):
        split_texts(folder, shots=20, validation_shots=4)
    parts = split_texts(folder, shots=20, validation_shots=4, test=str(folder / "rows.jsonl"))
    assert len(parts["test"]) == 48


@pytest.mark.parametrize(
    ("bad", "kind", "problem"),
    [
        ({"label": ""}, "verbalizer", "field 'label': the label is empty"),
        ({"label": 3}, "verbalizer", "field 'label': label 3 is an integer, the labels before it are not"),
        ({"label": None}, "verbalizer", "field 'label': the row has no label"),
        ({"label": 3}, "text-to-text", "field 'label': the label is empty or not text"),
        ({"label": None}, "multilabel", "field 'label': the row has no label"),
        ({"label": 3}, "multilabel", "field 'labels': 3 is not a list of labels"),
        ({"label": "sport"}, "multilabel", "field 'labels': 'sport' is not a list of labels"),
        ({"label": ["sport", 3]}, "multilabel", "field 'labels': label 3 is an integer"),
    ],
)
def test_a_bad_row_is_refused_by_its_place_in_the_file_before_the_backbone_is_loaded(
    folder: Path, bad: dict[str, Any], kind: str, problem: str
) -> None:
    rows = sets_of_labels(folder) if kind == "multilabel" else [*ROWS]
    rows[38] = rows[38] | bad
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=rf"rows\.jsonl, row 39, {problem}"):
        Bench(made(folder, data={"kind": kind}, backbone={"name": "nowhere"}))


def test_a_row_without_a_label_is_refused_where_labels_are_written_before_any_method_trains(folder: Path) -> None:
    rows = sets_of_labels(folder)
    rows[38] = rows[38] | {"label": []}
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bench = Bench(made(folder, data={"kind": "multilabel", "shots": None}, compare={"trie-search": {}}))
    with pytest.raises(
        InputError, match=r"compare\.trie-search: .*rows\.jsonl, row 39, field 'label': the row has no label"
    ):
        runs.compare_recipe(bench, ["prompt-tuning", "trie-search"], [0], folder / "runs")
    assert not (folder / "runs" / "cells").exists()


def test_a_bad_test_row_is_refused_by_its_place_in_the_file(folder: Path) -> None:
    rows = [dict(ROWS[i % 48]) for i in range(100)]
    rows[96]["label"] = "neutral"
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        InputError,
        match=r"test\.jsonl, row 97, field 'label': unknown label 'neutral'\. Known labels: negative, positive",
    ):
        split_texts(folder, test=str(folder / "test.jsonl"), max_test_rows=40)


def test_too_few_rows_of_a_class_are_named_with_their_file(folder: Path) -> None:
    with pytest.raises(InputError, match=r"rows\.jsonl, field 'label': class 'negative' has 24 rows, 101 wanted"):
        split_texts(folder, shots=99)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"shots": 99}, r"rows\.jsonl, field 'label': class 'negative' has 24 rows, 101 wanted"),
        ({"shots": 22}, r"rows\.jsonl: no rows are left to test on"),
        ({"verbalizer": {"neutral": "so"}}, r"the verbalizer names unknown labels: \['neutral'\]"),
    ],
)
def test_rows_are_drawn_before_the_backbone_is_loaded(folder: Path, data: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        Bench(made(folder, data=data, backbone={"name": "nowhere"}))


# --- what is refused before anything is loaded -----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("data", "top", "problem"),
    [
        ({"train": "gone.jsonl"}, {}, r"data\.train.*no such file.*gone\.jsonl"),
        ({"train": "asset:bbc"}, {}, r"data\.train.*no such asset; there are asset:bbc-news, asset:bbc-records"),
        ({"template": "{txt}"}, {}, r"data\.template.*must contain \{text\}"),
        ({"template": "{text} {label}"}, {}, r"data\.template.*must not contain \{label\}"),
        ({"template": "{text} {topic}", "label": "topic"}, {}, r"data\.template.*must not contain \{topic\}"),
        ({"text": "topic", "label": "topic"}, {}, r"data\.label.*the answer would be the input: both are .*'topic'"),
        ({"text": "label"}, {}, r"data\.label.*the answer would be the input"),
        ({"label": "text"}, {}, r"data\.label.*the answer would be the input"),
        ({"kind": "classification", "objective": "tokens"}, {}, r"data'.*objective has no effect with kind: class"),
        (
            {"kind": "multilabel", "length_normalised": True},
            {},
            r"data'.*length_normalised has no effect with kind: mul",
        ),
        ({"kind": "text-to-text", "verbalizer": {"a": "b"}}, {}, r"data'.*verbalizer has no effect with kind: text-to"),
        ({"kind": "classification", "verbalizer": {"a": "b"}}, {}, r"data\.verbalizer has no effect with kind: class"),
        ({"kind": "multilabel", "target_prefix": ""}, {}, r"data\.target_prefix has no effect with kind: multilabel"),
        ({"validation": "rows.jsonl"}, {}, r"a validation file or validation_shots, not both"),
        ({"max_source_length": True}, {}, r"data\.max_source_length.*true and false are no value of this setting"),
        ({"max_source_length": 0}, {}, r"data\.max_source_length.*greater than or equal to 1"),
        ({"kind": "verbaliser"}, {}, r"data\.kind.*'verbalizer', 'classification', 'multilabel' or 'text-to-text'"),
        (
            {},
            {"backbone": {"name": "asset:gpt"}},
            r"backbone\.name.*no such asset; there are asset:smollm2, asset:minilm",
        ),
        (
            {},
            {"backbone": {"name": "x", "kind": "encoder"}},
            r"verbalizer needs a language model; an encoder takes class",
        ),
        ({}, {"backbone": {"name": "x", "dtype": "half"}}, r"backbone\.dtype.*'float32', 'bfloat16' or 'float16'"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused(
    folder: Path, data: dict[str, Any], top: dict[str, Any], problem: str
) -> None:
    if "validation" in data:
        data = data | {"validation": str(folder / "rows.jsonl")}
    with pytest.raises(ValueError) as caught:
        made(folder, data=data, **top)
    message = str(recipe.explain(caught.value, Recipe))  # type: ignore[arg-type]
    assert re.search(problem, message), message


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("prompt-tuning", "num_labels", 7),
        ("ptec", "multilabel", True),
        ("trie-search", "label_tokens", []),
        ("trie-search", "end_id", 5),
        ("trie-search", "pad_id", 5),
    ],
)
def test_what_the_data_say_is_no_setting_of_a_method(folder: Path, name: str, key: str, value: Any) -> None:
    checked = made(folder, {"name": name, key: value}, {"kind": "classification"})
    with pytest.raises(InputError, match=rf"'method\.{key}': the (data|tokenizer) says?.*\. Leave it out here"):
        checked.config()
    checked = made(folder, {"name": "prompt-tuning", "lenght": 2}, {"kind": "classification"})
    with pytest.raises(InputError, match=r"Allowed there: .*prompt_length") as caught:
        checked.config()
    assert "num_labels" not in str(caught.value)


def test_label_words_may_be_named_with_a_head_where_a_method_reads_them(folder: Path) -> None:
    words: dict[str, Any] = {"kind": "multilabel", "verbalizer": {"positive": "good"}}
    made(folder, {"name": "prompt-tuning", "init": "labels"}, words)
    made(folder, data=words | {"target_prefix": ""}, compare={"written": {"method": "trie-search"}})


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"data.metrics": ["nope"]}, "field 'data.metrics': no metric 'nope' for verbalizer; there are accuracy, "),
        ({"data.metrics": ["exact-match"]}, "field 'data.metrics': no metric 'exact-match' for verbalizer"),
        (
            {"training.monitor": "nope"},
            "field 'training.monitor': the run monitors 'nope', which verbalizer does not score here. "
            "Choose one of: loss, accuracy, macro-f1",
        ),
        (
            {"training.monitor": "macro-f1", "data.metrics": ["accuracy"]},
            "field 'training.monitor': the run monitors 'macro-f1', which verbalizer does not score here. "
            "Choose one of: loss, accuracy",
        ),
        (
            {"compare": {"dept": {"training": {"monitor": "nope"}}}},
            "field 'compare.dept.training.monitor': the run monitors 'nope'",
        ),
    ],
)
def test_what_a_recipe_scores_and_monitors_is_checked_with_it(
    folder: Path, changes: dict[str, Any], problem: str
) -> None:
    content = made(folder, backbone={"name": "nowhere"}).model_dump(exclude_unset=True) | {"package": "nlp"}
    path = folder / "own.yaml"
    path.write_text(json.dumps(content, default=list))  # JSON is YAML
    recipe.load(str(path), {"data.metrics": ["accuracy", "roc-auc"], "training.monitor": "roc-auc"})
    recipe.load(str(path), {"training.monitor": "loss"})
    with pytest.raises(InputError, match=re.escape(problem)):
        recipe.load(str(path), changes)


def test_a_method_that_reads_a_head_needs_classes(folder: Path) -> None:
    checked = made(folder, {"name": "ptec"}, {"kind": "text-to-text"})
    with pytest.raises(InputError, match=r"field 'method': ptec needs classes, data\.kind is text-to-text"):
        checked.config()
    for method in ("linear-probe", "p-tuning-v2"):
        with pytest.raises(InputError, match=f"'compare.{method}'"):
            made(folder, data={"kind": "text-to-text"}).with_method(method)


@pytest.mark.parametrize("method", ["prompt-tuning", "prefix-tuning"])
def test_a_start_from_text_needs_the_text(folder: Path, method: str) -> None:
    with pytest.raises(InputError, match=r"field 'method\.init_text': init: text needs init_text"):
        made(folder, {"name": method, "init": "text"}).config()
    assert made(folder, {"name": method, "init": "text", "init_text": "good news"}).config()
    assert made(folder, {"name": method, "init": "text", "init_ids": [3]}).config()


@pytest.mark.parametrize("method", ["prompt-tuning", "spot"])
def test_a_run_that_would_train_nothing_is_refused_with_its_recipe(folder: Path, method: str) -> None:
    with pytest.raises(InputError, match=r"field 'method\.prompt_length': a prompt of no rows and without a head"):
        made(folder, {"name": method, "prompt_length": 0}).config()
    assert made(folder, {"name": method, "prompt_length": 0}, {"kind": "classification"}).config()
    assert made(folder, {"name": "dept", "prompt_length": 0}).config()
    with pytest.raises(InputError, match="a prompt of no rows and without a head trains nothing"):
        made(folder, {"name": "dept", "prompt_length": 0, "rank": 0}).config()


@pytest.mark.parametrize("template", ["{text}", " {text}\n", "{topic} : {text}"])
def test_content_free_calibration_says_which_template_it_needs(folder: Path, template: str) -> None:
    settings = {"name": "zero-shot", "calibrate": "content-free"}
    with pytest.raises(InputError, match=r"'data\.template'.*needs words around \{text\} and no other field"):
        made(folder, settings, {"template": template}).config()
    assert made(folder, settings, {"template": "{text} Topic :"}).config()
    assert made(folder, settings | {"content_free_ids": [[3]]}, {"template": template}).config()


# --- jobs ------------------------------------------------------------------------------------------------------------
def test_what_the_task_tells_reaches_the_method(folder: Path) -> None:
    settings = {
        "text": {"method": "prompt-tuning", "init": "text", "init_text": "good news :"},
        "names": {"method": "prompt-tuning", "init": "labels", "prompt_length": 5},
        "dept": {"prompt_length": 2, "rank": 2},
        "own-length": {"method": "dept", "prompt_length": 2, "rank": 2, "max_source_length": 40},
        "ptec": {"prompt_length": 3, "fill": "labels"},
        "in-context": {"separator_text": "the"},
        "zero-shot": {"calibrate": "content-free"},
        "linear-probe": {},
    }
    bench = Bench(made(folder, data={"template": "{text} Topic :", "max_source_length": 9}, compare=settings))
    ids = {
        word: bench.tokenizer(word)["input_ids"][0]
        for word in ["good", "news", ":", "positive", "negative", "the", "Topic"]
    }
    config = {}
    for label in bench.recipe.labels():
        job, training = bench.job(label, 5)
        config[label] = job.method.config
        job.method.remove()
        assert (config[label].seed, training.seed, training.max_steps) == (5, 5, 3)
        assert job.task["labels"] == ["negative", "positive"]
    assert config["text"].init_ids == (ids["good"], ids["news"], ids[":"])
    assert config["names"].label_ids == ((ids["negative"],), (ids["positive"],))
    assert (config["dept"].max_source_length, config["own-length"].max_source_length) == (9, 40)
    assert (config["ptec"].init_ids, config["ptec"].num_labels) == ((ids["negative"], ids["positive"]), 2)
    assert config["ptec"].multilabel is False
    assert config["in-context"].separator_ids == (ids["the"],)
    assert config["zero-shot"].content_free_ids[2] == (ids["Topic"], ids[":"])
    assert len(config["zero-shot"].content_free_ids) == 3
    assert config["linear-probe"].num_labels == 2
    assert config["prompt-tuning"].num_labels is None  # reads label words


@pytest.mark.parametrize(("kind", "model"), [("seq2seq", "T5"), ("causal-lm", "Llama")])
def test_dept_starts_from_its_text_as_the_tokenizer_of_an_encoder_decoder_closes_it(
    folder: Path, tiny: Callable[..., Any], words: Any, kind: str, model: str
) -> None:
    tiny(model).save_pretrained(folder / "backbone")
    closing = copy.deepcopy(words)
    closing.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    closing.save_pretrained(folder / "backbone")
    start = {"prompt_length": 3, "init": "text", "init_text": "good news"}
    top = {"backbone": {"name": str(folder / "backbone"), "kind": kind, "dtype": "float32"}}
    bench = Bench(made(folder, {"name": "dept", "rank": 1, **start}, compare={"prompt-tuning": start}, **top))
    text = tuple(words("good news")["input_ids"])
    for label, ids in (("dept", (*text, 1) if kind == "seq2seq" else text), ("prompt-tuning", text)):
        job, _ = bench.job(label, 0)
        assert job.method.config.init_ids == ids
        job.method.remove()


@pytest.mark.parametrize("init_text", ["", "good bad"])
def test_ptec_starts_from_label_names_as_its_tokenizer_encodes_them(folder: Path, words: Any, init_text: str) -> None:
    opening = copy.deepcopy(words)
    opening.backend_tokenizer.post_processor = TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 1)])
    opening.save_pretrained(folder / "backbone")
    settings = {"prompt_length": 4, "fill": "labels"} | ({"init_text": init_text} if init_text else {})
    names = {"method": "prompt-tuning", "init": "labels", "prompt_length": 4}
    bench = Bench(made(folder, {"name": "ptec", **settings}, compare={"names": names}))
    job, _ = bench.job("ptec", 0)
    assert job.method.config.init_ids == (1, *words(init_text or "negative positive")["input_ids"])
    table = bench.backbone.get_input_embeddings().weight.float()
    assert torch.equal(job.method.prompt.weight[0], table[1])
    job.method.remove()
    job, _ = bench.job("names", 0)  # rows of words, with nothing around them
    assert job.method.config.label_ids == tuple(tuple(words(name)["input_ids"]) for name in ("negative", "positive"))


def test_kinds_of_task_with_a_head_give_every_method_one(folder: Path) -> None:
    sets_of_labels(folder)
    bench = Bench(made(folder, data={"kind": "multilabel"}))
    job, _ = bench.job("prompt-tuning", 0)
    assert (job.method.config.num_labels, job.method.config.multilabel) == (4, True)
    assert list(job.task["labels"]) == ["film", "negative", "positive", "sport"]


def test_the_identity_follows_rows_and_settings(folder: Path) -> None:
    first, other = Bench(made(folder)).identity, Bench(made(folder, data={"shots": 5})).identity
    assert first == json.loads(json.dumps(first)) == Bench(made(folder)).identity
    assert [key for key in first if first[key] != other[key]] == ["data"]
    changed = [dict(ROWS[0], label="negative"), *ROWS[1:]]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
    other = Bench(made(folder)).identity
    assert [key for key in first if first[key] != other[key]] == ["rows"]


def test_the_identity_follows_the_weights(folder: Path, tiny: Callable[..., Any]) -> None:
    first = Bench(made(folder)).identity
    tiny("Llama", seed=1).save_pretrained(folder / "backbone")  # another model under the same path
    other = Bench(made(folder)).identity
    assert [key for key in first if first[key] != other[key]] == ["weights"]
    config = folder / "backbone" / "config.json"
    config.write_text(config.read_text().replace('"silu"', '"gelu"'))  # the same weights, another function
    changed = Bench(made(folder)).identity
    assert [key for key in other if changed[key] != other[key]] == ["weights"]


def test_a_backbone_that_cannot_be_read_is_named_once(folder: Path) -> None:
    for name in ("./gone", str(folder / "gone"), folder / "gone", "runs/first/gone"):
        with pytest.raises(InputError, match=rf"no such folder here: '{name}'\. Give a folder with config\.json"):
            load_backbone(name, "causal-lm")
    weights = folder / "backbone" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InputError, match=r"no causal-lm backbone could be loaded from .*[^.]\. Give a folder"):
        load_backbone(folder / "backbone", "causal-lm")
    weights.unlink()
    with pytest.raises(InputError, match=r"could be loaded from '.*[^.]\. Give a folder"):
        load_backbone(str(folder / "backbone"), "causal-lm")


# --- artifacts -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
def test_an_artifact_predicts_as_the_method_that_was_trained(
    folder: Path, tiny: Callable[..., Any], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The prompt is used in the dtype that it was trained in, whatever this machine likes.
    monkeypatch.setattr(doctor, "fast_dtype", lambda device: "bfloat16")
    bench = of_family(folder, tiny, family, template="{topic} : {text} Topic :")
    job, config = bench.job(bench.recipe.method.name, 0)
    started = job.method.trained_state()["prompt.weight"].clone()
    outcome = runs.train(job, config, folder / "run")
    assert outcome.artifact is not None
    session = open_artifact(artifacts.load_artifact(outcome.artifact), str(folder / "backbone"))
    kind, several = bench.recipe.backbone.kind, bench.recipe.data.kind == "multilabel"
    assert session.method.backbone is not bench.backbone
    assert type(session.method.backbone) is type(bench.backbone) is type(tiny(family))
    assert (session.task.spec.backbone, session.task.spec.kind) == (kind, "multilabel" if several else "verbalizer")
    kept = session.method.trained_state()
    assert all(torch.equal(kept[name], value) for name, value in job.method.trained_state().items())
    assert (kept["prompt.weight"] - started).abs().max() > 1e-3
    rows = session.inputs(folder / "rows.jsonl")
    assert rows[0] == {"text": "good red film", "topic": "sport"}
    answers, answer = session.predict(rows), "labels" if several else "label"
    assert len(answers) == 48 and set(answers[0]) == {answer, "scores"}
    task = bench.recipe.data.task(bench.rows, bench.tokenizer, kind, 0)
    expected = task.predict(job.method, [r["text"] for r in rows], topic=[r["topic"] for r in rows])
    assert [a[answer] for a in answers] == [a[answer] for a in expected]
    gaps = [abs(a["scores"]["positive"] - b["scores"]["positive"]) for a, b in zip(answers, expected, strict=True)]
    assert max(gaps) < 1e-6
    scores = session.evaluate(folder / "rows.jsonl")
    if several:
        pairs = [({*a["labels"]}, {row["label"], row["topic"]}) for a, row in zip(answers, ROWS, strict=True)]
        right, given = sum(len(a & b) for a, b in pairs), sum(len(a) + len(b) for a, b in pairs)
        assert scores["micro-f1"] == pytest.approx(2 * right / given)
    else:
        right = sum(a["label"] == row["label"] for a, row in zip(answers, ROWS, strict=True))
        assert scores["accuracy"] == pytest.approx(right / 48)
    more = [{"text": row["text"], "topic": row["topic"], "id": i} for i, row in enumerate(ROWS)]
    assert session.predict(more) == answers  # columns that the template does not name are left aside
    with pytest.raises(InputError, match="the template names 'topic'"):
        session.predict(["good news"])
    with pytest.raises(InputError, match="row 2: the text is empty"):
        session.predict(["good", " \n"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_artifact_knows_its_backbone_in_another_dtype(
    folder: Path, tiny: Callable[..., Any], family: str, dtype: torch.dtype
) -> None:
    bench = of_family(folder, tiny, family)
    outcome = runs.train(*bench.job(bench.recipe.method.name, 0), folder / "run")
    assert outcome.artifact is not None
    model, tokenizer = load_backbone(folder / "backbone", bench.recipe.backbone.kind, dtype=dtype)
    assert model.get_input_embeddings().weight.dtype == dtype  # T5 keeps a part in float32
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method = artifacts.load(outcome.artifact, model)
    assert all(p.dtype == torch.float32 for _, p in method.trainable())
    task = bench.recipe.data.task(bench.rows, tokenizer, bench.recipe.backbone.kind, 0)
    assert set(task.predict(method, ["good news"])[0]["scores"]) == set(task.spec.labels)
    tiny(family, seed=1).save_pretrained(folder / "backbone")
    other, _ = load_backbone(folder / "backbone", bench.recipe.backbone.kind, dtype=dtype)
    with pytest.warns(UserWarning, match="weights differ"):
        artifacts.load(outcome.artifact, other)


def test_a_reference_that_is_no_text_is_refused_where_a_prompt_is_scored(folder: Path) -> None:
    bench = Bench(made(folder, data={"kind": "text-to-text"}))
    job, _ = bench.job("prompt-tuning", 0)
    session = Session(job.method, bench.recipe.data.task(bench.rows, bench.tokenizer, "causal-lm", 0))
    own = folder / "own.jsonl"
    own.write_text("".join(json.dumps(row) + "\n" for row in [ROWS[0], ROWS[1] | {"label": None}]))
    with pytest.raises(InputError, match=r"own\.jsonl, row 2, field 'label': the row has no label"):
        session.evaluate(own)


def test_a_backbone_that_is_not_found_again_is_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, path = trained(folder)
    artifact = artifacts.load_artifact(path)
    assert artifact.config.backbone.name == "backbone"  # where a folder lies is nobody's business
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(folder / "run")
    with pytest.raises(InputError) as caught:
        open_artifact(artifact)
    assert str(caught.value) == (
        f"{path}: was trained on 'backbone', which is neither a folder here nor to be had from the hub. "
        "Name its backbone's folder or hub id: --backbone"
    )
    monkeypatch.chdir(folder)  # beside the folder of that name it works by itself
    answer = open_artifact(artifact).predict(["good news"])
    assert answer == open_artifact(artifact, str(folder / "backbone")).predict(["good news"])
    with pytest.raises(InputError, match="could be loaded from 'nowhere-else'"):
        open_artifact(artifact, "nowhere-else")
    with pytest.raises(InputError, match=r"field 'backbone\.name': no such asset; there are asset:smollm2"):
        open_artifact(artifact, "asset:nothing")


def test_the_backbone_of_an_asset_is_found_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(workbench.BACKBONE_ASSETS, "asset:smollm2", lambda: folder / "backbone")
    _, path = trained(folder, backbone={"name": "asset:smollm2", "dtype": "float32"})
    artifact = artifacts.load_artifact(path)
    assert artifact.config.backbone.name == "asset:smollm2"
    assert set(open_artifact(artifact).predict(["good news"])[0]["scores"]) == {"positive", "negative"}


def test_an_artifact_without_a_task_is_refused(folder: Path) -> None:
    bench, _ = trained(folder)
    job, _ = bench.job("prompt-tuning", 0)
    for task, problem in [
        (None, "holds no task"),
        ({"kind": "verbalizer"}, "field 'task': a classification task needs"),
    ]:
        path = job.method.save_pretrained(folder / "saved", task=task)
        with pytest.raises(InputError, match=problem):
            open_artifact(artifacts.load_artifact(path), str(folder / "backbone"))


def test_a_prompt_is_exported_for_peft_and_for_nothing_else(folder: Path) -> None:
    _, path = trained(folder)
    artifact = artifacts.load_artifact(path)
    session = open_artifact(artifact, str(folder / "backbone"))
    assert exports(artifact) == {"peft": ("adapter_config.json", "adapter_model.safetensors")}
    for changed in ({"method": "dept"}, {"method_config": artifact.config.method_config | {"num_labels": 2}}):
        config = artifact.config.model_copy(update=changed)
        assert exports(replace(artifact, config=config)) == {}  # peft has no such method, and no head of ours
    assert session.export("peft", folder / "exported") == folder / "exported"
    assert (folder / "exported" / "adapter_config.json").is_file()


# --- golden artifacts ------------------------------------------------------------------------------------------------
def filled(model: Any) -> Any:
    """The model with weights that follow from their names and places alone: fractions of k * k / 1.618."""
    for name, parameter in model.named_parameters():
        k = torch.arange(parameter.numel(), dtype=torch.float64) + zlib.crc32(name.encode()) % 1009
        part = (k * k * 0.6180339887498949).frac().view_as(parameter)
        parameter.data.copy_(0.6 * part - 0.3 if parameter.ndim > 1 else 0.5 + part)  # vectors: of norms
    return model


@pytest.mark.parametrize("golden", [path.parent for path in sorted(GOLDEN.glob("*/*.json"))], ids=lambda f: f.name)
def test_a_golden_artifact_answers_as_when_it_was_saved(tiny: Callable[..., Any], words: Any, golden: Path) -> None:
    """Trained on `ROWS` and `filled` backbones; `answers.json` is what each said to the texts in it."""
    artifact = artifacts.load_artifact(golden)
    spec = TaskSpec.model_validate(artifact.config.task)
    (family,) = [name for name, (kind, *_) in FAMILIES.items() if kind == spec.backbone]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        method = artifacts.load(golden, filled(tiny(family)))
    assert method.name == golden.name == artifact.config.method
    assert not any("weights differ" in str(warning.message) for warning in told)
    kept = method.kept_state()
    assert kept.keys() == artifact.tensors.keys()
    assert all(torch.equal(kept[name], tensor) for name, tensor in artifact.tensors.items())
    expected = json.loads((GOLDEN / "answers.json").read_text())[golden.name]
    answers = TextTask(spec, words).predict(method, [*expected])
    for answer, then in zip(answers, expected.values(), strict=True):
        assert answer["scores"] == pytest.approx(then["scores"], abs=1e-5)
        assert answer | {"scores": then["scores"]} == then


def test_there_are_golden_artifacts_of_three_methods() -> None:
    assert {path.parent.name for path in GOLDEN.glob("*/*.json")} >= {"prompt-tuning", "dept", "ptec"}


# --- the demo's settings ---------------------------------------------------------------------------------------------
def test_the_demo_takes_any_labels(tmp_path: Path) -> None:
    labels = ['say "hi"', "two\nlines", "{braces}: [1, 2]", "it's # %s \\n", "ünï", "null"]
    own = tmp_path / "my 'own' file.jsonl"
    own.write_text("".join(json.dumps({"text": f"text {i}", "label": x}) + "\n" for i, x in enumerate(labels)))
    changes = demo.settings(3, own)
    _, checked = recipe.load(demo.RECIPE, changes)
    asked = f"Classify the text. Possible labels: {', '.join(sorted(labels))}.\n"
    assert checked.method.model_extra is not None and checked.method.model_extra["init_text"] == asked
    assert checked.with_method("dept").method.model_extra["init_text"] == asked  # type: ignore[index]
    data = checked.data  # type: ignore[attr-defined]
    assert isinstance(data, TextData)
    assert (data.train, data.shots, data.template, data.max_source_length) == (str(own), 3, "{text}\nLabel:", 96)
    assert [row["label"] for row in data.rows()["train"]] == labels


@pytest.mark.parametrize(("labels", "shots"), [(2, 6), (5, 6), (7, 4), (20, 1), (31, 1)])
def test_the_demo_validates_on_thirty_texts_at_most_or_one_of_each_class(
    tmp_path: Path, labels: int, shots: int
) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"text": f"text {i}", "label": f"label {i}"}) + "\n" for i in range(labels)))
    _, checked = recipe.load(demo.RECIPE, demo.settings(3, own))
    assert checked.data.validation_shots == shots  # type: ignore[attr-defined]


def test_the_demo_takes_whole_numbers_as_labels_and_refuses_one_class(tmp_path: Path) -> None:
    own = tmp_path / "stars.csv"
    own.write_text("text,label\ngood,5\nbad,1\n")
    assert "Possible labels: 1, 5.\n" in demo.settings(16, own)["method.init_text"]
    own.write_text("text,label\ngood,5\nbad,5\n")
    with pytest.raises(InputError, match=r"stars\.csv, field 'label': all rows have one label"):
        demo.settings(16, own)
    own.write_text("review,label\ngood,5\n")
    with pytest.raises(InputError, match="field 'text': no such column"):
        demo.settings(16, own)


def test_demonstrations_of_the_recipe_and_the_demo_are_separated_by_an_empty_line(folder: Path, words: Any) -> None:
    for changes in ({}, demo.settings(16, None)):
        _, checked = recipe.load(demo.RECIPE, changes)
        assert checked.with_method("in-context").config().separator_text == "\n\n"  # type: ignore[attr-defined]
    lines = copy.deepcopy(words)
    lines.add_tokens(["\n\n"])
    lines.save_pretrained(folder / "backbone")
    bench = Bench(made(folder, compare={"in-context": {}}))
    job, _ = bench.job("in-context", 0)
    assert job.method.config.separator_ids == (lines.convert_tokens_to_ids("\n\n"),)


def test_the_demo_leaves_lora_out_where_peft_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    _, checked = recipe.load(demo.RECIPE, demo.settings(16, None))
    assert "lora" not in checked.labels()
    monkeypatch.setattr(demo, "find_spec", lambda name: object())
    _, checked = recipe.load(demo.RECIPE, demo.settings(16, None))
    baselines = ["zero-shot", "zero-shot-calibrated", "shots-calibrated", "in-context", "linear-probe"]
    assert checked.labels() == ["prompt-tuning", *baselines, "dept", "lora"]
    assert torch.tensor(checked.data.shots) == 16  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("labels", "normalised"), [(["1", "10", "2"], True), (["sport", "sports"], True), (["10", "12"], False)]
)
def test_the_demo_scores_words_that_begin_others_by_their_mean(
    tmp_path: Path, labels: list[str], normalised: bool
) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"text": f"text {i}", "label": x}) + "\n" for i, x in enumerate(labels)))
    _, checked = recipe.load(demo.RECIPE, demo.settings(3, own))
    assert checked.data.length_normalised is normalised  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("separator", "positions", "room"),
    [
        *[("\n\n", positions, room) for positions, room in ((99, 4), (37, 2), (36, 1), (27, 1), (26, 0), (10, 0))],
        *[("news :", positions, room) for positions, room in ((99, 4), (45, 2), (44, 1), (31, 1), (30, 0))],
    ],
)
def test_the_demo_shows_as_many_texts_of_each_class_as_have_room(
    folder: Path, separator: str, positions: int, room: int
) -> None:
    """Of four, with five tokens each and two classes, beside an input of 16 tokens and a label word of one.

    The tokenizer has no line breaks, and two tokens for the other separator.
    """
    shown = {"in-context": {"separator_text": separator}}
    bench = Bench(made(folder, data={"template": "{text} :", "max_source_length": 16}, compare=shown))
    bench.backbone.config.max_position_embeddings = positions
    assert demo.demonstrations(bench, range(2)) == room


def test_a_prompt_whose_labels_do_not_fit_its_head_is_refused_before_the_backbone_is_loaded(folder: Path) -> None:
    _, path = trained(folder, data={"kind": "classification"})
    content = json.loads((path / "prompt_config.json").read_text())
    content["task"]["labels"] += ["neutral"]
    (path / "prompt_config.json").write_text(json.dumps(content))
    problem = r"prompt_config\.json, field 'task': the task has 3 labels, the prompt answers for 2"
    with pytest.raises(InputError, match=problem):
        open_artifact(artifacts.load_artifact(path), "nowhere")


def test_half_of_a_character_in_a_text_is_refused_with_its_row(folder: Path) -> None:
    _, path = trained(folder)
    session = open_artifact(artifacts.load_artifact(path), str(folder / "backbone"))
    with pytest.raises(InputError, match=r"row 2, field 'text': holds '\\udcff', which is half of a character"):
        session.predict(["good film", "good \udcff film"])


# --- the demo ----------------------------------------------------------------------------------------------------------
def test_the_demo_runs_on_a_file_of_ones_own(
    folder: Path, tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One label word begins the other, and more demonstrations are asked for than there are."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: the extra `report` of pt-core")
    tiny("Llama", max_position_embeddings=256).save_pretrained(folder / "backbone")
    text = {"init": "text", "init_text": "news :", "prompt_length": 2}
    content = {
        "package": "nlp",
        "method": {"name": "prompt-tuning", **text},
        "backbone": {"name": str(folder / "backbone"), "dtype": "float32"},
        "data": {"train": str(folder / "rows.jsonl"), "validation_shots": 1},
        "training": {"max_steps": 2, "batch_size": 2, "evaluate_every": 1, "progress": False},
        "compare": {"zero-shot": {}, "in-context": {"demonstrations": 3}, "dept": {"rank": 1, **text}, "lora": {}},
    }
    (folder / "own.yaml").write_text(yaml.safe_dump(content))
    words = {"positive": "good", "negative": "good film"}
    rows = [row | {"label": words[row["label"]]} for row in ROWS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(demo, "RECIPE", str(folder / "own.yaml"))
    monkeypatch.setattr(demo, "TEST_ROWS", 10)
    monkeypatch.chdir(folder)  # the fresh process finds the backbone by the name of its folder
    workbench.demo(folder / "demo", 1, 2, folder / "rows.jsonl")
    told = capsys.readouterr().out
    assert "in-context shows 2 of each class, not 3" in told
    assert re.search(r"in a fresh process, 'good red film' -> \{.*good", told)
    results = json.loads((folder / "demo" / "results.json").read_text("utf-8"))
    lora = {"lora"} if find_spec("peft") else set()
    assert {row["method"] for row in results} == {"prompt-tuning", "zero-shot", "in-context", "dept"} | lora
    assert all(0 <= row["metrics"]["accuracy"] <= 1 for row in results)
    page = (folder / "demo" / "report.html").read_text("utf-8")
    assert "prompt-tuning" in page and page.count("data:image/png;base64,") >= 2  # curves
    history = json.loads(next((folder / "demo" / "cells").glob("prompt-tuning-0.json")).read_text("utf-8"))["history"]
    assert len(history) >= 2
