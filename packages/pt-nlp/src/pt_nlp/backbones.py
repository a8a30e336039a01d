"""Frozen text backbones, and where prompts attach to them.

Three families of Hugging Face models: causal language models, encoders, encoder-decoders. `attach` (in pt_core) replaces
the forward of the base model only, so that heads, losses, `generate`, pipelines and trainers run as they are:

- A prompt in front of a causal model does not attend to the input. Its keys and values are computed once for the whole
  batch (with gradient in training, stored at inference) and stand in the cache as a prefix: exact, and far cheaper than a
  prompt in every row. This is done only for model types on which it is tested (`SHARED_PREFIX`) and only where nothing
  forbids it (sliding windows, rotations that depend on the length, recurrence, active dropout, gradient checkpointing); else
  the plain path concatenates the prompt to the input embeddings and drops its rows from the output, with the same numbers,
  and says so once. Where windows or ALiBi count slots, padding on the left stands in front of the prompt and not between
  prompt and text: rows do not depend on the padding that others need.
- Where neither the cache nor states at padding are asked for (`reads`, as methods do in training), prompt and texts pass such
  a model as one row without padding (pt_nlp.one_row).
- Encoders and encoder-decoders are bidirectional where the prompt enters: they always take the plain path. In encoders without
  a table of positions distances are counted in slots: there, too, padding on the left stands in front of the prompt.
- Keys and values (prefix tuning, P-tuning v2) enter as a filled cache; causal models and encoder-decoders put them in front
  of the decoder's self-attention, BERT-like encoders in front of every layer's.

Prompts take positions 0..m-1 and real tokens follow; positions of real tokens come from the attention mask, so left and
right padding agree. Heads that pool see real tokens only.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from weakref import WeakSet

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache, StaticLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from pt_core.attachment import Forward, Handle, Rows, register_family
from pt_core.errors import InputError
from pt_core.prompts import Prompt
from pt_nlp.one_row import NotPlain, SharedPrefixAttention, Texts, last_block

log = logging.getLogger(__name__)

Model = Any  # a transformers model: what its class has, nn.Module's annotations do not know

SHARED_PREFIX = {"llama", "qwen2", "qwen3", "mistral", "gpt2", "gpt_neox"}  # the types the exact shortcut is tested on
KEY_VALUE_ENCODERS = {"bert", "roberta", "xlm-roberta", "camembert", "electra"}
SLOT_DISTANCES = {"mpt"}  # ALiBi from slots; BLOOM and Falcon count with the attention mask
BIDIRECTIONAL = {"bert-generation", "xlnet"}  # write text, but read it both ways unless `is_decoder` is set
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")  # fields of configurations
POSITION_TABLES = ("position_embeddings", "embed_positions", "wpe")
RELATIVE_POSITIONS = {"t5", "mt5", "umt5"}  # encoder-decoders in which only distances count
ATTENTION_LAYERS = {
    "full_attention",
    "sliding_attention",
    "chunked_attention",
}  # all others carry a state through padding


def load_backbone(
    name: str | Path,
    kind: Literal["causal-lm", "encoder", "seq2seq"],
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    **options: Any,
) -> tuple[Model, Any]:
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
    remedy = "Give a folder with config.json and safetensors, or a hub id"
    if _is_path(name) and not Path(name).exists():
        raise InputError(f"no such folder here: {str(name)!r}", remedy=remedy)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        model = auto.from_pretrained(name, revision=revision, dtype=dtype, **options)
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise InputError(f"no {kind} backbone could be loaded from {str(name)!r}: {reason}", remedy=remedy) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def _is_path(name: str | Path) -> bool:
    """Whether a name can only be that of a folder: hub ids have at most one `/`, and no dot or `/` in front."""
    return isinstance(name, Path) or name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1


# --- what the engine may rely on ------------------------------------------------------------------------------------
def base_of(backbone: Model) -> Model:
    """The transformer without its head (the model itself if it has none): what every call of the backbone runs."""
    base: Model = getattr(backbone, "base_model", backbone)
    inner = getattr(base, "decoder", None)
    # OPT: the language model calls the decoder in the base model, never the base model itself.
    return inner if isinstance(inner, PreTrainedModel) and not backbone.config.is_encoder_decoder else base


def decoder_blocks(base: Model) -> nn.ModuleList:
    """The list of transformer blocks of a tower, first block first."""
    layers = base.config.get_text_config().num_hidden_layers
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


def shape_of(backbone: Model) -> Shape:
    """Sizes of the tower that prompts enter (of the decoder, for the keys and values of an encoder-decoder)."""
    config = backbone.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1  # a recurrent model has none
    dim = backbone.get_input_embeddings().embedding_dim
    layers = getattr(config, "num_decoder_layers", None) or config.num_hidden_layers
    head_dim = getattr(config, "d_kv", None) or getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        kv_heads = 1  # Falcon; its new architecture caches a copy for every query head
    return Shape(dim, layers, kv_heads, head_dim)


def width_of(backbone: Model) -> int:
    """Width of the last hidden states, which a head reads. That of the embeddings is another one in ALBERT and ELECTRA."""
    back = getattr(base_of(backbone), "project_out", None)  # OPT-350m returns to the width of its embeddings
    width: int = backbone.config.get_text_config().hidden_size if back is None else back.out_features
    return width


def checkpoints_blocks(base: Model) -> bool:
    """Whether gradient checkpointing is on and in force: blocks then refuse a cache."""
    return any(getattr(m, "gradient_checkpointing", False) and m.training for m in base.modules())


def keep_checkpointing(backbone: Model, on: bool = True) -> None:
    """Keep gradient checkpointing, where it is enabled, in force in a model that is in eval mode; or suspend it.

    transformers checkpoints a block only while that block's own `training` flag is up; the flags of all other modules,
    where dropout lives (T5's attention reads its own), stay down. Suspended, blocks take a cache again.

    Raises:
        InputError: the blocks themselves drop states out while that flag is up (OPT, BART), and the model was not in training.
    """
    for module in backbone.modules():
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            if on and not backbone.training and _drops_out_itself(module):
                raise InputError(
                    f"the blocks of {_name(backbone)} drop states out wherever they are checkpointed",
                    remedy="Load it without dropout (`dropout=0.0`, `activation_dropout=0.0`), or switch checkpointing off",
                )
            module.training = on


def _drops_out_itself(block: nn.Module) -> bool:
    """Whether a block has dropout without a module of its own, which would follow the block's `training` flag."""
    rates = [rate for name, rate in vars(block).items() if "dropout" in name and isinstance(rate, float)]
    rates.append(getattr(getattr(block, "config", None), "hidden_dropout", None) or 0.0)  # Falcon
    return any(rates) and "self.training" in inspect.getsource(type(block).forward)


def _dropout_active(base: Model) -> bool:
    if not base.training:
        return False
    names = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "dropout")
    inside = any(isinstance(m, nn.Dropout) and m.training and m.p > 0 for m in base.modules())
    return inside or any(getattr(base.config, name, 0) or 0 for name in names)


