"""Recipes to jobs on image folders, the protocols, and artifacts to predictions."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pt_core import InputError, artifacts, recipe, registry, runs
from pt_core.metrics import harmonic_mean
from pt_core.testing import one_thread
from pt_core.training import FitConfig, evaluate
from pt_vl import demo, workbench
from pt_vl.method import FAMILY
from pt_vl.workbench import Bench, Recipe, open_artifact

NAMES = ("bird", "cat", "dog", "tree")


@pytest.fixture
def folder(tmp_path: Path, make_encoder: Callable[..., Any]) -> Path:
    """A backbone, and images of four classes: train (6 each), test and a second domain (4 each)."""
    made = make_encoder()
    made.model.save_pretrained(tmp_path / "backbone")
    made.tokeniser.save_pretrained(tmp_path / "backbone")
    for part, count in (("train", 6), ("test", 4), ("domain", 4)):
        for label, name in enumerate(NAMES):
            for i in range(count):
                draw = np.random.default_rng((label, i, len(part)))
                values = draw.integers(0, 120, (12, 12, 3)) + np.eye(4, 3, dtype=int)[label] * 120
                path = tmp_path / part / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(values.astype(np.uint8)).save(path)
    return tmp_path


def made(folder: Path, method: dict[str, Any] | None = None, **data: Any) -> Recipe:
    images = {"train": str(folder / "train"), "test": str(folder / "test"), "shots": 2}
    return Recipe.model_validate(
        {
            "method": method or {"name": "coop", "prompt_length": 2, "lr": 0.05},
            "backbone": {"name": str(folder / "backbone")},
            "data": images | data,
            "training": {"max_steps": 4, "batch_size": 3, "progress": False, "device": "cpu"},
        }
    )


def test_a_recipe_becomes_a_run_whose_artifact_predicts(folder: Path) -> None:
    bench = Bench(made(folder))
    job, config = bench.job("coop", 1)
    assert (len(job.train), len(job.validation or ()), len(job.test or ())) == (8, 8, 16)
    assert job.method.config.class_names == NAMES and job.backbone_name is None
    with one_thread():
        outcome = runs.train(job, config, folder / "run")
    assert outcome.artifact is not None
    session = open_artifact(artifacts.load_artifact(outcome.artifact), str(folder / "backbone"))
    with (folder / "test.csv").open("w", newline="") as file:
        rows = [(f"test/{name}/{i}.png", name) for name in NAMES for i in range(4)]
        csv.writer(file).writerows([("text", "label"), *rows])
    answers = session.predict(session.inputs(folder / "test.csv"))
    assert [set(answer) for answer in answers] == [{"image", "label", "scores"}] * 16
    scores = session.evaluate(folder / "test.csv")
    assert scores["accuracy"] == pytest.approx(outcome.result.metrics["accuracy"])
    right = [answer["label"] == name for answer, (_, name) in zip(answers, rows, strict=True)]
    assert scores["accuracy"] == pytest.approx(sum(right) / 16)


def test_base_to_new_tests_both_halves_by_themselves(folder: Path) -> None:
    bench = Bench(made(folder, protocol="base-to-new"))
    job, _ = bench.job("coop", 0)
    assert job.method.config.class_names == NAMES[:2]  # ceil(4 / 2)
    assert job.test is not None
    scores = evaluate(job.method, job.test)
    base, new = bench.task(0).base_to_new()
    assert set(scores) == {"loss", "base", "new", "harmonic-mean"}
    assert scores["base"] == evaluate(job.method, base.test)["accuracy"]
    assert scores["new"] == evaluate(job.method.with_classes(NAMES[2:]), new.test)["accuracy"]
    assert scores["harmonic-mean"] == pytest.approx(harmonic_mean(scores["base"], scores["new"]))


def test_what_belongs_to_its_own_classes_has_no_answer_for_new_ones(folder: Path) -> None:
    bench = Bench(made(folder, {"name": "linear-probe"}, protocol="base-to-new"))
    job, _ = bench.job("linear-probe", 0)
    assert job.test is not None
    assert set(evaluate(job.method, job.test)) & {"base", "new", "harmonic-mean"} == {"base"}


def test_targets_are_tested_with_the_classes_that_they_have(folder: Path) -> None:
    other = {"test": str(folder / "domain")}
    pets = folder / "pets"
    for name in ("cat", "red car"):
        (pets / name).mkdir(parents=True)
        Image.open(folder / "domain" / "cat" / "0.png").save(pets / name / "0.png")
    bench = Bench(made(folder, targets={"domain": other, "pets": {"test": str(pets)}}))
    job, _ = bench.job("coop", 0)
    assert job.test is not None
    scores = evaluate(job.method, job.test)
    assert {"accuracy", "accuracy/domain", "accuracy/pets", "accuracy/others"} <= set(scores)
    assert scores["accuracy/domain"] == evaluate(job.method, bench.targets()["domain"].train)["accuracy"]
    expected = evaluate(job.method.with_classes(("cat", "red car")), bench.targets()["pets"].train)["accuracy"]
    assert scores["accuracy/pets"] == expected
    assert scores["accuracy/others"] == pytest.approx((scores["accuracy/domain"] + scores["accuracy/pets"]) / 2)


def test_the_cache_of_tip_adapter_is_as_large_as_the_data(folder: Path) -> None:
    job, config = Bench(made(folder, {"name": "tip-adapter"})).job("tip-adapter", 0)
    assert job.method.config.cache_size == 8
    job.method.fit(job.train, job.validation, config)


def test_the_identity_follows_images_and_settings(folder: Path) -> None:
    first, other = Bench(made(folder)).identity, Bench(made(folder, shots=3)).identity
    assert first == json.loads(json.dumps(first)) == Bench(made(folder)).identity
    assert {key for key in first if first[key] != other[key]} == {"data", "images"}


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"train": "gone"}, "no such file or folder"),
        ({"templates": "a photo"}, "needs one {}"),
        ({"split_file": ".", "images": "."}, "not both"),
        ({"shots": 0}, "greater than or equal to 1"),
        ({"protocol": "zero"}, "'few-shot' or 'base-to-new'"),
    ],
)
def test_bad_settings_are_refused(folder: Path, data: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        made(folder, **data)


def test_bad_inputs_of_a_session_are_named(folder: Path) -> None:
    job, _ = Bench(made(folder)).job("coop", 0)
    path = job.method.save_pretrained(folder / "saved", task=job.task)
    session = open_artifact(artifacts.load_artifact(path), str(folder / "backbone"))
    (folder / "bad.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"bad\.png: cannot be read"):
        session.predict([str(folder / "bad.png")])
    (folder / "rows.csv").write_text("text,label\ntest/cat/0.png,horse\n")
    with pytest.raises(InputError, match="'horse' is no class of the prompt"):
        session.evaluate(folder / "rows.csv")
    with pytest.raises(InputError, match="no other format"):
        session.export("peft", folder)


def test_the_recipe_of_the_real_model_has_published_settings_and_every_method_takes_them(folder: Path) -> None:
    images = {"data.train": str(folder / "train"), "data.test": str(folder / "test")}
    _, checked = recipe.load("vl/clip-b16", images)
    published = {"coop": (200, 32, 0.002), "cocoop": (10, 1, 0.002), "vpt": (5, 4, 0.0025), "ivlp": (5, 4, 0.0035)}
    published |= {"maple": (5, 4, 0.0035), "restore": (10, 4, 0.0035), "r-amt": (30, 32, 8e-5), "upt": (200, 32, 0.002)}
    published |= {"tip-adapter-f": (20, 256, 0.001)}
    for label in checked.labels():
        chosen = checked.with_method(label)
        config = chosen.config(class_names=NAMES, cache_size=4)
        assert type(config) is registry.find_method("vl", chosen.method.name).config_class
        if label in published:
            epochs, batch, lr = published[label]
            assert (chosen.training.epochs, chosen.training.batch_size, config.model_dump()["lr"]) == (
                epochs,
                batch,
                lr,
            )
            by_itself = FAMILY | registry.find_method("vl", chosen.method.name).run
            assert FitConfig(**by_itself) == chosen.training
    assert checked.with_method("r-amt").config().gradient_dropout == 0.3
    assert checked.with_method("tip-adapter-f").training.weight_decay == 0.01
    with pytest.raises(InputError, match="vl/clip-b16, field 'data': give train, test, split_file or icons"):
        recipe.load("vl/clip-b16")


@pytest.mark.parametrize("method", ["coop", "linear-probe"])
def test_of_a_domain_with_some_of_the_classes_only_their_logits_are_compared(folder: Path, method: str) -> None:
    part = folder / "part"
    for name in NAMES[2:]:
        shutil.copytree(folder / "test" / name, part / name)
    settings = {"name": method} | ({"prompt_length": 2} if method == "coop" else {})
    bench = Bench(made(folder, settings, targets={"part": {"test": str(part)}}))
    job, config = bench.job(method, 0)
    job.method.fit(job.train, job.validation, config)
    assert job.test is not None
    scores = evaluate(job.method, job.test)
    target = bench.targets()["part"].train
    assert target is not None
    logits = job.method(target.batch(range(len(target)))).logits
    right = logits[:, 2:].argmax(1) == target.batch(range(len(target)))["labels"]
    assert scores["accuracy/part"] == pytest.approx(float(right.float().mean()))


def test_the_demo_runs_on_a_folder_of_ones_own(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    workbench.demo(folder / "demo", 1, 2, folder)
    told = capsys.readouterr().out
    assert "in a fresh process, image.png -> " in told and "base-to-new" in told
    page = (folder / "demo" / "report.html").read_text("utf-8")
    assert page.count("data:image/png;base64,") >= 4
    results = json.loads((folder / "demo" / "results.json").read_text("utf-8"))
    assert {row["method"] for row in results} == set(demo.SHOWN)
    assert (folder / "demo" / "1-shots" / "cells").is_dir() and (folder / "demo" / "2-shots" / "cells").is_dir()
    with pytest.raises(InputError, match="has no folder 'train'"):
        workbench.demo(folder / "other", 1, 2, folder / "train")
