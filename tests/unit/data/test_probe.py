"""The probe set that ships, and distorted copies."""

from __future__ import annotations

import pytest
import torch

from pet_finetune.data import find_species
from pet_finetune.data.augment import distorted
from pet_finetune.data.probe import probe_structures
from pet_finetune.data.species import of_species
from tiny_data import crystals, molecules, structures_of


def test_it_covers_molecules_and_crystals_of_many_elements():
    structures = probe_structures(range(1, 119))
    assert len(structures) > 100
    assert len(find_species(structures)) > 50
    periodic = [bool(s.pbc.all()) for s in structures]
    assert 30 < sum(periodic) < len(structures) - 30
    assert max(s.num_atoms for s in structures) < 20
    assert all(s.charge == 0 and not s.labels for s in structures)


@pytest.mark.parametrize(("species", "some"), [((1, 6, 7, 8), True), ((1, 8), True), ((2,), False)])
def test_no_other_elements_than_the_models(species, some):
    structures = probe_structures(species)
    assert bool(structures) is some
    assert set(find_species(structures)) <= set(species)
    assert structures == of_species(structures, species)


def test_no_two_atoms_are_absurdly_close():
    for structure in probe_structures(range(1, 119)):
        distances = torch.pdist(structure.positions)
        assert float(distances.min()) > 0.6, structure.where


def test_copies_are_distorted_by_the_seed():
    originals = structures_of([*molecules(2), *crystals(2)])
    first = distorted(originals, 2, rattle=0.1, strain=0.05, seed=3)
    again = distorted(originals, 2, rattle=0.1, strain=0.05, seed=3)
    other = distorted(originals, 2, rattle=0.1, strain=0.05, seed=4)
    assert len(first) == 8
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a.positions, b.positions)
        assert not torch.equal(a.positions, c.positions)
        assert not a.labels
    assert not torch.equal(first[0].positions, first[1].positions)
    assert torch.equal(first[0].cell, originals[0].cell)
    assert not torch.equal(first[4].cell, originals[2].cell)


def test_by_as_much_as_asked():
    (original,) = structures_of(crystals(1))
    copies = distorted([original], 100, rattle=0.2, strain=0.0, seed=1)
    moves = torch.stack([copy.positions - original.positions for copy in copies])
    assert float(moves.std()) == pytest.approx(0.2, rel=0.15)
    copies = distorted([original], 100, rattle=0.0, strain=0.04, seed=1)
    strains = torch.stack([original.cell.inverse() @ c.cell for c in copies]) - torch.eye(3)
    torch.testing.assert_close(strains, strains.transpose(1, 2))
    assert float(strains.diagonal(dim1=1, dim2=2).std()) == pytest.approx(0.04, rel=0.15)
    # The atoms go with the cell.
    scaled = original.positions @ original.cell.inverse()
    torch.testing.assert_close(copies[0].positions @ copies[0].cell.inverse(), scaled)
