"""Every term of the loss, computed by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from pet_finetune.config.target import LossTerm, TargetLoss
from pet_finetune.data.labelled_batch import collate
from pet_finetune.data.neighbors import structure_neighbors
from pet_finetune.model.prediction import Prediction
from pet_finetune.training.objectives import Objective, batch_loss
from tiny_data import crystals, molecules, structures_of

SCALE = 0.5
OFF = LossTerm(weight=0.0)


def batch_of(structures):
    return collate([(s, structure_neighbors(s, 3.0)) for s in structures], torch.float64)


@pytest.fixture
def batch():
    """Methanol (6 atoms), water (3) and silicon (2, periodic)."""
    return batch_of(structures_of([*molecules(2), *crystals(1)]))


def prediction_of(batch, seed=0):
    """Labels with errors of known size added; NaN labels are predicted too."""
    generator = torch.Generator().manual_seed(seed)

    def off(label, shape):
        error = 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
        return error, torch.nan_to_num(label) + error if label is not None else error

    energy_error, energy = off(batch.labels.get("energy"), (batch.graph.num_structures,))
    forces_error, forces = off(batch.labels.get("energy/forces"), (batch.graph.num_atoms, 3))
    stress_error, stress = off(
        batch.labels.get("energy/stress"), (batch.graph.num_structures, 3, 3)
    )
    prediction = Prediction(energy, torch.zeros(batch.graph.num_atoms), forces, stress)
    return prediction, (energy_error.numpy(), forces_error.numpy(), stress_error.numpy())


def loss_of(batch, prediction, loss, **changes):
    objective = Objective("energy", loss, forces=True, stress=True, scale=SCALE)
    objective = replace(objective, **changes)
    return float(batch_loss(batch, {"energy": prediction}, {"energy": objective}))


ATOMS = np.array([6, 3, 2])


def test_energies_count_per_atom_in_units_of_the_scale(batch):
    prediction, (errors, _, _) = prediction_of(batch)
    loss = TargetLoss(weight=3.0, forces=OFF, stress=OFF)
    expected = 3.0 * np.mean((errors / ATOMS / SCALE) ** 2)
    found = loss_of(batch, prediction, loss, forces=False, stress=False)
    assert found == pytest.approx(expected)
    whole = loss_of(batch, prediction, loss, forces=False, stress=False, per_atom=False)
    assert whole == pytest.approx(3.0 * np.mean((errors / SCALE) ** 2))


def test_forces_count_by_component(batch):
    prediction, (_, errors, _) = prediction_of(batch)
    loss = TargetLoss(weight=0.0, forces=LossTerm(type="mae", weight=2.0))
    found = loss_of(batch, prediction, loss, stress=False)
    assert found == pytest.approx(2.0 * np.mean(np.abs(errors)) / SCALE)


def test_stresses_count_as_virials_per_atom_of_the_periodic_structure(batch):
    prediction, (_, _, errors) = prediction_of(batch)
    loss = TargetLoss(weight=0.0, stress=LossTerm(weight=4.0))
    volume = float(batch.graph.volumes[2])
    expected = 4.0 * np.mean((errors[2] * volume / 2 / SCALE) ** 2)
    assert loss_of(batch, prediction, loss, forces=False) == pytest.approx(expected)


def test_huber_is_squared_below_delta_and_straight_above(batch):
    prediction, (errors, _, _) = prediction_of(batch)
    delta = 0.1
    x = np.abs(errors / ATOMS / SCALE)
    assert (x < delta).any()
    assert (x > delta).any()
    expected = np.where(x < delta, 0.5 * x**2, delta * (x - 0.5 * delta)).mean()
    loss = TargetLoss(type="huber", delta=delta, forces=OFF, stress=OFF)
    found = loss_of(batch, prediction, loss, forces=False, stress=False)
    assert found == pytest.approx(expected)


def test_terms_add_up(batch):
    prediction, _ = prediction_of(batch)
    both = TargetLoss(weight=2.0, forces=LossTerm(type="mae", weight=3.0), stress=OFF)
    energy = loss_of(batch, prediction, both, forces=False, stress=False)
    forces = loss_of(batch, prediction, TargetLoss(weight=0.0, forces=both.forces), stress=False)
    assert loss_of(batch, prediction, both, stress=False) == pytest.approx(energy + forces)


def test_two_targets_add_up(batch):
    prediction, _ = prediction_of(batch)
    labels = {**batch.labels, "other": batch.labels["energy"] + 1.0}
    batch = replace(batch, labels=labels)
    one = Objective("energy", TargetLoss(), forces=False, stress=False, scale=1.0)
    two = Objective("other", TargetLoss(weight=5.0), forces=False, stress=False, scale=2.0)
    alone = [float(batch_loss(batch, {o.target: prediction}, {o.target: o})) for o in (one, two)]
    predictions = {"energy": prediction, "other": prediction}
    together = batch_loss(batch, predictions, {"energy": one, "other": two})
    assert float(together) == pytest.approx(sum(alone))


def without(structures, *missing):
    """Take labels out: pairs of a structure's place and a label."""
    made = list(structures)
    for place, label in missing:
        labels = {k: v for k, v in made[place].labels.items() if k != label}
        made[place] = replace(made[place], labels=labels)
    return made


