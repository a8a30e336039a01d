"""Logistic regression on features."""

import numpy as np
import pytest

from pt_core.probe import agreement, fit_probe, regression

pytest.importorskip("sklearn")


def rows(n: int = 60, seed: int = 0):
    draw = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    return draw.normal(size=(n, 5)) + 2 * np.eye(5)[labels], labels


def test_two_classes_have_a_row_of_zeros_and_the_log_odds_of_the_second():
    features, labels = rows()
    weight, bias = regression(features[labels < 2], labels[labels < 2], 1.0, 1000)
    assert weight.shape == (2, 5) and not weight[0].any() and bias[0] == 0
    logits = features[labels < 2] @ weight.T + bias
    gradient = ((1 / (1 + np.exp(-logits[:, 1])) - labels[labels < 2]) @ features[labels < 2]) + weight[1]
    assert np.abs(gradient).max() < 1e-2  # where the penalised likelihood is flat


def test_validation_rows_choose_the_strength():
    features, labels = rows()
    held = rows(30, seed=1)
    fits = {c: regression(features, labels, c, 1000) for c in (1e-6, 1.0)}
    scores = {c: agreement(held[0] @ w.T + b, held[1]) for c, (w, b) in fits.items()}
    best = max(scores, key=scores.__getitem__)
    chosen = fit_probe(features, labels, (1.0, 1e-6), 1000, held)
    assert np.array_equal(chosen[0], fits[best][0])
    assert np.array_equal(fit_probe(features, labels, (1e-6,), 1000)[0], fits[1.0][0]), "without validation it is 1"


def test_each_label_of_several_has_its_own_regression():
    features, labels = rows()
    several = np.stack([labels == 0, labels > 0], axis=1).astype(int)
    weight, bias = regression(features, several, 1.0, 1000)
    assert np.allclose(weight[0], -weight[1], atol=1e-3) and agreement(features @ weight.T + bias, several) > 0.9
