"""Small random dual encoders of all families, and a tokeniser of words, made in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast, SiglipConfig, SiglipModel

from pt_core.data import Split
from pt_core.testing import one_thread
from pt_vl.backbones import DualEncoder
from pt_vl.method import Stacked

KNOWN = "a photo of the cat dog bird tree red car big house texture . , X type pet one two three satellite"
BODY = ["<pad>", "<unk>", "<two>", *KNOWN.split()]
SOT, EOT = len(BODY), len(BODY) + 1  # the highest ids, as in CLIP's vocabulary
VOCAB = len(BODY) + 2
CONTEXT, SIZE, PATCH = 18, 12, 4
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
IMAGE = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
FAMILIES = ["clip", "clip-legacy", "siglip", "open-clip"]


def tokeniser(family: str = "clip") -> PreTrainedTokenizerFast:
    """Words; [SOS] ... [EOS] for CLIP (padded with EOS, as CLIP's is), ... [EOS] for SigLIP."""
    vocabulary = {word: i for i, word in enumerate([*BODY, "<sot>", "<eot>"])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    single = "$A <eot>" if family == "siglip" else "<sot> $A <eot>"
    made.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<sot>", SOT), ("<eot>", EOT)])
    pad = "<pad>" if family == "siglip" else "<eot>"
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token=pad, eos_token="<eot>", unk_token="<unk>")


def model(family: str = "clip", seed: int = 0, layers: int = 3) -> nn.Module:
    """Three blocks a tower; weights large enough that every token matters."""
    torch.manual_seed(seed)
    text = TEXT | {"vocab_size": VOCAB, "max_position_embeddings": CONTEXT, "num_hidden_layers": layers}
    image = IMAGE | {"image_size": SIZE, "patch_size": PATCH, "num_hidden_layers": layers}
    made: nn.Module
    if family.startswith("clip"):
        end = 2 if family == "clip-legacy" else EOT
        text |= {"eos_token_id": end, "bos_token_id": SOT, "pad_token_id": EOT}
        made = CLIPModel(CLIPConfig(text_config=text, vision_config=image, projection_dim=8))
    elif family == "siglip":
        made = SiglipModel(
            SiglipConfig(text_config=text | {"projection_size": 24, "pad_token_id": 0}, vision_config=image)
        )
    else:
        open_clip = pytest.importorskip(
            "open_clip", reason="open_clip is not installed: the extra `open-clip` of pt-vl"
        )
        vision = {"layers": layers, "width": 24, "head_width": 6, "patch_size": PATCH, "image_size": SIZE}
        words = {"context_length": CONTEXT, "vocab_size": VOCAB, "width": 16, "heads": 4, "layers": layers}
        made = open_clip.CLIP(8, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**words))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2.0)
    return made.requires_grad_(False).eval()


def encoder(family: str = "clip", seed: int = 0, **changes: Any) -> DualEncoder:
    return DualEncoder(model(family, seed, **changes), tokeniser(family)).eval()


@pytest.fixture
def make_model() -> Callable[..., nn.Module]:
    return model


@pytest.fixture
def make_tokeniser() -> Callable[..., PreTrainedTokenizerFast]:
    return tokeniser


@pytest.fixture
def make_encoder() -> Callable[..., DualEncoder]:
    return encoder


@pytest.fixture
def vit_b16() -> DualEncoder:
    """CLIP ViT-B/16 without memory for its weights: counts and start values are those of the published size."""
    text = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
    image = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    with torch.device("meta"):
        made = CLIPModel(CLIPConfig(text_config=text, vision_config=image | {"patch_size": 16}, projection_dim=512))
    assert sum(p.numel() for p in made.parameters()) == 149_620_737
    words = made.text_model.embeddings.token_embedding  # contexts start from its rows: one row stands for all
    words.weight = nn.Parameter(torch.zeros(1, 512).expand(words.num_embeddings, -1))
    known = tokeniser()
    made.text_model.eos_token_id = known.eos_token_id
    return DualEncoder(made, known)


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(7))


CLASSES = ("cat", "big_house", "red car")


def images(rows: int, seed: int = 0, classes: int = 3, fixed: bool = True) -> Split:
    """Noise around one pattern of each class; every class is among the first rows."""
    patterns = torch.randn(classes, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(99))
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, 3, SIZE, SIZE, generator=draw)
    made = [{"pixels": patterns[i % classes] + noise[i], "label": i % classes} for i in range(rows)]
    return Split(made, Stacked(fixed), ("accuracy",), num_classes=classes, ids=[f"image-{i}" for i in range(rows)])


@pytest.fixture
def make_images() -> Callable[..., Split]:
    return images


@pytest.fixture(autouse=True)
def on_one_thread() -> Iterator[None]:
    with one_thread():
        yield
