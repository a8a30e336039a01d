"""The command line `pt`. Modality packages plug in by entry points; what they do lies in their `workbench` module.

A workbench offers:

    Recipe                                          the package's recipe schema (a subclass of pt_core.recipe.Recipe)
    Bench(recipe)                                   loads backbone and data once: `.job(label, seed) -> (Job, FitConfig)`,
                                                    `.recipe`, and `.identity`, what backbone and data are, as JSON;
                                                    `.folder` is set to the output folder, in which it may keep what
                                                    later processes then need not compute
    open_artifact(artifact, backbone) -> session    a trained prompt on its backbone: `.inputs(file, text)`,
                                                    `.predict(inputs)`, `.evaluate(file, text, label)`; with
                                                    `.stream(inputs)` answers are printed as they come, and what it
                                                    raises behind them names the inputs that have none; with
                                                    a schema `.reading` (pt_core.settings.Settings) `inputs` and
                                                    `evaluate` take one as `reading`, made of `--set`
    demo(folder, seeds, shots, data)                the package's demo; None: its own default

where prompts have another library's format,

    exports(artifact)                               the formats of a trained prompt: name -> names of the files
    session.export(format, folder)                  writes one of them

and, where `pt transfer` is to work, its Bench has (see `pt_core.transfer.TransferBench`)

    .task_names                                     the recipe's tasks
    .transfer_job(label, seed, task, source)        -> (Job, FitConfig): a method on a task, from its start values, or
                                                    from the `trained_state` in the safetensors file `source`

Bad input, or a file that cannot be read or written, ends in one line on stderr and exit code 2, a loss that is not finite
in one line and code 1. Results go to stdout.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from pt_core import registry
from pt_core.errors import InputError, NonFiniteLoss
from pt_core.files import check_folder

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Prompt tuning for every modality."
)


def _new_or_folder(output: Path) -> Path:
    check_folder(output)
    return output


Setting = Annotated[
    list[str] | None, typer.Option("--set", help="change a key of the recipe: key.key=value (repeatable)")
]
Reading = Annotated[
    list[str] | None,
    typer.Option("--set", help="how data are read, where recipes say so under `data`: key=value (repeatable)"),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="folder for results", callback=_new_or_folder)]
Source = Annotated[str, typer.Argument(help="installed recipe (`pt list --recipes`) or path of a YAML file")]
Prompt = Annotated[str, typer.Argument(help="folder or hub id of a trained prompt")]
Backbone = Annotated[str | None, typer.Option(help="hub id or folder of the backbone; default: the prompt's own")]


@app.command("list")
def list_methods(
    recipes: Annotated[bool, typer.Option("--recipes", help="recipes instead of methods")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="the methods as a Markdown table")] = False,
) -> None:
    """Show the installed methods, or recipes. Imports no modality."""
    if markdown:
        print(registry.markdown())
        return
    from rich.table import Table

    if recipes:
        from pt_core import recipe

        table = Table("recipe", "what it shows", box=None, padding=(0, 2, 1, 0))
        table.columns[0].no_wrap = True
        for name, about in recipe.installed().items():
            table.add_row(name, about)
    else:
        heads = ("method\npackage, fidelity", "what is trained\npaper", "trained values\nof which backbone")
        table = Table(*heads, box=None, padding=(0, 2, 1, 0))
        table.columns[0].no_wrap = True
        for row in registry.all_methods():
            values = f"{row.parameters:,}" if row.parameters else "none"
            table.add_row(
                f"[bold]{row.name}[/]\n{row.package}, {row.fidelity}",
                f"{row.kind}\n{row.paper}",
                f"{values}\n{row.reference}",
            )
    _show(table)


@app.command()
def demo(
    modality: Annotated[
        str | None, typer.Argument(help="package to show; default: nlp, else the first installed")
    ] = None,
    output: Output = Path("runs/demo"),
    seeds: Annotated[int | None, typer.Option(min=1, help="runs of each method; default: the demo's")] = None,
    shots: Annotated[int | None, typer.Option(min=1, help="training examples; default: the demo's")] = None,
    data: Annotated[Path | None, typer.Option(help="your own file instead of the demo's data")] = None,
) -> None:
    """Run the main job of a package on real data and real weights, on a laptop."""
    installed = registry.packages()
    if not installed:
        raise InputError("no modality package is installed", remedy="Install one, such as packages/pt-nlp")
    chosen = modality or ("nlp" if "nlp" in installed else next(iter(installed)))
    workbench = registry.workbench(chosen)
    from pt_core import report

    report.need_matplotlib()  # a demo shows pictures: better told now than after its runs
    workbench.demo(output, seeds=seeds, shots=shots, data=data)


@app.command()
def train(
    recipe: Source,
    settings: Setting = None,
    output: Output = Path("runs/train"),
    seed: Annotated[int | None, typer.Option(min=0, help="default: the recipe's")] = None,
) -> None:
    """Train the method of a recipe and keep the prompt. A killed run goes on when it is started again."""
    from pt_core import recipe as recipes
    from pt_core import report, runs

    package, checked = recipes.load(recipe, recipes.parse_settings(settings or []))
    runs.check_output(output)
    bench = registry.workbench(package).Bench(checked)
    bench.folder = output
    job, config = bench.job(checked.method.name, checked.seed if seed is None else seed)
    outcome = runs.train(job, config, output, identity=bench.identity)
    report.to_json([outcome.result], output / "results.json")
    _show(report.table([outcome.result], title=recipe))
    if outcome.artifact is not None:
        print(f"trained prompt: {outcome.artifact}")
    if outcome.history and report.can_draw():
        report.curves({outcome.result.method: outcome.history}, output / "curves.png")
        print(f"curves: {output / 'curves.png'}")


@app.command()
def compare(
    recipe: Source,
    methods: Annotated[
        str | None, typer.Option(help="comma-separated labels or methods; default: the recipe's own comparison")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="runs of each method")] = 3,
    settings: Setting = None,
    output: Output = Path("runs/compare"),
) -> None:
    """Train methods side by side; write table, plots and a report. A killed comparison goes on when it is started again."""
    from pt_core import recipe as recipes
    from pt_core import report, runs

    package, checked = recipes.load(recipe, recipes.parse_settings(settings or []))
    labels = [label.strip() for label in methods.split(",")] if methods else checked.labels()
    if checked.method.name in labels:
        checked.labels()  # refuses settings for it that would not be used
    for label in labels:
        if labels.count(label) > 1:
            raise InputError(f"{label!r} is there twice", field="methods", remedy="Name each method once")
        checked.with_method(label)
    bench = registry.workbench(package).Bench(checked)
    outcomes = runs.compare_recipe(bench, labels, range(checked.seed, checked.seed + seeds), output)
    results = [outcome.result for outcome in outcomes]
    page = report.write_comparison(output, results, runs.histories(outcomes), title=recipe, notes=checked.about)
    _show(report.table(results, title=recipe))
    print(f"report: {page}")


@app.command()
def transfer(
    recipe: Source,
    tasks: Annotated[str | None, typer.Option(help="comma-separated names; default: all tasks of the recipe")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="runs of each pair of tasks")] = 3,
    jobs: Annotated[int, typer.Option(min=1, help="processes; the cores are shared among them")] = 1,
    ray: Annotated[bool, typer.Option("--ray", help="run the jobs by Ray (extra `pt-core\\[ray]`)")] = False,
    metric: Annotated[str | None, typer.Option(help="what gains are of; default: the tasks' first metric")] = None,
    settings: Setting = None,
    output: Output = Path("runs/transfer"),
) -> None:
    """Train on each task from scratch and from the prompts of all others; write the matrix of gains. A killed study goes on
    when it is started again."""
    from functools import partial

    from pt_core import recipe as recipes
    from pt_core import report, transfer

    package, checked = recipes.load(recipe, recipes.parse_settings(settings or []))
    bench = registry.workbench(package).Bench
    if not hasattr(bench, "transfer_job"):
        raise InputError(f"the package {package!r} has no tasks to transfer between", file=recipe)
    study = transfer.run(
        partial(bench, checked),
        checked.method.name,
        output,
        None if tasks is None else [name.strip() for name in tasks.split(",")],
        range(checked.seed, checked.seed + seeds),
        identity=checked.model_dump(mode="json", include={"method", "training"}),
        metric=metric,
        jobs=jobs,
        ray=ray,
    )
    page = transfer.write_report(study, output, title=f"Transfer: {recipe}, {study.method}", notes=checked.about)
    _show(report.to_rich(transfer.gains_grid(study), title=recipe))
    print(transfer.in_words(study))
    print(f"report: {page}")


@app.command("eval")
def evaluate(
    prompt: Prompt,
    data: Annotated[Path, typer.Option(help="file with labelled rows, or folder")],
    text: Annotated[str, typer.Option(help="column of the input")] = "text",
    label: Annotated[str, typer.Option(help="column of the answer")] = "label",
    settings: Reading = None,
    backbone: Backbone = None,
) -> None:
    """Evaluate a trained prompt on labelled data."""
    _check_there(data)
    from rich.table import Table

    session, table = _open(prompt, backbone), Table("metric", "value")
    for name, value in session.evaluate(data, text=text, label=label, **_reading(session, settings)).items():
        table.add_row(name, f"{value:.4f}")
    _show(table)


@app.command()
def predict(
    prompt: Prompt,
    inputs: Annotated[
        list[str] | None, typer.Argument(help="inputs, one argument each; of images also folders")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="file with rows to predict, or folder")] = None,
    text: Annotated[str, typer.Option(help="column of the input in the file")] = "text",
    settings: Reading = None,
    backbone: Backbone = None,
) -> None:
    """Predict with a trained prompt; prints one JSON object a line."""
    if bool(inputs) == (data is not None):
        raise InputError("give either inputs or --data")
    if settings and data is None:
        raise InputError("--set says how data are read", remedy="Give --data")
    _check_there(data)
    session = _open(prompt, backbone)
    answers = getattr(session, "stream", session.predict)
    for answer in answers(inputs if data is None else session.inputs(data, text=text, **_reading(session, settings))):
        print(json.dumps(answer, ensure_ascii=False), flush=True)


@app.command()
def export(
    prompt: Prompt,
    output: Output,
    format: Annotated[str, typer.Option(help="what to write; `peft` for text prompts")] = "peft",
    backbone: Backbone = None,
) -> None:
    """Write a trained prompt in another library's format."""
    from pt_core import artifacts

    artifact, workbench = _read(prompt)
    formats = workbench.exports(artifact) if hasattr(workbench, "exports") else {}
    if format not in formats:
        there = f"There is: {', '.join(formats)}" if formats else "Use the artifact itself: safetensors and JSON"
        problem = f"a prompt of {artifact.config.method} is not written as {format!r}"
        raise InputError(problem, file=prompt, remedy=there)
    artifacts.check_replaceable(output, formats[format])
    print(f"written: {workbench.open_artifact(artifact, backbone).export(format, output)}")