def test_labels_that_are_missing_are_left_out_of_the_mean():
    structures = structures_of([*molecules(2), *crystals(1)])
    batch = batch_of(without(structures, (0, "energy/forces"), (1, "energy")))
    prediction, (energy_errors, force_errors, _) = prediction_of(batch)
    loss = TargetLoss(forces=LossTerm(weight=1.0), stress=OFF)
    known = [0, 2]
    expected = np.mean((energy_errors[known] / ATOMS[known] / SCALE) ** 2)
    expected += np.mean((force_errors[6:] / SCALE) ** 2)
    assert loss_of(batch, prediction, loss, stress=False) == pytest.approx(expected)


def test_missing_labels_send_no_nan_back():
    structures = structures_of([*molecules(2), *crystals(1)])
    batch = batch_of(without(structures, (0, "energy/forces"), (1, "energy")))
    prediction, _ = prediction_of(batch)
    parts = [t.clone().requires_grad_(True) for t in (
        prediction.energy, prediction.forces, prediction.stress)]  # fmt: skip
    prediction = Prediction(parts[0], prediction.atom_energies, parts[1], parts[2])
    objective = Objective("energy", TargetLoss(), forces=True, stress=True, scale=SCALE)
    batch_loss(batch, {"energy": prediction}, {"energy": objective}).backward()
    assert all(part.grad.isfinite().all() for part in parts)
    assert (parts[1].grad[:6] == 0).all()
    assert (parts[1].grad[6:] != 0).all()
    assert float(parts[0].grad[1]) == 0.0


def test_a_batch_without_any_label_has_loss_zero():
    structures = structures_of(molecules(2))
    names = list(structures[0].labels)
    batch = batch_of(without(structures, *[(place, n) for place in (0, 1) for n in names]))
    prediction, _ = prediction_of(batch)
    assert loss_of(batch, prediction, TargetLoss()) == 0.0


def test_a_prediction_that_is_nan_is_not_hidden(batch):
    prediction, _ = prediction_of(batch)
    forces = prediction.forces.clone()
    forces[0, 0] = math.nan
    broken = Prediction(prediction.energy, prediction.atom_energies, forces, prediction.stress)
    assert math.isnan(loss_of(batch, broken, TargetLoss()))


def test_weights_of_structures_and_atoms_multiply_their_terms(batch):
    prediction, (energies, forces, _) = prediction_of(batch)
    of_structures = torch.tensor([2.0, math.nan, 0.5], dtype=torch.float64)  # NaN: a set without
    of_atoms = torch.linspace(0.0, 2.0, len(forces), dtype=torch.float64)
    names = ("energy/weights", "energy/forces/weights", "energy/stress/weights")
    given = dict(zip(names, (of_structures, of_atoms, of_structures), strict=True))
    weighted = replace(batch, labels={**batch.labels, **given})
    loss = TargetLoss(weight=1.0, forces=OFF, stress=OFF)
    expected = np.mean([2.0, 1.0, 0.5] * (energies / ATOMS / SCALE) ** 2)
    assert loss_of(weighted, prediction, loss) == pytest.approx(expected)
    assert loss_of(batch, prediction, loss) != pytest.approx(expected)
    loss = TargetLoss(weight=0.0, forces=LossTerm(weight=1.0), stress=OFF)
    expected = np.mean(of_atoms.numpy()[:, None] * (forces / SCALE) ** 2)
    assert loss_of(weighted, prediction, loss) == pytest.approx(expected)
    loss = TargetLoss(weight=0.0, forces=OFF, stress=LossTerm(weight=1.0))
    silicon = 0.5 * loss_of(batch, prediction, loss)
    assert loss_of(weighted, prediction, loss) == pytest.approx(silicon)
