"""Unknown elements are refused by symbol, with the places where they occur."""

from __future__ import annotations

import pytest
from ase.build import bulk, molecule

from pet_finetune.data import atoms_to_structure, check_species, find_species
from pet_finetune.errors import SpeciesError


@pytest.fixture
def structures():
    frames = [molecule("H2O"), bulk("NaCl", "rocksalt", a=5.6), molecule("CH3Cl"), bulk("Cu")]
    return [atoms_to_structure(a, i, source="set.xyz") for i, a in enumerate(frames * 3)]


def test_species_that_occur(structures):
    assert find_species(structures) == (1, 6, 8, 11, 17, 29)


def test_all_known(structures):
    check_species(structures, (1, 6, 8, 11, 17, 29, 79))


def test_unknown_elements_by_symbol_count_and_frame(structures):
    with pytest.raises(SpeciesError) as error:
        check_species(structures, (1, 6, 8, 11))
    message = str(error.value)
    assert "Cl (Z=17): 6 atoms in 6 structures" in message
    assert "frame 1 of set.xyz; frame 2 of set.xyz" in message
    assert "and 1 more" in message
    assert "Cu (Z=29): 3 atoms in 3 structures" in message
    assert "The model knows: H C O Na." in message
