"""How well inspection finds wrong units: published sets, each label in other units or turned.

Prints a table of set and variant: ``right`` (the unit or sign is the only one named), ``asked`` (it
is among several that are named), ``wrong`` (only others are named), ``silent``, ``STOPPED`` (an
error that should not be there); for labels as they are ``ok`` or the false alarm.

    python benchmarks/units.py ../shared/data/*.xyz --frames 100
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from pet_finetune.config.load import parse_options
from pet_finetune.data.readers import read_structures
from pet_finetune.inspection.finding import Finding
from pet_finetune.inspection.inspect import request_of_files
from pet_finetune.inspection.subject import Entry, Subject, subject_of
from pet_finetune.inspection.units import VIRIAL, check_units
from pet_finetune.inspection.work import near_pairs, steps
from pet_finetune.units import to_own_unit

_STRESS = ("GPa", "kbar", "Hartree/Bohr^3")
_FORCE = ("kcal/mol/A", "Hartree/Bohr", "eV/Bohr")
_ENERGY = ("kcal/mol", "Hartree")


def _variants(entries: tuple[Entry, ...]) -> Iterator[tuple[str, tuple[Entry, ...]]]:
    """Names of what is right, and the entries that are made so."""
    yield "as it is", entries
    for unit in _ENERGY:
        factor = 1 / to_own_unit("energy", unit)
        yield (
            f"energies in {unit}",
            tuple(replace(e, energy=e.energy and e.energy * factor) for e in entries),
        )
    if any(e.forces is not None for e in entries):
        for unit in (*_FORCE, "-"):
            factor = -1.0 if unit == "-" else 1 / to_own_unit("force", unit)
            name = "force-sign" if unit == "-" else f"forces in {unit}"
            yield (
                name,
                tuple(
                    e if e.forces is None else replace(e, forces=e.forces * factor) for e in entries
                ),
            )
    if any(e.stress is not None for e in entries):
        for unit in (*_STRESS, "-", "-kbar", VIRIAL):
            plain = unit.lstrip("-")
            sign = -1.0 if unit.startswith("-") or unit == VIRIAL else 1.0
            factor = sign if plain in ("", VIRIAL) else sign / to_own_unit("pressure", plain)
            name = "stress-sign" + (f" {plain}" if plain else "")
            if not unit.startswith("-"):
                name = f"stresses in {unit}"
            yield (
                name,
                tuple(
                    e
                    if e.stress is None
                    else replace(
                        e, stress=e.stress * factor * (e.volume if unit == VIRIAL else 1.0)
                    )
                    for e in entries
                ),
            )


def _judge(name: str, findings: list[Finding]) -> str:
    """A word for what was found where ``name`` is right."""
    stopped = any(f.severity == "error" for f in findings)
    if name == "as it is":
        return "ok" if not findings else "STOPPED" if stopped else "FALSE"
    if not findings:
        return "silent"
    said = " ".join(f"{f.code} {f.what.split(':')[0]}" for f in findings)
    known = name.split(" ")[0] if "sign" in name else name
    if name == "stress-sign kbar" and known not in said:
        hinted = "stresses in kbar" in said and any("sign" in f.advice for f in findings)
        return "STOPPED" if stopped else "asked" if hinted else "wrong"
    if known not in said:
        return "STOPPED" if stopped else "wrong"
    if stopped and "sign" not in name:
        return "STOPPED"
    several = " or " in said or len(findings) > 1
    return "asked" if several and "sign " not in name else "right"


def main() -> None:
    """Read the sets and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--frames", type=int, default=100, help="of each set; 0: all")
    parser.add_argument("--right-only", action="store_true", help="only the labels as they are")
    parser.add_argument("--verbose", action="store_true", help="print what was found, too")
    arguments = parser.parse_args()
    for file in arguments.files:
        raw = request_of_files([str(file)]).raw
        options = parse_options(dict(raw), require_start=False).options
        structures = read_structures(options.training_set[0])
        structures = structures[: arguments.frames or None]
        subject = subject_of({"train": structures}, "energy")
        entries = subject.files[str(file)]
        pairs = {str(file): near_pairs(entries)}
        print(f"{file.stem} ({len(entries)})", flush=True)
        for name, changed in _variants(tuple(entries)):
            other: Subject = replace(subject, sets={"train": changed})
            paths = {str(file): steps(changed, pairs[str(file)])}
            found = list(check_units(other, paths, {}, {}, (), pairs))
            told = "; ".join(f"{f.severity} {f.code} {f.what}" for f in found)
            print(f"  {name:30s} {_judge(name, found):8s} {told if arguments.verbose else ''}")
            if name == "as it is" and arguments.right_only:
                break


if __name__ == "__main__":
    main()
