"""Labels as the loss sees them: the offset that energies share. Noise is in test_recipes.py."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from pet_finetune.config.training import TrainingOptions
from pet_finetune.training.feature import Step
from pet_finetune.training.loss_features import TrackedOffset
from pet_finetune.training.prepare import own_features
from trainers import make_trainer


def tracked(trainer):
    """The feature of a run."""
    (feature,) = (f for f in trainer.features if isinstance(f, TrackedOffset))
    return feature


def test_labels_follow_most_of_an_offset_and_baselines_all_of_its_average():
    trainer = make_trainer()
    feature, batch = tracked(trainer), next(trainer.batches(0))
    atoms, label = batch.graph.atoms_per_structure, batch.labels["energy"].clone()
    assert torch.equal(feature.labels(batch, 0, 0).labels["energy"], label)
    with torch.no_grad():
        found = trainer.model.predict_targets(batch.graph, trainer.wanted)
    off = {"energy": replace(found["energy"], energy=label + 0.5 * atoms)}
    known = 1 - 0.8**2  # of the running mean after two updates
    for count in (1, 2):
        for _ in range(2):  # a batch in two parts, whose sums count once
            assert not feature.losses(Step(0, count, batch, off))
        feature.after_update(0)
    moved = feature.labels(batch, 0, 0).labels
    expected = label + 0.8 * known * 0.5 * atoms
    torch.testing.assert_close(moved["energy"], expected.to(label))
    assert moved["energy/forces"] is batch.labels["energy/forces"]
    assert torch.equal(batch.labels["energy"], label)
    resumed = make_trainer()
    tracked(resumed).load_state(feature.state())
    for run, options, part in (
        (trainer, {}, 1 - 2 / 11 * 3 / 12),  # the weights' own average
        (resumed, {}, 1 - 2 / 11 * 3 / 12),
        (trainer, {"baseline": {"mode": "keep"}}, 0),
    ):
        run.options = TrainingOptions.model_validate(options)
        baselines = run.model.composition.get("energy")
        before = baselines.clone()
        with tracked(run).weights():
            torch.testing.assert_close(baselines, before - 0.5 * part)
        assert torch.equal(baselines, before)


def test_energies_that_are_not_known_do_not_count():
    trainer = make_trainer()
    feature, batch = tracked(trainer), next(trainer.batches(0))
    atoms = batch.graph.atoms_per_structure
    with torch.no_grad():
        found = trainer.model.predict_targets(batch.graph, trainer.wanted)
    off = {"energy": replace(found["energy"], energy=batch.labels["energy"] + 0.5 * atoms)}
    batch.labels["energy"][0] = math.nan
    feature.losses(Step(0, 0, batch, off))
    feature.after_update(0)
    offset = feature.state()["offsets"].clone()
    assert offset.tolist() == pytest.approx([0.1], rel=1e-5)
    batch.labels["energy"][:] = math.nan
    feature.losses(Step(0, 1, batch, off))
    feature.after_update(0)
    assert torch.equal(feature.state()["offsets"], offset)


def test_nothing_follows_without_it():
    features = own_features(TrainingOptions.model_validate({"track_energy_offset": 0}))
    assert not any(isinstance(f, TrackedOffset) for f in features)
