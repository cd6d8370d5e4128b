"""Edges that count, cutoff functions without step or kink, adaptive cutoffs with true gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from ase import Atoms
from torch.utils._pytree import tree_flatten

from pet_finetune.backends.attention import pad_rows, unpad_rows
from pet_finetune.backends.reference import permute_rows
from pet_finetune.data.labelled_batch import batch_from_atoms
from pet_finetune.graph import make_layout
from pet_finetune.nn.neighborhood import (
    NeighborhoodBuilder,
    bump_step,
    cosine_step,
    grid_cutoffs,
    solve_cutoffs,
    solver_cutoffs,
)

PLAIN = {
    "cutoff": 2.5,
    "cutoff_function": "Bump",
    "cutoff_width": 0.5,
    "num_neighbors_adaptive": None,
    "adaptive_method": "solver",
    "adaptive_width": 1.0,
}


def build(positions, list_cutoff=4.0, **changes):
    """Neighbourhoods of hydrogen atoms at these positions, from a longer neighbour list."""
    batch = batch_from_atoms(Atoms(f"H{len(positions)}", positions=positions), list_cutoff)
    return batch, NeighborhoodBuilder(**{**PLAIN, **changes})(batch)


def rectangles_of(neighborhood):
    num_atoms = len(neighborhood.layout.starts) - 1
    return make_layout(neighborhood.centers, num_atoms, rectangles=True).rectangles


LINE = [[0.0, 0, 0], [1.0, 0, 0], [2.2, 0, 0], [9.0, 0, 0]]


def pairs(neighborhood):
    return list(zip(neighborhood.centers.tolist(), neighborhood.neighbors.tolist(), strict=True))


def test_edges_beyond_the_cutoff_are_dropped():
    batch, neighborhood = build([*LINE[:3], [3.6, 0, 0]])
    assert batch.num_edges == 12
    assert pairs(neighborhood) == [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1), (2, 3), (3, 2)]
    assert (neighborhood.geometry[:, 3] <= 2.5).all()


def test_reverse_edges_are_renumbered():
    _, neighborhood = build([*LINE[:3], [3.6, 0, 0]])
    assert torch.equal(neighborhood.centers[neighborhood.reverse], neighborhood.neighbors)
    vectors = neighborhood.geometry[:, :3]
    assert torch.equal(vectors[neighborhood.reverse], -vectors)
    tokens = torch.arange(len(neighborhood.centers)).unsqueeze(1)
    back = permute_rows(tokens, neighborhood.reverse, neighborhood.reverse)
    assert torch.equal(permute_rows(back, neighborhood.reverse, neighborhood.reverse), tokens)


def test_factors_taper_off():
    _, neighborhood = build(LINE)
    factors = dict(zip(pairs(neighborhood), neighborhood.factors.tolist(), strict=True))
    assert factors[(0, 1)] == 1.0
    assert 0.0 < factors[(0, 2)] < 1.0
    assert factors[(0, 2)] == factors[(2, 0)]


@pytest.mark.parametrize("method", ["solver", "grid"])
def test_both_directions_of_a_pair_share_the_adaptive_radius(method):
    torch.manual_seed(0)
    _, neighborhood = build(
        (3 * torch.rand(8, 3)).tolist(),
        cutoff=4.0,
        num_neighbors_adaptive=2.0,
        adaptive_method=method,
    )
    assert set(pairs(neighborhood)) == {(j, i) for i, j in pairs(neighborhood)}
    torch.testing.assert_close(neighborhood.factors, neighborhood.factors[neighborhood.reverse])
    assert 0 < len(neighborhood.centers) < 8 * 7


def test_atoms_without_neighbours_have_a_slot_of_their_own():
    _, neighborhood = build(LINE)
    tokens = torch.arange(4.0 + len(neighborhood.centers)).unsqueeze(1)
    padded = pad_rows(tokens, rectangles_of(neighborhood))
    rows = padded.view(4, 3).tolist()
    assert [3.0, 0.0, 0.0] in rows
    assert [0.0, 4.0, 5.0] in rows
    assert torch.equal(unpad_rows(padded, rectangles_of(neighborhood)), tokens)


@pytest.mark.parametrize("adaptive", [None, 4.0])
def test_no_edges_at_all(adaptive):
    _, neighborhood = build([LINE[0], LINE[3]], num_neighbors_adaptive=adaptive)
    assert neighborhood.geometry.shape == (0, 4)
    tokens = torch.ones(2, 5)
    assert torch.equal(pad_rows(tokens, rectangles_of(neighborhood)), tokens)


def test_full_rectangles_have_no_empty_slots():
    full = make_layout(torch.tensor([0, 0, 1, 1]), 2, rectangles=True)
    assert not full.rectangles.empty.any()
    assert [tuple(slots.shape) for slots in full.rectangles.slots] == [(2, 3)]
    assert full.starts.tolist() == [0, 2, 4]
    assert int(make_layout(torch.tensor([0, 0, 1]), 2, True).rectangles.empty.sum()) == 1


@pytest.mark.parametrize("crowded", [0, 1, 7, 300])
def test_few_slots_are_empty_whoever_is_crowded(crowded):
    """One rectangle for all would have ten slots a token where one atom has 200 neighbours."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(10, 30, (1000,), generator=generator)
    counts[torch.randperm(1000, generator=generator)[:crowded]] = 200
    centers = torch.arange(1000).repeat_interleave(counts)
    where = make_layout(centers, 1000, rectangles=True).rectangles
    tokens = 1000 + len(centers)
    assert len(where.empty) <= 1.15 * tokens
    assert 1 < len(where.slots) <= 8
    # Each token has one slot, and an atom's lie in one row, the centre first.
    assert where.token_of_slot[where.slot_of_token].tolist() == list(range(tokens))
    assert int((~where.empty).sum()) == tokens
    owners = torch.cat([torch.arange(1000), centers])
    for slots in where.slots:
        assert torch.equal(owners[slots], slots[:, :1].expand_as(slots))


