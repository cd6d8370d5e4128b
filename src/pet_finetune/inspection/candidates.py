"""Which units fit the evidence: combinations of units and signs, and labels in another form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .evidence import Evidence, Reading
from .pair_model import PairModel
from .scales import evidence_of
from .subject import Entry
from .work import FrameStep, steps

__all__ = [
    "FORMS",
    "NO_VIRIAL",
    "PER_ATOM",
    "TURNED",
    "VIRIAL",
    "Candidate",
    "best_of",
    "forms_of",
    "is_sure",
    "undecided",
]

#: What is no unit: a virial under the name of a stress and the other way round, and energies that
#: were divided by the number of atoms.
VIRIAL, NO_VIRIAL, PER_ATOM = "eV (a virial)", "eV/A^3 (no virial)", "eV an atom"
FORMS = (VIRIAL, NO_VIRIAL, PER_ATOM)
#: What such a form costs before evidence.
_OTHER_FORM = 5.0
#: How much better another reading must be, and how near others are worth naming beside it.
_MARGIN, _TIE = 9.0, 3.0
#: How much worse every reading with the other sign must be for a sign to stop a run.
_SURE = 16.0
#: How much worse the units that programs write must explain the evidence than those that are
#: assumed, for these to be believed.
_EXCLUDED = 4.0
TURNED = "the other sign"
_WRITTEN = {
    "energy": ("kcal/mol", "kJ/mol", "Hartree", "Ry", "eV"),
    "force": ("kcal/mol/A", "kJ/mol/A", "Hartree/Bohr", "Ry/Bohr", "eV/A"),
    "stress": ("GPa", "kbar", "Hartree/Bohr^3", "Ry/Bohr^3", "eV/A^3"),
}


@dataclass(frozen=True)
class Candidate:
    """A reading, and how badly it explains the evidence, with what it cost before."""

    reading: Reading
    cost: float

    @property
    def weight(self) -> float:
        """How badly it explains the evidence alone."""
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
    return all(reading.units[q] in _WRITTEN[q] for q in _changed(reading))


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


def forms_of(
    entries: Sequence[Entry],
    path: Sequence[FrameStep],
    pairs: Sequence[tuple[int, int]],
    model: PairModel | None,
    evidence: Sequence[Evidence],
) -> list[Candidate]:
    """Readings of the stress as a virial, of a virial as a stress, of energies as those of an atom.

    The factor differs from frame to frame, so that the evidence is taken anew.
    """
    made = []
    volumes = [e.volume for e in entries if e.stress is not None and e.volume > 0.0]
    for name, power in ((VIRIAL, -1), (NO_VIRIAL, 1)) if volumes else ():
        turned = [
            e
            if e.stress is None or not e.volume
            else replace(e, stress=-e.stress * e.volume**power)
            for e in entries
        ]
        log = power * math.log(float(np.median(volumes)))
        reading = Reading({"stress": name}, {"stress": log}, _OTHER_FORM, {"stress": -1})
        pieces = evidence_of(turned, steps(turned, pairs), model, ("stress",))
        made.append(_made(reading, pieces, evidence))
    sizes = [e.size for e in entries if e.energy is not None]
    if sizes and max(sizes) > 1:
        whole = [e if e.energy is None else replace(e, energy=e.energy * e.size) for e in entries]
        grown = [replace(step, energy=step.energy * step.atoms) for step in path]
        log = math.log(float(np.median(sizes)))
        reading = Reading({"energy": PER_ATOM}, {"energy": log}, _OTHER_FORM)
        made.append(_made(reading, evidence_of(whole, grown, model, ("energy",)), evidence))
    return made


def _made(reading: Reading, pieces: Sequence[Evidence], evidence: Sequence[Evidence]) -> Candidate:
    """A form, by evidence that was taken anew, and the rest of it as it was.

    What compares with known values changes by the factor of a usual frame.
    """
    (quantity,) = reading.units
    own = sum(piece.cost(Reading()) for piece in pieces if not piece.absolute)
    rest = sum(e.cost(Reading()) for e in evidence if quantity not in e.powers)
    known = sum(e.cost(reading) for e in evidence if quantity in e.powers and e.absolute)
    return Candidate(reading, reading.prior + own + rest + known)


def undecided(
    best: Candidate,
    readings: Sequence[Candidate],
    forms: Sequence[Candidate],
    held: Sequence[str],
) -> dict[str, list[str]]:
    """What each quantity may be instead of what it is taken to be; under ``all`` what all may be.

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
            and reading.units[quantity] in _WRITTEN[quantity]
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
    together = [unit for unit in together if unit in _WRITTEN["energy"]]
    if together and not found and not said:
        found["all"] = list(dict.fromkeys(together))
    return found


def _same(one: Reading, two: Reading, quantity: str) -> bool:
    """Whether two readings agree about a quantity."""
    off = one.logs.get(quantity, 0.0) - two.logs.get(quantity, 0.0)
    return abs(off) < 1e-6 and one.signs.get(quantity, 1) == two.signs.get(quantity, 1)
