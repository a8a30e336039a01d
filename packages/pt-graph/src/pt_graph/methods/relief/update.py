"""What a member learns from the transitions of a rollout: the losses of a minibatch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pt_graph.methods.relief.config import RELIEFConfig
from pt_graph.methods.relief.policy import (
    ExactCritic,
    Policies,
    PooledCritic,
    discrete_kl,
    normal_kl,
    normal_log_prob,
    padded_policy,
)
from pt_graph.methods.relief.ppo import clipped, kl_estimate, ratio
from pt_graph.methods.relief.rollout import Rollout


@dataclass
class Losses:
    """Of a minibatch: `total` is what is minimised, the others say what it is made of."""

    total: Tensor
    parts: dict[str, Tensor]
    kl_d: Tensor  # estimates of how far the policies have moved since the rollout
    kl_c: Tensor


@torch.no_grad()
def best_of_others(policies: Policies, member: int, rollout: Rollout) -> Tensor:
    """max_k pi_k over all members but one, at every node of every state, [sum n_i^2]: constant while that one learns."""
    sizes = rollout.sizes.tolist()
    found = []
    for k, other in enumerate(policies):
        if k != member:
            logits = other.logits(rollout.states).split([n * n for n in sizes])
            found.append(torch.cat([a.view(n, n).softmax(-1).flatten() for n, a in zip(sizes, logits, strict=True)]))
    return torch.stack(found).amax(0)


def minibatch_losses(
    policies: Policies,
    member: int,
    critic: ExactCritic | PooledCritic,
    rollout: Rollout,
    others: Tensor | None,
    transitions: Tensor,
    advantage: Tensor,
    returns: Tensor,
    std: float,
    entropy_weight: float,
    config: RELIEFConfig,
) -> Losses:
    """L_d + L_c + L_v of member `member` on some transitions; the other members are constants.

    L_d = mean(clipped(rho_d, A) - c_ent H(pi_d) + alpha_d KL_d),  L_c = mean(clipped(rho_c, A) + alpha_c KL_c),
    L_v = critic_weight MSE(R, V). KL_c is taken at the joint policy's likeliest node, not at the one that was drawn.

    Args:
        others: of `best_of_others`; None: no penalty (M = 1).
        transitions: [r]; they are processed from the largest graph to the smallest.
        advantage, returns: of all transitions of the rollout, [n].
        std: deviation of the contents.
    """
    own, c = list(policies)[member], config
    transitions = transitions[rollout.size[transitions].argsort(descending=True, stable=True)]
    advantage, start = advantage[transitions], rollout.start[transitions]
    index, mask = rollout.rows(transitions)
    packed = rollout.states[index]

    log_pi = padded_policy(own.logits(packed), mask, log=True)
    pi = log_pi.exp()
    log_d = log_pi.gather(1, rollout.node[transitions][:, None])[:, 0] - rollout.log_d[transitions]
    entropy = -(pi * log_pi.masked_fill(~mask, 0)).sum(-1)
    at = start + rollout.node[transitions]
    if others is not None:  # the contents at the joint policy's likeliest nodes are computed along with the drawn ones
        with torch.no_grad():
            best = torch.maximum(torch.zeros_like(pi).masked_scatter(mask, others[index]), pi)
        at = torch.cat([at, start + best.argmax(-1)])
    mean = own.mean(rollout.states[at])
    log_c = normal_log_prob(rollout.content[transitions], mean[: len(start)], std) - rollout.log_c[transitions]

    loss_d = clipped(ratio(log_d), advantage, c.eps_d) - entropy_weight * entropy
    loss_c = clipped(ratio(log_c), advantage, c.eps_c)
    loss_v = c.critic_weight * F.mse_loss(critic(rollout, packed, mask, transitions), returns[transitions])
    parts = {"entropy": entropy.mean(), "value_loss": loss_v}
    if others is not None:
        mean, h = mean[len(start) :], rollout.states[at[len(start) :]]
        with torch.no_grad():
            joint = best / best.sum(-1, keepdim=True)
            means = [mean.detach() if k == member else other.mean(h) for k, other in enumerate(policies)]
            target = torch.stack(means).mean(0)
        apart_d, apart_c = discrete_kl(joint, pi, mask, c.discrete_kl), normal_kl(mean, std, target, std)
        loss_d, loss_c = loss_d + c.alpha_d * apart_d, loss_c + c.alpha_c * apart_c
        parts |= {"joint_kl_d": apart_d.mean(), "joint_kl_c": apart_c.mean()}
    with torch.no_grad():
        kl_d, kl_c = kl_estimate(log_d), kl_estimate(log_c)
    return Losses(loss_d.mean() + loss_c.mean() + loss_v, parts, kl_d, kl_c)
