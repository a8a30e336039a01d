"""Images with class labels: folders, tables, the split files of the CoOp family, `datasets` folders, arrays -> batches.

An `ImageTask` holds what a prompt needs besides its tensors to be used (`ImageSpec`: class names, templates, preprocessing,
context; it is saved with the prompt) and the splits. Batches are dicts: `pixels` [B, 3, H, W], `labels` [B], `sample_ids`.

    task = ImageTask.from_folder("pets/train", backbone, test="pets/test", shots=16, seed=1, templates=TEMPLATES["pets"])
    base, new = task.base_to_new()

Paths in files are relative to a folder and never lead out of it. Images are opened when they are asked for; those that a
task keeps are read once beforehand, so that a damaged file is known before training starts.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self, cast

import numpy as np
import torch
from PIL import features
from pydantic import Field
from torch import Tensor

from pt_core.data import Split, base_to_new, encode_labels, few_shot_split, read_table, unknown_label
from pt_core.data import class_names as names_in
from pt_core.errors import InputError
from pt_core.files import FILE_BROWSERS
from pt_core.settings import Settings
from pt_vl.backbones import DualEncoder
from pt_vl.images import Cell, ImageRows, Source, ahead, read_image
from pt_vl.method import Stacked, VLMethod, alike, check_templates, written
from pt_vl.preprocessing import Preprocessing

TEMPLATES: dict[str, tuple[str, ...]] = {
    # By data set, as in the CoOp code.
    "imagenet": ("a photo of a {}.",),
    "caltech101": ("a photo of a {}.",),
    "pets": ("a photo of a {}, a type of pet.",),
    "flowers": ("a photo of a {}, a type of flower.",),
    "aircraft": ("a photo of a {}, a type of aircraft.",),
    "food101": ("a photo of {}, a type of food.",),
    "cars": ("a photo of a {}.",),
    "sun397": ("a photo of a {}.",),
    "dtd": ("{} texture.",),
    "eurosat": ("a centered satellite photo of {}.",),
    "ucf101": ("a photo of a person doing {}.",),
    # The seven that CLIP's notebooks select of eighty for ImageNet.
    "ensemble": (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ),
}
SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
SUFFIXES |= {".avif"} if features.check("avif") else set()
BESIDE = {".txt", ".json", ".csv", ".md"}  # of files that are expected beside images
OF_SYSTEMS = {"@eaDir", "__MACOSX"}  # folders that a NAS and archives of macOS leave: previews, not images
SPLITS = ("train", "validation", "test")
NAMES_OF_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev"}
Unreadable = Literal["refuse", "skip"]


class ImageSpec(Settings):
    """What turns images into a batch and a prediction into an answer. Saved with every prompt."""

    class_names: tuple[str, ...] = Field(description="in the order of the logits")
    labels: tuple[str, ...] | None = Field(None, description="what data have in the place of class names, if not these")
    templates: tuple[str, ...] = Field(("a photo of a {}.",), description="sentences with {} for the class name")
    preprocessing: Preprocessing = Field(description="of the backbone's own images")
    context: int = Field(description="slots of its text tower")
    tokenizer_hash: str = Field("", description="see `DualEncoder.tokeniser_hash`; another tokeniser is refused")


@dataclass
class Listed:
    """Images of one split before anything is drawn: sources, labels as they stand in the file, ids, and the file; or the
    folder, whose folders are the labels and in which ids are paths."""

    sources: list[Source] = field(default_factory=list)
    labels: list[str | int] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    file: Path | None = None
    folders: bool = False

    def __len__(self) -> int:
        return len(self.sources)

    def where(self, row: int, field: str | None = "label") -> dict[str, Any]:
        """Where the image at `row` stands, for messages: by its path in folders, which have no rows."""
        if self.folders and self.file is not None:
            return {"file": self.file / self.ids[row]}
        return {"file": self.file, "row": row + 1, "field": field}

    def take(self, rows: Iterable[int]) -> Listed:
        rows = list(rows)
        return replace(
            self,
            sources=[self.sources[i] for i in rows],
            labels=[self.labels[i] for i in rows],
            ids=[self.ids[i] for i in rows],
        )


def inside(folder: Path, path: str, file: Path | None = None, row: int | None = None) -> Path:
    """The file at `path` in `folder`.

    Raises:
        InputError: the path leads out of the folder (links included), or there is no such file.
    """
    try:
        root = folder.resolve()
        found = (root / path).resolve()
        there = found.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # too long, links in a circle, a null byte
        raise InputError(f"the path {path!r} cannot be followed ({error})", file=file, row=row, field="path") from error
    if not path or not found.is_relative_to(root):
        raise InputError(
            f"the path {path!r} leads out of {folder}", remedy="Give paths below it", file=file, row=row, field="path"
        )
    if not there:
        raise InputError(f"no such image: {path!r} in {folder}", file=file, row=row, field="path")
    return found


def readable(listed: Listed, unreadable: Unreadable) -> Listed:
    """The images that can be read.

    Raises:
        InputError: one cannot, and `unreadable` is "refuse": how many, the first by name, and why.
    """
    bad = {i: why for i, why in enumerate(ahead(_problem, listed.sources)) if why}
    if not bad:
        return listed
    first = next(iter(bad))
    shown = ", ".join(listed.ids[i] for i in list(bad)[:5]) + (", ..." if len(bad) > 5 else "")
    problem = f"{len(bad)} of {len(listed)} images cannot be read: {shown} ({bad[first]})"
    if unreadable == "refuse":
        raise InputError(problem, remedy="Mend or remove them; a recipe may say `unreadable: skip`", file=listed.file)
    warnings.warn(f"skipped: {problem}", UserWarning, stacklevel=3)
    return listed.take(i for i in range(len(listed)) if i not in bad)


def _problem(source: Source) -> str:
    try:
        read_image(source)
    except OSError as error:
        return in_short(error)
    return ""


def in_short(error: OSError) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


# --- the sources of images ---------------------------------------------------------------------------------------------
def list_folder(folder: str | Path) -> Listed:
    """Images of a folder with one folder for each class; links in it are followed, hidden files and folders left out.

    Warns:
        UserWarning: there are files that are taken for no images, images beside the class folders, or links that lead nowhere
            (or back into the folder).

    Raises:
        InputError: there is no such folder, it has no class folders, these are splits, or one has no images or cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError("no such folder", file=folder)
    entries, root = sorted(entry for entry in folder.iterdir() if not _hidden(entry.name)), folder.resolve()
    broken = [e.name for e in entries if not e.exists() or (e.is_symlink() and root.is_relative_to(e.resolve()))]
    classes = [entry for entry in entries if entry.is_dir() and entry.name not in broken]
    if not classes:
        raise InputError("has no class folders", file=folder, remedy="Make one folder for each class, images in it")
    if all(each.name.lower() in NAMES_OF_SPLITS and _has_folders(each) for each in classes):
        raise InputError(
            f"its folders are splits, not classes: {', '.join(each.name for each in classes)}",
            file=folder,
            remedy=f"Give each by itself: {', '.join(str(each) for each in classes)}",
        )
    found = Listed(file=folder, folders=True)
    strange, loose = list[str](), [e.name for e in entries if e.is_file() and e.suffix.lower() in SUFFIXES]
    for each in classes:
        seen, lost = _files(each, root)
        broken += [f"{each.name}/{name}" for name in lost]
        files = [name for name in seen if Path(name).suffix.lower() in SUFFIXES]
        others = [name for name in seen if Path(name).suffix.lower() not in SUFFIXES | BESIDE]
        strange += [f"{each.name}/{name}" for name in others if Path(name).name not in FILE_BROWSERS]
        if not files:
            raise InputError(f"class {each.name!r} has no images", file=folder, remedy="Add some, or remove its folder")
        found.sources += [root / each.name / name for name in files]
        found.labels += [each.name] * len(files)
        found.ids += [f"{each.name}/{name}" for name in files]
    if ignored := [*strange, *loose, *broken]:
        told = [f"Images end in {', '.join(sorted(SUFFIXES))}"] if strange else []
        told += ["Images lie in the folder of their class"] if loose else []
        told += ["Links lead to what is there, outside of the folder"] if broken else []
        what = f"{len(ignored)} file{'s' * (len(ignored) > 1)} of {folder} ignored, the first is {ignored[0]}"
        warnings.warn(f"{what}. {'. '.join(told)}", UserWarning, stacklevel=3)
    return found


