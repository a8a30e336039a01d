"""Tiny random models and a tokenizer of words, made in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from pt_core.testing import one_thread

VOCAB, WIDTH = 48, 16


def build(kind: str, head: str | None = None, seed: int = 0, **changes: Any) -> nn.Module:
    """A random model of two layers in which every token matters: weights of 0.3, where 0.02 is usual.

    Args:
        kind: prefix of a class of transformers (`Llama`, `GPT2` ...).
        head: suffix of the class; default: the language model, for encoders the bare one.
        changes: fields of the configuration.
    """
    special = {"vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": None}
    common = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    common |= special | {"initializer_range": 0.3, "max_position_embeddings": 96}
    grouped = {"num_key_value_heads": 2, "head_dim": 4}
    own: dict[str, dict[str, Any]] = {
        "Llama": common | grouped,
        "Qwen2": common | {"num_key_value_heads": 2},
        "Qwen3": common | grouped,
        "Mistral": common | grouped | {"sliding_window": None},
        "GPTNeoX": common | {"hidden_dropout": 0.0, "rotary_pct": 0.5},
        "GPT2": special | {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 96, "initializer_range": 0.3},
        "OPT": special
        | {"hidden_size": WIDTH, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "init_std": 0.3}
        | {"word_embed_proj_dim": WIDTH, "max_position_embeddings": 96},
        "Gemma": common | grouped,
        "Mpt": special | {"d_model": WIDTH, "n_layers": 2, "n_heads": 4, "max_seq_len": 96, "initializer_range": 0.3},
        "Falcon": special
        | {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3},
        "GPTBigCode": special
        | {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 96, "initializer_range": 0.3},
        "Mamba": special | {"hidden_size": WIDTH, "state_size": 4, "num_hidden_layers": 2, "initializer_range": 0.3},
        "Bert": common | {"eos_token_id": 1},
        "Roberta": common | {"pad_token_id": 1, "eos_token_id": 2},
        "XLMRoberta": common | {"pad_token_id": 1, "eos_token_id": 2},
        "Camembert": common | {"pad_token_id": 1, "eos_token_id": 2},
        "Data2VecText": common | {"pad_token_id": 1, "eos_token_id": 2},
        "Electra": common | {"embedding_size": 8, "eos_token_id": 1},
        "Albert": common | {"embedding_size": 8, "eos_token_id": 1},
        "Ernie": common | {"eos_token_id": 1},
        "BigBird": common | {"eos_token_id": 1, "attention_type": "original_full"},
        "ModernBert": common | {"eos_token_id": 1, "cls_token_id": 1, "sep_token_id": 2},
        "DistilBert": special
        | {"dim": WIDTH, "hidden_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 96}
        | {"initializer_range": 0.3, "eos_token_id": 1},
        "T5": special
        | {"d_model": WIDTH, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
        | {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"},
        "Bart": special
        | {"d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "init_std": 0.3}
        | {"decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "decoder_start_token_id": 2},
    }
    heads = {"GPT2": "LMHeadModel", "T5": "ForConditionalGeneration", "Bart": "ForConditionalGeneration"}
    bare = ("Bert", "Roberta", "XLMRoberta", "Camembert", "Data2VecText", "Electra", "Albert", "Ernie", "BigBird")
    heads |= dict.fromkeys((*bare, "ModernBert", "DistilBert"), "Model")
    config = getattr(hf, f"{kind}Config")(**own[kind] | changes)
    torch.manual_seed(seed)
    model = getattr(hf, kind + (head or heads.get(kind, "ForCausalLM")))(config)
    model.requires_grad_(False)
    return model.eval()


@pytest.fixture
def tiny() -> Callable[..., nn.Module]:
    """See `build`."""
    return build


@pytest.fixture
def words() -> hf.PreTrainedTokenizerFast:
    """A tokenizer of the words of a small language; ids below 40."""
    known = "good bad film news sport the a was is great awful red blue green Topic : positive negative first second rain sun"
    made = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *known.split()])}, unk_token="<unk>")
    )
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
    )


@pytest.fixture(autouse=True)
def on_one_thread() -> Iterator[None]:
    with one_thread():
        yield
