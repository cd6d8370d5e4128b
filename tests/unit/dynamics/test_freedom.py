"""Degrees of freedom and velocities: a temperature means what it says in a small molecule too."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.calculator import Calculator, all_changes
from ase.constraints import FixAtoms

from models import crystal, ethanol
from pet_finetune.dynamics import MDSettings
from pet_finetune.dynamics.freedom import degrees_of_freedom, draw_velocities, temperature
from pet_finetune.dynamics.integrators import keeps_momentum, make_integrator


def fixed() -> Atoms:
    atoms = ethanol()
    atoms.set_constraint(FixAtoms([0, 1]))
    return atoms


@pytest.mark.parametrize(
    ("atoms", "momentum_kept", "expected"),
    [
        (ethanol(), True, 3 * 9 - 6),
        (ethanol(), False, 3 * 9),
        (molecule("CO2"), True, 3 * 3 - 5),
        (crystal(), True, 3 * 4 - 3),
        (Atoms("O"), True, 3),
        (fixed(), True, 3 * 7),
    ],
    ids=["molecule", "langevin", "linear", "periodic", "atom", "fixed"],
)
def test_degrees_of_freedom(atoms: Atoms, momentum_kept: bool, expected: int) -> None:
    assert degrees_of_freedom(atoms, momentum_kept) == expected


@pytest.mark.parametrize("make", [ethanol, crystal, fixed, lambda: molecule("CO2")])
def test_velocities_have_the_temperature_and_no_motion_of_the_whole(make) -> None:
    atoms = make()
    draw_velocities(atoms, 250.0, np.random.default_rng(0))
    freedom = degrees_of_freedom(atoms, momentum_kept=True)
    assert temperature(atoms, freedom) == pytest.approx(250.0)
    if not atoms.constraints:
        np.testing.assert_allclose(atoms.get_momenta().sum(0), 0.0, atol=1e-9)
        if not atoms.pbc.any():
            np.testing.assert_allclose(atoms.get_angular_momentum(), 0.0, atol=1e-9)


def test_the_same_seed_gives_the_same_velocities() -> None:
    drawn = []
    for seed in (1, 1, 2):
        atoms = ethanol()
        draw_velocities(atoms, 300.0, np.random.default_rng(seed))
        drawn.append(atoms.get_momenta())
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])


class Springs(Calculator):
    """Every pair of atoms wants to be 1.5 A apart."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012

    def calculate(self, atoms=None, properties=None, system_changes=all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        difference = self.atoms.positions[:, None] - self.atoms.positions[None]
        length = np.linalg.norm(difference, axis=-1) + np.eye(len(self.atoms))
        stretch = (length - 1.5) * (1 - np.eye(len(self.atoms)))
        self.results["energy"] = 5.0 * float((stretch**2).sum()) / 2
        self.results["forces"] = -10.0 * (stretch / length)[..., None] * difference
        self.results["forces"] = self.results["forces"].sum(axis=1)


@pytest.mark.parametrize("thermostat", ["bussi", "nose-hoover"])
def test_thermostats_count_the_degrees_of_freedom(thermostat: str) -> None:
    """Four atoms: with ASE's 3N, twice the temperature would be held."""
    atoms = Atoms("COCO", [[0, 0, 0], [1.5, 0, 0], [0.7, 1.3, 0], [0.8, 0.5, 1.2]])
    atoms.calc = Springs()
    settings = MDSettings(thermostat=thermostat, thermostat_time=20.0, timestep=1.0).filled(0)
    rng = np.random.default_rng(0)
    draw_velocities(atoms, 300.0, rng)
    dynamics = make_integrator(atoms, settings, rng)
    freedom = degrees_of_freedom(atoms, keeps_momentum(settings))
    assert freedom == 6
    seen = []
    for _ in range(2000):
        dynamics.step()
        seen.append(temperature(atoms, freedom))
    assert np.mean(seen) == pytest.approx(300.0, rel=0.15)
    np.testing.assert_allclose(atoms.get_momenta().sum(0), 0.0, atol=1e-6)
