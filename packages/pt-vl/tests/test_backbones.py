"""The engine: features as the library computes them, prompts as a hand-written loop places them, shortcuts that are exact."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

from pt_core.errors import InputError
from pt_core.frozen import assert_unchanged, snapshot
from pt_core.tokens import Tokens, real
from pt_vl import shared_prefix
from pt_vl.backbones import DualEncoder, load_backbone
from pt_vl.methods.r_amt import RAMT, RAMTConfig
from pt_vl.preprocessing import Preprocessing, hf_preprocessing

FAMILIES = ["clip", "clip-legacy", "siglip", "open-clip"]
ADAPTED = {
    "clip": ["encoder.layers.1.mlp.fc1.weight", "final_layer_norm.weight"],
    "open-clip": ["transformer.resblocks.1.mlp.c_fc.weight", "ln_final.weight"],
}
TEXTS = ["a photo of a cat.", "dog.", "a big red car of the house."]
Make = Callable[..., DualEncoder]


def random(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(a: Tensor, b: Tensor) -> None:
    """Equal to float tolerance: sums of another order, relative to the largest value."""
    assert_close(a, b, rtol=2e-5, atol=2e-5 * max(1.0, float(b.detach().abs().max())))


def library_text(model: nn.Module, ids: Tensor) -> Tensor:
    """What the library computes of token ids padded to the whole context."""
    if type(model).__name__ == "CLIP":
        return model.encode_text(ids)
    return model.get_text_features(input_ids=ids).pooler_output


def library_image(model: nn.Module, pixels: Tensor) -> Tensor:
    if type(model).__name__ == "CLIP":
        return model.encode_image(pixels)
    return model.get_image_features(pixel_values=pixels).pooler_output


def blocks(tower: Any) -> list[Callable[[Tensor], Tensor]]:
    """The library's blocks of a tower, each as a function of hidden states alone."""
    found = []
    for index in range(tower.num_blocks):

        def block(hidden: Tensor, index: int = index) -> Tensor:
            return tower.block(index, hidden, tower.prepare(Tokens.of(hidden)), None)

        found.append(block)
    return found


# --- parity with the libraries ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
def test_text_features_without_prompts_equal_the_librarys(family: str, make_encoder: Make) -> None:
    backbone = make_encoder(family)
    words = backbone.tokenise(TEXTS)
    whole = torch.full((len(TEXTS), backbone.context), backbone._pad)
    whole[:, : words.ids.shape[1]] = words.ids
    expected = library_text(backbone.model, whole)
    same(backbone.encode_text(TEXTS), expected)
    assert expected.std(0).min() > 1e-3, "the texts must differ for this to mean anything"


@pytest.mark.parametrize("family", FAMILIES)
def test_image_features_without_prompts_equal_the_librarys(family: str, make_encoder: Make, pixels: Tensor) -> None:
    backbone = make_encoder(family)
    same(backbone.image(pixels), library_image(backbone.model, pixels))


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_eager_attention_gives_the_same_features(family: str, make_encoder: Make, pixels: Tensor) -> None:
    backbone = make_encoder(family)
    text, image = backbone.encode_text(TEXTS), backbone.image(pixels)
    backbone.model.set_attn_implementation("eager")
    same(backbone.encode_text(TEXTS), text)
    same(backbone.image(pixels), image)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_the_model_itself(family: str, make_encoder: Make, pixels: Tensor) -> None:
    backbone = make_encoder(family)
    words = backbone.tokenise(TEXTS)
    if family == "open-clip":
        whole = torch.nn.functional.pad(words.ids, (0, backbone.context - words.ids.shape[1]))
        expected, _ = backbone.model.get_logits(pixels, whole)
    else:
        expected = backbone.model(input_ids=words.ids, pixel_values=pixels).logits_per_image
    assert_close(backbone(pixels, words), expected, rtol=1e-4, atol=1e-4)
    own = torch.stack([backbone.encode_text(TEXTS)] * len(pixels))
    assert_close(backbone.similarity(backbone.image(pixels), own), expected, rtol=1e-4, atol=1e-4)


def test_a_convolutional_image_tower_runs_as_it_is_and_refuses_prompts(make_tokeniser: Any) -> None:
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    vision = open_clip.CLIPVisionCfg(layers=(1, 1, 1, 1), width=8, head_width=4, image_size=32)
    text = open_clip.CLIPTextCfg(context_length=18, vocab_size=30, width=16, heads=4, layers=2)
    backbone = DualEncoder(open_clip.CLIP(8, vision, text).eval(), make_tokeniser())
    pixels = random(2, 3, 32, 32)
    assert torch.equal(backbone.image(pixels), backbone.model.encode_image(pixels))
    with pytest.raises(InputError, match="prompts cannot enter an image tower of ModifiedResNet"):
        backbone.image(pixels, {0: random(2, 8)})
    with pytest.raises(InputError, match="no weights that masks are known for"):
        RAMT(backbone, RAMTConfig(class_names=("cat", "dog")))
    assert backbone.to(torch.bfloat16).image(pixels).dtype == torch.bfloat16


def test_the_model_stays_the_users(make_model: Any, make_tokeniser: Any, pixels: Tensor) -> None:
    model = make_model("clip")
    before, kind, forward, attributes = snapshot(model), type(model), model.forward, set(vars(model))
    backbone = DualEncoder(model, make_tokeniser())
    backbone.image(pixels, {0: random(2, 24), 1: random(2, 24)})
    backbone.text(random(2, 6, 16), torch.tensor([4, 5]), {1: random(2, 16)})
    assert backbone.model is model
    assert type(model) is kind
    assert model.forward == forward
    assert set(vars(model)) == attributes
    assert_unchanged(model, before)
    assert {id(p) for p in backbone.parameters()} == {id(p) for p in model.parameters()}


