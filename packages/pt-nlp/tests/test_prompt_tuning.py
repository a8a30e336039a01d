"""Prompt tuning on small random models: the properties of its card, its starts, the shared prefix against the plain path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from pt_core.errors import InputError
from pt_nlp import models
from pt_nlp.methods.dept import DePTConfig
from pt_nlp.methods.prompt_tuning import PromptTuning, PromptTuningConfig, sampled_rows

VOCAB, WIDTH, LENGTH = 61, 32, 5
TEXT = (7, 3, 11, 2, 5)


def small(model: type, config) -> nn.Module:
    torch.manual_seed(0)
    return model(config).eval().requires_grad_(False)


def llama(kv_heads: int = 2) -> nn.Module:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    return small(LlamaForCausalLM, LlamaConfig(vocab_size=VOCAB, num_key_value_heads=kv_heads, **sizes, **special))


def gpt2() -> nn.Module:
    sizes = {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return small(GPT2LMHeadModel, GPT2Config(vocab_size=VOCAB, initializer_range=0.3, **sizes))


def bert() -> nn.Module:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return small(BertModel, BertConfig(vocab_size=VOCAB, initializer_range=0.3, **sizes))


def t5() -> nn.Module:
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return small(T5ForConditionalGeneration, T5Config(vocab_size=VOCAB, decoder_start_token_id=0, **sizes))


def gemma() -> nn.Module:
    """Its embeddings are multiplied by sqrt(d) where they are read."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    heads = {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "initializer_range": 0.3}
    return small(Gemma3ForCausalLM, Gemma3TextConfig(vocab_size=VOCAB, **sizes, **heads))


def ragged(padding: str = "right") -> dict[str, Tensor]:
    """The same three texts of 9, 6 and 4 tokens, padded on one side."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(1, VOCAB, (k,), generator=generator) for k in (9, 6, 4)]
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if padding == "right" else slice(9 - len(row), 9)
        ids[i, place], mask[i, place] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def prompt(backbone: nn.Module, **settings) -> PromptTuning:
    return PromptTuning(backbone, PromptTuningConfig(prompt_length=LENGTH, **settings))


# --- 1. counts --------------------------------------------------------------------------------------------------------
def test_count_is_l_d_for_one_set_of_rows() -> None:
    for backbone in (llama(), bert(), t5()):
        assert prompt(backbone).count() == LENGTH * WIDTH
    assert prompt(bert(), num_labels=3).count() == LENGTH * WIDTH + 3 * WIDTH + 3


def test_t5_base_with_100_rows_trains_76_800_values() -> None:
    with torch.device("meta"):
        backbone = T5ForConditionalGeneration(T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12))
    assert PromptTuning(backbone, PromptTuningConfig(prompt_length=100, init="random")).count() == 76_800


# --- 2. the start is not the identity ---------------------------------------------------------------------------------
@pytest.mark.parametrize("make", [llama, gpt2, bert])
def test_the_start_is_not_the_identity(make) -> None:
    method, batch = prompt(make()), ragged()
    with method.active():
        prompted = method.backbone(**batch)[0][0]
    assert (prompted - method.backbone(**batch)[0][0]).abs().max() > 1e-2


# --- 5. rows of a text ------------------------------------------------------------------------------------------------
def written_out(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The text as hard tokens before every row."""
    ids = torch.cat([torch.tensor(TEXT).expand(3, -1), batch["input_ids"]], dim=1)
    return {"input_ids": ids, "attention_mask": torch.cat([torch.ones(3, LENGTH).long(), batch["attention_mask"]], 1)}


@pytest.mark.parametrize("make", [llama, gpt2, bert, t5, gemma])
def test_rows_of_a_text_equal_that_text_as_hard_tokens_exactly(make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "SHARED_PREFIX", set())  # the plain path runs the very same sums
    backbone, batch = make(), ragged()
    method = prompt(backbone, init="text", init_ids=TEXT)
    extra = {"decoder_input_ids": batch["input_ids"][:, :4]} if make is t5 else {}
    with method.active():
        ours = backbone(**batch, **extra)[0]
    hard = backbone(**written_out(batch), **extra)[0]
    if make is t5:
        assert torch.equal(ours, hard)
    else:
        real = batch["attention_mask"].bool()
        assert torch.equal(ours[real], hard[:, LENGTH:][real])


@pytest.mark.parametrize("make", [llama, gpt2])
def test_rows_of_a_text_equal_that_text_with_the_shared_prefix(make) -> None:
    backbone, batch = make(), ragged()
    method = prompt(backbone, init="text", init_ids=TEXT)
    with method.active():
        ours = backbone(**batch).logits
    real = batch["attention_mask"].bool()
    hard = backbone(**written_out(batch)).logits[:, LENGTH:]
    torch.testing.assert_close(ours[real], hard[real], atol=1e-5, rtol=1e-5)


# --- 10. padding ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("make", [llama, gpt2, bert])
def test_left_and_right_padding_give_equal_states_of_real_tokens(make) -> None:
    method, found = prompt(make()), []
    for padding in ("right", "left"):
        batch = ragged(padding)
        if make is bert:  # encoders count padding unless they are told the positions
            batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        with method.active():
            found.append(method.backbone(**batch)[0][batch["attention_mask"].bool()])
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)


