"""Builder of the mini-clip: a CLIPModel of 3 million parameters that knows icons, and the icons that test it.

    RUN="uv run --no-sync --with resvg-py==0.5.0 python tooling/zoo/mini_clip.py"
    $RUN fetch                      npm @iconify/json 2.2.535 (104 MB), once
    $RUN render                     captions, hold-outs, 64-pixel arrays, tokenizer
    $RUN near-names                 held-out concepts that are trained on under another name
    $RUN train --steps 3000         resumes from its checkpoint; more steps extend a finished run
    $RUN evaluate                   held-out vendors and concepts
    $RUN export                     weights, tokenizer and evaluation set into packages/pt-vl/src/pt_vl/zoo

Data: icon sets under MIT, ISC, BSD, Apache-2.0, CC0, Unlicense or CC-BY, without logos. An icon's name is its caption; names of
classes come from the lexicon below. What is held out is fixed before anything is drawn:

- vendors: every set of `HELD_OUT`, and further sets of the vendors behind it (but not `lucide-lab` and `memory`, by those of
  `lucide` and `mdi`, which are trained on). All evaluation images come from these sets, which fall into six domains (styles).
  Training drawings that are nearly pixel-equal to an evaluation drawing are dropped as well:
  icon sets copy from each other.
- concepts: about one lexicon concept in seven, and 100 emoji names outside of the lexicon, are taken out of every set, by
  their names alone: a plural or a synonym stays in.

The lexicon has groups (data sets: animals, food, ...), classes (bird, fish, ...) and concepts (owl, duck, ...). In training an
icon is captioned by its concept, sometimes by its class or group. So class names are known from other vendors' drawings,
as the class names of the usual benchmarks are known to CLIP.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import math
import os
import random
import re
import subprocess
import tarfile
import time
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizerFast

from pt_core.files import write
from pt_vl.icons import shipped

PACKAGE, SHA256 = "@iconify/json@2.2.535", "1a545f86fa224d6531d8fb101dcbe83aac2b28689a21cbed6fc68318a5af4d91"
LICENCES = ("MIT", "ISC", "BSD-3-Clause", "Apache-2.0", "CC0-1.0", "Unlicense", "CC-BY-4.0", "CC-BY-3.0")
ZOO = Path(__file__).resolve().parents[2] / "packages/pt-vl/src/pt_vl/zoo"
STORED, SIZE, PATCH, CONTEXT, VOCABULARY = 64, 48, 12, 32, 3000
START, END = "<|startoftext|>", "<|endoftext|>"

# Domain -> its sets, all held out of training; and sets that are unused: further ones of the same vendors (`lucide-lab` and
# `memory` are overlooked, and trained on), their copies, flags, animations.
HELD_OUT = {
    "emoji": ["twemoji", "emojione"],
    "silhouette": ["emojione-monotone"],
    "outline": ["tabler", "ph", "lucide", "hugeicons"],
    "solid": ["fa7-solid", "bi", "mdi"],
    "game": ["game-icons"],
    "map": ["pinhead", "maki", "temaki", "roentgen"],
}
UNUSED = re.compile(r"emojione|fa\d?-|la$|fa$|circle-flags|flag$|flagpack|cif|svg-spinners|ginetex|covid")
EMOJI = (
    "noto",
    "noto-v1",
    "fluent-emoji-flat",
    "fluent-emoji",
    "fluent-emoji-high-contrast",
    "fxemoji",
    "streamline-emojis",
)

WORDS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
# Held-out concept -> names of the lexicon for the same thing, as far as `spellings` does not bring them together
SYNONYMS = dict(entry.split(": ") for entry in " ".join(WORDS.pop("synonyms").split()).split("; "))
# group -> class -> concepts, by the names that icon sets use
LEXICON = {group: {name: concepts.split() for name, concepts in classes.items()} for group, classes in WORDS.items()}

MARKS = (
    "outline|outlined|filled|fill|rounded|round|sharp|twotone|two-tone|line|linear|bold|thin|light|duotone|solid|regular|"
    "broken|baseline|color|bulk|alt|rtl|ltr|tone|small|big|low-profile|16|20|24|28|32|48|64"
)
STYLES = {
    "filled": {"fill", "filled", "solid", "bold"},
    "outline": {"outline", "outlined", "line", "linear", "thin", "light"},
    "duotone": {"duotone", "twotone", "two-tone", "bulk"},
}
COLOURS = {
    "black": (20, 20, 20),
    "red": (205, 35, 40),
    "orange": (240, 130, 20),
    "yellow": (235, 200, 30),
    "green": (40, 150, 65),
    "blue": (35, 85, 200),
    "purple": (125, 50, 165),
    "pink": (235, 110, 170),
    "brown": (120, 75, 40),
    "grey": (125, 125, 125),
}
# {n}: the noun; {s}: style; {c}: colour; {g}: the set's own category. Of an icon that lacks one, templates[1] is said.
SHORT = [
    "{n}",
    "a {n}",
    "{n}.",
    "an icon of a {n}.",
    "a photo of a {n}.",
    "a picture of a {n}.",
    "a drawing of a {n}.",
    "a {s} icon of a {n}.",
    "{s} {n}",
    "a {c} {n}",
    "a {c} icon of a {n}.",
    "a small {n}",
    "the {n}",
    "{n} icon",
]
LONG = [  # so that the later positions of the context are trained
    "an icon in {s} style that shows a {n}, one of many in the category {g}.",
    "this is a small picture of a {n} on a plain background.",
    "a {c} icon on a plain background, it shows a {n} and nothing else.",
    "{g}: a {n}, drawn as a simple {s} icon.",
    "one small and simple drawing, made for a web page or an app, of a {n}.",
]

app = typer.Typer(no_args_is_help=True, add_completion=False)
WORK = typer.Option(Path("runs/mini-clip"), help="folder of what is fetched, rendered and trained")


def caption(icon: str) -> str:
    """Name of an icon without size, weight and fill, as words."""
    words = re.sub("^(baseline|outline|round|sharp|twotone)-", "", icon.lower())
    mark = re.compile(rf"(?<!traffic)(?<!street)-({MARKS})$")
    while mark.search(words):
        words = mark.sub("", words)
    return words.replace("-", " ")


def rank(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)


def lexicon() -> dict[str, tuple[str, str]]:
    """concept -> (class, group); plurals and singulars of a concept count as the concept's own names."""
    return {
        concept.replace("_", " "): (name, group)
        for group, classes in LEXICON.items()
        for name, concepts in classes.items()
        for concept in concepts
    }


