import csv
import json
import sys
import unicodedata
from collections import Counter
from math import ceil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pt_core.data import (
    Split,
    base_to_new,
    class_names,
    encode_labels,
    encode_multilabels,
    few_shot,
    few_shot_split,
    read_table,
    stratified,
)
from pt_core.errors import InputError

labels_with_four_rows_each = st.integers(2, 5).flatmap(
    lambda classes: st.permutations([c for c in range(classes) for _ in range(4 + c)])
)


def stack(rows):
    return {"x": torch.tensor(rows)}


# Split


def test_batches_come_in_order_with_ids_and_a_smaller_last_one():
    split = Split(rows=[10, 11, 12, 13, 14], collate=stack)
    batches = list(split.batches(2))
    assert [b["x"].tolist() for b in batches] == [[10, 11], [12, 13], [14]]
    assert [b["sample_ids"] for b in batches] == [[0, 1], [2, 3], [4]]
    assert [b["x"].tolist() for b in split.batches(2, indices=[4, 0, 2])] == [[14, 10], [12]]


def test_a_subset_of_a_subset_keeps_ids_and_lengths():
    split = Split(rows=[10, 11, 12, 13], collate=stack, lengths=[5, 6, 7, 8], metrics=("accuracy",), num_classes=3)
    part = split.subset([3, 1, 0]).subset([2, 0])
    assert part.batch([0, 1])["sample_ids"] == [0, 3]
    assert part.batch([0, 1])["x"].tolist() == [10, 13]
    assert part.lengths == [5, 8]
    assert (part.metrics, part.num_classes) == (("accuracy",), 3)


def test_a_subset_reads_rows_only_when_asked():
    class Rows:
        def __init__(self):
            self.read = []

        def __len__(self):
            return 100

        def __getitem__(self, i):
            self.read.append(i)
            return i

    rows = Rows()
    part = Split(rows=rows, collate=stack).subset([7, 8, 9])
    assert rows.read == []
    assert part.batch([1])["x"].tolist() == [8]
    assert rows.read == [8]


def test_sample_ids_set_by_collate_are_kept():
    split = Split(rows=["a", "b"], collate=lambda rows: {"sample_ids": [f"file-{row}" for row in rows]})
    assert split.batch([1])["sample_ids"] == ["file-b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": []}, "no rows"),
        ({"rows": [1], "task": "ranking"}, "unknown task 'ranking'.*multiclass, multilabel"),
        ({"rows": [1, 2], "lengths": [1]}, "field 'lengths': 1 values for 2 rows"),
        ({"rows": [1, 2], "ids": ["a", "b", "c"]}, "field 'ids': 3 values for 2 rows"),
        ({"rows": [1], "num_classes": 3, "class_names": "ab"}, "field 'class_names': 2 names, num_classes is 3"),
    ],
)
def test_a_bad_split_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        Split(collate=stack, **arguments)


# Draws


