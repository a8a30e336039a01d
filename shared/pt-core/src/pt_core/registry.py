"""Which packages and methods are installed, without importing any of them.

A package announces itself by an entry point in the group `pt.packages` (short name -> import name) and lists its methods
in a `methods.toml` beside its `__init__.py`; a table row there is all that `pt list` reads.
"""

from __future__ import annotations

import importlib
import importlib.util
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pt_core.errors import InputError

if TYPE_CHECKING:
    from pt_core.method import Method


@dataclass(frozen=True)
class MethodEntry:
    """One row of a methods.toml.

    Args:
        name: how recipes and artifacts call it, unique in its package (several packages have a linear probe).
        target: `module:Class`.
        package: short name of the package, such as `nlp`.
        paper: authors, venue and year.
        kind: what is trained, in a few words.
        reference: the backbone and setting that `parameters` was counted for.
        parameters: trainable values in that setting (0: nothing is trained).
        fidelity: `code-checked`, `paper-checked` or `reconstructed`; `library` where another library does the work.
    """

    name: str
    target: str
    package: str
    paper: str
    kind: str
    reference: str
    parameters: int
    fidelity: Literal["code-checked", "paper-checked", "reconstructed", "library"]


@cache
def packages() -> dict[str, str]:
    """Installed modality packages: short name -> import name."""
    return {point.name: point.value for point in sorted(entry_points(group="pt.packages"), key=lambda p: p.name)}


def short_name(module: str) -> str:
    """The short name of an installed package by its import name: `pt_nlp` -> `nlp`."""
    for short, name in packages().items():
        if name == module:
            return short
    raise InputError(f"{module} is not installed", remedy=f"Installed: {', '.join(packages().values()) or 'none'}")


def package_folder(package: str) -> Path:
    """Folder of an installed modality package, found without importing it."""
    if package not in packages():
        known = ", ".join(packages()) or "none"
        raise InputError(f"no package {package!r} is installed (installed: {known})", remedy="See `pt list`")
    spec = importlib.util.find_spec(packages()[package])
    if spec is None or spec.origin is None:
        raise InputError(f"{packages()[package]} cannot be found", remedy="Install the package again")
    return Path(spec.origin).parent


@cache
def methods(package: str) -> dict[str, MethodEntry]:
    """The methods of an installed package, by name."""
    file = package_folder(package) / "methods.toml"
    found: dict[str, MethodEntry] = {}
    for row in tomllib.loads(file.read_text("utf-8"))["method"]:
        entry = MethodEntry(package=package, **row)
        if entry.name in found:
            raise InputError(f"the method {entry.name!r} is there twice", file=file)
        found[entry.name] = entry
    return found


def all_methods() -> list[MethodEntry]:
    """The methods of all installed packages."""
    return [entry for package in packages() for entry in methods(package).values()]


def markdown() -> str:
    """The installed methods as a Markdown table."""
    rows = [["method", "package", "paper", "what is trained", "trained values", "fidelity"]]
    for entry in all_methods():
        values = f"{entry.parameters:,} ({entry.reference})" if entry.parameters else "none"
        cells = [f"`{entry.name}`", entry.package, entry.paper, entry.kind, values, entry.fidelity]
        rows.append([cell.replace("|", "\\|") for cell in cells])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def find_method(package: str, name: str) -> type[Method]:
    """The class of a method of an installed package. Only what a package registers is ever imported."""
    known = methods(package)
    if name not in known:
        raise InputError(f"unknown method {name!r}", remedy=f"Those of {package}: {', '.join(sorted(known))}")
    module, _, attribute = known[name].target.partition(":")
    try:
        found: type[Method] = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise InputError(f"the method {name!r} needs {error.name}, which is not installed") from error
    return found


def workbench(package: str) -> Any:
    """The `workbench` module of a package: what the command line calls (see `pt_core.cli`)."""
    package_folder(package)
    return importlib.import_module(f"{packages()[package]}.workbench")
