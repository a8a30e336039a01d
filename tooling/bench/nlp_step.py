"""Training step and generation of prompt tuning: ours against peft, in one run.

    uv run tooling/bench/nlp_step.py                  # the grid on a small random Llama; SmolLM2-135M on the short texts
    uv run tooling/bench/nlp_step.py --quick          # the headline cell only
    uv run tooling/bench/nlp_step.py --models smollm2-135m --texts 512 --batches 4  # 16 rows take much memory
    uv run tooling/bench/nlp_step.py --cpu-time       # one thread and its CPU time: for a machine that others use as well
    uv run tooling/bench/nlp_step.py --device cuda --texts 48,512

For each cell (prompt length, text length, batch) it alternates between five training steps of the same loss in the same
dtype with the same attention kernel, and prints the median and the range of the ratio over the rounds (fewer rounds in
cells that take long), as Markdown:

    ours        prompt and texts as one row without padding, logits and most of the last block at labels only
    packed      the same with packed copies of frozen weights, as a run with `packed_gib: 2` (on a CPU; pt_core.packing)
    peft        PeftModelForCausalLM with labels
    peft-lean   peft's base model with logits at labels only, so that the gain is not all in the language model head
    floor       the same model and batch without a prompt: forward, and backward to the input embeddings, logits at labels

Texts have 70 to 100 % of a cell's length and are padded to it; ours leaves padding out, all others compute it. The predicted
ceiling is token and logit arithmetic: multiply-adds of peft's step over those of a step with the prompt once, no padding and
logits at labels only (linear layers, attention, head). That the last block, too, computes what is read only stands in
the least that ours can cost over the floor, not in the ceiling. Memory is the peak of one step of ours and of peft beyond the
model, in a process of its own; what packed copies take stands below the table.
"""

from __future__ import annotations

import copy
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from memory import peak
from peft import PromptTuningConfig as PeftConfig
from peft import get_peft_model
from rich import box
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pt_core.attachment import attach, route
from pt_core.packing import packed
from pt_core.prompts import SoftPrompt
from pt_nlp import assets
from pt_nlp.methods.prompt_tuning import PromptTuning, PromptTuningConfig

console = Console(width=200)
LABELS = 8  # labelled tokens at the end of each row


