"""Image tasks: every kind of source, draws as the field makes them, and what is wrong named before training starts."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from threading import get_ident
from time import sleep
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import normalizers

from pt_core.artifacts import load_artifact
from pt_core.data import Split
from pt_core.errors import InputError
from pt_core.plan import FitConfig
from pt_core.testing import Killed
from pt_vl import data, images
from pt_vl.data import SUFFIXES, TEMPLATES, ImageSpec, ImageTask, draw, list_folder, list_split_file
from pt_vl.images import read_image
from pt_vl.method import cache_features
from pt_vl.methods.coop import CoOp, CoOpConfig
from pt_vl.methods.vpt import VPT, VPTConfig
from pt_vl.methods.zero_shot import ZeroShot, ZeroShotConfig
from pt_vl.preprocessing import Preprocessing

Make = Callable[..., Any]


def picture(seed: int = 0, size: tuple[int, int] = (16, 12)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def save(path: Path, image: Image.Image | None = None, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or picture(seed)).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """train: 6 cats, 5 big_house, 7 dogs; test: 2 of each."""
    for split, counts in (("train", (6, 5, 7)), ("test", (2, 2, 2))):
        for name, count in zip(("cat", "big_house", "dog"), counts, strict=True):
            for i in range(count):
                save(tmp_path / split / name / f"{i}.png", seed=len(split) * 1000 + len(name) * 100 + i)
    return tmp_path


def labels(split: Split | None) -> list[int]:
    assert split is not None
    return list(split.rows.labels)  # type: ignore[attr-defined]


def test_a_split_file_may_begin_with_a_byte_order_mark_and_is_refused_where_it_cannot_be_read(folder: Path) -> None:
    content: dict[str, Any] = {"train": [["cat/0.png", 0, "cat"], ["dog/0.png", 1, "dog"]], "val": [], "test": []}
    (folder / "split.json").write_text(json.dumps(content), "utf-8-sig")
    found, names = list_split_file(folder / "split.json", folder / "train")
    assert names == ["cat", "dog"] and found["train"].ids == ["cat/0.png", "dog/0.png"]
    (folder / "split.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"split\.json: is not JSON"):
        list_split_file(folder / "split.json", folder / "train")


@pytest.mark.parametrize("names", [("train", "val", "test"), ("Training", "dev"), ("test",)])
def test_splits_are_no_classes(names: tuple[str, ...], tmp_path: Path, make_encoder: Make) -> None:
    for name in names:
        save(tmp_path / "shapes" / name / "cat" / "0.png")
    each = ", ".join(str(tmp_path / "shapes" / name) for name in sorted(names))
    with pytest.raises(InputError) as told:
        list_folder(tmp_path / "shapes")
    assert f"its folders are splits, not classes: {', '.join(sorted(names))}. Give each by itself: {each}" in str(
        told.value
    )
    save(tmp_path / "shapes" / "bus" / "0.png")
    assert set(list_folder(tmp_path / "shapes").labels) == {*names, "bus"}


def test_a_class_may_be_called_like_a_split_and_a_link_to_the_folder_is_none(tmp_path: Path) -> None:
    save(tmp_path / "shapes" / "train" / "0.png")
    (tmp_path / "shapes" / "again").symlink_to(tmp_path / "shapes")
    (tmp_path / "shapes" / "above").symlink_to(tmp_path)
    with pytest.warns(UserWarning, match="2 files of .* ignored, the first is above"):
        assert list_folder(tmp_path / "shapes").ids == ["train/0.png"]


def test_links_in_a_folder_are_followed_once_and_never_back(folder: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "cat").symlink_to(folder / "train" / "cat")  # class folders, files and folders below a class
    save(linked / "dog" / "own.png", seed=5)
    (linked / "dog" / "link.png").symlink_to(folder / "train" / "dog" / "0.png")
    (linked / "dog" / "batch").symlink_to(folder / "train" / "dog")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = list_folder(linked)
    assert found.ids == [
        *(f"cat/{i}.png" for i in range(6)),
        *(f"dog/batch/{i}.png" for i in range(7)),
        "dog/link.png",
        "dog/own.png",
    ]
    for source, name in zip(found.sources, found.ids, strict=True):
        assert np.array_equal(np.asarray(read_image(source)), np.asarray(Image.open(linked / name)))
    for name, target in (("again", folder / "train" / "dog"), ("up", tmp_path), ("round", linked / "dog"), ("x", "y")):
        (linked / "dog" / name).symlink_to(target)
    (linked / "cat" / "circle.png").symlink_to("circle.png")
    with pytest.warns(
        UserWarning, match=r"5 files of .* ignored, the first is cat/circle\.png\. Links lead to what is"
    ):
        again = list_folder(linked)
    assert len(again) == len(found) and set(again.ids) & {"dog/again/0.png"}, "the first of two links to one folder"


def test_images_that_are_left_out_are_counted(folder: Path) -> None:
    train = folder / "train"
    before = list_folder(train).ids
    for place in (train, train / "cat"):
        for name in ("@eaDir", "__MACOSX"):
            save(place / name / "thumb.jpg")
    save(train / "loose.png")
    (train / "labels.csv").write_text("x")
    (train / "cat" / "gone.png").symlink_to("nowhere")
    (train / "owl").symlink_to("nowhere")
    with pytest.warns(UserWarning) as told:
        assert list_folder(train).ids == before
    (warning,) = told
    assert f"3 files of {train} ignored, the first is loose.png. Images lie in the folder of" in str(warning.message)
    assert "Links lead to what is there" in str(warning.message) and "Images end" not in str(warning.message)


def test_files_of_a_folder_that_are_no_images_are_counted_and_the_first_is_named(folder: Path) -> None:
    for name, more in (("1.JFIF", "JPEG"), ("2.avif", "AVIF")):
        if Path(name).suffix.lower() in SUFFIXES:
            picture().save(folder / "test" / "cat" / name, more)
    (folder / "test" / "cat" / "notes.txt").write_text("x")
    (folder / "test" / "cat" / ".hidden.heic").write_bytes(b"x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = list_folder(folder / "test")
    assert {Path(name).suffix.lower() for name in found.ids} == {".png", ".jfif"} | ({".avif"} & SUFFIXES)
    for source in found.sources:
        assert read_image(source).size == (16, 12)
    for name in ("b.heic", "a.psd", "c.HEIC"):
        (folder / "test" / "cat" / name).write_bytes(b"x")
    with pytest.warns(
        UserWarning, match=r"3 files of .*test ignored, the first is cat/a\.psd\. Images end in .*\.jfif"
    ):
        assert list_folder(folder / "test").ids == found.ids


# --- sources ---------------------------------------------------------------------------------------------------------
def test_folders_name_the_classes_sorted_and_the_rows(folder: Path, make_encoder: Make) -> None:
    backbone = make_encoder()
    task = ImageTask.from_folder(
        folder / "train", backbone, test=folder / "test", templates="a photo of a {}, a type of pet."
    )
    assert task.spec == ImageSpec(
        class_names=("big_house", "cat", "dog"),
        templates=("a photo of a {}, a type of pet.",),
        preprocessing=Preprocessing(size=12),
        context=18,
        tokenizer_hash=backbone.tokeniser_hash,
    )
    assert Counter(labels(task.train)) == {0: 5, 1: 6, 2: 7}
    assert task.validation is None
    assert task.test is not None
    batch = task.test.batch([0, 5])
    assert batch["sample_ids"] == ["big_house/0.png", "dog/1.png"]
    assert batch["labels"].tolist() == [0, 2]
    assert batch["pixels"].shape == (2, 3, 12, 12)
    expected = backbone.preprocessing(Image.open(folder / "test" / "dog" / "1.png"))
    assert torch.equal(batch["pixels"][1], expected)
    assert torch.equal(task.pixels(folder / "test" / "dog" / "1.png"), expected)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_tables_name_paths_relative_to_their_folder(suffix: str, folder: Path, make_encoder: Make) -> None:
    rows = [("train/cat/0.png", "cat"), ("train/dog/0.png", "dog"), ("train/cat/1.png", "cat")]
    file = folder / f"rows{suffix}"
    if suffix == ".csv":
        file.write_text("path,label\n" + "".join(f"{p},{c}\n" for p, c in rows))
    else:
        file.write_text("".join(json.dumps({"path": p, "label": c}) + "\n" for p, c in rows))
    task = ImageTask.from_files(file, make_encoder())
    assert task.spec.class_names == ("cat", "dog")
    assert labels(task.train) == [0, 1, 0]
    moved = folder / "elsewhere" / file.name
    moved.parent.mkdir()
    moved.write_text(file.read_text())
    again = ImageTask.from_files(moved, make_encoder(), images=folder)
    assert again.train is not None
    assert again.train.ids == ["train/cat/0.png", "train/dog/0.png", "train/cat/1.png"]


@pytest.mark.parametrize("path", ["../outside.png", "/etc/hostname", "train/../../outside.png", "link.png"])
def test_paths_never_leave_their_folder(path: str, folder: Path, make_encoder: Make) -> None:
    inner = folder / "train"
    save(folder / "outside.png")
    (inner / "link.png").symlink_to(folder / "outside.png")
    file = inner / "rows.csv"
    file.write_text(f"path,label\ncat/0.png,cat\n{path},dog\n")
    with pytest.raises(InputError, match=r"rows\.csv, row 2, field 'path': the path .* leads out of"):
        ImageTask.from_files(file, make_encoder())


def split_file(folder: Path) -> Path:
    """Labels in another order than names: dog 0, cat 1, big house 2."""
    label = {"dog": 0, "cat": 1, "big_house": 2}
    rows = [
        [f"train/{name}/{i}.png", label[name], name.replace("_", " ")]
        for name, count in (("cat", 6), ("big_house", 5), ("dog", 7))
        for i in range(count)
    ]
    test = [[f"test/{name}/{i}.png", label[name], name.replace("_", " ")] for name in label for i in range(2)]
    file = folder / "split_zhou_Toy.json"
    file.write_text(
        json.dumps(
            {"train": rows[:4] + rows[6:10] + rows[11:16], "val": rows[4:6] + rows[10:11] + rows[16:], "test": test}
        )
    )
    return file


def test_split_files_of_the_field_are_read_as_they_are(folder: Path, make_encoder: Make) -> None:
    task = ImageTask.from_split_file(split_file(folder), folder, make_encoder())
    assert task.spec.class_names == ("dog", "cat", "big house"), "in the order of label ids"
    assert Counter(labels(task.train)) == {0: 5, 1: 4, 2: 4}
    assert Counter(labels(task.validation)) == {0: 2, 1: 2, 2: 1}
    assert Counter(labels(task.test)) == {0: 2, 1: 2, 2: 2}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda c: c.pop("val"), "is no split file"),
        (
            lambda c: c["test"].append(["train/cat/0.png", 1]),
            r"row 7, field 'test': .* is not \[path, label, class name\]",
        ),
        (lambda c: c["test"].append(["train/cat/0.png", 1, "dog"]), "label 1 is 'dog' here and 'cat' before"),
        (lambda c: c["test"].append(["train/cat/0.png", 7, "owl"]), r"labels are not 0 \.\. 3"),
        (lambda c: c["test"].append(["train/cat/99.png", 1, "cat"]), "no such image: 'train/cat/99.png'"),
        (lambda c: c["test"].append(["../x.png", 1, "cat"]), "leads out of"),
        (lambda c: c.update(val=None), r"split_zhou_Toy\.json, field 'val': None is no list of images"),
        (lambda c: c.update(train=3), r"split_zhou_Toy\.json, field 'train': 3 is no list of images"),
    ],
)
def test_a_wrong_split_file_is_refused(change: Any, problem: str, folder: Path, make_encoder: Make) -> None:
    file = split_file(folder)
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=problem):
        ImageTask.from_split_file(file, folder, make_encoder())


def test_folders_of_datasets(folder: Path, tmp_path: Path, make_encoder: Make) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "cat"])})
    rows = {"image": [picture(i) for i in range(4)], "label": [1, 0, 0, 1]}
    made = datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows, features=features)})
    made.save_to_disk(str(tmp_path / "saved"))
    task = ImageTask.from_dataset(tmp_path / "saved", make_encoder())
    assert task.spec.class_names == ("dog", "cat")
    assert labels(task.train) == [1, 0, 0, 1]
    assert task.train is not None
    assert torch.equal(task.train.rows[2]["pixels"], task.spec.preprocessing(picture(2)))


def test_images_of_datasets_are_read_when_they_are_asked_for(tmp_path: Path, make_encoder: Make) -> None:
    datasets, arrow = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
    raw = [save(tmp_path / f"{i}.png", picture(i, (200, 200))).read_bytes() for i in range(20)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "cat"])})
    rows = {"image": [{"bytes": each, "path": None} for each in raw], "label": [i % 2 for i in range(20)]}
    where = saved(tmp_path / "saved", datasets.Dataset.from_dict(rows, features=features))
    before = arrow.total_allocated_bytes()
    tracemalloc.start()
    listed = data.list_dataset(where)[0]["train"]
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held + arrow.total_allocated_bytes() - before < sum(map(len, raw)) / 4
    for i, source in enumerate(listed.sources):
        assert isinstance(source, images.Cell) and source.read() == raw[i]
    task = ImageTask.from_dataset(where, make_encoder(), shots=2)
    assert task.train is not None
    first = task.train.rows[0]["pixels"]
    again = deepcopy(task.train.rows)
    assert len(pickle.dumps(task.train.rows)) < sum(map(len, raw)) and torch.equal(again[0]["pixels"], first)
    shuffled = datasets.load_from_disk(str(where)).shuffle(seed=1).with_format("torch")
    listed = data.list_dataset(shuffled)[0]["train"]
    order = shuffled._indices.column(0).to_pylist()
    assert [source.read() for source in listed.sources] == [raw[i] for i in order]  # type: ignore[union-attr]
    assert listed.labels == [("dog", "cat")[i % 2] for i in order]


def saved(folder: Path, part: Any) -> Path:
    part.save_to_disk(str(folder))
    return folder


def made(datasets: Any, rows: list[int], names: list[str] | None = None) -> Any:
    """A data set of one picture a row, by the row's label; with class names, or with numbers."""
    label = datasets.Value("int64") if names is None else datasets.ClassLabel(names=names)
    features = datasets.Features({"photo": datasets.Image(), "label": label})
    return datasets.Dataset.from_dict({"photo": [picture(i + 1) for i in rows], "label": rows}, features=features)


