"""Frozen backbones: freezing them, proving that they stayed as they were, recognising them again, never computing twice.

    before = snapshot(freeze(backbone))
    ...                                              # train a prompt
    assert_unchanged(backbone, before)               # every parameter and buffer, bit for bit

    saved = identity(backbone, "google/flan-t5-base", revision="7bcac57")
    compare(saved, other)                            # silent, a warning that says what differs, or a refusal

    cache = FeatureCache("features", fingerprint(tower, config=True), "resize 224, centre crop")
    features = cache.get_or_compute(batch["sample_ids"], lambda rows: tower(images[rows]))

What is attached to a backbone (modules with `is_prompt = True`) is trained, so everything here leaves it out.
"""

from __future__ import annotations

import hashlib
import json
import operator
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from filelock import FileLock
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.func import functional_call

from pt_core.errors import InputError
from pt_core.files import write, write_at

M = TypeVar("M", bound=nn.Module)


def freeze(module: M) -> M:
    """Switch off the gradients of every parameter and put everything in eval mode (dropout, BatchNorm); returns `module`.

    Prompts that are attached already keep their gradients and their mode: a backbone may serve several.
    """
    for _, part in _parts(module):
        part.training = False
        for parameter in part.parameters(recurse=False):
            parameter.requires_grad_(False)
    return module


def fingerprint(module: nn.Module, full: bool = True, *, config: bool = False) -> str:
    """sha256 (hex) over names, shapes, dtypes and values of parameters and persistent buffers.

    Names are sorted, so the order of registration does not matter; tied weights count once.

    Args:
        module: a backbone.
        full: read every byte, so that a change of one value is seen. Otherwise 64 values of each tensor, spread evenly:
            milliseconds for a model of billions of values, sees any training, and misses a change of single values.
        config: take in its configuration as well (see `identity`), where it has one: the same weights compute something else
            with another activation or number of heads.

    Raises:
        InputError: a tensor is not in memory (meta device).
    """
    lines = _manifest(_tensors(module), limit=None if full else 64)
    if config and (settings := _settings(module)) is not None:
        lines.append(f"{_config_hash(settings)} configuration")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def snapshot(module: nn.Module) -> str:
    """One line for each parameter and buffer, non-persistent ones too: sha256 of its bytes, name, dtype, shape."""
    return "\n".join(_manifest(_tensors(module, persistent=False), limit=None))


def assert_unchanged(module: nn.Module, before: str) -> None:
    """Raise AssertionError, naming the tensors, unless `module` is bit-identical to when `snapshot` gave `before`."""
    then, now = set(before.splitlines()), set(snapshot(module).splitlines())
    changed = sorted({line.split(" ", 1)[1] for line in then ^ now})
    if changed:
        raise AssertionError(f"the backbone changed in {len(changed)} tensors, first: {'; '.join(changed[:5])}")


def call_with(
    module: nn.Module, tensors: Mapping[str, Tensor], function: Callable[..., Any], *args: Any, **options: Any
) -> Any:
    """`function`, which computes with `module`, with other tensors in the place of some of the module's.

    Args:
        tensors: name of a parameter or buffer of `module` -> tensor; gradients flow to it.
    """
    inside = {f"module.{name}": tensor for name, tensor in tensors.items()}
    return functional_call(_Call(module, function), inside, args, options)


class _Call(nn.Module):
    """`functional_call` calls nothing but the `forward` of the module that has the weights."""

    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self, *args: Any, **options: Any) -> Any:
        return self.function(*args, **options)


