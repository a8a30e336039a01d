"""Text data: files to tasks, templates, label words, batches, predictions, and errors that name file and row."""

from __future__ import annotations

import copy
import csv
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast

from pt_core.errors import InputError
from pt_nlp.data import Encoder, TaskSpec, TextTask, pad, read_rows, template_fields, tokenizer_hash
from pt_nlp.methods.prompt_tuning import PromptTuning, PromptTuningConfig

Build = Callable[..., nn.Module]
ROWS = [
    {"review": "the film was good", "stars": "positive", "about": "film"},
    {"review": "awful sport", "stars": "negative", "about": "sport"},
    {"review": "a great red sun", "stars": "positive", "about": "sun"},
    {"review": "the news was bad news", "stars": "negative", "about": "news"},
]


def ids(words, text: str) -> list[int]:
    return words(text, add_special_tokens=False)["input_ids"]


def save(folder: Path, suffix: str, rows: list[dict] = ROWS) -> Path:
    path = folder / f"reviews{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    elif suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        Dataset.from_list(rows).save_to_disk(path)
    return path


# --- files ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet", ""], ids=lambda s: s or "folder")
def test_a_file_becomes_a_task_by_its_path(words, suffix: str, tmp_path: Path) -> None:
    path = save(tmp_path, suffix)
    task = TextTask.from_files(
        path,
        words,
        kind="verbalizer",
        text="review",
        label="stars",
        validation=path,
        template="{about} : {text} Topic :",
    )
    assert task.spec.labels == ("negative", "positive")
    assert task.test is None
    assert [row["label"] for row in task.train.rows] == [1, 0, 1, 0]
    assert task.train.rows[0]["source"] == ids(words, "film : the film was good Topic :")
    assert task.train.rows[1]["source"] == ids(words, "sport : awful sport Topic :")
    assert len(task.validation) == 4
    assert task.train.lengths == [len(row["source"]) + 1 for row in task.train.rows]


def test_a_column_that_is_absent_is_named(words, tmp_path: Path) -> None:
    for suffix in (".csv", ".jsonl", ".parquet", ""):
        path = save(tmp_path, suffix)
        options = {"kind": "verbalizer", "text": "review", "label": "stars"}
        for wrong, name in (
            ({"text": "body"}, "body"),
            ({"label": "class"}, "class"),
            ({"template": "{when} {text}"}, "when"),
        ):
            with pytest.raises(InputError, match=f"reviews{suffix}.*{name}") as error:
                TextTask.from_files(path, words, **options | wrong)
            assert "review" in str(error.value).rpartition(name)[2]  # the columns that there are


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet", ""], ids=lambda s: s or "folder")
def test_an_empty_text_is_named_by_file_row_and_column(words, suffix: str, tmp_path: Path) -> None:
    path = save(tmp_path, suffix, [*ROWS[:2], ROWS[2] | {"review": "  "}, ROWS[3]])
    with pytest.raises(InputError, match=rf"reviews{suffix}, row 3, field 'review': .*(empty|white space)"):
        TextTask.from_files(path, words, kind="verbalizer", text="review", label="stars")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet", ""], ids=lambda s: s or "folder")
def test_a_field_of_the_template_may_be_a_number(words, suffix: str, tmp_path: Path) -> None:
    options = {"kind": "verbalizer", "text": "review", "label": "stars", "template": "{about} {text}"}
    task = TextTask.from_files(save(tmp_path, suffix, [row | {"about": 5} for row in ROWS]), words, **options)
    assert task.train.rows[0]["source"] == ids(words, "5 the film was good")


@pytest.mark.parametrize("value", [None, ["film"]])
def test_a_field_of_the_template_that_is_no_value_is_refused(words, value, tmp_path: Path) -> None:
    options = {"kind": "verbalizer", "text": "review", "label": "stars", "template": "{about} {text}"}
    path = save(tmp_path, ".jsonl", [*ROWS[:2], ROWS[2] | {"about": value}])
    with pytest.raises(InputError, match=r"reviews\.jsonl, row 3, field 'about': the value is (missing|list)"):
        TextTask.from_files(path, words, **options)


def test_the_answer_as_the_input_is_refused(words, tmp_path: Path) -> None:
    path = save(tmp_path, ".jsonl")
    with pytest.raises(InputError, match=r"field 'label': the answer would be the input: both are the column 'stars'"):
        TextTask.from_files(path, words, kind="classification", text="stars", label="stars", template="{text} {stars}")
    with pytest.raises(InputError, match="the answer would be the input"):
        read_rows(path, {"text": "stars", "label": "stars"})


def test_a_template_that_tells_the_answer_is_refused(words, tmp_path: Path) -> None:
    path, options = save(tmp_path, ".jsonl"), {"kind": "verbalizer", "text": "review", "label": "stars"}
    for name in ("label", "stars"):
        with pytest.raises(InputError, match=rf"'template': .*must not contain \{{{name}\}}: the answer"):
            TextTask.from_files(path, words, **options, template=f"{{text}} {{{name}}}")
    with pytest.raises(ValueError, match=r"must not contain \{label\}"):
        TaskSpec(kind="text-to-text", template="{text} {label}")


