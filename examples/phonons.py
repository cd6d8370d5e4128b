"""Phonons of a crystal with phonopy: relaxed with a model, then force constants of a supercell.

    pip install phonopy
    python examples/phonons.py checkpoints/pet-xtb-s.ckpt crystal.xyz --supercell 2

Prints the frequencies at the centre of the Brillouin zone and at its corner, and the heat capacity
at 300 K. Differences of forces need many digits and a model that obeys symmetry, so this computes
in float64 and as a mean over orientations. Imaginary frequencies, printed as negative ones, mean
that the crystal is not in a minimum of the energy, or that the model is not suited for it.
"""

from __future__ import annotations

import argparse

import ase.io
import numpy as np
from ase import Atoms
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS
from phonopy import Phonopy
from phonopy.structure.atoms import PhonopyAtoms

from pet_finetune import PETCalculator


def main() -> None:
    """Relax, displace the atoms that symmetry leaves, and print what follows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", help="a checkpoint, or the name of one")
    parser.add_argument("crystal", help="any file ASE reads")
    parser.add_argument("--supercell", type=int, default=2, help="how often along each axis")
    parser.add_argument("--displacement", type=float, default=0.02, help="A")
    parser.add_argument("--orientations", type=int, default=4)
    parser.add_argument("--no-relax", action="store_true", help="take the crystal as it is")
    arguments = parser.parse_args()
    calculator = PETCalculator(
        arguments.model, dtype="float64", orientations=arguments.orientations
    )
    atoms = ase.io.read(arguments.crystal)
    atoms.calc = calculator
    if not arguments.no_relax:
        BFGS(FrechetCellFilter(atoms), logfile=None).run(fmax=1e-3, steps=300)

    unit = PhonopyAtoms(symbols=atoms.symbols, cell=atoms.cell, positions=atoms.positions)
    supercell = arguments.supercell * np.eye(3, dtype=int)
    phonons = Phonopy(unit, supercell_matrix=supercell, primitive_matrix="P")
    phonons.generate_displacements(distance=arguments.displacement)
    forces = []
    for cell in phonons.supercells_with_displacements:
        displaced = Atoms(cell.symbols, cell.positions, cell=cell.cell, pbc=True)
        forces.append(calculator.get_forces(displaced))
    print(f"{len(forces)} supercells of {len(forces[0])} atoms")
    phonons.forces = forces
    phonons.produce_force_constants()
    phonons.symmetrize_force_constants()
    for name, point in (("centre", (0, 0, 0)), ("corner", (0.5, 0.5, 0.5))):
        phonons.run_qpoints([point])
        frequencies = phonons.qpoints.frequencies[0]
        print(f"{name}, THz:", " ".join(f"{value:.2f}" for value in frequencies))
    phonons.run_mesh([8, 8, 8], is_gamma_center=True)
    phonons.run_thermal_properties(t_min=300, t_max=300, t_step=1)
    capacity = phonons.thermal_properties.heat_capacity[0]
    print(f"heat capacity at 300 K: {capacity:.1f} J/(mol K) of {len(atoms)} atoms")


if __name__ == "__main__":
    main()
