"""Put a prompt into a backbone and take it out again, so that the user's model stays the user's model.

    handle = attach(backbone, prompt)        # every call of the backbone now carries the prompt
    with off(backbone): ...                  # not here
    with handle.active(): ...                # this one here, whatever else is attached
    with route(backbone, [a, None, b]): ...  # one prompt for each row of the batch
    handle.remove()                          # bit-identical to before

Only `forward` of a few modules is replaced, on the instance, and restored by `remove()`. Which prompt a call carries is a
context variable: threads and tasks never see each other's choice. How a prompt enters a model is the business of its
family, which a modality package registers.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType, MethodType
from typing import Any, NoReturn, Protocol

from torch import nn

from pt_core.errors import InputError
from pt_core.prompts import Prompt

Forward = Callable[..., Any]


class Handle:
    """A prompt in a backbone. `attach` makes it; see the module's first lines for its use."""

    def __init__(self, backbone: nn.Module, prompt: Prompt, always: bool, name: str | None) -> None:
        self.backbone = backbone
        self.prompt = prompt
        self.always = always
        self.name = name  # of the submodule of the backbone, if registered there
        # What the family keeps for inference; valid only while the prompt's values and the backbone's are. Weights that are
        # written through `.data` may go unnoticed: `handle.store.clear()`.
        self.store: dict[str, Any] = {}
        self._on = True

    def enabled(self, on: bool = True) -> None:
        """Switch the prompt off or on again for calls outside `active()` and `route()`."""
        self._on = on

    @contextmanager
    def active(self) -> Iterator[None]:
        """In this context (this thread, this task) the backbone carries this prompt. Threads that begin in it: see `route`."""
        with route(self.backbone, [self]):
            yield

    def remove(self) -> None:
        """Take the prompt out. With the last one the backbone's own `forward` methods are back."""
        attached = _attached(self.backbone)
        if attached is None or self not in attached.handles:
            return
        attached.handles.remove(self)
        if self.name is not None and all(h.name != self.name for h in attached.handles):
            delattr(self.backbone, self.name)
        if not attached.handles:
            attached.restore()
            del self.backbone.__dict__[_SLOT]


Rows = Sequence["Handle | None"]


class Family(Protocol):
    """How prompts enter one family of backbones."""

    name: str

    def matches(self, backbone: nn.Module) -> bool:
        """Whether this family knows the backbone. Must not import the backbone's library."""

    def check(self, backbone: nn.Module, prompt: Prompt) -> None:
        """Raise InputError where the prompt does not fit the backbone (widths, layers, what it offers)."""

    def patches(
        self, backbone: nn.Module, selected: Callable[[], Rows | None]
    ) -> list[tuple[nn.Module, Callable[[Forward], Forward]]]:
        """Modules whose forward is replaced, each with a function from the original forward to the new one.

        `selected()` tells at call time which handle each row carries: None for none at all, one entry for all rows, or
        one for each row (a batch of k times as many rows repeats each entry k times, as beam search does).
        """


class _Attached:
    def __init__(self, backbone: nn.Module, family: Family) -> None:
        self.family = family
        self.handles: list[Handle] = []
        key, handles = id(backbone), self.handles

        def selected() -> Rows | None:
            chosen = _ROUTES.get().rows.get(key)
            if chosen is None:
                chosen = next(((h,) for h in reversed(handles) if h.always and h._on), ())
            chosen = tuple(h if h in handles else None for h in chosen)  # one may have been removed since
            return chosen if any(chosen) else None

        self.patched: list[tuple[nn.Module, Forward, Forward]] = []
        patches = family.patches(backbone, selected)
        if any(getattr(module.forward, "pt_handles", None) for module, _ in patches):
            raise InputError(
                f"a part of this {type(backbone).__name__}, or what it is a part of, carries prompts itself",
                remedy="Attach all prompts to one of the two",
            )
        for module, wrap in patches:
            original = module.forward
            ours = _bound(wrap(original), module, like=original)
            ours.__func__.__dict__["pt_handles"] = handles
            module.forward = ours
            self.patched.append((module, original, ours))

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        # The replaced forwards belong to the original's modules: a copy would silently run the original.
        raise InputError("a backbone that carries prompts cannot be copied", remedy="Remove the prompts first")

    def __reduce__(self) -> NoReturn:
        raise InputError(
            "a backbone that carries prompts cannot be pickled",
            remedy="Remove the prompts first; they are saved by themselves",
        )

    def restore(self) -> None:
        for module, original, ours in self.patched:
            if module.__dict__.get("forward") != ours:
                continue  # another library has wrapped ours since: it stays inside, and does nothing without prompts
            del module.__dict__["forward"]
            if module.forward != original:  # it was an instance attribute before us (accelerate's hooks)
                module.forward = original


def _bound(forward: Forward, module: nn.Module, like: Forward) -> MethodType:
    """`forward` as a method of `module`, with the name and signature of `like`, which generate and Trainer read.

    It is a method, since accelerate unwraps a forward and binds what it finds to the module again, ours at times twice; and
    without `__wrapped__`, which it would follow through ours to the original.
    """

    @functools.wraps(like)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self is not module:  # a copy of a part of the backbone: prompts and weights here are the original's
            return type(self).forward(self, *args, **kwargs)
        return forward(*args[1:] if args and args[0] is module else args, **kwargs)

    del method.__wrapped__
    signature, first = inspect.signature(like), inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    method.__dict__["__signature__"] = signature.replace(parameters=[first, *signature.parameters.values()])
    return MethodType(method, module)


