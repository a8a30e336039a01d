"""Prompt and texts of a batch as one row of a causal model, without padding.

    [prompt, text 1, text 2, ...]    l + n_1 + n_2 + ... tokens instead of b * (l + n)

Linear layers, norms and rotations treat tokens one by one: they run once, on all of them. Attention has two parts, each text
on itself and all texts on the prompt, whose outputs are summed by their shares of the softmax: no mask, no copy of the
prompt for each text, and grouped keys are not repeated. The last block computes keys and values of all tokens, and all else
only of those whose states are read. Where there are few queries or keys, one call with a mask costs less than the parts'
bookkeeping. Values and gradients are those of a prompt in every row, up to the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode

KeyValues = list[tuple[Tensor, Tensor]]  # keys and values of a prompt for each layer, [h_kv, l, d] each

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


# Pairs of query and key that one call with a mask may compute beyond those of the parts: about what their bookkeeping costs.
MASKED = 2**16


class NotPlain(Exception):
    """The model's attention is no plain call of `scaled_dot_product_attention`: it can't be computed here."""


@dataclass(frozen=True)
class Texts:
    """Where the T real tokens of a padded batch [b, n] are.

    Args:
        shape: (b, n).
        count: T.
        real: [T] their places in the flattened batch; None where there is no padding.
        width: m, tokens of the longest text.
        place: [T] their places in a flattened batch [b, m] with all padding on the right; None where that has none.
    """

    shape: tuple[int, int]
    count: int
    real: Tensor | None
    width: int
    place: Tensor | None

    @classmethod
    def of(cls, mask: Tensor) -> Texts | None:
        """The texts under a mask [b, n] of ones and zeros; None if one has holes, or all are empty."""
        batch, n = mask.shape
        real = mask.bool().cpu()  # one wait for a GPU; what follows asks for numbers again and again
        lengths = real.sum(1, keepdim=True)
        slots = torch.arange(n)
        begins = real.long().argmax(1, keepdim=True)
        total, width = int(lengths.sum()), int(lengths.max())
        if not total or not torch.equal(real, (slots >= begins) & (slots < begins + lengths)):
            return None
        return cls((batch, n), total, _places(real, mask.device), width, _places(slots[:width] < lengths, mask.device))

    @property
    def owner(self) -> Tensor:
        """[T] which text each token is of."""
        place = torch.arange(self.count) if self.place is None else self.place.cpu()
        return place // self.width

    def take(self, x: Tensor) -> Tensor:
        """The real tokens of a batch, [b, n, ...] -> [T, ...]."""
        x = x.flatten(0, 1)
        return x if self.real is None else x.index_select(0, self.real.to(x.device))

    def give(self, x: Tensor) -> Tensor:
        """The batch of these tokens, [T, ...] -> [b, n, ...]; zeros at padding."""
        if self.real is not None:
            padded = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[1:])
            x = padded.index_copy(0, self.real.to(x.device), x)
        return x.unflatten(0, self.shape)

    def pad(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """One row for each text, [1, h, T, ...] -> [b, h, m, ...], with `fill` on its right."""
        x = x[0].transpose(0, 1)
        if self.place is not None:
            padded = x.new_full((self.shape[0] * self.width, *x.shape[1:]), fill)
            x = padded.index_copy(0, self.place.to(x.device), x)
        return x.unflatten(0, (self.shape[0], self.width)).transpose(1, 2)

    def join(self, x: Tensor) -> Tensor:
        """Back again, [b, h, m, ...] -> [1, h, T, ...]."""
        x = x.transpose(1, 2).flatten(0, 1)
        if self.place is not None:
            x = x.index_select(0, self.place.to(x.device))
        return x.transpose(0, 1)[None]


def _places(real: Tensor, device: torch.device) -> Tensor | None:
    """Where a mask is true, counted through its rows; None where it is everywhere."""
    return None if bool(real.all()) else real.flatten().nonzero()[:, 0].to(device)


class SharedPrefixAttention(TorchFunctionMode):
    """While entered, causal attention of this thread is that of texts behind a shared prompt.

    Args:
        texts: what stands in the row.
        length: l, positions of the prompt: the first of the row, unless its keys and values are given.
        prompt: keys and values of a prompt that is not in the row, for each layer.
        read: which of the T tokens' last states are read, ascending; None for all.

    Raises:
        NotPlain: attention is asked for in another way than causal, over one row, without mask or dropout.
    """

    def __init__(self, texts: Texts, length: int, prompt: KeyValues | None = None, read: Tensor | None = None) -> None:
        super().__init__()
        self.texts, self.length, self.prompt, self.read = texts, length, prompt, read
        self.layers = 0  # that were computed
        self.masks: dict[tuple[int, int], Tensor] = {}
        self.pairs = texts.count * (length + texts.width) + length**2  # of the parts
        self.collects: Tensor | None = None  # `read`, in the call that ends at the last block's keys and values
        self.last: tuple[Tensor, Tensor, Tensor] | None = None  # these keys and values, of all tokens, and `read`
        self.entered: Token[SharedPrefixAttention | None]

    def __enter__(self) -> Self:
        self.entered = _ENTERED.set(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _ENTERED.reset(self.entered)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if attn_mask is not None or dropout_p or not is_causal or len(query) != 1 or query.shape[2] != key.shape[2]:
            raise NotPlain
        if torch.is_autocast_enabled(kind := query.device.type):
            query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
            with torch.autocast(kind, enabled=False):
                return self._attention(query, key, value, is_causal=True, scale=scale)
        if self.last is not None:
            key, value, read = self.last
        elif self.prompt is not None:
            # Some versions of transformers repeat grouped keys before they call, others leave that to torch.
            k, v = (x.to(key).repeat_interleave(key.shape[1] // len(x), 0)[None] for x in self.prompt[self.layers])
            key, value = torch.cat([k, key], dim=2), torch.cat([v, value], dim=2)
        if self.collects is not None:
            self.last = key, value, self.collects.to(key.device)
            raise _Collected
        self.layers += 1
        if query.shape[2] * key.shape[2] <= self.pairs + MASKED:
            q, k, v = (_wide(x) for x in (query, key, value))
            made = F.scaled_dot_product_attention(q, k, v, self._mask(q, k), scale=scale, enable_gqa=True)
            return made.to(query.dtype)
        few = query
        if self.last is not None:
            query = query.new_zeros(*few.shape[:2], self.texts.count, few.shape[3]).index_copy(2, read, few)
        if _takes_flash(query, key, value):
            made = _InParts.apply(query, key, value, self.texts, self.length, scale)  # type: ignore[no-untyped-call]
        else:
            made = with_mask(query, key, value, self.texts, self.length, scale)
        return made if self.last is None else made.index_select(2, read)

    def _mask(self, query: Tensor, key: Tensor) -> Tensor:
        """[queries, keys], 0 where a token sees another and -inf elsewhere; made once for the blocks that it serves."""
        size = query.shape[2], key.shape[2]
        if size not in self.masks:
            keys = F.pad(self.texts.owner, (self.length, 0), value=-1)  # the prompt is everybody's
            at = torch.arange(size[1])
            asked = at[size[1] - size[0] :] if self.last is None else self.last[2].cpu() + self.length
            seen = (at <= asked[:, None]) & ((keys < 0) | (keys == keys[asked][:, None]))
            self.masks[size] = torch.zeros(size, dtype=key.dtype).masked_fill(~seen, -torch.inf).to(key.device)
        return self.masks[size]

    def last_block(self, block: Callable[..., Any], read: Tensor, hidden: Tensor, *args: Any, **options: Any) -> Any:
        """A call of the last block on the tokens that are read, with keys and values of all; zeros at the others."""
        self.collects = read
        try:
            block(hidden, *args, **options)
            raise NotPlain  # attention was never asked for
        except _Collected:
            self.collects = None
        count = hidden.shape[1]
        rows = (read + (count - self.texts.count)).to(hidden.device)
        made = block(*_narrow((hidden, *args), rows, count), **_narrow(options, rows, count))
        first = made[0] if isinstance(made, tuple) else made
        states = first.new_zeros(hidden.shape).index_copy(1, rows, first)
        return (states, *made[1:]) if isinstance(made, tuple) else states


_ENTERED: ContextVar[SharedPrefixAttention | None] = ContextVar("pt_nlp_one_row", default=None)


class _Collected(Exception):
    """Keys and values of the last block are known: the rest of this call is not wanted."""


def last_block(block: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a model's last block, which computes no more than is read while `SharedPrefixAttention` is entered."""

    def forward(*args: Any, **options: Any) -> Any:
        mode = None if torch.compiler.is_compiling() else _ENTERED.get()
        if mode is None or mode.read is None:
            return block(*args, **options)
        return mode.last_block(block, mode.read, *args, **options)

    return forward


