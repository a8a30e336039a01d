"""P-tuning: prompt rows that a small network makes of trained embeddings (Liu et al. 2021)."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pt_core.prompts import Prompt
from pt_nlp.method import TextConfig, TextMethod
from pt_nlp.methods.prefix_tuning import start_uniform
from pt_nlp.methods.prompt_tuning import PromptTuning, PromptTuningConfig
from pt_nlp.models import shape_of


class PTuningConfig(TextConfig):
    """Settings of P-tuning."""

    prompt_length: int = Field(
        20, ge=1, description="l; 20 in peft examples, 9 (3 + 3 + 3) in the released LAMA templates"
    )
    encoder: Literal["mlp", "lstm"] = Field("mlp", description="peft's default; the paper's is the LSTM")
    hidden_dim: int | None = Field(
        None, ge=1, description="h; None: d for the MLP, d / 2 for each direction of the LSTM (released code)"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="between the two layers of the LSTM; 0 in peft")
    lr: float = Field(
        1e-3,
        gt=0,
        description="design choice for short runs; 1e-5 in the released LAMA scripts, for hundreds of epochs",
    )

    @model_validator(mode="after")
    def _used(self) -> Self:
        if self.dropout and self.encoder == "mlp":
            raise ValueError("dropout would not be used: it is a setting of the LSTM, encoder is mlp")
        return self


class PTuning(TextMethod):
    """P-tuning: H = [P; E(x)] with P = MLP(E_P) or P = MLP(biLSTM(E_P)); embeddings E_P [l, d] and network are trained.

    Input ids [b, n] -> class logits [b, C] or token logits at the targets. The network runs once per step, not per row.

    Parameters: l * d and, for the MLP (Linear d -> h, ReLU, Linear h -> h, ReLU, Linear h -> d),
    (d * h + h) + (h * h + h) + (h * d + d); for the LSTM (2 layers, both directions, then Linear 2h -> 2h, ReLU, Linear
    2h -> d), 2 * (4h * (d + h) + 8h) + 2 * (4h * 3h + 8h) + (4h * h + 2h) + (2h * d + d). Plus the head, if one is
    asked for.

    The network is only a way to train. `folded()` gives plain prompt tuning with the rows it makes: save or export that
    one, unless training shall go on (`trained_state` holds the network).

    Fidelity: shapes and start are peft's, which with `encoder: lstm` and h = d / 2 are those of the released code. The
    paper puts virtual tokens between the parts of a cloze template (3 + 3 + 3 around subject and mask) and can train
    the language model too; here, as in peft, all of them stand in front and the backbone is frozen. peft's number of
    encoder layers, which it ignores for the MLP, is not a setting. The released LAMA scripts train 3 + 3 + 3 tokens and
    the LSTM at 1e-5 with decay 0.98, weight decay 5e-4 and early stop 20; the defaults here are 20 tokens and the MLP,
    as in peft, at a constant 1e-3 without weight decay, for the short runs that few examples allow (our choice). The scripts
    train with the frozen model's dropout on (`backbone_dropout`); here it is off unless asked for.

    Reference: Liu, Zheng, Du, Ding, Qian, Yang, Tang. GPT Understands, Too. arXiv 2103.10385.
    """

    name = "p-tuning"
    config_class = PTuningConfig

    def build_prompt(self) -> EncodedPrompt:
        return EncodedPrompt(self.config, shape_of(self.backbone).dim, self.generator)

    @torch.no_grad()
    def folded(self) -> PromptTuning:
        """The trained rows as plain prompt tuning on the same backbone: equal outputs, no network."""
        shared = self.config.model_dump(include=set(TextConfig.model_fields))
        settings = PromptTuningConfig(
            prompt_length=self.config.prompt_length, init="random", lr=self.config.lr, **shared
        )
        plain = PromptTuning(self.backbone, settings)
        mode = self.training
        rows = self.eval().prompt.tokens()
        self.train(mode)
        state = {k: v for k, v in self.trained_state().items() if k.startswith("head.")}
        plain.load_trained_state(state | {"prompt.weight": rows})
        return cast(PromptTuning, plain.to(rows.device).train(mode))


class EncodedPrompt(Prompt):
    """Prompt rows that a network makes of trained embeddings; see `PTuning` for its layers and their count.

    Args:
        config: length, kind and width of the network.
        dim: d, width of the backbone's input embeddings.
        generator: of the random start: E_P is N(0, 1), the layers start as torch's do.
    """

    def __init__(self, config: PTuningConfig, dim: int, generator: torch.Generator) -> None:
        super().__init__()
        self.length = config.prompt_length
        self.embedding = nn.Parameter(torch.randn(self.length, dim, generator=generator))
        self.lstm: nn.LSTM | None = None
        if config.encoder == "lstm":
            h = config.hidden_dim or dim // 2
            self.lstm = nn.LSTM(dim, h, num_layers=2, dropout=config.dropout, bidirectional=True)
            start_uniform(self.lstm, h, generator)
            widths = [2 * h, 2 * h, dim]
        else:
            h = config.hidden_dim or dim
            widths = [dim, h, h, dim]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [start_uniform(nn.Linear(inputs, outputs), inputs, generator), nn.ReLU()]
        self.mlp = nn.Sequential(*layers[:-1])

    def tokens(self) -> Tensor:
        with torch.autocast(self.embedding.device.type, enabled=False):  # prompts are float32 up to where they enter
            rows = self.embedding if self.lstm is None else self.lstm(self.embedding)[0]
            made: Tensor = self.mlp(rows)
        return made
