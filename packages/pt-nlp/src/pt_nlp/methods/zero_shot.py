"""Label words scored by the frozen model as it is, optionally calibrated: the baseline that trains nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pt_core.errors import InputError
from pt_core.method import Loss, Output
from pt_core.plan import FitConfig
from pt_core.prompts import Prompt
from pt_nlp.data import pad
from pt_nlp.method import TextConfig, TextMethod, on_run_device
from pt_nlp.methods.prompt_tuning import check_ids
from pt_nlp.models import is_causal

if TYPE_CHECKING:
    from pt_core.data import Split
    from pt_core.training import FitResult


class ZeroShotConfig(TextConfig):
    """Settings of zero-shot scoring."""

    calibrate: Literal["none", "content-free", "train-mean"] = Field(
        "none",
        description="what is subtracted from the log-probability of each class: nothing, that of inputs without content "
        "(Zhao et al. 2021), or its mean over unlabelled training inputs (design choice)",
    )
    content_free_ids: tuple[tuple[int, ...], ...] = Field(
        (), description="token ids of the inputs without content, in the task's template; N/A, [MASK] and nothing there"
    )
    calibration_rows: int | None = Field(
        None, ge=1, description="training inputs that `train-mean` reads, drawn by the seed; None: all"
    )

    @model_validator(mode="after")
    def _content_free(self) -> Self:
        if (self.calibrate == "content-free") != bool(self.content_free_ids):
            raise ValueError("content_free_ids are needed for `calibrate: content-free`, and for nothing else")
        return self


class ZeroShot(TextMethod):
    """Zero-shot scoring: log p(label word | input) by the frozen model, with no prompt and no training.

        scores_c = log p_c - b_c,   p = softmax over classes of the label words' log-probabilities

    b is 0 (`calibrate: none`: the plain scores), the log of the mean p over inputs without content, or the mean of
    log p over training inputs, whose labels are not read. The last two are fitted by `fit` and saved, [C]; before that the
    scores are the plain ones.

    Input ids [b, n] and label words [C, t] -> class logits [b, C].

    Parameters: none are trained.

    Fidelity: Zhao et al. take softmax(p / p_cf) where this is softmax(log p - log p_cf): the same order of classes. Here
    p is scaled to sum 1 over the label words (as the paper's p, from memory) and p_cf is its mean over the inputs without
    content. The released code takes the mean of the probabilities among all words and scales that: inputs after which a
    label word is likely count for more. Theirs are "N/A", "[MASK]" and the empty text; pass them as encoded by the task
    (`[row["source"] for row in task.texts([...])]`). `train-mean` is that of this library's first experiments; it assumes
    that classes are about equally frequent in training.

    Reference: Zhao, Wallace, Feng, Klein, Singh. Calibrate Before Use: Improving Few-shot Performance of Language Models.
    ICML 2021.
    """

    name = "zero-shot"
    config_class = ZeroShotConfig
    trains: ClassVar[bool] = False
    backbone: Any  # a model of transformers
    calibration: Tensor

    def __init__(self, backbone: Any, config: ZeroShotConfig | None = None) -> None:
        super().__init__(backbone, config)
        if self.config.calibrate != "none":
            self.register_buffer("calibration", torch.zeros(0))  # the number of classes is the task's

    def build_prompt(self) -> Prompt | None:
        if self.config.num_labels is not None:
            raise InputError(
                f"{self.name} reads label words and has no head", field="num_labels", remedy="Use a verbalizer task"
            )
        for ids in self.config.content_free_ids:
            check_ids(ids, self.backbone.get_input_embeddings().num_embeddings, "content_free_ids")
        return None

    def forward(self, batch: Mapping[str, Any]) -> Output:
        """Class logits [b, C].

        Raises:
            InputError: the calibration is one of another number of classes.
        """
        if not self._calibrated:
            return super().forward(batch)
        scores = self.log_probabilities(batch)
        if len(self.calibration) != scores.shape[1]:
            raise InputError(
                f"the calibration is that of {len(self.calibration)} classes, the batch has {scores.shape[1]}",
                field="calibrate",
                remedy="Call fit with the training split of this task",
            )
        logits = scores - self.calibration
        return Output(logits)

    def loss_of(self, output: Output, batch: Mapping[str, Any]) -> Loss | None:
        """Over the classes where scores are calibrated: they are then no likelihoods of tokens."""
        if not self._calibrated or "labels" not in batch:
            return super().loss_of(output, batch)
        logits = cast(Tensor, output.logits)
        return self.class_loss(logits, batch["labels"].to(logits.device))

    @property
    def _calibrated(self) -> bool:
        return self.config.calibrate != "none" and len(self.calibration) > 0

    def log_probabilities(self, batch: Mapping[str, Any]) -> Tensor:
        """Log-probability of each class among the classes, before calibration, [b, C]."""
        if "candidates" not in batch:
            raise InputError("only scores of label words are calibrated", field="calibrate", remedy="Set it to none")
        with self.active():
            return self.class_scores(batch).float().log_softmax(-1)

    def fit(
        self,
        train: Split,
        validation: Split | None = None,
        config: FitConfig | None = None,
        output_dir: str | Path | None = None,
    ) -> FitResult:
        """Fit the calibration, if there is one, and evaluate. Makes no steps."""
        config = config or FitConfig(epochs=1)
        if self.config.calibrate != "none":
            with torch.no_grad():
                batches = on_run_device(self, config, self._inputs(train, config.eval_batch_size))
                found = torch.cat([self.log_probabilities(batch) for batch in batches])
            mean = found.mean(0) if self.config.calibrate == "train-mean" else found.exp().mean(0).log()
            self.calibration = mean
        return super().fit(train, validation, config, output_dir)

    def _inputs(self, train: Split, batch_size: int) -> Iterator[Mapping[str, Any]]:
        """Batches that the calibration is computed on."""
        if self.config.calibrate == "train-mean":
            order = torch.randperm(len(train), generator=torch.Generator().manual_seed(self.config.seed))
            yield from train.batches(batch_size, sorted(order[: self.config.calibration_rows].tolist()))
            return
        ids = self.config.content_free_ids
        words = {name: value for name, value in train.batch([0]).items() if name not in ("labels", "target_ids")}
        input_ids, mask = pad(ids, 0, "left" if is_causal(self.backbone) else "right")
        yield words | {"input_ids": input_ids, "attention_mask": mask}

    def load_trained_state(self, tensors: Mapping[str, Tensor]) -> None:
        if self.config.calibrate != "none" and "calibration" in tensors:
            self.calibration = self.calibration.new_zeros(tensors["calibration"].shape)
        super().load_trained_state(tensors)
