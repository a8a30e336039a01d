"""The networks of RELIEF: two actors for each member, their joint policy, and two critics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from pt_graph.methods.relief.rollout import Rollout

EPSILON = 1e-10  # added to probabilities before a KL divergence, as released


def _actor(widths: list[int], generator: torch.Generator) -> nn.Sequential:
    """MLP with tanh between its layers; orthogonal start with gain sqrt(2), 0.01 in the last layer; biases 0."""
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(pairwise(widths)):
        linear = nn.Linear(inputs, outputs)
        last = i == len(widths) - 2
        nn.init.orthogonal_(linear.weight, 0.01 if last else math.sqrt(2), generator=generator)
        nn.init.zeros_(linear.bias)
        layers += [linear] if last else [linear, nn.Tanh()]
    return nn.Sequential(*layers)


class Member(nn.Module):
    """A policy: which node gets a prompt, and what prompt. Both actors read one node embedding at a time.

        logit_v = actor_d(H_v)                      d -> d/2 -> d/4 -> 1
        mu_v    = z_max tanh(actor_c(H_v))          d -> d/2 -> d/2 -> D

    Args:
        width: d of the node embeddings.
        feature_width: D of a prompt.
        z_max: bound of a mean.
    """

    def __init__(self, width: int, feature_width: int, z_max: float, generator: torch.Generator) -> None:
        super().__init__()
        half, quarter = max(width // 2, 1), max(width // 4, 1)
        self.z_max = z_max
        self.actor_d = _actor([width, half, quarter, 1], generator)
        self.actor_c = _actor([width, half, half, feature_width], generator)

    def logits(self, h: Tensor) -> Tensor:
        """Of node embeddings [..., d]: [...]."""
        found: Tensor = self.actor_d(h).squeeze(-1)
        return found

    def mean(self, h: Tensor) -> Tensor:
        """Mean content [..., D] at nodes of embeddings [..., d]."""
        return self.z_max * torch.tanh(self.actor_c(h))


class Policies(nn.ModuleList):
    """The ensemble: M members that act together when prompts are made.

    The joint policy takes node v with probability max_m pi_m(v) / sum_v' max_m pi_m(v'); its content has the mean of the
    members' means and of their deviations.
    """

    def __init__(self, members: int, width: int, feature_width: int, z_max: float, generator: torch.Generator) -> None:
        super().__init__(Member(width, feature_width, z_max, generator) for _ in range(members))
        self.z_max = z_max

    def __iter__(self) -> Iterator[Member]:
        return cast(Iterator[Member], super().__iter__())

    def logits(self, h: Tensor) -> Tensor:
        """Of every member, of node embeddings [n, d]: [M, n]."""
        return torch.stack([member.logits(h) for member in self])

    def apart(self, function: Callable[[Member, Tensor], Tensor], h: Tensor, owner: Tensor) -> Tensor:
        """What each of the node embeddings [n, d] gives under the one member `owner` [n] that it belongs to."""
        order = owner.argsort(stable=True)
        parts = h[order].split(torch.bincount(owner, minlength=len(self)).tolist())
        found = torch.cat([function(member, own) for member, own in zip(self, parts, strict=True) if len(own)])
        return torch.empty_like(found).index_copy_(0, order, found)

    def joint(self, logits: Tensor, mask: Tensor) -> Tensor:
        """Joint probabilities [b, N] of packed logits [M, n], `mask` [b, N] telling where they stand."""
        return joint_policy(torch.stack([padded_policy(own, mask) for own in logits]))

    def mean(self, h: Tensor) -> Tensor:
        """Mean over members of the mean content, [..., D]."""
        return torch.stack([member.mean(h) for member in self]).mean(0)


# --- policies and how far they are apart ----------------------------------------------------------------------------
def padded_policy(logits: Tensor, mask: Tensor, log: bool = False) -> Tensor:
    """(Log-)probabilities [b, N] of packed logits [n], n = mask.sum(); exactly 0 (-inf) where there is no node."""
    padded = logits.float() if logits.dtype is torch.bfloat16 else logits
    padded = padded.new_full(mask.shape, -torch.inf).masked_scatter(mask, padded)
    return padded.log_softmax(-1) if log else padded.softmax(-1)


def joint_policy(members: Tensor) -> Tensor:
    """max_m pi_m / sum max_m pi_m of probabilities [M, ..., N]."""
    best = members.amax(0)
    return best / best.sum(-1, keepdim=True)


def sample(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """An index for each row of [b, N], by inverting the distribution function at `uniform` [b], in the dtype of the latter."""
    reached = probabilities.to(uniform.dtype).cumsum(-1)
    last = (probabilities > 0).sum(-1) - 1  # nodes stand in front, padding has no probability
    chosen = (reached <= (uniform * reached[:, -1])[:, None]).sum(-1)
    return torch.minimum(chosen, last)


def discrete_kl(joint: Tensor, member: Tensor, mask: Tensor, direction: str = "joint-member") -> Tensor:
    """KL(joint || member), or the other way round, [b] of probabilities [b, N]; both first get 1e-10 and are normalised."""
    p, q = (((pi + EPSILON) * mask) / ((pi + EPSILON) * mask).sum(-1, keepdim=True) for pi in (joint, member))
    if direction == "member-joint":
        p, q = q, p
    gap = p.masked_fill(~mask, 1).log() - q.masked_fill(~mask, 1).log()
    return (p * gap).sum(-1)


def normal_kl(mean: Tensor, std: float, target: Tensor, target_std: float) -> Tensor:
    """KL(N(mean, std^2) || N(target, target_std^2)), summed over the last axis."""
    ratio = std / target_std
    each = 0.5 * (((mean - target) / target_std) ** 2 + ratio**2 - 1) - math.log(ratio)
    return each.sum(-1)


def normal_log_prob(z: Tensor, mean: Tensor, std: float) -> Tensor:
    """Log-density of N(mean, std^2) at z, summed over the last axis."""
    each = -0.5 * ((z - mean) / std) ** 2 - math.log(std) - 0.5 * math.log(2 * math.pi)
    return each.sum(-1)


# --- critics --------------------------------------------------------------------------------------------------------
def critic_widths(width: int, nodes: int) -> tuple[int, int, int]:
    """Input and hidden widths (I, a, b) of the exact critic: I = d N, a = int(0.05 I), b = int(0.025 I)."""
    inputs = width * nodes
    return inputs, max(int(inputs * 0.05), 1), max(int(inputs * 0.025), 1)


def critic_size(width: int, nodes: int, columns: int) -> int:
    """Weights of the exact critic with the columns of so many nodes: d columns a + a + a b + b + b + 1."""
    _, a, b = critic_widths(width, nodes)
    return width * columns * a + a + a * b + b + b + 1


class _Columns(torch.autograd.Function):
    """x W with W [d N, a], for rows of x [r, k, d] that are zero beyond their size; sizes fall along the rows.

    Only products of real nodes are formed: between two sizes, the rows that are at least as large share one product, so
    every weight is read once. The gradient of W is written to `kept`, the same memory in every backward pass, and set as
    `W.grad` here: fresh memory of this size costs more than the product.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, sizes: list[int], kept: Tensor) -> Tensor:
        x = x.flatten(1)
        width = x.shape[1] // sizes[0]
        steps: list[tuple[int, int, int]] = []  # rows, and the columns from where to where
        for row, size in enumerate(sizes):
            following = sizes[row + 1] if row + 1 < len(sizes) else 0
            if following < size:
                steps.append((row + 1, following * width, size * width))
        out = x.new_zeros(len(x), weight.shape[1])
        for rows, start, stop in steps:
            out[:rows].addmm_(x[:rows, start:stop], weight[start:stop])
        ctx.save_for_backward(x)
        ctx.weight, ctx.steps, ctx.kept = weight, steps, kept
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None, None]:
        (x,), (gradient,), weight = ctx.saved_tensors, gradients, ctx.weight
        found = ctx.kept if weight.grad is None else torch.empty_like(weight)
        for rows, start, stop in ctx.steps:
            torch.mm(x[:rows, start:stop].T, gradient[:rows], out=found[start:stop])
        found[x.shape[1] :] = 0
        weight.grad = found if weight.grad is None else weight.grad + found
        return None, None, None, None


