"""tooling/ci.py, .ci/run and the workflow: what a change affects, what each package's own environment may hold, what runs."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]


def load_ci():
    spec = importlib.util.spec_from_file_location("tooling_ci", ROOT / "tooling" / "ci.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


ci = load_ci()


def write(root: Path, name: str, text: str = "x\n") -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A git repository of a core and two packages, one commit on branch `main`."""
    root = tmp_path / "workspace"
    write(
        root,
        "pyproject.toml",
        "[tool.uv]\nconstraint-dependencies = "
        '["torch==2.11.0", "transformers==5.23.0", "huggingface-hub==2.4.0"]\n'
        '[tool.uv.workspace]\nmembers = ["packages/*", "shared/*"]\n',
    )
    write(root, "shared/pt-core/pyproject.toml", '[project]\nname = "pt-core"\ndependencies = ["torch>=2.6"]\n')
    write(
        root,
        "packages/pt-a/pyproject.toml",
        '[project]\nname = "pt-a"\ndependencies = ["pt-core", "transformers-extras>=1", "transformers >= 5.1,<6"]\n',
    )
    write(root, "packages/pt-b/pyproject.toml", '[project]\nname = "pt-b"\ndependencies = ["pt-core"]\n')
    for name in (
        "README.md",
        "shared/pt-core/src/pt_core/a.py",
        "packages/pt-a/src/pt_a/a.py",
        "packages/pt-b/src/pt_b/b.py",
    ):
        write(root, name)
    write(root, ".gitignore", "runs/\n")
    git(root, "init", "-q", "-b", "main")
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "start")
    return root


EVERYTHING = ["pt-a", "pt-b", "pt-core"]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ([], []),
        (["packages/pt-a/src/pt_a/a.py"], ["pt-a"]),
        (["packages/pt-b/tests/test_b.py"], ["pt-b"]),
        (["packages/pt-a/src/pt_a/a.py", "packages/pt-b/pyproject.toml"], ["pt-a", "pt-b"]),
        (["shared/pt-core/src/pt_core/a.py"], EVERYTHING),
        (["pyproject.toml"], EVERYTHING),
        (["tests/test_x.py"], EVERYTHING),
        (["tooling/ci.py"], EVERYTHING),
        ([".github/workflows/ci.yml"], EVERYTHING),
        (["packages/pt-gone/src/pt_gone/x.py"], EVERYTHING),
        (["README.md", "packages/pt-a/README.md", "shared/pt-core/README.md", "LICENSE", "docs/x.md"], []),
        (["README.md", "packages/pt-a/src/pt_a/a.py"], ["pt-a"]),
        (["packages/pt-a/src/pt_a/zoo/card.md"], ["pt-a"]),
        (["packages/pt-a/tests/golden/README.md"], ["pt-a"]),
        (["packages/pt-a/src/pt_a/naïve name.py"], ["pt-a"]),
        (["runs/ignored.py"], []),
    ],
)
@pytest.mark.parametrize("commit", [True, False], ids=["committed", "uncommitted"])
def test_a_change_affects_the_packages_it_can_break(
    workspace: Path, changed: list[str], expected: list[str], commit: bool
) -> None:
    git(workspace, "checkout", "-q", "-b", "change")
    for name in changed:
        old = (workspace / name).read_text(encoding="utf-8") if (workspace / name).exists() else ""
        write(workspace, name, f"{old}\n")
    if commit:
        git(workspace, "add", "-A")
        git(workspace, "commit", "-q", "--allow-empty", "-m", "change")
    assert ci.affected(workspace, "main") == expected


def test_a_file_moved_between_packages_affects_both(workspace: Path) -> None:
    git(workspace, "mv", "packages/pt-a/src/pt_a/a.py", "packages/pt-b/src/pt_b/a.py")
    assert ci.affected(workspace, "main") == ["pt-a", "pt-b"]


def test_what_the_base_gained_since_the_branch_began_does_not_count(workspace: Path) -> None:
    git(workspace, "checkout", "-q", "-b", "change")
    write(workspace, "packages/pt-a/src/pt_a/new.py")
    git(workspace, "add", "-A")
    git(workspace, "commit", "-q", "-m", "change")
    git(workspace, "checkout", "-q", "main")
    write(workspace, "packages/pt-b/src/pt_b/new.py")
    git(workspace, "add", "-A")
    git(workspace, "commit", "-q", "-m", "meanwhile")
    git(workspace, "checkout", "-q", "change")
    assert ci.affected(workspace, "main") == ["pt-a"]


