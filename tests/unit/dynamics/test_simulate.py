"""Simulations end to end: what is written, exact resumption, and what stops them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms, units
from ase.constraints import FixAtoms, FixBondLengths, FixCartesian, FixCom, Hookean

from models import crystal, ethanol, random_potential
from pet_finetune import PETCalculator
from pet_finetune.checkpoint.native import save_checkpoint
from pet_finetune.dynamics.integrators import MDSettings, draw_velocities
from pet_finetune.dynamics.loop import Outcome, simulate
from pet_finetune.dynamics.md_checks import check_start, chosen_model
from pet_finetune.dynamics.md_files import START, STATE, STOPPED, TABLE, TRAJECTORY, MDFiles
from pet_finetune.errors import DynamicsError, PetFinetuneError
from pet_finetune.model.potential import Potential

QUICK = MDSettings(timestep=0.1, steps=12, every=3, temperature=100.0)
KINDS = {
    "nve": {"ensemble": "nve"},
    "langevin": {},
    "bussi": {"thermostat": "bussi", "thermostat_time": 5.0},
    "nose-hoover": {"thermostat": "nose-hoover", "thermostat_time": 5.0},
    # Near the pressure of a random potential, which is no material's.
    "npt": {"ensemble": "npt", "barostat_time": 50.0, "pressure": 330.0},
    "npt full": {"ensemble": "npt", "barostat": "full", "barostat_time": 200.0, "pressure": 330.0},
}


@pytest.fixture(scope="module")
def model() -> Potential:
    return random_potential()


@pytest.fixture
def run(model: Potential, tmp_path: Path) -> Callable[..., Outcome]:
    """Simulate into a folder; ``stop_after`` steps Ctrl-C is pressed."""

    def run(name: str, settings: MDSettings, atoms: Atoms | None = None, stop_after: int = 10**6):
        files = MDFiles(tmp_path / name)
        filled = settings.filled(7)
        rng = np.random.default_rng(filled.seed)
        again = (files / STATE).exists()
        if again:
            atoms, _ = files.read_start()
        else:
            atoms = crystal() if atoms is None else atoms
            draw_velocities(atoms, filled.temperature, rng)
            files.write_start(atoms, {})
        # So little a margin that the neighbour list is built again on the way.
        atoms.calc = PETCalculator(model, device="cpu", skin=0.002)
        asked = [0]

        def stop() -> bool:
            asked[0] += 1
            return asked[0] > stop_after

        return simulate(
            atoms,
            filled,
            files,
            rng=rng,
            show=lambda row: None,
            stop=stop,
            state=files.load_state() if again else None,
        )

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_ends_as_one_that_never_stopped(run, tmp_path: Path, kind: str) -> None:
    settings = replace(QUICK, **KINDS[kind])
    whole = run("whole", settings)
    parts = [run("parts", settings, stop_after=5), run("parts", settings, stop_after=3)]
    # What a killed run wrote after its last state is made again.
    with (tmp_path / "parts" / TRAJECTORY).open("a") as stream:
        stream.write("4\nhalf a fra")
    parts.append(run("parts", settings))
    assert [part.reason for part in parts] == ["interrupted", "interrupted", "finished"]
    assert [part.steps for part in parts] == [5, 3, 4]
    assert parts[-1].row == whole.row
    for name in (TRAJECTORY, TABLE):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with np.load(tmp_path / "whole" / STATE) as one, np.load(tmp_path / "parts" / STATE) as other:
        assert set(one) == set(other)
        assert [name for name in one if not np.array_equal(one[name], other[name])] == []


def test_a_structure_in_memory_is_one_of_a_file(model: Potential, tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base.ckpt", model)
    atoms = ethanol()
    atoms.set_constraint(FixAtoms([0]))
    draw_velocities(atoms, 100.0, np.random.default_rng(0))
    ase.io.write(tmp_path / "start.traj", atoms)
    (one, calculator), (other, _) = (
        check_start(chosen_model(base), given, QUICK, None)
        for given in (atoms, tmp_path / "start.traj")
    )
    assert one == other
    assert one is not atoms
    assert str(one.constraints) == str(other.constraints) == str(atoms.constraints)
    np.testing.assert_array_equal(one.get_momenta(), other.get_momenta())
    assert calculator.get_potential_energy(one) == PETCalculator(model).get_potential_energy(atoms)
    with pytest.raises(PetFinetuneError, match="model: expected a checkpoint or a ModelChoice"):
        chosen_model(model)
    with pytest.raises(PetFinetuneError, match="structures: expected the path of a file or an At"):
        check_start(chosen_model(base), [atoms], QUICK, None)


HELD = {
    "fixed": [FixAtoms([0])],
    "coordinates": [FixCartesian([0, 1], [True, False, True])],
    "bonds": [FixBondLengths([[0, 1], [1, 2]])],
    "centre": [FixCom()],
    "spring": [Hookean(0, 1, k=1.0, rt=1.0)],
    "several": [FixAtoms([3]), FixBondLengths([[0, 1]])],
}


@pytest.mark.few(6)
@pytest.mark.parametrize("kind", ["nve", "langevin", "bussi"])
@pytest.mark.parametrize("held", HELD)
def test_a_stopped_run_goes_on_with_its_masses_and_constraints(
    run, tmp_path: Path, kind: str, held: str
) -> None:
    def start() -> Atoms:
        atoms = ethanol()
        atoms.set_masses(np.linspace(2.0, 30.0, 9))
        atoms.set_constraint([constraint.copy() for constraint in HELD[held]])
        return atoms

    settings = replace(QUICK, **KINDS[kind])
    run("whole", settings, atoms=start())
    run("parts", settings, atoms=start(), stop_after=5)
    run("parts", settings)
    for name in (TRAJECTORY, TABLE):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    frames = ase.io.read(tmp_path / "whole" / TRAJECTORY, ":")
    np.testing.assert_allclose(frames[-1].get_masses(), start().get_masses(), atol=1e-7)
    first, last = frames[0], frames[-1]
    assert np.abs(last.positions - first.positions).max() > 1e-3
    if held in ("fixed", "several"):
        fixed = HELD[held][0].index
        np.testing.assert_array_equal(last.positions[fixed], first.positions[fixed])
    if held in ("bonds", "several"):
        assert last.get_distance(0, 1) == pytest.approx(start().get_distance(0, 1), abs=1e-7)
    if held == "coordinates":
        np.testing.assert_array_equal(last.positions[:2, [0, 2]], first.positions[:2, [0, 2]])


def test_frames_and_rows(run, tmp_path: Path, model: Potential) -> None:
    run("run", replace(QUICK, ensemble="nve"))
    frames = ase.io.read(tmp_path / "run" / TRAJECTORY, ":")
    rows = MDFiles(tmp_path / "run").read_rows()
    assert [frame.info["step"] for frame in frames] == [0, 3, 6, 9, 12]
    np.testing.assert_array_equal(rows["step"], [0, 3, 6, 9, 12])
    np.testing.assert_allclose(rows["time_fs"], 0.1 * rows["step"])
    frame = frames[2]
    found = {name: frame.calc.results[name] for name in ("energy", "forces", "stress")}
    assert found["energy"] == pytest.approx(rows["potential_eV"][2])
    kinetic = float((frame.get_momenta() ** 2 / 2 / frame.get_masses()[:, None]).sum())
    assert kinetic == pytest.approx(rows["kinetic_eV"][2], abs=1e-6)
    frame.calc = PETCalculator(model, device="cpu")
    np.testing.assert_allclose(found["forces"], frame.get_forces(), atol=1e-4)
    np.testing.assert_allclose(found["stress"], frame.get_stress(), atol=1e-4)
    pressure = -frame.get_stress(include_ideal_gas=True)[:3].mean() / units.GPa
    assert rows["pressure_GPa"][2] == pytest.approx(pressure, rel=1e-3)
    np.testing.assert_allclose(rows["total_eV"], rows["potential_eV"] + rows["kinetic_eV"])


@pytest.mark.parametrize("heading", ["step,time,temperature_K", "a,b,c"])
def test_a_log_without_its_columns_is_damaged(tmp_path: Path, heading: str) -> None:
    (tmp_path / "md.csv").write_text(f"{heading}\n0,0.0,300.0\n")
    with pytest.raises(DynamicsError, match="md.csv' cannot be read .no column"):
        MDFiles(tmp_path).read_rows()
    with pytest.raises(DynamicsError, match=r"or remove it: it was ended before it had saved"):
        MDFiles.check_free(tmp_path)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "langevin"])
def test_the_conserved_quantity_is_conserved(run, tmp_path: Path, kind: str) -> None:
    """Much better than the energies that it is made of."""
    run("run", replace(QUICK, every=1, timestep=0.05, **KINDS[kind]))
    rows = MDFiles(tmp_path / "run").read_rows()
    assert np.ptp(rows["conserved_eV"]) < 0.02 * np.ptp(rows["potential_eV"])
    assert (np.ptp(rows["volume_A3"]) > 0) == kind.startswith("npt")


def test_langevin_has_no_conserved_quantity_and_molecules_no_volume(run, tmp_path: Path) -> None:
    run("run", replace(QUICK, steps=3), atoms=ethanol())
    rows = MDFiles(tmp_path / "run").read_rows()
    assert not {"conserved_eV", "volume_A3", "pressure_GPa"} & set(rows)


def test_another_model_does_not_go_on_with_a_run(run, tmp_path: Path) -> None:
    run("run", QUICK, stop_after=4)
    files = MDFiles(tmp_path / "run")
    atoms, _ = files.read_start()
    atoms.calc = PETCalculator(random_potential(seed=1), device="cpu")
    with pytest.raises(DynamicsError, match="it is not the model of this run"):
        simulate(
            atoms, QUICK.filled(7), files, rng=np.random.default_rng(), show=print,
            state=files.load_state(),
        )  # fmt: skip


def test_another_integrator_does_not_go_on_with_a_run(run) -> None:
    run("run", QUICK, stop_after=4)
    with pytest.raises(DynamicsError, match="is of another integrator"):
        run("run", replace(QUICK, thermostat="nose-hoover"))


def test_a_run_that_explodes_says_so_and_keeps_what_was_good(run, tmp_path: Path) -> None:
    settings = replace(QUICK, timestep=5.0, temperature=300.0, max_temperature=10000.0, steps=200)
    with pytest.raises(DynamicsError) as caught:
        run("run", replace(settings, every=1), atoms=ethanol())
    message = str(caught.value)
    assert "has gone wrong at step" in message
    assert "a shorter time step (--timestep 2.5)" in message
    frames = ase.io.read(tmp_path / "run" / TRAJECTORY, ":")
    before, wrong = ase.io.read(tmp_path / "run" / STOPPED, ":")
    np.testing.assert_allclose(before.positions, frames[-1].positions, atol=1e-7)
    assert f"step {frames[-1].info['step'] + 1} " in message
    assert not np.allclose(before.positions, wrong.positions)


def test_a_damaged_state_is_refused(run, tmp_path: Path) -> None:
    run("run", QUICK, stop_after=2)
    state = tmp_path / "run" / STATE
    kept = state.read_bytes()
    state.write_bytes(kept[: len(kept) // 2])
    with pytest.raises(DynamicsError, match="is damaged"):
        MDFiles(tmp_path / "run").load_state()
    state.write_bytes(kept)
    (tmp_path / "run" / TRAJECTORY).write_text("")
    with pytest.raises(DynamicsError, match="is shorter than when the state was saved"):
        MDFiles(tmp_path / "run").load_state()


def test_a_changed_start_is_refused(run, tmp_path: Path) -> None:
    run("run", QUICK, stop_after=2)
    start = tmp_path / "run" / START
    data = bytearray(start.read_bytes())
    data[len(data) // 2] ^= 4
    start.write_bytes(bytes(data))
    with pytest.raises(DynamicsError, match=r"start\.traj"):
        MDFiles(tmp_path / "run").read_start()


def test_settings_are_not_changed_by_filling_them() -> None:
    filled = QUICK.filled(3)
    assert filled.filled(4) == filled
    assert (filled.seed, filled.thermostat, filled.friction) == (3, "langevin", 10.0)
    assert filled.max_temperature == 2000.0