def shortcut_refused(base: Model) -> str | None:
    """Why the shared prefix must not be used on this causal model right now; None where it is exact."""
    config = base.config
    if config.model_type not in SHARED_PREFIX:
        return f"it is not tested on {config.model_type!r}"
    kinds = set(getattr(config, "layer_types", None) or [])
    window = getattr(config, "sliding_window", None) if not kinds and config.model_type == "mistral" else None
    if kinds - {"full_attention"} or window:
        return "the model has layers without full attention"
    if _rotates_by_length(config):
        return "rotations of the prompt depend on the length of the text"
    if checkpoints_blocks(base):
        return "gradient checkpointing is on"
    if _dropout_active(base):
        return "dropout is active in the backbone"
    return None


def _rotates_by_length(config: Any) -> bool:
    """Whether rotary frequencies depend on the longest position of a call: keys of the prompt alone are then not its keys."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]  # one for each type of layer
    return any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds)


_ANNOUNCED: set[tuple[str, str]] = set()


def _announce(base: Model, reason: str) -> None:
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
        lengths: positions of each handle.
        owner: tells this choice of prompts from others, for caches.
    """

    handles: list[Handle | None]
    index: Tensor | None
    lengths: list[int]
    owner: tuple[int, ...]

    @classmethod
    def of(cls, rows: Rows, batch: int, device: torch.device, what: str = "") -> Carried:
        """Spread `rows` over a batch. With `what` only prompts that offer it take positions."""
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
        """Add each row's offset to the embeddings of its source tokens ([b, n] mask)."""
        position = (source.long().cumsum(-1) - 1).clamp(min=0)
        for i, handle in enumerate(self.handles):
            own = position if self.index is None else position * (self.index == i)[:, None]  # others may be longer
            delta = None if handle is None else handle.prompt.offset(own)
            if delta is not None:
                rows = source.bool() if self.index is None else source.bool() & (self.index == i)[:, None]
                embeds = embeds + torch.where(rows[..., None], delta.to(embeds), 0)
        return embeds

    @property
    def has_offset(self) -> bool:
        return any(h is not None and h.prompt.offers("offset") for h in self.handles)


def device_of(module: nn.Module) -> torch.device:
    """Where a module runs: its weights may be somewhere else in between (accelerate's offloading)."""
    runs = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return (
        torch.device(runs) if runs is not None else next((p.device for p in module.parameters()), torch.device("cpu"))
    )


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


_READ: ContextVar[Tensor | None] = ContextVar("pt_nlp_read", default=None)


@contextmanager
def reads(where: Tensor) -> Iterator[None]:
    """In this context only the last states of these tokens ([b, n], true = read) are read: all others may be zero."""
    token = _READ.set(where)
    try:
        yield
    finally:
        _READ.reset(token)


def _keywords(original: Forward) -> list[str]:
    parameters = inspect.signature(original).parameters.values()
    return [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]


