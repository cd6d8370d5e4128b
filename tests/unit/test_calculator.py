"""The ASE calculator: derivatives, dynamics, caching, copies, refusals."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress
from ase.filters import FrechetCellFilter
from ase.io import Trajectory
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS

from models import crystal, ethanol, heat, lone_atom, random_potential, slab, trained_adapter
from pet_finetune import PETCalculator
from pet_finetune.adapters.peft_files import save_adapter
from pet_finetune.checkpoint.native import save_checkpoint
from pet_finetune.data.labelled_batch import batch_from_atoms
from pet_finetune.device import plain_torch
from pet_finetune.errors import AdapterError, ConfigError, DataError, PetFinetuneError, SpeciesError
from pet_finetune.model.potential import Potential


@pytest.fixture(scope="module")
def model() -> Potential:
    return random_potential()


@pytest.fixture
def calc(model: Potential) -> PETCalculator:
    return PETCalculator(model, device="cpu")


@pytest.fixture
def evaluations(calc: PETCalculator, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of atoms of every evaluation of ``calc``."""
    seen: list[int] = []
    predict = calc.model.predict

    def counted(batch, *args, **kwargs):
        seen.append(batch.num_atoms)
        return predict(batch, *args, **kwargs)

    monkeypatch.setattr(calc.model, "predict", counted)
    return seen


def test_all_properties_are_those_of_the_model(model: Potential, calc: PETCalculator):
    atoms = crystal()
    atoms.calc = calc
    expected = model.predict(batch_from_atoms(atoms, model.cutoff), stress=True)
    assert atoms.get_potential_energy() == pytest.approx(float(expected.energy.detach()), abs=1e-12)
    assert atoms.get_potential_energy(force_consistent=True) == atoms.get_potential_energy()
    assert atoms.get_potential_energies().sum() == pytest.approx(atoms.get_potential_energy())
    np.testing.assert_allclose(atoms.get_forces(), expected.forces.numpy(), atol=1e-12)
    np.testing.assert_allclose(
        atoms.get_stress(voigt=False), expected.stress[0].numpy(), atol=1e-13
    )
    assert {array.dtype for array in (atoms.get_forces(), atoms.get_stress())} == {np.dtype(float)}


@pytest.mark.parametrize("make", [ethanol, crystal, slab], ids=lambda make: make.__name__)
def test_forces_are_finite_differences(make: Callable[[], Atoms], calc: PETCalculator):
    atoms = make()
    atoms.calc = calc
    numerical = calculate_numerical_forces(atoms, eps=1e-5, iatoms=[0, 2])
    np.testing.assert_allclose(atoms.get_forces()[[0, 2]], numerical, atol=1e-7)
    assert np.abs(numerical).max() > 0.01


def test_stress_is_finite_differences(calc: PETCalculator):
    atoms = crystal()
    atoms.calc = calc
    numerical = calculate_numerical_stress(atoms, eps=1e-5, voigt=True)
    np.testing.assert_allclose(atoms.get_stress(), numerical, atol=1e-7)
    assert np.abs(numerical).max() > 1e-3


def test_nve_conserves_energy(model: Potential):
    """The error of velocity Verlet is of second order: half the step, a quarter of the error."""
    gentle = copy.deepcopy(model)
    gentle.scale.set("energy", 0.2)  # random weights make a rough landscape
    errors = []
    for step, steps in ((0.4, 10), (0.2, 20)):
        atoms = ethanol()
        atoms.calc = PETCalculator(gentle, device="cpu")
        heat(atoms, 300.0)
        total = [atoms.get_total_energy()]
        md = VelocityVerlet(atoms, timestep=step * units.fs)
        md.attach(lambda a=atoms, t=total: t.append(a.get_total_energy()))
        md.run(steps)
        errors.append(np.abs(np.array(total) - total[0]).max())
    assert errors[0] < 0.02
    assert errors[1] == pytest.approx(errors[0] / 4, rel=0.1)


def test_bfgs_with_a_cell_filter_goes_down(calc: PETCalculator):
    atoms = crystal()
    atoms.calc = calc
    before = atoms.get_potential_energy()
    volume = atoms.get_volume()
    BFGS(FrechetCellFilter(atoms), logfile=None, maxstep=0.05).run(fmax=0.0, steps=6)
    assert atoms.get_potential_energy() < before - 1e-3
    assert atoms.get_volume() != pytest.approx(volume, rel=1e-6)


