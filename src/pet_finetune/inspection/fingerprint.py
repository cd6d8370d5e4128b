"""A short vector for each structure that no rotation, translation or renumbering changes.

For each element and each k up to :data:`~.subject.NEAR`, the distances of its atoms to their k-th
neighbour are sorted and read off at a fixed number of quantiles; the edge of the cube that an atom
has for itself stands beside them. Two structures that differ by small displacements differ in it
by about as many Å.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

import numpy as np
from scipy.spatial import cKDTree

from .subject import Entry

__all__ = ["composition", "fingerprint", "neighbours"]

_QUANTILES = 8


def composition(entry: Entry) -> tuple[tuple[int, int], ...]:
    """The reduced formula: elements and their counts without a common factor."""
    elements, counts = np.unique(entry.numbers, return_counts=True)
    counts = counts // np.gcd.reduce(counts)
    return tuple(zip(elements.tolist(), counts.tolist(), strict=True))


def fingerprint(entry: Entry) -> np.ndarray:
    """The vector, scaled such that distances are root mean squares in Å; its length depends on
    the number of elements only.
    """
    parts = []
    for element in np.unique(entry.numbers):
        distances = np.sort(entry.shells[entry.numbers == element], axis=0)
        at = np.linspace(0.0, len(distances) - 1.0, _QUANTILES)
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, len(distances) - 1)
        part = (at - low)[:, None]
        parts.append(((1.0 - part) * distances[low] + part * distances[high]).ravel())
    vector = np.concatenate(parts)
    edge = np.cbrt(entry.volume / entry.size)
    return np.append(vector / np.sqrt(len(vector)), edge)


def neighbours(
    entries: Sequence[Entry], keys: Sequence[Hashable], count: int
) -> Iterator[tuple[int, int, float]]:
    """Pairs of entries with the same key whose fingerprints are near.

    Args:
        entries: what is paired.
        keys: entries with different keys are not compared; equal keys imply equal elements.
        count: how many neighbours of each entry are asked for.

    Yields:
        Each pair once: two positions, the smaller one first, and their distance in Å.
    """
    groups: dict[Hashable, list[int]] = {}
    for position, key in enumerate(keys):
        groups.setdefault(key, []).append(position)
    for members in groups.values():
        if len(members) < 2:
            continue
        vectors = np.array([fingerprint(entries[member]) for member in members])
        asked = min(count + 1, len(members))
        distances, found = cKDTree(vectors).query(vectors, k=asked)
        pairs: dict[tuple[int, int], float] = {}
        for own, (row, others) in enumerate(zip(distances, found, strict=True)):
            for distance, other in zip(row.tolist(), others.tolist(), strict=True):
                if other != own:
                    one, two = sorted((members[own], members[other]))
                    pairs[one, two] = distance
        yield from ((one, two, distance) for (one, two), distance in pairs.items())