def vendor(prefix: str) -> str:
    """Sets of one vendor repeat its drawings."""
    return re.sub(
        r"^(streamline|icon-park|material-symbols|noto|fluent-emoji|heroicons|pepicons|glyphs|at|bx).*", r"\1", prefix
    )


def read_icons(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row of each usable icon (set, icon, caption, class, group, category, style, mono, domain), and the sets.

    class and group are None outside of the lexicon; domain is None unless the set is held out.
    """
    sets = {k: v for k, v in json.loads((folder / "collections.json").read_text()).items()
            if v["license"].get("spdx") in LICENCES and v.get("category") not in ("Logos", "Programming")}  # fmt: skip
    domains = {name: domain for domain, names in HELD_OUT.items() for name in names}
    known, rows = lexicon(), []
    for prefix in sets:
        if UNUSED.match(prefix) and prefix not in domains:
            continue
        data = json.loads((folder / "json" / f"{prefix}.json").read_text())
        category = {icon: name for name, icons in data.get("categories", {}).items() for icon in icons}
        seen: Counter[str] = Counter()
        unlike = {"outline": "fill|bold|solid|duotone", "solid": "outline|line", None: " "}.get(
            domains.get(prefix), " "
        )
        for icon in sorted(data["icons"], key=lambda icon: (bool(re.search(unlike, icon)), rank(icon))):
            name = caption(icon)
            skip = "skin-tone" in icon or icon.startswith("flag-") or data["icons"][icon].get("hidden")
            # one drawing of a concept per vendor is evaluated; two weights of one drawing are trained on
            if skip or not re.search("[a-z]{2}", name) or seen[name] >= (1 if prefix in domains else 2):
                continue
            seen[name] += 1
            words = set(icon.split("-"))
            style = (
                "emoji"
                if prefix in (*EMOJI, *HELD_OUT["emoji"])
                else next((s for s, w in STYLES.items() if w & words), None)
            )
            tidy = (
                re.sub(r"([a-z])([A-Z])", r"\1 \2", category.get(icon, ""))
                .replace("&", "and")
                .replace("/", "or")
                .lower()
            )
            kind = (
                known.get(name)
                or known.get(name.removesuffix("s"))
                or known.get(name + "s")
                or known.get(name.removesuffix(" face"))
                or (None, None)
            )
            rows.append({"set": prefix, "icon": icon, "caption": name, "class": kind[0], "group": kind[1], "category": tidy,
                         "style": style, "mono": not sets[prefix].get("palette"), "domain": domains.get(prefix)})  # fmt: skip
    return rows, sets


def hold_out(rows: list[dict[str, Any]]) -> set[str]:
    """Captions that no training image has: one lexicon concept in seven by hash, and 100 other emoji of 4 and more sets."""
    emoji = defaultdict(set)
    for row in rows:
        if row["set"] in (*EMOJI, *HELD_OUT["emoji"]):
            emoji[row["caption"]].add(row["set"])
    others = [name for name, sets in emoji.items() if len(sets) >= 4 and name not in lexicon()]
    return {name for name in lexicon() if rank(f"concept {name}") % 7 == 0} | set(sorted(others, key=rank)[:100])


def spellings(name: str) -> set[str]:
    """What a name has in common with its plural, its words spaced or ordered in another way, and `<name> face`."""
    words = [word.removesuffix("s") for word in name.split() if word != "face"] or [name]
    return {"".join(words), " ".join(sorted(words))}


def near_names(unseen: set[str], trained: Iterable[str]) -> dict[str, list[str]]:
    """Of the unseen names that have any: names trained on that say the same, other spellings of it and `SYNONYMS`."""
    seen, known = set(trained) - unseen, defaultdict[str, set[str]](set)
    for name in seen:
        for spelling in spellings(name):
            known[spelling].add(name)
    near = {name: seen.intersection(SYNONYMS.get(name, "").split(", ")) for name in unseen}
    near = {name: own.union(*(known[spelling] for spelling in spellings(name))) for name, own in near.items()}
    return {name: sorted(near[name]) for name in sorted(near) if near[name]}


def wanted(rows: list[dict[str, Any]], unseen: set[str]) -> list[dict[str, Any]]:
    """The rows to draw: those of held-out sets to evaluate on, of the others those to train on, none with an unseen name.

    Names that three vendors use name something that can be learnt; emoji names are standardised.
    """
    vendors = defaultdict(set)
    for row in rows:
        if not row["domain"]:
            vendors[row["caption"]].add(vendor(row["set"]))

    def chosen(row: dict[str, Any]) -> bool:
        name, known = row["caption"], len(vendors[row["caption"]])
        if row["domain"]:
            return bool(row["class"]) or (row["set"] in HELD_OUT["emoji"] and known > 1)
        return name not in unseen and (known >= 3 or row["set"] in EMOJI or bool(row["class"]))

    return [row for row in rows if chosen(row)]


def draw(icon: dict[str, Any], data: dict[str, Any], size: int) -> np.ndarray:
    """RGBA (size, size, 4) uint8; `currentColor` is black."""
    import resvg_py

    box = [
        icon.get(key, data.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    ]
    body = icon["body"].replace("currentColor", "#000")
    head = (
        f'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{size}" height="{size}"'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=f'<svg {head} viewBox="{" ".join(map(str, box))}">{body}</svg>'))
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    return np.asarray(image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BICUBIC))


@app.command()
def fetch(work: Path = WORK) -> None:
    """Download the icon sets (npm) and unpack them; nothing of the package runs."""
    work.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        ["npm", "pack", PACKAGE, "--ignore-scripts", "--pack-destination", str(work)],
        check=True,
        stdout=subprocess.PIPE,
    )
    (tarball,) = work.glob("iconify-json-*.tgz")
    if hashlib.sha256(tarball.read_bytes()).hexdigest() != SHA256:
        raise SystemExit(f"{tarball} is not {PACKAGE}: remove it and fetch again")
    with tarfile.open(tarball) as tar:
        tar.extractall(work, filter="data")


@app.command("near-names")
def print_near_names(work: Path = WORK) -> None:
    """Unseen concepts with near names that are trained on: by the captions that were rendered, else by the lexicon alone."""
    rendered = work / "rows.json"
    rows = read_icons(work / "package")[0] if rendered.exists() else []
    kept = json.loads(rendered.read_text()) if rendered.exists() else []
    unseen = hold_out(rows)
    near = near_names(unseen, {row["caption"] for row in kept if not row["domain"]} or lexicon())
    for name, others in near.items():
        print(f"{name}: {', '.join(others)}")
    table = json.loads((ZOO / "icons/icons.json").read_text("utf-8"))["images"]
    in_zoo = {name for name, flag in zip(table["concept"], table["unseen"], strict=True) if flag}
    said = unseen & {name for known in lexicon().values() for name in known}
    print(
        f"{len(near)} of {len(unseen)} unseen concepts, {len(in_zoo & near.keys())} of the {len(in_zoo)} in zoo/icons"
    )
    print(f"names of classes as well: {', '.join(sorted(said))}")


@app.command()
def render(work: Path = WORK) -> None:
    """Choose captions and hold-outs, draw the icons, drop copies of evaluation drawings, train the tokenizer."""
    rows, _ = read_icons(work / "package")
    unseen = hold_out(rows)
    rows = wanted(rows, unseen)
    print(len(rows), "icons", len({row["caption"] for row in rows}), "captions", flush=True)
    images = np.lib.format.open_memmap(work / "all.npy", "w+", np.uint8, (len(rows), STORED, STORED, 4))
    small = np.zeros((len(rows), 16, 16), np.float32)
    data: dict[str, Any] = {}
    good, start = [], time.time()
    for i, row in enumerate(rows):
        if data.get("prefix") != row["set"]:
            data = json.loads((work / "package/json" / f"{row['set']}.json").read_text())
        with contextlib.suppress(Exception):  # a drawing that the renderer refuses is left out
            images[i] = draw(data["icons"][row["icon"]], data, STORED)
            small[i] = (
                (images[i, ..., 3] / 255 * (1 - images[i, ..., :3].mean(-1) / 400)).reshape(16, 4, 16, 4).mean((1, 3))
            )
            if small[i].mean() > 0.01:
                good.append(i)
    print(f"drawn {len(good)} in {time.time() - start:.0f} s", flush=True)
    held = np.array([i for i in good if rows[i]["domain"]])
    train = np.array([i for i in good if not rows[i]["domain"]])
    copies = near(small[train].reshape(len(train), -1), small[held].reshape(len(held), -1))
    print("training drawings dropped as copies of evaluation drawings:", int(copies.sum()), flush=True)
    keep = np.concatenate([train[~copies], held])
    np.save(work / "images.npy", images[keep])
    (work / "all.npy").unlink()
    kept = [rows[i] | {"unseen": rows[i]["caption"] in unseen} for i in keep]
    write(work / "rows.json", json.dumps(kept))
    train_tokenizer([row["caption"] for row in kept if not row["domain"]], work / "tokenizer")


def near(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Whether a query (n, d) is within 12 % of its own norm of some key (m, d): the same drawing, up to smoothing."""
    squares, found = (keys**2).sum(1), []
    for start in range(0, len(queries), 2000):
        block = queries[start : start + 2000]
        norm = (block**2).sum(1)
        distance = norm[:, None] - 2 * block @ keys.T + squares
        found.append(distance.min(1) < 0.12**2 * norm)
    return np.concatenate(found)


def train_tokenizer(captions: list[str], folder: Path) -> None:
    """Byte-level BPE in CLIP's form; the end token has the highest id, as pooling by argmax expects."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False, use_regex=True)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    nouns = [f"{name} {group}" for name, group in lexicon().values()]
    frame = [*SHORT, *LONG, *COLOURS, *STYLES] * 50
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 258, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator([*captions, *nouns, *frame], trainer)
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(a + "</w>" for a in alphabet), *("".join(merge) for merge in merges)]
    tokens = [*dict.fromkeys(tokens), START, END]
    CLIPTokenizerFast(
        vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=CONTEXT,
        bos_token=START, eos_token=END, unk_token=END, pad_token=END,
    ).save_pretrained(folder)  # fmt: skip


def new_model(tokenizer: CLIPTokenizerFast) -> CLIPModel:
    tower = {"num_hidden_layers": 4, "hidden_act": "gelu", "projection_dim": 128}
    text = {"vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 2,
            "max_position_embeddings": CONTEXT, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    vision = {
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_attention_heads": 3,
        "image_size": SIZE,
        "patch_size": PATCH,
    }
    return CLIPModel(CLIPConfig(text_config=text | tower, vision_config=vision | tower, projection_dim=128))


class Batches:
    """Batches of (pixels, texts, which texts describe which images), each drawn from (seed, step): exact resume.

    An image has a caption, and in the lexicon a class and a group as well; a text names one of them, sometimes a style or the
    colour that the icon was given. Text j describes image i when all that it says holds for i, so that several texts
    describe an image (Khosla et al., Supervised Contrastive Learning, eq. 2) and no other "cat" counts as a negative.
    """

    def __init__(self, work: Path, size: int, seed: int) -> None:
        rows = json.loads((work / "rows.json").read_text())
        self.rows = [row for row in rows if not row["domain"]]
        self.images = np.load(work / "images.npy", mmap_mode="r")
        self.size, self.seed = size, seed
        counts = Counter(row["caption"] for row in self.rows)
        # Names that hundreds of icons share are drawn less often, lexicon icons more.
        weight = np.array([counts[row["caption"]] ** -0.3 * (4 if row["class"] else 1) for row in self.rows])
        self.weight = weight / weight.sum()
        self.colours = torch.tensor(list(COLOURS.values()), dtype=torch.float32)

    def __call__(self, step: int) -> tuple[Tensor, list[str], Tensor]:
        chance = np.random.default_rng((self.seed, step))
        torch_chance = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        drawn = sorted(chance.choice(len(self.rows), self.size, replace=False, p=self.weight))
        rows = [self.rows[i] for i in drawn]
        mono = torch.tensor([row["mono"] for row in rows])
        colour = torch.from_numpy(
            np.where(chance.random(self.size) < 0.5, 0, chance.integers(len(COLOURS), size=self.size))
        )
        pixels = self.paint(torch.from_numpy(self.images[drawn]), mono, colour, torch_chance)
        named = [list(COLOURS)[c] if m else None for c, m in zip(colour.tolist(), mono.tolist(), strict=True)]
        long = chance.random() < 0.15
        said = [self.say(row, c, LONG if long else SHORT, chance) for row, c in zip(rows, named, strict=True)]
        labels = [(row["caption"], row["class"], row["group"]) for row in rows]
        describes = torch.tensor([
            [noun in names and style in (None, row["style"]) and shade in (None, c) for _, noun, style, shade in said]
            for names, row, c in zip(labels, rows, named, strict=True)])  # fmt: skip
        return pixels, [text for text, *_ in said], describes

    @staticmethod
    def say(
        row: dict[str, Any], colour: str | None, templates: list[str], chance: np.random.Generator
    ) -> tuple[str, str, Any, Any]:
        noun = row["caption"]
        if row["class"] and (dice := chance.random()) < 0.4:
            noun = row["group"] if dice < 0.06 else row["class"]
        known = {"s": row["style"], "c": colour, "g": row["category"] or None}
        template = templates[chance.integers(len(templates))]
        if any(f"{{{key}}}" in template and not value for key, value in known.items()):
            template = templates[1]
        text = template.format(n=noun, **known)
        text = re.sub(r"\ba (?=[aeio])", "an ", text)
        return text, noun, *(known[key] if f"{{{key}}}" in template else None for key in ("s", "c"))

    def paint(self, images: Tensor, mono: Tensor, colour: Tensor, chance: torch.Generator) -> Tensor:
        """(n, 3, SIZE, SIZE) in [-1, 1]: moved, scaled, turned a little, on white or a tint; one-colour icons in `colour`."""
        n = len(images)

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return torch.rand(n, *shape, generator=chance) * (high - low) + low

        images = images.permute(0, 3, 1, 2).float()
        alpha = images[:, 3:] / 255
        shade = (self.colours[colour] + uniform(-20, 20, 3)).clamp(0, 255)[:, :, None, None]
        premultiplied = alpha * torch.where(mono[:, None, None, None], shade, images[:, :3])
        angle, scale, stretch = uniform(-0.2, 0.2), uniform(0.85, 1.25), uniform(0.9, 1.1)
        move = uniform(-0.12, 0.12, 2)
        cos, sin = angle.cos() * scale, angle.sin() * scale
        theta = torch.stack(
            [torch.stack([cos * stretch, -sin, move[:, 0]], 1), torch.stack([sin, cos / stretch, move[:, 1]], 1)], 1
        )
        grid = F.affine_grid(theta, [n, 4, SIZE, SIZE], align_corners=False)
        moved = F.grid_sample(torch.cat([premultiplied, alpha], 1), grid, align_corners=False)
        tint = torch.where(uniform(0, 1, 1) < 0.7, 255.0, uniform(190, 255, 3))[:, :, None, None]
        return ((moved[:, :3] + (1 - moved[:, 3:]) * tint) / 127.5 - 1).clamp(-1, 1)


def embed(features: Any) -> Tensor:
    return F.normalize(features.pooler_output, dim=-1)


def multi_positive_loss(logits: Tensor, describes: Tensor) -> Tensor:
    """Mean over both directions of -sum_j p_ij log softmax(logits)_ij with p uniform over what describes i."""
    losses = []
    for scores, positive in ((logits, describes), (logits.T, describes.T)):
        target = positive.float() / positive.sum(1, keepdim=True)
        losses.append(-(target * scores.log_softmax(1)).sum(1).mean())
    return sum(losses) / 2


@app.command()
def train(
    work: Path = WORK, steps: int = 3000, batch: int = 256, rate: float = 1e-3, seed: int = 0, threads: int = 1
) -> None:
    """Contrastive training from the last checkpoint (each 3 minutes) to `steps`, where a cosine takes the rate to zero."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizerFast.from_pretrained(work / "tokenizer")
    model, batches = new_model(tokenizer), Batches(work, batch, seed)
    torch.nn.init.constant_(model.logit_scale, math.log(1 / 0.07))
    average = copy.deepcopy(model).requires_grad_(False)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
                                  lr=rate, betas=(0.9, 0.98))  # fmt: skip
    step = load_checkpoint(work / "checkpoint.safetensors", model, average, optimizer)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(batches.rows)} images, from step {step}",
        flush=True,
    )
    saved = start = time.time()
    first, losses = step, []
    while step < steps:
        pixels, texts, describes = batches(step)
        tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        image = embed(model.get_image_features(pixel_values=pixels))
        text = embed(
            model.get_text_features(input_ids=tokens["input_ids"])
        )  # causal, pooled at the first end token: no mask
        loss = multi_positive_loss(model.logit_scale.exp() * image @ text.T, describes)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
            for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
                slow.lerp_(fast, max(0.005, 1 / (step + 1)))
        losses.append(loss.item())
        if step % 50 == 0:
            speed = (step - first) * batch / (time.time() - start)
            print(
                f"step {step} loss {np.mean(losses[-50:]):.3f} {speed:.0f} images/s {time.time() - start:.0f} s",
                flush=True,
            )
        if step == steps or time.time() - saved > 180:
            saved = time.time()
            save_checkpoint(work / "checkpoint.safetensors", model, average, optimizer, step)
            scores = accuracy(average, tokenizer, work, limit=600)
            print(json.dumps({"step": step} | {k: v["top1"] for k, v in scores.items()}), flush=True)