def test_repeated_calls_cost_nothing(calc: PETCalculator, evaluations: list[int]):
    atoms = crystal()
    atoms.calc = calc
    atoms.get_stress()
    atoms.get_forces()
    atoms.get_potential_energy()
    atoms.get_potential_energies()
    atoms.copy().set_initial_charges([1.0] * len(atoms))
    atoms.set_initial_magnetic_moments([1.0] * len(atoms))
    atoms.get_forces()
    assert not calc.calculation_required(atoms, ["energy", "forces", "stress"])
    assert evaluations == [4]
    atoms.positions[0, 0] += 0.01
    assert calc.calculation_required(atoms, ["energy"])
    atoms.get_potential_energy()
    atoms.get_stress()
    assert evaluations == [4, 4]


def test_results_are_the_callers_to_change(calc: PETCalculator):
    atoms = ethanol()
    atoms.calc = calc
    forces = atoms.get_forces()
    forces *= 0.0
    assert np.abs(atoms.get_forces()).max() > 0.0


def test_threads_may_share_a_calculator(calc: PETCalculator, monkeypatch: pytest.MonkeyPatch):
    structures = [ethanol(), crystal(), slab()]
    expected = [calc.get_potential_energy(atoms) for atoms in structures]
    calculate = calc.calculate

    def slowly(*args):
        calculate(*args)
        time.sleep(0.002)

    monkeypatch.setattr(calc, "calculate", slowly)
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(calc.get_potential_energy, structures * 2))
    assert found == pytest.approx(expected * 2, abs=1e-12)


def test_a_default_device_of_the_script_changes_nothing(model: Potential):
    expected = PETCalculator(model, device="cpu").get_forces(ethanol())
    with torch.device("meta"):
        found = PETCalculator(model, device="cpu").get_forces(ethanol())
        assert torch.get_default_device().type == "meta"
    np.testing.assert_array_equal(found, expected)


def test_the_precision_of_the_script_is_not_ours():
    ones = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (ones @ ones).dtype == torch.bfloat16
        with plain_torch():
            assert (ones @ ones).dtype == torch.float32


@pytest.mark.parametrize("make", [ethanol, slab], ids=lambda make: make.__name__)
def test_stress_needs_three_periodic_directions(
    make: Callable[[], Atoms], calc: PETCalculator, evaluations: list[int]
):
    atoms = make()
    atoms.calc = calc
    energy = atoms.get_potential_energy()
    for _ in range(2):
        with pytest.raises(PropertyNotImplementedError, match="periodic in three directions"):
            atoms.get_stress()
    assert atoms.get_potential_energy() == energy
    assert len(evaluations) == 1


def test_an_isolated_atom_has_its_energy_and_no_force(calc: PETCalculator):
    atoms = lone_atom()
    atoms.calc = calc
    energy = atoms.get_potential_energy()
    assert np.isfinite(energy)
    assert np.array_equal(atoms.get_forces(), np.zeros((1, 3)))


def test_a_dimer_beyond_the_cutoff_is_two_atoms(model: Potential, calc: PETCalculator):
    alone = [calc.get_potential_energy(Atoms(symbol)) for symbol in "CO"]
    energies = []
    for distance in (model.cutoff - 1.0, model.cutoff + 0.01, model.cutoff + 0.3, 50.0):
        atoms = Atoms("CO", [[0, 0, 0], [0, 0, distance]])
        energies.append(calc.get_potential_energy(atoms))
        if distance > model.cutoff:
            assert np.array_equal(calc.get_forces(atoms), np.zeros((2, 3)))
    assert energies[1:] == pytest.approx([sum(alone)] * 3, abs=1e-12)
    assert abs(energies[0] - sum(alone)) > 1e-4


def test_unknown_elements_are_named(calc: PETCalculator):
    atoms = Atoms("AuOFeAu", positions=np.arange(12.0).reshape(4, 3))
    atoms.calc = calc
    with pytest.raises(SpeciesError, match=r"Au \(Z=79, 2 atoms\), Fe .*It knows: H C O Si"):
        atoms.get_potential_energy()


def bad_structures() -> dict[str, tuple[Atoms, str]]:
    exploded = ethanol()
    exploded.positions[3, 1] = np.nan
    no_cell = ethanol()
    no_cell.pbc = True
    flat = crystal()
    flat.cell[2] = flat.cell[0]
    infinite = crystal()
    infinite.cell[1, 1] = np.inf
    return {
        "no atoms": (Atoms(), "has no atoms"),
        "exploded": (exploded, "1 of 9 atoms are NaN or infinite, first of all atom 3"),
        "no cell": (no_cell, "cell vectors there are zero"),
        "flat cell": (flat, "linearly dependent"),
        "infinite cell": (infinite, "not finite"),
    }


