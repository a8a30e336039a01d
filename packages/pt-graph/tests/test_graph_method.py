"""What all graph methods share: heads, losses with missing labels, embeddings that are kept, ROC-AUC."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch.nn import functional as F

from pt_core import InputError, registry
from pt_core.metrics import evaluate_logits
from pt_core.plan import FitConfig
from pt_graph import GPF, GPFConfig
from pt_graph.method import Head, label_loss


@pytest.mark.parametrize(("layers", "count"), [(1, 3_612), (2, 93_912), (3, 184_212)])
def test_a_head_of_l_layers_has_the_stated_count(layers: int, count: int) -> None:
    head = Head(300, 12, layers, 0)
    assert sum(p.numel() for p in head.parameters()) == count == (layers - 1) * (300**2 + 300) + 300 * 12 + 12


def test_missing_labels_are_no_terms_of_the_loss() -> None:
    logits, labels = torch.randn(3, 2), torch.tensor([[1, -1], [0, 1], [-1, -1]])
    total, count = label_loss(logits, labels, "multilabel")
    assert count.tolist() == [1, 2, 0]
    expected = [
        -F.logsigmoid(logits[0, 0]),
        -F.logsigmoid(-logits[1, 0]) - F.logsigmoid(logits[1, 1]),
        torch.tensor(0.0),
    ]
    torch.testing.assert_close(total, torch.stack(expected))


def test_labels_of_another_task_or_size_are_refused() -> None:
    for labels, task, problem in (
        (torch.zeros(3, 2).long(), "multiclass", "not those of 4 outputs"),
        (torch.zeros(3, 2).long(), "multilabel", "not those of 4 outputs"),
        (torch.tensor([0, 4, 1]), "multiclass", "not classes 0 to 3"),
        (torch.tensor([0, -1, 1]), "multiclass", "not classes 0 to 3"),
    ):
        with pytest.raises(InputError, match=problem):
            label_loss(torch.zeros(3, 4), labels, task)


def test_roc_auc_skips_tasks_without_both_classes_and_missing_labels_and_sees_only_the_order() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(20, 4), torch.randint(0, 2, (20, 4))
    labels[:, 1] = 1  # one class
    labels[3:9, 2] = -1
    labels[:, 3] = -1  # none
    known = labels[:, 2] >= 0
    by_hand = [roc_auc_score(labels[:, 0], logits[:, 0]), roc_auc_score(labels[known, 2], logits[known, 2])]

    def auc(scores: torch.Tensor) -> float:
        return evaluate_logits(("roc-auc",), "multilabel", scores, labels, -1)["roc-auc"]

    assert auc(logits) == pytest.approx(sum(by_hand) / 2)
    assert auc(100 * logits**3 - 7) == auc(logits)
    wild = logits.clone()
    wild[3:9, 2] = 50  # of missing labels
    assert auc(wild) == auc(logits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["chem", "node-gin"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {}) for name in ("gpf", "gpf-plus", "supt-soft", "supt-hard", "linear-probe", "graph-prompt")),
        ("gppt", {"structure_tokens": 2}),
        ("all-in-one", {"answer_epochs": 1, "prompt_epochs": 1}),
        ("fine-tuning", {}),
    ],
)
def test_on_a_backbone_of_any_dtype_a_method_is_trained_in_float32(
    name: str, settings: dict[str, Any], kind: str, dtype: torch.dtype, make_backbone: Any, make_split: Any
) -> None:
    cls = registry.find_method("graph", name)
    backbone, rows = make_backbone(kind).to(dtype), make_split([5, 3, 6, 4, 7, 2], molecule=kind == "chem")
    config = cls.config_class(num_outputs=2, task="multiclass", **settings)
    if (name, dtype) == ("fine-tuning", torch.float16):
        with pytest.raises(InputError, match="the backbone is float16.*Load it in float32"):
            cls(backbone, config)
        return
    made = cls(backbone, config)
    made.fit(rows, None, FitConfig(epochs=2, batch_size=3, device="cpu", progress=False))
    logits = made.eval()(rows.batch([0, 1])).logits
    assert logits.dtype == torch.float32 and bool(logits.isfinite().all())


def test_read_keeps_embeddings_labels_and_ids_of_every_row(make_backbone: Callable[..., Any], make_split: Any) -> None:
    rows = make_split([5, 3, 6, 4], molecule=True, task="multilabel").subset([2, 0, 3])
    made = GPF(make_backbone("chem"), GPFConfig(num_outputs=2))
    seen = made.read(rows, FitConfig(epochs=1, eval_batch_size=2, device="cpu"))
    batch, kept = rows.batch([0, 2]), seen.batch([0, 2])
    assert kept["sample_ids"] == batch["sample_ids"] == [2, 3]
    assert torch.equal(kept["labels"], batch["labels"])
    torch.testing.assert_close(kept["features"], made.embed(batch["graphs"]))
    torch.testing.assert_close(made(kept).logits, made(batch).logits)
    assert made.training
