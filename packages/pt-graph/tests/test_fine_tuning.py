"""Fine-tuning: a copy is trained, in the published mode, and what is saved is all of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch_geometric.data import Batch

from pt_core import InputError, attach
from pt_core.frozen import snapshot
from pt_core.plan import FitConfig
from pt_graph import ChemGNN, FineTuning, FineTuningConfig
from pt_graph.method import label_loss
from pt_graph.methods.gpf import GPFPrompt

RUN = FitConfig(epochs=3, batch_size=3, device="cpu", progress=False, max_grad_norm=None)


def method(backbone: Any, task: str = "multilabel", **settings: Any) -> FineTuning:
    return FineTuning(backbone, FineTuningConfig(num_outputs=2, task=task, **settings))


def rows(make_split: Callable[..., Any], seed: int = 0) -> Any:
    return make_split([5, 3, 6, 4, 7, 2], seed, True, "multilabel")


def test_all_weights_of_the_chem_gin_and_the_head_are_trained() -> None:
    made = method(ChemGNN())
    assert made.count() == 1_857_900 + 602
    backbone, head = made.parameter_groups()
    assert (backbone["name"], backbone["lr"], head["lr"]) == ("backbone", 1e-3, 1e-3)


def test_the_given_backbone_stays_as_it_is(make_backbone: Callable[..., Any], make_split: Callable[..., Any]) -> None:
    backbone = make_backbone("chem")
    before = snapshot(backbone)
    made = method(backbone)
    made.fit(rows(make_split), None, RUN)
    assert snapshot(backbone) == before
    assert snapshot(made.tuned) != before


def test_a_step_is_that_of_a_plain_loop(make_backbone: Callable[..., Any], make_split: Callable[..., Any]) -> None:
    split, made = rows(make_split), method(make_backbone("chem", dropout=0.0))
    network, head = copy.deepcopy(made.tuned).train(), copy.deepcopy(made.head)
    optimiser = torch.optim.SGD([*network.parameters(), *head.parameters()], lr=1e-3)
    for _ in range(2):
        batch = split.batch(range(6))
        total, count = label_loss(
            head(network.readout(network(batch["graphs"]), batch["graphs"])), batch["labels"], "multilabel"
        )
        optimiser.zero_grad()
        (total.sum() / count.sum()).backward()
        optimiser.step()
    made.fit(split, None, RUN.model_copy(update={"epochs": 2, "batch_size": 6, "optimiser": "sgd"}))
    for ours, theirs in zip(made.tuned.state_dict().values(), network.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_batch_norm_statistics_move_in_train_mode_only(mode: str, make_backbone: Any, make_split: Any) -> None:
    made = method(make_backbone("chem"), batch_norm=mode)
    before = made.tuned.batch_norms[0].running_mean.clone()
    made.fit(rows(make_split), None, RUN)
    assert torch.equal(made.tuned.batch_norms[0].running_mean, before) == (mode == "eval")


def test_what_is_saved_loads_on_the_given_backbone(make_backbone: Any, make_split: Any, tmp_path: Path) -> None:
    made, split = method(make_backbone("chem")), rows(make_split)
    made.fit(split, rows(make_split, 1), RUN)
    assert "tuned.batch_norms.0.running_mean" in made.trained_state()
    loaded = FineTuning.from_pretrained(made.save_pretrained(tmp_path / "tuned"), make_backbone("chem"), strict=False)
    batch = split.batch([0, 1])
    assert torch.equal(loaded(batch).logits, made(batch).logits)


def test_dropout_is_on_in_training_unless_it_is_switched_off(make_backbone: Any, make_split: Any) -> None:
    graphs = rows(make_split).batch([0, 1])["graphs"]
    made = method(make_backbone("chem"))
    assert not torch.equal(made.nodes(graphs), made.nodes(graphs))
    made.eval()
    assert torch.equal(made.nodes(graphs), made.nodes(graphs))
    quiet = method(make_backbone("chem"), backbone_dropout=False)
    assert torch.equal(quiet.nodes(graphs), quiet.nodes(graphs))


def test_a_loss_through_batch_statistics_is_not_accumulated(make_backbone: Any, make_split: Any) -> None:
    run = RUN.model_copy(update={"micro_batch_size": 1})
    with pytest.raises(InputError, match="couples the rows"):
        method(make_backbone("chem")).fit(rows(make_split), None, run)
    method(make_backbone("chem"), batch_norm="eval").fit(rows(make_split), None, run)


def test_a_training_batch_of_one_node_is_normalised_by_the_statistics_so_far(
    make_backbone: Any, make_graph: Any
) -> None:
    made = method(make_backbone("chem"), backbone_dropout=False)
    one = Batch.from_data_list([make_graph(1, 0, molecule=True)])
    trained = made.nodes(one)
    assert torch.equal(trained, made.eval().nodes(one))


def test_a_backbone_that_carries_a_prompt_is_refused(make_backbone: Callable[..., Any]) -> None:
    backbone = make_backbone("chem")
    attach(backbone, GPFPrompt(12, torch.Generator()))
    with pytest.raises(InputError, match="Remove the prompts first"):
        method(backbone)
