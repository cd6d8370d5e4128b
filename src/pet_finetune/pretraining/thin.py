"""The most different ones of many frames: farthest points."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ase import Atoms

from .explore import entry_of

__all__ = ["thinned"]


def thinned(frames: Sequence[Atoms], n: int) -> list[Atoms]:
    """At most so many of the frames, in their order.

    Among frames with the same atoms each is the one furthest from those taken before it; every
    group of such frames keeps the same part, and one frame at least.

    Args:
        frames: sane ones.
        n: how many to keep.
    """
    if len(frames) <= n:
        return list(frames)
    groups: dict[bytes, list[int]] = {}
    entries = [entry_of(atoms) for atoms in frames]
    for position, entry in enumerate(entries):
        groups.setdefault(entry.formula + bytes(entry.pbc), []).append(position)
    kept: list[int] = []
    for members in groups.values():
        share = max(1, round(len(members) * n / len(frames)))
        vectors = np.stack([entries[member].fingerprint for member in members])
        kept += [members[one] for one in farthest(vectors, share)]
    return [frames[one] for one in sorted(kept)]


def farthest(vectors: np.ndarray, count: int) -> list[int]:
    """Positions of vectors ``[n, d]``, each the farthest from those before it.

    The first is the one nearest to their mean.
    """
    chosen = [int(np.square(vectors - vectors.mean(axis=0)).sum(axis=1).argmin())]
    away = np.full(len(vectors), np.inf)
    while len(chosen) < min(count, len(vectors)):
        away = np.minimum(away, np.square(vectors - vectors[chosen[-1]]).sum(axis=1))
        away[chosen[-1]] = -np.inf
        chosen.append(int(away.argmax()))
    return chosen
