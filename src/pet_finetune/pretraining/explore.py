"""Frames of the user's system: their own, dynamics with the foundation, displacements, close pairs.

What leaves the sane region is kept apart with its reason: no teacher's label of a broken geometry
is of use to anybody.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import chemical_symbols, covalent_radii
from ase.md.langevin import Langevin

from pet_finetune.calculator import PETCalculator
from pet_finetune.config.finetune import PretrainOptions
from pet_finetune.data.structure import (
    DEFAULT_CHARGE_KEYS,
    DEFAULT_SPIN_KEYS,
    atoms_to_structure,
    evenly_apart,
    structures_fingerprint,
)
from pet_finetune.inspection.inspected import InspectedFrame, dataset_of
from pet_finetune.rng import Stream

#: In the info of a frame: what it is called.
NAME = "name"
#: In the info of a frame that is not used: why.
DROPPED = "dropped"
_MOVED, _DISPLACED = 0.75, 0.25
_MOST_STARTS = 20
_EVERY = 10  # steps between two frames of the dynamics
_FRICTION = 0.02 / units.fs
_PER_TASK = 25
#: Of displacements, Å, and of strains, at most; each frame draws its own.
_WIDTHS, _STRAIN = (0.01, 0.08), 0.03
#: Distances of close pairs, as parts of the sum of both covalent radii.
_PAIRS = np.concatenate([np.linspace(0.75, 1.5, 10), np.linspace(1.7, 3.0, 4)])
#: Atoms nearer than this part of the sum of their covalent radii are in each other.
_CLOSE = 0.55
#: An atom whose nearest one is further off than so many such sums has flown away.
_FLOWN = 2.0

#: The name of a frame, the frame, and which of the user's it began from.
_Made = tuple[str, Atoms, "int | None"]


@dataclass(frozen=True)
class Task:
    """A few frames that are made together, always the same ones.

    Attributes:
        kind: ``given``, ``dynamics``, ``displaced`` or ``pairs``.
        number: among all tasks; part of its seed.
        start: which of the user's frames the first begins from.
        count: frames.
        temperature: of dynamics, K.
    """

    kind: str
    number: int
    start: int = 0
    count: int = 0
    temperature: float = 0.0


def tasks_of(frames: Sequence[Atoms], settings: PretrainOptions) -> list[Task]:
    """Tasks of exploration: the user's frames, and new ones up to the number wanted."""
    size, hot = len(frames), settings.temperatures
    new = settings.n - size
    given = range(0, size, _PER_TASK)
    planned = [("given", start, min(_PER_TASK, size - start), 0.0) for start in given]
    if new > 0:
        # Short trajectories from many frames see more than a long one; below ten frames they see
        # none.
        most = max(1, int(_MOVED * new / (10 * len(hot))))
        starts = evenly_apart(size, min(_MOST_STARTS, most)).tolist()
        length = max(1, round(_MOVED * new / (len(starts) * len(hot))))
        planned += [("dynamics", s, length, t) for s in starts for t in hot]
        displaced = range(max(1, round(_DISPLACED * new / _PER_TASK)))
        planned += [("displaced", _PER_TASK * one % size, _PER_TASK, 0.0) for one in displaced]
    planned.append(("pairs", 0, 0, 0.0))
    return [
        Task(kind, number, start, count, temperature)
        for number, (kind, start, count, temperature) in enumerate(planned)
    ]


def explore(
    task: Task, frames: Sequence[Atoms], calculator: PETCalculator, settings: PretrainOptions
) -> list[Atoms]:
    """The frames of a task; those outside the sane region have their reason in ``info``."""
    rng = np.random.default_rng([settings.seed, Stream.EXPLORATION, task.number])
    made = {
        "given": lambda: _given(task, frames),
        "dynamics": lambda: _dynamics(task, frames, calculator, rng),
        "displaced": lambda: _displaced(task, frames, rng),
        "pairs": lambda: _pairs(frames),
    }[task.kind]()
    levels: dict[int, float] = {}
    found = []
    for name, atoms, start in made:
        reason = None if start is None else _contacts(atoms)
        if start is not None and start not in levels:
            levels[start] = _energy(bare(frames[start]), calculator)
        if reason is None:
            level = np.inf if start is None else levels[start]
            reason = _too_high(atoms, calculator, settings, level)
        atoms.info[NAME] = name
        if reason is not None:
            atoms.info[DROPPED] = reason
        atoms.calc = None
        found.append(atoms)
        if reason is not None and task.kind == "dynamics":
            break  # what comes after it is worse
    return found


