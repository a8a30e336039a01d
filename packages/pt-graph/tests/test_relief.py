"""RELIEF: the properties of its card, with the card's numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.data import Batch, Data

from pt_core import InputError
from pt_core.frozen import assert_unchanged, snapshot
from pt_core.plan import FitConfig
from pt_core.training import Loop
from pt_graph.backbones import ChemGNN
from pt_graph.methods.relief import RELIEF, RELIEFConfig, prompt_metrics, setting, settings
from pt_graph.methods.relief.method import reward_loss
from pt_graph.methods.relief.policy import (
    ExactCritic,
    Member,
    PooledCritic,
    critic_size,
    discrete_kl,
    joint_policy,
    normal_kl,
    normal_log_prob,
    padded_policy,
    sample,
)
from pt_graph.methods.relief.ppo import (
    RewardScaler,
    advantages,
    clipped,
    kl_estimate,
    log_std_at,
    member_parts,
    ratio,
    remaining,
)
from pt_graph.methods.relief.rollout import Episodes, Rollout, roll_out


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def config(**changes: Any) -> RELIEFConfig:
    return RELIEFConfig(**{"num_outputs": 2, "task": "multiclass", "minibatch": 8, "first_best_epoch": 1} | changes)


def run(**changes: Any) -> FitConfig:
    return FitConfig(**{"epochs": 2, "batch_size": 4, "device": "cpu", "progress": False, "log_every": 1} | changes)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def episode(method: RELIEF, batch: dict[str, Any], std: float = 0.5, seed: int = 0, **changes: Any) -> Rollout:
    """A rollout of member 0 on a batch, and the losses under the method's head."""
    graphs = batch["graphs"]
    made = Episodes(method.encode, method.embed(graphs), graphs)
    labels = batch["labels"][made.order]

    def losses(h: Tensor, k: int) -> Tensor:
        logits = method.head(method.backbone.readout(h, made.view(k)))
        return reward_loss(logits, labels[:k], method.config.task)

    draw, shape = generator(seed), (len(graphs.batch), method.backbone.feature_width)
    uniform, noise = torch.rand(shape[0], generator=draw), torch.randn(shape, generator=draw, dtype=method.dtype)
    clamp = changes.get("clamp", False)
    return roll_out(made, method.policies, [0] * graphs.num_graphs, std, losses, uniform, noise, clamp)


def add_up(rollout: Rollout, width: int) -> Tensor:
    """The prompts P [n, D] that a rollout ends with."""
    prompts = torch.zeros(len(rollout), width, dtype=rollout.content.dtype)
    first = (rollout.sizes.cumsum(0) - rollout.sizes).repeat_interleave(rollout.sizes)
    return prompts.index_add(0, first + rollout.node, rollout.content)


# --- 1 ----------------------------------------------------------------------------------------------------------------
def test_parameter_counts_are_the_published_ones() -> None:
    molecule, node = Member(300, 300, 0.1, generator()), Member(128, 100, 0.1, generator())
    assert (count(molecule.actor_d), count(molecule.actor_c)) == (56_551, 113_100)
    assert (count(node.actor_d), count(node.actor_c)) == (10_369, 18_916)
    assert critic_size(300, 97, 97) == 43_401_195
    assert critic_size(300, 132, 132) == 80_372_161
    assert critic_size(128, 150, 150) == 18_894_721
    assert critic_size(300, 492, 492) == pytest.approx(1.117e9, rel=1e-3)
    assert count(ExactCritic(16, 20, 20, 0)) == critic_size(16, 20, 20)
    assert count(ExactCritic(16, 20, 12, 0)) == critic_size(16, 20, 12)
    assert count(PooledCritic(128, 0)) == 2 * 128**2 + 128 + 128 * 64 + 64 + 64 + 1


def test_the_method_counts_its_actors_and_head() -> None:
    method = RELIEF(ChemGNN(), RELIEFConfig(num_outputs=12, head_layers=2))
    assert method.count() - count(method.head) == 3 * (56_551 + 113_100) == 508_953
    assert count(method.head) == 300 * 300 + 300 + 300 * 12 + 12
    for m in method.policies:
        last = m.actor_d[-1].weight
        assert float(last.detach().norm()) == pytest.approx(0.01, rel=1e-4)
        assert torch.allclose(m.actor_d[0].weight @ m.actor_d[0].weight.T, 2 * torch.eye(150), atol=1e-4)