def small_llama(device: torch.device, dtype: torch.dtype) -> Any:
    """6 layers, d 384, 6 heads with 2 key-value heads, vocabulary 8000; random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8000,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        eos_token_id=None,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).to(device, dtype).eval()


def smollm2(device: torch.device, dtype: torch.dtype) -> Any:
    """SmolLM2-135M-Instruct from its published package."""
    return AutoModelForCausalLM.from_pretrained(assets.smollm2(), dtype=dtype).to(device).eval()


MODELS = {"small-llama": small_llama, "smollm2-135m": smollm2}


def multiply_adds(config: Any, lengths: list[int], prompt: int, shared: bool, last: bool = False) -> float:
    """Multiply-adds of one forward pass; the backward pass to the inputs costs as much again and cancels in ratios.

    Args:
        lengths: tokens of each row.
        shared: the prompt is computed once for the batch, and logits only at the labels.
        last: and so are queries and all behind the attention of the last block.
    """
    d, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or d // heads
    q, kv = heads * head_dim, config.num_key_value_heads * head_dim
    linear = config.num_hidden_layers * (d * (2 * q + 2 * kv) + 3 * d * config.intermediate_size)
    attention = config.num_hidden_layers * 2 * q
    if shared:
        positions = sum(lengths) + prompt
        pairs = sum(n * (prompt + n) for n in lengths) + prompt * prompt
        read = len(lengths) * LABELS
    else:
        positions = sum(n + prompt for n in lengths)
        pairs = sum((n + prompt) ** 2 for n in lengths)
        read = positions
    left_out = (positions - read) * (2 * d * q + 3 * d * config.intermediate_size) if last else 0
    return float(positions * linear - left_out + pairs * attention + read * d * config.vocab_size)


class Cell:
    """One model, prompt, text length and batch, and the steps that are timed on it."""

    def __init__(self, model: Any, prompt: int, text: int, batch: int) -> None:
        self.model, self.config = model, model.config
        device = model.device
        generator = torch.Generator().manual_seed(0)
        vocabulary = self.config.vocab_size
        ids = torch.randint(0, vocabulary, (batch, text), generator=generator)
        lengths = torch.randint(int(0.7 * text), text + 1, (batch,), generator=generator)
        mask = (torch.arange(text)[None] < lengths[:, None]).long()
        at = torch.arange(text)[None]
        targets = torch.where((at < lengths[:, None]) & (at >= lengths[:, None] - LABELS), ids, -100)
        self.ids, self.mask, self.targets = ids.to(device), mask.to(device), targets.to(device)
        self.wanted = self.targets[:, 1:] != -100
        start = torch.randn(prompt, self.config.hidden_size, generator=generator) * 0.02
        # Structure copied, weights shared: peft wraps a model of its own without a second copy in memory.
        clone = copy.deepcopy(model, {id(t): t for t in [*model.parameters(), *model.buffers()]})
        self.method = PromptTuning(model, PromptTuningConfig(prompt_length=prompt))
        self.method.to(device)
        self.peft = get_peft_model(clone, PeftConfig(task_type="CAUSAL_LM", num_virtual_tokens=prompt))
        self.peft.eval()
        self.weight = self.peft.prompt_encoder.default.embedding.weight
        self.packed = packed(model)
        with torch.no_grad():
            self.method.prompt.weight.copy_(start)
            self.weight.copy_(start)

    def ours_packed(self) -> torch.Tensor:
        with self.packed:
            return self.ours()

    def ours(self) -> torch.Tensor:
        self.method.prompt.weight.grad = None
        batch = {"input_ids": self.ids, "attention_mask": self.mask, "target_ids": self.targets}
        loss = self.method.loss(batch).value
        loss.backward()
        return loss.detach()

    def peft_step(self) -> torch.Tensor:
        self.weight.grad = None
        loss = self.peft(input_ids=self.ids, attention_mask=self.mask, labels=self.targets).loss
        loss.backward()
        return loss.detach()

    def peft_lean(self) -> torch.Tensor:
        self.weight.grad = None
        base = self.peft.get_base_model()
        prompt = self.peft.get_prompt(batch_size=len(self.ids)).to(base.dtype)
        embeds = torch.cat([prompt, base.get_input_embeddings()(self.ids)], dim=1)
        mask = torch.cat([self.mask.new_ones(len(self.ids), prompt.shape[1]), self.mask], dim=1)
        states = base.model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
        return self._loss(base, states[:, prompt.shape[1] :])

    def floor(self) -> torch.Tensor:
        base = self.peft.get_base_model()
        embeds = base.get_input_embeddings()(self.ids).detach().requires_grad_()
        states = base.model(inputs_embeds=embeds, attention_mask=self.mask, use_cache=False).last_hidden_state
        return self._loss(base, states)

    def _loss(self, base: Any, states: torch.Tensor) -> torch.Tensor:
        logits = base.lm_head(states[:, :-1][self.wanted])
        loss = F.cross_entropy(logits.float(), self.targets[:, 1:][self.wanted])
        loss.backward()
        return loss.detach()

    def gradient_difference(self) -> float:
        """Relative difference of the prompt's gradients, ours against peft."""
        self.ours()
        self.peft_step()
        ours, theirs = self.method.prompt.weight.grad, self.weight.grad
        assert ours is not None and theirs is not None
        return float((ours - theirs).norm() / theirs.norm())

    def close(self) -> None:
        self.method.remove()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Timing:
    """How steps are timed.

    Args:
        device: where they run.
        rounds: at most so many.
        seconds: after these no further round begins, but three are made.
        clock: wall time, or the CPU time of this process.
    """

    device: torch.device
    rounds: int
    seconds: float
    clock: Callable[[], float]


