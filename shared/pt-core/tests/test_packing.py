"""Frozen weights in the kernels' own layout: the same numbers, and nothing else touched."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pt_core import packing
from pt_core.data import Split
from pt_core.errors import InputError
from pt_core.method import Batch, Loss, Method, Output
from pt_core.packing import packed
from pt_core.plan import FitConfig
from pt_core.prompts import SoftPrompt
from pt_core.training import fit

needs_kernels = pytest.mark.skipif(not packing._dtypes(), reason="this torch has no oneDNN kernels for packed weights")
WIDE = 512  # 512 x 512 elements are the smallest weight that is packed


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDE, WIDE), nn.GELU(), nn.Linear(WIDE, WIDE, bias=False)).requires_grad_(False)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of what packed products are given."""
    seen: list[tuple[int, ...]] = []
    plain = packing._apply

    def counted(x: Tensor, *rest: Any) -> Tensor:
        seen.append(tuple(x.shape))
        return plain(x, *rest)

    monkeypatch.setattr(packing, "_apply", counted)
    return seen


def both(run: Callable[[Tensor], Tensor], x: Tensor, mode: packed) -> list[tuple[Tensor, Tensor]]:
    """(plain, packed) of a pass and of its gradient."""
    found = []
    for context in (packed(nn.Module()), mode):
        given = x.detach().clone().requires_grad_()
        with context:
            made = run(given)
            made.float().square().mean().backward()
        assert given.grad is not None
        found.append((made.detach(), given.grad))
    return list(zip(*found, strict=True))


@needs_kernels
@pytest.mark.parametrize("shape", [(1,), (7,), (2, 33), (3, 2, 65)])
def test_values_and_gradients_are_those_of_linear(
    model: nn.Sequential, products: list[Any], shape: tuple[int, ...]
) -> None:
    for plain, ours in both(model, torch.randn(*shape, WIDE), packed(model)):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    assert len(products) == 4  # two layers, forward and backward


@needs_kernels
def test_rows_that_are_not_contiguous_and_a_bias_by_keyword(model: nn.Sequential) -> None:
    x = torch.randn(WIDE, 9).T
    for plain, ours in both(
        lambda t: F.linear(t.T.contiguous().T, weight=model[0].weight, bias=model[0].bias), x, packed(model)
    ):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


@needs_kernels
def test_gradients_of_gradients(model: nn.Sequential, products: list[Any]) -> None:
    x, found = torch.randn(5, WIDE, dtype=torch.float32, requires_grad=True), []
    for mode in (packed(nn.Module()), packed(model)):
        with mode:
            (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
            found.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-3 * float(found[0].abs().max()))
    assert len(products) > 4


@needs_kernels
def test_bfloat16_and_autocast(model: nn.Sequential, products: list[Any]) -> None:
    if torch.bfloat16 not in packing._dtypes():
        pytest.skip("this CPU has no bfloat16 kernels")
    x = torch.randn(6, WIDE)
    with torch.autocast("cpu", torch.bfloat16):
        for plain, ours in both(model, x, packed(model)):
            assert ours.dtype == plain.dtype
            torch.testing.assert_close(ours, plain, rtol=2e-2, atol=2e-2 * float(plain.abs().max()))
    assert len(products) == 4
    half = model.bfloat16()
    for plain, ours in both(half, x.bfloat16(), packed(half)):
        assert ours.dtype == plain.dtype == torch.bfloat16
        torch.testing.assert_close(ours, plain, rtol=2e-2, atol=2e-2 * float(plain.abs().max()))
    assert len(products) == 8


@needs_kernels
def test_what_is_trained_small_or_another_modules_takes_the_plain_path(
    model: nn.Sequential, products: list[Any]
) -> None:
    own, small = nn.Linear(WIDE, WIDE), nn.Linear(WIDE, WIDE - 1).requires_grad_(False)
    mixed = nn.ModuleList([own, small])
    assert len(packed(mixed)) == 0 and len(packed(model)) == 2
    with packed(model):
        small(own(torch.randn(2, WIDE))).sum().backward()
        assert not products
        model[0].weight.requires_grad_()  # from here on somebody trains it
        model(torch.randn(2, WIDE)).sum().backward()
    assert len(products) == 2 and own.weight.grad is not None and model[0].weight.grad is not None


