"""Prompts in Hugging Face backbones: what the model keeps, the exact shortcut against the plain path, refusals, errors."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, EsmConfig, EsmModel, FSMTConfig, FSMTForConditionalGeneration, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pt_core.attachment import Handle, attach, off, route
from pt_core.errors import InputError
from pt_core.prompts import DeepPrompt, KeyValuePrompt, Prompt, SoftPrompt
from pt_core.testing import watch
from pt_nlp import carried, causal, models, one_row
from pt_nlp.methods.prompt_tuning import PromptTuning, PromptTuningConfig

VOCAB, WIDTH, M = 48, 16, 5
SHARED = {
    "Llama": "llama",
    "Qwen2": "qwen2",
    "Qwen3": "qwen3",
    "Mistral": "mistral",
    "GPT2": "gpt2",
    "GPTNeoX": "gpt_neox",
}
BACKBONES = [*SHARED, "OPT", "Bert", "Roberta", "T5"]
DEEP = ["Llama", "Mistral", "Qwen2", "Qwen3", "Bert", "Roberta"]  # whose towers prompts enter inside
LEAVE_OUT_PADDING = ("Roberta", "XLMRoberta", "Camembert", "Data2VecText")  # their positions start behind its index, 1
Build = Callable[..., nn.Module]


def soft(seed: int = 1, length: int = M, width: int = WIDTH) -> SoftPrompt:
    return SoftPrompt(length, width, std=0.5, generator=torch.Generator().manual_seed(seed))


def keys(model: nn.Module, seed: int = 2, length: int = M) -> KeyValuePrompt:
    shape = models.shape_of(model)
    generator = torch.Generator().manual_seed(seed)
    return KeyValuePrompt(shape.layers, shape.kv_heads, shape.head_dim, length, std=0.5, generator=generator)


def deep(block: int = 1) -> DeepPrompt:
    return DeepPrompt([block], M, WIDTH, std=0.5, generator=torch.Generator().manual_seed(4))


def texts(side: str = "right", rows: int = 3, n: int = 9) -> dict[str, Tensor]:
    """Token ids of rows of n, n - 3 and n - 5 tokens, padded with 0 on one side."""
    ids = torch.randint(3, VOCAB, (rows, n), generator=torch.Generator().manual_seed(7))
    lengths = torch.tensor([n, n - 3, n - 5, n - 1][:rows])
    mask = (torch.arange(n)[None] < lengths[:, None]).long()
    mask = mask.flip(1) if side == "left" else mask
    return {"input_ids": ids * mask, "attention_mask": mask}


def labels_of(batch: dict[str, Tensor]) -> Tensor:
    """Every token but the first is to be predicted (under padding on the left, padding would have to predict that)."""
    return batch["input_ids"].masked_fill(batch["attention_mask"].cumsum(1) * batch["attention_mask"] < 2, -100)


def gap(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape, f"{tuple(a.shape)} is not {tuple(b.shape)}"
    return float((a.detach().float() - b.detach().float()).abs().max())


def outputs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Logits of a language model, hidden states of an encoder."""
    if model.config.is_encoder_decoder:
        batch = batch | {"decoder_input_ids": batch["input_ids"][:, :4]}
    result = model(**batch)
    found: Tensor = result.logits if "logits" in result else result.last_hidden_state
    return found


def plain_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "SHARED_PREFIX", set())


def concatenated(model: nn.Module, prompt: Tensor, batch: dict[str, Tensor], **options) -> Tensor:
    """Logits of the text behind the prompt, by hand: one sequence of embeddings, positions written out."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    embeds = torch.cat([prompt.to(model.dtype).expand(len(ids), -1, -1), model.get_input_embeddings()(ids)], dim=1)
    whole = torch.cat([mask.new_ones(len(ids), len(prompt)), mask], dim=1)
    if "position_ids" in inspect.signature(model.base_model.forward).parameters:
        options["position_ids"] = (whole.cumsum(1) - 1).clamp(min=0)
    logits: Tensor = model(inputs_embeds=embeds, attention_mask=whole, use_cache=False, **options).logits
    return logits[:, len(prompt) :]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)


def with_gradient(
    model: nn.Module, prompt: SoftPrompt | KeyValuePrompt, batch: dict[str, Tensor], **options
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient of the prompt and logits of the real tokens."""
    prompt.zero_grad()
    result = model(**batch, labels=labels_of(batch), **options)
    result.loss.backward()
    assert prompt.weight.grad is not None
    return result.loss.detach(), prompt.weight.grad.clone(), result.logits.detach()[batch["attention_mask"].bool()]


# --- the user's model stays the user's model --------------------------------------------------------------------------
@pytest.mark.parametrize("kind", BACKBONES)
def test_the_backbone_keeps_class_keywords_configuration_and_generate(tiny: Build, kind: str) -> None:
    model = tiny(kind)
    base = models.base_of(model)
    before = (type(model), model.config.to_dict(), inspect.signature(model.forward), inspect.signature(base.forward))
    generate = getattr(model, "generate", None)
    attach(model, soft())
    assert (type(model), model.config.to_dict()) == before[:2]
    assert inspect.signature(model.forward) == before[2]
    assert inspect.signature(base.forward) == before[3]
    assert getattr(model, "generate", None) == generate


@pytest.mark.parametrize("path", ["shared", "plain", "keys and values"])
@pytest.mark.parametrize("kind", SHARED)
def test_prompt_positions_show_nowhere_in_a_language_model(
    tiny: Build, kind: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = tiny(kind, attn_implementation="eager"), texts()
    if path == "plain":
        plain_only(monkeypatch)
    attach(model, keys(model) if path == "keys and values" else soft())
    options = {"output_hidden_states": True, "output_attentions": True, "use_cache": True}
    result = model(**batch, labels=batch["input_ids"], **options)
    assert result.logits.shape == (3, 9, VOCAB)
    assert [tuple(h.shape) for h in result.hidden_states] == [(3, 9, WIDTH)] * 3
    assert [tuple(a.shape) for a in result.attentions] == [
        (3, 4, 9, 9 + M)
    ] * 2  # rows are real tokens, columns what they see
    assert result.past_key_values.get_seq_length() == 9
    assert gap(result.loss, cross_entropy(result.logits, batch["input_ids"])) < 1e-5
    step = {"input_ids": batch["input_ids"][:, :1], "past_key_values": result.past_key_values}
    step["attention_mask"] = F.pad(batch["attention_mask"], (0, 1), value=1)
    assert model(**step).past_key_values.get_seq_length() == 10
    assert torch.equal(model(**batch, return_dict=False)[0], result.logits)
    assert model(**batch, use_cache=False).past_key_values is None


@pytest.mark.parametrize("what", ["tokens", "keys and values"])
@pytest.mark.parametrize("kind", ["Bert", "Roberta", "XLMRoberta", "Camembert"])
def test_prompt_positions_show_nowhere_in_an_encoder(tiny: Build, kind: str, what: str) -> None:
    model, batch = tiny(kind), texts()
    attach(model, soft() if what == "tokens" else keys(model))
    result = model(**batch, output_hidden_states=True)
    assert [tuple(h.shape) for h in result.hidden_states] == [(3, 9, WIDTH)] * 3
    assert torch.equal(result.hidden_states[-1], result.last_hidden_state)
    assert torch.equal(result.pooler_output, model.pooler(result.last_hidden_state))
    assert model(**batch, return_dict=False)[0].shape == (3, 9, WIDTH)
    words = tiny(kind, "ForMaskedLM")
    attach(words, soft() if what == "tokens" else keys(words))
    result = words(**batch, labels=batch["input_ids"])
    assert result.logits.shape == (3, 9, VOCAB)
    assert gap(result.loss, F.cross_entropy(result.logits.flatten(0, 1), batch["input_ids"].flatten())) < 1e-5
    classes = tiny(kind, "ForSequenceClassification", num_labels=3)
    attach(classes, soft())
    assert classes(**batch, labels=torch.tensor([0, 1, 2])).logits.shape == (3, 3)


@pytest.mark.parametrize("what", ["tokens", "keys and values"])
def test_prompt_positions_show_nowhere_in_an_encoder_decoder(tiny: Build, what: str) -> None:
    model, batch = tiny("T5", attn_implementation="eager"), texts()
    attach(model, soft() if what == "tokens" else keys(model))
    options = {
        "labels": batch["input_ids"][:, :4].contiguous(),
        "output_hidden_states": True,
        "output_attentions": True,
    }
    result = model(**batch, **options)
    assert result.logits.shape == (3, 4, VOCAB)
    assert result.encoder_last_hidden_state.shape == (3, 9, WIDTH)
    assert [tuple(h.shape) for h in result.encoder_hidden_states] == [(3, 9, WIDTH)] * 3
    assert [tuple(h.shape) for h in result.decoder_hidden_states] == [(3, 4, WIDTH)] * 3
    assert [a.shape[2] for a in result.encoder_attentions] == [9, 9]
    assert [a.shape[2] for a in result.decoder_attentions] == [4, 4]
    assert result.past_key_values.get_seq_length() == 4
    assert (3, 9, WIDTH) in [
        tuple(t.shape) for t in model(**batch, **options, return_dict=False) if isinstance(t, Tensor)
    ]


@pytest.mark.parametrize(("kind", "make"), [(kind, soft) for kind in BACKBONES] + [(kind, deep) for kind in DEEP])
def test_switched_off_or_removed_the_outputs_are_bit_identical(
    tiny: Build, kind: str, make: Callable[..., Prompt]
) -> None:
    model, batch = tiny(kind), texts()
    before, modules = outputs(model, batch), [name for name, _ in model.named_modules()]
    handle = attach(model, make())
    prompted = outputs(model, batch)
    assert gap(prompted, before) > 1e-2
    handle.enabled(False)
    assert torch.equal(outputs(model, batch), before)
    handle.enabled()
    assert torch.equal(outputs(model, batch), prompted)
    with off(model):
        assert torch.equal(outputs(model, batch), before)
    handle.remove()
    assert torch.equal(outputs(model, batch), before)
    assert [name for name, _ in model.named_modules()] == modules
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_prompt_of_length_zero_changes_no_bit(tiny: Build, kind: str) -> None:
    model, batch = tiny(kind), texts("left" if kind == "Roberta" else "right")
    before = outputs(model, batch)
    attach(model, soft(length=0))
    assert torch.equal(outputs(model, batch), before)


@pytest.mark.parametrize("kind", ["Llama", "Bert", "T5"])
def test_two_prompts_on_one_backbone_do_not_mix(tiny: Build, kind: str) -> None:
    model, batch = tiny(kind), texts()
    alone = []
    for seed in (1, 2):
        handle = attach(model, soft(seed))
        alone.append(outputs(model, batch))
        handle.remove()
    first, second = (attach(model, soft(seed), always=False) for seed in (1, 2))
    plain = outputs(model, batch)
    for handle, expected in ((first, alone[0]), (second, alone[1]), (first, alone[0])):
        with handle.active():
            assert torch.equal(outputs(model, batch), expected)
    assert torch.equal(outputs(model, batch), plain)
    second.remove()
    with first.active():
        assert torch.equal(outputs(model, batch), alone[0])


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "T5"])
def test_threads_that_generate_with_their_own_prompts_do_not_mix(tiny: Build, kind: str) -> None:
    model, batch = tiny(kind), texts("left")
    handles: list[Handle | None] = [attach(model, soft(seed), always=False) for seed in range(3)]

    def write(handle: Handle | None) -> Tensor:
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        if handle is None:
            return model.generate(**batch, **options)
        with handle.active():
            return model.generate(**batch, **options)

    jobs = [*handles, None] * 3
    alone = {job: write(job) for job in {*handles, None}}
    assert len({tuple(tokens.flatten().tolist()) for tokens in alone.values()}) == 4
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(write, jobs))
    for job, tokens in zip(jobs, together, strict=True):
        assert torch.equal(tokens, alone[job])