@given(labels_with_four_rows_each, st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_few_shot_draws_are_nested_and_have_k_rows_per_class(labels, seed):
    draws = [few_shot(labels, k, seed) for k in (1, 2, 4)]
    for k, draw in zip((1, 2, 4), draws, strict=True):
        assert Counter(labels[i] for i in draw) == dict.fromkeys(set(labels), k)
        assert len(set(draw)) == len(draw)
    assert set(draws[0]) < set(draws[1]) < set(draws[2])


@given(labels_with_four_rows_each, st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_few_shot_split_is_disjoint_and_each_side_nested_whatever_the_other_side(labels, seed):
    sides = {(k, v): few_shot_split(labels, k, v, seed) for k in (1, 2) for v in (0, 1, 2)}
    for (k, v), (train, validation) in sides.items():
        assert not set(train) & set(validation)
        assert train == few_shot(labels, k, seed)
        assert validation == sides[1, v][1]
        assert set(validation) <= set(sides[k, 2][1])


@given(labels_with_four_rows_each, st.integers(0, 5), st.randoms())
@settings(max_examples=50, deadline=None)
def test_a_class_is_drawn_from_its_own_rows_alone(labels, seed, random):
    zeros = [i for i, label in enumerate(labels) if label == 0]
    others = [label for label in labels if label != 0] + [99] * 4
    random.shuffle(others)
    mixed = [0] * len(zeros) + others
    random.shuffle(mixed)
    zeros_mixed = [i for i, label in enumerate(mixed) if label == 0]
    before = [zeros.index(i) for i in few_shot(labels, 2, seed, classes=[0])]
    after = [zeros_mixed.index(i) for i in few_shot(mixed, 2, seed) if mixed[i] == 0]
    assert before == after


def test_seeds_draw_different_rows_and_a_seed_always_the_same():
    labels = ["cat"] * 100 + ["dog"] * 100
    assert few_shot(labels, 5, seed=0) == few_shot(labels, 5, seed=0) == [47, 49, 42, 88, 6, 163, 108, 178, 138, 183]
    assert set(few_shot(labels, 5, seed=0)) != set(few_shot(labels, 5, seed=1))


def test_classes_come_sorted_or_in_the_order_asked_for():
    assert few_shot(["b", "a", "c"], 1, seed=0) == [1, 0, 2]
    assert few_shot(["b", "a", "c"], 1, seed=0, classes=["c", "b", "c"]) == [2, 0]


def test_draws_are_close_to_uniform():
    hits = Counter(i for seed in range(2000) for i in few_shot([0] * 10, 3, seed))
    # Expected 600 per row, standard deviation 20.5; five of them.
    assert all(497 < hits[i] < 703 for i in range(10))


def test_tensors_and_arrays_are_labels_too():
    labels = [0, 1, 0, 1, 1]
    assert few_shot(torch.tensor(labels), 2, 0) == few_shot(np.array(labels), 2, 0) == few_shot(labels, 2, 0)


@pytest.mark.parametrize(
    ("labels", "k", "classes", "message"),
    [
        (["a", "a", "b"], 2, None, "class 'b' has 1 row, 2 wanted"),
        (["a", "a"], 1, ["a", "z"], "class 'z' has no rows, 1 wanted"),
        (["a", None], 1, None, "row 2, field 'label': label None"),
        (["a"], 0, None, "0 training"),
    ],
)
def test_a_few_shot_draw_that_cannot_be_made_is_refused(labels, k, classes, message):
    with pytest.raises(InputError, match=message):
        few_shot(labels, k, 0, classes)
    with pytest.raises(InputError, match="class 'a' has 3 rows, 4 wanted"):
        few_shot_split(["a"] * 3, 2, 2, 0)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda file: few_shot(["a", "b"], 2, 0, file=file), "field 'label': class 'a' has 1 row, 2 wanted"),
        (lambda file: few_shot_split(["a", "b"], 1, 1, 0, ["z"], file), "field 'label': class 'z' has no rows"),
        (lambda file: few_shot(["a", ""], 1, 0, file=file), "row 2, field 'label': the label is empty"),
        (lambda file: stratified(["a", "b"], 3, 0, file=file), "field 'n': 3 rows wanted, 2 there are"),
        (lambda file: stratified(["a", None], 1, 0, file=file), "row 2, field 'label': label None"),
    ],
)
def test_a_draw_that_is_refused_names_the_file(draw, message):
    with pytest.raises(InputError, match=rf"^reviews\.csv, {message}"):
        draw("reviews.csv")


@given(labels_with_four_rows_each, st.integers(0, 5), st.data())
@settings(max_examples=50, deadline=None)
def test_stratified_is_within_one_row_of_proportion_and_avoids_what_is_excluded(labels, seed, data):
    left = Counter(labels)
    n = data.draw(st.integers(1, left.total()))
    indices = stratified(labels, n, seed)
    assert len(set(indices)) == n and indices == sorted(indices)
    counts = Counter(labels[i] for i in indices)
    for label, size in left.items():
        assert abs(counts[label] - n * size / left.total()) < 1


def test_stratified_rounds_by_largest_remainder():
    labels = ["a"] * 50 + ["b"] * 30 + ["c"] * 20
    # 7 of 100: shares 3.5, 2.1, 1.4; the seventh row goes to "a".
    assert Counter(labels[i] for i in stratified(labels, 7, seed=0)) == {"a": 4, "b": 2, "c": 1}
    assert stratified(labels, 100, seed=3) == list(range(100))
    with pytest.raises(InputError, match="101 rows wanted, 100 there are"):
        stratified(labels, 101, seed=0)


