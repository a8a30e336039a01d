"""Prompts between blocks, on plain torch stacks: a bidirectional one of torch's own layers, and a causal one with a cache."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pt_core.errors import InputError
from pt_core.tokens import BlockPrompt, Tokens, drop, insert, read, real, replace, run

WIDTH, LAYERS, LENGTH = 16, 4, 5


class EncoderBlocks:
    """torch's own encoder layers, one by one."""

    causal = False

    def __init__(self, encoder: nn.TransformerEncoder) -> None:
        self.encoder = encoder

    @property
    def num_blocks(self) -> int:
        return len(self.encoder.layers)

    def embed(self, hidden: Tensor, mask: Tensor | None = None) -> Tokens:
        return Tokens.of(hidden, mask)

    def prepare(self, tokens: Tokens) -> Tensor | None:
        return None if tokens.full else ~tokens.mask

    def block(self, index: int, hidden: Tensor, context: Tensor | None, cache: None) -> Tensor:
        return self.encoder.layers[index](hidden, src_key_padding_mask=context)

    def cached(self, index: int, cache: None) -> int:
        return 0

    def finish(self, hidden: Tensor) -> Tensor:
        return self.encoder.norm(hidden)


# The cache is a list with (keys, values) or None for each block.
class CausalBlocks(nn.Module):
    """Attention with a bias of -|distance of positions| / 2 (ALiBi): positions matter in every block."""

    causal = True
    num_blocks = LAYERS

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(LAYERS))

    def embed(self, hidden: Tensor, mask: Tensor | None = None, past: int = 0) -> Tokens:
        return Tokens.of(hidden, mask, past=past)

    def prepare(self, tokens: Tokens) -> Tensor:
        slots = torch.arange(tokens.mask.shape[1])
        allowed = tokens.mask[:, None, :] & (slots <= slots[tokens.past :, None])
        distance = tokens.positions[:, None, :] - tokens.positions[:, tokens.past :, None]
        return (-distance.abs() / 2).masked_fill(~allowed, -1e4)

    def block(self, index: int, hidden: Tensor, context: Tensor, cache: list | None) -> Tensor:
        q, k, v = self.layers[index](hidden).chunk(3, dim=-1)
        if cache is not None:
            if cache[index] is not None:
                k, v = torch.cat([cache[index][0], k], 1), torch.cat([cache[index][1], v], 1)
            cache[index] = (k, v)
        weights = (q @ k.transpose(1, 2) / math.sqrt(WIDTH) + context).softmax(-1)
        return hidden + torch.tanh(weights @ v)

    def cached(self, index: int, cache: list) -> int:
        return 0 if cache[index] is None else cache[index][0].shape[1]

    def finish(self, hidden: Tensor) -> Tensor:
        return hidden


@pytest.fixture(autouse=True)
def plain_path():
    """torch's fast path fuses a whole layer (and hands on NestedTensors): other kernels, other last bits."""
    torch.manual_seed(0)
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


@pytest.fixture
def encoder() -> EncoderBlocks:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.1, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    return EncoderBlocks(encoder.eval().requires_grad_(False))


@pytest.fixture
def decoder() -> CausalBlocks:
    return CausalBlocks().eval().requires_grad_(False)


def rows(count: int = 3, *, batch: int | None = None, train: bool = False) -> Tensor:
    return torch.randn(*([batch] if batch else []), count, WIDTH).requires_grad_(train)


def right_padded(batch: int = 2, pad: int = 2) -> Tensor:
    """[b, LENGTH] with `pad` invisible slots at the end of the last row."""
    mask = torch.ones(batch, LENGTH, dtype=torch.long)
    mask[-1, LENGTH - pad :] = 0
    return mask


# Layout by hand.


def test_prompts_take_the_next_positions_and_real_tokens_shift():
    tokens = insert(Tokens.of(torch.zeros(1, 4, WIDTH)), rows(2), at=1)
    assert tokens.positions.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert tokens.is_prompt.tolist() == [False, True, True, False, False, False]
    assert tokens.full and tokens.mask.all()