def test_a_model_of_another_kind_is_refused_by_name(make_tokeniser: Any) -> None:
    with pytest.raises(InputError, match="Linear is no dual encoder.*CLIPModel, SiglipModel"):
        DualEncoder(nn.Linear(2, 2), make_tokeniser())


# --- tokens ----------------------------------------------------------------------------------------------------------
def test_text_is_cut_at_the_longest_text_and_pooled_at_its_end(make_encoder: Make) -> None:
    words = make_encoder("clip").tokenise(TEXTS)
    assert words.lengths.tolist() == [8, 4, 10]
    assert words.ids.shape == (3, 10)
    assert words.eot.tolist() == [7, 3, 9]
    assert make_encoder("clip-legacy").tokenise(TEXTS).eot.tolist() == [7, 3, 9]


def test_siglip_keeps_the_whole_context_and_pools_its_last_slot(make_encoder: Make) -> None:
    words = make_encoder("siglip").tokenise(TEXTS)
    assert words.ids.shape == (3, 18)
    assert words.eot.tolist() == [17, 17, 17]
    assert words.lengths.tolist() == [7, 3, 9]


def test_a_text_beyond_the_context_is_refused_by_name_and_never_cut(make_encoder: Make) -> None:
    long = "a " * 20 + "cat."
    with pytest.raises(InputError, match=r"'a a .* cat\.' takes 24 tokens, there are 18"):
        make_encoder("clip").tokenise(["a dog.", long])


def test_a_tokeniser_without_the_models_end_of_text_is_refused(make_model: Any, make_tokeniser: Any) -> None:
    backbone = DualEncoder(make_model("clip"), make_tokeniser("siglip"))
    backbone.model.text_model.eos_token_id = 5
    with pytest.raises(InputError, match="does not end texts"):
        backbone.tokenise(["cat."])


def test_open_clips_own_tokeniser_gives_the_librarys_ids(make_model: Any) -> None:
    open_clip = pytest.importorskip("open_clip")
    made = open_clip.SimpleTokenizer()
    text = open_clip.CLIPTextCfg(context_length=77, vocab_size=49408, width=8, heads=2, layers=1)
    vision = open_clip.CLIPVisionCfg(layers=1, width=8, head_width=4, patch_size=4, image_size=8)
    backbone = DualEncoder(open_clip.CLIP(4, vision, text), made)
    words = backbone.tokenise(["a photo of a Cat.", "forget-me-not, a type of flower."])
    expected = made(["a photo of a Cat.", "forget-me-not, a type of flower."])
    assert torch.equal(words.ids, expected[:, : words.ids.shape[1]])
    assert words.eot.tolist() == expected.argmax(-1).tolist()


@pytest.mark.parametrize("options", [{"strip_sep_token": True}, {"clean": "canonicalize"}, {"clean": "lower"}])
def test_open_clips_wrapper_of_hugging_face_tokenisers_gives_the_librarys_ids(
    options: dict[str, Any], make_model: Any, make_tokeniser: Any, tmp_path: Path
) -> None:
    open_clip = pytest.importorskip("open_clip")
    plain = make_tokeniser()
    plain.sep_token = "<eot>"
    plain.save_pretrained(tmp_path)
    made = open_clip.tokenizer.HFTokenizer(str(tmp_path), context_length=18, **options)
    backbone = DualEncoder(make_model("open-clip"), made)
    texts = ["a photo  of a cat.", "Dog &amp; bird, big_house.", "X"]
    expected = made(texts)
    words = backbone.tokenise(texts)
    n = words.ids.shape[1]
    assert torch.equal(words.ids, expected[:, :n])
    assert (expected[:, n:] == expected[0, -1]).all()
    assert backbone.plain_ids(texts[1]) == plain(made.clean_fn(texts[1]), add_special_tokens=False)["input_ids"]
    untouched = DualEncoder(make_model("open-clip"), plain).tokenise(texts).ids
    assert not torch.equal(words.ids, untouched), "the texts must differ for this to mean anything"
    made.tokenizer_mode = "clips"
    with pytest.raises(InputError, match="HFTokenizer of mode 'clips' is not known"):
        DualEncoder(backbone.model, made)


@pytest.mark.parametrize("causal", [True, False])
def test_text_of_open_clip_that_is_pooled_at_the_last_slot_keeps_the_whole_context(
    causal: bool, make_tokeniser: Any
) -> None:
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    vision = open_clip.CLIPVisionCfg(layers=1, width=8, head_width=4, patch_size=4, image_size=8)
    text = {"context_length": 18, "vocab_size": 40, "width": 16, "heads": 4, "layers": 2, "pool_type": "last"}
    model = open_clip.CLIP(8, vision, open_clip.CLIPTextCfg(**text, no_causal_mask=not causal)).eval()
    backbone = DualEncoder(model.requires_grad_(False), make_tokeniser())
    words = backbone.tokenise(TEXTS)
    assert words.ids.shape == (3, 18) and words.eot.tolist() == [17, 17, 17]
    same(backbone.encode_text(TEXTS), model.encode_text(words.ids))
    assert backbone.causal is causal


