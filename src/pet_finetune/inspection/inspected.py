"""The structures that are looked at, with what every check needs of them, as arrays."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from ase.data import covalent_radii

from pet_finetune.data.neighbors import expected_neighbors, find_pairs
from pet_finetune.data.structure import Structure
from pet_finetune.errors import DataError
from pet_finetune.keys import forces_key, stress_key

#: How far neighbours are looked for, Å, and how many of them are kept for each atom.
REACH, NEAR = 5.0, 20
#: Neighbours of an atom within reach, beyond which a structure is too dense to be matter: there
#: they are looked for less far, so that a wrong unit of length is found before memory runs out.
_MOST_NEAR, _LEAST_REACH = 600.0, 0.3
#: What tells neighbours of different elements apart: Å added for each element before theirs.
_APART = 0.4

#: Elements without bonds, whose covalent radii say nothing of where atoms meet.
NOBLE = (2, 10, 18, 36, 54, 86)
#: Larger sets are thinned out evenly to so many atoms: each check stays a matter of seconds.
_MOST_ATOMS = 500_000


@dataclass(frozen=True, eq=False)
class InspectedFrame:
    """A structure and the labels of the energy that is looked at, in eV and Å.

    Attributes:
        structure: as it was read.
        set: which of the sets it belongs to.
        numbers, positions, cell, pbc: of the structure.
        energy, forces, stress: None where missing.
        nearest: distance of each atom to the nearest other one, ``[n]``; infinite where none is
            within :data:`REACH`.
        gaps: the least distance to another atom over the sum of both covalent radii, ``[n]``.
        fingerprint: of the whole structure, see :func:`fingerprint`.
        lopsided: length of the sum of the unit vectors to all neighbours, ``[n]``: zero where
            symmetry forbids a force.
    """

    structure: Structure
    set: str
    numbers: np.ndarray
    positions: np.ndarray
    cell: np.ndarray
    pbc: np.ndarray
    energy: float | None
    forces: np.ndarray | None
    stress: np.ndarray | None
    nearest: np.ndarray
    gaps: np.ndarray
    fingerprint: np.ndarray
    lopsided: np.ndarray

    @property
    def size(self) -> int:
        """Number of atoms."""
        return len(self.numbers)

    @property
    def file(self) -> str:
        """Where it came from."""
        return self.structure.source

    @cached_property
    def volume(self) -> float:
        """Of the cell, Å³; 0 where not periodic in all directions."""
        return self.structure.volume

    @cached_property
    def elements(self) -> tuple[np.ndarray, np.ndarray]:
        """Atomic numbers that occur, ascending, and how many atoms have each."""
        counts = np.bincount(self.numbers)
        (found,) = np.nonzero(counts)
        return found, counts[found]

    @cached_property
    def formula(self) -> bytes:
        """Equal for structures with the same atoms."""
        return np.concatenate(self.elements).tobytes()


@dataclass(frozen=True, eq=False)
class InspectedDataset:
    """What is inspected.

    Attributes:
        sets: frames by set (``train``, ``validation``, ``test``), in their order.
        target: name of the energy whose labels the frames hold; None where there is none.
        skipped: structures that were left out because there are so many.
        broken: structures that no neighbours can be found in, with the reason.
    """

    sets: Mapping[str, Sequence[InspectedFrame]]
    target: str | None = None
    skipped: int = 0
    broken: Sequence[tuple[Structure, str]] = ()

    @cached_property
    def frames(self) -> tuple[InspectedFrame, ...]:
        """Of all sets."""
        return tuple(frame for frames in self.sets.values() for frame in frames)

    @cached_property
    def files(self) -> dict[str, list[InspectedFrame]]:
        """Frames by the file they come from."""
        found: dict[str, list[InspectedFrame]] = {}
        for frame in self.frames:
            found.setdefault(frame.file, []).append(frame)
        return found

    def without(self, files: Collection[str]) -> InspectedDataset:
        """The same, less what comes from some files."""
        if not files:
            return self
        sets = {
            name: tuple(frame for frame in frames if frame.file not in files)
            for name, frames in self.sets.items()
        }
        return replace(self, sets=sets)


def dataset_of(sets: Mapping[str, Sequence[Structure]], target: str | None) -> InspectedDataset:
    """Get structures ready to be looked at."""
    atoms = sum(s.num_atoms for structures in sets.values() for s in structures)
    step = max(1, -(-atoms // _MOST_ATOMS))
    kept = {name: structures[::step] for name, structures in sets.items()}
    skipped = sum(map(len, sets.values())) - sum(map(len, kept.values()))
    frames: dict[str, tuple[InspectedFrame, ...]] = {}
    broken = []
    for name, structures in kept.items():
        own = []
        for structure in structures:
            try:
                own.append(_entry(structure, name, target))
            except DataError as error:
                broken.append((structure, str(error)))
        if own:
            frames[name] = tuple(own)
    return InspectedDataset(frames, target, skipped, tuple(broken))


def _entry(structure: Structure, name: str, target: str | None) -> InspectedFrame:
    numbers, positions = structure.numbers.numpy(), structure.positions.numpy()
    cell, pbc = structure.cell.numpy(), structure.pbc.numpy()
    labels = structure.labels
    energy = labels.get(target) if target else None
    forces = labels.get(forces_key(target)) if target else None
    stress = labels.get(stress_key(target)) if target else None
    nearest, gaps, shells, lopsided = _surroundings(structure)
    return InspectedFrame(
        structure=structure,
        set=name,
        numbers=numbers,
        positions=positions,
        cell=cell,
        pbc=pbc,
        energy=None if energy is None else float(energy),
        forces=None if forces is None else forces.numpy(),
        stress=None if stress is None else stress.numpy(),
        nearest=nearest,
        gaps=gaps,
        fingerprint=fingerprint(numbers, shells, structure.volume),
        lopsided=lopsided,
    )


def _surroundings(structure: Structure) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Nearest distances, gaps, shells and lopsidedness, as in :class:`InspectedFrame`.

    Shells are ascending distances to the neighbours of each atom, each with a shift that depends on
    its element, ``[n, NEAR]``.
    """
    numbers, positions = structure.numbers.numpy(), structure.positions.numpy()
    cell, pbc = structure.cell.numpy(), structure.pbc.numpy()
    size = len(numbers)
    reach = REACH
    while reach > _LEAST_REACH and expected_neighbors(positions, cell, pbc, reach) > _MOST_NEAR:
        reach *= 0.8
    first, second, vector, distance = find_pairs(
        positions, cell, pbc, reach, "ijDd", full=True, where=structure.where
    )
    first, second = first.astype(np.int64), second.astype(np.int64)
    nearest, gaps = np.full(size, np.inf), np.full(size, np.inf)
    radii = covalent_radii[numbers]
    np.minimum.at(nearest, first, distance)
    np.minimum.at(gaps, first, distance / (radii[first] + radii[second]))
    element = (np.cumsum(np.bincount(numbers) > 0) - 1)[numbers]
    shifted = distance + _APART * element[second]
    # One sort for both: of atoms, and of the neighbours of each.
    order = np.argsort(first * (REACH * 1000.0) + shifted, kind="stable")
    shifted, owner = shifted[order], first[order]
    rank = np.arange(len(owner)) - np.searchsorted(owner, np.arange(size))[owner]
    shells = np.full((size, NEAR), REACH)
    kept = rank < NEAR
    shells[owner[kept], rank[kept]] = shifted[kept]
    units = vector / np.maximum(distance, 1e-12)[:, None]
    sums = [np.bincount(first, weights=units[:, axis], minlength=size) for axis in range(3)]
    return nearest, gaps, shells, np.sqrt(np.square(sums).sum(axis=0))