# --- fast == plain ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])  # one row; two passes
@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("reading", ["tokens", "head"])
def test_shared_prefix_equals_plain_path_in_loss_and_prompt_gradient(
    kv_heads: int, padding: str, reading: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = prompt(llama(kv_heads).double(), num_labels=3 if reading == "head" else None).double()
    method.backbone.model.set_attn_implementation(attention)
    batch = ragged(padding)
    batch["labels"] = torch.tensor([0, 2, 1])
    if reading == "tokens":
        batch["target_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    assert models.shortcut_refused(method.backbone.model) is None
    fast = method.loss(batch).value
    (gradient,) = torch.autograd.grad(fast, [method.prompt.weight])
    monkeypatch.setattr(models, "SHARED_PREFIX", models.SHARED_PREFIX - {"llama"})
    assert models.shortcut_refused(method.backbone.model) is not None
    plain = method.loss(batch).value
    (expected,) = torch.autograd.grad(plain, [method.prompt.weight])
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(fast, plain, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)


# --- starts -----------------------------------------------------------------------------------------------------------
def test_vocabulary_start_takes_embedding_rows_of_the_first_ids_only() -> None:
    backbone = llama()
    table = backbone.get_input_embeddings().weight
    rows = PromptTuning(backbone, PromptTuningConfig(prompt_length=50, vocabulary_top=3)).prompt.weight.detach()
    ids = torch.cdist(rows, table).argmin(1)
    assert torch.equal(rows, table[ids])
    assert set(ids.tolist()) == {0, 1, 2}
    everywhere = PromptTuning(backbone, PromptTuningConfig(prompt_length=50)).prompt.weight.detach()
    assert int(torch.cdist(everywhere, table).argmin(1).max()) > 40


def test_vocabulary_start_takes_no_row_twice_unless_there_are_too_few() -> None:
    tower = llama().model
    for length, top, found in ((VOCAB, None, VOCAB), (12, 12, 12), (12, 20, 12), (13, 12, None)):
        rows = sampled_rows(tower, length, torch.Generator().manual_seed(1), top)
        distinct = len(torch.unique(rows, dim=0))
        assert len(rows) == length
        assert distinct == found if found else 1 < distinct < 12  # drawn with replacement, as every one of them
    first, again, other = (sampled_rows(tower, 5, torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_every_start_from_tokens_takes_them_as_the_backbone_reads_them() -> None:
    """Gemma reads sqrt(d) times the rows of its table."""
    backbone = gemma()
    read = backbone.get_input_embeddings().weight * WIDTH**0.5
    sampled = prompt(backbone).prompt.weight
    assert torch.cdist(sampled, read).min(1).values.max() < 1e-3
    labels = prompt(backbone, init="labels", label_ids=((4, 9), (20,))).prompt.weight
    torch.testing.assert_close(labels[0], (read[4] + read[9]) / 2)
    torch.testing.assert_close(labels[1], read[20])
    assert torch.cdist(labels[2:], read).min(1).values.max() < 1e-3


def test_text_start_tiles_and_cuts() -> None:
    backbone = llama()
    rows = prompt(backbone, init="text", init_ids=(4, 9)).prompt.weight
    assert torch.equal(rows, backbone.get_input_embeddings().weight[[4, 9, 4, 9, 4]])


def test_label_start_is_the_mean_of_each_labels_pieces_then_sampled_rows() -> None:
    backbone = llama()
    table = backbone.get_input_embeddings().weight
    rows = prompt(backbone, init="labels", label_ids=((4, 9, 12), (20,)), vocabulary_top=2).prompt.weight.detach()
    torch.testing.assert_close(rows[0], (table[4] + table[9] + table[12]) / 3)
    assert torch.equal(rows[1], table[20])
    assert all(torch.equal(row, table[0]) or torch.equal(row, table[1]) for row in rows[2:])
    many = prompt(backbone, init="labels", label_ids=tuple((i,) for i in range(8))).prompt.weight
    assert torch.equal(many, table[:LENGTH])


def test_uniform_and_random_starts_have_their_spread_and_their_seed() -> None:
    backbone = llama()

    def start(**settings) -> Tensor:
        return PromptTuning(backbone, PromptTuningConfig(prompt_length=200, **settings)).prompt.weight.detach()

    uniform = start(init="uniform", uniform_scale=0.5)
    assert 0.49 < float(uniform.abs().max()) <= 0.5
    assert torch.equal(start(init="uniform"), uniform)  # the default scale
    assert abs(float(uniform.mean())) < 0.02
    assert abs(float(start(init="random").std()) - 1) < 0.05
    assert torch.equal(start(init="random", seed=1), start(init="random", seed=1))
    assert not torch.equal(start(init="random", seed=1), start(init="random", seed=2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init": "text"}, r"'init_ids'.*no ids"),
        ({"init": "text", "init_ids": (3, VOCAB)}, r"'init_ids'.*outside of 0..60.*own tokenizer"),
        ({"init": "labels"}, r"'label_ids': there are no labels"),
        ({"init": "labels", "label_ids": ((3,), ())}, r"'label_ids'.*no ids"),
    ],
)
def test_a_start_that_cannot_be_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prompt(llama(), **settings)


@pytest.mark.parametrize("config", [PromptTuningConfig, DePTConfig])
def test_a_text_that_would_not_be_used_is_refused(config: type[PromptTuningConfig]) -> None:
    with pytest.raises(ValueError, match="init_text would not be used: init is vocabulary, not text"):
        config(init_text="Classify:")
    assert config(init="text", init_text="Classify:").init_text == "Classify:"
    assert config.model_validate(config().model_dump()) == config()  # as a saved prompt is opened
