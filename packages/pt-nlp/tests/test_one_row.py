"""Attention of texts behind a shared prompt, as one row: in parts, in rows or in one call with a mask, and by hand."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from pt_nlp import one_row
from pt_nlp.one_row import NotPlain, SharedPrefixAttention, Texts

L, HEADS, KV_HEADS, D = 5, 6, 2, 8
MASKS = {
    "no padding": [[1, 1, 1], [1, 1, 1]],
    "right": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]],
    "left": [[0, 0, 1, 1], [1, 1, 1, 1]],
    "both": [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0]],
    "an empty text": [[0, 0, 0], [1, 1, 0]],
}


def texts(kind: str) -> Texts:
    found = Texts.of(torch.tensor(MASKS[kind]))
    assert found is not None
    return found


def heads(tokens: int, heads: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """[1, h, tokens, d], laid out as projections leave it."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(1, tokens, heads, D, generator=generator, dtype=torch.float64).to(dtype)
    return made.transpose(1, 2).requires_grad_()


def row(count: int, inside: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    queries = count + L if inside else count
    return heads(queries, HEADS, 1, dtype), heads(L + count, KV_HEADS, 2, dtype), heads(L + count, KV_HEADS, 3, dtype)


def by_hand(query: Tensor, key: Tensor, value: Tensor, kind: str, scale: float) -> Tensor:
    """Softmax over the prompt and what stands in front of a token in its own text, token by token."""
    key, value = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (key, value))
    owner = [i for i, mask in enumerate(MASKS[kind]) for real in mask if real]
    ahead = query.shape[2] - len(owner)
    outputs = []
    for i in range(query.shape[2]):
        if i < ahead:
            seen = list(range(i + 1))
        else:
            seen = [*range(L), *(L + j for j in range(i - ahead + 1) if owner[j] == owner[i - ahead])]
        weights = ((query[:, :, i : i + 1] * key[:, :, seen]).sum(-1) * scale).softmax(-1)
        outputs.append((weights[..., None] * value[:, :, seen]).sum(2))
    return torch.stack(outputs, dim=2)