# --- prompts in the image tower --------------------------------------------------------------------------------------
def by_hand_image(backbone: DualEncoder, pixels: Tensor, rows: dict[int, Tensor], place: str) -> Tensor:
    """Prompts placed by a loop over the library's blocks."""
    tower, m = backbone.image_tower, next(iter(rows.values())).shape[-2]
    assert tower is not None
    hidden = tower.embed(pixels).hidden
    b, n, _ = hidden.shape
    deep = dict(rows)
    if place == "before-ln-pre":
        at = n
        if 0 in deep:
            hidden = torch.cat([hidden, deep.pop(0).expand(b, -1, -1)], 1)
        hidden = tower.norm(hidden)
    else:
        at = tower.first
        hidden = tower.norm(hidden)
    for index, block in enumerate(blocks(tower)):
        if index in deep:
            row = deep[index].expand(b, -1, -1)
            tail = hidden[:, at:] if hidden.shape[1] == n else hidden[:, at + m :]
            hidden = torch.cat([hidden[:, :at], row, tail], 1)
        hidden = block(hidden)
    slots = torch.zeros(hidden.shape[1], dtype=torch.bool)
    slots[at : at + m] = hidden.shape[1] > n
    return tower.read(Tokens(hidden, hidden.new_ones(hidden.shape[:2]).bool(), torch.zeros(hidden.shape[:2]), slots))


@pytest.mark.parametrize("place", ["before-ln-pre", "after-cls"])
@pytest.mark.parametrize("where", [[0], [0, 1], [0, 1, 2], [1], [1, 2], [2]])
@pytest.mark.parametrize("family", ["clip", "siglip", "open-clip"])
def test_image_prompts_at_any_depth_equal_a_loop_over_the_blocks(
    family: str, where: list[int], place: Any, make_encoder: Make, pixels: Tensor
) -> None:
    backbone = make_encoder(family)
    rows = {index: random(2, 24, seed=index) for index in where}
    made = backbone.image(pixels, rows, place=place)
    same(made, by_hand_image(backbone, pixels, rows, place))
    assert not torch.allclose(made, backbone.image(pixels), atol=1e-3)


def test_the_two_places_are_different_functions_and_order_does_not_matter(make_encoder: Make, pixels: Tensor) -> None:
    backbone, rows = make_encoder("clip"), random(2, 24)
    last = backbone.image(pixels, {0: rows})
    assert not torch.allclose(last, backbone.image(pixels, {0: rows}, place="after-cls"), atol=1e-3)
    # Prompts have no positions: for the same layer norm, their place in the sequence does not matter at CLS.
    same(backbone.image(pixels, {0: rows.flip(0)}), last)
    normed = backbone.image_tower.norm(rows)  # type: ignore[union-attr]
    same(backbone.image(pixels, {0: normed}, place="after-cls"), last)


@pytest.mark.parametrize("place", ["before-ln-pre", "after-cls"])
@pytest.mark.parametrize("family", ["clip", "siglip", "open-clip"])
def test_zero_prompts_leave_image_features_as_they_are(
    family: str, place: Any, make_encoder: Make, pixels: Tensor
) -> None:
    backbone, none = make_encoder(family), torch.zeros(0, 24)
    assert torch.equal(backbone.image(pixels, {0: none, 1: none}, place=place), backbone.image(pixels))


@pytest.mark.parametrize("family", ["clip", "siglip", "open-clip"])
def test_replaced_image_slots_never_read_what_was_there(family: str, make_encoder: Make, pixels: Tensor) -> None:
    backbone = make_encoder(family)
    rows = {index: random(2, 24, seed=index) for index in range(3)}

    def spoil(index: int, tokens: Tokens) -> Tokens:
        if index == 2:
            return tokens
        hidden = torch.where(tokens.is_prompt[:, None], torch.nan, tokens.hidden)
        return Tokens(hidden, tokens.mask, tokens.positions, tokens.is_prompt, tokens.full)

    same(backbone.image(pixels, rows, after=spoil), backbone.image(pixels, rows))
    assert backbone.image(pixels, {0: rows[0]}, after=spoil).isnan().any()


def test_each_image_may_have_prompts_of_its_own(make_encoder: Make, pixels: Tensor) -> None:
    backbone, rows = make_encoder("clip"), random(3, 2, 24)
    alone = torch.cat([backbone.image(pixels[i : i + 1], {0: rows[i]}) for i in range(3)])
    same(backbone.image(pixels, {0: rows}), alone)


def test_deep_prompts_that_do_not_fit_are_refused(make_encoder: Make, pixels: Tensor) -> None:
    backbone = make_encoder("clip")
    with pytest.raises(InputError, match="3 prompt rows replace 2 slots"):
        backbone.image(pixels, {0: random(2, 24), 1: random(3, 24)})
    with pytest.raises(InputError, match=r"prompts for blocks \[3\]"):
        backbone.image(pixels, {0: random(2, 24), 3: random(2, 24)})
    with pytest.raises(InputError, match=r"images are \[8, 12\], the model takes \[12, 12\]"):
        backbone.image(pixels[:, :, :8])


# --- prompts in the text tower ---------------------------------------------------------------------------------------
def by_hand_text(backbone: DualEncoder, embeddings: Tensor, eot: Tensor, deep: dict[int, Tensor], at: int) -> Tensor:
    tower = backbone.text_tower
    hidden = embeddings + tower.positions[: embeddings.shape[1]]
    for index, block in enumerate(blocks(tower)):
        if index in deep:
            rows = deep[index].expand(len(hidden), -1, -1)
            hidden = torch.cat([hidden[:, :at], rows, hidden[:, at + rows.shape[1] :]], 1)
        hidden = block(hidden)
    return tower.read(hidden[torch.arange(len(hidden)), eot])


