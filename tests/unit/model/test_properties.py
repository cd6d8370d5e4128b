"""Predictions that are no energies: shapes, sums, and what they must not depend on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms

from models import (
    PROPERTIES,
    all_structures,
    crystal,
    ethanol,
    property_potential,
    random_potential,
    slab,
)
from pet_finetune.data.labelled_batch import batch_from_atoms
from pet_finetune.errors import PetFinetuneError
from pet_finetune.keys import TargetSpec
from pet_finetune.model.potential import Potential

NAMES = [spec.name for spec in PROPERTIES]
EACH = pytest.mark.parametrize("spec", PROPERTIES, ids=NAMES)


@pytest.fixture(scope="module")
def model() -> Potential:
    return property_potential()


def values(model: Potential, frames: Atoms | list[Atoms], name: str) -> torch.Tensor:
    return model.predict_property(batch_from_atoms(frames, model.cutoff), name).detach()


@EACH
def test_batches_give_what_structures_give_alone(model: Potential, spec: TargetSpec) -> None:
    frames = list(all_structures().values())
    together = values(model, frames, spec.name)
    rows = sum(map(len, frames)) if spec.per_atom else len(frames)
    assert together.shape == (rows, *spec.shape)
    alone = torch.cat([values(model, atoms, spec.name) for atoms in frames])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    assert together.abs().max() > 1e-3


@EACH
def test_the_order_of_atoms_is_of_no_matter(model: Potential, spec: TargetSpec) -> None:
    atoms = crystal()
    order = np.random.default_rng(0).permutation(len(atoms))
    expected, found = values(model, atoms, spec.name), values(model, atoms[order], spec.name)
    expected = expected[torch.from_numpy(order)] if spec.per_atom else expected
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@EACH
def test_a_larger_cell_is_the_same_crystal(model: Potential, spec: TargetSpec) -> None:
    """Sums double, a stress stays, and each atom has the value that its image has."""
    once, twice = (values(model, atoms, spec.name) for atoms in (crystal(), crystal() * (2, 1, 1)))
    expected = torch.cat([once, once]) if spec.per_atom else once if spec.per_volume else 2 * once
    torch.testing.assert_close(twice, expected, rtol=0, atol=1e-11)


@EACH
def test_one_pass_gives_all_and_leaves_the_energy_as_it_was(
    model: Potential, spec: TargetSpec
) -> None:
    batch = batch_from_atoms([ethanol(), crystal()], model.cutoff)
    plain = model.predict(batch, "energy", stress=True)
    wanted = {spec.name: (False, False), "energy": (True, True)}
    found = model.predict_targets(batch, wanted)
    assert list(found) == list(wanted)
    for name in ("energy", "forces", "stress"):
        own, alone = getattr(found["energy"], name), getattr(plain, name)
        torch.testing.assert_close(own, alone, rtol=1e-12, atol=1e-12)
    alone = model.predict_property(batch, spec.name)
    torch.testing.assert_close(found[spec.name].values, alone, rtol=1e-12, atol=1e-12)
    assert not found[spec.name].values.requires_grad


def test_a_stress_is_symmetric_and_needs_a_volume(model: Potential) -> None:
    stress = values(model, [crystal(), slab(), ethanol()], "non_conservative_stress")
    assert torch.equal(stress, stress.transpose(1, 2))
    assert stress[0].abs().min() > 0
    assert not stress[1:].any()


def test_scalars_are_float64_and_vectors_as_the_network(model: Potential) -> None:
    single = property_potential().to(torch.float32)
    batch = batch_from_atoms(ethanol(), single.cutoff, torch.float32)
    kinds = {spec.name: single.predict_property(batch, spec.name).dtype for spec in PROPERTIES}
    assert {kinds[spec.name] for spec in PROPERTIES if spec.rank == 0} == {torch.float64}
    assert {kinds[spec.name] for spec in PROPERTIES if spec.rank} == {torch.float32}


def test_an_energy_and_a_property_are_asked_for_differently(model: Potential) -> None:
    batch = batch_from_atoms(ethanol(), model.cutoff)
    with pytest.raises(PetFinetuneError, match="'charges' is no energy of structures but a scalar"):
        model.predict(batch, "charges")
    with pytest.raises(PetFinetuneError, match="'energy' is an energy: ask for it with predict"):
        model.predict_property(batch, "energy")


@pytest.mark.parametrize(
    ("new", "source"),
    [
        (TargetSpec("new", "charge", per_atom=True), "energy"),
        (TargetSpec("new", "", kind="vector", num_outputs=3), "gap"),
        (TargetSpec("new", "", kind="tensor", num_outputs=9), "non_conservative_stress"),
        (TargetSpec("new", "", num_outputs=3), "dos"),
    ],
)
def test_heads_pass_on_between_targets_of_one_kind_only(new: TargetSpec, source: str) -> None:
    with pytest.raises(PetFinetuneError, match=f"cannot inherit the heads of '{source}'"):
        property_potential().add_target(new, inherit_from=source)


def test_inherited_heads_predict_the_same() -> None:
    model = property_potential()
    spec = TargetSpec("dipoles/pbe", "", "D", "vector", per_atom=True, num_outputs=6)
    model.add_target(spec, inherit_from="dipoles")
    assert torch.equal(values(model, ethanol(), spec.name), values(model, ethanol(), "dipoles"))
    model.remove_target("dipoles")
    assert model.scale.relative("dipoles") is None
    assert model.scale.relative(spec.name) is not None


def test_new_elements_leave_the_known_ones_as_they_were() -> None:
    model = property_potential()
    before = {name: values(model, ethanol(), name) for name in NAMES}
    model.add_species([7], {7: 6})
    assert model.scale.relative("charges").shape == (5, 1)
    for name in NAMES:
        assert torch.equal(values(model, ethanol(), name), before[name])
    assert values(model, Atoms("N2", [[0, 0, 0], [0, 0, 1.1]]), "charges").isfinite().all()


def test_a_fresh_scalar_has_no_baseline() -> None:
    model = random_potential()
    for spec in PROPERTIES[:3]:
        model.add_target(spec)
        assert (model.composition.get(spec.name) == 0).all()
        assert values(model, ethanol(), spec.name).isfinite().all()
