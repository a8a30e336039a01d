"""DePT on small random Llama, GPT-2, BERT and T5 models, against prompt tuning, the models' own forwards and hand numbers."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from pt_core.attachment import attach, route
from pt_core.errors import InputError
from pt_core.frozen import assert_unchanged, snapshot
from pt_core.plan import FitConfig
from pt_core.prompts import LowRankOffset, SoftPrompt
from pt_nlp.carried import source_tokens
from pt_nlp.data import TextTask
from pt_nlp.methods.dept import RELEASED_INIT_TEXT, DecomposedPrompt, DePT, DePTConfig
from pt_nlp.methods.prompt_tuning import PromptTuning, PromptTuningConfig
from pt_nlp.methods.spot import SPoT, SPoTConfig
from pt_nlp.models import SHARED_PREFIX

VOCAB, D, M, S, R = 61, 32, 4, 12, 3
WORDS = "<pad> </s> <unk> good bad film the a was great awful Topic :"


def build(kind: str, seed: int = 0, **changes) -> nn.Module:
    """A random model in which every token matters (weights of 0.3 rather than 0.02)."""
    torch.manual_seed(seed)
    special = {"vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    llama = {"hidden_size": D, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama |= {"num_key_value_heads": 2, "initializer_range": 0.3} | special
    bert = {"hidden_size": D, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    bert |= {"initializer_range": 0.3, "vocab_size": VOCAB, "max_position_embeddings": 40}
    made = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**llama | changes)),
        "classifier": lambda: LlamaForSequenceClassification(LlamaConfig(**llama | {"num_labels": 3})),
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(n_embd=D, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3, **special)
        ),
        "bert": lambda: BertModel(BertConfig(**bert)),
        "roberta": lambda: RobertaModel(RobertaConfig(**bert | {"pad_token_id": 1})),
        "bart": lambda: BartForConditionalGeneration(
            BartConfig(d_model=D, encoder_layers=1, decoder_layers=1, decoder_start_token_id=0, **special)
        ),
        "t5": lambda: T5ForConditionalGeneration(
            T5Config(d_model=D, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, **special)
        ),
    }
    return made[kind]().eval()


def dept(backbone: nn.Module, trained: bool = True, **settings) -> DePT:
    """DePT; `trained`: with a B that is not zero."""
    config = {"prompt_length": M, "rank": R, "max_source_length": S} | settings
    method = DePT(backbone, DePTConfig(**config)).eval()
    if trained and method.prompt.low_rank is not None:
        with torch.no_grad():
            method.prompt.low_rank.B.normal_(generator=torch.Generator().manual_seed(1))
    return method


def sources(lengths: list[int], width: int, side: str = "right") -> dict[str, torch.Tensor]:
    """Rows of random tokens, padded to `width`."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, n in enumerate(lengths):
        at = slice(0, n) if side == "right" else slice(width - n, width)
        ids[i, at], mask[i, at] = torch.randint(2, VOCAB, (n,), generator=generator), 1
    return {"input_ids": ids, "attention_mask": mask}


def tokenizer() -> PreTrainedTokenizerFast:
    table = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS.split())}, unk_token="<unk>"))
    table.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=table, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


ROWS = [
    {"text": "the film was great", "label": "good"},
    {"text": "the film was awful", "label": "bad"},
    {"text": "a great film", "label": "good"},
    {"text": "awful", "label": "bad"},
] * 2


def task_of(backbone: str, kind: str = "verbalizer", **settings) -> TextTask:
    rows = {"train": ROWS, "validation": ROWS[:4]}
    return TextTask.from_rows(rows, tokenizer(), kind=kind, backbone=backbone, template="{text} Topic :", **settings)


@contextmanager
def plain_path():
    """No shared prefix: the prompt stands in every row."""
    kept = set(SHARED_PREFIX)
    SHARED_PREFIX.clear()
    try:
        yield
    finally:
        SHARED_PREFIX.update(kept)