def test_prompts_before_left_padding_take_positions_just_before_the_rows_first_token():
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    tokens = insert(Tokens.of(torch.zeros(2, 4, WIDTH), mask), rows(2), at=0)
    assert tokens.positions[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert tokens.positions[1, tokens.mask[1]].tolist() == [2, 3, 4, 5]  # prompt, prompt, token, token: no gap
    counted = Tokens.of(torch.zeros(2, 4, WIDTH), mask, positions=(mask.cumsum(1) - 1).clamp(min=0))
    assert insert(counted, rows(2), at=0).positions[1, tokens.mask[1]].tolist() == [0, 1, 2, 3]


def test_prompts_after_right_padding_continue_the_rows_own_count():
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    tokens = insert(Tokens.of(torch.zeros(2, 4, WIDTH), mask), rows(2), at=4)
    assert tokens.positions[0, 4:].tolist() == [4, 5]
    assert tokens.positions[1, 4:].tolist() == [2, 3]


def test_invisible_prompts_move_nobody():
    visible = torch.tensor([[True, False, True], [False, False, False]])
    tokens = insert(Tokens.of(torch.zeros(2, 3, WIDTH)), rows(3), at=1, visible=visible)
    assert tokens.positions[0].tolist() == [0, 1, 2, 2, 3, 4]
    assert tokens.positions[1, [0, 4, 5]].tolist() == [0, 1, 2]
    assert not tokens.full and tokens.mask[:, 1:4].equal(visible)


def test_rows_are_cast_to_the_hidden_states_and_shared_or_per_row():
    hidden = torch.zeros(2, 3, WIDTH, dtype=torch.bfloat16)
    shared, own = rows(2), rows(2, batch=2)
    assert read(insert(Tokens.of(hidden), shared)).equal(shared.bfloat16().expand(2, -1, -1))
    assert read(insert(Tokens.of(hidden), own)).equal(own.bfloat16())


@given(
    inserts=st.lists(st.tuples(st.integers(0, 3), st.floats(0, 1), st.integers(0, 7)), max_size=4),
    padding=st.integers(0, LENGTH),
    left=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_drop_undoes_every_insert(inserts, padding, left):
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[1, slice(0, padding) if left else slice(LENGTH - padding, LENGTH)] = False
    start = tokens = Tokens.of(torch.randn(2, LENGTH, WIDTH), mask)
    for count, where, seed in inserts:
        visible = torch.rand(2, count, generator=torch.Generator().manual_seed(seed)) < 0.5
        tokens = insert(tokens, torch.randn(count, WIDTH), int(where * tokens.mask.shape[1]), visible)
    assert real(tokens).equal(start.hidden) and read(tokens).shape[1] == sum(count for count, _, _ in inserts)
    back = drop(tokens)
    for name in ("hidden", "mask", "positions", "is_prompt"):
        assert getattr(back, name).equal(getattr(start, name)), name


def test_reading_twice_reads_the_same_and_changes_nothing():
    prompt = rows(3)
    tokens = insert(Tokens.of(torch.randn(2, LENGTH, WIDTH)), prompt, at=2)
    before = tokens.hidden.clone()
    assert read(tokens).equal(read(tokens)) and read(tokens)[0].equal(prompt) and tokens.hidden.equal(before)


def test_replace_writes_the_given_slots_only():
    tokens = Tokens.of(torch.randn(2, LENGTH, WIDTH))
    prompt = rows(2, batch=2)
    written = replace(tokens, prompt, [1, 3])
    assert written.hidden[:, [1, 3]].equal(prompt) and written.hidden[:, [0, 2, 4]].equal(tokens.hidden[:, [0, 2, 4]])
    assert written.mask is tokens.mask and written.positions is tokens.positions


# Blocks.


@pytest.mark.parametrize("padded", [False, True])
def test_zero_prompts_are_bit_identical_to_the_towers_own_forward(encoder, padded):
    hidden = torch.randn(2, LENGTH, WIDTH)
    mask = right_padded() if padded else None
    own = encoder.encoder(hidden, src_key_padding_mask=None if mask is None else ~mask.bool())
    for prompts in ({}, {2: BlockPrompt(rows(0))}, {0: BlockPrompt(rows(0)), 1: BlockPrompt(rows(0), mode="replace")}):
        assert encoder.finish(real(run(encoder, encoder.embed(hidden, mask), prompts))).equal(own)


def test_torchs_fast_path_gives_the_same_within_rounding(encoder):
    hidden, mask = torch.randn(2, LENGTH, WIDTH), right_padded()
    ours = encoder.finish(real(run(encoder, encoder.embed(hidden, mask), {})))
    torch.backends.mha.set_fastpath_enabled(True)
    fused = encoder.encoder(hidden, src_key_padding_mask=~mask.bool())
    assert (ours - fused)[mask.bool()].abs().max() < 1e-5


@pytest.mark.parametrize("layer", [0, 2, LAYERS - 1])
@pytest.mark.parametrize("at", [0, 1, LENGTH])
def test_inserted_prompts_equal_a_loop_written_out(encoder, layer, at):
    x, prompt, mask = torch.randn(2, LENGTH, WIDTH), rows(3), right_padded()
    tokens = run(encoder, encoder.embed(x, mask), {layer: BlockPrompt(prompt, at=at)})

    hidden, visible = x, mask.bool()
    for index, block in enumerate(encoder.encoder.layers):
        if index == layer:
            hidden = torch.cat([hidden[:, :at], prompt.expand(2, -1, -1), hidden[:, at:]], 1)
            visible = torch.cat([visible[:, :at], torch.ones(2, 3, dtype=torch.bool), visible[:, at:]], 1)
        hidden = block(hidden, src_key_padding_mask=~visible)
    assert tokens.hidden.equal(hidden)
    assert real(tokens).equal(torch.cat([hidden[:, :at], hidden[:, at + 3 :]], 1))
    assert (encoder.encoder(x, src_key_padding_mask=~mask.bool()) - encoder.finish(real(tokens))).abs().max() > 1e-2


def test_replaced_prompts_equal_a_loop_written_out_and_forget_what_came_up(encoder):
    x, deep = torch.randn(2, LENGTH, WIDTH), torch.randn(LAYERS, 3, WIDTH)
    prompts = {0: BlockPrompt(deep[0], at=1)} | {i: BlockPrompt(deep[i], mode="replace") for i in range(1, LAYERS)}
    tokens = run(encoder, encoder.embed(x), prompts)

    hidden = x
    for index, block in enumerate(encoder.encoder.layers):
        tail = hidden[:, 1:] if index == 0 else hidden[:, 4:]
        hidden = block(torch.cat([hidden[:, :1], deep[index].expand(2, -1, -1), tail], 1))
    assert tokens.hidden.equal(hidden)

    below = run(encoder, encoder.embed(x), prompts, stop=2)
    poisoned = dataclasses.replace(below, hidden=below.hidden.masked_fill(below.is_prompt[:, None], torch.nan))
    assert run(encoder, poisoned, prompts, start=2).hidden.equal(tokens.hidden)


def test_renewed_prompts_may_change_in_number_down_to_none(encoder):
    x, first, second = torch.randn(2, LENGTH, WIDTH), rows(2), rows(4)
    prompts = {
        0: BlockPrompt(first, at=LENGTH),
        1: BlockPrompt(second, at=LENGTH, mode="renew"),
        2: BlockPrompt(rows(0), mode="renew"),
    }
    one, two, *rest = encoder.encoder.layers
    hidden = one(torch.cat([x, first.expand(2, -1, -1)], 1))[:, :LENGTH]
    hidden = two(torch.cat([hidden, second.expand(2, -1, -1)], 1))[:, :LENGTH]
    for block in rest:
        hidden = block(hidden)
    tokens = run(encoder, encoder.embed(x), prompts)
    assert tokens.hidden.equal(hidden) and tokens.positions.tolist() == [list(range(LENGTH))] * 2


@pytest.mark.parametrize("family", ["encoder", "decoder"])
@pytest.mark.parametrize("at", [0, 2, LENGTH])
def test_invisible_prompts_change_nothing(family, at, request):
    stack = request.getfixturevalue(family)
    x, mask = torch.randn(2, LENGTH, WIDTH), right_padded()
    plain = run(stack, stack.embed(x, mask), {})
    prompted = run(stack, stack.embed(x, mask), {1: BlockPrompt(100 * rows(3), at=at, visible=False)})
    assert (real(prompted) - plain.hidden)[mask.bool()].abs().max() < 1e-5
    assert prompted.hidden.isfinite().all()


@pytest.mark.parametrize("family", ["encoder", "decoder"])
@pytest.mark.parametrize("layer", [0, 2])
def test_padding_side_and_batch_mates_do_not_change_a_row(family, layer, request):
    stack = request.getfixturevalue(family)
    prompt = {layer: BlockPrompt(rows(3))}
    short, long = torch.randn(1, 3, WIDTH), torch.randn(1, LENGTH, WIDTH)
    noise = torch.randn(1, 2, WIDTH)
    alone = real(run(stack, stack.embed(short), prompt))
    right = torch.cat([long, torch.cat([short, noise], 1)])
    left = torch.cat([long, torch.cat([noise, short], 1)])
    on_right = real(run(stack, stack.embed(right, torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])), prompt))
    on_left = real(run(stack, stack.embed(left, torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])), prompt))
    assert (on_right[1, :3] - alone[0]).abs().max() < 1e-5
    assert (on_left[1, 2:] - alone[0]).abs().max() < 1e-5
    assert (on_left[0] - on_right[0]).abs().max() < 1e-5