def save_checkpoint(
    path: Path, model: CLIPModel, average: CLIPModel, optimizer: torch.optim.Optimizer, step: int
) -> None:
    moments = {f"{i}.{k}": v for i, state in optimizer.state_dict()["state"].items() for k, v in state.items()}
    parts = {
        "model": model.state_dict(),
        "average": average.state_dict(),
        "optimizer": moments,
        "loop": {"step": torch.tensor(step)},
    }
    tensors = {f"{part}/{k}": v.contiguous().clone() for part, values in parts.items() for k, v in values.items()}
    save_file(tensors, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def load_checkpoint(path: Path, model: CLIPModel, average: CLIPModel, optimizer: torch.optim.Optimizer) -> int:
    if not path.exists():
        return 0
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in load_file(path).items():
        part, _, name = key.partition("/")
        parts[part][name] = value
    model.load_state_dict(parts["model"])
    average.load_state_dict(parts["average"])
    state: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for name, value in parts["optimizer"].items():
        state[int(name.split(".")[0])][name.split(".")[1]] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": dict(state)})
    return int(parts["loop"]["step"])


def on_white(images: np.ndarray) -> Tensor:
    """RGBA (n, 64, 64, 4) -> uint8 (n, 3, SIZE, SIZE) on white."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()
    pixels = pixels[:, :3] * (pixels[:, 3:] / 255) + 255 - pixels[:, 3:]
    return (
        F.interpolate(pixels, size=(SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
        .round()
        .to(torch.uint8)
    )


@torch.no_grad()
def zero_shot(
    model: CLIPModel, tokenizer: Any, pixels: Tensor, labels: list[str], template: str = "an icon of a {}."
) -> dict[str, Any]:
    """top-1 and top-5 of uint8 pixels (n, 3, SIZE, SIZE) over the labels' own names."""
    names = sorted(set(labels))
    tokens = tokenizer([template.format(name) for name in names], padding=True, truncation=True, return_tensors="pt")
    text = embed(model.get_text_features(input_ids=tokens["input_ids"]))
    image = torch.cat(
        [embed(model.get_image_features(pixel_values=part.float() / 127.5 - 1)) for part in pixels.split(250)]
    )
    best = (image @ text.T).topk(min(5, len(names)), 1).indices
    hit = best == torch.tensor([names.index(label) for label in labels])[:, None]
    return {"top1": round(hit[:, 0].float().mean().item(), 4), "top5": round(hit.any(1).float().mean().item(), 4),
            "ways": len(names), "chance": round(1 / len(names), 4), "images": len(labels)}  # fmt: skip


def accuracy(model: CLIPModel, tokenizer: Any, work: Path, limit: int | None = None) -> dict[str, dict[str, Any]]:
    """Zero-shot accuracy on all icons of held-out vendors: names, then groups and classes of the lexicon."""
    rows = json.loads((work / "rows.json").read_text())
    images = np.load(work / "images.npy", mmap_mode="r")
    held = [i for i, row in enumerate(rows) if row["domain"]]
    emoji = [i for i in held if rows[i]["domain"] == "emoji"]
    known = [i for i in held if rows[i]["class"]]
    seen = [i for i in known if not rows[i]["unseen"]]
    captions = {row["caption"] for row in rows if not row["domain"]}
    near = near_names({row["caption"] for row in rows if row["unseen"]}, captions)
    questions: dict[str, tuple[str, list[int]]] = {
        "emoji by name": ("caption", [i for i in emoji if not rows[i]["unseen"]]),
        "groups": ("group", seen),
        "classes": ("class", seen),
    }
    for question, field, asked in (("emoji by name", "caption", emoji), ("classes", "class", known)):
        unseen = [i for i in asked if rows[i]["unseen"]]
        alone = [i for i in unseen if rows[i]["caption"] not in near]
        questions |= {f"{question}, unseen concepts": (field, unseen)}
        questions |= {f"{question}, unseen concepts without a near name": (field, alone)}
    result = {}
    for question, (field, indices) in questions.items():
        if limit and len(indices) > limit:
            indices = sorted(random.Random(0).sample(indices, limit))
        result[question] = zero_shot(model, tokenizer, on_white(images[indices]), [rows[i][field] for i in indices])
    return result


def finished(work: Path) -> tuple[CLIPModel, CLIPTokenizerFast, int]:
    """The averaged model of the last checkpoint, rounded to float16 as it is shipped, in float32; tokenizer; step."""
    tokenizer = CLIPTokenizerFast.from_pretrained(work / "tokenizer")
    model = new_model(tokenizer)
    tensors = load_file(work / "checkpoint.safetensors")
    average = {key.removeprefix("average/"): value for key, value in tensors.items() if key.startswith("average/")}
    model.load_state_dict(average)
    return model.half().float().eval(), tokenizer, int(tensors["loop/step"])


@app.command()
def evaluate(work: Path = WORK) -> None:
    """Zero-shot accuracy on held-out icons, all and those that are shipped: of the checkpoint, else of the shipped weights."""
    torch.set_num_threads(1)
    if (work / "checkpoint.safetensors").exists():
        model, tokenizer, step = finished(work)
        print(f"the checkpoint of step {step}", flush=True)
    else:
        model = CLIPModel.from_pretrained(ZOO / "mini-clip").float().eval()
        tokenizer = CLIPTokenizerFast.from_pretrained(ZOO / "mini-clip")
        print("the shipped weights", flush=True)
    result = accuracy(model, tokenizer, work)
    if (ZOO / "icons").is_dir():
        result |= on_shipped(model, tokenizer, *read_shipped())
    write(work / "evaluation.json", json.dumps(result, indent=1))
    print(results(result))


# --- what is shipped --------------------------------------------------------------------------------------------------
TEST, LEAST, MOST = 20, 20, 36  # images of a class: to test on; to train on, at least and at most
POOL, VENDORS = 5, 9  # drawings of a concept to train on; vendors that have to draw it


def choose(rows: list[dict[str, Any]], images: np.ndarray) -> list[tuple[int, str]]:
    """(row, split) of the evaluation set: of each class exactly TEST test images and LEAST to MOST for training.

    Both splits go round the domains; a drawing that the two emojione sets share stays in one split, and of drawings that come
    out as one picture only the first counts. Training takes 16 emoji first, so that few-shot training on the emoji alone
    (domain generalisation) is possible in most classes.
    """
    chosen = []
    classes = defaultdict(list)
    seen: set[bytes] = set()
    for i, row in enumerate(rows):
        if row["domain"] and row["class"] and (picture := png(on_white(images[i : i + 1])[0])) not in seen:
            seen.add(picture)
            classes[row["class"]].append(i)
    for name in sorted(classes):
        units = defaultdict(list)
        for i in classes[name]:
            units[rows[i]["caption"], re.sub("-monotone", "", rows[i]["set"])].append(i)
        queues = {domain: [] for domain in HELD_OUT}
        for unit in sorted(units, key=lambda unit: rank(" ".join(unit))):
            queues[rows[units[unit][0]]["domain"]].append(units[unit])
        test = take(queues, TEST)
        train = take({"emoji": queues["emoji"]}, 16)
        train += take(queues, MOST - len(train))
        if len(test) == TEST and len(train) >= LEAST:
            chosen += [(i, "test") for i in test] + [(i, "train") for i in train]
        else:
            print("left out of the evaluation set:", name, len(train), len(test), flush=True)
    return chosen


def choose_concepts(rows: list[dict[str, Any]], images: np.ndarray) -> dict[int, str]:
    """row -> split of the concepts that `VENDORS` held-out sets and more have drawn: POOL drawings to train on, all others to
    test on. Every vendor's drawing is in one split; the two emojione sets count as one, and equal pictures as well."""
    units: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i, row in enumerate(rows):
        if row["domain"]:
            units[row["caption"]][re.sub("-monotone", "", row["set"])].append(i)
    chosen, seen = dict[int, str](), set[bytes]()
    for name, vendors in sorted(units.items()):
        fresh: dict[str, list[int]] = {}
        for vendor in sorted(vendors, key=lambda vendor: rank(f"{name} {vendor}")):
            pictures = {i: png(on_white(images[i : i + 1])[0]) for i in vendors[vendor]}
            if not seen & set(pictures.values()):
                seen |= set(pictures.values())
                fresh[vendor] = list(pictures)
        if len(fresh) >= VENDORS:
            for number, own in enumerate(fresh.values()):
                chosen |= dict.fromkeys(own[:1] if number < POOL else own, "train" if number < POOL else "test")
    return chosen


def take(queues: dict[str, list[list[int]]], most: int) -> list[int]:
    """Up to `most` rows, a unit of each queue in turn; what is taken leaves its queue."""
    taken: list[int] = []
    while any(queues.values()):
        before = len(taken)
        for queue in queues.values():
            if queue and len(taken) + len(queue[0]) <= most:
                taken += queue.pop(0)
        if len(taken) == before:
            break
    return taken


def png(image: Tensor) -> bytes:
    """uint8 (3, SIZE, SIZE) as a PNG of at most 16 greys or 48 colours."""
    pixels = image.permute(1, 2, 0).numpy()
    grey = bool((pixels.max(-1) - pixels.min(-1)).max() == 0)
    picture = Image.fromarray(pixels).quantize(16 if grey else 48, dither=Image.Dither.NONE)
    file = io.BytesIO()
    picture.save(file, "png", optimize=True)
    return file.getvalue()


def read_shipped() -> tuple[Tensor, dict[str, list[Any]]]:
    """uint8 (n, 3, SIZE, SIZE), and columns class, group, concept, domain, set, split, unseen."""
    about, pngs = shipped()
    images = np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in pngs])
    return torch.from_numpy(images).permute(0, 3, 1, 2), about["images"]


