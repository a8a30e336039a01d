"""Prompt rows in a sequence of hidden states: inserted, overwritten, read and dropped between the blocks of a frozen tower.

A prompt that enters at block l changes every block above it: lengths, masks, positions. `Tokens` carries all four
together, the pure functions below change them together, and `run` drives a tower's blocks over them. A backbone family
implements `BlockStack` (about 40 lines) and gets deep prompts, with a key/value cache if it is causal, from here.

    h_0 = embed(x)        h_l <- insert(h_l, P_l)  or  h_l[prompt slots] <- P_l        h_{l+1} = block_l(h_l)

Everything is exact and waits for the device at most once per pass (is anything masked at all?). Autograd records nothing
below the first trained prompt as long as the blocks are frozen (`requires_grad` off): what enters them needs no gradient,
so they save no activations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from pt_core.errors import InputError


@dataclass(frozen=True, eq=False)
class Tokens:
    """A batch of sequences between two blocks: n slots at hand, after p slots that lie in a key/value cache (p is 0 without).

    Slots are shared by the batch; which of them a row may attend, and at which position, is the row's own.

    Attributes:
        hidden: [b, n, d], the slots at hand only.
        mask: [b, p + n] bool, True where a slot may be attended.
        positions: [b, p + n] long; they grow by one from visible slot to visible slot of a row, and mean nothing in
            invisible slots. Only differences matter to rotary and relative embeddings, so a left-padded row may start
            anywhere.
        is_prompt: [p + n] bool, True where a slot holds a prompt. It lies on the CPU, so that reading and dropping never
            wait for the device. Real tokens keep their order.
        full: True if `mask` is known to be True everywhere; a stack may then leave the attention mask out.
    """

    hidden: Tensor
    mask: Tensor
    positions: Tensor
    is_prompt: Tensor
    full: bool = False

    @property
    def past(self) -> int:
        """Slots that lie in the cache: p."""
        return self.mask.shape[1] - self.hidden.shape[1]

    @classmethod
    def of(cls, hidden: Tensor, mask: Tensor | None = None, positions: Tensor | None = None, past: int = 0) -> Tokens:
        """Tokens without prompts.

        Args:
            hidden: [b, n, d] embedded inputs.
            mask: [b, past + n], non-zero where a token may be attended; None: everywhere.
            positions: [b or 1, n] positions of `hidden`; None: the slots' indices 0 .. past + n - 1.
            past: number of real tokens that earlier calls put into the cache.

        Raises:
            InputError: mask or positions do not fit the sequence.
        """
        batch, new = hidden.shape[:2]
        if mask is not None and mask.shape != (batch, past + new):
            raise InputError(
                f"attention mask is {list(mask.shape)}, the sequence is {[batch, past + new]}",
                remedy="Pass one value per real token, cached ones included and prompts left out",
            )
        if positions is not None and (
            positions.ndim != 2 or positions.shape[0] not in (1, batch) or positions.shape[1] != new
        ):
            raise InputError(
                f"positions are {list(positions.shape)}, the input is {[batch, new]}",
                remedy="Pass one position per new token",
            )
        slots = torch.arange(-past, new, device=hidden.device)
        if positions is None:
            positions = (slots + past)[None]
        elif past:
            positions = torch.cat([positions[:, :1] + slots[:past], positions], dim=1)
        return cls(
            hidden=hidden,
            mask=hidden.new_ones(batch, past + new, dtype=torch.bool)
            if mask is None
            else mask.to(hidden.device, torch.bool),
            positions=positions.expand(batch, -1),
            is_prompt=torch.zeros(past + new, dtype=torch.bool),
            full=mask is None or bool(mask.all()),
        )


def insert(tokens: Tokens, prompt: Tensor, at: int = 0, visible: bool | Tensor = True) -> Tokens:
    """Put prompt rows in front of slot `at`.

    The visible ones take the position that the first visible slot at or after `at` had, and count on; real tokens at or
    after `at` shift by the number of visible prompts, so invisible prompts move nobody. `at` counts slots, padding and
    earlier prompts included: at = 0 in a left-padded batch lies before the padding, and still takes the positions just
    before the row's first real token, so how far a batch is padded changes no row.

    Args:
        prompt: [m, d] or [b, m, d]; cast to the dtype and device of the hidden states.
        at: 0 .. n.
        visible: bool, or [m] or [b, m] bool: which rows may be attended.

    Raises:
        InputError: shapes or `at` do not fit, or the tokens continue a cache.
    """
    if tokens.past:
        raise InputError("prompts cannot be inserted after a cache was filled", remedy="Insert them at prefill")
    rows = _rows(tokens, prompt)
    hidden = torch.cat([tokens.hidden[:, :at], rows, tokens.hidden[:, at:]], dim=1)
    return dataclasses.replace(_lay_out(tokens, rows.shape[1], at, visible), hidden=hidden)


def replace(tokens: Tokens, prompt: Tensor, slots: Sequence[int] | Tensor) -> Tokens:
    """Overwrite the hidden states of `slots` [m] with prompt rows [m, d] or [b, m, d]; mask and positions stay."""
    if tokens.past:
        raise InputError("cached slots cannot be overwritten", remedy="Replace prompts at prefill")
    rows = _rows(tokens, prompt)
    index = torch.as_tensor(slots).to(tokens.hidden.device)
    if rows.shape[1] != len(index):
        raise InputError(
            f"{rows.shape[1]} prompt rows replace {len(index)} slots",
            remedy='Give as many rows as slots; mode="renew" changes the number of prompts',
        )
    return dataclasses.replace(tokens, hidden=tokens.hidden.index_copy(1, index, rows))


def read(tokens: Tokens) -> Tensor:
    """Hidden states of the prompts at hand, [b, m, d]. Changes nothing, so a block may run twice under checkpointing."""
    return tokens.hidden[:, tokens.is_prompt[tokens.past :]]


def real(tokens: Tokens) -> Tensor:
    """Hidden states of the real tokens at hand, [b, n - m, d]: what heads and outputs may see."""
    return tokens.hidden[:, ~tokens.is_prompt[tokens.past :]]


def drop(tokens: Tokens) -> Tokens:
    """The tokens without their prompts, positions moved back: undoes every `insert`."""
    if not tokens.is_prompt.any():
        return tokens
    keep = ~tokens.is_prompt
    shift = (tokens.mask & tokens.is_prompt.to(tokens.mask.device)).cumsum(1)
    return Tokens(
        real(tokens), tokens.mask[:, keep], (tokens.positions - shift)[:, keep], tokens.is_prompt[keep], tokens.full
    )


@dataclass(frozen=True, eq=False)
class BlockPrompt:
    """What happens at the input of one block.

    Attributes:
        rows: [m, d] or [b, m, d], or a function of the `Tokens` that reach the block, for prompts that depend on the
            input (`drop(tokens)` gives it the real tokens with their mask). It is called at prefill only; at decode steps
            its rows are in the cache.
        at: slot in front of which the rows enter (see `insert`). Ignored by "replace".
        mode: "insert" adds the rows. "replace" overwrites all prompt slots that came up from the block before, as deep
            visual prompt tuning does (Jia et al. 2022, eq. 5); there must be m of them, and they stay where and as visible
            as they are. "renew" drops those slots, then inserts: for another number of prompts; no rows [0, d]: for none.
        visible: see `insert`.
        length: m; needed if `rows` is a function.
    """

    rows: Tensor | Callable[[Tokens], Tensor]
    at: int = 0
    mode: Literal["insert", "replace", "renew"] = "insert"
    visible: bool | Tensor = True
    length: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("insert", "replace", "renew"):
            raise InputError(f"unknown mode {self.mode!r}", remedy='Use "insert", "replace" or "renew"')
        if callable(self.rows) and self.length is None:
            raise InputError("a prompt made from the input has no length", remedy="Give length=, the number of rows")

    @property
    def size(self) -> int:
        """Number of rows, m."""
        return self.rows.shape[-2] if isinstance(self.rows, Tensor) else int(self.length or 0)

    def __call__(self, tokens: Tokens) -> Tokens:
        """Apply to the tokens in front of the block. Where they continue a cache, only the layout follows."""
        kept = drop(tokens) if self.mode == "renew" else tokens
        if tokens.past:
            if self.mode == "replace":
                return tokens
            if self.at > kept.past:
                raise InputError(f"prompt at slot {self.at} lies behind the {kept.past} cached slots")
            return _lay_out(kept, self.size, self.at, self.visible)
        rows = self.rows if isinstance(self.rows, Tensor) else self.rows(tokens)
        if rows.shape[-2] != self.size:
            raise InputError(f"prompt function returned {rows.shape[-2]} rows, its length is {self.size}")
        if self.mode == "replace":
            return replace(tokens, rows, tokens.is_prompt.nonzero()[:, 0])
        return insert(kept, rows, self.at, self.visible)


class BlockStack(Protocol):
    """What a backbone family implements. It holds no state of a forward pass: a pass lives in `Tokens`, context and cache."""

    @property
    def causal(self) -> bool:
        """True if a token attends to earlier slots only; a cache needs that."""

    @property
    def num_blocks(self) -> int: ...

    def embed(self, *args: Any, **inputs: Any) -> Tokens:
        """The input of block 0, without prompts."""

    def prepare(self, tokens: Tokens) -> Any:
        """What blocks need besides hidden states (attention mask, rotary embedding, relative bias) until the layout changes.
        The keys are the p cached slots and the n at hand, the queries the n at hand."""

    def block(self, index: int, hidden: Tensor, context: Any, cache: Any) -> Tensor:
        """Block `index` on [b, n, d], with the `context` of `prepare`; appends its keys and values to the cache, if any."""

    def cached(self, index: int, cache: Any) -> int:
        """Slots that the cache of block `index` holds; 0 before the first call."""

    def finish(self, hidden: Tensor) -> Tensor:
        """What follows the last block, row by row (final norm)."""


def run(
    stack: BlockStack,
    tokens: Tokens,
    prompts: Mapping[int, BlockPrompt],
    cache: Any = None,
    start: int = 0,
    stop: int | None = None,
) -> Tokens:
    """Blocks `start` .. `stop - 1`, with `prompts[l]` applied to the input of block l.

    With a cache, pass the same prompts at every step: they enter at prefill (`tokens.past == 0`), and later steps account
    for the slots they hold in the caches of the blocks above. Blocks below see the shorter sequence.

    Raises:
        InputError: a prompt for a block that is not there; a cache that other prompts filled, or for a stack that is not
            causal.
    """
    if outside := [index for index in prompts if not 0 <= index < stack.num_blocks]:
        raise InputError(f"prompts for blocks {outside}", remedy=f"Blocks are 0 .. {stack.num_blocks - 1}")
    if cache is not None and not stack.causal:
        raise InputError("a bidirectional stack cannot continue from a cache", remedy="Leave the cache out")
    blocks = range(start, stack.num_blocks if stop is None else stop)
    if cache is not None:
        _check_cache(stack, tokens, prompts, cache, blocks)
    context, laid_out = None, None
    for index in blocks:
        tokens = prompts[index](tokens) if index in prompts else tokens
        if tokens.mask is not laid_out:
            context, laid_out = stack.prepare(tokens), tokens.mask
        tokens = dataclasses.replace(tokens, hidden=stack.block(index, tokens.hidden, context, cache))
    return tokens


def _check_cache(
    stack: BlockStack, tokens: Tokens, prompts: Mapping[int, BlockPrompt], cache: Any, blocks: range
) -> None:
    """Refuse a cache that other prompts filled, before any block writes to it."""
    slots, among = tokens.past, int(tokens.is_prompt.sum())
    for index in blocks:
        if slots and index in prompts:
            prompt = prompts[index]
            more = {"insert": prompt.size, "replace": 0, "renew": prompt.size - among}[prompt.mode]
            slots, among = slots + more, among + more
        if (held := stack.cached(index, cache)) != slots:
            raise InputError(
                f"the cache of block {index} holds {held} slots, the prompts account for {slots}",
                remedy="Pass the prompts that the cache was filled with",
            )


def _rows(tokens: Tokens, prompt: Tensor) -> Tensor:
    """The prompt as [b, m, d] in the dtype and on the device of the hidden states."""
    batch, _, width = tokens.hidden.shape
    if prompt.ndim not in (2, 3) or prompt.shape[-1] != width or prompt.shape[:-2] not in ((), (1,), (batch,)):
        raise InputError(
            f"prompt is {list(prompt.shape)}, hidden states are {list(tokens.hidden.shape)}",
            remedy=f"Give [m, {width}] for the whole batch or [{batch}, m, {width}] for one prompt per row",
        )
    return prompt.to(tokens.hidden).expand(batch, -1, -1)


def _lay_out(tokens: Tokens, count: int, at: int, visible: bool | Tensor) -> Tokens:
    """Mask, positions and prompt flags with `count` more slots at `at`; hidden states stay."""
    mask, positions = tokens.mask, tokens.positions
    if not 0 <= at <= mask.shape[1]:
        raise InputError(f"prompt at slot {at}", remedy=f"Slots are 0 .. {mask.shape[1]}")
    seen = torch.as_tensor(visible, device=mask.device).bool()
    if isinstance(visible, Tensor) and seen.shape not in ((count,), (1, count), (len(mask), count)):
        raise InputError(f"visible is {list(seen.shape)}", remedy=f"Give a bool, [{count}] or [{len(mask)}, {count}]")
    seen = seen.expand(len(mask), count)
    far = 2**62  # beyond any position
    following = pad(positions.masked_fill(~mask, far)[:, at:], (0, 1), value=far).amin(1, keepdim=True)
    preceding = pad(positions.masked_fill(~mask, -1)[:, :at], (0, 1), value=-1).amax(1, keepdim=True)
    first = torch.where(following == far, preceding + 1, following)
    prompt_positions = first + seen.cumsum(1) - seen.long()
    shifted = positions[:, at:] + seen.sum(1, keepdim=True)
    return Tokens(
        hidden=tokens.hidden,
        mask=torch.cat([mask[:, :at], seen, mask[:, at:]], dim=1),
        positions=torch.cat([positions[:, :at], prompt_positions, shifted], dim=1),
        is_prompt=torch.cat([tokens.is_prompt[:at], torch.ones(count, dtype=torch.bool), tokens.is_prompt[at:]]),
        full=tokens.full and visible is True,
    )
