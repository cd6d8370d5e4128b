"""``pet-finetune md``: its files, its checks, stopping, going on, and committees."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase.constraints import FixAtoms, FixBondLengths

from models import crystal, ethanol, random_potential, trained_adapter
from pet_finetune.adapters.peft_files import save_adapter
from pet_finetune.checkpoint.native import save_checkpoint
from pet_finetune.checkpoint.opening import load_checkpoint
from pet_finetune.dynamics import md_run as workflow
from pet_finetune.dynamics.measure import MDDisplay
from pet_finetune.model import inference
from pet_finetune.model.inference import predict_mean

SHORT = ("--steps", 6, "--timestep", 0.1, "--every", 2, "--temperature", 50, "--seed", 1)


@pytest.fixture
def md(command, here: Path, monkeypatch: pytest.MonkeyPatch):
    """Simulate molecule.xyz with base.ckpt into the folder ``run``; a plot is not drawn."""
    monkeypatch.setattr(workflow, "simulation_svg", lambda *ignored: "<svg/>")
    frames = [ethanol(), crystal()]
    ase.io.write("crystal.xyz", frames[1])
    ase.io.write("molecule.xyz", frames[0])
    ase.io.write("both.xyz", frames)

    def run(*arguments: Any, structure: str = "molecule.xyz", output: str = "run"):
        return command("md", "base.ckpt", structure, "-o", output, *SHORT, *arguments)

    return run


@pytest.fixture
def press_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Call with a step: after it, Ctrl-C is pressed, once."""

    def at(step: int) -> None:
        def show(self: MDDisplay, row) -> None:
            if row.step == step:
                os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(MDDisplay, "step", show)

    return at


def files_of(folder: str) -> list[bytes]:
    return [(Path(folder) / name).read_bytes() for name in ("trajectory.xyz", "md.csv")]


def test_a_simulation_and_what_it_leaves(md) -> None:
    answer = md("--ensemble", "nve")
    assert answer.code == 0, answer.err
    assert "NVE of C2H6O, 9 atoms, with base.ckpt: 6 steps of 0.1 fs at 50 K" in answer.err
    assert "temperature" in answer.out
    assert {path.name for path in Path("run").iterdir()} == {
        "trajectory.xyz", "md.csv", "md.svg", "md.json", "md.log", "results.json", "start.traj",
        "state.npz", "final.xyz",
    }  # fmt: skip
    results = json.loads(Path("run/results.json").read_text())
    assert (results["reason"], results["steps"]) == ("finished", 6)
    assert results["time"] == pytest.approx(6e-4)
    assert json.loads(Path("run/md.json").read_text())["settings"]["seed"] == 1
    final = ase.io.read("run/final.xyz")
    assert final.info["step"] == 6
    assert "6 steps of 0.1 fs" in Path("run/md.log").read_text()


@pytest.mark.parametrize("ensemble", ["nvt", "npt"])
def test_ctrl_c_and_going_on(md, command, press_ctrl_c, ensemble: str) -> None:
    given = ("--ensemble", ensemble, *(("--pressure", 330) if ensemble == "npt" else ()))
    structure = "crystal.xyz" if ensemble == "npt" else "molecule.xyz"
    assert md(*given, structure=structure, output="whole").code == 0
    press_ctrl_c(3)
    stopped = md(*given, structure=structure)
    assert stopped.code == 130
    assert "interrupted at step 3; the state is saved. Go on with: pet-finetune md" in stopped.err
    again = command("md", "--restart", "run")
    assert again.code == 0, again.err
    assert "going on from step 3 of 6" in again.err
    assert files_of("run") == files_of("whole")
    done = command("md", "--restart", "run")
    assert done.code == 1
    assert "has made 6 steps of 6: nothing is left to do" in done.err
    assert command("md", "--restart", "auto", "-o", ".", "--steps", 8).code == 0
    assert json.loads(Path("run/md.json").read_text())["settings"]["steps"] == 8


def test_a_simulation_is_gone_on_with_from_anywhere(md, command, monkeypatch) -> None:
    assert md().code == 0
    Path("elsewhere").mkdir()
    folder = Path("run").resolve()
    monkeypatch.chdir("elsewhere")
    assert command("md", "--restart", folder, "--steps", 8).code == 0
    Path("../base.ckpt").rename("../moved.ckpt")
    lost = command("md", "--restart", folder, "--steps", 10)
    assert lost.code == 1
    assert "no such checkpoint file" in lost.err
    assert command("md", "../moved.ckpt", "--restart", folder, "--steps", 10).code == 0