def _embeds(base: Model, arguments: dict[str, Any]) -> Tensor:
    """Input embeddings of a call; takes `input_ids` out of its arguments."""
    ids = arguments.pop("input_ids", None)
    embeds: Tensor = arguments.pop("inputs_embeds", None) if ids is None else base.get_input_embeddings()(ids)
    return embeds


def _trim(output: Any, rows: int, order: Tensor | None = None) -> Any:
    """Drop the first `rows` positions of every sequence in a base model's output.

    Attention keeps its columns, in the order of the cache. `order`: see `_slots`; positions are put back from it first.
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


def _token_rows(carried: Carried, embeds: Tensor) -> Tensor:
    """Prompt rows for each row of the batch, [b or 1, longest, d], in the backbone's dtype."""
    parts = []
    for handle in carried.handles:
        rows = None if handle is None else handle.prompt.tokens()
        parts.append(embeds.new_zeros(0, embeds.shape[-1]) if rows is None else rows.to(embeds))
    return carried.gather(parts, dim=0)


# --- causal language models -----------------------------------------------------------------------------------------
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

    Hiding.__name__ = kind.__name__
    return Hiding


def _kind(cache: Any) -> type[Any]:
    kind: type[Any] = getattr(cache, "pt_kind", type(cache))
    return kind


def _mark(cache: Any, carried: Carried, ahead: int = 0) -> None:
    cache.__class__ = _hiding(_kind(cache))  # type: ignore[arg-type]
    cache.pt_prefix, cache.pt_ahead, cache.pt_owner = carried.longest, ahead, carried.owner


@contextmanager
def _inside(cache: Any) -> Iterator[None]:
    """In this context the model reads the cache: prompt slots count."""
    if not hasattr(cache, "pt_kind"):
        yield
        return
    cache.pt_inside = True
    try:
        yield
    finally:
        cache.pt_inside = False


def _seen(cache: Any, carried: Carried) -> int:
    """Real tokens in a cache (for a recurrent model without attention: whether there are any).

    Raises:
        InputError: they were read without these prompts.
    """
    if cache is None:
        return 0
    try:
        seen = int(cache.get_seq_length())
    except ValueError:  # states have no length
        seen = int(cache.has_previous_state())
    if seen and getattr(cache, "pt_owner", None) != carried.owner:
        raise InputError(
            "the cache was filled without this prompt, or under another one", remedy="Start from an empty cache"
        )
    return seen


def _prefix_layers(
    base: Model, original: Forward, carried: Carried, batch: int, dtype: torch.dtype
) -> list[DynamicLayer]:
    """Keys and values of the batch's prompts for every layer, [b, h, longest, d_h] each, as filled cache layers."""
    blocks = decoder_blocks(base)
    per_handle = [
        None if not length else _key_values(base, original, handle, blocks, dtype)
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


def _key_values(
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
            for block, (k, v) in zip(blocks, (kv.unbind(0) for kv in direct), strict=True)
        ]
    rows = handle.prompt.tokens()
    if rows is None or len(rows) == 0:
        return None
    device = device_of(base.get_input_embeddings())
    state = (torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type), rows.device, _state(base))
    if not torch.is_grad_enabled():
        stored = handle.store.get("key_values")
        if stored is not None and stored[0] == state and torch.equal(stored[1], rows):
            found: list[tuple[Tensor, Tensor]] = stored[2]
            return found
    cache: Any = DynamicCache()
    arguments: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
    arguments["inputs_embeds"] = rows.to(device, dtype)[None]
    if "position_ids" in inspect.signature(original).parameters:
        arguments["position_ids"] = torch.arange(len(rows), device=device)[None]
    original(**arguments)
    computed = [(layer.keys[0], layer.values[0]) for layer in cache.layers]
    if not torch.is_grad_enabled():
        handle.store["key_values"] = (state, rows.clone(), computed)
    return computed


def _state(base: Model) -> int:
    """A number that changes when a weight or buffer of the model is replaced or written to (but not through `.data`), a hook
    is registered or removed, or an adapter of peft's is switched, merged or scaled."""
    tensors = itertools.chain(base.parameters(), base.buffers())
    weights = tuple((x.data_ptr(), 0 if x.is_inference() else x._version) for x in tensors)
    hooks = tuple(key for module in base.modules() for key in (*module._forward_hooks, *module._forward_pre_hooks))
    tuners = (vars(module) for module in base.modules() if "_disable_adapters" in vars(module))
    names = ("_disable_adapters", "_active_adapter", "merged_adapters", "scaling")
    return hash((weights, hooks, tuple(str(tuner.get(name)) for tuner in tuners for name in names)))


def _causal(base: Model, selected: Callable[[], Rows | None]) -> Callable[[Forward], Forward]:
    def wrap(original: Forward) -> Forward:
        names = _keywords(original)

        def forward(*args: Any, **arguments: Any) -> Any:
            rows = selected()
            arguments.update(zip(names, args, strict=False))
            if rows is None:
                return original(**arguments)
            as_tuple = arguments.pop("return_dict", None) is False
            output = _causal_call(base, original, names, arguments, rows)
            return output.to_tuple() if as_tuple else output

        return forward

    return wrap


