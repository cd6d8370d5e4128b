"""The calculator with forces and stress from direct heads."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from ase.calculators.calculator import PropertyNotImplementedError
from ase.stress import full_3x3_to_voigt_6_stress

from models import crystal, ethanol, property_potential, random_potential, trained_adapter
from pet_finetune import PETCalculator
from pet_finetune.adapters.peft_files import save_adapter
from pet_finetune.checkpoint.native import save_checkpoint
from pet_finetune.data.labelled_batch import batch_from_atoms
from pet_finetune.errors import ConfigError
from pet_finetune.keys import TargetSpec

FORCES, STRESS = "non_conservative_force", "non_conservative_stress"


@pytest.mark.parametrize("chosen", [True, "forces", "stress"])
def test_direct_results_have_the_names_ase_expects(chosen):
    model, atoms = property_potential(), crystal()
    batch = batch_from_atoms(atoms, model.cutoff)
    derived = model.predict(batch, stress=True)
    forces, stress = (model.predict_property(batch, n).detach().numpy() for n in (FORCES, STRESS))
    atoms.calc = PETCalculator(model, device="cpu", non_conservative=chosen)
    assert atoms.get_potential_energy() == pytest.approx(float(derived.energy.detach()), abs=1e-12)
    expected = forces - forces.mean(0) if chosen != "stress" else derived.forces.numpy()
    np.testing.assert_allclose(atoms.get_forces(), expected, atol=1e-13)
    expected = stress[0] if chosen != "forces" else derived.stress[0].numpy()
    np.testing.assert_allclose(atoms.get_stress(), full_3x3_to_voigt_6_stress(expected), atol=1e-13)


def test_without_a_volume_there_is_no_direct_stress():
    atoms = ethanol()
    atoms.calc = PETCalculator(property_potential(), device="cpu", non_conservative=True)
    assert np.abs(atoms.get_forces().sum(0)).max() < 1e-12
    with pytest.raises(PropertyNotImplementedError, match="periodic in three directions"):
        atoms.get_stress()


def test_nothing_is_derived(monkeypatch):
    atoms = crystal()
    atoms.calc = PETCalculator(property_potential(), device="cpu", non_conservative=True)
    monkeypatch.setattr(torch.autograd, "grad", None)
    assert np.isfinite(atoms.get_forces()).all()


def test_the_variant_of_the_energy_is_that_of_its_forces():
    model = property_potential()
    model.add_target(TargetSpec("energy/pbe"), inherit_from="energy")
    with pytest.raises(ConfigError, match=r"direct forces \(non_conservative_force/pbe\)"):
        PETCalculator(model, device="cpu", target="energy/pbe", non_conservative=True)
    older = TargetSpec("non_conservative_forces/pbe", "force", "eV/A", "vector", True, 3)
    model.add_target(older)
    atoms = ethanol()
    atoms.calc = PETCalculator(model, device="cpu", target="energy/pbe", non_conservative="forces")
    found = model.predict_property(batch_from_atoms(atoms, model.cutoff), older.name).detach()
    np.testing.assert_allclose(atoms.get_forces(), found - found.mean(0), atol=1e-13)


def test_an_adapter_may_have_direct_heads_beside_its_energy(tmp_path):
    base = property_potential()
    targets = ["energy", FORCES]
    tuned = trained_adapter(copy.deepcopy(base), targets=targets)
    folder = save_adapter(tuned, tmp_path / "adapter", "base")
    atoms = ethanol()
    atoms.calc = PETCalculator(base, adapter=folder, device="cpu", non_conservative="forces")
    batch = batch_from_atoms(atoms, base.cutoff)
    found = tuned.predict_property(batch, FORCES).detach()
    np.testing.assert_allclose(atoms.get_forces(), found - found.mean(0), atol=1e-12)
    with pytest.raises(ConfigError, match="trained together: energy, non_conservative_force"):
        PETCalculator(base, adapter=folder, device="cpu", non_conservative="stress")


def test_what_cannot_be_direct_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="has no head for direct forces"):
        PETCalculator(random_potential(), device="cpu", non_conservative=True)
    only_forces = property_potential()
    only_forces.remove_target(STRESS)
    with pytest.raises(ConfigError, match=r"direct stress .* Use non_conservative='forces'"):
        PETCalculator(only_forces, device="cpu", non_conservative=True)
    with pytest.raises(ConfigError, match="'force' is not one of True, False, 'forces'"):
        PETCalculator(only_forces, device="cpu", non_conservative="force")
    base = property_potential()
    save_checkpoint(tmp_path / "base.ckpt", base)
    save_adapter(trained_adapter(base), tmp_path / "adapter", "base")
    # Those of the base do not fit the features of an adapter that was trained without them.
    with pytest.raises(ConfigError, match="no head for direct forces .* trained with 'energy'"):
        PETCalculator(
            tmp_path / "base.ckpt",
            adapter=tmp_path / "adapter",
            device="cpu",
            non_conservative=True,
        )
