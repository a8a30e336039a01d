"""RESTORE: multi-modal prompts whose feature shift is the same in both towers (2024)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from pt_core.method import Batch, Loss, MethodConfig, Output
from pt_core.plan import FitConfig
from pt_core.tokens import Tokens, real
from pt_core.training import FitResult, fit
from pt_vl.backbones import DualEncoder, TowerPrompt
from pt_vl.method import VLMethod
from pt_vl.methods.maple import MaPLe, MaPLeConfig

if TYPE_CHECKING:
    from pt_core.data import Split


class RESTOREConfig(MaPLeConfig):
    """Settings of RESTORE; learning rate, prompts and depth as MaPLe's, 10 epochs (2 across data sets)."""

    alpha_text: float = Field(
        0.1, ge=0, description="blend of the text surgery; run_maple_fsa.sh: .1, sun397/ucf/imagenet .05"
    )
    alpha_image: float = Field(
        0.1, ge=0, description="blend of the image surgery; run_maple_fsa.sh: .01 to .15 by data set"
    )
    gamma: float = Field(1.0, ge=0, description="weight of the feature-shift term; run_maple_fsa.sh: 1, DTD .5")
    growth_text: float = Field(
        0.02, ge=0, description="of alpha_text by the prompts' norm, once; trainers/maple_fsa.py"
    )
    growth_image: float = Field(0.005, ge=0, description="of alpha_image, once; trainers/maple_fsa.py")
    shift: Literal["gram", "feature"] = Field(
        "gram",
        description="gram: the norm of P^T P of each block's prompts, relative to its start (released code); feature: how far "
        "the prompts move each block's outputs, relative to their size (the paper's notion; normalisation is our choice)",
    )


