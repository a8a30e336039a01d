"""What all image-text methods share: logits exp(s) norm(f) norm(w)^T of image features f and class features w.

A method trains what makes f, w or both, and says which (`trains_text`, `trains_image`); what it does not train is computed
once. Batches are dicts: `pixels` [B, 3, H, W] or `image_features` [B, d], `labels` [B] and `sample_ids`. `pt_vl.data` makes
them.

Class names are part of a method's configuration, so that a saved prompt can be rebuilt, and may be changed afterwards:

    method = CoOp(backbone, CoOpConfig(class_names=("cat", "dog")))
    method.with_classes(("horse", "sheep"))          # the same prompt, another label space
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

import torch
from accelerate.utils import send_to_device
from pydantic import Field, ValidationError, field_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Subset

from pt_core.artifacts import load_artifact
from pt_core.errors import InputError
from pt_core.frozen import FeatureCache, fingerprint
from pt_core.method import Batch, Loss, Method, MethodConfig, Output
from pt_core.plan import FitConfig, device_of
from pt_core.recipe import explain
from pt_vl.backbones import After, DualEncoder, TowerPrompt

if TYPE_CHECKING:
    from pt_core.data import Split
    from pt_core.training import FitResult

Position = Literal["end", "middle", "front"]
# What the CoOp family's runs have in common (released codes of CoOp, CoCoOp, MaPLe, MVLPT, RESTORE); the last prompt counts.
FAMILY = {"optimiser": "sgd", "momentum": 0.9, "weight_decay": 5e-4, "schedule": "epoch-cosine"}
FAMILY |= {"max_grad_norm": None, "keep_best": False}


def written(name: str) -> str:
    """A class name as it stands in a sentence: underscores are spaces."""
    return " ".join(name.replace("_", " ").split())


def alike(names: Sequence[str], read: Callable[[str], Hashable] = written) -> tuple[str, str] | None:
    """The first two class names that read the same: one text, equal logits, and the second would never be chosen."""
    seen: dict[Hashable, str] = {}
    for name in names:
        if (key := read(name)) in seen:
            return seen[key], name
        seen[key] = name
    return None


def several(names: Sequence[str]) -> tuple[str, ...]:
    """Class names as a tuple.

    Raises:
        InputError: it is one text, whose letters would be classes.
    """
    if isinstance(names, str):
        raise InputError(
            f"{names!r} is one text, not the class names", field="class_names", remedy="Give a list or tuple of names"
        )
    return tuple(names)


def check_templates(templates: Sequence[str]) -> None:
    """Raise ValueError unless each has one place for the class name."""
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"template {template!r} needs one {{}} for the class name")


class VLConfig(MethodConfig):
    """Settings that every image-text method has."""

    class_names: tuple[str, ...] = Field(min_length=2, description="in the order of the labels")
    templates: tuple[str, ...] = Field(
        ("a photo of a {}.",),
        min_length=1,
        description="sentences with {} for the class name, where the text is not prompted; several: their normalised "
        "features are averaged (Radford et al. 2021)",
    )
    text_chunk: int | None = Field(
        256, ge=1, description="sentences of a text pass; what goes beyond is recomputed in the backward pass, exactly"
    )
    seed: int = Field(0, description="of the start values")

    @field_validator("class_names")
    @classmethod
    def _distinct(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not all(map(written, names)):
            raise ValueError("a class name is empty")
        if (two := alike(names)) is not None:
            raise ValueError(f"class names {two[0]!r} and {two[1]!r} are one: tell them apart")
        return names

    @field_validator("templates", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("templates")
    @classmethod
    def _named(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        check_templates(templates)
        return templates


def template_features(
    backbone: DualEncoder, names: Sequence[str], templates: Sequence[str], chunk: int | None = None
) -> Tensor:
    """Features [C, d] of classes: of one template as the tower gives them; of several, normalised, averaged, normalised."""
    made = [backbone.encode_text([t.replace("{}", written(name)) for name in names], chunk) for t in templates]
    if len(made) == 1:
        return made[0]
    return F.normalize(torch.stack([F.normalize(w, dim=-1) for w in made]).mean(0), dim=-1)


class Sentences(nn.Module):
    """Class names with m slots for a context: [SOS] context words name "." [EOS].

    Args:
        backbone: whose text tower reads them.
        names: C class names.
        length: m.
        position: where the name stands: behind the context, between its halves (the first has m // 2), or in front of it.
        words: frozen words in front of the name, such as "of a".

    Raises:
        InputError: a sentence does not fit into the tower's context (the class is named).
    """

    embeddings: Tensor
    order: Tensor

    def __init__(
        self, backbone: DualEncoder, names: Sequence[str], length: int, position: Position = "end", words: str = ""
    ) -> None:
        super().__init__()
        self.__dict__["backbone"] = backbone  # not a submodule: it is not this module's to keep
        room = backbone.context - length
        if room < 3:
            raise InputError(f"{length} context slots leave no room in {backbone.context}", field="prompt_length")
        self.length, self.position = length, position
        told = [f"{words} {written(name)}.".strip() for name in names]
        tokens = backbone.tokenise(told, context=room)
        self.eot = tokens.eot + length
        first, n = backbone.text_tower.first, tokens.ids.shape[1]
        self.first = first
        context = n + torch.arange(length)  # slots of the context, behind the n own ones
        order = []
        for name, count in zip(names, tokens.lengths.tolist(), strict=True):
            # As many tokens as the name has by itself: its last sign and the full stop may have become one.
            own_length = len(backbone.plain_ids(f"{words} {written(name)}".strip()))
            before = 0 if position == "end" else min(own_length, count - first - 1)
            head, half = torch.arange(first), {"end": length, "middle": length // 2, "front": 0}[position]
            own = torch.arange(first, n)
            order.append(torch.cat([head, context[:half], own[:before], context[half:], own[before:]]))
        ahead = backbone.plain_ids(words) if words else []
        frozen = min(_common(ahead, row[first:]) for row in tokens.ids.tolist())
        # Slots that are the same for every class, as long as the context is.
        self.shared = first + {"end": length + frozen, "middle": length // 2, "front": 0}[position]
        self.register_buffer("embeddings", backbone.embed_words(tokens.ids).detach(), persistent=False)
        self.register_buffer("order", torch.stack(order).to(self.embeddings.device), persistent=False)

    def forward(
        self,
        context: Tensor,
        deep: Mapping[int, Tensor] | None = None,
        *,
        per_image: bool = False,
        chunk: int | None = None,
        share: bool = True,
        after: After | None = None,
    ) -> Tensor:
        """Text features of all classes.

        Args:
            context: [m, d_t]; [C, m, d_t] if every class has its own; [B, m, d_t] with `per_image`.
            deep, chunk, share, after: see `DualEncoder.text`; deep rows overwrite the slots behind [SOS].

        Returns:
            [C, d]; [B, C, d] with `per_image`.
        """
        own, backbone = self.embeddings, cast(DualEncoder, self.backbone)
        options: dict[str, Any] = {"deep": deep, "chunk": chunk, "share": share, "after": after}
        context = context.to(own.dtype)
        if context.ndim == 3 and not per_image:
            return backbone.text(_arranged(own, context, self.order), self.eot, **options)
        if per_image and self.position != "end":
            raise InputError("a context for each image stands in front of the name", field="position")
        start = self.order[:1, : self.shared]
        groups = context if per_image else context[None]
        prefix = _arranged(own[:1].expand(len(groups), -1, -1), groups, start.expand(len(groups), -1))
        if self.position == "end":  # nothing behind the prefix is context
            rest = own[:, self.shared - self.length :]
        else:
            rest = _arranged(own, context.expand(len(own), -1, -1), self.order[:, self.shared :])
        return backbone.text(rest, self.eot, prefix=prefix if per_image else prefix[0], **options)


def _arranged(own: Tensor, context: Tensor, order: Tensor) -> Tensor:
    """Rows of [own; context], [b, n + m, d], in the order [b, k]."""
    rows = torch.cat([own, context], dim=1)
    return rows.gather(1, order[..., None].expand(-1, -1, rows.shape[-1]))


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning of two sequences."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class VLMethod(Method):
    """A frozen dual encoder whose class features, image features or both are made with a trained prompt.

    A subclass overrides `encode_text`, `encode_image` or both, and declares it. By default text is the templates' and images
    are the tower's own.

    Fidelity, of all that train: the last batch of an epoch may be short. The released codes drop it where there are as many
    rows as in a batch. Their random crops and flips are the data's (`augment`, off by default: fixed views are computed once).
    """

    config: Any
    backbone: DualEncoder
    config_class: ClassVar[type[MethodConfig]] = VLConfig
    trains_text: ClassVar[bool] = False  # class features depend on what is trained
    trains_image: ClassVar[bool] = False  # image features do
    run: ClassVar[dict[str, Any]] = {"epochs": 200, "batch_size": 32}  # beside `FAMILY`, as published

    def __init__(self, backbone: DualEncoder, config: MethodConfig | None = None) -> None:
        if not isinstance(backbone, DualEncoder):
            raise InputError(
                f"image-text methods want a DualEncoder, not a {type(backbone).__name__}",
                remedy="Wrap it: pt_vl.DualEncoder(model, processor)",
            )
        if config is None:
            raise InputError(f"{self.name} has to know the classes", field="class_names")
        super().__init__(backbone, config)
        self.generator = torch.Generator().manual_seed(self.config.seed)
        self._known: tuple[Any, dict[str, Tensor], Tensor] | None = None
        for template in (
            () if self.trains_text else self.config.templates
        ):  # refuse what is too long before anything starts
            backbone.tokenise([template.replace("{}", written(name)) for name in self.config.class_names])

    # --- to override ------------------------------------------------------------------------------------------------
    def encode_text(self) -> Tensor:
        """Class features w, [C, d]."""
        return template_features(self.backbone, self.config.class_names, self.config.templates, self.config.text_chunk)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Image features f, [B, d]."""
        return self.backbone.image(pixels)

    def as_prompt(self) -> TowerPrompt:
        """What was trained as rows that can be attached to the user's own model (`pt_core.attach(backbone.model, ...)`).

        Raises:
            InputError: it is more than fixed rows in the towers.
        """
        raise InputError(f"what {self.name} trains is more than rows in the towers", remedy="Call the method itself")

    @property
    def class_bound(self) -> bool:
        """Whether what is trained means nothing for other classes."""
        return False

    @classmethod
    def reads_templates(cls, config: Any) -> bool:
        """Whether with these settings class features are those of the templates."""
        return not cls.trains_text

    @property
    def column_names(self) -> tuple[str, ...]:
        """Class names of the logits' columns."""
        return tuple(self.config.class_names)

    # --- contract ---------------------------------------------------------------------------------------------------
    def text_features(self) -> Tensor:
        """Class features [C, d]. Those that no gradient is wanted for are computed once for the values at hand."""
        if self.trains_text and torch.is_grad_enabled():
            return self.encode_text()
        device = self.backbone.device
        values = self.trained_state() if self.trains_text else {}
        key = (device, autocast_dtype(device))
        if self._known is None or self._known[0] != key or not _equal(values, self._known[1]):
            with torch.no_grad():
                self._known = (key, {name: tensor.clone() for name, tensor in values.items()}, self.encode_text())
        return self._known[2]

    def image_features(self, batch: Batch) -> Tensor:
        """Image features [B, d]: those of the batch if it has any (`cache_features`), else of its pixels."""
        if "image_features" in batch and not self.trains_image:
            return cast(Tensor, batch["image_features"])
        if "pixels" not in batch:
            raise InputError(f"{self.name} prompts the image tower: cached features are of no use", field="pixels")
        return self.encode_image(batch["pixels"])

    @torch.no_grad()
    def read(self, split: Split, config: FitConfig) -> tuple[Tensor, Tensor]:
        """Image features [n, d] and labels [n] of a split, one batch of images at a time."""
        batches = (send_to_device(b, self.backbone.device) for b in split.batches(config.eval_batch_size))
        found = [(self.image_features(batch), batch["labels"]) for batch in batches]
        return torch.cat([features for features, _ in found]), torch.cat([labels for _, labels in found])

    def forward(self, batch: Batch) -> Output:
        """Logits [B, C] and image features [B, d]."""
        features = self.image_features(batch)
        return Output(self.backbone.similarity(features, self.text_features()), features)

    def loss_of(self, output: Output, batch: Batch) -> Loss:
        """Cross-entropy, summed over rows."""
        logits = cast(Tensor, output.logits)
        return Loss(F.cross_entropy(logits, batch["labels"], reduction="sum"), len(logits))

    def train(self, mode: bool = True) -> Self:
        if self.trains_text:
            self._known = None
        return super().train(mode)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [group | {"lr": self.config.lr} for group in super().parameter_groups()]

    def with_classes(self, names: Sequence[str], templates: Sequence[str] | None = None) -> Self:
        """The same prompt on other classes (base-to-new, cross-data-set).

        Args:
            names: in the order of the labels.
            templates: of these classes, where the text is not prompted; default: its own.

        Raises:
            InputError: what was trained belongs to the classes, or a name does not fit, or is given by itself.
        """
        if self.class_bound:
            raise InputError(f"what {self.name} has trained belongs to its own classes", field="class_names")
        settings = self.config.model_dump() | {"class_names": several(names)}
        settings |= {} if templates is None else {"templates": templates}
        try:
            config = self.config_class.model_validate(settings)
        except ValidationError as error:
            raise explain(error, self.config_class) from error
        other = type(self)(self.backbone, config)
        other.load_trained_state(self.trained_state())
        return other.to(self.backbone.device).train(self.training)

    def save_pretrained(self, path: str | Path, *, task: Mapping[str, Any] | None = None, **options: Any) -> Path:
        """See `Method.save_pretrained`; the images' preprocessing, the text's context and a hash of the tokeniser are
        recorded in any case.

        `backbone_name` is by default the name of a shipped or open_clip model that `load_backbone` has loaded.
        """
        known = {"preprocessing": self.backbone.preprocessing.model_dump(mode="json"), "context": self.backbone.context}
        known |= dict(task or {}) | {"tokenizer_hash": self.backbone.tokeniser_hash}
        options["backbone_name"] = options.get("backbone_name") or self.backbone.source
        return super().save_pretrained(path, task=known, **options)

    @classmethod
    def from_pretrained(cls, path: str | Path, backbone: nn.Module, *, strict: bool = False) -> Self:
        """See `Method.from_pretrained`.

        Warns:
            UserWarning: as there, or the backbone prepares images otherwise.

        Raises:
            InputError: as there, or the backbone's tokeniser is another one: it would read the class names differently; or,
                with `strict`, it prepares images otherwise.
        """
        saved = load_artifact(path).config.task or {}  # older artifacts have less
        if not isinstance(backbone, DualEncoder):
            return super().from_pretrained(path, backbone, strict=strict)
        if saved.get("tokenizer_hash") not in (None, "", backbone.tokeniser_hash):
            raise InputError(
                "the prompt was trained with another tokenizer", file=path, remedy="Use the tokenizer of its backbone"
            )
        now, before = backbone.preprocessing.model_dump(mode="json"), saved.get("preprocessing")
        known = before if isinstance(before, Mapping) else {}
        if changed := [
            f"{key} is {now.get(key)}, was {value}" for key, value in known.items() if now.get(key) != value
        ]:
            problem = f"the prompt was trained on images that were prepared otherwise: {'; '.join(changed)}"
            remedy = "Give DualEncoder its preprocessing: config.task['preprocessing'] of the artifact"
            if strict:
                raise InputError(problem, file=path, remedy=remedy)
            warnings.warn(f"{problem}. {remedy}", UserWarning, stacklevel=2)
        return super().from_pretrained(path, backbone, strict=strict)

    def published(self, train: Split) -> FitConfig:
        """The run that the method was published with, for these rows: what `fit` does where no other is given."""
        return FitConfig(**(FAMILY | self.run))

    def run_of(self, train: Split, config: FitConfig | None, validation: Split | None = None) -> FitConfig:
        """The run that is asked for, or `published`.

        Raises:
            InputError: it is bf16 on a CPU, whose autocast does not take the backbone's weights in float16; the rows are of
                other classes than the method, or of these in another order, as far as the splits know.
        """
        for rows, split in (("training", train), ("validation", validation)):
            if split is not None:
                self._check_classes(rows, split)
        config = config or self.published(train)
        half = self.backbone.text_tower.words.weight.dtype == torch.float16
        if half and config.precision == "bf16" and device_of(config).type == "cpu":
            raise InputError(
                "a backbone in float16 does not go with bf16 on a CPU",
                field="training.precision",
                remedy="Load it in float32 or bfloat16, or leave precision out",
            )
        return config

    def _check_classes(self, rows: str, split: Split) -> None:
        own, remedy = self.column_names, "Give the method the names that the data have: task.spec.class_names"
        if split.num_classes not in (None, len(own)):
            problem = f"the {rows} rows are of {split.num_classes} classes, {self.name} was made for {len(own)}"
            raise InputError(problem, field="class_names", remedy=remedy)
        for label, (theirs, ours) in enumerate(zip(split.class_names or (), own, strict=False)):
            if written(theirs) != written(ours):
                problem = f"label {label} is {theirs!r} in the {rows} rows, {ours!r} in {self.name}"
                raise InputError(problem, field="class_names", remedy=remedy)

    def fit(
        self,
        train: Split,
        validation: Split | None = None,
        config: FitConfig | None = None,
        output_dir: str | Path | None = None,
    ) -> FitResult:
        """Train by this method's protocol. Images that pass an unprompted tower in fixed views do so once.

        Args:
            config: default: `published`.

        Raises:
            InputError: see `run_of`.
        """
        config = self.run_of(train, config, validation)
        if not self.trains_image:
            self.place(device_of(config))
            train = cache_features(train, self.backbone, config.eval_batch_size)
            if validation is not None:
                validation = cache_features(validation, self.backbone, config.eval_batch_size)
        return super().fit(train, validation, config, output_dir)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast computes in on a device at the moment; None where it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _equal(values: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    return all(
        tensor.device == others[name].device and torch.equal(tensor, others[name]) for name, tensor in values.items()
    )


class Stacked:
    """Rows with one image and one label each, as a batch.

    Args:
        fixed: every row gives the same view each time it is read, so what a frozen tower makes of it may be kept.
    """

    def __init__(self, fixed: bool = True) -> None:
        self.fixed = fixed

    def __call__(self, rows: list[Mapping[str, Any]]) -> dict[str, Any]:
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0] if key != "label"}
        if "label" in rows[0]:
            batch["labels"] = torch.tensor([row["label"] for row in rows])
        return batch


