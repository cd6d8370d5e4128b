"""Elements, units and completeness of LAMMPS files, which ASE guesses or does not look at."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import atomic_masses, atomic_numbers, chemical_symbols

from pet_finetune.errors import DataError
from pet_finetune.log import get_logger

from .symbols import element_of
from .text import Content

_logger = get_logger(__name__)

#: ASE's names of the formats.
LAMMPS = frozenset({"lammps-data", "lammps-dump-text", "lammps-dump-binary"})
_UNITS = ("metal", "real", "electron", "si", "cgs", "micro", "nano")
# u within which a mass is that of an element; where two are as near, none is taken.
_NEAR = 0.1
_ISOTOPES = {1: (2.014, 3.016)}


def looks_like_lammps_data(text: str) -> bool:
    """Whether a text begins as a data file does: so many atoms, so many types, a box."""
    head = text[:4000]
    return all(
        re.search(pattern, head, re.M)
        for pattern in (r"^\s*\d+\s+atoms\b", r"^\s*\d+\s+atom\s+types\b", r"\bxlo\s+xhi|\bavec\b")
    )


def lammps_units(content: Content) -> dict[str, Any]:
    """The argument for ASE's reader with the units that a file states.

    Raises:
        DataError: units that cannot be converted.
    """
    text, source = content.text, content.source
    if content.kind == "lammps-data":
        found = re.search(r"\bunits\s*=\s*(\w+)", text.split("\n", 1)[0])
    else:
        found = re.search(r"^ITEM: UNITS\s*\n\s*(\w+)", text, re.M)
    if found is None:
        return {}
    units = found[1]
    if units not in _UNITS:
        raise DataError(
            f"{source} is in LAMMPS's units {units!r}, which have no meaning for atoms of "
            f"elements. Readable: {', '.join(_UNITS)}."
        )
    if units != "metal":
        _logger.info("%s says that it is in LAMMPS's units %r; they are converted", source, units)
    return {"units": units}


def with_elements(content: Content, frames: Sequence[Atoms], types: Mapping[int, str]) -> None:
    """Give the atoms of a LAMMPS file the elements that are meant, and check that all are there.

    Args:
        content: of the file.
        frames: as ASE read them, changed in place.
        types: elements by type of atom, as the user gave them.

    Raises:
        DataError: nothing says which type is which element, or a frame is cut off.
    """
    kind, text, source = content.kind, content.text, content.source
    if kind == "lammps-dump-text":
        _check_complete(text, frames, source)
    columns = re.search(r"^ITEM: ATOMS (.*)$", text, re.M)
    names = columns[1].split() if columns else []
    if not types and kind == "lammps-data":
        types = _types_of_data(text, source)
    if not types and "mass" in names and "element" not in names:
        _check_masses(text, names, source)
    elif not types and "element" not in names:
        raise _unknown_types(source, sorted({int(t) for a in frames for t in _types(a)}))
    for atoms in frames:
        if types:
            _set_elements(atoms, types, source)
        if kind != "lammps-data" and atoms.calc is not None:
            # ASE puts an energy of zero beside the forces of a dump.
            results = {k: v for k, v in atoms.calc.results.items() if k != "energy"}
            atoms.calc = SinglePointCalculator(atoms, **results)


def _set_elements(atoms: Atoms, types: Mapping[int, str], source: str) -> None:
    own = _types(atoms)
    missing = sorted({int(t) for t in own if int(t) not in types})
    if missing:
        raise DataError(
            f"{source} has atoms of type {', '.join(map(str, missing))}, and the types given are "
            f"{dict(types)}. Name the elements of all types."
        )
    atoms.numbers = np.array([atomic_numbers[types[int(t)]] for t in own], dtype=int)


def _types(atoms: Atoms) -> np.ndarray:
    return np.asarray(atoms.arrays.get("type", atoms.numbers))


def _unknown_types(source: str, types: Sequence[int]) -> DataError:
    shown = ", ".join(map(str, types))
    example = ", ".join(f"{t}: {s}" for t, s in zip(types, ("O", "H", "Na", "Cl"), strict=False))
    return DataError(
        f"{source} has types of atoms ({shown}) and does not say which elements they are. Say it: "
        f"`types: {{{example}}}` beside `read_from` of the systems, or on the command line "
        f"--types {example.replace(': ', '=').replace(', ', ',')}. In LAMMPS, `dump_modify "
        "... element O H` with a column `element`, or the masses of a data file, say it too."
    )


def _check_complete(text: str, frames: Sequence[Atoms], source: str) -> None:
    stated = list(re.finditer(r"^ITEM: NUMBER OF ATOMS\s*\n\s*(\d+)", text, re.M))
    for number, (found, atoms) in enumerate(zip(stated, frames, strict=False)):
        if int(found[1]) != len(atoms):
            line = text.count("\n", 0, found.start()) + 1
            raise DataError(
                f"{source}: frame {number} says on line {line + 1} that it has {found[1]} atoms, "
                f"and {len(atoms)} are there: it is cut off. Remove it, or write the file again."
            )


def _check_masses(text: str, names: Sequence[str], source: str) -> None:
    """Masses in a column stand for one element each."""
    column = names.index("mass")
    for block in re.split(r"^ITEM: ATOMS .*\n", text, flags=re.M)[1:]:
        rows = block.split("\nITEM:", 1)[0].split("\n")
        for mass in {row.split()[column] for row in rows if len(row.split()) > column}:
            if _element_of_mass(float(mass)) is None:
                raise DataError(
                    f"{source}: the mass {mass} in column 'mass' is that of no element, or of "
                    "several. Name the elements of the types: `types: {1: O, ...}` beside "
                    "`read_from` of the systems, or --types 1=O,..."
                )


def _types_of_data(text: str, source: str) -> dict[int, str]:
    """Elements by type, from the labels, comments and masses of a data file."""
    labels = _section(text, "Atom Type Labels")
    types = {}
    for number, (label, _) in labels.items():
        found = element_of(label)
        if found is None:
            raise _unknown_types(source, sorted(labels))
        types[number] = found[0]
    masses = _section(text, "Masses")
    if types or not masses:
        return types
    if {float(mass) for mass, _ in masses.values()} == {1.0}:
        raise _unknown_types(source, sorted(masses))  # reduced units
    for number, (mass, comment) in masses.items():
        symbol = _element_of_mass(float(mass))
        said = element_of(comment.split()[0]) if comment else None
        if symbol is None and said is not None and comment.split()[0] in atomic_numbers:
            symbol = said[0]
        if symbol is None:
            raise DataError(
                f"{source}: type {number} has the mass {mass}, which is that of no element, or of "
                "several. Name the elements of the types: `types: {1: O, ...}` beside `read_from` "
                "of the systems, or --types 1=O,..."
            )
        types[number] = symbol
    return types


def with_type_numbers(text: str) -> str:
    """A data file with numbers in the place of its labels of types, which ASE does not know."""
    labels = {label: str(n) for n, (label, _) in _section(text, "Atom Type Labels").items()}
    if not labels:
        return text
    # In the rows of atoms behind one or two whole numbers, in those of masses in the first place.
    return re.sub(
        r"^([ \t]*(?:\d+[ \t]+){0,2})(\S+)(?=[ \t]+[-+.\d])",
        lambda found: found[1] + labels.get(found[2], found[2]),
        text,
        flags=re.M,
    )


def _section(text: str, name: str) -> dict[int, tuple[str, str]]:
    """Value and comment by number, of a section of a data file."""
    found = re.search(rf"^\s*{name}\s*(?:#.*)?\n\s*\n((?:\s*\d+\s+\S+.*\n?)+)", text, re.M)
    values = {}
    for row in found[1].split("\n") if found else ():
        content, _, comment = row.partition("#")
        words = content.split()
        if len(words) >= 2:
            values[int(words[0])] = (words[1], comment.strip())
    return values


def _element_of_mass(mass: float) -> str | None:
    """The only element of that mass in u."""
    near = [z for z, own in enumerate(atomic_masses) if z and abs(own - mass) < _NEAR]
    near += [z for z, own in _ISOTOPES.items() if min(abs(m - mass) for m in own) < 0.01]
    return chemical_symbols[near[0]] if len(near) == 1 else None