def embedded(backbone: nn.Module, method: DePT, **arguments) -> torch.Tensor:
    """Input embeddings that reach the first block of a Llama or T5, prompt rows left out."""
    seen, seq2seq = [], backbone.config.is_encoder_decoder
    block = backbone.encoder.block[0] if seq2seq else backbone.model.layers[0]
    hook = block.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with method.active(), torch.no_grad():
        backbone(**arguments, **({"decoder_input_ids": arguments["input_ids"][:, :2]} if seq2seq else {}))
    hook.remove()
    return seen[-1][:, -arguments["input_ids"].shape[1] :]


# --- the card's properties ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("m", "r", "s", "count"),
    [
        (60, 30, 256, 76_800),
        (20, 60, 256, 76_800),
        (40, 45, 256, 76_800),
        (80, 15, 256, 76_800),
        (60, 24, 512, 76_800),
        (60, 30, 348, 79_560),
    ],
)
def test_property_1_parameter_count(m, r, s, count):
    prompt = DecomposedPrompt(torch.zeros(m, 768), s, r)
    assert prompt.count() == m * 768 + (s + 768) * r == count
    if (m, r, s) == (60, 30, 256):
        assert [sum(p.numel() for p in group) for group in prompt.groups().values()] == [46_080, 30_720]


@pytest.mark.parametrize(("kind", "head"), [("llama", None), ("gpt2", None), ("t5", None), ("bert", 3), ("llama", 3)])
def test_property_2_starts_as_prompt_tuning_and_without_rows_as_the_frozen_model(kind, head):
    backbone, batch = build(kind), sources([7, 4], 9)
    arguments = dict(batch)
    if kind == "t5":
        arguments["decoder_input_ids"] = torch.tensor([[0, 5, 9], [0, 3, 4]])

    def outputs(method):
        with torch.no_grad():
            if head:
                return method(batch).logits
            with method.active():
                return backbone(**arguments).logits

    method = dept(backbone, trained=False, num_labels=head, seed=3)
    vanilla = PromptTuning(backbone, PromptTuningConfig(prompt_length=M, num_labels=head, seed=3)).eval()
    assert not method.prompt.delta().any()
    assert torch.equal(method.prompt.soft.weight, vanilla.prompt.weight)
    if head:
        vanilla.head.load_state_dict(method.head.state_dict())
    torch.testing.assert_close(outputs(method), outputs(vanilla), rtol=0, atol=0)

    bare = dept(backbone, trained=False, num_labels=head, prompt_length=0)
    with torch.no_grad():
        if head:
            states = (backbone.model if kind == "llama" else backbone)(**batch).last_hidden_state
            last = batch["attention_mask"].sum(1) - 1
            pooled = states[torch.arange(2), last if kind == "llama" else torch.zeros(2, dtype=torch.long)]
            expected = bare.head(pooled)
        else:
            expected = backbone(**arguments).logits
    real = torch.ones_like(expected) if head or kind == "t5" else batch["attention_mask"][..., None]
    torch.testing.assert_close(outputs(bare) * real, expected * real, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "head"), [("llama", None), ("t5", None), ("bert", 3)])
def test_property_3_gradient_at_the_start(kind, head):
    method = dept(build(kind), trained=False, num_labels=head)
    batch = sources([7, 5], 7)
    batch["target_ids"] = torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)
    if kind == "llama":
        batch["target_ids"][:, :4] = -100
    if head:
        batch["labels"] = torch.tensor([0, 2])
    loss = method.loss(batch)
    loss.value.backward()
    low_rank = method.prompt.low_rank
    assert not low_rank.A.grad.any()
    assert low_rank.B.grad.abs().max() > 1e-3
    assert method.prompt.soft.weight.grad.abs().max() > 1e-3
    assert all(p.grad is None for name, p in method.backbone.named_parameters())


def test_property_4_delta_by_hand():
    offset = LowRankOffset(positions=3, rank=1, dim=2, alpha=8)
    with torch.no_grad():
        offset.A.copy_(torch.tensor([[1.0], [0.0], [-1.0]]))
        offset.B.copy_(torch.tensor([[0.5, 0.0]]))
    assert offset().tolist() == [[4, 0], [0, 0], [-4, 0]]


