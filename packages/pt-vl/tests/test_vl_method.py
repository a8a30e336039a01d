"""What all image-text methods share: classes, templates, what is computed once, what is saved."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tokenizers import Tokenizer, normalizers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import vector_to_parameters
from torch.testing import assert_close
from transformers import CLIPConfig, CLIPModel

from pt_core import registry
from pt_core.artifacts import CONFIG, load, load_artifact
from pt_core.errors import InputError
from pt_core.plan import FitConfig
from pt_vl.backbones import DualEncoder, load_backbone
from pt_vl.method import VLConfig, cache_features
from pt_vl.methods.coop import CoOp, CoOpConfig
from pt_vl.methods.linear_probe import LinearProbe, LinearProbeConfig
from pt_vl.methods.mvlpt import MVLPT, MVLPTConfig
from pt_vl.methods.r_amt import RAMT
from pt_vl.methods.restore import RESTORE, RESTOREConfig
from pt_vl.methods.tip_adapter import TipAdapter, TipAdapterF
from pt_vl.methods.zero_shot import ZeroShot, ZeroShotConfig
from pt_vl.preprocessing import Preprocessing

Make = Callable[..., Any]
CLASSES = ("cat", "big_house", "red car")
RUN = FitConfig(epochs=2, batch_size=4, device="cpu", progress=False, optimiser="sgd", momentum=0.9, weight_decay=5e-4)


def coop(backbone: Any, **settings: Any) -> CoOp:
    return CoOp(backbone, CoOpConfig(**{"class_names": CLASSES, "prompt_length": 3, "lr": 0.05} | settings))


def test_class_names_that_are_one_are_refused() -> None:
    with pytest.raises(ValidationError, match="class names 'red_car' and 'red car' are one"):
        VLConfig(class_names=("red_car", "cat", "red car"))
    with pytest.raises(ValidationError, match="class names 'cat' and 'cat' are one"):
        VLConfig(class_names=("cat", "dog", "cat"))
    with pytest.raises(ValidationError, match="a class name is empty"):
        VLConfig(class_names=("cat", "_"))
    with pytest.raises(ValidationError, match="at least 2 items"):
        VLConfig(class_names=("cat",))


def test_a_template_without_a_place_for_the_name_is_refused() -> None:
    with pytest.raises(ValidationError, match="needs one {}"):
        VLConfig(class_names=("cat", "dog"), templates="a photo.")


def test_class_names_that_do_not_fit_the_context_are_refused_by_name(make_encoder: Make) -> None:
    long = "a " * 16
    with pytest.raises(InputError, match=r"'a photo of a a a .*' takes 23 tokens, there are 18"):
        ZeroShot(make_encoder(), ZeroShotConfig(class_names=("cat", long)))
    with pytest.raises(InputError, match=r"'a a .*' takes 19 tokens, there are 15"):
        coop(make_encoder(), class_names=("cat", long))
    with pytest.raises(InputError, match="16 context slots leave no room in 18"):
        coop(make_encoder(), prompt_length=16)


def test_a_bare_model_is_refused_with_the_way_to_wrap_it(make_model: Make) -> None:
    with pytest.raises(InputError, match="want a DualEncoder, not a CLIPModel.*Wrap it"):
        ZeroShot(make_model(), ZeroShotConfig(class_names=CLASSES))


def test_a_method_without_classes_is_refused(make_encoder: Make) -> None:
    with pytest.raises(InputError, match="zero-shot has to know the classes"):
        ZeroShot(make_encoder())


def test_class_features_are_computed_once_until_what_they_depend_on_changes(
    make_encoder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, calls = coop(make_encoder()).eval(), list[int]()
    inner = method.encode_text
    monkeypatch.setattr(method, "encode_text", lambda: (calls.append(1), inner())[1])
    with torch.no_grad():
        first = method.text_features()
        assert method.text_features() is first
        assert len(calls) == 1
        method.context.add_(torch.randn(3, 16, generator=torch.Generator().manual_seed(1)))
        changed = method.text_features()
    assert len(calls) == 2
    assert not torch.allclose(changed, first, atol=1e-3)
    with torch.no_grad():
        assert_close(changed, inner())
    assert method.text_features().requires_grad, "a gradient that is wanted is there"


def test_values_that_change_behind_autograd_and_buffers_are_seen(make_encoder: Make) -> None:
    method = RESTORE(make_encoder(), RESTOREConfig(class_names=CLASSES, depth=3)).eval()
    flat = torch.randn(method.count(), generator=torch.Generator().manual_seed(2))

    def swapped() -> None:
        method.deep.data = torch.randn(method.deep.shape, generator=torch.Generator().manual_seed(3))

    for change in (
        lambda: method.context.data.mul_(2),
        swapped,
        lambda: vector_to_parameters(flat, method.parameters()),
        lambda: method.alphas.copy_(torch.tensor([5.0, 5.0])),
    ):
        with torch.no_grad():
            before = method.text_features()
            assert method.text_features() is before
            change()
            assert not torch.allclose(method.text_features(), before, atol=1e-4)
            assert torch.equal(method.text_features(), method.encode_text())


def test_an_optimisers_step_is_seen(make_encoder: Make, make_images: Make) -> None:
    for optimiser in (torch.optim.SGD, torch.optim.AdamW):
        method = coop(make_encoder()).eval()
        batch = make_images(4).batch([0, 1, 2, 3])
        before = method(batch).logits.detach()
        with torch.no_grad():
            assert torch.equal(method(batch).logits, before)
        step = optimiser(method.parameters(), lr=0.5)
        method.loss(batch).total.backward()
        step.step()
        with torch.no_grad():
            assert not torch.allclose(method(batch).logits, before, atol=1e-3)


def test_training_on_cached_image_features_gives_what_training_on_pixels_gives(
    make_encoder: Make, make_images: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, validation = make_images(9), make_images(5, seed=1)
    passes = list[int]()

    def run(cached: bool) -> tuple[CoOp, Any]:
        backbone = make_encoder()
        method = coop(backbone)
        inner = backbone.image
        monkeypatch.setattr(backbone, "image", lambda p: (passes.append(len(p)), inner(p))[1])
        if not cached:
            monkeypatch.setattr("pt_vl.method.cache_features", lambda split, *_: split)
        return method, method.fit(train, validation, RUN)

    fast, result = run(True)
    assert sum(passes) == 9 + 5, "every image passes the tower once"
    passes.clear()
    slow, expected = run(False)
    assert sum(passes) > 9 + 5
    assert_close(fast.context, slow.context, rtol=1e-4, atol=1e-6)
    assert result.metrics == pytest.approx(expected.metrics, rel=1e-4)


def test_features_are_cached_only_of_fixed_views(make_encoder: Make, make_images: Make) -> None:
    backbone, split = make_encoder(), make_images(5)
    views = make_images(5, fixed=False)
    assert cache_features(views, backbone) is views
    cached = cache_features(split, backbone, 2)
    assert cache_features(cached, backbone) is cached
    batch, plain = cached.batch([3, 1]), split.batch([3, 1])
    assert set(batch) == {"image_features", "labels", "sample_ids"}
    assert batch["sample_ids"] == plain["sample_ids"] == ["image-3", "image-1"]
    assert torch.equal(batch["labels"], plain["labels"])
    assert_close(batch["image_features"], backbone.image(plain["pixels"]))


def features(split: Any, backbone: Any, folder: Any = None) -> Tensor:
    cached = cache_features(split, backbone, 2, folder)
    return cached.batch(range(len(cached)))["image_features"]


def test_a_folder_gives_the_bits_of_memory_without_another_pass(
    make_encoder: Make, make_images: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    backbone, other, split = make_encoder(), make_encoder(seed=1), make_images(5)
    passes, inner = list[int](), DualEncoder.image
    monkeypatch.setattr(DualEncoder, "image", lambda self, p: (passes.append(len(p)), inner(self, p))[1])
    plain = features(split, backbone)
    for _ in range(2):
        assert torch.equal(features(split, backbone, tmp_path), plain)
        assert passes == [2, 2, 1] * 2
    rows = [3, 0, 1]  # a batch of other rows is computed anew: its last bits may be others
    assert torch.equal(features(split.subset(rows), backbone, tmp_path), features(split.subset(rows), backbone))
    assert passes[6:] == [2, 1] * 2
    assert torch.equal(features(split, other, tmp_path), features(split, other)), "another backbone has other features"
    assert torch.equal(features(split, backbone, tmp_path), plain)


def activated(make_encoder: Make, family: str, activation: str) -> DualEncoder:
    """The same weights with one activation or the other."""
    made: DualEncoder = make_encoder(family)
    if family == "clip":
        settings = made.model.config.to_dict()
        for tower in ("text_config", "vision_config"):
            settings[tower]["hidden_act"] = activation
        other = CLIPModel(CLIPConfig(**settings)).eval()
        other.load_state_dict(made.model.state_dict())
        return DualEncoder(other, made.tokeniser).eval()
    for part in made.model.modules():
        if hasattr(part, "gelu") and activation == "gelu":
            part.gelu = nn.GELU()
        elif hasattr(part, "gelu"):
            part.gelu = importlib.import_module("open_clip.transformer").QuickGELU()
    return made


@pytest.mark.parametrize("family", ["clip", "open-clip"])
def test_the_same_weights_with_another_activation_are_another_backbone(
    family: str, make_encoder: Make, make_images: Make, tmp_path: Any
) -> None:
    quick, plain = activated(make_encoder, family, "quick_gelu"), activated(make_encoder, family, "gelu")
    path = coop(quick).save_pretrained(tmp_path / "prompt", backbone_name="a/b")
    load(path, activated(make_encoder, family, "quick_gelu"), strict=True)
    with pytest.warns(UserWarning, match="may not fit this backbone, .*: the configuration differs"):
        load(path, plain)
    with pytest.raises(InputError, match="not bit for bit a/b: the configuration differs"):
        load(path, plain, strict=True)
    first, other = (features(make_images(3), backbone, tmp_path / "features") for backbone in (quick, plain))
    assert torch.equal(other, features(make_images(3), plain)) and not torch.equal(first, other)


def test_features_of_autocast_are_kept_apart(make_encoder: Make, make_images: Make, tmp_path: Any) -> None:
    backbone, split = make_encoder(), make_images(3)
    for enabled in (True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert torch.equal(features(split, backbone, tmp_path), features(split, backbone))


def test_new_class_names_keep_the_prompt(make_encoder: Make, make_images: Make) -> None:
    method = coop(make_encoder())
    method.fit(make_images(6), None, RUN)
    new = method.with_classes(("dog", "bird", "tree", "cat"))
    assert torch.equal(new.context, method.context)
    assert new.config.class_names == ("dog", "bird", "tree", "cat")
    batch = make_images(4).batch([0, 1, 2, 3])
    with torch.no_grad():
        logits, old = new(batch).logits, method(batch).logits
    assert logits.shape == (4, 4)
    assert_close(logits[:, 3], old[:, 0], rtol=1e-4, atol=1e-4)  # the class that both know
    assert new.training == method.training


@pytest.mark.parametrize(
    "cls", [CoOp, RAMT, RESTORE, LinearProbe, TipAdapter, TipAdapterF, ZeroShot], ids=lambda cls: cls.name
)
def test_rows_of_other_classes_or_of_another_order_are_refused(cls: Any, make_encoder: Make, make_images: Make) -> None:
    split = make_images(6)
    named = replace(split, class_names=("cat", "big house", "red_car"))
    settings = {"coop": {"prompt_length": 3}, "restore": {"depth": 2}}
    settings |= {name: {"cache_size": 6} for name in ("tip-adapter", "tip-adapter-f")}
    backbone, more = make_encoder(), settings.get(cls.name, {})

    def refused(names: tuple[str, ...], train: Any, validation: Any = None) -> str:
        method = cls(backbone, cls.config_class(class_names=names, **more))
        with pytest.raises(InputError, match=r"field 'class_names': .*Give .* names that the data have") as caught:
            method.fit(train, validation, RUN)
        return str(caught.value)

    assert f"training rows are of 3 classes, {cls.name} was made for 2" in refused(CLASSES[:2], split)
    assert f"validation rows are of 3 classes, {cls.name} was made for 4" in refused(
        (*CLASSES, "dog"), replace(split, num_classes=4), split
    )
    assert f"label 0 is 'cat' in the training rows, 'red car' in {cls.name}" in refused(CLASSES[::-1], named)
    assert "label 0 is 'cat' in the validation rows" in refused(CLASSES[::-1], split, named)
    if cls is ZeroShot:
        cls(backbone, cls.config_class(class_names=CLASSES)).fit(named, named, RUN)  # underscores are spaces


def test_one_text_is_not_the_new_class_names(make_encoder: Make) -> None:
    method, shared = coop(make_encoder()), MVLPT(make_encoder(), MVLPTConfig(tasks={"one": CLASSES}, prompt_length=3))
    for ask in (method.with_classes, shared.for_target):
        with pytest.raises(InputError, match="field 'class_names': 'dog' is one text, not the class names"):
            ask("dog")
    probe = ZeroShot(make_encoder(), ZeroShotConfig(class_names=CLASSES))
    assert probe.with_classes(("dog", "cat"), "the {}.").config.templates == ("the {}.",)


def test_what_belongs_to_its_classes_has_no_new_ones(make_encoder: Make) -> None:
    backbone = make_encoder()
    for method in (
        coop(backbone, class_specific=True),
        LinearProbe(backbone, LinearProbeConfig(class_names=CLASSES)),
    ):
        with pytest.raises(InputError, match="belongs to its own classes"):
            method.with_classes(("dog", "bird"))


def test_an_artifact_rebuilds_the_method_and_records_preprocessing(
    make_encoder: Make, make_images: Make, tmp_path: Any
) -> None:
    method = coop(make_encoder())
    method.fit(make_images(6), None, RUN)
    path = method.save_pretrained(tmp_path / "prompt", task={"data": "pets"})
    task = load_artifact(path).config.task
    assert task is not None
    assert task["data"] == "pets"
    assert task["preprocessing"] == method.backbone.preprocessing.model_dump(mode="json")
    assert task["context"] == 18
    assert task["tokenizer_hash"] == method.backbone.tokeniser_hash
    loaded = load(path, make_encoder())
    assert loaded.config == method.config
    with torch.no_grad():
        batch = make_images(4).batch([0, 1, 2, 3])
        assert torch.equal(loaded(batch).logits, method(batch).logits)


def test_a_backbone_that_prepares_images_otherwise_is_warned_of_and_refused_when_strict(
    make_encoder: Make, tmp_path: Any
) -> None:
    backbone = make_encoder()
    squashed = Preprocessing(size=12, squash=True, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    path = coop(DualEncoder(backbone.model, backbone.tokeniser, squashed)).save_pretrained(tmp_path / "prompt")
    otherwise = (
        r"images that were prepared otherwise: squash is False, was True; mean is .*, was \[0\.5, 0\.5, 0\.5\]; std"
    )
    with pytest.warns(UserWarning, match=otherwise):
        load(path, make_encoder())
    with pytest.raises(InputError, match=otherwise):
        load(path, make_encoder(), strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(path, DualEncoder(backbone.model, backbone.tokeniser, squashed), strict=True)


@pytest.mark.parametrize(
    "name", ["zero-shot", "linear-probe", "tip-adapter", "tip-adapter-f", "vpt", "restore", "r-amt"]
)
def test_a_backbone_in_float16_with_bf16_on_a_cpu_is_refused_before_it_runs(
    name: str, make_encoder: Make, make_images: Make
) -> None:
    backbone, method = make_encoder().to(torch.float16), registry.find_method("vl", name)
    settings = {"cache_size": 6} if name.startswith("tip") else {"depth": 2} if name == "restore" else {}
    made: Any = method(backbone, method.config_class(class_names=CLASSES, **settings))
    with pytest.raises(
        InputError, match="field 'training.precision': a backbone in float16 does not go with bf16 on a CPU"
    ):
        made.fit(make_images(6), None, RUN.model_copy(update={"precision": "bf16"}))
    assert made.fit(make_images(6), None, RUN.model_copy(update={"max_steps": 1, "epochs": None})) is not None


def spoilt(backbone: DualEncoder, how: str) -> DualEncoder:
    """The backbone with a tokeniser that has other ids, reads capitals as small letters, or knows one word more."""
    words = backbone.tokeniser.backend_tokenizer
    if how == "ids":
        content = words.to_str()
        for old, new in (('"cat"', '"?"'), ('"dog"', '"cat"'), ('"?"', '"dog"')):
            content = content.replace(old, new)
        backbone.tokeniser._tokenizer = Tokenizer.from_str(content)
    elif how == "case":
        words.normalizer = normalizers.Lowercase()
    else:
        backbone.tokeniser.add_tokens(["motorbike"])
    return backbone


@pytest.mark.parametrize("how", ["ids", "case", "word"])
@pytest.mark.parametrize("family", ["clip", "siglip", "open-clip"])
def test_a_prompt_is_refused_where_another_tokeniser_would_read_its_class_names(
    family: str, how: str, make_encoder: Make, tmp_path: Any
) -> None:
    path = coop(make_encoder(family)).save_pretrained(tmp_path / "prompt", task={"tokenizer_hash": ""})
    load(path, make_encoder(family), strict=True)
    other = spoilt(make_encoder(family), how)
    with pytest.raises(InputError, match=r"prompt: .* with another tokenizer\. Use the tokenizer of its backbone"):
        load(path, other)
    content = json.loads((path / CONFIG).read_text())
    del content["task"]["tokenizer_hash"]  # as older artifacts are
    (path / CONFIG).write_text(json.dumps(content))
    load(path, other)


def test_a_prompt_of_the_mini_clip_is_refused_with_another_tokeniser(tmp_path: Any) -> None:
    path = coop(load_backbone("zoo:mini-clip")).save_pretrained(tmp_path / "prompt")
    load(path, load_backbone("zoo:mini-clip"))
    with pytest.raises(InputError, match="with another tokenizer"):
        load(path, spoilt(load_backbone("zoo:mini-clip"), "word"))


def test_the_hash_of_open_clips_own_tokenisers_follows_what_they_do_to_a_text(
    make_model: Make, make_tokeniser: Make, tmp_path: Any
) -> None:
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed: the extra `open-clip` of pt-vl")
    make_tokeniser().save_pretrained(tmp_path)
    model, files = make_model("open-clip"), {"tokenizer_name": str(tmp_path), "context_length": 18}
    made = [open_clip.SimpleTokenizer(clean=clean) for clean in ("lower", "whitespace")]
    made.append(open_clip.SimpleTokenizer(additional_special_tokens=["<X>"]))
    made += [open_clip.tokenizer.HFTokenizer(clean=clean, **files) for clean in ("lower", "canonicalize")]
    made += [make_tokeniser(), open_clip.SimpleTokenizer()]
    hashes = [DualEncoder(model, tokeniser).tokeniser_hash for tokeniser in made]
    assert hashes.pop() == hashes[0] and len(set(hashes)) == len(hashes)


@pytest.mark.filterwarnings("ignore::pt_core.training.NotLearning")
def test_the_coop_run_has_the_published_rates(make_encoder: Make, make_images: Make) -> None:
    changes = {"epochs": 5, "schedule": "epoch-cosine", "log_every": 1, "max_grad_norm": None}
    history = coop(make_encoder(), lr=1.0).fit(make_images(4), None, RUN.model_copy(update=changes)).history
    assert [row["lr/prompt"] for row in history] == pytest.approx([1e-5, 1, 0.9045, 0.6545, 0.3455], abs=5e-5)


def test_logits_are_scaled_cosines_in_float32_under_autocast(make_encoder: Make, pixels: Tensor) -> None:
    backbone = make_encoder()
    f, w = torch.randn(3, 8), torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = backbone.similarity(f, w)
    expected = backbone.logit_scale.exp() * F.normalize(f, dim=-1) @ F.normalize(w, dim=-1).T
    assert logits.dtype == torch.float32
    assert_close(logits, expected)
