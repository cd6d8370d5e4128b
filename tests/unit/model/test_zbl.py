"""The nuclear repulsion: its universal form at short range, and its smooth end."""

from __future__ import annotations

import math

import ase.data
import pytest
import torch

from pet_finetune.model.terms import ZBL, covalent_radii

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