# --- the exact shortcut ---------------------------------------------------------------------------------------------
def test_every_type_of_the_shortcut_is_tested() -> None:
    assert set(SHARED.values()) == models.SHARED_PREFIX


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", SHARED)
def test_the_shared_prefix_equals_the_plain_path(
    tiny: Build, kind: str, side: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompt, batch = tiny(kind, attn_implementation=attention), soft(), texts(side)
    attach(model, prompt)
    assert models.shortcut_refused(model.base_model) is None
    shared = with_gradient(model, prompt, batch)
    plain_only(monkeypatch)
    assert models.shortcut_refused(model.base_model) is not None
    for fast, plain in zip(shared, with_gradient(model, prompt, batch), strict=True):
        assert gap(fast, plain) < 1e-5
    assert gap(shared[1], torch.zeros_like(shared[1])) > 1e-3


def rows_and_tokens(model: nn.Module) -> list[tuple[int, ...]]:
    """What the first block reads in each pass from now on: [rows, tokens]."""
    passes: list[tuple[int, ...]] = []
    watch(models.decoder_blocks(model.base_model)[0], lambda read, _: passes.append(tuple(read[0].shape[:2])))
    return passes


@pytest.fixture(params=[2**40, -(2**40)], ids=["one call", "parts"])
def attention_calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention of a row in one call with a mask, or in parts, however many tokens there are."""
    monkeypatch.setattr(one_row, "MASKED", request.param)


@pytest.mark.parametrize("make", [soft, keys])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.usefixtures("attention_calls")
def test_one_row_without_padding_equals_the_plain_path(
    tiny: Build, kind: str, side: str, make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = tiny(kind), texts(side)
    prompt = soft() if make is soft else keys(model)
    attach(model, prompt)
    passes, tokens, ahead = rows_and_tokens(model), int(batch["attention_mask"].sum()), M if make is soft else 0
    real = batch["attention_mask"].bool()
    with carried.reads(real):
        trained = with_gradient(model, prompt, batch, use_cache=False)
        with torch.no_grad():
            read, again = (model(**batch, use_cache=False).logits[real] for _ in range(2))
    of_prompt = [(1, M)] if make is soft else []  # at inference its keys and values are computed once
    assert passes == [(1, ahead + tokens), *of_prompt, (1, tokens), (1, tokens)]
    assert torch.equal(read, again)
    if make is soft:
        plain_only(monkeypatch)
    plain = with_gradient(model, prompt, batch, use_cache=False)  # of keys and values: a filled cache
    for fast, expected in zip((*trained, read), (*plain, plain[2]), strict=True):
        assert gap(fast, expected) < 1e-5
    assert passes[-1] == (len(real), ahead + real.shape[1])
    assert gap(trained[1], torch.zeros_like(trained[1])) > 1e-3


def test_padding_has_its_states_unless_nobody_reads_them(tiny: Build) -> None:
    model, batch = tiny("Llama"), texts("left")
    attach(model, soft())
    padding = batch["attention_mask"] == 0
    assert model.base_model(**batch, use_cache=False).last_hidden_state[padding].all(-1).all()
    with carried.reads(~padding):
        states = model.base_model(**batch, use_cache=False).last_hidden_state
    assert not states[padding].any() and states[~padding].all(-1).all()


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("make", [soft, keys])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.usefixtures("attention_calls")
def test_the_last_block_computes_only_what_is_read(
    tiny: Build, kind: str, side: str, make: Callable[..., Any], autocast: bool
) -> None:
    model, batch = tiny(kind), texts(side)
    prompt = soft() if make is soft else keys(model)
    attach(model, prompt)
    real = batch["attention_mask"].bool()
    few = real & (torch.arange(real.shape[1]) % 4 == 0)
    computed: list[int] = []
    inner = [m for m in models.decoder_blocks(model.base_model)[-1].modules() if hasattr(m, "weight")][-1]
    watch(inner, lambda _, given: computed.append(given.shape[-2]))
    found = []
    for where in (few, real):
        prompt.zero_grad()
        with carried.reads(where), torch.autocast("cpu", enabled=autocast):
            states = model.base_model(**batch, use_cache=False).last_hidden_state[few]
            with torch.no_grad():
                read = model.base_model(**batch, use_cache=False).last_hidden_state[few]
        (states.float() * torch.arange(states.numel()).view_as(states).cos()).sum().backward()
        found.append((states, read, *(p.grad.clone() for p in prompt.parameters())))
    count = int(few.sum())
    of_prompt = [M] if make is soft else []  # at inference its keys and values are computed once
    assert computed[: 2 + len(of_prompt)] == [count, *of_prompt, count]
    assert min(computed[2 + len(of_prompt) :]) >= int(real.sum()) > 2 * count
    for narrow, whole in zip(*found, strict=True):
        assert gap(narrow, whole) < (7e-2 if autocast else 1e-5)  # one unit in the last place of bfloat16
        assert gap(narrow, torch.zeros_like(narrow)) > 1e-3


def test_one_row_is_for_one_prompt_and_without_cache(tiny: Build) -> None:
    model, batch = tiny("Llama"), texts()
    first, second = (attach(model, soft(seed), always=False) for seed in (1, 2))
    passes = rows_and_tokens(model)

    def step(handles: list[Handle | None], batch: dict[str, Tensor] = batch, **options) -> bool:
        passes.clear()
        with route(model, handles), carried.reads(batch["attention_mask"].bool()):
            model(**batch, **options)
        return passes == [(1, M + int(batch["attention_mask"].sum()))]

    assert step([first], use_cache=False)
    assert not step([first])  # its keys and values are asked for
    assert not step([first, second, *[None] * (len(batch["input_ids"]) - 2)], use_cache=False)
    assert not step([first], use_cache=False, output_hidden_states=True)
    full = {name: values[:1] for name, values in batch.items()}
    passes.clear()
    with first.active():
        model(**full, use_cache=False)  # without padding: no matter who reads it
    assert passes == [(1, M + full["input_ids"].numel())]
    holes = batch["attention_mask"].clone()
    holes[0, 2] = 0  # positions that are not read are no padding: they have states
    assert not step([first], batch | {"attention_mask": holes}, use_cache=False)
    with torch.no_grad(), first.active():
        model(input_ids=torch.tensor([[3]]), use_cache=False)
    assert step([first], use_cache=False)  # nothing is held against the model
    model.set_attn_implementation("eager")
    assert not step([first], use_cache=False)


def test_attention_of_another_kind_is_noticed_and_takes_two_passes(
    tiny: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompt, batch = tiny("Llama"), soft(), {"input_ids": texts()["input_ids"].clamp(min=3)}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    attach(model, prompt)
    expected = with_gradient(model, prompt, batch, use_cache=False)
    passes = rows_and_tokens(model)

    def by_hand(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> Any:
        if mask is None:
            mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
        groups = query.shape[1] // key.shape[1]
        scores = query @ key.repeat_interleave(groups, 1).mT * options["scaling"]
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", by_hand)
    for _ in range(2):
        for a, b in zip(with_gradient(model, prompt, batch, use_cache=False), expected, strict=True):
            assert gap(a, b) < 1e-5
    shape = tuple(batch["input_ids"].shape)
    assert passes == [(1, M + batch["input_ids"].numel()), (1, M), shape, (1, M), shape]  # tried once


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", [*SHARED, "OPT"])
def test_the_plain_path_equals_a_concatenation_by_hand(
    tiny: Build, kind: str, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompt, batch = tiny(kind), soft(), texts(side)
    logits = concatenated(model, prompt.weight, batch)
    loss = cross_entropy(logits, labels_of(batch))
    loss.backward()
    by_hand = loss.detach(), prompt.weight.grad.clone(), logits.detach()[batch["attention_mask"].bool()]
    plain_only(monkeypatch)
    attach(model, prompt)
    for ours, theirs in zip(with_gradient(model, prompt, batch), by_hand, strict=True):
        assert gap(ours, theirs) < 1e-5


@pytest.mark.parametrize("kind", SHARED)
def test_the_shared_prefix_equals_the_plain_path_without_a_mask(
    tiny: Build, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(kind)
    attach(model, soft())
    ids = texts()["input_ids"][:, :4] + 1
    shared = model(input_ids=ids, position_ids=torch.arange(4)[None]).logits
    plain_only(monkeypatch)
    assert gap(shared, model(input_ids=ids).logits) < 1e-5
    assert gap(shared, model(inputs_embeds=model.get_input_embeddings()(ids)).logits) < 1e-5


def test_gpt2_token_types_are_added_to_the_text_only(tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny("GPT2"), texts()
    attach(model, soft())
    batch["token_type_ids"] = torch.full_like(batch["input_ids"], 4)
    shared = model(**batch).logits
    plain_only(monkeypatch)
    assert gap(model(**batch).logits, shared) < 1e-5
    del batch["token_type_ids"]
    assert gap(model(**batch).logits, shared) > 1e-2


def refused(
    model: nn.Module, reason: str, caplog: pytest.LogCaptureFixture, batch: dict[str, Tensor], **options
) -> Tensor:
    """Logits of two calls that must announce `reason` once and agree with a concatenation by hand."""
    causal._ANNOUNCED.clear()
    prompt = soft()
    handle = attach(model, prompt)
    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING, "pt_nlp.causal"):
        logits = model(**batch, **options).logits
        model(**batch)
    assert [record.getMessage() for record in caplog.records if "row by row" in record.getMessage()] == [
        f"{type(models.base_of(model)).__name__}: prompts are computed row by row, without a shared prefix: {reason}"
    ]
    handle.remove()
    torch.manual_seed(0)
    by_hand = concatenated(model, prompt.weight, batch)
    real = batch["attention_mask"].bool()
    assert gap(logits[real], by_hand[real]) < 1e-5
    return logits


@pytest.mark.parametrize("kind", ["Mistral", "Qwen2", "Qwen3"])
def test_sliding_windows_take_the_plain_path(tiny: Build, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    options = {"sliding_window": 4} | (
        {} if kind == "Mistral" else {"use_sliding_window": True, "max_window_layers": 1}
    )
    model, batch = tiny(kind, **options), texts()
    logits = refused(model, "the model has layers without full attention", caplog, batch)
    model.config.sliding_window = None
    model.config.layer_types = ["full_attention"] * 2
    assert gap(logits, tiny(kind)(**batch).logits) > 1e-2  # the window is narrower than the text


ROPES = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "longrope": {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 2.0, "short_factor": [1.0, 1.0]}
    | {"long_factor": [2.0, 4.0], "original_max_position_embeddings": 8},
}


@pytest.mark.parametrize("rope", ROPES)
def test_rotations_that_depend_on_the_length_take_the_plain_path(
    tiny: Build, rope: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"rope_parameters": ROPES[rope], "max_position_embeddings": 8 if rope == "dynamic" else 96}
    model, batch = tiny("Llama", **options), texts()  # 5 + 9 positions
    reason = "rotations of the prompt depend on the length of the text"
    exact = refused(model, reason, caplog, batch)
    monkeypatch.setattr(models, "_rotates_by_length", lambda config: False)
    model = tiny("Llama", **options)
    attach(model, soft())
    assert gap(model(**batch).logits, exact) > 1e-2  # the keys of the prompt alone are rotated otherwise


def test_rotations_are_looked_up_for_every_type_of_layer(tiny: Build) -> None:
    base = tiny("Llama").model
    plain, llama3 = {"rope_type": "default", "rope_theta": 1e4}, {"rope_type": "llama3", "rope_theta": 1e4}
    for kinds, wanted in (((plain, llama3), False), ((plain, ROPES["dynamic"]), True), ((ROPES["longrope"],), True)):
        base.config.rope_parameters = {f"layers_{i}": kind for i, kind in enumerate(kinds)}
        assert (models.shortcut_refused(base) is not None) == wanted


@pytest.mark.parametrize("rope", ROPES)
def test_keys_and_values_in_one_row_see_the_length_of_the_texts_not_of_the_row(tiny: Build, rope: str) -> None:
    limit = 12 if rope == "dynamic" else 96
    batch = texts("left")
    results = []
    for way in (contextlib.nullcontext(), carried.reads(batch["attention_mask"].bool())):
        model = tiny("Llama", rope_parameters=ROPES[rope], max_position_embeddings=limit)
        prompt, passes = keys(model), rows_and_tokens(model)
        attach(model, prompt)
        with way:
            results.append(with_gradient(model, prompt, batch, use_cache=False))
        assert passes == [(1, int(batch["attention_mask"].sum())) if results[1:] else (3, 9)]
    for a, b in zip(*results, strict=True):
        assert gap(a, b) < 1e-5


def test_active_dropout_takes_the_plain_path(tiny: Build, caplog: pytest.LogCaptureFixture) -> None:
    model, batch = tiny("GPT2"), texts()
    quiet = concatenated(model, soft().weight, batch)
    model.train()
    logits = refused(model, "dropout is active in the backbone", caplog, batch)
    assert gap(logits, quiet) > 1e-2


def test_gradient_checkpointing_takes_the_plain_path(tiny: Build, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("Llama")
    model.gradient_checkpointing_enable()
    model.train()
    refused(model, "gradient checkpointing is on", caplog, texts())


@pytest.mark.parametrize("kind", ["OPT", "Mamba"])
def test_types_that_are_not_tested_take_the_plain_path(
    tiny: Build, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    refused(tiny(kind), f"it is not tested on {kind.lower()!r}", caplog, texts())


def test_a_static_cache_takes_the_plain_path(tiny: Build, caplog: pytest.LogCaptureFixture) -> None:
    model, batch = tiny("Llama"), texts("left")
    cache = StaticCache(config=model.config, max_cache_len=9 + M + 2)
    causal._ANNOUNCED.clear()
    prompt = soft()
    handle = attach(model, prompt)
    with caplog.at_level(logging.WARNING, "pt_nlp.causal"):
        logits = model(**batch, past_key_values=cache).logits
    assert "the cache is a StaticCache" in caplog.text
    assert int(cache.get_seq_length()) == 9
    step = torch.tensor([[5], [6], [7]])
    longer = {
        "input_ids": torch.cat([batch["input_ids"], step], 1),
        "attention_mask": F.pad(batch["attention_mask"], (0, 1), value=1),
    }
    after = model(input_ids=step, attention_mask=longer["attention_mask"], past_key_values=cache).logits
    assert int(cache.get_seq_length()) == 10
    handle.remove()
    by_hand = concatenated(model, prompt.weight, longer)
    assert (
        gap(torch.cat([logits, after], 1)[longer["attention_mask"].bool()], by_hand[longer["attention_mask"].bool()])
        < 1e-5
    )


def test_a_static_cache_without_room_for_the_prompt_is_refused(tiny: Build) -> None:
    model = tiny("Llama")
    attach(model, soft())
    with pytest.raises(InputError, match=r"14 positions, the static cache has 9.*larger by the length of the prompt"):
        model(**texts(), past_key_values=StaticCache(config=model.config, max_cache_len=9))


# --- keys and values --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", SHARED)
def test_the_keys_and_values_of_prompt_rows_do_what_the_rows_do(tiny: Build, kind: str, side: str) -> None:
    model, rows, batch = tiny(kind), soft(), texts(side)
    with torch.no_grad():
        cache = model.base_model(inputs_embeds=rows.weight[None], use_cache=True).past_key_values
        prompt = keys(model)
        for i, layer in enumerate(cache.layers):
            prompt.weight[i] = torch.stack([layer.keys[0], layer.values[0]])
    handle = attach(model, rows)
    expected = model(**batch).logits
    handle.remove()
    attach(model, prompt)
    _, gradient, logits = with_gradient(model, prompt, batch)
    assert gap(logits, expected[batch["attention_mask"].bool()]) < 1e-5
    assert float(gradient.abs().amax(dim=(1, 2, 3, 4)).min()) > 1e-4  # every layer gets its gradient


@pytest.mark.parametrize(
    ("kind", "options", "kv_heads"),
    [
        ("Falcon", {"multi_query": True}, 1),
        ("Falcon", {"multi_query": False}, 4),
        ("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, 4),  # its cache holds a copy for each query
        ("GPTBigCode", {"multi_query": True}, 1),
        ("GPTBigCode", {"multi_query": False}, 4),
    ],
    ids=str,
)
def test_keys_and_values_have_the_heads_that_the_cache_has(
    tiny: Build, kind: str, options: dict[str, Any], kv_heads: int
) -> None:
    model, rows, batch = tiny(kind, **options), soft(), texts("left")
    assert models.shape_of(model).kv_heads == kv_heads
    prompt = keys(model)
    with torch.no_grad():
        cache = model.base_model(inputs_embeds=rows.weight[None], use_cache=True).past_key_values
        for i, layer in enumerate(cache.layers):
            prompt.weight[i] = torch.stack([layer.keys[0], layer.values[0]])
    expected = concatenated(model, rows.weight, batch)
    attach(model, prompt)
    _, gradient, logits = with_gradient(model, prompt, batch)
    assert gap(logits, expected[batch["attention_mask"].bool()]) < 1e-5
    assert float(gradient.abs().amax(dim=(1, 2, 3, 4)).min()) > 1e-4


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "XLMRoberta", "Camembert", "Electra"])
def test_keys_and_values_stand_in_front_of_those_of_every_layer_of_an_encoder(tiny: Build, kind: str) -> None:
    """Worked by hand, with gradients: softmax(Q [PK; K]^T / sqrt(d_h)) [PV; V], real tokens at positions m, m + 1, ..."""
    model, batch = tiny(kind), texts()
    prompt = keys(model)
    attach(model, prompt)
    real = batch["attention_mask"].bool()
    weight = torch.linspace(-1, 1, int(real.sum()) * WIDTH).view(-1, WIDTH)
    ours = model(**batch).last_hidden_state[real]
    (gradient,) = torch.autograd.grad((ours * weight).sum(), prompt.weight)

    table, start = model.embeddings, M + 2 * (kind in LEAVE_OUT_PADDING)
    positions = torch.arange(start, start + 9)
    x = table.word_embeddings(batch["input_ids"]) + table.position_embeddings(positions)
    x = table.LayerNorm(x + table.token_type_embeddings.weight[0])
    x = model.embeddings_project(x) if kind == "Electra" else x
    seen = F.pad(real, (M, 0), value=True)[:, None, None]
    for block, (k_ahead, v_ahead) in zip(model.encoder.layer, prompt.weight, strict=True):
        layer = block.attention.self
        q, k, v = (part(x).view(3, 9, 4, 4).transpose(1, 2) for part in (layer.query, layer.key, layer.value))
        k, v = (torch.cat([y.expand(3, -1, -1, -1), z], 2) for y, z in ((k_ahead, k), (v_ahead, v)))
        scores = (q @ k.mT / 2).masked_fill(~seen, -torch.inf)
        mixed = block.attention.output((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), x)
        x = block.output(block.intermediate(mixed), mixed)
    (expected,) = torch.autograd.grad((x[real] * weight).sum(), prompt.weight)
    assert gap(ours, x[real]) < 1e-5
    assert gap(gradient, expected) < 1e-5 * max(1.0, float(expected.abs().max()))
    assert float(expected.abs().amax(dim=(1, 2, 3, 4)).min()) > 1e-3


# --- stored keys and values -------------------------------------------------------------------------------------------
def prefills(model: nn.Module, call: Callable[[], object]) -> int:
    """How often the first block reads the M rows of the prompt alone during a call."""
    seen = []
    block = models.decoder_blocks(model.base_model)[0]
    original = block.forward

    def forward(hidden: Tensor, *args, **options) -> Any:  # a hook would say that the backbone has changed
        seen.append(hidden.shape)
        return original(hidden, *args, **options)

    block.forward = forward
    call()
    del block.forward
    return sum(shape[:2] == (1, M) for shape in seen)


@pytest.mark.parametrize("kind", SHARED)
def test_at_inference_the_prompt_is_computed_once(tiny: Build, kind: str) -> None:
    model, batch = tiny(kind), texts("left")
    attach(model, soft())
    with torch.no_grad():
        assert prefills(model, lambda: model(**batch)) == 1
        assert prefills(model, lambda: model(**batch)) == 0
    assert prefills(model, lambda: model.generate(**batch, max_new_tokens=4, do_sample=False)) == 0


def test_with_gradient_the_prompt_is_computed_every_time_and_not_kept(tiny: Build) -> None:
    model, batch = tiny("Llama"), texts()
    handle = attach(model, soft())
    for _ in range(2):
        assert prefills(model, lambda: model(**batch)) == 1
    assert handle.store == {}
    with torch.no_grad():
        model(**batch)
    assert all(not k.requires_grad and not v.requires_grad for k, v in handle.store["key_values"][2])
    assert prefills(model, lambda: model(**batch)) == 1


def _in_place(prompt: SoftPrompt, model: nn.Module) -> None:
    prompt.weight.add_(0.3)


def _by_data(prompt: SoftPrompt, model: nn.Module) -> None:
    prompt.weight.data[2, 1] += 0.7


def _by_load(prompt: SoftPrompt, model: nn.Module) -> None:
    prompt.load_state_dict({"weight": soft(9).weight})


def _by_optimiser(prompt: SoftPrompt, model: nn.Module) -> None:
    prompt.weight.grad = torch.ones_like(prompt.weight)
    torch.optim.AdamW([prompt.weight], lr=0.1).step()


def _weights_written(prompt: SoftPrompt, model: nn.Module) -> None:
    next(iter(models.decoder_blocks(model.base_model).parameters())).mul_(1.5)


def _weights_written_by_data(prompt: SoftPrompt, model: nn.Module) -> None:
    next(iter(models.decoder_blocks(model.base_model).parameters())).data.mul_(1.5)


def _weights_replaced(prompt: SoftPrompt, model: nn.Module) -> None:
    model.load_state_dict({n: p * 1.1 for n, p in model.state_dict().items()}, assign=True)


def test_stored_keys_and_values_follow_the_adapters_of_the_backbone(
    tiny: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: the extra `peft` of pt-nlp")
    lora = partial(peft.LoraConfig, init_lora_weights=False)
    adapted = peft.get_peft_model(tiny("Llama"), lora(target_modules=["q_proj", "v_proj"]))
    adapted.add_adapter("other", lora(target_modules=["q_proj"]))
    model, batch = adapted.get_base_model(), texts()
    layer = next(m for m in model.modules() if hasattr(m, "scale_layer"))
    changes: list[Callable[[], Any]] = [
        adapted.disable_adapter_layers,
        adapted.enable_adapter_layers,
        lambda: adapted.set_adapter("other"),
    ]
    changes += [adapted.merge_adapter, adapted.unmerge_adapter, lambda: layer.scale_layer(2.0)]
    handle = attach(model, soft(), always=False)
    with torch.no_grad(), handle.active():
        for change in changes:
            model(**batch)
            change()
            assert prefills(model, lambda: model(**batch)) == 1
            with_store = model(**batch).logits
            with monkeypatch.context() as patch:
                plain_only(patch)
                assert gap(with_store, model(**batch).logits) < 1e-4


@pytest.mark.parametrize(
    "change",
    [_in_place, _by_data, _by_load, _by_optimiser, _weights_written, _weights_written_by_data, _weights_replaced],
    ids=lambda f: f.__name__,
)
def test_stored_keys_and_values_follow_the_prompt_and_the_weights(
    tiny: Build, change: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompt, batch = tiny("Llama"), soft(), texts()
    handle = attach(model, prompt, always=False)
    with torch.no_grad(), handle.active():
        before = model(**batch).logits
        change(prompt, model)
        assert prefills(model, lambda: model(**batch)) == 1
        after = model(**batch).logits
        plain_only(monkeypatch)
        assert gap(after, model(**batch).logits) < 1e-5
        assert gap(after, before) > 1e-2


def test_what_is_stored_can_be_cleared(tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny("Llama"), texts()
    handle = attach(model, soft())
    with torch.no_grad():
        model(**batch)
        models.decoder_blocks(model.base_model)[0].mlp.up_proj.weight.data[1:] *= 1.5  # not the first value
        assert prefills(model, lambda: model(**batch)) == 0
        handle.store.clear()
        assert prefills(model, lambda: model(**batch)) == 1
        after = model(**batch).logits
        plain_only(monkeypatch)
        assert gap(after, model(**batch).logits) < 1e-5


def test_inference_mode_and_no_grad_share_what_is_stored(tiny: Build) -> None:
    model, batch = tiny("Llama"), texts()
    attach(model, soft())
    with torch.inference_mode():
        first = model(**batch).logits.clone()
    with torch.no_grad():
        assert prefills(model, lambda: model(**batch)) == 0
        assert torch.equal(model(**batch).logits, first)
    assert gap(model(**batch).logits, first) < 1e-6


# --- precision, places --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", ["shared", "plain"])
@pytest.mark.parametrize("kind", ["Llama", "GPT2", "Bert", "T5"])
def test_a_bf16_backbone_gives_the_float32_prompt_a_float32_gradient(
    tiny: Build, kind: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "plain":
        plain_only(monkeypatch)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        model, prompt = tiny(kind).to(dtype), soft()
        attach(model, prompt)
        result = outputs(model, texts())
        assert result.dtype == dtype
        (result.float() * torch.linspace(-1, 1, result.numel()).view_as(result)).mean().backward()
        assert prompt.weight.dtype == prompt.weight.grad.dtype == torch.float32
        results.append((result, prompt.weight.grad))
    for a, b in zip(*results, strict=True):
        assert gap(a, b) < 0.05 * float(a.detach().abs().max())


@pytest.mark.parametrize("kind", SHARED)
def test_under_autocast_the_shared_prefix_is_as_close_to_float32_as_the_plain_path(
    tiny: Build, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompt, batch = tiny(kind), soft(), texts()
    attach(model, prompt)
    _, _, exact = with_gradient(model, prompt, batch)
    with torch.autocast("cpu", torch.bfloat16):
        _, shared_gradient, shared = with_gradient(model, prompt, batch)
        plain_only(monkeypatch)
        _, plain_gradient, plain = with_gradient(model, prompt, batch)
    scale = float(exact.abs().max())
    assert gap(plain, exact) < 0.03 * scale
    assert gap(shared, exact) < 0.03 * scale
    assert gap(shared_gradient, plain_gradient) < 0.05 * float(plain_gradient.abs().max())


def test_stored_keys_and_values_of_autocast_are_not_used_outside_of_it(tiny: Build) -> None:
    model, batch = tiny("Llama"), texts()
    attach(model, soft())
    with torch.no_grad():
        expected = model(**batch).logits
        with torch.autocast("cpu", torch.bfloat16):
            assert gap(model(**batch).logits, expected) > 1e-5
        assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("places", [{"": "cpu"}, "disk"])
@pytest.mark.parametrize("what", ["tokens", "keys and values"])
def test_a_dispatched_model_gives_the_same_numbers(tiny: Build, places: dict | str, what: str, tmp_path) -> None:
    from accelerate import dispatch_model

    model, batch = tiny("Llama"), texts()
    prompt = soft() if what == "tokens" else keys(model)
    handle = attach(model, prompt)
    expected = with_gradient(model, prompt, batch)
    handle.remove()
    before = model(**batch).logits
    if places == "disk":
        places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
        places |= {"model.norm": "disk", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    handle = attach(model, prompt)
    for here, there in zip(with_gradient(model, prompt, batch), expected, strict=True):
        assert gap(here, there) < 1e-6
    with torch.no_grad():
        first = model(**batch).logits
        assert torch.equal(model(**batch).logits, first)
    handle.remove()
    assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_backbone_trains_the_prompt(tiny: Build, bits: int, tmp_path) -> None:
    pytest.importorskip("bitsandbytes", reason="quantised backbones need bitsandbytes, which is not installed")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    tiny("Llama", hidden_size=64, intermediate_size=64, head_dim=16).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map={"": device})
    prompt = soft(width=64).to(device)
    batch = {k: v.to(device) for k, v in texts().items()}
    expected = concatenated(model, prompt.weight, batch)
    before = model(**batch).logits
    handle = attach(model, prompt)
    loss, gradient, _ = with_gradient(model, prompt, batch)
    assert bool(torch.isfinite(loss))
    assert gradient.dtype == torch.float32
    assert float(gradient.abs().max()) > 0
    real = batch["attention_mask"].bool()
    # With 8 bits inputs are rounded as well, outliers by columns of the whole batch: the order of rows shows in the numbers.
    difference = (model(**batch).logits - expected)[real].norm() / expected[real].norm()
    assert float(difference) < {8: 0.05, 4: 1e-5}[bits]
    handle.remove()
    assert torch.equal(model(**batch).logits, before)


# --- prompts inside of the tower --------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["Llama", "Mistral"])
def test_rows_before_the_first_block_are_rows_of_the_embeddings(tiny: Build, kind: str) -> None:
    model, rows, batch = tiny(kind), soft(), texts("left")
    prompt = deep(block=0)
    prompt.weight.data[0] = rows.weight.data
    expected = concatenated(model, rows.weight, batch)
    attach(model, prompt)
    result = model(**batch)
    assert gap(result.logits[batch["attention_mask"].bool()], expected[batch["attention_mask"].bool()]) < 1e-5
    written = model.generate(**batch, max_new_tokens=5, do_sample=False)
    assert torch.equal(written, model.generate(**batch, max_new_tokens=5, do_sample=False, use_cache=False))


def words_of(tiny: Build, kind: str) -> nn.Module:
    """A model with logits over its vocabulary."""
    return tiny(kind, "ForMaskedLM") if kind in ("Bert", "Roberta") else tiny(kind)


@pytest.mark.parametrize("kind", DEEP)
def test_positions_of_a_prompt_inside_of_the_tower_show_nowhere(tiny: Build, kind: str) -> None:
    model, batch = words_of(tiny, kind), texts()
    without = model(**batch, output_hidden_states=True)
    attach(model, deep())
    result = model(**batch, labels=batch["input_ids"], output_hidden_states=True)
    assert result.logits.shape == (3, 9, VOCAB)
    assert [tuple(h.shape) for h in result.hidden_states] == [(3, 9, WIDTH)] * 3
    for before, after in zip(without.hidden_states[:2], result.hidden_states, strict=False):
        assert torch.equal(before, after)  # what enters blocks 0 and 1
    assert gap(result.logits, without.logits) > 1e-2
    if kind in ("Bert", "Roberta"):
        assert gap(result.loss, F.cross_entropy(result.logits.flatten(0, 1), batch["input_ids"].flatten())) < 1e-5
    else:
        assert gap(result.loss, cross_entropy(result.logits, batch["input_ids"])) < 1e-5
    assert torch.equal(model(**batch, return_dict=False)[0], result.logits)


@pytest.mark.parametrize("kind", ["Bert", "Roberta"])
def test_a_pooler_sees_the_first_real_token_behind_a_prompt_inside_of_the_tower(tiny: Build, kind: str) -> None:
    model, batch = tiny(kind), texts()
    attach(model, deep())
    result = model(**batch)
    assert result.last_hidden_state.shape == (3, 9, WIDTH)
    assert torch.equal(result.pooler_output, model.pooler(result.last_hidden_state))
    classes = tiny(kind, "ForSequenceClassification", num_labels=3)
    attach(classes, deep())
    assert classes(**batch, labels=torch.tensor([0, 1, 2])).logits.shape == (3, 3)


def block_by_block(model: nn.Module, ids: Tensor, rows: Tensor, block: int) -> Tensor:
    """Logits of one text without padding, [n, V], by hand: the blocks one after the other, rows in front of one's input."""
    base, reads_both_ways = model.base_model, model.config.model_type in ("bert", "roberta")
    hidden = base.embeddings(ids[None]) if reads_both_ways else base.embed_tokens(ids[None])
    for index, layer in enumerate(models.decoder_blocks(base)):
        if index == block:
            hidden = torch.cat([rows[None], hidden], dim=1)
        if reads_both_ways:
            hidden = layer(hidden)
            continue
        n = hidden.shape[1]
        mask = torch.full((n, n), torch.finfo(hidden.dtype).min).triu(1)[None, None]
        rotary = base.rotary_emb(hidden, torch.arange(n)[None])
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
    hidden = hidden[:, len(rows) :]
    if not reads_both_ways:
        return model.lm_head(base.norm(hidden))[0]
    return (model.cls if hasattr(model, "cls") else model.lm_head)(hidden)[0]


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize(
    ("kind", "side"),  # BERT and RoBERTa count padding on the left as positions
    [(kind, side) for kind in DEEP for side in ("right", "left") if kind not in ("Bert", "Roberta") or side == "right"],
)
def test_training_reaches_a_prompt_inside_of_the_tower(tiny: Build, kind: str, side: str, block: int) -> None:
    """Two steps of descent through the attached prompt, and two on the blocks run by hand."""
    model, prompt, batch = words_of(tiny, kind), deep(block), texts(side)
    real, shift = batch["attention_mask"].bool(), kind not in ("Bert", "Roberta")
    labels = labels_of(batch) if shift else batch["input_ids"].masked_fill(~real, -100)
    alone = [ids[keep] for ids, keep in zip(batch["input_ids"], real, strict=True)]
    rows = prompt.weight[0].detach().clone().requires_grad_()
    attach(model, prompt)
    (trained,) = [p for p in model.parameters() if p.requires_grad]
    assert trained is prompt.weight
    optimisers = [torch.optim.SGD([p], lr=0.5) for p in (trained, rows)]
    for _ in range(2):
        attached = model(**batch, labels=labels)
        by_hand = [block_by_block(model, ids, rows, block) for ids in alone]
        told = torch.cat([logits[: len(logits) - shift] for logits in by_hand])
        loss = F.cross_entropy(told, torch.cat([ids[shift:] for ids in alone]))
        assert gap(attached.logits[real], torch.cat(by_hand)) < 1e-5
        assert gap(attached.loss, loss) < 1e-5
        for optimiser, value in zip(optimisers, (attached.loss, loss), strict=True):
            optimiser.zero_grad()
            value.backward()
        assert gap(trained.grad[0], rows.grad) < 1e-5 and float(rows.grad.abs().max()) > 1e-3
        for optimiser in optimisers:
            optimiser.step()
    assert gap(trained[0], rows) < 1e-5 and gap(rows, deep(block).weight[0]) > 1e-3
    assert all(p.grad is None for p in model.parameters() if p is not trained)


@pytest.mark.parametrize("block", [0, 1])
def test_a_cache_hides_a_prompt_inside_of_the_tower_as_any_other(tiny: Build, block: int) -> None:
    model, batch = tiny("Llama"), texts("left")
    handle = attach(model, DeepPrompt([block], M, WIDTH), always=False)
    with handle.active():
        cache = model(**batch, use_cache=True).past_key_values
    assert cache.get_seq_length() == 9
    with pytest.raises(InputError, match="filled under a prompt"):
        model(input_ids=batch["input_ids"][:, :1], past_key_values=cache)
    cache.reset()
    with handle.active():
        assert gap(model(**batch, past_key_values=cache).logits, model(**batch).logits) < 1e-6
    assert cache.get_seq_length() == 9


# --- which models are causal --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "causal"),
    [(kind, True) for kind in ("Llama", "GPT2", "OPT", "Mamba", "Mpt")]
    + [(kind, False) for kind in ("Bert", "Roberta", "XLMRoberta", "Ernie", "BigBird", "Data2VecText", "Albert")]
    + [(kind, False) for kind in ("Electra", "ModernBert", "DistilBert", "T5", "Bart")],
)
def test_the_last_token_changes_the_first_one_in_all_but_causal_models(tiny: Build, kind: str, causal: bool) -> None:
    model, ids = tiny(kind), texts()["input_ids"][:1].clamp(min=3)
    assert models.is_causal(model) == causal
    if not model.config.is_encoder_decoder:
        other = torch.cat([ids[:, :-1], ids[:, -1:] % 20 + 20], dim=1)
        base = models.base_of(model)
        moved = gap(base(input_ids=ids).last_hidden_state[:, 0], base(input_ids=other).last_hidden_state[:, 0])
        assert (moved < 1e-6) == causal


