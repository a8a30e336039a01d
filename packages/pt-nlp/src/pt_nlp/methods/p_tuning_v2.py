"""P-tuning v2: prefix tuning for understanding tasks, with a trained head (Liu et al. 2022)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pt_core.errors import InputError
from pt_core.prompts import Prompt
from pt_nlp.methods.prefix_tuning import PrefixTuning, PrefixTuningConfig


class PTuningV2Config(PrefixTuningConfig):
    """Settings of P-tuning v2."""

    prompt_length: int = Field(20, ge=1, description="l; 8 to 128 by task in the released scripts")
    init: Literal["random", "zero", "text"] = Field("random", description="N(0, init_std^2), as released")
    init_std: float = Field(
        0.02,
        gt=0,
        description="in effect: the released code declares N(0, 1), its loader draws again by the model's rule",
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="on the prefix while training; released scripts")
    lr: float = Field(5e-3, gt=0, description="5e-3 to 1e-2 in the released scripts")
    head_lr: float = Field(5e-3, gt=0, description="as `lr`: the released scripts have one rate")


class PTuningV2(PrefixTuning):
    """P-tuning v2: a prefix in every layer, as in `PrefixTuning`, and a linear head instead of label words.

    Input ids [b, n] -> class logits [b, C]. Real tokens take the positions from l on. Encoders and causal models.

    Parameters: 2 * N * l * d_kv, and d * C + C for the head, which papers usually leave out. BERT-large, l = 20:
    983,040 without the head.

    Fidelity: start, dropout and rates follow the released code, which trains with batch 16 to 32, 60 to 120 epochs, at
    most 128 tokens and seed 11. Dropout draws one mask for a batch, the released code one for each row. The head reads
    the last hidden state of the first token; the released code reads it through the checkpoint's frozen pooler. The
    released code trains with the frozen model's dropout on (`backbone_dropout`), hidden states with the scripts' rate,
    and drops the head's input at the same rate; here the model's is off unless asked for, and the head has none. A
    projection starts as in prefix tuning.

    Reference: Liu, Ji, Fu, Tam, Du, Yang, Tang. P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally
    Across Scales and Tasks. ACL 2022.
    """

    name = "p-tuning-v2"
    config_class = PTuningV2Config
    reads_head = True

    def build_prompt(self) -> Prompt:
        if self.config.num_labels is None:
            raise InputError(
                f"{self.name} reads a trained head",
                field="num_labels",
                remedy="Give the number of classes, or use prefix tuning to read label words",
            )
        return super().build_prompt()