@pytest.mark.parametrize("where", [[1], [2], [1, 2]])
@pytest.mark.parametrize("at", [None, 2])
@pytest.mark.parametrize("family", ["clip", "siglip", "open-clip"])
def test_deep_text_prompts_equal_a_loop_over_the_blocks(
    family: str, where: list[int], at: int | None, make_encoder: Make
) -> None:
    backbone = make_encoder(family)
    words = backbone.tokenise(TEXTS)
    embeddings, deep = backbone.embed_words(words.ids), {l: random(2, 16, seed=l) for l in where}
    first = (0 if family == "siglip" else 1) if at is None else at
    made = backbone.text(embeddings, words.eot, deep, at=at)
    same(made, by_hand_text(backbone, embeddings, words.eot, deep, first))
    own = {l: torch.stack([rows, rows + 1, rows - 1]) for l, rows in deep.items()}  # of each class
    rows = [
        by_hand_text(backbone, embeddings[c : c + 1], words.eot[c : c + 1], {l: own[l][c] for l in own}, first)
        for c in range(3)
    ]
    same(backbone.text(embeddings, words.eot, own, at=at, chunk=2), torch.cat(rows))


def test_replaced_text_slots_never_read_what_was_there(make_encoder: Make) -> None:
    for family in ("clip", "siglip", "open-clip"):
        backbone = make_encoder(family)
        words = backbone.tokenise(TEXTS)
        embeddings, deep = backbone.embed_words(words.ids), {1: random(2, 16), 2: random(2, 16, seed=5)}

        def spoil(index: int, tokens: Tokens) -> Tokens:
            hidden = torch.where(tokens.is_prompt[:, None] & (index < 2), torch.nan, tokens.hidden)
            return Tokens(hidden, tokens.mask, tokens.positions, tokens.is_prompt, tokens.full)

        plain = backbone.text(embeddings, words.eot, deep)
        same(backbone.text(embeddings, words.eot, deep, after=spoil), plain)


def test_text_prompts_that_do_not_fit_are_refused(make_encoder: Make) -> None:
    backbone = make_encoder("clip")
    embeddings, eot = random(2, 8, 16), torch.tensor([6, 7])
    with pytest.raises(InputError, match="2 deep text prompts at slot 1 of block 0.*1 .. 2"):
        backbone.text(embeddings, eot, {0: random(2, 16)})
    with pytest.raises(InputError, match="at slot 7 of block 1"):
        backbone.text(embeddings, eot, {1: random(2, 16)}, at=7)
    with pytest.raises(InputError, match="20 slots, the tower 18"):
        backbone.text(random(2, 20, 16), torch.tensor([19, 19]))


# --- exact shortcuts -------------------------------------------------------------------------------------------------
def with_gradient(
    backbone: DualEncoder, prefix: Tensor, deep: dict[int, Tensor], **options: Any
) -> tuple[Tensor, list[Tensor]]:
    """Features of the names behind a prefix, and the gradients of prefix and deep prompts under a random loss."""
    words = backbone.tokenise(TEXTS)
    own = backbone.embed_words(words.ids)[:, backbone.text_tower.first :]
    eot = words.eot + prefix.shape[-2] - backbone.text_tower.first
    if not backbone.causal:
        own, eot = own[:, : backbone.context - prefix.shape[-2]], words.eot
    leaves = [t.clone().requires_grad_() for t in (prefix, *deep.values())]
    made = backbone.text(own, eot, dict(zip(deep, leaves[1:], strict=True)), prefix=leaves[0], **options)
    (made * random(*made.shape, seed=9)).sum().backward()
    return made.detach(), [t.grad for t in leaves if t.grad is not None]