def _causal_call(base: Model, original: Forward, names: list[str], arguments: dict[str, Any], rows: Rows) -> Any:
    """One call of a prompted causal model.

    The first call on an empty cache brings the prompt in, as a prefix of the cache or of the input embeddings. From then
    on it is in the cache, and only mask and positions tell of it.
    """
    ids = arguments.get("input_ids")
    first = ids if ids is not None else arguments["inputs_embeds"]
    batch, n, device = first.shape[0], first.shape[1], first.device
    carried = Carried.of(rows, batch, device)
    slot = "cache_params" if "cache_params" in names else "past_key_values"
    cache: Any = arguments.get(slot)
    past = _seen(cache, carried)
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
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -n:]
    deep = _inner_prompts(carried)
    if deep is not None:
        from pt_nlp.blocks import deep_forward

        with _inside(cache):
            output: Any = deep_forward(base, deep, **arguments | {"position_ids": positions})
        if output.past_key_values is not None:
            _mark(output.past_key_values, carried)
            output.past_key_values.pt_prefix = deep[0].size if 0 in deep else 0  # a cache's length is that of block 0
        return output
    if past and slot == "cache_params":
        return original(**arguments)  # the prompt is in the state; there is no mask to widen
    if mask is None:
        mask = torch.ones(batch, past + n, dtype=torch.long, device=device)
        if positions is None:
            positions = torch.arange(past, past + n, device=device)[None]
    if not past and carried.has_offset:
        arguments["inputs_embeds"] = carried.offset(_embeds(base, arguments), _source(mask))
    if carried.longest == 0:
        output = original(**arguments)
        if output.get(slot) is not None:
            output[slot].pt_owner = carried.owner
        return output

    own = positions + carried.row_lengths(device)[:, None]
    _check_length(base, carried.longest + mask.shape[1], own)
    keys_given = any(h is not None and h.prompt.offers("key_values") for h in carried.handles)
    if keys_given:
        _check_key_values(base, cache, carried.longest + mask.shape[1])
        _check_distances(base, mask)
    arguments["attention_mask"] = torch.cat([carried.mask(batch, mask), mask], dim=1)
    if "position_ids" in names:
        arguments["position_ids"] = own
    if past:
        if cache.pt_ahead:
            slots = _slots(carried, mask, cache.pt_ahead)
            arguments["attention_mask"] = arguments["attention_mask"].gather(1, slots)
        with _inside(cache):
            return original(**arguments)
    refused = shortcut_refused(base) or _cache_refused(cache)
    if refused is None or keys_given:
        wanted = arguments.get("use_cache")
        wanted = cache is not None or (base.config.get_text_config().use_cache if wanted is None else wanted)
        if not wanted and _may_be_one_row(base, arguments, carried):
            output = _in_one_row(base, original, arguments, carried, mask, keys_given)
            if output is not None:
                return output
        cache = DynamicCache() if cache is None else cache
        cache.layers = _prefix_layers(base, original, carried, batch, base.get_input_embeddings().weight.dtype)
        _mark(cache, carried)
        with _inside(cache):
            output = original(**arguments | {"past_key_values": cache, "use_cache": True})
        output.past_key_values = cache if wanted else None
        return output
    _announce(base, refused)
    order = _prepend(base, names, arguments, carried, mask)
    ahead = 0 if order is None else n
    if checkpoints_blocks(base):
        arguments["use_cache"] = False  # the blocks would leave it empty
    if cache is not None:
        _check_room(cache, arguments["attention_mask"].shape[1])
        _mark(cache, carried, ahead)
    with _inside(cache):
        output = original(**arguments)
    if cache is None and output.get(slot) is not None:
        _mark(output[slot], carried, ahead)
    return _trim(output, carried.longest, order)


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
    texts, where = Texts.of(mask), _READ.get()
    if texts is None or texts.count == 1 or (where is None and texts.real is not None):
        return None  # of one query transformers asks in another way
    read = None if where is None else texts.take(where).nonzero()[:, 0]
    if read is not None and not 1 < len(read) <= texts.count / 2:
        read = None  # the last block computes queries of all tokens, once more of those that are read
    embeds, length = _embeds(base, dict(arguments)), carried.longest
    rows, prompt = texts.take(embeds), None
    positions = arguments.get("position_ids")
    if positions is not None:
        positions = texts.take(positions.expand(len(mask), -1))
    if keys_given or not torch.is_grad_enabled():
        prompt = _key_values(base, original, carried.handles[0], decoder_blocks(base), embeds.dtype)
    else:
        rows = torch.cat([_token_rows(carried, embeds)[0], rows])
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


def _window(base: Model) -> int | None:
    """Slots that local attention sees; None where all layers see everything, or one cannot tell."""
    config = base.config.get_text_config()
    return next((size for name in WINDOWS if isinstance(size := getattr(config, name, None), int) and size), None)


def _layer_types(base: Model) -> set[str]:
    return set(getattr(base.config.get_text_config(), "layer_types", None) or [])


