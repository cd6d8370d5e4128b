"""Check of the assumed units of energies, forces and stresses."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pet_finetune.config.target import expand_gradient
from pet_finetune.units import to_own_unit

from .evidence import (
    NO_VIRIAL,
    PER_ATOM,
    TURNED,
    UNITS,
    VIRIAL,
    Candidate,
    Declared,
    Evidence,
    Reading,
    assumed_unit,
    best_of,
    is_sure,
    readings_of,
    undecided,
)
from .inspected import Finding, Frames, InspectedDataset, InspectedFrame
from .near_frames import FrameStep, steps
from .pair_model import PairModel, fit_pairs
from .scales import evidence_of

_NAMES = {"energy": "energies", "force": "forces", "stress": "stresses"}
_MOST_NAMED = 4


def check_units(
    dataset: InspectedDataset,
    paths: Mapping[str, Sequence[FrameStep]],
    declared: Mapping[str, Declared],
    more: Mapping[str, Sequence[Evidence]],
    odd: Collection[str] = (),
    pairs: Mapping[str, Sequence[tuple[int, int]]] = {},
) -> Iterator[Finding]:
    """Energies, forces and stresses in other units than assumed, or with the wrong sign.

    Units that the data cannot tell are asked about.

    Args:
        dataset: of which every file is judged by itself.
        paths: between neighbouring frames, by file.
        declared: units by file; eV and Å where a file is missing.
        more: what a foundation says, by file.
        odd: files whose lengths are in doubt, on which all the rest rests.
        pairs: of neighbouring frames, by file.
    """
    asked: dict[tuple[str, bool], tuple[list[str], dict[str, list[str]]]] = {}
    for file, frames in dataset.files.items():
        held = [q for q in UNITS if any(_label(e, q) is not None for e in frames)]
        if file in odd or not held:
            continue
        known = declared.get(file, Declared())
        model = fit_pairs(frames)
        evidence = [*evidence_of(frames, paths.get(file, ()), model), *more.get(file, ())]
        readings = [Candidate(r, r.cost(evidence)) for r in readings_of(known, held)]
        forms = forms_of(frames, paths.get(file, ()), pairs.get(file, ()), model, evidence)
        found = best_of(readings, forms)
        best = found[0] if found else readings[0]
        if found:
            sure = {q for q, sign in best.reading.signs.items() if sign < 0}
            sure = {q for q in sure if is_sure(q, [*readings, *forms], best)}
            yield from _tell(file, evidence, known, [c.reading for c in found], sure)
        open_to = undecided(best, readings, forms, held)
        if open_to and not known.converted:
            files, *_ = asked.setdefault((repr(open_to), known.named), ([], open_to))
            files.append(file)
    for (_, named), (files, open_to) in asked.items():
        yield _ask(files, open_to, named)


def _label(frame: InspectedFrame, quantity: str) -> object:
    return {"energy": frame.energy, "force": frame.forces, "stress": frame.stress}[quantity]


def _ask(files: Sequence[str], open_to: Mapping[str, Sequence[str]], named: bool) -> Finding:
    """The question which units are right, where the data cannot tell."""
    clauses = []
    for quantity, names in open_to.items():
        what = "all labels" if quantity == "all" else f"the {_NAMES[quantity]}"
        units = [name for name in names if name != TURNED]
        said = [f"be in {' or '.join(units)}"] if units else []
        said += [f"have {TURNED}"] if len(units) < len(names) else []
        clauses.append(f"{what} may {' or '.join(said)}")
    taken = "the units of the options" if named else "eV and Angstrom"
    return Finding(
        "note" if named else "warning",
        "units-unchecked",
        f"the data cannot tell all units: {'; '.join(clauses)}. They are taken to be in {taken} "
        "with the usual sign.",
        tuple(map(Frames, files)),
        "A wrong factor or sign between energies and their derivatives cannot be learned.",
        "Look up what the program writes that made them, and say it in the options (unit, "
        "forces.unit, stress.unit of the target); with a foundation (-c) more can be checked.",
        {"open": {quantity: list(names) for quantity, names in open_to.items()}},
    )


def _tell(
    file: str,
    evidence: Sequence[Evidence],
    declared: Declared,
    found: Sequence[Reading],
    sure: Collection[str],
) -> Iterator[Finding]:
    """The findings that readings make, the best of which is not the assumed one."""
    best = found[0]
    # What speaks for the assumed units as much as for others is no reason.
    against = [e for e in evidence if e.cost(Reading()) > 1.0]
    told = "; ".join(piece.text for piece in against or evidence)
    data = {
        "evidence": [piece.text for piece in evidence],
        "units": _all_units(best, found, declared),
        "unit": _one_unit(best, declared),
        "readings": [_all_units(reading, found, declared) for reading in found[:_MOST_NAMED]],
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
                "They contradict the energies, so the model can learn neither.",
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


def _all_units(reading: Reading, found: Sequence[Reading], declared: Declared) -> dict[str, str]:
    """Units of the quantities of one reading."""
    quantities = dict.fromkeys(quantity for one in found for quantity in one.units)
    return {q: reading.units.get(q) or assumed_unit(declared, q) for q in quantities}


def _factors(found: Sequence[Reading]) -> dict[str, float] | None:
    """Factors that convert the labels to eV and Å, if only one reading is likely."""
    several = len({tuple(sorted(one.logs.items())) for one in found}) > 1
    if several or PER_ATOM in found[0].units.values():
        return None
    return {quantity: math.exp(log) for quantity, log in found[0].logs.items()}


def in_found_units(dataset: InspectedDataset, findings: Iterable[Finding]) -> InspectedDataset:
    """The labels in the units found, for the other checks.

    Files whose units are in doubt without it being clear what they are lose their labels.
    """
    factors: dict[str, Mapping[str, float] | None] = {}
    for finding in findings:
        for frames in finding.where:
            if finding.code != "units-unchecked":
                known = (finding.data or {}).get("factors") if finding.code == "units" else None
                factors[frames.file] = known
    if not factors:
        return dataset
    sets = {
        name: tuple(_converted(e, factors[e.file]) if e.file in factors else e for e in frames)
        for name, frames in dataset.sets.items()
    }
    return replace(dataset, sets=sets)


def _converted(frame: InspectedFrame, factors: Mapping[str, float] | None) -> InspectedFrame:
    if factors is None:
        return replace(frame, energy=None, forces=None, stress=None)
    energy, forces, stress = frame.energy, frame.forces, frame.stress
    return replace(
        frame,
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
    """The single unit of the energy that describes all labels, if any."""
    energy = best.units.get("energy")
    if energy is None or energy == PER_ATOM:
        return None
    factor = math.log(to_own_unit("energy", energy) / declared.energy)
    same = all(abs(log - factor) < 0.02 for log in best.logs.values())
    return energy if same and abs(factor) > 1e-6 else None


def _advice(found: Sequence[Reading], declared: Declared) -> str:
    """Advice for the options, for each of several equally likely readings."""
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
    """Change of the options if a reading is true."""
    energy = _one_unit(reading, declared)
    if reading.units.get("energy") == PER_ATOM:
        return "multiply them by the number of atoms, or give the key of the total energies"
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


#: What such a form costs before evidence.
_OTHER_FORM = 5.0


def forms_of(
    frames: Sequence[InspectedFrame],
    path: Sequence[FrameStep],
    pairs: Sequence[tuple[int, int]],
    model: PairModel | None,
    evidence: Sequence[Evidence],
) -> list[Candidate]:
    """Readings of the stress as a virial, of a virial as a stress, of energies as those of an atom.

    The factor differs from frame to frame, so that the evidence is taken anew.
    """
    made = []
    volumes = [e.volume for e in frames if e.stress is not None and e.volume > 0.0]
    for name, power in ((VIRIAL, -1), (NO_VIRIAL, 1)) if volumes else ():
        turned = [
            e
            if e.stress is None or not e.volume
            else replace(e, stress=-e.stress * e.volume**power)
            for e in frames
        ]
        log = power * math.log(float(np.median(volumes)))
        reading = Reading({"stress": name}, {"stress": log}, _OTHER_FORM, {"stress": -1})
        pieces = evidence_of(turned, steps(turned, pairs), model, ("stress",))
        made.append(_made(reading, pieces, evidence))
    sizes = [e.size for e in frames if e.energy is not None]
    if sizes and max(sizes) > 1:
        whole = [e if e.energy is None else replace(e, energy=e.energy * e.size) for e in frames]
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


def with_found_units(section: Any, findings: Sequence[Finding]) -> Any:
    """A section with the names and units that were found, or questions that stop a run."""
    if isinstance(section, list):
        return [with_found_units(one, findings) for one in section]
    if not isinstance(section, dict) or not isinstance(section.get("systems"), dict):
        return section
    file = section["systems"].get("read_from")
    for finding in findings:
        if file not in {frames.file for frames in finding.where} or not finding.data:
            continue
        if finding.code == "length-unit":
            section["systems"]["length_unit"] = finding.data["unit"] or _question(["angstrom"])
        for target in section.get("targets", {}).values():
            if not isinstance(target, dict):
                continue
            if finding.code == "units":
                _write_units(target, finding.data)
            elif finding.code == "several-labels":
                kind, keys = finding.data["kind"], finding.data["keys"]
                place = target if kind == "energy" else _gradient(target, kind)
                place["key"] = _question(keys)
                if kind != "energy":
                    place["mode"] = "on"  # else a run would go on without
    return section


def _question(choices: Sequence[str]) -> str:
    """A value that no option takes, so that a run stops until one of them is chosen."""
    return f"{' or '.join(dict.fromkeys(choices))}?"


def _gradient(target: dict[str, Any], kind: str) -> dict[str, Any]:
    """The section of forces, stress or virial, in full, in the target."""
    given = expand_gradient(target.get(kind, "auto"))
    target[kind] = dict(given) if isinstance(given, Mapping) else {"mode": "auto"}
    found: dict[str, Any] = target[kind]
    return found


def _write_units(target: dict[str, Any], data: Mapping[str, Any]) -> None:
    """The units of a finding; a question where several explain the numbers as well."""
    if data.get("unit") and len({_key(one) for one in data["readings"]}) == 1:
        target["unit"] = data["unit"]  # which says it all
        return
    for quantity in data["units"]:
        units = list(dict.fromkeys(one[quantity] for one in data["readings"]))
        said = units[0] if len(units) == 1 else _question(units)
        if quantity == "energy":
            # No option multiplies by the number of atoms.
            target["unit"] = _question(units) if PER_ATOM in units else said
        elif quantity == "force":
            _gradient(target, "forces")["unit"] = said
        elif said == VIRIAL:
            stress = _gradient(target, "stress")
            target["virial"] = {"key": stress.get("key") or "stress", "mode": stress["mode"]}
            target["stress"] = "off"
        elif said == NO_VIRIAL:
            virial = _gradient(target, "virial")
            target["stress"] = {"key": virial.get("key") or "virial", "mode": virial["mode"]}
            target["virial"] = "off"
        else:
            used = "virial" if _gradient(dict(target), "stress")["mode"] == "off" else "stress"
            if used == "stress" or len(units) > 1:
                _gradient(target, used)["unit"] = said


def _key(units: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(units.items())
