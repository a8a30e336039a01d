"""Prefix tuning on small random models: the properties of its card, against attention worked by hand and the plain cache."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from pt_core.errors import InputError
from pt_nlp.methods.prefix_tuning import PrefixTuning, PrefixTuningConfig, flatten

VOCAB, WIDTH, LENGTH = 61, 32, 5


def small(model: type, config) -> nn.Module:
    torch.manual_seed(0)
    return model(config).eval().requires_grad_(False)


def llama(layers: int = 2, kv_heads: int = 2, width: int = WIDTH) -> nn.Module:
    sizes = {"hidden_size": width, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 4}
    special = {"initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    return small(LlamaForCausalLM, LlamaConfig(vocab_size=VOCAB, num_key_value_heads=kv_heads, **sizes, **special))


def gpt2() -> nn.Module:
    sizes = {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return small(GPT2LMHeadModel, GPT2Config(vocab_size=VOCAB, initializer_range=0.3, **sizes))


def bert(layers: int = 2) -> nn.Module:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 4}
    return small(BertModel, BertConfig(vocab_size=VOCAB, initializer_range=0.3, **sizes))


def t5() -> nn.Module:
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    special = {"decoder_start_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    return small(T5ForConditionalGeneration, T5Config(vocab_size=VOCAB, **sizes, **special))


def ragged(padding: str = "right") -> dict[str, Tensor]:
    """The same three texts of 9, 6 and 4 tokens, padded on one side."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(1, VOCAB, (k,), generator=generator) for k in (9, 6, 4)]
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if padding == "right" else slice(9 - len(row), 9)
        ids[i, place], mask[i, place] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def prefix(backbone: nn.Module, **settings) -> PrefixTuning:
    """From a random start unless told: rows of the default one are alike."""
    return PrefixTuning(backbone, PrefixTuningConfig(**{"prompt_length": LENGTH, "init": "random"} | settings))


# --- 1. counts --------------------------------------------------------------------------------------------------------
def test_count_is_2_n_l_d_and_with_a_projection_that_of_its_network() -> None:
    backbone = llama(layers=3, kv_heads=4, width=16)
    assert prefix(backbone).count() == 480
    assert prefix(backbone, projection_dim=8).count() == 5 * 16 + (16 * 8 + 8) + 2 * 3 * 16 * (8 + 1) == 1080


def test_grouped_query_attention_narrows_the_prefix_to_the_key_value_heads() -> None:
    method = prefix(llama(layers=3, kv_heads=2))
    assert tuple(method.prompt.weight.shape) == (3, 2, 2, LENGTH, 8)
    assert method.count() == 2 * 3 * LENGTH * 16


def test_llama_3_2_3b_with_200_rows_trains_11_468_800_values() -> None:
    sizes = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24}
    with torch.device("meta"):
        backbone = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=8, head_dim=128, vocab_size=128256))
    method = PrefixTuning(backbone, PrefixTuningConfig(prompt_length=200, init="zero"))
    assert method.count() == 2 * 28 * 200 * 1024 == 11_468_800


# --- 2. the start -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("settings", [{}, {"init": "zero"}, {"init": "zero", "projection_dim": 8}])
def test_no_start_is_the_identity(settings: dict) -> None:
    method, batch = prefix(llama(), **settings), ragged()
    with method.active():
        prompted = method.backbone(**batch).logits[0]
    assert (prompted - method.backbone(**batch).logits[0]).abs().max() > 1e-2


@pytest.mark.parametrize("settings", [{}, {"projection_dim": 8}])
def test_zero_start_shrinks_values_by_n_over_n_plus_l_where_all_scores_are_zero(settings: dict) -> None:
    """Scores of zero keys are 0; with queries of 0 so are all others, and softmax gives n of n + l parts to real tokens."""
    backbone = bert(layers=1)
    attention = backbone.encoder.layer[0].attention.self
    with torch.no_grad():
        for parameter in (attention.query.weight, attention.query.bias, backbone.embeddings.position_embeddings.weight):
            parameter.zero_()
    seen: list[Tensor] = []
    attention.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    method = prefix(backbone, init="zero", **settings)
    ids = ragged()["input_ids"][:1]
    backbone(input_ids=ids)
    with method.active():
        backbone(input_ids=ids)
    torch.testing.assert_close(seen[1], seen[0] * 9 / (9 + LENGTH), atol=1e-6, rtol=1e-5)


