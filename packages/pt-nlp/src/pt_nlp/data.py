"""Text data: files and templates to batches.

A `TextTask` holds what a prompt needs besides its tensors to be used (`TaskSpec`: template, labels, verbalizer, lengths;
it is saved with the prompt) and the splits. Four kinds:

    verbalizer       one of several label words, scored as token sequences by the language model
    classification   one class, through a trained head
    multilabel       any set of classes, through a trained head
    text-to-text     text is generated; the reference is text

Batches are dicts. All have `input_ids`, `attention_mask` (long, [b, n]) and `sample_ids`; sources of causal models are
padded on the left, others on the right. By kind: `labels` [b] (class) or [b, C] (0/1 float); `candidates` and
`candidate_mask` [C, t] (label words); `target_ids` (token ids to be predicted, -100 elsewhere), aligned with `input_ids`
[b, n] for text-to-text on a causal model, else [b, t] beside it; `source_mask` [b, n], 1 on what is read, not written.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from accelerate.utils import send_to_device
from pydantic import Field, ValidationError, field_validator, model_validator
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pt_core.data import (
    Split,
    class_names,
    encode_labels,
    encode_multilabels,
    few_shot_split,
    read_table,
    stratified,
)
from pt_core.errors import InputError
from pt_core.metrics import check_names, evaluate_text
from pt_core.recipe import explain
from pt_core.settings import Settings

Kind = Literal["verbalizer", "classification", "multilabel", "text-to-text"]
Backbone = Literal["causal-lm", "encoder", "seq2seq"]
METRICS = {
    "verbalizer": ("accuracy", "macro-f1"),
    "classification": ("accuracy", "macro-f1"),
    "multilabel": ("macro-f1", "micro-f1"),
    "text-to-text": ("exact-match", "token-f1"),
}
SCORED_AS = {
    "verbalizer": "multiclass",
    "classification": "multiclass",
    "multilabel": "multilabel",
    "text-to-text": "text",
}  # kind of task in `pt_core.metrics`


class TaskSpec(Settings):
    """What turns text into a batch and a prediction into an answer. Saved with every prompt."""

    kind: Kind
    backbone: Backbone = "causal-lm"
    template: str = Field(
        "{text}", description="text of the input; names of fields in braces; `{text}` is cut if too long"
    )
    labels: tuple[str, ...] = Field((), description="class names, in the order of the logits")
    verbalizer: dict[str, str] = Field({}, description="label word of a class, where it is not the class name")
    target_prefix: str | None = Field(
        None, description="in front of label words and targets; default: a space for causal models, nothing else"
    )
    objective: Literal["tokens", "classes"] = Field(
        "tokens",
        description="what a verbalizer trains: the tokens of the right label word, over the vocabulary (Lester et al. 2021, "
        "DePT), or the class scores (cross-entropy)",
    )
    length_normalised: bool = Field(
        False, description="score label words by the mean, not the sum, of token log-probability"
    )
    max_source_length: int = Field(256, ge=1, description="tokens of an input, special tokens included")
    max_target_length: int = Field(64, ge=1, description="tokens of a target, and of what is generated")
    metrics: tuple[str, ...] = Field((), description="names of `pt_core.metrics`; default: those of the kind of task")
    tokenizer_hash: str = Field("", description="of the vocabulary; another tokenizer is refused")

    @field_validator("objective", mode="before")
    @classmethod
    def _given(cls, value: Any) -> Any:
        return "tokens" if value is None else value  # prompts that were saved before it had a default

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_template(self.template)
        if self.kind != "text-to-text" and len(self.labels) < 2:
            raise ValueError("a classification task needs at least two labels")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels must be distinct")
        if unknown := set(self.verbalizer) - set(self.labels):
            raise ValueError(f"the verbalizer names unknown labels: {sorted(unknown)}")
        check_names(self.metrics, SCORED_AS[self.kind])
        if self.kind == "verbalizer" and self.backbone == "encoder":
            raise ValueError("a verbalizer needs a language model; use a head (classification) on an encoder")
        return self

    @property
    def words(self) -> list[str]:
        """Label words in the order of the classes."""
        return [self.verbalizer.get(label, label) for label in self.labels]


GREEDY = {
    **{"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "min_new_tokens": 0, "no_repeat_ngram_size": 0},
    **{"encoder_no_repeat_ngram_size": 0, "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0},
}
"""Options of `generate` that leave nothing of a checkpoint's own: the likeliest token at every step."""


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of a tokenizer's vocabulary and special tokens."""
    content = [sorted(tokenizer.get_vocab().items()), sorted(map(str, tokenizer.all_special_ids))]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


