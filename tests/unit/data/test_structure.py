"""ASE structures become plain tensors that nothing outside can change."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule

from pet_finetune.data import atoms_to_structure
from pet_finetune.data.computable import check_charges
from pet_finetune.data.structure import as_integer
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
        (flat, "cell vectors"),
        (coplanar, "linearly dependent"),
    ]


@pytest.mark.parametrize(("atoms", "message"), broken_structures())
def test_broken_structures_are_refused_by_frame(atoms, message):
    with pytest.raises(DataError, match=f"frame 3 of x.xyz.*{message}"):
        atoms_to_structure(atoms, 3, source="x.xyz")
