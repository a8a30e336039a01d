"""Prompts in encoders and encoder-decoders: bidirectional where the prompt enters, so they always take the plain path.

- Encoders: prompt rows in front of the input embeddings, trained keys and values in front of every block's attention. In
  encoders without a table of positions distances are counted in slots: there padding on the left stands in front of the
  prompt. Heads that pool see real tokens only.
- Encoder-decoders: prompt rows in front of the encoder's input; the decoder attends to what they become. Trained keys and
  values stand in front of the decoder's self-attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from pt_core.attachment import Forward, Rows
from pt_core.errors import InputError
from pt_nlp.caches import check_key_values, inside, mark, prefix_layers, seen_in
from pt_nlp.carried import Carried, check_equal, inner_prompts, prompted, slots_of, take_embeds, token_rows, trim
from pt_nlp.models import (
    Model,
    check_length,
    checkpoints_blocks,
    first_position,
    padding_index,
    position_table,
    positions_of,
)


def around_encoder(base: Model, selected: Callable[[], Rows | None]) -> Callable[[Forward], Forward]:
    """The forward of an encoder, with the prompts that `selected` names in every row; its output has real tokens only."""

    def call(*given: Any) -> Any:
        output = _encoder_call(base, *given)
        if getattr(base, "pooler", None) is not None:
            output.pooler_output = base.pooler(output.last_hidden_state)  # of the real first token
        return output

    return prompted(selected, call)


def _encoder_call(base: Model, original: Forward, names: list[str], arguments: dict[str, Any], rows: Rows) -> Any:
    """One call of a prompted encoder: keys are [trained keys and values, prompt rows, text], queries the last two."""
    ids = arguments.get("input_ids")
    first = ids if ids is not None else arguments["inputs_embeds"]
    batch, n, device = first.shape[0], first.shape[1], first.device
    carried = Carried.of(rows, batch, device)
    deep = inner_prompts(carried)
    if deep is not None:
        from pt_nlp.blocks import deep_forward

        return deep_forward(base, deep, **arguments)
    if carried.longest == 0 and not carried.has_offset:
        return original(**arguments)
    mask = arguments.get("attention_mask")
    if mask is None:
        mask = torch.ones(batch, n, dtype=torch.long, device=device)
    soft, keys = (Carried.of(rows, batch, device, what) for what in ("tokens", "key_values"))
    ahead = soft.mask(batch, mask)
    arguments["attention_mask"] = torch.cat([keys.mask(batch, mask), ahead, mask], dim=1)
    own, given = None, arguments.get("position_ids") is not None
    if "position_ids" in names:
        start, own = _encoder_positions(base, mask, arguments.get("position_ids"))
        own = own + carried.row_lengths(device)[:, None]
        ahead = start + positions_of(ahead)
        arguments["position_ids"] = torch.cat([ahead, own.expand(batch, -1)], dim=1)
    elif carried.index is not None and carried.longest:
        raise InputError(
            f"a {type(base).__name__} takes no positions, so its rows cannot carry prompts of their own",
            remedy="Run the rows of each prompt by themselves",
        )
    check_length(base, carried.longest + n, own)
    if soft.longest or carried.has_offset:
        embeds = carried.offset(take_embeds(base, arguments), mask)
        prompt = token_rows(soft, embeds).expand(batch, -1, -1)
        arguments["inputs_embeds"] = torch.cat([prompt, embeds], dim=1)
        types = arguments.get("token_type_ids")
        if types is not None:
            types = types.expand(batch, -1)
            arguments["token_type_ids"] = torch.cat([types.new_zeros(batch, soft.longest), types], dim=1)
    order = None
    if soft.longest and position_table(base) is None and bool((mask[:, 0] == 0).any()):
        order = slots_of(soft, mask, n)  # distances are counted in slots: padding stands in front of the prompt
        arguments["inputs_embeds"] = arguments["inputs_embeds"].take_along_dim(order[..., None], 1)
        if own is not None and not given:
            arguments["position_ids"] = torch.arange(order.shape[1], device=device).expand(batch, -1)
        for name in {"attention_mask", "token_type_ids", *(["position_ids"] if given else [])} & arguments.keys():
            arguments[name] = arguments[name].gather(1, order)
    if keys.longest:
        if checkpoints_blocks(base):
            raise InputError(
                f"a {type(base).__name__} that checkpoints its blocks takes no trained keys and values",
                remedy="Switch gradient checkpointing off, or use a prompt of input embeddings",
            )
        cache: Any = DynamicCache()
        cache.layers = prefix_layers(base, original, keys, batch, base.get_input_embeddings().weight.dtype)
        arguments["past_key_values"] = cache
    output = original(**arguments)
    if keys.longest:
        output.past_key_values = None
    return trim(output, soft.longest, order)


def _encoder_positions(base: Model, mask: Tensor, given: Tensor | None) -> tuple[int, Tensor]:
    """The first position of an encoder, and the positions that it gives to the tokens of a text, [b or 1, n]."""
    start, padding = first_position(base), padding_index(base)
    if given is not None:
        return start, given
    if padding is None:
        return start, start + torch.arange(mask.shape[1], device=mask.device)[None]
    return start, mask.long().cumsum(-1) * mask.long() + padding


def around_text_encoder(encoder: Model, selected: Callable[[], Rows | None]) -> Callable[[Forward], Forward]:
    """Prompt rows stay in the encoder's output, because the decoder attends to them; the model's output hides them."""

    def call(original: Forward, names: list[str], arguments: dict[str, Any], rows: Rows) -> Any:
        embeds = take_embeds(encoder, arguments)
        batch, n, _ = embeds.shape
        soft = Carried.of(rows, batch, embeds.device, "tokens")
        check_equal(encoder, soft)
        check_length(encoder, soft.longest + n)
        mask = arguments.get("attention_mask")
        if mask is None:
            mask = torch.ones(batch, n, dtype=torch.long, device=embeds.device)
        embeds = soft.offset(embeds, mask)
        prompt = token_rows(soft, embeds).expand(batch, -1, -1)
        # T5 takes padding on the left for distance between prompt and text, as it does under peft: pad it on the right.
        arguments |= {
            "inputs_embeds": torch.cat([prompt, embeds], dim=1),
            "attention_mask": torch.cat([soft.mask(batch, mask), mask], dim=1),
        }
        return original(**arguments)

    return prompted(selected, call)


def around_text_decoder(decoder: Model, selected: Callable[[], Rows | None]) -> Callable[[Forward], Forward]:
    """The decoder attends to prompt rows in the encoder's output, and to trained keys and values of its own."""

    def call(original: Forward, names: list[str], arguments: dict[str, Any], rows: Rows) -> Any:
        memory = arguments.get("encoder_hidden_states")
        if memory is None:
            return original(**arguments)
        batch = memory.shape[0]
        soft, keys = (Carried.of(rows, batch, memory.device, what) for what in ("tokens", "key_values"))
        mask = arguments.get("encoder_attention_mask")
        if mask is None:
            mask = torch.ones(batch, memory.shape[1] - soft.longest, dtype=torch.long, device=memory.device)
        if soft.longest and memory.shape[1] == mask.shape[1]:
            raise InputError(
                f"the encoder's states have {memory.shape[1]} rows, as many as the mask: those of the prompt are not in them, "
                "or the mask counts them",
                remedy="Pass what `get_encoder()` gives under the prompt (`encoder_last_hidden_state` leaves its rows out), "
                "and the mask of the text alone",
            )
        if memory.shape[1] == mask.shape[1] + soft.longest:
            arguments["encoder_attention_mask"] = torch.cat([soft.mask(batch, mask), mask], dim=1)
        if keys.longest:
            return _decoder_with_prefix(decoder, original, arguments, keys, batch, memory)
        return original(**arguments)

    return prompted(selected, call)


