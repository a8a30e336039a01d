"""MVLPT: one prompt for many tasks, and a start for each of them (Shen et al., WACV 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

import torch
from accelerate.utils import send_to_device
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, Dataset

from pt_core.data import Split
from pt_core.errors import InputError
from pt_core.method import Batch, Loss, MethodConfig, Output
from pt_core.plan import FitConfig
from pt_core.training import FitResult
from pt_vl.backbones import DualEncoder
from pt_vl.method import Position, Stacked, VLConfig, VLMethod, several, written
from pt_vl.methods.coop import CoOp, CoOpConfig
from pt_vl.methods.upt import UPT, UPTConfig
from pt_vl.methods.vpt import VPT, VPTConfig


class MVLPTConfig(VLConfig):
    """Settings of MVLPT."""

    class_names: tuple[str, ...] = Field((), description="filled in: the distinct class names of all tasks")
    tasks: dict[str, tuple[str, ...]] = Field(description="task -> its class names, in the order of its labels")
    prompt: Literal["text", "visual", "unified"] = Field(
        "unified", description="what is shared: CoOp's context (MCoOp), deep VPT (MVPT), UPT (MUPT)"
    )
    prompt_length: int | None = Field(None, ge=1, description="n; default: 16, unified 4 (MVLPT.md)")
    position: Position = Field("middle", description="of the class name (text, unified); MVLPT, scripts/mvlpt")
    hidden: int = Field(128, ge=1, description="h, width of the mixer (unified); train.py PROJECT_DIM")
    mixer: Literal["transformer", "identity"] = Field(
        "transformer", description="of the prompts of both towers (unified); train.py PROJECT_METHOD"
    )
    restrict: bool = Field(
        False,
        description="train on the classes of a row's own task only; off in every published script (union softmax)",
    )
    repo_compat: bool = Field(
        False,
        description="quirks of the released code: `restrict` leaves other tasks' classes a logit of 0, prompts are not mixed",
    )
    lr: float = Field(0.002, gt=0, description="vit_b16.yaml; SGD, epoch-cosine, 200 epochs, batch 32")

    @model_validator(mode="before")
    @classmethod
    def _union(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("tasks"):
            names = {written(name): name for task in values["tasks"].values() for name in task}
            values = values | {"class_names": tuple(names.values())}
        return values

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not self.tasks or any(len({written(n) for n in names}) < len(names) for names in self.tasks.values()):
            raise ValueError("name at least one task; the class names of a task must differ")
        return self


class MVLPT(VLMethod):
    """MVLPT: one text, visual or unified prompt is trained on K tasks at once, over the union of their classes.

    Batches also have `task` [B], the row's task (of a single one they need not), and labels in the union (`union`). Logits
    [B, sum_k C_k]: the columns of the tasks one behind the other; a class name of two tasks has a column in each.

        source = MVLPT(backbone, MVLPTConfig(tasks={"pets": ..., "food": ...}, prompt="text"))
        source.fit(union({"pets": pets.train, "food": food.train}), union({"pets": pets.validation, ...}))
        target = source.for_target(("red car", "blue car"))          # a CoOp that starts from the shared prompt
        target.fit(cars.train, cars.validation)

    Parameters: those of CoOp, deep VPT or UPT. ViT-B/16: text, n = 16: 8,192; visual, n = 16: 147,456; unified, n = 4: 566,400.

    Fidelity: the released code; visual prompts stand between CLS and the patches, behind the first norm, and start uniformly.
    The prompt with the best mean of per-task accuracies on validation rows is kept, as there. Rows are shuffled in every
    epoch (there the multi-task loader is not). `restrict` masks with -inf, where the code multiplies by 0, which leaves a
    logit of 0 (`repo_compat` does so too, and mixes no prompts: see UPT). Not built: soft targets of multi-label sets
    and their mean average precision (VOC), means over classes in the place of accuracy (Caltech, Flowers, Pets, Aircraft),
    ELEVATER's own split of the shots into training and validation, a context for each class, words to start from.

    Reference: Shen et al. Multitask Vision-Language Prompt Tuning. WACV 2024.
    """

    name = "mvlpt"
    config_class: ClassVar[type[MethodConfig]] = MVLPTConfig
    run: ClassVar[dict[str, Any]] = VLMethod.run | {"keep_best": True, "monitor": "accuracy"}
    columns: Tensor
    owners: Tensor

    def __init__(self, backbone: DualEncoder, config: MethodConfig | None = None) -> None:
        super().__init__(backbone, config)
        self.prompted = self._build(self.config.class_names)
        self.trains_text, self.trains_image = self.prompted.trains_text, self.prompted.trains_image  # type: ignore[misc]
        index = {written(name): i for i, name in enumerate(self.config.class_names)}
        tasks = list(self.config.tasks.values())
        places = torch.tensor([index[written(name)] for names in tasks for name in names])
        owners = torch.tensor([k for k, names in enumerate(tasks) for _ in names])
        self.register_buffer("columns", places, persistent=False)
        self.register_buffer("owners", owners, persistent=False)

    def _build(self, names: Sequence[str]) -> VLMethod:
        """The method that has the prompt, on some classes."""
        c = self.config
        common = c.model_dump(include={"templates", "text_chunk", "seed", "lr"}) | {"class_names": several(names)}
        if c.prompt == "text":
            return CoOp(self.backbone, CoOpConfig(prompt_length=c.prompt_length or 16, position=c.position, **common))
        if c.prompt == "visual":
            settings = {"prompt_length": c.prompt_length or 16, "init": "uniform", "place": "after-cls"}
            return VPT(self.backbone, VPTConfig(**settings, **common))
        own = c.model_dump(include={"position", "hidden", "mixer", "repo_compat"})
        return UPT(self.backbone, UPTConfig(prompt_length=c.prompt_length or 4, **own, **common))

    def encode_text(self) -> Tensor:
        return self.prompted.encode_text()

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.prompted.encode_image(pixels)

    @classmethod
    def reads_templates(cls, config: Any) -> bool:
        return bool(config.prompt == "visual")

    @property
    def column_names(self) -> tuple[str, ...]:
        return tuple(name for names in self.config.tasks.values() for name in names)

    def own_columns(self, tasks: Tensor) -> Tensor:
        """Which columns are of each row's task, bool [B, sum C]."""
        return self.owners == tasks[:, None]

    def forward(self, batch: Batch) -> Output:
        features = self.image_features(batch)
        return Output(self.backbone.similarity(features, self.text_features())[:, self.columns], features)

    def loss_of(self, output: Output, batch: Batch) -> Loss:
        logits = cast(Tensor, output.logits)
        if self.config.restrict and len(self.config.tasks) > 1:  # of one task there are no other classes
            if "task" not in batch:
                raise InputError(
                    "`restrict` needs the task of every row", field="task", remedy="Give rows of a `union`"
                )
            others = ~self.own_columns(batch["task"])
            logits = logits.masked_fill(others, 0.0 if self.config.repo_compat else -torch.inf)
        return Loss(F.cross_entropy(logits, batch["labels"], reduction="sum"), len(logits))

    def fit(
        self,
        train: Split,
        validation: Split | None = None,
        config: FitConfig | None = None,
        output_dir: str | Path | None = None,
    ) -> FitResult:
        """See `VLMethod.fit`.

        Raises:
            InputError: a `union` is of other tasks, or of these in another order.
        """
        mine = [(name, len(names)) for name, names in self.config.tasks.items()]
        for split in filter(None, (train, validation)):
            for part in getattr(split.rows, "datasets", ()):
                if isinstance(part, _Tagged) and part.sizes != mine:
                    raise InputError(
                        f"the rows are of the tasks (with classes) {part.sizes}, the method's are {mine}",
                        remedy="Give the method's tasks to the union: union(splits, method.config.tasks)",
                        field="tasks",
                    )
        return super().fit(train, validation, config, output_dir)

    # --- phases -----------------------------------------------------------------------------------------------------
    def for_target(self, class_names: Sequence[str]) -> VLMethod:
        """CoOp, VPT or UPT on a target's classes, starting from this prompt; `fit` trains it as this method is trained."""
        target = self._build(class_names)
        target.load_trained_state(self.prompted.trained_state())
        target.published = self.published  # type: ignore[method-assign]  # not the run of CoOp, VPT or UPT by itself
        return target.to(self.backbone.device)

    def for_group(self, tasks: Mapping[str, Sequence[str]]) -> MVLPT:
        """The same prompt on a group of target tasks, to be trained jointly."""
        settings = self.config.model_dump(exclude={"class_names"}) | {"tasks": tasks}
        group = MVLPT(self.backbone, MVLPTConfig.model_validate(settings))
        group.load_trained_state(self.trained_state())
        return group.to(self.backbone.device)

    @property
    def class_bound(self) -> bool:
        return True  # many tasks have many class lists: `for_target` and `for_group` take the prompt over


