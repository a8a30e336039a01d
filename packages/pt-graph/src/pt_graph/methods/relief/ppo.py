"""The arithmetic of H-PPO with an ensemble: advantages, reward scaling, clipped losses, parts of members, schedules."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def advantages(rewards: Tensor, values: Tensor, sizes: Sequence[int], gamma: float, gae_lambda: float) -> Tensor:
    """Generalised advantages [n] of episodes that lie one after the other, episode i with `sizes[i]` steps.

    delta_t = r_t + gamma V(s_t+1) - V(s_t) and A_t = delta_t + gamma lambda A_t+1; both look ahead within an episode only.

    Args:
        rewards, values: r_t and V(s_t), [n].
    """
    lengths = torch.as_tensor(list(sizes), device=rewards.device)
    mask = torch.arange(int(lengths.max()), device=rewards.device) < lengths[:, None]
    r, v = (torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_scatter(mask, x) for x in (rewards, values))
    ahead = torch.cat([v[:, 1:], torch.zeros_like(v[:, :1])], 1)  # zero after an episode's end
    delta = (r + gamma * ahead - v) * mask
    found, last = torch.empty_like(delta), torch.zeros_like(delta[:, 0])
    for t in reversed(range(delta.shape[1])):
        last = delta[:, t] + gamma * gae_lambda * last
        found[:, t] = last
    return found[mask]


class RewardScaler:
    """Rewards minus their running mean, over their running (population) deviation + 1e-8; one for each epoch.

    The first rollout's rewards are counted before they are scaled, and are counted again while they are.
    """

    def __init__(self) -> None:
        self.count, self.mean, self.squares, self.std = 0, 0.0, 0.0, 0.0

    def _count(self, reward: float) -> None:
        """Welford's update; the deviation of the very first reward is the reward itself, as released."""
        self.count += 1
        gap = reward - self.mean
        self.mean += gap / self.count
        self.squares += gap * (reward - self.mean)
        self.std = math.sqrt(self.squares / self.count) if self.count > 1 else reward

    def __call__(self, rewards: Tensor) -> Tensor:
        """Scaled rewards [n], in order."""
        values = rewards.tolist()
        if self.count == 0:
            for reward in values:
                self._count(reward)
        scaled = []
        for reward in values:
            self._count(reward)
            scaled.append((reward - self.mean) / (self.std + 1e-8))
        return rewards.new_tensor(scaled)


def standardise(values: Tensor) -> Tensor:
    """(A - mean) / (std + 1e-8), with the unbiased deviation."""
    return (values - values.mean()) / (values.std() + 1e-8)


def ratio(log_ratio: Tensor) -> Tensor:
    """rho of log rho, which is cut where rho or the squared norm of its gradient would overflow (31 in float32).

    A content of D coordinates whose deviation is small has a density that grows or falls by many orders of magnitude within
    one pass; where the advantage is negative, rho is not clipped from above.
    """
    return log_ratio.clamp(max=0.35 * math.log(torch.finfo(log_ratio.dtype).max)).exp()


def clipped(ratio: Tensor, advantage: Tensor, epsilon: float) -> Tensor:
    """PPO's loss of each transition, -min(rho A, clip(rho, 1 - eps, 1 + eps) A)."""
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage)


def kl_estimate(log_ratio: Tensor) -> Tensor:
    """Mean of (rho - 1) - log rho: how far a policy has moved from the one that acted."""
    return (log_ratio.exp() - 1 - log_ratio).mean()


def member_parts(order: Sequence[int], members: int, overlap: float, repo_compat: bool = False) -> list[list[int]]:
    """What each member trains on: its block of the shuffled graphs and the end of every other block.

    Blocks have floor(n / M) graphs, the last one also the rest; int(overlap * floor(n / M)) graphs are taken of each
    other block. Where that is 0, nothing is taken (`repo_compat`: everything, as a slice from -0 does).
    """
    size = len(order) // members
    blocks = [list(order[m * size : (m + 1) * size if m < members - 1 else None]) for m in range(members)]
    shared = int(overlap * size)
    ends = [block if shared == 0 and repo_compat else block[len(block) - shared :] for block in blocks]
    return [blocks[m] + [g for k in range(members) if k != m for g in ends[k]] for m in range(members)]


def remaining(epoch: int, epochs: int) -> float:
    """1 - (e - 1) / E of the 1-based epoch e."""
    return 1 - (epoch - 1) / epochs


def log_std_at(epoch: int, epochs: int, first: float, final: float) -> float:
    """Log-deviation of the contents in epoch e: from `first` towards `final`, which is not reached."""
    return first + (final - first) * (epoch - 1) / epochs
