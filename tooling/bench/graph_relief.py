"""RELIEF: seconds of an epoch and peak memory of its rollouts, against the loop written out plainly.

    PT_STUDY_DATA=... uv run python tooling/bench/graph_relief.py [--tasks cora bbbp]

Tasks: Cora (10 nodes a class, 4-hop subgraphs of 5 to 150 nodes, setting cora-edge-prediction) and BBBP (50 molecules,
setting bbbp-context-pred, pretrain-gnns' supervised GCN). The plain loop (packages/pt-graph/tests/relief_plain.py) is what
the released programs do: float64, states padded to N, every actor on every slot, the critic on all N d columns. It gives the
same numbers as the package in float64 (tested to 1e-9), so one run has the same rollouts and updates in both: its epoch is
timed on one rollout and a few updates and added up to the R rollouts and U updates that an epoch of the package in float64
had. Epochs of the package are timed whole (the first one). Each variant runs in a process of its own, one after the other,
on one thread by default: on a shared machine, waiting for a second one distorts both sides. Memory is that of what is rolled
out at once: plainly one member on the 8 largest graphs, in the package all three members on the 24 largest.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from memory import peak
from torch import Tensor
from torch_geometric.data import Data

from pt_core.data import Split, few_shot
from pt_core.plan import FitConfig
from pt_graph.backbones import ChemConfig, GraphBackbone, NodeGINConfig, load_backbone
from pt_graph.data import collate, few_shot_relief, node_subgraphs, read_nodes, read_smiles, scaffold_split
from pt_graph.methods.relief import RELIEF, RELIEFConfig, setting
from pt_graph.methods.relief.ppo import member_parts

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "packages/pt-graph/tests"))
from relief_plain import PlainRELIEF  # noqa: E402

DATA = Path(os.environ.get("PT_STUDY_DATA", ROOT.parent / "shared" / "data"))
VARIANTS = {
    "plain float64": ("plain", torch.float64, "exact"),
    "plain float32": ("plain", torch.float32, "exact"),
    "fast float64": ("fast", torch.float64, "exact"),
    "fast float32": ("fast", torch.float32, "exact"),
    "fast float32, pooled critic": ("fast", torch.float32, "pooled"),
}


# --- tasks ------------------------------------------------------------------------------------------------------------
def cora(shots: int = 10, seed: int = 0) -> tuple[list[Data], Tensor, list[int]]:
    """Subgraphs of the eligible nodes, their labels, and the rows of a few-shot draw."""
    graph = read_nodes(DATA / "relief" / "cora_svd100.safetensors")
    found = node_subgraphs(graph, hops=4, min_nodes=5, max_nodes=150)
    labels = graph.y[list(found)]
    return list(found.values()), labels, few_shot(labels, shots, seed)


def bbbp(shots: int = 50, seed: int = 0) -> tuple[list[Data], Tensor, list[int]]:
    """Molecules, their labels, and RELIEF's draw of the scaffold split's training part."""
    read = read_smiles(DATA / "moleculenet" / "BBBP.csv", ["p_np"], invalid="skip")
    return read.graphs, read.labels, few_shot_relief(scaffold_split(read.smiles)[0], shots, seed)


def load(task: str, dtype: torch.dtype, critic: str) -> tuple[RELIEF, Split, FitConfig, int]:
    """Method, training split, run and N."""
    values = setting({"cora": "cora-edge-prediction", "bbbp": "bbbp-context-pred"}[task])
    graphs, labels, rows = cora() if task == "cora" else bbbp()
    backbone: GraphBackbone
    if task == "cora":
        backbone = load_backbone(DATA / "relief" / "gin_gppt_cora.safetensors", NodeGINConfig())
    else:
        weights = DATA / "pretrain-gnns" / "gcn_supervised_contextpred.safetensors"
        backbone = load_backbone(weights, ChemConfig(conv="gcn"))
    backbone = backbone.to(dtype)
    nodes = max(graph.num_nodes for graph in graphs)
    chosen = [(graphs[i], labels[i]) for i in rows]
    for graph, _ in chosen:
        graph.x = graph.x.to(dtype) if graph.x.is_floating_point() else graph.x
    split = Split(chosen, collate, metrics=(), task=values["method"]["task"], num_classes=None)
    method = RELIEF(backbone, RELIEFConfig(**values["method"], critic=critic, max_nodes=nodes))
    training = values["training"] | {"monitor": None, "device": "cpu", "progress": False}
    return method, split, FitConfig(**training), nodes


# --- measuring --------------------------------------------------------------------------------------------------------
class Enough(Exception):
    """All that is to be timed has been timed."""


class Clock:
    """Seconds and calls of functions, by name; a function may be stopped after so many calls."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)

    def around(self, owner: Any, name: str, label: str, limit: float = float("inf")) -> None:
        inner: Callable[..., Any] = getattr(owner, name)

        def timed(*given: Any, **options: Any) -> Any:
            if self.calls[label] >= limit:
                raise Enough
            start = time.perf_counter()
            found = inner(*given, **options)
            self.seconds[label] += time.perf_counter() - start
            self.calls[label] += 1
            return found

        setattr(owner, name, timed)


