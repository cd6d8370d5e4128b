"""Charges and multiplicities that a model cannot read are named before anything is computed."""

from __future__ import annotations

import pytest
from ase.build import molecule

from pet_finetune.data.computable import charge_and_spin, check_charges
from pet_finetune.data.structure import atoms_to_structure
from pet_finetune.errors import DataError


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
    assert charge_and_spin(atoms, max_charge=2, max_spin=4) == found


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
        charge_and_spin(atoms, max_charge=2, max_spin=4)
