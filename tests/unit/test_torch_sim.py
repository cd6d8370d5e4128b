"""torch-sim's batches: each structure gets what the calculator says of it alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase.build import bulk, molecule

from models import random_potential
from pet_finetune import PETCalculator
from pet_finetune.errors import SpeciesError

ts = pytest.importorskip("torch_sim", reason="torch-sim is not installed")

from pet_finetune.torch_sim import PETTorchSimModel  # noqa: E402


@pytest.fixture(scope="module")
def potential():
    return random_potential(dtype=torch.float64)


def boxes():
    """Three crystals of different sizes."""
    frames = [bulk("Si", "diamond", a=5.4), bulk("Si", "diamond", a=5.6, cubic=True)]
    frames.append(frames[1].repeat((2, 1, 1)))
    for seed, atoms in enumerate(frames):
        atoms.rattle(0.1, seed=seed)
        atoms.numbers[0] = 8
    return frames


def state_of(frames):
    return ts.io.atoms_to_state(frames, torch.device("cpu"), torch.float64)


def test_a_batch_is_what_the_calculator_says_of_each(potential):
    frames, calculator = boxes(), PETCalculator(potential)
    model = PETTorchSimModel(potential, device="cpu")
    for _ in range(2):  # with new lists, then after a small move with those that are there
        found = model(state_of(frames))
        for k, atoms in enumerate(frames):
            atoms.calc = calculator
            own = state_of(frames).system_idx == k
            assert found["energy"][k].item() == pytest.approx(atoms.get_potential_energy())
            assert found["forces"][own].numpy() == pytest.approx(atoms.get_forces(), abs=1e-9)
            stress = atoms.get_stress(voigt=False)
            assert found["stress"][k].numpy() == pytest.approx(stress, abs=1e-9)
            atoms.rattle(0.02, seed=k)
    one = model(state_of(frames[2:]))  # another structure in the first place
    assert one["energy"].item() == pytest.approx(frames[2].get_potential_energy())


def test_molecules_have_no_stress(potential):
    frames = [molecule("H2O"), molecule("CH3OH")]
    found = PETTorchSimModel(potential, device="cpu")(state_of(frames))
    assert set(found) == {"energy", "forces"}
    frames[1].calc = PETCalculator(potential)
    assert found["forces"][3:].numpy() == pytest.approx(frames[1].get_forces(), abs=1e-9)


def test_slabs_that_torch_sim_takes_for_clusters_are_warned_of(potential, caplog):
    slab = boxes()[1]
    model = PETTorchSimModel(potential, device="cpu")
    model(state_of([slab]))
    model(state_of([molecule("H2O")]))
    assert not caplog.text
    slab.pbc = (True, True, False)
    for _ in range(2):
        model(state_of([slab]))
    assert caplog.text.count("Give slabs pbc = True and a vacuum") == 1


def test_charges_that_torch_sim_does_not_hand_on_are_warned_of(caplog):
    PETTorchSimModel(random_potential(), device="cpu")
    assert not caplog.text
    PETTorchSimModel(random_potential(system_conditioning=True), device="cpu")
    assert "all structures are computed as neutral singlets" in caplog.text


def test_structures_relax_together(potential):
    frames = boxes()
    model = PETTorchSimModel(potential, device="cpu")
    before = model(state_of(frames))["energy"]
    final = ts.optimize(state_of(frames), model, optimizer=ts.optimizers.fire, max_steps=10)
    assert (final.energy < before).all()
    assert np.isfinite(final.positions.numpy()).all()


def test_an_element_that_is_not_known_is_named(potential):
    with pytest.raises(SpeciesError, match="Au"):
        PETTorchSimModel(potential, device="cpu")(state_of([bulk("Au")]))
