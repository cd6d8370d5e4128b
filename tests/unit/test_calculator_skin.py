"""The calculator's neighbour list: used again while it holds, and never a moment longer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.md.nose_hoover_chain import IsotropicMTKNPT
from ase.stress import voigt_6_to_full_3x3_stress

from models import crystal, ethanol, heat, random_potential, slab
from pet_finetune import PETCalculator
from pet_finetune.data import calculator_input
from pet_finetune.data.labelled_batch import batch_from_atoms
from pet_finetune.model.potential import Potential


@pytest.fixture(scope="module")
def model() -> Potential:
    return random_potential()


@pytest.fixture
def calc(model: Potential) -> PETCalculator:
    return PETCalculator(model, device="cpu")


@pytest.fixture
def lists_built(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The cutoff of every neighbour list that is built for a skin."""
    seen: list[float] = []
    build = calculator_input.neighbor_list

    def counted(positions, cell, pbc, cutoff):
        seen.append(cutoff)
        return build(positions, cell, pbc, cutoff)

    monkeypatch.setattr(calculator_input, "neighbor_list", counted)
    return seen


def test_npt_runs_and_keeps_its_list(calc: PETCalculator, lists_built: list[float]):
    atoms = crystal()
    atoms.calc = calc
    heat(atoms, 100.0)
    volume = atoms.get_volume()
    md = IsotropicMTKNPT(
        atoms,
        timestep=0.2 * units.fs,
        temperature_K=100,
        pressure_au=0.0,
        tdamp=20 * units.fs,
        pdamp=200 * units.fs,
    )
    md.run(8)
    assert atoms.get_volume() != volume
    assert len(lists_built) == 1
    fresh = PETCalculator(calc.model, device="cpu", skin=0.0)
    np.testing.assert_allclose(atoms.get_forces(), fresh.get_forces(atoms), atol=1e-10)
    np.testing.assert_allclose(atoms.get_stress(), fresh.get_stress(atoms), atol=1e-11)


@pytest.mark.parametrize("make", [ethanol, crystal, slab], ids=lambda make: make.__name__)
def test_the_skin_changes_nothing_on_a_path(
    make: Callable[[], Atoms], model: Potential, lists_built: list[float]
):
    """Atoms that wander far: some lists are used again, others built, results stay the same."""
    rng = np.random.default_rng(4)
    atoms, kept = make(), PETCalculator(model, device="cpu", skin=0.6)
    start = atoms.positions.copy()
    velocities = rng.normal(size=atoms.positions.shape)
    for step in range(12):
        atoms.positions = start + 0.06 * step * velocities
        energy, forces = kept.get_potential_energy(atoms), kept.get_forces(atoms)
        expected = model.predict(batch_from_atoms(atoms, model.cutoff))
        assert energy == pytest.approx(float(expected.energy.detach()), abs=1e-10)
        np.testing.assert_allclose(forces, expected.forces.numpy(), atol=1e-9)
    assert 2 <= len(lists_built) <= 8
    assert set(lists_built) == {model.cutoff + 0.6}


def silicon() -> Atoms:
    """One atom that has no neighbours but its own images."""
    return bulk("Si", cubic=False, crystalstructure="fcc", a=4.3)


@pytest.mark.parametrize("shape", ["shear", "compress", "anisotropic"])
@pytest.mark.parametrize("make", [crystal, silicon], ids=lambda make: make.__name__)
def test_the_skin_follows_the_cell(
    make: Callable[[], Atoms], shape: str, model: Potential, lists_built: list[float]
):
    changes = {
        "shear": np.array([[0, 0.05, 0], [0, 0, 0.03], [0, 0, 0]]),
        "compress": -0.02 * np.eye(3),
        "anisotropic": np.diag([0.03, -0.02, 0.01]),
    }
    atoms, kept = make(), PETCalculator(model, device="cpu", skin=0.5)
    cell = atoms.cell.array.copy()
    for step in range(10):
        atoms.set_cell(cell @ (np.eye(3) + step * changes[shape]), scale_atoms=True)
        expected = model.predict(batch_from_atoms(atoms, model.cutoff), stress=True)
        np.testing.assert_allclose(kept.get_forces(atoms), expected.forces.numpy(), atol=1e-9)
        stress = voigt_6_to_full_3x3_stress(kept.get_stress(atoms))
        np.testing.assert_allclose(stress, expected.stress[0].numpy(), atol=1e-10)
    assert 2 <= len(lists_built) < 10


def test_another_structure_or_cell_is_never_computed_with_the_old_list(
    model: Potential, calc: PETCalculator
):
    one, other = crystal(), crystal()
    other.symbols[0] = "O"
    flat = crystal()
    flat.pbc = (True, True, False)
    larger = crystal() * (1, 2, 1)
    for atoms in (one, other, flat, larger, ethanol(), slab(), one):
        expected = model.predict(batch_from_atoms(atoms, model.cutoff))
        np.testing.assert_allclose(calc.get_forces(atoms), expected.forces.numpy(), atol=1e-10)
