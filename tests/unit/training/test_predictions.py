"""Predictions are kept in the order of the structures, however they were cut into batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models import random_potential
from pet_finetune.data.loader import Loader
from pet_finetune.data.predicted import Predicted
from pet_finetune.training.metrics import PredictionRecorder, evaluate, with_model
from tiny_data import molecules, structures_of

FRAMES = molecules(5, names=("CH3OH", "H2O", "CH4"))
WANTED = {"energy": (True, False)}


def recorded(structures, model, **cut):
    loader = Loader(structures, model.cutoff, dtype=torch.float64, **cut)
    recorder = PredictionRecorder(loader, "test")
    errors = evaluate(model, loader, WANTED, recorder.add)
    return recorder, errors["energy"]


# With a shuffled order the batches come in another one than the structures.
@pytest.mark.parametrize(
    "cut",
    [{"batch_size": 2}, {"max_atoms_per_batch": 9}, {"batch_size": 2, "shuffle": True, "seed": 1}],
)
def test_predictions_are_those_of_each_structure_alone(cut):
    model, structures = random_potential(), structures_of(FRAMES)
    recorder, metrics = recorded(structures, model, **cut)
    found = with_model(None, recorder, "after", model)
    alone = [recorded([s], model, batch_size=1)[0].values() for s in structures]
    for name in ("energy", "energy/forces"):
        expected = np.concatenate([values[name] for values in alone])
        np.testing.assert_allclose(found.models["after"][name], expected, atol=1e-6)
    errors = found.models["after"]["energy"] - found.labels["energy"]
    assert np.abs(errors / found.sizes).mean() == pytest.approx(metrics.mae("energy"))


def test_baselines_are_sums_over_the_atoms():
    model, structures = random_potential(), structures_of(FRAMES)
    recorder, _ = recorded(structures, model, batch_size=2)
    found = with_model(None, recorder, "after", model)
    values = dict(zip(model.species, model.composition.get("energy").tolist(), strict=True))
    expected = [sum(values[z] for z in s.numbers.tolist()) for s in structures]
    np.testing.assert_allclose(found.baselines["energy"], expected)


def test_a_second_model_stands_beside_the_first_only_for_the_same_structures():
    model, structures = random_potential(), structures_of(FRAMES)
    first = with_model(None, recorded(structures, model, batch_size=2)[0], "before", model)
    same = with_model(first, recorded(structures, model, batch_size=3)[0], "after", model)
    assert set(same.models) == {"before", "after"}
    other = with_model(first, recorded(structures[1:], model, batch_size=2)[0], "after", model)
    assert set(other.models) == {"after"}
    assert isinstance(other, Predicted)
