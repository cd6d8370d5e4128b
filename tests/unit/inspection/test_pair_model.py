"""A pair potential fitted to forces gives back the energies and stresses that go with them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from ase.build import bulk
from ase.calculators.lj import LennardJones

from inspected import copper, relabel
from pet_finetune.data.structure import atoms_to_structure
from pet_finetune.inspection import pair_model
from pet_finetune.inspection.inspected import dataset_of
from pet_finetune.inspection.pair_model import fit_pairs


def entries_of(structures):
    return list(dataset_of({"train": structures}, "energy").frames)


@pytest.fixture(scope="module")
def entries():
    return entries_of(copper(40))


def test_slopes_are_those_of_the_gaussians():
    distances = np.linspace(0.5, 2.2, 40)
    values, slopes = pair_model._gaussians(distances)
    near, _ = pair_model._gaussians(distances + 1e-6)
    assert np.allclose((near - values) / 1e-6, slopes, atol=1e-4)


def test_forces_and_stress_are_derivatives_of_the_energy(entries):
    """By differences: one atom moved, the cell strained."""
    entry, step = entries[1], 1e-5
    kinds = {(29, 29): 0}
    forces, energy, stress, _ = pair_model._design(entry, kinds)
    moved = entry.positions.copy()
    moved[0, 0] += step
    pushed = pair_model._design(replace(entry, positions=moved), kinds)[1]
    assert np.allclose((energy - pushed) * entry.size / step, forces[0], atol=1e-3)
    strain = np.eye(3)
    strain[0, 0] += step
    wide = replace(entry, positions=entry.positions @ strain, cell=entry.cell @ strain)
    pulled = pair_model._design(wide, kinds)[1]
    assert np.allclose(
        (pulled - energy) * entry.size / step / entry.volume, stress[0, 0], atol=1e-4
    )


def test_the_repulsion_of_copper_is_usual(entries):
    model = fit_pairs(entries)
    size, correlation = model.repulsion
    assert model.agreement > 0.9
    assert 0.5 < size < 8.0
    assert correlation > 0.5


def test_noble_gases_say_nothing_of_the_usual_repulsion():
    """They meet at their van der Waals radii: 127 eV at the covalent ones, in sound units."""
    rng, entries = np.random.default_rng(0), []
    for k in range(12):
        argon = bulk("Ar", cubic=True, a=5.3) * (2, 2, 2)
        argon.positions += rng.normal(0, 0.15, argon.positions.shape)
        argon.calc = LennardJones(sigma=3.4, epsilon=0.0104, rc=8.5)
        labels = {
            "energy": torch.tensor(argon.get_potential_energy(), dtype=torch.float64),
            "energy/forces": torch.from_numpy(argon.get_forces()),
            "energy/stress": torch.from_numpy(argon.get_stress(voigt=False)),
        }
        entries += entries_of([atoms_to_structure(argon, k, labels=labels)])
    model = fit_pairs(entries)
    assert model.agreement > 0.9
    assert model.repulsion == (0.0, 0.0)
    texts = " ".join(piece.text for piece in model.evidence(entries))
    assert "repulsion" not in texts
    assert "pair potential" in texts


def test_a_model_that_contradicts_itself_says_nothing_of_signs(entries):
    """Energies of the other sign than forces cannot come from any mistake that is known."""
    model = fit_pairs(entries)
    plain = {next(iter(p.powers)): p.sign for p in model.evidence(entries)}
    assert plain["force"] == 1
    assert plain["energy"] == 1
    against = entries_of([relabel(s, energy=-s.labels["energy"]) for s in copper(40)])
    signs = {next(iter(p.powers)): p.sign for p in model.evidence(against)}
    assert signs["energy"] == 0
    assert signs.get("stress", 0) == 0


def test_it_agrees_only_with_frames_that_it_was_not_fitted_to():
    """Noise can be fitted where there are as many numbers as forces, but it foretells nothing."""
    rng = np.random.default_rng(0)
    noise = [
        relabel(s, forces=torch.from_numpy(rng.normal(size=(s.num_atoms, 3)))) for s in copper(6)
    ]
    assert fit_pairs(entries_of(noise)).agreement < 0.4


def test_a_bounded_number_of_atoms_is_looked_at(monkeypatch, entries):
    seen = []
    plain = pair_model._design
    monkeypatch.setattr(
        pair_model, "_design", lambda entry, kinds: seen.append(entry.size) or plain(entry, kinds)
    )
    monkeypatch.setattr(pair_model, "_ATOMS", 40)
    fit_pairs(entries)
    assert 0 < sum(seen) <= 40


def test_no_forces_make_no_model(entries):
    assert fit_pairs(entries_of([relabel(s, forces=None) for s in copper(4)])) is None
    assert fit_pairs(entries[:1]) is None
    assert fit_pairs([]) is None
