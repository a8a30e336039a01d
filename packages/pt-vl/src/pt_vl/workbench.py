"""What the command line does for images and text: recipes to jobs, artifacts to predictions."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

import numpy as np
import torch
from accelerate.utils import send_to_device
from pydantic import Field, field_validator, model_validator
from safetensors.torch import load_file
from torch import Tensor

from pt_core import artifacts, doctor, recipe, registry
from pt_core.data import Split
from pt_core.errors import InputError
from pt_core.evaluation import evaluate
from pt_core.frozen import fingerprint
from pt_core.method import MethodConfig
from pt_core.metrics import harmonic_mean
from pt_core.plan import FitConfig
from pt_core.runs import Job
from pt_core.settings import Settings
from pt_vl.backbones import DualEncoder, load_backbone
from pt_vl.data import (
    TEMPLATES,
    ImageSpec,
    ImageTask,
    Listed,
    Unreadable,
    in_short,
    is_dataset,
    is_split_file,
    list_dataset,
    list_folder,
    list_images,
    list_split_file,
    list_table,
    readable,
)
from pt_vl.icons import IconChoice
from pt_vl.images import Cell, ImageRows, Source, ahead
from pt_vl.method import Stacked, VLMethod, autocast_dtype, cache_features, check_templates, written
from pt_vl.methods.mvlpt import MVLPT
from pt_vl.preprocessing import Preprocessing

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class VLBackbone(Settings):
    """Which frozen model."""

    name: str = Field(
        description="hub id or folder of a CLIP or SigLIP model, zoo:mini-clip, or open-clip:MODEL[/PRETRAINED]"
    )
    revision: str | None = Field(None, description="commit or tag on the hub; pin it")
    dtype: Literal["fast", "float32", "bfloat16", "float16"] = Field(
        "float32", description="fast: what `pt doctor` advises here"
    )

    def load(self) -> DualEncoder:
        dtype = doctor.fast_dtype(doctor.fast_device()) if self.dtype == "fast" else DTYPES[self.dtype]
        return load_backbone(self.name, self.revision, dtype)


def _at_home(value: Any) -> Any:
    """A path with the home folder in the place of ~, which no shell has expanded in `--set key=~/...`."""
    return os.path.expanduser(value) if isinstance(value, str) else value


def _existing(value: str | None) -> str | None:
    value = _at_home(value)
    if value is not None and not Path(value).exists():
        raise ValueError("no such file or folder")
    return value


class Images(Settings):
    """Where images lie: a folder with a folder for each class, a table of paths and labels, a split file of the CoOp family,
    a folder of `datasets`, or the icons that ship with this package."""

    train: str | None = Field(
        None,
        description="folder, table (CSV, TSV, JSON, JSONL, Parquet), or folder of datasets, of which other splits are used "
        "as well unless they are given",
    )
    validation: str | None = None
    test: str | None = None
    split_file: str | None = Field(
        None, description="split_zhou_*.json of the CoOp family, in place of the three above"
    )
    icons: IconChoice | None = Field(None, description="icons of the package, in place of the four above")
    images: str | None = Field(None, description="folder that the paths of a table or split file are relative to")
    path: str = Field("path", description="column of a table")
    image: str = Field("image", description="column of datasets")
    label: str = Field("label", description="column of a table, or of datasets")
    class_names: str | dict[str | int, str] | tuple[str, ...] | None = Field(
        None,
        description="file, list, or mapping from labels to names; default: folder names, the labels of the table, or those of "
        "datasets",
    )
    templates: str | tuple[str, ...] | None = Field(
        None,
        description=f"with {{}} for the class name; or a name: {', '.join(TEMPLATES)}. Default, of a target or a task: those "
        "of the data that it belongs to. A method with `templates` of its own keeps these",
    )

    _exists = field_validator("train", "validation", "test", "split_file", "images")(_existing)
    _expanded = field_validator("class_names")(_at_home)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.split_file is not None and (self.train or self.validation or self.test):
            raise ValueError("give a split file or train, validation and test, not both")
        if self.split_file is not None and self.images is None:
            raise ValueError("a split file needs `images`, the folder of its paths")
        if self.icons is not None and (self.split_file or self.train or self.validation or self.test):
            raise ValueError("give icons or files of your own, not both")
        if not (self.split_file or self.train or self.test or self.icons):
            raise ValueError("give train, test, split_file or icons")
        if self.class_names is not None and (self.split_file or self.icons):
            raise ValueError("a split file and icons have class names of their own: leave class_names out")
        return self

    @field_validator("templates")
    @classmethod
    def _known(cls, value: str | tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is None:
            return None
        found = TEMPLATES.get(value, (value,)) if isinstance(value, str) else value
        if not found:
            raise ValueError("give at least one template")
        try:
            check_templates(found)
        except ValueError as error:
            raise ValueError(f"{error}, or is one of {', '.join(TEMPLATES)}") from error
        return found

    def task(self, backbone: DualEncoder, **options: Any) -> ImageTask:
        """The task of these images; see `ImageTask.build` for the options."""
        if self.icons is not None:
            return self.icons.task(backbone, **options)
        if self.split_file is not None:
            return ImageTask.from_split_file(self.split_file, str(self.images), backbone, **options)
        first = self.train or self.test
        rest: dict[str, Any] = {"validation": self.validation, "test": self.test}
        options |= {"class_names": self.class_names}
        path = Path(str(first))
        if is_dataset(path):
            return ImageTask.from_dataset(path, backbone, image=self.image, label=self.label, **rest, **options)
        rest |= {} if self.train else {"test": None}  # these are the first already
        if path.is_file():
            options |= {"images": self.images, "path": self.path, "label": self.label}
            return ImageTask.from_files(path, backbone, **rest, **options)
        return ImageTask.from_folder(path, backbone, **rest, **options)


class VLData(Images):
    """Which images, how they become a task, and what is asked of a trained prompt."""

    templates: str | tuple[str, ...] = Field(
        ("a photo of a {}.",), description=f"with {{}} for the class name; or a name: {', '.join(TEMPLATES)}"
    )
    shots: int | None = Field(16, ge=1, description="images of each class; None takes all")
    augment: bool = Field(False, description="random crops and flips (published); False: fixed views, computed once")
    crop_scale: tuple[float, float] = (0.08, 1.0)
    unreadable: Unreadable = "refuse"
    protocol: Literal["few-shot", "base-to-new"] = Field(
        "few-shot", description="base-to-new: trained on the first half of the classes, tested on both by themselves"
    )
    targets: dict[str, Images] = Field(
        {}, description="other data that the trained prompt is tested on: data sets (own classes) or domains (the same)"
    )
    tasks: dict[str, Images] = Field(
        {}, description="data sets, each with its own classes, that `pt transfer` trains on and transfers between"
    )

    @field_validator("targets")
    @classmethod
    def _names_of_results(cls, targets: dict[str, Images]) -> dict[str, Images]:
        for name in ("base", "new", "harmonic-mean", "others"):
            if name in targets:
                raise ValueError(f"{name!r} is what a result of the protocols is called: give the target another name")
        return targets

    @field_validator("crop_scale")
    @classmethod
    def _within_the_image(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1] <= 1:
            raise ValueError("give the least and the most of a crop's share of the image: 0 < least <= most <= 1")
        return value

    @property
    def only_tasks(self) -> bool:
        """Whether there are no images beside those of the tasks."""
        return bool(self.tasks) and not (self.train or self.test or self.split_file or self.icons)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        return self if self.only_tasks else super()._one_source()  # type: ignore[operator]


class Recipe(recipe.Recipe):
    """A recipe for images and text."""

    package = "vl"
    told_elsewhere: ClassVar[Mapping[str, str]] = {
        "class_names": "the data say them: data.class_names",
        "tasks": "the data say them: data.class_names of each of data.tasks",
        "cache_size": "the data say it: data.shots of each class",
    }

    backbone: VLBackbone
    data: VLData

    def config(self, section: str = "method", **known: Any) -> MethodConfig:
        # What the data tell is not known yet when a recipe is checked: stand-ins take its place.
        names = ("first class", "second class")
        stand_ins: dict[str, Any] = {"class_names": names, "cache_size": 2, "tasks": {"all": names}}
        config, cls = super().config(section, **(stand_ins | known)), registry.find_method("vl", self.method.name)
        if "templates" in (self.method.model_extra or {}) and not cast(type[VLMethod], cls).reads_templates(config):
            raise InputError(
                f"{self.method.name} reads no templates, so they have no effect",
                field=f"{section}.templates",
                remedy="Leave them out",
            )
        return config


class Bench:
    """Backbone and images of a recipe, loaded once and used by all its runs."""

    folder: Path | None = None  # output folder of the runs, which keeps the features of a frozen image tower

    def __init__(self, checked: Recipe) -> None:
        self.recipe, self.backbone = checked, checked.backbone.load()
        self._tasks: dict[tuple[str | None, int], ImageTask] = {}
        self._listed: dict[str | None, str] = {}
        self._halves: dict[int, tuple[ImageTask, ImageTask]] = {}
        self._featured: dict[int, tuple[Split, Split]] = {}
        self._targets: dict[str, ImageTask] | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What backbone and data are, as JSON; weights and images (ids, classes, files) by their hashes.

        The images are all that are there to draw shots from: other seeds draw others.
        """
        data, seed = self.recipe.data, self.recipe.seed
        known = {"weights": fingerprint(self.backbone, full=False, config=True)}
        known["images"] = _hash({}) if data.only_tasks else self._hash_of(seed)
        if data.tasks:
            known["tasks"] = _hash({name: self._hash_of(seed, name) for name in data.tasks})
        if data.targets:
            known["targets"] = _hash({name: _rows(target) for name, target in self.targets().items()})
        return self.recipe.model_dump(mode="json", include={"backbone", "data"}) | known

    def task(self, seed: int, name: str | None = None) -> ImageTask:
        """The recipe's own task, or the one of this name among its `tasks`; the seed draws the shots."""
        if (name, seed) not in self._tasks:
            data = self.recipe.data
            if name is None and data.only_tasks:
                raise InputError("there are no images to train on beside those of the tasks", field="data.train")
            images = data if name is None else data.tasks[name]
            if images.test and not images.train:
                where = "data" if name is None else f"data.tasks.{name}"
                raise InputError("there are no images to train on", field=f"{where}.train")
            options = data.model_dump(include={"shots", "augment", "crop_scale", "unreadable"})
            options |= {"seed": seed, "templates": images.templates or data.templates}
            try:
                self._tasks[name, seed] = images.task(self.backbone, **options)
            except InputError as error:
                if name is None:
                    raise
                raise InputError(f"task {name!r}: {error}") from error
            if name not in self._listed:
                self._listed[name] = _hash(_rows(self._tasks[name, seed]))
            self._tasks[name, seed].listed = {}  # it may hold the bytes of all images
        return self._tasks[name, seed]

    def _hash_of(self, seed: int, name: str | None = None) -> str:
        """Of the images that a task is drawn from."""
        self.task(seed, name)
        return self._listed[name]

    def targets(self) -> dict[str, ImageTask]:
        if self._targets is None:
            data = self.recipe.data
            self._targets = {}
            for name, images in data.targets.items():
                options = {"templates": images.templates or data.templates, "unreadable": data.unreadable}
                self._targets[name] = images.task(self.backbone, test_only=True, **options)
        return self._targets

    def job(self, label: str, seed: int) -> tuple[Job, FitConfig]:
        """The run of one method with one seed.

        Raises:
            InputError: there are no images of its own to train on, or, where halves or targets are tested, to test on; there
                are fewer than four classes to halve.
        """
        chosen, data = self.recipe.with_method(label), self.recipe.data
        task, others = self.task(seed), dict[str, tuple[Sequence[str], Split]]()
        halved = data.protocol == "base-to-new"
        if task.test is None and (halved or data.targets):
            what = "halves of the classes" if halved else "targets"
            raise InputError(f"{what} are tested beside images of its own, and there are none", field="data.test")
        if halved:
            if (count := len(task.spec.class_names)) < 4:
                remedy = "base-to-new needs two classes in each half"
                raise InputError(f"there are {count} classes", field="data.protocol", remedy=remedy)
            if seed not in self._halves:
                self._halves[seed] = task.base_to_new()
            task, new = self._halves[seed]
            assert new.test is not None
            others["new"] = (new.spec.class_names, new.test)
        for name, target in self.targets().items():
            split = target.test or target.train or target.validation  # its only one
            assert split is not None
            others[name] = (target.spec.class_names, split)
        method, test = self._method(chosen, task, seed), None
        if task.test is not None:
            seen = {name: (classes, self._seen(method, split)) for name, (classes, split) in others.items()}
            own = "templates" in (chosen.method.model_extra or {})  # those of the method stand above those of data
            templates = {name: t for name, images in data.targets.items() if (t := images.templates) and not own}
            test = tested(self._seen(method, task.test), seen, data.protocol, templates)
        return self._job(method, task, test), chosen.training.model_copy(update={"seed": seed})

    @property
    def task_names(self) -> list[str]:
        """The tasks of the recipe, by name."""
        return list(self.recipe.data.tasks)

    def transfer_job(self, label: str, seed: int, task: str, source: Path | None = None) -> tuple[Job, FitConfig]:
        """The run of a method on one of the tasks, from its start values or from another task's prompt.

        MVLPT takes its single-task form (CoOp, deep VPT or UPT, as its `prompt` says).

        Args:
            label: of the method.
            seed: draws shots and start values.
            task: a name among the tasks.
            source: safetensors file of a `trained_state`; None: start values.

        Raises:
            InputError: what the method trains is bound to its classes, or it trains nothing; a task lacks images to train on
                or to test on; the tensors of the source are of another form.
        """
        chosen, images = self.recipe.with_method(label), self.task(seed, task)
        if images.test is None:
            raise InputError("there are no images to test on", field=f"data.tasks.{task}.test")
        method = self._method(chosen, images, seed)
        if isinstance(method, MVLPT):
            method = method.for_target(images.spec.class_names)
        if method.class_bound or not method.trains:
            why = "belongs to the classes that it was trained on" if method.trains else "is nothing"
            raise InputError(
                f"what {label} trains {why}: no other task can start from it",
                field="method",
                remedy="Choose a prompt that classes share, such as coop, vpt, upt, maple or mvlpt",
            )
        if source is not None:
            method.load_trained_state(load_file(source))
        test = self._seen(method, images.test)
        return self._job(method, images, test), chosen.training.model_copy(update={"seed": seed})

    def _method(self, chosen: Recipe, task: ImageTask, seed: int) -> VLMethod:
        """The recipe's method on the classes of a task."""
        if task.train is None:
            raise InputError("there are no images to train on", field="data.train")
        names = task.spec.class_names
        known: dict[str, Any] = {"class_names": names, "templates": task.spec.templates, "seed": seed}
        known |= {"cache_size": len(task.train), "tasks": {"all": names}}
        method = registry.find_method("vl", chosen.method.name)(self.backbone, chosen.config(**known))
        assert isinstance(method, VLMethod)
        return method

    def _seen(self, method: VLMethod, split: Split) -> Split:
        """What a method sees of a split: where its image tower is the frozen one and views are fixed, features, computed once
        for all runs, and for all processes that share an output folder."""
        if method.trains_image or not getattr(split.collate, "fixed", False):
            return split
        if id(split) not in self._featured:
            kept = None if self.folder is None else self.folder / "features"
            rows = _Featured(split, self.backbone, self.recipe.training.eval_batch_size, kept)
            self._featured[id(split)] = split, replace(split, rows=rows)
        return self._featured[id(split)][1]

    def _job(self, method: VLMethod, task: ImageTask, test: Split | None) -> Job:
        source = self.recipe.backbone
        # A path stays on this machine; what open_clip loads says itself whether its name leads back to it.
        unnamed = Path(source.name).is_dir() or source.name.startswith("open-clip:")
        assert task.train is not None
        return Job(
            method,
            self._seen(method, task.train),
            None if task.validation is None else self._seen(method, task.validation),
            test,
            task=task.spec.model_dump(mode="json"),
            backbone_name=None if unnamed else source.name,
            revision=source.revision,
        )


