import csv
import json
import math
import re
import sys

import numpy as np
import pytest
from rich.console import Console

from pt_core.errors import InputError
from pt_core.report import (
    Grid,
    Result,
    bars,
    curves,
    differences_grid,
    gallery,
    heatmap,
    html,
    over,
    over_grid,
    results_grid,
    table,
    to_csv,
    to_json,
    to_markdown,
    write_comparison,
)


def results():
    """Two methods with three seeds, and one with a single seed."""
    rows = [
        Result("soft", seed, {"accuracy": accuracy, "loss": 1 - accuracy}, 76_800, 0.1, 307_200)
        for seed, accuracy in enumerate([0.70, 0.72, 0.74])
    ]
    rows += [
        Result("dept", seed, {"accuracy": accuracy, "loss": 1 - accuracy}, 75_000, 0.2, 1_500, {"device": "cpu"})
        for seed, accuracy in enumerate([0.80, 0.83, 0.83])
    ]
    return [*rows, Result("zero-shot", 0, {"accuracy": 0.5})]


def history(top, steps=100):
    rows = [{"step": step, "loss": 1 / step, "lr/prompt": 0.1} for step in range(10, steps + 1, 10)]
    return [*rows, *({"step": s, "validation/loss": 0.3, "validation/accuracy": top * s / 100} for s in (50, steps))]


def pixels(path):
    """The picture as an array [height, width, channels]."""
    image = pytest.importorskip("matplotlib.image")
    return image.imread(path)


# Tables


def test_table_shows_mean_and_spread_over_seeds_and_marks_the_best():
    grid = results_grid(results())
    assert grid.header == ["method", "accuracy ↑", "loss ↓", "trained values", "s/step", "artifact", "seeds"]
    assert grid.rows == [
        ["soft", "0.720 ± 0.020", "0.280 ± 0.020", "76,800", "0.100", "307.2 kB", "3"],
        ["dept", "0.820 ± 0.017", "0.180 ± 0.017", "75,000", "0.200", "1.5 kB", "3"],
        ["zero-shot", "0.500", "–", "–", "–", "–", "1"],
    ]
    assert grid.marked == {(1, 1), (1, 2)}


def test_the_harmonic_mean_of_base_and_new_is_that_of_their_means():
    runs = [
        Result("a", 0, {"base": 0.9, "new": 0.1, "harmonic-mean": 0.18}),
        Result("a", 1, {"base": 0.1, "new": 0.9, "harmonic-mean": 0.18}),
        Result("bound", 0, {"base": 0.7}),
    ]
    rows = results_grid(runs, ("base", "new", "harmonic-mean")).rows
    assert rows[0][3] == "0.500 ± 0.000"
    assert rows[1][1:4] == ["0.700", "–", "–"]


def test_what_reads_the_same_as_the_best_is_marked_too_and_a_lone_value_is_not():
    tied = [Result("a", 0, {"f1": 0.80001}), Result("b", 0, {"f1": 0.80002}), Result("c", 0, {"f1": 0.79})]
    assert results_grid(tied).marked == {(0, 1), (1, 1)}
    assert results_grid(tied[:1]).marked == frozenset()


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([1234.6, 1236.2], "1,235 ± 1"),
        ([123.45], "123.5"),
        ([0.00012, 0.00014], "1.3e-04 ± 1.4e-05"),
        ([0.0, 0.0], "0.000 ± 0.000"),
        ([0.5, math.nan], "nan"),
    ],
)
def test_numbers_are_shown_to_a_fitting_precision(values, text):
    assert results_grid([Result("a", i, {"m": v}) for i, v in enumerate(values)]).rows[0][1] == text


def test_parameters_that_differ_over_seeds_are_shown_as_a_range():
    runs = [Result("a", i, {"m": 1.0}, n, s, b) for i, (n, s, b) in enumerate([(9, 120, 5), (7, 124, 7), (8, 128, 9)])]
    assert results_grid(runs).rows[0][2:] == ["7 to 9", "124", "7 B", "3"]


def test_the_terminal_table_shows_everything_and_takes_nothing_for_markup():
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table([*results(), Result("[red]x[/red]", 0, {"accuracy": 0.1})], title="SST-2 [16 shots]"))
    text = console.export_text()
    assert "* 0.820 ± 0.017" in text and "0.720 ± 0.020" in text
    assert "[red]x[/red]" in text and "SST-2 [16 shots]" in text


