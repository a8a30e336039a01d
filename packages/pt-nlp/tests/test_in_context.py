"""In-context learning: demonstrations as a prompt equal demonstrations written in front of every input."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from pt_core.artifacts import load_artifact
from pt_core.data import few_shot
from pt_core.errors import InputError
from pt_core.frozen import assert_unchanged, snapshot
from pt_core.plan import FitConfig
from pt_core.testing import watch
from pt_nlp.data import TextTask
from pt_nlp.methods.in_context import InContext, InContextConfig
from pt_nlp.methods.zero_shot import ZeroShot, ZeroShotConfig

WORDS = "<pad> </s> <unk> the a was film news great awful red blue good bad ; it"
TEXTS = ["the film was great", "a awful film", "the news was red", "it was blue a a", "great", "awful news", "red it"]
ROWS = [{"text": text, "label": "yes" if i % 2 else "no"} for i, text in enumerate(TEXTS)]
RUN = FitConfig(epochs=1, device="cpu", eval_batch_size=2, progress=False)
SEPARATOR = 14  # ;
V = 16


def tokenizer() -> PreTrainedTokenizerFast:
    table = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS.split())}, unk_token="<unk>"))
    table.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=table, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def task(kind: str = "verbalizer", long_words: bool = False) -> TextTask:
    words = {} if kind == "text-to-text" else {"verbalizer": {"yes": "good bad" if long_words else "good", "no": "bad"}}
    rows = {"train": ROWS, "validation": ROWS[:3]}
    if kind == "text-to-text":
        rows = {name: [row | {"label": "good bad"} for row in part] for name, part in rows.items()}
    return TextTask.from_rows(
        rows, tokenizer(), kind=kind, backbone="causal-lm", template="{text} was", max_target_length=5, **words
    )


def llama(positions: int = 128) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        max_position_embeddings=positions,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=V, n_embd=16, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3, bos_token_id=1
    )
    return GPT2LMHeadModel(config).eval()


def opt() -> OPTForCausalLM:
    """A type without a shared prefix: demonstrations stand in every row."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=V,
        hidden_size=16,
        ffn_dim=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=16,
        init_std=0.3,
        pad_token_id=0,
    )
    return OPTForCausalLM(config).eval()


def made(backbone, split, **settings) -> InContext:
    method = InContext(backbone, InContextConfig(separator_ids=(SEPARATOR,), **settings))
    method.fit(split, None, RUN)
    return method.eval()


def literal(batch: dict, ids: Tensor) -> dict:
    """The batch with the demonstrations written in front of every source, behind its padding."""
    sources = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
    rows = [torch.cat([ids, row[mask]]) for row, mask in sources]
    n = max(map(len, rows))
    written = torch.stack([torch.nn.functional.pad(row, (n - len(row), 0)) for row in rows])
    mask = torch.stack([torch.tensor([0] * (n - len(row)) + [1] * len(row)) for row in rows])
    return batch | {"input_ids": written, "attention_mask": mask}


@pytest.mark.parametrize("long_words", [False, True])
@pytest.mark.parametrize("make", [llama, gpt2, opt])
def test_scores_equal_those_with_the_demonstrations_written_in_front_of_each_input(make, long_words):
    backbone, data = make(), task(long_words=long_words)
    before = snapshot(backbone)
    method = made(backbone, data.train, demonstrations=2)
    batch = data.train.batch([0, 1, 3, 4])
    assert len(set(batch["attention_mask"].sum(1).tolist())) > 1
    with torch.no_grad():
        found = method(batch).logits
        wanted = ZeroShot(backbone)(literal(batch, method.prompt.ids)).logits
        plain = ZeroShot(backbone)(batch).logits
    assert (found - wanted).abs().max() < 1e-5
    assert (found - plain).log_softmax(-1).diff().abs().max() > 1e-3
    method.remove()
    assert_unchanged(backbone, before)
    assert "forward" not in backbone.__dict__


