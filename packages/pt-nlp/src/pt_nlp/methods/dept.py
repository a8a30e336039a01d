"""DePT: a short soft prompt, and a low-rank offset on the embeddings of the source (Shi and Lipani 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from pt_core.errors import InputError
from pt_core.prompts import LowRankOffset, Prompt, SoftPrompt
from pt_nlp.methods.prompt_tuning import PromptTuning, PromptTuningConfig
from pt_nlp.models import base_of, shape_of

if TYPE_CHECKING:
    from pt_core.data import Split
    from pt_core.plan import FitConfig
    from pt_core.training import FitResult

RELEASED_INIT_TEXT = (
    "Classify this text is postive or not:"  # sic; the released code starts every task's prompt from it
)


class DePTConfig(PromptTuningConfig):
    """Settings of DePT."""

    init_text_ended: ClassVar[bool] = True  # in recipes on encoder-decoders: `init_text` with its end-of-sequence token

    prompt_length: int = Field(
        60, ge=0, description="m; 60 in most released checkpoints, 40 in the README and for BoolQ, 80 for CoLA"
    )
    rank: int = Field(
        30,
        ge=0,
        description="r; 30 in most released checkpoints (45 with m = 40, 15 with m = 80, 24 for MRQA with s = 512); 0 is "
        "prompt tuning",
    )
    max_source_length: int = Field(
        256, ge=1, description="s, rows of A; 256 in the released checkpoints, 348 for MultiRC, 512 for MRQA"
    )
    alpha: float = Field(8.0, gt=0, description="Delta is scaled by alpha / sqrt(r) (released code; not in the paper)")
    low_rank_lr: float = Field(
        5e-4,
        gt=0,
        description="rate of A and B: 1e-4 (MNLI, RTE, STS-B, CB, WSC, MRQA), 5e-4 (CoLA, SST-2), 1e-3 (WiC) or 5e-3 "
        "(MRPC, QNLI, QQP, BoolQ, MultiRC) in the released logs",
    )


class DecomposedPrompt(Prompt):
    """Rows in front of the input, and an offset on what follows: H = [P; E(x) + Delta], Delta = alpha / sqrt(r) * A B.

    Args:
        start: [m, d] start values of P.
        positions: s, source positions that have a row of Delta.
        rank: r; 0 leaves the offset out.
        alpha: numerator of the scale.
    """

    def __init__(
        self,
        start: Tensor,
        positions: int,
        rank: int,
        alpha: float = 8.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.length, dim = start.shape
        self.soft = SoftPrompt(self.length, dim, init=start)
        self.low_rank = LowRankOffset(positions, rank, dim, alpha, generator) if rank else None
        self._kept: tuple[Tensor, Tensor, Tensor] | None = None  # A, B and their Delta, for calls without gradient

    def tokens(self) -> Tensor:
        return self.soft.weight

    def delta(self) -> Tensor | None:
        """Delta, [s, d] float32: once for a batch, and at inference once for all as long as A and B stay the same."""
        if self.low_rank is None:
            return None
        a, b = self.low_rank.A, self.low_rank.B
        kept = None if torch.is_grad_enabled() else self._kept
        if kept is not None and kept[0].device == a.device and torch.equal(kept[0], a) and torch.equal(kept[1], b):
            return kept[2]
        with torch.autocast(a.device.type, enabled=False):
            delta: Tensor = self.low_rank()
        if not torch.is_grad_enabled():
            self._kept = (a.detach().clone(), b.detach().clone(), delta)
        return delta

    def offset(self, position: Tensor) -> Tensor | None:
        """Rows of Delta.

        Raises:
            InputError: a source is longer than s.
        """
        delta = self.delta()
        if delta is None:
            return None
        if position.shape[-1] > len(delta) and int(position.max()) >= len(delta):
            raise _too_long(int(position.max()) + 1, len(delta))
        return F.embedding(position.to(delta.device), delta)

    def groups(self) -> dict[str, list[torch.nn.Parameter]]:
        low_rank = {} if self.low_rank is None else {"low-rank": [self.low_rank.A, self.low_rank.B]}
        return {"prompt": [self.soft.weight], **low_rank}


class DePT(PromptTuning):
    """Decomposed prompt tuning: a prompt of m rows instead of l, and a low-rank offset for what the other l - m would cost.

        H = [P; E(x) + Delta],  Delta = alpha / sqrt(r) * A B

    Input ids [b, n] with n <= s -> embeddings [b, m + n, d] -> class logits [b, C] or token logits at the targets. Row i of
    Delta belongs to position i of the source, whatever token stands there; it is the same for every example. It adds no
    length: the backbone reads m + n positions, where a prompt of the same cost makes it read l + n.

    Parameters: m * d + (s + d) * r (plus the head, if one is asked for). P [m, d]; A [s, r], uniform in +-1/sqrt(r); B
    [r, d], zero, so that training starts as prompt tuning with m rows. T5-base with (m, r) = (60, 30) and s = 256: 76,800,
    as many as 100 rows. P and (A, B) are two groups with rates that differ by orders of magnitude.

    Training in the paper: AdamW, linear schedule after 500 steps of warm-up, 10k to 300k steps of 32 rows, gradients cut
    to norm 1, no weight decay, the best of evaluations every 1000 steps.

    Fidelity: code-checked. `max_source_length` of the task must not exceed s; a longer source is refused.
    - Released code pads every source to s. Here batches are padded to their longest source and use Delta[:n]: the same
      numbers, since what stands behind is masked. Padding on the left changes nothing: rows count real tokens.
    - Its decoder-only path left-pads source and label together in training and the source alone in evaluation, so that
      tokens meet other rows of A, and target tokens get an offset in training only. Here, on causal models, rows of A count
      positions within the source, and tokens that are written (targets, label words, continuations) never get an offset.
      Calling the backbone's own `generate` with `use_cache=False` hides what is source: use `DePT.generate` for that.
    - Its weight-decay flag (1e-5) never reaches the optimiser: 0 is the faithful value.
    - Its rate of the prompt (0.3 or 0.4 in the README) is one for the large embeddings of T5; the default is that of
      `PromptTuning`, which is lower on other backbones. What a run takes is in its log (`lr/prompt`).
    - The released start is `init="text"` with the ids of `RELEASED_INIT_TEXT`, end-of-sequence token included (recipes
      add it to `init_text` on encoder-decoders); the default here is sampled embedding rows. The paper draws A from a
      Gaussian; the code's uniform start is used.
    - It trains with T5's dropout of 0.1 on; here the frozen model's is off unless asked for (`backbone_dropout`).
    - Two of its scores are none of a text task here: Pearson's correlation of the numbers that STS-B's answers are, and the
      F1 of class 1 of MultiRC (`macro-f1` is the mean over both classes).
    - Its splits are not made here; give them as files. Of small tasks without a public test set, a permutation seeded 42
      cuts the validation set in half, to validate and to test; of large ones, 1,000 training rows validate and the
      validation set is the test.
    - Its start from the DePT of a source task (PETL transfer) is `load_trained_state` here; there is no recipe for it.

    Reference: Shi, Lipani. DePT: Decomposed Prompt Tuning for Parameter-Efficient Fine-tuning. ICLR 2024.
    """

    name = "dept"
    config_class = DePTConfig
    prompt: DecomposedPrompt

    def build_prompt(self) -> DecomposedPrompt:  # type: ignore[override]
        config = self.config
        start = self.start(config, shape_of(self.backbone).dim)
        return DecomposedPrompt(start, config.max_source_length, config.rank, config.alpha, self.generator)

    def learning_rates(self) -> dict[str, float]:
        return {**super().learning_rates(), "low-rank": self.config.low_rank_lr}

    def fit(
        self,
        train: Split,
        validation: Split | None = None,
        config: FitConfig | None = None,
        output_dir: str | Path | None = None,
    ) -> FitResult:
        """Plain supervised training, after a check that Delta has a row for every source token.

        Raises:
            InputError: a source is longer than s.
        """
        if self.prompt.low_rank is not None:
            for split in (train, validation):
                _check_sources(split, self.config.max_source_length)
        return super().fit(train, validation, config, output_dir)

    def fold_into_positions(self) -> Tensor:
        """The position table of a BERT or RoBERTa with Delta added where the source stands, [positions, d].

        A backbone with this table that carries the m prompt rows alone gives the same outputs for right-padded input.
        Causal models have no such table: tokens that are written stand at the same positions and must not get Delta.

        Raises:
            InputError: the backbone has no table of learned absolute positions, or is causal.
        """
        if self.backbone.config.model_type not in {"bert", "roberta"}:
            raise InputError(
                f"the offset cannot be folded into the positions of a {type(self.backbone).__name__}",
                remedy="Keep A and B; folding is exact for BERT and RoBERTa",
            )
        positions = base_of(self.backbone).embeddings.position_embeddings
        first = 0 if positions.padding_idx is None else positions.padding_idx + 1
        table = positions.weight.detach().clone()
        delta = self.prompt.delta()
        if delta is not None:
            rows = table[first + self.prompt.length :][: len(delta)]  # a view
            rows += delta.detach()[: len(rows)].to(rows)
        return table


def _check_sources(split: Split | None, limit: int) -> None:
    if split is None:
        return
    for i in range(len(split)):
        row: Any = split.rows[i]
        if isinstance(row, Mapping) and len(row.get("source", ())) > limit:
            raise _too_long(len(row["source"]), limit, row=i + 1)


def _too_long(length: int, limit: int, row: int | None = None) -> InputError:
    return InputError(
        f"a source of {length} tokens, but the offset has rows for {limit}",
        row=row,
        field="max_source_length",
        remedy="Cut sources (max_source_length of the task), or raise DePT's max_source_length",
    )