@app.command()
def doctor() -> None:
    """Say what is installed, what was tested, and how this machine computes best."""
    from rich.console import Console

    from pt_core import doctor as check

    check.report(Console())


def _check_there(data: Path | None) -> None:
    """Refuse a missing file before the backbone is loaded for it."""
    if data is not None and not data.exists():
        raise InputError("no such file", file=data)


def _reading(session: Any, lines: list[str] | None) -> dict[str, Any]:
    """What a session is told beside columns, checked."""
    if not lines:
        return {}
    from pydantic import ValidationError

    from pt_core import recipe

    changes = recipe.parse_settings(lines)
    if (schema := getattr(session, "reading", None)) is None:
        raise InputError("the data of this package are read without settings", field=next(iter(changes)))
    try:
        return {"reading": schema.model_validate(changes)}
    except ValidationError as error:
        raise recipe.explain(error, schema) from error


def _open(prompt: str, backbone: str | None) -> Any:
    """The session of a trained prompt."""
    artifact, workbench = _read(prompt)
    return workbench.open_artifact(artifact, backbone)


def _read(prompt: str) -> tuple[Any, Any]:
    """A trained prompt, and the workbench of its package."""
    from pt_core import artifacts

    artifact = artifacts.load_artifact(prompt)
    try:
        package = registry.short_name(artifact.config.package)
    except InputError as error:
        raise InputError(f"needs another package: {error}", file=prompt) from error
    return artifact, registry.workbench(package)


def _show(table: Any) -> None:
    from rich.console import Console

    Console().print(table)


def main() -> None:
    """Entry point of `pt`."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where it is not UTF-8, an answer is shown as far as it goes
    try:
        app()
    except (InputError, OSError) as error:
        _end(error, 2)
    except NonFiniteLoss as error:
        _end(error, 1)


def _end(error: Exception, code: int) -> NoReturn:
    typer.secho(f"pt: {' '.join(str(error).split())}", fg="red", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
