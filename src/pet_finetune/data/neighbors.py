"""Full, sorted neighbour lists with the index of each edge's reverse, computed by vesin."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import vesin
from torch import Tensor

from .structure import Structure

__all__ = ["NeighborList", "edge_vectors", "neighbor_list", "structure_neighbors"]


@dataclass(frozen=True, eq=False)
class NeighborList:
    """All directed pairs within a cutoff, sorted by centre, then neighbour, then cell shift.

    An atom is its own neighbour through a periodic image, never through shift (0, 0, 0).
    """

    #: Index of the central atom, ``[e]`` int64.
    centers: Tensor
    #: Index of the neighbouring atom, ``[e]`` int64.
    neighbors: Tensor
    #: Cell shift of the neighbour, ``[e, 3]`` int64.
    shifts: Tensor
    #: Index of the edge from neighbour to centre with the opposite shift, ``[e]`` int64.
    reverse: Tensor

    @property
    def num_edges(self) -> int:
        """Number of directed pairs."""
        return int(self.centers.shape[0])


def neighbor_list(positions: Tensor, cell: Tensor, pbc: Tensor, cutoff: float) -> NeighborList:
    """Compute the full neighbour list of one structure.

    :param positions: ``[n, 3]`` in Å; atoms may lie outside the cell.
    :param cell: ``[3, 3]`` cell vectors as rows in Å; rows of directions without periodicity
        are ignored.
    :param pbc: ``[3]`` bool.
    :param cutoff: largest distance in Å, above 0.
    """
    # The half list is asked for and mirrored here: every edge then has its reverse by
    # construction, also for pairs whose distance equals the cutoff up to rounding.
    calculator = vesin.NeighborList(cutoff=float(cutoff), full_list=False)
    first, second, shift = calculator.compute(
        points=positions.detach().numpy(),
        box=cell.detach().numpy(),
        periodic=pbc.numpy(),
        quantities="ijS",
    )
    half = len(first)
    first, second = first.astype(np.int64), second.astype(np.int64)
    shift = shift.astype(np.int64).reshape(half, 3)
    centers = np.concatenate([first, second])
    neighbors = np.concatenate([second, first])
    shifts = np.concatenate([shift, -shift])
    order = np.argsort(_sort_key(centers, neighbors, shifts, len(positions)), kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(2 * half)
    # Edge k of the half list and edge k + half are each other's reverse.
    reverse = place[(order + half) % (2 * half)] if half else place
    return NeighborList(
        centers=torch.from_numpy(centers[order]),
        neighbors=torch.from_numpy(neighbors[order]),
        shifts=torch.from_numpy(shifts[order]),
        reverse=torch.from_numpy(reverse),
    )


def structure_neighbors(structure: Structure, cutoff: float) -> NeighborList:
    """Compute the neighbour list of a :class:`Structure`; ``cutoff`` in Å."""
    return neighbor_list(structure.positions, structure.cell, structure.pbc, cutoff)


def edge_vectors(positions: Tensor, cell: Tensor, pairs: NeighborList) -> Tensor:
    """Vectors from centre to neighbour, ``[e, 3]`` in Å, differentiable in both inputs.

    :param positions: ``[n, 3]``.
    :param cell: ``[3, 3]``, cell vectors as rows.
    :param pairs: a neighbour list of these atoms.
    """
    difference = positions[pairs.neighbors] - positions[pairs.centers]
    return difference + pairs.shifts.to(cell.dtype) @ cell


def _sort_key(
    centers: np.ndarray, neighbors: np.ndarray, shifts: np.ndarray, num_atoms: int
) -> np.ndarray:
    """Pack (centre, neighbour, shift) into one integer that sorts like the tuple."""
    reach = int(np.abs(shifts).max(initial=0))
    base = 2 * reach + 1
    key: np.ndarray = centers * num_atoms + neighbors
    for axis in range(3):
        key = key * base + (shifts[:, axis] + reach)
    return key