@given(st.lists(st.text(min_size=1), min_size=2, unique=True))
def test_base_classes_are_the_first_half_rounded_up(classes):
    base, new = base_to_new(classes)
    assert base + new == classes and len(base) == ceil(len(classes) / 2)


def test_base_to_new_refuses_one_class_and_doubles():
    assert base_to_new(["a", "b", "c"]) == (["a", "b"], ["c"])
    for classes in (["a"], ["a", "b", "a"]):
        with pytest.raises(InputError, match="two classes or more"):
            base_to_new(classes)


# Labels


def test_whole_numbers_sort_by_value_and_text_and_integers_encode_alike():
    names = class_names([10, 9, 2, 10])
    assert names == class_names(["10", "2", "9"]) == ["2", "9", "10"]
    assert encode_labels([10, 2], names) == encode_labels(["10", "2"], names) == [2, 0]


def test_text_is_looked_up_and_integers_are_indices_where_names_are_words():
    names = class_names(["pos", "neg", "pos"])
    assert names == ["neg", "pos"]
    assert encode_labels(["pos", "neg", np.int64(1)], names) == [1, 0, 1]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["pos", "great"], r"reviews.csv, row 2, field 'label': unknown label 'great'. Known labels: neg, pos"),
        ([0, 1, 2], "row 3, field 'label': label 2 is out of range. Integer labels go from 0 to 1"),
        ([-1], "label -1 is out of range"),
        (["pos", ""], "row 2, field 'label': the label is empty"),
        ([True], "row 1, field 'label': label True is neither text nor an integer"),
        ([1.0], "label 1.0 is neither"),
        ([float("nan")], "label nan is neither"),
        ([None], "label None is neither"),
    ],
)
def test_a_bad_label_is_refused_with_its_row(labels, message):
    with pytest.raises(InputError, match=message):
        encode_labels(labels, ["neg", "pos"], "reviews.csv")


def test_many_known_labels_are_cut_short():
    with pytest.raises(InputError, match=r"c18, c19, \.\.\. \(50 in all\)$"):
        encode_labels(["x"], [f"c{i}" for i in range(50)])


def test_class_names_refuses_mixtures_and_a_single_class():
    with pytest.raises(InputError, match="row 3, field 'label': label 1 is an integer, the labels before it are not"):
        class_names(["a", "b", 1])
    with pytest.raises(InputError, match="two or more"):
        class_names(["a", "a"])
    with pytest.raises(InputError, match="there must be class names, each once"):
        encode_labels(["a"], ["a", "a"])
    with pytest.raises(InputError, match=r"row 3, field 'label': labels 'a' and 'a ' differ in white space only"):
        class_names(["a", "b", "a "])
    for other in ("cafe\u0301", "caf\u00e9\u00a0"):
        with pytest.raises(InputError, match="differ in white space or Unicode form only"):
            class_names(["caf\u00e9", "tea", other])


def test_multilabels_become_rows_of_zeros_and_ones():
    encoded = encode_multilabels([["c", "a"], [], ["b"], [2]], ["a", "b", "c"])
    assert encoded.dtype == torch.float32
    assert encoded.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_a_bad_multilabel_row_is_refused():
    with pytest.raises(InputError, match=r"tags.jsonl, row 2, field 'labels': unknown label 'z'"):
        encode_multilabels([["a"], ["a", "z"]], ["a", "b"], "tags.jsonl")
    with pytest.raises(InputError, match="row 1, field 'labels': 'ab' is not a list"):
        encode_multilabels(["ab"], ["a", "b"])


def test_names_of_multilabels_are_checked_row_by_row():
    assert class_names([["c", "a"], [], ["b", "a"]], multilabel=True) == ["a", "b", "c"]
    for bad, message in [
        ("ab", "'ab' is not a list of labels"),
        (None, "None is not a list"),
        (3, "3 is not a list"),
        (["a", ""], "the label is empty"),
        ([1], "label 1 is an integer"),
    ]:
        with pytest.raises(InputError, match=rf"tags\.jsonl, row 3, field 'labels': {message}"):
            class_names([["c", "a"], ["a", "b"], bad], "tags.jsonl", multilabel=True)


