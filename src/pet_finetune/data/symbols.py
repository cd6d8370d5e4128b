"""Elements of atoms in files: the columns that say them, and the labels that stand for them.

ASE takes the first letters of a name that are some element: chlorine becomes carbon, and the
massless site of a water model tungsten. A label has one meaning here or is asked about.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ase import Atoms
from ase.data import atomic_numbers, chemical_symbols

from pet_finetune.errors import DataError

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

_DEFAULT = "species:S:1:pos:R:3"
_PROPERTIES = re.compile(r"""Properties\s*=\s*["']?([^\s"']+)""")
#: Names under which programs write elements beside ``species``.
_ELEMENTS = frozenset(
    {"z", "numbers", "atomic_number", "atomic_numbers", "element", "elements", "symbol", "symbols"}
)


@lru_cache(maxsize=4096)
def element_of(label: str) -> tuple[str, float | None] | None:
    """The element that a label of an atom stands for, where it has one meaning.

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
    """Whether a label stands for a place without an atom, a ghost atom included."""
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


@dataclass(frozen=True)
class SymbolLayout:
    """The columns of a frame of extended XYZ."""

    #: How messages call them.
    names: str
    #: One letter a column: R, I, S or L.
    kinds: str
    #: The column with the symbol of the element; None where only atomic numbers or nothing say it.
    species: int | None
    #: Other columns that name it, by name.
    others: Mapping[str, int]

    @property
    def width(self) -> int:
        """The number of columns."""
        return len(self.kinds)

    @property
    def numbered(self) -> bool:
        """Whether there are atomic numbers that ASE reads in place of symbols."""
        return any(name in ("Z", "numbers") for name in self.others)

    @staticmethod
    def of(comment: str) -> SymbolLayout:
        """The columns that a comment names; element and position without it."""
        found = _PROPERTIES.search(comment)
        words = (found[1] if found else _DEFAULT).split(":")
        kinds, species, others = "", None, {}
        for name, kind, count in zip(words[::3], words[1::3], words[2::3], strict=False):
            if name == "species" and kind == "S":
                species = len(kinds)
            elif name.lower() in _ELEMENTS and count == "1":
                others[name] = len(kinds)
            kinds += kind[:1] * (int(count) if count.isdecimal() else 0)
        return SymbolLayout(":".join(words), kinds, species, others)


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
    """The elements that a name may stand for.

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
