"""The most different ones of many structures: farthest points."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pet_finetune.data.structure import Structure

from .subject import Entry, subject_of

__all__ = ["most_different"]


def most_different(structures: Sequence[Structure], most: int) -> list[Structure]:
    """At most so many of the structures, in their order.

    Among structures with the same atoms each is the one furthest from those taken before it, by
    their fingerprints; every group of such structures keeps the same part, and one at least as far
    as that goes: of more groups than wanted structures, those with the most different compositions
    keep one. Sets of millions of atoms are first thinned out evenly.

    Args:
        structures: with neighbours that can be found.
        most: how many to keep.
    """
    if len(structures) <= most:
        return list(structures)
    entries = subject_of({"all": structures}, None).sets.get("all", ())
    groups: dict[bytes, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.formula + bytes(entry.pbc), []).append(entry)
    members = list(groups.values())
    if len(members) > most:
        members = [members[one] for one in _farthest(_compositions(members), most)]
    kept: set[int] = set()
    for group, share in zip(members, _shares([len(group) for group in members], most), strict=True):
        vectors = np.stack([entry.fingerprint for entry in group])
        kept |= {id(group[one].structure) for one in _farthest(vectors, share)}
    return [structure for structure in structures if id(structure) in kept]


def _compositions(groups: Sequence[Sequence[Entry]]) -> np.ndarray:
    """The part that each element has of the atoms of each group, ``[groups, elements]``."""
    counts = [np.bincount(group[0].numbers, minlength=119) for group in groups]
    return np.stack([count / count.sum() for count in counts])


def _shares(sizes: Sequence[int], most: int) -> list[int]:
    """How many of each group are kept: the same part of each, one at least, ``most`` together."""
    wanted = np.asarray(sizes) * min(1.0, most / sum(sizes))
    shares = np.maximum(1, np.floor(wanted).astype(int))
    left = min(most, sum(sizes)) - int(shares.sum())
    while left:  # what rounding left goes to those it hit most, or comes from the largest
        gap = wanted - shares
        one = int(gap.argmax()) if left > 0 else int(np.where(shares > 1, gap, np.inf).argmin())
        shares[one] += np.sign(left)
        left -= int(np.sign(left))
    return [int(share) for share in shares]


def _farthest(vectors: np.ndarray, count: int) -> list[int]:
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