def test_orientations_move_the_atoms_by_their_mean(md, command, monkeypatch) -> None:
    rotated = []
    monkeypatch.setattr(
        inference,
        "predict_mean",
        lambda *given: rotated.append(len(given[1])) or predict_mean(*given),
    )
    assert md("--orientations", 4).code == 0
    steps = len(rotated)
    assert steps > 6
    assert set(rotated) == {4}
    assert command("md", "--restart", "run", "--steps", 8).code == 0
    assert len(rotated) > steps
    assert json.loads(Path("run/md.json").read_text())["model"]["orientations"] == 4
    refused = md("--orientations", 5, output="five")
    assert refused.code == 1
    assert "orientations: 5 is not one of 1, 2, 4, 12, 24" in refused.err


def test_a_committee_has_an_uncertainty_and_can_stop_a_run(md, here: Path) -> None:
    for seed in range(3):
        adapted = trained_adapter(load_checkpoint("base.ckpt").model, seed=seed)
        save_adapter(adapted, here / f"a{seed}", "base")
    adapters = [part for seed in range(3) for part in ("--adapter", f"a{seed}")]
    answer = md(*adapters)
    assert answer.code == 0, answer.err
    assert "a committee of base.ckpt" in answer.err
    assert "largest uncertainty" in answer.out
    frames = ase.io.read("run/trajectory.xyz", ":")
    rows = np.genfromtxt("run/md.csv", delimiter=",", names=True)
    for number, frame in enumerate(frames):
        largest = frame.arrays["forces_uncertainty"].max()
        assert rows["max_forces_uncertainty_eV_A"][number] == pytest.approx(largest, abs=1e-7)
    limit = rows["max_forces_uncertainty_eV_A"].min() / 2
    stopped = md(*adapters, "--stop-uncertainty", limit, output="stopped")
    assert stopped.code == 0
    assert "stopped at step 1: the force on an atom is uncertain by" in stopped.err
    assert json.loads(Path("stopped/results.json").read_text())["reason"] == "uncertain"
    one = md("--adapter", "a0", output="one")
    assert one.code == 0, one.err
    assert "uncertainty" not in one.out


def test_all_that_is_wrong_is_said_at_once(md, here: Path) -> None:
    Path("nowhere").mkdir()
    answer = md(
        "--ensemble", "npt", "--friction", -1, "--temperature", -5, "--keep-velocities",
        "--stop-uncertainty", 0.1, "--adapter", "nowhere",
    )  # fmt: skip
    assert answer.code == 1
    for words in (
        "problems",
        "--friction: expected a number above 0, got -1.",
        "--temperature: expected 0 K or more, got -5.",
        "--ensemble npt: the pressure needs a volume",
        "--keep-velocities: molecule.xyz holds no velocities",
        "--stop-uncertainty: one model has no uncertainty.",
        "nowhere",
    ):
        assert words in answer.err
    assert not (here / "run").exists()


def test_frames_are_chosen(md) -> None:
    answer = md(structure="both.xyz")
    assert answer.code == 0, answer.err
    assert "both.xyz has 2 frames: the last, 1, is taken" in answer.err
    assert "NVT (langevin) of C2Si2, 4 atoms" in answer.err
    assert "NVT (langevin) of C2H6O" in md("--index", 0, structure="both.xyz", output="0").err
    answer = md("--index", 2, structure="both.xyz", output="2")
    assert answer.code == 1
    assert "--index: both.xyz has no frame 2. It has frames 0 to 1" in answer.err


def test_structures_that_the_model_cannot_move(md) -> None:
    gold = ethanol()
    gold.symbols[3] = "Au"
    ase.io.write("gold.xyz", gold)
    assert "The model does not know Au" in md(structure="gold.xyz").err
    near = ethanol()
    near.positions[4] = near.positions[3] + [0.2, 0, 0]
    ase.io.write("near.xyz", near)
    answer = md(structure="near.xyz")
    assert answer.code == 1
    assert "near.xyz: atom 3 (H) and atom 4 (H) are 0.20 A apart" in answer.err
    near.positions[4] = np.nan
    ase.io.write("nan.xyz", near)
    assert "nan.xyz: The positions of 1 of 9 atoms are NaN" in md(structure="nan.xyz").err


def test_velocities_of_a_file(md) -> None:
    assert md().code == 0
    kept = md(structure="run/final.xyz", output="kept")
    assert "velocities: those of run/final.xyz" in kept.err
    first, last = ase.io.read("kept/trajectory.xyz", 0), ase.io.read("run/final.xyz")
    np.testing.assert_allclose(first.get_momenta(), last.get_momenta())
    new = md("--new-velocities", structure="run/final.xyz", output="new")
    assert "velocities: drawn for 50 K" in new.err
    first = ase.io.read("new/trajectory.xyz", 0)
    assert not np.allclose(first.get_momenta(), last.get_momenta())


