from __future__ import annotations

import pytest
from ase import units as ase_units

from pet_finetune.errors import UnitError
from pet_finetune.units import (
    energy_to_ev,
    force_to_ev_per_angstrom,
    length_to_angstrom,
    stress_to_ev_per_angstrom3,
)


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("eV", 1.0),
        ("meV", 1e-3),
        ("Hartree", ase_units.Hartree),
        ("Ha", ase_units.Hartree),
        ("Ry", ase_units.Rydberg),
        ("kcal/mol", ase_units.kcal / ase_units.mol),
        ("kJ/mol", ase_units.kJ / ase_units.mol),
        ("J", ase_units.J),
        ("K", ase_units.kB),
        ("cm^-1", ase_units.invcm),
    ],
)
def test_energies_agree_with_ase(unit: str, expected: float) -> None:
    assert energy_to_ev(unit) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("unit", "expected"),
    [("angstrom", 1.0), ("bohr", ase_units.Bohr), ("nm", ase_units.nm), ("m", ase_units.m)],
)
def test_lengths_agree_with_ase(unit: str, expected: float) -> None:
    assert length_to_angstrom(unit) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("unit", ["A", "Å", "\u212b", "ANGSTROM", " angstrom "])
def test_spellings_of_the_angstrom(unit: str) -> None:
    assert length_to_angstrom(unit) == 1.0


def test_case_and_spaces_do_not_matter() -> None:
    assert energy_to_ev("KCAL / MOL") == energy_to_ev("kcal/mol")
    assert energy_to_ev("hartree") == energy_to_ev("HARTREE")


def test_forces_and_stresses_combine_energy_and_length() -> None:
    hartree, bohr = ase_units.Hartree, ase_units.Bohr
    assert force_to_ev_per_angstrom("Ha", "bohr") == pytest.approx(hartree / bohr)
    assert stress_to_ev_per_angstrom3("Ha", "bohr") == pytest.approx(hartree / bohr**3)


@pytest.mark.parametrize(
    ("call", "unit", "nearest"),
    [(energy_to_ev, "kcal", "kcal/mol"), (length_to_angstrom, "angstroem", "angstrom")],
)
def test_an_unknown_unit_names_the_nearest_and_all(call, unit: str, nearest: str) -> None:
    with pytest.raises(UnitError) as caught:
        call(unit)
    message = str(caught.value)
    assert f"{unit!r}" in message
    assert "Did you mean" in message
    assert nearest in message