@pytest.mark.parametrize("metrics", [["accuracy", "macro-f1", "loss"], ["base", "new", "harmonic-mean", "loss"]])
def test_the_terminal_table_of_many_metrics_is_whole_at_80_columns(metrics):
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    runs = [
        Result("prompt-tuning", seed, {m: 0.5 + seed / 100 for m in metrics}, 20_480_000, 0.0123, 12_345)
        for seed in range(3)
    ]
    console.print(table([*runs, *[Result("dept", r.seed, r.metrics, 7, 0.1, 999) for r in runs]], title="nlp/x"))
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    assert max(map(len, lines)) <= 80
    assert any(line.split()[-5:] == ["20,480,000", "0.0123", "12.3", "kB", "3"] for line in lines)
    assert (
        sum(line.count("* 0.510") for line in lines) == sum(line.count("± 0.010") for line in lines) == 2 * len(metrics)
    )


def test_markdown_is_a_table_with_bold_best():
    lines = to_markdown(
        results_grid([Result("a|b", 0, {"f1": 0.5}), Result("c", 0, {"f1": 0.75})]), title="T"
    ).splitlines()
    assert lines[0] == "## T"
    assert lines[2:6] == [
        "| method | f1 ↑ | trained values | s/step | artifact | seeds |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| a\\|b | 0.500 | – | – | – | 1 |",
        "| c | **0.750** | – | – | – | 1 |",
    ]
    assert lines[-1] == "One seed each."


def test_differences_are_paired_by_seed_and_marked_where_the_interval_excludes_zero():
    grid = differences_grid(results(), ["accuracy"])
    # dept - soft: .10, .11, .09: mean .1, deviation .01, t(2) = 4.3027, half-width .0248.
    assert grid.header == ["method less soft", "accuracy ↑", "seeds"]
    assert grid.rows == [["dept", "+0.100 [+0.075, +0.125]", "3"]]
    assert grid.marked == {(0, 1)}
    shifted = [Result("dept", r.seed + 1, r.metrics) if r.method == "dept" else r for r in results()]
    # Seeds 1 and 2 are shared: .80 - .72, .83 - .74; t(1) = 12.706, half-width .0635.
    assert differences_grid(shifted, ["accuracy"]).rows == [["dept", "+0.085 [+0.021, +0.149]", "2"]]
    assert differences_grid(results(), ["accuracy"], reference="zero-shot").rows == []


@pytest.mark.parametrize(
    ("rows", "metrics", "message"),
    [
        ([], None, "no results"),
        ([Result("a", 0, {}), Result("a", 0, {})], None, "field 'seed': method 'a' has seed 0 twice"),
        ([Result("a", 0, {"f1": 1.0})], ["bleu"], "no result has the metric 'bleu'. There are: f1"),
    ],
)
def test_bad_results_are_refused(rows, metrics, message):
    with pytest.raises(InputError, match=message):
        results_grid(rows, metrics)


def test_files_hold_full_precision_and_strict_json(tmp_path):
    rows = [Result("a", 0, {"f1": 1 / 3, "auc": math.nan}, 5, 0.1, 7, {"device": "cpu"}), Result("b", 1, {"f1": 0.5})]
    to_csv(rows, tmp_path / "r.csv")
    to_json(rows, tmp_path / "r.json")
    with open(tmp_path / "r.csv", newline="") as file:
        first, second = csv.DictReader(file)
    assert float(first["f1"]) == 1 / 3 and first["device"] == "cpu" and first["trainable_parameters"] == "5"
    assert second["method"] == "b" and second["auc"] == "" and second["artifact_bytes"] == ""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    loaded = json.loads((tmp_path / "r.json").read_text(), parse_constant=refuse)
    assert loaded[0]["metrics"] == {"f1": 1 / 3, "auc": None} and loaded[0]["extra"] == {"device": "cpu"}


# Pictures


def test_curves_draw_one_run_and_a_list_of_one_alike(tmp_path):
    pytest.importorskip("matplotlib")
    curves({"soft": [history(0.8)], "dept": [history(0.9)]}, tmp_path / "a.png")
    curves({"soft": history(0.8), "dept": history(0.9)}, tmp_path / "b.png")
    a, b = pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png")
    assert a.std() > 0.01 and np.array_equal(a, b)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: figures.append(self))
    return figures


def test_curves_have_a_mean_line_over_shared_steps_and_a_line_per_seed(tmp_path, drawn):
    curves({"soft": [history(0.6), history(0.8, steps=60)]}, tmp_path / "c.png", metric="accuracy")
    loss, accuracy = drawn[0].axes
    assert (loss.get_xlabel(), loss.get_ylabel()) == ("optimiser step", "training loss")
    assert accuracy.get_ylabel() == "validation accuracy ↑"
    assert len(accuracy.lines) == 3
    mean = accuracy.lines[-1]
    assert list(mean.get_xdata()) == [50] and list(mean.get_ydata()) == pytest.approx([(0.3 + 0.4) / 2])
    assert list(loss.lines[-1].get_xdata()) == [10, 20, 30, 40, 50, 60]
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["soft (2 seeds)"]


