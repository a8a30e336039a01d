"""The mini-clip and its icons: small, loadable without a network, and as good as the card says."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, CLIPProcessor

import pt_vl.backbones
from pt_vl.backbones import load_backbone

ZOO = Path(pt_vl.backbones.__file__).parent / "zoo"
CLIP, ICONS = ZOO / "mini-clip", ZOO / "icons"
BUILDER = Path(__file__).parents[3] / "tooling" / "zoo" / "mini_clip.py"


@pytest.fixture(scope="module")
def clip() -> CLIPModel:
    return CLIPModel.from_pretrained(CLIP, local_files_only=True).eval()


@pytest.fixture(scope="module")
def processor() -> CLIPProcessor:
    return CLIPProcessor.from_pretrained(CLIP, local_files_only=True)


@pytest.fixture(scope="module")
def about() -> dict[str, Any]:
    return json.loads((ICONS / "icons.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def table(about: dict[str, Any]) -> dict[str, list[Any]]:
    return about["images"]


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    file = load_file(ICONS / "icons.safetensors")
    data, ends = file["png"].numpy().tobytes(), file["ends"].tolist()
    parts = [data[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    return [Image.open(io.BytesIO(part)).convert("RGB") for part in parts]


@pytest.fixture(scope="module")
def features(clip: CLIPModel, processor: CLIPProcessor, images: list[Image.Image]) -> torch.Tensor:
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return torch.cat([clip.get_image_features(pixel_values=part).pooler_output for part in pixels.split(250)])


@pytest.fixture(scope="module")
def builder() -> Any:
    pytest.importorskip("typer")
    if not BUILDER.is_file():
        pytest.skip("the builder is in the repository, not in the package")
    spec = importlib.util.spec_from_file_location("zoo_mini_clip", BUILDER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def on_card(question: str) -> tuple[int, int, float, float, float]:
    """(images, ways, top-1, top-5, chance) of a row of the card's table."""
    card = (CLIP / "README.md").read_text("utf-8")
    row = re.search(rf"^\| {re.escape(question)} \|(.+)\|$", card, re.M)
    assert row is not None, question
    images, ways, *scores = (cell.strip().replace(",", "") for cell in row[1].split("|"))
    return int(images), int(ways), *map(float, scores)  # type: ignore[return-value]


def measured(
    clip: CLIPModel, processor: CLIPProcessor, features: torch.Tensor, rows: list[int], labels: list[str]
) -> tuple[int, int, float, float, float]:
    names = sorted({labels[i] for i in rows})
    sentences = [f"an icon of a {name}." for name in names]
    tokens = processor.tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        text = clip.get_text_features(**tokens).pooler_output
    similarity = torch.nn.functional.normalize(features[rows], dim=1) @ torch.nn.functional.normalize(text, dim=1).T
    hit = similarity.topk(5, 1).indices == torch.tensor([[names.index(labels[i])] for i in rows])
    return len(rows), len(names), hit[:, 0].float().mean().item(), hit.any(1).float().mean().item(), 1 / len(names)


def test_the_mini_clip_is_at_most_7_mb_and_has_its_card(clip: CLIPModel) -> None:
    assert sum(p.numel() for p in clip.parameters()) == 2_952_193
    assert sum(file.stat().st_size for file in CLIP.iterdir()) <= 7e6
    with safe_open(CLIP / "model.safetensors", "pt") as file:
        assert all(file.get_slice(key).get_dtype() == "F16" for key in file.keys() if "ids" not in key)  # noqa: SIM118
    assert clip.dtype == torch.float32
    card = (CLIP / "README.md").read_text("utf-8")
    for word in ("tooling/zoo/mini_clip.py", "Apache-2.0", "held-out", "chance", "CC-BY-4.0", "2,952,193"):
        assert word in card


