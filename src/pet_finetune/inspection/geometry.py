"""Checks of the structures themselves: what is too close, alone, or of mixed periodicity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from pet_finetune.data.neighbors import find_pairs
from pet_finetune.units import to_own_unit

from .finding import Finding, Frames, frames_of
from .subject import REACH, Entry, Subject

__all__ = [
    "check_distances",
    "check_extent",
    "check_lengths",
    "check_loneliness",
    "check_periodicity",
]

#: Å. Two atoms at one place have no direction between them; no bond is shorter than 0.74 Å.
_SAME_PLACE, _CLOSE = 1e-3, 0.6
#: The shortest distance over the sum of the covalent radii. Below, a bond is compressed as it is
#: in very hot or shocked matter.
_COMPRESSED = 0.8

#: Bounds on the median of nearest distances over sums of covalent radii. 31 sets of molecules,
#: liquids and solids, some at 30 GPa, lie between 0.78 and 1.04.
_SHORT, _LONG = 0.62, 1.35
_USUAL = (0.7, 1.15)
_NOBLE = (2, 10, 18, 36, 54, 86)


def check_lengths(subject: Subject) -> Iterator[Finding]:
    """Positions in Bohr or nm, by the nearest distances beside the covalent radii (ASE's table)."""
    for file, entries in subject.files.items():
        gaps = [e.gaps[~np.isin(e.numbers, _NOBLE)] for e in entries if e.size > 1]
        found = np.concatenate([*gaps, np.zeros(0)])
        found = found[np.isfinite(found)]
        if len(found) < 4:
            continue
        middle = float(np.median(found))
        if _SHORT <= middle <= _LONG:
            continue
        bohr = to_own_unit("length", "bohr")
        low, high = _USUAL
        fits = [u for u, factor in (("bohr", bohr), ("nm", 10.0)) if low < middle * factor < high]
        looks = f", as for positions in {fits[0]} that are taken to be in Angstrom" if fits else ""
        if fits:
            advice = f"If so, set systems.length_unit: {fits[0]}."
        elif low < middle / bohr < high:
            advice = "They may be in Angstrom already: look at systems.length_unit."
        else:
            advice = "Look at the unit of the positions, and at systems.length_unit."
        yield Finding(
            "warning",
            "length-unit",
            f"the nearest neighbours are {middle:.2f} times as far apart as their covalent radii "
            f"add up to (median; 0.75 to 1.1 is usual){looks}.",
            (Frames(file),),
            "The model would learn the labels of another chemistry.",
            advice,
            {"ratio": middle, "unit": fits[0] if fits else None},
        )


def check_extent(subject: Subject) -> Iterator[Finding]:
    """Structures that no neighbours can be found in: atoms far away, absurd cells or densities."""
    if subject.broken:
        yield Finding(
            "error",
            "impossible-structure",
            f"{_count(subject.broken)} cannot be computed; {subject.broken[0][1]}",
            frames_of(structure for structure, _ in subject.broken),
            "No neighbours can be found in them.",
            "Remove these frames, or mend what is wrong with them.",
            {"reasons": {structure.where: why for structure, why in subject.broken}},
        )


def check_distances(subject: Subject) -> Iterator[Finding]:
    """Atoms on top of each other, too close for any bond, or strongly compressed."""
    shortest = [(float(e.nearest.min()), e) for e in subject.entries if e.size]
    same = [e for d, e in shortest if d < _SAME_PLACE]
    close = [(d, e) for d, e in shortest if _SAME_PLACE <= d < _CLOSE]
    if same:
        yield Finding(
            "error",
            "same-place",
            f"two atoms are at the same place in {_count(same)}",
            frames_of(e.structure for e in same),
            "A pair without a direction makes forces that are no numbers.",
            "Remove these frames, or the atom that is there twice (often one at the border of the "
            "cell).",
            {"count": len(same)},
        )
    if close:
        least = min(d for d, _ in close)
        yield Finding(
            "warning",
            "close-atoms",
            f"atoms are closer than {_CLOSE} A in {_count(close)}, down to {least:.2f} A",
            frames_of(e.structure for _, e in close),
            "No bond is so short: a broken structure, or a wrong unit of length. Its large forces "
            "rule the loss.",
            "Look at them, and remove them unless such collisions are what the model is for.",
            {"count": len(close), "shortest": least},
        )
    light = [
        (float(e.gaps[e.numbers == 1].min()), e)
        for e in subject.entries
        if (e.numbers == 1).any() and float(e.nearest.min()) >= _CLOSE
    ]
    pressed = [(gap, e) for gap, e in light if gap < _COMPRESSED]
    if pressed:
        least = min(gap for gap, _ in pressed)
        yield Finding(
            "note",
            "compressed-bonds",
            f"bonds of hydrogen are compressed to less than {_COMPRESSED:.0%} of their usual "
            f"length in {_count(pressed)}, down to {least:.0%}",
            frames_of(e.structure for _, e in pressed),
            "Frames of very hot or dense matter: their large forces weigh much in a squared error.",
            "Keep them if the model shall know such conditions; else a huber loss, or leaving them "
            "out, serves the rest better.",
            {"count": len(pressed), "ratio": least},
        )


def check_loneliness(subject: Subject, cutoff: float | None) -> Iterator[Finding]:
    """Atoms without a neighbour, which a model of finite reach knows by their baseline only."""
    reach = cutoff or REACH
    near = min(reach, REACH)
    alone = {id(e): _alone(e, reach) for e in subject.entries if float(e.nearest.max()) > near}
    single = [e for e in subject.entries if e.size == 1 and alone.get(id(e))]
    lonely = [e for e in subject.entries if e.size > 1 and alone.get(id(e))]
    if single:
        yield Finding(
            "note",
            "isolated-atoms",
            f"{_count(single)} {'holds' if len(single) == 1 else 'hold'} a single atom without "
            "neighbours",
            frames_of(e.structure for e in single),
            "Their energies are those of free atoms, which say what a bond is worth, but not what "
            "the baselines of the elements should be.",
            "Leave them out unless the model shall describe dissociation.",
            {"count": len(single)},
        )
    if lonely:
        atoms = sum(alone[id(e)] for e in lonely)
        known = "the model's cutoff" if cutoff else "no model is known yet"
        yield Finding(
            "warning" if cutoff else "note",
            "lonely-atoms",
            f"{atoms} atom{'s have' if atoms > 1 else ' has'} no neighbour within {reach:g} A "
            f"({known}), in {_count(lonely)}",
            frames_of(e.structure for e in lonely),
            "The model sees nothing around them and predicts no force on them.",
            "Often a wrong cell, missing periodicity or a wrong unit of length; frames in which "
            "something has dissociated are better left out.",
            {"count": len(lonely), "atoms": atoms},
        )


def _alone(entry: Entry, reach: float) -> int:
    """How many atoms have no neighbour within reach, which may be further than was looked."""
    if reach <= REACH:
        return int((entry.nearest > reach).sum())
    where = entry.structure.where
    (first,) = find_pairs(
        entry.positions, entry.cell, entry.pbc, reach, "i", full=True, where=where
    )
    return entry.size - len(np.unique(first))


def check_periodicity(subject: Subject) -> Iterator[Finding]:
    """Files in which some frames are periodic and others are not."""
    for file, entries in subject.files.items():
        kinds: dict[str, list[Entry]] = {}
        for entry in entries:
            kinds.setdefault("".join("FT"[int(axis)] for axis in entry.pbc), []).append(entry)
        if len(kinds) < 2:
            continue
        parts = ", ".join(f"{len(own)} with pbc {' '.join(kind)}" for kind, own in kinds.items())
        rare = min(kinds.values(), key=len)
        yield Finding(
            "note",
            "mixed-periodicity",
            f"periodicity differs within {file}: {parts}",
            frames_of(e.structure for e in rare),
            "Where it is missing by mistake, atoms at the border lack neighbours.",
            "Fine where molecules and crystals are meant; else set pbc in the file.",
            {kind: len(own) for kind, own in kinds.items()},
        )


def _count(items: Sequence[object]) -> str:
    return f"{len(items)} frame{'s' if len(items) != 1 else ''}"