def _counts_slots(base: Model, names: list[str]) -> bool:
    """Whether padding between prompt and text would be distance: for a window, or where no positions are taken."""
    local = _layer_types(base) - {"full_attention"}
    return bool(local) or "position_ids" not in names or _window(base) is not None


def _slots(carried: Carried, mask: Tensor, ahead: int) -> Tensor:
    """Which of the slots [prompt, text] stands at each place, [b, l + n], with all padding on the left in front.

    Args:
        mask: [b, n] real tokens among those of the text.
        ahead: slots of the first call; what is written later stands behind the prompt in any case.
    """
    text = mask.cumsum(1) > 0
    text[:, ahead:] = True
    return torch.cat([carried.mask(len(mask), mask).bool(), text], dim=1).long().argsort(dim=1, stable=True)


def _prepend(base: Model, names: list[str], arguments: dict[str, Any], carried: Carried, mask: Tensor) -> Tensor | None:
    """Put the prompt in front of the input embeddings of every row, with positions of its own.

    Returns:
        Where slots count and texts are padded on the left: the order in which everything stands, see `_slots`; else None.
    """
    mixed = _layer_types(base) - ATTENTION_LAYERS
    recurrent, counts = "cache_params" in names or bool(mixed), _counts_slots(base, names)
    padded = (recurrent or counts) and bool((mask[:, 0] == 0).any())  # others do not wait for a device
    if recurrent and padded:
        raise InputError(
            f"a recurrent model ({type(base).__name__}) carries a state through the padding of a prompted text",
            remedy="Pad on the right, or pass texts of one length",
        )
    if "position_ids" not in names and _position_table(base) is not None:
        _check_equal(base, carried)
    batch = len(mask)
    embeds = _embeds(base, arguments)
    types = arguments.get("token_type_ids") if "token_type_ids" in names else None
    if types is not None and any("token_type" in name for name, _ in base.named_modules()):
        arguments["token_type_ids"] = nn.functional.pad(types.expand(batch, -1), (carried.longest, 0))
    elif types is not None:  # GPT-2 and its like look them up among their words; prompts have none
        del arguments["token_type_ids"]
        embeds = embeds + base.get_input_embeddings()(types)
    prompt = _token_rows(carried, embeds).expand(batch, -1, -1)
    arguments["inputs_embeds"] = torch.cat([prompt, embeds], dim=1)
    if "position_ids" in names:
        positions = arguments["position_ids"].expand(batch, -1)
        ahead = (carried.mask(batch, mask).long().cumsum(-1) - 1).clamp(min=0)
        arguments["position_ids"] = torch.cat([ahead, positions], dim=1)
    if not (padded and counts):
        return None  # behind the prompt padding has something to see: softmax over nothing may be no number
    order = _slots(carried, mask, mask.shape[1])
    arguments["inputs_embeds"] = arguments["inputs_embeds"].take_along_dim(order[..., None], 1)
    for name in ("attention_mask", "position_ids"):
        if name in arguments:
            arguments[name] = arguments[name].gather(1, order)
    return order


def _inner_prompts(carried: Carried) -> dict[int, Any] | None:
    """Prompts that enter inside of the tower, by block; None if there are none."""
    from pt_nlp.blocks import BlockPrompt

    found = [h.prompt.blocks() for h in carried.handles if h is not None and h.prompt.offers("blocks")]
    if not found or found[0] is None:
        return None
    if carried.index is not None or carried.longest:
        raise InputError("prompts inside the tower cannot be mixed with other prompts in one batch")
    return {i: rows if isinstance(rows, BlockPrompt) else BlockPrompt(rows) for i, rows in found[0].items()}


def _cache_refused(cache: Any) -> str | None:
    """Why a prompt cannot stand in this cache as a ready prefix; None if it can."""
    if cache is None or (_kind(cache) is DynamicCache and not getattr(cache, "offloading", False)):
        return None
    return f"the cache is a {_kind(cache).__name__}" + " that is offloaded" * (_kind(cache) is DynamicCache)


def _check_key_values(base: Model, cache: Any, length: int) -> None:
    """Trained keys and values can only stand in a dynamic cache that every block reads as a whole."""
    if checkpoints_blocks(base) or _cache_refused(cache) is not None:
        raise InputError(
            "trained keys and values need the model's own dynamic cache: not with gradient checkpointing or another cache",
            remedy="Switch gradient checkpointing off, or use a prompt of input embeddings",
        )
    window = _window(base)
    if window is not None and length > window:
        raise InputError(
            f"prompt and text take {length} positions, the attention window of {type(base).__name__} has {window}",
            remedy="Cut the text: the last tokens would not see the trained keys and values",
        )


def _check_distances(base: Model, mask: Tensor) -> None:
    """Trained keys and values stand in front of the padding, which a model that counts slots takes for distance."""
    if base.config.model_type in SLOT_DISTANCES and bool((mask[:, 0] == 0).any()):
        raise InputError(
            f"{type(base).__name__} (ALiBi) counts the padding between trained keys and values and the text",
            remedy="Pad on the right, pass texts of one length, or use a prompt of input embeddings",
        )


