"""What the command line does for text: recipes to jobs, artifacts to predictions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator
from torch import nn

from pt_core import artifacts, doctor, frozen, metrics, recipe, registry
from pt_core.errors import InputError
from pt_core.evaluation import evaluate
from pt_core.method import Method, MethodConfig
from pt_core.plan import FitConfig
from pt_core.runs import Job
from pt_core.settings import Settings
from pt_nlp import assets, interop
from pt_nlp.backbones import load_backbone
from pt_nlp.constrained import label_ids
from pt_nlp.data import (
    METRICS,
    SCORED_AS,
    Kind,
    TaskSpec,
    TextTask,
    check_columns,
    check_rows,
    check_template,
    plan,
    read_rows,
    template_fields,
)

BACKBONE_ASSETS = {"asset:smollm2": assets.smollm2, "asset:minilm": assets.minilm}
DATA_ASSETS: dict[str, Callable[[], Sequence[Mapping[str, Any]]]] = {
    "asset:bbc-news": assets.bbc_news,
    "asset:bbc-records": assets.bbc_records,
    "asset:naics": assets.naics_sectors,
    "asset:isic": assets.isic_sections,
}
NO_CONTENT = ("N/A", "[MASK]", "")  # Zhao et al. 2021, for `calibrate: content-free`


class TextBackbone(Settings):
    """Which frozen model."""

    name: str = Field(
        description=f"hub id, folder, or one of {', '.join(BACKBONE_ASSETS)} (inside a published package)"
    )
    kind: Literal["causal-lm", "encoder", "seq2seq"] = "causal-lm"
    revision: str | None = Field(None, description="commit or tag on the hub; pin it")
    dtype: Literal["fast", "auto", "float32", "bfloat16", "float16"] = Field(
        "fast", description="fast: what `pt doctor` advises here"
    )
    device_map: str | None = Field(None, description="spread over devices, as in from_pretrained")

    @field_validator("name")
    @classmethod
    def _asset(cls, value: str) -> str:
        return _known(value, BACKBONE_ASSETS)

    def load(self) -> tuple[nn.Module, Any]:
        """The model in eval mode and its tokenizer."""
        name = BACKBONE_ASSETS[self.name]() if self.name in BACKBONE_ASSETS else self.name
        dtype = doctor.fast_dtype(doctor.fast_device()) if self.dtype == "fast" else self.dtype
        options = {"device_map": self.device_map} if self.device_map else {}
        return load_backbone(name, self.kind, revision=self.revision, dtype=dtype, **options)


class TextData(Settings):
    """Which rows, and how text becomes a task. What is not here has the defaults of `pt_nlp.data.TaskSpec`."""

    train: str = Field(
        description=f"file (JSONL, CSV, TSV, Parquet), folder of `datasets`, or {', '.join(DATA_ASSETS)}"
    )
    validation: str | None = None
    test: str | None = Field(None, description="default: rows of `train` that no split uses, where shots are drawn")
    text: str = "text"
    label: str = Field("label", validate_default=True)
    kind: Kind = "verbalizer"
    shots: int | None = Field(None, ge=1, description="training rows per class; None takes all")
    validation_shots: int = Field(0, ge=0, description="rows of `train` per class that validate instead")
    max_test_rows: int | None = Field(None, ge=1)
    template: str = "{text}"
    verbalizer: dict[str, str] = Field({})
    target_prefix: str | None = None
    objective: Literal["tokens", "classes"] = "tokens"
    length_normalised: bool = False
    max_source_length: int = Field(256, ge=1)
    max_target_length: int = Field(64, ge=1)
    metrics: tuple[str, ...] = ()

    @field_validator("train", "validation", "test")
    @classmethod
    def _exists(cls, value: str | None) -> str | None:
        if value is not None and not _known(value, DATA_ASSETS).startswith("asset:") and not Path(value).exists():
            raise ValueError("no such file")
        return value

    @field_validator("label")
    @classmethod
    def _is_not_read(cls, value: str, info: ValidationInfo) -> str:
        check_columns(info.data.get("text", "text"), value)
        return value

    @field_validator("template")
    @classmethod
    def _reads_text(cls, value: str, info: ValidationInfo) -> str:
        check_template(value, info.data.get("label", "label"))
        return value

    @field_validator("metrics")
    @classmethod
    def _scored(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if "kind" in info.data:  # it is not where the kind itself was refused
            known = metrics.METRICS[SCORED_AS[info.data["kind"]]]
            if unknown := [name for name in value if name not in known]:
                raise ValueError(f"no metric {unknown[0]!r} for {info.data['kind']}; there are {', '.join(known)}")
        return value

    @model_validator(mode="after")
    def _one_validation(self) -> Self:
        if self.validation is not None and self.validation_shots:
            raise ValueError("give a validation file or validation_shots, not both")
        return self

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        unread = () if self.kind == "verbalizer" else ("objective", "length_normalised")
        for name in (*unread, "verbalizer") if self.kind == "text-to-text" else unread:
            if name in self.model_fields_set:
                raise ValueError(f"{name} has no effect with kind: {self.kind}; leave it out")
        return self

    @property
    def files(self) -> dict[str, str]:
        """Where the rows of each split come from that is named."""
        named = {"train": self.train, "validation": self.validation, "test": self.test}
        return {split: source for split, source in named.items() if source is not None}

    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """All rows of every split that is named, checked."""
        fields = template_fields(self.template) | {"text": self.text, "label": self.label}
        rows = {
            split: [dict(row) for row in DATA_ASSETS[source]()] if source in DATA_ASSETS else read_rows(source, fields)
            for split, source in self.files.items()
        }
        check_rows(rows, self.kind, self.template, files=self.files)
        return rows

    def check(self, rows: Mapping[str, Sequence[Mapping[str, Any]]], backbone: str, seed: int) -> None:
        """Refuse what cannot become a task, before a model is loaded for it: see `task`."""
        plan(rows, backbone=backbone, files=self.files, test_on_rest=True, seed=seed, **self._options())

    def task(
        self, rows: Mapping[str, Sequence[Mapping[str, Any]]], tokenizer: Any, backbone: str, seed: int
    ) -> TextTask:
        """The task of one seed, which draws the shots and, where no test rows are named, those of what the shots leave."""
        return TextTask.from_rows(
            rows,
            tokenizer,
            backbone=backbone,
            files=self.files,
            test_on_rest=True,
            seed=seed,
            **self._options(),
        )

    def _options(self) -> dict[str, Any]:
        return self.model_dump(include=set(TaskSpec.model_fields) | {"shots", "validation_shots", "max_test_rows"})


class Recipe(recipe.Recipe):
    """A recipe for text."""

    package = "nlp"
    told_elsewhere: ClassVar[Mapping[str, str]] = {
        "num_labels": "the data say it: data.kind and its labels",
        "multilabel": "the data say it: data.kind",
        "label_tokens": "the data say them: data.verbalizer",
        "end_id": "the tokenizer says it",
        "pad_id": "the tokenizer says it",
    }

    backbone: TextBackbone
    data: TextData

    @model_validator(mode="after")
    def _readable(self) -> Self:
        if self.backbone.kind == "encoder" and self.data.kind in ("verbalizer", "text-to-text"):
            raise ValueError(
                f"data.kind {self.data.kind} needs a language model; an encoder takes classification or multilabel"
            )
        return self

    @model_validator(mode="after")
    def _words_are_read(self) -> Self:
        """With a head, label words are read by what starts from them or writes them."""
        if self.data.kind not in ("classification", "multilabel"):
            return self
        chosen = [(self.method.name, self.method.model_extra or {})]
        chosen += [(v.method or label, v.model_extra or {}) for label, v in self.compare.items() if v is not None]
        writes = any(name == "trie-search" for name, _ in chosen)
        starts = any(settings.get("init") == "labels" for _, settings in chosen)
        for name, read in (("verbalizer", writes or starts), ("target_prefix", writes)):
            if name in self.data.model_fields_set and not read:
                raise ValueError(f"data.{name} has no effect with kind: {self.data.kind}; leave it out")
        return self

    def config(self, section: str = "method", **known: Any) -> MethodConfig:
        settings = self.method.model_extra or {}
        if settings.get("calibrate") == "content-free" and "content_free_ids" not in settings:
            template = self.data.template
            if not template.replace("{text}", "").strip() or set(template_fields(template)) != {"text"}:
                raise InputError(
                    f"an input without content would leave nothing of {template!r} to read, or an open field",
                    field="data.template",
                    remedy="`calibrate: content-free` needs words around {text} and no other field, such as "
                    "'{text}\\nTopic:'; or calibrate by train-mean",
                )
            known = {"content_free_ids": ((0,),), **known}  # the tokenizer makes them; until then anything stands in
        if self.data.kind == "text-to-text" and _reads_head(self.method.name):
            raise InputError(f"{self.method.name} needs classes, data.kind is text-to-text", field=section)
        scored = ["loss", *(self.data.metrics or METRICS[self.data.kind])]
        if self.training.monitor not in (None, *scored):
            raise InputError(
                f"the run monitors {self.training.monitor!r}, which {self.data.kind} does not score here",
                field="training.monitor" if section == "method" else f"{section}.training.monitor",
                remedy=f"Choose one of: {', '.join(scored)}",
            )
        config = super().config(section, **known)
        started = getattr(config, "init_text", "") or getattr(config, "init_ids", ())
        if getattr(config, "init", None) == "text" and not started:
            raise InputError(
                "init: text needs init_text", field=f"{section}.init_text", remedy="Write the text to start from there"
            )
        heads = self.data.kind in ("classification", "multilabel") or getattr(config, "num_labels", None)
        rows = getattr(config, "prompt_length", 1) or (self.method.name == "dept" and getattr(config, "rank", 0))
        writes = self.method.name == "trie-search"  # labels without a head
        if self.method.name in ("prompt-tuning", "spot", "dept", "trie-search") and not rows and (writes or not heads):
            raise InputError(
                "a prompt of no rows and without a head trains nothing",
                field=f"{section}.prompt_length",
                remedy="Set it to 1 or more",
            )
        return config


class Bench:
    """Backbone and rows of a recipe, loaded once and used by all its runs."""

    def __init__(self, checked: Recipe) -> None:
        self.recipe = checked
        self.rows = checked.data.rows()
        checked.data.check(self.rows, checked.backbone.kind, checked.seed)
        self.backbone, self.tokenizer = checked.backbone.load()
        offloaded = any(p.is_meta for p in self.backbone.parameters())
        # Before a method is on it.
        self._weights = None if offloaded else frozen.fingerprint(self.backbone, full=False, config=True)

    @property
    def identity(self) -> dict[str, Any]:
        """What backbone and data are, as JSON; rows and weights by their hash."""
        rows = hashlib.sha256(json.dumps(self.rows, sort_keys=True, default=str).encode()).hexdigest()
        return self.recipe.model_dump(mode="json", include={"backbone", "data"}) | {
            "rows": rows,
            "weights": self._weights,
        }

    def job(self, label: str, seed: int) -> tuple[Job, FitConfig]:
        """The run of one method with one seed."""
        chosen, data = self.recipe.with_method(label), self.recipe.data
        if chosen.method.name == "trie-search":  # which learns to write them
            for number, row in enumerate(self.rows["train"], start=1):
                if not row["label"]:
                    raise InputError(
                        "the row has no label",
                        file=data.files.get("train"),
                        row=number,
                        field="label",
                        remedy="Text needs something to write: add a label such as none",
                    )
        task = data.task(self.rows, self.tokenizer, self.recipe.backbone.kind, seed)
        assert task.train is not None
        config = chosen.config(seed=seed, **_known_to_task(chosen, task))
        method = registry.find_method("nlp", chosen.method.name)(self.backbone, config)
        source = self.recipe.backbone
        job = Job(
            method,
            task.train,
            task.validation,
            task.test,
            task=task.spec.model_dump(mode="json"),
            backbone_name=None if Path(source.name).is_dir() else source.name,  # a path stays on this machine
            revision=source.revision,
        )
        return job, chosen.training.model_copy(update={"seed": seed})


class Session:
    """A trained prompt on its backbone."""

    def __init__(self, method: Method, task: TextTask) -> None:
        self.method, self.task = method, task
        self.fields = template_fields(task.spec.template)

    def inputs(self, file: Path, text: str = "text") -> list[dict[str, Any]]:
        """The rows of a file: the text, and the template's other fields."""
        return read_rows(file, self.fields | {"text": text})

    def predict(self, inputs: Sequence[str | Mapping[str, Any]]) -> list[dict[str, Any]]:
        """One answer for each text or row; see `TextTask.predict`."""
        rows = [{"text": item} if isinstance(item, str) else item for item in inputs]
        columns: dict[str, Any] = {name: [row.get(name) for row in rows] for name in self.fields if name in rows[0]}
        return self.task.predict(self.method, [row["text"] for row in rows], **columns)

    def evaluate(self, file: Path, text: str = "text", label: str = "label") -> dict[str, float]:
        """Metrics on a file with labelled rows."""
        rows, spec = read_rows(file, self.fields | {"text": text, "label": label}), self.task.spec
        check_rows({"test": rows}, spec.kind, spec.template, spec.labels, {"test": file})
        return evaluate(self.method, self.task.split(rows, file))

    def export(self, format: Literal["peft"], folder: Path) -> Path:
        """Write the prompt in another library's format, one of `exports`."""
        return interop.export_peft(self.method, folder)


