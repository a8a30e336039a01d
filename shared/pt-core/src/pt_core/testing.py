"""What every package's tests share: a fixture, the contract suite of methods, and a tiny model to write methods against.

Loaded by pytest with `-p pt_core.testing`. A package runs the suite on each of its methods:

    @pytest.mark.parametrize("case", [Case("prompt-tuning", make, train, validation)], ids=str)
    @pytest.mark.parametrize("check", contract_checks())
    def test_contract(case, check, tmp_path):
        check(case, tmp_path)
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NoReturn, cast
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported: no test asks the hub

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from pt_core import cli, packing
from pt_core.attachment import Forward, Handle, Rows, attach, register_family
from pt_core.data import Split
from pt_core.elsewhere import elsewhere
from pt_core.errors import InputError
from pt_core.frozen import assert_unchanged, snapshot
from pt_core.method import Batch, Loss, Method, MethodConfig, Output
from pt_core.plan import FitConfig
from pt_core.prompts import Prompt, SoftPrompt
from pt_core.runs import Job
from pt_core.training import FitResult, Loop, NotLearning

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(scope="session")
def study_data() -> Path:
    """Folder of the study data (`PT_STUDY_DATA`, default `../shared/data` beside the repository); skips where it is absent."""
    root = Path(__file__).resolve().parents[4]
    folder = Path(os.environ.get("PT_STUDY_DATA", root.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"study data not found at {folder}: set PT_STUDY_DATA to its folder")
    return folder


def watch(module: nn.Module, see: Callable[[tuple[Any, ...], Any], object]) -> None:
    """Call `see(arguments, output)` at each call of a module from now on. A hook may not: prompts make way for hooks."""
    forward = module.forward

    def watched(*args: Any, **keywords: Any) -> Any:
        output = forward(*args, **keywords)
        see(args, output)
        return output

    module.forward = watched


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """For tiny tensors: on a busy machine, waiting for a second thread costs ten times what it gives."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# --- the contract of methods ----------------------------------------------------------------------------------------
SHORT = FitConfig(
    max_steps=6,
    batch_size=4,
    evaluate_every=3,
    checkpoint_every=2,
    log_every=2,
    eval_batch_size=3,
    device="cpu",
    progress=False,
)


@dataclass(frozen=True)
class Case:
    """A method under the contract suite. What the method declares of itself (`trains`, `frozen_backbone`) is respected.

    Args:
        name: in test ids.
        make: seed -> a backbone and the method on it. The backbone is the same for every seed; start values follow it.
        train, validation: a few rows; not all in one batch.
        config: a run of a few steps.
        probe: backbone -> its output on fixed inputs; checks that `remove()` restores it. None: only its parts are compared.
        draws: False if nothing depends on the seed.
        random_loss: True if the loss itself draws random numbers, so that two calls differ.
        mixes_rows: True if rows of a batch influence each other by design.
        idle: trained tensors that so short a run need not change.
        tolerance: between a row alone and in a batch, absolute and relative.
    """

    name: str
    make: Callable[[int], tuple[nn.Module, Method]]
    train: Split
    validation: Split | None = None
    config: FitConfig = SHORT
    probe: Callable[[nn.Module], Tensor] | None = None
    draws: bool = True
    random_loss: bool = False
    mixes_rows: bool = False
    idle: Sequence[str] = ()
    tolerance: float = 1e-5

    def __str__(self) -> str:
        return self.name

    def fit(self, seed: int = 0, folder: Path | None = None, **changes: Any) -> Run:
        """Train a new method on a new backbone."""
        backbone, method = self.make(seed)
        return self.train_on(backbone, method, seed, folder, **changes)

    def train_on(
        self, backbone: nn.Module, method: Method, seed: int = 0, folder: Path | None = None, **changes: Any
    ) -> Run:
        """Train `method` by its own protocol."""
        config = FitConfig.model_validate(self.config.model_dump() | {"seed": seed} | changes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotLearning)
            result = method.fit(self.train, self.validation, config, folder)
        return Run(backbone, method, result)

    def skip(self, reason: str) -> NoReturn:
        """Skip a check, and say so."""
        print(f"{self.name}: skipped, {reason}")
        pytest.skip(f"{self.name}: {reason}")

    def skip_untrained(self, method: Method) -> None:
        if not method.trains:
            self.skip("it declares that it trains nothing")