def _check_room(cache: Any, length: int) -> None:
    """A static cache must be made with room for the prompt."""
    for layer in getattr(cache, "layers", []):
        if isinstance(layer, StaticLayer) and not layer.is_sliding and layer.max_cache_len < length:
            raise InputError(
                f"prompt and text take {length} positions, the static cache has {layer.max_cache_len}",
                remedy="Make it larger by the length of the prompt",
            )


def _position_table(base: Model) -> nn.Embedding | None:
    """The table of absolute positions of a tower, if it has one."""
    owners = (base, getattr(base, "embeddings", None), getattr(base, "encoder", None))
    tables = (getattr(owner, name, None) for owner in owners for name in POSITION_TABLES)
    return next((table for table in tables if isinstance(table, nn.Embedding)), None)


def _check_length(base: Model, length: int, positions: Tensor | None = None) -> None:
    """Learned absolute positions end somewhere; a look-up beyond them fails with an index error deep inside.

    Args:
        length: slots of prompt and text.
        positions: those of the tokens; padding may take fewer than it has slots.
    """
    table = _position_table(base)
    if table is None:
        return
    start = _first_position(base)
    limit = table.num_embeddings - start - getattr(table, "offset", 0)  # OPT and BART add an offset to all
    if length > limit and positions is not None:
        length = int(positions.max()) + 1 - start
    if length > limit:
        raise InputError(
            f"prompt and text take {length} positions, {type(base).__name__} has {limit}",
            remedy="Cut the text, or use a shorter prompt",
        )


# --- encoders -------------------------------------------------------------------------------------------------------
def _encoder(base: Model, selected: Callable[[], Rows | None]) -> Callable[[Forward], Forward]:
    def wrap(original: Forward) -> Forward:
        names = _keywords(original)

        def forward(*args: Any, **arguments: Any) -> Any:
            rows = selected()
            arguments.update(zip(names, args, strict=False))
            if rows is None:
                return original(**arguments)
            as_tuple = arguments.pop("return_dict", None) is False
            output = _encoder_call(base, original, names, arguments, rows)
            if getattr(base, "pooler", None) is not None:
                output.pooler_output = base.pooler(output.last_hidden_state)  # of the real first token
            return output.to_tuple() if as_tuple else output

        return forward

    return wrap


def _encoder_call(base: Model, original: Forward, names: list[str], arguments: dict[str, Any], rows: Rows) -> Any:
    """One call of a prompted encoder: keys are [trained keys and values, prompt rows, text], queries the last two."""
    ids = arguments.get("input_ids")
    first = ids if ids is not None else arguments["inputs_embeds"]
    batch, n, device = first.shape[0], first.shape[1], first.device
    carried = Carried.of(rows, batch, device)
    deep = _inner_prompts(carried)
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
        ahead = start + (ahead.long().cumsum(-1) - 1).clamp(min=0)
        arguments["position_ids"] = torch.cat([ahead, own.expand(batch, -1)], dim=1)
    elif carried.index is not None and carried.longest:
        raise InputError(
            f"a {type(base).__name__} takes no positions, so its rows cannot carry prompts of their own",
            remedy="Run the rows of each prompt by themselves",
        )
    _check_length(base, carried.longest + n, own)
    if soft.longest or carried.has_offset:
        embeds = carried.offset(_embeds(base, arguments), mask)
        prompt = _token_rows(soft, embeds).expand(batch, -1, -1)
        arguments["inputs_embeds"] = torch.cat([prompt, embeds], dim=1)
        types = arguments.get("token_type_ids")
        if types is not None:
            types = types.expand(batch, -1)
            arguments["token_type_ids"] = torch.cat([types.new_zeros(batch, soft.longest), types], dim=1)
    order = None
    if soft.longest and _position_table(base) is None and bool((mask[:, 0] == 0).any()):
        order = _slots(soft, mask, n)  # distances are counted in slots: padding stands in front of the prompt
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
        cache.layers = _prefix_layers(base, original, keys, batch, base.get_input_embeddings().weight.dtype)
        arguments["past_key_values"] = cache
    output = original(**arguments)
    if keys.longest:
        output.past_key_values = None
    return _trim(output, soft.longest, order)


def _padding_index(base: Model) -> int | None:
    """The position of padding in RoBERTa and its like, which count from behind it; None in all others."""
    embeddings = getattr(base, "embeddings", None)
    padding: int | None = getattr(embeddings, "padding_idx", None)
    return None if isinstance(embeddings, nn.Embedding) else padding  # XLM's is a table of tokens


def _first_position(base: Model) -> int:
    """Where an encoder starts to count."""
    padding = _padding_index(base)
    if padding is not None:
        return padding + 1
    table, own = _position_table(base), getattr(getattr(base, "embeddings", None), "position_ids", None)
    return 0 if table is None or own is None else table.num_embeddings - own.shape[-1]  # 2 in Nyströmformer


