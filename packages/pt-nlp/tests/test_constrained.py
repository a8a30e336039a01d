"""Labels as text: what a tree of labels allows, on token sequences by hand and in `generate` of small random models."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from pt_core.errors import InputError
from pt_core.evaluation import evaluate
from pt_core.plan import FitConfig
from pt_nlp.constrained import LabelTree, constrained_labels, label_ids, labels_as_text, parse_labels, score_labels
from pt_nlp.data import TextTask
from pt_nlp.methods.prompt_tuning import PromptTuning, PromptTuningConfig

WORDS = "<pad> </s> <unk> a b c d ; film news great awful"
PAD, END, A, B, C, DD, SEP = 0, 1, 3, 4, 5, 6, 7
LABELS = ("a b", "a c", "a", "d")
TEXTS = ["film", "news great", "awful film news", "great", "d d film"]


def words() -> PreTrainedTokenizerFast:
    table = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS.split())}, unk_token="<unk>"))
    table.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=table, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def bytes_of(corpus: list[str], size: int = 330) -> PreTrainedTokenizerFast:
    """A byte-level BPE like GPT-2's; its pad token is its end token."""
    table = Tokenizer(models.BPE())
    table.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    table.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["</s>"], initial_alphabet=alphabet)
    table.train_from_iterator(corpus * 10, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=table, pad_token="</s>", eos_token="</s>")


def text_task(tokenizer, backbone: str = "causal-lm", label: str = "a b") -> TextTask:
    rows = {"train": [{"text": "film", "label": label}]}
    return TextTask.from_rows(rows, tokenizer, kind="text-to-text", backbone=backbone)


def tree_of(*labels: str) -> LabelTree:
    return LabelTree.of(text_task(words()), labels)


def llama(vocabulary: int, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "initializer_range": 0.5}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **sizes, **special)).eval()


def t5(vocabulary: int) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    special = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(vocab_size=vocabulary, **sizes, **special)).eval()


# --- the tree -------------------------------------------------------------------------------------------------------
def test_ptec_property_9_what_may_follow_by_hand():
    tree = tree_of("a b", "a c")
    assert tree.allowed([]) == [A]
    assert set(tree.allowed([A])) == {B, C}
    assert set(tree.allowed([A, B])) == {SEP, END}
    assert tree.allowed([A, B, SEP]) == [A]
    assert tree.allowed([A, B, SEP, A]) == [C]
    assert set(tree.allowed([A, B, SEP, A, C])) == {SEP, END}
    assert tree.allowed([A, B, SEP, A, C, SEP]) == [END]
    assert tree.allowed([A, B, END]) == [PAD]
    assert tree.allowed([A, B, END, PAD, PAD]) == [PAD]


def test_a_label_that_begins_another_may_end_or_go_on():
    tree = tree_of(*LABELS)
    assert set(tree.allowed([])) == {A, DD}
    assert set(tree.allowed([A])) == {B, C, SEP, END}
    assert set(tree.allowed([A, SEP, A])) == {B, C}
    assert tree.read([A, SEP, A, B, SEP, DD, END]) == [2, 0, 3]
    assert tree.read([A, SEP, A]) == [2]
    assert tree.read([A, SEP, A, END]) == [2]


def test_every_text_that_the_tree_allows_reads_as_distinct_labels():
    tree, texts, open_ = tree_of(*LABELS), [], [[]]
    while open_:
        written = open_.pop()
        assert len(written) < tree.longest
        for token in tree.allowed(written):
            (texts if token == END else open_).append([*written, token])
    read = {tuple(tree.read(text)) for text in texts}
    assert read == {p for n in range(1, 5) for p in permutations(range(4), n)}
    assert max(map(len, texts)) == tree.longest == 11


def test_tokens_from_elsewhere_are_answered_with_padding():
    assert tree_of("a b", "d").allowed([B, B]) == [PAD]
    assert tree_of("a b", "d").read([DD, SEP, B]) == [1]


def test_end_and_padding_may_be_one_token():
    labels = ["toxic speech", "toxic", "spam"]
    task = text_task(bytes_of(["toxic speech; spam; toxic"]), label=labels[0])
    tree = LabelTree.of(task, labels)
    assert tree.end == tree.pad
    written = task.encoder.target("spam; toxic")
    assert tree.allowed(written) == [tree.pad]
    assert tree.read([*written, tree.pad, tree.pad]) == [2, 1]


@pytest.mark.parametrize("backbone", ["causal-lm", "seq2seq"])
def test_training_targets_are_texts_of_the_tree(backbone):
    """Whatever a tokenizer makes of a label at the start and behind a separator, the tree follows it."""
    labels = ["hate (general)", "hate", "neutral", "attacks on a group", "attacks"]
    task = text_task(bytes_of(["hate (general); neutral; attacks on a group", "hate; attacks"]), backbone, "hate")
    tree = LabelTree.of(task, labels)
    for order in permutations(range(len(labels)), 3):
        written = task.encoder.target("; ".join(labels[i] for i in order))
        for at, token in enumerate(written):
            assert token in tree.allowed(written[:at]), (order, at)
        assert tree.read(written) == list(order)


