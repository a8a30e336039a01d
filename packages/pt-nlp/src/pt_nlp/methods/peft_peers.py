"""LoRA and (IA)^3 as peft implements them, on a backbone that stays untouched (Hu et al. 2022, Liu et al. 2022)."""

from __future__ import annotations

import copy
from typing import Any, Self

import torch
from pydantic import Field
from torch import nn
from transformers.pytorch_utils import Conv1D

from pt_core.errors import InputError
from pt_core.method import MethodConfig
from pt_nlp.method import TextConfig, TextMethod


class LoRAConfig(TextConfig):
    """Settings of LoRA."""

    r: int = Field(8, ge=1, description="rank; 8 in peft and for RoBERTa-base in Hu et al. 2022, 4 for GPT-2 M")
    alpha: float = Field(
        8.0, gt=0, description="numerator of the scale alpha / r; 8 in peft, often 2r; 16 for RoBERTa-base in the paper"
    )
    rank_stabilised: bool = Field(False, description="scale alpha / sqrt(r) instead; off in peft and the paper")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the adapter's input; 0 in peft, 0.1 for GPT-2 M")
    targets: tuple[str, ...] | None = Field(
        None, description="names of the linear layers; None: peft's for the model type (query and value projections)"
    )
    lr: float = Field(5e-4, gt=0, description="released scripts: 5e-4 (RoBERTa-base, RTE), 2e-4 (GPT-2 M)")


class IA3Config(TextConfig):
    """Settings of (IA)^3."""

    targets: tuple[str, ...] | None = Field(
        None,
        description="names of the layers whose output (feedforward: input) is scaled; None: peft's for the model type",
    )
    feedforward: tuple[str, ...] | None = Field(
        None, description="those of `targets` whose input is scaled; None: peft's for the model type"
    )
    lr: float = Field(3e-3, gt=0, description="t-few, with Adafactor, 1000 steps of batch 8, 6 % linear warm-up")