def test_input_conditioned_rows_see_the_tokens_at_their_block(encoder):
    x, mask = torch.randn(2, LENGTH, WIDTH), right_padded()

    def mean(tokens: Tokens) -> Tensor:
        weight = drop(tokens).mask[..., None].float()
        return (real(tokens) * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)

    tokens = run(encoder, encoder.embed(x, mask), {2: BlockPrompt(mean, length=1)}, stop=3)
    below = run(encoder, encoder.embed(x, mask), {}, stop=2).hidden
    expected = torch.stack([below[0].mean(0), below[1, :3].mean(0)])[:, None]
    assert expected.shape == (2, 1, WIDTH)
    again = run(encoder, encoder.embed(x, mask), {2: BlockPrompt(expected)}, stop=3)
    assert (tokens.hidden - again.hidden).abs().max() < 1e-5


# Gradients.


def test_gradients_reach_the_prompts_alone_and_equal_the_loop_written_out(encoder):
    x, prompt = torch.randn(2, LENGTH, WIDTH), rows(3, train=True)
    real(run(encoder, encoder.embed(x), {1: BlockPrompt(prompt)})).square().sum().backward()
    ours, prompt.grad = prompt.grad, None
    hidden = encoder.encoder.layers[0](x)
    hidden = torch.cat([prompt.expand(2, -1, -1), hidden], 1)
    for block in encoder.encoder.layers[1:]:
        hidden = block(hidden)
    hidden[:, 3:].square().sum().backward()
    assert ours.equal(prompt.grad) and ours.abs().sum() > 0
    assert all(parameter.grad is None for parameter in encoder.encoder.parameters())


