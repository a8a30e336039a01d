"""One backbone, many prompts: every row of a batch gets exactly what it would get alone under its own prompt."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pt_core.attachment import Handle, attach, route
from pt_core.errors import InputError
from pt_core.prompts import DeepPrompt, KeyValuePrompt, SoftPrompt
from pt_nlp import models
from pt_nlp.methods.dept import DecomposedPrompt

WIDTH = 16
SHARED = ["Llama", "Qwen2", "Qwen3", "Mistral", "GPT2", "GPTNeoX"]
COUNT_SLOTS: dict[str, dict] = {  # windows and distances that take padding inside of a text for text
    "Mistral": {"sliding_window": 6},
    "Qwen2": {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 1},
    "Mpt": {},
}
Build = Callable[..., nn.Module]


def soft(seed: int, length: int) -> SoftPrompt:
    return SoftPrompt(length, WIDTH, std=0.5, generator=torch.Generator().manual_seed(seed))


def keys(model: nn.Module, seed: int, length: int) -> KeyValuePrompt:
    shape = models.shape_of(model)
    generator = torch.Generator().manual_seed(seed)
    return KeyValuePrompt(shape.layers, shape.kv_heads, shape.head_dim, length, std=0.5, generator=generator)


def several(model: nn.Module, what: str = "mixed") -> list[Handle | None]:
    """For each of five rows a prompt of its own length, another one, one that two rows share, or none."""
    a, b = (attach(model, soft(seed, length), always=False) for seed, length in ((1, 5), (2, 2)))
    c = attach(model, keys(model, 3, 3) if what == "mixed" else soft(3, 3), always=False)
    return [a, b, None, c, a]


def texts(side: str) -> dict[str, Tensor]:
    ids = torch.randint(3, 40, (5, 7), generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(7)[None] < torch.tensor([7, 4, 6, 3, 5])[:, None]).long()
    mask = mask.flip(1) if side == "left" else mask
    return {"input_ids": ids * mask, "attention_mask": mask}


def read(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Logits or hidden states of the tokens; for an encoder-decoder, those of four tokens behind the text."""
    if model.config.is_encoder_decoder:
        return model(**batch, decoder_input_ids=batch["input_ids"][:, :4]).logits
    result = model(**batch)
    return result.logits if "logits" in result else result.last_hidden_state


def alone(model: nn.Module, batch: dict[str, Tensor], rows: list[Handle | None], call: Callable) -> list[Tensor]:
    """`call` on every row by itself, unpadded, with its own prompt attached and nothing routed row by row."""
    results = []
    for i, handle in enumerate(rows):
        keep = batch["attention_mask"][i].bool()
        row = {"input_ids": batch["input_ids"][i][keep][None], "attention_mask": torch.ones(1, int(keep.sum())).long()}
        if model.config.is_encoder_decoder and call is read:
            row["decoder_input_ids"] = batch["input_ids"][i : i + 1, :4]
            with route(model, [handle]):
                results.append(model(**row).logits[0])
            continue
        with route(model, [handle]):
            results.append(call(model, row)[0])
    return results


def gap(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape, f"{tuple(a.shape)} is not {tuple(b.shape)}"
    return float((a.detach() - b.detach()).abs().max())


def check_rows(model: nn.Module, batch: dict[str, Tensor], rows: list[Handle | None]) -> None:
    with route(model, rows):
        together = read(model, batch)
    for i, row in enumerate(alone(model, batch, rows, read)):
        own = together[i] if model.config.is_encoder_decoder else together[i][batch["attention_mask"][i].bool()]
        assert gap(own, row) < 1e-5
    assert gap(together[0][-1:], together[4][-1:]) > 1e-3


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", SHARED)
def test_rows_of_a_language_model_get_what_they_get_alone(tiny: Build, kind: str, side: str, grad: bool) -> None:
    model = tiny(kind)
    with torch.set_grad_enabled(grad):
        check_rows(model, texts(side), several(model))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["Llama", "GPT2", "OPT"])
def test_rows_on_the_plain_path_get_what_they_get_alone(
    tiny: Build, kind: str, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "SHARED_PREFIX", set())
    model = tiny(kind)
    check_rows(model, texts(side), several(model, "rows only"))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["Llama", "T5"])
def test_the_longest_source_of_an_offset_is_that_of_its_own_rows(tiny: Build, kind: str) -> None:
    model, batch = tiny(kind), texts("right")
    prompt = DecomposedPrompt(torch.randn(2, 16, generator=torch.Generator().manual_seed(5)), positions=4, rank=2)
    assert prompt.low_rank is not None
    nn.init.normal_(prompt.low_rank.B)
    offset, plain = attach(model, prompt, always=False), attach(model, soft(1, 2), always=False)
    check_rows(model, batch, [plain, offset, plain, offset, plain])  # of 7, 4, 6, 3 and 5 tokens
    with route(model, [plain, offset, offset, offset, plain]), pytest.raises(InputError, match="a source of 6 tokens"):
        read(model, batch)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", COUNT_SLOTS)
