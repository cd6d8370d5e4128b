"""Chemical elements: symbols, the periodic table's rows and columns, and which one is nearest."""

from __future__ import annotations

from collections.abc import Collection

from ase.data import chemical_symbols

from pet_finetune.errors import did_you_mean

_SYMBOLS = tuple(chemical_symbols[1:])
_NOBLE_GASES = (2, 10, 18, 36, 54, 86, 118)


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
    """The nearest known element in the periodic table.

    One of the same column before any other, and there the fewest rows away; else the fewest
    rows and columns away. Ties go to the nearest, then to the lower, atomic number.
    """
    period, group = period_and_group(number)

    def distance(other: int) -> tuple[bool, int, int, int]:
        its_period, its_group = period_and_group(other)
        steps = abs(its_period - period) + abs(its_group - group)
        return its_group != group, steps, abs(other - number), other

    return min(known, key=distance)