@needs_kernels
def test_replaced_and_changed_weights_count(model: nn.Sequential) -> None:
    x, other = torch.randn(3, WIDE), {"0.weight": torch.randn(WIDE, WIDE) / WIDE**0.5}
    mode = packed(model)
    with mode:
        model(x)
        replaced = functional_call(model, other, x)
        model[2].weight.mul_(2)
        changed = model(x)
    torch.testing.assert_close(replaced * 2, functional_call(model, other, x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(changed, model(x), rtol=1e-5, atol=1e-5)
    with mode:
        torch.testing.assert_close(vmap(model)(x[:, None])[:, 0], model(x), rtol=1e-5, atol=1e-5)


@needs_kernels
def test_weights_are_bit_identical_and_other_threads_unaffected(model: nn.Sequential, products: list[Any]) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with packed(model):
        thread = threading.Thread(target=lambda: model(torch.randn(2, WIDE)))
        thread.start()
        thread.join()
        assert not products
        model(torch.randn(2, WIDE, requires_grad=True)).sum().backward()
    model(torch.randn(2, WIDE))
    assert len(products) == 4
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@needs_kernels
def test_memory_is_granted_in_the_order_of_parameters(model: nn.Sequential) -> None:
    one = 2 * WIDE * WIDE * 4 / 2**30
    assert [len(packed(model, gib)) for gib in (0, 0.99 * one, one, 1.99 * one, 2 * one)] == [0, 0, 1, 1, 2]
    with pytest.raises(InputError, match="Give 0 or more"):
        packed(model, -1)


@needs_kernels
def test_checkpointed_passes_are_plain_both_times(model: nn.Sequential, products: list[Any]) -> None:
    def run(x: Tensor) -> Tensor:
        again: Tensor = checkpoint(model, x, use_reentrant=False)
        return again

    for plain, ours in both(run, torch.randn(4, WIDE), packed(model)):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    assert not products


class Again(torch.autograd.Function):
    """Runs a module once more in the backward pass, in what was entered in the forward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: nn.Module) -> Tensor:
        ctx.save_for_backward(x)
        ctx.run, ctx.entered = run, packing.current()
        made: Tensor = run(x)
        return made

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad(), ctx.entered:
            made = ctx.run(x)
        return torch.autograd.grad(made, x, gradient)[0], None


@needs_kernels
def test_what_is_entered_can_be_entered_again_in_the_backward_pass(model: nn.Sequential, products: list[Any]) -> None:
    for plain, ours in both(lambda x: Again.apply(x, model), torch.randn(4, WIDE), packed(model)):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    assert len(products) == 6  # two layers: forward, again, and backward
    assert isinstance(packing.current(), contextlib.nullcontext)


def test_without_kernels_all_is_as_always(
    model: nn.Sequential, products: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with packed(model) as mode:
        model(torch.randn(3, WIDE, requires_grad=True)).sum().backward()
    assert not len(mode) and not products


@needs_kernels
def test_without_bfloat16_kernels_only_float32_is_packed(
    model: nn.Sequential, products: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with packed(model) as mode, torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(3, WIDE))
    assert len(mode) == 2 and not products
    assert not len(packed(model.bfloat16()))


class Wide(Method):
    """Two classes by a vector that is added to the input of a frozen network."""

    name = "wide"

    def __init__(self, backbone: nn.Module, config: Any = None) -> None:
        super().__init__(backbone, config)
        self.prompt = SoftPrompt(1, WIDE)

    def forward(self, batch: Batch) -> Output:
        return Output(logits=self.backbone(batch["x"] + self.prompt.tokens())[:, :2])

    def loss_of(self, output: Output, batch: Batch) -> Loss:
        assert output.logits is not None
        return Loss(F.cross_entropy(output.logits, batch["labels"], reduction="sum"), len(batch["labels"]))


@needs_kernels
def test_a_run_packs_and_comes_to_the_plain_run(model: nn.Sequential, products: list[Any]) -> None:
    generator = torch.Generator().manual_seed(1)
    x, labels = torch.randn(24, WIDE, generator=generator), torch.randint(0, 2, (24,), generator=generator)
    split = Split(list(range(24)), lambda rows: {"x": x[rows], "labels": labels[rows]}, ("accuracy",), num_classes=2)
    found, passes = [], []
    for gib in (0.0, 2.0):
        torch.manual_seed(0)
        method = Wide(model)
        config = FitConfig(max_steps=6, batch_size=8, lr=1e-2, packed_gib=gib, device="cpu", progress=False)
        result = fit(method, split, split, config)
        found.append((result.metrics["loss"], method.prompt.tokens().detach().clone()))
        passes.append(len(products))
    assert passes[0] == 0 and passes[1] > 6 * 4  # steps, and evaluations beside them
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-4, atol=1e-6)
