"""UPT: the mixer's size, what it couples, and that without it the prompts are CoOp's and VPT's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pt_vl.methods.coop import CoOp, CoOpConfig
from pt_vl.methods.upt import UPT, Mixer, UPTConfig
from pt_vl.methods.vpt import VPT, VPTConfig

NAMES = ("cat", "red dog", "house")


def upt(encoder: Any, **settings: Any) -> UPT:
    return UPT(encoder, UPTConfig(class_names=NAMES, **settings))


def test_parameter_counts(make_encoder: Callable[..., Any]) -> None:
    assert sum(p.numel() for p in Mixer(128).parameters()) == 198_272
    n, layers, d_t, d_v, h = 4, 3, 16, 24, 32
    mixer = 12 * h**2 + 13 * h
    expected = n * d_t + layers * n * d_v + 2 * d_t * h + 2 * d_v * h + 2 * h + d_t + d_v + mixer
    assert upt(make_encoder(), hidden=h).count() == expected
    assert 4 * 512 + 12 * 4 * 768 + 2 * 512 * 128 + 2 * 768 * 128 + 2 * 128 + 512 + 768 + 198_272 == 566_400


def test_a_projection_is_left_out_where_the_widths_agree(make_encoder: Callable[..., Any]) -> None:
    method = upt(make_encoder(), hidden=16)
    assert not list(method.text_in.parameters()) and list(method.image_in.parameters())


def test_without_a_mixer_it_is_coop_and_deep_vpt(make_encoder: Callable[..., Any], pixels: torch.Tensor) -> None:
    method = upt(make_encoder(), mixer="identity")
    text = CoOp(make_encoder(), CoOpConfig(class_names=NAMES, prompt_length=4, position="middle"))
    image = VPT(make_encoder(), VPTConfig(class_names=NAMES, prompt_length=4, init="uniform", place="after-cls"))
    with torch.no_grad():
        text.context.copy_(method.context)
        image.visual.copy_(method.visual)
    torch.testing.assert_close(method.encode_text(), text.encode_text())
    torch.testing.assert_close(method.encode_image(pixels), image.encode_image(pixels))
    method.encode_text().sum().backward()
    assert method.visual.grad is None


def test_the_mixer_couples_the_towers(make_encoder: Callable[..., Any]) -> None:
    method = upt(make_encoder())
    method.encode_text().square().sum().backward()
    assert float(method.visual.grad.abs().max()) > 0
    assert float(method.context.grad.abs().max()) > 0


def test_as_released_each_prompt_attends_to_itself_only(make_encoder: Callable[..., Any]) -> None:
    method = upt(make_encoder(), repo_compat=True)
    method.prompts()[0][0].square().sum().backward()
    assert method.visual.grad is None or not method.visual.grad.any()
    assert bool(method.context.grad[0].any()) and not method.context.grad[1:].any()
    # torch's attention takes [k, 1, h] for k tokens of one row unless told otherwise: MVLPT's code hands it [1, k, h].
    mixer, rows = method.mixer, torch.randn(1, 5, 128)
    assert mixer is not None
    released = torch.nn.MultiheadAttention(128, 1)
    released.load_state_dict(mixer.attention.state_dict())
    x = mixer.norm1(rows)
    attended = rows + released(x, x, x, need_weights=False)[0]
    y = mixer.up(mixer.norm2(attended))
    torch.testing.assert_close(mixer(rows), attended + mixer.down(y * torch.sigmoid(1.702 * y)))


def test_the_mixer_sees_prompts_as_a_set(make_encoder: Callable[..., Any]) -> None:
    method = upt(make_encoder())
    text, image = method.prompts()
    with torch.no_grad():
        method.visual.copy_(method.visual[[2, 0, 1]])
    again, turned = method.prompts()
    torch.testing.assert_close(again, text)
    torch.testing.assert_close(turned, image[[2, 0, 1]])
