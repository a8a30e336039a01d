"""`pt` as a shell sees it, where no model is needed: what is listed, what is refused and how, and what stays unimported."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest

from pt_core import doctor, registry
from pt_core.errors import NonFiniteLoss
from pt_core.testing import Command, command

ROOT = Path(__file__).resolve().parents[1]
MAIN = "from pt_core.cli import main; main()"
HEAVY = {"torch", "numpy", "transformers", "accelerate", "peft", "matplotlib", "huggingface_hub", "pt_nlp"}


@pytest.fixture
def pt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """(arguments) -> exit code, stdout, stderr; 100 columns wide."""
    monkeypatch.setenv("COLUMNS", "100")
    return command(monkeypatch, capsys)


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    settings = {"PYTHONDONTWRITEBYTECODE": "", "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | settings,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )


def seconds(code: str, *arguments: str) -> float:
    """Processor time of a fresh process, the least of three (a busy machine takes longer by the clock)."""
    taken = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        python(code, *arguments)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(taken)


# --- list ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arguments", [["list"], ["list", "--markdown"], ["--help"], ["train", "--help"]])
def test_what_only_shows_something_imports_no_modality_and_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys, json\nfrom pt_core.cli import main\ntry: main()\n"
        "finally: print(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    )
    loaded = {name.partition(".")[0] for name in json.loads(python(code, *arguments).stderr.splitlines()[-1])}
    assert not loaded & HEAVY


def test_list_takes_under_a_second() -> None:
    libraries = seconds("import typer, pydantic, rich.console, rich.table")  # on a slow machine: little beside these
    assert seconds(MAIN, "list") < max(1.0, 2 * libraries)


def test_the_module_runs_as_the_command() -> None:
    def run(*how: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *how], cwd=ROOT, capture_output=True, text=True, timeout=120)

    assert run("-m", "pt_core.cli", "list").stdout == run("-c", MAIN, "list").stdout != ""
    refused = run("-m", "pt_core.cli", "train", "nlp/nothing")
    assert refused.returncode == 2 and refused.stderr.startswith("pt: no recipe")


def test_list_shows_every_field_of_every_method_whole_at_100_columns(pt: Command) -> None:
    code, out, _ = pt("list")
    assert code == 0
    lines = out.splitlines()
    assert max(map(len, lines)) <= 100
    assert "…" not in out
    for method in registry.all_methods():
        heads = [i for i, line in enumerate(lines) if line.startswith(f"{method.name} ")]
        at = next(i for i in heads if lines[i + 1].startswith(f"{method.package}, "))
        values = f"{method.parameters:,}" if method.parameters else "none"
        assert all(part in lines[at] for part in (method.name, method.kind, values))
        second = (f"{method.package}, {method.fidelity}", method.paper, method.reference)
        assert all(part in lines[at + 1] for part in second)


def test_list_shows_the_recipes(pt: Command) -> None:
    code, out, _ = pt("list", "--recipes")
    assert code == 0
    assert "nlp/bbc-topics" in out and "Topic of a news article" in out
    assert max(map(len, out.splitlines())) <= 100 and "…" not in out


def test_the_tables_of_the_readmes_are_the_one_that_list_prints(pt: Command) -> None:
    code, out, _ = pt("list", "--markdown")
    assert code == 0 and out.count("\n") == len(registry.all_methods()) + 2

    def table(readme: Path) -> list[str]:
        found = re.search(r"<!-- methods -->\n(.*?)<!-- /methods -->", readme.read_text("utf-8"), re.S)
        assert found is not None, readme
        return found[1].strip().splitlines()

    printed = out.strip().splitlines()
    assert table(ROOT / "README.md") == printed, "put the output of `pt list --markdown` between the markers"
    own = [line for line in printed[2:] if "| nlp |" in line]
    assert table(ROOT / "packages" / "pt-nlp" / "README.md") == printed[:2] + own


def test_doctor_names_the_set_that_the_workspace_pins() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    pinned = dict(line.split("==") for line in settings["tool"]["uv"]["constraint-dependencies"])
    assert pinned == doctor.TESTED


def test_doctor_shows_this_machine(pt: Command) -> None:
    code, out, _ = pt("doctor")
    assert code == 0
    for part in (doctor.TESTED["torch"], f"pt-nlp {version('pt-nlp')}", "precision to use for a frozen backbone"):
        assert part in out


# --- refusals --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train", "nlp/none"], ["no recipe 'nlp/none'", "nlp/bbc-topics"]),
        (["train", "gone.yaml"], ["gone.yaml: no such file"]),
        (["transfer", "nlp/bbc-topics"], ["nlp/bbc-topics: the package 'nlp' has no tasks to transfer between"]),
        (
            ["train", "nlp/bbc-topics", "--set", "training.max_step=2"],
            ["'training.max_step'", "did you mean 'max_steps'"],
        ),
        (
            ["train", "nlp/bbc-topics", "--set", "training.max_steps=two"],
            ["'training.max_steps'", "valid integer", "'two'"],
        ),
        (["train", "nlp/bbc-topics", "--set", "data.train=gone.csv"], ["'data.train'", "no such file", "'gone.csv'"]),
        (["train", "nlp/bbc-topics", "--set", "method.name=deept"], ["unknown method 'deept'", "dept"]),
        (
            ["train", "nlp/bbc-topics", "--set", "method.prompt_length=-1"],
            ["'method.prompt_length'", "equal to 0", "got -1"],
        ),
        (
            ["train", "nlp/bbc-topics", "--set", "method.rank=3"],
            ["'method.rank': unknown key", "Allowed there: ", "init_text"],
        ),
        (["train", "nlp/bbc-topics", "--set", "compare.dept.rnk=3"], ["'compare.dept.rnk'", "did you mean 'rank'"]),
        (["train", "nlp/bbc-topics", "--set", "data.kind=topic"], ["'data.kind'", "'verbalizer', 'classification'"]),
        (["train", "nlp/bbc-topics", "--set", "data"], ["'data' is no setting", "--set key.key=value"]),
        (
            ["train", "nlp/bbc-topics", "--set", "data.template={text} a"],
            ["field 'data.template'", "not YAML", "Quote text"],
        ),
        (["compare", "nlp/bbc-topics", "--methods", "dept,deept"], ["unknown method 'deept'"]),
        (["compare", "nlp/bbc-topics", "--methods", "dept, lora,dept"], ["'methods'", "'dept' is there twice"]),
        (["train", "nlp/bbc-topics", "--set", "training.max_steps=true"], ["'training.max_steps'", "got True"]),
        (["compare", "nlp/bbc-topics", "--set", "method.name=dept"], ["'compare.dept'", "another label"]),
        (
            ["compare", "nlp/bbc-topics", "--methods", "dept", "--set", "method.name=dept"],
            ["'compare.dept'", "another label"],
        ),
        (["predict", "./gone", "text"], ["gone: no such folder"]),
        (["predict", "."], ["give either inputs or --data"]),
        (["predict", ".", "text", "--data", "x.csv"], ["give either inputs or --data"]),
        (["predict", ".", "text"], ["prompt_config.json: is missing"]),
        (
            ["predict", "a text in the place of the prompt " * 10, "./prompt"],
            ["in the place of the prompt", "no such folder"],
        ),
        (["predict", "text" * 100, "./prompt"], ["texttext", "neither a folder here nor to be had from the hub"]),
        (["demo", "smell"], ["no package 'smell' is installed (installed: graph, nlp, vl)"]),
        (["demo", "nlp", "--data", "gone.csv"], ["gone.csv", "no such file"]),
    ],
)
def test_bad_input_ends_in_one_line_and_exit_code_2(
    pt: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], parts: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, out, err = pt(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("pt: ") and err.count("\n") == 1 and err.endswith("\n")
    assert "Traceback" not in err and all(part in err for part in parts), err
    assert not list(tmp_path.iterdir())  # nothing was begun


@pytest.mark.parametrize("below", ["", "/deeper"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "nlp/bbc-topics"],
        ["compare", "nlp/bbc-topics"],
        ["transfer", "vl/mini-clip"],
        ["demo"],
        ["export", "x"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_file_in_the_place_of_the_output_is_refused_before_anything_is_loaded(
    pt: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], below: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "workbench", lambda package: pytest.fail("a package was loaded"))
    Path("notes").write_text("mine")
    assert pt(*arguments, "-o", f"notes{below}") == (2, "", "pt: notes: is a file. Choose another output folder\n")
    assert Path("notes").read_text() == "mine"


@pytest.mark.parametrize(
    "arguments", [["train", "nlp/bbc-topics"], ["export", "x"]], ids=lambda arguments: arguments[0]
)
def test_an_output_folder_that_cannot_be_written_is_refused_before_anything_is_loaded(
    pt: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "workbench", lambda package: pytest.fail("a package was loaded"))
    Path("shut").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != Path("shut"))  # root may write anywhere
    said = "pt: shut: cannot be written. Choose another output folder\n"
    assert pt(*arguments, "-o", "shut/a/b") == (2, "", said)
    assert not list(Path("shut").iterdir())


def test_a_file_that_the_system_refuses_ends_in_one_line_and_exit_code_2(
    pt: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def demo(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "rows.csv")

    monkeypatch.setattr(registry, "workbench", lambda package: SimpleNamespace(demo=demo))
    assert pt("demo") == (2, "", "pt: [Errno 13] Permission denied: 'rows.csv'\n")


def test_what_stdout_cannot_write_is_shown_as_far_as_it_goes() -> None:
    code = """
