"""Which atoms of a structure are closest, and which are out of reach of all others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .neighbors import NeighborList, edge_vectors

__all__ = ["Contacts", "find_contacts"]


@dataclass(frozen=True)
class Contacts:
    """The extremes of the distances in a structure.

    Attributes:
        closest: the two atoms nearest to each other (the same twice: an atom and its image);
            None where no two are within reach.
        distance: between them, in Å; infinite where there are none.
        alone: atoms without another one within reach.
    """

    closest: tuple[int, int] | None
    distance: float
    alone: frozenset[int]


def find_contacts(positions: Tensor, cell: Tensor, pairs: NeighborList, reach: float) -> Contacts:
    """Look through a neighbour list.

    Args:
        positions: ``[n, 3]`` in Å.
        cell: ``[3, 3]``, cell vectors as rows in Å.
        pairs: complete up to ``reach``.
        reach: in Å.
    """
    lengths = torch.linalg.vector_norm(edge_vectors(positions, cell, pairs), dim=1)
    near = lengths < reach
    reached = set(pairs.centers[near].tolist())
    alone = frozenset(range(len(positions))) - reached
    if not reached:
        return Contacts(None, float("inf"), alone)
    index = int(lengths.argmin())
    closest = int(pairs.centers[index]), int(pairs.neighbors[index])
    return Contacts(closest, float(lengths[index]), alone)
