"""Charges and multiplicities beyond what a model knows are named before anything is computed."""

from __future__ import annotations

import pytest
from ase.build import molecule

from pet_finetune.data.charges import check_charges
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
