"""Training steps of CoOp, CoCoOp and MaPLe: ours against the step written out plainly, in one run.

    uv run tooling/bench/vl_step.py                  # 10, 100 and 1,000 classes: some minutes a method
    uv run tooling/bench/vl_step.py --quick          # 100 classes only
    uv run tooling/bench/vl_step.py --markdown       # the table as it stands in the README of pt-vl
    uv run tooling/bench/vl_step.py --cpu-time       # one thread and its CPU time: for a machine that others use as well
    uv run tooling/bench/vl_step.py --device cuda

The model is a CLIP of the size of ViT-B/32 with random weights; class names have 3 tokens, batches 8 images; the context is
16 rows for CoOp, 4 for CoCoOp, 2 in each of 9 blocks for MaPLe. A step is forward and backward of the cross-entropy.

The plain step is what the public programs do: 77 slots for every class, both towers in every step, every image of CoCoOp
with a text pass of its own, nothing shared, cached, cut or recomputed. It has the same weights, prompts, dtype and attention
kernel, and its prompts' gradients are compared with ours (`diff`, relative). CoOp does not prompt the image tower, and has
three lines:

    augmented      the published augmentation: every view is new, the image tower runs in both
    fixed          no augmentation: image features are cached in both
    fixed, plain runs tower     ours caches them, the plain step does not

`operations` are those of the plain step over ours (torch.utils.flop_counter: matrix products, attention, convolutions; what
is recomputed counts again), `share` is how much of them the measured ratio of times reached: median of rounds that alternate
between the steps. With --gib 2 ours reads packed copies of the frozen weights, as a run with `packed_gib: 2` does
(pt_core.packing). Memory is the peak of one step beyond model, inputs and these copies, whose size is below the table. Each
cell runs in a process of its own. A plain step that does not fit into memory, or has more operations than --limit, is not
run: the line says so, its operations are still exact (they are linear in the classes), and a smaller cell follows: 250
classes; for CoCoOp also one image, its published batch.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from memory import peak
from rich import box
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from pt_core.packing import packed
from pt_vl.backbones import DualEncoder
from pt_vl.method import VLMethod, written
from pt_vl.methods.cocoop import CoCoOp, CoCoOpConfig
from pt_vl.methods.coop import CoOp, CoOpConfig
from pt_vl.methods.maple import MaPLe, MaPLeConfig

console = Console(width=200)
GIB = 2**30
LINES = {  # method -> line -> (plain step, our step)
    "coop": {
        "augmented": ("plain", "ours"),
        "fixed": ("plain-fixed", "ours-fixed"),
        "fixed, plain runs tower": ("plain", "ours-fixed"),
    },
    "cocoop": {"augmented": ("plain", "ours")},
    "maple": {"augmented": ("plain", "ours")},
}


# --- the model and its words ------------------------------------------------------------------------------------------
def random_clip(text: Mapping[str, int] | None = None, vision: Mapping[str, int] | None = None, seed: int = 0) -> Any:
    """A frozen CLIP with random weights; the defaults of `CLIPConfig` are the sizes of ViT-B/32."""
    torch.manual_seed(seed)
    return (
        CLIPModel(CLIPConfig(text_config=dict(text or {}), vision_config=dict(vision or {})))
        .requires_grad_(False)
        .eval()
    )


def tokeniser(config: Any) -> PreTrainedTokenizerFast:
    """A token for each word: those of "a photo of a .", then w0, w1 ..; the model's own ids for [SOS] and [EOS]."""
    words = ["a", "photo", "of", ".", "<unk>"]
    words += [f"w{i}" for i in range(config.bos_token_id - len(words))]
    vocabulary = {word: i for i, word in enumerate(words)} | {
        "<sot>": config.bos_token_id,
        "<eot>": config.eos_token_id,
    }
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("<sot>", config.bos_token_id), ("<eot>", config.eos_token_id)]
    made.post_processor = processors.TemplateProcessing(single="<sot> $A <eot>", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<eot>", eos_token="<eot>", unk_token="<unk>")


def names(classes: int, words: int) -> tuple[str, ...]:
    """Class names of three tokens."""
    return tuple(f"w{i % words} w{(7 * i + i // words) % words} w{(11 * i) % words}" for i in range(classes))


# --- the plain step ---------------------------------------------------------------------------------------------------
class Plain:
    """The plain step of a method of ours, on the same model and the same trained tensors."""

    def __init__(self, method: VLMethod, model: Any, words: PreTrainedTokenizerFast) -> None:
        self.method, self.model = method, model
        text = model.text_model
        slots, m = text.config.max_position_embeddings, len(method.context)
        phrase = " of a" if isinstance(method, MaPLe) else ""  # the words of "a photo of a" that stay frozen
        told = [f"{' '.join(['a'] * m)}{phrase} {written(name)}." for name in method.config.class_names]
        ids = words(told, padding="max_length", max_length=slots, return_tensors="pt")["input_ids"].to(model.device)
        self.eot = (ids == text.config.eos_token_id).int().argmax(-1)
        with torch.no_grad():
            embedded = text.embeddings.token_embedding(ids)
        self.start, self.end = embedded[:, :1], embedded[:, 1 + m :]
        self.places = text.embeddings.position_embedding.weight
        self.dtype = embedded.dtype

    def text(self, context: Tensor, deep: Sequence[Tensor] = ()) -> Tensor:
        """Class features [C, d]: 77 slots of each class through all blocks."""
        text, classes = self.model.text_model, len(self.start)
        rows = context.to(self.dtype).expand(classes, -1, -1)
        hidden = torch.cat([self.start, rows, self.end], dim=1) + self.places
        for index, layer in enumerate(text.encoder.layers):
            if 1 <= index <= len(deep):
                rows = deep[index - 1].to(self.dtype).expand(classes, -1, -1)
                hidden = torch.cat([hidden[:, :1], rows, hidden[:, 1 + rows.shape[1] :]], dim=1)
            hidden = layer(hidden, None, is_causal=True)
        hidden = text.final_layer_norm(hidden)
        found: Tensor = self.model.text_projection(hidden[torch.arange(classes, device=hidden.device), self.eot])
        return found

    def image(self, pixels: Tensor, prompts: Sequence[Tensor] = ()) -> Tensor:
        """Image features [B, d]; prompts are last in the sequence."""
        tower = self.model.vision_model
        hidden = tower.embeddings(pixels)
        patches = hidden.shape[1]
        for index, layer in enumerate(tower.encoder.layers):
            if index < len(prompts):
                rows = prompts[index].to(self.dtype).expand(len(pixels), -1, -1)
                hidden = torch.cat([hidden[:, :patches], rows], dim=1)
            hidden = layer(tower.pre_layrnorm(hidden) if index == 0 else hidden, None)
        found: Tensor = self.model.visual_projection(tower.post_layernorm(hidden[:, 0]))
        return found

    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        method = self.method
        if isinstance(method, MaPLe):
            visual = [method.projection(method.context)]
            visual += [project(t) for project, t in zip(method.deep_projections, method.deep, strict=True)]
            image = self.image(batch["pixels"], visual)
            return self.compare(image, self.text(method.context, list(method.deep)))
        image = batch["image_features"] if "image_features" in batch else self.image(batch["pixels"])
        if isinstance(method, CoCoOp):
            shifts = method.meta_net(F.normalize(image.float(), dim=-1))
            pairs = zip(image, shifts, strict=True)
            return torch.cat([self.compare(f[None], self.text(method.context + shift)) for f, shift in pairs])
        return self.compare(image, self.text(method.context))

    def compare(self, image: Tensor, text: Tensor) -> Tensor:
        image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
        return self.model.logit_scale.float().exp() * image @ text.T

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        return F.cross_entropy(self.logits(batch), batch["labels"])


# --- a cell -----------------------------------------------------------------------------------------------------------
class Cell:
    """A method, a number of classes and a batch, and the steps that are timed on them.

    Args:
        model: a CLIP (`random_clip`).
        name: of the method.
        classes: C.
        batch: B.
        settings: of the method, in the place of the published ones.
    """

    def __init__(
        self, model: Any, name: str, classes: int, batch: int, settings: Mapping[str, Any] | None = None
    ) -> None:
        words = tokeniser(model.text_model.config)
        vocabulary = len(words) - 7
        options: dict[str, Any] = {"class_names": names(classes, vocabulary), **(settings or {})}
        backbone = DualEncoder(model, words)
        kind, config = {"coop": (CoOp, CoOpConfig), "cocoop": (CoCoOp, CoCoOpConfig), "maple": (MaPLe, MaPLeConfig)}[
            name
        ]
        self.model, self.method = model, kind(backbone, config(**options)).to(model.device)
        self.trained = [p for p in self.method.parameters() if p.requires_grad]
        self.plain = Plain(self.method, model, words)
        self.packed = packed(model, 0)
        generator, size = torch.Generator().manual_seed(0), model.vision_model.config.image_size
        pixels = torch.randn(batch, 3, size, size, generator=generator).to(model.device, model.dtype)
        labels = torch.randint(0, classes, (batch,), generator=generator).to(model.device)
        self.augmented = {"pixels": pixels, "labels": labels}
        with torch.no_grad():
            self.fixed = {"image_features": backbone.image(pixels), "labels": labels}

    def steps(self) -> dict[str, Callable[[], None]]:
        """Forward and backward, by name."""
        return {
            "ours": lambda: self.step(self.ours(self.augmented)),
            "plain": lambda: self.step(self.plain.loss(self.augmented)),
            "ours-fixed": lambda: self.step(self.ours(self.fixed)),
            "plain-fixed": lambda: self.step(self.plain.loss(self.fixed)),
        }

    def ours(self, batch: Mapping[str, Any]) -> Tensor:
        with self.packed:
            return self.method.loss(batch).value

    def step(self, loss: Tensor) -> None:
        for parameter in self.trained:
            parameter.grad = None
        loss.backward()

    def gradient(self) -> Tensor:
        """Gradients of all that is trained, in one row."""
        return torch.cat([p.grad.flatten().cpu().double() for p in self.trained if p.grad is not None])

    def needs(self, kind: str) -> tuple[int, int]:
        """Operations of a step, and the bytes that autograd holds between its forward and backward, weights left out."""
        known = {p.untyped_storage().data_ptr() for p in [*self.model.parameters(), *self.trained]}
        found: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if (at := tensor.untyped_storage().data_ptr()) not in known:
                found[at] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            count = operations(self.steps()[kind])
        return count, sum(found.values())


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


ATTENTION = {  # the counter does not know the CPU's kernel; counted as those that it knows, hidden slots included
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def operations(step: Callable[[], Any]) -> int:
    """Floating-point operations of a step, backward included."""
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        step()
    return int(counter.get_total_flops())


# --- measuring --------------------------------------------------------------------------------------------------------
def available(device: torch.device) -> int:
    """Bytes of memory that a step can have."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def measure(
    name: str,
    classes: int,
    batch: int,
    device: str,
    dtype: str,
    rounds: int,
    seconds: float,
    limit: float,
    cpu_time: bool,
    gib: float,
) -> dict[str, Any]:
    """All numbers of one cell, in this process."""
    if cpu_time:
        torch.set_num_threads(1)
    clock, where = time.process_time if cpu_time else time.perf_counter, torch.device(device)
    model = random_clip().to(where, getattr(torch, dtype))
    found: dict[str, Any] = {"operations": {}, "seconds": {}, "peak": {}, "difference": {}}
    kinds = {step for pair in LINES[name].values() for step in pair}

    # What the plain step needs is linear in the classes, so that it is known without running it.
    few, more = Cell(model, name, 2, batch), Cell(model, name, 3, batch)
    for kind in sorted(kinds & {"plain", "plain-fixed"}, reverse=True):
        needs = zip(few.needs(kind), more.needs(kind), strict=True)
        count, held = [low + (high - low) * (classes - 2) for low, high in needs]
        found["operations"][kind], found["holds"] = count, max(held, found.get("holds", 0))
    found["available"] = available(where)
    del few, more
    fits = found["holds"] * 1.15 < found["available"]
    runs = fits and not (limit and found["operations"]["plain"] > limit * 1e12)
    found["skipped"] = "" if runs else "does not fit" if not fits else "takes too long here"

    cell = Cell(model, name, classes, batch)
    steps = {kind: step for kind, step in cell.steps().items() if kind in kinds and (runs or "plain" not in kind)}
    for kind in [kind for kind in steps if "ours" in kind]:
        found["operations"][kind] = operations(steps[kind])
    cell.packed = packed(model, gib)
    found["packed"] = cell.packed.nbytes
    if gib:
        steps["ours"]()  # makes the copies, which are there once and not in each step

    def once(kind: str) -> float:
        if where.type == "cuda":
            torch.cuda.synchronize(where)
        started = clock()
        steps[kind]()
        if where.type == "cuda":
            torch.cuda.synchronize(where)
        return clock() - started

    began, gradients = time.perf_counter(), {}
    for kind in steps:  # warm-up
        taken: list[float] = []
        found["peak"][kind] = peak(lambda kind=kind, taken=taken: taken.append(once(kind)), where)
        found["seconds"][kind], gradients[kind] = taken, cell.gradient()
    for line, (plain, ours) in LINES[name].items():
        if runs:
            found["difference"][line] = float((gradients[ours] - gradients[plain]).norm() / gradients[plain].norm())
    warm = time.perf_counter() - began
    if runs or warm < seconds * len(steps):  # steps that take this long by themselves are not run again
        found["seconds"] = {kind: [] for kind in steps}
        for round_ in range(rounds):
            if round_ >= 2 and time.perf_counter() - began > seconds:
                break
            for kind in steps:
                found["seconds"][kind].append(once(kind))
    return found


def apart(*given: Any) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--cell", json.dumps(given)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def rows(name: str, classes: int, batch: int, found: Mapping[str, Any]) -> list[list[str]]:
    """The lines of a cell in the table."""
    made, seconds, counts = [], found["seconds"], found["operations"]
    for line, (plain, ours) in LINES[name].items():
        expected = counts[plain] / counts[ours]
        row = [name, line, f"{classes:,}", str(batch), str(len(seconds.get(ours, [])))]
        if plain in seconds:
            values = [a / b for a, b in zip(seconds[plain], seconds[ours], strict=True)]
            ratio = statistics.median(values)
            row += [
                f"{ratio:.2f}",
                f"{min(values):.2f}-{max(values):.2f}",
                f"{expected:.2f}",
                f"{ratio / expected:.0%}",
            ]
        else:
            row += ["-", found["skipped"], f"{expected:.2f}", "-"]
        row += [f"{statistics.median(seconds[ours]):.3f}" if seconds.get(ours) else "-"]
        row += [f"{statistics.median(seconds[plain]):.3f}" if plain in seconds else "-"]
        row += [f"{counts[kind] / 1e9:,.0f}" for kind in (ours, plain)]
        row += [f"{found['difference'][line]:.1e}" if line in found["difference"] else "-"]
        row += [f"{found['peak'][kind] / 2**20:,.0f}" if kind in found["peak"] else "-" for kind in (ours, plain)]
        made.append(row)
    return made


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    rounds: Annotated[int, typer.Option(help="alternating rounds of a cell at most")] = 5,
    seconds: Annotated[float, typer.Option(help="after these a cell makes no further round, once it has two")] = 30,
    methods: Annotated[str, typer.Option(help="which, by commas")] = ",".join(LINES),
    classes: Annotated[str, typer.Option(help="how many, by commas")] = "10,100,1000",
    batch: Annotated[int, typer.Option(help="images of a step")] = 8,
    limit: Annotated[
        float | None, typer.Option(help="a plain step of more 1e12 operations is not run; default: 5 on a CPU; 0: none")
    ] = None,
    quick: Annotated[bool, typer.Option(help="100 classes only")] = False,
    cpu_time: Annotated[bool, typer.Option(help="one thread, and its CPU time")] = False,
    gib: Annotated[float, typer.Option(help="memory for packed copies of frozen weights, as `packed_gib`")] = 0,
    markdown: Annotated[bool, typer.Option(help="print the table as Markdown")] = False,
    cell: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Run the benchmark; see the file's first lines."""
    if cell is not None:
        print(json.dumps(measure(*json.loads(cell))))
        return
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise typer.BadParameter("torch finds no GPU here", param_hint="--device")
    if limit is None:
        limit = 5 if device == "cpu" else 0
    threads = 1 if cpu_time else torch.get_num_threads()
    place = (
        torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{threads} thread{'s' * (threads > 1)}"
    )
    clock = "CPU time" if cpu_time else "wall time"
    console.print(
        f"torch {torch.__version__}, {place}, {dtype}, {clock}; CLIP ViT-B/32, random weights; packed: {gib} GiB"
    )
    table = Table(
        *("method", "images", "classes", "batch", "rounds", "plain / ours", "range", "operations", "share"),
        *("ours s", "plain s", "ours GFLOP", "plain GFLOP", "diff", "MiB ours", "MiB plain"),
        box=box.MARKDOWN if markdown else box.SIMPLE,
    )
    copies, notes, began = [], [], time.perf_counter()
    for name in methods.split(","):
        for count in [100] if quick else [int(c) for c in classes.split(",")]:
            # Where the plain step is too large: at most 250 classes; for CoCoOp one image, the published batch.
            smaller = (name, min(count, 250), 1 if name == "cocoop" else batch)
            cases = [(name, count, batch)]
            while cases:
                case = cases.pop()
                try:
                    found = apart(*case, device, dtype, rounds, seconds, limit, cpu_time, gib)
                except subprocess.CalledProcessError as error:
                    notes.append(
                        f"{name}, {case[1]:,} classes, batch {case[2]}: its process ended with {error.returncode}."
                    )
                    continue
                copies.append(found["packed"])
                for row in rows(*case, found):
                    table.add_row(*row)
                    print(" | ".join(row), file=sys.stderr)  # a run that is cut off has not been in vain
                if found["skipped"]:
                    notes.append(
                        f"{name}, {case[1]:,} classes, batch {case[2]}: the plain step {found['skipped']}: it holds "
                        f"{found['holds'] / GIB:.1f} GiB of activations ({found['available'] / GIB:.1f} GiB are free) and has "
                        f"{found['operations']['plain'] / 1e12:.1f}e12 operations. Ours alone."
                    )
                    if smaller != case:
                        cases.append(smaller)
                print(f"{case} done, {time.perf_counter() - began:.0f} s", file=sys.stderr)
    console.print(table)
    if any(copies):
        console.print(f"packed copies of frozen weights: at most {max(copies) / 2**20:,.0f} MiB")
    for note in notes:
        console.print(note, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