def _decoder_with_prefix(
    decoder: Model, original: Forward, arguments: dict[str, Any], keys: Carried, batch: int, memory: Tensor
) -> Any:
    check_equal(decoder, keys)
    cache = arguments.get("past_key_values")
    wanted = arguments.get("use_cache")
    wanted = cache is not None or (decoder.config.use_cache if wanted is None else wanted)
    if cache is None:
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    own = cache.self_attention_cache
    ids = arguments.get("input_ids")
    n = (ids if ids is not None else arguments["inputs_embeds"]).shape[1]
    past = seen_in(own, keys)
    mask = arguments.get("attention_mask")
    if mask is None:
        mask = torch.ones(batch, past + n, dtype=torch.long, device=memory.device)
    check_length(decoder, keys.longest + mask.shape[1])
    check_key_values(decoder, own, keys.longest + mask.shape[1])
    if not past:
        own.layers = prefix_layers(decoder, original, keys, batch, memory.dtype)
        mark(own, keys)
    arguments |= {
        "attention_mask": torch.cat([keys.mask(batch, mask), mask], dim=1),
        "past_key_values": cache,
        "use_cache": True,
    }
    with inside(own):
        output = original(**arguments)
    if not wanted:
        output.past_key_values = None
    return output


def hide_prompt_rows(selected: Callable[[], Rows | None]) -> Callable[[Forward], Forward]:
    """What an encoder-decoder says of its encoder's states has real tokens only."""

    def call(original: Forward, names: list[str], arguments: dict[str, Any], rows: Rows) -> Any:
        output = original(**arguments)
        memory = getattr(output, "encoder_last_hidden_state", None)
        if memory is None:
            return output
        longest = Carried.of(rows, memory.shape[0], memory.device, "tokens").longest
        output.encoder_last_hidden_state = memory[:, longest:]
        for name, cut in (("encoder_hidden_states", 1), ("encoder_attentions", 2)):
            parts = getattr(output, name, None)
            if parts is not None:
                setattr(output, name, tuple(part.narrow(cut, longest, part.shape[cut] - longest) for part in parts))
        return output

    return prompted(selected, call)