def tested(
    own: Split,
    others: Mapping[str, tuple[Sequence[str], Split]],
    protocol: str = "few-shot",
    templates: Mapping[str, Sequence[str]] | None = None,
) -> Split:
    """A test split that also tests the prompt on other classes or domains.

    Args:
        own: its own test images.
        others: name -> (class names, images).
        protocol: of the recipe.
        templates: name -> templates, of those that have their own. What belongs to its own classes keeps its own templates.

    Metrics: `accuracy` on the own test images, `accuracy/<name>` on each of the others, with the classes that they have, and
    the others' mean, `accuracy/others`. With base-to-new: `base`, `new`, `harmonic-mean`. Of a domain with some of the own
    classes the logits of these are compared. What a method has no answer for, because what it trained belongs to its own
    classes, is left out.
    """
    if not others:
        return own

    def score(method: VLMethod, split: Split, batch_size: int) -> dict[str, float]:
        plain = {"accuracy": evaluate(method, own, batch_size)["accuracy"]}
        for name, (classes, images) in others.items():
            mine = [written(c) for c in method.config.class_names]
            told = tuple((templates or {}).get(name, method.config.templates))
            same = told == method.config.templates or method.class_bound
            if same and {written(c) for c in classes} <= set(mine):
                columns = [mine.index(written(c)) for c in classes]
                plain[f"accuracy/{name}"] = accuracy_among(method, images, columns, batch_size)
            elif not method.class_bound:
                plain[f"accuracy/{name}"] = evaluate(method.with_classes(classes, told), images, batch_size)["accuracy"]
        if protocol == "base-to-new":
            base, new = plain.pop("accuracy"), plain.pop("accuracy/new", None)
            halves = (
                {"base": base} if new is None else {"base": base, "new": new, "harmonic-mean": harmonic_mean(base, new)}
            )
            return halves | plain
        rest = [value for name, value in plain.items() if name != "accuracy"]
        return plain | ({"accuracy/others": sum(rest) / len(rest)} if len(rest) > 1 else {})

    return Split(own.rows, own.collate, num_classes=own.num_classes, ids=own.ids, scorer=score)


