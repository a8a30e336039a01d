"""Frozen text backbones, and where prompts attach to them.

Three families of Hugging Face models: causal language models, encoders, encoder-decoders. `attach` (in pt_core) replaces
the forward of the base model only, so that heads, losses, `generate`, pipelines and trainers run as they are:

- A prompt in front of a causal model does not attend to the input. Its keys and values are computed once for the whole
  batch (with gradient in training, stored at inference) and stand in the cache as a prefix: exact, and far cheaper than a
  prompt in every row. This is done only for model types on which it is tested (`SHARED_PREFIX`) and only where nothing
  forbids it (sliding windows, recurrence, active dropout, gradient checkpointing); else the plain path concatenates the
  prompt to the input embeddings and drops its rows from the output, with the same numbers, and says so once.
- Encoders and encoder-decoders are bidirectional where the prompt enters: they always take the plain path.
- Keys and values (prefix tuning, P-tuning v2) enter as a filled cache; causal models and encoder-decoders put them in front
  of the decoder's self-attention, BERT-like encoders in front of every layer's.

Prompts take positions 0..m-1 and real tokens follow; positions of real tokens come from the attention mask, so left and
right padding agree. Heads that pool see real tokens only.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pt_core.attach import Forward, Handle, Rows, register_family
from pt_core.errors import InputError
from pt_core.prompts import Prompt
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache

log = logging.getLogger(__name__)

SHARED_PREFIX = {"llama", "qwen2", "qwen3", "mistral", "gpt2", "gpt_neox"}  # the types the exact shortcut is tested on
KEY_VALUE_ENCODERS = {"bert", "roberta"}


def load_backbone(
    name: str | Path,
    kind: Literal["causal-lm", "encoder", "seq2seq"],
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    **options: Any,
) -> tuple[nn.Module, Any]:
    """Load a backbone and its tokenizer by hub id or folder.

    Args:
        name: hub id or local folder.
        kind: what to load it as.
        revision: commit or tag on the hub; pin it.
        dtype: `auto` keeps the checkpoint's.
        options: passed on to `from_pretrained` (`device_map`, `quantization_config`).

    Returns:
        The model in eval mode and its tokenizer, with a pad token.

    Raises:
        InputError: nothing loadable is found there.
    """
    auto = {"causal-lm": AutoModelForCausalLM, "encoder": AutoModel, "seq2seq": AutoModelForSeq2SeqLM}[kind]
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        model = auto.from_pretrained(name, revision=revision, dtype=dtype, **options)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"no {kind} backbone could be loaded from {name!r}: {reason}",
            remedy="Give a folder with config.json and safetensors, or a hub id",
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


# --- what the engine may rely on ------------------------------------------------------------------------------------
def base_of(backbone: nn.Module) -> nn.Module:
    """The transformer without its head (the model itself if it has none)."""
    base: nn.Module = getattr(backbone, "base_model", backbone)
    return base


def decoder_blocks(base: nn.Module) -> nn.ModuleList:
    """The list of transformer blocks of a tower, first block first."""
    layers = base.config.num_hidden_layers
    for module in base.modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            return module
    raise InputError(f"no list of {layers} blocks was found in a {type(base).__name__}")


@dataclass(frozen=True)
class Shape:
    """Sizes that prompts depend on: embedding width, layers, key-value heads and their width."""

    dim: int
    layers: int
    kv_heads: int
    head_dim: int


def shape_of(backbone: nn.Module) -> Shape:
    """Sizes of the tower that prompts enter (of the decoder, for the keys and values of an encoder-decoder)."""
    config = backbone.config.get_text_config()
    heads = config.num_attention_heads
    dim = backbone.get_input_embeddings().embedding_dim
    layers = getattr(config, "num_decoder_layers", None) or config.num_hidden_layers
    head_dim = getattr(config, "d_kv", None) or getattr(config, "head_dim", None) or config.hidden_size // heads
    return Shape(dim, layers, getattr(config, "num_key_value_heads", None) or heads, head_dim)


def checkpoints_blocks(base: nn.Module) -> bool:
    """Whether gradient checkpointing is on and in force: blocks then refuse a cache."""
    return any(getattr(m, "gradient_checkpointing", False) and m.training for m in base.modules())


def keep_checkpointing(backbone: nn.Module) -> None:
    """Keep gradient checkpointing in force in a model that is in eval mode.

    transformers checkpoints a block only while that block's own `training` flag is up; the flag of its children, where
    dropout lives, stays down.
    """
    for module in backbone.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True


def _dropout_active(base: nn.Module) -> bool:
    if not base.training:
        return False
    names = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "dropout")
    inside = any(isinstance(m, nn.Dropout) and m.training and m.p > 0 for m in base.modules())
    return inside or any(getattr(base.config, name, 0) or 0 for name in names)


def shortcut_refused(base: nn.Module) -> str | None:
    """Why the shared prefix must not be used on this causal model right now; None where it is exact."""
    config = base.config
    if config.model_type not in SHARED_PREFIX:
        return f"it is not tested on {config.model_type!r}"
    kinds = set(getattr(config, "layer_types", None) or [])
    window = getattr(config, "sliding_window", None) if not kinds and config.model_type == "mistral" else None
    if kinds - {"full_attention"} or window:
        return "the model has layers without full attention"
    if checkpoints_blocks(base):
        return "gradient checkpointing is on"
    if _dropout_active(base):
        return "dropout is active in the backbone"
    return None


_ANNOUNCED: set[tuple[str, str]] = set()


def _announce(base: nn.Module, reason: str) -> None:
    key = (type(base).__name__, reason)
    if key not in _ANNOUNCED:
        _ANNOUNCED.add(key)
        log.warning("%s: prompts are computed row by row, without a shared prefix: %s", *key)


# --- one batch's prompts --------------------------------------------------------------------------------------------
@dataclass
class Carried:
    """The prompts of one batch: row i carries `handles[index[i]]`, left-padded to the longest.

    Args:
        handles: the distinct handles; None for rows without a prompt.
        index: [b] long, which handle each row carries; None where all rows carry the first.
        lengths: prompt positions of each handle.
    """

    handles: list[Handle | None]
    index: Tensor | None
    lengths: list[int]

    @classmethod
    def of(cls, rows: Rows, batch: int, device: torch.device) -> Carried:
        if len(rows) == 1 or all(h is rows[0] for h in rows):
            handles, index = [rows[0]], None
        else:
            if batch % len(rows):
                raise InputError(
                    f"{len(rows)} prompts were routed to a batch of {batch} rows",
                    remedy="Route one prompt, or one for each row (None for none)",
                )
            handles = list(dict.fromkeys(rows))
            places = torch.tensor([handles.index(h) for h in rows], device=device)
            index = places.repeat_interleave(batch // len(rows))  # beams of a row follow each other
        return cls(handles, index, [0 if h is None else h.prompt.length for h in handles])

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def key(self) -> tuple[int, ...]:
        return tuple(id(h) for h in self.handles)

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
        return stacked if self.index is None else stacked[self.index]

    def offset(self, embeds: Tensor, source: Tensor) -> Tensor:
        """Add each row's offset to the embeddings of its source tokens ([b, n] mask)."""
        position = (source.long().cumsum(-1) - 1).clamp(min=0)
        for i, handle in enumerate(self.handles):
            delta = None if handle is None else handle.prompt.offset(position)
            if delta is not None:
                rows = source.bool() if self.index is None else source.bool() & (self.index == i)[:, None]
                embeds = embeds + torch.where(rows[..., None], delta.to(embeds), 0)
        return embeds

    @property
    def has_offset(self) -> bool:
        return any(h is not None and h.prompt.offers("offset") for h in self.handles)