def test_bars_have_the_mean_the_deviation_and_every_seed(tmp_path, drawn):
    bars(results(), tmp_path / "b.png", ["accuracy"])
    (axes,) = drawn[0].axes
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([0.72, 0.82, 0.5])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["soft", "dept", "zero-shot"]
    assert [text.get_text() for text in axes.texts] == ["0.720 ± 0.020", "0.820 ± 0.017", "0.500"]
    whiskers = [c.lines[2][0].get_segments()[0][:, 0] for c in axes.containers if hasattr(c, "has_xerr")]
    assert np.array(whiskers) == pytest.approx(np.array([[0.70, 0.74], [0.82 - 0.03**0.5 / 10, 0.82 + 0.03**0.5 / 10]]))
    dots = [line.get_xdata().tolist() for line in axes.lines if line.get_marker() == "o"]
    assert dots == [[0.70, 0.72, 0.74], [0.80, 0.83, 0.83]]


def over_shots():
    few = [Result("soft", seed, {"accuracy": a}) for seed, a in enumerate([0.4, 0.5])] + [
        Result("zero-shot", 0, {"loss": 1.0})
    ]
    return {1: few, 16: results()}


def test_a_metric_over_shots_has_a_line_per_method_and_a_band_of_the_deviation(tmp_path, drawn):
    over(over_shots(), tmp_path / "o.png", "accuracy", "shots", log=True)
    (axes,) = drawn[0].axes
    assert [line.get_label() for line in axes.lines] == ["soft", "zero-shot", "dept"]
    soft, zero, dept = axes.lines
    assert soft.get_xdata().tolist() == [1, 16] and soft.get_ydata().tolist() == pytest.approx([0.45, 0.72])
    assert (zero.get_xdata().tolist(), dept.get_xdata().tolist()) == ([16], [16])
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((0.45 - 0.05 * 2**0.5, 0.74))
    with pytest.raises(InputError, match="no result has the metric 'f1'"):
        over(over_shots(), tmp_path / "o.png", "f1", "shots")


def test_a_metric_over_shots_as_a_table():
    grid = over_grid(over_shots(), "accuracy", "shots")
    assert grid.header == ("method", "1 shots", "16 shots")
    assert grid.rows == [
        ("soft", "0.450 ± 0.071", "0.720 ± 0.020"),
        ("zero-shot", "–", "0.500"),
        ("dept", "–", "0.820 ± 0.017"),
    ]
    assert grid.marked == {(0, 1), (2, 2)}


def test_a_gallery_shows_each_image_with_its_caption(tmp_path, drawn):
    images = [np.full((4, 4, 3), i * 30, np.uint8) for i in range(8)]
    gallery(images, [f"${i}$" for i in range(8)], tmp_path / "g.png", right=[i % 2 == 0 for i in range(8)])
    titles = [axes.title for axes in drawn[0].axes[:8]]
    assert [title.get_text() for title in titles] == [rf"\${i}\$" for i in range(8)]
    assert len({title.get_color() for title in titles}) == 2
    with pytest.raises(InputError, match="no images to show"):
        gallery([], [], tmp_path / "g.png")


def test_heatmap_writes_each_number_and_leaves_nan_grey(tmp_path, drawn):
    heatmap([[0.1, math.nan, 0.3], [0.4, 0.5, 1.0]], ["a", "$b$"], ["x", "y", "z"], tmp_path / "h.png", "accuracy")
    axes, bar = drawn[0].axes
    assert [text.get_text() for text in axes.texts] == ["0.100", "–", "0.300", "0.400", "0.500", "1.000"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a", r"\$b\$"]
    assert bar.get_ylabel() == "accuracy"
    gains = [[math.nan, -0.1], [0.4, math.nan]]
    heatmap(gains, "ab", "ab", tmp_path / "h.png", texts=[["0.7", "-0.1"], ["+0.4", "$x$"]], centre=0.0)
    axes, _ = drawn[1].axes
    assert [text.get_text() for text in axes.texts] == ["0.7", "-0.1", "+0.4", r"\$x\$"]
    assert [text.get_color() for text in axes.texts] == ["black", "black", "white", "black"]
    assert axes.images[0].get_clim() == (-0.4, 0.4)
    with pytest.raises(InputError, match="not of 1 rows and 2 columns"):
        heatmap([[1.0]], ["a"], ["x", "y"], tmp_path / "h.png")


@pytest.mark.parametrize(
    ("run", "metric", "message"),
    [
        ([{"step": 1, "time": 2.0}], None, "no run has loss. Keys there are: step, time"),
        ([{"step": 1, "loss": 2.0}], "f1", "no run has loss, validation/f1"),
    ],
)
def test_runs_that_cannot_be_drawn_are_refused(tmp_path, run, metric, message):
    with pytest.raises(InputError, match=message):
        curves({"soft": run}, tmp_path / "c.png", metric)
    assert not (tmp_path / "c.png").exists()


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"pictures need matplotlib. Install pt-core\[report\]"):
        bars(results(), tmp_path / "b.png")


