"""What is in the data, in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pet_finetune.elements import symbol_of

from .energies import element_fit, references_of
from .subject import Entry, Subject

__all__ = ["Facts", "Range", "SetFacts", "facts_of"]

_KINDS = {0: "molecules", 1: "periodic in 1 direction", 2: "slabs", 3: "bulk"}


@dataclass(frozen=True)
class Range:
    """A distribution: its ends, its middle, and how far it spreads."""

    low: float
    median: float
    high: float
    std: float

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> Range | None:
        """Of at least one value, else None."""
        array = np.asarray(values, dtype=float)
        if not array.size:
            return None
        low, median, high = np.quantile(array, [0.0, 0.5, 1.0])
        return cls(float(low), float(median), float(high), float(array.std()))


@dataclass(frozen=True)
class SetFacts:
    """One set.

    Attributes:
        structures, atoms: numbers of them.
        elements: symbol: structures that hold it, atoms of it.
        compositions: how many different ones.
        sizes: atoms in a structure.
        periodicity: kind: structures.
        nearest: shortest distance in each structure, Å.
        energy: eV an atom, as labelled.
        spread: standard deviation of the energy left over by a sum over elements, eV an atom.
        references: what the energies are relative to, in words.
        forces: frames that have them; components, eV/Å.
        force: longest force of each frame, eV/Å.
        force_rms: of all components, eV/Å.
        stress: frames that have one.
        stress_rms: of all components, eV/Å³.
    """

    structures: int
    atoms: int
    elements: dict[str, tuple[int, int]]
    compositions: int
    sizes: Range
    periodicity: dict[str, int]
    nearest: Range | None
    energies: int
    energy: Range | None
    spread: float | None
    references: str
    forces: int
    force: Range | None
    force_rms: float | None
    stress: int
    stress_rms: float | None


@dataclass(frozen=True)
class Facts:
    """All sets by name, and the files they come from with their numbers of structures."""

    sets: dict[str, SetFacts]
    files: dict[str, int]
    skipped: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def facts_of(subject: Subject) -> Facts:
    """Count and measure."""
    files = {file: len(entries) for file, entries in subject.files.items()}
    sets = {name: _set_facts(entries) for name, entries in subject.sets.items()}
    return Facts(sets, files, subject.skipped)


def _set_facts(entries: Sequence[Entry]) -> SetFacts:
    structures: Counter[int] = Counter()
    atoms: Counter[int] = Counter()
    for entry in entries:
        numbers, counts = entry.elements
        structures.update(numbers.tolist())
        atoms.update(dict(zip(numbers.tolist(), counts.tolist(), strict=True)))
    sizes = Range.of([e.size for e in entries])
    assert sizes is not None
    labelled = [e for e in entries if e.energy is not None]
    forced = [e.forces for e in entries if e.forces is not None]
    stressed = [e.stress for e in entries if e.stress is not None]
    nearest = np.array([e.nearest.min() for e in entries])
    return SetFacts(
        structures=len(entries),
        atoms=int(sum(e.size for e in entries)),
        elements={symbol_of(z): (structures[z], atoms[z]) for z in sorted(atoms)},
        compositions=len({e.formula for e in entries}),
        sizes=sizes,
        periodicity=dict(Counter(_KINDS[int(e.pbc.sum())] for e in entries)),
        nearest=Range.of(nearest[np.isfinite(nearest)]),
        energies=len(labelled),
        energy=Range.of([(e.energy or 0.0) / e.size for e in labelled]),
        spread=float(element_fit(labelled)[2].std()) if len(labelled) > 1 else None,
        references=references_of(labelled),
        forces=len(forced),
        force=Range.of([np.linalg.norm(f, axis=1).max() for f in forced]),
        force_rms=_rms(forced),
        stress=len(stressed),
        stress_rms=_rms(stressed),
    )


def _rms(arrays: Sequence[np.ndarray]) -> float | None:
    if not arrays:
        return None
    return float(np.sqrt((np.concatenate([a.ravel() for a in arrays]) ** 2).mean()))