def tensors_of(nested):
    return [leaf for leaf in tree_flatten(nested)[0] if leaf is not None]


@pytest.mark.parametrize("adaptive", [None, 4.0])
def test_edges_chosen_beforehand_give_the_same_and_move_with_the_batch(adaptive):
    torch.manual_seed(0)
    atoms = Atoms("H8", positions=3 * torch.rand(8, 3).numpy())
    batch = batch_from_atoms(atoms, 8.0)
    builder = NeighborhoodBuilder(**{**PLAIN, "num_neighbors_adaptive": adaptive})
    prepared = builder.with_edges(batch)
    assert prepared.edges is not None
    assert prepared.edges.within is not None
    assert len(prepared.edges.centers) < batch.num_edges
    expected, found = tensors_of(builder(batch)), tensors_of(builder(prepared))
    for own, other in zip(found, expected, strict=True):
        assert torch.equal(own, other)
    moved = tensors_of(prepared.to("meta"))
    assert {tensor.device.type for tensor in moved} == {"meta"}
    assert len(moved) == len(tensors_of(prepared)) > 9 + 4


def bump(distances, cutoff, width):
    return bump_step((distances - (cutoff - width)) / width)


def cosine(distances, cutoff, width):
    return cosine_step((distances - (cutoff - width)) / width)


CUTOFF_FUNCTIONS = {"Bump": bump, "Cosine": cosine}
BOTH = pytest.mark.parametrize("function", CUTOFF_FUNCTIONS.values(), ids=CUTOFF_FUNCTIONS)


@BOTH
def test_one_inside_zero_outside(function):
    distances = torch.tensor([0.1, 2.0, 3.5, 4.0, 7.0], dtype=torch.float64)
    assert function(distances, 4.0, 0.5).tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]


@BOTH
def test_falls_all_the_way(function):
    factors = function(torch.linspace(3.55, 3.95, 50, dtype=torch.float64), 4.0, 0.5)
    assert (factors.diff() < 0).all()
    middle = function(torch.tensor(3.75, dtype=torch.float64), 4.0, 0.5)
    assert float(middle) == pytest.approx(0.5)


def test_values_of_the_formulas():
    quarter = torch.tensor(3.625, dtype=torch.float64)
    assert float(cosine(quarter, 4.0, 0.5)) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    expected = 0.5 * (1 + math.tanh(1 / math.tan(math.pi / 4)))
    assert float(bump(quarter, 4.0, 0.5)) == pytest.approx(expected)


@BOTH
def test_gradient_is_that_of_the_values(function):
    distances = torch.tensor([1.0, 3.7, 3.75, 3.9, 5.0], dtype=torch.float64, requires_grad=True)
    cutoffs = torch.tensor([4.0, 4.1, 4.0, 4.2, 4.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda d, c: function(d, c, 0.5), (distances, cutoffs))
    assert torch.autograd.gradgradcheck(lambda d, c: function(d, c, 0.5), (distances, cutoffs))


@BOTH
@pytest.mark.parametrize("edge", [3.5, 4.0])
def test_no_kink_at_the_ends_of_the_taper(function, edge):
    near = torch.tensor([edge - 1e-5, edge + 1e-5], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(function(near, 4.0, 0.5).sum(), near)
    assert slope.abs().max() < 1e-3
    assert slope.isfinite().all()


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
