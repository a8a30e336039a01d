"""R-AMT: binary masks with a straight-through gradient, and gradient dropout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from pt_core import FitConfig, InputError
from pt_core.data import Split
from pt_core.evaluation import evaluate
from pt_core.method import Loss
from pt_core.training import Loop
from pt_vl.method import Stacked
from pt_vl.methods.r_amt import RAMT, RAMTConfig, binarise, dropped, keep_probability, pack, unpack
from pt_vl.methods.zero_shot import ZeroShot, ZeroShotConfig

NAMES = ("cat", "red dog", "house")


def ramt(encoder: Any, **settings: Any) -> RAMT:
    return RAMT(encoder, RAMTConfig(class_names=NAMES, **settings))


def images(rows: int = 6) -> Split:
    pixels = torch.randn(rows, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    listed = [{"pixels": p, "label": i % 3} for i, p in enumerate(pixels)]
    return Split(listed, Stacked(), metrics=("accuracy",), num_classes=3)


def run(**changes: Any) -> FitConfig:
    plain = {"max_steps": 4, "batch_size": 3, "device": "cpu", "progress": False, "optimiser": "adam"}
    return FitConfig(**(plain | {"max_grad_norm": None, "keep_best": False} | changes))


@pytest.mark.parametrize("family", ["clip", "open-clip"])
def test_at_the_start_it_is_the_zero_shot_model(family: str, make_encoder: Callable[..., Any]) -> None:
    method = ramt(make_encoder(family))
    plain = ZeroShot(make_encoder(family), ZeroShotConfig(class_names=NAMES))
    batch = images().batch(range(4))
    torch.testing.assert_close(method(batch).logits, plain(batch).logits)
    assert method.sparsity() == 0.0
    teacher = method.backbone.image(batch["pixels"])
    b = torch.autograd.grad(method.agreement(method(batch).logits, teacher), list(method.masks))
    assert max(float(g.abs().max()) for g in b) < 1e-5  # the gradient of staying where it is


def test_the_masked_weights_and_their_count(make_encoder: Callable[..., Any]) -> None:
    d, layers, patches = 24, 3, 24 * 3 * 4 * 4
    attention, mlp = layers * 4 * d * d, layers * 2 * 48 * d
    assert ramt(make_encoder()).count() == attention + patches
    assert ramt(make_encoder("open-clip")).count() == attention + patches
    assert ramt(make_encoder(), mask_patches=False).count() == attention
    assert ramt(make_encoder(), masked="all").count() == attention + mlp + patches
    assert (
        ramt(make_encoder("siglip"), masked="all").count() == attention + mlp + patches
    )  # the head that pools stays whole
    assert ramt(make_encoder("open-clip"), masked="all").count() == attention + 2 * mlp + patches  # its MLPs are wider
    attention, patches = 12 * 4 * 768**2, 768 * 3 * 16 * 16  # of ViT-B/16
    assert f"attention {attention:,}, with the patch embedding (the default) {attention + patches:,}" in RAMT.__doc__
    assert all("vision_model" in name and not name.endswith("bias") for name in ramt(make_encoder()).weights)


def test_the_table_of_keep_probabilities() -> None:
    pairs = {(1.0, 3.0): 1.0, (1.0, -1.0): 0.5, (-2.0, 1.0): 2 / 3, (1.0, -3.0): 0.25, (0.0, 5.0): 0.5}
    for (a, b), expected in pairs.items():
        assert float(keep_probability(torch.tensor(a), torch.tensor(b))) == pytest.approx(expected, abs=1e-6)
    a, b = torch.randn(2, 1000)
    assert bool(((keep_probability(a, b) >= 0) & (keep_probability(a, b) <= 1)).all())


def test_without_disagreement_nothing_is_dropped() -> None:
    a = torch.tensor([1.0, -2.0, 1e-3])
    assert float((keep_probability(a, torch.zeros(3)) - 1).abs().max()) < 1e-5


def test_the_hand_example_of_gradient_dropout() -> None:
    a, b = torch.tensor(1.0), torch.tensor(-3.0)
    assert float(dropped(a, b, 0.3, torch.tensor(0.4))) == pytest.approx(0.7)
    assert float(dropped(a, b, 0.3, torch.tensor(0.2))) == pytest.approx(1.0)
    assert float(dropped(a, b, 0.0, torch.tensor(0.99))) == 1.0


def test_the_expected_gradient() -> None:
    draws = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    a, b = torch.full_like(draws, 1.5), torch.full_like(draws, -2.0)
    p = 1.5 / 3.5
    assert float(dropped(a, b, 0.6, draws).mean()) == pytest.approx(1.5 * (1 - 0.6 * (1 - p)), rel=5e-3)


def test_the_gradient_passes_straight_through_the_threshold() -> None:
    weight, x = torch.randn(3, 4), torch.randn(2, 4)
    mask = torch.tensor([[0.01, 0.001, 0.01, 0.0], [0.01] * 4, [0.0] * 4], requires_grad=True)
    effective = (binarise(mask, 0.005) * weight).detach().requires_grad_()
    F.linear(x, effective).square().sum().backward()
    F.linear(x, binarise(mask, 0.005) * weight).square().sum().backward()
    assert mask.grad is not None and effective.grad is not None
    torch.testing.assert_close(mask.grad, weight * effective.grad)


def test_the_threshold_itself_switches_off() -> None:
    values = torch.tensor([0.005, 0.0050001])
    assert binarise(values, 0.005).tolist() == [0.0, 1.0]


def switched(method: RAMT) -> RAMT:
    """With about a third of the weights switched off."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for mask in method.masks:
            mask[torch.rand(mask.shape, generator=draw) < 0.3] = 0.0
    assert 0.25 < method.sparsity() < 0.35
    return method