def test_a_configuration_may_say_what_is_causal(tiny: Build) -> None:
    assert models.is_causal(tiny("Bert", "LMHeadModel", is_decoder=True))
    assert models.is_causal(tiny("Bart", "ForCausalLM"))
    model, rows, batch = tiny("Llama", is_causal=False), soft(), texts()
    assert not models.is_causal(model)
    expected = concatenated(model, rows.weight, batch)
    attach(model, rows)
    real = batch["attention_mask"].bool()
    assert gap(model(**batch).logits[real], expected[real]) < 1e-5


@pytest.mark.parametrize("kind", ["Bert", "Ernie", "BigBird", "Data2VecText", "Albert", "Electra", "DistilBert"])
def test_rows_of_token_embeddings_do_what_the_tokens_do_in_an_encoder(tiny: Build, kind: str) -> None:
    model, batch = tiny(kind), texts()
    first = torch.tensor([[9, 4, 11, 30, 7]])
    whole = {
        "input_ids": torch.cat([first.expand(3, -1), batch["input_ids"]], 1),
        "attention_mask": F.pad(batch["attention_mask"], (M, 0), value=1),
    }
    if kind in LEAVE_OUT_PADDING:
        whole["position_ids"] = whole["attention_mask"].cumsum(1) * whole["attention_mask"] + 1
    expected = model(**whole).last_hidden_state[:, M:]
    prompt = soft(width=models.shape_of(model).dim)
    prompt.weight.data = model.get_input_embeddings()(first[0]).clone()
    attach(model, prompt)
    real = batch["attention_mask"].bool()
    assert gap(model(**batch).last_hidden_state[real], expected[real]) < 1e-5


