"""A second device without one: tests of device placement for machines that have only a CPU.

    with elsewhere():
        method.fit(train, validation, FitConfig(max_steps=2))      # on the device that accelerate finds: not the CPU

Tensors on the pretended device have the device `meta` to everybody who asks, and values on the CPU: a run goes through all of
its code and comes to the CPU's numbers (up to the order of sums: composite operations may be taken apart otherwise). An
operation on tensors of two devices fails, as it does on a GPU; indices and tensors without dimensions may be on the CPU.
Doubles fail, as they do on a Mac. Kernels, streams and memory are not tried out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import optimizer
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("meta")  # the one device beside the CPU that every build of torch lets autograd work on
aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default}
INDEXES = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class _There(Tensor):
    """A tensor on the pretended device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> _There:
        made: _There = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    def tolist(self) -> Any:
        return self.held.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees the operations that make tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation, on the CPU; its result is where it would be."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = [isinstance(x, _There) for x in tensors]
    if any(there) and func not in MOVES and not (func in INDEXES and there[0]):
        strangers = [tuple(x.shape) for x, is_there in zip(tensors, there, strict=True) if not is_there and x.ndim]
        assert not strangers, f"{func}: tensors on two devices; on the CPU are those of shape {strangers}"
    device, here = kwargs.get("device"), kwargs
    goes = any(there) if func not in MOVES else there[0]
    if device is not None:
        goes, here = device.type == DEVICE.type, kwargs | {"device": torch.device("cpu")}
    args_here, here = tree_map_only(_There, lambda x: x.held, (args, here))
    result = func(*args_here, **here)
    if not goes:
        return result
    wide = [
        x.dtype for x in tree_leaves(result) if isinstance(x, Tensor) and x.dtype in (torch.float64, torch.complex128)
    ]
    assert not wide, f"{func}: {wide[0]}, which not every accelerator has"
    result = tree_map_only(Tensor, _There, result)
    return return_and_correct_aliasing(func, args, kwargs, result) if any(there) else result  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def elsewhere() -> Iterator[None]:
    """In this context accelerate finds the pretended device."""
    autocast, casts, cast_dtype = torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype

    def unless_there(original: Callable[..., Any], otherwise: Any) -> Callable[..., Any]:
        """Autocast does not know the device."""
        return lambda kind="cuda", *rest, **options: (
            otherwise if kind == DEVICE.type else original(kind, *rest, **options)
        )

    def built(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Tensors from lists are made in one go, unseen by the mode: they are made here, and moved."""

        def make(data: Any, *rest: Any, device: Any = None, **options: Any) -> Tensor:
            if device is None or torch.device(device) != DEVICE:
                return original(data, *rest, **({"device": device} if device else {}), **options)
            return (data if isinstance(data, Tensor) else original(data, *rest, **options)).to(DEVICE)

        return make

    def new_tensor(like: Tensor, data: Any, *, dtype: Any = None, device: Any = None, **options: Any) -> Tensor:
        return torch.tensor(data, dtype=dtype or like.dtype, device=device or like.device, **options)

    patches: list[contextlib.AbstractContextManager[Any]] = [
        mock.patch.object(Accelerator, "device", DEVICE),
        mock.patch.object(torch, "tensor", built(torch.tensor)),
        mock.patch.object(torch, "as_tensor", built(torch.as_tensor)),
        mock.patch.object(Tensor, "new_tensor", new_tensor),
        mock.patch.object(torch, "is_autocast_enabled", unless_there(casts, False)),
        mock.patch.object(torch, "get_autocast_dtype", unless_there(cast_dtype, torch.bfloat16)),
        mock.patch.object(torch, "autocast", unless_there(autocast, contextlib.nullcontext())),
        mock.patch.object(optimizer, "_get_fused_kernels_supported_devices", lambda: ["cpu", DEVICE.type]),
    ]
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swaps)
        torch.__future__.set_swap_module_params_on_conversion(True)  # a parameter stays the object that others hold
        stack.enter_context(_Mode())  # type: ignore[no-untyped-call]
        yield
