"""Prompt tuning with trie search: labels are written as text, by decoding that can write nothing else (Buchner et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pt_core.errors import InputError
from pt_core.method import Loss, Output
from pt_core.prompts import SoftPrompt
from pt_nlp.constrained import LabelTree
from pt_nlp.data import GREEDY, pad
from pt_nlp.method import written_out
from pt_nlp.methods.prompt_tuning import PromptTuning, PromptTuningConfig
from pt_nlp.models import is_causal

if TYPE_CHECKING:
    from pt_core.data import Split
    from pt_core.plan import FitConfig
    from pt_core.training import FitResult

SURE = 30.0  # logit of a label that was written, and of the others with a minus: there are no scores between


class TrieSearchConfig(PromptTuningConfig):
    """Settings of prompt tuning with trie search."""

    prompt_length: int = Field(100, ge=0, description="l; 100 in the released command line")
    init: Literal["vocabulary", "text", "labels", "random", "uniform"] = Field(
        "labels", description="start, as of prompt tuning; the label names in the released code"
    )
    lr: float | None = Field(3e-3, gt=0, description="3e-3 in the released command line")
    multilabel: Literal[True] = Field(True, description="a row is a set of labels")
    label_tokens: tuple[tuple[tuple[int, ...], ...], ...] = Field(
        (), description="token ids of each label at its places, of `pt_nlp.constrained.label_ids`; recipes fill them in"
    )
    end_id: int = Field(0, ge=0, description="of the end-of-sequence token; recipes fill it in")
    pad_id: int = Field(0, ge=0, description="of padding; recipes fill it in")


class TrieSearch(PromptTuning):
    """Prompt tuning with trie search: a prompt teaches a language model to write the labels of a text, joined by "; ".

        loss = cross-entropy of the tokens of "label; label; ...<end>", the most frequent label of the training split first

    Labels are predicted by greedy decoding that is kept to a prefix tree of their tokens: at least one, distinct, existing
    (`pt_nlp.constrained`). Input ids [b, n] and labels [b, C] of a multi-label task -> logits [b, C], which say no more than
    whether a label was written. Causal models and encoder-decoders.

    Parameters: l * d; there is no head. T5-base, l = 100: 76,800. The order of the labels, [C], is kept with the prompt.

    Fidelity: the baseline of PTEC's released code, with its length, rate and start as defaults.
    - There the start from label names is one row for each of their tokens, then the ids 1000, 1001, ...; here one for each
      label, the mean of its tokens (`label_ids`, or else as it is written alone), then sampled rows.
    - There the loss of a text is weighed by the sum of its labels' weights; here every target token counts alike.
    - There the schedule is OneCycle (30 % warm-up), which is not one of this library's: the nearest are `linear` and
      `cosine` with `warmup_steps`.
    - There the model is in training mode, which is the same on LLaMA and BLOOM: they have no dropout (`backbone_dropout`).
    - There a label is taken out of the tree when a separator follows it; the texts that can be written are the same.

    Reference: Buchner, Cao, Kalo, von Ehrenheim. Prompt Tuned Embedding Classification for Industry Sector Allocation.
    NAACL 2024, Industry Track.
    """

    name = "trie-search"
    config_class = TrieSearchConfig
    order: Tensor

    def __init__(self, backbone: nn.Module, config: TrieSearchConfig | None = None) -> None:
        super().__init__(backbone, config)
        known = self.config
        self.tree = LabelTree.from_ids(known.label_tokens, known.end_id, known.pad_id)
        self.register_buffer("order", torch.arange(len(known.label_tokens)))

    def build_prompt(self) -> SoftPrompt:
        labels, classes = len(self.config.label_tokens), self.config.num_labels
        if labels == 0 or classes not in (None, labels):
            raise InputError(
                f"the tokens of {labels} labels are known, {classes or 'all'} are needed",
                field="label_tokens",
                remedy="Pass label_ids(task, labels) of pt_nlp.constrained",
            )
        writes = is_causal(self.backbone) or self.backbone.config.is_encoder_decoder
        if not writes or self.backbone.get_output_embeddings() is None:
            raise InputError(
                f"a {type(self.backbone).__name__} writes no text",
                remedy="Use a causal-lm or seq2seq backbone, or PTEC",
            )
        return super().build_prompt()

    def start(self, config: Any, dim: int) -> Tensor:
        if config.init == "labels" and not config.label_ids:
            written = tuple(places[1][:-1] for places in config.label_tokens)  # alone, without the end
            config = config.model_copy(update={"label_ids": written})
        return super().start(config, dim)

    def build_head(self) -> None:  # type: ignore[override]
        """None: labels are written."""

    def fit(
        self,
        train: Split,
        validation: Split | None = None,
        config: FitConfig | None = None,
        output_dir: str | Path | None = None,
    ) -> FitResult:
        """Plain supervised training; first orders the labels by falling frequency in `train`, ties as they come.

        Raises:
            InputError: rows that are not sets of labels, or one that has none.
        """
        counts = torch.stack([_sets(batch).sum(0) for batch in train.batches(256)]).sum(0)
        self.order.copy_(counts.argsort(descending=True, stable=True))
        return super().fit(train, validation, config, output_dir)

    def loss(self, batch: Mapping[str, Any]) -> Loss:
        """Cross-entropy of the tokens of the labels (sum over tokens).

        Raises:
            InputError: rows that are not sets of labels, or one that has none.
        """
        sets, order = _sets(batch).bool().tolist(), self.order.tolist()  # a device is waited for here, not row by row
        targets, _ = pad([self.write(row, order) for row in sets], -100, "right")
        wanted = {**batch, "target_ids": targets.to(batch["input_ids"].device)}
        with self.active():
            return self.token_loss(written_out(wanted) if is_causal(self.backbone) else wanted)

    def loss_of(self, output: Output, batch: Mapping[str, Any]) -> None:
        """None: what was decoded says nothing of the loss."""

    def write(self, labels: Sequence[bool], order: Sequence[int]) -> list[int]:
        """Token ids of a set of labels, C flags, in an order, as the tree would have them."""
        chosen = [i for i in order if labels[i]]
        if not chosen:
            raise InputError(
                "a row has no label", field="label", remedy="Text needs something to write: add a label such as none"
            )
        places = [2 * (at > 0) + (at == len(chosen) - 1) for at in range(len(chosen))]
        return [token for i, place in zip(chosen, places, strict=True) for token in self.config.label_tokens[i][place]]

    def forward(self, batch: Mapping[str, Any]) -> Output:
        """Logits [b, C]: `SURE` where a label was written, else minus that."""
        source = 1 if self.backbone.config.is_encoder_decoder else batch["input_ids"].shape[1]
        tokens = self.generate(
            batch,
            logits_processor=self.tree.constrain(source),
            max_new_tokens=self.tree.longest,
            eos_token_id=self.tree.end,
            pad_token_id=self.tree.pad,
            **GREEDY,
        )
        logits = torch.full((len(tokens), len(self.order)), -SURE)
        for row, written in enumerate(tokens[:, source:].tolist()):
            logits[row, self.tree.read(written)] = SURE
        return Output(logits.to(tokens.device))


def _sets(batch: Mapping[str, Any]) -> Tensor:
    """Labels of a batch, [b, C] in {0, 1}."""
    labels = batch.get("labels")
    if labels is None or labels.ndim != 2:
        raise InputError("trie search writes sets of labels", field="labels", remedy="Use a multilabel task")
    return torch.as_tensor(labels)
