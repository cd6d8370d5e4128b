"""Which edges count, how they pair up, and where attention finds them."""

from __future__ import annotations

import pytest
import torch
from ase import Atoms
from torch.utils._pytree import tree_flatten

from pet_finetune.backends.attention import pad_rows, unpad_rows
from pet_finetune.backends.reference import permute_rows
from pet_finetune.data.labelled_batch import batch_from_atoms
from pet_finetune.graph import make_layout
from pet_finetune.nn.neighborhood import NeighborhoodBuilder

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