@dataclass
class Run:
    """A trained method, its backbone, and what came out."""

    backbone: nn.Module
    method: Method
    result: FitResult


Check = Callable[[Case, Path], None]


def backbone_stays_bit_identical(case: Case, folder: Path) -> None:
    """Training changes no parameter, buffer, gradient flag or mode of the backbone."""
    backbone, method = case.make(0)
    if not method.frozen_backbone:
        case.skip("it declares that it trains the backbone")
    before = snapshot(backbone)
    case.train_on(backbone, method)
    assert_unchanged(backbone, before)
    for name, parameter in _own_parameters(backbone):
        assert not parameter.requires_grad, f"{name} of the backbone requires a gradient"
        assert parameter.grad is None, f"{name} of the backbone has a gradient"


def gradients_reach_what_is_trained_and_nothing_else(case: Case, folder: Path) -> None:
    """A backward pass leaves gradients on trained parameters only; training changes every trained tensor."""
    backbone, method = case.make(0)
    case.skip_untrained(method)
    trained = {id(p) for _, p in method.trainable()}
    if method.loss_comes_from():
        method.train()
        torch.autograd.backward(method.loss(_batch(case)).total)
        for name, parameter in [*_own_parameters(backbone), *method.named_parameters()]:
            assert parameter.grad is None or id(parameter) in trained, f"{name} is not trained, and has a gradient"
        method.zero_grad()
    before = {name: parameter.detach().clone() for name, parameter in method.trainable()}
    case.train_on(backbone, method, keep_best=False)
    same = [n for n, p in method.trainable() if p.numel() and torch.equal(p, before[n]) and n not in case.idle]
    assert not same, f"training did not change {', '.join(same)}"


def groups_are_disjoint_and_complete(case: Case, folder: Path) -> None:
    """No optimiser has a parameter twice, and together they have what is trained."""
    _, method = case.make(0)
    case.skip_untrained(method)
    found: dict[int, str] = {}
    for name, optimiser in method.optimisers(case.config).items():
        parameters = [p for group in optimiser.param_groups for p in group["params"]]
        assert len({id(p) for p in parameters}) == len(parameters), f"a parameter is in two groups of {name!r}"
        found |= {id(p): name for p in parameters}
    trained = {id(p): name for name, p in method.trainable()}
    assert not (missing := [trained[i] for i in trained.keys() - found.keys()]), f"no optimiser trains {missing}"
    assert not (more := {found[i] for i in found.keys() - trained.keys()}), f"{more} train what is not trainable"
    names = [group["name"] for group in method.parameter_groups()]
    assert len(set(names)) == len(names), f"two groups have one name: {names}"


def saving_and_loading_is_bit_exact(case: Case, folder: Path) -> None:
    """A saved method keeps the same tensors and outputs, bit for bit, on a new backbone, which it recognises."""
    run = case.fit()
    if not run.method.kept_state():
        case.skip("it has nothing to save")
    path = run.method.save_pretrained(folder / "saved")
    backbone, other = case.make(1)
    other.remove()
    with warnings.catch_warnings():
        if run.method.frozen_backbone:
            warnings.filterwarnings("error", message="the prompt may not fit this backbone")
        loaded = type(run.method).from_pretrained(path, backbone)
    _assert_same(loaded.kept_state(), run.method.kept_state())
    outputs = _outputs(case, run.method)
    _assert_same(_outputs(case, loaded), outputs)
    if not outputs and not case.random_loss:
        with torch.no_grad():
            _assert_same({"loss": loaded.loss(_batch(case)).total}, {"loss": run.method.loss(_batch(case)).total})


