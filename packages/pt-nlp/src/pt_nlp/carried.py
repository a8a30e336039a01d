"""The prompts that one call of a backbone carries, and what the call's tokens are.

Rows of a batch may carry different prompts (`route`), padded on the left to the longest. Two contexts say more about the tokens
than the model's own arguments do: which are source, for offsets by source position (`source_tokens`), and whose last states
are read (`reads`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pt_core.attachment import Forward, Handle, Rows
from pt_core.errors import InputError
from pt_core.tokens import BlockPrompt
from pt_nlp.models import RELATIVE_POSITIONS, Model, embed_ids, positions_of


@dataclass
class Carried:
    """The prompts of one batch: row i carries `handles[index[i]]`, left-padded to the longest.

    Args:
        handles: the distinct handles; None for rows without a prompt.
        index: [b] long, which handle each row carries; None where all rows carry the first.
        lengths: positions of each handle.
        owner: tells this choice of prompts from others, for caches.
    """

    handles: list[Handle | None]
    index: Tensor | None
    lengths: list[int]
    owner: tuple[int, ...]

    @classmethod
    def of(cls, rows: Rows, batch: int, device: torch.device, what: str = "") -> Carried:
        """Spread `rows` over a batch. With `what` only prompts that offer it take positions.

        Raises:
            InputError: the batch is empty, or not of as many rows as prompts or a multiple of it.
        """
        if not batch:
            raise InputError("the batch has no rows", remedy="Leave out calls without texts")
        if len(rows) == 1 or all(h is rows[0] for h in rows):
            rows, handles, index = rows[:1], [rows[0]], None
        else:
            if batch % len(rows):
                raise InputError(
                    f"{len(rows)} prompts were routed to a batch of {batch} rows",
                    remedy="Route one prompt, or one for each row (None for none)",
                )
            handles = list(dict.fromkeys(rows))
            places = torch.tensor([handles.index(h) for h in rows], device=device)
            index = places.repeat_interleave(batch // len(rows))  # beams of a row follow each other
        takes = [h is not None and (not what or h.prompt.offers(what)) for h in handles]
        lengths = [h.prompt.length if h is not None and t else 0 for h, t in zip(handles, takes, strict=True)]
        return cls(handles, index, lengths, tuple(id(h) for h in rows))

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def row_lengths(self, device: torch.device) -> Tensor:
        """[b or 1] number of prompt positions of each row."""
        lengths = torch.tensor(self.lengths, device=device)
        return lengths if self.index is None else lengths[self.index]

    def mask(self, batch: int, like: Tensor) -> Tensor:
        """[b, longest], 1 where a row has a prompt position; shorter prompts are padded on the left."""
        lengths = self.row_lengths(like.device)
        slots = torch.arange(self.longest, device=like.device)
        return (slots[None] >= self.longest - lengths[:, None]).to(like.dtype).expand(batch, -1)

    def gather(self, parts: list[Tensor], dim: int) -> Tensor:
        """Pad each handle's part on the left along `dim` to the longest, and give every row its own: [b or 1, ...]."""
        padded = []
        for part, length in zip(parts, self.lengths, strict=True):
            if length < self.longest:
                shape = list(part.shape)
                shape[dim] = self.longest - length
                part = torch.cat([part.new_zeros(shape), part], dim=dim)
            padded.append(part)
        stacked = torch.stack(padded)
        return stacked if self.index is None else stacked[self.index.to(stacked.device)]

    def offset(self, embeds: Tensor, source: Tensor) -> Tensor:
        """Add each row's offset to the embeddings [b, n, d] of its source tokens.

        Args:
            embeds: of this call's tokens.
            source: [b, past + n] mask; what is in a cache counts for the positions.
        """
        n, position = embeds.shape[1], positions_of(source)
        for i, handle in enumerate(self.handles):
            own = position if self.index is None else position * (self.index == i)[:, None]  # others may be longer
            delta = None if handle is None else handle.prompt.offset(own)
            if delta is not None:
                rows = source.bool() if self.index is None else source.bool() & (self.index == i)[:, None]
                embeds = embeds + torch.where(rows[:, -n:, None], delta[:, -n:].to(embeds), 0)
        return embeds

    @property
    def has_offset(self) -> bool:
        return any(h is not None and h.prompt.offers("offset") for h in self.handles)


# Which input tokens are source (text that is read) rather than target (text that is learned to be written): offsets by
# source position must not touch targets. Set by whoever knows (labels at the head, or a method); None: all tokens are.
SOURCE: ContextVar[Tensor | None] = ContextVar("pt_nlp_source", default=None)


@contextmanager
def source_tokens(mask: Tensor | None) -> Iterator[None]:
    """In this context the input tokens in `mask` ([b, n], 1 = source) are source; the others are targets.

    A call of k times as many rows repeats each row k times (beams, label words); tokens behind the mask are targets. Tokens in
    a cache count: the mask is that of the whole text, in however many calls it is read.
    """
    token = SOURCE.set(mask)
    try:
        yield
    finally:
        SOURCE.reset(token)


