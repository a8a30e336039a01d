"""Every text method under the core's contract suite, on the three kinds of backbones."""

from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from pt_core.registry import find_method, methods
from pt_core.testing import Case, contract_checks
from pt_nlp.data import TextTask

WORDS = ["good", "bad", "film", "news", "sport", "the", "a", "was", "is", "great", "awful", "red", "blue", "green"]
WORDS += ["Topic", ":", "positive", "negative"]
ROWS = [
    {"text": "the film was good great", "label": "positive"},
    {"text": "the film was bad", "label": "negative"},
    {"text": "a awful film", "label": "negative"},
    {"text": "great", "label": "positive"},
    {"text": "the news is a great good film", "label": "positive"},
    {"text": "blue is bad", "label": "negative"},
]


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, pad_token_id=0, eos_token_id=1, bos_token_id=None)).eval()


def bert() -> BertModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    return BertModel(BertConfig(**sizes, num_attention_heads=4)).eval()


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"vocab_size": 24, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()


BACKBONES = {"causal-lm": llama, "encoder": bert, "seq2seq": t5}
SETTINGS = {
    "prompt-tuning": {"prompt_length": 3, "lr": 0.05},
    "spot": {"prompt_length": 3, "lr": 0.05},
    "prefix-tuning": {"prompt_length": 3, "lr": 0.05, "init": "random"},
    "p-tuning": {"prompt_length": 3, "lr": 0.01},
    "p-tuning-v2": {"prompt_length": 3, "lr": 0.05},
    "dept": {"prompt_length": 3, "rank": 2, "max_source_length": 12, "lr": 0.05, "low_rank_lr": 0.05},
    "ptec": {"prompt_length": 3, "lr": 0.05, "init": "vocabulary"},
    "trie-search": {"prompt_length": 3, "lr": 0.05, "end_id": 1},
    "lora": {"r": 2, "lr": 0.01},
    "ia3": {"lr": 0.01},
    "linear-probe": {},
    "zero-shot": {"calibrate": "train-mean"},
    "in-context": {"demonstrations": 1, "separator_ids": (7,)},
}
# What a method needs: "verbalizer" reads label words, trained on their tokens or as "classes"; "head" trains one, "labels"
# one for rows of several labels; "text" is trained on target tokens.
CELLS = [
    *[
        (name, "causal-lm", "verbalizer")
        for name in ("prompt-tuning", "spot", "prefix-tuning", "p-tuning", "dept", "lora", "ia3")
    ],
    *[(name, "causal-lm", "head") for name in ("p-tuning-v2", "ptec", "linear-probe")],
    *[(name, "causal-lm", "verbalizer") for name in ("zero-shot", "in-context")],
    *[(name, "causal-lm", reading) for name in ("prompt-tuning", "dept") for reading in ("classes", "text")],
    *[(name, "encoder", "head") for name in ("prompt-tuning", "p-tuning-v2", "dept", "ptec", "lora", "linear-probe")],
    *[(name, "causal-lm", "labels") for name in ("ptec", "trie-search")],
    ("trie-search", "seq2seq", "labels"),
    *[(name, "seq2seq", "verbalizer") for name in ("prompt-tuning", "prefix-tuning", "dept", "lora")],
]


def make(name: str, backbone: str, reading: str) -> Callable[[int], tuple[torch.nn.Module, object]]:
    def build(seed: int) -> tuple[torch.nn.Module, object]:
        cls = find_method("nlp", name)
        settings = SETTINGS[name] | {"seed": seed}
        if reading in ("head", "labels"):
            settings |= {"num_labels": 2, "multilabel": reading == "labels"}
        if name == "trie-search":  # "news", "sport news", "; " is "film"
            settings["label_tokens"] = (((6, 5), (6, 1)) * 2, ((7, 6, 5), (7, 6, 1)) * 2)
        settings = {k: v for k, v in settings.items() if k in cls.config_class.model_fields}
        model = BACKBONES[backbone]()
        method = cls(model, cls.config_class(**settings))
        if name == "spot":
            method.load_trained_state({"prompt.weight": torch.randn(3, 16, generator=torch.Generator().manual_seed(9))})
        if name == "ptec" and reading == "labels":  # some checks ask for the loss before `fit` has counted
            method.pos_weight.copy_(torch.tensor([3.0, 1.0]))
        return model, method

    return build


def case(name: str, backbone: str, reading: str) -> Case:
    kind = {"head": "classification", "labels": "multilabel", "text": "text-to-text"}.get(reading, "verbalizer")
    rows = ROWS
    if reading == "labels":  # 3 positives and 4 negatives: weights of 4/3 and 1
        rows = [row | {"label": sorted({row["label"], *(["negative"] * (i == 0))})} for i, row in enumerate(ROWS)]
    task = TextTask.from_rows(
        {"train": rows, "validation": rows[:4]},
        tokenizer(),
        kind=kind,
        backbone=backbone,
        template="{text} Topic :",
        max_target_length=4,
        objective="classes" if reading == "classes" else "tokens",
    )

    def probe(model: torch.nn.Module) -> torch.Tensor:
        ids = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 0]])
        more = {"decoder_input_ids": ids[:, :2]} if backbone == "seq2seq" else {}
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=(ids != 0).long(), **more)[0]

    assert task.train is not None
    return Case(
        f"{name}-{backbone}-{reading}",
        make(name, backbone, reading),
        task.train,
        task.validation,
        probe=probe,
        draws=name not in ("ia3", "linear-probe", "zero-shot"),
    )


@pytest.mark.parametrize("cell", CELLS, ids="-".join)
@pytest.mark.parametrize("check", contract_checks())
def test_contract(cell, check, tmp_path):
    check(case(*cell), tmp_path)


def test_every_method_of_the_package_is_under_the_contract():
    assert {name for name, _, _ in CELLS} == set(methods("nlp"))
