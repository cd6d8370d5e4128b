"""Degrees of freedom, temperatures that count them, and initial velocities."""

from __future__ import annotations

import numpy as np
from ase import Atoms, units
from ase.md.velocitydistribution import Stationary, ZeroRotation

__all__ = ["degrees_of_freedom", "draw_velocities", "temperature"]


def degrees_of_freedom(atoms: Atoms, momentum_kept: bool) -> int:
    """How many squares of momenta share the kinetic energy.

    3N, less 3 where the total momentum is zero and stays so, less 3 again (2 for linear ones) for
    the angular momentum of a structure that is not periodic. ASE's ``Atoms.get_temperature``
    always counts 3N, which makes a molecule of nine atoms at rest 22 % too cold.

    Args:
        atoms: the structure; constraints are counted as ASE counts them.
        momentum_kept: nothing (such as Langevin's random forces) changes the total momentum.
    """
    count = len(atoms)
    if atoms.constraints:
        return int(atoms.get_number_of_degrees_of_freedom())
    if not momentum_kept or count == 1:
        return 3 * count
    return 3 * count - 3 - (0 if atoms.pbc.any() else _rotations(atoms))


def _rotations(atoms: Atoms) -> int:
    """Axes about which a structure can turn: 3, 2 where it is linear."""
    moments = np.sort(atoms.get_moments_of_inertia())
    return 3 if moments[0] > 1e-6 * moments[-1] else 2


def temperature(atoms: Atoms, freedom: int) -> float:
    """Kinetic temperature in K."""
    return float(2.0 * atoms.get_kinetic_energy() / (freedom * units.kB))


def draw_velocities(atoms: Atoms, wanted: float, rng: np.random.Generator) -> None:
    """Maxwell-Boltzmann momenta without momentum and rotation of the whole, at exactly ``wanted``.

    Args:
        atoms: changed in place.
        wanted: K.
        rng: where the random numbers come from.
    """
    width = np.sqrt(atoms.get_masses() * units.kB * wanted)[:, None]
    atoms.set_momenta(rng.standard_normal((len(atoms), 3)) * width)
    if len(atoms) > 1 and not atoms.constraints:
        Stationary(atoms, preserve_temperature=False)
        if not atoms.pbc.any():
            with np.errstate(divide="ignore", invalid="ignore"):  # the axis of linear molecules
                ZeroRotation(atoms, preserve_temperature=False)
    found = temperature(atoms, degrees_of_freedom(atoms, momentum_kept=True))
    if found > 0:
        atoms.set_momenta(atoms.get_momenta() * np.sqrt(wanted / found))
