"""What is trained: prompts, as modules of tensors that own no backbone.

A prompt says what it offers and a backbone family puts it in its place (`pt_core.attachment`):

    tokens()      [m, d]                     rows in front of the input embeddings
    key_values()  [layers, 2, h, m, d_h]     keys and values that every layer attends to, no query rows
    offset(i)     [..., d]                   what is added to the input embedding at source position i
    blocks()      {block: [m, d]}            rows inserted before block `block` of a tower

Prompts stay float32 whatever the backbone's dtype is, also when it is cast while it carries them; they are cast where they
are used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Self

import torch
from torch import Tensor, nn

from pt_core.errors import InputError


class Prompt(nn.Module):
    """Base of everything that can be attached to a backbone. A subclass overrides what it offers."""

    is_prompt = True  # fingerprints of a backbone leave out what is attached to it
    length: int = 0  # positions that the prompt adds in front of the input

    def tokens(self) -> Tensor | None:
        """Rows in front of the input embeddings, [length, d]."""
        return None

    def key_values(self) -> Tensor | None:
        """Keys and values for every layer, [layers, 2, kv_heads, length, head_dim]."""
        return None

    def offset(self, position: Tensor) -> Tensor | None:
        """What is added to the embedding of the source token at `position` (long, any shape): [*position.shape, d]."""
        return None

    def blocks(self) -> Mapping[int, Tensor] | None:
        """Rows [m, d] that are inserted in front of the tokens before block `index`, by index."""
        return None

    def offers(self, what: str) -> bool:
        """Whether the prompt gives `what` (the name of one of the four methods above). Computes nothing."""
        return getattr(type(self), what) is not getattr(Prompt, what)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As any module's, but a cast to half precision (`model.half()`) moves without rounding."""

        def kept(x: Tensor) -> Tensor:
            made = fn(x)
            return x.to(made.device) if made.dtype in (torch.float16, torch.bfloat16) else made

        moved: Self = super()._apply(kept, recurse)  # type: ignore[no-untyped-call]
        return moved

    def count(self) -> int:
        """Number of trainable values."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by learning-rate group; disjoint and complete."""
        return {"prompt": [p for p in self.parameters() if p.requires_grad]}


def tile(rows: Tensor, length: int) -> Tensor:
    """Repeat `rows` [k, d] until there are `length` of them, then cut: the usual start from the embeddings of a text."""
    if rows.ndim != 2 or len(rows) == 0:
        raise InputError(f"a prompt cannot start from rows of shape {tuple(rows.shape)}", remedy="Pass [k, d], k > 0")
    return rows.repeat(math.ceil(length / len(rows)), 1)[:length].detach().float().clone()


class SoftPrompt(Prompt):
    """Trained rows in front of the input embeddings: H = [P; E(x)].

    Args:
        length: m, number of rows.
        dim: d, width of the backbone's input embeddings.
        init: [m, d] start values; without it N(0, std^2).
        std: standard deviation of the random start (1.0: the default of peft).

    Parameters: m * d. Source: Lester et al. 2021, section 2.
    """

    def __init__(
        self,
        length: int,
        dim: int,
        init: Tensor | None = None,
        std: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if init is None:
            init = torch.randn(length, dim, generator=generator) * std
        if tuple(init.shape) != (length, dim):
            raise InputError(f"the start values have shape {tuple(init.shape)}, the prompt is [{length}, {dim}]")
        self.length = length
        self.weight = nn.Parameter(init.detach().float().clone())

    def tokens(self) -> Tensor:
        return self.weight

    def extra_repr(self) -> str:
        return f"length={self.length}, dim={self.weight.shape[1]}"


class DeepPrompt(Prompt):
    """Trained rows that are inserted in front of the tokens before chosen blocks of a tower.

    Args:
        blocks: indices of the blocks (0 is the first).
        length: m rows for each of them.
        dim: d, width of the tower.
        std: standard deviation of the random start.

    Parameters: len(blocks) * m * d.
    """

    def __init__(
        self,
        blocks: list[int],
        length: int,
        dim: int,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if len(set(blocks)) < len(blocks) or min(blocks, default=0) < 0:
            raise InputError(f"prompts for blocks {blocks}", remedy="Name each block once, from 0")
        self.indices = sorted(blocks)
        self.weight = nn.Parameter(torch.randn(len(blocks), length, dim, generator=generator) * std)

    def blocks(self) -> Mapping[int, Tensor]:
        return dict(zip(self.indices, self.weight.unbind(0), strict=True))

    def extra_repr(self) -> str:
        return f"blocks={self.indices}, length={self.weight.shape[1]}, dim={self.weight.shape[2]}"


class KeyValuePrompt(Prompt):
    """Trained keys and values in front of those of every layer: K_j = [PK_j; K_j], V_j = [PV_j; V_j].

    No query row is added; the output has the length of the input. Keys carry no rotation.

    Args:
        layers, heads, head_dim: N, key-value heads (not query heads: grouped-query attention) and their width.
        length: m, virtual tokens.
        std: standard deviation of the random start (1.0: the default of peft); 0 starts from zeros.

    Parameters: 2 * N * m * heads * head_dim. Source: Li and Liang 2021; Liu et al. 2022 (P-tuning v2).
    """

    def __init__(
        self,
        layers: int,
        heads: int,
        head_dim: int,
        length: int,
        std: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.length = length
        self.weight = nn.Parameter(torch.randn(layers, 2, heads, length, head_dim, generator=generator) * std)

    def key_values(self) -> Tensor:
        return self.weight


class LowRankOffset(nn.Module):
    """A low-rank offset by position: Delta = alpha / sqrt(r) * A B, [s, d].

    Args:
        positions: s, rows of A.
        rank: r; 0 means no offset.
        dim: d.
        alpha: numerator of the scale.

    A starts kaiming-uniform with a = sqrt(5), so U(-1/sqrt(r), 1/sqrt(r)); B starts at zero, so Delta starts at zero.
    Parameters: (s + d) * r. Source: Shi and Lipani 2024 (DePT), released code for the scale and the start of A.
    """

    def __init__(
        self, positions: int, rank: int, dim: int, alpha: float = 8.0, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        bound = 1 / math.sqrt(rank) if rank else 0.0
        self.scale = alpha / math.sqrt(rank) if rank else 0.0
        self.A = nn.Parameter((torch.rand(positions, rank, generator=generator) * 2 - 1) * bound)
        self.B = nn.Parameter(torch.zeros(rank, dim))

    def forward(self) -> Tensor:
        """Delta, [s, d]."""
        return self.scale * (self.A @ self.B)
