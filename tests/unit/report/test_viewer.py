"""What the 3D view is given, and the still picture without it."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
import pytest
from ase.build import molecule

from pet_finetune.data.predicted import Predicted
from pet_finetune.report.frame_errors import elements_of, frames_of, residuals, still
from pet_finetune.report.run_record import Quantity
from reports import predicted, stressed
from tiny_data import structures_of

FORCES = Quantity("energy", "forces", "forces", 1000.0, "meV/Å")


def test_a_molecule_has_its_bonds_and_the_errors_of_its_forces():
    found = predicted()
    (frame,) = frames_of(found, [1], FORCES, ["caption"])  # water
    assert frame["name"] == "frame 1 of tiny.xyz"
    assert frame["z"] == [8, 1, 1]
    assert frame["b"] == [0, 1, 0, 2]
    assert frame["cell"] is None
    atoms = slice(int(found.starts[1]), int(found.starts[2]))
    expected = residuals(found, FORCES, "after")[atoms]
    assert np.array(frame["e"]["after"]).reshape(-1, 3) == pytest.approx(expected, abs=1e-3)
    longest = max(np.abs(frame["e"][model]).max() for model in ("before", "after"))
    assert frame["scale"] * longest == pytest.approx(2.2, rel=1e-3)


def test_a_crystal_has_its_cell_and_energies_alone_have_no_arrows():
    (frame,) = frames_of(stressed(), [0], None, [""])
    assert len(frame["cell"]) == 9
    assert frame["e"] == {}
    assert frame["scale"] == 0.0


def test_what_md_has_carried_away_is_brought_back_molecule_by_molecule():
    atoms = molecule("H2O")
    atoms.set_cell([6.0, 7.0, 8.0])
    atoms.center()
    atoms.pbc = True
    home = atoms.copy()
    atoms.positions += [12.0, -7.0, 0.0]
    frames = [
        frames_of(Predicted.of(structures_of([a]), "test"), [0], None, [""])[0]
        for a in (home, atoms)
    ]
    assert frames[1]["x"] == pytest.approx(frames[0]["x"], abs=2e-3)


def test_elements_are_coloured_as_in_jmol():
    frames = frames_of(predicted(), [0], FORCES, [""])
    elements = elements_of(frames)
    assert list(elements) == [1, 6, 8]
    assert elements[8][:2] == ["O", "#ff0d0d"]


def test_the_still_picture_shows_every_atom_and_arrow():
    (frame,) = frames_of(predicted(), [0], FORCES, [""])
    tree = ElementTree.fromstring(still(frame, elements_of([frame])))
    tags = [element.tag for element in tree.iter()]
    assert tags.count("circle") == len(frame["z"])
    arrows = [element for element in tree.iter() if element.get("class") == "arrow"]
    assert len(arrows) == len(frame["z"])
