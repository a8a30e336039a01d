"""In-context learning: demonstrations in front of every input, nothing trained (Brown et al. 2020)."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from pt_core.data import few_shot
from pt_core.errors import InputError
from pt_core.method import Output
from pt_core.prompts import Prompt
from pt_nlp.methods.prompt_tuning import check_ids
from pt_nlp.methods.zero_shot import ZeroShot, ZeroShotConfig
from pt_nlp.models import Model, device_of, embed_ids, is_causal, reader_of

if TYPE_CHECKING:
    from pt_core.data import Split
    from pt_core.plan import FitConfig
    from pt_core.training import FitResult


class InContextConfig(ZeroShotConfig):
    """Settings of in-context learning."""

    demonstrations: int = Field(
        1, ge=0, description="k for each class (of a text-to-text task: k in all); 0 is zero-shot. Design choice"
    )
    separator_text: str = Field(
        "\n\n",
        description="text behind each demonstration; an empty line as in the released code of Zhao et al. 2021; recipes turn "
        "it into `separator_ids`",
    )
    separator_ids: tuple[int, ...] = Field(
        (), description="token ids behind each demonstration: those of `separator_text` between texts"
    )


class InContext(ZeroShot):
    """In-context learning: [x_1 y_1 s x_2 y_2 s ... x], read by the frozen model; demonstrations x_i y_i come from `fit`.

    k training rows of each class, nested in k for one seed (the draw of few-shot splits), in an order shuffled by the
    seed. Each is its input as the task encodes it, its label word (or target text), and the separator s. They are fixed
    token ids in front of the input, so where the backbone allows it their keys and values are computed once and serve
    every input and label word, with the numbers of writing them in front of each.

    Input ids [b, n] -> class logits [b, C], or generated text. `calibrate` is that of zero-shot scoring.

    Parameters: none are trained; the ids of the demonstrations are saved.

    Fidelity: an empty line stands behind each demonstration, as in Zhao et al.'s released code; Brown et al. separate by
    one or two line breaks. A tokenizer that drops line breaks has nothing to separate by: name another `separator_text`
    there. Brown et al. draw other demonstrations for every test input; here all inputs share one draw, as in Zhao et al.'s
    code, which draws among all rows and not k of each class. A begin-of-sequence token that the tokenizer adds to every
    input stands in front of each demonstration too, and in text-to-text tasks an end-of-sequence token behind its target.

    Reference: Brown et al. Language Models are Few-Shot Learners. NeurIPS 2020.
    """

    name = "in-context"
    config_class = InContextConfig
    prompt: Demonstrations

    def build_prompt(self) -> Demonstrations:
        super().build_prompt()
        if not is_causal(self.backbone):
            raise InputError(
                "in-context learning needs a causal language model, which reads demonstrations as text that goes on",
                remedy="Use a causal-lm backbone",
            )
        embeddings = self.backbone.get_input_embeddings()
        if self.config.separator_ids:
            check_ids(self.config.separator_ids, embeddings.num_embeddings, "separator_ids")
        return Demonstrations(reader_of(self.backbone))

    def fit(
        self,
        train: Split,
        validation: Split | None = None,
        config: FitConfig | None = None,
        output_dir: str | Path | None = None,
    ) -> FitResult:
        """Draw the demonstrations from `train`, fit the calibration if there is one, and evaluate. Makes no steps.

        Raises:
            InputError: rows without targets, too few of a class, a separator without token ids, or the demonstrations and
                the longest input are more than the backbone has positions for.
        """
        ids = self.draw(train)
        lengths = [n for split in (train, validation) if split is not None for n in split.lengths or ()]
        self._check_room(len(ids) + max(lengths, default=0))
        self.prompt.set(ids)
        return super().fit(train, validation, config, output_dir)

    def draw(self, train: Split) -> list[int]:
        """Token ids of the demonstrations."""
        k, seed = self.config.demonstrations, self.config.seed
        if k == 0:
            return []
        if self.config.separator_text and "separator_ids" not in self.config.model_fields_set:
            raise InputError(
                f"demonstrations are separated by {self.config.separator_text!r}, whose token ids are not given",
                field="separator_ids",
                remedy="Pass those of the backbone's tokenizer, such as TextTask.encoder.between('\\n\\n'); () for none",
            )
        rows = [train.rows[i] for i in range(len(train))]
        if "target" not in rows[0]:
            raise InputError("the rows have no target to show", remedy="Use a verbalizer or text-to-text task")
        labels = ["rows" if row["label"] is None else row["label"] for row in rows]
        chosen = few_shot(labels, k, seed)
        random.Random(seed).shuffle(chosen)
        shown = [[*rows[i]["source"], *rows[i]["target"], *self.config.separator_ids] for i in chosen]
        return [token for ids in shown for token in ids]

    def forward(self, batch: Mapping[str, Any]) -> Output:
        self._check_batch(batch)
        return super().forward(batch)

    def generate(self, batch: Mapping[str, Any], **options: Any) -> Tensor:
        self._check_batch(batch)
        return super().generate(batch, **options)

    def load_trained_state(self, tensors: Mapping[str, Tensor]) -> None:
        if "prompt.ids" in tensors:
            self.prompt.set([0] * len(tensors["prompt.ids"]))
        super().load_trained_state(tensors)

    def _check_batch(self, batch: Mapping[str, Any]) -> None:
        words = batch["candidates"].shape[1] - 1 if "candidates" in batch else 0
        self._check_room(self.prompt.length + batch["input_ids"].shape[1] + words)

    def _check_room(self, positions: int) -> None:
        limit = getattr(self.backbone.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and positions > limit:
            raise InputError(
                f"demonstrations and input take {positions} positions, {type(self.backbone).__name__} has {limit}",
                field="demonstrations",
                remedy="Show fewer demonstrations, or lower max_source_length",
            )


class Demonstrations(Prompt):
    """Fixed tokens in front of the input, as rows of the backbone's embeddings; the ids are the only state, [m] long."""

    ids: Tensor
    tower: Model

    def __init__(self, tower: Model) -> None:
        super().__init__()
        object.__setattr__(self, "tower", tower)  # the backbone's own, not part of the state
        self.register_buffer("ids", torch.zeros(0, dtype=torch.long))

    def set(self, ids: Sequence[int]) -> None:
        """Show these tokens from now on."""
        self.ids = torch.tensor(ids, dtype=torch.long, device=self.ids.device)
        self.length = len(ids)

    def tokens(self) -> Tensor:
        return embed_ids(self.tower, self.ids.to(device_of(self.tower.get_input_embeddings())))

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return {}
