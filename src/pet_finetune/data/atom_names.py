"""Elements of atoms that a file only names, as those of biomolecules do (``CA``, ``OW``, ``CL1``).

ASE takes the first letters that are some element: chlorine becomes carbon, and the massless site of
a water model tungsten. A name has one meaning here or is asked about.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ase.data import atomic_numbers

from pet_finetune.data.symbols import is_dummy
from pet_finetune.errors import DataError

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["NAMING", "with_named_elements"]

#: ASE's names of the formats whose atoms have names.
NAMING = frozenset({"gromacs", "gromos", "proteindatabank"})
# Residues whose atoms are named by element and place, so that CA is a carbon, and HG a hydrogen.
_RESIDUES = re.compile(
    "A(LA|RG|SN|SP|SH|CE)|CY[SXM]|GL[NUYH]|HI[SDEP]|HS[DEP]|ILE|L(EU|YS|YN)|M(ET|SE)|NM[EA]|PHE"
    "|PRO|SER|T(HR|RP|YR)|VAL|[DR]?[ACGTU]|HOH|WAT|SOL|SPCE?|TI?P[345]?"
)
_HEAVIEST = 94  # of elements that such files hold


def with_named_elements(kind: str, text: str, frames: Sequence[Atoms], source: str) -> None:
    """Give atoms the elements that their names mean, in place.

    Args:
        kind: ASE's name of the format.
        text: of the file.
        frames: as ASE read them.
        source: the file, for messages.

    Raises:
        DataError: a name that has several meanings, or none.
    """
    rows = list(_rows(kind, text))
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
