"""Settings of RELIEF: the fields with their sources, and the 42 runs that its authors published."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from pt_core.errors import InputError
from pt_graph.method import GraphConfig

SETTINGS = Path(__file__).with_name("settings.csv")
"""The published runs (graph_level/run.sh, node_level/run.sh), one a row: read with `setting(name)`."""

Decay = Literal["constant", "linear"]


class RELIEFConfig(GraphConfig):
    """Settings of RELIEF. The rollout batch is the run's `batch_size` (8 published), the epochs are its steps."""

    level: Literal["graph", "node"] = Field(
        "graph", description="which of the two released programs decides clamp_content, reward_clip, head_weight_decay"
    )
    members: int = Field(3, ge=1, description="M, policies of the ensemble; 1: plain H-PPO. main.py")
    overlap: float = Field(0.2, ge=0, lt=1, description="share of each other member's block that a member sees too")
    z_max: float = Field(0.1, ge=0, description="bound of the mean content; 0.05 to 1 by task in run.sh")
    clamp_content: bool = Field(False, description="sampled contents stay within z_max. Node level: true. agent.py")
    # H-PPO
    actor_d_lr: float = Field(5e-4, gt=0, description="main.py; Adam with eps 1e-5")
    actor_c_lr: float = Field(5e-4, gt=0, description="main.py")
    critic_lr: float = Field(5e-4, gt=0, description="main.py")
    policy_decay: Decay = Field("constant", description="of the three rates over the epochs, by task in run.sh")
    ppo_passes: int = Field(10, ge=1, description="at most so many passes over the transitions of a rollout. main.py")
    minibatch: int = Field(64, ge=1, description="transitions of an update; 64 to 512 by task in run.sh")
    eps_d: float = Field(0.2, gt=0, description="clip of the discrete ratio. main.py")
    eps_c: float = Field(0.2, gt=0, description="clip of the continuous ratio. main.py")
    target_kl_d: float = Field(1e-3, gt=0, description="a pass whose mean discrete KL exceeds it is the last. main.py")
    target_kl_c: float = Field(0.1, gt=0, description="the same of the continuous policy. main.py")
    gamma: float = Field(0.99, ge=0, le=1, description="discount. main.py")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="main.py")
    critic_weight: float = Field(0.5, ge=0, description="of the mean squared error of values. main.py")
    entropy_weight: float = Field(0.01, ge=0, description="of the discrete entropy, falls linearly to 0. main.py")
    max_grad_norm: float = Field(0.5, gt=0, description="of actors and critic together. main.py")
    log_std: float = Field(0.0, description="of the contents in the first epoch. main.py")
    final_log_std: float = Field(-5.0, description="what log_std goes towards, linearly. base.py")
    reward_clip: float | None = Field(None, gt=0, description="bound of a reward. Node level: 0.1. reward.py")
    # policy generalisation
    alpha_d: float = Field(1.0, ge=0, description="weight of the discrete KL; 1, 10 or 1e5 by task in run.sh")
    alpha_c: float = Field(0.1, ge=0, description="weight of the continuous KL. main.py")
    discrete_kl: Literal["joint-member", "member-joint"] = Field(
        "joint-member", description="KL(joint || member) as released, or KL(member || joint) as in LEEP"
    )
    # critic
    critic: Literal["auto", "exact", "pooled"] = Field(
        "auto",
        description="exact: MLP on all node embeddings, as released, ~0.05 (N d)^2 weights; pooled: on their mean and "
        "maximum, a size free of N; auto: exact up to critic_limit weights",
    )
    critic_limit: int = Field(
        100_000_000, ge=1, description="weights of the largest exact critic: 0.8 GB with gradient, and as much a member"
    )
    max_nodes: int | None = Field(
        None, ge=1, description="N of the critic's widths; default: the largest graph of training and validation"
    )
    # head
    head_decay: Decay = Field("constant", description="of head_lr over the epochs, by task in run.sh")
    head_weight_decay: float = Field(0.0, ge=0, description="Node level: 5e-4. main.py")
    head_epochs: int = Field(1, ge=1, description="passes of the head an epoch; 1 to 5 by task in run.sh")
    head_batch_size: int = Field(128, ge=1, description="main.py")
    warmup_epochs: int = Field(0, ge=0, description="of the head alone, without prompts, batches of 32; Photo: 100, 50")
    backbone_dropout: bool = Field(
        True, description="while the head is trained (tasknet_train_mode); BatchNorm stays in eval"
    )
    # protocol
    split_seed: int | None = Field(
        None, ge=0, description="of the members' parts; default: the run's seed, as at node level"
    )
    first_best_epoch: int = Field(20, ge=1, description="validation counts from this epoch on. base.py")
    repo_compat: bool = Field(
        False,
        description="what looks unintended in the released code: float64, BatchNorm statistics that move in the head "
        "phase, rewards without the mask of missing labels, all graphs for every member where an overlap rounds to none",
    )

    @model_validator(mode="before")
    @classmethod
    def _by_level(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("level") == "node":
            return {"clamp_content": True, "reward_clip": 0.1, "head_weight_decay": 5e-4} | values
        return values


def settings() -> list[str]:
    """Names of the published runs, `data-pretraining`: "bbbp-infomax", ..., "cora-edge-prediction", ..."""
    with SETTINGS.open(encoding="utf-8", newline="") as file:
        return [row["name"] for row in csv.DictReader(file)]


def setting(name: str) -> dict[str, dict[str, Any]]:
    """A published run as values of a recipe.

    Returns:
        "method": of `RELIEFConfig`; "training": of `FitConfig`; "data": data set, pretraining, few-shot protocol (`shots`
        graphs, or nodes of each class) and, at node level, the rule of subgraphs (`hops`, `min_nodes`, `max_nodes`,
        `neighbours` of each hop, where they are sampled).

    Raises:
        InputError: there is no such run.
    """
    with SETTINGS.open(encoding="utf-8", newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    if name not in rows:
        raise InputError(f"no published run {name!r}", remedy=f"Choose one of: {', '.join(rows)}", field="setting")
    row = rows[name]
    data, _, pretraining = name.partition("-")
    node = row["level"] == "node"
    whole = ("num_outputs", "head_layers", "head_epochs", "minibatch", "warmup_epochs")
    method: dict[str, Any] = {key: int(row[key]) for key in whole}
    method |= {key: float(row[key]) for key in ("head_lr", "z_max", "alpha_d")}
    method |= {key: row[key] for key in ("level", "head_decay", "policy_decay")}
    method |= {"backbone_dropout": row["backbone_dropout"] == "true", "task": "multiclass" if node else "multilabel"}
    if not node:  # at node level the run's own seed cuts the parts
        method["split_seed"] = int(row["split_seed"])
    rule: dict[str, Any] = {"data": data, "pretraining": pretraining, "split_seed": int(row["split_seed"])}
    rule |= {"shots": 10 if node else 50}
    if node:
        rule |= {key: int(row[key]) for key in ("hops", "min_nodes", "max_nodes")}
        rule |= {"neighbours": [int(n) for n in row["neighbours"].split()] or None}
    training = {
        "epochs": int(row["epochs"]),
        "batch_size": int(row["batch_size"]),
        "eval_batch_size": int(row["eval_batch_size"]),
        "evaluate_every": 2 if node else 1,
        "monitor": "macro-f1" if node else "roc-auc",
    }
    return {"method": method, "training": training, "data": rule}
