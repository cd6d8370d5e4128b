"""What a rotation changes, against its definition in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms

from models import random_potential
from pet_finetune.data.epochs import random_rotations
from pet_finetune.data.labelled_batch import batch_from_atoms
from pet_finetune.data.loader import Loader
from pet_finetune.training.loss_features import rotational_spread
from tiny_data import molecules, structures_of
from trainers import without_directions

FRAMES = molecules(3)


def batches(model, frames=FRAMES, size=2):
    return Loader(structures_of(frames), model.cutoff, batch_size=size, dtype=model.dtype)


def test_against_its_definition():
    model = random_potential().eval()
    frame: Atoms = FRAMES[0]
    generator, energies, forces = torch.Generator().manual_seed(7), [], []
    for _ in range(4):
        (matrix,) = random_rotations(1, generator).numpy()
        rotated = Atoms(frame.numbers, frame.positions @ matrix.T)
        said = model.predict(batch_from_atoms(rotated, model.cutoff), "energy")
        energies.append(said.energy.item() / len(frame))
        forces.append(said.forces.numpy() @ matrix)
    spread = rotational_spread(model, batches(model, [frame]), "energy", 4, seed=7)
    assert spread.energy == pytest.approx(np.abs(energies - np.mean(energies)).mean())
    assert spread.forces == pytest.approx(np.abs(forces - np.mean(forces, axis=0)).mean())
    assert spread.forces > 1e-5


@pytest.mark.slow
def test_batches_do_not_matter_but_for_the_orientations():
    model = random_potential().train()
    one, two = (rotational_spread(model, batches(model, size=s), "energy", 200) for s in (1, 3))
    assert one.forces == pytest.approx(two.forces, rel=0.1)
    assert model.training


def test_a_model_that_sees_only_lengths_has_none():
    model = without_directions(random_potential())
    spread = rotational_spread(model, batches(model), "energy", 3)
    assert spread.energy < 1e-10
    assert spread.forces < 1e-10