def fixed_views(split: Split) -> Split:
    """The split with every row in its fixed view, where rows are augmented.

    Raises:
        InputError: they are, and have no method `fixed` that gives the rows in fixed views (`pt_vl.images.ImageRows` has).
    """
    return (
        split if getattr(split.collate, "fixed", True) else replace(split, rows=_fixed(split.rows), collate=Stacked())
    )


def _fixed(rows: Any) -> Any:
    if isinstance(rows, Subset):
        return Subset(_fixed(rows.dataset), rows.indices)
    if not hasattr(rows, "fixed"):
        raise InputError(
            "the rows are augmented, their fixed views are not known", remedy="Give them without", field="rows"
        )
    return rows.fixed()


@torch.no_grad()
def cache_features(
    split: Split, backbone: DualEncoder, batch_size: int = 32, folder: str | Path | None = None
) -> Split:
    """The split with `image_features` in the place of `pixels`, computed once, where every row has one fixed view.

    Augmented splits, and splits that are cached already, are returned as they are. In a folder a batch is known by its
    pixels: ids are the same in two splits at times (`cat/0.png` of a training and of a test folder), and the last bits of a
    row's features depend on the rows beside it. So on one machine a folder changes no bit of what comes out.

    Args:
        split: of images.
        backbone: whose image tower runs without prompts, where it is.
        batch_size: images of a pass.
        folder: keeps features for other runs and processes, those of each backbone, preprocessing and dtype of autocast in a
            `FeatureCache` of their own; None: in memory.
    """
    collate = split.collate
    if not (isinstance(collate, Stacked) and collate.fixed) or "pixels" not in split.rows[0]:
        return split
    store = None
    if folder is not None:
        how = backbone.preprocessing.model_dump(mode="json")
        if (dtype := autocast_dtype(backbone.device)) is not None:
            how["autocast"] = str(dtype)
        weights = fingerprint(backbone, config=True)
        store = FeatureCache(Path(folder) / _hash(f"{weights} {how}".encode())[:16], weights, how)
    rows: list[dict[str, Any]] = []
    for batch in split.batches(batch_size):

        def compute(_: Any = None, pixels: Tensor = batch["pixels"]) -> Tensor:
            return backbone.image(send_to_device(pixels, backbone.device)).float()

        count = len(batch["pixels"])
        if store is None:
            features = compute().cpu()
        else:  # all rows of a batch are there or none
            name = _hash(batch["pixels"].contiguous().view(torch.uint8).numpy().data)
            features = store.get_or_compute([f"{name} {i}" for i in range(count)], compute)
        more = {k: v for k, v in batch.items() if isinstance(v, Tensor) and k not in ("pixels", "labels")}
        labels = batch["labels"].tolist() if "labels" in batch else [None] * count
        for i, (feature, label) in enumerate(zip(features, labels, strict=True)):
            row = {"image_features": feature} | {key: values[i] for key, values in more.items()}
            rows.append(row if label is None else row | {"label": label})
    return replace(split, rows=rows)


def _hash(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()
