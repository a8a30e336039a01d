"""Frozen text backbones, and where prompts attach to them.

Three families of Hugging Face models: causal language models (pt_nlp.causal), encoders and encoder-decoders
(pt_nlp.bidirectional). `attach` (in pt_core) replaces the forward of the base model only, so that heads, losses, `generate`,
pipelines and trainers run as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from pt_core.attachment import Forward, Rows, register_family
from pt_core.errors import InputError
from pt_core.prompts import Prompt
from pt_nlp.bidirectional import around_encoder, around_text_decoder, around_text_encoder, hide_prompt_rows
from pt_nlp.causal import around_causal, labels_are_targets
from pt_nlp.models import (
    ATTENTION_LAYERS,
    SHARED_PREFIX,
    Model,
    base_of,
    decoder_blocks,
    is_causal,
    layer_types,
    name_of,
    padding_index,
    parameters_of,
    shape_of,
)
from pt_nlp.one_row import last_block

KEY_VALUE_ENCODERS = {"bert", "roberta", "xlm-roberta", "camembert", "electra"}


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


class _TextFamily:
    name = "text (transformers)"

    def matches(self, backbone: Model) -> bool:
        ours = any(cls.__module__.startswith("transformers.") for cls in type(backbone).__mro__)
        return ours and hasattr(backbone, "get_input_embeddings") and hasattr(backbone.config, "get_text_config")

    def check(self, backbone: Model, prompt: Prompt) -> None:
        if getattr(backbone, "main_input_name", "input_ids") != "input_ids":
            raise InputError(
                f"a {type(backbone).__name__} reads no text (but {backbone.main_input_name})",
                remedy="Attach the prompt to a language model, or to the one inside of it",
            )
        shape = shape_of(backbone)
        tokens, key_values = prompt.tokens(), prompt.key_values()
        if tokens is not None and tokens.shape[1] != shape.dim:
            raise InputError(
                f"the prompt is {tokens.shape[1]} wide, the embeddings of {name_of(backbone)} are {shape.dim}"
            )
        if hasattr(backbone, "peft_config") and hasattr(backbone, "get_base_model"):
            raise InputError(
                f"a {type(backbone).__name__} of peft has a forward of its own",
                remedy="Attach the prompt to its `get_base_model()`",
            )
        kind, causal, parameters = backbone.config.model_type, is_causal(backbone), parameters_of(base_of(backbone))
        encoder = not causal and not backbone.config.is_encoder_decoder
        if backbone.config.is_encoder_decoder and "decoder_input_ids" not in parameters_of(backbone):
            raise InputError(
                f"{name_of(backbone)} is an encoder whose configuration says that it has a decoder",
                remedy="Set `model.config.is_encoder_decoder = False`",
            )
        config = backbone.config.get_text_config()
        if getattr(config, "hidden_size_per_layer_input", None):
            raise InputError(f"{name_of(backbone)} looks tokens up by their ids in every layer: prompt rows have none")
        # ESM takes input embeddings, but then leaves out what it does to those of tokens.
        if encoder and (kind == "esm" or not {"inputs_embeds", "attention_mask"} <= parameters):
            raise InputError(f"{name_of(backbone)} does not read input embeddings under a mask as it reads tokens")
        if causal and padding_index(base_of(backbone)) is not None:
            raise InputError(
                f"{name_of(backbone)} counts positions from behind its padding index, which a prompt of a decoder does not",
                remedy="Use it as an encoder, or another causal language model",
            )
        if backbone.config.is_encoder_decoder and not hasattr(backbone.get_encoder(), "get_input_embeddings"):
            raise InputError(f"the encoder of {name_of(backbone)} does not show its input embeddings")
        if causal and key_values is not None:
            decoder_blocks(base_of(backbone))  # found here, while the configuration counts all of them
        caches = {"past_key_values", "cache_params"} & parameters
        if causal and (not caches or (key_values is not None and "past_key_values" not in caches)):
            raise InputError(
                f"{name_of(backbone)} has no cache of keys and values that prompts could stand in",
                remedy="Use a model with attention" + " or a prompt of input embeddings" * bool(caches),
            )
        latent = getattr(config, "kv_lora_rank", None) or layer_types(base_of(backbone)) - ATTENTION_LAYERS
        if key_values is not None and ((encoder and kind not in KEY_VALUE_ENCODERS) or (causal and latent)):
            raise InputError(
                f"{name_of(backbone)} ({kind}) takes no trained keys and values",
                remedy=f"Use a prompt of input embeddings, or another model (encoders: {sorted(KEY_VALUE_ENCODERS)})",
            )
        expected = (shape.layers, 2, shape.kv_heads, prompt.length, shape.head_dim)
        if key_values is not None and tuple(key_values.shape) != expected:
            raise InputError(
                f"keys and values are {tuple(key_values.shape)}, {name_of(backbone)} takes {expected}",
                remedy="[layers, 2, key-value heads, length, head width]",
            )
        blocks = prompt.blocks()
        if blocks is not None and backbone.config.is_encoder_decoder:
            raise InputError(f"{name_of(backbone)} is an encoder-decoder: prompts do not enter inside of its towers")
        if blocks is not None and not all(0 <= i < shape.layers for i in blocks):
            raise InputError(
                f"the prompt enters blocks {sorted(blocks)}, {name_of(backbone)} has 0 to {shape.layers - 1}"
            )

    def patches(
        self, backbone: Model, selected: Callable[[], Rows | None]
    ) -> list[tuple[nn.Module, Callable[[Forward], Forward]]]:
        if backbone.config.is_encoder_decoder:
            return [
                (backbone.get_encoder(), around_text_encoder(backbone.get_encoder(), selected)),
                (backbone.get_decoder(), around_text_decoder(backbone.get_decoder(), selected)),
                (backbone, hide_prompt_rows(selected)),
            ]
        base = base_of(backbone)
        if not is_causal(backbone):
            return [(base, around_encoder(base, selected))]
        writes = base is not backbone and backbone.get_output_embeddings() is not None
        head = [(backbone, labels_are_targets(selected))] if writes else []
        last = [(decoder_blocks(base)[-1], last_block)] if base.config.model_type in SHARED_PREFIX else []
        return [(base, around_causal(base, selected, writes)), *last, *head]


register_family(_TextFamily())
