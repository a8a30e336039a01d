"""Prompt learning on the mini-clip side by side: the field's four protocols, and MVLPT's multi-task start.

    uv run python tooling/bench/vl_quality.py [--protocols few-shot ... transfer] [--seeds 3]

Icons that ship with pt-vl, of sets that the mini-clip was not trained on:

- few-shot: 63 concepts that nine vendors and more have drawn, 1, 2 and 4 shots; 11 classes of household things, 1 to 16 shots.
- base-to-new: 4 shots of the first 32 concepts; both halves, each among its own, and their harmonic mean.
- cross-dataset: 16 shots of the 30 classes of four groups; the seven other groups, each with its own classes.
- domains: 4 emoji of each class; the five other styles with the same classes.
- multi-task: one prompt is trained on the union of six groups (4 shots), averaged over seeds, and is the start on each of the
  five others; beside the same prompt from scratch. `mcoop`, `mvpt` and `mupt` are MVLPT's names of these.
- transfer: MVLPT's study of single tasks (`pt transfer`) for each of its prompts, which start from noise, as published: six
  groups, 16 shots, each the start of each other.

Finished cells are kept in the output folder, so a killed run goes on. An estimate is printed first.

`--why` looks for causes where a method does not beat what its paper says it beats, with more cells in the same folder: in
few-shot R-AMT with less gradient dropout and with more epochs; in base-to-new RESTORE without its surgery blocks, and
without its shift term; in multi-task a start from one seed's shared prompt in the place of the average, and how good each
start is before it is trained on a target.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from rich.console import Console

from pt_core import artifacts, cli, recipe, report, runs
from pt_core.evaluation import evaluate
from pt_core.plan import FitConfig
from pt_core.report import Result
from pt_core.runs import Job, Outcome
from pt_vl import MVLPTConfig, average, union
from pt_vl.icons import IconChoice, shipped
from pt_vl.method import VLMethod
from pt_vl.methods.mvlpt import MVLPT
from pt_vl.methods.zero_shot import ZeroShot, ZeroShotConfig
from pt_vl.workbench import Bench

PROTOCOLS = ("few-shot", "base-to-new", "cross-dataset", "domains", "multi-task", "transfer")
BOUND = ("linear-probe", "tip-adapter", "tip-adapter-f", "coop-csc")  # trained for their own classes
METHODS = ("zero-shot", *BOUND, "coop", "cocoop", "vpt", "ivlp", "upt", "maple", "restore", "r-amt")
SOURCES = ("animal", "food", "transport", "household", "face", "place")
PAIRED = ("weather", "nature", "sport", "media", "face", "office")
PROMPTS = {"coop": "text", "vpt": "visual", "upt": "unified"}
WHY: dict[str, dict[str, Any]] = {  # what is taken from RESTORE
    "restore-no-surgery": {"alpha_text": 0, "alpha_image": 0, "growth_text": 0, "growth_image": 0},
    "restore-no-shift-term": {"gamma": 0},
}
WHY_FEW: dict[str, dict[str, Any]] = {  # of R-AMT: how much gradient is dropped, and how long masks are trained
    "r-amt-dropping-less": {"gradient_dropout": 0.3},
    "r-amt-not-dropping": {"gradient_dropout": 0},
    "r-amt-30-epochs": {"training": {"epochs": 30}},
}
LADDERS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {  # the shots that there are drawings for
    "concepts": ({}, (1, 2, 4)),
    "household": ({"level": "class", "groups": ["household"]}, (1, 2, 4, 8, 16)),
}
SECONDS = 12  # of a cell with 4 shots of 63 concepts, on one core
# Cells of this size, of a protocol: for a seed and a method that is trained; or, with methods of its own, for a seed.
PER_METHOD = {"few-shot": 3.2, "base-to-new": 0.5, "cross-dataset": 1.5, "domains": 1.2}
PER_SEED = {"multi-task": 10.0, "transfer": 24.0}
console = Console(width=140)


def groups() -> list[str]:
    return list(shipped()[0]["groups"])


def emoji_classes(shots: int) -> list[str]:
    """Classes with as many emoji to train on."""
    table = shipped()[0]["images"]
    drawn = [
        c
        for c, s, d in zip(table["class"], table["split"], table["domain"], strict=True)
        if (s, d) == ("train", "emoji")
    ]
    return [name for name in shipped()[0]["classes"] if drawn.count(name) >= shots]


def compare(folder: Path, changes: dict[str, Any], labels: Sequence[str], seeds: Sequence[int]) -> list[Result]:
    """The recipe's methods on one of the protocols."""
    _, checked = recipe.load("vl/mini-clip", changes)
    bench = Bench(checked)  # type: ignore[arg-type]
    return [outcome.result for outcome in runs.compare_recipe(bench, labels, seeds, folder, console.print)]