def _encoder_positions(base: Model, mask: Tensor, given: Tensor | None) -> tuple[int, Tensor]:
    """The first position of an encoder, and the positions that it gives to the tokens of a text, [b or 1, n]."""
    start, padding = _first_position(base), _padding_index(base)
    if given is not None:
        return start, given
    if padding is None:
        return start, start + torch.arange(mask.shape[1], device=mask.device)[None]
    return start, mask.long().cumsum(-1) * mask.long() + padding


# --- encoder-decoders -----------------------------------------------------------------------------------------------
def _text_encoder(encoder: Model, selected: Callable[[], Rows | None]) -> Callable[[Forward], Forward]:
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
            soft = Carried.of(rows, batch, embeds.device, "tokens")
            _check_equal(encoder, soft)
            _check_length(encoder, soft.longest + n)
            mask = arguments.get("attention_mask")
            if mask is None:
                mask = torch.ones(batch, n, dtype=torch.long, device=embeds.device)
            embeds = soft.offset(embeds, mask)
            prompt = _token_rows(soft, embeds).expand(batch, -1, -1)
            # T5 takes padding on the left for distance between prompt and text, as it does under peft: pad it on the right.
            arguments |= {
                "inputs_embeds": torch.cat([prompt, embeds], dim=1),
                "attention_mask": torch.cat([soft.mask(batch, mask), mask], dim=1),
            }
            return original(**arguments)

        return forward

    return wrap


def _text_decoder(decoder: Model, selected: Callable[[], Rows | None]) -> Callable[[Forward], Forward]:
    def wrap(original: Forward) -> Forward:
        names = _keywords(original)

        def forward(*args: Any, **arguments: Any) -> Any:
            rows = selected()
            arguments.update(zip(names, args, strict=False))
            memory = arguments.get("encoder_hidden_states")
            if rows is None or memory is None:
                return original(**arguments)
            batch = memory.shape[0]
            soft, keys = (Carried.of(rows, batch, memory.device, what) for what in ("tokens", "key_values"))
            mask = arguments.get("encoder_attention_mask")
            if mask is None:
                mask = torch.ones(batch, memory.shape[1] - soft.longest, dtype=torch.long, device=memory.device)
            if memory.shape[1] == mask.shape[1] + soft.longest:
                arguments["encoder_attention_mask"] = torch.cat([soft.mask(batch, mask), mask], dim=1)
            if keys.longest:
                return _decoder_with_prefix(decoder, original, arguments, keys, batch, memory)
            return original(**arguments)

        return forward

    return wrap


def _decoder_with_prefix(
    decoder: Model, original: Forward, arguments: dict[str, Any], keys: Carried, batch: int, memory: Tensor
) -> Any:
    _check_equal(decoder, keys)
    cache = arguments.get("past_key_values")
    wanted = arguments.get("use_cache")
    wanted = cache is not None or (decoder.config.use_cache if wanted is None else wanted)
    if cache is None:
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    own = cache.self_attention_cache
    ids = arguments.get("input_ids")
    n = (ids if ids is not None else arguments["inputs_embeds"]).shape[1]
    past = _seen(own, keys)
    mask = arguments.get("attention_mask")
    if mask is None:
        mask = torch.ones(batch, past + n, dtype=torch.long, device=memory.device)
    _check_length(decoder, keys.longest + mask.shape[1])
    _check_key_values(decoder, own, keys.longest + mask.shape[1])
    if not past:
        own.layers = _prefix_layers(decoder, original, keys, batch, memory.dtype)
        _mark(own, keys)
    arguments |= {
        "attention_mask": torch.cat([keys.mask(batch, mask), mask], dim=1),
        "past_key_values": cache,
        "use_cache": True,
    }
    with _inside(own):
        output = original(**arguments)
    if not wanted:
        output.past_key_values = None
    return output


def _check_equal(part: Model, carried: Carried) -> None:
    """Absolute positions that the model counts itself are right only if all rows have prompts of one length."""
    if len(set(carried.lengths)) > 1 and part.config.model_type not in RELATIVE_POSITIONS:
        raise InputError(
            f"rows of a {type(part).__name__} cannot carry prompts of unequal length",
            remedy="Run the rows of each prompt by themselves",
        )