class AdapterMethod(TextMethod):
    """An adapter of peft inside of the layers of a frozen backbone.

    What runs (`model`) is a copy of the backbone's modules over the very same parameters and buffers; only the copy's
    layers are wrapped. The backbone keeps its modules and weights, serves other methods meanwhile, and is what an artifact
    identifies. Only the adapter's tensors (float32) are trained and saved. Gradient checkpointing has to be enabled on the
    backbone before, or on `model` later.

    Raises:
        InputError: peft is not installed, it knows no layers to adapt in this model, or the backbone carries prompts.
    """

    tuner: Any

    def __init__(self, backbone: nn.Module, config: MethodConfig | None = None) -> None:
        super().__init__(backbone, config)
        copied = shared_copy(self.backbone)
        with torch.random.fork_rng(devices=()):  # peft draws its start from the global generator
            torch.default_generator.manual_seed(self.config.seed)
            try:
                tuner = self.build_tuner(copied, _peft())
            except ValueError as error:
                raise InputError(
                    f"peft finds nothing to adapt in a {type(backbone).__name__}: {' '.join(str(error).split())}",
                    field="targets",
                    remedy="Name the linear layers to adapt",
                ) from error
        object.__setattr__(self, "tuner", tuner)  # as the backbone: outside of the method's state
        if hasattr(tuner.model.get_output_embeddings(), "base_layer"):
            raise InputError(
                "the language model head cannot be adapted: label words are read row by row",
                field="targets",
                remedy="Name layers of the transformer only",
            )
        self.adapter = nn.ModuleDict(
            {path.replace(".", "/"): nn.ModuleDict(_added(layer)) for path, layer in _wrapped(self.model).items()}
        ).float()

    def build_tuner(self, model: nn.Module, peft: Any) -> Any:
        """Wrap the layers of `model`; returns peft's tuner."""
        raise TypeError(f"{type(self).__name__} builds no adapter")

    def build_prompt(self) -> None:
        return None

    @property
    def model(self) -> nn.Module:
        model: nn.Module = self.tuner.model
        return model

    def parameter_groups(self) -> list[dict[str, Any]]:
        adapter = {"name": "adapter", "params": list(self.adapter.parameters()), "lr": self.config.lr}
        return [adapter, *super().parameter_groups()]

    def place(self, device: torch.device) -> Self:
        super().place(device)
        for layer in _wrapped(self.model).values():  # of a backbone that is spread, each layer has a device of its own
            for part in _added(layer).values():
                part.to(next(layer.base_layer.parameters()).device)
        return self

    def peft_state(self, task: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """What peft saves of this adapter: its configuration, for a task of peft's, and its tensors by peft's names."""
        settings = self.tuner.peft_config["default"].to_dict()
        config = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
        config |= {"task_type": task, "inference_mode": True}
        tensors = {
            f"base_model.model.{name.replace('/', '.').replace('.default', '', 1)}": tensor
            for name, tensor in self.adapter.state_dict().items()
        }
        return config, tensors

    def folded(self) -> nn.Module:
        """A copy of the backbone, of the same class, with the adapter folded into its weights: no cost at inference.

        A trained head is not part of it. In half precision the folded weights are rounded.
        """
        model: nn.Module = copy.deepcopy(self.tuner).merge_and_unload()
        return model


class LoRA(AdapterMethod):
    """LoRA: y = W x + b + s * B A dropout(x) in chosen linear layers, s = alpha / r; A [r, d_in], B [d_out, r] are trained.

    Input ids [b, n] -> class logits [b, C] or token logits at the targets.

    Parameters: sum over the adapted layers of r * (d_in + d_out) (plus the head, if one is asked for). T5-base, r = 8 on
    q and v (72 layers): 884,736.

    Fidelity: peft does the work, so start (A kaiming-uniform with a = sqrt(5), that is U(-1/sqrt(d_in), 1/sqrt(d_in));
    B zero), scale and default layers are peft's. Released runs on RoBERTa train with the model's dropout on
    (`backbone_dropout`); here it is off unless asked for, as in those on GPT-2, whose model has none. The adapter is
    float32 on any backbone. The paper's RoBERTa runs also start from an MNLI checkpoint for small tasks; the language
    model head cannot be adapted here.

    Reference: Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen. LoRA: Low-Rank Adaptation of Large Language Models.
    ICLR 2022.
    """

    name = "lora"
    config_class = LoRAConfig

    def build_tuner(self, model: nn.Module, peft: Any) -> Any:
        config = self.config
        settings = peft.LoraConfig(
            r=config.r,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            use_rslora=config.rank_stabilised,
            target_modules=_names(config.targets),
            fan_in_fan_out=_transposed(model),
        )
        return peft.LoraModel(model, settings, "default")


class IA3(AdapterMethod):
    """(IA)^3: K <- l_k * K and V <- l_v * V in every attention, W_2 (l_ff * act(W_1 x)) in every feed-forward layer.

    Input ids [b, n] -> class logits [b, C] or token logits at the targets. The vectors start at one: the identity.

    Parameters: the widths of the scaled outputs, and of the scaled inputs of `feedforward` layers (plus the head, if one
    is asked for). T5-base, k, v and wo: 55,296 + 73,728 = 129,024.

    Fidelity: peft does the work. In gated feed-forward layers it scales the input of the output matrix, T-Few the
    output of the second branch: the same function. Its default layers are the paper's for T5 and Llama (keys, values,
    feed-forward); for several other types they differ (queries and values for Qwen and Gemma, all of c_attn for GPT-2,
    the output matrix of attention too for BERT): name `targets` and `feedforward` where that matters. T-Few trains with
    the dropout of T0 on (`backbone_dropout`); here it is off unless asked for. T-Few's unlikelihood and
    length-normalised losses are not part of it. Its run is not the default here: Adafactor for 1000 steps, the first
    6 % of them a linear warm-up (`warmup_steps: 60`). `optimiser: adafactor` is torch's: steps scale with the root mean
    square of each vector (1 at the start), and the rate is at most 1 / sqrt(step), which leaves 3e-3 as it is for so
    many steps.

    Reference: Liu, Tam, Muqeeth, Mohta, Huang, Bansal, Raffel. Few-Shot Parameter-Efficient Fine-Tuning is Better and
    Cheaper than In-Context Learning. NeurIPS 2022.
    """

    name = "ia3"
    config_class = IA3Config

    def build_tuner(self, model: nn.Module, peft: Any) -> Any:
        settings = peft.IA3Config(
            target_modules=_names(self.config.targets),
            feedforward_modules=_names(self.config.feedforward),
            fan_in_fan_out=_transposed(model),
        )
        return peft.IA3Model(model, settings, "default")


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of a model's modules that holds the very parameters and buffers of the original, wherever they are moved.

    Raises:
        InputError: prompts are attached to the model.
    """
    shared = [*model.parameters(), *model.buffers()]
    tables = [table for module in model.modules() for table in (module._parameters, module._buffers)]
    return copy.deepcopy(model, {id(part): part for part in [*shared, *tables]})


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise InputError(
            "LoRA and (IA)^3 are those of peft, which is not installed", remedy="Install the extra `peft` of pt-nlp"
        ) from error
    return peft


def _wrapped(model: nn.Module) -> dict[str, Any]:
    """The layers that peft has wrapped, by path."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {path: layer for path, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}


def _added(layer: Any) -> dict[str, nn.Module]:
    """What peft added to a layer: dictionaries of tensors and dropout, without the layer itself and empty ones."""
    return {name: part for name, part in layer.named_children() if name != "base_layer" and len(part)}


def _names(names: tuple[str, ...] | None) -> list[str] | None:
    return None if names is None else list(names)


def _transposed(model: nn.Module) -> bool:
    """Whether linear layers keep their weight as [d_in, d_out] (GPT-2)."""
    return any(isinstance(module, Conv1D) for module in model.modules())
