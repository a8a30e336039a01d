"""Tip-Adapter: the hand example, its limits, the cache, the search on validation rows, and Tip-Adapter-F."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from pt_core import FitConfig, InputError
from pt_core.data import Split
from pt_vl.method import Stacked
from pt_vl.methods.tip_adapter import TipAdapter, TipAdapterConfig, TipAdapterF, TipAdapterFConfig
from pt_vl.methods.zero_shot import ZeroShot, ZeroShotConfig

NAMES = ("cat", "dog")
RUN = FitConfig(epochs=3, batch_size=4, device="cpu", progress=False, schedule="cosine", eval_batch_size=3)


def tip(encoder: Any, cls: Any = TipAdapter, **settings: Any) -> Any:
    config = TipAdapterFConfig if cls is TipAdapterF else TipAdapterConfig
    return cls(encoder, config(class_names=NAMES, **({"cache_size": 4} | settings)))


def images(rows: int = 4, seed: int = 0, fixed: bool = True) -> Split:
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randn(rows, 3, 12, 12, generator=draw)
    listed = [{"pixels": p, "label": i % 2} for i, p in enumerate(pixels)]
    return Split(listed, Stacked(fixed), metrics=("accuracy",), num_classes=2)


def test_the_hand_example(make_encoder: Callable[..., Any]) -> None:
    method = tip(make_encoder(), cache_size=2)
    method.keys.data[:, :2] = torch.eye(2)
    method.labels.copy_(torch.tensor([0, 1]))
    feature = torch.zeros(1, 8)
    feature[0, 0] = 3.0
    term = 2 * method.recall(method.affinity(feature), 1.0)
    torch.testing.assert_close(term, torch.tensor([[2.0, 0.7358]]), rtol=0, atol=1e-4)
    torch.testing.assert_close(2 * method.recall(method.affinity(feature), 1e4), torch.tensor([[2.0, 0.0]]))


def test_alpha_zero_is_zero_shot(make_encoder: Callable[..., Any]) -> None:
    method, rows = tip(make_encoder(), alpha=0.0), images()
    method.fit(rows, None, RUN)
    plain = ZeroShot(make_encoder(), ZeroShotConfig(class_names=NAMES))
    batch = rows.batch(range(4))
    torch.testing.assert_close(method(batch).logits, plain(batch).logits)


def test_keys_are_the_normalised_mean_of_the_features_of_all_views(make_encoder: Callable[..., Any]) -> None:
    method, rows = tip(make_encoder(), views=3), images(fixed=False)
    shifts = iter([0.0, 1.0, 2.0])
    plain = rows.collate

    class Views(Stacked):
        def __call__(self, chosen: list[Any]) -> dict[str, Any]:
            batch = plain(chosen)
            return batch | {"pixels": batch["pixels"] + next(shifts)}

    rows.collate = Views(fixed=False)
    method.fit(rows, None, RUN.model_copy(update={"eval_batch_size": 4}))
    pixels = images().batch(range(4))["pixels"]
    mean = torch.stack([method.backbone.image(pixels + shift) for shift in (0.0, 1.0, 2.0)]).mean(0)
    torch.testing.assert_close(method.keys, F.normalize(mean, dim=-1), rtol=1e-5, atol=1e-6)
    assert method.labels.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("fixed", [True, False])
def test_pixels_of_one_batch_are_held_at_a_time(make_encoder: Callable[..., Any], fixed: bool) -> None:
    rows, held, most = images(12, fixed=fixed), [0], [0]

    class Watched(Stacked):
        def __call__(self, chosen: list[Any]) -> dict[str, Any]:
            batch = super().__call__(chosen)
            held[0] += 1
            most[0] = max(most[0], held[0])
            weakref.finalize(batch["pixels"], lambda: held.__setitem__(0, held[0] - 1))
            return batch

    rows.collate = Watched(fixed)
    tip(make_encoder(), cache_size=12, views=2).fit(rows, None, RUN)
    assert most[0] <= 2, "the last one is let go when the next one is there"


@pytest.mark.parametrize("steps", [(0, 20), (200, -1)])
def test_a_search_without_steps_is_refused(steps: tuple[int, int]) -> None:
    with pytest.raises(ValidationError, match="greater than 0"):
        TipAdapterConfig(class_names=NAMES, cache_size=4, search_steps=steps)


def test_alpha_and_beta_are_the_best_of_the_grid_on_validation_rows(make_encoder: Callable[..., Any]) -> None:
    method, held = tip(make_encoder(), search_steps=(7, 5)), images(12, seed=5)
    result = method.fit(images(), held, RUN)
    alpha, beta = (float(x) for x in method.strength)
    assert {round((b - 0.1) / (2.9 / 5), 4) for b in [alpha]} <= {0.0, 1.0, 2.0, 3.0, 4.0}
    batch = held.batch(range(12))
    features = method.image_features(batch)
    known = method.backbone.similarity(features, method.text_features())

    def accuracy(alpha: float, beta: float) -> float:
        scores = known + alpha * method.recall(method.affinity(features), beta)
        return float((scores.argmax(1) == batch["labels"]).float().mean())

    grid = [(j * 2.9 / 5 + 0.1, i * 6.9 / 7 + 0.1) for i in range(7) for j in range(5)]
    assert accuracy(alpha, beta) == max(accuracy(*point) for point in grid) == pytest.approx(result.metrics["accuracy"])


def test_the_trained_form_starts_where_the_other_is_and_trains_its_keys_only(make_encoder: Callable[..., Any]) -> None:
    fixed, trained = tip(make_encoder()), tip(make_encoder(), TipAdapterF, lr=0.05)
    fixed.fit(images(), None, RUN)
    trained.build_cache(images(), RUN)
    batch = images(6, seed=9).batch(range(6))
    assert torch.equal(trained(batch).logits, fixed(batch).logits)
    assert trained.count() == 4 * 8
    trained.fit(images(), None, RUN)
    assert float((trained.keys - fixed.keys).abs().max()) > 1e-3
    assert trained.labels.tolist() == fixed.labels.tolist()


def test_every_run_starts_with_the_alpha_and_beta_of_the_configuration(make_encoder: Callable[..., Any]) -> None:
    method = tip(make_encoder())
    method.fit(images(), images(12, seed=5), RUN)
    start = torch.tensor([1.17, 1.0])
    assert not torch.equal(method.strength, start), "searched"
    method.fit(images(), None, RUN)
    assert torch.equal(method.strength, start)
    trained = tip(make_encoder(), TipAdapterF, lr=0.05)
    keys = []
    for _ in range(2):
        trained.fit(images(), images(12, seed=5), RUN)
        keys.append(trained.keys.detach().clone())
    assert torch.equal(*keys), "the second run is the first one again"


def test_the_trained_form_takes_the_optimiser_of_its_run(make_encoder: Callable[..., Any]) -> None:
    method = tip(make_encoder(), TipAdapterF)
    published = method.published(images())
    assert (published.epochs, published.batch_size, published.schedule, published.max_grad_norm) == (
        20,
        256,
        "cosine",
        None,
    )
    adamw = method.optimisers(published)["main"]
    assert isinstance(adamw, torch.optim.AdamW)
    assert [(g["lr"], g["eps"], g["weight_decay"]) for g in adamw.param_groups] == [(1e-3, 1e-4, 0.01)]
    sgd = method.optimisers(FitConfig(epochs=1, optimiser="sgd", momentum=0.9))["main"]
    assert isinstance(sgd, torch.optim.SGD) and sgd.param_groups[0]["momentum"] == 0.9


def test_another_number_of_rows_is_refused(make_encoder: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="the cache has room for 4 rows, there are 6.*Set it to 6"):
        tip(make_encoder()).fit(images(6), None, RUN)
