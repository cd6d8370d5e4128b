"""Elements of atoms in files, from labels, names and LAMMPS types.

ASE takes the first letters of a name that are some element: chlorine becomes carbon, and the
massless site of a water model tungsten. A label has one meaning here or is asked about.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import atomic_masses, atomic_numbers, chemical_symbols

from pet_finetune.errors import DataError
from pet_finetune.log import get_logger

from .text import Content

#: What is said of types that are given for nothing.
UNUSED_TYPES = "the file itself names the elements; the types that are given are not used"
# Masses in u of what chemists give a letter of its own (AME2020).
_HYDROGEN = {"D": 2.01410177812, "T": 3.01604928199}
_DUMMIES = frozenset({"X", "Xx", "Du", "Bq", "Gh", "Lp", "Vac", "Va", "Q"})
# A basis without a nucleus: H: in ORCA, H-Bq in Gaussian, bqH in NWChem, Gh(H) and @H in Psi4.
_GHOST = re.compile(
    r"(?i)(?:@|gh\(|bq|ghost).*|[a-z]{1,2}(?::|\(?[-_.]?(?:bq|ghost)\)?|[-_.]gh)\d*$"
)
_LABEL = re.compile(r"([A-Za-z]{1,2})(?:[0-9]+[+-]?|[+-][0-9]*|[_.:-].*)'*$")
_ISOTOPE = re.compile(r"([0-9]{1,3})([A-Za-z]{1,2})$")


@lru_cache(maxsize=4096)
def element_of(label: str) -> tuple[str, float | None] | None:
    """The element of an atom's label, if it is unambiguous.

    ``Fe``, ``fe`` and ``26`` are iron; ``C1``, ``C_a`` and ``Fe2+`` are sites of carbon and iron;
    ``D``, ``T``, ``2H`` and ``13C`` are isotopes.

    Returns:
        Symbol, and for an isotope its mass in u; None where the label is no element or could be
        several (``OW``, ``CA1x``).
    """
    symbol = label.capitalize()
    if symbol in atomic_numbers and atomic_numbers[symbol] > 0:
        return symbol, None
    if symbol in _HYDROGEN:
        return "H", _HYDROGEN[symbol]
    if label.isdecimal():
        number = int(label)
        return (chemical_symbols[number], None) if 0 < number < len(chemical_symbols) else None
    isotope = _ISOTOPE.match(label)
    if isotope:
        found = element_of(isotope[2])
        mass = float(isotope[1])
        # A mass number lies between Z and 3 Z: "1C" is no isotope of carbon.
        if found and atomic_numbers[found[0]] <= mass <= 3 * atomic_numbers[found[0]]:
            exact = {"2H": _HYDROGEN["D"], "3H": _HYDROGEN["T"]}
            return found[0], exact.get(label.upper(), mass)
        return None
    site = _LABEL.match(label)
    if site:
        found = element_of(site[1])
        return found if found is not None and not is_dummy(label) else None
    return None


def is_dummy(label: str) -> bool:
    """Whether a label marks a dummy or ghost atom."""
    plain = label.rstrip("0123456789").capitalize()
    return plain in _DUMMIES or label == "0" or _GHOST.match(label) is not None


def as_types(given: Mapping[int, str]) -> dict[int, str]:
    """A mapping of atom types to elements, checked.

    Raises:
        DataError: a value that is no element.
    """
    types = {}
    for number, name in given.items():
        found = element_of(str(name))
        if found is None:
            raise DataError(f"types: {number} is given as {name!r}, which is no element.")
        types[int(number)] = found[0]
    return types


#: ASE's names of the formats whose atoms have names.
NAMING = frozenset({"gromacs", "gromos", "proteindatabank"})
# Residues whose atoms are named by element and place, so that CA is a carbon, and HG a hydrogen.
_RESIDUES = re.compile(
    "A(LA|RG|SN|SP|SH|CE)|CY[SXM]|GL[NUYH]|HI[SDEP]|HS[DEP]|ILE|L(EU|YS|YN)|M(ET|SE)|NM[EA]|PHE"
    "|PRO|SER|T(HR|RP|YR)|VAL|[DR]?[ACGTU]|HOH|WAT|SOL|SPCE?|TI?P[345]?"
)
_HEAVIEST = 94  # of elements that such files hold


def with_named_elements(content: Content, frames: Sequence[Atoms]) -> None:
    """Give atoms, as ASE read them, the elements that their names mean, in place.

    Raises:
        DataError: a name that has several meanings, or none.
    """
    source, rows = content.source, list(_rows(content.kind, content.text))
    if len(rows) != sum(map(len, frames)):
        raise DataError(
            f"{source} names {len(rows)} atoms, and ASE reads {sum(map(len, frames))}: it is "
            "damaged or cut off. Write it again, or convert it to extended xyz."
        )
    meanings = {row: _meanings(*row) for row in dict.fromkeys(rows)}
    unclear = {row: found for row, found in meanings.items() if len(found) != 1}
    if unclear:
        shown = "; ".join(
            f"{name!r} of residue {residue!r}: {' or '.join(found) or 'no element'}"
            for (name, residue, _), found in list(unclear.items())[:5]
        )
        raise DataError(
            f"{source}: the names of the atoms do not say their elements ({shown}). Write a PDB "
            "file with the elements in columns 77-78 (`gmx trjconv -s topol.tpr` does), or "
            "extended xyz; leave sites without an element (of water models, say) out."
        )
    place = 0
    for atoms in frames:
        own = rows[place : place + len(atoms)]
        place += len(atoms)
        atoms.numbers = [atomic_numbers[meanings[row][0]] for row in own]


def _rows(kind: str, text: str) -> Iterator[tuple[str, str, str]]:
    """Name, residue and stated element of each atom."""
    lines = text.split("\n")
    if kind == "proteindatabank":
        for line in lines:
            if line.startswith(("ATOM", "HETATM")):
                yield line[12:16], line[17:21].strip(), line[76:78].strip()
    elif kind == "gromacs":
        begin = 0
        while begin + 1 < len(lines) and lines[begin + 1].strip().isdecimal():
            end = begin + 2 + int(lines[begin + 1])
            for row in lines[begin + 2 : end]:
                yield row[10:15].strip(), row[5:10].strip(), ""
            begin = end + 1
    else:
        inside = False
        for row in lines:
            words = row.split()
            inside = inside and words[:1] != ["END"]
            if inside and len(words) >= 7 and not row.startswith("#"):
                yield words[2], words[1], ""
            inside = inside or words[:1] == ["POSITION"]


def _meanings(name: str, residue: str, stated: str) -> tuple[str, ...]:
    """Elements that a name may mean.

    Args:
        name: as the file has it; with its four columns in a PDB file, where an element of one
            letter stands in the second.
        residue: the molecule or ion.
        stated: the element, where the file says it.
    """
    if _is_element(stated):
        return (stated.capitalize(),)
    if is_dummy(name.strip()):
        return ()
    letters = name.strip().lstrip("0123456789")
    one, two = letters[:1].upper(), letters[:2]
    both = two.capitalize()
    if len(two) < 2 or not two.isalpha() or not _is_element(both):
        return (one,) if _is_element(one) else ()
    if not _is_element(one) or two[1].islower():
        return (both,)
    if residue.strip("0123456789+-").upper() == two.upper():
        return (both,)  # an ion
    if _RESIDUES.fullmatch(residue.upper()) or name.startswith(" "):
        return (one,)
    return one, both


def _is_element(symbol: str) -> bool:
    return 0 < atomic_numbers.get(symbol.capitalize(), 0) <= _HEAVIEST


_logger = get_logger(__name__)

#: ASE's names of the formats.
LAMMPS = frozenset({"lammps-data", "lammps-dump-text", "lammps-dump-binary"})
_UNITS = ("metal", "real", "electron", "si", "cgs", "micro", "nano")
# u within which a mass is that of an element; where two are as near, none is taken.
_NEAR = 0.1
_ISOTOPES = {1: (2.014, 3.016)}


def looks_like_lammps_data(text: str) -> bool:
    """Whether a text looks like a LAMMPS data file: numbers of atoms and types, a box."""
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
        _check_atoms(text, frames, source)
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
        f"`types: {{{example}}}` next to `read_from` of the systems, or on the command line "
        f"--types {example.replace(': ', '=').replace(', ', ',')}. In LAMMPS, `dump_modify "
        "... element O H` with a column `element`, or the masses of a data file, say it too."
    )


def _check_atoms(text: str, frames: Sequence[Atoms], source: str) -> None:
    stated = list(re.finditer(r"^ITEM: NUMBER OF ATOMS\s*\n\s*(\d+)", text, re.M))
    for number, (found, atoms) in enumerate(zip(stated, frames, strict=False)):
        if int(found[1]) != len(atoms):
            line = text.count("\n", 0, found.start()) + 1
            raise DataError(
                f"{source}: frame {number} says on line {line + 1} that it has {found[1]} atoms, "
                f"and {len(atoms)} are there: it is cut off. Remove it, or write the file again."
            )


def _check_masses(text: str, names: Sequence[str], source: str) -> None:
    """Check that each mass belongs to one element."""
    column = names.index("mass")
    for block in re.split(r"^ITEM: ATOMS .*\n", text, flags=re.M)[1:]:
        rows = block.split("\nITEM:", 1)[0].split("\n")
        for mass in {row.split()[column] for row in rows if len(row.split()) > column}:
            if _element_of_mass(float(mass)) is None:
                raise _no_mass(f"{source}: the mass {mass} in column 'mass'")


def _no_mass(what: str) -> DataError:
    return DataError(
        f"{what} is that of no element, or of several. Name the elements of the types: `types: "
        "{1: O, ...}` next to `read_from` of the systems, or --types 1=O,..."
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
            raise _no_mass(f"{source}: the mass {mass} of type {number}")
        types[number] = symbol
    return types


def with_type_numbers(text: str) -> str:
    """Replace type labels of a LAMMPS data file by numbers, since ASE cannot read labels."""
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