def test_labels_have_no_space_of_their_own_where_the_tokenizer_puts_one_in_front_of_every_text():
    known = ["</s>", "<unk>", "▁", "▁a", "▁a;", "▁good", "▁good;"]
    table = Tokenizer(models.WordLevel({w: i for i, w in enumerate(known)}, unk_token="<unk>"))
    table.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    table.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=table, pad_token="</s>", eos_token="</s>", unk_token="<unk>")
    alone, several = (5, 0), (6,)
    assert label_ids(text_task(tokenizer), ["good"]) == ((several, alone, several, alone),)


def test_labels_that_cannot_be_told_apart_are_refused():
    for labels, problem in (
        (("a", "a"), "named twice"),
        (("a;b", "c"), "separator"),
        ((" a", "c"), "white space"),
        (("", "c"), "cannot be read back"),
        (("sport", "money"), "has the tokens of 'sport'"),  # both unknown to the tokenizer
    ):
        with pytest.raises(InputError, match=problem):
            tree_of(*labels)


# --- text -----------------------------------------------------------------------------------------------------------
def test_targets_are_sorted_by_falling_training_frequency():
    rows = {
        "train": [
            {"text": "x", "label": ["c"]},
            {"text": "y", "label": ["a", "c", "b"]},
            {"text": "z", "label": ["b"]},
        ],
        "test": [{"text": "w", "label": ["d", "a", "c"], "id": 7}],
    }
    made = labels_as_text(rows)
    assert [row["label"] for row in made["train"]] == ["c", "b; c; a", "b"]  # b and c twice, a once
    assert made["test"] == [{"text": "w", "label": "c; a; d", "id": 7}]
    with pytest.raises(InputError, match="row 2, field 'label': a row of train has no label"):
        labels_as_text({"train": [{"text": "x", "label": ["c"]}, {"text": "y", "label": []}]})


def test_labels_in_text_are_matched_exactly():
    labels = ("racist", "racist towards black", "neutral")
    assert parse_labels("racist towards black; neutral", labels) == ["racist towards black", "neutral"]
    assert parse_labels(" neutral ;racist; neutral; made up;", labels) == ["neutral", "racist"]
    assert parse_labels("not racist at all", labels) == []


# --- generation -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backbone", ["causal-lm", "seq2seq"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 0}])
def test_generation_writes_distinct_existing_labels(backbone, options):
    task = text_task(words(), backbone)
    model = llama(12) if backbone == "causal-lm" else t5(12)
    method = PromptTuning(model, PromptTuningConfig(prompt_length=3))
    torch.manual_seed(0)
    found = constrained_labels(method, task, TEXTS, LABELS, batch_size=3, **options)
    assert len(found) == len(TEXTS)
    for labels in found:
        assert labels
        assert set(labels) <= set(LABELS)
        assert len(set(labels)) == len(labels)
    free = [parse_labels(answer["text"], LABELS) for answer in task.predict(method, TEXTS)]
    assert free != found


def test_greedy_choice_is_the_best_allowed_token_at_every_step():
    task, model = text_task(words()), llama(12)
    method = PromptTuning(model, PromptTuningConfig(prompt_length=3)).eval()
    tree = LabelTree.of(task, LABELS)
    found = constrained_labels(method, task, TEXTS, LABELS)
    for text, labels in zip(TEXTS, found, strict=True):
        source, written = task.texts([text])[0]["source"], list[int]()
        while not written or written[-1] != END:
            with torch.no_grad(), method.active():
                scores = model(input_ids=torch.tensor([source + written])).logits[0, -1]
            written.append(max(tree.allowed(written), key=lambda token: float(scores[token])))
        assert [LABELS[i] for i in tree.read(written)] == labels


def test_rows_of_a_batch_do_not_share_what_they_have_used():
    task, method = text_task(words()), PromptTuning(llama(12, seed=3), PromptTuningConfig(prompt_length=3))
    together = constrained_labels(method, task, TEXTS, LABELS)
    assert together == [constrained_labels(method, task, [text], LABELS)[0] for text in TEXTS]


def test_prompt_tuning_with_trie_search_learns_the_labels():
    pairs = [("film", ["a b"]), ("news", ["d", "a b"]), ("great", ["a c"]), ("awful film", ["d"])]
    rows = labels_as_text({"train": [{"text": text, "label": labels} for text, labels in pairs] * 2})
    task = TextTask.from_rows(rows, words(), kind="text-to-text")
    method = PromptTuning(llama(12), PromptTuningConfig(prompt_length=5, lr=0.1))
    labels = ("a b", "a c", "d")
    validation = replace(task.train, scorer=score_labels(task, labels))
    config = FitConfig(max_steps=60, batch_size=8, evaluate_every=30, monitor="macro-f1", device="cpu", progress=False)
    free = replace(task.train, scorer=score_labels(task, labels, constrained=False))
    before = [evaluate(method, split)["macro-f1"] for split in (free, validation)]
    assert before[0] < before[1] < 0.5
    result = method.fit(task.train, validation, config)
    for metrics in (result.metrics, evaluate(method, free)):
        assert metrics["macro-f1"] == metrics["micro-f1"] == 1
    found = constrained_labels(method, task, [text for text, _ in pairs], labels)
    assert [set(x) for x in found] == [set(labels) for _, labels in pairs]
