"""The calculator of a committee: means, uncertainties, refusals."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from ase.calculators.calculator import PropertyNotImplementedError
from ase.io import read, write

from models import crystal, ethanol, random_potential, trained_adapter
from pet_finetune import PETCalculator
from pet_finetune.adapters.peft_files import save_adapter
from pet_finetune.checkpoint.native import save_checkpoint
from pet_finetune.committee.committee import Calibration
from pet_finetune.committee.committee_files import write_committee
from pet_finetune.errors import AdapterError, ConfigError


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("base") / "base.ckpt", random_potential())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with three adapters that belong together."""
    folder = tmp_path_factory.mktemp("run")
    names = [f"member_{index}/adapter" for index in range(3)]
    for index, name in enumerate(names):
        adapted = trained_adapter(random_potential(), seed=index, rank=1 + index)
        save_adapter(adapted, folder / name, "base")
    write_committee(folder, names, Calibration(energy=2.0, forces=3.0, stress=4.0))
    return folder


@pytest.fixture
def folders(run):
    return sorted(path.parent for path in run.glob("member_*/adapter/adapter_config.json"))


def test_means_and_ensembles_are_those_of_the_members(base, folders):
    atoms = crystal()
    atoms.calc = PETCalculator(base, adapters=folders, device="cpu")
    single = [PETCalculator(base, adapter=folder, device="cpu") for folder in folders]
    for name, function in (("energy", float), ("forces", np.array), ("stress", np.array)):
        each = np.array([function(calc.get_property(name, atoms)) for calc in single])
        found = atoms.calc.get_property(f"{name}_ensemble", atoms)
        np.testing.assert_allclose(found, each, atol=1e-12)
        found = atoms.calc.get_property(name, atoms)
        np.testing.assert_allclose(found, each.mean(0), atol=1e-12)
    assert atoms.get_potential_energies().sum() == pytest.approx(atoms.get_potential_energy())


def test_uncertainties_are_standard_deviations(base, folders):
    atoms = crystal()
    calc = atoms.calc = PETCalculator(base, adapters=folders, device="cpu")
    energies = calc.get_property("energy_ensemble", atoms)
    assert calc.get_property("energy_uncertainty", atoms) == pytest.approx(np.std(energies, ddof=1))
    forces = calc.get_property("forces_ensemble", atoms)
    per_atom = np.sqrt(np.var(forces, axis=0, ddof=1).mean(-1))
    np.testing.assert_allclose(calc.get_property("forces_uncertainty", atoms), per_atom)
    assert per_atom.shape == (len(atoms),)
    stress = calc.results["stress_ensemble"]
    np.testing.assert_allclose(calc.results["stress_uncertainty"], np.std(stress, axis=0, ddof=1))
    assert per_atom.min() > 1e-4


def test_the_folder_of_a_run_brings_its_calibration(base, run, folders):
    atoms = crystal()
    plain = PETCalculator(base, adapters=folders, device="cpu")
    calc = PETCalculator(base, adapters=str(run), device="cpu")
    for name, factor in (("energy", 2.0), ("forces", 3.0), ("stress", 4.0)):
        found = calc.get_property(f"{name}_uncertainty", atoms)
        expected = factor * plain.get_property(f"{name}_uncertainty", atoms)
        np.testing.assert_allclose(found, expected, atol=1e-15)
        np.testing.assert_array_equal(calc.results[name], plain.results[name])


def test_one_evaluation_gives_everything(base, folders, monkeypatch):
    atoms = ethanol()
    calc = atoms.calc = PETCalculator(base, adapters=folders, device="cpu")
    predict, seen = calc.model.predict, []
    monkeypatch.setattr(calc.model, "predict", lambda *a, **k: seen.append(1) or predict(*a, **k))
    atoms.get_forces()
    for name in ("energy_uncertainty", "forces_uncertainty", "energy_ensemble", "forces_ensemble"):
        assert calc.get_property(name, atoms) is not None
    assert len(seen) == 1
    with pytest.raises(PropertyNotImplementedError, match="periodic in three directions"):
        calc.get_property("stress_uncertainty", atoms)


