"""Units that a file itself states (``energy-unit=kcal/mol``, ``stress_unit=GPa``, ``units=real``).

Units stated in a file are used, with a notice; if the options name other units, reading stops.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from ase import Atoms

from pet_finetune.errors import DataError, UnitError
from pet_finetune.log import get_logger
from pet_finetune.units import to_own_unit

from .metatrain_sets import Folder

_logger = get_logger(__name__)

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
        # The texts of a folder are those of all its frames.
        for number, atoms in enumerate(frames[:1] if isinstance(frames, Folder) else frames):
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
