"""What the command line does for text: recipes to jobs, artifacts to predictions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pt_core import artifacts, doctor, recipe, registry
from pt_core.errors import InputError
from pt_core.runs import Job
from pt_core.training import FitConfig, evaluate
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

from pt_nlp import assets
from pt_nlp.backbones import load_backbone
from pt_nlp.data import Kind, TaskSpec, TextTask, draw, read_rows

log = logging.getLogger(__name__)

BACKBONE_ASSETS = {"asset:smollm2": assets.smollm2, "asset:minilm": assets.minilm}
DATA_ASSETS = {
    "asset:bbc-news": assets.bbc_news,
    "asset:naics": assets.naics_sectors,
    "asset:isic": assets.isic_sections,
}


class TextBackbone(BaseModel):
    """Which frozen model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(
        description=f"hub id, folder, or one of {', '.join(BACKBONE_ASSETS)} (inside a published package)"
    )
    kind: Literal["causal-lm", "encoder", "seq2seq"] = "causal-lm"
    revision: str | None = Field(None, description="commit or tag on the hub; pin it")
    dtype: Literal["fast", "auto", "float32", "bfloat16"] = Field(
        "fast", description="fast: what `pt doctor` advises here"
    )
    device_map: str | None = Field(None, description="spread over devices, as in from_pretrained")

    def load(self) -> tuple[nn.Module, Any]:
        """The model in eval mode and its tokenizer."""
        name: str | Path = self.name
        if self.name.startswith("asset:"):
            if self.name not in BACKBONE_ASSETS:
                raise InputError(
                    f"no asset {self.name!r}", field="backbone.name", remedy=f"One of {', '.join(BACKBONE_ASSETS)}"
                )
            name = BACKBONE_ASSETS[self.name]()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = doctor.fast_dtype(device) if self.dtype == "fast" else self.dtype
        options = {"device_map": self.device_map} if self.device_map else {}
        return load_backbone(name, self.kind, revision=self.revision, dtype=dtype, **options)