def alternate(steps: dict[str, Callable[[], Any]], timing: Timing) -> dict[str, list[float]]:
    """Seconds of each step, in rounds that alternate between them after one warm-up round."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    began = time.perf_counter()
    for round_ in range(timing.rounds + 1):
        if round_ > 3 and time.perf_counter() - began > timing.seconds:
            break
        for name, step in steps.items():
            _wait(timing.device)
            started = timing.clock()
            step()
            _wait(timing.device)
            if round_:
                taken[name].append(timing.clock() - started)
    return taken


def ratios(times: dict[str, list[float]], of: str, to: str) -> tuple[float, float, float]:
    """Median, smallest and largest of the round-by-round ratio of two steps' times."""
    values = [a / b for a, b in zip(times[of], times[to], strict=True)]
    return statistics.median(values), min(values), max(values)


def peak_memory(name: str, cell: tuple[int, int, int], step: str, device: str, dtype: str) -> float:
    """Peak memory of one kind of step in MiB beyond the loaded model, measured in a process of its own."""
    arguments = json.dumps([name, *cell, step, device, dtype])
    done = subprocess.run(
        [sys.executable, __file__, "--memory-of", arguments], check=True, capture_output=True, text=True
    )
    return float(done.stdout.strip().splitlines()[-1])


def _measure_memory(arguments: str) -> None:
    name, prompt, text, batch, step, device_name, dtype = json.loads(arguments)
    device = torch.device(device_name)
    cell = Cell(MODELS[name](device, getattr(torch, dtype)), prompt, text, batch)
    run = {"ours": cell.ours, "peft": cell.peft_step}[step]
    print(peak(run, device) / 2**20)


def training(name: str, cells: Iterable[tuple[int, ...]], timing: Timing, dtype: torch.dtype, memory: bool) -> None:
    """Print the table of training steps of one model."""
    device = timing.device
    model = MODELS[name](device, dtype)
    kind = str(dtype).removeprefix("torch.")
    table = Table(
        *("prompt", "text", "batch", "rounds", "peft / ours", "range", "ceiling", "share", "ours / packed"),
        *("lean / ours", "ours / floor", "least", "ours s", "peft s", "gradient diff"),
        *(("MiB ours", "MiB peft") if memory else ()),
        box=box.MARKDOWN,
    )
    for prompt, text, batch in cells:
        cell = Cell(model, prompt, text, batch)
        difference = cell.gradient_difference()
        steps = {"ours": cell.ours, "packed": cell.ours_packed, "peft": cell.peft_step}
        steps |= {"lean": cell.peft_lean, "floor": cell.floor}
        times = alternate(steps, timing)
        cell.close()
        real, padded = cell.mask.sum(1).tolist(), [text] * batch
        ours = multiply_adds(model.config, real, prompt, shared=True)
        ceiling = multiply_adds(model.config, padded, prompt, shared=False) / ours
        floor = multiply_adds(model.config, padded, 0, shared=True)
        least = multiply_adds(model.config, real, prompt, shared=True, last=True) / floor
        ratio, low, high = ratios(times, "peft", "ours")
        peaks = [
            f"{peak_memory(name, (prompt, text, batch), step, device.type, kind):.0f}"
            for step in (("ours", "peft") if memory else ())
        ]
        table.add_row(
            *(str(prompt), str(text), str(batch), str(len(times["ours"]))),
            *(f"{ratio:.2f}", f"{low:.2f}-{high:.2f}", f"{ceiling:.2f}", f"{ratio / ceiling:.0%}"),
            *(f"{ratios(times, a, b)[0]:.2f}" for a, b in (("ours", "packed"), ("lean", "ours"), ("ours", "floor"))),
            f"{least:.2f}",
            *(f"{statistics.median(times[step]):.3f}" for step in ("ours", "peft")),
            *(f"{difference:.1e}", *peaks),
        )
        print(f"{name} {prompt} x {text} x {batch} done", file=sys.stderr)
    console.print(f"\nTraining step, {name}, {kind}, {device.type}:")
    console.print(table)
    console.print(f"Packed copies: {packed(model).nbytes / 2**20:.0f} MiB.")


