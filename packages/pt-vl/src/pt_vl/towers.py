"""Towers of dual encoders: one `BlockStack` (pt_core.tokens) for each library and side."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pt_core.errors import InputError
from pt_core.tokens import Tokens, real


class Tower:
    """What all towers have in common. They hold no state of a pass, and no weights: those are the model's."""

    causal: bool = False
    first: int = 0  # slot of the first word or patch: 1 behind [SOS] or CLS
    last: bool = False  # whether text is pooled at the last slot of the whole context
    parts: bool = False  # whether `open_block` and `close_block` know the blocks
    at_cls: bool = False  # whether an image is read at CLS alone

    def prepare(self, tokens: Tokens) -> Any:
        return None

    def cached(self, index: int, cache: Any) -> int:
        return 0

    def finish(self, hidden: Tensor) -> Tensor:
        return hidden


class HFBlocks(Tower):
    """Blocks of a CLIP or SigLIP tower in transformers."""

    def __init__(self, tower: Any) -> None:
        self.tower = tower
        self.layers = tower.encoder.layers
        self.width = int(tower.config.hidden_size)
        self.heads = int(tower.config.num_attention_heads)
        self.check_attention()

    def check_attention(self) -> None:
        """Refuse attention that takes other masks than those that are made here (flex: none at all)."""
        if (kind := self.tower.config._attn_implementation) not in ("sdpa", "eager"):
            raise InputError(
                f"prompts do not go with {kind!r} attention", remedy='Call model.set_attn_implementation("sdpa")'
            )

    @property
    def num_blocks(self) -> int:
        return len(self.layers)

    @property
    def parts(self) -> bool:  # type: ignore[override]
        """Whether the parts make up the block: they have no dropout of attention, which a model that is trained may have."""
        return not any(layer.self_attn.training and layer.self_attn.dropout for layer in self.layers)

    def block(self, index: int, hidden: Tensor, context: Any, cache: Any) -> Tensor:
        options = {"is_causal": True} if self.causal else {}
        return cast(Tensor, self.layers[index](hidden, context, **options))

    def open_block(self, index: int, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of a block, [b, heads, n, d / heads] each."""
        layer = self.layers[index]
        x, a = layer.layer_norm1(hidden), layer.self_attn
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (a.q_proj, a.k_proj, a.v_proj))
        return q, k, v

    def close_block(self, index: int, hidden: Tensor, attended: Tensor) -> Tensor:
        """What a block adds to [b, n, d], given its attention's output [b, n, d]."""
        layer = self.layers[index]
        hidden = hidden + layer.self_attn.out_proj(attended)
        return cast(Tensor, hidden + layer.mlp(layer.layer_norm2(hidden)))


class HFText(HFBlocks):
    """CLIP: causal, pooled at EOT, projected. SigLIP: bidirectional, pooled at the last slot, then its head."""

    def __init__(self, model: Any, causal: bool) -> None:
        super().__init__(model.text_model)
        self.causal, self.first, self.last = causal, int(causal), not causal
        self.project = model.text_projection if causal else model.text_model.head
        self.context = int(self.tower.config.max_position_embeddings)
        self.words = self.tower.embeddings.token_embedding

    @property
    def positions(self) -> Tensor:
        return cast(Tensor, self.tower.embeddings.position_embedding.weight)

    def prepare(self, tokens: Tokens) -> Tensor | None:
        self.check_attention()  # the model may have changed since
        if not self.causal or self.tower.config._attn_implementation == "sdpa":
            return None
        n, hidden = tokens.hidden.shape[1], tokens.hidden
        return hidden.new_full((n, n), torch.finfo(hidden.dtype).min).triu(1)[None, None]

    def read(self, pooled: Tensor) -> Tensor:
        """Features [b, d] of the pooled slots [b, d_t]."""
        return cast(Tensor, self.project(self.tower.final_layer_norm(pooled)))


class HFImage(HFBlocks):
    """CLIP: CLS, ln_pre, read at CLS. SigLIP: patches only, read by its attention head, which sees no prompt."""

    def __init__(self, model: Any, clip: bool) -> None:
        super().__init__(model.vision_model)
        self.clip, self.first, self.at_cls = clip, int(clip), clip
        if not clip and not model.vision_model.use_head:
            raise InputError("the image tower has no pooling head", remedy="Use a model with vision_use_head")
        self.project = model.visual_projection if clip else model.vision_model.head
        self.size = int(self.tower.config.image_size)

    def embed(self, pixels: Tensor) -> Tokens:
        """What comes before ln_pre, [B, n, d_v]."""
        return Tokens.of(self.tower.embeddings(pixels))

    def norm(self, hidden: Tensor) -> Tensor:
        return cast(Tensor, self.tower.pre_layrnorm(hidden)) if self.clip else hidden

    def read(self, tokens: Tokens) -> Tensor:
        """Features [B, d]."""
        if self.clip:
            return cast(Tensor, self.project(self.tower.post_layernorm(tokens.hidden[:, 0])))
        return cast(Tensor, self.project(self.tower.post_layernorm(real(tokens))))


class OpenClipBlocks(Tower):
    """Blocks of an open_clip transformer."""

    def __init__(self, transformer: Any) -> None:
        self.transformer = transformer
        self.blocks = transformer.resblocks
        self.width = int(transformer.width)
        self.parts = all(type(b).__name__ == "ResidualAttentionBlock" for b in self.blocks)

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    def block(self, index: int, hidden: Tensor, context: Any, cache: Any) -> Tensor:
        if self.transformer.batch_first:
            return cast(Tensor, self.blocks[index](hidden, attn_mask=context))
        return cast(Tensor, self.blocks[index](hidden.transpose(0, 1), attn_mask=context).transpose(0, 1))

    def open_block(self, index: int, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        block = self.blocks[index]
        projected = F.linear(block.ln_1(hidden), block.attn.in_proj_weight, block.attn.in_proj_bias)
        q, k, v = projected.unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def close_block(self, index: int, hidden: Tensor, attended: Tensor) -> Tensor:
        block = self.blocks[index]
        hidden = hidden + block.ls_1(block.attn.out_proj(attended))
        return cast(Tensor, hidden + block.ls_2(block.mlp(block.ln_2(hidden))))


class OpenClipText(OpenClipBlocks):
    """Words [b, n, d_t]; the slot pooled (the highest id, the end's or the last), [b, d_t] -> features [b, d]."""

    def __init__(self, model: Any) -> None:
        self.tower = getattr(model, "text", model)
        if getattr(self.tower, "cls_emb", None) is not None or getattr(self.tower, "use_pad_mask", False):
            raise InputError("text towers with a CLS token or a padding mask are not known", remedy="Use a CLIP model")
        if not hasattr(self.tower, "token_embedding"):
            raise InputError(f"no prompts for a text tower of {type(self.tower).__name__}", remedy="Use a CLIP model")
        super().__init__(self.tower.transformer)
        self.pooling = str(getattr(self.tower, "text_pool_type", None) or getattr(self.tower, "pool_type", "argmax"))
        if self.pooling not in ("argmax", "eos", "last"):
            raise InputError(f"text pooled by {self.pooling!r} is not known", remedy="Use a CLIP model")
        self.causal = self.tower.attn_mask is not None
        self.last = self.pooling == "last"
        self.first = int(not self.last)
        self.context = int(self.tower.context_length)
        self.words = self.tower.token_embedding

    @property
    def positions(self) -> Tensor:
        return cast(Tensor, self.tower.positional_embedding)

    def prepare(self, tokens: Tokens) -> Tensor | None:
        n = tokens.hidden.shape[1]
        return self.tower.attn_mask[:n, :n].to(tokens.hidden) if self.causal else None

    def read(self, pooled: Tensor) -> Tensor:
        pooled, weight = self.tower.ln_final(pooled), self.tower.text_projection
        if weight is None:
            return cast(Tensor, pooled)
        return cast(Tensor, weight(pooled) if isinstance(weight, nn.Module) else pooled @ weight)


class OpenClipImage(OpenClipBlocks):
    """Pixels [B, 3, H, W] -> CLS and patches [B, n, d_v], ln_pre, pooled as the model says -> features [B, d]."""

    first = 1

    def __init__(self, visual: Any) -> None:
        super().__init__(visual.transformer)
        self.visual, self.at_cls = visual, visual.attn_pool is None and visual.pool_type == "tok"
        self.size = int(visual.image_size[0])

    def embed(self, pixels: Tensor) -> Tokens:
        v = self.visual
        x = v.conv1(pixels.to(v.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        x = torch.cat([v.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        return Tokens.of(x + v.positional_embedding.to(x.dtype))

    def norm(self, hidden: Tensor) -> Tensor:
        return cast(Tensor, self.visual.ln_pre(hidden))

    def read(self, tokens: Tokens) -> Tensor:
        pooled, _ = self.visual._pool(real(tokens))
        return cast(Tensor, pooled if self.visual.proj is None else pooled @ self.visual.proj)


class OpenClipSettings:
    """What an open_clip model computes beside its weights, read from its parts: it carries no configuration of its own."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def to_dict(self) -> dict[str, Any]:
        """Part by part, its kind (of the activations, too), and its heads, epsilon, strides and pooling, where it has them."""
        known = [
            *("num_heads", "eps", "approximate", "stride", "padding", "image_size", "context_length"),
            *("pool_type", "text_pool_type", "final_ln_after_pool", "pad_id", "eos_id", "text_eos_id"),
        ]
        parts = {}
        for name, part in self.model.named_modules():
            values = {key: getattr(part, key) for key in known if hasattr(part, key)}
            values["causal"] = True if getattr(part, "attn_mask", None) is not None else None
            kind = type(part).__name__.removesuffix("Fp32")  # norms of a model that was made in another dtype
            parts[name] = {"kind": kind} | values
        return parts
