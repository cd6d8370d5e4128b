"""``pet-finetune relax``: what ASE's optimisers do with the same calculator, for each frame."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase.constraints import FixAtoms
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS, FIRE

from models import crystal, ethanol
from pet_finetune import PETCalculator
from pet_finetune.dynamics import relaxation as workflow

FEW = ("--steps", 4, "--fmax", 1e-8)


@pytest.fixture
def relax(command, here: Path):
    """Relax two molecules, one of them with a fixed atom and a label of another program."""
    first, second = ethanol(), ethanol()
    first.info |= {"energy": 3.0, "name": "first"}
    first.set_constraint(FixAtoms([0]))
    second.rattle(0.05, seed=1)
    ase.io.write("molecules.xyz", [first, second], format="extxyz")
    ase.io.write("crystal.xyz", crystal())

    def run(*arguments, structures="molecules.xyz", output="relaxed.xyz"):
        return command("relax", "base.ckpt", structures, "-o", output, *arguments)

    return run


def test_each_frame_moves_as_with_ase(relax):
    done = relax(*FEW, "--optimizer", "bfgs")
    assert done.code == 0, done.err
    assert "2 of 2 structures did not come below" in done.err
    for before, after in zip(
        ase.io.read("molecules.xyz", ":"), ase.io.read("relaxed.xyz", ":"), strict=True
    ):
        start = before.positions.copy()
        before.calc = PETCalculator("base.ckpt")
        BFGS(before, logfile=None).run(fmax=1e-8, steps=4)
        assert after.positions == pytest.approx(before.positions, abs=1e-6)
        assert np.abs(after.positions - start).max() > 1e-4
        assert after.get_potential_energy() == pytest.approx(before.get_potential_energy())
        assert (after.info["relax_steps"], after.info["relax_converged"]) == (4, False)
    first = ase.io.read("relaxed.xyz", 0)
    assert first.info["name"] == "first"
    assert first.constraints[0].index.tolist() == [0]


def test_the_cell_relaxes_under_a_pressure(relax):
    done = relax(*FEW, "--cell", "--pressure", 2.0, structures="crystal.xyz")
    assert done.code == 0, done.err
    before, after = ase.io.read("crystal.xyz"), ase.io.read("relaxed.xyz")
    before.calc = PETCalculator("base.ckpt")
    moving = FrechetCellFilter(before, scalar_pressure=2.0 / 160.21766208)
    FIRE(moving, logfile=None).run(fmax=1e-8, steps=4)
    assert after.cell.array == pytest.approx(before.cell.array, abs=1e-6)
    assert np.abs(after.cell.array - crystal().cell.array).max() > 1e-6
    assert after.get_stress() == pytest.approx(before.get_stress(), abs=1e-6)


def test_ctrl_c_leaves_what_is_done(relax, monkeypatch):
    one = workflow._relax

    def relaxed(atoms, *others):
        if others[2] == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return one(atoms, *others)

    monkeypatch.setattr(workflow, "_relax", relaxed)
    done = relax(*FEW)
    assert done.code == 130
    assert "1 of 2 structures are in relaxed.xyz" in done.err
    assert len(ase.io.read("relaxed.xyz", ":")) == 1


@pytest.mark.parametrize("optimizer", ["fire", "bfgs"])
def test_a_structure_that_fails_takes_no_other_with_it(relax, monkeypatch, optimizer):
    compute = PETCalculator.calculate

    def infinite(self, atoms, *others):
        compute(self, atoms, *others)
        if atoms.info["name"] == "bad":
            self.results["energy"] = np.inf
            self.results["forces"] = self.results["forces"] * np.nan

    monkeypatch.setattr(PETCalculator, "calculate", infinite)
    frames = [ethanol() for _ in range(3)]
    for seed, (frame, name) in enumerate(zip(frames, ("good", "bad", "good"), strict=True)):
        frame.info["name"] = name
        frame.rattle(0.02, seed=seed)
    ase.io.write("three.xyz", frames, format="extxyz")
    done = relax(*FEW, "--optimizer", optimizer, structures="three.xyz")
    assert done.code == 1
    assert "1 of 3 structures of three.xyz could not be relaxed" in done.err
    assert "frame 1: after 0 steps the energy or the forces are infinite" in done.err
    assert "2 of 3 structures are in relaxed.xyz" in done.err
    assert [a.info["relax_frame"] for a in ase.io.read("relaxed.xyz", ":")] == [0, 2]


def test_what_is_relaxed_is_on_the_disk_at_once(relax, monkeypatch):
    one = workflow._relax

    def relaxed(atoms, *others):
        if others[2] == 1:
            raise MemoryError
        return one(atoms, *others)

    monkeypatch.setattr(workflow, "_relax", relaxed)
    assert relax(*FEW).code == 1
    assert len(ase.io.read("relaxed.xyz", ":")) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--optimizer", "lbgs"), "Did you mean 'lbfgs'?"),
        (("--pressure", 2), "without --cell"),
        (("--cell",), "frame 1 of molecules.xyz: --cell needs"),
        (("--fmax", 0), "--fmax: expected a number above 0"),
        (("--index", 7), "has no frame 7"),
    ],
)
def test_what_cannot_be_is_told_before_the_first_step(relax, arguments, words):
    done = relax(*arguments)
    assert done.code == 1
    assert words in done.err
    assert not Path("relaxed.xyz").exists()


def test_a_file_that_is_there_stays(relax):
    Path("relaxed.xyz").write_text("mine")
    done = relax()
    assert done.code == 1
    assert "relaxed.xyz is there already" in done.err
    assert Path("relaxed.xyz").read_text() == "mine"
