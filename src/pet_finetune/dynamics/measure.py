"""The numbers of a step: energies, temperature, pressure, and uncertainty."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from ase import Atoms, units
from ase.md.md import MolecularDynamics

from .freedom import temperature
from .integrators import conserved_quantity

__all__ = ["Measurement", "measure"]


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
        energy_uncertainty: eV, of a committee.
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
