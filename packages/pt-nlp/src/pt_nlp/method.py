"""What all text methods share: reading a class, a label word or a text out of a frozen, prompted language model.

A text method builds a prompt (`build_prompt`) and nothing else; this base class attaches it, runs the backbone and computes
logits only where something is read:

- with a head (`num_labels`): pooled features -> linear head;
- with a verbalizer (the batch has `candidates`): log-probability of every label word as a continuation;
- else: cross-entropy of the tokens in `target_ids`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, cast

import torch
from accelerate.utils import send_to_device
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pt_core.attachment import attach
from pt_core.errors import InputError
from pt_core.method import Loss, Method, MethodConfig, Output
from pt_core.plan import FitConfig, device_of
from pt_core.prompts import Prompt
from pt_nlp.carried import SOURCE, reads, source_tokens
from pt_nlp.models import Model, base_of, checkpoints_blocks, is_causal, keep_checkpointing, positions_of, width_of

LINEAR_HEADS = {"llama", "qwen2", "qwen3", "mistral", "gpt2", "gpt_neox"}  # logits = W h + b and nothing else


class TextConfig(MethodConfig):
    """Settings that every text method has."""

    num_labels: int | None = Field(
        None, ge=2, description="classes of a trained head; None reads the language model head"
    )
    multilabel: bool = Field(False, description="the head scores every class by itself (sigmoid)")
    pooling: Literal["auto", "first", "last", "mean"] = Field(
        "auto", description="token that the head reads: the last real one of causal models, the first of encoders"
    )
    head_bias: bool = True
    head_lr: float = Field(1e-3, gt=0, description="learning rate of the head (design choice)")
    backbone_dropout: bool = Field(
        False, description="dropout in the frozen backbone while training; published recipes often leave it on"
    )
    seed: int = Field(0, description="of the prompt's and head's start values")


class TextMethod(Method):
    """A frozen text backbone with a prompt, read through a head, a verbalizer or its own language model head."""

    config: Any
    backbone: Model
    prompt: Any  # a Prompt, or None
    config_class = TextConfig
    reads_head: ClassVar[bool] = False  # True: the method cannot do without a trained head

    def __init__(self, backbone: Model, config: MethodConfig | None = None) -> None:
        super().__init__(backbone, config)
        if not self.config.backbone_dropout:  # else only while it trains
            keep_checkpointing(self.backbone)
        self.generator = torch.Generator().manual_seed(self.config.seed)
        self.prompt = self.build_prompt()
        self.head: nn.Linear | None = None
        if self.config.num_labels is not None:
            self.head = self.build_head()
        self.handle = None if self.prompt is None else attach(self.backbone, self.prompt, always=False)

    # --- to implement -------------------------------------------------------------------------------------------
    def build_prompt(self) -> Prompt | None:
        """What is attached. Start values come from `self.generator`."""
        raise TypeError(f"{type(self).__name__} builds no prompt")

    def build_head(self) -> nn.Linear:
        """Linear head [d -> C], drawn as the language models draw theirs: N(0, initializer_range^2), bias 0."""
        head = nn.Linear(width_of(self.backbone), self.config.num_labels, bias=self.config.head_bias)
        std = getattr(self.backbone.config, "initializer_range", None) or 0.02
        with torch.no_grad():
            head.weight.copy_(torch.randn(head.weight.shape, generator=self.generator) * std)
            if head.bias is not None:
                head.bias.zero_()
        return head

    # --- contract -----------------------------------------------------------------------------------------------
    @property
    def model(self) -> Model:
        """The module that is run: the backbone, or what a method puts in its place (an adapted copy that shares weights)."""
        return self.backbone

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups = []
        if self.prompt is not None:
            for name, parameters in self.prompt.groups().items():
                groups.append({"name": name, "params": parameters, "lr": self.learning_rates()[name]})
        if self.head is not None:
            groups.append({"name": "head", "params": list(self.head.parameters()), "lr": self.config.head_lr})
        return groups

    def learning_rates(self) -> dict[str, float]:
        """Learning rate of each of the prompt's groups."""
        return {"prompt": self.config.lr}

    def train(self, mode: bool = True) -> TextMethod:
        super().train(mode)
        if self.config.backbone_dropout:
            for module in self.model.modules():
                module.training = mode and not isinstance(module, nn.modules.batchnorm._BatchNorm)
        keep_checkpointing(self.model, mode)  # also where it was enabled since; evaluation keeps the cache
        return self

    def forward(self, batch: Mapping[str, Any]) -> Output:
        """Class logits [b, C], and with a head pooled features [b, d]; of a text-to-text task nothing: it is read by `loss` and
        `generate`.

        Raises:
            InputError: there is neither a head, nor label words, nor a target text.
        """
        features, logits = None, None
        with self.active():
            if self.head is not None:
                features = self.features(batch)
                logits = self.head(features.to(self.head.weight.dtype))
            elif "candidates" in batch:
                logits = self.class_scores(batch)
        if logits is None and "target_ids" not in batch:
            raise InputError(
                f"{self.name} has neither a head nor label words to score",
                remedy="Set num_labels, or use a verbalizer task",
            )
        return Output(logits, features)

    def loss(self, batch: Mapping[str, Any]) -> Loss:
        """The class loss of a head or verbalizer, or the cross-entropy of target tokens (sum over tokens)."""
        by_tokens = self.head is None and "target_ids" in batch
        if by_tokens and not (self._scores_words(batch) and self._ends_at_source(batch)):
            if "candidates" in batch and is_causal(self.backbone):
                batch = written_out(batch)
            with self.active():
                return self.token_loss(batch)
        loss = self.loss_of(self(batch), batch)
        if loss is None:
            raise InputError(f"a batch for {self.name} has neither labels nor target tokens")
        return loss

    def loss_of(self, output: Output, batch: Mapping[str, Any]) -> Loss | None:
        by_tokens = self.head is None and "target_ids" in batch
        if "labels" not in batch or (by_tokens and not self._scores_words(batch)):
            return None
        logits = cast(Tensor, output.logits)
        labels = batch["labels"].to(logits.device)
        if not by_tokens:
            return self.class_loss(logits, labels)
        tokens = batch["candidate_mask"].sum(-1).to(labels)[labels]
        right = logits.float().gather(1, labels[:, None])[:, 0]
        total = (right * tokens if batch.get("length_normalised", False) else right).sum()
        return Loss(-total, int(tokens.sum()))

    def _scores_words(self, batch: Mapping[str, Any]) -> bool:
        """Whether class scores hold the log-probability of each row's target, its label word."""
        return {"candidates", "target_ids", "labels"} <= batch.keys()

    def _ends_at_source(self, batch: Mapping[str, Any]) -> bool:
        """Whether the last state of the source has all that label words are scored by."""
        one_token = "candidates" in batch and batch["candidates"].shape[1] == 1
        return one_token and is_causal(self.backbone) and self.backbone.config.model_type in LINEAR_HEADS

    def class_loss(self, logits: Tensor, labels: Tensor) -> Loss:
        """Cross-entropy (sum over rows), or for multi-label heads binary cross-entropy (sum over cells)."""
        self.check_labels(logits, labels)
        if self.config.multilabel:
            total = F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="sum")
            return Loss(total, logits.numel())
        return Loss(F.cross_entropy(logits.float(), labels, reduction="sum"), len(logits))

    def check_labels(self, logits: Tensor, labels: Tensor) -> None:
        """Refuse labels that are not [b], or with `multilabel` [b, C]: cross-entropy would take sets of labels as shares.

        Raises:
            InputError: labels of another shape.
        """
        wanted = logits.shape if self.config.multilabel else logits.shape[:1]
        if labels.shape != wanted:
            raise InputError(
                f"labels of shape {list(labels.shape)} are not those of {logits.shape[1]} classes with multilabel "
                f"{'on' if self.config.multilabel else 'off'}",
                field="multilabel",
                remedy="Switch it on for rows of several labels, off for rows of one class",
            )

    def generate(self, batch: Mapping[str, Any], **options: Any) -> Tensor:
        """Token ids that the prompted backbone generates from a batch of sources (as the backbone's own `generate`)."""
        if checkpoints_blocks(self.model):
            options["use_cache"] = False  # blocks that are checkpointed keep none
        if is_causal(self.backbone):
            batch = _left_padded(batch)
        # Without a cache every step reads source and continuation again: only the source is source.
        with self.active(), source_tokens(torch.ones_like(batch["input_ids"])):
            tokens: Tensor = self.model.generate(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **options
            )
        return tokens

    # --- reading ------------------------------------------------------------------------------------------------
    def hidden(self, batch: Mapping[str, Any], where: Tensor) -> Tensor:
        """Last hidden states [b, n, d] of the tokens in `where` ([b, n], true = read); whatever at others."""
        arguments = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        if is_causal(self.backbone):
            arguments |= {"position_ids": positions_of(batch["attention_mask"]), "use_cache": False}
        base = base_of(self.model)
        if self.backbone.config.is_encoder_decoder:
            base = self.model.get_encoder()
        source = torch.ones_like(batch["input_ids"]) if SOURCE.get() is None else SOURCE.get()
        with reads(where), source_tokens(source):
            states: Tensor = base(**arguments).last_hidden_state
        return states[:, -where.shape[1] :]  # those of prompts stay in front in encoder-decoders

    def features(self, batch: Mapping[str, Any]) -> Tensor:
        """Pooled last hidden states, [b, d]; prompt rows are never pooled."""
        mask = batch["attention_mask"]
        pooling = self.config.pooling
        if pooling == "auto":
            pooling = (
                "mean" if self.backbone.config.is_encoder_decoder else "last" if is_causal(self.backbone) else "first"
            )
        if pooling == "mean":
            states = self.hidden(batch, mask.bool())
            weights = mask.to(states.dtype)[..., None]
            return (states * weights).sum(1) / weights.sum(1).clamp(min=1)
        at = mask.argmax(1) if pooling == "first" else mask.shape[1] - 1 - mask.flip(1).argmax(1)
        where = F.one_hot(at, mask.shape[1]).bool()
        states = self.hidden(batch, where)
        return states[where.to(states.device)]

    def token_loss(self, batch: Mapping[str, Any]) -> Loss:
        """Cross-entropy of the tokens in `target_ids`; a causal model computes logits only where they are read (`_logits_at`).

        A causal model predicts a token from the one before it: the first token of a text is no target, on whichever side the
        padding is.
        """
        targets = batch["target_ids"]
        if self.backbone.config.is_encoder_decoder:
            decoder_ids = _decoder_ids(self.backbone, targets)
            logits = self.model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                decoder_input_ids=decoder_ids,
                use_cache=False,
            ).logits
            wanted = targets != -100
            picked, gold = logits[wanted], targets[wanted]
        else:
            with source_tokens(batch.get("source_mask", targets == -100)):
                wanted = (targets[:, 1:] != -100) & batch["attention_mask"][:, :-1].bool()
                gold = targets[:, 1:][wanted]
                picked = self._logits_at(batch, wanted)
        return Loss(F.cross_entropy(picked.float(), gold.to(picked.device), reduction="sum"), len(gold))

    def _logits_at(self, batch: Mapping[str, Any], wanted: Tensor) -> Tensor:
        """Next-token logits at the chosen positions ([b, n-1] mask) of a causal model, [k, V].

        With a linear head only those are computed; else, where the model can, those of the columns that any row reads.
        """
        if self.backbone.config.model_type in LINEAR_HEADS:
            where = F.pad(wanted, (0, 1))
            states = self.hidden(batch, where)
            return _to_words(self.model, states[where.to(states.device)])
        columns = wanted.any(0).nonzero()[:, 0]
        keep = {"logits_to_keep": columns} if _keeps_columns(self.model) else {}
        logits: Tensor = self.model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            position_ids=positions_of(batch["attention_mask"]),
            use_cache=False,
            **keep,
        ).logits
        if not keep:
            return logits[:, :-1][wanted.to(logits.device)]
        return logits[wanted[:, columns].to(logits.device)]

    def class_scores(self, batch: Mapping[str, Any]) -> Tensor:
        """Log-probability of every label word after every source, [b, C].

        Label words of one token each are read from the source's last hidden state through their own rows of the head: the
        scores are then logits, whose differences are those of the log-probabilities. Where the word's tokens are what
        trains, the whole head is read, and scores are log-probabilities.
        """
        words, mask = batch["candidates"], batch["candidate_mask"]
        if is_causal(self.backbone):
            batch = _left_padded(batch)
        if self.backbone.config.is_encoder_decoder:
            scores = self._seq2seq_scores(batch, words)
        elif self._ends_at_source(batch):
            last = F.one_hot(torch.tensor(batch["input_ids"].shape[1] - 1), batch["input_ids"].shape[1]).bool()
            states = self.hidden(batch, last.to(words.device).expand_as(batch["input_ids"]))[:, -1]
            if "target_ids" not in batch:
                return _to_words(self.model, states, words[:, 0])
            return _to_words(self.model, states).float().log_softmax(-1)[:, words[:, 0]]
        else:
            scores = self._causal_scores(batch, words)
        scores = scores.masked_fill(mask[None] == 0, 0.0).sum(-1)
        return scores / mask.sum(-1) if batch.get("length_normalised", False) else scores

    def _causal_scores(self, batch: Mapping[str, Any], words: Tensor) -> Tensor:
        """Log-probability of each label token, [b, C, t]: the source is read once, its cache serves every label word."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        (b, n), (c, t) = ids.shape, words.shape
        after = words[None, :, :-1].expand(b, -1, -1).reshape(b * c, t - 1)
        long_mask = torch.cat([mask.repeat_interleave(c, 0), mask.new_ones(b * c, t - 1)], dim=1)
        with source_tokens(torch.ones_like(ids)):
            if checkpoints_blocks(base_of(self.model)):  # blocks keep no cache then: every word reads its source
                whole = torch.cat([ids.repeat_interleave(c, 0), after], dim=1)
                logits = self.model(
                    input_ids=whole,
                    attention_mask=long_mask,
                    position_ids=positions_of(long_mask),
                    logits_to_keep=t,
                ).logits
                logits = logits.view(b, c, t, -1)
            else:
                first = self.model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=positions_of(mask),
                    use_cache=True,
                    logits_to_keep=1,
                )
                logits = first.logits[:, -1:, None].expand(-1, -1, c, -1).transpose(1, 2)
                if t > 1:
                    cache = first.past_key_values
                    cache.batch_repeat_interleave(c)
                    rest = self.model(
                        input_ids=after,
                        attention_mask=long_mask,
                        position_ids=positions_of(long_mask)[:, n:],
                        past_key_values=cache,
                        use_cache=True,
                    )
                    logits = torch.cat([logits, rest.logits.view(b, c, t - 1, -1)], dim=2)
        return logits.float().log_softmax(-1).gather(-1, words[None, ..., None].expand(b, -1, -1, -1))[..., 0]

    def _seq2seq_scores(self, batch: Mapping[str, Any], words: Tensor) -> Tensor:
        b, (c, t) = len(batch["input_ids"]), words.shape
        mask = batch["attention_mask"]
        memory = self.model.get_encoder()(input_ids=batch["input_ids"], attention_mask=mask)
        memory.last_hidden_state = memory.last_hidden_state.repeat_interleave(c, 0)
        targets = words[None].expand(b, -1, -1).reshape(b * c, t)
        logits = self.model(
            encoder_outputs=memory,
            attention_mask=mask.repeat_interleave(c, 0),
            decoder_input_ids=_decoder_ids(self.backbone, targets),
            use_cache=False,
        ).logits
        return logits.float().log_softmax(-1).gather(-1, targets[..., None])[..., 0].view(b, c, t)


def _decoder_ids(backbone: Model, targets: Tensor) -> Tensor:
    """What the decoder of an encoder-decoder reads to write `targets` [b, t]: these, one later."""
    if hasattr(backbone, "prepare_decoder_input_ids_from_labels"):
        prepared: Tensor = backbone.prepare_decoder_input_ids_from_labels(labels=targets)
        return prepared
    config = backbone.config  # M2M-100 and Blenderbot do it in a function of their module
    first = targets.new_full((len(targets), 1), config.decoder_start_token_id)
    return torch.cat([first, targets[:, :-1].masked_fill(targets[:, :-1] == -100, config.pad_token_id)], dim=1)


def _left_padded(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch of sources that are padded on the left, wherever they were before: text goes on from the last column."""
    mask = batch["attention_mask"]
    order = mask.argsort(dim=1, stable=True)
    moved = {"input_ids": batch["input_ids"].gather(1, order), "attention_mask": mask.gather(1, order)}
    return {**batch, **moved}


