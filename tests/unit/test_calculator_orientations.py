"""The calculator's mean over orientations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress

from models import (
    all_structures,
    crystal,
    ethanol,
    property_potential,
    random_potential,
    trained_adapter,
)
from pet_finetune import PETCalculator
from pet_finetune.adapters.peft_files import save_adapter
from pet_finetune.checkpoint.native import save_checkpoint
from pet_finetune.errors import ConfigError
from pet_finetune.model import inference as module
from pet_finetune.model.inference import ORIENTATIONS, orientations

MANY = [count for count in ORIENTATIONS if count > 1]


def test_two_are_a_structure_and_its_image_in_a_point():
    """What is odd in the edges has no part in their mean, so reversing all changes nothing."""
    atoms = ethanol()
    atoms.calc = calculator(random_potential(), orientations=2)
    image = rotated(atoms, -np.eye(3))
    image.calc = atoms.calc
    np.testing.assert_allclose(image.get_potential_energy(), atoms.get_potential_energy())
    np.testing.assert_allclose(image.get_forces(), -atoms.get_forces(), atol=1e-12)


def rotated(atoms, rotation):
    copy = atoms.copy()
    copy.set_cell(atoms.cell.array @ rotation.T)
    copy.positions = atoms.positions @ rotation.T
    return copy


def calculator(model, **options):
    return PETCalculator(model, device="cpu", dtype="float64", **options)


@pytest.mark.parametrize("count", ORIENTATIONS)
def test_they_are_groups(count):
    rotations = orientations(count)
    assert rotations.shape == (count, 3, 3)
    torch.testing.assert_close(rotations[0], torch.eye(3, dtype=torch.float64))
    handed = [1.0, -1.0] if count == 2 else [1.0] * count
    assert torch.linalg.det(rotations).tolist() == pytest.approx(handed)
    listed = {tuple(matrix.flatten().tolist()) for matrix in rotations + 0.0}
    assert len(listed) == count
    products = torch.einsum("aij,bjk->abik", rotations, rotations).reshape(-1, 9) + 0.0
    assert {tuple(matrix.tolist()) for matrix in products} == listed


@pytest.mark.parametrize(("count", "order"), [(4, 1), (12, 2), (24, 3)])
def test_a_mean_has_no_part_of_the_lowest_orders(count, order):
    """Polynomials of a direction up to this degree, less what any rotation leaves of them."""
    generator = torch.Generator().manual_seed(0)
    means = []
    for direction in torch.randn(5, 3, generator=generator, dtype=torch.float64):
        x, y, z = (orientations(count) @ direction).unbind(-1)
        values = [x, z] if order == 1 else [x, z, x * y, y * z, x**2 - z**2, 2 * y**2 - x**2 - z**2]
        values += [x * y * z, x * (x**2 - 3 * z**2)] if order == 3 else []
        means.append(torch.stack(values).mean(1))
    assert torch.stack(means).abs().max() < 1e-14


@pytest.mark.parametrize("count", MANY)
def test_results_are_the_mean_of_those_of_turned_structures(count):
    model, atoms = random_potential(), crystal()
    plain, rotations = calculator(model), orientations(count).numpy()
    atoms.calc = calculator(model, orientations=count)
    energies, forces, stresses = [], [], []
    for rotation in rotations:
        copy = rotated(atoms, rotation)
        copy.calc = plain
        energies.append(copy.get_potential_energies())
        forces.append(copy.get_forces() @ rotation)
        stresses.append(rotation.T @ copy.get_stress(voigt=False) @ rotation)
    assert np.std(np.sum(energies, 1)) > 1e-6
    np.testing.assert_allclose(atoms.get_potential_energies(), np.mean(energies, 0), atol=1e-12)
    np.testing.assert_allclose(atoms.get_potential_energy(), np.sum(energies) / count, atol=1e-11)
    np.testing.assert_allclose(atoms.get_forces(), np.mean(forces, 0), atol=1e-12)
    np.testing.assert_allclose(atoms.get_stress(voigt=False), np.mean(stresses, 0), atol=1e-12)


@pytest.mark.parametrize("name", all_structures())
def test_forces_and_stress_are_derivatives_of_the_mean(name):
    atoms = all_structures()[name]
    atoms.calc = calculator(random_potential(), orientations=4)
    numerical = calculate_numerical_forces(atoms, eps=1e-5)
    np.testing.assert_allclose(atoms.get_forces(), numerical, atol=1e-7)
    if atoms.pbc.all():
        numerical = calculate_numerical_stress(atoms, eps=1e-5)
        np.testing.assert_allclose(atoms.get_stress(), numerical, atol=1e-7)


def test_large_structures_are_turned_in_parts(monkeypatch):
    model, atoms = random_potential(), crystal()
    expected = calculator(model, orientations=12)
    at_once = [expected.get_property(name, atoms) for name in ("energy", "forces", "stress")]
    monkeypatch.setattr(module, "_MOST_ATOMS", 5 * len(atoms))
    in_parts = calculator(model, orientations=12)
    for name, value in zip(("energy", "forces", "stress"), at_once, strict=True):
        np.testing.assert_allclose(in_parts.get_property(name, atoms), value, atol=1e-12)


def test_a_committee_is_turned_member_by_member(tmp_path):
    base = save_checkpoint(tmp_path / "base.ckpt", random_potential())
    folders = [tmp_path / f"adapter_{seed}" for seed in range(3)]
    for seed, folder in enumerate(folders):
        save_adapter(trained_adapter(random_potential(), seed=seed), folder, "base")
    atoms = crystal()
    calc = calculator(base, adapters=folders, orientations=4)
    for name in ("energy", "forces", "stress"):
        members = [
            calculator(base, adapter=folder, orientations=4).get_property(name, atoms)
            for folder in folders
        ]
        found = calc.get_property(f"{name}_ensemble", atoms)
        np.testing.assert_allclose(found, np.array(members), atol=1e-11)
        np.testing.assert_allclose(calc.get_property(name, atoms), np.mean(members, 0), atol=1e-11)


def test_direct_forces_have_a_mean_too():
    atoms, (_, *others) = ethanol(), orientations(4).numpy()
    atoms.calc = calculator(property_potential(), non_conservative=True, orientations=4)
    forces = atoms.get_forces()
    for rotation in others:
        copy = rotated(atoms, rotation)
        copy.calc = atoms.calc
        np.testing.assert_allclose(copy.get_forces() @ rotation, forces, atol=1e-12)


def test_other_numbers_are_refused():
    with pytest.raises(ConfigError, match="orientations: 3 is not one of 1, 2, 4, 12, 24"):
        calculator(random_potential(), orientations=3)