def test_an_encoder_that_reads_input_embeddings_otherwise_is_refused() -> None:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = EsmModel(EsmConfig(vocab_size=VOCAB, pad_token_id=1, max_position_embeddings=40, **sizes))
    with pytest.raises(InputError, match="EsmModel does not read input embeddings under a mask as it reads tokens"):
        attach(model, soft())


# --- errors -----------------------------------------------------------------------------------------------------------
def test_models_whose_positions_or_encoders_do_not_take_prompts_are_refused(tiny: Build) -> None:
    with pytest.raises(InputError, match="counts positions from behind its padding index"):
        attach(tiny("Roberta", "ForCausalLM", is_decoder=True), soft())
    small = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "src_vocab_size": 20, "tgt_vocab_size": 20}
    small |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    fsmt = FSMTForConditionalGeneration(FSMTConfig(langs=["en", "de"], **small))
    with pytest.raises(InputError, match="does not show its input embeddings"):
        attach(fsmt, soft())


def test_a_cache_that_was_filled_without_the_prompt_is_refused(tiny: Build) -> None:
    model, batch = tiny("Llama"), texts()
    step = {"input_ids": batch["input_ids"][:, :1], "attention_mask": F.pad(batch["attention_mask"], (0, 1), value=1)}
    cache = model(**batch, use_cache=True).past_key_values
    first, second = (attach(model, soft(seed), always=False) for seed in (1, 2))
    with first.active():
        with pytest.raises(
            InputError, match=r"filled without this prompt, or under another one. Start from an empty cache"
        ):
            model(**step, past_key_values=cache)
        cache = model(**batch, use_cache=True).past_key_values
    with second.active(), pytest.raises(InputError, match="filled without this prompt"):
        model(**step, past_key_values=cache)
    with pytest.raises(InputError, match="filled under a prompt"):
        model(**step, past_key_values=cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    with second.active():
        assert gap(model(**batch, past_key_values=cache).logits, model(**batch).logits) < 1e-6


@pytest.mark.parametrize("kind", ["Llama", "Bert", "T5"])
def test_a_prompt_that_does_not_fit_is_refused(tiny: Build, kind: str) -> None:
    model = tiny(kind)
    with pytest.raises(InputError, match=r"the prompt is 17 wide, the embeddings of .* are 16"):
        attach(model, SoftPrompt(3, 17))
    heads = models.shape_of(model).kv_heads
    with pytest.raises(InputError, match=rf"\(2, 2, {heads + 1}, 3, 4\), .* takes \(2, 2, {heads}, 3, 4\)"):
        attach(model, KeyValuePrompt(2, heads + 1, 4, 3))
    with pytest.raises(InputError, match=r"blocks|towers"):
        attach(model, DeepPrompt([2], 3, WIDTH))
    assert not any("forward" in module.__dict__ for module in model.modules())


LEARNED = ["GPT2", "OPT", "Bert", "DistilBert", "Electra", "Albert", "BigBird", "Ernie", "Bart", *LEAVE_OUT_PADDING]


def of_twelve_positions(tiny: Build, kind: str) -> nn.Module:
    limit = 12 + 2 * (kind in LEAVE_OUT_PADDING)
    return tiny(kind, **{"n_positions" if kind == "GPT2" else "max_position_embeddings": limit})


@pytest.mark.parametrize("kind", LEARNED)
def test_prompt_and_text_must_fit_the_positions(tiny: Build, kind: str) -> None:
    model = of_twelve_positions(tiny, kind)
    attach(model, soft(width=models.shape_of(model).dim))
    batch = {name: tensor[:, :7] for name, tensor in texts().items()}
    outputs(model, batch)  # 12 positions
    with pytest.raises(InputError, match=r"prompt and text take 13 positions, .* has 12. Cut the text"):
        outputs(model, {name: tensor[:, :8] for name, tensor in texts().items()})


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["GPT2", "OPT", *LEAVE_OUT_PADDING])
def test_padding_that_takes_no_position_is_not_counted(tiny: Build, kind: str, side: str) -> None:
    model = of_twelve_positions(tiny, kind)
    attach(model, soft())
    short = {name: tensor[1:] for name, tensor in texts(side).items()}  # 9 slots, of which 6 and 4 are text
    cut = {name: tensor[:, :6] if side == "right" else tensor[:, -6:] for name, tensor in short.items()}
    mask = short["attention_mask"].bool()
    assert gap(outputs(model, short)[mask], outputs(model, cut)[cut["attention_mask"].bool()]) < 1e-5