def written_out(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Sources with their right label words behind them, as a text-to-text batch of a causal model."""
    batch = _left_padded(batch)
    source, words = batch["input_ids"], batch["target_ids"]
    real = (words != -100).to(batch["attention_mask"])
    return {
        "input_ids": torch.cat([source, words.clamp(min=0)], dim=1),
        "attention_mask": torch.cat([batch["attention_mask"], real], dim=1),
        "target_ids": torch.cat([torch.full_like(source, -100), words], dim=1),
        "source_mask": torch.cat([batch["attention_mask"], torch.zeros_like(real)], dim=1),
    }


def on_run_device(method: TextMethod, config: FitConfig, batches: Iterator[Mapping[str, Any]]) -> Iterator[Any]:
    """Batches on the run's device, for what is fitted without steps; the method is placed there, in eval mode."""
    device = device_of(config)
    method.place(device).eval()
    return (send_to_device(batch, device) for batch in batches)


def _keeps_columns(model: Model) -> bool:
    """Whether a language model computes logits of chosen columns: of one that is spread they may lie on another device."""
    places = getattr(model, "hf_device_map", None) or {}
    return "logits_to_keep" in inspect.signature(model.forward).parameters and len(set(places.values())) < 2


def _to_words(backbone: Model, states: Tensor, ids: Tensor | None = None) -> Tensor:
    """Logits of hidden states through the language model head, of all words or of `ids` only."""
    head = backbone.get_output_embeddings()
    if ids is None:
        logits: Tensor = head(states)
        return logits
    if type(head) is not nn.Linear or hasattr(head, "_hf_hook"):
        whole: Tensor = head(states)  # adapted, quantised or offloaded: its weight is not all of it, or not here
        return whole[..., ids.to(whole.device)]
    bias = head.bias
    return F.linear(states, head.weight[ids.to(head.weight.device)], None if bias is None else bias[ids])