# --- 2 ----------------------------------------------------------------------------------------------------------------
def test_rewards_add_up_to_the_fall_of_the_loss(make_backbone: Any, make_split: Any) -> None:
    method, batch = RELIEF(make_backbone().double(), config()), make_split([5, 1, 9]).batch([0, 1, 2])
    batch["graphs"].x = batch["graphs"].x.double()
    rollout = episode(method, batch)
    graphs = batch["graphs"]

    def losses(prompts: Tensor) -> Tensor:
        return reward_loss(method._logits(graphs.x + prompts, graphs)[0], batch["labels"], "multiclass")

    fall = losses(torch.zeros_like(graphs.x)) - losses(add_up(rollout, 6))
    total = torch.stack([r.sum() for r in rollout.reward.split(rollout.sizes.tolist())])
    torch.testing.assert_close(total, fall, rtol=1e-10, atol=1e-12)
    assert bool((fall.abs() > 1e-4).all())


def test_losses_of_nine_seven_and_seven_and_a_half_tenths_reward_two_and_minus_half_a_tenth(
    make_backbone: Any, make_split: Any
) -> None:
    method, batch = RELIEF(make_backbone(), config()), make_split([2]).batch([0])
    graphs = batch["graphs"]
    told = iter([0.9, 0.7, 0.75])
    made = Episodes(method.encode, method.embed(graphs), graphs)
    losses, draws = lambda h, k: torch.tensor([next(told)]), (torch.rand(2), torch.randn(2, 6))
    rollout = roll_out(made, method.policies, [0], 1.0, losses, *draws, False)
    torch.testing.assert_close(rollout.reward, torch.tensor([0.2, -0.05]))


# --- 3 ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["node-gin", "chem"])
@pytest.mark.parametrize("how", ["z_max", "last layer"])
def test_without_content_the_logits_are_those_of_the_frozen_backbone(
    kind: str, how: str, make_backbone: Any, make_split: Any
) -> None:
    method = RELIEF(make_backbone(kind), config(z_max=0.0 if how == "z_max" else 0.5))
    if how == "last layer":
        for member in method.policies:
            nn.init.zeros_(member.actor_c[-1].weight)
    batch = make_split([5, 3], molecule=kind == "chem").batch([0, 1])
    graphs = batch["graphs"]
    prompts = method.prompts(batch)
    assert torch.equal(prompts, torch.zeros(8, method.backbone.feature_width))
    plain = method.head(method.backbone.readout(method.backbone(graphs), graphs))
    assert torch.equal(method(batch).logits, plain)
    assert prompt_metrics(prompts.split([5, 3])) == {"pcr": 0.0, "apm": 0.0}


# --- 4 ----------------------------------------------------------------------------------------------------------------
def test_permuting_nodes_permutes_both_actors_and_changes_the_critic(make_backbone: Any, make_graph: Any) -> None:
    backbone, data = make_backbone(), make_graph(7, 1)
    order = torch.randperm(7, generator=generator(3))
    moved = Data(x=data.x[order], edge_index=order.argsort()[data.edge_index])
    member = Member(8, 6, 0.5, generator())
    h, other = (backbone(Batch.from_data_list([d])) for d in (data, moved))
    mask = torch.ones(1, 7, dtype=torch.bool)
    pi, pi_moved = (padded_policy(member.logits(x), mask)[0] for x in (h, other))
    torch.testing.assert_close(pi_moved, pi[order])
    torch.testing.assert_close(member.mean(other), member.mean(h)[order])
    critic = ExactCritic(8, 30, 7, 0)
    assert not torch.allclose(critic.of(h[None], [7]), critic.of(other[None], [7]))


def test_padding_never_gets_probability() -> None:
    mask = torch.tensor([[True, False, False], [True, True, True]])
    pi = padded_policy(torch.tensor([-50.0, 0.0, 1.0, 2.0]), mask)
    assert pi[0].tolist() == [1.0, 0.0, 0.0]
    assert float(pi[1].sum()) == pytest.approx(1)
    almost_one = torch.tensor([1 - 2.0**-53] * 2, dtype=torch.float64)
    assert sample(pi, almost_one).tolist() == [0, 2]
    assert sample(pi, torch.zeros(2)).tolist() == [0, 0]


def test_nodes_are_drawn_as_often_as_the_policy_says() -> None:
    pi = torch.tensor([[0.5, 0.2, 0.3, 0.0]]).expand(20_000, 4)
    drawn = sample(pi, torch.rand(20_000, generator=generator()))
    torch.testing.assert_close(torch.bincount(drawn, minlength=4) / 20_000, pi[0], rtol=0, atol=0.01)