# Tables

FIELDS = {"text": "review", "label": "stars"}
ROWS = [{"text": 'He said "no",\nthen left\u2028.', "label": "1"}, {"text": "ünïcode " * 3, "label": "5"}]


def write(path, rows):
    named = [{FIELDS[role]: value for role, value in row.items()} | {"other": "x"} for row in rows]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in named), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(named))
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(named), path)
    else:
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, list(named[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(named)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    assert read_table(write(tmp_path / f"part=1{suffix}", ROWS), FIELDS) == ROWS


def test_a_tsv_may_quote_but_not_run_over_tabs_or_lines(tmp_path):
    rows = [{"text": 'He said "no"', "label": "1"}]
    assert read_table(write(tmp_path / "ok.tsv", rows), FIELDS) == rows
    stray = tmp_path / "stray.tsv"
    stray.write_text('review\tstars\nfine\t1\n"a stray mark\t0\nand another"\t1\n')
    with pytest.raises(InputError, match=r"stray.tsv, row 2: a quoted value runs over a tab or a line break"):
        read_table(stray, FIELDS)


def test_long_documents_in_a_csv_are_read_and_the_csv_limit_is_left_alone(tmp_path):
    csv.field_size_limit(1000)
    rows = [{"text": "word " * 50_000, "label": "1"}]
    assert read_table(write(tmp_path / "long.csv", rows), FIELDS) == rows
    assert csv.field_size_limit(131_072) == 1000


def test_labels_keep_their_type_and_need_not_be_text(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"review": "good", "stars": 5}\n\n')
    assert read_table(path, FIELDS) == [{"text": "good", "label": 5}]
    assert read_table(path, {"score": "stars"}, text=()) == [{"score": 5}]
    with pytest.raises(InputError, match="field 'stars': the value is int, not text"):
        read_table(path, {"score": "stars"})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "a.jsonl: the file is empty"),
        ("a.json", b"[]", "the file has no rows"),
        ("a.csv", b"review,stars\n", "the file has no rows"),
        ("a.xlsx", b"PK", r"unknown suffix '.xlsx'. Use one of: .jsonl, .json, .csv, .tsv, .parquet"),
        ("a.jsonl", b'{"review": "good", "stars": 1}\n{"review": "caf\xe9"}\n', "a.jsonl: line 2 is not valid UTF-8"),
        ("a.csv", b"\xff\xfer\x00e\x00", "line 1 is not valid UTF-8. Save the file as UTF-8"),
        ("a.jsonl", b'{"review": "good", "stars": 1}\n{"review": \n', "a.jsonl, row 2: not valid JSON"),
        ("a.jsonl", b'{"review": "good", "stars": 1}\n\n{"review": "bad", "stars": 1}', "row 2: the line is empty"),
        ("a.jsonl", b'["good", 1]\n', "row 1: a row must be an object, not list"),
        ("a.json", b'{"review": ["good"]}', "holds a dict. Write a list of objects"),
        ("a.json", b"[{]", "not valid JSON"),
        ("a.json", b"[" * 100_000, "not valid JSON"),
        ("a.jsonl", b"[" * 100_000, "row 1: not valid JSON"),
        ("a.jsonl", b'{"review": "good", "star": 1}', "field 'stars': no such column. .*'review', 'star'$"),
        ("a.csv", b"Review,stars\ngood,1\n", "row 1, field 'review': no such column. .*'Review', 'stars'$"),
        ("a.csv", b"review,stars\ngood,1\nvery, very bad,0\n", "a.csv, row 2: 3 values under 2 columns"),
        ("a.csv", b"review,review\na,b\n", "names a column twice"),
        ("a.csv", b'review,stars\n"good,1\n', "malformed"),
        ("a.jsonl", b'{"review": null, "stars": 1}', "row 1, field 'review': the value is missing"),
        ("a.jsonl", b'{"review": 3, "stars": 1}', "field 'review': the value is int, not text"),
        ("a.csv", b"review,stars\ngood,1\n,1\n", "row 2, field 'review': the value is empty"),
        ("a.csv", b"review,stars\n \t ,1\n", "the value is only white space"),
        ("a.csv", b"review,stars\na\0b,1\n", "row 1, field 'review': the value holds a NUL character"),
        ("a.jsonl", b'{"review": "good", "stars": "\\u0000"}', "field 'stars': the value holds a NUL"),
        ("a.jsonl", b'{"review": "\\ud83d", "stars": 1}', "half of a surrogate pair"),
        (
            "a.jsonl",
            b'{"review": "good", "stars": ["a", "\\ud83d"]}',
            "field 'stars': the value holds half of a surrogate",
        ),
        ("a.parquet", b"PAR1 not really", "a.parquet: not a readable Parquet file"),
    ],
)
def test_a_bad_file_is_refused_with_its_place(tmp_path, name, content, message):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_table(tmp_path / name, FIELDS)


