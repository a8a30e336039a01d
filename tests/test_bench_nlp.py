"""tooling/bench/nlp_step.py: its steps have one loss and one gradient, and its ceiling is what is computed."""

from __future__ import annotations

import time
from typing import Any

import nlp_step as bench
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pt_core.elsewhere import elsewhere
from pt_core.testing import one_thread
from pt_nlp import one_row


def model() -> Any:
    return bench.small_llama(torch.device("cpu"), torch.float32)


def test_ours_peft_and_lean_have_one_loss_and_one_gradient() -> None:
    with one_thread():
        cell = bench.Cell(model(), 5, 16, 3)
        assert not cell.mask.all()  # texts of different length
        steps = {"ours": cell.ours, "packed": cell.ours_packed, "peft": cell.peft_step, "lean": cell.peft_lean}
        found = {}
        for name, step in steps.items():
            loss = step()
            weight = cell.method.prompt.weight if name in ("ours", "packed") else cell.weight
            found[name] = loss, weight.grad.clone()
        loss, gradient = found.pop("peft")
        assert gradient.norm() > 0.01
        for name, (other, its) in found.items():
            assert abs(other - loss) < 1e-5, name
            assert (its - gradient).norm() < 1e-5 * gradient.norm(), name
        assert abs(cell.floor() - loss) > 1e-4  # another model: it has no prompt
        assert cell.gradient_difference() < 1e-5
        cell.close()


@pytest.mark.parametrize("shared", [False, True])
def test_the_ceiling_counts_what_is_computed(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against torch's counter of operations, for texts of one length: there is no padding that ours could leave out."""
    monkeypatch.setattr(one_row, "MASKED", -(2**40))  # attention in parts, which computes no pair that a mask hides
    prompt, text, batch = 7, 24, 4
    with one_thread():
        llama = model()
        cell = bench.Cell(llama, prompt, text, batch)
        cell.mask = torch.ones_like(cell.mask)
        last = torch.arange(text) >= text - bench.LABELS
        cell.targets = torch.where(last, cell.ids, -100)
        cell.wanted = cell.targets[:, 1:] != -100
        with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
            if shared:
                cell.method.loss({"input_ids": cell.ids, "attention_mask": cell.mask, "target_ids": cell.targets})
            else:
                cell.peft(input_ids=cell.ids, attention_mask=cell.mask, labels=cell.targets)
        expected = bench.multiply_adds(llama.config, [text] * batch, prompt, shared, last=shared)
        if shared:  # in the last block queries of all, and keys of what is read twice; no states of the prompt
            d, queries, keys = 384, 384, 2 * 128
            expected += (
                (prompt + text * batch) * d * queries + bench.LABELS * batch * d * keys - 2 * queries * prompt**2
            )
        cell.close()
    assert counter.get_total_flops() == pytest.approx(2 * expected, rel=1e-9)


def _attention(query: Any, key: Any, *_: Any, out_val: Any = None, **__: Any) -> int:
    (b, h, n, d), m = query, key[2]
    return int(2 * b * h * n * m * 2 * d)


COUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}


def test_it_runs_on_a_device_that_is_not_the_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def one_layer(device: torch.device, dtype: torch.dtype) -> Any:
        made = model()
        made.model.layers = made.model.layers[:1]
        made.config.num_hidden_layers = 1
        return made.to(device, dtype)

    monkeypatch.setitem(bench.MODELS, "one-layer", one_layer)
    timing = bench.Timing(torch.device("meta"), rounds=1, seconds=5, clock=time.perf_counter)
    with one_thread(), elsewhere():
        bench.training("one-layer", [(5, 16, 3)], timing, torch.float32, memory=False)
        bench.generation("one-layer", timing, torch.float32)
    printed = capsys.readouterr().out
    assert "Training step, one-layer, float32, meta:" in printed
    assert "16 stored prompts" in printed
