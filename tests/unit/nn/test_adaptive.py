"""Adaptive cutoffs: the radii hold the wanted number of neighbours and have true gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pet_finetune.nn.neighborhood import bump_step, grid_cutoffs, solve_cutoffs, solver_cutoffs

LARGEST, WIDTH = 5.0, 1.0


def by_solver(distances, centers, num_atoms, *rest):
    radii = solve_cutoffs(distances, centers, num_atoms, *rest)
    return solver_cutoffs(distances, centers, radii, *rest)


def environment(counts=(12, 5, 20), seed=0):
    """Distances of some atoms' neighbours: as many as ``counts`` says, uniform in volume."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(counts)
    distances = LARGEST * torch.rand(total, generator=generator, dtype=torch.float64) ** (1 / 3)
    centers = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return distances.clamp_min(0.9), centers


def smooth_count(radius, distances, wanted):
    inside = bump_step((distances - (radius - WIDTH)) / WIDTH).sum()
    return float(inside) + wanted * (radius / LARGEST) ** 3


@pytest.mark.parametrize("wanted", [2.0, 6.5])
def test_solver_finds_the_root_of_every_atom(wanted):
    distances, centers = environment()
    radii = by_solver(distances, centers, 3, wanted, LARGEST, WIDTH)
    for atom, radius in enumerate(radii.tolist()):
        found = smooth_count(radius, distances[centers == atom], wanted)
        assert found == pytest.approx(wanted, abs=1e-9)


def test_solver_gradient_is_that_of_the_radii():
    distances, centers = environment()
    distances.requires_grad_(True)
    assert torch.autograd.gradcheck(
        lambda d: by_solver(d, centers, 3, 4.0, LARGEST, WIDTH), (distances,), atol=1e-6
    )


def test_an_atom_that_is_alone_sees_as_far_as_it_can():
    none = torch.zeros(0, dtype=torch.float64)
    radii = by_solver(none, none.long(), 2, 6.0, LARGEST, WIDTH)
    torch.testing.assert_close(radii, torch.full((2,), LARGEST, dtype=torch.float64))


def test_solver_stays_above_its_lower_bound():
    crowd = torch.full((500,), 0.01, dtype=torch.float64)
    radii = by_solver(crowd, torch.zeros(500, dtype=torch.int64), 1, 1.0, LARGEST, WIDTH)
    assert radii.tolist() == [LARGEST / 16]


@pytest.mark.parametrize("method", [by_solver, grid_cutoffs])
def test_a_denser_environment_has_a_smaller_radius(method):
    distances, centers = environment((30,))
    sparse = method(1.5 * distances, centers, 1, 4.0, 1.5 * LARGEST, WIDTH)
    dense = method(distances, centers, 1, 4.0, 1.5 * LARGEST, WIDTH)
    assert float(dense) < float(sparse)


def grid_by_hand(distances, wanted):
    """The weighted average over probes, in numpy, for one atom."""
    probes = np.arange(0.5, LARGEST, WIDTH / 4)
    x = np.clip((distances[:, None] - (probes - WIDTH)) / WIDTH, 1e-6, 1 - 1e-6)
    counts = (0.5 * (1 + np.tanh(1 / np.tan(np.pi * x)))).sum(0)
    excess = counts - wanted + wanted * np.linspace(0, 1, len(probes)) ** 3
    weights = np.exp(-0.5 * (excess / np.abs(np.gradient(excess))) ** 2)
    return (weights * probes).sum() / weights.sum()


def test_grid_is_the_weighted_average_of_the_probes():
    distances, centers = environment()
    radii = grid_cutoffs(distances, centers, 3, 4.0, LARGEST, WIDTH)
    expected = [grid_by_hand(distances[centers == atom].numpy(), 4.0) for atom in range(3)]
    np.testing.assert_allclose(radii.numpy(), expected, rtol=1e-10)


def test_grid_gradient_is_that_of_the_radii():
    distances, centers = environment()
    distances.requires_grad_(True)
    assert torch.autograd.gradcheck(
        lambda d: grid_cutoffs(d, centers, 3, 4.0, LARGEST, WIDTH), (distances,), atol=1e-6
    )


def test_grid_of_nothing():
    none = torch.zeros(0, dtype=torch.float64)
    assert grid_cutoffs(none, none.long(), 0, 4.0, LARGEST, WIDTH).shape == (0,)