def test_an_absent_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"gone.csv: no such file"):
        read_table(tmp_path / "gone.csv", FIELDS)
    with pytest.raises(InputError, match="is a folder, not a file"):
        read_table(tmp_path, FIELDS)


def test_a_column_absent_from_parquet_is_named(tmp_path):
    pytest.importorskip("pyarrow")
    path = write(tmp_path / "a.parquet", ROWS)
    with pytest.raises(InputError, match=r"field 'rating': no such column. .*'review', 'stars', 'other'"):
        read_table(path, {"text": "rating"})


def test_parquet_with_a_column_twice_or_damaged_values_is_refused(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table([["good"], ["bad"], [1]], names=["review", "review", "stars"]), path)
    with pytest.raises(InputError, match="field 'review': the column is there twice"):
        read_table(path, FIELDS)
    text = pyarrow.Array.from_buffers(pyarrow.utf8(), 1, pyarrow.array([b"\xff"]).buffers())
    parquet.write_table(pyarrow.table({"review": text, "stars": [1]}), path)
    with pytest.raises(InputError, match="a.parquet: not a readable Parquet file"):
        read_table(path, FIELDS)


def test_a_split_of_unknown_metrics_is_refused():
    for metric, problem in [("acuracy", "no metric 'acuracy'"), ("top-5-accuracy", "of 2 classes is always 1")]:
        with pytest.raises(InputError, match=problem):
            Split([1, 2], list, (metric,), num_classes=2)
    Split([1, 2], list, ("of-the-scorer",), scorer=lambda *_: {"of-the-scorer": 1.0})


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match=r"needs pyarrow. Install pyarrow, or use .jsonl"):
        read_table(tmp_path / "a.parquet", FIELDS)


def test_study_data_reads(study_data):
    path = study_data / "text" / "trec.test.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    rows = read_table(path, {"text": "text", "label": "label"})
    assert len(rows) == 500 and len(class_names([row["label"] for row in rows])) == 6


def test_rows_that_can_be_asked_for_together_are() -> None:
    class Rows(list[int]):
        def rows_at(self, indices: list[int]) -> list[int]:
            asked.append(indices)
            return [self[i] for i in indices]

    asked = list[list[int]]()
    split = Split(Rows([5, 6, 7, 8]), lambda rows: {"rows": rows}, task="none")
    assert split.batch([2, 0]) == {"sample_ids": [2, 0], "rows": [7, 5]}
    assert split.subset([3, 1, 2]).batch([2, 0])["rows"] == [7, 8]
    assert asked == [[2, 0], [2, 3]]


def test_a_label_in_another_unicode_form_is_told_apart_from_an_unknown_one() -> None:
    composed, decomposed = (unicodedata.normalize(form, "Café") for form in ("NFC", "NFD"))
    for known, label in ((composed, decomposed), (decomposed, composed)):
        with pytest.raises(
            InputError, match="row 1, field 'label': label 'Caf.*' differs from the known one in Unicode"
        ):
            encode_labels([label], [known, "tree"])
    with pytest.raises(InputError, match="unknown label 'Cafe'. Known labels: Café, tree"):
        encode_labels(["Cafe"], [composed, "tree"])
