"""The structures that are looked at, with what every check needs of them, as arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import vesin
from ase.data import covalent_radii

from pet_finetune.data.structure import Structure
from pet_finetune.keys import forces_key, stress_key

__all__ = ["NEAR", "REACH", "Entry", "Subject", "subject_of"]

#: How far neighbours are looked for, Å, and how many of them are kept for each atom.
REACH, NEAR = 5.0, 20
#: What tells neighbours of different elements apart: Å added for each element before theirs.
_APART = 0.4

#: Larger sets are thinned out evenly to so many atoms: each check stays a matter of seconds.
_MOST_ATOMS = 500_000


@dataclass(frozen=True, eq=False)
class Entry:
    """A structure and the labels of the energy that is looked at, in eV and Å.

    Attributes:
        structure: as it was read.
        set: which of the sets it belongs to.
        numbers, positions, cell, pbc: of the structure.
        energy, forces, stress: None where missing.
        nearest: distance of each atom to the nearest other one, ``[n]``; infinite where none is
            within :data:`REACH`.
        gaps: the least distance to another atom over the sum of both covalent radii, ``[n]``.
        shells: ascending distances to the neighbours of each atom, each with a shift that depends
            on its element, ``[n, NEAR]``.
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
    shells: np.ndarray
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


@dataclass(frozen=True, eq=False)
class Subject:
    """What is inspected.

    Attributes:
        sets: entries by set (``train``, ``validation``, ``test``), in their order.
        target: name of the energy whose labels the entries hold; None where there is none.
        skipped: structures that were left out because there are so many.
    """

    sets: Mapping[str, Sequence[Entry]]
    target: str | None = None
    skipped: int = 0

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """Of all sets."""
        return tuple(entry for entries in self.sets.values() for entry in entries)

    @cached_property
    def files(self) -> dict[str, list[Entry]]:
        """Entries by the file they come from."""
        found: dict[str, list[Entry]] = {}
        for entry in self.entries:
            found.setdefault(entry.file, []).append(entry)
        return found


def subject_of(sets: Mapping[str, Sequence[Structure]], target: str | None) -> Subject:
    """Get structures ready to be looked at.

    Args:
        sets: structures by set.
        target: the energy whose labels are looked at.
    """
    atoms = sum(s.num_atoms for structures in sets.values() for s in structures)
    step = max(1, -(-atoms // _MOST_ATOMS))
    kept = {name: structures[::step] for name, structures in sets.items()}
    skipped = sum(map(len, sets.values())) - sum(map(len, kept.values()))
    entries = {
        name: tuple(_entry(structure, name, target) for structure in structures)
        for name, structures in kept.items()
        if structures
    }
    return Subject(entries, target, skipped)


def _entry(structure: Structure, name: str, target: str | None) -> Entry:
    numbers, positions = structure.numbers.numpy(), structure.positions.numpy()
    cell, pbc = structure.cell.numpy(), structure.pbc.numpy()
    labels = structure.labels
    energy = labels.get(target) if target else None
    forces = labels.get(forces_key(target)) if target else None
    stress = labels.get(stress_key(target)) if target else None
    nearest, gaps, shells, lopsided = _surroundings(numbers, positions, cell, pbc)
    return Entry(
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
        shells=shells,
        lopsided=lopsided,
    )


def _surroundings(
    numbers: np.ndarray, positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The arrays of :class:`Entry` that need a neighbour list."""
    size = len(numbers)
    first, second, vector, distance = vesin.NeighborList(cutoff=REACH, full_list=True).compute(
        points=positions, box=cell, periodic=pbc, quantities="ijDd"
    )
    first, second = first.astype(np.int64), second.astype(np.int64)
    nearest, gaps = np.full(size, np.inf), np.full(size, np.inf)
    radii = covalent_radii[numbers]
    np.minimum.at(nearest, first, distance)
    np.minimum.at(gaps, first, distance / (radii[first] + radii[second]))
    element = np.unique(numbers, return_inverse=True)[1].reshape(-1)
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
