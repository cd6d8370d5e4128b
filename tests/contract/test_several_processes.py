"""Several processes train what one trains, also with all that a run can have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import ase.io
import laws
import pytest
import torch

from logs import logging_as_it_was
from models import random_potential
from pet_finetune import processes
from pet_finetune.api import ROOMS
from pet_finetune.checkpoint.native import save_checkpoint
from pet_finetune.checkpoint.opening import load_checkpoint
from pet_finetune.config.load import parse_options
from pet_finetune.data.labelled_batch import LabelledBatch
from pet_finetune.training import trainer
from pet_finetune.training.resume import plain_errors
from pet_finetune.training.run import train
from tiny_data import crystals, data_section, label, molecules
from together import together
from trainers import curve, interrupt_after, make_trainer, watch, weights, written

#: All that adds to a loss or depends on how a batch is cut.
RICH = {
    "num_epochs": 2,
    # Not soap: where a gradient has no direction, its eigenvectors are those of rounding errors.
    "optimizer": "adamw",
    "batch_size": 5,
    "gradient_accumulation_steps": 2,
    "rotational_consistency": {"weight": 0.5, "fraction": 0.5},
    "label_noise": {"energy": 0.01, "forces": 0.02},
    "ema": 0.8,
    "loss": {"energy": {"type": "huber", "weight": 10.0, "forces": {"type": "mae"}}},
}
KEEPING = {
    "replay": {"structures": ["training"], "copies": 1, "fraction": 0.3},
    "anchor": {"type": "l2sp", "strength": 0.1},
}
PLAIN = {"method": "lora", "optimizer": "adamw"}
KINDS = {
    "lora": {"method": "lora", "config": {"rank": 2}, **KEEPING},
    "full, unfrozen": {"method": "full", "unfreeze": {"every": 1}, **KEEPING},
}
KINDS_COUNT = {"lora": 2, "full, unfrozen": 4}


@pytest.fixture(autouse=True)
def _logging():
    with logging_as_it_was():
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Structures of different sizes; some lack forces, some lack stress."""
    folder = tmp_path_factory.mktemp("data")
    frames = [*molecules(5), *crystals(4), *(label(f, forces=False) for f in molecules(2, seed=9))]
    frames.append(label(crystals(1, seed=3)[0] * (2, 2, 1)))
    ase.io.write(folder / "train.xyz", frames, format="extxyz")
    ase.io.write(folder / "valid.xyz", [*molecules(3, seed=1), *crystals(2, seed=1)])
    save_checkpoint(folder / "base.ckpt", random_potential(dtype=torch.float64))
    return folder


def run(place: Path, kind: str, **training) -> dict[str, torch.Tensor]:
    """The weights at the end of a run from its options to its final table, and its numbers."""
    finetune = {"read_from": str(place / "base.ckpt"), **KINDS[kind]}
    sets = [data_section(str(place / f"{one}.xyz")) for one in ("train", "valid")]
    raw = {
        "seed": 4,
        "device": "cpu",
        "base_precision": 64,
        "architecture": {"name": "pet", "training": {**RICH, **training, "finetune": finetune}},
        "training_set": sets[0],
        "validation_set": sets[1],
    }
    folder = place / f"{kind}-{processes.size()}"
    rooms = replace(ROOMS, report=lambda folder: None)
    outcome = train(parse_options(raw).options, folder, check=False, rooms=rooms)
    processes.barrier()
    found = load_checkpoint(folder / "last.ckpt", keep_adapter=True).training["trainer"]
    average = found["features"]["average"]["average"]
    numbers = [value for _, value in sorted(plain_errors(outcome.after)["validation"].items())]
    return {
        **found["trained"],
        **{f"average {name}": value for name, value in average.items()},
        "errors": torch.tensor([list(one.values()) for one in numbers]),
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_several_processes_train_the_weights_of_one(place, kind):
    laws.processes_change_nothing(lambda: run(place, kind), together, counts=(KINDS_COUNT[kind],))


def fit(stop=0, saved=None, **settings):
    """What a trainer of three batches an epoch gives: its weights, result, state, epochs."""
    torch.manual_seed(5)
    made, records, states = make_trainer(**{**PLAIN, **settings}), [], []
    made.training = made.training.shared(processes.rank(), processes.size())
    if saved is not None:
        made.load_state(saved)
    watch(made, epoch=records.append, save=lambda: states.append(written(made.state())))
    if stop and processes.rank() == processes.size() - 1:  # one process alone hears it
        interrupt_after(made, stop)
    result = made.fit()
    return weights(made), result, states[-1], curve(records)


@pytest.mark.few(1)
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 4)])
def test_a_run_goes_on_with_another_number_of_processes(before, after):
    expected, result, _, lines = fit()
    stopped = together(before, fit, 1) if before > 1 else [fit(1)]
    assert [one[1].finished for one in stopped] == [False] * before
    saved = stopped[0][2]
    assert saved["progress"]["batch"] in (1, 2)  # all of them stop at the same step
    assert len({one[2]["progress"]["batch"] for one in stopped}) == 1
    resumed = together(after, fit, 0, saved) if after > 1 else [fit(0, saved)]
    for found, ended, _, epochs in resumed:
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
        assert ended.best_epoch == result.best_epoch
        assert epochs == resumed[0][3]
        for one, other in zip(epochs, lines, strict=True):
            assert one[2] == pytest.approx(other[2], rel=1e-4)
            assert one[6] == pytest.approx(other[6], rel=1e-4)
            assert one[7] == pytest.approx(other[7], rel=1e-4)


@pytest.mark.slow
def test_all_processes_stop_early_after_the_same_epoch_and_more_processes_than_structures_work():
    settings = {"num_epochs": 30, "early_stopping": {"patience": 2, "min_delta": 0.5}}
    _, alone, _, _ = fit(**settings)
    found = together(4, lambda: fit(**settings))  # batches of three structures
    assert alone.stopped_early
    assert {one[1].epochs for one in found} == {alone.epochs}
    assert len({one[1].best_metric for one in found}) == 1


@pytest.mark.parametrize("optimizer", ["soap", "muon"])
def test_all_processes_have_the_same_weights_with_any_optimizer(optimizer):
    first, second = together(2, lambda: fit(optimizer=optimizer)[0])
    laws.assert_same_weights(first, second)


def test_the_law_finds_means_of_means(monkeypatch):
    """Divided by its own labels, the loss of each process would count alike."""

    def own(batch, name):
        return (~batch.labels[name].isnan()).sum() * processes.size()

    monkeypatch.setattr(LabelledBatch, "num_known", own)
    with pytest.raises(AssertionError, match="\\(2, 0, "):
        laws.processes_change_nothing(lambda: fit()[0], together, (2,), tolerance=1e-3)


def test_the_law_finds_gradients_that_are_not_added(monkeypatch):
    monkeypatch.setattr(trainer, "add_gradients", lambda parameters, flag: flag)
    with pytest.raises(AssertionError):
        laws.processes_change_nothing(lambda: fit()[0], together, (2,), tolerance=1e-3)


def test_the_law_holds_of_the_same_run():
    laws.processes_change_nothing(lambda: fit()[0], together, (2,), tolerance=1e-3)
