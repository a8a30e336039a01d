"""Labels as text: several labels for a text, written by a language model, and decoding that can write nothing else.

Prompt tuning with trie search, the baseline of PTEC (Buchner et al. 2024): the target is the text's labels, the most frequent
of the training split first, joined by "; ".

    rows = labels_as_text({"train": train_rows, "test": test_rows})
    task = TextTask.from_rows(rows, tokenizer, kind="text-to-text")
    method = PromptTuning(backbone, PromptTuningConfig())
    method.fit(task.train, None, FitConfig(epochs=10))
    constrained_labels(method, task, texts, labels)                    # existing, distinct labels
    [parse_labels(a["text"], labels) for a in task.predict(method, texts)]     # free decoding

The method `trie-search` is the first of the two on a multi-label task, beside PTEC: from a recipe, saved and opened.

The released code weighs each example's loss by the sum of its labels' weights; here every target token counts alike. It finds
labels in free text as substrings, so that a label within another counts as well; here text is split at the separator.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from pt_core.data import Split, encode_multilabels
from pt_core.errors import InputError
from pt_core.metrics import evaluate_logits
from pt_nlp.data import GREEDY, TextTask

SEPARATOR = "; "


def labels_as_text(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Rows whose `label` is a list of labels as rows whose `label` is text, for a text-to-text task.

    Args:
        rows: split name -> rows; labels are ordered by falling frequency in `train` (ties by name).

    Raises:
        InputError: a row has no label, or a label cannot be told from the text around it.
    """
    counts = Counter(label for row in rows["train"] for label in row["label"])
    written: dict[str, list[dict[str, Any]]] = {}
    for name, part in rows.items():
        written[name] = []
        for number, row in enumerate(part, start=1):
            if not row["label"]:
                raise InputError(
                    f"a row of {name} has no label",
                    row=number,
                    field="label",
                    remedy="Text needs something to write: add a label that says so, such as none",
                )
            _check(row["label"])
            ordered = sorted(row["label"], key=lambda label: (-counts[label], label))
            written[name].append({**row, "label": SEPARATOR.join(ordered)})
    return written


def parse_labels(text: str, labels: Sequence[str]) -> list[str]:
    """The labels that a text consists of, in its order, each once. What is not exactly a label is passed over."""
    known = set(labels)
    parts = (part.strip() for part in text.split(SEPARATOR.strip()))
    return list(dict.fromkeys(part for part in parts if part in known))


