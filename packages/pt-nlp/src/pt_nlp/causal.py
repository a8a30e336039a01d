"""Prompts in causal language models.

- A prompt in front of a causal model does not attend to the input. Its keys and values are computed once for the whole
  batch (with gradient in training, stored at inference) and stand in the cache as a prefix: exact, and far cheaper than a
  prompt in every row. This is done only for model types on which it is tested (`SHARED_PREFIX`) and only where nothing
  forbids it (`shortcut_refused`: sliding windows, rotations that depend on the length, recurrence, active dropout, gradient
  checkpointing); else the plain path concatenates the prompt to the input embeddings and drops its rows from the output,
  with the same numbers, and says so once. Where windows or ALiBi count slots, padding on the left stands in front of the
  prompt and not between prompt and text: rows do not depend on the padding that others need.
- Where neither the cache nor states at padding are asked for (`reads`, as methods do in training), prompt and texts pass such
  a model as one row without padding (pt_nlp.one_row).
- Trained keys and values stand in front of every block's self-attention.

Prompts take positions 0..m-1 and real tokens follow; positions of real tokens come from the attention mask, so left and
right padding agree.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from pt_core.attachment import Forward, Rows
from pt_core.errors import InputError
from pt_nlp.caches import (
    cache_refused,
    check_key_values,
    check_room,
    inside,
    key_values_of,
    mark,
    prefix_layers,
    seen,
    seen_in,
)
from pt_nlp.carried import (
    READ,
    SOURCE,
    Carried,
    check_equal,
    inner_prompts,
    prompted,
    slots_of,
    source_among,
    source_tokens,
    take_embeds,
    token_rows,
    trim,
)
from pt_nlp.models import (
    ATTENTION_LAYERS,
    Model,
    check_length,
    checkpoints_blocks,
    decoder_blocks,
    hooks_on_rows,
    layer_types,
    position_table,
    positions_of,
    shortcut_refused,
    window_of,
)
from pt_nlp.one_row import NotPlain, SharedPrefixAttention, Texts

log = logging.getLogger(__name__)
SLOT_DISTANCES = {"mpt"}  # ALiBi from slots; BLOOM and Falcon count with the attention mask


def around_causal(base: Model, selected: Callable[[], Rows | None], writes: bool) -> Callable[[Forward], Forward]:
    """The forward of a causal base model, with the prompts that `selected` names in front of every row.

    Args:
        writes: it has a language model head, so that tokens may be targets.
    """
    return prompted(selected, partial(_causal_call, base, writes))


def _causal_call(
    base: Model, writes: bool, original: Forward, names: list[str], arguments: dict[str, Any], rows: Rows
) -> Any:
    """One call of a prompted causal model.

    The first call on an empty cache brings the prompt in, as a prefix of the cache or of the input embeddings. From then
    on it is in the cache, and only mask and positions tell of it.
    """
    ids = arguments.get("input_ids")
    first = ids if ids is not None else arguments.get("inputs_embeds")
    if first is None:
        return original(**arguments)  # which says what is missing
    batch, n, device = first.shape[0], first.shape[1], first.device
    carried = Carried.of(rows, batch, device)
    slot = "cache_params" if "cache_params" in names else "past_key_values"
    cache: Any = arguments.get(slot)
    past = seen_in(cache, carried)
    mask: Any = arguments.get("attention_mask")
    positions: Any = arguments.get("position_ids")
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        raise InputError(
            "a prompted backbone takes a 2-D attention mask [batch, tokens]",
            remedy="Pass 1 and 0 per token; `generate` with a static cache makes another one, so leave its cache dynamic",
        )
    if mask is None and positions is not None and not past and bool((positions.diff(dim=-1) != 1).any()):
        raise InputError(
            "the positions restart within a row: packed sequences have no room for prompts",
            remedy="Pad the batch instead of packing it",
        )
    if mask is not None and positions is None:
        positions = positions_of(mask)[:, -n:]
    deep = inner_prompts(carried)
    if deep is not None:
        from pt_nlp.blocks import deep_forward

        with inside(cache):
            output: Any = deep_forward(base, deep, **arguments | {"position_ids": positions})
        if output.past_key_values is not None:
            mark(output.past_key_values, carried)
            output.past_key_values.pt_prefix = deep[0].size if 0 in deep else 0  # a cache's length is that of block 0
        return output
    if past and carried.has_offset and n > 1 and (slot == "cache_params" or SOURCE.get() is None):
        raise InputError(
            f"{n} tokens behind a cache: the prompt has an offset for source tokens, and nothing says whether these are",
            remedy="Use the method's own `generate`, say it with `pt_nlp.carried.source_tokens`, or read the text in one call",
        )
    if writes and base.training and carried.has_offset and n > 1 and SOURCE.get() is None and torch.is_grad_enabled():
        raise InputError(
            "the prompt has an offset for source tokens, and in training nothing says which these are: the labels do not come "
            "to the model (label smoothing, a loss that is computed outside of it, as TRL does)",
            remedy="Pass `labels` to the model, or say it with `pt_nlp.carried.source_tokens`",
        )
    if past and slot == "cache_params":
        return original(**arguments)  # the prompt is in the state; there is no mask to widen
    if mask is None:
        mask = torch.ones(batch, past + n, dtype=torch.long, device=device)
        if positions is None:
            positions = torch.arange(past, past + n, device=device)[None]
    if carried.has_offset:
        source = SOURCE.get()
        if past < (1 if source is None else source.shape[1]):
            arguments["inputs_embeds"] = carried.offset(take_embeds(base, arguments), source_among(mask))
    if carried.longest == 0:
        output = original(**arguments)
        if output.get(slot) is not None:
            output[slot].pt_owner = carried.owner
        return output

    own = positions + carried.row_lengths(device)[:, None]
    check_length(base, carried.longest + mask.shape[1], own)
    keys_given = any(h is not None and h.prompt.offers("key_values") for h in carried.handles)
    if keys_given:
        check_key_values(base, cache, carried.longest + mask.shape[1])
        _check_distances(base, mask)
    arguments["attention_mask"] = torch.cat([carried.mask(batch, mask), mask], dim=1)
    if "position_ids" in names:
        arguments["position_ids"] = own
    if past:
        if cache.pt_ahead:
            _check_padding_ends(base, carried, mask, cache.pt_ahead)
            slots = slots_of(carried, mask, cache.pt_ahead)
            arguments["attention_mask"] = arguments["attention_mask"].gather(1, slots)
        with inside(cache):
            return original(**arguments)
    refused = shortcut_refused(base) or cache_refused(cache)
    if refused is None or keys_given:
        wanted = arguments.get("use_cache")
        wanted = cache is not None or (base.config.get_text_config().use_cache if wanted is None else wanted)
        plain = refused is None or hooks_on_rows(base) is None  # the former asks for hooks too
        if not wanted and plain and _may_be_one_row(base, arguments, carried):
            output = _in_one_row(base, original, arguments, carried, mask, keys_given)
            if output is not None:
                return output
        cache = DynamicCache() if cache is None else cache
        cache.layers = prefix_layers(base, original, carried, batch, base.get_input_embeddings().weight.dtype)
        mark(cache, carried)
        with inside(cache):
            output = original(**arguments | {"past_key_values": cache, "use_cache": True})
        output.past_key_values = cache if wanted else None
        return output
    _announce(base, refused)
    order = _prepend(base, names, arguments, carried, mask)
    ahead = 0 if order is None else n
    if checkpoints_blocks(base):
        arguments["use_cache"] = False  # the blocks would leave it empty
    if cache is not None:
        check_room(cache, arguments["attention_mask"].shape[1])
        mark(cache, carried, ahead)
    with inside(cache):
        output = original(**arguments)
    if cache is None and output.get(slot) is not None:
        mark(output[slot], carried, ahead)
    return trim(output, carried.longest, order)


_ANNOUNCED: set[tuple[str, str]] = set()


def _announce(base: Model, reason: str) -> None:
    key = (type(base).__name__, reason)
    if key not in _ANNOUNCED:
        _ANNOUNCED.add(key)
        log.warning("%s: prompts are computed row by row, without a shared prefix: %s", *key)


def _may_be_one_row(base: Model, arguments: dict[str, Any], carried: Carried) -> bool:
    """Whether this call may pass the model as one row (pt_nlp.one_row), as far as one can tell before."""
    if carried.index is not None or base.config._attn_implementation != "sdpa" or base in _NOT_ONE_ROW:
        return False
    inner = {"output_hidden_states", "output_attentions"}
    asked = any(arguments.get(name) or getattr(base.config, name, False) for name in inner)
    known = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values", "use_cache", *inner}
    others = any(value is not None for name, value in arguments.items() if name not in known)
    return not (asked or others or torch.compiler.is_compiling())


_NOT_ONE_ROW: WeakSet[nn.Module] = WeakSet()  # whose attention turned out to be another


def _in_one_row(
    base: Model, original: Forward, arguments: dict[str, Any], carried: Carried, mask: Tensor, keys_given: bool
) -> Any:
    """One call on prompt and texts as a single row without padding; None where that can't be.

    In training the prompt's rows are in it; keys and values that are given, or stored at inference, take their place.
    """
    texts, where = Texts.of(mask), READ.get()
    if texts is None or texts.count == 1 or (where is None and texts.real is not None):
        return None  # of one query transformers asks in another way
    read = None if where is None else texts.take(where).nonzero()[:, 0]
    if read is not None and not 1 < len(read) <= texts.count / 2:
        read = None  # the last block computes queries of all tokens, once more of those that are read
    embeds, length = take_embeds(base, dict(arguments)), carried.longest
    rows, prompt = texts.take(embeds), None
    positions = arguments.get("position_ids")
    if positions is not None:
        positions = texts.take(positions.expand(len(mask), -1))
    if keys_given or not torch.is_grad_enabled():
        prompt = key_values_of(base, original, carried.handles[0], decoder_blocks(base), embeds.dtype)
    else:
        rows = torch.cat([token_rows(carried, embeds)[0], rows])
        if positions is not None:
            positions = torch.cat([torch.arange(length, device=positions.device), positions])
    arguments = arguments | {"input_ids": None, "inputs_embeds": rows[None], "past_key_values": None}
    arguments |= {"attention_mask": mask.new_ones(1, len(rows)), "use_cache": False}
    if positions is not None:
        arguments["position_ids"] = positions[None]
    try:
        with SharedPrefixAttention(texts, length, prompt, read) as attention:
            output = original(**arguments)
        if attention.layers != len(decoder_blocks(base)):
            raise NotPlain
    except NotPlain:
        _NOT_ONE_ROW.add(base)
        return None
    output.last_hidden_state = texts.give(output.last_hidden_state[0, -texts.count :])
    return output


def _counts_slots(base: Model, names: list[str]) -> bool:
    """Whether padding between prompt and text would be distance: for a window, or where no positions are taken."""
    local = layer_types(base) - {"full_attention"}
    return bool(local) or "position_ids" not in names or window_of(base) is not None


def _prepend(base: Model, names: list[str], arguments: dict[str, Any], carried: Carried, mask: Tensor) -> Tensor | None:
    """Put the prompt in front of the input embeddings of every row, with positions of its own.

    Returns:
        Where slots count and texts are padded on the left: the order in which everything stands, see `slots_of`; else None.
    """
    mixed = layer_types(base) - ATTENTION_LAYERS
    recurrent, counts = "cache_params" in names or bool(mixed), _counts_slots(base, names)
    padded = (recurrent or counts) and bool((mask[:, 0] == 0).any())  # others do not wait for a device
    if recurrent and padded:
        raise InputError(
            f"a recurrent model ({type(base).__name__}) carries a state through the padding of a prompted text",
            remedy="Pad on the right, or pass texts of one length",
        )
    if "position_ids" not in names and position_table(base) is not None:
        check_equal(base, carried)
    batch = len(mask)
    embeds = take_embeds(base, arguments)
    types = arguments.get("token_type_ids") if "token_type_ids" in names else None
    if types is not None and any("token_type" in name for name, _ in base.named_modules()):
        arguments["token_type_ids"] = nn.functional.pad(types.expand(batch, -1), (carried.longest, 0))
    elif types is not None:  # GPT-2 and its like look them up among their words; prompts have none
        del arguments["token_type_ids"]
        embeds = embeds + base.get_input_embeddings()(types)
    prompt = token_rows(carried, embeds).expand(batch, -1, -1)
    arguments["inputs_embeds"] = torch.cat([prompt, embeds], dim=1)
    if "position_ids" in names:
        positions = arguments["position_ids"].expand(batch, -1)
        ahead = positions_of(carried.mask(batch, mask))
        arguments["position_ids"] = torch.cat([ahead, positions], dim=1)
    if not (padded and counts):
        return None  # behind the prompt padding has something to see: softmax over nothing may be no number
    order = slots_of(carried, mask, mask.shape[1])
    arguments["inputs_embeds"] = arguments["inputs_embeds"].take_along_dim(order[..., None], 1)
    for name in ("attention_mask", "position_ids"):
        if name in arguments:
            arguments[name] = arguments[name].gather(1, order)
    return order


def _check_padding_ends(base: Model, carried: Carried, mask: Tensor, ahead: int) -> None:
    """Padding of the first call stands in front of the prompt; what a later one brings would be distance behind it."""
    window = window_of(base)
    if window is not None and carried.longest + mask.shape[1] <= window:
        return  # everything is seen, wherever it stands
    if bool((mask[:, : ahead + 1].sum(1) == 0).any()):
        raise InputError(
            f"padding on the left goes on behind the first {ahead} tokens, where a {type(base).__name__} takes it for text",
            remedy="Read more tokens in the first call (`prefill_chunk_size`), or pass texts of one length",
        )


def _check_distances(base: Model, mask: Tensor) -> None:
    """Trained keys and values stand in front of the padding, which a model that counts slots takes for distance."""
    if base.config.model_type in SLOT_DISTANCES and bool((mask[:, 0] == 0).any()):
        raise InputError(
            f"{type(base).__name__} (ALiBi) counts the padding between trained keys and values and the text",
            remedy="Pad on the right, pass texts of one length, or use a prompt of input embeddings",
        )


def labels_are_targets(selected: Callable[[], Rows | None]) -> Callable[[Forward], Forward]:
    """At a language model head, labels say which tokens are targets: everything with a label is not source."""

    def wrap(original: Forward) -> Forward:
        def forward(*args: Any, **arguments: Any) -> Any:
            labels = arguments.get("labels")
            if labels is None or selected() is None or SOURCE.get() is not None:
                return original(*args, **arguments)
            if seen(arguments.get("past_key_values")):  # labels are of this call's tokens, not of the whole text
                return original(*args, **arguments)
            with source_tokens((labels == -100).long()):
                return original(*args, **arguments)

        return forward

    return wrap
