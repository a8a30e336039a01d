"""Graph prompts side by side on real data: accuracy, macro-F1 and ROC-AUC of RELIEF and what it is compared with.

    PT_STUDY_DATA=... uv run python tooling/bench/graph_quality.py [--data cora citeseer bbbp bace sider tox21] [--seeds 3]

Nodes: Cora and CiteSeer with the GINs of RELIEF's authors, 10 nodes a class, subgraphs as published. Molecules: BBBP, bace,
sider and tox21, 50 of the scaffold split's training part by RELIEF's rule, with pretrain-gnns' supervised GCN.

Every method has the head of RELIEF's published run (layers, rate) and the best of its validation scores picks its state. By
default all else is equal as well: 200 updates of the head, three looks at the validation part, no dropout in the frozen GNN.
RELIEF has 30 epochs with at most 3 PPO passes a rollout (published: 50 to 100 epochs with at most 10), the size-free critic,
and a warm-up of its head without prompts that makes up for its one to three updates an epoch; fine-tuning keeps its
dropout. At most 200 validation and 400 test rows are drawn; each data set has one GIN and 3 seeds.

`--critic exact` has RELIEF's published critic in the place of the size-free one (`--methods relief` leaves out the rest).

`--full` runs the published epochs, the critic that the size allows, both GINs of the authors, all rows and 5 seeds: days.
Finished cells are kept in the output folder, so a killed run goes on, and may go on with more seeds. An estimate is printed
first.

`--why` looks into the finished cells of RELIEF: scores and losses of the same head with prompts and without, how far the node
policy has moved from drawing uniformly, how many rollouts are too short to learn from, and what the policies gained.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console

from pt_core import artifacts, recipe, report, runs
from pt_core.metrics import evaluate_logits
from pt_graph.method import label_loss
from pt_graph.methods.relief import RELIEF, setting
from pt_graph.methods.relief.method import shuffled
from pt_graph.methods.relief.ppo import member_parts
from pt_graph.workbench import Bench

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("PT_STUDY_DATA", ROOT.parent / "shared" / "data"))
NODES = {"cora": ("gppt", "gprompt"), "citeseer": ("gppt", "gprompt")}
SETTINGS = {"gppt": "edge-prediction", "gprompt": "graph-prompt"}
MOLECULES = {"bbbp": "BBBP", "bace": "bace", "sider": "sider", "tox21": "tox21"}
LABELS = {"bbbp": ["p_np"], "bace": ["Class"]}
ROWS = {"cora": 70, "citeseer": 60}  # that train; else 50
UPDATES, EPOCHS, LOOKS = 200, 30, 3  # by default: of every head, of RELIEF, at the validation part
METHODS = ("linear-probe", "fine-tuning", "gpf", "gpf-plus", "supt-soft", "supt-hard", "relief")
SECONDS = {"relief": 95, "fine-tuning": 15, "linear-probe": 2}  # processor time of a cell by default; else 9
console = Console(width=140)


def changes(name: str, gin: str, full: bool, critic: str) -> dict[str, Any]:
    """Changes to the recipe graph/relief for a data set and a backbone; `critic` where the run is not a full one."""
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
    head = {key: setting(found["setting"])["method"][key] for key in ("head_layers", "head_lr")}
    found |= {f"compare.{method}.{key}": value for method in METHODS[:-1] for key, value in head.items()}
    if not full:
        each, rows = setting(found["setting"])["method"]["head_epochs"], ROWS.get(name, 50)
        found |= {
            "data.max_validation": 200,
            "data.max_test": 400,
            "method.critic": critic,
            "method.ppo_passes": 3,
            "method.backbone_dropout": False,
            "method.warmup_epochs": round((UPDATES - EPOCHS * each) / math.ceil(rows / 32)),
            "method.first_best_epoch": EPOCHS // LOOKS,
            "training.epochs": EPOCHS,
            "training.evaluate_every": EPOCHS // LOOKS,
        }
        run = {"epochs": None, "max_steps": UPDATES, "evaluate_every": math.ceil(UPDATES / LOOKS)}
        found |= {f"compare.{method}.training.{key}": value for method in METHODS[:-1] for key, value in run.items()}
    return found


@torch.no_grad()
def why(bench: Bench, folder: Path, seed: int) -> Iterator[dict[str, str]]:
    """What RELIEF's prompts do with the head that was trained along with them: a row for each part of the data."""
    task, cell = bench.task(seed), folder / "cells" / f"relief-{seed}"
    method = cast(RELIEF, artifacts.load(cell / "prompt", bench.backbone)).eval()
    history = [json.loads(line) for line in (cell / "training" / "metrics.jsonl").read_text("utf-8").splitlines()]
    rewards = [row["reward"] for row in history if "reward" in row]
    c, sizes, batch = method.config, task.train.lengths or (), bench.recipe.training.batch_size
    split_seed = seed if c.split_seed is None else c.split_seed
    parts = member_parts(shuffled(range(len(sizes)), split_seed), c.members, c.overlap)
    drawn = [[sizes[part[i]] for i in torch.randperm(len(part)).tolist()] for part in parts for _ in range(200)]
    rollouts = [sum(part[at : at + batch]) for part in drawn for at in range(0, len(part), batch)]
    short = sum(transitions <= c.minibatch for transitions in rollouts) / len(rollouts)
    for name, split in {"train": task.train, "validation": task.validation, "test": task.test}.items():
        assert split is not None
        logits: dict[str, list[torch.Tensor]] = {"with": [], "without": []}
        labels, odds = [], []
        for rows in split.batches(64):
            graphs = rows["graphs"]
            x = method.embed(graphs)
            labels.append(torch.as_tensor(rows["labels"]))
            for key, prompt in {"with": method.prompts(rows), "without": torch.zeros_like(x)}.items():
                logits[key].append(method._logits(x + prompt, graphs)[0])
            h, first = method.encode(x, graphs), graphs.ptr.tolist()
            for start, stop in pairwise(first):
                mask = torch.ones(1, stop - start, dtype=torch.bool)
                odds.append(method.policies.joint(method.policies.logits(h[start:stop]), mask)[0] * (stop - start))
        low, high = torch.cat(odds).quantile(torch.tensor([0.05, 0.95])).tolist()
        y, metric = torch.cat(labels), split.metrics[0]
        row = {"part": name, "rows": str(len(split))}
        for key, given in logits.items():
            found = torch.cat(given)
            total, count = label_loss(found, y, c.task)
            score = evaluate_logits([metric], split.task, found.float(), y, split.missing)[metric]
            row |= {f"{metric} {key}": f"{score:.3f}", f"loss {key}": f"{total.sum() / count.sum():.3f}"}
        yield row | {
            "n pi": f"{low:.2f} to {high:.2f}",
            "too short": f"{short:.1%}",
            "reward": f"{rewards[0]:.3f} to {rewards[-1]:.3f}",
        }


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
    parser.add_argument("--why", action="store_true", help="look into finished cells of RELIEF")
    parser.add_argument(
        "--critic", choices=("pooled", "exact"), default="pooled", help="of RELIEF: size-free, or published"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/graph-quality"))
    chosen = parser.parse_args()
    seeds = max(chosen.seeds, 5) if chosen.full else chosen.seeds
    todo = list(cells(chosen.data, chosen.full))
    if not (chosen.full or chosen.why):
        seconds = len(todo) * seeds * sum(SECONDS.get(method, 9) for method in chosen.methods)
        console.print(
            f"{len(todo) * seeds * len(chosen.methods)} cells, about {seconds / 60:.0f} minutes on an idle core"
        )
    for name, gin in todo:
        _, checked = recipe.load("graph/relief", changes(name, gin, chosen.full, chosen.critic))
        bench = Bench(checked)  # type: ignore[arg-type]
        kind = "-full" if chosen.full else "-exact" if chosen.critic == "exact" else ""
        folder = chosen.output / f"{name}-{gin}{kind}"
        if chosen.why:
            rows = [row for seed in range(1, seeds + 1) for row in why(bench, folder, seed)]
            console.print(
                f"{name}, {gin}; parts in turn for each seed\n| {' | '.join(rows[0])} |\n|{' --- |' * len(rows[0])}"
            )
            console.print("\n".join(f"| {' | '.join(row.values())} |" for row in rows))
            continue
        outcomes = runs.compare_recipe(bench, chosen.methods, range(1, seeds + 1), folder, console.print)
        results = [outcome.result for outcome in outcomes]
        metrics = ["accuracy", "macro-f1"] if name in NODES else ["roc-auc"]
        shown = [*metrics, *(["pcr", "apm"] if "relief" in chosen.methods else [])]
        report.write_comparison(folder, results, runs.histories(outcomes), title=f"{name}, {gin}", metrics=shown)
        console.print(report.table(results, shown, title=f"{name}, {gin}"))
        console.print(report.to_markdown(report.results_grid(results, shown)))


if __name__ == "__main__":
    main()
