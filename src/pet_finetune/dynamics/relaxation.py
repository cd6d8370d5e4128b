"""Relaxation of structures to the nearest minimum of a model's energy, with ASE's optimisers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase.io
import ase.units
import numpy as np
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS, FIRE, LBFGS
from rich.table import Table

from pet_finetune.calculator import PETCalculator
from pet_finetune.config.problems import config_error
from pet_finetune.data.calculator_input import check_atoms
from pet_finetune.errors import DynamicsError, PetFinetuneError, did_you_mean
from pet_finetune.log import get_logger
from pet_finetune.progress import InterruptGuard, Watch
from pet_finetune.training.tables import show

from .carried import carried
from .integrators import constraint_problems
from .md_checks import ModelChoice, read_all

_logger = get_logger(__name__)

#: ASE's optimisers by their names on the command line.
OPTIMIZERS: Mapping[str, Callable[..., Any]] = {"fire": FIRE, "lbfgs": LBFGS, "bfgs": BFGS}
_ENDINGS = (".xyz", ".extxyz")
_SHOWN = 20
#: What a structure that flies apart makes the calculator and ASE's optimisers raise.
_FAILURES = (PetFinetuneError, ArithmeticError, ValueError)


@dataclass(frozen=True)
class RelaxSettings:
    """When a structure is relaxed, and what may move.

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
        """What is wrong with the settings by themselves, one line each."""
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
class Relaxed:
    """A structure after its relaxation.

    Attributes:
        atoms: with energy, forces and, where periodic, stress of the model.
        index: of the frame in its file.
        steps: that were made.
        converged: whether the forces fell below the limit.
        gain: by how much the energy fell, eV.
        largest: the largest force on an atom, eV/A.
    """

    atoms: Atoms
    index: int
    steps: int
    converged: bool
    gain: float
    largest: float


@torch.inference_mode(False)
def relax_structures(
    model: ModelChoice,
    structures: str | Path,
    output: str | Path,
    settings: RelaxSettings,
    *,
    index: int | None = None,
    format: str = "",
    types: Mapping[int, str] | None = None,
) -> list[Relaxed]:
    """Relax the structures of a file one after the other, and write them to another file.

    Args:
        model: which model.
        structures: any file ASE reads.
        output: extended XYZ with the relaxed frames in their order, each written as soon as it is
            done; ``relax_frame`` (its number in the file), ``relax_steps`` and ``relax_converged``
            stand beside it.
        settings: when a structure is relaxed.
        index: one frame of the file alone.
        format: ASE's name of the file's format; guessed where empty.
        types: elements by type of atom, for LAMMPS files that do not say them.

    Raises:
        ConfigError: anything that can be seen to be wrong before the first step, all at once.
        DynamicsError: at the end, names the structures that could not be relaxed; the others are
            in the file.
        KeyboardInterrupt: after Ctrl-C.
    """
    frames, calculator = _check(model, structures, Path(output), settings, index, format, types)
    done: list[Relaxed] = []
    failed: list[str] = []
    watch = Watch(f"relaxing {structures}", "structures", len(frames))
    with InterruptGuard() as guard, watch:
        for number, atoms in frames:
            try:
                one = _relax(atoms, calculator, settings, number, lambda: guard.requested)
            except _FAILURES as error:
                failed.append(f"frame {number}: {error}")
            else:
                if one is None:
                    break
                ase.io.write(output, one.atoms, format="extxyz", append=True)
                done.append(one)
            watch.step()
    if done:
        _report(done, settings, output)
    there = f"{len(done)} of {len(frames)} structures are in {output}."
    if guard.requested and len(done) + len(failed) < len(frames):
        _logger.warning("%s", "\n".join([*failed, there if done else "No structure is relaxed."]))
        raise KeyboardInterrupt
    if failed:
        more = f"\nand {len(failed) - _SHOWN} more" if len(failed) > _SHOWN else ""
        raise DynamicsError(
            f"{len(failed)} of {len(frames)} structures of {structures} could not be relaxed:\n"
            + "\n".join(failed[:_SHOWN])
            + f"{more}\n{there if done else f'{output} was not written.'}"
        )
    return done


