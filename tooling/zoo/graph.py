"""Build the molecule GIN that ships with pt-graph: `uv run python tooling/zoo/graph.py`.

Molecules: B3DB (CC0) without the scaffolds of the demo's validation and test parts, and the first 5,000 molecules of the NCI
set that come with RDKit, without those scaffolds either. Objectives: attribute masking, then `descriptors`; no label of B3DB
is used. Afterwards a logistic regression on the frozen graph embeddings is compared with one on those of untrained GINs.

A killed run goes on from its folder. About 15 minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch_geometric.data import Batch, Data

from pt_core import FitConfig, InputError
from pt_graph.assets import b3db
from pt_graph.backbones import ChemGNN, GraphBackbone, save_backbone
from pt_graph.data import read_smiles, scaffold_split
from pt_graph.molecules import molecule_graph, parse, scaffold
from pt_graph.pretraining import DescriptorsConfig, descriptor_targets, pretrain

ZOO = Path(__file__).parents[2] / "packages/pt-graph/src/pt_graph/zoo"


def nci() -> list[str]:
    """SMILES of the NCI molecules among RDKit's data."""
    from rdkit import RDConfig

    lines = (Path(RDConfig.RDDataDir) / "NCI" / "first_5K.smi").read_text("utf-8").splitlines()
    return [line.split()[0] for line in lines if line.strip()]


def pool(smiles: Sequence[str], held_out: set[str]) -> list[str]:
    """Canonical SMILES that can be read, each once, of five atoms or more, whose scaffold is not held out."""
    from rdkit import Chem

    found: dict[str, None] = {}
    for text in smiles:
        try:
            molecule = parse(text)
            molecule_graph(text)
        except InputError:
            continue
        if molecule.GetNumAtoms() >= 5 and molecule.GetNumBonds() and scaffold(text) not in held_out:
            found[Chem.MolToSmiles(molecule)] = None
    return list(found)


@torch.no_grad()
def embeddings(backbone: GraphBackbone, graphs: Sequence[Data]) -> np.ndarray:
    """Frozen graph embeddings [N, d]."""
    parts = []
    for start in range(0, len(graphs), 512):
        batch = Batch.from_data_list(list(graphs[start : start + 512]))
        parts.append(backbone.eval().readout(backbone(batch), batch))
    return torch.cat(parts).numpy()


def probe(features: np.ndarray, labels: np.ndarray, train: Sequence[int], part: Sequence[int]) -> dict[str, float]:
    """ROC-AUC on `part` of a logistic regression on standardised features: of the whole training part, and of 50 of its
    molecules (mean and standard deviation over ten draws)."""

    def auc(rows: np.ndarray) -> float:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000)).fit(
            features[rows], labels[rows]
        )
        return float(roc_auc_score(labels[part], model.predict_proba(features[part])[:, 1]))

    few = [auc(np.random.default_rng(seed).permutation(train)[:50]) for seed in range(10)]
    return {"full": auc(np.asarray(train)), "50 shots": float(np.mean(few)), "50 shots, sd": float(np.std(few))}


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the molecule GIN of the zoo.")
    parser.add_argument("--masking-epochs", type=int, default=4, help="0: descriptors alone")
    parser.add_argument("--descriptor-epochs", type=int, default=10)
    parser.add_argument("--run", type=Path, default=Path("runs/zoo-chem-gin"), help="folder of checkpoints")
    parser.add_argument("--output", type=Path, default=ZOO / "chem-gin")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

    read = read_smiles(b3db(), ["permeable"], invalid="skip")
    smiles, labels = read.smiles, read.labels[:, 0].tolist()
    train, validation, test = scaffold_split(smiles)
    held_out = {scaffold(smiles[i]) for i in [*validation, *test]}
    molecules = pool([*(smiles[i] for i in train), *nci()], held_out)
    targets = descriptor_targets(molecules)
    graphs = [molecule_graph(text) for text in molecules]
    for graph, row in zip(graphs, targets, strict=True):
        graph.descriptors = row[None]

    torch.manual_seed(0)
    backbone = ChemGNN()
    stages: list[tuple[str, int, Any]] = [
        ("attribute-masking", args.masking_epochs, "attribute-masking"),
        ("descriptors", args.descriptor_epochs, DescriptorsConfig(num_targets=targets.shape[1])),
    ]
    losses = {}
    for name, epochs, objective in stages:
        if epochs:
            config = FitConfig(
                epochs=epochs, batch_size=256, optimiser="adam", lr=1e-3, max_grad_norm=None, schedule="cosine"
            )
            losses[name] = pretrain(backbone, graphs, objective, config, args.run / name).history[-1]["loss"]

    rows = read.graphs
    truth = np.asarray(labels)
    untrained = []
    for seed in range(3):
        torch.manual_seed(seed)
        untrained.append(embeddings(ChemGNN(), rows))
    scores: dict[str, Any] = {}
    for name, part in (("validation", validation), ("test", test)):
        runs = [probe(features, truth, train, part) for features in untrained]
        scores[f"{name}, untrained"] = {key: float(np.mean([run[key] for run in runs])) for key in runs[0]}
        scores[f"{name}, pre-trained"] = probe(embeddings(backbone, rows), truth, train, part)
    print(json.dumps(scores, indent=2))
    save_backbone(backbone, args.output, card(args, len(molecules), targets.shape[1], losses, scores))


def card(
    args: argparse.Namespace, molecules: int, targets: int, losses: dict[str, float], scores: dict[str, Any]
) -> str:
    options = f"--masking-epochs {args.masking_epochs} --descriptor-epochs {args.descriptor_epochs}"
    epochs = {"attribute-masking": args.masking_epochs, "descriptors": args.descriptor_epochs}
    run = ", then ".join(f"{name}, {epochs[name]} epochs to a loss of {loss:.3f}" for name, loss in losses.items())
    table = "\n".join(
        f"| {name} | {row['full']:.3f} | {row['50 shots']:.3f} +- {row['50 shots, sd']:.3f} |"
        for name, row in scores.items()
    )
    return f"""# chem-gin

The molecule GIN of pretrain-gnns (5 layers, d 300, 1,857,900 parameters, float32), pre-trained for pt-graph.
`load_backbone("zoo:chem-gin")`. It reads graphs of `pt_graph.molecules.molecule_graph`. Apache-2.0.

- **Command.**
  `OMP_NUM_THREADS=1 uv run python tooling/zoo/graph.py {options}`
- **Data.** {molecules:,} molecules: B3DB (PyPI qc-b3db 1.1.1, CC0) and the first 5,000 of the NCI set (in RDKit's data, BSD-3),
  without the scaffolds of the validation and test parts of B3DB's scaffold split (80/10/10).
- **Objectives.** Attribute masking (Hu et al., 2020), and `descriptors`, our choice: {targets} standardised RDKit descriptors
  are predicted from the graph embedding. No measured label is used. The weights are not those of pretrain-gnns.
- **Run.** {run}.
  Adam, batch 256, rate 1e-3 to 0 (cosine) in each stage, seed 0.

ROC-AUC of a logistic regression on frozen graph embeddings, blood-brain barrier (B3DB), trained on the scaffold split's
training part, or on 50 of its molecules (ten draws); untrained: mean of three seeds.

| part, backbone | whole training part | 50 shots |
|---|---|---|
{table}

Settings were chosen on the validation part; the test part was read once.
"""


if __name__ == "__main__":
    main()
