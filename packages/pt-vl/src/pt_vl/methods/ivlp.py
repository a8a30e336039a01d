"""IVLP: independent prompts in both towers (Khattak et al., CVPR 2023, as a baseline of MaPLe)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from pt_core.errors import InputError
from pt_core.method import MethodConfig
from pt_vl.backbones import DualEncoder, TowerPrompt
from pt_vl.method import Sentences, VLConfig, VLMethod
from pt_vl.methods.vpt import check_depth, visual_start


class IVLPConfig(VLConfig):
    """Settings of IVLP."""

    text_length: int = Field(2, ge=1, description="n of the text tower; MaPLe's code, IVLP yaml (4 for language only)")
    text_depth: int | None = Field(None, ge=1, description="text blocks with prompts; default: all (12 of 12)")
    image_length: int = Field(2, ge=1, description="n of the image tower; MaPLe's code, IVLP yaml")
    image_depth: int | None = Field(
        None, ge=0, description="image blocks with prompts; default: all; 0: language only ('deep language prompting')"
    )
    init: str = Field(
        "a photo of a", description="words that the first text prompts start from; the others stay frozen"
    )
    lr: float = Field(
        0.0035, gt=0, description="MaPLe's code, IVLP yaml (language only: 0.0025); SGD, 5 epochs, batch 4"
    )


def words_and_start(backbone: DualEncoder, init: str, length: int, generator: torch.Generator) -> tuple[Tensor, str]:
    """Start [n, d_t] from the first n tokens of a phrase, and the words behind them, which stay frozen.

    As released, a phrase of fewer words than n is not used: N(0, 0.02^2), and no frozen words.

    Raises:
        InputError: a word is cut in the middle.
    """
    ids, words = backbone.plain_ids(init), init.split()
    if len(ids) < length:
        return torch.randn(length, backbone.text_width, generator=generator) * 0.02, ""
    for taken in range(len(words) + 1):
        if len(backbone.plain_ids(" ".join(words[:taken]))) == length:
            rows = backbone.embed_words(torch.tensor(ids[:length])).detach().float().cpu()
            return rows.clone(), " ".join(words[taken:])
    raise InputError(f"{length} tokens of {init!r} end inside of a word", field="init", remedy="Use another phrase")


class IVLP(VLMethod):
    """IVLP: deep prompts in the text tower and in the image tower that know nothing of each other.

    Pixels [B, 3, H, W] -> logits [B, C]. Text: [SOS] v_1 .. v_n "of a" name "." [EOS], fresh rows over v_1 .. v_n at blocks
    1 .. J-1. Image: n rows behind the patches, in front of the first norm, overwritten likewise.

    Parameters: J_t n_t d_t + J_v n_v d_v. ViT-B/16, n = 2, J = 12: 30,720.

    Fidelity: as released (MaPLe's repository): with n = 2 and "a photo of a", the trained tokens are "a photo", and "of a"
    stays frozen behind them.

    Reference: Khattak et al. MaPLe: Multi-modal Prompt Learning. CVPR 2023, section 4 (Independent V-L prompting).
    """

    name = "ivlp"
    config_class = IVLPConfig
    trains_text: ClassVar[bool] = True
    trains_image: ClassVar[bool] = True
    run: ClassVar[dict[str, Any]] = {"epochs": 5, "batch_size": 4}

    def __init__(self, backbone: DualEncoder, config: MethodConfig | None = None) -> None:
        super().__init__(backbone, config)
        c = self.config
        depth = backbone.text_layers if c.text_depth is None else c.text_depth
        check_depth(depth, backbone.text_layers, "text_depth")
        context, words = words_and_start(backbone, c.init, c.text_length, self.generator)
        self.context = nn.Parameter(context)
        self.deep = nn.Parameter(torch.randn(depth - 1, *context.shape, generator=self.generator) * 0.02)
        depth = backbone.image_layers if c.image_depth is None else c.image_depth
        check_depth(depth, backbone.image_layers, "image_depth")
        self.visual = nn.Parameter(visual_start(backbone, depth, c.image_length, "normal", self.generator))
        self.trains_image = depth > 0  # type: ignore[misc]
        self.sentences = Sentences(backbone, c.class_names, c.text_length, words=words)

    def encode_text(self) -> Tensor:
        return self.sentences(self.context, dict(enumerate(self.deep, start=1)), chunk=self.config.text_chunk)

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.backbone.image(pixels, dict(enumerate(self.visual)))

    def as_prompt(self) -> TowerPrompt:
        """The rows of both towers. The frozen words behind the context belong to the text: `"of a cat."` is read as here."""
        return TowerPrompt(self.context, dict(enumerate(self.deep, start=1)), dict(enumerate(self.visual)))
