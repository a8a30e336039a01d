"""RESTORE: MaPLe with equal feature shift and surgery."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pt_core import FitConfig, InputError
from pt_core.data import Split
from pt_core.evaluation import evaluate
from pt_core.tokens import Tokens
from pt_vl.method import Stacked
from pt_vl.methods.maple import MaPLe, MaPLeConfig
from pt_vl.methods.restore import RESTORE, RESTOREConfig, Surgery, gram_norm

NAMES = ("cat", "red dog", "house")


def restore(encoder: Any, **settings: Any) -> RESTORE:
    return RESTORE(encoder, RESTOREConfig(class_names=NAMES, **({"depth": 3} | settings)))


def images(rows: int = 6) -> Split:
    pixels = torch.randn(rows, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    listed = [{"pixels": p, "label": i % 3} for i, p in enumerate(pixels)]
    return Split(listed, Stacked(), metrics=("accuracy",), num_classes=3)


def run(**changes: Any) -> FitConfig:
    return FitConfig(**({"epochs": 3, "batch_size": 2, "device": "cpu", "progress": False, "log_every": 1} | changes))


def test_parameter_counts(make_encoder: Callable[..., Any]) -> None:
    surgery = lambda d: sum(p.numel() for p in Surgery(d).parameters())  # noqa: E731
    assert surgery(8) == 8 * 8**2 + 7 * 8
    assert surgery(512) == 2_100_736
    assert 3_555_072 + 2 * 2_100_736 == 7_756_544
    maple = MaPLe(make_encoder(), MaPLeConfig(class_names=NAMES, depth=3))
    assert restore(make_encoder()).count() == maple.count() + 2 * surgery(8)


def test_without_blend_and_penalty_it_is_maple(make_encoder: Callable[..., Any]) -> None:
    maple = MaPLe(make_encoder(), MaPLeConfig(class_names=NAMES, depth=3))
    method = restore(make_encoder(), alpha_text=0.0, alpha_image=0.0, gamma=0.0)
    batch = images().batch(range(4))
    assert torch.equal(method(batch).logits, maple(batch).logits)
    gradients = []
    for each in (method, maple):
        each.loss(batch).total.backward()
        gradients.append(
            {name: p.grad for name, p in each.named_parameters() if not name.startswith(("text_", "image_"))}
        )
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


def test_the_penalty_and_its_gradient_are_zero_at_the_start(make_encoder: Callable[..., Any]) -> None:
    method = restore(make_encoder())
    text, image = method.shifts({})
    torch.testing.assert_close(torch.cat([text, image]), torch.ones(4))
    (text - image).square().sum().backward()
    assert method.deep.grad is not None and float(method.deep.grad.abs().max()) < 1e-6


def test_a_zero_last_layer_makes_surgery_the_identity_for_any_blend() -> None:
    block, x = Surgery(8), torch.randn(3, 8)
    mixed = 0.3 * (x + block(x, torch.tensor(1.0)) - x) + 0.7 * x
    torch.testing.assert_close(block(x, torch.tensor(0.3)), mixed)
    nn.init.zeros_(block.down.weight)
    nn.init.zeros_(block.down.bias)
    assert torch.equal(block(x, torch.tensor(0.7)), x)


def test_gram_norms_by_hand() -> None:
    assert float(gram_norm(torch.tensor([[1.0, 0], [0, 2]]))) == pytest.approx(4.1231, abs=1e-4)
    assert float(gram_norm(torch.tensor([[1.0, 1], [0, 0]]))) == pytest.approx(2.0)
    rows = torch.randn(3, 7)
    torch.testing.assert_close(gram_norm(3 * rows), 9 * gram_norm(rows))
    torch.testing.assert_close(gram_norm(rows), torch.linalg.matrix_norm(rows.T @ rows))
    turn = torch.linalg.qr(torch.randn(7, 7)).Q
    torch.testing.assert_close(gram_norm(rows[[2, 0, 1]] @ turn), gram_norm(rows), rtol=1e-5, atol=1e-5)


def test_the_penalty_sees_a_difference_and_not_a_common_factor(make_encoder: Callable[..., Any]) -> None:
    method = restore(make_encoder(), depth=2)
    projection = method.deep_projections[0]
    nn.init.zeros_(projection.bias)
    method.anchors.copy_(method.norms().detach())
    with torch.no_grad():
        method.deep.mul_(2**0.5)
        projection.weight.mul_(2**-0.5)
    text, image = method.shifts({})
    assert float((text - image).square().sum()) == pytest.approx(1.0, abs=1e-4)
    with torch.no_grad():
        projection.weight.mul_(2**0.5)
    text, image = method.shifts({})
    assert float((text - image).square().sum()) == pytest.approx(0.0, abs=1e-8)


def test_the_loss_is_by_hand_cross_entropy_and_gamma_times_the_sum_over_blocks(
    make_encoder: Callable[..., Any],
) -> None:
    method, batch = restore(make_encoder(), gamma=0.5), images().batch(range(4))

    def norms() -> torch.Tensor:
        """||P^T P||_F over the d x d matrix, of text and image, a row for each block with deep prompts."""
        pairs = [(t, t @ p.weight.T + p.bias) for t, p in zip(method.deep, method.deep_projections, strict=True)]
        return torch.stack([torch.stack([(rows.T @ rows).square().sum().sqrt() for rows in pair]) for pair in pairs])

    starts = norms().detach()
    with torch.no_grad():  # other factors in the two blocks, so that their sum is neither's share nor their mean
        method.deep.mul_(torch.tensor([1.3, 1.6])[:, None, None])
    shifts = norms() / starts
    terms = (shifts[:, 0] - shifts[:, 1]).square()
    assert terms.shape == (2,) and 0.1 < float(terms[0]) < float(terms[1]) / 2
    entropy = F.cross_entropy(method(batch).logits, batch["labels"], reduction="sum")
    expected, loss = entropy + 0.5 * 4 * terms.sum(), method.loss(batch)
    torch.testing.assert_close(loss.total, expected)
    torch.testing.assert_close(loss.parts["feature_shift"], 4 * terms.sum())
    torch.testing.assert_close(loss.parts["cross_entropy"], entropy)
    prompts = {n: p for n, p in method.named_parameters() if n == "context" or n.startswith("deep")}
    found, by_hand = (torch.autograd.grad(total, list(prompts.values())) for total in (loss.total, expected))
    for name, gradient, other in zip(prompts, found, by_hand, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("shift", ["gram", "feature"])
def test_evaluation_has_the_cross_entropy_alone(shift: str, make_encoder: Callable[..., Any]) -> None:
    method, batch = restore(make_encoder(), shift=shift, gamma=50.0), images().batch(range(4))
    with torch.no_grad():
        method.deep.mul_(torch.tensor([1.3, 1.6])[:, None, None])
        entropy = float(F.cross_entropy(method(batch).logits, batch["labels"]))
        assert float(method.loss(batch).value) > entropy + 0.01  # in training
    assert evaluate(method, images().subset(range(4)))["loss"] == pytest.approx(entropy, rel=1e-4)


def test_the_defaults_are_the_released_ones() -> None:
    config = RESTOREConfig(class_names=NAMES)
    assert (config.prompt_length, config.depth, config.init, config.lr) == (2, 9, "a photo of a", 0.0035)
    assert (config.alpha_text, config.alpha_image, config.gamma, config.shift) == (0.1, 0.1, 1.0, "gram")
    assert (config.growth_text, config.growth_image) == (0.02, 0.005)


def test_the_penalty_reaches_deep_prompts_and_projections_only(make_encoder: Callable[..., Any]) -> None:
    method = restore(make_encoder())
    with torch.no_grad():
        method.deep.add_(1.0)
    text, image = method.shifts({})
    (text - image).square().sum().backward()
    reached = {name for name, p in method.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert reached == {"deep", *(f"deep_projections.{i}.{part}" for i in range(2) for part in ("weight", "bias"))}


@pytest.mark.parametrize(("epochs", "before"), [(10, 4), (2, 1)])
def test_alpha_grows_once_at_the_end_of_a_third_of_the_epochs(
    epochs: int, before: int, make_encoder: Callable[..., Any]
) -> None:
    method = restore(make_encoder(), growth_text=0.5, growth_image=0.25)
    norms: list[torch.Tensor] = []
    grow = method.grow_alphas

    def spy() -> None:
        norms.append(method.norms().detach().mean(1))
        before = method.alphas.clone()
        grow()
        torch.testing.assert_close(method.alphas - before, torch.tensor([0.5, 0.25]) * norms[-1])

    method.grow_alphas = spy  # type: ignore[method-assign]
    steps: list[int] = []
    original = method.loss
    method.loss = lambda batch: (steps.append(len(norms)), original(batch))[1]  # type: ignore[method-assign,func-returns-value]
    method.fit(images(), None, run(epochs=epochs))
    assert len(norms) == 1
    assert (len(steps), steps.count(0)) == (epochs * 3, before * 3)  # epochs of three steps
    assert not any(name == "alphas" for name, _ in method.trainable())


def test_every_run_starts_with_the_alphas_of_the_configuration(make_encoder: Callable[..., Any]) -> None:
    once, twice = restore(make_encoder(), growth_text=0.5), restore(make_encoder(), growth_text=0.5)
    once.fit(images(), None, run())
    twice.load_trained_state(once.trained_state())  # as a start for another task
    assert float(twice.alphas[0]) == float(once.alphas[0]) > 0.1
    seen: list[torch.Tensor] = []
    original = twice.loss
    twice.loss = lambda batch: (seen.append(twice.alphas.clone()), original(batch))[1]  # type: ignore[method-assign,func-returns-value]
    twice.fit(images(), None, run())
    torch.testing.assert_close(seen[0], torch.tensor([twice.config.alpha_text, twice.config.alpha_image]))
    assert float(twice.alphas[0]) > 0.1


def test_the_first_step_of_every_run_has_no_shift(make_encoder: Callable[..., Any], tmp_path: Path) -> None:
    method, config = restore(make_encoder(), lr=0.5), run(schedule="constant", optimiser="sgd", checkpoint_every=2)
    method.fit(images(), None, config)
    assert float((method.norms() / method.anchors - 1).abs().max()) > 0.01
    start = {name: tensor.clone() for name, tensor in method.trained_state().items()}
    history = method.fit(images(), None, config, tmp_path / "run").history
    assert history[0]["feature_shift"] < 1e-9 < history[-1]["feature_shift"]
    # a run that is resumed keeps the norms that it started with
    stopped, whole = restore(make_encoder(), lr=0.5), restore(make_encoder(), lr=0.5)
    for each in (stopped, whole):
        each.load_trained_state(start)
    whole.fit(images(), None, config)
    folder = tmp_path / "stopped"
    original = stopped.loss
    calls: list[int] = []

    def loss(batch: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return original(batch)

    stopped.loss = loss  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        stopped.fit(images(), None, config, folder)
    resumed = restore(make_encoder(), lr=0.5)
    resumed.load_trained_state(start)
    resumed.fit(images(), None, config, folder)
    for name, tensor in whole.trained_state().items():
        torch.testing.assert_close(resumed.trained_state()[name], tensor, msg=name)


def test_the_shift_of_features_is_one_of_the_whole_batch(make_encoder: Callable[..., Any]) -> None:
    for shift, depth in (("feature", 3), ("gram", 3), ("feature", 1)):
        method, config = restore(make_encoder(), shift=shift, depth=depth), run(batch_size=6, micro_batch_size=2)
        if (shift, depth) == ("feature", 3):
            with pytest.raises(
                InputError, match="restore couples the rows of a batch: it cannot be accumulated or split"
            ):
                method.fit(images(), None, config)
        else:
            method.fit(images(), None, config)


def test_start_norms_and_alphas_are_saved(make_encoder: Callable[..., Any], tmp_path: Path) -> None:
    method = restore(make_encoder(), growth_text=0.5)
    method.fit(images(), None, run())
    loaded = RESTORE.from_pretrained(method.save_pretrained(tmp_path / "a"), make_encoder())
    assert torch.equal(loaded.anchors, method.anchors) and torch.equal(loaded.alphas, method.alphas)
    assert float(loaded.alphas[0]) > 0.1
    assert not torch.equal(loaded.norms(), loaded.anchors)
    batch = images().batch(range(4))
    assert torch.equal(loaded(batch).logits, method.eval()(batch).logits)
    # text features are computed once for the values at hand, surgery included
    torch.testing.assert_close(loaded.text_features(), loaded.encode_text())


def test_the_shift_of_features_is_that_of_the_blocks_outputs(make_encoder: Callable[..., Any]) -> None:
    method = restore(make_encoder(), shift="feature")
    pixels = images().batch(range(3))["pixels"]
    _, image = method.shifts({"pixels": pixels})
    rows: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for prompted, found in rows.items():

        def keep(index: int, tokens: Tokens, found: list[torch.Tensor] = found) -> Tokens:
            found.append(tokens.hidden[:, :10])  # CLS and nine patches; prompts stand behind them
            return tokens

        method.backbone.image(pixels, dict(enumerate(method.visual_prompts())) if prompted else None, after=keep)
    for block in (1, 2):
        moved = (rows[True][block] - rows[False][block]).square().mean() / rows[False][block].square().mean()
        torch.testing.assert_close(image[block - 1], moved)


def test_the_shift_of_text_features_is_that_of_the_words_behind_the_blocks(make_encoder: Callable[..., Any]) -> None:
    method = restore(make_encoder(), shift="feature")
    with torch.no_grad():
        method.context.add_(0.5)  # trained: it is measured against the words that it started from
    text, _ = method.shifts(images().batch(range(3)))
    assert len(set(method.sentences.eot.tolist())) > 1, "names must differ in length for this to mean anything"
    rows: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for prompted, found in rows.items():

        def keep(index: int, tokens: Tokens, found: list[torch.Tensor] = found) -> Tokens:
            # All but the two prompts behind [SOS], and what fills a sentence up behind its end.
            ends = method.sentences.eot.tolist()
            found.append(torch.cat([tokens.hidden[c, [0, *range(3, end + 1)]] for c, end in enumerate(ends)]))
            return tokens

        deep = dict(enumerate(method.deep, start=1)) if prompted else None
        method.sentences(method.context if prompted else method.context - 0.5, deep, share=False, after=keep)
    for block in (1, 2):
        moved = (rows[True][block] - rows[False][block]).square().mean() / rows[False][block].square().mean()
        torch.testing.assert_close(text[block - 1], moved, rtol=1e-4, atol=1e-6)


def test_one_block_of_prompts_has_no_shift(make_encoder: Callable[..., Any]) -> None:
    shallow = restore(make_encoder(), shift="feature", depth=1)
    assert float(shallow.loss(images().batch(range(3))).parts["feature_shift"]) == 0.0
