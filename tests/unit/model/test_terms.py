"""Baselines and scales; the nuclear repulsion, its universal form and its smooth end."""

from __future__ import annotations

import math

import ase.data
import pytest
import torch

from pet_finetune.model.terms import ZBL, Composition, covalent_radii, fit_composition

RIDGE = 1e-5


def counts_of(seed=0, structures=30, species=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 9, (structures, species), generator=generator)


def energies_of(counts, weights):
    return counts.to(torch.float64) @ torch.tensor(weights, dtype=torch.float64)


@pytest.mark.parametrize("ridge", [RIDGE, 0.0])
def test_exact_energies_give_exact_baselines(ridge):
    counts = counts_of()
    weights = [-13.6, -1030.5, -2041.0]
    fitted = fit_composition(counts, energies_of(counts, weights), ridge)
    torch.testing.assert_close(
        fitted, torch.tensor(weights, dtype=torch.float64), atol=1e-5, rtol=0
    )


def test_noise_gives_the_least_squares_answer_per_atom():
    counts = counts_of()
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(len(counts), generator=generator, dtype=torch.float64)
    energies = energies_of(counts, [-1.0, 2.0, 3.0]) + noise
    atoms = counts.sum(1).to(torch.float64)
    fractions = counts / atoms.unsqueeze(1)
    expected = torch.linalg.lstsq(fractions, (energies / atoms).unsqueeze(1)).solution.squeeze(1)
    torch.testing.assert_close(
        fit_composition(counts, energies, RIDGE), expected, atol=1e-4, rtol=0
    )


def test_a_single_composition_is_explained_with_the_smallest_baselines():
    counts = torch.tensor([[4, 1, 1]]).repeat(6, 1)  # methanol only
    energies = torch.full((6,), -3000.0, dtype=torch.float64)
    fitted = fit_composition(counts, energies, RIDGE)
    torch.testing.assert_close(counts[0].to(torch.float64) @ fitted, energies[0])
    # Nothing tells the species apart, so each gets its share in proportion to its count.
    share = counts[0].to(torch.float64) / (counts[0] ** 2).sum()
    torch.testing.assert_close(fitted, -3000.0 * share)


def test_species_that_do_not_occur_get_nothing():
    counts = counts_of()
    counts[:, 1] = 0
    fitted = fit_composition(counts, energies_of(counts, [-1.0, 5.0, -2.0]), RIDGE)
    torch.testing.assert_close(
        fitted, torch.tensor([-1.0, 0.0, -2.0], dtype=torch.float64), atol=1e-6, rtol=0
    )


def test_a_strong_ridge_shrinks():
    counts = counts_of()
    energies = energies_of(counts, [-10.0, -20.0, -30.0])
    plain = fit_composition(counts, energies, RIDGE)
    shrunk = fit_composition(counts, energies, 100.0)
    assert shrunk.norm() < 0.5 * plain.norm()


def test_atoms_of_left_out_species_still_count_in_the_size():
    counts = counts_of()
    energies = energies_of(counts, [-1.0, -2.0, -3.0])
    others = energies_of(counts[:, :1], [-1.0])
    fitted = fit_composition(counts[:, 1:], energies - others, RIDGE, counts.sum(1))
    torch.testing.assert_close(
        fitted, torch.tensor([-2.0, -3.0], dtype=torch.float64), atol=1e-6, rtol=0
    )


def test_nothing_left_to_fit():
    counts = counts_of()
    fitted = fit_composition(counts[:, :0], torch.zeros(len(counts)), RIDGE, counts.sum(1))
    assert fitted.shape == (0,)


def test_a_composition_adds_up_atoms_in_double_precision():
    composition = Composition((1, 6, 8))
    assert composition.get("energy").tolist() == [0.0, 0.0, 0.0]
    composition.set("energy", torch.tensor([1.5, 2.5, 3.5]))
    composition.to(torch.float32)
    energies = composition(torch.tensor([8, 1, 1, 6]), "energy")
    assert energies.dtype == torch.float64
    assert energies.tolist() == [3.5, 1.5, 1.5, 2.5]
    with pytest.raises(ValueError, match="expected 3 baselines"):
        composition.set("energy", torch.zeros(2))


SPECIES = (1, 8, 14)


def pair_energy(first, second, distances):
    zbl = ZBL(SPECIES, covalent_radii(SPECIES))
    z_i, z_j = torch.full_like(distances, first).long(), torch.full_like(distances, second).long()
    return zbl(z_i, z_j, distances) + zbl(z_j, z_i, distances)


def outer_radius(first, second):
    return float(covalent_radii((first, second)).sum())


def universal(z_i, z_j, r):
    """Ziegler, Biersack and Littmark, in eV and angstrom."""
    a = 0.46850 / (z_i**0.23 + z_j**0.23)
    terms = [(0.02817, 0.20162), (0.28022, 0.40290), (0.50986, 0.94229), (0.18175, 3.19980)]
    screening = sum(c * math.exp(-d * r / a) for c, d in terms)
    return 14.3996454784 * z_i * z_j / r * screening


@pytest.mark.parametrize("pair", [(8, 8), (1, 14)])
def test_short_distances_feel_the_universal_potential(pair):
    r = torch.tensor([0.01], dtype=torch.float64)
    far = torch.tensor([0.02], dtype=torch.float64)
    # The switching polynomial is all but a constant down there, so differences are universal.
    difference = float(pair_energy(*pair, r) - pair_energy(*pair, far))
    expected = universal(*pair, 0.01) - universal(*pair, 0.02)
    assert difference == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("pair", [(8, 8), (1, 14)])
def test_energy_force_and_curvature_vanish_at_the_outer_radius(pair):
    outer = outer_radius(*pair)
    r = torch.tensor([outer - 1e-9], dtype=torch.float64, requires_grad=True)
    energy = pair_energy(*pair, r)
    (slope,) = torch.autograd.grad(energy.sum(), r, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), r)
    assert abs(energy.item()) < 1e-9
    assert abs(slope.item()) < 1e-6
    assert abs(curvature.item()) < 1e-4
    beyond = torch.tensor([outer + 1e-9, outer + 1.0], dtype=torch.float64)
    assert pair_energy(*pair, beyond).tolist() == [0.0, 0.0]


def test_repels_at_every_distance_below():
    r = torch.linspace(0.05, outer_radius(8, 14) - 0.05, 40, dtype=torch.float64)
    energies = pair_energy(8, 14, r)
    assert (energies > 0).all()
    assert (energies.diff() < 0).all()


def test_gradient_is_that_of_the_energy():
    r = torch.tensor([0.3, 0.9, 5.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda d: pair_energy(1, 8, d), (r,))


def test_reach_is_twice_the_largest_radius():
    zbl = ZBL(SPECIES, covalent_radii(SPECIES))
    assert zbl.cutoff == pytest.approx(outer_radius(14, 14))


def test_covalent_radii_are_ases():
    assert covalent_radii(range(1, 119)).tolist() == pytest.approx(ase.data.covalent_radii[1:])
