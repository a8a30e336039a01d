"""`pt transfer` between image folders with classes of their own, on a tiny random CLIP."""

from __future__ import annotations

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
from safetensors.torch import load_file

from pt_core import InputError, runs
from pt_core.evaluation import evaluate
from pt_core.testing import Command, command
from pt_vl.backbones import DualEncoder
from pt_vl.methods.coop import CoOp
from pt_vl.methods.upt import UPT
from pt_vl.methods.vpt import VPT
from pt_vl.workbench import Bench, Recipe

TASKS = {"animals": ("bird", "cat", "dog"), "things": ("big_house", "red car")}


@pytest.fixture
def folder(tmp_path: Path, make_encoder: Callable[..., Any]) -> Path:
    """A backbone, and the train and test images (4 and 3 of a class) of two tasks."""
    made = make_encoder()
    made.model.save_pretrained(tmp_path / "backbone")
    made.tokeniser.save_pretrained(tmp_path / "backbone")
    for task, names in TASKS.items():
        for part, count in (("train", 4), ("test", 3)):
            for label, name in enumerate(names):
                for i in range(count):
                    draw = np.random.default_rng((label, i, len(part), len(task)))
                    values = draw.integers(0, 120, (12, 12, 3)) + np.eye(3, dtype=int)[label] * 120
                    path = tmp_path / task / part / name / f"{i}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(values.astype(np.uint8)).save(path)
    return tmp_path


def settings(folder: Path, method: dict[str, Any] | None = None, **data: Any) -> dict[str, Any]:
    tasks = {name: {part: str(folder / name / part) for part in ("train", "test")} for name in TASKS}
    return {
        "method": method or {"name": "coop", "prompt_length": 2, "lr": 0.1},
        "backbone": {"name": str(folder / "backbone")},
        "data": {"tasks": tasks, "shots": 2} | data,
        "training": {"max_steps": 3, "batch_size": 3, "progress": False, "device": "cpu"},
    }


def bench(folder: Path, method: dict[str, Any] | None = None, **data: Any) -> Bench:
    return Bench(Recipe.model_validate(settings(folder, method, **data)))


@pytest.fixture
def pt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path) -> Command:
    """`pt transfer RECIPE ARGUMENTS` -> exit code, stdout, stderr."""
    recipe = folder / "tasks.yaml"
    recipe.write_text(yaml.safe_dump({"package": "vl", "about": "Two small tasks."} | settings(folder)))
    return command(monkeypatch, capsys, "transfer", recipe)


# --- the command ------------------------------------------------------------------------------------------------------
def test_the_command_writes_the_matrix_and_goes_on_where_it_was(pt: Command, folder: Path) -> None:
    code, out, _ = pt("--seeds", 2, "-o", folder / "study")
    assert code == 0 and out.startswith("to run: 4 from scratch, 4 transfers; the first ")
    assert "Best source of each target: animals from things, things from animals." in out
    content = json.loads((folder / "study" / "transfer.json").read_text())
    assert (content["method"], content["metric"], content["tasks"]) == ("coop", "accuracy", ["animals", "things"])
    cells = folder / "study" / "cells"
    for seed in (0, 1):
        base, moved = (
            json.loads((cells / f"seed-{seed}" / "to-things" / name).read_text())["metrics"]["accuracy"]
            for name in ("scratch.json", "from-animals.json")
        )
        assert content["gains"]["animals"]["things"][seed] == pytest.approx(moved - base)
    assert (folder / "study" / "gains.png").is_file() and "Two small tasks." in (
        folder / "study" / "report.html"
    ).read_text("utf-8")
    before = (folder / "study" / "transfer.json").read_bytes()
    (cells / "seed-1" / "to-animals" / "from-things.json").unlink()
    code, out, _ = pt("--seeds", 2, "-o", folder / "study")
    assert out.startswith("to run: 0 from scratch, 1 transfers (7 runs kept from before); about ")
    assert (folder / "study" / "transfer.json").read_bytes() == before


def test_two_processes_give_the_same_bits_and_leave_their_features_to_others(
    pt: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pt_core.transfer._cores", lambda: 2)
    passes, image, parallel = list[int](), DualEncoder.image, folder / "parallel"
    monkeypatch.setattr(DualEncoder, "image", lambda self, p: (passes.append(len(p)), image(self, p))[1])
    assert pt("--seeds", 1, "-o", folder / "serial")[0] == 0
    computed, content = sum(passes), (folder / "serial" / "transfer.json").read_bytes()
    assert pt("--seeds", 1, "--jobs", 2, "-o", parallel)[0] == 0
    assert (parallel / "transfer.json").read_bytes() == content
    for left, again in ((parallel / "cells", 0), (parallel / "features", computed)):
        passes.clear()
        shutil.rmtree(left)
        shutil.rmtree(parallel / "cells", ignore_errors=True)
        assert pt("--seeds", 1, "-o", parallel)[0] == 0
        assert sum(passes) == again and (parallel / "transfer.json").read_bytes() == content


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (
            ["--set", "method.class_specific=true"],
            "field 'method': what coop trains belongs to the classes",
        ),
        (["--set", "method={name: tip-adapter-f}"], "what tip-adapter-f trains belongs to the classes"),
        (["--set", "method={name: zero-shot}"], "what zero-shot trains is nothing: no other task can start from it"),
        (["--tasks", "animals,plants"], "task 'plants' is unknown. There are: animals, things"),
        (["--set", "data.tasks.things.test=null"], "there are no images to test on"),
        (["--set", "data.tasks.things.train=null"], "field 'data.tasks.things.train': there are no images to train on"),
        (["--set", "data.tasks.things.train=gone"], "field 'data.tasks.things.train': no such file"),
    ],
)
def test_what_cannot_be_transferred_is_refused_before_training(
    arguments: list[str], problem: str, pt: Command, folder: Path
) -> None:
    code, _, err = pt(*arguments, "-o", folder / "study")
    assert (code, problem in err) == (2, True), err
    assert not (folder / "study").exists()


