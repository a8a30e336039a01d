"""What several modalities need of data: splits, few-shot draws, tables that are checked before anything starts, labels.

Every draw ranks the rows of a class by a hash of (seed, class, position within the class). So draws are nested in their
size, do not depend on the rows of other classes, and are the same on every platform and Python version.
"""

from __future__ import annotations

import csv
import hashlib
import importlib
import io
import itertools
import json
import re
import unicodedata
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.data import Subset

from pt_core.errors import InputError
from pt_core.metrics import check_names

NOT_TEXT = ("label", "labels", "id")
"""Roles of `read_table` whose values need not be text."""

T = TypeVar("T", bound=Hashable)
File = str | Path | None


@dataclass
class Split:
    """Rows of one split, and how they become batches.

    Args:
        rows: anything with `len` and `[i]`; rows may be read or decoded when they are asked for. With `rows_at`
            (indices -> rows) those of a batch are asked for at once.
        collate: rows -> batch, a dict of tensors and lists.
        metrics: names known to `pt_core.metrics` for this task.
        task: one of "multiclass", "multilabel", "text", "regression", "none".
        num_classes: number of classes, where the task has classes.
        lengths: length of each row (say, in tokens), for batches of similar length.
        ids: name of each row in logs and predictions; default: its position.
        missing: the value of a multi-label cell whose label is not known.
        scorer: (method, split, batch size) -> metrics, where they are not a function of logits and labels: generation, ranking.
        class_names: what the classes are called, in the order of the labels, where that is known.

    Raises:
        InputError: no rows, an unknown task or metric, as many lengths or ids as there are not rows, or as many class names
            as there are not classes.
    """

    rows: Sequence[Any]
    collate: Callable[[list[Any]], dict[str, Any]]
    metrics: tuple[str, ...] = ()
    task: str = "multiclass"
    num_classes: int | None = None
    lengths: Sequence[int] | None = None
    ids: Sequence[str | int] | None = None
    missing: int | None = None
    scorer: Callable[[Any, Split, int], dict[str, float]] | None = None
    class_names: Sequence[str] | None = None

    def __post_init__(self) -> None:
        check_names(self.metrics if self.scorer is None else (), self.task, self.num_classes)
        if len(self.rows) == 0:
            raise InputError("the split has no rows", field="rows")
        for field in ("lengths", "ids"):
            values = getattr(self, field)
            if values is not None and len(values) != len(self.rows):
                raise InputError(f"{len(values)} values for {len(self.rows)} rows", field=field)
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise InputError(f"{len(self.class_names)} names, num_classes is {self.num_classes}", field="class_names")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def row_ids(self) -> Sequence[str | int]:
        """`ids`, or else the numbers of the rows."""
        return range(len(self)) if self.ids is None else self.ids

    def subset(self, indices: Sequence[int]) -> Split:
        """The rows at `indices`, in that order; they keep their ids and are still read only when asked for."""
        indices = list(indices)
        return replace(
            self,
            rows=cast(Sequence[Any], Subset(cast(Any, self.rows), indices)),
            lengths=None if self.lengths is None else [self.lengths[i] for i in indices],
            ids=[self.row_ids[i] for i in indices],
        )

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """The collated rows at `indices`; "sample_ids" holds their ids, unless `collate` has set it."""
        return {"sample_ids": [self.row_ids[i] for i in indices]} | self.collate(_rows_at(self.rows, indices))

    def batches(self, batch_size: int, indices: Sequence[int] | None = None) -> Iterator[dict[str, Any]]:
        """Batches of `batch_size` rows in order (of `indices`, or of the rows); the last one may be smaller."""
        if batch_size < 1:
            raise InputError(f"the batch size is {batch_size}", remedy="Use 1 or more", field="batch_size")
        indices = range(len(self)) if indices is None else indices
        for start in range(0, len(indices), batch_size):
            yield self.batch(indices[start : start + batch_size])


def _rows_at(rows: Any, indices: Sequence[int]) -> list[Any]:
    if isinstance(rows, Subset):
        return _rows_at(rows.dataset, [rows.indices[i] for i in indices])
    several: Callable[[Sequence[int]], list[Any]] | None = getattr(rows, "rows_at", None)
    return [rows[i] for i in indices] if several is None else several(indices)


