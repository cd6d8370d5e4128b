"""A short vector for each structure that no rotation, translation or renumbering changes.

For each element and each k up to :data:`~.subject.NEAR`, the distances of its atoms to their k-th
neighbour are sorted and read off at a fixed number of quantiles; the edge of the cube that an atom
has for itself stands beside them. Two structures that differ by small displacements differ in it
by about as many Å.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from scipy.spatial import cKDTree

if TYPE_CHECKING:
    from .subject import Entry

__all__ = ["composition", "fingerprint", "neighbours", "within"]

_QUANTILES = 8
#: A search tree is no help in hundreds of dimensions, so it is built on this many principal axes
#: of a sample. Distances along a few axes are never longer than the whole ones.
_AXES, _SAMPLE = 8, 256
#: Candidates along these axes, of which the whole distances are taken.
_CANDIDATES = 16
#: Numbers that are held at once while distances are taken.
_CHUNK = 4_000_000


def composition(entry: Entry) -> tuple[tuple[int, int], ...]:
    """The reduced formula: elements and their counts without a common factor."""
    elements, counts = entry.elements
    counts = counts // np.gcd.reduce(counts)
    return tuple(zip(elements.tolist(), counts.tolist(), strict=True))


def fingerprint(numbers: np.ndarray, shells: np.ndarray, volume: float) -> np.ndarray:
    """The vector, scaled such that distances are root mean squares in Å.

    Its length depends on the number of elements only.

    Args:
        numbers: atomic numbers, ``[n]``.
        shells: ascending distances to neighbours, ``[n, k]``, Å.
        volume: of the cell, Å³; 0 where there is none.

    Returns:
        ``[elements * k * 8 + 1]`` float32.
    """
    parts = []
    for element in np.unique(numbers):
        distances = np.sort(shells[numbers == element], axis=0)
        at = np.linspace(0.0, len(distances) - 1.0, _QUANTILES)
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, len(distances) - 1)
        part = (at - low)[:, None]
        parts.append(((1.0 - part) * distances[low] + part * distances[high]).ravel())
    vector = np.concatenate(parts)
    edge = np.cbrt(volume / len(numbers))
    return np.append(vector / np.sqrt(len(vector)), edge).astype(np.float32)


def neighbours(
    entries: Sequence[Entry], keys: Sequence[Hashable], count: int
) -> Iterator[tuple[int, int, float]]:
    """Pairs of entries with the same key whose fingerprints are near.

    Those found are near ones, not in each case the very nearest.

    Args:
        entries: what is paired.
        keys: entries with different keys are not compared; equal keys imply equal elements.
        count: how many neighbours of each entry are asked for, at most.

    Yields:
        Each pair once: two positions, the smaller one first, and their distance in Å.
    """
    for members in _groups(keys):
        vectors = np.stack([entries[member].fingerprint for member in members])
        asked = min(_CANDIDATES, len(members) - 1) + 1
        shadows = _shadows(vectors)
        _, found = cKDTree(shadows).query(shadows, k=asked)
        distances = _distances(vectors, np.arange(len(members)), found)
        distances[found == np.arange(len(members))[:, None]] = np.inf
        best = np.argsort(distances, axis=1, kind="stable")[:, : min(count, asked - 1)]
        rows = np.repeat(np.arange(len(members)), best.shape[1])
        others = np.take_along_axis(found, best, axis=1).ravel()
        lengths = np.take_along_axis(distances, best, axis=1).ravel()
        yield from _once(members, rows, others, lengths)


def within(
    entries: Sequence[Entry], keys: Sequence[Hashable], radius: float
) -> Iterator[tuple[int, int, float]]:
    """Pairs of entries with the same key whose fingerprints are within a radius.

    Each entry that has such a partner is in at least one pair; of many copies of one structure not
    all pairs come.

    Args:
        entries: what is paired.
        keys: entries with different keys are not compared; equal keys imply equal elements.
        radius: in Å.

    Yields:
        Each pair once: two positions, the smaller one first, and their distance in Å.
    """
    for members in _groups(keys):
        vectors = np.stack([entries[member].fingerprint for member in members])
        shadows = _shadows(vectors)
        tree = cKDTree(shadows)
        open_rows, asked = np.arange(len(members)), _CANDIDATES
        while len(open_rows):
            asked = min(asked, len(members))
            near, found = tree.query(shadows[open_rows], k=asked, distance_upper_bound=radius)
            inside = np.isfinite(near) & (found != open_rows[:, None])
            rows = np.repeat(open_rows, inside.sum(axis=1))
            others = found[inside]
            lengths = _distances(vectors, rows, others[:, None])[:, 0]
            close = lengths < radius
            yield from _once(members, rows[close], others[close], lengths[close])
            # Where all candidates were too far as a whole, further ones may not be.
            settled = np.unique(rows[close])
            full = open_rows[np.isfinite(near).all(axis=1)] if asked < len(members) else rows[:0]
            open_rows = np.setdiff1d(full, settled)
            asked *= 4


def _groups(keys: Sequence[Hashable]) -> Iterator[list[int]]:
    """Positions with equal keys, two at least."""
    groups: dict[Hashable, list[int]] = {}
    for position, key in enumerate(keys):
        groups.setdefault(key, []).append(position)
    return (members for members in groups.values() if len(members) > 1)


def _shadows(vectors: np.ndarray) -> np.ndarray:
    """Vectors along the principal axes of a sample of them, ``[n, at most 8]``."""
    middle = vectors.mean(axis=0)
    sample = vectors[:: max(1, len(vectors) // _SAMPLE)][:_SAMPLE] - middle
    axes = np.linalg.svd(sample, full_matrices=False)[2][:_AXES]
    shadows: np.ndarray = (vectors - middle) @ axes.T
    return shadows.astype(np.float64)


def _distances(vectors: np.ndarray, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Whole distances from each of some rows to its others, ``[rows, k]``."""
    found = np.empty(others.shape)
    size = max(1, _CHUNK // max(1, others.shape[1] * vectors.shape[1]))
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        apart = vectors[others[part]] - vectors[rows[part], None]
        found[part] = np.sqrt(np.einsum("rkd,rkd->rk", apart, apart))
    return found


def _once(
    members: Sequence[int], rows: np.ndarray, others: np.ndarray, lengths: np.ndarray
) -> Iterator[tuple[int, int, float]]:
    """Pairs that may come from both ends, each once."""
    pairs: dict[tuple[int, int], float] = {}
    for own, other, length in zip(rows.tolist(), others.tolist(), lengths.tolist(), strict=True):
        one, two = sorted((members[own], members[other]))
        pairs[one, two] = length
    yield from ((one, two, length) for (one, two), length in pairs.items())
