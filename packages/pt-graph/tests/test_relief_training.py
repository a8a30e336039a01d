"""Training RELIEF: equal to the loop written out plainly, sound on odd graphs, clear on bad ones."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.data import Batch, Data

from pt_core import InputError
from pt_core.data import Split
from pt_core.evaluation import evaluate
from pt_core.frozen import assert_unchanged, snapshot
from pt_core.plan import FitConfig
from pt_core.training import Loop, NotLearning
from pt_graph.methods.relief import RELIEF, RELIEFConfig, with_prompt_metrics
from pt_graph.methods.relief.method import reward_loss
from pt_graph.methods.relief.policy import ExactCritic
from pt_graph.methods.relief.rollout import Episodes, Rollout

sys.path.insert(0, str(Path(__file__).parent))  # the plain loop lies beside the tests; the benchmark uses it too
from relief_plain import PlainRELIEF

SIZES = [5, 1, 9, 4, 7, 2, 8, 6, 3, 5, 7, 4]


def config(**changes: Any) -> RELIEFConfig:
    return RELIEFConfig(
        **{"num_outputs": 2, "task": "multiclass", "minibatch": 8, "ppo_passes": 3, "first_best_epoch": 1} | changes
    )


def run(**changes: Any) -> FitConfig:
    return FitConfig(**{"epochs": 2, "batch_size": 4, "device": "cpu", "progress": False, "log_every": 1} | changes)


def rows(graphs: list[Data], labels: Tensor, task: str = "multiclass", **changes: Any) -> Split:
    def collate(found: list[tuple[Data, Tensor]]) -> dict[str, Any]:
        return {"graphs": Batch.from_data_list([g for g, _ in found]), "labels": torch.stack([y for _, y in found])}

    metrics = ("accuracy",) if task == "multiclass" else ("roc-auc",)
    pairs = list(zip(graphs, labels, strict=True))
    return Split(pairs, collate, metrics=metrics, task=task, num_classes=2, missing=-1, **changes)


def double(split: Split) -> Split:
    """The split with features in float64."""
    for data, _ in split.rows:
        data.x = data.x.double() if data.x.is_floating_point() else data.x
    return split


# --- fast == plain ----------------------------------------------------------------------------------------------------
LEVELS = {
    "node": ("node-gin", {"level": "node", "task": "multiclass", "z_max": 0.3, "alpha_d": 10.0}),
    "graph": (
        "chem",
        {"level": "graph", "task": "multilabel", "z_max": 0.5, "policy_decay": "linear", "split_seed": 3},
    ),
    "far target": ("node-gin", {"task": "multiclass", "target_kl_d": 9.0, "target_kl_c": 1e6}),
    "two batches a member": ("node-gin", {"task": "multiclass", "overlap": 0.5, "clamp_content": True}),
    "one member": ("node-gin", {"task": "multiclass", "members": 1, "head_epochs": 2, "head_decay": "linear"}),
}


@pytest.mark.parametrize("level", LEVELS)
def test_two_epochs_are_those_of_the_plain_loop(level: str, make_backbone: Any, make_split: Any) -> None:
    """In float64 and with the same draws: every weight of actors, head and critic, to 1e-9."""
    kind, changes = LEVELS[level]
    backbone = make_backbone(kind).double()
    train = double(make_split(SIZES, molecule=kind == "chem", task=changes["task"]))
    method = RELIEF(backbone, config(**changes))
    plain = PlainRELIEF(method, train, run(), nodes=12)
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    critics: list[ExactCritic] = []
    build = method._build_critic
    method._build_critic = lambda *given: critics.append(build(*given)) or critics[-1]  # type: ignore[method-assign, func-returns-value, assignment]
    object.__setattr__(method, "config", method.config.model_copy(update={"max_nodes": 12}))
    method.fit(train, None, run())
    for e in (1, 2):
        plain.epoch(e)
    for m, member in enumerate(method.policies):
        for ours, theirs in ((member.actor_d, plain.actors_d[m]), (member.actor_c, plain.actors_c[m])):
            for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for a, b in zip(method.head.parameters(), plain.head.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    critic, width = critics[0], backbone.width
    columns = plain.critic[0].weight.T
    assert len(critic.columns) == 9 * width < len(columns) == 12 * width
    torch.testing.assert_close(critic.columns, columns[: 9 * width], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(critic.hidden.weight, plain.critic[2].weight, rtol=1e-9, atol=1e-9)
    start = ExactCritic(width, 12, 12, 0).double()
    assert torch.equal(columns[9 * width :], start.columns[9 * width :]), "columns without nodes moved"
    assert not torch.allclose(critic.columns, start.columns[: 9 * width], atol=1e-6)
    assert all(not torch.equal(p, before[name]) for name, p in method.named_parameters() if name in before)


def test_products_of_real_nodes_are_those_of_the_padded_critic() -> None:
    """Values and gradients of the critic, states of mixed sizes, against a plain layer on zero-padded states."""
    critic = ExactCritic(4, 10, 7, 0).double()
    sizes = [7, 5, 5, 2, 1]
    padded = torch.zeros(5, 7, 4, dtype=torch.float64)
    for row, size in enumerate(sizes):
        padded[row, :size] = torch.randn(size, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(row))
    found = critic.of(padded, sizes)
    found.square().sum().backward()
    gradient = critic.columns.grad.clone()
    critic.zero_grad()
    first = (padded.flatten(1) @ critic.columns + critic.bias).relu()
    plain = critic.out(critic.hidden(first).relu()).squeeze(-1)
    plain.square().sum().backward()
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(gradient, critic.columns.grad)


def test_a_rollout_keeps_a_small_part_of_the_padded_states(make_backbone: Any, make_split: Any) -> None:
    method = RELIEF(make_backbone(), config())
    batch = make_split(SIZES).batch(range(12))
    rollout = method._roll_out(batch, [0] * 12, 0.5)
    assert rollout.states.dtype is torch.float32
    assert rollout.states.shape == (sum(n * n for n in SIZES), 8)
    assert [tuple(b.shape) for b in rollout.blocks()] == [(n, n, 8) for n in SIZES]
    graphs = batch["graphs"]
    at_start = torch.cat([b[0] for b in rollout.blocks()])
    torch.testing.assert_close(at_start, method.backbone(graphs))
    rows = torch.tensor([3, 0, 20])
    index, mask = rollout.rows(rows)
    assert mask.sum(1).tolist() == rollout.size[rows].tolist()
    pooled = torch.stack([s.mean(0) for s in rollout.states[index].split(mask.sum(1).tolist())])
    torch.testing.assert_close(rollout.pooled[rows, :8], pooled)


def test_the_order_of_graphs_and_of_their_edges_does_not_matter(make_backbone: Any, make_split: Any) -> None:
    method, rows = RELIEF(make_backbone("chem"), config(z_max=0.5)), make_split([4, 7, 5], molecule=True)
    batch = rows.batch([0, 1, 2])
    graphs = batch["graphs"].clone()
    order = torch.randperm(graphs.edge_index.shape[1], generator=torch.Generator().manual_seed(0))
    graphs.edge_index, graphs.edge_attr = graphs.edge_index[:, order], graphs.edge_attr[order]
    torch.testing.assert_close(method.prompts(batch), method.prompts(batch | {"graphs": graphs}))


def test_a_backbone_sees_the_graphs_that_go_on_as_a_batch_of_their_own(make_backbone: Any, make_split: Any) -> None:
    backbone, rows = make_backbone("chem"), make_split([4, 7, 2, 5], molecule=True)
    given = rows.batch([0, 1, 2, 3])["graphs"]
    episodes = Episodes(backbone.encode, backbone.embed(given), given)
    assert [(t, k, n) for t, k, n, _ in episodes.steps_of()] == [
        (0, 4, 18), (1, 4, 18), (2, 3, 16), (3, 3, 16), (4, 2, 12), (5, 1, 7), (6, 1, 7)
    ]  # fmt: skip
    for k, largest in ((4, [1, 3, 0, 2]), (2, [1, 3])):
        view, alone = episodes.view(k), rows.batch(largest)["graphs"]
        for name in ("x", "edge_index", "edge_attr", "batch", "ptr"):
            assert torch.equal(getattr(view, name), alone[name]), name
        assert view.num_graphs == k
    order = torch.cat([torch.arange(4, 11), torch.arange(13, 18), torch.arange(4), torch.arange(11, 13)])
    assert torch.equal(episodes.as_given(order), torch.arange(18))


def test_computing_what_a_prompt_reaches_gives_what_whole_passes_give(make_backbone: Any, make_split: Any) -> None:
    """A step's embeddings come from a `Walk`; without it the same rollout and the same prompts come out."""
    method, rows = RELIEF(make_backbone("chem").double(), config(z_max=0.5)), make_split([4, 7, 1, 5], molecule=True)
    batch = rows.batch(range(4))

    def both() -> tuple[Rollout, Tensor]:
        torch.manual_seed(0)
        return method._roll_out(batch, [2, 0, 1, 0], 0.5), method.prompts(batch)

    rollout, prompts = both()
    method._walk = lambda x, graphs: None  # type: ignore[method-assign]
    whole, same = both()
    for name in ("states", "node", "content", "log_d", "log_c", "reward"):
        torch.testing.assert_close(getattr(rollout, name), getattr(whole, name), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(prompts, same, rtol=1e-12, atol=1e-12)


def test_members_rolled_out_at_once_give_what_each_gives_alone(make_backbone: Any, make_split: Any) -> None:
    method, sizes = RELIEF(make_backbone("chem").double(), config(z_max=0.5)), [4, 7, 1, 5, 6]
    split, who = make_split(sizes, molecule=True), [0, 0, 1, 2, 2]
    torch.manual_seed(0)
    noise, uniform = torch.randn(sum(sizes), 12, dtype=torch.float64), torch.rand(sum(sizes), dtype=torch.float64)

    def made(graphs: list[int]) -> Rollout:
        rows = torch.cat([torch.arange(sum(sizes)).split(sizes)[i] for i in graphs])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn", lambda *given, **options: noise[rows])
            patch.setattr(torch, "rand", lambda *given, **options: uniform[rows])
            return method._roll_out(split.batch(graphs), [who[i] for i in graphs], 0.5)

    for graphs, together in zip(([0, 1], [2], [3, 4]), made([*range(5)]).split([2, 1, 2]), strict=True):
        alone = made(graphs)
        for name in ("sizes", "states", "node", "content", "log_d", "log_c", "reward"):
            torch.testing.assert_close(getattr(together, name), getattr(alone, name), rtol=1e-12, atol=1e-12)


# --- the run ----------------------------------------------------------------------------------------------------------
def test_the_critic_is_in_checkpoints_and_not_in_artifacts(make_backbone: Any, make_split: Any, tmp_path: Path) -> None:
    method = RELIEF(make_backbone(), config())
    method.fit(make_split(SIZES), make_split(SIZES[:4], 1), run(), tmp_path / "run")
    content = json.loads(next(tmp_path.glob("run/checkpoint-*/state.json")).read_text("utf-8"))
    assert "critic.columns" in content["identity"]["tensors"]
    assert method.critic is None
    assert not [name for name in method.trained_state() if "critic" in name]
    saved = method.save_pretrained(tmp_path / "saved")
    size = (saved / "prompt.safetensors").stat().st_size
    assert size < 4 * method.count() + 5000


def test_the_best_epoch_is_picked_from_a_given_one_on(make_backbone: Any, make_split: Any) -> None:
    def evaluated(**changes: Any) -> list[int]:
        method = RELIEF(make_backbone(), config(members=2, **changes))
        result = method.fit(make_split(SIZES), make_split(SIZES[:4], 1), run(epochs=5))
        assert result.best_step in [row["step"] for row in result.history if "validation/accuracy" in row]
        return [row["step"] for row in result.history if "validation/accuracy" in row]

    assert evaluated() == [1, 2, 3, 4, 5]
    assert evaluated(first_best_epoch=3) == [3, 4, 5]
    assert evaluated(level="node", first_best_epoch=2) == [2, 4, 5]
    assert evaluated(first_best_epoch=20) == [5]


def test_rates_fall_linearly_where_the_setting_says_so(make_backbone: Any, make_split: Any) -> None:
    method = RELIEF(make_backbone(), config(members=2, policy_decay="linear"))
    history = method.fit(make_split(SIZES), None, run(epochs=4)).history
    rates = [[row[f"lr/policy-1/{name}"] for row in history] for name in ("actor_d", "actor_c", "critic")]
    assert rates == [pytest.approx([5e-4 * (1 - e / 4) for e in range(4)])] * 3
    assert [row["lr/head/head"] for row in history] == [1e-3] * 4


def test_the_head_warms_up_without_prompts_before_the_first_epoch(make_backbone: Any, make_split: Any) -> None:
    method = RELIEF(make_backbone(), config(members=2, warmup_epochs=3, head_epochs=2))
    made: list[str] = []
    update, roll_out = method._update_head, method._roll_out

    def watch(loop: Loop, batch: Any, prompts: Any = None) -> None:
        made.append(f"head of {len(batch['labels'])}, {'plain' if prompts is None else 'prompted'}")
        update(loop, batch, prompts)

    method._update_head = watch  # type: ignore[method-assign]
    method._roll_out = lambda *given: made.append("rollout") or roll_out(*given)  # type: ignore[method-assign, func-returns-value]
    method.fit(make_split(SIZES), None, run(batch_size=8))
    epoch = ["rollout"] + ["head of 12, prompted"] * 2
    assert made == ["head of 12, plain"] * 3 + epoch * 2


@pytest.mark.parametrize("on", [True, False])
def test_the_head_phase_has_the_backbones_dropout_if_asked_for(on: bool, make_backbone: Any, make_split: Any) -> None:
    backbone = make_backbone("chem")
    method = RELIEF(backbone, config(members=2, backbone_dropout=on))
    active: list[tuple[bool, bool]] = []
    encode = backbone.encode

    def watch(x: Tensor, graphs: Any) -> Tensor:
        active.append((backbone.dropout.training, any(norm.training for norm in backbone.batch_norms)))
        return encode(x, graphs)

    backbone.encode = watch
    method.fit(make_split(SIZES, molecule=True), None, run(epochs=1, batch_size=8))
    assert active.count((True, False)) == on  # the one pass that the head is trained on
    assert active.count((False, False)) == len(active) - on


def test_a_rollout_shorter_than_a_minibatch_trains_no_policy_and_warns(make_backbone: Any, make_split: Any) -> None:
    method = RELIEF(make_backbone(), config(minibatch=64))
    before = {name: p.clone() for name, p in method.policies.named_parameters()}
    with pytest.warns(NotLearning, match=r"no more than a minibatch of 64: no policy is trained") as seen:
        method.fit(make_split(SIZES), None, run())
    assert len([w for w in seen if w.category is NotLearning]) == 1
    assert all(torch.equal(p, before[name]) for name, p in method.policies.named_parameters())


@pytest.mark.parametrize("what", ["node", "content"])
def test_policies_learn_what_is_rewarded(what: str, make_backbone: Any, make_graph: Any) -> None:
    """Rewarded is a prompt on the first node, which has features of its own, or a content with a large sum."""
    graphs = [make_graph(5, i) for i in range(40)]
    for data in graphs:
        data.x[0] = 2.0
    method = RELIEF(
        make_backbone(),
        config(members=2, minibatch=16, gamma=0, z_max=0.5, log_std=-2.0, actor_d_lr=2e-2, actor_c_lr=2e-2)
        .model_copy(update={"target_kl_d": 0.1, "target_kl_c": 10.0, "ppo_passes": 5}),
    )  # fmt: skip
    roll_out, seen = method._roll_out, list[Rollout]()

    def rewarded(*given: Any) -> Rollout:
        seen.append(roll_out(*given))
        found = seen[-1]
        found.reward = (found.node == 0).float() if what == "node" else found.content.sum(1)
        return found

    method._roll_out = rewarded  # type: ignore[method-assign]
    method.fit(rows(graphs, torch.arange(40) % 2), None, run(epochs=8, batch_size=24))
    reward = [float(r.reward.mean()) for r in (seen[0], seen[-1])]
    assert reward[0] < 0.3
    assert reward[1] > 0.45


def test_a_split_is_scored_with_coverage_and_magnitude(make_backbone: Any, make_split: Any) -> None:
    method, split = RELIEF(make_backbone(), config(z_max=0.5)), make_split(SIZES)
    plain, scored = evaluate(method, split), evaluate(method, with_prompt_metrics(split), batch_size=5)
    assert scored.keys() == {"accuracy", "pcr", "apm"}
    assert scored["accuracy"] == plain["accuracy"]
    assert 0 < scored["pcr"] <= 1
    batch = split.batch(range(12))
    prompts = method.prompts(batch)
    covered = prompts[(prompts != 0).any(1)]
    assert scored["apm"] == pytest.approx(float(covered.abs().mean()), rel=1e-5)
    run_ = run(epochs=1, monitor="accuracy")
    assert {"accuracy", "pcr", "apm"} == method.fit(split, with_prompt_metrics(split), run_).metrics.keys()


# --- as released ------------------------------------------------------------------------------------------------------
def test_a_missing_label_is_no_part_of_the_reward_unless_as_released() -> None:
    logits, labels = torch.tensor([[0.3, -0.7, 1.1]]), torch.tensor([[1, -1, 0]])
    terms = nn.functional.binary_cross_entropy_with_logits
    known = terms(logits[0, [0, 2]], torch.tensor([1.0, 0.0]), reduction="sum")
    half = terms(logits[0, 1], torch.tensor(0.5))
    torch.testing.assert_close(reward_loss(logits, labels, "multilabel")[0], known / 2)
    torch.testing.assert_close(reward_loss(logits, labels, "multilabel", repo_compat=True)[0], (known + half) / 2)


def test_as_released_the_statistics_move_and_the_backbone_does_not(
    make_backbone: Any, make_split: Any, tmp_path: Path
) -> None:
    train = make_split(SIZES, molecule=True, task="multilabel")
    backbone = make_backbone("chem")
    before = snapshot(backbone)
    method = RELIEF(backbone, config(task="multilabel", repo_compat=True))
    graphs = train.batch([0])["graphs"]
    torch.testing.assert_close(
        method.encode(method.embed(graphs), graphs), backbone(graphs).double(), rtol=1e-4, atol=1e-5
    )
    start = method.released.get_buffer("batch_norms/0/running_mean").clone()
    method.fit(train, None, run(epochs=1))
    assert_unchanged(backbone, before)
    assert all(p.dtype is torch.float64 for p in method.parameters())
    assert not torch.allclose(method.released.get_buffer("batch_norms/0/running_mean"), start)
    loaded = RELIEF.from_pretrained(method.save_pretrained(tmp_path / "saved"), make_backbone("chem"))
    assert torch.equal(loaded(train.batch([0, 2])).logits, method(train.batch([0, 2])).logits)
    assert (tmp_path / "saved" / "prompt.safetensors").stat().st_size < 8 * method.count() + 20_000
    quiet = RELIEF(make_backbone("chem"), config(task="multilabel", repo_compat=True, backbone_dropout=False))
    quiet.fit(train, None, run(epochs=1))
    torch.testing.assert_close(quiet.released.get_buffer("batch_norms/0/running_mean"), start)


# --- odd and bad graphs -----------------------------------------------------------------------------------------------
def no_edges(nodes: int, seed: int) -> Data:
    draw = torch.Generator().manual_seed(seed)
    return Data(x=torch.randn(nodes, 6, generator=draw), edge_index=torch.zeros(2, 0, dtype=torch.long))


@pytest.mark.parametrize("critic", ["exact", "pooled"])
def test_graphs_without_edges_single_nodes_and_islands_are_trained_on(
    critic: str, make_backbone: Any, make_graph: Any
) -> None:
    islands = Batch.from_data_list([make_graph(4, 1), no_edges(2, 2)])
    island = Data(x=islands.x, edge_index=islands.edge_index)
    graphs = [no_edges(1, 0), no_edges(5, 1), island, make_graph(6, 2), no_edges(1, 3), make_graph(3, 4)]
    train = rows(graphs, torch.tensor([0, 1, 0, 1, 0, 1]))
    method = RELIEF(make_backbone(), config(members=2, minibatch=4, critic=critic))
    result = method.fit(train, train, run(epochs=2))
    assert "accuracy" in result.metrics
    alone = rows([no_edges(1, i) for i in range(4)], torch.tensor([0, 1, 0, 1]))
    assert method.prompts(alone.batch([0, 1, 2, 3])).shape == (4, 6)


def test_graphs_without_a_label_are_left_out_and_named(make_backbone: Any, make_split: Any) -> None:
    base = make_split(SIZES, molecule=True, task="multilabel")
    labels = torch.stack([y for _, y in base.rows])
    labels[[2, 5]] = -1
    ids = [f"molecule-{i}" for i in range(len(SIZES))]
    train = rows([g for g, _ in base.rows], labels, "multilabel", ids=ids)
    seen: list[str] = []
    batch = Split.batch

    def watch(split: Split, indices: Any) -> Any:
        seen.extend(ids[i] for i in indices if len(indices) < len(ids))
        return batch(split, indices)

    method = RELIEF(make_backbone("chem"), config(task="multilabel", members=2))
    with pytest.MonkeyPatch.context() as patch, pytest.warns(UserWarning, match="'molecule-2', 'molecule-5'"):
        patch.setattr(Split, "batch", watch)
        method.fit(train, None, run(epochs=1))
    assert not {"molecule-2", "molecule-5"} & set(seen)
    nothing = rows([g for g, _ in base.rows], torch.full_like(labels, -1), "multilabel")
    with pytest.warns(UserWarning), pytest.raises(InputError, match="0 labelled training graphs for 2 members"):
        method.fit(nothing, None, run(epochs=1))


def test_bad_inputs_are_refused_before_training(make_backbone: Any, make_graph: Any, make_split: Any) -> None:
    def refused(
        match: str, train: Split, validation: Split | None = None, run_: FitConfig | None = None, **changes: Any
    ) -> None:
        method = RELIEF(make_backbone(), config(**changes))
        with pytest.raises(InputError, match=match), pytest.MonkeyPatch.context() as patch:
            patch.setattr(Loop, "steps", None)
            method.fit(train, validation, run_ or run())

    good, labels = make_split(SIZES), torch.tensor([0, 1, 0])
    wide = rows([make_graph(3, i, width=7) for i in range(3)], labels)
    refused("width 6, the graphs have", wide)
    for field, value in [("optimiser", "adam"), ("weight_decay", 0.1), ("schedule", "cosine")]:
        refused(f"field '{field}': has no effect: RELIEF names its own", good, None, run(**{field: value}))
    refused("width 6, the graphs have", good, wide)
    refused("3 labelled training graphs for 4 members", rows([make_graph(3, i) for i in range(3)], labels), members=4)
    refused("label 2 of 2 classes", rows([make_graph(3, i) for i in range(3)], torch.tensor([0, 2, 1])))
    empty = Data(x=torch.zeros(0, 6), edge_index=torch.zeros(2, 0, dtype=torch.long))
    refused("graph 1 of the training split has no nodes", rows([make_graph(3, 0), empty, make_graph(2, 1)], labels))
    refused(r"labels of shape \[12\] are not those of 2 outputs", good, task="multilabel")
    refused("a training graph has 9 nodes, more than max_nodes", good, max_nodes=5)
    refused("not split or bucketed", good, None, run(micro_batch_size=2))
    refused("monitors 'roc-auc'", good, good, run(monitor="roc-auc"))


def test_above_the_reach_of_the_exact_critic_the_pooled_one_is_used_or_asked_for(
    make_backbone: Any, make_split: Any
) -> None:
    train = make_split(SIZES)
    with pytest.warns(UserWarning, match=r"more than critic_limit \(100\)\. The pooled critic is used"):
        RELIEF(make_backbone(), config(members=2, critic_limit=100)).fit(train, None, run(epochs=1))
    with pytest.raises(InputError, match=r'the exact critic has 225 weights.*Use critic="pooled"'):
        RELIEF(make_backbone(), config(members=2, critic="exact", critic_limit=100)).fit(train, None, run(epochs=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RELIEF(make_backbone(), config(members=2, critic="pooled", critic_limit=100)).fit(train, None, run(epochs=1))