class ExactCritic(nn.Module):
    """The released critic: MLP I -> a -> b -> 1 with ReLU on the flattened, zero-padded node embeddings (`critic_widths`).

    Columns of nodes that no training graph has never meet anything but zeros, get no gradient, and are left out: the
    values are those of the critic with all columns, which start alike, node by node.

    Args:
        width: d.
        nodes: N, which decides the hidden widths and the start (xavier-normal with gain sqrt(2), biases 0).
        columns: nodes of the largest training graph.
        seed: of the start.
    """

    def __init__(self, width: int, nodes: int, columns: int, seed: int) -> None:
        super().__init__()
        inputs, a, b = critic_widths(width, nodes)

        def start(fan_in: int, fan_out: int, rows: int, number: int) -> Tensor:
            generator = torch.Generator().manual_seed(1_000_003 * seed + number)
            return torch.randn(rows, fan_out, generator=generator) * math.sqrt(2) * math.sqrt(2 / (fan_in + fan_out))

        self.columns = nn.Parameter(torch.cat([start(inputs, a, width, 2 + node) for node in range(columns)]))
        self.bias = nn.Parameter(torch.zeros(a))
        self.hidden, self.out = nn.Linear(a, b), nn.Linear(b, 1)
        self._gradient: Tensor | None = None
        for number, linear in enumerate((self.hidden, self.out)):
            linear.weight = nn.Parameter(
                start(linear.in_features, linear.out_features, linear.in_features, number).T.contiguous()
            )
            nn.init.zeros_(linear.bias)

    def forward(self, rollout: Rollout, packed: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        """Values [r] of states given as packed node embeddings [n, d], where they stand [r, k], and their numbers."""
        padded = packed.new_zeros(*mask.shape, packed.shape[1])
        padded[mask] = packed
        return self.of(padded, mask.sum(1).tolist())

    def of(self, padded: Tensor, sizes: list[int]) -> Tensor:
        """Values [r] of zero-padded states [r, k, d] whose sizes fall."""
        kept = self._gradient
        if kept is None or (kept.device, kept.dtype) != (self.columns.device, self.columns.dtype):
            self._gradient = kept = torch.empty_like(self.columns, requires_grad=False)
        first = _Columns.apply(padded, self.columns, sizes, kept)
        found: Tensor = self.out(self.hidden((first + self.bias).relu()).relu()).squeeze(-1)
        return found

    def all(self, rollout: Rollout) -> Tensor:
        """Values [n] of all states of a rollout."""
        return torch.cat([self.of(block, [block.shape[1]] * len(block)) for block in rollout.blocks()])


class PooledCritic(nn.Module):
    """A critic of a size that is free of N, ours: MLP 2d -> d -> d/2 -> 1 with ReLU on the mean and maximum over nodes.

    Unlike the exact one it does not see the order of the nodes. Parameters: 2d^2 + d + d * (d/2) + d/2 + d/2 + 1.
    """

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        half = max(width // 2, 1)
        linears = [nn.Linear(2 * width, width), nn.Linear(width, half), nn.Linear(half, 1)]
        for linear in linears:
            nn.init.xavier_normal_(linear.weight, math.sqrt(2), generator=generator)
            nn.init.zeros_(linear.bias)
        self.layers = nn.Sequential(linears[0], nn.ReLU(), linears[1], nn.ReLU(), linears[2])

    def forward(self, rollout: Rollout, packed: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        found: Tensor = self.layers(rollout.pooled[rows]).squeeze(-1)
        return found

    def all(self, rollout: Rollout) -> Tensor:
        found: Tensor = self.layers(rollout.pooled).squeeze(-1)
        return found
