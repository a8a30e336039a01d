"""CoCoOp: properties 1 and 3 of its card."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from pt_core.errors import InputError
from pt_vl.methods.cocoop import CoCoOp, CoCoOpConfig
from pt_vl.methods.coop import CoOp, CoOpConfig

Make = Callable[..., Any]
CLASSES = ("cat", "big_house", "red car")


def cocoop(backbone: Any, **settings: Any) -> CoCoOp:
    return CoCoOp(backbone, CoCoOpConfig(**{"class_names": CLASSES, "reduction": 4} | settings))


def same(a: Tensor, b: Tensor) -> None:
    assert_close(a, b, rtol=5e-5, atol=5e-5 * max(1.0, float(b.detach().abs().max())))


def test_the_count_is_that_of_the_card(make_encoder: Make) -> None:
    d, h, d_t = 8, 2, 16
    assert cocoop(make_encoder()).count() == 4 * d_t + d * h + h + h * d_t + d_t


def test_there_are_no_class_features_without_an_image(make_encoder: Make) -> None:
    with (
        torch.no_grad(),
        pytest.raises(InputError, match=r"every image has class features of its own. Use class_features"),
    ):
        cocoop(make_encoder()).text_features()


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_a_meta_net_that_ends_in_zeros_makes_it_coop(family: str, make_encoder: Make, make_images: Make) -> None:
    backbone = make_encoder(family)
    method = cocoop(backbone)
    plain = CoOp(backbone, CoOpConfig(class_names=CLASSES, init="a photo of a"))
    batch = make_images(4).batch([0, 1, 2, 3])
    assert not torch.allclose(method(batch).logits, plain(batch).logits, atol=1e-2)
    for parameter in method.meta_net[2].parameters():
        torch.nn.init.zeros_(parameter)
    same(method(batch).logits, plain(batch).logits)


@pytest.mark.parametrize("chunk", [256, 4])
@pytest.mark.parametrize("family", ["clip", "siglip", "open-clip"])
def test_a_batch_gives_the_logits_and_gradients_of_a_loop_over_images(
    family: str, chunk: int, make_encoder: Make, make_images: Make
) -> None:
    backbone = make_encoder(family)
    method = cocoop(backbone, text_chunk=chunk)
    batch = make_images(4).batch([0, 1, 2, 3])
    method.loss(batch).total.backward()
    fast = {name: p.grad.clone() for name, p in method.named_parameters()}
    method.zero_grad()
    total, rows = torch.zeros(()), []
    features = backbone.image(batch["pixels"])
    for f, label in zip(features, batch["labels"], strict=True):
        context = method.context + method.meta_net(F.normalize(f, dim=0))
        own = CoOp(backbone, CoOpConfig(class_names=CLASSES, prompt_length=4)).sentences(context, share=False)
        rows.append(backbone.similarity(f[None], own)[0])
        total = total + F.cross_entropy(rows[-1], label)
    total.backward()
    same(method(batch).logits, torch.stack(rows))
    for name, parameter in method.named_parameters():
        assert parameter.grad is not None
        same(fast[name], parameter.grad)


def test_every_image_has_its_own_context_shared_by_its_classes(
    make_encoder: Make, make_images: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, seen = make_encoder(), list[tuple[int, ...]]()
    inner = backbone.text_tower.open_block
    monkeypatch.setattr(backbone.text_tower, "open_block", lambda i, h: (seen.append(tuple(h.shape)), inner(i, h))[1])
    batch = make_images(4).batch([0, 1, 2, 3])
    # [SOS] and context of four images; three names, ".", [EOS] behind each.
    cocoop(backbone)(batch)
    assert seen == [(1, 4 * 5 + 12 * 4, 16)] * 3
    seen.clear()
    cocoop(backbone, text_chunk=8)(batch)
    assert seen[:3] == [(4, 5, 16)] * 3
    assert [shape[0] for shape in seen[3:]] == [8] * 3 + [4] * 3


def test_a_meta_net_narrower_than_one_value_is_refused(make_encoder: Make) -> None:
    with pytest.raises(InputError, match="features have 8 values"):
        cocoop(make_encoder(), reduction=16)
