"""Arrows go one way, and nothing in the tree is unsafe or tied to one machine: read from the sources, without running them."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {folder.name: folder for folder in (path.parent for path in ROOT.glob("*/pt-*/pyproject.toml"))}
MODALITY_LIBRARIES = {"transformers", "timm", "torch_geometric", "diffusers", "torchaudio", "torchvision"}
MODALITY_LIBRARIES |= {"rdkit", "open_clip"}
PICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
IMPORTERS = {"import_module", "__import__", "importorskip"}

# Joined here, so that this file names no host itself.
INDEX_HOSTS = [
    "".join(parts)
    for parts in [
        ("py", "pi.org"),
        ("python", "hosted.org"),
        ("ana", "conda.org"),
        ("download.", "pytorch.org"),
        ("data.", "pyg.org"),
        ("registry.", "npmjs.org"),
        ("deb.", "debian.org"),
    ]
]
# `/home/me` and `/home/someone` are the stand-ins that tests use for anybody's path.
MACHINE_PATH = re.compile(
    r"(?<![\w.~}$/-])(?:/(?:home|Users)/(?!(?:me|someone)\b)|/(?:root|work|farm|opt|tmp|mnt|srv|scratch|data)/|[A-Z]:\\Users\\)[\w.-]+"
)


def tracked_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        check=True,
        capture_output=True,
        text=True,
    )
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def trees(*folders: Path) -> Iterator[tuple[Path, ast.Module]]:
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            yield path, ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported(tree: ast.Module) -> set[str]:
    """Top-level names of all imports in a file: at the top, inside functions, and by name (`import_module("name")`)."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in IMPORTERS and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                found.add(name.value)
    return {name.partition(".")[0] for name in found}


def unpickling(tree: ast.Module) -> list[str]:
    """Calls that would unpickle what a file or a byte string holds, as source."""
    full_names = {}  # what a name in this file stands for: `read` -> `pickle.load`
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            full_names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            full_names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        first, dot, rest = ast.unparse(node.func).partition(".")
        owner, _, name = (full_names.get(first, first) + dot + rest).rpartition(".")
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg}
        if (
            (owner in PICKLERS and name in {"load", "loads", "Unpickler", "open"})
            or name == "read_pickle"
            or ((owner, name) == ("torch", "load") and options.get("weights_only") != "True")
            or options.get("allow_pickle", "False") != "False"
        ):
            found.append(ast.unparse(node))
    return found


def hosts_and_paths(text: str) -> list[str]:
    """Package indexes and paths of one machine that a text names."""
    return [host for host in INDEX_HOSTS if host in text] + [match.group() for match in MACHINE_PATH.finditer(text)]


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_every_package_of_the_workspace_is_looked_at() -> None:
    assert {"pt-core", "pt-nlp"} <= set(PACKAGES)
    for name, folder in PACKAGES.items():
        assert (folder / "src" / name.replace("-", "_") / "__init__.py").is_file()


def test_the_core_imports_no_modality() -> None:
    modalities = MODALITY_LIBRARIES | {name.replace("-", "_") for name in PACKAGES} - {"pt_core"}
    core = PACKAGES["pt-core"]
    assert {
        shown(path): names
        for path, tree in trees(core / "src", core / "tests")
        if (names := imported(tree) & modalities)
    } == {}


@pytest.mark.parametrize("package", sorted(set(PACKAGES) - {"pt-core"}))
def test_no_package_imports_another(package: str) -> None:
    others = {name.replace("-", "_") for name in set(PACKAGES) - {"pt-core", package}}
    folder = PACKAGES[package]
    assert {
        shown(path): names
        for path, tree in trees(folder / "src", folder / "tests")
        if (names := imported(tree) & others)
    } == {}


@pytest.mark.parametrize(
    "source",
    [
        "import timm",
        "import timm.data as d",
        "from timm.models import create_model",
        "def f():\n    import timm",
        "if TYPE_CHECKING:\n    from timm import Model",
        "importlib.import_module('timm.models')",
        "__import__('timm')",
    ],
)
def test_an_import_is_seen_in_every_form(source: str) -> None:
    assert imported(ast.parse(source)) & MODALITY_LIBRARIES == {"timm"}


def test_a_relative_import_and_a_mention_are_no_import() -> None:
    assert (
        imported(ast.parse("from .timm import x\nname = 'timm'\nsys.modules.get('timm')")) & MODALITY_LIBRARIES == set()
    )


def test_no_file_names_a_package_index_or_a_path_of_one_machine() -> None:
    found = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        names = [host for host in INDEX_HOSTS if host in text] + [
            match.group() for match in MACHINE_PATH.finditer(text)
        ]
        found += [f"{shown(path)}: {name}" for name in names]
    assert found == []


@pytest.mark.parametrize("folder", ["root", "work", "home/ann", "Users/ann", "tmp", "opt"])
def test_a_path_of_one_machine_is_seen(folder: str) -> None:
    assert len(hosts_and_paths(f'open("/{folder}/file.txt")')) == 1


@pytest.mark.parametrize("host", INDEX_HOSTS)
def test_a_package_index_is_seen(host: str) -> None:
    assert hosts_and_paths(f"index-url = https://{host}/simple") == [host]


@pytest.mark.parametrize(
    "text", ["#!/usr/bin/env bash", "the-site.example/home/ann", "../opt/x", "tests/data/x", "~/mnt/x", "/home/me/x"]
)
def test_a_shebang_an_address_and_a_relative_path_are_no_machine_path(text: str) -> None:
    assert hosts_and_paths(text) == []


def test_nothing_is_unpickled() -> None:
    found = {
        shown(path): calls
        for path, tree in trees(*PACKAGES.values(), ROOT / "tests", ROOT / "tooling")
        if (calls := unpickling(tree))
    }
    assert found == {}


def test_only_tests_import_a_pickler() -> None:
    sources = [folder / "src" for folder in PACKAGES.values()]
    found = {
        shown(path): names for path, tree in trees(*sources, ROOT / "tooling") if (names := imported(tree) & PICKLERS)
    }
    assert found == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle; pickle.load(f)",
        "import pickle as p; p.loads(b)",
        "from pickle import loads; loads(b)",
        "from pickle import load as read; read(f)",
        "joblib.load('x')",
        "torch.load('x')",
        "torch.load('x', weights_only=False)",
        "torch.load('x', weights_only=flag)",
        "from torch import load; load('x')",
        "np.load('x', allow_pickle=True)",
        "np.load('x', allow_pickle=flag)",
        "pd.read_pickle('x')",
    ],
)
def test_unpickling_is_seen_in_every_form(source: str) -> None:
    assert len(unpickling(ast.parse(source))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "torch.load('x', weights_only=True)",
        "np.load('x')",
        "np.load('x', allow_pickle=False)",
        "json.load(f)",
        "import pickle; pickle.dumps(x)",
        "from json import load; load(f)",
        "open('x')",
    ],
)
def test_a_safe_load_is_left_alone(source: str) -> None:
    assert unpickling(ast.parse(source)) == []