class Encoder:
    """Tokenises sources and targets by a `TaskSpec` and pads them into batches."""

    def __init__(self, spec: TaskSpec, tokenizer: Any) -> None:
        if spec.tokenizer_hash and spec.tokenizer_hash != tokenizer_hash(tokenizer):
            raise InputError(
                "the prompt was trained with another tokenizer", remedy="Use the tokenizer of its backbone"
            )
        self.spec, self.tokenizer = spec, tokenizer
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        plain = tokenizer("a", add_special_tokens=False)["input_ids"]
        full = tokenizer("a")["input_ids"]
        at = next((i for i in range(len(full)) if plain and full[i : i + len(plain)] == plain), None)
        if at is None:
            raise InputError(
                f"special tokens of a {type(tokenizer).__name__} are found around the text 'a', which it cannot write",
                remedy="Use a tokenizer of text",
            )
        self.head, self.tail = full[:at], full[at + len(plain) :]
        self.target_head, self.target_tail = list[int](), list[int]()
        if spec.backbone == "causal-lm":
            self.tail = []  # the model writes on from here
        if spec.backbone == "seq2seq":  # BART's decoder begins with <s>, mBART's targets end with their language
            plain = self.ids("a", target=True)
            try:
                full = tokenizer(text_target="a")["input_ids"]
            except KeyError as error:  # M2M-100
                raise InputError("the tokenizer has no target language", remedy="Set its tgt_lang") from error
            at = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), None)
            if at is not None:
                self.target_head, self.target_tail = full[:at], full[at + len(plain) :]
        closed = spec.kind == "text-to-text" or spec.backbone == "seq2seq"
        if closed and tokenizer.eos_token_id not in self.target_tail:
            self.target_tail = [*self.target_tail, tokenizer.eos_token_id]
        self.target_prefix = spec.target_prefix
        if self.target_prefix is None:
            self.target_prefix = " " if spec.backbone == "causal-lm" else ""

    def source(self, row: Mapping[str, Any], file: str | Path | None = None, number: int | None = None) -> list[int]:
        """Token ids of an input. If it is too long, the field `text` is cut, never the rest of the template.

        Args:
            row: `text` and the template's other fields.
            file, number: where the row comes from, for messages.
        """
        before, _, after = self.spec.template.partition("{text}")
        fields = {k: v for k, v in row.items() if k != "text"}
        parts = [_fill(before, fields), str(row["text"]), _fill(after, fields)]
        whole, room = "".join(parts), self.spec.max_source_length - len(self.head) - len(self.tail)
        try:
            whole.encode()
        except UnicodeEncodeError as error:
            problem = f"holds {whole[error.start]!r}, which is half of a character"
            raise InputError(problem, file=file, row=number, field="text", remedy="Give text in UTF-8") from error
        ids = self.ids(whole)
        if len(ids) > room:
            first, last = self._around(whole, ids, parts)
            if first + len(last) >= room:
                raise InputError(
                    f"the template alone takes {first + len(last)} of {room} tokens",
                    file=file,
                    row=number,
                    field="max_source_length",
                    remedy="Raise max_source_length or shorten the template",
                )
            ids = ids[: room - len(last)] + last
        if not ids:
            raise InputError("the text has no tokens", file=file, row=number, field="text")
        return self.head + ids + self.tail

    def _around(self, whole: str, ids: list[int], parts: Sequence[str]) -> tuple[int, list[int]]:
        """How many tokens stand before the text in `whole`, and the tokens behind it, as they are where nothing is cut."""
        before, text, after = parts
        if not getattr(self.tokenizer, "is_fast", False):  # it does not tell where tokens stand
            return len(self.ids(before)), self.ids(after)
        spans = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        end = len(before) + len(text)
        behind = next((i for i, (start, stop) in enumerate(spans) if stop > end), len(ids))
        merged = behind < len(ids) and spans[behind][0] < end  # the last of the text and what follows are one token
        return sum(start < len(before) for start, _ in spans), self.ids(after) if merged else ids[behind:]

    def target(self, text: str) -> list[int]:
        """Token ids of a target, with the end-of-sequence token where the model shall stop there, and what else the tokenizer
        of an encoder-decoder puts around targets."""
        if None in self.target_tail:
            raise InputError("the tokenizer has no end-of-sequence token", remedy="Set its eos_token")
        limit = self.spec.max_target_length - len(self.target_head) - len(self.target_tail)
        return self.target_head + self.target_ids(text)[: max(limit, 0)] + self.target_tail

    def target_ids(self, text: str) -> list[int]:
        """Token ids of a target or label word where it stands, with nothing around it: causal models write it behind the
        source, encoder-decoders first."""
        written = f"{self.target_prefix}{text}"
        return self.behind(written) if self.spec.backbone == "causal-lm" else self.ids(written, target=True)

    def behind(self, text: str) -> list[int]:
        """Token ids of a text as it stands behind another: Llama 2 and Mistral put a space in front of every text they are
        given, which makes a token of its own where a space is there already.

        What would merge with the text ahead is encoded by itself.
        """
        ahead = "a" if text[:1].isspace() else "\n"
        before, whole = self.ids(ahead), self.ids(f"{ahead}{text}")
        if len(whole) <= len(before) or whole[: len(before)] != before:
            return self.ids(text)
        return whole[len(before) :]

    def ids(self, text: str, target: bool = False) -> list[int]:
        """Token ids of a text; some encoder-decoders (Marian) have others for targets."""
        given = {"text_target" if target and self.spec.backbone == "seq2seq" else "text": text}
        return list(self.tokenizer(**given, add_special_tokens=False)["input_ids"]) if text else []

    def between(self, text: str) -> list[int]:
        """Token ids of a text as it stands between others: GPT-2 and SmolLM2 write an empty line there as two line breaks,
        at the end of a text as one token."""
        whole, last = self.behind(f"{text}a"), self.behind("a")
        if len(whole) <= len(last) or whole[-len(last) :] != last:
            return self.behind(text)
        return whole[: -len(last)]

    def candidates(self) -> list[list[int]]:
        """Token ids of every label word.

        Raises:
            InputError: two label words have the same tokens, or one has none; or one begins with another, and could then
                never have a higher score (unless scores are length-normalised).
        """
        words = self.spec.words
        found = [self.target(word) for word in words]
        for i, ids in enumerate(found):
            same = [words[j] for j in range(i) if found[j] == ids]
            parts = [
                words[j] for j, other in enumerate(found) if 0 < len(other) < len(ids) and ids[: len(other)] == other
            ]
            why, remedy = "", "Choose another word"
            if not ids:
                why = "has no tokens"
            elif same:
                why = f"has the tokens of {same[0]!r}"
            elif parts and not self.spec.length_normalised:
                why = f"begins with {parts[0]!r}, which would always be the likelier one"
                remedy += ", or set length_normalised"
            if why:
                raise InputError(f"label word {words[i]!r} {why}", field="verbalizer", remedy=remedy)
        return found

    def batch(self, rows: Sequence[Mapping[str, Any]], with_targets: bool = True) -> dict[str, Any]:
        """Pad encoded rows (`source` ids and, by kind, `label` or `target` ids) into a batch."""
        spec = self.spec
        causal = spec.backbone == "causal-lm"
        side: Literal["left", "right"] = "left" if causal else "right"
        batch: dict[str, Any] = {}
        if rows and "id" in rows[0]:
            batch["sample_ids"] = [row["id"] for row in rows]
        sources = [row["source"] for row in rows]
        labelled = with_targets and rows[0].get("label") is not None
        if labelled:
            batch["labels"] = torch.stack([torch.as_tensor(row["label"]) for row in rows])
        if spec.kind == "verbalizer":
            batch["candidates"], batch["candidate_mask"] = self.candidates_padded
            batch["length_normalised"] = spec.length_normalised
        batch["input_ids"], batch["attention_mask"] = pad(sources, self.pad, side)
        wanted = spec.kind == "text-to-text" or (spec.kind == "verbalizer" and spec.objective == "tokens")
        if not (with_targets and wanted and rows[0].get("target") is not None):
            return batch
        targets = [row["target"] for row in rows]
        if causal and spec.kind == "text-to-text":
            both = list(zip(sources, targets, strict=True))
            batch["input_ids"], batch["attention_mask"] = pad([s + t for s, t in both], self.pad, side)
            batch["target_ids"], _ = pad([[-100] * len(s) + t for s, t in both], -100, side)
            batch["source_mask"], _ = pad([[1] * len(s) + [0] * len(t) for s, t in both], 0, side)
        else:
            batch["target_ids"], _ = pad(targets, -100, "right")
        return batch

    @property
    def candidates_padded(self) -> tuple[Tensor, Tensor]:
        """Label words as [C, t] ids (padded on the right) and their mask."""
        if not hasattr(self, "_candidates"):
            self._candidates = pad(self.candidates(), self.pad, "right")
        return self._candidates


