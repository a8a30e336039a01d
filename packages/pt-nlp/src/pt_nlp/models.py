"""Text models as transformers has them: their parts and sizes, and what may be relied on."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from pt_core.errors import InputError

Model = Any  # a transformers model: what its class has, nn.Module's annotations do not know

SHARED_PREFIX = {"llama", "qwen2", "qwen3", "mistral", "gpt2", "gpt_neox"}  # the types the exact shortcut is tested on
BIDIRECTIONAL = {"bert-generation", "xlnet"}  # write text, but read it both ways unless `is_decoder` is set
HOOKED_BY = {"torch", "transformers", "accelerate", "peft", "deepspeed", "bitsandbytes"}
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")  # fields of configurations
POSITION_TABLES = ("position_embeddings", "embed_positions", "wpe")
RELATIVE_POSITIONS = {"t5", "mt5", "umt5"}  # encoder-decoders in which only distances count
SCALED_IDS = {  # towers that scale the embeddings of ids outside of the table, and leave those that they are given as they are
    "MarianEncoder": "embed_scale",
    "PegasusEncoder": "embed_scale",
    "BlenderbotSmallEncoder": "embed_scale",
    "MvpEncoder": "embed_scale",
    "MvpDecoder": "embed_scale",
    "FalconH1Model": "embedding_multiplier",
}
ATTENTION_LAYERS = {
    "full_attention",
    "sliding_attention",
    "chunked_attention",
}  # all others carry a state through padding


def base_of(backbone: Model) -> Model:
    """The transformer without its head (the model itself if it has none): what every call of the backbone runs."""
    base: Model = getattr(backbone, "base_model", backbone)
    inner = getattr(base, "decoder", None)
    # OPT: the language model calls the decoder in the base model, never the base model itself.
    return inner if isinstance(inner, PreTrainedModel) and not backbone.config.is_encoder_decoder else base


def reader_of(backbone: Model) -> Model:
    """The tower that reads the text and whose input embeddings prompts join."""
    return backbone.get_encoder() if backbone.config.is_encoder_decoder else base_of(backbone)


def embed_ids(tower: Model, ids: Tensor) -> Tensor:
    """What a tower makes of ids [...], as `inputs_embeds` would have it: [..., d]."""
    embeds: Tensor = tower.get_input_embeddings()(ids)
    scale = SCALED_IDS.get(type(tower).__name__)
    return embeds if scale is None else embeds * getattr(tower, scale)


_BLOCKS: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # the name of each tower's list of blocks


def decoder_blocks(base: Model) -> nn.ModuleList:
    """The list of transformer blocks that a tower runs, first block first.

    It is looked for once, where a prompt is attached: `generate` lowers the number of layers in the configuration while a
    model drafts for itself (`assistant_early_exit`), and then it is the first of them.
    """
    config = base.config.get_text_config()
    layers = getattr(config, "decoder_layers", None) or config.num_hidden_layers  # BART's is the number of the encoder
    if base not in _BLOCKS:
        lists = ((name, module) for name, module in base.named_modules() if isinstance(module, nn.ModuleList))
        found = next((name for name, module in lists if len(module) == layers), None)
        if found is None:
            raise InputError(f"no list of {layers} blocks was found in a {type(base).__name__}")
        _BLOCKS[base] = found
    blocks: nn.ModuleList = base.get_submodule(_BLOCKS[base])
    return blocks if len(blocks) == layers else blocks[:layers]


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
    dim = backbone.get_input_embeddings().embedding_dim
    heads, layers = (
        getattr(config, "num_attention_heads", None) or 1,
        config.num_hidden_layers,
    )  # a recurrent model has none
    if backbone.config.is_encoder_decoder:
        heads = getattr(config, "decoder_attention_heads", None) or heads
        layers = getattr(config, "num_decoder_layers", None) or getattr(config, "decoder_layers", None) or layers
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


def device_of(module: nn.Module) -> torch.device:
    """Where a module runs: its weights may be somewhere else in between (accelerate's offloading)."""
    runs = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return (
        torch.device(runs) if runs is not None else next((p.device for p in module.parameters()), torch.device("cpu"))
    )


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
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "past_key_values" in parameters_of(base_of(backbone))


def parameters_of(base: Model) -> set[str]:
    """Names of the arguments of a model."""
    return set(inspect.signature(base.forward).parameters)


def name_of(backbone: Model) -> str:
    """What errors call a model."""
    return getattr(backbone.config, "_name_or_path", "") or type(backbone).__name__


def positions_of(mask: Tensor) -> Tensor:
    """Positions of real tokens, counted without padding."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def layer_types(base: Model) -> set[str]:
    """Kinds of layers that a configuration names; empty where it names none."""
    return set(getattr(base.config.get_text_config(), "layer_types", None) or [])


def window_of(base: Model) -> int | None:
    """Slots that local attention sees; None where all layers see everything, or one cannot tell."""
    config = base.config.get_text_config()
    return next((size for name in WINDOWS if isinstance(size := getattr(config, name, None), int) and size), None)


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
                    f"the blocks of {name_of(backbone)} drop states out wherever they are checkpointed",
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


def hooks_on_rows(base: Model) -> str | None:
    """Why hooks in a model may tell the rows of a batch apart: it must then be passed as it is. None if none does.

    Those of the model itself and of its input embeddings see the text's rows in any case. The libraries of `HOOKED_BY` take
    rows as they come, but for peft where it gives each row an adapter of its own in this call (`adapter_names`).
    """
    outside = (base, base.get_input_embeddings())
    for module in base.modules():
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        hooks += [*module._backward_pre_hooks.values(), *module._backward_hooks.values()]
        for hook in hooks if module not in outside else ():
            if {"adapter_names", "alora_offsets"} & set(getattr(hook, "keywords", ())):
                return "rows have adapters of their own"
            origin = getattr(getattr(hook, "func", hook), "__module__", None) or ""
            if origin.partition(".")[0] not in HOOKED_BY:
                return "a hook reads or changes states of the model"
    return None


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
    return hooks_on_rows(base)


def _rotates_by_length(config: Any) -> bool:
    """Whether rotary frequencies depend on the longest position of a call: keys of the prompt alone are then not its keys."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]  # one for each type of layer
    return any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds)


