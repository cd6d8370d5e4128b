"""The order of the structures of an epoch, cut into batches and dealt out to processes."""

from __future__ import annotations

import heapq
from bisect import bisect_right

import numpy as np

__all__ = ["count_packs", "deal", "in_blocks", "pack"]

#: Structures that lie one behind the other and are read together, and how many such blocks are
#: mixed.
BLOCK, MIXED = 1024, 64


def in_blocks(count: int, rng: np.random.Generator) -> np.ndarray:
    """A random order for structures on a disk, ``[count]``.

    Blocks of 1,024 neighbours come in random order, and the structures of each 64 of them are
    shuffled together: 65,536 structures from 64 places, which few and long reads bring. A set of
    fewer structures is shuffled as one in memory.

    Args:
        count: number of structures.
        rng: source of randomness.
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
    """How many pieces :func:`pack` makes, without making them; a few steps a piece."""
    ends = np.cumsum(num_atoms[order]).tolist()
    count = first = filled = 0
    while first < len(ends):
        # A structure that is too large is a piece of its own.
        last = max(first + 1, bisect_right(ends, filled + max_atoms, first))
        count += ends[last - 1] - filled >= min_atoms
        first, filled = last, ends[last - 1]
    return count


def deal(work: np.ndarray, size: int) -> list[np.ndarray]:
    """Deal structures out to processes so that all have about as much to do.

    The largest goes first, always to whoever has least: within 4/3 of the best that there is (R. L.
    Graham, SIAM J. Appl. Math. 17, 416 (1969)).

    Args:
        work: of each structure, above 0.
        size: how many processes there are.

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