def test_trained_keys_and_values_of_a_decoder_must_fit_its_positions(tiny: Build) -> None:
    model = of_twelve_positions(tiny, "Bart")
    attach(model, keys(model))
    batch = {name: tensor[:, :4] for name, tensor in texts().items()}
    words = torch.full((3, 8), 5)
    model(**batch, decoder_input_ids=words[:, :7])
    with pytest.raises(InputError, match="prompt and text take 13 positions, BartDecoder has 12"):
        model(**batch, decoder_input_ids=words)


def test_masks_of_four_dimensions_are_refused(tiny: Build) -> None:
    model, batch = tiny("Llama"), texts()
    attach(model, soft())
    with pytest.raises(InputError, match="2-D attention mask"):
        model(input_ids=batch["input_ids"], attention_mask=torch.ones(3, 1, 9, 9))


@pytest.mark.parametrize("make", [soft, keys])
@pytest.mark.parametrize("kind", ["Llama", "OPT", "Bert", "T5"])
def test_a_batch_without_rows_is_refused(tiny: Build, kind: str, make: Callable[..., Prompt]) -> None:
    model = tiny(kind)
    attach(model, soft() if make is soft else keys(model))
    with pytest.raises(InputError, match="the batch has no rows"):
        outputs(model, {name: part[:0] for name, part in texts().items()})


