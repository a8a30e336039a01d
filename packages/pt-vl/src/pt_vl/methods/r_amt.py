"""R-AMT: regularised mask tuning of the image tower (Zheng et al., ICCV 2023)."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pt_core.errors import InputError
from pt_core.method import Batch, Loss, MethodConfig, Output
from pt_core.plan import FitConfig, device_of
from pt_core.training import FitResult, Loop, fit
from pt_vl.backbones import DualEncoder
from pt_vl.method import VLConfig, VLMethod, cache_features, template_features, written

if TYPE_CHECKING:
    from pt_core.data import Split

ATTENTION = re.compile(r"\.(self_attn\.[qkv]_proj|self_attn\.out_proj|attn\.in_proj|attn\.out_proj)[._]weight$")
MLP = re.compile(r"\.mlp\.(fc1|fc2|c_fc|c_proj)\.weight$")
QKV = re.compile(r"\.[qkv]_proj\.")
PATCHES = re.compile(r"(patch_embedding|visual\.conv1)\.weight$")
IMAGE = re.compile(r"^model\.(vision_model|visual)\.(?!attn_pool|head\.)")  # without the heads that pool


class RAMTConfig(VLConfig):
    """Settings of R-AMT."""

    masked: Literal["attention", "all"] = Field(
        "attention", description="weights of attention, or of the MLPs as well (PMT)"
    )
    mask_patches: bool = Field(True, description="mask the patch embedding too, as the released attention variant does")
    init: float = Field(0.01, description="start of every mask value; configs/trainers/MASK/vit_b16.yaml")
    threshold: float = Field(
        0.005,
        ge=0,
        lt=1,
        description="a weight stays where its mask value is larger; MASK/vit_b16.yaml. It tells apart 0 and 1, the values of "
        "an artifact's bits",
    )
    l2: float = Field(1e-4, ge=0, description="weight of the sum of the masks' norms; MASK/vit_b16.yaml")
    gradient_dropout: float = Field(
        1.0,
        ge=0,
        le=1,
        description="l: share of a dropped element's gradient that is taken away; 1, but .3 for 16 shots of all sets except "
        "ImageNet, SUN397 and Food101 (README); 0: off",
    )
    temperature: float = Field(1.0, gt=0, description="T of the zero-shot teacher; train.py")
    lr: float = Field(
        8e-5, gt=0, description="Adam, epoch-cosine-plain, 30 epochs, batch 32 (ImageNet 3e-5, 10 epochs); MASK/*.yaml"
    )


class _Binarise(torch.autograd.Function):
    """1 where the value is larger than the threshold, else 0; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, threshold: float) -> Tensor:
        return (values > threshold).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def binarise(values: Tensor, threshold: float) -> Tensor:
    """Bits of mask values, with a straight-through gradient."""
    found: Tensor = _Binarise.apply(values, threshold)
    return found


def keep_probability(a: Tensor, b: Tensor) -> Tensor:
    """P = (1 + sign(a) (a + b) / (|a| + |b| + 1e-8)) / 2: 1 where both gradients agree, |a| / (|a| + |b|) where not."""
    return 0.5 * (1 + a.sign() * (a + b) / (a.abs() + b.abs() + 1e-8))


def dropped(a: Tensor, b: Tensor, strength: float, draws: Tensor) -> Tensor:
    """The gradient a after gradient dropout: ((1 - l) + l [P > U]) a."""
    keep = (keep_probability(a, b) > draws).to(a.dtype)
    return ((1 - strength) + strength * keep) * a


def pack(bits: Tensor) -> Tensor:
    """Bits (any shape) as bytes, uint8 [ceil(numel / 8)]."""
    return torch.from_numpy(np.packbits(bits.flatten().bool().cpu().numpy()))