@pytest.mark.parametrize("case", bad_structures())
def test_what_cannot_be_computed_is_refused(case: str, calc: PETCalculator):
    atoms, message = bad_structures()[case]
    calc.get_potential_energy(ethanol())
    with pytest.raises(DataError, match=message):
        calc.calculate(atoms, ["energy"])
    assert calc.results == {}  # nothing of the structure before
    with pytest.raises(DataError, match=message):
        calc.get_potential_energy(atoms)
    assert np.isfinite(calc.get_potential_energy(ethanol()))


def test_charge_and_spin_of_a_conditioned_model():
    model = random_potential(system_conditioning=True, max_charge=2, max_spin_multiplicity=3)
    calc, atoms = PETCalculator(model, device="cpu"), ethanol()
    energies = [calc.get_potential_energy(atoms)]
    for key, value in (("charge", 1), ("spin", 2), ("spin", np.int64(3))):
        atoms.info[key] = value
        energies.append(calc.get_potential_energy(atoms))
        expected = model.predict(batch_from_atoms(atoms, model.cutoff), forces=False)
        assert energies[-1] == pytest.approx(float(expected.energy.detach()), abs=1e-11)
    assert len({round(energy, 6) for energy in energies}) == 4
    for key, value, message in (
        ("charge", 3, "charges from -2 to 2"),
        ("spin", 4, "from 1 to 3"),
        ("charge", 0.5, "not a whole number"),
    ):
        bad = ethanol()
        bad.info[key] = value
        with pytest.raises(DataError, match=message):
            calc.get_potential_energy(bad)
    bad.info["charge"] = 0
    assert calc.get_potential_energy(bad) == pytest.approx(energies[0], abs=1e-11)


def test_charge_of_an_unconditioned_model_is_not_read(
    calc: PETCalculator, evaluations: list[int], caplog: pytest.LogCaptureFixture
):
    atoms = ethanol()
    atoms.calc = calc
    atoms.get_potential_energy()
    atoms.info["charge"] = "a label of the user's own"
    atoms.get_potential_energy()
    assert len(evaluations) == 1
    atoms.info.update(charge=0, spin=1)
    calc.calculate(atoms)
    assert not caplog.text
    for _ in range(2):
        atoms.info["charge"] = -1
        calc.calculate(atoms)
    assert (
        caplog.text.count("charge -1 and the spin multiplicity 1, which this model does not") == 1
    )


def _energy(calc: PETCalculator) -> float:
    return calc.get_potential_energy(ethanol())


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_predict_the_same(clone: Callable, calc: PETCalculator):
    atoms = crystal()
    forces, stress = calc.get_forces(atoms), calc.get_stress(atoms)
    twin = clone(calc)
    assert twin.results.keys() == calc.results.keys()
    twin.reset()
    assert np.array_equal(twin.get_forces(atoms), forces)
    assert np.array_equal(twin.get_stress(atoms), stress)
    assert twin.model is not calc.model


@pytest.mark.slow
def test_works_in_another_process(calc: PETCalculator):
    expected = _energy(calc)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(_energy, [calc]) == pytest.approx([expected], rel=1e-12)


def test_trajectories_keep_the_results(tmp_path, calc: PETCalculator):
    atoms = crystal()
    atoms.calc = calc
    forces = atoms.get_forces()
    with Trajectory(tmp_path / "path.traj", "w", atoms) as trajectory:
        trajectory.write()
    with Trajectory(tmp_path / "path.traj") as trajectory:
        read = trajectory[0]
    np.testing.assert_array_equal(read.get_forces(), forces)
    np.testing.assert_array_equal(read.get_stress(), atoms.get_stress())
    assert read.calc.name == "pet"


def test_opens_checkpoints_and_adapters(tmp_path):
    base = random_potential(seed=3)
    save_checkpoint(tmp_path / "base.ckpt", base)
    tuned = trained_adapter(copy.deepcopy(base))
    save_adapter(tuned, tmp_path / "adapter", "base.ckpt")
    atoms = ethanol()
    expected = {}
    for name, made in (("base", base), ("tuned", tuned)):
        prediction = made.predict(batch_from_atoms(atoms, made.cutoff))
        expected[name] = float(prediction.energy.detach())
    assert abs(expected["base"] - expected["tuned"]) > 1e-3
    openings = {
        "base": [(str(tmp_path / "base.ckpt"), None), (base, None)],
        "tuned": [(tmp_path / "base.ckpt", tmp_path / "adapter"), (base, tmp_path / "adapter")],
    }
    openings["tuned"].append((tuned, None))
    for name, pairs in openings.items():
        for source, adapter in pairs:
            calc = PETCalculator(source, adapter=adapter, device="cpu")
            assert calc.get_potential_energy(atoms) == pytest.approx(expected[name], abs=1e-11)
            assert not any(parameter.requires_grad for parameter in calc.model.parameters())
    assert tuned.adapter is not None
    assert all(".lora_" not in name for name, _ in base.network.named_parameters())
    with pytest.raises(AdapterError, match="belongs to the base 'base.ckpt'"):
        PETCalculator(random_potential(seed=4), adapter=tmp_path / "adapter")


