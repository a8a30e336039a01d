"""VPT: visual prompt tuning, shallow and deep, on a dual encoder (Jia et al., ECCV 2022)."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pt_core.errors import InputError
from pt_core.method import MethodConfig
from pt_vl.backbones import DualEncoder, Place, TowerPrompt
from pt_vl.method import VLConfig, VLMethod


class VPTConfig(VLConfig):
    """Settings of VPT."""

    prompt_length: int = Field(8, ge=1, description="n; MaPLe's code, configs/trainers/VPT (deep)")
    depth: int | None = Field(
        None, ge=1, description="J, blocks with prompts of their own; 1: shallow; default: all, MaPLe's code (12 of 12)"
    )
    place: Place = Field(
        "before-ln-pre",
        description="where the first rows enter: last, in front of the first norm (MaPLe's code), or behind CLS, after it "
        "(MVLPT's). Different functions: prompts do not carry over",
    )
    init: Literal["normal", "uniform"] = Field(
        "normal",
        description="N(0, 0.02^2) (CLIP's, MaPLe's code), or U(-a, a), a = sqrt(6 / (3 p^2 + d_v)) (Jia et al.)",
    )
    lr: float = Field(
        0.0025, gt=0, description="MaPLe's code, configs/trainers/VPT; SGD, epoch-cosine, 5 epochs, batch 4"
    )


def uniform_bound(patch: int, width: int) -> float:
    """a = sqrt(6 / (3 p^2 + d_v)): Xavier's bound of the patch embedding (Jia et al. 2022, released code)."""
    return math.sqrt(6 / (3 * patch**2 + width))


def check_depth(depth: int, blocks: int, field: str) -> None:
    """Refuse prompts for more blocks than a tower has; `field` is the setting that asks for them."""
    if depth > blocks:
        raise InputError(
            f"prompts for {depth} blocks, the tower has {blocks}", field=field, remedy=f"Use at most {blocks}"
        )


def visual_start(backbone: DualEncoder, depth: int, length: int, init: str, generator: torch.Generator) -> Tensor:
    """Start values of visual prompts, [J, n, d_v]."""
    shape = (depth, length, backbone.image_width)
    if init == "uniform":
        bound = uniform_bound(backbone.patch_size, backbone.image_width)
        return (torch.rand(shape, generator=generator) * 2 - 1) * bound
    return torch.randn(shape, generator=generator) * 0.02


class VPT(VLMethod):
    """VPT: n trained rows among the patches; deep: block l = 1 .. J-1 gets fresh rows in the place of those below.

    Pixels [B, 3, H, W] -> logits [B, C]. Text is the frozen template's and is read once.

    Parameters: J n d_v. ViT-B/16, n = 8, J = 12: 73,728.

    Fidelity: Jia et al. tune a plain ViT with a linear head; on CLIP the class names stay the classifier, as in the codes of
    MaPLe and MVLPT, whose two places of insertion are named options. No dropout on prompts (0 there as well).

    Reference: Jia et al. Visual Prompt Tuning. ECCV 2022.
    """

    name = "vpt"
    config_class = VPTConfig
    trains_image: ClassVar[bool] = True
    run: ClassVar[dict[str, Any]] = {"epochs": 5, "batch_size": 4}

    def __init__(self, backbone: DualEncoder, config: MethodConfig | None = None) -> None:
        super().__init__(backbone, config)
        c = self.config
        depth = backbone.image_layers if c.depth is None else c.depth
        check_depth(depth, backbone.image_layers, "depth")
        self.visual = nn.Parameter(visual_start(backbone, depth, c.prompt_length, c.init, self.generator))

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.backbone.image(pixels, dict(enumerate(self.visual)), place=self.config.place)

    def as_prompt(self) -> TowerPrompt:
        """The rows of the image tower."""
        return TowerPrompt(image=dict(enumerate(self.visual)), place=self.config.place)
