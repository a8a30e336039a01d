"""CoOp: context optimisation (Zhou et al., IJCV 2022)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from pt_core.errors import InputError
from pt_core.method import MethodConfig
from pt_core.plan import FitConfig
from pt_vl.backbones import DualEncoder, TowerPrompt
from pt_vl.method import Position, Sentences, VLConfig, VLMethod

if TYPE_CHECKING:
    from pt_core.data import Split


class CoOpConfig(VLConfig):
    """Settings of CoOp."""

    prompt_length: int | None = Field(
        None, ge=1, description="M; default: 16 (CoOp, vit_b16.yaml), or the tokens of `init`"
    )
    init: str | None = Field(
        None,
        min_length=1,
        description='words to start from ("a photo of a": M = 4, CoOp\'s base-to-new setting); None: N(0, 0.02^2)',
    )
    position: Position = Field("end", description="of the class name; CoOp, train.py")
    class_specific: bool = Field(False, description="a context for each class; CoOp, train.py: CSC False")
    lr: float = Field(
        0.002,
        gt=0,
        description="CoOp, configs/trainers/CoOp/vit_b16.yaml; SGD, epoch-cosine, batch 32, 200 epochs with 16 or 8 shots, "
        "100 with 4 or 2, 50 with one (ImageNet 50 with any); COOP.md",
    )


def start(backbone: DualEncoder, config: CoOpConfig, generator: torch.Generator) -> Tensor:
    """Start values [M, d_t] (or [C, M, d_t]) of a context.

    Raises:
        InputError: the words to start from have no tokens, or not as many as the context.
    """
    length, copies = config.prompt_length, (len(config.class_names),) if config.class_specific else ()
    if config.init is None:
        return torch.randn(*copies, length or 16, backbone.text_width, generator=generator) * 0.02
    ids = backbone.plain_ids(config.init)
    if not ids:
        raise InputError(
            f"{config.init!r} has no words to start from", field="init", remedy="Give some, or leave it out"
        )
    if length not in (None, len(ids)):
        raise InputError(
            f"{config.init!r} has {len(ids)} tokens, the context {length}",
            field="init",
            remedy="Leave prompt_length out",
        )
    rows = backbone.embed_words(torch.tensor(ids)).detach().float().cpu()
    return rows.expand(*copies, -1, -1).clone()


class CoOp(VLMethod):
    """CoOp: the words around the class name are trained vectors, [SOS] v_1 .. v_M name "." [EOS].

    Pixels [B, 3, H, W] -> logits [B, C]. The image tower is as it was: without augmentation its features are computed once,
    and a training step is one text pass over the classes.

    Parameters: M d_t, or C M d_t if class-specific. ViT-B/16, M = 16: 8,192.

    Fidelity: prompts, start values and positions are the released code's ("middle" splits the context at M // 2; what
    stands in front of its last part is as many tokens of name "." as the name has by itself). There the text tower reads
    all 77 slots in half precision for each class; here it is cut at the longest class and reads what the classes share
    once, with the same values.

    Reference: Zhou et al. Learning to Prompt for Vision-Language Models. IJCV 2022.
    """

    name = "coop"
    config_class = CoOpConfig
    trains_text: ClassVar[bool] = True

    def __init__(self, backbone: DualEncoder, config: MethodConfig | None = None) -> None:
        super().__init__(backbone, config)
        self.context = nn.Parameter(start(backbone, self.config, self.generator))
        self.sentences = Sentences(backbone, self.config.class_names, self.context.shape[-2], self.config.position)

    @property
    def class_bound(self) -> bool:
        return bool(self.config.class_specific)

    def published(self, train: Split) -> FitConfig:
        """200 epochs with 16 or 8 shots, 100 with 4 or 2, 50 with one (COOP.md); a run on ImageNet has to say its 50 itself."""
        shots = len(train) / len(self.config.class_names)
        return super().published(train).model_copy(update={"epochs": 200 if shots > 4 else 100 if shots > 1 else 50})

    def encode_text(self) -> Tensor:
        return self.sentences(self.context, chunk=self.config.text_chunk)

    def as_prompt(self) -> TowerPrompt:
        """The context in front of whatever text the model reads, so that `"cat."` is read as here."""
        if self.config.class_specific or self.config.position != "end":
            return super().as_prompt()
        return TowerPrompt(context=self.context)
