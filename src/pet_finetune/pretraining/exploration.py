"""New frames of the user's system, and who labels them.

Frames are the user's own, of dynamics with the foundation, displacements, and close pairs. What
leaves the sane region is kept apart with its reason: no teacher's label of a broken geometry is of
use to anybody. Teachers are tight binding through tblite, an ASE calculator, or a checkpoint.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import chemical_symbols, covalent_radii
from ase.md.langevin import Langevin

from pet_finetune.calculator import PETCalculator
from pet_finetune.config.finetune import PretrainOptions
from pet_finetune.data.neighbors import cell_heights
from pet_finetune.data.structure import (
    DEFAULT_CHARGE_KEYS,
    DEFAULT_SPIN_KEYS,
    atoms_to_structure,
    evenly_apart,
    structures_fingerprint,
    usual_integer,
)
from pet_finetune.errors import ConfigError, PetFinetuneError, did_you_mean
from pet_finetune.hub import find_model, is_address
from pet_finetune.inspection.inspected import InspectedFrame, dataset_of
from pet_finetune.installation import missing_extra
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
    heat = task.temperature
    run = Langevin(moving, step, temperature_K=heat, friction=_FRICTION, fixcm=False, rng=rng)
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
    """Problem with the distances: atoms too close to or too far from others; else None."""
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
    """Problem with forces or energy above the start beyond their bounds; None if there is none."""
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


#: Names of the tight-binding methods, and tblite's names of them.
TIGHT_BINDING = {"gfn2": "GFN2-xTB", "gfn1": "GFN1-xTB"}
_MOST_TIGHT_BINDING = 86  # radon: both methods have parameters up to it
#: tblite has the Gamma point only. Cells lower than this are repeated before it sees them, and
#: the forces on the copies averaged: Å.
_LEAST_HEIGHT = 6.4
#: What ASE's calculators raise where they cannot compute a structure.
_FAILURES = (PetFinetuneError, ArithmeticError, LookupError, RuntimeError, ValueError)


class Teacher:
    """Gives frames energies, forces, and stresses where they are periodic.

    Args:
        name: as it is shown.
        calculator: makes the ASE calculator for a frame.
        unknown: elements, of those given, that it does not know.
        least_height: cells lower than this are repeated before they are computed, Å.
    """

    def __init__(
        self,
        name: str,
        calculator: Callable[[Atoms], Any],
        unknown: Callable[[set[int]], set[int]] = lambda elements: set(),
        least_height: float = 0.0,
    ) -> None:
        self.name = name
        self._calculator, self._unknown = calculator, unknown
        self._least_height = least_height

    def label(self, atoms: Atoms, max_force: float) -> Atoms:
        """A copy with the teacher's results, or with the reason why it has none in ``info``."""
        frame = bare(atoms)
        frame.info[NAME] = atoms.info.get(NAME, "")
        unknown = self._unknown({int(z) for z in atoms.numbers})
        if unknown:
            names = ", ".join(chemical_symbols[z] for z in sorted(unknown))
            frame.info[DROPPED] = f"element not known: {names}"
            return frame
        try:
            results = self._results(frame)
        except _FAILURES as error:
            first = (str(error).strip().splitlines() or ["no reason given"])[0]
            frame.info[DROPPED] = f"not computed ({type(error).__name__}: {first[:80]})"
            return frame
        numbers = np.concatenate([np.ravel(value) for value in results.values()])
        if not np.isfinite(numbers).all():
            frame.info[DROPPED] = "not computed (numbers that are not finite)"
        elif np.linalg.norm(results["forces"], axis=1).max() > max_force:
            frame.info[DROPPED] = "force too large"
        else:
            frame.calc = SinglePointCalculator(frame, **results)
        return frame

    def _results(self, frame: Atoms) -> dict[str, Any]:
        """Energy, forces, and stress; of a repeated cell those of one copy."""
        repeats = [
            max(1, int(np.ceil(self._least_height / height))) if periodic else 1
            for periodic, height in zip(
                frame.pbc, cell_heights(frame.positions, frame.cell.array, frame.pbc), strict=True
            )
        ]
        copies = int(np.prod(repeats))
        whole = frame.repeat(repeats) if copies > 1 else frame.copy()
        whole.info = dict(frame.info)
        whole.calc = self._calculator(whole)
        try:
            results: dict[str, Any] = {
                "energy": float(whole.get_potential_energy()) / copies,
                "forces": whole.get_forces().reshape(copies, -1, 3).mean(axis=0),
            }
            if whole.pbc.all():
                # Energies and forces are worth training on without it.
                with suppress(NotImplementedError):
                    results["stress"] = whole.get_stress()
            return results
        except _FAILURES:
            whole.calc.reset()  # some calculators keep half of what they could not compute
            raise