def test_other_splits_of_datasets_lie_in_folders_of_their_own(tmp_path: Path, make_encoder: Make) -> None:
    datasets = pytest.importorskip("datasets")
    train = saved(tmp_path / "train", made(datasets, [0, 0, 1, 1], ["dog", "cat"]))
    test = saved(tmp_path / "test", made(datasets, [0, 1, 1], ["cat", "dog"]))  # numbers its classes otherwise
    held = made(datasets, [0, 1], ["dog", "cat"])
    both = saved(tmp_path / "both", datasets.DatasetDict({"train": held, "valid": held}))
    task = ImageTask.from_dataset(train, make_encoder(), validation=both, test=test, image="photo")
    assert task.spec.class_names == ("dog", "cat")
    assert [labels(split) for split in (task.train, task.validation, task.test)] == [[0, 0, 1, 1], [0, 1], [1, 0, 0]]
    assert task.test is not None
    assert torch.equal(task.test.rows[1]["pixels"], task.spec.preprocessing(picture(2)))
    with pytest.raises(InputError, match="both, field 'test': has no split 'test'. There are: train, validation"):
        ImageTask.from_dataset(train, make_encoder(), test=both, image="photo")
    with pytest.raises(InputError, match="row 2, field 'label': label -1 is no class"):
        ImageTask.from_dataset(
            saved(tmp_path / "bad", made(datasets, [0, -1], ["dog", "cat"])), make_encoder(), image="photo"
        )