def template_fields(template: str) -> dict[str, str]:
    """Fields that a template names, as `read_rows` takes them: each is the column of its name."""
    return {name: name for name in re.findall(r"\{(\w+)\}", template)}


def check_columns(text: str, label: str | None) -> None:
    """Raise ValueError where the input and the answer are one column."""
    if text == label:
        raise ValueError(f"the answer would be the input: both are the column {text!r}")


def check_template(template: str, label: str = "label") -> None:
    """Raise ValueError unless a template has the text in it and not the answer (`label`: its column)."""
    if template.count("{text}") != 1:
        raise ValueError("the template must contain {text}, once")
    if told := {"label", label} & set(template_fields(template)):
        raise ValueError(f"the template must not contain {{{min(told)}}}: the answer would stand in the input")


def _fill(part: str, fields: Mapping[str, Any]) -> str:
    def value(match: re.Match[str]) -> str:
        if match[1] not in fields:
            raise InputError(f"the template names {match[1]!r}, which no row has", field="template")
        return str(fields[match[1]])

    return re.sub(r"\{(\w+)\}", value, part)


def pad(rows: Sequence[Sequence[int]], value: int, side: Literal["left", "right"]) -> tuple[Tensor, Tensor]:
    """Rows of unequal length as [b, n] long and their mask (1 = real)."""
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    padded = pad_sequence(ids, True, value, side)
    return padded, pad_sequence([torch.ones_like(row) for row in ids], True, 0, side)