def average(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Elementwise mean of prompts of several seeds (MVLPT, scripts/avg_ckpt.py), for `load_trained_state`.

    Raises:
        InputError: they are not of one form.
    """
    first = states[0]
    if any({n: t.shape for n, t in state.items()} != {n: t.shape for n, t in first.items()} for state in states):
        raise InputError("prompts of different forms cannot be averaged")
    return {name: torch.stack([state[name] for state in states]).mean(0) for name in first}


class _Tagged(Dataset[dict[str, Any]]):
    """Rows of one task in the union: labels behind those of the tasks before it, and the task's number."""

    def __init__(self, split: Split, name: str, sizes: Mapping[str, int]) -> None:
        task = list(sizes).index(name)
        self.split, self.sizes = split, list(sizes.items())
        self.task, self.offset = torch.tensor(task), sum(list(sizes.values())[:task])

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.split.rows[index]
        return {**row, "label": row["label"] + self.offset, "task": self.task}


def union(splits: Mapping[str, Split | None], tasks: Mapping[str, Sequence[str]] | None = None) -> Split:
    """The splits of several tasks as one, for `MVLPT`: labels in the union, ids `task/id`, the mean of per-task accuracies.

    Args:
        splits: task -> its split, in the order of the method's `tasks`. All need `num_classes`.
        tasks: the method's; then splits may come in any order, and tasks may have none (no images to validate on).

    Raises:
        InputError: a split does not say how many classes it has, has others than its task, or is missing.
    """
    given = {name: split for name, split in splits.items() if split is not None}
    if missing := [name for name, split in given.items() if split.num_classes is None]:
        raise InputError(f"task {missing[0]!r} does not say how many classes it has", field="num_classes")
    if tasks is None and (absent := [name for name in splits if name not in given]):
        raise InputError(f"task {absent[0]!r} has no rows", remedy="Give `tasks` as well, or rows", field="splits")
    found = {name: split.num_classes or 0 for name, split in given.items()}
    sizes = found if tasks is None else {name: len(names) for name, names in tasks.items()}
    if wrong := [name for name, size in found.items() if sizes.get(name) != size]:
        raise InputError(f"task {wrong[0]!r} has {found[wrong[0]]} classes, or is none of `tasks`", field="tasks")
    if not given:
        raise InputError("no task has rows", field="splits")
    parts = list(given.values())
    rows = cast(Any, ConcatDataset([_Tagged(split, name, sizes) for name, split in given.items()]))
    ids = [f"{name}/{i}" for name, split in given.items() for i in split.row_ids]
    fixed = all(getattr(split.collate, "fixed", False) for split in parts)
    names = list(sizes)
    called = [given[name].class_names if name in given else None for name in names]

    def score(method: MVLPT, split: Split, batch_size: int) -> dict[str, float]:
        return per_task_accuracy(method, split, names, batch_size)

    return replace(
        parts[0],
        rows=rows,
        collate=Stacked(fixed),
        num_classes=sum(sizes.values()),
        class_names=None if None in called else [name for part in called for name in part or ()],
        ids=ids,
        metrics=(),
        lengths=None,
        scorer=score,
    )


@torch.no_grad()
def per_task_accuracy(method: MVLPT, split: Split, names: Sequence[str], batch_size: int) -> dict[str, float]:
    """Accuracy of each task among its own classes only, `accuracy/<task>`, and their mean, `accuracy`."""
    right: dict[int, list[bool]] = {}
    for batch in split.batches(batch_size):
        batch = send_to_device(batch, method.backbone.device)
        logits = method(batch).logits.masked_fill(~method.own_columns(batch["task"]), -torch.inf)
        for task, hit in zip(batch["task"].tolist(), (logits.argmax(1) == batch["labels"]).tolist(), strict=True):
            right.setdefault(task, []).append(hit)
    scores = {f"accuracy/{names[k]}": sum(hits) / len(hits) for k, hits in sorted(right.items())}
    return {"accuracy": sum(scores.values()) / len(scores)} | scores
