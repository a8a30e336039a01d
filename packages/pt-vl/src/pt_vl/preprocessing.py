"""Images as a model was trained on them: resizing, cropping, scale and normalisation."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from pt_core.errors import InputError
from pt_core.settings import Settings


class Preprocessing(Settings):
    """How an image becomes pixels: resized, cropped to a square, scaled to [0, 1], normalised. Saved with every prompt.

    Defaults: CLIP's (Radford et al. 2021, released code). The longer side is rounded as there, by torchvision; Hugging Face's
    processors cut it off, so that at some sizes their centre crop lies a pixel aside.
    """

    size: int = Field(224, ge=1, description="pixels of a side that the model takes")
    resize: int | None = Field(None, ge=1, description="of the shorter side before the centre crop; default: `size`")
    squash: bool = Field(False, description="resize both sides to `size` instead of cropping (SigLIP)")
    interpolation: Literal["bicubic", "bilinear", "nearest", "lanczos"] = "bicubic"
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    @property
    def mode(self) -> InterpolationMode:
        return InterpolationMode(self.interpolation)

    def normalise(self, image: Any) -> Tensor:
        """A PIL image of the right size, or uint8 [3, size, size] -> float32 [3, size, size]."""
        return v2.functional.normalize(
            v2.functional.to_dtype(v2.functional.to_image(image), torch.float32, scale=True),
            list(self.mean),
            list(self.std),
        )

    def view(self, image: Any) -> Any:
        """A PIL image, resized and cropped."""
        if self.squash:
            return v2.functional.resize(image, [self.size, self.size], self.mode)
        image = v2.functional.resize(image, [self.resize or self.size], self.mode)
        return v2.functional.center_crop(image, [self.size, self.size])

    def __call__(self, image: Any) -> Tensor:
        """A PIL image in RGB -> float32 [3, size, size]."""
        return self.normalise(self.view(image))


def hf_preprocessing(processor: Any, size: int) -> Preprocessing:
    """The settings of a Hugging Face image processor.

    Raises:
        InputError: it does what `Preprocessing` has no words for.
    """
    wanted, square = dict(processor.size), {"height": size, "width": size}
    short = wanted.get("shortest_edge")
    crop = dict(processor.crop_size) if getattr(processor, "do_center_crop", False) else None
    kinds = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
    known = {
        "do_resize": processor.do_resize,
        "do_rescale": processor.do_rescale,
        "rescale_factor": math.isclose(processor.rescale_factor, 1 / 255),
        "do_normalize": processor.do_normalize,
        "resample": int(processor.resample) in kinds,
        "size": crop == square if short else wanted == square and crop in (None, square),
    }
    if unknown := [name for name, right in known.items() if not right]:
        raise unknown_preprocessing(f"the image processor's {unknown[0]!r}")
    return Preprocessing(
        size=size,
        resize=short if short and short != size else None,
        squash=not short,
        interpolation=kinds[int(processor.resample)],
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
    )


def unknown_preprocessing(what: str) -> InputError:
    return InputError(
        f"{what} asks for a preprocessing that is not known here",
        remedy="Say how images are to be prepared: DualEncoder(model, processor, preprocessing=Preprocessing(...))",
    )