def test_a_package_without_tasks_says_so(monkeypatch: pytest.MonkeyPatch, pt: Command, folder: Path) -> None:
    monkeypatch.delattr(Bench, "transfer_job")
    code, _, err = pt("-o", folder / "study")
    assert code == 2 and "the package 'vl' has no tasks to transfer between" in err


# --- the bench --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("prompt", "kind"), [("text", CoOp), ("visual", VPT), ("unified", UPT)])
def test_mvlpt_takes_its_single_task_forms(prompt: str, kind: type, pt: Command, folder: Path) -> None:
    method = {"name": "mvlpt", "prompt": prompt, "prompt_length": 2, "hidden": 8, "lr": 0.1}
    code, _, err = pt(
        *[part for key, value in method.items() for part in ("--set", f"method.{key}={value}")],
        *("--seeds", 1, "-o", folder / "study"),
    )
    assert code == 0, err
    there = bench(folder, method)
    source = folder / "study" / "cells" / "seed-0" / "to-animals" / "scratch" / "state.safetensors"
    job, _ = there.transfer_job("mvlpt", 0, "things", source)
    assert type(job.method) is kind and job.method.config.class_names == TASKS["things"]
    for name, tensor in job.method.trained_state().items():
        assert torch.equal(tensor, load_file(source)[name])
    assert job.test is not None
    cell = json.loads((folder / "study" / "cells" / "seed-0" / "to-things" / "from-animals.json").read_text())
    assert evaluate(job.method, job.test) == cell["before"]
    fresh, _ = there.transfer_job("mvlpt", 0, "things")
    assert not torch.equal(fresh.method.trained_state()["visual" if prompt == "visual" else "context"], tensor)


def test_features_are_computed_once_for_all_runs_on_a_task(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = bench(folder)
    passes: list[int] = []
    image = there.backbone.image

    def counted(pixels: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        passes.append(len(pixels))
        return image(pixels, *rest, **options)

    monkeypatch.setattr(there.backbone, "image", counted)
    there.transfer_job("coop", 0, "things")
    assert passes == []  # not before they are wanted
    for number in range(2):
        job, config = there.transfer_job("coop", 0, "things")
        outcome = runs.train(job, config, folder / f"run-{number}")
    assert sum(passes) == 4 + 4 + 6  # 2 shots and as many for validation, 3 test images, of two classes
    monkeypatch.setattr(there.backbone, "image", image)
    plain = there.task(0, "things").test
    assert plain is not None
    assert evaluate(job.method, plain)["accuracy"] == outcome.result.metrics["accuracy"]


def test_augmented_images_pass_the_tower_each_time(folder: Path) -> None:
    job, config = bench(folder, augment=True).transfer_job("coop", 0, "things")
    assert "pixels" in job.train.rows[0] and job.validation is not None
    assert "image_features" in job.validation.rows[0]
    job.method.fit(job.train, job.validation, config)


def test_the_seed_draws_shots_and_start_values_of_both_runs(folder: Path) -> None:
    there = bench(folder)
    (first, config), (second, _) = (there.transfer_job("coop", seed, "animals") for seed in (0, 1))
    assert config.seed == 0 and first.train.ids != second.train.ids
    assert not torch.equal(first.method.trained_state()["context"], second.method.trained_state()["context"])


def test_tasks_stand_beside_other_images_or_alone(folder: Path) -> None:
    alone, both = bench(folder), bench(folder, train=str(folder / "animals" / "train"))
    with pytest.raises(
        InputError, match="field 'data.train': there are no images to train on beside those of the tasks"
    ):
        alone.job("coop", 0)
    assert len(both.job("coop", 0)[0].train) == 6
    assert alone.identity["tasks"] == both.identity["tasks"] == bench(folder, shots=3).identity["tasks"]
    assert alone.identity["data"] != bench(folder, shots=3).identity["data"]
    assert alone.task_names == list(TASKS)
    with pytest.raises(ValueError, match="give train, test"):
        bench(folder, tasks={})


def test_a_task_may_have_templates_of_its_own(folder: Path) -> None:
    settings = {part: str(folder / "things" / part) for part in ("train", "test")}
    tasks = {"plain": settings, "told": settings | {"templates": "a {} texture."}}
    there = bench(folder, {"name": "vpt"}, tasks=tasks, templates="a {}.")
    for task, templates in (("plain", ("a {}.",)), ("told", ("a {} texture.",))):
        job, _ = there.transfer_job("vpt", 0, task)
        assert job.method.config.templates == templates and job.task["templates"] == list(templates)


def test_what_is_wrong_with_a_task_names_it(folder: Path) -> None:
    (folder / "things" / "train" / "big_house" / "0.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="task 'things': .*cannot be read"):
        bench(folder, shots=None).task(0, "things")