def test_generated_text_equals_that_with_the_demonstrations_written_in_front():
    backbone, data = llama(), task("text-to-text")
    method = made(backbone, data.train, demonstrations=2)
    shown = method.prompt.ids.tolist()
    assert shown.count(SEPARATOR) == shown.count(1) == 2  # every target ends with the end-of-sequence token
    batch = data.encoder.batch(data.texts(TEXTS[:3]), with_targets=False)
    n, options = batch["input_ids"].shape[1], {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    found = method.generate(batch, **options)[:, n:]
    longer = literal(batch, method.prompt.ids)
    wanted = ZeroShot(backbone).generate(longer, **options)[:, longer["input_ids"].shape[1] :]
    assert torch.equal(found, wanted)
    assert method.fit(data.train, data.validation, RUN).metrics.keys() == {"exact-match", "token-f1"}


def test_a_separator_whose_ids_are_not_given_is_refused_where_demonstrations_are_drawn():
    assert InContextConfig().separator_text == "\n\n"
    data = task()
    with pytest.raises(InputError, match=r"'separator_ids': demonstrations are separated by '\\n\\n', whose token ids"):
        InContext(llama()).fit(data.train, None, RUN)
    for settings in ({"separator_text": ""}, {"separator_ids": ()}):
        method = InContext(llama(), InContextConfig(**settings))
        method.fit(data.train, None, RUN)
        assert method.prompt.length > 0
    InContext(llama(), InContextConfig(demonstrations=0)).fit(data.train, None, RUN)


def test_demonstrations_are_k_rows_of_each_class_nested_and_shuffled_by_the_seed():
    data = task()
    words = {row["label"]: row["target"] for row in data.train.rows}

    def blocks(k: int, seed: int = 0) -> list[tuple[int, ...]]:
        ids = made(llama(), data.train, demonstrations=k, seed=seed).prompt.ids.tolist()
        parts, start = [], 0
        for i, token in enumerate(ids):
            if token == SEPARATOR:
                parts.append(tuple(ids[start:i]))
                start = i + 1
        return parts

    rows = [tuple(row["source"] + row["target"]) for row in data.train.rows]
    labels = [row["label"] for row in data.train.rows]
    for k in (1, 2, 3):
        found = blocks(k)
        assert sorted(found) == sorted(rows[i] for i in few_shot(labels, k, 0))
        assert [list(b[-1:]) for b in found].count(words[0]) == k
    assert set(blocks(1)) < set(blocks(2)) < set(blocks(3))
    assert blocks(3) == blocks(3)
    in_order = [[rows[i] for i in few_shot(labels, 3, seed)] for seed in range(3)]
    assert any(blocks(3, seed) != in_order[seed] for seed in range(3))
    assert len({tuple(blocks(3, seed)) for seed in range(3)}) > 1


def test_without_demonstrations_it_is_zero_shot():
    backbone, data = llama(), task()
    batch = data.train.batch([0, 1, 2])
    wanted = ZeroShot(backbone)(batch).logits
    assert torch.equal(InContext(backbone)(batch).logits, wanted)
    assert torch.equal(made(backbone, data.train, demonstrations=0)(batch).logits, wanted)


def test_calibration_is_computed_behind_the_demonstrations():
    backbone, data = llama(), task()
    ids = (tuple(data.encoder.source({"text": "it"})),)
    settings = {"calibrate": "content-free", "content_free_ids": ids}
    method = made(backbone, data.train, demonstrations=2, **settings)
    batch = data.train.batch([0, 1, 2])
    plain = ZeroShot(backbone)
    free = {"input_ids": torch.tensor(ids), "attention_mask": torch.ones(1, 2, dtype=torch.long)}
    free |= {name: batch[name] for name in ("candidates", "candidate_mask")}
    with torch.no_grad():
        b = plain(literal(free, method.prompt.ids)).logits.log_softmax(-1)[0]
        wanted = plain(literal(batch, method.prompt.ids)).logits.log_softmax(-1) - b
        assert (method(batch).logits - wanted).abs().max() < 1e-5
    zero = ZeroShot(backbone, ZeroShotConfig(**settings))
    zero.fit(data.train, None, RUN)
    assert (zero.calibration - method.calibration).abs().max() > 1e-3


def test_an_artifact_holds_the_ids_and_restores_the_logits(tmp_path):
    data = task()
    method = made(llama(), data.train, demonstrations=2, calibrate="train-mean")
    folder = method.save_pretrained(tmp_path / "prompt", backbone_name="tiny")
    tensors = load_artifact(folder).tensors
    assert set(tensors) == {"prompt.ids", "calibration"} and tensors["prompt.ids"].dtype == torch.long
    again = InContext.from_pretrained(folder, llama(), strict=True).eval()
    batch = data.train.batch([0, 1, 2])
    assert again.prompt.length == len(tensors["prompt.ids"]) > 10
    assert torch.equal(again(batch).logits, method(batch).logits)
    twin = made(llama(), data.train, demonstrations=2, calibrate="train-mean")
    assert torch.equal(twin(batch).logits, method(batch).logits)


def test_nothing_is_trained():
    method = made(llama(), task().train)
    assert method.count() == 0 and not method.trains and method.parameter_groups() == []


def test_keys_and_values_of_the_demonstrations_are_computed_once():
    backbone, data = llama(), task(long_words=True)
    method = made(backbone, data.train, demonstrations=2)
    rows = []
    watch(backbone.model.layers[0], lambda read, _: rows.append(read[0].shape[:2].numel()))
    batch = data.train.batch([0, 1, 3])
    with torch.no_grad():
        method(batch)
        first = sum(rows)
        rows.clear()
        method(batch)
    assert first - sum(rows) == method.prompt.length
    assert sum(rows) == batch["input_ids"].numel() + 3 * 2  # sources once, then the second token of each label word


def test_what_does_not_fit_is_refused():
    data = task()
    with pytest.raises(InputError, match=r"'demonstrations'.*LlamaForCausalLM has 20.*fewer demonstrations"):
        made(llama(positions=20), data.train, demonstrations=3)
    method = made(llama(positions=30), data.train, demonstrations=1)
    used = method.prompt.length
    long = {"input_ids": torch.full((1, 30 - used + 1), 3), "attention_mask": torch.ones(1, 30 - used + 1).long()}
    with pytest.raises(InputError, match="take 31 positions, LlamaForCausalLM has 30"):
        method(data.train.batch([0]) | long)
    with pytest.raises(InputError, match="take 31 positions"):
        method.generate(long)
    with pytest.raises(InputError, match="needs a causal language model"):
        InContext(T5ForConditionalGeneration(T5Config(vocab_size=V, d_model=16, d_kv=4, d_ff=20, num_layers=1)))
    encoder = BertConfig(vocab_size=V, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=20)
    with pytest.raises(InputError, match="needs a causal language model"):
        InContext(BertModel(encoder))
    with pytest.raises(InputError, match="wanted"):
        made(llama(), data.train, demonstrations=4)  # class yes has three rows
    with pytest.raises(InputError, match="'separator_ids'"):
        InContext(llama(), InContextConfig(separator_ids=(V,)))
    labelled = TextTask.from_rows({"train": ROWS}, tokenizer(), kind="classification", backbone="causal-lm")
    with pytest.raises(InputError, match="no target to show"):
        made(llama(), labelled.train)
