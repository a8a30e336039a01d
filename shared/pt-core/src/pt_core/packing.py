"""Frozen weights in the layout that the CPU's matrix kernels read: made once, not anew in each product.

    with packed(model):
        loss = method.loss(batch)
        loss.total.backward()

A matrix product on a CPU may first copy the weight into blocks of its kernel's own order. For few rows - a short prompt, a
small batch, a token that is generated - that is a good part of its time. A frozen weight never changes, so
here oneDNN's order of it, and in training that of its transpose, is kept beside it. Values and gradients are those of
`torch.nn.functional.linear`, up to the order of sums; the model and its weights stay as they are. `fit` does this where
`packed_gib` is set. What it gains depends on machine and model, and may be less than nothing: tooling/bench/ measures it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pt_core.errors import InputError

SMALLEST = 2**18  # elements of a weight: below, what it takes to look it up in Python eats the gain
_GIB = 2**30


class packed(TorchFunctionMode):
    """While entered, linear layers of this thread use packed copies of a module's frozen weights.

    Taken are weights [n, k] of at least 2^18 elements, float32 or bfloat16, that are on the CPU and require no gradient when
    this is made, in the order of `module.parameters()` and as far as memory is granted. Everything else runs as always: other
    devices, quantised weights, trained ones, convolutions, what `torch.utils.checkpoint` runs twice, a torch that has no such
    kernels. A weight that is changed in place is packed again.

    Args:
        module: whose weights; usually the frozen backbone.
        gib: memory that the copies may take, counting two for each weight (the second is made in the first backward pass).

    Raises:
        InputError: `gib` is negative.
    """

    def __init__(self, module: nn.Module, gib: float = 2.0) -> None:
        super().__init__()
        if gib < 0:
            raise InputError(f"{gib} GiB for packed weights", field="gib", remedy="Give 0 or more")
        self._dtypes = _dtypes()
        self._weights: dict[int, _Weight] = {}
        left = gib * _GIB
        for weight in module.parameters():
            if self._takes(weight) and (held := _Weight(weight)).nbytes <= left:
                self._weights[id(weight)] = held
                left -= held.nbytes
        self._entered = list[bool]()

    def __len__(self) -> int:
        """Weights that are packed when a layer first uses them."""
        return len(self._weights)

    @property
    def nbytes(self) -> int:
        """Bytes that their copies take, at most."""
        return sum(held.nbytes for held in self._weights.values())

    def __enter__(self) -> packed:
        self._entered.append(bool(self._weights))  # without any, calls need not pass through here
        if self._entered[-1]:
            super().__enter__()  # type: ignore[no-untyped-call]
            _modes().append(self)
        return self

    def __exit__(self, *error: Any) -> None:
        if self._entered.pop():
            _modes().pop()
            super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.linear:
            found = self._product(*args, **(kwargs or {}))
            if found is not None:
                return found
        return func(*args, **(kwargs or {}))

    def _takes(self, weight: nn.Parameter) -> bool:
        large = type(weight) is nn.Parameter and weight.ndim == 2 and weight.numel() >= SMALLEST
        return large and weight.dtype in self._dtypes and weight.device.type == "cpu" and not weight.requires_grad

    def _product(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """x W^T + b, or None where it is not ours to compute."""
        held = self._weights.get(id(weight))
        if held is None or held.weight is not weight or weight.requires_grad or weight.device.type != "cpu":
            return None
        if input.device.type != "cpu" or not input.numel() or torch._C._are_functorch_transforms_active():
            return None
        # Whoever saves tensors through hooks (checkpointing) wants the same ones when it runs again, where no mode is on.
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            return None
        if bias is not None and bias.requires_grad:
            return None
        dtype = weight.dtype
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            input = input.to(dtype)
        if input.dtype != dtype or dtype not in self._dtypes:
            return None
        return _apply(input, held.layout(dtype), None if bias is None else bias.detach().to(dtype))


def current() -> AbstractContextManager[Any]:
    """What this thread has entered, to be entered again: in a backward pass, where autograd leaves modes behind."""
    return _modes()[-1] if _modes() else nullcontext()


_THREAD = threading.local()


def _modes() -> list[packed]:
    found: list[packed] = _THREAD.__dict__.setdefault("modes", [])
    return found


class _Weight:
    """A frozen weight and its layouts, by dtype: under autocast it is another than the weight's own."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.made_of = weight, (-1, -1)
        self.nbytes = 2 * weight.numel() * weight.element_size()  # with the transpose
        self.layouts: dict[torch.dtype, _Layout] = {}

    def layout(self, dtype: torch.dtype) -> _Layout:
        now = (self.weight._version, self.weight.data_ptr())
        if now != self.made_of:
            self.layouts, self.made_of = {}, now
        found = self.layouts.get(dtype)
        if found is None:  # two threads that come here at once make it twice, which does no harm
            found = self.layouts[dtype] = _Layout(self.weight.detach().to(dtype))
        return found


class _Layout:
    """A weight [n, k] in the kernel's order, and that of its transpose once something asks for it."""

    def __init__(self, weight: Tensor, transpose: _Layout | None = None) -> None:
        # Without a number of rows oneDNN chooses an order that does for all of them.
        self.blocks = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        self.weight, self._transpose = weight, transpose

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        made: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), self.blocks, bias, "none", [], "")
        return made

    @property
    def transpose(self) -> _Layout:
        if self._transpose is None:
            self._transpose = _Layout(self.weight.T, self)
        return self._transpose


class _Product(torch.autograd.Function):
    """x W^T + b of a packed weight; its gradient is one more of these, with the transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: _Layout, bias: Tensor | None) -> Tensor:
        ctx.layout = layout
        return layout.product(x, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _apply(gradient, ctx.layout.transpose, None), None, None


def _apply(x: Tensor, layout: _Layout, bias: Tensor | None) -> Tensor:
    if not (x.requires_grad and torch.is_grad_enabled()):
        return layout.product(x, bias)
    made: Tensor = _Product.apply(x, layout, bias)  # type: ignore[no-untyped-call]
    return made


def _dtypes() -> tuple[torch.dtype, ...]:
    """For which this torch and CPU have oneDNN's product with a weight in its own order (which torch.compile uses as well)."""
    names = ("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")
    there = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    if not there or not all(hasattr(torch.ops.mkldnn, name) for name in names):
        return ()
    return (torch.float32, torch.bfloat16) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else (torch.float32,)
