"""Every way in which a step can be wrong is seen, and its atoms are named."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from models import apart, crystal, ethanol, lone_atom, random_potential
from pet_finetune import PETCalculator
from pet_finetune.data.calculator_input import Contacts
from pet_finetune.dynamics.loop import Stability
from pet_finetune.dynamics.measure import Measurement
from pet_finetune.errors import DataError

GOOD = Measurement(3, 1.5, -10.0, 0.1, -9.9, 310.0)
CONTACTS = Contacts((0, 1), 1.1, frozenset())


def problem(row: Measurement = GOOD, contacts: Contacts = CONTACTS, bad: int | None = None):
    atoms = ethanol()
    atoms.set_momenta(np.eye(9, 3))
    forces = np.zeros((9, 3))
    if bad is not None:
        forces[bad, 1] = math.nan
    atoms.calc = SinglePointCalculator(atoms, energy=0.0, forces=forces)
    watch = Stability(3000.0, 300.0, frozenset({4}), lambda: contacts)
    return watch.problem(row, atoms)


def test_a_good_step_has_no_problem() -> None:
    assert problem() is None
    assert problem(contacts=replace(CONTACTS, alone=frozenset({4}))) is None  # it always was


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"row": replace(GOOD, potential=math.nan)}, "the energy is nan"),
        ({"bad": 7}, "the forces on 1 atoms are not finite, first atom 7 (H)"),
        ({"contacts": replace(CONTACTS, distance=0.3)}, "atom 0 (C) and atom 1 (C) are 0.30 A"),
        ({"contacts": replace(CONTACTS, alone=frozenset({4, 2}))}, "atom 2 (O) has flown away"),
        ({"row": replace(GOOD, temperature=3001.0)}, "the temperature is 3,001 K"),
        ({"row": replace(GOOD, temperature=math.nan)}, "the temperature is nan K"),
    ],
)
def test_what_is_wrong_is_named(given, said: str) -> None:
    assert said in problem(**given)


@pytest.fixture(scope="module")
def calculator() -> PETCalculator:
    return PETCalculator(random_potential(), device="cpu")


def test_contacts_are_those_of_all_distances(calculator: PETCalculator) -> None:
    atoms: Atoms
    for atoms in (ethanol(), crystal()):
        calculator.calculate(atoms)
        found = calculator.contacts()
        if atoms.pbc.any():
            atoms = atoms.repeat(3)
        distances = atoms.get_all_distances(mic=False) + 99 * np.eye(len(atoms))
        assert found.distance == pytest.approx(distances.min())
        assert found.alone == frozenset()
    calculator.calculate(apart())
    assert calculator.contacts().alone == {3}
    calculator.calculate(lone_atom())
    assert calculator.contacts() == Contacts(None, math.inf, frozenset({0}))


def test_there_are_no_contacts_before_a_structure(calculator: PETCalculator) -> None:
    with pytest.raises(DataError, match="There is no structure yet"):
        PETCalculator(calculator.model, device="cpu").contacts()


def edges(calculator: PETCalculator, atoms: Atoms) -> torch.Tensor:
    """The centres of the edges that a calculator makes of a structure."""
    return calculator._moving.batch(atoms, 0, 1, torch.device("cpu"), torch.float64).centers


def test_a_neighbour_list_can_be_taken_over(calculator: PETCalculator) -> None:
    """The pairs of the earlier structure in their order, not those of the later one."""
    calculator.calculate(crystal())
    origin = calculator.neighbor_origin
    assert origin is not None
    atoms = crystal()
    atoms.rattle(0.08, seed=5)
    calculator.calculate(atoms)
    np.testing.assert_array_equal(calculator.neighbor_origin[0], origin[0])
    fresh = PETCalculator(calculator.model, device="cpu")
    assert fresh.neighbor_origin is None
    assert len(edges(fresh, atoms)) != len(edges(calculator, atoms))
    fresh.neighbor_origin = origin
    fresh.calculate(atoms)
    assert torch.equal(edges(fresh, atoms), edges(calculator, atoms))
    np.testing.assert_array_equal(fresh.results["forces"], calculator.results["forces"])