def test_a_label_out_of_range_or_unknown_is_named_by_file_and_row(words, tmp_path: Path) -> None:
    rows = [{"text": row["review"], "label": i} for i, row in enumerate(ROWS)]
    path = save(tmp_path, ".jsonl", rows)
    options = {"kind": "classification", "labels": ["bad", "fair", "good"]}
    with pytest.raises(InputError, match=r"reviews.jsonl, row 4, field 'label': label 3 is out of range. .* 0 to 2"):
        TextTask.from_rows(
            {"train": read_rows(path, {"text": "text", "label": "label"})}, words, files={"train": path}, **options
        )
    train = save(tmp_path, ".json", [{"text": row["review"], "label": row["stars"]} for row in ROWS])
    test = save(tmp_path, ".csv", [{"text": "sport", "label": "positive"}, {"text": "sun", "label": "neutral"}])
    with pytest.raises(
        InputError, match=r"reviews.csv, row 2, field 'label': unknown label 'neutral'. .*negative, positive"
    ):
        TextTask.from_files(train, words, kind="classification", test=test)


def test_class_labels_of_datasets_keep_their_names(words, tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["world", "sport", "film"])})
    rows = [{"text": "sun", "label": 2}, {"text": "rain", "label": 0}, {"text": "news", "label": 1}]
    Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "named")
    task = TextTask.from_files(tmp_path / "named", words, kind="classification")
    assert task.spec.labels == ("film", "sport", "world")
    assert [row["label"] for row in task.train.rows] == [0, 2, 1]
    rows[1]["label"] = -1  # as `datasets` marks rows of hidden tests
    Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "hidden")
    with pytest.raises(InputError, match=r"hidden, row 2, field 'label': label -1 is none of 0 to 2. Drop rows"):
        TextTask.from_files(tmp_path / "hidden", words, kind="classification")
    features = Features({"text": Value("string"), "label": List(ClassLabel(names=["world", "sport"]))})
    rows = [{"text": "sun", "label": [0, 1]}, {"text": "rain", "label": []}, {"text": "news", "label": [1]}]
    Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "lists")
    task = TextTask.from_files(tmp_path / "lists", words, kind="multilabel")
    assert task.spec.labels == ("sport", "world")
    assert torch.stack([row["label"] for row in task.train.rows]).tolist() == [[1, 1], [0, 0], [1, 0]]


def test_a_folder_that_is_no_split_is_refused(tmp_path: Path) -> None:
    fields = {"text": "review", "label": "stars"}
    data = Dataset.from_list(ROWS)
    DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "all")
    with pytest.raises(InputError, match=r"several splits \(train, test\). Name one: .*all/train"):
        read_rows(tmp_path / "all", fields)
    assert len(read_rows(tmp_path / "all" / "train", fields)) == 4
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: this folder holds no data set"):
        read_rows(tmp_path / "empty", fields)


def test_rows_in_memory_are_checked_too(words) -> None:
    good = [{"text": "sun", "label": "a"}, {"text": "rain", "label": "b"}]
    for bad, problem in (
        ({"label": "a"}, "row 3, field 'text': the row has no text"),
        ({"text": "sun"}, "row 3, field 'label': the row has no label"),
        ({"text": " ", "label": "a"}, "row 3, field 'text': the text is empty"),
        ({"text": 5, "label": "a"}, "row 3, field 'text': the text is empty or not text"),
    ):
        with pytest.raises(InputError, match=problem):
            TextTask.from_rows({"train": [*good, bad]}, words, kind="classification")
    with pytest.raises(InputError, match="row 2, field 'label': the label is empty or not text"):
        TextTask.from_rows({"train": [good[0], {"text": "sun", "label": 3}]}, words, kind="text-to-text")
    with pytest.raises(InputError, match="row 1, field 'about': the row has no about"):
        TextTask.from_rows({"train": good}, words, kind="classification", template="{about} {text}")


def test_shots_are_drawn_per_class_and_validation_rows_from_the_rest(words, tmp_path: Path) -> None:
    rows = [{"text": f"sun {i}", "label": "ab"[i % 2]} for i in range(20)]
    path = save(tmp_path, ".jsonl", rows)
    task = TextTask.from_files(
        path, words, kind="classification", shots=3, validation_shots=2, test=path, max_test_rows=6
    )
    assert [len(split) for split in (task.train, task.validation, task.test)] == [6, 4, 6]
    for split in (task.train, task.validation, task.test):
        assert sum(row["label"] for row in split.rows) == len(split) // 2
    whole = TextTask.from_files(path, words, kind="classification", validation_shots=2)
    assert (len(whole.train), len(whole.validation)) == (16, 4)
    with pytest.raises(InputError, match="give validation rows or validation_shots, not both"):
        TextTask.from_files(path, words, kind="classification", validation=path, validation_shots=2)


def test_a_class_is_drawn_by_its_name_however_its_rows_are_labelled(words) -> None:
    rows = [{"text": f"sun {i}", "label": label} for i, label in enumerate(["a", "b", 0, 1] * 3)]
    mixed = TextTask.from_rows({"train": rows}, words, kind="classification", labels=["a", "b"], shots=2)
    assert [row["label"] for row in mixed.train.rows] == [0, 0, 1, 1]