@pytest.mark.parametrize("base", ["", "0" * 40, "no-such-branch", "--help"])
def test_a_base_unknown_to_git_affects_everything_and_says_so(
    workspace: Path, base: str, capsys: pytest.CaptureFixture
) -> None:
    assert ci.affected(workspace, base) == EVERYTHING
    assert f"does not know the base {base!r}" in capsys.readouterr().err


def test_constraints_are_the_pinned_set_and_oldest_lowers_transformers_and_frees_its_hub_client(
    workspace: Path,
) -> None:
    pinned = ["torch==2.11.0", "transformers==5.23.0", "huggingface-hub==2.4.0"]
    assert ci.constraints(workspace, "pt-a", oldest=False) == pinned
    assert ci.constraints(workspace, "pt-a", oldest=True) == ["torch==2.11.0", "transformers==5.1"]


def test_oldest_is_refused_where_no_transformers_is_declared(workspace: Path) -> None:
    with pytest.raises(SystemExit, match="pt-b declares no lower bound of transformers"):
        ci.constraints(workspace, "pt-b", oldest=True)


def test_each_workspace_member_has_a_row_for_its_isolated_run() -> None:
    assert set(ci.ISOLATION) == set(ci.members(ROOT))


def test_each_row_allows_the_modality_libraries_that_the_package_declares_and_no_others() -> None:
    for name, folder in ci.members(ROOT).items():
        table = ci.project(ROOT / folder)["project"]
        entries = [*table["dependencies"], *itertools.chain(*table.get("optional-dependencies", {}).values())]
        names = {ci.requirement_name(entry).replace("-", "_") for entry in entries}
        declared = {"open_clip" if name == "open_clip_torch" else name for name in names}
        assert ci.ISOLATION[name].uses == declared & ci.MODALITY_LIBRARIES, name


def test_what_a_package_may_not_hold() -> None:
    libraries = {
        "transformers",
        "timm",
        "torch_geometric",
        "torchaudio",
        "torchvision",
        "diffusers",
        "rdkit",
        "open_clip",
    }
    assert libraries | {"pt_nlp"} <= set(ci.forbidden("pt-core"))
    assert libraries - {"transformers"} <= set(ci.forbidden("pt-nlp"))
    assert not {"transformers", "pt_nlp", "pt_core"} & set(ci.forbidden("pt-nlp"))
    assert "open_clip" in ci.forbidden("pt-graph") and "rdkit" not in ci.forbidden("pt-graph")
    assert "rdkit" in ci.forbidden("pt-vl") and "open_clip" not in ci.forbidden("pt-vl")


def test_extras_named_for_the_isolated_run_exist() -> None:
    for name, folder in ci.members(ROOT).items():
        assert set(ci.ISOLATION[name].extras) <= set(
            ci.project(ROOT / folder)["project"].get("optional-dependencies", {})
        ), name


def test_a_library_that_strayed_into_an_environment_is_found() -> None:
    assert ci.importable(Path(sys.executable), ["json", "no_such_library_at_all"]) == ["json"]


def test_the_isolated_run_sees_nothing_of_another_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    monkeypatch.setenv("PT_STUDY_DATA", "mine")
    variables = ci.test_environment(tmp_path)
    assert "PYTHONPATH" not in variables
    assert variables["PATH"].split(os.pathsep)[0] == str(tmp_path / "bin")
    assert variables["PT_STUDY_DATA"] == "mine"


def test_the_listing_needs_nothing_installed() -> None:
    listing = [sys.executable, "-I", "-S", "tooling/ci.py", "packages"]
    assert json.loads(subprocess.run(listing, check=True, capture_output=True, cwd=ROOT).stdout) == sorted(ci.ISOLATION)
    declaring = json.loads(
        subprocess.run([*listing, "--declaring", "transformers"], check=True, capture_output=True, cwd=ROOT).stdout
    )
    assert "pt-nlp" in declaring and "pt-core" not in declaring


