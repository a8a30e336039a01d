"""Real molecules that lie inside published packages (see `pt_core.assets`): fetched by exact version, checked by hash."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from pt_core.assets import Asset, fetch

B3DB = Asset(
    name="b3db",
    source="pypi",
    package="qc-b3db",
    version="1.1.1",
    members={"B3DB/B3DB_classification.tsv": "47a160aea1551423ead2aab70b301fb1646aea03cf151fd614eb37c78fa55b82"},
    licence="CC0-1.0",
    about="blood-brain barrier permeability of about 7,800 molecules",
)


def b3db(cache: Path | None = None, offline: bool | None = None) -> list[dict[str, Any]]:
    """B3DB: rows of `smiles` and `permeable` (1: crosses the blood-brain barrier, 0: does not), in the order of the file.

    Source: Meng et al., A curated diverse molecular database of blood-brain barrier permeability. Scientific Data 2021.
    """
    file = fetch(B3DB, cache, offline) / next(iter(B3DB.members))
    # Not `read_table`: comments in this file run over line breaks, which a plain table does not allow.
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t"))
    return [{"smiles": row["SMILES"], "permeable": int(row["BBB+/BBB-"] == "BBB+")} for row in rows]