def test_the_default_start_and_rate_are_the_better_ones_of_pefts_comparison() -> None:
    config = PrefixTuningConfig()
    assert (config.init, config.lr) == ("zero", 5e-3)
    assert not PrefixTuning(llama(), config).prompt.weight.any()
    assert not PrefixTuning(llama(), PrefixTuningConfig(projection_dim=8)).prompt.key_values().any()


def test_rows_of_a_zero_start_stay_equal_unless_dropout_tells_them_apart() -> None:
    for dropout in (0.0, 0.5):
        method = prefix(llama(), init="zero", dropout=dropout).train()
        batch = ragged()
        with method.active():
            method.backbone(**batch).logits.square().mean().backward()
        gradient = method.prompt.weight.grad
        assert gradient.abs().max() > 0
        apart = (gradient - gradient[:, :, :, :1]).abs().max() > 1e-3 * gradient.abs().max()
        assert bool(apart) == (dropout > 0)


def test_rows_of_a_zero_start_come_apart_where_attention_adds_a_bias_by_distance(tiny) -> None:
    for kind, apart in (("T5", True), ("Mpt", True), ("Bart", False), ("GPTNeoX", False)):
        method = prefix(tiny(kind), init="zero").train()
        targets = torch.tensor([[7, 8, 9]])
        batch = {"input_ids": torch.tensor([[5, 6, 7, 8, 9]]), "attention_mask": torch.ones(1, 5, dtype=torch.long)}
        if not method.backbone.config.is_encoder_decoder:
            targets = torch.tensor([[-100, -100, 7, 8, 9]])
        method.loss(batch | {"target_ids": targets}).total.backward()
        gradient = method.prompt.weight.grad
        assert gradient.abs().max() > 0
        largest = (gradient - gradient[:, :, :, :1]).abs().max() / gradient.abs().max()
        assert largest > 0.05 if apart else largest < 1e-4


def test_random_start_is_normal_with_its_own_seed() -> None:
    backbone = llama(layers=3, kv_heads=4)
    first, again, other = (prefix(backbone, seed=s).prompt.weight.detach() for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert abs(float(first.std()) - 1) < 0.1
    assert abs(float(prefix(backbone, init_std=0.02).prompt.weight.detach().std()) - 0.02) < 0.002


def test_a_projection_starts_from_normal_embeddings_and_makes_the_prefix_by_a_tanh_between_two_layers() -> None:
    backbone = llama(layers=3, kv_heads=4)
    made = prefix(backbone, projection_dim=8, prompt_length=200).prompt
    embeddings = made.embedding.detach()
    assert embeddings.shape == (200, WIDTH)
    assert abs(float(embeddings.std()) - 1) < 0.05 and abs(float(embeddings.mean())) < 0.05
    smaller = prefix(backbone, projection_dim=8, prompt_length=200, init_std=0.02).prompt.embedding.detach()
    assert abs(float(smaller.std()) - 0.02) < 0.001
    first, last = (layer for layer in made.projection if isinstance(layer, nn.Linear))
    flat = torch.tanh(embeddings @ first.weight.T + first.bias) @ last.weight.T + last.bias
    torch.testing.assert_close(flatten(made.key_values()), flat, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_prefix_from_the_cache_of_a_text_is_that_text_in_front_of_every_input(make, padding: str) -> None:
    backbone, instruction, batch = make(), (7, 3, 11, 2, 5, 9), ragged(padding)
    method = prefix(backbone, init="text", init_ids=instruction)
    with method.active():
        ours = backbone(**batch).logits
    for i, (row, real) in enumerate(zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)):
        written = torch.cat([torch.tensor(instruction[:LENGTH]), row[real]])
        logits = backbone(input_ids=written[None]).logits[0, LENGTH:]
        torch.testing.assert_close(ours[i, real], logits, atol=1e-5, rtol=1e-5)


def test_a_text_that_would_not_be_used_is_refused() -> None:
    for init in ("zero", "random"):
        with pytest.raises(ValueError, match=f"init_text would not be used: init is {init}, not text"):
            PrefixTuningConfig(init=init, init_text="Classify:")
    assert PrefixTuningConfig(init="text", init_text="Classify:").init_text


def test_a_text_start_that_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match=r"'init_ids': the text has 2 tokens, the prefix 5.*prompt_length to 2"):
        prefix(llama(), init="text", init_ids=(3, 4))
    with pytest.raises(InputError, match=r"'init_ids'.*outside of 0..60"):
        prefix(llama(), init="text", init_ids=(3, 4, 5, 6, VOCAB))
    for backbone in (bert(), t5()):
        with pytest.raises(InputError, match="only causal language models keep keys and values"):
            prefix(backbone, init="text", init_ids=(3, 4, 5, 6, 7))
    with pytest.raises(InputError, match="a projection cannot start from a text"):
        prefix(llama(), init="text", init_ids=(3, 4, 5, 6, 7), projection_dim=8)