def label_ids(task: TextTask, labels: Sequence[str]) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Token ids of each label where it is written first or later, and others follow or it is the last, [C][4].

    In this order: first of several, alone, in the middle, last of several. Each ends with the separator or the
    end-of-sequence token. They are what the tokenizer makes of a label at its place: " a" and "; a", or "(a)" and "(a);",
    need not have any token in common.

    Raises:
        InputError: labels that are not distinct as text, or that hold the separator; the tokenizer ends targets otherwise.
    """
    _check(labels)
    end = task.tokenizer.eos_token_id
    if end is None:
        raise InputError("the tokenizer has no end-of-sequence token", remedy="Set its eos_token")
    if task.encoder.target_tail not in ([], [end]):  # mBART's, by their language
        raise InputError(
            "targets of this tokenizer do not end with end-of-sequence", remedy="Decode freely: parse_labels"
        )
    sign = SEPARATOR.strip()

    start = tuple(task.encoder.target_head)  # of an encoder-decoder

    def ids(text: str) -> tuple[int, ...]:
        return tuple(task.encoder.target_ids(text))

    ahead = ids(f"a{sign}")  # stands for the labels before

    def follow(text: str) -> tuple[int, ...]:
        tokens = ids(f"a{SEPARATOR}{text}")
        if tokens[: len(ahead)] != ahead:
            raise InputError(
                f"this tokenizer merges {SEPARATOR!r} with the label {text!r} behind it",
                field="labels",
                remedy="Rename the label, or decode freely and use parse_labels",
            )
        return tokens[len(ahead) :]

    return tuple(
        ((*start, *ids(f"{label}{sign}")), (*start, *ids(label), end), follow(f"{label}{sign}"), (*follow(label), end))
        for label in labels
    )


@dataclass
class _Node:
    """A place in a prefix tree: what may follow, the labels below (this one included), and the label that ends here."""

    children: dict[int, _Node] = field(default_factory=dict)
    below: set[int] = field(default_factory=set)
    label: int | None = None


@dataclass
class LabelTree:
    """What may be written next: labels, each once, with separators between them and the end-of-sequence token behind.

    Two prefix trees of tokens, one for the first label and one for those that follow; in both, each label ends with the
    separator or the end-of-sequence token (`label_ids`). A label that was written is no longer open. The tree keeps no
    state: everything is read again from the tokens, so any batch, beam or thread can use it.

    Args:
        first, later: the trees.
        end, pad: token ids.
        longest: tokens that a text has at most, `end` included.
    """

    first: _Node
    later: _Node
    end: int
    pad: int
    longest: int

    @classmethod
    def of(cls, task: TextTask, labels: Sequence[str]) -> Self:
        """The tree of a task's labels, in the words of its tokenizer.

        Raises:
            InputError: labels that are not distinct, as text or as tokens, or that hold the separator.
        """
        return cls.from_ids(label_ids(task, labels), task.tokenizer.eos_token_id, task.encoder.pad, labels)

    @classmethod
    def from_ids(
        cls, ids: Sequence[Sequence[Sequence[int]]], end: int, pad: int, labels: Sequence[str] | None = None
    ) -> Self:
        """The tree of labels in tokens.

        Args:
            ids: see `label_ids`.
            end, pad: token ids.
            labels: names, for messages; default: numbers.
        """
        names = labels if labels is not None else [str(i) for i in range(len(ids))]
        longest = sum(max(map(len, places)) for places in ids) + 1
        first, later = ([places[at : at + 2] for places in ids] for at in (0, 2))
        return cls(_tree(first, names), _tree(later, names), end, pad, longest)

    def allowed(self, written: Sequence[int]) -> list[int]:
        """Tokens that may follow `written` (which has no source in it): never none."""
        node, used = self._walk(written)
        if node is None:
            return [self.pad]
        still = [token for token, child in node.children.items() if child.below.difference(used)]
        return still or [self.end]  # all labels are written

    def read(self, written: Sequence[int]) -> list[int]:
        """Indices of the labels in `written`, in order; one that is not closed does not count."""
        return self._walk(written)[1]

    def constrain(self, source: int) -> LogitsProcessorList:
        """`logits_processor` for `generate`, where the first `source` tokens of every row are not written ones."""

        def keep(tokens: Tensor, scores: Tensor) -> Tensor:
            shut = torch.full(scores.shape, -math.inf)  # made here and moved once, not row by row on the device
            for row, written in enumerate(tokens[:, source:].tolist()):
                shut[row, self.allowed(written)] = 0.0
            return scores + shut.to(scores)

        return LogitsProcessorList([keep])

    def _walk(self, written: Sequence[int]) -> tuple[_Node | None, list[int]]:
        """Where `written` leads (None: it is closed, or not of this tree), and the labels that are closed in it."""
        node, used = self.first, list[int]()
        for token in written:
            after = node.children.get(token)
            if after is None or after.label in used:
                return None, used
            node = after
            if node.label is not None:
                used.append(node.label)
                if token == self.end:
                    return None, used
                node = self.later
        return node, used


def _tree(endings: Sequence[Sequence[Sequence[int]]], labels: Sequence[str]) -> _Node:
    """Prefix tree of token sequences; each label has one for each of its endings."""
    root = _Node()
    for label, sequences in enumerate(endings):
        for tokens in sequences:
            node = root
            node.below.add(label)
            for token in tokens:
                node = node.children.setdefault(token, _Node())
                node.below.add(label)
            if node.label is not None:
                raise InputError(
                    f"label {labels[label]!r} has the tokens of {labels[node.label]!r}",
                    field="labels",
                    remedy="Rename one of them",
                )
            node.label = label
    return root


def _check(labels: Sequence[str]) -> None:
    for label in labels:
        if SEPARATOR.strip() in label or label != label.strip() or not label:
            raise InputError(
                f"label {label!r} cannot be read back from text joined by {SEPARATOR!r}",
                field="label",
                remedy="Rename it: no separator in it, no white space around it, and not empty",
            )
    if len(set(labels)) < len(labels):
        raise InputError("a label is named twice", field="label", remedy="Name each label once")


def constrained_labels(
    method: Any,
    task: TextTask,
    texts: Sequence[str],
    labels: Sequence[str],
    batch_size: int = 32,
    **options: Any,
) -> list[list[str]]:
    """Labels that a text-to-text method writes for each text, by decoding that is kept to the labels.

    Args:
        method: a text method with a language model head.
        task: its text-to-text task.
        texts: inputs.
        labels: all there are.
        options: of the backbone's `generate`, such as `num_beams`; greedy by default.

    Returns:
        At least one label for each text, distinct, in the order in which they were written.
    """
    tree = LabelTree.of(task, labels)
    return _written(method, task, task.texts(texts), labels, tree, batch_size, options)


def score_labels(
    task: TextTask, labels: Sequence[str], constrained: bool = True
) -> Callable[[Any, Split, int], dict[str, float]]:
    """Scorer of a text-to-text split (`Split.scorer`): macro-F1 and micro-F1 of the written labels.

    Args:
        task: the task of the split, made of `labels_as_text`.
        labels: all there are.
        constrained: keep decoding to the labels; else the greedy text is parsed.
    """
    tree = LabelTree.of(task, labels) if constrained else None

    def score(method: Any, split: Split, batch_size: int) -> dict[str, float]:
        rows = [split.rows[i] for i in range(len(split))]
        written = encode_multilabels(_written(method, task, rows, labels, tree, batch_size), labels)
        wanted = encode_multilabels([parse_labels(row["reference"], labels) for row in rows], labels)
        return evaluate_logits(("macro-f1", "micro-f1"), "multilabel", 2 * written - 1, wanted)

    return score


@torch.no_grad()
def _written(
    method: Any,
    task: TextTask,
    rows: Sequence[Mapping[str, Any]],
    labels: Sequence[str],
    tree: LabelTree | None,
    batch_size: int,
    options: Mapping[str, Any] | None = None,
) -> list[list[str]]:
    """Labels written for encoded rows: kept to a tree, or parsed from free text."""
    found: list[list[str]] = []
    for batch in task.batches(method, rows, batch_size):
        if tree is None:
            found += [parse_labels(text, labels) for text in task.generate(method, batch)]
            continue
        source = batch["input_ids"].shape[1] if task.spec.backbone == "causal-lm" else 1  # the decoder's start token
        settings = GREEDY | {"max_new_tokens": tree.longest, "eos_token_id": tree.end, "pad_token_id": tree.pad}
        tokens = method.generate(batch, logits_processor=tree.constrain(source), **settings | dict(options or {}))
        found += [[labels[i] for i in tree.read(row)] for row in tokens[:, source:].tolist()]
    return found
