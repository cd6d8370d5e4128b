"""Energies, forces and stresses of GFN2-xTB, by tblite."""

from __future__ import annotations

import numpy as np
from ase import Atoms
from ase.calculators.calculator import CalculationFailed
from ase.calculators.singlepoint import SinglePointCalculator
from tblite.ase import TBLite

__all__ = ["MAX_FORCE", "WALL_FORCE", "label", "tight_binding"]

MAX_FORCE = 50.0  # eV/Angstrom; beyond it the geometry is of no use to anybody
WALL_FORCE = 200.0  # eV/Angstrom, of bare pairs: nothing closer holds a model up


def tight_binding() -> TBLite:
    """GFN2-xTB with tblite's own defaults (accuracy 1, electronic temperature 300 K).

    Two spin states only: all paired, or one electron unpaired where their number is odd.
    """
    return TBLite(method="GFN2-xTB", verbosity=0)


def label(
    atoms: Atoms, calculator: TBLite | None = None, max_force: float = MAX_FORCE
) -> Atoms | None:
    """A copy with energy (eV), forces (eV/A) and, in a cell, stress (eV/A^3).

    None where the SCF does not converge or an atom feels more than ``max_force``.
    """
    copy = atoms.copy()
    copy.calc = calculator or tight_binding()
    odd = int(copy.numbers.sum()) % 2
    copy.set_initial_magnetic_moments([float(odd)] + [0.0] * (len(copy) - 1) if odd else None)
    try:
        energy, forces = copy.get_potential_energy(), copy.get_forces()
        stress = copy.get_stress(voigt=False) if copy.pbc.all() else None
    except (CalculationFailed, RuntimeError):
        return None
    if not np.isfinite(energy) or not np.isfinite(forces).all() or np.abs(forces).max() > max_force:
        return None
    bare = Atoms(copy.numbers, copy.positions, cell=copy.cell, pbc=copy.pbc, info=dict(atoms.info))
    results = {"energy": float(energy), "forces": forces}
    if stress is not None:
        results["stress"] = stress
    bare.calc = SinglePointCalculator(bare, **results)
    return bare