def test_rows_of_models_that_count_slots_get_what_they_get_alone(
    tiny: Build, kind: str, side: str, attention: str
) -> None:
    options = {} if kind == "Mpt" else {"attn_implementation": attention}  # MPT has its own attention only
    model = tiny(kind, **COUNT_SLOTS[kind], **options)
    rows = several(model, "rows only")
    check_rows(model, texts(side), rows)
    check_rows(model, texts(side), [rows[0]] * 5)


@pytest.mark.parametrize("way", [{}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("kind", COUNT_SLOTS)
def test_rows_of_models_that_count_slots_write_what_they_write_alone(tiny: Build, kind: str, way: dict) -> None:
    model, batch = tiny(kind, **COUNT_SLOTS[kind]), texts("left")
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0} | way
    handles = several(model, "rows only")
    for rows in (handles, [handles[0]] * 5):
        with route(model, rows):
            together = model.generate(**batch, **options)
            assert torch.equal(together, model.generate(**batch, **options, use_cache=False))
        for i, handle in enumerate(rows):
            keep = batch["attention_mask"][i].bool()
            with route(model, [handle]):
                row = model.generate(input_ids=batch["input_ids"][i][keep][None], **options)
            assert torch.equal(together[i, -8:], row[0, -8:])
        assert len({tuple(row[-8:].tolist()) for row in together}) > 3


@pytest.mark.parametrize("kind", COUNT_SLOTS)
def test_padding_in_front_of_the_prompt_shows_in_no_state_and_no_step(tiny: Build, kind: str) -> None:
    options = {} if kind == "Mpt" else {"attn_implementation": "eager"}
    model, batch = tiny(kind, **COUNT_SLOTS[kind], **options), texts("left")
    attach(model, soft(1, 5))
    told = {"output_hidden_states": True, "output_attentions": True, "use_cache": True}
    # The first call is shorter than the padding of the last row: the rest of it comes in the second.
    parts = {"input_ids": batch["input_ids"][:, :5], "attention_mask": batch["attention_mask"][:, :5]}
    first = model(**parts, **told)
    rest = model(
        input_ids=batch["input_ids"][:, 5:],
        attention_mask=batch["attention_mask"],
        past_key_values=first.past_key_values,
    )
    whole = model(**batch, **told)
    for i, mask in enumerate(batch["attention_mask"].bool()):
        alone = model(input_ids=batch["input_ids"][i][mask][None], **told)
        n = int(mask.sum())
        for ours, theirs in zip(whole.hidden_states, alone.hidden_states, strict=True):
            assert gap(ours[i][mask], theirs[0]) < 1e-5
        for ours, theirs in zip(whole.attentions, alone.attentions, strict=True):
            assert gap(ours[i][:, mask, -5 - n :], theirs[0]) < 1e-5
        assert gap(rest.logits[i], alone.logits[0, -2:]) < 1e-5


@pytest.mark.parametrize("kind", ["Mistral", "Qwen2"])
def test_padding_that_goes_on_behind_the_first_call_is_refused_where_it_would_be_distance(
    tiny: Build, kind: str
) -> None:
    model, batch = tiny(kind, **COUNT_SLOTS[kind]), texts("left")  # padded by at most 4
    attach(model, soft(1, 5))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    written = model.generate(**batch, **options)
    for size in (4, 5):
        assert torch.equal(model.generate(**batch, **options, prefill_chunk_size=size), written)
    for size in (1, 3):
        with pytest.raises(InputError, match=f"padding on the left goes on behind the first {size} tokens"):
            model.generate(**batch, **options, prefill_chunk_size=size)


def test_padding_of_a_later_call_is_read_as_long_as_the_window_sees_everything(tiny: Build) -> None:
    model, batch = tiny("Mistral", sliding_window=16), texts("left")
    attach(model, soft(1, 5))
    options = {"do_sample": False, "pad_token_id": 0}
    written = model.generate(**batch, **options, max_new_tokens=4)  # reads 5 + 7 + 3
    assert torch.equal(model.generate(**batch, **options, max_new_tokens=4, prefill_chunk_size=2), written)
    with pytest.raises(InputError, match="padding on the left goes on behind the first 2 tokens"):
        model.generate(**batch, **options, max_new_tokens=8, prefill_chunk_size=2)


@pytest.mark.parametrize("what", ["mixed", "rows only"])
@pytest.mark.parametrize("kind", ["Bert", "Roberta", "T5"])
def test_rows_of_encoders_and_encoder_decoders_get_what_they_get_alone(tiny: Build, kind: str, what: str) -> None:
    model = tiny(kind)
    check_rows(model, texts("right"), several(model, what))


@pytest.mark.parametrize("kind", ["Llama", "T5"])
def test_prompts_of_one_batch_get_the_gradients_that_they_get_alone(tiny: Build, kind: str) -> None:
    # T5 counts distances over padding: its sources are padded on the right, so that the prompt stays beside the text.
    model, batch = tiny(kind), texts("right" if kind == "T5" else "left")
    rows = several(model)

    def gradients(call: Callable[[], Tensor]) -> list[Tensor]:
        prompts = {id(h): h.prompt for h in rows if h is not None}.values()
        for prompt in prompts:
            prompt.zero_grad()
        call().backward()
        return [prompt.weight.grad.clone() for prompt in prompts]

    def together() -> Tensor:
        with route(model, rows):
            return read(model, batch)[:, -1].square().sum()

    def apart() -> Tensor:
        return torch.stack([row[-1].square().sum() for row in alone(model, batch, rows, read)]).sum()

    for a, b in zip(gradients(together), gradients(apart), strict=True):
        assert gap(a, b) < 1e-5 * float(b.abs().max())
        assert float(b.abs().max()) > 1e-3


@pytest.mark.parametrize("way", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("kind", ["Llama", "GPT2", "GPTNeoX", "T5"])
def test_rows_write_what_they_write_alone(tiny: Build, kind: str, way: dict) -> None:
    # T5 counts distances over padding: its sources are padded on the right, so that the prompt stays beside the text.
    model, batch = tiny(kind), texts("right" if kind == "T5" else "left")
    rows = several(model)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0} | way
    with route(model, rows):
        together = model.generate(**batch, **options)
        uncached = model.generate(**batch, **options, use_cache=False)
    assert torch.equal(together, uncached)
    each = way.get("num_return_sequences", 1)
    for i, handle in enumerate(rows):
        keep = batch["attention_mask"][i].bool()
        with route(model, [handle]):
            row = model.generate(input_ids=batch["input_ids"][i][keep][None], **options)
        assert torch.equal(together[i * each : (i + 1) * each, -6:], row[:, -6:])
    assert len({tuple(row[-6:].tolist()) for row in together}) > 3


def test_a_cache_belongs_to_its_rows(tiny: Build) -> None:
    model, batch = tiny("Llama"), texts("left")
    rows = several(model)
    step = {"input_ids": batch["input_ids"][:, -1:], "attention_mask": F.pad(batch["attention_mask"], (0, 1), value=1)}
    with route(model, rows):
        cache = model(**batch, use_cache=True).past_key_values
        assert cache.get_seq_length() == 7
    with route(model, rows[::-1]), pytest.raises(InputError, match="filled without this prompt, or under another one"):
        model(**step, past_key_values=cache)
    longer = {name: torch.cat([batch[name], part[:, -1:]], 1) for name, part in step.items()}
    with route(model, rows):
        stepped = model(**step, past_key_values=cache).logits[:, -1]
        assert gap(stepped, model(**longer).logits[:, -1]) < 1e-5


def test_one_handle_serves_all_rows_and_rows_repeat_for_larger_batches(tiny: Build) -> None:
    model, batch = tiny("Llama"), texts("left")
    a, b, *_ = several(model)
    with a.active():
        expected = model(**batch).logits
    with route(model, [a] * 5):
        assert torch.equal(model(**batch).logits, expected)
    twice = {name: part.repeat_interleave(2, 0) for name, part in batch.items()}
    rows = [a, b, None, a, b]
    with route(model, rows):
        once = model(**batch).logits
        assert gap(model(**twice).logits, once.repeat_interleave(2, 0)) < 1e-5


def test_routes_that_do_not_fit_are_refused(tiny: Build) -> None:
    model, other, batch = tiny("Llama"), tiny("Llama", seed=1), texts("left")
    rows = several(model)
    foreign = attach(other, soft(1, 5), always=False)
    with pytest.raises(InputError, match="another backbone"), route(model, [foreign]):
        pass
    with pytest.raises(InputError, match="3 prompts were routed to a batch of 5 rows"), route(model, rows[:3]):
        model(**batch)
    rows[1].remove()
    with pytest.raises(InputError, match="was removed"), route(model, rows):
        pass


def test_prompts_inside_of_the_tower_do_not_share_a_batch(tiny: Build) -> None:
    for kind in ("Llama", "Bert"):
        model = tiny(kind)
        deep, flat = attach(model, DeepPrompt([1], 3, WIDTH), always=False), attach(model, soft(1, 5), always=False)
        with pytest.raises(InputError, match="inside the tower"), route(model, [deep, flat, None, deep, deep]):
            model(**texts("right"))


def test_absolute_positions_that_a_model_counts_itself_refuse_prompts_of_unequal_length(tiny: Build) -> None:
    model, batch = tiny("Bart"), texts("right")
    a, b, c = (attach(model, soft(seed, length), always=False) for seed, length in ((1, 5), (2, 5), (3, 2)))
    check_rows(model, batch, [a, b, b, a, b])
    for rows in ([a, b, c, a, b], [a, None, b, a, a]):
        with pytest.raises(InputError, match="unequal length"), route(model, rows):
            read(model, batch)