def on_shipped(
    model: CLIPModel, tokenizer: Any, pixels: Tensor, table: dict[str, list[Any]]
) -> dict[str, dict[str, Any]]:
    """Zero-shot accuracy on the test images of the evaluation set: all classes, by domain, unseen, by group (task)."""
    test = [i for i, split in enumerate(table["split"]) if split == "test"]
    questions: dict[str, tuple[str, list[int]]] = {"groups": ("group", test), "classes": ("class", test)}
    questions["unseen concepts"] = ("class", [i for i in test if table["unseen"][i]])
    drawn = [i for i, split in enumerate(table["concept_split"]) if split == "test"]
    names = sorted({table["concept"][i] for i in drawn})
    questions["concepts"] = ("concept", drawn)
    for part in range(0, len(names) - 19, 20):
        few = set(names[part : part + 20])
        questions[f"concepts {part + 1} to {part + 20}"] = ("concept", [i for i in drawn if table["concept"][i] in few])
    questions |= {f"domain {d}": ("class", [i for i in test if table["domain"][i] == d]) for d in HELD_OUT}
    questions |= {f"task {g}": ("class", [i for i in test if table["group"][i] == g]) for g in LEXICON}
    return {
        f"shipped: {question}": zero_shot(model, tokenizer, pixels[rows], [table[field][i] for i in rows])
        for question, (field, rows) in questions.items()
    }