def exports(artifact: artifacts.Artifact) -> dict[str, tuple[str, ...]]:
    """The other libraries' formats that a prompt can be written in, with the names of their files."""
    config = artifact.config
    written = config.method in interop.WRITTEN and config.method_config.get("num_labels") is None
    return {"peft": interop.FILES} if written else {}


def open_artifact(artifact: artifacts.Artifact, backbone: str | None = None) -> Session:
    """Load the backbone of an artifact (its own, unless another is named) and put the prompt on it.

    Raises:
        InputError: the artifact was saved without its task, or its backbone cannot be loaded.
    """
    folder, known = artifact.folder, artifact.config.backbone
    spec, name = recipe.opened(artifact, TaskSpec, backbone)
    if spec.kind in ("classification", "multilabel"):
        config = artifact.config.method_config
        recipe.check_head(
            artifact, len(spec.labels), config.get("num_labels") or len(config.get("label_tokens", ())) or None
        )
    try:
        chosen = TextBackbone(
            name=name, kind=spec.backbone, revision=None if backbone else known.revision, dtype=_trained_in(known.dtype)
        )
    except ValidationError as error:
        raise recipe.explain(error, TextBackbone, "backbone", folder) from error
    try:
        model, tokenizer = chosen.load()
    except InputError as error:
        if backbone or name in BACKBONE_ASSETS:
            raise
        raise InputError(
            f"was trained on {name!r}, which is neither a folder here nor to be had from the hub",
            file=folder,
            remedy="Name its backbone's folder or hub id: --backbone",
        ) from error
    return Session(artifacts.load(folder, model).place(doctor.fast_device()), TextTask(spec, tokenizer))