# --- rows are named as they stand in their file, drawn or not --------------------------------------------------------
@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ({"label": "neutral"}, "field 'label': unknown label 'neutral'"),
        ({"label": None}, "field 'label': the row has no label"),
        ({"label": ""}, "field 'label': the label is empty"),
    ],
)
def test_all_rows_are_checked_before_any_is_drawn(words, tmp_path: Path, bad: dict, problem: str) -> None:
    rows = [{"text": f"sun {i}", "label": "ab"[i % 2]} for i in range(100)]
    train = save(tmp_path, ".json", rows)
    test = save(tmp_path, ".jsonl", [*rows[:96], rows[96] | bad, *rows[97:]])
    for seed in range(3):
        with pytest.raises(InputError, match=rf"reviews\.jsonl, row 97, {problem}"):
            TextTask.from_files(train, words, kind="classification", test=test, max_test_rows=40, seed=seed)
        with pytest.raises(InputError, match=rf"reviews\.jsonl, row 97, {problem}"):
            TextTask.from_files(test, words, kind="classification", labels=["a", "b"], shots=2, seed=seed)


def test_what_cannot_be_encoded_is_named_by_the_row_of_the_file(words, tmp_path: Path) -> None:
    rows = [{"text": "the film", "label": "ab"[i % 2], "about": "news"} for i in range(40)]
    options = {"kind": "classification", "template": "{about} {text}", "max_source_length": 4}
    path = save(tmp_path, ".jsonl", [*rows[:38], rows[38] | {"about": "the film was good news"}, rows[39]])
    for drawn in ({}, {"shots": 19, "validation_shots": 1}, {"test": path, "max_test_rows": 39}):
        with pytest.raises(
            InputError, match=r"reviews\.jsonl, row 39, field 'max_source_length': the template alone takes 5 of 4"
        ):
            TextTask.from_files(path, words, **options, **drawn)
    path = save(tmp_path, ".jsonl", [*rows[:38], rows[38] | {"text": "\u200b"}, rows[39]])
    silent = Silent(words)
    for drawn in ({}, {"shots": 19, "validation_shots": 1}):
        with pytest.raises(InputError, match=r"reviews\.jsonl, row 39, field 'text': the text has no tokens"):
            TextTask.from_files(path, silent, kind="classification", **drawn)


class Silent:
    """A tokenizer to which a zero-width space is nothing."""

    def __init__(self, words) -> None:
        self.words = words

    def __getattr__(self, name: str):
        return getattr(self.words, name)

    def __call__(self, text: str, **options) -> dict[str, list[int]]:
        return {"input_ids": []} if text == "\u200b" else self.words(text, **options)


def test_a_class_with_too_few_rows_is_named_with_its_file(words, tmp_path: Path) -> None:
    path = save(tmp_path, ".jsonl", [{"text": f"sun {i}", "label": "ab"[i % 2]} for i in range(10)])
    with pytest.raises(InputError, match=r"reviews\.jsonl, field 'label': class 'a' has 5 rows, 7 wanted"):
        TextTask.from_files(path, words, kind="classification", shots=5, validation_shots=2)
    for drawn in ({}, {"shots": 2}, {"validation_shots": 1}):
        with pytest.raises(InputError, match=r"reviews\.jsonl, field 'label': class 'c' has no rows"):
            TextTask.from_files(path, words, kind="classification", labels=["a", "b", "c"], **drawn)
    with pytest.raises(InputError, match=r"reviews\.jsonl: 10 rows there are, 12 wanted"):
        TextTask.from_files(path, words, kind="text-to-text", shots=12)
    with pytest.raises(InputError, match="0 training and 0 validation rows per class cannot be drawn"):
        TextTask.from_files(path, words, kind="classification", shots=0)
    lists = save(tmp_path, ".json", [{"text": "sun", "label": ["a"]}, {"text": "rain", "label": ["b"]}])
    with pytest.raises(InputError, match=r"reviews\.json, field 'label': class 'c' has no rows"):
        TextTask.from_files(lists, words, kind="multilabel", labels=["a", "b", "c"])


@pytest.mark.parametrize("labels", [None, ["a", "b", "c"]])
@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (None, "field 'label': the row has no label"),
        (3, "field 'labels': 3 is not a list of labels"),
        ("ab", "field 'labels': 'ab' is not a list of labels"),
        (["a", None], "field 'labels': label None is neither text nor an integer"),
    ],
)
def test_sets_of_labels_are_checked_row_by_row(words, tmp_path: Path, bad, problem: str, labels) -> None:
    rows = [{"text": "sun", "label": ["a", "b", "c"]}, {"text": "rain", "label": ["b", "c"]}]
    path = save(tmp_path, ".jsonl", [*rows, {"text": "news", "label": bad}])
    for drawn in ({}, {"shots": 1}):
        with pytest.raises(InputError, match=rf"reviews\.jsonl, row 3, {problem}"):
            TextTask.from_files(path, words, kind="multilabel", labels=labels, **drawn)


