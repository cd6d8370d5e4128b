"""Dimer curves as a table and as a plot."""

from __future__ import annotations

import csv
import io
import sys
from xml.etree import ElementTree

import pytest

from pet_finetune.errors import PetFinetuneError
from pet_finetune.forgetting.dimers import DimerRow, dimers_csv, dimers_svg

DISTANCES = [0.5, 1.0, 2.0]
ROWS = [
    DimerRow("C-O", {"before": [400.0, -5.0, 0.0], "after": [300.0, -6.0, 0.5]}, 1.0, "kept"),
    DimerRow("H-H", {"before": [1.0, -4.0, 0.0], "after": [-9.0, -4.0, 0.0]}, 0.65, "lost"),
]


def test_the_table_has_a_line_for_each_pair_and_distance():
    rows = list(csv.DictReader(io.StringIO(dimers_csv(DISTANCES, ROWS))))
    assert [(r["pair"], float(r["distance"])) for r in rows] == [
        (pair, d) for pair in ("C-O", "H-H") for d in DISTANCES
    ]
    assert (float(rows[2]["before"]), float(rows[2]["after"])) == (0.0, 0.5)


def test_the_plot_names_the_pairs_and_is_the_same_each_time():
    pytest.importorskip("matplotlib")
    text = dimers_svg(DISTANCES, ROWS)
    written = "".join(ElementTree.fromstring(text).itertext())
    for words in ("C-O: kept", "H-H: lost", "distance", "before", "after"):
        assert words in written
    assert dimers_svg(DISTANCES, ROWS) == text


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PetFinetuneError, match=r"pet-finetune\[plots\]"):
        dimers_svg(DISTANCES, ROWS)