def rollout_memory(make: Callable[[], Any]) -> float:
    """By how much the process grows at most while a rollout is made, in MB."""
    return peak(make, torch.device("cpu")) / 2**20


def measure(task: str, variant: str, updates: int, threads: int) -> dict[str, Any]:
    """Timings of one variant, in this process."""
    kind, dtype, critic = VARIANTS[variant]
    torch.set_num_threads(threads)
    method, split, config, nodes = load(task, dtype, critic)
    clock = Clock()
    sizes = [graph.num_nodes for graph, _ in split.rows]
    largest = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    found: dict[str, Any] = {"N": nodes, "largest": max(sizes), "mean": sum(sizes) / len(sizes)}
    if kind == "plain":
        plain = PlainRELIEF(method, split, config, nodes)
        plain.std, plain.running = 1.0, []
        eight = split.batch(largest[:8])
        found["memory"] = rollout_memory(lambda: plain.roll_out(0, eight, *plain.draws([eight])[0]))
        clock.around(plain, "roll_out", "rollout")
        clock.around(plain, "learn", "learn")
        clock.around(plain, "loss", "loss", updates)
        clock.around(plain.adams[0], "step", "adam")
        start = time.perf_counter()
        with contextlib.suppress(Enough):
            plain.epoch(1, rollouts=1)
        learning = time.perf_counter() - start - clock.seconds["rollout"]
        start = time.perf_counter()
        plain.train_head(split.batch(plain.order))
        found |= {
            "rollout": clock.seconds["rollout"] / clock.calls["rollout"],
            "update": learning / clock.calls["adam"],
            "adam": clock.seconds["adam"] / clock.calls["adam"],
            "head": time.perf_counter() - start,
        }
        return found
    members = list(range(method.config.members)) * 8
    first = split.batch(largest[: len(members)])
    found["memory"] = rollout_memory(lambda: method._roll_out(first, members, 1.0))
    starts: list[float] = []
    phase = method._policy_phase

    def begin(*given: Any) -> None:
        starts.append(time.perf_counter())
        if len(starts) == 2:
            raise Enough
        phase(*given)

    method._policy_phase = begin  # type: ignore[method-assign, assignment]
    optimisers = method.optimisers

    def timed(config: FitConfig) -> dict[str, torch.optim.Optimizer]:
        made = optimisers(config)
        for name, optimiser in made.items():
            clock.around(optimiser, "step", "adam" if name.startswith("policy") else "head adam")
        return made

    method.optimisers = timed  # type: ignore[method-assign]
    clock.around(method, "_roll_out", "rollout")
    with contextlib.suppress(Enough):
        method.fit(split, None, config)
    parts = member_parts(range(len(split)), method.config.members, method.config.overlap)
    rollouts = sum(math.ceil(len(part) / config.batch_size) for part in parts)
    found |= {"epoch": starts[1] - starts[0], "rollouts": rollouts, "updates": clock.calls["adam"]}
    found |= {
        "adam": clock.seconds["adam"] / clock.calls["adam"],
        "rollout": clock.seconds["rollout"] / rollouts,
    }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["cora", "bbbp"], choices=["cora", "bbbp"])
    parser.add_argument("--updates", type=int, default=8, help="updates of the plain loop that are timed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", nargs=2, metavar=("TASK", "VARIANT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        task, variant = given.one
        print(json.dumps(measure(task, variant, given.updates, given.threads)))
        return
    for task in given.tasks:
        found = {}
        for variant in VARIANTS:
            command = [
                sys.executable,
                __file__,
                "--one",
                task,
                variant,
                "--updates",
                str(given.updates),
                "--threads",
                str(given.threads),
            ]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[variant] = json.loads(done.stdout.splitlines()[-1])
        same = found["fast float64"]
        for row in found.values():
            row.setdefault("rollouts", same["rollouts"])
            row.setdefault("updates", same["updates"])
            if "epoch" not in row:
                row["epoch"] = row["rollouts"] * row["rollout"] + row["updates"] * row["update"] + row["head"]
        base = found["plain float64"]
        print(
            f"\n{task}: {same['rollouts']} rollouts an epoch, graphs of {same['mean']:.0f} nodes (largest {same['largest']}),"
            f" N = {same['N']}"
        )
        print(f"{'':28}{'s / epoch':>10}{'faster':>8}{'updates':>9}{'Adam':>6}{'rollout MB':>12}{'less':>7}")
        for variant, row in found.items():
            share = row["adam"] * row["updates"] / row["epoch"]
            print(
                f"{variant:28}{row['epoch']:10.2f}{base['epoch'] / row['epoch']:7.1f}x{row['updates']:9d}{share:6.0%}"
                f"{row['memory']:12.1f}{base['memory'] / max(row['memory'], 0.1):6.1f}x"
            )


if __name__ == "__main__":
    main()