# --- templates --------------------------------------------------------------------------------------------------------
def test_a_long_text_is_cut_and_what_stands_around_it_is_kept(words) -> None:
    row = {"text": "the film was good great red blue green", "about": "film news"}
    spec = TaskSpec(kind="text-to-text", template="first {about} : {text} Topic :", max_source_length=10)
    cut = Encoder(spec, words).source(row)
    assert cut == ids(words, "first film news : the film was good Topic :")
    assert len(cut) == 10
    longer = spec.model_copy(update={"max_source_length": 14})
    assert Encoder(longer, words).source(row) == ids(
        words, "first film news : the film was good great red blue green Topic :"
    )
    with pytest.raises(InputError, match=r"template alone takes 6 of 6 tokens. Raise max_source_length"):
        Encoder(spec.model_copy(update={"max_source_length": 6}), words).source(row)


def bytes_of(words: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer in which these are one token each, and others are bytes."""
    symbols = [*pre_tokenizers.ByteLevel.alphabet(), *words]
    spelled = {"</s>": 0} | {symbol: i for i, symbol in enumerate(dict.fromkeys(symbols), start=1)}
    merges = []
    for word in words:
        for i in range(1, len(word)):
            spelled.setdefault(word[: i + 1], len(spelled))
            merges.append((word[:i], word[i]))
    made = Tokenizer(models.BPE(spelled, list(dict.fromkeys(merges))))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+|[^\w\s]+\n*|\s+"), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([made.pre_tokenizer, pre_tokenizers.ByteLevel(False, use_regex=False)])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")


@pytest.mark.parametrize("template", ["{text}", "Say: {text}\nTopic:", "Say: {text} Topic:", "{text} Topic:"])
def test_what_is_kept_of_a_cut_text_has_the_tokens_of_an_uncut_one(template: str) -> None:
    tokenizer = bytes_of(["\u0120sun", "\u0120rain", "\u0120Topic", "Say", ".\u010a"])
    text = "rain sun sun rain rain sun sun sun rain."
    whole = ids(tokenizer, template.replace("{text}", text))
    for length in range(len(whole), 16, -1):
        cut = Encoder(TaskSpec(kind="text-to-text", template=template, max_source_length=length), tokenizer).source(
            {"text": text}
        )
        assert len(cut) == length
        after = ids(tokenizer, template.partition("{text}")[2])
        kept = length - len(after) if length < len(whole) else length
        assert cut[:kept] == whole[:kept]
        assert length == len(whole) or not after or cut[kept:] == after  # a merged ".\n" is taken apart


def test_special_tokens_stay_around_a_text_that_is_cut(words) -> None:
    import copy

    closing = copy.deepcopy(words)
    closing.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<unk> $A </s>", special_tokens=[("<unk>", 2), ("</s>", 1)]
    )
    for backbone, tail in (("encoder", [1]), ("seq2seq", [1]), ("causal-lm", [])):
        spec = TaskSpec(kind="classification", backbone=backbone, labels=("a", "b"), max_source_length=5)
        source = Encoder(spec, closing).source({"text": "the film was good great red"})
        assert source[0] == 2
        assert source[-1:] == tail if tail else source[-1] != 1  # a causal model writes on from the text
        assert len(source) == 5
        assert source[1 : 5 - len(tail)] == ids(words, "the film was good")[: 4 - len(tail)]


def test_braces_in_a_text_are_not_fields(words) -> None:
    spec = TaskSpec(kind="text-to-text", template="{about} : {text} Topic :")
    assert template_fields(spec.template).keys() == {"about", "text"}
    source = Encoder(spec, words).source({"text": "{about} {sun}", "about": "{text}"})
    assert source == ids(words, "{text} : {about} {sun} Topic :")


def test_a_field_that_no_row_has_is_named(words) -> None:
    spec = TaskSpec(kind="text-to-text", template="{when} {text}")
    with pytest.raises(InputError, match="field 'template': the template names 'when', which no row has"):
        Encoder(spec, words).source({"text": "sun"})


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"kind": "text-to-text", "template": "no text"}, r"the template must contain \{text\}"),
        ({"kind": "text-to-text", "metrics": ("accuracy",)}, "no metric 'accuracy' for the task 'text'"),
        ({"kind": "classification", "labels": ("a",)}, "at least two labels"),
        ({"kind": "classification", "labels": ("a", "a")}, "labels must be distinct"),
        ({"kind": "verbalizer", "labels": ("a", "b"), "verbalizer": {"c": "d"}}, r"unknown labels: \['c'\]"),
        ({"kind": "verbalizer", "labels": ("a", "b"), "backbone": "encoder"}, "a verbalizer needs a language model"),
        ({"kind": "classification", "labels": ("a", "b"), "max_source_length": 0}, "max_source_length"),
        ({"kind": "classification", "labels": ("a", "b"), "colour": 1}, "colour"),
    ],
)
def test_inconsistent_specifications_are_refused(settings: dict, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        TaskSpec(**settings)


def test_from_rows_tells_what_is_inconsistent(words) -> None:
    rows = {"train": [{"text": "sun", "label": "a"}, {"text": "sun", "label": "b"}]}
    with pytest.raises(InputError, match=r"field 'task': the verbalizer names unknown labels: \['c'\]"):
        TextTask.from_rows(rows, words, kind="verbalizer", verbalizer={"c": "d"})
    with pytest.raises(InputError, match=r"field 'task\.max_source_length': .*greater than or equal to 1 \(got 0\)"):
        TextTask.from_rows(rows, words, kind="verbalizer", max_source_length=0)
    with pytest.raises(
        InputError, match=r"field 'task\.verbaliser': unknown key \(did you mean 'verbalizer'\?\)\. Allowed there: "
    ):
        TextTask.from_rows(rows, words, kind="verbalizer", verbaliser={"a": "good"})


def test_another_tokenizer_is_refused(words) -> None:
    import copy

    spec = TaskSpec(kind="text-to-text", tokenizer_hash=tokenizer_hash(words))
    Encoder(spec, words)
    other = copy.deepcopy(words)
    other.add_tokens(["moon"])
    with pytest.raises(InputError, match="trained with another tokenizer. Use the tokenizer of its backbone"):
        Encoder(spec, other)


# --- label words ------------------------------------------------------------------------------------------------------
def verbalizer(words, backbone: str = "causal-lm", normalised: bool = False, **labels: str) -> Encoder:
    return Encoder(
        TaskSpec(
            kind="verbalizer", backbone=backbone, labels=tuple(labels), verbalizer=labels, length_normalised=normalised
        ),
        words,
    )


def test_label_words_are_their_tokens_closed_only_for_encoder_decoders(words) -> None:
    assert verbalizer(words, a="good", b="bad film").candidates() == [ids(words, "good"), ids(words, "bad film")]
    closed = verbalizer(words, "seq2seq", a="good", b="bad film").candidates()
    assert closed == [[*ids(words, "good"), 1], [*ids(words, "bad film"), 1]]
    batch = verbalizer(words, a="good", b="bad film").batch([{"source": [5]}])
    assert batch["candidates"].tolist() == [[3, 0], [4, 5]]
    assert batch["candidate_mask"].tolist() == [[1, 0], [1, 1]]


def spaced(*known: str) -> PreTrainedTokenizerFast:
    """A tokenizer that puts a space of its own in front of every text, as those of Llama 2 and Mistral do."""
    table = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["</s>", "<unk>", "▁", *known])}, unk_token="<unk>"))
    table.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    table.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("▁", "merged_with_next"), pre_tokenizers.Split("\n", "isolated")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=table, pad_token="</s>", eos_token="</s>", unk_token="<unk>")


def test_label_words_and_targets_have_the_tokens_that_they_have_behind_the_source() -> None:
    tokenizer = spaced("▁a", "▁film", "▁Topic:", "▁good", "▁bad", "good", "bad", "\n")
    for prefix, shown in ((None, " "), (" ", " "), ("", ""), ("\n", "\n")):
        for kind, close in (("verbalizer", []), ("text-to-text", [0])):
            spec = TaskSpec(kind=kind, labels=("good", "bad"), template="{text}\n", target_prefix=prefix)
            encoder = Encoder(spec, tokenizer)
            source = encoder.source({"text": "a film"})
            for word in ("good", "bad"):
                assert source + encoder.target(word) == [*ids(tokenizer, f"a film\n{shown}{word}"), *close]
    first = Encoder(TaskSpec(kind="text-to-text", backbone="seq2seq"), tokenizer)
    assert first.target("good") == [*ids(tokenizer, "good"), 0]  # nothing stands before it in the decoder


def test_what_merges_with_the_text_ahead_is_encoded_by_itself() -> None:
    known = ["</s>", "<unk>", "\n", "\ng", "g", "oo", "d", "red"]
    table = Tokenizer(models.WordLevel({w: i for i, w in enumerate(known)}, unk_token="<unk>"))
    table.pre_tokenizer = pre_tokenizers.Split("oo", "isolated")
    merging = PreTrainedTokenizerFast(tokenizer_object=table, pad_token="</s>", eos_token="</s>", unk_token="<unk>")
    encoder = Encoder(TaskSpec(kind="text-to-text", target_prefix=""), merging)
    assert encoder.behind("good") == [4, 5, 6]  # "\ngood" begins with a token of its own
    assert encoder.behind("red") == [7]  # "\nred" is unknown as a whole
    assert encoder.behind("") == []


def test_a_separator_has_the_tokens_that_it_has_between_texts(words) -> None:
    lines = spaced("▁a", "a", "\n", "▁;")
    encoder = Encoder(TaskSpec(kind="text-to-text"), lines)
    assert encoder.between("\n\n") == ids(lines, "a\n\na")[1:-1] == [5, 5]
    assert encoder.between(" ;\n") == ids(lines, "a ;\na")[1:-1] == [6, 5]
    gpt2 = bytes_of(["ĊĊ"])  # two line breaks
    gpt2.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert gpt2("a\n\n")["input_ids"] != gpt2("a\n\na")["input_ids"][:-1]  # at the end the breaks are one token
    assert Encoder(TaskSpec(kind="text-to-text"), gpt2).between("\n\n") == gpt2("a\n\na")["input_ids"][1:-1]
    own = Encoder(TaskSpec(kind="text-to-text"), words)
    assert own.between("\n\n") == []  # what the tokenizer drops
    assert own.between("the") == ids(words, "the")  # what merges with the text behind it


def test_label_words_with_the_same_tokens_or_none_are_refused(words) -> None:
    with pytest.raises(InputError, match=r"field 'verbalizer': label word 'moon' has the tokens of 'star'"):
        verbalizer(words, a="star", b="moon").candidates()  # both unknown to this tokenizer
    with pytest.raises(InputError, match="label word ' ' has no tokens"):
        verbalizer(words, a="good", b=" ").candidates()


def test_a_template_has_the_text_once(words) -> None:
    for template in ("news", "{text} or {text}"):
        with pytest.raises(ValueError, match="the template must contain {text}, once"):
            TaskSpec(kind="classification", backbone="encoder", labels=("a", "b"), template=template)


def test_a_tokenizer_that_cannot_write_the_letter_by_which_special_tokens_are_found_is_refused(words) -> None:
    mute = copy.deepcopy(words)
    mute.backend_tokenizer.normalizer = normalizers.Replace("a", "")
    with pytest.raises(InputError, match="found around the text 'a', which it cannot write"):
        Encoder(TaskSpec(kind="classification", backbone="encoder", labels=("a", "b")), mute)


def test_a_label_word_that_begins_with_another_one_is_refused_where_it_can_never_win(words) -> None:
    with pytest.raises(
        InputError,
        match="'good film' begins with 'good', which would always be the likelier one.*set length_normalised",
    ):
        verbalizer(words, a="good film", b="good").candidates()
    assert len(verbalizer(words, normalised=True, a="good film", b="good").candidates()) == 2
    assert len(verbalizer(words, "seq2seq", a="good film", b="good").candidates()) == 2  # the end of the word is scored


# --- batches ----------------------------------------------------------------------------------------------------------
def rows_to_text(words, **spec) -> TextTask:
    rows = [{"text": "the film", "label": "good news"}, {"text": "a great red sun was", "label": "bad"}]
    return TextTask.from_rows({"train": rows}, words, kind="text-to-text", template="{text} Topic :", **spec)


def test_targets_of_a_causal_model_stand_behind_their_source(words) -> None:
    batch = rows_to_text(words).train.batch([0, 1])
    first, second = ids(words, "the film Topic : good news"), ids(words, "a great red sun was Topic : bad")
    assert batch["input_ids"].tolist() == [[0, 0, *first, 1], [*second, 1]]
    assert batch["attention_mask"].tolist() == [[0, 0] + [1] * 7, [1] * 9]
    assert batch["source_mask"].tolist() == [[0, 0, 1, 1, 1, 1, 0, 0, 0], [1] * 7 + [0, 0]]
    assert batch["target_ids"].tolist() == [
        [-100] * 6 + [*ids(words, "good news"), 1],
        [-100] * 7 + [*ids(words, "bad"), 1],
    ]
    wanted = batch["target_ids"] != -100
    assert torch.equal(batch["target_ids"][wanted], batch["input_ids"][wanted])
    assert batch["sample_ids"] == [0, 1]


def test_targets_of_an_encoder_decoder_stand_beside_their_source(words) -> None:
    batch = rows_to_text(words, backbone="seq2seq").train.batch([0, 1])
    assert batch["input_ids"].tolist() == [
        [*ids(words, "the film Topic :"), 0, 0, 0],
        ids(words, "a great red sun was Topic :"),
    ]
    assert batch["attention_mask"].sum(1).tolist() == [4, 7]
    assert batch["target_ids"].tolist() == [[*ids(words, "good news"), 1], [*ids(words, "bad"), 1, -100]]


def test_targets_of_an_encoder_decoder_have_what_its_tokenizer_puts_around_text(words) -> None:
    beginning = copy.deepcopy(words)  # as BART's
    beginning.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<unk> $A </s>", special_tokens=[("<unk>", 2), ("</s>", 1)]
    )
    spec = TaskSpec(kind="text-to-text", backbone="seq2seq", max_target_length=4)
    assert Encoder(spec, beginning).target("good film") == [2, *ids(words, "good film"), 1]
    assert Encoder(spec, beginning).target("good film news") == [2, *ids(words, "good film"), 1]
    assert Encoder(spec, words).target("good film") == [*ids(words, "good film"), 1]
    assert verbalizer(beginning, "seq2seq", a="positive", b="negative").candidates() == [
        [2, *ids(words, w), 1] for w in ("positive", "negative")
    ]
    causal = spec.model_copy(update={"backbone": "causal-lm"})
    assert Encoder(causal, beginning).target("good film") == [*ids(words, "good film"), 1]


def test_targets_have_the_tokens_of_their_own_vocabulary_where_there_are_two(words) -> None:
    class Two:
        """As Marian's: texts are words, targets letters."""

        pad_token_id, eos_token_id, all_special_ids, is_fast = 0, 1, (0, 1), False

        def get_vocab(self) -> dict[str, int]:
            return words.get_vocab()

        def __call__(self, text=None, text_target=None, add_special_tokens=True) -> dict[str, list[int]]:
            found = ids(words, text) if text_target is None else [ord(letter) for letter in text_target]
            return {"input_ids": found + [1] * add_special_tokens}

    class NoTarget(Two):
        """As M2M-100's before its tgt_lang is set."""

        def __call__(self, text=None, text_target=None, add_special_tokens=True) -> dict[str, list[int]]:
            return (
                {}[None]
                if text_target and add_special_tokens
                else super().__call__(text, text_target, add_special_tokens)
            )

    spec = TaskSpec(kind="text-to-text", backbone="seq2seq")
    made = Encoder(spec, Two())
    assert made.source({"text": "good film"}) == [*ids(words, "good film"), 1]
    assert made.target("good") == [*map(ord, "good"), 1]
    with pytest.raises(InputError, match="no target language. Set its tgt_lang"):
        Encoder(spec, NoTarget())


def test_a_long_target_is_cut_and_closed(words) -> None:
    task = rows_to_text(words, max_target_length=2)
    assert task.train.rows[0]["target"] == [*ids(words, "good"), 1]


def test_a_tokenizer_without_an_end_is_refused_where_targets_must_end(words) -> None:
    import copy

    endless = copy.deepcopy(words)
    endless.eos_token = None
    with pytest.raises(InputError, match="no end-of-sequence token. Set its eos_token"):
        rows_to_text(endless)


def test_a_multilabel_batch_has_a_cell_for_every_class(words) -> None:
    rows = [{"text": "sun", "label": ["b", "c"]}, {"text": "rain", "label": []}, {"text": "news", "label": ["a"]}]
    task = TextTask.from_rows({"train": rows}, words, kind="multilabel", backbone="encoder")
    assert task.spec.labels == ("a", "b", "c")
    batch = task.train.batch([0, 1, 2])
    assert batch["labels"].tolist() == [[0, 1, 1], [0, 0, 0], [1, 0, 0]]
    assert batch["labels"].dtype == torch.float32
    with pytest.raises(InputError, match="row 2, field 'labels': 'a' is not a list of labels"):
        TextTask.from_rows(
            {"train": [rows[0], {"text": "sun", "label": "a"}]}, words, kind="multilabel", labels=["a", "b", "c"]
        )


def test_a_verbalizer_trained_on_tokens_has_the_tokens_of_the_right_word(words) -> None:
    rows = [{"text": "sun", "label": "good"}, {"text": "rain", "label": "awful news"}]
    task = TextTask.from_rows({"train": rows}, words, kind="verbalizer")
    batch = task.train.batch([0, 1])
    assert batch["target_ids"].tolist() == [[*ids(words, "good"), -100], ids(words, "awful news")]
    assert batch["labels"].tolist() == [1, 0]
    classes = TextTask.from_rows({"train": rows}, words, kind="verbalizer", objective="classes")
    assert "target_ids" not in classes.train.batch([0, 1])
    assert TaskSpec.model_validate(task.spec.model_dump() | {"objective": None}) == task.spec  # older files


def test_rows_are_padded_on_the_side_of_their_model(words) -> None:
    assert [t.tolist() for t in pad([[5, 6], [7]], 9, "left")] == [[[5, 6], [9, 7]], [[1, 1], [0, 1]]]
    assert [t.tolist() for t in pad([[5, 6], [7]], 9, "right")] == [[[5, 6], [7, 9]], [[1, 1], [1, 0]]]
    for backbone, first in (("causal-lm", [0, 5]), ("encoder", [5, 0]), ("seq2seq", [5, 0])):
        spec = TaskSpec(kind="classification", labels=("a", "b"), backbone=backbone)
        assert Encoder(spec, words).batch([{"source": [5]}, {"source": [6, 7]}])["input_ids"][0].tolist() == first


# --- predictions ------------------------------------------------------------------------------------------------------
LABELLED = [{"text": "the film was good", "label": "positive"}, {"text": "awful news", "label": "negative"}] * 2
NEW = ["a great film", "bad", "the sun was red blue green", "sport"]


def predicted(tiny: Build, words, kind: str, backbone: str, **settings) -> tuple[TextTask, PromptTuning, list[dict]]:
    rows = [row | {"label": [row["label"]]} for row in LABELLED] if kind == "multilabel" else LABELLED
    model = tiny({"causal-lm": "Llama", "encoder": "Bert", "seq2seq": "T5"}[backbone])
    task = TextTask.from_rows({"train": rows}, words, kind=kind, backbone=backbone, max_target_length=5, **settings)
    head = {"num_labels": 2, "multilabel": kind == "multilabel"} if kind in ("classification", "multilabel") else {}
    made = PromptTuning(model, PromptTuningConfig(prompt_length=3, init="uniform", **head))
    return task, made, task.predict(made, NEW, batch_size=3)


@pytest.mark.parametrize("backbone", ["causal-lm", "seq2seq", "encoder"])
@pytest.mark.parametrize("kind", ["verbalizer", "classification"])
def test_a_predicted_class_is_that_of_the_highest_score(tiny: Build, words, kind: str, backbone: str) -> None:
    if (kind, backbone) == ("verbalizer", "encoder"):
        pytest.skip("a verbalizer needs a language model")
    task, made, answers = predicted(tiny, words, kind, backbone)
    assert len(answers) == 4
    for text, answer in zip(NEW, answers, strict=True):
        assert answer["scores"].keys() == {"negative", "positive"}
        assert abs(sum(answer["scores"].values()) - 1) < 1e-5
        assert answer["label"] == max(answer["scores"], key=answer["scores"].get)
        (alone,) = task.predict(made, [text])
        assert abs(alone["scores"]["positive"] - answer["scores"]["positive"]) < 1e-5
    assert len({round(answer["scores"]["positive"], 4) for answer in answers}) > 1


@pytest.mark.parametrize("backbone", ["causal-lm", "seq2seq", "encoder"])
def test_predicted_labels_are_those_above_one_half(tiny: Build, words, backbone: str) -> None:
    _, _, answers = predicted(tiny, words, "multilabel", backbone)
    for answer in answers:
        assert answer["labels"] == [name for name, score in answer["scores"].items() if score > 0.5]


@pytest.mark.parametrize("backbone", ["causal-lm", "seq2seq"])
def test_predicted_text_is_what_the_prompted_model_writes(tiny: Build, words, backbone: str) -> None:
    task, made, answers = predicted(tiny, words, "text-to-text", backbone)
    for text, answer in zip(NEW, answers, strict=True):
        row = task.encoder.batch(task.texts([text]), with_targets=False)
        tokens = made.generate(row, max_new_tokens=5, do_sample=False, pad_token_id=0)
        tokens = tokens[0, row["input_ids"].shape[1] :] if backbone == "causal-lm" else tokens[0]
        assert answer == {"text": words.decode(tokens, skip_special_tokens=True).strip()}
    assert len({answer["text"] for answer in answers}) > 1
    metrics = task.score_text(made, task.train)
    assert metrics.keys() == {"exact-match", "token-f1"}


@pytest.mark.parametrize("backbone", ["causal-lm", "seq2seq"])
def test_greedy_is_greedy_whatever_a_checkpoint_says(tiny: Build, words, backbone: str) -> None:
    task, made, _ = predicted(tiny, words, "text-to-text", backbone)
    texts = ["the film was good", "red rain"]
    before = task.predict(made, texts)
    own = {"num_beams": 3, "repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "min_length": 30}
    made.model.generation_config.update(**own)
    assert task.predict(made, texts) == before
    batch = task.encoder.batch(task.texts(texts), with_targets=False)
    assert task.generate(made, batch, no_repeat_ngram_size=1) != [answer["text"] for answer in before]


def test_inputs_that_are_not_one_value_for_each_text_are_refused(tiny: Build, words) -> None:
    made = PromptTuning(tiny("Llama"), PromptTuningConfig(prompt_length=2, init="random"))
    rows = {"train": [{"text": "sun", "label": label, "about": "news"} for label in ("good", "bad")]}
    task = TextTask.from_rows(rows, words, kind="verbalizer", template="{about} : {text} Topic :")
    for texts, fields, problem in [
        ("sun", {"about": ["news"] * 3}, "field 'text': one text is given. Give a list"),
        (["sun", None], {"about": ["news"] * 2}, "row 2, field 'text': the text is missing or not text"),
        ([math.nan], {"about": ["news"]}, "row 1, field 'text': the text is missing or not text"),
        (["sun", " "], {"about": ["news"] * 2}, "row 2: the text is empty"),
        (["sun"], {"about": ["news", "film"]}, "field 'about': 2 values for 1 texts"),
        (["sun", "rain"], {"about": ["news"]}, "field 'about': 1 values for 2 texts"),
        (["sun"], {"about": [None]}, "row 1, field 'about': the about is missing"),
        (["sun"], {"about": ["news"], "by": ["film"]}, "field 'by': the template does not name it"),
        (["sun"], {"about": ["news"], "batch_size": 0}, "field 'batch_size': the batch size is 0"),
    ]:
        with pytest.raises(InputError, match=re.escape(problem)):
            task.predict(made, texts, **fields)
    assert len(task.predict(made, (text for text in ("sun", "rain")), about=["news", "film"])) == 2


def test_predictions_fill_the_other_fields_of_the_template(tiny: Build, words) -> None:
    rows = [row | {"about": "film"} for row in LABELLED]
    task = TextTask.from_rows({"train": rows}, words, kind="verbalizer", template="{about} : {text} Topic :")
    made = PromptTuning(tiny("Llama"), PromptTuningConfig(prompt_length=3, init="uniform"))
    one, other = task.predict(made, ["sun", "sun"], about=["red", "news"])
    assert one["scores"] != other["scores"]
    with pytest.raises(InputError, match="the template names 'about'"):
        task.predict(made, ["sun"])


def test_a_text_without_tokens_is_refused(tiny: Build, words) -> None:
    task, made, _ = predicted(tiny, words, "verbalizer", "causal-lm")
    with pytest.raises(InputError, match="row 2: the text is empty"):
        task.predict(made, ["sun", ""])
    with pytest.raises(InputError, match="the text has no tokens"):
        task.encoder.source({"text": ""})
