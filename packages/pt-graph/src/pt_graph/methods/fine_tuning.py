"""Fine-tuning: all weights of the backbone and the head are trained."""

from __future__ import annotations

import copy
from typing import Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from pt_core.errors import InputError
from pt_core.method import Batch, Loss, MethodConfig, Output
from pt_graph.backbones import GraphBackbone
from pt_graph.method import GraphConfig, GraphMethod


class FineTuningConfig(GraphConfig):
    """Settings of fine-tuning."""

    lr: float = Field(1e-3, gt=0, description="of the backbone; pretrain-gnns, chem/finetune.py")
    head_lr: float = Field(1e-3, gt=0, description="pretrain-gnns, chem/finetune.py (lr_scale 1)")
    backbone_dropout: bool = Field(
        True, description="dropout of the backbone while training (rate 0.5); pretrain-gnns, chem/finetune.py"
    )
    batch_norm: Literal["train", "eval"] = Field(
        "train",
        description="train: BatchNorm normalises by the batch and its statistics move (pretrain-gnns, chem/finetune.py: "
        "model.train()); eval: statistics of pre-training",
    )


class FineTuning(GraphMethod):
    """Fine-tuning: every weight of a copy of the backbone is trained, and the head.

    Graphs -> logits [B, C]. The backbone that is given stays as it is (`backbone`, to which the saved method belongs);
    what is trained and saved is `tuned`, with its BatchNorm statistics.

    With `batch_norm = "train"` rows of a training batch see each other, so accumulation and several processes are
    refused; predictions never do.

    Parameters: those of the backbone (plus the head). Chem GIN, d = 300: 1,857,900.

    Fidelity: as the released script: BatchNorm in train mode, dropout 0.5, one rate for all. Loss: mean over valid labels,
    as there. Its 100 epochs of Adam with batches of 32 are settings of the run. A training batch of a single node is
    normalised by the statistics so far, since a batch of one has none.

    Reference: Hu et al. Strategies for Pre-training Graph Neural Networks. ICLR 2020.
    """

    name = "fine-tuning"
    config_class = FineTuningConfig
    frozen_backbone = False

    def __init__(self, backbone: GraphBackbone, config: MethodConfig | None = None) -> None:
        if any(p.dtype is torch.float16 for p in backbone.parameters()):
            raise InputError(
                "the backbone is float16, in which its weights cannot be trained: Adam's epsilon is 0 there",
                remedy="Load it in float32",
            )
        super().__init__(backbone, config)
        self.tuned = copy.deepcopy(backbone).requires_grad_(True)
        self._norms = [m for m in self.tuned.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.train()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for module in self.tuned.modules():
            if isinstance(module, nn.Dropout):
                module.training = mode and self.config.backbone_dropout
        self._normalise_by_batch(mode and self.config.batch_norm == "train")
        return self

    def _normalise_by_batch(self, on: bool) -> None:
        for norm in self._norms:
            norm.training = on

    def parameter_groups(self) -> list[dict[str, Any]]:
        tuned = {"name": "backbone", "params": list(self.tuned.parameters()), "lr": self.config.lr}
        return [tuned, *super().parameter_groups()]

    def nodes(self, graphs: Any) -> Tensor:
        """Node embeddings [n, d] of the tuned backbone."""
        by_batch = self.training and self.config.batch_norm == "train"
        self._normalise_by_batch(by_batch and len(graphs.batch) > 1)
        return self.tuned(graphs)  # type: ignore[no-any-return]

    def loss_of(self, output: Output, batch: Batch) -> Loss:
        loss = super().loss_of(output, batch)
        loss.decomposes = not any(norm.training for norm in self._norms)
        return loss