def test_packed_sequences_are_refused(tiny: Build) -> None:
    model, ids = tiny("Llama"), texts()["input_ids"][:1]
    attach(model, soft())
    with pytest.raises(InputError, match="positions restart within a row: packed sequences"):
        model(input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]))


@pytest.mark.parametrize("kind", ["Llama", "Bert", "T5"])
def test_keys_and_values_refuse_gradient_checkpointing(tiny: Build, kind: str) -> None:
    model = tiny(kind)
    model.gradient_checkpointing_enable()
    model.train()
    attach(model, keys(model))
    with pytest.raises(InputError, match="checkpoint"):
        outputs(model, texts())


def test_keys_and_values_refuse_a_text_beyond_the_window(tiny: Build) -> None:
    model = tiny("Mistral", sliding_window=14)
    attach(model, keys(model))
    model(**texts())  # 5 + 9
    with pytest.raises(InputError, match=r"15 positions, the attention window of MistralModel has 14"):
        model(input_ids=torch.ones(1, 10, dtype=torch.long))


def test_distances_in_slots_refuse_padding_between_trained_keys_and_the_text(tiny: Build) -> None:
    model, batch = tiny("Mpt"), texts("right")
    attach(model, keys(model))
    together = model(**batch).logits
    for i, mask in enumerate(batch["attention_mask"].bool()):
        assert gap(together[i][mask], model(input_ids=batch["input_ids"][i][mask][None]).logits[0]) < 1e-5
    with pytest.raises(InputError, match=r"MptModel \(ALiBi\) counts the padding.*Pad on the right"):
        model(**texts("left"))