def _check(
    model: ModelChoice,
    structures: str | Path,
    output: Path,
    settings: RelaxSettings,
    index: int | None,
    format: str,
    types: Mapping[int, str] | None,
) -> tuple[list[tuple[int, Atoms]], PETCalculator]:
    """The frames and the calculator, once all that can be seen to be wrong was looked for."""
    problems = settings.problems()
    frames: list[tuple[int, Atoms]] = []
    calculator = None
    try:
        frames = read_all(structures, index, format, types)
    except PetFinetuneError as error:
        problems.append(str(error))
    try:
        calculator = model.open()
    except PetFinetuneError as error:
        problems.append(str(error))
    if output.suffix not in _ENDINGS:
        problems.append(f"-o {output}: expected a name that ends in {' or '.join(_ENDINGS)}.")
    elif output.exists():
        problems.append(f"-o {output} is there already: name another file.")
    elif not output.parent.is_dir():
        problems.append(f"-o {output}: there is no folder '{output.parent}'.")
    for number, atoms in frames:
        where = f"frame {number} of {structures}"
        problems += [f"{where}: {problem}" for problem in constraint_problems(atoms)]
        if settings.cell and not (atoms.pbc.all() and atoms.cell.rank == 3):
            problems.append(f"{where}: --cell needs a structure that is periodic in all directions")
        if calculator is not None:
            try:
                check_atoms(atoms, calculator.model.species)
            except PetFinetuneError as error:
                problems.append(f"{where}: {error}")
    if len(problems) > _SHOWN:
        problems = [*problems[:_SHOWN], f"and {len(problems) - _SHOWN} more"]
    if problems:
        raise config_error(problems, "relax")
    assert calculator is not None
    return frames, calculator


def _relax(
    atoms: Atoms,
    calculator: PETCalculator,
    settings: RelaxSettings,
    number: int,
    stop: Callable[[], bool],
) -> Relaxed | None:
    """Relax one structure; None where it was interrupted."""
    atoms.calc = calculator
    before = atoms.get_potential_energy()
    pressure = settings.pressure * ase.units.GPa
    moving = FrechetCellFilter(atoms, scalar_pressure=pressure) if settings.cell else atoms
    optimizer = OPTIMIZERS[settings.optimizer](moving, logfile=None)
    converged = False
    for at_rest in optimizer.irun(fmax=settings.fmax, steps=settings.steps):
        energy, forces = atoms.get_potential_energy(), atoms.get_forces()
        if not (np.isfinite(energy) and np.isfinite(forces).all()):
            raise DynamicsError(
                f"after {optimizer.nsteps} steps the energy or the forces are infinite. The "
                "structure is far from what the model knows; `inspect` looks for close contacts."
            )
        converged = bool(at_rest)
        if stop():
            return None
    out, _ = carried(atoms)
    results = {"energy": energy, "forces": atoms.get_forces(apply_constraint=False)}
    if atoms.pbc.all():
        results["stress"] = atoms.get_stress(apply_constraint=False)
    out.calc = SinglePointCalculator(out, **results)
    out.info |= {
        "relax_frame": number, "relax_steps": optimizer.nsteps, "relax_converged": converged,
    }  # fmt: skip
    largest = float(np.linalg.norm(forces, axis=1).max())
    return Relaxed(out, number, optimizer.nsteps, converged, before - energy, largest)


def _report(done: Sequence[Relaxed], settings: RelaxSettings, output: str | Path) -> None:
    """Print a table, and say which structures are not at rest."""
    table = Table(title="relaxed structures", title_justify="left", caption=f"structures: {output}")
    for name in ("frame", "formula", "steps", "energy, meV/atom", "largest force, eV/A"):
        table.add_column(name, justify="right")
    for one in done[:_SHOWN]:
        gain = -1000.0 * one.gain / len(one.atoms)
        formula = one.atoms.get_chemical_formula()
        force = f"{one.largest:.3f}"
        table.add_row(f"{one.index}", formula, f"{one.steps}", f"{gain:+.2f}", force)
    if len(done) > _SHOWN:
        table.add_row("...", f"{len(done) - _SHOWN} more", "", "", "")
    show(table)
    restless = [str(one.index) for one in done if not one.converged]
    if restless:
        _logger.warning(
            "%d of %d structures did not come below %g eV/A in %d steps: frames %s%s. Give more "
            "with --steps, or begin again from %s.",
            len(restless),
            len(done),
            settings.fmax,
            settings.steps,
            ", ".join(restless[:_SHOWN]),
            "..." if len(restless) > _SHOWN else "",
            output,
        )
