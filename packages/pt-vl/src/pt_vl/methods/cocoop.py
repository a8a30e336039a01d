"""CoCoOp: a context that depends on the image (Zhou et al., CVPR 2022)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pt_core.errors import InputError
from pt_core.method import Batch, MethodConfig, Output
from pt_vl.backbones import DualEncoder
from pt_vl.method import Sentences, VLConfig, VLMethod
from pt_vl.methods.coop import CoOpConfig, start


class CoCoOpConfig(VLConfig):
    """Settings of CoCoOp."""

    prompt_length: int | None = Field(None, ge=1, description="M; default: 16, or the tokens of `init`")
    init: str | None = Field("a photo of a", min_length=1, description="CoCoOp, vit_b16_c4_ep10_batch1_ctxv1.yaml")
    reduction: int = Field(16, ge=1, description="d / width of the meta-net's hidden layer; CoCoOp, section 3.2")
    lr: float = Field(0.002, gt=0, description="CoCoOp, vit_b16_c4_ep10_batch1_ctxv1.yaml; SGD, epoch-cosine")


class CoCoOp(VLMethod):
    """CoCoOp: v_m(x) = v_m + pi(x), one shift pi(x) = meta-net(norm(f)) of the image's features for all M context vectors.

    Pixels [B, 3, H, W] -> logits [B, C]; each image has its own class features [C, d]. The B x C sentences of a batch run as
    one: each image's [SOS] and context once, the class names behind it.

    Parameters: M d_t + d h + h + h d_t + d_t with h = d // 16. ViT-B/16, M = 4: 35,360.

    Fidelity: as released, but that the meta-net is kept in float32 (there in half precision), and any batch size goes (there
    1, since the classes of one image fill the memory).

    Reference: Zhou et al. Conditional Prompt Learning for Vision-Language Models. CVPR 2022.
    """

    name = "cocoop"
    config_class = CoCoOpConfig
    trains_text: ClassVar[bool] = True
    run: ClassVar[dict[str, Any]] = {"epochs": 10, "batch_size": 1}

    def __init__(self, backbone: DualEncoder, config: MethodConfig | None = None) -> None:
        super().__init__(backbone, config)
        plain = CoOpConfig(**self.config.model_dump(include={"class_names", "prompt_length", "init"}))
        self.context = nn.Parameter(start(backbone, plain, self.generator))
        self.sentences = Sentences(backbone, self.config.class_names, len(self.context))
        if (hidden := backbone.width // self.config.reduction) < 1:
            raise InputError(f"features have {backbone.width} values", field="reduction", remedy="Use a smaller one")
        with torch.random.fork_rng(devices=[]):  # torch's own start values, of this method's seed
            torch.manual_seed(self.config.seed)
            self.meta_net = nn.Sequential(
                nn.Linear(backbone.width, hidden), nn.ReLU(), nn.Linear(hidden, backbone.text_width)
            )

    def encode_text(self) -> Tensor:
        raise InputError("every image has class features of its own", remedy="Use class_features(image features)")

    def class_features(self, features: Tensor) -> Tensor:
        """Class features [B, C, d] for each of the images, whose own are [B, d]."""
        shift = self.meta_net(F.normalize(features.float(), dim=-1))
        contexts = self.context + shift[:, None].float()
        made: Tensor = self.sentences(contexts, per_image=True, chunk=self.config.text_chunk)
        return made

    def forward(self, batch: Batch) -> Output:
        features = self.image_features(batch)
        return Output(self.backbone.similarity(features, self.class_features(features)), features)
