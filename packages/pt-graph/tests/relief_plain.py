"""RELIEF's training loop written out plainly: padded states, every graph to the last step, nothing reused.

It follows the released programs (actors on all padded node slots, two GNN passes a step, the critic on s_t and on s_t+1, the
other members at every minibatch), with the corrections of `RELIEF`. Tests compare the package with it; the benchmark
times against it. It draws the same random numbers in the same order.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Normal, kl_divergence
from torch.nn import functional as F

from pt_core.data import Split
from pt_core.plan import FitConfig
from pt_graph.backbones import dropping
from pt_graph.methods.relief import RELIEF
from pt_graph.methods.relief.policy import ExactCritic
from pt_graph.methods.relief.ppo import member_parts


class PlainRELIEF:
    """The state of a run: copies of actors and head, a critic with all N columns, M + 1 optimisers.

    Args:
        method: untrained; in float64 for comparisons.
        nodes: N.
    """

    def __init__(self, method: RELIEF, train: Split, config: FitConfig, nodes: int) -> None:
        self.c, self.config, self.train, self.nodes = method.config, config, train, nodes
        self.gnn, self.dtype = method.backbone, method.dtype
        self.actors_d = [copy.deepcopy(member.actor_d) for member in method.policies]
        self.actors_c = [copy.deepcopy(member.actor_c) for member in method.policies]
        self.head = copy.deepcopy(method.head)
        ours = ExactCritic(self.gnn.width, nodes, nodes, config.seed)
        first = nn.Linear(*ours.columns.shape)
        first.weight, first.bias = nn.Parameter(ours.columns.detach().T.contiguous()), ours.bias
        self.critic = nn.Sequential(first, nn.ReLU(), ours.hidden, nn.ReLU(), ours.out).to(self.dtype)
        c = self.c
        self.adams = [
            torch.optim.Adam(
                [
                    {"params": d.parameters(), "lr": c.actor_d_lr},
                    {"params": a.parameters(), "lr": c.actor_c_lr},
                    {"params": self.critic.parameters(), "lr": c.critic_lr},
                ],
                eps=1e-5,
            )
            for d, a in zip(self.actors_d, self.actors_c, strict=True)
        ]
        self.head_adam = torch.optim.Adam(self.head.parameters(), lr=c.head_lr, weight_decay=c.head_weight_decay)
        seed = config.seed if c.split_seed is None else c.split_seed
        self.order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
        self.parts = member_parts(self.order, c.members, c.overlap, c.repo_compat)
        self.epochs = config.epochs or config.max_steps

    # --- an epoch -----------------------------------------------------------------------------------------------------
    def epoch(self, e: int, rollouts: int | None = None) -> None:
        """Epoch e (from 1): all policies, then the head. `rollouts`: stop after so many, for timing."""
        seed = int(np.random.SeedSequence((self.config.seed, e, 0)).generate_state(1)[0])
        torch.manual_seed(seed)
        c, left = self.c, 1 - (e - 1) / self.epochs
        for adam in self.adams:
            for group, lr in zip(adam.param_groups, (c.actor_d_lr, c.actor_c_lr, c.critic_lr), strict=True):
                group["lr"] = lr * (left if c.policy_decay == "linear" else 1)
        self.head_adam.param_groups[0]["lr"] = c.head_lr * (left if c.head_decay == "linear" else 1)
        self.std = float(np.exp(c.log_std + (c.final_log_std - c.log_std) * (e - 1) / self.epochs))
        self.entropy_weight = c.entropy_weight * left
        self.running: list[float] = []
        made = 0
        size = self.config.batch_size
        orders = [[part[i] for i in torch.randperm(len(part)).tolist()] for part in self.parts]
        first = self.draws([self.train.batch(rows[:size]) for rows in orders])
        for m, rows in enumerate(orders):
            for start in range(0, len(rows), size):
                if made == rollouts:
                    return
                made += 1
                batch = self.train.batch(rows[start : start + size])
                self.learn(m, self.roll_out(m, batch, *(self.draws([batch])[0] if start else first[m])))
        for _ in range(c.head_epochs):
            for start in range(0, len(self.order), c.head_batch_size):
                self.train_head(self.train.batch(self.order[start : start + c.head_batch_size]))

    # --- rollouts -----------------------------------------------------------------------------------------------------
    def state(self, graphs: Any, prompts: Tensor, sizes: list[int]) -> Tensor:
        """Node embeddings, zero-padded: [B, N, d]."""
        h = self.gnn.encode(self.gnn.embed(graphs).to(self.dtype) + prompts, graphs)
        padded = torch.zeros(len(sizes), self.nodes, h.shape[1], dtype=self.dtype)
        for i, rows in enumerate(h.split(sizes)):
            padded[i, : sizes[i]] = rows
        return padded

    def task_loss(self, batch: Any, prompts: Tensor) -> Tensor:
        """Loss of each graph, [B], under the head as it is."""
        graphs, labels = batch["graphs"], batch["labels"]
        h = self.gnn.encode(self.gnn.embed(graphs).to(self.dtype) + prompts, graphs)
        logits = self.head(self.gnn.readout(h, graphs))
        if self.c.task == "multiclass":
            return F.cross_entropy(logits, labels, reduction="none")
        known = labels >= 0
        terms = F.binary_cross_entropy_with_logits(logits, labels.clamp(min=0).to(self.dtype), reduction="none")
        return (terms * known).sum(1) / known.sum(1)

    def pi(self, m: int, state: Tensor, sizes: Tensor) -> Tensor:
        """Discrete policy of member m over all N slots, [b, N]."""
        logits = self.actors_d[m](state).squeeze(-1)
        return torch.where(torch.arange(self.nodes) < sizes[:, None], logits, -torch.inf).softmax(-1)

    def mean(self, m: int, state: Tensor, node: Tensor) -> Tensor:
        """Mean content of member m: at all N slots, of which one is read, [b, D]."""
        every = self.actors_c[m](state)
        return self.c.z_max * torch.tanh(every[torch.arange(len(node)), node])

    @staticmethod
    def draw(pi: Tensor, uniform: Tensor) -> Tensor:
        return torch.tensor([int((row.cumsum(0) <= u * row.sum()).sum()) for row, u in zip(pi, uniform, strict=True)])

    def draws(self, batches: list[Any]) -> list[tuple[Tensor, Tensor]]:
        """Noise and uniform numbers of some batches, which are drawn before any of them is rolled out."""
        nodes = [len(batch["graphs"].batch) for batch in batches]
        noise = torch.randn(sum(nodes), self.gnn.feature_width, dtype=self.dtype)
        uniform = torch.rand(sum(nodes), dtype=torch.float64)
        return list(zip(noise.split(nodes), uniform.split(nodes), strict=True))

    @torch.no_grad()
    def roll_out(self, m: int, batch: Any, noise: Tensor, uniform: Tensor) -> dict[str, Any]:
        graphs, c = batch["graphs"], self.c
        sizes = torch.bincount(graphs.batch).tolist()
        n, first, steps, count = torch.tensor(sizes), np.cumsum([0, *sizes]), max(sizes), len(sizes)
        zeros = lambda *shape: torch.zeros(count, steps, *shape, dtype=self.dtype)  # noqa: E731
        states, content = zeros(self.nodes, self.gnn.width), zeros(self.gnn.feature_width)
        log_d, log_c, done = zeros(), zeros(), zeros()
        node = torch.zeros(count, steps, dtype=torch.long)
        losses = torch.zeros(count, steps + 1, dtype=self.dtype)
        prompts = torch.zeros(len(graphs.batch), self.gnn.feature_width, dtype=self.dtype)
        losses[:, 0] = self.task_loss(batch, prompts)
        for t in range(steps):
            at = [int(first[i]) + min(t, sizes[i] - 1) for i in range(count)]  # what a finished graph does is ignored
            state = self.state(graphs, prompts, sizes)
            pi = self.pi(m, state, n)
            a = self.draw(pi, uniform[at])
            mean = self.mean(m, state, a)
            z = mean + self.std * noise[at]
            z = z.clamp(-c.z_max, c.z_max) if c.clamp_content else z
            for i in range(count):
                if t < sizes[i]:
                    prompts[first[i] + a[i]] += z[i]
            states[:, t], node[:, t], content[:, t] = state, a, z
            log_d[:, t] = Categorical(pi).log_prob(a)
            log_c[:, t] = Normal(mean, self.std).log_prob(z).sum(-1)
            done[:, t] = (n == t + 1).to(self.dtype)
            losses[:, t + 1] = self.task_loss(batch, prompts)
        valid = torch.arange(steps) < n[:, None]
        following = torch.cat([states[:, 1:], states[:, -1:]], 1)
        rewards = losses[:, :-1] - losses[:, 1:]
        if c.reward_clip is not None:
            rewards = rewards.clamp(-c.reward_clip, c.reward_clip)
        found = {
            "state": states[valid], "node": node[valid], "content": content[valid], "log_d": log_d[valid],
            "log_c": log_c[valid], "reward": rewards[valid], "done": done[valid], "size": n.repeat_interleave(n),
        }  # fmt: skip
        found["advantage"], found["return"] = self.advantage(found, following[valid], sizes)
        return found

    def scale(self, reward: float) -> float:
        """Count a reward and scale it by the mean and population deviation of all that were counted."""
        self.running.append(reward)
        return (reward - float(np.mean(self.running))) / (float(np.std(self.running)) + 1e-8)

    def advantage(self, found: dict[str, Any], following: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
        c, rewards = self.c, found["reward"].tolist()
        if not self.running:
            self.running += rewards
        scaled = torch.tensor([self.scale(r) for r in rewards], dtype=self.dtype)
        value = self.critic(found["state"].flatten(1)).squeeze(-1)
        ahead = self.critic(following.flatten(1)).squeeze(-1)
        delta = scaled + c.gamma * (1 - found["done"]) * ahead - value
        advantage, last = torch.zeros_like(delta), 0.0
        for t in reversed(range(len(delta))):
            last = delta[t] + c.gamma * c.gae_lambda * (1 - found["done"][t]) * last
            advantage[t] = last
        return advantage, advantage + value

    # --- updates ------------------------------------------------------------------------------------------------------
    def learn(self, m: int, found: dict[str, Any]) -> None:
        c, n = self.c, len(found["node"])
        if n <= c.minibatch:
            return
        found = found | {
            "advantage": (found["advantage"] - found["advantage"].mean()) / (found["advantage"].std() + 1e-8)
        }
        parameters = [p for group in self.adams[m].param_groups for p in group["params"]]
        for _ in range(c.ppo_passes):
            order, moved_d, moved_c, count = torch.randperm(n), 0.0, 0.0, n // c.minibatch
            for k in range(count):
                rows = order[k * c.minibatch : (k + 1) * c.minibatch]
                loss, kl_d, kl_c = self.loss(m, {key: value[rows] for key, value in found.items()})
                self.adams[m].zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, c.max_grad_norm)
                self.adams[m].step()
                moved_d, moved_c = moved_d + kl_d, moved_c + kl_c
            if moved_d / count > c.target_kl_d or moved_c / count > c.target_kl_c:
                break

    def loss(self, m: int, b: dict[str, Any]) -> tuple[Tensor, float, float]:
        c, a = self.c, b["advantage"]
        pi = self.pi(m, b["state"], b["size"])
        now_d = Categorical(pi)
        log_d = now_d.log_prob(b["node"]) - b["log_d"]
        log_c = Normal(self.mean(m, b["state"], b["node"]), self.std).log_prob(b["content"]).sum(-1) - b["log_c"]

        def clipped(ratio: Tensor, eps: float) -> Tensor:
            return -torch.min(ratio * a, ratio.clamp(1 - eps, 1 + eps) * a)

        loss_d = clipped(log_d.exp(), c.eps_d) - self.entropy_weight * now_d.entropy()
        loss_c = clipped(log_c.exp(), c.eps_c)
        if c.members > 1:
            with torch.no_grad():
                best = torch.stack([self.pi(k, b["state"], b["size"]) for k in range(c.members)]).amax(0)
                joint = best / best.sum(-1, keepdim=True)
                top = best.argmax(-1)
            real = (torch.arange(self.nodes) < b["size"][:, None]).to(self.dtype)
            p, q = (F.normalize((x + 1e-10) * real, p=1, dim=-1) for x in (joint, pi))
            loss_d = loss_d + c.alpha_d * F.kl_div((q + (1 - real)).log(), p, reduction="none").sum(-1)
            own = self.mean(m, b["state"], top)
            with torch.no_grad():
                target = torch.stack([self.mean(k, b["state"], top) for k in range(c.members)]).mean(0)
            loss_c = loss_c + c.alpha_c * kl_divergence(Normal(own, self.std), Normal(target, self.std)).sum(-1)
        loss_v = c.critic_weight * F.mse_loss(self.critic(b["state"].flatten(1)).squeeze(-1), b["return"])
        with torch.no_grad():
            kl_d, kl_c = ((log.exp() - 1 - log).mean().item() for log in (log_d, log_c))
        return loss_d.mean() + loss_c.mean() + loss_v, kl_d, kl_c

    # --- the head -----------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def joint_prompts(self, graphs: Any, uniform: Tensor) -> Tensor:
        sizes = torch.bincount(graphs.batch).tolist()
        n, first = torch.tensor(sizes), np.cumsum([0, *sizes])
        prompts = torch.zeros(len(graphs.batch), self.gnn.feature_width, dtype=self.dtype)
        for t in range(max(sizes)):
            state = self.state(graphs, prompts, sizes)
            best = torch.stack([self.pi(k, state, n) for k in range(self.c.members)]).amax(0)
            a = self.draw(best, uniform[[int(first[i]) + min(t, sizes[i] - 1) for i in range(len(sizes))]])
            z = torch.stack([self.mean(k, state, a) for k in range(self.c.members)]).mean(0)
            for i in range(len(sizes)):
                if t < sizes[i]:
                    prompts[first[i] + a[i]] += z[i]
        return prompts

    def train_head(self, batch: Any) -> None:
        graphs, labels = batch["graphs"], batch["labels"]
        prompts = self.joint_prompts(graphs, torch.rand(len(graphs.batch), dtype=torch.float64))
        with torch.no_grad(), dropping(self.gnn, self.c.backbone_dropout):
            h = self.gnn.encode(self.gnn.embed(graphs).to(self.dtype) + prompts, graphs)
        logits = self.head(self.gnn.readout(h, graphs))
        if self.c.task == "multiclass":
            loss = F.cross_entropy(logits, labels)
        else:
            known = labels >= 0
            loss = F.binary_cross_entropy_with_logits(logits[known], labels[known].to(self.dtype))
        self.head_adam.zero_grad()
        loss.backward()
        self.head_adam.step()
