"""Labels a model gives itself, replay, the forgetting report, and what is written of them."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pet_finetune
from models import random_potential
from pet_finetune import forgetting
from pet_finetune.config.target import TargetLoss
from pet_finetune.config.training import TrainingOptions
from pet_finetune.data.loader import Loader
from pet_finetune.forgetting.dimers import dimer_curves
from pet_finetune.forgetting.replay import Beside, ReplayLoss, as_plain, from_plain
from pet_finetune.forgetting.retention import RetentionSet
from pet_finetune.training.objectives import Objective, batch_loss
from pet_finetune.training.sets import label_with, relabelled
from tiny_data import crystals, molecules, structures_of
from trainers import at, make_trainer

STRUCTURES = structures_of([*molecules(5), *crystals(3)])
OBJECTIVE = Objective("energy", TargetLoss(), forces=True, stress=True, scale=2.0)


@pytest.fixture(scope="module")
def model():
    return random_potential(targets=("energy", "other"))


@pytest.fixture(scope="module")
def labelled(model):
    return label_with(model, STRUCTURES, ["energy", "other"])


def test_a_model_makes_no_errors_on_its_own_labels(model, labelled):
    assert [
        torch.equal(a.positions, b.positions) for a, b in zip(STRUCTURES, labelled, strict=True)
    ]
    assert set(labelled[0].labels) == {"energy", "energy/forces", "other", "other/forces"}
    assert set(labelled[-1].labels) == set(labelled[0].labels) | {"energy/stress", "other/stress"}
    errors = RetentionSet(labelled, ["energy", "other"], model, 1).errors(model)
    for metrics in errors.values():
        assert metrics.kinds == ["energy", "forces"]
        assert metrics.rmse("energy") < 1e-12
        assert metrics.rmse("forces") < 1e-12


def test_another_baseline_is_forgotten_and_the_labels_moved_onto_it_are_not(model, labelled):
    """What the refit of the baseline explains is taken out to the last digit."""
    shift = torch.tensor([1.0, -20.0, 300.0, 7.0], dtype=torch.float64)
    moved = random_potential(targets=("energy", "other"))
    moved.composition.set("energy", moved.composition.get("energy") + shift)
    assert RetentionSet(labelled, ["energy"], moved, 1).errors(moved)["energy"].mae("energy") > 1.0
    shifted = relabelled(labelled, "energy", {"energy": shift}, model.species)
    errors = RetentionSet(shifted, ["energy"], moved, 1).errors(moved)["energy"]
    assert errors.rmse("energy") < 1e-12
    assert errors.rmse("forces") < 1e-12


def test_labels_of_one_energy_for_another(model, labelled):
    zero = torch.zeros(4, dtype=torch.float64)
    moved = relabelled(labelled, "energy", {"new": zero, "energy": zero + 1.0}, model.species)
    last, own = moved[-1].labels, labelled[-1].labels
    assert set(last) == {f"{t}{k}" for t in ("new", "energy") for k in ("", "/forces", "/stress")}
    assert torch.equal(last["new"], own["energy"])
    assert float(last["energy"] - own["energy"]) == pytest.approx(2.0)  # two atoms
    assert torch.equal(last["new/forces"], own["energy/forces"])


@pytest.mark.parametrize(
    ("every", "epochs"), [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [1, 3, 6]), (10, [1])]
)
def test_the_report_is_due_every_few_epochs(model, labelled, every, epochs):
    retention = RetentionSet(labelled, ["energy"], model, every)
    assert [e for e in range(1, 8) if retention.errors_after(model, e)] == epochs


def replay(model, structures, weight=0.5, options=None):
    main = Loader(STRUCTURES, model.cutoff, batch_size=4, shuffle=True, seed=1, dtype=model.dtype)
    second = Loader(
        structures, model.cutoff, batch_size=1, augment=False, seed=1, dtype=model.dtype
    )
    return ReplayLoss(
        model, Beside(second, main, 0.5), OBJECTIVE, weight, options or TrainingOptions()
    )


def test_replay_is_the_weighted_loss_of_what_goes_beside_the_batch(labelled):
    other = random_potential(seed=5, targets=("energy", "other"))
    term = replay(other, labelled)
    batch = term.beside.batch(1, 1)
    predictions = {"energy": other.predict(batch.graph, "energy", stress=True)}
    expected = 0.5 * float(batch_loss(batch, predictions, {"energy": OBJECTIVE}).detach())
    loss = term(at(1, 1))
    assert float(loss.detach()) == pytest.approx(expected)
    loss.backward()
    assert float(other.network.edge_embedder.weight.grad.abs().max()) > 0


def test_the_schedule_of_the_loss_holds_for_replay(labelled):
    stage = {"start": 0.5, "energy": 3.0, "forces": 3.0, "stress": 3.0}
    options = TrainingOptions.model_validate({"num_epochs": 4, "loss_schedule": [stage]})
    other = random_potential(seed=5, targets=("energy", "other"))
    plain, staged = (
        float(replay(other, labelled, options=o)(at(2)).detach()) for o in (None, options)
    )
    assert staged == pytest.approx(3.0 * plain)
    assert float(replay(other, labelled, options=options)(at(1)).detach()) == pytest.approx(
        float(replay(other, labelled)(at(1)).detach())
    )


def test_what_a_model_says_itself_costs_nothing_until_it_says_otherwise(model, labelled):
    term = replay(random_potential(targets=("energy", "other")), labelled)
    assert float(term(at(0)).detach()) < 1e-20
    with torch.no_grad():
        term.model.network.edge_embedder.weight += 0.05
    assert float(term(at(0)).detach()) > 1e-6


def written(values):
    file = io.BytesIO()
    torch.save(values, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def test_structures_survive_a_file(labelled):
    after = from_plain(written(as_plain(labelled)))
    for a, b in zip(labelled, after, strict=True):
        assert (a.index, a.source, a.charge, a.spin) == (b.index, b.source, b.charge, b.spin)
        assert a.labels.keys() == b.labels.keys()
        assert all(torch.equal(a.labels[n], b.labels[n]) for n in a.labels)
        assert torch.equal(a.positions, b.positions)


def kept_of(labelled, model):
    """What the features of a run keep, as ``kept.pt`` has it."""
    weights = {n: p.detach().clone() for n, p in make_trainer().parameters.items()}
    curves = dimer_curves(model, "energy", (1, 8))
    return {
        "retention": {"structures": as_plain(labelled), "targets": ("energy",), "every": 3},
        "replay": {
            "structures": as_plain(labelled[:2]),
            "target": "energy",
            "fraction": 0.25,
            "weight": 2.0,
        },
        "anchor": {"reference": weights, "importance": None, "strength": 0.1},
        "dimers": {"target": "energy", "before": dict(vars(curves))},
    }


def test_a_run_that_goes_on_has_what_the_run_kept(labelled, model):
    kept = written(kept_of(labelled, model))
    trainer = make_trainer(ema=None)
    for feature in forgetting.features():
        trainer.add(feature, kept[feature.name])
    features = [feature for feature in trainer.features if feature.name in kept]
    assert {feature.name: feature.kept() for feature in features} == kept
    with torch.no_grad():
        next(iter(trainer.parameters.values())).add_(0.1)
    losses = [f.losses(at(0)) for f in features]
    assert [set(found) for found in losses] == [set(), {"replay"}, {"anchor"}, set()]
    assert all(float(value.detach()) > 0 for found in losses for value in found.values())
    retention = features[0]
    assert [bool(retention.validate(trainer.model, epoch)) for epoch in (1, 2, 3)] == [1, 0, 1]
    assert set(retention.errors(trainer.model)) == {"retention"}


def test_features_that_keep_nothing_do_nothing():
    trainer = make_trainer()
    for feature in forgetting.features():
        trainer.add(feature, None)
        assert feature.kept() is None
        assert feature.losses(at(0)) == {}
        assert feature.validate(trainer.model, 1) is None
        assert feature.errors(trainer.model) == {}
        assert feature.heads == ()


@pytest.mark.slow
def test_the_package_works_without_this_room(tmp_path):
    """Deleting the folder takes its features away and nothing else."""
    package = Path(pet_finetune.__file__).parent
    left_out = shutil.ignore_patterns("__pycache__", "forgetting")
    shutil.copytree(package, tmp_path / "pet_finetune", ignore=left_out)
    code = (
        "import pet_finetune.report.page; from pet_finetune.api import ROOMS; "
        "print([feature.name for feature in ROOMS.features()])"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
