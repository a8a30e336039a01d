"""Prompt tuning: trained rows in front of the input embeddings (Lester et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pt_core.errors import InputError
from pt_core.prompts import SoftPrompt, tile
from pt_nlp.method import TextConfig, TextMethod
from pt_nlp.models import RELATIVE_POSITIONS, Model, device_of, embed_ids, reader_of, shape_of


class PromptTuningConfig(TextConfig):
    """Settings of prompt tuning."""

    prompt_length: int = Field(
        20, ge=0, description="l; 100 in Lester et al. 2021 (gin configurations), 20 in peft examples"
    )
    init: Literal["vocabulary", "text", "labels", "random", "uniform"] = Field(
        "vocabulary",
        description="start: sampled embedding rows, rows of a text, rows of class labels (Lester et al. 2021), "
        "N(0, 1) (peft), U",
    )
    init_text: str = Field("", description="text that `init: text` starts from; recipes turn it into `init_ids`")
    init_ids: tuple[int, ...] = Field((), description="token ids of the text that `init: text` tiles and cuts")
    label_ids: tuple[tuple[int, ...], ...] = Field(
        (), description="token ids of each class label, for `init: labels`: a row is the mean of a label's pieces"
    )
    vocabulary_top: int | None = Field(
        None, ge=1, description="sample from the first ids only; 5000 in Lester et al. 2021 (the most frequent of T5)"
    )
    uniform_scale: float = Field(0.5, gt=0, description="U(-s, s) of `init: uniform` (torch ports of Lester's start)")
    lr: float | None = Field(
        None,
        gt=0,
        description="rate of the prompt; None: 0.3 on T5, mT5 and umT5 (Lester et al. 2021, ATTEMPT's and DePT's released "
        "runs), else 5e-3: embeddings of Llama, GPT-2 and BERT are small and take 1e-3 to 1e-2 (baselines card)",
    )

    @model_validator(mode="after")
    def _used(self) -> Self:
        if self.init_text and self.init != "text":
            raise ValueError(f"init_text would not be used: init is {self.init}, not text")
        return self


class PromptTuning(TextMethod):
    """Prompt tuning: H = [P; E(x)], only P [l, d] is trained.

    Input ids [b, n] -> class logits [b, C] or token logits at the targets. The prompt takes positions 0..l-1.

    Parameters: l * d (plus the head, if one is asked for). T5-base, l = 100: 76,800.

    Fidelity: the start, length and rates are fields with their sources. Lester et al. train with Adafactor, constant
    rate 0.3 and weight decay 1e-5; here the optimiser is AdamW unless told, and the rate 0.3 on T5, mT5 and umT5 alone,
    whose embeddings are large; a run's log has it (`lr/prompt`). `optimiser: adafactor` is torch's, not theirs: it
    scales steps by the prompt's root mean square, which they switch off, and its rate is at most 1 / sqrt(step). Their
    z-loss of 1e-4 is not built. Dropout in the frozen model is off, as in their configurations unless told; ATTEMPT's
    reruns leave T5's 0.1 on (`backbone_dropout`). One set of rows is trained for encoder-decoders, on the encoder's
    input; peft creates a second set that never receives gradient. `init: labels` fills what the labels leave over with
    sampled rows, as the paper does; `init: uniform` is symmetric, where the released JAX code draws from [0, s).
    Positions of real tokens come from the attention mask; peft ignores given positions and counts padding on the left.
    The first token of a text is no target of a causal model; peft predicts it from the prompt's last row, or from
    padding.

    Reference: Lester, Al-Rfou, Constant. The Power of Scale for Parameter-Efficient Prompt Tuning. EMNLP 2021.
    """

    name = "prompt-tuning"
    config_class = PromptTuningConfig

    def build_prompt(self) -> SoftPrompt:
        dim = shape_of(self.backbone).dim
        return SoftPrompt(self.config.prompt_length, dim, init=self.start(self.config, dim))

    def learning_rates(self) -> dict[str, float]:
        lr = self.config.lr
        if lr is None:
            lr = 0.3 if self.backbone.config.model_type in RELATIVE_POSITIONS else 5e-3
        return {"prompt": lr}

    def start(self, config: Any, dim: int) -> Tensor:
        """Start values of the prompt, [l, d]."""
        tower, length = reader_of(self.backbone), config.prompt_length
        if config.init == "vocabulary":
            return sampled_rows(tower, length, self.generator, config.vocabulary_top)
        if config.init == "text":
            return rows_of_text(tower, config.init_ids, length)
        if config.init == "labels":
            labels = rows_of_labels(tower, config.label_ids)[:length]
            rest = sampled_rows(tower, length - len(labels), self.generator, config.vocabulary_top)
            return torch.cat([labels, rest])
        if config.init == "uniform":
            return (torch.rand(length, dim, generator=self.generator) * 2 - 1) * config.uniform_scale
        return torch.randn(length, dim, generator=self.generator)


def check_ids(ids: Sequence[int], vocabulary: int, field: str) -> None:
    """Refuse a text that is empty or not of this vocabulary.

    Raises:
        InputError: there are no ids, or one is outside of 0..vocabulary-1.
    """
    if not ids or max(ids) >= vocabulary or min(ids) < 0:
        raise InputError(
            f"what the prompt starts from has no ids, or ids outside of 0..{vocabulary - 1}",
            field=field,
            remedy="Pass the token ids of the backbone's own tokenizer",
        )


@torch.no_grad()
def embedded(tower: Model, ids: Sequence[int] | Tensor) -> Tensor:
    """What a tower reads for token ids, [k, d] float32: the table's rows, or their multiples (Gemma, mBART, Marian ...)."""
    device = device_of(tower.get_input_embeddings())
    return embed_ids(tower, torch.as_tensor(ids, dtype=torch.long).to(device)).float().cpu()


def vocabulary_of(tower: Model) -> int:
    """Rows of a tower's table of embeddings."""
    return len(tower.get_input_embeddings().weight)


def sampled_rows(tower: Model, length: int, generator: torch.Generator | None = None, top: int | None = None) -> Tensor:
    """`length` random tokens as they are read, [l, d]; `top` restricts to the first ids.

    No token comes twice, unless there are fewer than `length`: then each is drawn from all of them.

    Source: Lester et al. 2021, section 3.2 (the first 5000 ids are the most frequent pieces there), and released code.
    """
    vocabulary = vocabulary_of(tower)
    among = min(top or vocabulary, vocabulary)
    if length > among:
        return embedded(tower, torch.randint(among, (length,), generator=generator))
    return embedded(tower, torch.randperm(among, generator=generator)[:length])


def rows_of_text(tower: Model, ids: tuple[int, ...], length: int) -> Tensor:
    """A text as it is read, tiled and cut to `length`.

    Raises:
        InputError: there are no ids, or one is outside the vocabulary.
    """
    check_ids(ids, vocabulary_of(tower), "init_ids")
    return tile(embedded(tower, ids), length)


def rows_of_labels(tower: Model, labels: tuple[tuple[int, ...], ...]) -> Tensor:
    """One row for each label, the mean of its pieces as they are read, [C, d] (Lester et al. 2021, section 3.2).

    Raises:
        InputError: there are no labels, one has no ids, or an id is outside the vocabulary.
    """
    if not labels:
        raise InputError("there are no labels to start from", field="label_ids", remedy="Pass the ids of each label")
    for ids in labels:
        check_ids(ids, vocabulary_of(tower), "label_ids")
    return torch.stack([embedded(tower, ids).mean(0) for ids in labels])
