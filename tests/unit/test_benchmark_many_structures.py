"""The set that the benchmark makes: a folder as training reads it, forces of its energies."""

from __future__ import annotations

import numpy as np
import pytest
from ase.build import molecule
from benchmarks.many_structures import KINDS, SHAKE, draw, generate, springs

from pet_finetune.data.metatrain_sets import Folder


@pytest.mark.parametrize("count", [1, 5, 31])
def test_a_folder_of_any_number_of_structures(tmp_path, count):
    generate(tmp_path / "set", count)
    found = Folder(tmp_path / "set")
    assert len(found) == count
    for number, frame in enumerate(found):
        rest = molecule(KINDS[number % 3])
        assert frame.numbers.tolist() == rest.numbers.tolist()
        assert np.abs(frame.positions - rest.positions).max() < 6 * SHAKE
        np.testing.assert_allclose(frame.arrays["forces"].sum(axis=0), 0.0, atol=1e-5)
        assert frame.info["energy"] < -100.0


def test_forces_are_those_of_the_energies():
    rest = molecule("NH3").positions
    positions = (rest + 0.1 * np.random.default_rng(0).normal(size=rest.shape))[None]
    _, forces = springs(positions, rest)
    for atom, axis in ((0, 0), (2, 1), (3, 2)):
        step = np.zeros_like(positions)
        step[0, atom, axis] = 1e-5
        slope = (springs(positions + step, rest)[0] - springs(positions - step, rest)[0]) / 2e-5
        assert forces[0, atom, axis] == pytest.approx(-slope[0], abs=1e-6)


def test_the_plot_is_drawn(tmp_path):
    found = {"memory": [(0.0, 100.0), (1.0, 900.0), (2.0, 0.0)], "steps": [1.0, 1.5]}
    draw(found, 1000, tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text()