@torch.no_grad()
def accuracy_among(method: VLMethod, split: Split, columns: Sequence[int], batch_size: int) -> float:
    """Accuracy when only some of the method's classes are compared; labels of `split` count within `columns`.

    The method is in eval mode, as everywhere within `evaluate`.
    """
    hits = []
    for batch in split.batches(batch_size):
        logits = method(send_to_device(batch, method.backbone.device)).logits[:, list(columns)]
        hits.append((logits.argmax(1).cpu() == batch["labels"].cpu()).float())
    return float(torch.cat(hits).mean())


class _Featured(Sequence[dict[str, Any]]):
    """The rows of `cache_features`, computed when the first one is read; those of each dtype of autocast by themselves."""

    def __init__(self, split: Split, backbone: DualEncoder, batch_size: int, folder: Path | None) -> None:
        self.split, self.backbone, self.batch_size, self.folder = split, backbone, batch_size, folder
        self._rows: dict[torch.dtype | None, Sequence[Any]] = {}

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    @property
    def rows(self) -> Sequence[Any]:
        dtype = autocast_dtype(self.backbone.device)
        if dtype not in self._rows:
            self._rows[dtype] = cache_features(self.split, self.backbone, self.batch_size, self.folder).rows
        return self._rows[dtype]


class Reading(Settings):
    """How the data of `pt eval` and `pt predict` are read, beside the columns: what a recipe says under `data`."""

    images: str | None = Field(
        None, description="folder that the paths of a table or split file are relative to; default: the file's"
    )
    image: str = Field("image", description="column of datasets")
    split: Literal["train", "validation", "test"] | None = Field(
        None, description="of a split file or of datasets; default: test, or the only one"
    )

    _exists = field_validator("images")(_existing)


