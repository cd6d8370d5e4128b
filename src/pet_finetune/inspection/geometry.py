"""Checks of the structures themselves: too close, alone, of mixed periodicity, charged, twice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.spatial.distance import pdist

from pet_finetune.data.calculator_input import MISSING_CELL, misses_a_cell
from pet_finetune.data.frame_files import read_frames
from pet_finetune.data.neighbors import find_pairs
from pet_finetune.errors import DataError
from pet_finetune.units import to_own_unit

from .inspected import (
    NOBLE,
    REACH,
    Finding,
    Frames,
    InspectedDataset,
    InspectedFrame,
    composition,
    frames_of,
    rms,
)
from .near_frames import within

#: Å between fingerprints: the same frame up to the rounding of files, and a copy that was
#: displaced so little that it tells nothing new. MD frames 1 fs apart differ by about 0.01.
_SAME, _NEAR = 1e-4, 0.01

#: eV an atom, and eV/Å of the root mean square force: same frames, different labels.
_ENERGY, _FORCE = 2e-3, 0.02


@dataclass(frozen=True)
class Twins:
    """Two nearly equal frames and their distance, Å."""

    one: InspectedFrame
    two: InspectedFrame
    distance: float


def find_twins(frames: Sequence[InspectedFrame]) -> list[Twins]:
    """Pairs of nearly equal structures, whatever their rotation and numbering.

    Structures with an atom that nothing is near are left out: what is beyond reach of the
    fingerprint may differ.
    """
    whole = [e for e in frames if e.size > 1 and float(e.nearest.max()) < REACH]
    keys = [(composition(e), e.size, bool(e.pbc.any())) for e in whole]
    near = (Twins(whole[i], whole[j], d) for i, j, d in within(whole, keys, _NEAR))
    return [pair for pair in near if _same_far(pair)]


def _same_far(pair: Twins) -> bool:
    """Whether molecules agree in all their distances, not only in those that are near."""
    one, two = pair.one, pair.two
    if one.pbc.any() or one.size > 300:
        return True
    near, far = np.sort(pdist(one.positions)), np.sort(pdist(two.positions))
    return rms(near - far) < max(_NEAR, 3.0 * pair.distance)


def check_duplicates(dataset: InspectedDataset) -> Iterator[Finding]:
    """Copies within the sets, leaks between them, and copies with other labels."""
    found = find_twins(dataset.frames)
    yield from _leaks(dataset, [t for t in found if t.one.set != t.two.set])
    own = [t for t in found if t.one.set == t.two.set and t.distance < _SAME]
    again = list({id(t.two): t.two for t in own}.values())
    if again:
        part = len(again) / len(dataset.frames)
        yield Finding(
            "warning" if part > 0.02 and len(again) > 2 else "note",
            "duplicates",
            f"{len(again)} frames ({part:.1%}) repeat another one of their set, up to rotation and "
            "numbering of atoms",
            frames_of(e.structure for e in again),
            "They count twice, and copies are on both sides if sets are drawn by fraction.",
            "Remove the copies, or draw the sets yourself.",
            {"count": len(again)},
        )
    yield from _contradictions([t for t in found if t.distance < _SAME])


def _leaks(dataset: InspectedDataset, across: Sequence[Twins]) -> Iterator[Finding]:
    """Frames of the held-out sets that are also trained on."""
    order = list(dataset.sets)
    for later in order[1:]:
        found: dict[int, tuple[InspectedFrame, str, float]] = {}
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
        part = len(found) / len(dataset.sets[later])
        yield Finding(
            "warning",
            "leak",
            f"{len(found)} of {len(dataset.sets[later])} {later} frames ({part:.1%}) are in the "
            f"{others} set too ({exact} exactly, {len(found) - exact} within {_NEAR} A)",
            frames_of(frame.structure for frame, *_ in found.values()),
            "Errors on training frames look too small, and the best model is chosen by them.",
            "Remove them from one of the sets; use separate parts of a trajectory for each set.",
            {"set": later, "count": len(found), "exact": exact},
        )


def _contradictions(same: Sequence[Twins]) -> Iterator[Finding]:
    """Equal structures whose energies or forces differ."""
    found: list[InspectedFrame] = []
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
            force = rms(lengths[0] - lengths[1])
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
            "No model can predict both; the difference remains as an error.",
            "Other settings, charge or spin, or a calculation in another state: keep one of them.",
            {"count": len({id(e) for e in found}), "energy": largest},
        )


#: Å. Two atoms at one place have no direction between them; no bond is shorter than 0.74 Å.
_SAME_PLACE, _CLOSE = 1e-3, 0.6

#: The shortest distance over the sum of the covalent radii. Below, a bond is compressed as it is
#: in very hot or shocked matter.
_COMPRESSED = 0.8

#: Bounds on the median of nearest distances over sums of covalent radii. 31 sets of molecules,
#: liquids and solids, some at 30 GPa, lie between 0.78 and 1.04.
_SHORT, _LONG = 0.62, 1.35

_USUAL = (0.7, 1.15)


def check_lengths(dataset: InspectedDataset) -> Iterator[Finding]:
    """Positions in Bohr or nm, from nearest distances and covalent radii (ASE's table)."""
    for file, frames in dataset.files.items():
        gaps = [e.gaps[~np.isin(e.numbers, NOBLE)] for e in frames if e.size > 1]
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


def check_extent(dataset: InspectedDataset) -> Iterator[Finding]:
    """Structures that no neighbours can be found in: atoms far away, absurd cells or densities."""
    if dataset.broken:
        yield Finding(
            "error",
            "impossible-structure",
            f"{_count(dataset.broken)} cannot be computed; {dataset.broken[0][1]}",
            frames_of(structure for structure, _ in dataset.broken),
            "No neighbours can be found in them.",
            "Remove or correct these frames.",
            {"reasons": {structure.where: why for structure, why in dataset.broken}},
        )


def check_distances(dataset: InspectedDataset) -> Iterator[Finding]:
    """Atoms on top of each other, too close for any bond, or strongly compressed."""
    shortest = [(float(e.nearest.min()), e) for e in dataset.frames if e.size]
    same = [e for d, e in shortest if d < _SAME_PLACE]
    close = [(d, e) for d, e in shortest if _SAME_PLACE <= d < _CLOSE]
    if same:
        yield Finding(
            "error",
            "same-place",
            f"two atoms are at the same place in {_count(same)}",
            frames_of(e.structure for e in same),
            "A pair without a direction gives forces that are not finite.",
            "Remove these frames, or the duplicate atom (often one at the border of the cell).",
            {"count": len(same)},
        )
    if close:
        least = min(d for d, _ in close)
        yield Finding(
            "warning",
            "close-atoms",
            f"atoms are closer than {_CLOSE} A in {_count(close)}, down to {least:.2f} A",
            frames_of(e.structure for _, e in close),
            "No bond is so short: a broken structure, or a wrong unit of length. Its large "
            "forces dominate the loss.",
            "Look at them, and remove them unless the model must describe such collisions.",
            {"count": len(close), "shortest": least},
        )
    light = [
        (float(e.gaps[e.numbers == 1].min()), e)
        for e in dataset.frames
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
            "Frames of very hot or dense matter: their large forces dominate a squared error.",
            "Keep them if the model must describe such conditions; otherwise leave them out or "
            "use a huber loss.",
            {"count": len(pressed), "ratio": least},
        )


def check_loneliness(dataset: InspectedDataset, cutoff: float | None) -> Iterator[Finding]:
    """Find atoms without a neighbour, whose energy in the model is only their baseline."""
    reach = cutoff or REACH
    near = min(reach, REACH)
    alone = {id(e): _alone(e, reach) for e in dataset.frames if float(e.nearest.max()) > near}
    single = [e for e in dataset.frames if e.size == 1 and alone.get(id(e))]
    lonely = [e for e in dataset.frames if e.size > 1 and alone.get(id(e))]
    if single:
        yield Finding(
            "note",
            "isolated-atoms",
            f"{_count(single)} {'holds' if len(single) == 1 else 'hold'} a single atom without "
            "neighbours",
            frames_of(e.structure for e in single),
            "Their energies are those of free atoms: they determine binding energies, but not "
            "the best baselines of the elements.",
            "Leave them out unless the model must describe dissociation.",
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
            "The model sees no neighbours of these atoms and predicts no force on them.",
            "Often a wrong cell, missing periodicity or a wrong unit of length; leave out "
            "frames in which something has dissociated.",
            {"count": len(lonely), "atoms": atoms},
        )


def _alone(frame: InspectedFrame, reach: float) -> int:
    """Number of atoms without a neighbour within the cutoff."""
    if reach <= REACH:
        return int((frame.nearest > reach).sum())
    where = frame.structure.where
    (first,) = find_pairs(
        frame.positions, frame.cell, frame.pbc, reach, "i", full=True, where=where
    )
    return frame.size - len(np.unique(first))


def check_periodicity(dataset: InspectedDataset) -> Iterator[Finding]:
    """Files in which some frames are periodic and others are not."""
    for file, frames in dataset.files.items():
        kinds: dict[str, list[InspectedFrame]] = {}
        for frame in frames:
            kinds.setdefault("".join("FT"[int(axis)] for axis in frame.pbc), []).append(frame)
        if len(kinds) < 2:
            continue
        parts = ", ".join(f"{len(own)} with pbc {' '.join(kind)}" for kind, own in kinds.items())
        rare = min(kinds.values(), key=len)
        yield Finding(
            "note",
            "mixed-periodicity",
            f"periodicity differs within {file}: {parts}",
            frames_of(e.structure for e in rare),
            "If it is missing by mistake, atoms at the border lack neighbours.",
            "Correct for molecules and crystals; otherwise set pbc in the file.",
            {kind: len(own) for kind, own in kinds.items()},
        )


def _count(items: Sequence[object]) -> str:
    return f"{len(items)} frame{'s' if len(items) != 1 else ''}"


def check_charges_used(dataset: InspectedDataset, conditioned: bool) -> Iterator[Finding]:
    """Charges and spins in the file that the model does not use."""
    if conditioned:
        return
    charged = [e for e in dataset.frames if e.structure.charge != 0]
    spins = {e.structure.spin for e in dataset.frames}
    if charged:
        kinds = sorted({e.structure.charge for e in dataset.frames})
        several = len(kinds) > 1
        yield Finding(
            "warning" if several else "note",
            "unused-charge",
            f"{len(charged)} frames are charged (total charges {', '.join(map(str, kinds))}), and "
            "the model is not told",
            frames_of(e.structure for e in charged),
            "Structures of different charge look the same to the model, although their energies"
            " and forces differ."
            if several
            else "The model learns this charge only.",
            "Use one charge per model, or a model with system_conditioning.",
            {"charges": kinds},
        )
    if len(spins) > 1:
        yield Finding(
            "note",
            "unused-spin",
            f"the frames have several spin multiplicities ({', '.join(map(str, sorted(spins)))}), "
            "and the model does not use this",
            (),
            "If a structure occurs with several of them, the model learns an average.",
            "Nothing, if each structure is in its ground state; otherwise use a model with "
            "system_conditioning.",
            {"spins": sorted(spins)},
        )


def check_cells(
    path: str | Path, format: str = "", types: Mapping[int, str] | None = None
) -> Iterator[Finding]:
    """Cells that are there but not used, in the first frames of a file."""
    try:
        frames = read_frames(path, format, types)[:100]
    except DataError:
        return  # reading the labels reports the problem
    odd = [
        k for k, atoms in enumerate(frames) if abs(atoms.cell.volume) > 1e-6 and not atoms.pbc.any()
    ]
    if odd:
        yield Finding(
            "warning",
            "cell-without-pbc",
            f"{len(odd)} of the first {len(frames)} frames have a cell, but pbc is False",
            (Frames(str(path), tuple(odd)),),
            "They are computed as molecules: atoms at the border of the cell lack neighbours, and "
            "a stress is not used.",
            'Write pbc="T T T" into the file if they are periodic; else remove the cell.',
            {"count": len(odd)},
        )
    count = misses_a_cell(frames[0]) if frames else 0
    if count:
        yield Finding(
            "warning",
            "cell-missing",
            f"{count} {MISSING_CELL}",
            (Frames(str(path), (0,)),),
            "A droplet in vacuum is another system than a liquid or crystal.",
            'Write Lattice="ax ay az bx by bz cx cy cz" into the comments if they are periodic.',
            {"molecules": count},
        )
