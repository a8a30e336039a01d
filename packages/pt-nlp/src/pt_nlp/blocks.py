"""Deep prompts in Hugging Face text towers: their blocks driven one by one over `pt_core.tokens`.

Tested families: Llama, Mistral (full attention), Qwen2 and Qwen3 decoders; BERT and RoBERTa encoders; T5 encoder and decoder
stacks; each with SDPA and eager attention. Anything else is refused with the reason.

Where positions enter decides what a prompt at block l means:

- Llama-like: rotary embedding in every block. Prompts take positions of their own and real tokens shift by m from block l on;
  at block 0 this equals prompt embeddings in front of `inputs_embeds`.
- T5: a relative bias in every block, recomputed from the positions of block l on; the same equality holds at block 0.
- BERT: absolute positions are added once, inside the embedding layer. Prompts enter behind it, have no position embedding, and
  real tokens keep theirs, at block 0 too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import (
    BertModel,
    DynamicCache,
    EncoderDecoderCache,
    LlamaModel,
    MistralModel,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Model,
    Qwen3Model,
    RobertaModel,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPoolingAndCrossAttentions,
    ModelOutput,
)
from transformers.models.t5.modeling_t5 import T5Stack

from pt_core.errors import InputError
from pt_core.tokens import BlockPrompt, Tokens, real, run


@dataclass
class LlamaBlocks:
    """Blocks of a Llama-like decoder. `options`: keywords that every block gets, as the model's own forward hands them on."""

    model: Any
    options: dict[str, Any] = field(default_factory=dict)
    causal: ClassVar[bool] = True
    optional: ClassVar[frozenset[str]] = frozenset({"position_ids"})

    @property
    def num_blocks(self) -> int:
        return len(self.model.layers)

    def embed(self, input_ids=None, inputs_embeds=None, attention_mask=None, position_ids=None, past=0) -> Tokens:
        hidden = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        return Tokens.of(hidden, attention_mask, position_ids, past)

    def prepare(self, tokens: Tokens) -> dict[str, Any]:
        positions = tokens.positions[:, tokens.past :].to(tokens.hidden.device)
        return {
            "attention_mask": _attention_mask(self.model.config, tokens.hidden, tokens.mask, tokens.full, causal=True),
            "position_ids": positions,
            "position_embeddings": self.model.rotary_emb(tokens.hidden, position_ids=positions),
        }

    def block(self, index: int, hidden: Tensor, context: dict[str, Any], cache: Cache | None) -> Tensor:
        use_cache = cache is not None
        return self.model.layers[index](hidden, past_key_values=cache, use_cache=use_cache, **context, **self.options)

    def cached(self, index: int, cache: Cache) -> int:
        return cache.get_seq_length(index)

    def finish(self, hidden: Tensor) -> Tensor:
        return self.model.norm(hidden)

    def output(self, hidden: Tensor, cache: Cache | None, hidden_states: tuple[Tensor, ...] | None) -> ModelOutput:
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache, hidden_states=hidden_states)


@dataclass
class BertBlocks:
    """Blocks of a BERT or RoBERTa encoder; the pooler sees the first real token."""

    model: Any
    options: dict[str, Any] = field(default_factory=dict)
    causal: ClassVar[bool] = False
    optional: ClassVar[frozenset[str]] = frozenset({"position_ids", "token_type_ids"})

    @property
    def num_blocks(self) -> int:
        return len(self.model.encoder.layer)

    def embed(
        self, input_ids=None, inputs_embeds=None, attention_mask=None, position_ids=None, past=0, token_type_ids=None
    ) -> Tokens:
        hidden = self.model.embeddings(
            input_ids=input_ids, inputs_embeds=inputs_embeds, position_ids=position_ids, token_type_ids=token_type_ids
        )
        return Tokens.of(hidden, attention_mask)

    def prepare(self, tokens: Tokens) -> Tensor | None:
        return _attention_mask(self.model.config, tokens.hidden, tokens.mask, tokens.full, causal=False)

    def block(self, index: int, hidden: Tensor, context: Tensor | None, cache: Any) -> Tensor:
        return self.model.encoder.layer[index](hidden, context, **self.options)

    def cached(self, index: int, cache: Any) -> int:
        return 0

    def finish(self, hidden: Tensor) -> Tensor:
        return hidden

    def output(self, hidden: Tensor, cache: Any, hidden_states: tuple[Tensor, ...] | None) -> ModelOutput:
        pooled = None if self.model.pooler is None else self.model.pooler(hidden)
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=hidden, pooler_output=pooled, hidden_states=hidden_states
        )


