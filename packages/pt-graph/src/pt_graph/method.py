"""What all graph methods share: a head on the pooled embeddings of prompted graphs, and a loss that masks missing labels.

Batches are dicts: `graphs` (a `torch_geometric.data.Batch`), `labels` ([B] classes, or [B, C] of 1, 0 and -1 for missing)
and `sample_ids`. `pt_graph.data` makes them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate.utils import send_to_device
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pt_core.attachment import attach
from pt_core.data import Split
from pt_core.errors import InputError
from pt_core.method import Batch, Loss, Method, MethodConfig, Output
from pt_core.plan import FitConfig, device_of
from pt_core.training import FitResult
from pt_graph.backbones import FeaturePrompt, GraphBackbone, dropping


class GraphConfig(MethodConfig):
    """Settings that every graph method has."""

    num_outputs: int = Field(ge=1, description="C: classes, or tasks of a multi-task data set")
    task: Literal["multilabel", "multiclass"] = Field(
        "multilabel", description="multilabel: binary tasks, masked where a label is missing; multiclass: one class"
    )
    head_layers: int = Field(1, ge=1, le=3, description="linear layers of the head, width d, ReLU; 1 to 3 in GPF")
    head_lr: float = Field(1e-3, gt=0, description="GPF, chem/prompt_tuning_few_shot.py")
    backbone_dropout: bool = Field(
        False,
        description="dropout of the frozen backbone while training (published runs: on, 0.5); BatchNorm stays in eval",
    )
    seed: int = Field(0, description="of start values and of what a method draws when it predicts")


class Head(nn.Sequential):
    """MLP d -> d -> ... -> C with ReLU between its `layers` linear layers; started as torch does.

    Parameters: (layers - 1) * (d^2 + d) + d * C + C.
    """

    def __init__(self, width: int, outputs: int, layers: int, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            hidden = [m for _ in range(layers - 1) for m in (nn.Linear(width, width), nn.ReLU())]
            super().__init__(*hidden, nn.Linear(width, outputs))


def check_labels(labels: Tensor, outputs: int, task: str) -> None:
    """Refuse labels that are not classes [B] below `outputs`, or not of shape [B, outputs] (multi-label)."""
    if labels.shape[1:] != (() if task == "multiclass" else (outputs,)):
        problem = f"labels of shape {list(labels.shape)} are not those of {outputs} outputs ({task})"
    elif (
        labels.device.type == "cpu"
        and task == "multiclass"
        and not bool((labels >= 0).all() & (labels < outputs).all())
    ):
        problem = f"labels from {int(labels.min())} to {int(labels.max())} are not classes 0 to {outputs - 1}"
    else:
        return
    raise InputError(problem, field="labels", remedy="Set `task` and `num_outputs` as the data are")


def label_loss(logits: Tensor, labels: Tensor, task: str) -> tuple[Tensor, Tensor]:
    """Loss of each graph, summed over its terms, and the number of its terms, [B] each.

    Binary cross-entropy over the labels that are there (a missing one, -1, is no term), or cross-entropy.

    Raises:
        InputError: the labels are not of this task, or of another number of outputs.
    """
    check_labels(labels, logits.shape[1], task)
    if task == "multiclass":
        return F.cross_entropy(logits, labels, reduction="none"), torch.ones_like(labels)
    known = labels >= 0
    terms = F.binary_cross_entropy_with_logits(logits, labels.clamp(min=0).to(logits.dtype), reduction="none")
    return terms.masked_fill(~known, 0).sum(1), known.sum(1)


class GraphMethod(Method):
    """A frozen graph backbone with a feature prompt (or none) and a trained head on its graph embeddings."""

    config: Any
    backbone: GraphBackbone
    config_class = GraphConfig

    def __init__(self, backbone: GraphBackbone, config: MethodConfig | None = None) -> None:
        if not isinstance(backbone, GraphBackbone):
            raise InputError(
                f"graph methods want a GraphBackbone, not a {type(backbone).__name__}",
                remedy="Wrap it: pt_graph.PyGBackbone(module, feature_width, width, hops)",
            )
        super().__init__(backbone, config)
        self.generator = torch.Generator().manual_seed(self.config.seed)
        self.prompt = self.build_prompt()
        self.head = self.build_head()
        self.handle = None if self.prompt is None else attach(backbone, self.prompt, always=False)

    def build_prompt(self) -> FeaturePrompt | None:
        """What is attached; None: nothing. Start values come from `self.generator`."""
        return None

    def build_head(self) -> nn.Module | None:
        return Head(self.backbone.width, self.config.num_outputs, self.config.head_layers, self.config.seed)

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups = []
        if self.prompt is not None:
            groups.append({"name": "prompt", "params": list(self.prompt.parameters()), "lr": self.config.lr})
        if self.head is not None:
            groups.append({"name": "head", "params": list(self.head.parameters()), "lr": self.config.head_lr})
        return groups

    def nodes(self, graphs: Any) -> Tensor:
        """Node embeddings [n, d] of prompted graphs."""
        with dropping(self.backbone, self.training and self.config.backbone_dropout), self.active():
            return cast(Tensor, self.backbone(graphs))

    def embed(self, graphs: Any) -> Tensor:
        """What the head reads of prompted graphs: graph embeddings [B, d]."""
        return self.backbone.readout(self.nodes(graphs), graphs)

    def features(self, batch: Batch) -> Tensor:
        """`embed` of the batch's graphs, in the dtype of what is trained, or the `features` that `read` put in their place."""
        if "features" in batch:
            return cast(Tensor, batch["features"])
        return self.embed(batch["graphs"]).to(next(self.parameters()).dtype)

    def forward(self, batch: Batch) -> Output:
        """Logits [B, C] and graph embeddings [B, d]."""
        features = self.features(batch)
        return Output(cast(nn.Module, self.head)(features), features)

    def loss_of(self, output: Output, batch: Batch) -> Loss:
        total, count = label_loss(cast(Tensor, output.logits), batch["labels"], self.config.task)
        return Loss(total.sum(), count.sum())

    @torch.no_grad()
    def read(self, split: Split, config: FitConfig) -> Split:
        """The split with `features` in place of graphs: `embed` of every row, once, in eval mode and float32.

        Exact as long as what `embed` depends on does not change.
        """
        self.place(device_of(config))
        device, was_training = next(self.backbone.parameters()).device, self.training
        self.eval()
        rows: list[tuple[Tensor, Tensor]] = []
        for batch in split.batches(config.eval_batch_size):
            found = self.embed(send_to_device(batch["graphs"], device)).float().cpu()
            rows += zip(found, torch.as_tensor(batch["labels"]), strict=True)
        self.train(was_training)
        return replace(split, rows=rows, collate=_collate, ids=split.row_ids)


