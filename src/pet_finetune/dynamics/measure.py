"""The numbers of a step (energies, temperature, pressure, uncertainty) and of a whole log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from ase import Atoms, units
from ase.md.md import MolecularDynamics

from .freedom import temperature
from .integrators import conserved_quantity

__all__ = ["Measurement", "Summary", "measure", "summarize"]


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
