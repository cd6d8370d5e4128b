"""Targets of a potential: adding, inheriting, removing, predicting several at once."""

from __future__ import annotations

import pytest
import torch

from models import all_structures, crystal, ethanol, lone_atom, random_potential
from pet_finetune.data.labelled_batch import batch_from_atoms
from pet_finetune.errors import PetFinetuneError
from pet_finetune.keys import TargetSpec
from pet_finetune.model.pet import HEAD_GROUPS


@pytest.fixture(scope="module")
def batch():
    return batch_from_atoms(list(all_structures().values()), 3.5)


def assert_same(one, other):
    assert torch.equal(one.energy, other.energy)
    for name in ("forces", "stress"):
        first, second = getattr(one, name), getattr(other, name)
        assert (first is None) == (second is None)
        assert first is None or torch.equal(first, second)


def test_a_new_target_inherits_heads_baseline_and_scale(batch):
    model = random_potential()
    model.add_target(TargetSpec("energy/pbe"), inherit_from="energy")
    old = model.predict(batch, "energy", stress=True)
    assert_same(old, model.predict(batch, "energy/pbe", stress=True))
    # A copy, not the same tensors.
    with torch.no_grad():
        for parameter in model.network.head_modules("energy/pbe")[
            "node_heads.energy/pbe"
        ].parameters():
            parameter += 0.1
    assert_same(old, model.predict(batch, "energy", stress=True))
    assert not torch.equal(old.energy, model.predict(batch, "energy/pbe").energy)


def test_a_fresh_target_has_no_baseline_and_scale_one():
    model = random_potential()
    model.add_target(TargetSpec("other"))
    assert model.composition.get("other").tolist() == [0.0] * 4
    assert float(model.scale.get("other")) == 1.0
    heads = model.network.head_modules("other")
    assert all(p.dtype == torch.float64 for m in heads.values() for p in m.parameters())


def test_a_target_cannot_be_added_twice_or_inherit_from_nothing():
    model = random_potential()
    with pytest.raises(PetFinetuneError, match="has a target 'energy' already"):
        model.add_target(TargetSpec("energy"))
    with pytest.raises(PetFinetuneError, match=r"no target 'enery'\. Did you mean 'energy'"):
        model.add_target(TargetSpec("new"), inherit_from="enery")
    with pytest.raises(PetFinetuneError, match="is 3 scalars for each structure and cannot"):
        model.add_target(TargetSpec("new", num_outputs=3), inherit_from="energy")
    assert list(model.targets) == ["energy"]


def test_a_removed_target_leaves_no_trace(batch):
    model = random_potential(targets=("energy", "other"))
    left = model.predict(batch, "energy")
    model.remove_target("other")
    assert not any("other" in name for name in model.state_dict())
    assert all("other" not in getattr(model.network, group) for group in HEAD_GROUPS)
    assert_same(left, model.predict(batch, "energy"))
    with pytest.raises(PetFinetuneError, match=r"no target 'other'.*It predicts: energy"):
        model.predict(batch, "other")


@pytest.mark.parametrize("create_graph", [False, True])
def test_many_targets_at_once_are_each_alone(batch, create_graph):
    model = random_potential(targets=("a", "b", "c"), zbl=True)
    wanted = {"a": (True, True), "b": (False, False), "c": (True, False)}
    together = model.predict_many(batch, wanted, create_graph=create_graph)
    for name, (forces, stress) in wanted.items():
        alone = model.predict(batch, name, forces=forces, stress=stress, create_graph=create_graph)
        for kind in ("energy", "forces", "stress"):
            first, second = getattr(together[name], kind), getattr(alone, kind)
            assert (first is None) == (second is None)
            if first is not None:
                torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)
                assert first.requires_grad == create_graph


def test_energies_alone_need_no_gradient(batch):
    model = random_potential()
    with torch.no_grad():
        prediction = model.predict(batch, forces=False)
    assert prediction.forces is None
    assert not prediction.energy.requires_grad
    expected = model.predict(batch).energy
    torch.testing.assert_close(prediction.energy, expected, rtol=1e-12, atol=1e-12)


def test_energies_are_sums_over_atoms_of_scale_times_network_plus_baseline():
    model = random_potential()
    batch = batch_from_atoms([ethanol(), lone_atom()], 3.5)
    first = model.predict(batch, forces=False)
    network = (first.atom_energies - model.composition(batch.numbers, "energy")) / 2.0
    model.scale.set("energy", 6.0)
    model.composition.set("energy", torch.tensor([1.0, 2.0, 3.0, 4.0]))
    second = model.predict(batch, forces=False)
    baseline = model.composition(batch.numbers, "energy")
    torch.testing.assert_close(second.atom_energies, 6.0 * network + baseline)
    torch.testing.assert_close(second.energy[1], second.atom_energies[-1])


def test_scale_and_baseline_stay_double_in_a_single_precision_model():
    model = random_potential(dtype=torch.float32)
    assert model.dtype == torch.float32
    assert model.scale.get("energy").dtype == torch.float64
    assert model.composition.get("energy").dtype == torch.float64
    prediction = model.predict(batch_from_atoms(crystal(), 3.5, torch.float32), stress=True)
    assert prediction.energy.dtype == torch.float64
    assert prediction.forces.dtype == prediction.stress.dtype == torch.float32


def test_the_repulsion_may_reach_further_than_the_network():
    assert random_potential(cutoff=1.5).cutoff == 1.5
    assert random_potential(cutoff=1.5, zbl=True).cutoff == pytest.approx(2.22)  # Si-Si


@pytest.mark.parametrize("info", [{"charge": 1}, {"spin": 3}])
def test_charge_and_spin_change_the_energy_only_with_conditioning(info):
    atoms = ethanol()
    other = atoms.copy()
    other.info.update(info)
    batch = batch_from_atoms([atoms, other], 3.5)
    conditioned = random_potential(system_conditioning=True).predict(batch).energy
    assert abs(float(conditioned[0] - conditioned[1])) > 1e-6
    plain = random_potential().predict(batch).energy
    torch.testing.assert_close(plain[0], plain[1])