def demo(folder: Path, seeds: int | None, shots: int | None, data: Path | None) -> None:
    """`pt demo nlp`."""
    from pt_nlp.demo import run

    run(folder, seeds=seeds or 1, shots=shots or 16, data=data)


def _known(name: str, known: Mapping[str, Any]) -> str:
    if name.startswith("asset:") and name not in known:
        raise ValueError(f"no such asset; there are {', '.join(known)}")
    return name


def _trained_in(dtype: str) -> Literal["fast", "float32", "bfloat16", "float16"]:
    """The dtype of the backbone that a prompt was trained on; `fast` where it had several, or was quantised."""
    return dtype if dtype in ("float32", "bfloat16", "float16") else "fast"  # type: ignore[return-value]


def _reads_head(method: str) -> bool:
    """Whether a method cannot do without a trained head."""
    return bool(getattr(registry.find_method("nlp", method), "reads_head", False))


def _known_to_task(chosen: Recipe, task: TextTask) -> dict[str, Any]:
    """Settings that follow from the task and its tokenizer, for methods that have them and recipes that leave them open."""
    settings, spec = chosen.config(), task.spec

    def ids(text: str, ended: bool = False) -> tuple[int, ...]:
        return tuple(task.tokenizer(text, add_special_tokens=ended)["input_ids"])

    known: dict[str, Any] = {"max_source_length": spec.max_source_length}
    text = getattr(settings, "init_text", "")
    if getattr(settings, "init", None) == "labels":  # of PTEC one text, as its tokenizer encodes it; else word by word
        known |= {"init_ids": ids(text or " ".join(spec.labels), True), "label_ids": tuple(map(ids, spec.words))}
    elif text:
        known["init_ids"] = ids(text, getattr(settings, "init_text_ended", False) and spec.backbone == "seq2seq")
    if text := getattr(settings, "separator_text", ""):
        known["separator_ids"] = tuple(task.encoder.between(text))
    if getattr(settings, "calibrate", None) == "content-free":
        known["content_free_ids"] = tuple(tuple(row["source"]) for row in task.texts(NO_CONTENT))
    if "label_tokens" in type(settings).model_fields:
        known["label_tokens"] = label_ids(task, spec.words)
        known |= {"end_id": task.tokenizer.eos_token_id, "pad_id": task.encoder.pad}
    if spec.kind in ("classification", "multilabel") or _reads_head(chosen.method.name):
        known |= {"num_labels": len(spec.labels), "multilabel": spec.kind == "multilabel"}
    return known
