"""SPoT: prompt tuning that starts from a prompt trained on another task, and how alike two prompts are (Vu et al. 2022)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pt_core import artifacts, frozen
from pt_core.errors import InputError
from pt_nlp.methods.prompt_tuning import PromptTuning, PromptTuningConfig

if TYPE_CHECKING:
    from pt_core.data import Split
    from pt_core.plan import FitConfig
    from pt_core.training import FitResult


class SPoTConfig(PromptTuningConfig):
    """Settings of SPoT: those of prompt tuning, whose `init` is that of a prompt without a source."""

    prompt_length: int = Field(20, ge=0, description="l, that of the source prompt; 100 in Vu et al. 2022")
    # Not saved: a prompt is opened without its source, and a folder's path is that of one machine.
    source: str | None = Field(None, exclude=True, description="folder or hub id of the source prompt")


class SPoT(PromptTuning):
    """Soft prompt transfer: prompt tuning on a target task that starts from the prompt of a source task.

        H = [P; E(x)], P starts from the P that `PromptTuning` trained on the source task

    Input ids [b, n] -> class logits [b, C] or token logits at the targets, as `PromptTuning`. Before its first step it is the
    source prompt, with that one's outputs. A saved prompt opens without its source. A head is not taken over: its classes
    are those of the source task.

        source = PromptTuning(backbone, PromptTuningConfig(prompt_length=100))       # trained on the source task, or its folder
        method = SPoT.from_source(backbone, source)

    Parameters: l * d (plus the head, if one is asked for). T5-base, l = 100: 76,800.

    Fidelity: reconstructed. Training is that of `PromptTuning`, with its rates; Vu et al. train source and target for
    2^18 steps of 32 rows at 0.3. ATTEMPT's rerun trains with T5's dropout on (`backbone_dropout`). A prompt trained on
    a mixture of tasks is a source like any other. Retrieval (a library of prompts at 10k steps, the best, an average or
    a mixture of the most similar) is not built; `similarities` is what it ranks by, without that of feed-forward
    activations. The wrong source hurts: set plain prompt tuning beside it.

    Reference: Vu, Lester, Constant, Al-Rfou, Cer. SPoT: Better Frozen Model Adaptation through Soft Prompt Transfer.
    ACL 2022.
    """

    name = "spot"
    config_class = SPoTConfig

    def __init__(self, backbone: nn.Module, config: SPoTConfig | None = None) -> None:
        super().__init__(backbone, config)
        self._begun = False  # whether the rows are those of a trained prompt
        self._source_hash: str | None = None
        if self.config.source is not None:
            self._take(rows_of_source(self.config.source, backbone))

    @classmethod
    def from_source(
        cls, backbone: nn.Module, source: str | Path | PromptTuning, config: SPoTConfig | None = None
    ) -> Self:
        """SPoT whose start is a trained source prompt.

        Args:
            backbone: that of the source prompt.
            source: prompt tuning after training, or the folder or hub id of such a prompt.
            config: default: the length of the source, else as it comes.

        Raises:
            InputError: the source is no prompt of input rows, or not one of this length and width.
        """
        rows = rows_of_source(source, backbone)
        method = cls(backbone, config if config is not None else SPoTConfig(prompt_length=len(rows)))
        method._take(rows)
        return method

    def _take(self, rows: Tensor) -> None:
        own = self.prompt.weight
        if rows.shape != own.shape:
            raise InputError(
                f"the source prompt is {list(rows.shape)}, this one {list(own.shape)}",
                field="prompt_length",
                remedy=f"Set it to {len(rows)}, on the backbone of the source prompt",
            )
        with torch.no_grad():
            own.copy_(rows)
        self._begun = True
        self._source_hash = hashlib.sha256(rows.float().cpu().contiguous().numpy().tobytes()).hexdigest()

    def run_identity(self) -> dict[str, Any]:
        """The rows of the source by their hash: a run that starts from others is another run."""
        return {} if self._source_hash is None else {"source_rows": self._source_hash}

    def load_trained_state(self, tensors: Mapping[str, Tensor]) -> None:
        super().load_trained_state(tensors)
        self._begun = True

    def fit(
        self,
        train: Split,
        validation: Split | None = None,
        config: FitConfig | None = None,
        output_dir: str | Path | None = None,
    ) -> FitResult:
        """Plain supervised training from the source prompt.

        Raises:
            InputError: there is no source prompt: this would be plain prompt tuning.
        """
        if not self._begun:
            raise InputError(
                "there is no source prompt to start from",
                field="source",
                remedy="Name the folder of a saved prompt, or build the method by SPoT.from_source",
            )
        return super().fit(train, validation, config, output_dir)


def rows_of_source(source: str | Path | PromptTuning, backbone: nn.Module) -> Tensor:
    """The trained rows of a source prompt, [l, d].

    Raises:
        InputError: it has none, or was saved on another backbone (which warns where only its weights differ).
    """
    if isinstance(source, PromptTuning):
        tensors: Mapping[str, Any] = source.trained_state()
        name, file = source.name, None
    else:
        artifact = artifacts.load_artifact(source)
        tensors, name, file = artifact.tensors, artifact.config.method, artifact.folder
        frozen.compare(artifact.config.backbone, backbone)
    rows = tensors.get("prompt.weight")
    if rows is None or rows.ndim != 2:
        raise InputError(
            f"a prompt of {name} has no rows in front of the input to start from",
            file=file,
            field="source",
            remedy="Name one of prompt-tuning or spot",
        )
    return rows.detach().clone()


def similarities(a: Tensor, b: Tensor) -> dict[str, float]:
    """How alike two prompts [l, d] are, by name; 1 is most alike but for `cosine-average` and `distance-average`.

    - `cosine-of-average`: cosine of the prompts' mean rows (Vu et al. 2022, cosine similarity of average tokens); the order
      of rows does not count;
    - `cosine-average`: mean over all l * l pairs of rows of their cosine (Vu et al. 2022, per-token average cosine
      similarity); below 1 of a prompt and itself, unless its rows all point one way;
    - `cosine-concat`: cosine of the prompts as one vector each;
    - `distance-concat`: 1 / (1 + Frobenius distance);
    - `distance-average`: 1 / (1 + mean over all pairs of rows of their distance).

    Source: Vu et al. 2022; Su et al. 2022 (On Transferability of Prompt Tuning) for the last three.

    Raises:
        InputError: prompts of different shapes.
    """
    if a.shape != b.shape or a.ndim != 2:
        raise InputError(f"prompts of shapes {list(a.shape)} and {list(b.shape)}", remedy="Compare [l, d] with [l, d]")
    a, b = a.detach().cpu().double(), b.detach().double().cpu()
    pairs = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
    found = {
        "cosine-of-average": F.cosine_similarity(a.mean(0), b.mean(0), dim=0),
        "cosine-concat": F.cosine_similarity(a.flatten(), b.flatten(), dim=0),
        "cosine-average": pairs.mean(),
        "distance-concat": 1 / (1 + (a - b).norm()),
        "distance-average": 1 / (1 + torch.cdist(a, b).mean()),
    }
    return {name: float(value) for name, value in found.items()}
