"""`pt demo nlp`: a real model, real text, sixteen examples a class, minutes on a laptop.

SmolLM2-135M-Instruct (in a published package, Apache-2.0) on BBC news, or on the user's own file: zero-shot (raw,
calibrated, calibrated on the shots), in-context learning, a linear probe, prompt tuning, DePT and LoRA, side by side; then
the trained prompt is opened in a fresh process and used.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from rich.console import Console

from pt_core import recipe, report, runs
from pt_core.errors import InputError
from pt_nlp.data import read_rows
from pt_nlp.models import Model
from pt_nlp.workbench import Bench

RECIPE = "nlp/bbc-topics"
NOTES = (
    "SmolLM2-135M-Instruct, frozen; a few training texts of each class; a fixed number of held-out test texts, the same for "
    "every method of a seed. Steps are picked on validation texts outside the shots. Zero-shot, in-context and linear probe "
    "train nothing by gradient. zero-shot-calibrated subtracts what the model says of inputs without content (Zhao et al. "
    "2021); shots-calibrated its mean over the training texts, so it sees them, though not their labels. Seconds per step "
    "are wall time in this one run."
)
TEST_ROWS = 150  # half of the recipe's: eight methods within eight minutes on two cores
VALIDATION_ROWS = 30  # at most, as of the recipe's five classes; beyond 30 classes one of each
SHOWN_TOKENS = 2048  # of demonstrations in front of every input: more would outlast all other methods together
HEADLINE = "Champions fight back to win the cup final in extra time"


def settings(shots: int, data: Path | None) -> dict[str, Any]:
    """Changes to the recipe for other shots, or for the user's own file with columns `text` and `label`."""
    changes: dict[str, Any] = {"data.shots": shots, "data.max_test_rows": TEST_ROWS}
    if data is not None:
        labels = sorted({str(row["label"]) for row in read_rows(data, {"text": "text", "label": "label"})})
        if len(labels) < 2:
            raise InputError("all rows have one label", file=data, field="label", remedy="Give at least two classes")
        ask = f"Classify the text. Possible labels: {', '.join(labels[:20])}.\n"
        changes |= {"data.train": str(data), "data.template": "{text}\nLabel:", "data.max_source_length": 96}
        changes["data.validation_shots"] = min(6, max(1, VALIDATION_ROWS // len(labels)))
        changes |= {"method.init_text": ask, "compare.dept.init_text": ask}
        if any(after.startswith(label) for label, after in pairwise(labels)):  # sorted: 1, 10, 2
            changes["data.length_normalised"] = True  # by sums, the longer one could never be the likelier one
    if find_spec("peft") is None:
        changes["compare.lora"] = None
    return changes


def demonstrations(bench: Bench, seeds: Sequence[int]) -> int:
    """Training texts of each class that there are, and room for, in front of every input, whichever are drawn."""
    data, backbone = bench.recipe.data, cast(Model, bench.backbone)
    shown: Any = bench.recipe.with_method("in-context").config()
    found = [data.shots or SHOWN_TOKENS]
    for seed in seeds:
        task = data.task(bench.rows, bench.tokenizer, bench.recipe.backbone.kind, seed)
        assert task.train is not None and task.train.lengths is not None
        longest: dict[int, int] = {}
        for row, length in zip(task.train.rows, task.train.lengths, strict=True):
            longest[row["label"]] = max(length, longest.get(row["label"], 0))
        last = data.max_source_length + max(map(len, task.encoder.candidates()))
        limit = getattr(backbone.config.get_text_config(), "max_position_embeddings", SHOWN_TOKENS + last)
        room = min(SHOWN_TOKENS, limit - last)
        between = len(task.encoder.between(shown.separator_text))
        found.append(max(room, 0) // (sum(longest.values()) + between * len(longest)))
    return min(found)


def run(folder: Path, seeds: int, shots: int, data: Path | None) -> None:
    """Run the demo.

    Args:
        folder: for results; a killed demo goes on from it.
        seeds: runs of each method.
        shots: training texts of each class.
        data: a table with columns `text` and `label` instead of BBC news.
    """
    console, changes = Console(), settings(shots, data)
    _, checked = recipe.load(RECIPE, changes)
    bench = Bench(checked)  # type: ignore[arg-type]
    console.print(f"{checked.about}\nbackbone: {bench.recipe.backbone.name}; {len(bench.rows['train']):,} texts")
    numbers = range(checked.seed, checked.seed + seeds)
    shown: Any = bench.recipe.with_method("in-context").config()
    room = demonstrations(bench, numbers)
    if room < shown.demonstrations:
        what = f"shows {room} of each class, not {shown.demonstrations}" if room else "is left out"
        console.print(f"in-context {what}: there are no more, or more would be too long in front of every input")
        changes["compare.in-context.demonstrations" if room else "compare.in-context"] = room or None
        _, checked = recipe.load(RECIPE, changes)
        bench.recipe = checked  # type: ignore[assignment]
    outcomes = runs.compare_recipe(bench, checked.labels(), numbers, folder)
    results = [outcome.result for outcome in outcomes]
    metrics = ("accuracy", "macro-f1")
    console.print(report.table(results, metrics, title="pt demo nlp"))
    page = report.write_comparison(
        folder, results, runs.histories(outcomes), title="pt demo nlp", notes=NOTES, metrics=metrics
    )
    print(f"table, curves and report: {page}")

    artifact = next(o.artifact for o in outcomes if o.result.method == checked.method.name)
    assert artifact is not None
    text = HEADLINE if data is None else bench.rows["train"][0]["text"]
    answer = runs.predict_afresh(artifact, text)
    print(f"trained prompt: {artifact}\nin a fresh process, {text[:80]!r} -> {answer}")
