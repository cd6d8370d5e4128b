"""Dimer curves: right numbers, and the right word for what became of the wall."""

from __future__ import annotations

import pytest
import torch
from ase import Atoms

from models import lone_atom, random_potential
from pet_finetune.data.labelled_batch import batch_from_atoms
from pet_finetune.forgetting.dimers import (
    dimer_curves,
    distances,
    has_wall,
    pair_name,
    pairs_of,
    verdict,
    wall_distance,
)

CO = (6, 8)


def test_energies_are_relative_to_the_two_atoms_far_apart():
    model = random_potential()
    curves = dimer_curves(model, "energy", (8, 1))
    assert curves.pairs == pairs_of((1, 8)) == ((1, 1), (1, 8), (8, 8))
    assert [pair_name(pair) for pair in curves.pairs] == ["H-H", "H-O", "O-O"]
    assert curves.energies.shape == (3, len(distances()))
    assert float(curves.energies[:, distances() > model.cutoff].abs().max()) == 0.0
    where = 20  # 1.5 Angstrom
    direction = [0.48, 0.60, 0.64]
    dimer = Atoms("O2", [[0, 0, 0], [1.5 * x for x in direction]])
    together, alone = (
        model.predict(batch_from_atoms(atoms, model.cutoff), "energy").energy
        for atoms in (dimer, lone_atom())
    )
    assert float(distances()[where]) == pytest.approx(1.5)
    assert float(curves.energies[2, where]) == pytest.approx(float(together - 2 * alone))


def test_of_no_elements_there_are_no_curves():
    curves = dimer_curves(random_potential(), "energy", ())
    assert curves.pairs == ()
    assert curves.energies.shape == (0, len(distances()))


def test_the_model_is_left_in_its_mode():
    model = random_potential().train()
    dimer_curves(model, "energy", (6,))
    assert model.training


def curve(function):
    return function(distances())


WALL = curve(lambda d: 5.0 / d**6 - 3.0 / d**3)
HOLE = curve(lambda d: -4.0 / d)
DENT = WALL - 40 * torch.exp(-(((distances() - 0.65) / 0.03) ** 2))
FLAT = curve(torch.zeros_like)
FAR_DENT = WALL - 0.5 * torch.exp(-(((distances() - 1.3) / 0.05) ** 2))


@pytest.mark.parametrize(
    ("energies", "expected"),
    [(WALL, True), (HOLE, False), (DENT, False), (FLAT, False), (FAR_DENT, True)],
)
def test_a_wall_rises_steadily_where_atoms_are_too_close(energies, expected):
    assert has_wall(CO, energies) is expected


def test_where_atoms_are_too_close():
    assert wall_distance(CO) == pytest.approx(0.7 * (0.76 + 0.66))
    assert wall_distance((1, 1)) == 0.65  # 0.7 of the radii would be below the shortest distance


@pytest.mark.parametrize(
    ("before", "after", "word"),
    [
        (WALL, WALL, "kept"),
        (WALL, HOLE, "lost"),
        (HOLE, WALL, "gained"),
        (HOLE, HOLE, "absent"),
    ],
)
def test_what_became_of_it(before, after, word):
    assert verdict(CO, before, after) == word