def test_autograd_saves_nothing_below_the_first_prompted_block(encoder):
    def saved(prompts: dict[int, BlockPrompt], stop: int) -> int:
        packed = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: packed.append(tensor) or tensor, lambda tensor: tensor
        ):
            run(encoder, encoder.embed(torch.randn(2, LENGTH, WIDTH)), prompts, stop=stop)
        return len(packed)

    prompt = rows(3, train=True)
    assert saved({3: BlockPrompt(prompt)}, stop=3) == 0
    one, four = saved({3: BlockPrompt(prompt)}, stop=4), saved({0: BlockPrompt(prompt)}, stop=4)
    assert one > 0 and four == pytest.approx(4 * one, rel=0.1)


def test_replaced_prompts_pass_no_gradient_to_the_rows_they_overwrite(encoder):
    """Only through the real tokens of block 0: not through its prompt slots, which block 1 overwrites."""
    x, first, second = torch.randn(1, LENGTH, WIDTH), rows(2, train=True), rows(2, train=True)
    below = run(encoder, encoder.embed(x), {0: BlockPrompt(first)}, stop=1)
    below.hidden.retain_grad()
    real(run(encoder, below, {1: BlockPrompt(second, mode="replace")}, start=1)).square().sum().backward()
    assert below.hidden.grad[:, :2].abs().max() == 0 and below.hidden.grad[:, 2:].abs().max() > 0
    assert second.grad.abs().max() > 0 and first.grad.abs().max() > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_blocks_that_run_twice_under_checkpointing_give_the_same(encoder, reentrant):
    x, prompt, weight = (
        torch.randn(2, LENGTH, WIDTH),
        rows(2, train=True),
        torch.randn(WIDTH, WIDTH, requires_grad=True),
    )
    calls = []

    def conditioned(tokens: Tokens) -> Tensor:
        calls.append(1)
        return read(tokens).mean(1, keepdim=True) @ weight

    prompts = {1: BlockPrompt(prompt), 2: BlockPrompt(conditioned, length=1, at=2)}

    def forward(hidden: Tensor) -> Tensor:
        return real(run(encoder, encoder.embed(hidden), prompts))

    plain = forward(x)
    expected = torch.autograd.grad(plain.square().sum(), [prompt, weight])
    calls.clear()
    again = checkpoint(forward, x.clone().requires_grad_(), use_reentrant=reentrant)
    again.square().sum().backward()
    assert len(calls) == 2 and again.equal(plain)
    assert prompt.grad.equal(expected[0]) and weight.grad.equal(expected[1])


