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
import torch
import yaml
from PIL import Image

from pt_core import InputError, artifacts, cli, recipe, registry, runs
from pt_core.evaluation import evaluate
from pt_core.metrics import harmonic_mean
from pt_core.plan import FitConfig
from pt_core.testing import Killed, command, one_thread
from pt_vl import CoOpConfig, demo, workbench
from pt_vl.backbones import DualEncoder, load_backbone
from pt_vl.images import read_image
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


def settings(folder: Path, method: dict[str, Any] | None = None, **data: Any) -> dict[str, Any]:
    images = {"train": str(folder / "train"), "test": str(folder / "test"), "shots": 2}
    return {
        "method": method or {"name": "coop", "prompt_length": 2, "lr": 0.05},
        "backbone": {"name": str(folder / "backbone")},
        "data": images | data,
        "training": {"max_steps": 4, "batch_size": 3, "progress": False, "device": "cpu"},
    }


def made(folder: Path, method: dict[str, Any] | None = None, **data: Any) -> Recipe:
    return Recipe.model_validate(settings(folder, method, **data))


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


def test_a_method_with_the_classes_in_another_order_does_not_train_on_a_task(folder: Path) -> None:
    bench = Bench(made(folder))
    task = bench.task(0)
    for part in (task, task.base_to_new()[1]):
        names = part.spec.class_names
        method = registry.find_method("vl", "coop")(
            bench.backbone, CoOpConfig(class_names=names[::-1], prompt_length=2)
        )
        with pytest.raises(InputError, match=f"label 0 is '{names[0]}' in the training rows, '{names[-1]}' in coop"):
            method.fit(part.train)


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


def test_of_a_target_only_the_images_that_are_tested_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: dict[str, list[Any]] = {"train": [], "val": [], "test": []}
    for split, part in (("train", "train"), ("val", "train"), ("test", "domain")):
        rows[split] = [[f"{part}/{name}/{i}.png", label, name] for label, name in enumerate(NAMES) for i in range(2)]
    (folder / "split.json").write_text(json.dumps(rows))
    bench = Bench(made(folder, targets={"pets": {"split_file": str(folder / "split.json"), "images": str(folder)}}))
    (folder / "train" / "cat" / "0.png").write_bytes(b"damaged")
    read = list[Any]()
    monkeypatch.setattr("pt_vl.data.read_image", lambda source: read.append(source) or read_image(source))
    target = bench.targets()["pets"]
    assert [path.parts[-3:] for path in read] == [("domain", name, f"{i}.png") for name in NAMES for i in range(2)]
    assert target.train is None and target.validation is None and target.test is not None and len(target.test) == 8


