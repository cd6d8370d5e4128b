"""Last-layer uncertainties (LLPR) in the commands: info, eval, md, train and export."""

from __future__ import annotations

import json
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms

import pet_finetune as pf
from models import ethanol, random_potential, with_last_layer
from pet_finetune import PETCalculator
from pet_finetune.checkpoint import load_checkpoint, save_checkpoint

SHORT = ("--steps", 4, "--timestep", 0.1, "--every", 2, "--temperature", 50, "--seed", 1)


@pytest.fixture
def sure(here: Path) -> str:
    """A checkpoint with an uncertainty of three members."""
    save_checkpoint("sure.ckpt", with_last_layer(random_potential(dtype=torch.float32)))
    return "sure.ckpt"


def said(model: str, atoms: Atoms) -> float:
    return PETCalculator(model, device="cpu").get_property("energy_uncertainty", atoms)


def test_info_names_it(command, sure: str) -> None:
    assert "energy (last layer, 3 members)" in command("info", sure).out
    (facts,) = json.loads(command("info", sure, "--json").out)
    assert facts["uncertainties"] == {
        "energy": {"kind": "llpr", "factor": pytest.approx(1.7), "members": 3}
    }
    assert "uncertainty" not in command("info", "base.ckpt").out


def test_eval_shows_and_writes_it(command, sure: str) -> None:
    answer = command("eval", sure, "test.xyz", "-o", "predicted.xyz")
    assert answer.code == 0, answer.err
    assert "uncertainty of 'energy':" in answer.err
    assert "miscalibration area" in answer.err
    frames = ase.io.read("predicted.xyz", ":")
    for atoms in frames:
        expected = said(sure, atoms)
        assert atoms.info["energy_uncertainty"] == pytest.approx(expected, rel=1e-4)
    assert "uncertainty" not in command("eval", "base.ckpt", "test.xyz").err
    result = pf.evaluate(sure, "test.xyz", device="cpu")
    (rows,) = result.predictions.values()
    found = [float(row["energy_uncertainty"]) for row in rows]
    np.testing.assert_allclose(found, [a.info["energy_uncertainty"] for a in frames], rtol=1e-6)
    (by_target,) = result.uncertainties.values()
    sizes = [len(atoms) for atoms in frames]
    np.testing.assert_allclose(by_target["energy"].spreads, np.divide(found, sizes), rtol=1e-6)


def test_a_simulation_logs_it(command, sure: str) -> None:
    ase.io.write("molecule.xyz", ethanol())
    answer = command("md", sure, "molecule.xyz", "-o", "run", *SHORT)
    assert answer.code == 0, answer.err
    header = Path("run/md.csv").read_text().splitlines()[0]
    assert "energy_uncertainty_eV" in header
    assert "max_forces" not in header
    frames = ase.io.read("run/trajectory.xyz", ":")
    assert frames[1].info["energy_uncertainty"] == pytest.approx(said(sure, frames[1]), rel=1e-4)
    stopped = command("md", sure, "molecule.xyz", "-o", "s", *SHORT, "--stop-uncertainty", 1e-3)
    assert "the force on an atom is uncertain by" in stopped.err
    save_checkpoint("alone.ckpt", with_last_layer(random_potential(), members=0))
    refused = command("md", "alone.ckpt", "molecule.xyz", *SHORT, "--stop-uncertainty", 1e-3)
    assert refused.code == 1
    assert "--stop-uncertainty: one model has no uncertainty." in refused.err
    assert load_checkpoint("alone.ckpt").model.uncertainties
