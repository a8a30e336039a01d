"""tooling/bench/vl_step.py: its plain step and ours are the same function, and its operations are those of the arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import vl_step as bench
from torch.nn import functional as F

from pt_core.elsewhere import elsewhere
from pt_core.testing import one_thread

TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT |= {"vocab_size": 60, "bos_token_id": 58, "eos_token_id": 59}
VISION = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
VISION |= {"image_size": 16, "patch_size": 8}


def cell(name: str, classes: int = 5, **settings: Any) -> Any:
    settings |= {"depth": 3} if name == "maple" else {}
    return bench.Cell(bench.random_clip(TEXT, VISION).double(), name, classes, 3, settings)


@pytest.mark.parametrize("chunk", [256, 2])
@pytest.mark.parametrize("name", ["coop", "cocoop", "maple"])
def test_the_plain_step_and_ours_have_one_loss_and_one_gradient(name: str, chunk: int) -> None:
    with one_thread():
        made = cell(name, text_chunk=chunk)
        gradients = {}
        for kind, step in made.steps().items():
            if "fixed" not in kind or name == "coop":
                step()
                gradients[kind] = made.gradient()
        logits = made.method(made.augmented).logits
        torch.testing.assert_close(logits, made.plain.logits(made.augmented), rtol=1e-5, atol=1e-5)
    expected = gradients.pop("plain")
    assert expected.norm() > 0.1 and len(expected) == made.method.count()
    for kind, gradient in gradients.items():
        assert (gradient - expected).norm() < 1e-4 * expected.norm(), kind


def test_operations_and_activations_of_the_plain_step_are_linear_in_the_classes() -> None:
    with one_thread():
        two, three, seven = (cell("cocoop", n).needs("plain") for n in (2, 3, 7))
    for a, b, c in zip(two, three, seven, strict=True):
        assert c == pytest.approx(a + 5 * (b - a), rel=2e-3)
        assert b > a > 0


def test_attention_on_a_cpu_is_counted_backward_included() -> None:
    q, k, v = (torch.ones(2, 4, n, 8, requires_grad=True) for n in (3, 5, 5))
    forward = 2 * 2 * (2 * 4 * 3 * 5 * 8)
    assert bench.operations(lambda: F.scaled_dot_product_attention(q.detach(), k.detach(), v.detach())) == forward
    whole = bench.operations(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward())
    assert whole == forward + 5 * forward // 2


@pytest.mark.parametrize("name", ["coop", "cocoop"])
def test_it_runs_on_a_device_that_is_not_the_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small = bench.random_clip
    monkeypatch.setattr(bench, "random_clip", lambda: small(TEXT, VISION))
    with one_thread(), elsewhere():
        found = bench.measure(name, 5, 3, "meta", "float32", 1, 5, 0, False, 0)
    assert found["difference"].keys() == bench.LINES[name].keys() and max(found["difference"].values()) < 1e-4
    assert set(found["peak"]) == set(found["seconds"]) == {step for pair in bench.LINES[name].values() for step in pair}
    assert "-" not in [cell for row in bench.rows(name, 5, 3, found) for cell in row], "every line has all its numbers"
