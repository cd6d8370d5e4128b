"""Inspected data as arrays for all checks, and the findings of a check."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from ase.data import covalent_radii

from pet_finetune.data.neighbors import expected_neighbors, find_pairs
from pet_finetune.data.structure import Structure, list_frames
from pet_finetune.errors import DataError
from pet_finetune.keys import forces_key, stress_key

Severity = Literal["error", "warning", "note"]

#: From the one that stops a run to the one that is only worth knowing.
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Frames:
    """Frames of one file, counted from 0; none means the file as a whole."""

    file: str
    numbers: tuple[int, ...] = ()

    def __str__(self) -> str:
        """The file, and the first of the frames."""
        if not self.numbers:
            return self.file
        return f"{self.file}: {list_frames(self.numbers)}"


@dataclass(frozen=True)
class Finding:
    """A finding about the data that the user should know.

    Attributes:
        severity: ``error`` (a run would break), ``warning`` (a run would likely be a waste) or
            ``note``.
        code: a stable name, for scripts.
        what: what was found, with its numbers.
        where: files and frames.
        why: what it does to a run.
        advice: what to do.
        data: the numbers, for scripts.
    """

    severity: Severity
    code: str
    what: str
    where: tuple[Frames, ...] = ()
    why: str = ""
    advice: str = ""
    data: dict[str, Any] | None = None

    @property
    def place(self) -> str:
        """Place as text."""
        return "; ".join(map(str, self.where))

    @property
    def text(self) -> str:
        """All of it as one paragraph, for a log or an error."""
        place = f" ({self.place})" if self.where else ""
        more = " ".join(part for part in (self.why, self.advice) if part)
        return f"{self.code}: {self.what}{place}{f'. {more}' if more else ''}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "severity": self.severity,
            "code": self.code,
            "what": self.what,
            "where": [{"file": f.file, "frames": list(f.numbers)} for f in self.where],
            "why": self.why,
            "advice": self.advice,
            "data": self.data or {},
        }


def frames_of(structures: Iterable[Structure]) -> tuple[Frames, ...]:
    """The places of structures, by file."""
    numbers: dict[str, list[int]] = {}
    for structure in structures:
        numbers.setdefault(structure.source, []).append(structure.index)
    return tuple(Frames(file, tuple(sorted(set(own)))) for file, own in numbers.items())


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """Errors, then warnings, then notes; otherwise in their order."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


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
        energy, forces, stress: None where missing; forces on fixed atoms are zero.
        fixed: atoms whose forces were set to zero by constraints.
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
    fixed: int
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
        """Source file."""
        return self.structure.source

    @cached_property
    def volume(self) -> float:
        """Volume of the cell, Å³; 0 if not periodic in all directions."""
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
    """Data set under inspection.

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
        """Frames of all sets."""
        return tuple(frame for frames in self.sets.values() for frame in frames)

    @cached_property
    def files(self) -> dict[str, list[InspectedFrame]]:
        """Frames by the file they come from."""
        found: dict[str, list[InspectedFrame]] = {}
        for frame in self.frames:
            found.setdefault(frame.file, []).append(frame)
        return found

    def without(self, files: Collection[str]) -> InspectedDataset:
        """The set without structures from some files."""
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
        forces=None if forces is None else forces.nan_to_num().numpy(),
        fixed=0 if forces is None else int(forces.isnan().any(dim=1).sum()),
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

    Of ``values``, eV an atom, or else of the labels.

    Returns:
        The elements, their energies in eV, and what is left over for each frame, eV an atom.
    """
    elements = sorted({int(z) for e in frames for z in e.elements[0]})
    fractions = compositions(frames, elements)
    if values is None:
        values = [(e.energy or 0.0) / e.size for e in frames]
    weights, *_ = np.linalg.lstsq(fractions, np.asarray(values), rcond=1e-8)
    return elements, weights, values - fractions @ weights
