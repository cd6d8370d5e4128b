"""Symbols and the periodic table."""

from __future__ import annotations

import pytest
from ase.data import atomic_numbers, chemical_symbols

from pet_finetune.config.base import element
from pet_finetune.training.extend import nearest_element, period_and_group

FOUNDATION = [1, 6, 7, 8, 9, 15, 16, 17]


def test_symbols_are_ases():
    assert [element(z) for z in range(1, 119)] == chemical_symbols[1:]
    assert [element(name) for name in chemical_symbols[1:]] == chemical_symbols[1:]


def test_names_and_numbers_mean_elements():
    assert element("br") == element(" Br ") == element(35) == "Br"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Sii", "'Sii' is no chemical element. Did you mean 'Si'?"),
        ("X", "'X' is no chemical element."),
        (0, "0 is no atomic number (1 to 118)."),
        (119, "119 is no atomic number (1 to 118)."),
        (False, "YAML reads No as false; put nobelium in quotes."),
        (None, "None is no chemical element."),
    ],
)
def test_what_is_no_element(name, message):
    with pytest.raises(ValueError) as caught:
        element(name)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("symbol", "place"),
    [
        ("H", (1, 1)),
        ("He", (1, 18)),
        ("Be", (2, 2)),
        ("B", (2, 13)),
        ("Cl", (3, 17)),
        ("Sc", (4, 3)),
        ("Zn", (4, 12)),
        ("I", (5, 17)),
        ("La", (6, 3)),
        ("Lu", (6, 3)),
        ("Hf", (6, 4)),
        ("U", (7, 3)),
        ("Og", (7, 18)),
    ],
)
def test_places_in_the_table(symbol, place):
    assert period_and_group(atomic_numbers[symbol]) == place


@pytest.mark.parametrize(
    ("new", "known", "nearest"),
    [
        ("Br", FOUNDATION, "Cl"),  # the same column, and the nearer row
        ("I", [*FOUNDATION, 35], "Br"),
        ("Si", FOUNDATION, "C"),
        ("Se", FOUNDATION, "S"),
        ("Na", FOUNDATION, "H"),  # column 1, however far
        ("Na", [*FOUNDATION, 19, 3], "Li"),  # as near as K: the nearer atomic number
        ("Ge", [6, 31, 33], "C"),  # the same column before any neighbour
        ("Cu", [26, 30, 13], "Zn"),  # no coinage metal: one step along the row
        ("Fe", [25, 27], "Mn"),  # both one step away: the lower atomic number
        ("Gd", [57, 71, 21, 39], "La"),  # both f elements seven away: the lower again
        ("U", [57, 60], "Nd"),
    ],
)
def test_the_nearest_element(new, known, nearest):
    assert chemical_symbols[nearest_element(atomic_numbers[new], known)] == nearest