def _narrow(x: Any, rows: Tensor, count: int) -> Any:
    """These rows of all tensors in `x` that have `count` of them, in their first dimension or behind that of a batch."""
    if isinstance(x, tuple | list):
        return type(x)(_narrow(part, rows, count) for part in x)
    if isinstance(x, dict):
        return {name: _narrow(part, rows, count) for name, part in x.items()}
    if isinstance(x, Tensor) and count in x.shape[:2]:
        return x.index_select(x.shape.index(count), rows.to(x.device))
    return x


def _takes_flash(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether torch would take its flash attention for CPUs here, as it stands and as the caller's contexts allow."""
    if query.device.type != "cpu" or torch._C._are_functorch_transforms_active():
        return False
    chosen: int = torch._fused_sdp_choice(query, key, value, None, 0.0, False, enable_gqa=True)
    return chosen == SDPBackend.FLASH_ATTENTION.value


def with_mask(query: Tensor, key: Tensor, value: Tensor, texts: Texts, length: int, scale: float | None) -> Tensor:
    """The same attention as torch has it: the prompt's keys in front of those of each text, and a mask.

    Args:
        query: [1, h, T, d], or [1, h, l + T, d] with those of the prompt in front.
        key, value: [1, h_kv, l + T, d].
        texts: the T tokens.
        length: l.
        scale: of the scores; None for 1 / sqrt(d).

    Returns:
        As `query`.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    ahead = query.shape[2] + length - key.shape[2]
    keys, values = (
        torch.cat([x[:, :, :length].expand(texts.shape[0], -1, -1, -1), texts.pad(x[:, :, length:])], 2)
        for x in (key, value)
    )
    visible = torch.ones(texts.width, length + texts.width, dtype=torch.bool, device=query.device).tril(length)
    own = F.scaled_dot_product_attention(texts.pad(query[:, :, ahead:]), keys, values, attn_mask=visible, scale=scale)
    parts = [texts.join(own)]
    if ahead:
        q, k, v = (x[:, :, :length] for x in (query, key, value))
        parts.insert(0, F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale))
    return torch.cat(parts, dim=2)


class _InParts(torch.autograd.Function):
    """`with_mask` in parts that need none.

    Softmax over prompt and text is the sum of the parts' outputs weighted with exp(lse_part - lse), lse being the logarithm
    of the sum of exponentials. The gradient of a part needs only the output and the lse of the whole.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, texts: Texts, length: int, scale: float | None
    ) -> Tensor:
        given = query, key, value
        query, key, value = (_wide(x) for x in given)
        ahead = query.shape[2] + length - key.shape[2]
        own, k, v = query[:, :, ahead:], key[:, :, :length], value[:, :, :length]
        onto, onto_lse = _flash(own, k, v, 0.0, False, scale=scale)
        padded = (texts.pad(x) for x in (own, key[:, :, length:], value[:, :, length:]))
        inside, inside_lse = (texts.join(x) for x in _flash(*padded, 0.0, True, scale=scale))
        lse = torch.logaddexp(onto_lse, inside_lse)
        shares = [(part - lse).exp()[..., None] for part in (onto_lse, inside_lse)]
        output = torch.empty_like(given[0])
        output[:, :, ahead:] = torch.addcmul(onto * shares[0], inside, shares[1])
        if ahead:
            output[:, :, :ahead], first_lse = _flash(query[:, :, :ahead], k, v, 0.0, True, scale=scale)
            lse = torch.cat([first_lse, lse], dim=2)
        ctx.save_for_backward(*given, output, lse)
        ctx.rest = texts, length, ahead, scale
        return output

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *given, output, lse = ctx.saved_tensors
        texts, length, ahead, scale = ctx.rest
        of_query, of_key, of_value = (torch.empty_like(x) for x in given)
        gradient, query, key, value, output = (_wide(x) for x in (gradient, *given, output))
        k, v = key[:, :, :length], value[:, :, :length]
        g, q, o, s = (x[:, :, ahead:] for x in (gradient, query, output, lse))
        onto = _flash_backward(g, q, k, v, o, s, 0.0, False, scale=scale)
        rows = [texts.pad(x) for x in (g, q, key[:, :, length:], value[:, :, length:], o)]
        inside = _flash_backward(*rows, texts.pad(s, torch.inf), 0.0, True, scale=scale)
        torch.add(onto[0], texts.join(inside[0]), out=of_query[:, :, ahead:])
        of_key[:, :, length:], of_value[:, :, length:] = (texts.join(x) for x in inside[1:])
        if ahead:
            first = (x[:, :, :ahead] for x in (gradient, query, k, v, output, lse))
            of_query[:, :, :ahead], *first = _flash_backward(*first, 0.0, True, scale=scale)
            torch.add(onto[1], first[0], out=of_key[:, :, :length])
            torch.add(onto[2], first[1], out=of_value[:, :, :length])
        else:
            of_key[:, :, :length], of_value[:, :, :length] = onto[1:]
        return of_query, of_key, of_value, None, None, None


def _wide(x: Tensor) -> Tensor:
    """On a CPU at least float32: its kernel is several times slower at differentiating bfloat16 (texts of some 50 tokens)."""
    return x.to(torch.promote_types(x.dtype, torch.float32)) if x.device.type == "cpu" else x
