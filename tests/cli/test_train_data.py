"""``pet-finetune train`` on every kind of data: lone energies, stresses, charges, index lists."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from models import random_potential
from pet_finetune.checkpoint.native import save_checkpoint
from pet_finetune.checkpoint.opening import load_checkpoint
from tiny_data import (
    crystals,
    data_section,
    epochs,
    molecules,
    options,
    write_frames,
    write_options,
)


def test_batches_by_atoms(here, train):
    # Methanol has 6 atoms and water 3: 18 hold three to six structures.
    content = options({"max_atoms_per_batch": 18, "num_epochs": 1})
    del content["architecture"]["training"]["batch_size"]
    train(content, "-c", "base.ckpt")
    last = load_checkpoint("run/last.ckpt").training["trainer"]["progress"]
    assert 2 <= last["step"] <= 4


def test_frames_without_forces(here, train):
    frames = molecules(10)
    for atoms in frames[::3]:
        del atoms.calc.results["forces"]
    write_frames(Path("train.xyz"), frames)
    train(options(), "-c", "base.ckpt")
    assert all(np.isfinite(float(row["loss"])) for row in epochs("run"))


def test_energies_alone(here, train):
    frames = molecules(10)
    for atoms in frames:
        del atoms.calc.results["forces"]
    write_frames(Path("train.xyz"), frames)
    write_frames(Path("test.xyz"), frames[:3])
    answer = train(options(), "-c", "base.ckpt")
    assert "energy MAE" in answer.out
    assert "forces" not in answer.out.replace("forgetting: forces", "")
    assert "train/energy/forces_mae" not in epochs("run")[0]


def test_forces_alone(here, train):
    frames = molecules(10)
    for atoms in frames:
        del atoms.calc.results["energy"]
    write_frames(Path("train.xyz"), frames)
    write_frames(Path("test.xyz"), frames[:3])
    answer = train(options({"ema": 0.9}), "-c", "base.ckpt")
    assert "forces MAE" in answer.out
    assert "energy" not in answer.out.replace("forgetting: energy", "")
    assert "all of 10 frames have no energy" in Path("run/train.log").read_text()
    row = epochs("run")[0]
    assert "validation/energy/forces_mae" in row
    assert "validation/energy/energy_mae" not in row
    before, after = (load_checkpoint(p).model.composition.get("energy")
                     for p in ("base.ckpt", "run/best_model.ckpt"))  # fmt: skip
    assert torch.equal(before, after)


@pytest.fixture
def forces_alone(here):
    """``train.xyz`` and ``test.xyz`` without an energy."""
    for name, frames in {"train.xyz": molecules(10), "test.xyz": molecules(4, seed=1)}.items():
        for atoms in frames:
            del atoms.calc.results["energy"]
        write_frames(Path(name), frames)


KEEPING = {
    "ensemble": {"ensemble": 2},
    "replay of the foundation": {"replay": {"structures": ["training", "probe"]}},
    "replay of labels": {"replay": {"read_from": data_section("train.xyz"), "fraction": 0.5}},
    "anchor": {"anchor": {"type": "ewc"}},
}


@pytest.mark.parametrize("how", KEEPING)
def test_forces_alone_with(here, train, forces_alone, how):
    answer = train(options({"finetune": KEEPING[how]}), "-c", "base.ckpt")
    assert "forces MAE" in answer.out
    rows = epochs("run/member_1" if how == "ensemble" else "run")
    assert all(np.isfinite(float(row["loss"])) for row in rows)
    assert (
        "energy_mae"
        not in json.loads(Path("run/results.json").read_text())["after"]["test"]["energy"]
    )


def test_forces_alone_are_reported(here, train, forces_alone, reported, command, monkeypatch):
    train(options(), "-c", "base.ckpt")
    page = Path("run/report.html").read_text()
    assert "forces" in page
    assert ">nan" not in page.casefold()
    answer = command("report", "run")
    assert answer.code == 0, answer.err


@pytest.mark.parametrize("start", [("-c", "base.ckpt"), ()])
def test_a_metric_without_labels_is_refused_before_the_model_is_read(
    here, command, forces_alone, start, monkeypatch
):
    monkeypatch.setattr("pet_finetune.training.prepare.start_model", None)
    write_options(Path("mine.yaml"), options({"best_model_metric": "energy_mae"}))
    answer = command("train", "mine.yaml", *start)
    assert answer.code == 1
    assert "'energy_mae' needs labels that no validation structure has" in answer.err
    assert "there: energy/forces" in answer.err


def test_isolated_atoms_are_in_no_set(here, train):
    frames = molecules(10)
    atoms = Atoms("O")
    atoms.info["config_type"] = "IsolatedAtom"
    atoms.calc = SinglePointCalculator(atoms, energy=-2000.0, forces=np.zeros((1, 3)))
    write_frames(Path("train.xyz"), [atoms, *frames])
    train(options(), "-c", "base.ckpt")
    log = Path("run/train.log").read_text()
    assert "1 of 11 frames are isolated atoms (frame 0) and are left out." in log
    splits = json.loads(Path("run/splits.json").read_text())["sets"]
    frames = [n for name in ("train", "validation") for p in splits[name]["parts"]
              if p["file"] == "train.xyz" for n in p["frames"]]  # fmt: skip
    assert frames
    assert 0 not in frames


def test_periodic_structures_with_stress_beside_molecules(here, train):
    write_frames(Path("train.xyz"), [*crystals(5), *molecules(5)])
    write_frames(Path("test.xyz"), crystals(2, seed=1))
    answer = train(options(), "-c", "base.ckpt")
    assert "stress MAE" in answer.out
    assert "meV/A^3" in answer.out
    assert float(epochs("run")[0]["train/energy/stress_mae"]) > 0


def test_everything_at_once_in_double_precision(here, train):
    content = options(
        {
            "ema": 0.9,
            "early_stopping": 3,
            "loss": {"energy": {"type": "huber", "delta": 0.1, "forces": {"weight": 2.0}}},
            "best_model_metric": "forces_mae",
            "weight_decay": 0.01,
            "finetune": {"config": {"dropout": 0.2, "target_modules": "all-linear"}},
        },
        base_precision=64,
    )
    train(content, "-c", "base.ckpt")
    assert load_checkpoint("run/best_model.ckpt").model.dtype == torch.float64


def test_sets_by_indices_and_no_final_evaluation(here, train):
    content = options(
        validation_set={"indices": [0, 1]}, test_set={"indices": [2]}, final_eval=False
    )
    answer = train(content, "-c", "base.ckpt")
    assert answer.out == ""
    splits = json.loads(Path("run/splits.json").read_text())["sets"]
    assert splits["test"]["parts"][0]["frames"] == [2]


def test_charges_and_spins_are_read_for_a_model_that_knows_them(here, train, command):
    frames = molecules(10)
    for index, atoms in enumerate(frames):
        atoms.info["charge"] = index % 3 - 1
    write_frames(Path("train.xyz"), frames)
    save_checkpoint("base.ckpt", random_potential(system_conditioning=True, max_charge=1))
    content = options(test_set=0.1)
    content["training_set"]["extra_data"] = {"charge": {"key": "charge"}}
    train(content, "-c", "base.ckpt")
    frames[3].info["charge"] = 2
    write_frames(Path("train.xyz"), frames)
    write_options(Path("more.yaml"), content)
    answer = command("train", "more.yaml", "-c", "base.ckpt")
    assert answer.code != 0
    assert "the total charge is 2" in answer.err


def test_heads_of_two_targets(here, train):
    save_checkpoint("base.ckpt", random_potential(targets=("energy", "other")))
    content = options({"finetune": {"method": "full"}}, test_set=0.1)
    content["training_set"] = data_section("train.xyz")
    target = {**content["training_set"]["targets"]["energy"], "quantity": "energy"}
    content["training_set"]["targets"] = {"energy": target, "other": {**target}}
    answer = train(content, "-c", "base.ckpt")
    assert "other forces MAE" in answer.out
    assert list(load_checkpoint("run/best_model.ckpt").model.targets) == ["energy", "other"]


def test_baselines_of_a_checkpoint(here, train, command):
    base = load_checkpoint("base.ckpt").model
    content = options({"atomic_baseline": "base.ckpt", "num_epochs": 1})
    train(content, "-c", "base.ckpt")
    found = load_checkpoint("run/best_model.ckpt").model.composition.get("energy")
    assert torch.equal(found, base.composition.get("energy"))
    answer = command("train", "mine.yaml", "-o", "run", "--restart", "run", "-r",
                     "architecture.training.num_epochs=2")  # fmt: skip
    assert answer.code == 0, answer.err
    answer = command("train", "mine.yaml", "-c", "base.ckpt", "-o", "other", "-r",
                     "architecture.training.atomic_baseline=gone.ckpt")  # fmt: skip
    assert answer.code == 1
    assert "gone.ckpt" in answer.err