def the_seed_decides_the_result(case: Case, folder: Path) -> None:
    """The same seed gives the same tensors, metrics and history, bit for bit; another seed gives others."""
    first, again = case.fit(), case.fit()
    _assert_same(again.method.trained_state(), first.method.trained_state())
    assert again.result.metrics == first.result.metrics, "the same seed gives other metrics"
    assert again.result.history == first.result.history, "the same seed logs other rows"
    if not case.draws or not first.method.trains:
        case.skip("that another seed differs: nothing in it is drawn")
    other = case.fit(seed=1).method.trained_state()
    differs = any(not torch.equal(other[name], tensor) for name, tensor in first.method.trained_state().items())
    assert differs, "another seed gives the same tensors"


def a_killed_run_goes_on_to_the_same_result(case: Case, folder: Path) -> None:
    """Killed before the first checkpoint or near the end, then resumed: same tensors, metrics and logs, bit for bit."""
    case.skip_untrained(case.make(0)[1])
    with stopped_after(math.inf) as begun:
        whole = case.fit(folder=folder / "whole")
    if len(begun) < 2:
        case.skip("it is not trained by steps of a Loop")
    for stop in sorted({1, len(begun) - 1}):
        place = folder / f"killed-after-{stop}"
        with stopped_after(stop), pytest.raises(Killed):
            case.fit(folder=place)
        resumed = case.fit(folder=place)
        _assert_same(resumed.method.trained_state(), whole.method.trained_state())
        for name in ("steps", "best_step", "metrics", "stopped_early"):
            assert getattr(resumed.result, name) == getattr(whole.result, name), f"{name}, killed after {stop}"
        assert _logs(place) == _logs(folder / "whole"), f"metrics.jsonl, killed after {stop}"


def bf16_keeps_what_is_trained_in_float32(case: Case, folder: Path) -> None:
    """A bf16 run gives finite tensors of the dtypes that they had."""
    backbone, method = case.make(0)
    case.skip_untrained(method)
    dtypes = {name: tensor.dtype for name, tensor in method.trained_state().items()}
    low = [name for name, p in method.trainable() if p.dtype != torch.float32]
    assert not low or not method.frozen_backbone, f"{low} are not float32"
    case.train_on(backbone, method, precision="bf16")
    for name, tensor in method.trained_state().items():
        assert tensor.dtype == dtypes[name], f"{name} became {tensor.dtype}"
        assert bool(torch.isfinite(tensor.float()).all()), f"{name} is not finite"


def a_run_on_another_device_comes_to_the_same(case: Case, folder: Path) -> None:
    """A run whose tensors may not stay on the CPU (`pt_core.elsewhere`) mixes no devices, and ends as one on the CPU does."""
    here = case.fit()
    with elsewhere():
        there = case.fit(device="auto")
        placed = {name for name, tensor in there.method.trained_state().items() if tensor.device.type != "cpu"}
    assert placed == here.method.trained_state().keys(), "it was not placed on the device"
    # Not the tensors themselves: where only noise moves them (biases of keys), sums in another order are another noise.
    assert there.result.metrics == pytest.approx(here.result.metrics, rel=1e-3, abs=1e-4)


def packed_weights_give_the_same_step(case: Case, folder: Path) -> None:
    """A step on packed copies of the backbone's weights (`packed_gib`) has the loss and the gradients of one without them."""
    backbone, method = case.make(0)
    if not method.loss_comes_from() or case.random_loss:
        case.skip("its loss is random" if case.random_loss else "it is not trained by a loss of a batch")
    with mock.patch.object(packing, "SMALLEST", 1):
        copies = packing.packed(backbone)
    if not len(copies):
        case.skip("none of its backbone's weights can be packed here")
    method.eval()
    steps = []
    for context in (contextlib.nullcontext(), copies):
        with context:
            total = method.loss(_batch(case)).total
            torch.autograd.backward(total)
        steps.append([total.detach(), *(p.grad for _, p in method.trainable() if p.grad is not None)])
        method.zero_grad()
    for plain, fast in zip(*steps, strict=True):
        torch.testing.assert_close(fast, plain, rtol=10 * case.tolerance, atol=10 * case.tolerance)


