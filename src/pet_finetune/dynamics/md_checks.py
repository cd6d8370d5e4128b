"""Checks of a simulation or a relaxation before its first step; their settings and their model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from ase import Atoms
from ase.optimize import BFGS, FIRE, LBFGS

from pet_finetune.calculator import PETCalculator
from pet_finetune.committee.committee_files import COMMITTEE_FILE
from pet_finetune.config.problems import config_error
from pet_finetune.data.calculator_input import MISSING_CELL, check_atoms, misses_a_cell
from pet_finetune.data.frame_files import read_frames
from pet_finetune.dynamics.integrators import MDSettings
from pet_finetune.errors import ConfigError, DataError, PetFinetuneError, did_you_mean
from pet_finetune.hub import find_model
from pet_finetune.keys import Compile
from pet_finetune.log import get_logger
from pet_finetune.units import StatedUnits

from .carried import from_ase
from .integrators import constraint_problems, degrees_of_freedom, keeps_momentum
from .loop import CLOSEST, atom_name

_logger = get_logger(__name__)
#: ASE's optimisers by their names on the command line.
OPTIMIZERS: Mapping[str, Callable[..., Any]] = {"fire": FIRE, "lbfgs": LBFGS, "bfgs": BFGS}


@dataclass(frozen=True)
class RelaxSettings:
    """Settings of a relaxation: convergence, and what may move.

    Attributes:
        fmax: the largest force on an atom at the end, eV/A; with ``cell`` the derivative by the
            strain of each atom's share of it too, as ASE's ``FrechetCellFilter`` counts.
        steps: the most for one structure.
        optimizer: ``fire``, ``lbfgs`` or ``bfgs``.
        cell: whether the cell relaxes with the atoms.
        pressure: outside, GPa, with ``cell``.
    """

    fmax: float = 0.05
    steps: int = 500
    optimizer: str = "fire"
    cell: bool = False
    pressure: float = 0.0

    def problems(self) -> list[str]:
        """Problems of the settings, one line each."""
        found = []
        if not 0 < self.fmax < np.inf:
            found.append(f"--fmax: expected a number above 0, got {self.fmax:g}.")
        if self.steps < 1:
            found.append(f"--steps: expected a number above 0, got {self.steps}.")
        if self.optimizer not in OPTIMIZERS:
            names = ", ".join(OPTIMIZERS)
            guess = did_you_mean(self.optimizer, OPTIMIZERS)
            found.append(f"--optimizer: expected one of {names}, got '{self.optimizer}'.{guess}")
        if self.pressure and not self.cell:
            found.append("--pressure: the cell stays as it is without --cell.")
        return found


@dataclass(frozen=True)
class ModelChoice:
    """Which model moves the atoms.

    Attributes:
        checkpoint: ours or metatrain's.
        adapters: none; one to put on top; several, or the folder of a run with
            ``finetune.ensemble``, for a committee.
        target: the energy, where the model has several.
        device: as in the options.
        dtype: ``float32`` or ``float64``; None for the model's own.
        orientations: as in the calculator.
        compile: as in the calculator.
    """

    checkpoint: str
    adapters: tuple[str, ...] = ()
    target: str | None = None
    device: str = "auto"
    dtype: str | None = None
    orientations: int = 1
    compile: Compile = "auto"

    @property
    def is_committee(self) -> bool:
        """Whether it is a committee of adapters."""
        one = len(self.adapters) == 1 and (Path(self.adapters[0]) / COMMITTEE_FILE).exists()
        return one or len(self.adapters) > 1

    def open(self, spread_of_forces: bool = False) -> PETCalculator:
        """The calculator.

        With ``spread_of_forces`` the forces of the members of a last layer are derived at every
        step, as those of a committee are anyhow.

        Raises:
            PetFinetuneError: checkpoint, adapters, target, device or precision are wrong.
        """
        which: dict[str, Any] = {}
        if self.is_committee:
            several = len(self.adapters) > 1
            which["adapters"] = list(self.adapters) if several else self.adapters[0]
        elif self.adapters:
            which["adapter"] = self.adapters[0]
        return PETCalculator(
            self.checkpoint,
            target=self.target,
            device=self.device,
            dtype=self.dtype,
            orientations=self.orientations,
            compile=self.compile,
            spread="always" if spread_of_forces else None,
            **which,
        )

    def absolute(self) -> ModelChoice:
        """Settings with absolute paths."""
        return replace(
            self,
            checkpoint=str(find_model(self.checkpoint).resolve()),
            adapters=tuple(str(Path(folder).resolve()) for folder in self.adapters),
        )


def chosen_model(model: ModelChoice | str | os.PathLike[str]) -> ModelChoice:
    """A choice as it is, or that of a checkpoint.

    Raises:
        ConfigError: it is something else.
    """
    if isinstance(model, ModelChoice):
        return model
    if isinstance(model, (str, os.PathLike)):
        return ModelChoice(os.fspath(model))
    raise ConfigError(
        f"model: expected a checkpoint or a ModelChoice, got {type(model).__name__}. Write a model "
        'in memory to a file first: pf.export(model, "model.ckpt").'
    )


def _frames_of(
    given: str | Path | Atoms, format: str, types: Mapping[int, str] | None
) -> Sequence[Atoms]:
    """The frames of a file, or a structure in memory."""
    if isinstance(given, Atoms):
        return [given]
    if isinstance(given, (str, os.PathLike)):
        return read_frames(given, format, types)
    raise DataError(
        f"structures: expected the path of a file or an Atoms, got {type(given).__name__}. Write "
        'several to a file first: ase.io.write("structures.traj", frames).'
    )


_T = TypeVar("_T")


def tried(problems: list[str], make: Callable[[], _T]) -> _T | None:
    """Result of a function; None and one more problem if it fails."""
    try:
        return make()
    except PetFinetuneError as error:
        problems.append(str(error))
        return None


def check_start(
    model: ModelChoice,
    structure: str | Path | Atoms,
    settings: MDSettings,
    index: int | None,
    format: str = "",
    types: Mapping[int, str] | None = None,
) -> tuple[Atoms, PETCalculator]:
    """Read structure and model, and check that they can be simulated with the settings.

    Returns:
        The structure, without a calculator, and the calculator.

    Raises:
        ConfigError: with a line for each problem.
    """
    problems = settings.problems()
    atoms = tried(problems, lambda: read_frame(structure, index, format, types))
    if atoms is not None:
        problems += _of_structure(atoms, structure, settings)
    calculator = tried(problems, lambda: model.open(settings.stop_uncertainty is not None))
    offered = () if calculator is None else calculator.implemented_properties
    sure = model.is_committee or "forces_uncertainty" in offered
    if settings.stop_uncertainty is not None and not sure:
        problems.append(
            "--stop-uncertainty: one model has no uncertainty. Give several --adapter, the folder "
            "of a run with finetune.ensemble, or a model with members of its last layer "
            "(finetune.llpr)."
        )
    if atoms is not None and calculator is not None:
        problems += _of_both(atoms, structure, calculator, settings, not problems)
    if problems:
        raise config_error(problems, "md")
    assert atoms is not None
    assert calculator is not None
    return atoms, calculator


def read_frame(
    structure: str | Path | Atoms,
    index: int | None,
    format: str = "",
    types: Mapping[int, str] | None = None,
) -> Atoms:
    """One frame of a file; by default the last, with a notice if there are several.

    Raises:
        DataError: the file cannot be read, or has no such frame.
    """
    frames = _frames_of(structure, format, types)
    if index is None and len(frames) > 1:
        _logger.info(
            "%s has %d frames: the last, %d, is taken (--index N takes another)",
            structure,
            len(frames),
            len(frames) - 1,
        )
    return _frame(frames, -1 if index is None else index, structure)


def read_all(
    structures: str | Path | Atoms,
    index: int | None,
    format: str = "",
    types: Mapping[int, str] | None = None,
) -> list[tuple[int, Atoms]]:
    """The frames of a file with their numbers, or the one that is named."""
    frames = _frames_of(structures, format, types)
    wanted = range(len(frames)) if index is None else [index]
    return [(number, _frame(frames, number, structures)) for number in wanted]


def _frame(frames: Sequence[Atoms], chosen: int, structure: str | Path | Atoms) -> Atoms:
    """A copy in Å of one of the frames of a file, with what ASE's readers leave aside."""
    if not -len(frames) <= chosen < len(frames):
        raise DataError(
            f"--index: {structure} has no frame {chosen}. It has frames 0 to {len(frames) - 1}; "
            "negative numbers count from the end."
        )
    atoms = frames[chosen].copy()  # without a calculator
    factor = StatedUnits.of([atoms], str(structure)).factor(
        "length", "positions", 1.0, "angstrom", default=True
    )
    atoms.set_cell(atoms.cell * factor)
    atoms.positions *= factor
    if count := misses_a_cell(atoms):
        _logger.warning(
            "%s: %d %s: they are taken as a drop in vacuum. If they are periodic, write "
            'Lattice="..." into the file',
            structure,
            count,
            MISSING_CELL,
        )
    return from_ase(atoms, f"frame {chosen} of {structure}" if len(frames) > 1 else str(structure))


