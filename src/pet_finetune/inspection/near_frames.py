"""Frames that are near each other or most different, and the work of the forces between them.

For a quadratic potential the mean of the forces of both frames times the displacement between them
is the exact difference of the energies, however far they lie apart, and the mean stress times the
strain and the volume likewise. So neighbouring frames tell whether energies, forces and stresses
belong together, whatever the level of theory is.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

from pet_finetune.data.structure import Structure

from .inspected import InspectedFrame, compositions, dataset_of

_NEIGHBOURS = 3
#: Pairs of one file, and atoms in them, that are looked at; each costs the same.
_MOST_PAIRS, _MOST_ATOMS = 4000, 1_000_000
#: Frames further apart (root mean square, Å) say nothing: the potential is not quadratic so far.
_FAR = 0.6
#: The same for the largest strain.
_STRAINED = 0.1


@dataclass(frozen=True)
class FrameStep:
    """From one frame to a neighbouring one.

    Attributes:
        one, two: positions of the frames among the frames.
        atoms: in each of them.
        energy: difference of the energies, eV.
        work: what the forces say it is, by the displacement at constant cell, eV.
        bend: by how much both ends of that differ, eV: large where the forces turn on the way.
        pressing: what the stress says of the change of the cell, eV; NaN without a stress.
        displacement: root mean square over the atoms, Å.
        strain: largest component.
        swelling: difference of the logarithms of the volumes.
        pressure: difference of a third of the stress's trace, eV/Å³; NaN without a stress.
    """

    one: int
    two: int
    atoms: int
    energy: float
    work: float
    bend: float
    pressing: float
    displacement: float
    strain: float
    swelling: float
    pressure: float


def near_pairs(frames: Sequence[InspectedFrame]) -> list[tuple[int, int]]:
    """Positions of frames that hold the same atoms in the same order and are near each other.

    Those without energies and forces are passed over.
    """
    usable = [
        k
        for k, e in enumerate(frames)
        if e.energy is not None and e.forces is not None and e.size > 1
        if e.pbc.all() or not e.pbc.any()
    ]
    chosen = [frames[k] for k in usable]
    keys = [(frame.numbers.tobytes(), bool(frame.pbc.all())) for frame in chosen]
    found = sorted(neighbours(chosen, keys, _NEIGHBOURS), key=lambda pair: pair[2])
    pairs: list[tuple[int, int]] = []
    atoms = 0
    for one, two, _ in found[:_MOST_PAIRS]:
        pairs.append((usable[one], usable[two]))
        atoms += chosen[one].size
        if atoms > _MOST_ATOMS:
            break
    return pairs


def steps(frames: Sequence[InspectedFrame], pairs: Sequence[tuple[int, int]]) -> list[FrameStep]:
    """Steps between frames of one file, as far as they are near and still have their labels.

    The pairs, of :func:`near_pairs`, do not depend on what the labels are.
    """
    made = []
    for one, two in pairs:
        if frames[one].forces is None or frames[one].energy is None:
            continue
        step = _step(frames[one], frames[two], one, two)
        if step is not None:
            made.append(step)
    return made


def _step(one: InspectedFrame, two: InspectedFrame, first: int, second: int) -> FrameStep | None:
    """The step between two frames, None where they lie too far apart."""
    moved = _crystal(one, two) if one.pbc.all() else _molecule(one, two)
    if moved is None:
        return None
    displacement, strain, turn = moved
    length = float(np.sqrt((displacement**2).sum(axis=1).mean()))
    widest = float(np.abs(strain).max())
    if length > _FAR or widest > _STRAINED:
        return None
    here, there = _labels(one), _labels(two)
    before = -float((here[1] * displacement).sum())
    after = -float((there[1] @ turn * displacement).sum())
    pressing = swelling = 0.0
    pressure = float("nan")
    if one.pbc.all():
        swelling = float(np.log(two.volume / one.volume))
        pressing = float("nan")
    if one.stress is not None and two.stress is not None:
        turned = turn.T @ two.stress @ turn
        volume = (one.volume + two.volume) / 2
        pressing = float(((one.stress + turned) / 2 * strain).sum()) * volume
        pressure = float(np.trace(two.stress) - np.trace(one.stress)) / 3
    return FrameStep(
        one=first,
        two=second,
        atoms=one.size,
        energy=there[0] - here[0],
        work=(before + after) / 2,
        bend=abs(after - before),
        pressing=pressing,
        displacement=length,
        strain=widest,
        swelling=swelling,
        pressure=pressure,
    )


def _labels(frame: InspectedFrame) -> tuple[float, np.ndarray]:
    """Energy and forces of a frame that has both."""
    assert frame.energy is not None
    assert frame.forces is not None
    return frame.energy, frame.forces


def _molecule(
    one: InspectedFrame, two: InspectedFrame
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Displacement after the best superposition (Kabsch 1976), in the first frame's axes.

    With it no strain, and the rotation that turns rows of the second frame into those axes.
    """
    here = one.positions - one.positions.mean(axis=0)
    there = two.positions - two.positions.mean(axis=0)
    left, _, right = np.linalg.svd(there.T @ here)
    sign = np.sign(np.linalg.det(left @ right))
    turn = left @ np.diag([1.0, 1.0, sign if sign else 1.0]) @ right
    return there @ turn - here, np.zeros((3, 3)), turn


