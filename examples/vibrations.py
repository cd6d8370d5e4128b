"""Vibrations of a molecule: relaxed with a model, then its frequencies by finite differences.

    python examples/vibrations.py checkpoints/pet-xtb-s.ckpt ethanol

Prints the wavenumbers and the zero-point energy. Derivatives of forces need many digits and a model
that obeys symmetry, so this computes in float64 and as a mean over orientations. ASE's ``Phonons``
and phonopy take the same calculator for crystals.
"""

from __future__ import annotations

import argparse
from tempfile import TemporaryDirectory

import numpy as np
from ase.build import molecule
from ase.optimize import BFGS
from ase.units import invcm
from ase.vibrations import Vibrations

from pet_finetune import PETCalculator

#: Names that people use, and ASE's.
NAMES = {"ethanol": "CH3CH2OH", "water": "H2O", "methanol": "CH3OH", "acetaldehyde": "CH3CHO"}


def main() -> None:
    """Relax, move each atom to and fro, and print what follows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", help="a checkpoint, or the name of one")
    parser.add_argument("molecule", help=f"{', '.join(NAMES)}, or a name of ase.build.molecule")
    parser.add_argument("--orientations", type=int, default=4)
    arguments = parser.parse_args()
    atoms = molecule(NAMES.get(arguments.molecule, arguments.molecule))
    atoms.calc = PETCalculator(
        arguments.model, dtype="float64", orientations=arguments.orientations
    )
    BFGS(atoms, logfile=None).run(fmax=1e-3, steps=500)
    with TemporaryDirectory() as folder:
        vibrations = Vibrations(atoms, name=f"{folder}/cache")
        vibrations.run()
        energies = vibrations.get_energies()  # imaginary ones are unstable directions
    wavenumbers = np.where(energies.imag > 0, -energies.imag, energies.real) / invcm
    internal = np.sort(wavenumbers)[6 if len(atoms) > 2 else 5 :]
    print("wavenumbers, 1/cm:", " ".join(f"{value:.0f}" for value in internal))
    print(f"zero-point energy: {sum(internal.clip(0)) * invcm / 2:.3f} eV")


if __name__ == "__main__":
    main()