class Session:
    """A trained prompt on its backbone."""

    reading = Reading

    def __init__(self, method: VLMethod, spec: ImageSpec) -> None:
        self.method, self.spec = method, spec

    def inputs(self, file: Path, text: str = "text", reading: Reading = Reading()) -> list[tuple[str, Source]]:
        """The images of a table, a split file, what `datasets` has saved, or a folder and those below it: the path as it stands
        there (or split and row), and the image.

        Args:
            text: column of the paths of a table; in the place of "text" there may be "path".
            reading: where they lie, and which split.
        """
        if file.is_dir() and not is_dataset(file):
            return [(name, file / name) for name in list_images(file)]
        listed = _listed(file, reading, text)
        return list(zip(listed.ids, listed.sources, strict=True))

    def predict(self, inputs: Sequence[str | tuple[str, Source]]) -> list[dict[str, Any]]:
        """The class of each image file, of those of each folder, or of what `inputs` gives, and all classes' probabilities.

        Raises:
            InputError: as `stream` does.
        """
        return list(self.stream(inputs))

    def stream(self, inputs: Sequence[str | tuple[str, Source]], batch_size: int = 32) -> Iterator[dict[str, Any]]:
        """The answers of `predict`, a batch at a time.

        Raises:
            InputError: a folder has no images, before the first answer; images cannot be read, behind the last one: how many,
                which, and why.
        """
        named, bad = list[tuple[str, Source]](), list[str]()
        for given in inputs:
            if isinstance(given, str) and Path(given).is_dir():
                named += [(str(Path(given) / name), Path(given) / name) for name in list_images(given)]
            else:
                named.append((given, Path(given)) if isinstance(given, str) else given)
        task = ImageTask(self.spec)

        def read(source: Source) -> Tensor | OSError:
            try:
                return task.pixels(source)
            except OSError as error:
                return error

        for start in range(0, len(named), batch_size):
            part, names, pixels = named[start : start + batch_size], list[str](), list[Tensor]()
            for (name, _), found in zip(part, ahead(read, [source for _, source in part]), strict=True):
                if isinstance(found, OSError):
                    bad.append(f"{name} ({in_short(found)})")
                else:
                    names.append(name)
                    pixels.append(found)
            answers = task.answers(self.method, torch.stack(pixels)) if pixels else []
            for name, answer in zip(names, answers, strict=True):
                shown = {label: round(score, 4) for label, score in answer["scores"].items()}
                yield {"image": name, "label": answer["label"], "scores": shown}
        if bad:
            problem = f"{len(bad)} of {len(named)} images cannot be read: {', '.join(bad)}"
            raise InputError(problem, remedy="Mend or remove them")

    def evaluate(
        self, file: Path, text: str = "text", label: str = "label", reading: Reading = Reading()
    ) -> dict[str, float]:
        """Metrics on whatever a recipe reads: a table of images and labels, a folder with a folder for each class, a split
        file, or what `datasets` has saved.

        Labels are class names, or what the training data had in their place. Columns: see `inputs`.
        """
        listed, spec = _listed(file, reading, text, label), self.spec
        kinds = [{name: i for i, name in enumerate(names)} for names in (spec.labels, spec.class_names) if names]
        index = min(kinds, key=lambda known: sum(str(y) not in known for y in listed.labels))
        for row, given in enumerate(listed.labels):
            if str(given) not in index:
                problem, remedy = f"{str(given)!r} is no class of the prompt", f"Classes: {', '.join(index)}"
                raise InputError(problem, remedy=remedy, **listed.where(row, label))
        listed = readable(listed, "refuse")
        rows = ImageRows(listed.sources, [index[str(y)] for y in listed.labels], spec.preprocessing)
        split = Split(rows, Stacked(), ("accuracy", "macro-f1"), num_classes=len(index), ids=listed.ids)
        return evaluate(self.method, split)