# Draws


def few_shot(
    labels: Iterable[Any], k: int, seed: int, classes: Sequence[str | int] | None = None, file: File = None
) -> list[int]:
    """Indices of `k` rows per class, class by class.

    For one seed the draws are nested (the 4-shot set contains the 2-shot set), and the draw of a class depends on the
    rows of that class alone.

    Args:
        labels: one text or integer label per row; a tensor or array will do.
        k: rows per class.
        classes: the classes to draw from; default: all there are, sorted.
        file: where the rows come from, for messages.

    Raises:
        InputError: a class has no rows, or fewer than `k`.
    """
    return few_shot_split(labels, k, 0, seed, classes, file)[0]


def few_shot_split(
    labels: Iterable[Any],
    k: int,
    k_validation: int,
    seed: int,
    classes: Sequence[str | int] | None = None,
    file: File = None,
) -> tuple[list[int], list[int]]:
    """Disjoint (training, validation) indices of `k` and `k_validation` rows per class.

    Training rows come from the front of a class's ranking and are those of `few_shot`; validation rows come from the
    back. So each set is nested in its own size and does not depend on the other's.

    Raises:
        InputError: a class has no rows, or fewer than `k + k_validation`.
    """
    if k < 1 or k_validation < 0:
        raise InputError(f"{k} training and {k_validation} validation rows per class cannot be drawn", field="k")
    ranking = _ranking(labels, seed, "few-shot", file)
    chosen = list(ranking if classes is None else dict.fromkeys(classes))
    for name in chosen:
        has, wanted = len(ranking.get(name, ())), k + k_validation
        if has < wanted:
            rows = "no rows" if has == 0 else f"{has} row{'s' * (has > 1)}"
            raise InputError(
                f"class {name!r} has {rows}, {wanted} wanted",
                remedy="Ask for fewer rows per class, add rows, or leave the class out",
                file=file,
                field="label",
            )
    training = [i for name in chosen for i in ranking[name][:k]]
    validation = [i for name in chosen for i in ranking[name][::-1][:k_validation]]
    return training, validation