def _collate(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    return {"features": torch.stack([f for f, _ in rows]), "labels": torch.stack([y for _, y in rows])}


class ReadOnceMethod(GraphMethod):
    """A method that feeds the frozen backbone graphs as they are: each is embedded once, before the first step.

    With `backbone_dropout` the embeddings of training rows are drawn anew in every step.
    """

    def start(self, train: Split) -> None:
        """Start values that are read off the embedded training rows."""

    def embedded(self, train: Split, validation: Split | None, config: FitConfig) -> tuple[Split, Split | None, Split]:
        """What is trained and validated on, and the training rows as they are without dropout; makes the `start`."""
        seen = self.read(train, config)
        self.start(seen)
        if validation is not None and validation.scorer is None:  # a scorer may want to see graphs
            validation = self.read(validation, config)
        return train if self.config.backbone_dropout else seen, validation, seen

    def fit(
        self,
        train: Split,
        validation: Split | None = None,
        config: FitConfig | None = None,
        output_dir: str | Path | None = None,
    ) -> FitResult:
        config = config or FitConfig(epochs=10)
        train, validation, _ = self.embedded(train, validation, config)
        return super().fit(train, validation, config, output_dir)

    def class_means(self, features: Tensor, labels: Tensor, of: int = 1) -> Tensor:
        """Mean features [C, F] of the rows of each class; multi-label: of the rows labelled `of` (zeros: there are none).

        Raises:
            InputError: the labels are not of this task, or a class has no rows (multi-class).
        """
        outputs, multiclass = self.config.num_outputs, self.config.task == "multiclass"
        check_labels(labels, outputs, self.config.task)
        if multiclass and (empty := sorted(set(range(outputs)) - set(labels.tolist()))):
            raise InputError(
                f"no training graph is of class {', '.join(map(str, empty))} (counted from 0)",
                field="labels",
                remedy="Add rows, or leave the class out",
            )
        members = (F.one_hot(labels, outputs) if multiclass else labels == of).cpu().double()
        means = members.T @ features.cpu().double() / members.sum(0)[:, None].clamp(min=1)
        return means.to(features)
