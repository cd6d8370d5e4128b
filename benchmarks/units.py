"""How well inspection finds wrong units: published sets, each label in other units or turned.

Prints a table of sets and mistakes. ``yes``: what is wrong is the only thing named; ``among``: it
is named with others that fit as well; ``asks``: the data cannot tell, and it is among what is
asked; ``WRONG``: only others are named; ``STOP``: an error that should not be there; ``SILENT``.
For labels as they are ``ok``, ``asks``, or ``FALSE`` alarm.

    python benchmarks/units.py ../shared/data/*.xyz --frames 100
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from pet_finetune.config.load import parse_options
from pet_finetune.data.readers import read_structures
from pet_finetune.inspection.evidence import VIRIAL
from pet_finetune.inspection.inspect_data import request_of_files
from pet_finetune.inspection.inspected import Finding, InspectedDataset, InspectedFrame, dataset_of
from pet_finetune.inspection.near_frames import near_pairs, steps
from pet_finetune.inspection.unit_checks import check_units
from pet_finetune.units import to_own_unit

PER_ATOM = "eV an atom"  # as units.PER_ATOM, which older versions lack
ENERGIES = ("kcal/mol", "Hartree", "Ry", PER_ATOM)
FORCES = ("kcal/mol/A", "Hartree/Bohr", "-")
STRESSES = ("GPa", "kbar", "-kbar", VIRIAL, "-")
TOGETHER = {"kcal/mol": ("kcal/mol", "kcal/mol/A"), "Hartree": ("Hartree", "Hartree/Bohr")}
Change = Callable[[InspectedFrame], InspectedFrame]


def mistakes() -> Iterator[tuple[str, str, Change]]:
    """Column, what should be named, and how a frame is spoiled."""
    yield "as is", "", lambda e: e
    for unit in ENERGIES:
        yield f"E {unit}".replace("eV an", "per"), f"energies in {unit}", _energy(unit)
    for unit in FORCES:
        yield f"F {unit}", "force-sign" if unit == "-" else f"forces in {unit}", _force(unit)
    for unit in STRESSES:
        name = "stress-sign" if unit == "-" else f"stresses in {unit.lstrip('-')}"
        yield f"S {unit.replace(VIRIAL, 'virial')}", name, _stress(unit)
    for unit, (energy, force) in TOGETHER.items():
        both = (_energy(energy), _force(force))
        yield f"EF {unit}", f"energies in {energy}", lambda e, both=both: both[1](both[0](e))


def _energy(unit: str) -> Change:
    def change(e: InspectedFrame) -> InspectedFrame:
        factor = 1 / e.size if unit == PER_ATOM else 1 / to_own_unit("energy", unit)
        return e if e.energy is None else replace(e, energy=e.energy * factor)

    return change


def _force(unit: str) -> Change:
    factor = -1.0 if unit == "-" else 1 / to_own_unit("force", unit)
    return lambda e: e if e.forces is None else replace(e, forces=e.forces * factor)


def _stress(unit: str) -> Change:
    plain = unit.lstrip("-")
    sign = -1.0 if unit.startswith("-") or unit == VIRIAL else 1.0
    factor = sign if plain in ("", VIRIAL) else sign / to_own_unit("pressure", plain)

    def change(e: InspectedFrame) -> InspectedFrame:
        volume = e.volume if unit == VIRIAL else 1.0
        return e if e.stress is None else replace(e, stress=e.stress * factor * volume)

    return change


def _differ(one: InspectedFrame, two: InspectedFrame) -> bool:
    return one.energy != two.energy or any(
        a is not None and not np.array_equal(a, b)
        for a, b in ((one.forces, two.forces), (one.stress, two.stress))
    )


def judge(named: str, findings: list[Finding]) -> str:
    """A word for what was found where ``named`` should be."""
    asked = [f for f in findings if f.code == "units-unchecked"]
    told = [f for f in findings if f.code != "units-unchecked"]
    stopped = any(f.severity == "error" for f in told)
    if not named:
        return "STOP" if stopped else "FALSE" if told else "asks" if asked else "ok"
    said = " ".join(f"{f.code} {f.what.split(':')[0]}" for f in told)
    if named in said:
        if stopped and "sign" not in named and "kbar" not in named:
            return "STOP"
        return "among" if " or " in said or len(told) > 1 else "yes"
    open_to = (asked[0].data or {})["open"] if asked else {}
    quantity = {"e": "energy", "f": "force", "s": "stress"}[named[0]]
    units = [*open_to.get(quantity, ()), *open_to.get("all", ())]
    known = "the other sign" if "sign" in named else named.split(" in ")[-1]
    if known in units and not stopped:
        return "asks"
    return "STOP" if stopped else "WRONG" if told else "other?" if asked else "SILENT"


def main() -> None:
    """Read the sets and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--frames", type=int, default=100, help="of each set; 0: all")
    parser.add_argument("--right-only", action="store_true", help="only the labels as they are")
    parser.add_argument("--verbose", action="store_true", help="print what was found, too")
    arguments = parser.parse_args()
    columns = list(mistakes())[: 1 if arguments.right_only else None]
    print(f"{'':28s}" + "".join(f"{name:>13s}" for name, *_ in columns))
    for file in arguments.files:
        raw = request_of_files([str(file)]).raw
        options = parse_options(dict(raw), require_start=False).options
        structures = read_structures(options.training_set[0])
        structures = structures[: arguments.frames or None]
        dataset = dataset_of({"train": structures}, "energy")
        frames = dataset.files[str(file)]
        pairs = {str(file): near_pairs(frames)}
        words, notes = [], []
        for name, named, change in columns:
            changed = tuple(map(change, frames))
            if name != "as is" and not any(map(_differ, changed, frames)):
                words.append("")  # there is no such label
                continue
            other: InspectedDataset = replace(dataset, sets={"train": changed})
            paths = {str(file): steps(changed, pairs[str(file)])}
            found = list(check_units(other, paths, {}, {}, (), pairs))
            words.append(judge(named, found))
            notes += [f"    {name}: {f.severity} {f.code} {f.what} {f.advice}" for f in found]
        print(f"{file.stem[:27]:28s}" + "".join(f"{word:>13s}" for word in words), flush=True)
        if arguments.verbose:
            print("\n".join(notes), flush=True)


if __name__ == "__main__":
    main()