def test_property_5_start_of_a_scale_and_rank_zero():
    prompt = DecomposedPrompt(torch.zeros(2, 64), 256, 30)
    bound = prompt.low_rank.A.abs().max()
    assert 0.18 < bound <= 0.1826
    assert prompt.low_rank.scale == pytest.approx(1.4606, abs=1e-4)
    assert LowRankOffset(256, 0, 64).scale == 0
    backbone, batch = build("llama"), sources([7, 4], 9)
    none, vanilla = dept(backbone, rank=0), PromptTuning(backbone, PromptTuningConfig(prompt_length=M)).eval()
    assert none.count() == vanilla.count() == M * D
    assert [group["name"] for group in none.parameter_groups()] == ["prompt"]
    with torch.no_grad():
        with none.active():
            a = backbone(**batch).logits
        with vanilla.active():
            b = backbone(**batch).logits
    assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_property_6_offsets_stay_when_tokens_swap(kind):
    backbone = build(kind)
    method = dept(backbone)
    ids = torch.arange(3, 10)[None]
    swapped = ids.clone()
    swapped[0, [1, 4]] = ids[0, [4, 1]]
    table, delta = backbone.get_input_embeddings().weight, method.prompt.delta()[:7]
    one, other = (embedded(backbone, method, input_ids=x)[0] for x in (ids, swapped))
    torch.testing.assert_close(one - table[ids[0]], delta)
    torch.testing.assert_close(other - table[swapped[0]], delta)
    torch.testing.assert_close(other[1] - delta[1], one[4] - delta[4])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5"])
def test_property_6_row_i_of_the_offset_is_added_to_source_token_i(kind):
    """As input embeddings of our own, [P; E(x) + Delta], in the backbone's own forward."""
    backbone, batch = build(kind), sources([9, 6], 9)
    method, real = dept(backbone), batch["attention_mask"].bool()
    more = {"decoder_input_ids": torch.tensor([[0, 5, 9], [0, 3, 4]])} if kind == "t5" else {}
    with torch.no_grad():
        text = backbone.get_input_embeddings()(batch["input_ids"]) + method.prompt.delta()[:9]
        whole = torch.cat([method.prompt.soft.weight.expand(2, -1, -1), text], dim=1)
        mask = torch.cat([torch.ones(2, M, dtype=torch.long), batch["attention_mask"]], dim=1)
        expected = backbone(inputs_embeds=whole, attention_mask=mask, **more)[0]
        without = backbone(**batch, **more)[0]
        with method.active():
            found = backbone(**batch, **more)[0]
    if kind != "t5":
        expected, without, found = expected[:, M:][real], without[real], found[real]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found - without).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("kind", "backbone", "head"), [("seq2seq", "t5", None), ("causal-lm", "llama", None), ("encoder", "bert", 2)]
)
def test_property_7_low_rank_frozen_backbone_and_two_rates(kind, backbone, head):
    model, task = build(backbone), task_of(kind, "classification" if head else "verbalizer")
    method = dept(model, trained=False, lr=0.1, low_rank_lr=0.002, num_labels=head)
    before = snapshot(model)
    config = FitConfig(
        max_steps=12, batch_size=4, schedule="linear", warmup_steps=3, log_every=1, device="cpu", progress=False
    )
    result = method.fit(task.train, None, config)
    assert_unchanged(model, before)
    delta = method.prompt.delta()
    assert delta.abs().max() > 0
    assert torch.linalg.matrix_rank(delta) <= R
    groups = method.parameter_groups()
    assert [group["name"] for group in groups] == ["prompt", "low-rank", *(["head"] if head else [])]
    ids = [id(p) for group in groups for p in group["params"]]
    assert len(set(ids)) == len(ids) == sum(1 for _ in method.trainable())
    rates = [(row["lr/prompt"], row["lr/low-rank"]) for row in result.history]
    assert len(rates) == 12
    assert all(a / b == pytest.approx(50) for a, b in rates)
    assert rates[0][0] == pytest.approx(0.1 / 3)
    assert rates[-1][0] == pytest.approx(0.1 / 9)
    assert result.history[-1]["loss"] < result.history[0]["loss"]


