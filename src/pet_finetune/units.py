"""Conversion of the units found in data files to the package's own: eV and angstrom.

Factors are those of ``ase.units`` (CODATA 2014). Units that a file itself states
(``energy-unit=kcal/mol``, ``units=real``) are used, with a notice; if the options name other units,
reading stops.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from ase import Atoms, units

from pet_finetune.errors import DataError, UnitError, did_you_mean

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


_logger = logging.getLogger(__name__)

_KEY = re.compile(
    r"(?i)^(?:units?[-_]?(?:of[-_]?)?(?P<behind>\w*)|(?P<before>[\w-]*?)[-_]?units?)$"
)
# What the units of a kind of value are called, and the quantity they are of.
_NAMES: Mapping[str, tuple[str, frozenset[str]]] = {
    "energy": ("energy", frozenset({"energy", "energies", "e"})),
    "forces": ("force", frozenset({"force", "forces", "f", "gradient"})),
    "stress": ("pressure", frozenset({"stress", "stresses", "pressure"})),
    "virial": ("energy", frozenset({"virial", "virials"})),
    "length": (
        "length",
        frozenset(
            {"length", "lengths", "distance", "pos", "position", "positions", "coordinates",
             "coord", "cell", "lattice"}
        ),
    ),
}  # fmt: skip
_STYLES: Mapping[str, Mapping[str, str]] = {
    "metal": {"energy": "eV", "length": "A", "forces": "eV/A", "virial": "eV"},
    "real": {
        "energy": "kcal/mol", "length": "A", "forces": "kcal/mol/A", "virial": "kcal/mol",
    },
    "atomic": {
        "energy": "Hartree", "length": "Bohr", "forces": "Hartree/Bohr",
        "stress": "Hartree/Bohr^3", "virial": "Hartree",
    },
    "ev": {"energy": "eV"},
    "ase": {
        "energy": "eV", "length": "A", "forces": "eV/A", "stress": "eV/A^3", "virial": "eV",
    },
}  # fmt: skip
_STYLE_NAMES = {"au": "atomic", "a.u.": "atomic", "hartree": "atomic", "atomicunits": "atomic"}


def is_statement(name: str) -> bool:
    """Whether a text under this name says in which units a file is."""
    return _KEY.match(name) is not None


@dataclass
class StatedUnits:
    """The units that one file states.

    Attributes:
        source: the file.
        values: by key as it stands in the frames, e.g. ``{"stress-unit": "GPa"}``.
        converted: the format, where ASE has converted the numbers to eV and Å; else empty.
    """

    source: str
    values: Mapping[str, str]
    converted: str = ""
    _said: set[str] = field(default_factory=set)

    @staticmethod
    def of(frames: Sequence[Atoms], source: str, converted: str = "") -> StatedUnits:
        """Look through the frames of a file.

        Raises:
            DataError: frames that state different units.
        """
        values: dict[str, str] = {}
        for number, atoms in enumerate(frames):
            for key, value in atoms.info.items():
                if not isinstance(value, str) or not _KEY.match(str(key)):
                    continue
                if values.setdefault(str(key), value) != value:
                    raise DataError(
                        f"{source}: frame {number} states {key}={value}, and frames before it "
                        f"{key}={values[str(key)]}. Convert them to one unit, or make two files."
                    )
        return StatedUnits(source, values, converted)

    def factor(self, kind: str, key: str, declared: float, said: str, default: bool) -> float:
        """Factor that converts values to eV and Å.

        Args:
            kind: ``energy``, ``forces``, ``stress``, ``virial`` or ``length``.
            key: the name of the values in the file.
            declared: the factor that the options make.
            said: the unit that the options say, for messages.
            default: whether the options may not have meant it: what the file states then wins.

        Raises:
            DataError: file and options contradict each other, or the unit is of no such quantity.
        """
        if self.converted:
            if default or math.isclose(declared, 1.0, rel_tol=1e-4):
                return 1.0
            raise DataError(
                f"{self.source} is of the format {self.converted!r}, whose numbers ASE converts to "
                f"eV and Å on reading, and the options say {said} for the {kind}: they would be "
                "converted twice. Leave this unit out of the options."
            )
        found = self._find(kind, key)
        if found is None:
            return declared
        name, unit = found
        try:
            own = to_own_unit(_NAMES[kind][0], _spelled(unit, kind))
        except UnitError as error:
            raise DataError(
                f"{self.source} states {name}={unit}, which is no unit of the {kind} that is "
                f"known: {error} Correct it, or take it out of the file."
            ) from error
        if math.isclose(own, declared, rel_tol=1e-4):
            return declared
        if not default:
            raise DataError(
                f"{self.source} states {name}={unit}, and the options say {said} for the {kind}. "
                "One of them is wrong: correct the options, or take it out of the file."
            )
        if name not in self._said:
            self._said.add(name)
            _logger.warning(
                "%s states %s=%s: the %s is converted from it, not from %s",
                self.source,
                name,
                unit,
                kind,
                said,
            )
        return own

    def _find(self, kind: str, key: str) -> tuple[str, str] | None:
        """Name and value of the statement about values of a kind that have a key."""
        found = None
        for name, unit in self.values.items():
            match = _KEY.match(name)
            assert match is not None
            stem = (match["before"] or match["behind"] or "").casefold()
            if stem == key.casefold():
                return name, unit
            if stem in _NAMES[kind][1]:
                found = name, unit
            elif not stem and found is None:
                folded = "".join(unit.split()).casefold()
                style = _STYLES.get(_STYLE_NAMES.get(folded, folded), _of_one_kind(unit))
                if not style:
                    self._unknown(name, unit)
                elif kind in style:
                    found = name, style[kind]
        return found

    def _unknown(self, name: str, unit: str) -> None:
        if name not in self._said:
            self._said.add(name)
            _logger.warning(
                "%s states %s=%s, which is not understood (known: %s); the units of the options "
                "are used",
                self.source,
                name,
                unit,
                ", ".join(_STYLES),
            )


def _of_one_kind(unit: str) -> Mapping[str, str]:
    """The quantity of a unit that stands alone: ``bohr`` is of lengths, ``kJ/mol`` of energies."""
    for kind in ("length", "energy"):
        with suppress(UnitError):
            to_own_unit(_NAMES[kind][0], _spelled(unit, kind))
            return {kind: unit}
    return {}


def _spelled(unit: str, kind: str) -> str:
    """A unit in the spelling of the options."""
    folded = "".join(unit.split()).casefold()
    if folded in ("au", "a.u.", "atomic", "atomic_unit"):
        return _STYLES["atomic"].get(kind, unit)
    if folded in ("kb", "kbar") and kind == "stress":
        return "kbar"
    unit = re.sub(r"(?i)^(?:au|a\.u\.)(?=/)", "Hartree", unit)
    return re.sub(r"(?i)\bang(?:s|str|stroms?|stroem)?\b", "A", unit).replace("**", "^")
