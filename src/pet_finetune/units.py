"""Conversion of the units found in data files to the package's own: eV and angstrom.

Factors are those of ``ase.units`` (CODATA 2014), written out so that reading options does not
import ASE; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Mapping

from pet_finetune.errors import UnitError, did_you_mean

__all__ = [
    "ENERGY_UNITS",
    "LENGTH_UNITS",
    "energy_to_ev",
    "force_to_ev_per_angstrom",
    "length_to_angstrom",
    "stress_to_ev_per_angstrom3",
]

_BOHR = 0.5291772105638411
_HARTREE = 27.211386024367243
_RYDBERG = 13.605693012183622
_JOULE = 6.241509125883258e18
_MOLE = 6.022140857e23
_KCAL_PER_MOL = 4184.0 * _JOULE / _MOLE
_KJ_PER_MOL = 1000.0 * _JOULE / _MOLE
_INVERSE_CM = 0.0001239841973964072
_KELVIN = 8.617330337217213e-05

#: Accepted spellings of a length (case-insensitive) and their size in angstrom.
LENGTH_UNITS: Mapping[str, float] = {
    "angstrom": 1.0,
    "angstroms": 1.0,
    "A": 1.0,
    "Å": 1.0,
    "ångström": 1.0,
    "ångstrom": 1.0,
    "bohr": _BOHR,
    "a0": _BOHR,
    "nm": 10.0,
    "nanometer": 10.0,
    "pm": 0.01,
    "picometer": 0.01,
    "um": 1.0e4,
    "micrometer": 1.0e4,
    "cm": 1.0e8,
    "centimeter": 1.0e8,
    "m": 1.0e10,
    "meter": 1.0e10,
}

#: Accepted spellings of an energy (case-insensitive) and their size in eV.
ENERGY_UNITS: Mapping[str, float] = {
    "eV": 1.0,
    "electronvolt": 1.0,
    "meV": 1.0e-3,
    "keV": 1.0e3,
    "Hartree": _HARTREE,
    "Ha": _HARTREE,
    "Eh": _HARTREE,
    "mHartree": _HARTREE * 1.0e-3,
    "mHa": _HARTREE * 1.0e-3,
    "Rydberg": _RYDBERG,
    "Ry": _RYDBERG,
    "kcal/mol": _KCAL_PER_MOL,
    "kJ/mol": _KJ_PER_MOL,
    "J/mol": _KJ_PER_MOL * 1.0e-3,
    "J": _JOULE,
    "joule": _JOULE,
    "K": _KELVIN,
    "kelvin": _KELVIN,
    "cm^-1": _INVERSE_CM,
    "1/cm": _INVERSE_CM,
}


def _folded(unit: str) -> str:
    """One spelling for all: no spaces, lower case, the angstrom sign (U+212B) as the letter Å."""
    return "".join(unit.split()).replace("\u212b", "Å").casefold()


def _lookup(unit: str, table: Mapping[str, float], kind: str) -> float:
    wanted = _folded(unit)
    for spelling, factor in table.items():
        if _folded(spelling) == wanted:
            return factor
    raise UnitError(
        f"Unknown {kind} unit {unit!r}.{did_you_mean(unit, table)} "
        f"Allowed (case does not matter): {', '.join(table)}."
    )


def length_to_angstrom(unit: str) -> float:
    """Return how many angstrom one ``unit`` of length is.

    :raises UnitError: if the unit is unknown; the message lists the known ones.
    """
    return _lookup(unit, LENGTH_UNITS, "length")


def energy_to_ev(unit: str) -> float:
    """Return how many eV one ``unit`` of energy is.

    :raises UnitError: if the unit is unknown; the message lists the known ones.
    """
    return _lookup(unit, ENERGY_UNITS, "energy")


def force_to_ev_per_angstrom(energy_unit: str, length_unit: str) -> float:
    """Return how many eV/Å one ``energy_unit / length_unit`` is."""
    return energy_to_ev(energy_unit) / length_to_angstrom(length_unit)


def stress_to_ev_per_angstrom3(energy_unit: str, length_unit: str) -> float:
    """Return how many eV/Å³ one ``energy_unit / length_unit**3`` is."""
    return energy_to_ev(energy_unit) / length_to_angstrom(length_unit) ** 3