@pytest.mark.parametrize(
    ("kind", "task", "given", "rate"),
    [
        ("t5", "seq2seq", None, 0.3),
        ("t5", "seq2seq", 0.4, 0.4),
        ("bart", "seq2seq", None, 5e-3),
        ("llama", "causal-lm", None, 5e-3),
        ("llama", "causal-lm", 0.3, 0.3),
        ("bert", "encoder", None, 5e-3),
    ],
)
def test_the_rate_of_the_prompt_is_for_large_embeddings_on_t5_alone(kind, task, given, rate):
    """By one rule for all methods of rows, so that DePT without an offset trains as prompt tuning does."""
    head = {"kind": "classification"} if kind == "bert" else {}
    method = dept(build(kind), lr=given, num_labels=2 if head else None)
    run = FitConfig(max_steps=1, log_every=1, device="cpu", progress=False)
    (row,) = method.fit(task_of(task, **head).train, None, run).history
    assert (row["lr/prompt"], row["lr/low-rank"], method.config.lr) == (rate, 5e-4, given)
    method.remove()
    for cls, config in ((PromptTuning, PromptTuningConfig), (SPoT, SPoTConfig), (DePT, partial(DePTConfig, rank=0))):
        other = cls(build(kind), config(lr=given))
        assert [(group["name"], group["lr"]) for group in other.parameter_groups()] == [("prompt", rate)]


def test_the_defaults_are_those_of_most_released_checkpoints():
    config = DePTConfig()
    assert (config.prompt_length, config.rank, config.max_source_length, config.alpha) == (60, 30, 256, 8.0)
    prompt = DePT(build("llama", max_position_embeddings=512), config).prompt
    shapes = {name: tuple(part.shape) for name, part in prompt.named_parameters()}
    assert shapes == {"soft.weight": (60, D), "low_rank.A": (256, 30), "low_rank.B": (30, D)}


def test_the_defaults_learn_on_a_causal_model():
    method = DePT(build("llama"), DePTConfig())
    run = FitConfig(max_steps=30, log_every=1, device="cpu", progress=False)
    losses = [row["loss"] for row in method.fit(task_of("causal-lm").train, None, run).history]
    assert losses[-1] < 0.2 * losses[0]  # with a tenth of the rate 0.43


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5"])
def test_property_8_rows_do_not_depend_on_each_other(kind):
    method, side = dept(build(kind), num_labels=3), "left" if kind in ("llama", "gpt2") else "right"
    batch = sources([9, 3, 6], S, side)
    with torch.no_grad():
        together = method(batch).logits
        alone = torch.cat([method({k: v[i : i + 1] for k, v in batch.items()}).logits for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


# --- where the offset goes ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5"])
def test_padding_to_s_and_slicing_are_the_same_in_values_and_gradients(kind):
    method = dept(build(kind).double(), num_labels=3).double()
    results = []
    for width in (8, S):
        method.zero_grad()
        logits = method(sources([8, 5], width)).logits
        logits.square().sum().backward()
        low_rank = method.prompt.low_rank
        results.append([logits.detach(), low_rank.A.grad.clone(), low_rank.B.grad, method.prompt.soft.weight.grad])
    for short, padded in zip(*results, strict=True):
        torch.testing.assert_close(short, padded, rtol=1e-9, atol=1e-10)
    assert results[0][1][:8].abs().min(1).values.max() > 0
    assert not results[0][1][8:].any()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_left_padding_equals_right_padding(kind):
    backbone = build(kind)
    method = dept(backbone)
    states = []
    for side in ("left", "right"):
        batch = sources([9, 3, 6], 9, side)
        with torch.no_grad(), method.active():
            logits = backbone(**batch).logits
        states.append(logits[batch["attention_mask"].bool()])
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("m", [M, 0])
def test_shared_prefix_equals_a_prompt_in_every_row(kind, m):
    method = dept(build(kind), prompt_length=m)
    batch = sources([9, 6], 9, "left")
    batch["target_ids"] = batch["input_ids"].clone()
    batch["target_ids"][:, :6] = -100
    results = []
    for path in (None, plain_path()):
        method.zero_grad()
        if path is None:
            loss = method.loss(batch).value
        else:
            with path:
                loss = method.loss(batch).value
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for _, p in method.trainable() if p.numel())])
    assert len(results[0]) == (4 if m else 3)
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-6)


