"""Recipes to jobs on molecules and nodes, published settings by name, and artifacts to predictions."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch_geometric.data import Data

from pt_core import InputError, artifacts, cli, recipe, registry, runs
from pt_graph.backbones import save_backbone
from pt_graph.methods.relief import setting, settings
from pt_graph.workbench import Bench, Recipe, Session, open_artifact

pytest.importorskip("rdkit", reason="rdkit is not installed: the extra `molecules` of pt-graph")

SMILES = ["CCO", "CCN", "CCC", "c1ccccc1O", "c1ccccc1N", "C1CCCCC1", "C1CCCC1O", "CC(C)O", "CCCl", "c1ccncc1"] * 3
RECIPES = [name for name in recipe.installed() if name.startswith("graph/")]


@pytest.fixture
def folder(tmp_path: Path, make_backbone: Callable[..., Any], make_graph: Callable[..., Data]) -> Path:
    """A molecule GIN and a table; a node GIN and a graph of 60 nodes in 3 classes."""
    save_backbone(make_backbone("chem"), tmp_path / "gin")
    with (tmp_path / "molecules.csv").open("w", newline="") as file:
        rows = [(s, str(i % 2), "" if i == 4 else str(i % 3 % 2)) for i, s in enumerate(SMILES)]
        csv.writer(file).writerows([("smiles", "first", "second"), *rows])
    save_backbone(make_backbone("node-gin"), tmp_path / "node-gin")
    graph = make_graph(60, 2)
    parts = {"x": graph.x, "edge_index": graph.edge_index, "y": torch.arange(60) % 3}
    save_file({name: tensor.contiguous() for name, tensor in parts.items()}, tmp_path / "graph.safetensors")
    return tmp_path


def made(folder: Path, kind: str = "molecules", method: dict[str, Any] | None = None, **more: Any) -> Recipe:
    if kind == "molecules":
        data: dict[str, Any] = {
            "train": str(folder / "molecules.csv"),
            "labels": ["first", "second"],
            "split": "random",
        }
        data |= {"shots": 12, "few_shot": "relief"}
    else:
        data = {"kind": "nodes", "train": str(folder / "graph.safetensors"), "hops": 1, "shots": 4}
        data |= {"validation_nodes": 10, "test_nodes": 12}
    content: dict[str, Any] = {
        "method": method or {"name": "gpf", "lr": 0.05},
        "backbone": {"name": str(folder / ("gin" if kind == "molecules" else "node-gin"))},
        "data": data | more.pop("data", {}),
        "training": {"max_steps": 4, "batch_size": 4, "progress": False, "device": "cpu", "evaluate_every": 2},
    }
    return Recipe.model_validate(content | more)


@pytest.mark.parametrize(("key", "value"), [("num_outputs", 5), ("task", "multiclass")])
def test_what_the_data_say_is_no_setting_of_a_method(folder: Path, key: str, value: Any) -> None:
    checked = made(folder, method={"name": "gpf", key: value})
    with pytest.raises(InputError, match=rf"'method\.{key}': the data say it: .*data\..*\. Leave it out here"):
        checked.config()


def test_a_molecule_recipe_becomes_a_run_whose_artifact_predicts(folder: Path) -> None:
    bench = Bench(made(folder))
    job, config = bench.job("gpf", 1)
    assert (job.method.config.num_outputs, job.method.config.task, len(job.train)) == (2, "multilabel", 12)
    assert job.backbone_name is None
    outcome = runs.train(job, config, folder / "run")
    assert outcome.artifact is not None and "roc-auc" in outcome.result.metrics
    session = open_artifact(artifacts.load_artifact(outcome.artifact), str(folder / "gin"))
    told = session.predict(["CCO", "c1ccccc1"])
    assert [answer["smiles"] for answer in told] == ["CCO", "c1ccccc1"]
    assert set(told[0]["scores"]) == {"first", "second"}
    assert session.predict(session.inputs(folder / "molecules.csv", text="smiles"))[0] == told[0]
    scores = session.evaluate(folder / "molecules.csv", text="smiles")
    assert 0 <= scores["roc-auc"] <= 1
    with pytest.raises(InputError, match="gpf is not written as 'peft'. Use the artifact itself"):
        cli.export(str(outcome.artifact), folder / "adapter")


def test_molecules_of_several_classes_are_trained_on_and_named(folder: Path) -> None:
    with (folder / "kinds.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("smiles", "kind"), *((s, "abc"[i % 3]) for i, s in enumerate(SMILES))])
    data = {"train": str(folder / "kinds.csv"), "labels": ["kind"], "multiclass": True}
    job, config = Bench(made(folder, data=data)).job("gpf", 1)
    assert (job.method.config.num_outputs, job.method.config.task) == (3, "multiclass")
    outcome = runs.train(job, config, folder / "run")
    assert outcome.artifact is not None and {"accuracy", "macro-f1"} <= outcome.result.metrics.keys()
    session = open_artifact(artifacts.load_artifact(outcome.artifact), str(folder / "gin"))
    (told,) = session.predict(["CCO"])
    assert told["label"] in "abc" and set(told["scores"]) == {"a", "b", "c"}
    assert 0 <= session.evaluate(folder / "kinds.csv", text="smiles", label="kind")["accuracy"] <= 1


def test_a_prompt_is_evaluated_on_its_own_file_as_that_was_read(folder: Path) -> None:
    rows = [(s, (-1, 1, 0)[i % 3], 1 if i % 2 else -1) for i, s in enumerate(SMILES)]
    with (folder / "signed.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("smiles", "first", "second"), *rows, ("C(", 1, 1), ("CC", 0, 0)])
    signed = {"coding": "signed", "invalid": "skip", "unlabelled": "drop", "train": str(folder / "signed.csv")}
    job, _ = Bench(made(folder, data=signed)).job("gpf", 0)
    path = job.method.save_pretrained(folder / "saved", task=job.task)
    session = open_artifact(artifacts.load_artifact(path), str(folder / "gin"))
    plain = [(s, {-1: 0, 0: "", 1: 1}[a], {-1: 0, 1: 1}[b]) for s, a, b in rows]
    with (folder / "plain.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("smiles", "first", "second"), *plain])
    same = Session(session.method, session.spec.model_copy(update={"coding": "zero-one"}))
    found = session.evaluate(folder / "signed.csv", text="smiles")
    assert found == same.evaluate(folder / "plain.csv", text="smiles")


def test_a_node_recipe_becomes_a_run_whose_artifact_predicts(folder: Path) -> None:
    bench = Bench(made(folder, "nodes"))
    job, config = bench.job("gpf", 0)
    assert (job.method.config.num_outputs, job.method.config.task, len(job.train)) == (3, "multiclass", 12)
    outcome = runs.train(job, config, folder / "run")
    assert outcome.artifact is not None
    session = open_artifact(artifacts.load_artifact(outcome.artifact), str(folder / "node-gin"))
    told = session.predict(session.inputs(folder / "graph.safetensors"))
    assert len(told) == 60 and set(told[0]) == {"node", "label", "scores"}
    scores = session.evaluate(folder / "graph.safetensors")
    right = sum(answer["label"] == str(answer["node"] % 3) for answer in told)
    assert scores["accuracy"] == pytest.approx(right / 60)
    with pytest.raises(InputError, match="nodes are predicted with their graph"):
        session.predict(["7"])


def test_neighbours_of_a_prompt_are_drawn_as_they_were_in_training(folder: Path) -> None:
    bench = Bench(made(folder, "nodes", data={"hops": 2, "neighbours": [2, 1]}))
    job, task = bench.job("gpf", 3)[0], bench.task(3)
    path = job.method.save_pretrained(folder / "saved", task=job.task)
    session = open_artifact(artifacts.load_artifact(path), str(folder / "node-gin"))
    found = dict(session.inputs(folder / "graph.safetensors"))
    assert task.test is not None and task.test.ids is not None
    for (graph, _), node in zip(task.test.rows, task.test.ids, strict=True):
        assert torch.equal(graph.x, found[node].x) and torch.equal(graph.edge_index, found[node].edge_index)


def test_relief_reports_coverage_and_magnitude_and_predicts_the_same_in_any_company(folder: Path) -> None:
    relief = {"name": "relief", "critic": "pooled", "minibatch": 8, "first_best_epoch": 1}
    bench = Bench(made(folder, method=relief))
    job, config = bench.job("relief", 0)
    assert job.method.config.level == "graph"
    outcome = runs.train(job, config.model_copy(update={"max_steps": 2}), folder / "run")
    assert {"roc-auc", "pcr", "apm"} <= set(outcome.result.metrics)
    assert outcome.artifact is not None
    session = open_artifact(artifacts.load_artifact(outcome.artifact), str(folder / "gin"))
    assert session.predict(["CCO", "CCN"])[1] == session.predict(["CCN"])[0]
    with torch.no_grad():
        for parameter in session.method.policies.parameters():
            parameter *= 10  # now it matters which nodes are drawn
    company = ["CCO", "c1ccccc1", "CCCCCCN"]
    first, *_, last = session.predict(company)
    assert [last, first] == session.predict([company[-1], company[0]])
    assert last == session.predict(company[-1:])[0]
    assert Bench(made(folder, "nodes", relief)).job("relief", 0)[0].method.config.level == "node"


def test_validation_and_test_may_be_cut_by_the_seed(folder: Path) -> None:
    whole = Bench(made(folder, "nodes")).task(0)
    cut = Bench(made(folder, "nodes", data={"max_validation": 4, "max_test": 5})).task(0)
    assert whole.validation is not None and cut.validation is not None and cut.test is not None
    assert (len(cut.train), len(cut.validation), len(cut.test)) == (12, 4, 5)
    assert set(cut.validation.ids or ()) < set(whole.validation.ids or ())
    assert cut.validation.batch([0])["labels"].shape == (1,)


def test_one_shot_by_the_rule_of_relief_is_all_of_the_training_part(folder: Path) -> None:
    assert len(Bench(made(folder, data={"shots": 1})).task(0).train) == 24 == int(0.8 * len(SMILES))


def test_fine_tuning_gets_a_backbone_of_its_own(folder: Path) -> None:
    bench = Bench(made(folder))
    job, _ = bench.job("fine-tuning", 0)
    assert job.method.backbone is not bench.backbone
    assert bench.job("gpf", 0)[0].method.backbone is bench.backbone


@pytest.mark.parametrize("name", settings())
def test_every_published_run_is_a_setting_of_the_one_recipe(name: str, folder: Path) -> None:
    published = setting(name)
    node = published["method"]["level"] == "node"
    train = folder / ("graph.safetensors" if node else "molecules.csv")
    changes: dict[str, Any] = {"setting": name, "data.train": str(train), "backbone.name": "weights.safetensors"}
    if not node:
        changes["data.labels"] = ["first"]
    _, checked = recipe.load("graph/relief", changes)
    assert isinstance(checked, Recipe)
    config = checked.config(num_outputs=published["method"]["num_outputs"]).model_dump()
    assert {key: config[key] for key in published["method"] if key != "task"} == {
        key: value for key, value in published["method"].items() if key != "task"
    }
    assert checked.training.epochs == published["training"]["epochs"]
    assert checked.data.shots == (10 if node else 50) and checked.data.hops == published["data"].get("hops")
    assert checked.backbone.config == {"kind": "node-gin" if node else "chem"}


def test_what_a_recipe_says_wins_over_the_published_run(folder: Path) -> None:
    changes = {"data.train": str(folder / "graph.safetensors"), "backbone.name": "x", "method.z_max": 0.7}
    _, checked = recipe.load("graph/relief", changes | {"training.epochs": 3, "data.hops": 2})
    assert isinstance(checked, Recipe)
    assert checked.config().model_dump()["z_max"] == 0.7
    assert (checked.training.epochs, checked.data.hops, checked.data.max_nodes) == (3, 2, 150)
    with pytest.raises(InputError, match="no published run 'nothing'"):
        recipe.load("graph/relief", changes | {"setting": "nothing"})


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "graph/relief"])
def test_a_recipe_is_read_and_all_its_methods_take_their_settings(name: str) -> None:
    _, checked = recipe.load(name)
    for label in checked.labels():
        chosen = checked.with_method(label)
        config = chosen.config(num_outputs=2)
        assert type(config) is registry.find_method("graph", chosen.method.name).config_class
        for key, value in (chosen.method.model_extra or {}).items():
            assert config.model_dump()[key] == value


def test_the_identity_follows_rows_and_settings(folder: Path) -> None:
    first, other = Bench(made(folder)).identity, Bench(made(folder, data={"shots": 10})).identity
    assert first == json.loads(json.dumps(first)) == Bench(made(folder)).identity
    assert {key for key in first if first[key] != other[key]} == {"data", "rows"}


@pytest.mark.parametrize("change", ["labels", "smiles", "y", "x", "edge_index"])
def test_the_identity_follows_what_the_rows_hold(folder: Path, change: str) -> None:
    kind = "molecules" if change in ("labels", "smiles") else "nodes"
    first = Bench(made(folder, kind)).identity
    if kind == "molecules":  # the same rows by their numbers
        text = (folder / "molecules.csv").read_text()
        old, new = ("CCO,0,0", "CCO,1,0") if change == "labels" else ("CCO,", "OCC=O,")
        (folder / "molecules.csv").write_text(text.replace(old, new, 1))
    else:
        parts = load_file(folder / "graph.safetensors")
        parts[change] = parts[change].flip(-1)
        save_file({name: tensor.contiguous() for name, tensor in parts.items()}, folder / "graph.safetensors")
    other = Bench(made(folder, kind)).identity
    assert {key for key in first if first[key] != other[key]} == {"rows"}


def test_the_identity_follows_the_weights(folder: Path) -> None:
    first, path = Bench(made(folder)).identity, folder / "gin" / "model.safetensors"
    save_file({n: t + 0.5 if t.is_floating_point() else t for n, t in load_file(path).items()}, path)
    other = Bench(made(folder)).identity
    assert {key for key in first if first[key] != other[key]} == {"weights"}


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"train": "gone.csv"}, "no such file"),
        ({"train": "asset:gone"}, "no such asset"),
        ({"labels": []}, "name the columns with labels"),
        ({"kind": "nodes", "labels": [], "few_shot": None}, "node tasks need data.hops"),
        ({"kind": "graphs"}, "few_shot is a rule for molecules"),
        ({"shots": None}, "needs shots"),
        ({"few_shot": None}, "shots of molecules need a rule"),
        ({"few_shot": "gpf", "shots": 12.5}, "shots are whole"),
        ({"shots": 1.5}, "shots are whole"),
        ({"kind": "nodes", "few_shot": None, "hops": 1, "shots": 0.5}, "shots are whole"),
        ({"shots": True}, "true and false are no value"),
        ({"neighbours": [3, True]}, "true and false are no value"),
    ],
)
def test_bad_settings_are_refused(folder: Path, data: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        made(folder, data=data)


def test_a_prompt_whose_labels_do_not_fit_its_outputs_is_refused(folder: Path) -> None:
    bench = Bench(made(folder))
    task = bench.task(0).spec.model_dump() | {"labels": ["first", "second", "third"]}
    path = bench.job("gpf", 0)[0].method.save_pretrained(folder / "saved", task=task)
    with pytest.raises(
        InputError, match=r"config\.json, field 'task': the task has 3 labels, the prompt answers for 2"
    ):
        open_artifact(artifacts.load_artifact(path), "nowhere")


def test_a_bare_weight_file_needs_its_configuration(folder: Path) -> None:
    bare = str(folder / "gin" / "model.safetensors")
    with pytest.raises(InputError, match="needs a config"):
        made(folder, backbone={"name": bare}).backbone.load()
    config = {"kind": "chem", "width": 12, "layers": 2}
    checked = made(folder, backbone={"name": bare, "config": config})
    assert checked.backbone.load().width == 12
    job, _ = Bench(checked).job("gpf", 0)
    path = job.method.save_pretrained(folder / "saved", task=job.task)
    session = open_artifact(artifacts.load_artifact(path), bare)  # the configuration is kept with the prompt
    assert torch.equal(session.method.prompt.weight, job.method.prompt.weight)
    path = job.method.save_pretrained(folder / "odd", task={**(job.task or {}), "backbone": {"kind": "gcn"}})
    with pytest.raises(InputError, match=r"odd, field 'task\.config': unknown kind 'gcn'"):
        open_artifact(artifacts.load_artifact(path), bare)
    with pytest.raises(ValueError, match="unknown kind 'gcn'"):
        made(folder, backbone={"name": bare, "config": {"kind": "gcn"}})