def position_table(base: Model) -> nn.Embedding | None:
    """The table of absolute positions of a tower, if it has one."""
    owners = (base, getattr(base, "embeddings", None), getattr(base, "encoder", None))
    tables = (getattr(owner, name, None) for owner in owners for name in POSITION_TABLES)
    return next((table for table in tables if isinstance(table, nn.Embedding)), None)


def padding_index(base: Model) -> int | None:
    """The position of padding in RoBERTa and its like, which count from behind it; None in all others."""
    embeddings = getattr(base, "embeddings", None)
    padding: int | None = getattr(embeddings, "padding_idx", None)
    return None if isinstance(embeddings, nn.Embedding) else padding  # XLM's is a table of tokens


def first_position(base: Model) -> int:
    """Where an encoder starts to count."""
    padding = padding_index(base)
    if padding is not None:
        return padding + 1
    table, own = position_table(base), getattr(getattr(base, "embeddings", None), "position_ids", None)
    return 0 if table is None or own is None else table.num_embeddings - own.shape[-1]  # 2 in Nyströmformer


def check_length(base: Model, length: int, positions: Tensor | None = None) -> None:
    """Learned absolute positions end somewhere; a look-up beyond them fails with an index error deep inside.

    Args:
        length: slots of prompt and text.
        positions: those of the tokens; padding may take fewer than it has slots.
    """
    table = position_table(base)
    if table is None:
        return
    start = first_position(base)
    limit = table.num_embeddings - start - getattr(table, "offset", 0)  # OPT and BART add an offset to all
    if length > limit and positions is not None:
        length = int(positions.max()) + 1 - start
    if length > limit:
        raise InputError(
            f"prompt and text take {length} positions, {type(base).__name__} has {limit}",
            remedy="Cut the text, or use a shorter prompt",
        )