def batch_mates_do_not_change_a_row(case: Case, folder: Path) -> None:
    """A row gets the same outputs alone as among others, however it is padded there."""
    if case.mixes_rows:
        case.skip("rows of its batches influence each other by design")
    _, method = case.make(0)
    together = _outputs(case, method)
    if not together:
        case.skip("it returns nothing of a row; its loss is checked as a sum over rows")
    for i in range(_rows(case)):
        for name, alone in _outputs(case, method, [i]).items():
            row = together[name][i : i + 1]
            if alone.shape != row.shape:
                case.skip(f"the shape of its {name} depends on the batch")
            torch.testing.assert_close(alone, row, rtol=case.tolerance, atol=case.tolerance)


def the_loss_is_a_sum_over_rows(case: Case, folder: Path) -> None:
    """Totals, counts and parts of single rows add up to those of their batch: accumulation equals the large batch.

    In training mode too, but for dropout, unless random numbers are drawn for other things or the backbone trains as well.
    """
    _, method = case.make(0)
    if method.loss_comes_from() is None:
        case.skip("it is not trained by a loss of a batch")
    if case.random_loss or case.mixes_rows:
        case.skip("its loss is random" if case.random_loss else "rows of its batches influence each other by design")
    for training in (False, True) if method.frozen_backbone else (False,):
        method.train(training)
        for module in method.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.eval()
        torch.manual_seed(0)
        drawn = torch.get_rng_state()
        with torch.no_grad():
            batch = method.loss(_batch(case))
            if not batch.decomposes:
                case.skip("its loss declares that it couples rows")
            alone = [method.loss(_batch(case, [i])) for i in range(_rows(case))]
        if training and not torch.equal(torch.get_rng_state(), drawn):
            return
        mode = f"with training={training}"
        counted, wanted = float(sum(loss.count for loss in alone)), float(batch.count)
        assert counted == wanted, f"rows alone count {counted} terms and their batch {wanted}, {mode}"
        sums = {"total": torch.stack([loss.total for loss in alone]).sum()}
        sums |= {name: torch.stack([loss.parts[name] for loss in alone]).sum() for name in batch.parts}
        for name, value in sums.items():
            of_batch, off = batch.parts.get(name, batch.total), 10 * case.tolerance
            torch.testing.assert_close(
                value, of_batch, rtol=off, atol=off, msg=partial("{}, {}: {}".format, name, mode)
            )


def removing_restores_the_backbone(case: Case, folder: Path) -> None:
    """After `remove()` the backbone has the parts, attributes, hooks, values and outputs that it came with."""
    seen: list[tuple[list[str], str, Tensor | None]] = []
    take = Method.__init__

    def spy(self: Method, backbone: nn.Module, config: MethodConfig | None = None) -> None:
        seen.append(_look(backbone, case.probe))  # the backbone as the method gets it
        take(self, backbone, config)

    with mock.patch.object(Method, "__init__", spy):
        backbone, method = case.make(0)
    if not method.frozen_backbone:
        case.skip("it declares that it trains the backbone")
    case.train_on(backbone, method)
    method.remove()
    (parts, values, output), (parts_now, values_now, output_now) = seen[0], _look(backbone, case.probe)
    assert parts_now == parts, f"left behind: {set(parts_now) ^ set(parts)}"
    assert values_now == values, "values of the backbone differ"
    if output is not None:
        assert output_now is not None
        assert torch.equal(output_now, output), "the output of the backbone differs"
    method.remove()  # once more does no harm


def what_does_not_train_says_so(case: Case, folder: Path) -> None:
    """`trains = False` means: no trainable value, and `fit` only evaluates; otherwise there is something to train."""
    _, method = case.make(0)
    if method.trains:
        assert method.count() > 0, "it has nothing to train: declare `trains = False`"
        return
    trainable = sum(p.numel() for _, p in method.trainable())  # `count` may tell what is fitted without steps
    assert trainable == 0, f"it declares that it trains nothing, and has {trainable} trainable values"
    result = case.fit().result
    assert result.steps == 0, "it declares that it trains nothing, and makes steps"
    assert bool(result.metrics) == (case.validation is not None), "it is not evaluated"


