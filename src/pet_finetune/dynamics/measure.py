"""The numbers of a step (energies, temperature, pressure, uncertainty), of a log; shown, drawn."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.md.md import MolecularDynamics

from pet_finetune.installation import plotting
from pet_finetune.log import get_logger
from pet_finetune.terminal import Watch

from .integrators import conserved_quantity, temperature

_logger = get_logger(__name__)


@dataclass(frozen=True)
class Measurement:
    """Measurements of one step; None for what the structure or model does not have.

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
    """Numbers of a whole run, with parts before a restart. None if not available.

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
        """Whether the energy drifts significantly by more than 1 meV/atom in a picosecond."""
        if self.drift is None or self.drift_error is None:
            return False
        return abs(self.drift) > max(1.0, 4.0 * self.drift_error)


def summarize(rows: Mapping[str, np.ndarray], atoms: int) -> Summary:
    """The figures of a log."""
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
        self._began, self._text = time.monotonic(), "simulating"
        self._watch = Watch(lambda: self._text, "steps", steps)
        self._watch.done = done

    def __enter__(self) -> MDDisplay:
        self._watch.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._watch.__exit__(*exception)

    def step(self, row: Measurement) -> None:
        """Show a step; a tenth of them are logged."""
        if row.conserved is not None and self._first is None:
            self._first = row.conserved
        self._watch.done, self._text = row.step, self._words(row)
        tenth = self._steps // _LINES
        if row.step >= self._steps or (tenth and row.step % tenth == 0 and row.step > self._done):
            _logger.info("step %d/%d | %s", row.step, self._steps, self._text)

    def _words(self, row: Measurement) -> str:
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
        rate = (row.step - self._done) / max(time.monotonic() - self._began, 1e-9)
        parts.append(f"{rate:.1f} steps/s")
        return " | ".join(parts)


_MOST_POINTS = 2000
_AVERAGED = 50  # points in a running mean, where there are enough


def simulation_svg(
    rows: Mapping[str, np.ndarray], atoms: int, target: float, limit: float | None = None
) -> str:
    """A panel each for energy, temperature and, where the log has them, volume and uncertainty.

    Raises:
        PetFinetuneError: matplotlib is not installed.
    """
    rc_context, Figure = plotting()
    step = max(1, len(rows["step"]) // _MOST_POINTS)
    thin = {name: values[::step] for name, values in rows.items()}
    panels = [_draw_energy, _draw_temperature]
    if "volume_A3" in rows and np.ptp(rows["volume_A3"]) > 0:
        panels.append(_draw_volume)
    if "max_forces_uncertainty_eV_A" in rows or "energy_uncertainty_eV" in rows:
        panels.append(_draw_uncertainty)
    # Letters as letters and names by a fixed rule: the same log gives the same file.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "simulation", "font.size": 9}):
        height = 1.9 * len(panels) + 0.5
        figure = Figure(figsize=(7.0, height))
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False).ravel()
        figure.subplots_adjust(
            left=0.13, right=0.97, bottom=0.5 / height, top=1 - 0.3 / height, hspace=0.22
        )
        unit, factor = ("ps", 1e-3) if rows["time_fs"][-1] >= 1000 else ("fs", 1.0)
        time = thin["time_fs"] * factor
        for axis, draw in zip(axes, panels, strict=True):
            draw(axis, time, thin, {"atoms": atoms, "target": target, "limit": limit})
            axis.grid(color="0.9", linewidth=0.6)
            axis.set_axisbelow(True)
        axes[-1].set_xlabel(f"time ({unit})")
        axes[-1].set_xlim(time[0], time[-1] if len(time) > 1 else time[0] + 1)
        figure.align_ylabels(axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _draw_energy(axis: Any, time: np.ndarray, rows: Mapping[str, np.ndarray], of: Any) -> None:
    """The conserved quantity; potential and total energy where there is none (Langevin)."""
    per_atom = 1000.0 / of["atoms"]
    if "conserved_eV" in rows:
        shown = {"conserved energy": rows["conserved_eV"]}
    else:
        shown = {"total energy": rows["total_eV"], "potential energy": rows["potential_eV"]}
    for (name, values), color in zip(shown.items(), ("tab:blue", "0.6"), strict=False):
        axis.plot(time, (values - values[0]) * per_atom, label=name, color=color, linewidth=0.9)
    axis.set_ylabel("energy − start\n(meV/atom)")
    _legend(axis)


def _legend(axis: Any) -> None:
    """Above the panel, where it hides nothing."""
    place = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "borderaxespad": 0.0}
    axis.legend(frameon=False, fontsize=8, ncols=2, **place)


def _draw_temperature(axis: Any, time: np.ndarray, rows: Mapping[str, np.ndarray], of: Any) -> None:
    values = rows["temperature_K"]
    axis.plot(time, values, color="tab:red", alpha=0.45, linewidth=0.7)
    if len(values) > 2 * _AVERAGED:
        mean = np.convolve(values, np.ones(_AVERAGED) / _AVERAGED, mode="valid")
        axis.plot(time[_AVERAGED // 2 :][: len(mean)], mean, color="tab:red", label="running mean")
    axis.axhline(of["target"], color="0.3", linestyle="--", linewidth=0.9, label="asked for")
    axis.set_ylabel("temperature\n(K)")
    _legend(axis)


def _draw_volume(axis: Any, time: np.ndarray, rows: Mapping[str, np.ndarray], of: Any) -> None:
    axis.plot(time, rows["volume_A3"] / of["atoms"], color="tab:green", linewidth=0.9)
    axis.set_ylabel("volume\n(Å³/atom)")


def _draw_uncertainty(axis: Any, time: np.ndarray, rows: Mapping[str, np.ndarray], of: Any) -> None:
    """Draw the uncertainty of the forces if it is known, else that of the energy."""
    if "max_forces_uncertainty_eV_A" in rows:
        values, limit = rows["max_forces_uncertainty_eV_A"], of["limit"]
        axis.set_ylabel("largest force\nuncertainty (meV/Å)")
        if limit is not None:
            axis.axhline(1000.0 * limit, color="0.3", linestyle="--", linewidth=0.9)
    else:
        values = rows["energy_uncertainty_eV"] / of["atoms"]
        axis.set_ylabel("uncertainty of\nthe energy (meV/atom)")
    axis.plot(time, 1000.0 * values, color="tab:purple", linewidth=0.7)
    axis.set_ylim(bottom=0.0)
