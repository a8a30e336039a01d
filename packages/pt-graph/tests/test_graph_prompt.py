"""GraphPrompt: the cosine loss with numbers, prototypes that follow w, two prototypes for each binary task."""

from __future__ import annotations

from collections.abc import Callable
from math import exp, log
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pt_core import InputError
from pt_core.method import Method
from pt_core.plan import FitConfig
from pt_graph import ChemGNN, GraphPrompt, GraphPromptConfig

RUN = FitConfig(epochs=4, batch_size=4, device="cpu", progress=False)


def method(backbone: Any, task: str = "multiclass", **settings: Any) -> GraphPrompt:
    return GraphPrompt(backbone, GraphPromptConfig(num_outputs=2, task=task, **settings))


def test_on_the_chem_gin_300_values_are_trained_and_there_is_no_head() -> None:
    made = method(ChemGNN())
    assert made.count() == 300
    assert made.head is None


def test_the_loss_of_a_graph_on_its_own_of_two_orthogonal_prototypes_is_4_54e_5(make_backbone: Any) -> None:
    made = method(make_backbone(), temperature=0.1)
    nn.init.ones_(made.weight)
    made.centres.copy_(torch.eye(2, 8)[None])
    loss = made.loss({"features": torch.eye(2, 8)[:1], "labels": torch.tensor([0])}).value
    assert loss.item() == pytest.approx(4.53989e-5, rel=2e-3)  # float32 of a difference near 1
    double = made.double().loss({"features": torch.eye(2, 8)[:1].double(), "labels": torch.tensor([0])}).value
    assert double.item() == pytest.approx(-log(exp(10) / (exp(10) + 1)), rel=1e-9)


def test_with_weights_of_one_the_read_out_is_the_sum_of_the_frozen_model(make_backbone: Any, make_split: Any) -> None:
    backbone, batch = make_backbone("chem"), make_split([5, 3], molecule=True).batch([0, 1])
    made = method(backbone)
    nn.init.ones_(made.weight)
    h = backbone(batch["graphs"])
    torch.testing.assert_close(made(batch).features, torch.stack([h[:5].sum(0), h[5:].sum(0)]))


def test_prototypes_are_class_means_of_the_prompted_training_graphs(make_backbone: Any, make_split: Any) -> None:
    made, rows = method(make_backbone()), make_split([5, 3, 6, 4, 7, 2])
    made.fit(rows, None, RUN)
    batch = rows.batch(range(6))
    out = made(batch)
    prototypes = torch.stack([out.features[batch["labels"] == c].mean(0) for c in (0, 1)])
    cosines = F.cosine_similarity(out.features[:, None], prototypes[None], dim=-1)
    torch.testing.assert_close(out.logits, cosines / 0.1, rtol=1e-4, atol=1e-5)


def test_a_binary_task_compares_a_positive_and_a_negative_prototype(make_backbone: Any, make_split: Any) -> None:
    made, rows = method(make_backbone("chem"), "multilabel"), make_split([5, 3, 6, 4, 7, 2], 3, True, "multilabel")
    batch = rows.batch(range(6))
    batch["labels"][2, 1] = rows.rows[2][1][1] = -1
    made.fit(rows, None, RUN)
    out, labels = made(batch), batch["labels"]
    for task in (0, 1):
        sides = [out.features[labels[:, task] == side].mean(0) for side in (1, 0)]  # those of -1 are in neither
        plus, minus = (F.cosine_similarity(out.features, side[None]) / 0.1 for side in sides)
        torch.testing.assert_close(out.logits[:, task], plus - minus, rtol=1e-4, atol=1e-4)
        softmax = plus.exp() / (plus.exp() + minus.exp())
        torch.testing.assert_close(out.logits[:, task].sigmoid(), softmax, rtol=1e-4, atol=1e-5)


def test_a_side_without_training_graphs_counts_as_cosine_zero(make_backbone: Any, make_split: Any) -> None:
    made, rows = method(make_backbone("chem"), "multilabel"), make_split([5, 3, 6], 0, True, "multilabel")
    for _, labels in rows.rows:
        labels[0] = 0
    made.fit(rows, None, RUN)
    out = made(rows.batch(range(3)))
    minus = F.cosine_similarity(out.features, out.features.mean(0)[None])
    torch.testing.assert_close(out.logits[:, 0], -minus / 0.1, rtol=1e-4, atol=1e-4)


def test_keeping_sums_gives_what_embedding_in_every_step_gives(make_backbone: Any, make_split: Any) -> None:
    rows = make_split([5, 3, 6, 4, 7, 2])
    fast, plain = method(make_backbone()), method(make_backbone())
    fast.fit(rows, None, RUN)
    plain.start(plain.read(rows, RUN))
    Method.fit(plain, rows, None, RUN)
    torch.testing.assert_close(fast.weight, plain.weight, rtol=1e-4, atol=1e-6)
    assert torch.equal(fast.centres, plain.centres)


def test_the_scale_of_the_weights_does_not_matter(make_backbone: Callable[..., Any], make_split: Any) -> None:
    made, rows = method(make_backbone()), make_split([5, 3, 6, 4])
    made.fit(rows, None, RUN)
    before = made(rows.batch([0, 1])).logits
    made.weight.data *= 3
    torch.testing.assert_close(made(rows.batch([0, 1])).logits, before)


def test_a_class_without_training_graphs_is_refused(make_backbone: Callable[..., Any], make_split: Any) -> None:
    rows = make_split([5, 3, 6, 4])
    for _, label in rows.rows:
        label.fill_(0)
    with pytest.raises(InputError, match="no training graph is of class 1"):
        method(make_backbone()).fit(rows, None, RUN)


def test_without_a_fit_there_are_no_prototypes_and_all_logits_are_zero(make_backbone: Any, make_split: Any) -> None:
    assert bool((method(make_backbone())(make_split([5, 3]).batch([0, 1])).logits == 0).all())