@pytest.mark.parametrize(
    ("asked", "heads"),
    [
        ({"protocol": "base-to-new"}, ["base", "new", "harmonic-mean"]),
        (
            {"targets": {"domain": {"test": "domain"}, "pets": {"test": "pets"}}},
            ["accuracy", "accuracy/domain", "accuracy/pets", "accuracy/others"],
        ),
    ],
    ids=["base-to-new", "targets"],
)
def test_compare_prints_the_fields_table_of_three_seeds(
    folder: Path,
    asked: dict[str, Any],
    heads: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("cat", "red car"):
        shutil.copytree(folder / "domain" / "cat", folder / "pets" / name)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("pt_core.report.can_draw", lambda: False)  # pictures take longer than the runs
    data = {"train": "train", "test": "test", "shots": 2, "augment": False} | asked
    changes = {f"data.{key}": value for key, value in data.items()}
    changes |= {"backbone.name": "backbone", "method.prompt_length": 2, "method.lr": 0.05, "training.epochs": 2}
    changes["compare.bound"] = {"method": "coop", "class_specific": True, "prompt_length": 2}
    settings = [part for key, value in changes.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    with one_thread():
        pt = command(monkeypatch, capsys)
        code, out, err = pt("compare", "vl/clip-b16", "--methods", "coop,bound", "-o", "grid", *settings)
    assert code == 0, err
    results = json.loads((folder / "grid" / "results.json").read_text("utf-8"))
    found = {(row["method"], row["seed"]): row["metrics"] for row in results}
    assert set(found) == {(label, seed) for label in ("coop", "bound") for seed in range(3)}
    lines = [line.replace("*", "").split() for line in out.partition("vl/clip-b16")[2].splitlines()]
    head, *table = filter(None, lines)
    assert head[: len(heads) + 1] == ["loss", *heads]
    printed = {words[0]: words[2:] for words in table}
    # What is bound to its own classes has no answer for others, and no mean with them.
    for label, names in (("coop", heads), ("bound", heads[:-2])):
        means = {name: sum(found[label, seed][name] for seed in range(3)) / 3 for name in names}
        if "new" in means:
            means["harmonic-mean"] = harmonic_mean(means["base"], means["new"])
        assert printed[label][: len(heads)] == [f"{means[name]:.3f}" if name in means else "–" for name in heads]
        assert printed[label][-1] == "3"


def test_images_that_are_trained_on_are_never_what_is_tested(folder: Path) -> None:
    domain = {"domain": {"test": str(folder / "domain")}}
    for data in ({"protocol": "base-to-new"}, {"targets": domain}, {"protocol": "base-to-new", "targets": domain}):
        with pytest.raises(InputError, match="field 'data.test': .* images of its own, and there are none"):
            Bench(made(folder, test=None, **data)).job("coop", 0)
    with pytest.raises(InputError, match="field 'data.train': there are no images to train on"):
        Bench(made(folder, train=None)).job("coop", 0)
    assert Bench(made(folder, test=None)).job("coop", 0)[0].test is None, "nothing is asked, nothing is answered"


def test_too_few_classes_are_refused_before_training(folder: Path) -> None:
    for part in ("train", "test"):
        shutil.rmtree(folder / part / "tree")
    with pytest.raises(
        InputError, match="field 'data.protocol': there are 3 classes. base-to-new needs two classes in"
    ):
        Bench(made(folder, protocol="base-to-new")).job("coop", 0)


def test_a_half_without_validation_images_is_trained_and_tested(folder: Path) -> None:
    for name in NAMES[:2]:
        shutil.copytree(folder / "domain" / name, folder / "held" / name)
    job, _ = Bench(made(folder, protocol="base-to-new", validation=str(folder / "held"))).job("coop", 0)
    assert job.validation is not None and len(job.validation) == 2 * 2
    assert job.test is not None and set(evaluate(job.method, job.test)) == {"loss", "base", "new", "harmonic-mean"}


def test_folders_of_datasets_are_read_with_their_columns_and_other_splits(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"photo": datasets.Image(), "kind": datasets.ClassLabel(names=list(NAMES))})
    for part in ("train", "test", "domain"):
        labels = [i for i in range(4) for _ in range(3)]
        paths = [str(folder / part / NAMES[label] / f"{row % 3}.png") for row, label in enumerate(labels)]
        rows = {"photo": [Image.open(path) for path in paths], "kind": labels}
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(folder / f"{part}-saved"))
    columns = {"image": "photo", "label": "kind"}
    parts = {"train": "train", "validation": "domain", "test": "test"}
    data = {split: str(folder / f"{part}-saved") for split, part in parts.items()}
    targets = {"domain": {"test": str(folder / "domain-saved"), **columns}}
    bench = Bench(made(folder, **data | columns | {"targets": targets, "class_names": NAMES[::-1]}))
    task = bench.task(0)
    assert task.spec.class_names == NAMES[::-1]
    assert task.train is not None and task.validation is not None and task.test is not None
    assert (len(task.train), len(task.validation), len(task.test)) == (8, 8, 12)
    first = task.spec.preprocessing(Image.open(folder / "test" / "bird" / "0.png"))
    assert task.test.rows[0]["pixels"].equal(first) and task.test.rows[0]["label"] == 3
    job, _ = bench.job("coop", 0)
    assert job.test is not None and {"accuracy", "accuracy/domain"} <= set(evaluate(job.method, job.test))


@pytest.mark.parametrize("method", ["zero-shot", "linear-probe"])
def test_a_target_may_have_templates_of_its_own(folder: Path, method: str) -> None:
    domain, words = str(folder / "domain"), ("X X X {} three",)
    pets = folder / "pets"
    for name in ("cat", "red car"):
        shutil.copytree(folder / "domain" / "cat", pets / name)
    targets = {"same": {"test": domain}, "told": {"test": domain, "templates": words[0]}}
    targets |= {"pets": {"test": str(pets), "templates": "dtd"}}
    bench = Bench(made(folder, {"name": method}, targets=targets))
    assert [t.spec.templates for t in bench.targets().values()] == [("a photo of a {}.",), words, ("{} texture.",)]
    job, _ = bench.job(method, 0)
    assert job.test is not None
    scores, images = evaluate(job.method, job.test), bench.targets()["same"].train
    assert images is not None
    if method == "linear-probe":  # reads no text
        assert scores["accuracy/told"] == scores["accuracy/same"] and "accuracy/pets" not in scores
        return
    told = job.method.with_classes(NAMES, words)
    assert told.config.templates == words and job.method.config.templates == ("a photo of a {}.",)
    assert scores["accuracy/told"] == evaluate(told, images)["accuracy"] != scores["accuracy/same"]
    assert scores["accuracy/same"] == evaluate(job.method, images)["accuracy"]
    other = job.method.with_classes(("cat", "red car"), ("{} texture.",))
    assert scores["accuracy/pets"] == evaluate(other, bench.targets()["pets"].train)["accuracy"]


def test_templates_of_a_method_stand_above_those_of_a_target(folder: Path) -> None:
    targets = {name: {"test": str(folder / "domain")} for name in ("same", "told")}
    targets["told"]["templates"] = "X X X {} three"
    for label, method in (
        ("zero-shot", {"name": "zero-shot", "templates": "a photo of a {}."}),
        ("vpt", {"name": "vpt"}),
    ):
        checked = made(folder, method, targets=targets)
        if label == "vpt":  # as a label of a comparison
            checked = Recipe.model_validate(
                settings(folder, targets=targets) | {"compare": {"vpt": {"templates": "{}."}}}
            )
        job, _ = Bench(checked).job(label, 0)
        assert job.test is not None
        scores = evaluate(job.method, job.test)
        assert scores["accuracy/told"] == scores["accuracy/same"]


