"""Full, sorted neighbour lists with the index of each edge's reverse, computed by vesin.

All calls of vesin are in :func:`find_pairs`. Its cell list divides by zero, which ends the process,
where atoms are very far apart, and takes all memory where they are very dense, so what it is given
is looked at first.
"""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import numpy as np
import torch
import vesin
from torch import Tensor

from pet_finetune.errors import DataError

from .structure import Structure

#: Å, beyond which atoms and cell vectors are no structure of anything; and how many cells an atom
#: may lie outside of its own. At 1e5, float64 positions still have 1e-11 of it.
_FARTHEST = 1e5
#: Neighbours of an atom: 0.18 atoms/Å³ (diamond) within 12 Å make 1300.
_DENSEST = 10_000
#: Bytes that a directed pair takes while a list is made.
_PAIR_BYTES = 120
#: vesin's cell list has at most so many cells.
_MOST_CELLS = 1e5


class NeighborList(NamedTuple):
    """All directed pairs within a cutoff, sorted by centre, then neighbour, then cell shift.

    An atom is its own neighbour through a periodic image, never through shift (0, 0, 0).

    Attributes:
        centers: index of the central atom, ``[e]`` int64.
        neighbors: index of the neighbouring atom, ``[e]`` int64.
        shifts: cell shift of the neighbour, ``[e, 3]`` int64.
        reverse: index of the edge from neighbour to centre with the opposite shift, ``[e]`` int64.
    """

    centers: Tensor
    neighbors: Tensor
    shifts: Tensor
    reverse: Tensor

    @property
    def num_edges(self) -> int:
        """Number of directed pairs."""
        return int(self.centers.shape[0])


def find_pairs(
    positions: np.ndarray,
    cell: np.ndarray,
    pbc: np.ndarray,
    cutoff: float,
    quantities: str,
    *,
    full: bool,
    where: str = "",
) -> list[np.ndarray]:
    """Pairs of atoms within a cutoff, in vesin's order.

    Args:
        positions: ``[n, 3]`` in Å; atoms may lie outside the cell.
        cell: ``[3, 3]`` cell vectors as rows in Å; rows of directions without periodicity are
            ignored.
        pbc: ``[3]`` bool.
        cutoff: largest distance in Å, above 0.
        quantities: letters as vesin has them: ``i``, ``j``, ``S`` (cell shift), ``d`` (distance),
            ``D`` (vector).
        full: whether each pair comes in both directions.
        where: what the structure is, for messages.

    Returns:
        one array for each letter.

    Raises:
        DataError: positions or cell are not finite, atoms or cell vectors are absurdly far apart,
            or the atoms are so dense that their pairs do not fit into memory.
    """
    name = f"{where}: " if where else "The structure cannot be computed: "
    _check_extent(positions, cell, pbc, name)
    neighbors = expected_neighbors(positions, cell, pbc, cutoff)
    _check_density(len(positions), neighbors, cutoff, name)
    near = _without_gaps(positions, pbc, cutoff)
    reach = _safe_reach(near, cell, pbc, cutoff)
    try:
        found = vesin.NeighborList(cutoff=reach, full_list=full).compute(
            points=near, box=cell, periodic=pbc, quantities=quantities + "d"
        )
    except MemoryError:
        raise _too_many(name, len(positions), neighbors, cutoff) from None
    *arrays, distances = found
    if reach > cutoff:
        inside = distances < cutoff
        arrays = [array[inside] for array in arrays]
    return arrays


def expected_neighbors(
    positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray, cutoff: float
) -> float:
    """Mean number of neighbours of evenly spread atoms.

    Args:
        positions: ``[n, 3]`` in Å.
        cell: ``[3, 3]``, cell vectors as rows in Å.
        pbc: ``[3]`` bool.
        cutoff: in Å.

    Returns:
        The number; infinite for a flat cell, which nothing fits into.
    """
    count = len(positions)
    try:
        heights = cell_heights(positions, cell, pbc)
    except np.linalg.LinAlgError:
        return math.inf
    # Beyond its borders a structure has nothing: neighbours are at most what lies within them.
    inside = np.where(pbc, 2.0 * cutoff, np.minimum(2.0 * cutoff, heights + 1.0))
    part = math.pi / 6.0 if bool(pbc.all()) else 1.0
    with np.errstate(over="ignore", divide="ignore"):
        density = count / float(np.prod(np.where(pbc, heights, heights + 1.0)))
        return float(density * part * np.prod(inside))