# --- 7. what a prefix changes -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("make", [llama, bert])
def test_prefix_at_layer_j_does_not_change_layers_below_j(make) -> None:
    backbone, batch = make(layers=3), ragged()
    method = prefix(backbone)

    def states() -> tuple[Tensor, ...]:
        with method.active():
            return backbone(**batch, output_hidden_states=True).hidden_states

    before = states()
    with torch.no_grad():
        method.prompt.weight[1].add_(1)
    after = states()
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])  # the output of layer 0
    assert (before[2] - after[2])[batch["attention_mask"].bool()].abs().max() > 1e-2


def test_one_layer_is_plain_attention_with_l_rows_before_keys_and_values() -> None:
    """Worked by hand for one BERT layer: softmax(Q [PK; K]^T / sqrt(d_h)) [PV; V], real tokens at positions l, l+1, ..."""
    backbone = bert(layers=1)
    method = prefix(backbone)
    ids = ragged()["input_ids"][:1]
    with method.active():
        ours = backbone(input_ids=ids).last_hidden_state
    table, block = backbone.embeddings, backbone.encoder.layer[0]
    words, positions = table.word_embeddings(ids), table.position_embeddings(torch.arange(LENGTH, LENGTH + 9))
    x = table.LayerNorm(words + positions + table.token_type_embeddings.weight[0])
    attention = block.attention.self
    q, k, v = (layer(x).view(9, 4, 8) for layer in (attention.query, attention.key, attention.value))
    context = []
    for head in range(4):
        keys = torch.cat([method.prompt.weight[0, 0, head], k[:, head]])
        values = torch.cat([method.prompt.weight[0, 1, head], v[:, head]])
        scores = q[:, head] @ keys.T / math.sqrt(8)
        context.append(scores.softmax(-1) @ values)
    mixed = block.attention.output(torch.cat(context, dim=-1)[None], x)
    expected = block.output(block.intermediate(mixed), mixed)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


# --- 10. padding ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("make", [llama, gpt2, bert])
def test_left_and_right_padding_give_equal_states_of_real_tokens(make) -> None:
    backbone = make()
    method = prefix(backbone)
    found = []
    for padding in ("right", "left"):
        batch = ragged(padding)
        if make is bert:  # encoders count padding unless they are told the positions
            batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        with method.active():
            found.append(backbone(**batch)[0][batch["attention_mask"].bool()])
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)


def test_positions_of_an_encoder_go_on_behind_the_prefix_whether_given_or_not() -> None:
    method, batch = prefix(bert()), ragged()
    table, real = method.backbone.embeddings.position_embeddings.weight, batch["attention_mask"].bool()

    def states(**given: Tensor) -> Tensor:
        with method.active():
            return method.backbone(**batch, **given).last_hidden_state[real]

    plain, given = states(), {"position_ids": torch.arange(9)[None]}
    torch.testing.assert_close(plain, states(**given), atol=1e-6, rtol=0)
    read = range(LENGTH, LENGTH + 9)  # by the nine tokens of the longest text
    with torch.no_grad():
        for row in range(LENGTH + 12):
            table[row, 0] += 2.0
            for found in (states(), states(**given)):
                assert bool((found - plain).abs().max() > 1e-2) == (row in read), row
            table[row, 0] -= 2.0