def generation(name: str, timing: Timing, dtype: torch.dtype) -> None:
    """Print generation throughput: a stored prompt against peft, and 16 prompts in one batch against one."""
    device = timing.device
    model = MODELS[name](device, dtype)
    cell = Cell(model, 100, 48, 16)
    new_tokens = 16
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    left = {"input_ids": cell.ids.flip(1), "attention_mask": cell.mask.flip(1)}
    handles = [
        attach(model, SoftPrompt(100, model.config.hidden_size, std=0.02).to(device), always=False) for _ in range(16)
    ]

    def many() -> Any:
        with route(model, handles):
            return model.generate(**left, **options)

    def one() -> Any:
        return cell.method.generate(left, **options)

    def of_packed(run: Callable[[], Any]) -> Any:
        with cell.packed:
            return run()

    steps = {
        "one stored prompt": one,
        "16 stored prompts": many,
        "one stored prompt, packed weights": lambda: of_packed(one),
        "16 stored prompts, packed weights": lambda: of_packed(many),
        "peft": lambda: cell.peft.generate(**left, **options),
    }
    with torch.no_grad():
        times = alternate(steps, timing)
    table = Table("generation", "rounds", "tokens / s", "against peft", "against one prompt", box=box.MARKDOWN)
    for step in steps:
        speed = 16 * new_tokens / statistics.median(times[step])
        table.add_row(
            *(step, str(len(times[step])), f"{speed:.0f}"),
            f"{ratios(times, 'peft', step)[0]:.2f}",
            f"{ratios(times, 'one stored prompt', step)[0]:.2f}",
        )
    console.print(f"\nGeneration of {new_tokens} tokens, {name}: 16 rows of at most 48, prompt 100:")
    console.print(table)
    for handle in handles:
        handle.remove()
    cell.close()


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    rounds: Annotated[int, typer.Option(help="alternating rounds of a cell at most")] = 9,
    seconds: Annotated[float, typer.Option(help="after these a cell makes no further round, once it has three")] = 45,
    models: Annotated[str, typer.Option(help="which, by commas")] = ",".join(MODELS),
    prompts: Annotated[str, typer.Option(help="prompt lengths, by commas")] = "20,100",
    texts: Annotated[str, typer.Option(help="text lengths; default: 48,512, SmolLM2 48 only")] = "",
    batches: Annotated[str, typer.Option(help="rows")] = "4,16",
    quick: Annotated[bool, typer.Option(help="the headline cell only, 100 x 48 x 16")] = False,
    cpu_time: Annotated[bool, typer.Option(help="one thread, and its CPU time")] = False,
    memory: Annotated[bool, typer.Option(help="measure peak memory as well")] = True,
    memory_of: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Run the benchmark; see the file's first lines."""
    if memory_of is not None:
        _measure_memory(memory_of)
        return
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise typer.BadParameter("torch finds no GPU here", param_hint="--device")
    where, kind = torch.device(device), getattr(torch, dtype)
    if cpu_time:
        torch.set_num_threads(1)
    timing = Timing(where, rounds, seconds, time.process_time if cpu_time else time.perf_counter)
    clock = "CPU time" if cpu_time else "wall time"
    place = torch.cuda.get_device_name(where) if where.type == "cuda" else f"{torch.get_num_threads()} threads"
    console.print(f"torch {torch.__version__}, {place}, {dtype}, {clock}")
    for name in models.split(","):
        lengths = texts or ("48,512" if name == "small-llama" else "48")
        axes = ("100", "48", "16") if quick else (prompts, lengths, batches)
        cells = itertools.product(*([int(value) for value in axis.split(",")] for axis in axes))
        training(name, cells, timing, kind, memory)
        generation(name, timing, kind)


if __name__ == "__main__":
    typer.run(main)
