"""Prompts hold what their formulas say, start as they are told, and stay float32."""

from __future__ import annotations

import math

import pytest
import torch

from pt_core.errors import InputError
from pt_core.prompts import DeepPrompt, KeyValuePrompt, LowRankOffset, Prompt, SoftPrompt, tile


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_parameter_counts():
    assert SoftPrompt(100, 768).count() == 76_800
    assert DeepPrompt([0, 5, 11], 8, 64).count() == 3 * 8 * 64
    assert KeyValuePrompt(layers=12, heads=12, head_dim=64, length=20).count() == 2 * 12 * 20 * 768
    delta = LowRankOffset(positions=256, rank=30, dim=768)
    assert sum(p.numel() for p in delta.parameters()) == (256 + 768) * 30
    frozen = SoftPrompt(3, 4).requires_grad_(False)
    assert frozen.count() == 0
    assert frozen.groups() == {"prompt": []}


def test_a_prompt_offers_what_it_overrides():
    soft, deep, keys = SoftPrompt(3, 4), DeepPrompt([1], 2, 4), KeyValuePrompt(2, 2, 4, 3)
    assert [soft.offers(what) for what in ("tokens", "key_values", "offset", "blocks")] == [True, False, False, False]
    assert soft.tokens() is soft.weight
    assert (soft.length, deep.length, keys.length) == (3, 0, 3)
    assert keys.key_values().shape == (2, 2, 2, 3, 4)
    assert keys.tokens() is None
    plain = Prompt()
    assert (plain.tokens(), plain.key_values(), plain.offset(torch.arange(2)), plain.blocks()) == (None,) * 4


@torch.no_grad()
def test_starts_follow_their_generator_and_deviation():
    first, again, other = (SoftPrompt(50, 40, std=0.3, generator=seeded(s)).weight for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert float(first.std()) == pytest.approx(0.3, rel=0.05)
    assert float(DeepPrompt([0, 1], 30, 40, generator=seeded()).weight.std()) == pytest.approx(0.02, rel=0.05)
    assert not KeyValuePrompt(2, 2, 4, 3, std=0.0).weight.any()


def test_a_given_start_is_copied_as_float32():
    start = torch.randn(4, 6, dtype=torch.bfloat16)
    prompt = SoftPrompt(4, 6, init=start)
    assert prompt.weight.dtype == torch.float32
    assert torch.equal(prompt.weight, start.float())
    start.zero_()
    assert prompt.weight.any()
    with pytest.raises(InputError, match=r"shape \(4, 6\), the prompt is \[5, 6\]"):
        SoftPrompt(5, 6, init=start)


def test_rows_of_a_text_are_tiled_and_cut():
    rows = torch.arange(6.0).view(3, 2)
    assert tile(rows, 5).tolist() == [[0, 1], [2, 3], [4, 5], [0, 1], [2, 3]]
    assert tile(rows, 2).tolist() == [[0, 1], [2, 3]]
    assert tile(rows, 0).shape == (0, 2)
    for bad in (torch.zeros(0, 2), torch.zeros(3)):
        with pytest.raises(InputError, match="cannot start from rows of shape"):
            tile(bad, 2)


def test_deep_prompts_go_to_their_blocks():
    prompt = DeepPrompt([7, 2], 3, 4, generator=seeded())
    assert list(prompt.blocks()) == [2, 7]
    assert torch.equal(prompt.blocks()[7], prompt.weight[1])
    for wrong in ([1, 1], [-1, 2]):
        with pytest.raises(InputError, match="Name each block once"):
            DeepPrompt(wrong, 3, 4)


@torch.no_grad()
def test_a_low_rank_offset_starts_at_zero_and_follows_its_formula():
    delta = LowRankOffset(positions=6, rank=4, dim=5, alpha=8, generator=seeded())
    assert not delta().any()
    assert float(delta.A.abs().max()) <= 1 / math.sqrt(4)
    assert float(delta.A.abs().max()) > 0.8 / math.sqrt(4)
    torch.nn.init.normal_(delta.B, generator=seeded(1))
    torch.testing.assert_close(delta(), 8 / math.sqrt(4) * delta.A @ delta.B)
    assert delta().shape == (6, 5)


def test_rank_zero_is_no_offset():
    delta = LowRankOffset(positions=6, rank=0, dim=5)
    assert delta().shape == (6, 5)
    assert not delta().any()
    assert sum(p.numel() for p in delta.parameters()) == 0