def unpack(packed: Tensor, shape: torch.Size) -> Tensor:
    """Inverse of `pack`."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=shape.numel())).view(shape)


class RAMT(VLMethod):
    """R-AMT: which weights of the image tower to switch off, W' = [M > tau] W; one trained number M per weight, one bit kept.

    Pixels [B, 3, H, W] -> logits [B, C]. Text is the frozen template's, class names in lower case. The gradient a of the task
    loss on M is dropped at random where it disagrees with the gradient b of staying with the zero-shot model's predictions.

    Parameters: one per masked weight. ViT-B/16: attention 28,311,552, with the patch embedding (the default) 28,901,376
    numbers in training, as many bits (3.6 MB) in an artifact. `folded()` gives the tower with W' in it, which costs nothing at
    inference.

    Fidelity: as released, with the teacher under no_grad (its gradients are not used there), lambda as in the README's prose
    (its example commands have the two values exchanged), and sparsity counted by the rule that masks (<= tau). Stacking on
    CoOp or Tip-Adapter is not offered, nor masks of CLIP's ResNets.

    Reference: Zheng et al. Regularized Mask Tuning. ICCV 2023.
    """

    name = "r-amt"
    config_class = RAMTConfig
    trains_image: ClassVar[bool] = True
    run: ClassVar[dict[str, Any]] = {
        "epochs": 30,
        "batch_size": 32,
        "optimiser": "adam",
        "momentum": 0,
        "weight_decay": 0,
        "schedule": "epoch-cosine-plain",
    }

    def __init__(self, backbone: DualEncoder, config: MethodConfig | None = None) -> None:
        super().__init__(backbone, config)
        chosen = [ATTENTION, *([MLP] if self.config.masked == "all" else [])]
        chosen += [PATCHES] if self.config.mask_patches else []
        self.weights = {
            name: weight
            for name, weight in backbone.named_parameters()
            if IMAGE.match(name) and any(pattern.search(name) for pattern in chosen)
        }
        if not any(ATTENTION.search(name) for name in self.weights):  # a ResNet has a patch embedding of a kind
            raise InputError("the image tower has no weights that masks are known for", remedy="Use a ViT of CLIP")
        full = [torch.full(weight.shape, self.config.init) for weight in self.weights.values()]
        self.masks = nn.ParameterList([nn.Parameter(values) for values in full])

    def bits(self) -> list[Tensor]:
        """1 where a weight stays, in the shapes of the weights."""
        return [binarise(mask, self.config.threshold) for mask in self.masks]

    @torch.no_grad()
    def sparsity(self) -> float:
        """Share of the masked tensors' weights that are switched off."""
        return 1 - sum(float(b.sum()) for b in self.bits()) / sum(b.numel() for b in self.masks)

    def encode_text(self) -> Tensor:
        names = [written(name).lower() for name in self.config.class_names]
        return template_features(self.backbone, names, self.config.templates, self.config.text_chunk)

    def encode_image(self, pixels: Tensor) -> Tensor:
        masked = {
            name: bits.to(weight.dtype) * weight
            for (name, weight), bits in zip(self.weights.items(), self.bits(), strict=True)
        }
        return self.backbone.call_with(masked, "image", pixels)

    def task_loss(self, logits: Tensor, labels: Tensor) -> Loss:
        """Cross-entropy and l2 * sum ||M||_2, summed over rows (the second is the same for each).

        Query, key and value of a block are one matrix in the published model and have one norm, however they are stored.
        """
        squares: dict[str, list[Tensor]] = {}
        for name, mask in zip(self.weights, self.masks, strict=True):
            squares.setdefault(QKV.sub(".", name), []).append(mask.square().sum())
        norms = torch.stack([torch.stack(parts).sum().sqrt() for parts in squares.values()]).sum()
        total = F.cross_entropy(logits, labels, reduction="sum") + self.config.l2 * norms * len(logits)
        return Loss(total, len(logits))

    def loss_of(self, output: Output, batch: Batch) -> Loss:
        """`task_loss`; in eval mode the cross-entropy alone, which other methods have too and which the kept bits decide."""
        if not self.training:
            return super().loss_of(output, batch)
        return self.task_loss(cast(Tensor, output.logits), batch["labels"])

    def agreement(self, logits: Tensor, teacher: Tensor) -> Tensor:
        """T^2 times the cross-entropy between the class probabilities of the teacher and of the masked model; mean over rows.

        Args:
            logits: of the masked model, [B, C].
            teacher: image features [B, d] of the tower as it is.
        """
        t = self.config.temperature
        known = self.backbone.similarity(teacher, self.text_features())
        return t**2 * F.cross_entropy(logits / t, (known / t).softmax(1))

    # --- the run ----------------------------------------------------------------------------------------------------
    def fit(
        self,
        train: Split,
        validation: Split | None = None,
        config: FitConfig | None = None,
        output_dir: str | Path | None = None,
    ) -> FitResult:
        """Train the masks; a step is two gradients of one batch, of which the second only says where the first counts.

        The teacher's features of fixed views are computed once.

        Raises:
            InputError: micro-batches are asked for: where gradients disagree is a question to the whole batch.
        """
        config = self.run_of(train, config, validation)
        if config.micro_batch_size is not None and config.micro_batch_size < min(config.batch_size, len(train)):
            raise InputError(
                f"{self.name} takes a batch as a whole",
                field="micro_batch_size",
                remedy="Leave it out; lower batch_size",
            )
        self.place(device_of(config))
        # As the student's passes: at the start both say the same, and no gradient is dropped.
        with torch.autocast(self.backbone.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            seen = cache_features(train, self.backbone, config.eval_batch_size)
        kept = None if seen is train else torch.stack([row["image_features"] for row in seen.rows])

        def step(loop: Loop, number: int, rows: list[int]) -> None:
            batch = loop.to_device(train.batch(rows))
            masks = list(self.masks)
            with torch.no_grad(), loop.passes():
                teacher = self.backbone.image(batch["pixels"]) if kept is None else loop.to_device(kept[rows])
            with loop.passes():
                logits = cast(Tensor, self(batch).logits)
                loss = self.task_loss(logits, batch["labels"])
            other: Sequence[Tensor] = ()
            if self.config.gradient_dropout:
                with loop.passes():
                    agreement = self.agreement(logits, teacher)
                other = torch.autograd.grad(agreement, masks, retain_graph=True)
            loop.backward(Loss.mean(loss.value), batch)
            if other:
                for mask, b in zip(masks, other, strict=True):
                    assert mask.grad is not None
                    draws = torch.rand_like(mask)
                    mask.grad.copy_(dropped(mask.grad, b, self.config.gradient_dropout, draws))
            loop.update()

        return fit(self, train, validation, config, output_dir, make_step=step)

    # --- what is kept -----------------------------------------------------------------------------------------------
    def kept_state(self) -> dict[str, Tensor]:
        """One bit per weight, packed into bytes."""
        return {f"bits.{i}": pack(bits) for i, bits in enumerate(self.bits())}

    def load_kept_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Mask values of 1 and 0, which the threshold tells apart. Raises InputError where the bits are not of this tower."""
        sizes = {f"bits.{i}": (mask.numel() + 7) // 8 for i, mask in enumerate(self.masks)}
        if sizes != {name: tensor.numel() for name, tensor in tensors.items()}:
            raise InputError("the masks are of another image tower, or of other weights of it", field="masks")
        for i, mask in enumerate(self.masks):
            mask.data.copy_(unpack(tensors[f"bits.{i}"], mask.shape))

    @torch.no_grad()
    def folded(self) -> DualEncoder:
        """A copy of the backbone with W' in the place of W: the frozen architecture, at its cost."""
        made = copy.deepcopy(self.backbone)
        weights = dict(made.named_parameters())
        for name, bits in zip(self.weights, self.bits(), strict=True):
            weights[name].mul_(bits.to(weights[name].dtype))
        return made
