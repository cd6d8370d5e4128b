"""Figures of the page: their text, their colours, their size."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from pet_finetune.report.curves import parity_plots
from pet_finetune.report.figures import AFTER, INK, panel
from reports import predicted, record, stressed
from tiny_data import molecules

pytest.importorskip("matplotlib")


def test_a_figure_takes_the_colours_and_letters_of_the_page():
    def draw(axes):
        axes.plot([0.0, 1.0], [1.0, 2.0], "o", color=AFTER)
        axes.set_title("a <b> & c")

    text = panel("mine", "what is <seen>", draw)
    tree = ElementTree.fromstring(text)
    assert "a <b> & c" in "".join(tree.itertext())
    assert tree.get("aria-label") == "what is <seen>"
    assert "var(--after)" in text
    assert "var(--ink)" in text
    assert AFTER not in text
    assert INK not in text
    assert "font-family" not in text
    # What it defines must neither reach the page nor another figure on it.
    assert "<style" not in text
    assert all(name.startswith("mine-") for name in re.findall(r'\bid="([^"]*)"', text))
    assert re.findall(r'(?:href="#|url\(#)(?!mine-)', text) == []
    assert text == panel("mine", "what is <seen>", draw)


def test_dots_are_coloured_though_their_style_is_said_once():
    def draw(axes):
        axes.plot(np.arange(50.0), np.arange(50.0), "o", color=AFTER, markeredgewidth=0)

    text = panel("dots", "", draw)
    assert text.count("<use") >= 50
    (shape,) = {m for m in re.findall(r'<path id="[^"]*"[^>]*style="([^"]*)"', text)
                if "var(--after)" in m}  # fmt: skip
    assert "fill: var(--after)" in shape


def test_parity_of_every_quantity_with_both_models():
    found = parity_plots(record(stressed()))
    assert [parity.title for parity in found] == ["energy", "forces", "stress"]
    assert all(len(parity.plots) == 2 for parity in found)
    assert "baseline" in found[0].note
    mae = record(stressed()).after["test"]["energy"]["stress_mae"]
    assert f"fine-tuned: MAE {1000 * mae:.3g}"[:20] in found[2].plots[1]


def test_many_points_become_a_picture():
    found = parity_plots(record(predicted(molecules(120))))
    forces = found[1].plots[1]
    assert "data:image/png;base64" in forces
    assert len(forces) < 60_000
    assert "data:image/png" not in found[0].plots[1]
