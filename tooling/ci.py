"""What continuous integration asks of the workspace, in the standard library alone: it runs before anything is installed.

    python3 tooling/ci.py packages                      every workspace package, as JSON
    python3 tooling/ci.py affected --base origin/main   the packages that a change can break, as JSON
    python3 tooling/ci.py isolated pt-core [--oldest]   a package's tests where only its own dependencies are installed
    python3 tooling/ci.py bare pt-nlp                   pip installs it without constraints and extras, as its README says
    python3 tooling/ci.py lint | types                  ruff; mypy (strict for the core)

A new package gets one row in `ISOLATION`. Environments are made of hard links where uv's cache and the temporary folder
(TMPDIR) share a file system; elsewhere uv copies them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CORE = "pt-core"
TEST_TOOLS = ("pytest>=8", "pytest-timeout>=2", "pytest-xdist>=3.6", "hypothesis>=6")
MODALITY_LIBRARIES = frozenset(
    {"transformers", "timm", "torch_geometric", "torchaudio", "torchvision", "diffusers", "rdkit", "open_clip"}
)


@dataclass(frozen=True)
class Isolation:
    """What a package's own environment may hold: modality libraries by import name (those of all its extras too), and the
    extras its tests need."""

    uses: frozenset[str] = frozenset()
    extras: tuple[str, ...] = ()


ISOLATION = {
    "pt-core": Isolation(extras=("report", "tensorboard", "ray")),
    "pt-graph": Isolation(uses=frozenset({"torch_geometric", "rdkit"}), extras=("demo",)),
    "pt-nlp": Isolation(uses=frozenset({"transformers"}), extras=("demo", "peft")),
    "pt-vl": Isolation(uses=frozenset({"transformers", "torchvision", "open_clip"}), extras=("demo",)),
}


def import_name(package: str) -> str:
    return package.replace("-", "_")


def forbidden(package: str) -> list[str]:
    """Import names that must not be found in the package's own environment: other modalities' libraries and packages."""
    others = {import_name(other) for other in ISOLATION} - {import_name(CORE), import_name(package)}
    return sorted((MODALITY_LIBRARIES - ISOLATION[package].uses) | others)


def project(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))


def members(root: Path) -> dict[str, PurePosixPath]:
    """Folder of each workspace package, relative to the root, by package name."""
    patterns = project(root)["tool"]["uv"]["workspace"]["members"]
    folders = [found.parent for pattern in patterns for found in root.glob(f"{pattern}/pyproject.toml")]
    return dict(sorted((project(folder)["project"]["name"], to_posix(folder, root)) for folder in folders))


def to_posix(folder: Path, root: Path) -> PurePosixPath:
    return PurePosixPath(folder.relative_to(root).as_posix())


def lower_bound(folder: Path, library: str) -> str | None:
    """The oldest version of `library` that the package in `folder` declares (`>=`), or None where it does not depend on it."""
    for requirement in project(folder)["project"].get("dependencies", []):
        if requirement_name(requirement) == library:
            bound = re.search(r">=\s*([\w.]+)", requirement)
            return bound.group(1) if bound else None
    return None


def requirement_name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower()


def constraints(root: Path, package: str, oldest: bool) -> list[str]:
    """The workspace's pinned set; with `oldest`, transformers is held at the lowest version that the package declares.

    Its hub client goes with it: an older transformers wants an older one.
    """
    pinned: list[str] = project(root)["tool"]["uv"]["constraint-dependencies"]
    if not oldest:
        return pinned
    lowest = lower_bound(root / members(root)[package], "transformers")
    if lowest is None:
        sys.exit(f"{package} declares no lower bound of transformers: there is no oldest version to test")
    free = ("transformers", "huggingface-hub")
    return [pin for pin in pinned if requirement_name(pin) not in free] + [f"transformers=={lowest}"]


def changed_files(root: Path, base: str) -> list[PurePosixPath] | None:
    """Files that differ from where `base` and HEAD parted, uncommitted ones included; None where git does not know `base`."""
    git = ["git", "-C", str(root)]
    known = subprocess.run(
        [*git, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{base}^{{commit}}"], capture_output=True
    )
    if known.returncode != 0:
        return None
    tracked = [*git, "diff", "--name-only", "-z", "--no-renames", "--merge-base", base]
    untracked = [*git, "ls-files", "-z", "--others", "--exclude-standard", "--full-name"]
    listed = [subprocess.run(command, check=True, capture_output=True).stdout for command in (tracked, untracked)]
    return [PurePosixPath(os.fsdecode(name)) for output in listed for name in output.split(b"\0") if name]


def is_document(path: PurePosixPath) -> bool:
    """A text for readers only; Markdown under src/ ships with a package and under tests/ is test data, so neither counts."""
    return path.name == "LICENSE" or (path.suffix == ".md" and not {"src", "tests"} & set(path.parts))


def affected(root: Path, base: str) -> list[str]:
    """Packages that the change since `base` can break: its own package's files touch a package alone, documents touch
    none, and everything else (the core, the root, tests/, tooling/, CI) touches all. So does a `base` unknown to git."""
    folders = members(root)
    changed = changed_files(root, base)
    if changed is None:
        print(f"git does not know the base {base!r}: every package counts as affected", file=sys.stderr)
        return list(folders)
    touched = set()
    for path in changed:
        if is_document(path):
            continue
        owner = next((name for name, folder in folders.items() if path.is_relative_to(folder)), CORE)
        if owner == CORE:
            return list(folders)
        touched.add(owner)
    return sorted(touched)


def run(*command: str | os.PathLike[str], cwd: Path = ROOT, environment: dict[str, str] | None = None) -> None:
    subprocess.run(command, check=True, cwd=cwd, env=environment)


def uv() -> list[str]:
    found = shutil.which("uv")
    return [found] if found else [sys.executable, "-m", "uv"]


def importable(python: Path, names: list[str]) -> list[str]:
    """Those of `names` that `python` would find, without importing them."""
    probe = "import sys; from importlib.util import find_spec; print(*filter(find_spec, sys.argv[1:]))"
    return subprocess.run(
        [python, "-I", "-c", probe, *names], check=True, capture_output=True, text=True
    ).stdout.split()


def refuse_strays(package: str, python: Path) -> None:
    strays = importable(python, forbidden(package))
    if strays:
        sys.exit(f"{package}: its own environment holds {', '.join(strays)}: a dependency that it must not have")


def isolated(package: str, oldest: bool) -> None:
    """Build the core and `package` into a fresh environment, check what is missing from it, and run the package's tests there.

    The packages are installed from built wheels, not in place: a file that the wheel forgets is missed here.
    """
    folders = members(ROOT)
    extras = ",".join(ISOLATION[package].extras)
    targets = {name: f"{name} @ {(ROOT / folders[name]).as_uri()}" for name in (CORE, package)}
    targets[package] = targets[package].replace(" @", f"[{extras}] @" if extras else " @", 1)
    held = constraints(ROOT, package, oldest)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"{package}-") as temporary:
        work = Path(temporary)  # outside the workspace, so that uv adds none of the workspace's own settings
        environment, python = work / "env", work / "env" / "bin" / "python"
        (work / "constraints.txt").write_text("\n".join(held) + "\n", encoding="utf-8")
        run(*uv(), "venv", "--quiet", "--python", sys.executable, environment, cwd=work)
        install = [*uv(), "pip", "install", "--quiet", "--python", str(python), "--constraint", "constraints.txt"]
        # A workspace source would install the core in place; uv would reuse a cached build after an edit.
        fresh = ["--no-sources", *(option for name in targets for option in ("--refresh-package", name))]
        run(*install, *fresh, *targets.values(), *TEST_TOOLS, cwd=work)
        refuse_strays(package, python)
        print(
            f"{package}: installed in {time.monotonic() - started:.0f} s; absent: {', '.join(forbidden(package))}",
            flush=True,
        )
        run(python.with_name("pytest"), folders[package] / "tests", environment=test_environment(environment))


def bare(package: str) -> None:
    """Let pip install the core and `package`, as its README says; check what is missing, and that the command line works."""
    folders = members(ROOT)
    with tempfile.TemporaryDirectory(prefix=f"{package}-bare-") as temporary:
        environment = Path(temporary) / "env"
        python = environment / "bin" / "python"
        run(sys.executable, "-m", "venv", environment, cwd=Path(temporary))
        variables = test_environment(environment)
        run(
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            *(folders[name] for name in (CORE, package)),
            environment=variables,
        )
        refuse_strays(package, python)
        run(python.with_name("pt"), "list", cwd=Path(temporary), environment=variables)


def test_environment(environment: Path) -> dict[str, str]:
    """This process's variables, with `environment` in front and nothing of another Python."""
    variables = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    variables["VIRTUAL_ENV"] = str(environment)
    variables["PATH"] = os.pathsep.join([str(environment / "bin"), variables.get("PATH", os.defpath)])
    # An installed pt_core cannot find the data that lies beside the repository.
    variables.setdefault("PT_STUDY_DATA", str(ROOT.parent / "shared" / "data"))
    return variables


