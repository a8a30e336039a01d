"""`pt demo graph`: real molecules, a frozen molecule GIN, fifty labelled examples, minutes on a laptop.

Does a molecule cross the blood-brain barrier? B3DB (in a published package, CC0) and the GIN that ships with this package,
whose pre-training has seen none of the test scaffolds: RELIEF beside a linear probe, fine-tuning, GPF, GPF-plus and SUPT over
three seeds; then a trained prompt is opened in a fresh process and used, and a picture shows which atoms it chose.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console

from pt_core import artifacts, recipe, report, runs
from pt_core.files import write
from pt_graph.methods.relief import RELIEF
from pt_graph.molecules import draw_molecules
from pt_graph.workbench import Bench

RECIPE = "graph/b3db-50shot"
NOTES = (
    "Frozen molecule GIN; the training molecules of each seed are drawn from the training part of a scaffold split, whose "
    "validation part picks the epoch. RELIEF has the size-free critic (`critic: pooled`). pcr: share of atoms with a prompt; "
    "apm: mean size of a prompt's entries. Fine-tuning trains the GIN itself; a linear probe trains the head alone."
)
ASPIRIN = "CC(=O)Oc1ccccc1C(=O)O"


def run(folder: Path, seeds: int, shots: int, data: Path | None) -> None:
    """Run the demo.

    Args:
        folder: for results; a killed demo goes on from it.
        seeds: runs of each method.
        shots: training molecules in all.
        data: a table with columns `smiles` and `label` (0, 1 or empty) instead of B3DB.
    """
    console = Console()
    changes: dict[str, Any] = {"data.shots": shots}
    if data is not None:
        changes |= {"data.train": str(data), "data.labels": ["label"]}
    _, checked = recipe.load(RECIPE, changes)
    bench = Bench(checked)  # type: ignore[arg-type]
    console.print(f"{checked.about}\nbackbone: {bench.recipe.backbone.name}; {len(bench.read.graphs):,} molecules")
    if bench.read.skipped:
        console.print(
            f"skipped: {len(bench.read.skipped)} rows, {', '.join(map(str, list(bench.read.skipped)[:5]))} ..."
        )
    first = checked.seed
    outcomes = runs.compare_recipe(bench, checked.labels(), range(first, first + seeds), folder)
    results = [outcome.result for outcome in outcomes]
    metrics = ("roc-auc", "pcr", "apm")
    console.print(report.table(results, metrics, title="pt demo graph"))

    artifact = next(o.artifact for o in outcomes if o.result.method == "relief")
    assert artifact is not None
    picture = folder / "molecules.png"
    write(picture, prompted_molecules(bench, artifact, first))
    page = report.write_comparison(
        folder,
        results,
        runs.histories(outcomes),
        title="pt demo graph",
        notes=NOTES,
        metrics=metrics,
        more={"Atoms that RELIEF prompts": picture},
    )
    print(f"table, curves, molecules and report: {page}")
    answer = runs.predict_afresh(artifact, ASPIRIN)
    print(f"trained prompt: {artifact}\nin a fresh process, aspirin -> {answer}")


def prompted_molecules(bench: Bench, artifact: Path, seed: int, count: int = 6) -> bytes:
    """A picture of test molecules, the atoms that the trained policies prompt on discs; PNG bytes."""
    task = bench.task(seed)
    assert task.test is not None and task.smiles is not None
    method = cast(RELIEF, artifacts.load(artifact, bench.backbone))
    sizes = task.test.lengths or ()
    chosen = [i for i, atoms in enumerate(sizes) if 10 <= atoms <= 30][:count]
    batch = task.test.batch(chosen)
    strengths = method.prompts(batch).abs().mean(1)
    with torch.no_grad():
        odds = cast(torch.Tensor, method(batch).logits)[:, 0].sigmoid().tolist()
    told = {1: "yes", 0: "no"}
    legends = [f"p = {p:.2f}, label: {told.get(int(y), '?')}" for p, y in zip(odds, batch["labels"][:, 0], strict=True)]
    weights = [w.tolist() for w in strengths.split([sizes[i] for i in chosen])]
    return draw_molecules([task.smiles[int(i)] for i in batch["sample_ids"]], weights, legends)