def stratified(labels: Iterable[Any], n: int, seed: int, file: File = None) -> list[int]:
    """Sorted indices of `n` rows in class proportion, for test sets of limited size.

    Proportions are rounded by largest remainder (ties: the class that sorts first), so a class is off its exact share by
    less than one row.

    Raises:
        InputError: fewer than `n` rows are left.
    """
    rankings = list(_ranking(labels, seed, "stratified", file).values())
    left = sum(len(r) for r in rankings)
    if not 1 <= n <= left:
        raise InputError(f"{n} rows wanted, {left} there are", remedy=f"Ask for 1 to {left} rows", file=file, field="n")
    # Seats of a class: n * size / left, rounded down; what is left over goes to the largest remainders.
    seats = [n * len(r) // left for r in rankings]
    by_remainder = sorted(range(len(rankings)), key=lambda c: -(n * len(rankings[c]) % left))
    for c in by_remainder[: n - sum(seats)]:
        seats[c] += 1
    return sorted(i for r, count in zip(rankings, seats, strict=True) for i in r[:count])


def base_to_new(classes: Sequence[T]) -> tuple[list[T], list[T]]:
    """(base, new): the first ceil(C / 2) classes and the others, in the order given (CoCoOp, section 4.1).

    Raises:
        InputError: fewer than two classes, or one named twice.
    """
    if len(classes) < 2 or len(set(classes)) < len(classes):
        raise InputError("base-to-new needs two classes or more, each named once", field="classes")
    half = (len(classes) + 1) // 2
    return list(classes[:half]), list(classes[half:])


def _ranking(labels: Iterable[Any], seed: int, purpose: str, file: File) -> dict[str | int, list[int]]:
    """Class (sorted) -> its rows, in the order in which they are drawn. Each purpose has an order of its own."""
    rows: dict[str | int, list[int]] = {}
    for i, label in enumerate(_values(labels)):
        rows.setdefault(_checked(label, i + 1, file), []).append(i)

    def order(name: str | int) -> list[int]:
        keys = [hashlib.sha256(f"{purpose}/{seed}/{p}/{name}".encode()).digest() for p in range(len(rows[name]))]
        return [rows[name][p] for p in sorted(range(len(keys)), key=keys.__getitem__)]

    return {name: order(name) for name in sorted(rows, key=lambda name: (isinstance(name, str), name))}


# Labels


def class_names(
    labels: Iterable[Any],
    file: File = None,
    multilabel: bool = False,
    *,
    field: str | None = None,
    rows: Sequence[int] | None = None,
) -> list[str]:
    """The distinct labels as text, sorted; by value where all are whole numbers, so that "10" follows "9".

    Args:
        labels: one for each row; a list of them for each row if `multilabel`.
        file, field, rows: where the labels come from, for messages: file, column, number of each row (default: 1, 2, ...).

    Raises:
        InputError: a label that is neither text nor an integer; text mixed with integers; labels that look alike; fewer
            than two classes; a row without a list if `multilabel`.
    """
    field, seen = field or ("labels" if multilabel else "label"), dict[str | int, int]()
    for row, given in zip(itertools.count(1) if rows is None else rows, _values(labels), strict=False):
        for label in _listed(given, row, file) if multilabel else (given,):
            seen.setdefault(_checked(label, row, file, field), row)
    if len({type(name) for name in seen}) > 1:
        first = next(name for name in seen if type(name) is not type(next(iter(seen))))
        raise InputError(
            f"label {first!r} is {'text' if isinstance(first, str) else 'an integer'}, the labels before it are not",
            remedy="Write all labels as text, or all as integers",
            file=file,
            row=seen[first],
            field=field,
        )
    names = [str(name) for name in seen]
    alike: dict[str, str] = {}
    for name in names:
        if (other := alike.setdefault(" ".join(unicodedata.normalize("NFC", name).split()), name)) != name:
            how = "white space" if {other.isascii(), name.isascii()} == {True} else "white space or Unicode form"
            raise InputError(
                f"labels {other!r} and {name!r} differ in {how} only",
                remedy="Write them alike",
                file=file,
                row=seen[name],
                field=field,
            )
    if len(names) < 2:
        raise InputError(
            f"{len(names)} class(es) found: {names}", remedy="A classifier needs two or more", file=file, field=field
        )
    return sorted(names, key=int) if all(map(_is_integer, names)) else sorted(names)


def encode_labels(labels: Iterable[Any], names: Sequence[str], file: File = None) -> list[int]:
    """Class index of each label.

    A text label is looked up in `names`. So is an integer where every name is a whole number (star ratings "1" to "5");
    else an integer is the index itself, 0 to C - 1. `row` in errors is the 1-based position in `labels`.

    Raises:
        InputError: a label that is unknown, out of range, empty, or neither text nor an integer.
    """
    lookup = _lookup(names)
    return [_index(label, lookup, row, file, "label") for row, label in enumerate(_values(labels), start=1)]


def encode_multilabels(labels: Iterable[Sequence[Any]], names: Sequence[str], file: File = None) -> Tensor:
    """Float tensor [n, C]: 1 where a row has the class, else 0; a row may have none. Labels as in `encode_labels`.

    Raises:
        InputError: as `encode_labels`, and where a row is not a list.
    """
    lookup = _lookup(names)
    rows = list(labels)
    encoded = torch.zeros(len(rows), len(names))
    for row, values in enumerate(rows, start=1):
        for value in _listed(values, row, file):
            encoded[row - 1, _index(value, lookup, row, file, "labels")] = 1.0
    return encoded


def _listed(values: Any, row: int, file: File) -> Collection[Any]:
    if isinstance(values, list | tuple | set | frozenset):
        return values
    raise InputError(
        f"{values!r} is not a list of labels",
        remedy='Write a list, such as ["a", "b"], even for one label',
        file=file,
        row=row,
        field="labels",
    )


def _values(labels: Iterable[Any]) -> list[Any]:
    """A tensor or array as Python values."""
    return list(labels.tolist() if hasattr(labels, "tolist") else labels)


def _is_integer(name: str) -> bool:
    return re.fullmatch(r"0|-?[1-9][0-9]*", name) is not None


def _checked(label: Any, row: int, file: File, field: str = "label") -> str | int:
    if isinstance(label, str) and label.strip():
        return label
    if isinstance(label, Integral) and not isinstance(label, bool):
        return int(label)
    problem = "the label is empty" if isinstance(label, str) else f"label {label!r} is neither text nor an integer"
    raise InputError(problem, remedy="Give each row a class name or a class index", file=file, row=row, field=field)


def _lookup(names: Sequence[str]) -> dict[str | int, int]:
    """Label -> class index, for text labels and for integer ones."""
    if not names or len(set(names)) < len(names):
        raise InputError("there must be class names, each once", field="names")
    by_name: dict[str | int, int] = {name: index for index, name in enumerate(names)}
    numbers = all(map(_is_integer, names))
    return by_name | {int(name) if numbers else index: index for index, name in enumerate(names)}


def _index(label: Any, lookup: dict[str | int, int], row: int, file: File, field: str) -> int:
    index = lookup.get(_checked(label, row, file, field))
    if index is not None:
        return index
    names = [name for name in lookup if isinstance(name, str)]
    if isinstance(label, str) or all(map(_is_integer, names)):
        problem, remedy = unknown_label(label, names)
    else:
        problem, remedy = f"label {label} is out of range", f"Integer labels go from 0 to {len(names) - 1}"
    raise InputError(problem, remedy=remedy, file=file, row=row, field=field)


def unknown_label(label: str | int, names: Sequence[str]) -> tuple[str, str]:
    """What is wrong with a label that is not among the names, and the remedy."""
    composed = unicodedata.normalize("NFC", str(label))
    if any(unicodedata.normalize("NFC", name) == composed for name in names):
        problem = f"label {label!r} differs from the known one in Unicode form only (composed or decomposed letters)"
        return problem, "Write both alike, say in form NFC: some systems decompose the names of files"
    more = f", ... ({len(names)} in all)" if len(names) > 20 else ""
    return f"unknown label {label!r}", f"Known labels: {', '.join(names[:20])}{more}"


# Tables


def read_table(
    path: str | Path, fields: Mapping[str, str], text: Collection[str] | None = None
) -> list[dict[str, Any]]:
    """The named columns of a table of examples, every row checked.

    By suffix: .jsonl (one object per line), .json (a list of objects), .csv and .tsv (UTF-8, with a header), .parquet
    (needs pyarrow). A row number in an error is the 1-based position among the data rows, without a header.

    Args:
        path: the file.
        fields: role -> column, such as `{"text": "review", "label": "stars"}`.
        text: the roles whose values must be text with something in it; default: all but "label", "labels" and "id".

    Returns:
        One dict per row: role -> value, as it stands in the file.

    Raises:
        InputError: the file is absent, empty, of another kind, not UTF-8 or malformed; a column is absent; text is
            missing, blank or not text; a value holds a NUL character or half a surrogate pair.
    """
    path = Path(path)
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_csv}
    if not path.is_file():
        raise InputError("is a folder, not a file" if path.is_dir() else "no such file", file=path)
    if path.suffix != ".parquet" and path.suffix not in readers:
        raise InputError(
            f"unknown suffix {path.suffix!r}", remedy=f"Use one of: {', '.join(readers)}, .parquet", file=path
        )
    if path.stat().st_size == 0:
        raise InputError("the file is empty", file=path)
    if path.suffix == ".parquet":
        rows = _read_parquet(path, list(fields.values()))
    else:
        rows = readers[path.suffix](_decode(path), path)
    if not rows:
        raise InputError("the file has no rows", file=path)
    must_be_text = [role for role in fields if role not in NOT_TEXT] if text is None else text
    return [_select(row, number, fields, must_be_text, path) for number, row in enumerate(rows, start=1)]