_QUANTILES = 8


def composition(frame: InspectedFrame) -> tuple[tuple[int, int], ...]:
    """The reduced formula: elements and their counts without a common factor."""
    elements, counts = frame.elements
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
    at = np.linspace(0.0, 1.0, _QUANTILES)
    own = (shells[numbers == element] for element in np.unique(numbers))
    vector = np.concatenate([np.quantile(distances, at, axis=0).ravel() for distances in own])
    edge = np.cbrt(volume / len(numbers))
    return np.append(vector / np.sqrt(len(vector)), edge).astype(np.float32)


def rms(*arrays: np.ndarray) -> float:
    """Root mean square of all numbers; 0 without any."""
    values = np.concatenate([array.ravel() for array in arrays]) if arrays else np.zeros(1)
    return float(np.sqrt((values**2).mean()))


def robust_spread(values: np.ndarray) -> float:
    """A standard deviation that outliers do not change, from the median absolute deviation."""
    return 1.4826 * float(np.median(np.abs(values - np.median(values)))) if len(values) else 0.0


def compositions(frames: Sequence[InspectedFrame], elements: Sequence[int]) -> np.ndarray:
    """Fractions of the elements in each structure, ``[n, n_elements]``."""
    return np.stack([np.bincount(e.numbers, minlength=119)[elements] / e.size for e in frames])


def element_fit(
    frames: Sequence[InspectedFrame], values: Sequence[float] | np.ndarray | None = None
) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Energies as a sum over atoms: least squares, per atom, of the smallest norm.

    Args:
        frames: the structures.
        values: eV an atom; None for the labels.

    Returns:
        The elements, their energies in eV, and what is left over for each frame, eV an atom.
    """
    elements = sorted({int(z) for e in frames for z in e.elements[0]})
    fractions = compositions(frames, elements)
    if values is None:
        values = [(e.energy or 0.0) / e.size for e in frames]
    weights, *_ = np.linalg.lstsq(fractions, np.asarray(values), rcond=1e-8)
    return elements, weights, values - fractions @ weights


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