def _device(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))


# Which input tokens are source (text that is read) rather than target (text that is learned to be written): offsets by
# source position must not touch targets. Set by whoever knows (labels at the head, or a method); None: all tokens are.
_SOURCE: ContextVar[Tensor | None] = ContextVar("pt_nlp_source", default=None)


@contextmanager
def source_tokens(mask: Tensor | None) -> Iterator[None]:
    """In this context the input tokens in `mask` ([b, n], 1 = source) are source; the others are targets.

    A call of k times as many rows repeats each row k times (beams, label words); tokens behind the mask are targets.
    """
    token = _SOURCE.set(mask)
    try:
        yield
    finally:
        _SOURCE.reset(token)


def _source(mask: Tensor) -> Tensor:
    """Source tokens among those of a call with this attention mask, [b, n]."""
    source = _SOURCE.get()
    if source is None:
        return mask
    source = source.to(mask).repeat_interleave(len(mask) // len(source), 0)
    return nn.functional.pad(source, (0, mask.shape[1] - source.shape[1])) * mask


def _keywords(original: Forward) -> list[str]:
    parameters = inspect.signature(original).parameters.values()
    return [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]


def _embeds(base: nn.Module, arguments: dict[str, Any]) -> Tensor:
    """Input embeddings of a call; takes `input_ids` out of its arguments."""
    ids = arguments.pop("input_ids", None)
    embeds: Tensor = arguments.pop("inputs_embeds", None) if ids is None else base.get_input_embeddings()(ids)
    return embeds


def _trim(output: Any, rows: int) -> Any:
    """Drop the first `rows` positions of every sequence in a base model's output (attention keeps its columns)."""
    if rows:
        output.last_hidden_state = output.last_hidden_state[:, rows:]
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(h[:, rows:] for h in output.hidden_states)
        if getattr(output, "attentions", None) is not None:
            output.attentions = tuple(None if a is None else a[:, :, rows:] for a in output.attentions)
    return output


def _token_rows(carried: Carried, embeds: Tensor) -> Tensor:
    """Prompt rows for each row of the batch, [b or 1, longest, d], in the backbone's dtype."""
    parts = []
    for handle in carried.handles:
        rows = None if handle is None else handle.prompt.tokens()
        parts.append(embeds.new_zeros(0, embeds.shape[-1]) if rows is None else rows.to(embeds))
    return carried.gather(parts, dim=0)


# --- causal language models -----------------------------------------------------------------------------------------
class PrefixLayer(DynamicLayer):
    """A cache layer whose first `prefix` slots belong to a prompt: its length counts real tokens only."""

    def __init__(self, keys: Tensor, values: Tensor, owner: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self.prefix, self.owner = keys.shape[-2], owner

    def get_seq_length(self) -> int:
        return int(self.keys.shape[-2]) - self.prefix

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return int(self.keys.shape[-2]) + query_length, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx.to(self.keys.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.keys = self.keys.repeat_interleave(repeats, dim=0)
        self.values = self.values.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.keys, self.values = self.keys[indices], self.values[indices]


class _PrefixView(DynamicCache):
    """The cache as the attention must see it: queries start behind the prefix. Shares its layers with the user's."""

    def __init__(self, layers: list[Any]) -> None:
        super().__init__()
        self.layers, self.layer_class_to_replicate = layers, None

    def get_query_offset(self, layer_idx: int = 0) -> int:
        layer = self.layers[layer_idx]
        return int(layer.keys.shape[-2])


def _prefix_layers(base: nn.Module, original: Forward, carried: Carried, batch: int, dtype: torch.dtype) -> list[Any]:
    """Keys and values of the batch's prompts for every layer, [b, h, longest, d_h] each, as filled cache layers."""
    blocks = decoder_blocks(base)
    per_handle = [_key_values(base, original, handle, len(blocks), dtype) for handle in carried.handles]
    template = next(kv for kv in per_handle if kv is not None)
    empty = [(k[:, :0], v[:, :0]) for k, v in template]
    filled = [kv if kv is not None else empty for kv in per_handle]
    layers = []
    for layer in range(len(blocks)):
        keys, values = (carried.gather([kv[layer][i] for kv in filled], dim=1) for i in (0, 1))
        layers.append(PrefixLayer(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), carried.key))
    return layers


def _key_values(
    base: nn.Module, original: Forward, handle: Handle | None, layers: int, dtype: torch.dtype
) -> list[tuple[Tensor, Tensor]] | None:
    """One prompt's keys and values for every layer, [h, m, d_h] each; None for no prompt.

    Without gradient they are stored on the handle and reused as long as the prompt's values are the same: at inference
    the prompt costs no prefill.
    """
    if handle is None:
        return None
    direct = handle.prompt.key_values()
    if direct is not None:
        devices = [_device(block) for block in decoder_blocks(base)]
        return [
            (k.to(devices[i], dtype), v.to(devices[i], dtype)) for i, (k, v) in enumerate(kv.unbind(0) for kv in direct)
        ]
    rows = handle.prompt.tokens()
    if rows is None or len(rows) == 0:
        return None
    if not torch.is_grad_enabled():
        stored = handle.store.get("key_values")
        if stored is not None and stored[0] == (dtype, rows.device) and torch.equal(stored[1], rows):
            found: list[tuple[Tensor, Tensor]] = stored[2]
            return found
    embeds = rows.to(base.get_input_embeddings().weight.device, dtype)[None]
    cache = DynamicCache()
    arguments: dict[str, Any] = {"inputs_embeds": embeds, "past_key_values": cache, "use_cache": True}
    if "position_ids" in inspect.signature(original).parameters:
        arguments["position_ids"] = torch.arange(len(rows), device=embeds.device)[None]
    original(**arguments)
    computed = [(layer.keys[0], layer.values[0]) for layer in cache.layers]
    if not torch.is_grad_enabled():
        handle.store["key_values"] = ((dtype, rows.device), rows.clone(), computed)
    return computed


def _causal(base: nn.Module, selected: Callable[[], Rows | None]) -> Callable[[Forward], Forward]:
    def wrap(original: Forward) -> Forward:
        names = _keywords(original)

        def forward(*args: Any, **arguments: Any) -> Any:
            rows = selected()
            arguments.update(zip(names, args, strict=False))
            if rows is None:
                return original(**arguments)
            as_tuple = arguments.pop("return_dict", None) is False
            ids = arguments.get("input_ids")
            first = ids if ids is not None else arguments["inputs_embeds"]
            batch, n, device = first.shape[0], first.shape[1], first.device
            carried = Carried.of(rows, batch, device)
            output = _causal_call(base, original, names, arguments, carried, batch, n, device)
            return output.to_tuple() if as_tuple else output

        return forward

    return wrap


def _causal_call(
    base: nn.Module,
    original: Forward,
    names: list[str],
    arguments: dict[str, Any],
    carried: Carried,
    batch: int,
    n: int,
    device: torch.device,
) -> Any:
    cache = arguments.get("past_key_values")
    plain_prefix = getattr(cache, "pt_prefix", 0)
    past = cache.get_seq_length() - plain_prefix if cache is not None else 0
    owner = getattr(cache, "pt_owner", None) or next(
        (layer.owner for layer in getattr(cache, "layers", []) if isinstance(layer, PrefixLayer)), None
    )
    if past and owner != carried.key:
        raise InputError(
            "the cache was filled without this prompt, or under another one", remedy="Start from an empty cache"
        )
    mask = arguments.get("attention_mask")
    if mask is None:
        mask = torch.ones(batch, past + n, dtype=torch.long, device=device)
    if mask.ndim != 2:
        raise InputError(
            "a prompted backbone takes a 2-D attention mask [batch, tokens]", remedy="Pass 1 and 0 per token"
        )
    positions = arguments.get("position_ids")
    if positions is None:
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -n:]
    deep = [h.prompt.blocks() for h in carried.handles if h is not None and h.prompt.blocks() is not None]
    if deep:
        from pt_nlp.blocks import deep_forward

        if carried.index is not None or carried.longest:
            raise InputError("prompts inside the tower cannot be mixed with other prompts in one batch")
        arguments["attention_mask"], arguments["position_ids"] = mask, positions
        output = deep_forward(base, deep[0], **arguments)
        if output.past_key_values is not None:
            output.past_key_values.pt_owner = carried.key
        return output
    if past == 0 and carried.has_offset:
        arguments["inputs_embeds"] = carried.offset(_embeds(base, arguments), _source(mask))
    if carried.longest == 0:
        output = original(**arguments)
        if output.past_key_values is not None:
            output.past_key_values.pt_owner = carried.key
        return output

    row_lengths = carried.row_lengths(device)
    full_mask = torch.cat([carried.mask(batch, mask), mask], dim=1)
    _check_length(base, carried.longest + mask.shape[1])
    keys_given = any(h is not None and h.prompt.offers("key_values") for h in carried.handles)
    refused = shortcut_refused(base) if owner is None or not past else None
    if refused is None and cache is not None and type(cache) is not DynamicCache:
        refused = f"the cache is a {type(cache).__name__}"
    if plain_prefix or (refused is not None and not keys_given):
        if refused is not None:
            _announce(base, refused)
        return _causal_plain(base, original, names, arguments, carried, full_mask, positions, row_lengths, past, batch)
    if keys_given and (checkpoints_blocks(base) or (cache is not None and type(cache) is not DynamicCache)):
        raise InputError(
            "trained keys and values need the model's own dynamic cache: not with gradient checkpointing or another cache",
            remedy="Switch gradient checkpointing off, or use a prompt of input embeddings",
        )

    dtype = base.get_input_embeddings().weight.dtype
    layers = cache.layers if past else _prefix_layers(base, original, carried, batch, _compute_dtype(dtype, device))
    use_cache = arguments.get("use_cache")
    use_cache = base.config.use_cache if use_cache is None else use_cache
    if cache is not None:
        cache.layers, cache.layer_class_to_replicate = layers, None
    elif use_cache:
        cache = DynamicCache()
        cache.layers, cache.layer_class_to_replicate = layers, None
    arguments |= {"attention_mask": full_mask, "past_key_values": _PrefixView(layers), "use_cache": True}
    if "position_ids" in names:
        arguments["position_ids"] = positions + row_lengths[:, None]
    output = original(**arguments)
    output.past_key_values = cache
    return output


def _compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype


def _causal_plain(
    base: nn.Module,
    original: Forward,
    names: list[str],
    arguments: dict[str, Any],
    carried: Carried,
    full_mask: Tensor,
    positions: Tensor,
    row_lengths: Tensor,
    past: int,
    batch: int,
) -> Any:
    """The prompt in every row, in front of the input embeddings; its rows are dropped from the output."""
    m = carried.longest
    cache = arguments.get("past_key_values")
    positions = (positions + row_lengths[:, None]).expand(batch, -1)
    if past == 0:
        embeds = _embeds(base, arguments)
        prompt = _token_rows(carried, embeds).expand(batch, -1, -1)
        arguments["inputs_embeds"] = torch.cat([prompt, embeds], dim=1)
        ahead = (full_mask[:, :m].long().cumsum(-1) - 1).clamp(min=0)
        positions = torch.cat([ahead, positions], dim=1)
    arguments["attention_mask"] = full_mask
    if "position_ids" in names:
        arguments["position_ids"] = positions
    output = original(**arguments)
    filled = cache if cache is not None else output.past_key_values
    if filled is not None:
        filled.pt_prefix, filled.pt_owner = m, carried.key
    return _trim(output, m if past == 0 else 0)


def _check_length(base: nn.Module, length: int) -> None:
    """Learned absolute positions end somewhere; a look-up beyond them fails with an index error deep inside."""
    limit = getattr(base.config, "max_position_embeddings", None)
    learned = base.config.model_type in {"gpt2", "opt", "bert", "roberta"}
    if base.config.model_type == "roberta" and limit is not None:
        limit -= 2  # its positions start behind the padding index
    if learned and limit is not None and length > limit:
        raise InputError(
            f"prompt and text take {length} positions, {type(base).__name__} has {limit}",
            remedy="Cut the text, or use a shorter prompt",
        )


# --- encoders -------------------------------------------------------------------------------------------------------
def _encoder(base: nn.Module, selected: Callable[[], Rows | None]) -> Callable[[Forward], Forward]:
    def wrap(original: Forward) -> Forward:
        names = _keywords(original)

        def forward(*args: Any, **arguments: Any) -> Any:
            rows = selected()
            arguments.update(zip(names, args, strict=False))
            if rows is None:
                return original(**arguments)
            as_tuple = arguments.pop("return_dict", None) is False
            output = _encoder_call(base, original, arguments, rows)
            if getattr(base, "pooler", None) is not None:
                output.pooler_output = base.pooler(output.last_hidden_state)  # of the real first token
            return output.to_tuple() if as_tuple else output

        return forward

    return wrap


def _encoder_call(base: nn.Module, original: Forward, arguments: dict[str, Any], rows: Rows) -> Any:
    ids = arguments.get("input_ids")
    first = ids if ids is not None else arguments["inputs_embeds"]
    batch, n, device = first.shape[0], first.shape[1], first.device
    carried = Carried.of(rows, batch, device)
    mask = arguments.get("attention_mask")
    if mask is None:
        mask = torch.ones(batch, n, dtype=torch.long, device=device)
    deep = [h.prompt.blocks() for h in carried.handles if h is not None and h.prompt.blocks() is not None]
    if deep:
        from pt_nlp.blocks import deep_forward

        return deep_forward(base, deep[0], **arguments)
    _check_length(base, carried.longest + n)
    full_mask = torch.cat([carried.mask(batch, mask), mask], dim=1)
    if any(h is not None and h.prompt.offers("key_values") for h in carried.handles):
        if base.config.model_type not in KEY_VALUE_ENCODERS or checkpoints_blocks(base):
            raise InputError(
                f"a {type(base).__name__} takes no trained keys and values (or checkpoints its blocks)",
                remedy=f"Use one of {sorted(KEY_VALUE_ENCODERS)}, or a prompt of input embeddings",
            )
        dtype = _compute_dtype(base.get_input_embeddings().weight.dtype, device)
        cache = DynamicCache()
        for i, layer in enumerate(_prefix_layers(base, original, carried, batch, dtype)):
            cache.update(layer.keys, layer.values, i)
        if arguments.get("position_ids") is not None:
            arguments["position_ids"] = arguments["position_ids"] + carried.longest
        output = original(**arguments | {"attention_mask": full_mask, "past_key_values": cache})
        output.past_key_values = None
        return output
    embeds = _embeds(base, arguments)
    embeds = carried.offset(embeds, mask)
    prompt = _token_rows(carried, embeds).expand(batch, -1, -1)
    arguments |= {"inputs_embeds": torch.cat([prompt, embeds], dim=1), "attention_mask": full_mask}
    types = arguments.get("token_type_ids")
    if types is not None:
        arguments["token_type_ids"] = torch.cat([types.new_zeros(batch, carried.longest), types], dim=1)
    positions = arguments.get("position_ids")
    if positions is not None:
        ahead = torch.arange(carried.longest, device=device).expand(batch, -1)
        arguments["position_ids"] = torch.cat([ahead, positions + carried.longest], dim=1)
    return _trim(original(**arguments), carried.longest)


# --- encoder-decoders -----------------------------------------------------------------------------------------------
def _text_encoder(encoder: nn.Module, selected: Callable[[], Rows | None]) -> Callable[[Forward], Forward]:
    """Prompt rows stay in the encoder's output, because the decoder attends to them; the model's output hides them."""

    def wrap(original: Forward) -> Forward:
        names = _keywords(original)

        def forward(*args: Any, **arguments: Any) -> Any:
            rows = selected()
            arguments.update(zip(names, args, strict=False))
            if rows is None:
                return original(**arguments)
            embeds = _embeds(encoder, arguments)
            batch, n, _ = embeds.shape
            carried = Carried.of(rows, batch, embeds.device)
            mask = arguments.get("attention_mask")
            if mask is None:
                mask = torch.ones(batch, n, dtype=torch.long, device=embeds.device)
            embeds = carried.offset(embeds, mask)
            if carried.longest and not any(h is not None and h.prompt.offers("tokens") for h in carried.handles):
                return original(**arguments | {"inputs_embeds": embeds})  # keys and values belong to the decoder
            prompt = _token_rows(carried, embeds).expand(batch, -1, -1)
            arguments |= {
                "inputs_embeds": torch.cat([prompt, embeds], dim=1),
                "attention_mask": torch.cat([carried.mask(batch, mask), mask], dim=1),
            }
            return original(**arguments)

        return forward

    return wrap


def _text_decoder(decoder: nn.Module, selected: Callable[[], Rows | None]) -> Callable[[Forward], Forward]:
    def wrap(original: Forward) -> Forward:
        names = _keywords(original)

        def forward(*args: Any, **arguments: Any) -> Any:
            rows = selected()
            arguments.update(zip(names, args, strict=False))
            memory = arguments.get("encoder_hidden_states")
            if rows is None or memory is None:
                return original(**arguments)
            batch = memory.shape[0]
            carried = Carried.of(rows, batch, memory.device)
            mask = arguments.get("encoder_attention_mask")
            if mask is None:
                mask = torch.ones(batch, memory.shape[1], dtype=torch.long, device=memory.device)
            if memory.shape[1] == mask.shape[1] + carried.longest:
                arguments["encoder_attention_mask"] = torch.cat([carried.mask(batch, mask), mask], dim=1)
            if any(h is not None and h.prompt.offers("key_values") for h in carried.handles):
                return _decoder_with_prefix(decoder, original, arguments, carried, batch, memory)
            return original(**arguments)

        return forward

    return wrap


def _decoder_with_prefix(
    decoder: nn.Module, original: Forward, arguments: dict[str, Any], carried: Carried, batch: int, memory: Tensor
) -> Any:
    if checkpoints_blocks(decoder):
        raise InputError("trained keys and values cannot be combined with gradient checkpointing")
    cache = arguments.get("past_key_values")
    keep = cache is not None or arguments.get("use_cache")
    if cache is None:
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    if cache.get_seq_length() == 0:
        for i, layer in enumerate(_prefix_layers(decoder, original, carried, batch, memory.dtype)):
            cache.self_attention_cache.update(layer.keys, layer.values, i)
    mask = arguments.get("attention_mask")
    if mask is None:
        ids = arguments.get("input_ids")
        n = (ids if ids is not None else arguments["inputs_embeds"]).shape[1]
        seen = cache.get_seq_length() - carried.longest
        mask = torch.ones(batch, seen + n, dtype=torch.long, device=memory.device)
    arguments |= {
        "attention_mask": torch.cat([carried.mask(batch, mask), mask], dim=1),
        "past_key_values": cache,
        "use_cache": True,
    }
    output = original(**arguments)
    if not keep:
        output.past_key_values = None
    return output


def _hide_prompt_rows(selected: Callable[[], Rows | None]) -> Callable[[Forward], Forward]:
    def wrap(original: Forward) -> Forward:
        def forward(*args: Any, **arguments: Any) -> Any:
            output = original(*args, **arguments)
            rows = selected()
            memory = getattr(output, "encoder_last_hidden_state", None)
            if rows is not None and memory is not None:
                carried = Carried.of(rows, memory.shape[0], memory.device)
                if any(h is not None and h.prompt.offers("tokens") for h in carried.handles):
                    output.encoder_last_hidden_state = memory[:, carried.longest :]
                    states = getattr(output, "encoder_hidden_states", None)
                    if states is not None:
                        output.encoder_hidden_states = tuple(h[:, carried.longest :] for h in states)
            return output

        return forward

    return wrap


def _labels_are_targets(selected: Callable[[], Rows | None]) -> Callable[[Forward], Forward]:
    """At a language model head, labels say which tokens are targets: everything with a label is not source."""

    def wrap(original: Forward) -> Forward:
        def forward(*args: Any, **arguments: Any) -> Any:
            labels = arguments.get("labels")
            if labels is None or selected() is None or _SOURCE.get() is not None:
                return original(*args, **arguments)
            with source_tokens((labels == -100).long()):
                return original(*args, **arguments)

        return forward

    return wrap


# --- the families ---------------------------------------------------------------------------------------------------
class _TextFamily:
    name = "text (transformers)"

    def matches(self, backbone: nn.Module) -> bool:
        ours = any(cls.__module__.startswith("transformers.") for cls in type(backbone).__mro__)
        return ours and hasattr(backbone, "get_input_embeddings") and hasattr(backbone.config, "get_text_config")

    def check(self, backbone: nn.Module, prompt: Prompt) -> None:
        shape = shape_of(backbone)
        tokens, key_values = prompt.tokens(), prompt.key_values()
        if tokens is not None and tokens.shape[1] != shape.dim:
            raise InputError(
                f"the prompt is {tokens.shape[1]} wide, the embeddings of {_name(backbone)} are {shape.dim}"
            )
        expected = (shape.layers, 2, shape.kv_heads, prompt.length, shape.head_dim)
        if key_values is not None and tuple(key_values.shape) != expected:
            raise InputError(
                f"keys and values are {tuple(key_values.shape)}, {_name(backbone)} takes {expected}",
                remedy="[layers, 2, key-value heads, length, head width]",
            )
        blocks = prompt.blocks()
        if blocks is not None and not all(0 <= i < shape.layers for i in blocks):
            raise InputError(
                f"the prompt enters blocks {sorted(blocks)}, {_name(backbone)} has 0 to {shape.layers - 1}"
            )

    def patches(
        self, backbone: nn.Module, selected: Callable[[], Rows | None]
    ) -> list[tuple[nn.Module, Callable[[Forward], Forward]]]:
        if backbone.config.is_encoder_decoder:
            return [
                (backbone.get_encoder(), _text_encoder(backbone.get_encoder(), selected)),
                (backbone.get_decoder(), _text_decoder(backbone.get_decoder(), selected)),
                (backbone, _hide_prompt_rows(selected)),
            ]
        base = base_of(backbone)
        if not is_causal(backbone):
            return [(base, _encoder(base, selected))]
        writes = base is not backbone and backbone.get_output_embeddings() is not None
        head = [(backbone, _labels_are_targets(selected))] if writes else []
        return [(base, _causal(base, selected)), *head]


def is_causal(backbone: nn.Module) -> bool:
    """Whether tokens attend only to earlier ones (decoder-only models)."""
    encoders = (
        "bert",
        "roberta",
        "electra",
        "deberta",
        "albert",
        "mpnet",
        "xlm",
        "camembert",
        "modernbert",
        "longformer",
    )
    kind = backbone.config.model_type
    return not any(name in kind for name in encoders) or bool(getattr(backbone.config, "is_decoder", False))


def _name(backbone: nn.Module) -> str:
    return getattr(backbone.config, "_name_or_path", "") or type(backbone).__name__


register_family(_TextFamily())