def _select(row: Any, number: int, fields: Mapping[str, str], text: Collection[str], path: Path) -> dict[str, Any]:
    """The wanted columns of one row, checked."""
    if not isinstance(row, dict):
        raise InputError(f"a row must be an object, not {type(row).__name__}", file=path, row=number)
    for column in fields.values():
        _check_column(column, row, path, number)
    selected = {role: row[column] for role, column in fields.items()}
    for role, value in selected.items():
        problem = ""
        if role in text and not isinstance(value, str):
            problem = "is missing" if value is None else f"is {type(value).__name__}, not text"
        elif role in text and not value.strip():
            problem = "is empty" if not value else "is only white space"
        else:
            texts = "".join(part for part in (value if isinstance(value, list) else [value]) if isinstance(part, str))
            if "\0" in texts:
                problem = "holds a NUL character"
            elif re.search("[\ud800-\udfff]", texts):
                problem = "holds half of a surrogate pair, which no tokenizer accepts"
        if problem:
            raise InputError(
                f"the value {problem}", remedy="Mend or drop the row", file=path, row=number, field=fields[role]
            )
    return selected


def _check_column(column: str, columns: Iterable[str], path: Path, row: int | None = None) -> None:
    if column not in columns:
        there = ", ".join(map(repr, columns)) or "none"
        raise InputError("no such column", remedy=f"Columns there are: {there}", file=path, row=row, field=column)