def bare(atoms: Atoms) -> Atoms:
    """Elements, positions, cell, charge and spin of a structure, and nothing else."""
    kept = {k: atoms.info[k] for k in (*DEFAULT_CHARGE_KEYS, *DEFAULT_SPIN_KEYS) if k in atoms.info}
    return Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc, info=kept)


def _given(task: Task, frames: Sequence[Atoms]) -> Iterator[_Made]:
    """The user's frames as they are."""
    for start in range(task.start, task.start + task.count):
        yield f"given-{start}", bare(frames[start]), start


def _dynamics(
    task: Task, frames: Sequence[Atoms], calculator: PETCalculator, rng: np.random.Generator
) -> Iterator[_Made]:
    """Langevin dynamics from a frame."""
    moving = bare(frames[task.start])
    moving.calc = calculator
    width = np.sqrt(moving.get_masses() * units.kB * task.temperature)
    moving.set_momenta(rng.normal(size=(len(moving), 3)) * width[:, None])
    step = (0.7 if (moving.numbers == 1).any() else 1.5) * units.fs
    run = Langevin(
        moving,
        step,
        temperature_K=task.temperature,
        friction=_FRICTION,
        fixcm=False,
        rng=rng,
    )
    for number in range(task.count):
        run.run(_EVERY)
        name = f"dynamics-{task.start}-{task.temperature:g}K-{number}"
        frame = bare(moving)
        frame.calc = SinglePointCalculator(
            frame, energy=moving.get_potential_energy(), forces=moving.get_forces()
        )
        yield name, frame, task.start


def _displaced(task: Task, frames: Sequence[Atoms], rng: np.random.Generator) -> Iterator[_Made]:
    """Frames with displaced atoms, and with a strained cell where they are periodic."""
    for number in range(task.count):
        start = (task.start + number) % len(frames)
        frame = bare(frames[start])
        if frame.pbc.all():
            strain = _STRAIN * rng.normal(size=(3, 3))
            frame.set_cell(
                frame.cell.array @ (np.eye(3) + (strain + strain.T) / 2), scale_atoms=True
            )
        frame.positions += rng.uniform(*_WIDTHS) * rng.normal(size=(len(frame), 3))
        yield f"displaced-{start}-{task.number}-{number}", frame, start


def _pairs(frames: Sequence[Atoms]) -> Iterator[_Made]:
    """All pairs of the elements, close and further apart, free of any cell."""
    elements = sorted({int(z) for atoms in frames for z in atoms.numbers})
    for pair in itertools.combinations_with_replacement(elements, 2):
        for part in _PAIRS:
            distance = float(part * covalent_radii[list(pair)].sum())
            name = f"pair-{'-'.join(chemical_symbols[z] for z in pair)}-{distance:.2f}"
            yield name, Atoms(pair, [[0, 0, 0], [0, 0, distance]]), None


def _energy(atoms: Atoms, calculator: PETCalculator) -> float:
    """Energy of a frame, eV/atom."""
    calculator.calculate(atoms)
    return float(calculator.results["energy"]) / len(atoms)


def inspected(atoms: Atoms) -> InspectedFrame:
    """Frame for inspection: distances and a fingerprint."""
    structure = atoms_to_structure(atoms, 0, source=str(atoms.info.get(NAME, "")))
    dataset = dataset_of({"frame": [structure]}, None)
    return dataset.sets["frame"][0]


def _contacts(atoms: Atoms) -> str | None:
    """Whether atoms are in each other or far from all others."""
    if not np.isfinite(atoms.positions).all():
        return "exploded"
    if len(atoms) == 1:
        return None
    gaps = inspected(atoms).gaps
    if gaps.min() < _CLOSE:
        return "atoms too close"
    return "flown apart" if gaps.max() > _FLOWN else None


def _too_high(
    atoms: Atoms, calculator: PETCalculator, settings: PretrainOptions, level: float
) -> str | None:
    """Whether forces, or the energy above that of the start, are beyond their bounds."""
    if atoms.calc is None:
        atoms.calc = calculator
    largest = float(np.linalg.norm(atoms.get_forces(), axis=1).max())
    energy = float(atoms.get_potential_energy()) / len(atoms)
    if not (np.isfinite(largest) and np.isfinite(energy)):
        return "exploded"
    if largest > settings.max_force:
        return "force too large"
    if energy - level > settings.max_energy:
        return "energy too high"
    return None


def digest(frames: Sequence[Atoms]) -> str:
    """A name for the geometries of frames."""
    structures = (atoms_to_structure(atoms, i) for i, atoms in enumerate(frames))
    return hashlib.sha256(structures_fingerprint(structures).encode()).hexdigest()[:16]