import sys
from types import SimpleNamespace
from pt_core import cli
cli._open = lambda *_: SimpleNamespace(predict=lambda inputs: [{"label": "caf\\u00e9"}])
sys.argv = ["pt", "predict", "prompt", "text"]
cli.main()
"""
    settings = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    ran = subprocess.run([sys.executable, "-c", code], env=os.environ | settings, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, '{"label": "caf?"}\n'), ran.stderr


def test_help_shows_the_extra_of_ray(pt: Command) -> None:
    code, out, _ = pt("transfer", "--help")
    assert code == 0 and "pt-core[ray]" in out


def test_a_demo_without_matplotlib_is_refused_before_it_begins(pt: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    workbench = SimpleNamespace(demo=lambda *_, **__: pytest.fail("the demo began"))
    monkeypatch.setattr(registry, "workbench", lambda package: workbench)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert pt("demo") == (2, "", "pt: pictures need matplotlib. Install pt-core[report]\n")


def test_a_loss_that_is_not_finite_ends_in_one_line_and_exit_code_1(
    pt: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def demo(*_: object, **__: object) -> None:
        raise NonFiniteLoss("the loss is not finite at step 3;\nsamples [1]")

    monkeypatch.setattr(registry, "workbench", lambda package: SimpleNamespace(demo=demo))
    assert pt("demo") == (1, "", "pt: the loss is not finite at step 3; samples [1]\n")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["trian"], "No such command"),
        (["train"], "Missing argument"),
        (["train", "nlp/bbc-topics", "--seed", "-1"], "--seed"),
        (["compare", "nlp/bbc-topics", "--seeds", "many"], "--seeds"),
        (["export", "x"], "--output"),
        (["eval", "x"], "--data"),
        (["list", "--fast"], "--fast"),
    ],
)
def test_wrong_usage_ends_with_exit_code_2(pt: Command, arguments: list[str], part: str) -> None:
    code, out, err = pt(*arguments)
    assert (code, out) == (2, "")
    assert part in err and "Traceback" not in err


def test_a_malformed_recipe_is_refused(pt: Command, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    for text, problem in [
        ("package: nlp\nmethod: [\n", "is not YAML: while parsing"),
        ("package: nope\n", "field 'package': 'nope' is no installed package. Installed: graph, nlp, vl"),
        ("package: nlp\ndata: {train: x}\n", "field 'method': is missing"),
        ("- a\n", "holds no settings"),
    ]:
        own.write_text(text)
        code, out, err = pt("train", own)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert str(own) in err and problem in err, err


def test_a_fresh_process_ends_with_exit_code_2() -> None:
    with pytest.raises(subprocess.CalledProcessError) as ended:
        python(MAIN, "demo", "smell")
    assert ended.value.returncode == 2
    assert ended.value.stderr == "pt: no package 'smell' is installed (installed: graph, nlp, vl). See `pt list`\n"
