"""Deep prompts in small random Llama-like, BERT-like and T5 towers, against the models' own forwards and plain loops."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaModel,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

from pt_core.errors import InputError
from pt_core.tokens import BlockPrompt, Tokens, drop, real
from pt_nlp.blocks import block_stack, deep_forward

WIDTH, LAYERS, LENGTH, VOCAB = 32, 3, 6, 61
DECODERS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8}),
}
ENCODERS = {"bert": (BertConfig, BertModel), "roberta": (RobertaConfig, RobertaModel)}
ATTENTION = ["sdpa", "eager"]


def decoder(family: str = "llama", attention: str = "sdpa", **changes) -> nn.Module:
    config, model, extra = DECODERS[family]
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS, "vocab_size": VOCAB}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    special = {"initializer_range": 0.15, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    return small(model, config(**(sizes | heads | special | extra | changes), attn_implementation=attention))


def encoder(family: str = "bert", attention: str = "sdpa", **changes) -> nn.Module:
    config, model = ENCODERS[family]
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS, "vocab_size": VOCAB}
    rest = {"num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.15}
    return small(model, config(**(sizes | rest | changes), attn_implementation=attention))


def t5(attention: str = "sdpa") -> nn.Module:
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": LAYERS, "vocab_size": VOCAB}
    # Few buckets and a short reach, so that a few tokens more or less land in other buckets.
    bias = {"relative_attention_num_buckets": 12, "relative_attention_max_distance": 12}
    special = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": None}
    model = small(T5ForConditionalGeneration, T5Config(**sizes, **bias, **special, attn_implementation=attention))
    for stack in (model.encoder, model.decoder):
        nn.init.normal_(stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight, std=2.0)
    return model


def small(cls: type, config) -> nn.Module:
    torch.manual_seed(0)
    return cls(config).eval().requires_grad_(False)


def tower(name: str, attention: str = "sdpa") -> tuple[nn.Module, dict]:
    """A base model and what its own forward needs besides the text."""
    if name in DECODERS:
        return decoder(name, attention).model, {}
    if name in ENCODERS:
        return encoder(name, attention), {}
    model, extra = t5(attention), {}
    if name == "t5-decoder":
        mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
        extra = {"encoder_hidden_states": torch.randn(2, 4, WIDTH), "encoder_attention_mask": mask}
    return (model.decoder if name == "t5-decoder" else model.encoder), extra


TOWERS = [*DECODERS, *ENCODERS, "t5-encoder", "t5-decoder"]
MASKS = {
    "none": None,
    "full": torch.ones(2, LENGTH, dtype=torch.long),
    "right": torch.tensor([[1] * LENGTH, [1, 1, 1, 1, 0, 0]]),
    "left": torch.tensor([[1] * LENGTH, [0, 0, 1, 1, 1, 1]]),
}


def text(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(5, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


def rows(count: int = 4, *, train: bool = False, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return (scale * torch.randn(count, WIDTH, generator=generator)).requires_grad_(train)


def worst(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


# Zero prompts.


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", TOWERS)
def test_zero_prompts_are_bit_identical_to_the_models_own_forward(name, mask, attention):
    model, extra = tower(name, attention)
    inputs = {"input_ids": text(), "attention_mask": MASKS[mask], "output_hidden_states": True} | extra
    own = model(**inputs)
    for prompts in ({}, {1: BlockPrompt(rows(0))}, {0: BlockPrompt(rows(0), at=2), 2: BlockPrompt(rows(0), at=1)}):
        ours = deep_forward(model, prompts, **inputs)
        assert type(ours) is type(own) and ours.keys() == own.keys()
        assert ours.last_hidden_state.equal(own.last_hidden_state)
        assert len(ours.hidden_states) == len(own.hidden_states) == LAYERS + 1
        assert all(a.equal(b) for a, b in zip(ours.hidden_states, own.hidden_states, strict=True))
        if name in ENCODERS:
            assert ours.pooler_output.equal(own.pooler_output)
    assert deep_forward(model, {}, **inputs, return_dict=False)[0].equal(own.last_hidden_state)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("mask", ["none", "left"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "t5-decoder"])
def test_zero_prompts_are_bit_identical_at_cached_steps(name, mask, attention):
    model, extra = tower(name, attention)
    ids, mask = text(), MASKS[mask]
    own = ours = None
    for start, end in ((0, 4), (4, 5), (5, 6)):
        step = {"input_ids": ids[:, start:end], "attention_mask": None if mask is None else mask[:, :end]} | extra
        own = model(**step, use_cache=True, past_key_values=None if own is None else own.past_key_values)
        cache = None if ours is None else ours.past_key_values
        ours = deep_forward(model, {1: BlockPrompt(rows(0))}, **step, use_cache=True, past_key_values=cache)
        assert ours.last_hidden_state.equal(own.last_hidden_state)
        assert ours.past_key_values.get_seq_length() == own.past_key_values.get_seq_length() == end


# Prompts at block 0 against prompt embeddings in front of the input; in the middle against loops written out.


@pytest.mark.parametrize(("mask", "attention"), [("none", "sdpa"), ("right", "sdpa"), ("right", "eager")])
@pytest.mark.parametrize("name", [*DECODERS, "t5-encoder", "t5-decoder"])
def test_prompts_at_block_0_equal_embeddings_in_front_of_the_input(name, mask, attention):
    model, extra = tower(name, attention)
    prompt, ids, mask = rows(), text(), MASKS[mask]
    embeds = torch.cat([prompt.expand(2, -1, -1), model.embed_tokens(ids)], 1)
    longer = None if mask is None else torch.cat([torch.ones(2, 4, dtype=torch.long), mask], 1)
    own = model(inputs_embeds=embeds, attention_mask=longer, **extra).last_hidden_state[:, 4:]
    ours = deep_forward(model, {0: BlockPrompt(prompt)}, input_ids=ids, attention_mask=mask, **extra)
    assert ours.last_hidden_state.equal(own)
    assert worst(own, model(input_ids=ids, attention_mask=mask, **extra).last_hidden_state) > 0.01


def causal_mask(slots: int) -> Tensor:
    return torch.full((slots, slots), torch.finfo(torch.float32).min).triu(1)[None, None]


def llama_loop(model: nn.Module, ids: Tensor, prompt: Tensor, layer: int, at: int) -> Tensor:
    hidden = model.embed_tokens(ids)
    for index, block in enumerate(model.layers):
        if index == layer:
            hidden = torch.cat([hidden[:, :at], prompt.expand(len(ids), -1, -1), hidden[:, at:]], 1)
        slots = hidden.shape[1]
        rotary = model.rotary_emb(hidden, torch.arange(slots)[None])
        hidden = block(hidden, attention_mask=causal_mask(slots), position_embeddings=rotary)
    return model.norm(torch.cat([hidden[:, :at], hidden[:, at + len(prompt) :]], 1))


def bert_loop(model: nn.Module, ids: Tensor, prompt: Tensor, layer: int, at: int) -> Tensor:
    hidden = model.embeddings(ids)
    for index, block in enumerate(model.encoder.layer):
        if index == layer:
            hidden = torch.cat([hidden[:, :at], prompt.expand(len(ids), -1, -1), hidden[:, at:]], 1)
        hidden = block(hidden)
    return torch.cat([hidden[:, :at], hidden[:, at + len(prompt) :]], 1)


def t5_loop(model: nn.Module, ids: Tensor, prompt: Tensor, layer: int, at: int) -> Tensor:
    hidden = model.embed_tokens(ids)
    first = model.block[0].layer[0].SelfAttention
    for index, block in enumerate(model.block):
        if index == layer:
            hidden = torch.cat([hidden[:, :at], prompt.expand(len(ids), -1, -1), hidden[:, at:]], 1)
        slots = hidden.shape[1]
        mask = causal_mask(slots) if model.is_decoder else None
        hidden = block(hidden, mask, first.compute_bias(slots, slots))[0]
    return model.final_layer_norm(torch.cat([hidden[:, :at], hidden[:, at + len(prompt) :]], 1))


LOOPS = dict.fromkeys(DECODERS, llama_loop) | dict.fromkeys(ENCODERS, bert_loop)
LOOPS |= {"t5-encoder": t5_loop, "t5-decoder": t5_loop}


@pytest.mark.parametrize(("layer", "at", "attention"), [(0, 2, "eager"), (1, 0, "sdpa"), (LAYERS - 1, LENGTH, "sdpa")])
@pytest.mark.parametrize("name", TOWERS)
def test_prompts_equal_a_loop_over_the_blocks_in_value_and_gradient(name, layer, at, attention):
    model, _ = tower(name, attention)
    ids, prompt = text(), rows(train=True)
    expected = LOOPS[name](model, ids, prompt, layer, at)
    (gradient,) = torch.autograd.grad(expected.square().sum(), prompt)
    ours = deep_forward(model, {layer: BlockPrompt(prompt, at=at)}, input_ids=ids).last_hidden_state
    ours.square().sum().backward()
    assert worst(ours, expected) < 1e-5
    assert worst(prompt.grad, gradient) < 1e-4 * max(1.0, gradient.abs().max().item())
    # Behind the last token of a causal model no real token attends to the prompt.
    unseen = at == LENGTH and (name in DECODERS or name == "t5-decoder")
    assert (gradient.abs().max() == 0) == unseen
    assert all(parameter.grad is None for parameter in model.parameters())


def test_bert_tokens_keep_their_position_embeddings_whatever_is_inserted():
    """Without attention between slots (value projection 0), prompts leave real tokens alone only if no position moved."""
    model = encoder()
    for layer in model.encoder.layer:
        layer.attention.self.value.weight.zero_()
    own = model(input_ids=text()).last_hidden_state
    ours = deep_forward(model, {0: BlockPrompt(rows(), at=1)}, input_ids=text()).last_hidden_state
    assert worst(ours, own) < 1e-5


@pytest.mark.parametrize("name", TOWERS)
def test_replaced_prompts_equal_fresh_rows_in_every_block(name):
    model, extra = tower(name)
    deep = torch.randn(LAYERS, 3, WIDTH)
    inputs = {"input_ids": text(), "attention_mask": MASKS["right"]} | extra
    renewed = {i: BlockPrompt(deep[i], mode="renew") for i in range(LAYERS)}
    replaced = {i: BlockPrompt(deep[i], mode="replace" if i else "insert") for i in range(LAYERS)}
    a = deep_forward(model, renewed, **inputs).last_hidden_state
    b = deep_forward(model, replaced, **inputs).last_hidden_state
    c = deep_forward(model, {0: BlockPrompt(deep[0])}, **inputs).last_hidden_state
    visible = MASKS["right"].bool()
    assert worst(a[visible], b[visible]) < 1e-5 and worst(b[visible], c[visible]) > 0.01


# Who sees what.


@pytest.mark.parametrize(("layer", "attention"), [(0, "sdpa"), (1, "eager")])
@pytest.mark.parametrize("name", TOWERS)
def test_invisible_prompts_change_nothing(name, layer, attention):
    model, extra = tower(name, attention)
    inputs = {"input_ids": text(), "attention_mask": MASKS["right"]} | extra
    own = model(**inputs).last_hidden_state
    for at in (0, 2):
        prompts = {layer: BlockPrompt(rows(scale=10), at=at, visible=False)}
        ours = deep_forward(model, prompts, **inputs).last_hidden_state
        assert ours.isfinite().all() and worst(ours[MASKS["right"].bool()], own[MASKS["right"].bool()]) < 1e-5


@pytest.mark.parametrize(("layer", "attention"), [(0, "sdpa"), (1, "eager"), (LAYERS - 1, "sdpa")])
@pytest.mark.parametrize("name", TOWERS)
def test_padding_side_and_batch_mates_do_not_change_a_row(name, layer, attention):
    model, extra = tower(name, attention)
    forward = partial(deep_forward, model, {layer: BlockPrompt(rows())})
    row = {key: value[1:] for key, value in extra.items()}
    ids, short = text(), text()[:1, :4]
    alone = forward(input_ids=short, **row).last_hidden_state[0]
    ids_right = torch.stack([ids[0], torch.cat([short[0], ids[1, :2]])])
    ids_left = torch.stack([ids[0], torch.cat([ids[1, :2], short[0]])])
    # BERT counts slots in its embedding, so there a left-padded batch must bring its positions. RoBERTa's start at 2.
    first = {"bert": 0, "roberta": 2}.get(name)
    left_positions = {} if first is None else {"position_ids": (MASKS["left"].cumsum(1) - 1).clamp(min=0) + first}
    right_positions = {} if first is None else {"position_ids": (torch.arange(LENGTH) + first).expand(2, -1)}
    right = forward(input_ids=ids_right, attention_mask=MASKS["right"], **right_positions, **extra).last_hidden_state
    left = forward(input_ids=ids_left, attention_mask=MASKS["left"], **left_positions, **extra).last_hidden_state
    assert worst(right[1, :4], alone) < 2e-5
    assert worst(left[1, 2:], alone) < 2e-5
    assert worst(left[0], right[0]) < 2e-5


@pytest.mark.parametrize("name", TOWERS)
def test_each_row_may_carry_its_own_prompt_of_its_own_length(name):
    model, extra = tower(name)
    own = torch.stack([rows(4), -rows(4)])
    visible = torch.tensor([[True] * 4, [False, False, True, True]])
    together = deep_forward(model, {1: BlockPrompt(own, visible=visible)}, input_ids=text(), **extra).last_hidden_state
    for i, prompt in enumerate((own[0], own[1, 2:])):
        row = {key: value[i : i + 1] for key, value in extra.items()}
        alone = deep_forward(model, {1: BlockPrompt(prompt)}, input_ids=text()[i : i + 1], **row).last_hidden_state
        assert worst(together[i], alone[0]) < 1e-5


@pytest.mark.parametrize("name", ["llama", "bert", "t5-encoder"])
def test_hidden_states_hold_real_tokens_only(name):
    model, _ = tower(name)
    prompts, inputs = {0: BlockPrompt(rows(), at=1), 2: BlockPrompt(rows(2))}, {"input_ids": text()}
    own = model(**inputs, output_hidden_states=True).hidden_states
    states = deep_forward(model, prompts, **inputs, output_hidden_states=True).hidden_states
    assert [tuple(state.shape) for state in states] == [(2, LENGTH, WIDTH)] * (LAYERS + 1)
    assert states[0].equal(own[0]) and worst(states[1], own[1]) > 0.01
    assert states[-1].equal(deep_forward(model, prompts, **inputs).last_hidden_state)


def test_heads_pool_real_tokens_only(monkeypatch):
    bert = small(BertForSequenceClassification, encoder().config)
    prompt, ids = rows(), text()
    expected = bert.classifier(bert.bert.pooler(bert_loop(bert.bert, ids, prompt, 1, 0)))
    monkeypatch.setattr(bert.bert, "forward", partial(deep_forward, bert.bert, {1: BlockPrompt(prompt)}))
    assert worst(bert(input_ids=ids).logits, expected) < 1e-5

    llama = small(LlamaForSequenceClassification, decoder().config)
    ids[1, 4:] = 0
    last = llama_loop(llama.model, ids[1:, :4], prompt, 1, 0)[:, -1]
    monkeypatch.setattr(llama.model, "forward", partial(deep_forward, llama.model, {1: BlockPrompt(prompt)}))
    assert worst(llama(input_ids=ids, attention_mask=(ids > 0).long()).logits[1:], llama.score(last)) < 1e-5


def test_a_half_precision_backbone_takes_float32_prompts_and_returns_float32_gradients():
    model, prompt = decoder().model.bfloat16(), rows(train=True)
    output = deep_forward(model, {1: BlockPrompt(prompt)}, input_ids=text()).last_hidden_state
    output.float().square().sum().backward()
    assert output.dtype == torch.bfloat16 and prompt.grad.dtype == torch.float32 and prompt.grad.abs().max() > 0


# Generation.

PROMPTS = {
    "first": {0: BlockPrompt(rows())},
    "middle": {1: BlockPrompt(rows())},
    "last": {LAYERS - 1: BlockPrompt(rows())},
    "inside": {1: BlockPrompt(rows(), at=3)},
    "first and last": {0: BlockPrompt(rows(2)), LAYERS - 1: BlockPrompt(rows(3), at=1)},
    "partly visible": {0: BlockPrompt(rows(4), visible=torch.tensor([[True] * 4, [False, True, False, True]]))},
    "replace": {0: BlockPrompt(rows(3)), 1: BlockPrompt(-rows(3), mode="replace")},
    "renew": {0: BlockPrompt(rows(4)), 1: BlockPrompt(rows(2), mode="renew"), 2: BlockPrompt(rows(0), mode="renew")},
}


def generate(model: nn.Module, use_cache: bool, distinct: bool = True, **inputs) -> tuple[Tensor, Tensor]:
    """[b, 8] greedy tokens, no token twice if `distinct`, and [8, b, VOCAB] logits of the steps. No near ties."""
    output = model.generate(
        **inputs,
        use_cache=use_cache,
        max_new_tokens=8,
        do_sample=False,
        suppress_tokens=[0],
        no_repeat_ngram_size=int(distinct),  # small random models repeat one token
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
    )
    first, second = torch.stack(output.scores).topk(2, dim=-1).values.unbind(-1)
    assert (first - second).min() > 1e-4
    return output.sequences[:, -8:], torch.stack(output.logits)


@pytest.mark.parametrize(("mask", "attention"), [("none", "eager"), ("left", "sdpa")])
@pytest.mark.parametrize("prompts", PROMPTS)
def test_cached_generation_equals_uncached(prompts, mask, attention, monkeypatch):
    model, inputs = decoder(attention=attention), {"input_ids": text(), "attention_mask": MASKS[mask]}
    plain, _ = generate(model, True, **inputs)
    monkeypatch.setattr(model.model, "forward", partial(deep_forward, model.model, PROMPTS[prompts]))
    cached, cached_logits = generate(model, True, **inputs)
    uncached, uncached_logits = generate(model, False, **inputs)
    assert worst(cached_logits, uncached_logits) < 1e-5
    assert cached.equal(uncached) and not cached.equal(plain)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_the_other_decoders_generate_too(family, monkeypatch):
    model, inputs = decoder(family), {"input_ids": text(), "attention_mask": MASKS["left"]}
    monkeypatch.setattr(model.model, "forward", partial(deep_forward, model.model, PROMPTS["first and last"]))
    cached, cached_logits = generate(model, True, **inputs)
    uncached, uncached_logits = generate(model, False, **inputs)
    assert worst(cached_logits, uncached_logits) < 1e-5 and cached.equal(uncached)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_left_padded_row_generates_what_it_generates_alone(layer, monkeypatch):
    model = decoder()
    monkeypatch.setattr(model.model, "forward", partial(deep_forward, model.model, {layer: BlockPrompt(rows())}))
    ids = text() * MASKS["left"]
    batch, batch_logits = generate(model, True, input_ids=ids, attention_mask=MASKS["left"])
    alone, alone_logits = generate(model, True, input_ids=text()[1:, 2:])
    assert batch[1:].equal(alone) and worst(batch_logits[:, 1:], alone_logits) < 1e-5


def test_upper_caches_are_longer_by_the_prompt():
    model = decoder().model
    output = deep_forward(model, {1: BlockPrompt(rows(4))}, input_ids=text(), use_cache=True)
    assert [output.past_key_values.get_seq_length(i) for i in range(LAYERS)] == [LENGTH, LENGTH + 4, LENGTH + 4]


@pytest.mark.parametrize("layer", [0, 1])
def test_beams_are_the_same_cached_and_uncached(layer, monkeypatch):
    model, inputs = decoder(), {"input_ids": text(), "attention_mask": MASKS["left"]}
    monkeypatch.setattr(model.model, "forward", partial(deep_forward, model.model, {layer: BlockPrompt(rows())}))
    beams = [
        model.generate(
            **inputs,
            use_cache=use_cache,
            num_beams=3,
            max_new_tokens=6,
            output_scores=True,
            return_dict_in_generate=True,
        )
        for use_cache in (True, False)
    ]
    assert beams[0].sequences.equal(beams[1].sequences)
    assert worst(beams[0].sequences_scores, beams[1].sequences_scores) < 1e-5


@pytest.mark.parametrize("layer", [0, 1])
def test_a_generation_continues_from_its_cache(layer, monkeypatch):
    model, ids = decoder(), text()
    monkeypatch.setattr(model.model, "forward", partial(deep_forward, model.model, {layer: BlockPrompt(rows())}))
    whole, logits = generate(model, True, distinct=False, input_ids=ids)
    cache = DynamicCache(config=model.config)
    model(input_ids=ids[:, :4], past_key_values=cache, use_cache=True)
    rest, rest_logits = generate(
        model, True, distinct=False, input_ids=ids[:, 4:], attention_mask=torch.ones_like(ids), past_key_values=cache
    )
    assert rest.equal(whole) and worst(logits, rest_logits) < 1e-5


@pytest.mark.parametrize("prompts", ["first", "middle", "last", "replace", "renew"])
def test_a_prompted_t5_generates_the_same_cached_and_uncached(prompts, monkeypatch):
    model, inputs = t5(), {"input_ids": text(), "attention_mask": MASKS["right"]}
    plain, _ = generate(model, True, **inputs)
    for stack in (model.encoder, model.decoder):
        monkeypatch.setattr(stack, "forward", partial(deep_forward, stack, PROMPTS[prompts]))
    cached, cached_logits = generate(model, True, **inputs)
    uncached, uncached_logits = generate(model, False, **inputs)
    assert worst(cached_logits, uncached_logits) < 1e-5
    assert cached.equal(uncached) and not cached.equal(plain)


def test_prompts_made_from_the_input_are_made_once_and_stay_in_the_cache():
    model, calls = decoder().model, []

    def instruction_mean(tokens: Tokens) -> Tensor:
        calls.append(1)
        weight = drop(tokens).mask[..., None].to(tokens.hidden)
        return (real(tokens) * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)

    prompts = {0: BlockPrompt(instruction_mean, length=1), 1: BlockPrompt(instruction_mean, mode="replace", length=1)}
    cache = deep_forward(model, prompts, input_ids=text()[:, :4], use_cache=True).past_key_values
    fixed = {0: BlockPrompt(model.embed_tokens(text()[:, :4]).mean(1, keepdim=True))}
    whole = deep_forward(model, fixed, input_ids=text()[:, :4], use_cache=True)
    assert worst(cache.layers[0].keys, whole.past_key_values.layers[0].keys) < 1e-5
    deep_forward(model, prompts, input_ids=text()[:, 4:], past_key_values=cache)
    assert len(calls) == 2 and cache.get_seq_length(2) == LENGTH + 1


# Training.


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "bert", "t5-encoder"])
def test_gradient_checkpointing_gives_the_same_values_and_gradients(name, reentrant):
    model, _ = tower(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.config.attention_probs_dropout_prob = 0.0
    for module in model.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    calls = []
    prompt, weight = rows(train=True), torch.randn(WIDTH, WIDTH, requires_grad=True)

    def conditioned(tokens: Tokens) -> Tensor:
        return real(tokens)[:, :1] @ weight

    prompts = {1: BlockPrompt(prompt), 2: BlockPrompt(conditioned, length=1)}

    def step() -> tuple[Tensor, tuple[Tensor, ...]]:
        hidden = deep_forward(model, prompts, input_ids=text(), attention_mask=MASKS["right"]).last_hidden_state
        return hidden, torch.autograd.grad((hidden.square() * MASKS["right"][..., None]).sum(), [prompt, weight])

    plain, expected = step()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    blocks = model.layers if name == "llama" else model.encoder.layer if name == "bert" else model.block
    blocks[2].register_forward_hook(lambda *_: calls.append("forward"))
    inner = next(module for module in blocks[2].modules() if isinstance(module, nn.Linear))
    inner.register_forward_hook(lambda *_: calls.append("run"))
    again, gradients = None, None
    if reentrant:  # torch.autograd.grad is refused there
        again = deep_forward(model, prompts, input_ids=text(), attention_mask=MASKS["right"]).last_hidden_state
        (again.square() * MASKS["right"][..., None]).sum().backward()
        gradients = (prompt.grad, weight.grad)
    else:
        again, gradients = step()
    assert calls.count("run") == 2
    assert again.equal(plain)
    assert all(a.equal(b) for a, b in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("name", ["llama", "bert", "t5-encoder"])
def test_autograd_saves_nothing_below_the_first_prompted_block(name):
    model, _ = tower(name)

    def saved(prompts: dict[int, BlockPrompt]) -> int:
        packed = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: packed.append(tensor) or tensor, lambda tensor: tensor
        ):
            deep_forward(model, prompts, input_ids=text(), use_cache=False)
        return len(packed)

    counts = [saved({layer: BlockPrompt(rows(train=True))}) for layer in range(LAYERS)]
    assert saved({}) == 0 and counts[0] > counts[1] > counts[2] > 0
    assert counts[0] - counts[1] == pytest.approx(counts[1] - counts[2], abs=1)  # one block's worth each


# Refusals.


def test_what_prompts_cannot_enter_exactly_is_refused_with_a_remedy(monkeypatch):
    llama, bert, seq2seq = decoder(), encoder(), t5()
    forward = partial(deep_forward, llama.model, {1: BlockPrompt(rows())})
    with pytest.raises(InputError, match=r"LlamaForCausalLM.*base model"):
        block_stack(llama)
    with pytest.raises(InputError, match=r"T5ForConditionalGeneration.*\.encoder"):
        block_stack(seq2seq)
    with pytest.raises(InputError, match="sliding window"):
        block_stack(decoder("mistral", sliding_window=4).model)
    with pytest.raises(InputError, match="no deep prompts for BertModel"):
        block_stack(encoder(is_decoder=True))
    with pytest.raises(InputError, match="exactly one"):
        forward()
    with pytest.raises(InputError, match="attention maps"):
        forward(input_ids=text(), output_attentions=True)
    with pytest.raises(InputError, match="cu_seq_lens_k"):
        forward(input_ids=text(), cu_seq_lens_k=torch.tensor([0, 6]))
    with pytest.raises(InputError, match="packed"):
        forward(input_ids=text(), position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), use_cache=False)
    with pytest.raises(InputError, match=r"attention mask is \[2, 1, 6, 6\]"):
        forward(input_ids=text(), attention_mask=torch.ones(2, 1, 6, 6))
    with pytest.raises(InputError, match="static cache"):
        forward(input_ids=text(), past_key_values=StaticCache(config=llama.config, max_cache_len=20))
    with pytest.raises(InputError, match="takes no position_ids"):
        deep_forward(seq2seq.encoder, {}, input_ids=text(), position_ids=torch.arange(LENGTH)[None])
    with pytest.raises(InputError, match=r"blocks \[3\]"):
        deep_forward(bert, {3: BlockPrompt(rows())}, input_ids=text())
    monkeypatch.setattr(llama.config, "_attn_implementation", "flash_attention_2")
    with pytest.raises(InputError, match="set_attn_implementation"):
        forward(input_ids=text())


def test_a_cache_that_other_prompts_filled_is_refused():
    model = decoder().model
    cache = deep_forward(model, {1: BlockPrompt(rows(4))}, input_ids=text(), use_cache=True).past_key_values
    for other in ({}, {1: BlockPrompt(rows(3))}, {2: BlockPrompt(rows(4))}):
        with pytest.raises(InputError, match="prompts that the cache was filled with"):
            deep_forward(model, other, input_ids=text()[:, :1], past_key_values=cache)
