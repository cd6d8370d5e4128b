"""Order, packs, shares and rotations of the structures of an epoch."""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pet_finetune.graph import rotate_graphs, rotate_rows
from pet_finetune.keys import LabelKind, label_kind
from pet_finetune.rng import Stream

from .labelled_batch import LabelledBatch
from .structure import Structure

#: Structures that lie one behind the other and are read together, and how many such blocks are
#: mixed.
BLOCK, MIXED = 1024, 64


def in_blocks(count: int, rng: np.random.Generator) -> np.ndarray:
    """A random order for structures on a disk, ``[count]``.

    Blocks of 1,024 neighbours come in random order, and the structures of each 64 of them are
    shuffled together: 65,536 structures from 64 places, which few and long reads bring. A set of
    fewer structures is shuffled as one in memory.
    """
    if count <= BLOCK * MIXED:
        return rng.permutation(count)
    starts = rng.permutation(-(-count // BLOCK)) * BLOCK
    mixed = []
    for first in range(0, len(starts), MIXED):
        members = (starts[first : first + MIXED, None] + np.arange(BLOCK)).ravel()
        mixed.append(rng.permutation(members[members < count]))
    return np.concatenate(mixed)


def pack(
    order: np.ndarray, num_atoms: np.ndarray, max_atoms: int, min_atoms: int = 0
) -> list[np.ndarray]:
    """Cut an order of structures into runs of at most ``max_atoms`` atoms.

    Args:
        order: indices of structures, in the order they are to be used.
        num_atoms: number of atoms of each structure (indexed by ``order``'s values).
        max_atoms: atoms that a batch may hold; a larger structure makes a batch of its own.
        min_atoms: batches with fewer atoms are left out.

    Returns:
        consecutive pieces of ``order``.
    """
    cuts, filled = [], 0
    for position, count in enumerate(num_atoms[order].tolist()):
        if filled and filled + count > max_atoms:
            cuts.append(position)
            filled = 0
        filled += count
    pieces = np.split(order, cuts)
    return [piece for piece in pieces if int(num_atoms[piece].sum()) >= min_atoms]


def count_packs(order: np.ndarray, num_atoms: np.ndarray, max_atoms: int, min_atoms: int) -> int:
    """Number of packs of :func:`pack`, without making them."""
    ends = np.cumsum(num_atoms[order]).tolist()
    count = first = filled = 0
    while first < len(ends):
        # A structure that is too large is a piece of its own.
        last = max(first + 1, bisect_right(ends, filled + max_atoms, first))
        count += ends[last - 1] - filled >= min_atoms
        first, filled = last, ends[last - 1]
    return count


def deal(work: np.ndarray, size: int) -> list[np.ndarray]:
    """Distribute structures to ``size`` processes with about equal work.

    The largest goes first, always to the process with the least work: within 4/3 of the optimum (R.
    L. Graham, SIAM J. Appl. Math. 17, 416 (1969)).

    Returns:
        Positions in ``work`` for each process, ascending; empty for some if there are too few.
    """
    heap = [(0, process) for process in range(size)]
    hands: list[list[int]] = [[] for _ in range(size)]
    for position in np.argsort(-work, kind="stable").tolist():
        held, process = heapq.heappop(heap)
        hands[process].append(position)
        heapq.heappush(heap, (held + int(work[position]), process))
    return [np.array(sorted(hand), dtype=np.int64) for hand in hands]


def random_rotations(
    count: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Draw orthogonal matrices uniformly from O(3).

    A unit quaternion uniform on the 3-sphere gives a uniform rotation (K. Shoemake, Graphics
    Gems III, 1992); half of the matrices are multiplied by -1. Drawn in float64, so that the same
    generator gives the same rotations in every dtype.

    Args:
        count: number of matrices ``b``.
        generator: source of randomness, on the CPU.
        dtype: dtype of the result.

    Returns:
        ``[b, 3, 3]``; ``v' = R v``, determinant +1 or -1.
    """
    quaternions = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    w, x, y, z = torch.nn.functional.normalize(quaternions, dim=1).unbind(1)
    rotations = torch.stack(
        [
            1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
            2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
            2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
        ],
        dim=1,
    ).reshape(count, 3, 3)  # fmt: skip
    signs = torch.randint(0, 2, (count, 1, 1), generator=generator) * 2 - 1
    return (rotations * signs).to(dtype)


def rotate_batch(batch: LabelledBatch, rotations: Tensor) -> LabelledBatch:
    """Turn each structure of a batch with its labels, by ``rotations``, ``[b, 3, 3]``.

    Vectors become ``R v``, tensors ``R s R^T``; scalars stay. Missing labels (NaN) stay NaN; one
    NaN component makes all three of a vector, or all nine of a tensor, NaN.
    """
    graph, labels = batch.graph, dict(batch.labels)
    if not graph.num_structures:
        return batch
    for name, value in batch.labels.items():
        kind = label_kind(name, batch.kinds)
        if kind == LabelKind(per_atom=True, rank=1) and value.dim() == 2:
            transposed = rotations.to(value.dtype).transpose(1, 2)
            atoms = graph.atoms_per_structure.tolist()
            labels[name] = rotate_rows(value, transposed, atoms)
        elif kind.rank:
            rows = graph.structure_index if kind.per_atom else slice(None)
            labels[name] = _rotate_components(value, rotations.to(value.dtype)[rows], kind.rank)
    return replace(batch, graph=rotate_graphs(graph, rotations), labels=labels)


def _rotate_components(values: Tensor, rotations: Tensor, rank: int) -> Tensor:
    """Turn vectors or tensors, several for each row maybe.

    Args:
        values: ``[m, 3, ...]`` for ``rank`` 1, ``[m, 3, 3, ...]`` for 2; what follows the Cartesian
            axes are subtargets.
        rotations: ``[m, 3, 3]``.
        rank: 1 for vectors, 2 for tensors.
    """
    if rank == 1:
        return torch.einsum("mij,mj...->mi...", rotations, values)
    return torch.einsum("mik,mjl,mkl...->mij...", rotations, rotations, values)


def distorted(
    structures: Sequence[Structure], copies: int, rattle: float, strain: float, seed: int
) -> list[Structure]:
    """Copies of each structure with every atom moved and, where periodic, the cell strained.

    Labels are left behind, since they are those of the original.

    Args:
        structures: the originals; they stay as they are.
        copies: how many of each.
        rattle: standard deviation of each Cartesian coordinate, Å.
        strain: standard deviation of each component of the symmetric strain of cells that are
            periodic in all three directions.
        seed: the same seed gives the same copies.
    """
    made = []
    for number, structure in enumerate(structures):
        for copy in range(copies):
            rng = np.random.default_rng([seed, Stream.PERTURBED_COPIES, number, copy])
            made.append(_distorted(structure, rattle, strain, rng))
    return made


def _distorted(
    structure: Structure, rattle: float, strain: float, rng: np.random.Generator
) -> Structure:
    positions, cell = structure.positions, structure.cell
    if bool(structure.pbc.all()):
        drawn = strain * rng.normal(size=(3, 3))
        deform = torch.from_numpy(np.eye(3) + (drawn + drawn.T) / 2)
        positions, cell = positions @ deform, cell @ deform
    moves = torch.from_numpy(rattle * rng.normal(size=tuple(positions.shape)))
    return replace(structure, positions=positions + moves, cell=cell, labels={})