def test_the_icons_are_at_most_4_mb_and_every_set_has_its_licence(about: dict[str, Any]) -> None:
    assert sum(file.stat().st_size for file in ICONS.iterdir()) <= 4e6
    assert set(about["images"]["set"]) == set(about["sets"])
    assert {info["licence"] for info in about["sets"].values()} <= {
        "MIT",
        "ISC",
        "Apache-2.0",
        "CC0-1.0",
        "CC-BY-3.0",
        "CC-BY-4.0",
    }
    card = (ICONS / "README.md").read_text("utf-8")
    assert all(f"(`{name}`), {info['author']}, {info['licence']}" in card for name, info in about["sets"].items())


def test_the_end_token_has_the_highest_id_so_that_both_ways_of_pooling_agree(clip: CLIPModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(CLIP, local_files_only=True)
    assert len(tokenizer) == clip.config.text_config.vocab_size
    assert tokenizer.eos_token_id == clip.config.text_config.eos_token_id == len(tokenizer) - 1
    ids = tokenizer(["An icon of a dog.", "zürich"], padding=True, return_tensors="pt")["input_ids"]
    first = (ids == tokenizer.eos_token_id).int().argmax(1)
    assert torch.equal(ids.argmax(1), first)
    assert tokenizer.decode(ids[1], skip_special_tokens=True).strip() == "zürich"


def test_sixteen_context_words_and_every_class_name_fit_into_the_text_tower(about: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(CLIP, local_files_only=True)
    assert all(len(tokenizer(f"{'X ' * 16}{name}.")["input_ids"]) <= 32 for name in about["classes"])


def test_pt_vl_reads_it_as_transformers_does(
    clip: CLIPModel, images: list[Image.Image], features: torch.Tensor, processor: CLIPProcessor
) -> None:
    backbone = load_backbone(str(CLIP))
    pixels = torch.stack([backbone.preprocessing(image) for image in images[:8]])
    words = backbone.tokenise(["an icon of a dog.", "an icon of a sea animal."])
    tokens = processor.tokenizer(["an icon of a dog.", "an icon of a sea animal."], padding=True, return_tensors="pt")
    with torch.no_grad():
        image = torch.nn.functional.normalize(backbone.image(pixels), dim=1)
        text = torch.nn.functional.normalize(backbone.text(backbone.embed_words(words.ids), words.eot), dim=1)
        plain = torch.nn.functional.normalize(clip.get_text_features(**tokens).pooler_output, dim=1)
    assert torch.allclose(image, torch.nn.functional.normalize(features[:8], dim=1), atol=1e-5)
    assert torch.allclose(text, plain, atol=1e-5)


def test_test_images_are_balanced_and_training_suffices_for_16_shots_and_4_for_validation(
    about: dict[str, Any], table: dict[str, list[Any]], images: list[Image.Image]
) -> None:
    assert {len(column) for column in table.values()} == {len(images)}
    assert {image.size for image in images} == {(48, 48)}
    counts = Counter(zip(table["class"], table["split"], strict=True))
    assert {counts[name, "test"] for name in about["classes"]} == {20}
    assert min(counts[name, "train"] for name in about["classes"]) >= 20
    groups = {c: g for c, g, s in zip(table["class"], table["group"], table["split"], strict=True) if s}
    assert len(about["groups"]) >= 6
    assert min(Counter(groups.values()).values()) >= 5
    emoji = Counter(
        c
        for c, s, d in zip(table["class"], table["split"], table["domain"], strict=True)
        if s == "train" and d == "emoji"
    )
    assert sum(n >= 4 for n in emoji.values()) >= 60


@pytest.mark.parametrize("column", ["split", "concept_split"])
def test_no_drawing_is_in_both_splits(column: str, table: dict[str, list[Any]], images: list[Image.Image]) -> None:
    pairs = set(zip(table["concept"], table["set"], table[column], strict=True))
    assert len(pairs) == len(images)
    drawings = {(concept, name.removesuffix("-monotone"), split) for concept, name, split in pairs}
    assert not any((concept, name, "test") in drawings for concept, name, split in drawings if split == "train")
    tested = {
        np.asarray(image).tobytes() for image, split in zip(images, table[column], strict=True) if split == "test"
    }
    trained = {
        np.asarray(image).tobytes() for image, split in zip(images, table[column], strict=True) if split == "train"
    }
    assert not tested & trained, "icon sets copy from each other: a drawing counts once"


@pytest.mark.parametrize(
    "question",
    [
        *("concepts", "concepts 1 to 20", "concepts 21 to 40", "concepts 41 to 60"),
        *("classes", "groups", "unseen concepts", "domain game", "task transport"),
    ],
)
def test_the_card_says_what_is_measured(
    question: str, clip: CLIPModel, processor: CLIPProcessor, features: torch.Tensor, table: dict[str, list[Any]]
) -> None:
    kind, _, value = question.partition(" ")
    field = {"groups": "group", "concepts": "concept"}.get(kind, "class")
    column = "concept_split" if kind == "concepts" else "split"
    rows = [i for i, split in enumerate(table[column]) if split == "test"]
    if kind == "concepts" and value:
        first, last = (int(number) for number in value.split(" to "))
        few = sorted({table["concept"][i] for i in rows})[first - 1 : last]
        rows = [i for i in rows if table["concept"][i] in few]
    elif kind == "unseen":
        rows = [i for i in rows if table["unseen"][i]]
    elif value:
        rows = [i for i in rows if table[{"task": "group"}.get(kind, kind)][i] == value]
    found = measured(clip, processor, features, rows, table[field])
    expected = on_card(f"shipped: {question}")
    assert found[:2] == expected[:2]
    assert found[2:] == pytest.approx(expected[2:], abs=0.004)


def test_zero_shot_is_far_above_chance_on_vendors_and_concepts_that_it_has_not_seen() -> None:
    for question, times in (("groups", 3), ("classes", 15), ("unseen concepts", 15), ("task transport", 3)):
        _, _, top1, _, chance = on_card(f"shipped: {question}")
        assert top1 > times * chance, question
    for first in (1, 21, 41):
        _, ways, top1, *_ = on_card(f"shipped: concepts {first} to {first + 19}")
        assert ways == 20 and top1 > 0.6


def test_sets_that_were_trained_on_though_a_held_out_vendor_drew_them_are_named(about: dict[str, Any]) -> None:
    card = (CLIP / "README.md").read_text("utf-8")
    trained = re.findall(r"^- .+ \(`(.+)`\), (.+), .+$", card, re.M)
    assert len(trained) == 150
    vendors = {info["author"] for info in about["sets"].values()}
    named = re.findall(r"`(.+?)`", card.partition("- **vendors**")[2].partition("- **concepts**")[0])
    assert {name for name, author in trained if author in vendors} == {"lucide-lab", "memory"} == set(named)


def test_held_out_vendors_and_concepts_are_those_of_the_icons(builder: Any, about: dict[str, Any]) -> None:
    assert {name for names in builder.HELD_OUT.values() for name in names} == set(about["sets"])
    assert all(builder.UNUSED.match(copy) for copy in ("fa6-solid", "la", "emojione-v1", "fa-regular"))
    concepts = builder.lexicon()
    unseen = builder.hold_out([])
    assert len(unseen) == pytest.approx(len(concepts) / 7, rel=0.15)
    table = about["images"]
    assert all((c in unseen) <= flag for c, flag in zip(table["concept"], table["unseen"], strict=True))


def written_icons(folder: Path, sets: dict[str, tuple[str, list[str]]]) -> None:
    """Icon sets as npm's @iconify/json has them: licence and names of each."""
    (folder / "json").mkdir(parents=True)
    known = {name: {"license": {"spdx": licence}} for name, (licence, _) in sets.items()}
    (folder / "collections.json").write_text(json.dumps(known))
    for name, (_, icons) in sets.items():
        data = {"prefix": name, "icons": {icon: {"body": ""} for icon in icons}}
        (folder / "json" / f"{name}.json").write_text(json.dumps(data))


def test_no_icon_of_a_held_out_vendor_or_concept_is_trained_on(builder: Any, tmp_path: Path) -> None:
    assert "cat" in builder.hold_out([]) and "dog" not in builder.hold_out([])
    icons = ["cat", "cat-filled", "dog", "dog-outline", "cats", "unheard-of"]
    sets = {name: ("MIT", icons) for name in ("some-icons", "tabler", "fa6-solid", "noto")}
    written_icons(tmp_path, sets | {"closed": ("GPL-3.0", icons)})
    rows, _ = builder.read_icons(tmp_path)
    assert {row["set"]: row["domain"] for row in rows} == {"some-icons": None, "tabler": "outline", "noto": None}
    kept = sorted(builder.wanted(rows, builder.hold_out(rows)), key=lambda row: bool(row["domain"]))  # as drawings lie
    named = {name: sorted(row["caption"] for row in kept if row["set"] == name) for name in ("some-icons", "noto")}
    assert named == {"some-icons": ["cats", "dog", "dog"], "noto": ["cats", "dog", "dog", "unheard of"]}
    assert sorted(row["caption"] for row in kept if row["set"] == "tabler") == ["cat", "cats", "dog"]

    (tmp_path / "rows.json").write_text(json.dumps(kept))
    np.save(tmp_path / "images.npy", np.arange(len(kept), dtype=np.uint8)[:, None, None, None].repeat(64, 1))
    batches = builder.Batches(tmp_path, len(kept) - 3, 0)
    assert batches.rows == [row for row in kept if row["set"] != "tabler"]
    drawn = []
    batches.paint = lambda images, *_: drawn.extend(images[:, 0, 0, 0].tolist())
    _, texts, _ = batches(0)
    assert {kept[i]["set"] for i in drawn} == {"some-icons", "noto"} and len(texts) == len(drawn) == 7


def test_a_name_is_near_to_its_plural_its_spellings_and_its_synonyms(builder: Any) -> None:
    unseen = {"cat", "hot dog", "hippopotamus", "tired face", "moose", "dice one", "dice 1"}
    trained = ["cats", "cat face", "hotdog", "hippo", "face tired", "caterpillar", "dogs", "dice 1", "cat"]
    assert builder.near_names(unseen, trained) == {
        "cat": ["cat face", "cats"],
        "hippopotamus": ["hippo"],
        "hot dog": ["hotdog"],
        "tired face": ["face tired"],
    }
    held, known = builder.hold_out([]), builder.lexicon()
    for name, others in builder.SYNONYMS.items():
        assert name in held and set(others.split(", ")) <= known.keys() - held, name


def test_the_cards_say_how_many_unseen_concepts_have_near_names(
    builder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    builder.print_near_names(tmp_path)
    *lines, counts, classes = capsys.readouterr().out.splitlines()
    assert "hippopotamus: hippo" in lines and "cat: cat face" in lines and "moose" not in "".join(lines)
    found = re.fullmatch(rf"{len(lines)} of (309) unseen concepts, (\d+) of the (230) in zoo/icons", counts)
    assert found is not None
    card = " ".join((CLIP / "README.md").read_text("utf-8").split())
    assert f"by the lexicon alone it is {len(lines)} of its {found[1]}" in card
    assert f"{len(classes.split(','))} are names of classes as well" in card and ": ball, bird, " in classes
    card = " ".join((ICONS / "README.md").read_text("utf-8").split())
    assert f"Of the {found[3]} unseen concepts" in card and f"({found[2]} by its lexicon alone" in card


def test_near_names_are_those_of_the_captions_that_were_rendered(
    builder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written_icons(tmp_path / "package", {"some-icons": ("MIT", ["cat"])})
    rows = [{"caption": "cats", "domain": None}, {"caption": "hot dogs", "domain": "emoji"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    builder.print_near_names(tmp_path)
    assert capsys.readouterr().out.startswith("cat: cats\n1 of 309 unseen concepts, ")


def test_a_killed_training_goes_on_to_the_same_bits(
    builder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}

    def small(tokenizer: Any) -> CLIPModel:
        text = tower | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
        return CLIPModel(CLIPConfig(text_config=text, vision_config=tower | {"image_size": 48, "patch_size": 12}))

    class Killed(BaseException):
        pass

    def run(folder: Path, killed_after: int | None = None) -> dict[str, torch.Tensor]:
        def saved(*given: Any) -> None:
            save(*given)
            if given[-1] == killed_after:
                raise Killed

        monkeypatch.setattr(builder, "save_checkpoint", saved)
        with pytest.raises(Killed) if killed_after else contextlib.nullcontext():
            builder.train(folder, steps=3, batch=4, rate=1e-2, seed=1, threads=1)
        return load_file(folder / "checkpoint.safetensors")

    save, clock = builder.save_checkpoint, itertools.count(0, 200)  # every step takes more than the 3 minutes
    monkeypatch.setattr(builder, "new_model", small)
    monkeypatch.setattr(builder, "time", SimpleNamespace(time=lambda: float(next(clock))))
    draw = np.random.default_rng(0)
    row = {"class": "pet", "group": "animal", "category": "", "style": "outline", "mono": True, "set": "noto"}
    rows = [row | {"caption": f"thing {i}", "domain": None, "unseen": False} for i in range(6)]
    rows += [row | {"caption": f"other {i}", "domain": "emoji", "unseen": i > 1} for i in range(4)]
    for name in ("whole", "killed"):
        shutil.copytree(CLIP, tmp_path / name / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors"))
        (tmp_path / name / "rows.json").write_text(json.dumps(rows))
    images = draw.integers(0, 256, (len(rows), 64, 64, 4), np.uint8)
    np.save(tmp_path / "whole" / "images.npy", images)
    np.save(tmp_path / "killed" / "images.npy", images)

    whole, half = run(tmp_path / "whole"), run(tmp_path / "killed", killed_after=2)
    assert int(half["loop/step"]) == 2 and int(whole["loop/step"]) == 3
    again = run(tmp_path / "killed")
    assert again.keys() == whole.keys() and {key.partition("/")[0] for key in whole} == {
        *("model", "average", "optimizer", "loop")
    }
    assert all(torch.equal(again[key], whole[key]) for key in whole)
    assert not torch.equal(half["model/logit_scale"], whole["model/logit_scale"])


@pytest.mark.parametrize(
    ("icon", "words"),
    [
        ("account-box-outline", "account box"),
        ("add-24-filled", "add"),
        ("traffic-light", "traffic light"),
        ("light-bulb", "light bulb"),
        ("cat-bold-duotone", "cat"),
        ("outline-home", "home"),
        ("line", "line"),
    ],
)
def test_captions_lose_size_weight_and_fill(builder: Any, icon: str, words: str) -> None:
    assert builder.caption(icon) == words


def test_a_text_is_positive_for_every_image_that_it_describes(builder: Any) -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 3.0]])
    describes = torch.tensor([[True, False, True], [False, True, False], [True, False, True]])
    rows = -logits.log_softmax(1)
    columns = -logits.T.log_softmax(1)
    by_hand = sum(
        ((d[0, 0] + d[0, 2]) / 2 + d[1, 1] + (d[2, 0] + d[2, 2]) / 2) / 3 for d in (rows, columns)
    ) / 2  # fmt: skip
    assert builder.multi_positive_loss(logits, describes).item() == pytest.approx(by_hand.item(), rel=1e-6)
    own = builder.multi_positive_loss(logits, torch.eye(3, dtype=torch.bool))
    target = torch.arange(3)
    cross = torch.nn.functional.cross_entropy
    assert own.item() == pytest.approx(((cross(logits, target) + cross(logits.T, target)) / 2).item(), rel=1e-6)
