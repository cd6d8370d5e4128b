"""A neighbour list that is built with a margin and used again until atoms or cell move too far."""

from __future__ import annotations

import torch
from torch import Tensor

from .neighbors import NeighborList, neighbor_list

__all__ = ["SkinNeighbors"]


class SkinNeighbors:
    """The neighbour list of one moving structure, complete up to ``cutoff`` at every call.

    It is built up to ``cutoff + skin`` and kept for as long as no pair can have come within the
    cutoff that was beyond the margin. Let F take the old cell to the new one, and u be what each
    atom moved apart from that: a pair at distance d is then at least ``s d - 2 max|u|`` apart,
    with s the smallest singular value of F. So MD at constant pressure keeps its list too.

    Args:
        cutoff: the distance, in Å, up to which pairs must never be missed.
        skin: the margin, in Å, 0 or more; 0 builds a list at every move.
    """

    def __init__(self, cutoff: float, skin: float) -> None:
        self.cutoff = cutoff
        self.skin = skin
        self._pairs: NeighborList | None = None
        self._positions = torch.empty(0, 3)
        self._cell = torch.empty(3, 3)
        self._pbc = torch.empty(3, dtype=torch.bool)

    def update(self, positions: Tensor, cell: Tensor, pbc: Tensor) -> NeighborList:
        """The list of a structure: the same object as last time where that still holds.

        Args:
            positions: ``[n, 3]`` float64 in Å.
            cell: ``[3, 3]`` float64, cell vectors as rows in Å, zero where not periodic.
            pbc: ``[3]`` bool.
        """
        if self._pairs is None or not self._holds(positions, cell, pbc):
            self._pairs = neighbor_list(positions, cell, pbc, self.cutoff + self.skin)
            self._positions, self._cell, self._pbc = positions.clone(), cell.clone(), pbc.clone()
        return self._pairs

    @property
    def origin(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Positions, cell and pbc that the list at hand was built for; None before the first.

        The order of the pairs, and with it the last bit of every sum over them, depends on these.
        """
        if self._pairs is None:
            return None
        return self._positions, self._cell, self._pbc

    def rebuild(self, positions: Tensor, cell: Tensor, pbc: Tensor) -> None:
        """Build the list of an :attr:`origin` again, to go on as if there had been no stop."""
        self._pairs = None
        self.update(positions, cell, pbc)

    def _holds(self, positions: Tensor, cell: Tensor, pbc: Tensor) -> bool:
        """Whether the list at hand has every pair within the cutoff."""
        if positions.shape != self._positions.shape or not torch.equal(pbc, self._pbc):
            return False
        expected, shrinkage = self._positions, 1.0
        if not torch.equal(cell, self._cell):
            if not bool(pbc.all()):
                return False
            deformation = torch.linalg.solve(self._cell, cell)
            expected = self._positions @ deformation
            shrinkage = float(torch.linalg.svdvals(deformation).min())
        moved = positions - expected
        moved = moved - moved.mean(dim=0)  # only relative moves count
        furthest = float(torch.linalg.vector_norm(moved, dim=1).max())
        return shrinkage * (self.cutoff + self.skin) - 2.0 * furthest >= self.cutoff