def source_among(mask: Tensor) -> Tensor:
    """Source tokens among those of a call with this attention mask, [b, n]."""
    source = SOURCE.get()
    if source is None:
        return mask
    source = source.to(mask).repeat_interleave(len(mask) // len(source), 0)
    return nn.functional.pad(source, (0, mask.shape[1] - source.shape[1])) * mask


READ: ContextVar[Tensor | None] = ContextVar("pt_nlp_read", default=None)


@contextmanager
def reads(where: Tensor) -> Iterator[None]:
    """In this context only the last states of these tokens ([b, n], true = read) are read: all others may be zero."""
    token = READ.set(where)
    try:
        yield
    finally:
        READ.reset(token)


def prompted(
    selected: Callable[[], Rows | None], call: Callable[[Forward, list[str], dict[str, Any], Rows], Any]
) -> Callable[[Forward], Forward]:
    """A forward that is `call(original, names, arguments, rows)` where `selected` names prompts, and the original elsewhere.

    `names` are those of the forward's arguments. `call` returns a `ModelOutput`, which becomes a tuple if one is asked for.
    """

    def wrap(original: Forward) -> Forward:
        parameters = inspect.signature(original).parameters.values()
        names = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]

        def forward(*args: Any, **arguments: Any) -> Any:
            rows = selected()
            arguments.update(zip(names, args, strict=False))
            if rows is None:
                state: Any = arguments.get("cache_params")  # other caches refuse by themselves
                if getattr(state, "pt_owner", None) is not None and state.has_previous_state():
                    raise InputError("the cache was filled under a prompt", remedy="Start from an empty cache")
                return original(**arguments)
            as_tuple = arguments.pop("return_dict", None) is False
            output = call(original, names, arguments, rows)
            return output.to_tuple() if as_tuple else output

        return forward

    return wrap


def take_embeds(base: Model, arguments: dict[str, Any]) -> Tensor:
    """Input embeddings of a call; takes `input_ids` out of its arguments."""
    ids = arguments.pop("input_ids", None)
    embeds: Tensor = arguments.pop("inputs_embeds", None) if ids is None else embed_ids(base, ids)
    return embeds


def token_rows(carried: Carried, embeds: Tensor) -> Tensor:
    """Prompt rows for each row of the batch, [b or 1, longest, d], in the backbone's dtype."""
    parts = []
    for handle in carried.handles:
        rows = None if handle is None else handle.prompt.tokens()
        parts.append(embeds.new_zeros(0, embeds.shape[-1]) if rows is None else rows.to(embeds))
    return carried.gather(parts, dim=0)


def inner_prompts(carried: Carried) -> dict[int, Any] | None:
    """Prompts that enter inside of the tower, by block; None if there are none."""
    found = [h.prompt.blocks() for h in carried.handles if h is not None and h.prompt.offers("blocks")]
    if not found or found[0] is None:
        return None
    if carried.index is not None or carried.longest:
        raise InputError("prompts inside the tower cannot be mixed with other prompts in one batch")
    return {i: rows if isinstance(rows, BlockPrompt) else BlockPrompt(rows) for i, rows in found[0].items()}


def slots_of(carried: Carried, mask: Tensor, ahead: int) -> Tensor:
    """Which of the slots [prompt, text] stands at each place, [b, l + n], with all padding on the left in front.

    Args:
        mask: [b, n] real tokens among those of the text.
        ahead: slots of the first call; what is written later stands behind the prompt in any case.
    """
    text = mask.cumsum(1) > 0
    text[:, ahead:] = True
    return torch.cat([carried.mask(len(mask), mask).bool(), text], dim=1).long().argsort(dim=1, stable=True)


def trim(output: Any, rows: int, order: Tensor | None = None) -> Any:
    """Drop the first `rows` positions of every sequence in a base model's output.

    Attention keeps its columns, in the order of the cache. `order`: see `slots_of`; positions are put back from it first.
    """
    places = None if order is None else order.argsort(1)[:, rows:]

    def text(x: Tensor, dim: int) -> Tensor:
        if places is None:
            return x.narrow(dim, rows, x.shape[dim] - rows)
        shape = [len(places), *[1] * (x.ndim - 1)]
        shape[dim] = -1
        return x.take_along_dim(places.view(shape).to(x.device), dim)

    if rows:
        output.last_hidden_state = text(output.last_hidden_state, 1)
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(text(h, 1) for h in output.hidden_states)
        if getattr(output, "attentions", None) is not None:
            output.attentions = tuple(None if a is None else text(a, 2) for a in output.attentions)
        if getattr(output, "router_logits", None) is not None:  # of mixtures of experts, [b * n, experts]
            batch = len(output.last_hidden_state)
            output.router_logits = tuple(
                text(r.unflatten(0, (batch, -1)), 1).flatten(0, 1) for r in output.router_logits
            )
    return output


def check_equal(part: Model, carried: Carried) -> None:
    """Absolute positions that the model counts itself are right only if all rows have prompts of one length."""
    if len(set(carried.lengths)) > 1 and part.config.model_type not in RELATIVE_POSITIONS:
        raise InputError(
            f"rows of a {type(part).__name__} cannot carry prompts of unequal length",
            remedy="Run the rows of each prompt by themselves",
        )