def test_features_in_memory_are_those_of_the_readers_precision(folder: Path) -> None:
    bench = Bench(made(folder, {"name": "zero-shot"}))
    job, _ = bench.job("zero-shot", 0)
    assert job.test is not None

    def read() -> torch.Tensor:
        return torch.stack([row["image_features"] for row in job.test.rows])  # type: ignore[union-attr]

    with torch.autocast("cpu", torch.bfloat16):
        coarse = read()
    pixels = bench.task(0).test.batch(range(16))["pixels"]  # type: ignore[union-attr]
    torch.testing.assert_close(read(), bench.backbone.image(pixels))
    assert not torch.allclose(read(), coarse, rtol=1e-4, atol=1e-4)


def test_the_cache_of_tip_adapter_is_as_large_as_the_data(folder: Path) -> None:
    job, config = Bench(made(folder, {"name": "tip-adapter"})).job("tip-adapter", 0)
    assert job.method.config.cache_size == 8
    job.method.fit(job.train, job.validation, config)


def test_the_linear_probe_of_a_run_with_augmentation_reads_fixed_views(folder: Path) -> None:
    heads = []
    for augment in (False, True):
        job, config = Bench(made(folder, {"name": "linear-probe"}, augment=augment)).job("linear-probe", 0)
        job.method.fit(job.train, job.validation, config)
        heads.append(job.method.trained_state()["head.weight"])
    assert heads[0].equal(heads[1])


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images of each pass of the image tower; where a 0 is put in front, it breaks off at the third pass."""
    found, image = list[int](), DualEncoder.image

    def counted(self: Any, pixels: Any) -> Any:
        found.append(len(pixels))
        if found[0] == 0 and len(found) == 4:
            raise Killed
        return image(self, pixels)

    monkeypatch.setattr(DualEncoder, "image", counted)
    return found


def compared(folder: Path, output: str, features: bool = True) -> tuple[list[Any], list[bytes]]:
    """Metrics and prompts of a comparison whose output folder keeps features, or does not."""
    bench, labels, seeds = Bench(made(folder)), ("zero-shot", "coop"), (0, 1)
    if features:
        outcomes = runs.compare_recipe(bench, labels, seeds, folder / output, lambda line: None)
    else:
        outcomes = runs.compare(bench.job, labels, seeds, folder / output, announce=lambda line: None)
    prompts = [outcome.artifact / artifacts.TENSORS for outcome in outcomes if outcome.artifact is not None]
    return [outcome.result.metrics for outcome in outcomes], [prompt.read_bytes() for prompt in prompts]


def test_a_comparison_that_goes_on_reads_features_and_comes_to_the_same_bits(folder: Path, passes: list[int]) -> None:
    plain = compared(folder, "plain", features=False)
    computed = sum(passes)
    assert not (folder / "plain" / "features").exists()
    passes[:] = [0]
    with pytest.raises(Killed):
        compared(folder, "kept")
    passes.clear()
    assert compared(folder, "kept") == plain
    assert 0 < sum(passes) < computed
    passes.clear()
    shutil.rmtree(folder / "kept" / "cells")
    assert compared(folder, "kept") == plain
    assert passes == []


def test_features_of_another_backbone_are_left_alone(
    folder: Path, passes: list[int], make_encoder: Callable[..., Any]
) -> None:
    compared(folder, "kept")
    shutil.rmtree(folder / "kept" / "cells")  # nothing but features is left, and another run is accepted
    make_encoder(seed=1).model.save_pretrained(folder / "backbone")
    first = len(passes)
    assert compared(folder, "kept") == compared(folder, "plain", features=False)
    assert len(passes) > first
    assert len(list((folder / "kept" / "features").iterdir())) == 2


def test_a_run_of_the_command_line_keeps_its_features(
    folder: Path, passes: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"package": "vl"} | settings(folder)))
    pt = command(monkeypatch, capsys, "train", folder / "recipe.yaml", "-o", folder / "run")
    for _ in range(2):
        code, _, err = pt()
        assert code == 0, err
        assert sum(passes) == 8 + 8 + 16


def test_the_identity_follows_images_and_settings(folder: Path) -> None:
    first, other = Bench(made(folder)).identity, Bench(made(folder, shots=3)).identity
    assert first == json.loads(json.dumps(first)) == Bench(made(folder)).identity
    assert {key for key in first if first[key] != other[key]} == {"data"}


def test_the_identity_follows_images_that_another_seed_draws(folder: Path) -> None:
    bench = Bench(made(folder))
    first, drawn = bench.identity, [bench.task(seed).train for seed in range(3)]
    ids = [set(split.ids or ()) for split in drawn if split is not None]
    (other, *_) = sorted((ids[1] | ids[2]) - ids[0])
    shutil.copy(folder / "test" / "tree" / "1.png", folder / "train" / other)
    again = Bench(made(folder)).identity
    assert {key for key in first if first[key] != again[key]} == {"images"}
    tasks = {"tasks": {"one": {"train": str(folder / "train")}, "two": {"train": str(folder / "domain")}}}
    first = Bench(made(folder, **tasks)).identity
    Image.new("RGB", (12, 12)).save(folder / "train" / "bird" / "new.png")
    again = Bench(made(folder, **tasks)).identity
    assert {key for key in first if first[key] != again[key]} == {"images", "tasks"}


def test_the_identity_follows_labels_pixels_and_weights_under_the_same_names(
    folder: Path, make_encoder: Callable[..., Any]
) -> None:
    rows = [(f"train/{name}/{i}.png", name) for name in NAMES for i in range(2)]
    table, domain = folder / "rows.csv", {"domain": {"test": str(folder / "domain")}}

    def known(labels: dict[int, str]) -> dict[str, Any]:
        lines = [f"{path},{labels.get(i, name)}" for i, (path, name) in enumerate(rows)]
        table.write_text("\n".join(["path,label", *lines]))
        return Bench(made(folder, train=str(table), test=None, shots=None)).identity

    before, corrected = known({}), known({0: "cat", 2: "bird"})
    assert {key for key in before if before[key] != corrected[key]} == {"images"}
    for target, part in (({}, "train"), (domain, "domain")):
        before = Bench(made(folder, shots=None, targets=target)).identity
        shutil.copy(folder / "test" / "tree" / "1.png", folder / part / "cat" / "0.png")
        after = Bench(made(folder, shots=None, targets=target)).identity
        assert {key for key in before if before[key] != after[key]} == {"targets" if target else "images"}
    make_encoder(seed=1).model.save_pretrained(folder / "backbone")
    other = Bench(made(folder, shots=None, targets=domain)).identity
    assert {key for key in after if after[key] != other[key]} == {"weights"}
    config = folder / "backbone" / "config.json"
    config.write_text(config.read_text().replace("quick_gelu", "gelu"))  # the same weights, another function
    assert Bench(made(folder, shots=None, targets=domain)).identity["weights"] != other["weights"]


def test_the_identity_follows_the_images_of_datasets(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES))})

    def known(part: str) -> str:
        cells = [{"bytes": (folder / part / name / "0.png").read_bytes(), "path": None} for name in NAMES]
        rows = {"image": cells, "label": [0, 1, 2, 3]}
        shutil.rmtree(folder / "hf", ignore_errors=True)
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(folder / "hf"))
        return str(Bench(made(folder, train=str(folder / "hf"), test=None)).identity["images"])

    first = known("train")
    assert Bench(made(folder, train=str(folder / "hf"), test=None)).identity["images"] == first
    shutil.copytree(folder / "hf", folder / "moved")
    assert Bench(made(folder, train=str(folder / "moved"), test=None)).identity["images"] == first
    assert known("domain") != first

    def state() -> Any:
        return workbench._state(workbench.list_dataset(folder / "moved")[0]["train"].sources[0])

    before, (file,) = state(), (folder / "moved").glob("*.arrow")
    content = bytearray(file.read_bytes())
    content[content.index(b"IDAT") + 8] ^= 1
    file.write_bytes(content)  # other bytes under the same description
    assert state() != before


def test_images_in_memory_are_known_by_their_bytes() -> None:
    values = np.zeros((2, 2, 3), np.uint8)
    assert workbench._state(values) == workbench._state(values.copy()) != workbench._state(values + 1)
    assert workbench._state(b"a") != workbench._state(b"b")


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"train": "gone"}, "no such file or folder"),
        ({"templates": "a photo"}, "needs one {}"),
        ({"split_file": ".", "images": "."}, "not both"),
        ({"templates": []}, "give at least one template"),
        ({"targets": {"other": {"icons": {}, "templates": []}}}, "give at least one template"),
        ({"crop_scale": [1.0, 0.1]}, "0 < least <= most <= 1"),
        ({"crop_scale": [0.0, 1.0]}, "0 < least <= most <= 1"),
        ({"crop_scale": [0.5, 2.0]}, "0 < least <= most <= 1"),
        ({"crop_scale": [True, 1.0]}, "true and false are no value"),
        ({"shots": 0}, "greater than or equal to 1"),
        ({"protocol": "zero"}, "'few-shot' or 'base-to-new'"),
        ({"train": None, "test": None, "icons": {}, "class_names": NAMES}, "have class names of their own"),
        ({"targets": {"other": {"icons": {}, "class_names": NAMES}}}, "have class names of their own"),
        ({"targets": {"other": {"icons": {}, "templates": "a photo"}}}, "needs one {}"),
        ({"targets": {"new": {"icons": {}}}, "protocol": "base-to-new"}, "'new' is what a result of the protocols is"),
        (
            {"targets": {"others": {"icons": {}}, "more": {"icons": {}}}},
            "'others' is what a result of the protocols is",
        ),
    ],
)
def test_bad_settings_are_refused(folder: Path, data: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        made(folder, **data)


def test_paths_of_a_recipe_may_begin_at_home_and_class_names_be_a_mapping(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    for label, name in enumerate(NAMES):
        (folder / "train" / name).rename(folder / "train" / str(label))
    (folder / "names.json").write_text(json.dumps(dict(enumerate(NAMES))))
    for names in ("~/names.json", dict(enumerate(NAMES))):
        bench = Bench(made(folder, train="~/train", test=None, class_names=names))
        assert bench.recipe.data.train == str(folder / "train")
        assert bench.task(0).spec.class_names == NAMES and bench.task(0).spec.labels == ("0", "1", "2", "3")
        assert bench.identity == json.loads(json.dumps(bench.identity))
    assert workbench.Reading(images="~/train").images == str(folder / "train")
    with pytest.raises(ValueError, match="no such file or folder"):
        made(folder, train="~/gone")


def test_bad_inputs_of_a_session_are_named(folder: Path) -> None:
    job, _ = Bench(made(folder)).job("coop", 0)
    path = job.method.save_pretrained(folder / "saved", task=job.task)
    session = open_artifact(artifacts.load_artifact(path), str(folder / "backbone"))
    (folder / "bad.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"1 of 1 images cannot be read: .*bad\.png \(cannot identify"):
        session.predict([str(folder / "bad.png")])
    (folder / "rows.csv").write_text("text,label\ntest/cat/0.png,horse\n")
    with pytest.raises(InputError, match=r"rows\.csv, row 1, field 'label': 'horse' is no class of the prompt"):
        session.evaluate(folder / "rows.csv")
    (folder / "rows.csv").write_text("text,label\ntest/cat/0.png,cat\nbad.png,cat\n")
    with pytest.raises(InputError, match="1 of 2 images cannot be read: bad.png .*a recipe may say `unreadable: skip`"):
        session.evaluate(folder / "rows.csv")
    (folder / "rows.csv").write_text("file,label\ntest/cat/0.png,cat\n")
    (folder / "other" / "horse").mkdir(parents=True)
    shutil.copy(folder / "test" / "cat" / "0.png", folder / "other" / "horse" / "0.png")
    with pytest.raises(InputError, match=r"other/horse/0\.png: 'horse' is no class of the prompt"):
        session.evaluate(folder / "other")
    with pytest.raises(InputError, match="field 'text': no such column. .*'file', 'label'. .*: --text"):
        session.evaluate(folder / "rows.csv")
    with pytest.raises(InputError, match="no such file"):
        session.inputs(folder / "gone.csv")
    with pytest.raises(InputError, match="coop is not written as 'peft'. Use the artifact itself"):
        cli.export(str(path), folder / "adapter")


def test_a_session_reads_what_recipes_read_and_answers_by_its_paths(folder: Path) -> None:
    names = folder / "names.txt"
    names.write_text("bird dog\ncat red car\ndog bird\ntree big house\n")  # what one label is, another is called
    job, _ = Bench(made(folder, class_names=str(names))).job("zero-shot", 0)
    path = job.method.save_pretrained(folder / "saved", task=job.task)
    session = open_artifact(artifacts.load_artifact(path), str(folder / "backbone"))
    assert session.spec.labels == NAMES and session.spec.class_names[1] == "red car"
    assert job.test is not None
    expected = evaluate(job.method, job.test)["accuracy"]
    assert session.evaluate(folder / "test")["accuracy"] == pytest.approx(expected)
    called = dict(zip(NAMES, session.spec.class_names, strict=True))
    for column, label in (("path", lambda name: name), ("text", called.get)):
        rows = [f"test/{name}/{i}.png,{label(name)}" for name in NAMES for i in range(4)]
        (folder / "rows.csv").write_text("\n".join([f"{column},label", *rows]))
        assert session.evaluate(folder / "rows.csv")["accuracy"] == pytest.approx(expected)
        answers = session.predict(session.inputs(folder / "rows.csv"))
        assert [answer["image"] for answer in answers] == [row.partition(",")[0] for row in rows]
    assert session.predict(session.inputs(folder / "test"))[0]["image"] == "bird/0.png"
    (folder / "rows.csv").write_text("path,label\ntest/bird/0.png,bird\ntest/cat/0.png,bus\n")
    with pytest.raises(InputError, match="row 2, field 'label': 'bus' is no class of the prompt. Classes: bird, cat"):
        session.evaluate(folder / "rows.csv")


def test_folders_of_images_are_predicted_and_one_that_cannot_be_read_costs_no_other_answer(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job, _ = Bench(made(folder)).job("coop", 0)
    path = job.method.save_pretrained(folder / "saved", task=job.task)
    flat = folder / "flat"
    (flat / "more").mkdir(parents=True)
    (flat / ".hidden").mkdir()
    for i, name in enumerate(NAMES):
        shutil.copy(folder / "test" / name / "0.png", flat / ("more" if i > 1 else "") / f"{name}.png")
    shutil.copy(flat / "cat.png", flat / ".hidden" / "cat.png")
    (flat / "notes.txt").write_text("no image")
    monkeypatch.chdir(folder)
    pt = command(monkeypatch, capsys, "predict", path, "--backbone", folder / "backbone")
    names = ["bird.png", "cat.png", "more/dog.png", "more/tree.png"]
    code, out, err = pt("flat", "test/tree/1.png")
    assert code == 0, err
    told = [json.loads(line) for line in out.splitlines()]
    assert [answer["image"] for answer in told] == [*(f"flat/{name}" for name in names), "test/tree/1.png"]
    session = open_artifact(artifacts.load_artifact(path), str(folder / "backbone"))
    assert session.predict(["test/tree/1.png"]) == told[-1:]
    code, out, err = pt("--data", "flat")
    assert code == 0 and [json.loads(line)["image"] for line in out.splitlines()] == names, err
    (flat / "cat.png").unlink()
    (flat / "cat.png").symlink_to("nowhere")
    (flat / "bad.png").write_bytes(b"damaged")
    code, out, err = pt("flat", "gone.png")
    assert code == 2 and [json.loads(line) for line in out.splitlines()] == [told[0], *told[2:4]]
    last = err.splitlines()[-1]
    assert last.startswith("pt: 3 of 6 images cannot be read: flat/bad.png (cannot identify image file")
    assert "flat/cat.png ([Errno 2]" in last and "gone.png ([Errno 2]" in last
    (folder / "none").mkdir()
    code, out, err = pt("none")
    assert (code, out) == (2, "") and "pt: none: has no images. Images end in ." in err


def test_a_prompt_is_tested_on_whatever_it_could_be_trained_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets = pytest.importorskip("datasets")
    bench = Bench(made(folder))
    job, _ = bench.job("coop", 0)
    path = job.method.save_pretrained(folder / "saved", task=job.task)
    assert job.test is not None
    expected = f"{evaluate(job.method, job.test)['accuracy']:.4f}"
    pictures = [(f"{name}/{i}.png", label, name) for label, name in enumerate(NAMES) for i in range(4)]
    (folder / "lists").mkdir()
    rows = [f"{image},{name}" for image, _, name in pictures]
    (folder / "lists" / "rows.csv").write_text("\n".join(["path,label", *rows]))
    parts: dict[str, Any] = {"train": pictures[:4], "val": pictures[:5], "test": pictures}
    (folder / "lists" / "split.json").write_text(json.dumps(parts))
    features = datasets.Features({"photo": datasets.Image(), "kind": datasets.ClassLabel(names=list(NAMES))})
    images = [{"path": None, "bytes": (folder / "test" / image).read_bytes()} for image, _, _ in pictures]
    part = datasets.Dataset.from_dict({"photo": images, "kind": [y for _, y, _ in pictures]}, features=features)
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(str(folder / "both"))
    datasets.DatasetDict({"train": part, "validation": part}).save_to_disk(str(folder / "other"))
    part.save_to_disk(str(folder / "alone"))
    monkeypatch.chdir(folder)

    def pt(verb: str, *arguments: object) -> tuple[int, str, str]:
        return command(monkeypatch, capsys, verb, path, "--backbone", folder / "backbone")(*arguments)

    columns = ("--set", "image=photo", "--label", "kind")
    for given in (
        ("lists/rows.csv", "--set", "images=test"),
        ("lists/split.json", "--set", "images=test"),
        ("both", *columns),
        ("other", "--set", "split=validation", *columns),
        ("alone", *columns),
    ):
        code, out, err = pt("eval", "--data", *given)
        assert code == 0 and f"accuracy {expected}" in " ".join(out.replace("│", " ").split()), err
        code, out, err = pt("predict", "--data", *(part for part in given if part not in ("--label", "kind")))
        assert code == 0 and len(out.splitlines()) == 16, err
    code, out, err = pt("predict", "--data", "lists/split.json", "--set", "images=test", "--set", "split=validation")
    assert code == 0 and len(out.splitlines()) == 5
    for given, problem in (
        (("other", *columns), "field 'split': has several splits, and none is test. There are: train, validation."),
        (("alone", "--set", "split=train", *columns), "has no split 'train'. There are: test"),
        (("alone", "--set", "pictures=x"), "field 'pictures': unknown key. Allowed there: image, images, split"),
        (("lists/rows.csv", "--set", "images=gone"), "field 'images': no such file or folder"),
    ):
        code, out, err = pt("eval", "--data", *given)
        assert (code, out) == (2, "") and problem in err, err
    code, out, err = pt("predict", "test/cat/0.png", "--set", "images=test")
    assert code == 2 and "--set says how data are read. Give --data" in err
    session = open_artifact(artifacts.load_artifact(path), str(folder / "backbone"))
    monkeypatch.delattr(type(session), "reading")
    assert "read without settings" in pt("eval", "--data", "lists/rows.csv", "--set", "images=test")[2]


def test_answers_come_a_batch_at_a_time(folder: Path) -> None:
    job, _ = Bench(made(folder)).job("coop", 0)
    path = job.method.save_pretrained(folder / "saved", task=job.task)
    session = open_artifact(artifacts.load_artifact(path), str(folder / "backbone"))
    passes = list[int]()
    session.method.register_forward_pre_hook(lambda _, given: passes.append(len(given[0]["pixels"])))
    answers = session.stream([str(folder / "test")], batch_size=6)
    next(answers)
    assert passes == [6]
    assert len(list(answers)) == 15 and passes == [6, 6, 4]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_prompt_opens_in_the_dtype_that_it_was_trained_in(folder: Path, dtype: str) -> None:
    checked = made(folder)
    bench = Bench(checked.model_copy(update={"backbone": checked.backbone.model_copy(update={"dtype": dtype})}))
    path = bench.job("coop", 0)[0].method.save_pretrained(folder / "saved", task=bench.task(0).spec.model_dump())
    session = open_artifact(artifacts.load_artifact(path), str(folder / "backbone"))
    assert session.method.backbone.logit_scale.dtype == workbench.DTYPES[dtype]
    image = str(folder / "test" / "cat" / "0.png")
    assert set(session.predict([image])[0]["scores"]) == set(NAMES)


def test_a_prompt_whose_labels_do_not_fit_its_classes_is_refused(folder: Path) -> None:
    bench = Bench(made(folder))
    task = bench.task(0).spec.model_dump() | {"class_names": NAMES[:3]}
    path = bench.job("coop", 0)[0].method.save_pretrained(folder / "saved", task=task)
    with pytest.raises(
        InputError, match=r"config\.json, field 'task': the task has 3 labels, the prompt answers for 4"
    ):
        open_artifact(artifacts.load_artifact(path), "nowhere")


@pytest.mark.parametrize("name", ["coop", "mvlpt"])
def test_a_prompt_whose_task_names_its_classes_otherwise_is_refused(folder: Path, name: str) -> None:
    bench = Bench(made(folder, {"name": name, "prompt_length": 2}))
    task, method = bench.task(0).spec.model_dump(), bench.job(name, 0)[0].method
    path = method.save_pretrained(folder / "saved", task=task | {"class_names": ("cat", "bird", "dog", "tree")})
    problem = r"config\.json, field 'task\.class_names': class 1 of the task is 'cat', that of the prompt 'bird'"
    with pytest.raises(InputError, match=problem):
        open_artifact(artifacts.load_artifact(path), str(folder / "backbone"))
    path = method.save_pretrained(folder / "saved", task=task)
    open_artifact(artifacts.load_artifact(path), str(folder / "backbone"))


@pytest.mark.parametrize(
    ("method", "key"),
    [("coop", "class_names"), ("mvlpt", "class_names"), ("mvlpt", "tasks"), ("tip-adapter", "cache_size")],
)
def test_what_the_data_say_is_no_setting_of_a_method(folder: Path, method: str, key: str) -> None:
    value = {"class_names": NAMES[::-1], "tasks": {"all": NAMES[::-1]}, "cache_size": 8}[key]
    problem = rf"\.{key}': the data say (it|them): data\..*\. Leave it out here"
    checked = settings(folder, {"name": method, key: value}) | {"package": "vl"}
    (folder / "own.yaml").write_text(json.dumps(checked))
    with pytest.raises(InputError, match=f"'method{problem}"):
        recipe.load(str(folder / "own.yaml"))
    checked = settings(folder) | {"package": "vl", "compare": {"other": {"method": method, key: value}}}
    (folder / "own.yaml").write_text(json.dumps(checked))
    with pytest.raises(InputError, match=rf"'compare\.other{problem}"):
        recipe.load(str(folder / "own.yaml"))
    (folder / "own.yaml").write_text(json.dumps(settings(folder, {"name": method, "lrr": 1}) | {"package": "vl"}))
    with pytest.raises(InputError, match="unknown key") as caught:
        recipe.load(str(folder / "own.yaml"))
    assert key not in str(caught.value)


@pytest.mark.parametrize("name", ["coop", "cocoop"])
def test_no_words_to_start_from_are_refused(folder: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"field 'method\.init': String should have at least 1 character \(got ''\)"):
        made(folder, {"name": name, "init": ""}).config()


@pytest.mark.parametrize(
    ("method", "read"),
    [
        ({"name": "zero-shot"}, True),
        ({"name": "vpt"}, True),
        ({"name": "tip-adapter"}, True),
        ({"name": "r-amt"}, True),
        ({"name": "mvlpt", "prompt": "visual"}, True),
        ({"name": "mvlpt", "prompt": "text"}, False),
        ({"name": "mvlpt"}, False),
        ({"name": "coop"}, False),
        ({"name": "cocoop"}, False),
        ({"name": "ivlp"}, False),
        ({"name": "maple"}, False),
        ({"name": "restore"}, False),
        ({"name": "upt"}, False),
        ({"name": "linear-probe"}, False),
    ],
)
def test_templates_are_a_setting_of_methods_that_read_them(folder: Path, method: dict[str, Any], read: bool) -> None:
    given = method | {"templates": "a big {}."}
    checked = made(folder, given)
    others = checked.model_copy(update={"compare": {"other": recipe.Variant(method=given.pop("name"), **given)}})
    if read:
        assert checked.config().templates == others.with_method("other").config().templates == ("a big {}.",)
        return
    problem = rf"\.templates': {method['name']} reads no templates, so they have no effect. Leave them out"
    with pytest.raises(InputError, match=f"'method{problem}"):
        checked.config()
    with pytest.raises(InputError, match=rf"'compare\.other{problem}"):
        others.with_method("other")
    assert made(folder, method, templates="a big {}.").config()  # those of the data are for all methods


def test_a_prompt_of_the_shipped_model_opens_by_itself(folder: Path) -> None:
    backbone = load_backbone("zoo:mini-clip")
    method = registry.find_method("vl", "coop")(backbone, CoOpConfig(class_names=NAMES))
    path = method.save_pretrained(folder / "saved")
    artifact = artifacts.load_artifact(path)
    assert artifact.config.backbone.name == "zoo:mini-clip"
    assert open_artifact(artifact).predict([str(folder / "test" / "cat" / "0.png")])[0]["label"] in NAMES
    path = method.save_pretrained(folder / "saved", backbone_name="zoo:gone")
    with pytest.raises(InputError, match=r"saved: .*no model 'gone' .* Name its backbone: --backbone"):
        open_artifact(artifacts.load_artifact(path))


def test_a_run_records_no_name_that_leads_to_other_weights(folder: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 12, "layers": 1, "width": 16, "head_width": 8, "patch_size": 4}
    text = {"context_length": 20, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1}
    config = {"embed_dim": 4, "vision_cfg": vision, "text_cfg": text}
    (folder / "tiny-of-a-recipe.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    made = load_backbone("open-clip:tiny-of-a-recipe")
    torch.save(made.model.state_dict(), folder / "weights.pt")
    for name in ("tiny-of-a-recipe", f"tiny-of-a-recipe/{folder / 'weights.pt'}"):
        given = settings(folder) | {"backbone": {"name": f"open-clip:{name}"}}
        job, _ = Bench(Recipe.model_validate(given)).job("coop", 0)
        path = job.method.save_pretrained(folder / "saved", backbone_name=job.backbone_name)
        assert artifacts.load_artifact(path).config.backbone.name is None


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
    backbone = load_backbone("zoo:mini-clip")
    for words, length in ({}, 16), ({"method.init": "a photo of a"}, 4):  # the latter: base to new, as its comment says
        _, checked = recipe.load("vl/clip-b16", images | words)
        method = registry.find_method("vl", "coop")(backbone, checked.config(class_names=NAMES))
        assert list(method.context.shape) == [length, backbone.text_width]
    assert checked.with_method("r-amt").config().gradient_dropout == 0.3
    assert checked.with_method("tip-adapter-f").training.weight_decay == 0.01
    with pytest.raises(InputError, match="vl/clip-b16, field 'data': give train, test, split_file or icons"):
        recipe.load("vl/clip-b16")


def test_the_recipe_of_the_shipped_model_builds_all_its_runs_on_its_own_data() -> None:
    _, checked = recipe.load("vl/mini-clip")
    bench = Bench(checked)  # type: ignore[arg-type]
    assert {*demo.UNSEEN} <= {*demo.SHOWN} <= {*checked.labels()}
    for label in checked.labels():
        job, config = bench.job(label, 1)
        assert (len(job.train), len(job.validation or ()), len(job.test or ())) == (63 * 4, 63, 317)
        assert config.seed == 1 and len(job.method.config.class_names) == 63
        if label in ("coop", "maple", "r-amt"):  # of text, of both towers, and with a loop of its own
            assert (
                job.method.fit(job.train, None, config.model_copy(update={"max_steps": 1, "device": "cpu"})).steps == 1
            )
        job.method.remove()
    assert len(bench.task_names) == 11
    for name in bench.task_names:
        job, _ = bench.transfer_job("coop", 1, name)
        classes = len(job.method.config.class_names)
        assert (len(job.train), len(job.test or ())) == (4 * classes, 20 * classes)


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


def test_the_demo_runs_on_a_folder_of_ones_own(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(demo, "SHOWN", ("zero-shot", "tip-adapter", "coop"))
    monkeypatch.setattr(demo, "UNSEEN", ("zero-shot", "coop"))
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


def test_the_demo_tries_no_more_shots_than_there_are_images_and_halves_no_three_classes(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    for part in ("train", "test"):
        shutil.rmtree(folder / part / "tree")
    (folder / "train" / "cat" / "5.png").unlink()
    monkeypatch.setattr(demo, "SHOWN", ("zero-shot", "coop"))
    monkeypatch.setattr(demo, "LADDER", (2, 8, 16))
    monkeypatch.setattr(demo.runs, "predict_afresh", lambda *_: "")
    demo.run(folder / "demo", 1, 16, folder)
    told = " ".join(capsys.readouterr().out.split())
    assert "No class has more than 6 training images: 6 shots, not 16." in told
    assert "There are 3 classes: base-to-new needs two in each half, and is left out." in told
    assert sorted(path.name for path in (folder / "demo").iterdir() if path.is_dir()) == ["2-shots", "6-shots"]
    assert "Base-to-new" not in (folder / "demo" / "report.html").read_text("utf-8")
