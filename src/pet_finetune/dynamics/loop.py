"""The loop of a simulation: move, see in time what goes wrong, write, save the state."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from ase import Atoms
from ase.md.md import MolecularDynamics

from pet_finetune.calculator import PETCalculator
from pet_finetune.data.calculator_input import Contacts
from pet_finetune.errors import DynamicsError, PetFinetuneError

from .integrators import (
    MDSettings,
    degrees_of_freedom,
    integrator_state,
    keeps_momentum,
    make_integrator,
    restore_integrator,
)
from .md_files import STATE, STOPPED, TRAJECTORY, MDFiles
from .measure import Measurement, measure

_SECONDS_BETWEEN_STATES = 10.0
_PARTS = ("integrator", "neighbors")
#: eV per atom; energies of one state on two machines differ by less, those of two models by more.
_SAME_MODEL = 1e-4


@dataclass(frozen=True)
class Outcome:
    """End of a simulation.

    Attributes:
        reason: ``finished``, ``interrupted`` by the user, or ``uncertain``: the limit of
            ``stop_uncertainty`` was passed.
        row: the last step.
        steps: that were made now, not before a restart.
        seconds: that they took.
    """

    reason: Literal["finished", "interrupted", "uncertain"]
    row: Measurement
    steps: int
    seconds: float


@dataclass
class _Run:
    """A simulation under way."""

    dynamics: MolecularDynamics
    calculator: PETCalculator
    settings: MDSettings
    files: MDFiles
    rng: np.random.Generator
    freedom: int
    watch: Stability
    saved: float = field(default_factory=time.monotonic)
    before: Atoms | None = None

    @property
    def atoms(self) -> Atoms:
        """Current atoms."""
        atoms: Atoms = self.dynamics.atoms
        return atoms

    def look(self) -> Measurement:
        """Measure the step."""
        row = measure(self.dynamics, self.freedom)
        problem = self.watch.problem(row, self.atoms)
        if problem is not None:
            self.fail(problem)
        return row

    def advance(self) -> Measurement:
        """Make a step."""
        self.before = self.files.frame(self.atoms)
        try:
            self.dynamics.step()  # type: ignore[attr-defined]  # of every subclass
            self.dynamics.nsteps += 1
            self.atoms.get_forces()
        except PetFinetuneError as error:
            self.dynamics.nsteps += 1
            self.fail(f"the structure cannot be computed any more. {error}")
        return self.look()

    def fail(self, problem: str) -> None:
        """Keep the last two structures and stop."""
        step = self.dynamics.nsteps
        frames = [] if self.before is None else [self.before]
        self.files.write_frames(STOPPED, [*frames, self.files.frame(self.atoms)])
        raise DynamicsError(
            f"The simulation has gone wrong at step {step} "
            f"({step * self.settings.timestep:.6g} fs): {problem.rstrip('.')}.\n"
            f"  The frames before are in {self.files / TRAJECTORY}; this structure and the one a "
            f"step earlier are in {self.files / STOPPED}.\n"
            f"  What to try: {'; '.join(self._advice(step))}."
        )

    def _advice(self, step: int) -> list[str]:
        advice = [f"a shorter time step (--timestep {self.settings.timestep / 2:g})"]
        if step < 100 and not self.settings.minimize:
            advice.append("relax the start (--minimize 200)")
        if self.settings.temperature > 500:
            advice.append("a lower temperature")
        advice.append(
            "see whether the model knows such structures: several --adapter of a committee show "
            "its uncertainty at every step, --stop-uncertainty stops before it is lost, and "
            "structures like the last ones belong into the training set"
        )
        return advice

    def save(self) -> None:
        """Save all that is needed to go on."""
        atoms = self.atoms
        inner = integrator_state(self.dynamics, self.rng)
        state = {f"{_PARTS[0]}/{name}": value for name, value in inner.items()}
        origin = self.calculator.neighbor_origin
        assert origin is not None
        state |= {f"{_PARTS[1]}/{index}": array for index, array in enumerate(origin)}
        state |= {
            "positions": atoms.positions,
            "momenta": atoms.get_momenta(),
            "cell": atoms.cell.array,
            "energy": np.asarray(atoms.get_potential_energy()),
            "alone": np.array(sorted(self.watch.alone), dtype=np.int64),
        }
        self.files.save_state(state)
        self.saved = time.monotonic()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Raises:
            DynamicsError: it is of another model or another kind of run.
        """
        parts: dict[str, dict[str, Any]] = {part: {} for part in _PARTS}
        for name, value in state.items():
            part, divided, rest = name.partition("/")
            if divided:
                parts[part][rest] = value
        self.atoms.set_cell(state["cell"], scale_atoms=False, apply_constraint=False)
        self.atoms.positions = state["positions"]
        self.atoms.set_momenta(state["momenta"], apply_constraint=False)
        try:
            restore_integrator(self.dynamics, self.rng, parts["integrator"])
        except KeyError as error:
            raise DynamicsError(
                f"'{self.files / STATE}' is of another integrator, or of another version of ASE "
                f"(it lacks {error}). Start a new run from the last frame of {TRAJECTORY}."
            ) from error
        first, second, third = (parts["neighbors"][str(i)] for i in range(3))
        self.calculator.neighbor_origin = (first, second, third)
        found, kept = float(self.atoms.get_potential_energy()), float(state["energy"])
        if not abs(found - kept) < _SAME_MODEL * len(self.atoms):
            raise DynamicsError(
                f"--restart: the model gives {found:.6f} eV for the structure that was saved with "
                f"{kept:.6f} eV, so it is not the model of this run. Give the checkpoint and "
                "adapters that the run began with, or start a new one."
            )


