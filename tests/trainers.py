"""Trainers of a tiny model, and what tests do with them: stop, go on, compare."""

from __future__ import annotations

import io
import os
import signal
from dataclasses import replace

import torch

from models import random_potential
from pet_finetune.adapters.adapter_config import AdapterConfig
from pet_finetune.adapters.inject import freeze, inject
from pet_finetune.config.target import TargetLoss
from pet_finetune.config.training import TrainingOptions
from pet_finetune.data.loader import Loader
from pet_finetune.training.baselines import fit_composition
from pet_finetune.training.feature import Feature, Step
from pet_finetune.training.objectives import Objective
from pet_finetune.training.prepare import own_features
from pet_finetune.training.trainer import Trainer
from pet_finetune.training.weights import Averaging
from tiny_data import molecules, structures_of

TRAIN, VALIDATION = structures_of(molecules(7)), structures_of(molecules(3, seed=1))
CELLS = [replace(s, pbc=torch.ones(3, dtype=torch.bool), cell=20 * torch.eye(3).double())
         for s in TRAIN]  # fmt: skip


def at(epoch, index=0):
    """A place in a run, for losses that look at nothing else."""
    return Step(epoch, index, None, {})


class Shrink(Feature):
    """Adds to the loss: the squares of some weights, in every second batch."""

    name = "shrink"

    def start(self, trainer, kept):
        self.parameters = list(trainer.model.network.node_last_layers.parameters())
        self.values = []

    def losses(self, step):
        if step.index % 2:
            return {}
        value = 0.1 * (1 + step.epoch) * sum((p**2).sum() for p in self.parameters)
        self.values.append(value.item())
        return {self.name: value}


class Watch(Feature):
    """Calls functions at the hooks of a run; ``best`` after the epochs that are."""

    name = "watch"

    def __init__(self, step=None, epoch=None, best=None, save=None):
        self._step, self._epoch, self._best, self._save = step, epoch, best, save

    def step_ended(self, progress):
        if self._step is not None:
            self._step(*progress)

    def epoch_ended(self, record):
        if self._best is not None and record.best:
            self._best(record)
        if self._epoch is not None:
            self._epoch(record)

    def save(self):
        if self._save is not None:
            self._save()


def watch(trainer, **functions):
    trainer.add(Watch(**functions))


def average_of(trainer):
    """The averaged weights of a run; None where there are none."""
    found = [f.average for f in trainer.features if isinstance(f, Averaging)]
    return found[0] if found else None


def tiny_model(method="full", hypers=None, **config):
    model = random_potential(dtype=torch.float32, **(hypers or {}))
    counts = torch.stack([torch.tensor([int((s.numbers == z).sum()) for z in model.species])
                          for s in TRAIN])  # fmt: skip
    labels = torch.stack([s.labels["energy"] for s in TRAIN])
    model.composition.set("energy", fit_composition(counts, labels, 1e-5))
    if method == "lora":
        inject(model, AdapterConfig(rank=2, **config))
    elif method == "heads":
        freeze(model, ["node_heads", "edge_heads", "node_last_layers", "edge_last_layers"])
    return model


def make_trainer(
    method="full",
    config=None,
    train=TRAIN,
    validation=VALIDATION,
    extra=False,
    hypers=None,
    **options,
):
    settings = TrainingOptions.model_validate(
        {"batch_size": 3, "num_epochs": 2, "warmup_fraction": 0.2, **options}
    )
    model = tiny_model(method, hypers, **(config or {}))
    return Trainer(
        model,
        {"energy": Objective("energy", TargetLoss(), forces=True, stress=False, scale=2.0)},
        Loader(train, model.cutoff, batch_size=settings.batch_size, shuffle=True, augment=True,
               seed=3),
        Loader(validation, model.cutoff, batch_size=2),
        settings,
        learning_rate=3e-3,
        features=[*([Shrink()] if extra else []), *own_features(settings)],
    )  # fmt: skip


def without_directions(model):
    """Only the length of an edge counts, so rotating changes nothing."""
    with torch.no_grad():
        for name, parameter in model.network.named_parameters():
            if "edge_embedder" in name and name.endswith("weight"):
                parameter[:, :3] = 0.0
    return model


def written(state):
    """A state as it comes back from a file."""
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def interrupt_after(trainer, steps):
    """Ctrl-C once the trainer has taken a number of steps in all."""
    wanted = trainer.progress.step + steps

    def step(*ignored):
        if trainer.progress.step == wanted:
            os.kill(os.getpid(), signal.SIGINT)

    watch(trainer, step=step)


def weights(trainer):
    parts = {f"now {n}": p.detach().clone() for n, p in trainer.parameters.items()}
    parts |= {f"average {n}": v.clone() for n, v in (average_of(trainer) or {}).items()}
    return parts


def assert_identical(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def curve(records):
    """What is written of each epoch, less the time it took."""
    return [
        (r.epoch, r.learning_rate, r.loss, r.extra, r.metric, r.best, r.train["energy"].as_dict(),
         r.validation["energy"].as_dict())
        for r in records
    ]  # fmt: skip