def contract_checks() -> list[Any]:
    """The suite, for `pytest.mark.parametrize("check", contract_checks())`. A check is called with a case and a folder."""
    checks: list[Check] = [
        backbone_stays_bit_identical,
        gradients_reach_what_is_trained_and_nothing_else,
        groups_are_disjoint_and_complete,
        saving_and_loading_is_bit_exact,
        the_seed_decides_the_result,
        a_killed_run_goes_on_to_the_same_result,
        bf16_keeps_what_is_trained_in_float32,
        a_run_on_another_device_comes_to_the_same,
        packed_weights_give_the_same_step,
        batch_mates_do_not_change_a_row,
        the_loss_is_a_sum_over_rows,
        removing_restores_the_backbone,
        what_does_not_train_says_so,
    ]
    return [pytest.param(one_thread()(check), id=check.__name__) for check in checks]


class Killed(BaseException):
    """Nothing that trains may catch it."""


@contextlib.contextmanager
def stopped_after(steps: float) -> Iterator[list[int]]:
    """Every Loop raises in place of the step that comes after `steps` steps were made. Gives the steps begun."""
    begun: list[int] = []
    original = Loop.steps

    def stopping(loop: Loop) -> Iterator[int]:
        for step in original(loop):
            if len(begun) >= steps:
                raise Killed
            begun.append(step)
            yield step

    with mock.patch.object(Loop, "steps", stopping):
        yield begun


# --- the command line --------------------------------------------------------------------------------------------------
Command = Callable[..., tuple[int, str, str]]


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *first: object) -> Command:
    """(arguments) -> exit code, stdout and stderr of `pt FIRST ... ARGUMENTS ...`, run in this process."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["pt", *map(str, (*first, *arguments))])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


def _own_parameters(backbone: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of a backbone without those of attached prompts."""
    attached = {id(p) for m in backbone.modules() if getattr(m, "is_prompt", False) for p in m.parameters()}
    return ((name, p) for name, p in backbone.named_parameters() if id(p) not in attached)


def _rows(case: Case) -> int:
    return min(3, len(case.validation or case.train))


def _batch(case: Case, rows: list[int] | None = None) -> dict[str, Any]:
    return (case.validation or case.train).batch(rows if rows is not None else list(range(_rows(case))))


@torch.no_grad()
def _outputs(case: Case, method: Method, rows: list[int] | None = None) -> dict[str, Tensor]:
    """Tensors that the method returns for a few rows, by name."""
    if type(method).forward is Method.forward:
        case.skip("it has no forward")
    torch.manual_seed(0)
    output = method.eval()(_batch(case, rows))
    return {name: value for name, value in vars(output).items() if isinstance(value, Tensor)}


def _assert_same(here: Mapping[str, Tensor], there: Mapping[str, Tensor]) -> None:
    assert here.keys() == there.keys(), f"only one of both has {here.keys() ^ there.keys()}"
    for name, tensor in there.items():
        assert here[name].dtype == tensor.dtype, f"{name} has another dtype"
        assert torch.equal(here[name], tensor), f"{name} differs by up to {_gap(here[name], tensor)}"


def _gap(a: Tensor, b: Tensor) -> float | str:
    return float((a.double() - b.double()).abs().max()) if a.shape == b.shape else f"shapes {a.shape}, {b.shape}"


def _logs(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("metrics.jsonl")}


def _look(backbone: nn.Module, probe: Callable[[nn.Module], Tensor] | None) -> tuple[list[str], str, Tensor | None]:
    """What can be seen of a backbone: its output, its parts with their attributes and hooks, its values."""
    output = None
    if probe is not None:
        modes = [(module, module.training) for module in backbone.modules()]
        wanted = [(parameter, parameter.requires_grad) for parameter in backbone.parameters()]
        backbone.eval().requires_grad_(False)  # torch chooses between its matrix products by that flag as well
        with torch.no_grad():
            output = probe(backbone)
        for module, mode in modes:
            module.training = mode
        for parameter, want in wanted:
            parameter.requires_grad = want
    parts = [
        f"{name}: {type(module).__qualname__}, {sorted(module.__dict__)}, {_plain(module)}, "
        f"hooks {sum(len(v) for k, v in module.__dict__.items() if k.endswith('_hooks'))}"
        for name, module in backbone.named_modules()
    ]
    return parts, snapshot(backbone), output