def test_targets_get_no_offset_in_training():
    backbone = build("llama")
    method, table = dept(backbone), backbone.get_input_embeddings().weight
    batch = sources([9, 6], 9, "left")
    labels = batch["input_ids"].clone()
    labels[:, :6] = -100  # row 0: 6 source and 3 target tokens; row 1: 3 and 3
    delta = method.prompt.delta()
    expected = table[batch["input_ids"]].detach().clone()
    expected[0, :6] += delta[:6]
    expected[1, 3:6] += delta[:3]
    real = batch["attention_mask"].bool()
    by_labels = embedded(backbone, method, **batch, labels=labels)
    torch.testing.assert_close(by_labels[real], expected[real])
    with source_tokens((labels == -100).long()):
        by_mask = embedded(backbone, method, **batch)
    torch.testing.assert_close(by_mask[real], expected[real])


def test_loss_is_the_models_own_loss_with_labels():
    backbone = build("llama")
    method = dept(backbone)
    batch = sources([9, 6], 9, "left")
    labels = batch["input_ids"].clone()
    labels[:, :6] = -100
    with torch.no_grad(), method.active():
        own = backbone(**batch, labels=labels).loss
    with torch.no_grad():
        derived = method.loss(batch | {"target_ids": labels}).value
        given = method.loss(
            batch | {"target_ids": labels, "source_mask": (labels == -100) * batch["attention_mask"]}
        ).value
    torch.testing.assert_close(own, derived)
    torch.testing.assert_close(own, given)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_generation_continues_as_the_model_was_trained(kind, side):
    """What is generated at prefill and step by step is what teacher forcing scores highest, with and without a cache."""
    backbone = build(kind)
    method = dept(backbone)
    batch = sources([7, 5] if side == "left" else [7, 7], 7, side)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    written = method.generate(batch, **options)
    assert torch.equal(written, method.generate(batch, use_cache=False, **options))
    with plain_path():
        assert torch.equal(written, method.generate(batch, **options))
    with method.active():
        assert torch.equal(written, backbone.generate(**batch, **options))
    labels = written.clone()
    labels[:, :7] = -100
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 6, dtype=torch.long)], dim=1)
    with torch.no_grad(), method.active():
        logits = backbone(input_ids=written, attention_mask=mask, labels=labels).logits
    top = logits[:, 6:-1].topk(2, dim=-1)
    clear = (top.values[..., 0] - top.values[..., 1]) > 1e-4
    assert clear.float().mean() > 0.8
    assert torch.equal(top.indices[..., 0][clear], written[:, 7:][clear])


def test_beam_search_repeats_the_source_for_every_beam():
    backbone = build("llama")
    method, batch = dept(backbone), sources([7, 5], 7, "left")
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(method.generate(batch, **options), method.generate(batch, use_cache=False, **options))


