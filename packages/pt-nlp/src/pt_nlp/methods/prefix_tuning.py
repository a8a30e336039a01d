"""Prefix tuning: trained keys and values in front of those of every layer (Li and Liang 2021)."""

from __future__ import annotations

from typing import Literal, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from pt_core.attachment import off
from pt_core.errors import InputError
from pt_core.prompts import KeyValuePrompt, Prompt
from pt_nlp.method import TextConfig, TextMethod
from pt_nlp.methods.prompt_tuning import check_ids
from pt_nlp.models import Shape, base_of, device_of, is_causal, shape_of


class PrefixTuningConfig(TextConfig):
    """Settings of prefix tuning."""

    prompt_length: int = Field(
        20, ge=1, description="l; 20 in peft examples, 5 for GPT-2 and 200 for BART on XSum in Li and Liang 2021"
    )
    projection_dim: int | None = Field(
        None,
        ge=1,
        description="h of the network that makes the prefix; None trains keys and values themselves (peft's default); "
        "512 for GPT-2 and 800 for BART in the released code",
    )
    init: Literal["random", "zero", "text"] = Field(
        "zero",
        description="zeros (with a projection: of its last layer), 35.8 % in peft's method comparison; N(0, init_std^2), "
        "peft's default, 18.6 %; the keys and values that the backbone computes for a written instruction, 41.6 % with "
        "50 rows (causal models)",
    )
    init_std: float = Field(1.0, gt=0, description="of `init: random`, and of a projection's embeddings; peft's")
    init_text: str = Field("", description="text that `init: text` starts from; recipes turn it into `init_ids`")
    init_ids: tuple[int, ...] = Field((), description="token ids of that text, at least l; the first l are used")
    dropout: float = Field(0.0, ge=0, lt=1, description="on keys and values while training; 0 in peft")
    lr: float = Field(
        5e-3,
        gt=0,
        description="5e-3 from zeros, 1e-3 from N(0, 1) in peft's method comparison (Llama-3.2-3B, MetaMathQA to GSM8K); "
        "5e-5 with a projection in the released code",
    )

    @model_validator(mode="after")
    def _used(self) -> Self:
        if self.init_text and self.init != "text":
            raise ValueError(f"init_text would not be used: init is {self.init}, not text")
        return self


class PrefixTuning(TextMethod):
    """Prefix tuning: K_j = [PK_j; K_j] and V_j = [PV_j; V_j] in the self-attention of every layer j; no query row is added.

    Input ids [b, n] -> class logits [b, C] or token logits at the targets. The prefix is [N, 2, heads, l, d_h], with
    the key-value heads of grouped-query attention, so d_kv = heads * d_h may be smaller than d. Real tokens take the
    positions from l on; prefix keys carry no rotation. Causal models, BERT-like encoders, and the decoder of
    encoder-decoders.

    Parameters: 2 * N * l * d_kv. With a projection of width h: l * d + d * h + h + 2 * N * d_kv * (h + 1). Plus the
    head, if one is asked for. Llama-3.2-3B, l = 200: 11,468,800.

    A projection is only a way to train. `folded()` gives the same method with plain keys and values; save or export that
    one, unless training shall go on: `trained_state` and so artifacts and checkpoints hold what is trained, which is the
    projection.

    Fidelity: forward and projection (embedding, Linear, tanh, Linear) follow the paper and the released code, the
    layout follows peft. Start and rate are the better ones of peft's method comparison; peft itself starts from N(0, 1)
    unless told, a projection from torch's layers (`init: random`). Dropout in the frozen model is off, as released for
    GPT-2 (`use_dropout` no); for BART the released code leaves it on (`backbone_dropout`). Even a prefix of zeros takes
    attention: the start is not the identity. Without a projection and without dropout its rows have one gradient and
    stay equal to each other, in peft too: l then is the weight of one trained row. Only where attention adds a bias by
    distance (T5, ALiBi as in MPT) do they come apart. peft narrows the projection's embeddings to d_kv under
    grouped-query attention; here they are d wide. Encoder-decoders get a prefix in the decoder's self-attention only,
    as in peft; the paper also puts one in the encoder and in cross-attention. There, each layer has its own prefix:
    peft 0.21 doubles the list of columns and cuts it in four, so that its T5 layer i reads the columns 4i and 4i+1
    modulo 2N, and for even N layers i and i + N/2 share theirs while half of the columns never get a gradient.

    Reference: Li, Liang. Prefix-Tuning: Optimizing Continuous Prompts for Generation. ACL 2021.
    """

    name = "prefix-tuning"
    config_class = PrefixTuningConfig

    def build_prompt(self) -> Prompt:
        config, shape = self.config, shape_of(self.backbone)
        if self.backbone.config.is_encoder_decoder and config.num_labels is not None:
            raise InputError(
                f"{self.name} acts in the decoder, a head reads the encoder: it would train without the prefix",
                field="num_labels",
                remedy="Read the language model head (a verbalizer or text-to-text task), or use prompt tuning",
            )
        if config.projection_dim is not None and config.init == "text":
            raise InputError("a projection cannot start from a text", field="init", remedy="Train without a projection")
        if config.projection_dim is not None:
            return ProjectedPrefix(shape, config, self.generator)
        start = self.cache_of_text() if config.init == "text" else None
        return Prefix(shape, config, self.generator, start)

    def cache_of_text(self) -> Tensor:
        """Keys and values that the backbone computes for the first l tokens of a text, [N, 2, heads, l, d_h].

        With them the method starts where the text itself in front of every input would start.

        Raises:
            InputError: the text is shorter than l, has unknown ids, or the backbone is not a causal language model.
        """
        ids, length = self.config.init_ids, self.config.prompt_length
        table = self.backbone.get_input_embeddings().weight
        if self.backbone.config.is_encoder_decoder or not is_causal(self.backbone):
            raise InputError("only causal language models keep keys and values of a text", field="init")
        check_ids(ids, len(table), "init_ids")
        if len(ids) < length:
            raise InputError(
                f"the text has {len(ids)} tokens, the prefix {length}",
                field="init_ids",
                remedy=f"Write a longer text, or set prompt_length to {len(ids)}",
            )
        tokens = torch.tensor([ids[:length]], device=device_of(self.backbone.get_input_embeddings()))
        with torch.no_grad(), off(self.backbone):
            cache = base_of(self.backbone)(input_ids=tokens, use_cache=True).past_key_values
        return torch.stack([torch.cat([layer.keys, layer.values]).float().cpu() for layer in cache.layers])

    @torch.no_grad()
    def folded(self) -> Self:
        """The same prefix without the projection that made it, on the same backbone: plain keys and values, equal outputs."""
        settings = {"projection_dim": None, "init": "zero"}
        plain = type(self)(self.backbone, self.config.model_copy(update=settings))
        mode = self.training
        values = self.eval().prompt.key_values()
        self.train(mode)
        state = {k: v for k, v in self.trained_state().items() if k.startswith("head.")}
        plain.load_trained_state(state | {"prompt.weight": values})
        return cast(Self, plain.to(values.device).train(mode))


