"""Prompted backbones write text: `generate` in its ways, caches, streams, pipelines."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from contextvars import copy_context
from threading import Thread

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TextIteratorStreamer, TextStreamer, pipeline

from pt_core.attachment import attach
from pt_core.errors import InputError
from pt_core.prompts import DeepPrompt, KeyValuePrompt, Prompt, SoftPrompt
from pt_nlp import models

WIDTH, M = 16, 5
SHARED = ["Llama", "Qwen2", "Qwen3", "Mistral", "GPT2", "GPTNeoX"]
Build = Callable[..., nn.Module]

WAYS = {
    "greedy": {"do_sample": False},
    "beam": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 0, "temperature": 1.0},
    "beam sampling": {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
}


def soft(seed: int = 1, length: int = M) -> SoftPrompt:
    return SoftPrompt(length, WIDTH, std=0.5, generator=torch.Generator().manual_seed(seed))


def keys(model: nn.Module, seed: int = 2, length: int = M) -> KeyValuePrompt:
    shape = models.shape_of(model)
    generator = torch.Generator().manual_seed(seed)
    return KeyValuePrompt(shape.layers, shape.kv_heads, shape.head_dim, length, std=0.5, generator=generator)


def texts(n: int = 8) -> dict[str, Tensor]:
    """Rows of n, n - 3 and n - 5 tokens, padded with 0 on the left."""
    ids = torch.randint(3, 40, (3, n), generator=torch.Generator().manual_seed(7))
    mask = (torch.arange(n)[None] >= torch.tensor([0, 3, 5])[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def write(model: nn.Module, batch: dict[str, Tensor], **options) -> Tensor:
    torch.manual_seed(5)
    tokens: Tensor = model.generate(**batch, **{"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0} | options)
    return tokens


def by_hand(model: nn.Module, prompt: Prompt, ids: Tensor, steps: int = 7) -> Tensor:
    """Greedy continuation of one row by plain calls on [prompt, text], without cache, masks or `generate`."""
    rows = prompt.tokens()
    for _ in range(steps):
        embeds = torch.cat([rows[None], model.get_input_embeddings()(ids)], dim=1)
        ids = torch.cat([ids, model(inputs_embeds=embeds, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.parametrize("path", ["shared", "plain"])
@pytest.mark.parametrize("kind", [*SHARED, "OPT"])
def test_greedy_text_of_a_padded_batch_is_that_of_a_loop_by_hand(
    tiny: Build, kind: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "plain":
        monkeypatch.setattr(models, "SHARED_PREFIX", set())
    model, prompt, batch = tiny(kind), soft(), texts()
    expected = [by_hand(model, prompt, ids[m.bool()][None]) for ids, m in zip(*batch.values(), strict=True)]
    unprompted = write(model, batch)
    attach(model, prompt)
    written = write(model, batch)
    assert not torch.equal(written, unprompted)
    assert len(set(written[:, 8:].flatten().tolist())) > 3  # not one token over and over
    for row, alone in zip(written, expected, strict=True):
        assert torch.equal(row[-7:], alone[0, -7:])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", ["tokens", "keys and values"])
@pytest.mark.parametrize("kind", ["Llama", "GPT2", "GPTNeoX", "T5"])
def test_with_and_without_a_cache_the_text_is_the_same(tiny: Build, kind: str, what: str, way: str) -> None:
    model, batch = tiny(kind), texts()
    unprompted = write(model, batch, **WAYS[way])
    attach(model, soft() if what == "tokens" else keys(model))
    written = write(model, batch, **WAYS[way])
    assert torch.equal(written, write(model, batch, **WAYS[way], use_cache=False))
    assert torch.equal(written, write(model, batch, **WAYS[way]))
    assert not torch.equal(written, unprompted)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", SHARED)
def test_the_shared_prefix_writes_what_the_plain_path_writes(
    tiny: Build, kind: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = tiny(kind), texts()
    attach(model, soft())
    written = write(model, batch, **WAYS[way])
    monkeypatch.setattr(models, "SHARED_PREFIX", set())
    assert torch.equal(written, write(model, batch, **WAYS[way]))


@pytest.mark.parametrize("kind", ["Mistral", "Qwen2"])
def test_with_sliding_windows_the_text_is_the_same_with_and_without_a_cache(tiny: Build, kind: str) -> None:
    options = {"sliding_window": 6} | (
        {} if kind == "Mistral" else {"use_sliding_window": True, "max_window_layers": 1}
    )
    model, batch = tiny(kind, **options), texts()
    attach(model, soft())
    for way in ("greedy", "beam"):
        assert torch.equal(write(model, batch, **WAYS[way]), write(model, batch, **WAYS[way], use_cache=False))


@pytest.mark.parametrize("kind", ["Mistral", "Qwen2", "Mpt", "Falcon"])
def test_padding_on_the_left_is_no_distance_between_prompt_and_text(tiny: Build, kind: str) -> None:
    window = {"sliding_window": 6} | ({} if kind == "Mistral" else {"use_sliding_window": True, "max_window_layers": 1})
    options = {"Mpt": {}, "Falcon": {"alibi": True}}.get(kind, window)
    model, prompt, batch = tiny(kind, **options), soft(), texts()
    expected = [by_hand(model, prompt, ids[m.bool()][None]) for ids, m in zip(*batch.values(), strict=True)]
    attach(model, prompt)
    for cached in (True, False):
        for row, alone in zip(write(model, batch, use_cache=cached), expected, strict=True):
            assert torch.equal(row[-7:], alone[0, -7:])


def test_a_recurrent_model_writes_the_same_with_and_without_a_cache(tiny: Build) -> None:
    model, prompt = tiny("Mamba"), soft()
    ids = texts()["input_ids"][:1]
    expected = by_hand(model, prompt, ids)
    attach(model, prompt)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(write(model, batch), expected)
    assert torch.equal(write(model, batch, use_cache=False), expected)


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "OPT"])
def test_prompt_lookup_decoding_writes_the_greedy_text(tiny: Build, kind: str) -> None:
    model = tiny(kind)
    attach(model, soft())
    ids = texts()["input_ids"][:1].repeat(1, 2)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    greedy = write(model, batch, max_new_tokens=16)
    assert torch.equal(write(model, batch, max_new_tokens=16, prompt_lookup_num_tokens=3), greedy)


@pytest.mark.parametrize("what", ["tokens", "keys and values"])
@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Gemma"])  # GPT-2, OPT and others always run all blocks
def test_a_model_that_drafts_with_its_first_block_writes_the_greedy_text(tiny: Build, kind: str, what: str) -> None:
    model, batch = tiny(kind), {name: part[:1] for name, part in texts().items()}
    attach(model, soft() if what == "tokens" else keys(model))
    drafted = [write(model, batch, assistant_early_exit=1) for _ in range(2)]
    written = write(model, batch)
    assert torch.equal(drafted[0], written) and torch.equal(drafted[1], written)
    assert len(models.decoder_blocks(models.base_of(model))) == model.config.num_hidden_layers == 2


@pytest.mark.parametrize("path", ["shared", "plain", "block 0", "block 1"])
def test_a_conversation_goes_on_from_its_cache(tiny: Build, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "plain":
        monkeypatch.setattr(models, "SHARED_PREFIX", set())
    model, batch = tiny("Llama"), texts()
    attach(model, DeepPrompt([int(path[-1])], M, WIDTH, std=0.5) if path.startswith("block") else soft())
    first = write(model, batch, return_dict_in_generate=True)
    assert first.past_key_values.get_seq_length() == 14  # 8 read, 7 written, the last not read
    kept = copy.deepcopy(first.past_key_values)
    question = torch.tensor([[9, 4], [5, 6], [7, 11]])
    dialogue = {
        "input_ids": torch.cat([first.sequences, question], 1),
        "attention_mask": F.pad(batch["attention_mask"], (0, 9), value=1),
    }
    expected = write(model, dialogue)
    assert torch.equal(write(model, dialogue, past_key_values=first.past_key_values), expected)
    assert kept.get_seq_length() == 14
    assert torch.equal(write(model, dialogue, past_key_values=kept), expected)


@pytest.mark.parametrize("kind", ["Llama", "OPT", "T5"])
def test_a_cache_that_was_filled_under_a_prompt_is_not_pickled(tiny: Build, kind: str) -> None:
    model, batch = tiny(kind), texts()
    handle = attach(model, keys(model))
    cache = write(model, batch, return_dict_in_generate=True).past_key_values
    for save in (pickle.dumps, lambda made: torch.save(made, io.BytesIO())):
        with pytest.raises(InputError, match="cannot be pickled.*Save the prompt's artifact"):
            save(cache)
    handle.enabled(False)
    pickle.dumps(write(model, batch, return_dict_in_generate=True).past_key_values)  # others are


def test_text_of_embeddings_is_that_of_their_tokens(tiny: Build) -> None:
    model, batch = tiny("Llama"), texts()
    attach(model, soft())
    embeds = model.get_input_embeddings()(batch["input_ids"])
    written = write(model, {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"]})
    assert torch.equal(written, write(model, batch)[:, 8:])


@pytest.mark.parametrize("kind", ["Llama", "T5"])
def test_scores_and_states_of_generation_have_no_prompt_positions(tiny: Build, kind: str) -> None:
    model, batch = tiny(kind), texts()
    attach(model, soft())
    told = write(model, batch, return_dict_in_generate=True, output_scores=True, output_hidden_states=True)
    assert [tuple(s.shape) for s in told.scores] == [(3, 48)] * 7
    states = told.decoder_hidden_states if kind == "T5" else told.hidden_states
    assert [h[0].shape[1] for h in states] == [1 if kind == "T5" else 8] + [1] * 6


def test_streamed_text_is_the_text(tiny: Build, words, capsys: pytest.CaptureFixture) -> None:
    model = tiny("Llama")
    handle = attach(model, soft(), always=False)
    batch = dict(words(["the film was good"], return_tensors="pt"))
    with handle.active():
        text = words.decode(write(model, batch)[0, 4:])
        write(model, batch, streamer=TextStreamer(words, skip_prompt=True))
    assert capsys.readouterr().out.strip() == text.strip()
    streamer = TextIteratorStreamer(words, skip_prompt=True)

    def run() -> None:  # a thread has a context of its own: the prompt is chosen inside of it
        with handle.active():
            write(model, batch, streamer=streamer)

    thread = Thread(target=run)
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert len(pieces) > 1
    assert "".join(pieces).strip() == text.strip()


def test_a_thread_that_is_given_the_context_streams_under_its_prompt(tiny: Build, words) -> None:
    model = tiny("Llama")
    handle = attach(model, soft(), always=False)
    batch = dict(words(["the film was good"], return_tensors="pt"))
    options = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0}

    def streamed(target: Callable, *args: Callable) -> str:
        streamer = TextIteratorStreamer(words, skip_prompt=True)
        thread = Thread(target=target, args=args, kwargs=batch | options | {"streamer": streamer})
        thread.start()
        text = "".join(streamer).strip()
        thread.join()
        return text

    unprompted = words.decode(write(model, batch)[0, 4:]).strip()
    with handle.active():
        prompted = words.decode(write(model, batch)[0, 4:]).strip()
        assert streamed(copy_context().run, model.generate) == prompted
        assert streamed(model.generate) == unprompted != prompted


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_the_pipeline_of_transformers_writes_what_generate_writes(tiny: Build, words, kind: str) -> None:
    model = tiny(kind)
    lines = ["the film was good", "sport", "a great red sun was"]
    write_lines = pipeline("text-generation", model=model, tokenizer=words, batch_size=3, device="cpu")
    options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}

    def piped() -> list[str]:
        return [answer[0]["generated_text"] for answer in write_lines(lines, **options)]

    unprompted = piped()
    handle = attach(model, soft())
    assert type(write_lines.model) is type(model)
    batch = dict(words(lines, return_tensors="pt", padding=True))
    tokens = write(model, batch, max_new_tokens=6)[:, batch["input_ids"].shape[1] :]
    prompted = piped()
    assert [text.strip() for text in prompted] == [text.strip() for text in words.batch_decode(tokens)]
    assert prompted != unprompted
    handle.remove()
    assert piped() == unprompted


def test_a_static_cache_of_generate_is_refused_with_the_remedy(tiny: Build) -> None:
    model = tiny("Llama")
    attach(model, soft())
    for batch in (texts(), {name: value[:1] for name, value in texts().items()}):
        with pytest.raises(InputError, match="leave its cache dynamic"):
            write(model, batch, cache_implementation="static")


@pytest.mark.parametrize("kind", ["Llama", "T5"])
def test_trained_keys_and_values_write_by_a_loop_without_cache(tiny: Build, kind: str) -> None:
    model, batch = tiny(kind), texts()
    attach(model, keys(model))
    written = write(model, batch)
    tokens = torch.zeros(3, 1, dtype=torch.long) if kind == "T5" else batch["input_ids"]
    mask = batch["attention_mask"]
    for _ in range(7):
        if kind == "T5":
            logits = model(**batch, decoder_input_ids=tokens, use_cache=False).logits
        else:
            logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
            mask = F.pad(mask, (0, 1), value=1)
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(written, tokens)
    assert len(set(written[:, -7:].flatten().tolist())) > 2  # it does not write one token for ever