def in_one_call(query: Tensor, key: Tensor, value: Tensor, where: Texts, length: int, scale: float | None) -> Tensor:
    prompt = None
    if query.shape[2] < key.shape[2]:
        prompt = [(key[0, :, :length], value[0, :, :length])]
        key, value = key[:, :, length:], value[:, :, length:]
    with SharedPrefixAttention(where, length, prompt):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention is computed in parts, however few tokens there are."""
    monkeypatch.setattr(one_row, "MASKED", -(2**40))


@pytest.mark.parametrize("inside", [True, False], ids=["prompt in the row", "given keys"])
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("kind", MASKS)
def test_parts_and_masks_equal_softmax_by_hand_in_values_and_gradients(
    kind: str, scale: float | None, inside: bool
) -> None:
    where, found = texts(kind), []
    for attention in (one_row._InParts.apply, one_row.with_mask, in_one_call):
        inputs = row(where.count, inside)
        output = attention(*inputs, where, L, scale)
        gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(4), dtype=output.dtype)
        found.append((output, *torch.autograd.grad(output, inputs, gradient)))
    inputs = row(where.count, inside)
    output = by_hand(*inputs, kind, D**-0.5 if scale is None else scale)
    expected = (output, *torch.autograd.grad(output, inputs, gradient))
    for made in found:
        for a, b in zip(made, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_far_beyond_the_range_of_exp_are_finite(dtype: torch.dtype) -> None:
    where = texts("right")
    for factor in (1.0, -1.0):  # the prompt takes all of the softmax, or nothing of it
        query, key, value = (x.detach() for x in row(where.count, True, dtype))
        query, key = query.abs() * 30, key.abs()
        key[:, :, :L] *= 30 * factor
        inputs = [x.requires_grad_() for x in (query, key, value)]
        plain = one_row.with_mask(*inputs, where, L, None)
        tolerance = 1e-5 if dtype is torch.float32 else 2e-2
        for attention in (one_row._InParts.apply, in_one_call):
            made = attention(*inputs, where, L, None)
            gradients = torch.autograd.grad(made.float().square().sum(), inputs)
            torch.testing.assert_close(made, plain, atol=tolerance, rtol=tolerance)
            assert made.dtype is dtype and all(x.isfinite().all() for x in gradients)


def attend(where: Texts, *inputs: Tensor, **options) -> Tensor:
    with SharedPrefixAttention(where, L):
        return F.scaled_dot_product_attention(*inputs, **{"is_causal": True, "enable_gqa": True} | options)


def test_the_mode_replaces_causal_attention_of_this_thread_only_while_entered() -> None:
    where = texts("right")
    inputs = row(where.count, True)
    usual = F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(attend(where, *inputs), by_hand(*inputs, "right", D**-0.5))
    assert torch.equal(F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True), usual)
    assert (usual - attend(where, *inputs)).abs().max() > 1e-3


@pytest.mark.parametrize("repeated", [False, True])  # grouped keys: by torch, or before it is called
def test_given_keys_are_those_of_the_layer(repeated: bool) -> None:
    where = texts("left")
    query = heads(where.count, HEADS, 1)
    key, value = heads(where.count, KV_HEADS, 2), heads(where.count, KV_HEADS, 3)
    layers = [tuple(heads(L, KV_HEADS, 10 * i + j)[0] for j in (0, 1)) for i in (1, 2)]
    asked = (x.repeat_interleave(HEADS // KV_HEADS, 1) if repeated else x for x in (key, value))
    call = functools.partial(F.scaled_dot_product_attention, query, *asked, is_causal=True, enable_gqa=not repeated)
    with SharedPrefixAttention(where, L, layers) as attention:
        made = [call() for _ in layers]
    assert attention.layers == 2
    for output, (k, v) in zip(made, layers, strict=True):
        whole = torch.cat([k[None], key], dim=2), torch.cat([v[None], value], dim=2)
        torch.testing.assert_close(output, by_hand(query, *whole, "left", D**-0.5))


@pytest.mark.parametrize(
    "options", [{"is_causal": False}, {"dropout_p": 0.5}, {"attn_mask": torch.ones(1, dtype=torch.bool)}], ids=str
)
def test_attention_that_is_not_plain_is_refused(options: dict) -> None:
    where = texts("left")
    with pytest.raises(NotPlain):
        attend(where, *row(where.count, True), **options)
    query, key, value = row(where.count, True)
    with pytest.raises(NotPlain):
        attend(where, query, key[:, :, 1:], value[:, :, 1:])
    with pytest.raises(NotPlain):
        attend(where, *(x.expand(2, -1, -1, -1) for x in (query, key, value)))


@pytest.mark.parametrize("parts", [True, False])
def test_the_callers_choice_of_kernels_holds(parts: bool, request: pytest.FixtureRequest) -> None:
    if parts:
        request.getfixturevalue("in_parts")
    where = texts("right")
    query, key, value = row(where.count, True)
    assert one_row._takes_flash(query, key, value)
    with sdpa_kernel(SDPBackend.MATH):
        assert not one_row._takes_flash(query, key, value)
        output = attend(where, query, key, value)
        (first,) = torch.autograd.grad(output.square().sum(), query, create_graph=True)
        assert torch.autograd.grad(first.square().sum(), query)[0].abs().max() > 0  # which flash attention has not


@pytest.mark.parametrize("parts", [True, False])
def test_autocast_computes_in_its_dtype(parts: bool, request: pytest.FixtureRequest) -> None:
    if parts:
        request.getfixturevalue("in_parts")
    where = texts("right")
    query, key, value = row(where.count, True, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = attend(where, query, key.bfloat16(), value)
    assert mixed.dtype is torch.bfloat16
    torch.testing.assert_close(mixed.float(), attend(where, query, key, value), atol=5e-2, rtol=5e-2)


def test_texts_with_holes_and_batches_without_tokens_are_no_rows() -> None:
    assert Texts.of(torch.tensor([[1, 1, 1], [1, 0, 1]])) is None
    assert Texts.of(torch.zeros(2, 3, dtype=torch.long)) is None


@pytest.mark.parametrize("kind", MASKS)
def test_tokens_come_back_to_their_places(kind: str) -> None:
    where, mask = texts(kind), torch.tensor(MASKS[kind])
    batch = torch.arange(1, mask.numel() + 1, dtype=torch.float32).view(*mask.shape, 1) * mask[..., None]
    tokens = where.take(batch)
    assert tokens.flatten().tolist() == [v for v in batch.flatten().tolist() if v]
    assert torch.equal(where.give(tokens), batch)
    in_heads = tokens[None, None]  # [1, h, T, 1]
    padded = where.pad(in_heads, fill=-1.0)
    rows = [[v for v in line if v] for line in batch[..., 0].tolist()]
    width = max(map(len, rows))
    assert padded[:, 0, :, 0].tolist() == [line + [-1.0] * (width - len(line)) for line in rows]
    assert torch.equal(where.join(padded), in_heads)


def test_a_last_block_without_attention_is_refused_and_others_keep_what_they_return() -> None:
    where, narrow = texts("right"), torch.tensor([2, 8])
    hidden = heads(where.count, 1, 1)[0, 0].repeat(1, 6)[None].detach()

    def block(x: Tensor, positions: Tensor, *, extra: tuple[Tensor, str]) -> tuple[Tensor, Tensor, str]:
        q = x.view(1, -1, HEADS, D).transpose(1, 2)
        k = q[:, :KV_HEADS]
        made = F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
        return made.transpose(1, 2).flatten(2) + extra[0], positions, extra[1]

    prompt = [(heads(L, KV_HEADS, 2)[0].detach(),) * 2]
    positions, last = torch.arange(where.count), one_row.last_block(block)
    arguments = {"extra": (hidden * 2, "kept")}
    with SharedPrefixAttention(where, L, prompt):
        whole, every, _ = last(hidden, positions, **arguments)
    with SharedPrefixAttention(where, L, prompt, narrow) as mode:
        some, places, kept = last(hidden, positions, **arguments)
        assert mode.layers == 1
    assert torch.equal(every, positions) and torch.equal(places, narrow) and kept == "kept"
    assert (some[:, narrow] - whole[:, narrow]).abs().max() < 1e-12
    others = [i for i in range(where.count) if i not in narrow]
    assert not some[:, others].any() and whole[:, others].all()
    with pytest.raises(NotPlain), SharedPrefixAttention(where, L, prompt, narrow):
        one_row.last_block(lambda x: x)(hidden)
    assert torch.equal(one_row.last_block(lambda x: x)(hidden), hidden)