@dataclass
class T5Blocks:
    """Blocks of a T5 encoder stack, or of a decoder stack that attends to `encoder_hidden_states` [b, s, d]."""

    model: Any
    options: dict[str, Any] = field(default_factory=dict)
    encoder_hidden_states: Tensor | None = None
    encoder_attention_mask: Tensor | None = None
    optional: ClassVar[frozenset[str]] = frozenset()

    @property
    def causal(self) -> bool:
        return self.model.is_decoder

    @property
    def num_blocks(self) -> int:
        return len(self.model.block)

    def embed(self, input_ids=None, inputs_embeds=None, attention_mask=None, past=0) -> Tokens:
        hidden = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        return Tokens.of(self.model.dropout(hidden), attention_mask, past=past)

    def prepare(self, tokens: Tokens) -> tuple[Any, ...]:
        mask = _attention_mask(self.model.config, tokens.hidden, tokens.mask, tokens.full, self.causal)
        return mask, self._bias(tokens), self.encoder_hidden_states, self._cross_mask(tokens.hidden), None

    def _bias(self, tokens: Tokens) -> Tensor:
        """[b or 1, heads, n, p + n], from positions, not slots: padding between a prompt and its row is no distance."""
        attention = self.model.block[0].layer[0].SelfAttention
        weight = attention.relative_attention_bias.weight
        positions = (tokens.positions[:1] if tokens.full else tokens.positions).to(weight.device)
        bucket = attention._relative_position_bucket(
            positions[:, None, :] - positions[:, tokens.past :, None],
            bidirectional=not self.causal,
            num_buckets=attention.relative_attention_num_buckets,
            max_distance=attention.relative_attention_max_distance,
        )
        return attention.relative_attention_bias(bucket).permute(0, 3, 1, 2)

    @cached_property
    def _encoder_full(self) -> bool:
        return self.encoder_attention_mask is None or bool(self.encoder_attention_mask.all())

    def _cross_mask(self, hidden: Tensor) -> Tensor | None:
        if self.encoder_hidden_states is None or self.encoder_attention_mask is None or self._encoder_full:
            return None
        return _attention_mask(self.model.config, hidden, self.encoder_attention_mask.bool(), full=False, causal=False)

    def block(self, index: int, hidden: Tensor, context: tuple[Any, ...], cache: Cache | None) -> Tensor:
        return self.model.block[index](hidden, *context, past_key_values=cache, **self.options)[0]

    def cached(self, index: int, cache: Cache) -> int:
        return cache.get_seq_length(index)

    def finish(self, hidden: Tensor) -> Tensor:
        return self.model.dropout(self.model.final_layer_norm(hidden))

    def output(self, hidden: Tensor, cache: Cache | None, hidden_states: tuple[Tensor, ...] | None) -> ModelOutput:
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=hidden, past_key_values=cache, hidden_states=hidden_states
        )


def block_stack(
    base_model: PreTrainedModel,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    **options: Any,
) -> LlamaBlocks | BertBlocks | T5Blocks:
    """The `BlockStack` of a base model, for `pt_core.tokens.run`.

    Raises:
        InputError: the model, its attention or an option is none that prompts can enter exactly.
    """
    config = base_model.config
    if config._attn_implementation not in ("sdpa", "eager"):
        raise InputError(
            f"deep prompts need their own attention masks, which {config._attn_implementation!r} attention does not take",
            remedy='Call model.set_attn_implementation("sdpa")',
        )
    if options.get("output_attentions") or getattr(config, "output_attentions", False):
        raise InputError("attention maps hold prompt columns", remedy="Leave output_attentions out")
    if packed := sorted(key for key in options if key.startswith("cu_seq_lens")):
        raise InputError(
            f"packed sequences ({', '.join(packed)}) have no room for prompts", remedy="Pad the batch instead"
        )
    if isinstance(base_model, (LlamaModel, MistralModel, Qwen2Model, Qwen3Model)):
        if getattr(config, "sliding_window", None) is not None:
            raise InputError(
                "a sliding window forgets prompts", remedy="Set config.sliding_window = None before loading"
            )
        if getattr(config, "is_causal", True) is False:
            raise InputError("this decoder was made bidirectional", remedy="Unset config.is_causal")
        return LlamaBlocks(base_model, options)
    if isinstance(base_model, (BertModel, RobertaModel)) and not config.is_decoder:
        return BertBlocks(base_model, options)
    if isinstance(base_model, T5Stack):
        return T5Blocks(base_model, options, encoder_hidden_states, encoder_attention_mask)
    raise InputError(
        f"no deep prompts for {type(base_model).__name__}",
        remedy="Pass the base model of a Llama, Mistral, Qwen2, Qwen3, BERT or RoBERTa encoder, or a T5 .encoder or .decoder",
    )


