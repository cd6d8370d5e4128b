"""Which units explain what was seen: each piece of evidence votes with its own uncertainty."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np

from pet_finetune.units import to_own_unit

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
    """Declared units of the file in eV and Å; labels were multiplied by them.

    Forces and stresses without a unit of their own follow from energy and length.

    Attributes:
        energy, length, own_force, own_stress: eV, Å, eV/Å and eV/Å³ in one unit.
        named: whether the options name the unit of the energy, so that it is no assumption.
        converted: whether reading converted the units of a program's output, so that they are sure.
    """

    energy: float = 1.0
    length: float = 1.0
    own_force: float | None = None
    own_stress: float | None = None
    named: bool = False
    converted: bool = False

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
        """Deviation of a reading from the evidence, in squared standard deviations."""
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
        """Misfit of a reading to all evidence and the prior."""
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
    """The unit in the options, or the assumed one."""
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


def digits(value: float) -> str:
    """A number without an exponent where it fits."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


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


#: What is no unit: a virial under the name of a stress and the other way round, and energies that
#: were divided by the number of atoms.
VIRIAL, NO_VIRIAL, PER_ATOM = "eV (a virial)", "eV/A^3 (no virial)", "eV an atom"
FORMS = (VIRIAL, NO_VIRIAL, PER_ATOM)

#: How much better another reading must be, and how near others are worth naming beside it.
_MARGIN, _TIE = 9.0, 3.0
#: How much worse every reading with the other sign must be for a sign to stop a run.
_SURE = 16.0
#: How much worse the units that programs write must explain the evidence than those that are
#: assumed, for these to be believed.
_EXCLUDED = 4.0
TURNED = "the other sign"


@dataclass(frozen=True)
class Candidate:
    """A reading, and how badly it explains the evidence, with what it cost before."""

    reading: Reading
    cost: float

    @property
    def weight(self) -> float:
        """Deviation from the evidence alone."""
        return self.cost - self.reading.prior


def best_of(readings: Sequence[Candidate], forms: Sequence[Candidate]) -> list[Candidate]:
    """The candidates that explain the evidence best, if they do so better than what is assumed.

    What is usual in the field comes first among what the data cannot tell apart.
    """
    least = min((*readings, *forms), key=lambda c: c.cost)
    if least.cost + _MARGIN >= readings[0].cost:
        return []
    near = [c for c in readings if c.cost <= least.cost + _TIE]
    # Where a wrong sign alone explains it nearly as well, no unit is doubted.
    signs = [c for c in near if not _changed(c.reading)]
    if signs:
        return sorted(signs, key=lambda c: c.cost + c.reading.prior)
    first = min(near, key=lambda c: c.cost + c.reading.prior, default=least)
    # Units that programs write are named too if only their being rarer speaks against them.
    changed = _changed(first.reading)
    near += [
        c
        for c in readings
        if c not in near and _changed(c.reading) == changed and _is_written(c.reading)
        if c.weight <= least.weight + _EXCLUDED
    ]
    if any(_is_written(c.reading) for c in near):
        near = [c for c in near if _is_written(c.reading)]
    fewest = min((len(_changed(c.reading)) for c in near), default=0)
    near = [c for c in near if len(_changed(c.reading)) == fewest or _is_of_one(c.reading)]
    near.sort(key=lambda c: c.cost + c.reading.prior)
    others = [c for c in forms if c.weight <= least.weight + _EXCLUDED]
    before = [c for c in others if not near or c.cost < near[0].cost - _TIE]
    return [*before, *near, *(c for c in others if c not in before)]


def _is_written(reading: Reading) -> bool:
    """Whether all units are those that programs write."""
    return all(_is_usual(q, reading.units[q]) for q in _changed(reading))


def _is_usual(quantity: str, unit: str) -> bool:
    return UNITS[quantity].get(unit) == 0


def _is_of_one(reading: Reading) -> bool:
    """Whether energies and forces are both in the units of one program."""
    unit, changed = reading.units.get("energy", ""), _changed(reading)
    if not {"energy", "force"} <= set(changed) or min(reading.signs.values()) < 0:
        return False
    return all(reading.units[q].startswith(f"{unit}/") for q in changed if q != "energy")


def _changed(reading: Reading) -> list[str]:
    """Quantities that are not in the assumed unit."""
    return [quantity for quantity, log in reading.logs.items() if abs(log) > 1e-6]


def is_sure(quantity: str, candidates: Sequence[Candidate], best: Candidate) -> bool:
    """Whether nothing but the wrong sign explains the evidence, whatever the units."""
    others = [
        c
        for c in candidates
        if c.reading.signs.get(quantity, 1) > 0 or c.reading.units.get(quantity) in FORMS
    ]
    return min(c.cost for c in others) > best.cost + _SURE


def undecided(
    best: Candidate,
    readings: Sequence[Candidate],
    forms: Sequence[Candidate],
    held: Sequence[str],
) -> dict[str, list[str]]:
    """Alternative units of each quantity; under ``all`` those of all together.

    That are units that programs write, or the other sign, which the evidence does not exclude.
    """
    said = set(_changed(best.reading)) | {q for q, s in best.reading.signs.items() if s < 0}
    near = [c for c in readings if c.weight <= best.weight + _EXCLUDED]
    found: dict[str, list[str]] = {}
    for quantity in held:
        if quantity in said:
            continue
        others = [q for q in held if q != quantity]
        alike = [c.reading for c in near if all(_same(c.reading, best.reading, q) for q in others)]
        names = [
            reading.units[quantity]
            for reading in alike
            if quantity in reading.units
            and reading.signs[quantity] > 0
            and quantity in _changed(reading)
            and _is_usual(quantity, reading.units[quantity])
        ]
        if not said:
            names += [
                c.reading.units[quantity]
                for c in forms
                if c.weight <= best.weight + _EXCLUDED
                and c.reading.units.get(quantity) in (VIRIAL, PER_ATOM)
            ]
        if any(r.signs.get(quantity, 1) < 0 and quantity not in _changed(r) for r in alike):
            names.append(TURNED)
        if names:
            found[quantity] = list(dict.fromkeys(names))
    together = [r.units["energy"] for r in (c.reading for c in near) if _is_of_one(r)]
    together = [unit for unit in together if _is_usual("energy", unit)]
    if together and not found and not said:
        found["all"] = list(dict.fromkeys(together))
    return found


def _same(one: Reading, two: Reading, quantity: str) -> bool:
    """Whether two readings agree about a quantity."""
    off = one.logs.get(quantity, 0.0) - two.logs.get(quantity, 0.0)
    return abs(off) < 1e-6 and one.signs.get(quantity, 1) == two.signs.get(quantity, 1)
