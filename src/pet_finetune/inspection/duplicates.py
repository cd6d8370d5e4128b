"""Frames that occur twice: within a set, across sets, and with labels that contradict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial.distance import pdist

from .finding import Finding, frames_of
from .fingerprint import composition, within
from .subject import REACH, Entry, Subject

__all__ = ["Twins", "check_duplicates", "find_twins"]

#: Å between fingerprints: the same frame up to the rounding of files, and a copy that was
#: displaced so little that it tells nothing new. MD frames 1 fs apart differ by about 0.01.
_SAME, _NEAR = 1e-4, 0.01
#: eV an atom, and eV/Å of the root mean square force: same frames, different labels.
_ENERGY, _FORCE = 2e-3, 0.02


@dataclass(frozen=True)
class Twins:
    """Two frames that are all but one, and how far they are apart, Å."""

    one: Entry
    two: Entry
    distance: float


def find_twins(entries: Sequence[Entry]) -> list[Twins]:
    """Pairs of nearly equal structures, whatever their rotation and numbering.

    Structures with an atom that nothing is near are left out: what is beyond reach of the
    fingerprint may differ.
    """
    whole = [e for e in entries if e.size > 1 and float(e.nearest.max()) < REACH]
    keys = [(composition(e), e.size, bool(e.pbc.any())) for e in whole]
    near = (Twins(whole[i], whole[j], d) for i, j, d in within(whole, keys, _NEAR))
    return [pair for pair in near if _same_far(pair)]


def _same_far(pair: Twins) -> bool:
    """Whether molecules agree in all their distances, not only in those that are near."""
    one, two = pair.one, pair.two
    if one.pbc.any() or one.size > 300:
        return True
    near, far = np.sort(pdist(one.positions)), np.sort(pdist(two.positions))
    return bool(np.sqrt(((near - far) ** 2).mean()) < max(_NEAR, 3.0 * pair.distance))


def check_duplicates(subject: Subject) -> Iterator[Finding]:
    """Copies within the sets, leaks between them, and copies with other labels."""
    found = find_twins(subject.entries)
    yield from _leaks(subject, [t for t in found if t.one.set != t.two.set])
    own = [t for t in found if t.one.set == t.two.set and t.distance < _SAME]
    again = list({id(t.two): t.two for t in own}.values())
    if again:
        part = len(again) / len(subject.entries)
        yield Finding(
            "warning" if part > 0.02 and len(again) > 2 else "note",
            "duplicates",
            f"{len(again)} frames ({part:.1%}) repeat another one of their set, up to rotation and "
            "numbering of atoms",
            frames_of(e.structure for e in again),
            "They count twice; and where sets are drawn by fraction, copies end up on both sides.",
            "Remove the copies, or draw the sets yourself.",
            {"count": len(again)},
        )
    yield from _contradictions([t for t in found if t.distance < _SAME])


def _leaks(subject: Subject, across: Sequence[Twins]) -> Iterator[Finding]:
    """Frames of the held-out sets that are also trained on."""
    order = list(subject.sets)
    for later in order[1:]:
        found: dict[int, tuple[Entry, str, float]] = {}
        for twins in across:
            pair = {twins.one.set: twins.one, twins.two.set: twins.two}
            if later in pair:
                (other,) = set(pair) - {later}
                if order.index(other) < order.index(later):
                    known = found.get(id(pair[later]))
                    if known is None or twins.distance < known[2]:
                        found[id(pair[later])] = (pair[later], other, twins.distance)
        if not found:
            continue
        exact = sum(distance < _SAME for *_, distance in found.values())
        others = ", ".join(dict.fromkeys(other for _, other, _ in found.values()))
        part = len(found) / len(subject.sets[later])
        yield Finding(
            "warning",
            "leak",
            f"{len(found)} of {len(subject.sets[later])} {later} frames ({part:.1%}) are in the "
            f"{others} set too ({exact} exactly, {len(found) - exact} within {_NEAR} A)",
            frames_of(entry.structure for entry, *_ in found.values()),
            "Errors on frames that were trained on look too small, and the best model is picked by "
            "them.",
            "Remove them from one of the sets; of a trajectory, cut whole pieces for each set.",
            {"set": later, "count": len(found), "exact": exact},
        )


def _contradictions(same: Sequence[Twins]) -> Iterator[Finding]:
    """Equal structures whose energies or forces differ."""
    found: list[Entry] = []
    largest = 0.0
    for twins in same:
        one, two = twins.one, twins.two
        if one.energy is None or two.energy is None:
            continue
        energy = abs(one.energy - two.energy) / one.size
        force = 0.0
        # Of crystals only the near shells are known to be equal: far ones change forces a little.
        if one.forces is not None and two.forces is not None and not one.pbc.any():
            lengths = [np.sort(np.linalg.norm(f, axis=1)) for f in (one.forces, two.forces)]
            force = float(np.sqrt(((lengths[0] - lengths[1]) ** 2).mean()))
        if energy > _ENERGY or force > _FORCE:
            found += [one, two]
            largest = max(largest, energy)
    if found:
        yield Finding(
            "warning",
            "contradictory-labels",
            f"{len({id(e) for e in found})} frames are copies of each other with different labels, "
            f"by up to {largest * 1e3:.3g} meV an atom",
            frames_of(e.structure for e in found),
            "No model can give both: the difference stays as error.",
            "Other settings, charge or spin, or a calculation in another state: keep one of them.",
            {"count": len({id(e) for e in found}), "energy": largest},
        )