def _decode(path: Path) -> str:
    """The file as text; a byte order mark, which spreadsheets write, is dropped."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"line {line} is not valid UTF-8", remedy="Save the file as UTF-8", file=path) from error


def _read_jsonl(text: str, path: Path) -> list[Any]:
    rows = []
    # Not splitlines(), which also splits at characters that may stand inside a JSON string, such as U+2028.
    for number, line in enumerate(text.rstrip().split("\n"), start=1):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            problem = f"not valid JSON ({error})" if line.strip() else "the line is empty"
            raise InputError(problem, remedy="Write one JSON object per line", file=path, row=number) from error
    return rows


def _read_json(text: str, path: Path) -> list[Any]:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not valid JSON ({error})", file=path) from error
    if not isinstance(rows, list):
        raise InputError(f"holds a {type(rows).__name__}", remedy="Write a list of objects, or .jsonl", file=path)
    return rows


def _read_csv(text: str, path: Path) -> list[Any]:
    limit = csv.field_size_limit(2**31 - 1)  # the default refuses documents of more than 131,072 characters
    tabs = path.suffix == ".tsv"
    try:
        lines = list(csv.reader(io.StringIO(text, newline=""), delimiter="\t" if tabs else ",", strict=True))
    except csv.Error as error:
        raise InputError(
            f"malformed ({error})", remedy="Check the quotation marks, or use .jsonl", file=path
        ) from error
    finally:
        csv.field_size_limit(limit)
    header, *rows = [line for line in lines if line] or [[]]
    if len(set(header)) < len(header):
        raise InputError(f"the header names a column twice: {', '.join(header)}", file=path)
    for number, row in enumerate(rows, start=1):
        # A stray quotation mark in a .tsv joins lines into one value; such a value is never taken for text.
        if len(row) != len(header) or (tabs and re.search(r"[\t\r\n]", "".join(row))):
            raise InputError(
                f"{len(row)} values under {len(header)} columns"
                if len(row) != len(header)
                else "a quoted value runs over a tab or a line break",
                remedy="Check separators and quotation marks, or use .jsonl",
                file=path,
                row=number,
            )
    return [dict(zip(header, row, strict=True)) for row in rows]


def _read_parquet(path: Path, columns: list[str]) -> list[Any]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
        arrow_error = importlib.import_module("pyarrow").ArrowException
    except ImportError as error:
        raise InputError("reading Parquet needs pyarrow", remedy="Install pyarrow, or use .jsonl", file=path) from error
    try:
        table = parquet.ParquetFile(path)
        names = table.schema_arrow.names
        for column in columns:
            _check_column(column, names, path)
            if names.count(column) > 1:
                raise InputError("the column is there twice", file=path, field=column, remedy="Rename one of them")
        rows: list[Any] = table.read(columns=columns).to_pylist()
    except (arrow_error, OSError, OverflowError, UnicodeError) as error:
        raise InputError(f"not a readable Parquet file ({error})", file=path) from error
    return rows
