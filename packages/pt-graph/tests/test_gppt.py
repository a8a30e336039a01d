"""GPPT: what z is, one head for each row, the orthogonality penalty, starts from training rows, moving tokens."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.cluster import KMeans
from torch_geometric.data import Batch, Data

from pt_core import InputError
from pt_core.plan import FitConfig
from pt_graph import GPPT, ChemGNN, GPPTConfig
from pt_graph.methods.gppt import cluster

RUN = FitConfig(epochs=2, batch_size=4, device="cpu", progress=False)


def method(backbone: Any, task: str = "multiclass", **settings: Any) -> GPPT:
    return GPPT(backbone, GPPTConfig(num_outputs=2, task=task, **({"structure_tokens": 3} | settings)))


def test_on_the_chem_gin_seven_tokens_and_twelve_tasks_are_54600_values() -> None:
    made = GPPT(ChemGNN(), GPPTConfig(num_outputs=12))
    assert made.count() == 7 * 12 * 600 + 7 * 600 == 54_600
    assert sum(p.numel() for _, p in made.trainable()) == 50_400


def star(centre: int) -> Data:
    """Node 0 with three neighbours, which have no others, and node 4 on its own."""
    edges = torch.tensor([[0, 0, 0, 1, 2, 3], [1, 2, 3, 0, 0, 0]])
    draw = torch.Generator().manual_seed(1)
    return Data(x=torch.randn(5, 6, generator=draw), edge_index=edges, centre_index=torch.tensor([centre]))


def test_z_of_a_centre_is_its_embedding_and_the_mean_of_its_neighbours(make_backbone: Callable[..., Any]) -> None:
    backbone = make_backbone()
    graphs = Batch.from_data_list([star(0), star(2), star(4)])
    h = backbone(Batch.from_data_list([star(0)]))
    rows = [(h[0], h[1:4].mean(0)), (h[2], h[0]), (h[4], torch.zeros(8))]
    torch.testing.assert_close(method(backbone).embed(graphs), torch.stack([torch.cat(row) for row in rows]))


def test_without_a_centre_z_is_the_read_out_of_both_halves(make_backbone: Callable[..., Any]) -> None:
    backbone, data = make_backbone(), star(0)
    del data.centre_index
    h = backbone(Batch.from_data_list([data]))
    near = torch.stack([h[1:4].mean(0), h[0], h[0], h[0], torch.zeros(8)])
    torch.testing.assert_close(
        method(backbone).embed(Batch.from_data_list([data])), torch.cat([h.mean(0), near.mean(0)])[None]
    )


def test_a_row_trains_the_head_of_its_token_alone(make_backbone: Callable[..., Any]) -> None:
    made = method(make_backbone(), orthogonality=0.0)
    z = torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    made.loss({"features": z, "labels": torch.tensor([1])}).total.backward()
    assert made.heads.grad is not None
    trained = made.heads.grad.abs().sum((1, 2)) > 0
    chosen = int((made.structure @ z[0]).argmax())
    assert trained.tolist() == [k == chosen for k in range(3)]


def test_logits_are_those_of_the_chosen_head(make_backbone: Callable[..., Any]) -> None:
    made = method(make_backbone())
    z = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
    chosen = (z @ made.structure.T).argmax(1)
    assert len(set(chosen.tolist())) == 3
    logits = made({"features": z}).logits
    for row in range(9):
        torch.testing.assert_close(logits[row], made.heads[chosen[row]] @ z[row])


def test_the_penalty_is_zero_where_the_rows_of_every_head_are_orthonormal_and_nowhere_else(make_backbone: Any) -> None:
    made = method(make_backbone())
    made.heads.data = torch.linalg.qr(torch.randn(3, 16, 2))[0].mT.contiguous()
    assert made.penalty().item() == pytest.approx(0, abs=1e-6)
    made.heads.data[1, 0] *= 2  # W W^T - I has 3 at one place
    assert made.penalty().item() == pytest.approx(3 / 3)
    made.heads.data[1, 0] = made.heads.data[1, 1]  # all of W W^T is 1
    assert made.penalty().item() == pytest.approx(2**0.5 / 3)


def test_the_loss_is_that_of_the_task_and_the_weighted_penalty(make_backbone: Any, make_split: Any) -> None:
    rows = make_split([5, 3, 6, 4, 7, 2], molecule=True, task="multilabel")
    batch, plain = rows.batch(range(6)), method(make_backbone("chem"), "multilabel", orthogonality=0.0)
    both = method(make_backbone("chem"), "multilabel", orthogonality=0.5)
    torch.testing.assert_close(both.loss(batch).value, plain.loss(batch).value + 0.5 * plain.penalty())


def test_tokens_start_from_k_means_and_heads_from_class_means(make_backbone: Any, make_split: Any) -> None:
    made, rows = method(make_backbone()), make_split([5, 3, 6, 4, 7, 2, 8, 3])
    z, labels = made.embed(rows.batch(range(8))["graphs"]), rows.batch(range(8))["labels"]
    made.start(made.read(rows, RUN))
    expected = KMeans(3, random_state=0, n_init=10).fit(z.double().numpy())
    torch.testing.assert_close(made.structure, torch.from_numpy(expected.cluster_centers_).float())
    for head in made.heads:
        torch.testing.assert_close(head.data, torch.stack([z[labels == c].mean(0) for c in (0, 1)]))


def test_heads_of_binary_tasks_start_from_means_of_positive_rows(make_backbone: Any, make_split: Any) -> None:
    made, rows = method(make_backbone("chem"), "multilabel"), make_split([5, 3, 6, 4, 7, 2], 0, True, "multilabel")
    z, labels = made.embed(rows.batch(range(6))["graphs"]), rows.batch(range(6))["labels"]
    made.start(made.read(rows, RUN))
    torch.testing.assert_close(made.heads[0].data, torch.stack([z[labels[:, c] == 1].mean(0) for c in (0, 1)]))


def test_after_a_step_tokens_are_centres_of_the_step_and_keep_their_heads(make_backbone: Any, make_split: Any) -> None:
    made, rows = method(make_backbone()), make_split([5, 3, 6, 4, 7, 2])
    seen = made.read(rows, RUN)
    made.start(seen)
    start, z = made.structure.clone(), seen.batch(range(6))["features"]
    made.fit(rows, None, RUN.model_copy(update={"epochs": None, "max_steps": 1, "batch_size": 6}))
    moved = cluster(z, 3, start)
    torch.testing.assert_close(made.structure, moved)
    torch.testing.assert_close(made.structure, start)  # all rows in one step: the centres are those of the start
    far = cluster(z[:4], 3, start)
    assert far is not None
    assert not torch.allclose(far, start)
    assert bool(((far[:, None] - start).norm(dim=-1).argmin(1) == torch.arange(3)).all())


def test_a_step_of_some_rows_moves_the_tokens_to_centres_of_these(make_backbone: Any, make_split: Any) -> None:
    made, rows = method(make_backbone()), make_split([5, 3, 6, 4, 7, 2])
    seen = made.read(rows, RUN)
    made.start(seen)
    start, z = made.structure.clone(), seen.batch(range(6))["features"]
    made.fit(rows, None, RUN.model_copy(update={"epochs": None, "max_steps": 1}))  # four rows
    assert not torch.allclose(made.structure, start)
    steps = [cluster(z[list(four)], 3, start) for four in combinations(range(6), 4)]
    assert any(torch.allclose(made.structure, centres) for centres in steps if centres is not None)


def test_a_step_of_too_few_different_rows_leaves_the_tokens(make_backbone: Any, make_split: Any) -> None:
    made, rows = method(make_backbone()), make_split([5, 3, 6, 4, 7, 2])
    made.start(made.read(rows, RUN))
    start = made.structure.clone()
    made.fit(rows, None, RUN.model_copy(update={"batch_size": 2}))
    assert torch.equal(made.structure, start)


def test_more_tokens_than_training_rows_are_refused(make_backbone: Any, make_split: Any) -> None:
    with pytest.raises(InputError, match="7 structure tokens need as many different training rows"):
        method(make_backbone(), structure_tokens=7).fit(make_split([5, 3, 6, 4, 7, 2]), None, RUN)


def test_tokens_are_saved(make_backbone: Callable[..., Any], make_split: Any, tmp_path: Path) -> None:
    made = method(make_backbone())
    made.fit(make_split([5, 3, 6, 4, 7, 2]), None, RUN)
    loaded = GPPT.from_pretrained(made.save_pretrained(tmp_path / "gppt"), make_backbone())
    assert torch.equal(loaded.structure, made.structure)
