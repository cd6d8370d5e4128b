"""Joining systems, and pairing up the edges of a neighbour list."""

from __future__ import annotations

import torch

from models import apart, crystal
from pet_finetune.data.neighbors import structure_neighbors
from pet_finetune.data.structure import atoms_to_structure
from pet_finetune.export.interface import pair_up


def rows_of(atoms, cutoff=4.0):
    """The pairs of a structure, in our order, and the reverse of each."""
    pairs = structure_neighbors(atoms_to_structure(atoms, 0), cutoff)
    columns = [pairs.centers[:, None], pairs.neighbors[:, None], pairs.shifts]
    return torch.cat(columns, dim=1), pairs.reverse


def test_pairs_in_any_order_are_sorted_and_find_their_opposites() -> None:
    rows, reverse = rows_of(crystal())
    shuffled = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    order, found = pair_up(rows[shuffled], 4)
    assert torch.equal(rows[shuffled][order], rows)
    assert torch.equal(found, reverse)


def test_a_pair_without_its_opposite_is_left_out() -> None:
    rows, _ = rows_of(crystal())
    order, reverse = pair_up(rows[1:], 4)
    assert len(order) == len(rows) - 2
    kept = rows[1:][order]
    assert torch.equal(kept[reverse][:, 0], kept[:, 1])
    assert torch.equal(kept[reverse][:, 2:], -kept[:, 2:])
    assert torch.equal(reverse[reverse], torch.arange(len(order)))


def test_no_pairs_at_all() -> None:
    order, reverse = pair_up(torch.zeros(0, 5, dtype=torch.int64), 3)
    assert len(order) == len(reverse) == 0


def test_atoms_without_neighbours_have_no_pairs() -> None:
    rows, reverse = rows_of(apart())
    order, found = pair_up(rows, 4)
    assert torch.equal(found, reverse)
    assert 3 not in rows[order][:, 0]