# Cache.


@pytest.mark.parametrize(
    "prompts",
    [
        {0: BlockPrompt(rows(3))},
        {2: BlockPrompt(rows(3))},
        {LAYERS - 1: BlockPrompt(rows(3), at=2)},
        {0: BlockPrompt(rows(2)), 2: BlockPrompt(rows(3), at=1)},
        {1: BlockPrompt(rows(3), at=LENGTH, visible=torch.tensor([[True, True, False], [False, True, True]]))},
        {0: BlockPrompt(rows(2)), 1: BlockPrompt(rows(2), mode="replace"), 2: BlockPrompt(rows(4), mode="renew", at=1)},
        {1: BlockPrompt(rows(2)), 3: BlockPrompt(rows(0), mode="renew")},
    ],
    ids=["first", "middle", "last", "two", "partly visible", "replace, renew", "dropped"],
)
def test_cached_steps_equal_one_pass(decoder, prompts):
    x = torch.randn(2, LENGTH + 3, WIDTH)
    mask = torch.ones(2, LENGTH + 3, dtype=torch.long)
    mask[1, :2] = 0  # left padding
    whole = real(run(decoder, decoder.embed(x, mask), prompts))

    cache = [None] * LAYERS
    steps = [real(run(decoder, decoder.embed(x[:, :LENGTH], mask[:, :LENGTH]), prompts, cache))]
    for end in (LENGTH + 1, LENGTH + 3):  # one token, then two at once
        start = LENGTH if end == LENGTH + 1 else LENGTH + 1
        tokens = decoder.embed(x[:, start:end], mask[:, :end], past=start)
        steps.append(real(run(decoder, tokens, prompts, cache)))
    assert (torch.cat(steps, 1) - whole)[mask.bool()].abs().max() < 1e-5


