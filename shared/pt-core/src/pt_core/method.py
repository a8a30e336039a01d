"""The contract of a method: a frozen backbone, the prompt that adapts it, and how the prompt is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from pt_core import artifacts, frozen
from pt_core.errors import InputError
from pt_core.settings import Settings

if TYPE_CHECKING:
    from pt_core.attachment import Handle
    from pt_core.data import Split
    from pt_core.plan import FitConfig
    from pt_core.training import FitResult

Batch = Mapping[str, Any]


class MethodConfig(Settings):
    """Settings of a method. Unknown keys are refused; the source of every default is in its field's description."""


@dataclass
class Loss:
    """A loss that can be split over micro-batches and processes: value = total / count.

    Args:
        total: scalar, summed over the terms of the batch (tokens, rows).
        count: number of terms; the step divides by the sum of all counts of the global batch.
        parts: named values for the log, averaged in the same way (each is a total over the same terms).
        decomposes: False for a loss that couples the rows of a batch (contrastive, PPO): accumulation and several
            processes are refused for it.
    """

    total: Tensor
    count: Tensor | int
    parts: dict[str, Tensor] = field(default_factory=dict)
    decomposes: bool = True

    @property
    def value(self) -> Tensor:
        return self.total / self.count

    @classmethod
    def mean(cls, value: Tensor, **parts: Tensor) -> Loss:
        """A loss over the batch as a whole, which does not decompose."""
        return cls(value, 1, parts, decomposes=False)


@dataclass
class Output:
    """What a forward pass returns. Fields that a method does not produce are None."""

    logits: Tensor | None = None
    features: Tensor | None = None