class TextData(BaseModel):
    """Which rows, and how text becomes a task. What is not here has the defaults of `pt_nlp.data.TaskSpec`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: str = Field(
        description=f"file (JSONL, CSV, TSV, Parquet), folder of `datasets`, or {', '.join(DATA_ASSETS)}"
    )
    validation: str | None = None
    test: str | None = Field(None, description="default: rows of `train` that no split uses, where shots are drawn")
    text: str = "text"
    label: str = "label"
    kind: Kind = "verbalizer"
    shots: int | None = Field(None, ge=1, description="training rows per class; None takes all")
    validation_shots: int = Field(0, ge=0)
    max_test_rows: int | None = Field(None, ge=1)
    template: str = "{text}"
    verbalizer: dict[str, str] = {}
    target_prefix: str | None = None
    objective: Literal["classes", "tokens"] | None = None
    length_normalised: bool = False
    max_source_length: int = 256
    max_target_length: int = 64

    @model_validator(mode="after")
    def _files_exist(self) -> TextData:
        for field in ("train", "validation", "test"):
            value = getattr(self, field)
            if value is not None and value.startswith("asset:"):
                if value not in DATA_ASSETS:
                    raise ValueError(f"no asset {value!r}; there are {', '.join(DATA_ASSETS)}")
            elif value is not None and not Path(value).exists():
                raise ValueError(f"{field}: no such file: {value}")
        return self

    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """All rows of every split that is named."""
        fields = {"text": self.text, "label": self.label}
        named = {"train": self.train, "validation": self.validation, "test": self.test}
        found = {k: v for k, v in named.items() if v is not None}
        return {
            split: list(DATA_ASSETS[source]()) if source.startswith("asset:") else read_rows(source, fields)
            for split, source in found.items()
        }

    def task(
        self, rows: Mapping[str, Sequence[Mapping[str, Any]]], tokenizer: Any, backbone: str, seed: int
    ) -> TextTask:
        """The task of one seed: shots are drawn by the seed; rows that are held out for testing are the same for all seeds."""
        parts = {k: list(v) for k, v in rows.items()}
        if "test" not in parts and self.shots is not None:
            held = draw({"train": parts["train"]}, self.kind, self.shots, self.validation_shots, None, seed)
            used = {id(row) for part in held.values() for row in part}
            parts["test"] = [row for row in parts["train"] if id(row) not in used]
        parts = draw(parts, self.kind, self.shots, self.validation_shots, self.max_test_rows, seed)
        spec = self.model_dump(include=set(TaskSpec.model_fields) - {"kind"})
        return TextTask.from_rows(
            parts, tokenizer, kind=self.kind, backbone=backbone, files={"train": self.train}, **spec
        )


class Recipe(recipe.Recipe):
    """A recipe for text."""

    backbone: TextBackbone
    data: TextData


class Bench:
    """Backbone and rows of a recipe, loaded once and used by all its runs."""

    def __init__(self, checked: Recipe) -> None:
        self.recipe = checked
        self.rows = checked.data.rows()
        self.backbone, self.tokenizer = checked.backbone.load()

    def job(self, label: str, seed: int) -> tuple[Job, FitConfig]:
        """The run of one method with one seed."""
        chosen = self.recipe.with_method(label)
        task = self.recipe.data.task(self.rows, self.tokenizer, self.recipe.backbone.kind, seed)
        assert task.train is not None
        config = recipe.method_config(chosen, seed=seed)
        name = chosen.method["name"]
        overrides: dict[str, Any] = {"seed": seed}
        start = getattr(config, "init_text", "")
        if not start and getattr(config, "init", None) == "labels":
            start = " ".join(task.spec.labels)
        if start:
            overrides["init_ids"] = tuple(self.tokenizer(start, add_special_tokens=False)["input_ids"])
        if task.spec.kind in ("classification", "multilabel") or registry.find_method(name).reads_head:
            overrides |= {"num_labels": len(task.spec.labels), "multilabel": task.spec.kind == "multilabel"}
        config = recipe.method_config(chosen, **overrides)
        method = registry.find_method(name)(self.backbone, config)
        training = chosen.training.model_copy(update={"seed": seed})
        job = Job(
            method,
            task.train,
            task.validation,
            task.test,
            task=task.spec.model_dump(mode="json"),
            backbone_name=self.recipe.backbone.name,
            revision=self.recipe.backbone.revision,
        )
        return job, training


class Session:
    """A trained prompt on its backbone."""

    def __init__(self, method: Any, task: TextTask) -> None:
        self.method, self.task = method, task

    def inputs(self, file: Path, text: str) -> list[str]:
        """The texts of a file."""
        return [row["text"] for row in read_rows(file, {"text": text})]

    def predict(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """One answer for each text; see `TextTask.predict`."""
        return self.task.predict(self.method, texts)

    def evaluate(self, file: Path, text: str, label: str) -> dict[str, float]:
        """Metrics on a file with labelled rows."""
        split = self.task.split(read_rows(file, {"text": text, "label": label}), file)
        return evaluate(self.method, split)

    def export(self, format: str, folder: Path) -> Path:
        """Write the prompt in another library's format."""
        if format != "peft":
            raise InputError(f"unknown format {format!r}", remedy="Text prompts are exported as `peft`")
        from pt_nlp.interop import export_peft

        return export_peft(self.method, folder)


def open_artifact(artifact: artifacts.Artifact, backbone: str | None = None) -> Session:
    """Load the backbone of an artifact (its own, unless another is named) and put the prompt on it."""
    if artifact.config.task is None:
        raise InputError(
            "the artifact holds no task", file=artifact.folder, remedy="Save it with task=task.spec.model_dump()"
        )
    spec = TaskSpec.model_validate(artifact.config.task)
    name = backbone or artifact.config.backbone.name
    if name is None:
        raise InputError("the artifact does not say where its backbone comes from", remedy="Name it: --backbone")
    revision = artifact.config.backbone.revision if backbone is None else None
    model, tokenizer = TextBackbone(name=name, kind=spec.backbone, revision=revision).load()
    return Session(artifacts.load(artifact.folder, model), TextTask(spec, tokenizer))


def demo(folder: Path, seeds: int, shots: int, data: Path | None) -> None:
    """`pt demo nlp`."""
    from pt_nlp.demo import run

    run(folder, seeds=seeds, shots=shots, data=data)
