"""CoOp: properties 1, 2 and 7 of its card, positions, and what is computed once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from pt_core.errors import InputError
from pt_vl.method import Sentences
from pt_vl.methods.coop import CoOp, CoOpConfig
from pt_vl.methods.zero_shot import ZeroShot, ZeroShotConfig

Make = Callable[..., Any]
CLASSES = ("cat", "big_house", "red car of the house")


def same(a: Tensor, b: Tensor) -> None:
    assert_close(a, b, rtol=2e-5, atol=2e-5 * max(1.0, float(b.detach().abs().max())))


def coop(backbone: Any, **settings: Any) -> CoOp:
    return CoOp(backbone, CoOpConfig(**{"class_names": CLASSES} | settings))


def test_counts_are_those_of_the_card(make_encoder: Make) -> None:
    backbone = make_encoder()
    assert coop(backbone, prompt_length=5).count() == 5 * 16
    assert coop(backbone, init="a photo of a").count() == 4 * 16
    assert coop(backbone, prompt_length=5, class_specific=True).count() == 3 * 5 * 16


def test_a_random_start_has_a_deviation_of_two_hundredths(make_encoder: Make) -> None:
    context = coop(make_encoder(), prompt_length=8, class_specific=True).context
    assert context.std().item() == pytest.approx(0.02, rel=0.1)
    assert abs(context.mean().item()) < 0.004


@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize("family", ["clip", "siglip", "open-clip"])
def test_started_from_a_photo_of_a_it_is_zero_shot(
    family: str, class_specific: bool, make_encoder: Make, make_images: Make
) -> None:
    backbone = make_encoder(family)
    method = coop(backbone, init="a photo of a", class_specific=class_specific)
    batch = make_images(4).batch([0, 1, 2, 3])
    expected = ZeroShot(backbone, ZeroShotConfig(class_names=CLASSES))(batch).logits
    same(method(batch).logits, expected)


def by_hand(backbone: Any, context: Tensor, name: str, position: str) -> Tensor:
    """Features of one class, its sentence written with X where the context goes."""
    m = len(context)
    x = {"end": (m, 0), "middle": (m // 2, m - m // 2), "front": (0, m)}[position]
    words = backbone.tokenise([" ".join(["X"] * x[0] + [name] + ["X"] * x[1]) + "."])
    embeddings = backbone.embed_words(words.ids).clone()
    embeddings[0, (words.ids[0] == backbone.plain_ids("X")[0])] = context
    return backbone.text(embeddings, words.eot)[0]


@pytest.mark.parametrize("length", [3, 4])
@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("family", ["clip", "siglip", "open-clip"])
def test_the_context_stands_where_placeholders_would_and_eot_is_theirs(
    family: str, position: Any, class_specific: bool, length: int, make_encoder: Make
) -> None:
    backbone = make_encoder(family)
    method = coop(backbone, prompt_length=length, position=position, class_specific=class_specific)
    with torch.no_grad():
        method.context.normal_(generator=torch.Generator().manual_seed(1))
    contexts = method.context if class_specific else method.context.expand(3, -1, -1)
    names = ["cat", "big house", "red car of the house"]
    expected = [by_hand(backbone, c, name, position) for c, name in zip(contexts, names, strict=True)]
    same(method.encode_text(), torch.stack(expected))


@pytest.mark.parametrize(("position", "ahead"), [("middle", 1), ("front", 0)])
def test_a_sign_that_a_name_ends_in_stays_with_the_name(position: Any, ahead: int, make_encoder: Make) -> None:
    backbone = make_encoder()
    assert (len(backbone.plain_ids("cat ,")), len(backbone.plain_ids("cat ,."))) == (2, 2)  # ",." is one token
    sentences = Sentences(backbone, ["cat ,", "dog"], 2, position)
    context = [4, 5]
    assert sentences.order[0].tolist() == [0, *context[:ahead], 1, 2, *context[ahead:], 3]


@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("chunk", [None, 2])
def test_what_classes_share_is_computed_once_with_the_gradients_of_the_plain_path(
    position: Any, chunk: int | None, make_encoder: Make
) -> None:
    backbone = make_encoder()
    sentences = Sentences(backbone, CLASSES, 4, position)
    assert sentences.shared == {"end": 5, "middle": 3, "front": 1}[position]
    start = torch.randn(4, 16, generator=torch.Generator().manual_seed(2))
    weights = torch.randn(3, 8, generator=torch.Generator().manual_seed(3))
    found = []
    for share in (True, False):
        context = start.clone().requires_grad_()
        made = sentences(context, share=share, chunk=chunk if share else None)
        (made * weights).sum().backward()
        found.append((made.detach(), context.grad))
    same(found[0][0], found[1][0])
    assert found[1][1].abs().max() > 1e-3
    same(found[0][1], found[1][1])


def test_a_context_of_each_class_takes_the_plain_path(make_encoder: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as gone:
        for shared in ("prefix_keys", "together"):
            gone.setattr(f"pt_vl.backbones.{shared}", None)
        for family, settings in (("clip", {"class_specific": True}), ("siglip", {})):
            for chunk in (256, 1):
                coop(make_encoder(family), prompt_length=3, text_chunk=chunk, **settings).encode_text()
    for chunk, shared in ((256, "together"), (1, "prefix_keys")):
        with monkeypatch.context() as gone, pytest.raises(TypeError):
            gone.setattr(f"pt_vl.backbones.{shared}", None)
            coop(make_encoder(), prompt_length=3, text_chunk=chunk).encode_text()


def test_frozen_words_between_context_and_name_are_shared_too(make_encoder: Make) -> None:
    backbone = make_encoder()
    sentences = Sentences(backbone, CLASSES, 2, words="of a")
    assert sentences.shared == 1 + 2 + 2
    context = backbone.embed_words(torch.tensor(backbone.plain_ids("a photo")))
    same(sentences(context), ZeroShot(backbone, ZeroShotConfig(class_names=CLASSES)).text_features())
    deep = {1: torch.randn(2, 16), 2: torch.randn(2, 16)}
    same(sentences(context, deep), sentences(context, deep, share=False))


def test_text_is_cut_at_the_longest_class_exactly(make_encoder: Make) -> None:
    backbone = make_encoder()
    method = coop(backbone, prompt_length=3)
    words = backbone.tokenise(["X X X cat.", "X X X big house.", "X X X red car of the house."])
    whole = torch.nn.functional.pad(words.ids, (0, 18 - words.ids.shape[1]), value=backbone._pad)
    embeddings = backbone.embed_words(whole).clone()
    embeddings[:, 1:4] = method.context.detach()
    tower, model = backbone.text_tower, backbone.model.text_model
    hidden = embeddings + tower.positions
    for index in range(3):
        hidden = tower.block(index, hidden, None, None)
    pooled = model.final_layer_norm(hidden)[torch.arange(3), words.eot]
    same(method.encode_text(), backbone.model.text_projection(pooled))


def test_words_to_start_from_must_have_the_contexts_length(make_encoder: Make) -> None:
    with pytest.raises(InputError, match="'a photo of a' has 4 tokens, the context 3"):
        coop(make_encoder(), init="a photo of a", prompt_length=3)
    with pytest.raises(InputError, match="field 'init': ' ' has no words to start from. Give some, or leave it out"):
        coop(make_encoder(), init=" ")


def test_it_learns_to_tell_patterns_apart(make_encoder: Make, make_images: Make) -> None:
    from pt_core.plan import FitConfig

    method = coop(make_encoder(), prompt_length=4, lr=0.1)
    train = make_images(24)
    run = FitConfig(epochs=20, batch_size=8, optimiser="adam", device="cpu", progress=False, max_grad_norm=None)
    with torch.no_grad():
        before = float(method.eval().loss(train.batch(range(24))).value)
        with torch.enable_grad():
            method.fit(train, None, run)
        assert float(method.loss(train.batch(range(24))).value) < 0.6 * before


def test_without_a_run_of_ones_own_it_is_the_published_one(make_encoder: Make, make_images: Make) -> None:
    method = coop(make_encoder(), prompt_length=2)
    for shots, epochs in ((16, 200), (8, 200), (4, 100), (2, 100), (1, 50)):
        run = method.published(make_images(shots * 3))
        assert (run.epochs, run.batch_size, run.optimiser, run.momentum) == (epochs, 32, "sgd", 0.9)
        assert (run.weight_decay, run.schedule, run.max_grad_norm, run.keep_best) == (5e-4, "epoch-cosine", None, False)
    result = method.fit(make_images(3))
    assert result.steps == 50
    tenth = 0.002 * 0.5 * (1 + math.cos(math.pi * 8 / 50))  # the rate of step 10, the first that is logged
    assert result.history[0]["lr/prompt"] == pytest.approx(tenth)
