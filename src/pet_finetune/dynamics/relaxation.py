"""Relaxation of structures to the nearest minimum of a model's energy, with ASE's optimisers.

Each structure has an optimiser of its own, and all of them wait while the next positions of many
are computed in one batch. So constraints, pressure and every optimiser work as for one structure.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase.io
import ase.units
import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.filters import FrechetCellFilter
from ase.neighborlist import neighbor_list
from ase.stress import full_3x3_to_voigt_6_stress
from rich.table import Table

from pet_finetune.calculator import PETCalculator
from pet_finetune.committee.committee import to_numpy
from pet_finetune.config.problems import check_kind, config_error
from pet_finetune.data.calculator_input import check_atoms
from pet_finetune.data.structure import list_frames
from pet_finetune.device import plain_torch
from pet_finetune.errors import DynamicsError, PetFinetuneError, is_out_of_memory
from pet_finetune.files import check_new, replacing
from pet_finetune.log import get_logger
from pet_finetune.terminal import InterruptGuard, Watch, show

from .carried import carried
from .integrators import constraint_problems
from .loop import CLOSEST
from .md_checks import OPTIMIZERS, ModelChoice, RelaxSettings, chosen_model, read_all, tried

_logger = get_logger(__name__)

_ENDINGS = (".xyz", ".extxyz")
_SHOWN = 20
#: Atoms of a batch: a CPU's caches hold no more, and a GPU is busy with so many.
_ATOMS_ON_CPU, _ATOMS_ON_GPU = 256, 10_000
#: What a structure that flies apart makes the calculator and ASE's optimisers raise.
_FAILURES = (PetFinetuneError, ArithmeticError, ValueError)


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


@plain_torch()
def relax_structures(
    model: ModelChoice | str | Path,
    structures: str | Path | Atoms,
    output: str | Path,
    settings: RelaxSettings,
    *,
    index: int | None = None,
    format: str = "",
    types: Mapping[int, str] | None = None,
) -> list[Relaxed]:
    """Relax the structures of a file, many at once, and write them to another file.

    Args:
        model: which model: a checkpoint, or more.
        structures: any file ASE reads, or one structure.
        output: extended XYZ with the relaxed frames, each written as soon as it is done, and in
            their order at the end; ``relax_frame`` (its number in the file), ``relax_steps`` and
            ``relax_converged`` stand beside each.
        settings: when a structure is relaxed.
        index: one frame of the file alone.
        format: ASE's name of the file's format; guessed where empty.
        types: elements by type of atom, for LAMMPS files that do not say them.

    Raises:
        ConfigError: anything that can be seen to be wrong before the first step, all at once.
        DynamicsError: at the end, if some could not be relaxed; the others are in the file.
        KeyboardInterrupt: after Ctrl-C.
    """
    check_kind("settings", settings, RelaxSettings)
    frames, calculator = _check(model, structures, Path(output), settings, index, format, types)
    done: list[Relaxed] = []
    failed: dict[int, str] = {}
    waiting = deque(frames)
    underway: list[_Underway] = []
    batches = _Batches(calculator)

    def what() -> str:
        steps = [one.steps for one in underway]
        return f"relaxing {structures}" + (f", at step {max(steps)}" if steps else "")

    watch = Watch(what, "structures", len(frames))
    with _claimed(Path(output)), InterruptGuard() as guard, watch:
        while (waiting or underway) and not guard.requested:
            while waiting and batches.room(underway, waiting[0][1]):
                number, atoms = waiting.popleft()
                underway.append(_Underway(number, atoms, calculator, settings))
            batches.compute(underway)
            left = []
            for one in underway:
                try:
                    relaxed = one.move()
                except _FAILURES as error:
                    failed[one.number] = str(error)
                else:
                    if relaxed is None:
                        left.append(one)
                        continue
                    _append(Path(output), relaxed.atoms)
                    done.append(relaxed)
                watch.step()
            underway = left
    if done:
        done = _in_order(done, output)
        _report(done, settings, output)
    told = [f"frame {number}: {problem}" for number, problem in sorted(failed.items())]
    there = f"{len(done)} of {len(frames)} structures are in {output}."
    if guard.requested and len(done) + len(failed) < len(frames):
        _logger.warning("%s", "\n".join([*told, there if done else "No structure is relaxed."]))
        raise KeyboardInterrupt
    if failed:
        more = f"\nand {len(failed) - _SHOWN} more" if len(failed) > _SHOWN else ""
        raise DynamicsError(
            f"{len(failed)} of {len(frames)} structures of {structures} could not be relaxed:\n"
            + "\n".join(told[:_SHOWN])
            + f"{more}\n{there if done else f'{output} was not written.'}"
        )
    return done


def _append(output: Path, atoms: Atoms) -> None:
    """Add a frame to the file, whole or not at all."""
    before = output.stat().st_size
    try:
        ase.io.write(output, atoms, format="extxyz", append=True)
    except OSError as error:
        os.truncate(output, before)
        raise DynamicsError(
            f"Cannot write '{output}': {error.strerror or error}. What was relaxed before is whole "
            "in it (relax_frame says which frames). Make room, and relax the others."
        ) from error


@contextmanager
def _claimed(output: Path) -> Iterator[None]:
    """The file belongs to this process, also where two begin at once; an empty one goes again."""
    try:
        output.touch(exist_ok=False)
    except FileExistsError:
        check_new(output)
        raise
    try:
        yield
    finally:
        if not output.stat().st_size:
            output.unlink()


def _check(
    model: ModelChoice | str | Path,
    structures: str | Path | Atoms,
    output: Path,
    settings: RelaxSettings,
    index: int | None,
    format: str,
    types: Mapping[int, str] | None,
) -> tuple[list[tuple[int, Atoms]], PETCalculator]:
    """The frames and the calculator, once all that can be seen to be wrong was looked for."""
    problems = settings.problems()
    frames = tried(problems, lambda: read_all(structures, index, format, types)) or []
    calculator = tried(problems, chosen_model(model).open)
    if output.suffix not in _ENDINGS:
        problems.append(f"-o {output}: expected a name that ends in {' or '.join(_ENDINGS)}.")
    else:
        tried(problems, lambda: check_new(output))
    for number, atoms in frames:
        where = f"frame {number} of {structures}"
        problems += [f"{where}: {problem}" for problem in constraint_problems(atoms, False)]
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


class _Underway:
    """A structure on its way to its minimum.

    Attributes:
        steps: that were made.
    """

    def __init__(
        self, number: int, atoms: Atoms, calculator: PETCalculator, settings: RelaxSettings
    ) -> None:
        self.number, self.atoms, self.neighbors = number, atoms, calculator.fresh_neighbors()
        self._species, self._settings = calculator.model.species, settings
        self.steps, self._before = 0, 0.0
        #: Why it could not be computed.
        self.problem: Exception | None = None
        pressure = settings.pressure * ase.units.GPa
        cell = settings.cell
        self._moving = FrechetCellFilter(atoms, scalar_pressure=pressure) if cell else atoms
        self._optimizer = OPTIMIZERS[settings.optimizer](self._moving, logfile=None)

    def move(self) -> Relaxed | None:
        """Make a step; returns the result if the structure is relaxed or has used all steps.

        Raises:
            DynamicsError: energy or forces are infinite.
            PetFinetuneError: these or the next positions or cell cannot be computed.
        """
        if self.problem is not None:
            raise self.problem
        results = self.atoms.calc.results
        energy = results["energy"]
        if not (np.isfinite(energy) and np.isfinite(results["forces"]).all()):
            raise DynamicsError(
                f"after {self.steps} steps the energy or the forces are infinite. The "
                "structure is far from what the model knows; `inspect` looks for close contacts."
            )
        if self.steps == 0:
            self._before = energy
        forces = np.linalg.norm(self._moving.get_forces(), axis=1)  # of the cell too
        converged = bool(forces.max() < self._settings.fmax)
        if not converged and self.steps < self._settings.steps:
            self._optimizer.step()
            self.steps += 1
            check_atoms(self.atoms, self._species)
            return None
        out, _ = carried(self.atoms)
        out.calc = SinglePointCalculator(out, **results)
        out.info |= {
            "relax_frame": self.number, "relax_steps": self.steps, "relax_converged": converged,
        }  # fmt: skip
        largest = float(np.linalg.norm(self.atoms.get_forces(), axis=1).max())
        gain = self._before - energy
        return Relaxed(out, self.number, self.steps, converged, gain, largest)


class _Batches:
    """Computes structures together, as many at once as pays and as the memory holds."""

    def __init__(self, calculator: PETCalculator) -> None:
        self._calculator = calculator
        self._most = _ATOMS_ON_CPU if calculator.device.type == "cpu" else _ATOMS_ON_GPU

    def room(self, underway: Sequence[_Underway], atoms: Atoms) -> bool:
        """Whether one more structure fits into the batch."""
        return not underway or sum(len(one.atoms) for one in underway) + len(atoms) <= self._most

    def compute(self, several: Sequence[_Underway]) -> None:
        """Give each its energy, forces and stress, or the reason why it has none.

        In halves where the memory does not hold all.
        """
        count = sum(len(one.atoms) for one in several)
        if len(several) > 1 and count > self._most:
            half = len(several) // 2
            self.compute(several[:half])
            self.compute(several[half:])
            return
        try:
            found = self._calculate(several)
        except _FAILURES as error:
            if len(several) == 1:
                several[0].problem = error
            else:  # whose fault it is
                for one in several:
                    self.compute([one])
            return
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(several) == 1:
                several[0].problem = DynamicsError(f"{count} atoms do not fit into the memory.")
                return
            self._most = count // 2
            self.compute(several)
            return
        for one, results in zip(several, found, strict=True):
            one.atoms.calc = SinglePointCalculator(one.atoms, **results)

    def _calculate(self, several: Sequence[_Underway]) -> list[dict[str, Any]]:
        if len(several) == 1:  # by what is fastest for one
            atoms, calculator = several[0].atoms, self._calculator
            calculator.calculate(atoms)
            kept = ("energy", "forces", "stress")
            return [{key: calculator.results[key] for key in kept if key in calculator.results}]
        found = self._calculator.predict_together(
            [one.atoms for one in several], [one.neighbors for one in several]
        )
        assert found.forces is not None
        ends = np.cumsum([len(one.atoms) for one in several])[:-1]
        forces = np.split(to_numpy(found.forces), ends)
        of_each = [
            {"energy": energy, "forces": own}
            for energy, own in zip(found.energy.tolist(), forces, strict=True)
        ]
        if found.stress is not None:
            stresses = full_3x3_to_voigt_6_stress(to_numpy(found.stress))
            for results, one, stress in zip(of_each, several, stresses, strict=True):
                if one.atoms.pbc.all():
                    results["stress"] = stress
        return of_each


def _in_order(done: Sequence[Relaxed], output: str | Path) -> list[Relaxed]:
    """Finished structures in the order of their file."""
    ordered = sorted(done, key=lambda one: one.index)
    if ordered != done:
        with replacing(Path(output)) as partial:
            ase.io.write(partial, [one.atoms for one in ordered], format="extxyz")
    return ordered


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
    touching = [one.index for one in done if len(neighbor_list("i", one.atoms, CLOSEST))]
    if touching:
        _logger.warning(
            "Two atoms are closer than any can be (%g A) in %s of %s, which no model "
            "knows. Look at what these came from.", CLOSEST, list_frames(touching), output,
        )  # fmt: skip
    restless = [one.index for one in done if not one.converged]
    if restless:
        _logger.warning(
            "%d of %d structures did not come below %g eV/A in %d steps: %s. Give more with "
            "--steps, or begin again from %s.",
            len(restless), len(done), settings.fmax, settings.steps, list_frames(restless), output,
        )  # fmt: skip