class Prefix(KeyValuePrompt):
    """Trained keys and values, with dropout while training.

    Args:
        shape: sizes of the tower that it enters.
        config: length, start and dropout.
        generator: of the random start.
        start: [N, 2, heads, l, d_h] start values instead of the configured ones.

    Parameters: 2 * N * l * d_kv.
    """

    def __init__(
        self, shape: Shape, config: PrefixTuningConfig, generator: torch.Generator, start: Tensor | None = None
    ) -> None:
        std = 0.0 if config.init == "zero" else config.init_std
        super().__init__(shape.layers, shape.kv_heads, shape.head_dim, config.prompt_length, std, generator)
        self.dropout = config.dropout
        if start is not None:
            self.weight = nn.Parameter(start)

    def key_values(self) -> Tensor:
        return F.dropout(self.weight, self.dropout, self.training)


class ProjectedPrefix(Prompt):
    """Keys and values that a small network makes of trained embeddings: tanh(E W_1 + b_1) W_2 + b_2.

    Args:
        shape: sizes of the tower that it enters.
        config: length, width h of the network, start and dropout.
        generator: of the random start: E is N(0, init_std^2), the layers start as torch's do, or the last one at zero.

    Parameters: l * d + (d * h + h) + 2 * N * d_kv * (h + 1).
    """

    def __init__(self, shape: Shape, config: PrefixTuningConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.length, self.dropout, self.shape = config.prompt_length, config.dropout, shape
        width = 2 * shape.layers * shape.kv_heads * shape.head_dim
        self.embedding = nn.Parameter(torch.randn(self.length, shape.dim, generator=generator) * config.init_std)
        inner = config.projection_dim or shape.dim
        self.projection = nn.Sequential(
            start_uniform(nn.Linear(shape.dim, inner), shape.dim, generator),
            nn.Tanh(),
            start_uniform(nn.Linear(inner, width), inner, generator),
        )
        if config.init == "zero":
            for parameter in self.projection[-1].parameters():
                nn.init.zeros_(parameter)

    def key_values(self) -> Tensor:
        with torch.autocast(self.embedding.device.type, enabled=False):  # prompts are float32 up to where they enter
            made = unflatten(self.projection(self.embedding), self.shape)
        return F.dropout(made, self.dropout, self.training)


def start_uniform(module: nn.Module, fan_in: int, generator: torch.Generator) -> nn.Module:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for every parameter: how torch starts a Linear (inputs) or LSTM (hidden units)."""
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5, generator=generator)
    return module


def unflatten(rows: Tensor, shape: Shape) -> Tensor:
    """Flat rows [l, N * 2 * heads * d_h] (the layout of peft) as keys and values [N, 2, heads, l, d_h]."""
    cut = rows.view(len(rows), shape.layers, 2, shape.kv_heads, shape.head_dim)
    return cut.permute(1, 2, 3, 0, 4)


def flatten(key_values: Tensor) -> Tensor:
    """Inverse of `unflatten`."""
    return key_values.permute(3, 0, 1, 2, 4).flatten(1)
