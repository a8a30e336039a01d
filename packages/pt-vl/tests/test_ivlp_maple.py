"""Deep prompts in both towers: IVLP (independent) and MaPLe (visual prompts are functions of the text's)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pt_core import FitConfig, InputError
from pt_vl.methods.ivlp import IVLP, IVLPConfig, words_and_start
from pt_vl.methods.maple import MaPLe, MaPLeConfig

NAMES = ("cat", "red dog", "house")


def ivlp(encoder: Any, **settings: Any) -> IVLP:
    return IVLP(encoder, IVLPConfig(class_names=NAMES, **settings))


def maple(encoder: Any, **settings: Any) -> MaPLe:
    return MaPLe(encoder, MaPLeConfig(class_names=NAMES, **({"depth": 3} | settings)))


def shaken(method: Any) -> Any:
    """With deep prompts of a size at which they matter."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        method.deep.copy_(torch.randn(method.deep.shape, generator=draw))
    return method


def test_parameter_counts(make_encoder: Callable[..., Any]) -> None:
    assert ivlp(make_encoder()).count() == 3 * 2 * 16 + 3 * 2 * 24
    assert ivlp(make_encoder(), text_length=4, image_depth=0).count() == 3 * 4 * 16
    assert maple(make_encoder()).count() == 3 * 2 * 16 + 3 * (16 * 24 + 24)
    assert 9 * 2 * 512 + 9 * (512 * 768 + 768) == 3_555_072
    assert maple(make_encoder(), depth=1).count() == 2 * 16 + 16 * 24 + 24


def test_without_image_prompts_images_pass_the_tower_once(
    make_encoder: Callable[..., Any], make_images: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, passed = make_encoder(), list[int]()
    method, image = ivlp(encoder, image_depth=0), encoder.image
    monkeypatch.setattr(encoder, "image", lambda pixels, *rest: passed.append(len(pixels)) or image(pixels, *rest))
    method.fit(make_images(6), None, FitConfig(epochs=3, batch_size=2, device="cpu", progress=False))
    assert sum(passed) == 6
    assert ivlp(encoder).trains_image and not method.trains_image


def test_the_first_words_are_trained_and_the_others_stay_frozen(make_encoder: Callable[..., Any]) -> None:
    encoder = make_encoder()
    rows, words = words_and_start(encoder, "a photo of a", 2, torch.Generator())
    assert words == "of a"
    assert torch.equal(rows, encoder.embed_words(torch.tensor(encoder.plain_ids("a photo"))).detach())
    drawn, none = words_and_start(encoder, "a photo", 4, torch.Generator().manual_seed(0))
    assert none == "" and drawn.std() < 0.05


@pytest.mark.parametrize("make", [ivlp, maple])
def test_text_with_shallow_prompts_from_words_is_the_zero_shot_text(
    make: Any, make_encoder: Callable[..., Any]
) -> None:
    settings = {"text_depth": 1} if make is ivlp else {"depth": 1}
    method = make(make_encoder(), **settings)
    expected = method.backbone.encode_text([f"a photo of a {name}." for name in NAMES])
    torch.testing.assert_close(method.encode_text(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [ivlp, maple])
def test_deep_text_prompts_equal_the_plain_path(make: Any, make_encoder: Callable[..., Any]) -> None:
    method = shaken(make(make_encoder()))
    deep = dict(enumerate(method.deep, start=1))
    plain = method.sentences(method.context, deep, share=False)
    assert method.backbone.shares_prefix(torch.zeros(3, 16), deep)  # [SOS] and the two rows
    fast = method.encode_text()
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)
    weight = torch.randn(fast.shape, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad((w * weight).sum(), [method.context, method.deep]) for w in (fast, plain)]
    for quick, slow in zip(*gradients, strict=True):
        torch.testing.assert_close(quick, slow, rtol=1e-4, atol=1e-5)


def test_independent_prompts_have_no_gradient_across_and_coupled_ones_do(
    make_encoder: Callable[..., Any], pixels: torch.Tensor
) -> None:
    own, coupled = ivlp(make_encoder()), maple(make_encoder())
    own.encode_image(pixels).square().sum().backward()
    coupled.encode_image(pixels).square().sum().backward()
    assert own.context.grad is None and own.deep.grad is None
    assert float(coupled.context.grad.abs().max()) > 0
    assert all(float(row.abs().max()) > 0 for row in coupled.deep.grad)


def test_projections_of_zero_weight_give_their_bias_to_every_visual_prompt(make_encoder: Callable[..., Any]) -> None:
    method = maple(make_encoder())
    for i, projection in enumerate([method.projection, *method.deep_projections]):
        nn.init.zeros_(projection.weight)
        nn.init.constant_(projection.bias, i + 1.0)
    for i, rows in enumerate(method.visual_prompts()):
        assert torch.equal(rows, torch.full((2, 24), i + 1.0))


def test_deep_projections_start_as_clones(make_encoder: Callable[..., Any]) -> None:
    first, second = maple(make_encoder()).deep_projections
    assert torch.equal(first.weight, second.weight) and torch.equal(first.bias, second.bias)
    assert not torch.equal(first.weight, maple(make_encoder()).projection.weight)


def test_language_only_leaves_the_images_as_they_are(make_encoder: Callable[..., Any], pixels: torch.Tensor) -> None:
    method = ivlp(make_encoder(), image_depth=0)
    torch.testing.assert_close(method.encode_image(pixels), method.backbone.image(pixels))


def test_more_blocks_than_a_tower_has_are_refused(make_encoder: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="prompts for 4 blocks, the tower has 3"):
        maple(make_encoder(), depth=4)
    for field in ("text_depth", "image_depth"):
        with pytest.raises(InputError, match=f"field '{field}': prompts for 5 blocks"):
            ivlp(make_encoder(), **{field: 5})


def test_the_prompt_carries_over_to_other_classes(make_encoder: Callable[..., Any]) -> None:
    method = shaken(maple(make_encoder()))
    other = method.with_classes(("bird", "cat"))
    torch.testing.assert_close(other.encode_text()[1], method.encode_text()[0], rtol=1e-5, atol=1e-5)