def _of_structure(atoms: Atoms, structure: str | Path | Atoms, settings: MDSettings) -> list[str]:
    problems = []
    if settings.ensemble == "npt" and not (atoms.pbc.all() and atoms.cell.rank == 3):
        problems.append(
            "--ensemble npt: the pressure needs a volume, and "
            f"{structure} has pbc = {atoms.pbc.tolist()}"
            f"{'' if atoms.cell.rank == 3 else ' and no three cell vectors'}. Use nvt."
        )
    chain = settings.ensemble == "npt" or settings.thermostat == "nose-hoover"
    if chain and atoms.constraints:
        kinds = ", ".join(sorted({type(c).__name__ for c in atoms.constraints}))
        problems.append(
            f"{structure} has constraints ({kinds}), which Nose-Hoover chains and barostats of "
            "ASE do not allow. Use --ensemble nvt with --thermostat langevin or bussi."
        )
    of_constraints = constraint_problems(atoms)
    problems += [f"{structure}: {problem}" for problem in of_constraints]
    sound = not of_constraints and np.isfinite(atoms.positions).all()  # else it is told elsewhere
    if sound and degrees_of_freedom(atoms, keeps_momentum(settings)) < 1:
        problems.append(
            f"{structure}: nothing can move: its constraints, and motions of the whole that stay "
            "as they are, leave no degree of freedom."
        )
    if settings.velocities == "keep" and not atoms.get_momenta().any():
        problems.append(
            f"--keep-velocities: {structure} holds no velocities (an array 'momenta'). Leave it "
            "out, and they are drawn."
        )
    return problems


def _of_both(
    atoms: Atoms,
    structure: str | Path | Atoms,
    calculator: PETCalculator,
    settings: MDSettings,
    compute: bool,
) -> list[str]:
    """Elements, cell and coordinates; and, where nothing else is wrong, one evaluation."""
    try:
        check_atoms(atoms, calculator.model.species)
        if not compute:
            return []
        calculator.calculate(atoms)
    except PetFinetuneError as error:
        return [f"{structure}: {error}"]
    contacts = calculator.contacts()
    if contacts.closest is None or contacts.distance >= CLOSEST or settings.minimize:
        return []
    first, second = (atom_name(atoms, number) for number in contacts.closest)
    return [
        f"{structure}: {first} and {second} are {contacts.distance:.2f} A apart, closer than any "
        f"two atoms can be ({CLOSEST} A). Check units and cell; --minimize 200 moves them apart."
    ]