@pytest.mark.parametrize("blocks", [[], [1], [1, 2]])
@pytest.mark.parametrize("groups", [(), (2,)])
@pytest.mark.parametrize(("chunk", "one"), [(None, True), (None, False), (2, False), (100, False)])
@pytest.mark.parametrize("family", ["clip", "open-clip"])
def test_the_shared_prefix_gives_the_values_and_gradients_of_the_plain_path(
    family: str,
    chunk: int | None,
    one: bool,
    groups: tuple[int, ...],
    blocks: list[int],
    make_encoder: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    masks, among = list[Tensor](), shared_prefix._visible_among
    monkeypatch.setattr(shared_prefix, "_visible_among", lambda *a: (masks.append(among(*a)), masks[-1])[1])
    monkeypatch.setattr(shared_prefix, "ONE_ATTENTION", 160 if one else 0)
    backbone = make_encoder(family)
    prefix, deep = random(*groups, 5, 16), {l: random(3, 16, seed=l) for l in blocks}
    assert backbone.shares_prefix(prefix, deep)
    fast, slow = (
        with_gradient(backbone, prefix, deep, share=share, chunk=c) for share, c in ((True, chunk), (False, None))
    )
    assert fast[0].shape == (*groups, 3, 8)
    same(fast[0], slow[0])
    assert len(masks) == one, "one attention among all rows, or one for each part"
    assert len(fast[1]) == len(slow[1]) == 1 + len(blocks)
    for a, b in zip(fast[1], slow[1], strict=True):
        assert b.abs().max() > 1e-3
        same(a, b)


@pytest.mark.parametrize("groups", [(), (2,)])
def test_the_prefix_runs_once_for_all_classes(
    groups: tuple[int, ...], make_encoder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, seen = make_encoder("clip"), list[tuple[int, ...]]()
    inner = backbone.text_tower.open_block
    monkeypatch.setattr(backbone.text_tower, "open_block", lambda i, h: (seen.append(tuple(h.shape)), inner(i, h))[1])
    words = backbone.tokenise(TEXTS)
    own, prefix, g = backbone.embed_words(words.ids)[:, 1:], random(*groups, 5, 16), len(groups) + 1
    together = backbone.text(own, words.eot + 4, prefix=prefix)
    assert seen == [(1, g * 5 + g * 3 * 9, 16)] * 3, "one pass reads each matrix once, for prefix and classes"
    seen.clear()
    chunked = backbone.text(own, words.eot + 4, prefix=prefix, chunk=2 * g)
    assert seen == [(g, 5, 16)] * 3 + [(g * 2, 9, 16)] * 3 + [(g, 9, 16)] * 3
    same(together, chunked)


def test_a_prefix_is_not_shared_where_that_would_not_be_exact(make_encoder: Make) -> None:
    prefix, inside, outside = random(4, 16), {1: random(3, 16)}, {1: random(4, 16)}
    clip = make_encoder("clip")
    assert clip.shares_prefix(prefix, inside)
    assert not clip.shares_prefix(None)
    assert not clip.shares_prefix(prefix, outside), "deep prompts reach beyond the prefix"
    assert not clip.shares_prefix(prefix, {1: random(3, 3, 16)}), "every class has its own deep prompts"
    assert not make_encoder("siglip").shares_prefix(prefix, {}), "SigLIP's prefix reads the class name"
    clip.model.hf_device_map = {"text_model": 0, "vision_model": "cpu"}
    assert not clip.shares_prefix(prefix), "hooks that move hidden states sit on whole blocks"


def test_dropout_of_attention_in_a_tower_that_is_trained_is_not_left_out(make_encoder: Make, pixels: Tensor) -> None:
    clip, prefix = make_encoder("clip"), random(4, 16)
    words = clip.tokenise(TEXTS)
    own = clip.embed_words(words.ids)[:, 1:]
    for part in clip.model.modules():
        if hasattr(part, "dropout"):
            part.dropout = 0.5
    assert clip.shares_prefix(prefix), "in eval mode nothing is dropped"
    clip.train()
    assert not clip.shares_prefix(prefix)
    torch.manual_seed(0)
    text, image = clip.text(own, words.eot + 3, prefix=prefix), clip.image(pixels)
    torch.manual_seed(0)
    assert torch.equal(clip.text(own, words.eot + 3, prefix=prefix, share=False), text)
    same(library_image(clip.model, pixels), image)
    assert not torch.allclose(clip.image(pixels), image, atol=1e-3), "drawn anew"


@pytest.mark.parametrize("deep", [{}, {1: random(4, 16)}])
def test_where_it_is_refused_the_plain_path_gives_the_right_numbers(deep: Any, make_encoder: Make) -> None:
    backbone = make_encoder("siglip")
    made, gradients = with_gradient(backbone, random(4, 16), deep)
    words = backbone.tokenise(TEXTS)
    whole = torch.cat([random(4, 16).expand(3, -1, -1), backbone.embed_words(words.ids)[:, :14]], 1)
    same(made, by_hand_text(backbone, whole, words.eot, deep, 0))
    assert all(g.abs().max() > 0 for g in gradients)


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_give_the_values_and_gradients_of_one_pass(family: str, make_encoder: Make) -> None:
    backbone = make_encoder(family)
    words = backbone.tokenise(TEXTS)
    results = []
    for chunk in (None, 1, 2):
        own = backbone.embed_words(words.ids).requires_grad_()
        made = backbone.text(own, words.eot, chunk=chunk)
        (made * random(*made.shape)).sum().backward()
        results.append((made.detach(), own.grad))
    for made, gradient in results[1:]:
        same(made, results[0][0])
        same(gradient, results[0][1])


@pytest.mark.parametrize("family", ["clip", "open-clip"])
def test_chunks_train_what_somebody_adds_to_the_tower(family: str, make_encoder: Make) -> None:
    backbone, prefix = make_encoder(family), random(4, 16)
    words = backbone.tokenise(TEXTS)
    weights = [backbone.text_tower.tower.get_parameter(name) for name in ADAPTED[family]]
    own = backbone.embed_words(words.ids)[:, 1:]
    found = []
    for chunk in (None, 1):
        for weight in weights:
            weight.requires_grad_()
        made = backbone.text(own, words.eot + 3, prefix=prefix, chunk=chunk)
        found.append(torch.autograd.grad((made * random(*made.shape)).sum(), weights))
    for whole, parts in zip(*found, strict=True):
        assert whole.abs().max() > 1e-3
        same(parts, whole)


@pytest.mark.parametrize("place", ["before-ln-pre", "after-cls"])
@pytest.mark.parametrize("where", [[0, 1, 2], [2]])
@pytest.mark.parametrize("family", ["clip", "open-clip"])
def test_the_last_block_at_cls_alone_gives_the_values_and_gradients_of_the_whole_block(
    family: str, where: list[int], place: Any, make_encoder: Make, pixels: Tensor
) -> None:
    backbone, found = make_encoder(family), []
    for after in (None, lambda index, tokens: tokens):
        rows = {index: random(2, 24, seed=index).requires_grad_() for index in where}
        made = backbone.image(pixels, rows, place=place, after=after)
        (made * random(*made.shape)).sum().backward()
        found.append((made.detach(), [row.grad for row in rows.values()]))
    same(found[0][0], found[1][0])
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert b.abs().max() > 1e-3
        same(a, b)


def test_siglip_reads_all_patches_so_its_last_block_runs_whole(
    make_encoder: Make, pixels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = make_encoder("siglip")
    monkeypatch.setattr("pt_vl.backbones.last_block", None)
    backbone.image(pixels, {0: random(2, 24)})
    with pytest.raises(TypeError):
        make_encoder("clip").image(pixels)


def saved_bytes(run: Callable[[], Tensor]) -> int:
    """Bytes that autograd holds for the backward pass when `run` returns."""
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(held.values())


def test_chunks_hold_the_activations_of_no_chunk_until_it_is_run_again(make_encoder: Make) -> None:
    backbone = make_encoder("clip")
    own, eot, prefix = random(64, 8, 16), torch.full((64,), 12), random(5, 16).requires_grad_()
    plain = saved_bytes(lambda: backbone.text(own, eot, prefix=prefix))
    chunked = saved_bytes(lambda: backbone.text(own, eot, prefix=prefix, chunk=4))
    assert chunked - own.untyped_storage().nbytes() < plain / 20  # the embeddings were there before


def test_text_cut_behind_the_last_pooled_slot_is_exact_only_where_text_is_causal(make_encoder: Make) -> None:
    for family in ("clip", "open-clip"):
        backbone = make_encoder(family)
        words, seen = backbone.tokenise(TEXTS), list[int]()
        padded = torch.cat([backbone.embed_words(words.ids), random(3, 8, 16)], 1)  # whatever stands behind EOT

        def look(index: int, tokens: Tokens) -> Tokens:
            seen.append(tokens.hidden.shape[1])
            return tokens

        same(backbone.text(padded, words.eot, after=look), backbone.encode_text(TEXTS))
        assert seen == [10] * 3
    siglip = make_encoder("siglip")
    words = siglip.tokenise(TEXTS)
    whole = siglip.embed_words(words.ids)
    assert not torch.allclose(
        siglip.text(whole[:, :10], words.eot.clamp(max=9)), siglip.text(whole, words.eot), atol=1e-3
    )


def test_blocks_below_the_first_trained_prompt_record_no_gradient(make_encoder: Make, pixels: Tensor) -> None:
    backbone, recorded = make_encoder("clip"), list[bool]()

    def look(index: int, tokens: Tokens) -> Tokens:
        recorded.append(tokens.hidden.requires_grad)
        return tokens

    backbone.image(pixels, {2: random(2, 24).requires_grad_()}, after=look)
    words = backbone.tokenise(TEXTS)
    backbone.text(backbone.embed_words(words.ids), words.eot, {1: random(2, 16).requires_grad_()}, after=look)
    assert recorded == [False, False, True, False, True, True]
    assert not backbone.image(pixels).requires_grad
    assert not backbone.encode_text(TEXTS).requires_grad


# --- hooks -----------------------------------------------------------------------------------------------------------
def test_hidden_states_of_both_towers_are_those_of_the_library(make_encoder: Make, pixels: Tensor) -> None:
    backbone, seen = make_encoder("clip"), list[Tensor]()

    def look(index: int, tokens: Tokens) -> Tokens:
        seen.append(real(tokens))
        return tokens

    backbone.image(pixels, after=look)
    expected = backbone.model.vision_model(pixels, output_hidden_states=True).hidden_states[1:]
    assert len(seen) == 3
    for a, b in zip(seen, expected, strict=True):
        same(a, b)
    seen.clear()
    backbone.image(pixels, {0: random(2, 24)}, after=look)
    assert [tuple(s.shape) for s in seen] == [(3, 10, 24)] * 3, "prompts are not among the real tokens"
    assert not torch.allclose(seen[0], expected[0], atol=1e-3), "and shift them"


def test_a_module_behind_a_block_changes_what_follows(make_encoder: Make, pixels: Tensor) -> None:
    backbone, extra = make_encoder("clip"), nn.Linear(24, 24)
    tower = backbone.image_tower
    assert tower is not None

    def adapt(index: int, tokens: Tokens) -> Tokens:
        hidden = tokens.hidden + extra(tokens.hidden) if index == 1 else tokens.hidden
        return Tokens(hidden, tokens.mask, tokens.positions, tokens.is_prompt, tokens.full)

    made = backbone.image(pixels, after=adapt)
    one, two, three = blocks(tower)
    hidden = two(one(tower.norm(tower.embed(pixels).hidden)))
    same(made, tower.read(Tokens.of(three(hidden + extra(hidden)))))
    made.sum().backward()
    assert extra.weight.grad is not None


@pytest.mark.parametrize("family", ["clip", "open-clip"])
def test_masked_weights_take_the_place_of_the_models_own_in_one_call(
    family: str, make_encoder: Make, pixels: Tensor
) -> None:
    backbone = make_encoder(family)
    before = snapshot(backbone.model)
    names = [n for n, p in backbone.named_parameters() if n.startswith("model.vi") and p.ndim == 2 and "attn" in n]
    weights = dict(backbone.named_parameters())
    ones = {name: torch.ones_like(weights[name]).requires_grad_() for name in names}
    kept = backbone.call_with({n: weights[n] * m for n, m in ones.items()}, "image", pixels)
    same(kept, backbone.image(pixels))
    kept.square().sum().backward()
    assert all(m.grad is not None and m.grad.abs().max() > 0 for m in ones.values())
    off = {
        n: torch.where(torch.arange(weights[n].numel()).view_as(weights[n]) % 3 == 0, 0.0, weights[n]) for n in names
    }
    masked = backbone.call_with(off, "image", pixels)
    assert_unchanged(backbone.model, before)
    with torch.no_grad():
        for name in names:
            weights[name].copy_(off[name])
    same(masked, backbone.image(pixels))


@pytest.mark.parametrize("family", ["clip", "siglip", "open-clip"])
def test_weights_of_one_call_get_their_gradient_when_chunks_run_again(family: str, make_encoder: Make) -> None:
    backbone = make_encoder(family)
    words = backbone.tokenise(TEXTS)
    name = next(n for n, p in backbone.named_parameters() if "model.vi" not in n and p.ndim == 2 and "proj" in n)
    weight = dict(backbone.named_parameters())[name]
    found = []
    for chunk in (None, 1):
        mask, rows = torch.full_like(weight, 0.7).requires_grad_(), backbone.embed_words(words.ids).requires_grad_()
        made = backbone.call_with({name: weight * mask}, "text", rows, words.eot, chunk=chunk)
        made.square().sum().backward()
        assert mask.grad is not None and rows.grad is not None and bool(mask.grad.any())
        found.append((made, mask.grad, rows.grad))
    for plain, chunked in zip(*found, strict=True):
        same(chunked, plain)
    mask = torch.full_like(weight, 0.7).requires_grad_()  # with nothing else to train
    rows = backbone.embed_words(words.ids)
    backbone.call_with({name: weight * mask}, "text", rows, words.eot, chunk=1).square().sum().backward()
    assert mask.grad is not None
    same(mask.grad, found[0][1])


# --- preprocessing ---------------------------------------------------------------------------------------------------
def test_preprocessing_is_that_of_the_models_own_processor() -> None:
    from PIL import Image
    from transformers import CLIPImageProcessor, SiglipImageProcessor

    image = Image.fromarray((random(40, 60, 3).sigmoid() * 255).to(torch.uint8).numpy()).resize((300, 200))
    clip = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    siglip = SiglipImageProcessor(size={"height": 32, "width": 32})
    for processor, squash in ((clip, False), (siglip, True)):
        made = hf_preprocessing(processor, 32)
        assert made.squash is squash
        expected = torch.as_tensor(processor(images=image, return_tensors="pt")["pixel_values"])[0]
        assert made(image).shape == (3, 32, 32)
        assert (made(image) - expected).abs().max() < 0.06  # two grey levels: resampled in bytes here, there in floats
    assert hf_preprocessing(clip, 32) == Preprocessing(size=32)


@pytest.mark.parametrize(
    "setting",
    [
        {"do_resize": False},
        {"do_rescale": False},
        {"do_normalize": False},
        {"rescale_factor": 1 / 127.5},
        {"resample": 4},
        {"do_center_crop": False},
        {"crop_size": {"height": 24, "width": 24}},
        {"size": {"height": 40, "width": 40}},
    ],
    ids=str,
)
def test_a_processor_that_does_something_else_is_refused(setting: dict[str, Any]) -> None:
    from transformers import CLIPImageProcessor

    known = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    with pytest.raises(InputError, match=rf"'({next(iter(setting))}|size)' asks for a preprocessing that is not known"):
        hf_preprocessing(CLIPImageProcessor(**(known | setting)), 32)


@pytest.mark.parametrize("setting", [{"size": (12, 16)}, {"resize_mode": "longest"}], ids=str)
def test_a_preprocessing_of_open_clip_that_is_another_is_refused(setting: dict[str, Any], make_encoder: Make) -> None:
    made = make_encoder("open-clip")
    settings = {"size": 12, "mean": (0.1,) * 3, "std": (0.2,) * 3, "interpolation": "random", "resize_mode": "shortest"}
    made.model.visual.preprocess_cfg = settings
    expected = Preprocessing(size=12, mean=(0.1,) * 3, std=(0.2,) * 3)
    assert DualEncoder(made.model, made.tokeniser).preprocessing == expected
    made.model.visual.preprocess_cfg = settings | setting
    with pytest.raises(InputError, match="not known here"):
        DualEncoder(made.model, made.tokeniser)
    assert DualEncoder(made.model, made.tokeniser, preprocessing=expected).preprocessing == expected


# --- loading ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_a_folder_gives_the_model_its_tokeniser_and_its_preprocessing(
    family: str, make_encoder: Make, pixels: Tensor, tmp_path: Path
) -> None:
    from transformers import CLIPImageProcessor, SiglipImageProcessor

    made = make_encoder(family)
    made.model.save_pretrained(tmp_path)
    made.tokeniser.save_pretrained(tmp_path)
    by_default = Preprocessing(size=12)
    if family == "siglip":
        by_default = Preprocessing(size=12, squash=True, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert load_backbone(str(tmp_path)).preprocessing == made.preprocessing == by_default
    if family == "clip":
        images = CLIPImageProcessor(
            size={"shortest_edge": 14}, crop_size={"height": 12, "width": 12}, image_mean=[0.1] * 3
        )
        expected = Preprocessing(size=12, resize=14, mean=(0.1, 0.1, 0.1))
    else:
        images = SiglipImageProcessor(size={"height": 12, "width": 12}, resample=2)
        expected = Preprocessing(size=12, squash=True, interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)
    images.save_pretrained(tmp_path)
    loaded = load_backbone(str(tmp_path))
    assert loaded.preprocessing == expected
    assert not loaded.training
    same(loaded.encode_text(TEXTS), made.encode_text(TEXTS))
    same(loaded.image(pixels), made.image(pixels))


def test_open_clip_models_load_by_name_and_by_weight_file(tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 16, "layers": 2, "width": 16, "head_width": 8, "patch_size": 4}
    text = {"context_length": 20, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 2}
    (tmp_path / "tiny-for-tests.json").write_text(json.dumps({"embed_dim": 4, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(tmp_path)
    made = load_backbone("open-clip:tiny-for-tests")
    assert (made.context, made.preprocessing.size, made.width) == (20, 16, 4)
    assert made.preprocessing.mean == Preprocessing().mean
    assert made.source is None, "other weights whenever it is loaded"
    with torch.no_grad():
        made.model.visual.proj.mul_(3)
    torch.save(made.model.state_dict(), tmp_path / "weights.pt")
    loaded = load_backbone(f"open-clip:tiny-for-tests/{tmp_path / 'weights.pt'}")
    assert loaded.source is None, "a path stays on this machine"
    pixels = random(2, 3, 16, 16)
    same(loaded.image(pixels), made.image(pixels))
    assert loaded.encode_text(["a cat."]).shape == (1, 4)
    with pytest.raises(InputError, match="open_clip cannot load nonsense") as caught:
        load_backbone("open-clip:nonsense")
    assert len(str(caught.value)) < 200
    with pytest.raises(InputError, match="it knows no model 'ViT-B'. Did you mean .*ViT-B-32"):
        load_backbone("open-clip:ViT-B/32")


def test_a_folder_of_open_clip_loads_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 4}
    text = {"context_length": 20, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1}
    config = {"embed_dim": 4, "vision_cfg": vision, "text_cfg": text}
    content = {"model_cfg": config, "preprocess_cfg": {"size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    model = open_clip.CLIP(4, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text))
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    monkeypatch.chdir(tmp_path.parent)
    for place in (tmp_path, Path(tmp_path.name)):  # absolute and relative
        made = load_backbone(f"open-clip:local-dir:{place}")
        assert made.source is None, "a path stays on this machine"
        assert torch.equal(made.model.state_dict()["token_embedding.weight"], model.token_embedding.weight)
        assert made.preprocessing.mean == (0.5, 0.5, 0.5)
    with pytest.raises(InputError, match="open_clip cannot load local-dir:/no/such"):
        load_backbone("open-clip:local-dir:/no/such")


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_a_folder_without_a_tokenizer_is_refused(
    family: str, tmp_path: Path, make_encoder: Callable[..., DualEncoder]
) -> None:
    made, problem = make_encoder(family), "holds no tokenizer. Save it there with processor.save_pretrained"
    made.model.save_pretrained(tmp_path)  # type: ignore[operator]
    with pytest.raises(InputError, match=problem):
        load_backbone(str(tmp_path))
    if family == "clip":  # transformers makes one of special tokens
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
        with pytest.raises(InputError, match=problem):
            load_backbone(str(tmp_path))
    made.tokeniser.save_pretrained(tmp_path)
    assert load_backbone(str(tmp_path)).tokeniser_hash == made.tokeniser_hash


def test_a_name_that_leads_nowhere_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be loaded"):
        load_backbone(str(tmp_path))


def test_damaged_weights_are_an_input_error(tmp_path: Path, make_encoder: Callable[..., DualEncoder]) -> None:
    made = make_encoder()
    made.model.save_pretrained(tmp_path)  # type: ignore[operator]
    made.tokeniser.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(InputError, match=r"the weights of .* cannot be read \(.*\)\. They are damaged"):
        load_backbone(str(tmp_path))


def test_weights_that_are_not_all_there_are_refused_by_name(tmp_path: Path, make_encoder: Make) -> None:
    made = make_encoder()
    made.model.save_pretrained(tmp_path)  # type: ignore[operator]
    made.tokeniser.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lacking = {name: tensor for name, tensor in weights.items() if "text_model.encoder.layers.0.mlp" not in name}
    save_file(lacking, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        InputError, match=r"text_model\.encoder\.layers\.0\.mlp\.fc1\.bias is missing and 3 more\. They are"
    ):
        load_backbone(str(tmp_path))
    narrow = weights | {"text_projection.weight": weights["text_projection.weight"][:, :8].contiguous()}
    save_file(narrow, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        InputError, match=r"text_projection\.weight is \[8, 8\], not \[8, 16\]\. They are of another model"
    ):
        load_backbone(str(tmp_path))


@pytest.mark.parametrize("content", ['{"image_mean": [0.5, 0.', '{"image_processor_type": "Nonsense"}'])
def test_a_damaged_image_processor_is_refused_and_not_replaced(
    content: str, tmp_path: Path, make_encoder: Make
) -> None:
    made = make_encoder()
    made.model.save_pretrained(tmp_path)  # type: ignore[operator]
    made.tokeniser.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(InputError, match=r"preprocessor_config\.json: how .* prepares its images cannot be read"):
        load_backbone(str(tmp_path))


def test_offline_a_hub_model_whose_image_processor_was_never_fetched_is_refused(
    tmp_path: Path, make_encoder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, cache, commit = make_encoder(), tmp_path / "models--me--clip", "c" * 40
    snapshot, lacking = cache / "snapshots" / commit, cache / ".no_exist" / commit
    for folder in (snapshot, lacking, cache / "refs"):
        folder.mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    made.model.save_pretrained(snapshot)  # type: ignore[operator]
    made.tokeniser.save_pretrained(snapshot)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"me/clip prepares .* \(preprocessor_config\.json is not in the cache"):
        load_backbone("me/clip")
    (lacking / "preprocessor_config.json").touch()
    assert load_backbone("me/clip").preprocessing == made.preprocessing
