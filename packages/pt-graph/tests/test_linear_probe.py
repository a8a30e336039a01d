"""The linear probe: every graph is embedded once, and the result is that of embedding it in every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

from pt_core.method import Method
from pt_core.plan import FitConfig
from pt_graph import ChemGNN, LinearProbe, LinearProbeConfig

RUN = FitConfig(epochs=6, batch_size=4, device="cpu", progress=False, eval_batch_size=3, log_every=1)


def method(backbone: Any, task: str = "multilabel", **settings: Any) -> LinearProbe:
    return LinearProbe(backbone, LinearProbeConfig(num_outputs=2, task=task, head_lr=0.05, **settings))


def test_on_the_chem_gin_a_probe_of_12_tasks_has_3612_values() -> None:
    assert LinearProbe(ChemGNN(), LinearProbeConfig(num_outputs=12)).count() == 3_612


@pytest.mark.parametrize("layers", [1, 3])
def test_keeping_embeddings_gives_what_embedding_in_every_step_gives(
    layers: int, make_backbone: Callable[..., Any], make_split: Callable[..., Any]
) -> None:
    train, held = (make_split([5, 3, 6, 4, 7, 2], seed, True, "multilabel") for seed in (0, 1))
    fast, plain = (method(make_backbone("chem"), head_layers=layers) for _ in range(2))
    kept, every = fast.fit(train, held, RUN), Method.fit(plain, train, held, RUN)
    for name, tensor in plain.trained_state().items():
        torch.testing.assert_close(fast.trained_state()[name], tensor, rtol=1e-4, atol=1e-5)
    assert kept.metrics == pytest.approx(every.metrics, rel=1e-4)
    assert [row["step"] for row in kept.history] == [row["step"] for row in every.history]


def test_every_graph_is_embedded_once(make_backbone: Callable[..., Any], make_split: Callable[..., Any]) -> None:
    backbone = make_backbone("chem")
    made, train, held = method(backbone), *(make_split([5, 3, 6, 4], s, True, "multilabel") for s in (0, 1))
    with mock.patch.object(type(backbone), "encode", autospec=True, side_effect=type(backbone).encode) as spy:
        made.fit(train, held, RUN)
    assert sum(call.args[2].num_graphs for call in spy.call_args_list) == 8


def test_with_dropout_embeddings_of_training_rows_are_drawn_anew(make_backbone: Any, make_split: Any) -> None:
    backbone = make_backbone("chem")
    made, train = method(backbone, backbone_dropout=True), make_split([5, 3, 6, 4], molecule=True, task="multilabel")
    with mock.patch.object(type(backbone), "encode", autospec=True, side_effect=type(backbone).encode) as spy:
        made.fit(train, None, RUN)
    assert len(spy.call_args_list) >= RUN.epochs


def test_a_scorer_sees_graphs(make_backbone: Callable[..., Any], make_split: Callable[..., Any]) -> None:
    held = make_split([5, 3], 1, True, "multilabel")
    held.scorer = lambda method, split, batch_size: {"graphs": float(split.batch([0, 1])["graphs"].num_graphs)}
    result = method(make_backbone("chem")).fit(make_split([5, 3, 4], 0, True, "multilabel"), held, RUN)
    assert result.metrics["graphs"] == 2


def test_separable_graphs_are_learned(make_backbone: Callable[..., Any], make_split: Callable[..., Any]) -> None:
    rows = make_split([5, 3, 6, 4, 7, 2])
    graphs = [(g, y) for g, y in rows.rows]
    for graph, label in graphs:
        graph.x = graph.x + 3 * label
    run = RUN.model_copy(update={"epochs": 60})
    made = method(make_backbone(), "multiclass")
    made.fit(rows, None, run)
    batch = rows.batch(range(6))
    assert torch.equal(made(batch).logits.argmax(1), batch["labels"])
