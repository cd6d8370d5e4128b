from __future__ import annotations

import pytest

from pet_finetune.errors import UnitError
from pet_finetune.units import (
    energy_to_ev,
    length_to_angstrom,
    to_own_unit,
)


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("eV", 1.0),
        ("meV", 1e-3),
        ("Hartree", 27.21138602),
        ("Ha", 27.21138602),
        ("Ry", 13.605693009),
        ("kcal/mol", 0.04336410390),
        ("kJ/mol", 0.01036426957),
        ("J", 6.241509126e18),
        ("K", 8.6173303e-5),
        ("cm^-1", 1.239841974e-4),
    ],
)
def test_energies_are_those_of_codata_2014(unit: str, expected: float) -> None:
    assert energy_to_ev(unit) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(
    ("unit", "expected"),
    [("angstrom", 1.0), ("bohr", 0.52917721067), ("nm", 10.0), ("m", 1e10)],
)
def test_lengths_are_those_of_codata_2014(unit: str, expected: float) -> None:
    assert length_to_angstrom(unit) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("unit", ["A", "Å", "\u212b", "ANGSTROM", " angstrom "])
def test_spellings_of_the_angstrom(unit: str) -> None:
    assert length_to_angstrom(unit) == 1.0


def test_case_and_spaces_do_not_matter() -> None:
    assert energy_to_ev("KCAL / MOL") == energy_to_ev("kcal/mol")
    assert energy_to_ev("hartree") == energy_to_ev("HARTREE")


def test_forces_and_stresses_combine_energy_and_length() -> None:
    hartree, bohr = 27.21138602, 0.52917721067
    assert to_own_unit("force", "Ha/bohr") == pytest.approx(hartree / bohr)
    assert to_own_unit("pressure", "Ha/bohr^3") == pytest.approx(hartree / bohr**3)


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