@app.command()
def export(work: Path = WORK) -> None:
    """Write weights, tokenizer, image processor, evaluation set and cards into the package."""
    torch.set_num_threads(1)
    rows = json.loads((work / "rows.json").read_text())
    sets = json.loads((work / "package/collections.json").read_text())
    images = np.load(work / "images.npy", mmap_mode="r")
    model, tokenizer, _ = finished(work)
    clip, icons = ZOO / "mini-clip", ZOO / "icons"
    for folder in (clip, icons):
        folder.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(clip)
    config = json.loads((clip / "config.json").read_text())
    write(
        clip / "config.json", json.dumps(config | {"dtype": "float32"}, indent=2) + "\n"
    )  # float16 on disk, not in use
    model.float()
    tokenizer.save_pretrained(clip)
    side = {"height": SIZE, "width": SIZE}
    CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size=side, resample=3, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(clip)

    by_class, by_concept = dict(choose(rows, images)), choose_concepts(rows, images)
    names = [(name, group) for group, classes in LEXICON.items() for name in classes]
    order = {name: i for i, (name, _) in enumerate(names)}
    chosen = sorted(
        {*by_class, *by_concept},
        key=lambda i: (order.get(rows[i]["class"], len(order)), rows[i]["caption"], by_class.get(i, ""), i),
    )
    pngs = [png(image) for image in on_white(images[chosen])]
    packed = {
        "png": torch.frombuffer(bytearray(b"".join(pngs)), dtype=torch.uint8),
        "ends": torch.tensor(np.cumsum([len(part) for part in pngs])),
    }
    save_file(packed, icons / "icons.safetensors")
    columns = {
        "class": "class",
        "group": "group",
        "concept": "caption",
        "domain": "domain",
        "set": "set",
        "unseen": "unseen",
    }
    table = {column: [rows[i][field] for i in chosen] for column, field in columns.items()}
    table["split"] = [by_class.get(i, "") for i in chosen]
    table["concept_split"] = [by_concept.get(i, "") for i in chosen]
    used = sorted(set(table["set"]))
    written = {
        "source": f"npm {PACKAGE}",
        "size": SIZE,
        "classes": [name for name, _ in names if name in {rows[i]["class"] for i in by_class}],
        "concepts": sorted({rows[i]["caption"] for i in by_concept}),
        "groups": list(LEXICON),
        "domains": list(HELD_OUT),
        "sets": {
            name: {"author": sets[name]["author"]["name"], "licence": sets[name]["license"]["spdx"]} for name in used
        },
        "images": table,
    }
    write(icons / "icons.json", json.dumps(written, separators=(",", ":")) + "\n")
    scores = accuracy(model, tokenizer, work) | on_shipped(model, tokenizer, *read_shipped())
    write(work / "evaluation.json", json.dumps(scores, indent=1))
    trained = {row["set"] for row in rows} - set(used)
    fill("mini-clip.md", clip / "README.md", {"results": results(scores), "sets": credits(sets, trained)})
    fill("icons.md", icons / "README.md", {"sets": credits(sets, used)})
    for file in (clip / "model.safetensors", icons / "icons.safetensors"):
        file.chmod(0o644)  # safetensors writes for the owner alone
    size = sum(file.stat().st_size for folder in (clip, icons) for file in folder.iterdir())
    print(
        f"{len(chosen)} evaluation images of {len(written['classes'])} classes; {size / 1e6:.1f} MB in all", flush=True
    )


