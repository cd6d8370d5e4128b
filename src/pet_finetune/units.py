"""Conversion of the units found in data files to the package's own: eV and angstrom.

Factors are those of ``ase.units`` (CODATA 2014).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ase import units

from pet_finetune.errors import UnitError, did_you_mean

_KJ_PER_MOL = units.kJ / units.mol

#: Accepted spellings of a length (case-insensitive) and their size in angstrom.
LENGTH_UNITS: Mapping[str, float] = {
    "angstrom": 1.0,
    "angstroms": 1.0,
    "A": 1.0,
    "Å": 1.0,
    "ångström": 1.0,
    "ångstrom": 1.0,
    "bohr": units.Bohr,
    "a0": units.Bohr,
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
    "Hartree": units.Hartree,
    "Ha": units.Hartree,
    "Eh": units.Hartree,
    "mHartree": units.Hartree * 1.0e-3,
    "mHa": units.Hartree * 1.0e-3,
    "Rydberg": units.Rydberg,
    "Ry": units.Rydberg,
    "kcal/mol": units.kcal / units.mol,
    "kJ/mol": _KJ_PER_MOL,
    "J/mol": _KJ_PER_MOL * 1.0e-3,
    "J": units.J,
    "joule": units.J,
    "K": units.kB,
    "kelvin": units.kB,
    "cm^-1": units.invcm,
    "1/cm": units.invcm,
}

#: Accepted spellings of a pressure (case-insensitive) and their size in eV/Å³, beside an energy
#: over a cubed length.
PRESSURE_UNITS: Mapping[str, float] = {
    "GPa": units.GPa,
    "kbar": units.Pascal * 1.0e8,
    "bar": units.Pascal * 1.0e5,
    "Pa": units.Pascal,
}


def _folded(unit: str) -> str:
    """Normalise a unit: no spaces, lower case, the angstrom sign (U+212B) as the letter Å."""
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

    Raises:
        UnitError: if the unit is unknown; the message lists the known ones.
    """
    return _lookup(unit, LENGTH_UNITS, "length")


def energy_to_ev(unit: str) -> float:
    """Return how many eV one ``unit`` of energy is.

    Raises:
        UnitError: if the unit is unknown; the message lists the known ones.
    """
    return _lookup(unit, ENERGY_UNITS, "energy")


def is_energy_unit(unit: object) -> bool:
    """Whether a name is a unit of energy."""
    known = {_folded(spelling) for spelling in ENERGY_UNITS}
    return isinstance(unit, str) and _folded(unit) in known


def _force(unit: str) -> float:
    """eV/Å in one unit of force, an energy over a length."""
    energy, divided, length = unit.rpartition("/")
    if not divided:
        raise UnitError(
            f"Unknown force unit {unit!r}. A force is an energy over a length, for instance eV/A, "
            "Hartree/Bohr or kcal/mol/A."
        )
    return energy_to_ev(energy.strip(" ()")) / length_to_angstrom(length)


def _pressure(unit: str) -> float:
    """eV/Å³ in one unit of pressure, by name or as an energy over a cubed length."""
    energy, divided, volume = unit.rpartition("/")
    if not divided:
        return _lookup(unit, PRESSURE_UNITS, "pressure")
    length = volume.strip()
    for power in ("^3", "**3", "³", "3"):
        if length.endswith(power):
            size = length_to_angstrom(length.removesuffix(power))
            return energy_to_ev(energy.strip(" ()")) / size**3
    raise UnitError(
        f"Unknown pressure unit {unit!r}. A pressure is an energy over a cubed length, for "
        f"instance eV/A^3, or one of: {', '.join(PRESSURE_UNITS)}."
    )


#: Quantities that are converted: the package's own unit, and how one of another is converted.
_CONVERTED: Mapping[str, tuple[str, Callable[[str], float]]] = {
    "energy": ("eV", energy_to_ev),
    "length": ("A", length_to_angstrom),
    "force": ("eV/A", _force),
    "pressure": ("eV/A^3", _pressure),
}


def own_unit(quantity: str, unit: str) -> str:
    """The unit in which the package keeps a quantity; other quantities keep the ``unit`` given."""
    return _CONVERTED[quantity][0] if quantity in _CONVERTED else unit


def to_own_unit(quantity: str, unit: str) -> float:
    """Factor from ``unit`` to :func:`own_unit`; 1 if not converted.

    An empty unit stands for the package's own.

    Raises:
        UnitError: if the quantity is converted and the unit is not one of its own.
    """
    if quantity not in _CONVERTED or not unit:
        return 1.0
    return _CONVERTED[quantity][1](unit)


def duration(seconds: float) -> str:
    """Duration in words."""
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"
