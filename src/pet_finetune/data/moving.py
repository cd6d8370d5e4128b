"""The model's input for one structure that is computed again and again while its atoms move."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from pet_finetune.graph import Batch

from .contacts import Contacts, find_contacts
from .neighbors import NeighborList, edge_vectors
from .skin import SkinNeighbors

__all__ = ["MovingAtoms", "Origin"]

#: Positions, cell and pbc of a neighbour list.
Origin = tuple[np.ndarray, np.ndarray, np.ndarray]


class _Fixed(NamedTuple):
    """The parts of a batch that stay as they are while atoms and cell move."""

    numbers: Tensor
    structure_index: Tensor
    charges: Tensor
    spins: Tensor


class MovingAtoms:
    """Makes batches of one structure; what has not changed since the last one is used again.

    Args:
        cutoff: up to which no edge may be missed, in Å.
        skin: margin of the neighbour list, in Å.
    """

    def __init__(self, cutoff: float, skin: float) -> None:
        self._neighbors = SkinNeighbors(cutoff, skin)
        self._latest: NeighborList | None = None
        self._pairs: NeighborList | None = None
        self._numbers = np.empty(0, dtype=np.int64)
        self._fixed: _Fixed | None = None
        self._made_for: object = None

    def fresh(self) -> MovingAtoms:
        """Another one, which has seen no structure yet."""
        return MovingAtoms(self._neighbors.cutoff, self._neighbors.skin)

    def batch(
        self, atoms: Atoms, charge: int, spin: int, device: torch.device, dtype: torch.dtype
    ) -> Batch:
        """The structure as the model's input; its edges reach as far as the skin.

        Args:
            atoms: can be computed, see :func:`~.computable.check_atoms`.
            charge: its total charge.
            spin: its multiplicity.
            device: of the batch.
            dtype: of the batch's floats.
        """
        positions, cell, pbc = _geometry(atoms)
        pairs = self._neighbors.update(positions, cell, pbc)
        if self._pairs is None or pairs is not self._latest:
            self._latest, self._pairs = pairs, _move(pairs, device)
        cells = cell.unsqueeze(0)
        if device.type != "cpu":
            positions, cell = positions.to(device), cell.to(device)
        # Differences of positions are taken in double precision, whatever the model's.
        vectors = edge_vectors(positions, cell, self._pairs)
        return Batch(
            edge_vectors=vectors.to(dtype),
            centers=self._pairs.centers,
            neighbors=self._pairs.neighbors,
            reverse=self._pairs.reverse,
            cells=cells.to(device=device, dtype=dtype),
            **self._without_geometry(atoms, charge, spin, device)._asdict(),
        )

    def _without_geometry(
        self, atoms: Atoms, charge: int, spin: int, device: torch.device
    ) -> _Fixed:
        made_for = charge, spin, device
        same = made_for == self._made_for and np.array_equal(atoms.numbers, self._numbers)
        if self._fixed is None or not same:
            self._numbers, self._made_for = atoms.numbers.astype(np.int64), made_for
            self._fixed = _Fixed(
                numbers=torch.tensor(self._numbers, device=device),
                structure_index=torch.zeros(len(atoms), dtype=torch.int64, device=device),
                charges=torch.tensor([charge], device=device),
                spins=torch.tensor([spin], device=device),
            )
        return self._fixed

    def contacts(self, atoms: Atoms) -> Contacts | None:
        """Of the structure computed last; None before the first."""
        if self._latest is None:
            return None
        positions, cell, _ = _geometry(atoms)
        return find_contacts(positions, cell, self._latest, self._neighbors.cutoff)

    @property
    def origin(self) -> Origin | None:
        """What the neighbour list in use was built for; None before the first."""
        origin = self._neighbors.origin
        if origin is None:
            return None
        positions, cell, pbc = (tensor.numpy().copy() for tensor in origin)
        return positions, cell, pbc

    def rebuild(self, origin: Origin) -> None:
        """Build the list of an :attr:`origin` again, to go on as if there had been no stop."""
        positions, cell, pbc = (torch.from_numpy(np.array(array)) for array in origin)
        self._neighbors.rebuild(positions, cell, pbc)


def _geometry(atoms: Atoms) -> tuple[Tensor, Tensor, Tensor]:
    """Positions, cell (zero where not periodic) and pbc of a structure."""
    pbc = np.array(atoms.pbc, dtype=bool)
    cell = np.where(pbc[:, None], np.asarray(atoms.cell.array, dtype=np.float64), 0.0)
    positions = np.array(atoms.positions, dtype=np.float64)
    return torch.from_numpy(positions), torch.from_numpy(cell), torch.from_numpy(pbc)


def _move(pairs: NeighborList, device: torch.device) -> NeighborList:
    return NeighborList(
        pairs.centers.to(device),
        pairs.neighbors.to(device),
        pairs.shifts.to(device),
        pairs.reverse.to(device),
    )