@pytest.mark.parametrize("ending", ["xyz", "traj", "json"])
def test_going_on_from_the_last_frame_is_the_same_physics(md, command, ending: str) -> None:
    start = ethanol()
    start.set_masses(np.where(start.numbers == 1, 2.014, start.get_masses()))
    # extended XYZ written by ASE alone has no room for bond lengths.
    bonds = [] if ending == "xyz" else [FixBondLengths([[0, 1]])]
    start.set_constraint([FixAtoms([2]), *bonds])
    start.info["charge"] = 0
    ase.io.write(f"start.{ending}", start)
    assert md(structure=f"start.{ending}").code == 0
    assert command("md", "--restart", "run", "--steps", 8).code == 0
    assert md("--keep-velocities", structure="run/final.xyz", output="next").code == 0
    for folder in ("run", "next"):
        frames = ase.io.read(f"{folder}/trajectory.xyz", ":")
        assert ending == "json" or frames[0].info["charge"] == 0  # ASE's database has no info
        np.testing.assert_allclose(frames[-1].get_masses(), start.get_masses())
        moved = np.abs(frames[-1].positions - frames[0].positions).max(axis=1)
        assert moved[2] == 0
        assert moved[3] > 0
        assert [type(c).__name__ for c in frames[-1].constraints] == ["FixAtoms"]
        if bonds:
            assert frames[-1].get_distance(0, 1) == pytest.approx(start.get_distance(0, 1))
            assert frames[-1].info["constraints"][0]["name"] == "FixBondLengths"
    last, first = ase.io.read("run/final.xyz"), ase.io.read("next/trajectory.xyz", 0)
    assert last.info["temperature_K"] == pytest.approx(first.info["temperature_K"], rel=1e-5)


def test_a_column_of_masses_counts(md) -> None:
    text = "3\nProperties=species:S:1:pos:R:3:mass:R:1\nO 0 0 .1193 {}\nH 0 .7632 -.477 2.014\n"
    Path("mass.xyz").write_text(text.format(15.999) + "H 0 -.7632 -.477 2.014\n")
    answer = md(structure="mass.xyz")
    assert answer.code == 0, answer.err
    np.testing.assert_allclose(ase.io.read("run/final.xyz").get_masses(), [15.999, 2.014, 2.014])
    Path("mass.xyz").write_text(text.format(0) + "H 0 -.7632 -.477 2.014\n")
    assert "atom 0 (O) has the mass 0 in the column 'mass'" in (
        md(structure="mass.xyz", output="other").err
    )


def test_a_start_can_be_relaxed(md) -> None:
    answer = md("--minimize", 5)
    assert answer.code == 0, answer.err
    assert "relaxed with FIRE: largest force" in answer.err


def test_a_strained_start_is_warned_of(md, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workflow, "_LARGE_FORCE", 1e-3)
    assert "--minimize 200 relaxes it first" in md().err


def test_an_exploded_run_ends_with_status_1(md) -> None:
    answer = md("--max-temperature", 51, "--temperature", 60, "--ensemble", "nve")
    assert answer.code == 1
    assert "error: The simulation has gone wrong at step 0" in answer.err
    assert "has gone wrong" in Path("run/md.log").read_text()


def test_folders_and_arguments_that_do_not_go_together(md, command) -> None:
    assert md().code == 0
    assert "'run' holds a simulation already" in md().err
    assert "md: name a model and a structure" in command("md", "base.ckpt").err
    assert "there is no folder 'nowhere'" in command("md", "--restart", "nowhere").err
    assert not Path("nowhere").exists()
    assert (
        "no simulation below 'nowhere'" in command("md", "--restart", "auto", "-o", "nowhere").err
    )
    answer = command("md", "--restart", "run", "--temperature", 3, "--index", 0)
    assert "leave --temperature, --index out" in answer.err
    answer = command("md", "--restart", "run", "--orientations", 4, "--dtype", "float64")
    assert "leave --dtype, --orientations out" in answer.err


def test_another_model_does_not_go_on(md, command, here: Path) -> None:
    assert md().code == 0
    save_checkpoint(here / "other.ckpt", random_potential(seed=4))
    answer = command("md", "other.ckpt", "--restart", "run", "--steps", 8)
    assert answer.code == 1
    assert "it is not the model of this run" in answer.err


def test_auto_starts_a_first_simulation(md, command):
    answer = md("--restart", "auto", output="first")
    assert answer.code == 0, answer.err
    assert "there is no simulation yet; one is started" in answer.err
    assert Path("first/state.npz").exists()
    answer = md("--restart", "auto", "--steps", 8, output="first")
    assert answer.code == 0, answer.err
    assert "going on with 'first' by its own settings" in answer.err
    assert "--seed, the structure" in answer.err
    assert json.loads(Path("first/results.json").read_text())["steps"] == 8
