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
        name: how recipes and artifacts call it.
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
def methods() -> dict[str, MethodEntry]:
    """All installed methods by name."""
    found: dict[str, MethodEntry] = {}
    for package in packages():
        rows = tomllib.loads((package_folder(package) / "methods.toml").read_text("utf-8"))["method"]
        for row in rows:
            entry = MethodEntry(package=package, **row)
            if entry.name in found:
                raise InputError(f"method {entry.name!r} is in two packages: {found[entry.name].package}, {package}")
            found[entry.name] = entry
    return found


def markdown() -> str:
    """The installed methods as a Markdown table."""
    rows = [["method", "package", "paper", "what is trained", "trained values", "fidelity"]]
    for entry in methods().values():
        values = f"{entry.parameters:,} ({entry.reference})" if entry.parameters else "none"
        cells = [f"`{entry.name}`", entry.package, entry.paper, entry.kind, values, entry.fidelity]
        rows.append([cell.replace("|", "\\|") for cell in cells])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def find_method(name: str) -> type[Method]:
    """The class of an installed method. Only what an installed package registers is ever imported."""
    if name not in methods():
        raise InputError(f"unknown method {name!r}", remedy=f"Installed: {', '.join(sorted(methods()))}")
    module, _, attribute = methods()[name].target.partition(":")
    try:
        found: type[Method] = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise InputError(f"the method {name!r} needs {error.name}, which is not installed") from error
    return found


def workbench(package: str) -> Any:
    """The `workbench` module of a package: what the command line calls (see `pt_core.cli`)."""
    package_folder(package)
    return importlib.import_module(f"{packages()[package]}.workbench")
