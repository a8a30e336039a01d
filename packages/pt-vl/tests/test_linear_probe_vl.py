"""Linear probe: it is scikit-learn's regression on the tower's features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from pt_core.data import Split
from pt_core.errors import InputError
from pt_core.plan import FitConfig
from pt_vl.data import ImageTask
from pt_vl.methods.linear_probe import LinearProbe, LinearProbeConfig

Make = Callable[..., Any]
RUN = FitConfig(epochs=1, device="cpu", progress=False, eval_batch_size=4)


@pytest.mark.parametrize("classes", [("cat", "dog"), ("cat", "dog", "bird")])
def test_it_is_logistic_regression_on_the_towers_features(
    classes: tuple[str, ...], make_encoder: Make, make_images: Make
) -> None:
    backbone, train, test = make_encoder(), make_images(18, classes=len(classes)), make_images(9, 1, len(classes))
    method = LinearProbe(backbone, LinearProbeConfig(class_names=classes))
    method.fit(train, None, RUN)
    rows, held = train.batch(range(18)), test.batch(range(9))
    fitted = LogisticRegression(max_iter=1000).fit(
        backbone.image(rows["pixels"]).double().numpy(), rows["labels"].numpy()
    )
    expected = fitted.predict_proba(backbone.image(held["pixels"]).double().numpy())
    np.testing.assert_allclose(method(held).logits.softmax(-1).numpy(), expected, atol=2e-3)
    assert method.count() == len(classes) * 9


def test_validation_rows_choose_the_penalty(make_encoder: Make, make_images: Make) -> None:
    backbone, train, validation = make_encoder(), make_images(12), make_images(30, 1)
    best = 0.0
    for strength in (1e-4, 1e-2, 1.0, 1e2, 1e4):
        alone = LinearProbe(backbone, LinearProbeConfig(class_names=("cat", "dog", "bird"), C=(strength,)))
        best = max(best, alone.fit(train, validation, RUN).metrics["accuracy"])
    method = LinearProbe(backbone, LinearProbeConfig(class_names=("cat", "dog", "bird")))
    assert method.fit(train, validation, RUN).metrics["accuracy"] == best
    hit = (method(validation.batch(range(30))).logits.argmax(1) == validation.batch(range(30))["labels"]).float().mean()
    assert float(hit) == pytest.approx(best)


def test_a_class_without_training_rows_is_refused_by_name(make_encoder: Make, make_images: Make) -> None:
    method = LinearProbe(make_encoder(), LinearProbeConfig(class_names=("cat", "dog", "bird", "tree")))
    with pytest.raises(InputError, match="no training row is of class tree"):
        method.fit(replace(make_images(9), num_classes=4), None, RUN)
    assert torch.equal(method.head.weight, torch.zeros(4, 8))


def test_a_run_with_augmentation_fits_the_fixed_views(make_encoder: Make) -> None:
    backbone, labels = make_encoder(), [0, 1, 2] * 4
    values = np.random.default_rng(0).integers(0, 256, (12, 20, 16, 3), dtype=np.uint8)
    names = ("cat", "dog", "bird")

    def fitted(split: Split) -> torch.Tensor:
        method = LinearProbe(backbone, LinearProbeConfig(class_names=names))
        method.fit(split, None, RUN)
        return method.head.weight

    def train(augment: bool) -> Split:
        task = ImageTask.from_arrays({"train": (values, labels)}, backbone, class_names=names, augment=augment)
        assert task.train is not None
        return task.train

    assert torch.equal(fitted(train(True)), fitted(train(False)))
    assert torch.equal(fitted(train(True).subset(range(9))), fitted(train(False).subset(range(9))))


def test_augmented_rows_without_fixed_views_are_refused(make_encoder: Make, make_images: Make) -> None:
    method = LinearProbe(make_encoder(), LinearProbeConfig(class_names=("cat", "dog", "bird")))
    with pytest.raises(InputError, match="field 'rows': the rows are augmented, their fixed views are not known"):
        method.fit(make_images(9, fixed=False), None, RUN)
