"""One structure: conversion, charge and spin, what can be computed, fingerprints."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule

from pet_finetune.config.run_options import ModelOptions
from pet_finetune.data.calculator_input import charge_and_spin
from pet_finetune.data.structure import (
    Structure,
    as_integer,
    atoms_to_structure,
    check_charges,
    structures_fingerprint,
)
from pet_finetune.errors import DataError


def test_arrays_are_copied():
    atoms = molecule("H2O")
    structure = atoms_to_structure(atoms)
    expected = atoms.positions.copy()
    atoms.positions += 1.0
    atoms.numbers[0] = 1
    np.testing.assert_array_equal(structure.positions.numpy(), expected)
    assert structure.numbers.tolist() == [8, 1, 1]
    assert structure.positions.dtype == torch.float64
    assert structure.numbers.dtype == torch.int64


def test_cell_rows_without_periodicity_are_zero():
    atoms = bulk("Cu", cubic=True)
    atoms.pbc = (True, True, False)
    structure = atoms_to_structure(atoms)
    assert structure.cell[2].tolist() == [0.0, 0.0, 0.0]
    assert structure.cell[0].tolist() == atoms.cell[0].tolist()
    assert structure.volume == 0.0


def test_volume_and_length_factor():
    atoms = bulk("Cu")
    structure = atoms_to_structure(atoms, length_factor=0.5)
    assert structure.volume == pytest.approx(atoms.get_volume() / 8)
    np.testing.assert_allclose(structure.positions.numpy(), atoms.positions / 2)


@pytest.mark.parametrize("spin_name", ["spin", "spin_multiplicity"])
def test_charge_and_spin_from_usual_names(spin_name):
    atoms = molecule("OH")
    atoms.info.update({"charge": -1.0, spin_name: np.int64(3)})
    structure = atoms_to_structure(atoms)
    assert (structure.charge, structure.spin) == (-1, 3)
    assert isinstance(structure.charge, int)


def test_charge_and_spin_default_to_a_neutral_singlet():
    structure = atoms_to_structure(molecule("H2O"))
    assert (structure.charge, structure.spin) == (0, 1)


def test_given_charge_and_spin_win():
    atoms = molecule("OH")
    atoms.info.update(charge=5, spin=3)
    structure = atoms_to_structure(atoms, charge=2, spin=4)
    assert (structure.charge, structure.spin) == (2, 4)


@pytest.mark.parametrize(
    ("value", "integer"),
    [(2, 2), (-1.0, -1), ([3], 3), (np.int64(4), 4), ("5", 5), (0.5, None), ("x", None),
     ([1, 2], None), (np.nan, None), (None, None)],
)  # fmt: skip
def test_as_integer(value, integer):
    assert as_integer(value) == integer


def test_charge_and_spin_are_what_the_file_says_and_judged_by_who_reads_them():
    atoms = molecule("OH")
    atoms.info.update(spin=0)  # fairchem writes spin=0 where none is meant
    structure = atoms_to_structure(atoms)
    assert (structure.charge, structure.spin) == (0, 0)
    with pytest.raises(DataError, match="spin multiplicity .* is 0"):
        check_charges([structure], max_charge=5, max_spin=5)


def broken_structures():
    nan = molecule("H2O")
    nan.positions[1, 2] = np.nan
    flat = Atoms("Cu2", positions=[[0, 0, 0], [0, 0, 2]], cell=[5, 5, 0], pbc=True)
    coplanar = Atoms("Cu", cell=[[1, 0, 0], [0, 1, 0], [1, 1, 0]], pbc=True)
    return [
        (Atoms(), "no atoms"),
        (nan, "NaN"),
        (Atoms("X"), "no chemical element"),
        (Atoms(numbers=[1, 119], positions=np.eye(3)[:2]), "atom 1 has no chemical element"),
        (flat, "cell vectors"),
        (coplanar, "linearly dependent"),
    ]


@pytest.mark.parametrize(("atoms", "message"), broken_structures())
def test_broken_structures_are_refused_by_frame(atoms, message):
    with pytest.raises(DataError, match=f"frame 3 of x.xyz.*{message}"):
        atoms_to_structure(atoms, 3, source="x.xyz")


@pytest.fixture
def structure() -> Structure:
    labels = {"energy": torch.tensor(1.0, dtype=torch.float64)}
    return atoms_to_structure(bulk("NaCl", "rocksalt", a=5.6), labels=labels)


def moved(structure):
    positions = structure.positions.clone()
    positions[0, 0] += 1e-12
    return positions


CHANGES = {
    "position": lambda s: {"positions": moved(s)},
    "element": lambda s: {"numbers": s.numbers.flip(0)},
    "cell": lambda s: {"cell": s.cell * 2},
    "pbc": lambda s: {"pbc": ~s.pbc},
    "charge": lambda s: {"charge": 1},
    "spin": lambda s: {"spin": 2},
    "label value": lambda s: {"labels": {"energy": s.labels["energy"] + 1}},
    "label name": lambda s: {"labels": {"energy/x": s.labels["energy"]}},
    "label missing": lambda s: {"labels": {}},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_content_counts(structure, change):
    other = dataclasses.replace(structure, **change(structure))
    assert structures_fingerprint([structure]) != structures_fingerprint([other])


def test_names_do_not_count(structure):
    other = dataclasses.replace(structure, index=5, source="elsewhere.xyz")
    assert structures_fingerprint([structure]) == structures_fingerprint([other])


def test_order_and_number_count(structure):
    other = dataclasses.replace(structure, charge=1)
    prints = [
        structures_fingerprint(members)
        for members in (
            [],
            [structure],
            [structure, structure],
            [structure, other],
            [other, structure],
        )
    ]
    assert len(set(prints)) == 5
    assert all(len(value) == 64 for value in prints)


def structures(charges=(0, 0, 0), spins=(1, 1, 1)):
    return [
        atoms_to_structure(molecule("H2O"), index, source="a.xyz", charge=charge, spin=spin)
        for index, (charge, spin) in enumerate(zip(charges, spins, strict=True))
    ]


def test_the_limits_themselves_are_known():
    check_charges(structures((-2, 0, 2), (1, 3, 4)), max_charge=2, max_spin=4)
    check_charges([], max_charge=0, max_spin=1)


@pytest.mark.parametrize(
    ("charges", "spins", "message"),
    [
        ((0, 3, -3), (1, 1, 1), "frame 1 of a.xyz: the total charge is 3, .* from -2 to 2 .2 of 3"),
        ((0, 0, 0), (1, 1, 5), r"frame 2 of a.xyz: the spin multiplicity \(2S\+1\) is 5, .*1 to 4"),
    ],
)
def test_what_is_beyond_them_is_named(charges, spins, message):
    with pytest.raises(DataError, match=message):
        check_charges(structures(charges, spins), max_charge=2, max_spin=4)


CONDITIONED = ModelOptions(system_conditioning=True, max_charge=2, max_spin_multiplicity=4)


@pytest.mark.parametrize(
    ("info", "found"),
    [
        ({"charge": 2.0, "spin": 3}, (2, 3)),
        ({"total_charge": -1, "multiplicity": 2}, (-1, 2)),
        ({"charge": [0.1, 0.2, 0.3], "total_charge": 1}, (1, 1)),
        ({}, (0, 1)),
    ],
)
def test_charge_and_spin_under_their_usual_names(info, found):
    atoms = molecule("H2O")
    atoms.info.update(info)
    structure = atoms_to_structure(atoms)
    check_charges([structure], max_charge=2, max_spin=4)
    assert (structure.charge, structure.spin) == found
    assert charge_and_spin(atoms, CONDITIONED) == found


@pytest.mark.parametrize(
    ("info", "words"),
    [({"charge": 0.5}, "'charge' is 0.5"), ({"spin": "high"}, "'spin' is 'high'")],
)
def test_what_is_no_whole_number_is_refused_by_who_reads_it(info, words):
    """The calculator, and training and evaluation of a model that knows charges, say the same."""
    atoms = molecule("H2O")
    atoms.info.update(info)
    structure = atoms_to_structure(atoms, 4, source="a.xyz")
    assert (structure.charge, structure.spin) == (0, 1)
    with pytest.raises(DataError, match=f"frame 4 of a.xyz: {words}.*1 of 1 structures"):
        check_charges([structure], max_charge=2, max_spin=4)
    with pytest.raises(DataError, match=f"{words}, not a whole number"):
        charge_and_spin(atoms, CONDITIONED)