def test_each_package_and_tests_are_in_the_root_test_run() -> None:
    paths = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"][
        "testpaths"
    ]
    assert set(paths) == {f"{folder}/tests" for folder in ci.members(ROOT).values()} | {"tests"}


def readme_command() -> str:
    line = next(
        line for line in (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines() if line.startswith("readme_tests=")
    )
    return line.split("'")[1]


def test_the_readme_gives_the_command_that_ci_runs() -> None:
    assert readme_command() in [line.strip() for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()]


def test_the_workflow_runs_the_same_commands() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]
    commands = {name: [step["run"].strip() for step in job["steps"] if "run" in step] for name, job in jobs.items()}
    assert commands["tests"] == [readme_command()]
    assert commands["isolated"][-1] == "python3 tooling/ci.py isolated ${{ matrix.package }}"
    assert commands["oldest-transformers"][-1] == "python3 tooling/ci.py isolated ${{ matrix.package }} --oldest"
    assert commands["bare"] == ["python3 tooling/ci.py bare ${{ matrix.package }}"]
    assert jobs["bare"]["strategy"]["matrix"]["package"] == sorted(ci.ISOLATION.keys() - {ci.CORE})
    assert commands["lint-and-types"][-2:] == ["python3 tooling/ci.py lint", "python3 tooling/ci.py types"]
    assert 'affected --base "$BASE"' in commands["affected"][0]


@pytest.mark.parametrize(("given", "offline"), [(None, "True"), ("0", "False")])
def test_the_tests_do_not_ask_the_hub_unless_they_are_told_to(given: str | None, offline: str) -> None:
    settings = {
        name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    }
    settings |= {} if given is None else {"HF_HUB_OFFLINE": given}
    probe = "import pt_core.testing, huggingface_hub; print(huggingface_hub.is_offline_mode())"
    done = subprocess.run([sys.executable, "-c", probe], env=settings, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [offline], done.stderr


@pytest.fixture
def ci_run(tmp_path: Path):
    """.ci/run beside stand-ins for pip, uv and python3; returns a function that runs it with one of them failing."""
    write(tmp_path, ".ci/run", (ROOT / ".ci/run").read_text(encoding="utf-8"))
    for tool in ("pip", "uv", "python3"):
        cases = [f'case "{tool} $*" in', '*"$BREAK"*) exit 3;;', """*" packages") echo '["pt-core", "pt-nlp"]';;"""]
        write(tmp_path, f"bin/{tool}", "\n".join(["#!/bin/sh", *cases, f'*) echo "ran {tool} $*";;', "esac", ""]))
        (tmp_path / "bin" / tool).chmod(0o755)

    def start(broken: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]])
        variables = {**os.environ, "PATH": path, "BREAK": broken}
        return subprocess.run(
            [shutil.which("bash"), str(tmp_path / ".ci/run")],
            env=variables,
            cwd=tmp_path / "bin",
            capture_output=True,
            text=True,
        )

    return start


def test_ci_run_runs_every_stage_and_prints_its_time(ci_run) -> None:
    done = ci_run("nothing breaks")
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("ran ")] == [
        "ran python3 -m pip install -q uv",
        "ran pip install uv",
        "ran uv run pytest",
        "ran python3 tooling/ci.py lint",
        "ran python3 tooling/ci.py types",
        "ran python3 tooling/ci.py isolated pt-core",
        "ran python3 tooling/ci.py isolated pt-nlp",
    ]
    assert done.stdout.count(" s  passed") == 5


@pytest.mark.parametrize(
    ("broken", "stage"),
    [
        ("uv run pytest", "tests"),
        ("ci.py lint", "lint"),
        ("ci.py types", "types"),
        ("isolated pt-core", "isolated pt-core"),
    ],
)
def test_ci_run_fails_and_names_the_stage_that_failed(ci_run, broken: str, stage: str) -> None:
    done = ci_run(broken)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == f"failed: {stage}"
    assert "ran python3 tooling/ci.py isolated pt-nlp" in done.stdout  # later stages still run


@pytest.mark.parametrize("broken", ["-m pip install", "ci.py packages"])
def test_ci_run_stops_where_the_stages_cannot_be_known(ci_run, broken: str) -> None:
    done = ci_run(broken)
    assert done.returncode == 3
    assert "==" not in done.stdout