def _hide_prompt_rows(selected: Callable[[], Rows | None]) -> Callable[[Forward], Forward]:
    def wrap(original: Forward) -> Forward:
        def forward(*args: Any, **arguments: Any) -> Any:
            rows = selected()
            if rows is None:
                return original(*args, **arguments)
            as_tuple = arguments.pop("return_dict", None) is False
            output = original(*args, **arguments)
            memory = getattr(output, "encoder_last_hidden_state", None)
            if memory is not None:
                longest = Carried.of(rows, memory.shape[0], memory.device, "tokens").longest
                output.encoder_last_hidden_state = memory[:, longest:]
                for name, cut in (("encoder_hidden_states", 1), ("encoder_attentions", 2)):
                    parts = getattr(output, name, None)
                    if parts is not None:
                        setattr(
                            output, name, tuple(part.narrow(cut, longest, part.shape[cut] - longest) for part in parts)
                        )
            return output.to_tuple() if as_tuple else output

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

    def matches(self, backbone: Model) -> bool:
        ours = any(cls.__module__.startswith("transformers.") for cls in type(backbone).__mro__)
        return ours and hasattr(backbone, "get_input_embeddings") and hasattr(backbone.config, "get_text_config")

    def check(self, backbone: Model, prompt: Prompt) -> None:
        shape = shape_of(backbone)
        tokens, key_values = prompt.tokens(), prompt.key_values()
        if tokens is not None and tokens.shape[1] != shape.dim:
            raise InputError(
                f"the prompt is {tokens.shape[1]} wide, the embeddings of {_name(backbone)} are {shape.dim}"
            )
        if hasattr(backbone, "peft_config") and hasattr(backbone, "get_base_model"):
            raise InputError(
                f"a {type(backbone).__name__} of peft has a forward of its own",
                remedy="Attach the prompt to its `get_base_model()`",
            )
        kind, causal, parameters = backbone.config.model_type, is_causal(backbone), _parameters(base_of(backbone))
        encoder = not causal and not backbone.config.is_encoder_decoder
        if backbone.config.is_encoder_decoder and "decoder_input_ids" not in _parameters(backbone):
            raise InputError(
                f"{_name(backbone)} is an encoder whose configuration says that it has a decoder",
                remedy="Set `model.config.is_encoder_decoder = False`",
            )
        config = backbone.config.get_text_config()
        if getattr(config, "hidden_size_per_layer_input", None):
            raise InputError(f"{_name(backbone)} looks tokens up by their ids in every layer: prompt rows have none")
        # ESM takes input embeddings, but then leaves out what it does to those of tokens.
        if encoder and (kind == "esm" or not {"inputs_embeds", "attention_mask"} <= parameters):
            raise InputError(f"{_name(backbone)} does not read input embeddings under a mask as it reads tokens")
        if causal and _padding_index(base_of(backbone)) is not None:
            raise InputError(
                f"{_name(backbone)} counts positions from behind its padding index, which a prompt of a decoder does not",
                remedy="Use it as an encoder, or another causal language model",
            )
        if backbone.config.is_encoder_decoder and not hasattr(backbone.get_encoder(), "get_input_embeddings"):
            raise InputError(f"the encoder of {_name(backbone)} does not show its input embeddings")
        caches = {"past_key_values", "cache_params"} & parameters
        if causal and (not caches or (key_values is not None and "past_key_values" not in caches)):
            raise InputError(
                f"{_name(backbone)} has no cache of keys and values that prompts could stand in",
                remedy="Use a model with attention" + " or a prompt of input embeddings" * bool(caches),
            )
        latent = getattr(config, "kv_lora_rank", None) or _layer_types(base_of(backbone)) - ATTENTION_LAYERS
        if key_values is not None and ((encoder and kind not in KEY_VALUE_ENCODERS) or (causal and latent)):
            raise InputError(
                f"{_name(backbone)} ({kind}) takes no trained keys and values",
                remedy=f"Use a prompt of input embeddings, or another model (encoders: {sorted(KEY_VALUE_ENCODERS)})",
            )
        expected = (shape.layers, 2, shape.kv_heads, prompt.length, shape.head_dim)
        if key_values is not None and tuple(key_values.shape) != expected:
            raise InputError(
                f"keys and values are {tuple(key_values.shape)}, {_name(backbone)} takes {expected}",
                remedy="[layers, 2, key-value heads, length, head width]",
            )
        blocks = prompt.blocks()
        if blocks is not None and backbone.config.is_encoder_decoder:
            raise InputError(f"{_name(backbone)} is an encoder-decoder: prompts do not enter inside of its towers")
        if blocks is not None and not all(0 <= i < shape.layers for i in blocks):
            raise InputError(
                f"the prompt enters blocks {sorted(blocks)}, {_name(backbone)} has 0 to {shape.layers - 1}"
            )

    def patches(
        self, backbone: Model, selected: Callable[[], Rows | None]
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
        last = [(decoder_blocks(base)[-1], last_block)] if base.config.model_type in SHARED_PREFIX else []
        return [(base, _causal(base, selected)), *last, *head]


def is_causal(backbone: Model) -> bool:
    """Whether tokens attend only to earlier ones (decoder-only models)."""
    config = backbone.config
    if config.is_encoder_decoder:
        return False
    if getattr(config, "is_decoder", False):
        return True
    if getattr(config, "is_causal", True) is False or getattr(config, "use_bidirectional_attention", None) is True:
        return False
    kind = config.model_type
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES or kind in BIDIRECTIONAL:
        return False
    # The rest are no language models by themselves, like the language part of a vision-language model.
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "past_key_values" in _parameters(base_of(backbone))


def _parameters(base: Model) -> set[str]:
    return set(inspect.signature(base.forward).parameters)


def _name(backbone: Model) -> str:
    return getattr(backbone.config, "_name_or_path", "") or type(backbone).__name__


register_family(_TextFamily())