def lint() -> None:
    run(*uv(), "run", "ruff", "check")
    run(*uv(), "run", "ruff", "format", "--check")


def types() -> None:
    run(*uv(), "run", "mypy", "--strict", "-p", import_name(CORE))
    others = [import_name(name) for name in members(ROOT) if name != CORE]
    run(*uv(), "run", "mypy", *[part for name in others for part in ("-p", name)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("packages", help="every workspace package, as JSON")
    listing.add_argument("--declaring", metavar="LIBRARY", help="only those that give a lower bound of this library")
    change = commands.add_parser("affected", help="packages that a change can break, as JSON")
    change.add_argument("--base", default="origin/main", help="the revision to compare with (default: %(default)s)")
    alone = commands.add_parser("isolated", help="a package's tests in an environment of its own")
    alone.add_argument("package", choices=sorted(ISOLATION))
    alone.add_argument("--oldest", action="store_true", help="with the oldest transformers that the package declares")
    plain = commands.add_parser("bare", help="installed by pip, without constraints and extras")
    plain.add_argument("package", choices=sorted(ISOLATION.keys() - {CORE}))
    commands.add_parser("lint", help="ruff check and ruff format --check")
    commands.add_parser("types", help="mypy: strict for the core, plain for the packages")
    chosen = parser.parse_args()
    try:
        match chosen.command:
            case "packages":
                folders, library = members(ROOT), chosen.declaring
                print(
                    json.dumps([name for name in folders if not library or lower_bound(ROOT / folders[name], library)])
                )
            case "affected":
                print(json.dumps(affected(ROOT, chosen.base)))
            case "isolated":
                isolated(chosen.package, chosen.oldest)
            case "bare":
                bare(chosen.package)
            case "lint":
                lint()
            case "types":
                types()
    except subprocess.CalledProcessError as error:
        sys.exit(f"exit status {error.returncode}: {' '.join(map(str, error.cmd))}")


if __name__ == "__main__":
    main()