# --- 5 ----------------------------------------------------------------------------------------------------------------
def test_the_joint_policy_and_its_divergences_are_those_of_the_card() -> None:
    members = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.6, 0.2], [0.1, 0.1, 0.8]])
    joint = joint_policy(members)
    torch.testing.assert_close(joint, torch.tensor([0.26316, 0.31579, 0.42105]), rtol=0, atol=1e-5)
    assert int(joint.argmax()) == 2
    mask = torch.ones(3, 3, dtype=torch.bool)
    apart = discrete_kl(joint.expand(3, 3), members, mask)
    torch.testing.assert_close(apart, torch.tensor([0.16074, 0.18298, 0.34750]), rtol=0, atol=1e-5)
    other_way = discrete_kl(joint.expand(3, 3), members, mask, "member-joint")
    expected = (members * (members / joint).log()).sum(-1)
    torch.testing.assert_close(other_way, expected, rtol=1e-5, atol=1e-6)
    means = torch.tensor([[0.1], [-0.1], [0.3]])
    assert float(means.mean()) == pytest.approx(0.1)
    kl_c = normal_kl(means, 1.0, means.mean(0), 1.0)
    torch.testing.assert_close(kl_c, torch.tensor([0.0, 0.02, 0.02]))


def test_members_that_are_alike_are_the_joint_policy() -> None:
    pi = torch.rand(5, 4, generator=generator()).softmax(-1)
    joint = joint_policy(torch.stack([pi, pi, pi]))
    torch.testing.assert_close(joint, pi)
    zero = discrete_kl(joint, pi, torch.ones(5, 4, dtype=torch.bool))
    torch.testing.assert_close(zero, torch.zeros(5), rtol=0, atol=1e-6)


def test_divergences_are_those_of_torch() -> None:
    mean, target = torch.randn(2, 4, 3, generator=generator(), dtype=torch.float64)
    own, other = torch.distributions.Normal(mean, 0.5), torch.distributions.Normal(target, 0.8)
    expected = torch.distributions.kl_divergence(own, other).sum(-1)
    torch.testing.assert_close(normal_kl(mean, 0.5, target, 0.8), expected)
    torch.testing.assert_close(normal_log_prob(target, mean, 0.5), own.log_prob(target).sum(-1))


# --- 6, 7 -------------------------------------------------------------------------------------------------------------
def test_generalised_advantages_are_those_of_the_card() -> None:
    rewards, values = torch.tensor([1.0, 0.0, -1.0]), torch.tensor([0.5, 0.4, 0.3])
    expected = torch.tensor([-0.35077, -1.32565, -1.3])  # the card's first one, -.35075, is rounded on the way
    found = advantages(rewards, values, [3], 0.99, 0.95)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found + values, torch.tensor([0.14923, -0.92565, -1.0]), rtol=0, atol=1e-5)
    delta = advantages(rewards, values, [3], 0.99, 0.0)
    torch.testing.assert_close(delta, torch.tensor([0.896, -0.103, -1.3]))
    both = advantages(torch.cat([rewards[:1], rewards]), torch.cat([values[:1], values]), [1, 3], 0.99, 0.95)
    torch.testing.assert_close(both, torch.cat([torch.tensor([0.5]), expected]), rtol=0, atol=1e-5)


def test_a_ratio_that_would_overflow_is_cut_and_its_gradient_stays_finite() -> None:
    log_ratio = torch.tensor([-900.0, 0.1, 5000.0], requires_grad=True)
    found = ratio(log_ratio)
    torch.testing.assert_close(found[:2], torch.tensor([0.0, 0.1]).exp() * torch.tensor([0.0, 1.0]))
    clipped(found, torch.full((3,), -1.0), 0.2).sum().backward()
    assert found.square().sum().isfinite() and log_ratio.grad is not None and bool(log_ratio.grad.isfinite().all())


def test_clipped_losses_and_the_divergence_estimate_are_those_of_the_card() -> None:
    losses = clipped(torch.tensor([1.5, 0.5]), torch.tensor([1.0, -1.0]), 0.2)
    torch.testing.assert_close(losses, torch.tensor([-1.2, 0.8]))
    estimate = kl_estimate(torch.tensor([1.1, 0.9, 1.0], dtype=torch.float64).log())
    assert float(estimate) == pytest.approx(0.0033501, abs=1e-7)


