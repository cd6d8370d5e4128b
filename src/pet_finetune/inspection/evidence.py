"""Which units explain what was seen: each piece of evidence votes with its own uncertainty."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np

from pet_finetune.units import to_own_unit

__all__ = [
    "UNITS",
    "Declared",
    "Evidence",
    "Reading",
    "assumed_unit",
    "log_ratio",
    "readings_of",
]

#: Units that programs write, with what each costs beside the assumed one, before evidence.
UNITS: Mapping[str, Mapping[str, float]] = {
    "energy": {"kcal/mol": 0, "kJ/mol": 0, "Hartree": 0, "Ry": 0, "eV": 0, "meV": 1},
    "force": {
        "kcal/mol/A": 0,
        "kJ/mol/A": 0,
        "Hartree/Bohr": 0,
        "Ry/Bohr": 0,
        "eV/A": 0,
        "Hartree/A": 4,
        "eV/Bohr": 4,
        "kJ/mol/nm": 4,
        "meV/A": 4,
    },
    "stress": {
        "GPa": 0,
        "kbar": 0,
        "eV/A^3": 0,
        "Hartree/Bohr^3": 0,
        "Ry/Bohr^3": 0,
        "kJ/mol/A^3": 4,
        "kcal/mol/A^3": 4,
        "bar": 4,
    },
}
_QUANTITIES = {"energy": "energy", "force": "force", "stress": "pressure"}
#: Each quantity that is not in the assumed unit costs this, less where it goes with the energy's.
_OTHER, _SAME_ENERGY = 3.0, 0.5
_SIGN = 3.0


@dataclass(frozen=True)
class Declared:
    """What the options say one unit of the file is, in eV and Å; labels were multiplied by it.

    Forces and stresses without a unit of their own follow from energy and length.

    Attributes:
        energy, length, own_force, own_stress: eV, Å, eV/Å and eV/Å³ in one unit.
        named: whether the options name the unit of the energy, so that it is no assumption.
    """

    energy: float = 1.0
    length: float = 1.0
    own_force: float | None = None
    own_stress: float | None = None
    named: bool = False

    @property
    def force(self) -> float:
        """eV/Å in one unit of force."""
        return self.own_force or self.energy / self.length

    @property
    def stress(self) -> float:
        """eV/Å³ in one unit of stress."""
        return self.own_stress or self.energy / self.length**3


@dataclass(frozen=True)
class Evidence:
    """Something that has a known size when the units are right.

    Attributes:
        powers: by quantity, the power of its wrong factor that is in the observation.
        log: natural logarithm of what was observed over what is expected.
        sigma: its uncertainty.
        text: for the user.
        sign: of the observation; 0 where it says nothing.
        one_sided: whether only values that are too large say something.
        turned: ``log`` if the sign of the quantities is wrong; None where that is the same.
        wrong_sign: what a reading with the wrong sign costs.
        most: what a wrong size costs at most; less where the expectation itself may fail.
        absolute: whether it compares with known values of the same frames (predictions, energies of
            all electrons), so that a factor for each frame shows as one usual factor.
    """

    powers: Mapping[str, float]
    log: float
    sigma: float
    text: str
    sign: int = 0
    one_sided: bool = False
    turned: float | None = None
    wrong_sign: float = 25.0
    most: float = math.inf
    absolute: bool = False

    def cost(self, reading: Reading) -> float:
        """How badly a reading explains it, in squared standard deviations."""
        expected = sum(p * reading.logs.get(name, 0.0) for name, p in self.powers.items())
        sign = math.prod(reading.signs.get(name, 1) for name in self.powers)
        off = (self.log if sign > 0 or self.turned is None else self.turned) - expected
        if self.one_sided:
            off = max(0.0, off)
        wrong = self.wrong_sign if self.sign == -sign else 0.0
        return min(self.most, (off / self.sigma) ** 2) + wrong


@dataclass(frozen=True)
class Reading:
    """Units that a file may be in.

    Attributes:
        units: their names, by quantity.
        logs: logarithms of eV and Å in the true unit over those in the unit that is assumed.
        prior: what the reading costs before any evidence is seen.
        signs: -1 for quantities whose sign is wrong.
    """

    units: Mapping[str, str] = field(default_factory=dict)
    logs: Mapping[str, float] = field(default_factory=dict)
    prior: float = 0.0
    signs: Mapping[str, int] = field(default_factory=dict)

    def cost(self, evidence: Iterable[Evidence]) -> float:
        """Of all the evidence, and of the prior."""
        return self.prior + sum(piece.cost(self) for piece in evidence)


def readings_of(declared: Declared, quantities: Collection[str]) -> list[Reading]:
    """All combinations of units and signs of some quantities, the assumed one first."""
    choices = []
    for quantity in quantities:
        own = getattr(declared, quantity)
        signs = (1,) if quantity == "energy" else (1, -1)
        choices.append(
            [
                (quantity, unit, _log_of(quantity, unit, own), cost, sign)
                for unit, cost in UNITS[quantity].items()
                for sign in signs
            ]
        )
    return [Reading(), *(_reading(chosen) for chosen in product(*choices))]


def assumed_unit(declared: Declared, quantity: str) -> str:
    """The name of the unit that the options say, or that is taken where they say none."""
    own = getattr(declared, quantity)
    return next((u for u in UNITS[quantity] if abs(_log_of(quantity, u, own)) < 1e-6), "assumed")


def _log_of(quantity: str, unit: str, own: float) -> float:
    return math.log(to_own_unit(_QUANTITIES[quantity], unit) / own)


def _reading(chosen: Sequence[tuple[str, str, float, float, int]]) -> Reading:
    units = {quantity: unit for quantity, unit, *_ in chosen}
    logs = {quantity: log for quantity, _, log, _, _ in chosen}
    prior = sum(cost for *_, cost, _ in chosen) + sum(_SIGN for *_, sign in chosen if sign < 0)
    for quantity, log in logs.items():
        if abs(log) > 1e-6:
            same = units[quantity].startswith(units.get("energy", "?")) and quantity != "energy"
            prior += _SAME_ENERGY if same else _OTHER
        elif abs(logs.get("energy", 0.0)) > 1e-6:
            prior += 1.0  # of two quantities from one program only one is in the assumed unit
    return Reading(units, logs, prior, {quantity: sign for quantity, *_, sign in chosen})


def log_ratio(seen: np.ndarray, expected: np.ndarray, floor: float) -> tuple[float, float, int]:
    """Median of the logarithms of ratios, its uncertainty, and the sign (0: unclear).

    Args:
        seen: values of the data.
        expected: what they should be equal to; where these are in their smaller half, both are
            left out, since noise rules them.
        floor: the least uncertainty.
    """
    large = np.abs(expected) >= np.median(np.abs(expected))
    ratios = seen[large] / expected[large]
    logs = np.log(np.maximum(np.abs(ratios), 1e-12))
    low, middle, high = np.quantile(logs, [0.25, 0.5, 0.75])
    positive = float((ratios > 0).mean())
    sign = 1 if positive > 0.75 else -1 if positive < 0.25 else 0
    return float(middle), max(floor, 0.5 * float(high - low)), sign