def test_the_spread_of_forces_can_wait_until_it_is_asked_for(base, folders, tmp_path, monkeypatch):
    last = [
        save_adapter(
            trained_adapter(random_potential(), seed=i, target_modules=r"gnn_layers\.1.*w_in"),
            tmp_path / str(i),
        )
        for i in range(2)
    ]
    atoms, other = crystal(), crystal()
    other.calc = PETCalculator(base, adapters=last, device="cpu")
    calc = atoms.calc = PETCalculator(base, adapters=last, spread="on_demand", device="cpu")
    predict, seen = calc.model.predict, []
    monkeypatch.setattr(calc.model, "predict", lambda *a, **k: seen.append(1) or predict(*a, **k))
    np.testing.assert_allclose(atoms.get_forces(), other.get_forces(), atol=1e-12)
    np.testing.assert_allclose(atoms.get_stress(), other.get_stress(), atol=1e-12)
    for name in ("energy_uncertainty", "energy_ensemble"):
        assert calc.results[name] == pytest.approx(other.calc.results[name])
    assert "forces_uncertainty" not in calc.results
    for name in ("forces_uncertainty", "stress_ensemble"):
        found = calc.get_property(name, atoms)
        np.testing.assert_allclose(found, other.calc.results[name], atol=1e-12)
    assert len(seen) == 2
    # Members that share nothing tell their forces for nothing.
    with pytest.warns(DeprecationWarning, match="on_demand"):  # as it was spelled before
        calc = PETCalculator(base, adapters=folders, spread="asked", device="cpu")
    calc.get_property("forces", atoms)
    assert "forces_uncertainty" in calc.results


def test_a_single_model_has_no_uncertainty(base):
    with pytest.raises(PropertyNotImplementedError):
        PETCalculator(base, device="cpu").get_property("energy_uncertainty", ethanol())


def test_forces_are_the_derivative_of_the_mean(base, folders):
    atoms = ethanol()
    atoms.calc = PETCalculator(base, adapters=folders, device="cpu")
    expected = atoms.get_forces()[2, 1]
    energies = []
    for step in (1e-5, -2e-5):
        atoms.positions[2, 1] += step
        energies.append(atoms.get_potential_energy())
    assert expected == pytest.approx(-(energies[0] - energies[1]) / 2e-5, abs=1e-7)


def test_copies_and_files(base, folders, tmp_path):
    atoms = crystal()
    calc = atoms.calc = PETCalculator(base, adapters=folders, device="cpu")
    expected = calc.get_property("forces_uncertainty", atoms)
    for other in (copy.deepcopy(calc), pickle.loads(pickle.dumps(calc))):
        found = other.get_property("forces_uncertainty", crystal())
        np.testing.assert_array_equal(found, expected)
    for name in ("frames.traj", "frames.xyz"):
        write(tmp_path / name, atoms)
        assert read(tmp_path / name).get_potential_energy() == pytest.approx(
            atoms.get_potential_energy()
        )


def test_refusals(base, run, folders, tmp_path):
    with pytest.raises(ConfigError, match="adapter and adapters: give one"):
        PETCalculator(base, adapter=folders[0], adapters=folders)
    with pytest.raises(ConfigError, match="spread: 'never' is not one of always, on_demand"):
        PETCalculator(base, adapters=folders, spread="never")
    with pytest.raises(AdapterError, match="at least two"):
        PETCalculator(base, adapters=[folders[0]])
    with pytest.raises(AdapterError, match="There is no committee in"):
        PETCalculator(base, adapters=tmp_path)
    with pytest.raises(AdapterError, match="are for energy, not other"):
        PETCalculator(base, adapters=run, target="other")
