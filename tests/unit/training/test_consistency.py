"""The loss of what a rotation changes: against its definition, and whether it does its work."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from models import random_potential
from pet_finetune.config.target import TargetLoss
from pet_finetune.config.training import RotationalConsistency, TrainingOptions
from pet_finetune.data.epochs import rotate_batch
from pet_finetune.data.loader import Loader
from pet_finetune.training.feature import Step
from pet_finetune.training.loss_features import RotationalAgreement, rotational_spread
from pet_finetune.training.objectives import Objective
from tiny_data import molecules, structures_of
from trainers import make_trainer, without_directions

STRUCTURES = structures_of(molecules(6))
OBJECTIVE = Objective(
    "energy",
    TargetLoss(weight=3.0, forces={"type": "mae", "weight": 0.5}),
    forces=True,
    stress=False,
    scale=2.0,
)


def seen_by(model, epoch=0, index=0):
    (batch,) = Loader(STRUCTURES, model.cutoff, batch_size=6, dtype=model.dtype)
    predictions = model.predict_targets(batch.graph, {"energy": (True, False)}, create_graph=True)
    return Step(epoch, index, batch, predictions)


def loss_of(model, **options):
    settings = TrainingOptions(rotational_consistency=RotationalConsistency(**options))
    feature = RotationalAgreement()
    feature.start(
        SimpleNamespace(
            model=model,
            objectives={"energy": OBJECTIVE},
            options=settings,
            training=SimpleNamespace(seed=5),
        ),
        None,
    )
    return feature


def value_of(feature, seen):
    return feature.losses(seen)["rotations"]


def test_it_is_the_loss_against_the_turned_prediction():
    model = random_potential()
    term, seen = loss_of(model, weight=4.0, fraction=0.5), seen_by(model)
    first = seen.batch.first(3)
    rotations = term._rotations(seen, 3)
    rotated = model.predict(rotate_batch(first, rotations).graph, "energy")
    said, atoms = seen.predictions["energy"], first.graph.num_atoms
    energies = (rotated.energy - said.energy[:3]) / first.graph.atoms_per_structure / 2.0
    back = torch.einsum("nji,nj->ni", rotations[first.graph.structure_index], rotated.forces)
    forward = torch.einsum(
        "nij,nj->ni", rotations[first.graph.structure_index], said.forces[:atoms]
    )
    forces = (rotated.forces - forward) / 2.0
    assert float((back - said.forces[:atoms]).detach().abs().max()) > 1e-6
    expected = 4.0 * (3 / 6) * (3.0 * (energies**2).mean() + 0.5 * forces.abs().mean())
    torch.testing.assert_close(value_of(term, seen), expected)


def test_it_vanishes_where_only_lengths_count():
    model = without_directions(random_potential())
    assert value_of(loss_of(model), seen_by(model)).item() < 1e-12
    model = random_potential()
    assert value_of(loss_of(model), seen_by(model)).item() > 1e-9


def test_the_gradient_is_that_of_the_second_orientation_alone():
    model = random_potential()
    seen = seen_by(model)
    assert seen.predictions["energy"].energy.requires_grad
    value_of(loss_of(model), seen).backward()  # the graph of what was seen is never asked for
    seen.predictions["energy"].energy.sum().backward()


def test_rotations_depend_on_the_place_in_the_run_alone():
    model = random_potential()
    values = [
        value_of(loss_of(model), seen_by(model, *place)).item()
        for place in [(0, 0), (0, 1), (1, 0), (0, 0)]
    ]
    assert values[0] == values[3]
    assert len(set(values)) == 3


@pytest.mark.parametrize("fraction", [0.01, 1.0])
def test_at_least_one_structure_and_at_most_all(fraction):
    model = random_potential()
    counted = []
    predict = model.predict_targets
    model.predict_targets = lambda batch, *a, **k: (
        counted.append(batch.num_structures) or predict(batch, *a, **k)
    )
    seen = seen_by(model)
    value_of(loss_of(model, fraction=fraction), seen)
    assert counted == [6, 1 if fraction < 0.5 else 6]


@pytest.mark.slow
def test_training_with_it_makes_orientations_agree():
    plain = make_trainer(num_epochs=12)
    consistent = make_trainer(num_epochs=12, rotational_consistency={"weight": 10, "fraction": 1.0})
    spreads = []
    for trainer in (plain, consistent):
        trainer.fit()
        spreads.append(rotational_spread(trainer.model, trainer.validation, "energy", 6))
    assert spreads[1].energy < 0.7 * spreads[0].energy
    assert spreads[1].forces < 0.7 * spreads[0].forces


def test_the_first_structures_of_a_batch_are_a_batch():
    model = random_potential()
    (batch,) = Loader(STRUCTURES, model.cutoff, batch_size=6, dtype=model.dtype)
    (few,) = Loader(STRUCTURES[:2], model.cutoff, batch_size=6, dtype=model.dtype)
    cut = batch.first(2)
    for name, value in few.graph._asdict().items():
        own = getattr(cut.graph, name)
        assert own is value is None or torch.equal(own, value), name
    assert cut.frames == few.frames
    assert cut.labels.keys() == few.labels.keys()
    assert all(torch.equal(cut.labels[name], value) for name, value in few.labels.items())
    assert cut.sources == few.sources
    assert replace(cut, labels={}).graph.num_structures == 2
