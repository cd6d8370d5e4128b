"""Chemical elements: symbols, the periodic table's rows and columns, and which one is nearest.

Written out so that reading options does not need ASE.
"""

from __future__ import annotations

from collections.abc import Collection

from pet_finetune.errors import did_you_mean

__all__ = ["COVALENT_RADII", "atomic_number", "nearest_element", "period_and_group", "symbol_of"]

_TABLE = """
    H He
    Li Be B C N O F Ne
    Na Mg Al Si P S Cl Ar
    K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr
    Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe
    Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn
    Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og
"""
_SYMBOLS = tuple(_TABLE.split())
_NOBLE_GASES = (2, 10, 18, 36, 54, 86, 118)

#: Covalent radii in Å by atomic number from 0 (Cordero et al., Dalton Trans. 2008, 2832; as in
#: ``ase.data``), 0.2 where there is none. Here because the network's files do not import ASE.
COVALENT_RADII = (
    0.2, 0.31, 0.28, 1.28, 0.96, 0.84, 0.76, 0.71, 0.66, 0.57, 0.58, 1.66, 1.41, 1.21, 1.11, 1.07,
    1.05, 1.02, 1.06, 2.03, 1.76, 1.7, 1.6, 1.53, 1.39, 1.39, 1.32, 1.26, 1.24, 1.32, 1.22, 1.22,
    1.2, 1.19, 1.2, 1.2, 1.16, 2.2, 1.95, 1.9, 1.75, 1.64, 1.54, 1.47, 1.46, 1.42, 1.39, 1.45,
    1.44, 1.42, 1.39, 1.39, 1.38, 1.39, 1.4, 2.44, 2.15, 2.07, 2.04, 2.03, 2.01, 1.99, 1.98, 1.98,
    1.96, 1.94, 1.92, 1.92, 1.89, 1.9, 1.87, 1.87, 1.75, 1.7, 1.62, 1.51, 1.44, 1.41, 1.36, 1.36,
    1.32, 1.45, 1.46, 1.48, 1.4, 1.5, 1.5, 2.6, 2.21, 2.15, 2.06, 2, 1.96, 1.9, 1.87, 1.8, 1.69,
    2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2,
)  # fmt: skip


def symbol_of(number: int) -> str:
    """The symbol of an atomic number, 1 to 118."""
    return _SYMBOLS[number - 1]


def atomic_number(name: object) -> int:
    """The atomic number that a symbol (any case) or a number means.

    Raises:
        ValueError: it is no element; the text names the nearest symbol.
    """
    if isinstance(name, bool):
        raise ValueError("YAML reads No as false; put nobelium in quotes.")
    if isinstance(name, int):
        if 1 <= name <= len(_SYMBOLS):
            return name
        raise ValueError(f"{name} is no atomic number (1 to {len(_SYMBOLS)}).")
    text = str(name).strip().capitalize()
    if text in _SYMBOLS:
        return _SYMBOLS.index(text) + 1
    raise ValueError(f"{name!r} is no chemical element.{did_you_mean(text, _SYMBOLS)}")


def period_and_group(number: int) -> tuple[int, int]:
    """Row (1 to 7) and column (1 to 18) of the periodic table.

    Hydrogen stands in column 1; lanthanides and actinides stand in column 3 with scandium, as in
    the short form of the table.
    """
    period = next(i for i, last in enumerate(_NOBLE_GASES, 1) if number <= last)
    last = _NOBLE_GASES[period - 1]
    first = _NOBLE_GASES[period - 2] + 1 if period > 1 else 1
    column = number - first + 1
    if number == 2:
        return 1, 18
    if column > 2:
        # Counted from the noble gas; what does not fit between are the f elements.
        column = max(18 - (last - number), 3)
    return period, column


def nearest_element(number: int, known: Collection[int]) -> int:
    """The known element that stands nearest in the periodic table.

    One of the same column before any other, and there the fewest rows away; else the fewest
    rows and columns away. Ties go to the nearest, then to the lower, atomic number.
    """
    period, group = period_and_group(number)

    def distance(other: int) -> tuple[bool, int, int, int]:
        its_period, its_group = period_and_group(other)
        steps = abs(its_period - period) + abs(its_group - group)
        return its_group != group, steps, abs(other - number), other

    return min(known, key=distance)