def cell_heights(positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray) -> np.ndarray:
    """Distances between the faces of the cell, or the extent of the atoms without one."""
    if not pbc.any():
        return np.ptp(positions, axis=0) if len(positions) else np.zeros(3)
    box = _whole_cell(cell, pbc)
    volume = abs(float(np.linalg.det(box)))
    faces = np.linalg.norm(np.cross(np.roll(box, -1, axis=0), np.roll(box, -2, axis=0)), axis=1)
    extents = np.ptp(positions @ np.linalg.inv(box), axis=0) if len(positions) else np.zeros(3)
    heights: np.ndarray = np.where(pbc, volume / faces, extents)
    return heights


def _whole_cell(cell: np.ndarray, pbc: np.ndarray) -> np.ndarray:
    """The cell with unit vectors at right angles to the periodic ones in place of the others."""
    box: np.ndarray = np.where(pbc[:, None], cell, 0.0 if pbc.any() else np.eye(3))
    if pbc.any() and not pbc.all():
        box[~pbc] = np.linalg.svd(box)[2][int(pbc.sum()) :]
    return box


def _check_extent(positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray, name: str) -> None:
    """Refuse what no cell list can be made for, naming the atom."""
    wrong = np.flatnonzero(~np.isfinite(positions).all(axis=1))
    if len(wrong):
        raise DataError(f"{name}the position of atom {wrong[0]} is NaN or infinite.")
    periodic = cell[pbc]
    if not len(periodic) and np.abs(positions).max(initial=0.0) < _FARTHEST / 2:
        return  # nothing can be too far: most molecules need no closer look
    if not np.isfinite(periodic).all() or np.linalg.matrix_rank(periodic) < len(periodic):
        raise DataError(
            f"{name}the cell vectors of its periodic directions are zero, linearly dependent or "
            f"not finite: {periodic.tolist()}. Set the cell, or pbc to False."
        )
    longest = float(np.linalg.norm(periodic, axis=1).max(initial=0.0))
    if longest > _FARTHEST:
        raise DataError(
            f"{name}a cell vector is {longest:.3g} A long (at most {_FARTHEST:g}). Look at the "
            "cell, and at the unit of length (systems.length_unit)."
        )
    if not len(positions):
        return
    # Of directions with a period in cells, of others in Å; counted from the middle of the atoms.
    places = positions @ np.linalg.inv(_whole_cell(cell, pbc))
    away = np.abs(places - np.where(pbc, 0.0, np.median(places, axis=0)))
    atom, axis = np.unravel_index(int(away.argmax()), away.shape)
    if away[atom, axis] > _FARTHEST:
        far = (
            f"{away[atom, axis]:.3g} cells outside of its own"
            if pbc[axis]
            else f"{away[atom, axis]:.3g} A away from the others"
        )
        raise DataError(
            f"{name}atom {atom} lies {far} (at {positions[atom].tolist()}; at most {_FARTHEST:g}). "
            "The frame is broken: remove it, or compute it again. In a simulation, atoms have "
            "flown apart: try a shorter time step, and structures that the model knows."
        )


def _check_density(count: int, neighbors: float, cutoff: float, name: str) -> None:
    """Refuse more pairs than any matter has, or than the memory holds."""
    if neighbors > _DENSEST:
        raise DataError(
            f"{name}its atoms are so dense that each has about {neighbors:.3g} neighbours within "
            f"{cutoff:g} A (at most {_DENSEST}). Look at the cell, and at the unit of length: "
            "positions in nm need systems.length_unit: nm."
        )
    if count * neighbors * _PAIR_BYTES > _memory():
        raise _too_many(name, count, neighbors, cutoff)


def _too_many(name: str, count: int, neighbors: float, cutoff: float) -> DataError:
    return DataError(
        f"{name}its {count} atoms have about {count * neighbors:.3g} pairs within {cutoff:g} A, "
        "which do not fit into the memory of this machine. Look at the unit of length, or use a "
        "smaller structure."
    )


def _memory() -> float:
    """Bytes that this process may take at most."""
    whole = float(os.sysconf("SC_PHYS_PAGES")) * float(os.sysconf("SC_PAGE_SIZE"))
    try:
        import resource
    except ImportError:  # not on this system
        return whole
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return whole if limit == resource.RLIM_INFINITY else min(whole, float(limit))


