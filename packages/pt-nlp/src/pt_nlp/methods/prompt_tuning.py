"""Prompt tuning: trained rows in front of the input embeddings (Lester et al. 2021)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pt_core.errors import InputError
from pt_core.prompts import SoftPrompt, sample_rows
from pt_nlp.backbones import shape_of
from pt_nlp.method import TextConfig, TextMethod
from pydantic import Field
from torch import Tensor


class PromptTuningConfig(TextConfig):
    """Settings of prompt tuning."""

    prompt_length: int = Field(
        20, ge=0, description="l; 100 in Lester et al. 2021 (gin configurations), 20 in peft examples"
    )
    init: Literal["vocabulary", "text", "random", "uniform"] = Field(
        "vocabulary",
        description="start: sampled embedding rows (Lester et al. 2021), rows of a text, N(0, 1) (peft), U",
    )
    init_ids: tuple[int, ...] = Field((), description="token ids of the text that `init: text` tiles and cuts")
    uniform_scale: float = Field(0.5, gt=0, description="U(-s, s) of `init: uniform` (torch ports of Lester's start)")
    lr: float = Field(
        5e-3,
        gt=0,
        description="1e-3 to 1e-2 for Llama, GPT-2 and BERT embeddings; 0.3 for the original T5's (baselines card)",
    )


class PromptTuning(TextMethod):
    """Prompt tuning: H = [P; E(x)], only P [l, d] is trained.

    Input ids [b, n] -> class logits [b, C] or token logits at the targets. The prompt takes positions 0..l-1.

    Parameters: l * d (plus the head, if one is asked for). T5-base, l = 100: 76,800.

    Fidelity: the start, length and rates are fields with their sources. Lester et al. train with Adafactor and constant
    rate 0.3; AdamW is this library's default because small-norm embeddings need 1e-3 to 1e-2 (baselines card). One set
    of rows is trained for encoder-decoders, on the encoder's input; peft creates a second set that never receives gradient.
    Lester's class-label start is `init: text` with the label words.

    Reference: Lester, Al-Rfou, Constant. The Power of Scale for Parameter-Efficient Prompt Tuning. EMNLP 2021.
    """

    name = "prompt-tuning"
    config_class = PromptTuningConfig

    def build_prompt(self) -> SoftPrompt:
        dim = shape_of(self.backbone).dim
        return SoftPrompt(self.config.prompt_length, dim, init=self.start(self.config, dim))

    def start(self, config: Any, dim: int) -> Tensor:
        """Start values of the prompt, [l, d]."""
        table = self.backbone.get_input_embeddings().weight
        if config.init == "vocabulary":
            return sample_rows(table, config.prompt_length, self.generator)
        if config.init == "text":
            return rows_of_text(table, config.init_ids, config.prompt_length)
        values = torch.randn(config.prompt_length, dim, generator=self.generator)
        if config.init == "uniform":
            values = torch.rand(config.prompt_length, dim, generator=self.generator) * 2 - 1
            values = values * config.uniform_scale
        return values


def rows_of_text(table: Tensor, ids: tuple[int, ...], length: int) -> Tensor:
    """Embedding rows of a text, tiled and cut to `length`.

    Raises:
        InputError: there are no ids, or one is outside the table.
    """
    from pt_core.prompts import tile

    if not ids or max(ids) >= len(table) or min(ids) < 0:
        raise InputError("the text that the prompt starts from has no ids of this vocabulary", field="init_ids")
    return tile(table[torch.tensor(ids, device=table.device)], length).cpu()
