"""``pet-finetune relax``: what ASE's optimisers do with the same calculator, for each frame."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase.constraints import ExternalForce, FixAtoms, Hookean
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS

from models import crystal, ethanol
from pet_finetune import PETCalculator
from pet_finetune.dynamics import relaxation as workflow
from pet_finetune.errors import DataError
from pet_finetune.model.compiled import CompiledPredictions

FEW = ("--steps", 4, "--fmax", 1e-8)


@pytest.fixture
def relax(command, here: Path):
    """Relax two molecules, one of them with a fixed atom and a label of another program."""
    first, second = ethanol(), ethanol()
    first.info |= {"energy": 3.0, "name": "first"}
    first.set_constraint(FixAtoms([0]))
    second.rattle(0.05, seed=1)
    ase.io.write("molecules.xyz", [first, second], format="extxyz")
    crystals = [crystal(), crystal().repeat((2, 1, 1))]
    crystals[1].rattle(0.05, seed=2)
    ase.io.write("crystals.xyz", crystals)

    def run(*arguments, structures="molecules.xyz", output="relaxed.xyz"):
        return command("relax", "base.ckpt", structures, "-o", output, *arguments)

    return run


def test_the_word_on_compiling_comes_to_who_decides(relax, command, monkeypatch):
    words = []
    monkeypatch.setattr(CompiledPredictions, "chosen", lambda model, word: words.append(word))
    assert relax("--steps", 1, "--compile", "on").code == 0
    assert command("eval", "base.ckpt", "relaxed.xyz", "--compile", "off").code == 0
    run = ("md", "base.ckpt", "molecules.xyz", "-o", "run", "--steps", 1, "--every", 1)
    assert command(*run, "--compile", "on").code == 0
    assert command("md", "--restart", "run", "--steps", 2).code == 0
    assert command("eval", "base.ckpt", "relaxed.xyz").code == 0
    assert words == ["on", "off", "on", "on", "auto"]


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


@pytest.mark.parametrize("optimizer", ["fire", "lbfgs"])
def test_the_cells_relax_under_a_pressure(relax, optimizer):
    done = relax(
        *FEW, "--cell", "--pressure", 2.0, "--optimizer", optimizer, structures="crystals.xyz"
    )
    assert done.code == 0, done.err
    for before, after in zip(
        ase.io.read("crystals.xyz", ":"), ase.io.read("relaxed.xyz", ":"), strict=True
    ):
        start = before.cell.array.copy()
        before.calc = PETCalculator("base.ckpt")
        moving = FrechetCellFilter(before, scalar_pressure=2.0 / 160.21766208)
        workflow.OPTIMIZERS[optimizer](moving, logfile=None).run(fmax=1e-8, steps=4)
        assert after.cell.array == pytest.approx(before.cell.array, abs=1e-5)
        assert np.abs(after.cell.array - start).max() > 1e-6
        assert after.get_stress() == pytest.approx(before.get_stress(), abs=1e-5)


def test_those_at_rest_make_room_and_all_are_in_order(relax, monkeypatch):
    """Whatever is computed together: the steps of each are those that it makes alone."""
    frames = [ethanol() for _ in range(5)]
    for seed, frame in enumerate(frames):
        frame.rattle(0.02 * (5 - seed), seed=seed)
    ase.io.write("five.xyz", frames)
    monkeypatch.setattr(workflow, "_ATOMS_ON_CPU", 1)
    alone = relax("--fmax", 0.5, structures="five.xyz", output="alone.xyz")
    monkeypatch.setattr(workflow, "_ATOMS_ON_CPU", 30)
    together = relax("--fmax", 0.5, structures="five.xyz")
    assert (alone.code, together.code) == (0, 0), alone.err + together.err
    one, other = (ase.io.read(name, ":") for name in ("alone.xyz", "relaxed.xyz"))
    assert [frame.info["relax_frame"] for frame in other] == [0, 1, 2, 3, 4]
    steps = [frame.info["relax_steps"] for frame in other]
    assert steps == [frame.info["relax_steps"] for frame in one]
    assert len(set(steps)) > 1
    for first, second in zip(one, other, strict=True):
        assert second.positions == pytest.approx(first.positions, abs=1e-4)


def test_what_the_memory_does_not_hold_is_computed_in_halves(relax, monkeypatch):
    predict, sizes = PETCalculator.predict_together, []

    def scarce(self, structures, neighbors):
        sizes.append(len(structures))
        if len(structures) > 2:
            raise MemoryError
        return predict(self, structures, neighbors)

    monkeypatch.setattr(PETCalculator, "predict_together", scarce)
    ase.io.write("five.xyz", [ethanol() for _ in range(5)])
    assert relax(*FEW, structures="five.xyz").code == 0
    assert sizes.count(5) == 1  # what was too much once is not tried again
    assert 2 in sizes
    assert len(ase.io.read("relaxed.xyz", ":")) == 5


def one_by_one(monkeypatch, at_second):
    """Structures are computed alone, and something happens at a move of the second."""
    move = workflow._Underway.move

    def moved(self):
        if self.number == 1:
            at_second()
        return move(self)

    monkeypatch.setattr(workflow, "_ATOMS_ON_CPU", 1)
    monkeypatch.setattr(workflow._Underway, "move", moved)


def test_ctrl_c_leaves_what_is_done(relax, monkeypatch):
    one_by_one(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGINT))
    done = relax(*FEW)
    assert done.code == 130
    assert "1 of 2 structures are in relaxed.xyz" in done.err
    assert len(ase.io.read("relaxed.xyz", ":")) == 1


@pytest.mark.parametrize(
    ("error", "words"), [(DataError("too far"), "too far"), (MemoryError(), "fit into the memory")]
)
def test_a_structure_that_cannot_be_computed_takes_no_other_with_it(
    relax, monkeypatch, error, words
):
    calculate = workflow._Batches._calculate

    def refuses(self, several):
        if any(one.number == 1 for one in several):
            raise error
        return calculate(self, several)

    monkeypatch.setattr(workflow._Batches, "_calculate", refuses)
    ase.io.write("three.xyz", [ethanol() for _ in range(3)])
    done = relax(*FEW, structures="three.xyz")
    assert done.code == 1
    assert "1 of 3 structures of three.xyz could not be relaxed:\nframe 1: " in done.err
    assert words in done.err
    assert [a.info["relax_frame"] for a in ase.io.read("relaxed.xyz", ":")] == [0, 2]


@pytest.mark.parametrize("optimizer", ["fire", "bfgs"])
def test_a_structure_that_fails_takes_no_other_with_it(relax, monkeypatch, optimizer):
    predict = PETCalculator.predict_together

    def infinite(self, structures, neighbors):
        found = predict(self, structures, neighbors)
        for k, atoms in enumerate(structures):
            if atoms.info["name"] == "bad":
                found.energy[k] = np.inf
        return found

    monkeypatch.setattr(PETCalculator, "predict_together", infinite)
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
    def fails():
        raise MemoryError

    one_by_one(monkeypatch, fails)
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


@pytest.mark.parametrize(
    "constraint", [ExternalForce(0, 1, 0.5), Hookean(a1=0, a2=1, rt=1.0, k=5.0)]
)
def test_constraints_that_add_energy_are_kept_and_not_part_of_the_labels(relax, constraint):
    atoms = ethanol()
    atoms.set_constraint(constraint)
    ase.io.write("held.traj", atoms)
    assert relax(*FEW, structures="held.traj").code == 0
    (after,) = ase.io.read("relaxed.xyz", ":")
    assert type(constraint).__name__ in str(after.info["constraints"])
    energy = after.get_potential_energy()
    after.calc = PETCalculator("base.ckpt")
    assert energy == pytest.approx(after.get_potential_energy(), abs=1e-5)


def test_a_file_that_is_there_stays(relax):
    Path("relaxed.xyz").write_text("mine")
    done = relax()
    assert done.code == 1
    assert "'relaxed.xyz' exists and is not overwritten" in done.err
    assert Path("relaxed.xyz").read_text() == "mine"


def test_atoms_on_top_of_each_other_are_told_of(relax):
    atoms = ethanol()
    atoms.positions[1] = atoms.positions[0]
    ase.io.write("one.xyz", atoms)
    done = relax("--steps", 1, structures="one.xyz")
    assert "Two atoms are closer than any can be (0.4 A) in frame 0 of relaxed.xyz" in done.err


def test_of_two_that_begin_at_once_one_gets_the_file(relax, monkeypatch):
    check = workflow._check

    def meanwhile(*arguments):
        found = check(*arguments)
        Path("relaxed.xyz").write_text("of the other")
        return found

    monkeypatch.setattr(workflow, "_check", meanwhile)
    done = relax(*FEW)
    assert done.code == 1
    assert "'relaxed.xyz' exists and is not overwritten" in done.err
    assert Path("relaxed.xyz").read_text() == "of the other"
