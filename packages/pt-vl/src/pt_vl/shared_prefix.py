"""Text towers whose sentences share a prefix: it runs once, and of the last block only what is pooled is computed.

Exact for causal towers whose blocks have parts (`open_block`, `close_block`): a prefix attends to nothing behind it. Its keys
and values serve all sentences that stand behind it; where all of them fit one pass, prefix and sentences go through the
blocks together. Values and gradients are those of the prefix in front of every sentence, up to the order of sums.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from pt_vl.towers import HFBlocks, HFText, OpenClipBlocks, OpenClipText

# Rows of prefix and sentences up to which one masked attention among all of them is taken, not one for each part: most of its
# scores are masked out, but the calls saved cost more. On 2 CPU cores it still took less time at 242 rows of ViT-B/32's text
# tower; the scores grow with their square, so the limit stays below what was measured.
ONE_ATTENTION = 160
KeyValue = tuple[Tensor, Tensor]
TextTower = HFText | OpenClipText


def prefix_keys(tower: TextTower, prefix: Tensor, deep: Mapping[int, Tensor], at: int) -> list[KeyValue]:
    """Keys and values of the prefix [G, p, d_t] in every block, [G, heads, p, d_h]."""
    found = list[KeyValue]()
    hidden = prefix + tower.positions[: prefix.shape[1]].to(prefix)
    for index in range(tower.num_blocks):
        if index in deep:
            rows = deep[index].to(hidden).expand(len(hidden), -1, -1)
            hidden = torch.cat([hidden[:, :at], rows, hidden[:, at + rows.shape[1] :]], dim=1)
        q, k, v = tower.open_block(index, hidden)
        found.append((k, v))
        if index + 1 < tower.num_blocks:  # nothing reads what the last block makes of the prefix
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            hidden = tower.close_block(index, hidden, attended.transpose(1, 2).flatten(2))
    return found


def behind(tower: TextTower, hidden: Tensor, keys: list[KeyValue], count: int, slots: Tensor) -> Tensor:
    """What the last block makes of `slots` [G * count], [G * count, d_t].

    Args:
        hidden: [G * count, n, d_t], what stands behind a prefix.
        keys: of the prefix, see `prefix_keys`.
    """
    visible = _visible(hidden, keys[0][0].shape[2])
    for index, front in enumerate(keys[:-1]):
        attended = _attend(*tower.open_block(index, hidden), front, count, visible)
        hidden = tower.close_block(index, hidden, attended.transpose(1, 2).flatten(2))
    front = _spread(keys[-1][0], count), _spread(keys[-1][1], count)
    return last_block(tower, hidden, slots, front, visible[slots][:, None, None])


def together(
    tower: TextTower, prefix: Tensor, deep: Mapping[int, Tensor], at: int, rows: Tensor, slots: Tensor
) -> Tensor:
    """`prefix_keys` and `behind` in one: every matrix of a block is read once, for the prefix and for what follows.

    Args:
        prefix: [G, p, d_t], without positions.
        rows: [G * count, n, d_t], with them.
        slots: [G * count].
    """
    (groups, p), (sentences, n) = prefix.shape[:2], rows.shape[:2]
    count = sentences // groups
    prefix = prefix + tower.positions[:p].to(prefix)
    hidden = torch.cat([prefix.flatten(0, 1), rows.flatten(0, 1)])[None]

    def over(index: int) -> Tensor:
        if index not in deep:
            return hidden
        m = len(deep[index])
        places = (torch.arange(groups)[:, None] * p + at + torch.arange(m)).flatten().to(hidden.device)
        return hidden.index_copy(1, places, deep[index].to(hidden).repeat(groups, 1)[None])

    last, own = tower.num_blocks - 1, torch.arange(sentences, device=slots.device)
    places = groups * p + own * n + slots
    if hidden.shape[1] <= ONE_ATTENTION:
        among = _visible_among(groups, p, count, n, hidden.device)
        for index in range(last):
            hidden = over(index)
            attended = F.scaled_dot_product_attention(*tower.open_block(index, hidden), attn_mask=among)
            hidden = tower.close_block(index, hidden, attended.transpose(1, 2).flatten(2))
        hidden = over(last)
        q, k, v = tower.open_block(last, hidden)
        attended = F.scaled_dot_product_attention(q[:, :, places], k, v, attn_mask=among[places])
        return tower.close_block(last, hidden[:, places], attended.transpose(1, 2).flatten(2))[0]

    visible = _visible(rows, p)

    def open_block(index: int) -> tuple[list[Tensor], list[Tensor]]:
        """Queries, keys and values of the prefix, [G, heads, p, d_h] each, and of what follows."""
        split = [x[0].split([groups * p, sentences * n], dim=1) for x in tower.open_block(index, hidden)]
        return [x.unflatten(1, (groups, p)).transpose(0, 1) for x, _ in split], [
            x.unflatten(1, (sentences, n)).transpose(0, 1) for _, x in split
        ]

    for index in range(last):
        hidden = over(index)
        (q, k, v), (queries, keys, values) = open_block(index)
        first = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        after = _attend(queries, keys, values, (k, v), count, visible)
        attended = torch.cat([x.transpose(1, 2).flatten(2).flatten(0, 1) for x in (first, after)])[None]
        hidden = tower.close_block(index, hidden, attended)
    hidden = over(last)
    (_, k, v), (queries, keys, values) = open_block(last)
    queries = queries[own, :, slots][:, :, None]
    attended = _attend(queries, keys, values, (k, v), count, visible[slots][:, None, None])
    pooled = hidden[0, places][:, None]
    return tower.close_block(last, pooled, attended.transpose(1, 2).flatten(2))[:, 0]


def last_block(
    tower: HFBlocks | OpenClipBlocks,
    hidden: Tensor,
    slots: Tensor,
    front: KeyValue | None = None,
    visible: Tensor | None = None,
) -> Tensor:
    """What the last block makes of one slot of each row, [b, d]: nothing reads what it makes of the others.

    Args:
        hidden: its input [b, n, d].
        slots: [b].
        front: keys and values of p slots in front of these, [b, heads, p, d_h].
        visible: [b, 1, 1, p + n] bool, where a row's slot attends to; None: everywhere.
    """
    index, rows = tower.num_blocks - 1, torch.arange(len(hidden), device=hidden.device)
    q, k, v = tower.open_block(index, hidden)
    if front is not None:
        k, v = torch.cat([front[0], k], dim=2), torch.cat([front[1], v], dim=2)
    attended = F.scaled_dot_product_attention(q[rows, :, slots][:, :, None], k, v, attn_mask=visible)
    made = tower.close_block(index, hidden[rows, slots][:, None], attended.transpose(1, 2).flatten(2))
    return made[:, 0]


def _spread(shared: Tensor, count: int) -> Tensor:
    """[G, heads, p, d_h] -> [G * count, heads, p, d_h]."""
    return shared[:, None].expand(-1, count, -1, -1, -1).flatten(0, 1)


def _visible(hidden: Tensor, p: int) -> Tensor:
    """[n, p + n] bool: what slots [b, n, d] behind p others attend to."""
    n = hidden.shape[1]
    return torch.ones(n, p + n, dtype=torch.bool, device=hidden.device).tril(p)


def _visible_among(groups: int, p: int, count: int, n: int, device: torch.device) -> Tensor:
    """[t, t] bool, t = groups * (p + count * n): what rows of prefixes and then of sentences attend to, all in one sequence."""
    prefixes, sentences = torch.arange(groups * p, device=device), torch.arange(groups * count * n, device=device)
    group = torch.cat([prefixes // p, sentences // (count * n)])
    sentence = torch.cat([torch.full_like(prefixes, -1), sentences // n])
    position = torch.cat([prefixes % p, p + sentences % n])
    shared = (sentence == -1) | (sentence[:, None] == sentence)  # [rows, what they look at]
    return (group[:, None] == group) & shared & (position[:, None] >= position)


def _attend(q: Tensor, k: Tensor, v: Tensor, front: KeyValue, count: int, visible: Tensor) -> Tensor:
    """Attention [G * count, heads, n, d_h] to a prefix, keys and values [G, heads, p, d_h], and to what stands behind it."""
    k, v = torch.cat([_spread(front[0], count), k], dim=2), torch.cat([_spread(front[1], count), v], dim=2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
