"""A trained prompt on disk and on the hub: a folder of three files, whole or not there at all.

    prompt.safetensors     what was trained, and the method's own buffers
    prompt_config.json     `ArtifactConfig`: method, configuration, identity of the backbone, task, versions, metrics
    README.md              a model card

The backbone is never part of it. Nothing is unpickled, and no code that a file names is imported: the class of a method
comes from the installed packages (`pt_core.registry`).
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import huggingface_hub
import torch
import yaml
from huggingface_hub.errors import HFValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, nn

from pt_core.errors import InputError
from pt_core.files import FILE_BROWSERS, sync, write_at
from pt_core.frozen import BackboneIdentity

if TYPE_CHECKING:
    from pt_core.method import Method

FORMAT_VERSION = 1
TENSORS, CONFIG, CARD = FILES = ("prompt.safetensors", "prompt_config.json", "README.md")


class ArtifactConfig(BaseModel):
    """Everything about a trained prompt but its tensors: the contents of `prompt_config.json`.

    A key that is added here, in `BackboneIdentity` or with another meaning needs a new `format_version`.
    """

    # "constants": a nan stays one until it is refused; by default it would become null without a word.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")

    format_version: Literal[1]
    method: str = Field(description="name of the method, as `pt list` shows it")
    package: str = Field(description="import name of the package that the method is in")
    method_class: str = Field(pattern=".+:.+", description="`module:Class`, for the reader; loading goes by `method`")
    method_config: dict[str, Any]
    backbone: BackboneIdentity
    task: dict[str, Any] | None = Field(description="labels, verbalizer, template, preprocessing, tokenizer hash")
    libraries: dict[str, str] = Field(description="distribution -> version")
    metrics: dict[str, float]
    created: datetime = Field(description="UTC")


@dataclass(frozen=True)
class Artifact:
    """A loaded artifact: its configuration, its tensors (on the CPU) by name, and the folder that holds it."""

    config: ArtifactConfig
    tensors: dict[str, Tensor]
    folder: Path


def save_artifact(
    folder: str | Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], *, card: str | None = None
) -> Path:
    """Write an artifact folder: complete, or (killed at whatever moment) not at all, the previous one untouched.

    Args:
        folder: made if needed; replaced if it holds an artifact. One writer at a time.
        tensors: what was trained, by name.
        config: the fields of `ArtifactConfig`; format_version, libraries, created, task and metrics have defaults.
        card: README.md; by default `model_card(config, tensors)`.

    Raises:
        InputError: a tensor is not finite, the configuration is not valid or not JSON, or `folder` holds other files.
    """
    now = datetime.now(UTC).replace(microsecond=0)
    defaults = {"format_version": FORMAT_VERSION, "created": now, "task": None, "metrics": {}}
    checked = _checked({**defaults, "libraries": _libraries(str(config.get("package"))), **config}, CONFIG)
    kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    _check_finite(kept, TENSORS)
    try:
        text = json.dumps(checked.model_dump(mode="json"), indent=2, allow_nan=False, ensure_ascii=False)
    except ValueError as error:  # nan, or something that JSON does not know
        raise InputError(f"cannot be written as JSON ({error})", file=CONFIG, remedy="Keep plain values") from error
    text = re.sub(
        r'\[\n([^\[\]{}"]*)\n *\]', lambda found: f"[{' '.join(found[1].split())}]", text
    )  # numbers: one line
    card = model_card(checked, kept) if card is None else card
    contents = (tensors_to_bytes(kept), text.encode() + b"\n", card.encode())
    write_folder(Path(folder), dict(zip(FILES, contents, strict=True)))
    return Path(folder)


def load_artifact(source: str | Path, revision: str | None = None) -> Artifact:
    """Read an artifact from a folder, or from the hub where `source` is no folder but an id (`owner/name`).

    All of it is of one save, also while another process is saving there.

    Args:
        source: folder or hub id.
        revision: branch, tag or commit on the hub.

    Raises:
        InputError: no such folder or repository, a file is missing or damaged, a tensor is not finite, or the
            configuration has keys that only another version knows.
    """
    folder = Path(source)
    if not recover_folder(folder):
        return _read(_download(str(source), revision))
    if revision is not None:
        raise InputError(f"is a folder, which has no revision {revision!r}", file=folder, remedy="Leave it out")
    return _read(folder)


def load(source: str | Path, backbone: nn.Module, strict: bool = False, revision: str | None = None) -> Method:
    """Read a trained prompt from a folder or the hub and put it on `backbone`.

    Args:
        source, revision: see `load_artifact`.
        backbone: the model that it was trained on, in any dtype; another one warns or is refused (`frozen.compare`).
        strict: refuse a backbone that is not bit-identical.

    Raises:
        InputError: as `load_artifact` does, or no installed package has the method.
    """
    from pt_core import registry

    artifact = load_artifact(source, revision)
    method, package = artifact.config.method, artifact.config.package
    try:
        found = registry.find_method(registry.short_name(package), method)
    except InputError as error:
        raise InputError(f"needs the method {method!r} of the package {package}: {error}", file=source) from error
    return found.from_pretrained(artifact.folder, backbone, strict=strict)


def push(folder: str | Path, repo_id: str, *, private: bool = False) -> str:
    """Upload an artifact folder to the hub (made if needed), as the user that `hf auth login` knows; returns the URL.

    Only the three files are uploaded, and only if they load.

    Raises:
        InputError: as `load_artifact` does, or the id is none that the hub takes.
    """
    recover_folder(Path(folder))
    _read(Path(folder))
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
    except HFValidationError as error:
        raise InputError(f"no id of the hub: {' '.join(str(error).split())}", field="repo_id") from error
    commit = api.upload_folder(
        repo_id=repo_id, folder_path=folder, allow_patterns=list(FILES), commit_message="Upload trained prompt"
    )
    return str(commit.commit_url)


def model_card(config: ArtifactConfig, tensors: Mapping[str, Tensor]) -> str:
    """README.md of an artifact: what it is, how to load it, metrics, size, identity of the backbone."""
    backbone = config.backbone
    name = backbone.name or "a backbone without a name"
    front = {
        "library_name": "prompt-tuning",
        "tags": list(dict.fromkeys(["prompt-tuning", config.method, config.package])),
    }
    if backbone.name and re.fullmatch(r"[\w.-]+/[\w.-]+", backbone.name):
        front["base_model"] = backbone.name
    values = sum(tensor.numel() for tensor in tensors.values())
    size = f"{values:,} values in {len(tensors)} tensors"
    if backbone.parameters:
        size += (
            f"; the frozen backbone has {backbone.parameters:,} parameters ({100 * values / backbone.parameters:.4f} %)"
        )
    labels = (config.task or {}).get("labels")
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip(),
            "---",
            "",
            f"# {config.method} for {name}",
            "",
            f"A prompt trained by the method `{config.method}` of `{config.package}`. It adapts a frozen backbone, {name},",
            "which is not part of this folder and stays as it is.",
            *(["", f"Labels: {', '.join(map(str, labels))}."] if labels else []),
            "",
            "## Use",
            "",
            "```python",
            "from pt_core import load",
            "",
            f"backbone = ...  # load {name}" + (f" at revision {backbone.revision}" if backbone.revision else ""),
            'method = load("this folder, or its id on the hub", backbone)',
            "```",
            "",
            "## Metrics",
            "",
            *(_table(["metric", "value"], [[k, f"{v:.6g}"] for k, v in config.metrics.items()]) or ["None recorded."]),
            "",
            "## Size",
            "",
            f"Trained: {size}.",
            "",
            *_table(["tensor", "shape", "dtype"], [[k, list(t.shape), t.dtype] for k, t in tensors.items()]),
            "",
            "## Backbone",
            "",
            *_table(
                ["name", "revision", "dtype", "configuration (sha256)", "weights (sha256)"],
                [[name, backbone.revision, backbone.dtype, backbone.config_hash, backbone.full_hash]],
            ),
            "",
            "## Made with",
            "",
            ", ".join(f"{library} {version}" for library, version in config.libraries.items())
            + f"; {config.created:%Y-%m-%d %H:%M} UTC.",
            "",
        ]
    )


def _table(head: list[str], rows: list[list[Any]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows] if rows else []
    return ["| " + " | ".join(str("" if c is None else c).replace("|", "\\|") for c in line) + " |" for line in lines]


def _libraries(package: str) -> dict[str, str]:
    """Versions of what made an artifact; transformers only where it is in use."""
    names = [
        "pt-core",
        package.replace("_", "-"),
        "torch",
        *(["transformers"] if "transformers" in sys.modules else []),
    ]
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # a method of a script or notebook
            continue
    return found


# --- reading ---------------------------------------------------------------------------------------------------------


def _read(folder: Path) -> Artifact:
    text, values = _of_one_save(folder)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"is not JSON ({error})", file=folder / CONFIG, remedy="Get the file again") from error
    config = _checked(content, folder / CONFIG)
    try:
        tensors = tensors_from_bytes(values)
    except SafetensorError as error:
        raise InputError(f"is damaged ({error})", file=folder / TENSORS, remedy="Get the file again") from error
    _check_finite(tensors, folder / TENSORS)
    return Artifact(config, tensors, folder)


def _of_one_save(folder: Path) -> tuple[bytes, bytes]:
    """Configuration and tensors, where another process may be saving: between two looks at the same configuration the tensors
    are those that belong to it."""
    for _ in range(20):
        try:
            text, values = (folder / CONFIG).read_bytes(), (folder / TENSORS).read_bytes()
            if (folder / CONFIG).read_bytes() == text:
                return text, values
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            recover_folder(folder)
    for name in (CONFIG, TENSORS):
        if not (folder / name).is_file():
            raise InputError("is missing", file=folder / name, remedy="Is this the folder of a trained prompt?")
    raise InputError("is replaced faster than it can be read", file=folder, remedy="Stop what writes there")


def _checked(content: Any, file: str | Path) -> ArtifactConfig:
    try:
        return ArtifactConfig.model_validate(content)
    except ValidationError as error:
        problems = [(".".join(map(str, e["loc"])), e["type"], e["msg"]) for e in error.errors()]
    unknown = [where for where, kind, _ in problems if kind == "extra_forbidden"]
    if unknown or any((where, kind) == ("format_version", "literal_error") for where, kind, _ in problems):
        libraries = content.get("libraries")
        writer = libraries.get("pt-core", "?") if isinstance(libraries, dict) else "?"
        raise InputError(
            f"is of format_version {content.get('format_version')!r}, written by pt-core {writer}"
            + (f", with keys that are unknown here: {', '.join(unknown)}" if unknown else "")
            + f"; this pt-core {metadata.version('pt-core')} reads format_version {FORMAT_VERSION}",
            file=file,
            remedy=f"Use pt-core {writer}",
        )
    where, _, message = problems[0]
    raise InputError(message, file=file, field=where or None)


def _check_finite(tensors: Mapping[str, Tensor], file: str | Path) -> None:
    for name, tensor in tensors.items():
        wide = tensor.float() if tensor.is_floating_point() else tensor  # float8 has no isfinite
        if not bool(torch.isfinite(wide).all()):
            raise InputError("holds values that are not finite", file=file, field=name, remedy="Do not use this prompt")


def _download(source: str, revision: str | None) -> Path:
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source):
        raise InputError("no such folder", file=source)
    try:
        return Path(str(huggingface_hub.snapshot_download(source, revision=revision, allow_patterns=list(FILES))))
    except (
        OSError,
        ValueError,
    ) as error:  # what the hub raises: HfHubHTTPError, LocalEntryNotFoundError, HFValidationError
        raise InputError(
            f"neither a folder here nor to be had from the hub ({str(error).splitlines()[0]})", file=source
        ) from error


# --- folders that appear whole -----------------------------------------------------------------------------------------


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Replace a folder of exactly these files: at every moment `recover_folder` gives the old one or the new one, whole.

    Raises:
        InputError: the folder holds anything else, which would be lost.
    """
    folder = _resolved(folder)
    recover_folder(folder)
    check_replaceable(folder, files)
    for left in [*_beside(folder, "new"), *_beside(folder, "old")]:  # of a save that was killed
        shutil.rmtree(left)
    mark = secrets.token_hex(4)
    new, old = (folder.with_name(f".{folder.name}.{kind}-{mark}") for kind in ("new", "old"))
    new.mkdir(parents=True)
    try:
        for name, data in files.items():
            write_at(new / name, 0, data)
        sync(new)
        if folder.exists():
            os.rename(folder, old)
        try:
            os.rename(new, folder)
        except OSError:
            if not folder.exists():
                raise
            os.rename(folder, old)  # again: a reader has taken a long moment between the two for a kill
            os.rename(new, folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
        elif old.exists():
            os.rename(old, folder)


def check_replaceable(folder: Path, files: Collection[str] = FILES) -> None:
    """Refuse a folder that `write_folder` would not replace by one of these files.

    Raises:
        InputError: it holds anything else, which would be lost, or is a file.
    """
    folder = _resolved(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError("is a file", file=folder, remedy="Choose a new folder")
    known = {*files, *FILE_BROWSERS}
    others = sorted(entry.name for entry in folder.iterdir() if entry.name not in known) if folder.exists() else []
    if others:
        raise InputError(f"holds other files ({others[0]})", file=folder, remedy="Choose a new folder")


def recover_folder(folder: Path) -> bool:
    """Put the old folder back where `write_folder` was killed after moving it away and before the new one took its place.

    Returns:
        Whether there is a folder.
    """
    folder = _resolved(folder)
    for _ in range(5):  # each look may meet another save in its middle
        if _exists(folder):
            return True
        if _beside(folder, "old"):
            time.sleep(0.05)  # a save that is alive is there for a moment only
        for old in _beside(folder, "old")[-1:]:
            try:
                os.rename(old, folder)
            except OSError:  # another process was faster
                if not folder.exists():
                    raise
    return False


def _resolved(folder: Path) -> Path:
    try:
        return folder.resolve()
    except (OSError, RuntimeError) as error:  # Python 3.11 and 3.12 raise the latter
        raise InputError("is a link to itself", file=folder) from error


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that no disk takes, such as a text in the place of a folder
        return False


def _beside(folder: Path, kind: str) -> list[Path]:
    pattern = re.compile(rf"\.{re.escape(folder.name)}\.{kind}-[0-9a-f]{{8}}")
    entries = sorted(folder.parent.iterdir()) if folder.parent.is_dir() else []
    return [entry for entry in entries if pattern.fullmatch(entry.name)]
