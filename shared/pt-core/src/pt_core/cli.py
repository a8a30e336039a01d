"""The command line `pt`. Modality packages plug in by entry points; what they do lies in their `workbench` module.

A workbench offers:

    Recipe                                          the package's recipe schema (a subclass of pt_core.recipe.Recipe)
    Bench(recipe)                                   loads backbone and data once; `.job(label, seed) -> (Job, FitConfig)`
    open_artifact(folder, backbone) -> session      a trained prompt on its backbone, with `.predict(rows)`, `.evaluate(file)`,
                                                    `.rows(file)` and `.export(format, folder)`
    demo(folder, seeds, data, fast)                 the package's demo

Bad input ends in one line on stderr and exit code 2.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from pt_core import registry
from pt_core.errors import InputError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Prompt tuning for every modality."
)
console = Console()

Setting = Annotated[list[str], typer.Option("--set", help="override a key of the recipe: key.key=value (repeatable)")]
Output = Annotated[Path, typer.Option("--output", "-o", help="folder for results")]
Backbone = Annotated[str | None, typer.Option(help="hub id or folder of the backbone; default: the artifact's own")]


@app.command("list")
def list_methods(recipes: Annotated[bool, typer.Option(help="list recipes instead of methods")] = False) -> None:
    """Show the installed methods, or recipes. Imports no modality."""
    if recipes:
        from pt_core import recipe

        table = Table("recipe", "what it shows")
        for name, about in recipe.installed().items():
            table.add_row(name, about)
    else:
        table = Table("method", "package", "paper", "what is trained", "parameters", "for", "fidelity")
        for entry in registry.methods().values():
            table.add_row(
                entry.name,
                entry.package,
                entry.paper,
                entry.kind,
                f"{entry.parameters:,}" if entry.parameters else "none",
                entry.reference,
                entry.fidelity,
            )
    console.print(table)


@app.command()
def demo(
    modality: Annotated[str | None, typer.Argument(help="package to show; default: the first installed")] = None,
    output: Output = Path("runs/demo"),
    seeds: Annotated[int, typer.Option(min=1, help="runs of each method")] = 1,
    shots: Annotated[int, typer.Option(min=1, help="training examples of each class")] = 16,
    data: Annotated[Path | None, typer.Option(help="your own file instead of the demo's data")] = None,
) -> None:
    """Run the main job of a package on real data and real weights, on a laptop."""
    installed = registry.packages()
    if not installed:
        raise InputError("no modality package is installed", remedy="Install one, such as packages/pt-nlp")
    registry.workbench(modality or next(iter(installed))).demo(output, seeds=seeds, shots=shots, data=data)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="installed recipe (`pt list --recipes`) or path of a YAML file")],
    settings: Setting = [],  # noqa: B006 - typer reads the default
    output: Output = Path("runs/train"),
    seed: Annotated[int | None, typer.Option(help="default: the recipe's")] = None,
) -> None:
    """Train the method of a recipe and keep the prompt. A killed run goes on when it is started again."""
    from pt_core import recipe as recipes
    from pt_core import report, runs

    package, checked = recipes.load(recipe, settings)
    label = str(checked.method["name"])
    job, config = registry.workbench(package).Bench(checked).job(label, checked.seed if seed is None else seed)
    outcome = runs.train(job, config, output)
    console.print(report.table([outcome.result], title=recipe))
    if outcome.history:
        report.curves({label: [outcome.history]}, output / "curves.png")
    report.to_json([outcome.result], output / "results.json")
    if outcome.artifact is not None:
        console.print(f"trained prompt: {outcome.artifact}")


@app.command()
def compare(
    recipe: Annotated[str, typer.Argument(help="installed recipe or path of a YAML file")],
    methods: Annotated[str | None, typer.Option(help="comma-separated; default: the recipe's own comparison")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="runs of each method")] = 3,
    settings: Setting = [],  # noqa: B006
    output: Output = Path("runs/compare"),
) -> None:
    """Train methods side by side; write table, plots and a report. A killed comparison goes on when it is started again."""
    from pt_core import recipe as recipes
    from pt_core import report, runs

    package, checked = recipes.load(recipe, settings)
    labels = [label.strip() for label in methods.split(",")] if methods else checked.labels()
    for label in labels:
        recipes.method_config(checked.with_method(label))
    bench = registry.workbench(package).Bench(checked)
    outcomes = runs.compare(
        {label: lambda seed, label=label: bench.job(label, seed) for label in labels},  # type: ignore[misc]
        [checked.seed + i for i in range(seeds)],
        output,
        identity=checked.model_dump(mode="json"),
        announce=console.print,
    )
    results = [outcome.result for outcome in outcomes]
    console.print(report.table(results, title=recipe))
    page = report.write_comparison(output, results, runs.histories(outcomes), title=recipe, notes=checked.about)
    console.print(f"report: {page}")


@app.command("eval")
def evaluate(
    artifact: Annotated[str, typer.Argument(help="folder or hub id of a trained prompt")],
    data: Annotated[Path, typer.Option(help="file with labelled rows")],
    backbone: Backbone = None,
    text: Annotated[str, typer.Option(help="column of the input")] = "text",
    label: Annotated[str, typer.Option(help="column of the answer")] = "label",
) -> None:
    """Evaluate a trained prompt on labelled data."""
    session = _open(artifact, backbone)
    metrics = session.evaluate(data, text=text, label=label)
    table = Table("metric", "value")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4f}")
    console.print(table)


@app.command()
def predict(
    artifact: Annotated[str, typer.Argument(help="folder or hub id of a trained prompt")],
    inputs: Annotated[list[str] | None, typer.Argument(help="inputs, one argument each")] = None,
    data: Annotated[Path | None, typer.Option(help="file with rows to predict")] = None,
    text: Annotated[str, typer.Option(help="column of the input in the file")] = "text",
    backbone: Backbone = None,
) -> None:
    """Predict with a trained prompt; prints one JSON object a line."""
    if bool(inputs) == (data is not None):
        raise InputError("give either inputs or --data")
    session = _open(artifact, backbone)
    for answer in session.predict(list(inputs or []) if data is None else session.inputs(data, text=text)):
        print(json.dumps(answer, ensure_ascii=False))


@app.command()
def export(
    artifact: Annotated[str, typer.Argument(help="folder or hub id of a trained prompt")],
    output: Output,
    format: Annotated[str, typer.Option(help="what to write; `peft` for text prompts")] = "peft",
    backbone: Backbone = None,
) -> None:
    """Write a trained prompt in another library's format."""
    console.print(f"written: {_open(artifact, backbone).export(format, output)}")


@app.command()
def doctor() -> None:
    """Say what is installed, what was tested, and how this machine computes best."""
    from pt_core import doctor as check

    check.report(console)


def _open(artifact: str, backbone: str | None) -> Any:
    from pt_core import artifacts

    found = artifacts.load_artifact(artifact)
    names = {module: short for short, module in registry.packages().items()}
    if found.config.package not in names:
        raise InputError(f"{artifact} needs the package {found.config.package!r}, which is not installed")
    return registry.workbench(names[found.config.package]).open_artifact(found, backbone)


def main() -> None:
    """Entry point of `pt`."""
    try:
        app()
    except InputError as error:
        Console(stderr=True).print(f"pt: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