def test_datasets_at_hand_are_taken_as_they_are(folder: Path, make_encoder: Make) -> None:
    datasets = pytest.importorskip("datasets")
    part = made(datasets, [1, 0], ["dog", "cat"])
    for source in (part, datasets.DatasetDict({"train": part})):
        task = ImageTask.from_dataset(source, make_encoder(), test=part, image="photo")
        assert (labels(task.train), labels(task.test)) == ([1, 0], [1, 0])
    paths = [str(folder / "train" / "cat" / f"{i}.png") for i in range(2)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    by_path = datasets.Dataset.from_dict({"image": paths, "label": ["a", "b"]}, features=features)
    task = ImageTask.from_dataset(by_path, make_encoder())
    assert task.train is not None
    assert torch.equal(task.train.rows[1]["pixels"], task.pixels(Path(paths[1])))
    with pytest.raises(InputError, match="list is no data set. Give a Dataset"):
        ImageTask.from_dataset([1, 2], make_encoder())
    gap = datasets.Dataset.from_dict({"image": [paths[0], None], "label": ["a", "b"]}, features=features)
    with pytest.raises(InputError, match="row 2, field 'image': there is no image"):
        ImageTask.from_dataset(gap, make_encoder())
    with pytest.raises(InputError, match="field 'image': the column holds no images"):
        ImageTask.from_dataset(datasets.Dataset.from_dict({"image": [1, 2], "label": ["a", "b"]}), make_encoder())


@pytest.mark.parametrize(
    ("given", "names", "expected"),
    [
        (["red car", "tree"], ("red car", "tree"), [0, 0, 1]),  # one for each index
        ({"cat": "tree", "dog": "red car"}, ("tree", "red car"), [1, 1, 0]),
        ({"1": "tree", "0": "red car"}, ("tree", "red car"), [1, 1, 0]),
        ({0: "red car", 1: "tree"}, ("red car", "tree"), [0, 0, 1]),
        (["cat", "dog"], ("cat", "dog"), [1, 1, 0]),  # the labels in another order
        ("names.txt", ("tree", "red car"), [1, 1, 0]),
    ],
)
def test_classes_of_a_column_with_names_may_be_named_otherwise(
    given: Any, names: tuple[str, ...], expected: list[int], tmp_path: Path, make_encoder: Make
) -> None:
    datasets = pytest.importorskip("datasets")
    (tmp_path / "names.txt").write_text("1 tree\n0 red car\n")
    given = tmp_path / given if isinstance(given, str) else given
    part = made(datasets, [0, 0, 1], ["dog", "cat"])
    task = ImageTask.from_dataset(part, make_encoder(), image="photo", class_names=given)
    assert (task.spec.class_names, labels(task.train)) == (names, expected)
    with pytest.raises(InputError, match="unknown label 'cat'"):
        ImageTask.from_dataset(part, make_encoder(), image="photo", class_names=["dog"])


def test_arrays_in_memory(make_encoder: Make) -> None:
    images = torch.randint(0, 256, (6, 8, 8, 3), dtype=torch.uint8)
    task = ImageTask.from_arrays(
        {"test": (images, torch.tensor([0, 1, 0, 1, 1, 0]))}, make_encoder(), class_names=["cat", "dog"]
    )
    assert task.test is not None
    row = task.test.rows[3]
    assert row["label"] == 1
    assert torch.equal(row["pixels"], task.spec.preprocessing(Image.fromarray(images[3].numpy())))
    grey = np.zeros((2, 8, 8), dtype=np.uint8)
    assert ImageTask.from_arrays({"test": (grey, [0, 1])}, make_encoder(), class_names=["cat", "dog"]).test is not None
    for bad, why in (
        ((images.float(), [0] * 6), r"images are float32 \[6, 8, 8, 3\]"),
        ((images, [0, 1]), "2 labels for 6 images"),
        ((images, [0, 1, 2, 0, 1, 0]), "label 2 is no class. Labels go from 0 to 1"),
    ):
        with pytest.raises(InputError, match=why):
            ImageTask.from_arrays({"test": bad}, make_encoder(), class_names=["cat", "dog"])


# --- class names -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["mapping", "json", "txt"])
def test_class_names_may_come_from_a_file_in_the_order_given(kind: str, tmp_path: Path, make_encoder: Make) -> None:
    for label in ("n01", "n02", "n03"):
        save(tmp_path / "train" / label / "0.png")
    names: Any = {"n03": "dog", "n01": "red car", "n02": "cat"}
    if kind == "json":
        (tmp_path / "names.json").write_text(json.dumps(names))
    if kind == "txt":
        (tmp_path / "names.txt").write_text("n03 dog\nn01 red car\nn02 cat\n")
    task = ImageTask.from_folder(
        tmp_path / "train", make_encoder(), class_names=names if kind == "mapping" else tmp_path / f"names.{kind}"
    )
    assert task.spec.class_names == ("dog", "red car", "cat")
    assert labels(task.train) == [1, 2, 0]


def test_class_names_that_are_wrong_are_refused(folder: Path, make_encoder: Make) -> None:
    def task(names: Any, **options: Any) -> ImageTask:
        return ImageTask.from_folder(folder / "train", make_encoder(), class_names=names, **options)

    with pytest.raises(InputError, match="class names 'a cat' and 'a_cat' are one. Tell them apart"):
        task({"cat": "a cat", "big_house": "a_cat", "dog": "dog"})
    with pytest.raises(InputError, match="class names 'cat dog' and 'cat  dog' are one"):
        task({"cat": "cat dog", "big_house": "cat  dog", "dog": "dog"})
    with pytest.raises(InputError, match="class name 'dog' is there twice"):
        task(["cat", "big_house", "dog", "dog"])
    with pytest.raises(InputError, match=r"1 class\(es\) without images in train: 'owl'"):
        task(["cat", "big_house", "dog", "owl"])
    with pytest.raises(InputError, match="unknown label 'dog'"):
        task(["cat", "big_house"])
    with pytest.raises(InputError, match=r"'a photo of a a a .*' takes 2\d tokens, there are 18"):
        task({"cat": "a " * 15, "big_house": "house", "dog": "dog"})
    with pytest.raises(InputError, match="needs one {}"):
        task(None, templates="a photo")
    save(folder / "test" / "owl" / "0.png")
    with pytest.raises(InputError, match=r"test/owl/0\.png: unknown label 'owl'. Known labels: big_house"):
        ImageTask.from_folder(folder / "train", make_encoder(), test=folder / "test")
    shutil.move(folder / "train" / "cat", folder / "train" / "Caf\u00e9")
    shutil.move(folder / "test" / "owl", folder / "test" / "Cafe\u0301")
    shutil.rmtree(folder / "test" / "cat")
    with pytest.raises(
        InputError, match=r"test/Caf.*/0\.png: label .* differs from the known one in Unicode form only"
    ):
        ImageTask.from_folder(folder / "train", make_encoder(), test=folder / "test")


def test_names_for_labels_that_are_numbers_are_a_mapping(folder: Path, make_encoder: Make) -> None:
    (folder / "rows.csv").write_text("path,label\ntrain/cat/0.png,1\ntrain/dog/0.png,0\n")

    def task(names: Any) -> ImageTask:
        return ImageTask.from_files(folder / "rows.csv", make_encoder(), class_names=names)

    with pytest.raises(InputError) as told:
        task(["dog", "cat"])
    assert str(told.value) == (
        f"{folder / 'rows.csv'}, field 'class_names': none of the labels ('0', '1') is among the class names ('dog', 'cat'). "
        'Names that are not the labels are given as a mapping from these: {"0": "dog", "1": "cat", ...}'
    )
    for names in ({0: "dog", 1: "cat"}, {"0": "dog", "1": "cat"}):
        made = task(names)
        assert made.spec.class_names == ("dog", "cat") and made.spec.labels == ("0", "1")
        assert labels(made.train) == [1, 0]
    with pytest.raises(InputError, match="True is no class name"):
        task({True: "dog", 0: "cat"})


def test_names_that_the_tokeniser_reads_as_one_are_refused(folder: Path, make_encoder: Make) -> None:
    backbone = make_encoder()
    backbone.tokeniser.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(InputError, match="class names 'cat' and 'Cat' are one"):
        ImageTask.from_folder(folder / "train", backbone, class_names={"cat": "cat", "big_house": "Cat", "dog": "dog"})


@pytest.mark.parametrize("text", ["3", "null", '[["a", "b"]]'])
def test_a_file_of_class_names_of_another_form_is_refused(text: str, folder: Path, make_encoder: Make) -> None:
    file = folder / "names.json"
    file.write_text(text)
    with pytest.raises(InputError, match=r"names\.json.*neither a list of names nor a mapping"):
        ImageTask.from_folder(folder / "train", make_encoder(), class_names=file)


def test_a_label_that_a_file_names_twice_is_refused(folder: Path, make_encoder: Make) -> None:
    file = folder / "names.txt"
    file.write_text("cat kitten\ncat pussy\nbig_house house\ndog dog\n")
    with pytest.raises(InputError, match=r"names\.txt.*'cat' is there twice"):
        ImageTask.from_folder(folder / "train", make_encoder(), class_names=file)


def test_hidden_files_are_no_images(folder: Path, make_encoder: Make) -> None:
    before = ImageTask.from_folder(folder / "train", make_encoder())
    save(folder / "train" / "cat" / ".ipynb_checkpoints" / "0-checkpoint.png")
    (folder / "train" / "dog" / "._0.png").write_bytes(b"Mac OS X")
    after = ImageTask.from_folder(folder / "train", make_encoder())
    assert before.train is not None and after.train is not None
    assert after.train.ids == before.train.ids


@pytest.mark.parametrize("path", ["a" * 300 + ".png", "circle.png"])
def test_paths_that_cannot_be_followed_are_named_with_their_row(path: str, folder: Path, make_encoder: Make) -> None:
    (folder / "circle.png").symlink_to("circle.png")
    table = folder / "table.csv"
    table.write_text(f"path,label\ntrain/cat/0.png,cat\n{path},dog\n")
    with pytest.raises(InputError, match=r"table\.csv.*row 2.*field 'path'"):
        ImageTask.from_files(table, make_encoder())


def test_a_class_folder_without_images_is_refused_by_name(folder: Path, make_encoder: Make) -> None:
    (folder / "train" / "owl").mkdir()
    (folder / "train" / "owl" / "notes.txt").write_text("none yet")
    with pytest.raises(InputError, match="class 'owl' has no images"):
        ImageTask.from_folder(folder / "train", make_encoder())
    with pytest.raises(InputError, match="no such folder"):
        ImageTask.from_folder(folder / "nothing", make_encoder())
    with pytest.raises(InputError, match="has no class folders"):
        ImageTask.from_folder(folder / "train" / "cat", make_encoder())


def test_templates_of_the_field_have_one_place_for_the_name() -> None:
    one = {
        "pets": "a photo of a {}, a type of pet.",
        "flowers": "a photo of a {}, a type of flower.",
        "aircraft": "a photo of a {}, a type of aircraft.",
        "food101": "a photo of {}, a type of food.",
        "dtd": "{} texture.",
        "eurosat": "a centered satellite photo of {}.",
        "ucf101": "a photo of a person doing {}.",
    }
    one |= dict.fromkeys(("imagenet", "caltech101", "cars", "sun397"), "a photo of a {}.")
    assert {name: found for name, found in TEMPLATES.items() if name != "ensemble"} == {n: (t,) for n, t in one.items()}
    assert len(set(TEMPLATES["ensemble"])) == 7
    assert all(t.count("{}") == 1 for templates in TEMPLATES.values() for t in templates)


# --- images that are not plain RGB, or not readable ------------------------------------------------------------------
def test_modes_become_rgb(tmp_path: Path) -> None:
    rgb = picture(3)
    grey = save(tmp_path / "grey.png", rgb.convert("L"))
    assert np.array_equal(np.asarray(read_image(grey)), np.stack([np.asarray(rgb.convert("L"))] * 3, -1))
    alpha = rgb.copy()
    alpha.putalpha(7)
    assert np.array_equal(np.asarray(read_image(save(tmp_path / "alpha.png", alpha))), np.asarray(rgb))
    cmyk = save(tmp_path / "cmyk.tif", rgb.convert("CMYK"))
    assert read_image(cmyk).mode == "RGB"
    assert np.abs(np.asarray(read_image(cmyk)).astype(int) - np.asarray(rgb)).max() <= 2
    palette = save(tmp_path / "palette.gif", rgb.quantize(8))
    assert read_image(palette).mode == "RGB"


def test_images_of_sixteen_bits_keep_their_shades(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 16 * 12).reshape(12, 16).astype(np.uint16)
    path = save(tmp_path / "deep.png", Image.fromarray(values))
    made = np.asarray(read_image(path))
    assert np.array_equal(made[..., 0], (values // 257).astype(np.uint8))
    assert len(np.unique(made)) > 150, "a plain conversion would be white from 255 on"


def test_integers_of_thirty_two_bits_have_no_known_scale(tmp_path: Path) -> None:
    path = save(tmp_path / "counts.tif", Image.fromarray(np.arange(16, dtype=np.int32).reshape(4, 4)))
    with pytest.raises(OSError, match="integers of 32 bits"):
        read_image(path)


def damage(folder: Path) -> None:
    (folder / "train" / "cat" / "1.png").write_bytes(b"not an image")
    whole = (folder / "train" / "dog" / "2.png").read_bytes()
    (folder / "train" / "dog" / "2.png").write_bytes(whole[: len(whole) // 2])


def test_images_that_cannot_be_read_are_named_and_counted(folder: Path, make_encoder: Make) -> None:
    damage(folder)
    with pytest.raises(InputError, match=r"2 of 18 images cannot be read: cat/1\.png, dog/2\.png .*`unreadable: skip`"):
        ImageTask.from_folder(folder / "train", make_encoder())


def test_images_that_cannot_be_read_are_skipped_where_asked_before_the_draw(folder: Path, make_encoder: Make) -> None:
    damage(folder)
    with pytest.warns(UserWarning, match="skipped: 2 of 18 images cannot be read"):
        task = ImageTask.from_folder(folder / "train", make_encoder(), unreadable="skip", shots=5)
    assert Counter(labels(task.train)) == {0: 5, 1: 5, 2: 5}
    assert task.train is not None
    assert not {"cat/1.png", "dog/2.png"} & set(task.train.ids or ())


def test_strips_that_would_fill_the_memory_cannot_be_read(tmp_path: Path, folder: Path, make_encoder: Make) -> None:
    assert read_image(save(tmp_path / "long.png", Image.new("RGB", (300, 3)))).size == (300, 3)
    told = r"its sides of 3 and 301 pixels differ by more than a factor of 100"
    for source in (save(tmp_path / "strip.png", Image.new("RGB", (3, 301))), np.zeros((301, 3, 3), np.uint8)):
        with pytest.raises(OSError, match=told):
            read_image(source)
    shutil.copy(tmp_path / "strip.png", folder / "train" / "cat" / "1.png")
    with pytest.raises(InputError, match=rf"1 of 18 images cannot be read: cat/1\.png \({told}"):
        ImageTask.from_folder(folder / "train", make_encoder())
    with pytest.warns(UserWarning, match="skipped: 1 of 18 images"):
        ImageTask.from_folder(folder / "train", make_encoder(), unreadable="skip")


def test_floats_without_a_scale_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "float.tif", Image.fromarray(np.ones((4, 4), dtype=np.float32)))
    with pytest.raises(OSError, match="floating point"):
        read_image(path)


# --- draws -----------------------------------------------------------------------------------------------------------
def test_few_shot_draws_are_nested_seeded_and_as_large_as_there_are_images() -> None:
    names = ["cat", "dog", "owl"]
    train = [0] * 20 + [1] * 3 + [2] * 20
    sets = {k: draw(train, [0] * 9 + [1] * 2 + [2] * 9, names, k, seed=1) for k in (1, 2, 4, 8, 16)}
    for k, found in sets.items():
        assert Counter(train[i] for i in found["train"]) == {0: k, 1: min(k, 3), 2: k}
        few = min(k, 4)
        assert len(found["validation"]) == few + min(few, 2) + few
    for small, large in ((1, 2), (2, 4), (4, 8), (8, 16)):
        assert set(sets[small]["train"]) < set(sets[large]["train"])
    assert draw(train, None, names, 4, seed=1)["train"] == draw(train, None, names, 4, seed=1)["train"]
    assert draw(train, None, names, 4, seed=1)["train"] != draw(train, None, names, 4, seed=2)["train"]


def test_without_a_validation_split_its_images_are_left_over_ones() -> None:
    found = draw([0] * 10 + [1] * 5, None, ["cat", "dog"], 4, seed=0)
    assert not set(found["train"]) & set(found["validation"])
    assert [sum(i < 10 for i in rows) for rows in found.values()] == [4, 4]
    assert [sum(i >= 10 for i in rows) for rows in found.values()] == [4, 1]
    assert set(draw([0, 1], None, ["cat", "dog"], 4, seed=0)) == {"train"}


def test_classes_of_fewer_images_than_shots_are_named(folder: Path, make_encoder: Make) -> None:
    backbone = make_encoder()

    def told(shots: int, **options: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            ImageTask.from_folder(folder / "train", backbone, shots=shots, **options)
        return [str(each.message) for each in found]

    assert told(4) == [] == told(2, validation=folder / "test")
    assert told(5) == ["with 5 shots 1 of 3 classes have no images to validate on: 'big_house'"]
    fewer = "1 of 3 classes have fewer training images: 'big_house' (5)"
    assert told(6, validation=folder / "test") == [f"with 6 shots {fewer}"]
    assert told(6) == [f"with 6 shots {fewer}; 2 of 3 classes have no images to validate on: 'big_house', 'cat'"]
    all_of_them = "3 of 3 classes have fewer training images: 'big_house' (5), 'cat' (6), 'dog' (7)"
    assert told(9) == [f"with 9 shots {all_of_them}"], "nothing is left to validate on, of no class"
    for name in ("cat", "dog"):
        save(folder / "held" / name / "0.png")
    assert "1 of 3 classes have no images to validate on: 'big_house'" in told(4, validation=folder / "held")[0]


def test_shots_of_a_task_are_disjoint_and_leave_the_test_split_whole(folder: Path, make_encoder: Make) -> None:
    task = ImageTask.from_folder(folder / "train", make_encoder(), test=folder / "test", shots=2, seed=3)
    assert task.train is not None
    assert task.validation is not None
    assert Counter(labels(task.train)) == {0: 2, 1: 2, 2: 2}
    assert Counter(labels(task.validation)) == {0: 2, 1: 2, 2: 2}
    assert not set(task.train.ids or ()) & set(task.validation.ids or ())
    assert len(labels(task.test)) == 6


def test_shots_without_training_images_or_below_one_are_refused(folder: Path, make_encoder: Make) -> None:
    arrays = {"test": (np.zeros((2, 4, 4, 3), dtype=np.uint8), [0, 1])}
    with pytest.raises(InputError, match="no training images to draw from"):
        ImageTask.from_arrays(arrays, make_encoder(), class_names=["cat", "dog"], shots=1)
    with pytest.raises(InputError, match="0 shots"):
        ImageTask.from_folder(folder / "train", make_encoder(), shots=0)


def test_base_and_new_are_halves_by_label_id_labelled_from_zero(folder: Path, make_encoder: Make) -> None:
    task = ImageTask.from_split_file(split_file(folder), folder, make_encoder())
    base, new = task.base_to_new()
    assert (base.spec.class_names, new.spec.class_names) == (("dog", "cat"), ("big house",))
    assert Counter(labels(base.train)) == {0: 5, 1: 4}
    assert Counter(labels(new.test)) == {0: 2}
    assert base.test is not None
    assert base.test.num_classes == 2
    assert all(i.startswith(("test/dog", "test/cat")) for i in map(str, base.test.ids or ()))


def test_a_half_may_have_no_images_but_those_that_it_is_tested_on(make_encoder: Make) -> None:
    images, names = np.zeros((4, 4, 4, 3), dtype=np.uint8), ["cat", "dog", "bird", "tree"]
    splits = {"train": (images, [0, 1, 2, 3]), "validation": (images[:2], [0, 1]), "test": (images, [0, 1, 2, 3])}
    base, new = ImageTask.from_arrays(splits, make_encoder(), class_names=names).base_to_new()
    assert (labels(base.validation), new.validation) == ([0, 1], None)
    assert (labels(new.train), labels(new.test)) == ([0, 1], [0, 1])
    splits["test"] = (images[:2], [0, 1])
    with pytest.raises(InputError, match="field 'data.test': there are no test images of bird, tree"):
        ImageTask.from_arrays(splits, make_encoder(), class_names=names).base_to_new()


def test_of_37_classes_19_are_base_and_18_new(make_encoder: Make) -> None:
    images = np.zeros((37, 4, 4, 3), dtype=np.uint8)
    known = ["cat", "dog", "bird", "tree", "red", "car", "big", "house"]
    names = [f"X {'a ' * (i // 8)}{known[i % 8]}" for i in range(37)]
    task = ImageTask.from_arrays({"test": (images, list(range(37)))}, make_encoder(), class_names=names)
    base, new = task.base_to_new()
    assert (len(base.spec.class_names), len(new.spec.class_names)) == (19, 18)
    assert labels(new.test) == list(range(18))


# --- views -----------------------------------------------------------------------------------------------------------
def test_augmentation_draws_anew_from_the_seeded_generator_and_only_for_training(
    folder: Path, make_encoder: Make
) -> None:
    task = ImageTask.from_folder(folder / "train", make_encoder(), test=folder / "test", shots=2, augment=True)
    assert task.train is not None
    assert task.validation is not None
    torch.manual_seed(5)
    first = task.train.rows[0]["pixels"]
    other = task.train.rows[0]["pixels"]
    torch.manual_seed(5)
    assert torch.equal(task.train.rows[0]["pixels"], first)
    assert not torch.equal(other, first)
    assert torch.equal(task.validation.rows[0]["pixels"], task.validation.rows[0]["pixels"])
    backbone = make_encoder()
    assert cache_features(task.train, backbone) is task.train, "augmented views are not cached"
    assert cache_features(task.validation, backbone) is not task.validation


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Images that were decoded; views are kept by a store of this test's own, and read by four threads."""
    found = list[Any]()
    monkeypatch.setattr(images, "VIEWS", images.Views(2**20))
    monkeypatch.setattr(images, "read_image", lambda source: found.append(source) or read_image(source))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    return found


@pytest.mark.parametrize("how", [{}, {"resize": 14}, {"squash": True, "interpolation": "bilinear"}])
def test_fixed_views_are_decoded_once_and_come_to_the_same_bits(
    how: dict[str, Any], folder: Path, decoded: list[Any]
) -> None:
    made = Preprocessing(size=12, **how)
    listed = list_folder(folder / "train")
    listed.sources[3] = Path(listed.sources[3]).read_bytes()  # type: ignore[arg-type]
    rows = images.ImageRows(listed.sources, [0] * len(listed), made)
    plain = [made(read_image(source)) for source in listed.sources]
    for _ in range(2):
        for order in ([3, 0, 17, 3, 5], range(18)):
            assert all(map(torch.equal, [row["pixels"] for row in rows.rows_at(order)], [plain[i] for i in order]))
    assert len(decoded) == 19, "each once, and the one that was there twice in its batch"
    assert torch.equal(rows[-1]["pixels"], plain[-1])
    again = deepcopy(rows)  # takes no view along, and shares those of the process
    assert len(pickle.dumps(rows)) < 10_000 and torch.equal(again[4]["pixels"], plain[4])
    assert torch.equal(images.ImageRows(listed.sources[:6], [0] * 6, made).fixed()[5]["pixels"], plain[5])
    assert len(decoded) == 19
    other = images.ImageRows(listed.sources, [0] * 18, Preprocessing(size=10))
    assert other[0]["pixels"].shape == (3, 10, 10)
    before = made(picture(77))
    save(Path(listed.sources[1]), seed=77)  # type: ignore[arg-type]
    assert torch.equal(rows[1]["pixels"], before), "another image in the place of one"


def test_a_view_is_that_of_the_file_also_where_size_and_times_are_those_of_another(tmp_path: Path) -> None:
    for name, colour in (("a", 10), ("b", 200)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (12, 12), (colour, 0, 0)).save(tmp_path / name / "0.bmp")
        os.utime(tmp_path / name / "0.bmp", (1, 1))
    (tmp_path / "now").symlink_to("a")
    rows = images.ImageRows([tmp_path / "now" / "0.bmp"], [0], Preprocessing(size=12, mean=(0, 0, 0), std=(1, 1, 1)))
    red = [float(rows[0]["pixels"][0, 0, 0])]
    (tmp_path / "now").unlink()
    (tmp_path / "now").symlink_to("b")
    red.append(float(rows[0]["pixels"][0, 0, 0]))
    (tmp_path / "b" / "0.bmp").write_bytes((tmp_path / "a" / "0.bmp").read_bytes())
    os.utime(tmp_path / "b" / "0.bmp", (1, 1))
    red.append(float(rows[0]["pixels"][0, 0, 0]))
    assert red == pytest.approx([10 / 255, 200 / 255, 10 / 255])


def test_rows_and_preprocessing_of_somebodys_own_are_theirs_in_batches(folder: Path) -> None:
    class Brighter(images.ImageRows):
        def __getitem__(self, index: Any) -> Any:
            row = super().__getitem__(index)
            return row | {"pixels": row["pixels"] + 1}

    class Grey(Preprocessing):
        def __call__(self, image: Any) -> torch.Tensor:
            return super().__call__(image).mean(0, keepdim=True).expand(3, -1, -1)

    listed = list_folder(folder / "train")
    plain = images.ImageRows(listed.sources, [0] * 18, Preprocessing(size=12))
    rows = Split(Brighter(listed.sources, [0] * 18, Preprocessing(size=12)), list, ("accuracy",), num_classes=2).rows
    assert torch.equal(rows.rows_at([4, 2])[1]["pixels"], plain[2]["pixels"] + 1)
    grey = images.ImageRows(listed.sources, [0] * 18, Grey(size=12)).rows_at([4, 2])[1]["pixels"]
    assert torch.equal(grey, plain[2]["pixels"].mean(0, keepdim=True).expand(3, -1, -1))


def test_views_take_no_more_memory_than_they_may(folder: Path, decoded: list[Any]) -> None:
    made, listed, size = Preprocessing(size=12), list_folder(folder / "train"), 3 * 12 * 12
    images.VIEWS.limit = 5 * size + 20
    rows = images.ImageRows(listed.sources, [0] * 18, made)
    for _ in range(2):
        for i, source in enumerate(listed.sources):
            assert torch.equal(rows[i]["pixels"], made(read_image(source)))
            assert images.VIEWS.held == size * len(images.VIEWS) <= images.VIEWS.limit
    assert len(decoded) == 36 and len(images.VIEWS) == 5
    rows.rows_at(range(13, 18))
    assert len(decoded) == 36, "the last ones are there"
    whole = [Path(source).read_bytes() for source in listed.sources]  # type: ignore[arg-type]
    rows = images.ImageRows(whole, [0] * 18, made)
    rows.rows_at(range(18))
    assert len(images.VIEWS) < 5 and images.VIEWS.held <= images.VIEWS.limit, "bytes that are known by themselves count"
    arrays = images.ImageRows([np.zeros((12, 12, 3), np.uint8)], [0], made)
    before = arrays[0]["pixels"]
    arrays.sources[0][:] = 9  # type: ignore[index]
    assert not torch.equal(arrays[0]["pixels"], before)


def test_images_are_decoded_ahead_in_order_and_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    made, taken, threads = list[int](), 0, set[int]()

    def make(item: int) -> int:
        made.append(item)
        threads.add(get_ident())
        sleep(0.001 * (item % 3))
        if item == 29:
            raise OSError("29")
        return item

    found = images.ahead(make, range(30))
    with pytest.raises(OSError, match="29"):
        for number in found:
            assert number == taken
            assert len(made) - taken <= 5
            taken += 1
    assert taken == 29 and 1 < len(threads) <= 4 and get_ident() not in threads
    assert list(images.ahead(str, [])) == []


def test_crops_of_a_batch_are_those_of_one_row_after_the_other(
    folder: Path, decoded: list[Any], make_encoder: Make
) -> None:
    task = ImageTask.from_folder(folder / "train", make_encoder(), shots=4, augment=True)
    assert task.train is not None
    order = [5, 0, 11, 3, 3, 8]
    torch.manual_seed(5)
    one_by_one = torch.stack([task.train.rows[i]["pixels"] for i in order])
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(task.train.batch(order)["pixels"], one_by_one)
    assert torch.equal(torch.rand(1), after)


@pytest.mark.parametrize("augment", [False, True])
def test_a_run_with_views_and_threads_goes_on_to_the_bits_of_a_plain_one(
    augment: bool, folder: Path, tmp_path: Path, decoded: list[Any], make_encoder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(output: Path | None = None, stop: bool = False) -> dict[str, torch.Tensor]:
        backbone = make_encoder()
        task = ImageTask.from_folder(folder / "train", backbone, shots=4, augment=augment)
        method = VPT(backbone, VPTConfig(class_names=task.spec.class_names, prompt_length=2))
        run = FitConfig(max_steps=6, batch_size=5, device="cpu", progress=False, checkpoint_every=1)
        assert task.train is not None
        if stop:
            loss = VPT.loss_of
            monkeypatch.setattr(VPT, "loss_of", lambda *given: seen.append(0) or killed() or loss(*given))
        try:
            method.fit(task.train, task.validation, run, output)
        finally:
            monkeypatch.undo() if stop else None
        return method.trained_state()

    def killed() -> None:
        if len(seen) == 4:
            raise Killed

    seen = list[int]()
    fast = trained()
    with pytest.raises(Killed):
        trained(tmp_path / "run", stop=True)  # what follows has one thread, and its views are this process's
    monkeypatch.setattr(images, "VIEWS", images.Views(0))
    for state in (trained(tmp_path / "run"), trained()):
        assert all(torch.equal(state[name], fast[name]) for name in fast)


def test_features_kept_in_a_folder_are_those_of_the_images_not_of_their_ids(folder: Path, make_encoder: Make) -> None:
    backbone = make_encoder()
    task = ImageTask.from_folder(folder / "train", backbone, test=folder / "test")
    assert task.train is not None and task.test is not None
    assert set(task.test.ids or ()) < set(task.train.ids or ())
    for split in (task.train, task.test, task.train):
        kept, plain = (cache_features(split, backbone, 4, where) for where in (folder / "features", None))
        rows = range(len(split))
        assert torch.equal(kept.batch(rows)["image_features"], plain.batch(rows)["image_features"])
        assert kept.ids == split.ids
    save(folder / "test" / "cat" / "0.png", seed=77)  # another image in the place of one
    kept, plain = (cache_features(task.test, backbone, 4, where) for where in (folder / "features", None))
    assert torch.equal(kept.batch([2])["image_features"], plain.batch([2])["image_features"])


def test_a_run_from_a_folder_to_a_saved_prompt_and_back(folder: Path, tmp_path: Path, make_encoder: Make) -> None:
    backbone = make_encoder()
    task = ImageTask.from_folder(folder / "train", backbone, test=folder / "test", shots=4, seed=1)
    method = CoOp(backbone, CoOpConfig(class_names=task.spec.class_names, prompt_length=3))
    run = FitConfig(epochs=2, batch_size=4, optimiser="sgd", momentum=0.9, device="cpu", progress=False)
    assert task.train is not None
    result = method.fit(task.train, task.validation, run)
    assert result.steps == 6
    assert set(result.metrics) == {"loss", "accuracy"}
    path = method.save_pretrained(tmp_path / "prompt", task=task.spec.model_dump(mode="json"))
    assert ImageSpec.model_validate(load_artifact(path).config.task) == task.spec
    zero = ZeroShot(backbone, ZeroShotConfig(class_names=task.spec.class_names, templates=task.spec.templates))
    assert task.test is not None
    assert zero(task.test.batch([0, 1])).logits.shape == (2, 3)


# --- prediction ------------------------------------------------------------------------------------------------------
def test_a_task_predicts_files_bytes_arrays_and_pillows_images(folder: Path, make_encoder: Make) -> None:
    backbone = make_encoder()
    task = ImageTask(ImageTask.from_folder(folder / "train", backbone).spec)
    method = CoOp(backbone, CoOpConfig(class_names=task.spec.class_names, prompt_length=2)).train()
    file = folder / "test" / "dog" / "1.png"
    image = Image.open(file)
    told = task.predict(method, [file, str(file), file.read_bytes(), np.asarray(image), image], batch_size=2)
    assert method.training and image.mode == "RGB"
    expected = method.eval()({"pixels": task.pixels(file)[None]}).logits.softmax(-1)[0].tolist()
    assert len(told) == 5
    for answer in told:
        assert list(answer["scores"]) == list(task.spec.class_names)
        assert list(answer["scores"].values()) == pytest.approx(expected, rel=1e-4)
        assert answer["label"] == task.spec.class_names[expected.index(max(expected))]
    assert task.predict(method, []) == []
    floats, deep = Image.new("F", (4, 4)), Image.fromarray(np.full((4, 4), 25700, dtype=np.uint16))
    assert np.asarray(read_image(deep)).max() == 100
    with pytest.raises(InputError, match="row 2: the image cannot be read .*floating point"):
        task.predict(method, [image, floats])
    (folder / "bad.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"bad\.png, row 2: the image cannot be read"):
        task.predict(method, [file, folder / "bad.png"])
    with pytest.raises(InputError, match="one image in the place of a list"):
        task.predict(method, str(file))
    with pytest.raises(InputError, match="the batch size is 0"):
        task.predict(method, [file], batch_size=0)
    with pytest.raises(InputError, match="the method answers for 2 classes, the task has 3"):
        task.predict(method.with_classes(("cat", "dog")), [file])