def results(scores: dict[str, dict[str, Any]]) -> str:
    head = "| question | images | ways | top-1 | top-5 | chance |\n|---|---|---|---|---|---|\n"
    rows = (
        (question, *(score[key] for key in ("images", "ways", "top1", "top5", "chance")))
        for question, score in scores.items()
    )
    return head + "\n".join(
        f"| {q} | {n:,} | {ways} | {top1:.3f} | {top5:.3f} | {chance:.4f} |" for q, n, ways, top1, top5, chance in rows
    )


def credits(sets: dict[str, Any], names: Iterable[str]) -> str:
    """Set, author, licence: what CC-BY asks for."""
    made = (
        f"{sets[n]['name']} (`{n}`), {sets[n]['author']['name']}, {sets[n]['license']['spdx']}" for n in sorted(names)
    )
    return "\n".join(f"- {text}" for text in made)


def fill(card: str, target: Path, parts: dict[str, str]) -> None:
    """Write a card of `cards/`, with what stands between `<!-- NAME -->` and `<!-- end -->` replaced."""
    text = (Path(__file__).parent / "cards" / card).read_text("utf-8")
    for name, part in parts.items():
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(?=<!-- end -->)",
            lambda found, part=part: found[1] + part + "\n",
            text,
            flags=re.S,
        )
    write(target, text)


if __name__ == "__main__":
    app()
