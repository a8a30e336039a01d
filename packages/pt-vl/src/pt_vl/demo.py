"""`pt demo vl`: the mini-clip, icons of sets that it has never seen, a few shots of each class, minutes on a laptop.

Zero-shot, linear probe, Tip-Adapter, CoOp, VPT, MaPLe and RESTORE at several shots and seeds; then the same prompts trained on
half of the classes and asked about the other half (base-to-new). A trained prompt is opened in a fresh process and used, and a
picture shows what test images were taken for before and after.
"""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from rich.console import Console
from torch import Tensor

from pt_core import artifacts, recipe, report, runs
from pt_core.data import Split
from pt_core.errors import InputError
from pt_core.report import Result
from pt_vl.data import list_folder
from pt_vl.images import ImageRows, read_image
from pt_vl.method import VLMethod
from pt_vl.workbench import Bench, Recipe

RECIPE = "vl/mini-clip"
LADDER = (1, 2, 4, 8, 16)
SHOWN = ("zero-shot", "linear-probe", "tip-adapter", "tip-adapter-f", "coop", "vpt", "maple", "restore")
UNSEEN = ("zero-shot", "coop", "vpt", "maple", "restore")  # what can be asked about classes that it was not trained on
NOTES = (
    "mini-clip (2,952,193 parameters) on drawings of sets that it was not trained on; it shows the machinery, and says "
    "nothing about CLIP's results. Zero-shot, linear probe and Tip-Adapter train nothing by gradient. Training images are "
    "drawn by each seed; test images are the same for all."
)
HALVED = (
    " Base-to-new: trained on the first half of the classes, asked about each half by itself; harmonic-mean of the two."
)


def run(folder: Path, seeds: int, shots: int, data: Path | None) -> None:
    """Run the demo.

    Args:
        folder: for results; a killed demo goes on from it.
        seeds: runs of each method.
        shots: training images of each class, at most as many as the largest class has; fewer are tried as well.
        data: a folder with `train` and `test`, each with one folder of images for each class, instead of the icons.

    Raises:
        InputError: `data` has no such folders.
    """
    console = Console()
    changes = settings(data)
    classes, most = _counts(changes)
    if shots > most:
        console.print(f"No class has more than {most} training images: {most} shots, not {shots}.")
        shots = most
    ladder = [k for k in LADDER if k < shots] + [shots]
    points: dict[float, list[Result]] = {}
    found: list[runs.Outcome] = []
    for k in ladder:
        console.print(f"[bold]{k} shots[/]")
        bench, found = _compare(changes | {"data.shots": k}, folder / f"{k}-shots", seeds, SHOWN)
        points[k] = [outcome.result for outcome in found]
    halves: dict[str, Any] = {}
    if classes < 4:
        console.print(f"There are {classes} classes: base-to-new needs two in each half, and is left out.")
    else:
        console.print(f"[bold]base-to-new, {shots} shots[/]")
        protocol = changes | {"data.shots": shots, "data.protocol": "base-to-new"}
        _, other = _compare(protocol, folder / "base-to-new", seeds, UNSEEN)
        metrics = ("base", "new", "harmonic-mean")
        halves = {"Base-to-new": report.results_grid([outcome.result for outcome in other], metrics)}
    over_shots = report.over_grid(points, "accuracy", "shots")
    results = points[shots]
    console.print(report.table(results, ("accuracy",), title=f"pt demo vl, {shots} shots"))
    console.print(report.to_rich(over_shots, title="over shots"))
    for title, grid in halves.items():
        console.print(report.to_rich(grid, title=title.lower()))

    report.over(points, folder / "shots.png", "accuracy", "shots (images of each class)", title="pt demo vl", log=True)
    trained = next(outcome for outcome in found if outcome.result.method == "coop")
    assert trained.artifact is not None
    after = cast(VLMethod, artifacts.load(trained.artifact, bench.backbone))
    zero_shot = bench.job("zero-shot", bench.recipe.seed)[0].method
    test = bench.task(bench.recipe.seed).test
    assert test is not None
    picture = folder / "images.png"
    before_and_after(cast(VLMethod, zero_shot), after, test, picture, trained.result.method)
    page = report.write_comparison(
        folder,
        results,
        runs.histories(found),
        title=f"pt demo vl, {shots} shots",
        notes=NOTES + (HALVED if halves else ""),
        metrics=("accuracy",),
        more={
            "Over shots": over_shots,
            "Accuracy over shots": folder / "shots.png",
            **halves,
            "Before and after": picture,
        },
    )
    print(f"tables, curves, images and report: {page}")
    image = folder / "image.png"
    read_image(cast(ImageRows, test.rows).sources[0]).save(image)
    answer = runs.predict_afresh(trained.artifact, str(image))
    print(f"trained prompt: {trained.artifact}\nin a fresh process, {image.name} -> {answer[:200]}")


def settings(data: Path | None) -> dict[str, Any]:
    """Changes to the recipe for the user's own images."""
    if data is None:
        return {}
    for split in ("train", "test"):
        if not (data / split).is_dir():
            remedy = "Put images into train/CLASS and test/CLASS"
            raise InputError(f"has no folder {split!r}", file=data, remedy=remedy)
    return {"data.icons": None, "data.train": str(data / "train"), "data.test": str(data / "test")}


def _counts(changes: dict[str, Any]) -> tuple[int, int]:
    """How many classes there are, and how many training images the largest of them has."""
    images = cast(Recipe, recipe.load(RECIPE, changes)[1]).data
    listed = list_folder(str(images.train)) if images.icons is None else images.icons.listed()[0]["train"]
    counts = Counter(listed.labels)
    return len(counts), max(counts.values())


def _compare(
    changes: dict[str, Any], folder: Path, seeds: int, labels: tuple[str, ...]
) -> tuple[Bench, list[runs.Outcome]]:
    """Some of the recipe's methods, with every seed."""
    _, checked = recipe.load(RECIPE, changes)
    bench = Bench(checked)  # type: ignore[arg-type]
    return bench, runs.compare_recipe(bench, labels, range(checked.seed, checked.seed + seeds), folder)


@torch.no_grad()
def before_and_after(before: VLMethod, after: VLMethod, test: Split, path: Path, label: str, count: int = 24) -> None:
    """A picture of test images with what two methods took them for; the caption is green where the second is right."""
    rows = sorted(random.Random(0).sample(range(len(test)), min(count, len(test))))
    batch = send_to_device(test.batch(rows), after.backbone.device)
    names = after.config.class_names
    taken = []
    for method in (before, after):
        method.eval()
        taken.append([names[i] for i in cast(Tensor, method(batch).logits).argmax(1).tolist()])
    wanted = [names[i] for i in batch["labels"].tolist()]
    captions = [f"{name}\n{old} → {new}" for name, old, new in zip(wanted, *taken, strict=True)]
    right = [new == name for name, new in zip(wanted, taken[1], strict=True)]
    images = [read_image(cast(ImageRows, test.rows).sources[i]) for i in rows]
    report.gallery(images, captions, path, right, title=f"class, and below it: zero-shot → {label}")
