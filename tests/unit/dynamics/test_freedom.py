"""Degrees of freedom and velocities: a temperature means what it says in a small molecule too."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.calculator import Calculator, all_changes
from ase.constraints import (
    FixAtoms,
    FixBondLengths,
    FixCartesian,
    FixCom,
    FixedMode,
    FixedPlane,
    Hookean,
    MirrorForce,
)

from models import crystal, ethanol
from pet_finetune.dynamics.integrators import (
    MDSettings,
    constraint_problems,
    degrees_of_freedom,
    draw_velocities,
    keeps_momentum,
    make_integrator,
    temperature,
)


def fixed() -> Atoms:
    atoms = ethanol()
    atoms.set_constraint(FixAtoms([0, 1]))
    return atoms


def held(*constraints, atoms: Atoms | None = None) -> Atoms:
    atoms = ethanol() if atoms is None else atoms
    atoms.set_constraint(list(constraints))
    return atoms


@pytest.mark.parametrize(
    ("atoms", "momentum_kept", "expected"),
    [
        (ethanol(), True, 3 * 9 - 6),
        (ethanol(), False, 3 * 9),
        (molecule("CO2"), True, 3 * 3 - 5),
        (crystal(), True, 3 * 4 - 3),
        (Atoms("O"), True, 3),
        (fixed(), True, 3 * 7 - 1),  # it can turn about the axis through the two
        (fixed(), False, 3 * 7),
        (held(FixAtoms([0])), True, 3 * 8 - 3),  # and about one atom in three directions
        (held(FixAtoms([0, 1, 2])), True, 3 * 6),
        (held(FixAtoms([0, 1]), FixCartesian([0], [True, False, False])), False, 3 * 7),
        (held(FixAtoms([0]), atoms=crystal()), True, 3 * 3),
        (held(FixBondLengths([[0, 1], [1, 2]])), True, 3 * 9 - 2 - 6),
        (held(FixCom()), True, 3 * 9 - 3 - 3),
        (held(FixedPlane([0, 1, 2, 3], [0, 0, 1]), atoms=crystal()), True, 3 * 4 - 4 - 2),
        (held(FixedMode(np.eye(9, 3))), False, 3 * 9 - 1),
        (held(Hookean(0, 1, k=5.0, rt=1.0)), True, 3 * 9 - 6),
        (held(Hookean(0, (0.0, 0.0, 0.0), k=5.0)), True, 3 * 9),
    ],
)
def test_degrees_of_freedom(atoms: Atoms, momentum_kept: bool, expected: int) -> None:
    assert degrees_of_freedom(atoms, momentum_kept) == expected


@pytest.mark.parametrize(
    "make",
    [
        ethanol,
        crystal,
        fixed,
        lambda: molecule("CO2"),
        lambda: held(FixBondLengths([[0, 1], [1, 2]])),
        lambda: held(FixCartesian([0, 1, 2], [True, False, True])),
        lambda: held(FixCom()),
        lambda: held(FixAtoms([0])),
    ],
)
def test_velocities_have_the_temperature_and_no_motion_of_the_whole(make) -> None:
    atoms = make()
    draw_velocities(atoms, 250.0, np.random.default_rng(0))
    freedom = degrees_of_freedom(atoms, momentum_kept=True)
    assert temperature(atoms, freedom) == pytest.approx(250.0)
    once = atoms.get_momenta()
    atoms.set_momenta(once)  # obeys the constraints
    np.testing.assert_allclose(atoms.get_momenta(), once, atol=1e-9)
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


def test_what_turns_about_a_fixed_atom_keeps_its_angular_momentum_which_is_taken_out() -> None:
    atoms = held(FixAtoms([0]))
    draw_velocities(atoms, 300.0, np.random.default_rng(0))
    arms = atoms.positions - atoms.positions[0]
    np.testing.assert_allclose(np.cross(arms, atoms.get_momenta()).sum(axis=0), 0.0, atol=1e-9)


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "constraints",
    [
        [FixBondLengths([[0, 1]])],
        [FixAtoms([0])],
        [FixCartesian([0, 1], [True, True, False])],
        [FixCom()],
        [Hookean(0, 1, k=1.0, rt=1.4)],
    ],
    ids=lambda given: type(given[0]).__name__,
)
@pytest.mark.parametrize("thermostat", ["langevin", "bussi"])
def test_thermostats_hold_the_temperature_of_what_constraints_leave(constraints, thermostat):
    atoms = Atoms("COCO", [[0, 0, 0], [1.5, 0, 0], [0.7, 1.3, 0], [0.8, 0.5, 1.2]])
    atoms.set_constraint(constraints)
    atoms.calc = Springs()
    given = {"friction": 30.0} if thermostat == "langevin" else {"thermostat_time": 20.0}
    settings = MDSettings(thermostat=thermostat, timestep=1.0, **given).filled(0)
    rng = np.random.default_rng(0)
    draw_velocities(atoms, 300.0, rng)
    dynamics = make_integrator(atoms, settings, rng)
    freedom = degrees_of_freedom(atoms, keeps_momentum(settings))
    seen = []
    for _ in range(4000):
        dynamics.step()
        seen.append(temperature(atoms, freedom))
    assert np.mean(seen) == pytest.approx(300.0, rel=0.15)


def test_constraints_that_no_simulation_keeps_are_refused() -> None:
    assert constraint_problems(held(FixAtoms([0]), FixBondLengths([[1, 2]]))) == []
    assert "MirrorForce are for relaxations" in constraint_problems(held(MirrorForce(0, 1)))[0]
    both = held(FixAtoms([0]), FixBondLengths([[0, 1]]))
    assert "act on the same atoms" in constraint_problems(both)[0]


def test_a_mode_of_atoms_of_several_masses_is_for_relaxations() -> None:
    several = held(FixedMode(np.eye(9, 3)))  # two carbons and an oxygen
    assert "FixedMode" in constraint_problems(several)[0]
    assert not constraint_problems(several, simulated=False)
    assert not constraint_problems(held(FixedMode(np.eye(9, 3)[:, [0, 1, 1]]), atoms=one_kind()))


def one_kind() -> Atoms:
    atoms = ethanol()
    atoms.set_masses(np.ones(9))
    return atoms