def teacher_of(text: str, device: str = "auto") -> Teacher:
    """The teacher of a name.

    Args:
        text: ``gfn2``, ``gfn1``, ``module:name``, or a checkpoint, by path, address or name.
        device: of a checkpoint.

    Raises:
        ConfigError: none of these, or its library is not installed.
        PetFinetuneError: the checkpoint cannot be read.
    """
    if text in TIGHT_BINDING:
        return _tight_binding(TIGHT_BINDING[text])
    if Path(text).is_file() or is_address(text):
        path = find_model(text)
        calculator = PETCalculator(path, device=device)
        known = set(calculator.model.species)
        return Teacher(path.name, lambda atoms: calculator, lambda asked: asked - known)
    module, colon, name = text.partition(":")
    if colon and module and name:
        return _by_path(text, module, name)
    raise ConfigError(
        f"pretrain: the teacher {text!r} is not one of gfn2, gfn1, an ASE calculator "
        "(module:name, e.g. tblite.ase:TBLite), or a checkpoint file."
        f"{did_you_mean(text, TIGHT_BINDING)}"
    )


def _tight_binding(method: str) -> Teacher:
    """GFN2-xTB or GFN1-xTB with tblite's own defaults."""
    if (problem := missing_extra("tblite", "xtb")) is not None:
        raise ConfigError(f"pretrain: the teacher {method} {problem}")
    from tblite.ase import TBLite

    def calculator(atoms: Atoms) -> Any:
        charge, _ = usual_integer(atoms.info, DEFAULT_CHARGE_KEYS, 0)
        spin, _ = usual_integer(atoms.info, DEFAULT_SPIN_KEYS, 1)
        odd = (int(atoms.numbers.sum()) - charge) % 2
        if spin < 1 or (spin - 1) % 2 != odd:
            spin = 1 + odd  # the lowest that there can be
        return TBLite(method=method, charge=charge, multiplicity=spin, verbosity=0)

    return Teacher(
        method,
        calculator,
        lambda asked: {z for z in asked if z > _MOST_TIGHT_BINDING},
        _LEAST_HEIGHT,
    )


def _by_path(text: str, module: str, name: str) -> Teacher:
    """An ASE calculator, its class, or a function that makes one, by import path."""
    try:
        found = getattr(importlib.import_module(module), name)
    except AttributeError:
        raise ConfigError(
            f"pretrain: the module of the teacher {text!r} has no '{name}'."
        ) from None
    except Exception as error:  # whatever a module of the user's does
        raise ConfigError(f"pretrain: the teacher {text!r} cannot be imported: {error}.") from error
    try:
        made = found() if inspect.isclass(found) or not hasattr(found, "calculate") else found
    except Exception as error:
        raise ConfigError(
            f"pretrain: the teacher {text!r} cannot be made ({type(error).__name__}: {error}). "
            "Name a calculator, or a class or function that takes no arguments."
        ) from error
    if not hasattr(made, "get_potential_energy"):
        raise ConfigError(
            f"pretrain: the teacher {text!r} gives {type(made).__name__}, which is no ASE "
            "calculator. Name one, its class, or a function without arguments that makes one."
        )
    return Teacher(text, lambda atoms: made)