def show(folder: Path, results: Sequence[Result], metrics: Sequence[str], title: str) -> None:
    report.write_comparison(folder, results, title=title, metrics=metrics)
    console.print(report.to_markdown(report.results_grid(results, metrics), title=title), markup=False)


def variants(label: str, less: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Settings that add a method of the recipe with changes of its own."""
    own = recipe.load("vl/mini-clip")[1].compare[label]
    assert own is not None
    whole = own.model_dump(exclude_unset=True) | {"method": label}
    return {f"compare.{name}": whole | changes for name, changes in less.items()}


def few_shot(folder: Path, labels: Sequence[str], seeds: Sequence[int], why: bool = False) -> None:
    changes: dict[str, Any] = {}
    ladders = dict(LADDERS)
    if why:
        folder, labels, changes = folder / "why", ["r-amt", *WHY_FEW], variants("r-amt", WHY_FEW)
        del ladders["household"]
    for title, (icons, ladder) in ladders.items():
        data = changes | ({"data.icons": icons} if icons else {})
        points: dict[float, list[Result]] = {
            k: compare(folder / title / f"{k}-shots", {"data.shots": k} | data, labels, seeds) for k in ladder
        }
        report.over(points, folder / title / "shots.png", "accuracy", "shots", log=True)
        table = report.to_markdown(report.over_grid(points, "accuracy", "shots"), title=f"few-shot, {title}")
        console.print(table, markup=False)


def base_to_new(folder: Path, labels: Sequence[str], seeds: Sequence[int], why: bool = False) -> None:
    changes: dict[str, Any] = {"data.protocol": "base-to-new"}
    labels = [x for x in labels if x not in BOUND]
    if why:
        labels = ["maple", "restore", *WHY]
        changes |= variants("restore", WHY)
    results = compare(folder / "why" if why else folder, changes, labels, seeds)
    show(folder, results, ("base", "new", "harmonic-mean"), "base-to-new")


def cross_dataset(folder: Path, labels: Sequence[str], seeds: Sequence[int]) -> None:
    own = SOURCES[:4]
    others = [group for group in groups() if group not in own]
    targets = {group: {"icons": {"level": "class", "groups": [group], "train": False}} for group in others}
    changes = {"data.icons": {"level": "class", "groups": own}, "data.targets": targets, "data.shots": 16}
    results = compare(folder, changes, [x for x in labels if x not in BOUND], seeds)
    show(folder, results, ("accuracy", "accuracy/others", *(f"accuracy/{group}" for group in others)), "cross-dataset")


def domains(folder: Path, labels: Sequence[str], seeds: Sequence[int]) -> None:
    names = emoji_classes(4)
    others = [domain for domain in shipped()[0]["domains"] if domain != "emoji"]
    choice = {"level": "class", "classes": names}
    targets = {name: {"icons": choice | {"domains": [name], "train": False}} for name in others}
    changes = {"data.icons": choice | {"domains": ["emoji"]}, "data.targets": targets, "data.shots": 4}
    results = compare(folder, changes, labels, seeds)
    show(folder, results, ("accuracy", "accuracy/others", *(f"accuracy/{name}" for name in others)), "domains")


def multi_task(folder: Path, seeds: Sequence[int], why: bool = False) -> None:
    _, checked = recipe.load(
        "vl/mini-clip", {"data.shots": 4, "method": {"name": "coop", "position": "middle", "lr": 0.005}}
    )
    bench = Bench(checked)  # type: ignore[arg-type]
    backbone = bench.backbone
    targets = [group for group in groups() if group not in SOURCES]
    options = {"templates": checked.data.templates, "shots": 4}  # type: ignore[attr-defined]
    tasks = {
        (g, s): IconChoice(level="class", groups=(g,)).task(backbone, seed=s, **options)
        for g in groups()
        for s in seeds
    }  # type: ignore[arg-type]

    of_kind = {kind: checked.with_method(label) for label, kind in PROMPTS.items()}  # run and rate of each prompt

    def settings(prompt: str, seed: int) -> FitConfig:
        return of_kind[prompt].training.model_copy(update={"seed": seed})

    def config(prompt: str, seed: int, of: dict[str, tuple[str, ...]]) -> MVLPTConfig:
        rate = (of_kind[prompt].method.model_extra or {})["lr"]
        return MVLPTConfig.model_validate({"tasks": of, "prompt": prompt, "seed": seed, "lr": rate})

    def source(prompt: str, seed: int) -> tuple[Job, FitConfig]:
        of = {group: tasks[group, seed] for group in SOURCES}
        method = MVLPT(backbone, config(prompt, seed, {g: task.spec.class_names for g, task in of.items()}))
        train = union({g: task.train for g, task in of.items()})  # type: ignore[misc]
        return Job(method, train), settings(prompt, seed)

    identity = bench.identity | checked.model_dump(mode="json", include={"training", "compare"})
    trained = runs.compare(source, list(PROMPTS.values()), seeds, folder / "sources", identity, console.print)

    def starts(prompt: str) -> dict[int, MVLPT]:
        """The shared prompt of all seeds as seed 0 (Shen et al. average theirs), and that of each seed."""
        kept = {o.result.seed: o.artifact for o in trained if o.result.method == prompt and o.artifact}
        made = {seed: artifacts.load(path, backbone) for seed, path in kept.items()}
        mean = artifacts.load(kept[seeds[0]], backbone)
        mean.load_trained_state(average([method.trained_state() for method in made.values()]))
        return cast(dict[int, MVLPT], {0: mean, **made})

    shared = {prompt: starts(prompt) for prompt in PROMPTS.values()}
    results: dict[tuple[str, int], dict[str, float]] = {}

    def kind(label: str) -> str:
        return label.removesuffix("-of-one-seed").removeprefix("m")

    def start(label: str, seed: int, target: str) -> VLMethod:
        """A target's method before it is trained: from scratch, or from the shared prompt."""
        prompt, names = PROMPTS[kind(label)], tasks[target, seed].spec.class_names
        if not label.startswith("m"):
            return MVLPT(backbone, config(prompt, seed, {target: names})).for_target(names)
        return shared[prompt][seed if label.endswith("-of-one-seed") else 0].for_target(names)

    for target in targets:

        def job(label: str, seed: int, target: str = target) -> tuple[Job, FitConfig]:
            task = tasks[target, seed]
            assert task.train is not None
            begin = start(label, seed, target)
            return Job(begin, task.train, None, task.test), settings(PROMPTS[kind(label)], seed)

        labels = [
            name for label in PROMPTS for name in (label, f"m{label}", *([f"m{label}-of-one-seed"] if why else []))
        ]
        outcomes: list[Outcome] = runs.compare(job, labels, seeds, folder / target, identity, console.print)
        for outcome in outcomes:
            found = {outcome.result.method: outcome.result.metrics["accuracy"]}
            seed, test = outcome.result.seed, tasks[target, outcome.result.seed].test
            if why and test is not None:
                begin = start(outcome.result.method, seed, target)
                found[f"{outcome.result.method}, untrained"] = evaluate(begin, test)["accuracy"]
            for label, accuracy in found.items():
                results.setdefault((label, seed), {})[f"accuracy/{target}"] = accuracy
        task = tasks[target, seeds[0]]
        assert task.test is not None
        plain = ZeroShot(backbone, ZeroShotConfig(class_names=task.spec.class_names, templates=task.spec.templates))
        results.setdefault(("zero-shot", 0), {})[f"accuracy/{target}"] = evaluate(plain, task.test)["accuracy"]
    rows = [
        Result(label, seed, {"accuracy/targets": sum(cell.values()) / len(cell)} | cell)
        for (label, seed), cell in results.items()
    ]
    show(folder, rows, ("accuracy/targets", *(f"accuracy/{target}" for target in targets)), "multi-task")


def transfer(folder: Path, seeds: Sequence[int]) -> None:
    _, checked = recipe.load("vl/mini-clip")
    for label, prompt in PROMPTS.items():
        rate = (checked.with_method(label).method.model_extra or {})["lr"]
        settings = [f"seed={seeds[0]}", "data.shots=16", "training.epochs=10"]
        settings.append(f"method={{name: mvlpt, prompt: {prompt}, lr: {rate}}}")
        cli.transfer("vl/mini-clip", ",".join(PAIRED), len(seeds), settings=settings, output=folder / prompt)


def estimate(protocols: Sequence[str], methods: Sequence[str], seeds: int) -> float:
    """Seconds on one core."""
    trained = sum(name not in ("zero-shot", "linear-probe", "tip-adapter") for name in methods)
    cells = sum(PER_METHOD.get(name, 0) * trained + PER_SEED.get(name, 0) for name in protocols)
    return SECONDS * seeds * cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--protocols", nargs="+", choices=PROTOCOLS, default=list(PROTOCOLS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("runs/vl-quality"))
    parser.add_argument("--why", action="store_true", help="look for causes, in few-shot, base-to-new and multi-task")
    chosen = parser.parse_args()
    seeds = range(1, chosen.seeds + 1)
    seconds = estimate(chosen.protocols, chosen.methods, chosen.seeds)
    console.print(f"about {seconds / 60:.0f} minutes on one core; finished cells in {chosen.output} are kept")
    of_methods = {"cross-dataset": cross_dataset, "domains": domains}
    for name in chosen.protocols:
        folder = chosen.output / name
        if name == "few-shot":
            few_shot(folder, chosen.methods, seeds, chosen.why)
        elif name == "base-to-new":
            base_to_new(folder, chosen.methods, seeds, chosen.why)
        elif name == "multi-task":
            multi_task(folder, seeds, chosen.why)
        elif name == "transfer":
            transfer(folder, seeds)
        else:
            of_methods[name](folder, chosen.methods, seeds)


if __name__ == "__main__":
    main()