def _parts(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The module and its submodules by name prefix, without the prompts that are attached, and as before `torch.compile`."""
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None and not getattr(child, "is_prompt", False):
            yield from _parts(child, prefix if name == "_orig_mod" else f"{prefix}{name}.")


def _tensors(module: nn.Module, persistent: bool = True) -> dict[str, Tensor]:
    """Parameters and (persistent) buffers, sorted by name; a tensor of several names comes under the first of them."""
    found: dict[str, Tensor] = {}
    for prefix, part in _parts(module):
        hidden = part._non_persistent_buffers_set if persistent else set()
        own = {**part._parameters, **{name: b for name, b in part._buffers.items() if name not in hidden}}
        found |= {prefix + name: tensor for name, tensor in own.items() if tensor is not None}
    once = {id(tensor): name for name, tensor in sorted(found.items(), reverse=True)}
    return {name: tensor for name, tensor in sorted(found.items()) if once[id(tensor)] == name}


def _manifest(tensors: Mapping[str, Tensor], limit: int | None) -> list[str]:
    return [f"{_digest(name, t, limit)} {name} {_plain(t.dtype)} {list(t.shape)}" for name, t in tensors.items()]


def _digest(name: str, tensor: Tensor, limit: int | None) -> str:
    if tensor.is_meta:
        raise InputError(f"{name} is not in memory (meta device)", remedy="Load the backbone without disk offload")
    flat = tensor.detach().reshape(-1) if limit is None else _spread(tensor, limit)
    return hashlib.sha256(flat.cpu().contiguous().view(torch.uint8).numpy().data).hexdigest()


def _spread(tensor: Tensor, limit: int) -> Tensor:
    """At most `limit` values of a tensor, spread evenly over its flattened form (middles of equal segments)."""
    n = tensor.numel()
    k = min(limit, n)
    at = torch.tensor([(2 * i + 1) * n // (2 * k) for i in range(k)], dtype=torch.long, device=tensor.device)
    return tensor.detach().reshape(-1)[at]


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- recognising a backbone ------------------------------------------------------------------------------------------

_SAMPLED_TENSORS, _SAMPLED_VALUES = 64, 4

# Keys of a model's configuration that say how it was loaded or what its head is for, not what it computes.
_VOLATILE = {
    *("dtype", "torch_dtype", "quantization_config", "transformers_version", "architectures", "auto_map"),
    *("_name_or_path", "_commit_hash", "_attn_implementation", "_attn_implementation_internal", "attn_implementation"),
    *("use_cache", "return_dict", "output_attentions", "output_hidden_states", "gradient_checkpointing"),
    *("id2label", "label2id", "num_labels", "problem_type", "pad_token_id", "bos_token_id", "eos_token_id"),
}


class BackboneIdentity(BaseModel):
    """What an artifact keeps of its backbone, to recognise it in another dtype, quantised, or on another machine.

    Weights are kept as a sample of values and not as a hash: rounding to float16 and then to bfloat16 is not always
    rounding to bfloat16, so no hash survives a change of dtype.

    Args:
        name: where it comes from, such as a hub id.
        revision: commit or tag of `name`.
        config_hash: sha256 of its configuration without what changes with loading (dtype, attention kernel, labels ...).
        shapes: name pattern of parameters (`layers.*.weight`) -> how many, of which shape (`12 x [768, 768]`).
        sample: tensor name -> a few of its values, rounded to bfloat16 (four decimal digits hold them exactly).
        full_hash: `fingerprint(module)`, for `compare(..., strict=True)`.
        dtype: dtypes of the parameters, joined by `+`.
        parameters: number of parameters as stored, tied ones once.
        quantised: whether its weights are packed or of 8 bits and fewer.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str | None
    revision: str | None
    config_hash: str | None
    shapes: dict[str, list[str]]
    sample: dict[str, list[float]]
    full_hash: str | None
    dtype: str
    parameters: int
    quantised: bool


def identity(
    module: nn.Module,
    name: str | None = None,
    revision: str | None = None,
    *,
    full: bool = False,
) -> BackboneIdentity:
    """What has to be remembered of a backbone so that `compare` knows it again.

    Args:
        module: the backbone.
        name, revision: where it comes from; by default what a Hugging Face model says of itself.
        full: also hash all weights, so that it can be loaded with `strict=True`.
    """
    own: Any = getattr(module, "config", None)
    config = _settings(module)
    parameters = {n: t for n, t in _tensors(module).items() if isinstance(t, nn.Parameter)}
    quantised = _quantised(module)
    return BackboneIdentity(
        name=Path(name).name if name and Path(name).is_dir() else name or _source(getattr(own, "_name_or_path", None)),
        revision=revision or getattr(own, "_commit_hash", None),
        config_hash=_config_hash(config) if config is not None else None,
        shapes=_shapes(parameters),
        sample=_sample(module, quantised),
        full_hash=fingerprint(module) if full else None,
        dtype="+".join(sorted({_plain(t.dtype) for t in parameters.values()})),
        parameters=sum(t.numel() for t in parameters.values()),
        quantised=quantised,
    )


def compare(saved: BackboneIdentity, module: nn.Module, strict: bool = False) -> None:
    """Check that `module` is the backbone that `saved` describes.

    The same model passes in silence, in another dtype, compiled or quantised too. Quantised weights are not comparable: such
    a model is judged by name, configuration and the values that quantisation leaves alone.

    Args:
        saved: from the artifact.
        module: the backbone at hand.
        strict: refuse any difference in weights, persistent buffers or dtype, by full hash, and all that is warned of.

    Warns:
        UserWarning: weights or configuration differ, or the vocabulary has grown; the message says which.

    Raises:
        InputError: shapes differ, naming the first tensors; or with `strict`, anything does.
    """
    now = identity(module)
    quantised = saved.quantised or now.quantised
    source = saved.name or "an unnamed backbone"
    remedy = f"Load {saved.name or 'that one'}" + (f" at revision {saved.revision}" if saved.revision else "")

    differ = _different_shapes(saved, now, quantised)
    grown = _grown_vocabulary(module, differ)
    if differ and grown is None:
        _check_adapters(saved, now)
        shapes = [
            f"{p} is {', '.join(here) or 'absent'}, was {', '.join(was) or 'absent'}"
            for p, (was, here) in differ.items()
        ]
        raise InputError(
            f"this is not the backbone that the prompt was trained on ({source}); shapes differ: "
            + "; ".join(shapes[:3])
            + (f" and {len(shapes) - 3} more" if len(shapes) > 3 else ""),
            remedy=remedy,
        )
    here = _sample(module, quantised, {n: values for n, values in saved.sample.items() if _pattern(n) not in differ})
    doubts = [grown] if grown else []
    doubts += _doubts(saved, now, here, quantised)
    if strict:
        if saved.full_hash is None:
            raise InputError(
                "strict comparison needs a full hash of the backbone, and none was saved",
                remedy="Save with identity(..., full=True), or load without strict",
            )
        if doubts or fingerprint(module) != saved.full_hash:
            same_sample = f"full hashes differ (dtype {saved.dtype} when saved, {now.dtype} here)"
            raise InputError(f"not bit for bit {source}: {'; '.join(doubts) or same_sample}", remedy=remedy)
    elif doubts:
        how = " (quantised: judged by name, configuration and unquantised values)" if quantised else ""
        warnings.warn(
            f"the prompt may not fit this backbone, it was trained on {source}{how}: {'; '.join(doubts)}. {remedy}",
            UserWarning,
            stacklevel=2,
        )


def _different_shapes(
    saved: BackboneIdentity, now: BackboneIdentity, quantised: bool
) -> dict[str, tuple[list[str], list[str]]]:
    """Name patterns of parameters whose shapes differ, with those that they had and those that they have."""
    before, here = saved.shapes, now.shapes
    if quantised:
        before, here = ({p: [s for s in of[p] if "," not in s] for p in of} for of in (before, here))
        before, here = ({p: of[p] for p in of if before.get(p) and here.get(p)} for of in (before, here))
    return {
        p: (before.get(p, []), here.get(p, []))
        for p in sorted(before.keys() | here.keys())
        if before.get(p) != here.get(p)
    }


def _grown_vocabulary(module: nn.Module, differ: Mapping[str, tuple[list[str], list[str]]]) -> str | None:
    """What to say where a table of embeddings got more rows, what has a row for each of them (a head) as well, and nothing
    else differs; None elsewhere."""
    rows = set()
    for was, here in differ.values():
        a, b = (re.fullmatch(r"(\d+) x \[(\d+)([\d, ]*)\]", "; ".join(shapes)) for shapes in (was, here))
        if a is None or b is None or (a[1], a[3]) != (b[1], b[3]):
            return None
        rows.add((int(a[2]), int(b[2])))
    if len(rows) != 1:
        return None
    ((before, now),) = rows
    tables = {id(part.weight) for _, part in _parts(module) if isinstance(part, nn.Embedding)}
    names = [n for n, tensor in _tensors(module).items() if _pattern(n) in differ and id(tensor) in tables]
    return f"its vocabulary is larger, {now} rows of {names[0]} for {before}" if names and now > before else None


def _check_adapters(saved: BackboneIdentity, now: BackboneIdentity) -> None:
    """Where peft has put adapters into one of two backbones, that is why their parameters have other names."""
    source = saved.name or "an unnamed backbone"
    then, here = (any(re.search(r"\.(base_layer|lora_\w+)\.", p) for p in of.shapes) for of in (saved, now))
    if here and not then:
        raise InputError(
            f"peft has put adapters into this backbone, the prompt was trained on {source} without",
            remedy="Pass what `unload()` of the peft model gives, or `merge_and_unload()` if it was trained on merged weights",
        )
    if then and not here:
        raise InputError(
            f"the prompt was trained on {source} with adapters of peft in it, this backbone has none",
            remedy="Load them with peft, and pass `get_base_model()`",
        )


def _doubts(
    saved: BackboneIdentity, now: BackboneIdentity, here: Mapping[str, list[float]], quantised: bool
) -> list[str]:
    """What differs between two backbones of the same shapes, one sentence each. `here`: values that `saved.sample` names."""
    doubts = []
    common = [name for name in saved.sample if name in here]
    coarse = "float16" in f"{saved.dtype}+{now.dtype}".split("+")
    changed = [name for name in common if not _close(saved.sample[name], here[name], coarse)]
    if changed:
        doubts.append(f"weights differ in {len(changed)} of {len(common)} sampled tensors, first {changed[0]}")
    if None not in (saved.config_hash, now.config_hash) and saved.config_hash != now.config_hash:
        doubts.append("the configuration differs")
    # Where weights can be compared a name proves nothing: the same model lies in many folders.
    if (quantised or not common) and saved.name and now.name and _last(saved.name) != _last(now.name):
        doubts.append(f"its name is {now.name}")
    judged = common or (saved.config_hash and now.config_hash) or (saved.name and now.name)
    return doubts if judged else ["there is nothing to compare it by"]


def _close(saved: Sequence[float], here: Sequence[float], coarse: bool) -> bool:
    """Whether two samples, rounded to bfloat16, are of one tensor; `coarse`: one of them went through float16."""
    a, b = (torch.tensor(values, dtype=torch.bfloat16).double() for values in (saved, here))
    if len(a) != len(b):
        return False
    # Double rounding is off by at most one unit in the last of 8 binary places; float16 has steps of 2^-24 near zero.
    slack = 2**-7 * torch.maximum(a.abs(), b.abs()) + 2**-24 if coarse else torch.zeros_like(a)
    return bool(((a - b).abs() <= slack).all())


def _sample(module: nn.Module, quantised: bool, names: Mapping[str, Any] | None = None) -> dict[str, list[float]]:
    """A few values of a few tensors, rounded to bfloat16: those of `names` (none of one that is not there), or of 64 tensors
    chosen by the hash of their name.

    By hash, so that every kind of tensor at every depth has its chance, and the choice does not depend on order.
    """
    tensors = _tensors(module)
    chosen = tensors.keys() & names.keys() if names is not None else tensors.keys()
    sample: dict[str, list[float]] = {}
    if names is not None and not quantised:
        sample |= {name: [] for name in names.keys() - tensors.keys()}
    for name in sorted(chosen, key=lambda n: hashlib.sha256(n.encode()).digest()):
        tensor = tensors[name]
        packed = not tensor.is_floating_point() or tensor.dtype.itemsize == 1 or (quantised and tensor.ndim != 1)
        if packed or tensor.is_meta or tensor.numel() == 0:
            continue
        values = _spread(tensor, _SAMPLED_VALUES).to(torch.bfloat16).float()
        if names is not None or (values.isfinite().all() and values.abs().max() <= 2**15):
            # Beyond is a mask constant that depends on the dtype. Such values are not chosen, but found instead of others.
            sample[name] = [float(f"{value:.4g}") for value in values.tolist()]
        if names is None and len(sample) == _SAMPLED_TENSORS:
            break
    return dict(sorted(sample.items()))


def _shapes(parameters: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Shapes by name pattern, numbers in names replaced: a model of 300 parameters has about 20 patterns."""
    counts: dict[str, Counter[tuple[int, ...]]] = defaultdict(Counter)
    for name, tensor in parameters.items():
        counts[_pattern(name)][tuple(tensor.shape)] += 1
    return {p: [f"{n} x {list(shape)}" for shape, n in sorted(found.items())] for p, found in sorted(counts.items())}


def _pattern(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _quantised(module: nn.Module) -> bool:
    config = getattr(module, "config", None)
    return getattr(config, "quantization_config", None) is not None or any(
        not (t.is_floating_point() or t.is_complex()) or t.dtype.itemsize == 1
        for _, part in _parts(module)
        for t in part.parameters(recurse=False)
    )


def _settings(module: nn.Module) -> dict[str, Any] | None:
    """The configuration that a model carries, as those of Hugging Face do."""
    own: Any = getattr(module, "config", None)
    return own.to_dict() if hasattr(own, "to_dict") else None


def _config_hash(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(_stable(config), sort_keys=True, default=str).encode()).hexdigest()


def _stable(value: Any) -> Any:
    """A configuration without its volatile keys and without what is unset (a later library version knows more keys)."""
    if isinstance(value, Mapping):
        return {str(k): _stable(v) for k, v in value.items() if k not in _VOLATILE and v is not None}
    return [_stable(item) for item in value] if isinstance(value, list | tuple) else value


def _source(name_or_path: str | None) -> str | None:
    """A hub id as it is; of a path only the last component: where a folder lies is nobody's business."""
    if not name_or_path:
        return None
    hub_id = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name_or_path) and not Path(name_or_path).is_dir()
    return name_or_path if hub_id else Path(name_or_path).name


def _last(name: str) -> str:
    return name.rsplit("/", 1)[-1].lower()


# --- features of a frozen trunk --------------------------------------------------------------------------------------

_STORED = {  # how each dtype lies on disk; numpy has no bfloat16, its 16 bits are kept as an integer
    torch.bfloat16: "<i2",
    torch.float16: "<f2",
    torch.float32: "<f4",
    torch.float64: "<f8",
    torch.int32: "<i4",
    torch.int64: "<i8",
}


class FeatureCache:
    """Features of a frozen trunk on disk, by sample id, so that none is ever computed twice.

    A folder of three files: `features.json` (backbone, transform, dtype, shape of a row), `features.bin` (rows,
    little-endian, memory-mapped) and `ids.jsonl` (the ids of each commit, one line). Rows are written and synced before the
    line that names them, and a torn last line does not count: a kill at any moment loses at most what was not committed.
    Processes and threads may share a folder.

    Args:
        folder: made if needed; one for each backbone, transform and data set.
        backbone_fingerprint: `fingerprint(trunk, config=True)`, of every value: features of a trunk that differs in one are
            others.
        transform: all that turns a stored sample into the trunk's input, as text or JSON values; and the dtype of autocast,
            where there is one.

    Raises:
        InputError: the folder holds features of another backbone or transform, or is damaged.
    """

    def __init__(self, folder: str | Path, backbone_fingerprint: str, transform: str | Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._key = {"backbone": backbone_fingerprint, "transform": json.loads(json.dumps(transform))}
        self._lock = FileLock(self.folder / ".lock")
        self._rows: dict[str | int, int] = {}
        self._indexed = 0  # bytes of ids.jsonl that are in _rows
        self._dtype = torch.float32
        self._shape: tuple[int, ...] | None = None  # of one row; None: nothing is stored yet
        with self._lock:
            self._refresh()

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, sample_id: str | int) -> bool:
        return sample_id in self._rows

    def get_or_compute(self, ids: Sequence[str | int], compute: Callable[[list[int]], Tensor]) -> Tensor:
        """Features of the samples `ids`, [len(ids), *shape] on the CPU, computing only those that are not stored.

        What is returned is always what was read back, so the first call equals every later one bit for bit.

        Args:
            ids: sample ids (text or whole numbers, which differ: 1 is not "1"); repeats are computed once.
            compute: gets the positions in `ids` that are missing (not the ids), returns their features,
                [len(positions), *shape] on any device. It runs without autograd, and not at all if nothing is missing.

        Raises:
            InputError: no ids; features not finite (naming the ids), or of another shape or dtype than the stored ones.
        """
        keys = [i if isinstance(i, str) else int(operator.index(i)) for i in ids]
        if not keys:
            raise InputError("no sample ids given", file=self.folder)
        if any(key not in self._rows for key in keys):
            with self._lock:
                self._refresh()  # another process may have them by now
        missing: dict[str | int, int] = {}
        for position, key in enumerate(keys):
            if key not in self._rows:
                missing.setdefault(key, position)
        if missing:
            with torch.no_grad():
                features = compute(list(missing.values()))
            self._commit(list(missing), features.detach().cpu())
        return self._read([self._rows[key] for key in keys])

    def _commit(self, ids: list[str | int], features: Tensor) -> None:
        if features.ndim == 0 or len(features) != len(ids) or features.numel() == 0:
            raise InputError(f"compute returned shape {list(features.shape)} for {len(ids)} samples", file=self.folder)
        if features.dtype not in _STORED:
            raise InputError(f"features of dtype {_plain(features.dtype)} cannot be stored", file=self.folder)
        bad = [
            i
            for i, finite in zip(ids, features.reshape(len(ids), -1).isfinite().all(1).tolist(), strict=True)
            if not finite
        ]
        if bad:
            raise InputError(f"features of samples {bad[:5]} are not finite", remedy="Check the samples and the dtype")
        with self._lock:
            self._refresh()
            if self._shape is None:
                self._write_header(features)
            if (self._dtype, self._shape) != (features.dtype, tuple(features.shape[1:])):
                raise InputError(
                    f"rows are {_plain(self._dtype)} {list(self._shape or ())}, the new ones are "
                    f"{_plain(features.dtype)} {list(features.shape[1:])}",
                    file=self.folder,
                    remedy="Use another folder, or delete this one",
                )
            new = [n for n, i in enumerate(ids) if i not in self._rows]
            if new:
                rows = features[new].contiguous()
                stored = (rows.view(torch.int16) if rows.dtype == torch.bfloat16 else rows).numpy()
                write_at(self.folder / "features.bin", len(self._rows) * self._row_bytes(), _little(stored, rows.dtype))
                line = json.dumps([ids[n] for n in new]).encode() + b"\n"
                write_at(self.folder / "ids.jsonl", self._indexed, line)
                self._refresh()

    def _write_header(self, features: Tensor) -> None:
        header = {"format_version": 1, **self._key, "dtype": _plain(features.dtype), "shape": list(features.shape[1:])}
        write(self.folder / "features.json", json.dumps(header, indent=2) + "\n")
        self._refresh()

    def _refresh(self) -> None:
        """Take in what others have committed. The caller holds the lock."""
        if self._shape is None and not self._read_header():
            return
        if not (index := self.folder / "ids.jsonl").exists():
            return
        with open(index, "rb") as lines:
            lines.seek(self._indexed)
            for line in lines:
                try:
                    ids = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    ids = None
                if not isinstance(ids, list):
                    break  # torn by a kill: the next commit writes over it
                self._rows |= {i: len(self._rows) + n for n, i in enumerate(ids)}
                self._indexed += len(line)
        stored = self.folder / "features.bin"
        if self._rows and (not stored.exists() or stored.stat().st_size < len(self._rows) * self._row_bytes()):
            raise InputError(f"holds fewer than {len(self._rows)} rows", file=stored, remedy="Delete the folder")

    def _read_header(self) -> bool:
        file = self.folder / "features.json"
        if not file.exists():
            if (self.folder / "ids.jsonl").exists():
                raise InputError("is missing beside ids.jsonl", file=file, remedy="Delete the folder")
            return False
        try:
            header = json.loads(file.read_text("utf-8"))
            dtype = next(d for d in _STORED if _plain(d) == header["dtype"])
            shape = tuple(int(size) for size in header["shape"])
            version, key = header["format_version"], {part: header[part] for part in self._key}
        except (ValueError, TypeError, KeyError, StopIteration) as error:
            raise InputError("is not the header of a feature cache", file=file, remedy="Delete the folder") from error
        if version != 1:
            raise InputError(f"has format_version {version}, this pt-core reads 1", file=file, remedy="Update pt-core")
        for part, ours in self._key.items():
            if key[part] != ours:
                raise InputError(
                    f"the features are of {part} {key[part]!r}, not of {ours!r}",
                    file=self.folder,
                    remedy="Use another folder, or delete this one",
                )
        self._dtype, self._shape = dtype, shape
        return True

    def _row_bytes(self) -> int:
        return int(np.prod(self._shape or (), dtype=np.int64)) * self._dtype.itemsize

    def _read(self, rows: list[int]) -> Tensor:
        shape = (max(rows) + 1, *(self._shape or ()))
        stored = np.memmap(self.folder / "features.bin", dtype=_STORED[self._dtype], mode="r", shape=shape)
        taken = np.ascontiguousarray(stored[rows])  # indexing copies: the map is closed with `stored`
        return torch.from_numpy(taken.astype(taken.dtype.newbyteorder("="), copy=False)).view(self._dtype)


def _little(values: np.ndarray[Any, Any], dtype: torch.dtype) -> bytes:
    return values.astype(_STORED[dtype], copy=False).tobytes()
