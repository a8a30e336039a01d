"""UPT: unified prompt tuning (Zang et al., 2022), in the form of MVLPT's released code."""

from __future__ import annotations

from typing import ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from pt_core.method import MethodConfig
from pt_vl.backbones import DualEncoder, TowerPrompt
from pt_vl.method import Position, Sentences, VLConfig, VLMethod
from pt_vl.methods.vpt import visual_start


class UPTConfig(VLConfig):
    """Settings of UPT."""

    prompt_length: int = Field(4, ge=1, description="n, of the text and of each image block; MVLPT.md")
    hidden: int = Field(128, ge=1, description="h, width of the mixer; MVLPT, train.py PROJECT_DIM")
    mixer: Literal["transformer", "identity"] = Field(
        "transformer",
        description="identity: no mixing, so CoOp and deep VPT side by side; MVLPT, train.py PROJECT_METHOD",
    )
    position: Position = Field("middle", description="of the class name; MVLPT, scripts/mvlpt")
    repo_compat: bool = Field(False, description="a prompt attends to itself only in the mixer, as MVLPT's code runs")
    lr: float = Field(0.002, gt=0, description="MVLPT, vit_b16.yaml; SGD, epoch-cosine, 200 epochs, batch 32")


class Mixer(nn.Module):
    """One pre-norm transformer block over all prompts of both towers: width h, 1 head, MLP 4h, QuickGELU, no positions.

    Parameters: 12 h^2 + 13 h. h = 128: 198,272.

    Args:
        width: h.
        apart: each row attends to itself only, so that nothing is mixed.
    """

    def __init__(self, width: int, apart: bool = False) -> None:
        super().__init__()
        self.apart = apart
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 1, batch_first=True)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, rows: Tensor) -> Tensor:
        """[1, k, h] -> [1, k, h]."""
        x = self.norm1(rows)
        x = x.transpose(0, 1) if self.apart else x
        attended = self.attention(x, x, x, need_weights=False)[0]
        rows = rows + (attended.transpose(0, 1) if self.apart else attended)
        x = self.up(self.norm2(rows))
        return cast(Tensor, rows + self.down(x * torch.sigmoid(1.702 * x)))


def _linear(inputs: int, outputs: int) -> nn.Module:
    return nn.Identity() if inputs == outputs else nn.Linear(inputs, outputs)


class UPT(VLMethod):
    """UPT: text and visual prompts are projected to a common width, mixed by one transformer block, and projected back.

    Pixels [B, 3, H, W] -> logits [B, C]. Z = Block([T A_t; V A_v]), T [n, d_t], V [L n, d_v]; text gets the first n rows of
    Z, block l of the image tower the l-th n of the rest, between CLS and the patches.

    Parameters: n d_t + L n d_v + 2 d_t h + 2 d_v h + 2 h + d_t + d_v + 12 h^2 + 13 h. ViT-B/16, n = 4: 566,400. Once trained,
    the mixer can be dropped: what it gives are n d_t + L n d_v numbers.

    Fidelity: MVLPT's code, from which the counts are (the authors' own repository holds no code; there one set of tokens is
    shared and split behind the block, from memory). That code hands the prompts to an attention that takes them for the
    rows of a batch, so that there each attends to itself only and the towers do not meet; here they are mixed, as both papers
    say, and `repo_compat` does as the code. The projections have no skip, so prompts at the start are functions of random
    projections, as there. The mixer runs in float32. A context for each class, and words to start from, are not built.

    Reference: Zang et al. Unified Vision and Language Prompt Learning. 2022; Shen et al. MVLPT. WACV 2024.
    """

    name = "upt"
    config_class = UPTConfig
    trains_text: ClassVar[bool] = True
    trains_image: ClassVar[bool] = True

    def __init__(self, backbone: DualEncoder, config: MethodConfig | None = None) -> None:
        super().__init__(backbone, config)
        c, layers = self.config, backbone.image_layers
        context = torch.randn(c.prompt_length, backbone.text_width, generator=self.generator) * 0.02
        self.context = nn.Parameter(context)
        self.visual = nn.Parameter(visual_start(backbone, layers, c.prompt_length, "uniform", self.generator))
        self.sentences = Sentences(backbone, c.class_names, c.prompt_length, c.position)
        self.mixer: Mixer | None = None
        if c.mixer == "transformer":
            with torch.random.fork_rng(devices=[]):  # torch's own start values, of this method's seed
                torch.manual_seed(c.seed)
                self.text_in, self.text_out = (
                    _linear(backbone.text_width, c.hidden),
                    _linear(c.hidden, backbone.text_width),
                )
                self.image_in = _linear(backbone.image_width, c.hidden)
                self.image_out = _linear(c.hidden, backbone.image_width)
                self.mixer = Mixer(c.hidden, c.repo_compat)

    def prompts(self) -> tuple[Tensor, Tensor]:
        """Text prompts [n, d_t] and visual prompts [L, n, d_v], as they enter the towers."""
        if self.mixer is None:
            return self.context, self.visual
        n = len(self.context)
        with torch.autocast(self.context.device.type, enabled=False):
            rows = torch.cat([self.text_in(self.context), self.image_in(self.visual.flatten(0, 1))])
            mixed = self.mixer(rows[None])[0]
            return self.text_out(mixed[:n]), self.image_out(mixed[n:]).unflatten(0, (-1, n))

    def encode_text(self) -> Tensor:
        return self.sentences(self.prompts()[0], chunk=self.config.text_chunk)

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.backbone.image(pixels, dict(enumerate(self.prompts()[1])), place="after-cls")

    def as_prompt(self) -> TowerPrompt:
        """What the mixer makes of the prompts now: rows of both towers. The context has to stand in front of the name."""
        if self.config.position != "end":
            return super().as_prompt()
        context, visual = self.prompts()
        return TowerPrompt(context, image=dict(enumerate(visual)), place="after-cls")