def _without_gaps(positions: np.ndarray, pbc: np.ndarray, cutoff: float) -> np.ndarray:
    """Atoms of a molecule with the empty space between its parts taken out.

    A gap along an axis that is wider than the cutoff is cut down to twice the cutoff: the pairs
    stay the same, and a cell list of far apart atoms is as small as one of near ones.
    """
    if pbc.any() or (cell_heights(positions, positions, pbc) <= 4.0 * cutoff).all():
        return positions
    moved = positions
    for axis in range(3):
        order = np.argsort(positions[:, axis], kind="stable")
        gaps = np.diff(positions[order, axis])
        surplus = np.where(gaps > 4.0 * cutoff, gaps - 2.0 * cutoff, 0.0)
        if surplus.any():
            moved = moved.copy() if moved is positions else moved
            moved[order[1:], axis] -= np.cumsum(surplus)
    return moved


def _safe_reach(positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray, cutoff: float) -> float:
    """The cutoff, or a larger one where vesin's cell list would have no cell along some axis.

    It has one cell of the cutoff's size for each part of the box, and where these are more than
    1e5 it makes them larger in proportion, which leaves none along a thin direction.
    """
    heights = cell_heights(positions, cell, pbc)
    reach = float(cutoff)
    while float(np.prod(np.maximum(1.0, heights / reach))) > _MOST_CELLS:
        if float(heights.min()) / reach > 4.0:
            break  # no direction is thin
        reach *= 1.5
    return reach


def neighbor_list(
    positions: Tensor, cell: Tensor, pbc: Tensor, cutoff: float, where: str = ""
) -> NeighborList:
    """Compute the full neighbour list of one structure.

    Args:
        positions: ``[n, 3]`` in Å; atoms may lie outside the cell.
        cell: ``[3, 3]`` cell vectors as rows in Å; rows of directions without periodicity are
            ignored.
        pbc: ``[3]`` bool.
        cutoff: largest distance in Å, above 0.
        where: what the structure is, for messages.

    Raises:
        DataError: see :func:`find_pairs`.
    """
    # The half list is asked for and mirrored here: every edge then has its reverse by
    # construction, also for pairs whose distance equals the cutoff up to rounding.
    first, second, shift = find_pairs(
        positions.detach().numpy(),
        cell.detach().numpy(),
        pbc.numpy(),
        float(cutoff),
        "ijS",
        full=False,
        where=where,
    )
    half = len(first)
    first, second = first.astype(np.int64), second.astype(np.int64)
    shift = shift.astype(np.int64).reshape(half, 3)
    centers = np.concatenate([first, second])
    neighbors = np.concatenate([second, first])
    shifts = np.concatenate([shift, -shift])
    order = _sort(centers, neighbors, shifts, len(positions))
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
    """Compute the neighbour list of a :class:`Structure`; ``cutoff`` in Å.

    Raises:
        DataError: see :func:`find_pairs`; names the frame.
    """
    where = structure.where if structure.source else ""
    return neighbor_list(structure.positions, structure.cell, structure.pbc, cutoff, where)


def edge_vectors(positions: Tensor, cell: Tensor, pairs: NeighborList) -> Tensor:
    """Vectors from centre to neighbour, ``[e, 3]`` in Å, differentiable in both inputs.

    Args:
        positions: ``[n, 3]``.
        cell: ``[3, 3]``, cell vectors as rows.
        pairs: a neighbour list of these atoms.
    """
    difference = positions[pairs.neighbors] - positions[pairs.centers]
    return difference + pairs.shifts.to(cell.dtype) @ cell


def _sort(
    centers: np.ndarray, neighbors: np.ndarray, shifts: np.ndarray, num_atoms: int
) -> np.ndarray:
    """The order by centre, then neighbour, then shift."""
    reach = int(np.abs(shifts).max(initial=0))
    base = 2 * reach + 1
    if num_atoms**2 * base**3 >= 2**63:  # atoms lie very far outside of their cell
        return np.lexsort((*shifts.T[::-1], neighbors, centers))
    # All packed into one integer that sorts like the tuple, which is faster.
    key: np.ndarray = centers * num_atoms + neighbors
    for axis in range(3):
        key = key * base + (shifts[:, axis] + reach)
    return np.argsort(key, kind="stable")