def test_rewards_are_scaled_by_all_that_were_counted_the_first_rollout_twice() -> None:
    first, second = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([3.0])
    scaler, seen = RewardScaler(), first.tolist()
    for part in (first, second):
        found = scaler(part)
        for reward, scaled in zip(part.tolist(), found.tolist(), strict=True):
            seen.append(reward)
            known = torch.tensor(seen, dtype=torch.float64)
            expected = (reward - known.mean()) / (known.std(correction=0) + 1e-8)
            assert scaled == pytest.approx(float(expected), rel=1e-5)


# --- 8, 9, 10 ---------------------------------------------------------------------------------------------------------
def test_members_see_their_block_and_the_ends_of_the_others() -> None:
    assert [len(part) for part in member_parts(range(50), 3, 0.2)] == [22, 22, 24]
    assert [len(part) for part in member_parts(range(70), 3, 0.2)] == [31, 31, 32]
    assert member_parts(range(50), 3, 0.2)[0] == [*range(16), 29, 30, 31, 47, 48, 49]
    assert member_parts(range(9), 1, 0.2) == [list(range(9))]
    few = member_parts(range(9), 3, 0.2)
    assert [len(part) for part in few] == [3, 3, 3]
    assert [len(part) for part in member_parts(range(9), 3, 0.2, repo_compat=True)] == [9, 9, 9]


def test_schedules_are_those_of_the_card() -> None:
    stds = [log_std_at(e, 50, 0.0, -5.0) for e in (1, 25, 50)]
    assert stds == pytest.approx([0, -2.4, -4.9])
    assert torch.tensor(stds).exp().tolist() == pytest.approx([1, 0.0907, 0.00745], rel=1e-3)
    assert [0.01 * remaining(e, 50) for e in (1, 50)] == pytest.approx([0.01, 0.0002])


def test_a_uniform_policy_covers_as_many_nodes_as_drawing_with_replacement(make_backbone: Any, make_graph: Any) -> None:
    method = RELIEF(make_backbone(), config(z_max=0.5))
    for member in method.policies:
        nn.init.zeros_(member.actor_d[-1].weight)
    for nodes, expected in ((10, 0.6513), (20, 0.6415), (1, 1.0)):
        data = make_graph(nodes, 0)
        many = 400
        prompts = method.prompts({"graphs": Batch.from_data_list([data] * many)})
        metrics = prompt_metrics(prompts.split([nodes] * many))
        assert 1 - (1 - 1 / nodes) ** nodes == pytest.approx(expected, abs=5e-5)
        assert metrics["pcr"] == pytest.approx(expected, abs=0.015)
        assert 0 < metrics["pcr"] <= 1
        assert metrics["apm"] > 0


def test_coverage_and_magnitude_of_a_known_prompt() -> None:
    half = torch.tensor([[0.0, 0.0], [1.0, -3.0]])
    assert prompt_metrics([half, torch.tensor([[0.0, 2.0]])]) == {"pcr": 0.75, "apm": 1.5}


