"""The icons that ship with this package: real drawings, openly licensed, that the mini-clip has not been trained on.

48 x 48 pixels, in two data sets. `concept`: what nine vendors and more have drawn (envelope, key, ...), four shots and one to
validate on; what a drawing shows is learnt from other vendors' drawings of the same. `class`: 76 broad classes (bird, drink,
...) in 11 groups and 6 domains (styles), sixteen shots and four; whoever has seen an owl is asked about a dodo. See
`zoo/icons/README.md` for what they are, who drew them and under which licences.

    task = IconChoice().task(load_backbone("zoo:mini-clip"), shots=4)
    task = IconChoice(level="class", groups=("animal",)).task(backbone, shots=16)
    source, target = (IconChoice(level="class", domains=(name,)) for name in ("emoji", "outline"))
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from safetensors.torch import load_file

from pt_core.errors import InputError
from pt_core.settings import Settings
from pt_vl.backbones import ZOO, DualEncoder
from pt_vl.data import ImageTask, Listed

Group = Literal[
    "animal", "food", "transport", "weather", "nature", "sport", "media", "face", "household", "place", "office"
]
Domain = Literal["emoji", "silhouette", "outline", "solid", "game", "map"]


@cache
def shipped() -> tuple[dict[str, Any], list[bytes]]:
    """`icons.json`, and the PNG file of each of its images.

    Raises:
        InputError: the icons are not there.
    """
    folder = ZOO / "icons"
    if not (folder / "icons.json").is_file():
        raise InputError("the icons are not there", file=folder, remedy="Install pt-vl again")
    file = load_file(folder / "icons.safetensors")
    data, ends = file["png"].numpy().tobytes(), file["ends"].tolist()
    pngs = [data[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    return json.loads((folder / "icons.json").read_text("utf-8")), pngs


class IconChoice(Settings):
    """Which icons: of one level, and of some groups, styles (domains) or classes. Classes keep the order of the whole."""

    level: Literal["concept", "class"] = Field("concept", description="what is a class")
    groups: tuple[Group, ...] | None = Field(None, description="default: all eleven")
    domains: tuple[Domain, ...] | None = Field(None, description="default: all six")
    classes: tuple[str, ...] | None = Field(
        None, description="default: all of the level that have both training and test images of the groups and domains"
    )
    train: bool = Field(True, description="False: test images only, for a target that nothing is trained on")

    def listed(self) -> tuple[dict[str, Listed], list[str]]:
        """Images by split, and the class names.

        Raises:
            InputError: a class is unknown, or nothing is left.
        """
        about, pngs = shipped()
        table = about["images"]
        known, column = ("concepts", "concept_split") if self.level == "concept" else ("classes", "split")
        if unknown := set(self.classes or ()) - set(about[known]):
            raise InputError(f"there is no {self.level} {sorted(unknown)[0]!r} among the icons", field="classes")
        rows: dict[str, list[int]] = {"train": [], "test": [], "": []}
        labels = table[self.level]
        for i, split in enumerate(table[column]):
            wanted = (self.groups, table["group"]), (self.domains, table["domain"]), (self.classes, labels)
            if all(choice is None or values[i] in choice for choice, values in wanted):
                rows[split].append(i)
        splits = ("train", "test") if self.train else ("test",)
        both = set.intersection(*({labels[i] for i in rows[split]} for split in splits))
        names = [name for name in about[known] if name in both]
        if len(names) < 2:
            raise InputError("fewer than two classes have icons of this choice", field="icons", remedy="Choose more")
        found = {}
        for split in splits:
            kept = [i for i in rows[split] if labels[i] in both]
            ids = [f"{table['set'][i]}/{table['concept'][i]}" for i in kept]
            found[split] = Listed([pngs[i] for i in kept], [labels[i] for i in kept], ids, Path("icons"))
        return found, names

    def task(self, backbone: DualEncoder, **options: Any) -> ImageTask:
        """The task of these icons; see `ImageTask.build` for the options."""
        found, names = self.listed()
        return ImageTask.build(found, backbone, class_names=names, **options)