def _plain(module: nn.Module) -> dict[str, Any]:
    """Settings of a module: its attributes that are plain values, but for the mode it is in."""
    kinds = (bool, int, float, str, tuple)
    return {
        name: value for name, value in sorted(vars(module).items()) if isinstance(value, kinds) and name != "training"
    }


# --- a tiny model, its family and a method on it ---------------------------------------------------------------------
class TinyLM(nn.Module):
    """A causal language model of one block: ids [b, n], 0 is padding on the right -> logits [b, n, V]. Random weights.

    It has what a backbone must not lose when it is frozen: dropout, and a BatchNorm with buffers.
    """

    def __init__(self, vocabulary: int = 12, dim: int = 8, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Embedding(vocabulary, dim)
            self.attention = nn.Linear(dim, 3 * dim)
            self.norm = nn.BatchNorm1d(dim)
            self.dropout = nn.Dropout(0.5)
            self.head = nn.Linear(dim, vocabulary)

    def forward(self, input_ids: Tensor | None = None, embeddings: Tensor | None = None) -> Tensor:
        x = cast(Tensor, self.embed(input_ids)) if embeddings is None else embeddings
        q, k, v = self.attention(x).chunk(3, dim=-1)
        mixed = x + F.scaled_dot_product_attention(q, k, v, is_causal=True)
        hidden = self.dropout(self.norm(mixed.transpose(1, 2)).transpose(1, 2))
        return cast(Tensor, self.head(hidden))


class TinyFamily:
    """How prompts enter a `TinyLM`: tokens in front, whose rows are dropped from the output."""

    name = "tiny"

    def matches(self, backbone: nn.Module) -> bool:
        return isinstance(backbone, TinyLM)

    def check(self, backbone: nn.Module, prompt: Prompt) -> None:
        tokens, dim = prompt.tokens(), cast(TinyLM, backbone).embed.embedding_dim
        if tokens is None or tokens.shape[1] != dim:
            raise InputError(f"a tiny language model takes tokens of width {dim}")

    def patches(
        self, backbone: nn.Module, selected: Callable[[], Rows | None]
    ) -> list[tuple[nn.Module, Callable[[Forward], Forward]]]:
        def wrap(original: Forward) -> Forward:
            def carry(x: Tensor, handle: Handle | None) -> Tensor:
                prompt = handle.prompt.tokens() if handle is not None else None
                if prompt is None:
                    return cast(Tensor, original(embeddings=x))
                x = torch.cat([prompt.expand(len(x), -1, -1), x], dim=1)
                return cast(Tensor, original(embeddings=x)[:, len(prompt) :])

            def forward(input_ids: Tensor | None = None, embeddings: Tensor | None = None) -> Tensor:
                handles = selected()
                if handles is None:
                    return cast(Tensor, original(input_ids, embeddings))
                x = cast(TinyLM, backbone).embed(input_ids) if embeddings is None else embeddings
                if len(handles) == 1:
                    return carry(x, handles[0])
                return torch.cat([carry(x[i : i + 1], handle) for i, handle in enumerate(handles)])

            return forward

        return [(backbone, wrap)]


class TinyPromptConfig(MethodConfig):
    """Settings of the tiny prompt."""

    length: int = 3
    lr: float = 0.1
    bias_lr: float = 0.02
    noise: float = 0.0
    seed: int = 0


class TinyPrompt(Method):
    """A soft prompt and an output bias on a `TinyLM`; tokens are predicted, a class is read off the last one.

    It has two groups with rates of their own, a buffer that counts training rows, and, with `noise`, random numbers of
    all three generators in its loss.
    """

    name = "tiny-prompt"
    config_class: ClassVar[type[MethodConfig]] = TinyPromptConfig
    config: TinyPromptConfig
    rows_seen: Tensor

    def __init__(self, backbone: nn.Module, config: MethodConfig | None = None) -> None:
        super().__init__(backbone, config)
        vocabulary, dim = cast(TinyLM, backbone).embed.weight.shape
        generator = torch.Generator().manual_seed(self.config.seed)
        self.prompt = SoftPrompt(self.config.length, dim, generator=generator)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        self.register_buffer("rows_seen", torch.zeros((), dtype=torch.long))
        register_family(TinyFamily())
        self.handle = attach(backbone, self.prompt, always=False)

    def logits(self, batch: Batch) -> Tensor:
        with self.active():
            return cast(Tensor, self.backbone(batch["input_ids"])) + self.bias

    def forward(self, batch: Batch) -> Output:
        """Class logits [b, 2]: those of tokens 1 and 2 after the last real token."""
        ids = batch["input_ids"]
        last = self.logits(batch)[torch.arange(len(ids)), (ids != 0).sum(1) - 1]
        return Output(logits=last[:, 1:3], features=last)

    def loss(self, batch: Batch) -> Loss:
        """Cross-entropy of the next token, summed over real tokens."""
        logits, wanted = self.logits(batch)[:, :-1], batch["input_ids"][:, 1:]
        if self.training:
            self.rows_seen += len(wanted)
        if self.training and self.config.noise:
            drawn = random.random() + float(np.random.rand())
            logits = logits + self.config.noise * (drawn * logits + torch.randn(logits.shape).to(logits))
        count = (wanted != 0).sum()
        total = F.cross_entropy(logits[wanted != 0].float(), wanted[wanted != 0], reduction="sum")
        return Loss(total, count, {"twice": 2 * total})

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [
            {"name": "prompt", "params": [self.prompt.weight], "lr": self.config.lr},
            {"name": "bias", "params": [self.bias], "lr": self.config.bias_lr},
        ]


def tiny_split(rows: int, seed: int = 0) -> Split:
    """Rows of 2 to 6 tokens of a `TinyLM`, small ids more often, and a class: whether they begin with an odd id."""
    generator = np.random.default_rng(seed)
    ids = [np.minimum(generator.geometric(0.4, generator.integers(2, 7)), 11).tolist() for _ in range(rows)]

    def collate(chosen: list[list[int]]) -> dict[str, Any]:
        padded = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in chosen], batch_first=True)
        return {"input_ids": padded, "labels": padded[:, 0] % 2}

    names = [f"row-{i}" for i in range(rows)]
    return Split(ids, collate, ("accuracy",), num_classes=2, lengths=[len(row) for row in ids], ids=names)


def tiny(seed: int = 0, **config: Any) -> tuple[TinyLM, TinyPrompt]:
    """The tiny language model, and a tiny prompt with start values of `seed` on it."""
    backbone = TinyLM()
    return backbone, TinyPrompt(backbone, TinyPromptConfig(seed=seed, **config))


class TinyBench:
    """Three tasks for one tiny prompt: what a package's bench offers to `pt_core.transfer`."""

    task_names = ("one", "two", "three")
    identity: ClassVar[dict[str, Any]] = {"data": "tiny"}
    folder: Path | None = None

    def __init__(self, steps: int = 4) -> None:
        self.backbone, self.steps = TinyLM(), steps

    def transfer_job(self, label: str, seed: int, task: str, source: Path | None = None) -> tuple[Job, FitConfig]:
        method = TinyPrompt(self.backbone, TinyPromptConfig(seed=seed))
        if source is not None:
            method.load_trained_state(load_file(source))
        rows = 10 * (1 + self.task_names.index(task))
        splits = tiny_split(12, rows + seed), tiny_split(8, rows + 5), tiny_split(16, rows + 6)
        return Job(method, *splits), FitConfig(max_steps=self.steps, batch_size=4, seed=seed, device="cpu", log_every=2)