@pytest.mark.parametrize("kind", ["T5", "Bart"])
def test_states_of_an_encoder_without_the_prompts_rows_are_refused(tiny: Build, kind: str) -> None:
    model, batch = tiny(kind), texts()
    handle = attach(model, soft())
    words = {"decoder_input_ids": batch["input_ids"][:, :4], "attention_mask": batch["attention_mask"]}
    whole = model(**words, input_ids=batch["input_ids"])
    with pytest.raises(InputError, match="the encoder's states have 9 rows, as many as the mask"):
        model(**words, encoder_outputs=(whole.encoder_last_hidden_state,))
    memory = model.get_encoder()(**batch)
    assert gap(model(**words, encoder_outputs=memory).logits, whole.logits) < 1e-6
    handle.enabled(False)
    plain = model(**words, input_ids=batch["input_ids"])
    assert torch.equal(model(**words, encoder_outputs=(plain.encoder_last_hidden_state,)).logits, plain.logits)


def test_recurrent_models_take_no_keys_and_values_and_no_padding_on_the_left(tiny: Build) -> None:
    model = tiny("Mamba")
    with pytest.raises(InputError, match="no cache of keys and values"):
        attach(model, KeyValuePrompt(2, 4, 4, M))
    attach(model, soft())
    with pytest.raises(InputError, match="a state through the padding"):
        model(**texts("left"))


def test_a_cache_of_the_user_is_filled_in_place(tiny: Build) -> None:
    model, batch = tiny("Llama"), texts("left")
    attach(model, soft())
    cache = DynamicCache(config=model.config)
    result = model(**batch, past_key_values=cache)
    assert result.past_key_values is cache
    assert isinstance(cache, DynamicCache)
    assert cache.get_seq_length() == 9


# --- what single types of models need ---------------------------------------------------------------------------------
def alone(model: nn.Module, batch: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    """Row i without its padding."""
    keep = batch["attention_mask"][i].bool()
    return {"input_ids": batch["input_ids"][i][keep][None], "attention_mask": torch.ones(1, int(keep.sum())).long()}


def rows_do_not_depend_on_padding(model: nn.Module, batch: dict[str, Tensor]) -> None:
    whole = model(**batch)[0]
    for i, mask in enumerate(batch["attention_mask"].bool()):
        assert gap(whole[i][mask], model(**alone(model, batch, i))[0][0]) < 1e-4


@pytest.mark.parametrize("kind", ["ModernBert"])
def test_encoders_that_count_slots_read_padded_rows_as_they_are(tiny: Build, kind: str) -> None:
    model = tiny(kind, local_attention=4, layer_types=["full_attention", "sliding_attention"])
    attach(model, soft())
    with torch.no_grad():
        for side in ("left", "right"):
            rows_do_not_depend_on_padding(model, texts(side))


def test_windows_are_looked_up_in_the_text_part_of_a_composite_configuration() -> None:
    text = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 4}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 6, "initializer_range": 0.3}
    text |= {"layer_types": ["sliding_attention", "full_attention"], "pad_token_id": 0, "eos_token_id": None}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    ids = {"image_token_index": 45, "boi_token_index": 46, "eoi_token_index": 47, "mm_tokens_per_image": 4}
    torch.manual_seed(0)
    model = hf.Gemma3ForConditionalGeneration(hf.Gemma3Config(text_config=text, vision_config=vision, **ids)).eval()
    batch = texts("left")
    with torch.no_grad():
        with attach(model, soft(), always=False).active():
            rows_do_not_depend_on_padding(model, batch)
        prompt = keys(model)
        attach(model, prompt)
        with pytest.raises(InputError, match="the attention window of Gemma3Model has 6"):
            model(**batch)
    with pytest.raises(InputError, match="2-D attention mask"):
        model(batch["input_ids"], attention_mask={"full_attention": None})


def test_local_layers_of_gpt_neo_are_windows() -> None:
    config = hf.GPTNeoConfig(
        vocab_size=48,
        hidden_size=16,
        num_layers=2,
        num_heads=4,
        window_size=6,
        max_position_embeddings=96,
        attention_types=[[["global", "local"], 1]],
    )
    model = hf.GPTNeoForCausalLM(config).eval()
    attach(model, keys(model))
    with pytest.raises(InputError, match="window of GPTNeoModel has 6"):
        model(**texts("right"))


def test_types_of_tokens_are_what_the_model_makes_of_them(tiny: Build) -> None:
    batch = texts("right")
    none = torch.zeros_like(batch["input_ids"])
    decoder = tiny("Bert", head="LMHeadModel", is_decoder=True)
    for model in (decoder, tiny("Mistral", sliding_window=4)):
        attach(model, soft())
        assert gap(model(**batch, token_type_ids=none).logits, model(**batch).logits) < 1e-5
    of_one = decoder(**batch, token_type_ids=none + 1).logits
    table = decoder.bert.embeddings.token_type_embeddings.weight
    prompt = attach(decoder, soft(), always=False).prompt
    types = nn.functional.pad(none + 1, (M, 0))
    embeds = torch.cat([prompt.weight.expand(len(none), -1, -1), decoder.get_input_embeddings()(batch["input_ids"])], 1)
    mask = nn.functional.pad(batch["attention_mask"], (M, 0), value=1)
    with off(decoder):
        by_hand = decoder(inputs_embeds=embeds, attention_mask=mask, token_type_ids=types).logits[:, M:]
    real = batch["attention_mask"].bool()
    assert gap(of_one[real], by_hand[real]) < 1e-5 and gap(table[0], table[1]) > 1e-2


def test_absolute_positions_that_cannot_be_given_ask_for_prompts_of_one_length(tiny: Build) -> None:
    model = tiny("Bart", head="ForCausalLM")
    long, short = (attach(model, SoftPrompt(n, WIDTH), always=False) for n in (M, M - 2))
    batch = {name: x[:2] for name, x in texts("right").items()}
    with route(model, [long, short]), pytest.raises(InputError, match="prompts of unequal length"):
        model(**batch)
    with route(model, [short, short]):
        model(**batch)


def test_router_logits_are_those_of_real_tokens(tiny: Build) -> None:
    options = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.MixtralConfig(vocab_size=48, num_key_value_heads=2, num_local_experts=3, pad_token_id=0, **options)
    model, batch = hf.MixtralForCausalLM(config).eval(), texts("right")
    model(**batch, output_router_logits=True)
    attach(model, soft())
    found = model(**batch, labels=batch["input_ids"], output_router_logits=True)
    assert all(part.shape == (batch["input_ids"].numel(), 3) for part in found.router_logits)
    assert found.aux_loss > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m, None),
        (lambda m: setattr(m.config, "hidden_size_per_layer_input", 4), "looks tokens up by their ids in every layer"),
        (lambda m: setattr(m.config, "kv_lora_rank", 4), "takes no trained keys and values"),
        (lambda m: setattr(m.config, "layer_types", ["linear_attention"] * 2), "takes no trained keys and values"),
    ],
)
def test_what_a_prompt_cannot_enter_is_refused_where_it_is_attached(
    tiny: Build, change: Callable[[Any], Any], message: str | None
) -> None:
    model = tiny("Llama")
    change(model)
    with contextlib.nullcontext() if message is None else pytest.raises(InputError, match=message):
        attach(model, keys(tiny("Llama")))


def test_encoders_refuse_what_they_do_not_take_where_it_is_attached(tiny: Build) -> None:
    with pytest.raises(InputError, match="takes no trained keys and values"):
        attach(tiny("DistilBert"), keys(tiny("Bert")))
    config = hf.UMT5Config(vocab_size=48, d_model=WIDTH, d_kv=4, d_ff=32, num_layers=2, num_heads=4)
    model, batch = hf.UMT5EncoderModel(config).eval(), texts("right")
    with pytest.raises(InputError, match="says that it has a decoder"):
        attach(model, soft())
    model.config.is_encoder_decoder = False
    attach(model, soft())
    assert model(**batch).last_hidden_state.shape[1] == batch["input_ids"].shape[1]


def test_a_model_of_peft_says_where_the_prompt_belongs(tiny: Build) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny("Llama"), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    with pytest.raises(InputError, match=r"Attach the prompt to its `get_base_model\(\)`"):
        attach(model, soft())