def test_evaluation_has_the_cross_entropy_alone_before_and_after_saving(
    make_encoder: Callable[..., Any], tmp_path: Path
) -> None:
    method, rows = switched(ramt(make_encoder(), l2=0.5)), images()
    batch = rows.batch(range(6))
    entropy = float(F.cross_entropy(method(batch).logits, batch["labels"]))
    assert float(method.loss(batch).value) > entropy + 0.01  # in training
    loaded = RAMT.from_pretrained(method.save_pretrained(tmp_path / "prompt"), make_encoder())
    for each in (method, loaded):
        assert evaluate(each, rows)["loss"] == pytest.approx(entropy, rel=1e-4)
    logged = method.fit(rows, rows, run(evaluate_every=4)).metrics["loss"]
    assert logged == pytest.approx(evaluate(method, rows)["loss"], rel=1e-4)


@pytest.mark.parametrize("family", ["clip", "open-clip"])
def test_agreement_is_by_hand_the_cross_entropy_of_tempered_probabilities(
    family: str, make_encoder: Callable[..., Any]
) -> None:
    method, batch, rows = switched(ramt(make_encoder(family), temperature=2.0)), images().batch(range(4)), 4
    known = ZeroShot(make_encoder(family), ZeroShotConfig(class_names=NAMES))(batch).logits
    logits = method(batch).logits
    agreement = method.agreement(logits, method.backbone.image(batch["pixels"]))
    teacher, student = ((z / 2).exp() / (z / 2).exp().sum(1, keepdim=True) for z in (known, logits))
    assert float((teacher - student).detach().abs().max()) > 0.05
    torch.testing.assert_close(agreement, -(2.0**2) * (teacher * student.log()).sum() / rows)
    by_hand = 2.0 * (student - teacher).detach() / rows  # of the logits of the student, as of KL(teacher, student)
    torch.testing.assert_close(torch.autograd.grad(agreement, logits, retain_graph=True)[0], by_hand)
    masks = list(method.masks)
    expected = torch.autograd.grad(logits, masks, by_hand, retain_graph=True)
    for found, gradient in zip(torch.autograd.grad(agreement, masks), expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fixed", [True, False])
def test_a_step_applies_the_task_gradient_with_what_the_teacher_refuses_dropped(
    fixed: bool, make_encoder: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, rows = {"temperature": 2.0, "gradient_dropout": 0.3, "l2": 0.1}, images()
    rows.collate = Stacked(fixed)
    method, plain = (switched(ramt(make_encoder(), **settings)) for _ in range(2))
    used: list[torch.Tensor] = []
    draws: list[torch.Tensor] = []
    batches: list[Any] = []
    update, drawn, forward = Loop.update, torch.rand_like, method.forward

    def step(loop: Loop) -> None:
        used.extend(mask.grad.clone() for mask in method.masks if mask.grad is not None)
        update(loop)

    monkeypatch.setattr(Loop, "update", step)
    monkeypatch.setattr(torch, "rand_like", lambda x: (draws.append(drawn(x)), draws[-1])[1])
    method.forward = lambda batch: (batches.append(batch), forward(batch))[1]  # type: ignore[method-assign]
    method.fit(rows, None, run(max_steps=1))
    (batch,) = batches
    logits = plain(batch).logits
    assert logits.shape == (3, 3)
    task = plain.task_loss(logits, batch["labels"]).value
    a = torch.autograd.grad(task, list(plain.masks), retain_graph=True)
    b = torch.autograd.grad(plain.agreement(logits, plain.backbone.image(batch["pixels"])), list(plain.masks))
    assert len(used) == len(draws) == len(a)
    cut = 0
    for found, u, of_task, of_teacher in zip(used, draws, a, b, strict=True):
        # but where rounding decides whether the draw is below the probability
        sure = (keep_probability(of_task, of_teacher) - u).abs() > 1e-3
        assert float(sure.float().mean()) > 0.97
        expected = dropped(of_task, of_teacher, 0.3, u)
        torch.testing.assert_close(found[sure], expected[sure], rtol=1e-3, atol=1e-7)
        cut += int((expected != of_task).sum())
    assert 0.1 < cut / plain.count() < 0.9


def test_strength_zero_is_plain_mask_tuning(make_encoder: Callable[..., Any]) -> None:
    off, plain = ramt(make_encoder(), gradient_dropout=0.0, lr=3e-3), ramt(make_encoder(), lr=3e-3)
    off.fit(images(), None, run(max_steps=6))
    plain.loss = lambda batch: Loss.mean(RAMT.loss(plain, batch).value)  # type: ignore[method-assign]
    super(RAMT, plain).fit(images(), None, run(max_steps=6))
    assert all(torch.equal(a, b) for a, b in zip(off.masks, plain.masks, strict=True))
    # A weight has to be switched off before the teacher disagrees, and with it the two gradients.
    dropping = ramt(make_encoder(), lr=3e-3)
    dropping.fit(images(), None, run(max_steps=6))
    assert any(not torch.equal(a, b) for a, b in zip(off.masks, dropping.masks, strict=True))


def test_the_first_step_moves_every_value_by_at_most_the_rate(make_encoder: Callable[..., Any]) -> None:
    method = ramt(make_encoder())
    method.fit(images(), None, run(max_steps=1))
    moved = max(float((mask - 0.01).abs().max()) for mask in method.masks)
    assert 0 < moved <= 8e-5 * (1 + 1e-4)
    assert method.sparsity() == 0.0


def constant(method: RAMT, scale: Callable[[], float]) -> None:
    """Makes the gradient of all mask values the same number, drawn anew in each step."""

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> Loss:
        return Loss.mean(scale() * torch.stack([mask.sum() for mask in method.masks]).sum() + 0.0 * logits.sum())

    method.task_loss = loss  # type: ignore[method-assign]


def test_a_constant_gradient_needs_63_steps_to_switch_off(make_encoder: Callable[..., Any]) -> None:
    for steps, sparsity in ((62, 0.0), (63, 1.0)):
        method = ramt(make_encoder(), gradient_dropout=0.0)
        constant(method, lambda: 1.0)
        method.fit(images(3), None, run(max_steps=steps))
        assert method.sparsity() == sparsity, steps


def test_no_gradient_switches_off_before_step_20(make_encoder: Callable[..., Any]) -> None:
    """Adam moves a value by at most lr (1 - b1) / sqrt(1 - b2) = 3.162 lr: the worst is one gradient after many zeros."""
    bound = 8e-5 * (1 - 0.9) / (1 - 0.999) ** 0.5
    assert bound == pytest.approx(3.162 * 8e-5, rel=1e-4) and 19 * bound < 0.005 < 20 * bound
    for growth in (1.0, 1.2, 3.0):
        method, sizes = ramt(make_encoder(), gradient_dropout=0.0), iter(growth**i for i in range(19))
        constant(method, lambda sizes=sizes: next(sizes))
        method.fit(images(3), None, run(max_steps=19))
        moved = max(float((mask - 0.01).abs().max()) for mask in method.masks)
        assert moved < 19 * bound and method.sparsity() == 0.0


def test_the_first_step_is_plain_mask_tuning(make_encoder: Callable[..., Any]) -> None:
    dropping, plain = ramt(make_encoder()), ramt(make_encoder(), gradient_dropout=0.0)
    for method in (dropping, plain):
        method.fit(images(), None, run(max_steps=1))
    same = torch.cat([(a == b).flatten() for a, b in zip(dropping.masks, plain.masks, strict=True)])
    assert float(same.float().mean()) > 0.999  # but where a gradient is as small as the error of both


def test_query_key_and_value_have_one_norm_in_every_library(make_encoder: Callable[..., Any]) -> None:
    labels, logits = torch.tensor([0, 1]), torch.zeros(2, 3)
    sums = []
    for family in ("clip", "open-clip"):
        method = ramt(make_encoder(family), l2=1.0)
        sums.append(float(method.task_loss(logits, labels).value) - float(F.cross_entropy(logits, labels)))
    d, layers, patches = 24, 3, 24 * 3 * 4 * 4
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)
    assert sums[0] == pytest.approx(0.01 * (layers * ((3 * d * d) ** 0.5 + d) + patches**0.5), rel=1e-5)


def test_class_names_are_read_in_lower_case(make_encoder: Callable[..., Any]) -> None:
    names = ("CAT", "Red_Dog", "house")
    found = RAMT(make_encoder(), RAMTConfig(class_names=names)).text_features()
    assert torch.equal(found, ZeroShot(make_encoder(), ZeroShotConfig(class_names=NAMES)).text_features())
    assert not torch.equal(found, ZeroShot(make_encoder(), ZeroShotConfig(class_names=names)).text_features())


@pytest.mark.parametrize("fixed", [True, False])
def test_in_bf16_teacher_and_student_agree_at_the_start(fixed: bool, make_encoder: Callable[..., Any]) -> None:
    method, rows = ramt(make_encoder()), images()
    rows.collate = Stacked(fixed)
    gaps, passes = [], []
    agreement, encode = method.agreement, method.encode_text

    def spy(logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        gaps.append(float((logits - method.backbone.similarity(teacher, method.text_features())).abs().max()))
        return agreement(logits, teacher)

    def count() -> torch.Tensor:
        passes.append(1)
        return encode()

    method.agreement, method.encode_text = spy, count  # type: ignore[method-assign]
    method.fit(rows, None, run(precision="bf16", max_steps=3))
    assert len(gaps) == 3 and gaps[0] == 0.0
    assert len(passes) == 1  # text is read once for the run


def test_micro_batches_are_refused(make_encoder: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="takes a batch as a whole"):
        ramt(make_encoder()).fit(images(), None, run(batch_size=6, micro_batch_size=2))


def test_bits_survive_packing_at_any_size() -> None:
    for size in (1, 7, 8, 9, 30):
        bits = (torch.rand(size, generator=torch.Generator().manual_seed(size)) > 0.5).float()
        packed = pack(bits)
        assert packed.dtype == torch.uint8 and len(packed) == (size + 7) // 8
        assert torch.equal(unpack(packed, bits.shape).float(), bits)


@pytest.mark.parametrize("masked", ["attention", "all"])
@pytest.mark.parametrize("family", ["clip", "open-clip"])
def test_an_artifact_is_one_bit_a_weight_and_folds_into_the_tower(
    family: str, masked: str, make_encoder: Callable[..., Any], tmp_path: Path
) -> None:
    method = ramt(make_encoder(family), masked=masked, lr=2e-3)
    method.fit(images(), None, run(max_steps=8))
    assert 0 < method.sparsity() < 1
    path = method.save_pretrained(tmp_path / "mask")
    loaded = RAMT.from_pretrained(path, make_encoder(family))
    size = (path / "prompt.safetensors").stat().st_size
    assert size < method.count() / 8 + 4096
    batch = images().batch(range(4))
    assert torch.equal(loaded(batch).logits, method(batch).logits)
    assert loaded.sparsity() == method.sparsity()
    folded = loaded.folded()
    with torch.no_grad():  # where gradients are wanted, torch's attention has another kernel
        assert torch.equal(folded.image(batch["pixels"]), method.encode_image(batch["pixels"]))


def test_the_tower_stays_as_it_was_and_gets_no_gradient(make_encoder: Callable[..., Any]) -> None:
    encoder = make_encoder()
    before = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    ramt(encoder, lr=2e-3).fit(images(), None, run())
    for name, parameter in encoder.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None, name


@pytest.mark.parametrize("threshold", [-0.005, 1.0])
def test_a_threshold_that_does_not_tell_bits_apart_is_refused(threshold: float) -> None:
    with pytest.raises(ValidationError, match="threshold"):
        RAMTConfig(class_names=NAMES, threshold=threshold)


def test_a_packed_mask_of_another_tower_is_refused(make_encoder: Callable[..., Any]) -> None:
    kept = ramt(make_encoder(), masked="all").kept_state()
    with pytest.raises(InputError, match="masks are of another image tower"):
        ramt(make_encoder()).load_kept_state(kept)
