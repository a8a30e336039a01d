"""Graph prompts side by side on real data: accuracy, macro-F1 and ROC-AUC of RELIEF and what it is compared with.

    PT_STUDY_DATA=... uv run python tooling/bench/graph_quality.py [--data cora citeseer bbbp bace sider tox21] [--seeds 3]

Nodes: Cora and CiteSeer with the GINs of RELIEF's authors, 10 nodes a class, subgraphs as published. Molecules: BBBP, bace,
sider and tox21, 50 of the scaffold split's training part by RELIEF's rule, with pretrain-gnns' supervised GCN.

By default RELIEF has the size-free critic and 30 epochs, and each data set one GIN: about ten minutes a data set on two cores.
`--full` runs the published epochs, the critic that the size allows, both GINs of the authors and 5 seeds: days. Finished cells
are kept in the output folder, so a killed run goes on. An estimate is printed first.
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from pt_core import recipe, report, runs
from pt_graph.workbench import Bench

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("PT_STUDY_DATA", ROOT.parent / "shared" / "data"))
NODES = {"cora": ("gppt", "gprompt"), "citeseer": ("gppt", "gprompt")}
SETTINGS = {"gppt": "edge-prediction", "gprompt": "graph-prompt"}
MOLECULES = {"bbbp": "BBBP", "bace": "bace", "sider": "sider", "tox21": "tox21"}
LABELS = {"bbbp": ["p_np"], "bace": ["Class"]}
METHODS = ("linear-probe", "fine-tuning", "gpf", "gpf-plus", "supt-soft", "supt-hard", "relief")
SECONDS = {"relief": 150, "fine-tuning": 25, "linear-probe": 5}  # of a cell by default, where it was measured; else 20
console = Console(width=140)


def changes(name: str, gin: str, full: bool) -> dict[str, Any]:
    """Changes to the recipe graph/relief for a data set and a backbone."""
    if name in NODES:
        found = {
            "setting": f"{name}-{SETTINGS[gin]}",
            "data.train": str(DATA / "relief" / f"{name}_svd100.safetensors"),
            "backbone.name": str(DATA / "relief" / f"gin_{gin}_{name}.safetensors"),
        }
    else:
        file = DATA / "moleculenet" / f"{MOLECULES[name]}.csv"
        with file.open(encoding="utf-8", newline="") as lines:
            columns = [c for c in next(csv.reader(lines)) if c not in ("smiles", "mol_id")]
        found = {
            "setting": f"{name}-context-pred",
            "data.train": str(file),
            "data.labels": LABELS.get(name, columns),
            "data.invalid": "skip",
            "backbone.name": str(DATA / "pretrain-gnns" / "gcn_supervised_contextpred.safetensors"),
            "backbone.config": {"kind": "chem", "conv": "gcn"},
        }
    if not full:
        found |= {"method.critic": "pooled", "training.epochs": 30, "training.evaluate_every": 5}
    return found


def cells(data: list[str], full: bool) -> Iterator[tuple[str, str]]:
    for name in data:
        for gin in NODES.get(name, ("supervised-contextpred",))[: None if full else 1]:
            yield name, gin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=[*NODES, *MOLECULES], default=[*NODES, *MOLECULES])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="published settings; days")
    parser.add_argument("--output", type=Path, default=Path("runs/graph-quality"))
    chosen = parser.parse_args()
    seeds = max(chosen.seeds, 5) if chosen.full else chosen.seeds
    todo = list(cells(chosen.data, chosen.full))
    if not chosen.full:
        seconds = len(todo) * seeds * sum(SECONDS.get(method, 20) for method in chosen.methods)
        console.print(f"{len(todo) * seeds * len(chosen.methods)} cells, about {seconds / 60:.0f} minutes")
    for name, gin in todo:
        _, checked = recipe.load("graph/relief", changes(name, gin, chosen.full))
        bench = Bench(checked)  # type: ignore[arg-type]
        folder = chosen.output / f"{name}-{gin}{'-full' if chosen.full else ''}"
        identity = bench.identity | checked.model_dump(mode="json", include={"method", "training", "compare"})
        outcomes = runs.compare(bench.job, chosen.methods, range(1, seeds + 1), folder, identity, console.print)
        results = [outcome.result for outcome in outcomes]
        metrics = ["accuracy", "macro-f1"] if name in NODES else ["roc-auc"]
        shown = [*metrics, *(["pcr", "apm"] if "relief" in chosen.methods else [])]
        report.write_comparison(folder, results, runs.histories(outcomes), title=f"{name}, {gin}", metrics=shown)
        console.print(report.table(results, shown, title=f"{name}, {gin}"))
        console.print(report.to_markdown(report.results_grid(results, shown)))


if __name__ == "__main__":
    main()