def open_artifact(artifact: artifacts.Artifact, backbone: str | None = None) -> Session:
    """Load the backbone of an artifact (its own, unless another is named) in its dtype and put the prompt on it.

    Raises:
        InputError: the artifact was saved without its task, or with the class names of another, or its backbone cannot be
            loaded.
    """
    config = artifact.config
    names = {"class_names": config.method_config.get("class_names")}
    spec, name = recipe.opened(artifact, ImageSpec, backbone, names)
    if names["class_names"] and config.method != MVLPT.name:
        recipe.check_head(artifact, len(spec.class_names), len(names["class_names"]))
    dtype = DTYPES.get(config.backbone.dtype, torch.float32)
    try:
        encoder = load_backbone(name, None if backbone else config.backbone.revision, dtype)
    except InputError as error:
        if backbone:
            raise
        raise InputError(str(error), file=artifact.folder, remedy="Name its backbone: --backbone") from error
    if encoder.preprocessing != spec.preprocessing:
        encoder.preprocessing = Preprocessing.model_validate(spec.preprocessing)
    method = artifacts.load(artifact.folder, encoder).place(doctor.fast_device())
    assert isinstance(method, VLMethod)
    if isinstance(method, MVLPT) and len(method.columns) != len(spec.class_names):
        raise InputError(
            f"the prompt answers for the {len(method.columns)} classes of its tasks, some of which are there twice",
            file=artifact.folder,
            remedy="Save what `for_target` makes of it for the classes of one task",
        )
    for place, (told, own) in enumerate(zip(spec.class_names, method.column_names, strict=True), start=1):
        if written(told) != written(own):  # answers would be misnamed
            raise InputError(
                f"class {place} of the task is {told!r}, that of the prompt {own!r}",
                file=artifact.folder / artifacts.CONFIG,
                field="task.class_names",
                remedy="Save the prompt with the task that it was trained on",
            )
    return Session(method, spec)


