"""Facts about the molecule asset. It is downloaded once; later runs use the cache."""

from __future__ import annotations

from collections import Counter

import pytest

from pt_core.assets import Unavailable
from pt_graph.assets import b3db
from pt_graph.data import read_smiles

pytestmark = pytest.mark.network


def test_b3db_has_the_published_numbers_of_molecules_and_becomes_graphs() -> None:
    try:
        rows = b3db()
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert Counter(row["permeable"] for row in rows) == {1: 4956, 0: 2851}
    read = read_smiles(rows[:200], ["permeable"], invalid="skip")
    assert [rows[number - 1]["smiles"] for number in read.rows] == read.smiles
    assert read.labels[:, 0].tolist() == [rows[number - 1]["permeable"] for number in read.rows]
