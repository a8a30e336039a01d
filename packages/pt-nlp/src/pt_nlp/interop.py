"""Prompts from and for the peft library: its adapter folders, read and written without it.

    adapter_config.json          kind of prompt and its sizes
    adapter_model.safetensors    `prompt_embeddings`: rows [l, d], or flat keys and values [l, N * 2 * heads * d_h]

peft writes what a prompt encoder or projection has made, not the network, so a P-tuning adapter is read as prompt tuning
and a projected prefix as a plain one. Checked in both directions with peft 0.21. LoRA and (IA)^3, which are peft's own, are
written too; there is no need to read them here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from pt_core import artifacts
from pt_core.errors import InputError
from pt_core.method import Method
from pt_nlp.methods.peft_peers import AdapterMethod
from pt_nlp.methods.prefix_tuning import PrefixTuning, PrefixTuningConfig, flatten, unflatten
from pt_nlp.methods.prompt_tuning import PromptTuning, PromptTuningConfig
from pt_nlp.models import Model, base_of, is_causal, shape_of

CONFIG, TENSORS = FILES = ("adapter_config.json", "adapter_model.safetensors")
READ = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # tasks for which peft trains and saves a head, unasked
WRITTEN = ("prompt-tuning", "p-tuning", "prefix-tuning", "spot", "lora", "ia3")


def import_peft(path: str | Path, backbone: Model) -> Method:
    """Read a peft adapter folder and put its prompt on `backbone`.

    Args:
        path: folder with adapter_config.json and adapter_model.safetensors.
        backbone: the model that the adapter was trained on.

    Returns:
        `PromptTuning` (for PROMPT_TUNING and P_TUNING) or `PrefixTuning` (for PREFIX_TUNING) without a head. Of two sets
        of rows for an encoder-decoder only the first is read, as peft does.

    Raises:
        InputError: a file is missing or damaged, the kind is not supported, the folder holds more than a prompt, or the
            prompt does not fit the backbone.
    """
    config, rows = _read(Path(path))
    kind, file = config["peft_type"], Path(path) / TENSORS
    if kind == "PREFIX_TUNING":
        _check_prefix(backbone)
        shape = shape_of(backbone)
        width = shape.layers * 2 * shape.kv_heads * shape.head_dim
    else:
        width = shape_of(backbone).dim
        rows = rows[: config["num_virtual_tokens"]]
    if tuple(rows.shape) != (config["num_virtual_tokens"], width):
        raise InputError(
            f"has shape {tuple(rows.shape)}, this backbone takes {(config['num_virtual_tokens'], width)}",
            file=file,
            field="prompt_embeddings",
            remedy=f"Load the backbone that it was trained on ({config.get('base_model_name_or_path') or 'not named'})",
        )
    method: Method
    if kind == "PREFIX_TUNING":
        method = PrefixTuning(backbone, PrefixTuningConfig(prompt_length=len(rows), init="zero"))
        method.load_trained_state({"prompt.weight": unflatten(rows, shape)})
    else:
        method = PromptTuning(backbone, PromptTuningConfig(prompt_length=len(rows), init="random"))
        method.load_trained_state({"prompt.weight": rows})
    return method.eval()


def export_peft(method: Method, path: str | Path) -> Path:
    """Write what a method trained as an adapter folder that peft loads, whole or not at all.

    Args:
        method: prompt tuning or SPoT, P-tuning (its rows are written as prompt tuning), prefix tuning (its keys and values,
            without a projection), LoRA or (IA)^3, without a head.
        path: folder; replaced if it holds an adapter and nothing else.

    Raises:
        InputError: the method is none of those, or the folder holds other files.
    """
    if method.name not in WRITTEN:
        raise InputError(
            f"{method.name} is not exported to peft (exported are {', '.join(WRITTEN)})",
            remedy="Use the saved artifact: it holds the trained tensors as safetensors",
        )
    if getattr(method, "head", None) is not None:
        raise InputError(
            "a peft adapter holds no head of this library", remedy="Use save_pretrained, or train with label words"
        )
    backbone: Model = method.backbone
    writes = is_causal(backbone) and base_of(backbone) is not backbone
    seq2seq = backbone.config.is_encoder_decoder
    task = "SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM" if writes else "FEATURE_EXTRACTION"
    config, tensors = method.peft_state(task) if isinstance(method, AdapterMethod) else _prompt_state(method, task)
    config |= {"base_model_name_or_path": getattr(backbone.config, "_name_or_path", "") or None}
    whole = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
    contents = {
        CONFIG: json.dumps(config, indent=2, sort_keys=True).encode() + b"\n",
        TENSORS: save(whole, {"format": "pt"}),
    }
    artifacts.write_folder(Path(path), contents)
    return Path(path)


def _prompt_state(method: Method, task: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of a prompt as peft has them."""
    backbone: Model = method.backbone
    shape = shape_of(backbone)
    if isinstance(method, PrefixTuning):
        _check_prefix(backbone)
        kind: dict[str, Any] = {"peft_type": "PREFIX_TUNING", "prefix_projection": False}
        kind |= {"token_dim": shape.kv_heads * shape.head_dim, "num_attention_heads": shape.kv_heads}
    else:
        kind = {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM"}
        kind |= {"token_dim": shape.dim, "num_attention_heads": backbone.config.get_text_config().num_attention_heads}
    rows = _rows(method)
    config = kind | {
        "task_type": task,
        "inference_mode": True,
        "num_virtual_tokens": len(rows),
        "num_layers": shape.layers,
        "num_transformer_submodules": 1,
    }
    return config, {"prompt_embeddings": rows}


def _rows(method: Any) -> Tensor:
    """What peft keeps of a prompt: rows [l, d], or flat keys and values [l, N * 2 * heads * d_h]."""
    if isinstance(method, PromptTuning):
        return cast(Tensor, method.prompt.weight)
    plain = method.folded()
    plain.remove()
    return flatten(plain.prompt.weight) if isinstance(method, PrefixTuning) else plain.prompt.weight


def _check_prefix(backbone: Model) -> None:
    if backbone.config.is_encoder_decoder:
        raise InputError(
            "PREFIX_TUNING of an encoder-decoder is not supported: peft lets decoder layers share keys and values there, "
            "so the same numbers would mean another prefix",
            remedy=f"Supported for encoder-decoders: {', '.join(READ[:2])}",
        )


def _read(folder: Path) -> tuple[dict[str, Any], Tensor]:
    """Configuration and `prompt_embeddings` (float32) of an adapter folder."""
    for name in (CONFIG, TENSORS):
        if not (folder / name).is_file():
            remedy = "Is this the folder of a peft adapter, saved as safetensors?"
            raise InputError("is missing", file=folder / name, remedy=remedy)
    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"is not JSON ({error})", file=folder / CONFIG, remedy="Get the file again") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind not in READ:
        raise InputError(
            f"{kind!r} is not supported",
            file=folder / CONFIG,
            field="peft_type",
            remedy=f"Supported: {', '.join(READ)}",
        )
    length = config.get("num_virtual_tokens")
    if not isinstance(length, int) or length < 1:
        raise InputError(f"is {length!r}", file=folder / CONFIG, field="num_virtual_tokens", remedy="A count is needed")
    try:
        tensors = load((folder / TENSORS).read_bytes())
    except SafetensorError as error:
        raise InputError(f"is damaged ({error})", file=folder / TENSORS, remedy="Get the file again") from error
    if tensors.keys() != {"prompt_embeddings"}:
        remedy = "Save the adapter without modules_to_save: a head belongs to peft's own model class"
        if config.get("task_type") in HEADS:  # nobody named it in modules_to_save
            remedy = f"peft adds a head for {config['task_type']} by itself: use the adapter with peft, or write "
            remedy += "prompt_embeddings alone into the file and train a head here"
        raise InputError(
            f"holds {', '.join(sorted(tensors)) or 'nothing'}; prompt_embeddings alone can be read",
            file=folder / TENSORS,
            remedy=remedy,
        )
    rows = tensors["prompt_embeddings"].float()
    if not bool(torch.isfinite(rows).all()):
        raise InputError("holds values that are not finite", file=folder / TENSORS, remedy="Do not use this adapter")
    return config, rows
