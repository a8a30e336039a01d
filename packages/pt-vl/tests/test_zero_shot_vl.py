"""Zero-shot: templates, ensembles, and the harmonic mean that the field reports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from torch.testing import assert_close

from pt_vl.methods.zero_shot import ZeroShot, ZeroShotConfig

Make = Callable[..., Any]
CLASSES = ("cat", "big_house", "red car")


def test_logits_are_those_of_the_model_on_written_out_sentences(make_encoder: Make, make_images: Make) -> None:
    backbone = make_encoder()
    method = ZeroShot(backbone, ZeroShotConfig(class_names=CLASSES))
    batch = make_images(4).batch([0, 1, 2, 3])
    words = backbone.tokenise(["a photo of a cat.", "a photo of a big house.", "a photo of a red car."])
    expected = backbone.model(input_ids=words.ids, pixel_values=batch["pixels"]).logits_per_image
    assert_close(method(batch).logits, expected, rtol=1e-4, atol=1e-4)


def test_an_ensemble_normalises_averages_and_normalises(make_encoder: Make) -> None:
    backbone = make_encoder()
    templates = ("a photo of a {}.", "{} texture.", "a satellite photo of {}.")
    method = ZeroShot(backbone, ZeroShotConfig(class_names=CLASSES, templates=templates))
    means = []
    for name in ("cat", "big house", "red car"):
        each = [F.normalize(backbone.encode_text([t.format(name)])[0], dim=0) for t in templates]
        means.append(F.normalize(sum(each) / 3, dim=0))
    assert_close(method.text_features(), torch.stack(means), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(
        method.text_features(),
        F.normalize(ZeroShot(backbone, ZeroShotConfig(class_names=CLASSES)).text_features(), dim=-1),
    )


def test_building_an_ensemble_twice_gives_the_same(make_encoder: Make) -> None:
    config = ZeroShotConfig(class_names=CLASSES, templates=("a photo of a {}.", "{} texture."))
    backbone = make_encoder()
    first = ZeroShot(backbone, config).text_features()
    assert torch.equal(ZeroShot(backbone, config).text_features(), first)
    assert len(config.templates) == 2
