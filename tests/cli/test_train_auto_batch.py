"""`max_atoms_per_batch: auto`, and steps that run out of memory, from the command line."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from pet_finetune.checkpoint.opening import load_checkpoint
from pet_finetune.model.potential import Potential
from pet_finetune.training import batch_memory, sets
from tiny_data import options, write_options


def test_the_number_is_found_once_and_kept(here, command, stop, monkeypatch):
    monkeypatch.setattr(batch_memory, "_free_mib", lambda: 1e6)
    monkeypatch.setattr(batch_memory, "_STEPS", 3)
    sizes = {"max_atoms_per_batch": "auto", "batch_size": None, "num_epochs": None}
    write_options(Path("mine.yaml"), options(sizes))
    # The chosen batch size of 4 would have 2 updates an epoch, the one that is found has 3.2.
    monkeypatch.setattr(sets, "FEWEST_EPOCHS", 1)
    monkeypatch.setattr(sets, "_UPDATES", 9)
    stop(2)
    answer = command("train", "mine.yaml", "-c", "base.ckpt", "-o", "run")
    assert answer.code == 130
    assert "max_atoms_per_batch: auto: 12 atoms" in answer.err
    assert "max_atoms_per_batch 12, num_epochs 3: chosen" in answer.err
    saved = load_checkpoint(Path("run/last.ckpt")).training
    assert "max_atoms_per_batch: auto" in Path("run/options.yaml").read_text()
    monkeypatch.setattr(batch_memory, "largest_batch", None)
    monkeypatch.setattr("pet_finetune.training.prepare.largest_batch", None)
    answer = command("train", "mine.yaml", "--restart", "run")
    assert answer.code == 0, answer.err
    assert saved["run"]["max_atoms"] == 12


def test_a_number_that_is_none_is_refused(here, command):
    write_options(Path("mine.yaml"), options({"max_atoms_per_batch": "much"}))
    answer = command("train", "mine.yaml", "-c", "base.ckpt")
    assert answer.code == 1
    assert "a positive integer, or auto" in answer.err


def rows(folder):
    with Path(folder, "train.csv").open(newline="") as stream:
        return [
            {k: float(v) for k, v in row.items() if v and "second" not in k}
            for row in csv.DictReader(stream)
        ]


def test_features_count_once_where_batches_are_computed_in_parts(here, train, monkeypatch):
    training = {
        "optimizer": "adamw", "batch_size": 4, "rotational_consistency": 0.1,
        "finetune": {"method": "full", "replay": {"fraction": 0.5}, "anchor": {"type": "l2sp"}},
    }  # fmt: skip
    train(options(training), "-c", "base.ckpt")
    Path("run").rename("whole")
    real = Potential.predict_targets

    def predict_targets(self, batch, *arguments, **more):
        if more.get("create_graph") and batch.num_structures > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, batch, *arguments, **more)

    monkeypatch.setattr(Potential, "predict_targets", predict_targets)
    answer = train(options(training), "-c", "base.ckpt")
    assert "computed in 2 parts" in answer.err
    for one, other in zip(rows("run"), rows("whole"), strict=True):
        assert one == pytest.approx(other, rel=2e-3, abs=1e-4)
