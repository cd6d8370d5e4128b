"""Whether energies, forces, stresses and positions are in the units they are taken to be in."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product

import numpy as np

from pet_finetune.units import to_own_unit

from .evidence import Declared, Evidence, Reading, best_readings
from .finding import Finding, Frames
from .scales import evidence_of
from .subject import Entry, Subject
from .work import Step, steps

__all__ = ["NO_VIRIAL", "VIRIAL", "check_lengths", "check_units", "in_found_units"]

#: Units that programs write, with what each costs beside the assumed one, before evidence.
_UNITS: Mapping[str, Mapping[str, float]] = {
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
#: A virial under the name of a stress, and the other way round.
VIRIAL, NO_VIRIAL = "eV (a virial)", "eV/A^3 (no virial)"
_QUANTITIES = {"energy": "energy", "force": "force", "stress": "pressure"}
_NAMES = {"energy": "energies", "force": "forces", "stress": "stresses"}
#: Each quantity that is not in the assumed unit costs this, less where it goes with the energy's.
_OTHER, _SAME_ENERGY = 3.0, 0.5
_SIGN = 3.0
#: That a virial stands under the name of a stress, or the other way round.
_OTHER_FORM = 5.0
#: How much better another reading must be, and how near others are worth naming beside it.
_MARGIN, _TIE = 9.0, 3.0
#: How much worse every reading with the other sign must be for a sign to stop a run.
_SURE = 16.0
_MOST_NAMED = 3

#: Bounds on the median of nearest distances over sums of covalent radii. 31 sets of molecules,
#: liquids and solids, some at 30 GPa, lie between 0.78 and 1.04.
_SHORT, _LONG = 0.62, 1.35
_USUAL = (0.7, 1.15)
_NOBLE = (2, 10, 18, 36, 54, 86)


def check_lengths(subject: Subject) -> Iterator[Finding]:
    """Positions in Bohr or nm, by the nearest distances beside the covalent radii (ASE's table)."""
    for file, entries in subject.files.items():
        gaps = [e.gaps[~np.isin(e.numbers, _NOBLE)] for e in entries if e.size > 1]
        found = np.concatenate([*gaps, np.zeros(0)])
        found = found[np.isfinite(found)]
        if len(found) < 4:
            continue
        middle = float(np.median(found))
        if _SHORT <= middle <= _LONG:
            continue
        bohr = to_own_unit("length", "bohr")
        low, high = _USUAL
        fits = [u for u, factor in (("bohr", bohr), ("nm", 10.0)) if low < middle * factor < high]
        looks = f", as for positions in {fits[0]} that are taken to be in Angstrom" if fits else ""
        if fits:
            advice = f"If so, set systems.length_unit: {fits[0]}."
        elif low < middle / bohr < high:
            advice = "They may be in Angstrom already: look at systems.length_unit."
        else:
            advice = "Look at the unit of the positions, and at systems.length_unit."
        yield Finding(
            "warning",
            "length-unit",
            f"the nearest neighbours are {middle:.2f} times as far apart as their covalent radii "
            f"add up to (median; 0.75 to 1.1 is usual){looks}.",
            (Frames(file),),
            "The model would learn the labels of another chemistry.",
            advice,
            {"ratio": middle, "unit": fits[0] if fits else None},
        )


def check_units(
    subject: Subject,
    paths: Mapping[str, Sequence[Step]],
    declared: Mapping[str, Declared],
    more: Mapping[str, Sequence[Evidence]],
    odd: Collection[str] = (),
    pairs: Mapping[str, Sequence[tuple[int, int]]] = {},
) -> Iterator[Finding]:
    """Energies, forces and stresses in other units than assumed, or with the wrong sign.

    Args:
        subject: of which every file is judged by itself.
        paths: between neighbouring frames, by file.
        declared: units by file; eV and Å where a file is missing.
        more: what a foundation says, by file.
        odd: files whose lengths are in doubt, on which all the rest rests.
        pairs: of neighbouring frames, by file.
    """
    for file, entries in subject.files.items():
        if file in odd:
            continue
        own = evidence_of(entries, paths.get(file, ()))
        evidence = [*own, *more.get(file, ())]
        if evidence:
            known = declared.get(file, Declared())
            readings = _readings(known, [q for q in _UNITS if any(q in e.powers for e in evidence)])
            found = best_readings(readings, evidence, _MARGIN, _TIE)
            # Where a wrong sign alone explains it nearly as well, no unit is doubted.
            found = [r for r in found if not any(abs(v) > 1e-6 for v in r.logs.values())] or found
            if found:
                # What is usual in the field is named first among what the data cannot tell apart.
                found.sort(key=lambda r: r.cost(evidence) + r.prior)
                near = _virials(entries, pairs.get(file, ()), own, found, _SURE)
                read = _virials(entries, pairs.get(file, ()), own, found, _TIE)
                turned = [q for q, sign in found[0].signs.items() if sign < 0]
                sure = {q for q in turned if _is_sure(q, readings, evidence, found[0])}
                if any(r.units.get("stress") in (VIRIAL, NO_VIRIAL) for r in near):
                    sure.discard("stress")  # a virial has the other sign
                yield from _tell(file, evidence, known, read, sure)


def _is_sure(
    quantity: str, readings: Sequence[Reading], evidence: Sequence[Evidence], best: Reading
) -> bool:
    """Whether nothing but the wrong sign explains the evidence, whatever the units."""
    others = [reading for reading in readings if reading.signs.get(quantity, 1) > 0]
    return min(reading.cost(evidence) for reading in others) > best.cost(evidence) + _SURE


def _virials(
    entries: Sequence[Entry],
    pairs: Sequence[tuple[int, int]],
    evidence: Sequence[Evidence],
    found: Sequence[Reading],
    tie: float,
) -> list[Reading]:
    """Readings of the stress as a virial, or of a virial as a stress, and others as likely.

    Those that were found come too, unless a virial explains the evidence better by more than
    ``tie``; virials are left out that are worse by more. The factor differs from frame to frame, so
    that the evidence is taken anew.
    """
    least = found[0].cost(evidence)
    made: list[tuple[float, Reading]] = []
    for name, power in ((VIRIAL, -1), (NO_VIRIAL, 1)):
        turned = [
            e if e.stress is None else replace(e, stress=-e.stress * e.volume**power)
            for e in entries
        ]
        volumes = [e.volume for e in entries if e.stress is not None]
        pieces = evidence_of(turned, steps(turned, pairs))
        if not volumes or not pieces:
            continue
        log = power * math.log(float(np.median(volumes)))
        cost = Reading(prior=_OTHER_FORM).cost(pieces)
        if cost <= least + tie:
            made.append((cost, Reading({"stress": name}, {"stress": log}, 0.0, {"stress": -1})))
    made.sort(key=lambda pair: pair[0])
    before = [reading for cost, reading in made if cost < least]
    after = [reading for cost, reading in made if cost >= least]
    others = found if not made or made[0][0] > least - tie else ()
    return [*before, *others, *after]


def _readings(declared: Declared, quantities: Collection[str]) -> list[Reading]:
    """All combinations of units and signs of some quantities, the assumed one first."""
    choices = []
    for quantity in quantities:
        own = getattr(declared, quantity)
        factors = {u: to_own_unit(_QUANTITIES[quantity], u) / own for u in _UNITS[quantity]}
        signs = (1,) if quantity == "energy" else (1, -1)
        choices.append(
            [
                (quantity, unit, math.log(factor), cost, sign)
                for (unit, cost), factor in zip(
                    _UNITS[quantity].items(), factors.values(), strict=True
                )
                for sign in signs
            ]
        )
    made = [Reading(), *(_reading(chosen) for chosen in product(*choices))]
    return made


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


def _tell(
    file: str,
    evidence: Sequence[Evidence],
    declared: Declared,
    found: Sequence[Reading],
    sure: Collection[str],
) -> Iterator[Finding]:
    """The findings that readings make, the best of which is not the assumed one."""
    best = found[0]
    told = "; ".join(piece.text for piece in evidence)
    data = {
        "evidence": [piece.text for piece in evidence],
        "units": dict(best.units),
        "unit": _one_unit(best, declared),
        "readings": [dict(reading.units) for reading in found[:_MOST_NAMED]],
    }
    for quantity, sign in best.signs.items():
        if sign < 0 and best.units[quantity] not in (VIRIAL, NO_VIRIAL):
            # Nothing in the options turns a sign, so that a run is stopped, where it is certain.
            certain = quantity in sure
            yield Finding(
                "error" if certain else "warning",
                f"{quantity}-sign",
                f"the {_NAMES[quantity]} {'seem to' if certain else 'may'} have the wrong sign: "
                f"{told}.",
                (Frames(file),),
                "The model would be pulled one way by them and the other way by the energies.",
                "Forces are minus the derivative of the energy: change the sign if these are "
                "gradients."
                if quantity == "force"
                else "A compressed structure has a negative stress (ASE's sign; VASP prints the "
                "opposite): change the sign, or read it as a `virial`.",
                data,
            )
    if not any(abs(log) > 1e-6 for log in best.logs.values()):
        return
    names = list(dict.fromkeys(_named(reading) for reading in found))[:_MOST_NAMED]
    yield Finding(
        "warning",
        "units",
        f"the numbers look like {' or '.join(name for name in names if name)}: {told}.",
        (Frames(file),),
        "A wrong factor between energies and their derivatives cannot be learned, and a wrong "
        "common factor makes errors and learning rates mean something else.",
        _advice(found, declared),
        {**data, "factors": _factors(found)},
    )


def _factors(found: Sequence[Reading]) -> dict[str, float] | None:
    """What converts the labels to eV and Å, where only one reading is likely."""
    if len(found) > 1:
        return None
    return {quantity: math.exp(log) for quantity, log in found[0].logs.items()}


def in_found_units(subject: Subject, findings: Iterable[Finding]) -> Subject:
    """The labels as they are if the units were found, so that other checks can go on.

    Files whose units are in doubt without it being clear what they are lose their labels.

    Args:
        subject: as it was read.
        findings: of :func:`check_units`.
    """
    factors: dict[str, Mapping[str, float] | None] = {}
    for finding in findings:
        for frames in finding.where:
            known = (finding.data or {}).get("factors") if finding.code == "units" else None
            factors[frames.file] = known
    if not factors:
        return subject
    sets = {
        name: tuple(_converted(e, factors[e.file]) if e.file in factors else e for e in entries)
        for name, entries in subject.sets.items()
    }
    return replace(subject, sets=sets)


def _converted(entry: Entry, factors: Mapping[str, float] | None) -> Entry:
    if factors is None:
        return replace(entry, energy=None, forces=None, stress=None)
    energy, forces, stress = entry.energy, entry.forces, entry.stress
    return replace(
        entry,
        energy=None if energy is None else energy * factors.get("energy", 1.0),
        forces=None if forces is None else forces * factors.get("force", 1.0),
        stress=None if stress is None else stress * factors.get("stress", 1.0),
    )


def _named(reading: Reading) -> str:
    """The units that are not as assumed."""
    parts = [
        f"{_NAMES[quantity]} in {reading.units[quantity]}"
        for quantity, log in reading.logs.items()
        if abs(log) > 1e-6
    ]
    return " and ".join(parts)


def _one_unit(best: Reading, declared: Declared) -> str | None:
    """The unit of the energy with which the options say it all, if there is one."""
    energy = best.units.get("energy")
    if energy is None:
        return None
    factor = math.log(to_own_unit("energy", energy) / declared.energy)
    same = all(abs(log - factor) < 0.02 for log in best.logs.values())
    return energy if same and abs(factor) > 1e-6 else None


def _advice(found: Sequence[Reading], declared: Declared) -> str:
    """How the options say so, if they can; for each of several readings that are as likely."""
    clauses = {_named(one): _clause(one, declared) for one in found[:_MOST_NAMED] if _named(one)}
    if len(clauses) == 1:
        told = f"If so, {next(iter(clauses.values()))}."
    else:
        told = "; ".join(f"for {name}, {clause}" for name, clause in clauses.items())
        told = f"The data cannot tell which: look it up. {told[0].upper()}{told[1:]}."
    if any(r.units.get("stress") == "kbar" and r.logs["stress"] for r in found):
        told += " Check their sign, too: that of VASP's kbar is the opposite of ASE's."
    return told


def _clause(reading: Reading, declared: Declared) -> str:
    """What to change in the options if a reading is true."""
    energy = _one_unit(reading, declared)
    if energy is not None:
        return f"set unit: {energy} for the target: all that belongs to it is converted"
    stress = reading.units.get("stress")
    if stress == VIRIAL:
        return "name them in the options as virial instead of stress: virial: {key: ...}"
    if stress == NO_VIRIAL:
        return "name them in the options as stress instead of virial: stress: {key: ...}"
    options = {"energy": "unit", "force": "forces.unit", "stress": "stress.unit"}
    changed = [q for q, log in reading.logs.items() if abs(log) > 1e-6]
    said = ", ".join(f"{options[q]}: {reading.units[q]}" for q in changed)
    return f"set {said} for the target"