@dataclass
class _Routes:
    """What rows carry in a context, by the backbone's id."""

    rows: Mapping[int, tuple[Handle | None, ...]]
    before: _Routes | None = None  # what was in force when this choice was made
    left: bool = False  # this choice ended out of turn: who was chosen within it does not come back to it

    def leave(self) -> bool:
        """End this choice, if it is the one in force here; else False, and nobody comes back to it."""
        if _ROUTES.get() is not self:
            self.left = True
            return False
        before = self.before
        while before is not None and before.left:
            before = before.before
        assert before is not None  # the first one is never left
        _ROUTES.set(before)
        return True


_SLOT = "_pt_attached"  # where a backbone keeps it: not a submodule, and collected with the backbone
_ROUTES: ContextVar[_Routes] = ContextVar("pt_routes", default=_Routes(MappingProxyType({})))  # noqa: B039
_FAMILIES: list[Family] = []


def _attached(backbone: nn.Module) -> _Attached | None:
    found: _Attached | None = backbone.__dict__.get(_SLOT)
    return found


def register_family(family: Family) -> None:
    """Make a family of backbones known to `attach`. A package does this when its `backbones` module is imported.

    A family of the same name is replaced, so that a reloaded module does not leave its old one behind.
    """
    _FAMILIES[:] = [known for known in _FAMILIES if known.name != family.name] + [family]


def _family(backbone: nn.Module) -> Family:
    from pt_core.registry import packages

    for modules in ((), packages().values()):  # packages that nobody has imported are asked last
        for module in modules:
            importlib.import_module(f"{module}.backbones")
        for family in _FAMILIES:
            if family.matches(backbone):
                return family
    if "_orig_mod" in backbone._modules:
        raise InputError(
            "prompts are not attached to what `torch.compile` returns",
            remedy="Attach the prompt to the model, then compile it",
        )
    known = ", ".join(f.name for f in _FAMILIES) or "none"
    raise InputError(
        f"no installed package knows how prompts enter a {type(backbone).__name__} (families: {known})",
        remedy="Install the package of its modality, or register a family (pt_core.attachment.register_family)",
    )


def attach(backbone: nn.Module, prompt: Prompt, *, always: bool = True) -> Handle:
    """Put `prompt` into `backbone`.

    The backbone keeps its class, its forward keywords, its configuration and its `generate`. Prompt positions never
    appear in logits, labels or the lengths of hidden states.

    Args:
        backbone: the frozen model.
        prompt: what it shall carry.
        always: True: every call carries the prompt (the newest one, where several are attached), and it is a submodule of
            the backbone, so that optimisers and trainers find its parameters. False: only calls inside
            `handle.active()` or `route(...)` do.

    Raises:
        InputError: the backbone's family is not known, the prompt does not fit it, or a part of the backbone is one that
            carries prompts itself.
    """
    if not isinstance(prompt, Prompt):
        raise InputError(
            f"a {type(prompt).__name__} is no prompt", remedy="Attach a pt_core Prompt, such as SoftPrompt"
        )
    attached = _attached(backbone)
    family = attached.family if attached is not None else _family(backbone)
    family.check(backbone, prompt)
    if attached is None:
        attached = backbone.__dict__[_SLOT] = _Attached(backbone, family)
    name = None
    if always:  # attached twice it is still one submodule: savers refuse a tensor of two names
        taken = backbone._modules
        free = next(f"pt_prompt_{i}" for i in range(len(taken) + 1) if f"pt_prompt_{i}" not in taken)
        name = next((h.name for h in attached.handles if h.prompt is prompt and h.name is not None), free)
        backbone.add_module(name, prompt)
    handle = Handle(backbone, prompt, always, name)
    attached.handles.append(handle)
    return handle


@contextmanager
def route(backbone: nn.Module, handles: Rows) -> Iterator[None]:
    """In this context row i of a batch carries `handles[i]` (None: no prompt); a single entry serves all rows.

    A new thread has a context of its own, without the choice made here: give it this one, by
    `Thread(target=contextvars.copy_context().run, args=(model.generate,))`, or attach with `always=True`. So does a thread
    of an executor (`asyncio.to_thread` gives it yours). A generator has none: what it chooses holds for whoever steps it
    too, between its steps, so do not `yield` in here; choose around each step.

    Raises:
        InputError: a handle belongs to another backbone or was removed; at the end, the choice was not ended where and in
            the order in which it was made, as happens in generators.
    """
    if isinstance(handles, Handle):
        raise InputError("rows carry a sequence of prompts", remedy="Pass [handle]: one for all rows, or one for each")
    attached = _attached(backbone)
    for handle in handles:
        if handle is not None and (attached is None or handle not in attached.handles):
            raise InputError("a prompt of another backbone, or one that was removed", remedy="Attach it here first")
    chosen = _Routes({**_ROUTES.get().rows, id(backbone): tuple(handles)}, _ROUTES.get())
    _ROUTES.set(chosen)
    try:
        yield
    except BaseException:
        chosen.leave()  # whatever else is wrong, this is what the caller is told
        raise
    if not chosen.leave():
        raise InputError(
            "the choice of prompts ends in another thread or task than it began in, or before one that was made within it",
            remedy="Do not yield inside of `active()`, `route()` or `off()`: choose around each step of a generator",
        )


@contextmanager
def off(backbone: nn.Module) -> Iterator[None]:
    """In this context the backbone carries no prompt."""
    with route(backbone, [None]):
        yield
