"""MaPLe: multi-modal prompt learning (Khattak et al., CVPR 2023)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from pt_core.method import MethodConfig
from pt_vl.backbones import DualEncoder, TowerPrompt
from pt_vl.method import Sentences, VLConfig, VLMethod
from pt_vl.methods.ivlp import words_and_start
from pt_vl.methods.vpt import check_depth


class MaPLeConfig(VLConfig):
    """Settings of MaPLe."""

    prompt_length: int = Field(2, ge=1, description="n; MaPLe, vit_b16_c2_ep5_batch4_2ctx.yaml")
    depth: int = Field(9, ge=1, description="J, blocks with prompts; 9, cross-data-set 3 (MaPLe, yaml files)")
    init: str = Field("a photo of a", description="words that the first text prompts start from; MaPLe, yaml files")
    lr: float = Field(
        0.0035, gt=0, description="MaPLe yaml; cross-data-set 0.0026 for 2 epochs; SGD, epoch-cosine, 5 epochs, batch 4"
    )


class MaPLe(VLMethod):
    """MaPLe: deep text prompts t_0 .. t_{J-1}, and visual prompts that are linear functions of them, v_l = W_l t_l + b_l.

    Pixels [B, 3, H, W] -> logits [B, C]. Text: [SOS] t_0 "of a" name "." [EOS], t_l over the rows of t_0 at block l. Image:
    v_0 behind the patches, in front of the first norm, v_l in its place at block l. After block J the rows flow on.

    Parameters: J n d_t + J (d_t d_v + d_v). ViT-B/16, n = 2, J = 9: 3,555,072.

    Fidelity: as released, with its quirks: the J - 1 deep projections start as clones of one; with n = 2 the words "of a" of
    the phrase stay frozen. There all of it is in half precision; here what is trained is float32.

    Reference: Khattak et al. MaPLe: Multi-modal Prompt Learning. CVPR 2023.
    """

    name = "maple"
    config_class = MaPLeConfig
    trains_text: ClassVar[bool] = True
    trains_image: ClassVar[bool] = True
    run: ClassVar[dict[str, Any]] = {"epochs": 5, "batch_size": 4}

    def __init__(self, backbone: DualEncoder, config: MethodConfig | None = None) -> None:
        super().__init__(backbone, config)
        c = self.config
        check_depth(c.depth, min(backbone.text_layers, backbone.image_layers), "depth")
        context, words = words_and_start(backbone, c.init, c.prompt_length, self.generator)
        self.context = nn.Parameter(context)
        self.deep = nn.Parameter(torch.randn(c.depth - 1, *context.shape, generator=self.generator) * 0.02)
        with torch.random.fork_rng(devices=[]):  # torch's own start values, of this method's seed
            torch.manual_seed(c.seed)
            self.projection = nn.Linear(backbone.text_width, backbone.image_width)
            clone = nn.Linear(backbone.text_width, backbone.image_width)
        self.deep_projections = nn.ModuleList(
            nn.Linear(backbone.text_width, backbone.image_width) for _ in range(c.depth - 1)
        )
        for projection in self.deep_projections:
            projection.load_state_dict(clone.state_dict())
        self.sentences = Sentences(backbone, c.class_names, c.prompt_length, words=words)

    def visual_prompts(self) -> list[Tensor]:
        """v_0 .. v_{J-1}, [n, d_v] each."""
        deep = [projection(t) for projection, t in zip(self.deep_projections, self.deep, strict=True)]
        return [self.projection(self.context), *deep]

    def encode_text(self) -> Tensor:
        return self.sentences(self.context, dict(enumerate(self.deep, start=1)), chunk=self.config.text_chunk)

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.backbone.image(pixels, dict(enumerate(self.visual_prompts())))

    def as_prompt(self) -> TowerPrompt:
        """The rows of both towers as they are now, without the projections that made those of the image. The frozen words
        behind the context belong to the text: `"of a cat."` is read as here."""
        return TowerPrompt(self.context, dict(enumerate(self.deep, start=1)), dict(enumerate(self.visual_prompts())))