# --- fast == plain ----------------------------------------------------------------------------------------------------
def plain_logits(method: PrefixTuning, batch: dict[str, Tensor]) -> Tensor:
    """The backbone's own forward with a cache, mask and positions that are written out row by row."""
    b, mask = len(batch["input_ids"]), batch["attention_mask"]
    cache = DynamicCache()
    for i, (keys, values) in enumerate(method.prompt.key_values()):
        cache.update(keys.repeat(b, 1, 1, 1), values.repeat(b, 1, 1, 1), i)
    return method.backbone(
        input_ids=batch["input_ids"],
        attention_mask=torch.cat([torch.ones(b, LENGTH, dtype=torch.long), mask], dim=1),
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0) + LENGTH,
        past_key_values=cache,
    ).logits


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("hidden", [None, 8])
def test_fast_equals_plain_in_loss_and_prompt_gradient(kv_heads: int, padding: str, hidden: int | None) -> None:
    method, batch = prefix(llama(kv_heads=kv_heads).double(), projection_dim=hidden).double(), ragged(padding)
    targets = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    fast = method.loss(batch | {"target_ids": targets})
    parameters = [p for _, p in method.trainable()]
    gradients = torch.autograd.grad(fast.total, parameters)
    wanted = (targets[:, 1:] != -100) & (targets[:, :-1] != -100)  # padding predicts nothing
    assert int(fast.count) == int(wanted.sum()) == 9 - 1 + 6 - 1 + 4 - 1
    logits = plain_logits(method, batch)[:, :-1][wanted]
    plain = nn.functional.cross_entropy(logits.float(), targets[:, 1:][wanted], reduction="sum")
    torch.testing.assert_close(fast.total, plain, atol=1e-5, rtol=1e-5)
    for ours, expected in zip(gradients, torch.autograd.grad(plain, parameters), strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("make", [llama, t5])
def test_generation_with_a_cache_equals_choosing_token_by_token(make) -> None:
    method = prefix(make(), init_std=2.0)
    batch = {k: v[:, :4] for k, v in ragged().items()}
    generated = method.generate(batch, max_new_tokens=5, do_sample=False)
    written = torch.zeros(3, 1, dtype=torch.long) if make is t5 else batch["input_ids"]
    with torch.no_grad(), method.active():
        for _ in range(5):
            if make is t5:
                logits = method.backbone(**batch, decoder_input_ids=written, use_cache=False).logits
            else:
                logits = method.backbone(input_ids=written, use_cache=False).logits
            written = torch.cat([written, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, written)


# --- projection, dropout, encoder-decoders ----------------------------------------------------------------------------
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_folding_keeps_outputs_and_leaves_keys_and_values_only(dropout: float) -> None:
    method = prefix(llama(), projection_dim=8, num_labels=2, dropout=dropout)
    plain, batch = method.folded(), ragged()
    assert sorted(plain.trained_state()) == ["head.bias", "head.weight", "prompt.weight"]
    assert plain.count() == 2 * 2 * LENGTH * 16 + 2 * WIDTH + 2
    assert method.training and plain.training
    method.eval(), plain.eval()
    torch.testing.assert_close(plain(batch).logits, method(batch).logits, atol=1e-6, rtol=1e-6)


def test_zero_start_of_a_projection_still_learns() -> None:
    method = prefix(llama(), projection_dim=8, init="zero")
    assert int(method.prompt.key_values().count_nonzero()) == 0
    batch = ragged()
    method.loss(batch | {"target_ids": batch["input_ids"]}).total.backward()
    assert float(method.prompt.projection[2].weight.grad.abs().max()) > 1e-4


def test_the_network_runs_once_in_a_step() -> None:
    for backbone in (llama(), bert(), t5()):
        settings = {"num_labels": 2} if isinstance(backbone, BertModel) else {}
        method, batch, runs = prefix(backbone, projection_dim=8, **settings), ragged(), []
        method.prompt.projection.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        method.loss(batch | ({"labels": torch.tensor([0, 1, 1])} if settings else {"target_ids": batch["input_ids"]}))
        assert len(runs) == 1


def test_a_projection_makes_float32_under_autocast() -> None:
    prompt = prefix(llama(), projection_dim=8).prompt
    with torch.autocast("cpu", torch.bfloat16):
        made = prompt.key_values()
    assert torch.equal(made, prompt.key_values()) and made.dtype == torch.float32


def test_dropout_acts_while_training_only() -> None:
    method = prefix(llama(), dropout=0.5)
    weight = method.prompt.weight
    dropped = method.train().prompt.key_values()
    share = float((dropped == 0).float().mean())
    assert 0.4 < share < 0.6
    assert torch.equal(dropped[dropped != 0], 2 * weight[dropped != 0])  # kept values are scaled by 1 / (1 - 0.5)
    assert torch.equal(method.eval().prompt.key_values(), weight)


def test_a_t5_prefix_enters_the_decoder_and_every_layer_learns() -> None:
    method, batch = prefix(t5()), ragged()
    encoder = method.backbone.get_encoder()
    with method.active():
        inside = encoder(**batch).last_hidden_state
    assert torch.equal(inside, encoder(**batch).last_hidden_state)
    method.loss(batch | {"target_ids": batch["input_ids"][:, :4]}).total.backward()
    assert [float(layer.abs().max()) > 1e-4 for layer in method.prompt.weight.grad] == [True, True]


def test_a_head_on_an_encoder_decoder_is_refused_because_it_cannot_see_the_prefix() -> None:
    with pytest.raises(InputError, match=r"'num_labels': prefix-tuning acts in the decoder"):
        prefix(t5(), num_labels=2)
