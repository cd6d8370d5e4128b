"""The work that forces and stress do between two frames, beside the difference of their energies.

For a quadratic potential the mean of the forces of both frames times the displacement between them
is the exact difference of the energies, however far they lie apart, and the mean stress times the
strain and the volume likewise. So neighbouring frames tell whether energies, forces and stresses
belong together, whatever the level of theory is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .fingerprint import neighbours
from .subject import Entry

__all__ = ["FrameStep", "near_pairs", "steps"]

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
        one, two: positions of the frames among the entries.
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


def near_pairs(entries: Sequence[Entry]) -> list[tuple[int, int]]:
    """Positions of frames that hold the same atoms in the same order and are near each other.

    Args:
        entries: with energies and forces; others are passed over.
    """
    usable = [
        k
        for k, e in enumerate(entries)
        if e.energy is not None and e.forces is not None and e.size > 1
        if e.pbc.all() or not e.pbc.any()
    ]
    chosen = [entries[k] for k in usable]
    keys = [(entry.numbers.tobytes(), bool(entry.pbc.all())) for entry in chosen]
    found = sorted(neighbours(chosen, keys, _NEIGHBOURS), key=lambda pair: pair[2])
    pairs: list[tuple[int, int]] = []
    atoms = 0
    for one, two, _ in found[:_MOST_PAIRS]:
        pairs.append((usable[one], usable[two]))
        atoms += chosen[one].size
        if atoms > _MOST_ATOMS:
            break
    return pairs


def steps(entries: Sequence[Entry], pairs: Sequence[tuple[int, int]]) -> list[FrameStep]:
    """Steps between frames, as far as they are near enough and still have their labels.

    Args:
        entries: of one file.
        pairs: from :func:`near_pairs`; they do not depend on what the labels are.
    """
    made = []
    for one, two in pairs:
        if entries[one].forces is None or entries[one].energy is None:
            continue
        step = _step(entries[one], entries[two], one, two)
        if step is not None:
            made.append(step)
    return made


def _step(one: Entry, two: Entry, first: int, second: int) -> FrameStep | None:
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


def _labels(entry: Entry) -> tuple[float, np.ndarray]:
    """Energy and forces of a frame that has both."""
    assert entry.energy is not None
    assert entry.forces is not None
    return entry.energy, entry.forces


def _molecule(one: Entry, two: Entry) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Displacement after the best superposition (Kabsch 1976), in the first frame's axes.

    With it no strain, and the rotation that turns rows of the second frame into those axes.
    """
    here = one.positions - one.positions.mean(axis=0)
    there = two.positions - two.positions.mean(axis=0)
    left, _, right = np.linalg.svd(there.T @ here)
    sign = np.sign(np.linalg.det(left @ right))
    turn = left @ np.diag([1.0, 1.0, sign if sign else 1.0]) @ right
    return there @ turn - here, np.zeros((3, 3)), turn


def _crystal(one: Entry, two: Entry) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """The same for a crystal; None where a cell is flat.

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