def test_the_target_is_chosen(tmp_path):
    model = random_potential(targets=("energy", "energy/pbe"))
    atoms = ethanol()
    first = PETCalculator(model, device="cpu")
    second = PETCalculator(model, target="energy/pbe", device="cpu")
    assert (first.target, second.target) == ("energy", "energy/pbe")
    assert first.get_potential_energy(atoms) != second.get_potential_energy(atoms)
    tuned = trained_adapter(copy.deepcopy(model), targets=["energy/pbe"])
    save_adapter(tuned, tmp_path / "adapter")
    assert PETCalculator(model, adapter=tmp_path / "adapter", device="cpu").target == "energy/pbe"
    with pytest.raises(PetFinetuneError, match="Did you mean 'energy/pbe'"):
        PETCalculator(model, target="energy/pbee")
    three = random_potential(targets=("energy", "energy/pbe", "energy/scan"))
    for targets, target in {
        ("energy/pbe", "energy"): "energy",
        ("energy/pbe", "energy/scan"): None,  # the base's energy does not fit the features
    }.items():
        tuned = trained_adapter(copy.deepcopy(three), targets=targets)
        folder = save_adapter(tuned, tmp_path / "-".join(targets).replace("/", "."))
        if target is not None:
            assert PETCalculator(three, adapter=folder, device="cpu").target == target
            continue
        with pytest.raises(ConfigError, match=r"the adapter predicts 2 energies \(energy/pbe, "):
            PETCalculator(three, adapter=folder, device="cpu")
        calc = PETCalculator(three, adapter=folder, target="energy/scan", device="cpu")
        expected = PETCalculator(tuned, target="energy/scan", device="cpu")
        assert calc.get_potential_energy(atoms) == expected.get_potential_energy(atoms)
    with pytest.raises(ConfigError, match="name the one to use"):
        PETCalculator(random_potential(targets=("a", "b")))


@pytest.mark.parametrize("dtype", ["float32", torch.float32, "float64", None])
def test_precision_can_be_chosen(dtype, model: Potential):
    calc = PETCalculator(model, dtype=dtype, device="cpu")
    double = dtype in (None, "float64")
    assert calc.dtype == (torch.float64 if double else torch.float32)
    assert model.dtype == torch.float64
    exact = PETCalculator(model, device="cpu").get_forces(crystal())
    difference = np.abs(calc.get_forces(crystal()) - exact).max()
    assert difference == 0.0 if double else 0.0 < difference < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "float16.*float32, float64"),
        ({"dtype": torch.bfloat16}, "bfloat16"),
        ({"device": "tpu"}, "'tpu' cannot be used"),
        ({"device": "mps"}, "64-bit"),
        ({"device": "cuda:99"}, "is not there"),
        ({"skin": -0.1}, "0 Å or more"),
        ({"skin": float("nan")}, "0 Å or more"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(options, message, model: Potential):
    with pytest.raises(ConfigError, match=message):
        PETCalculator(model, **options)


def test_adapters_are_switched_in_a_running_simulation(model: Potential, tmp_path):
    """Each step is what a calculator made for its adapter alone would have done."""
    tuned = {
        name: trained_adapter(copy.deepcopy(model), seed=seed, **config)
        for seed, (name, config) in enumerate({"lora": {}, "dora": {"use_dora": True}}.items())
    }
    calc = PETCalculator(model, device="cpu")
    for name, one in tuned.items():
        calc.load_adapter(save_adapter(one, tmp_path / name), name)
    assert calc.active_adapter == "lora"
    atoms = ethanol()
    atoms.calc = calc
    heat(atoms, 300.0)
    dynamics = VelocityVerlet(atoms, 0.5 * units.fs)
    for name in ("dora", "lora", "dora", None):
        if name is None:
            calc.disable_adapters()
        else:
            calc.set_adapter(name)
        dynamics.run(2)
        alone = PETCalculator(tuned.get(name, model), device="cpu")
        # One list of neighbours is of before the last steps, the other of now: in another order.
        np.testing.assert_allclose(atoms.get_forces(), alone.get_forces(atoms), atol=1e-10)
    with pytest.raises(AdapterError, match=r"no adapter 'doar'\. Did you mean 'dora'"):
        calc.set_adapter("doar")
    again = pickle.loads(pickle.dumps(calc))
    again.set_adapter("lora")
    expected = PETCalculator(tuned["lora"], device="cpu").get_forces(atoms)
    np.testing.assert_allclose(again.get_forces(atoms), expected, atol=1e-10)
