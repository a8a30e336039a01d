"""Results as tables, pictures and one self-contained page.

Pictures need matplotlib (`pt-core[report]`), which is imported when the first one is drawn; reports are written without
pictures where it is absent. Every file is written beside its place and then renamed.
"""

from __future__ import annotations

import base64
import csv
import html as markup
import io
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pt_core.errors import InputError
from pt_core.files import write
from pt_core.metrics import harmonic_mean, higher_is_better, mean_spread, paired_difference

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D")
"""Okabe and Ito's colours, which colour-blind readers tell apart, without the yellow that is illegible on white."""

LINES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class Result:
    """One method trained with one seed.

    Args:
        metrics: name -> value on the test rows, or on those that `extra` names under "rows".
        trainable_parameters: number of trained values.
        seconds_per_step: wall-clock seconds of an optimiser step.
        artifact_bytes: size of the saved prompt.
        extra: what else should be in the files, such as data set or device.
    """

    method: str
    seed: int
    metrics: Mapping[str, float]
    trainable_parameters: int | None = None
    seconds_per_step: float | None = None
    artifact_bytes: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Grid:
    """A table as text: `marked` holds the (row, column) cells that stand out. The first column names the row, the others are
    numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: frozenset[tuple[int, int]] = frozenset()
    caption: str = ""


# Tables


def results_grid(results: Sequence[Result], metrics: Sequence[str] | None = None) -> Grid:
    """One row per method: mean ± sample standard deviation over seeds, the best mean of a metric marked.

    The harmonic mean of base and new is that of their means, as the field reports it, with its spread over seeds.

    Args:
        metrics: which, and in what order; default: all there are.

    Raises:
        InputError: no results, a method that has one seed twice, or a metric that no result has.
    """
    groups = _by_method(results)
    metrics = _metrics(results, metrics)
    rows, means = [], []
    for method, runs in groups.items():
        values = [[r.metrics[name] for r in runs if name in r.metrics] for name in metrics]
        found = {name: mean_spread(v)[0] for name, v in zip(metrics, values, strict=True)}
        if {"harmonic-mean", "base", "new"} <= {name for name, v in zip(metrics, values, strict=True) if v}:
            found["harmonic-mean"] = harmonic_mean(found["base"], found["new"])
        means.append(list(found.values()))
        parameters = sorted({r.trainable_parameters for r in runs if r.trainable_parameters is not None})
        seconds, _ = mean_spread(r.seconds_per_step for r in runs if r.seconds_per_step is not None)
        size, _ = mean_spread(r.artifact_bytes for r in runs if r.artifact_bytes is not None)
        rows.append(
            [
                method,
                *map(_spread, values, found.values()),
                " to ".join(f"{n:,}" for n in parameters[:1] + parameters[1:][-1:]) or "–",
                _seconds(seconds),
                _size(size),
                str(len(runs)),
            ]
        )
    marked: set[tuple[int, int]] = set()
    for column, name in enumerate(metrics, start=1):
        there = [row[column - 1] for row in means if not math.isnan(row[column - 1])]
        best = (max if higher_is_better(name) else min)(there, default=math.nan)
        # All that read the same as the best are marked.
        ties = {(i, column) for i, row in enumerate(means) if _number(row[column - 1]) == _number(best)}
        marked |= ties if len(there) > 1 else set()
    header = ["method", *map(_arrow, metrics), "trained values", "s/step", "artifact", "seeds"]
    return Grid(header, rows, frozenset(marked), _caption(groups))


def differences_grid(
    results: Sequence[Result], metrics: Sequence[str] | None = None, reference: str | None = None
) -> Grid:
    """Each method less the reference, seed by seed: mean and 95 % interval (Student's t), marked where it excludes zero.

    Seeds that only one of the two has do not count; methods that share less than two seeds are left out, and so are
    metrics that a shared seed lacks. The default reference is the first of the methods with the most seeds.
    """
    groups = _by_method(results)
    metrics = _metrics(results, metrics)
    reference = max(groups, key=lambda method: len(groups[method])) if reference is None else reference
    if reference not in groups:
        raise InputError(f"no method {reference!r}", remedy=f"There are: {', '.join(groups)}", field="reference")
    rows: list[list[str]] = []
    marked = set()
    for method, runs in groups.items():
        base = {run.seed: run for run in groups[reference] if method != reference}
        shared = [(run.metrics, base[run.seed].metrics) for run in runs if run.seed in base]
        if len(shared) < 2:
            continue
        row = [method]
        for name in metrics:
            pairs = [(a[name], b[name]) for a, b in shared if name in a and name in b]
            if len(pairs) < len(shared):
                row.append("–")
                continue
            difference = paired_difference([a for a, _ in pairs], [b for _, b in pairs])
            if difference.low > 0 or difference.high < 0:
                marked.add((len(rows), len(row)))
            row.append(f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]")
        rows.append([*row, str(len(shared))])
    header = [f"method less {reference}", *map(_arrow, metrics), "seeds"]
    caption = "Mean of the paired differences and its 95 % interval; marked: the interval excludes zero."
    return Grid(header, rows, frozenset(marked), caption)


def over_grid(points: Mapping[float, Sequence[Result]], metric: str, unit: str) -> Grid:
    """A metric where something was varied: one row per method, one column per value ("16 shots"), the best of each marked."""
    groups = {value: _by_method(results) for value, results in points.items()}
    methods = list(dict.fromkeys(name for group in groups.values() for name in group))
    found = [
        [[r.metrics[metric] for r in g.get(m, []) if metric in r.metrics] for g in groups.values()] for m in methods
    ]
    rows = [(method, *map(_spread, values)) for method, values in zip(methods, found, strict=True)]
    sign = 1 if higher_is_better(metric) else -1
    marked = set()
    for j in range(len(groups)):
        means = {i: sign * mean_spread(row[j])[0] for i, row in enumerate(found) if row[j]}
        marked |= {(i, j + 1) for i in means if rows[i][j + 1] == rows[max(means, key=means.__getitem__)][j + 1]}
    header = ("method", *(f"{value:g} {unit}" for value in groups))
    return Grid(header, rows, frozenset(marked), f"{_arrow(metric)}. {_caption(next(iter(groups.values())))}")


def table(results: Sequence[Result], metrics: Sequence[str] | None = None, title: str = "") -> Table:
    """`results_grid` for the terminal; the best of a metric is bold with a star."""
    return to_rich(results_grid(results, metrics), title)


def to_rich(grid: Grid, title: str = "") -> Table:
    """A grid for the terminal; marked cells are bold with a star. The results of four metrics fit into 80 columns: there
    a spread stands below its mean."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    wide = len(grid.header) > 7
    padding = (0, 0 if wide else 1, 0, 0)
    rich = Table(title=Text(title) if title else None, caption=grid.caption, box=box.SIMPLE_HEAD, padding=padding)
    shown = [[f"* {c}" if (i, j) in grid.marked else c for j, c in enumerate(row)] for i, row in enumerate(grid.rows)]
    if wide:
        shown = [[cell.replace(" ± ", "\n± ") for cell in row] for row in shown]
    for column, name in enumerate(grid.header):
        head = name.replace(" ", "\n") if wide and column else name
        cells = [row[column] for row in shown]
        # Values are never cut; a long word of a head may be.
        least = max(map(len, [*(word[:8] for word in head.split()), *(w for cell in cells for w in cell.split())]))
        whole = least >= max(len(line) for text in (head, *cells) for line in text.split("\n"))
        side: Literal["left", "right"] = "right" if column else "left"
        rich.add_column(Text(head), justify=side, no_wrap=whole or not column, min_width=least, overflow="fold")
    for i, row in enumerate(shown):
        rich.add_row(*(Text(cell, style="bold" if (i, j) in grid.marked else "") for j, cell in enumerate(row)))
    return rich


def to_markdown(grid: Grid, title: str = "") -> str:
    """A grid as a Markdown table with its caption; marked cells are bold."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    rules = ["---", *(["---:"] * (len(grid.header) - 1))]
    lines = [f"## {title}", ""] if title else []
    lines += [line(grid.header), line(rules)]
    for i, row in enumerate(grid.rows):
        lines.append(line(f"**{cell}**" if (i, j) in grid.marked else cell for j, cell in enumerate(row)))
    return "\n".join(lines + (["", grid.caption] if grid.caption else [])) + "\n"


def to_csv(results: Sequence[Result], path: str | Path) -> None:
    """One row per result in full precision; metrics and extras are columns of their own."""
    names = _metrics(results, None)
    extras = list(dict.fromkeys(name for result in results for name in result.extra))
    columns = ["method", "seed", *names, "trainable_parameters", "seconds_per_step", "artifact_bytes"]
    columns += [name for name in extras if name not in columns]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for result in results:
        row = asdict(result)
        writer.writerow(row.pop("extra") | row.pop("metrics") | row)
    write(path, text.getvalue().encode())


def to_json(results: Sequence[Result], path: str | Path) -> None:
    """A list of results in full precision; a value that is not finite becomes null."""
    rows = json.loads(json.dumps([asdict(result) for result in results]), parse_constant=lambda _: None)
    write(path, (json.dumps(rows, indent=2, ensure_ascii=False) + "\n").encode())


# Pictures

History = Sequence[Mapping[str, Any]]
"""The rows of a run's log: {"step": ..., "loss": ..., "validation/accuracy": ...}."""


def need_matplotlib() -> type[Figure]:
    """The class of figures.

    Raises:
        InputError: matplotlib is absent.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("pictures need matplotlib", remedy="Install pt-core[report]") from error
    return Figure


def can_draw() -> bool:
    """Whether matplotlib is there; if not, a line on stderr says what is missing for the pictures that are left out."""
    try:
        need_matplotlib()
    except InputError as error:
        print(f"no pictures: {error}", file=sys.stderr)
        return False
    return True


def curves(runs: Mapping[str, History | Sequence[History]], path: str | Path, metric: str | None = None) -> None:
    """Training loss and a validation metric over steps, as a PNG: a line per method, faint lines per seed.

    Args:
        runs: method -> its run, or its runs with several seeds. The line of several runs is their mean at the steps
            that all of them logged.
        metric: "accuracy" for the rows' "validation/accuracy"; default: the first one that is not the loss.

    Raises:
        InputError: nothing to draw, or matplotlib is absent.
    """
    histories = {method: _histories(run) for method, run in runs.items()}
    rows = [row for group in histories.values() for history in group for row in history]
    keys = dict.fromkeys(key for row in rows for key in row if key.startswith("validation/"))
    other = [key for key in keys if key != "validation/loss"]
    validation = f"validation/{metric}" if metric else next(iter(other or keys), None)
    wanted = {"loss": "training loss"}
    if validation:
        wanted[validation] = f"validation {_arrow(validation.removeprefix('validation/'))}"
    panels = {key: label for key, label in wanted.items() if any(key in row for row in rows)}
    if not panels or (metric and validation not in panels):
        raise InputError(
            f"no run has {', '.join(wanted)}",
            remedy=f"Keys there are: {', '.join(dict.fromkeys(key for row in rows for key in row)) or 'none'}",
        )
    figure, all_axes = _figure(5.2, 4.2, len(panels))
    handles: dict[str, Any] = {}
    for axes, (key, label) in zip(all_axes, panels.items(), strict=True):
        for i, (method, group) in enumerate(histories.items()):
            series = [{row["step"]: row[key] for row in history if key in row} for history in group]
            series = [s for s in series if s]
            if not series:
                continue
            style: dict[str, Any] = {
                "color": COLOURS[i % len(COLOURS)],
                "linestyle": LINES[i // len(COLOURS) % len(LINES)],
                "marker": "o" if key != "loss" else None,
                "markersize": 3.5,
            }
            steps = sorted(set.intersection(*map(set, series)))
            means = [mean_spread(s[step] for s in series)[0] for step in steps]
            if len(series) > 1:
                for s in series:
                    axes.plot(list(s), list(s.values()), linewidth=0.8, alpha=0.3, color=style["color"])
            (handles[method],) = axes.plot(steps, means, linewidth=1.8, **style)
        axes.set(xlabel="optimiser step", ylabel=label)
    names = [_plain(f"{m} ({len(histories[m])} seeds)" if len(histories[m]) > 1 else m) for m in handles]
    inches = 0.7 + 0.08 * max(map(len, names))  # of the widest legend entry
    columns = max(1, min(len(names), int(5.2 * len(panels) / inches)))
    figure.legend(list(handles.values()), names, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    _save(figure, path)


def bars(results: Sequence[Result], path: str | Path, metrics: Sequence[str] | None = None) -> None:
    """A panel per metric, as a PNG: a bar per method (mean), whiskers (± sample standard deviation), a dot per seed."""
    groups = _by_method(results)
    metrics = _metrics(results, metrics)
    figure, all_axes = _figure(6.0 if len(metrics) == 1 else 4.6, 1.2 + 0.5 * len(groups), len(metrics))
    for panel, (axes, name) in enumerate(zip(all_axes, metrics, strict=True)):
        for i, runs in enumerate(groups.values()):
            values = [r.metrics[name] for r in runs if name in r.metrics]
            mean, std = mean_spread(values)
            colour = COLOURS[i % len(COLOURS)]
            if math.isfinite(mean):
                axes.barh(i, mean, height=0.62, color=colour, alpha=0.75)
            if math.isfinite(std):
                heights = [i + 0.36 * (k / (len(values) - 1) - 0.5) for k in range(len(values))]
                axes.plot(values, heights, "o", markersize=3.5, color="white", markeredgecolor=colour)
                axes.errorbar(mean, i, xerr=std, color="#222222", capsize=4, linewidth=1.3)
            # Right of the axes, so that numbers line up and cover nothing.
            axes.annotate(_spread(values), (1.02, i), xycoords=("axes fraction", "data"), va="center", fontsize=9)
        axes.set_yticks(range(len(groups)), [_plain(m) for m in groups] if panel % 3 == 0 else [""] * len(groups))
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.set_xlabel(_plain(_arrow(name)))
        axes.axvline(0, color="#222222", linewidth=0.8)
        axes.grid(axis="y", visible=False)
        axes.locator_params(axis="x", nbins=5)
    if any(len(runs) > 1 for runs in groups.values()):
        figure.supxlabel("bar: mean · whiskers: ± sample standard deviation · dots: seeds", fontsize=8, color="#555555")
    _save(figure, path)


def over(
    points: Mapping[float, Sequence[Result]],
    path: str | Path,
    metric: str,
    axis: str,
    title: str = "",
    log: bool = False,
) -> None:
    """A metric over something that was varied (shots, prompt length), as a PNG: a line per method, means, bands of ± the sample
    standard deviation over seeds.

    Args:
        points: value -> the results there.
        metric: of the results; where a method lacks it there is no point.
        axis: what was varied, with its unit.
        log: values stand at equal distances by their ratio (1, 2, 4, 8, 16).

    Raises:
        InputError: no result has the metric, or matplotlib is absent.
    """
    groups = {value: _by_method(results) for value, results in points.items()}
    _metrics([r for results in points.values() for r in results], [metric])
    figure, (axes,) = _figure(6.4, 4.6, 1, title)
    for i, method in enumerate(dict.fromkeys(name for group in groups.values() for name in group)):
        found = {v: [r.metrics[metric] for r in g.get(method, []) if metric in r.metrics] for v, g in groups.items()}
        places = sorted(value for value, values in found.items() if values)
        spreads = [mean_spread(found[value]) for value in places]
        means = [mean for mean, _ in spreads]
        stds = [std if math.isfinite(std) else 0.0 for _, std in spreads]
        colour, line = COLOURS[i % len(COLOURS)], LINES[i // len(COLOURS) % len(LINES)]
        axes.plot(
            places, means, marker="o", markersize=4, linewidth=1.8, color=colour, linestyle=line, label=_plain(method)
        )
        low, high = zip(*((m - s, m + s) for m, s in zip(means, stds, strict=True)), strict=True)
        axes.fill_between(places, low, high, color=colour, alpha=0.12, linewidth=0)
    if log:
        axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(points), [f"{value:g}" for value in sorted(points)])
    axes.set(xlabel=_plain(axis), ylabel=_plain(_arrow(metric)))
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.02, 0.5))
    _save(figure, path)


def gallery(
    images: Sequence[Any], captions: Sequence[str], path: str | Path, right: Sequence[bool] = (), title: str = ""
) -> None:
    """Images with a caption each, six abreast, as a PNG.

    Args:
        images: what matplotlib shows: PIL images or arrays [H, W, 3].
        captions: of the images; may have several lines.
        right: whether a caption is green (else red); default: all are black.

    Raises:
        InputError: there are no images, or matplotlib is absent.
    """
    if not images:
        raise InputError("there are no images to show")
    figure, all_axes = _figure(1.7, 2.1, len(images), title, abreast=6)
    for i, axes in enumerate(all_axes):
        axes.set_axis_off()
        axes.imshow(images[i])
        colour = "#222222" if not right else "#1B7837" if right[i] else "#B2182B"
        axes.set_title(_plain(captions[i]), fontsize=8, color=colour)
    _save(figure, path)


def heatmap(
    matrix: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    path: str | Path,
    label: str = "",
    title: str = "",
    axis_names: tuple[str, str] = ("", ""),
    texts: Sequence[Sequence[str]] | None = None,
    centre: float | None = None,
) -> None:
    """A matrix [rows, columns] in colour with its numbers, as a PNG, such as transfer from task to task. NaN stays grey.

    Args:
        label: what the numbers are, with their unit.
        axis_names: what the rows are, and what the columns are.
        texts: [rows, columns], written in place of the numbers.
        centre: a value that is white, with one hue above and another below, such as 0 for gains.

    Raises:
        InputError: the matrix has other sizes than the names.
    """
    values = [[float(value) for value in row] for row in matrix]
    if not columns or len(values) != len(rows) or any(len(row) != len(columns) for row in values) or not rows:
        raise InputError(f"the matrix is not of {len(rows)} rows and {len(columns)} columns")
    figure, (axes,) = _figure(2.6 + 0.75 * len(columns), 1.9 + 0.5 * len(rows), 1, title)
    finite = [value for row in values for value in row if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    if centre is not None:
        far = max((abs(value - centre) for value in finite), default=0.0) or 1.0
        low, high = centre - far, centre + far
    colours = "viridis" if centre is None else "PuOr_r"
    image = axes.imshow(values, cmap=colours, aspect="auto", vmin=low, vmax=high)
    axes.set_facecolor("#DDDDDD")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            share = (value - low) / (high - low) if high > low else 1.0  # NaN is not dark
            dark = share < 0.5 if centre is None else abs(share - 0.5) > 0.35
            number = _number(value) if math.isfinite(value) else "–"
            text = number if texts is None else _plain(texts[i][j])
            axes.text(j, i, text, ha="center", va="center", fontsize=9, color="white" if dark else "black")
    axes.set_xticks(range(len(columns)), list(map(_plain, columns)), rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), list(map(_plain, rows)))
    axes.set(ylabel=_plain(axis_names[0]), xlabel=_plain(axis_names[1]))
    axes.grid(visible=False)
    figure.colorbar(image, ax=axes, label=_plain(label))
    _save(figure, path)


# Pages

STYLE = """
:root { color-scheme: light dark; --text: #1a1a1a; --page: #ffffff; --line: #d5d5d5; --soft: #f4f5f7; --mark: #005a8f; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e6e6; --page: #16181c; --line: #3a3d44; --soft: #1f2228; --mark: #7cc4f5; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); margin: 2rem auto;
  max-width: 72rem; padding: 0 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
p { white-space: pre-line; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; }
caption { caption-side: bottom; text-align: left; padding-top: .5rem; font-size: .85rem; opacity: .8; }
th, td { padding: .35rem .8rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
  white-space: nowrap; font-variant-numeric: tabular-nums; }
thead th { border-bottom-width: 2px; } tbody th { font-weight: 500; } tbody tr:nth-child(even) { background: var(--soft); }
:is(th, td):not(:first-child) { text-align: right; }
td.marked { font-weight: 700; color: var(--mark); }
img { max-width: 100%; background: #ffffff; border-radius: 6px; }
"""

Item = str | Path | Grid


def html(path: str | Path, title: str, sections: Sequence[tuple[str, Sequence[Item]]]) -> None:
    """One self-contained page: pictures are embedded, text is escaped, and nothing is loaded from elsewhere.

    Args:
        sections: (heading, items); an item is text, the path of a PNG, or a Grid.

    Raises:
        InputError: a picture is not there or not a PNG.
    """
    body = [f"<h1>{markup.escape(title)}</h1>"]
    for heading, items in sections:
        body.append(f"<section>\n<h2>{markup.escape(heading)}</h2>")
        body += [_html_item(item, heading) for item in items]
        body.append("</section>")
    content = "\n".join(body)
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{markup.escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
{content}
</body>
</html>
"""
    write(path, page.encode())


def write_comparison(
    folder: str | Path,
    results: Sequence[Result],
    histories: Mapping[str, History | Sequence[History]] | None = None,
    title: str = "Comparison",
    notes: str = "",
    metrics: Sequence[str] | None = None,
    more: Mapping[str, Item] | None = None,
) -> Path:
    """Write results.json, results.csv, table.md, bars.png, curves.png (where there are histories) and report.html.

    Numbers come first. Without matplotlib there are no pictures, and a line on stderr says so.

    Args:
        folder: made if it is not there.
        histories: method -> its run or runs, as for `curves`.
        metrics: which, the main one first; default: all there are.
        more: heading -> what else belongs on the page (text, a grid, a PNG file), after the results.

    Returns:
        The path of report.html.
    """
    folder = Path(folder)
    grid, metrics = results_grid(results, metrics), _metrics(results, metrics)
    differences = differences_grid(results, metrics)
    folder.mkdir(parents=True, exist_ok=True)
    to_json(results, folder / "results.json")
    to_csv(results, folder / "results.csv")
    text = [f"# {title}", *([notes] if notes else []), to_markdown(grid)]
    text += [to_markdown(differences, title="Paired differences")] if differences.rows else []
    write(folder / "table.md", "\n\n".join(part.strip() for part in text).encode() + b"\n")

    sections: list[tuple[str, Sequence[Item]]] = [("Results", [*([notes] if notes else []), grid])]
    drawn = can_draw()
    if drawn:
        bars(results, folder / "bars.png", metrics)
        sections.append(("Metrics by method", [folder / "bars.png"]))
    sections += [("Paired differences", [differences])] if differences.rows else []
    if drawn and histories:
        # In the order of the results, so that a method has one colour in both pictures.
        order = dict.fromkeys([result.method for result in results], ())
        curves({**order, **histories}, folder / "curves.png")
        sections.append(("Training", [folder / "curves.png"]))
    sections += [(heading, [item]) for heading, item in (more or {}).items()]
    html(folder / "report.html", title, sections)
    return folder / "report.html"


# Pieces


def _by_method(results: Sequence[Result]) -> dict[str, list[Result]]:
    if not results:
        raise InputError("there are no results to report")
    groups: dict[str, list[Result]] = {}
    for result in results:
        runs = groups.setdefault(result.method, [])
        if any(run.seed == result.seed for run in runs):
            raise InputError(f"method {result.method!r} has seed {result.seed} twice", field="seed")
        runs.append(result)
    return groups


def _metrics(results: Sequence[Result], metrics: Sequence[str] | None) -> list[str]:
    there = list(dict.fromkeys(name for result in results for name in result.metrics))
    for name in metrics or ():
        if name not in there:
            raise InputError(f"no result has the metric {name!r}", remedy=f"There are: {', '.join(there)}")
    return there if metrics is None else list(metrics)


def _caption(groups: Mapping[str, Sequence[Result]]) -> str:
    single = all(len(runs) == 1 for runs in groups.values())
    said = "One seed each." if single else "Mean ± sample standard deviation over seeds."
    if any(run.extra.get("rows") == "validation" for runs in groups.values() for run in runs):
        return f"{said} There are no test rows: metrics are of the validation rows."
    return said


def _arrow(metric: str) -> str:
    return f"{metric} {'↑' if higher_is_better(metric) else '↓'}"


def _decimals(value: float) -> int:
    return 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 3


def _number(value: float) -> str:
    return f"{value:.1e}" if 0 < abs(value) < 5e-4 else f"{value:,.{_decimals(value)}f}"


def _spread(values: Sequence[float], mean: float | None = None) -> str:
    """Mean (or what stands in its place) ± sample standard deviation, to the decimals of the mean; of one value, the value."""
    plain, std = mean_spread(values)
    mean = plain if mean is None else mean
    if len(values) < 2 or math.isnan(mean):
        return _number(mean) if values else "–"
    return f"{_number(mean)} ± {std:.1e}" if 0 < abs(mean) < 5e-4 else f"{_number(mean)} ± {std:,.{_decimals(mean)}f}"


def _seconds(seconds: float) -> str:
    """Three significant digits."""
    return "–" if math.isnan(seconds) else f"{seconds:,.0f}" if seconds >= 99.95 else f"{seconds:#.3g}"


def _size(size: float) -> str:
    """Bytes in decimal units."""
    if math.isnan(size):
        return "–"
    for unit in ("B", "kB", "MB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _histories(runs: Any) -> list[list[Mapping[str, Any]]]:
    """The rows of each run of a method, whether one run is given or several."""
    if all(isinstance(row, Mapping) for row in runs):
        return [list(runs)]
    return [list(run) for run in runs]


def _figure(width: float, height: float, panels: int, title: str = "", abreast: int = 3) -> tuple[Figure, list[Axes]]:
    """Panels of `width` x `height` inches, drawn by Agg; pyplot's global state is not touched."""
    columns = min(panels, abreast)
    lines = math.ceil(panels / columns)
    figure = need_matplotlib()(figsize=(width * columns, height * lines), layout="constrained")
    all_axes: list[Axes] = list(figure.subplots(lines, columns, squeeze=False).flat)
    for unused in all_axes[panels:]:
        unused.set_axis_off()
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#DDDDDD", linewidth=0.7)
        axes.set_axisbelow(True)
    if title:
        figure.suptitle(_plain(title), fontsize=12)
    return figure, all_axes[:panels]


def _save(figure: Figure, path: str | Path) -> None:
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=160)
    write(path, png.getvalue())


def _plain(text: str) -> str:
    """Text that matplotlib does not take for a formula."""
    return text.replace("$", r"\$")


def _html_item(item: Item, heading: str) -> str:
    if isinstance(item, str):
        return f"<p>{markup.escape(item)}</p>"
    if isinstance(item, Grid):
        return _html_table(item)
    png = item.read_bytes() if item.is_file() else b""
    if not png.startswith(b"\x89PNG\r\n\x1a\n"):
        raise InputError("is not a PNG", file=item)
    return f'<img alt="{markup.escape(heading)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _html_table(grid: Grid) -> str:
    def cell(text: str, i: int, j: int) -> str:
        text = markup.escape(text)
        if j == 0:
            return f'<th scope="row">{text}</th>'
        return f'<td class="marked">{text}</td>' if (i, j) in grid.marked else f"<td>{text}</td>"

    head = "".join(f'<th scope="col">{markup.escape(name)}</th>' for name in grid.header)
    rows = ["<tr>" + "".join(cell(c, i, j) for j, c in enumerate(row)) + "</tr>" for i, row in enumerate(grid.rows)]
    caption = f"<caption>{markup.escape(grid.caption)}</caption>" if grid.caption else ""
    return "\n".join(
        [
            f'<div class="scroll"><table>{caption}',
            f"<thead><tr>{head}</tr></thead>",
            "<tbody>",
            *rows,
            "</tbody></table></div>",
        ]
    )
