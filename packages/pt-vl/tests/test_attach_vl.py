"""Prompts in the user's own CLIP or SigLIP model: the same numbers, the same interface, and out again without a trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from pt_core import attach, off, route
from pt_core.errors import InputError
from pt_core.frozen import assert_unchanged, snapshot
from pt_core.prompts import SoftPrompt
from pt_vl.backbones import DualEncoder, TowerPrompt
from pt_vl.methods.cocoop import CoCoOp, CoCoOpConfig
from pt_vl.methods.coop import CoOp, CoOpConfig
from pt_vl.methods.ivlp import IVLP, IVLPConfig
from pt_vl.methods.maple import MaPLe, MaPLeConfig
from pt_vl.methods.restore import RESTORE, RESTOREConfig
from pt_vl.methods.upt import UPT, UPTConfig
from pt_vl.methods.vpt import VPT, VPTConfig

Make = Callable[..., Any]
CLASSES = ("cat", "big_house", "red car")
NAMES = ["cat.", "big house.", "red car."]


def random(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(a: Tensor, b: Tensor) -> None:
    assert_close(a, b, rtol=3e-5, atol=3e-5 * max(1.0, float(b.detach().abs().max())))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", ["clip", "clip-legacy", "siglip"])
def test_the_users_model_carries_a_trained_context_and_gives_the_methods_logits(
    family: str, padded: bool, make_encoder: Make, pixels: Tensor
) -> None:
    backbone = make_encoder(family)
    method = CoOp(backbone, CoOpConfig(class_names=CLASSES, prompt_length=4))
    with torch.no_grad():
        method.context.copy_(random(4, 16))
    words, model = backbone.tokenise(NAMES), backbone.model
    ids = words.ids
    if padded:
        ids = torch.nn.functional.pad(ids, (0, 18 - ids.shape[1]), value=backbone._pad)
    plain = model(input_ids=ids, pixel_values=pixels)
    handle = attach(model, method.as_prompt())
    made = model(input_ids=ids, pixel_values=pixels)
    same(made.logits_per_image, method({"pixels": pixels}).logits)
    assert made.text_model_output.last_hidden_state.shape == plain.text_model_output.last_hidden_state.shape
    with off(model):
        assert torch.equal(model(input_ids=ids, pixel_values=pixels).logits_per_image, plain.logits_per_image)
    handle.remove()
    assert torch.equal(model(input_ids=ids, pixel_values=pixels).logits_per_image, plain.logits_per_image)


@pytest.mark.parametrize("place", ["before-ln-pre", "after-cls"])
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_the_users_model_carries_deep_prompts_in_both_towers(
    family: str, place: Any, make_encoder: Make, pixels: Tensor
) -> None:
    backbone = make_encoder(family)
    model, words = backbone.model, backbone.tokenise(NAMES)
    before, attributes = snapshot(model), set(vars(model))
    image, text = {0: random(2, 24), 2: random(2, 24, seed=4)}, {1: random(2, 16)}
    handle = attach(model, TowerPrompt(text=text, image=image, place=place))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 48 + 32, "trainers find it"
    f = model.get_image_features(pixel_values=pixels)
    w = model.get_text_features(input_ids=words.ids)
    same(f.pooler_output, backbone.image(pixels, image, place=place))
    same(w.pooler_output, backbone.text(backbone.embed_words(words.ids), words.eot, text))
    assert f.last_hidden_state.shape[1] == (9 if family == "siglip" else 10), "no prompt among the hidden states"
    (f.pooler_output.sum() + w.pooler_output.sum()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in handle.prompt.parameters())
    handle.remove()
    assert_unchanged(model, before)
    assert set(vars(model)) == attributes
    assert "forward" not in vars(model.vision_model)


def _trained(method: Any) -> Any:
    with torch.no_grad():
        for i, parameter in enumerate(method.parameters()):
            parameter.add_(0.3 * random(*parameter.shape, seed=i))
    return method


@pytest.mark.parametrize(
    ("kind", "settings", "frozen"),
    [
        (VPT, VPTConfig(class_names=CLASSES, prompt_length=2, place="after-cls"), "a photo of a "),
        (IVLP, IVLPConfig(class_names=CLASSES, text_length=2, init="a photo of a"), "of a "),
        (MaPLe, MaPLeConfig(class_names=CLASSES, depth=3), "of a "),
        (UPT, UPTConfig(class_names=CLASSES, prompt_length=2, hidden=8, position="end"), ""),
    ],
)
def test_the_users_model_carries_the_prompts_of_both_towers_and_gives_the_methods_logits(
    kind: Any, settings: Any, frozen: str, make_encoder: Make, pixels: Tensor
) -> None:
    backbone = make_encoder()
    method = _trained(kind(backbone, settings))
    texts = backbone.tokenise([f"{frozen}{name}" for name in NAMES])
    handle = attach(backbone.model, method.as_prompt())
    same(backbone.model(input_ids=texts.ids, pixel_values=pixels).logits_per_image, method({"pixels": pixels}).logits)
    handle.remove()


def test_rows_of_one_call_carry_prompts_of_their_own(make_encoder: Make, pixels: Tensor) -> None:
    backbone = make_encoder()
    model, words = backbone.model, backbone.tokenise(NAMES)
    prompts = [TowerPrompt(random(m, 16, seed=m), image={0: random(m, 24, seed=m)}) for m in (2, 3)]
    a, b = (attach(model, prompt, always=False) for prompt in prompts)
    rows = [a, None, b]

    def alone(call: Callable[[Any], Any], values: Tensor) -> Tensor:
        found = []
        for handle, value in zip(rows, values, strict=True):
            with route(model, [handle]):
                found.append(call(value[None]).pooler_output)
        return torch.cat(found)

    with route(model, rows):
        images, texts = model.get_image_features(pixel_values=pixels), model.get_text_features(input_ids=words.ids)
    same(images.pooler_output, alone(lambda v: model.get_image_features(pixel_values=v), pixels))
    same(texts.pooler_output, alone(lambda v: model.get_text_features(input_ids=v), words.ids))
    with route(model, [b, a]), pytest.raises(InputError, match="2 prompts for 3 rows"):
        model(input_ids=words.ids, pixel_values=pixels)


def test_what_does_not_fit_is_refused(make_model: Make, make_encoder: Make) -> None:
    model = make_model("clip")
    for prompt, problem in (
        (SoftPrompt(2, 16), "a SoftPrompt does not say which tower"),
        (TowerPrompt(context=random(2, 24)), r"text prompts of shape \[2, 24\].*\[m, 16\]"),
        (TowerPrompt(image={0: random(2, 16)}), r"image prompts of shape \[2, 16\].*\[m, 24\]"),
        (TowerPrompt(text={0: random(2, 16)}), "text prompts for blocks that are not there"),
        (TowerPrompt(text={3: random(2, 16)}), "text prompts for blocks that are not there"),
        (TowerPrompt(image={3: random(2, 24)}), "image prompts for blocks that are not there"),
    ):
        with pytest.raises(InputError, match=problem):
            attach(model, prompt)
    attach(model, TowerPrompt(context=random(15, 16)))
    ids = DualEncoder(model, make_encoder().tokeniser).tokenise(["a red car."]).ids
    with pytest.raises(InputError, match="a text of 6 tokens and 15 prompts exceed the context"):
        model.get_text_features(input_ids=ids)
    siglip, words = make_model("siglip"), make_encoder("siglip").tokenise(["a red car."]).ids
    attach(siglip, TowerPrompt(context=random(4, 16)))
    siglip.get_text_features(input_ids=words)  # padding makes room
    words[:, -3] = 5
    with pytest.raises(InputError, match="a text of more than 14 tokens and 4 prompts exceed the context"):
        siglip.get_text_features(input_ids=words)
    with pytest.raises(InputError, match="output_hidden_states does not go with a prompt"):
        model.text_model(input_ids=ids, output_hidden_states=True)


def test_a_dual_encoder_itself_takes_no_prompt(make_encoder: Make) -> None:
    for family in ("clip", "siglip"):
        with pytest.raises(InputError, match=r"Attach it to the model inside: attach\(backbone\.model, prompt\)"):
            attach(make_encoder(family), TowerPrompt(context=torch.zeros(2, 16)))


def test_a_mask_that_changes_what_is_read_is_refused(make_encoder: Make) -> None:
    for family in ("clip", "siglip"):
        backbone = make_encoder(family)
        model, ids = backbone.model, backbone.tokenise(["a red car.", "dog."]).ids
        padding = (torch.arange(ids.shape[1]) < torch.tensor([[6], [4]])).long()
        attach(model, TowerPrompt(context=random(2, 16)))
        plain = model.get_text_features(input_ids=ids).pooler_output
        whole = model.get_text_features(input_ids=ids, attention_mask=torch.ones_like(ids)).pooler_output
        assert torch.equal(whole, plain)
        if family == "clip":  # behind the end of a text nothing is read
            assert torch.equal(model.get_text_features(input_ids=ids, attention_mask=padding).pooler_output, plain)
            padding[1, 1] = 0
        with pytest.raises(
            InputError, match="field 'attention_mask': a mask that leaves tokens out does not go with a"
        ):
            model.get_text_features(input_ids=ids, attention_mask=padding)


@pytest.mark.parametrize("positions", [torch.arange(6)[None], torch.zeros(1, 1, dtype=torch.long)])
def test_positions_of_ones_own_are_refused_with_a_prompt(positions: Tensor, make_encoder: Make) -> None:
    backbone = make_encoder()
    ids = backbone.tokenise(["a red car."]).ids
    attach(backbone.model, TowerPrompt(context=random(2, 16)))
    with pytest.raises(InputError, match="position_ids does not go with a prompt"):
        backbone.model.get_text_features(input_ids=ids, position_ids=positions)


def test_prompts_that_are_more_than_rows_say_so(make_encoder: Make) -> None:
    backbone = make_encoder()
    for method in (
        CoCoOp(backbone, CoCoOpConfig(class_names=CLASSES, reduction=4)),
        CoOp(backbone, CoOpConfig(class_names=CLASSES, prompt_length=4, position="middle")),
        UPT(backbone, UPTConfig(class_names=CLASSES, prompt_length=2, hidden=8)),
        RESTORE(backbone, RESTOREConfig(class_names=CLASSES, depth=3)),
    ):
        with pytest.raises(InputError, match="more than rows in the towers"):
            method.as_prompt()


def test_a_tower_gives_a_tuple_where_one_is_asked_for(make_encoder: Make, pixels: Tensor) -> None:
    model = make_encoder("clip").model
    attach(model, TowerPrompt(image={0: random(2, 24)}))
    hidden, pooled = model.vision_model(pixels, return_dict=False)
    made = model.vision_model(pixels, return_dict=True)
    assert torch.equal(hidden, made.last_hidden_state) and torch.equal(pooled, made.pooler_output)


def test_attention_that_takes_no_mask_is_refused_also_where_it_is_chosen_later(make_encoder: Make) -> None:
    backbone = make_encoder("clip")
    ids = backbone.tokenise(NAMES).ids
    attach(backbone.model, TowerPrompt(context=random(2, 16)))
    backbone.model.config.text_config._attn_implementation_internal = "flex_attention"
    with pytest.raises(InputError, match=r"do not go with 'flex_attention'.*set_attn_implementation\(\"sdpa\"\)"):
        backbone.model.get_text_features(input_ids=ids)