class Surgery(nn.Module):
    """x + alpha FFN(LN(x)), FFN: d -> 4d, QuickGELU, 4d -> d. Parameters: 8 d^2 + 7 d."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, alpha: Tensor) -> Tensor:
        """[..., d] -> [..., d]."""
        y = self.up(self.norm(x.float()))
        return x + (alpha * self.down(y * torch.sigmoid(1.702 * y))).to(x.dtype)


def gram_norm(rows: Tensor) -> Tensor:
    """||P^T P||_F of prompts P [..., n, d], over the n x n Gram matrix, which has the same norm: [...]."""
    rows = rows.float()
    return torch.linalg.matrix_norm(rows @ rows.transpose(-1, -2))


class RESTORE(MaPLe):
    """RESTORE: MaPLe with a penalty on different feature shifts of the towers, and a surgery block behind each of them.

    Pixels [B, 3, H, W] -> logits [B, C]. Loss: CE + gamma sum_{l=1}^{J-1} (s_t(l) - s_v(l))^2, s(l) the norm of the prompts of
    block l in relation to its start. Text and image features pass x + alpha FFN(LN(x)) with their own block and alpha; the
    two alphas are no parameters and grow once, at the end of epoch floor(E / 3), with the prompts' norms.

    Parameters: MaPLe's + 2 (8 d^2 + 7 d). ViT-B/16, n = 2, J = 9: 7,756,544.

    Fidelity: the released code (trainer MaPLe_FSA). Start norms and alphas are buffers and so part of every checkpoint, where
    the code keeps attributes that a resumed run would set anew. The dynamic surgery may be continuous in the paper (not
    known); the code makes it once, and so does this, in every run anew: one that goes on from trained prompts (a transfer)
    starts with the configuration's alphas, and measures its prompts against the norms that they come with. `shift="feature"`
    is a ratio of means over the batch, which does not decompose: it is refused with micro-batches and several processes.

    Reference: RESTORE: Towards Feature Shift for Vision-Language Prompt Learning. arXiv 2403.06136, 2024.
    """

    name = "restore"
    config_class = RESTOREConfig
    run: ClassVar[dict[str, Any]] = {"epochs": 10, "batch_size": 4}
    alphas: Tensor
    anchors: Tensor
    origin: Tensor

    def __init__(self, backbone: DualEncoder, config: MethodConfig | None = None) -> None:
        super().__init__(backbone, config)
        with torch.random.fork_rng(devices=[]):  # torch's own start values, of this method's seed
            torch.manual_seed(self.config.seed + 1)
            self.text_surgery, self.image_surgery = Surgery(backbone.width), Surgery(backbone.width)
        self.register_buffer("alphas", torch.tensor([self.config.alpha_text, self.config.alpha_image]))
        with torch.no_grad():
            self.register_buffer("anchors", self.norms())
        self.register_buffer("origin", self.context.detach().clone(), persistent=False)

    def norms(self) -> Tensor:
        """Norms of the deep prompts of text (first row) and image, [2, J - 1]."""
        visual = self.visual_prompts()[1:]
        if not visual:
            return self.deep.new_zeros(2, 0)
        return torch.stack([gram_norm(self.deep), gram_norm(torch.stack(visual))])

    def encode_text(self) -> Tensor:
        return cast(Tensor, self.text_surgery(super().encode_text(), self.alphas[0]))

    def encode_image(self, pixels: Tensor) -> Tensor:
        return cast(Tensor, self.image_surgery(super().encode_image(pixels), self.alphas[1]))

    def as_prompt(self) -> TowerPrompt:
        return VLMethod.as_prompt(self)  # the surgery blocks are no rows

    def shifts(self, batch: Batch) -> Tensor:
        """s_t and s_v of blocks 1 .. J-1, [2, J - 1]."""
        if self.config.shift == "gram" or self.config.depth == 1:
            return self.norms() / self.anchors
        return torch.stack([self._text_shift(), self._image_shift(batch["pixels"])])

    def loss_of(self, output: Output, batch: Batch) -> Loss:
        """CE + gamma * feature-shift term, summed over rows (the second is the same for each); in eval mode CE alone, which
        other methods have too.

        The shift of features is one of the whole batch.
        """
        loss = super().loss_of(output, batch)
        if not self.training:
            return loss
        rows = loss.count
        text, image = self.shifts(batch)
        term = (text - image).square().sum() * rows
        parts = {"cross_entropy": loss.total, "feature_shift": term}
        whole = self.config.shift == "feature" and self.config.depth > 1
        return Loss(loss.total + self.config.gamma * term, rows, parts, decomposes=not whole)

    # --- the paper's notion of shift --------------------------------------------------------------------------------
    def _text_shift(self) -> Tensor:
        first, n = self.backbone.text_tower.first, len(self.context)

        def words(tokens: Tokens) -> Tensor:
            rows = torch.cat([tokens.hidden[:, :first], tokens.hidden[:, first + n :]], dim=1)
            # What is behind the slot that is pooled only fills the row up to the longest class name.
            read = torch.arange(rows.shape[1]) <= self.sentences.eot[:, None].cpu() - n
            return rows[tuple(at.to(rows.device) for at in read.nonzero(as_tuple=True))]

        def run(after: Callable[[int, Tokens], Tokens], prompted: bool) -> None:
            deep = dict(enumerate(self.deep, start=1)) if prompted else None
            self.sentences(self.context if prompted else self.origin, deep, after=after)

        return self._shift(run, words)

    def _image_shift(self, pixels: Tensor) -> Tensor:
        def run(after: Callable[[int, Tokens], Tokens], prompted: bool) -> None:
            self.backbone.image(pixels, dict(enumerate(self.visual_prompts())) if prompted else None, after=after)

        return self._shift(run, real)

    def _shift(
        self, run: Callable[[Callable[[int, Tokens], Tokens], bool], None], read: Callable[[Tokens], Tensor]
    ) -> Tensor:
        """Mean squared change of each block's outputs by the prompts, over their mean square: blocks 1 .. J-1, [J - 1]."""

        def outputs(prompted: bool) -> Mapping[int, Tensor]:
            found: dict[int, Tensor] = {}

            def keep(index: int, tokens: Tokens) -> Tokens:
                if 1 <= index < self.config.depth:
                    found[index] = read(tokens).float()
                return tokens

            run(keep, prompted)
            return found

        with torch.no_grad():
            plain = outputs(False)
        moved = outputs(True)
        return torch.stack([(moved[i] - h).square().mean() / h.square().mean() for i, h in plain.items()])

    # --- the run ----------------------------------------------------------------------------------------------------
    def fit(
        self,
        train: Split,
        validation: Split | None = None,
        config: FitConfig | None = None,
        output_dir: str | Path | None = None,
    ) -> FitResult:
        """Supervised training; alphas grow once, when epoch floor(E / 3), counted from 0, has ended."""
        config = self.run_of(train, config, validation)
        # Every run starts so, also one that goes on from trained prompts; one that is resumed loads its own.
        with torch.no_grad():
            self.alphas.copy_(self.alphas.new_tensor([self.config.alpha_text, self.config.alpha_image]))
            self.anchors.copy_(self.norms())
        per_epoch = math.ceil(len(train) / min(config.batch_size, len(train)))
        epochs = config.epochs or math.ceil((config.max_steps or 1) / per_epoch)
        due = min((epochs // 3 + 1) * per_epoch, config.max_steps or epochs * per_epoch)

        def grow(step: int) -> None:
            if step == due:
                self.grow_alphas()

        return fit(self, train, validation, config, output_dir, after_step=grow)

    @torch.no_grad()
    def grow_alphas(self) -> None:
        """alpha += growth * mean over blocks of the prompts' norms, of each tower."""
        if self.config.depth > 1:
            rates = self.alphas.new_tensor([self.config.growth_text, self.config.growth_image])
            self.alphas += rates * self.norms().mean(1)