def simulate(
    atoms: Atoms,
    settings: MDSettings,
    files: MDFiles,
    *,
    rng: np.random.Generator,
    show: Callable[[Measurement], None],
    stop: Callable[[], bool] = lambda: False,
    state: Mapping[str, Any] | None = None,
) -> Outcome:
    """Run a simulation to its end, or until it is stopped.

    A run that is stopped and gone on with makes the same steps, bit for bit on the same machine:
    the state holds positions, momenta, cell, all variables of thermostat and barostat, the random
    generator, and the geometry that the neighbour list was built for.

    Args:
        atoms: with momenta and a :class:`~pet_finetune.PETCalculator`; changed in place.
        settings: with all defaults written out.
        files: where everything is written.
        rng: of the thermostat.
        show: called after every step.
        stop: asked before every step; True saves the state and ends the run.
        state: of :meth:`MDFiles.load_state`, to go on from.

    Raises:
        DynamicsError: the simulation has gone wrong, or the state is not of this run.
    """
    run = _prepared(atoms, settings, files, rng, state)
    row = run.look()
    if state is None:
        files.add(row, atoms)
        run.save()
    first, began = row.step, time.monotonic()
    reason: Literal["finished", "interrupted", "uncertain"] = "finished"
    while row.step < settings.steps:
        if stop():
            reason = "interrupted"
            break
        row = run.advance()
        if row.step % settings.every == 0:
            files.add(row, atoms)
        show(row)
        if time.monotonic() - run.saved > _SECONDS_BETWEEN_STATES:
            run.save()
        limit, found = settings.stop_uncertainty, row.forces_uncertainty
        if limit is not None and found is not None and found > limit:
            reason = "uncertain"
            break
    run.save()
    return Outcome(reason, row, row.step - first, time.monotonic() - began)


def _prepared(
    atoms: Atoms,
    settings: MDSettings,
    files: MDFiles,
    rng: np.random.Generator,
    state: Mapping[str, Any] | None,
) -> _Run:
    calculator: PETCalculator = atoms.calc
    # Lengths that a constraint is to keep are taken from the structure at its first use: let that
    # be the start, of a run that goes on too.
    atoms.set_constraint([constraint.copy() for constraint in atoms.constraints])
    atoms.set_momenta(atoms.get_momenta())
    atoms.get_potential_energy()  # the contacts are those of the structure computed last
    alone = calculator.contacts().alone if state is None else frozenset(state["alone"].tolist())
    assert settings.max_temperature is not None
    watch = Stability(settings.max_temperature, settings.temperature, alone, calculator.contacts)
    freedom = degrees_of_freedom(atoms, keeps_momentum(settings))
    dynamics = make_integrator(atoms, settings, rng)
    run = _Run(dynamics, calculator, settings, files, rng, freedom, watch)
    if state is not None:
        run.restore(state)
    return run


#: Angstrom; no two nuclei come nearer in any matter a potential knows (the bond of H2 is 0.74).
CLOSEST = 0.4


@dataclass(frozen=True)
class Stability:
    """The limits of a simulation.

    Attributes:
        max_temperature: K.
        target: temperature that was asked for, K.
        alone: atoms that had no other within the model's reach from the start.
        contacts: the extremes of the distances of the structure computed last.
    """

    max_temperature: float
    target: float
    alone: frozenset[int]
    contacts: Callable[[], Contacts]

    def problem(self, row: Measurement, atoms: Atoms) -> str | None:
        """Problem of a step, with the atoms concerned; None if there is none."""
        if not math.isfinite(row.potential):
            return f"the energy is {row.potential}, not a finite number"
        forces = atoms.get_forces()
        broken = np.flatnonzero(~np.isfinite(forces).all(axis=1))
        if len(broken):
            first = atom_name(atoms, int(broken[0]))
            return f"the forces on {len(broken)} atoms are not finite, first {first}"
        contacts = self.contacts()
        if contacts.distance < CLOSEST:
            assert contacts.closest is not None
            first, second = (atom_name(atoms, index) for index in contacts.closest)
            return (
                f"{first} and {second} are {contacts.distance:.2f} A apart, closer than any "
                f"two atoms can be ({CLOSEST} A)"
            )
        lost = sorted(contacts.alone - self.alone)
        if lost:
            return (
                f"{atom_name(atoms, lost[0])} has flown away: no other atom is within the model's "
                "cutoff of it" + (f" ({len(lost)} atoms in all)" if len(lost) > 1 else "")
            )
        if not row.temperature <= self.max_temperature:
            speeds = np.linalg.norm(atoms.get_velocities(), axis=1)
            return (
                f"the temperature is {row.temperature:,.0f} K; the target is {self.target:g} K and "
                f"the limit {self.max_temperature:,.0f} K (--max-temperature); the fastest is "
                f"{atom_name(atoms, int(speeds.argmax()))}"
            )
        return None


def atom_name(atoms: Atoms, index: int) -> str:
    """Such as ``atom 5 (H)``, counted from 0."""
    return f"atom {index} ({atoms[index].symbol})"