def test_a_cached_step_never_calls_the_prompt_function(decoder):
    calls = []

    def function(tokens: Tokens) -> Tensor:
        calls.append(1)
        return real(tokens)[:, :2]

    prompts, cache = {1: BlockPrompt(function, length=2)}, [None] * LAYERS
    run(decoder, decoder.embed(torch.randn(1, LENGTH, WIDTH)), prompts, cache)
    run(decoder, decoder.embed(torch.randn(1, 1, WIDTH), past=LENGTH), prompts, cache)
    assert len(calls) == 1 and [k.shape[1] for k, _ in cache] == [LENGTH + 1] + [LENGTH + 3] * (LAYERS - 1)


def test_a_cache_that_other_prompts_filled_is_refused(decoder):
    x, prompts, cache = torch.randn(1, LENGTH, WIDTH), {1: BlockPrompt(rows(3))}, [None] * LAYERS
    run(decoder, decoder.embed(x[:, :4]), prompts, cache)
    for other in ({}, {1: BlockPrompt(rows(2))}, {2: BlockPrompt(rows(3))}):
        with pytest.raises(InputError, match=r"cache of block 1 holds 7 slots, the prompts account for [46]"):
            run(decoder, decoder.embed(x[:, 4:], past=4), other, cache)
    assert [k.shape[1] for k, _ in cache] == [4, 7, 7, 7]  # nothing was written


# Refusals.


def test_what_does_not_fit_is_refused_by_name(encoder, decoder):
    x = torch.randn(2, LENGTH, WIDTH)
    tokens, cached = Tokens.of(x), Tokens.of(x[:, :1], past=4)
    with pytest.raises(InputError, match=r"prompt is \[3, 7\]"):
        insert(tokens, torch.zeros(3, 7))
    with pytest.raises(InputError, match=r"prompt is \[3, 2, 16\]"):
        insert(tokens, rows(2, batch=3))
    with pytest.raises(InputError, match="slot 6"):
        insert(tokens, rows(), at=6)
    with pytest.raises(InputError, match="after a cache"):
        insert(cached, rows())
    with pytest.raises(InputError, match="cannot be overwritten"):
        replace(cached, rows(1), [0])
    with pytest.raises(InputError, match="3 prompt rows replace 2 slots"):
        replace(tokens, rows(3), [0, 1])
    with pytest.raises(InputError, match=r"3 prompt rows replace 0 slots.*renew"):
        run(encoder, tokens, {0: BlockPrompt(rows(3), mode="replace")})
    with pytest.raises(InputError, match=r"blocks \[4\].*0 \.\. 3"):
        run(encoder, tokens, {4: BlockPrompt(rows())})
    with pytest.raises(InputError, match="bidirectional"):
        run(encoder, tokens, {}, cache=[])
    with pytest.raises(InputError, match="behind the 4 cached slots"):
        BlockPrompt(rows(), at=5)(cached)
    with pytest.raises(InputError, match=r"visible is \[2\]"):
        insert(tokens, rows(3), visible=torch.tensor([True, False]))
    with pytest.raises(InputError, match="no length"):
        BlockPrompt(read)
    with pytest.raises(InputError, match="returned 5 rows, its length is 2"):
        run(encoder, tokens, {0: BlockPrompt(real, length=2)})
    with pytest.raises(InputError, match="'add'"):
        BlockPrompt(rows(), mode="add")
    with pytest.raises(InputError, match=r"attention mask is \[2, 7\], the sequence is \[2, 5\]"):
        Tokens.of(x, torch.ones(2, 7))
    with pytest.raises(InputError, match=r"positions are \[2, 7\]"):
        Tokens.of(x, positions=torch.ones(2, 7))