# --- 11 ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["node-gin", "chem"])
def test_an_update_changes_its_own_member_and_the_critic_and_the_head_phase_the_head(
    kind: str, make_backbone: Any, make_split: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = make_backbone(kind)
    before = snapshot(backbone)
    method = RELIEF(backbone, config(minibatch=4))
    changed: dict[str, set[str]] = {}
    update = Loop.update

    def watch(loop: Loop, *names: str, **options: Any) -> Any:
        old = {name: p.detach().clone() for name, p in method.named_parameters()}
        found = update(loop, *names, **options)
        moved = {".".join(n.split(".")[:3]) for n, p in method.named_parameters() if not torch.equal(p, old[n])}
        moved = {name.split(".")[0] if not name.startswith("policies") else name for name in moved}
        changed.setdefault(names[0], set()).update(moved)
        return found

    monkeypatch.setattr(Loop, "update", watch)
    method.fit(make_split([5, 3, 6, 4, 2, 7], molecule=kind == "chem"), None, run(epochs=1))
    assert changed == {"head": {"head"}} | {
        f"policy-{m}": {f"policies.{m}.actor_d", f"policies.{m}.actor_c", "critic"} for m in range(3)
    }
    assert_unchanged(backbone, before)
    assert all(p.grad is None for p in backbone.parameters())


# --- 12, 13 -----------------------------------------------------------------------------------------------------------
def test_at_node_level_every_content_is_bounded_and_their_sum_is_not(make_backbone: Any, make_split: Any) -> None:
    method = RELIEF(make_backbone(), config(level="node", z_max=0.1))
    assert (method.config.clamp_content, method.config.reward_clip, method.config.head_weight_decay) == (
        True,
        0.1,
        5e-4,
    )
    rollout = episode(method, make_split([9, 9, 9]).batch([0, 1, 2]), std=1.0, clamp=True)
    assert float(rollout.content.abs().max()) == pytest.approx(0.1)
    assert float(add_up(rollout, 6).abs().max()) > 0.11
    graph_level = config(level="graph")
    assert (graph_level.clamp_content, graph_level.reward_clip, graph_level.head_weight_decay) == (False, None, 0.0)
    assert float(episode(method, make_split([9]).batch([0]), std=1.0).content.abs().max()) > 0.5


def test_prediction_repeats_with_a_generator_and_differs_with_another(make_backbone: Any, make_split: Any) -> None:
    method, batch = RELIEF(make_backbone(), config(z_max=0.5)), make_split([9, 4]).batch([0, 1])
    first, again, other = (method.prompts(batch, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(method.prompts(batch), method.prompts(batch))
    assert not torch.equal(method.prompts(batch), RELIEF(make_backbone(), config(z_max=0.5, seed=1)).prompts(batch))


def test_a_graph_draws_the_same_in_every_batch(make_backbone: Any, make_split: Any) -> None:
    method, rows = RELIEF(make_backbone(), config(z_max=0.5)), make_split([4, 9, 2, 5])
    together = method.prompts(rows.batch([0, 1, 2, 3])).split([4, 9, 2, 5])
    for i in range(4):
        torch.testing.assert_close(method.prompts(rows.batch([i])), together[i])
    permuted = method.prompts(rows.batch([3, 1])).split([5, 9])
    torch.testing.assert_close(permuted[0], together[3])


# --- published runs ---------------------------------------------------------------------------------------------------
def test_all_forty_two_published_runs_are_settings() -> None:
    names = settings()
    assert len(names) == len(set(names)) == 42
    assert sum(setting(name)["method"]["level"] == "graph" for name in names) == 32
    for name in names:
        values = setting(name)
        made = RELIEFConfig(**values["method"])
        FitConfig(**values["training"])
        assert made.members == 3
        assert made.num_outputs >= 1
    with pytest.raises(InputError, match="no published run 'cora'"):
        setting("cora")


def test_settings_are_those_of_the_card() -> None:
    def card(name: str) -> tuple[Any, ...]:
        s = setting(name)
        m, t = s["method"], s["training"]
        decay = {"linear": "d", "constant": "s"}
        rates = decay[m["head_decay"]], decay[m["policy_decay"]]
        return t["epochs"], m["head_layers"], m["head_epochs"], m["head_lr"], *rates, m["z_max"], m["alpha_d"]

    assert card("bbbp-infomax") == (50, 3, 1, 5e-4, "s", "d", 0.1, 1)
    assert card("tox21-context-pred") == (50, 3, 1, 1e-3, "s", "d", 0.1, 1)
    assert card("muv-gcl") == (100, 2, 3, 1e-3, "s", "s", 1, 1e5)
    assert card("hiv-gcl") == (50, 3, 2, 5e-4, "d", "d", 1, 1)
    assert card("cora-edge-prediction") == (100, 2, 1, 1e-3, "s", "s", 0.1, 1e5)
    assert card("citeseer-graph-prompt") == (50, 2, 3, 1e-3, "s", "s", 0.05, 10)
    assert card("computers-edge-prediction") == (300, 2, 5, 1e-3, "s", "s", 0.1, 1e5)
    without_dropout = {n for n in settings() if not setting(n)["method"]["backbone_dropout"]}
    assert without_dropout == {"tox21-context-pred", "sider-infomax", "sider-gcl"}
    photo = setting("photo-graph-prompt")
    assert photo["method"]["warmup_epochs"] == 50
    assert photo["method"]["minibatch"] == 256
    assert photo["training"]["batch_size"] == 10
    assert photo["data"] | {"data": "photo", "hops": 2, "min_nodes": 200, "max_nodes": 2000} == photo["data"]
    assert photo["data"]["neighbours"] == [20, 10]
    assert setting("toxcast-gcl")["method"]["split_seed"] == 5
    assert setting("muv-gcl")["training"]["eval_batch_size"] == 512
