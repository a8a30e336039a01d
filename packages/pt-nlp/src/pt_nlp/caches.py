"""Prompts as keys and values in front of a cache.

A prompt of input embeddings that nothing in front of it reads has keys and values of its own: they are computed once for the
whole batch, with gradient in training, and stored on the handle at inference. Trained keys and values (prefix tuning, P-tuning
v2) are taken as they are. To the outside a cache's length counts real tokens only.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticLayer

from pt_core.attachment import Forward, Handle
from pt_core.errors import InputError
from pt_nlp.carried import Carried
from pt_nlp.models import Model, checkpoints_blocks, decoder_blocks, device_of, window_of


@functools.cache
def _hiding(kind: type[Cache]) -> type[Cache]:
    """The class of a cache whose first `pt_prefix` slots belong to a prompt: to the outside its length counts real tokens."""

    class Hiding(kind):  # type: ignore[misc, valid-type]
        pt_kind = kind
        pt_prefix: int
        pt_ahead: int  # slots of the first call, if its padding on the left stands in front of the prompt; else 0
        pt_owner: tuple[int, ...]
        pt_inside = False  # while the model itself reads it

        def get_seq_length(self, layer_idx: int = 0) -> Any:
            length = super().get_seq_length(layer_idx)
            return length if self.pt_inside else length - self.pt_prefix

        def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
            if not self.pt_inside and getattr(self, "is_compileable", False):
                raise InputError(
                    "`generate` asks a static cache for its size, prompt included",
                    remedy="Do not ask for one: leave its cache dynamic",
                )
            if not self.pt_inside:
                raise InputError("the cache was filled under a prompt", remedy="Start from an empty cache")
            sizes: tuple[int, int] = super().get_mask_sizes(query_length, layer_idx)
            return sizes

        def reset(self) -> None:
            super().reset()
            for layer in getattr(self, "layers", ()):
                if isinstance(layer, DynamicLayer) and layer.is_initialized:  # older versions zero it at its length
                    layer.keys = layer.values = None
                    layer.is_initialized = False
            self.pt_prefix = 0

        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            copied: Any = object.__new__(type(self))
            memo[id(self)] = copied
            vars(copied).update(copy.deepcopy(vars(self), memo))
            return copied

        def __reduce__(self) -> NoReturn:
            raise InputError(
                "a cache that was filled under a prompt cannot be pickled: which prompt it was, this process alone knows",
                remedy="Save the prompt's artifact, and fill a cache under it where it is needed",
            )

    Hiding.__name__ = kind.__name__
    return Hiding


def kind_of(cache: Any) -> type[Any]:
    """The class of a cache as its maker knows it."""
    kind: type[Any] = getattr(cache, "pt_kind", type(cache))
    return kind


def mark(cache: Any, carried: Carried, ahead: int = 0) -> None:
    """Say that the first slots of a cache are these prompts, and hide them from its length."""
    cache.__class__ = _hiding(kind_of(cache))  # type: ignore[arg-type]
    cache.pt_prefix, cache.pt_ahead, cache.pt_owner = carried.longest, ahead, carried.owner


@contextmanager
def inside(cache: Any) -> Iterator[None]:
    """In this context the model reads the cache: prompt slots count."""
    if not hasattr(cache, "pt_kind"):
        yield
        return
    cache.pt_inside = True
    try:
        yield
    finally:
        cache.pt_inside = False


def seen(cache: Any) -> int:
    """Real tokens in a cache (for a recurrent model without attention: whether there are any)."""
    if cache is None:
        return 0
    try:
        return int(cache.get_seq_length())
    except ValueError:  # states have no length
        return int(cache.has_previous_state())


def seen_in(cache: Any, carried: Carried) -> int:
    """Real tokens in a cache of these prompts (see `seen`).

    Raises:
        InputError: they were read without these prompts.
    """
    past = seen(cache)
    if past and getattr(cache, "pt_owner", None) != carried.owner:
        raise InputError(
            "the cache was filled without this prompt, or under another one", remedy="Start from an empty cache"
        )
    return past


def prefix_layers(
    base: Model, original: Forward, carried: Carried, batch: int, dtype: torch.dtype
) -> list[DynamicLayer]:
    """Keys and values of the batch's prompts for every layer, [b, h, longest, d_h] each, as filled cache layers."""
    blocks = decoder_blocks(base)
    per_handle = [
        None if not length else key_values_of(base, original, handle, blocks, dtype)
        for handle, length in zip(carried.handles, carried.lengths, strict=True)
    ]
    template = next(kv for kv in per_handle if kv is not None)
    empty = [(k[:, :0], v[:, :0]) for k, v in template]
    filled = [kv if kv is not None else empty for kv in per_handle]
    layers = []
    for i in range(len(blocks)):
        keys, values = (carried.gather([kv[i][j] for kv in filled], dim=1).expand(batch, -1, -1, -1) for j in (0, 1))
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        layers.append(layer)
    return layers