@pytest.mark.parametrize("what", ["tokens", "keys and values"])
@pytest.mark.parametrize("kind", ["Llama", "OPT"])
def test_rows_may_have_adapters_of_their_own_under_a_prompt(tiny: Build, kind: str, what: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: the extra `peft` of pt-nlp")
    lora = partial(peft.LoraConfig, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    model = tiny(kind)
    adapted, batch = peft.get_peft_model(model, lora(task_type="CAUSAL_LM")).eval(), texts("left")
    adapted.add_adapter("other", lora())
    attach(model, soft() if what == "tokens" else keys(model))
    names = ["default", "other", "default"]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad(), carried.reads(batch["attention_mask"].bool()):
        for cached in (True, False):
            together = adapted(**batch, adapter_names=names, use_cache=cached).logits
            written = adapted.generate(**batch, adapter_names=names, use_cache=cached, **options)
            for i, name in enumerate(names):
                adapted.set_adapter(name)
                real = batch["attention_mask"][i].bool()
                assert gap(together[i][real], adapted(**alone(model, batch, i), use_cache=cached).logits[0]) < 1e-4
                row = adapted.generate(**alone(model, batch, i), use_cache=cached, **options)
                assert torch.equal(written[i, -4:], row[0, -4:])


@pytest.mark.parametrize("what", ["hook", "pre-hook", "buffer"])
def test_stored_keys_and_values_follow_hooks_and_buffers(tiny: Build, what: str) -> None:
    model, batch = tiny("Llama"), texts("left")
    attach(model, soft())
    with torch.no_grad():
        before = model(**batch).logits
        layer = model.model.layers[0]
        if what == "hook":
            layer.self_attn.k_proj.register_forward_hook(lambda module, args, output: output * 2)
        elif what == "pre-hook":
            layer.self_attn.k_proj.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        else:
            model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 3
        after = model(**batch).logits
    fresh = with_gradient(model, model.pt_prompt_0, batch)[2]  # nothing is stored with gradient
    real = batch["attention_mask"].bool()
    assert gap(after[real], before[real]) > 1e-2 and gap(after[real], fresh) < 1e-4


# --- hooks of others --------------------------------------------------------------------------------------------------
def last_token(module: nn.Module, arguments: Any, output: Any) -> Any:
    h = (output[0] if isinstance(output, tuple) else output).clone()
    h[:, -1] += 3
    return (h, *output[1:]) if isinstance(output, tuple) else h


def first_row(module: nn.Module, arguments: Any, output: Any) -> Any:
    h = (output[0] if isinstance(output, tuple) else output).clone()
    h[:1] *= 0
    return (h, *output[1:]) if isinstance(output, tuple) else h


@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("hook", [last_token, first_row])
@pytest.mark.parametrize("kind", SHARED)
def test_a_hook_in_a_block_sees_the_rows_of_the_batch(
    tiny: Build, kind: str, hook: Callable[..., Any], cached: bool
) -> None:
    model, prompt = tiny(kind), soft()
    ids = texts()["input_ids"][:1].repeat(3, 1)
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    models.decoder_blocks(model.base_model)[0].register_forward_hook(hook)
    expected = concatenated(model, prompt.weight, whole)
    attach(model, prompt)
    with torch.no_grad():
        assert gap(model(**whole, use_cache=cached).logits, expected) < 1e-5
    assert gap(with_gradient(model, prompt, whole, use_cache=cached)[2], expected.flatten(0, 1)) < 1e-5


def test_hooks_of_libraries_and_on_embeddings_leave_the_shared_prefix(tiny: Build) -> None:
    model = tiny("Llama")
    model.enable_input_require_grads()  # transformers' own hook
    model.get_input_embeddings().register_forward_hook(lambda module, arguments, output: output * 2)
    model(**texts(), output_hidden_states=True)  # transformers hooks blocks to collect them
    assert models.shortcut_refused(model.base_model) is None
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, arguments: None)
    assert models.shortcut_refused(model.base_model) == "a hook reads or changes states of the model"


# --- what is scaled, counted or read elsewhere -----------------------------------------------------------------------
SEQ2SEQ = {
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "max_position_embeddings": 64,
    "init_std": 0.3,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    "scale_embedding": True,
}


def seq2seq(kind: str, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    suffix = "MTModel" if kind == "Marian" else "ForConditionalGeneration"
    model: nn.Module = getattr(hf, kind + suffix)(getattr(hf, f"{kind}Config")(**SEQ2SEQ | changes))
    return model.eval().requires_grad_(False)


def falcon_h1() -> nn.Module:
    torch.manual_seed(0)
    mamba = {f"mamba_{name}": value for name, value in {"d_ssm": 32, "n_heads": 4, "d_head": 8, "d_state": 8}.items()}
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.FalconH1Config(
        vocab_size=VOCAB,
        num_key_value_heads=2,
        mamba_n_groups=1,
        mamba_chunk_size=4,
        embedding_multiplier=5.65,
        pad_token_id=0,
        **sizes,
        **mamba,
    )
    return hf.FalconH1ForCausalLM(config).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ["Bart", "Marian", "Pegasus", "BlenderbotSmall", "Mvp", "FalconH1"])
def test_property_5_a_text_as_a_prompt_is_that_text_as_tokens_where_embeddings_are_scaled(kind: str) -> None:
    model = falcon_h1() if kind == "FalconH1" else seq2seq(kind)
    text = torch.tensor([[9, 8, 7, 6, 5]])
    more = {"decoder_input_ids": torch.tensor([[2, 5, 6]])} if model.config.is_encoder_decoder else {}
    expected = model(input_ids=torch.cat([torch.tensor([[40, 41, 42]]), text], dim=1), **more).logits
    plain = model(input_ids=text, **more).logits
    started = PromptTuning(model, PromptTuningConfig(prompt_length=3, init="text", init_ids=(40, 41, 42)))
    rows = started.prompt.weight.detach()
    started.remove()
    handle = attach(model, SoftPrompt(3, rows.shape[1], init=rows))
    found = model(input_ids=text, **more).logits
    assert gap(found, expected[:, -found.shape[1] :]) < 1e-4 and gap(found, plain) > 0.01
    handle.remove()
    attach(model, SoftPrompt(0, rows.shape[1]))
    assert gap(model(input_ids=text, **more).logits, plain) < 1e-6


@pytest.mark.parametrize("kind", ["Bart", "Marian"])
@pytest.mark.parametrize("sizes", [(3, 2, 2, 4), (2, 3, 4, 2)], ids=str)
def test_keys_and_values_are_those_of_the_decoder_where_towers_differ(kind: str, sizes: tuple[int, ...]) -> None:
    names = ("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads")
    model = seq2seq(kind, **dict(zip(names, sizes, strict=True)))
    shape = models.shape_of(model)
    assert (shape.layers, shape.kv_heads, shape.head_dim) == (sizes[1], sizes[3], WIDTH // sizes[3])
    arguments = {"input_ids": torch.tensor([[9, 8, 7]]), "decoder_input_ids": torch.tensor([[2, 5, 6]])}
    plain = model(**arguments).logits
    prompt = keys(model)
    attach(model, prompt)
    with torch.no_grad():
        found = model(**arguments).logits
        assert gap(found, plain) > 1e-3
        prompt.weight[:, 0] = -40.0 * model.model.decoder.layers[0].self_attn.q_proj.weight.abs().max()
        prompt.weight[:, 1] = 0
    assert model(**arguments).logits.isfinite().all()


@pytest.mark.parametrize("kind", ["ViTModel", "CLIPVisionModel", "WhisperForConditionalGeneration"])
def test_models_that_read_no_text_are_refused(kind: str) -> None:
    small = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 8,
    }
    audio = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 9, "num_mel_bins": 8}
    audio |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    audio |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    cls = getattr(hf, kind)
    config = cls.config_class(**audio) if "Whisper" in kind else cls.config_class(**small, patch_size=4)
    with pytest.raises(InputError, match=rf"a {kind} reads no text \(but (pixel_values|input_features)\)"):
        attach(cls(config), soft(width=8))


def test_a_call_without_a_text_is_refused_as_without_a_prompt(tiny: Build) -> None:
    model = tiny("Llama")
    attach(model, soft())
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model()


def test_a_state_that_was_filled_under_a_prompt_does_not_go_on_without_it(tiny: Build) -> None:
    model = tiny("Mamba")
    handle = attach(model, soft())
    with torch.no_grad():
        cache = model(input_ids=texts()["input_ids"][:1], use_cache=True).cache_params
        handle.enabled(False)
        with pytest.raises(InputError, match="the cache was filled under a prompt"):
            model(input_ids=torch.tensor([[5]]), cache_params=cache)
        cache.reset()
        text = texts()["input_ids"][:1]
        assert gap(model(input_ids=text, cache_params=cache).logits, model(input_ids=text).logits) < 1e-6


@pytest.mark.parametrize("kind", ["Llama", "Gemma"])
def test_a_prompted_model_is_exported_without_gradient(tiny: Build, kind: str) -> None:
    model, ids = tiny(kind), texts()["input_ids"][:1]
    attach(model, soft())
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        program = torch.export.export(model, (), {"input_ids": ids, "use_cache": False}, strict=False)
        assert gap(program.module()(input_ids=ids, use_cache=False).logits, expected) < 1e-5