def test_drawing_leaves_pyplot_alone(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    bars(results(), tmp_path / "b.png")
    assert "matplotlib.pyplot" not in sys.modules


# Pages


def test_a_page_escapes_text_and_marks_cells(tmp_path):
    grid = Grid(["<b>name", "x"], [["<script>alert(1)</script>", "1 & 2"], ["b", "3"]], frozenset({(1, 1)}), "cap <i>")
    html(tmp_path / "p.html", "A <title>", [("B & C", ['text "with" <img src=x onerror=y>', grid])])
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert "<title>A &lt;title&gt;</title>" in page and "<h2>B &amp; C</h2>" in page
    assert "<script" not in page and "<img" not in page and "<b>" not in page and "<i>" not in page
    assert '<th scope="row">&lt;script&gt;alert(1)&lt;/script&gt;</th><td>1 &amp; 2</td>' in page
    assert '<td class="marked">3</td>' in page
    assert "prefers-color-scheme: dark" in page


def test_only_a_png_is_embedded_and_a_refused_page_leaves_the_old_one(tmp_path):
    (tmp_path / "p.html").write_text("old")
    (tmp_path / "x.png").write_text("<svg>")
    for name in ("x.png", "gone.png"):
        with pytest.raises(InputError, match="is not a PNG"):
            html(tmp_path / "p.html", "T", [("A", [tmp_path / name])])
    assert (tmp_path / "p.html").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.html", "x.png"]


def test_a_comparison_writes_every_file_and_a_page_that_needs_no_other(tmp_path):
    pytest.importorskip("matplotlib")
    histories = {"dept": [history(0.8), history(0.9)], "soft": history(0.7)}
    path = write_comparison(tmp_path / "new" / "out", results(), histories, "SST-2", "16 shots <i>")
    folder = path.parent
    assert sorted(p.name for p in folder.iterdir()) == [
        "bars.png",
        "curves.png",
        "report.html",
        "results.csv",
        "results.json",
        "table.md",
    ]
    page = path.read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,') == page.count("src=") == page.count("<img") == 2
    assert not re.search(r"https?:|<link|<script|@import|url\(", page)
    for text in ("0.820 ± 0.017", "+0.100 [+0.075, +0.125]", "16 shots &lt;i&gt;"):
        assert text in page
    markdown = (folder / "table.md").read_text()
    assert markdown.startswith("# SST-2\n\n16 shots <i>\n\n| method |") and "**0.820 ± 0.017**" in markdown
    assert "## Paired differences" in markdown
    for name in ("bars.png", "curves.png"):
        picture = pixels(folder / name)
        assert picture.shape[0] > 300 and picture.shape[1] > 600 and picture.std() > 0.01


def test_a_comparison_without_histories_has_no_curves(tmp_path):
    pytest.importorskip("matplotlib")
    path = write_comparison(tmp_path, results()[-1:])
    assert not (tmp_path / "curves.png").exists()
    assert "Paired differences" not in path.read_text()


def test_without_matplotlib_a_comparison_has_all_but_the_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    path = write_comparison(tmp_path, results(), {"soft": history(0.7)})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "results.csv", "results.json", "table.md"]
    page = path.read_text(encoding="utf-8")
    assert "0.820 ± 0.017" in page and "<img" not in page
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "no pictures: pictures need matplotlib. Install pt-core[report]\n")


def test_pictures_of_the_comparison_are_in_its_report(tmp_path):
    pytest.importorskip("matplotlib")
    write_comparison(tmp_path / "first", results())
    path = write_comparison(tmp_path, results(), more={"Prompted <atoms>": tmp_path / "first" / "bars.png"})
    page = path.read_text(encoding="utf-8")
    assert "Prompted &lt;atoms&gt;" in page and page.count("<img") == 2