def key_values_of(
    base: Model, original: Forward, handle: Handle | None, blocks: nn.ModuleList, dtype: torch.dtype
) -> list[tuple[Tensor, Tensor]] | None:
    """One prompt's keys and values for every layer, [h, m, d_h] each; None for no prompt.

    Without gradient those of prompt rows are stored on the handle and reused as long as the prompt's values and the
    backbone's weights are the same: at inference the prompt costs no prefill.
    """
    if handle is None:
        return None
    direct = handle.prompt.key_values()
    if direct is not None:
        return [
            (k.to(device_of(block), dtype), v.to(device_of(block), dtype))
            for block, (k, v) in zip(blocks, (kv.unbind(0) for kv in direct[: len(blocks)]), strict=True)
        ]
    rows = handle.prompt.tokens()
    if rows is None or len(rows) == 0:
        return None
    device = device_of(base.get_input_embeddings())
    stores = not torch.is_grad_enabled() and not _exporting()
    if stores:
        autocast = (torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type))
        state = (*autocast, rows.device, _state(base))
        stored = handle.store.get("key_values")
        if stored is not None and stored[0] == state and torch.equal(stored[1], rows) and len(stored[2]) >= len(blocks):
            found: list[tuple[Tensor, Tensor]] = stored[2]
            return found
    cache: Any = DynamicCache()
    arguments: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
    arguments["inputs_embeds"] = rows.to(device, dtype)[None]
    if "position_ids" in inspect.signature(original).parameters:
        arguments["position_ids"] = torch.arange(len(rows), device=device)[None]
    original(**arguments)
    computed = [(layer.keys[0], layer.values[0]) for layer in cache.layers]
    if stores:
        handle.store["key_values"] = (state, rows.clone(), computed)
    return computed


def _exporting() -> bool:
    """Whether `torch.export` traces this: its tensors lie nowhere. Before torch 2.7 one cannot tell it from compiling."""
    return bool(getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)())


@torch.compiler.disable  # where a tensor lies and what is in it is no part of a graph
def _state(base: Model) -> int:
    """A number that changes when a weight or buffer of the model is replaced or written to, a hook is registered or removed, or
    an adapter of peft's is switched, merged or scaled.

    What is written through `.data` leaves no trace but the values: of each tensor the first is read, where that waits for no
    device.
    """
    tensors = itertools.chain(base.parameters(), base.buffers())
    weights = tuple((x.data_ptr(), 0 if x.is_inference() else x._version, _first(x)) for x in tensors)
    hooks = tuple(key for module in base.modules() for key in (*module._forward_hooks, *module._forward_pre_hooks))
    tuners = (vars(module) for module in base.modules() if "_disable_adapters" in vars(module))
    names = ("_disable_adapters", "_active_adapter", "merged_adapters", "scaling")
    return hash((weights, hooks, tuple(str(tuner.get(name)) for tuner in tuners for name in names)))


def _first(x: Tensor) -> float | None:
    """The first value of a tensor in this machine's memory; None of others, and of those that libraries pack."""
    plain = x.device.type == "cpu" and type(x) in (Tensor, nn.Parameter) and x.numel() > 0
    return x.as_strided((), ()).item() if plain else None


def cache_refused(cache: Any) -> str | None:
    """Why a prompt cannot stand in this cache as a ready prefix; None if it can."""
    if cache is None or (kind_of(cache) is DynamicCache and not getattr(cache, "offloading", False)):
        return None
    return f"the cache is a {kind_of(cache).__name__}" + " that is offloaded" * (kind_of(cache) is DynamicCache)


def check_key_values(base: Model, cache: Any, length: int) -> None:
    """Trained keys and values can only stand in a dynamic cache that every block reads as a whole."""
    if checkpoints_blocks(base) or cache_refused(cache) is not None:
        raise InputError(
            "trained keys and values need the model's own dynamic cache: not with gradient checkpointing or another cache",
            remedy="Switch gradient checkpointing off, or use a prompt of input embeddings",
        )
    window = window_of(base)
    if window is not None and length > window:
        raise InputError(
            f"prompt and text take {length} positions, the attention window of {type(base).__name__} has {window}",
            remedy="Cut the text: the last tokens would not see the trained keys and values",
        )


def check_room(cache: Any, length: int) -> None:
    """A static cache must be made with room for the prompt."""
    for layer in getattr(cache, "layers", []):
        if isinstance(layer, StaticLayer) and not layer.is_sliding and layer.max_cache_len < length:
            raise InputError(
                f"prompt and text take {length} positions, the static cache has {layer.max_cache_len}",
                remedy="Make it larger by the length of the prompt",
            )
