"""What a mean over orientations leaves of a structure's orientation, and what it costs.

    python -m benchmarks.orientations MODEL FILE

For each group that `PETCalculator(orientations=...)` has: by how much forces and energies of the
same structure in random orientations lie apart (mean absolute deviation from their mean, as
`pet-finetune eval --rotations` prints it), the error of the forces against the file's, and the
median time of an evaluation. Prints Markdown.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import ase.io
import numpy as np
import torch
from ase import Atoms

from pet_finetune import PETCalculator
from pet_finetune.data.epochs import random_rotations
from pet_finetune.model.inference import ORIENTATIONS


@dataclass
class Found:
    """Of one structure: energies in eV/atom and forces in eV/Angstrom, one for each orientation."""

    energies: np.ndarray
    forces: np.ndarray
    seconds: list[float]

    def spread(self, kind: str) -> float:
        """Mean absolute deviation from the mean over the orientations."""
        values: np.ndarray = getattr(self, kind)
        return float(np.abs(values - values.mean(0)).mean())


def in_orientations(calc: PETCalculator, atoms: Atoms, rotations: np.ndarray) -> Found:
    """Predict a structure in each orientation; forces are rotated back."""
    energies, forces, seconds = [], [], []
    for rotation in rotations:
        rotated = Atoms(
            atoms.numbers,
            atoms.positions @ rotation.T,
            cell=atoms.cell.array @ rotation.T,
            pbc=atoms.pbc,
            info=atoms.info,
        )
        started = time.perf_counter()
        forces.append(calc.get_forces(rotated) @ rotation)
        seconds.append(time.perf_counter() - started)
        energies.append(calc.get_potential_energy(rotated) / len(atoms))
    return Found(np.array(energies), np.array(forces), seconds)


def row(model: str, count: int, frames: list[Atoms], rotations: np.ndarray) -> str:
    """A line of the table: one group of orientations."""
    calc = PETCalculator(model, device="cpu", orientations=count)
    calc.get_forces(frames[0])  # the kernels are ready and the weights listed
    found = [in_orientations(calc, frame, rotations) for frame in frames]
    weights = [len(frame) for frame in frames]
    forces = np.average([f.spread("forces") for f in found], weights=weights)
    energies = np.mean([f.spread("energies") for f in found])
    labels = zip(found, frames, strict=True)
    errors = np.concatenate([np.abs(f.forces - a.get_forces()).ravel() for f, a in labels])
    milliseconds = 1e3 * np.median([second for f in found for second in f.seconds])
    mae = errors.mean()
    return (
        f"| {count} | {1e3 * forces:.1f} ({100 * forces / mae:.0f} %) | {1e3 * energies:.2f} | "
        f"{1e3 * mae:.1f} | {milliseconds:.1f} |"
    )


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model")
    parser.add_argument("file", help="structures with forces, as ASE reads them (`@::10` for some)")
    parser.add_argument("--rotations", type=int, default=6, help="random ones of each structure")
    arguments = parser.parse_args()
    frames = ase.io.read(arguments.file, ":" if "@" not in arguments.file else None)
    generator = torch.Generator().manual_seed(0)
    rotations = random_rotations(arguments.rotations, generator).numpy()
    print("| orientations | spread of forces, meV/Å (of their error) | of energies, meV/atom "
          "| force MAE, meV/Å | ms |")  # fmt: skip
    print("|---|---|---|---|---|")
    for count in ORIENTATIONS:
        print(row(arguments.model, count, frames, rotations), flush=True)


if __name__ == "__main__":
    main()
