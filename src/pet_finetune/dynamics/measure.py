"""The numbers of a step (energies, temperature, pressure, uncertainty), of a log, their display."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType

import numpy as np
from ase import Atoms, units
from ase.md.md import MolecularDynamics
from rich.progress import TextColumn

from pet_finetune.log import get_logger
from pet_finetune.progress import REDRAWS_PER_SECOND, Watch, progress_bar, start_bar, stop_bar

from .integrators import conserved_quantity, temperature

_logger = get_logger(__name__)


@dataclass(frozen=True)
class Measurement:
    """One step. What a structure or model does not have is None.

    Attributes:
        step: 0 is the start.
        time: fs.
        potential: eV, as all energies.
        kinetic: of the atoms.
        conserved: what a perfect integration keeps constant.
        temperature: K, of the degrees of freedom there are.
        volume: A^3, of a structure that is periodic in three directions.
        pressure: GPa, with that of the motion.
        energy_uncertainty: eV, of a committee or a last layer (LLPR).
        forces_uncertainty: that of the atom with the largest, eV/A.
    """

    step: int
    time: float
    potential: float
    kinetic: float
    conserved: float | None
    temperature: float
    volume: float | None = None
    pressure: float | None = None
    energy_uncertainty: float | None = None
    forces_uncertainty: float | None = None

    @property
    def total(self) -> float:
        """Potential and kinetic energy, eV."""
        return self.potential + self.kinetic


def measure(dynamics: MolecularDynamics, freedom: int) -> Measurement:
    """Measure a step whose forces are computed; nothing is evaluated again."""
    atoms: Atoms = dynamics.atoms
    volume = pressure = None
    if atoms.pbc.all():
        volume = float(atoms.get_volume())
        stress = atoms.get_stress(voigt=False, include_ideal_gas=True)
        pressure = float(-np.trace(stress) / 3.0 / units.GPa)
    results = atoms.calc.results
    spread = results.get("forces_uncertainty")
    return Measurement(
        step=int(dynamics.nsteps),
        time=dynamics.nsteps * dynamics.dt / units.fs,
        potential=float(atoms.get_potential_energy()),
        kinetic=float(atoms.get_kinetic_energy()),
        conserved=conserved_quantity(dynamics),
        temperature=temperature(atoms, freedom),
        volume=volume,
        pressure=pressure,
        energy_uncertainty=results.get("energy_uncertainty"),
        forces_uncertainty=None if spread is None else float(np.max(spread)),
    )


_SHORTEST = 0.1  # ps


@dataclass(frozen=True)
class Summary:
    """Figures of a whole run, parts before a restart included. None where there is no such thing.

    Attributes:
        time: ps.
        drift: slope of a straight line through the conserved quantity, meV/atom/ps; None for runs
            so short that it would be that of a vibration.
        drift_error: its standard error, meV/atom/ps.
        fluctuation: root mean square around that line, meV/atom.
        temperature: mean of the second half, K; thermostats need the first one.
        temperature_deviation: standard deviation there.
        volume: mean of the second half, A^3; None where the volume is constant.
        pressure: likewise, GPa.
        uncertainty: largest of any atom in any row, eV/A.
        uncertain_at: step of that row.
    """

    time: float
    drift: float | None
    drift_error: float | None
    fluctuation: float | None
    temperature: float
    temperature_deviation: float
    volume: float | None
    pressure: float | None
    uncertainty: float | None
    uncertain_at: int | None

    @property
    def drifts(self) -> bool:
        """Whether more than 1 meV/atom is lost or gained in a picosecond, beyond doubt."""
        if self.drift is None or self.drift_error is None:
            return False
        return abs(self.drift) > max(1.0, 4.0 * self.drift_error)


def summarize(rows: Mapping[str, np.ndarray], atoms: int) -> Summary:
    """The figures of a log.

    Args:
        rows: arrays by column.
        atoms: how many there are.
    """
    time = rows["time_fs"] / 1000.0
    half = slice(len(time) // 2, None)
    drift, error, fluctuation = _line(rows, time, atoms)
    moves = "volume_A3" in rows and np.ptp(rows["volume_A3"]) > 0
    spread = rows.get("max_forces_uncertainty_eV_A")
    worst = None if spread is None else int(spread.argmax())
    return Summary(
        time=float(time[-1]),
        drift=drift,
        drift_error=error,
        fluctuation=fluctuation,
        temperature=float(rows["temperature_K"][half].mean()),
        temperature_deviation=float(rows["temperature_K"][half].std()),
        volume=float(rows["volume_A3"][half].mean()) if moves else None,
        pressure=float(rows["pressure_GPa"][half].mean()) if "pressure_GPa" in rows else None,
        uncertainty=None if spread is None or worst is None else float(spread[worst]),
        uncertain_at=None if worst is None else int(rows["step"][worst]),
    )


def _line(
    rows: Mapping[str, np.ndarray], time: np.ndarray, atoms: int
) -> tuple[float | None, float | None, float | None]:
    """Slope, its standard error, and what is left around the line, of the conserved quantity."""
    if "conserved_eV" not in rows or len(time) < 3 or time[-1] - time[0] < _SHORTEST:
        return None, None, None
    conserved = 1000.0 * (rows["conserved_eV"] - rows["conserved_eV"][0]) / atoms
    slope, start = np.polyfit(time, conserved, 1)
    around = conserved - slope * time - start
    error = np.sqrt((around**2).sum() / (len(time) - 2) / ((time - time.mean()) ** 2).sum())
    return float(slope), float(error), float(around.std())


_LINES = 10


class MDDisplay:
    """Shows steps of a simulation.

    Args:
        steps: in all.
        done: where a run that goes on begins.
        atoms: how many there are.
    """

    def __init__(self, steps: int, done: int, atoms: int) -> None:
        self._steps, self._done, self._atoms = steps, done, atoms
        self._first: float | None = None
        self._began = self._moved = time.monotonic()
        self._watch = Watch("simulating", "steps", steps)  # a line each minute in a log
        self._bar = progress_bar(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[words]}"),
        )

    def __enter__(self) -> MDDisplay:
        self._watch.__enter__()
        if self._bar is not None:
            start_bar(self._bar)
            self._task = self._bar.add_task("md", total=self._steps, completed=self._done, words="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            stop_bar(self._bar)
        self._watch.__exit__(kind, error, trace)

    def step(self, row: Measurement) -> None:
        """Show a step, unless one was shown only just now."""
        if row.conserved is not None and self._first is None:
            self._first = row.conserved
        now = time.monotonic()
        self._watch.done = row.step
        last = row.step >= self._steps
        if self._bar is not None and (last or now - self._moved > 1 / REDRAWS_PER_SECOND):
            self._moved = now
            self._bar.update(self._task, completed=row.step, words=self._words(row, now))
        tenth = self._steps // _LINES
        if last or (tenth and row.step % tenth == 0 and row.step > self._done):
            _logger.info("step %d/%d | %s", row.step, self._steps, self._words(row, now))

    def _words(self, row: Measurement, now: float) -> str:
        parts = [f"{row.temperature:.0f} K"]
        if row.conserved is not None and self._first is not None:
            drift = 1000.0 * (row.conserved - self._first) / self._atoms
            parts.append(f"conserved energy {drift:+.2f} meV/atom")
        if row.volume is not None and row.pressure is not None:
            parts.append(f"{row.volume:.0f} A^3, {row.pressure:.2f} GPa")
        if row.forces_uncertainty is not None:
            parts.append(f"uncertainty {1000.0 * row.forces_uncertainty:.0f} meV/A")
        elif row.energy_uncertainty is not None:
            sure = 1000.0 * row.energy_uncertainty / self._atoms
            parts.append(f"uncertainty {sure:.1f} meV/atom")
        rate = (row.step - self._done) / max(now - self._began, 1e-9)
        parts.append(f"{rate:.1f} steps/s")
        return " | ".join(parts)
