"""VPT: start values, depth, and what the prompts change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pt_core import InputError
from pt_vl.methods.vpt import VPT, VPTConfig, uniform_bound

NAMES = ("cat", "dog")


def vpt(encoder: Any, **settings: Any) -> VPT:
    return VPT(encoder, VPTConfig(class_names=NAMES, **settings))


def test_the_uniform_start_has_the_bound_of_the_patch_embedding(make_encoder: Callable[..., Any]) -> None:
    assert uniform_bound(16, 768) == 0.0625
    assert uniform_bound(32, 768) == pytest.approx(0.03953, abs=1e-5)
    method = vpt(make_encoder(), init="uniform", prompt_length=50)
    bound = uniform_bound(4, 24)
    assert float(method.visual.abs().max()) <= bound
    assert float(method.visual.abs().max()) > 0.99 * bound


def test_depth_one_is_the_shallow_prompt(make_encoder: Callable[..., Any], pixels: torch.Tensor) -> None:
    shallow, deep = vpt(make_encoder(), depth=1, prompt_length=2), vpt(make_encoder(), prompt_length=2)
    assert (shallow.count(), deep.count()) == (1 * 2 * 24, 3 * 2 * 24)
    expected = shallow.backbone.image(pixels, {0: shallow.visual[0]})
    assert torch.equal(shallow.encode_image(pixels), expected)
    assert not torch.allclose(deep.encode_image(pixels), expected, atol=1e-3)


def test_the_order_of_prompt_rows_does_not_matter(make_encoder: Callable[..., Any], pixels: torch.Tensor) -> None:
    method = vpt(make_encoder(), prompt_length=3)
    before = method.encode_image(pixels)
    with torch.no_grad():
        method.visual.copy_(method.visual[:, [2, 0, 1]])
    torch.testing.assert_close(method.encode_image(pixels), before, rtol=1e-5, atol=1e-5)


def test_the_two_places_of_insertion_are_different_functions(make_encoder: Any, pixels: torch.Tensor) -> None:
    before, after = vpt(make_encoder()), vpt(make_encoder(), place="after-cls")
    assert torch.equal(before.visual, after.visual)
    assert not torch.allclose(before.encode_image(pixels), after.encode_image(pixels), atol=1e-3)


def test_text_is_that_of_the_frozen_model(make_encoder: Callable[..., Any]) -> None:
    method = vpt(make_encoder())
    torch.testing.assert_close(
        method.text_features(), method.backbone.encode_text(["a photo of a cat.", "a photo of a dog."])
    )


def test_more_blocks_than_the_tower_has_are_refused(make_encoder: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="prompts for 4 blocks, the tower has 3"):
        vpt(make_encoder(), depth=4)