def demo(folder: Path, seeds: int | None, shots: int | None, data: Path | None) -> None:
    """`pt demo vl`; see `pt_vl.demo`."""
    from pt_vl import demo as shown

    shown.run(folder, seeds or 3, shots or 4, data)


def _hash(ids: Any) -> str:
    return hashlib.sha256(json.dumps(ids, sort_keys=True, default=str).encode()).hexdigest()


def _rows(task: ImageTask) -> dict[str, Any]:
    """Id, label and image of all that is there to be drawn from, by whatever seed, and what the labels are called."""
    known = task.spec.model_dump(include={"class_names", "labels"})
    for split, part in task.listed.items():
        known[split] = list(zip(part.ids, part.labels, map(_state, part.sources), strict=True))
    return known


def _state(source: Source) -> Any:
    """Size and time of a file, or the hash of an image in memory or of `datasets`."""
    source = source.read() if isinstance(source, Cell) else source
    if isinstance(source, str | Path):
        known = Path(source).stat()
        return known.st_size, known.st_mtime_ns
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    source = np.asarray(source)
    return source.shape, hashlib.sha256(source.tobytes()).hexdigest()


def _listed(file: Path, reading: Reading, text: str, label: str | None = None) -> Listed:
    """The images of a folder, a table, a split file, or of what `datasets` has saved; labels as class names where it has any.

    Raises:
        InputError: as `list_folder`, `list_table`, `list_split_file` and `list_dataset` do; a table has no column `text` (nor
            "path", where it is "text"); the split is not there, or there are several.
    """
    if is_dataset(file):
        return _one_split(list_dataset(file, reading.image, label, alone="test")[0], reading.split, file)
    if file.is_dir():
        return list_folder(file)
    if is_split_file(file):
        found, names = list_split_file(file, reading.images or file.parent)
        listed = _one_split(found, reading.split, file)
        listed.labels = [names[int(index)] for index in listed.labels]
        return listed
    missing = ""
    for column in (text, "path") if text == "text" else (text,):
        try:
            return list_table(file, reading.images, path=column, label=label or column)
        except InputError as error:
            if f"field {column!r}: no such column" not in str(error):
                raise
            missing = missing or str(error)
    raise InputError(missing, remedy="Name the column of the image paths: --text")


def _one_split(found: Mapping[str, Listed], split: str | None, file: Path) -> Listed:
    there = {name: part for name, part in found.items() if len(part)}
    name = split or ("test" if "test" in there else next(iter(there), "test") if len(there) < 2 else "")
    if name not in there:
        problem = f"has no split {name!r}" if name else "has several splits, and none is test"
        shown = f"There are: {', '.join(there) or 'none'}. Name one: --set split=..."
        raise InputError(problem, file=file, field="split", remedy=shown)
    return there[name]