def list_images(folder: str | Path) -> list[str]:
    """Paths of all images in a folder and in those below it, relative to it and sorted; hidden ones are left out. Links are
    followed; one to no image is among them, so that whoever reads it says so.

    Raises:
        InputError: there is no such folder, it has no images, or one in it cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError("no such folder", file=folder)
    files, lost = _files(folder, folder)
    found = sorted((name for name in files + lost if Path(name).suffix.lower() in SUFFIXES), key=Path)
    if not found:
        raise InputError("has no images", file=folder, remedy=f"Images end in {', '.join(sorted(SUFFIXES))}")
    return found


def _files(folder: Path, root: Path) -> tuple[list[str], list[str]]:
    """Paths of all files that are not hidden in a folder and in those below it, and of links that lead nowhere, or back into
    `root` or above it; relative to the folder and sorted."""
    top = root.resolve()
    files, lost, entered = list[Path](), list[Path](), set[Path]()

    def refuse(error: OSError) -> None:  # a folder that cannot be read is not one without files
        raise InputError("cannot be read", file=error.filename, remedy="Make it readable, or move it away") from error

    for place, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        here, own = Path(place).relative_to(folder), list[str]()
        for name in sorted(name for name in folders if not _hidden(name)):
            path = Path(place) / name
            real = path.resolve()
            back = path.is_symlink() and (real.is_relative_to(top) or top.is_relative_to(real) or real in entered)
            (lost.append(here / name) if back else own.append(name))
            entered.add(real)
        folders[:] = own
        for name in names:
            if not _hidden(name):
                (files if (Path(place) / name).is_file() else lost).append(here / name)
    return [path.as_posix() for path in sorted(files)], [path.as_posix() for path in sorted(lost)]


def _has_folders(folder: Path) -> bool:
    return any(entry.is_dir() and not _hidden(entry.name) for entry in folder.iterdir())


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in OF_SYSTEMS


def list_table(file: str | Path, images: str | Path | None = None, path: str = "path", label: str = "label") -> Listed:
    """Images that a CSV, TSV, JSON, JSONL or Parquet file names, one row for each.

    Args:
        file: the table.
        images: folder that its paths are relative to; default: the file's.
        path, label: columns.
    """
    file = Path(file)
    rows = read_table(file, {"path": path, "label": label}, text=["path"])
    folder = file.parent if images is None else Path(images)
    sources: list[Source] = [inside(folder, row["path"], file, number) for number, row in enumerate(rows, start=1)]
    return Listed(sources, [row["label"] for row in rows], [row["path"] for row in rows], file)


def list_split_file(file: str | Path, images: str | Path) -> tuple[dict[str, Listed], list[str]]:
    """Splits and class names (by label id) of a `split_zhou_*.json`.

    It is {"train": [[path, label, class name], ...], "val": ..., "test": ...}.

    Raises:
        InputError: the file is not of this form, labels are not 0 .. C - 1, or a label has two names.
    """
    file, images = Path(file), Path(images)
    if not file.is_file():
        raise InputError("no such file", file=file)
    try:
        content = json.loads(file.read_text("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # the latter of brackets of thousands of levels
        raise InputError(f"is not JSON ({error})", file=file) from error
    if not isinstance(content, dict) or not {"train", "val", "test"} <= content.keys():
        raise InputError("is no split file", file=file, remedy='It has the keys "train", "val" and "test"')
    names: dict[int, str] = {}
    found = {}
    for key, split in (("train", "train"), ("val", "validation"), ("test", "test")):
        listed = Listed(file=file)
        if not isinstance(content[key], list):
            raise InputError(f"{content[key]!r:.60} is no list of images", file=file, field=key)
        for number, row in enumerate(content[key], start=1):
            right = isinstance(row, list) and len(row) == 3
            if not (right and isinstance(row[0], str) and type(row[1]) is int and isinstance(row[2], str)):
                raise InputError(f"{row!r} is not [path, label, class name]", file=file, row=number, field=key)
            if names.setdefault(row[1], row[2]) != row[2]:
                problem = f"label {row[1]} is {row[2]!r} here and {names[row[1]]!r} before"
                raise InputError(problem, file=file, row=number, field=key)
            listed.sources.append(inside(images, row[0], file, number))
            listed.labels.append(row[1])
            listed.ids.append(row[0])
        found[split] = listed
    if sorted(names) != list(range(len(names))):
        raise InputError(f"labels are not 0 .. {len(names) - 1}", file=file, field="label")
    return found, [names[i] for i in range(len(names))]


def is_split_file(file: Path) -> bool:
    """Whether a file is a split file, rather than a table: JSON that holds an object."""
    if file.suffix != ".json" or not file.is_file():
        return False
    with file.open(encoding="utf-8-sig", errors="replace") as text:
        return text.read(1000).lstrip().startswith("{")


def is_dataset(folder: Path) -> bool:
    """Whether `datasets` has saved this folder."""
    return any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json", "state.json"))


def list_dataset(
    source: Any, image: str = "image", label: str | None = "label", alone: str = "train"
) -> tuple[dict[str, Listed], list[str] | None]:
    """Splits and class names (if the label column has them) of a folder that `datasets` has saved, or of what it has loaded.

    Labels of a column with class names are names, so that two data sets may number them differently.

    Args:
        source: the folder, a `datasets.Dataset`, or a `DatasetDict`.
        image, label: columns; without a label, all labels are "".
        alone: split that a `Dataset`, which has none, is taken for.

    Raises:
        InputError: `datasets` is not installed, the source is none of its own, a column is absent, or a label or an image is.
    """
    folder = Path(source) if isinstance(source, str | Path) else None
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise InputError("reading this folder needs datasets", file=folder, remedy="Install datasets") from error
    loaded = source
    if folder is not None:
        try:
            loaded = datasets.load_from_disk(str(folder))
        except (OSError, ValueError) as error:
            raise InputError(f"is no folder of datasets ({str(error).splitlines()[0]})", file=folder) from error
    if not isinstance(loaded, datasets.Dataset | datasets.DatasetDict):
        raise InputError(f"{type(loaded).__name__} is no data set", remedy="Give a Dataset, a DatasetDict, or a folder")
    parts = loaded if isinstance(loaded, dict) else {alone: loaded}
    found, names = dict[str, Listed](), None
    for key, part in parts.items():
        split = {"val": "validation", "valid": "validation"}.get(key, key)
        if split not in SPLITS:
            continue
        for column in (image, label):
            if column is not None and column not in part.column_names:
                raise InputError("no such column", file=folder, field=column, remedy=f"There are: {part.column_names}")
        plain = part.with_format(None)
        own = None if label is None else getattr(part.features[label], "names", None)
        names = names or own
        listed = Listed(labels=[""] * len(part) if label is None else list(plain[label]), file=folder)
        if own is not None:
            listed.labels = [own[i] for i in _indices(listed, own, by_index=True)]
        try:  # not decoded by `datasets`, which would open whatever path a row names
            cells = plain.select_columns([image]).cast_column(image, datasets.Image(decode=False))
            there = list(_there(cells))
        except (TypeError, ValueError, NotImplementedError) as error:
            raise InputError("the column holds no images", file=folder, field=image) from error
        state = _state_of(part)
        for row, (whole, path) in enumerate(there):
            if not (whole or path):
                raise InputError("there is no image", file=folder, row=row + 1, field=image)
            if whole:
                listed.sources.append(Cell(cells, image, row, state))
            else:  # the paths of a data set at hand are the caller's own
                listed.sources.append(Path(path) if folder is None else inside(folder, path, folder, row + 1))
            listed.ids.append(f"{key}/{row + 1}")
        found[split] = listed
    return found, names


def _there(cells: Any) -> Iterator[tuple[bool, str]]:
    """Of each image of the one column, whether it is in the data, and its path; what is in them is not read."""
    struct_field = importlib.import_module("pyarrow.compute").struct_field
    for table in cells.with_format("arrow").iter(1000):
        column = table.column(0)
        whole, paths = (struct_field(column, name) for name in ("bytes", "path"))
        yield from zip(whole.is_valid().to_pylist(), (path or "" for path in paths.to_pylist()), strict=True)


def _state_of(part: Any) -> str:
    """What `datasets` knows a data set by, and size and time of its files."""
    files = [Path(each["filename"]) for each in part.cache_files]
    known = [(file.name, (state := file.stat()).st_size, state.st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([part._fingerprint, known]).encode()).hexdigest()


def list_array(images: Any, labels: Any, name: str) -> Listed:
    """Images in memory: uint8 [n, H, W, 3] or [n, H, W], labels [n].

    Raises:
        InputError: another shape or type, or as many labels as there are not images.
    """
    values, given = np.asarray(images), list(labels.tolist() if hasattr(labels, "tolist") else labels)
    shaped = values.ndim == 3 or (values.ndim == 4 and values.shape[-1] == 3)
    if values.dtype != np.uint8 or not shaped or 0 in values.shape[1:]:
        raise InputError(
            f"images are {values.dtype} {list(values.shape)}", field=name, remedy="Give uint8 [n, H, W, 3] or [n, H, W]"
        )
    if len(given) != len(values):
        raise InputError(f"{len(given)} labels for {len(values)} images", field=name)
    return Listed(list(values), given, [f"{name}/{i}" for i in range(len(values))])


def read_class_names(names: Any, labels: Sequence[str], file: Path | None) -> dict[str, str]:
    """Label (a folder's name) -> class name, in the order of the logits.

    Args:
        names: None: the labels themselves; a mapping (labels that are whole numbers may be numbers in it), or a sequence (then
            names are labels); or a file: JSON with either of the two, or text of lines `label name` (as CoOp's list for
            ImageNet) or `name`.
        labels: those that there are.
    """
    if names is None:
        return {label: label for label in labels}
    if isinstance(names, str | Path):
        path = Path(names)
        if not path.is_file():
            raise InputError("no such file", file=path)
        try:
            text = path.read_text("utf-8-sig")
            names = json.loads(text) if path.suffix == ".json" else _lines(text, set(labels))
            if not isinstance(names, list | dict) or not all(isinstance(name, str) for name in names):
                raise ValueError("neither a list of names nor a mapping from labels to names")
        except (ValueError, RecursionError) as error:  # bad UTF-8 and bad JSON
            raise InputError(f"cannot be read ({error})", file=path) from error
        file = path
    found = {name: name for name in names}
    if isinstance(names, Mapping):
        found = {str(key) if type(key) is int else key: name for key, name in names.items()}
    if not isinstance(names, Mapping) and len(found) < len(names):
        twice = [name for name, count in Counter(names).items() if count > 1]
        remedy = "Name each label once; names that are not the labels are given as a mapping from these"
        raise InputError(f"class name {twice[0]!r} is there twice", file=file, field="class_names", remedy=remedy)
    if bad := [value for pair in found.items() for value in pair if not isinstance(value, str) or not value.strip()]:
        raise InputError(f"{bad[0]!r} is no class name", file=file, field="class_names")
    return dict(found)


def _by_label(given: Any, labels: Sequence[str]) -> dict[str, str]:
    """Label -> class name, of names that are given by label, by the label's index, or one for each index."""
    indices = [str(i) for i in range(len(labels))]
    given = {str(label): name for label, name in given.items()} if isinstance(given, Mapping) else given
    found = read_class_names(given, [*labels, *indices], None)
    if found.keys() <= set(labels):
        return found
    if found.keys() <= set(indices):
        return {labels[int(i)]: name for i, name in found.items()}
    if len(found) == len(labels) and all(label == name for label, name in found.items()):
        return dict(zip(labels, found, strict=True))
    return found


def _lines(text: str, labels: set[str]) -> dict[str, str]:
    found = dict[str, str]()
    for line in filter(None, map(str.strip, text.splitlines())):
        label, _, name = line.partition("\t") if "\t" in line else line.partition(" ")
        known = line not in labels and label in labels and name.strip()
        key, value = (label, name.strip()) if known else (line, line)
        if key in found:
            raise ValueError(f"{key!r} is there twice")
        found[key] = value
    return found


# --- tasks -------------------------------------------------------------------------------------------------------------
@dataclass
class ImageTask:
    """A task on images: its specification and its splits.

    Args:
        spec: see `ImageSpec`.
        train, validation, test: splits; each may be absent.
        listed: the images that shots were drawn from, by split.
    """

    spec: ImageSpec
    train: Split | None = None
    validation: Split | None = None
    test: Split | None = None
    listed: Mapping[str, Listed] = field(default_factory=dict)

    @classmethod
    def from_folder(
        cls,
        train: str | Path,
        backbone: DualEncoder,
        *,
        validation: str | Path | None = None,
        test: str | Path | None = None,
        class_names: Any = None,
        **options: Any,
    ) -> Self:
        """A task of folders, one for each split, each with one folder for each class.

        Args:
            class_names: see `read_class_names`; default: the names of the training folders, sorted.
            options: see `build`.
        """
        folders = {"train": train, "validation": validation, "test": test}
        found = {split: list_folder(folder) for split, folder in folders.items() if folder is not None}
        return cls.build(found, backbone, class_names=class_names, **options)

    @classmethod
    def from_files(
        cls,
        train: str | Path,
        backbone: DualEncoder,
        *,
        validation: str | Path | None = None,
        test: str | Path | None = None,
        images: str | Path | None = None,
        path: str = "path",
        label: str = "label",
        class_names: Any = None,
        **options: Any,
    ) -> Self:
        """A task of tables (CSV, TSV, JSONL, JSON, Parquet) that name images and labels; see `list_table` and `build`."""
        files = {"train": train, "validation": validation, "test": test}
        found = {split: list_table(file, images, path, label) for split, file in files.items() if file is not None}
        return cls.build(found, backbone, class_names=class_names, **options)

    @classmethod
    def from_split_file(cls, file: str | Path, images: str | Path, backbone: DualEncoder, **options: Any) -> Self:
        """A task of the CoOp family, by its split file and the folder of its images; see `list_split_file` and `build`."""
        found, names = list_split_file(file, images)
        return cls.build(found, backbone, class_names=names, by_index=True, **options)

    @classmethod
    def from_dataset(
        cls,
        train: Any,
        backbone: DualEncoder,
        *,
        validation: Any = None,
        test: Any = None,
        image: str = "image",
        label: str = "label",
        class_names: Any = None,
        **options: Any,
    ) -> Self:
        """A task of what `datasets` has saved to folders, or loaded; see `list_dataset` and `build`.

        Args:
            train: a folder, a `Dataset`, or a `DatasetDict`, of which the other splits are used as well.
            validation, test: the same, in the place of these splits; of a `DatasetDict` the split of this name, or its only
                one.
            class_names: see `read_class_names`; of a column with class names, these are the labels. They may also be given
                by index, or as one name for each index.
        """
        found, names = list_dataset(train, image, label)
        for split, source in (("validation", validation), ("test", test)):
            if source is None:
                continue
            parts, _ = list_dataset(source, image, label, alone=split)
            if split not in parts and len(parts) != 1:
                there = f"There are: {', '.join(parts) or 'none'}"
                file = source if isinstance(source, str | Path) else None
                raise InputError(f"has no split {split!r}", file=file, field=split, remedy=there)
            found[split] = parts[split] if split in parts else next(iter(parts.values()))
        if names is not None:
            class_names = names if class_names is None else _by_label(class_names, names)
        return cls.build(found, backbone, class_names=class_names, **options)

    @classmethod
    def from_arrays(
        cls,
        arrays: Mapping[str, tuple[Any, Any]],
        backbone: DualEncoder,
        *,
        class_names: Sequence[str],
        **options: Any,
    ) -> Self:
        """A task of images in memory.

        Args:
            arrays: split -> (uint8 [n, H, W, 3] or [n, H, W], class indices [n]).
            class_names: in the order of the indices.
            options: see `build`.
        """
        found = {split: list_array(images, labels, split) for split, (images, labels) in arrays.items()}
        return cls.build(found, backbone, class_names=class_names, by_index=True, **options)

    @classmethod
    def build(
        cls,
        found: Mapping[str, Listed],
        backbone: DualEncoder,
        *,
        class_names: Any = None,
        by_index: bool = False,
        templates: Sequence[str] | str = ("a photo of a {}.",),
        shots: int | None = None,
        seed: int = 0,
        augment: bool = False,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        unreadable: Unreadable = "refuse",
        metrics: tuple[str, ...] = ("accuracy",),
        test_only: bool = False,
    ) -> Self:
        """A task from listed images.

        Args:
            found: split (`train`, `validation`, `test`) -> images.
            backbone: whose preprocessing and context are used.
            class_names, by_index: see `read_class_names`; or names in the order of labels that are indices.
            templates: with {} for the class name; `TEMPLATES` has the field's.
            shots: images of each class to train on (all there are, where a class has fewer), drawn by `seed`; nested. As many
                are drawn for validation, but at most 4: of the validation split, else of training images that are left over.
            augment: train on random crops with flips (CoOp: area 0.08 to 1, bicubic) instead of one fixed view.
            crop_scale: area of such a crop.
            unreadable: what to do about images that cannot be read: refuse the task, or skip them with a warning.
            metrics: of all splits.
            test_only: make one split, to test on: `test`, or what there is in its place. Of the others only labels are read.

        Raises:
            InputError: a label is not among the classes; a class has no image; two class names are one, or one does not fit
                into the text tower; an image cannot be read.

        Warns:
            UserWarning: a class has fewer training images than shots, or none to validate on where others have some.
        """
        if unknown := found.keys() - set(SPLITS):
            raise InputError(f"unknown splits {sorted(unknown)}", remedy=f"Splits are {', '.join(SPLITS)}")
        listed = {split: part for split, part in found.items() if len(part)}
        used = [split for split in ("test", "train", "validation") if split in listed]
        used = used[:1] if test_only else used
        if unreadable == "skip":  # before anything is drawn, so that draws are full
            listed |= {split: readable(listed[split], unreadable) for split in used}
        first = next((listed[split] for split in SPLITS if split in listed), None)
        if first is None:
            raise InputError("there are no images")
        if shots is not None and "train" not in listed:
            raise InputError("there are no training images to draw from", field="shots", remedy="Leave it out")
        if by_index:
            names = list(class_names)
            keys = [str(name) for name in names]
        else:
            there = names_in(first.labels, first.file)
            mapping = read_class_names(class_names, there, first.file)
            keys, names = list(mapping), list(mapping.values())
            if not set(keys) & set(there):
                pairs = ", ".join(f'"{label}": "{name}"' for label, name in zip(there[:2], names, strict=False))
                raise InputError(
                    f"none of the labels ({_shown(there)}) is among the class names ({_shown(keys)})",
                    file=first.file,
                    field="class_names",
                    remedy=f"Names that are not the labels are given as a mapping from these: {{{pairs}, ...}}",
                )
        _distinct(names, first.file, backbone)
        templates = (templates,) if isinstance(templates, str) else tuple(templates)
        try:
            check_templates(templates)
        except ValueError as error:
            raise InputError(str(error), field="templates") from error
        for template in templates:
            backbone.tokenise([template.replace("{}", written(name)) for name in names])
        spec = ImageSpec(
            class_names=tuple(names),
            labels=None if keys == names else tuple(keys),
            templates=templates,
            preprocessing=backbone.preprocessing,
            context=backbone.context,
            tokenizer_hash=backbone.tokeniser_hash,
        )
        labels = {split: _indices(part, keys, by_index) for split, part in listed.items()}
        _complete(labels, names, first.file)
        chosen: dict[str, Sequence[int]] = {split: range(len(listed[split])) for split in used}
        if shots is not None:
            chosen |= draw(labels["train"], labels.get("validation"), names, shots, seed)
            held = labels["validation" if "validation" in listed else "train"]
            validated = {held[i] for i in chosen["validation"]} if "validation" in chosen else set(range(len(names)))
            _tell_of_few(Counter(labels["train"]), validated, names, shots)
        task = cls(spec, listed=listed)
        for split, rows in chosen.items():
            # What the training images leave over is validated on, where there is no validation split.
            origin = split if split in listed else "train"
            part, own = listed[origin].take(rows), [labels[origin][i] for i in rows]
            if unreadable == "refuse":
                readable(part, unreadable)
            crop = crop_scale if augment and split == "train" else None
            images = ImageRows(part.sources, own, spec.preprocessing, crop)
            made = Split(
                images, Stacked(crop is None), metrics, num_classes=len(names), ids=part.ids, class_names=tuple(names)
            )
            setattr(task, split, made)
        return task

    def base_to_new(self) -> tuple[Self, Self]:
        """(base, new): the first ceil(C / 2) classes in the order of labels, and the others, labelled from 0 (CoCoOp, 4.1).

        Each has its own label space, and all splits.
        """
        halves = base_to_new(range(len(self.spec.class_names)))
        return cast("tuple[Self, Self]", tuple(self.of_classes(half) for half in halves))

    def of_classes(self, classes: Sequence[int]) -> Self:
        """The task with some of its classes only, labelled from 0 in the order given; a split may have no images of these.

        Raises:
            InputError: none of the test images are of these classes.
        """
        new = {old: index for index, old in enumerate(classes)}
        names = tuple(self.spec.class_names[old] for old in classes)
        labels = self.spec.labels and tuple(self.spec.labels[old] for old in classes)
        task = type(self)(self.spec.model_copy(update={"class_names": names, "labels": labels}))
        for name in SPLITS:
            split: Split | None = getattr(self, name)
            if split is None:
                continue
            images = cast(ImageRows, split.rows)
            rows = [i for i, label in enumerate(images.labels) if label in new]
            if not rows and name == "test":
                shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
                raise InputError(f"there are no test images of {shown}", field="data.test", remedy="Add some")
            if not rows:
                continue
            kept = ImageRows(
                [images.sources[i] for i in rows],
                [new[images.labels[i]] for i in rows],
                images.preprocessing,
                images.crop_scale,
            )
            own = [split.row_ids[i] for i in rows]
            made = Split(kept, split.collate, split.metrics, num_classes=len(names), ids=own, class_names=names)
            setattr(task, name, made)
        return task

    def pixels(self, image: Source) -> Tensor:
        """What the backbone takes of one image, [3, H, W]."""
        return self.spec.preprocessing(read_image(image))

    def predict(self, method: VLMethod, images: Iterable[Source], batch_size: int = 32) -> list[dict[str, Any]]:
        """Answers of a trained method: `label`, and `scores`, the probability of every class.

        Args:
            method: with its prompt on the backbone; it is asked in eval mode and put back.
            images: files, the bytes of files, arrays or images of Pillow (see `read_image`).
            batch_size: images of a forward pass; no more of them are in memory at a time.

        Raises:
            InputError: an image cannot be read (its row and, if it is one, its file), the method answers for other classes,
                or the batch size is below 1.
        """
        if batch_size < 1:
            raise InputError(f"the batch size is {batch_size}", remedy="Use 1 or more", field="batch_size")
        if isinstance(images, str | bytes):
            raise InputError("one image in the place of a list of them", remedy="Write [image]", field="images")
        found, batch = list[dict[str, Any]](), list[Tensor]()
        for row, image in enumerate(images, start=1):
            try:
                batch.append(self.pixels(image))
            except OSError as error:
                file = image if isinstance(image, str | Path) else None
                raise InputError(f"the image cannot be read ({error})", file=file, row=row) from error
            if len(batch) == batch_size:
                found += self.answers(method, torch.stack(batch))
                batch.clear()
        return found + (self.answers(method, torch.stack(batch)) if batch else [])

    @torch.no_grad()
    def answers(self, method: VLMethod, pixels: Tensor) -> list[dict[str, Any]]:
        """What `predict` answers, of one batch of pixels [B, 3, H, W].

        Raises:
            InputError: the method answers for other classes.
        """
        names, was_training = self.spec.class_names, method.training
        if was_training:
            method.eval()
        try:
            logits = method({"pixels": pixels.to(method.backbone.device)}).logits
        finally:
            if was_training:
                method.train()
        if logits.shape[1] != len(names):
            raise InputError(f"the method answers for {logits.shape[1]} classes, the task has {len(names)}")
        told = [dict(zip(names, row, strict=True)) for row in logits.float().softmax(-1).tolist()]
        return [{"label": max(scores, key=scores.__getitem__), "scores": scores} for scores in told]


def draw(
    train: Sequence[int], validation: Sequence[int] | None, names: Sequence[str], shots: int, seed: int
) -> dict[str, list[int]]:
    """Rows for training and validation: min(shots, available) and min(shots, 4, available) of each class.

    Without a validation split its rows come from those that training leaves over, and there may be none. The draw of a class
    depends on its name, its rows and the seed alone, so 4 shots contain 2 shots, and other classes change nothing.
    """
    if shots < 1:
        raise InputError(f"{shots} shots", field="shots", remedy="Use 1 or more")
    found: dict[str, list[int]] = {"train": [], "validation": []}
    own, held = _by_class(train), _by_class(validation or [])
    for label, name in enumerate(names):
        rows, few = own[label], min(shots, 4)
        k = min(shots, len(rows))
        spare = 0 if validation is not None else min(few, len(rows) - k)
        drawn, left = few_shot_split([name] * len(rows), k, spare, seed)
        found["train"] += [rows[i] for i in drawn]
        found["validation"] += [rows[i] for i in left]
        if others := held[label]:
            drawn, _ = few_shot_split([name] * len(others), min(few, len(others)), 0, seed)
            found["validation"] += [others[i] for i in drawn]
    return {split: rows for split, rows in found.items() if rows}


def _tell_of_few(counts: Mapping[int, int], validated: set[int], names: Sequence[str], shots: int) -> None:
    """Warn of classes with fewer training images than shots, and of those that nothing is validated on."""
    few = [f"{name!r} ({counts[i]})" for i, name in enumerate(names) if counts[i] < shots]
    absent = [repr(name) for i, name in enumerate(names) if i not in validated]
    what = ("have fewer training images", few), ("have no images to validate on", absent)
    told = [
        f"{len(which)} of {len(names)} classes {kind}: {', '.join(which[:5])}{', ...' * (len(which) > 5)}"
        for kind, which in what
        if which
    ]
    if told:
        warnings.warn(f"with {shots} shots {'; '.join(told)}", UserWarning, stacklevel=4)


def _by_class(labels: Sequence[int]) -> dict[int, list[int]]:
    rows: dict[int, list[int]] = defaultdict(list)
    for row, label in enumerate(labels):
        rows[label].append(row)
    return rows


def _indices(listed: Listed, keys: Sequence[str], by_index: bool) -> list[int]:
    """Class indices of a split's labels."""
    if not by_index and listed.folders:
        index = {key: i for i, key in enumerate(keys)}
        for row, label in enumerate(listed.labels):
            if label not in index:
                problem, remedy = unknown_label(label, keys)
                raise InputError(problem, remedy=remedy, **listed.where(row))
        return [index[str(label)] for label in listed.labels]
    if not by_index:
        return encode_labels([str(label) for label in listed.labels], keys, listed.file)
    for row, label in enumerate(listed.labels, start=1):
        if not isinstance(label, int | np.integer) or isinstance(label, bool) or not 0 <= label < len(keys):
            raise InputError(
                f"label {label!r} is no class",
                remedy=f"Labels go from 0 to {len(keys) - 1}",
                file=listed.file,
                row=row,
                field="label",
            )
    return [int(label) for label in listed.labels]


def _shown(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "")


def _distinct(names: Sequence[str], file: Path | None, backbone: DualEncoder) -> None:
    """Refuse two classes of one name.

    Lists of the field have such pairs (CLIP's for ImageNet: missile, sunglasses). Results on them as they are, with these
    classes counted as wrong, cannot be had here.
    """
    if (two := alike(names, lambda name: tuple(backbone.plain_ids(written(name))))) is not None:
        raise InputError(
            f"class names {two[0]!r} and {two[1]!r} are one",
            file=file,
            field="class_names",
            remedy="Tell them apart, as in 'sunglasses' and 'dark glasses', or leave one of the two classes out",
        )


def _complete(labels: Mapping[str, Sequence[int]], names: Sequence[str], file: Path | None) -> None:
    """Refuse classes that no image to train on (or, without training, to test on) is of."""
    split = next(name for name in SPLITS if name in labels)
    if absent := sorted(set(range(len(names))) - set(labels[split])):
        shown = ", ".join(repr(names[i]) for i in absent[:5]) + (", ..." if len(absent) > 5 else "")
        raise InputError(
            f"{len(absent)} class(es) without images in {split}: {shown}",
            file=file,
            field="class_names",
            remedy="Add images, or leave the classes out",
        )
