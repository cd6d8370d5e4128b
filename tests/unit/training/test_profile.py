"""A profile of training: what it counts adds up. How long things take is no test."""

from __future__ import annotations

import json

import pytest
import torch

from models import random_potential
from pet_finetune.config.target import TargetLoss
from pet_finetune.config.training import TrainingOptions
from pet_finetune.data.loader import Loader
from pet_finetune.errors import TrainingError
from pet_finetune.training import profile as profile_module
from pet_finetune.training.objectives import Objective
from pet_finetune.training.profile import OTHER, profile_steps
from pet_finetune.training.trainer import Trainer
from tiny_data import molecules, structures_of

TRAIN = structures_of(molecules(7))


def make_trainer(**options):
    settings = TrainingOptions.model_validate({"batch_size": 3, "num_epochs": 2, **options})
    model = random_potential(dtype=torch.float32)
    loader = Loader(TRAIN, model.cutoff, batch_size=3, shuffle=True, augment=True, seed=3)
    objective = Objective("energy", TargetLoss(), forces=True, stress=False, scale=1e4)
    return Trainer(model, {"energy": objective}, loader, loader.view(), settings, 1e-4)


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """A profile of four steps, the batches of all the steps taken for it, and the timeline."""
    trainer, taken = make_trainer(num_epochs=2), []
    trace = tmp_path_factory.mktemp("profile") / "trace.json"
    step, before = trainer.step, dict(vars(trainer.progress))
    trainer.step = lambda group, *rest: step((taken.append(b) or b for b in group), *rest)
    profile = profile_steps(trainer, 4, trace)
    assert vars(trainer.progress) == before
    return profile, taken, json.loads(trace.read_text())


def test_the_numbers_are_those_of_the_timed_steps(profiled):
    profile, taken, _ = profiled
    # More steps than the run has: they go on from the first epoch again.
    assert len(taken) == 3 + 4 + 2
    assert (profile.steps, len(profile.step_seconds), profile.steps_per_epoch) == (4, 4, 3)
    timed = taken[3:7]
    assert profile.structures == sum(batch.graph.num_structures for batch in timed) / 4
    assert profile.atoms == sum(batch.graph.num_atoms for batch in timed) / 4
    assert profile.edges == sum(batch.graph.num_edges for batch in timed) / 4
    assert list(profile.stages)[:2] == ["batch", "energies"]
    assert set(profile.stages) >= {"loss", "backward", "update", "metrics", OTHER}
    assert sum(profile.stages.values()) == pytest.approx(profile.seconds)
    assert profile.validation_seconds > 0
    content = json.loads(json.dumps(profile.as_dict()))
    assert content["structures_per_second"] == profile.structures / profile.seconds
    assert content["neighbors_per_atom"] == profile.edges / profile.atoms
    assert content["seconds_per_epoch"] == profile.epoch_seconds > 3 * profile.seconds


def test_operations_and_timeline(profiled):
    profile, _, timeline = profiled
    names = [operation.name for operation in profile.operations]
    assert len(names) == len(set(names)) == 15
    assert any(name.startswith("aten::") for name in names)
    assert not set(names) & set(profile.stages)
    times = [operation.seconds for operation in profile.operations]
    assert times == sorted(times, reverse=True)
    assert 0 < sum(operation.share for operation in profile.operations) <= 1
    ranges = [e["name"] for e in timeline["traceEvents"] if e.get("cat") == "user_annotation"]
    assert ranges.count("backward") == 2


def test_the_steps_are_those_of_training(tmp_path, monkeypatch):

    def trace(steps, *ignored):
        steps.take(2)
        return {}, []

    monkeypatch.setattr(profile_module, "_trace", trace)
    trained, profiled = make_trainer(scheduler="constant"), make_trainer(scheduler="constant")
    metrics = {"energy": profile_module.Metrics("energy")}
    batches = [batch for epoch in (0, 1) for batch in trained.batches(epoch)]
    for batch in batches:
        trained.step([batch], 1, metrics)
    profile_steps(profiled, 1, tmp_path / "trace.json")  # six steps in all
    fresh = make_trainer().parameters
    for name, parameter in trained.parameters.items():
        assert torch.equal(parameter, profiled.parameters[name]), name
        assert not torch.equal(parameter, fresh[name]), name


def test_a_step_of_several_batches_counts_them_all(tmp_path, monkeypatch):
    monkeypatch.setattr(profile_module, "_trace", lambda *ignored: ({}, []))
    trainer = make_trainer(gradient_accumulation_steps=2)
    profile = profile_steps(trainer, 3, tmp_path / "trace.json")
    assert profile.steps_per_epoch == 2
    # Of 3, 3 and 1 structures an epoch, the warm-up of 6 batches takes two; then come 3 and 3,
    # 1 and 3, 3 and 1.
    assert profile.structures == pytest.approx((6 + 4 + 4) / 3)


@pytest.mark.parametrize("steps", [0, -3])
def test_no_steps_are_refused(tmp_path, steps):
    with pytest.raises(TrainingError, match=f"--profile {steps}: at least 1 step"):
        profile_steps(make_trainer(), steps, tmp_path / "trace.json")
