"""Dual encoders behind one small interface: Hugging Face CLIP and SigLIP, and open_clip's CLIP models.

    backbone = load_backbone("openai/clip-vit-base-patch16")          # or DualEncoder(model, processor)
    words = backbone.tokenise(["a photo of a cat.", "a photo of a dog."])
    w = backbone.text(backbone.embed_words(words.ids), words.eot)     # [C, d]
    f = backbone.image(pixels)                                        # [B, d]
    logits = backbone.similarity(f, w)                                # [B, C]

A trained prompt can also be put into the user's own `CLIPModel` or `SiglipModel`, which then carries it in every call:

    attach(model, TowerPrompt(image={0: rows}))                       # pt_core.attachment

Both towers take prompts at any depth. In text, layer 0 is the word embeddings, which the caller composes; the image tower
inserts layer 0 at one of two places that the literature uses, which are different functions. At block l >= 1 rows overwrite
the prompt slots that came up from the block before (deep visual prompt tuning, Jia et al. 2022, eq. 5).

What makes it fast is exact, and taken only where a tower declares that it holds (`causal`):

- text is cut behind the last slot that is pooled (77 -> about 20 tokens), unless that is the last one of the context;
- a prefix that all classes share ([SOS] and context) runs once; its keys and values are expanded over the classes;
- of the last block, only what is pooled is computed;
- many classes run in chunks that are computed again in the backward pass, so that one chunk's activations are held at a time;
- below the first trained prompt autograd records nothing, since nothing there requires a gradient.

SigLIP's text is bidirectional and pooled at the last slot of the whole context: it takes the plain path always.

The plain path places prompts by `pt_core.tokens`. The shared one (pt_vl.shared_prefix) does not: it holds a prefix by itself,
or prefixes and all classes in one row, where `Tokens` describes rows of one layout. It writes deep rows to their slots itself,
with equal results.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal, cast

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from pt_core import packing
from pt_core.attachment import Forward, Rows, register_family
from pt_core.errors import InputError
from pt_core.frozen import call_with
from pt_core.prompts import Prompt
from pt_core.tokens import BlockPrompt, Tokens, insert, real, run
from pt_vl.preprocessing import Preprocessing, hf_preprocessing, unknown_preprocessing
from pt_vl.shared_prefix import behind, last_block, prefix_keys, together
from pt_vl.towers import HFImage, HFText, OpenClipImage, OpenClipSettings, OpenClipText

ZOO = Path(__file__).parent / "zoo"  # what ships with this package
PLACES = ("hf-hub:", "local-dir:")  # what open_clip's names of models start with that say where it lies
TOKENISER = ("tokenizer*", "vocab*", "*.model")  # files of one
Place = Literal["before-ln-pre", "after-cls"]
After = Callable[[int, Tokens], Tokens]


# --- the interface ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Words:
    """Tokenised texts, on the CPU.

    Attributes:
        ids: [C, n] token ids; n is the longest text's length, or the whole context for towers that pool the last slot.
        eot: [C] slot that is pooled.
        lengths: [C] tokens of each text, special tokens included.
    """

    ids: Tensor
    eot: Tensor
    lengths: Tensor


class DualEncoder(nn.Module):
    """A CLIP-like model, the tokeniser of its text tower and the preprocessing of its images.

    The model is held, not copied, and nothing of it is replaced: its class, configuration and forward stay what they are.

    Args:
        model: a `transformers.CLIPModel` or `SiglipModel`, or a CLIP model of open_clip.
        processor: a Hugging Face processor (tokeniser and image processor), or a tokeniser alone (a Hugging Face one; for
            open_clip, what `open_clip.get_tokenizer` gives).
        preprocessing: default: the processor's or the model's own, else CLIP's or SigLIP's at the model's image size.

    Raises:
        InputError: the model is of no known family, or a part of it is none that prompts can enter exactly.
    """

    families: ClassVar[tuple[str, ...]] = ("CLIPModel", "SiglipModel", "open_clip CLIP")

    def __init__(self, model: nn.Module, processor: Any, preprocessing: Preprocessing | None = None) -> None:
        super().__init__()
        self.model = model
        kinds = {cls.__name__ for cls in type(model).__mro__}
        text: HFText | OpenClipText
        image: HFImage | OpenClipImage | None
        if kinds & {"CLIPModel", "SiglipModel"}:
            clip = "CLIPModel" in kinds
            text, image = HFText(model, causal=clip), HFImage(model, clip)
        elif type(model).__module__.startswith("open_clip"):
            text, visual = OpenClipText(model), cast(Any, model).visual
            # Convolutional and timm towers have no blocks that prompts could enter, and run as they are.
            image = OpenClipImage(visual) if type(visual).__name__ == "VisionTransformer" else None
            if image is not None and (visual.attn_pool is not None or not image.transformer.batch_first):
                image = None
        else:
            raise InputError(
                f"{type(model).__name__} is no dual encoder that is known", remedy=f"Known: {', '.join(self.families)}"
            )
        # Towers are views of the model: its modules are registered once, under `model`.
        self.__dict__["text_tower"], self.__dict__["image_tower"] = text, image
        # Hugging Face processors, and open_clip's wrapper of Hugging Face tokenisers, hold the tokeniser.
        self.tokeniser = getattr(processor, "tokenizer", processor)
        self._clean, self._blank = _around(processor)
        self.preprocessing = preprocessing or self._own_preprocessing(getattr(processor, "image_processor", None))

    source: str | None = None  # name that `load_backbone` opens it by, where the model does not say it itself
    text_tower: HFText | OpenClipText
    image_tower: HFImage | OpenClipImage | None
    _clean: Callable[[str], str]

    def _own_preprocessing(self, image_processor: Any) -> Preprocessing:
        visual = getattr(self.model, "visual", None)
        if image_processor is not None and self.image_tower is not None:
            return hf_preprocessing(image_processor, self.image_tower.size)
        if (known := getattr(visual, "preprocess_cfg", None)) is not None:  # open_clip's
            sides, how = known["size"], known.get("resize_mode", "shortest")
            sides = (sides, sides) if isinstance(sides, int) else tuple(sides)
            if sides[0] != sides[1] or how not in ("shortest", "squash"):
                raise unknown_preprocessing(f"open_clip's size {sides} with resize_mode {how!r}")
            kind = known.get("interpolation", "bicubic")
            return Preprocessing(
                size=sides[0],
                squash=how == "squash",
                interpolation="bicubic" if kind == "random" else kind,  # as open_clip has it outside of training
                mean=tuple(known["mean"]),
                std=tuple(known["std"]),
            )
        if isinstance(self.image_tower, HFImage) and not self.image_tower.clip:  # SigLIP's released one
            return Preprocessing(size=self.image_tower.size, squash=True, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        return Preprocessing(size=self.image_tower.size) if self.image_tower is not None else Preprocessing()

    # --- what it is -------------------------------------------------------------------------------------------------
    @property
    def config(self) -> Any:
        """The model's own configuration, or what takes its place for open_clip."""
        return getattr(self.model, "config", None) or OpenClipSettings(self.model)

    @property
    def hf_device_map(self) -> Any:
        return getattr(self.model, "hf_device_map", None)

    @property
    def is_quantized(self) -> bool:
        return bool(getattr(self.model, "is_quantized", False))

    @property
    def causal(self) -> bool:
        """Whether a text slot attends to earlier ones only; every shortcut in the text tower needs that."""
        return self.text_tower.causal

    @property
    def context(self) -> int:
        """Slots of the text tower, special tokens included: 77 for CLIP."""
        return self.text_tower.context

    @property
    def text_width(self) -> int:
        """d_t."""
        return self.text_tower.width

    @property
    def text_layers(self) -> int:
        return self.text_tower.num_blocks

    @property
    def image_width(self) -> int:
        """d_v."""
        return self._images().width

    @property
    def image_layers(self) -> int:
        return self._images().num_blocks

    @property
    def patch_size(self) -> int:
        """p, pixels of a patch's side."""
        tower = self._images()
        return int(tower.tower.config.patch_size if isinstance(tower, HFImage) else tower.visual.patch_size[0])

    @property
    def width(self) -> int:
        """d, of the joint space."""
        with torch.no_grad():
            return int(self.text_tower.read(self.text_tower.positions[:1]).shape[-1])

    @property
    def device(self) -> torch.device:
        return cast(torch.device, self.text_tower.words.weight.device)

    def _images(self) -> HFImage | OpenClipImage:
        if self.image_tower is None:
            raise InputError(
                f"prompts cannot enter an image tower of {type(cast(Any, self.model).visual).__name__}",
                remedy="Use a vision transformer, or a method that prompts text only",
            )
        return self.image_tower

    @property
    def _spread(self) -> bool:
        """Whether the model lies on several devices: hooks that move hidden states sit on whole blocks."""
        return len(set((self.hf_device_map or {}).values())) > 1

    # --- text -------------------------------------------------------------------------------------------------------
    def tokenise(self, texts: Sequence[str], context: int | None = None) -> Words:
        """Token ids of texts, and the slot at which each is pooled, as the model's own text tower chooses it.

        Args:
            texts: C of them.
            context: slots to be had; default: the tower's.

        Raises:
            InputError: a text needs more slots than there are (it is named, never cut).
        """
        context = context or self.context
        rows = [self._encode(text) for text in texts]
        for text, row in zip(texts, rows, strict=True):
            if len(row) > context:
                raise InputError(
                    f"{text!r} takes {len(row)} tokens, there are {context}",
                    field="class_names",
                    remedy="Shorten the class name, the template or the context",
                )
        lengths = torch.tensor([len(row) for row in rows])
        n = int(lengths.max()) if self.causal and not self.text_tower.last else context
        ids = torch.full((len(rows), n), self._pad)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        if self._blank is not None:
            ids[ids == self._blank] = 0
        return Words(ids, self._eot(ids), lengths)

    def plain_ids(self, text: str) -> list[int]:
        """Token ids of a text without special tokens."""
        if hasattr(self.tokeniser, "convert_tokens_to_ids"):
            return list(self.tokeniser(self._clean(text), add_special_tokens=False)["input_ids"])
        return list(self.tokeniser.encode(text))  # open_clip's own

    @property
    def tokeniser_hash(self) -> str:
        """Of the vocabulary, and of how a sentence is read: its case, signs and ends, and what follows them."""
        known = self.tokeniser
        words = known.get_vocab() if hasattr(known, "get_vocab") else getattr(known, "encoder", {})  # open_clip's own
        content = [sorted(words.items()), self._encode("A photo of 2 Red-Cars."), self._pad, self._blank]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def _encode(self, text: str) -> list[int]:
        """Token ids with special tokens, as many as there are."""
        if hasattr(self.tokeniser, "convert_tokens_to_ids"):
            return list(self.tokeniser(self._clean(text))["input_ids"])
        return [self.tokeniser.sot_token_id, *self.tokeniser.encode(text), self.tokeniser.eot_token_id]

    @property
    def _pad(self) -> int:
        pad = getattr(self.tokeniser, "pad_token_id", None)
        return int(pad if pad is not None else 0)

    def _eot(self, ids: Tensor) -> Tensor:
        tower = self.text_tower
        if isinstance(tower, OpenClipText):
            kind, token = tower.pooling, getattr(tower.tower, "text_eos_id", getattr(tower.tower, "eos_id", None))
        else:
            token = getattr(tower.tower, "eos_token_id", None)
            # Before transformers 4.31 CLIP's configurations said 2, and the largest id was pooled; such files live on.
            kind = "last" if tower.last else "argmax" if token == 2 else "eos"
        if kind == "last":
            return torch.full((len(ids),), ids.shape[1] - 1)
        if kind == "argmax":
            return ids.argmax(-1)
        found = torch.eq(ids, cast(int, token))
        if not bool(found.any(-1).all()):
            raise InputError(
                f"the tokeniser does not end texts with the model's end-of-text token ({token})",
                remedy="Use the tokeniser that belongs to the model",
            )
        return found.int().argmax(-1)

    def embed_words(self, ids: Tensor) -> Tensor:
        """Word embeddings [..., d_t] of token ids, without positions."""
        return cast(Tensor, self.text_tower.words(ids.to(self.device)))

    def shares_prefix(
        self, prefix: Tensor | None, deep: Mapping[int, Tensor] | None = None, at: int | None = None
    ) -> bool:
        """Whether `text` computes this prefix once for all classes: the tower is causal, its blocks are known and lie on one
        device, and all deep rows are the same for every class and lie within the prefix."""
        at = self.text_tower.first if at is None else at
        inside = all(
            r.ndim == 2 and at + len(r) <= (0 if prefix is None else prefix.shape[-2]) for r in (deep or {}).values()
        )
        return prefix is not None and self.causal and self.text_tower.parts and inside and not self._spread

    def text(
        self,
        embeddings: Tensor,
        eot: Tensor,
        deep: Mapping[int, Tensor] | None = None,
        *,
        prefix: Tensor | None = None,
        at: int | None = None,
        chunk: int | None = None,
        share: bool = True,
        after: After | None = None,
    ) -> Tensor:
        """Text features of sequences [prefix; embeddings], from word embeddings.

        Args:
            embeddings: [C, n, d_t], without positions.
            eot: [C] slot of the whole sequence (prefix included) that is pooled, on the CPU.
            deep: block l >= 1 -> rows [m, d_t], or [C, m, d_t], that overwrite slots at .. at + m - 1 at the input of
                block l. What lies there is not read.
            prefix: [p, d_t] in front of every class; [G, p, d_t]: G of them, each in front of every class.
            at: first slot that `deep` overwrites; default: the one behind [SOS].
            chunk: sequences that run at a time; those of a training pass are run again in the backward pass.
            share: False takes the plain path even where the prefix could be shared.
            after: (block, tokens) -> tokens, called behind every block: to read hidden states, or to change them (adapters).
                It sees whole sequences: plain path, one chunk.

        Returns:
            [C, d], or [G, C, d].

        Raises:
            InputError: shapes, blocks or slots do not fit, or the sequence is longer than the context.
        """
        tower, deep = self.text_tower, dict(deep or {})
        at = tower.first if at is None else at
        p = 0 if prefix is None else prefix.shape[-2]
        if self.causal:
            embeddings = embeddings[:, : int(eot.max()) + 1 - p]
        classes, n = embeddings.shape[:2]
        self._check_text(n + p, deep, at)
        groups = len(prefix) if prefix is not None and prefix.ndim == 3 else 1
        front = None if prefix is None else prefix.reshape(groups, p, prefix.shape[-1]).to(embeddings)
        shared = share and after is None and front is not None and self.shares_prefix(prefix, deep, at)
        step = classes if chunk is None or after is not None else max(1, chunk // groups)
        # Several chunks read the same keys; a single one runs through the blocks together with the prefix.
        keys = prefix_keys(tower, front, deep, at) if shared and front is not None and step < classes else None

        whole = [*deep.values(), *([] if front is None else [front])]
        inputs = whole if keys is None else [x for pair in keys for x in pair]

        def part(slots: Tensor, rows: Tensor, *given: Tensor) -> Tensor:
            """Features [G, c, d] of c classes, from all tensors that may want gradients."""
            count, rows = len(rows), rows.expand(groups, -1, -1, -1).flatten(0, 1)
            slots = (slots - (p if shared else 0)).repeat(groups).to(rows.device)
            if keys is not None:
                pairs = list(zip(given[::2], given[1::2], strict=True))
                pooled = behind(tower, rows + tower.positions[p : p + n].to(rows), pairs, count, slots)
            elif shared:
                rows = rows + tower.positions[p : p + n].to(rows)
                pooled = together(tower, given[-1], dict(zip(deep, given, strict=False)), at, rows, slots)
            else:
                if front is not None:
                    rows = torch.cat([given[-1][:, None].expand(-1, count, -1, -1).flatten(0, 1), rows], dim=1)
                mine = {l: r.repeat(groups, 1, 1) if r.ndim == 3 else r for l, r in zip(deep, given, strict=False)}
                hidden = self._whole(rows + tower.positions[: n + p].to(rows), mine, at, after)
                pooled = hidden[torch.arange(len(hidden), device=hidden.device), slots]
            return tower.read(pooled).unflatten(0, (groups, count))

        bounds = [(i, min(i + step, classes)) for i in range(0, classes, step)]
        again = torch.is_grad_enabled() and len(bounds) > 1
        # Of a tower that somebody adapts, or that computes with other weights for this call (`call_with`).
        trained = {name: x for name, x in self.named_parameters() if x.requires_grad} if again else {}
        found = []
        for i, j in bounds:
            own = [x[i:j] if x.ndim == 3 and x is not front and keys is None else x for x in inputs]
            run: Callable[..., Tensor] = partial(part, eot[i:j])
            tensors = [embeddings[i:j], *own]
            if trained:
                run = partial(_run_with, self, run, list(trained))
            found.append(_Recomputed.apply(run, *tensors, *trained.values()) if again else run(*tensors))
        features = torch.cat(found, dim=1)
        return features if prefix is not None and prefix.ndim == 3 else features[0]

    def _check_text(self, length: int, deep: Mapping[int, Tensor], at: int) -> None:
        if length > self.context:
            raise InputError(f"the text has {length} slots, the tower {self.context}", remedy="Use a shorter context")
        for block, rows in deep.items():
            if not 1 <= block < self.text_layers or at + rows.shape[-2] > length:
                raise InputError(
                    f"{rows.shape[-2]} deep text prompts at slot {at} of block {block}",
                    remedy=f"Blocks are 1 .. {self.text_layers - 1}, slots 0 .. {length - 1}",
                )
        if len({rows.shape[-2] for rows in deep.values()}) > 1:
            raise InputError("deep text prompts differ in length", remedy="Give every block the same number of rows")

    def _whole(self, hidden: Tensor, deep: Mapping[int, Tensor], at: int, after: After | None) -> Tensor:
        """Last hidden states [b, n, d_t] by the library's own blocks."""
        tokens = Tokens.of(hidden)
        if deep:
            count = next(iter(deep.values())).shape[-2]
            slots = torch.zeros(hidden.shape[1], dtype=torch.bool)
            slots[at : at + count] = True
            tokens = replace(tokens, is_prompt=slots)
        prompts = {block: BlockPrompt(rows, mode="replace") for block, rows in deep.items()}
        return _run(self.text_tower, tokens, prompts, after).hidden

    def encode_text(self, texts: Sequence[str], chunk: int | None = None) -> Tensor:
        """Features [C, d] of texts, without prompts."""
        words = self.tokenise(texts)
        return self.text(self.embed_words(words.ids), words.eot, chunk=chunk)

    # --- images -----------------------------------------------------------------------------------------------------
    def image(
        self,
        pixels: Tensor,
        prompts: Mapping[int, Tensor] | None = None,
        *,
        place: Place = "before-ln-pre",
        after: After | None = None,
    ) -> Tensor:
        """Image features [B, d] of pixels [B, 3, H, W].

        Args:
            pixels: preprocessed images (`preprocessing`).
            prompts: block l -> rows [m, d_v], or [B, m, d_v]. Those of the lowest block are inserted, the others overwrite
                them at the input of block l; what lies there is not read.
            place: where rows enter at block 0. "before-ln-pre": last in the sequence, in front of the first layer norm
                (MaPLe's code); "after-cls": between CLS and the patches, behind it (MVLPT's). A tower without CLS or without
                that norm (SigLIP) does the same without them.
            after: (block, tokens) -> tokens, called behind every block; `pt_core.tokens.real(tokens)` has no prompts in it.

        Raises:
            InputError: shapes or blocks do not fit, or the tower is one that prompts cannot enter.
        """
        if self.image_tower is None and not prompts and after is None:
            model = cast(Any, self.model)
            return cast(Tensor, model.encode_image(pixels.to(next(model.visual.parameters()).dtype)))
        tower, rows = self._images(), dict(prompts or {})
        if pixels.shape[-2:] != (tower.size, tower.size):
            raise InputError(
                f"images are {list(pixels.shape[-2:])}, the model takes {[tower.size, tower.size]}",
                remedy="Use the backbone's own preprocessing",
            )
        tokens = tower.embed(pixels)
        lowest, last = min(rows, default=0), tokens.hidden.shape[1]
        at = last if place == "before-ln-pre" else tower.first
        if 0 in rows and place == "before-ln-pre":
            tokens = insert(tokens, rows.pop(0), at)
        tokens = replace(tokens, hidden=tower.norm(tokens.hidden))
        steps = {
            block: BlockPrompt(row, at=at, mode="insert" if block == lowest else "replace")
            for block, row in rows.items()
        }
        if after is not None or not (tower.at_cls and tower.parts) or self._spread:
            return tower.read(_run(tower, tokens, steps, after))
        final = tower.num_blocks - 1
        tokens = run(tower, tokens, steps, stop=final)
        tokens = steps[final](tokens) if final in steps else tokens
        pooled = last_block(
            tower, tokens.hidden, torch.zeros(len(pixels), dtype=torch.long, device=tokens.hidden.device)
        )
        return tower.read(Tokens.of(pooled[:, None]))

    # --- both -------------------------------------------------------------------------------------------------------
    @property
    def logit_scale(self) -> Tensor:
        """s; similarities are multiplied by exp(s)."""
        return cast(Tensor, self.model.logit_scale)

    def similarity(self, image: Tensor, text: Tensor) -> Tensor:
        """Logits exp(s) norm(f) norm(w)^T (plus SigLIP's bias), [B, C].

        Args:
            image: f, [B, d].
            text: w, [C, d], or [B, C, d] where every image has its own.
        """
        # In float32 whatever the towers compute in: logits are of the order of 100, bfloat16 has steps of 0.5 there.
        with torch.autocast(image.device.type, enabled=False):
            f, w = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
            logits = self.logit_scale.float().exp() * (f @ w.T if w.ndim == 2 else (w @ f[..., None])[..., 0])
            bias = getattr(self.model, "logit_bias", None)
            return logits if bias is None else logits + bias.float()

    def forward(self, pixels: Tensor, words: Words) -> Tensor:
        """Logits [B, C] of images and texts, without prompts: what the model itself computes."""
        return self.similarity(self.image(pixels), self.text(self.embed_words(words.ids), words.eot))

    def call_with(
        self, weights: Mapping[str, Tensor], tower: Literal["image", "text"], *args: Any, **options: Any
    ) -> Tensor:
        """`image` or `text` with other tensors in the place of some of the model's, which stay as they are.

        Args:
            weights: name in `named_parameters()` -> tensor, such as a masked weight; gradients flow to it.
            tower: which of the two is called, with the remaining arguments.
        """
        return cast(Tensor, call_with(self, weights, getattr(self, tower), *args, **options))

    def extra_repr(self) -> str:
        return f"{type(self.model).__name__}, causal={self.causal}, context={self.context}"


def _run_with(encoder: DualEncoder, run: Callable[..., Tensor], names: Sequence[str], *tensors: Tensor) -> Tensor:
    """A function with the last of the tensors in the place of the encoder's weights of these names."""
    given = len(tensors) - len(names)
    weights = dict(zip(names, tensors[given:], strict=True))
    return cast(Tensor, call_with(encoder, weights, run, *tensors[:given]))


class _Recomputed(torch.autograd.Function):
    """Runs a function unrecorded, and again in the backward pass, recorded: only one run's activations are held at a time.

    `torch.utils.checkpoint` keeps the nodes of all runs, small blocks between the large ones that it frees, and glibc (2.36)
    then does not use these again, so that many runs took the memory of all together.
    """

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """`tensors`: all that `run` takes; nothing else that it reads gets a gradient."""
        ctx.run, kind = run, tensors[0].device.type
        ctx.packed = packing.current()
        ctx.cast = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        ctx.save_for_backward(*tensors)
        return run(*tensors)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        wanted = ctx.needs_input_grad[1:]
        arguments = [x.detach().requires_grad_(w) for x, w in zip(ctx.saved_tensors, wanted, strict=True)]
        asked = [x for x, w in zip(arguments, wanted, strict=True) if w]
        with torch.enable_grad(), ctx.cast, ctx.packed:
            made = ctx.run(*arguments)
        found = iter(torch.autograd.grad(made, asked, gradient, allow_unused=True))
        return None, *(next(found) if w else None for w in wanted)


def _run(tower: Any, tokens: Tokens, prompts: Mapping[int, BlockPrompt], after: After | None) -> Tokens:
    if after is None:
        return run(tower, tokens, prompts)
    if outside := [block for block in prompts if not 0 <= block < tower.num_blocks]:
        raise InputError(f"prompts for blocks {outside}", remedy=f"Blocks are 0 .. {tower.num_blocks - 1}")
    for index in range(tower.num_blocks):
        tokens = after(index, run(tower, tokens, prompts, start=index, stop=index + 1))
    return tokens


def load_backbone(
    name: str, revision: str | None = None, dtype: torch.dtype = torch.float32, device: str | None = None
) -> DualEncoder:
    """A dual encoder by name or path.

    Args:
        name: a hub id or folder of a CLIP or SigLIP model; `zoo:mini-clip`, which ships with this package; or
            `open-clip:MODEL/PRETRAINED`, where PRETRAINED is one of open_clip's tags or a weight file (`open-clip:hf-hub:...`
            for its hub models, `open-clip:local-dir:...` for a folder of one); `open-clip:MODEL` has random weights, others
            whenever it is loaded.
        revision: commit or tag on the hub.
        dtype: of the weights.
        device: where to put it.

    Raises:
        InputError: there is no such model, its weights are damaged or not all there, it has no tokenizer, what says how its
            images are prepared cannot be read, or open_clip is not installed.
    """
    if name.startswith("open-clip:"):
        inner = name.removeprefix("open-clip:")
        model, tokeniser = _load_open_clip(inner)
        made = DualEncoder(model.to(dtype=dtype), tokeniser)
        weights = inner if inner.startswith("hf-hub:") else _parts(inner)[1]  # of local-dir: none
        # A path stays on this machine, and no name leads back to random weights.
        made.source = None if not weights or Path(weights).is_file() else name
        return made.to(device or "cpu").eval()
    transformers, place = importlib.import_module("transformers"), name
    if name.startswith("zoo:"):
        place = str(shipped_model(name.removeprefix("zoo:")))
    no_words = InputError(f"{name} holds no tokenizer", remedy="Save it there with processor.save_pretrained")
    if Path(place, "config.json").is_file() and not any(file for kind in TOKENISER for file in Path(place).glob(kind)):
        raise no_words
    try:
        # Shapes that differ are read from the report, which names the tensors.
        options = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, report = transformers.AutoModel.from_pretrained(place, revision=revision, dtype=dtype, **options)
        tokeniser = transformers.AutoTokenizer.from_pretrained(place, revision=revision)
    except SafetensorError as error:
        remedy = "They are damaged or half downloaded: fetch them again"
        raise InputError(f"the weights of {name} cannot be read ({error})", remedy=remedy) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{name} cannot be loaded ({str(error).splitlines()[0]})", remedy="Check the name") from error
    try:
        auto, images = importlib.import_module("transformers.models.auto.image_processing_auto"), None
        if auto.get_image_processor_config(place, revision=revision):  # without one: see `DualEncoder`
            images = auto.AutoImageProcessor.from_pretrained(place, revision=revision)
        elif not Path(place).is_dir():
            file = "preprocessor_config.json"  # a name that the hub was asked for and lacks is remembered as such
            if try_to_load_from_cache(place, file, revision=revision or "main") is None:
                raise OSError(f"{file} is not in the cache, and the hub was not asked")
    except (OSError, ValueError) as error:
        problem = f"how {name} prepares its images cannot be read ({str(error).splitlines()[0]:.200})"
        remedy = "Fetch it again: load the model once with a connection, or give a folder that holds all of it"
        raise InputError(problem, file="preprocessor_config.json", remedy=remedy) from error
    made = DualEncoder(model, SimpleNamespace(tokenizer=tokeniser, image_processor=images))
    wrong = [f"{key} is missing" for key in sorted(report["missing_keys"])]
    wrong += [f"{key} is {list(a)}, not {list(b)}" for key, a, b in sorted(report["mismatched_keys"])]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        remedy = "They are of another model or half downloaded: fetch them again"
        raise InputError(f"the weights of {name} are not those of its configuration: {wrong[0]}{more}", remedy=remedy)
    # Without files of one, transformers makes a tokenizer of special tokens only, to which all texts are the same.
    if len(tokeniser) <= len(set(tokeniser.all_special_ids)):
        raise no_words
    made.source = name if name.startswith("zoo:") else None
    return made.to(device or "cpu").eval()


def shipped_model(name: str) -> Path:
    """Folder of a model that ships with this package.

    Raises:
        InputError: there is none of this name.
    """
    folder = ZOO / name
    if not (folder / "config.json").is_file():
        there = ", ".join(f"zoo:{f.parent.name}" for f in sorted(ZOO.glob("*/config.json"))) or "none"
        raise InputError(f"no model {name!r} ships with pt-vl", field="backbone.name", remedy=f"There are: {there}")
    return folder


def _around(processor: Any) -> tuple[Callable[[str], str], int | None]:
    """What open_clip's wrapper of Hugging Face tokenisers does to a text first, and the token id that it then turns into 0.

    Raises:
        InputError: it does more than that.
    """
    kind = type(processor)
    if not (kind.__module__.startswith("open_clip") and hasattr(processor, "tokenizer")):
        return str, None
    if getattr(processor, "tokenizer_mode", "") or not hasattr(processor, "clean_fn"):
        mode = getattr(processor, "tokenizer_mode", "")
        raise InputError(
            f"open_clip's {kind.__name__}{f' of mode {mode!r}' if mode else ''} is not known",
            remedy="Use a model with open_clip's SimpleTokenizer, or with its HFTokenizer in the default mode",
        )
    return processor.clean_fn, processor.tokenizer.sep_token_id if processor.strip_sep_token else None


def _parts(name: str) -> tuple[str, str]:
    """Model and weights of what follows `open-clip:`. In a place there may be slashes, and it holds its weights itself."""
    model, _, weights = (name, "", "") if name.startswith(PLACES) else name.partition("/")
    return model, weights


def _load_open_clip(name: str) -> tuple[Any, Any]:
    try:
        open_clip = importlib.import_module("open_clip")
    except ImportError as error:
        raise InputError("open_clip is not installed", remedy="Install the extra `open-clip` of pt-vl") from error
    model, weights = _parts(name)
    if not model.startswith(PLACES) and model not in (known := open_clip.list_models()):
        like = ", ".join(get_close_matches(model, known))
        remedy = f"Did you mean {like}?" if like else "See open_clip.list_models()"
        raise InputError(f"open_clip cannot load {name}: it knows no model {model!r}", remedy=remedy)
    try:
        made = open_clip.create_model(model, pretrained=weights or None)
        return made, open_clip.get_tokenizer(model)
    except (RuntimeError, OSError, ValueError, SafetensorError) as error:
        raise InputError(f"open_clip cannot load {name} ({str(error).splitlines()[0]})") from error


# --- prompts in a user's own model -------------------------------------------------------------------------------------
class TowerPrompt(Prompt):
    """Trained rows for the towers of a CLIP or SigLIP model, to be attached to it.

    Args:
        context: [m, d_t], in front of the words of every text (behind [SOS]).
        text: block l >= 1 -> rows [m', d_t] that overwrite the slots behind [SOS] at the input of block l.
        image: block l -> rows [n, d_v], as `DualEncoder.image` takes them.
        place: where image rows of block 0 enter.

    Parameters: the values given.
    """

    def __init__(
        self,
        context: Tensor | None = None,
        text: Mapping[int, Tensor] | None = None,
        image: Mapping[int, Tensor] | None = None,
        place: Place = "before-ln-pre",
    ) -> None:
        super().__init__()
        self.context = None if context is None else nn.Parameter(context.detach().float().clone())
        self.text, self.image = _parameters(text or {}), _parameters(image or {})
        self.place = place

    def rows(self, tower: Literal["text", "image"]) -> dict[int, Tensor]:
        """Rows of a tower by block."""
        return {int(block): rows for block, rows in getattr(self, tower).items()}


def _parameters(rows: Mapping[int, Tensor]) -> nn.ParameterDict:
    return nn.ParameterDict({str(block): nn.Parameter(row.detach().float().clone()) for block, row in rows.items()})


class DualEncoderFamily:
    """How a `TowerPrompt` enters a CLIP or SigLIP model of transformers: outputs speak of real tokens only."""

    name = "dual-encoder"

    def matches(self, backbone: nn.Module) -> bool:
        kinds = {cls.__name__ for cls in type(backbone).__mro__} & {"CLIPModel", "SiglipModel"}
        return bool(kinds) or isinstance(backbone, DualEncoder)  # which is matched to be refused

    def check(self, backbone: nn.Module, prompt: Prompt) -> None:
        if isinstance(backbone, DualEncoder):
            raise InputError(
                "a DualEncoder takes no prompt itself",
                remedy="Attach it to the model inside: attach(backbone.model, prompt)",
            )
        if not isinstance(prompt, TowerPrompt):
            raise InputError(
                f"a {type(prompt).__name__} does not say which tower it is for", remedy="Attach a pt_vl TowerPrompt"
            )
        encoder = DualEncoder(backbone, None)
        text, image = prompt.rows("text"), prompt.rows("image")
        context = [] if prompt.context is None else [prompt.context]
        for tower, wide, layers, rows, blocks in (
            ("text", encoder.text_width, encoder.text_layers, [*context, *text.values()], [b - 1 for b in text]),
            ("image", encoder.image_width, encoder.image_layers, list(image.values()), list(image)),
        ):
            if bad := [list(row.shape) for row in rows if row.ndim != 2 or row.shape[1] != wide]:
                raise InputError(f"{tower} prompts of shape {bad[0]}", remedy=f"The tower takes [m, {wide}]")
            if any(not 0 <= block < layers - (tower == "text") for block in blocks):
                raise InputError(f"{tower} prompts for blocks that are not there", remedy=f"The tower has {layers}")

    def patches(
        self, backbone: nn.Module, selected: Callable[[], Rows | None]
    ) -> list[tuple[nn.Module, Callable[[Forward], Forward]]]:
        encoder = DualEncoder(backbone, None)

        def prompted(
            original: Forward, run: Callable[[TowerPrompt, Any], Any], values: Any, options: dict[str, Any]
        ) -> Any:
            """The outputs of rows of images or texts, each group of rows with the prompt that it carries."""
            handles = selected()
            if handles is None:
                return original(*values, **options)
            if options.pop("return_dict", None) is False:
                return prompted(original, run, values, options).to_tuple()
            asked = [key for key, value in options.items() if value is not None and value is not False]
            if asked:
                raise InputError(
                    f"{', '.join(asked)} does not go with a prompt", remedy="Leave it out, or use off(model)"
                )
            prompts = [None if handle is None else cast(TowerPrompt, handle.prompt) for handle in handles]
            if len(prompts) == 1:
                return original(*values, **options) if prompts[0] is None else run(prompts[0], values)
            count = len(values[0])
            if len(prompts) != count:
                raise InputError(
                    f"{len(prompts)} prompts for {count} rows",
                    remedy="Route images and texts in calls of their own: get_image_features, get_text_features",
                )
            groups: dict[int, list[int]] = {}
            for row, own in enumerate(prompts):
                groups.setdefault(id(own), []).append(row)
            parts = []
            for rows in groups.values():
                own, taken = prompts[rows[0]], [None if value is None else value[rows] for value in values]
                parts.append(original(*taken, **options) if own is None else run(own, taken))
            back = torch.tensor([row for rows in groups.values() for row in rows]).argsort()
            return _pooled(*(torch.cat([part[i] for part in parts])[back.to(parts[0][i].device)] for i in (0, 1)))

        def around_image(original: Forward) -> Forward:
            def run(own: TowerPrompt, values: Any) -> Any:
                (pixel_values,) = values
                if not len(own.image):
                    return original(pixel_values)
                tower, last = cast(HFImage, encoder.image_tower), _Last()
                encoder.image(pixel_values, own.rows("image"), place=own.place, after=last)
                hidden = real(last.tokens)
                if tower.clip:
                    return _pooled(hidden, tower.tower.post_layernorm(hidden[:, 0]))
                hidden = tower.tower.post_layernorm(hidden)
                return _pooled(hidden, tower.project(hidden))

            def forward(pixel_values: Tensor, interpolate_pos_encoding: bool = False, **options: Any) -> Any:
                return prompted(
                    original, run, [pixel_values], {"interpolate_pos_encoding": interpolate_pos_encoding, **options}
                )

            return forward

        def around_text(original: Forward) -> Forward:
            def run(own: TowerPrompt, values: Any) -> Any:
                input_ids, attention_mask = values
                if own.context is None and not len(own.text):
                    return original(input_ids, attention_mask)
                tower, last = cast(HFText, encoder.text_tower), _Last()
                ids, n = input_ids.view(-1, input_ids.shape[-1]), input_ids.shape[-1]
                m = 0 if own.context is None else len(own.context)
                eot = encoder._eot(ids).cpu()
                # Behind the slot that is pooled a causal tower has no use for a mask.
                if attention_mask is not None and bool(
                    (attention_mask.cpu() == 0)[torch.arange(n) <= eot[:, None]].any()
                ):
                    raise InputError(
                        "a mask that leaves tokens out does not go with a prompt",
                        field="attention_mask",
                        remedy="Leave it out, as SigLIP was trained, or use off(model)",
                    )
                # Text is padded to the whole context at times: prompts take the place of padding.
                room = min(n, encoder.context - m)
                if tower.causal and int(eot.max()) >= room:
                    raise InputError(f"a text of {int(eot.max()) + 1} tokens and {m} prompts exceed the context")
                cut, pad = ids[:, room:], tower.tower.config.pad_token_id
                if not tower.causal and cut.numel() and (pad is None or bool((cut != pad).any())):
                    raise InputError(f"a text of more than {room} tokens and {m} prompts exceed the context")
                words = encoder.embed_words(ids[:, :room])
                if own.context is not None:
                    rows = own.context.to(words).expand(len(words), -1, -1)
                    words = torch.cat([words[:, : tower.first], rows, words[:, tower.first :]], dim=1)
                at = eot + m if tower.causal else torch.full_like(eot, room + m - 1)
                encoder.text(words, at, own.rows("text"), after=last)
                hidden = tower.tower.final_layer_norm(last.tokens.hidden)
                pooled = hidden[torch.arange(len(hidden), device=hidden.device), at.to(hidden.device)]
                left = torch.cat([hidden[:, : tower.first], hidden[:, tower.first + m :]], dim=1)
                left = F.pad(left, (0, 0, 0, n - left.shape[1]))  # behind the longest text nothing was computed
                return _pooled(left, pooled if tower.causal else tower.project(pooled))

            def forward(input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
                return prompted(original, run, [input_ids, attention_mask], options)

            return forward

        model = cast(Any, backbone)
        return [(model.vision_model, around_image), (model.text_model, around_text)]


class _Last:
    """The tokens behind the last block of a pass."""

    tokens: Tokens

    def __call__(self, index: int, tokens: Tokens) -> Tokens:
        self.tokens = tokens
        return tokens


def _pooled(hidden: Tensor, pooled: Tensor) -> Any:
    outputs = importlib.import_module("transformers.modeling_outputs")
    return outputs.BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled)


register_family(DualEncoderFamily())