@dataclass
class TextTask:
    """A task on text: its specification, tokenizer and splits.

    Args:
        spec, tokenizer: how text becomes batches.
        train, validation, test: splits; each may be absent (a task that is only used for prediction has none).
    """

    spec: TaskSpec
    tokenizer: Any
    train: Split | None = None
    validation: Split | None = None
    test: Split | None = None

    def __post_init__(self) -> None:
        self.encoder = Encoder(self.spec, self.tokenizer)

    @classmethod
    def from_rows(
        cls,
        rows: Mapping[str, Sequence[Mapping[str, Any]]],
        tokenizer: Any,
        *,
        files: Mapping[str, str | Path] | None = None,
        **options: Any,
    ) -> TextTask:
        """Build a task from rows in memory. All rows are checked, those that no split draws too.

        Args:
            rows: split name (`train`, `validation`, `test`) -> rows with `text`, `label` (a class, a list of classes, or the
                reference text) and the template's other fields.
            tokenizer: of the backbone.
            files: where the rows of each split come from, for messages.
            options: those of `plan`: kind (see the module's first lines); labels, class names in the order of the logits (by
                default those of the training rows, sorted); shots, validation_shots, max_test_rows, seed, as in `from_files`;
                test_on_rest (where there are shots and no test rows, the training rows that no split has drawn are the
                test); and further fields of `TaskSpec`.

        Raises:
            InputError: a text or label is missing, a label is unknown, a class has no or too few rows, or the
                specification is inconsistent.
        """
        files = files or {}
        made, drawn = plan(rows, files=files, tokenizer_hash=tokenizer_hash(tokenizer), **options)
        task = cls(made, tokenizer)
        for name, positions in drawn.items():
            source = name if name in rows else "train"
            chosen = [rows[source][i] for i in positions]
            setattr(task, name, task.split(chosen, files.get(source), [i + 1 for i in positions]))
        return task

    @classmethod
    def from_files(
        cls,
        train: str | Path,
        tokenizer: Any,
        *,
        kind: Kind,
        text: str = "text",
        label: str = "label",
        validation: str | Path | None = None,
        test: str | Path | None = None,
        shots: int | None = None,
        validation_shots: int = 0,
        max_test_rows: int | None = None,
        seed: int = 0,
        **spec: Any,
    ) -> TextTask:
        """Read a task from JSONL, CSV, TSV, Parquet files or folders saved by `datasets`.

        Args:
            train, validation, test: files or folders; validation rows can instead be drawn from `train`.
            text, label: columns.
            shots, validation_shots: rows per class drawn from `train` (nested for one seed); None keeps all.
            max_test_rows: cap on test rows, drawn in class proportion.
            spec: further fields of `TaskSpec` (template, verbalizer, lengths ...).
        """
        files = {k: v for k, v in {"train": train, "validation": validation, "test": test}.items() if v is not None}
        template = str(spec.get("template", "{text}"))
        for field, check, given in (("label", check_columns, text), ("template", check_template, template)):
            try:
                check(given, label)
            except ValueError as error:
                raise InputError(str(error), field=field) from error
        fields = template_fields(template) | {"text": text, "label": label}
        rows = {name: read_rows(path, fields) for name, path in files.items()}
        return cls.from_rows(
            rows,
            tokenizer,
            kind=kind,
            files=files,
            shots=shots,
            validation_shots=validation_shots,
            max_test_rows=max_test_rows,
            seed=seed,
            **spec,
        )

    def split(
        self,
        rows: Sequence[Mapping[str, Any]],
        file: str | Path | None = None,
        numbers: Sequence[int] | None = None,
    ) -> Split:
        """Rows with `text` and `label` as a split of this task, tokenised once.

        Args:
            rows: checked by `check_rows`, if they are only some of a file's.
            file: where they come from, for messages.
            numbers: of the rows in their file; default: 1, 2, ...
        """
        spec, encode = self.spec, self.encoder
        labels: Sequence[Any] = [None] * len(rows)
        if spec.kind == "multilabel":
            labels = list(encode_multilabels([row["label"] for row in rows], spec.labels, file))
        elif spec.kind != "text-to-text":
            labels = encode_labels([row["label"] for row in rows], spec.labels, file)
        words = encode.candidates() if spec.kind == "verbalizer" else []
        encoded = []
        for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
            source = encode.source(row, file, i + 1 if numbers is None else numbers[i])
            item = {"id": row.get("id", i), "source": source, "label": label}
            if spec.kind == "verbalizer":
                item["target"] = words[label]
            if spec.kind == "text-to-text":
                item["target"], item["reference"] = encode.target(row["label"]), row["label"]
            encoded.append(item)
        return Split(
            rows=encoded,
            collate=encode.batch,
            metrics=spec.metrics or METRICS[spec.kind],
            task=SCORED_AS[spec.kind],
            num_classes=len(spec.labels) or None,
            lengths=[len(item["source"]) + len(item.get("target", ())) for item in encoded],
            scorer=self.score_text if spec.kind == "text-to-text" else None,
        )

    def texts(self, texts: Sequence[str], **fields: Sequence[str]) -> list[dict[str, Any]]:
        """Encoded rows for prediction, without labels.

        Raises:
            InputError: a text is missing or no text; a field is none of the template's, or has not one value for each text.
        """
        needed = template_fields(self.spec.template)
        for name, values in {"text": texts, **fields}.items():
            if name not in needed:
                raise InputError("the template does not name it", field=name, remedy="Leave it out")
            if isinstance(values, str) or len(values) != len(texts):
                given = "one text is" if isinstance(values, str) else f"{len(values)} values for {len(texts)} texts are"
                raise InputError(f"{given} given", field=name, remedy="Give a list with one value for each text")
        rows = [{"text": t} | {k: v[i] for k, v in fields.items()} for i, t in enumerate(texts)]
        for number, row in enumerate(rows, start=1):
            for name in needed:
                if name in row and (row[name] is None or (name == "text" and not isinstance(row[name], str))):
                    raise InputError(f"the {name} is missing or not text", row=number, field=name)
        return [{"id": i, "source": self.encoder.source(row, number=i + 1)} for i, row in enumerate(rows)]

    @torch.no_grad()
    def predict(
        self, method: Any, texts: Sequence[str], batch_size: int = 32, **fields: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Answers of a trained method: `label` and `scores`, `labels` and `scores`, or generated `text`.

        Args:
            method: with its prompt on the backbone.
            texts: what stands for `{text}` in the template.
            batch_size: texts of a forward pass.
            fields: the template's other fields, one value for each text.

        Raises:
            InputError: as `texts` does; a text is empty, or the batch size is below 1.
        """
        if batch_size < 1:
            raise InputError(f"the batch size is {batch_size}", remedy="Use 1 or more", field="batch_size")
        texts = texts if isinstance(texts, str) else list(texts)
        if blank := [i for i, text in enumerate(texts, start=1) if isinstance(text, str) and not text.strip()]:
            raise InputError("the text is empty", row=blank[0])
        rows, answers = self.texts(texts, **fields), list[dict[str, Any]]()
        for batch in self.batches(method, rows, batch_size):
            if self.spec.kind == "text-to-text":
                answers += [{"text": text} for text in self.generate(method, batch)]
                continue
            logits = method(batch).logits.float().cpu()
            if self.spec.kind == "multilabel":
                for scores in logits.sigmoid():
                    named = dict(zip(self.spec.labels, scores.tolist(), strict=True))
                    answers.append({"labels": [n for n, s in named.items() if s > 0.5], "scores": named})
            else:
                for scores in logits.softmax(-1):
                    named = dict(zip(self.spec.labels, scores.tolist(), strict=True))
                    answers.append({"label": max(named, key=named.__getitem__), "scores": named})
        return answers

    def batches(self, method: Any, rows: Sequence[Mapping[str, Any]], batch_size: int) -> Iterator[dict[str, Any]]:
        """Encoded rows without their targets, in batches, where the method's backbone is; the method is in eval mode."""
        device = next(method.backbone.parameters()).device
        method.eval()
        for start in range(0, len(rows), batch_size):
            yield send_to_device(self.encoder.batch(rows[start : start + batch_size], with_targets=False), device)

    def generate(self, method: Any, batch: Mapping[str, Any], **options: Any) -> list[str]:
        """Greedy continuations of a batch of sources, as text, stripped.

        Args:
            options: of the backbone's `generate`; they stand above `GREEDY`.
        """
        options = GREEDY | {"max_new_tokens": self.spec.max_target_length} | options
        tokens = method.generate(batch, pad_token_id=self.encoder.pad, **options)
        if self.spec.backbone == "causal-lm":
            tokens = tokens[:, batch["input_ids"].shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    def score_text(self, method: Any, split: Split, batch_size: int = 32) -> dict[str, float]:
        """Metrics of greedy continuations against the references."""
        rows = [split.rows[i] for i in range(len(split))]
        written = [text for batch in self.batches(method, rows, batch_size) for text in self.generate(method, batch)]
        return evaluate_text(split.metrics, written, [row["reference"].strip() for row in rows])


def read_rows(path: str | Path, fields: Mapping[str, str]) -> list[dict[str, Any]]:
    """Rows of a table (JSONL, JSON, CSV, TSV, Parquet) or of a folder saved by `datasets.Dataset.save_to_disk`."""
    path = Path(path)
    try:
        check_columns(fields["text"], fields.get("label"))
    except ValueError as error:
        raise InputError(str(error), file=path, field="label") from error
    if not path.is_dir():
        table = read_table(path, fields, text=("text",))
        for number, row in enumerate(table, start=1):
            _check_fields(row, fields, path, number)
        return table
    from datasets import Dataset, load_from_disk

    try:
        data = load_from_disk(str(path))
    except (FileNotFoundError, ValueError) as error:
        raise InputError(
            "this folder holds no data set", file=path, remedy="Save it by datasets' save_to_disk, or name a file"
        ) from error
    if not isinstance(data, Dataset):
        raise InputError(
            f"this folder holds several splits ({', '.join(data)})",
            file=path,
            remedy=f"Name one: {path}/{next(iter(data))}",
        )
    for role, column in fields.items():
        if column not in data.column_names:
            raise InputError(
                f"there is no column {column!r}",
                file=path,
                field=role,
                remedy=f"Columns: {', '.join(data.column_names)}",
            )
    feature = data.features[fields["label"]] if "label" in fields else None
    names = getattr(getattr(feature, "feature", feature), "names", None)  # of a class label, or of a list of them
    rows = []
    for number, row in enumerate(data, start=1):
        made = {role: row[column] for role, column in fields.items()}
        if names is not None:
            made["label"] = _named(made["label"], names, path, number, fields["label"])
        if not isinstance(made["text"], str) or not made["text"].strip():
            raise InputError("the text is empty or not text", file=path, row=number, field=fields["text"])
        _check_fields(made, fields, path, number)
        rows.append(made)
    return rows


def _check_fields(row: Mapping[str, Any], fields: Mapping[str, str], path: Path, number: int) -> None:
    """A template's other fields have a value that can be written: text, or a number."""
    for role in fields.keys() - {"text", "label"}:
        value = row[role]
        if value is None or isinstance(value, list | dict) or not str(value).strip():
            kind = type(value).__name__
            raise InputError(
                "the value is missing or empty" if kind in ("NoneType", "str") else f"the value is {kind}, not text",
                file=path,
                row=number,
                field=fields[role],
                remedy="Mend or drop the row",
            )


def _named(label: Any, names: Sequence[str], path: Path, row: int, field: str) -> Any:
    """Names of class labels, which `datasets` stores as numbers; rows without a label have -1 there."""
    if isinstance(label, list):
        return [_named(one, names, path, row, field) for one in label]
    if label is None or not 0 <= label < len(names):
        raise InputError(
            f"label {label} is none of 0 to {len(names) - 1}",
            file=path,
            row=row,
            field=field,
            remedy="Drop rows without a label",
        )
    return names[label]


def check_rows(
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    kind: Kind,
    template: str,
    labels: Sequence[str] | None = None,
    files: Mapping[str, str | Path] | None = None,
) -> list[str]:
    """Check every row of every split before any is drawn, so that messages name rows by their number in the file.

    Args:
        rows, labels, files: see `TextTask.from_rows`.
        template: whose fields the rows must have.

    Returns:
        The class names: `labels`, or those of the training rows; none where text is generated.

    Raises:
        InputError: a text, label or field of the template is missing or of the wrong kind, a label is unknown, or a
            class has no training rows.
    """
    files = files or {}
    for name, part in rows.items():
        texts = ("text", "label") if kind == "text-to-text" else ("text",)
        _check_texts(part, ("text", "label", *template_fields(template)), texts, files.get(name))
    if kind == "text-to-text":
        return list(labels or ())
    given = {name: [row["label"] for row in part] for name, part in rows.items()}
    if labels is None:
        first = "train" if given.get("train") else next(iter(given))
        labels = class_names(given[first], files.get(first), multilabel=kind == "multilabel")
    for name, part in given.items():
        if kind == "multilabel":
            used = set(encode_multilabels(part, labels, files.get(name)).any(0).nonzero().flatten().tolist())
        else:
            used = set(encode_labels(part, labels, files.get(name)))
        if name == "train" and (unused := [label for i, label in enumerate(labels) if i not in used]):
            raise InputError(
                f"class {unused[0]!r} has no rows",
                file=files.get(name),
                field="label",
                remedy="Add rows, or leave the class out of the labels",
            )
    return list(labels)


def _check_texts(
    rows: Sequence[Mapping[str, Any]], fields: Iterable[str], texts: Sequence[str], file: str | Path | None
) -> None:
    """Every row has these fields, and text in those that are texts."""
    for number, row in enumerate(rows, start=1):
        for field in fields:
            if row.get(field) is None:
                raise InputError(f"the row has no {field}", file=file, row=number, field=field)
        for field in texts:
            if not isinstance(row[field], str) or not row[field].strip():
                raise InputError(f"the {field} is empty or not text", file=file, row=number, field=field)


def plan(
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    kind: Kind,
    labels: Sequence[str] | None = None,
    files: Mapping[str, str | Path] | None = None,
    shots: int | None = None,
    validation_shots: int = 0,
    max_test_rows: int | None = None,
    test_on_rest: bool = False,
    seed: int = 0,
    **spec: Any,
) -> tuple[TaskSpec, dict[str, list[int]]]:
    """What of a task needs no tokenizer: its specification, and which rows each split draws; see `TextTask.from_rows`."""
    files = files or {}
    labels = check_rows(rows, kind, str(spec.get("template", "")), labels, files)
    try:
        made = TaskSpec(kind=kind, labels=tuple(labels), **spec)
    except ValidationError as error:
        raise explain(error, TaskSpec, "task") from error
    return made, draw(rows, kind, labels, shots, validation_shots, max_test_rows, test_on_rest, seed, files)


def draw(
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    kind: Kind,
    labels: Sequence[str],
    shots: int | None,
    validation_shots: int,
    max_test_rows: int | None,
    test_on_rest: bool,
    seed: int,
    files: Mapping[str, str | Path],
) -> dict[str, list[int]]:
    """Few-shot training and validation rows and a capped test set; texts and sets of labels are drawn as one class.

    Returns:
        Split -> positions of its rows; in `rows["train"]` where the split has no rows of its own.
    """
    single = kind in ("verbalizer", "classification")

    def classes(name: str) -> list[str]:
        part = rows[name]
        return (
            [labels[i] for i in encode_labels([row["label"] for row in part], labels)]
            if single
            else ["rows"] * len(part)
        )

    made = {name: list(range(len(part))) for name, part in rows.items()}
    train = files.get("train")
    if "train" in rows and (shots is not None or validation_shots):
        if validation_shots and "validation" in rows:
            raise InputError("give validation rows or validation_shots, not both", field="validation_shots")
        k, has = 1 if shots is None else shots, len(rows["train"])
        if not single and has < k + validation_shots:
            raise InputError(
                f"{has} rows there are, {k + validation_shots} wanted", file=train, remedy="Ask for fewer, or add rows"
            )
        names = labels if single else None
        chosen, held = few_shot_split(classes("train"), k, validation_shots, seed, names, train)
        if shots is None:
            chosen = sorted(set(made["train"]) - set(held))
        made["train"] = chosen
        if validation_shots:
            made["validation"] = held
        if test_on_rest and shots is not None and "test" not in rows:
            made["test"] = sorted(set(range(has)) - {*chosen, *held})
            if not made["test"]:
                raise InputError(
                    "no rows are left to test on", file=train, remedy="Draw fewer shots, or name a test file"
                )
    if "test" in made and max_test_rows is not None and len(made["test"]) > max_test_rows:
        source = "test" if "test" in rows else "train"
        of_row = classes(source)
        among = [of_row[i] for i in made["test"]]
        made["test"] = [made["test"][i] for i in stratified(among, max_test_rows, seed, file=files.get(source))]
    return made