def _crystal(
    one: InspectedFrame, two: InspectedFrame
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """The step between two frames of a crystal; None if a cell is flat.

    The cell's rotation is taken out, what is left of its change is the strain, and atoms move by
    the nearest image.
    """
    if min(one.volume, two.volume) < 1e-6:
        return None
    left, _, right = np.linalg.svd(np.linalg.solve(one.cell, two.cell))
    turn = (left @ right).T
    cell = two.cell @ turn
    deformation = np.linalg.solve(one.cell, cell)
    # Symmetric after the rotation is gone; the mean takes out the rounding.
    strain = (deformation + deformation.T) / 2 - np.eye(3)
    here = np.linalg.solve(one.cell.T, one.positions.T).T
    there = np.linalg.solve(two.cell.T, two.positions.T).T
    moved = there - here
    moved -= np.round(moved)
    moved -= moved[0].copy()
    moved -= np.round(moved)
    moved -= moved.mean(axis=0)
    return moved @ (one.cell + cell) / 2, strain, turn


#: A search tree is no help in hundreds of dimensions, so it is built on this many principal axes
#: of a sample. Distances along a few axes are never longer than the whole ones.
_AXES, _SAMPLE = 8, 256
#: Candidates along these axes, of which the whole distances are taken.
_CANDIDATES = 16
#: Numbers that are held at once while distances are taken.
_CHUNK = 4_000_000


def neighbours(
    frames: Sequence[InspectedFrame], keys: Sequence[Hashable], count: int
) -> Iterator[tuple[int, int, float]]:
    """Pairs of frames with the same key whose fingerprints are near.

    Those found are near ones, not in each case the very nearest.

    Args:
        frames: what is paired.
        keys: frames with different keys are not compared; equal keys imply equal elements.
        count: how many neighbours of each frame are asked for, at most.

    Yields:
        Each pair once: two positions, the smaller one first, and their distance in Å.
    """
    for members in _groups(keys):
        vectors = np.stack([frames[member].fingerprint for member in members])
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
    frames: Sequence[InspectedFrame], keys: Sequence[Hashable], radius: float
) -> Iterator[tuple[int, int, float]]:
    """Pairs of frames with the same key whose fingerprints are within a radius.

    Each frame that has such a partner is in at least one pair; of many copies of one structure not
    all pairs come.

    Args:
        frames: what is paired.
        keys: frames with different keys are not compared; equal keys imply equal elements.
        radius: in Å.

    Yields:
        Each pair once: two positions, the smaller one first, and their distance in Å.
    """
    for members in _groups(keys):
        vectors = np.stack([frames[member].fingerprint for member in members])
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
    """Distances from some rows to all their others, ``[rows, k]``."""
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


def most_different(structures: Sequence[Structure], most: int) -> list[Structure]:
    """At most so many of the structures, in their order.

    Among structures with the same atoms each is the one furthest from those taken before it, by
    their fingerprints; every group of such structures keeps the same part, and one at least as far
    as that goes: of more groups than wanted structures, those with the most different compositions
    keep one. Sets of millions of atoms are first thinned out evenly.
    """
    if len(structures) <= most:
        return list(structures)
    frames = dataset_of({"all": structures}, None).sets.get("all", ())
    groups: dict[bytes, list[InspectedFrame]] = {}
    for frame in frames:
        groups.setdefault(frame.formula + bytes(frame.pbc), []).append(frame)
    members = list(groups.values())
    if len(members) > most:
        first = compositions([group[0] for group in members], range(119))
        members = [members[one] for one in _farthest(first, most)]
    kept: set[int] = set()
    for group, share in zip(members, _shares([len(group) for group in members], most), strict=True):
        vectors = np.stack([frame.fingerprint for frame in group])
        kept |= {id(group[one].structure) for one in _farthest(vectors, share)}
    return [structure for structure in structures if id(structure) in kept]


def _shares(sizes: Sequence[int], most: int) -> list[int]:
    """Number kept of each group: the same part, at least one, ``most`` in total."""
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