@pytest.mark.parametrize("path", ["shared", "plain"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_source_that_is_read_in_several_calls_gets_the_offset_of_its_positions(kind, path):
    backbone = build(kind)
    method, batch = dept(backbone), sources([7, 2, 5], 7, "left")
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with plain_path() if path == "plain" else nullcontext():
        written = method.generate(batch, **options)
        for size in (3, 6):
            assert torch.equal(method.generate(batch, prefill_chunk_size=size, **options), written)
        with torch.no_grad(), method.active(), source_tokens(torch.ones_like(batch["input_ids"])):
            start = {name: part[:, :4] for name, part in batch.items()}
            cache = backbone(**start, use_cache=True).past_key_values
        assert torch.equal(method.generate(batch, past_key_values=cache, **options), written)


def test_several_tokens_behind_a_cache_are_refused_unless_it_is_said_which_are_source():
    backbone = build("llama")
    method, batch = dept(backbone), sources([7, 5], 7, "left")
    start = {name: part[:, :4] for name, part in batch.items()}
    rest = {"input_ids": batch["input_ids"][:, 4:], "attention_mask": batch["attention_mask"]}
    with torch.no_grad(), method.active():
        whole = backbone(**batch).logits[:, 4:]
        for labels in (None, rest["input_ids"]):  # those of a call say nothing of the positions of the whole text
            cache = backbone(**start, use_cache=True).past_key_values
            with pytest.raises(InputError, match="3 tokens behind a cache: the prompt has an offset"):
                backbone(**rest, past_key_values=cache, labels=labels)
        with source_tokens(batch["attention_mask"]):
            torch.testing.assert_close(backbone(**rest, past_key_values=cache).logits, whole, rtol=1e-4, atol=1e-5)


def test_generation_without_prompt_rows():
    method, batch = dept(build("llama"), prompt_length=0), sources([7, 5], 7, "left")
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(method.generate(batch, **options), method.generate(batch, use_cache=False, **options))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_label_words_are_scored_without_an_offset_on_them(checkpointing):
    backbone = build("llama")
    if checkpointing:
        backbone.gradient_checkpointing_enable()
    method = dept(backbone)
    batch = sources([7, 5], 7, "left")
    words = torch.tensor([[4, 8, 2], [5, 0, 0]])
    batch |= {"candidates": words, "candidate_mask": torch.tensor([[1, 1, 1], [1, 0, 0]])}
    scores = method(batch).logits.detach()
    for i in range(2):
        for c, length in enumerate((3, 1)):
            source = batch["input_ids"][i][batch["attention_mask"][i].bool()]
            ids = torch.cat([source, words[c, :length]])[None]
            labels = ids.clone()
            labels[:, : len(source)] = -100
            with torch.no_grad(), method.active():
                expected = -backbone(input_ids=ids, labels=labels).loss * length
            torch.testing.assert_close(scores[i, c], expected, rtol=1e-4, atol=1e-4)


def test_class_labels_of_a_classifier_are_no_targets():
    backbone = build("classifier")
    prompt = DecomposedPrompt(torch.zeros(M, D), S, R)
    nn.init.normal_(prompt.low_rank.B)
    batch = sources([7, 5, 6], 7)
    handle = attach(backbone, prompt)
    with torch.no_grad():
        labelled = backbone(**batch, labels=torch.tensor([0, 2, 1])).logits
        plain = backbone(**batch).logits
    handle.remove()
    assert torch.equal(labelled, plain)
    with torch.no_grad():
        assert not torch.allclose(plain, backbone(**batch).logits, atol=1e-2)


def test_two_prompts_and_none_in_one_batch():
    backbone = build("llama")
    one, other = dept(backbone, seed=1), dept(backbone, seed=2, prompt_length=2)
    batch = sources([7, 5, 6], 7)
    with torch.no_grad():
        with route(backbone, [one.handle, other.handle, None]):
            mixed = backbone(**batch).logits
        for i, handle in enumerate((one.handle, other.handle, None)):
            n = int(batch["attention_mask"][i].sum())
            with route(backbone, [handle]):
                alone = backbone(input_ids=batch["input_ids"][i : i + 1, :n]).logits
            torch.testing.assert_close(mixed[i : i + 1, :n], alone, rtol=1e-4, atol=1e-4)


# --- limits, cost, keeping ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
def test_a_source_longer_than_s_is_refused(kind):
    method = dept(build(kind), num_labels=3)
    method(sources([S, 4], S + 2))  # padding may be longer
    with pytest.raises(InputError, match=r"'max_source_length': a source of 13 tokens, but the offset has rows for 12"):
        method(sources([S + 1, 4], S + 1))


def test_a_long_row_is_refused_before_the_first_step():
    method, task = dept(build("llama"), max_source_length=5), task_of("causal-lm")
    started = method.prompt.soft.weight.detach().clone()
    with pytest.raises(InputError, match="row 1, field 'max_source_length': a source of 6 tokens"):
        method.fit(task.train, None, FitConfig(max_steps=2, device="cpu", progress=False))
    assert torch.equal(method.prompt.soft.weight, started)
    dept(build("llama"), max_source_length=5, rank=0).fit(
        task.train, None, FitConfig(max_steps=1, device="cpu", progress=False)
    )


def test_targets_may_lie_beyond_s():
    method = dept(build("llama"), max_source_length=6)
    batch = sources([9, 8], 9, "left")
    batch["target_ids"] = batch["input_ids"].clone()
    batch["target_ids"][:, :6] = -100
    assert torch.isfinite(method.loss(batch).value)


def test_delta_is_computed_once_a_step_and_kept_at_inference(monkeypatch):
    calls = []
    forward = LowRankOffset.forward
    monkeypatch.setattr(LowRankOffset, "forward", lambda self: calls.append(1) or forward(self))
    method, task = dept(build("llama")), task_of("causal-lm")
    batch = task.train.batch([0, 1, 2])
    method.loss(batch).value.backward()
    assert len(calls) == 1
    calls.clear()
    with torch.no_grad():
        first = method(batch).logits
        assert torch.equal(method(batch).logits, first)
        assert len(calls) == 1
        method.prompt.low_rank.B.data.mul_(2)
        changed = method(batch).logits
        assert len(calls) == 2
    assert not torch.allclose(changed, first, atol=1e-3)


def test_delta_stays_float32_under_bf16_autocast():
    method = dept(build("llama"))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        low = method.prompt.delta()
    assert low.dtype == torch.float32
    low_rank = method.prompt.low_rank
    torch.testing.assert_close(low, low_rank.scale * (low_rank.A @ low_rank.B).detach(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_folded_positions_replace_the_offset(kind):
    backbone, batch = build(kind), sources([9, 5], 9)
    batch["input_ids"][batch["attention_mask"] == 0] = backbone.config.pad_token_id
    method = dept(backbone)
    with torch.no_grad(), method.active():
        expected = backbone(**batch).last_hidden_state
    table = method.fold_into_positions()
    method.remove()
    handle = attach(backbone, SoftPrompt(M, D, init=method.prompt.soft.weight))
    own = backbone.embeddings.position_embeddings.weight
    assert (table != own).any(1).sum() == S
    with torch.no_grad():
        without = backbone(**batch).last_hidden_state
        own.copy_(table)
        folded = backbone(**batch).last_hidden_state
    handle.remove()
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(folded[real], expected[real], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(without[real], expected[real], atol=1e-2)


def test_positions_of_a_causal_model_are_not_folded():
    with pytest.raises(InputError, match="cannot be folded into the positions of a GPT2LMHeadModel"):
        dept(build("gpt2")).fold_into_positions()


def test_round_trip_through_a_folder(tmp_path):
    backbone, batch = build("llama"), sources([7, 5], 7)
    method = dept(backbone, num_labels=3)
    folder = method.save_pretrained(tmp_path / "dept")
    again = DePT.from_pretrained(folder, backbone).eval()
    with torch.no_grad():
        assert torch.equal(method(batch).logits, again(batch).logits)
    assert (folder / "prompt.safetensors").stat().st_size < 4 * method.count() + 2000


def test_start_from_the_released_text():
    assert RELEASED_INIT_TEXT == "Classify this text is postive or not:"
    backbone, ids = build("t5"), (7, 9, 1)
    method = dept(backbone, init="text", init_ids=ids)
    table = backbone.get_input_embeddings().weight
    assert torch.equal(method.prompt.soft.weight, table[torch.tensor([7, 9, 1, 7])])


def test_training_that_does_not_say_which_tokens_are_targets_is_refused():
    """As under label smoothing of the Trainer, or TRL's losses: labels do not come to the model."""
    backbone = build("llama")
    method = dept(backbone)
    ids = torch.tensor([[3, 4, 5, 6]])
    with method.active():
        read = backbone(input_ids=ids).logits  # not in training: a source that is read
        backbone.train()
        with pytest.raises(InputError, match=r"nothing says which these are.*Pass `labels`.*source_tokens"):
            backbone(input_ids=ids)
        labelled = backbone(input_ids=ids, labels=ids.masked_fill(ids < 5, -100)).logits
        with source_tokens(torch.tensor([[1, 1, 0, 0]])):
            assert torch.equal(backbone(input_ids=ids).logits, labelled)
        with torch.no_grad():
            assert torch.equal(backbone(input_ids=ids).logits, read)
