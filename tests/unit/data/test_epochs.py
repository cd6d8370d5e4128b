"""What an epoch makes of structures: order and rotations; copies for replay."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule

from pet_finetune.data.epochs import distorted, random_rotations, rotate_batch
from pet_finetune.data.labelled_batch import collate
from pet_finetune.data.neighbors import structure_neighbors
from pet_finetune.data.readers import probe_structures
from pet_finetune.data.structure import atoms_to_structure
from pet_finetune.data.structure_sets import find_species, of_species
from tiny_data import crystals, molecules, structures_of


def lennard_jones(atoms: Atoms) -> tuple[np.ndarray, np.ndarray]:
    from ase.calculators.lj import LennardJones

    atoms.calc = LennardJones(sigma=2.2, rc=6.0, smooth=True)
    return atoms.get_forces(), atoms.get_stress(voigt=False)


def labelled_crystal(rotation: np.ndarray | None = None):
    atoms = bulk("NaCl", "rocksalt", a=5.2, cubic=True)
    atoms.set_cell(atoms.cell[:] + [[0, 0.3, 0], [0, 0, 0.2], [0.1, 0, 0]], scale_atoms=True)
    atoms.rattle(0.15, seed=3)
    if rotation is not None:
        atoms.set_cell(atoms.cell[:] @ rotation.T, scale_atoms=False)
        atoms.positions = atoms.positions @ rotation.T
    forces, stress = lennard_jones(atoms)
    labels = {
        "energy": torch.tensor(atoms.get_potential_energy(), dtype=torch.float64),
        "energy/forces": torch.from_numpy(forces),
        "energy/stress": torch.from_numpy(stress),
    }
    structure = atoms_to_structure(atoms, labels=labels)
    return structure, structure_neighbors(structure, 5.0)


def test_orthogonal_and_half_inverted():
    rotations = random_rotations(2000, torch.Generator().manual_seed(0))
    identity = torch.eye(3, dtype=torch.float64).expand_as(rotations)
    torch.testing.assert_close(rotations @ rotations.mT, identity, atol=1e-14, rtol=0)
    determinants = torch.linalg.det(rotations)
    torch.testing.assert_close(determinants.abs(), torch.ones_like(determinants))
    assert 0.45 < (determinants > 0).double().mean() < 0.55


def test_uniform_over_rotations():
    count = 20_000
    rotations = random_rotations(count, torch.Generator().manual_seed(1))
    # First and second moments of a Haar-distributed matrix: 0 and 1/3 delta delta.
    noise = 4 / count**0.5
    assert rotations.mean(dim=0).abs().max() < noise
    flat = rotations.reshape(count, 9)
    second = flat.T @ flat / count
    torch.testing.assert_close(second, torch.eye(9, dtype=torch.float64) / 3, atol=noise, rtol=0)
    # The angle of a uniform rotation has density (1 - cos a) / pi, hence mean trace 0, mean
    # squared trace 1; taking Euler angles uniformly would fail this.
    proper = rotations * torch.linalg.det(rotations)[:, None, None]
    traces = proper.diagonal(dim1=1, dim2=2).sum(dim=1)
    assert traces.mean().abs() < noise
    assert (traces.square().mean() - 1).abs() < 2 * noise


def test_same_generator_same_rotations_in_any_dtype():
    double = random_rotations(5, torch.Generator().manual_seed(7))
    single = random_rotations(5, torch.Generator().manual_seed(7), torch.float32)
    assert single.dtype == torch.float32
    assert torch.equal(double.float(), single)


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_turned_labels_are_those_of_the_turned_structure(seed):
    """Labels of an invariant potential, computed by ASE before and after rotating."""
    rotation = random_rotations(1, torch.Generator().manual_seed(seed))
    batch = collate([labelled_crystal()], torch.float64)
    rotated = rotate_batch(batch, rotation)
    expected = collate([labelled_crystal(rotation[0].numpy())], torch.float64)
    assert batch.labels["energy/stress"].abs().max() > 1e-3
    for name in ("energy", "energy/forces", "energy/stress"):
        torch.testing.assert_close(rotated.labels[name], expected.labels[name], rtol=0, atol=1e-10)
    torch.testing.assert_close(rotated.graph.cells, expected.graph.cells, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        rotated.graph.edge_vectors, expected.graph.edge_vectors, rtol=0, atol=1e-12
    )


def test_each_structure_by_its_own_rotation_and_nothing_else():
    water = atoms_to_structure(molecule("H2O"))
    helium = atoms_to_structure(Atoms("He"))
    crystal, crystal_pairs = labelled_crystal()
    items = [
        (water, structure_neighbors(water, 5.0)),
        (helium, structure_neighbors(helium, 5.0)),
        (crystal, crystal_pairs),
    ]
    batch = collate(items, torch.float64)
    rotations = random_rotations(3, torch.Generator().manual_seed(2))
    rotated = rotate_batch(batch, rotations)
    for edge in range(batch.graph.num_edges):
        matrix = rotations[batch.graph.structure_index[batch.graph.centers[edge]]]
        expected = matrix @ batch.graph.edge_vectors[edge]
        torch.testing.assert_close(rotated.graph.edge_vectors[edge], expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(
        rotated.graph.edge_vectors.norm(dim=1), batch.graph.edge_vectors.norm(dim=1)
    )
    assert rotated.labels["energy/forces"][:4].isnan().all()
    assert rotated.labels["energy/forces"][4:].isfinite().all()
    assert rotated.labels["energy/stress"][:2].isnan().all()
    assert torch.equal(rotated.graph.cells[:2], torch.zeros(2, 3, 3, dtype=torch.float64))
    for name in ("numbers", "centers", "neighbors", "reverse", "structure_index"):
        assert getattr(rotated.graph, name) is getattr(batch.graph, name)
    assert rotated.frames == batch.frames
    torch.testing.assert_close(rotated.graph.volumes, batch.graph.volumes)


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