def deep_forward(
    base_model: PreTrainedModel,
    prompts: Mapping[int, BlockPrompt],
    input_ids: Tensor | None = None,
    *,
    inputs_embeds: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    past_key_values: Cache | None = None,
    use_cache: bool | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    output_hidden_states: bool | None = None,
    return_dict: bool | None = None,
    **options: Any,
) -> ModelOutput | tuple[Any, ...]:
    """The base model's own forward with `prompts[l]` at the input of block l.

    Inputs, masks, positions and outputs speak of real tokens only: prompt rows appear in no hidden state. Without prompts the
    result is bit-identical to `base_model(...)`. `generate` of the model above works: prompts enter while the cache is empty,
    later steps recompute which slots they hold from `prompts`, so the cache carries no state of ours; caches of the blocks from
    l up are m slots longer. (`cache.get_seq_length()` reports block 0: with a prompt there it counts the prompt too, so to
    continue a conversation pass `attention_mask` and the new `input_ids` only. `pt_core.attach` hides it in the cache.)

    Args:
        prompts: block index -> prompt. Pass the same ones at every step of a generation, rows repeated per beam.
        attention_mask: [b, real tokens so far], non-zero where a token counts.
        position_ids: [b or 1, n]; default: slot indices, as in the model's own forward.

    Raises:
        InputError: see `block_stack`; a static cache; a 4D mask; packed sequences; a cache that other prompts filled.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise InputError("exactly one of input_ids and inputs_embeds is needed")
    config = base_model.config
    stack = block_stack(base_model, encoder_hidden_states, encoder_attention_mask, **options)
    cache = _cache(base_model, past_key_values, use_cache) if stack.causal else None
    optional = {"position_ids": position_ids, "token_type_ids": token_type_ids}
    optional = {name: value for name, value in optional.items() if value is not None}
    if strange := optional.keys() - stack.optional:
        raise InputError(f"{type(base_model).__name__} takes no {', '.join(sorted(strange))}", remedy="Leave it out")
    if stack.causal and attention_mask is None and cache is None and position_ids is not None:
        _refuse_packed(position_ids)
    seen = 0 if cache is None else cache.get_seq_length()
    past = seen - prompts[0].size if seen and 0 in prompts else seen
    tokens = stack.embed(
        input_ids=input_ids, inputs_embeds=inputs_embeds, attention_mask=attention_mask, past=past, **optional
    )

    states = None
    if getattr(config, "output_hidden_states", False) if output_hidden_states is None else output_hidden_states:
        states = []
        for index in range(stack.num_blocks):
            states.append(real(tokens))
            tokens = run(stack, tokens, prompts, cache, index, index + 1)
    else:
        tokens = run(stack, tokens, prompts, cache)
    hidden = stack.finish(real(tokens))
    output = stack.output(hidden, cache, None if states is None else (*states, hidden))
    as_dict = getattr(config, "return_dict", True) if return_dict is None else return_dict
    return output if as_dict else output.to_tuple()


def _refuse_packed(position_ids: Tensor) -> None:
    """The model's own forward reads a jump in the positions as the start of another sequence in the same row."""
    if bool((position_ids.diff(dim=-1) != 1).any()):
        raise InputError(
            "packed sequences (position_ids jump) have no room for prompts", remedy="Pad the batch instead"
        )


def _cache(model: PreTrainedModel, cache: Cache | None, use_cache: bool | None) -> Cache | None:
    """The cache to fill, as the model's own forward chooses it."""
    use_cache = getattr(model.config, "use_cache", False) if use_cache is None else use_cache
    if getattr(model, "gradient_checkpointing", False) and model.training:
        use_cache = False
    if cache is not None and cache.is_compileable:
        raise InputError(
            "blocks above a prompt need longer caches than a static cache holds", remedy="Use a DynamicCache"
        )
    if cache is not None or not use_cache:
        return cache
    if isinstance(model, T5Stack) and model.config.is_encoder_decoder:
        return EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
    return DynamicCache(config=model.config)


def _attention_mask(
    config: PreTrainedConfig, hidden: Tensor, visible: Tensor, full: bool, causal: bool
) -> Tensor | None:
    """[b, 1, n, k] of queries `hidden` [b, n, d] over keys `visible` [b, k]: bool for SDPA, 0 or the least number for eager.

    None exactly where transformers leaves the mask out, so that the same kernels run as in the model's own forward.
    """
    queries, keys = hidden.shape[1], visible.shape[1]
    eager = config._attn_implementation == "eager"
    if full and (not causal or (not eager and queries in (1, keys))):
        return None
    allowed = visible[:, None, None, :].expand(-1, 1, queries, -1)
    if causal:
        slots = torch.arange(keys, device=visible.device)
        allowed = allowed & (slots <= slots[keys - queries :, None])
    if not eager:
        return allowed
    return torch.where(
        allowed, torch.zeros((), dtype=hidden.dtype, device=visible.device), torch.finfo(hidden.dtype).min
    )