class Method(nn.Module):
    """A frozen backbone, the prompt that adapts it, and how the prompt is trained.

    A subclass names itself (`name`, as in its package's methods.toml) and its configuration class, builds what is
    trained in `__init__(backbone, config)`, and implements `forward` and `loss`. The constructor takes nothing else, so
    that a saved method can be rebuilt from its configuration. A loss that follows from what `forward` returns is best given
    as `loss_of`: evaluation then runs one pass for metrics and loss, not two.

    The backbone is an argument and never saved. It is frozen and in eval mode; `train()` switches the method's own
    modules only.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[MethodConfig]] = MethodConfig
    frozen_backbone: ClassVar[bool] = True  # False: the backbone itself is trained (fine-tuning as a baseline)
    trains: ClassVar[bool] = True  # False: nothing is trained by gradient (zero-shot)

    config: MethodConfig
    backbone: nn.Module
    handle: Handle | None = None  # of the prompt where it is attached

    def __init__(self, backbone: nn.Module, config: MethodConfig | None = None) -> None:
        super().__init__()
        self.config = config if config is not None else self.config_class()
        if not isinstance(self.config, self.config_class):
            raise InputError(
                f"{type(self).__name__} takes a {self.config_class.__name__}, not a {type(self.config).__name__}"
            )
        # Held outside of nn.Module's registry: the method's state is what is trained, never the backbone.
        object.__setattr__(self, "backbone", frozen.freeze(backbone) if self.frozen_backbone else backbone)

    # --- to implement -------------------------------------------------------------------------------------------
    def forward(self, batch: Batch) -> Output:
        raise TypeError(f"{type(self).__name__} has no forward")

    def loss(self, batch: Batch) -> Loss:
        loss = self.loss_of(self(batch), batch)
        if loss is None:
            raise TypeError(f"{type(self).__name__} is not trained by a loss")
        return loss

    def loss_of(self, output: Output, batch: Batch) -> Loss | None:
        """The loss of a batch from what `forward` made of it; None where `loss` needs a pass of its own.

        Penalties on what is trained belong to training mode: in eval mode losses of different methods are compared.
        """
        return None

    @classmethod
    def loss_comes_from(cls) -> Literal["output", "batch"] | None:
        """Whether the loss that trains is given by `loss_of` or by a `loss` that overrides it.

        None: there is no such loss, since nothing is trained, or by a protocol of the method's own (`loss = Method.loss`).
        """
        if not cls.trains:
            return None
        for owner in cls.__mro__:
            if owner is Method or vars(owner).get("loss") is Method.loss:
                break
            if "loss_of" in vars(owner):
                return "output"
            if "loss" in vars(owner):
                return "batch"
        return None

    # --- what is trained ----------------------------------------------------------------------------------------
    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that are trained."""
        return ((n, p) for n, p in self.named_parameters() if p.requires_grad)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for the optimiser: dicts with `name`, `params` and, where they differ from the run's, `lr`,
        `weight_decay` and `schedule`."""
        return [{"name": "prompt", "params": [p for _, p in self.trainable()]}]

    def optimisers(self, config: FitConfig) -> dict[str, torch.optim.Optimizer]:
        """Optimisers by name. Plain methods have one over `parameter_groups()`; groups of one optimiser are disjoint."""
        from pt_core.plan import build_optimiser

        return {"main": build_optimiser(self.parameter_groups(), config)}

    def trained_state(self) -> dict[str, Tensor]:
        """All that has to be kept of a trained method: its parameters and persistent buffers, nothing of the backbone."""
        return {name: tensor.detach() for name, tensor in self.state_dict().items()}

    def load_trained_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `trained_state`. Raises InputError where names, shapes or kinds of numbers differ."""
        own = self.state_dict()
        missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
        if missing or unknown:
            raise InputError(
                f"the tensors do not belong to {type(self).__name__}: missing {missing}, unknown {unknown}"
            )
        for name, tensor in tensors.items():
            if own[name].shape != tensor.shape:
                raise InputError(f"{name} has shape {tuple(tensor.shape)}, {tuple(own[name].shape)} was expected")
            if own[name].dtype != tensor.dtype and not (own[name].is_floating_point() and tensor.is_floating_point()):
                raise InputError(f"{name} is {tensor.dtype}, {own[name].dtype} was expected")
        self.load_state_dict(dict(tensors))

    def kept_state(self) -> dict[str, Tensor]:
        """What an artifact keeps: `trained_state`, unless prediction needs less of it (a mask's bits, no critic)."""
        return self.trained_state()

    def load_kept_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `kept_state`, as far as prediction goes. Raises InputError where names or shapes differ."""
        self.load_trained_state(tensors)

    def count(self) -> int:
        """Number of trainable values."""
        return sum(p.numel() for _, p in self.trainable())

    def print_trainable_parameters(self) -> None:
        """Print the trainable values beside those of the frozen backbone."""
        trained, total = self.count(), sum(p.numel() for p in self.backbone.parameters())
        print(f"{self.name}: {trained:,} trained, {total:,} frozen ({100 * trained / max(total, 1):.4f} %)")

    def extra_state(self) -> dict[str, Any]:
        """JSON state beyond tensors that a training run must restore."""
        return {}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Inverse of `extra_state`."""

    def run_identity(self) -> dict[str, Any]:
        """JSON that must be the same for a run to be resumed, beyond the configuration."""
        return {}

    # --- where it runs ------------------------------------------------------------------------------------------
    def active(self) -> AbstractContextManager[Any]:
        """Context in which the backbone carries this method's prompt (nothing to do where none is attached)."""
        return nullcontext() if self.handle is None else self.handle.active()

    def place(self, device: torch.device) -> Self:
        """Move the method, and the backbone unless it is already spread over devices or quantised."""
        if not getattr(self.backbone, "hf_device_map", None) and not getattr(self.backbone, "is_quantized", False):
            self.backbone.to(device)
        return self.to(device)

    def remove(self) -> None:
        """Take everything out of the backbone; it is bit-identical to before, and in eval mode."""
        self.eval()  # a run that broke off may have left dropout on
        if self.handle is not None:
            self.handle.remove()

    # --- training and keeping -----------------------------------------------------------------------------------
    def fit(
        self,
        train: Split,
        validation: Split | None = None,
        config: FitConfig | None = None,
        output_dir: str | Path | None = None,
    ) -> FitResult:
        """Train by this method's protocol: plain supervised training unless a subclass says otherwise."""
        from pt_core.training import fit

        return fit(self, train, validation, config, output_dir)

    def save_pretrained(
        self,
        path: str | Path,
        *,
        backbone_name: str | None = None,
        revision: str | None = None,
        task: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> Path:
        """Write the trained prompt (safetensors, configuration, model card) to a folder, whole or not at all.

        Args:
            path: folder; replaced if it holds an artifact.
            backbone_name, revision: where the backbone comes from; by default what the backbone itself says.
            task: what prediction needs beyond the prompt: labels, verbalizer, template, preprocessing, tokenizer hash.
            metrics: numbers for the card.
        """
        in_memory = not any(parameter.is_meta for parameter in self.backbone.parameters())
        known = frozen.identity(self.backbone, backbone_name, revision, full=self.frozen_backbone and in_memory)
        if not self.frozen_backbone:  # its weights are no longer those that a user will load
            known = known.model_copy(update={"sample": {}})
        config = {
            "method": self.name,
            "package": type(self).__module__.partition(".")[0],
            "method_class": f"{type(self).__module__}:{type(self).__qualname__}",
            "method_config": self.config.model_dump(),
            "backbone": known,
            "task": dict(task) if task is not None else None,
            "metrics": dict(metrics or {}),
        }
        return artifacts.save_artifact(path, self.kept_state(), config)

    @classmethod
    def from_pretrained(cls, path: str | Path, backbone: nn.Module, *, strict: bool = False) -> Self:
        """Read a trained prompt and put it on `backbone`, after checking that it is the one it was trained on."""
        artifact = artifacts.load_artifact(path)
        if artifact.config.method != cls.name:
            raise InputError(f"{path} holds {artifact.config.method!r}, not {cls.name!r}", remedy="Use pt_core.load")
        frozen.compare(artifact.config.backbone, backbone, strict=strict)
        try:
            config = cls.config_class.model_validate(artifact.config.method_config)
        except ValidationError as error:
            first = error.errors()[0]
            raise InputError(
                f"the configuration of the saved {cls.name} is not one of this version ({first['msg']})",
                remedy="Use the version that the artifact names",
                file=path,
                field=".".join(map(str, first["loc"])) or None,
            ) from error
        method = cls(backbone, config)
        method.load_kept_state(artifact.tensors)
        return method.eval()
